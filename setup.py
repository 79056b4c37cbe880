"""What pyproject.toml can't say: `kernels/` is installed as `fastjem.kernels`, and its C++ extension is optional.

The extension links no torch library, so one build serves every version of torch. Without a C++ compiler the package
installs all the same and computes with plain torch (`fastjem doctor` says so).
"""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

extension = Pybind11Extension(
    "fastjem.kernels._C",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    # No -ffast-math: sums keep their order, and NaN and infinity stay what they are.
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *openmp],
    extra_link_args=openmp,
)
extension.optional = True

setup(
    packages=[*find_packages(include=["fastjem", "fastjem.*"]), "fastjem.kernels"],
    package_dir={"fastjem": "fastjem", "fastjem.kernels": "kernels"},
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
