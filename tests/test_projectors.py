"""`--projector WIDTHS`: layers of any number and width for every method that has an MLP for its projector."""

from pathlib import Path

import pytest
import torch
from broken import broken_off, rows
from images import TINY, make_folder
from test_methods import make
from torch import nn

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import checkpoints, runs  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.config import Config, projector_widths  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import METHODS, RunFacts, options_of  # noqa: E402
from fastjem.methods.combinations import check, why_not  # noqa: E402
from fastjem.methods.narrower import with_small_widths  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TAKE_WIDTHS = [name for name, kind in METHODS.items() if not why_not(kind, "projector")]


def widths(module: nn.Module) -> tuple[int, ...]:
    return tuple(layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("given", [(4,), (10, 4), (6, 10, 4)], ids=str)
@pytest.mark.parametrize("name", TAKE_WIDTHS)
def test_a_projector_of_one_to_three_layers(name: str, given: tuple[int, ...]) -> None:
    """The step learns through it, its momentum copy has its shape, and what comes behind it fits."""
    extra = {"dim": 2, "heads": 2} if name == "all4one" else {}  # widths count, not dim
    step, batch = make(name, run=RunFacts(projector=given), **extra)
    assert widths(step.method.projector) == given
    if "projector" in step.teacher:
        assert widths(step.teacher["projector"]) == given
    if name in ("ibot", "dinov2", "dinov3") and hasattr(step.method, "patch_projector"):
        assert widths(step.method.patch_projector) == given
    loss, _ = step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in step.method.projector.parameters())
    step.step_ends(0, 0.9)


def test_without_widths_it_is_the_methods_own() -> None:
    for name in TAKE_WIDTHS:
        own, _ = make(name)
        same, _ = make(name, run=RunFacts(projector=widths(own.method.projector)))
        assert all(map(torch.equal, own.state_dict().values(), same.state_dict().values())), name
        assert set(METHODS[name].projector_options) <= set(options_of(METHODS[name]))


@pytest.mark.parametrize("given", ["", "512,", "0,8", "8,-1", "a", "1.5"])
def test_what_isnt_widths(given: str) -> None:
    with pytest.raises(UserError, match=r"--projector must be widths of layers, as 512,128, each at least 1, got"):
        projector_widths(given)
    assert projector_widths("512, 128") == (512, 128)
    assert Config(out="a", projector=(16, 8)).projector == "16,8"  # type: ignore[arg-type]


def test_widths_and_a_methods_own_options_exclude_each_other() -> None:
    for name in TAKE_WIDTHS:
        for option in METHODS[name].projector_options:
            config = Config(out="a", method=name, projector="8", options={option: 8})
            with pytest.raises(UserError, match=f"give it or --options {option}"):
                check(config, METHODS[name])
    check(Config(out="a", method="simclr", projector="8", options={"temperature": 0.2}), METHODS["simclr"])
    method = METHODS["simclr"](16)
    for name, value in {"projector": "8", "large_views": 3}.items():
        with pytest.raises(UserError, match="the method is made already"):
            check(Config(out="a", **{name: value}), method)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--projector: clip has a linear projection of each source's own"):
        check(Config(out="a", method="clip", projector="8"), METHODS["clip"])


