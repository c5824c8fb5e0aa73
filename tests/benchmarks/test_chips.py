"""What a multiprocessor holds, by NVIDIA's own calculator and by hand."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from tilewright.benchmarks.audit.chips import CHIPS, occupancy

# Threads, registers and shared memory of a multiprocessor are what a driver would report; all else the header knows.
CALCULATOR = r"""
#include <climits>
#include "cuda_occupancy.h"

extern "C" int resident_blocks(int generation, int processors, int threads, int registers, int shared, int block_shared,
                               int warps, int thread_registers, int asked_shared) {
    cudaOccDeviceProp chip;
    chip.computeMajor = generation / 10, chip.computeMinor = generation % 10;
    chip.maxThreadsPerBlock = 1024, chip.maxThreadsPerMultiprocessor = threads, chip.warpSize = 32;
    chip.regsPerBlock = chip.regsPerMultiprocessor = registers;
    chip.sharedMemPerBlock = 48 * 1024, chip.sharedMemPerBlockOptin = block_shared;
    chip.sharedMemPerMultiprocessor = shared, chip.reservedSharedMemPerBlock = 1024, chip.numSms = processors;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = thread_registers, kernel.numBlockBarriers = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = asked_shared;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, 32 * warps, asked_shared)) return -1;
    return result.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="session")
def nvidias_calculator(tmp_path_factory):
    """NVIDIA's occupancy calculator, compiled from the header that comes with triton."""
    triton = pytest.importorskip("triton")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("calculator")
    (folder / "calculator.cpp").write_text(CALCULATOR)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", "-w", f"-I{include}", "calculator.cpp", "-o", "calculator.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "calculator.so")).resident_blocks


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_as_many_blocks_are_resident_as_nvidias_calculator_says(nvidias_calculator, chip) -> None:
    largest = chip.shared_memory_per_block
    limits = (chip.processors, 32 * chip.warps, chip.registers, chip.shared_memory, largest)
    sizes = [0, 1, 127, *range(128, 16384, 128), *range(16385, largest, 4999), largest]
    for warps, registers, shared in itertools.product((1, 2, 3, 4, 5, 8, 10, 16, 31, 32), range(16, 256, 3), sizes):
        theirs = nvidias_calculator(chip.generation, *limits, warps, registers, shared)
        assert occupancy(chip, warps=warps, registers=registers, shared_memory=shared).blocks == theirs, (
            warps, registers, shared,
        )  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_occupancy_by_registers_is_that_of_nvidias_example(chip) -> None:
    # CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers, for 65,536 registers and 2,048 threads.
    assert occupancy(chip, warps=4, registers=37, shared_memory=0) == (12, 0.75, "registers")
    assert occupancy(chip, warps=10, registers=37, shared_memory=0) == (4, 0.625, "registers")
    assert occupancy(chip, warps=8, registers=32, shared_memory=0).share == 1.0


def test_occupancy_by_shared_memory_counts_what_the_driver_keeps_of_each_block() -> None:
    # 164 KiB hold two blocks of 81 KiB and the 1 KiB that each is charged, and not two of one byte more.
    assert occupancy(CHIPS[80], warps=4, registers=32, shared_memory=81 * 1024) == (2, 0.125, "shared memory")
    assert occupancy(CHIPS[80], warps=4, registers=32, shared_memory=81 * 1024 + 1).blocks == 1
    assert occupancy(CHIPS[80], warps=4, registers=32, shared_memory=163 * 1024).blocks == 1
    assert occupancy(CHIPS[90], warps=4, registers=32, shared_memory=227 * 1024).blocks == 1


def test_a_block_that_asks_for_too_much_does_not_fit() -> None:
    assert occupancy(CHIPS[80], warps=4, registers=32, shared_memory=163 * 1024 + 1) == (0, 0.0, "shared memory")
    assert occupancy(CHIPS[90], warps=32, registers=80, shared_memory=0) == (0, 0.0, "registers")


def test_occupancy_by_threads_and_by_blocks() -> None:
    assert occupancy(CHIPS[90], warps=32, registers=32, shared_memory=0) == (2, 1.0, "registers")
    assert occupancy(CHIPS[90], warps=24, registers=16, shared_memory=0) == (2, 0.75, "threads")
    assert occupancy(CHIPS[90], warps=1, registers=16, shared_memory=0) == (32, 0.5, "blocks")
