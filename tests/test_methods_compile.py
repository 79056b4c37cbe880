"""torch.compile of a method's whole step: one graph, and the loss and gradients of eager."""

import copy

import pytest
import torch
import torch._dynamo
from test_methods import make

from fastjem.methods import METHODS, RunFacts

pytestmark = pytest.mark.usefixtures("one_thread")

# Whose step is no single graph, and why.
NOT_ONE_GRAPH = {
    "ibot": "on the CPU, how many patches are hidden is looked at",
    "dinov2": "as iBOT",
    "dinov3": "as iBOT",
    "simdinov2": "as iBOT",
}
# One of each kind: the others take minutes together.
QUICK = ("mocov3", "tico", "mae", "smog", "pirl")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in METHODS]
)
def test_a_compiled_step_is_eagers(name: str) -> None:
    options = {"dropout": 0.0} if name == "all4one" else {}
    step, batch = make(name, run=RunFacts(batch=8), **options)
    batch = batch._replace(views=batch.views[: METHODS[name].views.large + 1])
    batch = batch._replace(tables=batch.tables[: len(batch.views)])
    other = copy.deepcopy(step)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=name not in NOT_ONE_GRAPH, backend="aot_eager")
    results = []
    for function in (step, compiled):
        module = step if function is step else other
        torch.manual_seed(1)
        loss, _ = function(batch, torch.tensor(2))
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        module.step_ends(2, 0.9)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        results.append((loss.detach(), filled, module.state_dict()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    for key, value in results[0][2].items():
        torch.testing.assert_close(results[1][2][key].double(), value.double(), rtol=1e-5, atol=1e-6)
