"""Names in compressed blocks, and a folder's in the order of whole paths."""

import os
import pickle
import random
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from fastjem.data.fingerprint import fingerprint
from fastjem.data.sources.folder import Folder
from fastjem.data.sources.packed import BLOCK, Packed


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
def test_names_are_found_by_their_number(count: int) -> None:
    names = [b"a/%d\xff.jpg" % i for i in range(count)]
    packed = Packed(iter(names))
    assert len(packed) == count and list(packed) == names
    assert [packed[i] for i in range(count)] == names
    assert not count or packed[-1] == names[-1]
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            packed[i]
    assert list(pickle.loads(pickle.dumps(packed))) == names


def test_a_million_names_take_few_bytes_each() -> None:
    """Those of ImageNet's files and the like: with labels, 10 million are under 200 MB in a process."""
    draw = random.Random(0)
    names = (
        b"n%08d/n%08d_%d.JPEG" % (c, c, n) for c in range(40) for n in sorted(draw.sample(range(99999), 500), key=str)
    )
    packed = Packed(names)
    assert len(packed) == 20_000 and (packed.nbytes + 4 * len(packed)) / len(packed) < 12


def test_a_folder_has_the_order_of_whole_paths(tmp_path: Path) -> None:
    """Its number is an image's identity in a run: "a-b/1.jpg" is before "a/1.jpg", "a.jpg" between them."""
    names = [
        "a/1.jpg", "a/b/2.png", "a/b.jpg", "a-b/1.jpg", "a.jpg", "a/b-c/3.png", "Z.jpg", "ä/1.jpg", "a/.x/4.jpg",
        "z/n.txt", "a0/1.JPG", "b.png/5.gif",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    raw = os.fsencode(tmp_path) + b"/a/\xff\xfe.jpg"
    Path(os.fsdecode(raw)).touch()
    folder = Folder(tmp_path)
    kept = [name for name in names if name not in ("a/.x/4.jpg", "z/n.txt")] + [os.fsdecode(b"a/\xff\xfe.jpg")]
    expected = sorted(kept, key=os.fsencode)
    assert [folder.name(i) for i in range(len(folder))] == expected
    firsts = [name.partition("/")[0] if "/" in name else "" for name in expected]
    assert folder.classes == sorted(set(firsts)) and folder.labels is not None
    assert [folder.classes[label] for label in folder.labels] == firsts
    assert fingerprint(folder)["names"] == fingerprint(Renamed(folder))["names"]


class Renamed:
    """A folder without a way of its own to hash its names."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.root = folder.root

    def __len__(self) -> int:
        return len(self.folder)

    def name(self, i: int) -> str:
        return self.folder.name(i)
