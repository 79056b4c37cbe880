"""augment and crop_resize: against torchvision on uint8, and against the specification in float64."""

import pytest
import torch
from view_tables import neutral, pictures, torchvisions, view_table

import fastjem.functional as F
from fastjem.kernels.augment import columns as table

op = pytest.mark.parametrize("op", ["augment"])
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # the result in levels
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def against_torchvision(images, parameters, implementation, exact=True) -> torch.Tensor:
    """[B, 3, H, W]: the difference in levels."""
    ours = F.augment(images.to(implementation.device), parameters.to(implementation.device), exact=exact, **LEVELS)
    theirs = torch.stack([torchvisions(*pair) for pair in zip(images, parameters, strict=True)])
    return (ours.cpu() - theirs).abs()


STEPS = [
    ("flip", [1], 1e-3),
    ("solarize", [1], 1e-3),
    ("grayscale", [1], 1.001),
    ("brightness", [0, 0.3, 1.7], 1.001),
    ("contrast", [0, 0.3, 1.7], 1.001),
    ("saturation", [0, 0.3, 1.7], 1.001),
    ("hue", [-0.5, -0.21, 0.05, 0.3, 0.5], 1.001),
    ("sigma", [0.1, 0.34, 1.1, 2.0, 5.5], 1.001),
]


@op
@pytest.mark.parametrize("step, values, levels", STEPS, ids=[step for step, *_ in STEPS])
def test_each_step_is_torchvisions(op, step, values, levels, implementation):
    parameters = neutral(len(values))
    parameters[:, getattr(table, step.upper())] = torch.tensor(values)
    images = pictures(len(values), 27, 34)
    difference = against_torchvision(images, parameters, implementation)
    assert difference.max() <= levels
    assert (difference > 0.5).float().mean() < 2e-3  # values that lie on the edge of being cut off
    plain = F.augment(images.to(implementation.device), neutral(len(values)).to(implementation.device), **LEVELS)
    assert (plain.cpu() - images.permute(0, 3, 1, 2)).abs().max() < 1e-3


@op
def test_all_orders_are_torchvisions(op, implementation):
    images, parameters = pictures(24, 15, 30), view_table(24, seed=3)
    exact = against_torchvision(images, parameters, implementation)
    assert exact.max() <= 5 and exact.mean() < 0.02
    fractions = against_torchvision(images, parameters, implementation, exact=False)
    assert fractions.max() <= 7 and fractions.mean() <= 1.5


SHAPES = [(1, 1, 1), (2, 1, 9), (2, 9, 1), (24, 9, 21), (3, 33, 40), (2, 20, 131), (3, 41, 18)]
VALUES = [(torch.float32, shape) for shape in SHAPES] + [(torch.bfloat16, (6, 9, 21)), (torch.float16, (6, 9, 21))]


@op
@pytest.mark.parametrize("dtype, shape", VALUES, ids=str)
def test_value_and_layouts(op, dtype, shape, implementation, poisoned):
    """Solarizing at 127.5 doesn't jump there, so that fractions may be compared."""
    images, parameters = pictures(*shape, seed=1), view_table(shape[0], seed=shape[0] + 1)
    expected = F.augment(images, parameters.double(), dtype=torch.float64, threshold=127.5, **NORMAL)
    # A thousandth of a level (255 x 0.229 of them are 1). In half precision half a unit in the last place (Triton's
    # interpreter cuts bfloat16 off: a whole one), and 1/256 of a level: a GPU sets blurred rows aside in 16 bits.
    half, interpreted = dtype != torch.float32, implementation.name == "triton" and implementation.device == "cpu"
    tolerance = torch.finfo(dtype).eps * expected.abs() * (0.5001 if half and not interpreted else 1)
    tolerance += 1e-4 if half else 2e-5
    x, p = images.to(implementation.device), parameters.to(implementation.device)
    strided = x.new_zeros(shape[0] + 1, *shape[1:], 4)[1:, :, :, :3].copy_(x)
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    layouts = ((x, p, False), (strided, p, True), (planes, p.T.contiguous().T, False))
    for some, columns, last in layouts[: 2 if interpreted else 3]:  # the interpreter is slow
        y = F.augment(some, columns, dtype=dtype, channels_last=last, threshold=127.5, **NORMAL)
        assert y.dtype == dtype and y.shape == (shape[0], 3, *shape[1:3])
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert ((y.cpu().double() - expected).abs() <= tolerance).all()


