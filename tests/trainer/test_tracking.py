"""Figures on a tracking server: what is sent, what goes on where, and that no server can end or hold up a run."""

import importlib.machinery
import io
import json
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console

from tilewright.cli.main import main
from tilewright.trainer import TrainingError
from tilewright.trainer.loop import train
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record import tracking
from tilewright.trainer.record.metrics import read_metrics


class StandInForWandb(types.ModuleType):
    """Records what W&B is called with; `failing`: each of its logs raises."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="stand-in")
        self.starts, self.logged, self.ended, self.failing = [], [], [], False

    def Settings(self, **settings):
        return types.SimpleNamespace(mode="online", **settings)

    def init(self, **options):
        self.starts.append(options)
        folder = str(Path(options["dir"]) / "wandb" / "run" / "files")
        return types.SimpleNamespace(
            id=options["id"] or "made-up-id", settings=options["settings"], url="https://me:key@host/run", dir=folder,
            define_metric=lambda *names, **options: None, log=self._log, finish=lambda **how: self.ended.append(how),
        )  # fmt: skip

    def _log(self, values):
        if self.failing:
            raise ConnectionError("https://me:key@host/ is gone\nand more")
        self.logged.append(values)


class StandInForMLflow:
    """Records what MLflow's client is called with."""

    tracking_uri = "http://me:key@host"

    def __init__(self):
        self.made, self.metrics, self.parameters, self.statuses = [], [], {}, []

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"number of {name}"

    def create_run(self, experiment, run_name):
        self.made.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-id"))

    def update_run(self, run, status):
        self.statuses.append((run, status))

    def set_terminated(self, run, status):
        self.statuses.append((run, status))

    def log_batch(self, run, metrics=(), params=()):
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.metrics += metrics
        self.parameters |= dict(params)


