"""Philox4x32-10 (Salmon et al. 2011): random numbers that are a function of a key, in no order.

Everything that is drawn for a sample is keyed (seed, epoch, sample, view): whoever computes it, in whatever batch, on
whatever rank and after whatever resume, gets the same. The seed is Philox's key; its counter is four words of 32 bits,
(sample, epoch, view, block), and each counter gives four numbers. Which blocks serve what is written here, so that no
two things are drawn from the same numbers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastjem.kernels.masks.philox import MULTIPLIERS, WORD, round_keys
from fastjem.ops import direct

FIRST_CROP_BLOCK = 0  # the i-th attempt at a crop takes block i
FIRST_COLOUR_BLOCK = 1 << 31  # three blocks: flip and probabilities, factors, hue and the others
FIRST_MASK_BLOCK = 3 << 30  # as many as a mask needs
FIRST_LOSS_BLOCK = 15 << 28  # what a loss draws, with the step in the epoch's place

NO_VIEW = 0xFFFFFFFF  # in the view's place: numbers of a step, which all images of its batch share


def philox(counter: Sequence[ArrayLike], seed: int) -> np.ndarray:
    """Four words [N] (any integers; their low 32 bits count) -> [4, N] float64, uniform in (0, 1)."""
    c = [np.asarray(word).astype(np.uint64) & WORD for word in counter]
    for low, high in round_keys(seed):
        product0 = c[0] * np.uint64(MULTIPLIERS[0])
        product1 = c[2] * np.uint64(MULTIPLIERS[1])
        c = [product1 >> 32 ^ c[1] ^ low, product1 & WORD, product0 >> 32 ^ c[3] ^ high, product0 & WORD]
    return (np.stack(np.broadcast_arrays(*c)).astype(np.float64) + 0.5) * 2.0**-32


def drawn_by_sample(
    samples: Tensor, epoch: int, view: int, count: int, seed: int, first: int, views: int = 1
) -> Tensor:
    """[views B, count], uniform in (0, 1), of the blocks from `first` on, four numbers each, and of views from `view`
    on, one after the other. One launch.

    Args:
        samples: [B], of an integer dtype.
    """
    return direct.call(
        "keyed_uniform", _numbers("samples", samples, 1), None, epoch, view, views, first, count, _signed(seed)
    )


def drawn_in_a_step(samples: Tensor, step: Tensor, count: int, seed: int, first: int = 0) -> Tensor:
    """[B, count], uniform in (0, 1): what a loss draws for its images, in whatever batch or on whatever rank they are.

    Args:
        samples: [B], the images' numbers; step: 0-dim. Both of integer dtypes.
        first: block from which on, of four numbers each: another one for each thing that a loss draws.
    """
    samples = _numbers("samples", samples, 1)
    step = _numbers("step", step, 0).to(samples.device)
    first += FIRST_LOSS_BLOCK
    return direct.call("keyed_uniform", samples, step, 0, NO_VIEW, 1, first, count, _signed(seed))


def _numbers(name: str, x: Tensor, dims: int) -> Tensor:
    """As int64, which is read as it lies in memory.

    Raises:
        ValueError: for other shapes, and for what isn't whole numbers.
    """
    if x.dim() != dims or x.is_floating_point() or x.is_complex():
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {dims}-dim, of an integer dtype, got {tuple(x.shape)} {dtype}")
    return x.long()


def _signed(seed: int) -> int:
    """The number of a signed word of 64 bits that has the seed's bits."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >> 63 else seed
