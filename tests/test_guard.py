"""Every operator refuses what its kernel would read or write beyond: memory that isn't there, shapes and dtypes that
don't fit one another. And grids are such as a GPU takes."""

import functools
import importlib

import pytest
import torch
from poisoned import flat
from test_operators import sample_arguments

import fastjem.functional as F
from fastjem import ops
from fastjem.kernels import guard, shapes


def replaced(arguments, number, change):
    """The arguments with their tensor of this number changed."""
    tensors = iter(range(len(flat(arguments))))

    def walk(x):
        if isinstance(x, torch.Tensor):
            return change(x.clone()) if next(tensors) == number else x
        return type(x)(map(walk, x)) if isinstance(x, (list, tuple)) else x

    return walk(arguments)


def freed(x):
    x.untyped_storage().resize_(0)
    return x


def shortened(x):
    x.untyped_storage().resize_(x.nbytes - x.itemsize)
    return x


def freed_behind_an_offset(x):
    y = torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape)
    y.untyped_storage().resize_(0)
    return y


@pytest.mark.parametrize("change", [freed, shortened, freed_behind_an_offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_memory_that_is_not_there_is_refused(op, change):
    """With a null pointer the process would be gone."""
    arguments = sample_arguments("cpu")[op]
    for number in range(len(flat(arguments))):
        with pytest.raises(ValueError, match=f"^{op}: a tensor's storage must hold its elements, got "):
            getattr(torch.ops.fastjem, op)(*replaced(arguments, number, change))


def test_memory_is_looked_at_where_rows_are_apart():
    x = torch.randn(4, 10)[:, :7]
    assert guard.holds_its_memory(x) and guard.holds_its_memory(x[1:].T) and guard.holds_its_memory(x[:0])
    assert guard.holds_its_memory(torch.randn(1).expand(5, 6))
    torch.func.vmap(lambda row: row * guard.holds_its_memory(row))(x)  # it has no storage of its own
    assert guard.holds_its_memory(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    x.untyped_storage().resize_(4 * 37)
    assert guard.holds_its_memory(x)
    x.untyped_storage().resize_(4 * 36)
    assert not guard.holds_its_memory(x) and guard.holds_its_memory(x[:3])


def one_row_less(x):
    return x[:-1].clone()


def one_column_less(x):
    return x[..., :-1].clone()


def flattened(x):
    return x.flatten()


# (operator, number of a tensor, change) that fit all the same: one side has other rows than the other, a bias may be of
# one view or of each.
FITTING = {
    *(
        (op, 0, one_row_less)
        for op in ("sinkhorn_step", "sinkhorn_rows", "sinkhorn_bias", "sinkhorn", "sinkhorn_codes")
    ),
    *((op, 0, one_column_less) for op in ("sinkhorn_bias", "sinkhorn", "characteristic")),
    *(
        (op, i, one_row_less)
        for op in ("clip_loss", "siglip_loss", "nearest_neighbors", "kmeans_step", "nearest_k")
        for i in (0, 1)
    ),
    *(("rescale_", 0, change) for change in (one_row_less, one_column_less, flattened)),
    *(("rescale_all_", i, change) for i in (0, 1) for change in (one_row_less, one_column_less, flattened)),
    ("info_nce", 2, one_row_less),
    ("supcon", 0, one_row_less),  # a view
    *((op, i, one_column_less) for op, i in (("supcon", 0), ("supcon_backward", 1))),
    ("nt_xent_of_views_backward", 1, one_column_less),  # the width is that of the rows alone
    ("koleo_neighbors", 0, one_row_less),
    *(("normalize_rows", 0, change) for change in (one_row_less, one_column_less)),
    *(("koleo", i, one_column_less) for i in (0, 1)),  # a width, and a number of neighbours
    ("characteristic", 0, one_row_less),
    *(("crop_resize", 0, change) for change in (one_row_less, one_column_less)),  # an image, and a channel
    *(("keyed_uniform", 0, change) for change in (one_row_less, one_column_less)),
    *((op, 0, one_row_less) for op in ("even_block_scores", "inverse_rectangle_masks", "multi_block_masks")),
}


@pytest.mark.parametrize("change", [one_row_less, one_column_less, flattened], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", shapes.SHAPES)
def test_shapes_that_do_not_fit_are_refused(op, change):
    """Of a raw operator, past the checks of the public function."""
    arguments = sample_arguments("cpu")[op]
    for number, x in enumerate(flat(arguments)):
        same = x.dim() == 0 or change(x).shape == x.shape
        if same or (op, number, change) in FITTING:
            continue
        with pytest.raises(ValueError, match=f"^{op}: "):
            getattr(torch.ops.fastjem, op)(*replaced(arguments, number, change))


def test_dtypes_that_do_not_fit_are_refused():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"cross_entropy: labels must be \[3\] int64, got \(3,\) int32"):
        torch.ops.fastjem.cross_entropy(x, torch.zeros(3, dtype=torch.int32), -100, [True])
    with pytest.raises(ValueError, match="negative_cosine: p and z must be of one shape and dtype"):
        torch.ops.fastjem.negative_cosine(x, x.double(), 1e-8, [True, True])
    with pytest.raises(ValueError, match="teacher be float32 or float64"):
        torch.ops.fastjem.ema_update_([x.half()], [x], torch.tensor(0.9))
    with pytest.raises(ValueError, match="every tensor must be on the CPU"):
        ops.cpp_launcher("rescale_")[0](x, torch.empty((), device="meta"))


def test_empty_rows_are_refused_where_work_is_divided_by_them():
    with pytest.raises(ValueError, match="cross_entropy: logits must not be empty"):
        torch.ops.fastjem.cross_entropy(torch.empty(3, 0), torch.zeros(3, dtype=torch.long), -100, [True])
    with pytest.raises(ValueError, match="vicreg: z0 and z1 must not be empty"):
        torch.ops.fastjem.vicreg(torch.empty(0, 4), torch.empty(0, 4), 25.0, 25.0, 1.0, 1e-4, 1, [True, True])


def test_sinkhorn_of_no_rows_adds_nothing_to_the_other_ranks(implementation):
    step = torch.ops.fastjem.sinkhorn_step
    for problems in ((), (3,)):
        for bias in (None, torch.zeros(*problems, 4, dtype=torch.float64, device=implementation.device)):
            none = step(torch.empty(*problems, 0, 4, device=implementation.device), bias, 0.05)
            assert torch.equal(none.cpu(), torch.full((*problems, 4), -torch.inf, dtype=torch.float64))


def test_every_operator_with_a_kernel_says_what_its_arguments_must_be():
    assert set(shapes.SHAPES) == {name for name, operator in ops.OPERATORS.items() if operator.cpu or operator.gpu}


def test_a_public_function_refuses_freed_memory():
    x = freed(torch.randn(8, 4, requires_grad=True).detach())
    y = torch.randn(8, 4)
    for mistake in (
        lambda: F.cross_entropy(x, torch.zeros(8, dtype=torch.long)),
        lambda: F.nt_xent(x, y),
        lambda: F.clip_loss(y, x, torch.tensor(10.0)),
        lambda: F.ema_update_([x], [y], 0.9),
        lambda: F.ema_update_([y], [x], 0.9),
        lambda: F.sinkhorn(x),
        lambda: F.vicreg(x, y),
    ):
        with pytest.raises(ValueError, match="storage must hold its elements"):
            mistake()


# Grids ---------------------------------------------------------------------------------------------------------------


def rows(n: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[n, width] whose rows are one and the same: no memory."""
    return torch.zeros(width, dtype=dtype).expand(n, width)


LARGE = {
    "prototype_cross_entropy": (
        ([rows(70_000, 1030)] * 2, [rows(70_000, 1030)] * 2, 0.1, 0.04, None, "different", None, True, [False] * 2),
        70_000 * 2,
    ),
    "sinkhorn": ((rows(140_000, 40), 0.05, 3, False, torch.float32), 140_000 // 16),
    "sinkhorn_codes": ((rows(70_000, 600), rows(1, 600)[0], 0.05, torch.float16), 70_000),
    "sinkhorn_rows": ((rows(70_000, 600), rows(1, 600)[0], 0.05), 70_000),
    "sinkhorn_step": ((rows(9_000_000, 3), rows(1, 3)[0], 0.05), 9_000_000 // 128),
    "siglip_loss": (
        (rows(1, 3), rows(5_000_000, 3), torch.ones(()), torch.ones(()), 0, [True, False]),
        5_000_000 // 64,
    ),
    "info_nce": ((rows(1, 3), rows(1, 3), rows(5_000_000, 3), None, -1, 0.1, [True] + [False] * 3), 5_000_000 // 64),
    "nearest_neighbors": ((rows(70_000, 3), rows(5, 3)), 70_000 // 64),
    "cross_entropy": ((rows(70_000, 3), torch.zeros(70_000, dtype=torch.long), -100, [True]), 70_000 // 64),
    "negative_cosine": ((rows(70_000, 3), rows(70_000, 3), 1e-8, [False, False]), 70_000 // 64),
    "nt_xent": ((rows(100_000, 3)[None].expand(2, 100_000, 3),) * 2 + (0, 0.5, False, True), 200_000 // 64),
    "vicreg": ((rows(300_000, 3), rows(300_000, 3), 25.0, 25.0, 1.0, 1e-4, 1, [True, True]), 2 * 300_000 // 128),
    "barlow_twins": ((rows(300_000, 3), rows(300_000, 3), 5e-3, 1, [False, False]), 1),
}


@pytest.mark.parametrize("op", LARGE)
def test_grids_of_large_inputs_are_such_as_a_gpu_takes(op, monkeypatch):
    """CUDA's second and third dimension end at 65,535. Launches are recorded, and nothing runs."""
    pytest.importorskip("triton")
    from fastjem.kernels import launch
    from fastjem.kernels.contrastive import gpu_engine

    grids = []

    def record(kernel, grid, *args, device_of, **meta):
        launch.check_grid(grid)
        grids.append(grid)

    monkeypatch.setattr(launch, "launch", record)
    monkeypatch.setattr(gpu_engine, "add_product", lambda *_, **__: None)
    arguments, programs = LARGE[op]
    launcher, _ = ops.triton_launcher(op)
    launcher(*arguments)
    assert max(functools.reduce(int.__mul__, grid) for grid in grids) >= programs


def similarities(op: str) -> tuple:
    """Arguments with several blocks of rows and of columns."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 16, generator=g) / 4 for n in (150, 200))
    logits = (10 * x @ y.T).double()
    scale = torch.tensor(10.0)
    if op == "siglip_loss":
        return x, y, scale, torch.tensor(-3.0), 2, [True, True]
    return x, y, scale, logits.logsumexp(1), logits.logsumexp(0), 2, [True, True]


@pytest.mark.parametrize("op", ["clip_loss_backward", "siglip_loss"])
def test_a_grid_of_one_dimension_has_every_tile_once(op, implementation):
    expected = flat(ops.plain(ops.reference(op))(*similarities(op)))
    arguments = [x.to(implementation.device) if isinstance(x, torch.Tensor) else x for x in similarities(op)]
    for got, wanted in zip(flat(getattr(torch.ops.fastjem, op)(*arguments)), expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_a_grid_that_a_gpu_does_not_take_is_refused():
    pytest.importorskip("triton")
    launch = importlib.import_module("fastjem.kernels.launch")
    launch.check_grid((1 << 20, 65535, 65535))
    with pytest.raises(ValueError, match=r"65535 programs beyond its first dimension, got \(1, 65536\)"):
        launch.check_grid((1, 65536))
