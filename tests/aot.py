"""What a GPU would run, compiled without one: `python tests/aot.py` writes benchmarks/results/ahead-of-time.{json,md}.

A stand-in for Triton's driver names the architecture, `launch.launch` is replaced by a compile, and the launcher of an
operator is called on CPU tensors: the host code is that of a real call, and so is what Triton specialises on.
Registers, spills and the widths of memory accesses are read off the machine code.

To cover an operator, add a line to CASES.
"""

import contextlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastjem.bench.cases import contrastive as contrastive_cases
from fastjem.bench.cases import prototypes as prototype_cases
from fastjem.kernels import chips, launch
from fastjem.kernels.augment import gpu as augment
from fastjem.kernels.contrastive import gpu as contrastive
from fastjem.kernels.contrastive import gpu_engine
from fastjem.kernels.covariance import gpu as covariance
from fastjem.kernels.gaussian import gpu as gaussian
from fastjem.kernels.gram import gpu as gram
from fastjem.kernels.masks import gpu as masks
from fastjem.kernels.neighbors import gpu as neighbors
from fastjem.kernels.optimizers import columns as optimizer_columns
from fastjem.kernels.optimizers import gpu as optimizers
from fastjem.kernels.predictive import gpu as predictive
from fastjem.kernels.prototypes import gpu as prototypes
from fastjem.kernels.prototypes.mean_entropy import softmax_slope
from fastjem.kernels.supervised import gpu as supervised
from fastjem.kernels.weights import gpu as weights

# A GPU of each kind that tiling.py tells apart, and of each that is sold in numbers. See chips.SHARED.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {arch: chips.SHARED[arch] for arch in ARCHITECTURES}  # bytes a program
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "ahead-of-time"


class Driver:
    """A GPU of which only the name is there. Its index keeps Triton's caches of the architectures apart."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    kernel: str
    warps: int
    registers: int
    spills: int  # instructions that read or write local memory
    shared: int  # bytes
    loads: Counter  # instructions that read global memory, by bits a thread
    stores: Counter
    wgmma: int  # Hopper's tensor-core instructions

    @classmethod
    def of(cls, compiled: triton.compiler.CompiledKernel) -> "Code":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _cuobjdump("-res-usage", file.name)
            sass = _cuobjdump("-sass", file.name)
        # "        /*0070*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;"
        opcodes = [
            o.split(".") for o in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.M)
        ]
        return cls(
            kernel=compiled.metadata.name,
            warps=compiled.metadata.num_warps,
            registers=int(re.search(r"REG:(\d+)", usage).group(1)),
            spills=sum(name in ("LDL", "STL") for name, *_ in opcodes),
            shared=compiled.metadata.shared,  # the tools don't count dynamic shared memory
            loads=Counter(_bits(m) for name, *m in opcodes if name in ("LDG", "LDGSTS")),
            stores=Counter(_bits(m) for name, *m in opcodes if name == "STG"),
            wgmma=sum(name in ("HGMMA", "QGMMA", "IGMMA") for name, *_ in opcodes),
        )


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], check=True, capture_output=True, text=True).stdout


def _bits(modifiers: list[str]) -> int:
    """E.128.CONSTANT -> 128, E.U16 -> 16; an access that names no width is one of 32 bits."""
    widths = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]8|[US]16|64|128|256", m)]
    return max(widths, default=32)


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Inside, `launch.launch` compiles for an architecture instead of launching.

    The list has what was compiled, each kernel once. Products that are torch's are left out.
    """
    compiled = []

    def compile_only(kernel, grid, *args, device_of, **meta) -> None:
        code = kernel.warmup(*args, grid=grid, **meta)
        if all(code is not other for other in compiled):
            compiled.append(code)

    drivers = triton.runtime.driver
    before = drivers._active, launch.launch, gpu_engine.add_product
    drivers.set_active(Driver(arch))
    launch.launch, gpu_engine.add_product = compile_only, lambda *_, **__: None
    try:
        with chips.standing_in(chips.Chip.of(arch)):
            yield compiled
    finally:
        drivers._active, launch.launch, gpu_engine.add_product = before


def codes(call: Callable[[], object], arch: int) -> list[Code]:
    """The machine code of every kernel that a call would launch."""
    with compiling(arch) as compiled, torch.no_grad():
        call()
    with ThreadPoolExecutor() as pool:  # the disassembler takes longer than a compiled kernel's way from the cache
        return list(pool.map(_code, compiled))


_known: dict[str, Code] = {}  # by the hash of source, constants and architecture: many cases share kernels


def _code(compiled: triton.compiler.CompiledKernel) -> Code:
    if compiled.hash not in _known:
        _known[compiled.hash] = Code.of(compiled)
    return _known[compiled.hash]


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: str
    call: Callable[[], object]
    vectors: tuple[int, int] = (
        0,
        0,
    )  # the least 128-bit loads and stores of a thread in the first kernel
    wgmma: bool = False  # whether a kernel multiplies matrices, with wgmma on Hopper

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}".replace(" ", "_")


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def _rescale(elements: int, dtype: str, vectors: tuple[int, int]) -> Case:
    def call() -> None:
        weights.rescale_(torch.zeros(elements, dtype=DTYPES[dtype]), torch.ones(()))

    return Case("rescale_", str(elements), dtype, call, vectors)


