"""What NVIDIA's disassembler says of compiled code: spills, width of accesses, tensor cores, the hottest loop.

`nvdisasm` and `cuobjdump` come with triton's wheel and need no driver. A cubin is the compiled code of one kernel; SASS
is the GPU's own assembly, one instruction a line.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: its opcode with all suffixes (``LDG.E.128``), its operands, and its predicate or ``""``."""

    opcode: str
    operands: str
    predicate: str

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".", 1)[0]


class Resources(NamedTuple):
    """Registers of a thread, and bytes of its stack (local memory included)."""

    registers: int
    stack_bytes: int


class Loop(NamedTuple):
    """Instructions of a loop, by class; of all the code, once, where `repeats` is False since there is no loop.

    `global_bytes` and `spilled_bytes` are what a thread moves in one turn, to and from device memory and of registers
    that are spilled; the memory accelerator's instructions do not say how much they move and count for none.
    """

    instructions: int
    mix: dict[str, int]
    repeats: bool
    global_bytes: int
    spilled_bytes: int


def resources(cubin: bytes) -> Resources:
    """What one thread of the kernel in `cubin` takes.

    Raises:
        RuntimeError: the tool cannot read the cubin.
    """
    said = _run("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {said.strip()[-200:]}")
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local)


def disassemble(cubin: bytes) -> Code:
    """The instructions of the kernel in `cubin`.

    Raises:
        RuntimeError: the tool cannot read the cubin.
    """
    return parse(_run("nvdisasm", "--print-code", "--no-dataflow", cubin=cubin))


