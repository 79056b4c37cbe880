"""What every module of `fastjem.nn` says to bad input: its own name first, and nothing of the operator behind it."""

import inspect
import re
import timeit
from typing import Any

import pytest
import torch
from torch import Tensor

import fastjem.functional as F
from fastjem import nn

N, D = 8, 16
FEATURES = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
TOKENS = FEATURES.view(2, 4, D)
MASK = torch.ones(2, 2, 2, dtype=torch.bool)
NUMBERS = torch.zeros(2, 4, dtype=torch.long)
TWO = (FEATURES, FEATURES)
SCALE = torch.tensor(10.0)

# A module -> its arguments, and what it is called with. Heads are made by their widths.
GOOD: dict[str, tuple[dict[str, Any], tuple | dict]] = {
    **dict.fromkeys(
        ["BarlowTwinsLoss", "VICRegLoss", "TiCoLoss", "NTXentLoss", "DCLLoss", "DCLWLoss", "NegativeCosineSimilarity",
         "DirectCLRLoss", "HypersphereLoss", "MACLLoss", "CO2Regularizer"],
        ({}, TWO),
    ),
    "WMSELoss": ({"embedding_dim": 4, "w_size": 8}, (FEATURES.repeat(2, 1)[:, :4],)),
    "Whitening2d": ({"num_features": 4}, (FEATURES[:, :4],)),
    "MMCRLoss": ({}, (TOKENS, TOKENS)),
    "FroSSLLoss": ({}, ([FEATURES, FEATURES],)),
    "EMPSSLLoss": ({}, ([FEATURES, FEATURES],)),
    "SimDINOLoss": ({}, ([FEATURES, FEATURES], [FEATURES, FEATURES])),
    "SIGReg": ({}, (TOKENS,)),
    "LeJEPALoss": ({}, {"local_proj": TOKENS, "global_proj": TOKENS}),
    "LeWMLoss": ({}, {"predicted": TOKENS, "target": TOKENS, "embeddings": TOKENS}),
    "VISRegLoss": ({}, {"local_proj": TOKENS, "global_proj": TOKENS}),
    "KoLeoLoss": ({}, (FEATURES,)),
    "SwaVLoss": ({}, ([FEATURES, FEATURES], [FEATURES])),
    "DINOLoss": ({"output_dim": D}, ([FEATURES, FEATURES], [FEATURES, FEATURES])),
    "IBOTPatchLoss": ({"output_dim": D}, (FEATURES, FEATURES, MASK)),
    "IBOTPlusPlusPatchLoss": ({"output_dim": D}, (TOKENS, TOKENS, MASK)),
    "MSNLoss": ({}, (FEATURES, FEATURES, FEATURES)),
    "PMSNLoss": ({}, (FEATURES, FEATURES, FEATURES)),
    "GramLoss": ({}, (TOKENS, TOKENS)),
    "PatchKernelAlignmentLoss": ({}, (TOKENS, TOKENS)),
    "DSERegularizer": ({"local_clusters": 1, "global_clusters": 2}, (TOKENS,)),
    "SupConLoss": ({}, (FEATURES.view(4, 2, D),)),
    "SymNegCosineSimilarityLoss": ({}, (TWO, TWO)),
    "ClipLoss": ({}, (FEATURES, FEATURES, SCALE)),
    "SigLipLoss": ({}, (FEATURES, FEATURES, SCALE, SCALE)),
    "DistillClipLoss": ({}, (FEATURES, FEATURES, SCALE, FEATURES, FEATURES, SCALE)),
    "CoCaLoss": ({"caption_loss_weight": 1, "clip_loss_weight": 1}, (*TWO, TOKENS, NUMBERS, SCALE)),
    "DetConBLoss": ({}, (TOKENS, TOKENS, TOKENS, TOKENS, NUMBERS, NUMBERS)),
    "DetConSLoss": ({}, (TOKENS, TOKENS, NUMBERS, NUMBERS)),
    "NNCLRLoss": ({"memory_bank_size": (12, D)}, (FEATURES, FEATURES, FEATURES, FEATURES)),
    "NNMemoryBankModule": ({"size": (12, D)}, (FEATURES,)),
    "SwaVPrototypes": ({"input_dim": D, "n_prototypes": 5}, (FEATURES,)),
    "CAPIProjectionHead": ({"input_dim": D, "num_clusters": 5}, (FEATURES,)),
}  # fmt: skip
# Whose input is of many kinds: their own tests have what they say.
OTHERS = {"CAPILoss", "Center", "MemoryBankModule", "PMSNCustomLoss", "ProjectionHead", "SMoGPrototypes", "VICRegLLoss"}


def modules() -> list[str]:
    return [name for name in nn.__all__ if inspect.isclass(getattr(nn, name)) and hasattr(getattr(nn, name), "forward")]


