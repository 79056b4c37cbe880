"""Every public module after use: pickled, copied, saved; and made on the meta device, where there is no memory yet."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from calls import MODULES
from torch import Tensor

from fastjem import nn
from fastjem.nn import heads
from fastjem.nn.parts import HeldMean, HeldRows, Prototypes, Queue

N, D, K = 8, 4, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = drawn(N, D), drawn(N, D, seed=1)
SCORES = [drawn(N, K, seed=2), drawn(N, K, seed=3)]
MASK = torch.zeros(2, 2, 3, dtype=torch.bool).index_fill_(1, torch.tensor(0), True)
MAPS = [(drawn(N, 3, seed=4 + i), drawn(N, 2, 2, D, seed=6 + i)) for i in range(2)]
GRIDS = [drawn(N, 2, 2, 2, seed=8 + i) for i in range(2)]


def twice(use: Callable) -> Callable:
    return lambda module: (use(module), use(module))[1]


def dino(module: nn.DINOLoss) -> Tensor:
    loss = module(SCORES, SCORES, epoch=3)
    torch.testing.assert_close(module.teacher_temp_schedule, torch.linspace(0.02, 0.07, 30))
    module.step_ends()
    return loss


def groups(module: nn.SMoGPrototypes) -> Tensor:
    module.set_group_features(Y[:4].clone())
    return module(X, module.get_updated_group_features(X))


def bank(module: nn.NTXentLoss) -> Tensor:
    loss = module(X.clone().requires_grad_(), Y)
    module.step_ends()
    return loss


def tico(module: nn.TiCoLoss) -> Tensor:
    loss = module(X, Y)
    module.step_ends()
    return loss


# Each class: what makes it, and a use of it after which it must still be a module like any other.
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable]] = {
    "BarlowTwinsLoss": (lambda: nn.BarlowTwinsLoss(track_spectrum=True), lambda m: m(X.clone().requires_grad_(), Y)),
    "Center": (lambda: nn.Center((1, D)), lambda m: m.update(X)),
    "ClipLoss": (nn.ClipLoss, lambda m: m(X, Y, torch.tensor(2.0))),
    "DCLLoss": (nn.DCLLoss, lambda m: m(X, Y)),
    "DCLWLoss": (nn.DCLWLoss, lambda m: m(X, Y)),
    "DINOLoss": (lambda: nn.DINOLoss(K, 0.02, 0.07, defer_center_update=True), dino),
    "EMPSSLLoss": (nn.EMPSSLLoss, lambda m: m([X, Y])),
    "FroSSLLoss": (nn.FroSSLLoss, lambda m: m([X, Y])),
    "HeldMean": (lambda: HeldMean((D,)), lambda m: m.hold(X.mean(0), N)),
    "HeldRows": (lambda: HeldRows(N, D), lambda m: m.hold(X)),
    "IBOTPatchLoss": (
        lambda: nn.IBOTPatchLoss(K, defer_center_update=True),
        lambda m: m(SCORES[0][:6], SCORES[1][:6], MASK),
    ),
    "GramLoss": (nn.GramLoss, lambda m: m(X[None], Y[None])),
    "KoLeoLoss": (nn.KoLeoLoss, lambda m: m(X)),
    "NNCLRLoss": (lambda: nn.NNCLRLoss(memory_bank_size=(9, D)), lambda m: m(X, Y, Y, X)),
    "SimDINOLoss": (nn.SimDINOLoss, lambda m: m([X], [Y, X])),
    "SMoGPrototypes": (lambda: nn.SMoGPrototypes(Y[:4].clone(), 0.9), groups),
    "LeJEPALoss": (
        lambda: nn.LeJEPALoss(sigreg_num_vectors=3),
        lambda m: torch.manual_seed(0) and m(local_proj=X[None], global_proj=Y[None]),
    ),
    "VISRegLoss": (
        lambda: nn.VISRegLoss(num_slices=3),
        lambda m: torch.manual_seed(0) and m(local_proj=X[None], global_proj=Y[None]),
    ),
    "VISRegLossComponents": (
        lambda: nn.VISRegLoss(num_slices=3),
        lambda m: torch.manual_seed(0) and tuple(m.forward_components(local_proj=X[None], global_proj=Y[None])),
    ),
    "CAPILoss": (nn.CAPILoss, lambda m: m(X[:, None], Y[:, None])),
    "MMCRLoss": (nn.MMCRLoss, lambda m: m(X[:, None], Y[:, None])),
    "MSNLoss": (nn.MSNLoss, lambda m: m(X, Y, drawn(K, D))),
    "PMSNLoss": (nn.PMSNLoss, lambda m: m(X, Y, drawn(K, D))),
    "PMSNCustomLoss": (lambda: nn.PMSNCustomLoss(torch.ones_like), lambda m: m(X, Y, drawn(K, D))),
    "MemoryBankModule": (lambda: nn.MemoryBankModule((9, D), rows_per_step=N), lambda m: m(X, update=True)),
    "NNMemoryBankModule": (lambda: nn.NNMemoryBankModule((9, D)), lambda m: m(X, update=True)),
    "NTXentLoss": (lambda: nn.NTXentLoss(memory_bank_size=(9, D), rows_per_step=N), bank),
    "NegativeCosineSimilarity": (nn.NegativeCosineSimilarity, lambda m: m(X, Y)),
    "Prototypes": (lambda: Prototypes(D, K, 3), lambda m: m(X, torch.tensor(5))),
    "Queue": (lambda: Queue(9, D, held=4), lambda m: (m.push(X), m.hold(X[:4]))),
    "SIGReg": (lambda: nn.SIGReg(num_vectors=3), lambda m: torch.manual_seed(0) and m(X)),
    "SigLipLoss": (nn.SigLipLoss, lambda m: m(X, Y, torch.tensor(2.0), torch.tensor(-1.0))),
    "SupConLoss": (nn.SupConLoss, lambda m: m(torch.stack([X, Y], 1))),
    "SwaVLoss": (nn.SwaVLoss, lambda m: m(SCORES, SCORES)),
    "SwaVPrototypes": (lambda: nn.SwaVPrototypes(D, [K, 3], 2), lambda m: m(X, step=4)[0]),
    "TiCoLoss": (lambda: nn.TiCoLoss(defer_covariance_update=True), tico),
    "VICRegLLoss": (lambda: nn.VICRegLLoss(num_matches=(2, 2)), lambda m: m(MAPS, GRIDS)),
    "VICRegLoss": (lambda: nn.VICRegLoss(track_spectrum=True), lambda m: m(X, Y)),
    "WMSELoss": (lambda: nn.WMSELoss(3, w_size=N), lambda m: torch.manual_seed(0) and m(drawn(2 * N, 3))),
    "Whitening2d": (lambda: nn.Whitening2d(D), lambda m: m(X)),
    "DINOProjectionHead": (lambda: nn.DINOProjectionHead(D, 5, 3, K), lambda m: m.eval()(X)),
}
OF_CALLS = (
    "CoCaLoss", "DetConBLoss", "DetConSLoss", "DirectCLRLoss", "DistillClipLoss", "HypersphereLoss",
    "IBOTPlusPlusPatchLoss", "LeWMLoss", "MACLLoss", "PatchKernelAlignmentLoss", "SymNegCosineSimilarityLoss",
)  # fmt: skip
for name in OF_CALLS:
    CASES[name] = (
        MODULES[name].module,
        lambda m, case=MODULES[name]: torch.manual_seed(0) and case.call(m, *case.make(N)),
    )
CASES |= {
    "CO2Regularizer": (lambda: nn.CO2Regularizer(memory_bank_size=(9, D)), lambda m: m(X, Y)),
    "DSERegularizer": (
        lambda: nn.DSERegularizer(global_clusters=2),
        lambda m: torch.manual_seed(0) and m(drawn(N, 9, D)),
    ),
    "CAPIProjectionHead": (lambda: nn.CAPIProjectionHead(D, K), lambda m: m(X)),
    "DINOv2ProjectionHead": (lambda: nn.DINOv2ProjectionHead(D, 5, 3, K), lambda m: m.eval()(X)),
}
HEADS = [name for name in nn.__all__ if hasattr(heads, name) and name != "ProjectionHead"]
for head in HEADS:
    widths = {"input_dim": D, "hidden_dim": 5, "output_dim": 3}
    CASES[head] = (lambda head=head, widths=widths: getattr(nn, head)(**widths), lambda m: m.eval()(X))


def test_every_public_class_has_a_case():
    classes = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)} - {"ProjectionHead"}
    assert classes <= CASES.keys()


def assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_pickled_copied_and_saved_after_use(name):
    make, use = CASES[name]
    module = make()
    use(module)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    others = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(stored, weights_only=False)]
    again = use(module)
    for other in others:
        assert_same(again, use(other))
        assert_same(list(module.state_dict().values()), list(other.state_dict().values()))
        if getattr(module, "health", None) is not None:
            assert_same(module.health.spectrum(), other.health.spectrum())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_loss_with_learned_temperatures_is_copied(shape):
    learned = torch.nn.Parameter(torch.full(shape, 0.07))
    module = nn.DINOLoss(K, 0.02, learned, student_temp=learned)
    assert_same(copy.deepcopy(module)(SCORES, SCORES, epoch=3), module(SCORES, SCORES, epoch=3))
    torch.testing.assert_close(module.teacher_temp_schedule, torch.linspace(0.02, 0.07, 30))


@pytest.mark.parametrize("name", CASES)
def test_a_module_of_the_meta_device(name):
    """Given memory, which is full of NaN here, and the state of another, it is that one; or it is reset."""
    make, use = CASES[name]
    module = make()
    with torch.device("meta"):
        loaded, fresh = make(), make()
    for other in (loaded, fresh):
        other.to_empty(device="cpu")
        for x in (*other.parameters(), *other.buffers()):
            x.detach().fill_(torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else 12345)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    loaded.load_state_dict(state)
    assert_same(twice(use)(module), twice(use)(loaded))
    assert_same(list(module.state_dict().values()), list(loaded.state_dict().values()))
    for part in fresh.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    result = use(fresh)
    for x in (*fresh.state_dict().values(), *([result] if isinstance(result, Tensor) else [])):
        assert x.isfinite().all()
