"""The folder for Hugging Face's kernels library: by their parsers and loader, in a process that has no fastjem."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastjem.functional as F
from fastjem.cli import main
from fastjem.commands import kernels as export
from fastjem.errors import UserError

pytest.importorskip("huggingface_hub")

# Loads the folder named first, takes inputs from the file named second, and leaves what comes out in the third.
BEGINNING = """
import importlib.util, sys
from pathlib import Path
assert importlib.util.find_spec("fastjem") is None
import torch
from kernels import get_local_kernel
losses = get_local_kernel(Path(sys.argv[1]), backend=sys.argv[4] or None)
operators = sys.modules[losses.__name__ + ".operators"]
given = torch.load(sys.argv[2])
z = given["z"].requires_grad_()
student = given["student"].requires_grad_()

def found(nt_xent, prototype_cross_entropy, sinkhorn):
    first = nt_xent(z[0], z[1], temperature=0.2)
    codes = sinkhorn(given["scores"], epsilon=0.1, iterations=2, normalize_samples_first=True)
    options = dict(student_temperature=0.1, teacher_temperature=0.07)
    options |= dict(teacher_bias=given["bias"], weights=given["weights"])
    second = prototype_cross_entropy(student, given["teacher"], **options)
    gradients = torch.autograd.grad(3 * first + 3 * second, [z, student])
    return first, gradients[0], codes, second, gradients[1]

functions = [getattr(losses, name) for name in losses.__all__]
results = {"name": losses.__name__, "said": []}
for z_of, temperature in ((z, "warm"), (z[:, :0], 0.2)):
    try:
        losses.nt_xent(z_of[0], z_of[1], temperature=temperature)
    except ValueError as error:
        results["said"].append(str(error))
"""
REFERENCE_AND_TRITON = """
results["reference"] = found(*functions)
results["loaded"] = sorted(sys.modules)
if importlib.util.find_spec("triton"):  # on the CPU, by Triton's interpreter
    library = torch.library.Library(losses.__name__, "IMPL")
    for name, launcher in operators.ON_CUDA.items():
        library.impl(name, operators._plain(launcher), "CPU")
    results["triton"] = found(*functions)
    results["loaded for triton"] = sorted(sys.modules)
torch.save(results, sys.argv[3])
"""
COMPILED = """
results["compiled"] = found(*[torch.compile(f, backend="aot_eager", fullgraph=True) for f in functions])
rows = given["z"].detach()
views = list(given["student"].detach()), list(given["teacher"])
arguments = {
    "nt_xent": (rows, rows, 0, 0.2, False, True),
    "nt_xent_backward": (rows, rows, rows[..., 0], rows[..., 0], None, 0, 0.2, False, True),
    "sinkhorn": (given["scores"], 0.1, 3, False, torch.float32),
    "prototype_cross_entropy": (*views, 0.1, 0.07, None, "all", None, False, [True] * 3),
}
assert set(arguments) == set(operators.REFERENCES)
for name, values in arguments.items():
    torch.library.opcheck(getattr(operators.ops, name).default, values)
