"""k-means and the k nearest rows, for every implementation: against float64 formulas, scikit-learn, and themselves."""

import math

import pytest
import torch
import torch.nn.functional as TF
from conftest import INTERPRETING

import fastjem.functional as F

pytestmark = pytest.mark.interpreter


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lloyd(x: torch.Tensor, centroids: torch.Tensor, iterations: int, spherical: bool):
    """The loops that a user would write, in float64: (centroids, assignments, counts, inertia)."""
    x = TF.normalize(x.double(), dim=1) if spherical else x.double()
    centroids = centroids.double()
    for step in range(iterations + 1):
        distances = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = distances.argmin(1)
        counts = nearest.bincount(minlength=len(centroids))
        if step == iterations:
            break
        for k in counts.nonzero()[:, 0].tolist():
            mean = x[nearest == k].mean(0)
            centroids[k] = TF.normalize(mean, dim=0) if spherical else mean
    return centroids, nearest, counts, distances.amin(1).sum()


SHAPES = [(1, 1, 1), (37, 5, 3), (70, 130, 9), (300, 33, 70)]
SHAPES += [] if INTERPRETING else [(1200, 7, 1100)]  # more than a tile of rows, and of centroids


@pytest.mark.parametrize("op", ["kmeans_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])
def test_values_of_kmeans(op, dtype, spherical, implementation, poisoned):
    if INTERPRETING and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for n, d, k in SHAPES:
        rows = drawn(n, 2 * d, seed=n, dtype=dtype).to(implementation.device)[:, ::2]  # not contiguous
        first = drawn(k, d, seed=1)
        first = TF.normalize(first, dim=1) if spherical else first
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = F.kmeans(
            rows, first.to(implementation.device, wide), iterations=1 if INTERPRETING else 3, spherical=spherical
        )
        truth = lloyd(rows.cpu(), first.to(wide), 1 if INTERPRETING else 3, spherical)
        assert found.centroids.dtype == wide and found.assignments.dtype == found.counts.dtype == torch.int64
        for got, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", ["kmeans_step"])
def test_values_of_kmeans_are_scikit_learns(op, implementation):
    sklearn = pytest.importorskip("sklearn.cluster")
    x = TF.normalize(drawn(400, 8), dim=1)
    first = x[:12].clone()
    theirs = sklearn.KMeans(12, init=first.numpy(), n_init=1, max_iter=4, tol=0, algorithm="lloyd").fit(x.numpy())
    ours = F.kmeans(x.to(implementation.device), first.to(implementation.device), iterations=4, spherical=False)
    assert ours.assignments.tolist() == theirs.labels_.tolist()
    assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-9)


@pytest.mark.parametrize("op", ["kmeans_step"])
def test_a_centroid_without_rows_stays_and_of_equal_ones_the_first_is_taken(op, implementation):
    x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [2.0, 0.0]], device=implementation.device)
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], device=implementation.device)
    found = F.kmeans(x, first, iterations=2)
    assert found.assignments.tolist() == [0, 0, 0] and found.counts.tolist() == [3, 0, 0]
    torch.testing.assert_close(found.centroids, first)
    opposite = F.kmeans(x[:1].repeat(2, 1) * torch.tensor([[1.0], [-1.0]], device=x.device), first[:1], iterations=1)
    torch.testing.assert_close(opposite.centroids, first[:1])  # two rows that sum to 0


