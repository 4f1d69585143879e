"""Instructions that a lane executes where no operand of a division or root is rare, read off machine code.

On NVIDIA a correctly rounded division or root is some ten instructions in line, and beside the kernel a
function for the operands that these are not right for: roots of zero and of numbers below 2^-101, quotients
near the ends of fp32. Its name has "slowpath" in it; it stands in the code once, and each place that may need
it has a block that calls it. If one lane of a warp needs it all of them wait: what is counted here binds a
kernel where that is rare. AMD's compiler has no such functions.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .compiled import Compiled, instructions, tool_output

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^([.$][\w.$]+):")
_LEAVES = re.compile(r"BRA|BRX|JMP|EXIT|RET|BREAK")  # what a block ends with; a call comes back into it
_RARE = "slowpath"


class Block(NamedTuple):
    """Instructions that are executed one after the other, all or none of them.

    Attributes:
        names: of the instructions.
        inside: whether they are of a slow path.
        calls: whether they call one.
    """

    names: list[str]
    inside: bool
    calls: bool = False

    @property
    def rare(self) -> bool:
        """Whether they are executed where a slow path is."""
        return self.inside or self.calls


def executed(built: Compiled) -> list[str]:
    """The instructions of a kernel but for slow paths; of any other branch both sides are counted."""
    if "cubin" not in built.asm:
        return instructions(built)
    return [name for block in listed(built) if not block.rare for name in block.names if name != "NOP"]


def listed(built: Compiled) -> list[Block]:
    """The blocks of NVIDIA's machine code."""
    return blocks(tool_output("nvdisasm", "-c", cubin=built.asm["cubin"]))


def blocks(text: str) -> list[Block]:
    """The blocks of a listing of nvdisasm: they begin at labels and end with what leaves them."""
    found, inside = [Block([], False)], False
    for line in text.splitlines():
        if label := _LABEL.match(line):
            inside = _RARE in label[1] if label[1].startswith("$") else inside
            found.append(Block([], inside))
        elif code := _INSTRUCTION.match(line):
            predicate, name, operands = code.groups()
            found[-1].names.append(name)
            if name.startswith("CALL") and _RARE in operands and not predicate:
                found[-1] = found[-1]._replace(calls=True)
            if _LEAVES.match(name):
                found.append(Block([], inside))
    return found
