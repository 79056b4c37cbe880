"""What heads, losses and methods are made of: first weights, and what moves once a step however many micro-batches."""

import inspect

import pytest
import torch
from torch import Tensor

import fastjem.nn as nn
from fastjem.nn import heads, parts

MICRO_BATCHES = (3, 1, 5, 2)  # rows of each


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear+bias"),
        ({"last_bias": False}, "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear"),
        ({"last_norm": True}, "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d"),
        ({"norm": "none", "activation": torch.nn.GELU}, "Linear+bias GELU Linear+bias GELU Linear+bias"),
        ({"norm": "layer"}, "Linear LayerNorm ReLU Linear LayerNorm ReLU Linear+bias"),
        ({"bias": True}, "Linear+bias BatchNorm1d ReLU Linear+bias BatchNorm1d ReLU Linear+bias"),
        ({"norm": "none", "bias": False}, "Linear ReLU Linear ReLU Linear"),
    ],
)
def test_layers_of_an_mlp(options, expected):
    torch.manual_seed(3)
    mlp = parts.MLP(4, 7, 6, 5, **options)
    names = [type(layer).__name__ + "+bias" * (getattr(layer, "bias", None) is not None) for layer in mlp]
    assert [name.removesuffix("+bias") if "Norm" in name else name for name in names] == expected.split()
    torch.manual_seed(3)  # a linear layer draws its weight and its bias when it is made, norms draw nothing
    for layer in mlp:
        if isinstance(layer, torch.nn.Linear):
            again = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            assert torch.equal(again.weight, layer.weight)
    x = torch.randn(8, 4)
    torch.testing.assert_close(mlp[2:](mlp[:2](x)), mlp(x))


def test_the_last_norm_without_a_scale():
    last = parts.MLP(4, 6, 5, last_norm=True, last_affine=False)[-1]
    assert isinstance(last, torch.nn.BatchNorm1d) and last.weight is None
    with pytest.raises(ValueError, match="MLP: norm must be one of batch, layer, none, got 'group'"):
        parts.MLP(4, 5, norm="group")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in nn.__all__
        if name.endswith(("Head", "Prototypes")) and name not in ("ProjectionHead", "SMoGPrototypes")
    ],
)
@pytest.mark.filterwarnings("ignore")  # lightly's DINO head uses what torch calls deprecated
def test_a_seed_gives_lightlys_first_weights(name, monkeypatch):
    theirs = pytest.importorskip("lightly.models.modules.heads", reason="lightly is not installed")
    if torch.__version__ >= "2.12":
        # lightly has a copy of trunc_normal_ as it was in 2.11; torch 2.15 draws the same distribution by rejection.
        monkeypatch.setattr(theirs.utils, "_no_grad_trunc_normal", torch.nn.init.trunc_normal_)
    states = []
    for module in (getattr(nn, name), getattr(theirs, name)):
        required = {
            key: 6
            for key, parameter in inspect.signature(module.__init__).parameters.items()
            if key in ("input_dim", "hidden_dim", "output_dim", "bottleneck_dim", "n_prototypes")
        }
        torch.manual_seed(5)
        states.append(module(**required).state_dict())
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_a_projection_head_takes_blocks_and_layers():
    blocks = [(4, 6, torch.nn.BatchNorm1d(6), torch.nn.ReLU()), (6, 5, None, None)]
    head = nn.ProjectionHead(blocks)
    same = heads.BYOLProjectionHead(4, 6, 5)
    same.load_state_dict(head.state_dict())
    x = torch.randn(8, 4)
    torch.testing.assert_close(head(x), same(x))


def test_prototypes_are_of_unit_length_and_frozen_at_first():
    prototypes = parts.Prototypes(4, 9, frozen_steps=2)
    with torch.no_grad():
        prototypes.weight.mul_(3)
    x = torch.randn(5, 4)
    for step, live in ((0, False), (1, False), (2, True)):
        prototypes.weight.grad = None
        scores = prototypes(x, torch.tensor(step))
        torch.testing.assert_close(scores, x @ torch.nn.functional.normalize(prototypes.weight, dim=1).T)
        scores.square().sum().backward()
        assert prototypes.weight.grad.any() == live
    torch.testing.assert_close(prototypes.unit_weight(torch.tensor(5)).norm(dim=1), torch.ones(9))


