"""Who is near to whom: the nearest other rows of each row, and groups of rows that are nearly the same."""

import importlib.util
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.errors import UserError
from fastjem.kernels.arithmetic import unit_rows

QUERIES = 4096  # rows whose neighbours are in memory at a time
BLOCK = 2048  # rows of a block of the matrix of similarities
ROUNDING = 1e-6  # the cosine of two equal rows is 1 up to this
PAIRS = 2**20  # that are kept before their groups are made


class Group(NamedTuple):
    """Rows that are linked by a chain of pairs, each pair with a cosine of at least the threshold."""

    rows: np.ndarray  # [M] int64, ascending
    cosines: np.ndarray  # [M] float32: of each with the one of the others that is nearest to it


def unit(rows: np.ndarray) -> Tensor:
    """[N, D] of any floating dtype -> float32 of unit length; UserError where a value isn't finite."""
    x = torch.from_numpy(np.array(rows, np.float32))
    wrong = int((~torch.isfinite(x).all(1)).sum())
    if wrong:
        raise UserError(f"the embeddings of {wrong} images aren't finite: nothing is near to them")
    return unit_rows(x)[0]


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def neighbors(rows: np.ndarray, k: int, *, faiss: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(cosines [N, k] float32, rows [N, k] int64) of the k other rows nearest to each by cosine, nearest first.

    Args:
        rows: [N, D], all of them in memory as float32.
        k: at most N - 1 are found.
        faiss: search by faiss's exact index, or by `fastjem.functional.nearest_rows`, which finds the same; None: by
            faiss where it is installed.

    Raises:
        UserError: for fewer than two rows, and rows that aren't finite.
    """
    if len(rows) < 2:
        raise UserError(f"neighbours are those of at least two images, got {len(rows)}")
    k = min(k, len(rows) - 1)
    bank = unit(rows)
    index = _index(bank) if (has_faiss() if faiss is None else faiss) else None
    cosines = np.empty((len(rows), k), np.float32)
    found = np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), QUERIES):
        queries = bank[start : start + QUERIES]
        if index is None:
            near, who = (x.numpy() for x in F.nearest_rows(queries, bank, k=k + 1))
        else:
            near, who = index.search(queries.numpy(), k + 1)
        own = who == np.arange(start, start + len(queries))[:, None]
        own[~own.any(1), -1] = True  # among many that are the same a row may not find itself
        cosines[start : start + len(queries)] = near[~own].reshape(-1, k)
        found[start : start + len(queries)] = who[~own].reshape(-1, k)
    return cosines, found


def _index(bank: Tensor):  # faiss has no types
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return index


def duplicates(rows: np.ndarray, threshold: float) -> list[Group]:
    """Groups of two and more rows, in the order of their first ones, linked by cosines of at least the threshold.

    All pairs are looked at, a block of the matrix of cosines at a time: O(N^2 D) products, memory O(N D).

    Args:
        rows: [N, D], all of them in memory as float32.
        threshold: up to `ROUNDING`.

    Raises:
        UserError: for rows that aren't finite.
    """
    x = unit(rows)
    links = _Links(len(x))
    for a in range(0, len(x), BLOCK):
        for b in range(a, len(x), BLOCK):
            cosines = x[a : a + BLOCK] @ x[b : b + BLOCK].T
            near = cosines >= threshold - ROUNDING
            if a == b:
                near = near.triu(1)
            first, second = near.nonzero(as_tuple=True)
            if len(first):
                links.add((first + a).numpy(), (second + b).numpy(), cosines[first, second].numpy())
    return links.groups()


class _Links:
    """Pairs of N rows, of which a limited number is kept: the others have become groups."""

    def __init__(self, count: int):
        self.group = np.arange(count)
        self.nearest = np.full(count, -1, np.float32)
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, first: np.ndarray, second: np.ndarray, cosines: np.ndarray) -> None:
        np.maximum.at(self.nearest, first, cosines)
        np.maximum.at(self.nearest, second, cosines)
        self.pairs.append((first, second))
        if sum(len(one) for one, _ in self.pairs) > PAIRS:
            self._join()

    def _join(self) -> None:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        count = len(self.group)
        every = np.arange(count)
        first = np.concatenate([every, *(one for one, _ in self.pairs)])
        second = np.concatenate([self.group, *(other for _, other in self.pairs)])
        graph = coo_matrix((np.ones(len(first), bool), (first, second)), shape=(count, count))
        labels = connected_components(graph, directed=False)[1]
        lowest = np.full(labels.max() + 1, count)
        np.minimum.at(lowest, labels, every)
        self.group = lowest[labels]  # a group is called by its first row
        self.pairs = []

    def groups(self) -> list[Group]:
        self._join()
        order = np.argsort(self.group, kind="stable")
        starts = np.flatnonzero(np.diff(self.group[order], prepend=-1))
        parts = np.split(order, starts[1:])
        return [Group(part, self.nearest[part]) for part in parts if len(part) > 1]
