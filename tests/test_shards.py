"""Tar files: what in them is an image, what is said of damage, and an index that is never older than they are."""

import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import make_folder
from kinds import link, samples, write_tar

from fastjem.data import files
from fastjem.data.fingerprint import difference, fingerprint
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import Source, open_source
from fastjem.data.sources import index, shards
from fastjem.data.sources.shards import Shards
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Source:
    return open_source(make_folder(tmp_path / "images", 12))


@pytest.fixture
def three(folder: Source, tmp_path: Path) -> Path:
    """A folder of three shards of four images."""
    for shard in range(3):
        write_tar(tmp_path / "tars" / f"{shard}.tar", samples(folder, range(4 * shard, 4 * shard + 4)))
    return tmp_path / "tars"


def indices(*places: Path) -> list[Path]:
    return [path for place in places if place.exists() for path in place.iterdir() if path.suffix == ".index"]


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_members_are_images_by_their_endings_and_samples_by_their_names(folder: Source, tmp_path: Path) -> None:
    image = [folder.read(i) for i in range(12)]
    path = write_tar(
        tmp_path / "a.tar",
        [
            link("a", "", tarfile.DIRTYPE),
            ("./a/1.JPG", image[0]),  # found by its content, whatever it is called
            ("a/1.cls", b" 7\n"),
            ("a/1.seg.png", image[1]),  # a mask beside the image: no image of its own
            ("a/b.c/2.v1.x.png", image[2]),  # no 2.png: each is one
            ("a/b.c/2.v2.x.png", image[3]),
            ("a/b.c/2.json", b'{"caption": "an oak", "label": 12}'),
            ("a/._1.JPG", b"what macOS knows"),
            (".hidden/3.png", image[4]),
            ("4.txt", b"a text alone"),
            ("a/b.c/2.v2.x.png", image[5]),  # once more, as `tar -r` adds a newer one
            link("5.png", "a/1.JPG"),
            ("5.cls", b"7"),
            link("a/6.png", "1.JPG", tarfile.SYMTYPE),
            ("a/6.cls", b"7"),
            link("b/7.png", "./a/1.JPG", tarfile.LNKTYPE),
            ("b/7.cls", b"12"),
            link("8.png", "../../etc/passwd"),
        ],
    )
    source = open_source(path)
    assert names(source) == ["a/1.JPG", "a/b.c/2.v1.x.png", "a/b.c/2.v2.x.png", "5.png", "a/6.png", "b/7.png"]
    assert [source.read(i) for i in range(6)] == [image[k] for k in (0, 2, 5, 0, 0, 0)]
    assert source.classes == ["7", "12"] and source.labels.tolist() == [0, 1, 1, 0, 0, 1]
    assert source.notices == [f"{path}: 1 samples have no image and are left out"]
    assert source.unlisted == [(f"{path}/8.png", "a link to ../../etc/passwd, which is no image in it")]


def test_labels(folder: Source, tmp_path: Path) -> None:
    """By .cls, by .json, else by the first folders, where there are several and all images are in one."""
    image = folder.read(0)
    for number, (members, classes, labels) in enumerate(
        (
            ([("1.png", image), ("1.json", b'{"class": "oak"}'), ("2.png", image), ("2.json", b'{"class": "elm"}')],
             ["elm", "oak"], [1, 0]),
            ([("1.png", image), ("1.json", b'{"cls": "10"}'), ("2.png", image), ("2.json", b'{"cls": 10}'),
              ("3.png", image), ("3.cls", b"9")], ["9", "10"], [1, 1, 0]),
            ([("1.png", image), ("1.cls", b"10"), ("2.png", image), ("2.cls", b"9")], ["9", "10"], [1, 0]),
            ([("1.cls", b"10"), ("2.cls", b"9"), ("1.png", image), ("2.png", image)], ["9", "10"], [1, 0]),
            ([("oak/1.png", image), ("elm/old/2.png", image)], ["elm", "oak"], [1, 0]),
            ([("all/1.png", image), ("all/2.png", image)], [], None),
            ([("oak/1.png", image), ("2.png", image)], [], None),
            ([("1.png", image), ("1.json", b'{"label": [1]}'), ("2.png", image), ("2.json", b"{")], [], None),
        )
    ):  # fmt: skip
        source = open_source(write_tar(tmp_path / f"{number}.tar", members))
        assert source.classes == classes and (None if source.labels is None else source.labels.tolist()) == labels
    some = [("1.png", image), ("1.cls", b"1"), ("2.png", image), ("3.png", image)]
    with pytest.raises(UserError, match=r"some images have labels \(.cls or .json\), and some.tar/2.png has none"):
        open_source(write_tar(tmp_path / "some.tar", some))
    assert not indices(tmp_path / "cache") and len(indices(tmp_path)) == 8


