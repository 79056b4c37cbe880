"""EMA of weights."""

from fastjem.bench.cases.weights import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
