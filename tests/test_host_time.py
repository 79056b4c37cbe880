"""What a step costs the host outside of model and loss: calls into torch, and tensors that they make.

A ratchet: the bounds are what was counted, and only go down.
"""

import pytest
import torch

from fastjem import optim
from fastjem.commands import host_steps
from fastjem.commands.tiny_runs import tiny_run
from fastjem.methods import METHODS, needs_patches
from fastjem.stepping import Work

pytestmark = pytest.mark.usefixtures("one_thread")
# Operators, for two groups of parameters; each other one has a rate of its own to be read.
CALLS = 26
# Queues, centres and covariances, which move behind the step; two of them in those of patches.
MORE_CALLS = {
    "moco": 43, "nnclr": 42, "ressl": 43, "all4one": 43, "tico": 37, "dino": 37, "deepcluster": 33, "ibot": 48,
    "dinov2": 48, "dinov3": 48, "smog": 59, "pirl": 29,
}  # fmt: skip
TENSORS = 6  # beside one for each parameter, its share of the clipped norm
MORE_TENSORS = {"moco": 16, "nnclr": 16, "ressl": 16, "all4one": 16, "tico": 11, "dino": 11, "smog": 26}
MORE_TENSORS |= {"ibot": 16, "dinov2": 16, "dinov3": 16}
# Calls from Python, attributes of tensors among them: of each parameter, and beside those.
PYTHON_EACH = 23
PYTHON = 42
MORE_PYTHON = {
    "moco": 68, "nnclr": 45, "ressl": 68, "all4one": 46, "tico": 58, "dino": 58, "ibot": 76, "dinov2": 76,
    "dinov3": 76, "smog": 78,
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_host_does_little_beside_model_and_loss(name: str) -> None:
    if needs_patches(METHODS[name]) or name == "distill":
        pytest.importorskip("timm")
    with tiny_run(name, torch.device("cpu")) as (training, batch):
        work = Work(training)
        host_steps.step(work, 0, batch)
        counts = host_steps.counted(training, batch, 1, keep_gradients=True)
    parameters = len(work.parameters)
    more_groups = len(training.optimizer.param_groups) - 2
    assert counts["operators"] <= MORE_CALLS.get(name, CALLS) + more_groups
    assert counts["allocations"] <= parameters + MORE_TENSORS.get(name, TENSORS)
    most = PYTHON_EACH * parameters + MORE_PYTHON.get(name, PYTHON) + 2 * more_groups
    assert counts["python_calls"] <= most


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e30, float("inf")])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64]], ids=str)
def test_clipping_is_torchs(dtypes: list[torch.dtype], scale: float) -> None:
    """Of gradients of one kind, which aren't sorted by it, and of several; to the last bit."""
    generator = torch.Generator().manual_seed(0)
    parameters, same = [], []
    for i, shape in enumerate([(5, 3), (7,), (), (0, 2), (33, 9)]):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)]) * scale
        for made in (parameters, same):
            p = torch.nn.Parameter(torch.zeros(shape, dtype=gradient.dtype))
            p.grad = gradient.clone()
            made.append(p)
    parameters.append(torch.nn.Parameter(torch.zeros(2)))  # of which no loss has made a gradient
    norm = optim.clip_(parameters, 0.5)
    expected = torch.nn.utils.clip_grad_norm_(same, 0.5, foreach=True)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for p, q in zip(parameters, same, strict=False):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
    assert parameters[-1].grad is None and optim.clip_(parameters[-1:], 0.5) == 0
