"""How `--data` names images: a path, a pattern of paths, columns behind a "?", several of them with commas between."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

import numpy as np

from fastjem.data import remote
from fastjem.data.remote import is_remote
from fastjem.errors import UserError

SEPARATOR = ","
LISTS = (".txt", ".csv", ".tsv")
COLUMNS = ("image", "label")  # that a list or a table may be told
# "?image=photo&label=kind" at the end of a path; without a comma, behind which is another path
OPTIONS = re.compile(r"\?([a-z]+=[^?&,]+(?:&[a-z]+=[^?&,]+)*)$")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
WEIGHT = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")
MOST = 1_000_000  # paths that braces may stand for


def split_options(root: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """ "a.csv?label=kind" -> ("a.csv", {"label": "kind"}); a path that is there has no options."""
    path = os.fspath(root)
    found = None if os.path.exists(path) else OPTIONS.search(path)
    if found is None:
        return path, {}
    return path[: found.start()], dict(option.split("=", 1) for option in found[1].split("&"))


def split_columns(root: str) -> tuple[str, dict[str, str]]:
    """`split_options` of a list or a table; UserError for an option that these haven't."""
    path, options = split_options(root)
    for name in options:
        if name not in COLUMNS:
            raise UserError(
                f"{path}: ?{name}= is no option of it; there are {', '.join(f'?{one}=' for one in COLUMNS)}"
            )
    return path, options


def is_pattern(path: str) -> bool:
    """Whether a path that isn't there stands for others: DIR/{000..146}.tar, DIR/{a,b}.tar, DIR/part-*.tar."""
    return not os.path.exists(path) and ("*" in os.path.basename(path) or bool(BRACES.search(path)))


def expand(path: str) -> list[str]:
    """The paths that a pattern stands for: those of braces in the order given, those of `*` sorted, hidden ones left
    out. A path that is no pattern stands for itself.

    Raises:
        UserError: for a pattern of more than `MOST` paths, or one of `*` that nothing fits.
    """
    if not is_pattern(path):
        return [path]
    paths: list[str] = []
    for one in _without_braces(path):
        paths += sorted(_without_stars(one))
        if len(paths) > MOST:
            raise UserError(f"{path} stands for more than {MOST:,} files")
    if not paths:
        raise UserError(f"there is no file {path}")
    return paths


def _without_stars(path: str) -> Iterator[str]:
    folder, name = os.path.split(path)
    if "*" not in name:
        return iter((path,))
    if is_remote(path):
        return iter(remote.fitting(path))
    return glob.iglob(os.path.join(glob.escape(folder), glob.escape(name).replace("[*]", "*")))


def _without_braces(path: str) -> Iterator[str]:
    found = BRACES.search(path)
    if found is None:
        yield path
        return
    if numbers := RANGE.fullmatch(found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= MOST:
            raise UserError(f"{path} stands for more than {MOST:,} files")
        digits = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        step = 1 if last >= first else -1
        middles = (f"{number:0{digits}}" for number in range(first, last + step, step))
    else:
        middles = iter(found[1].split(SEPARATOR))
    for middle in middles:
        yield from _without_braces(path[: found.start()] + middle + path[found.end() :])


def home(path: str) -> str:
    """The folder that a path's, or a pattern's, images are called from: DIR of DIR/a.tar and of DIR/{a,b}/*.tar."""
    folder = os.path.dirname(path)
    while is_pattern(path) and BRACES.search(folder):
        folder = os.path.dirname(folder)
    return folder


def is_list(root: str) -> bool:
    """Whether it is called as a list of paths, which may lead anywhere."""
    return split_options(root)[0].lower().endswith(LISTS)


def folder_of(root: str) -> str:
    """What a source's images lie in: a folder, or the file that has them; the folder of a list or a pattern."""
    path = split_options(root)[0]
    if is_list(root):
        return os.path.dirname(path)
    return home(path) if is_pattern(path) else path


def split(data: str) -> list[tuple[str, float | None]]:
    """ "a,b:0.3" -> [("a", None), ("b", 0.3)]. A path that is there is one, whatever is in its name."""
    pieces = [""]
    depth = 0
    for character in data:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == SEPARATOR and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth:  # no pattern: a brace of a name
        pieces = data.split(SEPARATOR)
    parts = []
    at = 0
    while at < len(pieces):
        ends = () if is_remote(pieces[at]) else range(len(pieces), at, -1)
        end = next((end for end in ends if is_there(SEPARATOR.join(pieces[at:end]))), at + 1)
        if root := SEPARATOR.join(pieces[at:end]):
            parts.append(_weighed(root))
        at = end
    return parts


def _weighed(root: str) -> tuple[str, float | None]:
    found = None if os.path.exists(root) else WEIGHT.fullmatch(root)
    return (root, None) if found is None else (found[1], float(found[2]))


def weighed(root: str, weight: float) -> str:
    """ "b" and 0.3 -> "b:0.3", which `split` takes apart to the same number."""
    return f"{root}:{np.format_float_positional(weight, trim='-')}"


def is_there(root: str) -> bool:
    """Whether one path, perhaps with a weight behind it, leads to something; of a pattern `MOST` paths count. A store
    isn't asked.
    """
    path = split_options(_weighed(root)[0])[0]
    if is_remote(path):
        return True
    if not is_pattern(path):
        return os.path.exists(path)
    try:
        named = (one for braced in itertools.islice(_without_braces(path), MOST) for one in _without_stars(braced))
        return any(map(os.path.exists, named))
    except UserError:
        return False


def exists(data: str) -> bool:
    """Whether everything that `--data` names is there."""
    parts = split(data)
    return bool(parts) and all(is_there(root) for root, _ in parts)


def absolute(data: str) -> str:
    """The same images named from any folder; a name that isn't a path may be made to one that isn't there."""
    parts = ((root if is_remote(root) else os.path.abspath(root), weight) for root, weight in split(data))
    return SEPARATOR.join(root if weight is None else weighed(root, weight) for root, weight in parts)


def beside(data: str, name: str) -> str | None:
    """Of "photos/train.csv?label=kind" and "test" "photos/test.csv?label=kind"; None of what isn't called "train", and
    of what is in a store."""
    if len(parts := split(data)) != 1 or parts[0][1] is not None or is_remote(data):
        return None
    path, _ = split_options(data)
    folder, base = os.path.split(os.path.normpath(path))
    stem, ending = os.path.splitext(base)
    return os.path.join(folder, name + ending) + data[len(path) :] if stem == "train" else None
