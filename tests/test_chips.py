"""Which tiles are chosen for which GPU. What they compile to is held by test_aot.py."""

from types import SimpleNamespace

import pytest
import torch

from fastjem import ops
from fastjem.kernels import chips, tiling
from fastjem.kernels.arithmetic import exact_products

HALF = torch.bfloat16


def chip(capability: int) -> chips.Chip:
    return chips.Chip.of(capability)


@pytest.mark.parametrize(
    "capability, kib, tensor_cores, roomy",
    [
        (75, 64, False, False),
        (80, 163, True, True),
        (86, 99, True, False),
        (89, 99, True, False),
        (90, 227, True, True),
        (100, 227, True, True),
        (120, 99, True, False),
        (130, 99, True, False),  # unknown: what runs since Ampere
        (72, 64, False, False),
    ],
)
def test_facts_of_a_chip(capability: int, kib: int, tensor_cores: bool, roomy: bool):
    found = chip(capability)
    assert (found.shared, found.tensor_cores, found.roomy) == (kib * 1024, tensor_cores, roomy)


def test_a_device_is_asked_and_a_smaller_multiprocessor_counts(monkeypatch: pytest.MonkeyPatch):
    devices = [
        SimpleNamespace(major=8, minor=6, shared_memory_per_multiprocessor=100 * 1024, multi_processor_count=84),
        SimpleNamespace(major=7, minor=5, shared_memory_per_multiprocessor=64 * 1024, multi_processor_count=40),
        SimpleNamespace(major=14, minor=0, shared_memory_per_multiprocessor=48 * 1024, multi_processor_count=10),
        SimpleNamespace(major=9, minor=0, shared_memory_per_multiprocessor=228 * 1024, multi_processor_count=114),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
    found = [chips.of_device.__wrapped__(index) for index in range(4)]
    assert [(c.capability, c.shared // 1024) for c in found] == [(86, 99), (75, 64), (140, 47), (90, 227)]
    assert [c.multiprocessors for c in found] == [84, 40, 10, 114]


def test_without_a_gpu_the_choice_is_an_h200s_and_a_stand_in_goes_away():
    assert torch.cuda.is_initialized() or chips.current() == chip(90)
    before = chips.current()
    with pytest.raises(ZeroDivisionError), chips.standing_in(chip(75)):
        assert chips.current().capability == 75
        1 / 0  # noqa: B018
    assert chips.current() == before


def test_a_launcher_runs_on_the_device_of_its_first_tensor_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Of a tensor beyond the current device, or a list of them, beside one on the host."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    x = torch.zeros(2).as_subclass(OnGPU)
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor) or "its device")
    assert ops._on_device_of((torch.zeros(1), 3, [x, x])) == "its device" and seen[0] is x
    with ops._on_device_of((torch.zeros(1), [], None)):
        assert len(seen) == 1


def test_products_without_tensor_cores_are_small_and_keep_no_whole_rows():
    with chips.standing_in(chip(75)):
        for dtype in (torch.float16, HALF, torch.float32):
            for width in (16, 128, 256, 512):
                assert tiling.similarity_owner(width, dtype, False) is None
                assert tiling.similarity_attend(width, dtype, False) is None
                tiles = [tiling.similarity_sums(width, dtype), tiling.prototype_head(width, dtype, owner=True)]
                tiles += [tiling.similarity_sigmoid(dtype), tiling.kmeans_assign(width, dtype)]
                for tile in tiles:
                    assert (tile["BM"], tile["BN"], tile["BLOCK_D"]) == (32, 32, 16)
                assert tiles[1]["CHUNKS"] * 16 >= width


@pytest.mark.parametrize("capability", [75, 80, 86, 90, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_covariance_have_the_arguments_of_their_kernels(capability: int, dtype: torch.dtype):
    """Without tensor cores the gradient's was given BLOCK_D, which its kernel doesn't have."""
    with chips.standing_in(chip(capability)):
        squares, gradient = tiling.covariance_squares(dtype, True), tiling.covariance_gradient(dtype)
    assert squares.keys() == {"BM", "BLOCK_K", "num_warps", "num_stages"}
    assert gradient.keys() == squares.keys() | {"BN"}
    if capability == 75:
        assert (gradient["BM"], gradient["BN"], gradient["BLOCK_K"], squares["BM"]) == (32, 32, 16, 32)


@pytest.mark.parametrize("width, on_chip", [(40, True), (100, False), (112, True), (200, False), (208, True)])
def test_rows_that_are_read_number_by_number_stay_on_the_chip_only_if_short(width: int, on_chip: bool):
    """Of 100 columns the gradient spilled 141 instructions on sm_90, of 200 columns 696."""
    with chips.standing_in(chip(90)):
        assert (tiling.similarity_owner(width, HALF, False) is not None) == on_chip
        assert tiling.similarity_sums(width, HALF)["WHOLE"] == on_chip


def test_small_chips_take_smaller_tiles_and_large_ones_what_they_had():
    with chips.standing_in(chip(86)):
        small = tiling.similarity_owner(256, HALF, False), tiling.cross_entropy_long(torch.float32, False)
    with chips.standing_in(chip(90)):
        large = tiling.similarity_owner(256, HALF, False), tiling.cross_entropy_long(torch.float32, False)
    assert small[0]["BM"] < large[0]["BM"] and small[1]["BLOCK"] < large[1]["BLOCK"]


@pytest.mark.parametrize("capability", [75, 80, 86, 90, 120])
def test_wide_prototypes_are_read_again_where_rows_would_fill_the_chip(capability: int):
    """Rows that stay are written out in the kernel; at D = 2048 they took 264 KiB, more than any chip has."""
    with chips.standing_in(chip(capability)):
        for width in (64, 256, 384, 512, 1024, 2048, 4096):
            for dtype in (HALF, torch.float32, torch.float64):
                tile = tiling.prototype_head(width, dtype, owner=False)
                kept = tile["BM"] * width * dtype.itemsize if tile["KEEP"] else 0
                assert kept <= chips.current().shared // 2
                assert tile["CHUNKS"] * tile["BLOCK_D"] >= width


@pytest.fixture
def settings():
    """Both interfaces to TF32, as they were afterwards."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_exact_products_can_be_asked_about_by_either_interface(chosen: str, settings):
    torch.set_float32_matmul_precision(chosen)
    with exact_products():
        assert not settings.allow_tf32 and settings.fp32_precision != "tf32"
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == chosen and settings.allow_tf32 == (chosen != "highest")


def test_exact_products_of_who_chose_by_the_newer_interface_alone(settings):
    settings.fp32_precision = "tf32"
    with exact_products():
        assert settings.fp32_precision == "ieee" and not settings.allow_tf32
    assert settings.fp32_precision == "tf32"
