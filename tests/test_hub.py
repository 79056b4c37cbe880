"""Exports sent to Hugging Face's hub, and opened from there: its own library, and a server that answers as it does."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_files import encoder_file
from images import TINY, make_folder
from stores import ModelHub

for package in ("timm", "torchvision", "safetensors", "tyro", "huggingface_hub"):
    pytest.importorskip(package)
import timm  # noqa: E402
from huggingface_hub import constants, hf_api  # noqa: E402

import fastjem  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands.export import ExportOptions, export  # noqa: E402
from fastjem.data.pixels import Pixels  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.given import open_weights  # noqa: E402
from fastjem.runs import open_run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sent")
    make_folder(root / "secret/photos", 48)
    fastjem.pretrain(**TINY, data=str(root / "secret/photos"), out=str(root / "run"), max_steps=1)
    return root / "run"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub that knows one token, which is ours; its cache is empty."""
    store = ModelHub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", store.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", store.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose files go another way than by HTTP
    monkeypatch.setattr(hf_api.api, "endpoint", store.url)
    monkeypatch.setenv("HF_TOKEN", store.token)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield store
    finally:
        store.kill()


def test_an_export_is_sent_and_opened_from_there(
    run: Path, hub: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run), "--out", str(out), "--push", "user/model", "--private", "--license", "mit"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{hub.url}/user/model"
    assert 'timm.create_model("hf-hub:user/model", pretrained=True) opens it' in said.err
    assert hub.private == {"user/model": True}
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (hub.folder / "user/model" / name).read_bytes() == (out / name).read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "\nlicense: mit\n" in card
    assert 'create_model("hf-hub:user/model"' in card and 'load_encoder("hf-hub:user/model")' in card
    text = card + (out / "config.json").read_text()
    assert "`photos`" in card and "secret" not in text and str(tmp_path) not in text

    shutil.rmtree(out)
    encoder = fastjem.load_encoder(run)
    model = timm.create_model("hf-hub:user/model", pretrained=True).eval()
    torch.testing.assert_close(model(IMAGES), encoder(IMAGES))  # whose convolutions are in another layout
    assert torch.equal(fastjem.load_encoder("hf-hub:user/model")(IMAGES), encoder(IMAGES))
    assert open_run("hf-hub:user/model").pixels == open_run(run).pixels
    weights = open_weights("hf-hub:user/model")
    assert weights.pixels == open_run(run).pixels and torch.equal(weights.module(IMAGES), encoder(IMAGES))


def test_what_timm_lacks_is_opened_from_there_by_fastjem(
    hub: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ResNet's stem for small images, also as the weights that another run begins with."""
    encoder = encoder_file(tmp_path / "a.safetensors", "resnet18", Pixels(32))
    assert main(["export", str(tmp_path / "a.safetensors"), "--push", "user/small"]) == 0
    said = capsys.readouterr().err
    assert "timm won't open" in said and 'fastjem.load_encoder("hf-hub:user/small") opens it' in said
    with pytest.raises(RuntimeError, match=r"the stem for small images; fastjem\.load_encoder opens it"):
        timm.create_model("hf-hub:user/small", pretrained=True)
    assert torch.equal(fastjem.load_encoder("hf-hub:user/small")(IMAGES), encoder(IMAGES))
    for place in ("hf-hub:user/small", f"local-dir:{tmp_path / 'a'}", str(tmp_path / "a")):
        weights = open_weights(place)
        assert torch.equal(weights.module(IMAGES), encoder(IMAGES))
        assert weights.pixels == Pixels(32) and weights.built is not None


def test_figures_of_an_encoder_on_the_hub_stay_here(
    run: Path, hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(ExportOptions(str(run), out=str(tmp_path / "model"), push="user/model"))
    assert hub.private == {"user/model": False}
    monkeypatch.chdir(tmp_path)
    words = ["--train", str(run.parent / "secret/photos"), "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", "hf-hub:user/model", *words]) == 0
    assert (tmp_path / "evaluation.json").exists()
    with pytest.raises(UserError, match="is on the hub; --out names the folder"):
        export(ExportOptions("hf-hub:user/model"))
    assert export(ExportOptions("hf-hub:user/model", out=str(tmp_path / "again")))


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("offline", "the hub can't be reached from here"),
        ("no address", "the hub can't be reached from here"),
        ("down", "the hub doesn't let us in: "),
        ("no login", "nobody is logged in to the hub here; `hf auth login` does that"),
        ("wrong token", "the hub doesn't let us in: "),
        ("no package", "huggingface_hub is not installed; pip install huggingface_hub"),
        ("no user", "must be USER/MODEL, as on the hub: it names nobody"),
        ("bad name", "must be USER/MODEL, as on the hub: "),
    ],
)
def test_what_cant_be_sent_is_said_before_anything_is_written(
    trouble: str, says: str, run: Path, hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"no user": "model", "bad name": "us er/model"}.get(trouble, "user/model")
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "no address":
        monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid")
    elif trouble == "down":
        hub.kill()
    elif trouble == "no login":
        monkeypatch.delenv("HF_TOKEN")
    elif trouble == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif trouble == "no package":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as caught:
        export(ExportOptions(str(run), out=str(tmp_path / "model"), push=name))
    assert f"--push {name}" in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists() and not (hub.folder / "user").exists()


def test_what_the_hub_refuses(run: Path, hub: ModelHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"license" must be one of .*; the folder is in '):
        export(ExportOptions(str(run), out=str(tmp_path / "model"), push="user/model", license="unheard"))
    with pytest.raises(UserError, match=r"--push else/model: .*; the folder is in ") as caught:
        export(ExportOptions(str(run), out=str(tmp_path / "model"), push="else/model"))
    assert "\n" not in str(caught.value) and (tmp_path / "model/config.json").exists()
    for name in ("hf-hub:user/none", "hf-hub:user"):
        with pytest.raises(UserError, match=f"the weights of {name} can't be had: model.safetensors: "):
            fastjem.load_encoder(name)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"private": True}, "--private is for --push"),
        ({"push": "user/model", "out": "x.safetensors"}, "--push is for a folder"),
        ({"license": "mit", "out": "x.safetensors"}, "--license is for a folder"),
        ({"license": "mit\nx: y"}, "--license must be a name as the hub has it"),
    ],
)
def test_options_that_dont_go_together(options: dict[str, Any], says: str, run: Path) -> None:
    with pytest.raises(UserError, match=says):
        export(ExportOptions(str(run), **options))
