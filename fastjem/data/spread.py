"""Which images stand for all of a source's."""

import numpy as np


def spread(size: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `size`, evenly."""
    most = min(size, most)
    return np.arange(most) * size // max(most, 1)
