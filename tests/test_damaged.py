"""Damaged and foreign files of a run: whatever they say, a command ends with one line that names the file, or goes on
and says what it left out; nothing foreign is opened, unpacked or allocated for."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import make_folder

for package in ("timm", "torchvision", "safetensors", "matplotlib"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem import exports, reading, report  # noqa: E402
from fastjem.commands.evaluate import EvaluateOptions, evaluate  # noqa: E402
from fastjem.commands.export import ExportOptions, export  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.report.run import read  # noqa: E402
from fastjem.runs import open_run  # noqa: E402
from fastjem.yaml_text import loaded  # noqa: E402

RUN: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "batch_size": 8, "workers": 0, "device": "cpu", "stem": "standard",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    make_folder(root / "train", 16)
    fastjem.pretrain(**RUN, data=str(root / "train"), out=str(root / "run"), max_steps=1, report=False)
    return root / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def of_json(**changes: Any) -> Callable[[bytes], bytes]:
    """The object with other values; ... takes one out."""

    def change(content: bytes) -> bytes:
        given = {**loaded(content, "x"), **changes}
        return json.dumps({name: value for name, value in given.items() if value is not ...}).encode()

    return change


def always(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


NO_JSON = {
    "empty": always(b""),
    "cut off": lambda content: content[: len(content) // 2],
    "binary": always(bytes(range(256))),
    "zeros": lambda content: bytes(len(content)),
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "a list": always(b"[1, 2]"),
    "a text": always(b'"run"'),
    "null": always(b"null"),
    "nested": always(b"[" * 200_000),
    "nested objects": always(b'{"a":' * 200_000),
    "digits": always(b'{"out": ' + b"9" * 5000 + b"}"),
    "aliases of YAML": always(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
}
NO_CONFIGURATION = {
    **NO_JSON,
    "another program's": always(b'{"model": {"name": "x"}}'),
    "no keys": always(b"{}"),
    "without method": of_json(method=...),
    "without image_size": of_json(image_size=...),
    "text for a number": of_json(batch_size="16"),
    "float for an integer": of_json(image_size=32.0),
    "truth for a number": of_json(epochs=True),
    "NaN": of_json(learning_rate=float("nan")),
    "infinite": of_json(weight_decay=float("inf")),
    "negative": of_json(image_size=-32),
    "huge": of_json(image_size=2**62),
    "huger": of_json(epochs=10**400),
    "list for a text": of_json(backbone=["resnet18"]),
    "dict for a text": of_json(data={"a": 1}),
    "null for a text": of_json(method=None),
    "text for a dict": of_json(options="a=1"),
    "dict of lists of dicts": of_json(options={"a": [{}]}),
    "unknown stem": of_json(stem="tiny"),
    "unknown device": of_json(device="tpu"),
    "too many views": of_json(small_views=10**9),
}
NO_RUN = {
    "no pixels": of_json(pixels=...),
    "pixels of a list": of_json(pixels=[1]),
    "pixels without size": of_json(pixels={}),
    "pixels of another size": of_json(pixels={"size": 64}),
    "a deviation of 0": of_json(pixels={"size": 32, "std": [0, 1, 1]}),
    "two means": of_json(pixels={"size": 32, "mean": [0, 1]}),
    "a mean of text": of_json(pixels={"size": 32, "mean": ["a", "b", "c"]}),
    "an unknown field": of_json(pixels={"size": 32, "gamma": 1}),
    "a number for the pool": of_json(pool=3),
    "unknown backbone": of_json(backbone="resnet18000"),
    "another backbone": of_json(backbone="resnet18"),
    "a patch of a convnet": of_json(patch_size=3),
}


def refuses(path: Path, command: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        command()
    text = str(error.value)
    assert path.name in text and "\n" not in text, text
    return text


@pytest.mark.parametrize("damage", NO_CONFIGURATION)
def test_a_damaged_configuration_is_named_by_every_command(damage: str, run: Path) -> None:
    path = run / "config.yaml"
    path.write_bytes(NO_CONFIGURATION[damage](path.read_bytes()))
    refuses(path, lambda: report.write(run, tsne=False))
    refuses(path, lambda: evaluate(EvaluateOptions(str(run), workers=0, device="cpu")))
    refuses(path, lambda: export(ExportOptions(str(run), out=str(run / "x.safetensors"))))
    refuses(path, lambda: fastjem.load_encoder(run))
    refuses(path, lambda: fastjem.pretrain(out=str(run), resume=True))


@pytest.mark.parametrize("damage", NO_RUN)
def test_a_configuration_that_its_weights_dont_fit_is_refused(damage: str, run: Path) -> None:
    path = run / "config.yaml"
    path.write_bytes(NO_RUN[damage](path.read_bytes()))
    refuses(run, lambda: open_run(run))


def test_a_configuration_that_is_no_regular_file(run: Path) -> None:
    path = run / "config.yaml"
    path.unlink()
    refuses(path, lambda: open_run(run))
    os.mkfifo(path)  # would be waited for
    assert "no regular file" in refuses(path, lambda: open_run(run))
    path.unlink()
    path.mkdir()
    assert "is a folder" in refuses(path, lambda: read(run))


NO_ROWS = {
    "another key": b'{"a": 1}\n',
    "a list": b"[1]\n",
    "text for the step": b'{"step": "1"}\n',
    "a negative step": b'{"step": -1}\n',
    "half a step": b'{"step": 1.5}\n',
    "a truth": b'{"step": true}\n',
    "a huge step": b'{"step": 1' + b"0" * 400 + b"}\n",
    "nested": b'{"step":' * 100_000 + b"\n",
    "no UTF-8": b"\xff\xfe\n",
    "no JSON": b"step 1\n",
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "knn.jsonl"])
@pytest.mark.parametrize("damage", NO_ROWS)
def test_damaged_figures_are_left_out_and_counted(name: str, damage: str, run: Path) -> None:
    whole = b'{"step": 1, "loss": 2.5, "note": "x", "knn": 0.5, "classes": 3}\n'
    (run / name).write_bytes(whole + NO_ROWS[damage] + whole + b'{"step": 1, "lo')  # the last one a kill cut in two
    found = read(run)
    (trouble,) = found.troubles
    assert name in trouble and "1 of 3 lines" in trouble
    rows = found.rows if name == "metrics.jsonl" else found.knn
    assert rows == [{"step": 1, "loss": 2.5, "knn": 0.5, "classes": 3}] * 2


@pytest.mark.parametrize("damage", NO_JSON)
@pytest.mark.parametrize("name", ["environment.json", "embeddings.npz"])
def test_what_a_report_can_do_without_is_left_out_and_said(name: str, damage: str, run: Path) -> None:
    path = run / name
    path.write_bytes(NO_JSON[damage](path.read_bytes() if name.endswith("json") else b"{}"))
    found = read(run)
    (trouble,) = found.troubles
    assert name in trouble and "goes on without" in trouble
    assert found.environment == {} if name == "environment.json" else found.embeddings is None


def test_facts_of_the_environment_are_natural_numbers(run: Path) -> None:
    path = run / "environment.json"
    path.write_bytes(of_json(steps="9", steps_per_epoch=-1, images=1.5, patch=[1], ranks=True)(path.read_bytes()))
    found = read(run)
    assert len(found.troubles) == 5 and found.steps_per_epoch == 0
    page = report.write(run, tsne=False).read_text()
    assert "steps_per_epoch must be a natural number, got int -1" in page


def arrays_of(run: Path, **changes: Any) -> None:
    with np.load(run / "embeddings.npz") as file:
        arrays = {**dict(file), **changes}
    np.savez(run / "embeddings.npz", **{name: value for name, value in arrays.items() if value is not ...})


WRONG_ARRAYS: dict[str, dict[str, Any]] = {
    "lacking": {"rows": ...},
    "objects": {"files": np.array([{"a": 1}] * 16, dtype=object)},
    "complex": {"rows": np.zeros((16, 4), complex)},
    "three dimensions": {"rows": np.zeros((16, 4, 1))},
    "fewer": {"rows": np.zeros((3, 4))},
    "no width": {"rows": np.zeros((16, 0))},
    "labels outside": {"labels": np.full(16, 99)},
    "negative labels": {"labels": np.full(16, -1)},
    "labels of floats": {"labels": np.zeros(16)},
    "negative indices": {"indices": np.full(16, -1)},
    "a step of text": {"step": np.array("one")},
    "fewer images than rows": {"images": 1},
    "a root of a list": {"root": np.array(["a", "b"])},
}


@pytest.mark.parametrize("damage", WRONG_ARRAYS)
def test_embeddings_that_cant_be_are_left_out(damage: str, run: Path) -> None:
    arrays_of(run, **WRONG_ARRAYS[damage])
    found = read(run)
    assert found.embeddings is None and "embeddings.npz" in found.troubles[0]


def test_a_bomb_isnt_unpacked(run: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.npy", bytes(2**28 + 1))
    (run / "embeddings.npz").write_bytes(content.getvalue())
    assert "bytes unpacked, more than" in read(run).troubles[0]


def pictures_of(run: Path, **given: Any) -> int:
    return report.write(run, tsne=False, **given).read_text().count("data:image/")


@pytest.mark.parametrize("name", ["../secret.png", "class0/../../secret.png", "ABSOLUTE", "..", "a\\..\\b.png", ""])
def test_a_name_that_leads_out_of_the_data_isnt_opened(name: str, run: Path, trained: Path) -> None:
    secret = make_folder(trained.parent / "secrets", 1, classes=0) / "0000.png"
    secret.rename(trained.parent / "secret.png")
    arrays_of(run, files=np.array([str(trained.parent / "secret.png") if name == "ABSOLUTE" else name] * 16))
    assert pictures_of(run) == 0
    assert "isn't below the data folder" in read(run).troubles[0]


def test_a_link_that_leads_out_of_the_data_isnt_followed_unless_the_user_names_the_folder(
    run: Path, trained: Path
) -> None:
    assert pictures_of(run) > 0
    data = run.parent / "data"
    shutil.copytree(trained.parent / "train", data)
    make_folder(run.parent / "elsewhere", 2, classes=0)
    linked = data / "linked.png"
    linked.symlink_to(run.parent / "elsewhere/0000.png")
    path = run / "config.yaml"
    path.write_bytes(of_json(data=str(data))(path.read_bytes()))
    arrays_of(run, root=str(data), files=np.array(["linked.png"] * 16))
    assert pictures_of(run) == 0 and "lead out" in read(run).troubles[0]
    assert pictures_of(run, data=str(data)) > 0


def test_images_come_from_the_data_that_the_configuration_names(run: Path, trained: Path) -> None:
    arrays_of(run, root=str(trained.parent), files=np.array(["train/class0/0000.png"] * 16))
    assert pictures_of(run) == 0 and "--data" in read(run).troubles[0]


def foreign(path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, str(path), metadata)


ABOUT = {"backbone": "test_resnet", "image_size": "32", "stem": "auto", "patch_size": "0", "pool": ""}


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "resnet18000"}, {"backbone": ""}, {"image_size": "-1"}, {"image_size": "1e3"},
        {"image_size": "9" * 5000}, {"image_size": ""}, {"stem": "tiny"}, {"patch_size": "x"}, {"pool": "x"},
        {"patch_size": "3"}, {"pixels": "{"}, {"pixels": "[1]"}, {"pixels": '{"size": 1e9}'}, {"pixels": "[" * 100_000},
        {"pixels": '{"size": 32, "channels": 1000000000}'}, {"backbone": "vit_tiny", "patch_size": "99999"},
    ],
)  # fmt: skip
def test_metadata_of_an_encoder_that_cant_be(changes: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    foreign(path, {**ABOUT, **changes})
    refuses(path, lambda: fastjem.load_encoder(path))


@pytest.mark.parametrize(
    "content", [b"", b"x" * 7, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"]
)
def test_a_file_that_holds_no_encoder(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    refuses(path, lambda: fastjem.load_encoder(path))


def test_a_named_backbone_takes_no_memory_before_its_weights_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def create(*names: Any, **options: Any) -> torch.nn.Module:
        devices.append(torch.empty(0).device.type)
        return original(*names, **options)

    original = exports.create
    monkeypatch.setattr(exports, "create", create)
    path = tmp_path / "encoder.safetensors"
    foreign(path, {**ABOUT, "backbone": "vit_giant_patch14_224", "image_size": "224"})  # 4 GB of weights
    assert "the weights are no vit_giant" in refuses(path, lambda: fastjem.load_encoder(path))
    assert devices == ["meta"]


def test_an_encoder_is_loaded_from_a_run_and_from_a_file(trained: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    (of_run, of_file, of_path) = (
        fastjem.load_encoder(path)(images)
        for path in (str(trained), str(trained / "encoder.safetensors"), trained / "encoder.safetensors")
    )
    torch.testing.assert_close(of_run, of_file, rtol=0, atol=0)
    torch.testing.assert_close(of_path, of_file, rtol=0, atol=0)
    for wrong in ("", trained / "gone", 5, None):
        with pytest.raises(UserError, match="run"):
            fastjem.load_encoder(wrong)
    foreign(trained / "x.safetensors", {})
    refuses(trained / "x.safetensors", lambda: fastjem.load_encoder(trained / "x.safetensors"))


def test_a_tag_that_an_earlier_version_ignored_is_ignored_still(run: Path) -> None:
    path = run / "config.yaml"
    path.write_bytes(of_json(backbone="test_resnet.r160_in1k")(path.read_bytes()))
    assert configuration.read(run)[0].backbone == "test_resnet" and open_run(run).step == 1


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, says in (
        (b"", "is empty"), (b"{", "line 1, column 2"), (b"\xff", "no UTF-8"), (b"[" * 200_000, "nested"),
        (b"1" * 5000, "digits"), (b"[]", "by name, got a JSON list"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=says):
            reading.json_object(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert reading.json_object(path) == {"a": 1}
    with pytest.raises(UserError, match="more than the 4"):
        reading.content(path, 4)
