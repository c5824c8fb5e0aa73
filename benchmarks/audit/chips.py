"""The GPUs that kernels are audited for: what one multiprocessor holds, and what the datasheet promises at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tilewright.kernels.ahead_of_time import SHARED_MEMORY
from tilewright.kernels.launch import PROCESSORS

_KIB = 1024
_WARP = 32  # threads

# How resources are handed out, alike on all three generations: registers to a warp in units of 256, warps to a
# multiprocessor's four quarters alike, shared memory to a block in units of 128 bytes, 1 KiB of which the driver takes
# for itself. Sources: cuda_occupancy.h, NVIDIA's own calculator, which triton ships and the tests compare with; for the
# 1 KiB, which that leaves to the driver, NVIDIA's tuning guides of Ampere and Hopper.
_REGISTER_UNIT = 256
_QUARTERS = 4
_SHARED_UNIT = 128
_SHARED_RESERVED = 1 * _KIB


@dataclass(frozen=True)
class Chip:
    """One GPU; no kernel reaches its peaks.

    Attributes:
        name: the product.
        generation: compute capability × 10.
        registers: 32-bit registers of one multiprocessor.
        shared_memory: bytes of one multiprocessor.
        warps, blocks: resident on one multiprocessor at most.
        peak_bandwidth: bytes of device memory per second.
        peak_flops: bfloat16 operations of the tensor cores per second.
    """

    name: str
    generation: int
    shared_memory: int
    peak_bandwidth: float
    peak_flops: float
    registers: int = 64 * _KIB
    warps: int = 64
    blocks: int = 32

    @property
    def processors(self) -> int:
        """Streaming multiprocessors: those of NVIDIA's white papers; of B200, where none says, what CUDA reports."""
        return PROCESSORS[self.generation]

    @property
    def shared_memory_per_block(self) -> int:
        """Bytes that one block may ask for."""
        return SHARED_MEMORY[self.generation]


# Limits of a multiprocessor: CUDA C++ Programming Guide, technical specifications of compute capability 8.0, 9.0, 10.0.
CHIPS = {
    # A100 datasheet, A100 80GB SXM: 2,039 GB/s; 312 TFLOPS dense.
    80: Chip("A100-SXM4-80GB", 80, 164 * _KIB, peak_bandwidth=2.039e12, peak_flops=312e12),
    # H100 datasheet, H100 SXM: 3.35 TB/s; 1,979 TFLOPS with sparsity, dense half of it (989.4 in the white paper).
    90: Chip("H100-SXM5-80GB", 90, 228 * _KIB, peak_bandwidth=3.35e12, peak_flops=989e12),
    # Blackwell Architecture Technical Brief 2.1, table 3, a GPU of HGX B200: 7.7 TB/s, where the first announcements
    # said 8; 4.5 PFLOPS with sparsity, dense half of it.
    100: Chip("B200", 100, 228 * _KIB, peak_bandwidth=7.7e12, peak_flops=2250e12),
}


class Occupancy(NamedTuple):
    """Blocks resident on one multiprocessor, the share of its warps that they fill, and what allows no more."""

    blocks: int
    share: float
    limited_by: str


def occupancy(chip: Chip, *, warps: int, registers: int, shared_memory: int) -> Occupancy:
    """How many blocks of a kernel one multiprocessor holds, by the rules of NVIDIA's occupancy calculator.

    Args:
        chip: the GPU.
        warps: of one block.
        registers: of one thread.
        shared_memory: bytes of one block, without what the driver reserves.

    Returns:
        0 blocks where not even one fits.
    """
    registers_of_warp = _round_up(registers * _WARP, _REGISTER_UNIT)
    warps_by_registers = chip.registers // registers_of_warp // _QUARTERS * _QUARTERS
    shared_of_block = _round_up(shared_memory + _SHARED_RESERVED, _SHARED_UNIT)
    limits = {
        "registers": warps_by_registers // warps,
        "shared memory": chip.shared_memory // shared_of_block,
        "threads": chip.warps // warps,
        "blocks": chip.blocks,
    }
    limited_by = min(limits, key=lambda name: limits[name])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * warps / chip.warps, limited_by)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
