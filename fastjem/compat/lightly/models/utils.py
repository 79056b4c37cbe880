"""`lightly.models.utils`: functions on tokens, masks, weights and batches."""

from typing import Any

from fastjem.compat.lightly.lookup import absent
from fastjem.nn.blocks import (
    add_stochastic_depth_to_blocks,
    get_1d_sine_cosine_positional_embedding_from_positions,
    get_2d_sincos_pos_embed,
    get_2d_sine_cosine_positional_embedding,
    get_2d_sine_cosine_positional_embedding_from_grid,
    get_named_leaf_modules,
    initialize_2d_sine_cosine_positional_embedding,
    initialize_learnable_positional_embedding,
    initialize_positional_embedding,
    normalize_mean_var,
    pool_masked,
    update_drop_path_rate,
)
from fastjem.nn.masks import (
    random_block_mask,
    random_block_mask_image,
    random_grid_token_mask,
    random_inverse_block_mask,
    random_prefix_mask,
    random_token_mask,
)
from fastjem.nn.momentum import (
    activate_requires_grad,
    deactivate_requires_grad,
    get_weight_decay_parameters,
    normalize_weight,
    update_momentum,
)
from fastjem.nn.shuffling import (
    batch_shuffle,
    batch_shuffle_distributed,
    batch_unshuffle,
    batch_unshuffle_distributed,
    concat_all_gather,
)
from fastjem.nn.tokens import (
    apply_masks,
    expand_index_like,
    get_at_index,
    mask_at_index,
    mask_bool,
    most_similar_index,
    nearest_neighbors,
    patchify,
    prepend_class_token,
    repeat_interleave_batch,
    repeat_token,
    select_most_similar,
    set_at_index,
    unpatchify,
)

__all__ = [
    "activate_requires_grad", "add_stochastic_depth_to_blocks", "apply_masks", "batch_shuffle",
    "batch_shuffle_distributed", "batch_unshuffle", "batch_unshuffle_distributed", "concat_all_gather",
    "deactivate_requires_grad", "expand_index_like", "get_1d_sine_cosine_positional_embedding_from_positions",
    "get_2d_sincos_pos_embed", "get_2d_sine_cosine_positional_embedding",
    "get_2d_sine_cosine_positional_embedding_from_grid", "get_at_index", "get_named_leaf_modules",
    "get_weight_decay_parameters", "initialize_2d_sine_cosine_positional_embedding",
    "initialize_learnable_positional_embedding", "initialize_positional_embedding", "mask_at_index", "mask_bool",
    "most_similar_index", "nearest_neighbors", "normalize_mean_var", "normalize_weight", "patchify", "pool_masked",
    "prepend_class_token", "random_block_mask", "random_block_mask_image", "random_grid_token_mask",
    "random_inverse_block_mask", "random_prefix_mask", "random_token_mask", "repeat_interleave_batch", "repeat_token",
    "select_most_similar", "set_at_index", "unpatchify", "update_drop_path_rate", "update_momentum",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
