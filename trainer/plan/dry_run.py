"""What a run would take on GPUs that are not there: ``tilewright train --dry-run --as-if 256xH100``.

The model is built and sharded over processes of PyTorch's fake backend, without memory, so what each process holds is
what FSDP would give it. One block's forward and backward pass is followed on fake tensors, through the Triton ops'
shape functions, which says what a micro-batch keeps and needs. The collectives follow from `step_traffic`. Everything
here is predicted: nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tilewright.kernels import use
from tilewright.kernels.launch import as_if_on
from tilewright.kernels.linear_chunks import chunk_rows
from tilewright.model import Transformer
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.held_memory import held_bytes
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.activations import checkpoint_activations
from tilewright.trainer.parallel.float8 import check_float8
from tilewright.trainer.parallel.sharding import World, sharded_model
from tilewright.trainer.parallel.traffic import Traffic, Volume, step_traffic
from tilewright.trainer.plan.live_memory import LiveBytes
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.stages import check_batches, largest_batch


@dataclass(frozen=True)
class GPU:
    """A GPU to plan for: compute capability × 10, and its memory in bytes as the datasheet names it.

    The datasheet's gigabytes are taken as 10⁹ bytes; what is there beyond serves the driver, NCCL and the allocator.
    """

    generation: int
    memory: float


# NVIDIA's datasheets of each product.
GPUS = {
    "A100-40GB": GPU(80, 40e9),
    "A100": GPU(80, 80e9),
    "H100": GPU(90, 80e9),
    "H200": GPU(90, 141e9),
    "B200": GPU(100, 180e9),
}


@dataclass(frozen=True)
class Plan:
    """A run as predicted.

    Attributes:
        memory: bytes of the process that holds most, by kind; not all kinds are at their most at the same time.
        capacity: bytes that its GPU has.
        traffic: collectives of a step, with the one that asks whether to stop.
        notes: what is not in them.
    """

    world_size: int
    gpu: str
    micro_batches: int
    memory: dict[str, int]
    capacity: float
    traffic: Traffic
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.memory.values())


def plan(recipe: Recipe, as_if: str) -> Plan:
    """Predict a run of `recipe` on the GPUs that `as_if` names, such as ``256xH100``, at its largest batch.

    Raises:
        TrainingError: `as_if` names no such GPUs, or the recipe does not fit their number.
    """
    world_size, name = _parse(as_if)
    check_batches(recipe.batch, world_size)
    check_float8(recipe.float8, GPUS[name].generation)
    dtype = getattr(torch, recipe.compute_dtype)
    micro_batches = largest_batch(recipe.batch) // world_size // recipe.batch.micro_batch
    with _fake_world(world_size) as world:
        model = sharded_model(
            recipe.model, world, compute_dtype=dtype, compile=False, seed=recipe.seed, parallel=recipe.parallel
        )
        optimizer = build_optimizer(model, recipe.optimizer)
        memory = held_bytes(model, optimizer)
        if recipe.optimizer.ema_decay:
            memory["average"] = memory["parameters"]
        if recipe.parallel.offload:
            memory = dict.fromkeys(memory, 0)  # in host memory
        memory |= _whole_weights(model, recipe, dtype, micro_batches)
    memory |= _activations(recipe, GPUS[name].generation, dtype)
    traffic = step_traffic(
        recipe.model, recipe.parallel, world_size=world_size, micro_batches=micro_batches, compute_dtype=dtype
    )
    asking = Volume(traffic.all_reduce.count + 1, traffic.all_reduce.bytes + 2 * torch.float64.itemsize)
    traffic = replace(traffic, all_reduce=asking)
    notes = []
    if recipe.optimizer.kind == "muon":
        notes.append("Muon's all-to-alls come on top: see tilewright.trainer.optimization.muon")
    if recipe.activation_checkpointing.mode == "budget":
        notes.append("kept activations: the budget's share of what mode none keeps; the compiler may keep less")
    return Plan(world_size, name, micro_batches, memory, GPUS[name].memory, traffic, tuple(notes))


def check_fits(plan: Plan) -> None:
    """Raise where a process needs more memory than its GPU has.

    Raises:
        TrainingError: it does; the sentence names the largest kind and what lowers it.
    """
    if plan.total <= plan.capacity:
        return
    largest = max(plan.memory, key=lambda kind: plan.memory[kind])
    raise TrainingError(
        f"predicted: a process needs {plan.total / 1e9:.1f} GB and a {plan.gpu} has {plan.capacity / 1e9:.0f} GB; most "
        f"is taken by {largest} ({plan.memory[largest] / 1e9:.1f} GB): {_MENDS[largest]}"
    )


_MENDS = {
    "parameters": "take more GPUs, or fewer parallel.replicas",
    "optimizer": "take more GPUs, or fewer parallel.replicas",
    "gradients": "take more GPUs, or fewer parallel.replicas",
    "average": "take more GPUs, or fewer parallel.replicas",
    "whole weights": "set parallel.reshard_after_forward to true, or lower parallel.prefetch",
    "whole gradients": "set parallel.reduce to every, or raise batch.micro_batch so that there is one micro-batch",
    "kept activations": "lower batch.micro_batch, or keep less: activation_checkpointing.mode selective, or full",
    "working memory": "lower batch.micro_batch",
}


def _parse(as_if: str) -> tuple[int, str]:
    found = re.fullmatch(r"(\d+)x(.+)", as_if.strip())
    names = {name.lower(): name for name in GPUS}
    if not found or int(found[1]) < 1 or found[2].lower() not in names:
        raise TrainingError(
            f"--as-if {as_if} names no GPUs; write how many and which, as in 256xH100; known are {', '.join(GPUS)}"
        )
    return int(found[1]), names[found[2].lower()]


@contextmanager
def _fake_world(size: int) -> Iterator[World]:
    """Process 0 of `size`, whose collectives do nothing and whose tensors have no memory.

    The first process holds the most of each parameter where the rows do not divide.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, torch.device("meta"), init_device_mesh("cpu", (size,), mesh_dim_names=("shard",)))
    finally:
        dist.destroy_process_group()


