"""`fastjem kernels`: Sinkhorn, NT-Xent and the prototype cross-entropy as a folder for Hugging Face's `kernels`.

The folder is what `kernel-builder` takes (build.toml, flake.nix, torch-ext/) and what it would make of that (build/
with a variant for each backend), so that `kernels.get_local_kernel` loads it as it is. It is noarch: Triton on CUDA,
plain torch elsewhere, and nothing but torch and the standard library is imported. fastjem isn't needed to use it.

What its rules ask for: a namespace of operators that no other build has, imports that are relative, metadata with the
digest of every file.
"""

import ast
import base64
import hashlib
import importlib.resources
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastjem import __version__
from fastjem.arguments import Parser
from fastjem.errors import UserError

NAME = "fastjem-losses"
PYTHON_NAME = NAME.replace("-", "_")
VERSION = 0  # of the interface; 0 is what their conventions call alpha: the Triton kernels haven't run on a GPU yet
BACKENDS = ("cpu", "cuda")
FUNCTIONS = ("nt_xent", "sinkhorn", "prototype_cross_entropy")

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "apache-2.0"
backends = [{backends}]
{hub}
[torch-noarch]
"""
HUB = """
[general.hub]
repo-id = "{repository}"
"""
FLAKE_NIX = """\
{
  description = "Losses of fastjem for the kernels library";

  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };

  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
OPS = '''\
"""The namespace of this build's operators, which no other build shares."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''
# Loaders older than the layout without a second folder look for VARIANT/NAME/__init__.py.
OLD_LAYOUT = '''\
"""For older loaders, which look here: the same names as one folder up."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{id}", _path)
_module = sys.modules.get("{id}") or importlib.util.module_from_spec(_spec)
if "{id}" not in sys.modules:
    sys.modules["{id}"] = _module
    _spec.loader.exec_module(_module)

globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = list(_module.__all__)
'''
TESTS = '''\
"""Values and gradients against plain torch. LOCAL_KERNELS="{repository}=PATH" tests a folder on this machine."""

import kernels
import pytest
import torch

losses = kernels.get_kernel("{repository}", version={version}, trust_remote_code=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
def test_nt_xent(device):
    z = torch.randn(2, 33, 48, device=device, requires_grad=True)
    loss = losses.nt_xent(z[0], z[1], temperature=0.2)
    rows = torch.nn.functional.normalize(z.double().flatten(0, 1), dim=1)
    logits = (rows @ rows.T / 0.2).masked_fill(torch.eye(66, dtype=torch.bool, device=device), -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, (torch.arange(66, device=device) + 33) % 66)
    torch.testing.assert_close(loss, expected.float())
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-3, atol=1e-6)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
def test_sinkhorn(device):
    scores = torch.randn(40, 17, device=device)
    codes = (scores.double() / 0.05 - (scores.double() / 0.05).amax()).exp()
    for _ in range(3):
        codes = codes / codes.sum(0)
        codes = codes / codes.sum(1, keepdim=True)
    torch.testing.assert_close(losses.sinkhorn(scores, epsilon=0.05), codes.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
def test_prototype_cross_entropy(device):
    student = torch.randn(3, 8, 50, device=device, requires_grad=True)
    teacher = torch.randn(2, 8, 50, device=device)
    options = dict(student_temperature=0.1, teacher_temperature=0.07)
    loss = losses.prototype_cross_entropy(student, teacher, **options)
    p, q = (student.double() / 0.1).log_softmax(2), (teacher.double() / 0.07).softmax(2)
    pairs = [-(q[t] * p[s]).sum(1).mean() for t in range(2) for s in range(3) if s != t]
    expected = sum(pairs) / len(pairs)
    torch.testing.assert_close(loss, expected.float())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-3, atol=1e-6)
'''
CARD = """\
---
library_name: kernels
license: apache-2.0
tags:
  - self-supervised-learning
---

# {name}

Three operators of self-supervised training of image encoders, from fastjem {fastjem}: Triton on NVIDIA GPUs, plain
torch on every other device. Values and gradients are held to float64 formulas. The Triton kernels have run under
Triton's interpreter and are compiled for sm_80, sm_90 and sm_100 in fastjem's tests; **none has run on a GPU yet**.

```python
import torch
from kernels import get_kernel

losses = get_kernel("{repository}", version={version}, trust_remote_code=True)

z0, z1 = torch.randn(2, 256, 128, requires_grad=True).unbind()
losses.nt_xent(z0, z1, temperature=0.1).backward()  # SimCLR; no N x N matrix in a GPU's memory

codes = losses.sinkhorn(torch.randn(256, 3000), epsilon=0.05)  # SwAV, DINOv2; in the log domain

student = torch.randn(8, 64, 4096, requires_grad=True)  # views, images, prototypes
teacher = torch.randn(2, 64, 4096)
losses.prototype_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.04).backward()  # DINO
```

