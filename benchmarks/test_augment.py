"""Views from a table of parameters, and windows of images in memory."""

from fastjem.bench.cases.augment import CASES  # noqa: F401  (conftest.py runs them)


def test_forward(benchmark, step):
    benchmark(step)
