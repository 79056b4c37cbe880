"""timm's models by name, made as a run's encoder: without a classifier, for images of the run's size."""

import functools
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from fastjem.data.size import Size, height_and_width, scaled, shorter, written
from fastjem.encoders import drop_paths, has_convolutional_stem, is_transformer, patch_size
from fastjem.errors import UserError, first_line, nearest

SHORT_VIT = re.compile(r"vit_(tiny|small|base|large)$")
STEMS = ("auto", "standard", "small")


def create(
    name: str, image_size: Size, *, stem: str = "auto", patch: int = 0, pool: str | None = None, drop_path: float = 0.0,
    channels: int = 3,
) -> nn.Module:  # fmt: skip
    """A timm model without its classifier, random weights: [B, C, H, W] -> [B, D].

    `vit_tiny`, `vit_small`, `vit_base` without patch and size stand for timm's model of that width with the patch that
    cuts the image into about 8 x 8 (at 112 pixels and less) or 14 x 14, along its shorter side.

    Args:
        name: a model of `timm.list_models()`, or one of the short names.
        image_size: of the views, in pixels: the side of a square, or (height, width), for which a vision transformer
            has a grid of positions of its own.
        stem: "small": a ResNet's stem for small images; "standard"; "auto": small where the shorter side has 64 pixels
            and less.
        patch: any other patch size for a ViT; 0: its own.
        pool: how a vision transformer's tokens become one embedding ("avg", "token"); None: its own way.
        drop_path: the rate of stochastic depth (Huang et al. 2016, arXiv 1603.09382): the share of the images for which
            a residual block is left out of a training step, in the last block; from 0 in the first one on a line.
        channels: C.

    Raises:
        UserError: for a name that timm doesn't know, or options that the model can't have.
    """
    name, options = arguments(name, image_size, patch=patch, pool=pool, channels=channels)
    if drop_path:
        options["drop_path_rate"] = drop_path
    module = _made(name, options)
    if drop_path and not any(rate > 0 for _, rate in drop_paths(module)):
        raise _no_drop_path(name, drop_path)
    size = patch_size(module)
    if any(side % size for side in height_and_width(image_size)):
        near = written(scaled(image_size, (1, 1), size))
        given = written(image_size)
        raise UserError(f"--image-size {given} is no multiple of {name}'s patch of {size}; {near} is")
    if stem == "small" and not small_stem(module):
        raise UserError(f"--stem small replaces a ResNet's 7x7 first convolution; {name} has none")
    if stem == "auto" and shorter(image_size) <= 64:
        small_stem(module)
    # A ResNet-18's step on 32-pixel images: 1.38 times as many images a second on one AVX2 core.
    return module if is_transformer(module) else cast(Any, module).to(memory_format=torch.channels_last)


