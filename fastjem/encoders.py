"""Backbones by timm's names, the small stem, vision transformers at any image size."""

import re
from pathlib import Path

import torch
from torch import nn

from fastjem.checkpoints import write_atomically
from fastjem.errors import UserError, nearest

SHORT_VIT = re.compile(r"vit_(tiny|small|base|large)$")


def is_transformer(encoder: nn.Module) -> bool:
    """Whether patches can be masked: timm's VisionTransformer and what is built like it."""
    return all(hasattr(encoder, name) for name in ("patch_embed", "blocks", "_pos_embed", "norm_pre", "norm"))


def patch_size(encoder: nn.Module) -> int:
    size = getattr(getattr(encoder, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def memory_format(encoder: nn.Module) -> torch.memory_format:
    """The layout of its convolutions' weights, in which it wants its images."""
    for weight in encoder.parameters():
        if weight.dim() == 4 and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def small_stem(encoder: nn.Module) -> bool:
    """A ResNet's 7x7 first convolution and max-pool -> 3x3 without pool (SimCLR, appendix B.9); whether it had them."""
    first = getattr(encoder, "conv1", None)
    if not (isinstance(first, nn.Conv2d) and first.kernel_size == (7, 7) and hasattr(encoder, "maxpool")):
        return False
    encoder.conv1 = nn.Conv2d(3, first.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.maxpool = nn.Identity()
    return True


def create(
    name: str, image_size: int, *, stem: str = "auto", patch: int = 0, pool: str | None = None, drop_path: float = 0.0
) -> nn.Module:
    """A timm model without its classifier, random weights: [B, 3, H, W] -> [B, D].

    `vit_tiny`, `vit_small`, `vit_base` without patch and size stand for timm's model of that width with the patch that
    cuts the image into about 8 x 8 (at 112 pixels and less) or 14 x 14. patch: any other patch size for a ViT.
    """
    import timm

    if short := SHORT_VIT.fullmatch(name):
        name = f"vit_{short[1]}_patch16_224"
        patch = patch or (max(image_size // 8, 1) if image_size <= 112 else 16)
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise nearest("backbone", name, [*known, "vit_tiny", "vit_small"])
    options: dict = {"drop_path_rate": drop_path} if drop_path else {}
    transformer = name.startswith(("vit_", "deit", "test_vit"))
    if transformer:
        options |= {"dynamic_img_size": True, **({"patch_size": patch} if patch else {})}
        if patch:
            options["img_size"] = image_size
    elif patch:
        raise UserError(f"--patch-size is for vision transformers; {name} has no patches")
    if pool is not None and transformer:
        options |= {"global_pool": pool, "fc_norm": False}
    try:
        encoder = timm.create_model(name.split(".")[0], num_classes=0, **options)
    except TypeError:
        options.pop("dynamic_img_size", None)
        encoder = timm.create_model(name.split(".")[0], num_classes=0, **options)
    size = patch_size(encoder)
    if size > 1 and image_size % size:
        near = max(round(image_size / size), 1) * size
        raise UserError(f"--image-size {image_size} is no multiple of {name}'s patch of {size}; {near} is")
    if stem == "small" and not small_stem(encoder):
        raise UserError(f"--stem small replaces a ResNet's 7x7 first convolution; {name} has none")
    if stem == "auto" and image_size <= 64:
        small_stem(encoder)
    # A ResNet-18's step on 32-pixel images: 1.38 times as many images a second on one AVX2 core.
    return encoder if is_transformer(encoder) else encoder.to(memory_format=torch.channels_last)


def mask_needs_transformer(method: str, encoder: nn.Module) -> None:
    if not is_transformer(encoder):
        raise UserError(
            f"{method} masks patches, which needs a vision transformer (--backbone vit_tiny): a convolution's sliding "
            f"windows see the edges of the holes, so that {type(encoder).__name__} would learn from them"
        )


def save(encoder: nn.Module, path: str, metadata: dict[str, str]) -> None:
    """The encoder alone, whole or not at all. Without `backbone` in the metadata, `load` can't build it."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.state_dict().items()}
    write_atomically(Path(path), save(state, metadata))


def load(path: str) -> nn.Module:
    """The encoder that a run left in `encoder.safetensors`, small stem, patch size and all."""
    return load_with_metadata(path)[0]


def load_with_metadata(path: str) -> tuple[nn.Module, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None
    if "backbone" not in metadata:
        raise UserError(f"{path} names no backbone: its weights only fit into the module that they came from")
    encoder = create(
        metadata["backbone"],
        int(metadata["image_size"]),
        stem=metadata["stem"],
        patch=int(metadata["patch_size"]),
        pool=metadata.get("pool") or None,
    )
    encoder.load_state_dict(state)
    return encoder.eval(), metadata
