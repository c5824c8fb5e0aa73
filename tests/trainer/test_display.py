"""What one sees while training, on a terminal and in a log."""

import io
import re

import pytest
from rich.console import Console

from tilewright.trainer.record.display import Display, NullDisplay, _sparkline, _Trace
from tilewright.trainer.record.quantities import decimal, duration, gigabytes, percent, short

RESULT = {"heldout": {"loss": 3.9, "perplexity": 49.402, "bits_per_byte": 1.8734, "tokens": 65536}}


class Screen:
    """A display on a console of 100 columns that writes into a string, and a clock set by hand."""

    def __init__(self, terminal, width=100):
        self.now = 1000.0
        self.out = io.StringIO()
        console = Console(file=self.out, force_terminal=terminal, width=width, color_system=None)
        self.display = Display(console, clock=lambda: self.now)

    def start(self, total=800, start_step=0):
        self.display.start("quickstart", total, start_step, {"parameters": "4.2 M", "where": "[cpu]"})

    def step(self, step, after=0.0, **changes):
        self.now += after
        fields = {
            "step": step,
            "loss": 4.2131,
            "lr": 1.2e-3,
            "grad_norm": 0.834,
            "tokens": 8192 * step,
            "sample": 0,
            "sequences": 8,
            "sequence_length": 32,
            "tokens_per_second": 7210.4,
            "tokens_per_second_since_start": 6543.2,
            "mfu": 0.4123,
            "hfu": 0.4987,
            "peak_memory_bytes": 1_120_000_000,
            "memory": {"parameters": 40_000_000, "activations": 530_000_000},
            "data_wait": 0.01,
            "checkpoint_in_flight": False,
            "grad_norms": {"embedding": 0.6, "blocks.0": 0.8},
            "seconds": {"forward": 0.25, "backward": 0.5},
            "skipped": False,
            "profiled": False,
            "slowest_rank": None,
            "slowest_behind": None,
        }
        self.display.step(**{**fields, **changes})

    @property
    def text(self):
        return self.out.getvalue()

    @property
    def lines(self):
        return [line for line in self.text.splitlines() if line.startswith("step")]

    def panel(self):
        """The live panel drawn once."""
        out = io.StringIO()
        console = self.display.console
        Console(file=out, force_terminal=True, width=console.width, color_system=None).print(self.display.panel())
        return out.getvalue()


@pytest.fixture
def log():
    return Screen(terminal=False)


@pytest.fixture
def terminal():
    screen = Screen(terminal=True)
    yield screen
    screen.display.stop()


def test_a_plain_line_gives_every_figure(log):
    log.start()
    log.step(119)
    log.step(120, after=10.0)
    assert log.lines[-1] == (
        "step 120/800  loss 4.213  lr 1.2e-03  grad 0.83  7,210 tokens/s  MFU 41.2%  1.12 GB  1h53m left"
    )


def test_plain_output_begins_with_the_run_and_its_facts_as_they_are(log):
    log.start(start_step=100)
    assert log.text.splitlines() == [
        "quickstart: 800 steps, from step 100",
        "  parameters  4.2 M",
        "  where       [cpu]",
    ]


def test_plain_lines_are_five_seconds_apart_but_the_first_and_the_last_always_come(log):
    log.start(total=10)
    for step in range(1, 11):
        log.step(step, after=1.4)
    assert [line.split("/")[0] for line in log.lines] == ["step 1", "step 5", "step 9", "step 10"]


def test_the_time_left_follows_the_recent_steps_not_the_slow_first_one(log):
    log.start()
    log.step(1, after=300.0)
    assert "left" not in log.lines[-1]
    for step in range(2, 62):
        log.step(step, after=6.0)
    assert log.lines[-1].endswith(f"  {duration(6.0 * (800 - 61))} left")
    # Now each takes 2 s: when 50 of them are done, the slower ones are forgotten.
    for step in range(62, 112):
        log.step(step, after=2.0)
    log.step(112, after=8.0)
    per_step = (8.0 + 48 * 2.0) / 49
    assert log.lines[-1].endswith(f"  {duration(per_step * (800 - 112))} left")


def test_the_time_left_counts_anew_from_where_a_run_went_back(log):
    log.start()
    for step in (1, 2, 3, 9):
        log.step(step, after=6.0)
    log.step(4, after=6.0)
    assert "left" not in log.lines[-1]
    log.step(5, after=6.0)
    assert log.lines[-1].endswith(f"  {duration(6.0 * (800 - 5))} left")


def test_nothing_is_left_after_the_last_step(log):
    log.start(total=2)
    log.step(1)
    log.step(2, after=3.0)
    assert log.lines[-1].endswith("  0s left")


def test_without_a_peak_mfu_is_not_available(log):
    log.start()
    log.step(1, mfu=None)
    assert "  MFU n/a  " in log.lines[0]