def arguments(
    name: str, image_size: Size, *, patch: int = 0, pool: str | None = None, channels: int = 3
) -> tuple[str, dict[str, Any]]:
    """timm's name of the model that `create` makes of these, and its options for `timm.create_model`. Some models lack
    `dynamic_img_size`, and are made without it.

    Raises:
        UserError: as `create`.
    """
    import timm

    if SHORT_VIT.fullmatch(name):
        name = full_name(name)
        patch = patch or (max(shorter(image_size) // 8, 1) if shorter(image_size) <= 112 else 16)
    known = timm.list_models()
    if name not in known:
        raise _no_backbone(name, known)
    if patch and not takes_patch_size(name):
        why = "has no patches" if not is_transformer(outline_of(name)) else "cuts them from a convolutional stem's maps"
        raise UserError(f"--patch-size is for vision transformers whose patches can be of any size; {name} {why}")
    options = {"in_chans": channels} if channels != 3 else {}
    return name, {**options, **_sizes(name, image_size, patch), **_pooling(name, pool)}


def _sizes(name: str, image_size: Size, patch: int) -> dict[str, Any]:
    """Options for images of another size than the model's own, and patches of another (0: its own).

    Of squares a model keeps its own grid of positions, which are resampled as it goes, so that its weights are those of
    the same model at any size. Of other rectangles they would have to be stretched: it has a grid of their shape.
    """
    if not (takes_patch_size(name) or is_transformer(outline_of(name))):
        return {}
    given: dict[str, Any] = {"patch_size": patch, "img_size": image_size} if patch else {}
    if takes_patch_size(name) and not isinstance(image_size, int):
        given["img_size"] = image_size
    return {"dynamic_img_size": True, **given}


def _pooling(name: str, pool: str | None) -> dict[str, Any]:
    """Options that make `pool` the embedding, behind a norm of all tokens.

    The norm behind the pooling, which some models have by themselves in its place, would get no gradient from methods
    that learn from tokens.
    """
    import timm.models

    module = outline_of(name)
    if pool is None or not is_transformer(module):
        return {}
    norm = "use_fc_norm" if isinstance(module, timm.models.Eva) else "fc_norm"
    return {"global_pool": pool, norm: False}


def _made(name: str, options: dict[str, Any]) -> nn.Module:
    """timm's model with those of the options that some models lack left out.

    Raises:
        UserError: where the user asked for one, or timm refuses them.
    """
    import timm

    try:
        return timm.create_model(name, num_classes=0, **options)
    except TypeError:
        rest = {key: value for key, value in options.items() if key != "dynamic_img_size"}
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _refused(name, options, error) from error
    try:
        return timm.create_model(name, num_classes=0, **rest)
    except TypeError:
        if "drop_path_rate" not in rest:
            raise
        raise _no_drop_path(name, rest["drop_path_rate"]) from None
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _refused(name, rest, error) from error


def _refused(name: str, options: dict[str, Any], error: Exception) -> UserError:
    """What timm says of options that it doesn't make a model with."""
    given = ", ".join(f"{key}={value}" for key, value in options.items() if key != "dynamic_img_size")
    why = " (the method's embedding is the mean of the patches)" if options.get("global_pool") == "avg" else ""
    return UserError(f"--backbone {name}: timm can't make it with {given}{why}: {first_line(error)}")


def _no_drop_path(name: str, rate: float) -> UserError:
    return UserError(f"--drop-path {rate:g}: timm's {name} has no stochastic depth")


def small_stem(module: nn.Module) -> bool:
    """A ResNet's 7x7 first convolution and max-pool -> 3x3 without pool (SimCLR, appendix B.9); whether it had them."""
    first = getattr(module, "conv1", None)
    if not (isinstance(first, nn.Conv2d) and first.kernel_size == (7, 7) and hasattr(module, "maxpool")):
        return False
    module.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()
    return True


def architecture(name: str) -> str:
    """A model's name without the tag that names pretrained weights: "resnet10t.c3_in1k" -> "resnet10t"."""
    return name.partition(".")[0]


def tag_of(name: str) -> str:
    """The tag of pretrained weights in a model's name: "resnet10t.c3_in1k" -> "c3_in1k"; "" for a name without.

    Raises:
        UserError: for a tag that the model doesn't have.
    """
    import timm

    model, dot, tag = name.partition(".")
    if not dot or model not in timm.list_models():
        return ""
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    if tag not in tags:
        raise nearest(f"pretrained {model}", tag, tags)
    return tag


def has_small_stem(module: nn.Module) -> bool:
    """Whether a ResNet has the stem for small images."""
    first = getattr(module, "conv1", None)
    is_small = isinstance(first, nn.Conv2d) and first.kernel_size == (3, 3)
    return is_small and isinstance(getattr(module, "maxpool", None), nn.Identity)


def takes_patch_size(name: str) -> bool:
    """Whether a model of timm's can have patches and positions of another size."""
    module = outline_of(name)
    by_name = name.startswith(("vit_", "deit", "test_vit"))  # relative positions too
    return (by_name or is_transformer(module)) and not has_convolutional_stem(module)


def outline(name: str) -> nn.Module:
    """A model of timm's as it is by itself, without memory for its weights."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


outline_of = functools.lru_cache(maxsize=8)(outline)  # to look at; one that is changed is made by `outline`


def full_name(name: str) -> str:
    """timm's name of a model that has a short one: "vit_tiny" -> "vit_tiny_patch16_224"."""
    short = SHORT_VIT.fullmatch(name)
    return f"vit_{short[1]}_patch16_224" if short else name


def _no_backbone(name: str, known: Sequence[str]) -> UserError:
    """Why a name isn't one of timm's architectures: it names weights, too, or nothing."""
    if tag_of(name):
        return UserError(f"{name} names weights, too: {architecture(name)} is that architecture")
    return nearest("backbone", name, [*known, "vit_tiny", "vit_small"])


__all__ = [
    "STEMS",
    "architecture",
    "arguments",
    "create",
    "full_name",
    "has_small_stem",
    "outline",
    "small_stem",
    "tag_of",
    "takes_patch_size",
]
