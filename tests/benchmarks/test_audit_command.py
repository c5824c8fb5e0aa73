"""``tilewright audit``: what it prints and writes, and when it fails."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tilewright.benchmarks.audit import audit as auditing
from tilewright.benchmarks.audit import baseline, peers
from tilewright.benchmarks.audit.audit import Task
from tilewright.benchmarks.audit.chips import CHIPS
from tilewright.cli.main import main
from tilewright.kernels.opspec import OpSpec
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError

Audit = dict[str, Any]
BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture
def audited(sound_audit: Audit, monkeypatch: pytest.MonkeyPatch) -> Audit:
    """The command finds this audit, to be changed by the test, where it would take minutes to make one."""
    monkeypatch.setattr(auditing, "audit", lambda *_: sound_audit)
    return sound_audit


def test_a_sound_audit_prints_the_tables_and_the_bars_and_succeeds(
    audited: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit"]) == 0
    printed = capsys.readouterr().out
    assert "predicted" in printed
    assert "8 HGMMA" in printed
    assert "blocks/SM" in printed
    assert "NOT MET" not in printed


def test_a_bar_that_is_not_met_fails_and_names_the_launch(audited: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    audited["kernels"]["attend"]["spill_loads"] = 7
    assert main(["audit"]) == 1
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "NOT MET" in line)
    assert "attention._forward 8B 2k sm_90" in line


def test_a_launch_that_cannot_run_fails_and_is_named(audited: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"op": "rms_norm", "sample": "8B 2k", "chip": 90, "pass": "forward", "kernel": "rms_norm._forward"}
    audited["errors"] = [{**error, "message": "a block takes too much shared memory"}]
    assert main(["audit"]) == 1
    printed = capsys.readouterr().out
    assert "rms_norm._forward (rms_norm 8B 2k, forward, sm_90): a block takes too much shared memory" in printed


def test_the_baseline_is_accepted_once_and_held_to_after(
    audited: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--baseline", str(tmp_path)]) == 2
    assert "no audit was accepted" in capsys.readouterr().err
    assert main(["audit", "--baseline", str(tmp_path), "--accept", "--why", "the first"]) == 0
    assert main(["audit", "--baseline", str(tmp_path)]) == 0
    audited["kernels"]["norm"]["occupancy"] = 0.25
    assert main(["audit", "--baseline", str(tmp_path)]) == 1
    assert "occupancy fell from 0.5 to 0.25" in capsys.readouterr().out


def test_a_new_launch_fails_until_it_is_accepted(
    audited: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline.accept(audited, tmp_path, "the first")
    audited["launches"].append({**audited["launches"][0], "sample": "70B 2k"})
    assert main(["audit", "--baseline", str(tmp_path)]) == 1
    assert "rms_norm 70B 2k, forward, sm_90): it is new" in capsys.readouterr().out


def test_json_and_page_are_written(audited: Audit, tmp_path: Path) -> None:
    figures, page = tmp_path / "audit.json", tmp_path / "audit.html"
    assert main(["audit", "--json", str(figures), "--page", str(page)]) == 0
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert written["format"] == 1
    assert written["kernels"]["norm"]["registers"] == 64
    assert {bar["met"] for bar in written["bars"]} == {True, None}
    assert "predicted" in page.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such_op"], "there is no op 'no_such_op'; the audit knows adamw, attention"),
        (["--chips", "70"], "--chips 70: no such generation is known; it takes 80, 90, 100"),
        (["--chips", "eighty"], "--chips eighty: it must be generations"),
        (["--accept"], "add --why 'the reason'"),
        (["--why", "it is better"], "add --accept"),
        (["--json", "no/such/place.json"], "does not exist; make it first"),
        (["--json", "."], ". is a directory; name a file in it"),
        (["--page", "/"], "/ is a directory; name a file in it"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint
    assert complaint.count("\n") == 1


def test_a_library_without_a_counterpart_fails_and_is_named(
    audited: Audit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"op": "rms_norm", "sample": "8B 2k", "chip": 90, "message": "too much shared memory"}
    theirs = {"peer": "liger-kernel", "kernels": {}, "launches": [], "traffic": [], "errors": [error]}
    monkeypatch.setattr(peers, "version_of", lambda _: "1.0")
    monkeypatch.setattr(peers, "audit", lambda *_: theirs)
    assert main(["audit", "--against", "liger-kernel"]) == 1
    printed = capsys.readouterr().out
    assert "liger-kernel has no row beside ours" in printed
    assert (
        "launches of liger-kernel that fail: 1\n- rms_norm (rms_norm 8B 2k, sm_90): too much shared memory" in printed
    )


def test_a_directory_that_cannot_be_written_is_refused_before_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(auditing, "audit", lambda *_: pytest.fail("it was audited"))
    assert main(["audit", "--json", str(tmp_path / "audit.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def run(*codes: str) -> list[Audit]:
    tasks = [Task(f"task {index}", [sys.executable, "-c", code], True) for index, code in enumerate(codes)]
    return auditing.run(tasks, Console(file=io.StringIO()))


def test_what_the_processes_print_is_gathered_in_their_order() -> None:
    first = 'print("""{"total": 2}\n{"traffic": [1, 2]}\nnot of ours\n{"error": {"op": "x"}}""")'
    found = run(first, 'import os; print(\'{"kernel": {"id": "%s"}}\' % os.environ["TRITON_INTERPRET"])')
    assert found == [{"traffic": [1, 2]}, {"error": {"op": "x"}}, {"kernel": {"id": "1"}}]


def test_a_process_that_dies_is_named_with_its_last_words() -> None:
    with pytest.raises(TrainingError, match="'task 0' did not finish: MemoryError: too much"):
        run('raise MemoryError("too much")', "print()")


def test_findings_are_merged_by_what_they_are() -> None:
    launch = {"op": "relu2", "chip": 80, "kernel": "a", "pass": "forward", "sample": "s", "grid": [1]}
    found = auditing.merged([{"kernel": {"id": "a", "registers": 3}}, {"launch": launch}, {"traffic": [{"op": "b"}]}])
    assert found == {"kernels": {"a": {"registers": 3}}, "launches": [launch], "traffic": [{"op": "b"}], "errors": []}


def floor_of(spec: OpSpec, label: str, name: str, found: Audit) -> Audit:
    rows = auditing.floors([spec], [90], found)
    (row,) = (row for row in rows if row["sample"] == label and row["pass"] == name)
    return row


def test_the_floor_of_a_memory_bound_op_is_its_issued_bytes_at_the_datasheets_bandwidth() -> None:
    place = {"op": "relu2", "sample": "8B 2k", "chip": 90, "pass": "forward"}
    found = {"kernels": {}, "launches": [], "traffic": [{**place, "byte_ratio": 1.5, "flop_ratio": 1.0}]}
    moved = 1.5 * 2 * (8 * 2048 * 14336 * torch.bfloat16.itemsize)
    row = floor_of(BY_NAME["relu2"], "8B 2k", "forward", found)
    assert row["bound"] == "memory"
    assert row["predicted_microseconds"] == pytest.approx(moved / CHIPS[90].peak_bandwidth * 1e6, rel=1e-4)


def test_the_floor_of_attention_is_the_products_of_its_own_kernels_at_the_datasheets_peak() -> None:
    names = {"forward": ["_forward"], "backward": ["_backward_delta", "_backward_dkv", "_backward_dq"]}
    launches = [
        {"op": "attention", "sample": "8B 8k", "chip": 90, "pass": part, "kernel": name, "grid": [1]}
        for part, kernels in names.items()
        for name in kernels
    ]
    kernels = {name: {"kernel": f"attention.{name}"} for part in names.values() for name in part}
    ratio = {
        "op": "attention",
        "sample": "8B 8k",
        "chip": 90,
        "pass": "backward",
        "byte_ratio": 30.0,
        "flop_ratio": 1.1,
    }
    row = floor_of(
        BY_NAME["attention"], "8B 8k", "backward", {"kernels": kernels, "launches": launches, "traffic": [ratio]}
    )
    product = 2 * 2 * 32 * 128 * (8192 * 8193 // 2)  # of 2 sequences of 32 heads
    assert row["bound"] == "compute"
    assert row["predicted_microseconds"] == pytest.approx(1.1 * 7 * product / CHIPS[90].peak_flops * 1e6, rel=1e-4)
