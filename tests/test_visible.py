"""What rows see of columns: the operators that options are made of, against a formula of all N x M logits.

Losses with options are in test_options.py, in float64; here every implementation has its own dtypes.
"""

import math

import pytest
import torch
from conftest import INTERPRETING
from torch import Tensor

from fastjem.kernels import tiling

# (rows, columns, width), own image, ids, the mask's shape, limits of rows, of columns, columns' sums, totals
PLAIN = ((9, 15, 7), None, False, None, False, False, False, False)
SEEN = {
    "all": PLAIN,
    "own image, columns": ((9, 15, 7), (9, 4, 15), False, None, False, False, True, False),
    "views": ((24, 24, 5), (8, 0, 8), True, None, True, False, False, True),
    "ids, a mask of columns": ((70, 131, 20), None, True, (1, 131), False, False, True, True),
    "a mask that repeats, limits": ((66, 10, 33), (33, 0, 5), False, (11, 5), True, True, True, True),
    "everything": ((130, 64, 40), (130, 0, 64), True, (130, 64), True, True, True, True),
    "one row": ((1, 3, 16), None, True, (1, 3), True, True, True, True),
}
DTYPES = [torch.float32, torch.float16] if INTERPRETING else [torch.float64, torch.float32, torch.bfloat16]


