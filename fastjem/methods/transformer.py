"""The small transformers that masked prediction puts behind the encoder: I-JEPA's and CAPI's predictor, MAE's decoder.

Blocks are timm's. Positions are fixed sines and cosines of the patches' places. Images of another size have another
grid of patches: they lie in the same frame, so that a place in the image has the same position whatever the size.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastjem.data.size import Size, in_patches
from fastjem.encoders import Features


class TokenPredictor(nn.Module):
    """What a transformer makes of hidden patches, given the visible ones' tokens.

    Args:
        width: D of the tokens.
        grid: patches in an image's height and width: of images of the run's own size, the frame of all positions.
        inner: the transformer's own width.
        depth: of its blocks.
        heads: of its attention.
        out: width of what it predicts.
        cross: the hidden patches look at the visible ones only (CAPI); else all look at all (I-JEPA, MAE).
    """

    positions: Tensor  # [h w, inner]

    def __init__(
        self, width: int, grid: tuple[int, int], *, inner: int, depth: int, heads: int, out: int, cross: bool = False
    ):
        super().__init__()
        if inner % heads or inner % 4:
            raise ValueError(f"a predictor's width must be a multiple of its {heads} heads and of 4, got {inner}")
        self.embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.empty(inner))
        self.register_buffer("positions", sines_and_cosines(grid, inner), persistent=False)
        self.blocks = nn.ModuleList(_block(inner, heads, cross) for _ in range(depth))
        self.norm = nn.LayerNorm(inner)
        self.head = nn.Linear(inner, out)
        self.grid = grid
        self.cross = cross
        self._initialise()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.positions.copy_(sines_and_cosines(self.grid, self.positions.shape[1]))

    def _initialise(self) -> None:
        """As in the papers' code: small normal weights, those that write into the residual stream less with depth."""
        self.reset_parameters()
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for i, block in enumerate(self.blocks):
            parts = cast(Any, block)
            for layer in (parts.attn.proj, parts.mlp.fc2):
                with torch.no_grad():
                    layer.weight.div_((2 * (i + 1)) ** 0.5)

    def forward(self, tokens: Tensor, visible: Tensor, wanted: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Tokens [B, M, D] of the patches `visible` [B, M], and which patches are `wanted` [B, Q] -> [B, Q, out].

        grid: h and w of the patches that these are numbers of; None: the predictor's own.
        """
        positions = self.positions
        if grid is not None and tuple(grid) != self.grid:
            positions = sines_and_cosines(grid, self.positions.shape[1], self.grid, device=positions.device)
        context = self.embed(tokens)
        context = context + positions.to(context.dtype)[visible]
        queries = self.mask_token.to(context.dtype) + positions.to(context.dtype)[wanted]
        if self.cross:
            x = queries
            for block in self.blocks:
                x = block(x, context)
        else:
            x = torch.cat([context, queries], 1)
            for block in self.blocks:
                x = block(x)
            x = x[:, visible.shape[1] :]
        return self.head(self.norm(x))


class CrossBlock(nn.Module):
    """A transformer's block in which tokens look at a context and not at each other."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        from timm.layers.mlp import Mlp

        self.norm1 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """[B, Q, D] looks at [B, M, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
        key, value = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


def _block(width: int, heads: int, cross: bool) -> nn.Module:
    if cross:
        return CrossBlock(width, heads)
    from timm.models.vision_transformer import Block

    return Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm)


def sines_and_cosines(
    grid: Sequence[int], width: int, frame: Sequence[int] | None = None, *, device: torch.device | None = None
) -> Tensor:
    """[h w, width]: half of it the row's sines and cosines, half the column's, at frequencies from 1 to 1 / 10,000
    (MAE's `get_2d_sincos_pos_embed`, whose first half is the column's).

    Args:
        grid: h and w.
        frame: H and W of the grid whose patches are counted by whole numbers: those of `grid` cover the same image, and
            the middle of each lies where it lies there. None: `grid` itself.
        device: where they are computed, in float32 if given (not every device has float64), else on the default one.
    """
    dtype = torch.float64 if device is None else torch.float32
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=dtype, device=device) / (width // 4))
    of_axis = []
    for size, of_frame in zip(reversed(grid), reversed(frame or grid), strict=True):
        places = torch.arange(size, dtype=dtype, device=device)
        if size != of_frame:
            places = (places + 0.5) * (of_frame / size) - 0.5
        angles = places[:, None] * frequencies
        of_axis.append(torch.cat([angles.sin(), angles.cos()], 1))  # [size, width / 2]
    columns, rows = of_axis
    height, breadth = grid
    both = [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, breadth, -1)]
    return torch.cat(both, 2).flatten(0, 1).float()


def rows_and_columns(features: Features) -> tuple[int, int]:
    """Of the places that an image's tokens are of; where an encoder of one's own doesn't say them, those of a square.

    Raises:
        ValueError: where there are no tokens, or not as many as a square has.
    """
    if features.grid is not None:
        return features.grid
    count = 0 if features.tokens is None else features.tokens.shape[1]
    side = math.isqrt(count)
    if not count or side * side != count:
        raise ValueError(f"Features: {count} tokens are no square's: the encoder must say their `grid`")
    return side, side


def grid_of(image_size: Size, patch: int) -> tuple[int, int]:
    """Patches in an image's height and width; 1 where a run hasn't said how large they are."""
    rows, columns = in_patches(image_size, max(patch, 1))
    return max(rows, 1), max(columns, 1)
