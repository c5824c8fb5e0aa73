"""The C++ of this package: each source compiled once by the user's compiler, for this processor and this PyTorch, and
kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

# By what PyTorch finds in the processor, `torch.backends.cpu.get_cpu_capability`. Not ``-march=native``: a cache in a
# home directory serves machines with other processors too.
_VECTORS = {"AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}


@functools.cache
def library(source: Path, *options: str, uses_torch: bool = False) -> ctypes.CDLL | None:
    """What `source` has compiled to; None, with a line in the log that says why, where it cannot be compiled or loaded.

    Args:
        source: exports C functions; its OpenMP threads are those of PyTorch, which is linked to the same runtime.
        options: for the compiler, beside those that all have.
        uses_torch: include PyTorch's headers and link to its ``libc10``.
    """
    if sys.platform != "linux":
        return None
    try:
        return _compiled(source, *options, uses_torch=uses_torch)
    # RuntimeError: there is no home. ValueError: quotes that do not close.
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _log.info("%s is not compiled: %s", source.name, error)
        return None


def _compiled(source: Path, *options: str, uses_torch: bool) -> ctypes.CDLL:
    found = shutil.which("g++") or shutil.which("c++")
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])
    if not compiler:
        raise OSError("there is no C++ compiler")
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", *options]
    flags += _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    libraries: list[str] = []
    if uses_torch:
        root = Path(torch.__file__).parent
        flags += [
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{root / 'include'}",
        ]
        libraries = [f"-L{root / 'lib'}", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    texts = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    # A home may serve machines of several kinds.
    kind = [torch.__version__, platform.machine(), *platform.libc_ver()]
    made_of = "\0".join([*texts, *kind, *compiler, *flags, *libraries])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright"
    path = cache / f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o700)  # which only its owner can
    try:
        if path.exists():
            return _loaded(path)
    except OSError as error:
        _log.info("%s is compiled anew: %s", path.name, error)
    # Complete before it has its name: another process may be looking for it.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *flags, str(source), "-o", str(made), *libraries]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.chmod(0o700)
        os.replace(made, path)
    return _loaded(path)


def _loaded(path: Path) -> ctypes.CDLL:
    """Raises OSError where someone else may have written it: what is loaded runs as this user."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may have written to it")
    return ctypes.CDLL(str(path))
