"""Tuning: what is timed, which configuration is taken, and the table that the kernels then launch from."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.benchmarks import gpu_check, record, tuning
from tilewright.benchmarks.tuning import Case, Choices, ForcedStep, Times, Tuning, rows, times_on, tune, write
from tilewright.cli import main
from tilewright.kernels import launch
from tilewright.kernels.launch import AUDIT, Configuration, LaunchTable
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError

CPU = torch.device("cpu")
RELU2 = next(spec for spec in SPECS if spec.name == "relu2")
# Numbers 0 and 1 are the audit's, for sizes to 100 and to 1,000; 2 serves up to 500, 3 all sizes.
NARROW, WIDE = Configuration(100, 1), Configuration(1000, 2)
MIDDLE, ANY = Configuration(500, 4), Configuration(1000, 8)


def new_table(name: str = "a kernel") -> LaunchTable:
    return LaunchTable(name, {80: (NARROW, WIDE)}, (MIDDLE, ANY))


def brief(found: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, float]]]:
    return [(row["up_to"], row["num_warps"], row["measured_at"]) for row in found]


def test_a_class_of_sizes_without_times_keeps_the_audits_row() -> None:
    found = rows(new_table(), 90, {300: {1: 2e-6, 2: 1e-6, 3: 3e-6}})
    # The fastest serves up to 500; what lies past stays the audit's.
    assert brief(found) == [(100, 1, {}), (500, 4, {"300": 1.0}), (1000, 2, {})]


def test_sizes_timed_within_a_class_part_it_and_the_last_reaches_its_end() -> None:
    found = rows(new_table(), 90, {200: {1: 2e-6, 2: 1e-6, 3: 3e-6}, 400: {1: 3e-6, 2: 2e-6, 3: 1e-6}})
    assert brief(found) == [(100, 1, {}), (200, 4, {"200": 1.0}), (1000, 8, {"400": 1.0})]


def test_neighbouring_sizes_with_one_winner_are_one_row() -> None:
    found = rows(new_table(), 90, {200: {1: 2e-6, 3: 1e-6}, 400: {1: 3e-6, 3: 2e-6}})
    assert brief(found) == [(100, 1, {}), (1000, 8, {"200": 1.0, "400": 2.0})]


def test_the_audits_choice_stands_unless_another_is_faster_by_more_than_noise() -> None:
    found = rows(new_table(), 90, {200: {1: 1.01e-6, 3: 1e-6}, 400: {1: 1.03e-6, 3: 1e-6}})
    assert brief(found)[1:] == [(200, 2, {"200": 1.01}), (1000, 8, {"400": 1.0})]


def no_samples(*_: Any) -> Any:
    return iter(())


def case_of(table: LaunchTable, size: int, label: str) -> Case:
    spec = OpSpec("an op", abs, abs, no_samples, no_samples, lambda sample: None, {"kernel": table}, ())  # type: ignore[arg-type, return-value]
    return Case(spec, label, table, size, "forward")


def test_every_choice_that_covers_a_size_is_timed_but_those_refused() -> None:
    table, asked = new_table(), []

    def timer(case: Case, choices: Choices) -> Times:
        asked.append((case.size, sorted(choices)))
        return {number: [1e-6 * (1 + number)] * 6 for number in choices}, {}

    tune([case_of(table, 64, "a"), case_of(table, 600, "b")], timer, {"a kernel": {3}, "another": {0, 1}})
    assert asked == [(64, [0, 1, 2]), (600, [1])]


def test_a_size_is_decided_by_the_geometric_mean_over_its_calls_and_by_those_that_ran_in_all() -> None:
    times = {
        "a": ({0: [4e-6] * 6, 1: [1e-6] * 6, 2: [1e-9] * 6}, {3: "OutOfResources: shared memory"}),
        "b": ({0: [4e-6] * 6, 1: [9e-6] * 6, 3: [1e-9] * 6}, {2: "OutOfResources: registers"}),
    }
    table = new_table()
    tuning = tune([case_of(table, 64, label) for label in times], lambda case, choices: times[case.label], {})
    assert tuning.seconds == {"a kernel": {64: {0: pytest.approx(4e-6), 1: pytest.approx(3e-6)}}}
    assert len(tuning.record) == 6
    assert [reason.partition(": OutOf")[0] for reason in tuning.dropped] == [
        "a kernel, size 64: an op a, forward: num_warps 8, num_stages 1",
        "a kernel, size 64: an op b, forward: num_warps 4, num_stages 1",
    ]


def test_what_is_written_is_what_the_kernels_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch._read.cache_clear()
    written = new_table()
    path = tmp_path / "sm_90.json"
    write(
        path, 90, [written, new_table("not timed")], Tuning({"a kernel": {64: {0: 2e-6, 2: 1e-6}}}, [], []), "on a GPU"
    )
    write(path, 90, [new_table("later")], Tuning({"later": {64: {0: 2e-6, 3: 1e-6}}}, [], []), "on another")
    for name, warps, source in (("a kernel", 4, "on a GPU"), ("later", 8, "on another"), ("not timed", 1, AUDIT)):
        picked = new_table(name).pick(64, CPU)
        assert (picked.num_warps, picked.source) == (warps, source)


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"dear": "diary"}')
    with pytest.raises(TrainingError, match="no file of launch tables: delete it, or name another"):
        write(path, 90, [], Tuning({}, [], []), "on a GPU")
    assert path.read_text() == '{"dear": "diary"}'


def test_a_forced_step_launches_its_own_choice_in_both_passes_and_leaves_the_table_alone() -> None:
    table = RELU2.tables["elementwise"]
    choice = table.choices()[-1]
    picked: list[Configuration] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        picked.append(table.pick(2000, CPU))
        y = x.square()
        y.register_hook(lambda gradient: picked.append(table.pick(2000, CPU)))
        return y

    spec = dataclasses.replace(RELU2, function=function)
    step = ForcedStep(Case(spec, "", table, 2000, "both"), choice, Sample("", {"x": torch.ones(3)}))
    step.forward()
    assert step.backward is not None
    step.backward()
    assert picked == [choice, choice]
    assert not table.pick(2000, CPU).launches_like(choice)


def test_choices_are_timed_in_turns_and_one_that_does_not_run_is_named() -> None:
    table = RELU2.tables["elementwise"]
    broken = Configuration(1 << 62, 4, {"BLOCK_ROWS": 3, "BLOCK_COLUMNS": 1000})  # no powers of two

    def audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
        yield Sample("a call", {"x": torch.empty(4, 64, dtype=dtype)})

    case = Case(dataclasses.replace(RELU2, audit_samples=audit_samples), "a call", table, 64, "backward")
    seconds, failures = times_on(CPU, case, {0: table.choices()[0], 5: table.choices()[5], 6: broken})
    assert set(seconds) == {0, 5}
    assert len(seconds[0]) == len(seconds[5]) >= 11
    assert all(taken > 0 for taken in (*seconds[0], *seconds[5]))
    assert set(failures) == {6}
    assert "power of 2" in failures[6]


# Launches can be followed only where the kernels are not interpreted.
CASES = """
import json
from tilewright.cli.clone import load_benchmarks
load_benchmarks()
from tilewright.benchmarks.tuning import cases
from tilewright.kernels.registry import SPECS
specs = [spec for spec in SPECS if spec.name in ("rms_norm", "swiglu")]
print(json.dumps([(case.spec.name, case.table.name, case.size, case.what) for case in cases(specs, 90)]))
"""


def test_cases_are_the_passes_that_ask_a_table_at_the_audits_shapes() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CASES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = Counter(tuple(case) for case in json.loads(done.stdout))
    # Three sequence lengths, each without and with a residual; at 8,192 also rows of 8,191, which are not aligned.
    assert found["rms_norm", "rms_norm forward", 4096, "forward"] == 6
    assert found["rms_norm", "rms_norm backward", 8192, "backward"] == 8
    assert found["swiglu", "gated elementwise", 14336, "both"] == 6
    assert {table for _, table, _, _ in found} == {"rms_norm forward", "rms_norm backward", "gated elementwise"}


def test_without_a_gpu_one_sentence_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main.main(["benchmark", "tune"]) == 2
    said = capsys.readouterr().err
    assert "torch sees none here; `tilewright benchmark tune --dry-run` lists" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["rms_nrom"], "there is no op 'rms_nrom'; there are adamw"),
        (["--processes", "0"], "--processes is 0; it must be 1 or more"),
        (["--record", "/nowhere/at/all.json"], "the folder of /nowhere/at/all.json does not exist"),
    ],
)
def test_bad_input_is_named(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["benchmark", "tune", *arguments]) == 2
    assert reason in capsys.readouterr().err


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A GPU of generation 90 whose checks fail as the fixture's mapping says: job in words → failure."""
    failures: dict[str, str] = {}

    def check(todo: list[gpu_check.Job], *_: Any) -> Any:
        for job in todo:
            yield [gpu_check.Finding(job, "bfloat16", 0.5, "a sample", failures.get(job.launched, ""))]

    table = RELU2.tables["elementwise"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "generation", lambda device: 90)
    environment = {"gpus": [{"name": "H100"}], "versions": {"torch": "2", "triton": "3"}, "git": None}
    monkeypatch.setattr(record, "environment", lambda device: environment)
    monkeypatch.setattr(gpu_check, "check", check)
    monkeypatch.setattr(tuning, "cases", lambda specs, chip: [Case(RELU2, "a call", table, 4096, "both")])
    # The later a choice, the faster.
    monkeypatch.setattr(
        tuning, "times_on", lambda device, case, choices: ({n: [1e-5 / (1 + n)] * 6 for n in choices}, {})
    )
    return failures


