"""Several sources at once: how often each image is seen, in which order, and what images and classes are called."""

import itertools
import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from images import TINY, Own, make_folder
from kinds import stored

from fastjem.commands.check_data import CheckDataOptions, check_data, render
from fastjem.data import loaders
from fastjem.data.batch import finish
from fastjem.data.fingerprint import difference, fingerprint
from fastjem.data.loaders import Budget, Order, images_per_epoch
from fastjem.data.masking import drawn_masks
from fastjem.data.source import Source, decode, decode_named, mixed, open_source, open_sources, parts_of, path_of
from fastjem.data.sources import naming
from fastjem.data.sources.mixture import Mixture
from fastjem.data.views import MaskSpec, ViewSpec
from fastjem.errors import UserError

SPECS = [ViewSpec(size=24)]


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Source, Source]:
    """Folders of 12 and 8 images, of the classes 0, 1, 2 and 1, 2, 3."""
    a = make_folder(tmp_path / "a", 12)
    b = make_folder(tmp_path / "b", 8, classes=4, seed=1)
    (b / "class0").rename(b / "class9")
    return open_source(a), open_source(b)


def epoch(order: Order, number: int) -> list[int]:
    return order.permutation(number).tolist()


@pytest.mark.parametrize("seed", [0, 7])
def test_an_order_of_parts_that_are_seen_once_is_that_of_one_source(seed: int) -> None:
    whole = Order(samples=20, batch=4, seed=seed, stop=10)
    parts = replace(whole, parts=((12, 1.0), (8, 1.0)))
    assert list(parts) == list(whole) and parts.images_per_epoch == 20
    expected = np.random.Generator(np.random.Philox(key=[seed, 3])).permutation(20)
    assert epoch(whole, 2) == epoch(parts, 2) == expected.tolist()  # as ever


def test_how_often_images_are_seen() -> None:
    """12 images once, 10 by 30 %, 4 twice and 3 by 150 %: 12 + 3 + 8 + 4."""
    order = Order(samples=29, parts=((12, 1), (10, 0.3), (4, 2), (3, 1.5)), batch=5, seed=3, stop=100)
    assert order.images_per_epoch == 27 == images_per_epoch(29, order.parts) and order.batches_per_epoch == 5
    of_epochs = [Counter(sample % 29 for sample in epoch(order, number)) for number in range(20)]
    shares = []
    for number, seen in enumerate(of_epochs):
        assert len(epoch(order, number)) == len(set(epoch(order, number))) == 27  # an image twice is two samples
        assert all(seen[i] == 1 for i in range(12)) and all(seen[i] == 2 for i in range(22, 26))
        shares.append({i for i in range(12, 22) if seen[i]})
        assert len(shares[-1]) == 3 and sorted(seen[i] for i in range(26, 29))[0] == 1
        assert sum(seen[i] for i in range(26, 29)) == 4
    assert all(not one & other for one, other in itertools.pairwise(shares))  # another 30 %
    assert set(Counter(i for share in shares for i in share).values()) == {6}  # all alike: 20 epochs of 30 %
    assert shares[0] != {12, 13, 14} and epoch(order, 1) != epoch(order, 2)
    assert epoch(replace(order, seed=4), 0) != epoch(order, 0)
    shares = [set(epoch(Order(samples=10, parts=((10, 0.8),), batch=2, stop=1), number)) for number in range(5)]
    assert all(len(one & other) == 6 for one, other in itertools.pairwise(shares))  # as few as can be
    of_both = epoch(Order(samples=200, parts=((100, 0.5), (100, 0.5)), batch=2, stop=1), 0)
    first = {sample for sample in of_both if sample < 100}
    assert len(first) == 50 and first != {sample - 100 for sample in of_both if sample >= 100}  # not of the same rows


