"""How many launches a loss costs on a GPU, forward and backward, and that the host waits for none of them.

A launch takes the host 3 to 8 us and a small kernel 2: below some thousand rows a loss takes as long as its launches.
MOST is a ratchet: whoever makes a loss of fewer launches lowers its line. The counter is launches.py.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from calls import CALLS, FUNCTIONS, Call, D, K, leaf
from launches import Launches, counted

import fastjem.functional as F

BATCH = 24


def _half(name: str) -> Call:
    """A call of calls.py with bfloat16 features."""

    def make(batch: int) -> list[torch.Tensor]:
        return [
            x.detach().bfloat16().requires_grad_(x.requires_grad) if x.is_floating_point() and x.dim() else x
            for x in FUNCTIONS[name].make(batch)
        ]

    return Call(make, FUNCTIONS[name].call)


def _wide(call: Callable[..., torch.Tensor], tensors: int) -> Call:
    """Of bfloat16 rows whose gradient doesn't stay in registers."""
    return Call(lambda b: [torch.randn(b, 300).bfloat16().requires_grad_() for _ in range(tensors)], call)


def _of_many_views(b: int) -> list[torch.Tensor]:
    return [*(leaf(b, K) for _ in range(10)), torch.randn(b, K), torch.randn(b, K)]


def _ema_update(*x: torch.Tensor) -> torch.Tensor:
    F.ema_update_(list(x[:2]), list(x[2:]), 0.99)
    return x[0]


