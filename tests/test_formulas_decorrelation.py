"""Methods that keep embeddings apart by their covariance or their distribution: loss and gradients, in float64."""

import importlib
import math

import pytest
import torch
from method_formulas import Exact, check, exact, unit
from torch import Tensor

from fastjem.methods import RunFacts
from fastjem.methods.vicregl import places

pytestmark = pytest.mark.usefixtures("one_thread")


def stacked(it: Exact) -> Tensor:
    return torch.stack(it.projected(it.batch.views))


def directions(width: int, count: int) -> Tensor:
    """As a method draws them: the first thing in its step."""
    drawn = torch.randn(width, count, dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def test_lejepa() -> None:
    """Balestriero and LeCun 2025, algorithms 1 and 2: the Epps-Pulley statistic of slices by the trapezoidal rule."""
    it = exact("lejepa", weight=0.3)
    large = it.method.views.large

    def formula() -> Tensor:
        slices = directions(8, 16)
        z = stacked(it)
        t = torch.linspace(-3, 3, 33, dtype=torch.float64)
        x = (z @ slices)[..., None] * t  # [V, N, S, T]
        error = (x.cos().mean(1) - (-t.square() / 2).exp()).square() + x.sin().mean(1).square()
        statistic = z.shape[1] * torch.trapezoid(error * (-t.square() / 2).exp(), t, dim=2).mean()
        return 0.3 * statistic + 0.7 * (z - z[:large].mean(0)).square().mean()

    check(it, formula)


@pytest.mark.parametrize("options", [{}, {"weight": 0.6, "scale": 2.0, "shape": 3.0, "center": 0.5}])
def test_visreg(options: dict) -> None:
    """Wu et al. 2026, algorithm 1."""
    it = exact("visreg", **options)
    given = {"weight": 0.9, "scale": 1.0, "shape": 1.0, "center": 1.0, **options}

    def formula() -> Tensor:
        slices = directions(8, 16)
        z = stacked(it)
        std = z.std(1, unbiased=False, keepdim=True)
        normal = (z - z.mean(1, keepdim=True)) / (std.detach() + 1e-4)
        count = z.shape[1]
        quantiles = torch.distributions.Normal(0.0, 1.0).icdf(
            torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
        )
        shape = ((normal @ slices).sort(1).values - quantiles[:, None]).square().mean()
        of_batch = given["scale"] * (1 - std).square().mean() + given["shape"] * shape
        of_batch += given["center"] * z.mean(1).square().mean()
        spread = (z - z[: it.method.views.large].mean(0)).square().mean()
        return given["weight"] * of_batch + (1 - given["weight"]) * spread

    check(it, formula)


def test_empssl() -> None:
    """Tong et al. 2023, equation 3, by main.py: of unit embeddings, -rate + 200 (-cosine to the mean)."""
    it = exact("empssl")

    def formula() -> Tensor:
        z = unit(stacked(it))
        _, rows, width = z.shape
        rates = [(torch.eye(width, dtype=z.dtype) + width / (rows * 0.2) * x.T @ x).logdet() / 2 for x in z]
        return -sum(rates) / len(rates) - 200 * torch.cosine_similarity(z, z.mean(0)[None], dim=2).mean()

    check(it, formula)


def test_tico() -> None:
    """Zhu et al. 2022, algorithm 1: the covariance has moved by this batch when the loss is taken."""
    it = exact("tico")
    start = torch.randn(8, 8, dtype=torch.float64)
    start = start @ start.T / 8
    it.method.covariance.copy_(start)
    z, target = it.projected(it.batch.views[:1])[0], it.targets(it.batch.views[1:])[0]
    expected = 0.9 * start + 0.1 * unit(z.detach()).T @ unit(z.detach()) / 8

    def formula() -> Tensor:
        a, b = unit(it.projected(it.batch.views[:1])[0]), unit(it.targets(it.batch.views[1:])[0])
        covariance = 0.9 * start + 0.1 * (a.T @ a).detach() / len(a)
        return (1 - (a * b).sum(1) + 8 * ((a @ covariance) * a).sum(1)).mean()

    check(it, formula)
    assert torch.equal(it.method.covariance, start)
    it.step.step_ends(0, None)
    torch.testing.assert_close(it.method.covariance, expected)
    assert target.shape == z.shape


@pytest.mark.parametrize("momentum_encoder", [None, True])
def test_wmse(momentum_encoder: bool | None) -> None:
    """Ermolov et al. 2021, equation 4: whitened by the inverse of the covariance's Cholesky factor, each part of the
    batch by itself; 2 - 2 cosine."""
    it = exact("wmse", momentum_encoder, whitening_size=4, iterations=2)

    def whitened(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        factor = torch.linalg.cholesky(x.T @ x / (len(x) - 1))
        return torch.linalg.solve_triangular(factor, x.T, upper=False).T

    def criterion(a: Tensor, b: Tensor) -> Tensor:
        losses = []
        for _ in range(2):
            for some in torch.randperm(len(a)).view(-1, 4):
                losses.append(2 - 2 * torch.cosine_similarity(whitened(a[some]), whitened(b[some])).mean())
        return torch.stack(losses).mean()

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        if not momentum_encoder:
            return criterion(*z)
        t = it.targets(it.batch.views)
        return (criterion(z[0], t[1]) + criterion(z[1], t[0])) / 2

    check(it, formula, rtol=1e-6)


@pytest.mark.parametrize("local", [0.0, 0.2])
def test_mmcr(local: float) -> None:
    """Yerxa et al. 2023, equation 4, by loss_mmcr_momentum.py: the nuclear norm of the means over both encoders' views,
    and those of each image's views by the trained one."""
    it = exact("mmcr", local=local)

    def formula() -> Tensor:
        views = torch.stack([*map(unit, it.projected(it.batch.views)), *map(unit, it.targets(it.batch.views))], 1)
        own = views[:, : len(it.batch.views)]  # the trained encoder's
        of_images = sum(torch.linalg.matrix_norm(image, "nuc") for image in own) / len(own)
        return local * of_images - torch.linalg.matrix_norm(views.mean(1), "nuc")

    check(it, formula, rtol=1e-6)


def test_frossl() -> None:
    """Skean et al. 2023, equation 5: the log of the squared Frobenius norm of the normalised covariance, and the mean
    square distance to the views' mean."""
    it = exact("frossl", invariance=1.5, norm="none")

    def formula() -> Tensor:
        z = [view / view.norm(dim=0) for view in it.projected(it.batch.views)]
        mean = sum(z) / len(z)
        total = 0.0
        for view in z:
            gram = view.T @ view
            total += (gram / gram.trace()).square().sum().log()
            total += 1.5 * len(z) * view.shape[1] * (view - mean).square().mean()
        return total

    check(it, formula)


@pytest.mark.parametrize("small", [0, 2])
def test_vicregl(small: int) -> None:
    """Bardes et al. 2022, equations 1 to 6: the whole views by lightly's module, places by main_vicregl.py, whose
    matches are in the map's order; where a place is in the image is computed here."""
    theirs = pytest.importorskip("lightly.loss").VICRegLLoss
    it = exact("vicregl", alpha=0.6, matches=5, small_matches=2)
    views = [torch.randn(8, 3, size, size, dtype=torch.float64) for size in (128, 128, *[96] * small)]
    column = importlib.import_module("fastjem.kernels.augment.columns")
    tables = [table.clone() for table in it.batch.tables[: 2 + small]]
    for table in tables:  # of two views of whole pixels many places are as near, and sorting may begin with any of them
        for k in (column.LEFT, column.TOP, column.WIDTH, column.HEIGHT):
            table[:, k] += torch.rand(8, dtype=torch.float64)
    it.batch = it.batch._replace(views=views, tables=tables)

    def formula() -> Tensor:
        method, encoder = it.method, it.step.encoder.backbone
        features, grids = [], []
        for view, table in zip(it.batch.views, it.batch.tables, strict=True):
            maps = encoder.forward_features(view)  # [B, D, h, w]
            assert maps.shape[2] > 2, "of a single place there is no order"
            local = method.local_projector(maps.flatten(2).mT).unflatten(1, maps.shape[2:])
            features.append((method.projector(maps.mean((2, 3))), local))
            grids.append(where(table, *maps.shape[-2:]))
        criterion = theirs(25.0, 25.0, 1.0, 1.0, num_matches=(5, 2))
        if small:
            whole = criterion(features[:2], grids[:2], features[2:], grids[2:]).squeeze()
        else:
            whole = criterion(features, grids).squeeze()
        maps = [local.flatten(1, 2) for _, local in features]
        of_places = of_places_in_order(maps, [grid.flatten(1, 2) for grid in grids], (5, 2))
        return 0.6 * whole + 0.4 * of_places

    it.step.eval()  # the encoder's batch norms, which the formula would move a second time
    check(it, formula, rtol=1e-6)


def of_places_in_order(maps: list[Tensor], grids: list[Tensor], matches: tuple[int, int]) -> Tensor:
    """main_vicregl.py's local term, an image and a slot at a time."""

    def chosen(x: Tensor, y: Tensor, distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows = []
        for image, of_image in enumerate(distances):
            nearest = of_image.min(1)
            kept = sorted(nearest.values.argsort()[:count].tolist())  # in the map's order
            rows.append((x[image, kept], y[image, nearest.indices[kept]]))
        return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])

    def vicreg(x: Tensor, y: Tensor) -> Tensor:
        total = 25 * (x - y).square().mean()
        slots = x.shape[1]
        for z in (x, y):
            for slot in z.unbind(1):
                total = total + 25 * (1 - (slot.var(0) + 1e-4).sqrt()).relu().mean() / 2 / slots
                covariance = torch.cov(slot.T)
                beside = covariance.square().sum() - covariance.diagonal().square().sum()
                total = total + beside / slot.shape[1] / 2 / slots
        return total

    found = []
    for i in range(2):
        for j in range(len(maps)):
            if i == j:
                continue
            for of in (maps, grids):
                distances = torch.cdist(of[i].detach(), of[j].detach())
                there = vicreg(*chosen(maps[i], maps[j], distances, matches[0]))
                back = vicreg(*chosen(maps[j], maps[i], distances.mT, matches[1]))
                found.append((there + back) / 2)
    return 2 * torch.stack(found).mean()


def where(table: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows, columns, 2], (x, y), one place at a time."""
    column = importlib.import_module("fastjem.kernels.augment.columns")
    grids = []
    for row in table:
        left, top, width, height = (row[k] for k in (column.LEFT, column.TOP, column.WIDTH, column.HEIGHT))
        grid = torch.zeros(rows, columns, 2, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                across = columns - 1 - j if row[column.FLIP] > 0 else j
                grid[i, j, 0] = left + width * (across + 0.5) / columns
                grid[i, j, 1] = top + height * (i + 0.5) / rows
        grids.append(grid)
    return torch.stack(grids)


def test_places_of_views_that_are_flipped() -> None:
    it = exact("vicregl")
    column = importlib.import_module("fastjem.kernels.augment.columns")
    flipped = [bool(row[column.FLIP] > 0) for table in it.batch.tables[:2] for row in table]
    assert any(flipped) and not all(flipped)
    for table in it.batch.tables[:2]:
        for rows, columns in ((3, 3), (2, 4)):
            torch.testing.assert_close(places(table, rows, columns), where(table, rows, columns))


def test_the_mean_of_a_batch_of_two_is_no_problem() -> None:
    """The smallest batch that has a deviation."""
    for name in ("visreg", "lejepa", "frossl", "empssl", "mmcr", "tico"):
        it = exact(name, run=RunFacts(batch=2))
        it.batch = it.batch._replace(views=[view[:2] for view in it.batch.views], index=it.batch.index[:2])
        loss, _ = it.step(it.batch, 0)
        assert math.isfinite(loss.item()), name
