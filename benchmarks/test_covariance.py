"""Barlow Twins and VICReg."""

from fastjem.bench.cases.covariance import CASES  # noqa: F401  (conftest.py runs them)


def test_forward_and_backward(benchmark, step):
    benchmark(step)
