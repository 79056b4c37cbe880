"""`--image-size 112:75%,224`: small views first, and nothing else of the run is another one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from broken import broken_off, rows
from images import TINY, make_folder
from torch import Tensor, nn

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402
from test_methods import small_options  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints, resume  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.arguments import parse  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.data.loaders import dali, memory  # noqa: E402
from fastjem.data.masking import Masks, most_masked  # noqa: E402
from fastjem.data.stages import Sizes  # noqa: E402
from fastjem.data.views import MaskSpec, Views  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.kernels.augment import columns as column  # noqa: E402
from fastjem.methods import DINO, METHODS, Batch, Branch, RunFacts, SimCLR, needs_patches  # noqa: E402
from fastjem.methods.hidden import hidden_rows  # noqa: E402
from fastjem.methods.transformer import TokenPredictor, sines_and_cosines  # noqa: E402
from fastjem.yaml_text import loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STAGED = {**TINY, "image_size": "16:75%,32"}
VIT = {"backbone": "test_vit", "patch_size": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48, size=40, kind="jpg"))


class Seen(SimCLR):
    """SimCLR that keeps what it is given."""

    batches: ClassVar[list[tuple[int, Batch]]] = []

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        self.batches.append((int(step), batch))
        return super().loss(student, teacher, batch, step)  # type: ignore[return-value]


class SeenDINO(DINO):
    """DINO, which has small views, that keeps what it is given."""

    batches = Seen.batches

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        self.batches.append((int(step), batch))
        return super().loss(student, teacher, batch, step)  # type: ignore[return-value]


def seen(out: Path, method: Any = Seen, **fields: Any) -> list[tuple[int, Batch]]:
    """(step, batch) of each forward pass of a run."""
    Seen.batches.clear()
    fastjem.pretrain(method=method, out=out, **fields)
    return list(Seen.batches)


def sizes_of(batches: list[tuple[int, Batch]]) -> list[tuple[int, list[int]]]:
    """(step, pixels of each view)."""
    return [(step, [view.shape[-1] for view in batch.views]) for step, batch in batches]


@pytest.mark.parametrize(
    ("given", "pixels", "shares", "written"),
    [
        (224, (224,), (), 224),
        ("112:75%,224", (112, 224), (Fraction(3, 4),), "112:75%,224"),
        ("224x448", ((224, 448),), (), "224x448"),
        ("224x224", (224,), (), 224),
        ((224, 448), ((224, 448),), (), "224x448"),
        ([224, 224], (224,), (), 224),
        ("64:25%,112x224:50%,224x448", (64, (112, 224), (224, 448)), (Fraction(1, 4), Fraction(1, 2)), ...),
        (" 64:50.0% , 112:12.5%,224 ", (64, 112, 224), (Fraction(1, 2), Fraction(1, 8)), "64:50%,112:12.5%,224"),
    ],
)
def test_sizes_are_read_and_written(given: int | str, pixels: tuple, shares: tuple, written: int | str) -> None:
    config = Config(out="a", image_size=given)
    written = given if written is ... else written
    assert config.sizes == Sizes(pixels, shares) and config.image_size == written and config.size == pixels[-1]
    line = given if isinstance(given, str) else str(config.sizes)
    assert parse(Config, "pretrain", ["--out", "a", "--image-size", line]) == config


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            "16",
            "--image-size must be a number of pixels, height x width as 224x448, or a size and a share of the steps "
            "for each stage but the last",
        ),
        ("four", "as in 112:75%,224; got str 'four'"),
        ("112:75,224", "got str '112:75,224'"),
        ("112:75%", "got str '112:75%'"),
        ("112:75%,224:25%", "got str '112:75%,224:25%'"),
        ("112,224", "got str '112,224'"),
        ("112:-5%,224", "got str '112:-5%,224'"),
        ("224:75%,112", "sizes must rise from stage to stage, as in 112:75%,224; got 224:75%,112"),
        ("112:50%,112:25%,224", "sizes must rise"),
        ("64:50%,112:50%,224", "must be above 0, and together below 100 %"),
        ("112:0%,224", "must be above 0"),
        ("0:75%,224", "--image-size must be at least 1, got 0"),
        (-3, "--image-size must be at least 1, got -3"),
        ("112:75%,99999", "--image-size must be at most 16384, got 99999"),
        (32.5, "pretrain: image_size must be an integer or text, got float 32.5"),
        ((32, 48, 3), "pretrain: image_size must be a number of pixels, or height and width, got tuple (32, 48, 3)"),
        ("224x", "got str '224x'"),
        ("224x0", "--image-size must be at least 1, got 224x0"),
        ("224x99999", "--image-size must be at most 16384, got 224x99999"),
        ("224x448x3", "got str '224x448x3'"),
        ("112x448:75%,224", "sizes must rise"),
        ("112x224:50%,112x224", "sizes must rise"),
    ],
)
def test_what_is_no_size_is_refused_in_words(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        Config(out="a", image_size=given)
    config = Config(out="a")
    config.image_size = given
    with pytest.raises(UserError, match=re.escape(says)):
        configuration.check(config)


def test_borders_and_where_they_go_in_a_run_of_another_length() -> None:
    sizes = Sizes.of("64:50%,112:25%,224")
    assert sizes.borders(100) == [50, 75]
    with pytest.raises(UserError, match="of 2 steps each stage must have one at least"):
        sizes.borders(2)
    for start, steps, borders in (
        (40, 200, [100, 150]),  # none is behind it: where they would be in a run of that length
        (50, 200, [100, 150]),  # the next stage hasn't been seen yet
        (51, 200, [50, 150]),  # a border behind it stays
        (76, 200, [50, 75]),
        (100, 200, [50, 75]),  # a finished run goes on with the size that it ended with
        (40, 60, [40, 45]),  # shorter, and what would be behind it is here: nothing seen is changed
        (60, 64, [50, 60]),
    ):
        assert sizes.moved([50, 75], steps, start) == borders, (start, steps)
        state = {"borders": [50, 75], "steps": 100, "step": start}
        config = Config(out="a", image_size=str(sizes))
        assert resume.borders(config, state, steps) == borders
        again = {"borders": borders, "steps": steps, "step": start + 1}
        assert resume.borders(config, again, steps) == borders  # killed and gone on with as it was
    assert resume.borders(Config(out="a"), {"steps": 8, "step": 2}, 16) == []  # a run of before there were stages


def loaders_here() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}, {"loader": "memory"}, {"workers": 2}]
    return [*found, *([] if dali.why_not("cpu") else [{"loader": "dali-cpu"}])]


@pytest.mark.parametrize("loader", loaders_here(), ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_views_step_by_step_and_nothing_else_of_them_differs(
    accumulate: int, loader: dict[str, Any], images: str, tmp_path: Path
) -> None:
    """Each step has its size, in all of its batches; images, windows and colours are those of a run without stages."""
    fields = {**TINY, **loader, "data": images, "max_steps": 8, "accumulate": accumulate}
    plain = seen(tmp_path / "plain", **fields)
    found = seen(tmp_path / "staged", **{**fields, "image_size": "16:75%,32"})
    assert sizes_of(found) == [(s, [16 if s < 6 else 32] * 2) for s in range(8) for _ in range(accumulate)]
    for (step, one), (_, other) in zip(found, plain, strict=True):
        assert torch.equal(one.index, other.index), step
        assert all(torch.equal(a, b) for a, b in zip(one.tables, other.tables, strict=True)), step
        if step >= 6:
            assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True)), step


def test_how_many_views_there_are_and_whether_they_blur_is_the_last_sizes(images: str, tmp_path: Path) -> None:
    fields = {**TINY, "data": images, "method": SeenDINO, "max_steps": 2, "options": {"hidden": 16, "prototypes": 8}}
    found = seen(tmp_path / "a", **{**fields, "image_size": "56:50%,112"})
    assert sizes_of(found) == [(0, [56] * 2 + [24] * 8), (1, [112] * 2 + [48] * 8)]  # 96 / 224 of the large ones
    assert all((batch.tables[0][:, column.SIGMA] > 0).all() for _, batch in found)  # DINO's first view always blurs
    found = seen(tmp_path / "b", **{**fields, "image_size": "32:50%,64"})
    assert sizes_of(found) == [(0, [32, 32]), (1, [64, 64])]
    assert all((batch.tables[0][:, column.SIGMA] == 0).all() for _, batch in found)


def test_images_in_memory_are_held_once_and_for_the_last_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "images", 16, size=64)
    read = memory.ImageArray.from_source
    sides = []

    def noted(*given: Any, size: int, **options: Any) -> memory.ImageArray:
        sides.append(size)
        return read(*given, size=size, **options)

    monkeypatch.setattr(memory.ImageArray, "from_source", noted)
    fastjem.pretrain(**STAGED, data=str(folder), loader="memory", max_steps=4, out=tmp_path / "run")
    assert sides == [round(32 * 8 / 7)]


@pytest.mark.parametrize(
    ("cut", "extra"),
    [
        (1, {}),  # within the first stage
        (4, {"accumulate": 2, "workers": 2, "epochs": 8}),  # behind the last checkpoint before the border, 5 of 8
        (4, {"loader": "memory"}),
        (5, {}),
        (5, {**VIT, "method": "ibot", "options": small_options("ibot")}),
    ],
)
def test_killed_and_resumed_is_the_same_run(cut: int, extra: dict[str, Any], images: str, tmp_path: Path) -> None:
    """6 steps, the last 2 with views of 32 pixels; a checkpoint every second one."""
    common = {**STAGED, "image_size": "16:66%,32", "data": images, "epochs": 2, "checkpoint_steps": 2, **extra}
    fastjem.pretrain(**common, out=tmp_path / "whole")
    broken_off(cut, **common, out=tmp_path / "cut")
    fastjem.pretrain(out=tmp_path / "cut", resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / run)["model"] for run in ("cut", "whole"))  # type: ignore[index]
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("stops", "border"), [(3, 12), (8, 6)])
def test_a_run_made_longer_keeps_what_it_has_seen(
    stops: int, border: int, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**STAGED, "data": images, "method": Seen, "checkpoint_steps": 1}
    Seen.batches.clear()
    broken_off(stops, **fields, max_steps=8, out=tmp_path)
    assert checkpoints.load(tmp_path)["step"] == stops - 1  # type: ignore[index]
    before = [(step, size) for step, (size, _) in sizes_of(Seen.batches)][: stops - 1]
    assert before == [(step, 16 if step < 6 else 32) for step in range(stops - 1)]
    capsys.readouterr()
    Seen.batches.clear()
    broken_off(10, out=tmp_path, resume=True, method=Seen, max_steps=16)
    assert f"32 pixels from step {border + 1} on" in capsys.readouterr().err
    fastjem.pretrain(out=tmp_path, resume=True, method=Seen)  # killed again, and gone on with as it was
    after = {step: size for step, (size, _) in sizes_of(Seen.batches)}
    assert after == {step: 16 if step < border else 32 for step in range(stops - 1, 16)}


def test_a_finished_run_goes_on_with_its_last_size(images: str, tmp_path: Path) -> None:
    fastjem.pretrain(**STAGED, data=images, method=Seen, max_steps=4, out=tmp_path)
    Seen.batches.clear()
    fastjem.pretrain(out=tmp_path, resume=True, method=Seen, max_steps=10)
    assert sizes_of(Seen.batches) == [(step, [32, 32]) for step in range(4, 10)]


RANKS = """
import os, sys, torch, fastjem
from torch import nn
from fastjem.methods import SimCLR
torch.set_num_threads(1)
torch.manual_seed(0)
found = []
class Seen(SimCLR):
    def loss(self, student, teacher, batch, step):
        found.append([int(step), [view.shape[-1] for view in batch.views], batch.index.tolist()])
        return super().loss(student, teacher, batch, step)
encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.GELU())
fastjem.pretrain(data=sys.argv[1], out=sys.argv[2], encoder=encoder, method=Seen, image_size="8:75%,16", batch_size=8,
                 accumulate=2, max_steps=8, workers=0, device="cpu", report=False, options={"norm": "none"})
open(f"{sys.argv[2]}-{os.environ.get('RANK', 0)}.json", "w").write(__import__("json").dumps(found))
"""


def test_ranks_have_the_same_sizes_at_the_same_steps(images: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, prefix in (("one", []), ("two", torchrun)):
        line = [sys.executable, *prefix, str(script), images, str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one-0", "two-0", "two-1"))
    expected = [[step, [8 if step < 6 else 16] * 2] for step in range(8) for _ in range(2)]
    assert [part[:2] for part in one] == [part[:2] for part in first] == [part[:2] for part in second] == expected
    assert [part[2] for part in one] == [a[2] + b[2] for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("fields", [{}, VIT, {**VIT, "method": "mae", "options": {"decoder_depth": 1}}], ids=str)
def test_what_is_left_of_it_is_of_the_last_size(fields: dict[str, Any], images: str, tmp_path: Path) -> None:
    import timm

    run = tmp_path / "run"
    fastjem.pretrain(**{**STAGED, "stem": "standard", **fields}, data=images, max_steps=4, out=run)
    config, pixels, pool = configuration.read(run)
    assert config.image_size == "16:75%,32" and pixels.size == 32
    assert loaded((run / "config.yaml").read_bytes(), "config.yaml")["image_size"] == "16:75%,32"
    weights = load_file(run / "encoder.safetensors")
    options: dict[str, Any] = {"patch_size": 8, "img_size": 32} if "patch_size" in fields else {}
    options |= {"global_pool": pool, "fc_norm": False} if pool else {}
    module: Any = timm.create_model({**STAGED, **fields}["backbone"], num_classes=0, **options)
    module.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 32, 32)
    expected = module.eval()(x)
    for opened in (run, run / "encoder.safetensors"):
        torch.testing.assert_close(fastjem.load_encoder(opened)(x), expected)
    if "patch_size" in fields:
        assert weights["pos_embed"].shape[1] == 4 * 4 + module.num_prefix_tokens
    fastjem.pretrain(weights=run, data=images, out=tmp_path / "next", method="byol", batch_size=16, max_steps=1,
                     workers=0, device="cpu", report=False)  # fmt: skip
    assert configuration.read(tmp_path / "next")[0].image_size == 32


def test_the_report_and_the_picture_of_views_have_the_last_size(images: str, tmp_path: Path) -> None:
    from PIL import Image

    run = tmp_path / "run"
    fastjem.pretrain(**{**STAGED, "report": True}, data=images, max_steps=4, out=run)
    page = (run / "report.html").read_text()
    assert "test_resnet at 16, then 32 pixels" in page and "but of 32 pixels, as the last ones have" in page
    pictures = []
    for size in ("96:50%,128", "128"):
        out = tmp_path / f"{len(pictures)}.png"
        assert main(["views", "--data", images, "--images", "1", "--image-size", size, "--out", str(out)]) == 0
        pictures.append(Image.open(out).tobytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    "name", ["mae", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in METHODS if n != "mae")]
)
def test_every_method_learns_in_each_stage(name: str, tmp_path: Path) -> None:
    kind = METHODS[name]
    found = []

    class Noted(kind):  # type: ignore[valid-type, misc]
        def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Any:
            found.append((batch.views[0].shape[-1], {mask.hidden.shape[1:] for mask in batch.masks.values()}))
            return super().loss(student, teacher, batch, step)

    images = str(make_folder(tmp_path / "images", 32))
    sizes = (36, 72) if name == "pirl" else (32, 64)
    options = {key: value for key, value in small_options(name).items() if value is not None}
    fields = {**TINY, "image_size": f"{sizes[0]}:50%,{sizes[1]}", "stem": "standard", "options": options}
    done = fastjem.pretrain(
        **{**fields, **(VIT if needs_patches(kind) else {})}, method=Noted, max_steps=2, out=tmp_path / "run",
        data=[images, Path(images)] if kind.views.sources > 1 else images,
    )  # fmt: skip
    assert done.finished and torch.isfinite(torch.tensor(done.metrics["loss"]))
    grids = [{(size // 8, size // 8)} if kind.views.mask else set() for size in sizes]
    assert found == list(zip(sizes, grids, strict=True))


def test_a_predictors_positions_lie_in_the_frame_of_the_last_size() -> None:
    """The middle of a patch twice as large lies between two of the small ones; fixed places, so a fixed formula."""
    large = sines_and_cosines((2, 2), 8, (4, 4))  # [4, 8]
    frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    for row, y in enumerate((0.5, 2.5)):
        for at, x in enumerate((0.5, 2.5)):
            waves = [wave(place * frequencies) for place in (x, y) for wave in (torch.sin, torch.cos)]
            expected = torch.cat(waves)
            torch.testing.assert_close(large[2 * row + at], expected.float())
    on_device = sines_and_cosines((2, 2), 8, (4, 4), device=torch.device("cpu"))
    torch.testing.assert_close(on_device, large, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    predictor = TokenPredictor(6, (4, 4), inner=8, depth=1, heads=2, out=5)
    tokens, visible, wanted = torch.randn(2, 1, 6), torch.tensor([[3], [1]]), torch.tensor([[0, 2], [3, 0]])
    given = predictor(tokens, visible, wanted, (2, 2))
    assert torch.equal(predictor(tokens, visible, wanted, (4, 4)), predictor(tokens, visible, wanted))
    assert not torch.allclose(given, predictor(tokens, visible, wanted))
    predictor.positions = large
    torch.testing.assert_close(given, predictor(tokens, visible, wanted))


@pytest.mark.parametrize("name", ["mae", "capi", "ijepa"])
def test_methods_tell_their_predictor_the_grid(name: str, images: str, tmp_path: Path, monkeypatch: Any) -> None:
    grids = []
    forward = TokenPredictor.forward

    def noted(self: TokenPredictor, tokens: Tensor, visible: Tensor, wanted: Tensor, grid: Any = None) -> Tensor:
        grids.append((self.grid, tuple(grid)))
        return forward(self, tokens, visible, wanted, grid)

    monkeypatch.setattr(TokenPredictor, "forward", noted)
    fields = {**TINY, **VIT, "image_size": "32:50%,64", "data": images, "options": small_options(name)}
    fastjem.pretrain(**fields, method=name, max_steps=2, out=tmp_path)
    assert grids == [((8, 8), (4, 4)), ((8, 8), (8, 8))]


def test_rows_of_hidden_patches_are_as_many_as_the_stages_masks_have() -> None:
    """As on a GPU, where they fill up to a number that is known beforehand: of the batch's grid."""
    views = Views(mask=0.5, masking="block", masked_images=1.0)
    rows = []
    for side in (2, 8):
        masks = {view: Masks(torch.ones(8, side, side, dtype=torch.bool)) for view in (0, 1)}
        batch = Batch([], torch.arange(8), masks=masks)
        rows.append(len(hidden_rows(batch, views, padded=True).rows))
    spec = MaskSpec(0, (2, 2), 0.5, "block")
    assert rows == [most_masked(spec, 16), most_masked(replace(spec, grid=(8, 8)), 16)]