def _run(tool: str, *options: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path: str = getattr(knobs.nvidia, tool).path
        done = subprocess.run([path, *options, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(path).name} cannot read the compiled code: {done.stderr.strip()[-300:]}")
    return done.stdout


_LABEL = re.compile(r"^(\S+):\s*$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def parse(text: str) -> Code:
    """The instructions and labels in what `nvdisasm` prints.

    Raises:
        RuntimeError: there is no instruction in it.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[2], found[3], found[1] or ""))
    if not instructions:
        raise RuntimeError("nvdisasm printed no instruction")
    return Code(tuple(instructions), labels)


# Accesses to device memory. UTMA and UBLKCP are the tensor memory accelerator's, which moves whole tiles.
_GLOBAL = {"LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG"}
_ACCELERATOR = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")
_ON_CHIP = {"LDS", "STS", "STAS", "LDSM", "STSM", "LDL", "STL", "ATOMS", "LDTM", "STTM", "UTCCP"}
_CONTROL = re.compile(
    "ACQBULK|ARRIVES|BAR|BPT|BRA|BREAK|BRX|BSSY|BSYNC|CALL|CCTL|DEPBAR|ELECT|ERRBAR|EXIT|FENCE|JMP|KILL|LDGDEPBAR|"
    "MEMBAR|NANOSLEEP|NOP|RET|SYNCS|UCGABAR|UTCBAR|WARPGROUP|WARPSYNC|YIELD"
)
_FLOAT = re.compile(r"^(F(?!LO)|MUFU|HADD|HMUL|HFMA|HSET|HMNMX|DADD|DMUL|DFMA|DSET|DMNMX|I2F|UF(?!LO))")
_INTEGER = re.compile(
    r"^U?(I(?!2F)|LOP|LEA|SHF(?!L)|SHL|SHR|PRMT|SEL|SGXT|BMSK|POPC|FLO|BREV|PLOP|P2R|R2P|VIADD|VIMNMX|VABSDIFF|VHMNMX)"
)
CLASSES = ("tensor", "memory", "float", "integer", "control", "other")


def class_of(instruction: Instruction) -> str:
    """The instruction's class, one of `CLASSES`. Moves, shuffles and reads of constants are ``"other"``."""
    name = instruction.name
    if name.endswith("MMA"):
        return "tensor"
    if name in _GLOBAL or name in _ON_CHIP or name.startswith(_ACCELERATOR):
        return "memory"
    if _CONTROL.fullmatch(name):
        return "control"
    if _FLOAT.match(name):
        return "float"
    return "integer" if _INTEGER.match(name) else "other"


def bytes_of(instruction: Instruction) -> int:
    """What a thread moves with one access to memory: 4 bytes where no suffix says otherwise."""
    widths = {"8": 1, "16": 2, "64": 8, "128": 16, "256": 32}
    suffixes = (suffix.lstrip("US") for suffix in instruction.opcode.split(".")[1:])
    return next((widths[suffix] for suffix in suffixes if suffix in widths), 4)


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel in order, and the place that each label stands for."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def count(self, *names: str) -> int:
        """How many instructions have one of the names, whatever their suffixes."""
        return sum(instruction.name in names for instruction in self.instructions)

    def global_accesses(self) -> tuple[int, int]:
        """Instructions that access device memory, and those of them that move 128 bits a thread or more."""
        accesses = [i for i in self.instructions if i.name in _GLOBAL or i.name.startswith(_ACCELERATOR)]
        wide = [i for i in accesses if i.name.startswith(_ACCELERATOR) or {"128", "256"} & set(i.opcode.split(".")[1:])]
        return len(accesses), len(wide)

    def tensor_cores(self) -> dict[str, int]:
        """Matrix instructions by kind: HMMA (Ampere), HGMMA (Hopper), UTCHMMA (Blackwell) and their relatives."""
        return dict(Counter(i.name for i in self.instructions if class_of(i) == "tensor"))

    def hottest_loop(self) -> Loop:
        """The innermost loop that most probably takes the time.

        With several, that of the most matrix instructions, and of those the shortest, since the longer ones mask what
        few blocks need; else that of the most memory instructions, else the longest. A loop that only waits is none.
        """
        loops = [self._loop(loop, repeats=True) for loop in self._innermost_loops()]
        if not loops:
            return self._loop((at for block in self._flow() for at in block), repeats=False)
        if any(loop.mix["tensor"] for loop in loops):
            return max(loops, key=lambda loop: (loop.mix["tensor"], -loop.instructions))
        return max(loops, key=lambda loop: (loop.mix["memory"], loop.instructions))

    def _loop(self, places: Iterable[int], repeats: bool) -> Loop:
        inside = [self.instructions[at] for at in places]
        classes = Counter(map(class_of, inside))
        return Loop(
            len(inside),
            {name: classes[name] for name in CLASSES},
            repeats,
            global_bytes=sum(bytes_of(i) for i in inside if i.name in _GLOBAL),
            spilled_bytes=sum(bytes_of(i) for i in inside if i.name in ("LDL", "STL")),
        )

    def _innermost_loops(self) -> list[set[int]]:
        flow = self._flow()
        blocks = list(flow)
        bodies = natural_loops([[blocks.index(after) for after in flow[block]] for block in blocks])
        loops = [{at for block in body for at in blocks[block]} for body in bodies]
        working = [loop for loop in loops if any(self._works(at) for at in loop)]
        return [loop for loop in working if not any(inner < loop for inner in working)]

    def _works(self, at: int) -> bool:
        return class_of(self.instructions[at]) in ("tensor", "memory", "float")

    def _flow(self) -> dict[range, list[range]]:
        """The basic blocks that can be reached, the entry first, each with those that may run next."""
        ends = (at + 1 for at, instruction in enumerate(self.instructions) if instruction.name in _LEAVING)
        starts = sorted({0, *self.labels.values(), *ends} - {len(self.instructions)})
        block_at = {
            start: range(start, end) for start, end in zip(starts, [*starts[1:], len(self.instructions)], strict=True)
        }
        flow: dict[range, list[range]] = {}
        waiting = [block_at[0]]
        while waiting:
            block = waiting.pop()
            if block not in flow:
                flow[block] = [block_at[start] for start in self._next(block) if start in block_at]
                waiting.extend(flow[block])
        return flow

    def _next(self, block: range) -> list[int]:
        """Where control may go from the end of a basic block."""
        last = self.instructions[block[-1]]
        if last.name not in _LEAVING:
            return [block.stop]
        label = re.search(r"`\((\S+?)\)", last.operands)
        targets = [self.labels[label[1]]] if label and label[1] in self.labels else []
        # A branch on a uniform predicate has it among the operands. A call comes back.
        conditional = last.predicate or last.name == "CALL" or (last.name == "BRA" and "," in last.operands)
        return [*targets, block.stop] if conditional else targets


_LEAVING = {"BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "KILL"}


def natural_loops(successors: Sequence[Iterable[int]]) -> list[set[int]]:
    """The bodies of the loops of a flow graph in which all nodes are reached from node 0; one for each header.

    An edge to a node through which every path to its own start leads closes a loop. An edge backward in memory alone
    does not: waits for a barrier stand behind the end of the code and jump back into it.
    """
    nodes = range(len(successors))
    before: list[list[int]] = [[] for _ in nodes]
    for node in nodes:
        for after in successors[node]:
            before[after].append(node)
    # Of each node, those that every path to it leads through.
    through = [{0}, *(set(nodes) for _ in nodes[1:])]
    settled = False
    while not settled:
        settled = True
        for node in nodes[1:]:
            new = {node} | set.intersection(*(through[previous] for previous in before[node]))
            settled = settled and new == through[node]
            through[node] = new
    bodies: dict[int, set[int]] = {}
    for node in nodes:
        for header in successors[node]:
            if header in through[node]:
                bodies[header] = bodies.get(header, {header}) | _body(node, header, before)
    return list(bodies.values())


def _body(last: int, header: int, before: list[list[int]]) -> set[int]:
    body = {header, last}
    waiting = [last] if last != header else []
    while waiting:
        fresh = set(before[waiting.pop()]) - body
        body |= fresh
        waiting.extend(fresh)
    return body
