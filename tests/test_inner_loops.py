"""How many instructions a warp issues for a tile in the loops that long walks are made of, without a GPU.

At tens of thousands of rows a loss is as fast as these loops. What counts is the way that most tiles take: a branch
round the masks, which only tiles with an own image or a ragged edge need, is taken. Times are predictions of a model,
in docs/log.md.
"""

import re
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")

import aot  # noqa: E402

from fastjem.kernels.contrastive import gpu as contrastive  # noqa: E402

pytestmark = pytest.mark.aot

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
TARGET = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


def code_of(compiled: triton.compiler.CompiledKernel) -> tuple[list[tuple[str, str]], dict[int, int]]:
    """Addresses and instructions, and where branches go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        lines = INSTRUCTION.findall(aot._cuobjdump("-sass", file.name))
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    goes_to = {i: place[int(m.group(1), 16)] for i, (_, text) in enumerate(lines) if (m := TARGET.search(text))}
    return lines, goes_to


def innermost_loops(compiled: triton.compiler.CompiledKernel) -> list[list[str]]:
    """The instructions of each, whatever branches are in it."""
    lines, goes_to = code_of(compiled)
    loops = [(to, i) for i, to in goes_to.items() if to < i]
    return [
        [text for _, text in lines[begin : end + 1]]
        for begin, end in sorted(loops)
        if not any(begin <= to and i < end for to, i in loops)
    ]


def instructions_of_a_tile(compiled: triton.compiler.CompiledKernel, *, behind: bool = False) -> int:
    """In the loop that multiplies matrices, or behind it, where every branch forward within that is taken."""
    lines, goes_to = code_of(compiled)
    loops = [(to, i) for i, to in goes_to.items() if to < i]
    products = [(begin, end) for begin, end in loops if any("GMMA" in text for _, text in lines[begin:end])]
    assert len(products) == 1, products
    begin, end = products[0]
    if behind:
        begin, end = end + 1, next(i for i in range(end, len(lines)) if "EXIT" in lines[i][1])
    count = 0
    at = begin
    while at <= end:
        count += 1
        to = goes_to.get(at, at)
        at = to if at < to <= end else at + 1
    return count


def _views(n: int, d: int):
    views = [torch.zeros(n, d, dtype=torch.bfloat16) for _ in range(2)]
    loss, *saved = contrastive.nt_xent_of_views(views, None, None, 0.5, False)
    contrastive.nt_xent_of_views_backward(loss, *saved, None, None, 0.5, False, torch.bfloat16, [True, False])


def _info_nce(d: int, learned: torch.Tensor | None = None):
    q, bank = torch.zeros(300, d, dtype=torch.bfloat16), torch.zeros(3000, d, dtype=torch.bfloat16)
    contrastive.info_nce(q, q, bank, learned, -300, 0.1, [True, True, False, False])


def _clip_loss(d: int):
    x, scale, lse = torch.zeros(300, d, dtype=torch.bfloat16), torch.ones(()), torch.zeros(300, dtype=torch.float64)
    contrastive.clip_loss(x, x, scale, 0)
    contrastive.clip_loss_backward(x, x, scale, lse, lse, 0, [True, True])


# On Hopper, instructions a warp and a tile, and how many elements of the tile that warp has. Before masks left the
# loops: 956 of 1024 elements in NT-Xent's sums, 973 of 1024 in its gradient, 1395 of 1024 in CLIP's sums, 657 of 1024
# in the walk over a bank. What a tile of that walk is left without, maxima and their part in the sums, is 150 of 400.
MOST = {
    "sums of half of the tiles": (lambda: _views(4500, 128), "sums_kernel", 640, 2048),
    "sums of all tiles": (lambda: _views(300, 128), "sums_kernel", 420, 2048),
    "the gradient, finished": (lambda: _views(4500, 128), "own_views_kernel", 380, 1024),
    "the gradient, shared": (lambda: _views(300, 128), "owner_kernel", 330, 1024),
    "CLIP's sums": (lambda: _clip_loss(128), "sums_kernel", 1330, 2048),
    "a bank": (lambda: _info_nce(128), "attend_kernel", 260, 1024),
    "a bank, a learned temperature": (lambda: _info_nce(128, torch.ones(())), "attend_kernel", 420, 1024),
}


@pytest.mark.parametrize("name", MOST)
def test_a_tile_costs_at_most_so_many_instructions(name, monkeypatch):
    call, kernel, most, elements = MOST[name]
    tiles = {}
    with aot.compiling(90) as compiled, torch.no_grad():
        compile_only = aot.launch.launch

        def noting(kernel, grid, *args, device_of, **meta) -> None:
            tiles[kernel.fn.__name__] = meta
            compile_only(kernel, grid, *args, device_of=device_of, **meta)

        monkeypatch.setattr(aot.launch, "launch", noting)
        call()
    (code,) = (x for x in compiled if x.metadata.name == kernel)
    rows, columns = tiles[kernel]["BM"], tiles[kernel]["BN"]
    assert rows * columns == elements * code.metadata.num_warps
    assert instructions_of_a_tile(code) <= most


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels", "channels_last"])
def test_a_pixel_of_an_augmented_image_costs_at_most_so_many_instructions(channels_last):
    """Of a thread: four pixels' colours with every branch's code, of which an image takes a third, and for each step of
    a blur's radius eight numbers down and eight across. They were 550 and 1,150 for two pixels, and 215 for one number
    across (64 of them shuffles) and 19 down."""
    call = aot._augment(224, "bf16", channels_last).call
    with aot.compiling(90) as compiled, torch.no_grad():
        call()
    (code,) = compiled
    mean, colours, *blurs = innermost_loops(code)
    assert len(mean) <= 920 and len(colours) <= 1070
    assert not any("SHFL" in text or "BAR" in text for text in colours)
    assert len(blurs) == (6 if channels_last else 2)
    assert all(len(down) <= 80 for down in blurs[::2])
    assert all(len(across) <= 52 for across in blurs[1::2])
    stored = aot.Code.of(code).stores
    assert stored.keys() == {64, 128}, stored


def test_a_row_of_sinkhorn_costs_at_most_so_many_instructions():
    """A warp and row of 3000 prototypes, of which it has an eighth; 473 of one block of 4096, each number divided."""
    with aot.compiling(90) as compiled, torch.no_grad():
        aot._sinkhorn(3000, "bf16", (1, 0)).call()
    (code,) = (x for x in compiled if x.metadata.name == "_softmax_sums_kernel")
    (row,) = innermost_loops(code)
    assert code.metadata.num_warps == 8
    assert len(row) <= 320


def test_a_tile_of_the_heads_attention():
    """128 x 32 logits of 256 columns and their product with prototypes; 527 and 600 while each tile multiplied its
    rows' sums by how much maxima had moved. The teacher's values are other prototypes, and it has a bias."""
    with aot.compiling(90) as compiled, torch.no_grad():
        aot._prototype_head(256, "bf16").call()
    counts = [instructions_of_a_tile(x) for x in compiled if x.metadata.name == "attend_kernel"]
    assert len(counts) == 2 and min(counts) <= 380 and max(counts) <= 490


def test_what_siglip_makes_of_a_tile():
    """Losses, derivatives and their sums, of 1024 elements a warp; before masks left them and with a logarithm 2435."""

    def call() -> None:
        x, number = torch.zeros(300, 768, dtype=torch.bfloat16), torch.ones(())
        contrastive.siglip_loss_of_pairs(x, x, number, number, 1.0, 1.0, [True, True])

    with aot.compiling(90) as compiled, torch.no_grad():
        call()
    (code,) = (x for x in compiled if x.metadata.name == "sigmoid_kernel")
    assert instructions_of_a_tile(code, behind=True) <= 1150
