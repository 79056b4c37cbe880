"""Triton functions on tiles of similarities, of which the kernels in sums.py and weights.py are made.

Pivots. A logit is `s * factor` of a similarity s. At temperature 0.01 a logit of 100 has lost 4e-6 in float32, and its
exponential as much of itself. So exponents are formed around a pivot, in units of similarities: with
`rate = factor * log2(e)`,

    exp(logit - pivot * factor) = exp2((s - pivot) * rate)

Near similarities subtract exactly, so an exponent's error is relative to its distance from the pivot, and not to the
logit. Where similarities are bounded, one pivot serves all rows. Otherwise it is running (RUNNING): while log-sum-exps
are summed, each row's largest similarity so far; in gradients, where `exp(logit - lse)` is wanted, the row's
`lse / factor` rounded to float32. What makes `exp(logit - lse)` of an exponential around either pivot is the row's
adjustment, see `rows.lse_states`.

Layout. Candidates' tiles are loaded as columns, [BLOCK_D, BN], so that the similarities' product transposes nothing;
the gradient's product takes the same tiles transposed, as attention's backward does.
"""

import triton
import triton.language as tl

from .. import launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(x, i_row, N, D, first_column, BLOCK: tl.constexpr):
    """Rows i_row, columns first_column .. first_column + BLOCK of a dense [N, D]: [rows, BLOCK]; zeros outside."""
    column = first_column + tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    return tl.load(x + launch.row_start(i_row, D, 1)[:, None] + column[None, :], mask, 0)


@triton.jit
def load_columns(x, i_row, N, D, first_column, BLOCK: tl.constexpr):
    """`load_rows(...).T`, loaded in that layout: [BLOCK, rows]."""
    column = first_column + tl.arange(0, BLOCK)
    mask = (column < D)[:, None] & (i_row < N)[None, :]
    return tl.load(x + launch.row_start(i_row, D, 1)[None, :] + column[:, None], mask, 0)


@triton.jit
def load_tile(x, first, M, D, BLOCK: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):
    """Rows first .. first + BN of a dense [M, D] as columns, [BLOCK, BN]; zeros outside. EVEN: D is BLOCK.

    Of the address only `first` changes from tile to tile, so that everything else stays outside of a loop.
    """
    width = BLOCK if EVEN else D
    row = tl.arange(0, BN)
    column = tl.arange(0, BLOCK)
    mask = (row < M - first)[None, :]
    if not EVEN:
        mask = mask & (column < D)[:, None]
    return tl.load(x + tl.cast(first, tl.int64) * width + ((row * width)[None, :] + column[:, None]), mask, 0)


@triton.jit
def tf32_high(x):
    """x rounded to the digits that TF32 has.

    Rounded and not cut off: the remainder `x - high` is half as large and has either sign, so that the products of two
    remainders, which nobody adds, cancel. Cut off, similarities were too small by 1e-7 of themselves.
    """
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def add_product(acc, acc_right, acc_left, left, right):
    """The product added to the first sum, in float32 what TF32 leaves of right and of left added to the others."""
    if left.dtype == tl.float32:
        left_high = tf32_high(left)
        right_high = tf32_high(right)
        acc = tl.dot(left_high, right_high, acc, input_precision="tf32")
        acc_right = tl.dot(left_high, right - right_high, acc_right, input_precision="tf32")
        acc_left = tl.dot(left - left_high, right_high, acc_left, input_precision="tf32")
    else:
        acc = tl.dot(left, right, acc, out_dtype=acc.dtype)
    return acc, acc_right, acc_left


@triton.jit
def with_remainders(acc, acc_right, acc_left):
    return acc + tl.where(tl.abs(acc) < float("inf"), acc_left + acc_right, 0.0)  # that of an infinity is NaN


@triton.jit
def similarities(a, b, b_a, i_a, i_b, N, M, D, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr):
    """`a[i_a] @ b[i_b].T`, [BM, BN] float32. WHOLE: a row is one block, and `b_a` holds the rows i_a already.

    A pair of rows gives the same bits whichever comes first, as a gradient needs the very similarity that its
    log-sum-exp was made of: at temperature 0.01 an asymmetric last digit doubles the error. Hence each of float32's
    three TF32 products has a sum of its own ("tf32x3" adds them in one order).
    """
    if WHOLE:
        return tl.dot(b_a, load_columns(b, i_b, M, D, 0, BLOCK_D))
    s = tl.zeros([i_a.shape[0], i_b.shape[0]], tl.float32)
    s_right = tl.zeros([i_a.shape[0], i_b.shape[0]], tl.float32)
    s_left = tl.zeros([i_a.shape[0], i_b.shape[0]], tl.float32)
    for column in range(0, D, BLOCK_D):
        left = load_rows(a, i_a, N, D, column, BLOCK_D)
        right = load_columns(b, i_b, M, D, column, BLOCK_D)
        s, s_right, s_left = add_product(s, s_right, s_left, left, right)
    if a.dtype.element_ty == tl.float32:
        s = with_remainders(s, s_right, s_left)
    return s


@triton.jit
def seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE: tl.constexpr):
    """[BM, BN]: which columns exist and don't show the row's own image (composed.OwnImage).

    i_a counts from row `first_row` of all rows.
    """
    seen = (i_a < N)[:, None] & (i_b < M)[None, :]
    if HAS_OWN_IMAGE:
        seen = seen & ((i_b % column_period)[None, :] != ((first_row + i_a) % row_period + offset)[:, None])
    return seen


@triton.jit
def in_class(a_classes, i_a, b_classes, i_b):
    """[BM, BN]: whether row and column are of one class. Memory goes on to whole tiles."""
    return tl.load(a_classes + i_a)[:, None] == tl.load(b_classes + i_b)[None, :]


@triton.jit
def images_of_block(first, row_period, offset, BM: tl.constexpr):
    """(low, high): the images of rows first .. first + BM, as columns name them, are in low .. high.

    Rows that go on with the next view's first image have images at both ends: everything, then.
    """
    image = first % row_period
    goes_on = image + BM > row_period
    low = tl.where(goes_on, -(1 << 30), image + offset)
    high = tl.where(goes_on, 1 << 30, image + offset + BM)
    return low, high


@triton.jit
def may_hide(first_b, M, low, high, column_period, HAS_OWN_IMAGE: tl.constexpr, BN: tl.constexpr):
    """Whether columns first_b .. first_b + BN may have one that isn't there or shows the own image of one of the rows.

    `low` and `high` are `images_of_block`. Most tiles have none, and their similarities need no look at one by one.
    """
    hides = first_b + BN > M
    if HAS_OWN_IMAGE:
        column = first_b % column_period
        hides = hides | ((column < high) & (column + BN > low)) | (column + BN > column_period)
    return hides


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for float32 e in [0, 1], to 1.3e-7 of itself; tl.log(1 + e) would lose what is below 1e-7.

    e times the polynomial that is nearest to log(1 + e) / e, whose own error is 5e-9 (Chebyshev's, by mpmath.chebyfit).
    """
    p = e * -0.003176057012751699 + 0.019542526453733444
    p = p * e - 0.056373611092567444
    p = p * e + 0.10543623566627502
    p = p * e - 0.1526966691017151
    p = p * e + 0.1966327428817749
    p = p * e - 0.24951615929603577
    p = p * e + 0.33329710364341736
    p = p * e - 0.49999892711639404
    return e * (p * e + 1.0)