def test_one_key_in_two_shards_and_every_way_to_name_them(folder: Source, tmp_path: Path) -> None:
    for shard in range(11):
        write_tar(tmp_path / "tars" / f"t-{shard:02}.tar", [("1.png", folder.read(shard))])
    (tmp_path / "tars" / "README.md").write_text("beside them")
    (tmp_path / "tars" / "sizes.json").write_text("{}")
    expected = [f"t-{shard:02}.tar/1.png" for shard in range(11)]
    for root in ("tars", "tars/t-*.tar", "tars/t-{00..10}.tar", "tars/{t-0*,t-10}.tar"):
        source = open_source(tmp_path / root)
        assert isinstance(source, Shards) and names(source) == expected
        assert [source.read(i) for i in range(11)] == [folder.read(i) for i in range(11)]
    source = open_source(tmp_path / "tars/t-{10,02}.tar")  # in the order given
    assert names(source) == ["t-10.tar/1.png", "t-02.tar/1.png"]
    assert open_source(str(tmp_path / "{tars,tars}" / "t-03.tar")).name(1) == "tars/t-03.tar/1.png"
    for root, why in (
        ("tars/u-*.tar", "there is no file"),
        ("tars/u-{1..2}.tar", "no images; u-1.tar: No such file"),
    ):
        with pytest.raises(UserError, match=why):
            open_source(tmp_path / root)
    (tmp_path / "tars" / "9.png").write_bytes(folder.read(0))
    assert len(open_source(tmp_path / "tars")) == 1  # a folder of images, with tar files that aren't taken


def test_compressed_ones_are_refused_in_a_line(three: Path, tmp_path: Path) -> None:
    (tmp_path / "gz").mkdir()
    for name in ("a.tar.gz", "b.tgz"):
        (tmp_path / "gz" / name).write_bytes(b"\x1f\x8b" + bytes(100))
        with pytest.raises(UserError, match=f"{name}: compressed tar files: .*gunzip"):
            open_source(tmp_path / "gz" / name)
    with pytest.raises(UserError, match="gz has compressed tar files"):
        open_source(tmp_path / "gz")
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(UserError, match=r"c.tar has no images; c.tar: it is compressed by gzip"):
        open_source(tmp_path / "c.tar")


