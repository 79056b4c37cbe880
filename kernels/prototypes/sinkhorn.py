"""Sinkhorn in the log domain. The scores are only read; what changes are the prototypes' potentials f, float64 [K].

The first iteration sums prototypes over samples with running maxima. In each further one a sample's softmax of
`scores / epsilon + f` is normalised already, so prototypes are plain sums of it, which can't underflow: after the
iteration before, every prototype has a sample with exp(s / epsilon + f - lse) >= 1 / (B K). Up to 8192 prototypes a
row stays in registers between its two uses: 4 reads for 3 iterations and the codes. Wider rows are read twice, but in
the first iteration: 7 reads. `sinkhorn_step` takes any bias, so it keeps running maxima and reads twice.

Columns are summed by programs into partial sums, which one program a column block adds in a fixed order. Several
problems (scores [P, N, K]) are more programs of the same launches. A batch may come in several tensors: each has
launches of its own, which write their partial sums beside one another, and the join is one for all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows
from . import reference
from .row_logsumexp import biased, dense, row_logsumexp, two_parts
from .row_softmax import exponentials, load_biases, load_rows, store_rows


@triton.jit(do_not_specialize=["N", "parts", "all_parts", "first_part", "s_problem"])
def _column_logsumexp_kernel(
    x,  # [P, N, K], rows s_row * ALIGN apart
    bias,  # [P, K] float64, or None
    offsets,  # [P, N], subtracted from rows; None where bias is None
    rows,  # 0-dim int64, how many of the first rows count; None: all
    maxima,  # [P, all_parts, K]
    sums,  # [P, all_parts, K]
    N,
    K,  # / ALIGN
    parts,
    all_parts,  # those of other tensors, too
    first_part,  # of them
    s_problem,  # / ALIGN
    s_row,  # / ALIGN
    scale: tl.float64,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # rows at a time
    BLOCK: tl.constexpr,
):
    """Logsumexps over a part of the rows of `x * scale + bias - offset`.

    Without bias the maxima are those of x itself, unscaled: they are exact.
    """
    blocks = tl.cdiv(K * ALIGN, BLOCK)
    i_part = tl.program_id(0) // blocks  # of all problems' parts
    problem = i_part // parts
    part = i_part % parts
    x += launch.row_start(problem, s_problem, ALIGN)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < K * ALIGN
    high, low = two_parts(scale, COMPUTE)
    per_unit = high if bias is None else tl.full((), 1.0, COMPUTE)  # of v, whose maxima are kept
    maximum = tl.full([BLOCK], -float("inf"), COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    counted = N if rows is None else tl.load(rows)
    if bias is not None:
        b_bias = tl.load(bias + launch.row_start(problem, K, ALIGN) + column, inside, 0)[None, :]
        # It is taken off again in _join_kernel, so an infinite one may be any number here.
        b_bias = tl.where(tl.abs(b_bias) == float("inf"), 0.0, b_bias)
    for i in range(0, PART, ROWS):
        i_row = part * PART + i + tl.arange(0, ROWS)
        live = (i_row < N) & (i_row < counted)
        mask = live[:, None] & inside[None, :]
        start = launch.row_start(i_row, s_row, ALIGN)
        v = tl.load(x + start[:, None] + column[None, :], mask, -float("inf")).to(COMPUTE)  # [ROWS, BLOCK]
        if bias is not None:
            v = biased(v, b_bias, high, low, COMPUTE) - tl.load(offsets + problem * N + i_row, live, 0)[:, None]
        new = tl.maximum(maximum, tl.max(v, 0))
        shift = launch.finite(new)
        fade = tl.exp((launch.finite(maximum) - shift) * per_unit)
        total = total * fade + tl.sum(tl.exp((v - shift[None, :]) * per_unit), 0)
        maximum = new
    out = launch.row_start(problem * all_parts + first_part + part, K, ALIGN) + column
    tl.store(maxima + out, maximum, inside)
    tl.store(sums + out, total, inside)


@triton.jit(do_not_specialize=["N", "parts", "all_parts", "first_part", "per_program", "s_problem"])
def _softmax_sums_kernel(
    x,  # [P, N, K], rows s_row * ALIGN apart
    bias,  # [P, K] float64
    rows,  # 0-dim int64, how many of the first rows count; None: all
    sums,  # [P, all_parts, K]
    N,
    K,  # / ALIGN
    parts,  # of a problem, a program each
    all_parts,  # those of other tensors, too
    first_part,  # of them
    s_problem,  # / ALIGN
    s_row,  # / ALIGN
    per_program,  # rows, a multiple of ROWS
    scale: tl.float64,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a row; where they are more than one, ROWS is 1
    STAGES: tl.constexpr,
):
    """Sums over rows of `softmax(x * scale + bias, 1)`, each row read once."""
    problem = tl.program_id(0) // parts
    x += launch.row_start(problem, s_problem, ALIGN)
    bias += launch.row_start(problem, K, ALIGN)
    biases = load_biases(bias, K * ALIGN, BLOCK, BLOCKS)
    high, low = two_parts(scale, COMPUTE)
    acc = tl.zeros([ROWS, BLOCK], COMPUTE)
    acc1 = acc
    acc2 = acc
    counted = N if rows is None else tl.minimum(tl.load(rows), N).to(tl.int32)
    part = tl.program_id(0) % parts
    first = part * per_program
    for i in tl.range(first, tl.minimum(first + per_program, counted), ROWS, num_stages=STAGES):
        i_row = i + tl.arange(0, ROWS)
        live = (i_row < counted)[:, None]
        b_x = load_rows(x + launch.row_start(i_row, s_row, ALIGN)[:, None], live, K * ALIGN, BLOCK, BLOCKS)
        e, over = exponentials(b_x, biases, high, low, COMPUTE, BLOCKS)
        acc += e[0] * over if ROWS == 1 else tl.where(live, e[0] * over, 0.0)
        if BLOCKS > 1:
            acc1 += e[1] * over
            acc2 += e[2] * over
    of_blocks = tl.sum(acc, 0, True), tl.sum(acc1, 0, True), tl.sum(acc2, 0, True)
    out = launch.row_start(problem * all_parts + first_part + part, K, ALIGN)
    store_rows(sums + out, of_blocks, True, K * ALIGN, BLOCK, BLOCKS)


@triton.jit(do_not_specialize=["parts"])
def _join_kernel(
    maxima,  # [P, parts, K]; None: all 0
    sums,  # [P, parts, K], of exp(v - maximum)
    bias,  # [P, K] float64, or None
    out,  # [P, K]: bias - the logsumexp of all parts
    parts,
    K,
    scale: tl.float64,  # what maxima are multiplied by
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK)
    problem = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    of_problem = launch.row_start(problem, K, 1) + column
    per_unit = tl.full((), scale, tl.float64)
    maximum = tl.full([BLOCK], 0.0 if maxima is None else -float("inf"), tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, parts):
        start = launch.row_start(problem * parts + i, K, 1)
        b_sum = tl.load(sums + start + column, inside, 0).to(tl.float64)
        if maxima is None:
            total += b_sum
        else:
            b_maximum = tl.load(maxima + start + column, inside, -float("inf")).to(tl.float64)
            new = tl.maximum(maximum, b_maximum)
            shift = launch.finite(new)
            fade = tl.exp((launch.finite(maximum) - shift) * per_unit)
            total = total * fade + b_sum * tl.exp((launch.finite(b_maximum) - shift) * per_unit)
            maximum = new
    f = -(launch.finite(maximum) * per_unit + tl.log(total))
    if bias is not None:
        b_bias = tl.load(bias + of_problem, inside, 0)
        f += tl.where(tl.abs(b_bias) == float("inf"), 0.0, b_bias)
    tl.store(out + of_problem, f, inside)


@triton.jit(do_not_specialize=["N", "s_problem"])
def _codes_kernel(
    x,  # [P, N, K], rows s_row * ALIGN apart
    bias,  # [P, K] float64
    row_lse,  # [P, N]; None: a row is one block
    codes,  # [P, N, K] contiguous
    N,
    K,  # / ALIGN
    s_problem,  # / ALIGN
    s_row,  # / ALIGN
    scale: tl.float64,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a row, a program's; with row_lse one of them is
):
    blocks = 1 if row_lse is None else tl.cdiv(K * ALIGN, BLOCK)
    i_rows = tl.program_id(0) // blocks
    problem = i_rows // tl.cdiv(N, ROWS)
    i_row = i_rows % tl.cdiv(N, ROWS) * ROWS + tl.arange(0, ROWS)
    x += launch.row_start(problem, s_problem, ALIGN)
    bias += launch.row_start(problem, K, ALIGN)
    x += launch.row_start(i_row, s_row, ALIGN)[:, None]
    # N K of all problems may pass 2^31, their rows not
    codes += launch.row_start(problem * N + i_row, K, ALIGN)[:, None]
    live = (i_row < N)[:, None]
    high, low = two_parts(scale, COMPUTE)
    if row_lse is None:
        b_x = load_rows(x, live, K * ALIGN, BLOCK, BLOCKS)
        e, over = exponentials(b_x, load_biases(bias, K * ALIGN, BLOCK, BLOCKS), high, low, COMPUTE, BLOCKS)
        p = (e[0] * over, e[1] * over, e[2] * over)
        store_rows(codes, p, live, K * ALIGN, BLOCK, BLOCKS)
    else:
        column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = column < K * ALIGN
        v = biased(tl.load(x + column, live & inside, 0), tl.load(bias + column, inside, 0), high, low, COMPUTE)
        p = tl.exp(v - tl.load(row_lse + problem * N + i_row, i_row < N, 0)[:, None])
        tl.store(codes + column, p, live & inside)


def _constants(scores: Tensor, epsilon: float, compute: torch.dtype) -> dict:
    return {"scale": 1 / epsilon, "COMPUTE": launch.DTYPES[compute], "ALIGN": launch.alignment(scores)}


def _compute(tensors: list[Tensor]) -> torch.dtype:
    return compute_dtype(*(scores.dtype for scores in tensors))


def _join(
    maxima: Tensor | None, sums: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[P, K]: the next potentials."""
    problems, parts, k = sums.shape
    tile = tiling.sinkhorn_join()
    out = torch.empty(problems, k, dtype=dtype, device=sums.device)
    grid = (problems * triton.cdiv(k, tile["BLOCK"]),)
    launch.launch(_join_kernel, grid, maxima, sums, bias, out, parts, k, float(scale), **tile, device_of=sums)
    return out


