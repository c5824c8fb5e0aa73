"""Ten trillion tokens open and are read in the memory and the time of a small corpus."""

import pytest

from tilewright.cli.clone import load_benchmarks

load_benchmarks()

from tilewright.benchmarks import corpus_scale  # noqa: E402


@pytest.mark.parametrize("shards", [200, pytest.param(20_000, marks=pytest.mark.soak)])
def test_a_simulated_corpus_opens_and_is_read_within_300_mb_and_a_few_open_files(tmp_path, shards):
    corpus_scale.write_simulated_shards(tmp_path / "shards", shards)
    figures = corpus_scale.measure(tmp_path / "shards")
    print(f"\n{shards} shards: {figures}")
    assert figures["tokens"] == shards * 500_000_000
    assert figures["read_bytes"] < corpus_scale.MOST_BYTES
    assert figures["read_bytes"] - figures["imported_bytes"] < 30e6
    assert figures["open_files"] <= 2 * 32 + 10
