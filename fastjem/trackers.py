"""`--log wandb,mlflow,tensorboard,trackio`: a run's figures in trackers of experiments.

Each tracker works in a thread of its own, so that no step waits for a network, and begins with the first figures, so
that a run that took no step leaves nothing anywhere. Whatever fails or hangs there is said once and ends nothing. Which
run of a tracker is this one stands in `trackers.json` in the run's folder: a resumed run goes on with the same.
"""

import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastjem.checkpoints import write_atomically
from fastjem.errors import UserError, nearest
from fastjem.loggers import LoggedRun

FILE = "trackers.json"
PROJECT = "fastjem"  # of wandb and trackio, and mlflow's experiment, where no environment variable names another
WAIT = 60.0  # seconds that a tracker may take for an answer before that is said, and for all that is left at the end
Values = Mapping[str, Any]


class WandB:
    """Weights & Biases. `WANDB_MODE=offline`, `WANDB_PROJECT`, `WANDB_NAME` and others mean what they mean to it."""

    package = "wandb"
    replaces = False

    @staticmethod
    def refused() -> str:
        """Why it can't begin, if that is known without a network: it would ask for a key on the terminal."""
        import wandb

        if os.environ.get("WANDB_API_KEY"):
            return ""
        try:
            if wandb.setup().settings.mode != "online":
                return ""
            known = wandb.login(prompt=False)
        except Exception:  # an older one, which has no such question; what is wrong is said when it begins
            return ""
        return "" if known else "it has no API key; wandb login gives it one, and WANDB_MODE=offline needs none"

    def begin(self, run: LoggedRun, kept: dict[str, Any]) -> dict[str, Any]:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or kept.get("project") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.out.resolve().name,
            id=kept.get("id") or secrets.token_hex(4),
            resume="allow",
            dir=str(run.out),
            config=dict(run.values),
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Figures come when the device has them, kNN perhaps before the row of an earlier step: wandb's own steps can't
        # go back.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        here = str(Path(self.run.dir).parent)
        self.where = here if self.run.offline else self.run.url or here
        return {"id": self.run.id, "project": self.run.project}

    def log(self, step: int, figures: Values) -> None:
        self.run.log({"step": step, **figures})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0)


class MLflow:
    """`MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` mean what they mean to it; else its own default, mlflow.db."""

    package = "mlflow"
    replaces = False

    @staticmethod
    def refused() -> str:
        import mlflow

        uri = mlflow.get_tracking_uri()
        if uri.startswith("sqlite") and importlib.util.find_spec("sqlalchemy") is None:
            return f"mlflow-skinny can't write to {uri}; MLFLOW_TRACKING_URI names a server, and mlflow itself can"
        return ""

    def begin(self, run: LoggedRun, kept: dict[str, Any]) -> dict[str, Any]:
        import mlflow
        from mlflow.tracking import MlflowClient

        # What a relative path or a default leads to, where this run was begun, is where it goes on.
        uri = os.environ.get("MLFLOW_TRACKING_URI") or kept.get("uri") or mlflow.get_tracking_uri()
        if "://" not in uri and uri != "databricks":
            uri = Path(uri).resolve().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        if kept.get("uri") == uri:
            self.id = kept["id"]
            self.client.update_run(self.id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            experiment = self.client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
            self.id = self.client.create_run(experiment_id, run_name=run.out.resolve().name).info.run_id
        before = self.client.get_run(self.id).data.params
        for name, value in flat(run.values).items():
            text = str(value)[:500]
            if name not in before:
                self.client.log_param(self.id, name, text)
            elif before[name] != text:  # a parameter can't change: what a resumed run has anew is a tag
                self.client.set_tag(self.id, f"resumed.{name}", text)
        self.where = f"run {self.id} in {uri}"
        return {"id": self.id, "uri": uri}

    def log(self, step: int, figures: Values) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in figures.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


class TensorBoard:
    """Scalars in the folder `tensorboard` of the run's folder."""

    package = "tensorboard"
    replaces = True  # rows of a resumed run take the place of those that an earlier part had logged past it

    @staticmethod
    def refused() -> str:
        return ""

    def begin(self, run: LoggedRun, kept: dict[str, Any]) -> dict[str, Any]:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run.out / "tensorboard"
        self.board = SummaryWriter(str(folder), purge_step=run.start + 1 if kept else None)
        if not kept:
            values = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in flat(run.values).items()
            }
            writer = self.board._get_file_writer()  # add_hparams would make a run of its own beside this one
            for summary in hparams(values, {"loss": 0.0}):
                writer.add_summary(summary)
        self.where = str(folder)
        return {"folder": "tensorboard"}

    def log(self, step: int, figures: Values) -> None:
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self.board.close()


