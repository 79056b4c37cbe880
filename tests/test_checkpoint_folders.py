"""Checkpoints in folders, of models in shards, among those in files: whole at any moment, damage named, no stranger's
pickle opened."""

import contextlib
import errno
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastjem import checkpoints, sharded_checkpoints
from fastjem.errors import UserError
from fastjem.ranks import Ranks

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def state_of(step: int, mesh: Any = None) -> dict[str, Any]:
    """Of a step, all of whose numbers are the step's; in shards on a mesh."""

    def tensor(*shape: int) -> torch.Tensor:
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = torch.full(shape, float(step))
        return whole if mesh is None else distribute_tensor(whole, mesh, [Shard(0)])

    model = {"weight": tensor(40, 30), "scale": torch.tensor(float(step))}
    momenta = {0: {"exp_avg": tensor(40, 30), "step": torch.tensor(float(step))}}
    return {"step": step, "model": model, "optimizer": {"state": momenta, "param_groups": []}, "defaults": {}}


def save(run: Path, step: int, mesh: Any, keep: int = 2) -> str | None:
    if mesh is not None:
        return checkpoints.save_in_shards(run, state_of(step, mesh), keep, RANKS)
    checkpoints.keep_earlier(run, keep)
    return checkpoints.save(run, state_of(step))


def is_of(state: dict[str, Any] | None, step: int) -> bool:
    expected = state_of(step)
    assert state is not None and state["model"].keys() == expected["model"].keys()
    tensors = [*state["model"].values(), *state["optimizer"]["state"][0].values()]
    return state["step"] == step and all((x == step).all() for x in tensors)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("kinds", ["ssssss", "swswsw", "sswwss"])  # in shards, whole
def test_the_last_ones_are_kept_whatever_they_are(kinds: str, keep: int, mesh: Any, tmp_path: Path) -> None:
    for step, kind in enumerate(kinds):
        assert save(tmp_path, step, mesh if kind == "s" else None, keep) is None
        there = checkpoints.present(tmp_path)
        assert len(there) == min(keep, step + 1)
        for i, path in enumerate(there):
            assert is_of(checkpoints.read(path), step - i)
            assert path.suffix == ("" if kinds[step - i] == "s" else ".pt")
            assert path == checkpoints.earlier(tmp_path, i)
        assert not list(tmp_path.rglob("*.part"))
    checkpoints.keep_earlier(tmp_path, 1)
    assert len(checkpoints.present(tmp_path)) == 1


class Died(BaseException):
    """What a kill is, to whoever would clean up."""


