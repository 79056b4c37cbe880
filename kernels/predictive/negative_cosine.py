"""`-torch.nn.functional.cosine_similarity(p, z, dim=1, eps=eps).mean()` and both gradients, unscaled, in one pass.

The gradient for p is `(cos p/|p| - z/|z|) / |p|`, that is, p and z times one number each in a row; without the part
along p where eps stands for the norm. Gradients have their 1 / N already, but in float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows
from . import reference


@triton.jit
def _coefficients(pp, zz, pz, eps, factor):
    """From <p, p>, <z, z> and <p, z> of rows: the cosine, and the gradients' coefficients (across, p_along, z_along).

    The gradient for p, times the factor, is `across * z + p_along * p`, that for z `across * p + z_along * z`.
    """
    eps = tl.full((), eps, pp.dtype)  # a bare number would be float32 first
    factor = tl.full((), factor, pp.dtype)
    p_norm = tl.sqrt(pp)
    z_norm = tl.sqrt(zz)
    p_over = 1 / tl.maximum(p_norm, eps, propagate_nan=tl.PropagateNan.ALL)
    z_over = 1 / tl.maximum(z_norm, eps, propagate_nan=tl.PropagateNan.ALL)
    cosine = pz * p_over * z_over
    across = -p_over * z_over * factor
    p_along = tl.where(p_norm > eps, cosine * p_over * p_over * factor, 0.0)
    z_along = tl.where(z_norm > eps, cosine * z_over * z_over * factor, 0.0)
    return cosine, across, p_along, z_along


@triton.jit(do_not_specialize=["N"])
def _negative_cosine_kernel(
    p,  # [N, D], rows s_p * ALIGN apart
    z,  # [N, D], rows s_z * ALIGN apart
    p_gradient,  # [N, D] contiguous, or None
    z_gradient,  # [N, D] contiguous, or None
    sums,  # [programs], the losses of a program's rows
    N,
    D,  # / ALIGN
    s_p,  # / ALIGN
    s_z,  # / ALIGN
    eps: tl.float64,
    factor: tl.float64,  # of the gradients
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= D * ALIGN
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)[None, :]
    inside = i_row < N
    mask = inside[:, None] & (column < D * ALIGN)
    b_p = tl.load(p + launch.row_start(i_row, s_p, ALIGN)[:, None] + column, mask, 0).to(COMPUTE)  # [ROWS, BLOCK]
    b_z = tl.load(z + launch.row_start(i_row, s_z, ALIGN)[:, None] + column, mask, 0).to(COMPUTE)
    cosine, across, p_along, z_along = _coefficients(
        tl.sum(b_p * b_p, 1), tl.sum(b_z * b_z, 1), tl.sum(b_p * b_z, 1), eps, factor
    )
    tl.store(sums + tl.program_id(0), -tl.sum(cosine, 0))
    out = launch.row_start(i_row, D, ALIGN)[:, None] + column
    if p_gradient is not None:
        tl.store(p_gradient + out, across[:, None] * b_z + p_along[:, None] * b_p, mask)
    if z_gradient is not None:
        tl.store(z_gradient + out, across[:, None] * b_p + z_along[:, None] * b_z, mask)


@triton.jit
def _negative_cosine_long_kernel(
    p,  # [N, D], rows s_p * ALIGN apart
    z,  # [N, D], rows s_z * ALIGN apart
    p_gradient,  # [N, D] contiguous, or None
    z_gradient,  # [N, D] contiguous, or None
    sums,  # [N]
    D,  # / ALIGN
    s_p,  # / ALIGN
    s_z,  # / ALIGN
    eps: tl.float64,
    factor: tl.float64,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    p += launch.row_start(i_row, s_p, ALIGN)
    z += launch.row_start(i_row, s_z, ALIGN)
    pp = tl.zeros([BLOCK], COMPUTE)
    zz = tl.zeros([BLOCK], COMPUTE)
    pz = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, D * ALIGN, BLOCK, num_stages=STAGES):
        mask = column < D * ALIGN - i
        b_p = tl.load(p + i + column, mask, 0).to(COMPUTE)
        b_z = tl.load(z + i + column, mask, 0).to(COMPUTE)
        pp += b_p * b_p
        zz += b_z * b_z
        pz += b_p * b_z
    cosine, across, p_along, z_along = _coefficients(tl.sum(pp, 0), tl.sum(zz, 0), tl.sum(pz, 0), eps, factor)
    tl.store(sums + i_row, -cosine)
    start = launch.row_start(i_row, D, ALIGN)
    if p_gradient is not None or z_gradient is not None:
        for i in tl.range(0, D * ALIGN, BLOCK, num_stages=STAGES):
            mask = column < D * ALIGN - i
            b_p = tl.load(p + i + column, mask, 0).to(COMPUTE)
            b_z = tl.load(z + i + column, mask, 0).to(COMPUTE)
            if p_gradient is not None:
                tl.store(p_gradient + start + i + column, across * b_z + p_along * b_p, mask)
            if z_gradient is not None:
                tl.store(z_gradient + start + i + column, across * b_p + z_along * b_z, mask)


def negative_cosine(
    p: Tensor,  # [N, D]
    z: Tensor,  # [N, D]
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if p.dtype not in launch.DTYPES or z.dtype not in launch.DTYPES:
        return reference.negative_cosine(p, z, eps, wanted)
    n, d = p.shape
    p = dense_rows(p)
    z = dense_rows(z)
    compute = compute_dtype(p.dtype, z.dtype)
    gradients = [
        torch.empty((n, d), dtype=x.dtype, device=x.device) if w else None for x, w in zip((p, z), wanted, strict=True)
    ]
    align = launch.alignment(p, z)
    tile = tiling.negative_cosine(d, compute)
    programs = n if tile is None else triton.cdiv(n, tile["ROWS"])
    sums = torch.empty(programs, dtype=compute, device=p.device)
    scale = 1 / n
    in_kernel = 1.0 if torch.float16 in (p.dtype, z.dtype) else scale
    launch.launch(
        _negative_cosine_long_kernel if tile is None else _negative_cosine_kernel,
        (programs,),
        p,
        z,
        *gradients,
        sums,
        *([] if tile is None else [n]),
        d // align,
        p.stride(0) // align,
        z.stride(0) // align,
        COMPUTE=launch.DTYPES[compute],
        eps=float(eps),
        factor=in_kernel,
        ALIGN=align,
        **(tile or tiling.negative_cosine_long(compute)),
        device_of=p,
    )
    loss, left = launch.total(sums, scale, scale / in_kernel)
    return loss, [x.new_empty(0) if g is None else g for g, x in zip(gradients, (p, z), strict=True)], left
