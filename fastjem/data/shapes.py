"""The embedded data set: ten shapes in class folders, made once, for trying things out without data of one's own.

Colour, polarity, texture, pose, size, place, lighting, clutter and background vary freely and say nothing about the
class, so that pixels compared with pixels find little more than chance.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fastjem.data import cache
from fastjem.errors import UserError
from fastjem.printing import say

SIZE = 64
COUNTS = {"train": 4000, "test": 1000}
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _radial(edge: Callable[[np.ndarray], np.ndarray]) -> Shape:
    return lambda u, v: edge(np.arctan2(u, v)) - np.hypot(u, v)


def _box(u: np.ndarray, v: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.minimum(width - abs(u), height - abs(v))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(0.5 - v, 0.5 + 0.5 * v - 0.866 * abs(u))


# A shape is a function of its own coordinates, -1 to 1, v downwards: about the distance to its edge, positive inside.
SHAPES: dict[str, Shape] = {
    "arrow": lambda u, v: np.maximum(_box(u, v - 0.35, 0.22, 0.65), np.minimum(-v, 0.75 * (1 + v) - 0.75 * abs(u))),
    "bowtie": lambda u, v: np.minimum(0.95 - abs(u), 0.7 * (abs(u) + 0.12 - abs(v))),
    "clover": _radial(lambda angle: 0.62 + 0.36 * np.cos(3 * angle)),
    "crescent": lambda u, v: np.minimum(1 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.8),
    "cross": lambda u, v: np.maximum(_box(u, v, 0.28, 1), _box(u, v, 1, 0.28)),
    "disk": lambda u, v: 0.9 - np.hypot(u, v),
    "ring": lambda u, v: 0.2 - abs(np.hypot(u, v) - 0.75),
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "star": _radial(lambda angle: 0.45 + 0.55 * (2 * abs((angle / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) - 1) ** 2),
    "triangle": lambda u, v: _triangle(u, v) * 1.2,
}


def picture(name: str, random: np.random.Generator) -> np.ndarray:
    """[64, 64, 3] uint8: a loose grid of the named shape, each in a colour of its own, over any background.

    Many of them, so that a crop shows one too, and colours differ within a picture: the shape is what crops share.
    """
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE * 2 - 1
    background = random.uniform(0.2, 0.8, 3)
    image = background + _texture(x, y, random)[..., None] * random.uniform(-0.15, 0.15, 3)
    for _ in range(random.integers(0, 4)):
        _add_stroke(image, x, y, random)
    _add_shapes(image, x, y, name, background, random)
    light = 1 + random.uniform(-0.3, 0.3) * x + random.uniform(-0.3, 0.3) * y
    image = image * light[..., None] + random.normal(0, random.uniform(0, 0.05), image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _add_stroke(image: np.ndarray, x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> None:
    """A straight line across the picture: clutter."""
    angle = random.uniform(0, np.pi)
    shift = random.uniform(-1, 1)
    half_width = random.uniform(0.01, 0.05)
    stroke = _ink(half_width - abs(np.cos(angle) * x + np.sin(angle) * y - shift))
    image += stroke * random.uniform(-0.35, 0.35, 3)


def _add_shapes(
    image: np.ndarray, x: np.ndarray, y: np.ndarray, name: str, background: np.ndarray, random: np.random.Generator
) -> None:
    """The grid of shapes, each a little beside its place, of its own size, turn, stretch and colour."""
    cell = random.uniform(0.7, 0.95)
    shift = random.uniform(0, cell, 2)
    slant = random.uniform(-0.5, 0.5)
    for i in range(-1, 4):
        for j in range(-1, 4):
            centre = np.array([j + slant * i, i]) * cell - 1 + shift + random.uniform(-0.12, 0.12, 2) * cell
            radius = cell * random.uniform(0.34, 0.48)
            turn = random.normal(0, 0.3)
            stretch = random.uniform(0.87, 1.15)
            if abs(centre).max() > 1 + radius:
                continue
            near = _touched(centre, radius)
            dx = x[near]
            dy = y[near]
            u = (dx - centre[0]) * stretch
            v = (dy - centre[1]) / stretch
            cos = np.cos(turn) / radius
            sin = np.sin(turn) / radius
            inside = _ink(SHAPES[name](cos * u + sin * v, cos * v - sin * u) * radius)
            colour = _against(background, random)
            fill = colour + _texture(dx, dy, random)[..., None] * random.uniform(-0.1, 0.1, 3)
            image[near] = image[near] * (1 - inside) + fill * inside


def _touched(centre: np.ndarray, radius: float) -> tuple[slice, ...]:
    """Rows and columns of the picture that a shape can touch."""
    reach = 1.6 * radius  # a corner, stretched
    edges = [((centre[axis] + [1 - reach, 1 + reach]) * SIZE / 2).clip(0, SIZE).astype(int) for axis in (1, 0)]
    return tuple(slice(*edge) for edge in edges)


def _ink(distance: np.ndarray) -> np.ndarray:
    """Distance to the edge -> [H, W, 1] share of the pixel that is covered."""
    return (distance * SIZE / 2 + 0.5).clip(0, 1)[..., None]


def _against(background: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A colour, lighter or darker, that can be told from the background in grey too."""
    while True:
        front = random.uniform(0, 1, 3)
        if abs((front - background) @ (0.3, 0.59, 0.11)) > 0.3:
            return front


def _texture(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Waves in two directions, from a slow gradient to fine stripes, sometimes their product: checks."""
    waves = []
    for _ in range(2):
        angle = random.uniform(0, np.pi)
        frequency = np.exp(random.uniform(0, 3))
        phase = random.uniform(0, 6.3)
        waves.append(np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase))
    return waves[0] * waves[1] if random.random() < 0.5 else (waves[0] + waves[1]) / 2


def folder() -> Path:
    """The folder that holds `train` and `test`, in the cache; made first if it isn't there (seconds).

    Its name tells the code that made it, so that a change makes another; it appears whole or not at all.

    Raises:
        UserError: where it isn't there and nothing can be written.
    """
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
    try:
        done = cache.folder() / f"shapes-{key}"
        if not done.is_dir():
            say(f"fastjem: making the embedded data set in {done}")
            _make(done)
    except (OSError, RuntimeError) as error:  # the latter of an account without a home
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"no data is named, and the embedded data set can't be written ({why}): XDG_CACHE_HOME says where it may be"
        ) from None
    return done


def _make(done: Path) -> None:
    done.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{done.name}-", dir=done.parent))
    try:
        write(part)
        os.chmod(part, 0o755)  # mkdtemp's is for its owner alone
        os.rename(part, done)
    except OSError:
        if not done.is_dir():  # no other process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(root: Path, counts: dict[str, int] = COUNTS) -> None:
    """`counts` images of each part, as many of each shape, in class folders."""
    for split, (part, count) in enumerate(counts.items()):
        for label, name in enumerate(SHAPES):
            (root / part / name).mkdir(parents=True)
            for i in range(count // len(SHAPES)):
                pixels = picture(name, np.random.default_rng([split, label, i]))
                Image.fromarray(pixels).save(root / part / name / f"{i:04}.jpg", quality=92)
