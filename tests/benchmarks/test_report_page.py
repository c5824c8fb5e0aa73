"""The page of a benchmark record: its figures, its plots, and that it needs nothing from outside."""

import json

import pytest

from tilewright.benchmarks.report import benchmark_page, records
from tilewright.benchmarks.report.tables import amount, seconds

NASTY = """<script>alert("1")</script> & 'x' $\\nope$"""
GPU = {
    "device": "cuda",
    "time": "2026-11-22T04:58:02+00:00",
    "gpus": [{"name": "A GPU", "capability": "9.0"}],
    "git": {"commit": "0123456789abcdef", "dirty": True},
}
TIMES = {"ours": 1e-3, "torch eager": 2e-3, "torch.compile": 0.8e-3}


def entries(times=TIMES, op="rms_norm", shapes=("1B 2k", "8B 2k"), passes=("forward", "backward"), dtype="bfloat16"):
    for shape in shapes:
        for direction in passes:
            for provider, median in times.items():
                info = {
                    "op": op, "sample": shape, "dtype": dtype, "pass": direction, "provider": provider,
                    "median_seconds": median, "interval_seconds": [0.98 * median, 1.03 * median],
                    "bytes_per_second": 1.5e12, "flops_per_second": 2e12, "share_of_measured_peak": 0.5,
                    "peak_memory_bytes": int(1e9 * median), "algorithm_memory_bytes": 500_000,
                }  # fmt: skip
                yield {"extra_info": info, "stats": {"data": [median] * 11}}


@pytest.fixture
def write(tmp_path, read_page):
    """Write the report of some entries, beside a base of others if given; returns the page."""

    def record(name, listed, environment, definitions, **absent):
        path = tmp_path / name
        ours = {"format": 1, "environment": environment, "definitions": definitions, **absent}
        path.write_text(json.dumps({"benchmarks": list(listed), "tilewright_record": ours}))
        return records.read(path)

    def run(new, base=None, *, environment=GPU, definitions=None, audit=None, **absent):
        definitions = definitions or {"bytes_per_second": "compulsory bytes ÷ median_seconds"}
        of_new = record("new.json", new, environment, definitions, **absent)
        of_base = None if base is None else record("base.json", base, environment, definitions)
        benchmark_page.write(tmp_path / "report.html", of_new, of_base, audit)
        page = read_page(tmp_path / "report.html")
        page.check()
        return page

    return run


def test_where_it_was_measured_and_what_the_figures_mean_stand_on_the_page(write):
    text = write(entries()).text
    assert "measured on A GPU · commit 0123456789, with changes that are not committed · 2026-11-22" in text
    assert "bytes_per_second compulsory bytes ÷ median_seconds" in text
    assert "gpus.0.capability 9.0" in text
    assert "95% order-statistic interval" in text


def test_every_op_and_pass_has_a_plot_over_its_shapes(write):
    page = write([*entries(), *entries(op="swiglu", passes=("forward",))])
    assert page.plots == [
        "Time, ours ÷ other", "Peak memory, ours ÷ other", "rms_norm forward", "rms_norm backward", "swiglu forward",
    ]  # fmt: skip
    plot = page.drawings()[2]
    for text in (">1B 2k<", ">8B 2k<", ">ours<", ">torch eager<", ">torch.compile<", ">ms<"):
        assert text in plot


def test_dtypes_have_plots_of_their_own(write):
    page = write([*entries(passes=("both",)), *entries(passes=("both",), dtype="float32")])
    assert page.plots[2:] == ["rms_norm both bfloat16", "rms_norm both float32"]


def test_a_row_shows_its_figures_and_ours_over_it(write):
    text = write(entries(passes=("forward",))).text
    assert "1B 2k bfloat16 forward torch eager 2 ms 1.96 ms to 2.06 ms 1,500.0 2 50.0% 2 MB 500 kB 0.50 0.50" in text
    assert "torch.compile 800 µs 784 µs to 824 µs 1,500.0 2 50.0% 800 kB 500 kB 1.25 1.25" in text


