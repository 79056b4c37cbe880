"""All benchmark cases, a file per family as in fastjem.functional.

To add one: append a `Case` to `CASES` in its family's file. It needs inputs, the formula in plain torch, the call of
ours, and its bytes and FLOPs; a peer is a function that imports it and returns it.
"""

from fastjem.bench.case import Case
from fastjem.bench.cases import (
    augment,
    contrastive,
    covariance,
    hosts,
    neighbors,
    optimizers,
    options,
    predictive,
    prototypes,
    spectral,
    supervised,
    weights,
)

FAMILIES = (
    weights,
    optimizers,
    supervised,
    predictive,
    contrastive,
    options,
    prototypes,
    neighbors,
    covariance,
    spectral,
    augment,
    hosts,
)


def cases() -> list[Case]:
    return [case for family in FAMILIES for case in family.CASES]
