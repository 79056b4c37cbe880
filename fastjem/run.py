"""`fastjem pretrain` and `fastjem.pretrain(...)`: a run from its folder to its last checkpoint, top to bottom."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastjem import banner, checkpoints, launchers, restarts, resume, starting, step_graph, trackers
from fastjem import config as configuration
from fastjem.advice import advice
from fastjem.build import Training, build
from fastjem.config import Config
from fastjem.data import shapes
from fastjem.data.source import Source
from fastjem.errors import DivergedError, ResourceError, ToldElsewhereError, UserError, nearest
from fastjem.fields import came
from fastjem.folder import Folder
from fastjem.journal import Journal, last_step
from fastjem.launchers import speaks
from fastjem.loggers import Logger, as_logger
from fastjem.meter import Meter
from fastjem.methods import METHODS, Method
from fastjem.prepare import MakeOptimizer, Objects
from fastjem.printing import say
from fastjem.ranks import Ranks, join, leave, told_by_all
from fastjem.report import Watch, brief
from fastjem.restarts import Launch
from fastjem.resume import name_of
from fastjem.saving import Best, Saver, export
from fastjem.stepping import optimizer_steps
from fastjem.stopping import Stop, Stopped


@dataclass(frozen=True)
class Result:
    """Where the run is, how far it came, and the last logged figures."""

    out: Path
    steps: int
    finished: bool  # all steps are taken, and the last checkpoint and the encoder are on the disk
    metrics: dict[str, Any]
    saved: int = 0  # the step of the last checkpoint; less than `steps` where the disk refused it
    stopped: bool = False  # as somebody asked, with everything saved

    def _repr_html_(self) -> str | None:
        """What a notebook shows; None, and so the plain fields, where the folder is gone."""
        try:
            return brief(self.out)
        except UserError:
            return None


def pretrain(
    config: Config | None = None,
    *,
    encoder: str | torch.nn.Module | None = None,
    method: str | type[Method] | Method | None = None,
    source: Source | None = None,
    optimizer: str | MakeOptimizer | None = None,
    loggers: Sequence[Any] = (),
    **fields: Any,
) -> Result:
    """Pretrain an encoder on images; fields as in `fastjem.config.Config`, `out` among them.

    Args:
        config: all fields at once, in place of `fields`.
        encoder: a backbone's name, or any module [B, 3, H, W] -> [B, D] in place of one; `backbone` takes both, too.
        method: a name, or a subclass of `fastjem.methods.Method`, or one that is made for the encoder's width.
        source: any object with `len` and `read(i)` (bytes of an image file, or pixels [H, W, 3]) in place of `data`.
        optimizer: a name, or what makes one of parameter groups (a class of `torch.optim`, a `functools.partial`).
        loggers: objects with `log(step, figures)` beside the configured ones, or with `begin`, `log(row)` and `close`
            (`fastjem.loggers.Logger`).

    Raises:
        UserError: (a ValueError) for what can't be done, with the reason.
    """
    if isinstance(method, str):
        fields["method"] = method
        method = None
    if isinstance(optimizer, str):
        fields["optimizer"] = optimizer
        optimizer = None
    is_module = isinstance(fields.get("backbone"), torch.nn.Module)
    if "backbone" in fields and (isinstance(encoder, str) or (encoder is not None and is_module)):
        both = f"{came(encoder)} and {came(fields['backbone'])}"
        raise UserError(f"pretrain takes encoder or backbone, got both ({both})")
    if is_module:
        encoder = fields.pop("backbone")
    if isinstance(encoder, str):
        fields["backbone"] = encoder
        encoder = None
    objects = Objects(encoder, method, source, optimizer)
    if not isinstance(loggers, Sequence):
        raise UserError(f"loggers must be a list of them, got {came(loggers)}")
    extra = [as_logger(one) for one in loggers]
    if config is None:
        config = configuration.from_fields(fields)
    elif not isinstance(config, Config):
        raise UserError(f"config must be a Config, and options are given by name (data=...), got {came(config)}")
    elif fields:
        raise UserError(f"pretrain takes a Config or fields, got both ({', '.join(fields)})")
    refused: UserError | None = None
    new = True
    launch = Launch.here()
    try:
        if launch:
            launch = launch.with_others(told_by_all(launch.text(), config.timeout))
        config, new = settled(config, objects, launch)
        launch = launch and launch.in_folder(Path(config.out))
    except UserError as error:
        refused = error
    ranks = join("cpu" if refused else config.device, config.timeout)
    try:
        with ranks.together():
            if refused:
                raise refused
        with Stop() as stop:
            return run(config, ranks, objects, extra, stop, Folder(Path(config.out), ranks, new=new, launch=launch))
    except ToldElsewhereError:
        raise
    except Exception as error:
        if late := ranks.without(error, lambda: checkpoints.goes_on(Path(config.out))):
            raise late from error
        line = advice(error)
        if (line or isinstance(error, UserError)) and not ranks.tells():
            raise ToldElsewhereError(line or str(error)) from error
        if line:
            raise ResourceError(line) from error
        raise
    finally:
        leave(ranks)


def settled(config: Config, objects: Objects, launch: Launch | None = None) -> tuple[Config, bool]:
    """Every option as the run will have it, and whether it is a new run; UserError for what can't be.

    A run that torchrun has started again goes on, as with `--resume auto`.
    """
    method, source = objects.method, objects.source
    if isinstance(method, Method) and config.options:
        raise UserError("options are arguments of a method that the run makes; this one is made already")
    if source is not None and config.data:
        raise UserError(f"pretrain takes data or source, got both (data={config.data!r})")
    if config.weights is not None and objects.encoder is not None:
        raise UserError(f"--weights {config.weights}: the encoder is made already, with weights of its own")
    config = starting.with_weights_of_backbone(config)
    config = with_folder(config, method, launch)
    if launch and launch.in_folder(Path(config.out)).earlier:
        config = config.with_values(resume="auto")
    given = config.given
    new = resume.begins(config)
    if not new:
        given = given | resume.given_before(config)
        config = resume.options_of_run(config, None if method is None else name_of(method))
    if method is not None:
        config = replace(config, method=name_of(method))
    configuration.check(config)
    trackers.check(trackers.names_of(config.log, tensorboard=config.tensorboard))
    if method is None and config.method not in METHODS:
        raise nearest("method", config.method, METHODS)
    if source is not None:
        config = replace(config, data=name_of(source))
    if config.data is None:
        config = replace(config, data=str(shapes.folder() / "train"))
        if speaks():
            say(f"fastjem: no data is named: the embedded data set, ten shapes, is trained on ({config.data})")
    config.given = given
    return config, new


def with_folder(config: Config, method: type[Method] | Method | None, launch: Launch | None = None) -> Config:
    """With a folder for a run that nobody has given one: runs/simclr, or the first of runs/simclr-2 ... that's free, or
    that this launch has begun before it was started again.
    """
    if "out" in config.given:
        return config
    if config.resume:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    if launchers.place().size > 1:  # each would choose for itself
        raise UserError("with several ranks the folder of the run has to be named: --out runs/a")
    name = config.method if method is None else name_of(method).rpartition(".")[2]
    folder = Path(configuration.OUT).parent / name.lower()
    number = 1
    while os.path.lexists(folder) and not (launch and launch.in_folder(folder).earlier):
        number += 1
        folder = folder.with_name(f"{name.lower()}-{number}")
    return config.with_values(out=str(folder))


def main(config: Config) -> int:
    """The command line's exit code: 0; 130 for a run that stopped as asked to, with everything saved; else 1."""
    result = pretrain(config)
    if result.finished:
        return 0
    return 130 if result.stopped else 1