# Once a step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 11, 13, 40])
def test_a_queue_takes_micro_batches_as_one_batch(length):
    held, pushed = (parts.Queue(length, 3, held=sum(MICRO_BATCHES)).double() for _ in range(2))
    pushed.load_state_dict(held.state_dict())
    assert set(held.state_dict()) == {"rows", "pointer", "came"}  # what is held isn't saved
    for step in range(5):
        batch = drawn(sum(MICRO_BATCHES), 3, seed=step)
        before = held.rows.clone()
        for part in batch.split(MICRO_BATCHES):
            held.hold(part)
        assert torch.equal(held.rows, before)
        held.step_ends()
        pushed.push(batch)
        assert torch.equal(held.rows, pushed.rows) and held.pointer == pushed.pointer and held.came == pushed.came > 0
    held.step_ends()  # nothing was held
    assert torch.equal(held.rows, pushed.rows) and held.pointer == pushed.pointer


def test_a_queue_is_not_used_before_the_first_key():
    queue = parts.Queue(6, 2, held=4)
    keys = torch.nn.functional.normalize(torch.randn(4, 2), dim=1)
    queue.step_ends()
    assert not queue.came
    assert torch.equal(queue.begin(keys), keys[[0, 1, 2, 3, 0, 1]])
    queue.hold(keys[:1])
    queue.step_ends()
    rows = queue.rows.clone()
    assert torch.equal(queue.begin(keys.flip(0)), rows) and torch.equal(queue.rows, rows)
    with pytest.raises(ValueError, match="Queue: hold needs"):
        parts.Queue(6, 2).hold(keys)


def test_more_rows_than_a_step_may_hold_leave_the_last():
    queue = parts.Queue(7, 1, held=4)
    before = queue.rows.clone()
    for part in torch.arange(6.0)[:, None].split((1, 5)):
        queue.hold(part)
    queue.step_ends()
    expected = before.flatten().tolist()
    expected[2:6] = [2, 3, 4, 5]
    assert queue.rows.flatten().tolist() == expected and queue.pointer == 6


def test_what_moves_once_a_step_waits_for_no_device():
    """A full graph has no value that the host reads."""
    queue, center = parts.Queue(5, 3, held=4), parts.Center((3,))

    def step(keys: Tensor) -> None:
        queue.hold(keys)
        center.hold(keys.mean(0), len(keys))
        queue.step_ends()
        center.step_ends(None)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    keys = torch.randn(2, 3)
    for _ in range(3):
        compiled(keys)
    assert queue.pointer == 1 and torch.equal(queue.rows[4], keys[0])
    torch.testing.assert_close(center.value, (1 - 0.9**3) * keys.mean(0))


@pytest.mark.parametrize("size", [(6,), (1, 6)])
def test_a_centre_moves_once_for_all_micro_batches(size):
    held, moved = parts.Center(size, momentum=0.8).double(), parts.Center((1, 6), momentum=0.8).double()
    assert set(held.state_dict()) == {"center"}
    for step in range(3):
        batch = drawn(sum(MICRO_BATCHES), 6, seed=step)
        for part in batch.split(MICRO_BATCHES):
            held.hold(part.mean(0), len(part))
        held.step_ends(None)
        moved.update(batch)
        torch.testing.assert_close(held.value.flatten(), moved.value.flatten(), rtol=1e-12, atol=1e-15)
    held.step_ends(None)  # nothing was held
    torch.testing.assert_close(held.value.flatten(), moved.value.flatten(), rtol=1e-12, atol=1e-15)


def test_a_held_mean_of_nan_moves_the_centre_to_nan():
    center = parts.Center((2,))
    center.hold(torch.tensor([torch.nan, 1.0]), 3)
    center.step_ends(None)
    assert center.value.isnan().tolist() == [True, False]


def dino_batches(step: int) -> tuple[Tensor, Tensor]:
    """Teacher [2, B, K] and student [4, B, K]."""
    rows = sum(MICRO_BATCHES)
    return drawn(2, rows, 9, seed=2 * step), drawn(4, rows, 9, seed=2 * step + 1)


def test_dinos_centre_moves_once_for_all_micro_batches():
    whole = nn.DINOLoss(9).double()
    deferred = nn.DINOLoss(9, defer_center_update=True).double()
    deferred.load_state_dict(whole.state_dict())
    for step in range(3):
        teacher, student = dino_batches(step)
        losses = []
        for t, s in zip(teacher.split(MICRO_BATCHES, 1), student.split(MICRO_BATCHES, 1), strict=True):
            losses.append(deferred(list(t), list(s)) * t.shape[1])
        loss = whole(list(teacher), list(student))
        torch.testing.assert_close(sum(losses) / sum(MICRO_BATCHES), loss, rtol=1e-12, atol=0)  # of the same centre
        deferred.step_ends()
        torch.testing.assert_close(deferred.center, whole.center, rtol=1e-12, atol=1e-15)
    at_once = nn.DINOLoss(9).double()
    for t, s in zip(teacher.split(MICRO_BATCHES, 1), student.split(MICRO_BATCHES, 1), strict=True):
        at_once(list(t), list(s))
    assert (at_once.center - 0.1 * teacher.mean((0, 1))).abs().max() > 1e-3  # what the switch is for


