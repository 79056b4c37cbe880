"""Sinkhorn, SwAV's and DINO's losses."""

from fastjem.bench.cases.prototypes import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