def dies_at(moment: int, work: Callable[[], object]) -> bool:
    """Run it, and from that call of the file system on let no further one do anything; whether it came so far."""
    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "replace", "rename", "link", "unlink", "rmdir", "fsync", "open"):
            usual = getattr(os, name)

            def counted(*args: Any, _usual: Any = usual, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= moment:
                    raise Died
                return _usual(*args, **options)

            patch.setattr(os, name, counted)
        with contextlib.suppress(Died):
            work()
    return calls >= moment


@pytest.mark.parametrize(
    ("kinds", "keep"),
    [("ss", 1), ("ws", 1), ("sw", 2), *(pytest.param(*one, marks=pytest.mark.exhaustive) for one in
     (("ss", 2), ("ws", 2), ("sw", 1)))],
)  # fmt: skip
def test_killed_at_any_moment_a_whole_checkpoint_is_found(kinds: str, keep: int, mesh: Any, tmp_path: Path) -> None:
    before, now = (mesh if kind == "s" else None for kind in kinds)
    found = []
    for moment in range(1, 100):
        run = tmp_path / str(moment)
        save(run, 1, before, keep)
        save(run, 2, before, keep)
        killed = dies_at(moment, lambda run=run: save(run, 3, now, keep))
        state = checkpoints.load(run, pytest.fail)
        found.append(state["step"] if state else None)
        assert state is not None and is_of(state, state["step"]), moment
        checkpoints.clean(run)
        assert not list(run.rglob("*.part"))
        assert save(run, 4, now, keep) is None
        assert is_of(checkpoints.load(run, pytest.fail), 4)
        assert len(checkpoints.present(run)) == keep
        if not killed:
            break
    assert set(found) == {2, 3} and found == sorted(found) and len(found) > 5


@pytest.mark.parametrize("when", ["first", "table", "flush", "state"])
def test_a_full_disk_leaves_what_there_was(
    when: str, mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step, mesh)

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if when in ("first", "table"):
            opened = open

            class Full:
                def __init__(self, file: Any):
                    self.file = file

                def __getattr__(self, name: str) -> Any:
                    return getattr(self.file, name)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    self.file.close()

                write = full

            def opening(path: Any, mode: str = "r", *args: Any) -> Any:
                is_it = str(path).endswith("distcp" if when == "first" else ".tmp") and "w" in mode
                return Full(opened(path, mode, *args)) if is_it else opened(path, mode, *args)

            patch.setattr(sharded_checkpoints, "open", opening, raising=False)
        elif when == "flush":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(checkpoints, "write_atomically", full)
        problem = save(tmp_path, 3, mesh)
    assert problem == "the checkpoint at step 3 could not be written (No space left on device)"
    assert not list(tmp_path.rglob("*.part"))
    assert [checkpoints.read(path)["step"] for path in checkpoints.present(tmp_path)] == [2, 1]
    assert save(tmp_path, 3, mesh) is None and is_of(checkpoints.load(tmp_path), 3)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FASTJEM_EVIL"],)


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an empty state": ("state.pt", lambda good: b""),
    "a cut state": ("state.pt", lambda good: good[: len(good) // 2]),
    "a pickle for a state": ("state.pt", lambda good: pickle.dumps(Evil())),
    "a cut file": ("__0_0.distcp", lambda good: good[:-1]),
    "an empty file": ("__0_0.distcp", lambda good: b""),
    "other bytes": ("__0_0.distcp", lambda good: good[:3000] + bytes(255 - x for x in good[3000:3008]) + good[3008:]),
    "a pickle": (".metadata", lambda good: pickle.dumps(Evil())),
    "a pickle of the same length": (".metadata", lambda good: pickle.dumps(Evil()).ljust(len(good), b"\0")),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "no state", "no file", "no table"])
def test_damage_is_named_by_its_file_and_the_one_before_is_taken(
    damage: str, mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTJEM_EVIL", str(tmp_path / "evil"))
    for step in (1, 2, 3):
        save(tmp_path, step, mesh)
    last, before = checkpoints.present(tmp_path)
    if damage in DAMAGES:
        name, change = DAMAGES[damage]
        content = change((last / name).read_bytes())
    else:
        name, content = {"no state": "state.pt", "no file": "__0_0.distcp", "no table": ".metadata"}[damage], None
    (last / name).unlink()
    if content is not None:
        (last / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoints.read(last)
    assert name in str(error.value) and str(last) in str(error.value) and "\n" not in str(error.value)
    said: list[str] = []
    assert is_of(checkpoints.load(tmp_path, said.append, set_aside=True), 2)
    assert len(said) == 1 and name in said[0] and "last-1 is taken, of step 2" in said[0]
    assert not last.exists() and (last.parent / "last.damaged").is_dir()
    assert not (tmp_path / "evil").exists()
    assert before.exists() and save(tmp_path, 4, mesh) is None and is_of(checkpoints.load(tmp_path, None), 4)


def test_a_strangers_folder_is_held_to_what_a_checkpoint_can_be(
    mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker has made the checksums right: no pickle is opened, nothing is read beside it, and nothing is made room
    for that isn't there."""
    monkeypatch.setenv("FASTJEM_EVIL", str(tmp_path / "evil"))
    save(tmp_path, 1, mesh)
    (last,) = checkpoints.present(tmp_path)
    good = torch.load(last / "state.pt", weights_only=True)
    shards = good["shards"]

    def changed(**changes: Any) -> None:
        torch.save({**good, **changes}, last / "state.pt")

    key = "model.weight"
    (chunk,) = shards["chunks"][key]
    wrong = {
        "elsewhere": {**shards, "files": {**shards["files"], "../../secret": [1, 1]}},
        "no such file": {**shards, "chunks": {**shards["chunks"], key: [[*chunk[:2], "other", *chunk[3:]]]}},
        "past the end": {**shards, "chunks": {**shards["chunks"], key: [[*chunk[:3], 10**9, chunk[4]]]}},
        "a part": {**shards, "chunks": {**shards["chunks"], key: [[[0, 0], [4, 30], *chunk[2:]]]}},
        "outside": {**shards, "chunks": {**shards["chunks"], key: [[[1, 0], *chunk[1:]]]}},
        "none": {**shards, "chunks": {}},
        "text": "shards",
    }
    for name, found in wrong.items():
        changed(shards=found)
        with pytest.raises(UserError, match=r"state.pt is no checkpoint of fastjem's: what it says of its shards"):
            pytest.fail(name) if checkpoints.read(last) else None
    changed(model={**good["model"], "weight": torch.empty(2**40, 2**10, device="meta")})
    with pytest.raises(UserError, match="what it says of its shards"):
        checkpoints.read(last)
    for name in (".metadata", "__0_0.distcp"):
        path = last / name
        content = path.read_bytes()
        evil = pickle.dumps(Evil()).ljust(len(content), b"\0")
        path.write_bytes(evil)
        files = {**shards["files"], name: [len(evil), sharded_checkpoints.checksum_of(path)]}
        changed(shards={**shards, "files": files})
        if name == ".metadata":
            assert is_of(checkpoints.read(last), 1)  # it isn't opened at all
        else:
            with pytest.raises(UserError, match="its shards can't be read"):
                checkpoints.read(last)
        path.write_bytes(content)
    assert not (tmp_path / "evil").exists()


def test_the_best_is_a_second_name_and_stays(mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, None)
    assert checkpoints.best(tmp_path) is None and checkpoints.keep_best(tmp_path) is None
    best = checkpoints.best(tmp_path)
    assert (
        best is not None and best == tmp_path / checkpoints.BEST and os.path.samefile(best, tmp_path / checkpoints.LAST)
    )
    for step, of in ((2, mesh), (3, mesh), (4, None)):
        save(tmp_path, step, of, keep=1)
        assert is_of(checkpoints.read(checkpoints.best(tmp_path) or best), 1)
    save(tmp_path, 5, mesh)
    for step in (5, 6):
        save(tmp_path, step, mesh)
        assert checkpoints.keep_best(tmp_path) is None
        best = checkpoints.best(tmp_path)
        assert best is not None and best == tmp_path / "checkpoints/best" and is_of(checkpoints.read(best), step)
    assert os.path.samefile(best / "state.pt", tmp_path / "checkpoints/last/state.pt")
    assert not (tmp_path / checkpoints.BEST).exists()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    for step, of in ((7, mesh), (8, None), (9, mesh)):
        save(tmp_path, step, of)
        assert checkpoints.keep_best(tmp_path) is None
        save(tmp_path, step + 10, of)
        found = checkpoints.best(tmp_path)
        assert found and is_of(checkpoints.read(found), step)
    shutil.rmtree(tmp_path / "checkpoints")
    assert "best.pt could not be written" in (checkpoints.keep_best(tmp_path) or "")
