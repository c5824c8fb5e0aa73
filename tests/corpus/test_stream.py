"""Windows, targets and segments; every epoch and every token once."""

import itertools

import numpy as np
import pytest

from tilewright.corpus import IGNORE, CorpusError, HeldOutStream, Split, Tokenizer, TrainStream, train_tokenizer

END = 99
# Documents of 3, 1, 5, 2 and 4 tokens and their end-of-text; tokens count up, so that each says where it stands.
CLOSED = [[1, 2, 3, END], [4, END], [5, 6, 7, 8, 9, END], [10, 11, END], [12, 13, 14, 15, END]]
STREAM = [token for document in CLOSED for token in document]


@pytest.fixture
def closed(write_shards):
    """20 tokens in two shards whose documents all end with end-of-text."""
    return Split(write_shards([CLOSED[:2], CLOSED[2:]]), end_of_text=END)


def segments_of(batch, row):
    """The segments of a row as lists of (input, target) pairs."""
    length = batch.inputs.shape[1]
    starts = [int(start) - row * length for start in batch.cu_seqlens]
    inside = [start for start in starts if 0 <= start <= length]
    pairs = list(zip(batch.inputs[row].tolist(), batch.targets[row].tolist(), strict=True))
    return [pairs[start:end] for start, end in itertools.pairwise(inside)]


def unshuffled(split, length):
    """All windows of a TrainStream's first epoch, in the order of the stream."""
    stream = TrainStream(split, sequence_length=length, seed=0)
    batch = stream.batch(range(stream.samples_per_epoch))
    rows = [(batch.inputs[row], segments_of(batch, row)) for row in range(len(batch.inputs))]
    return [segments for _, segments in sorted(rows, key=lambda row: STREAM.index(next(t for t in row[0] if t != END)))]


def test_an_end_of_text_token_opens_the_next_document(closed):
    (segments,) = unshuffled(closed, 19)
    assert segments == [
        [(1, 2), (2, 3), (3, END)],
        [(END, 4), (4, END)],
        [(END, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, END)],
        [(END, 10), (10, 11), (11, END)],
        [(END, 12), (12, 13), (13, 14), (14, 15), (15, END)],
    ]


def test_windows_share_one_token_and_start_a_segment_each(closed):
    assert unshuffled(closed, 6) == [
        [[(1, 2), (2, 3), (3, END)], [(END, 4), (4, END)], [(END, 5)]],
        [[(5, 6), (6, 7), (7, 8), (8, 9), (9, END)], [(END, 10)]],
        [[(10, 11), (11, END)], [(END, 12), (12, 13), (13, 14), (14, 15)]],
    ]


def test_nothing_is_ignored_in_training_and_every_token_but_the_first_is_a_target_once(closed):
    stream = TrainStream(closed, sequence_length=1, seed=3)
    targets = stream.batch(range(stream.samples_per_epoch)).targets
    assert sorted(targets.ravel()) == sorted(STREAM[1:])


def test_where_documents_do_not_end_with_end_of_text_the_crossing_target_is_ignored(write_shards):
    open_ended = [document[:-1] for document in CLOSED]
    split = Split(write_shards([open_ended[:3], open_ended[3:]]), end_of_text=END)
    stream = TrainStream(split, sequence_length=14, seed=0)
    assert segments_of(stream.batch([0]), 0) == [
        [(1, 2), (2, 3), (3, IGNORE)],
        [(4, IGNORE)],
        [(5, 6), (6, 7), (7, 8), (8, 9), (9, IGNORE)],
        [(10, 11), (11, IGNORE)],
        [(12, 13), (13, 14), (14, 15)],
    ]


def test_a_document_that_ends_with_the_window_keeps_its_last_target_from_crossing(write_shards):
    split = Split(write_shards([[[1, 2, 3], [4, 5]]]), end_of_text=END)
    batch = TrainStream(split, sequence_length=3, seed=0).batch([0])
    assert batch.targets.tolist() == [[2, 3, IGNORE]]
    assert batch.cu_seqlens.tolist() == [0, 3]


def test_without_a_known_end_of_text_documents_are_separated_where_the_index_says(write_shards):
    split = Split(write_shards([CLOSED]))
    (segments,) = [segments_of(TrainStream(split, sequence_length=19, seed=0).batch([0]), 0)]
    assert segments[0] == [(1, 2), (2, 3), (3, END), (END, IGNORE)]
    assert segments[1] == [(4, END), (END, IGNORE)]


def test_documents_that_end_both_ways_live_side_by_side(write_shards):
    split = Split(write_shards([[[1, 2], [END], [3, END], [4, 5]]]), end_of_text=END)
    batch = TrainStream(split, sequence_length=6, seed=0).batch([0])
    assert segments_of(batch, 0) == [[(1, 2), (2, IGNORE)], [(END, 3), (3, END)], [(END, 4), (4, 5)]]