def _whole_weights(model: Transformer, recipe: Recipe, dtype: torch.dtype, micro_batches: int) -> dict[str, int]:
    """What FSDP gathers, and the gradients that it has not reduced yet."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    every = sum(p.numel() for p in model.parameters())
    rest = every - sum(blocks)
    at_once = min(len(blocks), 1 + recipe.parallel.prefetch) if recipe.parallel.reshard_after_forward else len(blocks)
    kinds = {"whole weights": (rest + at_once * max(blocks)) * dtype.itemsize}
    if recipe.parallel.reduce == "last" and micro_batches > 1:
        kinds["whole gradients"] = 4 * every
    else:
        # A block's gradients as they come, and in float32 on their way; the last ones are those of the rest.
        kinds["whole gradients"] = max(rest, max(blocks)) * (dtype.itemsize + 4)
    return kinds


def _activations(recipe: Recipe, generation: int, dtype: torch.dtype) -> dict[str, int]:
    """What a micro-batch keeps for the backward pass, and what a block or the head needs beside it."""
    config, tokens = recipe.model, recipe.batch.micro_batch * recipe.data.sequence_length
    with torch.device("meta"):
        model = Transformer(config)
    with as_if_on(generation), use("triton"), FakeTensorMode(allow_non_fake_inputs=True):
        block = model.blocks[0]
        _give_fake_memory(block, dtype)
        checkpointing = recipe.activation_checkpointing
        budget = checkpointing.budget if checkpointing.mode == "budget" else None
        if budget is None:
            checkpoint_activations([block], checkpointing, compiled=recipe.compile, device_type="cuda")
        x = torch.empty(
            recipe.batch.micro_batch, recipe.data.sequence_length, config.hidden_size, dtype=dtype, requires_grad=True
        )
        tables = [torch.empty(recipe.data.sequence_length, config.head_dim // 2) for _ in range(2)]
        with LiveBytes() as live:
            # Whole rows: what a packed batch keeps differs by its few document boundaries alone.
            out = block(x, *tables, None)
            kept = live.now  # the result too, as the next block's input
            live.restart()
            out.backward(torch.empty_like(out))
        working = live.peak - kept
    stream = tokens * config.hidden_size * dtype.itemsize
    classes = config.vocab_size * config.hidden_size
    # The head: dweight in float32 and rounded, one chunk of logits and its gradient in the same place, dhidden.
    rows = min(tokens, chunk_rows(config.vocab_size, torch.device("cuda")))
    head = classes * (4 + dtype.itemsize) + rows * config.vocab_size * dtype.itemsize + stream
    if budget is not None:  # only the compiler knows what it will drop: a share of all but the block's result
        kept = stream + int(budget * (kept - stream))
    return {"kept activations": kept * config.layers + stream, "working memory": max(working, head)}


def _give_fake_memory(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters of fake memory in the place of those on the meta device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))


def plan_text(plan: Plan) -> str:
    """The plan as a table for the terminal."""
    lines = [
        f"predicted, on {plan.world_size} x {plan.gpu}, {plan.micro_batches} micro-batches a step; nothing is run",
        "",
    ]
    width = max(len(kind) for kind in plan.memory)
    lines.append("memory of a process")
    lines += [f"  {kind:<{width}}  {count / 1e9:9.2f} GB" for kind, count in plan.memory.items()]
    share = plan.total / plan.capacity
    lines.append(f"  {'together':<{width}}  {plan.total / 1e9:9.2f} GB, {share:.0%} of {plan.capacity / 1e9:.0f} GB")
    lines += ["", "collectives of a process in a step"]
    for kind, volume in vars(plan.traffic).items():
        lines.append(f"  {kind.replace('_', '-'):<{width}}  {volume.count:6,} of {volume.bytes / 1e9:9.2f} GB in all")
    return "\n".join([*lines, *(f"  {note}" for note in plan.notes)])