## Available functions

- `nt_xent(z0, z1, *, temperature=0.5)`
- `sinkhorn(scores, *, epsilon=0.05, iterations=3, normalize_samples_first=False, dtype=None)`
- `prototype_cross_entropy(student, teacher, *, student_temperature, teacher_temperature, teacher_bias=None,
  pairs="different", weights=None)`

Tensors are float32, float64, bfloat16 or float16; losses are 0-dim float32 (float64 of float64). `torch.compile` with
`fullgraph=True` works. Backward can't be differentiated again.

Needs torch >= 2.9, so Python >= 3.10, and on a GPU the Triton that comes with torch.
"""


def template() -> Path:
    """The files that every such package begins with, which call those of `fastjem.kernels`."""
    return Path(str(importlib.resources.files("fastjem.commands").joinpath("kernel_package")))


def needed(kernels: Path, first: Sequence[Path]) -> list[Path]:
    """The modules of fastjem.kernels that some modules import, they of others, and so on; paths within `kernels`.

    All imports there are relative, within functions too. `first` are outside of it, in the place of its root.
    """
    todo = [(path, kernels) for path in first]
    found: set[Path] = set()
    while todo:
        path, package = todo.pop()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package.joinpath(*[".."] * (node.level - 1), *(node.module or "").split(".")).resolve()
            places = [base, *(base / alias.name for alias in node.names)]
            for place in places:
                module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                if place != kernels and module.exists() and module not in found:
                    found.add(module)
                    todo.append((module, module.parent))
    return sorted(path.relative_to(kernels) for path in found)


def python_files() -> dict[str, str]:
    """The Python package, without what depends on the build: path within it -> text."""
    kernels = Path(str(importlib.resources.files("fastjem.kernels"))).resolve()
    own = sorted(template().glob("*.py"))
    files = {path.name: path.read_text("utf-8") for path in own}
    files |= {path.as_posix(): (kernels / path).read_text("utf-8") for path in needed(kernels, own)}
    return files


def unique_id(files: dict[str, str]) -> str:
    """Of other contents another one, of the same contents the same."""
    text = json.dumps(files, sort_keys=True).encode()
    return hashlib.sha1(text, usedforsecurity=False).hexdigest()[:7]


def variant(files: dict[str, str], backend: str) -> dict[str, str]:
    """What build/torch-BACKEND/ holds: path -> text."""
    name = f"_{PYTHON_NAME}_{backend}_{unique_id(files)}"
    built = {**files, "_ops.py": OPS.format(id=name), f"{PYTHON_NAME}/__init__.py": OLD_LAYOUT.format(id=name)}
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in sorted(built.items())}
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()},
        },
    }
    return {**built, "metadata.json": json.dumps(metadata, indent=2) + "\n"}


def everything(repository: str) -> dict[str, str]:
    """The whole folder: path -> text."""
    files = python_files()
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    facts = {"name": NAME, "version": VERSION, "repository": repository or f"OWNER/{NAME}", "fastjem": __version__}
    hub = HUB.format(repository=repository) if repository else ""
    found = {
        "build.toml": BUILD_TOML.format(**facts, backends=backends, hub=hub),
        "flake.nix": FLAKE_NIX,
        "CARD.md": CARD.format(**facts),
        "build/CARD.md": CARD.format(**facts),
        f"tests/test_{PYTHON_NAME}.py": TESTS.format(**facts),
    }
    found |= {f"torch-ext/{PYTHON_NAME}/{path}": text for path, text in files.items()}
    for backend in BACKENDS:
        found |= {f"build/torch-{backend}/{path}": text for path, text in variant(files, backend).items()}
    return found


def write(folder: Path, repository: str = "") -> Path:
    """Make the folder, which must be new or empty, or one that this made before, which is replaced.

    Raises:
        UserError: for a folder that holds something else, and a repository that isn't OWNER/NAME.
    """
    if repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--repository must be OWNER/NAME, got {repository}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        toml = folder / "build.toml"
        if not toml.is_file() or f'name = "{NAME}"' not in toml.read_text("utf-8"):
            raise UserError(f"--out {folder} must be a new or empty folder, or one that this command wrote")
        for part in ("build", "torch-ext", "tests"):
            shutil.rmtree(folder / part, ignore_errors=True)
    for path, text in everything(repository).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())  # the same bytes on every system, as digests are of them
    return folder


def parser() -> Parser:
    parser = Parser(
        "fastjem kernels",
        description=f"write {', '.join(FUNCTIONS)} as a folder for Hugging Face's kernels library (kernels.get_kernel)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--repository", default="", metavar="OWNER/NAME", help="where it is to be uploaded, for its card and build.toml"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    folder = write(arguments.out, arguments.repository)
    print(
        f"{folder}: kernels.get_local_kernel({str(folder)!r}) loads it; `kernel-builder build-and-upload` publishes it"
    )
    return 0