def test_in_a_run(tmp_path: Path) -> None:
    """Resumed, begun with by another run with all of it, and embedded with."""
    images = str(make_folder(tmp_path / "images", 32))
    common = {**TINY, "data": images, "method": "byol", "projector": "24,8", "max_steps": 3, "batch_size": 8}
    common |= {"large_views": 3, "small_views": 1}
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    broken_off(2, **common, out=str(tmp_path / "cut"), checkpoint_steps=1)
    fastjem.pretrain(out=str(tmp_path / "cut"), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    state = checkpoints.load(tmp_path / "whole")["model"]
    assert state["method.projector.3.weight"].shape == (8, 24)
    fastjem.pretrain(**{**TINY, "batch_size": 8}, data=images, method="byol", weights=str(tmp_path / "whole"),
                     weights_of="all", max_steps=1, out=str(tmp_path / "next"))  # fmt: skip
    after = checkpoints.load(tmp_path / "next")["model"]
    assert after["method.projector.3.weight"].shape == (8, 24)
    opened = runs.open_run(tmp_path / "whole")
    assert opened.projector is not None
    for key, value in opened.projector.state_dict().items():
        assert torch.equal(value, state[f"method.projector.{key}"]), key
    with pytest.raises(UserError, match="projector was 24,8 in this run and is 8 now"):
        fastjem.pretrain(out=str(tmp_path / "cut"), resume=True, projector="8", max_steps=4)


def told(out: Path) -> dict:
    return configuration.read(out)[0].options


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict:
    images = str(make_folder(tmp_path_factory.mktemp("few"), 16))
    return {**TINY, "data": images, "max_steps": 2, "batch_size": 8}


WIDTH = 96  # of test_resnet's embeddings


def test_a_short_run_of_a_small_encoder_has_narrower_heads(
    few: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastjem.pretrain(**few, method="simsiam", out=str(tmp_path / "a"))
    narrower = {"hidden": 4 * WIDTH, "dim": 4 * WIDTH, "bottleneck": WIDTH}
    assert told(tmp_path / "a") == narrower
    said = "narrower heads, hidden=384 dim=384 bottleneck=96; the paper's are --options hidden=2048 dim=2048"
    assert said in capsys.readouterr().err
    assert checkpoints.load(tmp_path / "a")["model"]["method.projector.0.weight"].shape == (4 * WIDTH, WIDTH)

    # one that is resumed keeps them, made longer than short even
    monkeypatch.setattr("fastjem.prepare.SHORT", 2)
    fastjem.pretrain(out=str(tmp_path / "a"), resume=True, max_steps=3)
    assert told(tmp_path / "a") == narrower
    fastjem.pretrain(**few, method="byol", out=str(tmp_path / "long"))
    assert told(tmp_path / "long") == {}


def test_the_heads_of_a_larger_encoder_are_the_papers(
    few: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastjem.prepare.SMALL", 1000)
    fastjem.pretrain(**few, method="byol", out=str(tmp_path / "a"))
    assert told(tmp_path / "a") == {}
    # and so are those of a run that goes on with all of it, of an encoder that counts as small then
    monkeypatch.undo()
    fastjem.pretrain(**few, method="byol", out=str(tmp_path / "b"), weights=str(tmp_path / "a"), weights_of="all")
    assert told(tmp_path / "b") == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "simsiam", "options": {"hidden": 32}}, {"hidden": 32, "dim": 384, "bottleneck": 96}),
        ({"method": "nnclr", "projector": "32,16"}, {}),
        ({"method": "byol", "preset": "cifar"}, {}),
        ({"method": METHODS["byol"](WIDTH)}, {}),
        ({"method": "frossl"}, {"hidden": 1024}),  # as wide as its output
        ({"method": "frossl", "options": {"dim": 64}}, {"hidden": 384, "dim": 64}),
    ],
    ids=str,
)
def test_what_anybody_chose_comes_before_narrower_heads(
    few: dict, fields: dict, expected: dict, tmp_path: Path
) -> None:
    fastjem.pretrain(**few, **fields, out=str(tmp_path / "run"))
    assert told(tmp_path / "run") == expected


class WithoutOptions(METHODS["byol"]):
    def __init__(self, width: int, run: RunFacts = RunFacts()):
        super().__init__(width, run, hidden=16)


def test_a_subclass_without_the_options_that_are_widths(few: dict, tmp_path: Path) -> None:
    fastjem.pretrain(**few, method=WithoutOptions, out=str(tmp_path / "run"))
    assert told(tmp_path / "run") == {}


def test_the_same_command_goes_on_with_the_runs_own_options(few: dict, tmp_path: Path) -> None:
    common = {**few, "method": "byol", "options": {"norm": "layer"}, "out": str(tmp_path / "run"), "resume": "auto"}
    common |= {"view": {"flip": 0}}
    broken_off(1, **common, checkpoint_steps=1)
    result = fastjem.pretrain(**common)
    assert result.finished and told(tmp_path / "run") == {"hidden": 4 * WIDTH, "norm": "layer"}


def test_all_of_a_run_with_another_projector_is_refused_in_the_users_words(few: dict, tmp_path: Path) -> None:
    fastjem.pretrain(**few, method="byol", out=str(tmp_path / "a"))
    with pytest.raises(UserError) as error:
        fastjem.pretrain(
            **few, method="byol", out=str(tmp_path / "b"), weights=str(tmp_path / "a"), weights_of="all", projector="8"
        )
    assert "--options hidden" not in str(error.value)


def test_widths_of_small_encoders_are_options_no_narrower_than_the_output() -> None:
    for name, kind in METHODS.items():
        options = options_of(kind)
        assert all(isinstance(options[option], int) for option in kind.small_widths), name
        for width in (8, 64, WIDTH):
            found, _ = with_small_widths(Config(out="a", method=name), kind, width)
            of = {**options, **found.options}
            if "hidden" in kind.small_widths:
                assert of["hidden"] >= (of.get("dim") or of.get("bottleneck") or 0), name
