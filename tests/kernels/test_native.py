"""C++ that is compiled on the user's machine: what is loaded from the cache, and what is not."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.kernels import native

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("g++") or shutil.which("c++")), reason="there is no C++ compiler"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('// ¼ of 168\nextern "C" int answer() { return 42; }\n', encoding="utf-8")
    return path


def compiled(source: Path) -> ctypes.CDLL | None:
    """As a new process would get it."""
    native.library.cache_clear()
    return native.library(source)


def only_file_of(source: Path) -> Path:
    (found,) = (source.parent / "cache" / "tilewright").iterdir()
    return found


def test_what_is_compiled_is_the_users_own(source: Path) -> None:
    before = os.umask(0)
    try:
        found = compiled(source)
    finally:
        os.umask(before)
    assert found is not None
    assert found.answer() == 42
    made = only_file_of(source)
    assert [path.stat().st_mode & 0o777 for path in (made, made.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("harm", ["cut off", "open to others"])
def test_what_cannot_be_trusted_or_loaded_is_compiled_anew(source: Path, harm: str) -> None:
    other = source.with_name("other.cpp")
    other.write_text('extern "C" int answer() { return 666; }\n')
    wrong = source.with_name("wrong.so")
    subprocess.run([shutil.which("g++") or "c++", "-shared", "-fPIC", str(other), "-o", str(wrong)], check=True)
    assert compiled(source) is not None
    made = only_file_of(source)
    # Another file, as what is loaded already is not loaded again.
    made.unlink()
    made.write_bytes(wrong.read_bytes()[: 1000 if harm == "cut off" else None])
    made.chmod(0o700 if harm == "cut off" else 0o722)
    found = compiled(source)
    assert found is not None
    assert found.answer() == 42


@pytest.mark.parametrize("compiler", ['g++ "', "no-such-compiler", "false"])
def test_without_a_compiler_that_works_there_is_nothing(
    source: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert compiled(source) is None


def test_sources_are_read_whatever_the_locale(source: Path) -> None:
    script = (
        "import sys, pathlib; from tilewright.kernels import native;"
        "print(native.library(pathlib.Path(sys.argv[1])).answer())"
    )
    plain = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(source)], env=plain, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "42", done.stderr
