"""The blocks that an encoder is built of: what is gathered, computed again or compiled as one."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastjem.encoders import has_batch_norm
from fastjem.errors import UserError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a module, each before those that it is in.

    A block is one of several modules of a class that stand in lists (Sequential, ModuleList, ModuleDict) with no layers
    of another class beside them but single ones, each having layers of its own: a transformer's blocks, the residual
    blocks of a ResNet's stages, and stages themselves. So are the parts of a class that holds nothing else, and three
    or more of them. A block that shares a parameter with what isn't in it is none, as it can't be handled by itself.
    """
    rows: dict[type, list[nn.Module]] = {}
    for part in module.modules():
        layers = [child for child in part.children() if next(child.parameters(), None) is not None]
        composite = [child for child in layers if _has_layers(child)]
        if len({type(child) for child in composite}) != 1:
            continue
        kind = type(composite[0])
        # A list of lists counts by itself, as lists are everywhere; and a mixer's block, which has two MLPs and a norm,
        # is no row of MLPs.
        alone = kind not in CONTAINERS and len(list(part.children())) == 1  # a stage of one block
        if len(composite) > 1 or alone if isinstance(part, CONTAINERS) else len(composite) == len(layers) > 2:
            rows.setdefault(kind, []).extend(composite)
    repeated = {kind for kind, found in rows.items() if len(found) > 1}
    chosen = {id(block) for kind in repeated for block in rows[kind]}
    kinds = repeated.difference(CONTAINERS)
    every = [part for part in module.modules() if id(part) in chosen or (type(part) in kinds and part is not module)]
    uses = _uses(module)
    return [part for part in reversed(every) if _is_called(part) and _is_apart(part, uses)]


def smallest(module: nn.Module) -> list[nn.Module]:
    """Those of a module's `blocks` that no other one is in."""
    found = blocks(module)
    chosen = {id(block) for block in found}
    return [block for block in found if not any(id(part) in chosen for part in block.modules() if part is not block)]


def recompute(encoder: nn.Module) -> int:
    """Let the forward pass of each of the smallest blocks keep its inputs alone, and the backward pass compute it again
    (torch.utils.checkpoint): the same numbers, dropout and drop path included, and names stay. How many there are.

    Raises:
        UserError: where the encoder has no blocks.
    """
    found = smallest(encoder)
    if not found:
        kind = type(getattr(encoder, "backbone", encoder)).__name__
        raise UserError(f"--activation-checkpointing: {kind} has no repeated blocks that could be computed again")
    for block in found:
        options: dict[str, Any] = {"use_reentrant": False}
        if has_batch_norm(block):
            options["context_fn"] = partial(_contexts, block)
        replace_forward(block, lambda forward, options=options: partial(_recomputed, forward, options))
    return len(found)


def replace_forward(block: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `change(block.forward)` in its place: within the hooks of FSDP2, and with the names that it had."""
    block.forward = change(block.forward)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    return checkpoint(forward, *args, **options, **named)


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _standing_statistics(block)


@contextlib.contextmanager
def _standing_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms whose running statistics don't move: the first pass has moved them already."""
    norms = [part for part in block.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count


def _has_layers(module: nn.Module) -> bool:
    """Whether a module has parts with parameters, and isn't a single layer."""
    return any(next(child.parameters(), None) is not None for child in module.children())


def _is_called(module: nn.Module) -> bool:
    """Lists and dicts of modules have no forward of their own."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module).forward is not nn.Module.forward


def _is_apart(module: nn.Module, uses: dict[nn.Parameter, int]) -> bool:
    """Whether nothing that a module isn't has any of its parameters. uses: of all."""
    return all(uses[parameter] == count for parameter, count in _uses(module).items())


def _uses(module: nn.Module) -> dict[nn.Parameter, int]:
    """How many parts of a module have each parameter."""
    found: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            found[parameter] = found.get(parameter, 0) + 1
    return found
