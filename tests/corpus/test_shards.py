"""Shards are datatrove's layout, bytes and all; a split reads them as one stream and refuses damage."""

import itertools
import json
import os
import struct
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    monkeypatch.setattr("tilewright.corpus.split.OPEN_SHARDS", 2)
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
    ("file", "cut", "message"),
    [
        ("00001.ds", 1, r"00001\.ds has 15 bytes, not a multiple of the 2 of a token; .* build it again"),
        ("00001.ds.index", 3, r"00001\.ds\.index has 13 bytes, not a multiple of 8 above 0"),
        ("00001.ds.index", 16, r"00001\.ds\.index has 0 bytes, not a multiple of 8 above 0"),
    ],
)
def test_a_file_of_an_impossible_size_is_refused_at_once(write_shards, file, cut, message):
    path = write_shards([DOCUMENTS[:2], DOCUMENTS[2:]]) / file
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorpusError, match=message):
        Split(path.parent)


@pytest.mark.parametrize(
    ("file", "cut", "message"),
    [
        ("00001.ds", 2, r"00001\.ds holds 7 tokens but its index ends at 8; .* build both again"),
        ("00001.ds.index", 8, r"00001\.ds holds 8 tokens but its index ends at 6"),
    ],
)
def test_a_shard_and_an_index_that_disagree_are_refused_when_they_are_first_used(write_shards, file, cut, message):
    path = write_shards([DOCUMENTS[:2], DOCUMENTS[2:]]) / file
    path.write_bytes(path.read_bytes()[:-cut])
    split = Split(path.parent)
    split.document_boundaries(0, 6)
    with pytest.raises(CorpusError, match=message):
        split.document_boundaries(6, 1)


def test_a_shard_cut_short_while_it_is_read_is_named(write_shards):
    folder = write_shards([DOCUMENTS])
    split = Split(folder)
    split.read(0, 1)
    (folder / "00000.ds").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"00000\.ds was cut short since it was opened"):
        split.read(0, 1)


def test_documents_are_known_by_their_shard_and_their_number_in_it(write_shards):
    split = Split(write_shards([DOCUMENTS[:2], DOCUMENTS[2:]]))
    assert split.documents(4, 2) == [("00000.ds", 1)]
    assert split.documents(5, 3) == [("00000.ds", 1), ("00001.ds", 0)]
    assert split.documents(0, 14) == [("00000.ds", 0), ("00000.ds", 1), ("00001.ds", 0), ("00001.ds", 1)]


def test_metadata_that_names_the_tokenizer_alone_leaves_the_token_size_to_the_index(write_shards):
    folder = write_shards([DOCUMENTS], token_format="I")
    (folder / "00000.ds.metadata").write_text("gpt2\n14\n14.0 T")
    assert Split(folder).read(0, 14).tolist() == STREAM


class Opened:
    """Every file that is opened, and how many are open at once."""

    def __init__(self, monkeypatch):
        self.names = []
        opened = Path.open

        def recorded(path, *arguments, **options):
            self.names.append(path.name)
            return opened(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", recorded)

    @staticmethod
    def now(folder):
        """Of the files of a folder that this process has a descriptor of."""
        links = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if exists(number)]
        return [link for link in links if link.startswith(str(folder))]


def exists(descriptor):
    return os.path.islink(f"/proc/self/fd/{descriptor}")


def test_no_file_of_a_shard_is_opened_before_it_is_needed(write_shards, monkeypatch):
    folder = write_shards([[[number, 0]] for number in range(1, 51)])
    opened = Opened(monkeypatch)
    split = Split(folder)
    assert (split.token_count, split.document_count) == (100, 50)
    assert [name for name in opened.names if not name.endswith((".metadata", ".json"))] == []
    assert opened.names.count("00000.ds.metadata") == 1
    opened.names.clear()
    assert split.read(60, 2).tolist() == [31, 0]
    assert opened.names == ["00030.ds"]
    split.document_boundaries(60, 2)
    split.read(60, 2)
    assert opened.names == ["00030.ds", "00030.ds.index"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's list of open files")
def test_the_files_open_at_once_are_bounded_however_many_shards_are_read(write_shards, monkeypatch):
    monkeypatch.setattr("tilewright.corpus.split.OPEN_SHARDS", 4)
    split = Split(write_shards([[[number, 0]] for number in range(1, 51)]))
    for start in range(0, 100, 2):
        split.read(start, 2)
        split.document_boundaries(start, 2)
    assert len(Opened.now(split.folder)) == 8


def test_threads_share_a_split(write_shards, monkeypatch):
    """Four threads read through a split that keeps fewer shards open than they use at once."""
    monkeypatch.setattr("tilewright.corpus.split.OPEN_SHARDS", 1)
    split = Split(write_shards([[[number, 0]] for number in range(1, 9)]))

    def read(start):
        return split.read(start, 4).tolist(), split.document_boundaries(start, 4).tolist()

    starts = [start for _ in range(50) for start in range(0, 13, 2)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(read, starts))
    assert together == [read(start) for start in starts]


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


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory):
    """40,000 documents of 0, 1 and 5 tokens in one shard, and where they end."""
    lengths = [0, 1, 5, 1] * 10_000
    ends = list(itertools.accumulate(lengths))
    path = tmp_path_factory.mktemp("many") / "00000.ds"
    path.write_bytes(bytes(2 * ends[-1]))
    path.with_name("00000.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    path.with_name("00000.ds.metadata").write_text("by hand|2")
    return path.parent, ends


def test_boundaries_in_a_long_index_are_found_wherever_they_fall_in_its_blocks(many_documents):
    folder, ends = many_documents
    split, total, distinct = Split(folder), ends[-1], sorted(set(ends) - {0})
    stretches = [(ends[number * 512 + shift], 9) for number in range(1, 70) for shift in (-2, -1, 0, 1)]
    for start, length in [*stretches, (0, total), (0, 1), (total - 1, 1), (total // 2, 9000)]:
        inside = distinct[bisect_right(distinct, start) : bisect_right(distinct, start + length)]
        assert split.document_boundaries(start, length).tolist() == inside
        first = bisect_right(ends, start)
        assert split.documents(start, 1) == [("00000.ds", first)]


def test_a_boundary_is_found_by_reading_a_few_entries_of_a_long_index(many_documents, monkeypatch):
    split, preadv, read = Split(many_documents[0]), os.preadv, 0

    def counted(descriptor, buffers, offset):
        nonlocal read
        read += sum(map(len, buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    assert split.document_boundaries(40_001, 4).tolist() == [40_004, 40_005]
    assert read <= 8 * (512 + 8), "of 40,000 entries"
