"""What backbones are prepared by: positions, stochastic depth, pooling by masks. Names and arguments as in lightly."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastjem.functional import checks


def pool_masked(source: Tensor, mask: Tensor, num_cls: int, reduce: str = "mean") -> Tensor:
    """Features pooled over what a mask says is one: [B, C, H, W], [B, H, W] -> [B, C, num_cls].

    Args:
        source: [B, C, H, W], or [C, H, W] of one image.
        mask: integers from 0 to num_cls - 1, of the same height and width, which region each place is of.
        num_cls: how many regions; those that an image hasn't got are 0.
        reduce: "mean", "sum", "prod", "amin" or "amax", as of torch's `scatter_reduce`. (lightly's 1.6 takes the mean
            for batches, whatever it is.)
    """
    op = "pool_masked"
    if source.dim() not in (3, 4) or mask.shape != (*source.shape[:-3], *source.shape[-2:]):
        contract = "source and mask must be [B, C, H, W] and [B, H, W], or [C, H, W] and [H, W]"
        checks.fail(op, contract, f"{tuple(source.shape)} and {tuple(mask.shape)}")
    num_cls = checks.integer(op, "num_cls", num_cls, 1)
    flat = source.flatten(-2)  # [..., C, H W]
    places = mask.long().flatten(-2).unsqueeze(-2).expand(flat.shape)
    pooled = flat.new_zeros((*flat.shape[:-1], num_cls))
    return pooled.scatter_reduce(-1, places, flat, reduce=reduce, include_self=False)


def get_named_leaf_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module that have none themselves, by their names."""
    return {name: part for name, part in module.named_modules() if next(part.children(), None) is None}


def add_stochastic_depth_to_blocks(vit: nn.Module, prob: float = 0.0, mode: str = "row") -> None:
    """Let each block of torchvision's vision transformer drop its attention and its MLP, both with `prob`, in place.

    mode: "row": by each image; "batch": for all at once.
    """
    from torchvision.models.vision_transformer import EncoderBlock
    from torchvision.ops import StochasticDepth

    prob = checks.host_number("add_stochastic_depth_to_blocks", "prob", prob, low=0, high=1, inclusive=True)
    blocks = [part for part in vit.modules() if isinstance(part, EncoderBlock)] if prob else []
    for block in blocks:
        for name in ("dropout", "mlp"):
            setattr(block, name, nn.Sequential(getattr(block, name), StochasticDepth(p=prob, mode=mode)))


def update_drop_path_rate(model: nn.Module, drop_path_rate: float, mode: str = "linear") -> None:
    """Give the blocks of timm's vision transformer that rate of stochastic depth, in place.

    mode: "uniform"; or "linear": the first block has none. In lightly 1.6, and so here, all others then have the same
    rate, and only which blocks have one follows the line.
    """
    from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]

    op = "update_drop_path_rate"
    if mode not in ("linear", "uniform"):
        checks.fail(op, "mode must be one of linear, uniform", repr(mode))
    rate = checks.host_number(op, "drop_path_rate", drop_path_rate, low=0, high=1, inclusive=True)
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        drops = rate > 0 and (mode == "uniform" or i > 0)
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(rate) if drops else nn.Identity())


def normalize_mean_var(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` along `dim`; the variance's divisor is N - 1."""
    variance, mean = torch.var_mean(x, dim, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def initialize_positional_embedding(pos_embedding: nn.Parameter, strategy: str, num_prefix_tokens: int) -> None:
    """Fill positional embeddings [1, L, D], in place.

    Args:
        strategy: "learn", "sincos" (fixed), or "skip": they stay.
        num_prefix_tokens: how many of the L, the first ones, aren't patches.
    """
    op = "initialize_positional_embedding"
    if strategy not in ("learn", "sincos", "skip"):
        checks.fail(op, "strategy must be one of learn, sincos, skip", repr(strategy))
    if strategy == "learn":
        initialize_learnable_positional_embedding(pos_embedding)
    elif strategy == "sincos":
        initialize_2d_sine_cosine_positional_embedding(pos_embedding, num_prefix_tokens=num_prefix_tokens)


def initialize_learnable_positional_embedding(pos_embedding: nn.Parameter) -> None:
    """From a normal distribution of deviation 0.02, cut off; they are trained."""
    nn.init.trunc_normal_(pos_embedding, std=0.02)
    pos_embedding.requires_grad = True


@torch.no_grad()
def initialize_2d_sine_cosine_positional_embedding(
    pos_embedding: nn.Parameter, has_class_token: bool = True, num_prefix_tokens: int | None = None
) -> None:
    """`get_2d_sine_cosine_positional_embedding` in place, of a square of patches; they aren't trained."""
    prefix = int(has_class_token) if num_prefix_tokens is None else num_prefix_tokens
    _, length, width = pos_embedding.shape
    grid = int((length - prefix) ** 0.5)
    if grid**2 != length - prefix:
        op = "initialize_2d_sine_cosine_positional_embedding"
        checks.fail(op, f"behind {prefix} prefix tokens there must be a square of patches", length - prefix)
    values = get_2d_sine_cosine_positional_embedding(width, grid, num_prefix_tokens=prefix)
    pos_embedding.copy_(torch.from_numpy(values)[None])
    pos_embedding.requires_grad = False


def get_2d_sine_cosine_positional_embedding(
    embed_dim: int, grid_size: int, cls_token: bool = True, num_prefix_tokens: int | None = None
) -> NDArray[np.floating]:
    """[prefix tokens + grid_size^2, embed_dim]: zeros, then those of a square of patches, row by row."""
    prefix = int(cls_token) if num_prefix_tokens is None else num_prefix_tokens
    places = np.arange(grid_size, dtype=np.float32)
    grid = np.stack(np.meshgrid(places, places))[:, None]  # x first: [2, 1, rows, columns]
    values = get_2d_sine_cosine_positional_embedding_from_grid(embed_dim, grid)
    return np.concatenate([np.zeros([prefix, embed_dim]), values]) if prefix else values


get_2d_sincos_pos_embed = get_2d_sine_cosine_positional_embedding


def get_2d_sine_cosine_positional_embedding_from_grid(
    embed_dim: int, grid: NDArray[np.floating]
) -> NDArray[np.floating]:
    """[positions, embed_dim]: half of x's and half of y's, of a grid of both, [2, ...]."""
    if embed_dim % 4:
        checks.fail("get_2d_sine_cosine_positional_embedding", "embed_dim must be a multiple of 4", embed_dim)
    halves = [get_1d_sine_cosine_positional_embedding_from_positions(embed_dim // 2, of_axis) for of_axis in grid]
    return np.concatenate(halves, 1)


def get_1d_sine_cosine_positional_embedding_from_positions(
    embed_dim: int, pos: NDArray[np.floating]
) -> NDArray[np.floating]:
    """[positions, embed_dim]: sines, then cosines, of positions times 10000^(-2 i / embed_dim), i below half of it."""
    if embed_dim % 2:
        checks.fail(
            "get_1d_sine_cosine_positional_embedding_from_positions", "embed_dim must be even", embed_dim
        )  # fmt: skip
    half = embed_dim // 2
    exponents = np.arange(half, dtype=np.float32) / (embed_dim / 2)
    angles = np.einsum("m,d->md", pos.reshape(-1), 1 / 10000**exponents)
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)
