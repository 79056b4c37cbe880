"""Cross-entropy on labels."""

from fastjem.bench.cases.supervised import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
