"""With gloo, at two and three ranks and uneven batches: losses and gradients are those of one rank.

Every rank returns the one-rank loss on the whole batch, and the ranks' gradients are, divided by their number (what
DistributedDataParallel does), the one-rank gradients.
"""

import os
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastjem.functional as F
from fastjem import collectives, host_groups, nn
from fastjem.collectives import Agreement

SIZES = {2: (5, 3), 3: (4, 1, 6)}  # rows of each rank


def directions() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.arange(35.0, dtype=torch.float64).reshape(7, 5).cos(), dim=0)


def wide(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z, z.square()], 1)


def seen(op: str, z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    """The health figures, added to the loss: they are of the global batch, too."""
    health = F.Health(keep_spectrum=True)
    loss = getattr(F, op)(z0, z1, group=group, health=health)
    return loss + (health.std.sum() + health.effective_rank.sum() + health.spectrum().sum()).to(loss.dtype)


def options_of(z: torch.Tensor) -> dict:
    """Options that follow from an image's own rows, so that every rank finds those of its images."""
    z = z.detach()
    return {
        "ids": (z[:, 0] * 1.5).long(),
        "weights": z[:, 1].abs(),
        "prior": z[:, 2].sigmoid() / 5,
        "hard_negatives": torch.stack([z.roll(1, 1), z.roll(2, 1)], 1),
        "label_smoothing": 0.1,
    }


def between_images(z: torch.Tensor, group) -> torch.Tensor:
    """[N, all ranks' N] bool, not a symmetric one."""
    z = z.detach()
    everything = z
    if group is not None:
        everything = collectives.gather_rows(z, group, list(SIZES[group.size()]))[0]
    return z[:, 3, None] > everything[:, 4] + 1


def nt_xent_with_options(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    exclude = z0.detach()[:, 5] > 1
    return F.nt_xent(z0, z1, temperature=0.4, exclude=exclude, hardness=0.5, **options_of(z0), group=group)


def nt_xent_of_prefixes(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    dims = {"dims": (2, 5, z0.shape[1]), "dim_weights": (0.5, 1.0, 2.0)}
    return F.nt_xent(z0, z1, **dims, **options_of(z0), group=group) + F.nt_xent(z0, z1, **dims, group=group)


def clip_of_prefixes(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    return F.clip_loss(z0, z1, 5.0, dims=(3, 7), ids=options_of(z0)["ids"], group=group)


def nt_xent_of_rows(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    """Asymmetric in every way; each rank's losses are weighed and added by hand."""
    temperature = 0.3 + z1.detach()[:, 6].abs()
    options = {"temperature": temperature, "exclude": between_images(z0, group), "false_negative_margin": 0.1}
    losses = F.nt_xent(z0, z1, reduction="none", **options, group=group)
    return collectives.sum_of_ranks((losses * z0.detach()[:, 0]).sum(), group)


def clip_with_options(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    options = options_of(z0) | {"exclude": between_images(z0, group), "false_negative_margin": 0.7}
    return F.clip_loss(z0, z1, 0.8, reduction="sum", hardness=0.3, **options, group=group)


def clip_of_rows(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    scale = 0.3 + z1.detach()[:, 6].abs()
    return F.clip_loss(z0, z1, scale, exclude=z0.detach()[:, 5] > 1, **options_of(z0), group=group)


def supcon_with_options(z0: torch.Tensor, z1: torch.Tensor, group=None, anchors: str = "all") -> torch.Tensor:
    """Classes go across ranks; a temperature of each row, and each rank's losses are weighed and added by hand."""
    options = options_of(z0)
    given = {"exclude": z0.detach()[:, 5] > 1, "hard_negatives": options["hard_negatives"], "hardness": 0.5}
    labels = options["ids"]
    mean = F.supcon(
        torch.stack([z0, z1]),
        labels,
        anchors=anchors,
        weights=options["weights"],
        temperature=0.4,
        group=group,
        **given,
    )
    temperature = 0.3 + z1[:, 6].square()
    losses = F.supcon(torch.stack([z0, z1]), labels, temperature=temperature, reduction="none", group=group)
    return mean + collectives.sum_of_ranks((losses * z0.detach()[:, 0]).sum(), group)


def detcon(z0: torch.Tensor, z1: torch.Tensor, group=None) -> torch.Tensor:
    """Of two regions of each row, which show what its numbers say."""
    regions = [torch.stack([z, z.roll(1, 1) * z1], 1) for z in (z0, z1, z0 + z1, z0 - z1)]
    masks = [(z.detach()[:, :2] > 0).long() for z in (z0, z1)]
    return F.detcon(*regions, *masks, temperature=0.3, group=group)


# Of 8 and 11 rows and 7 columns, Barlow Twins adds squares and VICReg gathers rows; the narrow and wide ones differ.
LOSSES = {
    "tico": lambda z0, z1, group=None: F.tico(z0, z1, group=group)[0],
    "sigreg": lambda z0, z1, group=None: F.sigreg(torch.stack([z0, z1]), directions(), group=group),
    "lejepa": lambda z0, z1, group=None: F.lejepa(z0[None], z1[None], directions(), group=group),
    "visreg": lambda z0, z1, group=None: F.visreg(z0[None], torch.stack([z1, z0 - z1]), directions(), group=group),
    "koleo": lambda z0, z1, group=None: F.koleo(z0, topk=3, group=group) + F.koleo(z1, group=group, p=1),
    "nt_xent": partial(F.nt_xent, temperature=0.2),
    "nt_xent_margin": partial(F.nt_xent, temperature=0.2, false_negative_margin=-0.1),
    "nt_xent_options": nt_xent_with_options,
    "nt_xent_rows": nt_xent_of_rows,
    "nt_xent_prefixes": nt_xent_of_prefixes,
    "clip_prefixes": clip_of_prefixes,
    "detcon": detcon,
    "dcl_options": partial(F.dcl, false_negative_margin=0.5, prior=0.1),
    "dclw": partial(F.dclw, sigma=0.3),
    "dclw_options": partial(F.dclw, prior=0.1, hardness=0.5),
    "DCLWLoss": lambda z0, z1, group=None: nn.DCLWLoss(sigma=0.3, gather_distributed=group is not None)(z0, z1),
    "supcon_options": supcon_with_options,
    "supcon_one_anchor": partial(supcon_with_options, anchors="one"),
    "clip_options": clip_with_options,
    "clip_rows": clip_of_rows,
    "barlow_twins": partial(seen, "barlow_twins"),
    "barlow_twins_wide": lambda z0, z1, group=None: F.barlow_twins(wide(z0), wide(z1), group=group),
    "vicreg": partial(seen, "vicreg"),
    "vicreg_narrow": lambda z0, z1, group=None: seen("vicreg", z0[:, :3] / 3, z1[:, :3] / 3, group),
    "total_coding_rate": lambda z0, z1, group=None: F.total_coding_rate(torch.stack([z0, z1]), group=group),
    "simdino": lambda z0, z1, group=None: F.simdino([z0, z1, z0 - z1], [z1.detach(), z0.detach()], group=group),
    "tico_wide": lambda z0, z1, group=None: F.tico(wide(z0), wide(z1), group=group)[0],
}
CODES = {
    "sinkhorn": F.sinkhorn,
    "sinkhorn_samples_first": partial(F.sinkhorn, epsilon=0.2, normalize_samples_first=True),
}


def whole_batch(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(world)
    rows = sum(SIZES[world])
    return torch.randn(2, rows, 7, generator=g, dtype=torch.float64).unbind()


def check_collectives(z: torch.Tensor, mine: slice, rank: int, world: int) -> None:
    group = dist.group.WORLD
    part = z[mine]
    with collectives.Agreement("test", group) as ranks:
        ranks.rows_of(part)
    assert ranks.sizes == list(SIZES[world])
    everything, offset = collectives.gather_rows(part.T, group, ranks.sizes, dim=1)
    assert torch.equal(everything, z.T) and offset == mine.start
    assert torch.equal(collectives.stack_of_ranks(torch.tensor(rank), group), torch.arange(world))
    others = torch.cat([rows for (rows,) in collectives.other_ranks([part], 0, list(SIZES[world]), group)])
    assert torch.equal(others, torch.cat([z[: mine.start], z[mine.stop :]]))
    torch.testing.assert_close(collectives.mean_of_ranks(part.mean(0), len(part), group), z.mean(0))
    assert torch.equal(collectives.mean_of_ranks(part, len(part), None), part)
    assert collectives.from_first_rank(torch.tensor(rank), group) == 0
    assert collectives.default_group() is group and collectives.default_group(False) is None

    leaf = part.clone().requires_grad_()
    total = collectives.sum_of_ranks(leaf.square().sum(), group)
    torch.testing.assert_close(total, z.square().sum())
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0] / world, 2 * part)
    for weight in (len(part), torch.tensor(float(len(part)))):
        mean = collectives.mean_loss_of_ranks(leaf.square().sum(1).mean(), weight, group)
        torch.testing.assert_close(mean, z.square().sum(1).mean())
        torch.testing.assert_close(torch.autograd.grad(mean, leaf)[0] / world, 2 * part / len(z))


def check_a_learned_sigma(whole: tuple[torch.Tensor, torch.Tensor], mine: slice, world: int) -> None:
    """DCLW's weights are a softmax over all ranks' images, and what sigma learns is the sum over ranks, over W."""
    for temperature in (0.2, torch.tensor(0.2, dtype=torch.float64)):
        sigmas = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        expected = F.dclw(*whole, temperature=temperature, sigma=sigmas[0])
        cosines = torch.cosine_similarity(*whole)
        formula = F.dcl(*whole, temperature=temperature, weights=torch.zeros_like(cosines))
        weights = 2 - len(cosines) * (cosines / sigmas[0]).softmax(0)
        formula = formula - (weights * cosines).mean() / temperature
        torch.testing.assert_close(expected, formula)
        (gradient,) = torch.autograd.grad(expected, sigmas[0])
        torch.testing.assert_close(gradient, torch.autograd.grad(formula, sigmas[0])[0])
        parts = [z[mine].clone().requires_grad_() for z in whole]
        loss = F.dclw(*parts, temperature=temperature, sigma=sigmas[1], group=dist.group.WORLD)
        loss.backward()
        dist.all_reduce(sigmas[1].grad)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sigmas[1].grad / world, gradient)


def check_kmeans(z: torch.Tensor, mine: slice) -> None:
    """Ranks cluster their rows together; what is drawn at first is the first rank's draw."""
    group = dist.group.WORLD
    expected = F.kmeans(z, z[:3], iterations=3)
    found = F.kmeans(z[mine], z[:3], iterations=3, group=group)
    torch.testing.assert_close(found, expected._replace(assignments=expected.assignments[mine]))
    for init in ("random", "k-means++"):
        options = {"iterations": 2, "init": init}
        seeds = (0, 0) if dist.get_rank() == 0 else (1, 0)
        drawn, alone = (torch.Generator().manual_seed(seed) for seed in seeds)
        expected = F.kmeans(z, 4, generator=alone, **options)
        found = F.kmeans(z[mine], 4, generator=drawn, group=group, **options)
        torch.testing.assert_close(found, expected._replace(assignments=expected.assignments[mine]))
    nothing = z[mine] if dist.get_rank() else z[:0]  # a rank may have no rows
    found = F.kmeans(nothing, z[:3], iterations=3, group=group)
    expected = F.kmeans(z[SIZES[dist.get_world_size()][0] :], z[:3], iterations=3)
    torch.testing.assert_close(found.centroids, expected.centroids)


def check_numbers_of_a_group_without_the_host(rank: int, world: int) -> None:
    """A group of NCCL alone has gloo beside it, by which its ranks tell each other numbers.

    The first rank is in one group more than the others, by whose number torch would name one of these ranks alone.
    """
    dist.new_group([0], backend="gloo")
    group = dist.new_group(list(range(world)), backend="gloo")
    assert host_groups.sends_from_host(group)
    with mock.patch.object(dist, "get_backend_config", lambda group: "cuda:nccl"):
        assert not host_groups.sends_from_host(group)
        beside = host_groups.gloo_beside(group)
        assert beside is not group and host_groups.gloo_beside(group) is beside
        numbers = [[10 * i, 10 * i + 1] for i in range(world)]
        assert host_groups.numbers_of_ranks(numbers[rank], group) == numbers
        with Agreement("mine", group) as ranks:
            ranks.rows_of(torch.zeros(3 + rank, 2))
    assert ranks.sizes == [3 + i for i in range(world)]


def check_rank(rank: int, world: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    z0, z1 = whole_batch(world)
    mine = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    for name, function in LOSSES.items():
        leaves = [z.clone().requires_grad_() for z in (z0, z1)]
        expected = function(*leaves)
        expected_gradients = torch.autograd.grad(-0.7 * expected, leaves)

        parts = [z[mine].clone().requires_grad_() for z in (z0, z1)]
        loss = function(*parts, group=group)
        gradients = torch.autograd.grad(-0.7 * loss, parts)
        torch.testing.assert_close(loss, expected, msg=f"{name}, rank {rank}")
        for gradient, whole in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient / world, whole[mine], msg=f"{name}, gradient, rank {rank}")

        one_sided = function(z0[mine].clone(), parts[1], group=group)
        (gradient,) = torch.autograd.grad(one_sided, parts[1])
        torch.testing.assert_close(gradient / world, expected_gradients[1][mine] / -0.7, msg=f"{name}, one-sided")
        with torch.no_grad():
            torch.testing.assert_close(function(*parts, group=group), expected)
    check_a_learned_sigma((z0, z1), mine, world)
    for name, function in CODES.items():
        torch.testing.assert_close(function(z0[mine], group=group), function(z0)[mine], msg=f"{name}, rank {rank}")
    check_collectives(z0, mine, rank, world)
    check_kmeans(z0, mine)
    check_numbers_of_a_group_without_the_host(rank, world)
    codes = (z0[mine] / 0.05 + F.sinkhorn_bias(z0[mine], group=group)).softmax(1)
    torch.testing.assert_close(codes, F.sinkhorn(z0)[mine])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_ranks_compute_the_global_loss(world, tmp_path):
    mp.spawn(check_rank, (world, str(tmp_path / "store")), nprocs=world)
