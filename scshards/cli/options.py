"""The options of commands, made from the dataclasses that hold them, so that each is written once.

    @command("pack")
    @options(PackOptions)                              each field: its name, type, default and help
    @option("--restart", is_flag=True, help="...")     what is in no dataclass
    def pack(..., **chosen):
        asked = build(PackOptions, chosen)             what was given, as the dataclass

A field `cells_per_shard` is `--cells-per-shard`. Its help is its entry under "Attributes" in the class's
docstring ("As in PackOptions." takes the entry of that class). GROUPS says in which part of the help an
option stands and what its value is called; FLAGS has the spellings that differ from the field.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import click

from scshards.base import config
from scshards.base.errors import ConfigError, ScshardsError

T = TypeVar("T")
E = TypeVar("E", bound=ScshardsError)
F = TypeVar("F", bound=Callable[..., Any])

GROUPS = {
    "Inputs": "layer:NAME raw feature_types:TYPE obsm:NAME,NAME feature_arrays:TYPE "
    "arrays:NAME,NAME ids_vocab:FILE list_columns:GENES,VALUES trust_pickle "
    "on_bad_input same_names allow_repeats queries:FILE release:DATE index:DIR offline",
    "Genes": "vocab:FILE gene_column:COL id_column:COL strip_versions allow_mixed min_match:SHARE "
    "min_cells:N",
    "Cells": "splits:NAME split:NAME shuffle group_by:COL,COL seed:N where:EXPR take:N weights:COL "
    "epoch_cells:CELLS domain_by:LABEL stratify:LABEL on_small_domain unique:COL min_genes:N "
    "max_genes:N "
    "min_counts:X partitions:I domain_column:COL max_length:N balanced:LABEL by:COL,COL "
    "control:CATEGORY match:COL,COL holdout:FILE "
    "batch_by:LABEL top:N medians from_pickle:FILE",
    "Labels and splits": "obs:COL,COL max_categories:N valid_fraction:SHARE test_fraction:SHARE "
    "split_by:COL split_file:FILE one_split",
    "Output": "output:PATH to append values round_within:OFF dtype "
    "cells_per_shard:N max_cells:N compression hf_card column:COL key:NAME probabilities confidence:P "
    "truth:COL plot:FILE runs:RUN embeddings:FILE colors:COL layout:OBSM embed_cells:N dry_run",
    "Training and batches": "root:ROOT task start:DIR config:FILE settings:KEY=VALUE "
    "branch:RUN[@STEP] demand:CELLS seconds:S epoch:N batches:N batch_size:N "
    "tokens_per_batch:N world_size:N lanes:N shuffle_buffer:CELLS n_bins:N include_zero_genes:N",
    "Work": "workers:N threads:N device:NAME precision:NAME share:I/N finish restart quick "
    "repair repair_from:ROOT2 dask:ADDRESS scratch:DIR cache_dir:DIR cache_size:SIZE "
    "storage_options:JSON|@FILE retries:N timeout:S",
    "Shown": "cell_key:KEY cells:N batch sources wide as_json no_progress quiet verbose help",
}
"""{part of the help: its options, in this order, each with what its value is called}."""

PLACES = {
    name: (group, value or None)
    for group, said in GROUPS.items()
    for name, _, value in (one.partition(":") for one in said.split())
}
"""{option: (its part of the help, what its value is called)}."""

FLAGS: dict[str, tuple[str, ...]] = {
    "output": ("-o", "--output"),
    "splits": ("--split",),
    "partitions": ("--partition",),
    "held_out": ("--split-file",),
    "feature_types": ("--feature-type",),
    "feature_arrays": ("--feature-array",),
    "key": ("--obsm",),
}
"""The flags of fields whose flag is not their name with dashes."""


_TOGETHER = {
    "where": "join them in one: --where '(...) and (...)'",
    "split_file": "give one file, which names all values to hold out",
}
"""What to do where one of these options is given twice; give any other one once."""


class Option(click.Option):
    """An option of click that has a help text and a place in GROUPS."""

    def __init__(self, *args: Any, **attrs: Any) -> None:
        super().__init__(*args, **{"show_default": True, **attrs})
        _, value = PLACES[str(self.name)]  # help shows no option without one
        if self.metavar is None and not self.is_flag:
            self.metavar = value
        if self.multiple:
            commas = isinstance(self.type, _Listed)
            self.help = f"{self.help} Repeatable{', or with commas between' if commas else ''}."

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser keep all values that are given, where click alone keeps the last one."""
        super().add_to_parser(cast(Any, _KeepingAll(parser)), ctx)

    def consume_value(self, ctx: click.Context, opts: Any) -> Any:
        """The value that was given, and a usage error where several were and one is taken.

        A plain flag may come several times, as long as it says the same each time.
        """
        if self.multiple or self.name not in opts:
            return super().consume_value(ctx, opts)
        values = opts[self.name]
        if len(values) > 1 and not ctx.resilient_parsing:
            if not self.is_flag:
                raise click.UsageError(
                    f"{self.opts[-1]} is given {_times(len(values))}, and one value is taken\n"
                    f"  to do: {_TOGETHER.get(str(self.name), 'give it once')}",
                    ctx,
                )
            if len(set(values)) > 1:
                raise click.UsageError(
                    f"{self.opts[-1]} and {self.secondary_opts[-1]} contradict each other\n"
                    "  to do: leave one of them out",
                    ctx,
                )
        return super().consume_value(ctx, {**opts, self.name: values[-1]})

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Defaults in one style: numbers as tables have them, and no ranges."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if "default" in extra and isinstance(self.default, int | float) and not self.is_flag:
            extra["default"] = f"{self.default:,.10g}"
        return extra