@pytest.mark.parametrize("op", ["kmeans_step"])
def test_values_of_kmeans_far_from_the_origin(op, implementation):
    """Differences of squares would be as large as the differences of distances, and send one row in six elsewhere."""
    x = (drawn(60 if INTERPRETING else 800, 8) + 1000).float().to(implementation.device)
    found = F.kmeans(x, x[:20].clone(), iterations=0, spherical=False)
    distances = (x.double()[:, None] - x[:20].double()).square().sum(2)
    chosen = distances.gather(1, found.assignments[:, None])[:, 0]
    assert (chosen - distances.amin(1) < 1e-2).all()
    assert found.inertia.item() == pytest.approx(distances.amin(1).sum().item(), rel=1e-4)


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_first_centroids_are_different_rows_and_the_generators(init):
    x = drawn(60, 4).float()
    options = {"iterations": 0, "init": init}
    one, two = (F.kmeans(x, 20, generator=torch.Generator().manual_seed(3), **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    alike = (one.centroids[:, None] - TF.normalize(x, dim=1)[None]).abs().amax(2) < 1e-6
    assert (alike.sum(1) == 1).all() and (alike.sum(0) <= 1).all()
    assert not torch.equal(
        one.centroids, F.kmeans(x, 20, generator=torch.Generator().manual_seed(4), **options).centroids
    )


def test_kmeans_plus_plus_draws_one_row_of_each_of_clusters_far_apart():
    centres = torch.eye(8).double() * 100
    x = (centres[:, None] + 1e-3 * drawn(8, 10, 8)).flatten(0, 1)
    for seed in range(5):
        found = F.kmeans(
            x, 8, init="k-means++", iterations=0, spherical=False, generator=torch.Generator().manual_seed(seed)
        )
        assert found.counts.tolist() == [10] * 8


@pytest.mark.parametrize("op", ["kmeans_step"])
def test_kmeans_with_as_many_threads_as_it_likes_has_the_same_bits(op, implementation):
    x = drawn(3000, 24).float().to(implementation.device) if not INTERPRETING else drawn(100, 24).float()
    threads = torch.get_num_threads()
    results = []
    for count in (2, 2):
        torch.set_num_threads(count)
        results.append(F.kmeans(x, x[:30].clone(), iterations=2))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def nearest(query: torch.Tensor, bank: torch.Tensor, k: int):
    cosines = TF.normalize(query.double(), dim=1) @ TF.normalize(bank.double(), dim=1).T
    return cosines.topk(min(k, len(bank)), dim=1)


@pytest.mark.parametrize("op", ["nearest_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_values_of_the_nearest_rows(op, dtype, implementation, poisoned):
    for n, m, d, k in ((1, 1, 1, 1), (5, 9, 7, 4), (5, 9, 7, 20), (30, 700, 24, 65), (3, 20_000, 5, 3)):
        query, bank = drawn(n, d, dtype=dtype), drawn(m, 2 * d, seed=1, dtype=dtype)[:, ::2]
        cosines, index = F.nearest_rows(query.to(implementation.device), bank.to(implementation.device), k=k)
        truth = nearest(query, bank, k)
        assert cosines.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(cosines.cpu().double(), truth.values, rtol=1e-6, atol=1e-6)
        # Rows whose cosines differ in the last digits may change places.
        at = TF.normalize(query.double(), dim=1) @ TF.normalize(bank.double(), dim=1).T
        torch.testing.assert_close(at.gather(1, index.cpu()), truth.values, rtol=1e-6, atol=1e-6)
        assert all(len(set(row)) == len(row) for row in index.tolist())


@pytest.mark.parametrize("op", ["nearest_k"])
def test_values_that_are_equal_are_in_the_order_of_the_bank_and_nan_is_the_nearest(op, implementation):
    if implementation.name == "triton":
        pytest.skip("torch.topk's order")
    query = torch.tensor([[1.0, 0.0], [math.nan, 1.0]])
    bank = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    cosines, index = F.nearest_rows(query, bank, k=5)
    assert index.tolist() == [[1, 3, 5, 6, 0], [0, 1, 2, 3, 4]]
    assert cosines[1].isnan().all()


@pytest.mark.parametrize("op", ["nearest_k"])
def test_value_that_is_nan_is_found_behind_the_first_columns(op, implementation):
    """The k best are full by then, and C++ looks into a block of columns only where one of them is better."""
    if INTERPRETING:
        pytest.skip("C++'s blocks")
    bank = -torch.ones(200, 4, device=implementation.device)
    bank[:5] = 1
    bank[150] = math.nan
    _, index = F.nearest_rows(bank[:3], bank, k=5)
    assert index[:, 0].tolist() == [150] * 3


@pytest.mark.parametrize("op", ["kmeans_step"])
def test_values_of_kmeans_by_two_threads(op, implementation):
    if INTERPRETING:
        pytest.skip("C++'s threads")
    x, first = drawn(900, 48), drawn(6, 48, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = F.kmeans(x.to(implementation.device), first.to(implementation.device), iterations=1, spherical=False)
    finally:
        torch.set_num_threads(before)
    for got, expected in zip(found, lloyd(x, first, 1, False), strict=True):
        torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", ["nearest_k"])
def test_values_of_votes_are_wu_et_als(op, implementation):
    query, bank, labels = drawn(11, 6), drawn(90, 6, seed=1), torch.arange(90) % 7
    truth = nearest(query, bank, 15)
    votes = torch.zeros(11, 7, dtype=torch.float64)
    for row in range(11):
        for cosine, i in zip(truth.values[row], truth.indices[row], strict=True):
            votes[row, labels[i]] += math.exp(cosine / 0.2)
    inputs = [x.to(implementation.device) for x in (query, bank, labels)]
    for temperature in (0.2, torch.tensor(0.2, device=implementation.device)):
        shares = F.knn_votes(*inputs, classes=7, k=15, temperature=temperature).cpu()
        torch.testing.assert_close(shares, votes / votes.sum(1, keepdim=True), rtol=1e-6, atol=1e-8)
    assert F.knn_votes(*inputs, classes=7, temperature=1e-4).isfinite().all()
    for label in (-1, 7):
        labels[40] = label
        with pytest.raises(ValueError, match=rf"knn_votes: labels must be in \[0, 7\), got {label} at 40"):
            F.knn_votes(query, bank, labels, classes=7)
