"""Small folders of real pixels for tests: pictures of coloured shapes, different enough to be told apart."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# A run of a few steps of a second; beside it data and out are needed.
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "batch_size": 16, "workers": 0, "device": "cpu", "log_every": 1,
    "knn_every": 0, "report": False,
}  # fmt: skip
# And one whose momentum encoder lags behind after two steps.
BYOLS: dict[str, Any] = {"method": "byol", "options": {"hidden": 16}, "learning_rate": 10.0, "warmup_epochs": 0}


class Own:
    """A source of a user's own, with nothing but what a source must have: the first 32 images of another one."""

    def __init__(self, given: Any):
        self.given = given

    def __len__(self) -> int:
        return 32

    def read(self, i: int) -> bytes:
        return self.given.read(i)


def make_folder(root: Path, images: int = 48, classes: int = 3, size: int = 24, seed: int = 0, kind: str = "png"):
    """`images` files of a kind in `classes` folders (0: flat)."""
    random = np.random.default_rng(seed)
    for i in range(images):
        folder = root / f"class{i % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[:size, :size] / size
        wave = np.sin(x * (3 + 4 * (i % max(classes, 1))) + y * random.uniform(0, 9) + random.uniform(0, 6))
        pixels = (
            wave[..., None] * random.uniform(40, 120, 3)
            + random.uniform(60, 190, 3)
            + random.normal(0, 9, (size, size, 3))
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.{kind}")
    return root
