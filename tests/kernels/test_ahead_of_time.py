"""Every kernel compiles for A100 (sm_80) and H100 (sm_90) at the shapes of real models, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tilewright.kernels.ahead_of_time import SHARED_MEMORY, captured_launches
from tilewright.kernels.opspec import OpSpec
from tilewright.kernels.registry import SPECS

# Distinct launches only: shapes that differ in nothing which the compiler sees give the same kernel.
COMPILE = """
import json, sys, torch
from tilewright.kernels.ahead_of_time import launches_of
from tilewright.kernels.registry import SPECS
spec = next(spec for spec in SPECS if spec.name == sys.argv[1])
for label, launch in launches_of(spec, torch.bfloat16, int(sys.argv[2])):
    compiled = launch.compile()
    print(json.dumps({"label": label, "name": launch.name, "shared": compiled.metadata.shared,
                      "target": compiled.metadata.target.arch, "cubin": len(compiled.asm["cubin"])}))
"""


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_launch_compiles_and_fits_the_chips_shared_memory(spec: OpSpec, chip: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, spec.name, str(chip)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["target"] for kernel in kernels} == {chip}
    has_gradients = bool(spec.differentiable(next(spec.samples(torch.device("cpu"), torch.float32))))
    assert any("backward" in kernel["name"] for kernel in kernels) == has_gradients, "no backward launch was compiled"
    for kernel in kernels:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= SHARED_MEMORY[chip], kernel


def test_capturing_launches_in_an_interpreted_process_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"), captured_launches(80):
        torch.empty(1)