def test_tune_leaves_out_what_failed_and_writes_table_and_record(
    pretended_gpu: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = RELU2.tables["elementwise"]
    choices = table.choices()
    pretended_gpu[f"elementwise: {choices[-1]}"] = "wrong: a sample, output 0"
    files = tmp_path / "sm_90.json", tmp_path / "record.json"
    assert main.main(["benchmark", "tune", "relu2", "--output", str(files[0]), "--record", str(files[1])]) == 0
    assert f"FAILED relu2, elementwise: {choices[-1]}, bfloat16: wrong" in capsys.readouterr().out.replace("\n", " ")
    written, kept = (json.loads(file.read_text()) for file in files)
    rows = launch.measured_rows(table, 90, written)
    assert rows[-1].launches_like(choices[-2])
    assert rows[-1].source.startswith("measured on H100, torch 2, triton 3, 20")
    assert kept["tables"] == written
    assert {"environment", "check", "timings", "dropped"} <= set(kept)
    assert [timing["configuration"] for timing in kept["timings"]] == [str(c) for c in choices[2:-1]]


def test_tune_times_nothing_where_what_is_launched_today_is_wrong(
    pretended_gpu: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended_gpu["as chosen"] = "three rows: RuntimeError: an illegal memory access was encountered"
    table, kept = tmp_path / "sm_90.json", tmp_path / "record.json"
    assert main.main(["benchmark", "tune", "relu2", "--output", str(table), "--record", str(kept)]) == 1
    assert not table.exists()
    assert "illegal memory access" in json.loads(kept.read_text())["check"][0]["failure"]
    assert "nothing is timed" in capsys.readouterr().out
