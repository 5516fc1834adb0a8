"""A run's best model as a folder to hand on: safetensors, scGPT's args and vocabulary, a model card.

    RUN --checked--> model.safetensors, args.json, vocab.json, classes.json, domains.json
                     README.md, the last: a model card as Hugging Face reads them

No path of this machine goes with it, and no credentials: of a local file its name is told, of a URL what
`redact` leaves. Called by `scshards publish`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scshards.base.storage import Storage, name_of
from scshards.cells.vocab import CLS
from scshards.exporting.output import Output
from scshards.model.classes import CLASSES, DOMAINS, read_names
from scshards.model.config import ModelConfig
from scshards.model.scgpt import LoadedModel, load_model
from scshards.model.scgpt_files import ARGS, TENSORS, VOCAB
from scshards.model.weights import write_tensors
from scshards.training.config import TrainConfig, differences
from scshards.training.log.metrics import read_metrics
from scshards.training.save.folder import RunFolder

CARD = "README.md"

_PATHS = frozenset({"start", "branch", "checkpoints", "cache_dir", "root"})
"""Settings that are addresses."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was published: its address, and each file's bytes."""

    output: str
    parameters: int
    step: int
    files: dict[str, int]


def publish(
    folder: str,
    output: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Published:
    """Write the best model of a run as safetensors, with what is needed to use it and a model card.

    Parameters
    ----------
    folder
        The run.
    output
        A local folder, not there yet or empty, or the address of one in an object store.
    storage_options
        For the file system of the output.

    Raises
    ------
    OutputExistsError
        When there is something at `output`.
    CheckpointError
        For weights that are damaged or not finite.
    ConfigError
        When `folder` is no run.
    """
    run = RunFolder(folder)
    config = run.config()
    loaded = load_model(folder)
    files = {
        TENSORS: write_tensors(loaded.model.state_dict()),
        ARGS: _json(_shared(loaded.args)),
        VOCAB: _json(dict(sorted(loaded.vocab.items(), key=lambda of: of[1]))),
        **{name: _json(tree) for name, tree in _names(folder).items()},
    }
    card = model_card(run, config, loaded).encode()
    with Output(os.fspath(output).rstrip("/"), storage_options, is_file=False) as target:
        for name, data in files.items():
            target.write(name, data)
        target.publish((CARD, card))
    sizes = {name: len(data) for name, data in files.items()} | {CARD: len(card)}
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return Published(output=target.name, parameters=parameters, step=_step(loaded), files=sizes)


def model_card(run: RunFolder, config: TrainConfig, loaded: LoadedModel) -> str:
    """The text of a model card; its head is what Hugging Face's Hub takes from one."""
    model, task = loaded.model.config, config.task.name
    parameters = sum(p.numel() for p in loaded.model.parameters())
    annotates = "\nscshards annotate DIR cells.h5ad -o annotated.h5ad" if model.n_classes else ""
    changed = differences(TrainConfig().tables(), _shared(config.tables()))
    chosen = {key: new for key, (_, new) in changed.items()}
    return f"""---
library_name: scshards
tags:
- single-cell
- scGPT
- {task}
---
# A transformer of single cells

{parameters:,} parameters in scGPT's shape ({model.n_layers} layers of {model.d_model}, \
{model.n_tokens:,} tokens), trained by scshards for the task {task}; the weights are those of step \
{_step(loaded):,}.

Licence: whoever publishes this names one, as `license:` in the head of this file.

## Trained on

{_cells(loaded)}

Settings that are not scshards' defaults, all of which are in `{ARGS}`:

{_table(("setting", "value"), ((k, json.dumps(v)) for k, v in chosen.items()))}

## Scores

{_scores(run)}

## Use

```sh
scshards embed DIR cells.h5ad -o embedded.h5ad{annotates}
scshards train shards -o run --start DIR
```

{_plain_torch(config, loaded)}"""


def _plain_torch(config: TrainConfig, loaded: LoadedModel) -> str:
    """How the weights are used without scshards, where that fits on a page."""
    model = loaded.model.config
    plain = model.value_style == "continuous" and model.cell_style == "cls"
    if not plain or model.domain_norm:
        return (
            f"`{TENSORS}` holds the tensors of scGPT's best_model.pt under their names; this model's "
            "input takes more than a few lines of plain torch.\n"
        )
    genes = [token for token in loaded.vocab if not token.startswith("<")][:3]
    lead = config.collate.cls_value
    values = [model.pad_value if lead is None else lead, 1.0, 3.0, 2.0][: 1 + len(genes)]
    return f"""Without scshards, in this folder:

```python
import json, torch
from safetensors.torch import load_file
from torch.nn import TransformerEncoder, TransformerEncoderLayer, functional as F
args, vocab, w = json.load(open("{ARGS}")), json.load(open("{VOCAB}")), load_file("{TENSORS}")
layer = TransformerEncoderLayer(args["embsize"], args["nheads"], args["d_hid"], batch_first=True)
encoder = TransformerEncoder(layer, args["nlayers"], enable_nested_tensor=False).eval()
encoder.load_state_dict({{n[20:].replace("Wqkv.", "in_proj_"): w[n] for n in w \
if n.startswith("transformer_")}})
linear = lambda x, n: F.linear(x, w[n + ".weight"], w[n + ".bias"])
norm = lambda x, n: F.layer_norm(x, x.shape[-1:], w[n + ".weight"], w[n + ".bias"])
genes = torch.tensor([[vocab[g] for g in {json.dumps([CLS, *genes])}]])
values = torch.tensor([{values}])  # {_values(config, model)}
hidden = linear(values.clamp(max=512)[..., None], "value_encoder.linear1").relu()
x = norm(F.embedding(genes, w["encoder.embedding.weight"]), "encoder.enc_norm")
x = encoder(x + norm(linear(hidden, "value_encoder.linear2"), "value_encoder.norm"))
cells = F.normalize(x[:, 0], dim=1)  # [cells, {model.d_model}]
```
"""


def _values(config: TrainConfig, model: ModelConfig) -> str:
    c = config.collate
    kind = f"bins 1 to {model.n_bins - 1} of each cell's counts" if c.has_bins else c.values
    return f"of {CLS}, then {kind}; padding takes src_key_padding_mask"


def _names(folder: str) -> dict[str, Any]:
    """classes.json and domains.json, of models that have them."""
    found: dict[str, Any] = {}
    for file in (CLASSES, DOMAINS):
        if Storage(folder).exists(file):
            names = read_names(folder, file)
            found[file] = {"column": names.column, file.removesuffix(".json"): list(names.names)}
    return found


def _scores(run: RunFolder) -> str:
    lines = [m for m in read_metrics(run.metrics) if m["kind"] == "valid" and m.get("is_best")]
    parts = []
    if said := run.evaluation():
        split = said.get("split") if isinstance(said.get("split"), str) else "valid"
        parts.append(f"`scshards evaluate`, split {split}:\n\n{_figures(said)}")
    if lines:
        step = lines[-1]["step"]
        what = f"In training, of the split valid and of sets by name, at step {step:,}"
        parts.append(f"{what}:\n\n{_figures(lines[-1])}")
    return "\n\n".join(parts) or "There are none: nothing was evaluated."


def _figures(said: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name, value in said.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    ]
    return _table(("figure", "value"), rows)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {a} | {b} |" for a, b in ((a, b.replace("|", "\\|")) for a, b in lines))


def _cells(loaded: LoadedModel) -> str:
    """What the model was trained on, as training.plan wrote it down."""
    said = loaded.args.get("scshards", {}).get("shards")
    if said is None:
        return "The version of scshards that trained it did not write down on which cells."
    cells = ", ".join(f"{n:,} {split}" for split, n in said["cells"].items())
    inputs = [f"{s['name']} ({s['cells']:,} cells)" for s in said["sources"]]
    inputs += [f"{said['more_sources']:,} more"] if said["more_sources"] else []
    return (
        f"The train split of a shard set of {cells} cells; the split's fingerprint is "
        f"`{said['fingerprint']}`. Its inputs: {', '.join(inputs)}."
    )


def _step(loaded: LoadedModel) -> int:
    return int(loaded.args.get("scshards", {}).get("step", 0))


def _shared(value: Any, key: str = "") -> Any:
    """A JSON value without paths of this machine and credentials."""
    if isinstance(value, dict):
        return {name: _shared(v, name) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shared(v, key) for v in value]
    is_path = isinstance(value, str) and (key in _PATHS or "://" in value or value[:1] in "/~")
    return name_of(value) if is_path and value else value


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
