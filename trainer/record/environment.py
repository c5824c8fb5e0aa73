"""Where a run takes place: versions, machine and code, and what optional packages are really there.

Nothing is read from the process's environment variables, which hold secrets.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PACKAGES = ("tilewright", "torch", "triton", "numpy", "tokenizers")
# What decides which matrix products a CPU is fast at.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "sve")


def environment(device: torch.device) -> dict[str, Any]:
    """What to keep beside a run's figures, ready for JSON; whatever cannot be found out is None.

    Args:
        device: what the run computes on.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "world_size": torch.distributed.get_world_size() if _is_distributed() else 1,
        "versions": {**package_versions(), "python": platform.python_version(), "cuda": torch.version.cuda},
        "os": platform.platform(),
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "gpu_driver": _gpu_driver(),
        "git": git_state(Path(__file__)),
    }


def package_versions() -> dict[str, str | None]:
    """The installed version of each package that a run's figures depend on; None where it is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def git_state(file: Path) -> dict[str, Any] | None:
    """The commit that `file` is checked out from, and whether tracked files differ from it; None outside a checkout."""
    # An installed copy may lie inside somebody's own repository, whose commit says nothing of it.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    status = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or status is None else {"commit": commit.strip(), "dirty": bool(status.strip())}


class Probe(NamedTuple):
    """What an optional package turned out to be.

    Attributes:
        present: something of that name is installed.
        real: it is what its name promises, and it can be imported.
        detail: a sentence for the user, with the mend where there is one.
    """

    present: bool
    real: bool
    detail: str


def probe_apex() -> Probe:
    """NVIDIA's apex, told from the unrelated package of that name on PyPI by `apex.optimizers.FusedAdam`."""
    folder = _package_folder("apex")
    if folder is None:
        return Probe(False, False, "not installed; optional: torch's fused AdamW serves")
    version = _version("apex") or "of unknown version"
    if not (folder / "optimizers").is_dir():
        # Not imported: what it would run is not what anybody wanted.
        return Probe(
            True,
            False,
            f"the apex installed here ({version}, at {folder}) is not NVIDIA's: it has no apex.optimizers.FusedAdam; "
            "PyPI's apex is an unrelated Pyramid toolkit; remove it: pip uninstall apex",
        )
    problem = _lacks("apex.optimizers", "FusedAdam")
    if problem:
        return Probe(True, False, f"apex {version} cannot be used: {problem}; build it again for this torch")
    if _spec("amp_C") is None:
        return Probe(True, True, f"apex {version}, built without its CUDA extensions: FusedAdam cannot run")
    return Probe(True, True, f"apex {version}")


def probe_flash_attn() -> Probe:
    """flash-attn 2 (`flash_attn`), 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`): which are there and usable."""
    folder = _package_folder("flash_attn")
    generations = {
        # flash-attn 4 alone leaves `flash_attn` a bare folder.
        "2": ("flash_attn", "flash-attn", folder is not None and (folder / "__init__.py").is_file()),
        "3": ("flash_attn_interface", "flash-attn-3", _spec("flash_attn_interface") is not None),
        "4": ("flash_attn.cute", "flash-attn-4", folder is not None and (folder / "cute").is_dir()),
    }
    usable: list[str] = []
    problems: list[str] = []
    for generation, (module, distribution, present) in generations.items():
        if not present:
            continue
        problem = _lacks(module, "flash_attn_func")
        name = f"flash-attn {generation} ({_version(distribution) or 'version unknown'})"
        if problem is None:
            usable.append(name)
        # Builds of flash-attn 2 may carry the sources of 4 without what these need, which is nobody's mistake.
        elif generation != "4" or _version(distribution):
            problems.append(f"{name} cannot be used: {problem}; build it again for this torch, or uninstall it")
    if usable or problems:
        return Probe(True, bool(usable), "; ".join([*usable, *problems]))
    if folder is None:
        return Probe(False, False, "not installed; optional: Tilewright's own attention kernels serve")
    return Probe(True, False, f"the flash_attn at {folder} is no flash-attn that is known: it has no flash_attn_func")


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return find_spec(module)
    except (ImportError, ValueError, AttributeError):  # a module that something half-made put in sys.modules
        return None


def _package_folder(name: str) -> Path | None:
    """Where the top-level package or module lies, found without importing it."""
    spec = _spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    return Path(folders[0] if folders else spec.origin or name)


def _lacks(module: str, attribute: str) -> str | None:
    """Why `attribute` cannot be had from `module`, or None."""
    try:
        # Extensions built for another torch fail here in many ways, none of which may stop a probe.
        getattr(importlib.import_module(module), attribute)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _cpu() -> dict[str, Any]:
    info = _text(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    here = set(flags[1].split()) if flags else set()
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        # Fewer than cores in a container or a job that was given a part of the machine.
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _CPU_FLAGS if flag in here],
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _gpu_driver() -> str | None:
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _text(Path("/proc/driver/nvidia/version")))
    return found[0] if found else None


def _git(folder: Path, *arguments: str) -> str | None:
    # A git hook sets GIT_DIR and its like to another repository.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True, env=outside
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
