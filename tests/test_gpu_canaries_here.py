"""The canaries' own code on the CPU, smaller: on the day of the first GPU it isn't to be what fails.

Left out are those of a GPU alone: no host sync, graphs, offsets past 2^31, compute-sanitizer.
"""

import contextlib
import re
from collections import Counter
from pathlib import Path

import gpu_check
import pytest
import specialisations
import test_gpu_canaries as canaries
import torch
from conftest import Implementation

# With FASTJEM_SPECIALISE=1 they tell what they would compile, as the tests with the mark do.
pytestmark = pytest.mark.gpu if specialisations.wanted() else []


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, one_thread):
    monkeypatch.setattr(canaries, "DEVICE", "cpu")
    monkeypatch.setattr(canaries, "ROWS", {torch.float32: 1200, torch.bfloat16: 1200})
    monkeypatch.setattr(canaries, "MANY", 300)
    monkeypatch.setattr(canaries, "STEPS", 3)
    with Implementation("triton").active() if specialisations.wanted() else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("name", canaries.LOSS_NAMES)
def test_03_bf16(name):
    canaries.test_03_bf16(name)


@pytest.mark.parametrize("implementation_name", ["triton", "reference"][: 1 if specialisations.wanted() else 2])
@pytest.mark.parametrize("name", canaries.LOSS_NAMES)
def test_04_float32_at_low_temperature(name, implementation_name):
    canaries.test_04_float32_at_low_temperature(name, implementation_name)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", canaries.ROWS)
def test_06_log_sum_exp_of_many_rows(dtype, normalize):
    canaries.test_06_log_sum_exp_of_many_rows(dtype, normalize)


def test_06_sees_a_missing_distance(monkeypatch):
    """A log-sum-exp without 128 of the rows, as the fault of 2026-11 left it."""
    operator = torch.ops.fastjem.nt_xent

    def without_some(rows, *rest):
        _, lse = operator(rows[:, 64:].contiguous(), rows[:, 64:].contiguous(), *rest[1:])
        return None, torch.cat([lse[:, :64], lse], 1)

    monkeypatch.setattr(torch.ops.fastjem, "nt_xent", without_some)
    with pytest.raises(AssertionError, match="not close"):
        canaries.test_06_log_sum_exp_of_many_rows(torch.float32, True)


def test_07_many_rows():
    canaries.test_07_prototypes_of_many_rows()
    canaries.test_07_sinkhorn_of_many_rows()


def test_08_small_calls():
    canaries.small_calls()


def test_09_teacher_in_channels_last():
    canaries.test_09_teacher_in_channels_last()


@pytest.mark.parametrize("method", ["simclr", pytest.param("dino", marks=pytest.mark.exhaustive), "moco"])
def test_10_pretrain(method):
    canaries.test_10a_pretrain(method)


def test_every_canary_decides_something():
    """Each belongs to one process of gpu_check.py, and says what it decides and what follows."""
    functions = {name: of for name, of in vars(canaries).items() if re.match(r"test_\d", name)}
    of_process = Counter(only for name in functions for only, _ in gpu_check.CANARIES if name.startswith(only))
    assert sum(of_process.values()) == len(functions) and set(of_process) == {only for only, _ in gpu_check.CANARIES}
    for name, function in functions.items():
        assert " If it fails: " in " ".join(function.__doc__.split()), name
    page = (Path(canaries.__file__).parents[1] / "docs" / "gpu.md").read_text()
    for number in {int(name[5:7]) for name in functions}:
        assert re.search(rf"^\| {number} \|", page, re.M), number