class Trackio:
    """Hugging Face's tracker; `TRACKIO_PROJECT`, `TRACKIO_SPACE_ID` and others mean what they mean to it."""

    package = "trackio"
    replaces = False

    @staticmethod
    def refused() -> str:
        return ""

    def begin(self, run: LoggedRun, kept: dict[str, Any]) -> dict[str, Any]:
        import trackio  # pyright: ignore[reportMissingImports]: it goes with no environment that has all others

        project = kept.get("project") or os.environ.get("TRACKIO_PROJECT") or PROJECT
        name = kept.get("run") or f"{run.out.resolve().name}-{secrets.token_hex(3)}"
        self.run = trackio.init(
            project=project, name=name, config=flat(run.values), resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip
        self.where = f"trackio show --project {project}"
        return {"project": project, "run": name}

    def log(self, step: int, figures: Values) -> None:
        self.run.log(dict(figures), step=step)

    def close(self, finished: bool) -> None:
        self.run.finish()


TRACKERS: dict[str, Any] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def flat(values: Values, before: str = "") -> dict[str, Any]:
    """{"view": {"flip": 0}} -> {"view.flip": 0}; lists as text."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = str(value) if isinstance(value, list | tuple) else value
    return found


def names_of(given: str | None, *, tensorboard: bool = False) -> list[str]:
    """("wandb,mlflow") -> ["wandb", "mlflow"]; UserError for a name that there isn't."""
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise nearest("tracker for --log,", name, TRACKERS)
    return list(dict.fromkeys([*names, *(["tensorboard"] if tensorboard else [])]))


def check(names: list[str]) -> None:
    """UserError for a tracker that isn't installed, or of which it is known here that it can't begin."""
    for name in names:
        tracker = TRACKERS[name]
        if importlib.util.find_spec(tracker.package) is None:
            raise UserError(f"--log {name}: {name} isn't installed; pip install 'fastjem[{name}]'")
    for name in names:
        if why := TRACKERS[name].refused():
            raise UserError(f"--log {name}: {why}")


class Tracker:
    """One tracker as a logger of the run, in a thread of its own.

    What went wrong in the thread is raised, once, by the next call: the journal says it. From then on figures are
    dropped.
    """

    def __init__(self, name: str):
        self.name = name
        self.inner = TRACKERS[name]()
        self.waiting: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.trouble: Exception | None = None
        self.is_told = False
        self.since: float | None = None  # when the thread began with what it is at
        self.last = 0  # step of the last row
        self.notes: list[str] = []  # to be said

    def begin(self, run: LoggedRun) -> None:
        self.run = run
        known = self.name in _kept(run.out)
        self.begins = run.seen + 1 if known and not self.inner.replaces else 0  # the first step that it hasn't got

    def log(self, row: Values) -> None:
        figures = dict(row)
        self.last = step = figures.pop("step")
        self._give(step, figures)
        if self.thread is None and step >= self.begins:
            self.thread = threading.Thread(target=self._work, name=f"fastjem-{self.name}", daemon=True)
            self.thread.start()

    def measured(self, step: int, figures: Values) -> None:
        """What was measured before the first step waits for that: until then the run leaves nothing anywhere."""
        self._give(step, dict(figures))

    def _give(self, step: int, figures: dict[str, Any]) -> None:
        if step < self.begins:  # it has them of the part of the run that is repeated
            return
        self._raise()
        if self.trouble is None:
            self.waiting.put((step, figures))
        if self.since is not None and time.monotonic() - self.since > WAIT and not self.is_told:
            self.is_told = True
            raise TimeoutError(f"it hasn't answered for {WAIT:.0f} seconds")

    def told(self) -> list[str]:
        """What there is to be said of it since it was asked last: where its figures are."""
        notes, self.notes = self.notes, []
        return notes

    def _raise(self) -> None:
        if self.trouble is not None and not self.is_told:
            self.is_told = True
            raise self.trouble

    def _work(self) -> None:
        try:
            self.since = time.monotonic()
            kept = _kept(self.run.out)
            found = self.inner.begin(self.run, kept.get(self.name, {}))
            if kept.get(self.name) != found:
                _keep(self.run.out, self.name, found)
            self.notes.append(f"{self.name}: {self.inner.where}")
            self.since = None
            while (item := self.waiting.get()) is not None:
                self.since = time.monotonic()
                self.inner.log(*item)
                self.since = None
            self.since = time.monotonic()
            self.inner.close(self.last >= self.run.steps)
        except Exception as error:  # whatever a tracker and the network may raise
            self.trouble = error
        finally:
            self.since = None

    def close(self) -> None:
        if self.thread is not None:
            self.waiting.put(None)
            self.thread.join(WAIT)
            if self.thread.is_alive() and not self.is_told:
                self.is_told = True
                raise TimeoutError(f"it hasn't taken all figures within {WAIT:.0f} seconds")
        self._raise()


_FILES = threading.Lock()  # several trackers begin at once


def _kept(out: Path) -> dict[str, dict[str, Any]]:
    """What trackers have to be told again, by their names; empty where nothing can be read."""
    try:
        found = json.loads((out / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    names = found if isinstance(found, dict) else {}
    return {name: about for name, about in names.items() if isinstance(about, dict)}


def _keep(out: Path, name: str, about: dict[str, Any]) -> None:
    with _FILES:
        write_atomically(out / FILE, (json.dumps({**_kept(out), name: about}, indent=2) + "\n").encode())


def add(out: Path, step: int, figures: Values) -> list[str]:
    """Give figures of a run that has ended to the trackers that it went to, which `trackers.json` names; a line
    for each, where they are or what went wrong.

    Raises:
        UserError: for a run that went to none, or a tracker that isn't installed here.
    """
    names = [name for name in _kept(out) if name in TRACKERS]
    if not names:
        raise UserError(f"--log: the run in {out} went to no tracker (it has no {FILE})")
    check(names)
    said = []
    for name in names:
        tracker = Tracker(name)
        tracker.begin(LoggedRun(out, "", step, step, 0, 1))
        tracker.begins = 0
        try:
            tracker.log({"step": step, **figures})
            tracker.close()
        except Exception as error:  # whatever a tracker and the network may raise
            said.append(f"{name} failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
        said += tracker.told()
    return said


__all__ = ["TRACKERS", "Tracker", "add", "check", "names_of"]
