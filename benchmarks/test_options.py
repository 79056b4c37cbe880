"""Contrastive losses with options."""

from fastjem.bench.cases.options import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
