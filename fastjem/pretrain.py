"""`fastjem pretrain` and `fastjem.pretrain(...)`: configuration, wiring, checkpoints, progress."""

import dataclasses
import inspect
import json
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjem import checkpoints, dist, encoders, optim
from fastjem.data import loaders, shapes
from fastjem.data.batch import finish
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import open_source
from fastjem.data.views import RECIPES
from fastjem.errors import UserError, nearest
from fastjem.methods import FACTS, METHODS, Defaults, views_of
from fastjem.progress import Reporter, Stop
from fastjem.report import Watch
from fastjem.train import Step, check_encoder, loop

Option = bool | int | float | str
ENCODER = "encoder.safetensors"


@dataclass
class Config:
    """Everything a run depends on. A field that is None takes the method's default (docs/methods.md)."""

    out: str = field(metadata={"help": "folder of the run"})
    data: str = field(
        default="",
        metadata={"help": "folder of images, nested or flat, or a .npz of them; none: the embedded data set"},
    )
    method: str = field(default="simclr", metadata={"help": f"one of {', '.join(METHODS)}"})
    backbone: str = field(default="resnet18", metadata={"help": "a timm model, or vit_tiny, vit_small, vit_base"})
    image_size: int = 224
    epochs: int = 100
    batch_size: int = field(default=256, metadata={"help": "images of one forward pass over all ranks"})
    accumulate: int = field(default=1, metadata={"help": "batches that make one optimiser step"})
    max_steps: int = field(default=0, metadata={"help": "end after so many steps; 0: after the epochs"})
    optimizer: str | None = field(default=None, metadata={"help": " | ".join(optim.OPTIMIZERS)})
    learning_rate: float | None = field(
        default=None, metadata={"help": "for 256 images; grows with the batch, or its root"}
    )
    weight_decay: float | None = None
    warmup_epochs: float | None = field(default=None, metadata={"help": "at most a tenth of the run"})
    clip: float | None = field(default=None, metadata={"help": "the gradient's largest norm; 0: no clipping"})
    momentum: float | None = field(default=None, metadata={"help": "of the momentum encoder at the start"})
    momentum_encoder: bool | None = field(default=None, metadata={"help": "give any method a momentum encoder"})
    options: dict[str, Option] = field(default_factory=dict, metadata={"help": "the method's own: temperature=0.2 ..."})
    small_views: int | None = field(default=None, metadata={"help": "multi-crop's; none at 64 pixels and less"})
    recipe: str | None = field(default=None, metadata={"help": f"augmentation: {', '.join(RECIPES)}"})
    view: dict[str, Option] = field(
        default_factory=dict,
        metadata={"help": "fields of its views: flip=0 small.scale=0.05,0.2 ..."},
    )
    blur: bool | None = field(default=None, metadata={"help": "as the recipe says; off at 64 pixels and less"})
    stem: str = field(default="auto", metadata={"help": "auto | standard | small"})
    patch_size: int = field(default=0, metadata={"help": "of a ViT; 0: its own"})
    sync_batch_norm: bool = field(default=False, metadata={"help": "statistics over all ranks (CUDA)"})
    device: str = field(default="auto", metadata={"help": "auto | cpu | cuda"})
    loader: str = field(default="auto", metadata={"help": f"who reads the images: {' | '.join(loaders.NAMES)}"})
    memory: float = field(default=4.0, metadata={"help": "GiB that --loader memory may take"})
    decoder_share: float | None = field(
        default=None, metadata={"help": "of JPEG files, for a GPU's fixed-function decoder; none: measured"}
    )
    workers: int = field(default=-1, metadata={"help": "of the data loader, a rank; -1: one a core"})
    seed: int = 0
    compile: bool = False
    tensorboard: bool = False
    log_every: int = field(default=10, metadata={"help": "steps"})
    checkpoint_every: float = field(default=300, metadata={"help": "seconds"})
    checkpoint_steps: int = field(default=0, metadata={"help": "steps, in place of seconds"})
    knn_every: float | None = field(
        default=None, metadata={"help": "epochs; 0: at start and end; a twentieth of the run"}
    )
    report: bool = field(default=True, metadata={"help": "report.html in the run's folder, new at each checkpoint"})
    resume: bool = False


