"""Who may import whom, and what an import brings along."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each imports only from what stands before it, and from BESIDE; BESIDE knows nothing from `methods` on.
CHAIN = (
    "kernels",
    "ops",
    "functional",
    "nn",
    "methods",
    "train",
    "report",
    "progress",
    "pretrain",
    "runs",
    "commands",
    "cli",
    "__main__",
)
BESIDE = (
    "arguments",
    "collectives",
    "data",
    "dist",
    "optim",
    "probes",
    "bench",
    "schedules",
    "errors",
    "encoders",
    "checkpoints",
)
SOURCES = sorted([*ROOT.glob("fastjem/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def layer(module: str) -> str:
    """ "fastjem.nn.losses" -> "nn"; "fastjem" itself, which holds nothing but the version, -> ""."""
    return module.partition(".")[2].partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastjem", *parts) if parts[0] == "kernels" else parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full names of all modules of fastjem that the source imports, those inside functions too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            names = [f"{base}.{alias.name}" if base == "fastjem" else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("fastjem", "kernels"))


def mistakes(source: str, module: str, is_package: bool = False) -> list[str]:
    here, found = layer(module), []
    for name in imports(source, module, is_package):
        there = layer(name)
        if here == there or there == "__version__" or (there == "" and here != "kernels" and name == "fastjem"):
            continue
        if here == "kernels":
            allowed: tuple[str, ...] = ()
        elif here in BESIDE:
            allowed = CHAIN[: CHAIN.index("methods")] + BESIDE
        else:
            allowed = CHAIN[: CHAIN.index(here)] + (BESIDE if here != "ops" else ()) if here in CHAIN else ()
        if there not in allowed:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path: Path) -> None:
    module = module_name(path)
    assert layer(module) in ("", *CHAIN, *BESIDE), f"say in CHAIN or BESIDE where {module} stands"
    assert not mistakes(path.read_text(), module, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastjem.kernels.cpu", "from fastjem.ops import implementations"),
        ("fastjem.kernels.cpu", "import fastjem"),
        ("fastjem.ops.autograd", "def f():\n    import fastjem.functional as F"),
        ("fastjem.functional.contrastive", "from fastjem import nn"),
        ("fastjem.functional.contrastive", "from ..methods import simclr"),
        ("fastjem.data.source", "from fastjem.methods import METHODS"),
        ("fastjem.nn.losses", "import kernels"),
    ],
)
def test_wrong_directions_are_found(module: str, source: str) -> None:
    assert mistakes(source, module)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420


def modules_after(code: str) -> dict[str, list[str]]:
    """Run the code, which may call mark(name), in a fresh Python: the modules loaded at each mark."""
    prelude = "import json, sys\nmarks = {}\ndef mark(name): marks[name] = sorted(sys.modules)\n"
    script = f"{prelude}{code}\nprint(json.dumps(marks))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_core_loads_torch_and_numpy_alone() -> None:
    # torch may load triton by itself: what counts is what fastjem adds. Modules decide, not seconds, which vary.
    core = [
        name for name in ("fastjem", "fastjem.functional", "fastjem.nn") if (ROOT / name.replace(".", "/")).is_dir()
    ]
    code = "import torch, numpy\nmark('torch')\n" + "".join(f"import {name}\n" for name in core) + "mark('fastjem')"
    marks = modules_after(code)
    added = set(marks["fastjem"]) - set(marks["torch"])
    assert "fastjem.functional" in added
    assert {name.split(".")[0] for name in added} - {"fastjem", "torch", "numpy"} <= set(sys.stdlib_module_names)
    slow = {"torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes"}  # a second and more
    assert not slow & added


def test_the_command_line_loads_no_torch() -> None:
    marks = modules_after(
        "from fastjem.cli import main\nmain(['--help']); main(['--version']); main(['docter'])\nmark('cli')"
    )
    assert not {"torch", "numpy"} & set(marks["cli"])


def test_kernels_is_no_package_of_its_own() -> None:
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ") and "pip install -e ." in last_line and "import fastjem" in last_line
