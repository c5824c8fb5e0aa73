"""Tensors as rows: how ops that work along the last dimension see inputs of any shape and stride, and how their kernels
share the rows out.

A kernel here works on blocks of BLOCK_ROWS × BLOCK_COLUMNS elements. Its grid is (programs, column blocks): each
program keeps to one block of columns, reads the weights of those columns once, and walks over the rows, with STAGES
blocks of them in flight. Where one block of columns holds the whole row, one read of the row is enough for a norm.
Where it does not, a first kernel leaves a float32 sum for each row and block of columns (the *parts* of the row's sum),
and a second adds up the parts and does the rest.

A backward pass holds two rows and the sums of the weights' gradients. Past `FLOAT32_COLUMNS` that is too much for a
processor's registers, unless the rows stay in 16 bits between their two uses, the row's sum and its gradient. So there
a program *carries* the row: each turn of its loop writes the gradient of the row that the turn before has summed, then
loads and sums the next. Within one turn the compiler would keep a row as the float32 numbers that it was summed as.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.launch import Configuration, LaunchTable, processors

if HAS_TRITON:
    import triton
    import triton.language as tl


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` of shape (…, width) as (rows, width) with unit stride along a row.

    No copy is made where one row stride describes the rows, stride 0 (an expanded tensor) included.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The most columns of a row that a backward pass holds in float32.
FLOAT32_COLUMNS = 8192


def can_carry(x: torch.Tensor) -> bool:
    """Whether rows of `x` can be held in 16 bits, and are aligned: else each element has an address in registers."""
    return x.element_size() == 2 and x.shape[-1] % 16 == 0


class Division(NamedTuple):
    """How rows are shared out: to `programs` × `column_blocks` programs, launched with the same `options`.

    `sums_stride` is the width rounded up to what keeps the programs' sums aligned, whatever the rows are.
    """

    programs: int
    column_blocks: int
    sums_stride: int
    options: dict[str, int]

    @property
    def grid(self) -> tuple[int, int]:
        """The launch grid."""
        return self.programs, self.column_blocks

    def parts(self, rows: int, device: torch.device) -> torch.Tensor:
        """Room for the parts of one sum of each row."""
        return torch.empty(rows, self.column_blocks, dtype=torch.float32, device=device)

    @property
    def carried(self) -> bool:
        """Whether one block holds the whole row, and in a backward pass has to hold it in 16 bits."""
        return self.column_blocks == 1 and self.options["BLOCK_COLUMNS"] > FLOAT32_COLUMNS

    @property
    def carried_options(self) -> dict[str, int]:
        """The options of a kernel that carries rows, one at a time."""
        return {name: value for name, value in self.options.items() if name != "BLOCK_ROWS"}

    @property
    def padded_parts(self) -> int:
        """The constexpr PARTS of `load_parts`."""
        return 1 << (self.column_blocks - 1).bit_length()

    def sums(self, device: torch.device) -> torch.Tensor:
        """Room for the sum that each program takes over its rows, for `sum_over_programs`."""
        return torch.empty(self.programs, self.sums_stride, dtype=torch.float32, device=device)


def _by_width(*rows: tuple[int, int, int, int, int]) -> tuple[Configuration, ...]:
    """Configurations for `divide` from (width up to, most columns of a block, PROGRAMS, warps, stages)."""
    return tuple(
        Configuration(up_to, warps, {"BLOCK_COLUMNS": columns, "BLOCK_ELEMENTS": columns, "PROGRAMS": programs}, stages)
        for up_to, columns, programs, warps, stages in rows
    )


# For a norm's passes, beside the rows of its own tables: smaller blocks that share a processor, and fewer warps.
FORWARD_CANDIDATES = _by_width(
    (2048, 2048, 4, 4, 3),
    (4096, 4096, 2, 8, 3),
    (8192, 8192, 1, 16, 3),
    (16384, 16384, 1, 32, 2),
    (1 << 31, 4096, 2, 8, 3),
)
BACKWARD_CANDIDATES = _by_width(
    (2048, 2048, 2, 8, 3),
    (4096, 4096, 1, 32, 3),
    (8192, 8192, 1, 32, 3),
    (1 << 31, 4096, 1, 16, 3),
)


def divide(
    rows: int, width: int, table: LaunchTable, device: torch.device, most_columns: int | None = None
) -> Division:
    """Share out `rows` (at least one) of `width` elements as the table says, as for the widest where a block would
    have more than `most_columns`.

    The table's configurations state BLOCK_COLUMNS, the most columns of one block; BLOCK_ELEMENTS, the most elements of
    one block; and PROGRAMS, how many programs share a processor.
    """
    # Plain integers: triton.cdiv and next_power_of_2 take a microsecond each, and this runs at every launch.
    configuration = table.pick(width, device)
    if most_columns is not None and configuration.blocks["BLOCK_COLUMNS"] > most_columns:
        configuration = table.pick(table.largest(), device)
    blocks, stages = configuration.blocks, configuration.num_stages
    columns, elements, programs = blocks["BLOCK_COLUMNS"], blocks["BLOCK_ELEMENTS"], blocks["PROGRAMS"]
    if width % 16:
        # Triton moves 16 bytes at once, and past registers, where it knows that rows are aligned: at multiples of 16.
        # In others each element has an address of its own; registers then hold one block in flight, and a smaller one.
        columns, elements, stages = min(columns, 8192), elements // 2, 1
    block_columns = min(1 << (width - 1).bit_length(), columns)
    block_rows = max(1, elements // block_columns)
    column_blocks = -(-width // block_columns)
    row_blocks = -(-rows // block_rows)
    most = -(-programs * processors(device) // column_blocks)
    # The fewest programs that are done as soon as `most` would be: each has weights to read and sums to leave.
    programs = -(-row_blocks // -(-row_blocks // most))
    options = {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "STAGES": stages,
        "num_warps": configuration.num_warps,
    }
    return Division(programs, column_blocks, -(-width // 16) * 16, options)


def row_stride(rows: torch.Tensor | None) -> int:
    """Elements from one row to the next; 0 where there is no tensor."""
    return rows.stride(0) if rows is not None else 0


def sum_over_programs(sums: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The sum of the programs' `sums`, in a fixed order, with the shape and dtype of `like` (width,)."""
    assert sums is not None
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    width = like.shape[0]
    _sum_over_programs[(-(-width // 64),)](
        sums, total, sums.stride(0), sums.shape[0], width, BLOCK_PROGRAMS=64, BLOCK_COLUMNS=64, num_warps=8
    )
    return total


if HAS_TRITON:

    @triton.jit
    def load_block(ptr, offsets, columns, mask) -> tl.tensor:
        """The elements `columns` past each row's offset, as float32 [BLOCK_ROWS, BLOCK_COLUMNS]; 0 where masked."""
        return tl.load(ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def store_block(ptr, offsets, columns, values, mask) -> None:
        """Store [BLOCK_ROWS, BLOCK_COLUMNS] in the tensor's dtype."""
        tl.store(ptr + offsets[:, None] + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def load_sum(x_ptr, residual_ptr, summed_ptr, x_offsets, residual_offsets, offsets, columns, mask) -> tl.tensor:
        """x, or where there is a residual x + residual, which is stored; float32 [BLOCK_ROWS, BLOCK_COLUMNS]."""
        x = load_block(x_ptr, x_offsets, columns, mask)
        if residual_ptr is not None:
            x += load_block(residual_ptr, residual_offsets, columns, mask)
            # Rounded to the stored dtype first: the norm is taken of what is returned.
            summed = x.to(summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + offsets[:, None] + columns[None, :], summed, mask=mask)
            x = summed.to(tl.float32)
        return x

    @triton.jit
    def store_part(parts_ptr, row, in_rows, part) -> None:
        """Leave this program's part of each row's sum, [BLOCK_ROWS]."""
        tl.store(parts_ptr + row * tl.num_programs(1) + tl.program_id(1), part, mask=in_rows)

    @triton.jit
    def load_parts(parts_ptr, row, in_rows, PARTS: tl.constexpr) -> tl.tensor:
        """The parts of each row's sum, [BLOCK_ROWS, PARTS]; 0 past the last."""
        part = tl.arange(0, PARTS)
        mask = in_rows[:, None] & (part < tl.num_programs(1))[None, :]
        return tl.load(parts_ptr + row[:, None] * tl.num_programs(1) + part[None, :], mask=mask, other=0.0)

    @triton.jit
    def _sum_over_programs(
        sums_ptr, total_ptr, sums_stride, programs, width, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
    ):
        columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        in_width = columns < width
        total = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, programs, BLOCK_PROGRAMS):
            program = (start + tl.arange(0, BLOCK_PROGRAMS)).to(tl.int64)  # int64: programs × stride may pass 2³¹
            mask = (program < programs)[:, None] & in_width[None, :]
            total += load_block(sums_ptr, program * sums_stride, columns, mask)
        total = tl.sum(total, axis=0)
        tl.store(total_ptr + columns, total.to(total_ptr.dtype.element_ty), mask=in_width)
