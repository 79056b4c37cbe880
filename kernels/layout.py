"""How the elements of a tensor lie in memory, from its size and strides alone: what a cached table is made of."""

from collections.abc import Sequence


def layout(size: Sequence[int], stride: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(size, stride) of the dimensions that are more than one element; () for a contiguous tensor."""
    longer = tuple((n, s) for n, s in zip(size, stride, strict=True) if n != 1)
    expected = 1
    for n, s in reversed(longer):
        if s != expected:
            return longer
        expected *= n
    return ()


def is_dense(of: tuple[tuple[int, int], ...]) -> bool:
    """Whether the elements fill their memory, in whatever order of dimensions."""
    expected = 1
    for n, s in sorted(of, key=lambda dimension: dimension[1]):
        if s != expected:
            return False
        expected *= n
    return True