def is_head(name: str) -> bool:
    return name.endswith("Head") and name not in GOOD and name not in OTHERS


def made(name: str) -> tuple[torch.nn.Module, tuple | dict]:
    if is_head(name):
        parameters = inspect.signature(getattr(nn, name)).parameters
        widths = {key: D for key in ("input_dim", "hidden_dim", "bottleneck_dim", "output_dim") if key in parameters}
        return getattr(nn, name)(**widths), (FEATURES,)
    options, call = GOOD[name]
    return getattr(nn, name)(**options), call


def changed(x: Any, change) -> Any:
    """With the last floating-point tensor in it changed."""
    if isinstance(x, Tensor):
        return change(x) if x.dim() and x.is_floating_point() else x
    if isinstance(x, dict):
        values = changed(list(x.values()), change)
        return dict(zip(x, values, strict=True))
    parts = list(x)
    for i in reversed(range(len(parts))):
        new = changed(parts[i], change)
        if new is not parts[i]:
            parts[i] = new
            break
    return type(x)(parts)


WRONG = {
    "rank": lambda x: x[..., None, None],
    "width": lambda x: x[..., :-1],
    "dtype": lambda x: x.long(),
    "device": lambda x: x.to("meta"),  # for which torch imports a lot
    "empty": lambda x: x[:0],
    "not a tensor": lambda x: x.tolist(),
    "rows": lambda x: x[:-1],
}
OPERATORS = "|".join([*F.__all__, "MLP", "fastjem::\\w+"])


def call(module: torch.nn.Module, given: tuple | dict) -> None:
    module(**given) if isinstance(given, dict) else module(*given)


def test_every_module_is_here():
    assert {name for name in modules() if not is_head(name)} == {*GOOD, *OTHERS}
    for name in modules():
        if name not in OTHERS:
            call(*made(name))


@pytest.mark.parametrize(
    "wrong", [pytest.param(x, marks=pytest.mark.exhaustive) if x == "device" else x for x in WRONG]
)
def test_an_error_begins_with_the_modules_name(wrong):
    raised = 0
    for name in modules():
        if name in OTHERS:
            continue
        module, given = made(name)
        try:
            call(module, changed(given, WRONG[wrong]))
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            raised += 1
            said = str(error)
            assert said.startswith(name), (name, said)
            assert not re.search(rf"(?<![\w.])({OPERATORS}): ", said), (name, said)
    assert raised >= {"dtype": 20, "width": 25, "rows": 20}.get(wrong, 30), raised


@pytest.mark.parametrize("value", [float("nan"), 0.0, "hot"])
def test_numbers_out_of_range(value):
    for name in modules():
        parameters = inspect.signature(getattr(nn, name)).parameters
        option = next((key for key in ("temperature", "student_temp", "t_consistency") if key in parameters), None)
        if option is None or name not in GOOD:
            continue
        with pytest.raises((ValueError, TypeError), match=rf"^{name}"):
            call(getattr(nn, name)(**GOOD[name][0], **{option: value}), GOOD[name][1])


def test_the_class_that_the_user_made_is_named_and_the_error_stays_what_it_is():
    class Mine(nn.SwaVLoss):
        def subloss(self, z: Tensor, q: Tensor) -> Tensor:
            raise own

    # The arguments of the last two aren't text: an encoding, and two values of the user's.
    for own in (KeyError("my own"), UnicodeDecodeError("utf-8", b"a", 0, 1, "bad"), ValueError("my", "own")):
        before = own.args
        with pytest.raises(type(own)) as odd:
            Mine()([FEATURES, FEATURES], [])
        assert odd.value.args == before
    with pytest.raises(ValueError, match=r"^Mine: outputs must be \[B, K\] of each crop, got \(8, 16\) and") as raised:
        Mine()([FEATURES, FEATURES[0]], [])
    assert raised.traceback[-1].name == "fail"
    with pytest.raises(ValueError, match=r"^LeJEPALoss: knots must be at least 2, got 1"):
        nn.LeJEPALoss(sigreg_knots=1)
    assert list(inspect.signature(nn.NTXentLoss).parameters)[:2] == ["temperature", "memory_bank_size"]


@pytest.mark.exhaustive
def test_naming_takes_no_time_and_no_part_in_a_graph():
    loss = nn.NegativeCosineSimilarity()
    plain = type(loss).forward.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    ways = [lambda: loss.forward(FEATURES, FEATURES), lambda: plain(loss, FEATURES, FEATURES)]
    rounds = [[timeit.timeit(way, number=300) / 300 for way in ways] for _ in range(40)]
    named, bare = (min(times) for times in zip(*rounds, strict=True))
    assert named - bare < 1e-6
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*TWO), loss(*TWO))
