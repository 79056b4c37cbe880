"""No loss takes more launches on a GPU than lightly's module of the same formula, or a few lines of plain torch.

Of a few hundred rows a loss takes as long as its launches, whatever its kernels do. docs/gpu.md has the numbers.
"""

import warnings
from functools import cache, partial

import pytest
import torch
from calls import CALLS, MODULES
from launches import counted
from plain_losses import LIGHTLY, PLAIN

# Where ours takes more, by how much, and why.
MORE = {
    "CAPILoss": (18, "sums of exponentials at each place in the log domain, where lightly's overflow"),
    "mmcr": (1, "the host waits for its singular values in any case; embeddings that aren't finite don't raise"),
    "whiten": (3, "a covariance without a factor is NaN, where torch.linalg.cholesky has the host wait to see it"),
}


def launches(name: str, function) -> int:
    torch.manual_seed(0)
    call = CALLS[name]
    tensors = call.make(24)
    with counted() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightly's DCLWLoss makes a tensor of a tensor
        result = function(*tensors)
        if call.differentiable:
            (result.sum() if result.dim() else result).backward()
    assert found.total, "tensors of the host launch nothing"
    return found.total


@cache
def ours(name: str) -> int:
    return launches(name, CALLS[name].fresh())


@pytest.mark.parametrize("name", LIGHTLY)
def test_no_more_launches_than_lightly(name, one_thread):
    torch.manual_seed(0)
    peer = launches(name, partial(CALLS[name].call, LIGHTLY[name]()))
    assert ours(name) <= peer + MORE.get(name, (0,))[0], (ours(name), peer)


@pytest.mark.parametrize("name", PLAIN)
def test_no_more_launches_than_plain_torch(name, one_thread):
    plain = launches(name, PLAIN[name])
    assert ours(name) <= plain + MORE.get(name, (0,))[0], (ours(name), plain)


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_loss_is_the_same_one(name):
    torch.manual_seed(0)
    tensors = CALLS[name].make(24)
    torch.testing.assert_close(CALLS[name].fresh()(*tensors), PLAIN[name](*tensors), rtol=1e-5, atol=1e-5)


def test_lightlys_modules_are_all_compared():
    if not LIGHTLY:
        pytest.skip("lightly is not installed")
    theirs = pytest.importorskip("lightly.loss")
    losses = {name for name in dir(theirs) if name.endswith("Loss") or name in ("SIGReg", "NegativeCosineSimilarity")}
    assert losses & set(MODULES) <= set(LIGHTLY)
