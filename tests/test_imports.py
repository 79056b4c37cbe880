"""Who may import whom, and what an import brings along.

Imports go one way, `_C -> kernels -> ops -> functional -> nn -> config -> methods -> build -> run -> cli`:
docs/architecture.md says why. A module that is new at the top of `fastjem/` is given its place in ORDER, BESIDE or
LEAVES.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A layer imports from those before it, from BESIDE (from `config` on), and from LEAVES.
ORDER = (
    "kernels",
    "in_graph",
    "host_groups",
    "turns",
    "collectives",
    "ops",
    "functional",
    "nn",
    "config",
    "exports",
    "given",
    "starting",
    "micro_batches",
    "methods",
    "health",
    "step",
    "sharding",
    "resume",
    "batching",
    "prepare",
    "build",
    "values",
    "restarts",
    "folder",
    "meter",
    "runs",
    "card",
    "portable",
    "probes",
    "banner",
    "embeddings",
    "classifiers",
    "finetuning",
    "journal",
    "saving",
    "report",
    "large_batches",
    "step_graph",
    "stepping",
    "run",
    "commands",
    "api",
    "cli",
    "completion",
    "__main__",
)
# What knows no method and no run. From each other and from `nn` and below, never from `config` and above.
BESIDE = (
    "data",
    "encoders",
    "blocks",
    "backbones",
    "optim",
    "ranks",
    "checkpoints",
    "gradients",
    "sharded_checkpoints",
    "atomic",
    "loggers",
    "trackers",
    "terminal",
    "precision",
    "lock",
    "presence",
    "stopping",
    "bench",
    "compat",
)
# What knows nothing of fastjem but other leaves, so that anybody may import it.
LEAVES = (
    "errors",
    "advice",
    "arguments",
    "capture",
    "fields",
    "hub",
    "launchers",
    "machine",
    "printing",
    "reading",
    "schedules",
    "yaml_text",
)


@dataclass(frozen=True)
class Import:
    """One name that a module imports: `from fastjem.nn import parts` is ("fastjem.nn", "parts")."""

    module: str
    name: str = ""  # empty: `import module`
    relative: bool = False

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Source:
    module: str  # its full name, as it is imported
    text: str
    is_package: bool = False

    @property
    def package(self) -> str:
        return self.module if self.is_package else self.module.rpartition(".")[0]

    def imports(self) -> Iterator[Import]:
        """What it imports of fastjem, within functions too: an import at call time is an arrow all the same."""
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                found = [Import(alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = self.package.split(".")
                base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
                module = ".".join(filter(None, (base, node.module)))
                found = [Import(module, alias.name, relative=node.level > 0) for alias in node.names]
            else:
                continue
            yield from (one for one in found if one.module.split(".")[0] in ("fastjem", "kernels"))


def sources() -> list[Source]:
    found = []
    for folder in ("fastjem", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "fastjem" else ("fastjem", *parts)).removesuffix(".__init__")
            found.append(Source(name, path.read_text(), path.name == "__init__.py"))
    return found


SOURCES = sources()
MODULES = {source.module for source in SOURCES}


def layer(module: str) -> str:
    """ "fastjem.nn.heads" -> "nn"; "fastjem" itself, the version and names that are looked up when asked for, -> ""."""
    return module.partition(".")[2].partition(".")[0]


def allowed(here: str) -> set[str]:
    """The layers that a module of the layer `here` may import from, besides its own."""
    if here == "":
        return set(ORDER)
    if here in LEAVES:
        return set(LEAVES)
    if here in BESIDE:
        return {*ORDER[: ORDER.index("config")], *BESIDE, *LEAVES}
    if here not in ORDER or here == "kernels":
        return set()
    below = set(ORDER[: ORDER.index(here)])
    return {*below, *LEAVES, *(BESIDE if "nn" in below else ())}


def layer_of(imported: Import) -> str:
    return layer(str(imported) if imported.module == "fastjem" else imported.module)


def wrong_directions(source: Source) -> Iterator[str]:
    here = layer(source.module)
    for imported in source.imports():
        there = layer_of(imported)
        outside = imported.module.split(".")[0] == "kernels"  # the folder's name, under which it can't be imported
        of_the_root = there in ("", "__version__") and here != "kernels"
        if outside or not (here == there or of_the_root or there in allowed(here)):
            yield f"{source.module} imports {imported}"


def private_names(source: Source) -> Iterator[str]:
    """Names with a leading underscore that belong to another package: what two packages share has a public home."""
    for imported in source.imports():
        path = str(imported).split(".")
        for i, name in enumerate(path):
            if not name.startswith("_") or name.startswith("__"):
                continue
            owner = ".".join(path[:i])
            owner = owner if owner not in MODULES or is_package(owner) else owner.rpartition(".")[0]
            if not f"{source.package}.".startswith(f"{owner}."):
                yield f"{source.module} imports {imported}"


def is_package(module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in MODULES)


def absolute_imports(source: Source) -> Iterator[str]:
    """In `fastjem.kernels` an arrow is written as `from . import`, so that it can't lead out."""
    if layer(source.module) == "kernels":
        yield from (f"{source.module} imports {one}" for one in source.imports() if not one.relative)


