"""Optimisers that move the teacher in the same pass."""

from fastjem.bench.cases.optimizers import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