@op
@pytest.mark.parametrize("threshold", [0.0, 77.0, 256.0])
def test_the_threshold_of_solarizing(op, threshold, implementation):
    images, parameters = pictures(2, 12, 20), neutral(2)
    parameters[:, table.SOLARIZE] = 1
    x, p = images.to(implementation.device), parameters.to(implementation.device)
    y = F.augment(x, p, threshold=threshold, **LEVELS).cpu()
    levels = images.permute(0, 3, 1, 2).float()
    assert (y - torch.where(levels >= threshold, 255 - levels, levels)).abs().max() < 1e-3


@op
def test_a_blurred_black_is_above_a_threshold_of_0(op, implementation):
    """Also where a GPU sets it aside in 16 bits, and what comes back is 0 but for the last digit."""
    p = neutral(12)
    p[:, table.SIGMA], p[:, table.SOLARIZE] = torch.linspace(0.4, 3.1, 12), 1
    black = torch.zeros(
        12, 9, 21, 3, dtype=torch.uint8, device=implementation.device
    )  # as in VALUES, whose kernel it is
    y = F.augment(black, p.to(implementation.device), dtype=torch.float16, threshold=0.0, **NORMAL).cpu().float()
    mean, std = (torch.tensor(NORMAL[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(y, ((1 - mean) / std).expand_as(y), rtol=1e-3, atol=1e-3)


def test_images_that_begin_within_a_word_are_read_in_bytes(monkeypatch):
    """A GPU has no word there: of a view into the bytes of a file, say."""
    pytest.importorskip("triton")
    from fastjem.kernels import launch
    from fastjem.kernels.augment import gpu

    quads = []
    monkeypatch.setattr(launch, "launch", lambda *_, QUADS, **__: quads.append(QUADS))
    memory = torch.zeros(2 * 5 * 8 * 3 + 4, dtype=torch.uint8)
    for first in range(5):
        images = memory[first : len(memory) - 4 + first].view(2, 5, 8, 3)
        gpu.augment(images, neutral(2), *([0.5] * 3 for _ in range(2)), torch.float32, False, False, 128.0)
    assert quads == [True, False, False, False, True]


@op
def test_an_image_alone_has_the_bits_it_has_in_a_batch(op, implementation):
    images, p = pictures(7, 16, 18).to(implementation.device), view_table(7, seed=5).to(implementation.device)
    together = F.augment(images, p, **NORMAL)
    assert torch.equal(together, F.augment(images, p, **NORMAL))
    if implementation.name != "reference":  # torch's sums depend on the number of threads
        assert torch.equal(together[4:5], F.augment(images[4:5], p[4:5], **NORMAL))


@op
def test_values_out_of_range(op, implementation):
    """The nearest in the range; and nothing hangs or reads outside at NaN and infinity."""
    images, p = pictures(4, 16, 18), view_table(4, seed=2)
    near = p.clone()
    p[:, table.ORDER], near[:, table.ORDER] = torch.tensor([99.0, -3.0, 24.0, 1e30]), torch.tensor([23.0, 0, 23, 23])
    p[:, table.SIGMA], near[:, table.SIGMA] = torch.tensor([-1.0, 0, 0, -5]), 0
    x = images.to(implementation.device)
    a, b = (F.augment(x, q.to(implementation.device), **NORMAL) for q in (p, near))
    assert torch.equal(a, b)
    if implementation.name != "reference":
        p[0, 4:], p[1, 4:], p[2, table.SIGMA] = float("nan"), float("inf"), float("inf")
        assert torch.equal(F.augment(x, p.to(implementation.device), **NORMAL)[3], b[3])


@op
def test_compiles_in_one_graph(op, implementation):
    images, p = pictures(3, 8, 18).to(implementation.device), view_table(3).to(implementation.device)
    torch._dynamo.reset()
    step = torch.compile(lambda x, q: F.augment(x, q, **NORMAL) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(images, p), F.augment(images, p, **NORMAL) + 1)


crop = pytest.mark.parametrize("op", ["crop_resize"])
# height and width of images, and of views
WINDOWS = [(40, 53, 24), (32, 32, 32), (9, 14, 31), (1, 1, 3), (70, 3, 5), (40, 53, (24, 36)), (32, 32, (40, 9))]


@crop
@pytest.mark.parametrize("bicubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("height, width, size", WINDOWS, ids=str)
def test_the_values_of_a_window_are_torchs(op, bicubic, height, width, size, implementation):
    """Within a level of torch on uint8, whose weights have 16 bits, and mostly the same."""
    out = (size, size) if isinstance(size, int) else size
    images = pictures(3, height, width, seed=2)
    few = 3 if implementation.name == "triton" and implementation.device == "cpu" else 8
    indices = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2])[:few]
    p = view_table(few, seed=4, height=height, width=width)
    p[0, : table.WIDTH + 1] = torch.tensor([0, 0, height, width])
    ours = F.crop_resize(*(x.to(implementation.device) for x in (images, indices, p)), size=size, bicubic=bicubic)
    theirs = torch.empty_like(ours, device="cpu")
    for view, index, (top, left, h, w) in zip(theirs, indices, p[:, :4].int().tolist(), strict=True):
        window = images[index, top : top + h, left : left + w].permute(2, 0, 1)[None]
        mode = "bicubic" if bicubic else "bilinear"
        resized = torch.nn.functional.interpolate(window, out, mode=mode, antialias=True)
        view.copy_(resized[0].permute(1, 2, 0))
    difference = (ours.cpu().int() - theirs.int()).abs()
    assert ours.shape == (few, *out, 3)
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.06


@crop
@pytest.mark.parametrize("bicubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(12, 31), (31, 12), (3, 37)], ids=str)
def test_views_that_are_no_squares_are_those_of_float64(op, bicubic, size, implementation):
    """Columns and then rows by torch's float64 interpolation, rounded behind each as the specification says."""
    images, mode = pictures(2, 29, 40, seed=5), "bicubic" if bicubic else "bilinear"
    indices, p = torch.tensor([1, 0, 1]), view_table(3, seed=6, height=29, width=40)
    ours = F.crop_resize(*(x.to(implementation.device) for x in (images, indices, p)), size=size, bicubic=bicubic)
    for view, index, (top, left, h, w) in zip(ours.cpu(), indices, p[:, :4].int().tolist(), strict=True):
        x = images[index, top : top + h, left : left + w].permute(2, 0, 1)[None].double()
        for sides in ((h, size[1]), size):
            x = torch.nn.functional.interpolate(x, sides, mode=mode, antialias=True).add(0.5).floor().clamp(0, 255)
        difference = (view.permute(2, 0, 1) - x[0]).abs()
        assert difference.max() <= 1 and (difference > 0).double().mean() < 0.03  # exact halves


@crop
def test_windows_are_cut_to_the_image(op, implementation):
    images = pictures(2, 12, 15)
    wild, tame = neutral(4), neutral(4)
    wild[:, :4] = torch.tensor([[-5, 3, 99, 6], [4, -1e30, 5, 1e30], [50, 50, 3, 3], [2.5, 3.5, 4.9, 0]])
    tame[:, :4] = torch.tensor([[0, 3, 12, 6], [4, 0, 5, 15], [11, 14, 1, 1], [2, 3, 4, 1]])
    indices = torch.tensor([1, 0, 1, 0])
    a, b = (F.crop_resize(*(x.to(implementation.device) for x in (images, indices, p)), size=7) for p in (wild, tame))
    assert torch.equal(a, b)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).to(implementation.device)
    assert torch.equal(b, F.crop_resize(strided, indices.to(a.device), tame.to(a.device), size=7))
    if implementation.device == "cpu" and implementation.name != "triton":
        with pytest.raises(IndexError):
            F.crop_resize(images, indices + 1, tame, size=7)
