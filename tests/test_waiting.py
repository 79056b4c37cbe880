"""A rank that doesn't come is named and ends the run in a line; one that is slow, or works by itself, is waited for."""

import re
import signal
import time
from pathlib import Path

import pytest
from broken import rows
from images import make_folder
from launched import Tasks, kill, pretrain, wait_for_step

from fastjem.config import Config, check
from fastjem.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48, kind="jpg"))


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), 1e7])
def test_what_is_no_time_out_is_refused(timeout: float) -> None:
    with pytest.raises(UserError, match=r"--timeout must be seconds, above 0 and at most 1,000,000, got"):
        check(Config(timeout=timeout))


def test_a_rank_that_stops_is_named(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = pretrain(images, run, max_steps="5000", checkpoint_steps="1000", timeout="6")
    tasks = Tasks(tmp_path / "log", ["-m", *words[2:]])
    try:
        wait_for_step(tasks, run, 5)
        begin = time.monotonic()
        kill(tasks.ranks[1].pid, signal.SIGSTOP)
        assert tasks.ranks[0].wait(60) == 1
        assert time.monotonic() - begin < 25
    finally:
        tasks.end()
    last = rows(run)[-1]["step"]
    assert (
        f"fastjem pretrain: step {last + 1}: the ranks didn't come together within 6 seconds (--timeout): rank 1 shows "
        f"no sign of life; the last checkpoint is of step {last}: --resume --out {run} goes on from there\n"
    ) in tasks.said_by(0)
    assert "Traceback" not in tasks.said and "waitForInput" not in tasks.said


HANGING = """
import os, sys, time, torch, fastjem
torch.set_num_threads(1)
from fastjem import run
from fastjem.report.watch import Watch
from fastjem.arguments import outcome
what, images, out = sys.argv[1:]
rank = int(os.environ["SLURM_PROCID"])
timeout = 6
steps = run.optimizer_steps
def slow(training, journal, stop):
    for taken in steps(training, journal, stop):
        yield taken
        if what == "hangs" and rank == 1 and taken.done == 9:
            time.sleep(1000)
        if what == "slow" and rank == 1:
            time.sleep(3 if taken.done % 10 == 0 else 0.03)
run.optimizer_steps = slow
measure = Watch.measure
def long(self, step):
    if what == "works" and step:
        time.sleep(2 * timeout)
    measure(self, step)
Watch.measure = long
sys.exit(outcome("pretrain", lambda: 0 if fastjem.pretrain(
    data=images, backbone="test_resnet", image_size=32, batch_size=16, device="cpu", workers=0, report=False,
    log_every=10, knn_every=5 if what == "works" else 0, checkpoint_steps=4, options={"norm": "layer"}, max_steps=30,
    timeout=timeout, out=out).finished else 1))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["hangs", "slow", "works"])
def test_a_rank_that_hangs_is_named_and_one_that_is_slow_is_waited_for(what: str, images: str, tmp_path: Path) -> None:
    """timeout 6: a rank that sleeps 3 s may, and the first one may measure for 12 s."""
    script = tmp_path / "script.py"
    script.write_text(HANGING)
    tasks = Tasks(tmp_path / "log", [str(script), what, images, str(tmp_path / "run")])
    try:
        assert tasks.ranks[0].wait(150) == (1 if what == "hangs" else 0), tasks.said
        if what == "hangs":
            text = r"step 10: the ranks .* within 6 seconds \(timeout\): rank 1 is at .*script\.py:\d+, slow\(\); the"
            assert re.search(text, tasks.said_by(0)), tasks.said
            assert tasks.said.count("didn't come together") == 1
        else:
            assert tasks.ranks[1].wait(60) == 0
        assert ("the first rank has been at work by itself for" in tasks.said_by(1)) == (what == "works")
    finally:
        tasks.end()
    assert "Traceback" not in tasks.said and "waitForInput" not in tasks.said


@pytest.mark.exhaustive
def test_the_store_of_a_first_rank_that_stops_keeps_nobody_waiting(images: str, tmp_path: Path) -> None:
    """Three ranks; the first one, in whose process they meet, is stopped."""
    words = pretrain(images, tmp_path / "run", max_steps="5000", timeout="6", batch_size="18")
    tasks = Tasks(tmp_path / "log", ["-m", *words[2:]], ranks=3)
    try:
        wait_for_step(tasks, tmp_path / "run", 5)
        kill(tasks.ranks[0].pid, signal.SIGSTOP)
        assert [rank.wait(60) for rank in tasks.ranks[1:]] == [1, 1], tasks.said
    finally:
        tasks.end()
    assert "didn't come together within 6 seconds (--timeout): the rank that keeps the store" in tasks.said
    assert "Traceback" not in tasks.said and "waitForInput" not in tasks.said


@pytest.mark.exhaustive
def test_a_request_to_stop_is_everybodys_at_the_next_logged_step(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = pretrain(images, run, max_steps="5000", log_every="50", checkpoint_steps="0")
    tasks = Tasks(tmp_path / "log", ["-m", *words[2:]])
    try:
        wait_for_step(tasks, run, 110)
        tasks.ranks[1].terminate()
        assert [rank.wait(60) for rank in tasks.ranks] == [130, 130], tasks.said
    finally:
        tasks.end()
    last = rows(run)[-1]["step"]
    assert last % 50 == 0 and f"stopped at step {last}; go on with --resume" in tasks.said_by(0)
