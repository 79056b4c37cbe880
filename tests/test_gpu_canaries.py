"""What to know of a new GPU before anything else, in this order: `make gpu-check PART=canaries`, under three minutes.

Each number runs in a process of its own, 3 to 7 with CUDA_LAUNCH_BLOCKING=1, and each docstring says what the canary
decides and what to do where it fails. docs/gpu.md has the list; number 11 are all other tests and the benchmarks.
"""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import test_gpu
import torch
import torch.nn.functional as TF
from cases import (
    LOSSES,
    Case,
    eager_clip,
    eager_info_nce,
    eager_nt_xent,
    eager_prototype_cross_entropy,
    eager_siglip,
    make,
    normal,
)
from conftest import HAS_GPU, Implementation
from test_losses import check_values_and_gradients
from torch import Tensor

import fastjem
import fastjem.functional as F
from fastjem import ops
from fastjem.kernels import tiling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
DEVICE = "cuda"  # tests/test_gpu_canaries_here.py runs them on the CPU, smaller
ROWS = {torch.float32: 66_000, torch.bfloat16: 131_072}
MANY = 70_000  # rows; a grid's second dimension ends at 65,535
STEPS = 30
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def _pair(op: str, call: Callable[..., Tensor], eager: Callable[..., Tensor], factor: float) -> Case:
    """Image and text, 300 x 128: some tiles of rows, of columns and of the width."""

    def inputs(g: torch.Generator) -> list[Tensor]:
        x, y = (TF.normalize(torch.randn(300, 128, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
        return [x, y, torch.tensor(factor).double(), torch.tensor(-10.0).double()][: 3 if op == "clip_loss" else 4]

    differentiable = 3 if op == "clip_loss" else 4
    size = lambda *_: 1.0  # noqa: E731  the factor's gradient is a sum of N^2 terms that cancel
    return Case(op, f"300x128-scale{factor:g}", inputs, call, eager, differentiable, gradient_size=size)


def losses(temperature: float, scale: float) -> dict[str, Case]:
    """The losses on matrix products of the tensor cores, with more than a tile of rows, columns and width."""
    head = next(case for case in LOSSES if str(case).startswith("prototype_head_cross_entropy-2x3x33x700x32"))
    return {
        "nt_xent": Case(
            "nt_xent", f"2x300x128-tau{temperature:g}", make(normal(300, 128), normal(300, 128)),
            lambda *z: F.nt_xent(*z, temperature=temperature),
            lambda *z: eager_nt_xent(*z, temperature=temperature), differentiable=2,
        ),
        "info_nce": Case(
            "info_nce", f"130x2100x128-tau{temperature:g}", make(normal(130, 128), normal(130, 128), normal(2100, 128)),
            lambda *x: F.info_nce(*x, temperature=temperature),
            lambda *x: eager_info_nce(*x, temperature=temperature), differentiable=2,
        ),
        "clip_loss": _pair("clip_loss", F.clip_loss, eager_clip, scale),
        "siglip_loss": _pair("siglip_loss", F.siglip_loss, eager_siglip, scale),
        "prototype_head_cross_entropy": head,
    }  # fmt: skip


LOSS_NAMES = list(losses(0.1, 14.0))


def test_01_installation():
    """fastjem is installed whole here, and each operator that has a Triton kernel would run it. If it fails: nothing
    below counts; `python -m fastjem doctor` says what is missing, and a fallback to plain torch would hide every
    kernel."""
    said = subprocess.run([sys.executable, "-m", "fastjem", "doctor"], capture_output=True, text=True, timeout=80)
    assert said.returncode == 0, said.stdout[-1000:] + said.stderr[-1000:]
    found = ops.implementations()
    wrong = {
        name: found[name]["cuda"] for name, op in ops.OPERATORS.items() if op.gpu and found[name]["cuda"] != "Triton"
    }
    assert not wrong


@pytest.mark.parametrize("name", test_gpu.LOSSES)
def test_02_no_host_sync(name):
    """No loss makes the host wait for the GPU. If it fails: the step is bound by the host; torch's error names the call
    that waits."""
    test_gpu.test_no_host_sync(name)


@pytest.mark.parametrize("name", test_gpu.LOSSES)
def test_02_graph_replay(name):
    """A captured loss computes on new data at each replay. If it fails: no CUDA graphs (`--cuda-graph off`); a number
    of the host's went into the graph."""
    test_gpu.test_graph_replay_computes_on_new_data(name)


def test_02_offsets_past_2_31_elements():
    """Offsets are 64-bit wherever a tensor may have more than 2^31 elements. If it fails: batches stay below that; the
    kernel of the failed line multiplies in int32."""
    test_gpu.test_offsets_past_2_31_elements()


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_03_bf16(name):
    """bf16 value and gradient, on matrix products that have run nowhere before. If it fails: `--precision fp32` until
    it is mended; look at `tl.dot`'s operands first, one of which may be transposed."""
    check_values_and_gradients(losses(0.1, 14.0)[name], torch.bfloat16, DEVICE)


@contextlib.contextmanager
def _by(implementation: str) -> Iterator[None]:
    if implementation == "triton":
        yield
    else:
        with Implementation("reference", DEVICE).active():
            yield


@pytest.mark.parametrize("implementation_name", ["triton", "reference"])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_04_float32_at_low_temperature(name, implementation_name):
    """float32 value and gradient at temperature 0.01 and scale 100. If it fails: triton alone, three TF32 products are
    less exact than thought (`add_product` in kernels/contrastive/tiles.py, `tf32x3` in the head's kernels: `ieee`);
    the reference, too, torch's own product isn't symmetric bit for bit, and no low temperature is safe in float32."""
    with _by(implementation_name):
        check_values_and_gradients(losses(0.01, 100.0)[name], torch.float32, DEVICE)


def test_05_addmm_into_float32():
    """torch adds bf16 products into one float32 tensor twice, of rows that are apart in memory and of their transpose.
    If it fails: `add_product` in kernels/contrastive/gpu_engine.py must widen its operands, at twice the time."""
    if DEVICE == "cpu":
        pytest.skip("CUDA's alone")
    g = torch.Generator(DEVICE).manual_seed(0)
    memory = torch.rand(300, 520, generator=g, device=DEVICE).bfloat16()
    weights = memory[:, :511]  # a row is 520 elements long, of which the last are another's
    rows, columns = (torch.randn(n, 96, generator=g, device=DEVICE).bfloat16() for n in (511, 300))
    left = torch.randn(300, 96, generator=g, device=DEVICE)
    right = torch.randn(511, 96, generator=g, device=DEVICE)
    expected = [
        left.double() + 2 * weights.double() @ rows.double(),
        right.double() + 2 * weights.double().T @ columns.double(),
    ]
    for _ in range(2):
        for out, a, b in ((left, weights, rows), (right, weights.T, columns)):
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    for out, truth in zip((left, right), expected, strict=True):
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "any rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_06_log_sum_exp_of_many_rows(dtype, normalize):
    """At 66,000 rows in float32 and 131,072 in bf16 the log-sum-exp has every column. If it fails: large batches train
    on a wrong loss; the loop over distances in kernels/contrastive/ leaves some out from its second chunk on."""
    count, width, temperature = ROWS[dtype], 64, 0.1
    g = torch.Generator(DEVICE).manual_seed(0)
    signs = torch.randint(2, (2, count // 2, width), generator=g, device=DEVICE) * 2 - 1
    z = (signs / width**0.5).to(dtype)  # 1 / 8: rows of unit length, of which no dtype rounds anything
    _, lse = torch.ops.fastjem.nt_xent(z, z, 0, temperature, False, normalize)
    rows = z.flatten(0, 1)
    places = torch.tensor([0, 1, 127, 128, count // 2, count // 2 + 77, count - 129, count - 1], device=DEVICE)
    chosen = rows[places].double()
    chunks = []
    for start in range(0, count, 16_384):
        logits = chosen @ rows[start : start + 16_384].double().T / temperature
        itself = places[:, None] == torch.arange(start, start + logits.shape[1], device=DEVICE)
        chunks.append(logits.masked_fill(itself, -math.inf).logsumexp(1))
    truth = torch.stack(chunks).logsumexp(0)
    torch.testing.assert_close(lse.flatten()[places].double(), truth, rtol=0, atol=1e-4)


def test_07_prototypes_of_many_rows():
    """The prototypes' cross-entropy takes 70,000 rows. If it fails: a grid has more than 65,535 programs in its second
    dimension; smaller batches run."""
    g = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (
        [torch.randn(MANY, 16, generator=g, device=DEVICE).requires_grad_(i == 0) for _ in range(2)] for i in range(2)
    )
    call = {"student_temperature": 0.2, "teacher_temperature": 0.3}
    loss = F.prototype_cross_entropy(student, teacher, **call)
    exact = [x.detach().double().requires_grad_() for x in student]
    truth = eager_prototype_cross_entropy(exact, [x.double() for x in teacher], "different", None, None)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    ours, theirs = torch.autograd.grad(loss * MANY, student), torch.autograd.grad(truth * MANY, exact)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-5)


def test_07_sinkhorn_of_many_rows():
    """Sinkhorn takes 70,000 rows of 600 scores. If it fails: as above."""
    scores = torch.randn(MANY, 600, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE) / 10
    codes = F.sinkhorn(scores)
    with Implementation("reference", DEVICE).active():
        truth = F.sinkhorn(scores.double())
    torch.testing.assert_close(codes.double(), truth, rtol=1e-3, atol=1e-7)


def small_calls() -> None:
    """What compute-sanitizer watches: the head, a standardisation's gradient in place, a rescale, a teacher's step, and
    gradients of similarities, whose programs read log-sum-exps a whole tile at a time."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE).to(torch.bfloat16).requires_grad_()

    student, w = [rows(33, 96) for _ in range(3)], rows(130, 96)
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    teacher = [x.detach() for x in student[:2]]
    (F.prototype_head_cross_entropy(student, teacher, w, w.detach(), **temperatures) * 0.37).backward()
    a, b = rows(33, 40), rows(33, 40)
    (F.barlow_twins(a, b) * 0.37).backward()
    image, text, scale = rows(33, 96), rows(33, 96), torch.tensor(3.0, device=DEVICE, requires_grad=True)
    for programs in (tiling.PROGRAMS, 1):  # of few rows each block's gradient is several programs', of many one's
        with mock.patch.object(tiling, "PROGRAMS", programs):
            (F.nt_xent(a, b) + F.clip_loss(image, text, scale)).backward()
    weights = [torch.randn(n, generator=g, device=DEVICE) for n in (5, 1000, 70_001)]
    F.ema_update_(weights, [torch.zeros_like(x) for x in weights], 0.9)
    for x in (*student, w, a, b, image, text, scale):
        assert x.grad is not None and x.grad.isfinite().all()
    assert all(x.isfinite().all() for x in weights)


def _watch(tool: str) -> None:
    if not Path(SANITIZER).exists():
        pytest.skip("compute-sanitizer isn't there")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_gpu_canaries; " + (
        "test_gpu_canaries.small_calls()"
    )
    # Without torch's pool of memory, in which what lies beyond a tensor is another one's and so no error.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    said = subprocess.run(line, capture_output=True, text=True, timeout=85, env=environment)
    found = [text for text in said.stdout.splitlines() if text.startswith("=========")]
    if any("not supported" in text for text in found):
        pytest.skip(f"compute-sanitizer can't watch this device: {found[-1]}")
    assert said.returncode == 0, "\n".join([*found[:30], said.stderr[-1000:]])


def test_08a_memory():
    """No kernel of some reads or writes beyond its tensors. If it fails: the report names kernel, address and thread;
    nothing that uses that kernel may be believed."""
    _watch("memcheck")


def test_08b_races():
    """No kernel of these races in shared memory. If it fails: as above, and results may differ from run to run."""
    _watch("racecheck")


def test_09_teacher_in_channels_last():
    """The teacher follows a student whose weights lie otherwise in memory. If it fails: `memory_format` stays
    contiguous; kernels/weights/ema_update.py pairs addresses, not elements."""
    g = torch.Generator(DEVICE).manual_seed(0)
    for of_teacher in (torch.contiguous_format, torch.channels_last):
        for of_student in (torch.contiguous_format, torch.channels_last):
            student = torch.randn(8, 6, 3, 3, generator=g, device=DEVICE).contiguous(memory_format=of_student)
            teacher = torch.randn(8, 6, 3, 3, generator=g, device=DEVICE).contiguous(memory_format=of_teacher)
            expected = 0.75 * teacher + 0.25 * student
            F.ema_update_([teacher], [student], 0.75)
            torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-6)


def test_09_teacher_on_two_streams():
    """An update on a second stream takes what the first one wrote, and the table of addresses is there. If it fails:
    the table's copy belongs to the wrong stream; update on the step's stream alone."""
    if DEVICE == "cpu":
        pytest.skip("streams are a GPU's")
    other = torch.cuda.Stream()
    for n in (1000, 70_001):
        teacher, student = torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)
        busy = torch.randn(4096, 4096, device=DEVICE)
        for _ in range(4):
            busy = busy @ busy / 64
        student += 4
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            F.ema_update_([teacher], [student], 0.75)
        torch.cuda.current_stream().wait_stream(other)
        F.ema_update_([teacher], [student], 0.75)
        assert torch.equal(teacher, torch.full_like(teacher, 1.75))


def test_09_teacher_in_a_captured_step():
    """Within a captured step the teacher follows at each replay. If it fails: no teacher in a CUDA graph."""
    if DEVICE == "cpu":
        pytest.skip("graphs are a GPU's")
    teacher, student = ([torch.zeros(n, device=DEVICE) for n in (5, 70_001)] for _ in range(2))

    def step() -> None:
        for x in student:
            x += 4
        F.ema_update_(teacher, student, 0.75)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x in (*teacher, *student):
        x.zero_()
    graph.replay()
    graph.replay()
    assert all(torch.equal(x, torch.full_like(x, 0.75 * 1 + 2)) for x in teacher)
    test_gpu.test_ema_update_in_a_graph_follows_its_momentum()


class Pictures:
    """Waves of six kinds, as pixels."""

    def __len__(self) -> int:
        return 96

    def read(self, i: int) -> np.ndarray:
        y, x = np.mgrid[:40, :40] / 40
        wave = np.sin(x * (3 + 4 * (i % 6)) + y * (i % 7))[..., None] * [90, 60, 40] + 120
        return (wave + np.random.default_rng(i).normal(0, 8, wave.shape)).clip(0, 255).astype(np.uint8)


def convnet() -> torch.nn.Module:
    """With weights of 1 x 1, whose strides say nothing of their layout."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def _pretrain(method: str, **options: Any) -> None:
    pytest.importorskip("PIL", reason="pretrain needs Pillow, which isn't there")
    with tempfile.TemporaryDirectory() as folder:
        result = fastjem.pretrain(
            source=Pictures(), encoder=convnet(), method=method, out=f"{folder}/run", image_size=32, batch_size=16,
            epochs=math.ceil(STEPS / 6), max_steps=STEPS, device=DEVICE, workers=2, log_every=1, knn_every=0,
            report=False, **options,
        )  # fmt: skip
        assert result.finished and result.steps == STEPS
        assert math.isfinite(result.metrics["loss"]), result.metrics


@pytest.mark.parametrize("method", ["simclr", "dino", "moco"])
def test_10a_pretrain(method):
    """Thirty steps of a run from images to a finite loss and a checkpoint. If it fails: the step, not a kernel, once 3
    to 9 are well: loader, precision, optimiser, schedule."""
    _pretrain(method)


def test_10b_compiled():
    """The same under torch.compile. If it fails: without `--compile`."""
    _pretrain("simclr", compile=True)


def test_10c_convnet_with_fused_adamw():
    """The same of a ConvNet with AdamW, whose weights of 1 x 1 have two layouts at once (pytorch#110758). If it fails:
    another optimiser than `adamw` under `--compile`."""
    _pretrain("simclr", compile=True, optimizer="adamw")


def test_10d_as_a_graph():
    """Each step of a run is one CUDA graph, while the loader's threads pin and figures are solved beside it. If it
    fails: `--cuda-graph off`; the message says what can't be captured, or which losses the step and its graph have."""
    _pretrain("simclr", cuda_graph="on")