def option(*flags: str, **attrs: Any) -> Callable[[F], F]:
    """`click.option`, for what is in no dataclass."""
    return click.option(*flags, cls=Option, **attrs)


store_options = option(
    "--storage-options",
    help="Options of the file systems, as JSON or in a TOML or JSON file: for all addresses, or in "
    "tables by how addresses begin. Without it, S3 takes endpoint and credentials from the AWS "
    "variables and profiles.",
)
"""The option of commands that read or write a store."""

_split_file = option(
    "--split-file",
    help="A TOML file of values to hold out, in place of fractions: "
    'column = "donor_id" (or --split-by), valid = ["D1", "D2"], test = ["D3"]. All others are for '
    "training.",
)
_OF_FIELDS = {"storage_options": store_options, "held_out": _split_file}
"""The options of fields that are no text or number."""


def output(metavar: str, text: str, *, required: bool = True) -> Callable[[F], F]:
    """The option of what is made."""
    return option("-o", "--output", required=required, metavar=metavar, help=text)


def options(
    cls: type, *, only: str = "", but: str = "", optional: bool = False
) -> Callable[[F], F]:
    """The fields of a dataclass as options: all of them, `only` some, or all `but` some.

    Parameters
    ----------
    cls
        The dataclass.
    only, but
        Names of fields, with blanks between.
    optional
        Whether those without a default may be left out, too, and are None then.
    """
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    names = only.split() or [name for name in fields if name not in but.split()]

    def decorate(command: F) -> F:
        for name in reversed(names):
            if name in _OF_FIELDS:
                command = _OF_FIELDS[name](command)
                continue
            attrs, flags = _attributes(hints[name], fields[name]), flags_of(name)
            if optional:
                attrs.pop("required", None)
            if attrs.get("is_flag") and attrs["default"] is not False:
                flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
            # Fields become options, other code loses its quotes.
            text = re.sub("`([^`]*)`", lambda found: _spelled(found[1]), texts.get(name, ""))
            command = option(*flags, name, help=text, **attrs)(command)
        return command

    return decorate


def build(cls: type[T], chosen: dict[str, Any]) -> T:
    """The dataclass of what was chosen; its fields are taken out of `chosen`.

    Raises
    ------
    click.UsageError
        When the dataclass refuses them.
    """
    _read_split_file(chosen)
    names = [f.name for f in dataclasses.fields(cls) if f.name in chosen]  # type: ignore[arg-type]
    try:
        return cls(**{name: chosen.pop(name) for name in names})
    except ConfigError as e:
        raise click.UsageError(str(spelled(e, click.get_current_context()))) from e


@dataclass(frozen=True, kw_only=True)
class _SplitFile:
    """What a split file says."""

    column: str | None = None
    valid: tuple[Any, ...] | None = None
    test: tuple[Any, ...] | None = None


