"""Small texts, shards written by hand, and one way to build."""

import io
import random
import struct
from pathlib import Path

import pytest
from rich.console import Console

from tilewright.corpus import build_corpus

SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "po", "ra", "sè", "tü", "wo", "語", "🙂")


def draw_words(seed: int, count: int) -> str:
    """`count` random words, ten on a line; two seeds never share 8 in a row."""
    draw = random.Random(seed)
    drawn = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(count)]
    return "\n".join(" ".join(drawn[start : start + 10]) for start in range(0, count, 10)) + "\n"


@pytest.fixture
def words():
    return draw_words


@pytest.fixture
def text_folder(tmp_path):
    """40 documents of 60 to 99 words with non-ASCII letters, in nested folders."""
    folder = tmp_path / "texts"
    for number in range(40):
        path = folder / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(draw_words(number, 60 + number), encoding="utf-8")
    return folder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "built"


@pytest.fixture
def build(text_folder, output):
    """Build with a small vocabulary; returns what was logged."""

    def run(source=text_folder, output=output, **settings):
        log = io.StringIO()
        settings = {"vocab_size": 400, "held_out_fraction": 0.1, **settings}
        build_corpus(source, output, console=Console(file=log), **settings)
        return log.getvalue()

    return run


@pytest.fixture
def write_shards(tmp_path):
    """Write shards with nothing but `struct`: one list of documents (lists of token ids) for each shard."""

    def write(shards, *, token_format="H", metadata=True, folder=tmp_path / "shards") -> Path:
        folder.mkdir(exist_ok=True)
        for number, documents in enumerate(shards):
            tokens = [token for document in documents for token in document]
            ends = [sum(map(len, documents[: place + 1])) for place in range(len(documents))]
            path = folder / f"{number:05d}.ds"
            path.write_bytes(struct.pack(f"<{len(tokens)}{token_format}", *tokens))
            path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
            if metadata:
                size = struct.calcsize(token_format)
                text = f"by hand|{size}\n{len(tokens)}\n{len(tokens)} T"
                path.with_name(path.name + ".metadata").write_text(text)
        return folder

    return write