def test_evaluations_and_messages_are_always_written_to_a_log(log):
    log.start()
    log.display.evaluation(0, RESULT)
    log.step(1)
    log.display.evaluation(1, {**RESULT, "code": RESULT["heldout"]})
    log.display.message("scoring [all] held-out text")
    assert log.text.splitlines()[3:] == [
        "eval 0/800  heldout  1.873 bits/byte  loss 3.900  perplexity 49.4  65,536 tokens",
        "step 1/800  loss 4.213  lr 1.2e-03  grad 0.83  7,210 tokens/s  MFU 41.2%  1.12 GB",
        "eval 1/800  heldout  1.873 bits/byte  loss 3.900  perplexity 49.4  65,536 tokens",
        "eval 1/800  code  1.873 bits/byte  loss 3.900  perplexity 49.4  65,536 tokens",
        "scoring [all] held-out text",
    ]


def test_a_log_holds_no_escape_sequences(log):
    with log.display:
        log.start()
        log.step(1)
        log.display.evaluation(1, RESULT)
    assert "\x1b" not in log.text


@pytest.mark.parametrize("width", [50, 80, 100])
def test_the_panel_shows_every_figure_whole_at_any_width(width):
    screen = Screen(terminal=True, width=width)
    with screen.display:
        screen.start()
        screen.step(199, after=61.0)
        screen.step(200, after=2.0)
        screen.display.evaluation(200, RESULT)
        text = screen.panel()
    words = " ".join(re.sub(r"[│╭╮╰╯─━╸╺]", " ", text).split())
    for figure in (
        "quickstart", "step 200/800 25%", "loss 4.213", "tokens/s 7,210", "lr 1.2e-03", "MFU 41.2%", "grad norm 0.83",
        "memory 1.12 GB", "tokens 1.64 M", "elapsed 1m03s", "left 20m00s", "heldout 1.873 bits/byte", "at step 200",
        "HFU 49.9%", "since start 6,543/s", "activations 0.53 GB",
    ):  # fmt: skip
        assert figure in words
    assert max(map(len, text.splitlines())) == width


def test_the_panel_stands_before_the_first_step(terminal):
    terminal.start(start_step=400)
    terminal.now += 7
    text = terminal.panel()
    assert "step 400/800  50%" in text
    assert re.search(r"elapsed +7s", text)
    assert re.search(r"left +\.\.\.", text)


def test_the_panel_draws_the_loss_of_the_whole_run(terminal):
    terminal.start()
    for step, loss in enumerate([8.0, 6.0, 4.0, 2.0, 1.0], start=1):
        terminal.step(step, loss=loss)
    assert "loss  █▆▄▂▁" in terminal.panel()


def test_a_terminal_keeps_the_last_state_and_what_was_said(terminal):
    with terminal.display:
        terminal.start()
        terminal.step(800)
        terminal.display.message("writing the report")
    assert "writing the report" in terminal.text
    last = terminal.text[terminal.text.rindex("╭") :]
    assert "step 800/800  100%" in last
    assert terminal.lines == []
    # The cursor, hidden while the panel is live, is back.
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")


def test_an_error_in_the_run_ends_the_live_panel(terminal):
    def run():
        with terminal.display:
            terminal.start()
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        run()
    assert "\x1b[?25h" in terminal.text
    terminal.display.stop()


def test_other_processes_show_nothing(capsys):
    with NullDisplay() as display:
        display.start("quickstart", 800, 0, {"parameters": "4.2 M"})
        screen = Screen(terminal=False)
        screen.display = display
        screen.step(1)
        display.evaluation(1, RESULT)
        display.message("text")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([3.0, 3.0], "▁▁"),
        ([0.0, 7.0], "▁█"),
        ([0.0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([0.0, 0.0, 2.0, 4.0, 7.0, 7.0, 0.0, 2.0, *[0.0] * 8], "▁▄█▂▁▁▁▁"),
        ([1.0, float("nan"), 2.0], "▁!█"),
        ([float("inf")], "!"),
    ],
)
def test_a_sparkline_goes_from_lowest_to_highest(values, drawn):
    assert _sparkline(values, 8) == drawn


def test_a_trace_of_any_length_keeps_its_shape_in_bounded_memory():
    trace = _Trace(8)
    for value in range(1024):
        trace.add(float(value))
    values = trace.values()
    assert 8 <= len(values) <= 16
    width = 1024 // len(values)
    assert values == [width * place + (width - 1) / 2 for place in range(len(values))]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (9.4, "9s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (7625, "2h07m"), (273_700, "3d04h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (999, "999"), (999.6, "1.00 k"), (1000, "1.00 k"), (12_345, "12.3 k"), (983_040, "983 k"),
        (999_600, "1.00 M"), (4_213_000, "4.21 M"), (9_996_000, "10.0 M"), (1.5e9, "1.50 B"), (2e12, "2.00 T"),
        (5e15, "5000 T"),
    ],
)  # fmt: skip
def test_short_numbers(number, text):
    assert short(number) == text


def test_other_quantities():
    assert (percent(None), percent(0.4123)) == ("n/a", "41.2%")
    assert gigabytes(1_123_000_000) == "1.12 GB"
    assert [decimal(value) for value in (0.0, 4.1e-5, 0.834, 12.0)] == ["0.00", "4.1e-05", "0.83", "12.00"]
