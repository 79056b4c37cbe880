"""torchrun's agents on one machine: ranks are killed, hang or are slow, and the run is the one that nobody disturbed."""

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
            subprocess.Popen(
                line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=self.file, start_new_session=True
            )
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
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


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
    assert "Traceback (most recent call last):\n  File \"/work" not in launch.said
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
