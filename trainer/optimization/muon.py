"""Muon: momentum whose matrices are orthogonalised, right for weights that FSDP2 shards by rows.

For a weight matrix W with gradient G, momentum μ, learning rate lr and weight decay λ:

    M ← μ M + G                                                 sharded as W is
    U = G + μ M                                                 (Nesterov)
    O = P Qᵀ, nearly, where U = P S Qᵀ is the singular value decomposition: see `orthogonalised`
    W ← (1 − lr λ) W − lr · 0.2 · sqrt(max(rows, columns)) · O

Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/), with the weight decay and the scale of
arXiv:2502.16982, by which an update has the root mean square of AdamW's, so that AdamW's learning rate and decay serve.

A fused projection is several matrices in one parameter (`splits`), each orthogonalised by itself. As one, O would be
U (UᵀU)^(−1/2), which divides queries, keys and values alike by what they have together: a part whose gradients are
small beside another's would hardly move, which is what Muon is there to prevent.

**Communication.** The momentum of a matrix lies on S processes, rows by rows; orthogonalising takes the whole. The
matrices are dealt out, the dearest first, S at a time: in each such round every process becomes the owner of one. One
all-to-all brings each owner its matrix's rows, it orthogonalises, and another all-to-all takes the rows back. A step
over K matrices of N elements in all makes 2 ⌈K / S⌉ all-to-alls; each process sends and receives about 2 N / S elements
of `dtype`, does K / S of the arithmetic, and holds one whole matrix at a time. With R copies of each shard (HSDP) a
round takes R · S matrices, S of them for each copy's processes; the copies then broadcast the rows to one another: R
broadcasts a round, N / S elements received in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from tilewright.kernels.shards import local

_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`matrix` (rows, columns) with all its singular values brought near 1, computed and returned in `dtype`.

    Five Newton–Schulz iterations X ← a X + (b A + c A²) X, A = X Xᵀ, from X = matrix ÷ its Frobenius norm. Each takes a
    singular value s to a s + b s³ + c s⁵ and leaves the singular vectors. The coefficients, Keller Jordan's, are steep
    at 0 rather than exact at 1: what starts above 0.002 ends between 0.68 and 1.21. Zeros stay zeros.
    """
    a, b, c = _COEFFICIENTS
    norm = torch.linalg.vector_norm(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32))
    x = (matrix / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:  # the product A of the shorter side is the smaller
        x = x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return torch.transpose(x, 0, 1) if tall else x


@dataclass(frozen=True, eq=False)
class _Matrix:
    """Rows of a parameter that are one matrix, and the group whose options it is stepped by."""

    parameter: torch.Tensor
    group: dict[str, Any]
    first: int
    rows: int

    @property
    def columns(self) -> int:
        return self.parameter.shape[1]

    @property
    def work(self) -> int:
        """Multiplications of an iteration, but for a factor that all matrices share."""
        return min(self.rows, self.columns) ** 2 * max(self.rows, self.columns)

    def rows_on(self, shard: int, shards: int) -> slice:
        """Which rows of its part of the parameter a process holds of this matrix; DTensor's division, torch.chunk's."""
        height = self.parameter.shape[0]
        chunk = -(-height // shards)
        offset = chunk * shard
        start = max(self.first, offset)
        stop = min(self.first + self.rows, offset + chunk, height)
        return slice(start - offset, max(start, stop) - offset)

    def elements_on(self, shard: int, shards: int) -> int:
        rows = self.rows_on(shard, shards)
        return int(rows.stop - rows.start) * self.columns


class Muon(Optimizer):
    """Muon over matrices, plain or sharded by rows with ``fully_shard``, all over the same processes.

    Args:
        params: two-dimensional parameters, or groups of them.
        lr: learning rate, on AdamW's scale.
        momentum: μ, in [0, 1).
        weight_decay: λ, decoupled.
        dtype: what matrices are sent and orthogonalised in. bfloat16 is what Muon is usually run with; float32 gives
            results that hardly depend on the number of processes.
        splits: for a parameter that holds several matrices one below the other, how many rows each has.

    The state of a parameter is ``momentum_buffer``, of its shape, dtype and sharding, there from the start.

    Raises:
        ValueError: a parameter is no matrix or sharded otherwise, or its split does not add up to its rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        splits: Mapping[torch.Tensor, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype
        # `found_inf` and `grad_scale`, if set, skip and unscale in the step without a wait: see GradScaler.
        self._step_supports_amp_scaling = True
        everything = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self._holders = _Holders.of([parameter for parameter, _ in everything])
        matrices: list[_Matrix] = []
        for parameter, group in everything:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            first = 0
            for rows in (splits or {}).get(parameter, [parameter.shape[0]]):
                matrices.append(_Matrix(parameter, group, first, rows))
                first += rows
            if first != parameter.shape[0]:
                raise ValueError(f"Muon: a split gives {first} rows to a parameter of {parameter.shape[0]}")
        # The same order everywhere, for it decides who owns what.
        self._matrices = sorted(matrices, key=lambda matrix: -matrix.work)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; all processes must agree on which these are, and on `found_inf`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        # 0 where the step is to be skipped: everything is then multiplied such that it stays.
        taken = 1.0 if found_inf is None else 1 - found_inf
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if stepped:
                self._unscale(stepped)
                self._accumulate_and_decay(stepped, group, taken)
        matrices = [matrix for matrix in self._matrices if matrix.parameter.grad is not None]
        for start in range(0, len(matrices), self._holders.processes):
            self._step_round(matrices[start : start + self._holders.processes], taken)
        return loss

    def _unscale(self, parameters: list[torch.Tensor]) -> None:
        """Divide the gradients by `grad_scale`, and make zeros of those that `found_inf` speaks of."""
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_div_(gradients, grad_scale)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            for gradient in gradients:
                gradient.masked_fill_(found_inf.bool(), 0.0)

    def _accumulate_and_decay(
        self, parameters: list[torch.Tensor], group: dict[str, Any], taken: torch.Tensor | float
    ) -> None:
        momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_mul_(momenta, 1 - (1 - group["momentum"]) * taken)
        torch._foreach_add_(momenta, [local(parameter.grad) for parameter in parameters if parameter.grad is not None])
        decay = group["lr"] * group["weight_decay"]
        torch._foreach_mul_([local(parameter) for parameter in parameters], 1 - decay * taken)

    def _step_round(self, matrices: list[_Matrix], taken: torch.Tensor | float) -> None:
        """Step at most one matrix for each process: the copies of a shard take turns along the list."""
        holders = self._holders
        mine = self._orthogonalised_rows(matrices[holders.copy :: holders.copies])
        for copy in range(holders.copies):
            theirs = matrices[copy :: holders.copies]
            sizes = [matrix.elements_on(holders.shard, holders.shards) for matrix in theirs]
            rows = mine if copy == holders.copy else mine.new_empty(sum(sizes))
            holders.broadcast(rows, copy)
            for matrix, update in zip(theirs, torch.split(rows, sizes), strict=True):
                weight = local(matrix.parameter)[matrix.rows_on(holders.shard, holders.shards)]
                scale = 0.2 * math.sqrt(max(matrix.rows, matrix.columns))
                update = update.view_as(weight).to(weight) * taken
                weight.add_(update, alpha=-matrix.group["lr"] * scale)

    def _orthogonalised_rows(self, matrices: list[_Matrix]) -> torch.Tensor:
        """This process's rows of each of `matrices`, orthogonalised, end to end; the n-th belongs to the n-th shard."""
        holders = self._holders
        shard, shards = holders.shard, holders.shards
        own = matrices[shard] if shard < len(matrices) else None
        outward = [matrix.elements_on(shard, shards) for matrix in matrices] + [0] * (shards - len(matrices))
        inward = [own.elements_on(other, shards) if own else 0 for other in range(shards)]
        empty = torch.empty(0, dtype=self._dtype, device=holders.device)
        rows = torch.cat([empty, *(self._direction(matrix).flatten() for matrix in matrices)])
        # What the others send comes in the order of their rows, so that end to end it is the matrix.
        whole = holders.exchange(rows, outward, inward)
        if own is not None:
            whole = orthogonalised(whole.view(own.rows, own.columns), self._dtype).flatten()
        return holders.exchange(whole, inward, outward)

    def _direction(self, matrix: _Matrix) -> torch.Tensor:
        """U of this process's rows of a matrix."""
        rows = matrix.rows_on(self._holders.shard, self._holders.shards)
        momentum = local(self.state[matrix.parameter]["momentum_buffer"])[rows]
        assert matrix.parameter.grad is not None
        direction = torch.add(local(matrix.parameter.grad)[rows], momentum, alpha=matrix.group["momentum"])
        return direction.to(self._holders.device, self._dtype)


@dataclass(frozen=True)
class _Holders:
    """The processes that hold the parameters, as seen from one of them.

    Attributes:
        shards, shard: how many parts the rows are divided into, and which of them this process holds.
        copies, copy: how many processes hold the same part, and which of them this is.
        device: where matrices are sent and orthogonalised, also where parameters are kept in host memory.
    """

    shards: int
    shard: int
    copies: int
    copy: int
    device: torch.device
    shard_group: dist.ProcessGroup | None = None
    copy_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor]) -> _Holders:
        """Those of `parameters`.

        Raises:
            ValueError: a parameter is no matrix, or they are not all sharded by rows over the same processes.
        """
        for parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon: a parameter has shape {tuple(parameter.shape)}; it must have two dimensions")
        layouts = {(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in parameters}
        if len(layouts) > 1:
            raise ValueError("Muon: the parameters are laid out over different processes; use an optimizer for each")
        layout = layouts.pop() if layouts else None
        if layout is None:
            return cls(1, 0, 1, 0, parameters[0].device if parameters else torch.device("cpu"))
        mesh, placements = layout
        if placements not in ((Shard(0),), (Replicate(), Shard(0))):
            raise ValueError(f"Muon: the parameters are laid out as {placements}; it must be by rows, as FSDP2 does")
        replicated, cuda = mesh.ndim == 2, mesh.device_type == "cuda"
        return cls(
            shards=mesh.size(-1),
            shard=mesh.get_local_rank(mesh.ndim - 1),
            copies=mesh.size(0) if replicated else 1,
            copy=mesh.get_local_rank(0) if replicated else 0,
            device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(mesh.device_type),
            shard_group=mesh.get_group(mesh.ndim - 1),
            copy_group=mesh.get_group(0) if replicated else None,
        )

    @property
    def processes(self) -> int:
        return self.shards * self.copies

    def exchange(self, rows: torch.Tensor, outward: list[int], inward: list[int]) -> torch.Tensor:
        """Send `outward[n]` elements of `rows` to the n-th process of the shards; gives what they send, end to end."""
        if self.shards == 1:
            return rows
        received = rows.new_empty(sum(inward))
        dist.all_to_all_single(received, rows, inward, outward, group=self.shard_group)
        return received

    def broadcast(self, rows: torch.Tensor, copy: int) -> None:
        """Fill `rows` with what the given copy has in it."""
        if self.copies > 1 and rows.numel():
            dist.broadcast(rows, group=self.copy_group, group_src=copy)
