"""What sdist and wheel hold, and that a wheel works away from its sources, with a C++ compiler and without."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def _can_build() -> bool:
    """The build's own requirements, which users get by build isolation, are here: no package index is needed."""
    try:
        version("pybind11")
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _can_build(), reason="needs setuptools>=77 and pybind11")


def python(code: str, cwd: Path, **environment: str) -> str:
    """Output of the code, warnings and log included."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def build(kind: str, source: Path, **environment: str) -> tuple[Path, str]:
    """The file that build_sdist or build_wheel makes, as pip calls them, and the log."""
    # Without the folder of the sources on the path, as pip has it: there `kernels` would be ours in place of Hugging
    # Face's, which looks at every build where it is installed.
    code = f"import sys\nsys.path.remove('')\nfrom setuptools import build_meta\nprint(build_meta.build_{kind}('made'))"
    log = python(code, source, **environment)
    return source / "made" / log.splitlines()[-1], log


def installed(wheel: Path, target: Path, code: str) -> str:
    """Output of the code where this wheel is the only fastjem.

    -S, as site would bring the editable installation of the sources with it; torch comes by its path.
    """
    zipfile.ZipFile(wheel).extractall(target)
    of_torch = str(Path(torch.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=target,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(target), of_torch])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def copy_sources(to: Path) -> Path:
    to.mkdir()
    for name in ("fastjem", "kernels", "csrc"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("source") / "copy")


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, unpacked."""
    archive, _ = build("sdist", source)
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The sources with next to no C++, so that a build takes a second."""
    source = copy_sources(tmp_path / "source")
    shutil.rmtree(source / "csrc")
    (source / "csrc/family").mkdir(parents=True)
    (source / "csrc/family/answer.h").write_text("#define ANSWER 1\n")
    (source / "csrc/family/module.cpp").write_text(
        """
        #include <Python.h>
        #include "family/answer.h"
        static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
        PyMODINIT_FUNC PyInit__C() {
          PyObject* module = PyModule_Create(&definition);
          PyModule_AddIntConstant(module, "answer", ANSWER);
          return module;
        }
        """
    )
    return source


CHECK = """
import torch, fastjem, fastjem.functional as F
from fastjem.ops import implementations
p, z = torch.randn(2, 5, 7).double().unbind()
reference = -torch.nn.functional.cosine_similarity(p, z).mean()
torch.testing.assert_close(F.negative_cosine(p, z), reference, check_dtype=False, rtol=1e-6, atol=1e-6)
print(fastjem.__version__, fastjem.__file__)
print(implementations()["negative_cosine"]["cpu"])
"""


def files(folder: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}


@pytest.mark.exhaustive
def test_sdist_is_whole_and_its_wheel_works(source: Path, sdist: Path, tmp_path: Path) -> None:
    code = ("csrc/**/*.*", "kernels/**/*.py", "fastjem/**/*.py")
    assert files(source, *code) == files(sdist, *code)
    assert not files(sdist, "**/*.so", "**/*.pyc")

    wheel, _ = build("wheel", sdist)
    names = zipfile.ZipFile(wheel).namelist()
    modules = files(source, "fastjem/**/*.py") | {f"fastjem/{name}" for name in files(source, "kernels/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"fastjem/py.typed", "fastjem/kernels/py.typed", "fastjem/kernels/_C.pyi"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"fastjem", f"fastjem-{version('fastjem')}.dist-info"}
    assert sum(name.startswith("fastjem/kernels/_C.") and name.endswith(".so") for name in names) == 1

    target = tmp_path / "target"
    first, second = installed(wheel, target, CHECK).splitlines()
    assert first == f"{version('fastjem')} {target / 'fastjem/__init__.py'}"
    assert second == "C++"


def test_without_a_compiler_it_installs_and_says_so(sdist: Path, tmp_path: Path) -> None:
    wheel, log = build("wheel", sdist, **NO_COMPILER)
    (warning,) = (line for line in log.splitlines() if "warning" in line and "fastjem.kernels._C" in line)
    assert "the package works without it" in warning and "/nonexistent" in warning
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C" in name and name.endswith(".so")]

    target = tmp_path / "target"
    _, implementation = installed(wheel, target, CHECK).splitlines()
    assert implementation.startswith("reference (the C++ extension doesn't load")
    doctor = installed(wheel, target, "from fastjem.cli import main; main(['doctor'])")
    assert doctor.count("the C++ extension doesn't load") == 1


def test_a_stale_build_folder_adds_nothing(small: Path) -> None:
    extra = small / "fastjem/removed.py"
    extra.write_text("")
    wheel, _ = build("wheel", small, **NO_COMPILER)
    assert "fastjem/removed.py" in zipfile.ZipFile(wheel).namelist()
    left = next(small.glob("build/lib*/fastjem/removed.py"))
    extra.unlink()
    wheel, _ = build("wheel", small, **NO_COMPILER)
    assert not left.exists()
    assert "fastjem/removed.py" not in zipfile.ZipFile(wheel).namelist()


def test_the_extension_fits_its_sources(small: Path) -> None:
    """It is built again after a header changed, and gone where that fails."""
    in_place = "import runpy, sys\nsys.argv = ['setup.py', 'build_ext', '--inplace']\nrunpy.run_path('setup.py')"
    answer = "import sys\nsys.path.insert(0, 'kernels')\nimport _C\nprint(_C.answer)"
    for number in "12":
        (small / "csrc/family/answer.h").write_text(f"#define ANSWER {number}\n")
        python(in_place, small)
        assert python(answer, small) == f"{number}\n"
    (small / "csrc/family/answer.h").write_text("#error\n")
    assert "the package works without it" in python(in_place, small)
    assert not files(small, "kernels/_C*.so", "build/lib*/fastjem/kernels/_C*.so")


def test_what_becomes_of_the_extension_can_be_asked_for(small: Path) -> None:
    wheel, log = build("wheel", small, FASTJEM_EXTENSION="omit")
    assert wheel.name.endswith("-py3-none-any.whl") and "csrc/" not in log
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    with pytest.raises(AssertionError, match="nonexistent"):
        build("wheel", small, FASTJEM_EXTENSION="require", **NO_COMPILER)
    with pytest.raises(AssertionError, match="must be try, require or omit, got 'no'"):
        build("wheel", small, FASTJEM_EXTENSION="no")
    wheel, _ = build("wheel", small, FASTJEM_EXTENSION="require")
    assert f"cp{sys.version_info[0]}{sys.version_info[1]}-linux" in wheel.name or sys.platform != "linux"


def test_workflows_and_container_name_files_that_are_there() -> None:
    yaml = pytest.importorskip("yaml")
    steps = []
    for path in sorted(ROOT.glob(".github/workflows/*.yml")):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        steps += [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    named = re.findall(r"(?:\.ci|tests)/\w+(?:\.py)?", "\n".join(steps) + (ROOT / "pyproject.toml").read_text())
    assert {"tests/smoke.py", ".ci/chosen", ".ci/run"} <= set(named)
    assert all((ROOT / name).exists() for name in named)
    container = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", container, re.MULTILINE) for word in line.split()]
    shown = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(shown) and all((ROOT / name).exists() for name in copied)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_installs_again_only_what_changed(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc/family").mkdir(parents=True)
    (tmp_path / "csrc/family/some.h").write_text("")

    def would_run() -> str:
        arguments = ["make", "-n", "test", f"PYTHON={sys.executable}"]
        path = {"PATH": os.environ["PATH"]}  # and not the variables of a make that runs this test
        return subprocess.run(arguments, cwd=tmp_path, env=path, capture_output=True, text=True, check=True).stdout

    def change(name: str, seconds: int) -> None:
        os.utime(tmp_path / name, (future + seconds, future + seconds))

    assert "-c constraints.txt" in would_run()
    stamp = f".venv/ready-{sys.version_info[0]}.{sys.version_info[1]}"
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).write_text("")
    future = (tmp_path / stamp).stat().st_mtime + 100
    change(stamp, 0)
    assert "pip install" not in would_run()
    change("csrc/family/some.h", 1)
    assert "--no-build-isolation" in would_run() and "constraints.txt" not in would_run()
    change("constraints.txt", 1)
    assert "-c constraints.txt" in would_run()
