"""What PyTorch does around a loss: gradient checkpointing, hooks on saved tensors, forward-mode differentiation."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as TF
from calls import CALLS, Call
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastjem.functional as F
from fastjem import ops

LOSSES = {name: call for name, call in CALLS.items() if call.differentiable}


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_checkpointing(name, reentrant):
    """Each saved tensor is asked for once in a backward: at a second time checkpointing raises."""
    case: Call = LOSSES[name]
    inputs = case.make(12)
    leaves = [x for x in inputs if x.requires_grad]

    def block(*x: Tensor) -> Tensor:
        return case.fresh()(*[y.sin() if y.requires_grad else y for y in x])

    torch.manual_seed(0)
    expected = _gradients(block(*inputs), leaves)
    torch.manual_seed(0)
    loss = checkpoint(block, *inputs, use_reentrant=reentrant)
    if reentrant:  # supports backward() alone
        for x in leaves:
            x.grad = None
        loss.backward()
        got = [x.grad for x in leaves if x.grad is not None and x.grad.abs().sum()]
        expected = [g for g in expected if g.abs().sum()]
    else:
        got = _gradients(loss, leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_saved_tensors_may_be_elsewhere(name):
    case: Call = LOSSES[name]
    inputs = case.make(12)
    leaves = [x for x in inputs if x.requires_grad]
    torch.manual_seed(0)
    expected = _gradients(case.fresh()(*inputs), leaves)
    unpacked: dict[int, int] = {}

    def pack(x: Tensor) -> tuple[int, Tensor]:
        unpacked[len(unpacked)] = 0
        return len(unpacked) - 1, x.clone()

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        unpacked[packed[0]] += 1
        return packed[1]

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = case.fresh()(*inputs)
    torch.testing.assert_close(_gradients(loss, leaves), expected, rtol=1e-6, atol=1e-8)
    assert max(unpacked.values(), default=1) <= 1, "a saved tensor was asked for twice in one backward"


def _places(case: Call, inputs: list[Tensor]) -> list[int]:
    return [i for i, x in enumerate(inputs) if x.requires_grad]


def _of_one(case: Call, inputs: list[Tensor], place: int):
    def function(x: Tensor) -> Tensor:
        given = [y.detach() for y in inputs]
        given[place] = x
        return case.fresh()(*given)

    return function


@pytest.mark.parametrize("name", [name for name in CALLS if name != "MemoryBankModule"])  # which hands its bank out
def test_forward_mode_is_right_or_refused(name):
    """PyTorch drops the tangent at an operator that has no derivative of its own: the loss would look constant."""
    case: Call = CALLS[name]
    inputs = case.make(12)
    if not case.differentiable:
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    for place in _places(case, inputs):
        x = inputs[place].detach()
        tangent = torch.randn_like(x)
        function = _of_one(case, inputs, place)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        loss = function(leaf) if case.differentiable else torch.zeros(())
        expected = torch.zeros(())
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
            expected = torch.zeros(()) if gradient is None else (gradient * tangent).sum()
        try:
            torch.manual_seed(0)
            with forward_ad.dual_level():
                got = forward_ad.unpack_dual(function(forward_ad.make_dual(x.clone(), tangent))).tangent
        except (NotImplementedError, RuntimeError) as error:
            assert "forward-mode" in str(error) or "forward AD" in str(error), error
        else:
            assert case.differentiable, "an operator without a derivative took a tangent"
            torch.testing.assert_close(expected if got is None else got.to(expected), expected, rtol=1e-4, atol=1e-6)
            assert got is not None or not expected.abs().sum(), "the tangent was dropped"
        try:
            torch.manual_seed(0)
            _, got = torch.func.jvp(function, (x.clone(),), (tangent,))
        except (NotImplementedError, RuntimeError) as error:
            said = ("forward-mode", "forward AD", "During a grad (vjp, jvp, grad, etc) transform")
            assert any(words in str(error) for words in said), error
        else:
            assert case.differentiable, "an operator without a derivative took a tangent"
            torch.testing.assert_close(got.to(expected), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [F.nt_xent, F.barlow_twins, F.vicreg, F.negative_cosine], ids=lambda f: f.__name__)
def test_forward_mode_is_refused_in_words(loss):
    z = torch.randn(2, 6, 4)
    with pytest.raises(NotImplementedError, match=f"{loss.__name__}: forward-mode differentiation .* is not supported"):
        torch.func.jvp(lambda x: loss(x, z[1]), (z[0],), (z[0],))
    loss(*z)  # and outside nothing is left behind
    with forward_ad.dual_level():
        loss(*z)  # no tangent, no error


def test_in_place_updates_and_raw_operators_refuse_a_tangent():
    x = torch.randn(4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        for teacher, student in (([x.clone()], [dual]), ([dual], [x.clone()])):
            with pytest.raises(NotImplementedError, match="ema_update_: forward-mode"):
                F.ema_update_(teacher, student, 0.9)
        with pytest.raises(NotImplementedError, match="rescale_: forward-mode"):
            torch.ops.fastjem.rescale_(dual, torch.ones(()))
        with pytest.raises(NotImplementedError, match="nt_xent: forward-mode"):
            torch.ops.fastjem.nt_xent(dual[None], dual[None], 0, 0.5, False, True)
    with pytest.raises(NotImplementedError, match="sinkhorn: forward-mode"):
        torch.func.jvp(lambda y: torch.ops.fastjem.sinkhorn(y, 0.1, 3, False, torch.float32), (x,), (x,))


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_is_right_or_refused(name):
    case: Call = LOSSES[name]
    inputs = [x.detach() for x in case.make(12)]
    both = [torch.stack([x, x.flip(0)]) for x in inputs]
    try:
        got = torch.func.vmap(case.fresh())(*both)
    except (RuntimeError, NotImplementedError, ValueError):
        return
    for i in range(2):
        torch.testing.assert_close(got[i], case.fresh()(*[x[i] for x in both]), rtol=1e-5, atol=1e-6)


def test_every_operator_passes_where_forward_mode_is_refused():
    """The refusal is in the wrapper that registers an operator: one without it would drop tangents again."""
    seen = ops.plain(ops.reference("cross_entropy"))
    x = torch.randn(3, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="cross_entropy: forward-mode"):
        seen(forward_ad.make_dual(x, x), torch.tensor([0, 1, 2]), -100, [False])
    assert torch.isfinite(seen(x, torch.tensor([0, 1, 2]), -100, [False])[0])
    torch.testing.assert_close(
        F.cross_entropy(x, torch.tensor([0, 1, 2])), TF.cross_entropy(x, torch.tensor([0, 1, 2]))
    )
