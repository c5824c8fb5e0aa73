"""An audit that falls behind the accepted one is caught, and none is accepted without a reason."""

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from tilewright.benchmarks.audit import baseline
from tilewright.benchmarks.audit.baseline import Comparison
from tilewright.trainer.errors import TrainingError

Audit = dict[str, Any]


@pytest.fixture
def accepted(sound_audit: Audit, tmp_path: Path) -> Path:
    baseline.accept(copy.deepcopy(sound_audit), tmp_path, "the first")
    return tmp_path


def compared(audit: Audit, directory: Path) -> Comparison:
    return baseline.compare(audit, baseline.read(baseline.path_for(directory, audit)))


def test_the_same_audit_differs_in_nothing(sound_audit: Audit, accepted: Path) -> None:
    assert (accepted / "triton-3.7.json").is_file()
    assert compared(sound_audit, accepted) == Comparison([], [], [])


@pytest.mark.parametrize(
    ("table", "index", "change", "sentence"),
    [
        ("kernels", "norm", {"spill_loads": 2, "spill_stores": 1}, "spills rose from 0 to 3"),
        ("kernels", "norm", {"stack_bytes": 16}, "stack rose from 0 to 16"),
        ("kernels", "norm", {"occupancy": 0.375}, "occupancy fell from 0.5 to 0.375"),
        ("kernels", "norm", {"wide_accesses": 3}, "share of 128-bit accesses fell from 1.0 to 0.75"),
        ("traffic", 0, {"byte_ratio": 1.02}, "bytes issued ÷ compulsory rose from 1.01 to 1.02"),
        ("traffic", 0, {"flop_ratio": 1.5}, "FLOPs issued ÷ required rose from 1.0 to 1.5"),
        ("traffic", 0, {"byte_ratio": None}, "bytes issued ÷ compulsory was 1.01 and is None"),
    ],
)
def test_what_became_worse_is_said_of_its_launch_alone(
    sound_audit: Audit, accepted: Path, table: str, index: Any, change: Audit, sentence: str
) -> None:
    sound_audit[table][index].update(change)
    worse, new, better = compared(sound_audit, accepted)
    assert len(worse) == 1
    assert worse[0].endswith(sentence)
    assert "rms_norm 8B 2k, forward, sm_90" in worse[0]
    assert not new
    assert not better


def test_an_instruction_class_that_disappears_is_named(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["kernels"]["attend"]["tensor_cores"] = {"HMMA": 8}
    worse, _, better = compared(sound_audit, accepted)
    assert worse == ["attention._forward (attention 8B 2k, forward, sm_90): no HGMMA any more"]
    assert better == ["attention._forward (attention 8B 2k, forward, sm_90): HMMA now"]


def test_wide_accesses_that_vanish_are_a_class_that_disappears(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["kernels"]["norm"]["wide_accesses"] = 0
    sentences = [sentence.rpartition(": ")[2] for sentence in compared(sound_audit, accepted).worse]
    assert sorted(sentences) == ["no 128-bit accesses any more", "share of 128-bit accesses fell from 1.0 to 0.0"]


def test_the_share_of_wide_accesses_is_not_compared_with_an_audit_that_kept_none(sound_audit: Audit) -> None:
    accepted = baseline.figures_of(sound_audit)
    for figures in accepted.values():
        figures.pop("wide_share", None)
    assert baseline.compare(sound_audit, accepted) == Comparison([], [], [])


def test_what_became_better_is_no_failure(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["kernels"]["norm"]["occupancy"] = 0.75
    sound_audit["traffic"][0]["byte_ratio"] = 1.0
    worse, _, better = compared(sound_audit, accepted)
    assert not worse
    assert len(better) == 2


def test_a_launch_that_vanishes_and_one_that_is_new_are_told(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["launches"][0]["sample"] = "8B 4k"
    worse, new, _ = compared(sound_audit, accepted)
    assert worse == ["rms_norm._forward (rms_norm 8B 2k, forward, sm_90): it is gone"]
    assert new == ["rms_norm._forward (rms_norm 8B 4k, forward, sm_90): it is new"]


def test_the_worst_of_two_launches_of_a_kernel_counts(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["kernels"]["spilling"] = {**sound_audit["kernels"]["norm"], "spill_loads": 1}
    sound_audit["launches"].insert(0, {**sound_audit["launches"][0], "kernel": "spilling"})
    assert compared(sound_audit, accepted).worse == [
        "rms_norm._forward (rms_norm 8B 2k, forward, sm_90): spills rose from 0 to 1"
    ]


def test_ops_and_chips_that_were_not_audited_are_not_missed_and_keep_their_figures(
    sound_audit: Audit, accepted: Path
) -> None:
    whole = copy.deepcopy(sound_audit)
    sound_audit["ops"] = {"rms_norm": {"matmuls": {}}}
    for table in ("launches", "traffic"):
        sound_audit[table] = [row for row in sound_audit[table] if row["op"] == "rms_norm"]
    assert compared(sound_audit, accepted) == Comparison([], [], [])
    sound_audit["kernels"]["norm"]["spill_loads"] = 1
    baseline.accept(sound_audit, accepted, "one op alone")
    assert compared(whole, accepted).better == [
        "rms_norm._forward (rms_norm 8B 2k, forward, sm_90): spills fell from 1 to 0"
    ]


def test_the_change_log_says_when_and_why_the_newest_first(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["kernels"]["norm"]["spill_loads"] = 1
    baseline.accept(sound_audit, accepted, "wider blocks are worth a spill")
    text = (accepted / "CHANGELOG.md").read_text(encoding="utf-8")
    today = datetime.date.today().isoformat()
    assert text.index("wider blocks are worth a spill (1 worse, 0 better, 0 new)") < text.index("the first (")
    assert text.count(f"## {today}, triton-3.7") == 2
    assert text.startswith("# Why each audit was accepted\n\n## ")


@pytest.mark.parametrize("why", ["", "  "])
def test_nothing_is_accepted_without_a_reason(sound_audit: Audit, tmp_path: Path, why: str) -> None:
    with pytest.raises(TrainingError, match="--why"):
        baseline.accept(sound_audit, tmp_path, why)
    assert not list(tmp_path.iterdir())


def test_an_audit_with_errors_is_not_accepted(sound_audit: Audit, tmp_path: Path) -> None:
    sound_audit["errors"] = [{"op": "rms_norm", "sample": "8B 2k", "chip": 90, "message": "too much shared memory"}]
    with pytest.raises(TrainingError, match="mend the launches"):
        baseline.accept(sound_audit, tmp_path, "why not")


def test_a_triton_version_without_a_baseline_says_how_to_make_one(sound_audit: Audit, accepted: Path) -> None:
    sound_audit["environment"]["triton"] = "3.8.0"
    with pytest.raises(TrainingError, match=r"triton-3\.8\.json: no audit was accepted.*--accept --why"):
        compared(sound_audit, accepted)


def test_a_file_that_is_no_baseline_is_named(sound_audit: Audit, tmp_path: Path) -> None:
    for content in ("{", "[]", json.dumps({"lines": [{"op": "rms_norm"}]})):
        (tmp_path / "triton-3.7.json").write_text(content, encoding="utf-8")
        with pytest.raises(TrainingError, match="restore it from git"):
            compared(sound_audit, tmp_path)
