"""In the place of a CUDA graph: the operators of a step, noted as they run on the CPU, and run again in their memory.

As a graph does, a replay reads and writes the addresses that the captured step read and wrote, and knows nothing that
the host decided in between: a number that was an operator's argument is the captured step's for ever.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastjem.commands.host_steps import made_by
from fastjem.step_graph import Found

_aten = torch.ops.aten
OF_SHAPES = {  # what they write is a tensor's shape, not its memory
    _aten.squeeze_.default, _aten.squeeze_.dim, _aten.squeeze_.dims, _aten.unsqueeze_.default, _aten.t_.default,
    _aten.transpose_.default,
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """`fastjem.step_graph.Graph`, of one thread. Everything that the step made is held, so that no memory is used
    twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], list[Tensor]]] = []
        self.held: list[Any] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def warm(self, work: Callable[[], Found]) -> Found:
        return work()

    def capture(self, work: Callable[[], Found]) -> Found:
        """Note the work, and undo it: its numbers come with the replays."""
        state = torch.get_rng_state()
        with self:
            found = work()
        for storage, copy in self.before.values():
            storage.copy_(copy)
        torch.set_rng_state(state)
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for operator, args, kwargs, made in self.calls:
            for old, new in zip(made, made_by(operator, operator(*args, **kwargs)), strict=True):
                assert old.shape == new.shape, f"{operator} made {tuple(old.shape)}, and now {tuple(new.shape)}"
                old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for written in _written(func, args, kwargs):
            storage = written.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        given = tree_map_only(
            Tensor, Tensor.detach, (args, kwargs)
        )  # of the shapes of now: `squeeze_` changes a tensor's
        result = func(*args, **kwargs)
        self.held += [args, kwargs, result]
        made = [x.detach() for x in made_by(func, result)]
        if made or (_written(func, args, kwargs) and func not in OF_SHAPES):  # else a look at memory that stays
            self.calls.append((func, *given, made))
        return result


def _written(operator: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes."""
    given = dict(zip((one.name for one in operator._schema.arguments), args, strict=False)) | kwargs
    names = [one.name for one in operator._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    if "batch_norm" in operator._schema.name and "backward" not in operator._schema.name:
        names += ["running_mean", "running_var"]  # which its schema keeps to itself
    return [x for name in names for x in tree_leaves(given.get(name)) if isinstance(x, Tensor)]
