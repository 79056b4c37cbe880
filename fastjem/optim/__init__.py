"""Optimisers that update all parameters and the teacher in one pass (`fused`), what has no weight decay, and schedules
per step as 0-dim tensors.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastjem.functional.checks import PLAIN
from fastjem.functional.shards import local
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.optim.adamw import AdamW
from fastjem.optim.fused import Fused
from fastjem.optim.layers import has_layers, rate_factors
from fastjem.optim.momentum import LARS, SGD
from fastjem.optim.sharded import Sharding, sharding_of, sum_over_shards

OPTIMIZERS = ("adamw", "sgd", "lars", "larc")


def parameter_groups(
    module: nn.Module,
    constant_rate: Sequence[str] = (),
    factors: Mapping[str, float] | None = None,
    waiting: tuple[str, ...] = (),
) -> list[dict]:
    """Trainable parameters by whether they decay (matrices do; norms, biases and single vectors don't), by whether
    their learning rate follows the schedule, by the factor on it, and by whether they wait for the heads.

    Args:
        constant_rate: names of submodules whose rate doesn't follow the schedule.
        factors: on the learning rate, by the parameter's name; 1 of those that aren't named.
        waiting: how the names of those begin that only learn from `Schedule.head_warmup` on.
    """
    groups: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith(("pos_embed", "cls_token", "mask_token", "reg_token"))
            constant = any(f"{part}." in name for part in constant_rate)
            factor = (factors or {}).get(name, 1.0)
            key = decays, constant, factor, name.startswith(waiting)
            groups.setdefault(key, []).append(parameter)
    names = "decays", "constant_rate", "rate_factor", "waits"
    return [{"params": groups[key], **dict(zip(names, key, strict=True))} for key in sorted(groups)]


def build(name: str, groups: list[dict], *, momentum: float = 0.9) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum, LARS, which adapts only what decays, or LARC: LARS that only ever makes the rate
    smaller, with the trust coefficient of 0.02 that is its own. Rates come from `Schedule.apply`.
    """
    if name == "adamw":
        return AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    if name == "sgd":
        return SGD(groups, lr=0.0, momentum=momentum, weight_decay=0.0)
    if name == "lars":
        return LARS(groups, lr=0.0, momentum=momentum, weight_decay=0.0)
    if name == "larc":
        return LARS(groups, lr=0.0, momentum=momentum, weight_decay=0.0, trust_coeff=0.02, trust_clip=True)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


def separate_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter group hyperparameter tensors of its own.

    torch hands the tensor that the optimizer was made with to every group, and a saved state keeps it so: the rate of
    the group that is written last would be that of all.
    """
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, Tensor):
                group[name] = value.clone()


def scaled(name: str, rate: float, batch: int) -> float:
    """The learning rate at `batch` images when it is `rate` at 256.

    With the batch for SGD (Goyal et al. 2017) and LARC, whose rate is SGD's where it isn't made smaller; with its
    square root for AdamW (Malladi et al. 2022) and LARS (SimCLR's B.1: better for small batches and short runs), whose
    step doesn't grow with the gradient.
    """
    return rate * (batch / 256) ** (1.0 if name in ("sgd", "larc") else 0.5)


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> Tensor:
    """0-dim float64 on the host: a line from 0 to `start` over `warmup` steps, then half a cosine, `end` at the last.

    On the host, where the optimiser needs the number, so that no step waits for a device.
    """
    if step < warmup:
        return torch.tensor(start * (step + 1) / warmup, dtype=torch.float64)
    share = (step - warmup) / max(steps - 1 - warmup, 1)
    return torch.tensor(end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2, dtype=torch.float64)


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and the momentum encoder's momentum at each step."""

    steps: int
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup: int = 0
    head_warmup: int = 0  # steps in which what waits stands still; then it has as long a warm-up of its own
    weight_decay: float = 0.0
    final_weight_decay: float = 0.0
    momentum: float = 0.99
    final_momentum: float = 1.0

    def at(self, step: int) -> dict[str, Tensor]:
        return {
            "learning_rate": cosine(step, self.steps, self.learning_rate, self.final_learning_rate, self.warmup),
            "weight_decay": cosine(step, self.steps, self.weight_decay, self.final_weight_decay),
            "momentum": cosine(step, self.steps, self.momentum, self.final_momentum),
        }

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
        """The optimiser's groups get this step's figures, which are returned too."""
        now = self.at(step)
        rate_now = now["learning_rate"].item()
        decay_now = now["weight_decay"].item()
        for group in optimizer.param_groups:
            rate = self.learning_rate if group["constant_rate"] else rate_now
            rate *= group.get("rate_factor", 1.0)  # a run that began before there were any has none
            if group.get("waits"):
                rate *= min(max(step + 1 - self.head_warmup, 0) / max(self.warmup, 1), 1.0)
            # In place where the optimiser keeps a tensor: a compiled step sees no new constant.
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            group["weight_decay"] = decay_now if group["decays"] else 0.0
        return now


def clip_(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `most`; the norm before, 0-dim, without a host sync.

    Of gradients in shards the norm is that of the whole ones; one small all-reduce adds the shards' squares.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    if PLAIN.issuperset(map(type, gradients)) and len({(x.device, x.dtype) for x in gradients if x is not None}) == 1:
        return _clipped_at_once(gradients, most)  # pyright: ignore[reportArgumentType]
    by_sharding: dict[Sharding | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_sharding.setdefault(sharding_of("clip_", parameter), []).append(parameter)
    if by_sharding.keys() <= {None}:
        return nn.utils.clip_grad_norm_(parameters, most, foreach=True)
    squares = []
    norms = []
    for sharding, members in by_sharding.items():
        norm = nn.utils.get_total_norm([local(p.grad) for p in members if p.grad is not None], foreach=True)
        norms.append(norm)
        square = norm.to(widest_dtype(norm.device)).square()
        squares.append(square if sharding is None else sum_over_shards(square, sharding))
    dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms), torch.float32)
    total = torch.stack(squares).sum().sqrt().to(dtype)
    for members in by_sharding.values():
        nn.utils.clip_grads_with_norm_(members, most, total, foreach=True)
    return total


def _clipped_at_once(gradients: list[Tensor], most: float) -> Tensor:
    """What torch's `clip_grad_norm_` does with plain gradients of one kind, to the last bit, without sorting them by
    kind, twice, and without asking each about shards: 4 us a gradient."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (most / (total + 1e-6)).clamp(max=1.0))
    return total


__all__ = [
    "LARS", "OPTIMIZERS", "SGD", "AdamW", "Fused", "Schedule", "build", "clip_", "cosine", "has_layers",
    "parameter_groups", "rate_factors", "scaled", "separate_groups",
]  # fmt: skip
