"""From a configuration to everything wired: `build` reads top to bottom, and `Training` is what the loop runs on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastjem import blocks, encoders, optim, precision, resume, sharding, starting
from fastjem.config import Config
from fastjem.data import loaders
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
from fastjem.data.source import Source, parts_of
from fastjem.data.stages import Stage, stage_at
from fastjem.encoders import Encoder
from fastjem.errors import UserError
from fastjem.methods import Defaults
from fastjem.micro_batches import Passes
from fastjem.prepare import MakeOptimizer, Objects, Parts, given_or, prepare
from fastjem.ranks import Ranks
from fastjem.step import Step, StepEnd


@dataclass
class Training:
    """A run, ready to go."""

    config: Config
    out: Path
    ranks: Ranks
    source: Source
    stages: list[Stage]  # what views and masks are, for which steps
    pixels: Pixels
    loader: loaders.Loader
    step: Step  # the modules
    step_end: StepEnd  # what they were as a step ended
    model: nn.Module  # what is called: `step`, or DDP or a compiled module around it
    outline: nn.Module | None  # with weights in shards, on the first rank: the encoder without any
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    defaults: Defaults  # of the run as it was begun; --max-steps may change
    facts: dict[str, Any]  # what a checkpoint tells a resumed run beside the modules' values
    unreadable: list[str]  # names of files that an earlier part of the run has told of
    resumed: bool  # from a checkpoint
    start: int  # the step that it goes on from
    done: int  # steps that were taken, those of before among them
    steps: int
    steps_per_epoch: int
    clip: float
    layout: dict[str, Any]  # dtype and memory format of the views
    scaler: torch.amp.GradScaler | None  # of the loss, in float16
    passes: Passes | None = None  # of the encoder within a batch; None: one
    notices: list[str] = field(default_factory=list)  # what the user is told before the first step

    @property
    def stage(self) -> Stage:
        """That of the next step."""
        return stage_at(self.stages, self.done)

    @property
    def precision(self) -> str:
        """bf16, fp16 or fp32."""
        return self.facts["precision"]

    @property
    def autocast(self) -> torch.dtype | None:
        return precision.DTYPES[self.precision]

    @property
    def encoder(self) -> nn.Module:
        """What is measured along the way and written at the end: the trained module, or its momentum copy."""
        teacher = self.config.teacher
        encoder = self.step.teacher["encoder"] if teacher else self.step.encoder
        return cast(Encoder, encoder).backbone

    def whole_encoder(self) -> nn.Module:
        """`encoder` for the first rank to call and write: where its weights are in shards, a plain copy of now. All
        ranks together."""
        return sharding.gathered(self.encoder, self.outline) if sharding.is_sharded(self.step) else self.encoder

    @property
    def rate(self) -> float:
        """The learning rate as a user gives it, for 256 images."""
        return given_or(self.config.learning_rate, self.defaults.learning_rate)

    def state(self, done: int) -> dict[str, torch.Tensor | Any]:
        """Model and optimizer behind step `done`, for a checkpoint; of weights in shards this rank's."""
        return {
            "step": done,
            "model": self.step.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pixels": self.pixels.to_dict(),
            **({precision.SCALER: self.scaler.state_dict()} if self.scaler else {}),
        }


