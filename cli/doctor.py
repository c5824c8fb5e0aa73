"""``tilewright doctor``: what this machine has, what would run on it, and what to mend."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from tilewright.trainer.record.environment import Probe

_DESCRIPTION = """\
Say what this machine has and what would run on it: versions, processors, the implementation that each
kernel would use and why, where its launch configurations come from, optional packages, how fast matrix
products are. Ends with what to mend, if anything.
Changes nothing, and exits with status 0 whatever it finds.
"""

_EPILOG = """\
examples:
  tilewright doctor            takes some seconds, for it measures matrix products
  tilewright doctor --quick    without measuring
"""

_DTYPES = ("float32", "bfloat16")
# Compute capability × 10 of the GPUs whose launch tables are told of where there is no GPU: A100 and H100.
_WITHOUT_GPU = (80, 90)

_Peaks = dict[tuple[str, str], float]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine has, what would run on it, and what to mend",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="do not measure the matmul peak")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # torch takes seconds to import, which other commands and --help need not wait for.
    import torch

    from tilewright.trainer.record.environment import environment, probe_apex, probe_flash_attn

    console = Console(highlight=False)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    # Alike GPUs answer alike.
    devices = [torch.device("cpu"), *gpus[:1]]
    facts = environment(devices[-1])
    probes = {"apex": probe_apex(), "flash-attn": probe_flash_attn()}
    versions = {name: version or "not installed" for name, version in facts["versions"].items()}
    versions["cuda"] = facts["versions"]["cuda"] or "none: this torch is a CPU build"
    _show(console, "Versions", versions)
    _show(console, "Machine", dict(_machine(facts)))
    _show_kernels(console, devices)
    chips = dict.fromkeys(int(gpu["capability"].replace(".", "")) for gpu in facts["gpus"]) or _WITHOUT_GPU
    for line in _launch_tables(chips):
        console.print(f"  launch tables, {line}", markup=False, soft_wrap=True)
    _show(console, "Optional packages", {name: _verdict(probe) for name, probe in probes.items()})
    peaks = {} if arguments.quick else _measure(console, devices)
    advice = list(_advice(facts, probes, peaks))
    console.print("\n[bold]Advice[/]")
    for sentence in advice or ["Nothing to mend."]:
        console.print(f"- {sentence}", markup=False, soft_wrap=True)
    return 0


def _show(console: Console, title: str, facts: Mapping[str, str]) -> None:
    console.print(f"\n[bold]{title}[/]")
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        console.print(f"  {name:<{width}}  {value}", markup=False, soft_wrap=True)


def _machine(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from tilewright.trainer.record.quantities import gigabytes

    cpu = facts["cpu"]
    allowed = "" if cpu["cores_allowed"] == cpu["cores"] else f", {cpu['cores_allowed']} of them for this process"
    yield "system", facts["os"]
    yield "CPU", f"{cpu['model']}, {cpu['cores']} cores{allowed}"
    yield "CPU instructions", ", ".join(cpu["flags"]) or "none that matrix products profit from"
    if facts["memory_bytes"]:
        yield "memory", gigabytes(facts["memory_bytes"])
    for index, gpu in enumerate(facts["gpus"]):
        size = gigabytes(gpu["memory_bytes"])
        yield f"GPU {index}", f"{gpu['name']}, {size}, compute capability {gpu['capability']}"
    if not facts["gpus"]:
        yield "GPU", "none"
    if facts["gpu_driver"]:
        yield "GPU driver", facts["gpu_driver"]


def _show_kernels(console: Console, devices: list[torch.device]) -> None:
    """Which implementation each op would use, one column for each device and dtype, and the reasons."""
    import torch

    from tilewright.kernels import choose
    from tilewright.kernels.registry import SPECS

    console.print("\n[bold]Kernels[/]")
    table = Table("op")
    choices: list[str] = []
    reasons: dict[str, list[str]] = {}
    for device in devices:
        for name in _DTYPES:
            try:
                implementation, reason = choose(device, getattr(torch, name))
            except ValueError as error:  # one is demanded that cannot run here
                implementation, reason = "none", str(error)
            table.add_column(f"{device} {name}")
            choices.append(implementation)
            reasons.setdefault(f"{implementation}: {reason}", []).append(f"{device} {name}")
    for spec in SPECS:
        table.add_row(spec.name, *choices)
    console.print(table)
    for reason, columns in reasons.items():
        console.print(f"  {', '.join(columns)}: {reason}", markup=False, soft_wrap=True)


def _launch_tables(chips: Iterable[int]) -> Iterator[str]:
    """Where each op's launch configurations come from: one line for all generations of GPU that are alike in it."""
    alike: dict[str, list[str]] = {}
    for chip in chips:
        alike.setdefault(_launch_sources(chip), []).append(f"sm_{chip}")
    return (f"{' and '.join(names)}: {sources}" for sources, names in alike.items())


