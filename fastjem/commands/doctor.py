"""`fastjem doctor`: what is installed, what the hardware offers, and which implementation each operator has here."""

import importlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastjem.arguments import Parser
from fastjem.errors import first_line

PACKAGES = ("fastjem", "torch", "triton", "numpy", "timm", "torchvision", "lightly")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
REFERENCE_ONLY = ("ROCm", "XPU", "MPS")  # the C++ kernels are for CPUs, the Triton kernels for CUDA
ISA = ("baseline", "AVX2", "AVX-512")  # by the number that fastjem.kernels._C.isa() returns

# Runs in a process of its own: a driver that doesn't suit DALI may end the process instead of raising.
DALI_PROBE = """
import sys
from nvidia.dali import fn, pipeline_def, types

device = sys.argv[1]

@pipeline_def(batch_size=1, num_threads=1, device_id=0 if device == "gpu" else None)
def probe():
    image = fn.constant(idata=[1] * 192, shape=[8, 8, 3], dtype=types.UINT8, layout="HWC", device=device)
    return fn.resize(image, size=[4, 4])

pipeline = probe()
pipeline.build()
pipeline.run()
"""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    found = {package: _version(package) for package in PACKAGES}
    return {"fastjem": found.pop("fastjem"), "python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    import torch

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    try:
        isa = ISA[importlib.import_module("fastjem.kernels._C").isa()]
    except (ImportError, AttributeError):
        isa = None  # no C++ kernels: the operators' table says why
    return {"platform": platform.platform(), "cpu": model, "threads": torch.get_num_threads(), "cpp_kernels": isa}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return first_line(subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def build() -> str:
    """What this torch was built to compute on beside the CPU; "CPU" for nothing."""
    import torch

    numbers = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    for name, number in numbers.items():
        if number:
            return name
    return "MPS" if torch.backends.mps.is_built() else "CPU"


def gpu() -> dict[str, Any]:
    """The devices that `--device cuda` means, which are ROCm's too, and why there are none."""
    import torch

    found: dict[str, Any] = {
        "build": build(),
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": None,
        "devices": [],
        "operators": "plain torch, the reference, by rule" if build() in REFERENCE_ONLY else None,
        "problem": None,
    }
    if found["cuda"] is None:
        found["problem"] = "this torch is a build without CUDA"
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is what init() raises
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            found["problem"] = first_line(error)
            return found
    found["driver"] = _driver()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            torch.zeros(1, device=f"cuda:{index}").add_(1).item()
            problem = None
        except RuntimeError as error:  # torch has no code for this chip, or somebody else holds it
            problem = first_line(error)
        found["devices"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "problem": problem,
            }
        )
    return found


def _dali_problem(device: str) -> str | None:
    """Why DALI can't run a small pipeline on "cpu" or "gpu"; None if it can."""
    try:
        run = subprocess.run([sys.executable, "-c", DALI_PROBE, device], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "a small pipeline didn't finish in 60 s"
    if run.returncode == 0:
        return None
    last_line = run.stderr.strip().rpartition("\n")[2]
    return last_line or f"a small pipeline ended with status {run.returncode}"


def dali() -> dict[str, Any]:
    import torch

    packages = {package: number for package in DALI if (number := _version(package))}
    if not packages:
        return {"packages": {}, "problem": "not installed: pip install 'fastjem[dali]', or [dali-cuda12] for CUDA 12"}
    return {
        "packages": packages,
        "cpu_problem": _dali_problem("cpu"),
        "gpu_problem": _dali_problem("gpu") if torch.cuda.is_available() else "no GPU",
    }


def import_milliseconds() -> float | None:
    """What `import fastjem.functional` costs beyond torch's own import; None if this process had imported it before."""
    importlib.import_module("torch")
    if "fastjem.functional" in sys.modules:
        return None
    start = time.perf_counter()
    importlib.import_module("fastjem.functional")
    return round(1e3 * (time.perf_counter() - start), 1)


def operators() -> dict[str, dict[str, str]]:
    from fastjem.ops import implementations

    return implementations()


SECTIONS: tuple[Callable[[], Any], ...] = (versions, import_milliseconds, machine, gpu, dali, operators)


def report() -> dict[str, Any]:
    """Each section's name and what was found, fit for JSON; a section that fails is {"problem": why}."""
    found = {}
    for section in SECTIONS:
        try:
            found[section.__name__] = section()
        except Exception as error:  # whatever is broken is what a doctor is there to say
            found[section.__name__] = {"problem": f"{type(error).__name__}: {first_line(error)}"}
    return found


def _machine_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "problem" in found:
        yield "machine", found["problem"]
        return
    yield "machine", found["platform"]
    yield "CPU", f"{found['cpu']}, {found['threads']} threads"
    yield "C++ kernels", found["cpp_kernels"] or "none"


def _gpu_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    name = "ROCm" if found.get("build") == "ROCm" else "CUDA"
    if found["problem"]:
        yield "GPU", f"none: {found['problem']}"
        if "cuda" in found:
            yield name, found["cuda"] or "none"
    else:
        for device in found["devices"]:
            line = f"{device['name']}, capability {device['capability']}, {device['memory_gib']} GiB"
            yield "GPU", f"{line}: DOESN'T WORK: {device['problem']}" if device["problem"] else line
        yield name, f"{found['cuda']}, driver {found['driver'] or 'unknown'}"
    if found.get("operators"):
        yield f"on {found['build']}", f"operators are {found['operators']}"


def _dali_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "problem" in found:
        yield "DALI", found["problem"]
        return
    yield "DALI", ", ".join(f"{number} ({package})" for package, number in found["packages"].items())
    for device in ("cpu", "gpu"):
        problem = found[f"{device}_problem"]
        yield f"DALI on {device.upper()}", f"doesn't work: {problem}" if problem else "works"


def _operator_lines(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """A table; reasons, the same for many operators, are numbered and stand below it once each."""
    if "problem" in found:
        yield f"operators: {found['problem']}"
        return
    reasons: dict[str, int] = {}  # reason -> its number

    def cell(text: str) -> str:
        name, _, reason = text.partition(" (")
        if not reason:
            return name
        number = reasons.setdefault(reason.removesuffix(")"), len(reasons) + 1)
        return f"{name} [{number}]"

    rows = [("operator", "cpu", "cuda"), *((name, cell(on["cpu"]), cell(on["cuda"])) for name, on in found.items())]
    widths = [max(len(row[column]) for row in rows) + 3 for column in range(3)]
    for row in rows:
        yield "".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    for reason, number in reasons.items():
        yield f"[{number}] {reason}"


def render(found: dict[str, Any]) -> str:
    """The report as text."""
    facts = [(name, number or "not installed") for name, number in found["versions"].items()]
    cost = found["import_milliseconds"]
    if isinstance(cost, float):
        facts.append(("import", f"{cost:g} ms beyond torch's own"))
    facts += [*_machine_lines(found["machine"]), *_gpu_lines(found["gpu"]), *_dali_lines(found["dali"])]
    width = max(len(name) for name, _ in facts) + 3
    lines = [f"{name.ljust(width)}{text}" for name, text in facts]
    return "\n".join([*lines, "", *_operator_lines(found["operators"])])


def parser() -> Parser:
    parser = Parser("fastjem doctor", description="what is installed, and which implementation each operator has here")
    parser.add_argument("--json", action="store_true", help="the same as data")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0
