"""Muon: against the singular value decomposition, against a textbook step, and on one, two and four processes."""

import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tilewright.trainer.checkpoints.checkpoint import committed, load, training_state
from tilewright.trainer.optimization.averaging import WeightAverage
from tilewright.trainer.optimization.muon import Muon, orthogonalised
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, sharded_model, world

WORKER = Path(__file__).with_name("muon_worker.py")
program = SimpleNamespace(**runpy.run_path(str(WORKER)))
SHAPES = [(5, 12), (12, 5), (8, 8), (1, 6), (6, 1), (1, 1)]


@pytest.fixture(scope="module")
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def by_decomposition(matrix: torch.Tensor) -> torch.Tensor:
    """The same in float64 on the singular values alone: each goes five times through a s + b s³ + c s⁵."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalising_moves_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-6  # gradients are small
    got = orthogonalised(matrix, torch.float32)
    torch.testing.assert_close(got.double(), by_decomposition(matrix), rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(got)
    assert 0.68 < values.min() <= values.max() < 1.21
    coarse = orthogonalised(matrix, torch.bfloat16)
    assert coarse.dtype == torch.bfloat16
    assert (coarse.double() - got).norm() < 0.03 * got.norm()


def test_a_gradient_of_zeros_gives_a_step_of_zeros() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 4), torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16))


def test_steps_are_those_of_the_papers_with_each_part_of_a_fused_matrix_by_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(9, 4, generator=generator))
    optimizer = Muon([weight], 0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32, splits={weight: [6, 2, 1]})
    expected, momentum = weight.detach().double(), torch.zeros(9, 4, dtype=torch.float64)
    for _ in range(3):
        weight.grad = torch.randn(9, 4, generator=generator)
        momentum = 0.9 * momentum + weight.grad
        direction = weight.grad + 0.9 * momentum
        expected = expected * (1 - 0.1 * 0.5)
        for part in (slice(0, 6), slice(6, 8), slice(8, 9)):
            rows = part.stop - part.start
            expected[part] -= 0.1 * 0.2 * math.sqrt(max(rows, 4)) * by_decomposition(direction[part])
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_the_blocks_matrices_are_muons_and_the_rest_adamws(processes: World) -> None:
    model = sharded_model(program.CONFIGS["ragged"], processes, compute_dtype=torch.float32, compile=False, seed=1)
    state = training_state(model, build_optimizer(model, program.MUON))
    kinds = {name.rsplit(".", 1)[0].removeprefix("optimizer."): name.rsplit(".", 1)[1] for name in state}
    muons = {name for name, kind in kinds.items() if kind == "momentum_buffer"}
    names = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert muons == {f"blocks.{block}.{name}.weight" for block in range(2) for name in names}
    rest = {name for name, kind in kinds.items() if kind == "exp_avg_sq"}
    assert rest == dict(model.named_parameters()).keys() - muons


def test_what_is_no_matrix_or_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a parameter has shape \(3,\); it must have two dimensions"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)
    weight = torch.nn.Parameter(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="a split gives 4 rows to a parameter of 5"):
        Muon([weight], 0.1, splits={weight: [2, 2]})


@pytest.fixture(scope="module")
def on_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which four processes left what they found: see `muon_worker`."""
    folder = tmp_path_factory.mktemp("muon")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def found(folder: Path, case: str) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = torch.load(folder / "found.pt", weights_only=True)[case]
    return values


@pytest.mark.parametrize("case", ["ragged, 2", "ragged, 4", "ragged, 2 x 2", "fewer rows than processes, 4"])
def test_two_and_four_processes_come_to_the_weights_of_one(on_processes: Path, processes: World, case: str) -> None:
    config = program.CONFIGS[case.rsplit(",", 1)[0]]
    alone = program.weights(program.trained(config, processes)[0])
    assert found(on_processes, case).keys() == alone.keys()
    for name, weight in found(on_processes, case).items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_in_bfloat16_they_differ_by_the_roundings_of_the_steps(on_processes: Path, processes: World) -> None:
    alone = program.weights(program.trained(program.CONFIGS["ragged"], processes, recipe=program.COARSE)[0])
    for name, weight in found(on_processes, "ragged, 4, in bfloat16").items():
        assert weight.dtype == torch.float32
        # Each of three steps moves an element by at most 0.02 · 0.2 · √26 · 1.21, of which a bfloat16 has 8 bits.
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=3 * 0.025 * 2**-6)


def test_a_checkpoint_of_four_processes_goes_on_with_one(on_processes: Path, processes: World) -> None:
    model = sharded_model(program.CONFIGS["ragged"], processes, compute_dtype=torch.float32, compile=False, seed=2)
    optimizer, average = build_optimizer(model, program.MUON), WeightAverage(model, program.DECAY)
    load(committed(on_processes)[-1], training_state(model, optimizer) | average.state(), processes)
    _, _, alone = program.trained(program.CONFIGS["ragged"], processes)
    for name, tensor in average.state().items():
        torch.testing.assert_close(tensor, alone.state()[name], rtol=1e-5, atol=1e-5)
    program.step(model, optimizer)
    later = found(on_processes, "ragged, 4, a step later")
    for name, weight in program.weights(model).items():
        torch.testing.assert_close(weight, later[name], rtol=1e-5, atol=1e-5)


def test_what_is_sent_is_what_the_formula_says(on_processes: Path) -> None:
    """2 ⌈K / S⌉ all-to-alls over K matrices, whose elements each cross twice."""
    config = program.CONFIGS["ragged"]
    hidden, inner, queries, keys = config.hidden_size, config.intermediate_size, 18, 6
    elements = config.layers * hidden * (queries + 2 * keys + queries + 3 * inner)
    calls, *sent = found(on_processes, "sent")["in a step"].tolist()
    assert calls == 2 * math.ceil(config.layers * 7 / 4)
    assert sum(sent) == 2 * elements
    assert max(sent) < 0.4 * sum(sent), "the work is dealt out"