def test_ibots_centre_moves_once_for_all_micro_batches():
    whole = nn.IBOTPatchLoss(9).double()
    deferred = nn.IBOTPatchLoss(9, defer_center_update=True).double()
    deferred.load_state_dict(whole.state_dict())
    masks = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    patches = [int(mask.sum()) for mask in masks]
    for step in range(2):
        teacher, student = drawn(sum(patches), 9, seed=step), drawn(sum(patches), 9, seed=step + 9)
        whole(teacher, student, masks)
        for mask, t, s in zip(masks, teacher.split(patches), student.split(patches), strict=True):
            deferred(t, s, mask[None])
        deferred.step_ends()
        torch.testing.assert_close(deferred.center.value, whole.center.value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [nn.DINOLoss, nn.IBOTPatchLoss])
def test_update_center_may_be_overridden(loss):
    seen = []

    class Watched(loss):
        def update_center(self, teacher_out: Tensor) -> None:
            seen.append(teacher_out)
            super().update_center(teacher_out)

    class Still(loss):
        def update_center(self, teacher_out: Tensor) -> None:
            pass

    teacher, student = dino_batches(0)
    mask = torch.ones(1, len(teacher[0]), 1, dtype=torch.bool)

    def run(module) -> Tensor:
        module.double()
        arguments = (list(teacher), list(student)) if loss is nn.DINOLoss else (teacher[0], student[0], mask)
        module(*arguments)
        return module.state_dict().popitem()[1].flatten()

    expected = run(loss(9))
    torch.testing.assert_close(run(Watched(9)), expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(seen[0], teacher if loss is nn.DINOLoss else teacher[0])
    assert not run(Still(9)).any()
    patched = loss(9)
    patched.update_center = lambda teacher_out: None
    assert not run(patched).any()
    by_hand = loss(9).double()
    by_hand.update_center(teacher if loss is nn.DINOLoss else teacher[0])
    torch.testing.assert_close(by_hand.state_dict().popitem()[1].flatten(), expected, rtol=1e-12, atol=1e-15)


def test_ticos_covariance_moves_once_for_all_micro_batches():
    whole, deferred = nn.TiCoLoss(beta=0.7), nn.TiCoLoss(beta=0.7, defer_covariance_update=True)
    for step in range(3):
        views = drawn(2, sum(MICRO_BATCHES), 4, seed=step)
        whole(*views)
        for part in views.split(MICRO_BATCHES, 1):
            deferred(*part)
        deferred(*views, update_covariance_matrix=False)
        deferred.step_ends()
        torch.testing.assert_close(deferred.C, whole.C, rtol=1e-12, atol=1e-15)
    assert set(deferred.state_dict()) == {"C"}
    deferred.step_ends()  # nothing was held
    torch.testing.assert_close(deferred.C, whole.C, rtol=1e-12, atol=1e-15)


def test_a_memory_bank_takes_micro_batches_as_one_batch():
    rows = sum(MICRO_BATCHES)
    whole = nn.NTXentLoss(memory_bank_size=(16, 4)).double()
    deferred = nn.NTXentLoss(memory_bank_size=(16, 4), rows_per_step=rows).double()
    deferred.load_state_dict(whole.state_dict())
    for step in range(3):
        views = drawn(2, rows, 4, seed=step).requires_grad_()
        loss = whole(*views)
        parts_of_loss = [deferred(*part) * part.shape[1] for part in views.split(MICRO_BATCHES, 1)]
        torch.testing.assert_close(sum(parts_of_loss) / rows, loss, rtol=1e-12, atol=0)
        deferred.step_ends()
        assert torch.equal(deferred.memory_bank.bank, whole.memory_bank.bank)
        assert torch.equal(deferred.memory_bank.bank_ptr, whole.memory_bank.bank_ptr)
    nearest = nn.NNMemoryBankModule((16, 4), rows_per_step=rows)
    before = nearest.bank.clone()
    nearest(views[0].float(), update=True)
    assert torch.equal(nearest.bank, before)
    nearest.step_ends()
    assert torch.equal(nearest.bank[:rows], views[0].float())


def test_a_warm_up_is_linear_and_stays():
    values = [parts.linear_warmup(torch.tensor(step), 0.04, 0.07, 3) for step in range(6)]
    torch.testing.assert_close(torch.stack(values), torch.tensor([0.04, 0.05, 0.06, 0.07, 0.07, 0.07]))
    assert parts.linear_warmup(torch.tensor(0), 0.04, 0.07, 0).dim() == 0
