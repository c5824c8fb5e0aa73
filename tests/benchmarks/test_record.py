"""A record says where it was measured and what its figures mean; what is not known is left empty, never guessed."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tilewright.benchmarks import peaks, record
from tilewright.benchmarks.peaks import Peaks, measured_peaks
from tilewright.kernels.opspec import Work
from tilewright.trainer.errors import TrainingError

PEAKS = Peaks(100.0, {"bfloat16": 1000.0})
ROUNDS = [2.0] * 5 + [4.0] * 6


def test_shares_are_of_the_bound_that_takes_longer() -> None:
    # 200 bytes take 2 s at best, 1000 operations 1 s.
    columns = record.timing(ROUNDS, Work(1000, 200), torch.bfloat16, PEAKS, cold=True)
    assert columns["median_seconds"] == 4.0
    assert columns["interval_seconds"] == [2.0, 4.0]
    assert (columns["bound"], columns["share_of_measured_peak"]) == ("memory", 0.5)
    assert (columns["bytes_per_second"], columns["flops_per_second"]) == (50.0, 250.0)
    columns = record.timing(ROUNDS, Work(3000, 200), torch.bfloat16, PEAKS, cold=True)
    assert (columns["bound"], columns["share_of_measured_peak"]) == ("compute", 0.75)


@pytest.mark.parametrize(
    ("dtype", "known", "cold"),
    [
        (torch.float32, PEAKS, True),  # whose matmul peak was not measured
        (torch.bfloat16, Peaks(None, note="unknown device"), True),
        (torch.bfloat16, PEAKS, False),  # bound by memory, which a warm cache spares
    ],
)
def test_a_share_of_what_is_unknown_is_refused(dtype: torch.dtype, known: Peaks, cold: bool) -> None:
    columns = record.timing(ROUNDS, Work(1000, 200), dtype, known, cold=cold)
    assert columns["share_of_measured_peak"] is None
    assert columns["median_seconds"] == 4.0


def test_utilisation_is_refused_not_guessed_for_a_device_whose_peak_is_unknown() -> None:
    assert PEAKS.utilisation(250.0, torch.bfloat16) == 0.25
    assert PEAKS.utilisation(250.0, torch.float16) is None
    unknown = measured_peaks(torch.device("meta"), (torch.bfloat16,))
    assert unknown.utilisation(250.0, torch.bfloat16) is None
    assert unknown.bytes_per_second is None
    assert "unknown" in unknown.note


def test_the_peaks_of_a_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peaks._COPY_BYTES, "cpu", 2**22)
    found = measured_peaks(torch.device("cpu"), (torch.float32,))
    assert found.bytes_per_second is not None
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second["float32"] < 1e15


def test_every_derived_column_is_defined() -> None:
    columns = record.timing(ROUNDS, Work(1, 1), torch.bfloat16, PEAKS, cold=True)
    defined = " ".join([*record.DEFINITIONS, *record.DEFINITIONS.values()])
    assert [name for name in columns if name not in defined] == []


def test_the_environment_names_machine_code_and_versions() -> None:
    facts = record.environment(torch.device("cpu"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert set(facts["git"]) == {"commit", "dirty"}


def test_clocks_and_power_limit_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "1755, 2619, 1980, 2619, 700.00, [N/A], 41"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"abc-{index}"))
    first, _ = record._gpu_states(2)
    assert first["sm_clock_mhz"] == 1755
    assert first["sm_clock_limit_mhz"] == 1980
    assert first["power_limit_watts"] == 700
    assert first["power_draw_watts"] is None
    assert "-i GPU-abc-1" in (tmp_path / "nvidia-smi.asked").read_text()


def test_a_driver_that_does_not_answer_leaves_the_state_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    (state,) = record._gpu_states(1)
    assert set(state.values()) == {None}


def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert record.device_of("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert record.device_of("auto") == torch.device("cpu")
        with pytest.raises(TrainingError, match="torch sees no GPU"):
            record.device_of("cuda")
