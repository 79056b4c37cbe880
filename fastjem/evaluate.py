"""How good an encoder's embeddings are, by their nearest labelled neighbours."""

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from fastjem.data.folder import ImageFolder
from fastjem.data.loader import normalise
from fastjem.data.views import ViewSpec


@torch.no_grad()
def embed(encoder: nn.Module, folder: ImageFolder, image_size: int, *, limit: int = 0, batch: int = 256) -> tuple:
    """(embeddings [N, D], labels [N]) of the folder's images, or of `limit` of them spread evenly over it."""
    device, size = next(encoder.parameters()).device, len(folder)
    chosen = range(size) if not limit or limit >= size else [i * size // limit for i in range(limit)]
    spec, training, rows = ViewSpec(size=image_size), encoder.training, []
    encoder.eval()
    for start in range(0, len(chosen), batch):
        images = [folder.image(i) for i in chosen[start : start + batch]]
        images = [V.pil_to_tensor(V.center_crop(V.resize(x, [image_size]), [image_size])) for x in images]
        (x,) = normalise([torch.stack(images)], [spec], device)
        rows.append(encoder(x).float())
    encoder.train(training)
    return torch.cat(rows), torch.as_tensor(folder.labels[list(chosen)], device=device)


@torch.no_grad()
def knn(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """[Q] predicted labels: the k nearest by cosine vote with exp(cos / temperature) (Wu et al. 2018).

    Queries go in chunks; the matrix of all similarities never exists.
    """
    bank, k = nn.functional.normalize(bank, dim=1), min(k, len(bank))
    classes, out = int(labels.max()) + 1, []
    for chunk in nn.functional.normalize(queries, dim=1).split(512):
        similarity, index = (chunk @ bank.T).topk(k, dim=1)
        votes = bank.new_zeros(len(chunk), classes)
        out.append(votes.scatter_add_(1, labels[index], (similarity / temperature).exp()).argmax(1))
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
