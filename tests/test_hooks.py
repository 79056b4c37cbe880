"""Subclasses, replaced parts and edge arguments of lightly's and open_clip's classes do here what they do there."""

import math

import lightly.loss as theirs
import pytest
import torch
from lightly.loss import msn_loss, pmsn_loss, swav_loss
from lightly.models import utils
from lightly.models.modules.center import Center as TheirCenter
from torch import Tensor
from torch.nn import functional

import fastjem.functional as F
import fastjem.nn as ours
from fastjem.nn import tokens

N, D, K = 6, 5, 7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(mine, other, *inputs: Tensor) -> None:
    """Value and gradients."""
    results = []
    for module in (mine, other):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = module(*leaves)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.reshape(b.shape), b)


REDUCTIONS = [{"reduction": "none"}, {"reduction": "sum"}, {"label_smoothing": 0.1}]


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("bank", [0, (9, D)], ids=str)
def test_nt_xents_cross_entropy_may_be_another(bank, options):
    mine, other = ours.NTXentLoss(0.2, bank).double(), theirs.NTXentLoss(0.2, bank).double()
    if bank:
        mine.memory_bank.bank.copy_(other.memory_bank.bank)
    for module in (mine, other):
        module.cross_entropy = torch.nn.CrossEntropyLoss(**options)
    assert_same(mine, other, drawn(N, D), drawn(N, D, seed=1))
    if bank:
        torch.testing.assert_close(mine.memory_bank.bank, other.memory_bank.bank)


def test_a_hook_of_nt_xents_cross_entropy_is_called():
    loss = ours.NTXentLoss()
    seen = []
    loss.cross_entropy.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert_same(loss, theirs.NTXentLoss(), drawn(N, D), drawn(N, D, seed=1))
    assert seen == [(2 * N, 2 * N - 1)]


@pytest.mark.parametrize("sinkhorn_iterations", [0, 3])
def test_msns_regulariser_may_be_another(sinkhorn_iterations):
    options = {"sinkhorn_iterations": sinkhorn_iterations, "regularization_weight": 0.7}

    class Power(ours.MSNLoss):
        regularization_loss = pmsn_loss.PMSNLoss.regularization_loss
        power_law_exponent = 0.25

    inputs = drawn(3 * N, D), drawn(N, D, seed=1), drawn(K, D, seed=2)
    assert_same(Power(**options), pmsn_loss.PMSNLoss(**options), *inputs)
    mine, other = ours.MSNLoss(**options), msn_loss.MSNLoss(**options)
    assert_same(mine, other, *inputs)
    p = drawn(K).softmax(0)
    torch.testing.assert_close(mine.regularization_loss(p), other.regularization_loss(p))
    mine.regularization_loss = lambda mean_anchor_probs: mean_anchor_probs.square().sum()  # of the instance
    other.regularization_loss = mine.regularization_loss
    assert_same(mine, other, *inputs)


def swav(module, queues=None):
    return lambda *views: module(views[:2], views[2:], queues)


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_swav_by_its_subloss_and_without_iterations(iterations, with_queue):
    def squared(self, z, q):
        return (z / self.temperature - q).square().mean()

    queues = [drawn(4, K, seed=8 + i) for i in range(2)] if with_queue else None
    options = {"sinkhorn_iterations": iterations, "sinkhorn_epsilon": 0.4}
    views = [drawn(N, K, seed=i) for i in range(4)]
    assert_same(swav(ours.SwaVLoss(**options), queues), swav(theirs.SwaVLoss(**options), queues), *views)
    mine = type("Mine", (ours.SwaVLoss,), {"subloss": squared})(**options)
    other = type("Other", (theirs.SwaVLoss,), {"subloss": squared})(**options)
    assert_same(swav(mine, queues), swav(other, queues), *views)
    same = type("Same", (ours.SwaVLoss,), {"subloss": lambda self, z, q: ours.SwaVLoss.subloss(self, z, q)})(**options)
    assert_same(swav(same, queues), swav(theirs.SwaVLoss(**options), queues), *views)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_sinkhorns_iterations(iterations):
    scores = drawn(N, K)
    mine = ours.sinkhorn(scores, iterations=iterations, epsilon=0.3)
    torch.testing.assert_close(mine, swav_loss.sinkhorn(scores.clone(), iterations=iterations, epsilon=0.3))
    probabilities = (scores / 0.3).softmax(1)
    mine = F.sinkhorn(scores, epsilon=0.3, iterations=iterations, normalize_samples_first=True)
    torch.testing.assert_close(mine, msn_loss.sinkhorn(probabilities, iterations=iterations))
    assert F.sinkhorn(scores * 1e4, iterations=0).isfinite().all()  # in the log domain


def test_centre():
    for size, shape in (((1, K), (N, K)), ((1, 1, K), (2, N, K)), ((1, 1, K), (N, K))):
        mine, other = ours.Center(size).double(), TheirCenter(size).double()
        for step in range(2):
            for module in (mine, other):
                module.update(drawn(*shape, seed=step))
            torch.testing.assert_close(mine.value, other.value)
    with pytest.raises(ValueError, match=r"Center: x must have the dimensions of the centre \(1, 1, 7\), got \(7,\)"):
        mine.update(drawn(K))


