"""Bad input ends in one sentence that says what to do, exit status 2, no traceback, and nothing lost."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed.checkpoint.filesystem as dcp_filesystem

from tilewright.cli.main import main
from tilewright.trainer import trained

Write = Callable[..., Path]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says as it exits with status 2: one sentence on stderr."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("tilewright: ")
    assert said.count("\n") == 1, "more than one line"
    assert "Traceback" not in said
    return said


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["train", str(tiny_recipe())]) == 0
    capsys.readouterr()
    return tmp_path / "runs" / "tiny-001"


def test_an_unknown_recipe_key(tiny_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", str(tiny_recipe()), "--optimiser.learning_rate", "1")
    assert "unknown recipe key 'optimiser'" in said
    assert "nearest known one is 'optimizer'" in said


def test_a_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no recipe file nowhere.yaml; name a YAML file" in refused(capsys, "train", "nowhere.yaml")


def test_a_missing_corpus(tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", str(tiny_recipe(data__corpus=str(tmp_path / "none"))))
    assert "tilewright corpus build --output" in said


def test_a_missing_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "evaluate", str(tmp_path / "none"))
    assert "is not a run directory: it holds no recipe.yaml" in said


def test_a_missing_text_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tmp_path / "none")
    said = refused(capsys, "corpus", "build", "--source", source, "--output", str(tmp_path / "out"))
    assert source in said
    assert not (tmp_path / "out" / "documents").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_corrupt_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    file = finished / "checkpoints" / "step-00000006" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[1000] ^= 255
    file.write_bytes(bytes(content))
    before = files_of(finished)
    arguments = ["--prompt", "the"] if command == "generate" else []
    said = refused(capsys, command, str(finished), *arguments)
    assert "is damaged: __0_0.distcp is not what was written" in said
    assert "to go on from the checkpoint of step 4" in said
    assert files_of(finished) == before
    # What the sentence says to do helps.
    shutil.rmtree(file.parent)
    assert main([command, str(finished), *arguments]) == 0


def test_a_corrupt_checkpoint_when_a_run_is_to_go_on(
    finished: Path, tiny_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "summary.json").unlink()
    marker = finished / "checkpoints" / "step-00000006" / "COMMITTED.json"
    marker.write_text("not json")
    before = files_of(finished)
    said = refused(capsys, "train", str(tiny_recipe()))
    assert "to go on from the checkpoint of step 4" in said
    after = files_of(finished)
    assert {name: after.get(name) for name in before} == before


def test_the_checkpoint_of_another_model(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = finished / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("hidden_size: 32", "hidden_size: 48"))
    assert "is of another model: model.embedding.weight has shape" in refused(capsys, "evaluate", str(finished))


def test_a_tokenizer_that_does_not_match_the_shards(
    tiny_recipe: Write, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other, mixed = tmp_path / "source", tmp_path / "other", tmp_path / "mixed"
    source.mkdir()
    for number in range(10):
        (source / f"{number}.txt").write_text(f"entirely different words {number} " * 40)
    assert main(["corpus", "build", "--source", str(source), "--vocab-size", "300", "--output", str(other)]) == 0
    shutil.copytree(tiny_corpus, mixed)
    shutil.rmtree(mixed / "tokenizer")
    shutil.copytree(other / "tokenizer", mixed / "tokenizer")
    capsys.readouterr()
    said = refused(capsys, "train", str(tiny_recipe(data__corpus=str(mixed))))
    assert "made with another tokenizer" in said
    assert "tilewright corpus build" in said


def test_a_sequence_longer_than_the_shards_allow(tiny_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(data__sequence_length=10**6, model__max_sequence_length=10**6)
    said = refused(capsys, "train", str(recipe))
    assert "1000000" in said.replace(",", "")


def test_a_vocabulary_too_small(tiny_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", str(tiny_recipe(model__vocab_size=100)))
    assert "model.vocab_size is 100, but the tokenizer" in said
    assert "--model.vocab_size 320" in said


def test_a_batch_that_does_not_divide(tiny_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", str(tiny_recipe(batch__micro_batch=3)))
    assert "batch.micro_batch is 3, which does not divide the 8 sequences" in said


def test_no_space_left_while_a_checkpoint_is_written(
    tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at the second checkpoint; when there is room again the run goes on from the first."""
    fsync = dcp_filesystem.os.fsync

    def full_from_the_second_checkpoint_on(descriptor: int) -> None:
        if (tmp_path / "runs" / "tiny-001" / "checkpoints" / "step-00000004").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(dcp_filesystem.os, "fsync", full_from_the_second_checkpoint_on)
    recipe = str(tiny_recipe())
    said = refused(capsys, "train", recipe)
    assert "the checkpoint of step 4 could not be written" in said
    assert "no space is left on the disk; the checkpoint of step 2 is untouched: make room" in said
    monkeypatch.undo()
    assert main(["train", recipe]) == 0
    assert not (tmp_path / "runs" / "tiny-002").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature is -1.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-k", "0", "top_k 0; they must be finite, at least 0 and 1"),
        ("--prompt", "", "prompt is empty"),
        ("--prompt", "\udcff", "the prompt is not text"),
    ],
)
def test_sampling_options_out_of_range(
    finished: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert message in refused(capsys, "generate", str(finished), "--prompt", "the", option, value)


def test_shards_that_hold_a_token_past_their_vocabulary(
    tiny_recipe: Write, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    (shard,) = (corpus / "shards" / "train").glob("*.ds")
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))
    said = refused(capsys, "train", str(tiny_recipe(data__corpus=str(corpus))))
    assert "are damaged: they hold token 65535" in said
    assert "their vocabulary ends at 319" in said


