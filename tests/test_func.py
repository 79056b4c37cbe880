"""torch.func's transforms of every loss: grad, vmap, jacrev and what is composed of them; batched gradients; export."""

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from calls import CALLS, Call, D
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, stack_module_state, vjp, vmap

import fastjem.functional as F
from fastjem import nn
from fastjem.collectives import Agreement

ROWS = 12  # more than D, by which some losses choose their form

LOSSES = {name: call for name, call in CALLS.items() if call.differentiable}
OTHERS = [
    name for name in CALLS if not CALLS[name].differentiable and name not in ("MemoryBankModule", "NNMemoryBankModule")
]
# A module that moves a state of its own is refused within vmap, in words; masks of booleans have no shape there.
STATE = (
    "DINOLoss", "DINOLoss-epoch", "DINOLoss-tensor", "DINOLoss-deferred", "NTXentLoss-bank", "Whitening2d", "WMSELoss",
    "NNCLRLoss", "IBOTPlusPlusPatchLoss",
)  # fmt: skip
# Modules whose function computes with options of an operator.
WITH_OPTIONS = {
    "DetConBLoss": "detcon", "DetConSLoss": "detcon", "HypersphereLoss": "hypersphere", "MACLLoss": "nt_xent",
}  # fmt: skip
RAGGED = ("IBOTPatchLoss", "IBOTPatchLoss-sinkhorn")
# Plain torch, which differentiates as often as asked, or operators whose gradient is differentiable
TWICE = {
    "negative_cosine", "negative_cosine-rows",
    "NegativeCosineSimilarity", "regression", "cross_entropy", "total_coding_rate", "emp_ssl",
    "EMPSSLLoss", "mmcr", "MMCRLoss", "whiten", "Whitening2d", "WMSELoss", "simdino", "SimDINOLoss", "SMoGPrototypes",
    "SymNegCosineSimilarityLoss", "LeWMLoss", "PatchKernelAlignmentLoss",
}  # fmt: skip


