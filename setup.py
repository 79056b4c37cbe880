"""What pyproject.toml can't say: `kernels/` is installed as `fastjem.kernels`, and its C++ extension is optional.

The extension links no torch library, so one build serves every version of torch. Without a C++ compiler the package
installs all the same and computes with plain torch (`fastjem doctor` says so). The environment variable
FASTJEM_EXTENSION decides otherwise: `require` makes a failed compilation a failed build (wheels for others), `omit`
leaves the extension out, and the wheel is py3-none-any, for every system and Python.
"""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class CleanBuild(build_py):
    """Start from nothing: what an earlier build left in build/ would be packed into the wheel, removed modules too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class OptionalExtension(build_ext):
    """Where the build fails nothing is left of an earlier one, which would not fit the sources any more."""

    def run(self) -> None:
        in_place, name = self.inplace, Path(self.get_ext_filename(extension.name))
        built = self.build_lib / name
        built.unlink(missing_ok=True)
        super().run()
        if in_place and not built.exists():
            Path("kernels", name.name).unlink(missing_ok=True)

    def warn(self, msg: str) -> None:
        super().warn(f"{msg} (the package works without it, and slower: plain torch computes instead of C++)")


openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

extension = Pybind11Extension(
    "fastjem.kernels._C",
    sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=17,
    # No -ffast-math: sums keep their order, and NaN and infinity stay what they are.
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *openmp],
    extra_link_args=openmp,
)

wish = os.environ.get("FASTJEM_EXTENSION", "try")
if wish not in ("try", "require", "omit"):
    raise SystemExit(f"FASTJEM_EXTENSION must be try, require or omit, got {wish!r}")
extension.optional = wish == "try"

families = [f"fastjem.kernels.{name}" for name in find_packages("kernels")]

with ParallelCompile():
    setup(
        packages=[*find_packages(include=["fastjem", "fastjem.*"]), "fastjem.kernels", *families],
        package_dir={"fastjem": "fastjem", "fastjem.kernels": "kernels"},
        ext_modules=[] if wish == "omit" else [extension],
        cmdclass={"build_py": CleanBuild, "build_ext": OptionalExtension},
    )
