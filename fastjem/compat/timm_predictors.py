"""Predictors and heads of timm's parts, as lightly's modules: I-JEPA's, CAPI's and AIM's, and AIM's transformer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjem.compat.timm_transformers import MaskedVisionTransformerDecoderTIMM
from fastjem.functional import checks
from fastjem.nn.blocks import initialize_2d_sine_cosine_positional_embedding
from fastjem.nn.tokens import apply_masks, repeat_interleave_batch

NormLayer = Callable[[int], nn.Module]
_NORM = partial(nn.LayerNorm, eps=1e-6)


class IJEPAPredictorTIMM(nn.Module):
    """I-JEPA's predictor: the tokens of targets from those of the context.

    Args:
        num_patches: of an image, a square of them.
        depth, num_heads, qkv_bias, mlp_ratio, drop rates, norm_layer: of the blocks.
        mlp_dim: the encoder's width.
        predictor_embed_dim: the predictor's own.
    """

    def __init__(
        self,
        num_patches: int,
        depth: int,
        mlp_dim: int,
        predictor_embed_dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Any = _NORM,
    ):
        super().__init__()
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches, predictor_embed_dim, depth, num_heads, 0, mlp_ratio, qkv_bias, proj_drop_rate, attn_drop_rate,
            drop_path_rate, norm_layer, initialize_weights=False,
        )  # fmt: skip
        self.predictor_embed = nn.Linear(mlp_dim, predictor_embed_dim)
        self.predictor_proj = nn.Linear(predictor_embed_dim, mlp_dim)
        initialize_2d_sine_cosine_positional_embedding(self.decoder.pos_embed, num_prefix_tokens=0)

    def forward(self, x: Tensor, masks_x: list[Tensor] | Tensor, masks: list[Tensor] | Tensor) -> Tensor:
        """[targets contexts B, P, mlp_dim]

        Args:
            x: [contexts B, K, mlp_dim], the encoder's tokens of each context.
            masks_x, masks: indices [B, K] of each context's patches, and [B, P] of each target's.
        """
        decoder = self.decoder
        return predicted(
            x, masks_x, masks, self.predictor_embed, decoder.pos_embed, decoder.mask_token, decoder.decode,
            self.predictor_proj,
        )  # fmt: skip


def predicted(
    x: Tensor,
    masks_x: list[Tensor] | Tensor,
    masks: list[Tensor] | Tensor,
    embed: nn.Module,
    positions: Tensor,  # [1, patches, D]
    mask_token: Tensor,
    blocks: Callable[[Tensor], Tensor],
    project: nn.Module,
) -> Tensor:
    """What I-JEPA's predictors, of timm's or torchvision's blocks, make of a context."""
    contexts = len(masks_x) if isinstance(masks_x, list) else 1
    targets = len(masks) if isinstance(masks, list) else 1
    images = len(x) // contexts
    positions = positions.expand(images, -1, -1)
    x = embed(x) + apply_masks(positions, masks_x)
    kept = x.shape[1]
    of_targets = repeat_interleave_batch(apply_masks(positions, masks), images, repeat=contexts)
    x = torch.cat([x.repeat(targets, 1, 1), mask_token + of_targets], 1)
    return project(blocks(x)[:, kept:])


