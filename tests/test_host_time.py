"""What a step costs the host outside of model and loss: calls into torch, and tensors that they make.

A ratchet: the bounds are what was counted, and only go down.
"""

from typing import Any

import pytest
import torch
from recorder import made_by
from test_methods import make
from test_step_graph import training_of
from torch.utils._python_dispatch import TorchDispatchMode

from fastjem import stepping
from fastjem.methods import METHODS
from fastjem.stepping import Work, seed_generators

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = 30
# Queues, centres and covariances, which move behind the step; two of them in those of patches.
MORE_CALLS = {
    "moco": 44, "nnclr": 44, "ressl": 44, "all4one": 44, "tico": 43, "dino": 42, "deepcluster": 34, "ibot": 57,
    "dinov2": 57, "dinov3": 57, "smog": 60,
}  # fmt: skip
TENSORS = 10  # beside one for each parameter, its share of the clipped norm
MORE_TENSORS = {"moco": 16, "nnclr": 16, "ressl": 16, "all4one": 16, "tico": 12, "dino": 12, "smog": 26}
MORE_TENSORS |= {"ibot": 18, "dinov2": 18, "dinov3": 18}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.calls += 1
        self.tensors += len(made_by(func, result))
        return result


@pytest.mark.parametrize("name", METHODS)
def test_the_host_does_little_beside_model_and_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, batch = make(name)
    training = training_of(step, optimizer="adamw", clip=1.0, accumulate=1, device="cpu")
    work = Work(training)
    work.begins(0)
    work.take([batch])
    work.keep_gradients = True
    found = torch.zeros(()), {}
    monkeypatch.setattr(stepping, "forward_backward", lambda *given, **options: found)
    with Counted() as counted:
        seed_generators(3, 1, training.ranks)
        work.begins(1)
        work.take([batch])
    assert counted.calls <= MORE_CALLS.get(name, CALLS)
    assert counted.tensors <= len(work.parameters) + MORE_TENSORS.get(name, TENSORS)
