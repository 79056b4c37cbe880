"""With gloo, FSDP2: steps of a run with its weights in shards are those of one rank with the whole batch.

Encoders and heads have layer norms, and nothing is dropped: batch norms see a rank's own images.
"""

import copy
import os
import unittest.mock
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_methods
import test_sharding_runs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from images import make_folder
from test_methods import small_options
from test_methods_distributed import OF_EACH_RANK, made, part_of
from torch import Tensor, nn

from fastjem import optim, sharded_checkpoints, sharding
from fastjem.functional import ema_update_, weights
from fastjem.functional.shards import is_distributed, local
from fastjem.methods import METHODS, RunFacts
from fastjem.micro_batches import Passes
from fastjem.nn.momentum import update_momentum
from fastjem.ops.autograd import ops as operators
from fastjem.ranks import Ranks
from fastjem.step import Step
from fastjem.stepping import forward_backward

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)
pytest.importorskip("timm")

IMAGES = 8
# One of each family.
FAMILIES = (
    "simclr", "moco", "swav", "dino", "byol", "simsiam", "ibot", "data2vec", "mae", "vicreg", "barlow_twins", "clip",
    "deepcluster", "distill",
)  # fmt: skip
QUICK = ("moco", "ibot")


def begin(rank: int, world: int, store: str) -> Ranks:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    test_methods.needs_patches = lambda kind: kind is not METHODS["pirl"]  # encoders that have blocks
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=wait)
    return Ranks(rank, world, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)


def optimizer_of(step: Step, name: str = "sgd") -> torch.optim.Optimizer:
    optimizer = optim.build(name, optim.parameter_groups(step))
    assert isinstance(optimizer, optim.Fused)
    optimizer.attach_teacher(*step.teacher_and_student())
    return optimizer


def train(step: Step, optimizer: Any, batch: Any, steps: int, rank: int = 0) -> list[Tensor]:
    """The losses of some steps and the norms of their gradients, which are cut."""
    found = []
    # Not AdamW: what is float32 in float64 runs (Sinkhorn's potentials) it makes a step of where gradients are near 0.
    schedule = optim.Schedule(steps=steps, learning_rate=0.02, weight_decay=0.1)
    for i in range(steps):
        torch.manual_seed(3 + i)
        schedule.apply(optimizer, i)
        optimizer.zero_grad(set_to_none=True)
        loss, _ = step(batch, i)
        loss.backward()
        norm = optim.clip_([p for p in step.parameters() if p.requires_grad], 0.5)
        optimizer.step(teacher_momentum=0.9)
        step.step_ends(i, None)
        found += [loss.detach(), norm]
    return found


def mean(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def whole(x: Any) -> Tensor:
    return x.full_tensor() if is_distributed(x) else x


def check_method(name: str, ranks: Ranks, steps: int = 5) -> None:
    each = IMAGES // ranks.size
    step, batch = made(name, RunFacts(batch=IMAGES, steps_per_epoch=2, steps=steps))
    with_idle_parameters(step)
    alone = optimizer_of(step)
    expected = train(step, alone, batch, steps)
    facts = RunFacts(batch=IMAGES, steps_per_epoch=2, steps=steps, ranks=ranks.size, group=ranks.group)
    other, batch = made(name, facts)
    with_idle_parameters(other)
    sharding.shard(other, ranks)
    kinds = [type(p) for p in other.parameters() if p.dim() and not is_distributed(p)]
    assert not kinds
    rows = slice(ranks.rank * each, (ranks.rank + 1) * each)
    optimizer = optimizer_of(other)
    got = train(other, optimizer, part_of(batch, rows), steps)
    if name in OF_EACH_RANK:
        return
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a = a if i % 2 else mean(a)  # losses are of each rank's images, or the same on all; norms are of all
        assert_close(a, b, f"{name}: {'norm' if i % 2 else 'loss'} of step {i // 2}")
    state = step.state_dict()
    for key, value in other.state_dict().items():
        assert_close(whole(value).double(), state[key].double(), f"{name}: {key}")
    averages = [values["momentum_buffer"] for values in alone.state.values()]
    for i, values in enumerate(optimizer.state.values()):
        assert_close(whole(values["momentum_buffer"]), averages[i], f"{name}: gradient {i}", 1e-5)


def with_idle_parameters(step: Step) -> None:
    """Some that no loss reaches, of a block and beside the blocks."""
    for encoder in [step.encoder, *(part for name, part in step.teacher.items() if name == "encoder")]:
        backbone: Any = encoder.backbone
        trained = encoder is step.encoder
        for part in (backbone, *list(getattr(backbone, "blocks", ()))[:1]):
            part.idle = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=trained)


def assert_close(a: Tensor, b: Tensor, what: str, share: float = 1e-6) -> None:
    """To a share of the largest element."""
    largest = b.abs().max().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=share * largest + 1e-12, msg=lambda m: f"{what}: {m}")


