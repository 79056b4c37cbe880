"""Checkpoints of a model in shards (FSDP2's DTensors): a folder that all ranks write at once by
`torch.distributed.checkpoint` (DCP), each its own shards, and that any number of ranks, or one process, reads again.

The folder holds DCP's files, `__0_0.distcp` of the first rank and so on, and `state.pt`: what a checkpoint that is one
file has, with an outline (a tensor on the meta device) in the place of each tensor in shards, and where its chunks lie,
and the sizes and checksums of DCP's files. DCP's own table of contents, `.metadata`, is a pickle, which runs the code
of whoever wrote it: it is written for other readers of DCP, and never opened here.
"""

import contextlib
import io
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastjem.errors import UserError
from fastjem.functional.shards import is_distributed, local
from fastjem.ranks import Ranks
from fastjem.reading import why_not

STATE = "state.pt"
SHARDS = "shards"  # the key of the state where its shards are described
NAME = re.compile(r"__\d+_\d+\.distcp|\.metadata")  # of DCP's files
OWN = re.compile(rf"{NAME.pattern}|\.metadata\.tmp|{re.escape(STATE)}(\.[0-9a-f]{{16}}\.part)?")
AT_ONCE = 2**24  # bytes that are read for a checksum


class Unreadable(UserError):
    """A file of a checkpoint that can't be read, by its name."""


def places(state: Mapping[str, Any]) -> Iterator[tuple[str, dict, Any]]:
    """(name in DCP, dict, key) of every tensor of a checkpoint's model and optimizer."""
    for name in state["model"]:
        yield f"model.{name}", state["model"], name
    for number, values in state["optimizer"].get("state", {}).items():
        for name in values:
            yield f"optimizer.{number}.{name}", values, name


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state in dicts of its own, where tensors can be replaced."""
    optimizer = dict(state["optimizer"])
    if "state" in optimizer:
        optimizer["state"] = {number: dict(values) for number, values in optimizer["state"].items()}
    return {**state, "model": dict(state["model"]), "optimizer": optimizer}


def write(folder: Path, state: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], str | None]:
    """DCP's files in a folder that is there; a collective call.

    Returns:
        What `state.pt` has to hold, and what went wrong on any rank, in words.
    """
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.api import CheckpointException

    state = copied(state)
    shards: dict[str, Tensor] = {}
    for key, held, name in places(state):
        if isinstance(held[name], Tensor) and is_distributed(held[name]):
            shards[key] = held[name]
            held[name] = torch.empty(shards[key].shape, dtype=shards[key].dtype, device="meta")
    writer = _writer(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            save(shards, storage_writer=writer, process_group=ranks.control, no_dist=ranks.control is None)
    except CheckpointException as error:  # on all ranks, with what each of them had
        rank, (found, _) = min(error.failures.items())
        reason = why_not(found) if isinstance(found, OSError) else f"{type(found).__name__}: {found}"
        return state, reason if ranks.size == 1 else f"rank {rank}: {reason}"
    files = writer.fs.written
    if ranks.control is not None:
        of_ranks: list[Any] | None = [None] * ranks.size if ranks.first else None
        dist.gather_object(files, of_ranks, dst=0, group=ranks.control)
        files = {name: found for one in of_ranks or [] for name, found in one.items()}
    state[SHARDS] = {"files": files, "chunks": writer.chunks}
    return state, None


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Files(FileSystem):
        """Files whose sizes and checksums are kept, by name."""

        def __init__(self) -> None:
            self.written: dict[str, list[int]] = {}

        @contextlib.contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
            with open(path, mode) as file:
                stream = Stream(file)
                yield stream
                stream.close()
            self.written[Path(path).name] = [stream.size, stream.checksum]

        def rename(self, path: Any, new_path: Any) -> None:
            super().rename(path, new_path)
            self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    class Writer(FileSystemWriter):
        def __init__(self) -> None:
            super().__init__(folder)
            self.fs = Files()
            self.chunks: dict[str, list[list[Any]]] = {}  # on the first rank, once all have written

        def storage_meta(self) -> None:
            """Not the path of the folder, which gets another name."""

        def finish(self, metadata: Any, results: Any) -> None:
            super().finish(metadata, results)
            sizes = {
                (name, chunk.offsets): list(chunk.sizes)
                for name, tensor in metadata.state_dict_metadata.items()
                for chunk in tensor.chunks
            }
            for result in (one for of_rank in results for one in of_rank):
                name, offsets, where = result.index.fqn, result.index.offset, result.storage_data
                chunk = [list(offsets), sizes[name, offsets], where.relative_path, where.offset, where.length]
                self.chunks.setdefault(name, []).append(chunk)

    return Writer()


class Stream(io.RawIOBase):
    """A file that is written to from its beginning to its end. An error is raised once it is closed: torch's writer
    calls `write` from C++, which a full disk must not end.
    """

    def __init__(self, file: Any):
        self.file = file
        self.size = 0
        self.checksum = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        if self.error is None:
            try:
                self.file.write(view)
            except OSError as error:
                self.error = error
        self.checksum = zlib.crc32(view, self.checksum)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        """Asked for to flush what was written to the disk."""
        self.close()
        return self.file.fileno()

    def close(self) -> None:
        if self.error is None:
            self.file.flush()
        else:
            raise self.error


def check(folder: Path, state: dict[str, Any], *, checksums: bool) -> None:
    """UserError that names the file where one of DCP's isn't as `state.pt` says, or `state.pt` can't be true.

    checksums: of the files' bytes, too.
    """
    wrong = UserError(f"{folder / STATE} is no checkpoint of fastjem's: what it says of its shards can't be")
    try:
        files = {str(name): (int(size), int(checksum)) for name, (size, checksum) in state[SHARDS]["files"].items()}
        if not all(NAME.fullmatch(name) for name in files):
            raise wrong
        _check_chunks(state, {name: size for name, (size, _) in files.items()})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise wrong from None
    for name, (size, checksum) in sorted(files.items()):
        path = folder / name
        try:
            if not path.is_file():
                raise UserError(f"{path} is no part of a checkpoint: there is no such file")
            found = path.stat().st_size
            if found != size:
                raise UserError(f"{path} is no part of its checkpoint: it has {found:,} bytes in place of {size:,}")
            if checksums and checksum_of(path) != checksum:
                raise UserError(f"{path} is no part of its checkpoint: it is damaged, or of another one")
        except OSError as error:
            raise UserError(f"{path} can't be read: {why_not(error)}") from None


def _check_chunks(state: dict[str, Any], sizes: dict[str, int]) -> None:
    """ValueError where the chunks aren't all of each outline: nothing is made room for that the files don't hold."""
    chunks = state[SHARDS]["chunks"]
    outlines = {key: held[name] for key, held, name in places(state) if is_outline(held[name])}
    if outlines.keys() != chunks.keys():
        raise ValueError
    for key, outline in outlines.items():
        elements = 0
        for offsets, shape, file, offset, length in chunks[key]:
            inside = all(0 <= at <= at + n <= of for at, n, of in zip(offsets, shape, outline.shape, strict=True))
            fits = 0 <= offset <= offset + length <= sizes[file] and math.prod(shape) * outline.itemsize <= length
            if not (inside and fits):
                raise ValueError
            elements += math.prod(shape)
        if elements != outline.numel():
            raise ValueError


def is_outline(value: object) -> bool:
    """Whether it stands for a tensor that lies in shards."""
    return isinstance(value, Tensor) and value.is_meta


def checksum_of(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while content := file.read(AT_ONCE):
            found = zlib.crc32(content, found)
    return found


def filled(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A state that `check` has found right, with all tensors whole."""
    state = copied(state)
    targets: dict[str, Tensor] = {}
    for key, held, name in places(state):
        if is_outline(held[name]):
            held[name] = targets[key] = torch.empty_like(held[name], device="cpu")
    _read(folder, state.pop(SHARDS)["chunks"], targets)
    return state


