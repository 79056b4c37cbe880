"""Kernels of the head-fused cross-entropy, which prototype_head_cross_entropy.py launches in this order.

`attend_kernel`: a row's attention to the prototypes, in parts; `views_kernel`: the parts joined, and an image's views
paired; `prototypes_kernel`: the prototypes' gradient, by programs that own prototypes.
"""

import triton
import triton.language as tl

from .. import launch

RISE = tl.constexpr(4.0)  # how far a row's logits may be above its pivot: e ** 4 times 1024 is a number of float16


@triton.jit
def _load(x, first, N, D: tl.constexpr, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from `first`, columns from `start` of a dense [N, D]; zeros outside. Offsets within a tile are int32."""
    row = tl.arange(0, ROWS)
    column = start + tl.arange(0, BLOCK)
    mask = (row < N - first)[:, None]
    if D % BLOCK != 0:
        mask = mask & (column < D)[None, :]
    return tl.load(x + launch.row_start(first, D, 1) + (row[:, None] * D + column[None, :]), mask, 0)


@triton.jit
def _add_product(
    s, a, b, first_a, first_b, N, M, D: tl.constexpr, start, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    right = tl.trans(_load(b, first_b, M, D, start, BN, BLOCK_D))
    return s + tl.dot(_load(a, first_a, N, D, start, BM, BLOCK_D), right, input_precision="tf32x3", out_dtype=COMPUTE)


@triton.jit
def _logits(
    a, b_a, b, b_b, first_a, first_b, N, M, D: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: `a @ b.T` of rows from first_a and first_b on; b_a and b_b are their first BLOCK_D columns.

    KEEP: the loop is written out, so that the compiler reads all of a's columns once, before the walk over b, and keeps
    them in shared memory.
    """
    s = tl.dot(b_a, tl.trans(b_b), input_precision="tf32x3", out_dtype=COMPUTE)
    if KEEP:
        for start in tl.static_range(BLOCK_D, D, BLOCK_D):
            s = _add_product(s, a, b, first_a, first_b, N, M, D, start, COMPUTE, BLOCK_D, BM, BN)
    else:
        for start in tl.range(BLOCK_D, D, BLOCK_D):
            s = _add_product(s, a, b, first_a, first_b, N, M, D, start, COMPUTE, BLOCK_D, BM, BN)
    return s


@triton.jit(do_not_specialize=["N", "blocks_of_part"])
def attend_kernel(
    x,  # [V, N, D]
    keys,  # [K, D]
    values,  # [K, D]; None: the keys
    bias,  # [V, K], or None
    lse,  # [parts, V, N]: a row's logsumexp over a part of the prototypes
    means,  # [parts, V, N, D]: its softmax over that part, times their values; or None
    N,
    K,
    D: tl.constexpr,
    blocks_of_part,  # how many blocks of prototypes a part has
    scale_value: tl.float64,  # 1 / temperature
    GAIN: tl.constexpr,  # see launch.gain
    COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,  # of the columns of means: a program makes one of them
    KEEP: tl.constexpr,  # see _logits
    STAYS: tl.constexpr,  # a row's pivot, unless a logit is RISE above it
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_part = tl.program_id(1) // CHUNKS
    i_chunk = tl.program_id(1) % CHUNKS
    i_view = tl.program_id(2)
    first = tl.program_id(0) * BM
    i_row = first + tl.arange(0, BM)
    x += launch.row_start(i_view, N, 1) * D
    if bias is not None:
        bias += launch.row_start(i_view, K, 1)
    b_x = _load(x, first, N, D, 0, BM, BLOCK_D)
    scale = tl.full((), scale_value, COMPUTE)
    pivot = launch.finite(tl.full([BM], -float("inf"), COMPUTE))
    total = tl.zeros([BM], COMPUTE)
    if means is not None:
        acc = tl.zeros([BM, BLOCK_D], COMPUTE)
        rounded = tl.zeros([BM], COMPUTE)  # the sum of the weights as rounded for the product: means stay averages
    for block in range(i_part * blocks_of_part, min((i_part + 1) * blocks_of_part, tl.cdiv(K, BN))):
        first_key = block * BN
        i_key = first_key + tl.arange(0, BN)
        b_keys = _load(keys, first_key, K, D, 0, BN, BLOCK_D)
        v = _logits(x, b_x, keys, b_keys, first, first_key, N, K, D, COMPUTE, BLOCK_D, KEEP, BM, BN) * scale
        if bias is not None:
            v += tl.load(bias + i_key, i_key < K, -float("inf"))[None, :]
        else:
            ends = True
            if STAYS:
                ends = K - first_key < BN
            if ends:
                v = tl.where((i_key < K)[None, :], v, -float("inf"))
        if STAYS:
            above = v - pivot[:, None]
            if tl.max(above) > RISE:
                new = launch.finite(tl.maximum(pivot, tl.max(v, 1)))
                fade = tl.exp(pivot - new)
                total *= fade
                if means is not None:
                    rounded *= fade
                    acc *= fade[:, None]
                pivot = new
                above = v - pivot[:, None]
            e = tl.exp(above)
            total += tl.sum(e, 1)
        else:
            new = launch.finite(tl.maximum(pivot, tl.max(v, 1)))
            fade = tl.exp(pivot - new)
            e = tl.exp(v - new[:, None])
            total = total * fade + tl.sum(e, 1)
            pivot = new
        if means is not None:
            b_values = b_keys
            if values is not None:
                b_values = _load(values, first_key, K, D, i_chunk * BLOCK_D, BN, BLOCK_D)
            elif CHUNKS > 1:
                b_values = _load(keys, first_key, K, D, i_chunk * BLOCK_D, BN, BLOCK_D)
            p = (e * GAIN).to(b_values.dtype)
            if STAYS:
                rounded += tl.sum(p.to(COMPUTE), 1)
                acc = tl.dot(p, b_values, acc, input_precision="tf32x3", out_dtype=COMPUTE)
            else:  # in this order, as small chips spill in another
                rounded = rounded * fade + tl.sum(p.to(COMPUTE), 1)  # pyright: ignore[reportOperatorIssue]
                acc = tl.dot(p, b_values, acc * fade[:, None], input_precision="tf32x3", out_dtype=COMPUTE)
    at = (i_part.to(tl.int64) * tl.num_programs(2) + i_view) * N + i_row
    if i_chunk == 0:
        tl.store(lse + at, pivot + tl.log(total), i_row < N)
    if means is not None:
        column = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (i_row < N)[:, None] & (column < D)[None, :]
        acc /= tl.where(rounded == 0, 1.0, rounded)[:, None]
        tl.store(means + (at * D)[:, None] + column[None, :], acc, mask)


@triton.jit
def _join_lse(lse, i_row, rows, parts, COMPUTE: tl.constexpr):
    """A row's logsumexp from those of its parts, [parts, rows]; NaN where it is infinite."""
    maximum = tl.full((), -float("inf"), COMPUTE)
    total = tl.zeros((), COMPUTE)
    for part in range(parts):
        b_lse = tl.load(lse + launch.row_start(part, rows, 1) + i_row)
        new = tl.maximum(maximum, b_lse)
        shift = launch.finite(new)
        total = total * tl.exp(launch.finite(maximum) - shift) + tl.exp(b_lse - shift)
        maximum = new
    return launch.no_softmax(launch.finite(maximum) + tl.log(total))


@triton.jit
def _join_means(means, lse, row_lse, i_row, rows, parts, D, column, inside, out):
    """`out` plus a block of a row's mean, from those of its parts, [parts, rows, D]."""
    for part in range(parts):
        at = launch.row_start(part, rows, 1) + i_row
        out += tl.load(means + at * D + column, inside, 0) * tl.exp(tl.load(lse + at) - row_lse)
    return out


@triton.jit
def _pairs(s, t, PAIRS: tl.constexpr):
    """Whether student view s is paired with teacher view t; both are known only as the kernel runs."""
    return (PAIRS == 2) | ((t == s) == (PAIRS == 1))


@triton.jit
def _mass(s, T: tl.constexpr, PAIRS: tl.constexpr, COMPUTE: tl.constexpr):
    """With how many teacher views student view s is paired."""
    mass = tl.zeros((), COMPUTE)
    for t in tl.static_range(T):
        mass += tl.where(_pairs(s, t, PAIRS), 1.0, 0.0)
    return mass


@triton.jit(do_not_specialize=["B", "student_parts", "teacher_parts"])
def views_kernel(
    x,  # [S, B, D]
    student_part_lse,  # [student_parts, S, B], of attend_kernel
    student_means,  # [student_parts, S, B, D], or None
    teacher_part_lse,  # [teacher_parts, T, B]
    teacher_means,  # [teacher_parts, T, B, D]
    weights,  # [B], or None
    student_lse,  # [S, B]
    teacher_lse,  # [T, B]
    masses,  # [S, B]: the weight of a row, times the teacher views it is paired with
    paired,  # [T, B, D]: the weighted sum of the student's rows that a teacher's row is paired with, or None
    gradient,  # [S, B, D], or None
    losses,  # [B]
    B,
    D,
    student_parts,
    teacher_parts,
    student_scale: tl.float64,
    S: tl.constexpr,
    T: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)  # an image; its views are looped over, as ten of them unrolled are more than registers hold
    weight = tl.full((), 1.0, COMPUTE)
    if weights is not None:
        weight = tl.load(weights + i)
    loss = tl.zeros((), COMPUTE)
    for t in tl.static_range(T):
        tl.store(teacher_lse + t * B + i, _join_lse(teacher_part_lse, t * B + i, T * B, teacher_parts, COMPUTE))
    for s in range(S):
        row_lse = _join_lse(student_part_lse, s * B + i, S * B, student_parts, COMPUTE)
        mass = _mass(s, T, PAIRS, COMPUTE)
        tl.store(student_lse + s * B + i, row_lse)
        tl.store(masses + s * B + i, weight * mass)
        loss += mass * row_lse
    tl.debug_barrier()  # what was stored is loaded below
    scale = tl.full((), student_scale, COMPUTE)
    b_dot = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        zeros = tl.zeros([BLOCK], COMPUTE)
        for s in range(S):
            at = (tl.cast(s * B + i, tl.int64)) * D + column
            y = zeros
            mass = _mass(s, T, PAIRS, COMPUTE)
            for t in tl.static_range(T):
                y = _join_means(
                    teacher_means, teacher_part_lse, tl.load(teacher_lse + t * B + i), t * B + i, T * B,
                    teacher_parts, D, column, inside & _pairs(s, t, PAIRS), y,
                )  # fmt: skip
            b_dot += y * tl.load(x + at, inside, 0).to(COMPUTE)
            if gradient is not None:
                u = _join_means(
                    student_means, student_part_lse, tl.load(student_lse + s * B + i), s * B + i, S * B,
                    student_parts, D, column, inside, zeros,
                )  # fmt: skip
                tl.store(gradient + at, (mass * u - y) * weight, inside)
        if paired is not None:
            for t in tl.static_range(T):
                b_sum = zeros
                for s in range(S):
                    at = (tl.cast(s * B + i, tl.int64)) * D + column
                    b_sum += tl.load(x + at, inside & _pairs(s, t, PAIRS), 0).to(COMPUTE)
                tl.store(paired + (tl.cast(t * B + i, tl.int64)) * D + column, b_sum * weight, inside)
    tl.store(losses + i, (loss - tl.sum(b_dot, 0) * scale) * weight)


@triton.jit
def _add_rows(
    acc, prototypes, b_prototypes, first, x, y, lse, factors, b_bias, begin, end, rows, K, D: tl.constexpr, i_chunk,
    scale, SIGN: tl.constexpr, GAIN: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`acc += SIGN * (factors * softmax(x @ prototypes.T * scale + bias)).T @ y` over blocks begin .. end of rows.

    y None: x. Each row's softmax comes from its lse, the bias is one number for each prototype.
    """
    for block in range(begin, end):
        first_row = block * BN
        i_row = first_row + tl.arange(0, BN)
        b_x = _load(x, first_row, rows, D, 0, BN, BLOCK_D)
        v = (
            _logits(prototypes, b_prototypes, x, b_x, first, first_row, K, rows, D, COMPUTE, BLOCK_D, KEEP, BM, BN)
            * scale
        )
        if b_bias is not None:
            v += b_bias[:, None]
        g = tl.exp(v - tl.load(lse + i_row, i_row < rows, float("inf"))[None, :])
        if factors is not None:
            g *= tl.load(factors + i_row, i_row < rows, 0)[None, :]
        b_y = b_x
        if y is not None:
            b_y = _load(y, first_row, rows, D, i_chunk * BLOCK_D, BN, BLOCK_D)
        elif CHUNKS > 1:
            b_y = _load(x, first_row, rows, D, i_chunk * BLOCK_D, BN, BLOCK_D)
        acc = tl.dot((g * (SIGN * GAIN)).to(b_y.dtype), b_y, acc, input_precision="tf32x3", out_dtype=COMPUTE)
    return acc


@triton.jit(do_not_specialize=["B"])
def prototypes_kernel(
    x,  # [S, B, D]
    prototypes,  # [K, D]
    student_lse,  # [S, B]
    masses,  # [S, B]
    teacher,  # [T, B, D]
    teacher_prototypes,  # [K, D]
    bias,  # [views, K], or None
    teacher_lse,  # [T, B]
    paired,  # [T, B, D]
    gradient,  # [parts, K, D]
    B,
    K,
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    D: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    VIEWS: tl.constexpr,  # T where each teacher view has a bias of its own, otherwise 1
    GAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,  # of the gradient's columns: a program makes one of them
    KEEP: tl.constexpr,  # see _logits
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_part = tl.program_id(1) // CHUNKS
    i_chunk = tl.program_id(1) % CHUNKS
    parts = tl.num_programs(1) // CHUNKS
    first = tl.program_id(0) * BM
    i_prototype = first + tl.arange(0, BM)
    acc = tl.zeros([BM, BLOCK_D], COMPUTE)
    blocks = tl.cdiv(S * B, BN)
    acc = _add_rows(
        acc, prototypes, _load(prototypes, first, K, D, 0, BM, BLOCK_D), first, x, None, student_lse, masses, None,
        blocks * i_part // parts, blocks * (i_part + 1) // parts, S * B, K, D, i_chunk,
        tl.full((), student_scale, COMPUTE), 1, GAIN, COMPUTE, BLOCK_D, CHUNKS, KEEP, BM, BN,
    )  # fmt: skip
    rows = T * B // VIEWS
    blocks = tl.cdiv(rows, BN)
    b_prototypes = _load(teacher_prototypes, first, K, D, 0, BM, BLOCK_D)
    for view in range(VIEWS):
        b_bias = None
        if bias is not None:
            b_bias = tl.load(bias + launch.row_start(view, K, 1) + i_prototype, i_prototype < K, 0)
        row = launch.row_start(view, rows, 1)
        acc = _add_rows(
            acc, teacher_prototypes, b_prototypes, first, teacher + row * D, paired + row * D, teacher_lse + row, None,
            b_bias, blocks * i_part // parts, blocks * (i_part + 1) // parts, rows, K, D, i_chunk,
            tl.full((), teacher_scale, COMPUTE), -1, GAIN, COMPUTE, BLOCK_D, CHUNKS, KEEP, BM, BN,
        )  # fmt: skip
    column = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (i_prototype < K)[:, None] & (column < D)[None, :]
    out = launch.row_start(i_part, K, 1) + i_prototype
    tl.store(gradient + (out * D)[:, None] + column[None, :], acc / GAIN, mask)
