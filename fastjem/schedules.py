"""Values that change over training: learning rates, momenta, temperatures.

Names, arguments and values are lightly's.
"""

import math
import warnings

import torch


def cosine_schedule(
    step: int, max_steps: int, start_value: float, end_value: float, period: int | None = None
) -> float:
    """From `start_value` at step 0 to `end_value` at step `max_steps - 1` (and after), along half a cosine.

    With a `period`, up and down for ever: at `end_value` after half of it, and back.
    """
    if step < 0 or max_steps < 0:
        raise ValueError(f"cosine_schedule: step and max_steps must not be negative, got {step} and {max_steps}")
    if period is not None and period <= 0:
        raise ValueError(f"cosine_schedule: period must be positive, got {period}")
    if period is None and step > max_steps:
        warnings.warn(f"cosine_schedule: step {step} is past max_steps {max_steps}", RuntimeWarning, stacklevel=2)
    if period is not None:
        angle = 2 * math.pi * step / period
    elif step >= max_steps - 1:
        return float(end_value)
    else:
        angle = math.pi * step / (max_steps - 1)
    return end_value - (end_value - start_value) * (math.cos(angle) + 1) / 2


def cosine_warmup_schedule(
    step: int,
    max_steps: int,
    start_value: float,
    end_value: float,
    warmup_steps: int,
    warmup_start_value: float,
    warmup_end_value: float | None = None,
    period: int | None = None,
) -> float:
    """A straight line to `warmup_end_value`, reached at step `warmup_steps - 1`; then a cosine.

    `warmup_end_value` is `start_value` unless given. The first step already is above `warmup_start_value`, so that 0
    there wastes no step.
    """
    if not 0 <= warmup_steps <= max_steps:
        raise ValueError(f"cosine_warmup_schedule: warmup_steps must be in [0, {max_steps}], got {warmup_steps}")
    if step > max_steps:
        warnings.warn(
            f"cosine_warmup_schedule: step {step} is past max_steps {max_steps}", RuntimeWarning, stacklevel=2
        )
    if step < warmup_steps:
        end = start_value if warmup_end_value is None else warmup_end_value
        return warmup_start_value + (end - warmup_start_value) * (step + 1) / warmup_steps
    cosine_steps = max_steps - (warmup_steps if period is None else 1)
    return cosine_schedule(step - warmup_steps, cosine_steps, start_value, end_value, period)


def linear_warmup_schedule(step: int, warmup_steps: int, start_value: float, end_value: float) -> float:
    """A straight line from `start_value` at step 0 to `end_value` at step `warmup_steps` and after."""
    if warmup_steps < 0 or step < 0:
        raise ValueError(f"linear_warmup_schedule: steps must not be negative, got {step} and {warmup_steps}")
    if not 0 <= start_value <= end_value or end_value == 0:
        came = f"{start_value} and {end_value}"
        raise ValueError(f"linear_warmup_schedule: values must be 0 <= start_value <= end_value > 0, got {came}")
    return start_value + step / warmup_steps * (end_value - start_value) if step < warmup_steps else end_value


class CosineWarmupScheduler(torch.optim.lr_scheduler.LambdaLR):
    """`cosine_warmup_schedule` as a factor on each group's learning rate; epochs may be steps.

    Args:
        optimizer: whose learning rates are scheduled.
        warmup_epochs, max_epochs: of the line, and altogether.
        last_epoch: the epoch to resume after; -1: none.
        start_value, end_value: of the cosine.
        period: see `cosine_schedule`.
        warmup_start_value, warmup_end_value: of the line.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_epochs: int,
        max_epochs: int,
        last_epoch: int = -1,
        start_value: float = 1.0,
        end_value: float = 0.001,
        period: int | None = None,
        warmup_start_value: float = 0.0,
        warmup_end_value: float | None = None,
    ):
        self.warmup_epochs = warmup_epochs
        self.max_epochs = max_epochs
        self.start_value = start_value
        self.end_value = end_value
        self.period = period
        self.warmup_start_value = warmup_start_value
        self.warmup_end_value = warmup_end_value
        super().__init__(optimizer, self.scale_lr, last_epoch)

    def scale_lr(self, epoch: int) -> float:
        return cosine_warmup_schedule(
            epoch,
            self.max_epochs,
            self.start_value,
            self.end_value,
            self.warmup_epochs,
            self.warmup_start_value,
            self.warmup_end_value,
            self.period,
        )