class Drawn:
    def __init__(self, name: str, dtype: torch.dtype, device: str):
        (n, m, d), own, ids, mask, row_limit, column_limit, self.columns, self.totals = SEEN[name]
        g = torch.Generator().manual_seed(len(name))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.a = (normal(n, d) * 3 / d**0.5).to(dtype)
        self.b = normal(m, d).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.own = own
        self.ids = [torch.randint(0, 5, (rows,), generator=g) for rows in (n, m)] if ids else None
        self.mask = None if mask is None else normal(*mask) > 0.5
        self.limits = [normal(n).to(wide) if row_limit else None, normal(m).to(wide) if column_limit else None]
        self.slopes = [normal(rows) for rows in (n, n, m, m)]
        self.products = dtype if dtype.itemsize > 1 else torch.float32
        visible = (list(own or (1, 0, 0)), *(self.ids or (None, None)), self.mask, *self.limits)
        self.visible = [x.to(device) if isinstance(x, Tensor) else x for x in visible]
        self.device = device

    def formula(self, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits in float64, and what rows and columns see."""
        logits = a @ b.T
        n, m = logits.shape
        seen = torch.ones(n, m, dtype=torch.bool)
        for i in range(n):
            for j in range(m):
                if self.own is not None and i % self.own[0] + self.own[1] == j % self.own[2]:
                    seen[i, j] = False
                if self.ids is not None and self.ids[0][i] == self.ids[1][j]:
                    seen[i, j] = False
                if self.mask is not None and self.mask[i % self.mask.shape[0], j % self.mask.shape[1]]:
                    seen[i, j] = False
        low = [math.inf if x is None else x.double() for x in self.limits]
        values = logits.detach()
        row_low = low[0][:, None] if isinstance(low[0], Tensor) else low[0]
        return logits, [seen & (values <= row_low), seen & (values <= low[1])]

    def expected(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The six results, and the gradients of their sum with `slopes` as weights."""
        a, b = (x.double().clone().requires_grad_() for x in (self.a, self.b))
        logits, seen = self.formula(a, b)
        results = []
        loss = logits.sum() * 0
        for dim, of_lse, of_total in ((1, *self.slopes[:2]), (0, *self.slopes[2:])):
            unseen = ~seen[1 - dim]
            lse = logits.masked_fill(unseen, -math.inf).logsumexp(dim)
            total = logits.masked_fill(unseen, 0).sum(dim)
            results += [lse, total, (~unseen).sum(dim).double()]
            if dim == 1 or self.columns:
                # of a row that sees nothing neither derivative exists
                loss = loss + (lse.masked_fill(lse.isneginf(), 0) * of_lse).sum()
                loss = loss + (total * of_total).sum() * self.totals
        of_a, of_b = torch.autograd.grad(loss, (a, b))
        return [x.detach() for x in results], of_a, of_b

    def arguments_of_backward(self, results: list[Tensor]) -> list[Tensor | None]:
        sides = []
        for lse, of_lse, of_total in ((results[0], *self.slopes[:2]), (results[3], *self.slopes[2:])):
            sides += [lse, of_lse, of_total if self.totals else None]
        if not self.columns:
            sides[3:] = [None] * 3
        return [x if x is None else x.to(self.device) for x in sides]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("op", ["similarity_logsumexp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEEN)
def test_sums_and_gradients(name, dtype, op, implementation, monkeypatch):
    if name == "everything":  # bands of rows, each with its own sums of columns
        monkeypatch.setattr(tiling, "COLUMN_SUMS", 1000)
        monkeypatch.setattr(tiling, "WEIGHTS_BYTES", 1)
    drawn = Drawn(name, dtype, implementation.device)
    results, *gradients = drawn.expected()
    a, b = (x.to(implementation.device) for x in (drawn.a, drawn.b))
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-6}.get(dtype, 2e-3)
    got = getattr(torch.ops.fastjem, op)(a, b, *drawn.visible, drawn.columns, drawn.totals, drawn.products)
    for i, (x, exact) in enumerate(zip(got, results, strict=True)):
        if (i >= 3 and not drawn.columns) or (i % 3 and not drawn.totals):
            assert not x.numel()
            continue
        finite = exact[exact.isfinite()]
        size = max(1.0, finite.abs().max().item()) if len(finite) else 1.0
        torch.testing.assert_close(x.cpu(), exact, rtol=0, atol=tolerance * size)
    sides = drawn.arguments_of_backward(results)
    for wanted in ([True, True], [True, False], [False, True]):
        found = getattr(torch.ops.fastjem, op + "_backward")(a, b, *drawn.visible, *sides, wanted, drawn.products)
        for x, exact, want, like in zip(found, gradients, wanted, (a, b), strict=True):
            assert x.dtype == like.dtype and x.numel() == (exact.numel() if want else 0)
            if want:
                size = max(exact.abs().max().item(), 1e-3)
                torch.testing.assert_close(x.double().cpu(), exact, rtol=0, atol=4 * tolerance * size)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", ["similarity_logsumexp"])
def test_slopes_far_below_float16_are_not_lost(op, implementation):
    """1 / N and an upstream gradient are in them."""
    drawn = Drawn("ids, a mask of columns", torch.float32, implementation.device)
    drawn.slopes = [x * 1e-9 for x in drawn.slopes]
    results, *gradients = drawn.expected()
    a, b = (x.to(implementation.device) for x in (drawn.a, drawn.b))
    sides = drawn.arguments_of_backward(results)
    found = getattr(torch.ops.fastjem, op + "_backward")(a, b, *drawn.visible, *sides, [True, True], torch.float16)
    for x, exact in zip(found, gradients, strict=True):
        torch.testing.assert_close(x.double().cpu(), exact, rtol=0, atol=1e-2 * exact.abs().max().item())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", ["similarity_logsumexp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["views", "ids, a mask of columns", "a mask that repeats, limits", "everything"])
def test_logits_of_hundreds(name, dtype, op, implementation):
    """Then maxima run along, where C++ subtracts one number from small ones."""
    drawn = Drawn(name, dtype, implementation.device)
    drawn.a = drawn.a * 60
    drawn.limits = [x if x is None else x * 60 for x in drawn.limits]
    drawn.visible[-2:] = [x if x is None else x.to(implementation.device) for x in drawn.limits]
    if name == "everything" and drawn.mask is not None:  # a row that sees nothing at all
        drawn.mask[0] = True
        drawn.visible[3] = drawn.mask.to(implementation.device)
    results, *gradients = drawn.expected()
    a, b = (x.to(implementation.device) for x in (drawn.a, drawn.b))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    got = getattr(torch.ops.fastjem, op)(a, b, *drawn.visible, drawn.columns, drawn.totals, drawn.products)
    for x, exact in zip(got, results, strict=True):
        if x.numel():
            size = exact[exact.isfinite()].abs().max().item()
            torch.testing.assert_close(x.cpu(), exact, rtol=0, atol=tolerance * size)
    sides = drawn.arguments_of_backward(results)
    found = getattr(torch.ops.fastjem, op + "_backward")(a, b, *drawn.visible, *sides, [True, True], drawn.products)
    for x, exact in zip(found, gradients, strict=True):
        torch.testing.assert_close(x.double().cpu(), exact, rtol=0, atol=10 * tolerance * exact.abs().max().item())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", ["similarity_logsumexp"])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_what_is_at_the_limit_is_seen(size, op, implementation):
    """Of 1, 2 and 3 a limit of 2 leaves two, for rows and for columns."""
    a = torch.tensor([[size]], device=implementation.device)
    b = torch.tensor([[1.0], [2.0], [3.0]], device=implementation.device)
    limit = torch.tensor([2 * size], device=implementation.device)
    function = getattr(torch.ops.fastjem, op)
    exact = (a.double() * torch.tensor([1.0, 2.0], device=a.device).double()).logsumexp(1)
    of_rows = function(a, b, [1, 0, 0], None, None, None, limit, None, False, True, torch.float32)
    torch.testing.assert_close(of_rows[0], exact, rtol=1e-6, atol=0)
    of_columns = function(b, a, [1, 0, 0], None, None, None, None, limit, True, True, torch.float32)
    torch.testing.assert_close(of_columns[3], exact, rtol=1e-6, atol=0)
    assert of_rows[2].tolist() == of_columns[5].tolist() == [2]
