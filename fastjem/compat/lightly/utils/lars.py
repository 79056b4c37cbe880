"""`lightly.utils.lars`: LARS with lightly's arguments."""

from typing import Any

from fastjem import optim
from fastjem.functional import checks


class LARS(optim.LARS):
    """`fastjem.optim.LARS` in one pass over all parameters, with lightly's arguments and defaults.

    Args:
        params, lr, momentum, weight_decay, nesterov, eps: as there.
        dampening: 0; another isn't done here, and is refused.
        trust_coefficient: its `trust_coeff`, by which a group of parameters has it, too.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ):
        if dampening:
            checks.fail("LARS", "dampening must be 0", dampening)
        groups = list(params)
        if any(isinstance(group, dict) and "trust_coefficient" in group for group in groups):
            groups = [
                {"trust_coeff" if name == "trust_coefficient" else name: value for name, value in group.items()}
                for group in groups
            ]
        super().__init__(
            groups, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, trust_coeff=trust_coefficient,
            eps=eps,
        )  # fmt: skip
