"""k-means, the k nearest rows, Gram anchoring: what is made of products that nobody keeps."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

import fastjem.functional as F
from fastjem.bench.case import Case, at_least_float32


def kmeans(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration and the last assignment of spherical k-means, as DeepCluster v2's code: N x K in memory."""
    x = normalize(at_least_float32(x), dim=1)
    assignments = (x @ centroids.T).argmax(1)
    sums = torch.zeros_like(centroids).index_add_(0, assignments, x)
    centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centroids)
    return centroids, (x * centroids[(x @ centroids.T).argmax(1)]).sum(1).mean()


def ours_kmeans(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    found = F.kmeans(x, centroids, iterations=1)
    return found.centroids, 1 - found.inertia / (2 * len(x))


def sklearn():
    """scikit-learn's Lloyd on unit rows, one iteration, whose centroids are normalised here."""
    from sklearn.cluster import KMeans

    def run(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        rows = normalize(at_least_float32(x), dim=1)
        options = {"n_init": 1, "max_iter": 1, "tol": 0.0, "algorithm": "lloyd", "copy_x": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = centroids.numpy()
            found = KMeans(len(centroids), init=start, **options).fit(rows.numpy())  # pyright: ignore[reportArgumentType]
        moved = normalize(torch.from_numpy(found.cluster_centers_), dim=1)
        return moved, (rows * moved[torch.from_numpy(found.labels_).long()]).sum(1).mean()

    return run


def flash_kmeans():
    """One iteration on unit rows, then the assignment alone: a second iteration would move the centroids again."""
    from flash_kmeans import batch_kmeans_Cosine  # pyright: ignore[reportMissingImports]
    from flash_kmeans.assign_euclid_triton import cosine_assign_triton  # pyright: ignore[reportMissingImports]

    def run(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        rows = normalize(at_least_float32(x), dim=1)[None]
        _, moved, _ = batch_kmeans_Cosine(rows, len(centroids), max_iters=1, init_centroids=centroids[None])
        last = cosine_assign_triton(rows, moved)[0].long()
        return moved[0], (rows[0] * moved[0, last]).sum(1).mean()

    return run


def kmeans_case(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Features are read once a pass, of which there are two; their products with all centroids are made in each."""

    def inputs(draw) -> tuple[Tensor, Tensor]:
        x = draw.normal(n, d)
        return x, normalize(at_least_float32(x[:k]), dim=1)

    on_gpu = options.get("devices") == ("cuda",)
    peers = {"flash-kmeans": flash_kmeans} if on_gpu else {"sklearn": sklearn} if dtype == torch.float32 else {}
    return Case(
        "kmeans_step", f"{n} x {k} x {d}", inputs, kmeans, ours_kmeans, dtype=dtype, peers=peers,
        bytes=2 * n * d * dtype.itemsize + 3 * k * d * 4, flops=4 * n * k * d, **options,
    )  # fmt: skip


K_NEAREST = 20


def votes(query: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """lightly's knn_predict up to the votes, on unit rows: N x M in memory."""
    query = normalize(at_least_float32(query), dim=1)
    bank = normalize(at_least_float32(bank), dim=1)
    cosines, index = (query @ bank.T).topk(K_NEAREST, dim=1)
    weights = (cosines / 0.07).softmax(1)
    return weights.new_zeros(len(query), 100).scatter_add_(1, labels[index], weights)


def votes_case(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    return Case(
        "nearest_k", f"{K_NEAREST} of {m} x {d}, {n} queries",
        lambda draw: (draw.normal(n, d), draw.normal(m, d), draw.labels(m, 100)), votes,
        lambda q, b, labels: F.knn_votes(q, b, labels, classes=100, k=K_NEAREST), dtype=dtype,
        bytes=(n + m) * d * dtype.itemsize + m * 8 + n * 100 * 4, flops=2 * n * m * d, **options,
    )  # fmt: skip


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    u = normalize(at_least_float32(student), dim=2)
    v = normalize(at_least_float32(teacher), dim=2)
    return mse_loss(u @ u.mT, v @ v.mT)


def gram_case(b: int, p: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs: half of two symmetric products forward, one whole product backward."""

    def inputs(draw) -> tuple[Tensor, Tensor]:
        student = draw.normal(b, p, d)
        teacher = student + draw.normal(b, p, d)
        return student.requires_grad_(), teacher

    return Case(
        "gram_loss", f"{b} x {p} x {d}", inputs, gram, F.gram_loss, dtype=dtype,
        bytes=3 * b * p * d * dtype.itemsize, flops=4 * b * p * p * d, **options,
    )  # fmt: skip


CASES = [
    kmeans_case(20_000, 512, 128, devices=("cpu",)),
    kmeans_case(20_000, 3000, 128, devices=("cpu",), full_only=("cpu",)),
    kmeans_case(20_000, 512, 128, devices=("cuda",)),
    kmeans_case(500_000, 3000, 128, devices=("cuda",), full_only=("cuda",)),
    kmeans_case(20_000, 512, 128, torch.bfloat16, full_only=("cpu", "cuda")),
    votes_case(1000, 20_000, 384),
    votes_case(1000, 20_000, 384, torch.bfloat16, full_only=("cpu", "cuda")),
    gram_case(16, 196, 384),
    gram_case(16, 196, 384, torch.bfloat16, full_only=("cpu", "cuda")),
    gram_case(2, 1024, 384, full_only=("cpu", "cuda")),
]
