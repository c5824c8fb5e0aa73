"""The page of an audit: the worst figures in front, every prediction marked, and nothing asked of anybody."""

import pytest

from tilewright.benchmarks.report import audit_page
from tilewright.benchmarks.report.audit_page import _worst, shape_of
from tilewright.trainer.errors import TrainingError

NASTY = """<script>alert("1")</script> & 'x'"""


def kernel(name, chip, **changes):
    return {
        "kernel": name, "chip": chip, "num_warps": 8, "num_stages": 3, "constants": {"BLOCK_SIZE": 4096, "EPS": None},
        "registers": 40, "stack_bytes": 0, "spill_loads": 0, "spill_stores": 0, "shared_bytes": 32768,
        "blocks_per_processor": 4, "occupancy": 0.5, "limited_by": "registers", "global_accesses": 8,
        "wide_accesses": 6, "tensor_cores": {}, "compile_seconds": 1.5,
        "hottest_loop": {"instructions": 100, "mix": {"memory": 20, "float": 80, "tensor": 0}}, **changes,
    }  # fmt: skip


def launch(op, sample, chip, name, direction="forward"):
    return {"op": op, "sample": sample, "chip": chip, "pass": direction, "kernel": name, "grid": [128, 1, 1]}


def traffic(op, sample, chip, direction, byte_ratio, flop_ratio=1.0, **changes):
    return {
        "op": op, "sample": sample, "chip": chip, "pass": direction, "bytes_issued": 1000, "bytes_compulsory": 1000,
        "byte_ratio": byte_ratio, "flops_issued": 10, "flops_required": 10, "flop_ratio": flop_ratio, "note": None,
        **changes,
    }  # fmt: skip


def floor(op, sample, chip, direction, microseconds):
    return {
        "op": op, "sample": sample, "chip": chip, "pass": direction,
        "predicted_microseconds": microseconds, "bound": "memory",
    }  # fmt: skip


@pytest.fixture
def audit():
    """Of a norm and of attention."""
    return {
        "format": 1,
        "ops": {"rms_norm": {"matmuls": {}}, "attention": {"matmuls": {"_forward": 2}}},
        "environment": {"torch": "2.13.0", "triton": "3.7.1", "dirty": False},
        "kernels": {
            "norm": kernel("rms_norm._forward", 90),
            "wide norm": kernel("rms_norm._forward", 90, registers=168, occupancy=0.25, spill_loads=3, spill_stores=2),
            "old norm": kernel("rms_norm._forward", 80),
            "attention": kernel("attention._forward", 90, tensor_cores={"HGMMA": 24}, global_accesses=0),
        },
        "launches": [
            launch("rms_norm", "8B 2k", 90, "norm"),
            launch("rms_norm", "16,384 wide 2k", 90, "wide norm"),
            launch("rms_norm", "8B 2k", 80, "old norm"),
            launch("attention", "8B 2k", 90, "attention"),
        ],
        "traffic": [
            traffic("rms_norm", "16,384 wide 2k", 90, "forward", 1.4375, width=16384),
            traffic("rms_norm", "8B 2k", 90, "forward", 1.0, width=4096),
            traffic("rms_norm", "8B 2k, residual", 90, "forward", 1.0313, width=4096),
            traffic("rms_norm", "8B 2k", 90, "backward", None, width=4096, note="one read serves both"),
            traffic("rms_norm", "8B 2k, residual", 90, "backward", 1.0, width=4096),
            traffic("attention", "8B 2k", 90, "forward", 7.0, 1.0625, width=128),
        ],
        "floors": [
            floor("rms_norm", "8B 2k", 90, "forward", 200.5),
            floor("rms_norm", "8B 2k", 80, "forward", 329.0),
            floor("attention", "8B 2k", 90, "forward", None),
        ],
    }


@pytest.fixture
def write(tmp_path, read_page):
    """Write the page of an audit; returns it."""

    def run(audit):
        audit_page.write(audit, tmp_path / "audit.html")
        page = read_page(tmp_path / "audit.html")
        page.check()
        return page

    return run


def test_headlines_name_what_is_worst(write, audit):
    text = write(audit).text
    assert "launches 4 of 2 ops" in text
    assert "kernels compiled 4 each distinct one once" in text
    assert "with spills or stack 1 rms_norm._forward" in text
    assert "most bytes issued 1.44 times what is needed: rms_norm forward, 16,384 wide 2k" in text
    assert "most FLOPs issued 1.06 times what is needed: attention forward, 8B 2k" in text


def test_plots_show_bytes_of_the_norm_operations_of_attention_and_the_floor_as_predicted(write, audit):
    page = write(audit)
    assert page.plots == [
        "rms_norm: Bytes issued", "attention: FLOPs issued", "Registers", "Occupancy", "rms_norm: floor, predicted",
    ]  # fmt: skip
    # Over row width, in order, whatever the order of the samples.
    ticks = [tick for tick in (">4,096<", ">16,384<") if tick in page.drawings()[0]]
    assert page.drawings()[0].index(ticks[0]) < page.drawings()[0].index(ticks[1])
    assert "µs, predicted" in page.drawings()[4]


