"""What a method's options may be, so that a mistyped one is an error and not a run that learns nothing.

Each function takes a method's name and its options by theirs, and raises a ValueError that names both.
"""

import math


def shares(method: str, **options: float) -> None:
    """Shares, probabilities and momenta: within 0 and 1, both included."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            _refuse(method, name, "between 0 and 1", value)


def positive(method: str, **options: float) -> None:
    """What is divided by, temperatures above all: above 0."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            _refuse(method, name, "above 0 and finite", value)


def not_negative(method: str, **options: float) -> None:
    """Weights of terms, and lengths of time: at least 0."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            _refuse(method, name, "at least 0 and finite", value)


def block_masks(method: str, mask: float, least_mask: float, masked_images: float) -> None:
    """The largest and the least share of the patches that is hidden, and the share of images that have a mask."""
    if not 0 <= least_mask <= mask <= 1 or not mask:
        raise ValueError(f"{method}: 0 <= least_mask <= mask <= 1 must hold, got {least_mask} and {mask}")
    if not 0 < masked_images <= 1:
        raise ValueError(f"{method}: masked_images must be a share above 0, got {masked_images}")


def finite(method: str, **options: float) -> None:
    for name, value in options.items():
        if not math.isfinite(value):
            _refuse(method, name, "finite", value)


def _refuse(method: str, name: str, range_: str, value: float) -> None:
    raise ValueError(f"{method}: {name} must be {range_}, got {value}")