def _function(case: Call) -> Callable[..., Tensor]:
    def function(*x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return case.fresh()(*x)

    return function


def _given(case: Call) -> tuple[list[Tensor], tuple[int, ...], tuple[Tensor, ...]]:
    """Inputs, the places of those that are differentiated, and their gradients as backward has them."""
    torch.manual_seed(0)
    inputs = case.make(ROWS)
    places = tuple(i for i, x in enumerate(inputs) if x.requires_grad)
    loss = _function(case)(*inputs)
    found = torch.autograd.grad(loss, [inputs[i] for i in places], allow_unused=True)
    gradients = tuple(torch.zeros_like(inputs[i]) if g is None else g for i, g in zip(places, found, strict=True))
    return [x.detach() for x in inputs], places, gradients


def _close(got: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """In float32: of the largest element, as what sums of large terms leave is as far off as these."""
    if not isinstance(expected, Tensor):
        for x, y in zip(got, expected, strict=True):
            _close(x, y)
        return
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("name", LOSSES)
def test_grad_vjp_and_jacrev(name):
    case = LOSSES[name]
    inputs, places, gradients = _given(case)
    function = _function(case)
    got, value = grad_and_value(function, argnums=places)(*inputs)
    _close(value, function(*inputs))
    _close(got, gradients)

    def of_differentiated(*x: Tensor) -> Tensor:
        given = dict(zip(places, x, strict=True))
        return function(*[given.get(i, y) for i, y in enumerate(inputs)])

    value, pullback = vjp(of_differentiated, *[inputs[i] for i in places])
    _close(pullback(torch.full_like(value, -2.0)), tuple(-2 * g for g in gradients))
    got = jacrev(lambda *x: function(*x) * torch.tensor([1.0, 3.0]), argnums=places)(*inputs)
    _close(got, tuple(torch.stack([g, 3 * g]) for g in gradients))


@pytest.mark.parametrize("name", LOSSES)
def test_batched_gradients(name):
    case = LOSSES[name]
    _, places, gradients = _given(case)
    torch.manual_seed(0)
    inputs = case.make(ROWS)
    loss = _function(case)(*inputs)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=loss.dtype)
    if name == "cross_entropy-rows" or name.endswith("-options") or name in WITH_OPTIONS:
        op = WITH_OPTIONS.get(name, name.split("-")[0])
        with pytest.raises(NotImplementedError, match=f"{op}: with options, gradients must be asked for one"):
            torch.autograd.grad(loss, [inputs[i] for i in places], upstream, is_grads_batched=True)
        return
    got = torch.autograd.grad(
        loss, [inputs[i] for i in places], upstream, is_grads_batched=True, allow_unused=True, retain_graph=True
    )
    for batch, one in zip(got, gradients, strict=True):
        if batch is not None:
            _close(batch, torch.stack([one, -2 * one, 0.5 * one]))


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_of_a_loss_and_of_its_gradient(name):
    case = LOSSES[name]
    inputs, places, _ = _given(case)
    function = _function(case)
    both = [torch.stack([x, x.flip(0) if x.dim() else 0.5 * x]) for x in inputs]
    if name in RAGGED:
        with pytest.raises(RuntimeError, match="vmap over calling"):
            vmap(function, randomness="same")(*both)
        return
    gradient = grad(function, argnums=places)
    if name in STATE:
        module = name.partition("-")[0]
        with pytest.raises(NotImplementedError, match=f"{module}: within vmap, the module's state must have the"):
            vmap(gradient, randomness="same")(*both)
        return
    each = [function(*[x[i] for x in both]) for i in range(2)]
    _close(vmap(function, randomness="same")(*both), torch.stack(each))
    of_each = [gradient(*[x[i] for x in both]) for i in range(2)]
    expected = tuple(torch.stack(of_input) for of_input in zip(*of_each, strict=True))
    _close(vmap(gradient, randomness="same")(*both), expected)
    _close(grad(lambda *x: vmap(function, randomness="same")(*x).sum(), argnums=places)(*both), expected)


def test_autograd_around_vmap():
    """What vmap's tensors are around requires a gradient, though they themselves say that they don't."""
    z = torch.randn(3, 2, 5, 4, requires_grad=True)
    (got,) = torch.autograd.grad(vmap(F.nt_xent)(z).sum(), z)
    (expected,) = torch.autograd.grad(torch.stack([F.nt_xent(x) for x in z]).sum(), z)
    _close(got, expected)
    (got,) = torch.autograd.grad(vmap(F.nt_xent, in_dims=1)(z.transpose(0, 1)).sum(), z)
    _close(got, expected)


def test_what_isnt_batched_is_given_to_each():
    z, labels = torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    got = vmap(lambda x: F.cross_entropy(x, labels))(z)
    _close(got, torch.stack([F.cross_entropy(x, labels) for x in z]))
    scale = torch.tensor([1.0, 5.0, 9.0])
    got = vmap(F.clip_loss, in_dims=(None, None, 0))(z[0], z[1], scale)
    _close(got, torch.stack([F.clip_loss(z[0], z[1], s) for s in scale]))


@pytest.mark.parametrize("name", OTHERS)
def test_vmap_of_what_has_no_gradient(name):
    case = CALLS[name]
    torch.manual_seed(0)
    both = [torch.stack([x, x.flip(0)]) for x in case.make(ROWS)]
    expected = torch.stack([case.fresh()(*[x[i] for x in both]) for i in range(2)])
    _close(vmap(case.fresh())(*both), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_right_or_refused(name):
    case = LOSSES[name]
    inputs, places, _ = _given(case)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    function = _function(case)
    place = places[-1] if name in ("nnclr", "NNCLRLoss") else places[0]  # whose projections are constants

    def size(*x: Tensor) -> Tensor:
        return grad(function, argnums=place)(*x).pow(2).sum()

    if name not in TWICE:
        with pytest.raises(RuntimeError, match=r"differentiable once only, got a second derivative"):
            grad(size, argnums=place)(*inputs)
        return
    got = grad(size, argnums=place)(*inputs)
    step = 1e-5 * torch.randn_like(inputs[place])
    ends = [[x + sign * step if i == place else x for i, x in enumerate(inputs)] for sign in (1, -1)]
    differences = (size(*ends[0]) - size(*ends[1])) / 2
    torch.testing.assert_close((got * step).sum(), differences, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "loss, formula",
    [
        (F.negative_cosine, lambda p, z: -torch.cosine_similarity(p, z).mean()),
        (
            lambda x, y: F.regression(x, y, beta=0.5, normalize=False),
            lambda x, y: torch.nn.functional.smooth_l1_loss(x, y, beta=0.5),
        ),
        (
            lambda x, y: F.cross_entropy(x, y[:, 0].argsort()),
            lambda x, y: torch.nn.functional.cross_entropy(x, y[:, 0].argsort()),
        ),
    ],
    ids=["negative_cosine", "regression", "cross_entropy"],
)
def test_hessian(loss, formula):
    x, y = torch.randn(2, 4, 5, dtype=torch.float64)
    _close(jacrev(jacrev(loss))(x, y), hessian(formula)(x, y))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        hessian(loss)(x, y)  # jacfwd of jacrev


def test_an_ensemble_of_modules():
    """Parameters by functional_call, a state for each by stack_module_state, the gradient of all in one vmap."""
    heads = [torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, 4)) for _ in range(3)]
    parameters, buffers = stack_module_state(heads)
    x = torch.randn(2, 6, D)

    def loss(p: dict, b: dict) -> Tensor:
        return F.vicreg(*(functional_call(heads[0], (p, b), (view,)) for view in x))

    got = vmap(grad(loss))(parameters, buffers)
    for i, head in enumerate(heads):
        expected = torch.autograd.grad(F.vicreg(head(x[0]), head(x[1])), list(head.parameters()))
        _close([got[key][i] for key in got], list(expected))


