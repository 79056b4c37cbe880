"""What only a GPU can show: graph capture, no host sync, offsets past 2^31 elements, the device guard."""

import pytest
import torch
from conftest import HAS_GPU

import fastjem.functional as F
from fastjem import optim

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]


def _cross_entropy():
    x = torch.randn(64, 3000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, 3000, (64,), device="cuda")
    return [x], lambda: F.cross_entropy(x, y)


def _negative_cosine():
    p, z = (torch.randn(64, 256, device="cuda", requires_grad=True) for _ in range(2))
    return [p, z], lambda: F.negative_cosine(p, z)


def _nt_xent():
    z = torch.randn(2, 300, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return [z], lambda: F.nt_xent(z)


def _info_nce():
    q = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bank = torch.randn(5000, 128, device="cuda", dtype=torch.bfloat16)
    return [q], lambda: F.info_nce(q, q.detach(), bank)


def _clip_loss():
    x, y = (torch.randn(300, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.tensor(0.1, device="cuda", requires_grad=True)
    return [x, y, scale], lambda: F.clip_loss(x, y, scale)


LOSSES = {
    "cross_entropy": _cross_entropy,
    "negative_cosine": _negative_cosine,
    "nt_xent": _nt_xent,
    "info_nce": _info_nce,
    "clip_loss": _clip_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_host_sync(name):
    inputs, loss = LOSSES[name]()
    torch.autograd.grad(loss(), inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss(), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LOSSES)
def test_graph_replay_computes_on_new_data(name):
    inputs, loss = LOSSES[name]()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss()
        gradients = torch.autograd.grad(captured, inputs)
    with torch.no_grad():
        for x in inputs:
            x.normal_()
    graph.replay()
    expected = loss()
    assert torch.equal(captured, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert torch.equal(a, b)


def test_ema_update_in_a_graph_follows_its_momentum():
    teacher, student = ([torch.randn(n, device="cuda") for n in (5, 1000, 70_001)] for _ in range(2))
    momentum = torch.tensor(0.9, dtype=torch.float64, device="cuda")
    F.ema_update_(teacher, student, momentum)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.ema_update_(teacher, student, momentum)
    momentum.fill_(0.25)
    expected = [0.25 * t + 0.75 * s for t, s in zip(teacher, student, strict=True)]
    graph.replay()
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [optim.AdamW, optim.LARS])
def test_a_step_with_new_gradients_waits_for_nothing(make):
    """Their addresses are copied from pinned memory; the table isn't made again."""
    parameters = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (5, 1000, 70_001)]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(4)]
    optimizer = make(parameters)

    def step(i: int) -> None:
        for p, g in zip(parameters, gradients[i], strict=True):
            p.grad = g
        optimizer.step()

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 4):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in parameters)


def test_offsets_past_2_31_elements():
    """The last rows of a matrix of more than 2^31 elements, and one tensor of that size."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    k = 131_072
    n = 2**31 // k + 3
    x = torch.zeros(n, k, device="cuda", dtype=torch.float16)
    x[-1].normal_()
    y = torch.arange(n, device="cuda") % k
    x.requires_grad_()
    loss = F.cross_entropy(x, y)
    (gradient,) = torch.autograd.grad(loss * n, x)
    expected = x[-1].detach().float().softmax(0)
    expected[y[-1]] -= 1
    torch.testing.assert_close(gradient[-1].float(), expected, rtol=2e-3, atol=1e-6)
    del gradient

    tail = F.negative_cosine(x.detach()[-2:], x.detach()[-2:].flip(1))
    assert tail.isfinite()
    del x
    teacher = torch.zeros(2**31 + 1025, device="cuda")
    F.ema_update_([teacher], [torch.ones(1, device="cuda", dtype=torch.bfloat16).expand_as(teacher).contiguous()], 0.75)
    assert (teacher[-1025:] == 0.25).all() and teacher[0] == 0.25


def test_runs_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p, z = (torch.randn(4, 8, device="cuda:1") for _ in range(2))
    with torch.cuda.device(0):
        assert F.negative_cosine(p, z).device.index == 1


@pytest.fixture
def photographs(tmp_path):
    """Files in a folder and in a tar file."""
    pytest.importorskip("torchvision")
    import tarfile

    from images import make_folder

    folder = make_folder(tmp_path / "folder", 24, size=64)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.add(path, str(path.relative_to(folder)))
    return folder, tmp_path / "a.tar"


@pytest.mark.parametrize("name", ["torch", "memory", "dali"])
@pytest.mark.parametrize("stored", [0, 1], ids=["folder", "tar"])
def test_loaders_hand_out_views_on_the_gpu(name, stored, photographs):
    """Those of the torch loader on the CPU, within a level; DALI's within what its edges and decoders differ by."""
    from fastjem.data import loaders
    from fastjem.data.batch import finish
    from fastjem.data.loaders import Budget, Order
    from fastjem.data.source import open_source
    from fastjem.data.views import Views

    source = open_source(photographs[stored])
    specs = Views(large=2, recipe="simclr").specs(64)
    order = Order(samples=24, batch=8, seed=1, stop=6)
    if name == "dali" and (why := loaders.dali.why_not("cuda")):
        pytest.skip(why)
    budget = Budget(workers=2, device=torch.device("cuda"))
    expected = loaders.create("torch", source, specs, order, Budget())
    busy = torch.randn(4096, 4096, device="cuda")
    for crops, other in zip(loaders.create(name, source, specs, order, budget), expected, strict=True):
        assert all(x.is_cuda for x in (*crops.views, *crops.tables, crops.index, crops.labels))
        busy = busy @ busy / 64  # the step's stream has work while the next batch is copied
        for mine, theirs, table, their_table in zip(crops.views, other.views, crops.tables, other.tables, strict=True):
            assert torch.equal(table.cpu(), their_table)
            off = (mine.cpu().int() - theirs.int()).abs()
            assert off.float().mean() < 2 if name == "dali" else off.max() <= 1
        assert torch.equal(crops.index.cpu(), other.index)
        views = finish(crops, specs, "cuda").views
        assert all(view.is_cuda and view.isfinite().all() for view in views)


def test_a_batch_is_copied_without_a_host_sync(photographs):
    from fastjem.data.loaders import Budget, Order, create
    from fastjem.data.source import open_source
    from fastjem.data.views import Views

    source = open_source(photographs[0])
    specs = Views(large=2, recipe="simclr").specs(32)
    for name in ("torch", "memory"):
        batches = iter(
            create(name, source, specs, Order(samples=24, batch=8, stop=6), Budget(device=torch.device("cuda")))
        )
        next(batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