def build(config: Config, ranks: Ranks, objects: Objects, out: Path, state: dict[str, Any] | None) -> Training:
    """Wire a run.

    Args:
        state: the checkpoint to go on from; None: from the beginning.

    Raises:
        UserError: for what can't be done, with the reason.
    """
    with ranks.together():
        parts = prepare(config, ranks, objects, out, state)
    # From here on ranks wait for each other.
    config, source, encoder, steps = parts.config, parts.source, parts.encoder, parts.steps
    start = state["step"] if state else 0
    parts.facts["files_at_a_time"] = [int(ranks.agree(count)) for count in parts.facts["files_at_a_time"]]
    windows = loaders.windows(source, parts.facts["files_at_a_time"])
    loader = create_loader(config, ranks, source, windows, parts.stages, start, state)
    with ranks.together():
        step = create_step(config, ranks, parts)
        if config.sync_batch_norm and ranks.size > 1:
            step = cast(Step, encoders.synchronize_batch_norm(step))
        layout = view_layout(parts.facts["precision"], ranks, encoder, named=objects.encoder is None)
        outline = outline_of(config, ranks, step)
        if config.activation_checkpointing:
            blocks.recompute(step.encoder)
        if shards(config, ranks):
            scaled = precision.scaler_of(parts.facts["precision"], ranks.device) is not None
            parts.notices += filter(None, [sharding.shard(step, ranks, scaled=scaled, compiles=config.compile)])
        optimizer = create_optimizer(config, parts.defaults, step, objects.optimizer)
        if state:
            resume.restore(out, step, optimizer, state)
        optim.separate_groups(optimizer)  # behind the loading, which puts the saved tensors in
        if isinstance(optimizer, optim.Fused):
            optimizer.attach_teacher(*step.teacher_and_student())
    scaler = precision.scaler_of(parts.facts["precision"], ranks.device)
    if scaler and state and precision.SCALER in state:
        scaler.load_state_dict(state[precision.SCALER])
    said = parts.notices + loaders.order_told(source, parts.facts["files_at_a_time"])
    said += notices(config, ranks, source, loader)
    passes = passes_of(config, ranks)
    if passes is not None and encoders.has_batch_norm(encoder):
        over = " over all ranks" if config.sync_batch_norm and ranks.size > 1 else ""
        said.append(f"--micro-batch: the encoder's batch norms take their statistics of {passes.size} images{over}")
    said += filter(None, [resume.other_ranks(step, state, ranks.size)])
    return Training(
        config=config,
        out=out,
        ranks=ranks,
        source=source,
        stages=parts.stages,
        pixels=Pixels.of(parts.stages[-1].specs, source.levels),
        loader=loader,
        step=step,
        step_end=StepEnd(step),
        model=wrapped(config, ranks, step),
        outline=outline,
        optimizer=optimizer,
        schedule=create_schedule(config, parts.defaults, steps, parts.steps_per_epoch),
        defaults=parts.defaults,
        facts=parts.facts,
        unreadable=(state or {}).get("unreadable", []),
        resumed=state is not None,
        start=start,
        done=start,
        steps=steps,
        steps_per_epoch=parts.steps_per_epoch,
        clip=given_or(config.clip, parts.defaults.clip),
        layout=layout,
        scaler=scaler,
        passes=passes,
        notices=said,
    )


