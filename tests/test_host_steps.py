"""`fastjem bench --steps` leaves model and loss out, counts the rest, and writes what it found. No test here depends on
how long anything takes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastjem import step_graph, stepping
from fastjem.bench import step_report
from fastjem.capture import BrokenError
from fastjem.commands import host_steps
from fastjem.commands.bench import main
from fastjem.commands.tiny_runs import tiny_run
from fastjem.errors import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_model_and_loss_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that takes 100 s of model and loss and 1 s of the optimiser, 1 s is the host's around it."""
    clock = Clock()
    monkeypatch.setattr(host_steps, "time", clock)
    real = stepping.forward_backward

    def slow(*given: Any, **options: Any) -> Any:
        clock.now += 100
        return real(*given, **options)

    monkeypatch.setattr(stepping, "forward_backward", slow)
    with tiny_run("byol", CPU) as (training, batch):
        take = training.optimizer.step

        def updates(*given: Any, **options: Any) -> Any:
            clock.now += 1
            return take(*given, **options)

        monkeypatch.setattr(training.optimizer, "step", updates)
        before = [p.clone() for p in training.step.parameters()]
        found = host_steps.taken_apart(training, batch, budget=0, rounds=3)
    assert found == {"whole": [101.0] * 3, "around": [1.0] * 3, "batch": [0.0] * 3}
    assert not all(map(torch.equal, before, training.step.parameters())), "the steps are real ones"


def test_model_and_loss_arent_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_run("moco", CPU) as (training, batch):
        host_steps.step(stepping.Work(training), 0, batch)
        expected = host_steps.counted(training, batch, 1)
        real = stepping.forward_backward

        def more(*given: Any, **options: Any) -> Any:
            torch.ones(3).add(1)
            return real(*given, **options)

        monkeypatch.setattr(stepping, "forward_backward", more)
        assert host_steps.counted(training, batch, 2) == expected
        ends = training.step.step_ends
        monkeypatch.setattr(training.step, "step_ends", lambda *given: (torch.ones(3).add_(1), ends(*given)))
        beside = host_steps.counted(training, batch, 3)
    assert beside["operators"] == expected["operators"] + 2
    assert beside["allocations"] == expected["allocations"] + 1  # `add_` makes none
    assert beside["python_calls"] == expected["python_calls"] + 2


def test_rows_are_written_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path), "--filter"]
    assert main([*words, "step simclr$"]) == 0
    capsys.readouterr()
    assert main([*words, "step (byol|clip)$"]) == 0
    table = capsys.readouterr().out
    assert "\nbyol" in table and "\nsimclr" not in table
    (data,) = tmp_path.glob("host-*.json")
    rows = {row["method"]: row for row in json.loads(data.read_text())["rows"]}
    assert list(rows) == ["simclr", "byol", "clip"]
    for row in rows.values():
        assert row["steps"] == 2 and row["operators"] > 20 and row["python_calls"] > 20 * row["parameters"]
        assert 0 < row["around"]["minimum"] <= row["around"]["median"]
    page = data.with_suffix(".md").read_text()
    assert all(f"| {name}" in page for name in rows)


def test_check_fails_where_the_goal_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "--rounds", "2", "--device", "cpu", "--filter", "simsiam", "--check"]
    monkeypatch.setattr(step_report, "GOAL", 1e9)
    assert main(words) == 0
    assert "for each of 1 methods" in capsys.readouterr().out
    monkeypatch.setattr(step_report, "GOAL", 0.0)
    assert main(words) == 1
    assert "around model and loss: simsiam (" in capsys.readouterr().out


def test_a_method_whose_encoder_isnt_there_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(step_report, "GOAL", 1e9)
    assert main(["--steps", "--rounds", "2", "--device", "cpu", "--filter", "mae|supcon", "--check"]) == 0
    said = capsys.readouterr().out
    assert "Not timed: mae: ModuleNotFoundError" in said and "Not timed: supcon" not in said


def test_a_method_that_fails_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(host_steps, "taken_apart", fails)
    assert main(["--steps", "--device", "cpu", "--filter", "supcon"]) == 1
    assert "Not timed: supcon: RuntimeError: no memory" in capsys.readouterr().out


def test_a_step_that_cant_be_captured_is_timed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other times are there; but behind a capture that torch can't go on from none would be."""
    monkeypatch.setattr(step_graph, "why_not", lambda _: "")
    monkeypatch.setattr(step_graph, "of_run", lambda *_: refusing)
    refusing = SimpleNamespace(take=lambda _: raised(UserError("it has waited")))
    with tiny_run("simclr", CPU) as (training, batch):
        assert host_steps.by_graph(training, batch, 2) == ([], "it has waited")
        refusing.take = lambda _: raised(UserError("the driver is gone"), BrokenError("gone"))
        with pytest.raises(UserError, match="the driver is gone"):
            host_steps.by_graph(training, batch, 2)


def raised(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--dtype", "bf16"], "--dtype is about operators' cases"),
        (["--no-compile"], ""),
        (["--loops"], "--loops is about operators' cases"),
        (["--filter", "nt_xent 4096"], "no method matches 'nt_xent 4096'"),
    ],
)
def test_what_steps_dont_have_is_refused(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "--list", *words]) == (2 if why else 0)
    said = capsys.readouterr()
    assert why in said.err
    assert bool(why) or "step simclr\n" in said.out
