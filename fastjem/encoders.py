"""Encoders: any module, and the one way in which methods call them.

`wrap` makes an `Encoder` of any module that maps images [B, C, H, W] to embeddings [B, D]. Methods see nothing else: an
encoder gives `Features`, and a vision transformer also takes masks. What is exported is the module inside.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastjem.checkpoints import write_atomically
from fastjem.data.pixels import Pixels
from fastjem.data.size import Size, in_patches, written
from fastjem.errors import UserError

DROP_PATHS = ("DropPath", "StochasticDepth")
# timm's transformers whose blocks need all patches of an image, and why.
WHOLE_GRID = {
    **dict.fromkeys(
        ("VisionTransformerRelPos", "Beit", "VisionTransformerSAM"),
        "adds a bias for each two places of the whole grid in its attention, and can't be given some patches alone",
    ),
    **dict.fromkeys(
        ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "Hiera", "HieraDet", "MultiScaleVit"),
        "merges neighbouring patches from stage to stage, and can't be given some alone",
    ),
    "NaFlexVit": "cuts images into patches and places them in a way of its own",
}
NO_TOKEN = "the encoder has no mask token: fastjem.encoders.wrap(module, mask_token=True) gives it one"


class UnusableError(ValueError):
    """An encoder's embeddings that nothing can be learned from."""


class Features(NamedTuple):
    """What an encoder makes of N images."""

    pooled: Tensor  # [N, D], the embeddings
    tokens: Tensor | None = None  # [N, L, D] after the last norm, one for each patch; transformers only
    layers: tuple[Tensor, ...] = ()  # the tokens [N, L, D] behind each of the last blocks, where asked for
    grid: tuple[int, int] | None = None  # rows and columns of the L places; None: not known, or only some have tokens


class Encoder(nn.Module):
    """Any module [B, C, H, W] -> [B, D] with what methods ask of an encoder; see `wrap`.

    DDP, FSDP2 and torch.compile see every call, as methods call `forward` and nothing inside it.
    """

    backbone: Any  # any module; a transformer's parts are looked up in it
    width: int  # D
    patch: int  # pixels of a patch's side; 1: the encoder has no patches
    prefix_tokens: int  # class and register tokens before those of the patches

    def __init__(self, backbone: nn.Module, width: int, *, patch: int = 1, prefix_tokens: int = 0):
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.patch = patch
        self.prefix_tokens = prefix_tokens

    def forward(
        self,
        images: Tensor,
        *,
        hidden: Tensor | None = None,
        visible: Tensor | None = None,
        layers: int = 0,
        tokens: bool = False,
    ) -> Features:
        """Embed images [N, C, H, W].

        Args:
            hidden: [N, h, w] bool: patches that the mask token replaces.
            visible: [N, M] int64: the only patches that the transformer is given; its cost falls with their number.
            layers: of how many of the last blocks `Features.layers` is wanted.
            tokens: `Features.tokens` are wanted of a convolutional encoder too: the places of its last feature map.

        Raises:
            ValueError: for masks, layers or tokens of an encoder that has no patches, blocks or feature map.
        """
        if hidden is not None or visible is not None:
            raise ValueError(no_patches(self.backbone))
        if layers:
            raise ValueError(f"Encoder: {type(self.backbone).__name__} has no transformer blocks to give layers of")
        if tokens:
            return self._with_feature_map(images)
        return Features(self.backbone(images))

    def _with_feature_map(self, images: Tensor) -> Features:
        backbone = self.backbone
        kind = type(backbone).__name__
        if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
            raise ValueError(f"Encoder: {kind} has no forward_features and forward_head, as timm's models have them")
        features = backbone.forward_features(images)
        if features.dim() != 4 or features.shape[1] != self.width:
            came = f"{tuple(features.shape)}"
            raise ValueError(f"Encoder: the feature map of {kind} must be [N, {self.width}, h, w], got {came}")
        grid = (features.shape[2], features.shape[3])
        return Features(backbone.forward_head(features), features.flatten(2).mT, grid=grid)