class _CrossAttentionBlock(nn.Module):
    """Queries look at a context, with rotary positions of both; then an MLP. Both behind layer norms, and added."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.query_norm = nn.LayerNorm(embed_dim)
        self.context_norm = nn.LayerNorm(embed_dim)
        self.to_query = nn.Linear(embed_dim, embed_dim)
        self.to_key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        hidden = int(embed_dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))

    def forward(self, queries: Tensor, context: Tensor, query_rope: Tensor, context_rope: Tensor) -> Tensor:
        def by_heads(x: Tensor) -> Tensor:  # [B, L, D] -> [B, heads, L, D / heads]
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q = by_heads(self.to_query(self.query_norm(queries)))
        keys, values = map(by_heads, self.to_key_value(self.context_norm(context)).chunk(2, -1))
        q, keys = (
            apply_rot_embed_cat(x, rope[:, None]) for x, rope in ((q, query_rope), (keys, context_rope))
        )  # fmt: skip
        seen = nn.functional.scaled_dot_product_attention(q, keys, values)
        queries = queries + self.projection(seen.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.mlp_norm(queries))


class CAPIPredictorTIMM(nn.Module):
    """CAPI's predictor: hidden patches look at what the encoder made of the visible ones.

    Args:
        embed_dim: D, a multiple of num_heads.
        grid_size: patches in height and width.
        depth, num_heads, mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: int | tuple[int, int],
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if embed_dim % num_heads:
            checks.fail("CAPIPredictorTIMM", f"embed_dim must be a multiple of num_heads = {num_heads}", embed_dim)
        grid = [grid_size, grid_size] if isinstance(grid_size, int) else list(grid_size)
        self.rope = RotaryEmbeddingCat(embed_dim // num_heads, in_pixels=False, feat_shape=grid)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(_CrossAttentionBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, context_positions: Tensor, query_positions: Tensor) -> Tensor:
        """[B, Q, D], of the visible patches' tokens [B, K, D], their places [B, K] and those to predict [B, Q]."""
        rope = self.rope.get_embed().to(context.device)
        queries = self.mask_token.expand(context.shape[0], query_positions.shape[1], -1)
        for block in self.blocks:
            queries = block(queries, context, rope[query_positions], rope[context_positions])
        return self.norm(queries)


class AIMPredictionHeadBlock(nn.Module):
    """`x + mlp(norm(x))`, whose MLP has no biases."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: NormLayer = nn.LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
    ):
        super().__init__()
        self.norm = norm_layer(input_dim)
        self.mlp = mlp_layer(
            in_features=input_dim, hidden_features=int(input_dim * mlp_ratio), out_features=output_dim,
            act_layer=act_layer, drop=proj_drop, bias=False,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class AIMPredictionHead(nn.Module):
    """AIM's head of MLP blocks, which predicts the next patch's pixels: [..., input_dim] -> [..., output_dim].

    Args:
        input_dim, output_dim, hidden_dim: widths.
        num_blocks, mlp_ratio, proj_drop, act_layer, norm_layer, mlp_layer, block_fn: of the blocks.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int = 2048,
        num_blocks: int = 12,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: NormLayer = nn.LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        block_fn: Callable[..., nn.Module] = AIMPredictionHeadBlock,
    ):
        super().__init__()
        blocks = [
            block_fn(
                input_dim=hidden_dim, output_dim=hidden_dim, mlp_ratio=mlp_ratio, proj_drop=proj_drop,
                act_layer=act_layer, norm_layer=norm_layer, mlp_layer=mlp_layer,
            )
            for _ in range(num_blocks)
        ]  # fmt: skip
        first = nn.Linear(input_dim, hidden_dim, bias=False)
        last = nn.Linear(hidden_dim, output_dim, bias=False)
        self.blocks = nn.Sequential(first, *blocks, norm_layer(hidden_dim), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class MaskedCausalAttention(Attention):
    """timm's attention, in which a token sees those before it, and of a prefix all."""

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = True) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, L, D]; mask: [B, L] bool, false where a token is of the prefix, which all tokens see. Without one every
        token sees all, as in lightly."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        seen = None
        if is_causal and mask is not None:
            before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            seen = (before | ~mask.bool()[:, None, :])[:, None]  # [B, 1, L, L]
        dropout = self.attn_drop.p if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class MaskedCausalBlock(Block):
    """timm's block with `MaskedCausalAttention`."""

    def __init__(
        self, dim: int, num_heads: int, *args: Any, attn_layer: Any = MaskedCausalAttention, **kwargs: Any
    ):  # fmt: skip
        super().__init__(dim, num_heads, *args, **kwargs)
        # The parts of timm's own attention, and its weights, with another way to look.
        self.attn.__class__ = MaskedCausalAttention

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = True) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `MaskedCausalAttention.forward`."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), mask=mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MaskedCausalVisionTransformer(VisionTransformer):
    """AIM's vision transformer (arXiv 2401.08541): timm's, in which patches see a prefix and those before them."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("block_fn", MaskedCausalBlock)
        super().__init__(*args, **kwargs)

    def forward_features(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = True) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tokens [B, L, D] behind the last norm, of images; mask: see `MaskedCausalAttention.forward`."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        blocks: Any = self.blocks
        for block in blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, mask, is_causal, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, mask=mask, is_causal=is_causal)
        return self.norm(x)
