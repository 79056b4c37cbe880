"""Methods that cluster, and those with prototypes: loss, gradients and what moves by formula, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from method_formulas import Exact, check, cross_entropy, entropy_of, exact, unit
from torch import Tensor

from fastjem.functional import held as held_scores
from fastjem.kernels import tiling
from fastjem.methods import RunFacts
from fastjem.methods.deepcluster import NO_CLUSTER

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("unknown", [0, 3, 8])
def test_deepcluster(unknown: int) -> None:
    """main_deepclusterv2.py: a cross-entropy for each head over the images that it has clustered, all views alike."""
    it = exact("deepcluster", run=RunFacts(images=20))
    generator = torch.Generator().manual_seed(1)
    it.method.assignments.copy_(torch.randint(0, 4, (3, 20), generator=generator))
    it.method.assignments[0, :unknown] = NO_CLUSTER
    centroids = it.method.centroids.clone()

    def formula() -> Tensor:
        z = unit(torch.cat(it.projected(it.batch.views)))
        total = 0.0
        for centres, assigned in zip(centroids, it.method.assignments[:, :8], strict=True):
            labels = assigned.repeat(len(it.batch.views))
            losses = torch.nn.functional.cross_entropy(z @ centres.T / 0.1, labels.clamp(min=0), reduction="none")
            counted = losses[labels != NO_CLUSTER]
            total += counted.mean() if len(counted) else z.sum() * 0
        return total / 3

    check(it, formula)


def test_deepclusters_memory_and_its_clusters() -> None:
    """What the large views left of each image is what the next epoch's heads, in turn, are clustered from."""
    it = exact("deepcluster", run=RunFacts(images=8, batch=8), prototypes=2)
    z = [unit(view).detach() for view in it.projected(it.batch.views)[:2]]
    it.step(it.batch, 0)
    it.step.step_ends(0, None)
    for memory, view in zip(it.method.memories, z, strict=True):
        torch.testing.assert_close(memory.rows[:8], view)
    it.method.epoch_begins(0)
    assert (it.method.assignments == NO_CLUSTER).all()  # nothing is known before the first epoch
    it.method.epoch_begins(1)
    for head in range(3):
        rows = z[head % 2]
        centres, assigned = it.method.centroids[head], it.method.assignments[head]
        torch.testing.assert_close(assigned, (rows @ centres.T).argmax(1))
        for cluster in range(len(centres)):
            members = rows[assigned == cluster]
            if len(members):
                torch.testing.assert_close(centres[cluster], unit(members.sum(0)), rtol=1e-6, atol=1e-6)
    kept = it.method.assignments.clone()
    it.method.epoch_begins(1)
    assert torch.equal(kept, it.method.assignments), "the epoch and the seed alone decide"


def test_an_image_that_was_not_seen_is_in_no_cluster() -> None:
    """main_deepclusterv2.py leaves assignments of -100 there; what its row begins with moves no centroid either."""
    it = exact("deepcluster", run=RunFacts(images=20, batch=8), prototypes=3)
    it.step(it.batch._replace(index=torch.arange(8) * 2 + 1), 0)
    it.step.step_ends(0, None)
    it.method.epoch_begins(1)
    kept = it.method.centroids.clone(), it.method.assignments.clone()
    known = (it.method.assignments != NO_CLUSTER).sum(0).tolist()
    assert known == [3 if i % 2 and i < 16 else 0 for i in range(20)]
    for memory in it.method.memories:
        memory.rows[::2] = unit(torch.randn(11, 8, dtype=torch.float64))
    it.method.epoch_begins(1)
    assert torch.equal(it.method.centroids, kept[0]) and torch.equal(it.method.assignments, kept[1])
    unseen = it.batch._replace(index=torch.arange(8) * 2)
    assert it.step(unseen, 1)[0] == 0


def test_smogs_groups_are_clustered_from_features_alone() -> None:
    """Not from the random rows of a queue that isn't full."""
    it = exact("smog", run=RunFacts(batch=8), groups=3)
    it.step(it.batch, 0)
    it.step.step_ends(0, 0.9)
    queue = it.method.queue
    assert queue.came == 8 < len(queue.rows)
    it.method.epoch_begins(1)
    kept = it.method.groups.clone()
    queue.rows[8:] = unit(torch.randn_like(queue.rows[8:]))
    it.method.epoch_begins(1)
    assert torch.equal(it.method.groups, kept)
    queue.came.fill_(2)
    it.method.groups.copy_(-kept)
    it.method.epoch_begins(1)
    assert torch.equal(it.method.groups, -kept), "fewer features than groups"


