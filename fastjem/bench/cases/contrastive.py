"""NT-Xent (SimCLR), InfoNCE with a queue (MoCo), nearest neighbours (NNCLR), image-text pairs (CLIP, SigLIP)."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case, Draw

SIMCLR_TEMPERATURE, MOCO_TEMPERATURE = 0.5, 0.1


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat([z0, z1]), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / SIMCLR_TEMPERATURE).masked_fill(itself, -torch.inf)
    return cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))


def lightly_nt_xent():
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=SIMCLR_TEMPERATURE)


def nt_xent_case(n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """M = 2 N rows. FLOPs without ever holding M x M: half of the products forward (symmetric), again backward, and
    the gradient's full product with the rows: 1 + 1 + 2 times M^2 D. Bytes: rows read, their gradient written."""
    m = 2 * n
    return Case(
        "nt_xent", f"2 x {n} x {d}", lambda draw: draw.pair(n, d), nt_xent,
        lambda z0, z1: F.nt_xent(z0, z1, temperature=SIMCLR_TEMPERATURE), dtype=dtype,
        uses=("nt_xent_of_views", "nt_xent_of_views_backward"),
        peers={"lightly": lightly_nt_xent}, bytes=2 * m * d * dtype.itemsize, flops=4 * m * m * d, **options,
    )  # fmt: skip


def enqueue(key: Tensor, queue: Tensor) -> None:
    with torch.no_grad():
        queue[: len(key)] = normalize(key, dim=1)


