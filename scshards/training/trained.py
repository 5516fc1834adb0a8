"""Which of a model's parameters are trained, and at which share of the learning rate.

    optim.freeze        parts by their names in the state_dict: no gradient, no moments, the same bits
    optim.lora_rank     adapters in the layers and the heads; what makes an embedding is frozen
    optim.layer_decay   lower rates further away from the heads

Called by prepare, plan, optim, the step and applying.replay.
"""

from __future__ import annotations

from torch import nn

from scshards.base.errors import ConfigError
from scshards.model.adapters import ATTENTION, FEED_FORWARD, SUFFIXES, add_adapters
from scshards.model.scgpt import TRUNK
from scshards.model.transformer import CellModel
from scshards.training.settings import OptimSettings

_INPUTS = ("encoder", "value_encoder", "flag_encoder", "dsbn")
"""What comes before the first layer."""


def choose_trained(model: CellModel, settings: OptimSettings, *, seed: int) -> None:
    """Freeze parts of a model, and give it adapters, as the settings say; on the CPU, in place.

    Raises
    ------
    ConfigError
        For names that no part has, and where nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in settings.freeze:
        if not any(_is_of(name, part) for name in names):
            known = dict.fromkeys(_parts(names))
            raise ConfigError(
                f"the model has no part {part!r:.80}",
                where="optim.freeze",
                advice=f"its parts are {', '.join(known)}; names below them, as in best_model.pt, "
                "do too",
            )
    for name, p in model.named_parameters():
        if any(_is_of(name, part) for part in settings.freeze):
            p.requires_grad_(False)
    if settings.lora_rank:
        _adapt(model, settings, seed)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing of the model is left to train", where="optim.freeze")


def _adapt(model: CellModel, settings: OptimSettings, seed: int) -> None:
    rank, encoder = settings.lora_rank, model.transformer_encoder
    most = min(model.config.d_model, model.config.d_hid)
    if rank > most:
        raise ConfigError(
            f"adapters of rank {rank} are larger than the weights that they stand beside",
            where="optim.lora_rank",
            advice=f"give a rank far below {most}, such as 8",
        )
    layers = ATTENTION + (FEED_FORWARD if settings.lora_feed_forward else ())
    alpha = rank if settings.lora_alpha is None else settings.lora_alpha
    if not add_adapters(encoder, layers, rank, alpha, seed=seed):
        raise ConfigError(
            "optim.freeze leaves no layer that could have an adapter",
            where="optim.lora_rank",
            advice="what makes a cell embedding is frozen beside adapters anyway; name only layers "
            "that are to have none",
        )
    for name, p in model.named_parameters():
        if name.split(".")[0] in TRUNK and name.rpartition(".")[2] not in SUFFIXES:
            p.requires_grad_(False)


def keeps(settings: OptimSettings, part: str) -> bool:
    """Whether all of a part stays as it is, by the settings."""
    is_trunk = part.split(".")[0] in TRUNK and not part.startswith("transformer_encoder")
    frozen = any(_is_of(part, name) for name in settings.freeze)
    return frozen or (settings.lora_rank > 0 and is_trunk)


def still(module: nn.Module) -> list[nn.Module]:
    """The outermost modules with weights of which none is trained.

    They compute in training as in an evaluation: without dropout, by running statistics.
    """
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [module]
    return [found for child in module.children() for found in still(child)]


def rate_share(name: str, n_layers: int, decay: float) -> float:
    """The share of the learning rate that a parameter is trained at, by its name in the model.

    ``decay ** (n_layers + 1 - depth)``: depth 0 is what comes before the first layer (embeddings of
    genes and values, flags, batch norm by domain), depth i the i-th layer, from 1, and n_layers + 1 the
    heads, which have the whole rate. So in BEiT's fine-tuning (Bao et al., 2021), after ELECTRA's.
    """
    part, _, rest = name.partition(".")
    depth = n_layers + 1
    if part in _INPUTS:
        depth = 0
    elif part == "transformer_encoder":
        depth = 1 + int(rest.split(".")[1])
    return decay ** (n_layers + 1 - depth)


def _is_of(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def _parts(names: list[str]) -> list[str]:
    """The model's parts, and its layers one by one."""
    return [
        ".".join(n.split(".")[: 3 if n.startswith("transformer_encoder.") else 1]) for n in names
    ]
