"""Philox4x32-10 (Salmon et al. 2011): random numbers that are a function of a key, in no order.

Everything that is drawn for a sample is keyed (seed, epoch, sample, view): whoever computes it, in whatever batch, on
whatever rank and after whatever resume, gets the same. The seed is Philox's key; its counter is four words of 32 bits,
(sample, epoch, view, block), and each counter gives four numbers. Which blocks serve what is written here, so that no
two things are drawn from the same numbers.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastjem.kernels.arithmetic import widest_dtype

FIRST_CROP_BLOCK = 0  # the i-th attempt at a crop takes block i
FIRST_COLOUR_BLOCK = 1 << 31  # three blocks: flip and probabilities, factors, hue and the others
FIRST_MASK_BLOCK = 3 << 30  # as many as a mask needs
FIRST_LOSS_BLOCK = 15 << 28  # what a loss draws, with the step in the epoch's place

NO_VIEW = 0xFFFFFFFF  # in the view's place: numbers of a step, which all images of its batch share

WORD = 0xFFFFFFFF  # 32 bits
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what is added to the key after each round
ROUNDS = 10


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The key of each round: the seed's low and high word, a Weyl sequence on."""
    low, high = seed & WORD, seed >> 32 & WORD
    return [(low + i * WEYL[0] & WORD, high + i * WEYL[1] & WORD) for i in range(ROUNDS)]


def philox(counter: Sequence[ArrayLike], seed: int) -> np.ndarray:
    """Four words [N] (any integers; their low 32 bits count) -> [4, N] float64, uniform in (0, 1)."""
    c = [np.asarray(word).astype(np.uint64) & WORD for word in counter]
    for low, high in round_keys(seed):
        product0 = c[0] * np.uint64(MULTIPLIERS[0])
        product1 = c[2] * np.uint64(MULTIPLIERS[1])
        c = [product1 >> 32 ^ c[1] ^ low, product1 & WORD, product0 >> 32 ^ c[3] ^ high, product0 & WORD]
    return (np.stack(np.broadcast_arrays(*c)).astype(np.float64) + 0.5) * 2.0**-32


def philox_on_device(counter: Sequence[Tensor], seed: int) -> Tensor:
    """`philox` in torch, the same numbers: four int64 words of shapes that broadcast, on one device -> [4, *shape]
    float64 there. Nothing waits for the device.

    A device without float64 (Apple's MPS) gives float32: of each word the upper 23 bits, exact and in (0, 1) too, so
    that they follow the key alone there as well. They are less than 2 ** -24 from the others.

    The two products of a round are one tensor [2, *shape], as are the words that they don't come from: 6 launches a
    round instead of 12. torch has no unsigned 64-bit product, but int64's has the same bits.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    multiplied = torch.stack([c0, c2]) & WORD
    others = torch.stack([c1, c3])  # their upper bits are never looked at
    multipliers, keys = _constants(seed, multiplied.device, c0.dim())
    for key in keys:
        products = (multiplied * multipliers).flip(0)
        multiplied = ((products >> 32) ^ others ^ key) & WORD  # the mask removes what the shift made of the sign
        others = products
    others = others & WORD
    words = torch.stack([multiplied[0], others[0], multiplied[1], others[1]])
    wide = widest_dtype(words.device)
    if wide == torch.float32:  # with its half a number of 23 bits is exact; one of 24 could be rounded to 1
        return ((words >> 9).to(wide) + 0.5) * 2.0**-23
    return (words.to(wide) + 0.5) * 2.0**-32


def drawn_by_sample(samples: Tensor, epoch: Tensor, view: Tensor, count: int, seed: int, first: int) -> Tensor:
    """[B, count], uniform in (0, 1), of the blocks from `first` on, four numbers each.

    Args:
        samples: [B] int64. epoch, view: 0-dim int64, on their device.
    """
    block = torch.arange(first, first + math.ceil(count / 4), device=samples.device)
    drawn = philox_on_device([samples[:, None], epoch, view, block], seed)  # [4, B, blocks]
    return drawn.permute(1, 2, 0).flatten(1)[:, :count]


def drawn_in_a_step(samples: Tensor, step: Tensor, count: int, seed: int, first: int = 0) -> Tensor:
    """[B, count], uniform in (0, 1): what a loss draws for its images, in whatever batch or on whatever rank they are.

    Args:
        samples: [B] int64, the images' numbers. step: 0-dim int64.
        first: block from which on, of four numbers each: another one for each thing that a loss draws.
    """
    step = step.to(samples.device)
    return drawn_by_sample(samples, step, torch.full_like(step, NO_VIEW), count, seed, FIRST_LOSS_BLOCK + first)


@functools.lru_cache(maxsize=16)
def _constants(seed: int, device: torch.device, dims: int) -> tuple[Tensor, list[Tensor]]:
    """The multipliers and each round's key, [2, 1, ..., 1] on the device: copied there once, not at each draw."""
    shape = (2, *(1 for _ in range(dims)))
    keys = [torch.tensor(key, device=device).view(shape) for key in round_keys(seed)]
    return torch.tensor(MULTIPLIERS, device=device).view(shape), keys
