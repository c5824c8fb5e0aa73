"""Which documents a source yields, in which order, and what it drops."""

import json
import os

import pytest

from tilewright.corpus import CorpusError
from tilewright.corpus.sources import list_documents, open_source, read_document


def names(source):
    return [document.name for document in list_documents(source).documents]


def test_a_folder_yields_the_files_of_its_suffixes_by_relative_path_in_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.md", "c.rst", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(open_source(tmp_path)) == ["a.md", "a/z.txt", "b.txt"]
    assert names(open_source(tmp_path, suffixes=[".rst"])) == ["c.rst"]


def test_duplicates_empty_files_and_other_encodings_are_dropped_and_counted(tmp_path):
    contents = {"1.txt": b"same", "2.txt": b"same", "3.txt": b"", "4.txt": b" \n", "5.txt": b"caf\xe9", "6.txt": b"x"}
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
    listing = list_documents(open_source(tmp_path))
    assert [document.name for document in listing.documents] == ["1.txt", "6.txt"]
    assert (listing.duplicates, listing.empty, listing.not_utf8) == (1, 2, 1)
    assert listing.byte_count == 5


def test_a_text_is_read_byte_for_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\u2028é".encode())
    source = open_source(tmp_path)
    (listed,) = list_documents(source).documents
    assert read_document(source, listed).text == "\ufeffone\r\ntwo\u2028é"


def test_the_lines_of_a_jsonl_file_are_documents(tmp_path):
    path = tmp_path / "pages.jsonl"
    texts = ["first\u2028page", "zweite Seite ü", "third"]
    path.write_text("\n\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts))
    source = open_source(path)
    assert [read_document(source, listed).text for listed in list_documents(source).documents] == texts


def test_half_a_surrogate_pair_in_jsonl_counts_as_not_utf8(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text('{"text": "\\ud800"}\n{"text": "fine"}\n')
    listing = list_documents(open_source(path))
    assert (len(listing.documents), listing.not_utf8) == (1, 1)


def test_the_standard_library_comes_without_its_tests_and_without_what_was_installed(tmp_path, monkeypatch):
    wanted = ("argparse.py", "json/decoder.py", "testing.py")
    unwanted = (
        "site-packages/numpy/core.py",
        "dist-packages/x.py",
        "test/test_json.py",
        "unittest/test/x.py",
        "lib2to3/tests/data/x.py",
        "idlelib/idle_test/x.py",
        "__pycache__/x.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "LICENSE.txt",
    )
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert names(open_source("stdlib")) == sorted(wanted)


def test_this_pythons_standard_library_is_megabytes_of_source():
    listing = list_documents(open_source("stdlib"))
    assert {"json/decoder.py", "argparse.py"} <= {document.name for document in listing.documents}
    assert 5_000_000 < listing.byte_count < 30_000_000


def test_a_file_that_changes_between_listing_and_reading_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    source = open_source(tmp_path)
    (listed,) = list_documents(source).documents
    path.write_text("after")
    with pytest.raises(CorpusError, match=r"a\.txt changed .* build it again"):
        read_document(source, listed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 2 is not JSON .* mend or remove that line"),
        ('{"body": "x"}', r'line 2 has no string under "text"; mend or remove that line'),
        ("[1]", r'line 2 has no string under "text"'),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    path = tmp_path / "pages.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(CorpusError, match=message):
        list_documents(open_source(path))


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere does not exist; give stdlib, a folder of text files or a \.jsonl"):
        open_source(tmp_path / "nowhere")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("x")
    with pytest.raises(CorpusError, match=r"book\.txt is a file that does not end in \.jsonl; give"):
        open_source(path)


def test_a_source_without_text_is_refused_with_the_suffixes_looked_for(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.py").write_text("x = 1")
    with pytest.raises(CorpusError, match=r"ending in \.txt, \.md .* no document \(1 empty, 0 not UTF-8\).* --suffix"):
        list_documents(open_source(tmp_path))


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
            file.write("x")
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(CorpusError, match="is not UTF-8; rename that file"):
        list_documents(open_source(tmp_path))
