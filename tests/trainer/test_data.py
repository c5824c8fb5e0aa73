"""What a run reads: a corpus, or several by weight; each sample once whatever stops it; no other data than before."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.cli.main import main
from tilewright.corpus import CorpusError, MixtureStream, Prefetch, ShardWriter, Split, Tokenizer, open_corpus
from tilewright.trainer import TrainingError, loop
from tilewright.trainer.data import open_data, samples_of
from tilewright.trainer.recipe import Data
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics
from tilewright.trainer.trained import load_trained

Write = Callable[..., Path]
INTERRUPTED = 130


@pytest.fixture(scope="session")
def other_corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text in the tokens of the tiny corpus, as a run that goes on with new text needs it."""
    folder = tmp_path_factory.mktemp("other") / "fresh"
    tokenizer = Tokenizer.load(tiny_corpus / "tokenizer" / "tokenizer.json")
    draw = random.Random(1)
    for split, documents in (("", 30), ("held out", 6)):
        (folder / split).mkdir(parents=True)
        with ShardWriter(folder / split, tokenizer_name="tiny", vocab_size=320, tokens_per_shard=1500) as writer:
            for _ in range(documents):
                text = " ".join(draw.choices(["seven", "lazy", "bridge", "wizards", "over"], k=90))
                writer.write([*tokenizer.encode(text), tokenizer.end_of_text])
    return folder


@pytest.fixture
def mixed(tiny_recipe: Write, tiny_corpus: Path, other_corpus: Path) -> Callable[..., Path]:
    """A recipe of both corpora, the new one as shards in datatrove's layout."""

    def write(*weights: float, **changes: Any) -> Path:
        new, old = weights or (0.7, 0.3)
        fresh = {"corpus": str(other_corpus), "weight": new, "heldout": str(other_corpus / "held out")}
        sources = [fresh, {"corpus": str(tiny_corpus), "weight": old, "name": "original"}]
        return tiny_recipe(
            **{
                "data__corpus": "", "data__sources": sources, "data__tokenizer":
                str(tiny_corpus / "tokenizer" / "tokenizer.json"), **changes,
            }
        )  # fmt: skip

    return write


