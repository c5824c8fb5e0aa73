"""What the documentation shows runs as written, and its tables are of what is there."""

import re
from pathlib import Path

import pytest
import torch

from tilewright.cli.main import main
from tilewright.kernels import use
from tilewright.kernels.registry import SPECS

DOCS = Path(__file__).parent.parent / "docs"
LARGE_JOBS = (DOCS / "large-jobs.md").read_text("utf-8")
EXAMPLES = re.findall(
    r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", (DOCS / "reuse.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=re.sub(r"\W+", "_", title))
        for title, section in EXAMPLES
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ],
)
def test_each_example_of_reuse_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with use("auto"):
        exec(code, {})


def test_the_table_of_kernels_has_every_case_of_every_op() -> None:
    """It is written by `make docs`; a case that was added since is missing here."""
    rows = [
        line.split(" | ") for line in (DOCS / "kernels.md").read_text("utf-8").splitlines() if line.startswith("| `")
    ]
    shown = {(row[0].strip("| `"), row[1]) for row in rows}
    expected = {
        (spec.name, sample.label)
        for spec in SPECS
        for sample in spec.samples(torch.device("cpu"), torch.float32)
        if any(x.numel() for x in sample.tensors.values() if x.is_floating_point())
    }
    assert shown == expected, "run: make docs"


def test_the_plans_of_large_jobs_are_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"^```\n\$ tilewright (train --dry-run .*?)\n(.*?)\n```$", LARGE_JOBS, re.DOTALL | re.MULTILINE)
    assert len(shown) == 2
    for command, expected in shown:
        status = main(command.split())
        printed = capsys.readouterr()
        assert (printed.out if status == 0 else printed.err).strip() == expected