def moco_loss(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
    q = normalize(query, dim=1)
    k = normalize(key, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / MOCO_TEMPERATURE
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def moco(query: Tensor, key: Tensor, queue: Tensor, loss=moco_loss) -> Tensor:
    """As in the authors' code: the queue is copied, as it changes before backward."""
    result = loss(query, key, queue.clone())
    enqueue(key, queue)
    return result


def compiled_moco():
    """Inductor (torch 2.11) drops the copy if it sees it, and differentiates with the queue as it is after enqueueing:
    silently wrong."""
    return partial(moco, loss=torch.compile(moco_loss, dynamic=False))


def our_moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    loss = F.info_nce(query, key, queue, temperature=MOCO_TEMPERATURE)
    enqueue(key, queue)
    return loss


def lightly_moco(k: int, d: int):
    def load():
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(temperature=MOCO_TEMPERATURE, memory_bank_size=(k, d))

        def run(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
            loss.memory_bank.bank = queue
            return loss(query, key)

        return run

    return load


def moco_case(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """The keys are constants and enter the queue in the same call. FLOPs: the logits, and their weights times the
    queue. Bytes: query, key, queue read; the query's gradient and the enqueued rows written."""

    def inputs(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        return *draw.pair(n, d, (True, False)), normalize(draw.normal(k, d), dim=1)

    # lightly's bank is always float32
    return Case(
        "info_nce", f"{n} x {k} x {d}, enqueue", inputs, moco, our_moco, dtype=dtype, uses=("info_nce_backward",),
        peers={"lightly": lightly_moco(k, d)} if dtype == torch.float32 else {}, compiled=compiled_moco,
        bytes=(k + 4 * n) * d * dtype.itemsize, flops=4 * n * k * d, **options,
    )  # fmt: skip


def nearest_neighbors(query: Tensor, bank: Tensor) -> Tensor:
    return (normalize(query, dim=1) @ normalize(bank, dim=1).T).argmax(1)


def nearest_neighbors_case(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Bytes: queries and bank read."""
    return Case(
        "nearest_neighbors", f"{n} x {k} x {d}", lambda draw: (draw.normal(n, d), draw.normal(k, d)),
        nearest_neighbors, F.nearest_neighbors, dtype=dtype, bytes=(n + k) * d * dtype.itemsize, flops=2 * n * k * d,
        **options,
    )  # fmt: skip


def nnclr(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, bank: Tensor) -> Tensor:
    rows = normalize(bank, dim=1)
    neighbours = [bank[(normalize(z, dim=1) @ rows.T).argmax(1)] for z in (z0, z1)]
    return (nt_xent(neighbours[0], p1) + nt_xent(neighbours[1], p0)) / 2


def lightly_nnclr(k: int, d: int):
    def load():
        from lightly.loss import NTXentLoss
        from lightly.models.modules import NNMemoryBankModule

        search = NNMemoryBankModule(size=(k, d))
        loss = NTXentLoss(temperature=SIMCLR_TEMPERATURE)

        def run(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, bank: Tensor) -> Tensor:
            search.bank = bank.T  # lightly's is [D, K]
            return (loss(search(z0, update=False), p1) + loss(search(z1, update=False), p0)) / 2

        return run

    return load


def nnclr_case(n: int, k: int, d: int, **options) -> Case:
    """FLOPs: both views' rows against the bank, and two losses of 2 N rows. Bytes: everything read, gradients
    written."""

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        return *draw.pair(n, d, (False, False)), *draw.pair(n, d), normalize(draw.normal(k, d), dim=1)

    return Case(
        "nnclr", f"{n} x {k} x {d}", inputs, nnclr, partial(F.nnclr, temperature=SIMCLR_TEMPERATURE),
        peers={"lightly": lightly_nnclr(k, d)},
        uses=("nearest_neighbors", "nt_xent_of_views", "nt_xent_of_views_backward"),
        bytes=4 * (k + 6 * n) * d, flops=4 * n * k * d + 8 * (2 * n) ** 2 * d, **options,
    )  # fmt: skip


def clip(x: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
    logits = scale * (x @ y.T)
    partner = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, partner) + cross_entropy(logits.T, partner)) / 2


def open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The formula of open_clip's ClipLoss: each direction is a product of its own."""
    partner = torch.arange(len(x), device=x.device)
    return (cross_entropy(scale * x @ y.T, partner) + cross_entropy(scale * y @ x.T, partner)) / 2


PAIRS_TEMPERATURE = 0.07
OF_PAIRS = ("clip_loss_of_pairs", "clip_loss_of_pairs_backward")


def memeff_clip():
    """`stable=False`: by default it multiplies the gradient by sqrt(N * temperature), which is CLIP's no more."""
    from memeff import MemoryEfficientCLIPLoss  # pyright: ignore[reportMissingImports]

    return MemoryEfficientCLIPLoss(temperature=PAIRS_TEMPERATURE, normalized_inputs=True, stable=False)


def fixed_clip_case(n: int, d: int, dtype: torch.dtype, **options) -> Case:
    """CLIP at a temperature that isn't learned, as memeff has it; bytes and FLOPs are those of `image_text_case`."""

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        return tuple(normalize(z, dim=1).requires_grad_() for z in draw.pair(n, d, (False, False)))

    return Case(
        "clip_loss", f"{n} x {d}, fixed temperature", inputs, partial(clip, scale=1 / PAIRS_TEMPERATURE),
        partial(F.clip_loss, logit_scale=1 / PAIRS_TEMPERATURE), dtype=dtype, peers={"memeff": memeff_clip},
        bytes=4 * n * d * dtype.itemsize, flops=8 * n * n * d, uses=OF_PAIRS, **options,
    )  # fmt: skip


def in_batch(query: Tensor, document: Tensor) -> Tensor:
    logits = normalize(query, dim=1) @ normalize(document, dim=1).T / PAIRS_TEMPERATURE
    return cross_entropy(logits, torch.arange(len(query), device=query.device))


def our_in_batch(query: Tensor, document: Tensor) -> Tensor:
    return F.info_nce(query, document, document, temperature=PAIRS_TEMPERATURE, label_offset=0)


def memeff_in_batch():
    """`margin=2`: no negative is left out for being alike; `stable=False` as in `memeff_clip`."""
    from memeff import MemoryEfficientQwen3Loss  # pyright: ignore[reportMissingImports]

    return MemoryEfficientQwen3Loss(temperature=PAIRS_TEMPERATURE, margin=2.0, stable=False)


def in_batch_case(n: int, d: int, dtype: torch.dtype, **options) -> Case:
    """One direction of pairs. FLOPs: similarities, and both gradients from the weights that their pass makes. Bytes:
    rows read, their gradients written."""
    return Case(
        "info_nce", f"{n} pairs x {d}", lambda draw: draw.pair(n, d), in_batch, our_in_batch, dtype=dtype,
        uses=("info_nce_backward",), peers={"memeff": memeff_in_batch}, bytes=4 * n * d * dtype.itemsize,
        flops=6 * n * n * d, **options,
    )  # fmt: skip


def siglip_kernel():
    """Its temperature is given as a logarithm."""
    from siglip_kernel import fused_siglip_loss  # pyright: ignore[reportMissingImports]

    def run(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return fused_siglip_loss(x, y, scale.log(), bias)

    return run


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula of open_clip's SigLipLoss."""
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -logsigmoid(labels * (scale * x @ y.T + bias)).sum() / len(x)


def image_text_case(op: str, n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs without ever holding N x N: CLIP's similarities forward and again backward, and both gradients; SigLIP's
    gradients come with the loss. Bytes: rows read, their gradients written."""
    eager, ours, peers, products, scalars = {
        "clip_loss": (clip, F.clip_loss, {"open_clip's formula": lambda: open_clip}, 4, (14.0,)),
        "siglip_loss": (siglip, F.siglip_loss, {}, 3, (10.0, -10.0)),
    }[op]
    if op == "siglip_loss" and options.get("devices") == ("cuda",):
        peers = {"siglip-kernel": siglip_kernel}

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        x, y = (normalize(z, dim=1).requires_grad_() for z in draw.pair(n, d, (False, False)))
        return x, y, *(torch.tensor(value, device=draw.device, requires_grad=True) for value in scalars)

    return Case(
        op, f"{n} x {d}", inputs, eager, ours, dtype=dtype, peers=peers, bytes=4 * n * d * dtype.itemsize,
        flops=2 * products * n * n * d, uses=(f"{op}_of_pairs", f"{op}_of_pairs_backward"), **options,
    )  # fmt: skip


CASES = [
    nt_xent_case(1024, 128, full_only=("cuda",)),
    nt_xent_case(1024, 128, torch.bfloat16, full_only=("cpu",)),
    nt_xent_case(4096, 128, full_only=("cpu", "cuda")),
    nt_xent_case(4096, 128, torch.bfloat16, devices=("cuda",)),
    nt_xent_case(32768, 128, torch.bfloat16, devices=("cuda",), full_only=("cuda",)),
    moco_case(256, 65536, 128, full_only=("cuda",)),
    moco_case(4096, 65536, 128, torch.bfloat16, devices=("cuda",)),
    nnclr_case(256, 65536, 256, full_only=("cpu", "cuda")),
    nearest_neighbors_case(256, 65536, 128, full_only=("cpu", "cuda")),
    image_text_case("clip_loss", 512, 512, full_only=("cuda",)),
    image_text_case("clip_loss", 4096, 512, full_only=("cpu", "cuda")),
    image_text_case("clip_loss", 32768, 512, torch.bfloat16, devices=("cuda",), full_only=("cuda",)),
    image_text_case("siglip_loss", 1024, 512, full_only=("cpu", "cuda")),
    image_text_case("siglip_loss", 8192, 768, torch.bfloat16, devices=("cuda",)),
    fixed_clip_case(8192, 512, torch.bfloat16, devices=("cuda",)),
    fixed_clip_case(32_768, 512, torch.bfloat16, devices=("cuda",), full_only=("cuda",)),
    in_batch_case(8192, 512, torch.bfloat16, devices=("cuda",)),
    # small runs
    nt_xent_case(128, 128, **SMALL),
    nt_xent_case(256, 2048, **SMALL),
    nt_xent_case(256, 128, torch.bfloat16, **SMALL),
    moco_case(128, 4096, 128, **SMALL),
    moco_case(256, 4096, 128, torch.bfloat16, **SMALL),
    nearest_neighbors_case(128, 4096, 256, **SMALL),
    nearest_neighbors_case(128, 4096, 256, torch.bfloat16, **SMALL),
    image_text_case("clip_loss", 128, 512, **SMALL),
    image_text_case("clip_loss", 256, 768, torch.bfloat16, **SMALL),
    image_text_case("siglip_loss", 128, 512, **SMALL),
    image_text_case("siglip_loss", 256, 768, torch.bfloat16, **SMALL),
]
