"""`--shard`: weights, gradients and the optimiser's state in shards over the ranks, by PyTorch's FSDP2 (`fully_shard`).

Each block of an encoder (`fastjem.blocks`) is a unit, the momentum encoder's too: its weights are gathered for its own
forward and backward passes, and freed. All that is in no block (stems, heads, prototypes, their momentum copies) is the
root unit, the whole `Step`, whose weights are there from the forward pass to the end of the backward pass: a method may
use them wherever it likes within its loss. Between steps parameters are DTensors, of which a rank has its own part.

Weights are gathered in float32, gradients added in float32, and `--precision` is torch's autocast: the same numbers as
without shards. FSDP2's own policy would halve the bytes that are gathered and cast all of a block's weights: those of
norms and layer scales, too, which autocast leaves alone, and a layer norm that is given two dtypes fails on CPUs.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastjem import blocks
from fastjem.encoders import Encoder
from fastjem.errors import UserError
from fastjem.functional.shards import is_distributed
from fastjem.gradients import kept_here
from fastjem.ranks import Ranks


class _Alike:
    """Parameters without a dimension, which can't be cut: all ranks have them, and the mean of their gradients."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup):
        self.group = group
        self.exchanges = True
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    def _average(self, parameter: Tensor) -> None:
        if self.exchanges and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad /= self.group.size()


def shard(step: nn.Module, ranks: Ranks, *, scaled: bool = False, compiles: bool = False) -> str:
    """Cut the parameters of a step into shards, in place; what there is to be said of it, or "".

    Before an optimiser is made: parameters are others afterwards. All ranks together.

    Args:
        step: a `fastjem.step.Step`, or any module with `Encoder`s in it, which is called whole.
        ranks: more than one.
        scaled: the loss will be (float16's GradScaler).
        compiles: each block's forward pass is compiled (torch.compile), within its gathering.

    Raises:
        UserError: for parameters without a dimension where the loss is scaled, as torch's scaler takes one kind.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    assert ranks.group is not None
    alike = {name: parameter for name, parameter in step.named_parameters() if parameter.dim() == 0}
    if alike and scaled:
        raise UserError(
            f"--shard with --precision fp16: {', '.join(alike)} is a single number, which is in no shard; bf16 and "
            "fp32 work"
        )
    for parameter in step.parameters():  # FSDP2 takes no other layout, convolutions' channels_last among them
        parameter.data = parameter.data.contiguous()
    options: dict[str, Any] = {
        "mesh": DeviceMesh.from_group(ranks.group, ranks.device.type),
        "ignored_params": set(alike.values()),
    }
    said = []
    for encoder in [part for part in step.modules() if isinstance(part, Encoder)]:
        units = blocks.blocks(encoder.backbone)
        smallest = {id(block) for block in blocks.smallest(encoder.backbone)}
        if not units:
            said.append(type(encoder.backbone).__name__)
        for unit in units:
            if compiles and id(unit) in smallest:
                blocks.replace_forward(unit, torch.compile)
            fully_shard(cast(Any, unit), **options)
    fully_shard(cast(Any, step), **options)
    cast(Any, step).alike = _Alike(list(alike.values()), ranks.group)
    if not said:
        return ""
    kinds = ", ".join(dict.fromkeys(said))
    return f"--shard: {kinds} has no repeated blocks: each rank gathers all of its weights at once for a step"


def is_sharded(module: nn.Module) -> bool:
    """Whether any of its parameters is in shards."""
    return any(is_distributed(parameter) for parameter in module.parameters())


@contextlib.contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Forward and backward passes whose gradients stay this rank's own, added up, until one outside of this block.

    Args:
        model: what the loop calls: a module by itself, in DDP, in shards, or one of these compiled. In shards each rank
            holds the whole gradient in between.
    """
    inner = getattr(model, "_orig_mod", model)
    alike = getattr(inner, "alike", None)
    if not isinstance(alike, _Alike):
        with kept_here(inner):
            yield
        return
    cast(Any, inner).set_requires_gradient_sync(False)
    alike.exchanges = False
    try:
        yield
    finally:
        cast(Any, inner).set_requires_gradient_sync(True)
        alike.exchanges = True


def outline(module: nn.Module) -> nn.Module:
    """A copy of a module that isn't in shards yet, whose parameters have shapes and no values; for `gathered`."""
    found = copy.deepcopy(module)
    parts: dict[nn.Parameter, nn.Parameter] = {}
    for part in found.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter not in parts:
                empty = torch.empty_like(parameter, device="meta")
                parts[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(part, name, parts[parameter])
    return found


def gathered(module: nn.Module, outline: nn.Module | None) -> nn.Module:
    """A module in shards as a plain one, with its values of now. All ranks together.

    Args:
        outline: on the ranks that want it, what `outline` made of the module; None: the module itself is returned.
    """
    state: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        if is_distributed(value):  # by all ranks, whoever wants it
            value = cast(Any, value).full_tensor()
        if outline is not None:
            state[name] = value.clone() if isinstance(value, Tensor) else value
    if outline is None:
        return module
    found = copy.deepcopy(outline)
    found.load_state_dict(state, assign=True)
    return found.train(module.training)


__all__ = ["gathered", "is_sharded", "outline", "shard", "without_exchange"]
