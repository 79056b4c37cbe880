"""The peers that run on a GPU alone, in `fastjem bench`: how they are called, held against their signatures.

Where a package isn't installed, a stand-in of the same signature takes its place, which computes what the package says
that it does, in plain torch. Where it is, its signature is compared with the stand-in's.
"""

import importlib
import inspect
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from fastjem.bench import report
from fastjem.bench.case import Case
from fastjem.bench.cases import augment, contrastive, neighbors
from fastjem.bench.clocks import Call, copied
from fastjem.commands import bench as command

CPU = torch.device("cpu")


class MemoryEfficientCLIPLoss(torch.nn.Module):  # memeff 0.3.1
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
        super().__init__()
        assert not stable and not tau_plus and not label_smoothing  # else it isn't CLIP's loss
        self.temperature, self.normalized_inputs = temperature, normalized_inputs

    def forward(self, image_features, text_features, tau_plus=None):
        x, y = image_features, text_features
        if not self.normalized_inputs:
            x, y = TF.normalize(x, dim=1), TF.normalize(y, dim=1)
        logits, pairs = x.float() @ y.float().T / self.temperature, torch.arange(len(x))
        return (TF.cross_entropy(logits, pairs) + TF.cross_entropy(logits.T, pairs)) / 2


class MemoryEfficientQwen3Loss(torch.nn.Module):  # memeff 0.3.1
    def __init__(
        self, temperature=0.07, margin=0.1, use_qq_negatives=False, use_dd_negatives=False, normalized_inputs=False,
        stable=True, tau_plus=0.0, label_smoothing=0.0,
    ):  # fmt: skip
        super().__init__()
        assert not stable and margin >= 2 and not (use_qq_negatives or use_dd_negatives or tau_plus or label_smoothing)
        self.temperature, self.normalized_inputs = temperature, normalized_inputs

    def forward(self, query_features, doc_features, hard_negative_features=None, tau_plus=None):
        q, d = query_features, doc_features
        if not self.normalized_inputs:
            q, d = TF.normalize(q, dim=-1), TF.normalize(d, dim=-1)
        return TF.cross_entropy(q.float() @ d.float().T / self.temperature, torch.arange(len(q)))


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
    """siglip-kernel 0.1.2"""
    logits = img_features.float() @ txt_features.float().T * log_temperature.exp() + bias
    labels = 2 * torch.eye(len(logits)) - 1
    return -TF.logsigmoid(labels * logits).sum() / len(logits)


def batch_kmeans_Cosine(x, n_clusters, max_iters=100, tol=0.0, init_centroids=None, verbose=False):
    """flash-kmeans 0.3.1"""
    rows, centroids = TF.normalize(x, dim=-1), TF.normalize(init_centroids, dim=-1)
    for _ in range(max_iters):
        ids = cosine_assign_triton(rows, centroids)
        sums = torch.zeros_like(centroids[0]).index_add_(0, ids[0].long(), rows[0])
        counts = torch.bincount(ids[0], minlength=n_clusters)
        centroids = TF.normalize(torch.where(counts[:, None] > 0, sums, centroids[0]), dim=-1)[None]
    return ids, centroids, max_iters


def cosine_assign_triton(x, centroids, out=None, *, BLOCK_N=128, BLOCK_K=128):
    """flash-kmeans 0.3.1"""
    assert x.dtype == centroids.dtype and x.shape[0] == centroids.shape[0] and x.dim() == 3
    return (x @ centroids.mT).argmax(-1).int()


def fused_augment(
    image, top, left, height, width, flip_horizontal=False, angle=0.0, translate=[0.0, 0.0], scale=1.0,  # noqa: B006
    shear=[0.0, 0.0], interpolation="nearest", fill=0.0, center=None, brightness_factor=1.0, contrast_factor=1.0,  # noqa: B006
    saturation_factor=1.0, grayscale=False, mean=None, std=None,
):  # fmt: skip
    """triton-augment 0.3.0"""
    assert image.dim() == 4 and image.is_contiguous() and image.is_floating_point() and contrast_factor == 1.0
    assert all(x.shape == image.shape[:1] and x.is_contiguous() for x in (brightness_factor, saturation_factor))
    assert (top, left, height, width) == (0, 0, *image.shape[2:])

    def each(x: Tensor) -> Tensor:
        return x[:, None, None, None]

    def grey(x: Tensor) -> Tensor:
        return (x * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)

    x = torch.where(each(flip_horizontal), image.flip(3), image)
    x = (x * each(brightness_factor)).clamp(0, 1)
    x = (x * each(saturation_factor) + grey(x) * (1 - each(saturation_factor))).clamp(0, 1)
    x = torch.where(each(grayscale), grey(x), x)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


STAND_INS = {
    "memeff": [MemoryEfficientCLIPLoss, MemoryEfficientQwen3Loss],
    "siglip_kernel": [fused_siglip_loss],
    "flash_kmeans": [batch_kmeans_Cosine],
    "flash_kmeans.assign_euclid_triton": [cosine_assign_triton],
    "triton_augment": [],
    "triton_augment.functional": [fused_augment],
}