def train(recipe: Path, *overrides: str) -> int:
    return main(["train", str(recipe), *overrides])


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command that ends with status 2 says."""
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_a_mixture_trains_and_each_source_is_evaluated_by_name(
    mixed: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(mixed()) == 0
    run = tmp_path / "runs" / "tiny-001"
    _, evaluations = read_metrics(run / "metrics.jsonl")
    for line in evaluations:
        together, *each = line["eval"].values()
        assert list(line["eval"]) == ["heldout", "fresh", "original"]
        assert together["tokens"] == sum(scores["tokens"] for scores in each)
        nats = sum(scores["loss"] * scores["tokens"] for scores in each)
        assert together["loss"] == pytest.approx(nats / together["tokens"])
    first, last = evaluations[0]["eval"], evaluations[-1]["eval"]
    assert all(last[name]["loss"] < first[name]["loss"] for name in first)
    said = capsys.readouterr().out
    assert "on fresh" in said
    assert "on original" in said
    assert main(["evaluate", str(run), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["eval"]) == ["heldout", "fresh", "original"]


def test_the_samples_of_a_mixture_have_the_weights_of_the_recipe(mixed: Write, tiny_corpus: Path) -> None:
    data = open_data(load_recipe(str(mixed())).data)
    stream = data.train_stream(sequence_length=32, seed=0)
    for samples in (1, 8, 33, 1000):
        of_old = sum(stream.place(sample)[0].folder.is_relative_to(tiny_corpus) for sample in range(samples))
        assert abs(of_old - 0.3 * samples) <= 0.5


def test_a_run_is_not_gone_on_with_at_other_weights(
    mixed: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train(mixed()) == INTERRUPTED
    monkeypatch.undo()
    run = tmp_path / "runs" / "tiny-001"
    said = refused(capsys, "train", str(mixed(0.5, 0.5)), "--run_directory", str(run))
    assert "tiny-001 was trained with the weights fresh 7 : original 3 and the recipe now says fresh 1 : " in said
    assert train(mixed(70, 30), "--run_directory", str(run)) == 0, "the same proportions in other words"


def test_a_run_is_not_gone_on_with_on_another_source(
    mixed: Write, other_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "fresh"
    shutil.copytree(other_corpus, moved)
    recipe = mixed(steps=2)
    text = recipe.read_text().replace(str(other_corpus), str(moved))
    recipe.write_text(text)
    assert train(recipe) == 0
    run = tmp_path / "runs" / "tiny-001"
    assert load_trained(run, torch.device("cpu")).step == 2
    (moved / "00001.ds").unlink()
    assert "tiny-001 was trained on another corpus than the one that is now in" in refused(capsys, "evaluate", str(run))


def test_corpora_of_different_tokenizers_are_refused(mixed: Write, tiny_corpus: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((tiny_corpus / "tokenizer" / "tokenizer.json").read_bytes() + b"\n")
    data = load_recipe(str(mixed(data__tokenizer=str(tokenizer)))).data
    with pytest.raises(TrainingError, match=r"fresh and .*tiny were made with different tokenizers, and one model"):
        open_data(data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.corpus", "c"], "data.corpus and data.sources are both given; give one"),
        (["--data.heldout", "c"], "data.heldout and data.sources are both given; give one, or each source its own"),
        (["--data.sources", "[{corpus: a, weight: 0}]"], "data.sources does not fit: A source's weight is 0"),
        (["--data.sources", "[{corpus: a}]"], r"data\.sources.*weight"),
        (["--data.sources", "[{corpus: a, weigth: 1}]"], r"unknown recipe key 'data\.sources\[0\]\.weigth' .* 'data"),
        (["--data.sources", "[{corpus: x/a, weight: 1}, {corpus: y/a, weight: 1}]"], "names 'a', 'a'; give each a nam"),
        (["--data.sources", "[{corpus: a, weight: 1, name: heldout}]"], "names 'heldout'; give each a name of its own"),
        (["--data.prefetch", "-1"], "data.prefetch is -1; it must be 0 or more"),
    ],
)
def test_sources_that_do_not_fit_are_refused_with_the_key_named(
    mixed: Write, overrides: list[str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_recipe(str(mixed()), overrides)


def test_a_recipe_without_data_is_refused(tiny_recipe: Write) -> None:
    with pytest.raises(TrainingError, match=r"names no data; give data\.corpus, or several corpora as data.sources"):
        open_data(load_recipe(str(tiny_recipe(data__corpus=""))).data)


def test_shards_alone_need_a_tokenizer_and_text_to_evaluate_on(other_corpus: Path, tiny_corpus: Path) -> None:
    tokenizer = str(tiny_corpus / "tokenizer" / "tokenizer.json")
    with pytest.raises(CorpusError, match=r"fresh holds token shards and nothing else, .* must name its tokenizer"):
        open_data(Data(corpus=str(other_corpus), sequence_length=32))
    with pytest.raises(CorpusError, match=r"must name its heldout too: .* as `heldout`, beside `corpus`, a folder of"):
        open_data(Data(corpus=str(other_corpus), tokenizer=tokenizer, sequence_length=32))
    with pytest.raises(CorpusError, match=r"it has no <eos> token"):
        open_data(
            Data(
                corpus=str(other_corpus), tokenizer=tokenizer, heldout="h", end_of_text="<eos>", sequence_length=32
            )
        )  # fmt: skip


def test_shards_alone_train_from_a_recipe(
    tiny_recipe: Write, other_corpus: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(
        steps=2,
        data__corpus=str(other_corpus),
        data__tokenizer=str(tiny_corpus / "tokenizer" / "tokenizer.json"),
        data__heldout=str(other_corpus / "held out"),
    )
    assert train(recipe) == 0
    summary = json.loads((tmp_path / "runs" / "tiny-001" / "summary.json").read_text())
    held_out = open_data(load_recipe(str(recipe)).data).corpora["heldout"].heldout
    assert summary["heldout"]["tokens"] == held_out.token_count
    tokenizer = open_corpus(tiny_corpus).tokenizer
    assert summary["heldout"]["bytes"] == tokenizer.byte_lengths[held_out.read(0, held_out.token_count)].sum()
    assert "gzip_bits_per_byte" not in summary["heldout"]


def test_loss_masks_are_refused_rather_than_ignored(other_corpus: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    shutil.copytree(other_corpus, folder)
    (folder / "00000.ds.loss").write_bytes(b"\1")
    data = Data(
        corpus=str(folder), heldout=str(folder / "held out"), sequence_length=32,
        tokenizer=str(tiny_corpus / "tokenizer" / "tokenizer.json"),
    )  # fmt: skip
    with pytest.raises(CorpusError, match=r"masked holds loss masks \(\.ds\.loss\), which are not read"):
        open_data(data)


def test_a_token_past_the_tokenizer_is_named_not_looked_up(
    other_corpus: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(other_corpus, folder)
    shard = folder / "00000.ds"
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))
    tokenizer = str(tiny_corpus / "tokenizer" / "tokenizer.json")
    data = open_data(Data(corpus=str(folder), heldout=str(other_corpus), tokenizer=tokenizer, sequence_length=32))
    stream = data.train_stream(sequence_length=32, seed=0)
    with pytest.raises(CorpusError, match=r"are damaged: they hold token 65535 .* vocabulary ends at 319"):
        stream.batch(range(100))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_processes_of_a_step_share_its_samples_without_rest(processes: int, micro_batch: int) -> None:
    parts = [
        list(samples_of(480, 24, rank=rank, processes=processes, micro_batch=micro_batch)) for rank in range(processes)
    ]
    assert [sample for part in parts for samples in part for sample in samples] == list(range(480, 504))
    assert {len(samples) for part in parts for samples in part[:-1]} <= {micro_batch}


# Two sources whose tokens count up, so that the first token of a window says which window it is.
COUNTED = {"new": (1, 1000, 0.7), "old": (100_001, 400, 0.3)}
LENGTH, SEQUENCES, STEPS = 3, 24, 60


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("counted")
    for name, (first, tokens, _) in COUNTED.items():
        (root / name).mkdir()
        with ShardWriter(root / name, tokenizer_name="counting", vocab_size=1 << 20, tokens_per_shard=400) as writer:
            for start in range(first, first + tokens, 37):
                writer.write(range(start, min(start + 37, first + tokens)))
    return root


def opened(counted: Path, seed: int) -> MixtureStream:
    """The stream as a new process opens it."""
    splits = {name: Split(counted / name, end_of_text=0) for name in COUNTED}
    return MixtureStream(splits, [weight for *_, weight in COUNTED.values()], sequence_length=LENGTH, seed=seed)


def windows_read(
    stream: MixtureStream, steps: range, *, processes: int, micro_batch: int, depth: int
) -> dict[int, list[int]]:
    """By step, the windows that all processes together read in it, read ahead as the loop does."""

    def read(step: int, rank: int) -> list[int]:
        first = step * SEQUENCES
        parts = samples_of(first, SEQUENCES, rank=rank, processes=processes, micro_batch=micro_batch)
        return [int(row[0]) for samples in parts for row in stream.batch(samples).inputs]

    found: dict[int, list[int]] = {step: [] for step in steps}
    for rank in range(processes):
        with Prefetch(partial(read, rank=rank), first=steps.start, depth=depth) as ahead:
            for step in steps:
                found[step] += ahead.take(step)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_no_sample_is_lost_or_read_twice_by_a_run_that_is_killed_and_resumed_at_other_sizes(
    counted: Path, seed: int
) -> None:
    """Killed at random steps and resumed from the last checkpoint, each time with other processes, another micro-batch,
    so another accumulation, and another depth of reading ahead, over several epochs of each source."""
    draw = random.Random(seed)
    committed: list[list[int]] = []  # the windows of each step that a checkpoint covers, which is all a resumption has
    while len(committed) < STEPS:
        resumed = len(committed)
        killed = min(resumed + draw.randint(1, 12), STEPS)
        saved = killed if killed == STEPS else draw.randint(resumed, killed)
        sizes = {"processes": draw.choice([1, 2, 3, 4, 6, 8]), "micro_batch": draw.choice([1, 2, 3])}
        read = windows_read(opened(counted, seed), range(resumed, killed), **sizes, depth=draw.choice([0, 1, 3]))
        committed += [read[step] for step in range(resumed, saved)]
    windows = [window for step in committed for window in step]
    assert windows == opened(counted, seed).batch(range(STEPS * SEQUENCES)).inputs[:, 0].tolist()
    for first, tokens, weight in COUNTED.values():
        mine = [window for window in windows if first <= window < first + tokens]
        assert abs(len(mine) - weight * len(windows)) <= 0.5
        epoch = (tokens - 1) // LENGTH
        assert len(mine) > 2 * epoch
        for start in range(0, len(mine) - epoch + 1, epoch):
            assert sorted(mine[start : start + epoch]) == list(range(first, first + epoch * LENGTH, LENGTH))


def test_a_killed_run_may_go_on_with_another_micro_batch_and_trains_on_each_sample_once(
    mixed: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, trained, calls = loop.train_step, [], 0

    def recorded(model: Any, optimizer: Any, micro_batches: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        trained.append([row.tolist() for micro in micro_batches for row in micro.inputs])
        return step(model, optimizer, micro_batches, *args, **options)

    monkeypatch.setattr(loop, "train_step", recorded)
    recipe = mixed()
    assert train(recipe) == INTERRUPTED
    assert len(trained) == 3
    del trained[2:]  # the checkpoint is that of step 2
    assert train(recipe, "--batch.micro_batch", "4") == 0
    loaded = load_recipe(str(recipe))
    stream = open_data(loaded.data).train_stream(sequence_length=32, seed=loaded.seed)
    assert [row for rows in trained for row in rows] == stream.batch(range(6 * 8)).inputs.tolist()
    assert [path.name for path in (recipe.parent / "runs").iterdir()] == ["tiny-001"]
