"""Philox4x32-10 (Salmon et al. 2011): random numbers that are a function of a key, in no order.

Everything that is drawn for a sample is keyed (seed, epoch, sample, view): whoever computes it, in whatever batch, on
whatever rank and after whatever resume, gets the same. The seed is Philox's key; its counter is four words of 32 bits,
(sample, epoch, view, block), and each gives four numbers. Which blocks of a view are used for what stands here, so that
nothing is drawn from the numbers of another.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIRST_CROP_BLOCK = 0  # the i-th attempt at a crop takes block i
FIRST_COLOUR_BLOCK = 1 << 31  # three blocks: flip and probabilities, factors, hue and the others
FIRST_MASK_BLOCK = 3 << 30  # as many as a mask needs

WORD = 0xFFFFFFFF  # 32 bits
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what is added to the key after each round
ROUNDS = 10


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The key of each round: the seed's low and high word, a Weyl sequence on."""
    low, high = seed & WORD, seed >> 32 & WORD
    return [(low + i * WEYL[0] & WORD, high + i * WEYL[1] & WORD) for i in range(ROUNDS)]


def philox(counter: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Four words [N] (any integers; their low 32 bits count) -> [4, N] float64, uniform in (0, 1)."""
    c = [np.asarray(word).astype(np.uint64) & WORD for word in counter]
    for low, high in round_keys(seed):
        product0 = c[0] * np.uint64(MULTIPLIERS[0])
        product1 = c[2] * np.uint64(MULTIPLIERS[1])
        c = [product1 >> 32 ^ c[1] ^ low, product1 & WORD, product0 >> 32 ^ c[3] ^ high, product0 & WORD]
    return (np.stack(np.broadcast_arrays(*c)).astype(np.float64) + 0.5) * 2.0**-32


def philox_on_device(counter: Sequence[Tensor | int], seed: int) -> Tensor:
    """`philox` in torch: int64 words of any shapes that broadcast -> [4, *shape] float64 on their device, the same
    numbers. Nothing waits for the device.

    torch has no unsigned 64-bit product, but int64's has the same bits, and a mask after the shift removes the sign's.
    """
    c0, c1, c2, c3 = (word & WORD for word in counter)
    for low, high in round_keys(seed):
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32 & WORD) ^ c1 ^ low
        c1 = product1 & WORD
        c2 = (product0 >> 32 & WORD) ^ c3 ^ high
        c3 = product0 & WORD
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3))
    return (words.double() + 0.5) * 2.0**-32