def test_a_damaged_file_of_held_out_text_is_told_and_mended_the_run_ends_well(
    tiny_recipe: Write, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    text = corpus / "documents" / "heldout.jsonl"
    whole = text.read_text()
    text.write_text("x" * len(whole.encode()))  # of the same size, which is all that opening a corpus looks at
    recipe = str(tiny_recipe(data__corpus=str(corpus)))
    assert "heldout.jsonl is damaged; bring it back" in refused(capsys, "train", recipe)
    text.write_text(whole)
    assert main(["train", recipe]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-001"]


@pytest.mark.parametrize(
    "command",
    [[], ["doctor"], ["corpus"], ["corpus", "build"], ["train"], ["train", "quickstart"], ["evaluate"], ["generate"]],
)
def test_every_command_has_a_help_that_explains_its_arguments(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    try:
        status = main([*command, "--help"])
    except SystemExit as left:
        status = int(left.code or 0)
    said = capsys.readouterr().out
    assert status == 0
    assert "usage: tilewright" in said
    assert len(said) > 200


def test_evaluate_and_generate_read_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["generate", str(finished), "--prompt", "the quick", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_a_folder_of_runs_that_is_a_file(
    tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    said = refused(capsys, "train", str(tiny_recipe()), "--runs", str(tmp_path / "file"))
    assert "mend that, then give the same command again" in said


def test_ranks_without_a_place_to_meet(
    tiny_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "start them with torchrun" in refused(capsys, "train", str(tiny_recipe()))


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_the_processes_of_torchrun_the_first_one_tells_the_score(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, lines: int
) -> None:
    score = {"bits_per_byte": 1.0, "loss": 1.0, "perplexity": 2.0, "tokens": 3.0}
    monkeypatch.setattr(trained, "evaluate_run", lambda *_, **__: (5, {"heldout": score}))
    monkeypatch.setenv("RANK", rank)
    assert main(["evaluate", "run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_kernels_demanded_that_cannot_run(
    finished: Path,
    tiny_recipe: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    import tilewright.kernels.dispatch as dispatch

    monkeypatch.setattr(dispatch, "_mode", "cuda")
    said = refused(capsys, command, str(tiny_recipe() if command == "train" else finished))
    assert "TILEWRIGHT_KERNELS is 'cuda' in the environment; it must be one of auto, triton, reference" in said
