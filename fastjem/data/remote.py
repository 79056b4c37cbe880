"""Files in a store (s3://, gs://, hf://, https:// and whatever else `fsspec` opens): found, looked at and fetched.

What may pass (a connection that breaks, an answer that doesn't come, a server's error, throttling) is tried again after
ever longer pauses; what won't (there is no such file, it is refused, the disk is full) is said at once.
"""

import errno
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from fastjem.errors import UserError, first_line

T = TypeVar("T")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
LIBRARIES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp",
}  # fmt: skip
# What a store says of a file that is another one when the file is; the first that is there counts.
VERSIONS = (
    "ETag", "etag", "generation", "blob_id", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "mtime",
    "created",
)  # fmt: skip
SILENCE = 60  # seconds without a byte after which a web server is given up
THREADS = 8  # that wait for a store's answers
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
GONE, REFUSED = (404, 410), (401, 403)  # answers of web servers
PASSING = (408, 425, 429)  # and those below 500 that another time may be others


class Patience(NamedTuple):
    tries: int = 5
    pause: float = 1.0  # seconds before the second try; each further one is twice as long


PATIENCE = Patience()


@dataclass(frozen=True)
class File:
    """A file in a store as it was when it was looked at."""

    url: str
    size: int  # bytes; -1: it isn't there
    version: str
    why: str = ""  # it isn't there


class ChangedError(OSError):
    """The store has another file under this name by now."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    return SCHEME.match(os.fspath(path)) is not None


_systems: dict[tuple[int, str], Any] = {}  # by process: their connections don't survive a fork


def system(url: str) -> Any:
    """The file system of a URL, this process's own.

    Raises:
        UserError: where the library that it needs isn't installed, or there is none.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    key = os.getpid(), f"{scheme}://{rest.partition('/')[0]}"
    if key not in _systems:
        _systems[key] = _made(scheme, url)
    return _systems[key]


def _made(scheme: str, url: str) -> Any:
    library = "fsspec"
    try:
        from fsspec.core import url_to_fs

        library = LIBRARIES.get(scheme, "")
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if library == "aiohttp":
            import aiohttp  # type: ignore[import-not-found]

            # By itself it gives a file five minutes, however large it is.
            patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": patience, "trust_env": True}
        return url_to_fs(url, **options)[0]
    except ImportError as error:
        needed = f"{library}, which reads {scheme}://, isn't installed" if library else first_line(error)
        raise UserError(f"{url}: {needed}: pip install {library or 'fsspec'}, or 'fastjem[remote]'") from None
    except ValueError as error:
        raise UserError(f"{url} can't be opened: {first_line(error)}") from None


def patiently(url: str, action: Callable[[Any, str], T]) -> T:
    """`action(file system, path)`, tried again while what goes wrong may pass.

    Raises:
        OSError: with the reason in one line; FileNotFoundError and PermissionError where it is that.
    """
    for attempt in itertools.count(1):
        try:
            files = system(url)
            return action(files, files._strip_protocol(url))
        except UserError:
            raise
        except Exception as raised:  # whatever a store's library may raise
            error = _cause(raised)
            status = _status(error)
            if isinstance(error, FileNotFoundError) or status in GONE:
                raise FileNotFoundError(errno.ENOENT, "there is no such file in the store", url) from None
            if isinstance(error, PermissionError) or status in REFUSED:
                raise PermissionError(errno.EACCES, f"the store refuses it ({_line(error)})", url) from None
            if not _may_pass(error, status):
                if isinstance(error, OSError):
                    raise error from None
                raise OSError(_line(error)) from None
            if attempt >= PATIENCE.tries:
                raise OSError(f"{_line(error)} (tried {attempt} times)") from None
        time.sleep(PATIENCE.pause * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1))
    raise AssertionError