def sharded(name: str, ranks: Ranks, **options: Any) -> tuple[Step, Step, Any, Any]:
    """A method's step whole, and in shards, with the whole batch and this rank's part of it."""
    step, batch = made(name, RunFacts(batch=IMAGES, steps_per_epoch=2, steps=5), **options)
    facts = RunFacts(batch=IMAGES, steps_per_epoch=2, steps=5, ranks=ranks.size, group=ranks.group)
    other, _ = made(name, facts, **options)
    sharding.shard(other, ranks)
    each = IMAGES // ranks.size
    return step, other, batch, part_of(batch, slice(ranks.rank * each, (ranks.rank + 1) * each))


def same(a: Any, b: Any, what: str) -> None:
    """Two states, of nested dicts and lists, with the same tensors."""
    if isinstance(b, dict):
        assert a.keys() == b.keys(), what
        for key, value in b.items():
            same(a[key], value, f"{what}.{key}")
    elif isinstance(b, Tensor):
        assert type(a) is Tensor, what
        assert_close(a.double(), b.double(), what)
    elif isinstance(b, list):
        for one, other in zip(a, b, strict=True):
            same(one, other, what)
    else:
        assert a == b, what


def full_state(step: Step, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds, with whole tensors: as one rank without shards has them."""
    state = sharded_checkpoints.copied({"model": step.state_dict(), "optimizer": optimizer.state_dict()})
    for _, held, name in sharded_checkpoints.places(state):
        if isinstance(held[name], Tensor):
            held[name] = whole(held[name]).clone()
    return state


def load_full_state(step: Step, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """As a resumed run does it."""
    state = sharded_checkpoints.fitted(state, step, optimizer)
    step.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def check_whole_states(ranks: Ranks) -> None:
    """What a checkpoint holds is one rank's; what was saved goes on in shards and without; encoders are made whole."""
    step, other, batch, part = sharded("moco", ranks)
    empty = sharding.outline(made("moco", RunFacts())[0].encoder.backbone)
    assert all(p.is_meta for p in empty.parameters())
    optimizer = optimizer_of(other, "adamw")
    with pytest.raises(RuntimeError, match="size mismatch"):
        wrong = step.state_dict() | {"encoder.backbone.pos_embed": torch.zeros(1, 3, 64)}
        load_full_state(other, optimizer, {"model": wrong, "optimizer": optimizer.state_dict()})
    alone = optimizer_of(step, "adamw")
    train(step, alone, batch, 2)
    train(other, optimizer, part, 2)
    state = full_state(other, optimizer)
    expected = copy.deepcopy(full_state(step, alone))
    found = sharding.gathered(other.encoder.backbone, empty if ranks.first else None)
    if ranks.first:
        same(state, expected, "state")
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state["model"].values()), "a file of views"
        same(found.state_dict(), step.encoder.backbone.state_dict(), "encoder")
        assert_close(found(batch.views[0]), step.encoder.backbone(batch.views[0]), "embeddings")
        assert all(p.is_meta for p in empty.parameters())
    else:
        assert found is other.encoder.backbone
    # Of new ones that go on from it, one without shards, and both as the first would have.
    plain, fresh, _, _ = sharded("moco", ranks)
    both = optimizer_of(plain, "adamw"), optimizer_of(fresh, "adamw")
    load_full_state(plain, both[0], copy.deepcopy(expected))
    load_full_state(fresh, both[1], expected)
    held: Any = both[1].state[max(fresh.encoder.parameters(), key=len)]["exp_avg"]
    assert local(held).untyped_storage().nbytes() == local(held).nbytes, "the whole tensor is kept"
    train(step, alone, batch, 2)
    train(plain, both[0], batch, 2)
    train(fresh, both[1], part, 2)
    again = full_state(fresh, both[1])
    same(again, full_state(step, alone), "resumed")
    same(full_state(plain, both[0]), full_state(step, alone), "resumed whole")


def check_channels_last(ranks: Ranks) -> None:
    """Convolutions whose weights have another layout, which shards don't; states go from one to the other."""
    module = test_methods.feature_maps
    test_methods.needs_patches, needs = lambda kind: False, test_methods.needs_patches
    test_methods.feature_maps = lambda: module().to(memory_format=torch.channels_last)
    step, other, batch, part = sharded("vicregl", ranks)
    test_methods.needs_patches, test_methods.feature_maps = needs, module
    assert any(not p.is_contiguous() for p in step.parameters())
    alone, optimizer = (optimizer_of(one, "adamw") for one in (step, other))
    for _ in range(2):
        train(step, alone, batch, 1)
        train(other, optimizer, part, 1)
        state, expected = (full_state(*pair) for pair in ((other, optimizer), (step, alone)))
        same(state, expected, "channels_last")
        given = copy.deepcopy(expected)
        load_full_state(step, alone, state)
        load_full_state(other, optimizer, given)


