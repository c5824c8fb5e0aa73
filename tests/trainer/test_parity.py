"""However a step is shared among processes and micro-batches, it is the step of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.mark.parametrize(("processes", "cases"), [(1, 32), (2, 160), (4, 160)])
def test_loss_gradients_and_traffic_are_those_of_one_process_on_the_whole_batch(processes: int, cases: int) -> None:
    """FSDP and HSDP, reduced after each micro-batch or the last, 1 or 4 of them, ragged or even, packed or not, with
    every mode of activation checkpointing: see `parity_worker`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(WORKER)], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert done.stdout.strip().endswith(f"{cases} cases")
