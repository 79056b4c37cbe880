"""A run's folder, read."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.data.levels import Levels
from fastjem.data.pixels import Pixels
from fastjem.errors import UserError
from fastjem.methods import METHODS, Method


@dataclass(frozen=True)
class Embeddings:
    """Some images' embeddings at one step of the run."""

    step: int
    rows: np.ndarray  # [N, D] float32, of length one
    indices: list[int]  # N positions in the data
    files: list[str]  # N paths below `root`
    root: str
    labels: np.ndarray  # [N] index of the class
    classes: list[str]
    images: int  # in the folder, of which these are N
    labelled: bool  # False: a flat folder; the one class has no name
    levels: Levels | None = None  # how the run reads its images


@dataclass(frozen=True)
class Run:
    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    knn: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    embeddings: Embeddings | None = None

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def method(self) -> type[Method] | None:
        """None for one that isn't ours."""
        return METHODS.get(self.config.get("method", ""))

    @property
    def has_teacher(self) -> bool:
        return bool(self.config.get("momentum_encoder") or (self.method and self.method.momentum))

    @property
    def steps_per_epoch(self) -> int:
        return self.environment.get("steps_per_epoch", 0)


def read(path: str | os.PathLike[str]) -> Run:
    """The run in that folder, finished or not.

    Raises:
        UserError: there is no run, or its configuration can't be read.
    """
    path = Path(path)
    try:
        config = json.loads((path / "config.yaml").read_text())
    except OSError:
        raise UserError(f"there is no run in {path}: it has no config.yaml") from None
    except ValueError as error:
        raise UserError(f"{path / 'config.yaml'} can't be read: {error}") from None
    environment: dict = {}
    if (path / "environment.json").exists():
        environment = json.loads((path / "environment.json").read_text())
    return Run(
        path.resolve(),
        config,
        json_lines(path / "metrics.jsonl"),
        json_lines(path / "knn.jsonl"),
        environment,
        read_embeddings(
            path / "embeddings.npz", Pixels.from_dict(config["pixels"]).levels if "pixels" in config else None
        ),
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects; a line that a kill cut in two is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def read_embeddings(path: Path, levels: Levels | None = None) -> Embeddings | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return Embeddings(
            step=int(file["step"]),
            rows=file["rows"].astype(np.float32),
            indices=file["indices"].tolist(),
            files=file["files"].tolist(),
            root=str(file["root"]),
            labels=file["labels"],
            classes=file["classes"].tolist(),
            images=int(file["images"]),
            labelled=bool(file["labelled"]),
            levels=levels,
        )


def spread(size: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `size`, evenly."""
    most = min(size, most)
    return np.arange(most) * size // max(most, 1)
