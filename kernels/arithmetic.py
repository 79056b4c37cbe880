"""What specifications and launchers share: the dtype to compute in, dense rows, rows of unit length."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

UNIT_EPS = 1e-12  # a shorter row is divided by this instead of its length, as in torch.nn.functional.normalize
WITHOUT_FLOAT64 = ("mps",)  # types of devices: Apple's GPUs


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where an input is float64, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def widen(x: Tensor) -> Tensor:
    """x in the dtype to compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype of floating-point numbers that the device has: float64, on Apple's MPS float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widest(x: Tensor) -> Tensor:
    """x in the `widest_dtype` of its device: for sums and differences that float32 alone would spoil."""
    return x.float() if x.device.type in WITHOUT_FLOAT64 else x.double()


def add_at(total: Tensor, index: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """A copy of `total` with values added at the places of an index, which may come more than once, in one order.

    index_put_ sorts on CUDA; on the CPU it adds float64 in the order of the index, but float32 by several threads in
    whatever order they come (index_add_ and scatter_add_ do that on CUDA).
    """
    return widest(total).index_put(index, widest(values), accumulate=True).to(total.dtype)


def solvable(x: Tensor) -> Tensor:
    """Matrices where torch has an eigensolver for them: MPS has none (torch 2.11), so that they go to the host."""
    return x.cpu() if x.device.type == "mps" else x


def without_diagonal(x: Tensor) -> Tensor:
    """[N, N] -> [N, N - 1]: each row without its own column. No mask: to index by one waits for a GPU."""
    n = x.shape[0]
    # Behind its first element the matrix is N - 1 rows of N + 1, whose last one goes.
    return x.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Within it torch multiplies float32 matrices on CUDA without TF32, whatever the user has allowed.

    PyTorch has two interfaces to that setting, and an error for whoever reads it by the older one (`allow_tf32`, which
    torch.compile's code reads) after it was changed by the newer one alone. So both are changed, and put back.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before != "tf32":
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()  # "high" or "medium"
    except RuntimeError:  # the user has chosen by the newer interface alone
        legacy = None
    if legacy is not None:
        torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        matmul.fp32_precision = before


def dense_rows(x: Tensor) -> Tensor:
    """[..., N, D] whose rows are dense, copied only where they aren't; the rows themselves may be anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def no_gradient(x: Tensor) -> Tensor:
    """An empty tensor: what an operator returns in place of a gradient for x that isn't wanted."""
    return x.new_empty(0)


def scalar_like(x: Tensor, value: float) -> Tensor:
    """0-dim, in the dtype to compute in for x."""
    return torch.full((), value, dtype=compute_dtype(x.dtype), device=x.device)


def unit_rows(x: Tensor, eps: float = UNIT_EPS) -> tuple[Tensor, Tensor]:
    """Rows [..., D] of unit length and what they were divided by, `max(||x||, eps)` [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return x / norm, norm


def through_unit_rows(gradient: Tensor, unit: Tensor, norm: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """The gradient for x, given that for its `unit_rows`: without its radial part, unless eps was the divisor."""
    radial = (gradient * unit).sum(-1, keepdim=True) * unit
    return (gradient - radial * (norm > eps)) / norm
