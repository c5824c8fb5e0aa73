"""Launch tables as data: measured rows hold on their generation, and nothing is launched that is not tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.kernels import launch
from tilewright.kernels.launch import AUDIT, Configuration, LaunchTable, as_if_on, measured_rows
from tilewright.kernels.registry import SPECS

CPU = torch.device("cpu")
TABLES = {table.name: table for spec in SPECS for table in spec.tables.values()}
SMALL, LARGE, SPARE = (Configuration(up_to, warps, {"BLOCK": 64}) for up_to, warps in ((128, 4), (1024, 8), (512, 2)))


def new_table() -> LaunchTable:
    return LaunchTable("a kernel", {80: (SMALL, LARGE)}, (SPARE,))


def row(up_to: Any, warps: int, measured: bool = True) -> dict[str, Any]:
    at = {"100": 1.5} if measured else {}
    return {"up_to": up_to, "num_warps": warps, "num_stages": 1, "blocks": {"BLOCK": 64}, "measured_at": at}


def document(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    tables = {"a kernel": {"source": "measured on a GPU", "rows": list(rows)}}
    return {"format": 1, "chip": 90, "tables": tables, **changes}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a file of measured rows for sm_90 where the package looks for it."""
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch._read.cache_clear()

    def ship(text: str) -> None:
        (tmp_path / "sm_90.json").write_text(text, encoding="utf-8")

    return ship


def test_without_a_file_the_audits_rows_hold_and_say_so() -> None:
    table = new_table()
    assert [table.pick(size, CPU).num_warps for size in (1, 128, 129, 1024)] == [4, 4, 8, 8]
    assert table.source(90) == AUDIT


def test_a_size_past_the_last_row_is_refused() -> None:
    with pytest.raises(ValueError, match="1025 is past the largest"):
        new_table().pick(1025, CPU)


def test_measured_rows_hold_on_their_generation_alone(shipped: Callable[[str], None]) -> None:
    shipped(json.dumps(document(row(256, 2), row(1024, 8, measured=False))))
    table = new_table()
    with as_if_on(90):
        assert [table.pick(size, CPU).num_warps for size in (1, 128, 129, 256, 257, 1024)] == [2, 2, 2, 2, 8, 8]
    for chip in (80, 100):
        with as_if_on(chip):
            assert [table.pick(size, CPU).num_warps for size in (128, 129)] == [4, 8]
    assert table.source(90) == f"measured on a GPU; {AUDIT}"
    assert table.pick(1, CPU).source == "measured on a GPU"
    assert table.source(80) == AUDIT
    assert table.largest() == 1024


def test_a_table_that_the_file_leaves_out_keeps_the_audits_rows(shipped: Callable[[str], None]) -> None:
    shipped(json.dumps(document(row(1024, 8))))
    other = LaunchTable("another kernel", {80: (SMALL,)})
    assert other.pick(1, CPU) == SMALL
    assert other.source(90) == AUDIT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{half a fi", "Expecting property name"),
        ("[1, 2]", "list indices must be integers"),
        (json.dumps(document(chip=80)), "format 1 for sm_80"),
        (json.dumps(document(format=2)), "format 2 for sm_90"),
        (json.dumps({"format": 1, "chip": 90}), "'tables' is missing"),
        (json.dumps(document(row(1024, 16))), "num_warps 16, num_stages 1 up to 1024 is no configuration"),
        (json.dumps(document(row(1024, 2))), "up to 1024 is no configuration that 'a kernel' offers"),
        (json.dumps(document(row("1024", 8))), "is no configuration"),
        (json.dumps(document(row(1024.0, 8))), "is no configuration"),
        (json.dumps(document(row(512, 2))), r"\[512\] of 'a kernel' do not ascend to the largest"),
        (json.dumps(document(row(512, 2), row(256, 2), row(1024, 8))), "do not ascend"),
        (json.dumps(document()), r"the sizes \[\] of 'a kernel' do not ascend"),
    ],
)
def test_a_damaged_file_is_refused_by_one_sentence(text: str, reason: str, shipped: Callable[[str], None]) -> None:
    shipped(text)
    with pytest.raises(ValueError, match=reason) as refusal:
        new_table().pick(1, CPU)
    assert "benchmark tune`, or delete the file" in str(refusal.value)


def test_choices_are_rows_and_candidates_each_once_for_the_most_sizes() -> None:
    wide = Configuration(4096, 4, {"BLOCK": 64})
    table = LaunchTable("a kernel", {80: (SMALL, LARGE), 90: (SMALL,)}, (SPARE, wide))
    assert table.choices() == [wide, LARGE, SPARE]


def test_a_forced_configuration_serves_the_sizes_that_it_covers() -> None:
    table = new_table()
    with table.force(SPARE):
        assert table.pick(512, CPU) is SPARE
        assert table.pick(513, CPU) is LARGE
    assert table.pick(512, CPU) is LARGE


def test_every_table_has_a_name_of_its_own() -> None:
    tables = {id(table) for spec in SPECS for table in spec.tables.values()}
    assert len(TABLES) == len(tables)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name.replace(" ", "_"))
def test_every_row_is_among_the_choices_and_covers_what_the_older_generation_does(table: LaunchTable) -> None:
    choices = table.choices()
    for rows in table.generations.values():
        bounds = [known.up_to for known in rows]
        assert bounds == sorted(set(bounds))
        assert all(any(c.launches_like(known) and known.up_to <= c.up_to for c in choices) for known in rows)


def test_files_that_ship_are_whole() -> None:
    for path in launch.TABLES.glob("*.json"):
        file = json.loads(path.read_text(encoding="utf-8"))
        assert path.name == f"sm_{file['chip']}.json"
        assert set(file["tables"]) <= set(TABLES)
        assert all(measured_rows(TABLES[name], file["chip"], file) for name in file["tables"])
