"""timm's vision transformers with masks, and their decoders, as lightly's modules: names, arguments, state dicts and
values are its. For training by `fastjem pretrain` they aren't needed: `fastjem.encoders` masks."""

from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjem.compat.masked import Masked, replaced
from fastjem.nn.blocks import initialize_2d_sine_cosine_positional_embedding, initialize_positional_embedding
from fastjem.nn.tokens import get_at_index

_NORM = partial(nn.LayerNorm, eps=1e-6)


def init_weights(module: nn.Module) -> None:
    """Xavier's for linear layers, their biases 0; layer norms 1 and 0. For `module.apply(init_weights)`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class MaskedVisionTransformerTIMM(Masked):
    """A vision transformer of timm some of whose tokens are replaced by a mask token, or left out.

    Args:
        vit: made by timm.
        mask_token: [1, 1, D]; None: a new one, of zeros.
        weight_initialization: "" initialises the transformer's weights (its positions apart); "skip" leaves them.
        antialias: where positions are resampled for other image sizes.
        pos_embed_initialization: see `fastjem.nn.blocks.initialize_positional_embedding`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        mask_token: nn.Parameter | None = None,
        weight_initialization: str = "",
        antialias: bool = True,
        pos_embed_initialization: str = "sincos",
    ):
        super().__init__(vit, vit.embed_dim, mask_token, weight_initialization)
        if not weight_initialization:
            nn.init.xavier_uniform_(self.vit.patch_embed.proj.weight.view(len(self.vit.patch_embed.proj.weight), -1))
            if self.vit.cls_token is not None:
                nn.init.normal_(self.vit.cls_token, std=0.02)
            self.apply(init_weights)
        initialize_positional_embedding(self.vit.pos_embed, pos_embed_initialization, self.vit.num_prefix_tokens)
        self.antialias = antialias
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward in place of keeping what they made."""
        self.grad_checkpointing = enable

    @property
    def sequence_length(self) -> int:
        """Patches and prefix tokens."""
        return self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens

    def forward(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B, D], pooled as timm's transformer pools; arguments as of `encode`."""
        x = self.encode(images, idx_mask, idx_keep, mask)
        if getattr(self.vit, "attn_pool", None) is not None:
            return self.vit.attn_pool(x)
        pool = getattr(self.vit, "global_pool", "")
        if pool == "avg":
            return x[:, self.vit.num_prefix_tokens :].mean(1)
        return x[:, 0] if pool else x

    def encode(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The tokens [B, L, D] behind the last norm.

        Args:
            images: [B, C, H, W].
            idx_mask, mask: [B, M] indices, or [B, L] bool: these tokens, prefix tokens counted, are replaced.
            idx_keep: [B, K] indices: these tokens alone go through the blocks.
        """
        return self.forward_intermediates(images, idx_mask, idx_keep, mask=mask)[0]

    def forward_intermediates(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        norm: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`encode`, and the tokens behind each block, normed if `norm`."""
        x = self.vit.norm_pre(self.preprocess(images, idx_mask, idx_keep, mask))
        layers = []
        for block in self.vit.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            layers.append(self.vit.norm(x) if norm else x)
        return self.vit.norm(x), layers

    def images_to_tokens(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, D]"""
        tokens = self.vit.patch_embed(images)
        return tokens.flatten(1, 2) if self.vit.dynamic_img_size else tokens

    def prepend_prefix_tokens(self, x: Tensor) -> Tensor:
        """Class token and registers, where there are any."""
        prefixes = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        return torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefixes), x], 1) if prefixes else x

    def add_pos_embed(self, x: Tensor) -> Tensor:
        """Positions for tokens with their prefix, resampled where images are of other sizes than they were made for."""
        prefix = self.vit.num_prefix_tokens
        positions = self.vit.pos_embed
        of_prefix = 0 if self.vit.no_embed_class else prefix
        if self.vit.dynamic_img_size:
            side = round((x.shape[1] - prefix) ** 0.5)
            resample: Any = resample_abs_pos_embed
            positions = resample(positions, [side, side], num_prefix_tokens=of_prefix, antialias=self.antialias)
        if self.vit.no_embed_class:
            return self.vit.pos_drop(torch.cat([x[:, :prefix], x[:, prefix:] + positions], 1))
        return self.vit.pos_drop(x + positions)


class MaskedVisionTransformerDecoderTIMM(nn.Module):
    """Blocks of timm on a whole sequence, whose masked tokens are one learned token: MAE's decoder.

    Args:
        num_patches, num_prefix_tokens: of the sequence.
        embed_dim: D.
        depth, num_heads, mlp_ratio, qkv_bias, drop rates, norm_layer: of the blocks.
        initialize_weights: Xavier's, and fixed sine-cosine positions. False: positions are zeros.
        mask_token: [1, 1, D]; None: a new one.
    """

    def __init__(
        self,
        num_patches: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_prefix_tokens: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Any = _NORM,
        initialize_weights: bool = True,
        mask_token: nn.Parameter | None = None,
    ):
        super().__init__()
        self.num_patches = num_patches
        self.num_prefix_tokens = num_prefix_tokens
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if mask_token is None else mask_token
        places = torch.zeros(1, num_patches + num_prefix_tokens, embed_dim)
        self.pos_embed = nn.Parameter(places, requires_grad=False)
        of_block: dict[str, Any] = {
            "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate,
            "drop_path": drop_path_rate, "norm_layer": norm_layer,
        }  # fmt: skip
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, **of_block) for _ in range(depth)))
        self.norm = norm_layer(embed_dim)
        if initialize_weights:
            nn.init.normal_(self.mask_token, std=0.02)
            initialize_2d_sine_cosine_positional_embedding(self.pos_embed, num_prefix_tokens=num_prefix_tokens)
            self.apply(init_weights)

    @property
    def sequence_length(self) -> int:
        """Patches and prefix tokens."""
        return self.num_patches + self.num_prefix_tokens

    def forward(
        self, x: Tensor, idx_mask: Tensor | None = None, idx_keep: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B, L, D] -> [B, L or K, D]; arguments as of `MaskedVisionTransformerTIMM.encode`."""
        return self.decode(self.preprocess(x, idx_mask, idx_keep, mask))

    def preprocess(
        self, x: Tensor, idx_mask: Tensor | None = None, idx_keep: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Masked tokens replaced, positions added, and the tokens to keep."""
        x = replaced("MaskedVisionTransformerDecoderTIMM", x, self.mask_token, idx_mask, mask)
        x = self.add_pos_embed(x)
        return x if idx_keep is None else get_at_index(x, idx_keep)

    def add_pos_embed(self, x: Tensor) -> Tensor:
        return x + self.pos_embed

    def decode(self, x: Tensor) -> Tensor:
        """Blocks and norm."""
        return self.norm(self.blocks(x))
