"""How good an encoder's embeddings are: nearest labelled neighbours, a linear probe, effective rank, deviations."""

import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as V

from fastjem.data.folder import ImageFolder
from fastjem.data.loader import normalise
from fastjem.errors import UserError

ELEMENTS = 2**20  # that are widened at a time
BANK, QUERIES = 8192, 2048  # rows of one block of similarities
Features = Callable[[Tensor], Sequence[Tensor]]


def blocks(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Copies of the rows of [N, D], a few at a time and each in the place of the one before; free to be changed."""
    rows = min(max(ELEMENTS // x.shape[1], 1), len(x))
    buffer = torch.empty(rows, x.shape[1], dtype=dtype, device=x.device)
    for part in x.split(rows):
        yield buffer[: len(part)].copy_(part)


class _Whole(Dataset):
    """The middle of each chosen image, [3, H, W] uint8."""

    def __init__(self, folder: ImageFolder, chosen: Sequence[int], size: int):
        self.folder, self.chosen, self.size = folder, chosen, [size, size]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Tensor:
        try:
            image = self.folder.image(self.chosen[i])
        except Exception as error:
            raise UserError(f"{self.folder.path(self.chosen[i])} can't be read: {error}") from None
        return V.pil_to_tensor(V.center_crop(V.resize(image, self.size[:1]), self.size))


@torch.no_grad()
def features(
    compute: Features, folder: ImageFolder, image_size: int, *, chosen: Sequence[int] | None = None, batch: int = 256,
    workers: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """What `compute` makes of the images, normalised [B, 3, H, W] -> [B, D] each: one array [N, D] each, held once.

    chosen: indices of images (None: all); dtype: of the arrays, float16 halves them.
    """
    chosen = range(len(folder)) if chosen is None else chosen
    loader, arrays, at = DataLoader(_Whole(folder, chosen, image_size), batch, num_workers=workers), [], 0
    for images in loader:
        parts = compute(normalise(images, device))
        if not arrays:
            arrays = [torch.empty(len(chosen), part.shape[1], dtype=dtype, device=part.device) for part in parts]
        for array, part in zip(arrays, parts, strict=True):
            array[at : at + len(part)] = part
        at += len(images)
    return arrays


def embed(encoder: nn.Module, folder: ImageFolder, image_size: int, *, limit: int = 0, batch: int = 256) -> tuple:
    """(embeddings [N, D], labels [N]) of the folder's images, or of `limit` of them spread evenly over it."""
    size = len(folder)
    chosen = range(size) if not limit or limit >= size else [i * size // limit for i in range(limit)]
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    training = encoder.training
    encoder.eval()
    (rows,) = features(lambda x: [encoder(x)], folder, image_size, chosen=chosen, batch=batch, device=device)
    encoder.train(training)
    return rows, torch.as_tensor(folder.labels[list(chosen)], device=rows.device)


@torch.no_grad()
def knn(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """[Q] predicted labels: the k nearest by cosine vote with exp(cos / temperature) (Wu et al. 2018).

    Queries go in chunks and the bank too; the matrix of all similarities never exists, nor a second bank.
    """
    k, classes, out = min(k, len(bank)), int(labels.max()) + 1, []
    for chunk in queries.split(QUERIES):
        chunk = nn.functional.normalize(chunk.float(), dim=1)
        best, index, start = None, None, 0
        for part in bank.split(BANK):
            part = nn.functional.normalize(part.float(), dim=1)
            similarity, near = (chunk @ part.T).topk(min(k, len(part)), dim=1)
            near, start = near + start, start + len(part)
            if best is not None:
                similarity, near = torch.cat([best, similarity], 1), torch.cat([index, near], 1)
                similarity, keep = similarity.topk(min(k, similarity.shape[1]), dim=1)
                near = near.gather(1, keep)
            best, index = similarity, near
        votes = best.new_zeros(len(chunk), classes)
        # from the largest on: exp(1 / temperature) overflows at small temperatures
        out.append(votes.scatter_add_(1, labels[index], ((best - best[:, :1]) / temperature).exp()).argmax(1))
    return torch.cat(out)


def knn_accuracy(
    encoder: nn.Module, train: ImageFolder, test: ImageFolder, image_size: int, *, k: int = 20, limit: int = 0
) -> float:
    """Share of `limit` test images (0: all) whose label the k nearest training images tell."""
    if train.classes != test.classes:
        raise ValueError(f"the folders have other classes: {train.classes[:5]} and {test.classes[:5]}")
    bank, labels = embed(encoder, train, image_size)
    queries, truth = embed(encoder, test, image_size, limit=limit)
    return (knn(bank, labels, queries, k=k) == truth).float().mean().item()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] of the rows [N, D], in float64, a chunk at a time."""
    mean = sum(part.sum(0) for part in blocks(x, torch.float64)) / len(x)
    variance = sum(part.sub_(mean).square_().sum(0) for part in blocks(x, torch.float64)) / len(x)
    return mean, variance.sqrt()


class LinearProbe:
    """Multinomial logistic regression on standardised features, the optimum by torch's L-BFGS.

    The loss is mean cross-entropy + l2 / 2 ||W||^2, scikit-learn's with C = 1 / (N l2); the bias is free.
    """

    def __init__(self, x: Tensor, labels: Tensor, classes: int, *, l2: float = 1e-3, iterations: int = 200):
        mean, deviation = moments(x)
        self.mean, self.scale = mean.float(), (1 / deviation.clamp(min=1e-12 + 1e-6 * float(deviation.max()))).float()
        self.weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros(classes, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10,
            history_size=10, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            solver.zero_grad()
            total = 0.5 * l2 * self.weight.square().sum()
            total.backward()
            start = 0
            for part in self.standardised(x):
                truth, start = labels[start : start + len(part)], start + len(part)
                part = nn.functional.cross_entropy(self.logits(part), truth, reduction="sum") / len(x)
                part.backward()
                total = total + part.detach()
            return total.detach()

        solver.step(loss)

    def standardised(self, x: Tensor) -> Iterator[Tensor]:
        for part in blocks(x, torch.float32):
            yield part.sub_(self.mean).mul_(self.scale)

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return torch.cat([self.logits(part).argmax(1) for part in self.standardised(x)])


def rankme(x: Tensor) -> float:
    """exp of the entropy of the singular values of [N, D], as shares of their sum (Garrido et al. 2023, eq. 1)."""
    gram = sum(part.T @ part for part in blocks(x, torch.float64))
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / (values.sum() + 1e-30) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def split(train: ImageFolder, test: ImageFolder | None) -> tuple[ImageFolder, list[int], ImageFolder, list[int]]:
    """(bank, its images, queries, their images); without a test folder each tenth image of `train` is held out."""
    for folder in filter(None, (train, test)):
        if folder.classes == [""]:
            raise UserError(f"{folder.root} is flat: a folder for each class is needed to know what is right")
        if len(folder.classes) == 1:
            raise UserError(f"{folder.root} has one class only, {folder.classes[0]}: there is nothing to tell apart")
    if test is None:
        return train, [i for i in range(len(train)) if i % 10], train, list(range(0, len(train), 10))
    if train.classes != test.classes:
        only = [
            f"{folder.root} has {', '.join(sorted(set(folder.classes) - set(other.classes))[:3])}"
            for folder, other in ((train, test), (test, train))
            if set(folder.classes) - set(other.classes)
        ]
        raise UserError(f"the folders have other classes: {' and '.join(only)}, which the other lacks")
    return train, list(range(len(train))), test, list(range(len(test)))


def measure(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """Every figure of one kind of features: accuracies are shares of the queries."""
    deviation = moments(bank)[1]
    probe = LinearProbe(bank, labels, int(labels.max()) + 1)
    return {
        "knn": (knn(bank, labels, queries, k=k, temperature=temperature) == truth).double().mean().item(),
        "linear_probe": (probe.predict(queries) == truth).double().mean().item(),
        "rankme": rankme(bank),
        "dimensions": bank.shape[1],
        "std_min": float(deviation.min()),
        "std_median": float(deviation.median()),
        "std_max": float(deviation.max()),
    }


def default_workers() -> int:
    return min(len(os.sched_getaffinity(0)), 8)
