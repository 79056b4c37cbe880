"""Waits that would never end, machines that are too small, and ranks that some launcher started."""

import multiprocessing
import multiprocessing.synchronize  # reads SemLock, which a test replaces
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from images import make_folder

from fastjem import arguments, launchers, stopping
from fastjem.advice import (
    DESCRIPTORS,
    GPU_MEMORY,
    HOST_MEMORY,
    HUNG_UP,
    KILLED,
    OTHER_RANK,
    PROCESSES,
    SHARED_MEMORY,
    advice,
)
from fastjem.cli import main
from fastjem.commands.check_data import CheckDataOptions, check_data
from fastjem.data.loaders import LOADERS, Budget, Order
from fastjem.data.pixels import Pixels
from fastjem.data.source import open_source
from fastjem.data.views import Views
from fastjem.errors import ResourceError, ToldElsewhereError, UserError
from fastjem.launchers import Place, first_node, place
from fastjem.probes import features
from fastjem.ranks import Ranks, join
from fastjem.stopping import Stop, Stopped

TINY = ["--backbone", "test_resnet", "--image-size", "32", "--batch-size", "16", "--device", "cpu", "--no-report"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>"), SHARED_MEMORY),
        (OSError("Caught OSError in DataLoader worker process 0.\n...\nNo space left on device"), SHARED_MEMORY),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible ..."), SHARED_MEMORY),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), KILLED),
        (RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), KILLED),
        (RuntimeError("received 0 items of ancdata"), DESCRIPTORS),
        (OSError(24, "Too many open files"), DESCRIPTORS),
        (OSError(12, "Cannot allocate memory"), HOST_MEMORY),
        (MemoryError(), HOST_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), HOST_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), GPU_MEMORY),
        (RuntimeError("can't start new thread"), PROCESSES),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.1.1]:1"), OTHER_RANK),
        (OSError(28, "No space left on device"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("unable to allocate shared memory"), None),
    ],
)  # fmt: skip
def test_each_want_has_its_advice(error: BaseException, line: str | None) -> None:
    assert advice(error) == line


def test_a_worker_that_hangs_up_has_its_advice() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(EOFError) as caught:
        ours.recv()
    assert advice(caught.value) == HUNG_UP and advice(EOFError()) is None