def test_every_floor_is_called_predicted_and_nothing_measured(write, audit):
    text = write(audit).text
    assert "Nothing on this page was timed: every time is predicted." in text
    assert "floor, predicted bound by rms_norm 8B 2k sm_90 forward 200 µs memory" in text
    assert "All 2 floors, predicted" in text


def test_what_a_kernel_is_compiled_for_is_one_line_with_its_range(write, audit):
    text = write(audit).text
    assert (
        "rms_norm._forward sm_90 2 2 40 to 168 5 0 B 32 KiB 4 25 to 50% registers 75% 100: 80 float, 20 memory 3 s"
        in text
    )
    assert "attention._forward sm_90 1 1 40 0 0 B 32 KiB 4 50% registers n/a % HGMMA" in text


def test_every_launch_is_listed(write, audit):
    expected = "rms_norm 16,384 wide 2k sm_90 forward rms_norm._forward 128 × 1 × 1 8 3 BLOCK_SIZE 4096 168 5 0 B"  # noqa: RUF001
    assert expected in write(audit).text


def test_a_figure_that_is_not_there_is_not_shown_as_zero(write, audit):
    assert "rms_norm 8B 2k sm_90 backward 1 kB n/a 10 1.000 one read serves both" in write(audit).text


def test_peers_are_shown_where_ours_is_worse_first(write, audit):
    row = {"op": "rms_norm", "sample": "8B 2k", "chip": 90, "pass": "forward", "peer": "liger-kernel"}
    audit["comparison"] = [
        {**row, "figure": "byte ratio", "ours": 1.0, "theirs": 1.5, "verdict": "better"},
        {**row, "figure": "byte ratio", "ours": 1.5, "theirs": 1.25, "verdict": "worse", "sample": "70B 2k"},
        {**row, "figure": "spills", "ours": 0, "theirs": 0, "verdict": "equal"},
    ]
    page = write(audit)
    assert page.plots[0] == "byte ratio, ours ÷ theirs"
    assert "liger-kernel byte ratio 1 0 1 liger-kernel spills 0 1 0" in page.text
    assert page.text.index("Where ours is worse:") < page.text.index(
        "70B 2k sm_90 forward liger-kernel byte ratio 1.5 1.25"
    )


def test_bars_stand_in_a_table_with_the_worst_row_and_in_the_plots(write, audit):
    page = write(audit)
    assert "bytes issued ÷ compulsory, rms_norm, rows to 8,192 1.05 1.031 met 3 rms_norm 8B 2k, residual" in page.text
    assert "spills and stack, memory-bound ops 0 5 missed 3 rms_norm._forward 16,384 wide 2k sm_90" in page.text
    assert ">bar<" in page.drawings()[0]
    audit["traffic"] = [row for row in audit["traffic"] if row["op"] == "attention"]
    audit["traffic"][0]["sample"] = "8B 32k"
    assert ">bar<" not in write(audit).drawings()[0]


def test_what_could_not_be_examined_stands_on_the_page(write, audit):
    where = {"op": "swiglu", "sample": "8B 2k", "chip": 80}
    audit["errors"] = [{**where, "pass": "forward", "message": "too much shared"}, {**where, "message": "no grid"}]
    text = write(audit).text
    assert "Some launches could not be examined." in text
    assert "swiglu 8B 2k sm_80 forward too much shared" in text
    assert "swiglu 8B 2k sm_80 no grid" in text


def test_names_are_text_and_nothing_else(write, audit):
    audit["ops"][NASTY] = {"matmuls": {}}
    audit["launches"].append(launch(NASTY, NASTY, 90, "norm"))
    audit["traffic"].append(traffic(NASTY, NASTY, 90, "forward", 1.0, width=8))
    audit["floors"].append(floor(NASTY, NASTY, 90, "forward", 1.0))
    audit["kernels"]["norm"]["kernel"] = NASTY
    page = write(audit)
    assert "<script" not in page.source
    assert page.text.count(NASTY) > 5


@pytest.mark.parametrize(
    ("label", "shape"),
    [
        ("8B 2k", "8B 2k"),
        ("8B 2k, fused, tanh", "8B 2k"),
        ("Qwen3 8B, positions 32k", "Qwen3 8B 32k"),
        ("32,000 classes 2k, all options", "32,000 classes 2k"),
        ("bfloat16, low bits", "bfloat16"),
    ],
)
def test_the_shape_of_a_sample_leaves_out_its_options(label, shape):
    assert shape_of({"sample": label}) == shape


def test_a_page_that_cannot_be_written_is_named(audit, tmp_path):
    with pytest.raises(TrainingError, match=r"could not write .*nowhere/audit\.html"):
        audit_page.write(audit, tmp_path / "nowhere" / "audit.html")


def test_a_plot_shows_the_worst_of_what_has_one_shape():
    assert _worst([("a", 1.0), ("a", 3.0), ("b", 0.5), ("a", 2.0)]) == {"a": (3.0, 3.0, 3.0), "b": (0.5, 0.5, 0.5)}
