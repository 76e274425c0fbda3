"""What a compiled program holds, reads and sends, from its own text: XLA's optimized HLO.

Bytes are those of a device's main memory: TPUs also have a fast memory of their own (`S(1)` in a type), which
a program fills ahead. What instructions read is an upper bound on what they move: caches may save some of it.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What names, groups or reinterprets values, and runs nothing.
NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "iota",
    "partition-id",
}
SLICES = {"dynamic-slice", "slice", "gather"}


def held_bytes(compiled: "jax.stages.Compiled") -> int:
    """Bytes of a device that a program takes: arguments, temporaries, and results that are not updates."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


@dataclasses.dataclass(frozen=True)
class Array:
    """A type: `bf16[8,128]{1,0:T(8,128)S(1)}` is an array of bfloat16 that lies in a TPU's fast memory."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def is_in_main_memory(self) -> bool:
        return "S(" not in self.layout

    @property
    def nbytes(self) -> int:
        bits = BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: its name.
        results: types of its result, of a tuple all.
        opcode: what it does.
        operands: names of its operands.
        text: the line.
    """

    name: str
    results: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs."""
        return tuple(re.findall(r"(?:calls|to_apply|body|condition|_computation)=%?([\w.\-]+)", self.text))


Computation = Mapping[str, Instruction]
_TYPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_START = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


class Program:
    """A program of one device.

    Args:
        text: from `jax.stages.Compiled.as_text`.
    """

    def __init__(self, text: str):
        self.text = text
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if start := _START.match(line):
                current = self.computations[start[1]] = {}
            elif found := _LINE.match(line):
                name, types, opcode, rest = found.groups()
                results = tuple(
                    Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
                    for dtype, shape, layout in _TYPE.findall(types)
                )
                operands = tuple(re.findall(r"%([\w.\-]+)", _until_closed(rest)))
                current[name] = Instruction(name, results, opcode, operands, line)

    @functools.cached_property
    def loop(self) -> Computation:
        """The body of its largest loop: of a decoder's chunk, one step."""
        bodies = [self.computations[name] for name in re.findall(r"body=%?([\w.\-]+)", self.text)]
        return max(bodies, key=len)

    def within(self, computation: Computation) -> Iterator[Instruction]:
        """Its instructions, and those of all computations that it runs."""
        for instruction in computation.values():
            yield instruction
            for name in instruction.calls:
                yield from self.within(self.computations[name])

    def collectives(self, computation: Computation) -> Counter[str]:
        """How often devices exchange what, by its kind; one that starts and ends apart counts once."""
        kinds = (x.opcode.removesuffix("-start") for x in self.within(computation))
        return Counter(kind for kind in kinds if kind in COLLECTIVES)

    def kernels(self, computation: Computation) -> int:
        """Instructions that something is run for."""
        return sum(x.opcode not in NOTHING and not x.opcode.endswith("-done") for x in computation.values())

    def written(self, computation: Computation, least: int) -> list[Instruction]:
        """Instructions whose result takes `least` bytes or more of main memory, but for updates in place."""

        def is_written(x: Instruction) -> bool:
            result = x.results[-2 if x.opcode == "slice-start" else 0]
            return result.is_in_main_memory and result.nbytes >= least

        kinds = (*NOTHING, "while", "dynamic-update-slice")
        found = [x for x in computation.values() if x.opcode not in kinds and is_written(x)]
        return [x for x in found if not self._updates_in_place(x)]

    def _updates_in_place(self, instruction: Instruction) -> bool:
        if instruction.opcode != "fusion":
            return False
        inner = self.computations[instruction.calls[0]].values()
        return any(x.opcode == "dynamic-update-slice" and x.results == instruction.results for x in inner)

    def bytes_read(self, computation: Computation) -> int:
        """Bytes that its instructions read from main memory."""
        return sum(self._reads(x, computation) for x in computation.values())

    def _reads(self, instruction: Instruction, computation: Computation) -> int:
        if instruction.opcode in NOTHING or instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode == "slice-start":  # A part of its operand, into fast memory.
            return instruction.results[-2].nbytes
        operands = [computation[name] for name in instruction.operands]
        inner = self.computations[instruction.calls[0]] if instruction.opcode == "fusion" else None
        total = 0
        for number, operand in enumerate(operands):
            array = operand.results[0] if len(operand.results) == 1 else None
            if array is not None and array.is_in_main_memory:
                used = array.nbytes if inner is None else _bytes_used(inner, number, array.nbytes)
                total += _of_slices(instruction, number, used) if inner is None else used
        return total


def _bytes_used(fused: Computation, number: int, whole: int) -> int:
    """How much of its parameter a fusion reads: of one that it only slices, or updates in place, a part."""
    (parameter,) = (x for x in fused.values() if x.opcode == "parameter" and f"parameter({number})" in x.text)

    def used(name: str) -> int:
        total = 0
        for x in fused.values():
            if name in x.operands:
                total += (
                    used(x.name) if x.opcode == "bitcast" else _of_slices(x, x.operands.index(name), whole)
                )
        return total

    return min(whole, used(parameter.name))


def _of_slices(instruction: Instruction, number: int, whole: int) -> int:
    """How much an instruction reads of an operand of so many bytes."""
    if number == 0 and instruction.opcode in SLICES:
        return instruction.results[0].nbytes
    if number == 0 and instruction.opcode == "dynamic-update-slice":
        return 0
    return whole


def _until_closed(text: str) -> str:
    """What comes before the parenthesis that closes an instruction's operands."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i]
    return text
