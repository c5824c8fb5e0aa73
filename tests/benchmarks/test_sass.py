"""What is read off a disassembly, and how many blocks of it a multiprocessor holds."""

import pytest

from tilewright.benchmarks.audit.sass import CLASSES, Instruction, class_of, natural_loops, parse


def listing(*lines: str) -> str:
    """The lines as nvdisasm prints them: an instruction behind its offset, a label alone."""
    numbered = (f"        /*{16 * at:04x}*/  {line} ;" for at, line in enumerate(lines))
    printed = (line if not label.endswith(":") else label for line, label in zip(numbered, lines, strict=True))
    return "\t.section\t.text.kernel\n.text.kernel:\n" + "\n".join(printed) + "\n"


# A loop over tiles without a mask; the same with one; a wait for a barrier that stands behind the end of the code, out
# of the second loop's way, and the branch to itself that closes every kernel.
MATMUL = listing(
    "S2R R0, SR_TID.X",
    "@P0 BRA `(.L_x_2)",
    ".L_x_1:",
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24, gsb0",
    "IADD3 R0, R0, 0x1, RZ",
    "@!P1 BRA `(.L_x_1)",
    ".L_x_2:",
    "ISETP.GE.AND P0, PT, R0, R7, PT",
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P0",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR9], R4",
    "@!P6 BRA `(.L_x_4)",
    ".L_x_3:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24, gsb0",
    "BRA.U UP0, `(.L_x_2)",
    "@!P0 STG.E.128 desc[UR4][R2.64], R8",
    "STG.E.U16 desc[UR4][R2.64], R9",
    "EXIT",
    ".L_x_4:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR9], R4",
    "@!P6 BRA `(.L_x_4)",
    "BRA `(.L_x_3)",
    ".L_x_5:",
    "BRA `(.L_x_5)",
    "NOP",
)

# An outer loop over rows that holds a loop which only adds and one which reads; a spill in neither.
NESTED = listing(
    ".L_x_0:",
    "STL [R1], R5",
    ".L_x_1:",
    "FADD R2, R2, R3",
    "FFMA R2, R2, R3, R4",
    "MUFU.EX2 R2, R2",
    "@P0 BRA `(.L_x_1)",
    ".L_x_2:",
    "LDG.E.64 R6, desc[UR4][R2.64]",
    "LDS R7, [R8]",
    "@P1 BRA `(.L_x_2)",
    "LDL.LU R5, [R1]",
    "LDL.64 R6, [R1+0x8]",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
)


def test_the_hottest_loop_is_the_shorter_of_two_with_the_same_matrix_instructions() -> None:
    loop = parse(MATMUL).hottest_loop()
    assert loop.repeats
    assert loop.instructions == 4
    assert loop.mix == {"tensor": 1, "memory": 1, "float": 0, "integer": 1, "control": 1, "other": 0}


def test_a_wait_behind_the_end_of_the_code_belongs_to_the_loop_that_waits() -> None:
    masked_only = MATMUL.replace("@!P1 BRA `(.L_x_1)", "NOP")
    loop = parse(masked_only).hottest_loop()
    assert loop.instructions == 4 + 2 + 3, "the loop, its second half, and the wait with its way back"
    assert loop.mix["control"] == 6


def test_of_nested_loops_the_innermost_that_reads_memory_is_the_hottest() -> None:
    loop = parse(NESTED).hottest_loop()
    assert loop == (3, {**dict.fromkeys(CLASSES, 0), "memory": 2, "control": 1}, True, 8, 0)
    adds_only = parse(NESTED.replace("@P1 BRA `(.L_x_2)", "NOP")).hottest_loop()
    assert adds_only.mix["float"] == 3


def test_code_without_a_loop_is_counted_once_as_a_whole_without_what_is_never_reached() -> None:
    skips = ["LDG.E.128 R0, [R2]", "BRA.U UP0, `(.L_x_0)", "FADD R1, R0, R0", ".L_x_0:", "EXIT"]
    loop = parse(listing(*skips, ".L_x_1:", "BRA `(.L_x_1)", "NOP", "NOP")).hottest_loop()
    assert not loop.repeats
    assert loop.instructions == 4


def test_the_bytes_of_a_loop_are_those_of_its_accesses_at_their_width() -> None:
    turn = ["LDG.E.128 R0, [R2]", "LDG.E.U16 R4, [R2]", "STG.E [R2], R0", "STL.64 [R1], R4", "LDL R6, [R1]"]
    loop = parse(listing(".L_x_0:", *turn, "@P0 BRA `(.L_x_0)", "STL.128 [R1], R4", "EXIT")).hottest_loop()
    assert (loop.global_bytes, loop.spilled_bytes) == (16 + 2 + 4, 8 + 4)


def test_spills_are_local_loads_and_stores_of_any_width() -> None:
    code = parse(NESTED)
    assert (code.count("LDL"), code.count("STL")) == (2, 1)
    assert parse(MATMUL).count("LDL", "STL") == 0


def test_accesses_of_128_bits_are_told_from_narrower_ones() -> None:
    assert parse(MATMUL).global_accesses() == (4, 3)
    assert parse(NESTED).global_accesses() == (1, 0), "shared and local memory are not device memory"
    tiles = parse(listing("UTMALDG.2D [UR8], [UR4]", "LDG.E.ENL2.256 R0, R4, [R8]", "RED.E.ADD [R2], R0", "EXIT"))
    assert tiles.global_accesses() == (3, 2)


def test_matrix_instructions_are_counted_by_kind() -> None:
    assert parse(MATMUL).tensor_cores() == {"HGMMA": 2}
    blackwell = listing("UTCHMMA gdesc[UR6], gdesc[UR10], tmem[UR20]", "HMMA.16816.F32.BF16 R4, R8, R2, R4", "EXIT")
    assert parse(blackwell).tensor_cores() == {"UTCHMMA": 1, "HMMA": 1}


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32", "tensor"),
        ("FFMA", "float"),
        ("FLO.U32", "integer"),
        ("I2FP.F32.S32", "float"),
        ("F2FP.BF16.F32.PACK_AB", "float"),
        ("HFMA2.BF16_V2", "float"),
        ("UIMAD.WIDE", "integer"),
        ("LDS.128", "memory"),
        ("LDSM.16.MT88.4", "memory"),
        ("LDGDEPBAR", "control"),
        ("LDC.64", "other"),
        ("SHFL.BFLY", "other"),
    ],
)
def test_every_instruction_has_a_class(opcode: str, expected: str) -> None:
    assert class_of(Instruction(opcode, "", "")) == expected


def test_an_edge_backward_past_the_header_closes_no_loop() -> None:
    # 0 → 1 → 2 → 3, with 1 → 4 → 2 the long way round, and 3 → 1.
    assert natural_loops([[1], [2, 4], [3], [1, 5], [2], []]) == [{1, 2, 3, 4}]
    assert natural_loops([[1, 2], [2], [1]]) == [], "two ways into the cycle: none is the header"
    assert natural_loops([[0]]) == [{0}]


def test_a_disassembly_without_instructions_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no instruction"):
        parse("// nothing here\n")
