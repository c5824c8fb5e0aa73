"""Shards are datatrove's layout, bytes and all; a split reads them as one stream and refuses damage."""

import json
import struct

import numpy as np
import pytest

from tilewright.corpus import CorpusError, ShardWriter, Split, write_split_manifest
from tilewright.corpus.shards import readable_count

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0], [14, 0]]
STREAM = [token for document in DOCUMENTS for token in document]


def write(folder, documents, *, vocab_size=20, tokens_per_shard=1000):
    folder.mkdir()
    with ShardWriter(
        folder, tokenizer_name="some name", vocab_size=vocab_size, tokens_per_shard=tokens_per_shard
    ) as writer:
        for document in documents:
            writer.write(document)
    return writer.shards


def write_manifest(folder, shards):
    write_split_manifest(
        folder, shards, byte_count=77, end_of_text=0, vocab_size=20, tokenizer_fingerprint="fingerprint"
    )


@pytest.mark.parametrize(("vocab_size", "token_format", "size"), [(65_536, "H", 2), (65_537, "I", 4)])
def test_a_shard_can_be_decoded_by_hand(tmp_path, vocab_size, token_format, size):
    folder = tmp_path / "split"
    write(folder, [[65_535, 258, 0], [1, 0]], vocab_size=vocab_size)
    assert (folder / "00000.ds").read_bytes() == struct.pack(f"<5{token_format}", 65_535, 258, 0, 1, 0)
    assert (folder / "00000.ds.index").read_bytes() == struct.pack("<2Q", 3, 5)
    assert (folder / "00000.ds.metadata").read_text() == f"some name|{size}\n5\n5.00 T"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.00 T"),
        (7, "7.00 T"),
        (999, "999 T"),
        (1000, "1.00 kT"),
        (45_678, "45.7 kT"),
        (3_400_000, "3.40 MT"),
        (10**13, "10.0 TT"),
    ],
)
def test_counts_are_readable(count, text):
    assert readable_count(count, "T") == text


def test_a_full_shard_is_followed_by_another_and_no_document_spans_two(tmp_path):
    folder = tmp_path / "split"
    shards = write(folder, DOCUMENTS, tokens_per_shard=5)
    assert [(shard.name, shard.token_count, shard.document_count) for shard in shards] == [
        ("00000.ds", 6, 2),
        ("00001.ds", 6, 1),
        ("00002.ds", 2, 1),
    ]
    split = Split(folder)
    assert (split.token_count, split.document_count) == (14, 4)
    assert split.read(0, 14).tolist() == STREAM


@pytest.mark.parametrize("token_format", ["H", "I"])
@pytest.mark.parametrize("metadata", [True, False])
def test_every_stretch_of_hand_written_shards_is_read(write_shards, token_format, metadata):
    split = Split(
        write_shards([DOCUMENTS[:1], [], DOCUMENTS[1:2], DOCUMENTS[2:]], token_format=token_format, metadata=metadata)
    )
    ends = [4, 6, 12, 14]
    assert split.read(0, 1).dtype.itemsize == struct.calcsize(token_format)
    for start in range(len(STREAM) + 1):
        for length in range(len(STREAM) - start + 1):
            assert split.read(start, length).tolist() == STREAM[start : start + length]
            inside = [end for end in ends if start < end <= start + length]
            assert split.document_boundaries(start, length).tolist() == inside


def test_more_shards_than_stay_open_are_read_right(write_shards, monkeypatch):
    monkeypatch.setattr("tilewright.corpus.shards._OPEN_SHARDS", 2)
    split = Split(write_shards([[[number, 0]] for number in range(1, 9)]))
    for _ in range(2):
        assert split.read(0, 16).tolist() == [token for number in range(1, 9) for token in (number, 0)]
        assert split.document_boundaries(0, 16).tolist() == list(range(2, 17, 2))


def test_empty_documents_make_one_boundary(write_shards):
    split = Split(write_shards([[[], [1, 2], [], [], [3]]]))
    assert split.document_count == 5
    assert split.document_boundaries(0, 3).tolist() == [2, 3]


def test_what_was_read_can_be_changed_without_changing_the_shard(write_shards):
    split = Split(write_shards([DOCUMENTS]))
    split.read(0, 4)[:] = 1
    assert split.read(0, 4).tolist() == DOCUMENTS[0]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (13, 2), (0, 15)])
def test_a_stretch_outside_the_stream_is_refused(write_shards, start, length):
    split = Split(write_shards([DOCUMENTS]))
    with pytest.raises(IndexError, match="holds 14"):
        split.read(start, length)
    with pytest.raises(IndexError, match="holds 14"):
        split.document_boundaries(start, length)