def test_a_centre_that_an_ibot_loss_is_given():
    class Still(ours.Center):
        def update(self, x: Tensor) -> None:
            self.center.fill_(len(x))

    loss = ours.IBOTPatchLoss(K).double()
    loss.center = Still((1, K)).double()
    loss(drawn(N, K), drawn(N, K, seed=1), torch.ones(1, 2, 3, dtype=torch.bool))
    assert (loss.center.value == N).all()


def test_koleo_by_another_distance():
    for mine, other in ((ours.KoLeoLoss(), theirs.KoLeoLoss()), (ours.KoLeoLoss(eps=0), theirs.KoLeoLoss(eps=0))):
        assert_same(mine, other, drawn(N, D))
        for module in (mine, other):
            module.pairwise_distance = torch.nn.PairwiseDistance(p=1)
        assert_same(mine, other, drawn(N, D))


def clip_reference(x, y, scale, labels, bias=0.0):
    logits = scale * x @ y.T + bias
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def test_clips_logits_and_labels_may_be_others():
    x, y, scale = drawn(N, D), drawn(N, D, seed=1), torch.tensor(3.0, dtype=torch.float64)

    class Shifted(ours.ClipLoss):
        def get_ground_truth(self, device, num_logits):
            return super().get_ground_truth(device, num_logits).roll(1)

    class Doubled(ours.ClipLoss):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            return tuple(2 * logits for logits in super().get_logits(image_features, text_features, logit_scale))

    labels = torch.arange(N)
    assert_same(Shifted(), lambda *z: clip_reference(*z, labels.roll(1)), x, y, scale)
    assert_same(Doubled(), lambda a, b, s: clip_reference(a, b, 2 * s, labels), x, y, scale)
    assert_same(ours.ClipLoss(), lambda *z: clip_reference(*z, labels), x, y, scale)
    assert Shifted()(x, y, scale, output_dict=True).keys() == {"contrastive_loss"}

    def siglip(labels):
        return lambda a, b, s, t: -functional.logsigmoid(labels * (s * a @ b.T + t)).sum() / N

    class Negative(ours.SigLipLoss):
        def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
            return super().get_ground_truth(device, dtype, num_logits, negative_only=True)

    bias = torch.tensor(-2.0, dtype=torch.float64)
    assert_same(Negative(), siglip(-torch.ones(N, N, dtype=torch.float64)), x, y, scale, bias)
    assert_same(ours.SigLipLoss(), siglip(2 * torch.eye(N, dtype=torch.float64) - 1), x, y, scale, bias)


REFUSED = [
    (ours.DCLLoss, "_loss"),
    (ours.DCLWLoss, "_loss"),
    (ours.SigLipLoss, "_loss"),
    (ours.SIGReg, "_generate_unit_vectors"),
    (ours.VICRegLLoss, "_local_loss"),
    (ours.MemoryBankModule, "_dequeue_and_enqueue"),
    (ours.NNMemoryBankModule, "_init_memory_bank"),
    (ours.DINOProjectionHead, "_init_weights"),
]


@pytest.mark.parametrize("base, name", REFUSED, ids=[f"{base.__name__}.{name}" for base, name in REFUSED])
def test_what_nothing_calls_cannot_be_overridden(base, name):
    with pytest.raises(TypeError, match=f": nothing calls {name}, which Mine overrides; "):
        type("Mine", (base,), {name: lambda self, *inputs: None})
    type("Mine", (base,), {"forward": lambda self, *inputs: None, "other": None})


def test_one_mask_is_a_list_of_one():
    x, index = drawn(2, 9, D), torch.tensor([[1, 4], [8, 0]])
    for masks in (index, [index], [index, index.flip(0)]):
        torch.testing.assert_close(tokens.apply_masks(x, masks), utils.apply_masks(x, masks))


def test_tico_needs_two_rows():
    with pytest.raises(ValueError, match="TiCoLoss: z_a and z_b must have N >= 2 rows, for a covariance, got N = 1"):
        ours.TiCoLoss()(drawn(1, D), drawn(1, D))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dclw_computes_its_weights_in_float32(dtype):
    x, y = (drawn(16, D, seed=i).to(dtype) for i in range(2))
    expected = theirs.DCLWLoss()(x.double(), y.double())
    assert math.isclose(ours.DCLWLoss()(x, y), expected, rel_tol=1e-6)
    assert math.isclose(F.dclw(x, y), expected, rel_tol=1e-6)
    learned = ours.DCLLoss(weight_fn=lambda a, b: 1 + (a * b).sum(1))
    other = theirs.DCLLoss(weight_fn=lambda a, b: 1 + (a * b).sum(1))
    assert math.isclose(learned(x.requires_grad_(), y), other(x.double(), y.double()), rel_tol=1e-6)


def test_cosine_without_eps():
    x, y = drawn(N, D), drawn(N, D, seed=1)
    assert_same(ours.NegativeCosineSimilarity(eps=0), theirs.NegativeCosineSimilarity(eps=0), x, y)