def read_split_file(path: str, split_by: str | None = None) -> dict[str, Any]:
    """`split_by` and `held_out` as a file has them; who takes them checks the values.

    Raises
    ------
    ConfigError
        When the file is absent or malformed, has unknown keys, or names another column than `split_by`.
    """
    said = config.build(_SplitFile, config.read_toml(path), where=path)
    if split_by and said.column and split_by != said.column:
        raise ConfigError(
            f"it holds out values of {said.column!r}, and --split-by says {split_by!r}",
            where=path,
            advice="leave --split-by out, or name the same column",
        )
    held_out = {"valid": said.valid, "test": said.test}
    return {
        "split_by": said.column or split_by,
        "held_out": {split: values for split, values in held_out.items() if values is not None},
    }


def given(chosen: dict[str, Any]) -> dict[str, Any]:
    """Of what was chosen, what differs from what click fills in for options that are not given."""
    _read_split_file(chosen)
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {
        name: value
        for name, value in chosen.items()
        # --retries and --timeout are in the options of stores.
        if name == "storage_options" or context.get_parameter_source(name) is not default
    }


def flags_of(name: str) -> tuple[str, ...]:
    """How the option of a field is spelled, the long way last."""
    return FLAGS.get(name, ("--" + name.replace("_", "-"),))


def spelled(error: E, context: click.Context) -> E:
    """The error, with options where it names the fields that they are made from."""
    flags = {name: spelling[-1] for name, spelling in FLAGS.items()}
    flags |= {p.name: p.opts[-1] for p in context.command.params if isinstance(p, Option)}
    if error.where is not None and all(name in flags for name in error.where.split(", ")):
        error.where = ", ".join(dict.fromkeys(flags[name] for name in error.where.split(", ")))
    return error


def field_texts(cls: type, section: str = "Attributes") -> dict[str, str]:
    """{field: its entry under "Attributes"} of a dataclass and those that it extends."""
    texts: dict[str, str] = {}
    for of in reversed(cls.__mro__[:-1]):
        _, _, entries = inspect.cleandoc(of.__doc__ or "").partition(f"{section}\n----------\n")
        for names, text in re.findall(r"^(\w.*)\n((?: .*\n?|\n)+)", entries, re.M):
            said = " ".join(text.split())
            as_in = re.fullmatch(r"As in (\w+)\.(.*)", said)
            elsewhere = field_texts(getattr(sys.modules[of.__module__], as_in[1])) if as_in else {}
            for name in names.split(", "):
                texts[name] = elsewhere[name] + as_in[2] if as_in else said
    return texts


class _KeepingAll:
    """A parser of click whose options keep every value that is given, in a list."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def add_option(self, *, action: str, **attrs: Any) -> None:
        self._parser.add_option(action=action.replace("store", "append"), **attrs)


def _times(n: int) -> str:
    return "twice" if n == 2 else f"{n} times"


class _Listed(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between, as a tuple."""

    name = "names"

    def __init__(self, item: type = str) -> None:
        self._item = click.types.convert_type(item)

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",")]
        return tuple(self._item(name, param, ctx) for name in names if name)


class ShareType(click.ParamType):  # type: ignore[type-arg]
    """I/N, as two numbers."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        i, slash, n = value.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            self.fail(f"{value!r} is no share: give I/N, I from 1 to N, such as 3/16", param, ctx)
        return int(i), int(n)


def _read_split_file(chosen: dict[str, Any]) -> None:
    """Put what the split file says, if there is one, in its place."""
    path = chosen.pop("split_file", None)
    if path is not None:
        chosen |= read_split_file(path, chosen["split_by"])


def _united(context: click.Context, parameter: click.Parameter, values: Any) -> Any:
    """The names of an option that was given once or more often; () for `--obs ''`."""
    if context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.DEFAULT:
        return parameter.default
    return tuple(name for names in values for name in names)


def _attributes(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """What click is told of a field of a dataclass."""
    attrs: dict[str, Any] = {"default": field.default}
    if field.default is dataclasses.MISSING:
        is_required = field.default_factory is dataclasses.MISSING
        attrs = {"required": True} if is_required else {}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = typing.get_args(hint)[0]  # what a command takes comes first
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return attrs | {"type": click.Choice(inner)}
    if origin is tuple and inner[-1] is ...:
        return attrs | {"type": _Listed(inner[0]), "multiple": True, "callback": _united}
    if origin is tuple and inner == (int, int):
        return attrs | {"type": ShareType()}
    if origin is tuple:
        return attrs | {"type": _Listed(), "default": ",".join(attrs["default"])}
    return attrs | ({"is_flag": True} if hint is bool else {"type": hint})


def _spelled(name: str) -> str:
    return flags_of(name)[-1] if name in PLACES or name in FLAGS else name
