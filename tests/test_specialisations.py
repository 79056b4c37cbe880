"""What a GPU that has never run the tests would compile for them: how many kernels, and for how long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import specialisations
import torch
from specialisations import needed, of_two_halves, specialising

import fastjem.functional as F
from fastjem.ops import direct

# Ratchets: whoever takes a constant out of a kernel, or a shape out of a test, lowers them.
# InfoNCE's and SigLIP's whole losses, and layouts of floats' colours, brought 226 kernels, SupCon's loss 68; masks,
# large squares of covariances and logits that grow 48. Steps of whole methods (test_waits.py, test_step_graph.py),
# which are made on a GPU alone, aren't counted.
KERNELS, LAUNCHERS = 1767, 392  # a launcher for each list of argument types: run-time numbers and tuples have more
SECONDS = 125  # on 12 cores; gpu-check's tests have 180
CANARY_SECONDS = 60  # of the canary that compiles most; all have 170


@pytest.fixture
def asked():
    """The kernels and launchers of what runs in the test, as `pytest -p specialisations` collects them."""
    for names in needed.values():
        names.clear()
    with direct.off(), torch.library._scoped_library("fastjem", "IMPL") as library, specialising():
        specialisations.register(library)
        yield needed
    for names in needed.values():
        names.clear()


def _names(asked: dict[str, set[str]]) -> list[str]:
    return sorted(name.split()[0] for name in asked["kernels"])


def test_kernels_are_counted_once_for_each_specialisation(asked):
    labels = torch.arange(6)
    for _ in range(2):
        x = torch.randn(6, 48, requires_grad=True)
        loss = F.cross_entropy(x, labels)
        loss.backward()
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, labels))  # the reference's value
    assert _names(asked) == ["_cross_entropy_kernel", "_mean_kernel", "_rescale_kernel"]
    kernels = len(asked["kernels"])
    F.cross_entropy(torch.randn(6, 48, dtype=torch.bfloat16), labels)
    assert len(asked["kernels"]) == kernels + 1  # of another dtype, and without a gradient


def test_a_launcher_serves_kernels_of_the_same_arguments(asked):
    """It knows the types of arguments alone, not what they are divisible by, nor constants' values."""
    for width in (48, 51, 2000):
        F.cross_entropy(torch.randn(6, width), torch.arange(6))
    assert len(asked["kernels"]) == 4  # three widths, and the mean
    assert len(asked["launchers"]) == 2


def test_a_kernel_that_is_asked_for_compiles(asked):
    F.negative_cosine(torch.randn(4, 32), torch.randn(4, 32))
    (name,) = (name for name in asked["kernels"] if name.startswith("_total_kernel"))
    assert "ptx" in specialisations.sources[name].compile().asm


def test_sizes_of_one_compile(asked, monkeypatch):
    """Triton makes an argument of 1 a constant, which has no methods: `(K * ALIGN).to(...)` failed."""
    monkeypatch.setattr(specialisations, "compiles", True)
    labels, rows = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    F.cross_entropy(torch.randn(3, 1, requires_grad=True), labels, label_smoothing=0.1).backward()
    F.regression(torch.randn(3, 1, requires_grad=True), torch.randn(3, 1)).backward()
    F.regression(torch.randn(3, 1, requires_grad=True), torch.randn(3, 1), rows=rows, weights=torch.ones(3)).backward()
    F.crop_resize(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), window(), size=1)
    assert len(asked["kernels"]) >= 4


def window() -> torch.Tensor:
    """Parameters of a view that is the whole image of one pixel."""
    return torch.tensor([[0.0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]])


def test_the_launcher_writes_into_copies():
    x = torch.zeros(3)
    both = of_two_halves(lambda x, many: (x.add_(1), many[0].add_(1)), lambda x, many: x + many[0])
    assert torch.equal(both(x, [x]), torch.zeros(3)) and torch.equal(x, torch.zeros(3))


def test_seconds_are_those_of_the_last_process():
    rows = [
        {"group": "a", "kernels": ["1", "2"], "launchers": ["x"]},
        {"group": "a", "kernels": ["2", "3"], "launchers": ["x"]},
        {"group": "b", "kernels": ["3"], "launchers": ["x"]},
    ]
    kernel, launcher = specialisations.KERNEL_SECONDS, specialisations.LAUNCHER_SECONDS
    assert specialisations.seconds(rows, 1) == pytest.approx(3 * kernel + launcher)  # nothing twice
    assert specialisations.seconds(rows, 2) == pytest.approx(3 * kernel + launcher)  # "b" is done meanwhile


def _found(files: list[str], folder: Path, *words: str) -> list[dict]:
    """What the tests of these files need; that one fails for what the reference differs in is nothing here."""
    lines = folder / "needed.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "specialisations"]
    environment = {**os.environ, "FASTJEM_SPECIALISE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--needed", str(lines), *words, *files], env=environment, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in lines.read_text().splitlines()]


@pytest.mark.exhaustive
def test_gpu_tests_need_no_more_kernels(tmp_path):
    files = gpu_check.files_with_gpu_tests(Path(__file__).parent)
    rows = _found(files, tmp_path, "-m", "gpu and not exhaustive")
    assert len(rows) > 1000  # on a GPU there are as many again of the reference, which compiles nothing
    kernels = {name for row in rows for name in row["kernels"]}
    launchers = {name for row in rows for name in row["launchers"]}
    assert len(kernels) <= KERNELS and len(launchers) <= LAUNCHERS, (len(kernels), len(launchers))
    assert (took := specialisations.seconds(rows, 12)) <= SECONDS, took


@pytest.mark.exhaustive
def test_canaries_compile_within_their_time(tmp_path):
    here = Path(__file__).parent / "test_gpu_canaries_here.py"
    rows = _found([str(here)], tmp_path, "-m", "gpu")
    by_number: dict[str, list[dict]] = {}
    for row in rows:
        by_number.setdefault(row["test"].partition("::test_")[2][:2], []).append(row | {"group": ""})
    took = {number: specialisations.seconds(of, 1) for number, of in by_number.items()}
    assert {"03", "04", "06", "07", "08", "09"} <= set(took)
    assert max(took.values()) <= CANARY_SECONDS, took