OPTIMIZER_DTYPES = (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp64", "fp64"))


def _optimizer(op: str, elements: int, parameter: str, gradient: str) -> Case:
    """A step with a teacher, and with all that a GradScaler gives."""

    def call() -> None:
        p, first, second, teacher = (torch.zeros(elements, dtype=DTYPES[parameter]) for _ in range(4))
        g = torch.zeros(elements, dtype=DTYPES[gradient])
        names = optimizer_columns.LARS if op == "lars_" else optimizer_columns.ADAMW
        rest = torch.zeros(1, len(names), dtype=torch.float64), [0]
        factors = torch.ones(()), torch.zeros(())
        if op == "lars_":
            optimizers.lars_([p], [g], [first], [teacher], *rest, None, *factors)
        else:
            optimizers.adamw_([p], [g], [first], [second], [torch.zeros(())], [teacher], *rest, *factors)

    loads = {"fp32": 4, "bf16": 3, "fp16": 3, "fp64": 8}[gradient] if op == "lars_" else 0  # of the squares' kernel
    return Case(op, str(elements), f"{parameter} <- {gradient}", call, (loads, 0))


def _ema_update(elements: int, teacher: str, student: str, vectors: tuple[int, int], offset: int = 0) -> Case:
    def call() -> None:
        t, s = (torch.zeros(elements + offset, dtype=DTYPES[d])[offset:] for d in (teacher, student))
        weights.ema_update_([t], [s], torch.ones((), dtype=torch.float64))

    shape = str(elements) + (" unaligned" if offset else "")
    return Case("ema_update_", shape, f"{teacher} <- {student}", call, vectors)


def _cross_entropy(k: int, dtype: str, vectors: tuple[int, int], gradient: bool = True) -> Case:
    def call() -> None:
        logits, labels = torch.zeros(4, k, dtype=DTYPES[dtype]), torch.zeros(4, dtype=torch.int64)
        supervised.cross_entropy(logits, labels, -100, [gradient])

    return Case("cross_entropy", f"N x {k}" + ("" if gradient else " loss only"), dtype, call, vectors)


def _cross_entropy_rows(k: int, dtype: str, vectors: tuple[int, int]) -> Case:
    def call() -> None:
        logits, labels = torch.zeros(4, k, dtype=DTYPES[dtype]), torch.zeros(4, dtype=torch.int64)
        numbers = torch.ones(4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
        supervised.cross_entropy_rows(logits, labels, *numbers, -100, [True])

    return Case("cross_entropy_rows", f"N x {k}", dtype, call, vectors)


def _negative_cosine(d: int, dtype: str, vectors: tuple[int, int], wanted: tuple[bool, bool] = (True, True)) -> Case:
    def call() -> None:
        p, z = torch.zeros(4, d, dtype=DTYPES[dtype]), torch.zeros(4, d, dtype=DTYPES[dtype])
        predictive.negative_cosine(p, z, 1e-8, list(wanted))

    return Case("negative_cosine", f"N x {d}" + ("" if all(wanted) else " p only"), dtype, call, vectors)


def _regression(d: int, dtype: str, vectors: tuple[int, int], beta: float = 2.0) -> Case:
    def call() -> None:
        x, y = torch.zeros(4, d, dtype=DTYPES[dtype]), torch.zeros(4, d, dtype=DTYPES[dtype])
        predictive.regression(x, y, beta, True, 1e-5, [True])

    return Case("regression", f"N x {d} beta {beta:g}", dtype, call, vectors)


def _regression_rows(d: int, dtype: str) -> Case:
    def call() -> None:
        x, y = torch.zeros(9, d, dtype=DTYPES[dtype]), torch.zeros(9, d, dtype=DTYPES[dtype])
        predictive.regression_rows(x, y, torch.zeros(5, dtype=torch.int64), torch.ones(5), 2.0, True, 1e-5, [True])

    return Case("regression_rows", f"M of N x {d}", dtype, call, (1, 1))


def _characteristic(slices: int) -> Case:
    def call() -> None:
        theta = torch.zeros(2, 300, slices)
        gaussian.characteristic_backward(theta, gaussian.characteristic(theta, 16))

    return Case("characteristic", f"2 x N x {slices}", "fp32", call)


def _nt_xent(d: int, dtype: str, temperature: float = 0.5, n: int = 300) -> Case:
    def call() -> None:
        z, lse = torch.zeros(2, n, d, dtype=DTYPES[dtype]), torch.zeros(2, n, dtype=torch.float64)
        contrastive.nt_xent(z, z, 0, temperature, False, True)
        contrastive.nt_xent_backward(z, z, lse, lse, None, 0, temperature, False, True)

    return Case("nt_xent", f"2 x N x {d} tau {temperature:g}", dtype, call, wgmma=True)


def _nt_xent_of_views(d: int, dtype: str, learned: bool = False, n: int = 300) -> Case:
    """More rows than programs share (n = 4500) walk half of the tiles forward, and finish their gradient themselves."""

    def call() -> None:
        views = [torch.zeros(n, d, dtype=DTYPES[dtype]) for _ in range(2)]
        temperature = torch.ones(()) if learned else None
        loss, *saved = contrastive.nt_xent_of_views(views, None, temperature, 0.5, False)
        arguments = (None, temperature, 0.5, False, views[0].dtype, [True, learned])
        contrastive.nt_xent_of_views_backward(loss, *saved, *arguments)

    shape = f"2 x {n} x {d}" + (" learned tau" if learned else "")
    return Case("nt_xent_of_views", shape, dtype, call, wgmma=True)


def _supcon(
    d: int, dtype: str, n: int = 300, learned: bool = False, one_anchor: bool = False, normalize: bool = True
) -> Case:
    """More rows than programs share (n = 4500) walk half of the tiles forward."""

    def call() -> None:
        z, ids = torch.zeros(2, n, d, dtype=DTYPES[dtype]), torch.zeros(n, dtype=torch.int64)
        temperature = torch.ones(()) if learned else None
        options = (temperature, 0.1, one_anchor, normalize)
        loss, *saved = contrastive.supcon(z, ids, *options)
        contrastive.supcon_backward(loss, *saved, *options, z.dtype, [True, learned])

    more = (" learned tau" if learned else "") + (" one anchor" if one_anchor else "")
    shape = f"2 x {n} x {d}" + more + ("" if normalize else " as given")
    return Case("supcon", shape, dtype, call, wgmma=True)


def _info_nce(d: int, dtype: str, n: int = 300, k: int = 3000, in_batch: bool = False, learned: bool = False) -> Case:
    """Of a queue; or of negatives that need a gradient. More queries than one program joins (n = 8500) have a total."""

    def call() -> None:
        q, negatives = torch.zeros(n, d, dtype=DTYPES[dtype]), torch.zeros(k, d, dtype=DTYPES[dtype])
        temperature = torch.ones(()) if learned else None
        wanted = [True, True, in_batch, learned]
        loss, *saved = contrastive.info_nce(q, q, negatives, temperature, -n, 0.1, wanted)
        contrastive.info_nce_backward(loss, *saved, temperature, -n, 0.1, n, q.dtype, wanted)

    shape = f"{n} x {k} x {d}" + (", in batch" if in_batch else "") + (" learned tau" if learned else "")
    return Case("info_nce", shape, dtype, call, wgmma=True)


def _clip_loss(d: int, dtype: str, n: int = 300) -> Case:
    def call() -> None:
        x, scale = torch.zeros(n, d, dtype=DTYPES[dtype]), torch.ones(())
        *_, x_lse, y_lse = contrastive.clip_loss(x, x, scale, 0)
        contrastive.clip_loss_backward(x, x, scale, x_lse, y_lse, 0, [True, True])

    return Case("clip_loss", f"N x {d}", dtype, call, wgmma=True)


def _clip_loss_of_pairs(d: int, dtype: str, n: int = 300, learned: bool = True) -> Case:
    def call() -> None:
        x, scale = torch.zeros(n, d, dtype=DTYPES[dtype]), torch.ones(())
        given = (x, x, scale if learned else None, 10.0)
        loss, *saved = contrastive.clip_loss_of_pairs(*given)
        contrastive.clip_loss_of_pairs_backward(loss, *given, *saved, [True, True, learned])

    rows = "N" if n == 300 else str(n)
    return Case("clip_loss_of_pairs", f"{rows} x {d}" + ("" if learned else " number"), dtype, call, wgmma=True)


def _siglip_loss(d: int, dtype: str) -> Case:
    def call() -> None:
        x = torch.zeros(300, d, dtype=DTYPES[dtype])
        contrastive.siglip_loss(x, x, torch.ones(()), torch.ones(()), 0, [True, True])

    return Case("siglip_loss", f"N x {d}", dtype, call, wgmma=True)


def _siglip_loss_of_pairs(d: int, dtype: str, learned: bool = True, n: int = 300) -> Case:
    def call() -> None:
        x, number = torch.zeros(n, d, dtype=DTYPES[dtype]), torch.ones(()) if learned else None
        loss, *saved = contrastive.siglip_loss_of_pairs(x, x, number, number, 10.0, -10.0, [True, True])
        arguments = (number, number, 10.0, x.dtype, [True, True, learned, learned])
        contrastive.siglip_loss_of_pairs_backward(loss, *saved, *arguments)

    return Case("siglip_loss_of_pairs", f"N x {d}" + ("" if learned else " numbers"), dtype, call, wgmma=True)


def _siglip_pairs(d: int, dtype: str, masks: bool) -> Case:
    def call() -> None:
        x = torch.zeros(300, d, dtype=DTYPES[dtype])
        numbers = [torch.ones(())] * 3
        ids = None if masks else torch.zeros(300, dtype=torch.int64)
        mask = torch.zeros(300, 300, dtype=torch.bool) if masks else None
        weights = torch.ones(300, dtype=torch.float64)
        contrastive.siglip_pairs(x, x, *numbers, weights, ids, ids, mask, mask, 0, [True, True])

    return Case("siglip_pairs", f"N x {d} {'masks' if masks else 'ids'}", dtype, call, wgmma=True)


def _similarity_logsumexp(d: int, dtype: str, everything: bool = True, n: int = 300) -> Case:
    """What a row sees by ids, a mask, limits and its own image, with sums of logits; or by ids alone."""

    def call() -> None:
        a, numbers = torch.zeros(n, d, dtype=torch.float32), torch.zeros(n, dtype=torch.float64)
        ids = torch.zeros(n, dtype=torch.int64)
        more = (torch.zeros(n, n, dtype=torch.bool), numbers, numbers) if everything else (None,) * 3
        visible = ([n, 0, n], ids, ids, *more)
        contrastive.similarity_logsumexp(a, a, *visible, everything, everything, DTYPES[dtype])
        slopes = (numbers, numbers, numbers if everything else None)
        both = (*slopes, *(slopes if everything else (None,) * 3))
        contrastive.similarity_logsumexp_backward(a, a, *visible, *both, [True, True], DTYPES[dtype])

    shape = f"N x M x {d}" + ("" if everything else " ids alone")
    return Case("similarity_logsumexp", shape, dtype, call, wgmma=True)


def _normalize_rows(d: int, dtype: str) -> Case:
    def call() -> None:
        unit, divisors = contrastive.normalize_rows(torch.zeros(300, d, dtype=DTYPES[dtype]), 1e-12)
        contrastive.normalize_rows_backward(unit, unit, divisors, 1e-12, DTYPES[dtype])

    return Case("normalize_rows", f"N x {d}", dtype, call)


def _nearest_neighbors(d: int, dtype: str) -> Case:
    def call() -> None:
        x = torch.zeros(300, d, dtype=DTYPES[dtype])
        contrastive.nearest_neighbors(x, x)

    return Case("nearest_neighbors", f"N x K x {d}", dtype, call, wgmma=True)


def _nearest_k(d: int, dtype: str, k: int) -> Case:
    def call() -> None:
        x = torch.zeros(300, d, dtype=DTYPES[dtype])
        neighbors.nearest_k(x, x, k)

    return Case("nearest_k", f"{k} of M x {d}", dtype, call, wgmma=True)


def _kmeans_step(d: int, dtype: str) -> Case:
    def call() -> None:
        neighbors.kmeans_step(torch.zeros(300, d, dtype=DTYPES[dtype]), torch.zeros(70, d), True, True)

    return Case("kmeans_step", f"N x K x {d}", dtype, call, wgmma=True)


def _gram_loss(d: int, dtype: str, negatives: str = "keep", normalize: bool = True) -> Case:
    def call() -> None:
        x = torch.zeros(2, 300, d, dtype=DTYPES[dtype])
        gram.gram_loss(x, x, normalize, negatives, [True])

    shape = f"B x P x {d}" + ("" if normalize else " as it is") + (f" {negatives}" if negatives != "keep" else "")
    return Case("gram_loss", shape, dtype, call, wgmma=True)


def _covariance(op: str, n: int, d: int, dtype: str) -> Case:
    def call() -> None:
        z0, z1 = torch.zeros(n, d, dtype=DTYPES[dtype]), torch.zeros(n, d, dtype=DTYPES[dtype])
        if op == "barlow_twins":
            covariance.barlow_twins(z0, z1, 5e-3, 1, [True, True])
        else:
            covariance.vicreg(z0, z1, 25.0, 25.0, 1.0, 1e-4, 1, [True, True])

    return Case(op, f"{n} x {d}", dtype, call, wgmma=dtype != "fp64")


def _sinkhorn(k: int, dtype: str, vectors: tuple[int, int], n: int = 300) -> Case:
    def call() -> None:
        scores = torch.zeros(n, k, dtype=DTYPES[dtype])
        prototypes.sinkhorn(scores, 0.05, 2, False, scores.dtype)

    return Case("sinkhorn", f"N x {k}", dtype, call, vectors)


def _sinkhorn_rows(k: int, dtype: str, vectors: tuple[int, int]) -> Case:
    """Of hidden patches, whose number the host doesn't know."""

    def call() -> None:
        scores = torch.zeros(300, k, dtype=DTYPES[dtype])
        prototypes.sinkhorn_bias([scores], 0.05, 2, False, torch.tensor(200))

    return Case("sinkhorn_bias", f"rows of N x {k}", dtype, call, vectors)


def _prototype_cross_entropy(
    s: int, t: int, k: int, dtype: str, pairs: str, vectors: tuple[int, int], images: int = 4
) -> Case:
    def call() -> None:
        student, teacher = ([torch.zeros(images, k, dtype=DTYPES[dtype]) for _ in range(n)] for n in (s, t))
        prototypes.prototype_cross_entropy(student, teacher, 0.1, 0.04, torch.zeros(k), pairs, None, True, [True] * s)

    return Case("prototype_cross_entropy", f"{s} x {t} x N x {k} {pairs}", dtype, call, vectors)


def _prototype_head(d: int, dtype: str, students: int = 2, images: int = 4, k: int = 300) -> Case:
    def call() -> None:
        x, w = torch.zeros(images, d, dtype=DTYPES[dtype]), torch.zeros(k, d, dtype=DTYPES[dtype])
        inputs, wanted = [*[x] * students, w], [True] * (students + 1)
        prototypes.prototype_head_cross_entropy(
            inputs, [x] * 2, w, 0.1, 0.04, torch.zeros(k), "different", None, wanted
        )

    shape = f"N x {d} x K" + (f", {students} views" if students > 2 else "")
    return Case("prototype_head_cross_entropy", shape, dtype, call, (1, 0), wgmma=dtype in ("bf16", "fp16"))


def _mean_entropy(k: int, dtype: str, vectors: tuple[int, int]) -> Case:
    def call() -> None:
        scores = [torch.zeros(4, k, dtype=DTYPES[dtype]) for _ in range(2)]
        prototypes.mean_entropy(scores, 0.1, None, None, [True, True])

    return Case("mean_entropy", f"2 x N x {k}", dtype, call, (vectors[0], 0))


def _softmax_slope(k: int, dtype: str, vectors: tuple[int, int]) -> Case:
    def call() -> None:
        x = torch.zeros(4, k, dtype=DTYPES[dtype])
        softmax_slope(x, 0.1, torch.zeros(k), x)

    return Case("mean_entropy", f"slopes of N x {k}", dtype, call, vectors)


def _koleo(d: int, topk: int, dtype: str = "fp32", p: float = 2) -> Case:
    def call() -> None:
        x = torch.zeros(300, d, dtype=DTYPES[dtype])
        neighbors = contrastive.koleo_neighbors(x, x, 0, topk, 100, 1e-8)
        contrastive.koleo(x, neighbors.clamp(0, 299), p, 1e-8, [True])

    return Case("koleo", f"N x {d} top {topk}" + (f" p {p:g}" if p != 2 else ""), dtype, call, wgmma=True)


def _augment(
    size: int, dtype: str, channels_last: bool = False, exact: bool = False, channels: int = 3, floats: bool = False
) -> Case:
    def call() -> None:
        images = torch.zeros(3, size, size, channels, dtype=torch.float32 if floats else torch.uint8)
        numbers = [0.5] * channels, [0.2 + 0.01 * c for c in range(channels)]
        augment.augment(images, torch.zeros(3, 13), *numbers, DTYPES[dtype], channels_last, exact, 128.0)

    options = (" channels last" if channels_last else "") + (" exact" if exact else "") + (" floats" if floats else "")
    return Case("augment", f"B x {size} x {size} x {channels}{options}", dtype, call)


def _crop_resize(size: int, bicubic: bool, channels: int = 3, floats: bool = False) -> Case:
    dtype = torch.float32 if floats else torch.uint8

    def call() -> None:
        images, table = torch.zeros(3, 40, 50, channels, dtype=dtype), torch.zeros(3, 13)
        augment.crop_resize(images, torch.zeros(3, dtype=torch.int64), table, (size, size), bicubic)

    name = f"B x {size} x {channels}" + (" bicubic" if bicubic else "")
    return Case("crop_resize", name, "fp32" if floats else "uint8", call)


def _keyed_uniform(count: int, step: bool) -> Case:
    """An epoch of the host's, or the step's number on the device."""

    def call() -> None:
        number = torch.zeros((), dtype=torch.int64) if step else None
        masks.keyed_uniform(torch.zeros(3, dtype=torch.int64), number, 0, 1, 2, 3 << 30, count, 5)

    return Case("keyed_uniform", f"N x {count}" + (" by step" if step else ""), "fp64", call)


def _masks(op: str, height: int, width: int, dtype: str = "fp64") -> Case:
    patches = height * width
    columns, options = {
        "block_masks": (194, (height, width, 0.5, 0.1, 0.5, 4, patches, 0.3, 10)),
        "even_block_scores": (128 + patches, (height, width)),
        "inverse_rectangle_masks": (3, (height, width, patches // 3, -0.7, 0.7)),
        "multi_block_masks": (208, (height, width, [5, 6], [12, 13], 4, 10)),
    }[op]
    wanted = (None,) if op == "block_masks" else ()

    def call() -> None:
        getattr(masks, op)(torch.zeros(3, columns, dtype=DTYPES[dtype]), *wanted, *options)

    return Case(op, f"N x {height} x {width}", dtype, call)


CASES = [
    _augment(224, "bf16"),
    _augment(32, "fp32", channels_last=True, exact=True),
    _augment(224, "bf16", channels_last=True),
    _augment(224, "bf16", floats=True),
    _augment(1000, "bf16"),
    _augment(224, "bf16", channels=1),
    _augment(224, "fp32", channels=5, floats=True),
    _augment(96, "bf16", channels=13, floats=True, channels_last=True),
    _crop_resize(224, True),
    _crop_resize(224, False, floats=True),
    _crop_resize(224, True, channels=5, floats=True),
    _crop_resize(32, False, channels=1, floats=True),
    # the shapes of the goals: SimCLR at D = 128 and 256, MoCo, CLIP; a running maximum; float32
    _nt_xent(128, "bf16"),
    _nt_xent(256, "bf16"),
    _nt_xent(128, "fp16", 0.01),
    _nt_xent(128, "fp32", 0.01),
    _nt_xent_of_views(128, "bf16"),
    _nt_xent_of_views(128, "bf16", n=4500),
    _nt_xent_of_views(128, "bf16", True, n=4500),
    _nt_xent_of_views(256, "bf16", n=8500),
    _nt_xent_of_views(40, "fp16", True),
    _nt_xent_of_views(100, "bf16"),
    _nt_xent_of_views(128, "fp32"),
    _nt_xent_of_views(128, "fp32", True, n=4500),
    _nt_xent_of_views(512, "bf16", True),
    _supcon(128, "bf16"),
    _supcon(128, "bf16", 4500, learned=True),
    _supcon(256, "bf16", 8500, one_anchor=True),
    _supcon(128, "bf16", normalize=False, learned=True),
    _supcon(40, "fp16", 4500),
    _supcon(512, "bf16"),
    _supcon(128, "fp32", 4500),
    _info_nce(128, "bf16"),
    _info_nce(128, "bf16", 8500, 8500, True, True),
    _info_nce(256, "bf16", in_batch=True),
    _info_nce(40, "fp16", in_batch=True, learned=True),
    _info_nce(100, "bf16", learned=True),
    _info_nce(512, "bf16", in_batch=True),
    _info_nce(512, "bf16", learned=True),
    _info_nce(128, "fp32"),
    _info_nce(128, "fp32", learned=True),
    _info_nce(128, "fp32", in_batch=True, learned=True),
    _info_nce(128, "fp32", 4500, 70000, learned=True),
    _info_nce(128, "fp32", 4500, 4500, in_batch=True, learned=True),
    _clip_loss(512, "bf16"),
    _clip_loss_of_pairs(128, "bf16"),
    _clip_loss_of_pairs(256, "fp16"),
    _clip_loss_of_pairs(40, "fp16"),
    _clip_loss_of_pairs(512, "bf16"),
    _clip_loss_of_pairs(512, "fp32"),
    _clip_loss_of_pairs(512, "fp32", n=4500),
    _clip_loss_of_pairs(128, "bf16", learned=False),
    _clip_loss_of_pairs(512, "bf16", learned=False),
    _siglip_loss(512, "bf16"),
    _siglip_loss_of_pairs(768, "bf16"),
    _siglip_loss_of_pairs(100, "fp16"),
    _siglip_loss_of_pairs(512, "fp32"),
    _siglip_loss_of_pairs(768, "bf16", learned=False),
    *(_siglip_pairs(512, dtype, masks) for dtype in ("bf16", "fp32") for masks in (False, True)),
    _normalize_rows(128, "fp32"),
    _normalize_rows(128, "bf16"),
    _normalize_rows(100, "fp16"),
    _normalize_rows(2048, "bf16"),
    _nearest_neighbors(128, "bf16"),
    _nearest_k(384, "bf16", 20),
    _nearest_k(768, "fp16", 32),
    _nearest_k(384, "fp32", 20),
    _nearest_k(384, "fp32", 1),
    _kmeans_step(128, "bf16"),
    _kmeans_step(256, "fp16"),
    _kmeans_step(384, "bf16"),
    _kmeans_step(128, "fp32"),
    _gram_loss(384, "bf16"),
    _gram_loss(1024, "bf16", "clamp_teacher"),
    _gram_loss(384, "bf16", "clamp", normalize=False),
    _gram_loss(384, "fp16", "clamp"),
    _gram_loss(384, "fp32", "clamp_teacher"),
    _similarity_logsumexp(128, "bf16"),
    _similarity_logsumexp(256, "bf16"),
    _similarity_logsumexp(512, "bf16"),
    _similarity_logsumexp(128, "fp16"),
    _similarity_logsumexp(512, "fp16"),
    _similarity_logsumexp(128, "bf16", everything=False),
    _similarity_logsumexp(128, "fp32"),
    _prototype_head(128, "fp16"),
    _prototype_head(256, "bf16"),
    _prototype_head(256, "bf16", students=10),
    _prototype_head(256, "fp32"),
    _prototype_head(384, "bf16"),
    _prototype_head(2048, "bf16"),
    _prototype_head(768, "fp32"),
    _prototype_head(64, "fp64"),
    _sinkhorn(3, "fp32", (0, 0)),
    _sinkhorn(8192, "fp32", (1, 0)),
    _sinkhorn(3000, "bf16", (1, 0)),
    _sinkhorn(3000, "fp32", (1, 0)),
    _sinkhorn(65_536, "bf16", (1, 0)),
    _sinkhorn(65_536, "fp32", (1, 0)),
    _sinkhorn_rows(8192, "bf16", (1, 0)),
    _sinkhorn_rows(65_536, "fp32", (1, 0)),
    _prototype_cross_entropy(10, 2, 65_536, "bf16", "different", (1, 0)),
    _prototype_cross_entropy(8, 2, 3000, "fp32", "different", (1, 0)),
    _prototype_cross_entropy(1, 1, 8192, "bf16", "same", (1, 0)),
    _prototype_cross_entropy(2, 1, 1024, "fp32", "all", (1, 0)),
    _mean_entropy(1024, "fp32", (1, 1)),
    _mean_entropy(65_536, "bf16", (1, 1)),
    _softmax_slope(1024, "fp32", (1, 1)),
    _softmax_slope(65_536, "bf16", (1, 1)),
    _koleo(384, 1),
    _koleo(1024, 4, "bf16"),
    _koleo(128, 2, p=3.0),
    _rescale(5000, "bf16", (4, 4)),
    _rescale(5000, "fp32", (4, 4)),
    _ema_update(5000, "fp32", "fp32", (8, 4)),
    _ema_update(5000, "fp32", "bf16", (6, 4)),
    _ema_update(5000, "fp32", "fp16", (6, 4)),
    _ema_update(5000, "fp64", "fp64", (16, 8)),
    _ema_update(5000, "fp32", "fp32", (0, 0), offset=1),
    *(_optimizer(op, 5000, *dtypes) for op in ("lars_", "adamw_") for dtypes in OPTIMIZER_DTYPES),
    _cross_entropy(1, "fp32", (0, 0)),
    _cross_entropy(10, "fp32", (0, 0)),
    _cross_entropy(1000, "bf16", (1, 1)),
    _cross_entropy(1003, "bf16", (0, 0)),  # rows of any alignment
    _cross_entropy(3000, "bf16", (4, 4)),  # 3000 = 8 x 375: whole words, though not divisible by 16
    _cross_entropy(3000, "bf16", (4, 0), gradient=False),
    _cross_entropy(3000, "fp32", (8, 8)),
    _cross_entropy(16_384, "bf16", (4, 4)),
    _cross_entropy(16_384, "fp32", (8, 8)),
    _cross_entropy(131_072, "bf16", (4, 2)),
    _cross_entropy(131_072, "bf16", (2, 0), gradient=False),
    _cross_entropy(131_072, "fp32", (8, 4)),
    _cross_entropy(131_072, "fp64", (8, 4)),
    _cross_entropy_rows(1000, "bf16", (1, 1)),
    _cross_entropy_rows(16_384, "fp32", (8, 8)),
    _cross_entropy_rows(131_072, "bf16", (4, 2)),
    _negative_cosine(128, "bf16", (2, 2)),
    _negative_cosine(256, "bf16", (2, 1), wanted=(True, False)),
    _negative_cosine(256, "fp32", (4, 4)),
    _negative_cosine(2048, "bf16", (4, 4)),
    _negative_cosine(8192, "fp32", (8, 8)),
    _negative_cosine(65_536, "fp32", (8, 4)),
    _regression(128, "bf16", (2, 1)),
    _regression(768, "bf16", (2, 1)),
    _regression(1024, "fp32", (4, 2), beta=0),
    _regression(8192, "fp32", (8, 4)),
    _regression(65_536, "bf16", (4, 1)),
    _regression_rows(128, "bf16"),
    _regression_rows(768, "fp32"),
    _regression_rows(8192, "fp32"),
    _regression_rows(65_536, "bf16"),
    _characteristic(256),
    _characteristic(21),
    _covariance("barlow_twins", 64, 512, "fp32"),
    _covariance("barlow_twins", 64, 512, "bf16"),
    _covariance("vicreg", 64, 512, "fp32"),
    _covariance("vicreg", 64, 512, "bf16"),
    _covariance("vicreg", 2048, 2112, "fp32"),  # on Hopper in tiles of 128
    _covariance("barlow_twins", 2300, 2208, "fp32"),
    _covariance("vicreg", 64, 67, "fp64"),
    _keyed_uniform(194, step=False),
    _keyed_uniform(194, step=True),
    _masks("block_masks", 14, 14),
    _masks("block_masks", 37, 37, "fp32"),
    _masks("block_masks", 512, 512),
    _masks("even_block_scores", 14, 14),
    _masks("inverse_rectangle_masks", 14, 14),
    _masks("multi_block_masks", 14, 14),
    _masks("multi_block_masks", 512, 512),
]


# The shapes that the goals on an H200 are set for: what runs there, and the benchmark's case, which counts its cost.
BF16 = torch.bfloat16
GOALS = [
    (_nt_xent_of_views(128, "bf16", n=32768), contrastive_cases.nt_xent_case(32768, 128, BF16)),
    (_nt_xent_of_views(256, "bf16", n=32768), contrastive_cases.nt_xent_case(32768, 256, BF16)),
    (_clip_loss_of_pairs(512, "bf16", 32768), contrastive_cases.image_text_case("clip_loss", 32768, 512, BF16)),
    (_siglip_loss_of_pairs(768, "bf16", n=32768), contrastive_cases.image_text_case("siglip_loss", 32768, 768, BF16)),
    (_info_nce(128, "bf16", 4096, 65_536), contrastive_cases.moco_case(4096, 65_536, 128, BF16)),
    (_sinkhorn(3000, "bf16", (1, 0), 16_384), prototype_cases.sinkhorn_case(16_384, 3000, BF16)),
    (_sinkhorn(65_536, "bf16", (1, 0), 2048), prototype_cases.sinkhorn_case(2048, 65_536, BF16)),
    (_prototype_cross_entropy(10, 2, 65_536, "bf16", "different", (1, 0), 64),
     prototype_cases.dino_case(2, 10, 64, 65_536, BF16)),
    (_prototype_head(256, "bf16", 10, 1024, 65_536), prototype_cases.head_case(2, 10, 1024, 65_536, 256, BF16)),
]  # fmt: skip


def goals() -> list[dict]:
    """For each kernel that a goal's shape launches on an H200."""
    table = []
    for case, cost in GOALS:
        row = {"op": cost.op, "shape": cost.shape, "dtype": case.dtype}
        row |= {"GFLOP": round(cost.flops / 1e9, 1), "MB": round(cost.bytes / 1e6, 1)}
        table += [row | _facts(code) for code in codes(case.call, 90)]
    return table


def _facts(code: Code) -> dict:
    return {name: getattr(code, name) for name in ("kernel", "warps", "registers", "spills", "shared", "wgmma")}


@dataclass
class Row:
    """A kernel that a case launches, and its machine code for each architecture that launches it."""

    case: Case
    kernel: str
    codes: dict[int, Code]


def rows() -> list[Row]:
    """Of every case; a kernel that several cases share, with the same machine code, is listed with the first."""
    table, seen = [], []
    for case in CASES:
        of_case: dict[tuple[str, int], Row] = {}
        for arch in ARCHITECTURES:
            names = Counter()
            for code in codes(case.call, arch):
                names[code.kernel] += 1
                row = of_case.setdefault((code.kernel, names[code.kernel]), Row(case, code.kernel, {}))
                row.codes[arch] = code
        for row in of_case.values():
            if row.codes not in seen:
                seen.append(row.codes)
                table.append(row)
    return table


def _cell(code: Code | None) -> str:
    """`8 x 126, 49 K`: warps, registers of a thread, shared memory; and spills where there are any."""
    if code is None:
        return "-"
    shared = f", {code.shared / 1024:.3g} K" if code.shared else ""
    return f"{code.warps} x {code.registers}{shared}" + (f", {code.spills} spills" if code.spills else "")


def _readable(row: Row) -> dict[str, str]:
    facts = {"op": row.case.op, "kernel": row.kernel, "shape": row.case.shape, "dtype": row.case.dtype}
    facts |= {f"sm_{arch}": _cell(row.codes.get(arch)) for arch in ARCHITECTURES}
    hopper = row.codes.get(90)
    if hopper is None:
        return facts | dict.fromkeys(("loads", "stores", "wgmma"), "-")
    return facts | {"loads": _widths(hopper.loads), "stores": _widths(hopper.stores), "wgmma": str(hopper.wgmma)}


def _record(row: Row) -> list[dict]:
    """For the JSON, one for each architecture."""
    records = []
    for arch, code in sorted(row.codes.items()):
        record = {"op": row.case.op, "kernel": row.kernel, "shape": row.case.shape, "dtype": row.case.dtype}
        record |= {"arch": f"sm_{arch}"}
        record |= {name: getattr(code, name) for name in ("warps", "registers", "spills", "shared")}
        records.append(record | {"loads": _widths(code.loads), "stores": _widths(code.stores), "wgmma": code.wgmma})
    return records


def _widths(counter: Counter) -> str:
    return " + ".join(f"{count} x {bits}" for bits, count in sorted(counter.items(), reverse=True)) or "-"


HEAD = """# What the GPU kernels compile to

Compiled ahead of time with Triton {triton} by `python tests/aot.py`; nothing was run or timed. For each architecture
`8 x 126, 49 K`: warps of a program, registers of a thread, KiB of shared memory (none: 0), and instructions on local
memory ("spills") where there are any; `-`: its launcher takes another kernel. A program may have 64 KiB on sm_75, 163
on sm_80, 99 on sm_86, sm_89 and sm_120, and 227 on sm_90 and sm_100. On sm_90 alone: `loads` and `stores`, instructions
on global memory in the program's code, by bits a thread; `wgmma`, Hopper's tensor-core instructions. A loop's body
counts once, as often as the compiler wrote it (pipelining repeats loads). The JSON beside this page has them for all.

"""


GOALS_HEAD = """
## The shapes of the goals on an H200

What these shapes launch there (sm_90). `GFLOP`: matrix products, `MB`: inputs, results and passes that no algorithm
avoids, both at the least and of the whole operation, forward and backward. CLIP's gradients at D = 512 are torch's
products of weights that `weights_kernel` writes.

"""


def _markdown(table: list[dict]) -> str:
    lines = [[*table[0]], ["---"] * len(table[0]), *[[str(value) for value in row.values()] for row in table]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    table, of_goals = rows(), goals()
    records = [record for row in table for record in _record(row)]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    readable = _markdown([_readable(row) for row in table])
    markdown = HEAD.format(triton=triton.__version__) + readable + GOALS_HEAD + _markdown(of_goals)
    RESULTS.with_suffix(".md").write_text(markdown)
    RESULTS.with_suffix(".json").write_text(
        json.dumps({"triton": triton.__version__, "kernels": records, "goals": of_goals}, indent=1) + "\n"
    )
    print(f"{len(table)} rows in {RESULTS}.md")


if __name__ == "__main__":
    main()