def check_accumulation(ranks: Ranks) -> None:
    """Gradients cross ranks with the last of several passes: CLIP's single numbers, too, and DDP's."""
    for wrap in (False, True):
        step, other, batch, part = sharded("clip", ranks)
        halves = [part_of(part, slice(i, len(part.index), 2)) for i in range(2)]
        whole_halves = [part_of(batch, slice(i, IMAGES, 2)) for i in range(2)]
        model: nn.Module = other
        if wrap:
            facts = RunFacts(batch=IMAGES, ranks=ranks.size, group=ranks.group)
            model = nn.parallel.DistributedDataParallel(made("clip", facts)[0], broadcast_buffers=False)
        for one in whole_halves:
            step(one, 3)[0].backward()
        with sharding.without_exchange(model):
            model(halves[0], torch.tensor(3))[0].backward()
        scales = [p.grad for name, p in model.named_parameters() if name.endswith("log_scale")]
        assert not torch.allclose(scales[0], mean(scales[0])), "nothing is exchanged yet"
        model(halves[1], torch.tensor(3))[0].backward()
        found = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        for name, p in step.named_parameters():
            if p.grad is not None:
                assert found[name].grad is not None, name
                assert_close(whole(found[name].grad), p.grad, name)
    with sharding.without_exchange(step):
        pass


def check_micro_batches(ranks: Ranks, names: Sequence[str], size: int = 3) -> None:
    """Two batches of a step, by micro-batches in shards: the gradients of one rank that has both whole."""
    for name in names:
        step, other, batch, _ = sharded(name, ranks)
        batches = [batch, batch._replace(views=[view.flip(0) * 0.7 for view in batch.views])]
        each = IMAGES // ranks.size
        rows = slice(ranks.rank * each, (ranks.rank + 1) * each)
        facts = {"config": SimpleNamespace(accumulate=2), "ranks": ranks, "autocast": None, "scaler": None}
        training: Any = SimpleNamespace(step=other, model=other, passes=Passes(size), **facts)
        for i, one in enumerate(batches):
            torch.manual_seed(3)
            expected, _ = step(one, 3)
            (expected / 2).backward()
            torch.manual_seed(3)
            loss, _ = forward_backward(training, part_of(one, rows), torch.tensor(3), synchronise=i == 1)
            if name not in OF_EACH_RANK:
                assert_close(mean(loss), expected.detach(), f"{name}: loss of batch {i}")
        for (key, p), wanted in zip(other.named_parameters(), step.parameters(), strict=True):
            assert (p.grad is None) == (wanted.grad is None), f"{name}: {key}"
            if wanted.grad is not None and name not in OF_EACH_RANK:
                assert_close(whole(p.grad), wanted.grad, f"{name} by micro-batches: {key}")


def check_memory(ranks: Ranks) -> None:
    """Of weights, their momentum copy, gradients and both averages a rank holds its share, but for what is padded."""
    step, other, batch, part = sharded("dino", ranks)
    sizes = []
    for one, images in ((step, batch), (other, part)):
        optimizer = optimizer_of(one)
        loss, _ = one(images, 0)
        loss.backward()
        optimizer.step(teacher_momentum=0.9)
        tensors: list[Any] = [x for p in one.parameters() for x in (p, p.grad) if x is not None]
        tensors += [x for values in optimizer.state.values() for x in values.values() if x.dim()]
        sizes.append(sum(local(x).numel() * x.element_size() for x in tensors))
    share = sizes[1] / sizes[0]
    assert abs(share - 1 / ranks.size) < 0.03, share  # tokens and positions, [1, L, D], are the first rank's


