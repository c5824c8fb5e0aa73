"""One op at one shape: every provider is checked against float64, its memory counted, then all are timed in turns."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters

from tilewright.benchmarks import allocations, measure, peaks, record
from tilewright.benchmarks.kernels.providers import PROVIDERS, Function, NotServed, Provider, implementation_of
from tilewright.benchmarks.kernels.shapes import Case, drawn
from tilewright.kernels import dispatch
from tilewright.kernels.accuracy import Comparison, Run, largest, outputs_of, run
from tilewright.kernels.opspec import OpSpec, Sample

# A CPU's cache is small, but a shared one: so many sets of inputs at most, and so much memory for all that they hold.
_MOST_COPIES = 256
_CPU_BUFFERS_BYTES = 2**30
_NOT_COLD = "cache not cold: its GB/s are not those of memory"


@dataclass
class Outcome:
    """What came of one provider in one case: the seconds of each round by pass, or why there are none.

    Attributes:
        left_out: it is not here or lacks something; nobody's fault.
        refused: it failed, or computes something else.
        warm_seconds: what a call of both passes took on the host before the rounds.
        columns: by pass, the columns of a row's `extra_info`.
    """

    left_out: str = ""
    refused: str = ""
    warm_seconds: float = 0.0
    rounds: measure.Rounds = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)


class Step:
    """A provider's call of an op on buffers of its own: the forward pass, and the backward pass of the last one."""

    def __init__(self, spec: OpSpec, function: Function, sample: Sample) -> None:
        self._function = function
        self._options = sample.options
        names = spec.differentiable(sample)
        self._tensors = {name: x.detach().requires_grad_(name in names) for name, x in sample.tensors.items()}
        self._leaves = [self._tensors[name] for name in names]
        self._asked: list[torch.Tensor] = []
        self._upstream: list[torch.Tensor] = []
        self.output_bytes = 0

    @property
    def backward(self) -> Callable[[], None] | None:
        """The backward pass of the last forward pass; None where nothing takes a gradient."""
        return self._backward if self._leaves else None

    def forward(self) -> None:
        """The forward pass; what the backward pass needs is kept until then."""
        results = outputs_of(self._function(**self._tensors, **self._options))
        self._asked = [result for result in results if result.requires_grad]
        if not self._upstream:
            self.output_bytes = sum(result.nbytes for result in results)
            self._upstream = [torch.randn_like(result) for result in self._asked]

    def _backward(self) -> None:
        torch.autograd.grad(self._asked, self._leaves, self._upstream)
        self._asked = []

    def __call__(self) -> None:
        """Both passes."""
        self.forward()
        if self.backward is not None:
            self.backward()

    @property
    def input_bytes(self) -> int:
        """Of all inputs."""
        return sum(x.nbytes for x in self._tensors.values())

    @property
    def upstream_bytes(self) -> int:
        """Of the upstream gradients."""
        return sum(x.nbytes for x in self._upstream)

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that the backward pass returns."""
        return sum(x.nbytes for x in self._leaves)


def contest(
    case: Case, device: torch.device, device_peaks: peaks.Peaks, *, seconds: float, least: int = 11
) -> dict[str, Outcome]:
    """Measure every provider of `case`, by name.

    Args:
        device_peaks: what shares of the peak refer to.
        seconds: about how long the timing of all may take together.
        least: the fewest rounds.
    """
    torch._dynamo.reset()
    generator = torch.Generator(device).manual_seed(torch.seed())
    shape = case.timed(device)
    shared = drawn(shape, device, generator)
    judge = Judge(case, drawn(case.checked(device), device, generator))
    outcomes: dict[str, Outcome] = {}
    functions: dict[str, Function] = {}
    with _our_own_kernels(device):
        for name, provider in PROVIDERS.items():
            outcomes[name] = outcome = Outcome()
            try:
                function = provider.function_of(case.spec, device)
                sample = _clone(shared) if provider.overwrites else shared
                columns = _prepared(case.spec, function, provider, sample, device)
                columns["error_ratio"] = judge.error_ratio(function)
            except NotServed as why:
                outcome.left_out = str(why)
                continue
            except Exception as error:  # whatever a package raises, the others are measured
                outcome.refused = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            columns["implementation"] = implementation_of(name, case.spec, shared, device)
            if not columns["error_ratio"] <= 1:
                outcome.refused = f"wrong: its error is {columns['error_ratio']:.3g} times what is accepted"
                continue
            functions[name] = function
            outcome.warm_seconds = columns.pop("warm_seconds")
            outcome.columns = {pass_name: {**columns} for pass_name in columns["peak_memory_bytes"]}
        _time(case, functions, outcomes, shared, device, device_peaks, seconds, least)
    return outcomes


def _prepared(
    spec: OpSpec, function: Function, provider: Provider, sample: Sample, device: torch.device
) -> dict[str, Any]:
    """Compile and warm up, and count memory: columns, those that differ by pass as a mapping."""
    step = Step(spec, function, sample)
    warm, compile_seconds, note = _first_calls(step, provider, device)
    phases = [step.forward] if step.backward is None else [step.forward, step.backward]
    above = allocations.peaks(*phases, device=device)
    needed = {"forward": step.input_bytes + step.output_bytes}
    peak = {"forward": step.input_bytes + above[0]}
    if step.backward is not None:
        held = step.input_bytes + step.upstream_bytes
        peak |= {"backward": held + above[1], "both": held + max(above)}
        with_gradients = needed["forward"] + step.upstream_bytes + step.gradient_bytes
        needed |= dict.fromkeys(("backward", "both"), with_gradients)
    return {
        "warm_seconds": warm,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak,
        "algorithm_memory_bytes": needed,
        "note": note,
    }


def _first_calls(step: Step, provider: Provider, device: torch.device) -> tuple[float, float | None, str]:
    """Call twice: the second's seconds, and what the first took longer: the compile time, or why there is none."""
    if device.type in provider.compiles_on:
        _warm_compiler(device)
    taken: list[float] = []
    hits = _cache_hits()
    for _ in range(2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    if device.type not in provider.compiles_on:
        return taken[1], None, ""
    if _cache_hits() > hits:
        return taken[1], None, "compile time unknown: the same graph had been compiled in this run"
    return taken[1], max(taken[0] - taken[1], 0.0), ""


@functools.cache
def _warm_compiler(device: torch.device) -> None:
    """Let the compiler start what it starts once: its worker processes, the C++ headers that all its code includes."""
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin().sum(), dynamic=False)(x).backward()


