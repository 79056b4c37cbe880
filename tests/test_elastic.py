"""Ranks are killed, and torchrun starts them again: the run is what it would have been."""

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from broken import rows
from images import make_folder
from launched import (
    Launch,
    Tasks,
    children,
    environment_of,
    every_child,
    figures,
    free_port,
    kill,
    lives,
    pretrain,
    wait_for_step,
)

from fastjem import restarts


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48, kind="jpg"))


@pytest.fixture(scope="module")
def undisturbed(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 240 steps on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    launch = Launch(folder / "log", pretrain(images, folder / "run", max_steps="240"))
    try:
        assert launch.wait() == [0, 0], launch.said
    finally:
        launch.end()
    return folder / "run"


def check_goes_on(launch: Launch, run: Path, restarts: int) -> None:
    told = re.findall(r"restarted by torchrun \(restart (\d)[^)]*\): goes on from step (\d+), repeating (\d+) step",
                      launch.said)  # fmt: skip
    assert [int(number) for number, _, _ in told] == list(range(1, restarts + 1)), launch.said
    assert all(int(step) % 7 == 0 or int(again) == 0 for _, step, again in told), told
    assert 'Traceback (most recent call last):\n  File "/work' not in launch.said
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
@pytest.mark.parametrize("seed", [0, 1])
def test_three_kills_at_random_steps(
    seed: int, resume: list[str], images: str, undisturbed: Path, tmp_path: Path
) -> None:
    drawn = random.Random(seed)
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", pretrain(images, run, *resume, max_steps="240"))
    workers: list[int] = []
    try:
        for kills in range(1, 4):
            wait_for_step(launch, run, 70 * kills - drawn.randrange(60))
            victim = launch.worker(drawn.randrange(2))
            workers += every_child(victim)
            kill(victim)
        assert launch.wait() == [0, 0], launch.said
        check_goes_on(launch, run, 3)
        assert not any(map(lives, workers))  # the loader's, whose run was killed
    finally:
        launch.end()
    assert figures(run) == figures(undisturbed)


def test_only_another_attempt_of_the_same_launch_goes_on(tmp_path: Path) -> None:
    here = restarts.Launch("none", 0, ("machine a", "machine b"), ("1", "2"))
    here.write(tmp_path)
    again = replace(here, workers=("3", "4")).in_folder(tmp_path)
    assert again.earlier == here.agents and again.restart == 1 and again.patience > 0
    other_ranks = replace(here, workers=("3",), agents=("machine b",)).in_folder(tmp_path)
    text = "restarted by torchrun (restart 1, 1 rank in place of 2): goes on from step 7, repeating 1 step (step 8 was"
    assert restarts.told(other_ranks, 7, 8) == f"{text} the last that was logged)"
    assert restarts.told(again, 7, 7) == "restarted by torchrun (restart 1): goes on from step 7, repeating 0 steps"
    for other in (here, replace(here, agents=("machine c",), workers=("3",)), replace(again, number="x", earlier=None)):
        assert other.in_folder(tmp_path).earlier is None
    (tmp_path / restarts.FILE).write_text("[]")
    assert again.in_folder(tmp_path) == again


COUNTING = """
import json, os, sys
from collections import Counter
import torch, torch.distributed as dist
import fastjem.ranks
from fastjem.cli import main
torch.set_num_threads(1)
here, calls, made = [0], Counter(), []
class Counting(fastjem.ranks.Ranks):
    def reached(self, step):
        here[0] = step
        super().reached(step)
fastjem.ranks.Ranks = Counting
new_group = dist.new_group
def noted(*words, **given):
    made.append(new_group(*words, **given))
    return made[-1]
dist.new_group = noted
def counted(name, real):
    def call(*words, **given):
        of = "control" if any(one is group for group in made for one in (*words, *given.values())) else "world"
        calls[f"{of} {here[0]}"] += 1
        return real(*words, **given)
    return call
for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier",
             "broadcast_object_list", "reduce", "gather", "scatter", "isend", "irecv", "send", "recv",
             "monitored_barrier", "reduce_scatter_tensor", "all_to_all_single", "batch_isend_irecv"):
    setattr(dist, name, counted(name, getattr(dist, name)))
code = main(sys.argv[1:])
open(os.environ["SLURM_PROCID"] + ".json", "w").write(json.dumps(calls)) if code == 0 else None
sys.exit(code)
"""


@pytest.fixture(scope="module")
def counted(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 60 steps on two ranks, whose collective calls are counted."""
    folder = tmp_path_factory.mktemp("counted")
    script = folder / "script.py"
    script.write_text(COUNTING.replace("open(os.environ", f'open({str(folder)!r} + "/" + os.environ'))
    words = pretrain(images, folder / "run", max_steps="60", log_every="10")[3:]
    tasks = Tasks(folder / "log", [str(script), *words])
    try:
        assert [rank.wait(120) for rank in tasks.ranks] == [0, 0], tasks.said
    finally:
        tasks.end()
    return folder


def test_ranks_agree_at_logged_steps_only(counted: Path) -> None:
    logged = [row["step"] for row in rows(counted / "run")]
    assert len(logged) < 30
    for rank in (0, 1):
        calls = json.loads((counted / f"{rank}.json").read_text())
        for step in range(1, 60):
            saves = step % 7 == 0  # then all ranks say whether their weights are finite
            assert calls.get(f"control {step}", 0) == (step in logged) + saves, (rank, step)
            assert calls[f"world {step}"] == calls["world 1"]  # the loss's own, of the step that follows


def test_a_killed_rank_is_started_again_and_the_run_goes_on(images: str, counted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", pretrain(images, run, max_steps="60", log_every="10"))
    try:
        wait_for_step(launch, run, random.randrange(1, 40))
        kill(launch.worker(random.randrange(2)))
        assert launch.wait() == [0, 0], launch.said
        assert "restarted by torchrun (restart 1): goes on from step" in launch.said
    finally:
        launch.end()
    assert figures(run) == figures(counted / "run")


def test_a_run_at_its_end_is_no_failure_of_any_rank(images: str, counted: Path, tmp_path: Path) -> None:
    words = pretrain(images, counted / "run", "--resume", "auto", max_steps="60", log_every="10")
    tasks = Tasks(tmp_path / "log", [words[0], *words[2:]])
    try:
        assert [rank.wait(120) for rank in tasks.ranks] == [0, 0], tasks.said
    finally:
        tasks.end()
    assert tasks.said.count("already at its end, step 60") == 1


@pytest.mark.exhaustive
def test_an_agent_that_is_killed_leaves_fewer_ranks_and_another_joins(images: str, tmp_path: Path) -> None:
    """--nnodes 1:2."""
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", pretrain(images, run, max_steps="2000"), nodes="1:2")
    try:
        wait_for_step(launch, run, 50)
        # The store of the first agent in the rendezvous is everybody's: the other one may go.
        second = max(launch.agents, key=lambda agent: "RANK=1" in environment_of(next(iter(children(agent.pid)))))
        orphan = launch.worker(launch.agents.index(second))
        os.killpg(second.pid, signal.SIGKILL)
        first = next(agent for agent in launch.agents if agent is not second)
        wait_for_step(launch, run, 120, seconds=150)
        assert not lives(orphan)
        launch.begin()  # a machine that comes later
        assert first.wait(240) == 0, launch.said
        assert launch.agents[-1].wait(60) == 0, launch.said
    finally:
        launch.end()
    assert re.search(r"\(restart \d, 1 rank in place of 2\): goes on from step", launch.said)
    assert re.search(r"\(restart \d, 2 ranks in place of 1\): goes on from step", launch.said)
    assert [row["step"] for row in rows(run)] == list(range(1, 2001))


@pytest.mark.exhaustive
def test_a_run_that_somebody_else_began_is_not_gone_on_with(images: str, counted: Path, tmp_path: Path) -> None:
    """Each of the attempts of another launch is refused, though the second is a restart."""
    words = pretrain(images, counted / "run", max_steps="60", log_every="10")
    launch = Launch(tmp_path / "log", words, "--standalone", "--max-restarts", "1", agents=1)
    try:
        assert launch.wait() == [1]
    finally:
        launch.end()
    assert launch.said.count("holds a run already") == 2 and "goes on from" not in launch.said


@pytest.mark.exhaustive
def test_static_rendezvous_restarts(images: str, counted: Path, tmp_path: Path) -> None:
    """And a death before the first checkpoint; one agent with two processes."""
    run = tmp_path / "run"
    words = pretrain(images, run, max_steps="60", log_every="10")
    launch = Launch(
        tmp_path / "log", words, "--nproc-per-node", "2", "--rdzv-backend", "static", "--nnodes", "1", "--node-rank",
        "0", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--max-restarts", "2", agents=1,
    )  # fmt: skip
    try:
        while not (run / ".launch").exists():
            time.sleep(0.01)
        kill(children(launch.agents[0].pid)[-1])
        wait_for_step(launch, run, 30)
        kill(launch.worker(0))
        assert launch.wait() == [0], launch.said
    finally:
        launch.end()
    assert "restarted by torchrun (restart 2)" in launch.said
    assert figures(run) == figures(counted / "run")
