"""torchrun's agents on one machine: ranks are killed, hang or are slow, and the run is what it would have been."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken import rows
from images import make_folder

if not Path("/proc/self/task").exists():
    pytest.skip("reads processes from /proc", allow_module_level=True)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
OPTIONS = {
    "backbone": "test_resnet", "image-size": "32", "batch-size": "16", "workers": "1", "device": "cpu",
    "log-every": "1", "knn-every": "0", "checkpoint-steps": "7", "options": "norm=layer",
}  # fmt: skip
TIMINGS = ("images_per_second", "data_wait")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Launch:
    """Agents of one torchrun on loopback, each with one process, which runs `program` (else `fastjem pretrain`)."""

    def __init__(self, log: Path, words: list[str], *launcher: str, agents: int = 2, nodes: str = ""):
        self.log = log
        self.file = open(log, "ab")  # noqa: SIM115
        self.words = words
        self.launcher = launcher or (
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--max-restarts", "3",
            "--nnodes", nodes or str(agents),
        )  # fmt: skip
        self.agents: list[subprocess.Popen[bytes]] = []
        for _ in range(agents):
            self.begin()

    def begin(self) -> None:
        """One more agent."""
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *self.launcher, *self.words]
        self.agents.append(
            subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=self.file, start_new_session=True)
        )

    def worker(self, agent: int) -> int:
        """The rank's process; 0 where there is none."""
        return next(iter(children(self.agents[agent].pid)), 0)

    def wait(self, seconds: float = 180) -> list[int]:
        """The agents' exit codes."""
        return [agent.wait(seconds) for agent in self.agents]

    @property
    def said(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        for agent in self.agents:
            for process in [*every_child(agent.pid), agent.pid]:
                kill(process)
            agent.wait()
        self.file.close()


def children(process: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def every_child(process: int) -> list[int]:
    return [one for child in children(process) for one in (child, *every_child(child))]


def kill(process: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_step(launch: Launch, run: Path, step: int, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in whole_rows(run)):
            return
        assert any(agent.poll() is None for agent in launch.agents), launch.said
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {seconds} s: {launch.said}")


def whole_rows(run: Path) -> Iterator[dict]:
    """Of a file that is being written."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def pretrain(images: str, out: Path, *more: str, **options: str) -> list[str]:
    given = OPTIONS | {name.replace("_", "-"): value for name, value in options.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return ["-m", "--", "fastjem", "pretrain", "--data", images, "--no-report", *words, "--out", str(out), *more]


def figures(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows(run)]


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


class Tasks:
    """Ranks on loopback as srun would start them: processes with Slurm's variables."""

    def __init__(self, log: Path, words: list[str], ranks: int = 2):
        self.log = log
        port = str(free_port())
        self.files = [open(f"{log}-{rank}", "wb") for rank in range(ranks)]  # noqa: SIM115
        self.ranks = []
        for rank, file in enumerate(self.files):
            slurm = {"SLURM_NTASKS": str(ranks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                     "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_ID": "0", "MASTER_PORT": port}  # fmt: skip
            line = [sys.executable, *words]
            self.ranks.append(subprocess.Popen(line, env=ENVIRONMENT | slurm, stderr=file, stdout=file))
        self.agents = self.ranks

    @property
    def said(self) -> str:
        return "".join(self.said_by(rank) for rank in range(len(self.ranks)))

    def said_by(self, rank: int) -> str:
        return Path(f"{self.log}-{rank}").read_text()

    def end(self) -> None:
        for rank, file in zip(self.ranks, self.files, strict=True):
            rank.kill()
            rank.wait()
            file.close()


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


def test_a_rank_that_stops_is_named(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = pretrain(images, run, max_steps="5000", checkpoint_steps="1000", timeout="3")
    tasks = Tasks(tmp_path / "log", ["-m", *words[2:]])
    try:
        wait_for_step(tasks, run, 5)
        begin = time.monotonic()
        kill(tasks.ranks[1].pid, signal.SIGSTOP)
        assert tasks.ranks[0].wait(60) == 1
        assert time.monotonic() - begin < 20
    finally:
        tasks.end()
    last = rows(run)[-1]["step"]
    assert (
        f"fastjem pretrain: step {last + 1}: the ranks didn't come together within 3 seconds (--timeout): rank 1 shows "
        f"no sign of life; the last checkpoint is of step {last}: --resume --out {run} goes on from there\n"
    ) in tasks.said_by(0)
    assert "Traceback" not in tasks.said


HANGING = """
import os, sys, time, torch, fastjem
torch.set_num_threads(1)
from fastjem import run
from fastjem.report.watch import Watch
from fastjem.arguments import outcome
what, images, out = sys.argv[1:]
rank = int(os.environ["SLURM_PROCID"])
timeout = 3
steps = run.optimizer_steps
def slow(training, journal, stop):
    for taken in steps(training, journal, stop):
        yield taken
        if what == "hangs" and rank == 1 and taken.done == 9:
            time.sleep(1000)
        if what == "slow" and rank == 1:
            time.sleep(1.5 if taken.done % 10 == 0 else 0.03)
run.optimizer_steps = slow
measure = Watch.measure
def long(self, step):
    if what == "works" and step:
        time.sleep(3 * timeout)
    measure(self, step)
Watch.measure = long
sys.exit(outcome("pretrain", lambda: 0 if fastjem.pretrain(
    data=images, backbone="test_resnet", image_size=32, batch_size=16, device="cpu", workers=0, report=False,
    log_every=10, knn_every=7 if what == "works" else 0, checkpoint_steps=4, options={"norm": "layer"}, max_steps=30,
    timeout=timeout, out=out).finished else 1))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["hangs", "slow", "works"])
def test_a_rank_that_hangs_is_named_and_one_that_is_slow_is_waited_for(what: str, images: str, tmp_path: Path) -> None:
    """timeout 3: a rank that sleeps 1.5 s may, and the first one may measure for 9 s."""
    script = tmp_path / "script.py"
    script.write_text(HANGING)
    tasks = Tasks(tmp_path / "log", [str(script), what, images, str(tmp_path / "run")])
    try:
        assert tasks.ranks[0].wait(150) == (1 if what == "hangs" else 0), tasks.said
        if what == "hangs":
            text = r"step 10: the ranks .* within 3 seconds \(timeout\): rank 1 is at .*script\.py:\d+, slow\(\); the"
            assert re.search(text, tasks.said_by(0)), tasks.said
            assert tasks.said.count("didn't come together") == 1
        else:
            assert tasks.ranks[1].wait(60) == 0
        assert ("the first rank has been at work by itself for" in tasks.said_by(1)) == (what == "works")
    finally:
        tasks.end()
    assert "Traceback" not in tasks.said


@pytest.mark.exhaustive
def test_the_store_of_a_first_rank_that_stops_keeps_nobody_waiting(images: str, tmp_path: Path) -> None:
    """Three ranks; the first one, in whose process they meet, is stopped."""
    words = pretrain(images, tmp_path / "run", max_steps="5000", timeout="3", batch_size="18")
    tasks = Tasks(tmp_path / "log", ["-m", *words[2:]], ranks=3)
    try:
        wait_for_step(tasks, tmp_path / "run", 5)
        kill(tasks.ranks[0].pid, signal.SIGSTOP)
        assert [rank.wait(60) for rank in tasks.ranks[1:]] == [1, 1], tasks.said
    finally:
        tasks.end()
    assert "didn't come together within 3 seconds (--timeout): the rank that keeps the store" in tasks.said
    assert "Traceback" not in tasks.said


@pytest.mark.exhaustive
def test_an_agent_that_is_killed_leaves_fewer_ranks(images: str, undisturbed: Path, tmp_path: Path) -> None:
    """--nnodes 1:2: the loss doesn't depend on the number of ranks (norm=layer, batch norm in the encoder apart)."""
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", pretrain(images, run, max_steps="240"), nodes="1:2")
    try:
        wait_for_step(launch, run, 50)
        # The store of the first agent in the rendezvous is everybody's: the other one may go.
        second = max(launch.agents, key=lambda agent: "RANK=1" in environment_of(next(iter(children(agent.pid)))))
        orphan = launch.worker(launch.agents.index(second))
        os.killpg(second.pid, signal.SIGKILL)
        first = next(agent for agent in launch.agents if agent is not second)
        assert first.wait(240) == 0, launch.said
        assert not lives(orphan)
    finally:
        launch.end()
    assert "1 rank in place of 2): goes on from step" in launch.said
    assert [row["step"] for row in rows(run)] == list(range(1, 241))
    assert figures(run)[:40] == figures(undisturbed)[:40]


def environment_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_text().split("\0")


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
