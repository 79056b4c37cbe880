"""What tar files in a store hold: each is fetched once to be listed, and its list is kept when its copy goes."""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastjem.data import cache
from fastjem.data.copies import FETCHING, Copies, gigabytes
from fastjem.data.remote import File
from fastjem.data.sources.tar import Listed, list_tar
from fastjem.errors import UserError
from fastjem.printing import say
from fastjem.reading import why_not

VERSION = 1  # of the lists that are kept
LIST = ".listed"
PAUSE = 30.0  # seconds between two lines about how far it is


def listed_all(copies: Copies, root: str) -> Iterator[Listed]:
    """What is in each file, in their order. A pass that is broken off goes on where it was.

    Args:
        root: what the user named, for messages.

    Raises:
        UserError: for a file that can't be fetched.
    """
    count = len(copies.files)
    at_a_time = min(max(copies.budget // max(copies.largest, 1), 1), FETCHING)
    told = time.monotonic()
    new = [file.size for file in copies.files if file.size >= 0 and not os.path.exists(_place(copies, file))]
    say(f"fastjem: {root}: {len(new)} files, {gigabytes(sum(new))}, are fetched to be listed, once")
    with ThreadPoolExecutor(at_a_time) as pool:
        for number, found in enumerate(pool.map(lambda number: _listed(copies, number), range(count))):
            if time.monotonic() - told > PAUSE:
                say(f"fastjem: {root}: {number} of {count} files are listed")
                told = time.monotonic()
            yield found


def _listed(copies: Copies, number: int) -> Listed:
    file = copies.files[number]
    if file.size < 0:
        return Listed(unlisted=[("", file.why)])
    place = _place(copies, file)
    try:
        with open(place, "rb") as kept:
            return _read(kept.read())
    except (OSError, ValueError, KeyError, TypeError, zlib.error):  # there is none, or a broken one
        pass
    try:
        opened = copies.open(number)
    except OSError as error:
        raise UserError(f"{file.url} can't be read: {why_not(error)}") from None
    found = list_tar(file.url, lambda _: opened)
    try:
        with cache.written(place) as kept:
            kept.write(_written(found))
    except OSError:  # no room: it is listed anew the next time
        pass
    return found


def _place(copies: Copies, file: File) -> str:
    """Where the list of a file is, if there is one."""
    key = f"{VERSION}\0{file.url}\0{file.size}\0{file.version}".encode("utf-8", "surrogatepass")
    return os.path.join(copies.folder, hashlib.sha256(key).hexdigest()[:24] + LIST)


def _written(found: Listed) -> bytes:
    names = [name.decode("utf-8", "surrogateescape") for name in found.names]
    said = [names, found.offsets.tolist(), found.sizes.tolist(), found.labels, found.without, found.unlisted]
    return zlib.compress(json.dumps(said).encode(), 1)


def _read(content: bytes) -> Listed:
    names, offsets, sizes, labels, without, unlisted = json.loads(zlib.decompress(content))
    if not len(names) == len(offsets) == len(sizes) == len(labels):
        raise ValueError("no list")
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    reasons = [(str(what), str(why)) for what, why in unlisted]
    return Listed(encoded, np.array(offsets, np.uint64), np.array(sizes, np.uint32), labels, int(without), reasons)
