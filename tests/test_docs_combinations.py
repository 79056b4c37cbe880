"""docs/combinations.md is what the code says: which options go with which method, and why others don't."""

from pathlib import Path

import pytest
import torch

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from test_methods import make  # noqa: E402

from fastjem.commands.methods import described  # noqa: E402
from fastjem.methods import METHODS, options_of  # noqa: E402
from fastjem.methods.combinations import OPTIONS, why_not  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[1] / "docs/combinations.md"
SINKHORN = ("swav", "msn", "pmsn", "capi")  # whose targets are balanced by it and by nothing else
HEAD = (
    "| method | `--mask` | `--large-views` | `--small-views` | `--projector` | momentum encoder | queue | centring |\n"
    "|---|---|---|---|---|---|---|---|"
)


def uses_a_momentum_encoder(name: str) -> bool:
    """Whether the loss has targets of one that is asked for."""
    step, batch = make(name, True)
    called = []
    step.teacher["encoder"].register_forward_hook(lambda *_: called.append(True))
    step(batch, 0)
    return bool(called)


def momentum(name: str) -> str:
    kind = METHODS[name]
    if not kind.momentum:
        return "option" if uses_a_momentum_encoder(name) else "option, an average"
    if name == "dino":
        return "can go, by Sinkhorn"
    return "stays" if why_not(kind, "no_momentum_encoder") else "can go"


def row(name: str) -> str:
    kind = METHODS[name]
    options = options_of(kind)
    yes = ["no" if why_not(kind, option) else "yes" for option in OPTIONS[:4]]
    if kind.views.mask:
        yes[0] = "its own"
    queue = "" if "queue" not in options else "yes" if options["queue"] else "option"
    centring = "mean or Sinkhorn" if "centring" in options else ""
    if name in SINKHORN:
        assert "iterations" in options
        centring = "Sinkhorn" if options["iterations"] else "Sinkhorn, by option"
    return f"| [{name}](methods/{name}.md) | {' | '.join([*yes, momentum(name), queue, centring])} |"


def reasons() -> list[str]:
    """One line for each reason, with the methods that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    for option in OPTIONS:
        for name, kind in METHODS.items():
            reason = why_not(kind, option)
            if reason and not (option == "mask" and kind.views.mask):
                found.setdefault((option, reason), []).append(name)
    return [f"* `--{o.replace('_', '-')}`, {', '.join(names)}: {reason}." for (o, reason), names in found.items()]


def test_the_table_is_the_codes() -> None:
    torch.manual_seed(0)
    assert "\n".join([HEAD, *map(row, METHODS)]) in PAGE.read_text()


def test_the_reasons_are_the_codes() -> None:
    assert "\n".join(reasons()) in PAGE.read_text()


@pytest.mark.parametrize("name", METHODS)
def test_fastjem_methods_says_the_same(name: str) -> None:
    lines = list(described(name))
    (can,) = (line for line in lines if line.startswith("combined with"))
    for option in OPTIONS:
        flag = f"--{option.replace('_', '-')}"
        reason = why_not(METHODS[name], option)
        if option == "no_momentum_encoder" and not METHODS[name].momentum:
            assert flag not in can
            continue
        assert (flag in can.replace("--momentum-encoder", "") or flag == "--no-momentum-encoder" in can) != bool(reason)
        assert not reason or f"  not with {flag}: {name} {reason}" in lines
