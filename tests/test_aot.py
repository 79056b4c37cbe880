"""Every kernel, compiled for every architecture: no spills, shared memory within the chip's, wide memory accesses."""

import pytest
import torch

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import triton.language as tl  # noqa: E402

from fastjem.kernels import tiling  # noqa: E402

pytestmark = pytest.mark.aot


ARCHITECTURES = [pytest.param(arch, marks=() if arch == 90 else pytest.mark.exhaustive) for arch in aot.ARCHITECTURES]


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("case", aot.CASES, ids=str)
def test_budget(case: aot.Case, arch: int):
    codes = aot.codes(case.call, arch)
    assert codes, "nothing was launched"
    for code in codes:
        assert code.spills == 0, code
        assert code.shared <= aot.SHARED_LIMIT[arch], code
    first = next(code for code in codes if code.kernel not in ("_one_over_kernel", "_one_over_count_kernel"))
    wide = first.loads[128]
    if arch == 75 and case.wgmma:  # tiles of products are 32 rows of 16 numbers there: half of a 128-bit word a thread
        wide += first.loads[64]
    assert wide >= case.vectors[0] and first.stores[128] >= case.vectors[1], first
    assert any(code.wgmma for code in codes) == (case.wgmma and arch == 90), codes


# Whose tiles on an H200 don't fit on small chips, or spill there.
LARGE = (
    "nt_xent-2_x_N_x_256_tau_0.5-bf16",
    "similarity_logsumexp-N_x_M_x_256-bf16",
    "prototype_head_cross_entropy-N_x_256_x_K-bf16",
    "kmeans_step-N_x_K_x_256-fp16",
    "cross_entropy-N_x_131072-fp32",
    "nt_xent_of_views-2_x_300_x_40_learned_tau-fp16",
    "barlow_twins-64_x_512-fp32",
)


@pytest.mark.parametrize("arch", [75, 86])
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_tiles_on_small_chips(name: str, arch: int):
    """All cases on all chips are `test_budget`, most of it exhaustive."""
    (case,) = (case for case in aot.CASES if str(case) == name)
    for code in aot.codes(case.call, arch):
        assert code.spills == 0 and code.shared <= aot.SHARED_LIMIT[arch], code


def test_a_new_temperature_compiles_nothing():
    student, teacher = torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(4, 32, dtype=torch.bfloat16)
    prototypes = torch.zeros(70, 32, dtype=torch.bfloat16)
    with aot.compiling(90) as compiled, torch.no_grad():
        found = []
        for of_student, of_teacher in ((0.1, 0.04), (0.2, 0.05), (1.0, 2.0), (0.07, 1.0), (0.5, 0.5)):
            aot.prototypes.prototype_head_cross_entropy(
                [student, student, prototypes], [teacher] * 2, prototypes, of_student, of_teacher, torch.zeros(70),
                "different", None, [True] * 3,
            )  # fmt: skip
            found.append(len(compiled))
    assert found == [4] * 5  # attention of student and teacher, views, prototypes


def only(codes: list[aot.Code]) -> aot.Code:
    (code,) = codes
    return code


def test_a_row_in_too_few_registers_is_seen_to_spill(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiling, "cross_entropy", lambda *_: {"ROWS": 1, "BLOCK": 16_384, "num_warps": 1})
    (case,) = (c for c in aot.CASES if str(c) == "cross_entropy-N_x_16384-fp32")
    assert aot.codes(case.call, 90)[0].spills > 0


def test_unaligned_memory_is_seen_to_have_no_wide_access():
    (case,) = (c for c in aot.CASES if "unaligned" in c.shape)
    code = only(aot.codes(case.call, 90))
    assert code.loads[128] == 0 and code.stores[128] == 0 and code.loads[32] > 16


@pytest.mark.parametrize("k, reads", [(3000, 4), (8192, 4), (8193, 7), (65_536, 7)])
def test_how_often_sinkhorn_reads_its_scores(k: int, reads: int, monkeypatch: pytest.MonkeyPatch):
    """3 iterations and the codes. Every kernel that is given the scores reads them once."""
    scores, readers = torch.zeros(3, k), []

    def record(kernel, grid, *args, device_of, **meta) -> None:
        given = [x for of in args for x in (of if isinstance(of, (tuple, list)) else [of])]  # views are given together
        if any(isinstance(x, torch.Tensor) and x.data_ptr() == scores.data_ptr() for x in given):
            readers.append(kernel.fn.__name__)

    monkeypatch.setattr(aot.launch, "launch", record)
    aot.prototypes.sinkhorn(scores, 0.05, 3, False, torch.float32)
    assert len(readers) == reads, readers


@triton.jit
def _product(a, b, c, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(c + index, tl.dot(tl.load(a + index), tl.load(b + index)))


def test_wgmma_is_seen_on_hopper_and_nowhere_else():
    a, c = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    seen = {}
    for arch in aot.ARCHITECTURES:
        with aot.compiling(arch) as compiled:
            aot.launch.launch(_product, (1,), a, a, c, BLOCK=64, device_of=a)
        seen[arch] = aot.Code.of(compiled[0]).wgmma > 0
    assert seen == {arch: arch == 90 for arch in aot.ARCHITECTURES}


def test_the_launcher_and_the_driver_are_put_back():
    before = aot.launch.launch, triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError):
        aot.codes(lambda: 1 / 0, 90)
    assert (aot.launch.launch, triton.runtime.driver._active) == before
