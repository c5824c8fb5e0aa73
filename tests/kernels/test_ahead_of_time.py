"""Kernels compile for GPUs that are not there, from the launches that an op's own host code makes.

`make audit` compiles those of every op; here one op shows that it can be done, forward and backward.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tilewright.kernels.ahead_of_time import SHARED_MEMORY, captured_launches

# Distinct launches only: shapes that differ in nothing which the compiler sees give the same kernel.
COMPILE = """
import json, sys, torch
from tilewright.kernels.ahead_of_time import launches_of
from tilewright.kernels.registry import SPECS
spec = next(spec for spec in SPECS if spec.name == "relu2")
for _, launch in launches_of(spec, torch.bfloat16, int(sys.argv[1])):
    compiled = launch.compile()
    print(json.dumps({"name": launch.name, "backward": launch.backward, "shared": compiled.metadata.shared,
                      "target": compiled.metadata.target.arch, "cubin": len(compiled.asm["cubin"])}))
"""


@pytest.mark.parametrize("chip", [80, 90])
def test_every_launch_of_an_op_compiles_and_fits_the_chips_shared_memory(chip: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(chip)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["target"] for kernel in kernels} == {chip}
    assert {(kernel["name"], kernel["backward"]) for kernel in kernels} == {
        ("relu2._forward", False),
        ("relu2._backward", True),
    }
    for kernel in kernels:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= SHARED_MEMORY[chip], kernel


def test_capturing_launches_in_an_interpreted_process_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"), captured_launches(80):
        torch.empty(1)
