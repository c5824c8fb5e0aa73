"""Processes, devices and sharding: how a model that knows nothing of them comes to run on one process or on many."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tilewright.corpus import CorpusError
from tilewright.model import Transformer, initialise
from tilewright.model.config import ModelConfig
from tilewright.trainer.errors import AnotherProcessEnded, TrainingError, disk_error_text
from tilewright.trainer.host_memory import keep_freed_memory
from tilewright.trainer.parallel.activations import checkpoint_activations
from tilewright.trainer.parallel.float8 import use_float8
from tilewright.trainer.parallel.meeting import meet
from tilewright.trainer.parallel.waiting import waiting
from tilewright.trainer.recipe import ActivationCheckpointing, Parallel

_T = typing.TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen from one of them.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: where this process computes.
        mesh: all of them, in one dimension.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and displays."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        return self.add(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, summed over the processes in its own memory, without waiting for the device."""
        with waiting(x.device):
            dist.all_reduce(x)
        return x

    def share(self, value: object) -> object:
        """What the first process passes as `value`, on all of them."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def first_decides(self, decision: Callable[[], _T]) -> _T:
        """What `decision` gives on the first process, on all of them.

        Raises:
            TrainingError: on all of them, for what it raised there: that, a `CorpusError` or an `OSError`.
        """
        answer: _T | None = None
        problem: str | None = None
        if self.first:
            try:
                answer = decision()
            except (TrainingError, CorpusError) as error:
                problem = str(error)
            except OSError as error:
                problem = disk_error_text(error)
        answer, problem = typing.cast(tuple[_T, str | None], self.share((answer, problem)))
        if problem is not None:
            raise TrainingError(problem)
        return answer

    def gather(self, value: object) -> list[object]:
        """What each process passes as `value`, in the order of ranks, on all of them."""
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or be the only one; leave them at the end of the ``with`` block.

    Raises:
        TrainingError: there are more processes than GPUs, they cannot meet, or another one ended first.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    # A hang is the hang watch's to end, which says where it is; and what the first process does alone may take long.
    timeout = timedelta(hours=12)
    backend = {"cuda": "cuda:nccl,cpu:gloo", "cpu": "gloo"}[device_type]
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if device_type == "cpu":
        keep_freed_memory()
    else:
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as "
                "many processes with --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            store, rank, size = meet(timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        except (ValueError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"RANK and WORLD_SIZE are set, but the processes cannot meet ({reason}); start them with torchrun, or "
                "unset the two variables"
            ) from None
        except RuntimeError as error:
            if _tells_of_an_end(error):
                raise AnotherProcessEnded from None
            raise
    else:
        # A store in memory: one process needs no port, and none is opened.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        size = dist.get_world_size()
        yield World(dist.get_rank(), size, device, init_device_mesh(device_type, (size,), mesh_dim_names=("shard",)))
        if size > 1:
            # Leaving together: a process that is still in a collective when another has gone is aborted by gloo.
            dist.barrier()
    except RuntimeError as error:
        if dist.get_world_size() > 1 and _tells_of_an_end(error):
            raise AnotherProcessEnded from None
        raise
    finally:
        dist.destroy_process_group()


def _tells_of_an_end(error: RuntimeError) -> bool:
    """Whether a backend says that it no longer reaches another process; gloo has no class of its own for that."""
    reasons = ("by peer", "connectFullMesh failed", "Broken pipe")
    return isinstance(error, dist.DistError) or any(reason in str(error) for reason in reasons)


def sharded_model(
    config: ModelConfig,
    world: World,
    *,
    compute_dtype: torch.dtype,
    compile: bool,
    seed: int,
    parallel: Parallel | None = None,
    activation_checkpointing: ActivationCheckpointing | None = None,
    float8: str = "none",
) -> Transformer:
    """A Transformer with float32 parameters sharded over the processes, its initial values independent of how many.

    The matrix products run in `compute_dtype`; gradients are reduced in float32. Parameters are created without memory,
    sharded, and only then initialised, so no process ever holds the whole model. Each block is gathered and reduced as
    one, and the rest (embedding, last norm, head) as another, which stays gathered from the embedding to the loss.

    Raises:
        TrainingError: `parallel` does not fit the processes or the device.
    """
    parallel = parallel or Parallel()
    _check_parallel(parallel, world)
    with torch.device("meta"):
        model = Transformer(config)
    use_float8(model, float8, emulate=world.device.type == "cpu")
    checkpoint_activations(
        model.blocks,
        activation_checkpointing or ActivationCheckpointing(),
        compiled=compile,
        device_type=world.device.type,
    )
    if compile:
        compile_blocks(model)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        # The rotary tables pass through the blocks and must stay float32.
        cast_forward_inputs=False,
    )
    mesh = mesh_of(world, parallel.replicas)
    again = parallel.reshard_after_forward
    offload = CPUOffloadPolicy() if parallel.offload else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=again)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    _prefetch(model, parallel.prefetch)
    if world.size == 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_ReduceOfOne())  # type: ignore[arg-type]
    if world.device.type == "meta":
        return model  # planned for, not run
    model.to_empty(device="cpu" if parallel.offload else world.device)
    if parallel.offload:
        for buffer in model.buffers():
            buffer.data = buffer.data.to(world.device)  # offloaded are parameters alone
    initialise(model, seed)
    return model


def mesh_of(world: World, replicas: int) -> DeviceMesh:
    """The processes as FSDP takes them: in one dimension, or in `replicas` rows of which each holds a whole model.

    Processes of one row have neighbouring ranks, so that with as many of them as a machine has GPUs the gathering stays
    within the machine.
    """
    if replicas == 1:
        return world.mesh
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))


def _check_parallel(parallel: Parallel, world: World) -> None:
    if world.size % parallel.replicas:
        fitting = [n for n in range(1, world.size + 1) if world.size % n == 0]
        nearest = min(fitting, key=lambda n: (abs(n - parallel.replicas), n))
        raise TrainingError(
            f"parallel.replicas is {parallel.replicas}, which does not divide the {world.size} "
            f"process{'es' if world.size > 1 else ''} of this run; set it to {nearest}, or start another number"
        )
    if parallel.offload and world.device.type == "cpu":
        raise TrainingError(
            "parallel.offload moves weights from a GPU to host memory, and this run has no GPU; unset it"
        )


def _prefetch(model: Transformer, depth: int) -> None:
    """Gather the weights of `depth` blocks ahead, in the forward pass and, the other way, in the backward pass."""
    blocks = typing.cast("list[FSDPModule]", list(model.blocks))
    for number, block in enumerate(blocks):
        # FSDP itself gathers one block ahead in the backward pass; where told otherwise, it does as told.
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + depth])
        block.set_modules_to_backward_prefetch(blocks[max(0, number - depth) : number][::-1])


class _ReduceOfOne:
    """The reduce-scatter of a single process: what FSDP puts in is what comes out, in the same memory.

    With a buffer each for input and output, FSDP would copy every gradient once more. It asks for the two in turn; the
    collective itself it leaves out for one process.
    """

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The input first, then the same as output."""
        if self._input is None:
            self._input = torch.empty(size, dtype=dtype, device=device)
            return self._input
        output, self._input = self._input, None
        return output