def test_what_writes_or_talks_to_ranks_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match=r"ema_update_: transforms of torch.func are not supported"):
        vmap(lambda t: F.ema_update_([t], [t], 0.5))(x)
    with pytest.raises(ValueError, match="rescale_: within vmap, what is written must have the batch"):
        vmap(lambda factor: torch.ops.fastjem.rescale_(x, factor))(torch.ones(2))
    written = x.clone()
    vmap(lambda rows, factor: torch.ops.fastjem.rescale_(rows, factor) or rows)(written, torch.tensor([2.0, 3.0]))
    _close(written, x * torch.tensor([[2.0], [3.0]]))

    def with_group(z: Tensor) -> Tensor:
        Agreement("nt_xent", object())  # type: ignore[arg-type]
        return z.sum()

    with pytest.raises(NotImplementedError, match=r"nt_xent: within a transform of .*, group must be None"):
        grad(with_group)(x)


class _Module(torch.nn.Module):
    def __init__(self, case: Call):
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        self.loss = case.module() if case.module else None

    def forward(self, *x: Tensor) -> Tensor:
        return self.case.call(*x) if self.loss is None else self.case.call(self.loss, *x)


def _check_export(name: str, strict: bool) -> None:
    """An exported loss, made of one batch, gives another batch its loss."""
    case = LOSSES[name]
    torch.manual_seed(0)
    inputs, others = ([x.detach() for x in case.make(n)] for n in (ROWS, ROWS + 5))
    shapes = tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in inputs)
    module = _Module(case)
    torch.manual_seed(1)
    expected = module(*others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of export's own, about dictionaries and buffers
        program = torch.export.export(_Module(case), tuple(inputs), dynamic_shapes=(shapes,), strict=strict)
    torch.manual_seed(1)
    _close(program.module()(*others), expected)


SLOW_EXPORTS = ("VICRegLLoss",)  # 8 and 13 s
QUICK = [name for name in LOSSES if name not in SLOW_EXPORTS]


@pytest.mark.parametrize("name", QUICK)
def test_export(name):
    _check_export(name, strict=False)


@pytest.mark.parametrize("name", ["nt_xent", "siglip_loss", "cross_entropy", "prototype_cross_entropy", "DINOLoss"])
def test_strict_export(name):
    _check_export(name, strict=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name, strict", [*((name, True) for name in LOSSES), *((name, False) for name in SLOW_EXPORTS)]
)
def test_every_export(name, strict):
    _check_export(name, strict)


def test_an_exported_loss_says_that_it_has_no_gradient():
    """torch.export writes down what a Function computes, and not its backward. PyTorch warns, and gives no gradient."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(D, 4)
            self.loss = nn.NegativeCosineSimilarity()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.layer(x), y)

    network = Network()
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, {0: batch})
    program = torch.export.export(network, (torch.randn(5, D), torch.randn(5, 4)), dynamic_shapes=shapes)
    x, y = torch.randn(7, D), torch.randn(7, 4)
    loss = program.module()(x, y)
    _close(loss, network(x, y))
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"), pytest.raises(RuntimeError):
        torch.autograd.grad(loss, list(program.module().parameters()))
