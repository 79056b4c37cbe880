"""Whether a source still holds the images that it held."""

import hashlib
import os
from typing import Any

from fastjem.data.source import Source, path_of

SIZED = 1000  # files whose sizes are asked for: a file server takes a millisecond for each


def fingerprint(source: Source) -> dict[str, Any]:
    """How many images there are, a hash of all names, and one of the sizes of up to `SIZED` files spread over them.

    The images themselves aren't read: 1.3 million names take about a second. Names are those below the source's root,
    so a folder may move.
    """
    count = len(source)
    names = hashlib.sha256()
    for i in range(count):
        names.update(source.name(i).encode("utf-8", "surrogatepass") + b"\0")
    sizes = hashlib.sha256()
    some = min(count, SIZED)
    for path in (source.root, *(path_of(source, i * count // some) for i in range(some))):
        sizes.update(f"{size_of(path)},".encode())
    return {"images": count, "names": names.hexdigest()[:32], "sizes": sizes.hexdigest()[:32]}


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
    return ""