def _cache_hits() -> int:
    return sum(count for group in counters.values() for name, count in group.items() if name.endswith("cache_hit"))


@dataclass(frozen=True)
class _Compared(Comparison):
    """A comparison whose reference error is known: it is the same for every provider."""

    known_reference_error: float = 0.0

    @property
    def reference_error(self) -> float:
        return self.known_reference_error


class Judge:
    """Compares providers with the exact answer, which is computed once."""

    def __init__(self, case: Case, sample: Sample) -> None:
        self._case, self._sample = case, _AsItIs(**vars(sample))
        reference = case.spec.reference
        self._upstream = self._run(reference, None).upstream
        same = self._run(reference, self._upstream)
        double = [g.double() for g in self._upstream]
        exact = run(reference, case.spec, sample, torch.float64, double)
        self._known = [
            *_compared("output", same.outputs, exact.outputs),
            *_compared("gradient", list(same.gradients.values()), list(exact.gradients.values())),
        ]

    def error_ratio(self, function: Function) -> float:
        """The largest error of any output or gradient ÷ the largest accepted; infinity for answers of other shapes."""
        ours = self._run(function, self._upstream)
        answers = [*ours.outputs, *ours.gradients.values()]
        if [x.shape for x in answers] != [known.exact.shape for known in self._known]:
            return math.inf
        compared = (dataclasses.replace(known, ours=x) for known, x in zip(self._known, answers, strict=True))
        return max((_ratio(one, self._case.spec.tolerance) for one in compared), default=0.0)

    def _run(self, function: Function, upstream: list[torch.Tensor] | None) -> Run:
        fresh = dataclasses.replace(self._sample, tensors=_clone(self._sample).tensors)
        # Copies: some packages write gradients over what they are given.
        upstream = [g.clone() for g in upstream] if upstream is not None else None
        return run(function, self._case.spec, fresh, self._case.dtype, upstream)


