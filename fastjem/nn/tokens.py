"""Tokens of transformers: selection, masks, patches; nearest neighbours among local features. Names as in lightly."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def repeat_token(token: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, 1, D] -> [B, L, D]"""
    return token.repeat(*size, 1)


def expand_index_like(index: Tensor, tokens: Tensor) -> Tensor:
    """[B, I] -> [B, I, D], as gather and scatter along the tokens want it."""
    return index[..., None].expand(-1, -1, tokens.shape[-1])


def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
    """`tokens[b, index[b]]`: [B, L, D], [B, I] -> [B, I, D]"""
    return tokens.gather(1, expand_index_like(index, tokens))


def set_at_index(tokens: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """A copy with `tokens[b, index[b]] = value[b]`: [B, L, D], [B, I], [B, I, D] -> [B, L, D]"""
    return tokens.scatter(1, expand_index_like(index, tokens), value.to(tokens.dtype))


def mask_at_index(tokens: Tensor, index: Tensor, mask_token: Tensor) -> Tensor:
    """A copy with `tokens[b, index[b]] = mask_token` ([1, 1, D])."""
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, index, True)
    return mask_bool(tokens, mask, mask_token)


def mask_bool(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """`mask_token` ([1, 1, D]) where `mask` ([B, L]) is true, `tokens` elsewhere."""
    return torch.where(mask.bool()[..., None], mask_token, tokens)


def prepend_class_token(tokens: Tensor, class_token: Tensor) -> Tensor:
    """[B, L, D], [1, 1, D] -> [B, 1 + L, D]"""
    return torch.cat([class_token.expand(len(tokens), -1, -1), tokens], 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, H/p W/p, p p C], a patch's pixels row by row, channels last."""
    b, c, h, w = images.shape
    if h % patch_size or w % patch_size:
        raise ValueError(f"patchify: height and width must be multiples of patch_size = {patch_size}, got {h} x {w}")
    patches = images.reshape(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch_size**2 * c)


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3, *, grid: tuple[int, int] | None = None) -> Tensor:
    """The inverse of `patchify`. grid: patches in the images' height and width; None: these are squares."""
    b, count, _ = patches.shape
    rows, columns = grid or (round(count**0.5),) * 2
    if rows * columns != count:
        wanted = f"{rows} x {columns}" if grid else "a square"
        raise ValueError(f"unpatchify: patches must be {wanted} of them, got {count}")
    pixels = patches.reshape(b, rows, columns, patch_size, patch_size, channels)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, rows * patch_size, columns * patch_size)


def most_similar_index(x: Tensor, y: Tensor) -> Tensor:
    """[B, N]: which row of y[b] ([B, M, D]) has the largest cosine with each row of x[b] ([B, N, D])."""
    return (normalize(x, dim=-1) @ normalize(y, dim=-1).mT).argmax(2)


def select_most_similar(x: Tensor, y: Tensor, y_values: Tensor) -> Tensor:
    """[B, N, D']: y_values ([B, M, D']) at `most_similar_index(x, y)`."""
    return get_at_index(y_values, most_similar_index(x, y))


def repeat_interleave_batch(x: Tensor, B: int, repeat: int) -> Tensor:
    """[n B, ...] -> [n repeat B, ...]: each batch of B rows `repeat` times, one after another."""
    return x.unflatten(0, (-1, B)).repeat_interleave(repeat, 0).flatten(0, 1)


def apply_masks(x: Tensor, masks: Tensor | list[Tensor]) -> Tensor:
    """The tokens that each mask of indices [B, I] keeps, concatenated along the batch: [B, L, D] -> [masks B, I, D]

    masks: a list of them, or one.
    """
    return torch.cat([get_at_index(x, mask) for mask in (masks if isinstance(masks, list) else [masks])])


def nearest_neighbors(
    input_maps: Tensor,  # [N, P, D]
    candidate_maps: Tensor,  # [N, Q, D]
    distances: Tensor,  # [N, P, Q]
    num_matches: int | None,
) -> tuple[Tensor, Tensor]:
    """The `num_matches` inputs that are nearest to a candidate, nearest first, and that candidate of each.

    Both [N, matches, D]. num_matches: None, negative or more than there are: all of them.
    """
    return matches(input_maps, candidate_maps, distances, num_matches, in_their_order=False)


def matches(
    input_maps: Tensor, candidate_maps: Tensor, distances: Tensor, num_matches: int | None, *, in_their_order: bool
) -> tuple[Tensor, Tensor]:
    """`nearest_neighbors`, the nearest first or in the inputs' order."""
    count = distances.shape[1]
    if num_matches is not None and num_matches >= 0:
        count = min(count, num_matches)
    nearest, candidate = distances.min(2)  # [N, P]
    chosen = nearest.topk(count, dim=1, largest=False).indices  # [N, matches]
    if in_their_order:
        chosen = chosen.sort(dim=1).values
    return get_at_index(input_maps, chosen), get_at_index(candidate_maps, candidate.gather(1, chosen))