def _cause(error: Exception) -> Exception:
    """`fsspec` says of a web server's every trouble that there is no file; what it was stands behind that."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """The number of a web server's answer."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for one in (error, response):
        for name in ("status", "status_code", "code"):
            if isinstance(found := getattr(one, name, None), int) and 400 <= found < 600:
                return found
    return None


def _may_pass(error: Exception, status: int | None) -> bool:
    if status is not None:
        return status in PASSING or status >= 500
    if isinstance(error, OSError):
        local = isinstance(error, (ChangedError, IsADirectoryError, NotADirectoryError))
        return not local and error.errno not in DISK
    if "Credential" in type(error).__name__:
        return False
    # mistakes of a program's: of a library's that doesn't fit another's, say
    return not isinstance(error, (ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError))


def _line(error: Exception) -> str:
    said = getattr(error, "strerror", None) or first_line(error)
    status = _status(error)
    message = getattr(error, "message", "")
    return f"{status} {message}".strip() if status is not None and isinstance(message, str) else str(said)


def look(url: str) -> File:
    """What the store says of a file, of one that isn't there why.

    Raises:
        UserError: where the store can't be asked, or doesn't say how large the file is.
    """
    try:
        return patiently(url, lambda files, path: _said(url, files.info(path)))
    except (FileNotFoundError, PermissionError) as error:
        return File(url, -1, "", str(error.strerror))
    except OSError as error:
        raise UserError(f"{url} can't be looked at: {error.strerror or error}") from None


def look_all(urls: Sequence[str]) -> list[File]:
    """`look` at each, many at a time."""
    if not urls:
        return []
    first = look(urls[0])  # what is wrong with all of them is said once
    with ThreadPoolExecutor(THREADS) as pool:
        return [first, *pool.map(look, urls[1:])]


def _said(url: str, info: dict[str, Any]) -> File:
    size = info.get("size")
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "it is a folder", url)
    if not isinstance(size, int):
        raise UserError(f"{url}: the server doesn't say how large it is")
    version = next((info[name] for name in VERSIONS if info.get(name)), "")
    return File(url, size, str(version))


def download(file: File, to: str) -> None:
    """Write the whole file there.

    Raises:
        OSError: where it can't be had, all tries taken; `ChangedError` where it isn't what it was.
    """

    def get(files: Any, path: str) -> None:
        files.get_file(path, to)
        _check_same(file, files, path)
        came = os.path.getsize(to)
        if came != file.size:
            raise OSError(f"it came cut off, {came:,} of {file.size:,} bytes")

    patiently(file.url, get)


def check_same(file: File) -> None:
    """ChangedError where the store has another file by now."""
    patiently(file.url, lambda files, path: _check_same(file, files, path))


def _check_same(file: File, files: Any, path: str) -> None:
    files.invalidate_cache(path)
    now = _said(file.url, files.info(path))
    if (now.size, now.version) != (file.size, file.version):
        raise ChangedError(f"{file.url} has changed in the store since it was listed")


def part(file: File, start: int, stop: int) -> bytes:
    """The file's bytes from `start` to before `stop`; others from a server that knows no parts."""
    return patiently(file.url, lambda files, path: files.cat_file(path, start=start, end=stop))


def fitting(pattern: str) -> list[str]:
    """The URLs that a pattern with `*` in its last part stands for.

    Raises:
        UserError: for a store that can't be listed.
    """
    return _listed(pattern, os.path.dirname(pattern), lambda files, path: files.glob(path))


def within(folder: str) -> list[str]:
    """The URLs of what is in a folder; UserError as `fitting`."""
    return _listed(folder, folder.rstrip("/"), lambda files, path: files.ls(path, detail=False))


def _listed(url: str, home: str, action: Callable[[Any, str], Sequence[str]]) -> list[str]:
    try:
        return sorted(f"{home}/{os.path.basename(found)}" for found in patiently(url, action))
    except OSError as error:
        raise UserError(f"{url} can't be listed: {error.strerror or error}") from None
