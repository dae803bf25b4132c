"""What ptxas made of a kernel: its machine instructions (SASS), and its loops.

`python -m tests.house.sass KERNEL [OBJECT ...]` prints, for the kernels of sm_90a whose names contain KERNEL, how many
instructions of which kind stand in each loop; in the object files given, or else in those of the last build. It needs the
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests.house import kernel_table

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+)?\s*([A-Z]\w*)([\w.]*)\s*(.*?)\s*;")

_SHORTEST = 8  # of a loop that is shown, in instructions


@dataclass(frozen=True)
class Instruction:
    """`@P0 BRA 0x1230`: when, what (the rest of its name apart: of HGMMA.64x64x16.F32, opcode HGMMA), with what."""

    address: int
    predicate: str | None
    opcode: str
    modifiers: str
    operands: str


def disassembler() -> Path | None:
    """cuobjdump of the package nvidia-cuda-cuobjdump, which finds nvdisasm beside it; None where it is not installed."""
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == "cuobjdump"), None)


def disassemble(path: Path) -> dict[str, list[Instruction]]:
    """The kernels of an object file as compiled for sm_90a, by name."""
    command = [str(disassembler()), "-sass", "-arch", "sm_90a", str(path)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> dict[str, list[Instruction]]:
    """What cuobjdump has printed."""
    kernels: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            code = kernels[match[1]] = []
        elif match := _INSTRUCTION.search(line):
            code.append(Instruction(int(match[1], 16), *match.groups()[1:]))
    return dict(zip(kernel_table.demangled(list(kernels)), kernels.values(), strict=True))


def opcodes(code: list[Instruction]) -> Counter[str]:
    return Counter(instruction.opcode for instruction in code)


def _followers(code: list[Instruction]) -> dict[int, list[int]]:
    """Where each instruction may go on. A call comes back. BRA.DIV leaves only with warps that have diverged, for code that does
    the same lane by lane: not followed. BSYNC's meeting point is the instruction behind it."""
    followers = {}
    for here, after in zip(code, [*code[1:], None], strict=True):
        go_on = [] if after is None else [after.address]
        if here.opcode == "BRX":
            raise ValueError(f"0x{here.address:x}: {here.opcode} {here.operands} jumps through a table, which is not followed")
        if here.opcode == "BRA" and here.modifiers != ".DIV":
            condition, _, target = here.operands.rpartition(", ")
            go_on = [int(target, 16)] + (go_on if here.predicate or condition else [])
        elif here.opcode in ("EXIT", "RET") and here.predicate is None:
            go_on = []
        followers[here.address] = go_on
    return followers


def _walk(followers: dict[int, list[int]], entry: int) -> tuple[set[int], list[tuple[int, int]]]:
    """What the entry leads to, depth first, and the (from, to) that go back to where the walk came through: a loop's head."""
    seen, back, on_path, stack = {entry}, [], {entry}, [(entry, iter(followers[entry]))]
    while stack:
        here, rest = stack[-1]
        there = next(rest, None)
        if there is None:
            on_path.discard(here)
            stack.pop()
        elif there in on_path:
            back.append((here, there))
        elif there not in seen:
            seen.add(there)
            on_path.add(there)
            stack.append((there, iter(followers[there])))
    return seen, back


def loops(code: list[Instruction]) -> dict[int, set[int]]:
    """Each loop's addresses, loops inside it included, by the address of its head, in the order of the code."""
    followers = _followers(code)
    reached, back = _walk(followers, code[0].address)
    before: dict[int, list[int]] = {}
    for here in reached:
        for there in followers[here]:
            before.setdefault(there, []).append(here)
    found: dict[int, set[int]] = {}
    for last, head in sorted(back, key=lambda jump: jump[1]):
        body, ahead = found.setdefault(head, {head}), [last]
        while ahead:
            here = ahead.pop()
            if here not in body:
                body.add(here)
                ahead += before[here]
    return found


def describe(code: list[Instruction]) -> str:
    """A line for the kernel and one for each loop, indented by its depth; of a loop, what stands in no loop inside it. Short
    ones, which wait for an mbarrier, are left out."""
    found = loops(code)
    lines = [f"{len(code)} instructions: {_counts(code)}"]
    for head, body in found.items():
        alone = body.difference(*(other for start, other in found.items() if start != head and start in body))
        own = [instruction for instruction in code if instruction.address in alone]
        depth = sum(head in other for other in found.values())
        if len(own) >= _SHORTEST:
            lines.append(f"{'  ' * depth}0x{head:04x}..0x{max(body):04x}, {len(own)} instructions: {_counts(own)}")
    return "\n".join(lines)


def _counts(code: list[Instruction]) -> str:
    return ", ".join(f"{opcode} {count}" for opcode, count in opcodes(code).most_common())


if __name__ == "__main__":
    if len(sys.argv) < 2 or disassembler() is None:
        sys.exit(__doc__)
    for path in [Path(name) for name in sys.argv[2:]] or kernel_table.objects().values():
        for name, code in disassemble(path).items():
            if sys.argv[1] in name:
                print(f"{name}: {describe(code)}\n")
