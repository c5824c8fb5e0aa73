"""`tilewright doctor`: what it tells of a machine, and what it advises for machines that lack something."""

import argparse
import json
import re

import pytest
import torch

from tilewright.cli import doctor
from tilewright.kernels import launch, use
from tilewright.kernels.registry import SPECS
from tilewright.trainer.record.environment import Probe, environment

ABSENT = Probe(False, False, "not installed; optional")
GPU = {"name": "NVIDIA A100", "capability": "8.0", "memory_bytes": 85_000_000_000}


@pytest.fixture
def machine(monkeypatch):
    """This machine's facts, to be changed: what the command is then told. The optional packages are absent."""
    facts = environment(torch.device("cpu"))
    facts.update(gpus=[], gpu_driver=None)
    probes = {"apex": ABSENT, "flash_attn": ABSENT}
    monkeypatch.setattr("tilewright.trainer.record.environment.environment", lambda device: facts)
    monkeypatch.setattr("tilewright.trainer.record.environment.probe_apex", lambda: probes["apex"])
    monkeypatch.setattr("tilewright.trainer.record.environment.probe_flash_attn", lambda: probes["flash_attn"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: argparse.Namespace(free=10**12))
    return facts, probes


@pytest.fixture
def peaks(monkeypatch):
    """FLOP/s by dtype that are 'measured'; every measurement is noted."""
    measured = {torch.float32: 0.25e12, torch.bfloat16: 1.0e12, "asked": []}

    def measure(device, dtype):
        measured["asked"].append((device.type, dtype))
        return measured[dtype]

    monkeypatch.setattr("tilewright.trainer.peak.measured_matmul_peak", measure)
    return measured


@pytest.fixture
def tell(capsys, machine, peaks):
    """What the command prints, its runs of spaces as one; it must exit with status 0."""

    def run(*words):
        parser = argparse.ArgumentParser(prog="tilewright")
        doctor.add_parser(parser.add_subparsers())
        arguments = parser.parse_args(["doctor", *words])
        assert arguments.run(arguments) == 0
        return re.sub(" +", " ", capsys.readouterr().out)

    return run


@pytest.fixture
def ship(monkeypatch, tmp_path):
    """Puts a file of measured launch tables for sm_80 where the package looks for it; where none is put, none is."""
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    for spec in SPECS:
        for table in spec.tables.values():
            monkeypatch.setattr(table, "_rows", {})
    return (tmp_path / "sm_80.json").write_text


def advice(text):
    return text[text.index("Advice\n") + len("Advice\n") :].splitlines()


def test_versions_machine_and_optional_packages_are_told(tell, machine):
    machine[0]["versions"].update(torch="2.13.0+cu130", triton=None, cuda="13.0")
    machine[0]["cpu"].update(model="A CPU", cores=8, cores_allowed=2, flags=["avx2", "amx_bf16"])
    machine[0]["memory_bytes"] = 25_300_000_000
    text = tell("--quick")
    for line in (
        "torch 2.13.0+cu130", "triton not installed", "cuda 13.0", "CPU A CPU, 8 cores, 2 of them for this process",
        "CPU instructions avx2, amx_bf16", "memory 25.30 GB", "GPU none", "apex not installed; optional",
        "flash-attn not installed; optional",
    ):  # fmt: skip
        assert f" {line}\n" in text


def test_each_op_has_its_implementation_for_each_dtype_and_the_reason(tell):
    text = tell("--quick")
    for spec in SPECS:
        assert re.search(rf"\W {spec.name} \W reference \W reference \W", text)
    assert "cpu float32, cpu bfloat16: reference: off CUDA, plain PyTorch" in text
    with use("triton"):
        text = tell("--quick")
    for spec in SPECS:
        assert re.search(rf"\W {spec.name} \W triton \W triton \W", text)
    assert "cpu float32, cpu bfloat16: triton: demanded by use() or TILEWRIGHT_KERNELS" in text


def test_an_implementation_that_cannot_run_is_told_not_raised(tell, monkeypatch):
    def refuse(device, dtype):
        if dtype == torch.bfloat16:
            raise ValueError("the Triton kernels are demanded, but triton is not installed")
        return ("reference", "for a test")

    monkeypatch.setattr("tilewright.kernels.choose", refuse)
    text = tell("--quick")
    assert re.search(r"\W rms_norm \W reference \W none \W", text)
    assert "cpu float32: reference: for a test" in text
    assert "cpu bfloat16: none: the Triton kernels are demanded, but triton is not installed" in text


def test_without_a_gpu_the_launch_tables_of_two_generations_are_told_of_in_one_line(tell, ship):
    assert f" launch tables, sm_80 and sm_90: every op: {launch.AUDIT}\n" in tell("--quick")


def test_measured_launch_tables_are_told_from_those_chosen_from_the_audit(tell, ship, machine):
    (table,) = next(spec.tables.values() for spec in SPECS if spec.name == "rotary")
    rows = [
        {"up_to": row.up_to, "num_warps": row.num_warps, "num_stages": row.num_stages, "blocks": row.blocks,
         "measured_at": {"1": 1.0}} for row in table.audited_rows(80)
    ]  # fmt: skip
    rows[-1]["measured_at"] = {}
    tables = {table.name: {"source": "measured on a GPU", "rows": rows}}
    ship(json.dumps({"format": launch.FORMAT, "chip": 80, "tables": tables}))
    text = tell("--quick")
    assert f" | rotary: measured on a GPU; {launch.AUDIT}\n" in text
    assert f" launch tables, sm_90: every op: {launch.AUDIT}\n" in text
    machine[0]["gpus"] = [GPU, GPU]
    text = tell("--quick")
    assert re.findall("launch tables, .*?:", text) == ["launch tables, sm_80:"]


def test_a_damaged_file_of_launch_tables_is_told_not_raised(tell, ship):
    ship("{")
    assert re.search(r" launch tables, sm_80: the launch tables in .*sm_80\.json cannot be used: ", tell("--quick"))


def test_the_matmul_peak_is_measured_for_each_dtype_unless_quick(tell, peaks):
    assert "Matmul peak" not in tell("--quick")
    assert peaks["asked"] == []
    text = tell()
    assert peaks["asked"] == [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    assert "cpu float32 0.250 TFLOP/s" in text
    assert "cpu bfloat16 1.000 TFLOP/s" in text


def test_a_machine_with_all_it_needs_is_left_in_peace(tell, machine):
    machine[0]["gpus"] = [GPU]
    machine[1]["flash_attn"] = Probe(True, True, "flash-attn 2 (2.8.3)")
    text = tell()
    assert "GPU 0 NVIDIA A100, 85.00 GB, compute capability 8.0" in text
    assert "flash-attn usable: flash-attn 2 (2.8.3)" in text
    assert advice(text) == ["- Nothing to mend."]


def test_an_impostor_is_named_among_the_packages_and_in_the_advice(tell, machine):
    detail = "the apex installed here is not NVIDIA's; remove it: pip uninstall apex"
    machine[1]["apex"] = Probe(True, False, detail)
    text = tell("--quick")
    assert f"apex NOT USABLE: {detail}\n" in text
    assert f"- {detail}." in advice(text)


@pytest.mark.parametrize(
    ("facts", "advised"),
    [
        ({"gpus": []}, "There is no GPU, so training runs on the CPU"),
        ({"gpu_driver": "550.54"}, "this torch is a CPU build, so install a CUDA build"),
        ({"gpu_driver": "550.54", "versions": {"cuda": "13.0"}}, "unset CUDA_VISIBLE_DEVICES"),
        ({"gpus": [GPU], "versions": {"triton": None}}, "pip install triton"),
        ({"gpus": [{**GPU, "capability": "7.5"}]}, "train with --compute_dtype float32"),
        ({"gpus": [GPU]}, "flash-attn is not installed; it is optional"),
    ],
)
def test_what_a_machine_lacks_is_advised_once(tell, machine, facts, advised):
    machine[0]["versions"].update({"cuda": None, **facts.pop("versions", {})})
    machine[0].update(facts)
    lines = advice(tell("--quick"))
    assert sum(advised in line for line in lines) == 1


def test_bfloat16_is_advised_against_only_where_it_was_measured_slower(tell, peaks):
    assert not any("slower" in line for line in advice(tell()))
    peaks[torch.bfloat16] = 0.1e12
    assert any("bfloat16 matrix products are slower" in line for line in advice(tell()))
    assert not any("slower" in line for line in advice(tell("--quick")))


def test_a_missing_compiler_and_a_full_disk_are_advised(tell, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: argparse.Namespace(free=1.2e9))
    lines = advice(tell("--quick"))
    assert any("No C++ compiler was found" in line for line in lines)
    assert any("Only 1.2 GB are free" in line for line in lines)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert not any("C++" in line for line in advice(tell("--quick")))


def test_help_says_what_it_does(capsys):
    parser = argparse.ArgumentParser(prog="tilewright")
    doctor.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["doctor", "--help"])
    text = capsys.readouterr().out
    assert "tilewright doctor --quick" in text
    assert "exits with status 0" in text
