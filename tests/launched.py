"""Runs of several processes on one machine, by torchrun or as Slurm's tasks, and what is done to them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken import rows

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


def wait_for_step(launch: "Launch | Tasks", run: Path, step: int, seconds: float = 90) -> None:
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


def environment_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_text().split("\0")
