"""The tokenizer loses nothing, knows its bytes, and refuses what it cannot be."""

import json

import pytest

from tilewright.corpus import CorpusError, Tokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "Der Bär läuft über die Brücke. " * 20, "日本語のテキスト。" * 5]


@pytest.fixture(scope="module")
def serialised():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def tokenizer(serialised):
    return Tokenizer(serialised)


HARD_TEXTS = [
    "",
    " leading and trailing ",
    "\r\n\t tabs\x00and\x1fcontrols",
    "never seen: Ω ж ع 한 🙂🏽‍🚀 e\u0301 \ufeff \u2028",
    "it says <|endoftext|> in the text",
    *TEXTS,
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_decoding_gives_back_the_text_and_the_byte_lengths_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text not in ids


def test_a_character_split_over_tokens_still_counts_every_byte(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert tokenizer.byte_lengths[ids].sum() == 4


def test_end_of_text_is_id_0_and_stands_for_no_byte(tokenizer):
    assert tokenizer.end_of_text == 0
    assert tokenizer.byte_lengths[0] == 0
    assert tokenizer.decode([0]) == "<|endoftext|>"
    assert (tokenizer.byte_lengths[1:] > 0).all()
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,) == (300,)


def test_merges_shorten_text(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_equal_texts_train_equal_tokenizers_in_whatever_order(serialised):
    assert train_tokenizer(TEXTS, vocab_size=300) == serialised
    assert train_tokenizer(TEXTS[::-1], vocab_size=300) == serialised
    assert train_tokenizer(TEXTS[:2], vocab_size=300) != serialised


def test_many_documents_are_encoded_as_each_alone(tokenizer, monkeypatch):
    monkeypatch.setattr("tilewright.corpus.tokenizer._ENCODING_BATCH_CHARACTERS", 50)
    assert list(tokenizer.encode_documents(HARD_TEXTS)) == [tokenizer.encode(text) for text in HARD_TEXTS]


def test_the_smallest_vocabulary_is_the_bytes_and_end_of_text():
    tokenizer = Tokenizer(train_tokenizer(TEXTS, vocab_size=257))
    assert len(tokenizer.encode("añb")) == 4
    with pytest.raises(CorpusError, match=r"vocabulary of 256 cannot hold .* at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)


def test_loading_gives_the_tokenizer_that_was_saved(tmp_path, serialised, tokenizer):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(serialised)
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [loaded.encode(text) for text in HARD_TEXTS] == [tokenizer.encode(text) for text in HARD_TEXTS]
    path.write_bytes(serialised + b"\n")
    assert Tokenizer.load(path).fingerprint != tokenizer.fingerprint


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"Cannot read the tokenizer .*tokenizer\.json .*tilewright corpus build"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"\xff\x00" + raw, lambda raw: b""])
def test_a_corrupt_tokenizer_is_refused(tmp_path, serialised, damage):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage(serialised))
    with pytest.raises(CorpusError, match=r"tokenizer\.json: it is not a tokenizer\.json .*; build the corpus again"):
        Tokenizer.load(path)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, serialised):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(serialised.replace(b"<|endoftext|>", b"<|other|>"))
    with pytest.raises(CorpusError, match=r"it has no <\|endoftext\|> token; build"):
        Tokenizer.load(path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, serialised):
    content = json.loads(serialised)
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {("語" if token_id == 1 else token): token_id for token, token_id in vocabulary.items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CorpusError, match=r"its token 1, '語', is not written in bytes"):
        Tokenizer.load(path)