class Flat(nn.Module):
    """Embeddings whose width follows the images'."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_steps": 1}, "image_size 16:75%,32: of 1 steps each stage must have one at least"),
        ({"encoder": Flat()}, "image_size 16:75%,32: embeddings must be as wide at every size, got 3072 and 768"),
        ({**VIT, "image_size": "20:75%,32"}, "can't take 20 x 20 images of 3 channels: "),
        ({"backbone": "swin_tiny_patch4_window7_224", "image_size": "112:75%,224"}, "can't take 112 x 112 images"),
        ({**VIT, "method": "pirl", "image_size": "48:75%,72", "patch_size": 12}, "a third of the image's 48 pixels"),
    ],
)
def test_sizes_that_a_run_cant_have(fields: dict[str, Any], says: str, images: str, tmp_path: Path) -> None:
    fields = {**STAGED, "data": images, "max_steps": 8, "batch_size": 4, **fields}
    if "encoder" in fields:
        del fields["backbone"]
    with pytest.raises(UserError, match=re.escape(says)):
        fastjem.pretrain(**fields, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_the_sizes_that_it_had(images: str, tmp_path: Path) -> None:
    fastjem.pretrain(**STAGED, data=images, max_steps=4, out=tmp_path)
    for size in (32, "16:50%,32"):
        with pytest.raises(UserError, match=f"image_size was 16:75%,32 in this run and is {size} now"):
            fastjem.pretrain(out=tmp_path, resume=True, max_steps=8, image_size=size)
    assert fastjem.pretrain(out=tmp_path, resume=True, max_steps=5, image_size="16:75.0%, 32").finished


def test_a_compiled_step_is_compiled_once_for_each_size(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    compiled: list[tuple[set[int], bool]] = []  # of each graph: the sides of its images, whether sizes are symbols

    def backend(graph: Any, inputs: list[Any]) -> Any:
        given = [x for x in inputs if isinstance(x, Tensor) and x.dim() == 4 and not x.requires_grad]
        sides = {int(x.shape[-1]) for x in given}
        if sides:
            compiled.append((sides, any(isinstance(x, torch.SymInt) for x in inputs)))
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend=backend, **options))
    fastjem.pretrain(**STAGED, data=images, compile=True, max_steps=8, out=tmp_path)
    assert compiled == [({16}, False), ({32}, False)]


def test_a_method_is_told_all_sizes(images: str, tmp_path: Path) -> None:
    class Told(SimCLR):
        def __init__(self, width: int, run: RunFacts = RunFacts()):
            super().__init__(width, run)
            assert (run.image_size, run.image_sizes) == (32, (16, 32))

    assert fastjem.pretrain(**STAGED, data=images, method=Told, max_steps=4, out=tmp_path).finished