def test_batches_have_the_promised_shapes_and_dtypes(closed):
    batch = TrainStream(closed, sequence_length=4, seed=0).batch([3, 0, 7])
    assert batch.inputs.shape == batch.targets.shape == (3, 4)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.cu_seqlens.dtype == np.int32
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, 12)
    assert (np.diff(batch.cu_seqlens) > 0).all()
    assert {0, 4, 8} <= set(batch.cu_seqlens.tolist())


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_every_epoch_uses_every_window_once_in_an_order_of_its_own(write_shards, length):
    split = Split(write_shards([[[*range(1, 500)], [*range(500, 1001)]]]), end_of_text=0)
    stream = TrainStream(split, sequence_length=length, seed=1)
    size = stream.samples_per_epoch
    assert size == 999 // length
    orders = [stream.batch(range(epoch * size, (epoch + 1) * size)).inputs[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(order) == [1 + window * length for window in range(size)] for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert TrainStream(split, sequence_length=length, seed=2).batch(range(size)).inputs[:, 0].tolist() != orders[0]


def test_a_sample_does_not_depend_on_what_was_asked_before_or_with_it(closed, write_shards):
    together = TrainStream(closed, sequence_length=4, seed=7).batch(range(40))
    again = TrainStream(Split(closed.folder, end_of_text=END), sequence_length=4, seed=7)
    for sample in (39, 0, 17, 17):
        alone = again.batch([sample])
        assert alone.inputs[0].tolist() == together.inputs[sample].tolist()
        assert alone.targets[0].tolist() == together.targets[sample].tolist()
        assert segments_of(alone, 0) == segments_of(together, sample)


def test_a_sample_before_the_first_is_refused(closed):
    with pytest.raises(IndexError, match="sample index is -1"):
        TrainStream(closed, sequence_length=4, seed=0).batch([-1])


def test_a_sequence_longer_than_the_shards_allow_is_refused(closed):
    assert TrainStream(closed, sequence_length=19, seed=0).samples_per_epoch == 1
    with pytest.raises(CorpusError, match=r"length of 20 is longer than the shards allow: .* 20 tokens .* at most 19"):
        TrainStream(closed, sequence_length=20, seed=0)


@pytest.mark.parametrize(
    "stream",
    [
        lambda split: TrainStream(split, sequence_length=0, seed=0),
        lambda split: HeldOutStream(split, sequence_length=0),
    ],
)
def test_a_sequence_of_nothing_is_refused(closed, stream):
    with pytest.raises(CorpusError, match="sequence length is 0; give at least 1"):
        stream(closed)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 19, 20, 21, 50])
def test_held_out_windows_make_every_token_a_target_exactly_once_in_order(closed, length):
    stream = HeldOutStream(closed, sequence_length=length)
    assert len(stream) == -(-20 // length)
    batch = stream.batch(range(len(stream)))
    targets = batch.targets.ravel()
    assert targets[:20].tolist() == STREAM
    assert (targets[20:] == IGNORE).all()
    assert batch.inputs.ravel()[:20].tolist() == [END, *STREAM[:-1]]
    assert (batch.inputs.ravel()[20:] == END).all()


def test_held_out_documents_are_segments_each_opened_by_end_of_text(closed):
    batch = HeldOutStream(closed, sequence_length=22).batch([0])
    assert segments_of(batch, 0) == [
        [(END, 1), (1, 2), (2, 3), (3, END)],
        [(END, 4), (4, END)],
        [(END, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, END)],
        [(END, 10), (10, 11), (11, END)],
        [(END, 12), (12, 13), (13, 14), (14, 15), (15, END)],
        [(END, IGNORE), (END, IGNORE)],
    ]


def test_held_out_windows_can_be_asked_for_in_any_order_but_not_beyond(closed):
    stream = HeldOutStream(closed, sequence_length=6)
    every = stream.batch(range(4))
    assert stream.batch([2, 0]).targets.tolist() == [every.targets[2].tolist(), every.targets[0].tolist()]
    for window in (-1, 4):
        with pytest.raises(IndexError, match="there are 4"):
            stream.batch([window])


def test_held_out_bytes_add_up_to_the_text_even_where_characters_are_split_over_tokens(write_shards):
    texts = ["naïve café\n", "日本語🙂 mixed with ASCII", "<|endoftext|>", "ÅÄÖ" * 9]
    tokenizer = Tokenizer(train_tokenizer(["plain ASCII only"], vocab_size=260))
    folder = write_shards([[[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]])
    stream = HeldOutStream(Split(folder, end_of_text=tokenizer.end_of_text), sequence_length=5)
    targets = stream.batch(range(len(stream))).targets
    byte_count = tokenizer.byte_lengths[targets[targets != IGNORE]].sum()
    assert byte_count == sum(len(text.encode()) for text in texts)


def test_held_out_shards_that_do_not_say_what_ends_a_text_are_refused(write_shards):
    with pytest.raises(CorpusError, match=r"Nothing says which token ends a text .* Split\(folder, end_of_text=ID\)"):
        HeldOutStream(Split(write_shards([CLOSED])), sequence_length=4)
