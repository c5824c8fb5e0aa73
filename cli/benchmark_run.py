"""``tilewright benchmark run``: the pytest-benchmark suites under `benchmarks/`, and the record that they leave."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.cli.clone import BENCHMARKS, load_benchmarks
from tilewright.trainer.errors import TrainingError

if TYPE_CHECKING:
    import pytest
    from rich.console import Console

_FOLDERS = {
    "quick": ("kernels", "training"),
    "kernels": ("kernels",),
    "training": ("training",),
    "all": ("kernels", "training"),
}

_DESCRIPTION = """\
Time the kernels and whole training steps beside PyTorch's and, where they are installed, other packages', count their
memory, and write one record: every round's time, what was derived from it and how, and where it was measured.
Nobody is timed whose result is wrong; who is not installed is named.
"""

_EPILOG = """\
suites:
  quick      one shape of every op and a few training steps: at most 5 minutes on a CPU that is otherwise idle
  kernels    every op at every shape, dtype, pass and provider
  training   whole steps over model size, sequence, batch, compilation and processes
  all        kernels and training

examples:
  tilewright benchmark run --suite quick
  tilewright benchmark run --suite kernels --only rms_norm --only attention --output norms.json
  tilewright benchmark report norms.json
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "run",
        help="measure, and write a record",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--suite", choices=tuple(_FOLDERS), default="quick", help="what to measure (quick)")
    parser.add_argument("--only", action="append", default=[], metavar="OP", help="only these ops; repeatable")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto: a GPU if any)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record (runs/benchmarks/SUITE-TIME.json)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    load_benchmarks()
    _check(arguments)
    output = arguments.output or Path("runs", "benchmarks", f"{arguments.suite}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Tests replace sys.stderr while they run; the console keeps the terminal.
    console = Console(file=sys.stderr, highlight=False)
    failures = _measure(arguments, output, console)
    record = _read(output, failures)
    from tilewright.benchmarks.summary import summary

    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 200  # for a file or a pipe
    for part in summary(record):
        out.print(part)
    for name, reason in failures.items():
        out.print(f"[bold red]failed[/] {name}: {reason}", soft_wrap=True)
    out.print(f"{output}: {len(record['benchmarks'])} rows; a page of them: tilewright benchmark report {output}")
    return 1 if failures else 0


def _check(arguments: argparse.Namespace) -> None:
    from tilewright.benchmarks.record import device_of
    from tilewright.kernels.registry import SPECS

    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise TrainingError(f"{package} is missing, which times the benchmarks; run `make setup` in the clone")
    names = [spec.name for spec in SPECS]
    for name in arguments.only:
        if name not in names:
            raise TrainingError(f"--only is {name}, which is no op; there are {', '.join(names)}")
    if arguments.only and arguments.suite == "training":
        raise TrainingError("--only chooses among the kernels, which --suite training does not measure")
    device_of(arguments.device)
    if arguments.output is not None and arguments.output.is_dir():
        raise TrainingError(f"--output is {arguments.output}, a folder; name a file")


def _measure(arguments: argparse.Namespace, output: Path, console: Console) -> dict[str, str]:
    """Run the suites; what failed, by name, with the reason."""
    import pytest

    folders = () if arguments.only else _FOLDERS[arguments.suite]
    options = [
        *(str(BENCHMARKS / folder) for folder in folders or ("kernels",)),
        f"--rootdir={BENCHMARKS.parent}",
        f"--config-file={BENCHMARKS.parent / 'pyproject.toml'}",
        f"--suite={arguments.suite}",
        f"--device={arguments.device}",
        *(f"--only={name}" for name in arguments.only),
        f"--benchmark-json={output}",
        *("--benchmark-enable", "--benchmark-quiet", "--capture=sys"),
        *("-p", "no:cacheprovider", "-p", "no:xdist"),
    ]
    terminal = io.StringIO()
    with contextlib.redirect_stdout(terminal), _Progress(console) as progress:
        status = pytest.main(options, plugins=[progress])
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        last = [line for line in terminal.getvalue().splitlines() if line.strip()][-3:]
        raise TrainingError(f"the benchmarks could not run (pytest: {' / '.join(last)})")
    return progress.failures


def _read(output: Path, failures: dict[str, str]) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items()) or "no case was chosen"
        raise TrainingError(f"nothing was measured, so no record was written ({reasons})") from None
    return record


# Between two lines about the same op.
_TELL_SECONDS = 60.0


class _Progress:
    """A pytest plugin: a bar over the rows, the present one's name, and what failed."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # What the tests print would otherwise be written through the bar.
        self._bar = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("preparing", total=None)
        self._case, self._told = "", 0.0
        self.failures: dict[str, str] = {}

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._bar.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        name = _name(nodeid)
        self._bar.update(self._task, description=name)
        case, now = name.partition("-")[0], time.monotonic()
        # In a file a bar would say nothing until the end.
        if not self._bar.console.is_terminal and (case != self._case or now - self._told > _TELL_SECONDS):
            self._bar.console.print(
                f"[{self._bar.tasks[0].completed:.0f}/{self._bar.tasks[0].total}] {name}", markup=False
            )
            self._told = now
        self._case = case

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            self.failures[_name(report.nodeid)] = lines[-1] if lines else "no reason was given"
        if report.when == "teardown":
            self._bar.advance(self._task)


def _name(nodeid: str) -> str:
    """What stands in the brackets of a parametrised test, else the test's own name."""
    return nodeid.partition("[")[2].removesuffix("]") or nodeid.rpartition("::")[2]
