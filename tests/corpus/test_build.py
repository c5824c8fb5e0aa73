"""Building: the same every time, only what changed, and never half."""

import errno
import fcntl
import hashlib
import json
import re
import shutil

import pytest

from tilewright.corpus import (
    CorpusError,
    HeldOutStream,
    ShardWriter,
    Split,
    Tokenizer,
    TrainStream,
    open_corpus,
)
from tilewright.corpus import build as build_module
from tilewright.corpus import documents as documents_module
from tilewright.corpus import stage as stage_module
from tilewright.corpus.stage import read_stage

STAGES = ("documents", "tokenizer", "shards")


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def hashes(folder):
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files(folder).items()}


def identities(folder):
    """What changes when a file is written again, even with the same content."""
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in files(folder).items()}


def documents(output, split):
    return [json.loads(line) for line in (output / "documents" / f"{split}.jsonl").read_text().split("\n") if line]


def hidden(output):
    return sorted(path.name for path in output.iterdir() if path.name.startswith(".building"))


@pytest.fixture
def held_out_text(build, output):
    build()
    return documents(output, "heldout")[0]["text"]


def test_two_builds_of_the_same_text_are_equal_byte_for_byte(build, text_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(text_folder, elsewhere)
    build(output=tmp_path / "one")
    build(output=tmp_path / "two")
    build(source=elsewhere, output=tmp_path / "three")
    one, two, three = (hashes(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert {name for name in one if one[name] != three[name]} == {"documents/manifest.json"}  # names its source
    assert len(one) == 15


def test_a_second_run_writes_nothing_and_says_so(build, output):
    first_log = build()
    before = identities(output)
    log = build()
    del before[".lock"]
    assert {name: identity for name, identity in identities(output).items() if name != ".lock"} == before
    assert "up to date" not in first_log
    assert log.replace(" (up to date)", "") == first_log
    assert log.count("up to date") == 3


def test_changed_text_redoes_everything(build, output, text_folder, words):
    build()
    before = hashes(output)
    (text_folder / "part1" / "01.txt").write_text(words(1000, 50))
    assert "up to date" not in build()
    after = hashes(output)
    for name in ("documents/train.jsonl", "tokenizer/tokenizer.json", "shards/train/00000.ds"):
        assert before[name] != after[name]
    assert not hidden(output)


def test_another_vocabulary_redoes_tokenizer_and_shards_but_not_documents(build, output):
    build()
    before = identities(output)
    assert build(vocab_size=300).count("up to date") == 1
    after = identities(output)
    same = {name.split("/")[0] for name in before if name != ".lock" and before[name] == after.get(name)}
    assert same == {"documents"}
    assert open_corpus(output).tokenizer.vocab_size == 300


def test_another_seed_reorders_train_and_leaves_what_is_held_out(build, output):
    build(seed=0)
    train, held_out = documents(output, "train"), documents(output, "heldout")
    build(seed=1)
    assert documents(output, "heldout") == held_out
    reordered = documents(output, "train")
    assert reordered != train
    assert sorted(reordered, key=lambda document: document["name"]) == sorted(
        train, key=lambda document: document["name"]
    )


def test_a_damaged_stage_is_built_again(build, output):
    build()
    path = output / "shards" / "train" / "00000.ds"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert build().count("up to date") == 2
    assert path.read_bytes() == whole


def test_every_document_is_in_train_or_held_out_as_a_whole(build, output, text_folder):
    build()
    train, held_out = documents(output, "train"), documents(output, "heldout")
    written = {document["name"]: document["text"] for document in train + held_out}
    assert written == {name: path.read_bytes().decode() for name, path in files(text_folder).items()}
    assert len(train) + len(held_out) == 40
    held_out_bytes = sum(len(document["text"].encode()) for document in held_out)
    assert 0.1 <= held_out_bytes / sum(len(text.encode()) for text in written.values()) < 0.15
    assert all(
        document["sha256"] == hashlib.sha256(document["text"].encode()).hexdigest() for document in train + held_out
    )


def test_a_near_copy_of_held_out_text_is_left_out_and_named(build, output, text_folder, held_out_text):
    copied = re.findall(r"\w+", held_out_text)
    new = [f"new{number}" for number in range(100)]
    # 40 words have 33 shingles, of which 13 lie within the first 20 words; 100 words have 93.
    (text_folder / "a near copy.txt").write_text(" ".join(copied[:20] + new[:20]))
    (text_folder / "a quotation.txt").write_text(" ".join(copied[:16] + new[16:]))
    log = build()
    assert "1 left out of train for sharing more than 10% of their 8-word shingles" in log
    (left_out,) = open_corpus(output).documents["left_out"]
    assert (left_out["name"], left_out["overlap"]) == ("a near copy.txt", pytest.approx(13 / 33, abs=1e-4))
    names = {split: {document["name"] for document in documents(output, split)} for split in ("train", "heldout")}
    assert "a near copy.txt" not in names["train"] | names["heldout"]
    assert "a quotation.txt" in names["train"]


def test_shards_hold_every_document_followed_by_end_of_text(build, output):
    build()
    corpus = open_corpus(output)
    for split, name in ((corpus.train, "train"), (corpus.heldout, "heldout")):
        texts = [document["text"] for document in documents(output, name)]
        assert split.document_count == len(texts)
        assert split.byte_count == sum(len(text.encode()) for text in texts)
        ends = [0, *split.document_boundaries(0, split.token_count)]
        for text, start, end in zip(texts, ends, ends[1:], strict=False):
            tokens = split.read(start, end - start)
            assert tokens[-1] == split.end_of_text
            assert corpus.tokenizer.decode(tokens[:-1].tolist()) == text
        recorded = json.loads((split.folder / "manifest.json").read_text())["shards"]
        assert [shard["sha256"] for shard in recorded] == [hashes(split.folder)[shard["name"]] for shard in recorded]


def test_held_out_targets_stand_for_exactly_the_bytes_held_out(build, output):
    build()
    corpus = open_corpus(output)
    stream = HeldOutStream(corpus.heldout, sequence_length=32)
    targets = stream.batch(range(len(stream))).targets
    assert corpus.tokenizer.byte_lengths[targets[targets >= 0]].sum() == corpus.heldout.byte_count


def test_many_shards_hold_the_same_stream_as_one(build, output, monkeypatch):
    build()
    split = open_corpus(output).train
    stream, ends = split.read(0, split.token_count), split.document_boundaries(0, split.token_count)
    monkeypatch.setattr(build_module, "TOKENS_PER_SHARD", 500)
    build()
    split = open_corpus(output).train
    assert len(list(split.folder.glob("*.ds"))) > 3
    assert split.read(0, split.token_count).tolist() == stream.tolist()
    assert split.document_boundaries(0, split.token_count).tolist() == ends.tolist()
    assert TrainStream(split, sequence_length=16, seed=0).batch(range(4)).inputs.shape == (4, 16)


def test_a_vocabulary_that_the_text_cannot_fill_is_smaller_and_said_so(build, output, tmp_path):
    source = tmp_path / "pages.jsonl"
    source.write_text("".join(json.dumps({"text": f"page {number}"}) + "\n" for number in range(20)))
    assert "(100,000 asked for, but no more pairs repeat)" in build(source=source, vocab_size=100_000)
    assert open_corpus(output).tokenizer.vocab_size < 300


class Interruption(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


# Where each stage is in the middle of its work, and how many calls pass before the interruption.
MIDDLES = {
    "documents": (documents_module, "overlap", 5),
    "tokenizer": (build_module, "Tokenizer", 0),  # tokenizer.json is written by then
    "shards": (ShardWriter, "write", 5),
}


def interrupt(monkeypatch, owner, name, calls, error=Interruption):
    original = getattr(owner, name)
    left = iter(range(calls))

    def interrupted(*arguments, **settings):
        if next(left, None) is None:
            raise error
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_first_build_leaves_nothing_that_counts_and_the_next_one_works(
    build, output, tmp_path, monkeypatch, stage
):
    build(output=tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        interrupt(patch, *MIDDLES[stage])
        with pytest.raises(Interruption):
            build()
    finished = STAGES[: STAGES.index(stage)]
    assert sorted(path.name for path in output.iterdir()) == sorted([".lock", *finished])
    with pytest.raises(CorpusError, match=rf"is not whole \(.*{stage}.* missing or damaged\); build it with"):
        open_corpus(output)
    assert build().count("up to date") == len(finished)
    assert hashes(output) == hashes(tmp_path / "undisturbed")


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_rebuild_leaves_the_earlier_stage_untouched(
    build, output, text_folder, monkeypatch, words, stage
):
    build()
    before = identities(output / stage)
    (text_folder / "part1" / "01.txt").write_text(words(1000, 50))
    with monkeypatch.context() as patch:
        interrupt(patch, *MIDDLES[stage])
        with pytest.raises(Interruption):
            build()
    assert identities(output / stage) == before
    assert not hidden(output)
    build()
    open_corpus(output)


@pytest.mark.parametrize("calls", range(6))
def test_an_interruption_while_stages_change_places_leaves_no_half_of_one(
    build, output, text_folder, tmp_path, monkeypatch, words, calls
):
    build()
    (text_folder / "part1" / "01.txt").write_text(words(1000, 50))
    with monkeypatch.context() as patch:
        interrupt(patch, stage_module.os, "replace", calls)  # two for each of the three stages
        with pytest.raises(Interruption):
            build()
    for stage in STAGES:
        assert not (output / stage).exists() or read_stage(output / stage) is not None
    build()
    build(output=tmp_path / "undisturbed")
    assert hashes(output) == hashes(tmp_path / "undisturbed")


def test_what_a_killed_build_left_behind_is_cleared_away(build, output):
    leftover = output / ".building-shards-abc"
    leftover.mkdir(parents=True)
    (leftover / "00000.ds").write_bytes(b"half")
    build()
    assert not leftover.exists()


def test_shards_of_another_tokenizer_are_not_opened(build, output, monkeypatch):
    build()
    with monkeypatch.context() as patch:
        interrupt(patch, *MIDDLES["shards"])
        with pytest.raises(Interruption):
            build(vocab_size=300)
    with pytest.raises(
        CorpusError, match=r"were made with another tokenizer .*; build it with `tilewright corpus build"
    ):
        open_corpus(output)


def test_a_full_disk_is_one_clear_sentence(build, output, monkeypatch):
    interrupt(monkeypatch, ShardWriter, "write", 3, error=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(
        CorpusError, match=r"^No space left for the corpus in .*built; free some, or give another output"
    ):
        build()
    assert sorted(path.name for path in output.iterdir()) == [".lock", "documents", "tokenizer"]


def test_a_second_build_in_the_same_folder_at_the_same_time_is_refused(build, output):
    build()
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match=r"Another build is at work in .*; wait until it is done"):
            build()
    build()


def test_a_folder_of_someone_elses_is_not_replaced(build, output):
    (output / "documents").mkdir(parents=True)
    (output / "documents" / "thesis.tex").write_text("dear")
    with pytest.raises(CorpusError, match=r"documents exists and was not made by a corpus build .* or move it away"):
        build()
    assert (output / "documents" / "thesis.tex").read_text() == "dear"


def test_an_output_that_cannot_be_a_folder_is_refused(build, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorpusError, match=r"Cannot build in .*file.*; mend that, or give another output folder"):
        build(output=tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "vocabulary size is 256; give at least 257"),
        ({"held_out_fraction": 0.0}, "held-out fraction is 0.0; give one between 0 and 1"),
        ({"held_out_fraction": 1.0}, "held-out fraction is 1.0; give one between 0 and 1"),
        ({"suffixes": [".rst"]}, "no document .* with --suffix"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(build, output, settings, message):
    with pytest.raises(CorpusError, match=message):
        build(**settings)
    assert not output.exists()


def test_a_source_too_small_to_hold_anything_out_is_refused(build, output, tmp_path):
    source = tmp_path / "one.jsonl"
    source.write_text('{"text": "the only document there is"}\n')
    with pytest.raises(
        CorpusError, match=r"No document is left to train on: of 1, 1 are held out .*; give a source with"
    ):
        build(source=source)
    assert not (output / "documents").exists()


def test_a_missing_tokenizer_file_makes_the_corpus_not_whole(build, output):
    build()
    (output / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CorpusError, match=r"is not whole \(tokenizer missing or damaged\)"):
        open_corpus(output)


def test_the_parts_of_a_corpus_can_be_opened_alone(build, output):
    build()
    tokenizer = Tokenizer.load(output / "tokenizer" / "tokenizer.json")
    assert Split(output / "shards" / "train").tokenizer_fingerprint == tokenizer.fingerprint


def test_a_corpus_can_be_built_with_the_tokenizer_of_another(build, output, text_folder, tmp_path, words):
    build()
    tokenizer = output / "tokenizer" / "tokenizer.json"
    for number in range(20):
        (tmp_path / "new" / f"{number}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "new" / f"{number}.txt").write_text(words(500 + number, 80), encoding="utf-8")
    other = tmp_path / "other"
    build(source=tmp_path / "new", output=other, tokenizer=tokenizer)
    assert open_corpus(other).tokenizer.fingerprint == open_corpus(output).tokenizer.fingerprint
    again = build(source=tmp_path / "new", output=other, tokenizer=tokenizer)
    assert again.count("up to date") == 3
    assert "tokenizer:" in build(source=tmp_path / "new", output=other), "trained anew, for none was given"
    assert open_corpus(other).tokenizer.fingerprint != open_corpus(output).tokenizer.fingerprint


def test_a_given_tokenizer_that_is_missing_is_refused_before_anything_is_built(build, output, tmp_path):
    with pytest.raises(CorpusError, match=r"Cannot read the tokenizer .*none\.json"):
        build(tokenizer=tmp_path / "none.json")
    assert not output.exists()