def test_the_manifest_says_what_the_shards_cannot(tmp_path):
    folder = tmp_path / "split"
    write_manifest(folder, write(folder, DOCUMENTS))
    split = Split(folder)
    assert (split.end_of_text, split.vocab_size, split.byte_count) == (0, 20, 77)
    assert split.tokenizer_fingerprint == "fingerprint"
    assert Split(folder, end_of_text=9).end_of_text == 9
    recorded = json.loads((folder / "manifest.json").read_text())
    assert (recorded["token_count"], recorded["document_count"]) == (14, 4)


def test_shards_from_elsewhere_need_no_manifest(write_shards):
    split = Split(write_shards([DOCUMENTS]))
    assert (split.end_of_text, split.byte_count, split.tokenizer_fingerprint) == (None, None, None)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"Cannot open the shards in .*nowhere .* build them with `tilewright corpus"):
        Split(tmp_path / "nowhere")


def test_a_folder_without_tokens_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"holds no tokens in \.ds shards; name the folder that does"):
        Split(tmp_path)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (1, r"00001\.ds has 15 bytes, not a multiple of the 2 of a token; .* build it again"),
        (2, r"00001\.ds holds 7 tokens but its index ends at 8; .* build both again"),
    ],
)
def test_a_truncated_shard_is_refused(write_shards, cut, message):
    folder = write_shards([DOCUMENTS[:2], DOCUMENTS[2:]])
    path = folder / "00001.ds"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorpusError, match=message):
        Split(folder)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (3, r"00000\.ds\.index has 29 bytes, not a multiple of 8"),
        (8, r"00000\.ds holds 14 tokens but its index ends at 12"),
        (32, r"00000\.ds holds 14 tokens but its index ends at 0"),
    ],
)
def test_a_truncated_index_is_refused(write_shards, cut, message):
    folder = write_shards([DOCUMENTS])
    path = folder / "00000.ds.index"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorpusError, match=message):
        Split(folder)


def test_a_missing_index_is_refused(write_shards):
    folder = write_shards([DOCUMENTS, DOCUMENTS])
    (folder / "00001.ds.index").unlink()
    with pytest.raises(CorpusError, match=r"00001\.ds has no \.index beside it \(1 such shards\); copy the indexes"):
        Split(folder)


def test_metadata_with_an_impossible_token_size_is_refused(write_shards):
    folder = write_shards([DOCUMENTS])
    (folder / "00000.ds.metadata").write_text("name|3\n14\n14 T")
    with pytest.raises(CorpusError, match=r"would be of '3' bytes .* not of 2 or 4; .* build the shard again"):
        Split(folder)


def test_a_shard_that_went_missing_is_noticed_by_the_manifest(tmp_path):
    folder = tmp_path / "split"
    write_manifest(folder, write(folder, DOCUMENTS, tokens_per_shard=5))
    (folder / "00001.ds").unlink()
    with pytest.raises(CorpusError, match=r"does not list what lies there: 00001\.ds differ .* build the shards again"):
        Split(folder)


def test_a_corrupt_manifest_is_refused(tmp_path):
    folder = tmp_path / "split"
    write(folder, DOCUMENTS)
    (folder / "manifest.json").write_text('{"cut')
    with pytest.raises(CorpusError, match=r"Cannot read .*manifest\.json .* build the shards again"):
        Split(folder)


def test_a_shard_that_vanishes_after_opening_is_named(write_shards):
    folder = write_shards([DOCUMENTS])
    split = Split(folder)
    (folder / "00000.ds").unlink()
    with pytest.raises(CorpusError, match=r"Cannot read the shard .*00000\.ds .* build it again"):
        split.read(0, 1)


def test_a_writer_that_fails_does_not_finish_its_shard(tmp_path):
    folder = tmp_path / "split"
    with pytest.raises(OverflowError):
        write(folder, [[1, 0], [65_536]])
    assert not (folder / "00000.ds.metadata").exists()


def test_boundaries_are_searched_without_copying_the_index(write_shards, monkeypatch):
    split = Split(write_shards([DOCUMENTS]))
    keys = []
    search = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda a, v, side: keys.append((a, np.asarray(v))) or search(a, v, side))
    split.document_boundaries(0, 14)
    in_index = [(a, v) for a, v in keys if a.dtype == np.uint64]
    assert in_index
    assert all(v.dtype == a.dtype for a, v in in_index)
