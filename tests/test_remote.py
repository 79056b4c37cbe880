"""Files in a store: the images and the order of the local ones, whatever happens to the store, within a budget."""

import errno
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import TINY, make_folder
from kinds import samples, write_tar
from stores import Hub, Store

from fastjem.commands.check_data import CheckDataOptions, check_data
from fastjem.data import copies, remote
from fastjem.data.fingerprint import difference, fingerprint
from fastjem.data.loaders import Budget, Order, Windows
from fastjem.data.loaders.ahead import Ahead, files_at_a_time, windows
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import Source, decode_named, open_source, path_named, path_of
from fastjem.data.sources import naming
from fastjem.data.sources.shards import Shards
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

pytest.importorskip("aiohttp")
SHARDS, EACH = 6, 8
SPECS = [ViewSpec(size=16)]


@pytest.fixture(autouse=True)
def cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its part for copies of what is in a store."""
    monkeypatch.setenv("FASTJEM_CACHE_GB", "1")
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(5, 0.01))
    return cache / "store"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Six tar files of eight images."""
    folder = open_source(make_folder(tmp_path / "images", SHARDS * EACH))
    for shard in range(SHARDS):
        write_tar(tmp_path / "tars" / f"t-{shard}.tar", samples(folder, range(EACH * shard, EACH * (shard + 1))))
    return tmp_path / "tars"


@pytest.fixture
def store(tars: Path) -> Iterator[Store]:
    found = Store(tars)
    yield found
    found.kill()


def pattern(store: Store) -> str:
    return f"{store.url}/t-{{0..{SHARDS - 1}}}.tar"


def budget_of(monkeypatch: pytest.MonkeyPatch, tars: Path, files: float) -> int:
    """A budget that so many tar files fit in, in bytes."""
    found = int(files * max(path.stat().st_size for path in tars.glob("*.tar"))) + 10
    monkeypatch.setenv("FASTJEM_CACHE_GB", repr(found / 1e9))
    return found


def kept(cache: Path) -> list[Path]:
    """The copies that there are."""
    return sorted(path for path in cache.iterdir() if copies.NAME.fullmatch(path.name))


def forget(cache: Path) -> None:
    """All copies, but not what is known of them."""
    for path in kept(cache):
        path.unlink()


def whole_order(source: Source, **options: Any) -> Order:
    return Order(samples=len(source), **{"batch": 8, "seed": 3, "stop": 12, **options})


def test_images_labels_names_and_order_are_those_of_the_local_files(tars: Path, store: Store, cache: Path) -> None:
    local, there = open_source(tars), open_source(pattern(store))
    assert isinstance(there, Shards) and len(there) == len(local) == 48
    assert [there.name(i) for i in range(48)] == [local.name(i) for i in range(48)]
    assert np.array_equal(there.labels, local.labels) and there.classes == local.classes  # type: ignore[arg-type]
    assert difference(fingerprint(local), fingerprint(there)) == ""  # a run may move to a store
    assert windows(there, files_at_a_time(there, None)) == ()
    forget(cache)
    for workers in (0, 2):
        both = [TorchLoader(one, SPECS, whole_order(one), Budget(workers=workers)) for one in (local, there)]
        for crops, other in zip(*both, strict=True):
            assert torch.equal(crops.views[0], other.views[0]) and torch.equal(crops.index, other.index)
            assert torch.equal(crops.labels, other.labels) and not other.unreadable
        assert len(kept(cache)) == SHARDS
    assert path_of(there, 11) == path_named(there.root, there.name(11)) == f"{store.url}/t-1.tar/0011.png"
    assert np.array_equal(decode_named(there.root, there.name(11)), decode_named(str(tars), local.name(11)))
    sent = pickle.dumps(there)
    assert pickle.loads(sent).read(40) == local.read(40) and len(sent) < 4000
    assert store.whole == {f"t-{k}.tar": 2 for k in range(SHARDS)} and not store.parts  # once listed, once read


