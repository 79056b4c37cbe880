"""Micro-batches of one optimiser step and one batch of all their rows leave the same memories, centres and queues."""

import pytest
import torch
from test_methods import make
from test_methods_distributed import part_of, without_batch_norm

from fastjem.data.batch import Batch
from fastjem.meter import Taken
from fastjem.methods import RunFacts
from fastjem.stepping import counted

pytestmark = pytest.mark.usefixtures("one_thread")

# What of each method moves once a step, and the options that give it some.
MOVES = {
    "moco": ("queue.rows", {}),
    "swav": ("queues.0.rows", {"queue": 24}),
    "simclr": ("queue.rows", {"queue": 24}),
    "dcl": ("queue.rows", {"queue": 24}),
    "dino": ("centre.center", {}),
    "nnclr": ("queue.rows", {}),
    "ressl": ("queue.rows", {}),
    "all4one": ("queue.rows", {"dropout": 0.0}),
    "tico": ("covariance", {}),
    "ibot": ("patch_centre.center", {}),
    "dinov2": ("patch_centre.center", {"shared": False, "patch_prototypes": 10}),
    "dinov3": ("centre.center", {"centring": "mean"}),
    "deepcluster": ("memories.1.rows", {}),
    "pirl": ("memory.rows", {}),
    "smog": ("groups", {"beta": 0.5}),
}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_once_a_step_does_so_under_accumulation(name: str, parts: int) -> None:
    moves, options = MOVES[name]
    options = {**without_batch_norm(name), **options}
    one, batch = make(name, run=RunFacts(batch=8), **options)
    several, _ = make(name, run=RunFacts(batch=8 // parts, accumulate=parts), **options)
    for part in one.method.modules():
        if hasattr(part, "came"):
            part.came.fill_(len(part.rows))  # else a queue begins with copies of whatever keys come first
    several.load_state_dict(one.state_dict())
    before = one.method.state_dict()[moves].clone()
    one(batch, 0)
    for at in torch.arange(8).chunk(parts):
        several(part_of(batch, slice(int(at[0]), int(at[-1]) + 1)), 0)
    assert torch.equal(one.method.state_dict()[moves], before), "nothing moves before the step's end"
    assert torch.equal(several.method.state_dict()[moves], before)
    for step in (one, several):
        step.step_ends(0, 0.9)
    states = one.method.state_dict(), several.method.state_dict()
    assert not torch.equal(states[0][moves], before)
    for key, value in states[0].items():
        other = states[1][key].double()
        text = f"{key}: "
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-6, msg=lambda m, t=text: t + m)
    for step in (one, several):  # and nothing is left of it
        step.step_ends(1, 0.9)
    for key, value in one.method.state_dict().items():
        torch.testing.assert_close(value.double(), states[0][key].double(), rtol=1e-6, atol=1e-6)


def test_a_step_of_fewer_batches_is_an_error() -> None:
    """A loader that ended before the run would leave steps of nothing."""
    batch = Batch([torch.zeros(3, 3, 4, 4)], torch.arange(3))
    taken = Taken(1, 0, 0.0, [], {}, None, {})
    found = counted(iter([(batch, 0.5)]), 2, taken)
    assert next(found) is batch and (taken.images, taken.waited) == (3, 0.5)
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(found)
