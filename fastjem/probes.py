"""How good an encoder's embeddings are: nearest labelled neighbours, a linear probe, effective rank, deviations."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastjem.advice import advice
from fastjem.data.pixels import Pixels, whole_images
from fastjem.data.sharing import check_semaphores, share
from fastjem.data.source import Source
from fastjem.errors import ResourceError, UserError
from fastjem.functional import knn_votes
from fastjem.functional.decompositions import eigenvalues
from fastjem.kernels.arithmetic import solvable, widest_dtype
from fastjem.machine import available_cores
from fastjem.printing import say

ELEMENTS = 2**20  # that are widened at a time
QUERIES = 2048  # whose votes are in memory at a time
Compute = Callable[[Tensor], Sequence[Tensor]]  # images [B, C, H, W] -> one or more kinds of features [B, D]
# Folders of these names are parts of a data set. One may be a class (CIFAR-100 has trains), all of them are none.
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
NAMED = 20  # images that can't be read which are named one by one


class Computed(NamedTuple):
    """Features of those images of a source that can be read."""

    arrays: list[Tensor]  # one a kind of features, [N, D]
    images: list[int]  # N positions in the source
    unreadable: list[str]  # why each of the others can't be


class _Readable(Dataset):
    """(position, image) of a data set; a text in place of an image that can't be read, which ends nothing."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            return i, self.images[i]
        except UserError as error:
            return i, str(error)


def _together(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], list[tuple[int, str]], Tensor | None]:
    """(positions, images [B, C, H, W]) of what can be read of a batch, and between them what can't: (position, why)."""
    found = [(i, image) for i, image in items if isinstance(image, Tensor)]
    unreadable = [(i, text) for i, text in items if isinstance(text, str)]
    images = torch.stack([image for _, image in found]) if found else None
    share([] if images is None else [images])
    return [i for i, _ in found], unreadable, images


class Part(NamedTuple):
    """Features of a few images in a row, those of them that can be read."""

    arrays: list[Tensor]  # one a kind of features, [B, D]; empty where none can be read
    images: list[int]  # B positions in the source
    unreadable: list[tuple[int, str]]  # (position in the source, why) of each of the others


@torch.no_grad()
def parts(
    compute: Compute,
    source: Source,
    pixels: Pixels,
    *,
    indices: Sequence[int],
    batch: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Part]:
    """What `compute` makes of whole images, `batch` of them at a time in the order of `indices`; see `features`."""
    loader = DataLoader(
        _Readable(whole_images(source, indices, pixels)), batch, num_workers=workers, collate_fn=_together
    )
    for positions, texts, images in _read(loader):
        found = [] if images is None else list(compute(pixels.decoded.normalise(images, device)))
        unreadable = [(int(indices[i]), text) for i, text in texts]
        yield Part(found, [int(indices[i]) for i in positions], unreadable)


