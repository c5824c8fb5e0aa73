"""The page of an attribution: what each kernel buys with its interval, and what was not measured with the reason."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tilewright.benchmarks import attribution
from tilewright.benchmarks.report import attribution_page
from tilewright.cli.main import main

NASTY = """<script>alert("1")</script> & 'x'"""
FAST, SLOW = [1.0, 1.01, 0.99, 1.0, 1.0, 1.0, 1.0], [1.3] * 7


@pytest.fixture
def content() -> dict[str, Any]:
    """As the command writes it: two kernels that were replaced, one that buys nothing, one refused, one untouched."""
    measured = {"peak_memory_bytes": 200_000_000, "peak_memory_ratio": 2.0, "note": ""}
    row = {"time_ratio": None, "interval": None, "peak_memory_ratio": None, "peak_memory_bytes": None, "note": ""}
    return {
        "format": 1,
        "environment": {
            "device": "cpu", "time": "2026-11-22T04:58:02+00:00", "gpus": [], "cpu": {"model": "A CPU"},
            "git": {"commit": "0123456789abcdef", "dirty": False},
        },
        "definitions": {"time_ratio": "seconds without ÷ seconds with"},
        "recipe": {"name": "tiny", "compile": True, "compute_dtype": "bfloat16"},
        "tokens": "random ids",
        "tokens_per_step": 4096,
        "processes": 2,
        "seconds": [1.0, 0.99, 1.01],
        "peak_memory_bytes": 100_000_000,
        "rows": [
            {"kernel": "attention", "replaced_by": "a mask", "time_ratio": 1.3, "interval": [1.28, 1.31], **measured},
            {"kernel": "swiglu", "replaced_by": "its reference", "time_ratio": 0.9, "interval": [0.88, 0.95],
             **measured, "peak_memory_ratio": 1.0},
            {**row, "kernel": "rotary", "replaced_by": "a wrong one", "note": "refused: its loss is 3, not 2"},
            {**row, "kernel": "rms_norm", "replaced_by": "", "note": "its reference runs on cpu: nothing to buy"},
        ],
        "rounds": {"the step as it is": FAST, "attention by a mask": SLOW, "swiglu by its reference": FAST},
    }  # fmt: skip


@pytest.fixture
def write(tmp_path, read_page):
    """Write the page of an attribution; returns it."""

    def run(content):
        attribution_page.write(tmp_path / "page.html", attribution.recorded(content, tmp_path / "attribution.json"))
        page = read_page(tmp_path / "page.html")
        page.check()
        return page

    return run


def test_the_step_and_where_it_was_measured_head_the_page(write, content) -> None:
    text = write(content).text
    assert "measured on A CPU · commit 0123456789 · 2026-11-22" in text
    assert "A training step of tiny, compiled, bfloat16, 2 processes; tokens: random ids." in text
    assert "the step as it is 1 s 95% interval: 990 ms to 1.01 s" in text
    assert "tokens/s 4,096 all processes together" in text
    assert "peak memory 100 MB" in text
    assert "replacements that cost time 1 of 2" in text
    assert "time_ratio seconds without ÷ seconds with" in text
    assert "medians over 7 interleaved rounds" in text
    assert "recipe.compute_dtype bfloat16" in text


def test_each_replacement_has_its_ratio_with_its_interval_above_one_in_green(write, content) -> None:
    page = write(content)
    assert "attention a mask 1.3 s 1.30 [1.28, 1.31] 200 MB 2.00" in page.text
    assert "swiglu its reference 1 s 0.90 [0.88, 0.95] 200 MB 1.00" in page.text
    assert '<td class="number better">1.30 [1.28, 1.31]</td>' in page.source
    assert '<td class="number worse">0.90 [0.88, 0.95]</td>' in page.source
    assert '<td class="number">1.00</td>' in page.source


def test_time_and_memory_each_have_a_bar_for_every_replacement(write, content) -> None:
    page = write(content)
    assert page.plots == ["Time bought", "Peak memory bought"]
    time, memory = page.drawings()
    for drawn in (time, memory):
        assert ">attention: a mask<" in drawn
        assert ">swiglu: its reference<" in drawn
        assert "rotary" not in drawn
    assert (">1.30<" in time, ">0.90<" in time) == (True, True)
    assert (">2.00<" in memory, ">1.00<" in memory) == (True, True)
    # One gains and one loses; of the memory one gains, the other is neither.
    assert [color in time for color in ("var(--third)", "var(--fifth)", "var(--eighth)")] == [True, True, False]
    assert [color in memory for color in ("var(--third)", "var(--fifth)", "var(--eighth)")] == [True, False, True]


def test_what_was_not_measured_says_why(write, content) -> None:
    text = write(content).text
    assert "rotary a wrong one refused: its loss is 3, not 2" in text
    assert "rms_norm its reference runs on cpu: nothing to buy" in text


def test_an_attribution_without_a_replacement_has_no_plot(write, content) -> None:
    content["rows"] = content["rows"][-1:]
    page = write(content)
    assert page.plots == []
    assert "nothing to buy" in page.text


def test_what_a_file_says_is_text_and_nothing_else(write, content) -> None:
    for row in content["rows"]:
        row["kernel"] = row["replaced_by"] = NASTY
    content |= {"tokens": NASTY, "recipe": {"name": NASTY, NASTY: NASTY}, "definitions": {NASTY: NASTY}}
    page = write(content)
    assert "<script" not in page.source
    assert page.text.count(NASTY) > 10


def test_the_command_makes_the_page_of_what_attribute_wrote(tiny_recipe, tmp_path, read_page) -> None:
    measured, page = tmp_path / "attribution.json", tmp_path / "page.html"
    recipe = str(tiny_recipe(batch__sequences=2))
    assert main(["benchmark", "attribute", recipe, "--steps", "6", "--json", str(measured)]) == 0
    assert main(["benchmark", "report", str(measured), "--output", str(page)]) == 0
    shown = read_page(page)
    shown.check()
    assert shown.plots == ["Time bought", "Peak memory bought"]
    content = json.loads(measured.read_text())
    assert (content["tokens_per_step"], content["processes"]) == (2 * 32, 1)
    for row in content["rows"]:
        if row["interval"]:
            low, high = row["interval"]
            assert f"{row['time_ratio']:.2f} [{low:.2f}, {high:.2f}]" in shown.text
    assert f"tokens/s {2 * 32 / content['seconds'][0]:,.0f} all processes" in shown.text


@pytest.mark.parametrize("options", [["BASE.json"], ["--fail-above", "10%"], ["--audit", "audit.json"]])
def test_an_attribution_is_compared_with_nothing(content, tmp_path: Path, capsys, options) -> None:
    path = tmp_path / "attribution.json"
    path.write_text(json.dumps(content))
    assert main(["benchmark", "report", str(path), *options, "--output", str(tmp_path / "page.html")]) == 2
    assert "is an attribution, which is compared with nothing: give it without BASE.json" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "holds no attribution of the format known here (1)"),
        ({"rows": [{"kernel": "swiglu"}]}, "holds an attribution that is damaged (KeyError('interval'))"),
        ({"rows": 3}, "holds an attribution that is damaged"),
        ({"rounds": {"swiglu": [1.0, "a"]}}, "holds an attribution that is damaged"),
        ({"rounds": []}, "holds an attribution that is damaged"),
        ({"seconds": [1.0]}, "holds an attribution that is damaged"),
        ({"recipe": 3}, "holds an attribution that is damaged"),
    ],
)
def test_a_damaged_attribution_is_refused_in_one_sentence(content, tmp_path: Path, capsys, change, told) -> None:
    path = tmp_path / "attribution.json"
    path.write_text(json.dumps(copy.deepcopy(content) | change))
    assert main(["benchmark", "report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "measure it anew with `tilewright benchmark attribute`" in error