class TransformerEncoder(Encoder):
    """timm's VisionTransformer or Eva (also DINOv3's): `Encoder` with tokens, layers and masks.

    mask_token: for methods that replace hidden patches. It is trained with the encoder and isn't exported.
    """

    def __init__(self, backbone: Any, *, mask_token: bool = False):
        width = backbone.num_features
        super().__init__(backbone, width, patch=patch_size(backbone), prefix_tokens=backbone.num_prefix_tokens)
        self.mask_token = nn.Parameter(torch.randn(self.width) * 0.02) if mask_token else None

    def forward(
        self,
        images: Tensor,
        *,
        hidden: Tensor | None = None,
        visible: Tensor | None = None,
        layers: int = 0,
        tokens: bool = False,
    ) -> Features:
        vit = self.backbone
        if (hidden is not None or visible is not None) and not takes_masks(vit):
            raise ValueError(no_patches(vit))
        grid = in_patches((images.shape[2], images.shape[3]), self.patch)
        if hidden is None and visible is None and not layers:
            x = vit.forward_features(images)
            return Features(vit.forward_head(x), x[:, self.prefix_tokens :], grid=grid)
        patches = vit.patch_embed(images)  # [N, L, D], or [N, h, w, D] where the size may vary
        if hidden is not None:
            patches = self._with_mask_token(patches, hidden)
        x, rotations = self._positioned(patches)
        if visible is not None:
            x, rotations = self._only(visible, x, rotations)
        x = vit.norm_pre(x)
        outputs = []
        for block, rotation in zip(vit.blocks, rotations, strict=True):
            x = block(x) if rotation is None else block(x, rope=rotation)
            outputs.append(x[:, self.prefix_tokens :])
        x = vit.norm(x)
        last_layers = tuple(outputs[-layers:]) if layers else ()
        whole = grid if visible is None else None
        return Features(vit.forward_head(x), x[:, self.prefix_tokens :], last_layers, whole)

    def _with_mask_token(self, patches: Tensor, hidden: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(NO_TOKEN)
        shape = patches.shape
        flat = patches.flatten(1, -2)  # [N, L, D]
        mask = hidden.flatten(1)[..., None]  # [N, L, 1]
        if mask.shape[1] != flat.shape[1]:
            raise ValueError(
                f"Encoder: hidden must be [N, h, w] over {flat.shape[1]} patches, got {tuple(hidden.shape)}"
            )
        return torch.where(mask, self.mask_token.to(flat.dtype), flat).view(shape)

    def _positioned(self, patches: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Tokens with prefix and positions [N, P + L, D], and each block's rotary embedding (None: it has none)."""
        vit = self.backbone
        blocks = len(vit.blocks)
        positioned = vit._pos_embed(patches)
        if isinstance(positioned, Tensor):
            return vit.patch_drop(positioned), [None] * blocks
        tokens, rotation = positioned
        if rotation is not None and vit.rope_mixed:  # one of each block's own: [blocks, heads, L, R]
            return tokens, list(rotation)
        return tokens, [rotation] * blocks

    def _only(
        self, visible: Tensor, tokens: Tensor, rotations: list[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The prefix and the patches `visible` [N, M], with the rows of the rotary embeddings that are theirs."""
        prefix = tokens[:, : self.prefix_tokens]
        index = visible[..., None].expand(-1, -1, tokens.shape[-1])
        kept = tokens[:, self.prefix_tokens :].gather(1, index)
        return torch.cat([prefix, kept], 1), [None if r is None else _rows_of(r, visible) for r in rotations]


def _rows_of(rotation: Tensor, visible: Tensor) -> Tensor:
    """[L, R] or, a head at a time, [heads, L, R] -> [N, 1 or heads, M, R]: each image's own rows."""
    if rotation.dim() == 2:
        return rotation[visible][:, None]
    return rotation[:, visible].transpose(0, 1)


def wrap(module: nn.Module, width: int | None = None, *, mask_token: bool = False) -> Encoder:
    """An `Encoder` around any module; one that is an `Encoder` already stays as it is.

    Args:
        module: [B, C, H, W] -> [B, D].
        width: D; None: the module's `num_features`, as timm's have it.
        mask_token: see `TransformerEncoder`.

    Raises:
        ValueError: where neither tells the width.
    """
    if isinstance(module, Encoder):
        return module
    if is_transformer(module):
        return TransformerEncoder(module, mask_token=mask_token)
    if width is None:
        try:
            width = int(cast(Any, module).num_features)
        except AttributeError:
            text = f"wrap: width must be given, as {type(module).__name__} has no num_features"
            raise ValueError(text) from None
    return Encoder(module, width)


def is_transformer(module: nn.Module) -> bool:
    """Whether a module's tokens and layers are known: timm's VisionTransformer and Eva, and an `Encoder` of one's own
    that has patches."""
    if isinstance(module, Encoder):
        return module.patch > 1
    timm = sys.modules.get("timm.models")  # a module of timm's has imported it
    return timm is not None and isinstance(module, (timm.VisionTransformer, timm.Eva))


def shows_enough(module: nn.Module, size: Size) -> bool:
    """Whether most patches of a view can be hidden, and the others still tell something: there are 4 x 4 and more."""
    return takes_masks(module) and min(in_patches(size, patch_size(module))) >= 4


def takes_masks(module: nn.Module) -> bool:
    """Whether patches can be hidden from a module: a transformer (`is_transformer`) whose patches don't overlap.

    A hybrid's come from a convolutional stem. Swin, Hiera and NaFlexVit mix or merge neighbouring patches, or hold
    their positions elsewhere.
    """
    inner = module.backbone if isinstance(module, TransformerEncoder) else module
    return is_transformer(module) and not has_convolutional_stem(inner)


def has_convolutional_stem(module: nn.Module) -> bool:
    """Whether patches are cut from what convolutions make of the image: timm's hybrids."""
    return hasattr(getattr(module, "patch_embed", None), "backbone")


def no_patches(module: nn.Module) -> str:
    """Why a module can't be given masks, in words."""
    if isinstance(module, TransformerEncoder):
        module = module.backbone
    kind = type(module).__name__
    needs = "masked patches need a vision transformer (--backbone vit_tiny)"
    if has_convolutional_stem(module):
        return f"{needs}: the patches of this {kind} are those of a convolutional stem, whose windows see one another's"
    for one in type(module).__mro__:
        if one.__name__ in WHOLE_GRID:
            return f"{needs}: {kind} {WHOLE_GRID[one.__name__]}"
    if any("Attention" in type(part).__name__ and "Pool" not in type(part).__name__ for part in module.modules()):
        return f"{needs}, timm's VisionTransformer or Eva: {kind} can't be given some of an image's patches alone"
    return f"{needs}: a convolution's sliding windows see the edges of the holes, so that {kind} would learn from them"


def patch_size(module: nn.Module) -> int:
    """Pixels of a patch's side, 1 for a module without patches; with what a convolutional stem makes smaller."""
    if isinstance(module, Encoder):
        return module.patch if module.patch > 1 else patch_size(module.backbone)
    embed: Any = getattr(module, "patch_embed", None)
    size = embed.feat_ratio() if has_convolutional_stem(module) else getattr(embed, "patch_size", 1)
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def memory_format(module: nn.Module) -> torch.memory_format:
    """The layout of its convolutions' weights, in which it wants its images."""
    for weight in module.parameters():
        if weight.dim() == 4 and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def drop_paths(module: nn.Module) -> list[tuple[str, float]]:
    """(name, rate) of each part that leaves out a residual branch at random: timm's DropPath, torchvision's
    StochasticDepth, and whatever else is called so.
    """
    return [
        (name, float(getattr(part, "drop_prob", None) or getattr(part, "p", 0.0)))
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part).__name__ in DROP_PATHS
    ]


def without_drop_path(module: nn.Module) -> nn.Module:
    """The module itself, whose residual branches are never left out any more; its state is as it was."""
    for name, _ in drop_paths(module):
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, nn.Identity())
    return module


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """The module with batch norms whose statistics are those of all ranks; weights and running statistics stay.

    timm's batch norms with an activation in them keep it (torch's own conversion drops it).

    Raises:
        UserError: for another subclass of batch norm, as nothing is known of what else it computes.
    """
    plain: set[type] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    with contextlib.suppress(ImportError):
        from timm.layers import norm_act

        convert = norm_act.convert_sync_batchnorm
        plain |= {norm_act.BatchNormAct2d, norm_act.SyncBatchNormAct}
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and type(part) not in plain:
            raise UserError(
                f"--sync-batch-norm can replace torch's and timm's batch norms, and {name} is a {type(part).__name__}, "
                "which may compute something else"
            )
    return convert(module)


def measured_width(module: nn.Module, images: Tensor) -> int:
    """The width D of a module's embeddings of images [B, C, H, W], found by computing them.

    Raises:
        UnusableError: if they aren't [B, D], not finite, or all the same: then every gradient is zero for ever.
    """
    training = module.training
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        x = module.train()(images)
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])
    module.train(training)
    x = x.pooled if isinstance(x, Features) else x
    if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != len(images):
        came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UnusableError(
            f"the encoder must map [B, {images.shape[1]}, H, W] to [B, D], got {came} for {tuple(images.shape)}"
        )
    if not torch.isfinite(x).all():
        raise UnusableError("the encoder's embeddings of real images are not finite before the first step")
    spread = (x.float() - x.float().mean(0)).abs().max()
    if spread <= 1e-6 * x.float().abs().max():
        raise UnusableError(
            "the encoder gives every image the same embedding: its gradient is zero, and no step could change that "
            "(a last layer initialised with zeros, or dead activations?)"
        )
    return x.shape[1]


