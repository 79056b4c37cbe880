"""Softmaxes of rows that are read once, of one block of columns or of three.

A block's width is a power of 2. Of 3000 prototypes 4096 would be more than a quarter nothing, which costs as much as
numbers do; three blocks of 1024 are 2 % more. What isn't read is 0 and has a bias of -inf. A row that is one block
stands in the place of the other two, unused: Triton's functions return no None among tensors.
"""

import triton
import triton.language as tl

from .row_logsumexp import biased


@triton.jit
def load_biases(bias, K, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """[1, BLOCK] for each block of a row."""
    column = tl.arange(0, BLOCK)[None, :]
    first = tl.load(bias + column, column < K, -float("inf"))
    if BLOCKS == 1:
        return first, first, first
    else:
        second = tl.load(bias + BLOCK + column, BLOCK + column < K, -float("inf"))
        third = tl.load(bias + 2 * BLOCK + column, 2 * BLOCK + column < K, -float("inf"))
        return first, second, third


@triton.jit
def load_rows(x, live, K, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Of rows that begin at x, [ROWS, 1]: [ROWS, BLOCK] for each block."""
    column = tl.arange(0, BLOCK)[None, :]
    first = tl.load(x + column, live & (column < K), 0)
    if BLOCKS == 1:
        return first, first, first
    else:
        second = tl.load(x + BLOCK + column, live & (BLOCK + column < K), 0)
        third = tl.load(x + 2 * BLOCK + column, live & (2 * BLOCK + column < K), 0)
        return first, second, third


@triton.jit
def exponentials(x, biases, scale, low, COMPUTE: tl.constexpr, BLOCKS: tl.constexpr):
    """Of `load_rows`: a softmax in blocks, not yet divided by its sum, and 1 over the sum, [ROWS, 1].

    Blocks are joined number by number, so that threads exchange a maximum and a sum once a row.
    """
    v0 = biased(x[0], biases[0], scale, low, COMPUTE)
    if BLOCKS == 1:
        e0 = tl.exp(v0 - tl.max(v0, 1)[:, None])
        return (e0, e0, e0), (1 / tl.sum(e0, 1))[:, None]
    else:
        v1 = biased(x[1], biases[1], scale, low, COMPUTE)
        v2 = biased(x[2], biases[2], scale, low, COMPUTE)
        maximum = tl.max(tl.maximum(tl.maximum(v0, v1), v2), 1)[:, None]
        e0 = tl.exp(v0 - maximum)
        e1 = tl.exp(v1 - maximum)
        e2 = tl.exp(v2 - maximum)
        return (e0, e1, e2), (1 / tl.sum(e0 + e1 + e2, 1))[:, None]


@triton.jit
def store_rows(out, rows, live, K, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    for i in tl.static_range(BLOCKS):
        tl.store(out + i * BLOCK + column, rows[i], live & (i * BLOCK + column < K))
