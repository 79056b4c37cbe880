"""`--precision`: what the forward pass computes in, and a scaler of the loss where that is float16.

Weights, gradients, the optimiser and momentum copies are float32 whatever it is.
"""

from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
SCALER = "scaler"  # its name in a checkpoint
AMPERE = (8, 0)  # the compute capability from which on a GPU multiplies bfloat16 as fast as float16


def chosen(asked: str, device: torch.device, before: str | None = None) -> str:
    """bf16, fp16 or fp32.

    On a CPU `auto` is fp32: a forward and a backward pass of a ResNet-18 in bfloat16 take 2.0 (128 images of 32 pixels)
    and 1.5 times (16 of 224) the processor time that they take in float32, on a Xeon with AVX-512 BF16 and without AMX.

    Args:
        asked: the same, or auto.
        before: what a resumed run has had on such a device, which `auto` keeps.
    """
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "fp32"
    if before is not None:
        return before
    return "bf16" if torch.cuda.get_device_capability(device) >= AMPERE else "fp16"


def kept(state: dict[str, Any] | None, device: torch.device) -> str | None:
    """What `auto` was in the run that a checkpoint is of; None for a new run, and where it was on another device.

    Runs of before there was a choice were in bfloat16 on every GPU.
    """
    if state is None or device.type != "cuda":
        return None
    return state.get("precision", "bf16") if state.get("device", "cuda") == "cuda" else None


def scaler_of(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """torch's scaler of the loss for fp16, whose smallest numbers are too large for many gradients; else None."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def state_of(scaler: torch.amp.GradScaler | None) -> list[torch.Tensor]:
    """What a step changes of a scaler, on its device: the scale, and the steps since it last grew; nothing before the
    first step."""
    if scaler is None:
        return []
    return [x for x in (scaler._scale, scaler._growth_tracker) if x is not None]


def broken_off(scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """Behind a step that was broken off: the next one unscales its own gradients, as if this had not begun."""
    if scaler is not None:
        scaler._per_optimizer_states.clear()
        for name in ("grad_scale", "found_inf"):  # which torch's scaler gives an optimiser for the time of its step
            optimizer.__dict__.pop(name, None)


__all__ = ["DTYPES", "SCALER", "broken_off", "chosen", "kept", "scaler_of", "state_of"]
