"""Which documents are held out, and how overlap with them is measured."""

import pytest

from tilewright.corpus.heldout import choose_held_out, held_out_shingles, overlap, shingles
from tilewright.corpus.sources import ListedDocument


def listed(sizes):
    return [ListedDocument(f"{number}.txt", "", size) for number, size in enumerate(sizes)]


def test_held_out_documents_reach_the_fraction_and_hardly_pass_it():
    documents = listed([100] * 500)
    held_out = choose_held_out(documents, 0.1)
    assert len(held_out) == 50
    assert choose_held_out(documents[::-1], 0.1) == held_out


def test_more_is_held_out_by_adding_to_what_was():
    documents = listed([100] * 500)
    assert choose_held_out(documents, 0.05) < choose_held_out(documents, 0.1)


def test_no_single_document_is_most_of_what_is_held_out():
    documents = listed([100] * 500 + [20_000])
    for fraction in (0.05, 0.1, 0.2):
        assert "500.txt" not in choose_held_out(documents, fraction)


def test_large_documents_are_held_out_where_most_text_is_in_them():
    assert len(choose_held_out(listed([10_000] * 4 + [1] * 4), 0.1)) >= 1


def test_shingles_are_runs_of_8_words_whatever_stands_between():
    numbers = [str(number) for number in range(12)]
    assert len(shingles(" ".join(numbers))) == 5
    assert shingles(" ".join(numbers)) == shingles(" -- ".join(numbers))
    assert len(shingles("word " * 100)) == 1


def test_a_text_under_8_words_is_one_shingle_and_one_without_words_has_none():
    assert len(shingles("only three words")) == 1
    assert shingles("only three words") != shingles("three words")
    assert shingles("+ - ()") == frozenset()


def test_overlap_is_the_part_of_distinct_shingles_that_is_held_out():
    own = [f"own{number}" for number in range(20)]
    held_out = held_out_shingles([" ".join(own[:11]), "something else entirely " * 5])
    # 13 shingles, of which the 4 within the first 11 words are held out.
    assert overlap(" ".join(own), held_out) == pytest.approx(4 / 13)
    assert overlap("nothing of it " * 10, held_out) == 0.0
    assert overlap("()", held_out) == 0.0
