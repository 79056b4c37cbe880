"""Memory and time of large vision transformers, by formula: `python benchmarks/plans.py` prints the tables of
docs/scaling.md. Nothing here is a measurement.

tests/test_plans.py holds numbers of parameters, what autograd keeps and floating-point operations against timm's
models; memory of shards, bytes sent and time follow from them and from the assumptions below.
"""

from dataclasses import dataclass
from itertools import pairwise

PEAK = 989e12  # FLOP/s: NVIDIA's figure for an H100 SXM, bfloat16, dense
SHARE = 0.4  # of the peak, an assumption: what well-kept transformers are trained at
MEMORY = 80e9 * 0.9  # bytes of a GPU, less a tenth for workspaces and what the allocator can't use, an assumption
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class ViT:
    """timm's, for three channels, with a class token; pre-norm blocks, fused attention."""

    name: str
    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP, behind the gate if there is one
    patch: int
    gated: bool = False  # SwiGLU in place of GELU
    layer_scale: bool = False

    def tokens(self, size: int) -> int:
        return (size // self.patch) ** 2 + 1

    def matrices(self) -> int:
        """Weights of a block's linear layers."""
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.hidden

    def block(self) -> int:
        """Parameters: with biases, two norms and LayerScale."""
        biases = 4 * self.width + (2 if self.gated else 1) * self.hidden + self.width
        return self.matrices() + biases + 4 * self.width + (2 * self.width if self.layer_scale else 0)

    def parameters(self, size: int = 224) -> int:
        stem = 3 * self.patch**2 * self.width + self.width
        return stem + (1 + self.tokens(size)) * self.width + self.depth * self.block() + 2 * self.width

    def kept_by_block(self, half: bool) -> int:
        """Bytes a token that autograd keeps of a block.

        In full precision: the inputs of both norms, both norms' outputs (inputs of linear layers), queries, keys and
        values, attention's output, and what lies on both sides of the MLP's nonlinearity: 8 widths and 2 hidden ones;
        with a gate both halves, the gate's value and the product, 4. LayerScale keeps its inputs, 2 widths. Each norm
        keeps a mean and a deviation, attention a log-sum-exp a head. Under autocast the residual stream, which the
        norms read, stays in float32, and the rest is bfloat16.
        """
        size = HALF if half else FLOAT
        stream = 2 * self.width * FLOAT
        inner = (6 * self.width + (4 if self.gated else 2) * self.hidden) * size
        scaled = 2 * self.width * size if self.layer_scale else 0
        return stream + inner + scaled + (4 + self.heads) * FLOAT

    def kept(self, size: int, half: bool, checkpointed: bool = False) -> int:
        """Bytes an image of so many pixels a side. Checkpointed: each block's input alone."""
        tokens = self.tokens(size)
        stream = self.width * FLOAT
        of_block = stream if checkpointed else self.kept_by_block(half)
        image = 3 * size**2 * (HALF if half else FLOAT)
        return tokens * (self.depth * of_block + stream + 2 * FLOAT) + image

    def flops(self, size: int) -> int:
        """Of a forward pass of one image: two a weight and token, and attention's two products of tokens."""
        tokens = self.tokens(size)
        stem = 2 * 3 * self.patch**2 * self.width * (tokens - 1)
        return stem + self.depth * (2 * tokens * self.matrices() + 4 * tokens**2 * self.width)


VIT_S = ViT("ViT-S/16", 384, 12, 6, 1536, 16)
VIT_B = ViT("ViT-B/16", 768, 12, 12, 3072, 16)
VIT_L = ViT("ViT-L/16", 1024, 24, 16, 4096, 16)
VIT_G = ViT("ViT-g/14", 1536, 40, 24, 4096, 14, gated=True, layer_scale=True)


@dataclass(frozen=True)
class Recipe:
    name: str
    large: int  # views of 224 pixels
    small: int  # views of 96 pixels, or 98, which is a multiple of 14
    teacher: bool  # a momentum copy, which sees the large views
    head: tuple[int, ...]  # widths behind the encoder's

    def sizes(self, vit: ViT) -> list[int]:
        small = 98 if vit.patch == 14 else 96
        return [224] * self.large + [small] * self.small

    def head_parameters(self, vit: ViT) -> int:
        widths = (vit.width, *self.head)
        return sum(a * b for a, b in pairwise(widths))

    def parameters(self, vit: ViT) -> int:
        return vit.parameters() + self.head_parameters(vit)

    def kept(self, vit: ViT, half: bool = True, checkpointed: bool = False) -> int:
        """Bytes an image of the data: of all its views, in the student's encoder."""
        return sum(vit.kept(size, half, checkpointed) for size in self.sizes(vit))

    def recomputed(self, vit: ViT) -> int:
        """Bytes an image that one block keeps while it is computed again: of all views of the size with most tokens."""
        sizes = self.sizes(vit)
        return max(sizes.count(size) * vit.tokens(size) for size in set(sizes)) * vit.kept_by_block(half=True)

    def pixels(self, vit: ViT) -> int:
        """Bytes of an image's views as uint8."""
        return sum(3 * size**2 for size in self.sizes(vit))

    def flops(self, vit: ViT, again: bool = False) -> int:
        """Of a step, an image: forward, twice that backward, forward again where that is asked for, the teacher's."""
        student = sum(vit.flops(size) for size in self.sizes(vit))
        teacher = self.large * vit.flops(224) if self.teacher else 0
        return (4 if again else 3) * student + teacher


SIMCLR = Recipe("SimCLR, 2 views", 2, 0, False, (2048, 128))
DINOV2 = Recipe("DINOv2, 2 + 8 views", 2, 8, True, (2048, 2048, 256, 65536))


def states(vit: ViT, recipe: Recipe, ranks: int | None) -> float:
    """Bytes of a rank: weights, gradients, AdamW's two moments and the teacher in float32; ranks None: DDP.

    DDP holds gradients a second time, in the buckets that it sends. In shards a rank has its part of all, and beside it
    the root unit (heads) with its gradient and two blocks' weights in float32, as they are gathered, of which the
    second arrives while the first is used, and one block's gradient. Either way autocast makes a bfloat16 copy of the
    student's weights, which backward reads: in shards it stays when the gathered weights are freed. Blocks that are
    computed again make it again, but autocast keeps the first one until forward ends; it is counted there, too.
    """
    parameters = recipe.parameters(vit)
    kinds = 4 + (1 if recipe.teacher else 0)
    if ranks is None:
        return parameters * (kinds * FLOAT + FLOAT + HALF)
    root = parameters - vit.depth * vit.block()
    gathered = (2 * root + 3 * vit.block()) * FLOAT
    return parameters * (kinds * FLOAT / ranks + HALF) + gathered


def sent(vit: ViT, recipe: Recipe, ranks: int, sharded: bool) -> float:
    """Bytes that a rank sends in a step for weights and gradients (losses: benchmarks/traffic.py).

    DDP: one all-reduce of gradients. In shards: weights forward, backward and the teacher's, and the gradients to the
    rank that has the shard. All in float32 (fastjem/sharding.py says why).
    """
    parameters = recipe.parameters(vit)
    others = (ranks - 1) / ranks
    if not sharded:
        return 2 * others * parameters * FLOAT
    passes = 3 if recipe.teacher else 2
    return others * parameters * (passes + 1) * FLOAT


@dataclass(frozen=True)
class Plan:
    """Options of a run, and what a rank needs for them."""

    options: str
    ranks: int
    sharded: bool = False
    checkpointed: bool = False
    micro_batch: int | None = None

    def memory(self, vit: ViT, recipe: Recipe, batch: int) -> float:
        """Bytes of a rank with so many images."""
        at_once = batch if self.micro_batch is None else min(batch, self.micro_batch)
        activations = at_once * recipe.kept(vit, checkpointed=self.checkpointed)
        if self.checkpointed:
            activations += at_once * recipe.recomputed(vit)
        waiting = 0.0
        if self.micro_batch is not None:  # views that wait, and embeddings with their gradients
            waiting = batch * (recipe.pixels(vit) + 2 * FLOAT * vit.width * (recipe.large + recipe.small))
        return states(vit, recipe, self.ranks if self.sharded else None) + activations + waiting

    def largest(self, vit: ViT, recipe: Recipe) -> int:
        """The most images of a rank that fit."""
        fixed = self.memory(vit, recipe, 0)
        at_least = 1 if self.micro_batch is None else self.micro_batch
        if self.memory(vit, recipe, at_least) > MEMORY:
            return 0
        more = self.memory(vit, recipe, at_least + 1) - self.memory(vit, recipe, at_least)
        begun = self.memory(vit, recipe, at_least) - fixed
        return at_least + int((MEMORY - fixed - begun) // more)

    def seconds(self, vit: ViT, recipe: Recipe, batch: int) -> float:
        """Of a rank's step, of its matrix products alone."""
        again = self.checkpointed or self.micro_batch is not None
        flops = recipe.flops(vit, again)
        if self.checkpointed and self.micro_batch is not None:  # forward three times
            flops += sum(vit.flops(size) for size in recipe.sizes(vit))
        return batch * flops / (SHARE * PEAK)


PLANS = (
    Plan("DDP", 8),
    Plan("`--activation-checkpointing`", 8, checkpointed=True),
    Plan("`--micro-batch 16`", 8, micro_batch=16),
    Plan("`--shard`", 8, sharded=True),
    Plan("`--shard`", 64, sharded=True),
    Plan("`--shard`", 512, sharded=True),
    Plan("`--shard --activation-checkpointing`", 64, sharded=True, checkpointed=True),
    Plan("`--shard --activation-checkpointing`", 512, sharded=True, checkpointed=True),
    Plan("`--shard --micro-batch 16`", 64, sharded=True, micro_batch=16),
)
BATCH = 64  # images of a rank
RUNS = [(vit, recipe) for vit in (VIT_L, VIT_G) for recipe in (SIMCLR, DINOV2)]


def per_image() -> str:
    lines = [
        "| encoder, recipe | parameters | float32 | bfloat16 | bfloat16, checkpointed | TFLOP a step | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for vit, recipe in RUNS:
        parameters = f"{vit.parameters() / 1e6:.0f} M + {recipe.head_parameters(vit) / 1e6:.0f} M"
        kept = [recipe.kept(vit, half=False), recipe.kept(vit), recipe.kept(vit, checkpointed=True)]
        flops = recipe.flops(vit)
        megabytes = " | ".join(f"{x / 1e6:.0f} MB" for x in kept)
        speed = f"{SHARE * PEAK / flops:.0f}"
        lines.append(f"| {vit.name}, {recipe.name} | {parameters} | {megabytes} | {flops / 1e12:.2f} | {speed} |")
    return "\n".join(lines)


def per_rank() -> str:
    """Without activations."""
    lines = ["| encoder, recipe | DDP | `--shard` of 8 | of 64 | of 512 | sent, DDP | sent, `--shard` |"]
    lines.append("|---|---|---|---|---|---|---|")
    for vit, recipe in RUNS:
        held = [states(vit, recipe, ranks) for ranks in (None, 8, 64, 512)]
        traffic = [sent(vit, recipe, 64, sharded) for sharded in (False, True)]
        cells = " | ".join(f"{x / 1e9:.1f} GB" for x in held + traffic)
        lines.append(f"| {vit.name}, {recipe.name} | {cells} |")
    return "\n".join(lines)


def plans() -> str:
    lines = [f"| encoder, recipe | options | ranks | memory of {BATCH} images | step of {BATCH} | most images |"]
    lines.append("|---|---|---|---|---|---|")
    for vit, recipe in RUNS:
        for plan in PLANS:
            memory = plan.memory(vit, recipe, BATCH)
            most = plan.largest(vit, recipe)
            fits = f"{memory / 1e9:.0f} GB" + ("" if memory <= MEMORY else ", too much")
            step = f"{plan.seconds(vit, recipe, BATCH):.2f} s"
            images = "none" if not most else str(most) if most < 10_000 else "over 10,000"
            row = [f"{vit.name}, {recipe.name}", plan.options, plan.ranks, fits, step, images]
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(per_image(), per_rank(), plans(), sep="\n\n")