torch.save(results, sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "made"
    assert main(["kernels", "--out", str(folder), "--repository", "someone/fastjem-losses"]) == 0
    return folder


def given() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"z": (2, 33, 24), "scores": (20, 9), "student": (3, 6, 40), "teacher": (2, 6, 40), "bias": (40,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()} | {
        "weights": torch.rand(6, generator=random)
    }


def loaded(code: str, folder: Path, tmp_path: Path, backend: str = "", **environment: str) -> dict:
    """What the code found. -S, as site would bring the editable installation of fastjem with it."""
    torch.save(given(), tmp_path / "given.pt")
    words = [str(folder), str(tmp_path / "given.pt"), str(tmp_path / "found.pt"), backend]
    environment |= {"PYTHONPATH": str(Path(torch.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-S", "-c", BEGINNING + code, *words],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return torch.load(tmp_path / "found.pt")


def expected(wide: bool) -> list[torch.Tensor]:
    """The same by fastjem; wide: in float64."""
    values = {name: x.double() if wide else x for name, x in given().items()}
    z = values["z"].requires_grad_()
    student = values["student"].requires_grad_()
    nt_xent = F.nt_xent(z[0], z[1], temperature=0.2)
    codes = F.sinkhorn(values["scores"], epsilon=0.1, iterations=2, normalize_samples_first=True)
    loss = F.prototype_cross_entropy(
        student, values["teacher"], student_temperature=0.1, teacher_temperature=0.07,
        teacher_bias=values["bias"], weights=values["weights"],
    )  # fmt: skip
    gradients = torch.autograd.grad(3 * nt_xent, z)[0], torch.autograd.grad(3 * loss, student)[0]
    return [x.float() for x in (nt_xent, gradients[0], codes, loss, gradients[1])]


def same(found: tuple[torch.Tensor, ...], right: list[torch.Tensor]) -> None:
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_their_library_loads_it_where_there_is_no_fastjem(folder: Path, tmp_path: Path) -> None:
    found = loaded(REFERENCE_AND_TRITON, folder / "build/torch-cuda", tmp_path, TRITON_INTERPRET="1")
    assert found["said"] == [
        "nt_xent: temperature must be a positive number, got 'warm'",
        "nt_xent: z0 and z1 must be [N, D], floating-point, not empty, got (0, 24) torch.float32",
    ]
    name = found["name"]
    assert name.startswith("_fastjem_losses_cuda_")
    assert name + ".prototypes.reference" in found["loaded"] and "fastjem" not in found["loaded"]
    assert name + ".contrastive.gpu_engine" not in found["loaded"]  # Triton's part waits for a GPU
    same(found["reference"], expected(wide=True))
    same(found["reference"], expected(wide=False))
    if "triton" in found:
        assert {name + ".contrastive.gpu_engine", name + ".prototypes.sinkhorn"} <= set(found["loaded for triton"])
        same(found["triton"], expected(wide=True))


@pytest.mark.exhaustive
def test_its_operators_compile(folder: Path, tmp_path: Path) -> None:
    found = loaded(COMPILED, folder, tmp_path, backend="cpu")
    assert found["name"].startswith("_fastjem_losses_cpu_")
    same(found["compiled"], expected(wide=True))


CHECKED = """
import sys
from pathlib import Path
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
folder = Path(sys.argv[1])
build = Build.open(folder)
assert [str(backend) for backend in build.general.backends] == ["cpu", "cuda"], build.general.backends
names = set()
for path in sorted(folder.glob("build/torch-*")):
    metadata = Metadata.read_from_file(path / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))
    assert str(metadata.backend.backend_type).lower() == path.name.removeprefix("torch-")
    assert str(metadata.name) == "fastjem-losses" and metadata.python_depends == []
    names.add(metadata.id)
assert len(names) == 2 and all(name.isidentifier() for name in names)
from kernels.variants import get_variants_local, parse_variant
assert len(get_variants_local(folder / "build")) == 2
from kernels.cli.info import print_kernel_info
print_kernel_info(str(folder))
"""


def test_their_parsers_take_it(folder: Path, tmp_path: Path) -> None:
    # From an empty folder: in the repository's root `kernels` is another package.
    arguments = [sys.executable, "-c", CHECKED, str(folder)]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "Name: fastjem-losses" in run.stdout and "Backends: cpu, cuda" in run.stdout


def registered_names(tree: ast.Module) -> list[ast.expr]:
    """What torch.library is told operators are called."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names = {"define", "impl", "register_fake", "custom_op", "triton_op", "register_kernel", "register_autograd"}
    return [call.args[0] for call in calls if call.func.attr in names]  # type: ignore[union-attr]


def test_it_keeps_their_rules(folder: Path) -> None:
    """Relative imports, no other package than torch and Triton, operators in the build's own namespace."""
    package = folder / "torch-ext" / export.PYTHON_NAME
    files = sorted(package.rglob("*.py"))
    assert (package / "__init__.py") in files and not (package / export.PYTHON_NAME).exists()
    registered = 0
    for path in files:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                modules = [] if node.level else [node.module or ""]
            else:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {module.partition(".")[0] for module in modules}
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, (path, roots)
        for name in registered_names(tree):
            registered += 1
            assert isinstance(name, ast.Call) and getattr(name.func, "id", "") == "add_op_namespace_prefix", path
    assert registered == 4
    assert not (package / "_ops.py").exists()  # kernel-builder's
    for backend in export.BACKENDS:
        built = folder / "build" / f"torch-{backend}"
        extra = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
        assert extra - {path.relative_to(package).as_posix() for path in files} == {
            "_ops.py", "metadata.json", f"{export.PYTHON_NAME}/__init__.py"
        }  # fmt: skip


def test_other_contents_have_another_namespace() -> None:
    files = export.python_files()
    assert export.unique_id(files) == export.unique_id(dict(files))
    assert export.unique_id(files) != export.unique_id({**files, "functions.py": files["functions.py"] + "\n"})


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="must be a new or empty folder"):
        export.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="must be OWNER/NAME, got nobody"):
        export.write(tmp_path / "new", "nobody")
    stale = folder / "torch-ext" / export.PYTHON_NAME / "removed.py"
    stale.write_text("")
    export.write(folder, "someone/fastjem-losses")
    assert not stale.exists()