MAY_CHANGE = {"out", "resume", "device", "workers", "log_every", "checkpoint_every", "checkpoint_steps", "tensorboard",
              "compile", "max_steps", "data", "knn_every", "report"}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Where the run is, how far it came, and the last logged figures."""

    out: Path
    steps: int
    finished: bool
    metrics: dict[str, Any]


def pretrain(config: Config | None = None, *, encoder: nn.Module | None = None, **fields: Any) -> Result:
    """Pretrain an encoder on a folder of images; fields as in `Config`.

    Args:
        encoder: any module [B, 3, H, W] -> [B, D] in place of a backbone's name.

    Raises:
        UserError: (a ValueError) for what can't be done, with the reason.
    """
    if config is None:
        known = [f.name for f in dataclasses.fields(Config)]
        for name in fields:
            if name not in known:
                raise nearest("option", name, known)
        if "out" not in fields:
            raise UserError("pretrain needs out")
        config = Config(**fields)
    check(config)
    if not config.data:
        config = dataclasses.replace(config, data=str(shapes.folder() / "train"))
    ranks = dist.join(config.device)
    try:
        with Stop() as stop:
            return run(config, ranks, encoder, stop)
    finally:
        dist.leave(ranks)


def main(config: Config) -> int:
    return 0 if pretrain(config).finished else 130  # stopped as asked to, with everything saved


def check(config: Config) -> None:
    """Mistakes that need no file and no model to be seen."""
    if config.method not in METHODS:
        raise nearest("method", config.method, METHODS)
    for name in ("image_size", "epochs", "accumulate", "log_every"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    for name in ("learning_rate", "weight_decay", "warmup_epochs", "clip", "momentum", "decoder_share", "small_views",
                 "max_steps", "patch_size", "seed", "log_every", "checkpoint_every", "checkpoint_steps",
                 "knn_every"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a finite number, at least 0, got {value}")
    if config.workers < -1:
        raise UserError(f"--workers must be at least 0, or -1 for one a core, got {config.workers}")
    for name in ("momentum", "decoder_share"):
        value = getattr(config, name)
        if value is not None and value > 1:
            raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, got {value}")
    if config.batch_size < 2:
        raise UserError(f"--batch-size must be at least 2, as every method compares images, got {config.batch_size}")
    for name, allowed in (
        ("stem", ("auto", "standard", "small")),
        ("device", ("auto", "cpu", "cuda")),
        ("optimizer", (*optim.OPTIMIZERS, None)),
    ):
        if getattr(config, name) not in allowed:
            raise nearest(name, getattr(config, name), [a for a in allowed if a])
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")


def build_method(
    config: Config, encoder: nn.Module, width: int, images: int = 0, steps_per_epoch: int = 1, steps: int = 1,
    group: Any = None,
) -> nn.Module:  # fmt: skip
    """The run's facts (`fastjem.methods.FACTS`) go to the method that names them, with the user's options."""
    kind = METHODS[config.method]
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    facts = dict(zip(FACTS, (images, steps_per_epoch, steps, group, batch_norm), strict=True))
    accepted = list(inspect.signature(kind).parameters)[1:]
    own = [name for name in accepted if name not in facts]
    for name in config.options:
        if name not in own:
            raise nearest(f"option of {config.method}", name, own)
        parameter, value = inspect.signature(kind).parameters[name], config.options[name]
        kinds = set(typing.get_args(parameter.annotation)) or {parameter.annotation}
        if type(value) not in (kinds | {int} if float in kinds else kinds):
            raise UserError(f"--options {name} is {parameter.default} by default and can't be {value!r}")
        if isinstance(value, int) and kinds <= {int, types.NoneType} and value < (parameter.default != 0):
            raise UserError(f"--options {name} must be at least {int(parameter.default != 0)}, got {value}")
    try:
        return kind(width, **{k: v for k, v in facts.items() if k in accepted}, **config.options)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def run(config: Config, ranks: dist.Ranks, encoder: nn.Module | None, stop: Stop) -> Result:
    out = Path(config.out)
    state = prepare_folder(config, out, ranks)
    try:
        return train(config, ranks, encoder, stop, out, state)
    except UserError:
        if ranks.first and not config.resume and (checkpoints.load(out) or {"step": 0})["step"] == 0:
            for name in (checkpoints.LAST, "config.yaml"):  # no run began: the corrected command needs no other folder
                (out / name).unlink(missing_ok=True)
        raise


def train(
    config: Config, ranks: dist.Ranks, encoder: nn.Module | None, stop: Stop, out: Path, state: dict[str, Any] | None
) -> Result:
    folder = open_source(config.data)
    if config.batch_size > len(folder):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(folder)} images in {config.data}")
    if config.batch_size % ranks.size:
        raise UserError(f"--batch-size {config.batch_size} can't be shared evenly by {ranks.size} ranks")
    if config.batch_size // ranks.size < 2:
        raise UserError(f"--batch-size {config.batch_size} leaves a rank with less than 2 images")
    if config.sync_batch_norm and ranks.device.type != "cuda":
        raise UserError(f"--sync-batch-norm needs CUDA, and this run is on {ranks.device.type}")
    kind = METHODS[config.method]
    per_epoch = max(len(folder) // config.batch_size // config.accumulate, 1)
    steps = config.max_steps or per_epoch * config.epochs
    own = config.optimizer is not None or config.learning_rate is not None
    defaults = Defaults(**state["defaults"]) if state else kind.defaults.of_run(steps, own=own)

    torch.manual_seed(config.seed)
    named = encoder is None  # else only its owner can build it again
    if encoder is None:
        pool = getattr(kind, "pool", None)
        encoder = encoders.create(
            config.backbone, config.image_size, stem=config.stem, patch=config.patch_size, pool=pool
        )
    if kind.views.mask:
        encoders.mask_needs_transformer(config.method, encoder)
    if config.small_views and not kind.views.small:
        raise UserError(f"--small-views: {config.method} compares exactly {kind.views.large} large views")
    views = views_of(config.method, config.image_size, config.small_views, config.recipe)
    patch = encoders.patch_size(encoder)
    specs = views.specs(config.image_size, patch=patch, blur=config.blur, changes=config.view)
    workers = config.workers if config.workers >= 0 else ranks.cores
    start = state["step"] if state else 0
    order = Order(samples=len(folder), batch=config.batch_size, seed=config.seed, start=start * config.accumulate,
                  stop=steps * config.accumulate, rank=ranks.rank, ranks=ranks.size)  # fmt: skip
    share = (state or {}).get("decoder_share", config.decoder_share)
    budget = Budget(workers=workers, memory=config.memory, device=ranks.device, decoder_share=share, agree=ranks.agree)
    loader = loaders.create(config.loader, folder, specs, order, budget)
    encoder = encoder.to(ranks.device)
    last = encoders.memory_format(encoder) == torch.channels_last
    try:
        few = Order(samples=len(folder), batch=min(config.batch_size, 16), seed=config.seed, stop=1)
        sample = next(iter(TorchLoader(folder, specs, few, Budget())))
        width = check_encoder(encoder, finish(sample, specs, ranks.device, channels_last=last).views[0])
    except RuntimeError as error:
        raise UserError(f"the encoder can't take {config.image_size} x {config.image_size} images: {error}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    method = build_method(config, encoder, width, len(folder), per_epoch, steps, ranks.group).to(ranks.device)
    try:
        step = Step(encoder, method, config.momentum_encoder).to(ranks.device)
    except ValueError as error:
        raise UserError(str(error)) from None

    def chosen(name: str) -> Any:
        value = getattr(config, name)
        return getattr(defaults, name) if value is None else value

    rate = optim.scaled(chosen("optimizer"), chosen("learning_rate"), config.batch_size * config.accumulate)
    momentum = chosen("momentum")
    schedule = optim.Schedule(
        steps=steps,
        learning_rate=rate,
        warmup=min(round(chosen("warmup_epochs") * per_epoch), steps // 10),
        weight_decay=chosen("weight_decay"),
        final_weight_decay=defaults.final_weight_decay
        if defaults.final_weight_decay is not None and config.weight_decay is None
        else chosen("weight_decay"),
        momentum=momentum,
        final_momentum=max(defaults.final_momentum, momentum) if defaults.final_momentum == 1 else momentum,
    )
    groups = optim.parameter_groups(step, getattr(kind, "constant_rate", ()))
    optimizer = optim.build(chosen("optimizer"), groups)
    if state:
        if start > steps or (start == steps and (out / ENCODER).exists()):
            raise UserError(f"the run in {out} is already at its end, step {start}; --epochs says how long it is")
        step.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if config.sync_batch_norm and ranks.size > 1:
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    model: nn.Module = step
    if ranks.size > 1:
        # Batch norm's running statistics stay each rank's own; queue and centre are equal on all ranks by construction.
        model = nn.parallel.DistributedDataParallel(
            step, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None, broadcast_buffers=False
        )
    if config.compile:
        model = torch.compile(model)
    reporter = Reporter(config, out, start, steps, per_epoch, ranks)
    reporter.say("" if state else defaults.unlike(kind.defaults))
    chosen_here = config.loader == "auto" and (ranks.device.type == "cuda" or folder.decoded)
    if ranks.first and (chosen_here or config.loader not in ("auto", "torch")):
        reporter.say(loader.reads)
    reporter.bad.update(state.get("unreadable", ()) if state else ())
    facts = {"steps": steps, "steps_per_epoch": per_epoch, "patch": encoders.patch_size(encoder), "ranks": ranks.size}
    watch = Watch(
        out, folder, config.image_size, facts, start=start, every=config.knn_every, page=config.report, say=reporter.say
    )

    bf16 = ranks.device.type == "cuda"
    # half the bytes for what autocast would round anyway; a module of one's own may look at its images first
    images = {"dtype": torch.bfloat16 if bf16 and named else torch.float32, "channels_last": last}

    def batches() -> Iterator[tuple[list[Tensor], float]]:
        source = iter(loader)
        while True:
            begin = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            reporter.unreadable(batch.unreadable)
            yield finish(batch, specs, ranks.device, **images).views, time.perf_counter() - begin

    saved_at = time.monotonic()

    def save(done: int) -> None:
        nonlocal saved_at
        if ranks.first:
            reporter.say(
                checkpoints.save(
                    out,
                    {
                        "step": done,
                        "model": step.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "defaults": dataclasses.asdict(defaults),  # of the run as it was begun; --max-steps may change
                        "config": json.dumps(dataclasses.asdict(config)),
                        "unreadable": sorted(reporter.bad),
                        "decoder_share": loader.decoder_share,  # it decides about pixels
                        "seed": config.seed,  # every generator follows from it and the step
                    },
                )
            )
        saved_at = time.monotonic()

    def after_step(done: int, flush: Callable[[], None]) -> bool:
        if ranks.first:
            watch.after_step(step.encoder, done)
        asked = ranks.any(stop.signal is not None)
        if config.checkpoint_steps:
            due = done % config.checkpoint_steps == 0
        else:
            due = ranks.any(ranks.first and time.monotonic() - saved_at > config.checkpoint_every)
        if asked or due or done == steps:
            flush()  # a row that the checkpoint has passed would be lost with a kill
            save(done)
            if ranks.first and done < steps:
                watch.refresh()
        return asked

    if not state:
        save(0)  # a run killed before its first checkpoint starts at step 0; a full disk is seen now
    if ranks.first:
        watch.begin(step.encoder)
    try:
        done = loop(
            model, step, optimizer, schedule, batches(), start=start, accumulate=config.accumulate,
            clip=chosen("clip"), autocast=torch.bfloat16 if bf16 else None, seed=config.seed, rank=ranks.rank,
            log_every=config.log_every, on_log=reporter.log, after_step=after_step,
        )  # fmt: skip
    except ValueError as error:  # an operator's contract, broken by an option: a temperature of 0
        raise UserError(str(error)) from error
    finally:
        reporter.close()
    if ranks.first and done == steps:
        try:
            encoders.save(step.encoder, str(out / ENCODER), metadata(config) if named else {})
        except OSError as error:
            reporter.say(f"{ENCODER} could not be written ({error.strerror}); --resume tries again")
    if ranks.first:
        watch.end()
    ranks.barrier()
    if stop.signal is not None and ranks.first:
        print(f"stopped at step {done}; go on with --resume --out {out}", file=sys.stderr)
    return Result(out, done, done == steps, reporter.last)


def metadata(config: Config) -> dict[str, str]:
    """What `fastjem.load_encoder` needs beside the weights."""
    return {"backbone": config.backbone, "image_size": str(config.image_size), "stem": config.stem,
            "patch_size": str(config.patch_size), "pool": getattr(METHODS[config.method], "pool", "")}  # fmt: skip


def prepare_folder(config: Config, out: Path, ranks: dist.Ranks) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any; the folder is there and holds this configuration afterwards."""
    path, mine = out / "config.yaml", dataclasses.asdict(config)
    if config.resume:
        if not path.exists():
            raise UserError(f"--resume: there is no run in {out}")
        theirs = json.loads(path.read_text())
        for name, value in theirs.items():
            if name not in MAY_CHANGE and mine.get(name, value) != value:
                raise UserError(f"--resume: --{name.replace('_', '-')} was {value} in this run and is {mine[name]} now")
        return checkpoints.load(out)
    if path.exists() and ranks.first:
        raise UserError(f"{out} holds a run already; --resume goes on with it, another --out starts a new one")
    ranks.barrier()
    if ranks.first:
        try:
            # JSON is YAML; a run must not need a YAML library to start
            checkpoints.write_atomically(path, (json.dumps(mine, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
    return None


class _Callable(types.ModuleType):
    """`fastjem.pretrain(...)`, though `fastjem.pretrain` is this module."""

    def __call__(self, *arguments: Any, **options: Any) -> Result:
        return pretrain(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