def run(
    config: Config, ranks: Ranks, objects: Objects, loggers: Sequence[Logger], stop: Stop, folder: Folder
) -> Result:
    """Open the folder, build, train. A run that took no step leaves no trace: the corrected command can use `out`."""
    training: Training | None = None
    try:
        with stop.waiting():
            state = folder.open()
            training = build(config, ranks, objects, folder.out, state)
            training.notices += filter(None, [step_graph.told(training)])
            folder.take(training)
        if folder.launch and folder.launch.earlier:
            training.notices.insert(0, restarts.told(folder.launch, training.start, last_step(training)))
        return train(training, objects, loggers, stop)
    except (resume.AtItsEndError, ToldElsewhereError) as error:
        # All ranks find the end alike, and one of them tells it; another's error has its own as the cause.
        end_found = error.__cause__ if isinstance(error, ToldElsewhereError) else error
        if config.resume != "auto" or not isinstance(end_found, resume.AtItsEndError):
            raise
        if ranks.first:
            say(f"fastjem: {end_found}")
        return Result(folder.out, end_found.step, True, {}, end_found.step)
    except Stopped:
        if ranks.first:
            say("stopped before the first step")
        return Result(folder.out, training.done if training else 0, False, {}, stopped=True)
    finally:
        taken = training is not None and training.done > 0
        folder.close(discard=not taken)