def unreached(encoder: Encoder, images: Tensor, *, tokens: bool) -> list[str]:
    """Names of a backbone's parameters that are to be trained and get no gradient, by one backward pass.

    Nothing is drawn and no statistics move; gradients are None afterwards.

    Args:
        images: [B, C, H, W].
        tokens: whether losses reach the tokens alone, and not what becomes of them in the embedding.
    """
    training = encoder.training
    with torch.enable_grad():
        features = encoder.eval()(images)
        reached = features.tokens if tokens and features.tokens is not None else features.pooled
        if reached.requires_grad:
            reached.float().sum().backward()
    encoder.train(training)
    named = list(encoder.backbone.named_parameters())
    without = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    for parameter in encoder.parameters():
        parameter.grad = None
    return without


def metadata(backbone: str, stem: str, patch_size: int, pool: str | None, pixels: Pixels) -> dict[str, str]:
    """What an export holds beside the weights: how to build the module again, and how its images are prepared."""
    return {
        "backbone": backbone,
        "image_size": written(pixels.size),
        "stem": stem,
        "patch_size": str(patch_size),
        "pool": pool or "",
        **pixels.to_metadata(),
    }


def save(module: nn.Module, path: str, metadata: dict[str, str]) -> None:
    """The module alone, whole or not at all. Without `backbone` in the metadata, `load` can't build it."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    write_atomically(Path(path), save(state, metadata))


__all__ = [
    "Encoder",
    "Features",
    "TransformerEncoder",
    "drop_paths",
    "has_batch_norm",
    "has_convolutional_stem",
    "is_transformer",
    "measured_width",
    "memory_format",
    "metadata",
    "no_patches",
    "patch_size",
    "save",
    "takes_masks",
    "unreached",
    "without_drop_path",
    "wrap",
]
