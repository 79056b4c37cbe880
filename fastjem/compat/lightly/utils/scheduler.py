"""`lightly.utils.scheduler`: `fastjem.schedules`."""

from fastjem.schedules import CosineWarmupScheduler, cosine_schedule, cosine_warmup_schedule, linear_warmup_schedule

__all__ = ["CosineWarmupScheduler", "cosine_schedule", "cosine_warmup_schedule", "linear_warmup_schedule"]
