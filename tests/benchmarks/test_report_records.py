"""What the report reads from a record, the ratios that it takes, and what it refuses."""

import argparse
import json

import pytest

from tilewright.benchmarks.report import records
from tilewright.benchmarks.report.ratios import changes, memory_ratio, time_ratio
from tilewright.cli import benchmark_report
from tilewright.trainer.errors import TrainingError

GPU = {"device": "cuda", "gpus": [{"name": "A GPU", "capability": "9.0"}], "cpu": {"model": "A CPU"}}
CPU = {"device": "cpu", "gpus": [{"name": "A GPU", "capability": "9.0"}], "cpu": {"model": "A CPU"}}


def entry(provider="ours", rounds=(2.0,) * 11, *, interval=None, op="rms_norm", sample="8B 2k", memory=100, **extra):
    ordered = sorted(rounds)
    interval = interval or [ordered[1], ordered[-2]]
    info = {
        "op": op, "sample": sample, "dtype": "bfloat16", "pass": "forward", "provider": provider,
        "median_seconds": ordered[len(ordered) // 2], "interval_seconds": interval,
        "peak_memory_bytes": memory, **extra,
    }  # fmt: skip
    return {"name": "x", "extra_info": info, "stats": {"data": list(rounds)}}


@pytest.fixture
def record(tmp_path):
    """Write a record of the given entries; returns its path."""

    def write(*entries, name="new.json", environment=CPU, refused=(), **asked):
        path = tmp_path / name
        ours = {"format": 1, "environment": environment, "definitions": {}, "refused": refused, **asked}
        path.write_text(json.dumps({"benchmarks": list(entries), "tilewright_record": ours}))
        return path

    return write


@pytest.fixture
def report(tmp_path):
    """Run the command on paths and options; returns its exit status."""

    def run(*arguments):
        parser = argparse.ArgumentParser()
        benchmark_report.add_parser(parser.add_subparsers())
        parsed = parser.parse_args(["report", *map(str, arguments), "--output", str(tmp_path / "report.html")])
        return parsed.run(parsed)

    return run


def rows_of(path):
    return {row.provider: row for row in records.read(path).rows}


def test_a_row_has_its_case_its_time_and_its_other_figures(record):
    row = rows_of(record(entry(rounds=[3.0, 1.0, 2.0], tokens_per_second=5, note="as told", implementation="triton")))[
        "ours"
    ]
    assert row.case == ("rms_norm", "8B 2k", "bfloat16", "forward")
    assert row.seconds == (2.0, 2.0, 2.0)
    assert row.rounds == (3.0, 1.0, 2.0)
    assert (row.figures["tokens_per_second"], row.figures["peak_memory_bytes"]) == (5, 100)
    assert (row.note, row.implementation) == ("as told", "triton")


def test_a_row_without_a_time_is_no_row(record):
    assert list(rows_of(record(entry(), entry("torch eager", median_seconds=None)))) == ["ours"]


def test_the_device_is_what_was_measured_on_not_what_else_is_there(record):
    assert (records.read(record(entry(), environment=GPU)).device, records.read(record(entry())).device) == (
        "A GPU",
        "A CPU",
    )
    assert (records.read(record(entry(), environment=GPU)).chip, records.read(record(entry())).chip) == (90, None)


def test_the_ratio_within_a_run_is_taken_round_by_round(record):
    # The machine slows down fivefold in the course of the run: medians and their intervals alone would say nothing.
    speed = [1.0 + 0.4 * number for number in range(11)]
    rows = rows_of(record(entry("ours", [0.8 * s for s in speed]), entry("other", speed)))
    ratio = time_ratio(rows["ours"], rows["other"], same_run=True)
    assert ratio == pytest.approx((0.8, 0.8, 0.8))
    unpaired = time_ratio(rows["ours"], rows["other"], same_run=False)
    assert unpaired.low < 0.6
    assert unpaired.high > 1.2


@pytest.mark.parametrize(("ours", "other"), [(5, 5), (11, 10)])
def test_too_few_or_unequal_rounds_are_not_paired(record, ours, other):
    rows = rows_of(
        record(entry("ours", [1.0] * ours, interval=[0.9, 1.2]), entry("other", [2.0] * other, interval=[1.5, 3]))
    )
    assert time_ratio(rows["ours"], rows["other"], same_run=True) == pytest.approx((0.5, 0.9 / 3, 1.2 / 1.5))


def test_peak_memory_has_no_interval_and_none_where_it_is_unknown(record):
    rows = rows_of(record(entry("ours", memory=50), entry("other", memory=200), entry("unknown", memory=None)))
    assert memory_ratio(rows["ours"], rows["other"]) == (0.25, 0.25, 0.25)
    assert memory_ratio(rows["ours"], rows["unknown"]) is None


def test_compiled_is_compared_with_compiled(record):
    path = record(entry("ours"), entry("ours compiled"), entry("torch.compile"), entry("torch eager"))
    (rows,) = records.cases_of(records.read(path)).values()
    rivals = {name: records.rival_of(row, rows) for name, row in rows.items()}
    assert rivals["torch.compile"].provider == "ours compiled"
    assert rivals["torch eager"].provider == "ours"
    assert rivals["ours"] is rivals["ours compiled"] is None


def test_a_change_is_worse_only_if_its_whole_interval_is(record):
    around = [1.9, 1.95, 1.98, 2.0, 2.0, 2.0, 2.02, 2.05, 2.08, 2.1, 2.1]
    base = records.read(record(entry(rounds=around), name="base.json"))

    def worse(new, above=0.1):
        (change,) = changes(records.read(record(new)), base)
        return change.worse(above)

    slow, unsure, small = [1.3 * x for x in around], [2.0] * 6 + [3.0] * 5, [2.15] * 11
    assert worse(entry(rounds=slow)) == ["time is 1.30 [1.27, 1.33] of it"]
    assert worse(entry(rounds=slow), above=0.28) == []
    assert worse(entry(rounds=unsure)) == []
    assert worse(entry(rounds=small)) == []
    assert worse(entry(rounds=around, memory=111)) == ["peak memory is 1.11 [1.11, 1.11] of it"]


def test_six_rounds_that_scatter_widely_still_show_that_all_took_three_times_as_long(record):
    rounds = [1.0, 1.1, 1.2, 1.4, 1.9, 2.4]
    base = records.read(record(entry(rounds=rounds), name="base.json"))
    (change,) = changes(records.read(record(entry(rounds=[3 * x for x in rounds]))), base)
    assert change.time.low > 1.1


def test_rows_that_are_gone_from_a_record_of_the_same_suite_are_worse(record, report, capsys):
    base = record(entry(), entry(sample="70B 2k"), name="base.json", suite="quick", only=["rms_norm"])
    assert report(record(entry(), suite="quick", only=["rms_norm"]), base, "--fail-above", "10%") == 1
    assert "worse: rms_norm 70B 2k bfloat16 forward, ours: is gone" in capsys.readouterr().out
    assert report(record(entry(), suite="kernels", only=["rms_norm"]), base, "--fail-above", "10%") == 0


def test_fail_above_names_what_is_worse_of_ours_alone(record, report, capsys):
    base = record(entry("ours"), entry("torch eager"), entry("ours", sample="70B 2k"), name="base.json")
    slower = [4.0] * 11
    new = record(entry("ours", slower), entry("torch eager", slower), entry("ours", sample="70B 2k"))
    assert report(new, base, "--fail-above", "10%") == 1
    told = capsys.readouterr().out
    assert "worse: rms_norm 8B 2k bfloat16 forward, ours: time is 2.00 [2.00, 2.00] of it" in told
    assert "70B" not in told
    assert "torch eager" not in told
    assert "1 of 2 rows of ours are worse than in base.json by more than 10.00%" in told
    assert report(new, base, "--fail-above", "100%") == 0
    assert report(new, base) == 0


def test_figures_of_different_devices_come_with_a_warning(record, report, capsys, tmp_path):
    base = record(entry(), name="base.json", environment=GPU)
    assert report(record(entry()), base, "--fail-above", "10%") == 0
    told = capsys.readouterr().out
    assert "WARNING: Different devices: new.json was measured on A CPU, base.json on A GPU." in told
    assert "not comparable" in (tmp_path / "report.html").read_text()


def test_rows_that_are_gone_are_counted(record, report, capsys):
    base = record(entry(), entry(sample="70B 2k"), name="base.json")
    assert report(record(entry()), base, "--fail-above", "10%") == 0
    assert "not compared: 1 rows of ours in base.json that new.json lacks" in capsys.readouterr().out


def test_what_is_refused_a_time_that_it_had_is_worse(record, report, capsys):
    refused = {"op": "rms_norm", "sample": "8B 2k", "dtype": "bfloat16", "reason": "its error is 3 times too large"}
    base = record(entry(), entry("torch eager"), entry(sample="70B 2k"), name="base.json")
    kept = entry(sample="70B 2k")
    new = record(kept, refused=[{**refused, "provider": "ours"}, {**refused, "provider": "torch eager"}])
    assert report(new, base, "--fail-above", "10%") == 1
    told = capsys.readouterr().out
    assert "worse: rms_norm 8B 2k bfloat16, ours: has no time any more: its error is 3 times too large" in told
    assert "torch eager" not in told
    assert report(record(kept, refused=[{**refused, "provider": "torch eager"}]), base, "--fail-above", "10%") == 0


def test_nothing_in_common_is_no_success(record, report):
    base = record(entry(op="swiglu"), name="base.json")
    with pytest.raises(TrainingError, match="no row of ours in common"):
        report(record(entry()), base, "--fail-above", "10%")


def test_fail_above_needs_something_to_compare_with(record, report):
    with pytest.raises(TrainingError, match="name it after the new one"):
        report(record(entry()), "--fail-above", "10%")


@pytest.mark.parametrize("text", ["10", "0.1", "-5%", "ten%", "nan%", "inf%", "%"])
def test_what_is_no_percentage_is_refused(record, report, text, capsys):
    path = record(entry())
    with pytest.raises(SystemExit, match="2"):
        report(path, path, f"--fail-above={text}")
    assert "such as 10%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"could not read .*nowhere.json: No such file"),
        ('{"benchmarks": [', r"no whole JSON file .* cut off"),
        ("\x80", r"no whole JSON file"),
        ("[1]", r"no benchmark record .* give a file that `tilewright benchmark run` wrote"),
        ('{"benchmarks": []}', r"holds no benchmark record"),
        ('{"benchmarks": [], "tilewright_record": {"format": 2}}', r"no benchmark record of the format known here"),
        (
            '{"benchmarks": [1, {"extra_info": {"op": 3}}], "tilewright_record": {"format": 1}}',
            r"nothing in it was measured",
        ),
    ],
)
def test_what_is_no_record_is_refused_in_one_sentence(report, tmp_path, content, told):
    path = tmp_path / "nowhere.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(TrainingError, match=told) as caught:
        report(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_audit_is_refused(record, report, tmp_path):
    path = tmp_path / "audit.json"
    path.write_text('{"format": 2, "floors": []}')
    with pytest.raises(TrainingError, match="no audit of a format known here"):
        report(record(entry()), "--audit", path)
