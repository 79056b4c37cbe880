"""Which of several processes this one is, as torchrun or Slurm's srun say by environment variables."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastjem.errors import UserError

NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
# One of these is there where srun has started a task, and none in the script of a batch job.
STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_SRUN_COMM_HOST", "SLURM_LAUNCH_NODE_IPADDR", "MASTER_PORT")  # fmt: skip
NOT_STEPS = 0xFFFF_FFF0  # from here on a step's number is the batch script's, or an interactive shell's
FIRST_PORT, PORTS = 15_000, 15_000  # Slurm's jobs choose theirs by their number


@dataclass(frozen=True)
class Place:
    """One process of several. address: host and port where the first waits for the others; None: torch reads it."""

    rank: int = 0
    size: int = 1
    local: int = 0  # rank among those of this machine
    local_size: int = 1
    address: tuple[str, int] | None = None


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place; alone, rank 0 of 1.

    torchrun's variables come first. Slurm's are taken where srun started several tasks: each of them would else be a
    run of its own. An allocation of several tasks of which this is none is refused: it would train on one of them.

    Raises:
        UserError: for variables that are incomplete or no numbers, and where Slurm's don't say who is who.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        size = _number(environment, "WORLD_SIZE", 1)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 and name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {size}, and {' and '.join(missing)} not set: start all ranks with torchrun, "
                "or unset WORLD_SIZE to train in this process alone"
            )
        rank = _number(environment, "RANK", 0)
        return _checked(
            Place(rank, size, _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", size))
        )
    size = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    if not _is_task(environment):
        size = _number(environment, "SLURM_NTASKS", 1)
    if size == 1:
        return Place()
    parts = max(_number(environment, name, 1) for name in ("SLURM_HET_SIZE", "SLURM_PACK_SIZE"))
    if parts > 1:
        raise UserError(
            f"a heterogeneous job of {parts} parts numbers its tasks by part: start with torchrun on each node, "
            "torchrun --nnodes NODES --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 -m -- "
            "fastjem pretrain ..."
        )
    if not _is_task(environment):
        raise UserError(
            f"Slurm has allocated {size} tasks, and this process is none of them: srun fastjem pretrain ... starts all "
            f"{size}, srun --ntasks 1 fastjem pretrain ... trains in one process"
        )
    rank = _number(environment, "SLURM_PROCID", 0)
    local = _number(environment, "SLURM_LOCALID", rank)
    # Slurm binds a task to its own cores by itself.
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    node = _number(environment, "SLURM_NODEID", 0)
    local_size = counts[node] if node < len(counts) else max(counts, default=size)
    return _checked(Place(rank, size, local, local_size, (_host(environment, local, rank), _port(environment))))


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints what all ranks have to say alike."""
    try:
        return place(environment).rank == 0
    except UserError:
        return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def _is_task(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process: the script of a batch job is number 0 too, without a step."""
    if "SLURM_PROCID" not in environment:
        return False
    if _number(environment, "SLURM_PROCID", 0) > 0:
        return True
    step = _number(environment, "SLURM_STEP_ID", _number(environment, "SLURM_STEPID", 0))
    return step < NOT_STEPS and any(name in environment for name in STEP)


def tasks_per_node(text: str) -> list[int]:
    """ "4(x2),3": two nodes of 4 tasks and one of 3 -> [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _number(environment: Mapping[str, str], name: str, absent: int) -> int:
    text = environment.get(name, "")
    if not text:
        return absent
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} must be a number, got {text!r}") from None


def _checked(found: Place) -> Place:
    if not 0 <= found.rank < found.size:
        raise UserError(f"rank {found.rank} of {found.size}: a rank is from 0 to {found.size - 1}")
    return found


def _host(environment: Mapping[str, str], local: int, rank: int) -> str:
    """Where rank 0 runs: the step's first node."""
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    for name in NODE_LISTS:
        if environment.get(name):
            return first_node(environment[name])
    if environment.get("SLURM_NNODES", "1") == "1" and local == rank:
        return "localhost"
    raise UserError(
        "srun started several tasks, and no variable says where the first one is: set MASTER_ADDR and MASTER_PORT, "
        "or start with torchrun"
    )


def first_node(nodes: str) -> str:
    """ "node[003-006,010],login1" -> "node003", as `scontrol show hostnames` would say; it isn't everywhere."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes).strip()


def _port(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step, and another one for each step that may run beside it."""
    if environment.get("MASTER_PORT"):
        return _number(environment, "MASTER_PORT", 0)
    job = _number(environment, "SLURM_JOB_ID", 0)
    step = _number(environment, "SLURM_STEP_ID", 0)
    return FIRST_PORT + (job + 7 * step) % PORTS