def compile_blocks(model: Transformer) -> None:
    """Compile each block and the loss; the blocks are alike, so that one compilation serves them all."""
    for block in model.blocks:
        block.compile(fullgraph=True)
    model.loss = torch.compile(model.loss, fullgraph=True)  # type: ignore[method-assign]


def check_batch(sequences: int, micro_batch: int, world_size: int, *, key: str = "batch.sequences") -> None:
    """Raise unless `sequences` divide into whole micro-batches on every process.

    Args:
        key: what states `sequences` in the recipe.

    Raises:
        TrainingError: they do not; the sentence names the nearest numbers that do.
    """
    if sequences % world_size:
        lower = sequences // world_size * world_size
        nearest = [str(number) for number in (lower, lower + world_size) if number]
        raise TrainingError(
            f"{key} is {sequences}, which {world_size} processes do not divide; "
            f"set it to {' or '.join(nearest)}, or change the number of processes"
        )
    per_process = sequences // world_size
    if per_process % micro_batch:
        divisors = [n for n in range(1, per_process + 1) if per_process % n == 0]
        closest = min(divisors, key=lambda n: (abs(n - micro_batch), n))
        raise TrainingError(
            f"batch.micro_batch is {micro_batch}, which does not divide the {per_process} sequences of each process "
            f"({key} {sequences} over {world_size}); set batch.micro_batch to {closest}"
        )