def test_headlines_count_the_cases_in_which_another_is_faster(write):
    text = write([*entries(), *entries({"ours": 1.0, "torch eager": 3.0}, op="swiglu")]).text
    assert "another is faster 4 of 8" in text
    assert "another needs less memory 4 of 8" in text
    assert "times measured 20 of 8 cases" in text


def test_what_was_not_measured_says_why(write):
    absent = {"op": "rms_norm", "sample": "8B 2k", "dtype": "bfloat16"}
    refused = [{**absent, "provider": "liger-kernel", "reason": "its error is 3.1 times what is accepted"}]
    left_out = [
        {**absent, "op": op, "provider": "apex", "reason": "not installed"} for op in ("rms_norm", "rms_norm", "adamw")
    ]
    text = write(entries(), refused=refused, left_out=left_out).text
    assert "refused a time 1" in text
    assert "rms_norm 8B 2k bfloat16 liger-kernel its error is 3.1 times what is accepted" in text
    assert "apex not installed rms_norm, adamw" in text


def test_against_a_base_the_page_shows_what_differs_and_what_is_gone(write):
    slower = {**TIMES, "ours": 1.5e-3}
    page = write(entries(slower), [*entries(), *entries(op="swiglu", shapes=("1B 2k",), passes=("both",))])
    assert "4 of 12 rows differ" in page.text
    assert "1.5 ms 1 ms 1.50 1.50" in page.text
    assert "3 rows of the base that the new record lacks swiglu 1B 2k bfloat16 both, ours;" in page.text
    assert page.plots[:2] == ["Time of ours, new ÷ base", "Peak memory of ours, new ÷ base"]
    assert "Different devices" not in page.text


def test_memory_that_is_the_same_needs_no_plot(write):
    assert write(entries(), entries()).plots[:2] == ["Time of ours, new ÷ base", "Time, ours ÷ other"]


def test_records_with_nothing_in_common_say_so(write):
    assert "new.json and base.json have no row in common" in write(entries(), entries(op="swiglu")).text


def test_predicted_stands_beside_measured(write):
    text = write(entries(passes=("forward",))).text
    assert "the peaks of memory and matrix products that the same run measured" in text
    assert "rms_norm 1B 2k bfloat16 forward, ours 500 kB 1 MB 2.00 500 µs 1 ms 2.00" in text


def test_an_audit_gives_the_predicted_time_of_its_own_chip(write):
    floor = {"op": "rms_norm", "sample": "1B 2k", "pass": "forward", "bound": "memory"}
    times = {90: 250.0, 80: 900.0}
    audit = {"floors": [{**floor, "chip": chip, "predicted_microseconds": time} for chip, time in times.items()]}
    text = write(entries(passes=("forward",)), audit=audit).text
    assert "the datasheet's peaks of this chip" in text
    assert "rms_norm 1B 2k bfloat16 forward, ours 500 kB 1 MB 2.00 250 µs 1 ms 4.00" in text
    assert "rms_norm 8B 2k bfloat16 forward, ours 500 kB 1 MB 2.00 n/a 1 ms n/a" in text


def test_what_a_file_says_is_text_and_nothing_else(write):
    page = write(
        entries({NASTY: 1.0, "ours": 1.0}, op=NASTY, shapes=(NASTY,), passes=(NASTY,), dtype=NASTY),
        entries({NASTY: 1.0, "ours": 1.0}, op=NASTY, shapes=(NASTY,), passes=(NASTY,), dtype=NASTY),
        environment={"device": "cpu", NASTY: NASTY, "cpu": {"model": NASTY}, "time": NASTY},
        definitions={NASTY: NASTY},
    )
    assert "<script" not in page.source
    assert page.text.count(NASTY) > 10


def test_quantities_take_the_unit_that_fits():
    assert [seconds(t) for t in (None, 2.5, 0.9996, 1.234e-3, 9.994e-4, 5e-7, 90061.0)] == [
        "n/a", "2.5 s", "1 s", "1.23 ms", "999 µs", "500 ns", "90,061 s",
    ]  # fmt: skip
    assert [amount(b) for b in (None, 0, 999, 1500, 2.5e6, 12e9, 3e12)] == [
        "n/a", "0 B", "999 B", "1.5 kB", "2.5 MB", "12 GB", "3,000 GB",
    ]  # fmt: skip