@pytest.fixture
def wandb(monkeypatch):
    module = StandInForWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    client = StandInForMLflow()
    modules = {name: types.ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.tracking")}
    modules["mlflow"].__spec__ = importlib.machinery.ModuleSpec("mlflow", None, origin="stand-in")
    modules["mlflow.entities"].Metric = lambda *fields: fields
    modules["mlflow.entities"].Param = lambda *fields: fields
    modules["mlflow.tracking"].MlflowClient = lambda: client
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return client


def trained(recipe):
    console = Console(file=io.StringIO(), width=500)
    return train(load_recipe(str(recipe)), console).run, console.file.getvalue()


def test_each_tracker_gets_every_finite_figure_and_a_resumed_run_goes_on_there(tiny_recipe, tmp_path, wandb, mlflow):
    tracked = {"run_directory": str(tmp_path / "here"), "tracking": {"wandb": True, "mlflow": True, "project": "mine"}}
    run, said = trained(tiny_recipe(steps=2, **tracked))
    assert "https://host/run" in said
    assert "key@" not in said
    trained(tiny_recipe(steps=4, **tracked))

    lines, evaluations = read_metrics(run / "metrics.jsonl")
    sent = {line["step"]: line["train/loss"] for line in wandb.logged if "train/loss" in line}
    assert sent == {line["step"]: line["loss"] for line in lines}
    assert {line["step"] for line in wandb.logged if "eval/heldout/loss" in line} == {e["step"] for e in evaluations}
    blocks = [line["train/grad_norms/blocks.0"] for line in wandb.logged if "train/loss" in line]
    assert blocks == [line["grad_norms"]["blocks.0"] for line in lines]
    assert [start["id"] for start in wandb.starts] == [None, "made-up-id"]
    assert [start["project"] for start in wandb.starts] == ["mine", "mine"]
    assert wandb.ended == [{"exit_code": 0}] * 2

    losses = {step: value for name, value, _, step in mlflow.metrics if name == "train/loss"}
    assert losses == sent
    assert mlflow.made == [("number of mine", "here")]
    assert mlflow.statuses == [("run-id", "FINISHED"), ("run-id", "RUNNING"), ("run-id", "FINISHED")]
    assert mlflow.parameters["optimizer.learning_rate"] == "0.01"
    assert json.loads((run / "tracking.json").read_text()) == {"wandb": "made-up-id", "mlflow": "run-id"}


def test_a_server_that_fails_is_told_of_once_and_without_its_password_and_the_run_goes_on(tiny_recipe, wandb):
    wandb.failing = True
    run, said = trained(tiny_recipe(tracking={"wandb": True}))
    assert said.count("figures were not sent") == 1
    assert "(https://host/ is gone)" in said
    assert "key" not in said
    assert len(read_metrics(run / "metrics.jsonl")[0]) == 6
    assert wandb.ended == [{"exit_code": 0}]


def test_training_does_not_wait_for_a_server_that_does_not_answer(tiny_recipe, wandb, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(wandb, "_log", lambda values: answer.wait())
    monkeypatch.setattr(tracking, "_SECONDS_TO_SEND_THE_REST", 0.0)
    monkeypatch.setattr(tracking, "_LINES_WAITING", 3)
    try:
        run, said = trained(tiny_recipe(tracking={"wandb": True}))
    finally:
        answer.set()
    assert len(read_metrics(run / "metrics.jsonl")[0]) == 6
    assert "3 lines wait to be sent" in said
    assert "could not be sent in time; they are in metrics.jsonl" in said


def test_a_server_that_cannot_be_reached_ends_a_new_run_before_its_first_step_and_no_run_that_goes_on(
    tiny_recipe, tmp_path, wandb, monkeypatch
):
    def refuse(**options):
        raise ValueError("no API key")

    where = {"run_directory": str(tmp_path / "here")}
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(TrainingError, match=r"Biases cannot be opened: no API key; .*WANDB_MODE=offline"):
        trained(tiny_recipe(steps=2, tracking={"wandb": True}, **where))
    assert not (tmp_path / "here" / "metrics.jsonl").exists()
    trained(tiny_recipe(steps=2, **where))
    run, said = trained(tiny_recipe(steps=4, tracking={"wandb": True}, **where))
    assert "Biases cannot be reached, so nothing is sent there: no API key" in said
    assert len(read_metrics(run / "metrics.jsonl")[0]) == 4


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_is_named_with_the_command_that_installs_it(
    tiny_recipe, tmp_path, monkeypatch, capsys, package, folder
):
    """Also where W&B has left a folder of its own name, which Python would take for a package."""
    place = tmp_path / "place"
    (place / package if folder else place).mkdir(parents=True)
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    with pytest.raises(TrainingError, match=rf"not installed; give `pip install 'tilewright\[{package}\]'`"):
        tracking.check_installed(load_recipe(str(tiny_recipe(tracking={package: True}))).tracking)


def test_a_project_without_a_name_is_refused(tiny_recipe, capsys):
    assert main(["train", str(tiny_recipe()), "--tracking.project", " "]) == 2
    assert "tracking.project is empty" in capsys.readouterr().err


def test_weights_and_biases_itself_takes_a_run_offline_and_goes_on_with_it(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked = {"run_directory": str(tmp_path / "here"), "tracking": {"wandb": True}}
    for steps in (2, 4):
        run, said = trained(tiny_recipe(steps=steps, **tracked))
        assert "not sent" not in said
    id = json.loads((run / "tracking.json").read_text())["wandb"]
    written = list((run / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert len(written) == 2
    for file in written:
        assert b"train/grad_norms/blocks.0" in file.read_bytes()


def test_mlflow_itself_takes_a_run_into_a_file_and_goes_on_with_it(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy, of mlflow, is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracked = {"run_directory": str(tmp_path / "here"), "tracking": {"mlflow": True}}
    for steps in (2, 4):
        run, said = trained(tiny_recipe(steps=steps, **tracked))
        assert "not sent" not in said
    lines, _ = read_metrics(run / "metrics.jsonl")
    id = json.loads((run / "tracking.json").read_text())["mlflow"]
    client = MlflowClient()
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(id, "train/loss")]
    assert sorted(losses) == [(line["step"], line["loss"]) for line in lines]
    assert client.get_run(id).info.status == "FINISHED"
