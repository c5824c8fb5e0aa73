"""The clone's `benchmarks/`, which an installed package leaves out, importable as ``tilewright.benchmarks``.

The clone's root must stay off ``sys.path``, where its folder `kernels` would shadow the package that `transformers`
uses; so the one folder is registered under its name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tilewright.trainer.errors import TrainingError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
_NAME = "tilewright.benchmarks"


def load_benchmarks() -> None:
    """Make ``tilewright.benchmarks`` importable in this process.

    Raises:
        TrainingError: Tilewright was installed without its repository.
    """
    if _NAME in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        _NAME, BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)]
    )
    if spec is None or spec.loader is None or not (BENCHMARKS / "__init__.py").is_file():
        raise TrainingError(
            "audit and benchmarks are part of the repository, not of an installed package; "
            "clone it and run `make setup` there, then .venv/bin/tilewright"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)


def command_of(module: str, *arguments: str) -> list[str]:
    """The command line of a process of its own that calls ``main()`` of a module under ``tilewright.benchmarks``."""
    code = (
        "import importlib; from tilewright.cli.clone import load_benchmarks; load_benchmarks(); "
        f"importlib.import_module({f'{_NAME}.{module}'!r}).main()"
    )
    return [sys.executable, "-c", code, *arguments]
