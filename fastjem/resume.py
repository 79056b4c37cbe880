"""What a resumed run is held to: its own options, its own images, and modules that its checkpoint fits."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjem import checkpoints, sharded_checkpoints, sharding
from fastjem import config as configuration
from fastjem.config import CHANGES_NUMBERS, Config
from fastjem.data.fingerprint import difference
from fastjem.errors import UserError
from fastjem.methods import METHODS, Defaults


class AtItsEndError(UserError):
    """There is nothing left to do for the run, which has taken `step` steps."""

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


def begins(config: Config) -> bool:
    """Whether this is a new run, and not one to go on with. `resume="auto"` begins one where there is none yet."""
    exists = (Path(config.out) / configuration.FILE).exists()
    if config.resume is True and not exists:
        raise UserError(f"--resume: there is no run in {config.out}; --resume auto would begin one")
    if config.new_data and not config.resume:
        raise UserError("--new-data is for --resume")
    return not (config.resume and exists)


def given_before(config: Config) -> frozenset[str]:
    """Names of the options that were chosen by whoever began the run in `config.out`, or has gone on with it."""
    return configuration.read(Path(config.out))[0].given


def options_of_run(config: Config, method: str | None) -> Config:
    """The options of the run in `config.out`, but for those that were given now and may change.

    method: the name of one that was given as an object, or of its class.

    Raises:
        UserError: for one that can't change, or an object that only its owner can give.
    """
    before, _, _ = configuration.read(Path(config.out))
    configuration.check_resumed(config, before)
    if method is None and before.method not in METHODS:
        raise UserError(again("method", before.method))
    if method not in (None, before.method, name_of(METHODS.get(before.method))):
        raise UserError(f"--resume: the method was {before.method} in this run and is {method} now")
    now = {name: getattr(config, name) for name in config.given}
    for name in {"options", "view"} & now.keys():
        # Those that are told again are the same; the run may have others of its own beside them.
        now[name] = {**getattr(before, name), **now[name]}
    if "epochs" in now and "max_steps" not in now:
        now["max_steps"] = 0  # the epochs say how long the run is
    return replace(before, **{"new_data": False, "resume": config.resume, "out": config.out, **now})


def name_of(thing: object) -> str:
    """The full name of a class, or of the class of an object."""
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def again(name: str, what: str = "") -> str:
    kind = f" {what}" if what else ""
    article = "an" if name[0] in "aeiou" else "a"
    return (
        f"--resume: this run was begun with {article} {name} of its owner's{kind}; give it again from Python: "
        f"fastjem.pretrain(out=..., resume=True, {name}=...)"
    )


def check_objects(state: dict[str, Any], given: dict[str, Any]) -> None:
    """UserError for what was an object when the run began, and isn't given now."""
    for name in state.get("objects", ()):
        if given[name] is None:
            raise UserError(again(name))


def check_images(config: Config, state: dict[str, Any], now: dict[str, Any]) -> str:
    """A line on images that have changed, where the user takes them; UserError where nobody said so.

    now: the source's `fingerprint`.
    """
    before = state.get("source")
    changed = difference(before, now) if before else ""
    if not changed:
        return ""
    if config.new_data:
        return f"{config.data} holds {changed}: from step {state['step'] + 1} on this is another run than it was"
    raise UserError(
        f"--resume: {config.data} holds {changed}. The run would go on with other images than it was begun with: "
        "bring the old ones back, add --new-data to go on with these, or begin another run with another --out"
    )


def check_length(config: Config, state: dict[str, Any], steps: int, *, complete: bool) -> None:
    """UserError for a run of so many steps that has taken as many, or more.

    complete: what the end of a run writes is there.
    """
    start = state["step"]
    longer = "a larger --epochs (or --max-steps) makes it longer"
    if start > steps:
        raise UserError(
            f"the run in {config.out} has taken {start} steps already and can't end at step {steps}; {longer}"
        )
    if start == steps and complete:
        raise AtItsEndError(f"the run in {config.out} is already at its end, step {start}; {longer}", start)


def borders(config: Config, state: dict[str, Any] | None, steps: int) -> list[int]:
    """The steps before each stage of image sizes but the first: a new run's, or where those of a resumed one are now.

    Raises:
        UserError: for a new run of too few steps.
    """
    if state is None:
        return config.sizes.borders(steps)
    before = state.get("borders", [])  # runs of before there were stages have none
    if steps == state.get("steps", steps):
        return before
    return config.sizes.moved(before, steps, state["step"])


def changes(config: Config, state: dict[str, Any], steps: int) -> list[str]:
    """Lines on what a resumed run is told anew and changes its numbers."""
    start = state["step"]
    before = json.loads(state.get("config", "{}"))
    said = []
    length = state.get("steps", steps)
    if steps != length:
        said.append(
            f"the run ends at step {steps} in place of {length}: learning rate, weight decay and momentum follow the "
            f"schedule of that length from step {start + 1} on"
        )
    for name in CHANGES_NUMBERS[2:]:
        new = getattr(config, name)
        old = before.get(name, "auto" if name == "precision" else new)
        if old != new:
            was = "the method's own" if old is None else old
            said.append(f"{config.flag(name)} is {new} from step {start + 1} on; it was {was}")
    return said


def other_ranks(step: nn.Module, state: dict[str, Any] | None, ranks: int) -> str:
    """A line for a run with batch norms that goes on with another number of ranks; "" for any other one."""
    before = (state or {}).get("ranks", ranks)
    sees_a_part = any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) and not isinstance(part, nn.SyncBatchNorm)
        for part in step.modules()
    )
    if state is None or before == ranks or not sees_a_part:
        return ""
    return (
        f"{before} {'rank' if before == 1 else 'ranks'} took the steps so far, and {ranks} from step "
        f"{state['step'] + 1} on: batch norms see a rank's images, and losses aren't those of the same number of ranks"
    )


def defaults_of(out: Path, state: dict[str, Any]) -> Defaults:
    """The method's defaults as they were when the run began."""
    names = {f.name for f in dataclasses.fields(Defaults)}
    try:
        return Defaults(**{name: value for name, value in state["defaults"].items() if name in names})
    except TypeError as error:
        raise UserError(f"{out / checkpoints.LAST} was written by another version of fastjem ({error})") from None


def restore(out: Path, step: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a checkpoint's values into the modules; UserError where they don't fit.

    Of what is in shards on the disk, or here, each rank takes its own part; without a word to the others.
    """
    try:
        if sharded_checkpoints.SHARDS in state or sharding.is_sharded(step):
            state = sharded_checkpoints.fitted(state, step, optimizer)
        step.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except sharded_checkpoints.Unreadable:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())
        raise UserError(f"the checkpoint {out / checkpoints.LAST} doesn't fit this run: {first[:300]}") from None