@torch.no_grad()
def features(
    compute: Compute,
    source: Source,
    pixels: Pixels,
    *,
    indices: Sequence[int] | None = None,
    batch: int = 256,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Computed:
    """What `compute` makes of whole images: for each kind of features one array [N, D], which is held once.

    An image that can't be read is left out and said.

    Args:
        pixels: how the images become numbers: those of the run that trained the encoder.
        indices: of the images in the source; None: all.
        workers: processes that read images.
        dtype: of the arrays; float16 halves them.

    Raises:
        UserError: where none can be read, or a process that reads them has died.
    """
    if indices is None:
        indices = range(len(source))
    arrays: list[Tensor] = []
    kept: list[int] = []
    unreadable: list[str] = []
    for part in parts(compute, source, pixels, indices=indices, batch=batch, workers=workers, device=device):
        texts = [text for _, text in part.unreadable]
        for text in texts[: max(NAMED - len(unreadable), 0)]:
            say(f"fastjem: skipped: {text}")
        unreadable += texts
        if part.arrays and not arrays:
            arrays = [torch.empty(len(indices), x.shape[1], dtype=dtype, device=x.device) for x in part.arrays]
        for array, rows in zip(arrays, part.arrays, strict=bool(part.arrays)):
            array[len(kept) : len(kept) + len(rows)] = rows
        kept += part.images
    if not kept:
        raise UserError(f"none of the images in {source.root} can be read; the first: {unreadable[0]}")
    if len(unreadable) > NAMED:
        say(f"fastjem: skipped {len(unreadable)} images of {source.root} in all")
    return Computed([array[: len(kept)] for array in arrays], kept, unreadable)


def _read(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; UserError where one of its processes has died."""
    try:
        check_semaphores(loader.num_workers)
        yield from loader
    except (RuntimeError, OSError) as error:
        line = advice(error)
        if line is None:
            raise
        raise ResourceError(line) from error


def embed(
    encoder: nn.Module, source: Source, pixels: Pixels, *, limit: int = 0, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """(embeddings [N, D], labels [N]) of the source's images, or of `limit` of them spread evenly over it; one that
    can't be read is left out and said.
    """
    size = len(source)
    indices = range(size) if not limit or limit >= size else [i * size // limit for i in range(limit)]
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    training = encoder.training
    encoder.eval()
    found = features(lambda x: [encoder(x)], source, pixels, indices=indices, batch=batch, device=device)
    encoder.train(training)
    (rows,) = found.arrays
    return rows, torch.as_tensor(labels_of(source)[found.images], device=rows.device)


def labels_of(source: Source) -> np.ndarray:
    """[N] int64; zeros where there are none."""
    return np.zeros(len(source), np.int64) if source.labels is None else np.asarray(source.labels, np.int64)


@torch.no_grad()
def knn(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """[Q] predicted labels: the k nearest by cosine vote with exp(cosine / temperature) (Wu et al. 2018).

    Args:
        bank: [N, D], with their labels [N].
        queries: [Q, D].
    """
    classes = int(labels.max()) + 1
    options = {"classes": classes, "k": k, "temperature": temperature}
    return torch.cat([knn_votes(part, bank, labels, **options).argmax(1) for part in queries.split(QUERIES)])


def knn_accuracy(
    encoder: nn.Module, train: Source, test: Source, pixels: Pixels, *, k: int = 20, limit: int = 0
) -> float:
    """Share of `limit` test images (0: all) whose label the k nearest training images tell."""
    if train.classes != test.classes:
        raise ValueError(f"the folders have other classes: {train.classes[:5]} and {test.classes[:5]}")
    bank, labels = embed(encoder, train, pixels)
    queries, truth = embed(encoder, test, pixels, limit=limit)
    return right(knn(bank, labels, queries, k=k), truth)


def right(predicted: Tensor, truth: Tensor) -> float:
    """Share of the labels [N] that are the true ones."""
    return int((predicted == truth).sum()) / len(truth)


def blocks(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Copies of the rows of [N, D], a few at a time and each in the place of the one before; free to be changed."""
    rows = min(max(ELEMENTS // x.shape[1], 1), len(x))
    buffer = torch.empty(rows, x.shape[1], dtype=dtype, device=x.device)
    for part in x.split(rows):
        yield buffer[: len(part)].copy_(part)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] of the rows [N, D], in float64, a block of rows at a time."""
    wide = widest_dtype(x.device)
    zeros = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    mean = sum((part.sum(0) for part in blocks(x, wide)), zeros) / len(x)
    variance = sum((part.sub_(mean).square_().sum(0) for part in blocks(x, wide)), zeros) / len(x)
    return mean, variance.sqrt()


class LinearProbe:
    """Multinomial logistic regression on standardised features, the optimum by torch's L-BFGS.

    The loss is mean cross-entropy + l2 / 2 ||W||^2, scikit-learn's with C = 1 / (N l2); the bias is free.

    Args:
        x: [N, D] features, with their labels [N].
        classes: K.
    """

    def __init__(self, x: Tensor, labels: Tensor, classes: int, *, l2: float = 1e-3, iterations: int = 200):
        mean, deviation = moments(x)
        least = 1e-12 + 1e-6 * float(deviation.max())  # a constant feature stays one
        self.mean = mean.float()
        self.scale = (1 / deviation.clamp(min=least)).float()
        self.weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros(classes, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10,
            history_size=10, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            """The loss, with its gradient left in weight and bias, a block of rows at a time."""
            solver.zero_grad()
            penalty = 0.5 * l2 * self.weight.square().sum()
            penalty.backward()
            total = penalty.detach()
            start = 0
            for part in self.standardised(x):
                truth = labels[start : start + len(part)]
                start += len(part)
                error = nn.functional.cross_entropy(self.logits(part), truth, reduction="sum") / len(x)
                error.backward()
                total = total + error.detach()
            return total

        solver.step(loss)

    def standardised(self, x: Tensor) -> Iterator[Tensor]:
        for part in blocks(x, torch.float32):
            yield part.sub_(self.mean).mul_(self.scale)

    def logits(self, x: Tensor) -> Tensor:
        """Standardised features [N, D] -> [N, K]."""
        return nn.functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Features [N, D] -> labels [N]."""
        return torch.cat([self.logits(part).argmax(1) for part in self.standardised(x)])


def rankme(x: Tensor) -> float:
    """exp of the entropy of the singular values of [N, D], as shares of their sum (Garrido et al. 2023, eq. 1).

    NaN where these aren't finite.
    """
    wide = widest_dtype(x.device)
    zero = torch.zeros((), dtype=wide, device=x.device)
    gram = sum((part.T @ part for part in blocks(x, wide)), zero)
    values = eigenvalues(solvable(gram)).clamp(min=0).sqrt()
    share = values / (values.sum() + 1e-30) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


class Split(NamedTuple):
    """Which images are known, and which are asked for."""

    bank: Source
    bank_images: Sequence[int]
    queries: Source
    query_images: Sequence[int]


def parts_not_classes(classes: Sequence[str]) -> bool:
    """Whether class folders are called as the parts of a data set are: train, test."""
    return bool(classes) and all(name.lower() in PARTS for name in classes)


def tells_classes(source: Source) -> bool:
    """Whether folders (or labels) say what is in an image: there are two classes and more, none of them is what lies
    beside all folders, and they aren't the parts of a data set."""
    return (
        source.labels is not None
        and len(source.classes) > 1
        and "" not in source.classes
        and not (parts_not_classes(source.classes))
    )


def majority(known: Tensor, truth: Tensor) -> float:
    """Share of the true labels [Q] that are the most frequent one of the known labels [N]: what a guess is worth."""
    return right(torch.full_like(truth, int(known.bincount().argmax())), truth)


def _must_have_classes(source: Source) -> None:
    """UserError where a source's classes are the parts of a data set; a word where some of them may be."""
    parts = [name for name in source.classes if name.lower() in PARTS]
    if parts_not_classes(source.classes):
        train = next((name for name in parts if name.lower().startswith("train")), None)
        other = next((name for name in parts if name != train), None)
        named = (("--train", train), ("--test", other))
        hint = " ".join(f"{option} {os.path.join(source.root, name)}" for option, name in named if name)
        raise UserError(f"{source.root} has parts of a data set ({', '.join(parts)}), no classes: {hint} names them")
    if "" in source.classes and source.labels is not None:
        loose = int((np.asarray(source.labels) == source.classes.index("")).sum())
        say(f"fastjem: {loose} images of {source.root} are in none of its folders; they are taken for a class")
    if len(parts) > 1:
        others = len(source.classes) - len(parts)
        say(f"fastjem: {', '.join(parts)} in {source.root} are taken for classes, beside {others} others")


def split(train: Source, test: Source | None) -> Split:
    """All of `train` and all of `test`; without a test folder each tenth image of `train` is held out.

    Raises:
        UserError: where there are no labels, or others in the one than in the other.
    """
    for source in filter(None, (train, test)):
        _must_have_classes(source)
        if source.labels is None:
            raise UserError(
                f"{source.root} has no labels, by which one knows what is right: a folder for each class, say"
            )
        if len(source.classes) == 1:
            raise UserError(f"{source.root} has one class only, {source.classes[0]}: there is nothing to tell apart")
    if test is None:
        known = [i for i in range(len(train)) if i % 10]
        return Split(train, known, train, range(0, len(train), 10))
    if train.classes != test.classes:
        only = [
            f"{source.root} has {', '.join(sorted(set(source.classes) - set(other.classes))[:3])}"
            for source, other in ((train, test), (test, train))
            if set(source.classes) - set(other.classes)
        ]
        raise UserError(f"the folders have other classes: {' and '.join(only)}, which the other lacks")
    return Split(train, range(len(train)), test, range(len(test)))


def measure(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """Every figure of one kind of features; accuracies are shares of the queries.

    Args:
        bank: [N, D], with their labels [N].
        queries: [Q, D], with their true labels [Q].
    """
    deviation = moments(bank)[1]
    probe = LinearProbe(bank, labels, int(labels.max()) + 1)
    return {
        "knn": right(knn(bank, labels, queries, k=k, temperature=temperature), truth),
        "linear_probe": right(probe.predict(queries), truth),
        "rankme": rankme(bank),
        "dimensions": bank.shape[1],
        "std_min": float(deviation.min()),
        "std_median": float(deviation.median()),
        "std_max": float(deviation.max()),
    }


def workers_of(asked: int) -> int:
    """Processes that read images, as many as asked for; -1: one a core, up to 8."""
    return min(available_cores(), 8) if asked < 0 else asked


def device_of(asked: str) -> str:
    """Where an encoder runs: the GPU where there is one, unless the CPU is asked for."""
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
