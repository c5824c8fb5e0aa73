"""The figures of a run on a tracking server too: Weights & Biases or MLflow, where installed.

Both get what TensorBoard gets, under the same names. The run's id there is kept in ``tracking.json`` of the run
directory, so that a run that is gone on with goes on there. A step that is taken again, after a crash or a rollback, is
sent again. Training never waits for a server: a thread of each tracker sends, what cannot be sent is told of once, and
later figures are tried anew.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.recipe import Recipe, Tracking
from tilewright.trainer.run_directory import write_atomically

TRACKING = "tracking.json"
_LINES_WAITING = 10_000  # where a server is slower than training, what is more is not sent
_SECONDS_TO_SEND_THE_REST = 30.0
_NAMES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
_INSTEAD = {
    "wandb": "or set WANDB_MODE=offline in the environment",
    "mlflow": "or set MLFLOW_TRACKING_URI=sqlite:///mlflow.db in the environment",
}


def check_installed(recipe: Tracking) -> None:
    """Raise unless what the recipe sends figures with can be imported.

    Raises:
        TrainingError: it cannot; the sentence names the command that installs it.
    """
    for package in _asked_for(recipe):
        spec = importlib.util.find_spec(package)
        # W&B leaves a folder `wandb` where it ran, which would be taken for an empty package.
        if spec is None or spec.origin is None:
            raise TrainingError(
                f"tracking.{package} is true, and {_NAMES[package]} is not installed; give `pip install "
                f"'tilewright[{package}]'`, or `pip install {package}`, or set tracking.{package} to false"
            )


class Tracker(Protocol):
    """A run on a tracking server.

    Attributes:
        id: by which the server knows it.
        where: for the user to look at.
    """

    id: str
    where: str

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Send figures of a step; may take long, and raise whatever."""

    def finish(self, *, whole: bool) -> None:
        """End the run there; `whole`: it has not failed. May take long, and raise whatever."""


class Trackers:
    """The trackers that a recipe asks for, in the process that records.

    Args:
        run: the run directory.
        resumed: whether the run goes on; a server that cannot be reached then is nothing to end it for.
        tell: shows a line to the user.

    Raises:
        TrainingError: a package is missing, or a new run cannot be opened.
    """

    def __init__(self, run: Path, recipe: Recipe, *, resumed: bool, tell: Callable[[str], None]) -> None:
        check_installed(recipe.tracking)
        self._senders: list[_Sender] = []
        known = _known_ids(run)
        for package in _asked_for(recipe.tracking):
            try:
                tracker = _OPEN[package](run, recipe, known.get(package))
            except Exception as error:
                if resumed:
                    tell(f"{_NAMES[package]} cannot be reached, so nothing is sent there: {_text(error)}")
                    continue
                raise TrainingError(
                    f"{_NAMES[package]} cannot be opened: {_text(error)}; mend that, {_INSTEAD[package]}, or set "
                    f"tracking.{package} to false"
                ) from None
            known[package] = tracker.id
            write_atomically(run / TRACKING, json.dumps(known, indent=1))
            self._senders.append(_Sender(_NAMES[package], tracker, tell))

    def where(self) -> dict[str, str]:
        """Where the run is to be looked at, by the tracker's name."""
        return {sender.name: _without_secrets(sender.tracker.where) for sender in self._senders}

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Have finite figures of a step sent; returns at once and raises nothing."""
        for sender in self._senders:
            sender.put((dict(values), step))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the rest, for as long as half a minute."""
        deadline = time.monotonic() + _SECONDS_TO_SEND_THE_REST
        for sender in self._senders:
            sender.finish(whole=kind is None)
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))


class _Sender:
    """A thread that sends to one tracker, and a queue before it."""

    def __init__(self, name: str, tracker: Tracker, tell: Callable[[str], None]) -> None:
        self.name, self.tracker, self._tell = name, tracker, tell
        self._waiting: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(_LINES_WAITING)
        self._told = False
        self._whole = True
        # A daemon, so that a server that never answers does not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"send to {name}", daemon=True)
        self._thread.start()

    def put(self, line: tuple[dict[str, float], int]) -> None:
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._tell_once(f"{_LINES_WAITING:,} lines wait to be sent")

    def finish(self, *, whole: bool) -> None:
        self._whole = whole
        with suppress(queue.Full):
            self._waiting.put_nowait(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(f"{self.name}: the last figures could not be sent in time; they are in metrics.jsonl")

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._try(partial(self.tracker.send, *line))
        self._try(partial(self.tracker.finish, whole=self._whole))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, a run does not end for it
            self._tell_once(_text(error))

    def _tell_once(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._tell(f"{self.name}: figures were not sent ({reason}); training goes on, and metrics.jsonl has them")


class _WeightsAndBiases:
    """A run of Weights & Biases; offline where ``WANDB_MODE`` says so."""

    def __init__(self, run: Path, recipe: Recipe, known: str | None) -> None:
        import wandb

        run = run.resolve()
        self._run = wandb.init(
            project=recipe.tracking.project,
            name=run.name,
            id=known,
            resume="allow" if known else None,
            dir=str(run),
            config=dataclasses.asdict(recipe),
            # The run's own display is on the terminal.
            settings=wandb.Settings(console="off", silent=True),
        )
        # Not W&B's own count of steps, which cannot go back to where a run is gone on with.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)
        offline = self._run.settings.mode == "offline"
        folder = Path(self._run.dir).parent
        self.where = f"{folder}, offline; `wandb sync` sends it" if offline else str(self._run.url)

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def finish(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class _MLflow:
    """A run of MLflow, at the server or in the file that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, run: Path, recipe: Recipe, known: str | None) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        project = recipe.tracking.project
        if known is not None:
            self._client.update_run(known, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(project)
            known = str(self._client.create_run(number, run_name=run.resolve().name).info.run_id)
            parameters = [Param(key, str(value)[:500]) for key, value in _leaves(dataclasses.asdict(recipe))]
            for first in range(0, len(parameters), 100):  # as many as one request takes
                self._client.log_batch(known, params=parameters[first : first + 100])
        self.id = known
        self.where = f"experiment {project}, run {known}, at {self._client.tracking_uri}"

    def send(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), 1000):  # as many as one request takes
            self._client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def finish(self, *, whole: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if whole else "FAILED")


_OPEN: dict[str, Callable[[Path, Recipe, str | None], Tracker]] = {"wandb": _WeightsAndBiases, "mlflow": _MLflow}


def _asked_for(recipe: Tracking) -> list[str]:
    return [package for package in _NAMES if getattr(recipe, package)]


def _known_ids(run: Path) -> dict[str, str]:
    try:
        known = json.loads((run / TRACKING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in known.items() if isinstance(value, str)} if isinstance(known, dict) else {}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(error: Exception) -> str:
    """The first line of an error, or its kind."""
    lines = str(error).strip().splitlines()
    return _without_secrets(lines[0]).rstrip(" .") if lines else type(error).__name__


def _without_secrets(text: str) -> str:
    """The text without the user and password that an address may hold."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
