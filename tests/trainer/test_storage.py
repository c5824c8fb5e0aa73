"""Checkpoints elsewhere than in the run directory: in an object store, by a URL, or in another folder."""

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tilewright.cli.main import main
from tilewright.trainer.checkpoints.checkpoint import MARKER, CheckpointWriter, Committed, committed, load
from tilewright.trainer.checkpoints.files import HeldOut
from tilewright.trainer.checkpoints.storage import RemotePath, location, write_whole
from tilewright.trainer.data import CORPUS
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.recipe import Checkpoints
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def object_store() -> ModuleType:
    spec = importlib.util.spec_from_file_location("object_store", Path(__file__).with_name("object_store.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(object_store: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The URL of a store; called with names of faults, has it show them."""

    def faults(**names: str | None) -> str:
        for name, value in names.items():
            monkeypatch.setattr(object_store.ObjectStore, name, value)
        return f"bucket://{tmp_path}/a.store/runs"

    return faults


@pytest.fixture
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((40, 3), value), "model.b": torch.arange(5.0)}


def save(run: Path, folder: str, processes: World, *steps: int, keep: int = 2) -> list[Committed]:
    with CheckpointWriter(run, processes, Checkpoints(keep=keep, folder=folder)) as writer:
        for step in steps:
            writer.save(state_of(step), step)
    return committed(run, folder)


def steps(checkpoints: list[Committed]) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints]


def test_a_store_keeps_the_newest_and_gives_them_back_to_the_bit(
    store: Callable[..., str], processes: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kept = save(run, store(), processes, 1, 2, 3)
    assert steps(kept) == [2, 3]
    names = {path.name for path in (location(store()) / "run").iterdir()}
    assert names == {"step-00000002", "step-00000003"}
    assert not list((tmp_path / "a.store").glob("*00000001*"))
    state = state_of(0)
    load(kept[-1], state, processes)
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(3).items())
    assert not run.exists()


@pytest.mark.parametrize(
    "url", ["memory://somewhere/runs", "file://{folder}/runs", "local://{folder}/runs", "{folder}/runs"]
)
def test_any_file_system_will_do(url: str, processes: World, tmp_path: Path) -> None:
    url = url.format(folder=tmp_path)
    kept = save(tmp_path / "run", url, processes, 1, 2, 3)
    assert steps(kept) == [2, 3]
    state = state_of(0)
    load(kept[0], state, processes)
    assert torch.equal(state["model.a"], state_of(2)["model.a"])
    assert isinstance(kept[0].path, RemotePath) == url.startswith("memory")


def damage(path: RemotePath, change: Callable[[bytes], bytes]) -> None:
    with path.open("rb") as file:
        content = file.read()
    with path.open("wb") as file:
        file.write(change(content))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: damage(path, lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:]), "is not what was written"),
        (lambda path: damage(path, lambda x: x[:-100]), r"has \d+ bytes where \d+ were written"),
        (lambda path: path.unlink(), "lacks its file __0_0.distcp"),
    ],
)
def test_damage_in_a_store_is_named_and_the_checkpoint_before_offered(
    store: Callable[..., str], processes: World, tmp_path: Path, spoil: Callable[[RemotePath], None], told: str
) -> None:
    older, newest = save(tmp_path / "run", store(), processes, 1, 2)
    spoil(newest.path / "__0_0.distcp")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=told) as error:
        load(newest, state_of(0), processes)
    assert f"remove {newest.path} to go on from the checkpoint of step 1, which is intact" in str(error.value)
    load(older, state_of(0), processes)


@pytest.mark.parametrize("object_name", ["step-00000003/__0_0", "step-00000003/.metadata", "step-00000003/COMMITTED"])
def test_an_upload_that_fails_is_told_in_a_sentence_and_what_was_there_stays(
    store: Callable[..., str], processes: World, tmp_path: Path, object_name: str
) -> None:
    run = tmp_path / "run"
    save(run, store(), processes, 1, 2)
    with pytest.raises(
        TrainingError,
        match=r"step 3 could not be written to bucket://.*StoreError: SlowDown.*step 2 is untouched: mend that",
    ):
        save(run, store(failing=object_name), processes, 3)
    assert steps(committed(run, store(failing=None))) == [1, 2]
    assert not list((tmp_path / "a.store").glob("*00000003*"))
    assert steps(save(run, store(), processes, 3)) == [2, 3]