@pytest.fixture
def stand_ins(monkeypatch):
    for name, functions in STAND_INS.items():
        module = ModuleType(name)
        module.__path__ = []
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


def small(case: Case) -> Case:
    """In float32, as the formulas agree further there."""
    return replace(case, dtype=torch.float32, devices=("cpu",))


CASES = {
    "memeff": [
        contrastive.fixed_clip_case(40, 24, torch.float32),
        contrastive.in_batch_case(40, 24, torch.float32),
    ],
    "siglip-kernel": [contrastive.image_text_case("siglip_loss", 40, 24, devices=("cuda",))],
    "flash-kmeans": [neighbors.kmeans_case(200, 7, 12, devices=("cuda",))],
    "triton-augment": [augment.case(5, 16, simple=True)],
}


@pytest.mark.parametrize("case", [case for of in CASES.values() for case in of], ids=lambda case: case.name)
def test_a_peer_computes_what_ours_does(case, stand_ins):
    (peer,) = case.peers
    variants, absent = case.variants(compiled=False)
    assert not absent and set(variants) == {"eager", peer, "ours"}
    inputs = case.draw(CPU)
    verify = case.verifier(inputs)
    for function in (variants[peer], variants["ours"]):
        verify(Call(function, copied(inputs)).outputs())


@pytest.mark.parametrize("name", STAND_INS)
def test_signatures_are_the_packages(name):
    for function in STAND_INS[name]:
        try:
            real = getattr(importlib.import_module(name), function.__name__)
        except Exception as error:  # some look for a GPU when they are imported
            pytest.skip(f"{name}: {error}")
        both = (
            [(real, function)]
            if inspect.isfunction(real)
            else [(real.__init__, function.__init__), (real.forward, function.forward)]
        )
        for theirs, ours in both:
            assert [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()] == [
                (p.name, p.default) for p in inspect.signature(ours).parameters.values()
            ]


def test_peers_of_a_gpu_are_in_its_cases_alone():
    from fastjem.bench.cases import cases

    found = {peer: {case.devices for case in cases() if peer in case.peers} for peer in CASES}
    assert found == {peer: {("cuda",)} for peer in CASES}


def test_what_is_not_installed_or_left_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "memeff", None)
    _, absent = CASES["memeff"][0].variants(compiled=False)
    assert absent["memeff"].startswith("not installed")
    case = augment.case(2, 16)
    _, absent = case.variants(compiled=False, loops=False)
    assert absent["torchvision"].startswith("left out")
    variants, _ = case.variants(compiled=False)
    assert "torchvision" in variants
    row = {"variants": {}, "absent": {"memeff": "not installed (x)", **absent, "eager": "MemoryError"}, "wrong": []}
    shown = [report._compared(row, other, True) for other in ("memeff", "torchvision", "eager")]
    assert shown == ["not installed", "left out", "-"]


@pytest.mark.parametrize(
    ("device", "words", "compiled", "loops"),
    [
        ("cpu", [], True, True),
        ("cpu", ["--quick"], False, True),
        ("cpu", ["--no-compile"], False, True),
        ("cpu", ["--quick", "--compile"], True, True),
        ("cuda", [], False, False),
        ("cuda", ["--compile"], True, False),
        ("cuda", ["--loops"], False, True),
    ],
)
def test_on_a_gpu_what_takes_minutes_is_asked_for(device, words, compiled, loops, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "measure", lambda case, device, ceilings, *of, **limits: asked.append(of) or {})
    options = command.parser().parse_args(words)
    monkeypatch.setattr(
        torch, "compile", lambda function: pytest.fail("no compiler here") if not compiled else function
    )
    monkeypatch.setattr(torch, "ones", lambda *_, **__: 1)
    list(command._measured(options, torch.device(device), CASES["memeff"], None))
    assert asked == [(compiled, loops)] * 2


def test_results_are_written_after_each_case(monkeypatch, tmp_path):
    """So that what kills the process leaves the rows before."""
    names = "sinkhorn .* fp32"
    done = []

    def measure(case, device, ceilings, *_, **__):
        if len(done) == 2:
            (file,) = tmp_path.glob("*.json")
            assert [row["shape"] for row in report.load(file)["rows"]] == done
            raise SystemExit("killed")
        done.append(case.shape)
        from fastjem.bench.timing import Comparison

        return command.row(case, device, Comparison({}, {"ours": "not measured"}, []), ceilings)

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(
        command.machine, "ceilings", lambda *_: command.machine.Ceilings({1000: 10.0}, {"float32": 1.0})
    )
    with pytest.raises(SystemExit, match="killed"):
        command.main(["--device", "cpu", "--no-compile", "--full", "--filter", names, "--out", str(tmp_path)])
    assert len(done) == 2 and list(tmp_path.glob("*.md"))
