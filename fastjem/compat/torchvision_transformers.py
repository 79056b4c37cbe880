"""torchvision's vision transformers with masks, as lightly's modules: names, arguments, state dicts and values are its.

New code is better off with timm's (`timm_transformers.py`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vision_transformer
from torchvision.models.vision_transformer import VisionTransformer

from fastjem.compat.masked import Masked
from fastjem.compat.timm_predictors import predicted
from fastjem.nn.blocks import (
    get_2d_sine_cosine_positional_embedding,
    initialize_positional_embedding,
)
from fastjem.nn.tokens import apply_masks, prepend_class_token

NormLayer = Callable[..., nn.Module]
_NORM = partial(nn.LayerNorm, eps=1e-6)


def resampled(positions: Tensor, tokens: Tensor, antialias: bool) -> Tensor:
    """Positions [1, 1 + N, D], of a class token and a square, for as many tokens as there are."""
    if tokens.shape[1] == positions.shape[1]:
        return positions
    before = round((positions.shape[1] - 1) ** 0.5)
    factor = ((tokens.shape[1] - 1) / (positions.shape[1] - 1)) ** 0.5
    square = positions[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    square = nn.functional.interpolate(square, scale_factor=factor, mode="bicubic", antialias=antialias)
    return torch.cat([positions[:, :1], square.flatten(2).mT], 1)


class MaskedVisionTransformerTorchvision(Masked):
    """A vision transformer of torchvision some of whose tokens are replaced by a mask token, or left out.

    Args:
        vit: made by torchvision.
        mask_token, weight_initialization, antialias, pos_embed_initialization: as of `MaskedVisionTransformerTIMM`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        mask_token: nn.Parameter | None = None,
        weight_initialization: str = "",
        antialias: bool = True,
        pos_embed_initialization: str = "sincos",
    ):
        super().__init__(vit, vit.hidden_dim, mask_token, weight_initialization)
        if not weight_initialization:
            nn.init.xavier_uniform_(self.vit.conv_proj.weight.view(len(self.vit.conv_proj.weight), -1))
            nn.init.normal_(self.vit.class_token, std=0.02)
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        initialize_positional_embedding(self.vit.encoder.pos_embedding, pos_embed_initialization, 1)
        self.antialias = antialias

    @property
    def sequence_length(self) -> int:
        """Patches and the class token."""
        return self.vit.seq_length

    def forward(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B, D], the class token; arguments as of `MaskedVisionTransformerTIMM.encode`."""
        return self.encode(images, idx_mask, idx_keep, mask)[:, 0]

    def encode(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The tokens [B, L, D] behind the last norm."""
        encoder = self.vit.encoder
        return encoder.ln(encoder.layers(encoder.dropout(self.preprocess(images, idx_mask, idx_keep, mask))))

    def images_to_tokens(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, D]"""
        return self.vit.conv_proj(images).flatten(2).mT

    def prepend_prefix_tokens(self, x: Tensor) -> Tensor:
        """The class token before the others."""
        return prepend_class_token(x, self.vit.class_token)

    def add_pos_embed(self, x: Tensor) -> Tensor:
        """Positions, resampled where images are of other sizes than they were made for."""
        return x + resampled(self.vit.encoder.pos_embedding, x, self.antialias)


class IJEPAEncoder(vision_transformer.Encoder):
    """torchvision's encoder that is given some of the tokens alone. Arguments are its."""

    @classmethod
    def from_vit_encoder(cls, vit_encoder: Any) -> "IJEPAEncoder":
        """With the parts of torchvision's, shared."""
        encoder = cls(1, 1, 1, 1, 1, 0.0, 0.0)
        encoder.pos_embedding = vit_encoder.pos_embedding
        encoder.dropout = vit_encoder.dropout
        encoder.layers = vit_encoder.layers
        encoder.ln = vit_encoder.ln
        return encoder

    def forward(self, input: Tensor, idx_keep: Any = None) -> Tensor:
        """[B, L, D] -> [masks B, K, D]; idx_keep: the indices [B, K] of each mask, a list of them, or one, or None."""
        x = input + resampled(self.pos_embedding, input, antialias=False)
        if idx_keep is not None:
            x = apply_masks(x, idx_keep)
        return self.ln(self.layers(self.dropout(x)))