def test_a_wait_sees_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE", 0.1)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # no wait: a step isn't torn
        assert stop.signal == signal.SIGTERM
        begin = time.monotonic()
        with pytest.raises(Stopped), stop.waiting():
            threading.Event().wait(20)
        assert time.monotonic() - begin < 5
    with Stop() as stop, stop.waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # what comes soon is waited for
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal is None and stop.saves() and not stop.saves()
    with Stop() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_is_held_back_reaches_its_handler_in_a_wait() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    try:
        with Stop() as stop:
            stop.hold_back("SIGCHLD")
            os.kill(os.getpid(), signal.SIGCHLD)
            assert not heard
            with stop.waiting():
                os.kill(os.getpid(), signal.SIGCHLD)
            assert heard == [signal.SIGCHLD]
            stop.hold_back("SIGNONE")
        os.kill(os.getpid(), signal.SIGCHLD)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_batch_that_doesnt_fit_shared_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue of a worker would drop it, and the run wait for ever."""

    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    source = open_source(make_folder(tmp_path, 8))
    order = Order(samples=8, batch=4, stop=2)
    loader = LOADERS["torch"](source, Views(large=2).specs(16), order, Budget(workers=1))
    batches = iter(loader)
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    assert advice(caught.value) == SHARED_MEMORY
    assert not multiprocessing.active_children()
    with pytest.raises(ResourceError, match="/dev/shm"):
        features(lambda x: [x.flatten(1)], source, Pixels(16), workers=1)


def test_no_room_for_semaphores_is_a_want_of_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error names no file: it looks like a full disk."""

    def refuse(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    # The real one is written in C: the error comes out of the module that calls it.
    namespace = {"__name__": "multiprocessing.synchronize", "os": os}
    monkeypatch.setattr("_multiprocessing.SemLock", types.FunctionType(refuse.__code__, namespace))
    source = open_source(make_folder(tmp_path, 80))
    order = Order(samples=8, batch=4, stop=2)
    with pytest.raises(OSError) as caught:
        iter(LOADERS["torch"](source, Views(large=2).specs(16), order, Budget(workers=1)))
    assert advice(caught.value) == SHARED_MEMORY
    with pytest.raises(ResourceError, match="/dev/shm"):
        features(lambda x: [x.flatten(1)], source, Pixels(16), workers=1)
    assert check_data(CheckDataOptions(str(tmp_path), workers=2))["files"] == 80  # in one process


PROGRAM = """
import os, sys, time, torch, fastjem
torch.set_num_threads(1)
from fastjem.data.pixels import Pixels
from fastjem.data.source import open_source
from fastjem.run import main
import fastjem.run

class Source:
    def __init__(self):
        self.folder, self.main, self.reads = open_source(sys.argv[2]), os.getpid(), 0
    def __len__(self): return 32
    def read(self, i):
        self.reads += os.getpid() != self.main  # the worker's own
        if self.reads > 80:
            what = sys.argv[1]
            if what == "killed": os.kill(os.getpid(), 9)
            if what == "stuck":
                open(sys.argv[3] + "-stuck", "w").close()
                time.sleep(1000)
        return self.folder.read(i)

if sys.argv[1] == "full":
    def refuse(tensor, *_): raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")
    torch.Tensor.share_memory_ = refuse
def run(options):
    result = fastjem.pretrain(source=Source(), backbone="test_resnet", image_size=32, batch_size=16, device="cpu",
                              workers=1, report=False, log_every=1, knn_every=0, epochs=500, out=sys.argv[3])
    return 130 if result.stopped else 0
from fastjem.arguments import outcome
sys.exit(outcome("pretrain", lambda: run(None)))
"""


@pytest.mark.parametrize(
    "what",
    ["full", "killed", "stuck"],
)
@pytest.mark.exhaustive
def test_a_worker_that_fails_ends_the_run_in_a_line(what: str, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", 32)
    line = [sys.executable, "-c", PROGRAM, what, str(images), str(tmp_path / "run")]
    process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    if what == "stuck":
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (tmp_path / "run-stuck").exists() or '"step": 4' not in metrics.read_text():
            time.sleep(0.1)
        time.sleep(1)  # for the fifth step, the last one that has a batch: now the run waits
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    assert "Traceback" not in said, said
    if what == "stuck":
        assert process.returncode == 130 and "stopped at step" in said
    else:
        # The program calls fastjem.pretrain, whose errors name arguments of Python.
        advised = (SHARED_MEMORY if what == "full" else KILLED).replace("--workers", "workers")
        assert process.returncode == 2 and advised in said
    assert ("is saved; --resume" in said) == (what != "full")
    assert (tmp_path / "run").exists() == (what != "full")


def test_places() -> None:
    assert place({}) == Place()
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == Place()
    for allocation in (
        {},  # salloc
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch without srun
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},  # an interactive shell
    ):
        words = r"allocated 4 tasks.* none of them: srun fastjem pretrain .* all 4, srun --ntasks 1 fastjem pretrain"
        with pytest.raises(UserError, match=words):
            place({"SLURM_NTASKS": "4", **allocation})
        assert place({"SLURM_NTASKS": "1", **allocation}) == Place()
    torchrun = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a", "MASTER_PORT": "1"}  # fmt: skip
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
             "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]",
             "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
    assert place({**slurm, **torchrun}) == Place(3, 4, 1, 2)
    assert place(slurm) == Place(3, 4, 1, 2, ("gpu07", 15077))
    assert place({**slurm, "SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "1"}).local_size == 3
    assert place({**slurm, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Place()  # srun --ntasks 1
    with pytest.raises(UserError, match=r"heterogeneous job of 2 parts.* torchrun --nnodes"):
        place({**slurm, "SLURM_HET_SIZE": "2"})
    assert place({**slurm, "MASTER_ADDR": "b", "MASTER_PORT": "9"}).address == ("b", 9)
    assert place({**slurm, "SLURM_STEP_ID": "1"}).address != place(slurm).address
    alone = {name: value for name, value in slurm.items() if "LIST" not in name}
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        place(alone)
    for wrong, words in (
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({**torchrun, "RANK": "4"}, "rank 4 of 4"),
        ({**torchrun, "WORLD_SIZE": "many"}, "WORLD_SIZE must be a number, got 'many'"),
    ):
        with pytest.raises(UserError, match=words):
            place(wrong)
    assert launchers.speaks({}) and not launchers.speaks(slurm) and launchers.speaks({**slurm, "SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("node[003-006,010],x", "node003"), ("a[1,3]-ib,b", "a1-ib"),
     ("r[1-2]n[3-4]", "r1n3")],
)  # fmt: skip
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_tasks_per_node() -> None:
    assert launchers.tasks_per_node("4(x2),3") == [4, 4, 3] and launchers.tasks_per_node("") == []


def test_one_process_needs_nobody() -> None:
    ranks = join("cpu")
    assert ranks == Ranks(0, 1, torch.device("cpu")) and ranks.tells()
    assert ranks.any(True, False) == [True, False] and ranks.agree(0.5) == 0.5
    with pytest.raises(UserError, match="mine"), ranks.together():
        raise UserError("mine")


TASK = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from fastjem.cli import main
from fastjem.data.loaders import LOADERS, Budget, Order
from fastjem.data.pixels import Pixels
from fastjem.data.source import open_source
from fastjem.data.views import Views
from fastjem.errors import ToldElsewhereError, UserError
from fastjem.ranks import join, leave
for _ in range(2):  # a second time in one process
    ranks = join("cpu")
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise UserError("mine")
    except ToldElsewhereError:
        assert ranks.rank == 0
    except UserError:
        assert ranks.rank == 1
    assert ranks.any(ranks.rank == 1, False) == [True, False]
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == 2 == ranks.size
    leave(ranks)
    assert not dist.is_initialized()
print(sum(ranks.tells() for _ in range(1)))
"""


@pytest.mark.exhaustive
def test_tasks_of_slurm_are_ranks(tmp_path: Path) -> None:
    """Two tasks of one step, as srun would start them."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": port,
             "OMP_NUM_THREADS": "1"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", TASK], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    for task in tasks:
        _, said = task.communicate(timeout=60)
        assert task.returncode == 0, said


def test_of_all_ranks_the_first_tells_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setattr(arguments, "LAST_WORDS", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["pretrain", "--bach-size", "4"]) == 2
        assert capsys.readouterr().err.count("\n") == lines

    def elsewhere(options: object) -> int:
        raise ToldElsewhereError("on rank 0")

    monkeypatch.setattr("fastjem.run.main", elsewhere)
    assert main(["pretrain", "--out", "x"]) == 2 and capsys.readouterr().err == ""