def _launch_sources(chip: int) -> str:
    from tilewright.kernels.registry import SPECS

    ops: dict[str, list[str]] = {}
    try:
        for spec in SPECS:
            sources = dict.fromkeys(table.source(chip) for table in spec.tables.values())
            ops.setdefault("; ".join(sources), []).append(spec.name)
    except ValueError as error:  # the file of measured rows is damaged
        return str(error)
    return " | ".join(f"{', '.join(names) if len(ops) > 1 else 'every op'}: {source}" for source, names in ops.items())


def _verdict(probe: Probe) -> str:
    if not probe.present:
        return probe.detail
    return f"{'usable' if probe.real else 'NOT USABLE'}: {probe.detail}"


def _measure(console: Console, devices: list[torch.device]) -> _Peaks:
    """FLOP/s of matrix products by device type and dtype, shown as they are measured."""
    import torch

    from tilewright.trainer.peak import measured_matmul_peak

    console.print("\n[bold]Matmul peak, measured now[/]")
    peaks = {}
    for device in devices:
        for name in _DTYPES:
            peak = measured_matmul_peak(device, getattr(torch, name))
            peaks[device.type, name] = peak
            console.print(f"  {device} {name:<8}  {peak / 1e12:,.3f} TFLOP/s", markup=False)
    return peaks


def _advice(facts: Mapping[str, Any], probes: Mapping[str, Probe], peaks: _Peaks) -> Iterator[str]:
    """What to mend, a sentence each."""
    gpus = facts["gpus"]
    if not gpus and facts["gpu_driver"]:
        mend = "unset CUDA_VISIBLE_DEVICES if it hides the GPUs, or update the driver"
        if facts["versions"]["cuda"] is None:
            mend = "this torch is a CPU build, so install a CUDA build"
        yield f"An NVIDIA driver ({facts['gpu_driver']}) is loaded, but torch sees no GPU: {mend}."
    elif not gpus:
        yield (
            "There is no GPU, so training runs on the CPU, with plain PyTorch in place of the Triton kernels: "
            "right for trying things out, slow for large models."
        )
    if gpus and facts["versions"]["triton"] is None:
        yield "triton is missing, so the kernels fall back to plain PyTorch: pip install triton."
    if gpus and all(float(gpu["capability"]) < 8 for gpu in gpus):
        yield "No GPU here computes in bfloat16 (compute capability 8.0 or later): train with --compute_dtype float32."
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        yield "No C++ compiler was found, which torch.compile needs: install g++, or train with --compile false."
    single, half = (peaks.get(("cpu", name)) for name in _DTYPES)
    if not gpus and single and half and half < single:
        yield "On this CPU bfloat16 matrix products are slower than float32: train with --compute_dtype float32."
    for probe in probes.values():
        if probe.present and not probe.real:
            yield f"{probe.detail}."
    if gpus and not probes["flash-attn"].present:
        yield "flash-attn is not installed; it is optional, and takes 20 minutes and more to build."
    free = shutil.disk_usage(Path.cwd()).free
    if free < 5e9:
        yield f"Only {free / 1e9:.1f} GB are free in this folder, where runs put checkpoints: free some space."
