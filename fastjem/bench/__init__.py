"""Benchmarks: what each operator costs against eager torch, torch.compile, the peers and the hardware's floor.

`fastjem bench`, `make bench` and `make gpu-check` all call `main`. `fastjem/bench/cases/__init__.py` says how to add a
case.
"""

from fastjem.bench.run import main

__all__ = ["main"]
