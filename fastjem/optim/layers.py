"""Learning rates that fall with the distance from the heads, layer by layer, as timm's models tell their layers."""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from fastjem.errors import UserError

HEADS = "heads_of_the_method.weight"  # no model's layer has that name, so it counts as the heads' layer


class _WithHeads:
    """A model's parameters, and one of the heads behind it, for timm's `group_parameters`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from self.model.named_parameters()
        yield HEADS, None


def has_layers(model: nn.Module) -> bool:
    """Whether a model tells its layers, as timm's do."""
    return hasattr(model, "group_matcher")


def rate_factors(model: nn.Module, layer_decay: float = 1.0, patch_embed: float = 1.0) -> dict[str, float]:
    """The factor on the learning rate of each parameter of an encoder, by its name in it.

    `layer_decay ** (layers between the parameter's and the heads')`, where the heads' own are 1: of a ViT of 12 blocks
    the last one has `layer_decay`, the first one its 12th power, and the stem, that is patch embedding, positions and
    class token, the 13th (Bao et al. 2022, BEiT, arXiv 2106.08254; timm's `param_groups_layer_decay`).

    Args:
        model: one of timm's where layer_decay isn't 1: its `group_matcher` says which layer a name belongs to.
        layer_decay: above 0; 1: all rates are alike.
        patch_embed: a further factor, of the patch embedding (DINOv2, arXiv 2304.07193, has 0.2).

    Raises:
        UserError: for a model that doesn't tell its layers, or has no patch embedding.
    """
    names = [name for name, _ in model.named_parameters()]
    factors = dict.fromkeys(names, 1.0)
    if layer_decay != 1:
        layers = _layers(model, layer_decay)
        factors = {name: layer_decay ** (layers[HEADS] - layers[name]) for name in names}
    if patch_embed != 1:
        concerned = [name for name in names if name.startswith("patch_embed.")]
        if not concerned:
            kind = type(model).__name__
            raise UserError(f"--patch-embed-rate {patch_embed:g}: {kind} has no patch embedding (patch_embed)")
        for name in concerned:
            factors[name] *= patch_embed
    return factors


def _layers(model: nn.Module, layer_decay: float) -> dict[str, int]:
    """The layer of each parameter by name, 0 nearest to the images, and that of `HEADS`."""
    if not has_layers(model):
        raise UserError(
            f"--layer-decay {layer_decay:g}: {type(model).__name__} doesn't tell its layers, as most of timm's models "
            "do (group_matcher)"
        )
    from timm.models import group_parameters

    given: Any = model
    return group_parameters(cast(nn.Module, _WithHeads(model)), given.group_matcher(coarse=False), reverse=True)
