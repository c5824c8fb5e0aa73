"""The clone's benchmarks are found from an installed command, and missing ones are named."""

import subprocess
from pathlib import Path

import pytest

from tilewright.cli import clone
from tilewright.trainer.errors import TrainingError


def test_a_process_of_its_own_imports_the_benchmarks_from_any_directory(tmp_path: Path) -> None:
    command = clone.command_of("no_such_module")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No module named 'tilewright.benchmarks.no_such_module'" in done.stderr


def test_without_the_repository_one_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(clone, "_NAME", "tilewright.benchmarks_elsewhere")
    with pytest.raises(TrainingError, match="clone it and run `make setup`"):
        clone.load_benchmarks()
