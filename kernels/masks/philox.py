"""Philox4x32-10 (Salmon et al. 2011) in torch: what `keyed_uniform` is made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arithmetic import widest_dtype

WORD = 0xFFFFFFFF  # 32 bits
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what is added to the key after each round
ROUNDS = 10


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The key of each round: the seed's low and high word, a Weyl sequence on."""
    low, high = seed & WORD, seed >> 32 & WORD
    return [(low + i * WEYL[0] & WORD, high + i * WEYL[1] & WORD) for i in range(ROUNDS)]


def philox_on_device(counter: Sequence[Tensor], seed: int) -> Tensor:
    """`fastjem.data.philox.philox` in torch, the same numbers: four int64 words of shapes that broadcast, on one device
    -> [4, *shape] float64 there. Nothing waits for the device.

    A device without float64 (Apple's MPS) gives float32: of each word the upper 23 bits, exact and in (0, 1) too, so
    that they follow the key alone there as well. They are less than 2 ** -24 from the others.
    """
    c0, c1, c2, c3 = (word & WORD for word in counter)
    for low, high in round_keys(seed):
        product0 = c0 * MULTIPLIERS[0]  # of int64, whose bits are those of the unsigned product
        product1 = c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ low) & WORD  # the mask removes what the shift made of the sign
        c1 = product1 & WORD
        c2 = ((product0 >> 32) ^ c3 ^ high) & WORD
        c3 = product0 & WORD
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3))
    wide = widest_dtype(words.device)
    if wide == torch.float32:  # with its half a number of 23 bits is exact; one of 24 could be rounded to 1
        return ((words >> 9).to(wide) + 0.5) * 2.0**-23
    return (words.to(wide) + 0.5) * 2.0**-32
