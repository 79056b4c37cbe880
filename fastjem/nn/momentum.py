"""The momentum encoder: its update, and what is trained. Names as in lightly."""

import torch
from torch import Tensor, nn

from fastjem.functional import checks, ema_update_
from fastjem.functional.memory import check_update

BUFFERS = ("leave", "copy", "average")


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float | Tensor, *, buffers: str = "leave") -> None:
    """`p_ema = m p_ema + (1 - m) p` for all parameters, in place, in one launch.

    Everything is checked before anything is written. The addresses are looked up at each call: parameters may be
    replaced (`load_state_dict(assign=True)`, `.to(device)`). Models that `fully_shard` (FSDP2) has sharded alike are
    updated shard by shard.

    Args:
        model, model_ema: the student and its momentum copy; the copy in float32 or float64.
        m: the momentum, a number or a 0-dim tensor on the device.
        buffers: "leave" them (lightly, MoCo), "copy" the student's, or "average" the floating-point ones like
            parameters (batch norm's running statistics; integers are copied).

    Raises:
        ValueError: if the models differ, or for a half-precision copy, in which updates round to nothing.
    """
    if buffers not in BUFFERS:
        checks.fail("update_momentum", f"buffers must be one of {', '.join(BUFFERS)}", repr(buffers))
    teacher: list[Tensor] = list(model_ema.parameters())
    student: list[Tensor] = list(model.parameters())
    copied: list[tuple[Tensor, Tensor]] = []
    if buffers != "leave":
        ours, theirs = list(model_ema.buffers()), list(model.buffers())
        if len(ours) != len(theirs):
            checks.fail("update_momentum", "models must have as many buffers", f"{len(ours)} and {len(theirs)}")
        for pair in zip(ours, theirs, strict=True):
            if buffers == "average" and pair[0].is_floating_point():
                teacher.append(pair[0])
                student.append(pair[1])
            else:
                copied.append(pair)
        check_update("update_momentum", [x for x, _ in copied], [x for _, x in copied])
    ema_update_(teacher, student, m)
    for mine, its in copied:
        mine.copy_(its)


def deactivate_requires_grad(model: nn.Module) -> None:
    """No parameter gets a gradient from here on."""
    model.requires_grad_(False)


def activate_requires_grad(model: nn.Module) -> None:
    """Every parameter gets a gradient from here on."""
    model.requires_grad_(True)


@torch.no_grad()
def normalize_weight(weight: nn.Parameter, dim: int = 1, keepdim: bool = True) -> None:
    """`weight /= ||weight||` along `dim`, in place."""
    weight.div_(torch.linalg.vector_norm(weight, dim=dim, keepdim=keepdim))


NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


def get_weight_decay_parameters(
    modules: list[nn.Module],
    decay_norm: bool = False,
    decay_bias: bool = False,
    norm_layers: tuple[type[nn.Module], ...] = NORMS,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that weight decay is for, and those it isn't for: norms' and biases, unless asked for."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for part in module.modules():
            norm = isinstance(part, norm_layers)
            for name, parameter in part.named_parameters(recurse=False):
                keep = decay_norm if norm else decay_bias or not name.endswith("bias")
                (decayed if keep else others).append(parameter)
    return decayed, others