def check_precision(ranks: Ranks) -> None:
    """Autocast computes in bfloat16 what it does without shards; an overflow of one rank is everybody's."""
    step, _ = made("dino", RunFacts(batch=IMAGES))
    other, batch = made("dino", RunFacts(batch=IMAGES, ranks=ranks.size, group=ranks.group))
    step.float()
    other.float()
    batch = batch._replace(views=[view.float() for view in batch.views])
    sharding.shard(other, ranks)
    each = IMAGES // ranks.size
    part = part_of(batch, slice(ranks.rank * each, (ranks.rank + 1) * each))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = other(part, 0)
        expected, _ = step(batch, 0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(mean(loss.detach()), expected.detach(), rtol=1e-3, atol=0)
    loss.backward()
    expected.backward()
    norms = []
    for one in (other, step):
        gradients = [p for p in one.parameters() if p.grad is not None]
        assert {p.grad.dtype for p in gradients if p.grad is not None} == {torch.float32}
        norms.append(optim.clip_(gradients, 1e9))
    torch.testing.assert_close(*norms, rtol=1e-2, atol=0)
    clip, _ = made("clip", RunFacts())
    with pytest.raises(ValueError, match=r"--shard with --precision fp16: method\.log_scale is a single number"):
        sharding.shard(clip, ranks, scaled=True)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = optimizer_of(other)
    optim.Schedule(steps=2, learning_rate=0.1).apply(optimizer, 0)
    before = [local(p).clone() for p in other.parameters()]
    for overflows in (True, False):
        optimizer.zero_grad()
        loss, _ = other(part, 0)
        scaler.scale(loss).backward()
        if overflows and ranks.rank == 1:
            # In rank 1's shard alone; the tokens, [1, 1, D], are the first rank's.
            local(max((p.grad for p in other.parameters() if p.grad is not None), key=len)).fill_(torch.inf)
        scaler.unscale_(optimizer)
        norm = optim.clip_([p for p in other.parameters() if p.requires_grad], 1e9)
        scaler.step(optimizer, teacher_momentum=0.9)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert norm.isfinite().item() is not overflows
        stand = [torch.equal(local(p), b) for p, b in zip(other.parameters(), before, strict=True) if len(b) > 1]
        assert all(stand) if overflows else not any(stand)


def check_momentum_copies(ranks: Ranks) -> None:
    """Shard by shard in one launch, on meshes of one and two dimensions; what goes together is sharded alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def network(seed: int, mesh: Any = None) -> nn.Module:
        torch.manual_seed(seed)
        found = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Sequential(nn.Linear(7, 3)))
        if mesh is not None:
            fully_shard(found[2], mesh=mesh)
            fully_shard(found, mesh=mesh)
        return found

    size = ranks.size
    line = init_device_mesh("cpu", (size,))
    names = "copies", "shards"  # what is copied between machines and sharded within them
    planes = [init_device_mesh("cpu", shape, mesh_dim_names=names) for shape in ((1, size), (2, size // 2))]
    contract = "ema_update_: teacher and student must be sharded alike, got"
    for mesh in (line, *planes):
        student, teacher = network(0, mesh), network(1, mesh)
        expected, plain = network(1), network(0)
        update_momentum(plain, expected, 0.9)
        with unittest.mock.patch.object(weights, "ops", wraps=operators) as ops:
            update_momentum(student, teacher, torch.tensor(0.9))
        assert ops.ema_update_.call_count == 1
        same({n: whole(p) for n, p in teacher.named_parameters()}, dict(expected.named_parameters()), str(mesh))
        for pair in ((plain, teacher), (student, expected)):  # one of the two is whole
            before = [whole(p).clone() for p in pair[1].parameters()]
            with pytest.raises(ValueError, match=contract):
                update_momentum(*pair, 0.5)
            assert all(torch.equal(whole(p), b) for p, b in zip(pair[1].parameters(), before, strict=True))
        elsewhere = network(0, planes[0] if mesh is line else line)
        with pytest.raises(ValueError, match=contract):
            ema_update_(teacher.parameters(), elsewhere.parameters(), 0.5)
    one, other = (network(0, mesh) for mesh in planes)
    with pytest.raises(ValueError, match=r"placements .* on DeviceMesh.*and the same on DeviceMesh"):
        ema_update_(one.parameters(), other.parameters(), 0.5)


def check_methods(rank: int, world: int, store: str, names: tuple[str, ...]) -> None:
    ranks = begin(rank, world, store)
    small_options("distill")
    for name in names:
        check_method(name, ranks)
    dist.destroy_process_group()


def check_quick(rank: int, world: int, store: str, images: str, out: str) -> None:
    ranks = begin(rank, world, store)
    for name in QUICK:
        check_method(name, ranks, steps=2)
    check_whole_states(ranks)
    check_channels_last(ranks)
    check_accumulation(ranks)
    check_micro_batches(ranks, ("simclr", "dino", "mae"))
    check_memory(ranks)
    check_precision(ranks)
    check_momentum_copies(ranks)
    test_sharding_runs.run(rank, world, images, out)
    dist.destroy_process_group()


def test_two_ranks_in_shards_are_one(tmp_path: Path) -> None:
    """All that needs ranks, in one start of them; and whole runs."""
    images = str(make_folder(tmp_path / "images", 48))
    mp.spawn(check_quick, (2, str(tmp_path / "store"), images, str(tmp_path)), nprocs=2)
    test_sharding_runs.check(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("world", "names"), [(2, tuple(METHODS)), (4, FAMILIES)])
def test_every_method_in_shards_is_that_of_one_rank(world: int, names: tuple[str, ...], tmp_path: Path) -> None:
    mp.spawn(check_methods, (world, str(tmp_path / "store"), names), nprocs=world)
