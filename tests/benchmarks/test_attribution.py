"""What each kernel buys in a training step: replaced for real, held to the same numbers, measured, and restored."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import tilewright.kernels
from tilewright.benchmarks import attribution
from tilewright.benchmarks.training import replacements as plain
from tilewright.benchmarks.training.replacements import Replacement, kernels_called
from tilewright.benchmarks.training.workload import Workload
from tilewright.cli.main import main
from tilewright.kernels import use
from tilewright.model import from_preset, transformer
from tilewright.model.transformer import Block
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimization.optimizer import set_learning_rate
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.recipe import ActivationCheckpointing, Batch, Data, Optimizer, Parallel, Recipe

CPU = torch.device("cpu")


@pytest.fixture
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def recipe(vocab_size: int = 64, sequence_length: int = 16, sequences: int = 2, micro_batch: int = 1) -> Recipe:
    config = from_preset(
        "llama-10m", vocab_size=vocab_size, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8,
        intermediate_size=24, max_sequence_length=sequence_length, initial_std=0.2,
    )  # fmt: skip
    return Recipe(
        name="tiny", model=config, data=Data(corpus="", sequence_length=sequence_length),
        batch=Batch(sequences, micro_batch), steps=1, optimizer=Optimizer(learning_rate=1e-2),
        compute_dtype="float32", compile=False,
    )  # fmt: skip


def silent(what: str, done: float) -> None:
    assert 0 <= done < 1, what


def test_which_kernels_a_model_calls_and_which_end_in_their_reference_is_found_by_calling_them() -> None:
    llama, gpt2 = recipe().model, from_preset("gpt2")
    plain_path = {"rms_norm": True, "rotary": True, "attention": True, "swiglu": True, "linear_cross_entropy": False}
    assert kernels_called(llama, CPU, torch.float32) == plain_path
    assert kernels_called(gpt2, CPU, torch.bfloat16) == {
        "layer_norm": True, "attention": True, "linear_cross_entropy": False,
    }  # fmt: skip
    with use("triton"):
        assert kernels_called(llama, CPU, torch.float32) == dict.fromkeys(plain_path, False)


@pytest.mark.parametrize("by", [plain.masked_sdpa, plain.textbook_attention])
@pytest.mark.parametrize("packed", [True, False])
def test_plain_attention_is_our_attention_in_values_and_gradients(by: Callable[..., Any], packed: bool) -> None:
    torch.manual_seed(0)
    shapes = [(24, 4, 8), (24, 2, 8), (24, 2, 8)] if packed else [(2, 12, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    documents = torch.tensor([0, 5, 12, 19, 24], dtype=torch.int32)
    options = {"causal": True} | ({"cu_seqlens": documents, "max_seqlen": 12} if packed else {})
    found, right = by(*inputs, **options), tilewright.kernels.attention(*inputs, **options)
    torch.testing.assert_close(found, right)
    upstream = torch.randn_like(right)
    pairs = zip(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(right, inputs, upstream), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_block_takes_the_replacement_and_gives_it_back() -> None:
    norm = transformer.Norm(recipe().model)
    torch.nn.init.ones_(norm.weight)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    x = torch.randn(3, 16)
    before = compiled(x)
    with patch.object(transformer, "rms_norm", lambda *inputs, **options: 3 * tilewright.kernels.rms_norm(*inputs)):
        torch.testing.assert_close(compiled(x), 3 * before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(compiled(x), before)


def test_a_compiled_block_tells_the_two_kinds_of_plain_attention_apart() -> None:
    graphs: list[str] = []

    def noted(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return transformer.attention(q, k, v)

    compiled = torch.compile(block, backend=noted, fullgraph=True)
    for by in (plain.masked_sdpa, plain.textbook_attention, plain.masked_sdpa):
        with patch.object(transformer, "attention", by):
            compiled(*torch.randn(3, 2, 12, 4, 8))
    assert ["scaled_dot_product" in graph for graph in graphs] == [True, False]


def test_the_whole_logits_and_the_matrix_of_scores_are_seen_in_peak_memory(processes: World) -> None:
    workload = Workload.of(recipe(vocab_size=8192, sequence_length=512, sequences=4, micro_batch=4), processes)
    result = attribution.attribute(workload, 6, silent)
    rows = {(row.kernel, row.replaced_by.split(" (")[0]): row for row in result.rows}
    logits = 4 * 512 * 8192 * 4
    head = rows["linear_cross_entropy", "its reference"]
    assert head.peak_memory_bytes is not None
    assert head.peak_memory_bytes > 2 * logits, "plain PyTorch holds the logits and their gradient"
    assert head.peak_memory_bytes == pytest.approx(head.peak_memory_ratio * result.peak_memory_bytes)
    assert head.peak_memory_ratio > 1.3
    scores = rows["attention", "softmax over the matrix of scores"]
    assert scores.peak_memory_ratio >= 1
    for row in (head, scores):
        assert row.interval[0] <= row.time_ratio <= row.interval[1]
    for kernel in ("rms_norm", "rotary", "swiglu"):
        assert rows[kernel, ""].time_ratio is None
        assert rows[kernel, ""].note == "its reference runs on cpu: nothing to buy"
    assert {len(seconds) for seconds in result.rounds.values()} == {6}


def test_every_triton_kernel_of_the_step_is_replaced_in_turn_and_then_all_of_them(processes: World) -> None:
    workload = Workload.of(recipe(), processes)
    launched: list[str] = []
    with use("triton"):
        as_it_is = workload.step()
        found, _ = plain.replacements(workload)
        for replacement in found:
            with replacement.within():
                result = workload.step()
            assert attribution.disagreement(result, as_it_is, "float32") == "", replacement
            launched.append(replacement.kernel)
    once = ["rms_norm", "rotary", "attention", "attention", "swiglu", "linear_cross_entropy", "adamw", "all of these"]
    assert sorted(launched) == sorted(once)


def test_a_replacement_that_computes_something_else_is_not_timed(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        return 1.01 * tilewright.kernels.swiglu(*inputs)

    found = [Replacement("swiglu", "a wrong one", lambda: patch.object(transformer, "swiglu", wrong))]
    monkeypatch.setattr(attribution, "replacements", lambda workload: (found, []))
    (row,) = attribution.attribute(Workload.of(recipe(), processes), 6, silent).rows
    assert row.note.startswith("refused: its ")
    assert (row.time_ratio, row.peak_memory_ratio) == (None, None)


@pytest.mark.parametrize(
    ("state_dtype", "taken", "option", "kept"),
    [
        ("float32", "torch._fused_adamw_", "fused", True),
        ("bfloat16", "tilewright.kernels.adamw_cpu.step", "implementation", "auto"),
    ],
)
def test_adamw_in_a_loop_makes_the_same_step_and_the_fused_one_comes_back(
    processes: World, state_dtype: str, taken: str, option: str, kept: object
) -> None:
    weights = []
    for replaced in (False, True):
        optimizer = dataclasses.replace(recipe().optimizer, state_dtype=state_dtype)
        workload = Workload.of(dataclasses.replace(recipe(), optimizer=optimizer), processes)
        found, _ = plain.replacements(workload)
        (loop,) = [replacement for replacement in found if replacement.kernel == "adamw"]
        set_learning_rate(workload.optimizer, 0.1)
        if replaced:
            with loop.within(), patch(taken, side_effect=AssertionError("taken")):
                workload.step()
        else:
            workload.step()
        assert all(group[option] == kept for group in workload.optimizer.param_groups)
        weights.append([p.full_tensor() for p in workload.model.parameters()])
    torch.testing.assert_close(*weights)


def test_steps_leave_the_weights_alone(processes: World) -> None:
    workload = Workload.of(recipe(), processes)
    before = [p.full_tensor().clone() for p in workload.model.parameters()]
    assert workload.step() == workload.step()
    for parameter, kept in zip(workload.model.parameters(), before, strict=True):
        assert torch.equal(parameter.full_tensor(), kept)


def test_scores_that_would_not_fit_are_not_computed(processes: World, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload.of(recipe(), processes)
    # 1 sequence, 1 layer, 2 heads, 16 × 16 scores, in float32 twice: 4,096 bytes; the half of what is there holds them.
    monkeypatch.setattr(plain, "memory_bytes", lambda device: 2 * 4096 + 2)
    assert "softmax over the matrix of scores" in [r.by for r in plain.replacements(workload)[0]]
    monkeypatch.setattr(plain, "memory_bytes", lambda device: 2 * 4096)
    found, untouched = plain.replacements(workload)
    assert "softmax over the matrix of scores" not in [r.by for r in found]
    assert any("was not run: it keeps" in u.why for u in untouched)


def test_the_command_reports_every_kernel_and_writes_the_record(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "attribution.json"
    recipe_file = tiny_recipe(batch__sequences=2)
    assert main(["benchmark", "attribute", str(recipe_file), "--steps", "6", "--json", str(output)]) == 0
    record = json.loads(output.read_text())
    assert {"kernel", "time_ratio", "interval", "peak_memory_ratio", "note"} <= set(record["rows"][0])
    assert record["environment"]["device"] == "cpu"
    assert record["recipe"]["name"] == "tiny"
    shown = capsys.readouterr().out
    for row in record["rows"]:
        assert row["kernel"][:8] in shown
    assert "first step: the step as it is" in shown


def test_the_command_attributes_a_float16_recipe_that_computes_activations_again(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "attribution.json"
    half = tiny_recipe(batch__sequences=2, compute_dtype="float16", activation_checkpointing__mode="full")
    assert main(["benchmark", "attribute", str(half), "--steps", "6", "--json", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["recipe"]["activation_checkpointing"]["mode"] == "full"
    assert all(len(seconds) == 6 for seconds in written["rounds"].values())


def test_too_few_steps_and_a_missing_folder_are_refused_before_anything_is_measured(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny_recipe())
    assert main(["benchmark", "attribute", path, "--steps", "5"]) == 2
    assert "--steps is 5; a 95% interval of a median needs 6 or more" in capsys.readouterr().err
    assert main(["benchmark", "attribute", path, "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "whose folder does not exist" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_one_sentence(processes: World) -> None:
    with pytest.raises(TrainingError, match=r"set batch\.micro_batch to"):
        Workload.of(recipe(sequences=4, micro_batch=3), processes)


def test_a_recipe_that_computes_activations_again_is_attributed_as_such(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    once = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *inputs: calls.append(1) or once(*inputs))
    full = dataclasses.replace(recipe(), activation_checkpointing=ActivationCheckpointing("full"))
    counts = []
    for taken in (recipe(), full):
        calls.clear()
        attribution.attribute(Workload.of(taken, processes), 6, silent)
        counts.append(len(calls) - 1)  # one call is that which finds the model's kernels
    assert counts[1] == 2 * counts[0] > 0, "each block runs again in the backward pass"


def test_float16_is_taken_with_its_loss_scale_until_no_gradient_overflows(processes: World) -> None:
    workload = Workload.of(dataclasses.replace(recipe(), compute_dtype="float16"), processes)
    assert workload.loss_scale is not None
    workload.loss_scale.scale.fill_(2.0**24)  # overflows, so that the first step is taken again
    result = attribution.attribute(workload, 6, silent)
    assert workload.loss_scale.scale < 2.0**24
    assert workload.loss_scale.good_steps == 0, "it never grows again"
    timed = {row.kernel: row.note for row in result.rows if row.time_ratio is not None}
    assert timed == {"attention": "", "linear_cross_entropy": "", "adamw": "", "all of these": ""}
    assert workload.step().stepped


def test_float16_and_float32_are_the_same_step(processes: World) -> None:
    half, single = (
        Workload.of(dataclasses.replace(recipe(), compute_dtype=dtype), processes).step()
        for dtype in ("float16", "float32")
    )
    assert half.grad_norm == pytest.approx(single.grad_norm, rel=1e-2)
    assert half.loss == pytest.approx(single.loss, rel=1e-3)


def test_a_recipe_that_the_trainer_refuses_is_refused(processes: World) -> None:
    with pytest.raises(TrainingError, match="float8 is 'tensorwise'"):
        Workload.of(dataclasses.replace(recipe(), float8="tensorwise"), processes)
    halves = dataclasses.replace(recipe(), parallel=Parallel(replicas=2))
    with pytest.raises(TrainingError, match=r"parallel\.replicas is 2"):
        Workload.of(halves, processes)


def test_a_step_that_is_not_finite_is_one_sentence(processes: World) -> None:
    workload = Workload.of(recipe(), processes)
    next(iter(workload.model.parameters())).data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="the step as it is has loss nan"):
        attribution.attribute(workload, 6, silent)