MORE = {
    "nt_xent bf16": _half("nt_xent"),
    "nt_xent bf16, a learned temperature": Call(
        lambda b: [*_half("nt_xent").make(b), torch.tensor(0.5, requires_grad=True)],
        lambda a, b, t: F.nt_xent(a, b, temperature=t),
    ),
    "nt_xent bf16, many rows": Call(
        lambda b: [torch.zeros(2, 4500, D, dtype=torch.bfloat16, requires_grad=True)], F.nt_xent
    ),
    "dcl bf16": _half("dcl"),
    "supcon bf16": _half("supcon"),
    "supcon bf16, each image a class": Call(lambda b: _half("supcon").make(b)[:1], F.supcon),
    "supcon bf16, one anchor, as given": _half("supcon-one"),
    "supcon bf16, a learned temperature": Call(
        lambda b: [*_half("supcon").make(b), torch.tensor(0.5, requires_grad=True)],
        lambda z, y, t: F.supcon(z, y, temperature=t),
    ),
    "supcon bf16, many rows": Call(
        lambda b: [torch.zeros(2, 4500, D, dtype=torch.bfloat16, requires_grad=True), torch.arange(4500) // 9], F.supcon
    ),
    "info_nce bf16": _half("info_nce"),
    "info_nce bf16, a learned temperature": Call(
        lambda b: [*_half("info_nce").make(b), torch.tensor(0.2, requires_grad=True)],
        lambda a, b, q, t: F.info_nce(a, b, q, temperature=t),
    ),
    "info_nce bf16, negatives that learn": _half("info_nce-offset"),
    "info_nce bf16, negatives and a temperature that learn": _half("info_nce-learned"),
    "info_nce bf16, many queries": Call(
        lambda b: [torch.zeros(n, D, dtype=torch.bfloat16, requires_grad=n > 20) for n in (9000, 9000, 20)], F.info_nce
    ),
    "clip_loss bf16": _half("clip_loss"),
    "clip_loss bf16, a number": _half("clip_loss-number"),
    "clip_loss of one tower": Call(lambda b: [leaf(b, D), torch.randn(b, D), torch.tensor(9.0)], F.clip_loss),
    "nt_xent, a learned temperature": Call(
        lambda b: [leaf(b, D), leaf(b, D), torch.tensor(0.5, requires_grad=True)],
        lambda a, b, t: F.nt_xent(a, b, temperature=t),
    ),
    "nt_xent, many rows": Call(lambda b: [leaf(2, 2500, 8)], F.nt_xent),
    "nt_xent bf16, 300 columns": _wide(lambda a, b: F.nt_xent(a, b), 2),
    "dcl bf16, 300 columns": _wide(lambda a, b: F.dcl(a, b), 2),
    "clip_loss bf16, 300 columns": _wide(lambda a, b: F.clip_loss(a, b, 9.0), 2),
    "clip_loss, many rows": Call(lambda b: [leaf(5000, 8), leaf(5000, 8)], lambda a, b: F.clip_loss(a, b, 9.0)),
    "info_nce bf16, 300 columns": _wide(lambda a, b, q: F.info_nce(a, b, q.detach()), 3),
    "info_nce bf16, 300 columns, negatives that learn": _wide(lambda a, b, q: F.info_nce(a, b, q), 3),
    "siglip_loss bf16": _half("siglip_loss"),
    "siglip_loss of numbers": Call(lambda b: [leaf(b, D), leaf(b, D)], lambda a, b: F.siglip_loss(a, b, 9.0, -9.0)),
    "siglip_loss of one tower": Call(
        lambda b: [leaf(b, D), torch.randn(b, D)], lambda a, b: F.siglip_loss(a, b, 9.0, -9.0)
    ),
    "koleo bf16": _half("koleo"),
    "barlow_twins bf16": _half("barlow_twins"),
    "vicreg bf16": _half("vicreg"),
    "prototype_cross_entropy 10 and 2 views": Call(
        _of_many_views,
        lambda *x: F.prototype_cross_entropy(
            list(x[:10]), list(x[10:]), student_temperature=0.1, teacher_temperature=0.04
        ),
    ),
    "prototype_head_cross_entropy 10 and 2 views": Call(
        lambda b: [*(leaf(b, D) for _ in range(10)), torch.randn(b, D), torch.randn(b, D), leaf(K, D)],
        lambda *x: F.prototype_head_cross_entropy(
            list(x[:10]), list(x[10:12]), x[12], x[12].detach(), student_temperature=0.1, teacher_temperature=0.04
        ),
    ),
    "ema_update_": Call(
        lambda b: [torch.randn(3, 5), torch.randn(7), torch.randn(3, 5), torch.randn(7)],
        _ema_update,
        differentiable=False,
    ),
}

# Forward and backward: Triton's launches, and torch's (kernels, fills, copies, autograd's sums).
MOST = {
    "nt_xent": (5, 1),
    "dcl": (5, 1),
    "dclw": (7, 10),
    "supcon": (5, 2),
    "supcon-one": (5, 2),
    "supcon-options": (16, 201),
    "supcon-mask": (11, 110),
    "info_nce": (5, 1),
    "info_nce-offset": (5, 1),
    "info_nce-learned": (5, 1),
    "nt_xent-options": (6, 118),
    "info_nce-options": (12, 60),
    "clip_loss-options": (18, 93),
    "nt_xent-dims": (15, 21),
    "clip_loss-dims": (18, 14),
    "nnclr": (13, 8),
    "siglip_loss-ids": (3, 18),
    "nearest_neighbors": (3, 2),
    "clip_loss": (5, 1),
    "clip_loss-number": (5, 1),
    "siglip_loss": (3, 3),
    "negative_cosine": (3, 1),
    "regression": (3, 1),
    "regression-rows": (4, 2),
    "masked_rows": (0, 12),
    "gram_loss": (5, 9),
    "kmeans": (6, 41),
    "nearest_rows": (3, 12),
    "knn_votes": (3, 37),
    "barlow_twins": (5, 1),
    "vicreg": (5, 1),
    "vicreg-health": (5, 2),
    "tico": (1, 34),
    "sigreg": (3, 30),
    "lejepa": (3, 52),
    "visreg": (1, 75),
    "prototype_cross_entropy": (4, 1),
    "prototype_cross_entropy-all": (6, 4),
    "prototype_head_cross_entropy": (6, 10),
    "koleo": (8, 1),
    "mean_entropy": (5, 1),
    "sinkhorn": (7, 0),
    "sinkhorn-positions": (7, 0),
    "sinkhorn_bias-rows": (6, 2),
    "sinkhorn_bias": (9, 0),
    "total_coding_rate": (0, 21),
    "simdino": (3, 45),
    "emp_ssl": (4, 38),
    "mmcr": (1, 29),
    "frossl": (1, 37),
    "whiten": (0, 47),
    "w_mse": (1, 45),
    "cross_entropy-rows": (2, 19),
    "cross_entropy-weights": (2, 11),
    "negative_cosine-rows": (4, 26),
    "cross_entropy": (3, 1),
    "augment": (1, 0),
    "augment-floats": (1, 0),
    "crop_resize-floats": (1, 0),
    "crop_resize": (1, 0),
    "HypersphereLoss": (10, 51),
    "MACLLoss": (8, 43),
    "PatchKernelAlignmentLoss": (0, 53),
    "DetConBLoss": (12, 61),
    "DetConSLoss": (12, 63),
    "VICRegLLoss": (110, 181),
    "nt_xent bf16": (5, 1),
    "nt_xent bf16, a learned temperature": (6, 1),
    "nt_xent bf16, many rows": (5, 1),
    "dcl bf16": (5, 1),
    "supcon bf16": (5, 1),
    "supcon bf16, each image a class": (5, 1),
    "supcon bf16, one anchor, as given": (5, 1),
    "supcon bf16, a learned temperature": (6, 1),
    "supcon bf16, many rows": (6, 1),
    "info_nce bf16": (4, 1),
    "info_nce bf16, a learned temperature": (4, 1),
    "info_nce bf16, negatives that learn": (5, 1),
    "info_nce bf16, negatives and a temperature that learn": (5, 1),
    "info_nce bf16, many queries": (5, 1),
    "clip_loss bf16": (5, 1),
    "clip_loss bf16, a number": (5, 1),
    "clip_loss of one tower": (5, 1),
    "nt_xent, a learned temperature": (5, 1),
    "nt_xent, many rows": (5, 2),
    "nt_xent bf16, 300 columns": (5, 1),
    "dcl bf16, 300 columns": (5, 1),
    "clip_loss bf16, 300 columns": (5, 1),
    "clip_loss, many rows": (5, 3),
    "info_nce bf16, 300 columns": (5, 1),
    "info_nce bf16, 300 columns, negatives that learn": (5, 1),
    "siglip_loss bf16": (3, 3),
    "siglip_loss of numbers": (3, 3),
    "siglip_loss of one tower": (3, 2),
    "koleo bf16": (8, 1),
    "barlow_twins bf16": (5, 1),
    "vicreg bf16": (5, 1),
    "prototype_cross_entropy 10 and 2 views": (4, 1),
    "prototype_head_cross_entropy 10 and 2 views": (6, 18),
    "ema_update_": (1, 2),
}
# In backward and in forward: cuSOLVER may not have converged, and torch looks whether it has.
WAITS = {"mmcr": {"_linalg_svd": 2}, "MMCRLoss": {"_linalg_svd": 2}}


@functools.cache
def _count(name: str) -> Launches:
    torch.manual_seed(0)
    call = (CALLS | MORE)[name]
    tensors = call.make(BATCH)
    function = call.fresh()
    with counted() as found:
        result = function(*tensors)
        if call.differentiable:
            result.backward()
    return found


@pytest.mark.parametrize("name", MOST)
def test_a_loss_has_at_most_so_many_launches(name, one_thread):
    found = _count(name)
    triton, torchs = MOST[name]
    assert found.triton.total() <= triton and found.torch.total() <= torchs, str(found)


@pytest.mark.parametrize("name", CALLS | MORE)
def test_the_host_waits_for_nothing(name, one_thread):
    assert dict(_count(name).waits) == WAITS.get(name, {})


def test_every_function_has_a_bound():
    of = {name.partition("-")[0].partition(" ")[0] for name in MOST}
    by_module = {"hypersphere", "macl", "patch_kernel_alignment", "detcon", "dense_structure"}  # in MOST as modules
    others = {"Clusters", "Health", "TeacherStatistics", "random_directions"}  # what losses take or give
    assert set(F.__all__) - of == by_module | others
    assert set(FUNCTIONS) <= set(MOST)


X = torch.rand(6, 4)
PLACES = torch.tensor([0, 2])
TORCH = {
    "a view": (lambda: X[1:].reshape(4, 5)[0].detach().expand(3, 5), {}),
    "a sum": (lambda: X.sum(0), {"sum": 1}),
    "memory": (lambda: (torch.empty(3), X.new_empty(2), torch.empty_like(X)), {}),
    "nothing": (lambda: X[:0] + 1, {}),
    "a fill": (lambda: (torch.zeros(3, device=X.device), X.new_full((), 2.0)), {"zero_": 1, "fill_": 1}),
    "a layout": (lambda: X.mT.contiguous(), {"copy_": 1}),
    "a dtype": (lambda: X.double().float(), {"copy_": 2}),
    "the same dtype": (lambda: X.float(), {}),
    "a number": (lambda: torch.where(X > 0.5, X, 0.0), {"gt": 1, "scalar_tensor": 1, "where": 1}),
    "a remainder": (lambda: X % 2, {"remainder": 1}),
    "a composition": (
        lambda: X.logsumexp(1),
        {"amax": 1, "abs": 1, "eq": 1, "masked_fill_": 1, "sub": 1, "exp_": 1, "sum": 1, "log_": 1, "add_": 1},
    ),
    "many small tensors": (
        lambda: torch._foreach_mul_([X.clone() for _ in range(65)], 2), {"copy_": 65, "_foreach_mul_": 1}
    ),
    "two lists of them": (lambda: torch._foreach_add([X] * 65, [X] * 65), {"_foreach_add": 2}),
    "an index": (lambda: X[PLACES], {"index": 1}),
    "a sum by places": (
        lambda: X.clone().index_put_((PLACES,), X[:2], accumulate=True), {"copy_": 1, "_index_put_impl_": 6}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_torchs_launches_are_counted(name):
    call, expected = TORCH[name]
    with counted() as found:
        call()
    assert (dict(found.torch), dict(found.waits)) == (expected, {})


WAITING = {
    "a number": (lambda: X.sum().item(), {"_local_scalar_dense": 1}),
    "a condition": (lambda: bool(X[0, 0] > 0), {"_local_scalar_dense": 1}),
    "a list": (lambda: X.tolist(), {"tolist": 1}),
    "a copy to the host": (lambda: X.cpu().tolist(), {"copy_": 1}),
    "another": (lambda: X.to("cpu"), {"copy_": 1}),
    "numbers of the host": (lambda: torch.tensor([1.0, 2], device=X.device), {"tensor": 1}),
    "like a tensor": (lambda: X.new_tensor([1.0]), {"new_tensor": 1}),
    "pageable memory": (lambda: torch.rand(3).to(X.device), {"copy_": 1}),
    "the same into a tensor": (lambda: X.clone().copy_(torch.rand(6, 4)), {"copy_": 1}),
    "places of the host": (lambda: X[torch.tensor([0, 1])], {"copy_": 1}),
    "a mask": (lambda: X[X[:, 0] > 0.5], {"index": 1}),
    "places of a mask": (lambda: X.nonzero(), {"nonzero": 1}),
    "repetitions": (lambda: torch.repeat_interleave(X[0], PLACES[:1]), {"repeat_interleave": 1}),
    "eigenvalues": (lambda: torch.linalg.eigvalsh(X @ X.mT), {"_linalg_eigh": 1}),
}
WITHOUT = {
    "numbers of the host": lambda: torch.tensor([3.0, 4]).sum().item(),
    "pinned memory": lambda: torch.rand(3).pin_memory().to(X.device, non_blocking=True),
    "one of them as a summand": lambda: X + torch.tensor(2.0),
    "an element set": lambda: X.clone()[0].fill_(2.0),
    "masked elements set": lambda: X.masked_fill(X > 0.5, 0.0),
    "repetitions of known length": lambda: torch.repeat_interleave(X[0], PLACES[1:].expand(4), output_size=8),
    "a factor that may not be there": lambda: torch.linalg.cholesky_ex(X @ X.mT),
}


@pytest.mark.parametrize("name", WAITING)
def test_waits_are_seen(name):
    call, expected = WAITING[name]
    with counted() as found:
        call()
    assert dict(found.waits) == expected


@pytest.mark.parametrize("name", WITHOUT)
def test_what_waits_for_nothing_is_no_wait(name):
    with counted() as found:
        WITHOUT[name]()
    assert not found.waits, str(found)


def test_tensors_say_where_they_are():
    with counted():
        assert X.is_cuda and not X.is_cpu and X.device == torch.device("cuda", 0)
        assert torch.rand(2).is_cpu and torch.rand(2, device=X.device).is_cuda and torch.zeros_like(X).is_cuda
        assert (torch.arange(3) + 1).is_cpu and (X + torch.tensor(1.0)).is_cuda
        assert X.cpu().is_cpu and torch.rand(2).cuda().is_cuda and torch.rand(2).to(X).is_cuda
    assert X.is_cpu and torch.empty(1).device.type == "cpu"


def test_autograds_sums_are_counted():
    x = torch.randn(4, requires_grad=True)
    with counted() as found:
        (x * 2 + x * 3).sum().backward()
    # forward: 2 products, their sum, the sum; backward: the 1, 2 products, the sum of both gradients
    assert dict(found.torch) == {"mul": 4, "add": 2, "sum": 1, "fill_": 1}


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        return upstream.double().float().T.contiguous().T


def test_copies_in_backward_are_counted():
    """Where autograd calls, torch doesn't take `to` and `contiguous` apart before they are seen."""
    x = torch.randn(4, 3, requires_grad=True)
    with counted() as found:
        _Widened.apply(x).backward(torch.ones_like(x))
    assert found.torch["copy_"] == 5  # the clone, two dtypes, a layout, and the leaf's own gradient


def test_an_operators_launches_and_its_torch_are_counted():
    x, y = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
    with counted() as found:
        F.cross_entropy(x, y).backward()
    assert dict(found.triton) == {"_cross_entropy_kernel": 1, "_mean_kernel": 1, "_rescale_kernel": 1}
    assert dict(found.torch) == {"fill_": 1}  # the upstream 1


def test_half_precision_takes_the_gpus_way():
    """Products of bfloat16 with float32 sums exist on CUDA alone."""
    half, single = _count("nt_xent bf16"), _count("nt_xent")
    assert half.triton["owner_kernel"] == single.triton["weigh_views_kernel"] == 1
    x = torch.randn(2, 8, 8).bfloat16()
    with counted() as found:
        product = torch.bmm(x, x, out_dtype=torch.float32)
    assert product.shape == (2, 8, 8) and product.dtype == torch.float32 and dict(found.torch) == {"bmm": 1}
