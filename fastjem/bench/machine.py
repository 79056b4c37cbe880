"""The machine: what it is, and the two rates that no computation on it can beat."""

import datetime
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastjem
from fastjem.bench.timing import compare
from fastjem.machine import available_cores

PACKAGES = ("fastjem", "torch", "triton", "lightly", "numpy")


@dataclass(frozen=True)
class Ceilings:
    """Measured rates. Copy bandwidth counts bytes read and written, at several sizes because caches have their own."""

    copy: dict[int, float]  # bytes read and written by one copy -> bytes per second
    matmul: dict[str, float]  # "float32", "bfloat16" -> FLOP per second

    def bandwidth(self, count: int) -> float:
        """Of the measured copy nearest in size."""
        return self.copy[min(self.copy, key=lambda measured: abs(math.log(measured / count)))]

    def rate(self, dtype: torch.dtype) -> float:
        """For half precision the better of the two: a CPU may be slower at it than at float32."""
        return self.matmul["float32"] if dtype == torch.float32 else max(self.matmul.values())

    def floor(self, count: int, flops: int, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds that `count` bytes and `flops` of matrix products take at the least, and which of the two binds."""
        memory = count / self.bandwidth(count)
        products = flops / self.rate(dtype)
        return (memory, "memory") if memory >= products else (products, "products")


def ceilings(device: torch.device, patience: float = 0.0) -> Ceilings:
    """Measure both with the clock that the benchmarks use, on random data (a GPU multiplies zeros faster)."""
    on_cpu = device.type == "cpu"

    def fastest(function: Callable, *inputs: torch.Tensor) -> float:
        timing = compare({"it": function}, inputs, device=device, budget=0.5, patience=patience)
        return timing.variants["it"].passes["total"].minimum

    copy = {}
    for mebibytes in (2, 16, 128, 512) if on_cpu else (128, 512, 4096):
        count = mebibytes * 2**20
        source = torch.randn(count // 2 // 4, device=device)  # half of the bytes are read, half are written
        copy[count] = count / fastest(torch.Tensor.copy_, torch.empty_like(source), source)
    matmul = {}
    n = 1024 if on_cpu else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = fastest(lambda out, x, y: torch.mm(x, y, out=out), torch.empty_like(a), a, b)
        matmul[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    return Ceilings(copy, matmul)


def describe(device: torch.device) -> dict:
    """CPU, cores, threads, GPU and driver, system."""
    facts = {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
            "cuda": torch.version.cuda,
        }
    return facts


def slug(machine: dict) -> str:
    """A file name for the machine: `nvidia-h200`, `cpu-intel-xeon-processor-avx512-2-threads`."""
    name = machine.get("gpu")
    if name is None:
        model = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", machine["cpu"].lower())
        name = f"cpu {model} {machine['vector_units']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def now() -> dict:
    """What a result depends on beside the machine: date, how busy it was, versions, the source's commit."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return fastjem.__version__ if package == "fastjem" else None


def _commit() -> str | None:
    root = Path(fastjem.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, not run from its source; a repository further up is somebody else's
        return None
    git = ("git", "-C", str(root))
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", "fastjem", "kernels", "csrc")
    return f"{commit} with uncommitted changes" if changed else commit


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform
