"""The command line of the corpus: what it builds, shows and explains."""

import argparse

import pytest

from tilewright.cli.corpus import add_parser
from tilewright.corpus import CorpusError, open_corpus


@pytest.fixture
def tilewright():
    def run(*words):
        parser = argparse.ArgumentParser(prog="tilewright")
        add_parser(parser.add_subparsers())
        arguments = parser.parse_args([str(word) for word in words])
        return arguments.run(arguments)

    return run


def test_a_corpus_is_built_and_shown(tilewright, text_folder, tmp_path, capsys):
    output = tmp_path / "built"
    options = ("--vocab-size", 300, "--heldout-fraction", 0.2, "--seed", 4)
    assert tilewright("corpus", "build", "--source", text_folder, "--output", output, *options) == 0
    logged = capsys.readouterr().out
    assert "40 documents" in logged
    assert "vocabulary 300" in logged
    assert tilewright("corpus", "show", output) == 0
    shown = capsys.readouterr().out
    corpus = open_corpus(output)
    assert f"{corpus.train.token_count:,}" in shown
    assert f"{corpus.heldout.token_count:,}" in shown
    assert "vocabulary 300" in shown


def test_several_suffixes_can_be_given(tilewright, tmp_path, words):
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.{('rst', 'tex', 'txt')[number % 3]}").write_text(words(number, 50))
    options = ("--suffix", ".rst", "--suffix", ".tex", "--vocab-size", 300, "--output", tmp_path / "built")
    tilewright("corpus", "build", "--source", source, *options)
    corpus = open_corpus(tmp_path / "built")
    assert corpus.train.document_count + corpus.heldout.document_count == 14


def test_help_names_the_defaults_and_gives_an_example(tilewright, capsys):
    with pytest.raises(SystemExit):
        tilewright("corpus", "build", "--help")
    text = capsys.readouterr().out
    assert "tilewright corpus build --output" in text
    for default in ("stdlib", "8192", "0.03", ".txt and .md"):
        assert default in text


def test_showing_what_was_not_built_says_how_to_build_it(tilewright, tmp_path):
    with pytest.raises(CorpusError, match=r"documents, tokenizer, shards missing or damaged.*tilewright corpus build"):
        tilewright("corpus", "show", tmp_path)