def test_an_index_is_made_once_and_of_what_has_changed_alone(
    store: Store, cache: Path, tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = f"{store.url}/t-1.tar"
    assert open_source(one).name(0) == "0008.png" and path_of(open_source(one), 0) == f"{one}/0008.png"
    first = open_source(pattern(store))
    said = capsys.readouterr().err
    assert "6 tar files is made" in said and "5 files, 0.0" in said and "1 GB at most (FASTJEM_CACHE_GB)" in said
    forget(cache)
    assert len(open_source(pattern(store))) == 48 and not kept(cache)  # nothing but the index is needed
    assert "is made" not in capsys.readouterr().err and set(store.whole.values()) == {1}
    folder = open_source(tars)
    write_tar(tars / "t-2.tar", samples(folder, range(40, 47)))
    with pytest.raises(OSError, match=r"t-2.tar has changed in the store since it was listed"):
        first.read(17)
    again = open_source(pattern(store))
    assert len(again) == 47 and again.read(16) == folder.read(40)
    assert store.whole["t-2.tar"] == 3 and store.whole["t-1.tar"] == 1  # one of them in vain
    assert "47 images, and held 48" in difference(fingerprint(first), fingerprint(again))


def test_what_may_pass_is_tried_again(store: Store, tars: Path, cache: Path) -> None:
    local = open_source(tars)
    store.fails = {"t-0.tar": [503, 503, 503], "t-1.tar": [429, "cut", 500], "t-2.tar": ["cut"] * 4}
    there = open_source(pattern(store))
    assert not any(store.fails.values()) and [there.read(i) for i in range(48)] == [local.read(i) for i in range(48)]
    assert set(store.whole.values()) == {1}
    forget(cache)
    store.kill()  # in the middle of a run; it comes back
    remote.PATIENCE = remote.Patience(5, 0.2)
    threading.Timer(0.3, store.begin).start()
    assert there.read(9) == local.read(9)
    store.pause = 0.1
    assert there.read(33) == local.read(33)


def test_a_file_that_cant_be_had_is_named_skipped_and_left_alone(store: Store, cache: Path, tars: Path) -> None:
    there = open_source(pattern(store))
    forget(cache)
    (tars / "t-1.tar").unlink()
    store.fails = {"t-4.tar": [503] * 5}
    for workers in (0, 1):
        (crops,) = TorchLoader(there, SPECS, whole_order(there, batch=48, stop=1), Budget(workers=workers))
        lost = {f"{store.url}/t-{k}.tar/{i:04}.png": k for k in (1, 4) for i in range(8 * k, 8 * k + 8)}
        assert {path for path, _ in crops.unreadable} == lost.keys()
        said = {(lost[path], why) for path, why in crops.unreadable}
        assert said == {(1, "there is no such file in the store"), (4, "503 Service Unavailable (tried 5 times)")}
        assert sorted(set(crops.index.tolist())) == [i for i in range(48) if i // 8 not in (1, 4)]
        assert (
            len(crops.unreadable) == 16
        )  # each image that was asked for; what stands in for it isn't sought in its file
        assert store.fails["t-4.tar"] == []  # five tries for all of its images, in both processes
    copies_of = there.copies  # type: ignore[attr-defined]
    os.utime(copies_of.place(4) + copies.FAILED, (time.time() - copies.FORGET, time.time() - copies.FORGET))
    assert there.read(33) == open_source(tars).read(25)  # t-1.tar isn't there


def test_what_isnt_there_or_cant_be_asked_at_the_start(
    store: Store, tars: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_source(f"{store.url}/t-{{4..7}}.tar")
    assert len(there) == 16
    said = capsys.readouterr().err
    assert f"{store.url}/t-6.tar can't be listed (there is no such file in the store)" in said
    with pytest.raises(UserError, match=r"has no images; t-7\.tar: there is no such file"):
        open_source(f"{store.url}/t-7.tar")
    store.fails = {"t-3.tar": [503] * 10}
    with pytest.raises(UserError, match=r"t-3.tar can't be read: 503 Service Unavailable \(tried 5 times\)"):
        open_source(pattern(store))
    with pytest.raises(UserError, match=r"a.tar.gz: compressed tar files"):
        open_source(f"{store.url}/a.tar.gz")
    with pytest.raises(UserError, match=r"\.tar, \.parquet, \.arrow, \.feather"):
        open_source(f"{store.url}/a{{1..2}}.zip")
    with pytest.raises(UserError, match=r"nothing://b/a.tar can't be opened: Protocol not known: nothing"):
        open_source("nothing://b/a.tar")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(UserError, match=r"gs://b/a.tar: gcsfs, .* isn't installed: pip install gcsfs"):
            open_source("gs://b/a.tar")
    with pytest.raises(OSError, match="wasn't opened on this machine yet"):
        decode_named(f"{store.url}/t-{{0..1}}.tar", "t-0.tar/0000.png")
    for given in ("0", "-1", "x", "nan"):
        monkeypatch.setenv("FASTJEM_CACHE_GB", given)
        with pytest.raises(UserError, match=f"must be a number of gigabytes above 0, got {given}"):
            open_source(pattern(store))
    monkeypatch.setenv("FASTJEM_CACHE_GB", "1")
    store.kill()
    with pytest.raises(UserError, match=r"t-0.tar can't be looked at: .*onnect.*\(tried 5 times\)"):
        open_source(pattern(store))
    store.begin()


@pytest.fixture
def bucket(tars: Path) -> Iterator[str]:
    """A store that can be listed."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a/readme.md", b"beside them")
    for path in tars.glob("*.tar"):
        memory.pipe_file(f"/bucket/a/{path.name}", path.read_bytes())
    yield "memory://bucket/a"
    memory.store.clear()


def test_folders_patterns_and_mixtures(bucket: str, tars: Path, tmp_path: Path) -> None:
    local = open_source(tars)
    names = [local.name(i) for i in range(48)]
    for end in ("", "/", "/t-*.tar", "/t-{0..5}.tar", "/t-{0,1,2,3,4,5}.tar", "/{t-0,t-1,t-2,*-3,t-4,*5}.tar"):
        there = open_source(bucket + end)
        assert [there.name(i) for i in range(48)] == names and there.read(47) == local.read(47)
        assert path_named(there.root, names[9]) == path_of(there, 9) == f"{bucket}/t-1.tar/0009.png"
        assert np.array_equal(decode_named(there.root, names[9]), decode_named(str(tars), names[9]))
    both = f"{bucket}/t-{{0,1}}.tar,{tmp_path / 'images'}:0.5"
    mixed = open_source(both)
    assert len(mixed) == 16 + 48 and mixed.read(9) == local.read(9) and mixed.read(16 + 5) == mixed.parts[1].read(5)  # type: ignore[attr-defined]
    assert naming.exists(both) and naming.absolute(both) == both
    assert path_named(mixed.root, mixed.name(9)) == path_of(mixed, 9) == f"{bucket}/t-1.tar/0009.png"
    assert naming.beside(f"{bucket}/train.tar", "test") is None
    found = check_data(CheckDataOptions(f"{bucket}/t-{{0,1}}.tar", workers=1))
    assert (found["files"], found["skipped"]) == (16, [])
    with pytest.raises(UserError, match=r"bucket/b can't be listed: there is no such file"):
        open_source("memory://bucket/b")
    with pytest.raises(UserError, match=r"there is no file memory://bucket/a/u-\*.tar"):
        open_source(f"{bucket}/u-*.tar")


def test_a_file_that_comes_cut_off_is_fetched_again(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store's library doesn't see it."""
    from fsspec.implementations.memory import MemoryFileSystem

    there = open_source(f"{bucket}/t-{{0..1}}.tar")
    expected = there.read(0)
    there.opened.clear()  # type: ignore[attr-defined]
    forget(cache)
    get_file, cut = MemoryFileSystem.get_file, iter((10, 0, 512))

    def shortened(self: MemoryFileSystem, path: str, to: str) -> None:
        get_file(self, path, to)
        if (length := next(cut, None)) is not None:
            os.truncate(to, length)

    monkeypatch.setattr(MemoryFileSystem, "get_file", shortened)
    assert there.read(0) == expected and next(cut, None) is None
    forget(cache)
    there.opened.clear()  # type: ignore[attr-defined]
    cut = iter([100] * 5)
    with pytest.raises(OSError, match=r"it came cut off, 100 of [\d,]+ bytes \(tried 5 times\)"):
        there.read(0)
    assert not list(cache.glob(".*.part"))


def test_tables(bucket: str, tars: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet
    from kinds import table

    local = open_source(tars.parent / "images")
    whole = table(local)
    memory = fsspec.filesystem("memory")
    for part, rows in enumerate((whole[:20], whole[20:])):
        with memory.open(f"/bucket/p/train-{part}.parquet", "wb") as file:
            pa.parquet.write_table(rows, file)
        with memory.open(f"/bucket/w/train-{part}.arrow", "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)
    for root in ("memory://bucket/p", "memory://bucket/w/train-*.arrow?image=image&label=label"):
        there = open_source(root)
        assert [there.read(i) for i in range(48)] == [local.read(i) for i in range(48)]
        assert there.labels.tolist() == local.labels.tolist() and there.classes == local.classes  # type: ignore[union-attr]
        assert path_named(there.root, "row 30") == path_of(there, 30)
        assert np.array_equal(decode_named(there.root, "row 30"), decode_named(local.root, local.name(30)))
        assert all(path.stat().st_size for path in kept(cache))
    used = {path.name for path in kept(cache)}
    monkeypatch.setattr(copies, "budget", lambda: 60_000)
    open_source(f"{bucket}/t-{{0..5}}.tar")  # of which each is fetched, and nothing that is mapped goes
    assert used <= {path.name for path in kept(cache)}
    with pytest.raises(UserError, match=r"tables are read at random from copies of all of them, .* GB, and 6e-05 GB"):
        open_source("memory://bucket/p")


def test_an_image_is_fetched_alone_where_not_all_files_fit(
    store: Store, tars: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget_of(monkeypatch, tars, 2)
    local, there = open_source(tars), open_source(pattern(store))
    forget(cache)
    store.whole.clear()
    for i in (40, 3, 25, 41, 4):
        assert there.read(i) == local.read(i)
    assert sum(store.parts.values()) == 5 and not store.whole and not kept(cache)
    assert [there.read(i) for i in range(10, 16)] == [local.read(i) for i in range(10, 16)]
    assert store.whole == {"t-1.tar": 1} and len(kept(cache)) == 1
    store.knows_parts = False
    assert there.read(40) == local.read(40) and store.whole == {"t-1.tar": 1, "t-5.tar": 2}  # the first for nothing
    store.knows_parts = True
    damaged = there.copies.place(2)  # type: ignore[attr-defined]
    Path(damaged).write_bytes(b"after a power cut")
    assert there.read(16) == local.read(16)
    write_tar(tars / "t-5.tar", samples(local, range(8)))
    forget(cache)
    again = pickle.loads(pickle.dumps(there))
    again.whole = False
    again.copies.same.clear()  # as another process's
    with pytest.raises(OSError, match=r"t-5\.tar has changed in the store"):
        again.read(47)


def images_of(order: Order, counts: tuple[int, ...]) -> list[list[int]]:
    """The files of an order's samples, epoch by epoch."""
    starts = np.cumsum(counts)
    found: list[list[int]] = []
    for keys in order:
        for epoch, sample in keys:
            if epoch == len(found):
                found.append([])
            found[epoch].append(int(np.searchsorted(starts, sample % order.samples, side="right")))
    return found


def test_an_order_by_files(seed: int = 5) -> None:
    """9 files of which one is empty, 4 at a time: 3 windows of 3."""
    counts = (5, 9, 0, 12, 7, 11, 3, 13, 4)
    order = Order(samples=64, windows=(Windows(0, counts, 4),), batch=8, seed=seed, stop=32)
    epochs = [order.permutation(epoch) for epoch in range(4)]
    chosen = []
    for permutation, files in zip(epochs, images_of(order, counts), strict=True):
        assert sorted(permutation.tolist()) == list(range(64)) and len(files) == 64
        groups: list[set[int]] = []  # of files whose images lie between each other
        ends = 0
        for at, file in enumerate(files):
            if at == ends:
                groups.append(set())
            groups[-1].add(file)
            ends = max(ends, len(files) - files[::-1].index(file))
        assert [len(group) for group in groups] in ([2, 3, 3], [3, 2, 3], [3, 3, 2])
        chosen.append(tuple(map(frozenset, groups)))
    assert len(set(chosen)) == 4 and epochs[0].tolist() == order.permutation(0).tolist()
    batches = list(order)
    for start in range(32):
        assert list(replace(order, start=start)) == batches[start:]
    for ranks in (2, 4):
        of_ranks = [list(replace(order, ranks=ranks, rank=rank)) for rank in range(ranks)]
        assert [list(itertools.chain(*parts)) for parts in zip(*of_ranks, strict=True)] == batches
    assert replace(order, seed=6).permutation(0).tolist() != epochs[0].tolist()
    once = replace(order, windows=(Windows(0, counts, 1),))
    assert [len(list(itertools.groupby(files))) for files in images_of(once, counts)] == [8] * 4


def test_an_order_by_files_between_other_images() -> None:
    """40 images anywhere, 60 in six files, two at a time, half of those again, and 30 in three, one at a time."""
    parts = ((40, 1.0), (60, 1.5), (30, 1.0))
    both = (Windows(40, (10,) * 6, 2), Windows(100, (10,) * 3, 1))
    order = Order(samples=130, parts=parts, windows=both, batch=10, seed=1, stop=16)
    assert order.batches_per_epoch == 16
    permutation = order.permutation(0)
    free = replace(order, windows=()).permutation(0)
    assert len(permutation) == 160 and sorted(permutation) == sorted(free)  # the same images, in another order
    images = permutation % 130
    for first, stop, most, each in ((40, 100, 2, 10), (100, 130, 1, 10)):
        files = [(i - first) // each for i in images.tolist() if first <= i < stop]
        spans = [(files.index(file), len(files) - files[::-1].index(file)) for file in set(files)]
        assert all(sum(a <= at < b for a, b in spans) <= most for at in range(len(files)))
        at = np.flatnonzero((images >= first) & (images < stop))
        assert at[0] < 12 and at[-1] > 147 and np.diff(at).max() < 25  # over all of the epoch
    assert np.diff(np.flatnonzero(images < 40)).max() < 25


def test_how_many_files_at_a_time(store: Store, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((7, [0]), (4.5, [2]), (2.5, [1])):
        budget_of(monkeypatch, tars, files)
        assert files_at_a_time(open_source(pattern(store)), None) == most
    there = open_source(pattern(store))
    assert files_at_a_time(there, [3]) == [3]  # as the run began
    assert windows(there, [3]) == (Windows(0, (8,) * 6, 3),) and windows(there, [0]) == ()
    mixed = open_source(f"{tars.parent / 'images'},{pattern(store)}")
    assert files_at_a_time(mixed, None) == [1] and windows(mixed, [1])[0].first == 48
    budget_of(monkeypatch, tars, 1.5)
    with pytest.raises(UserError, match=r"two files of each store at a time take .* GB, and .*: FASTJEM_CACHE_GB says"):
        files_at_a_time(open_source(pattern(store)), None)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_budget_is_kept_and_files_are_fetched_ahead_once_an_epoch(
    workers: int, store: Store, tars: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = budget_of(monkeypatch, tars, 4)
    local, there = open_source(tars), open_source(pattern(store))
    largest = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            largest[0] = max(largest[0], sum(size for _, size, _ in copies._kept(str(cache))))

    forget(cache)
    store.whole.clear()
    watching = threading.Thread(target=watch)
    watching.start()
    # Batches of one image: workers read up to eight ahead, half of a window.
    order = whole_order(there, batch=1, stop=96, windows=windows(there, files_at_a_time(there, None)))
    try:
        seen: list[int] = []
        for crops, other in zip(
            TorchLoader(there, SPECS, order, Budget(workers=workers)), TorchLoader(local, SPECS, order, Budget()),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(crops.views[0], other.views[0]) and not crops.unreadable
            seen += crops.index.tolist()
    finally:
        ended.set()
        watching.join()
    assert [sorted(seen[:48]), sorted(seen[48:])] == [list(range(48))] * 2
    assert 0 < largest[0] <= budget
    assert not store.parts and all(1 <= store.whole[f"t-{k}.tar"] <= 2 for k in range(SHARDS)), store.whole


def test_what_is_ahead_waits_for_room(store: Store, tars: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of one file are fetched before a batch is taken, and each further one when the first is behind."""
    budget_of(monkeypatch, tars, 2)
    there = open_source(pattern(store))
    forget(cache)
    ahead = Ahead([(0, there)], whole_order(there, windows=windows(there, [1]), stop=6))  # type: ignore[list-item]
    files = list(dict.fromkeys(sample // 8 for keys in ahead.order for _, sample in keys))
    ahead.begin()
    try:
        for taken in range(5):
            expected = {there.copies.place(file) for file in files[taken : taken + 2]}  # type: ignore[attr-defined]
            end = time.monotonic() + 5
            while {str(path) for path in kept(cache)} != expected and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.05)
            assert {str(path) for path in kept(cache)} == expected
            ahead.goes_on()
    finally:
        ahead.end()
    end = time.monotonic() + 5
    while any(thread.name.startswith("ahead") for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_processes_fetch_a_file_once(store: Store, cache: Path) -> None:
    store.pause = 0.05
    code = f"from fastjem.data.source import open_source; print(len(open_source({pattern(store)!r}).read(20)))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in both)
    assert first == second and int(first) > 100
    assert store.whole == {f"t-{k}.tar": 1 for k in range(SHARDS)}
    assert not [path for path in cache.iterdir() if path.suffix in (".lock", ".part")]


def test_threads_fetch_a_file_once_and_what_was_killed_is_removed(store: Store, cache: Path) -> None:
    there = open_source(pattern(store)).copies  # type: ignore[attr-defined]
    forget(cache)
    store.whole.clear()
    store.pause = 0.05
    for left in (there.place(0), there.place(1)):
        part = cache / f".{os.path.basename(left)}.x1y2.part"
        part.write_bytes(b"half")
        os.utime(part, (time.time() - 7200,) * 2)
    threads = [threading.Thread(target=there.fetch, args=(0,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.whole == {"t-0.tar": 1} and not list(cache.glob(".*.part"))


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_a_full_disk(when: str, store: Store, tars: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = open_source(pattern(store))
    forget(cache)
    if when == "before":
        monkeypatch.setattr(copies, "_free", lambda place: 1000)
        why = r"it has .* GB, and the disk 1e-06 GB left"
    else:

        def full(file: Any, to: str) -> None:
            Path(to).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(remote, "download", full)
        why = "No space left on device"
    with pytest.raises(OSError, match=rf"its copy can't be written in .*/store \({why}\): FASTJEM_CACHE says where"):
        there.read(0)
    for path in cache.iterdir():
        if path.suffix == ".listed":
            path.unlink()
    monkeypatch.setenv("FASTJEM_CACHE_GB", "2")
    for index in (tars.parent / "cache").glob("*.index"):
        index.unlink()
    with pytest.raises(UserError, match=rf"t-\d.tar can't be read: its copy can't be written in .* \({why}\)"):
        open_source(pattern(store))
    assert not kept(cache) and not [path for path in cache.iterdir() if path.suffix in (".part", ".lock")]


class Killed:
    """A logger that asks the run to stop behind a step."""

    def __init__(self, step: int):
        self.step = step

    def begin(self, run: object) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None: ...


def test_a_run_by_files_goes_on_as_it_would_have(
    store: Store, tars: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for package in ("timm", "torchvision", "safetensors"):
        pytest.importorskip(package)
    from safetensors.torch import load_file

    import fastjem

    budget_of(monkeypatch, tars, 4)
    options = {**TINY, "data": pattern(store), "loader": "torch", "epochs": 3}
    assert fastjem.pretrain(**options, out=str(tmp_path / "whole")).steps == 9
    said = capsys.readouterr().err
    assert "images are shuffled among those of 2 of the 6 files at a time" in said
    stopped = fastjem.pretrain(**options, out=str(tmp_path / "run"), loggers=[Killed(4)])
    assert stopped.stopped and 4 <= stopped.steps < 9
    monkeypatch.setenv("FASTJEM_CACHE_GB", "1")  # another machine's disk
    assert fastjem.pretrain(out=str(tmp_path / "run"), resume=True, workers=2).finished
    assert "keeps the order that it began with" in capsys.readouterr().err
    both = [load_file(tmp_path / run / "encoder.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    assert fastjem.pretrain(**{**options, "epochs": 1}, out=str(tmp_path / "free")).finished
    assert "files at a time" not in capsys.readouterr().err
    first = [json.loads(line)["loss"] for line in (tmp_path / "free" / "metrics.jsonl").read_text().splitlines()]
    assert first != losses[0][:3]


def test_hugging_faces_hub(tars: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own library, and a server that answers as the hub does."""
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("pyarrow")
    import pyarrow.parquet
    from kinds import table

    local = open_source(tars.parent / "images")
    (tars / "parquet").mkdir()
    for part, rows in enumerate((slice(0, 20), slice(20, 48))):
        pyarrow.parquet.write_table(table(local)[rows], tars / "parquet" / f"train-{part}.parquet")
    store = Hub(tars)
    monkeypatch.setattr(constants, "ENDPOINT", store.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", store.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(remote, "_systems", {})  # whose connections lead to the real one
    try:
        for name in ("t-{0..5}.tar", "t-*.tar", "parquet", "parquet/train-*.parquet"):
            there = open_source(f"hf://datasets/u/d/{name}")
            assert [there.read(i) for i in range(48)] == [local.read(i) for i in range(48)]
            assert there.labels is not None and there.labels.tolist() == local.labels.tolist()  # type: ignore[union-attr]
        forget(cache)
        tables = open_source("hf://datasets/u/d/t-{0..5}.tar")
        both = [TorchLoader(one, SPECS, whole_order(one), Budget(workers=2)) for one in (tables, local)]
        for crops, other in zip(*both, strict=True):
            assert torch.equal(crops.views[0], other.views[0]) and not crops.unreadable
        budget_of(monkeypatch, tars, 2)
        assert open_source("hf://datasets/u/d/t-{0..5}.tar").read(24) == local.read(24)  # a part of the file
        for missing in ("hf://datasets/u/d/u.tar", "hf://datasets/u/e/t.tar"):
            with pytest.raises(UserError, match="there is no such file in the store"):
                open_source(missing)
    finally:
        store.kill()


def test_s3(tars: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A server that speaks as S3 does."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        import s3fs

        there = s3fs.S3FileSystem(skip_instance_cache=True)
        there.mkdir("bucket")
        for path in tars.glob("*.tar"):
            there.pipe_file(f"bucket/tars/{path.name}", path.read_bytes())
        local = open_source(tars)
        for root in ("s3://bucket/tars/t-{0..5}.tar", "s3://bucket/tars", "s3://bucket/tars/t-*.tar"):
            source = open_source(root)
            assert [source.read(i) for i in range(48)] == [local.read(i) for i in range(48)]
        forget(cache)
        both = [TorchLoader(one, SPECS, whole_order(one), Budget(workers=2)) for one in (source, local)]
        for crops, other in zip(*both, strict=True):
            assert torch.equal(crops.views[0], other.views[0]) and not crops.unreadable
        forget(cache)
        source.opened.clear()
        there.pipe_file("bucket/tars/t-3.tar", (tars / "t-4.tar").read_bytes())
        with pytest.raises(OSError, match=r"t-3\.tar has changed in the store"):
            source.read(24)
        budget_of(monkeypatch, tars, 2)
        assert open_source("s3://bucket/tars/t-{0..5}.tar").read(24) == local.read(32)
        with pytest.raises(UserError, match="there is no such file in the store"):
            open_source("s3://bucket/tars/u.tar")
        with pytest.raises(UserError, match="there is no such file in the store"):
            open_source("s3://pail/u.tar")
    finally:
        server.stop()
