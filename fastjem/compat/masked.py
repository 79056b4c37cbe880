"""What transformers with masks have in common, whoever made them: which tokens are replaced, and which are left out."""

from typing import Any

import torch
from torch import Tensor, nn

from fastjem.functional import checks
from fastjem.nn.tokens import get_at_index, mask_at_index, mask_bool


def replaced(who: str, tokens: Tensor, token: Tensor, idx_mask: Tensor | None, mask: Tensor | None) -> Tensor:
    """Tokens [B, L, D] with the mask token where indices [B, M], or a mask [B, L], say; either, or neither."""
    if idx_mask is not None and mask is not None:
        checks.fail(who, "idx_mask or mask must be given, not both", "both")
    if idx_mask is not None:
        return mask_at_index(tokens, idx_mask, token)
    return tokens if mask is None else mask_bool(tokens, mask, token)


class Masked(nn.Module):
    """A transformer some of whose tokens are replaced by a mask token, or left out, before its blocks.

    Args:
        vit: the transformer.
        width: D.
        mask_token: [1, 1, D]; None: a new one, of zeros.
        weight_initialization: "" or "skip".
    """

    def __init__(self, vit: nn.Module, width: int, mask_token: nn.Parameter | None, weight_initialization: str):
        super().__init__()
        if weight_initialization not in ("", "skip"):
            contract = "weight_initialization must be '' or 'skip'"
            checks.fail(type(self).__name__, contract, repr(weight_initialization))
        self.vit: Any = vit
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token is None else mask_token

    def preprocess(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The tokens that go into the blocks: positions are added behind the replacement."""
        tokens = self.prepend_prefix_tokens(self.images_to_tokens(images))
        tokens = replaced(type(self).__name__, tokens, self.mask_token, idx_mask, mask)
        tokens = self.add_pos_embed(tokens)
        return tokens if idx_keep is None else get_at_index(tokens, idx_keep)

    def images_to_tokens(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, D]"""
        raise NotImplementedError

    def prepend_prefix_tokens(self, x: Tensor) -> Tensor:
        """What stands before the patches, in front of them."""
        raise NotImplementedError

    def add_pos_embed(self, x: Tensor) -> Tensor:
        """Positions for tokens with their prefix."""
        raise NotImplementedError
