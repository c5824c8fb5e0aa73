"""Each bar sees the row that breaks it, names it, and is not met by rows that are missing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tilewright.benchmarks.audit import audit as auditing
from tilewright.benchmarks.audit import bars
from tilewright.benchmarks.audit.bars import Verdict
from tilewright.cli.main import main

Audit = dict[str, Any]


def verdict_on(audit: Audit, words: str) -> Verdict:
    (found,) = (verdict for verdict in bars.verdicts(audit) if words in verdict.bar.name)
    return found


def test_an_audit_that_clears_every_bar_says_how_many_rows_were_held_to_each(sound_audit: Audit) -> None:
    verdicts = bars.verdicts(sound_audit)
    assert not [verdict.bar.name for verdict in verdicts if verdict.met is False]
    assert verdict_on(sound_audit, "spills and stack, memory-bound").rows == 2
    worst = verdict_on(sound_audit, "rms_norm, rows to 8,192").worst
    assert worst[:2] == (1.01, "rms_norm 8B 2k sm_90 forward")


@pytest.mark.parametrize(
    ("words", "table", "index", "change", "row"),
    [
        ("spills and stack, memory-bound", "kernels", "norm", {"spill_stores": 1}, "rms_norm._forward 8B 2k sm_90"),
        ("spills and stack, memory-bound", "kernels", "norm", {"stack_bytes": 8}, "rms_norm._forward 8B 2k sm_90"),
        ("spills, attention", "kernels", "attend", {"spill_loads": 3}, "attention._forward 8B 2k sm_90"),
        ("rms_norm, rows to 8,192", "traffic", 0, {"byte_ratio": 1.06}, "rms_norm 8B 2k sm_90 forward"),
        ("rms_norm, wider rows", "traffic", 0, {"byte_ratio": 1.71, "width": 8193}, "rms_norm 8B 2k sm_90 forward"),
        ("V to 32,768", "traffic", 1, {"byte_ratio": 1.06}, "cross_entropy 32,000 classes 2k sm_90 both"),
        ("larger V", "traffic", 4, {"byte_ratio": 1.56}, "cross_entropy 8B 2k sm_90 both"),
        ("causal attention, 2k", "traffic", 2, {"flop_ratio": 1.16}, "attention 8B 2k sm_90 forward"),
        ("tensor-core", "kernels", "attend", {"tensor_cores": {"HMMA": 4}}, "attention._forward 8B 2k sm_90"),
        ("tensor-core", "kernels", "attend", {"tensor_cores": {}}, "attention._forward 8B 2k sm_90"),
        ("peer", "comparison", 0, {"verdict": "worse"}, "rms_norm 8B 2k sm_90 forward, spills: 0 against liger's 5"),
    ],
)
def test_a_row_past_the_bar_is_seen_and_named(
    sound_audit: Audit, words: str, table: str, index: Any, change: Audit, row: str
) -> None:
    sound_audit[table][index].update(change)
    verdict = verdict_on(sound_audit, words)
    assert verdict.met is False
    assert verdict.worst.row == row


def test_a_bar_about_an_audited_op_is_not_met_by_nothing(sound_audit: Audit) -> None:
    sound_audit["traffic"] = []
    assert verdict_on(sound_audit, "causal attention, 8k").met is False
    sound_audit["launches"] = []
    assert verdict_on(sound_audit, "tensor-core").worst.row == "attention: _forward is never launched"


@pytest.mark.parametrize("missing", ["forward", "backward"])
@pytest.mark.parametrize("words", ["rms_norm, rows to 8,192", "rms_norm, wider rows", "causal attention, 8k"])
def test_a_bar_is_not_met_where_a_pass_has_no_figure(sound_audit: Audit, words: str, missing: str) -> None:
    for row in sound_audit["traffic"]:
        if row["pass"] == missing:
            row.update(byte_ratio=None, flop_ratio=None)
    verdict = verdict_on(sound_audit, words)
    assert verdict.met is False
    assert verdict.worst.row == f"no row of the {missing} pass"


def test_wide_rows_that_vanish_from_an_audited_op_do_not_meet_their_bar(sound_audit: Audit) -> None:
    sound_audit["traffic"] = [row for row in sound_audit["traffic"] if row["sample"] != "wide"]
    assert verdict_on(sound_audit, "rms_norm, wider rows").met is False


def test_a_bar_about_an_op_that_was_left_out_is_not_asked(sound_audit: Audit) -> None:
    sound_audit["ops"].pop("attention")
    sound_audit["launches"].pop()
    assert verdict_on(sound_audit, "spills, attention").met is None


def test_ratios_that_could_not_be_had_are_held_to_no_bar(sound_audit: Audit) -> None:
    sound_audit["traffic"][1].update(byte_ratio=None)
    assert verdict_on(sound_audit, "V to 32,768").rows == 0


@pytest.fixture(scope="module")
def compiled_alone() -> Callable[[str], Audit]:
    """What the compiler makes of a kernel that was broken on purpose, in a process that does not interpret."""

    def compiled(name: str) -> Audit:
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        script = Path(__file__).with_name("broken_kernels.py")
        done = subprocess.run(
            [sys.executable, script, name], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = auditing.merged(json.loads(line) for line in done.stdout.splitlines())
        return {"ops": {"double": {"matmuls": {}}}, "chips": [90], **found}

    return compiled


def test_a_block_that_does_not_fit_the_registers_is_caught_by_its_spills(
    compiled_alone: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict_on(compiled_alone("double"), "spills and stack, memory-bound").met
    broken = {**compiled_alone("of huge block"), "floors": []}
    verdict = verdict_on(broken, "spills and stack, memory-bound")
    assert verdict.met is False
    assert verdict.worst.value > 0
    assert "_double_of_huge_block rows sm_90" in verdict.worst.row
    monkeypatch.setattr(auditing, "audit", lambda *_: broken)
    assert main(["audit"]) == 1
    assert "_double_of_huge_block rows sm_90" in capsys.readouterr().out