class IJEPABackbone(VisionTransformer):
    """torchvision's vision transformer that is given some of the tokens alone. Arguments are its."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float = 0,
        attention_dropout: float = 0,
        num_classes: int = 1000,
        representation_size: int | None = None,
        norm_layer: NormLayer = _NORM,
        conv_stem_configs: Any = None,
    ):
        rest = (dropout, attention_dropout, num_classes, representation_size, norm_layer, conv_stem_configs)
        super().__init__(image_size, patch_size, num_layers, num_heads, hidden_dim, mlp_dim, *rest)
        self.encoder = IJEPAEncoder(
            self.seq_length, num_layers, num_heads, hidden_dim, mlp_dim, dropout, attention_dropout, norm_layer
        )  # fmt: skip

    @classmethod
    def from_vit(cls, vit: Any) -> "IJEPABackbone":
        """With the parts of torchvision's, shared."""
        backbone = cls(
            vit.image_size, vit.patch_size, 1, 1, vit.hidden_dim, vit.mlp_dim, vit.dropout, vit.attention_dropout,
            vit.num_classes, vit.representation_size, vit.norm_layer,
        )  # fmt: skip
        backbone.conv_proj = vit.conv_proj
        backbone.class_token = vit.class_token
        backbone.seq_length = vit.seq_length
        backbone.heads = vit.heads
        backbone.encoder = IJEPAEncoder.from_vit_encoder(vit.encoder)
        return backbone

    def forward(self, images: Tensor, idx_keep: Any = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tokens [masks B, K, D] behind the last norm; see `IJEPAEncoder.forward`."""
        return self.encode(images, idx_keep)

    def encode(self, images: Tensor, idx_keep: Any = None) -> Tensor:
        """The same."""
        return self.encoder(self.images_to_tokens(images, True), idx_keep)

    def images_to_tokens(self, images: Tensor, prepend_class_token: bool) -> Tensor:
        """[B, C, H, W] -> [B, patches, D], the class token before them where it is asked for."""
        tokens = self.conv_proj(images).flatten(2).mT
        return torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1) if prepend_class_token else tokens


class IJEPAPredictor(vision_transformer.Encoder):
    """I-JEPA's predictor with torchvision's blocks: the tokens of targets from those of the context.

    Args:
        seq_length, num_layers, num_heads, hidden_dim, dropout, attention_dropout, norm_layer: of torchvision's encoder.
        predictor_embed_dim: the predictor's width.
        num_patches: of an image, a square of them.
        mlp_dim: the context encoder's width, and the blocks' MLPs'.
    """

    def __init__(
        self,
        seq_length: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        predictor_embed_dim: int,
        num_patches: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
        norm_layer: NormLayer = _NORM,
        **kwargs: Any,
    ):
        super().__init__(
            seq_length, num_layers, num_heads, hidden_dim, mlp_dim, dropout, attention_dropout, norm_layer
        )  # fmt: skip
        self.predictor_embed = nn.Linear(mlp_dim, predictor_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_embed_dim))
        self.predictor_proj = nn.Linear(predictor_embed_dim, mlp_dim)
        places = get_2d_sine_cosine_positional_embedding(predictor_embed_dim, int(num_patches**0.5), cls_token=False)
        self.predictor_pos_embed = nn.Parameter(torch.from_numpy(places).float()[None], requires_grad=False)

    @classmethod
    def from_vit_encoder(cls, vit_encoder: Any, num_patches: int) -> "IJEPAPredictor":
        """With the blocks of torchvision's encoder, 768 wide, shared."""
        predictor = cls(1, 1, 1, 1, 768, num_patches, 768, 0.0, 0.0)
        predictor.layers = vit_encoder.layers
        predictor.ln = vit_encoder.ln
        return predictor

    def forward(self, x: Tensor, masks_x: Any, masks: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `IJEPAPredictorTIMM.forward`."""
        return predicted(
            x, masks_x, masks, self.predictor_embed, self.predictor_pos_embed, self.mask_token,
            lambda tokens: self.ln(self.layers(tokens)), self.predictor_proj,
        )  # fmt: skip