def _compared(what: str, same: list[torch.Tensor], exact: list[torch.Tensor]) -> Iterator[_Compared]:
    """The reference compared with the exact answer; a provider's answer takes the place of `ours`."""
    magnitude = largest(exact)
    for number, (x, right) in enumerate(zip(same, exact, strict=True)):
        error = Comparison(what, x, x, right, magnitude).error
        yield _Compared(f"{what} {number}", x, x, right, magnitude, error)


class _AsItIs(Sample):
    """A sample whose tensors keep the dtypes that they have, which an optimizer mixes."""

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return self.tensors[name].dtype


def _ratio(comparison: Comparison, tolerance: float) -> float:
    if not comparison.ours[comparison.exact.isfinite()].isfinite().all():
        return math.inf
    error = comparison.error
    return error / comparison.allowed(tolerance) if error else 0.0


def _time(
    case: Case,
    functions: Mapping[str, Function],
    outcomes: Mapping[str, Outcome],
    shared: Sample,
    device: torch.device,
    device_peaks: peaks.Peaks,
    seconds: float,
    least: int,
) -> None:
    """Time the providers in turns and fill in what follows from it."""
    if not functions:
        return
    held = [max(c["peak_memory_bytes"]["forward"] for c in outcomes[name].columns.values()) for name in functions]
    cache = peaks.cache_bytes(device)
    # A round makes every pass of every provider, and both passes twice, on each of the copies.
    round_seconds = 2 * sum(outcomes[name].warm_seconds for name in functions)
    in_time = int(seconds / least / max(round_seconds, 1e-9))
    copies = max(1, min(in_time, _copies(cache, sum(x.nbytes for x in shared.tensors.values()), max(held), device)))
    generator = torch.Generator(device).manual_seed(torch.seed())
    sets = [shared, *(drawn(shared, device, generator) for _ in range(copies - 1))]
    measurements, methods = {}, {}
    for name, function in functions.items():
        own = [_clone(sample) if PROVIDERS[name].overwrites else sample for sample in sets]
        steps = [Step(case.spec, function, sample) for sample in own]
        # A graph keeps all that its call allocates.
        fits = device.type == "cpu" or 2 * copies * sum(held) < torch.cuda.mem_get_info(device)[0]
        measurements[name], methods[name] = measure.of_passes(steps, device, capture=fits)
    # Whoever is slow has been called three times by now; graphs and other copies have not.
    warm_up = 0 if copies == 1 and device.type == "cpu" else 1
    rounds = measure.in_rounds(measurements, seconds=seconds, least=least, warm_up=warm_up)
    # Where the cache's size is unknown, nothing says that it was cold.
    cold = 0 < 2 * cache <= copies * sum(x.nbytes for x in shared.tensors.values())
    work = case.spec.work(shared)
    for name, outcome in outcomes.items():
        outcome.rounds = rounds.get(name, {})
        for pass_name, taken in outcome.rounds.items():
            columns = outcome.columns[pass_name]
            columns |= {key: value[pass_name] for key, value in columns.items() if isinstance(value, dict)}
            columns |= record.timing(taken, getattr(work, pass_name), case.dtype, device_peaks, cold=cold)
            columns |= {"copies": copies, "cold": cold, "method": methods[name]}
            columns["note"] = "; ".join(filter(None, (columns["note"], "" if cold else _NOT_COLD)))


def _copies(cache: int, input_bytes: int, held_bytes: int, device: torch.device) -> int:
    """How many sets of inputs, together at least twice the cache, memory has room for."""
    room = _CPU_BUFFERS_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
    wanted = math.ceil(2 * cache / max(input_bytes, 1))
    return min(wanted, _MOST_COPIES, room // max(held_bytes, 1))


def _clone(sample: Sample) -> Sample:
    tensors = {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())
               for name, x in sample.tensors.items()}  # fmt: skip
    return dataclasses.replace(sample, tensors=tensors)


@contextmanager
def _our_own_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU ours are the Triton kernels, also where flash-attn would serve: that is a provider of its own."""
    if device.type == "cuda" and not dispatch.demanded():
        with dispatch.use("triton"):
            yield
    else:
        yield