@pytest.mark.parametrize("cut", ["in a member", "behind a member", "in a header", "before a label", "garbage"])
def test_what_is_before_a_damage_is_used(
    cut: str, folder: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_tar(tmp_path / "t" / "a.tar", samples(folder, range(12)))
    write_tar(tmp_path / "t" / "b.tar", samples(folder, range(2)))
    with tarfile.open(whole) as archive:
        at = {member.name: member for member in archive}
    where = at["0005.png"].offset
    end, why = {
        "in a member": (where + 612, "it is cut off"),
        "behind a member": (where, "it is cut off"),
        "in a header": (where + 100, "it is cut off"),
        "before a label": (at["0005.cls"].offset + 512, "it is cut off"),
        "garbage": (None, "it is damaged"),
    }[cut]
    content = whole.read_bytes()
    whole.write_bytes(content[:where] + b"\xff" * 512 + content[where + 512 :] if end is None else content[:end])
    source = open_source(tmp_path / "t")
    assert names(source) == [f"a.tar/{i:04}.png" for i in range(5)] + ["b.tar/0000.png", "b.tar/0001.png"]
    assert source.labels.tolist() == [*folder.labels[:5], *folder.labels[:2]]
    assert source.read(4) == folder.read(4)
    said = capsys.readouterr().err
    where = at["0005.cls"].offset if cut == "before a label" else where
    assert f"a.tar from byte {where} on can't be listed ({why}): what is in it is left out" in said
    open_source(tmp_path / "t")  # by the index
    assert f"from byte {where} on" in capsys.readouterr().err


def test_what_is_behind_the_end_and_what_isnt_in_one_piece_is_said(
    folder: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_tar(tmp_path / "1.tar", [("1.png", folder.read(1))]).read_bytes()
    second = write_tar(tmp_path / "2.tar", [("2.png", folder.read(2))]).read_bytes()
    (tmp_path / "a" / "c.tar").mkdir(parents=True)
    (tmp_path / "a" / "c.tar" / "BOTH.TAR").write_bytes(first + second)
    source = open_source(tmp_path / "a" / "c.tar")  # a folder, whatever it is called
    assert names(source) == ["BOTH.TAR/1.png"] == [f"BOTH.TAR/{open_source(tmp_path / 'a/c.tar/BOTH.TAR').name(0)}"]
    said = capsys.readouterr().err
    end = 512 + -(-len(folder.read(1)) // 512) * 512
    assert f"BOTH.TAR from byte {end} on can't be listed (it ends there, and more follows: tar -A joins" in said
    assert open_source(tmp_path / "1.tar").unlisted == []
    sparse = tarfile.TarInfo("hole.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    write_tar(tmp_path / "s.tar", [("hole.png", sparse), ("1.png", folder.read(1))])
    source = open_source(tmp_path / "s.tar")
    assert names(source) == ["1.png"] and source.read(0) == folder.read(1)
    assert source.unlisted == [(f"{tmp_path}/s.tar/hole.png", "a sparse member, which isn't in one piece")]


@pytest.mark.parametrize(
    "said",
    [
        "[]",
        "[" * 10**5,
        '{"signature": [], "classes": [], "unlisted": [], "without": 0, "positions": [], "starts": [], "ends": 0}',
    ],
)
def test_an_index_that_says_nonsense_is_made_anew(said: str, three: Path, folder: Source) -> None:
    open_source(three)
    (path,) = indices(three)
    path.write_bytes(said.encode() + np.array(len(said), "<u8").tobytes() + index.MAGIC)
    assert open_source(three).read(5) == folder.read(5)


def test_no_damage_is_anything_but_said(folder: Source, tmp_path: Path) -> None:
    """Bytes of headers and labels turned at random: what is listed can be read, or raises when it is."""
    whole = write_tar(tmp_path / "a.tar", [*samples(folder, range(4)), link("a.png", "0001.png")]).read_bytes()
    random = np.random.default_rng(0)
    for number in range(60):
        content = bytearray(whole)
        for at in random.integers(0, len(whole), 20 if number % 2 else 1) // 512 * 512 + random.integers(0, 265):
            content[at] = random.integers(0, 256)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(content)
        try:
            source = open_source(path)
        except UserError as error:
            assert "has no images" in str(error) or "has none" in str(error)
            continue
        assert all(isinstance(source.read(i), bytes) for i in range(len(source)))


def test_a_shard_that_cant_be_opened_is_said_and_all_of_them_are_an_error(
    three: Path, folder: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    (three / "1.tar").unlink()
    os.mkfifo(three / "1.tar")
    (three / "2.tar").write_bytes(b"")
    assert names(open_source(three)) == [f"0.tar/{i:04}.png" for i in range(4)]
    said = capsys.readouterr().err
    assert "1.tar can't be listed (not a regular file)" in said and "2.tar can't be listed (it is empty)" in said
    (three / "0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(UserError, match=r"has no images; 0.tar: it is no tar file"):
        open_source(three)


def test_an_index_is_made_once_and_anew_when_it_doesnt_fit(
    three: Path, folder: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "an index of 3 tar files is made, once"
    first = fingerprint(open_source(three))
    assert made in capsys.readouterr().err
    assert fingerprint(open_source(three)) == first and made not in capsys.readouterr().err
    (kept,) = indices(three)
    content = kept.read_bytes()
    for broken in (b"", content[:-1], content[:100], b"x" * 200, content[:-8] + b"FJTARS99", bytes(len(content))):
        kept.write_bytes(broken)
        assert fingerprint(open_source(three)) == first and made in capsys.readouterr().err
        assert kept.read_bytes() == content
    write_tar(three / "2.tar", samples(folder, range(7, 12)))
    source = open_source(three)
    assert made in capsys.readouterr().err and len(source) == 13 and source.read(12) == folder.read(11)
    assert "13 images, and held 12" in difference(first, fingerprint(source))
    write_tar(three / "3.tar", samples(folder, range(1)))
    assert len(open_source(three)) == 14


def test_an_index_lies_in_the_cache_where_the_folder_is_read_only(
    three: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = index.cache.written

    def refused(path: str, only: tuple[str, ...] = (str(three),)):
        if path.startswith(only):
            raise PermissionError(13, "Permission denied")
        return written(path)

    monkeypatch.setattr(index.cache, "written", refused)
    assert len(open_source(three)) == 12
    assert not indices(three) and len(indices(cache)) == 1 and [p.suffix for p in cache.iterdir()] == [".index"]
    capsys.readouterr()
    assert len(open_source(three)) == 12 and capsys.readouterr().err == ""
    indices(cache)[0].unlink()
    monkeypatch.setattr(index.cache, "written", lambda path: refused(path, ("/",)))
    source = open_source(three)
    assert "the index can't be kept" in capsys.readouterr().err
    assert pickle.loads(pickle.dumps(source)).read(11) == source.read(11)


def test_what_changed_behind_the_index_raises_and_is_skipped_by_name(three: Path, folder: Source) -> None:
    source = open_source(three)
    assert source.read(5) == folder.read(5)
    os.truncate(three / "1.tar", 1024)
    with pytest.raises(OSError, match=r"1.tar has shrunk since its index was made"):
        source.read(5)
    specs = [ViewSpec(size=16)]
    (crops,) = TorchLoader(source, specs, Order(samples=12, batch=12, stop=1), Budget())
    assert sorted(set(crops.index.tolist())) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert {path for path, _ in crops.unreadable} == {f"{three}/1.tar/{i:04}.png" for i in range(4, 8)}
    assert all("has shrunk since" in why for _, why in crops.unreadable)
    write_tar(three / "0.tar", samples(folder, range(4, 8)))
    with pytest.raises(OSError, match=r"0.tar has changed since its index was made"):
        source.read(0)


def test_a_broken_image_is_skipped_by_name(folder: Source, tmp_path: Path) -> None:
    half = folder.read(1)[: len(folder.read(1)) // 2]
    path = write_tar(tmp_path / "a.tar", [("1.png", folder.read(0)), ("2.png", half), ("3.png", b"")])
    (crops,) = TorchLoader(open_source(path), [ViewSpec(size=16)], Order(samples=3, batch=3, stop=1), Budget())
    assert crops.index.tolist() == [0, 0, 0] and {p for p, _ in crops.unreadable} == {f"{path}/2.png", f"{path}/3.png"}


def test_a_member_beyond_the_bound_is_refused(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(three)
    monkeypatch.setattr(shards, "LARGEST_FILE", 10)
    with pytest.raises(OSError, match=f"larger than {files.LARGEST_FILE / 2**30:g} GiB"):
        source.read(0)


def test_few_files_are_open_at_a_time(three: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN", 2)
    source = open_source(three)
    for i in (0, 4, 8, 1, 5, 9):
        assert source.read(i) == folder.read(i) and len(source.opened) <= 2
    assert len(source.opened) == 2


def test_two_processes_make_one_index(three: Path) -> None:
    code = f"from fastjem.data.source import open_source; print(len(open_source({str(three)!r})))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["12\n"] * 2
    assert sorted(path.name for path in three.iterdir() if path.suffix != ".index") == ["0.tar", "1.tar", "2.tar"]
    assert len(indices(three)) == 1


MILLIONS = """
import sys
import numpy as np
from fastjem.data.sources.index import Index

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

before = resident()
index = Index.opened(sys.argv[1], [[f"{i}.tar", 1, 1] for i in range(1000)])
assert len(index) == 10_000_000 and index.name(9_876_543) == "key-0006543.jpg" and index.classes[1] == "1"
for i in np.random.default_rng(0).integers(0, 10_000_000, 10_000).tolist():
    shard, offset, size = index.place(i)
    assert (shard, offset, size) == (i // 10_000, 1024 * (i % 10_000), 7) and index.labels[i] == i % 2
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_ten_million_images_take_less_than_200_mebibytes(tmp_path: Path) -> None:
    """Names, places and labels of as many, 350 MB on the disk, of which a process holds what it reads."""
    rows, tars = 10_000, 1000
    images = rows * tars
    names = b"".join(b"key-%07d.jpg" % i for i in range(rows))
    ends = (15 * np.arange(1, rows + 1)).astype("<u4").tobytes()
    numbers = ((np.arange(images) % 2).astype("<i4"), np.full(images, 7, "<u4"), 1024 * (np.arange(images) % rows))
    at = len(names) * tars
    said = {"signature": [[f"{i}.tar", 1, 1] for i in range(tars)], "classes": ["0", "1"], "unlisted": [], "without": 0}
    said |= {"positions": [len(names) * i for i in range(tars)], "starts": [rows * i for i in range(tars + 1)]}
    said |= {"ends": at, "labels": at + 4 * images, "sizes": at + 8 * images, "offsets": at + 12 * images}
    path = tmp_path / "a.index"
    with open(path, "wb") as file:
        for part in (*[names] * tars, *[ends] * tars, *(array.tobytes() for array in numbers)):
            file.write(part)
        told = json.dumps(said).encode()
        file.write(told + len(told).to_bytes(8, "little") + index.MAGIC)
    found = subprocess.run([sys.executable, "-c", MILLIONS, str(path)], capture_output=True, text=True, timeout=60)
    path.unlink()
    assert found.returncode == 0, found.stderr
    assert 40 < float(found.stdout) < 200, f"{found.stdout} MiB"  # the labels alone are 40 MB, all of them looked at