def test_swavs_queue_begins_with_the_first_keys() -> None:
    """Sinkhorn of the first step sees features, and not random directions."""
    losses = []
    for seed in (0, 1):
        it = exact("swav", queue=24)
        for queue in it.method.queues:
            queue.rows.copy_(unit(torch.randn(queue.rows.shape, generator=torch.Generator().manual_seed(seed))))
        losses.append(it.step(it.batch, 0)[0])
        z = unit(it.projected(it.batch.views)[0]).detach()
        torch.testing.assert_close(it.method.queues[0].rows, z[torch.arange(24) % 8])
    assert losses[0] == losses[1]


def test_smog() -> None:
    """Pang et al. 2022, equations 4 to 6: groups move by what is assigned to them, which learns through them, too."""
    it = exact("smog", beta=0.9)
    groups = it.method.groups.clone()

    def moved(x: Tensor) -> Tensor:
        assigned = (x @ groups.T).argmax(1)
        rows = []
        for k, group in enumerate(groups):
            members = x[assigned == k]
            rows.append(unit(0.9 * group + 0.1 * members.mean(0)) if len(members) else group)
        return torch.stack(rows)

    def formula() -> Tensor:
        (z,) = it.projected(it.batch.views[:1])
        (target,) = it.targets(it.batch.views[1:])
        assigned = (unit(target) @ groups.T).argmax(1)
        return cross_entropy(unit(it.method.predictor(z)) @ moved(unit(z)).T / 0.1, assigned)

    check(it, formula)
    assert torch.equal(it.method.groups, groups)
    (z,) = it.projected(it.batch.views[:1])
    it.step.step_ends(0, None)
    torch.testing.assert_close(it.method.groups, moved(unit(z.detach())))


def test_smogs_groups_are_clustered_from_its_queue() -> None:
    it = exact("smog", run=RunFacts(images=32, batch=8), queue=32)
    it.method.queue.push(unit(torch.randn(32, 8, dtype=torch.float64)))
    rows = it.method.queue.rows.clone()
    it.method.epoch_begins(1)
    groups = it.method.groups
    assigned = (rows @ groups.T).argmax(1)
    used = 0
    for k, group in enumerate(groups):
        members = rows[assigned == k]
        if len(members):
            used += 1
            torch.testing.assert_close(group, unit(members.sum(0)), rtol=1e-5, atol=1e-5)
    assert used > 1