def _step(
    tensors: list[Tensor],  # [P, N, K] each, of one batch
    bias: Tensor | None,
    epsilon: float,
    rows: Tensor | None = None,
    log_floors: Tensor | None = None,  # [P, N]
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[P, K]: the next potentials, whatever bias they follow."""
    problems, _, k = tensors[0].shape
    device = tensors[0].device
    compute = _compute(tensors)
    tile = tiling.column_logsumexp(k, compute)
    parts = [triton.cdiv(scores.shape[1], tile["PART"]) for scores in tensors]
    maxima, sums = (torch.empty((problems, sum(parts), k), dtype=compute, device=device) for _ in range(2))
    for i, scores in enumerate(tensors):
        n = scores.shape[1]
        constants = _constants(scores, epsilon, compute)
        offsets = None
        if bias is not None:
            offsets = torch.empty(problems, n, dtype=compute, device=device)
            row_logsumexp(scores, bias, 1 / epsilon, offsets, softmax=False)
            if log_floors is not None:
                offsets = torch.logaddexp(offsets, log_floors.to(compute))
        align = constants["ALIGN"]
        launch.launch(
            _column_logsumexp_kernel,
            (triton.cdiv(k, tile["BLOCK"]) * problems * parts[i],),
            scores,
            bias,
            offsets,
            rows,
            maxima,
            sums,
            n,
            k // align,
            parts[i],
            sum(parts),
            sum(parts[:i]),
            scores.stride(0) // align,
            scores.stride(1) // align,
            **constants,
            **tile,
            device_of=scores,
        )
    return _join(maxima, sums, bias, 1 / epsilon if bias is None else 1.0, dtype)


def _balanced_step(
    tensors: list[Tensor], bias: Tensor, epsilon: float, rows: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[P, K]: the next potentials after those of an iteration, in one read where a row fits in registers."""
    problems, _, k = tensors[0].shape
    compute = _compute(tensors)
    tile = tiling.sinkhorn_rows(k, compute)
    if tile is None:
        return _step(tensors, bias, epsilon, rows, dtype=dtype)
    most = max(1, tiling.PROGRAMS // problems)
    per_program = [triton.cdiv(triton.cdiv(x.shape[1], tile["ROWS"]), most) * tile["ROWS"] for x in tensors]
    parts = [triton.cdiv(x.shape[1], of_one) for x, of_one in zip(tensors, per_program, strict=True)]
    sums = torch.empty((problems, sum(parts), k), dtype=compute, device=tensors[0].device)
    for i, scores in enumerate(tensors):
        constants = _constants(scores, epsilon, compute)
        align = constants["ALIGN"]
        launch.launch(
            _softmax_sums_kernel,
            (problems * parts[i],),
            scores,
            bias,
            rows,
            sums,
            scores.shape[1],
            k // align,
            parts[i],
            len(sums[0]),
            sum(parts[:i]),
            scores.stride(0) // align,
            scores.stride(1) // align,
            per_program[i],
            STAGES=3,
            **constants,
            **tile,
            device_of=scores,
        )
    return _join(None, sums, bias, 1.0, dtype)


def _bias(
    tensors: list[Tensor],
    epsilon: float,
    iterations: int,
    normalize_samples_first: bool,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`reference.sinkhorn_bias` [P, K] of scores [P, N, K]; until the last iteration in float64."""
    of_all = tensors[0].shape[0], tensors[0].shape[2]
    zeros = torch.zeros(of_all, dtype=torch.float64, device=tensors[0].device) if normalize_samples_first else None
    last = iterations - 1
    bias = _step(tensors, zeros, epsilon, rows, dtype=torch.float64 if last else dtype)
    for i in range(1, iterations):
        bias = _balanced_step(tensors, bias, epsilon, rows, dtype if i == last else torch.float64)
    return bias


def _problems(scores: Tensor) -> Tensor:
    """[P, N, K] with dense rows."""
    return dense_rows(scores if scores.dim() == 3 else scores[None])


def _of_prototypes(scores: Tensor) -> tuple[int, ...]:
    """The shape of potentials, [K] or [P, K]."""
    return (*scores.shape[:-2], scores.shape[-1])


def sinkhorn_step(
    scores: Tensor,
    bias: Tensor | None,
    epsilon: float,
    rows: Tensor | None = None,
    log_floors: Tensor | None = None,
) -> Tensor:
    if scores.dtype not in launch.DTYPES:
        return reference.sinkhorn_step(scores, bias, epsilon, rows, log_floors)
    problems = _problems(scores)
    floors = None if log_floors is None else log_floors.reshape(problems.shape[:2]).contiguous()
    return _step([problems], dense(bias, torch.float64), epsilon, rows, floors).neg_().view(_of_prototypes(scores))


def sinkhorn_rows(scores: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    if scores.dtype not in launch.DTYPES:
        return reference.sinkhorn_rows(scores, bias, epsilon)
    problems = _problems(scores)
    out = torch.empty(problems.shape[:2], dtype=compute_dtype(scores.dtype), device=scores.device)
    row_logsumexp(problems, bias.to(torch.float64).contiguous(), 1 / epsilon, out, softmax=False)
    return out.to(torch.float64).view(scores.shape[:-1])


def sinkhorn_bias(
    scores: list[Tensor], epsilon: float, iterations: int, normalize_samples_first: bool, rows: Tensor | None = None
) -> Tensor:
    if any(x.dtype not in launch.DTYPES for x in scores):
        return reference.sinkhorn_bias(scores, epsilon, iterations, normalize_samples_first, rows)
    tensors = [_problems(x) for x in scores]
    bias = _bias(tensors, epsilon, iterations, normalize_samples_first, rows, _compute(tensors))
    return bias.view(_of_prototypes(scores[0]))


def sinkhorn_codes(scores: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    if scores.dtype not in launch.DTYPES or dtype not in launch.DTYPES:
        return reference.sinkhorn_codes(scores, bias, epsilon, dtype)
    shape = scores.shape
    scores = _problems(scores)
    problems, n, k = scores.shape
    bias = bias.to(torch.float64).contiguous()
    compute = compute_dtype(scores.dtype)
    row_lse = None
    tile = tiling.sinkhorn_rows(k, compute)
    if tile is None:
        tile = tiling.sinkhorn_codes()
        row_lse = torch.empty(problems, n, dtype=compute, device=scores.device)
        row_logsumexp(scores, bias, 1 / epsilon, row_lse, softmax=True)
    codes = torch.empty(shape, dtype=dtype, device=scores.device)
    constants = _constants(scores, epsilon, compute)
    align = constants["ALIGN"]
    blocks = 1 if row_lse is None else triton.cdiv(k, tile["BLOCK"])
    launch.launch(
        _codes_kernel, (blocks * problems * triton.cdiv(n, tile["ROWS"]),), scores, bias, row_lse, codes, n, k // align,
        scores.stride(0) // align, scores.stride(1) // align, **constants, **tile, device_of=scores,
    )  # fmt: skip
    return codes


def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool, dtype: torch.dtype
) -> Tensor:
    if scores.dtype not in launch.DTYPES or dtype not in launch.DTYPES:
        return reference.sinkhorn(scores, epsilon, iterations, normalize_samples_first, dtype)
    bias = _bias([_problems(scores)], epsilon, iterations, normalize_samples_first)
    return sinkhorn_codes(scores, bias, epsilon, dtype)