def test_an_object_that_comes_out_short_is_found_before_the_commit(
    store: Callable[..., str],
    processes: World,
    tmp_path: Path,
    object_store: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    appear = object_store.ObjectStore.appear

    def cut(self: object, path: str, upload: Path) -> None:
        if path.endswith(".distcp"):
            upload.write_bytes(upload.read_bytes()[:-7])
        appear(self, path, upload)

    monkeypatch.setattr(object_store.ObjectStore, "appear", cut)
    with pytest.raises(TrainingError, match=r"__0_0.distcp has \d+ bytes there where \d+ were written; no earlier one"):
        save(tmp_path / "run", store(), processes, 1)
    assert committed(tmp_path / "run", store()) == []


def test_a_listing_that_is_late_costs_no_checkpoint(
    store: Callable[..., str], processes: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save(run, store(), processes, 1, 2, 3)
    save(run, store(unlisted="step-00000003"), processes, 4)
    # What was not listed was not counted, so that one more is kept; the next that sees it puts it right.
    assert steps(committed(run, store(unlisted=None))) == [2, 3, 4]
    assert steps(save(run, store(), processes, 5)) == [4, 5]


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(
    store: Callable[..., str], processes: World, tmp_path: Path
) -> None:
    """A marker that cannot be asked after is not missing: taken so, its checkpoint would be cleared away."""
    run = tmp_path / "run"
    save(run, store(), processes, 1, 2)
    with pytest.raises(OSError, match="ServiceUnavailable"):
        committed(run, store(refused=MARKER))
    store(refused="step-00000002/COMMITTED")
    with CheckpointWriter(run, processes, Checkpoints(keep=1, folder=store())) as writer:
        writer.save(state_of(3), 3)
    assert steps(committed(run, store(refused=None))) == [1, 2, 3]


def test_the_best_stays_though_the_store_does_not_say_that_it_is(
    store: Callable[..., str], processes: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with CheckpointWriter(run, processes, Checkpoints(keep=1, keep_best=True, folder=store())) as writer:
        writer.save(state_of(1), 1, heldout=HeldOut(2.0, 100))
        writer.save(state_of(2), 2, heldout=HeldOut(3.0, 100))
        writer.wait()
        store(unread="step-00000001/COMMITTED")
        writer.save(state_of(3), 3, heldout=HeldOut(4.0, 100))
        writer.wait()
        assert steps(committed(run, store(unread=None))) == [1, 2, 3]
        writer.save(state_of(4), 4, heldout=HeldOut(5.0, 100))
    assert steps(committed(run, store())) == [1, 4]


@pytest.mark.parametrize("name", [MARKER, ".metadata", "__0_0.distcp"])
def test_a_file_that_the_store_does_not_give_is_not_taken_for_a_damaged_one(
    store: Callable[..., str], processes: World, tmp_path: Path, name: str
) -> None:
    _, newest = save(tmp_path / "run", store(), processes, 1, 2)
    store(unread=f"step-00000002/{name}")
    told = "StoreError: ServiceUnavailable; mend that, then give the same command again"
    with pytest.raises(TrainingError, match=rf"step-00000002.*{told}$"):
        load(newest, state_of(0), processes)
    store(unread=None)
    load(newest, state_of(0), processes)


def test_of_a_file_whose_writing_is_broken_off_no_half_comes_to_be(store: Callable[..., str], tmp_path: Path) -> None:
    half = location(store()) / "half"
    half.mkdir(parents=True, exist_ok=True)

    def broken_off() -> None:
        with half.open("wb") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    gc.collect()
    assert not half.is_file()
    assert [part.stat().st_size for part in (tmp_path / "a.store-uploads").iterdir()] == [0]
    half.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        half.unlink()


def test_a_run_goes_on_from_a_store_and_is_scored_and_sampled_from_it(
    store: Callable[..., str], tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = tiny_recipe(checkpoints__folder=store(), steps=4, sample__prompt="")
    assert main(["train", str(recipe), "--run_directory", str(run)]) == 0
    whole, _ = read_metrics(run / "metrics.jsonl")
    assert steps(committed(run, store())) == [2, 4]
    assert not (run / "checkpoints").exists()
    # The machine is lost after step 2, and the run directory with it.
    run.rename(tmp_path / "lost")
    (committed(run, store())[-1].path / MARKER).unlink()
    assert main(["train", str(recipe), "--run_directory", str(run)]) == 0
    again, _ = read_metrics(run / "metrics.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in whole[2:]]
    for command, *options in (["evaluate"], ["generate", "--prompt", "the"], ["replay", "--step", "3"]):
        assert main([command, str(run), *options]) == 0, capsys.readouterr().err


def test_a_run_of_another_recipe_is_refused_where_its_checkpoints_would_lie(
    store: Callable[..., str], tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(checkpoints__folder=store(), steps=2, sample__prompt=""))
    assert main(["train", recipe, "--run_directory", str(tmp_path / "a" / "run")]) == 0
    assert main(["train", recipe, "--run_directory", str(tmp_path / "b" / "run"), "--seed", "1"]) == 2
    assert "holds a run of another recipe (seed differ)" in capsys.readouterr().err
    assert main(["train", recipe, "--run_directory", str(tmp_path / "a" / "run"), "--checkpoints.folder", ""]) == 2
    assert "another recipe (checkpoints.folder differ)" in capsys.readouterr().err


def test_a_run_without_a_name_goes_on_from_a_store_only_as_it_was_steered(
    store: Callable[..., str], tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(checkpoints__folder=store(), steps=2, sample__prompt=""))
    assert main(["train", recipe, "--runs", str(tmp_path / "a")]) == 0
    kept = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "a.store").iterdir())]
    other = ["train", recipe, "--runs", str(tmp_path / "b"), "--optimizer.learning_rate", "0.5"]
    assert main(other) == 2
    assert "holds a run of another recipe (optimizer.learning_rate differ)" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in sorted((tmp_path / "a.store").iterdir())] == kept
    assert list((tmp_path / "b").iterdir()) == []
    run = tmp_path / "b" / "tiny-001"
    assert main([*other, "--steps", "3", "--run_directory", str(run)]) == 0  # who names it may steer it
    assert steps(committed(run, store()))[-1] == 3


def test_a_start_that_is_refused_for_its_corpus_or_its_steps_leaves_the_run_directory_as_it_was(
    store: Callable[..., str], tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(checkpoints__folder=store(), steps=3, sample__prompt=""))
    command = ["train", recipe, "--run_directory", str(tmp_path / "b" / "tiny-001")]
    assert main(["train", recipe, "--run_directory", str(tmp_path / "a" / "tiny-001")]) == 0
    corpus_kept = location(store()) / "tiny-001" / CORPUS
    kept = corpus_kept.read_text(encoding="utf-8")
    write_whole(corpus_kept, json.dumps({"tokenizer": "another"}))
    assert main(command) == 2
    assert "tiny-001 was trained on another corpus" in capsys.readouterr().err
    assert list((tmp_path / "b").iterdir()) == []
    write_whole(corpus_kept, kept)
    assert main([*command, "--steps", "2"]) == 2
    assert "has come to step 3 already" in capsys.readouterr().err
    assert list((tmp_path / "b").iterdir()) == []
    (tmp_path / "b" / "tiny-001").mkdir()
    assert main([*command, "--steps", "2"]) == 2
    assert [path.name for path in (tmp_path / "b" / "tiny-001").iterdir()] == [".lock"]
    assert main(command) == 0


@pytest.mark.parametrize(
    "url", ["s3://me:s3cret@bucket/runs", "sftp://me:s3c/ret@host/runs", "hdfs://me:8s3c@h:9000/a"]
)
def test_a_password_in_the_url_is_refused_and_not_repeated(tiny_recipe: Write, url: str) -> None:
    with pytest.raises(TrainingError, match=r"checkpoints.folder is a URL with a user and a password") as told:
        load_recipe(str(tiny_recipe(checkpoints__folder=url)))
    assert "s3c" not in str(told.value)
    of_no_password = (
        "abfs://container@account.dfs.core.windows.net/runs", "s3://bucket/runs", "/home/a:b@c/runs",
        "hdfs://host:9000/a@b", "hdfs://me@host:9000/a@b", "hdfs://[::1]:9000/a@b", "hdfs://[::1]/a@b",
    )  # fmt: skip
    for fine in of_no_password:
        assert load_recipe(str(tiny_recipe(checkpoints__folder=fine))).checkpoints.folder == fine


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s4://bucket/runs", r"checkpoints.folder is s4://bucket/runs, and fsspec knows no file system s4://; is s3"),
        ("s3://bucket/runs", r"and the package for s3:// is missing: Install s3fs .*; install it with pip, or name"),
    ],
)
def test_a_file_system_that_is_not_there_is_named_with_the_package_it_needs(url: str, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        location(url)
