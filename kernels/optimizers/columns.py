"""The columns of `settings`: what a group of parameters has, as numbers."""

LARS: tuple[str, ...] = (
    "lr",
    "momentum",
    "weight_decay",
    "teacher_momentum",
    "trust_coeff",
    "eps",
    "nesterov",  # 0 or 1
    "adapts",  # the rate to each tensor: 0 never (SGD), 1 where weight_decay isn't 0, 2 always
    "trust_clip",  # 0 or 1: a rate is only ever made smaller
    "decay_in_norm",  # 0 or 1: the norm is of gradient and decay together, in place of the sum of both norms
)
ADAMW: tuple[str, ...] = ("lr", "beta1", "beta2", "eps", "weight_decay", "teacher_momentum")
