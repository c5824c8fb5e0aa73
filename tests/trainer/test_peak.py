"""The measured matmul peak and the peak of memory."""

import itertools
import subprocess
import sys

import pytest
import torch

from tilewright.trainer import peak
from tilewright.trainer.peak import measured_matmul_peak, peak_memory_bytes

CPU = torch.device("cpu")


@pytest.fixture
def one_millisecond_each(monkeypatch):
    """A clock by which everything timed takes 1 ms."""
    ticks = itertools.count()
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(ticks) / 1e3)


@pytest.mark.usefixtures("one_millisecond_each")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_two_flops_for_each_product_of_the_best_size(monkeypatch, dtype):
    monkeypatch.setattr(peak, "_CPU_SIZES", (8, 64, 32))
    assert measured_matmul_peak(CPU, dtype) == pytest.approx(2 * 64**3 / 1e-3)


@pytest.mark.usefixtures("one_millisecond_each")
def test_a_size_that_takes_too_long_is_left_out_unless_it_is_the_first(monkeypatch):
    monkeypatch.setattr(peak, "_CPU_SIZES", (8, 64))
    monkeypatch.setattr(peak, "_CPU_SECONDS_PER_SIZE", 0.5e-3)
    assert measured_matmul_peak(CPU, torch.float32) == pytest.approx(2 * 8**3 / 1e-3)


def test_the_rate_of_a_size_is_that_of_its_median_repeat_and_the_best_size_counts():
    seconds = {10: [1.0, 9.0, 2.0], 20: [8.0, 8.0, 0.1], 30: [1000.0]}
    assert peak._best_rate((10, 20, 30), seconds.__getitem__) == max(2 * 10**3 / 2.0, 2 * 20**3 / 8.0)


def test_measuring_leaves_the_random_numbers_of_the_run_alone(monkeypatch):
    monkeypatch.setattr(peak, "_CPU_SIZES", (16,))
    monkeypatch.setattr(peak, "_CPU_REPEATS", (1, 1))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measured_matmul_peak(CPU, torch.float32)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("device", "dtype", "named"), [("cpu", torch.int32, "torch.int32"), ("meta", torch.float32, "meta")]
)
def test_what_cannot_be_measured_is_refused_by_name(device, dtype, named):
    with pytest.raises(ValueError, match=named):
        measured_matmul_peak(torch.device(device), dtype)


def test_peak_memory_is_this_process_alone_and_keeps_what_was_freed():
    # A process begins with what its parent held, if one asks getrusage: so the parent of the two readings holds more.
    held = torch.ones(100_000_000, dtype=torch.uint8)
    code = """
import torch
from tilewright.trainer.peak import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
block = torch.ones(200_000_000, dtype=torch.uint8)
del block
print(before, peak_memory_bytes(torch.device("cpu")))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert held.sum() == 100_000_000
    # Pages that were resident only while torch was imported may make up for a part of the block.
    assert 100e6 < after - before < 300e6
    assert 50e6 < before < 2e9


@pytest.mark.skipif(sys.platform != "linux", reason="reads the file that Linux keeps")
def test_the_high_water_mark_is_read_in_bytes_and_is_0_where_there_is_none(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t  1234 kB\nVmRSS:\t  77 kB\n")
    assert peak._high_water_mark(status) == 1234 * 1024
    assert peak._high_water_mark(tmp_path / "missing") == 0


def test_resident_bytes_by_both_ways_agree_on_the_unit():
    assert 0.2 < peak._max_resident_bytes() / peak_memory_bytes(CPU) < 20