def fitted(state: dict[str, Any], step: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state, whole or of `state.pt` with its folder, as these modules take it: a rank's own shards of what is in
    shards here, read from the disk without the others; and whole tensors of the rest.

    Raises:
        Unreadable: where a file can't be read.
        ValueError: where what lies in shards there has another shape here.
    """
    state = copied(state)
    saved = state.pop(SHARDS, None)
    here: dict[str, Tensor] = {f"model.{name}": value for name, value in step.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets: dict[str, Tensor] = {}
    for key, held, name in places(state):
        value = held[name]
        if not isinstance(value, Tensor):
            continue
        alike = here.get(key)
        if key.startswith("optimizer."):
            number = int(key.split(".")[1])
            alike = parameters[number] if number < len(parameters) else None
        in_shards = alike is not None and is_distributed(alike)
        if is_outline(value) and (alike is None or alike.shape != value.shape):
            came = "nothing" if alike is None else str(tuple(alike.shape))
            raise ValueError(f"{key} is {tuple(value.shape)} in it, and {came} here")
        if is_outline(value):
            empty = torch.empty_like(alike.detach(), dtype=value.dtype) if in_shards else None  # type: ignore[union-attr]
            held[name] = targets[key] = torch.empty_like(value, device="cpu") if empty is None else empty
        elif in_shards and value.shape == alike.shape:  # type: ignore[union-attr]
            held[name] = _shard_of(value, alike)
    if saved is not None:
        _read(Path(saved["folder"]), saved["chunks"], targets)
    return state


def _shard_of(whole: Tensor, alike: Any) -> Tensor:
    """What this rank has of a tensor that is in shards as `alike` is; without a word to the other ranks."""
    shards = torch.empty_like(alike.detach(), dtype=whole.dtype)
    own = local(shards)
    if own.numel():
        (chunk,) = alike.__create_chunk_list__()
        rows = (slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))
        own.copy_(whole[tuple(rows)])
    return shards


def _read(folder: Path, chunks: dict[str, list[list[Any]]], targets: dict[str, Tensor]) -> None:
    """Fill the targets, whole tensors or DTensors, from DCP's files; each process by itself."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )  # fmt: skip

    if not targets:
        return
    tensors: dict[str, Any] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    for key, target in targets.items():
        found = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, *_ in chunks[key]]
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=target.dtype), target.shape, found)
        for offsets, _, file, offset, length in chunks[key]:
            where[MetadataIndex(key, offsets)] = _StorageInfo(file, offset, length)
    metadata = Metadata(tensors, storage_data=where)

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            return metadata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is read by one process
            load(dict(targets), storage_reader=Reader(folder), no_dist=True)
    except MemoryError:
        raise
    except BaseException as error:  # DCP's is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise Unreadable(f"{folder} is no checkpoint of fastjem's: its shards can't be read") from None


def linked(folder: Path, copy: Path) -> None:
    """The same checkpoint in another folder, which holds links to its files; OSError where there can be none."""
    copy.mkdir()
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) or path.name == STATE:
            os.link(path, copy / path.name)


def remove(folder: Path) -> None:
    """Remove the files of a checkpoint, and their folder, which stays where it holds anything else."""
    for path in folder.iterdir():
        if OWN.fullmatch(path.name):
            path.unlink()
    folder.rmdir()


__all__ = [
    "SHARDS", "STATE", "check", "filled", "fitted", "is_outline", "linked", "remove", "write",
]  # fmt: skip
