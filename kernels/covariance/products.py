"""Products of both views with themselves and with what comes of that, in tiles, a launch for both views.

The squares are the smaller ones: rows with rows (N x N) for N < D, else columns with columns (D x D). Such a product of
a view with itself is symmetric: a block of rows meets half of the blocks, on a circle, and each tile is written twice,
the second time transposed. What the loss wants of squares is summed as they are made. Of columns with columns the
diagonal is left out, of the sum and of what the next product takes: it has a term of its own, and what a total and a
diagonal leave of each other has lost its digits where columns are decorrelated.

float32 is three products of TF32, each with a sum of its own, of numbers rounded to TF32's digits and of what that
leaves of them: errors are about float32's own (docs/gpu.md). Nobody's setting of torch's precision is asked or changed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import chips, launch, tiling
from ..contrastive.tiles import add_product, with_remainders

# Rows of squares begin whole words apart, whatever their number, and end with zeros: else the product that reads them,
# in a batch of any size, would read number by number.
PAD = tl.constexpr(16)

# Tiles of 64 x 64 wait for the L2 cache: 128 rows are read for 4096 products. Hopper has registers for 128 x 128, one
# program a multiprocessor, which are worth it where each has some (VICReg: from 1921 rows on). Elsewhere they spill, as
# do rows that aren't whole words.
LARGE = {"BM": 128, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
PROGRAMS = 2  # a multiprocessor


@triton.jit
def _square_tile(z, i_a, i_b, z_b, N, D, TALL: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of `z @ z_b.T`, or if TALL of `z.T @ z_b`, of contiguous [N, D]."""
    acc = tl.zeros([i_a.shape[0], i_b.shape[0]], COMPUTE)
    acc_right = tl.zeros([i_a.shape[0], i_b.shape[0]], COMPUTE)
    acc_left = tl.zeros([i_a.shape[0], i_b.shape[0]], COMPUTE)
    if TALL:
        for start in range(0, N, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = launch.row_start(k, D, 1)[None, :] + i_a[:, None]
            b = launch.row_start(k, D, 1)[:, None] + i_b[None, :]
            left = tl.load(z + a, (i_a < D)[:, None] & (k < N)[None, :], 0)
            right = tl.load(z_b + b, (k < N)[:, None] & (i_b < D)[None, :], 0)
            acc, acc_right, acc_left = add_product(acc, acc_right, acc_left, left, right)
    else:
        a_row = launch.row_start(i_a, D, 1)[:, None]
        b_row = launch.row_start(i_b, D, 1)[None, :]
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(z + a_row + k[None, :], (i_a < N)[:, None] & (k < D)[None, :], 0)
            right = tl.load(z_b + b_row + k[:, None], (k < D)[:, None] & (i_b < N)[None, :], 0)
            acc, acc_right, acc_left = add_product(acc, acc_right, acc_left, left, right)
    return with_remainders(acc, acc_right, acc_left)


@triton.jit
def _store_square(out, out_transposed, s, i_a, i_b, R, s_square, live):
    """A tile, and its transpose on the other side; rows up to the end of their memory, where zeros are."""
    mask = (i_a < R)[:, None] & (i_b < s_square * PAD)[None, :] & live
    tl.store(out + launch.row_start(i_a, s_square, PAD)[:, None] + i_b[None, :], s, mask)
    mask = (i_a < s_square * PAD)[:, None] & (i_b < R)[None, :] & live
    tl.store(out_transposed + launch.row_start(i_b, s_square, PAD)[None, :] + i_a[:, None], s, mask)


@triton.jit(do_not_specialize=["N", "s_square"])
def _squares_kernel(
    z,  # [2, N, D] contiguous
    # tuple of two [R, R], rows s_square * PAD apart, R = D if TALL else N: of each view; if CROSS and TALL, a^T b and
    squares,  # its transpose
    sums,  # [views or 1, blocks, offsets, BM]: of a tile's rows, of squares over N; if CROSS of a's times b's
    N,
    D,
    s_square,
    CROSS: tl.constexpr,  # of both views with each other, which a program of both makes
    TALL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,  # BN is BM
    BLOCK_K: tl.constexpr,
):
    R = D if TALL else N
    blocks = tl.cdiv(R, BM)
    offsets = blocks // 2 + 1
    if CROSS and TALL:
        offsets = blocks
    block_a = tl.program_id(0) % blocks
    offset = tl.program_id(0) // blocks % offsets
    view = tl.program_id(0) // blocks // offsets
    block_b = (block_a + offset) % blocks
    i_a = block_a * BM + tl.arange(0, BM)
    i_b = block_b * BM + tl.arange(0, BM)
    a = z + view * launch.row_start(N, D, 1)
    b = a
    if CROSS:
        b = z + launch.row_start(N, D, 1)
    over = 1 / tl.full((), N, COMPUTE)
    apart = (i_a[:, None] != i_b[None, :]) | (not TALL)
    if CROSS and TALL:
        s = tl.where(apart, _square_tile(a, i_a, i_b, b, N, D, TALL, COMPUTE, BLOCK_K), 0.0)
        _store_square(squares[0], squares[1], s, i_a, i_b, R, s_square, i_a[:, None] == i_a[:, None])
        total = tl.sum((s * over) * (s * over), 1)
    else:
        # Of an even number of blocks the last offset, half of them, comes twice.
        live = (2 * offset != blocks) | (block_a < block_b)
        s = tl.where(apart, _square_tile(a, i_a, i_b, a, N, D, TALL, COMPUTE, BLOCK_K), 0.0)
        out = launch.chosen(squares, view)
        _store_square(out, out, s, i_a, i_b, R, s_square, live)
        other = s
        if CROSS:
            other = _square_tile(b, i_a, i_b, b, N, D, TALL, COMPUTE, BLOCK_K)
            _store_square(squares[1], squares[1], other, i_a, i_b, R, s_square, live)
        weight = tl.where(live, tl.where(offset == 0, 1.0, 2.0), 0.0).to(COMPUTE)
        total = tl.sum((s * over) * (other * over), 1) * weight
    tl.store(sums + launch.row_start(tl.program_id(0), BM, 1) + tl.arange(0, BM), total)


def _blocks(r: int, size: int, whole: bool) -> tuple[int, int]:
    """Of r rows, and how many of them each meets."""
    blocks = triton.cdiv(r, size)
    return blocks, blocks if whole else blocks // 2 + 1


def squares(z: Tensor, cross: bool) -> tuple[list[Tensor], Tensor]:
    """The squares of z [2, N, D], both; and [views, parts], or with `cross` [1, parts], sums of what is in them.

    For N < D of `s * s` over N^2, of each view's `s = z @ z.T`, with `cross` of both views' s times each other. Else,
    without the diagonal, which is 0 in the squares, too, of each view's `z.T @ z`, or with `cross` of `a.T @ b`, which
    comes with its transpose.
    """
    _, n, d = z.shape
    is_tall = n >= d
    r = d if is_tall else n
    tile = tiling.covariance_squares(z.dtype, cross and not is_tall)
    if d % 16 == 0 and z.dtype != torch.float64 and (is_tall or not cross):
        blocks, offsets = _blocks(r, LARGE["BM"], cross and is_tall)
        programs = blocks * offsets * (1 if cross else 2)
        if chips.current().capability == 90 and programs >= PROGRAMS * chips.current().multiprocessors:
            tile = LARGE
    blocks, offsets = _blocks(r, tile["BM"], cross and is_tall)
    pad = PAD.value
    found = [z.new_empty(r, -(-r // pad) * pad)[:, :r] for _ in range(2)]
    sums = z.new_empty(1 if cross else 2, blocks * offsets * tile["BM"])
    launch.launch(
        _squares_kernel,
        (len(sums) * blocks * offsets,),
        z,
        tuple(found),
        sums,
        n,
        d,
        found[0].stride(0) // pad,
        CROSS=cross,
        TALL=is_tall,
        COMPUTE=launch.DTYPES[z.dtype],
        **tile,
        device_of=z,
    )
    return found, sums


@triton.jit
def product_tile(
    z, square, i_row, column, N, D, s_square, TALL: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tile of `square @ z`, or if TALL of `z @ square.T`, of contiguous z [N, D] and one of `squares`."""
    acc = tl.zeros([i_row.shape[0], column.shape[0]], COMPUTE)
    acc_right = tl.zeros([i_row.shape[0], column.shape[0]], COMPUTE)
    acc_left = tl.zeros([i_row.shape[0], column.shape[0]], COMPUTE)
    if TALL:
        left_row = launch.row_start(i_row, D, 1)[:, None]
        right_row = launch.row_start(column, s_square, PAD)[None, :]
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(z + left_row + k[None, :], (i_row < N)[:, None] & (k < D)[None, :], 0)
            right = tl.load(square + right_row + k[:, None], (k < D)[:, None] & (column < D)[None, :], 0)
            acc, acc_right, acc_left = add_product(acc, acc_right, acc_left, left, right)
    else:
        left_row = launch.row_start(i_row, s_square, PAD)[:, None]
        for start in range(0, N, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            right_row = launch.row_start(k, D, 1)[:, None]
            left = tl.load(square + left_row + k[None, :], (i_row < N)[:, None] & (k < s_square * PAD)[None, :], 0)
            right = tl.load(z + right_row + column[None, :], (k < N)[:, None] & (column < D)[None, :], 0)
            acc, acc_right, acc_left = add_product(acc, acc_right, acc_left, left, right)
    return with_remainders(acc, acc_right, acc_left)


@triton.jit
def tile_of(program, N, D, BM: tl.constexpr, BN: tl.constexpr):
    """Which of the gradients a program makes a tile of, its rows and its columns."""
    of_rows = tl.cdiv(N, BM)
    of_columns = tl.cdiv(D, BN)
    i_row = program % of_rows * BM + tl.arange(0, BM)
    column = program // of_rows % of_columns * BN + tl.arange(0, BN)
    return program // of_rows // of_columns, i_row, column


def tiles_of(n: int, d: int, tile: dict) -> int:
    """How many there are of one gradient [N, D]."""
    return triton.cdiv(n, tile["BM"]) * triton.cdiv(d, tile["BN"])


def kept(found: list[Tensor], diagonals: Tensor | None) -> list[Tensor]:
    """Squares in memory without padding, and with their diagonals where these were left out: what `Health` keeps."""
    dense = [square.contiguous() for square in found]
    if diagonals is not None:
        for square, diagonal in zip(dense, diagonals, strict=True):
            square.diagonal().copy_(diagonal)
    return dense