def test_the_place_in_a_run_is_its_step_and_ranks_share_it() -> None:
    order = Order(samples=22, parts=((12, 1), (10, 0.5)), batch=4, seed=2, stop=12)
    batches = list(order)
    assert [keys[0][0] for keys in batches] == [0] * 4 + [1] * 4 + [2] * 4
    assert list(replace(order, start=7)) == batches[7:]
    ranks = [list(replace(order, ranks=2, rank=rank)) for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == batches
    assert images_per_epoch(7, ()) == 7 and images_per_epoch(3, ((3, 0.01),)) == 1


def test_names_classes_and_images_are_those_of_the_parts(sides: tuple[Source, Source], tmp_path: Path) -> None:
    a, b = sides
    source = open_source(f"{a.root},{b.root}:0.5")
    assert isinstance(source, Mixture) and len(source) == 20 and parts_of(source) == ((12, 1.0), (8, 0.5))
    assert source.name(0) == "a/class0/0000.png" and source.name(12) == f"b/{b.name(0)}"
    assert path_of(source, 13) == f"{b.root}/{b.name(1)}" and source.root == f"{a.root}:1,{b.root}:0.5"
    assert source.classes == ["class0", "class1", "class2", "class3", "class9"]
    labels = [source.classes[label] for label in source.labels]
    assert labels == [a.classes[label] for label in a.labels] + [b.classes[label] for label in b.labels]
    for i, (part, at) in {3: (a, 3), 11: (a, 11), 12: (b, 0), 19: (b, 7)}.items():
        assert source.read(i) == part.read(at)
        assert np.array_equal(np.asarray(decode_named(source.root, source.name(i))), np.asarray(decode(part, at)))
    assert pickle.loads(pickle.dumps(source)).read(15) == source.read(15)
    numbers = make_folder(tmp_path / "numbers", 3)
    for number, name in enumerate(("9", "--1", "10")):
        (numbers / f"class{number}").rename(numbers / name)
    assert open_source(f"{a.root},{numbers}").classes == ["--1", "10", "9", "class0", "class1", "class2"]
    (numbers / "--1").rename(numbers / "-1")
    other = make_folder(tmp_path / "other", 1)
    (other / "class0").rename(other / "7")
    assert open_source(f"{other},{numbers}").classes == ["-1", "7", "9", "10"]
    (numbers / "-1").rename(numbers / "--1")
    assert open_source(f"{other},{numbers}").classes == ["--1", "10", "7", "9"]
    flat = make_folder(tmp_path / "flat", 4, classes=0)
    without = open_source(f"{a.root},{flat}")
    assert without.labels is None and without.classes == [] and len(without) == 16
    (half,) = (open_source(f"{a.root}:.5"),)
    assert parts_of(half) == ((12, 0.5),) and half.name(3) == f"a/{a.name(3)}"
    own = mixed([Own(a), a.root], [2, None])  # whatever `open_source` takes
    assert open_source(own) is own and own.name(33) == f"a/{a.name(1)}" and own.name(1) == "Own/1"


def test_roots_are_told_apart_by_their_last_folders(sides: tuple[Source, Source], tmp_path: Path) -> None:
    for folder in ("x/train", "y/train"):
        make_folder(tmp_path / folder, 2, classes=0)
    source = open_source(f"{tmp_path}/x/train,{tmp_path}/y/train")
    assert [source.name(i) for i in (0, 2)] == ["x/train/0000.png", "y/train/0000.png"]
    a = sides[0].root
    for data, message in (
        (f"{a},{a}", f"{a} is named twice; {a}:2 shows its images twice in an epoch"),
        (f"{a}:0,{sides[1].root}", f"{a}:0: the number behind the colon must be above 0"),
        (f"{a}:2000", "must be above 0, 1000 at most"),
        (f"{a},{tmp_path}/nowhere:2", "nowhere is not a folder"),
        (f"{a}:half", "a:half is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(data)
    with pytest.raises(UserError, match="a part of several sources must be one source"):
        mixed([f"{a}:2", sides[1]])
    with pytest.raises(UserError, match="a weight, or None, for each of 2 parts; got 1"):
        mixed(sides, [0.5])


def test_a_path_that_is_there_is_one_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a", "a,b", "c:0.5", "d{e,f}", "g?label=h"):
        make_folder(tmp_path / name, 2, classes=0)
    for name in ("a,b", "c:0.5", "d{e,f}", "g?label=h"):
        source = open_source(tmp_path / name)
        assert source.root == str(tmp_path / name) and len(source) == 2
        assert naming.exists(source.root) and naming.absolute(source.root) == source.root
    source = open_source(f"{tmp_path}/a,b,{tmp_path}/c:0.5:2,{tmp_path}/a")
    assert parts_of(source) == ((2, 1.0), (2, 2.0), (2, 1.0)) and source.name(2) == "c:0.5/0000.png"


def test_names_of_data_are_taken_apart_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert naming.split("a,b:0.3,t-{1,2}.tar:2") == [("a", None), ("b", 0.3), ("t-{1,2}.tar", 2.0)]
    assert naming.split("a,,b,") == [("a", None), ("b", None)] and naming.split("a:b") == [("a:b", None)]
    assert naming.absolute("a,b.csv?label=x:0.3") == f"{tmp_path}/a,{tmp_path}/b.csv?label=x:0.3"
    for weight in (0.123456789, 1 / 3, 1e-9, 1000.0, 2.0):
        assert naming.split(naming.weighed("a", weight)) == [("a", weight)]
    assert naming.absolute("a:0.123456789,b:0.000000001") == f"{tmp_path}/a:0.123456789,{tmp_path}/b:0.000000001"
    (tmp_path / "b.csv").touch()
    named = "b.csv?image=x&label=y,b.csv?label=y:0.5,t-{1,2}.tar"  # a comma behind an option begins another part
    assert [part for part, _ in naming.split(named)] == ["b.csv?image=x&label=y", "b.csv?label=y", "t-{1,2}.tar"]
    assert naming.expand("t-{008..011}.tar") == ["t-008.tar", "t-009.tar", "t-010.tar", "t-011.tar"]
    assert naming.expand("t-{9..11}") == ["t-9", "t-10", "t-11"] and naming.expand("{b,a}{1..2}") == [
        "b1",
        "b2",
        "a1",
        "a2",
    ]
    for pattern in ("t-{0..9999999}.tar", "{0..1999}{0..1999}"):
        with pytest.raises(UserError, match=r"stands for more than 1,000,000 files"):
            naming.expand(pattern)
    with monkeypatch.context() as patched:
        patched.setattr(naming, "MOST", 50)
        assert not naming.exists("{0..9}" * 20)  # the last ones of 1e20 aren't looked for
    assert (
        naming.beside("x/train.csv?label=k", "test") == "x/test.csv?label=k"
        and naming.beside("x/train/", "test") == "x/test"
    )
    assert naming.beside("x/train,y", "test") is None and naming.beside("x/training", "test") is None
    os.makedirs("t")
    assert naming.exists("t,t:2") and not naming.exists("t,u") and not naming.exists("")


@pytest.mark.parametrize("name", ["torch", "memory", "dali-cpu"])
def test_an_image_that_is_seen_twice_has_other_views(name: str, sides: tuple[Source, Source], tmp_path: Path) -> None:
    if name == "dali-cpu":
        pytest.importorskip("nvidia.dali")
    a, b = sides
    source = open_source(f"{stored('shards', a, tmp_path / 'tars')}:2,{b.root}:0.5")
    order = Order(samples=20, parts=parts_of(source), batch=28, seed=1, stop=1)
    (crops,) = loaders.create(name, source, SPECS, order, Budget(workers=1))
    assert Counter(crops.index[crops.index < 12].tolist()) == Counter(dict.fromkeys(range(12), 2))
    assert len({*crops.index[crops.index >= 12].tolist()}) == 4
    assert torch.equal(crops.labels, torch.as_tensor(source.labels[crops.index], dtype=torch.int64))
    first, second = (crops.index == 5).nonzero().flatten().tolist()
    assert not torch.equal(crops.views[0][first], crops.views[0][second])
    mask = MaskSpec(0, (6, 6), 0.5, "random")
    hidden = finish(crops, SPECS, "cpu", masks=[mask], seed=1).masks[0].hidden  # so are the masks
    expected = drawn_masks(mask, 1, 0, torch.tensor([5, 25])).hidden
    assert {tuple(hidden[i].flatten().tolist()) for i in (first, second)} == {
        tuple(one.flatten().tolist()) for one in expected
    }
    (plain,) = loaders.create(name, a, SPECS, Order(samples=12, batch=12, seed=1, stop=1), Budget(workers=1))
    shown = {tuple(view.flatten().tolist()) for view in crops.views[0]}
    assert {
        tuple(view.flatten().tolist()) for view in plain.views[0]
    } <= shown  # the first time it has those that it had


def test_a_run_of_two_and_what_it_notices(
    sides: tuple[Source, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    for package in ("timm", "torchvision", "safetensors"):
        pytest.importorskip(package)
    import fastjem
    from fastjem.commands.evaluate import EvaluateOptions, evaluate
    from fastjem.commands.views import ViewsOptions, draw_views

    monkeypatch.chdir(tmp_path)
    stored("shards", open_source(make_folder(tmp_path / "c", 16, seed=2)), tmp_path / "tars")
    data = "a,b:0.5,tars:2"  # 12 + 4 + 32 images, three batches
    options = {**TINY, "report": True, "data": data}
    whole = fastjem.pretrain(**options, epochs=2, out="whole")
    assert whole.steps == 6
    assert fastjem.pretrain(**options, max_steps=4, out="run").steps == 4
    monkeypatch.chdir(tmp_path / "c")  # the run's data are found again
    with pytest.raises(UserError, match=r"its parts by \[1.0, 0.25, 2.0\] of their images in an epoch"):
        fastjem.pretrain(out="../run", resume=True, max_steps=6, data="../a,../b:0.25,../tars:2")
    assert fastjem.pretrain(out="../run", resume=True, max_steps=6).steps == 6
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "run")
    ]
    assert [row["epoch"] for row in rows[0]] == [row["epoch"] for row in rows[1]] == [0, 0, 0, 1, 1, 1]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") > 10 and "not shown" not in page
    monkeypatch.chdir(tmp_path)
    drawn = draw_views(ViewsOptions(data=data, out="views.png", image_size=32))
    assert drawn.stat().st_size > 1000
    fastjem.pretrain(**{**options, "data": "a,b"}, max_steps=2, out="classes")
    assert evaluate(EvaluateOptions("classes"))["classes"] == 5
    assert fastjem.pretrain(**{**options, "data": ["a", "b:2"]}, epochs=1, out="list").steps == 1


def test_check_data_and_fingerprints(sides: tuple[Source, Source], tmp_path: Path) -> None:
    a, b = sides
    broken = Path(b.root) / "class1" / "half.png"
    broken.write_bytes(b.read(0)[:50])
    data = f"{a.root},{b.root}:0.5"
    found = check_data(CheckDataOptions(data, workers=1))
    assert found["files"] == 21 and [path for path, _ in found["skipped"]] == [str(broken)]
    assert f"  {broken}: " in render(found)
    before = fingerprint(open_source(data))
    assert difference(before, fingerprint(open_source(data))) == ""
    assert "[1.0, 0.6]" in difference(before, fingerprint(open_source(f"{a.root},{b.root}:0.6")))
    assert "of other names" in difference(before, fingerprint(open_source(f"{b.root}:0.5,{a.root}")))
    with pytest.raises(UserError, match="2 sources, got 1"):
        open_sources(a.root, 2)
    assert len(open_sources(f"{a.root},{a.root}", 2)) == 12  # pairs, as ever
    with pytest.raises(UserError, match=r"no number behind a colon, got .*a:2"):
        open_sources(f"{a.root}:2,{a.root}", 2)
