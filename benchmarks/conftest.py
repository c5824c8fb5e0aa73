"""For every benchmark: the suite that was asked for, cold compiler caches, and what is written beside the times."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from tilewright.cli.clone import load_benchmarks

load_benchmarks()

if TYPE_CHECKING:
    from tilewright.benchmarks.record import Session

SUITES = ("quick", "kernels", "training", "all")
_CACHE = pytest.StashKey[str]()
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_BEFORE: dict[str, str | None] = {}
_SESSION = pytest.StashKey["Session"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, default="quick", help="which benchmarks, and how many of their cases")
    parser.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the benchmarks run")
    parser.addoption("--only", action="append", default=[], metavar="OP", help="of the kernels only this; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    # Inductor and Triton would take from their caches what an earlier run compiled, and compile times would be none.
    folder = config.stash[_CACHE] = tempfile.mkdtemp(prefix="tilewright-compiled-")
    _BEFORE.update({name: os.environ.get(name) for name in _CACHES})
    os.environ.update({name: os.path.join(folder, name) for name in _CACHES})


def pytest_unconfigure(config: pytest.Config) -> None:
    for name, before in _BEFORE.items():
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """What the run's benchmarks share, such as the device and its peaks; rows without a time are noted in it."""
    from tilewright.benchmarks.record import Session, device_of, dtypes_of

    config = request.config
    device = device_of(config.getoption("device"))
    config.stash[_SESSION] = Session.begin(device, dtypes_of(device, quick=config.getoption("suite") == "quick"))
    return config.stash[_SESSION]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the machine's name is nobody's business: records are attached to public issues


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Sequence[Any], output_json: dict[str, Any]) -> None:
    session = config.stash.get(_SESSION, None)
    if session is not None:
        asked = {"suite": config.getoption("suite"), "only": sorted(config.getoption("only"))}
        output_json["tilewright_record"] = {**asked, **session.as_json()}