def create_step(config: Config, ranks: Ranks, parts: Parts) -> Step:
    """The modules, with the weights that they begin with, and with what stays as it is frozen."""
    try:
        step = Step(parts.encoder, parts.method.to(ranks.device), config.momentum_encoder).to(ranks.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if parts.weights is not None and config.weights_of == "all":
        starting.load_all(step, parts.weights, config, len(parts.source))
    if config.freeze is not None:
        starting.freeze(step.encoder.backbone, config.freeze)
    needing = {"momentum": config.momentum is not None and not step.teacher}
    needing["teacher"] = config.teacher and "encoder" not in step.teacher
    for name, lacking in needing.items():
        if lacking:
            flag = config.flag(name)
            raise UserError(f"{flag}: {config.method} has no momentum encoder; --momentum-encoder gives it one")
    return step


def create_loader(
    config: Config,
    ranks: Ranks,
    source: Source,
    windows: tuple[loaders.Windows, ...],
    stages: Sequence[Stage],
    start: int,
    state: dict[str, Any] | None,
) -> loaders.Loader:
    """One for all steps from `start` on, or one for each stage of image sizes, one behind the other."""
    order = loaders.Order(
        samples=len(source),
        parts=parts_of(source),
        windows=windows,
        batch=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        start=start * config.accumulate,
        stop=stages[-1].stop * config.accumulate,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    budget = loaders.Budget(
        workers=config.workers if config.workers >= 0 else ranks.cores,
        memory=config.memory,
        holds=(state or {}).get("holds_images"),
        device=ranks.device,
        decoder_share=(state or {}).get("decoder_share", config.decoder_share),
        agree=ranks.agree,
    )
    loader = loaders.create(config.loader, source, stages[-1].specs, order, budget)
    if len(stages) == 1:
        return loader
    batches = [(stage.specs, stage.start * config.accumulate, stage.stop * config.accumulate) for stage in stages]
    return loaders.Staged(loader, [(specs, order.part(begins, ends)) for specs, begins, ends in batches])


def view_layout(chosen: str, ranks: Ranks, encoder: Encoder, *, named: bool) -> dict[str, Any]:
    """dtype and memory format of the views. named: the encoder is one of timm's, by its name."""
    # Half the bytes for what autocast would round anyway; a module of one's own may look at its images first.
    half = precision.DTYPES[chosen] if ranks.device.type == "cuda" and named else None
    channels_last = encoders.memory_format(encoder) == torch.channels_last
    return {"dtype": half or torch.float32, "channels_last": channels_last}


def create_optimizer(
    config: Config, defaults: Defaults, step: Step, make: MakeOptimizer | None
) -> torch.optim.Optimizer:
    waiting = ("encoder.",) if config.head_warmup_epochs else ()
    groups = optim.parameter_groups(step, step.method.constant_rate, rate_factors(config, step.encoder), waiting)
    if not groups or all(group["waits"] for group in groups):
        flag = f"--head-warmup-epochs {config.head_warmup_epochs:g}" if groups else f"--freeze {config.freeze}"
        raise UserError(f"{flag} leaves nothing to train: {config.method} has no heads of its own")
    if make is not None:
        optimizer = make(groups)
        kept = isinstance(optimizer, torch.optim.Optimizer) and all(
            {"decays", "constant_rate", "rate_factor", "waits"} <= group.keys() for group in optimizer.param_groups
        )
        if not kept:
            raise UserError(f"optimizer must make a torch.optim.Optimizer of the groups it is given, got {optimizer!r}")
        return optimizer
    return optim.build(given_or(config.optimizer, defaults.optimizer), groups)


def rate_factors(config: Config, encoder: Encoder) -> dict[str, float]:
    """On the learning rate, by the parameter's name in `Step`. A mask token is of the stem, as a class token is."""
    layer_decay = given_or(config.layer_decay, 1.0)
    of_backbone = optim.rate_factors(encoder.backbone, layer_decay, given_or(config.patch_embed_rate, 1.0))
    found = {f"encoder.backbone.{name}": factor for name, factor in of_backbone.items()}
    if layer_decay != 1:
        stem = min(optim.rate_factors(encoder.backbone, layer_decay).values())
        found["encoder.mask_token"] = stem
    return found


def create_schedule(config: Config, defaults: Defaults, steps: int, steps_per_epoch: int) -> optim.Schedule:
    """Learning rate, weight decay and momentum over the run: the method's, but for what the user gave."""
    optimizer = given_or(config.optimizer, defaults.optimizer)
    rate = given_or(config.learning_rate, defaults.learning_rate)
    warmup_epochs = given_or(config.warmup_epochs, defaults.warmup_epochs)
    momentum = given_or(config.momentum, defaults.momentum)
    weight_decay = given_or(config.weight_decay, defaults.weight_decay)
    final_weight_decay = weight_decay
    if config.weight_decay is None and defaults.final_weight_decay is not None:
        final_weight_decay = defaults.final_weight_decay
    head_warmup = round(config.head_warmup_epochs * steps_per_epoch)
    if head_warmup >= steps:
        given = f"--head-warmup-epochs {config.head_warmup_epochs:g}"
        raise UserError(f"{given} is the whole run of {steps} steps: the encoder would never learn")
    scaled = optim.scaled(optimizer, rate, config.batch_size * config.accumulate)
    most = torch.finfo(torch.float32).max  # of the optimisers' own figures
    for name, value in {"learning_rate": scaled, "weight_decay": weight_decay}.items():
        if value > most:
            raise UserError(f"{config.flag(name)}: {value:g} for this batch is more than float32 holds ({most:g})")
    return optim.Schedule(
        steps=steps,
        learning_rate=scaled,
        warmup=round(min(warmup_epochs * steps_per_epoch, steps // 10)),
        head_warmup=head_warmup,
        weight_decay=weight_decay,
        final_weight_decay=final_weight_decay,
        momentum=momentum,
        final_momentum=1.0 if defaults.final_momentum == 1 else momentum,
    )


def shards(config: Config, ranks: Ranks) -> bool:
    """Whether weights are in shards; one rank alone has nobody to share them with."""
    return config.shard and ranks.size > 1


def outline_of(config: Config, ranks: Ranks, step: Step) -> nn.Module | None:
    """`Training.outline`, as long as the encoder isn't in shards."""
    if not (shards(config, ranks) and ranks.first):
        return None
    encoder = step.teacher["encoder"] if config.teacher else step.encoder
    return sharding.outline(cast(Encoder, encoder).backbone)


def wrapped(config: Config, ranks: Ranks, step: Step) -> nn.Module:
    """`step` as the loop calls it."""
    model: nn.Module = step
    if shards(config, ranks):
        return model
    if ranks.size > 1:
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        shape = 2, config.channels, *height_and_width(config.size)
        images = torch.linspace(-1, 1, math.prod(shape), device=ranks.device).view(shape)
        idle = encoders.unreached(step.encoder, images, tokens=step.method.pool is not None)
        # Batch norm's running statistics stay each rank's own; queue and centre are equal on all ranks by construction.
        # A module of one's own may have parameters that no loss reaches; to look for them costs every step a little.
        # Gradients lie in the buckets that are sent: else they are held twice, and copied to the buckets and back.
        model = nn.parallel.DistributedDataParallel(
            step, device_ids=device_ids, broadcast_buffers=False, find_unused_parameters=bool(idle),
            gradient_as_bucket_view=True,
        )  # fmt: skip
    if not config.compile:
        return model
    # Views of a second size would make sizes symbolic, and their kernels slower: each stage is compiled for its own.
    return torch.compile(model, dynamic=False if len(config.sizes.pixels) > 1 else None)  # type: ignore[return-value]


def notices(config: Config, ranks: Ranks, source: Source, loader: loaders.Loader) -> list[str]:
    """Who reads the images, where that isn't Pillow as on any CPU, and what `--shard` is for one rank."""
    said = (
        ["--shard: one rank alone has all weights; torchrun starts several"] if config.shard and ranks.size == 1 else []
    )
    first = loader.loader if isinstance(loader, loaders.Staged) else loader
    expected = isinstance(first, loaders.TorchLoader) and ranks.device.type != "cuda" and not source.decoded
    if expected or config.loader == "torch":
        return said
    unasked = config.loader == "auto" and loaders.holds_images(loader) and not source.decoded
    return [*said, f"{loader.reads}; --loader torch reads them anew each time" if unasked else loader.reads]


def passes_of(config: Config, ranks: Ranks) -> Passes | None:
    """How the encoder goes through a batch by `--micro-batch`; None: at once, where a rank has no more images."""
    if not 0 < config.micro_batch < config.batch_size // ranks.size:
        return None
    compiler: Any = torch.compile if config.compile and not shards(config, ranks) else None  # blocks are, in shards
    return Passes(config.micro_batch, compiler=compiler)


__all__ = ["Training", "build"]
