"""The report of a run: what it shows, what it says is missing, and that it needs nothing from outside."""

import json
import os
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from tilewright.trainer import TrainingError
from tilewright.trainer.record.grad_norm_map import GradNorms, _labelled
from tilewright.trainer.record.metrics import read_metrics
from tilewright.trainer.record.report import write_report
from tilewright.trainer.record.report_plots import _thin, plots, smoothed, tokens_at

STEPS = 60
NASTY = """<script>alert("1")</script> & 'x' $\\nope$"""
TITLES = ["Training loss", "Held-out text", "Throughput", "MFU", "Memory", "Gradient norm", "Learning rate"]


def training_line(step, **changes):
    return {
        "step": step,
        "loss": 8.0 - step / 10,
        "lr": 1e-3,
        "grad_norm": 0.8,
        "tokens": 1000 * step,
        "tokens_per_second": 7000.0 + step,
        "mfu": 0.40 + step / 10_000,
        "peak_memory_bytes": 1_000_000_000 + step * 1_000_000,
        **changes,
    }


def evaluation_line(step, name="heldout"):
    bits = 8.0 / (1 + step / 20)
    return {"step": step, "eval": {name: {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": bits, "tokens": 4096}}}


SUMMARY = {
    "name": "quickstart",
    "status": "finished",
    "steps": STEPS,
    "tokens": 60_000,
    "seconds": 912.4,
    "heldout": {"bits_per_byte": 1.5523, "gzip_bits_per_byte": 2.0131, "xz_bits_per_byte": 1.7312, "bytes": 10**6},
    "matmul_peak_flops": 0.8e12,
    "parameters": 4_213_000,
    "sample": {"prompt": "def f(x):", "continuation": "\n    return x < 1\n"},
}
ENVIRONMENT = {
    "time": "2026-11-22T04:58:02+00:00",
    "world_size": 1,
    "cpu": {"model": "A CPU", "cores": 2, "flags": ["avx2", "amx_bf16"]},
    "memory_bytes": 25_300_000_000,
    "gpus": [],
    "git": None,
}


@pytest.fixture
def write(tmp_path, read_page):
    """Write a run directory and its report; returns the page. None for a file leaves it out."""

    def run(*, training=None, evaluations=None, summary=SUMMARY, environment=ENVIRONMENT, recipe="name: quickstart\n"):
        folder = tmp_path / "run-001"
        folder.mkdir(exist_ok=True)
        training = [training_line(step) for step in range(1, STEPS + 1)] if training is None else training
        evaluations = [evaluation_line(step) for step in (0, 20, 40, 60)] if evaluations is None else evaluations
        if training or evaluations:
            lines = (json.dumps(line) + "\n" for line in [*training, *evaluations])
            (folder / "metrics.jsonl").write_text("".join(lines))
        if summary is not None:
            (folder / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
        if environment is not None:
            (folder / "environment.json").write_text(json.dumps(environment))
        if recipe is not None:
            (folder / "recipe.yaml").write_text(recipe)
        assert write_report(folder) == folder / "report.html"
        return read_page(folder / "report.html")

    return run


def test_the_headlines_of_a_finished_run(write):
    text = write().text
    for figure in (
        "quickstart finished", "60 steps · A CPU · 2026-11-22T04:58:02+00:00",
        "held-out bits per byte 1.552 gzip -9: 2.013 · xz -9: 1.731",
        "training loss 2.000 nats per token, from 7.900", "parameters 4.21 M", "tokens trained on 60.0 k",
        "time in steps 15m12s", "tokens per second 7,030 median", "MFU 40.3% of 0.80 TFLOP/s", "peak memory 1.06 GB",
    ):  # fmt: skip
        assert figure in text


def test_every_plot_is_there_and_the_page_is_well_formed(write):
    page = write()
    assert page.plots == TITLES
    assert page.open == []
    assert "gzip -9: 2.013" in page.source
    assert "xz -9: 1.731" in page.source


def test_recipe_environment_sample_and_definition_stand_on_the_page(write):
    text = write(recipe="name: quickstart\nsteps: 60\n").text
    assert "name: quickstart steps: 60" in text
    assert "cpu.flags avx2, amx_bf16" in text
    assert "world_size 1" in text
    assert "memory 25.30 GB" in text
    assert "git none" in text
    assert "def f(x): return x < 1" in text
    definition = "6 * parameters in matrix products + 12 * layers * heads * head_dim * sequence_length"
    assert definition.replace("*", "\N{MULTIPLICATION SIGN}") in text
    assert "matmul peak measured on this machine at the start of the run" in text


def test_the_page_needs_nothing_and_runs_nothing_and_takes_its_own_colours(write):
    page = write()
    page.check()
    assert len(page.ids) > 100
    assert {"--first", "--second", "--third", "--line", "--soft"} <= page.colours


def test_what_a_user_wrote_is_text_and_nothing_else(write):
    summary = {**SUMMARY, "name": NASTY, "status": NASTY, "sample": {"prompt": NASTY, "continuation": NASTY}}
    evaluations = [evaluation_line(step, name=NASTY) for step in (0, 30)]
    page = write(
        summary=summary,
        evaluations=evaluations,
        recipe=f"name: {NASTY}",
        environment={NASTY: NASTY, "cpu": {"model": NASTY}},
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<script" not in page.source
    # Title and heading, status, machine, set, recipe, prompt and continuation, the table's two cells and its model.
    assert page.text.count(NASTY) == 11


def test_an_interrupted_run_says_so_and_shows_what_there_is(write):
    page = write(summary=None, environment=None, recipe=None)
    assert "run-001 not finished" in page.text
    assert "Missing or unreadable here: summary.json, environment.json, recipe.yaml." in page.text
    assert "it was interrupted, or is still going on" in page.text
    assert "held-out bits per byte 2.000" in page.text
    assert "tokens trained on 60.0 k" in page.text
    assert "MFU 40.3% median step" in page.text
    assert page.plots == TITLES
    assert "time in steps" not in page.text
    assert "gzip" not in page.text.lower()


def test_a_run_directory_that_holds_nothing_still_has_a_report(write):
    page = write(training=[], evaluations=[], summary=None, environment=None, recipe=None)
    assert page.plots == []
    assert "metrics.jsonl" in page.text
    assert "No step has been recorded" in page.text


@pytest.mark.parametrize("summary", ['{"name": ', "[1, 2]", ""])
def test_a_damaged_summary_counts_as_missing(write, summary):
    assert "Missing or unreadable here: summary.json." in write(summary=summary).text


def test_fields_of_the_wrong_kind_are_left_out(write):
    summary = {
        "name": None,
        "status": 3,
        "seconds": "long",
        "heldout": [1],
        "sample": "text",
        "parameters": True,
    }
    text = write(summary=summary).text
    assert "run-001 3" in text
    assert not re.search("time in steps|parameters [0-9]|continuation", text)


def test_without_mfu_there_is_no_plot_of_it_and_losses_that_were_not_finite_leave_a_gap(write):
    training = [training_line(step, mfu=None, loss=None if step < 10 else 2.0) for step in range(1, 30)]
    page = write(training=training)
    assert page.plots == [title for title in TITLES if title != "MFU"]
    assert "training loss 2.000 nats per token, from 2.000" in page.text


def observed_line(step, **changes):
    kinds = {
        "parameters": 10**8,
        "gradients": 10**8,
        "optimizer": 2 * 10**8,
        "activations": None if step < 3 else 10**8,
    }
    seconds = {"data": 0.01, "forward": 0.04, "backward": 0.08, **({"checkpoint": 0.3} if step == 20 else {})}
    line = training_line(
        step, hfu=0.5, memory=kinds, seconds=seconds, tokens_per_second_since_start=5000.0, profiled=False
    )
    return {**line, **changes}


def plot_of(page, title):
    (drawing,) = (drawing for drawing in page.drawings() if f'aria-label="{title}"' in drawing)
    return drawing


def test_speed_and_memory_by_their_parts(write):
    page = write(training=[observed_line(step) for step in range(1, STEPS + 1)])
    page.check()
    assert page.plots == [*TITLES[:4], "Time by phase", *TITLES[4:]]
    assert "median step; 5,000 with all pauses" in page.text
    assert "MFU 40.3% of 0.80 TFLOP/s · HFU 50.0%" in page.text
    for title, names in {
        "Throughput": {"each step", "since the start, pauses counted"},
        "MFU": {"MFU", "HFU, with what is computed again"},
        "Time by phase": {"forward", "backward", "data", "checkpoint", "other"},
        "Memory": {"parameters", "optimizer", "gradients", "activations", "peak so far"},
    }.items():
        assert names <= set(re.findall(r">([^<>]*)</text>", plot_of(page, title))), title


@pytest.mark.parametrize("steps", [1, 2, 3, 2000])
def test_a_run_of_any_length_has_its_plots(write, steps):
    page = write(training=[observed_line(step) for step in range(1, steps + 1)])
    assert {"Time by phase", "Memory"} <= set(page.plots)


def test_hfu_is_left_out_where_it_is_mfu_or_not_known(write):
    for hfu in (lambda mfu: mfu, lambda mfu: None):
        training = [observed_line(step, hfu=hfu(training_line(step)["mfu"])) for step in range(1, 30)]
        page = write(training=training)
        assert "· HFU" not in page.text
        assert "HFU" not in plot_of(page, "MFU")


def test_steps_that_were_profiled_say_nothing_of_the_speed(write):
    slow = {"tokens_per_second": 9.0, "mfu": 0.0001, "hfu": 0.0002, "profiled": True}
    training = [observed_line(step, **(slow if step % 3 else {})) for step in range(1, STEPS + 1)]
    page = write(training=training)
    assert "tokens per second 7,032 median step" in page.text
    assert "MFU 40.3%" in page.text
    unknown = {"tokens_per_second": None, "mfu": None, "hfu": None, "seconds": {}}
    without = write(training=[{**line, **unknown} if line["profiled"] else line for line in training])
    for title in ("Throughput", "MFU", "Time by phase"):
        assert plot_of(page, title) == plot_of(without, title)


def test_the_page_of_a_run_that_goes_on_says_how_far_it_is_and_is_read_again(write, tmp_path, read_page):
    write(summary=None, training=[training_line(15)], recipe="name: quickstart\nsteps: 60\n")
    page = read_page(write_report(tmp_path / "run-001", running=True))
    page.check()
    assert "run-001 running 15 of 60 steps · A CPU This page was last written at 2" in page.text
    assert ("div", [("style", "width: 25.0%")]) in page.elements
    assert ("meta", [("http-equiv", "refresh"), ("content", "30")]) in page.elements
    assert "Missing" not in page.text
    assert "http-equiv" not in write(summary=None).source


@pytest.mark.parametrize("recipe", ["steps: many\n", "[1, 2]", "a: [", "steps: 0", None])
def test_a_recipe_that_does_not_say_how_many_steps_there_will_be_is_no_harm(write, tmp_path, read_page, recipe):
    write(summary=None, recipe=recipe)
    page = read_page(write_report(tmp_path / "run-001", running=True))
    assert "running 60 steps" in page.text
    assert '<div class="progress">' not in page.source


def test_all_plots_span_the_same_tokens(write):
    page = write(evaluations=[evaluation_line(0)])
    for plot in page.source.split("<svg")[1:]:
        assert re.findall(r">([0-9]+ k|0)<", plot.split("axis_2")[0]) == ["0", "15 k", "30 k", "45 k", "60 k"]


def test_two_evaluated_sets_are_told_apart(write):
    lines = [evaluation_line(step) for step in (0, 30)] + [evaluation_line(30, name="code")]
    source = write(evaluations=lines).source
    plot = source[source.index('aria-label="Held-out text"') :].split("</svg>")[0]
    assert re.findall(r">(heldout|code)<", plot) == ["heldout", "code"]


def test_a_later_report_replaces_the_earlier_one(write, tmp_path):
    write(summary=None)
    assert "finished" in write().text.split()[:3]
    names = {path.name for path in (tmp_path / "run-001").iterdir()}
    assert names == {"metrics.jsonl", "summary.json", "environment.json", "recipe.yaml", "report.html"}


def test_a_missing_run_directory_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"no run directory .*nowhere; name one"):
        write_report(tmp_path / "nowhere")


def test_a_report_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "something").touch()
    with pytest.raises(TrainingError, match=r"could not write .*report\.html"):
        write_report(tmp_path)


def test_an_evaluation_between_recorded_steps_stands_at_its_share_of_the_tokens():
    training = [training_line(10), training_line(20, tokens=50_000)]
    assert tokens_at(np.array([0.0, 5, 10, 15, 20]), training).tolist() == [0, 5000, 10_000, 30_000, 50_000]


def test_smoothing_neither_lags_nor_bends_at_the_ends():
    line = np.linspace(8, 2, 400)
    assert np.allclose(smoothed(line)[20:-20], line[20:-20])
    assert np.allclose(smoothed(np.full(400, 3.0)), 3.0)
    assert smoothed(np.array([1.0, 2.0])).tolist() == [1.5, 1.5]
    assert smoothed(np.array([])).tolist() == []


def test_smoothing_leaves_out_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, np.inf, 5.0])
    assert smoothed(values)[2] == 3.0
    assert np.isnan(smoothed(np.full(40, np.nan))).all()


def test_a_long_curve_is_thinned_without_losing_its_spikes():
    values = np.sin(np.arange(100_000) / 1e4)
    values[12_345], values[54_321], values[700] = 9.0, -9.0, np.nan
    places, kept = _thin(np.arange(100_000.0), values)
    assert len(kept) <= 1000
    assert (np.diff(places) > 0).all()
    assert kept[places == 12_345] == 9.0
    assert kept[places == 54_321] == -9.0


def test_a_long_run_makes_no_larger_a_page_than_it_must():
    training = [training_line(step, loss=3.0 + (step * 7919 % 100) / 100) for step in range(1, 20_001)]
    assert all(len(plot.svg) < 200_000 for plot in plots(training, [], {}, GradNorms()))


@pytest.mark.parametrize(
    ("recipe", "seconds"),
    [
        # Lines of 0.5 s a step: what is written every 50 steps comes every 25 s, and the page when 120 s are over.
        ("steps: 60\nevaluation: {every: 50}\ncheckpoints: {every: 0}", 125),
        ("steps: 60\nevaluation: {every: 5000}\ncheckpoints: {every: 1000}", 500),
        ("steps: 60\nevaluation: {every: 0}", None),
        ("steps: [", None),
    ],
)
def test_the_page_of_a_run_that_goes_on_says_when_it_was_written_and_when_it_will_be(
    write, tmp_path, read_page, recipe, seconds
):
    training = [training_line(step, tokens_per_second=2000.0) for step in (1, 2, 3)]
    write(summary=None, training=training, recipe=recipe)
    before = datetime.now(UTC)
    text = read_page(write_report(tmp_path / "run-001", running=True)).text
    said = re.search(r"last written at (.{19}) UTC, next (.*?)\. Long after that, the run has ended", text)
    written, following = said.groups()
    written = datetime.fromisoformat(written + "+00:00")
    assert before.replace(microsecond=0) <= written <= datetime.now(UTC)
    if seconds is None:
        assert following == "at an evaluation or a checkpoint"
    else:
        following = datetime.fromisoformat(following.removeprefix("around ").replace(" UTC", "+00:00"))
        assert following - written == timedelta(seconds=seconds)


def test_the_page_of_a_run_that_was_killed_says_when_it_last_recorded_something(write, tmp_path):
    write(summary=None)
    recorded = datetime(2026, 11, 20, 1, 2, 3, tzinfo=UTC)
    os.utime(tmp_path / "run-001" / "metrics.jsonl", (recorded.timestamp(), recorded.timestamp()))
    text = write(summary=None, training=[], evaluations=[]).text
    days = (datetime.now(UTC) - recorded).days
    assert f"Last recorded at 2026-11-20 01:02:03 UTC, {days}d" in text
    assert "before this page was written; a step takes 0.14 s." in text
    assert "Last recorded" not in write().text


def norms_taken(*lines):
    """Gradient norms of lines that are each the tokens so far and the norms by place."""
    norms = GradNorms()
    for tokens, by_place in lines:
        norms.take({"tokens": tokens, "grad_norms": by_place})
    return norms


def test_gradient_norms_by_block_are_drawn_and_what_was_not_finite_is_said(write):
    training = [
        training_line(n, grad_norms={"embedding": 0.05, "blocks.0": 0.5 * n, "head": 0.2}) for n in range(1, 30)
    ]
    page = write(training=training)
    page.check()
    assert page.plots == [*TITLES[:6], "Gradient norm by block", TITLES[6]]
    drawing = plot_of(page, "Gradient norm by block")
    assert {"embedding", "blocks.0", "head", "2-norm", "0.1", "1", "10"} <= set(
        re.findall(r">([^<>]*)</text>", drawing)
    )
    assert "the first row to turn yellow." in page.text
    assert "Red: not finite" not in page.text
    training[7]["grad_norms"]["head"] = None
    assert "Red: not finite" in write(training=training).text


def test_each_step_of_a_short_run_has_a_column_of_its_own_and_no_place_goes_under():
    grid = norms_taken(
        (1000, {"embedding": 1.0, "blocks.0": 2.0}),
        (2000, {"embedding": 3.0, "blocks.0": None}),
        (3000, {"embedding": 5.0, "late": 6.0}),
    ).grid()
    assert grid.places == ["embedding", "blocks.0", "late"]
    assert grid.end == 3000
    unknown = np.nan
    expected = [[1.0, 3.0, 5.0], [2.0, np.inf, unknown], [unknown, unknown, 6.0]]
    np.testing.assert_array_equal(grid.cells, expected)


def test_no_step_of_a_long_run_is_lost_in_the_map_and_the_map_stays_small():
    steps, blocks = 20_011, 40
    quiet = {f"blocks.{block}": 0.1 for block in range(blocks)}
    spikes = {place: 1 + 511 * place for place in range(blocks)}
    lines = [[1024 * step, quiet] for step in range(1, steps + 1)]
    for place, step in spikes.items():
        lines[step - 1][1] = {**quiet, f"blocks.{place}": 7.0}
    norms = norms_taken(*lines)
    grid = norms.grid()
    assert grid.cells.shape == (blocks, 320)
    for place, step in spikes.items():
        # Of the step's tokens, from the first to the last.
        first, last = (step - 1) * 320 // steps, (step * 320 - 1) // steps
        assert np.flatnonzero(grid.cells[place] > 1).tolist() == list(range(first, last + 1))
    training = [training_line(step) for step in (1, 10, steps)]
    (drawn,) = (plot for plot in plots(training, [], {}, norms) if plot.title == "Gradient norm by block")
    assert len(drawn.svg) < 100_000


def test_a_step_with_more_tokens_than_others_is_as_wide_as_its_tokens():
    grid = norms_taken(
        (1000, {"head": 1.0}), (4000, {"head": 2.0}), (5000, {"head": 3.0}), (6000, {"head": 4.0})
    ).grid()
    # Columns of 1,500 tokens: the first has a part of the second step, the third all of the third step.
    assert grid.cells.tolist() == [[2.0, 2.0, 3.0, 4.0]]


def test_norms_that_are_zero_or_the_same_or_of_no_use_are_drawn_or_left_out(write):
    for norms in ({"head": 0.0}, {"head": 0.5}, {"head": None}):
        page = write(training=[training_line(step, grad_norms=norms) for step in (1, 2)])
        page.check()
        assert "Gradient norm by block" in page.plots
    for norms in ({}, None, "text"):
        assert "Gradient norm by block" not in write(training=[training_line(1, grad_norms=norms)]).plots


def test_the_rows_of_a_few_blocks_are_all_named_and_those_of_many_at_distances_that_can_be_read():
    assert _labelled(["embedding", "blocks.0", "norm", "head"]) == [0, 1, 2, 3]
    places = ["embedding", *(f"blocks.{block}" for block in range(80)), "norm", "head"]
    named = [places[row] for row in _labelled(places)]
    assert named == ["embedding", *(f"blocks.{block}" for block in range(10, 80, 10)), "head"]


def test_the_norms_of_a_run_are_not_held_as_they_were_read(tmp_path):
    path, norms = tmp_path / "metrics.jsonl", GradNorms()
    path.write_text(json.dumps(training_line(1, grad_norms={"head": 0.5})) + "\n")
    assert read_metrics(path, lighten=norms.take)[0] == [training_line(1)]
    assert norms.grid().cells.tolist() == [[0.5]]
