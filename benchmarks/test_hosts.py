"""The host's time for a call, of tiny tensors."""

from fastjem.bench.cases.hosts import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