def arrows(given: Iterable[Source]) -> dict[str, set[str]]:
    """From each module to the modules that it imports.

    `fastjem` itself is left out: its names are looked up when asked for.
    """
    given = list(given)
    modules = {source.module for source in given}
    graph: dict[str, set[str]] = {}
    for source in given:
        names = ((str(one) if str(one) in modules else one.module) for one in source.imports())
        graph[source.module] = {name for name in names if name in modules - {source.module, "fastjem"}}
    graph.pop("fastjem", None)
    return graph


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    """Where a walk along the arrows comes back to a module that it is still within."""
    finished: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[str]:
        if module in path:
            yield " -> ".join([*path[path.index(module) :], module])
        elif module not in finished:
            for following in sorted(graph[module]):
                yield from walk(following, [*path, module])
            finished.add(module)

    for module in sorted(graph):
        yield from walk(module, [])


def test_each_module_has_its_place() -> None:
    unplaced = {layer(module) for module in MODULES} - {"", *ORDER, *BESIDE, *LEAVES}
    assert not unplaced, "say in ORDER, BESIDE or LEAVES where they stand"
    gone = {*ORDER, *BESIDE, *LEAVES} - {layer(module) for module in MODULES}
    assert not gone, "nothing is there under these names"


@pytest.mark.parametrize("rule", [wrong_directions, private_names, absolute_imports])
def test_imports_keep_to_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    mistakes = [mistake for source in SOURCES for mistake in rule(source)]
    assert not mistakes, "\n".join(mistakes)


def test_no_import_circle() -> None:
    found = list(circles(arrows(SOURCES)))
    assert not found, "\n".join(found)


def test_modules_stay_small() -> None:
    lines = {source.module: len(source.text.splitlines()) for source in SOURCES}
    assert not {module: count for module, count in lines.items() if count > 420}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fastjem.kernels.covariance.cpu", "from fastjem.ops import implementations"),
        ("fastjem.kernels.covariance.cpu", "import fastjem"),
        ("fastjem.kernels.covariance.cpu", "from ...functional import vicreg"),
        ("fastjem.ops.autograd", "def f():\n    import fastjem.functional as F"),
        ("fastjem.functional.contrastive", "from fastjem import nn"),
        ("fastjem.functional.contrastive", "from ..methods import simclr"),
        ("fastjem.collectives", "from fastjem.functional import nt_xent"),
        ("fastjem.data.source", "from fastjem.methods import METHODS"),
        ("fastjem.data.source", "def f():\n    from fastjem import config"),
        ("fastjem.methods.dino", "from fastjem.build import build"),
        ("fastjem.nn.heads", "import kernels"),
    ],
)
def test_wrong_directions_are_found(module: str, text: str) -> None:
    assert list(wrong_directions(Source(module, text)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from fastjem.functional import _checks", True),
        ("from fastjem.functional._checks import matrices", True),
        ("from fastjem.ops.autograd import _rescaled", True),
        ("import fastjem.kernels._C", True),
        ("from fastjem.nn import _shared", False),
        ("from . import _shared", False),
        ("from fastjem import __version__", False),
        ("from torch import _C", False),
    ],
)
def test_private_names_are_found(text: str, found: bool) -> None:
    assert bool(list(private_names(Source("fastjem.nn.heads", text)))) == found


def test_circles_are_found() -> None:
    one = Source("fastjem.kernels.one", "from . import two")
    two = Source("fastjem.kernels.two", "def f():\n    from .three.gpu import g")
    three = Source("fastjem.kernels.three.gpu", "from ..one import h")
    assert list(circles(arrows([one, two, three]))) == [
        "fastjem.kernels.one -> fastjem.kernels.two -> fastjem.kernels.three.gpu -> fastjem.kernels.one"
    ]
    assert not list(circles(arrows([one, two, Source("fastjem.kernels.three.gpu", "from torch import h")])))
    assert list(absolute_imports(Source("fastjem.kernels.four", "from fastjem.kernels import one")))


def modules_after(code: str) -> dict[str, list[str]]:
    """Run the code, which may call mark(name), in a fresh Python: the modules loaded at each mark."""
    prelude = "import json, sys\nmarks = {}\ndef mark(name): marks[name] = sorted(sys.modules)\n"
    script = f"{prelude}{code}\nprint(json.dumps(marks))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_core_loads_torch_and_numpy_alone() -> None:
    # torch may load triton by itself: what counts is what fastjem adds. Modules decide, not seconds, which vary.
    code = "import torch, numpy\nmark('torch')\nimport fastjem, fastjem.functional, fastjem.nn\nmark('fastjem')"
    marks = modules_after(code)
    added = set(marks["fastjem"]) - set(marks["torch"])
    assert "fastjem.functional" in added and "fastjem.nn" in added
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