def train(training: Training, objects: Objects, loggers: Sequence[Logger], stop: Stop) -> Result:
    """From the first step to the last, or to where somebody asked to stop."""
    out, ranks = training.out, training.ranks
    with ranks.together():
        journal = Journal(training, loggers)
    journal.banner()
    watch = Watch(training, journal)
    saver = Saver(training, journal)
    meter = Meter(training)
    try:
        if not training.resumed:
            saver.begin()
        with stop.waiting():
            watch.begin()
            ranks.meet()
        take_steps(training, journal, watch, saver, meter, stop)
    except Stopped:
        rescue(saver, meter, journal)
        if training.done == 0:
            raise
        saved = saver.saved or 0
        if ranks.first:
            say(f"stopped at step {training.done}; go on with --resume --out {out}")
        return Result(out, training.done, False, journal.last_row, saved, stopped=saved == training.done)
    except DivergedError:
        raise
    except Exception as error:
        ranks.notice(error)
        rescue(saver, meter, journal)
        if isinstance(error, ValueError) and objects.method is None and training.done == training.start:
            raise UserError(str(error)) from error  # an operator's contract, broken by an option: a temperature of 0
        raise
    finally:
        journal.close()
    return end(training, objects, journal, watch, saver, stop)


def take_steps(training: Training, journal: Journal, watch: Watch, saver: Saver, meter: Meter, stop: Stop) -> None:
    """Train, log and save, until the last step or a request to stop.

    Ranks agree on what happens at logged steps, and at the last one; a rank alone needn't wait for these. What follows
    from the step's number alone, a checkpoint by steps or kNN, needs no agreement at all.
    """
    ranks = training.ranks
    ranks.reached(training.start)
    for taken in optimizer_steps(training, journal, stop):
        done = training.done = taken.done
        ranks.reached(done)
        journal.step(done)
        for row in meter.rows(taken):
            journal.log(*row)
        watch.after_step(done)
        last = done == training.steps
        ends = saves = looks = best = False
        if watch.measures(done):  # by the first rank, for which all wait
            (best,) = ranks.any(saver.is_best(watch.accuracy))
        if ranks.size == 1 or last or meter.logs(done):
            ends, saves, looks = ranks.any(
                stop.signal is not None, stop.saves() or saver.due(), meter.diverges_from is not None
            )
        saves = saves or saver.planned(done)
        if not (ends or saves or looks or last or best):
            continue
        if ends or saves or last or best:
            for row in meter.waiting():  # a row that the checkpoint has passed would be lost with a kill
                journal.log(*row)
        (diverged,) = ranks.any(not saver.finite())
        if diverged:
            with ranks.together():
                raise saver.diverged(done, meter.diverges_from)
        if ends or saves or last or best:
            saver.save(done, Best(done, watch.accuracy) if best and watch.accuracy is not None else None)
            if not last:
                watch.refresh()
            ranks.meet()
        if ends:
            return


def rescue(saver: Saver, meter: Meter, journal: Journal) -> None:
    """Log and save what there is of a run that an error or an endless wait breaks off; the error matters more."""
    try:
        for row in meter.waiting():
            journal.log(*row)
        saver.rescue()
    except Exception as error:
        journal.say(f"the last step could not be saved ({type(error).__name__}: {error})")


def end(training: Training, objects: Objects, journal: Journal, watch: Watch, saver: Saver, stop: Stop) -> Result:
    """Write the encoder and the last page, and say what there is now and how to go on."""
    out, ranks, done = training.out, training.ranks, training.done
    problem = None
    if done == training.steps:
        encoder = training.whole_encoder()
        if ranks.first:
            problem = export(training, encoder, named=objects.encoder is None)
            journal.say(problem)
    watch.end()
    saved = int(ranks.agree(float(saver.saved or 0)))
    (lost,) = ranks.any(problem is not None or saved < done)
    finished = done == training.steps and not lost
    if ranks.first and saved < done:
        say(
            f"fastjem: step {done} is not saved, only step {saved}; once there is room, --resume --out {out} goes on "
            "from there"
        )
    elif ranks.first and done < training.steps:  # as this rank or another was asked to
        say(f"stopped at step {done}; go on with --resume --out {out}")
    elif ranks.first and finished:
        if (best := saver.best) is not None and best.step < done:
            kept = checkpoints.best(out)
            say(f"fastjem: kNN was best at step {best.step:,}, {best.accuracy:.1%}; its checkpoint is {kept}")
        for line in banner.closing(training, named=objects.encoder is None, has_data=objects.source is None):
            say(line)
    return Result(out, done, finished, journal.last_row, saved, stopped=not finished and not lost)