def sinkhorn(q: Tensor, iterations: int) -> Tensor:
    """msn/src/losses.py: of targets [B, K], first over samples."""
    q = q.T / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize(
    "name, options",
    [
        ("msn", {}),
        ("msn", {"iterations": 0, "regularization": 2.0, "sharpen": 0.5}),
        ("msn", {"regularization": 0.0, "norm": "layer"}),
        ("pmsn", {}),
        ("pmsn", {"power": 1.0, "iterations": 3, "regularization": 0.7}),
    ],
)
@pytest.mark.parametrize("held", [True, False], ids=["held", "some images at a time"])
def test_msn(name: str, options: dict, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assran et al. 2022, equations 1 and 2, by src/losses.py; PMSN's term is KL(power law || mean prediction)."""
    if not held:
        monkeypatch.setattr(held_scores, "LARGEST_SCORES", 0)
        monkeypatch.setattr(tiling, "HEAD_USAGE_BYTES", 3 * 4 * 12 * 8)  # three images of four views against 12
    it = exact(name, mask=0.5, **options)
    it.batch = it.batch._replace(views=it.batch.views[:4])
    given = {"iterations": 3 if name == "msn" else 0, "regularization": 1.0, "sharpen": 0.25, "power": 0.25, **options}

    def formula() -> Tensor:
        mask = it.batch.masks[1].visible
        assert mask.shape[1] == 8, "of 16 patches"
        pooled = [it.encoder(it.batch.views[1], visible=mask), *map(it.encoder, it.batch.views[2:])]
        prototypes = unit(it.method.prototypes.weight)
        p = (unit(it.method.projector(torch.cat(pooled))) @ prototypes.T / 0.1).softmax(1)
        with torch.no_grad():
            (target,) = it.targets(it.batch.views[:1])
            wanted = (unit(target) @ prototypes.T / 0.1).softmax(1) ** (1 / given["sharpen"])
            wanted = wanted / wanted.sum(1, keepdim=True)
            if given["iterations"]:
                wanted = sinkhorn(wanted, given["iterations"])
        loss = -(wanted.repeat(3, 1) * p.log()).sum(1).mean()
        mean = p.mean(0)
        if name == "msn":
            regularizer = (mean * mean.log()).sum() + math.log(len(mean))
        else:
            law = torch.arange(1, len(mean) + 1, dtype=torch.float64) ** -given["power"]
            law = law / law.sum()
            regularizer = (law * (law.log() - mean.log())).sum()
        return loss + given["regularization"] * regularizer

    assert set(it.batch.masks) == {1}, "the target sees the whole of its view"
    check(it, formula)


def positionwise(scores: Tensor, iterations: int = 3) -> Tensor:
    """capi/model.py's Sinkhorn of [B, L, K] over the temperature: over images, then over clusters, at each place."""
    codes = (50 + scores - scores.amax(0, keepdim=True)).exp()
    for _ in range(iterations):
        codes = codes / (codes.sum(0, keepdim=True) + 1e-8)
        codes = codes / (codes.sum(2, keepdim=True) + 1e-8)
    return codes


@pytest.mark.parametrize("held", [True, False], ids=["held", "in tiles"])
@pytest.mark.parametrize("predicted", [0.05, 1.0])
def test_capi(predicted: float, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Darcet et al. 2025, section 3, by train_capi.py: the clustering learns from the momentum encoder's patches, the
    prediction from the student's."""
    if not held:
        monkeypatch.setattr(held_scores, "LARGEST_SCORES", 0)
    it = exact("capi", predicted=predicted)
    method = it.method

    def formula() -> Tensor:
        images = it.batch.views[0]
        mask = it.batch.masks[0]
        with torch.no_grad():
            whole = unit(it.step.teacher["encoder"](images).tokens)
        scores = whole @ method.clustering.weight.T + method.clustering.bias
        targets = positionwise(scores.detach() / 0.06)
        clustering = entropy_of(targets, scores / 0.12).mean()
        wanted = method._wanted(mask.hidden)
        assert wanted.shape[1] == max(int(mask.hidden[0].sum() * predicted), 1)
        seen = it.step.encoder(images, visible=mask.visible).tokens
        of_images = zip(seen, mask.visible, wanted, strict=True)
        x = torch.stack([method.predictor(*(t[None] for t in one))[0] for one in of_images])
        logits = unit(x) @ unit(method.head.weight).T
        chosen = torch.stack([target[places] for target, places in zip(targets, wanted, strict=True)])
        return clustering + entropy_of(chosen, logits / 0.12).mean()

    check(it, formula)
    for places, hidden in zip(method._wanted(it.batch.masks[0].hidden), it.batch.masks[0].hidden, strict=True):
        assert len(set(places.tolist())) == len(places) and hidden.flatten()[places].all()


def test_capis_terms_train_their_own_part_only() -> None:
    it = exact("capi")
    _, notes = it.step(it.batch, 0)
    assert set(notes) >= {"loss_prediction", "loss_clustering"}
    names = [name for name, p in it.step.named_parameters() if p.requires_grad]
    parameters = [dict(it.step.named_parameters())[name] for name in names]
    student, teacher = it.step.branches()
    terms = it.method.loss(student, teacher, it.batch, torch.tensor(0))
    gradients = torch.autograd.grad(terms["clustering"], parameters, allow_unused=True)
    assert {n for n, g in zip(names, gradients, strict=True) if g is not None} == {
        "method.clustering.weight",
        "method.clustering.bias",
    }


def one_image(it: Exact, i: int) -> Exact:
    """The batch of one image."""
    views = [view[i : i + 1] for view in it.batch.views]
    masks = {
        key: mask._replace(hidden=mask.hidden[i : i + 1], visible=mask.visible[i : i + 1])
        for key, mask in it.batch.masks.items()
    }
    return replace(it, batch=it.batch._replace(views=views, index=it.batch.index[i : i + 1], masks=masks))


def test_capi_of_one_image_has_clusters_that_say_nothing() -> None:
    """Sinkhorn over one image gives each place a uniform target, and no NaN."""
    it = one_image(exact("capi"), 0)
    loss, notes = it.step(it.batch, 0)
    assert loss.isfinite() and float(notes["loss_clustering"]) >= math.log(8) - 1e-6


def test_heads_stay_where_fewer_images_were_seen_than_there_are_clusters() -> None:
    method = exact("deepcluster", run=RunFacts(images=20)).method
    before = method.centroids.clone()
    assigned = method.assignments.clone()
    method.epoch_begins(1)
    assert torch.equal(method.centroids, before)
    assert torch.equal(method.assignments, assigned)
