"""Whether a source still holds the images that it held."""

import hashlib
import os
from typing import Any

from fastjem.data.source import Source, inner, parts_of, path_of
from fastjem.data.sources.mixture import Mixture
from fastjem.data.sources.naming import split_options
from fastjem.data.spread import spread

SIZED = 1000  # files whose sizes are asked for: a file server takes a millisecond for each


def fingerprint(source: Source) -> dict[str, Any]:
    """How many images there are, a hash of all names, and one of the sizes of up to `SIZED` files spread over them; of
    a source whose images lie in few files (`files`) those files' sizes. Of a `Mixture` also the weights.

    The images themselves aren't read: 1.3 million names take about a second. Names are those below the source's root,
    so a folder may move.
    """
    count = len(source)
    given = inner(source)
    names = hashlib.sha256()
    sizes = hashlib.sha256()
    parts = given.parts if isinstance(given, Mixture) else [given]
    for part in parts:
        _hash_names(part, names)
        _hash_sizes(part, max(SIZED // len(parts), 1), sizes)
    found = {"images": count, "names": names.hexdigest()[:32], "sizes": sizes.hexdigest()[:32]}
    return found | ({"weights": [weight for _, weight in parts_of(source)]} if isinstance(given, Mixture) else {})


def _hash_names(source: Any, into: Any) -> None:
    if hasattr(source, "hash_names"):  # without a name for each of millions
        source.hash_names(into)
        return
    for i in range(len(source)):
        into.update(source.name(i).encode("utf-8", "surrogatepass") + b"\0")


def _hash_sizes(source: Any, most: int, into: Any) -> None:
    files = getattr(source, "files", None)
    if isinstance(files, list):
        for size in getattr(source, "file_sizes", None) or map(size_of, files):
            into.update(f"{size},".encode())
        return
    root = split_options(source.root)[0]
    for path in (root, *(path_of(source, i) for i in spread(len(source), most).tolist())):
        into.update(f"{size_of(path)},".encode())


def size_of(path: str) -> int:
    """In bytes; -1 for what is no file."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else -1
    except (OSError, ValueError):  # a name that no file can have
        return -1


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What has changed, in words; empty if nothing has."""
    more = now["images"] - before["images"]
    if more:
        by = f"{more} more" if more > 0 else f"{-more} fewer"
        return f"{now['images']} images, and held {before['images']} when this run began ({by})"
    if now["names"] != before["names"]:
        return f"{now['images']} images as before, but of other names"
    if now["sizes"] != before["sizes"]:
        return "the same names, but some files are larger or smaller than before"
    if now.get("weights") != before.get("weights"):
        return f"its parts by {now.get('weights')} of their images in an epoch, and by {before.get('weights')} before"
    return ""
