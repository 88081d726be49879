"""What a compiled program moves, read from its HLO text.

XLA's own cost analysis counts the body of a loop once and a kernel not at all. Here every instruction counts as often
as it runs: loops by the trip count that XLA writes beside them (`known_trip_count`).
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_ALIASES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "iota", "async-start", "async-update",
    "async-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    kind: of `KINDS`. size: bytes of the whole: what a device has after an all-gather or an all-reduce, before a
    reduce-scatter, all-to-all or permute. group: partitions that take part together (one such group of several like
    it). times: how often it runs.
    """

    kind: str
    size: int
    group: tuple[int, ...]
    times: int

    @property
    def received(self) -> float:
        """Bytes that a device receives in all of its runs, by the best known (ring) algorithms, and sends as many.

        g devices: all-gather, reduce-scatter and all-to-all (g - 1) / g of `size`, all-reduce twice that, permute
        `size`.
        """
        g = len(self.group)
        share = {"all-reduce": 2 * (g - 1) / g, "collective-permute": 1.0 if g > 1 else 0.0}.get(self.kind, (g - 1) / g)
        return self.times * self.size * share


@dataclasses.dataclass(frozen=True)
class Traffic:
    """collectives: all of a program. hbm: bytes that its instructions read and write in the device's main memory.
    unknown_loops: loops of unknown trip count, whose bodies are counted once."""

    collectives: list[Collective]
    hbm: float
    unknown_loops: int


def read_traffic(text: str, partitions: int) -> Traffic:
    """What one device moves in a run of the program of `jax.stages.Compiled.as_text()`, compiled for `partitions`."""
    program = _Program(text)
    collectives, hbm, unknown = [], 0.0, 0
    for computation, times, fused in program.runs():
        for op in computation.values():
            kind = op.opcode.removesuffix("-start")
            kind = _ALIASES.get(kind, kind)
            if kind in KINDS:
                collectives.append(Collective(kind, _payload(op, kind, partitions), _group(op, partitions), times))
            unknown += op.opcode == "while" and program.trips(op) is None
            if not fused:
                hbm += times * program.hbm_bytes(op, computation)
    return Traffic([c for c in collectives if len(c.group) > 1], hbm, unknown)


# --- the text ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        current: dict[str, _Instruction] | None = None
        for line in text.splitlines():
            # Kernels bring texts of several lines with them, of other bracketings.
            head = current is None and re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = self.computations.setdefault(head[2], {})
                if head[1]:
                    self.entry = head[2]
            elif re.fullmatch(r"\}(, execution_thread=.*)?", line.rstrip()):
                current = None
            elif current is not None and re.match(r"\s+(ROOT )?%?[\w.\-]+ = [a-z(]", line):
                op = _instruction(line)
                current[op.name] = op

    def runs(self) -> Iterator[tuple[dict[str, _Instruction], int, bool]]:
        """Every computation that runs, how often, and whether it is the inside of a fusion."""
        times: dict[tuple[str, bool], int] = collections.Counter()

        def visit(name: str, count: int, fused: bool):
            times[name, fused] += count
            for op in self.computations[name].values():
                for callee, factor, inside in self.called(op):
                    if callee in self.computations:
                        visit(callee, count * factor, fused or inside)

        visit(self.entry, 1, False)
        for (name, fused), count in times.items():
            yield self.computations[name], count, fused

    def called(self, op: _Instruction) -> Iterator[tuple[str, int, bool]]:
        """Computations that an instruction runs, how often, and whether as the inside of one kernel."""
        if op.opcode == "while":
            yield _named("body", op), self.trips(op) or 1, False
        elif op.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
            pairs = r"(?:true|false)_computation=%?([\w.\-]+)"
            names = branches[1].split(",") if branches else re.findall(pairs, op.attributes)
            for name in names:  # which one runs is not known: all count
                yield name.strip().lstrip("%"), 1, False
        elif op.opcode in ("call", "call-start", "async-start", "fusion"):
            name = _named("calls", op) or _named("to_apply", op) or _named("called_computation", op)
            if name:
                yield name, 1, op.opcode == "fusion"

    def trips(self, op: _Instruction) -> int | None:
        """Of a while loop: as written beside it or, where the compiler (TPU's) does not, the number that its condition
        compares a counter from 0 with, as `jax.lax.scan` makes them. None where it is neither."""
        written = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', op.attributes)
        if written:
            return int(written[1])
        condition = self.computations.get(_named("condition", op) or "", {})
        compare = next((x for x in condition.values() if x.is_root), None)
        if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (condition[name] for name in compare.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant" or not limit.operands[0].isdigit():
            return None
        return int(limit.operands[0])

    def hbm_bytes(self, op: _Instruction, computation: dict[str, _Instruction]) -> float:
        """Operands read and results written, except what slices leave alone and what lies on the chip (TPU's S(1))."""
        if op.opcode in _MOVES_NOTHING or op.opcode.endswith("-done"):
            return 0.0
        operands = [_bytes(computation[name].shape) if name in computation else 0.0 for name in op.operands]
        result = _bytes(op.shape)
        if op.opcode.endswith("-start"):
            result = _bytes(_parts(op.shape)[1]) if len(_parts(op.shape)) > 1 else result
        if op.opcode in ("dynamic-slice", "slice", "gather", "copy-start", "copy"):
            return 2 * result
        if op.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if op.opcode == "fusion":
            reads, result = self.fusion(_named("calls", op))
            operands = [min(a, b) for a, b in zip(operands, reads)]
        return math.fsum(operands) + result

    @functools.cache  # noqa: B019 (the program lives as long as the call that reads it)
    def fusion(self, name: str) -> tuple[list[float], float]:
        """Bytes that a fusion reads of each parameter, and writes."""
        inside = self.computations[name]
        users = collections.defaultdict(list)
        for op in inside.values():
            for place, operand in enumerate(op.operands):
                users[operand].append((op, place))

        def read(op: _Instruction) -> float:
            total = 0.0
            for user, place in users[op.name]:
                if user.opcode == "bitcast":
                    total += read(user)
                elif place == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += _bytes(user.shape)
                elif not (place == 0 and user.opcode == "dynamic-update-slice"):
                    return _bytes(op.shape)
            return total

        def written(op: _Instruction) -> float:
            if op.opcode == "tuple":
                return math.fsum(written(inside[operand]) for operand in op.operands)
            if op.opcode == "bitcast":
                return written(inside[op.operands[0]])
            if op.opcode == "dynamic-update-slice":
                return _bytes(inside[op.operands[1]].shape)
            return _bytes(op.shape)

        parameters = [op for op in inside.values() if op.opcode == "parameter"]
        parameters.sort(key=lambda op: int(op.operands[0]))
        return [read(op) for op in parameters], written(next(op for op in inside.values() if op.is_root))


def _instruction(line: str) -> _Instruction:
    left, _, right = line.strip().partition(" = ")
    if right.startswith("("):
        end = _closing(right) + 1
    else:
        end = right.index(" ")
    shape, call = right[:end], right[end:].lstrip()
    opcode, _, rest = call.partition("(")
    close = _closing("(" + rest)
    operands = tuple(part.split(" ")[-1].lstrip("%") for part in _parts("(" + rest[:close]))
    name = left.removeprefix("ROOT ").lstrip("%")
    return _Instruction(name, shape, opcode, operands, rest[close:], left.startswith("ROOT "))


def _named(attribute: str, op: _Instruction) -> str | None:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", op.attributes)
    return found and found[1]


def _closing(text: str) -> int:
    """Where the bracket that `text` begins with is closed."""
    depth = 0
    for match in re.finditer(r"[(){}\[\]]", text):
        depth += 1 if match[0] in "([{" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced: {text[:80]}")


def _parts(text: str) -> list[str]:
    """The elements of a tuple; a text that is none is the one element."""
    if not text.startswith("("):
        return [text]
    parts, depth, start = [], 0, 1
    for match in re.finditer(r"[(){}\[\],]", text):
        if match[0] == "," and depth == 1:
            parts.append(text[start : match.start()])
            start = match.end()
        elif match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
    parts.append(text[start:-1])
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts if part.strip()]


def _bytes(shape: str) -> float:
    """Of all arrays in a shape's text that lie in main memory."""
    total = 0.0
    for kind, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?", shape):
        if "S(1)" in layout:
            continue
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or [0])[0])
        total += math.prod(int(n.lstrip("<= ")) for n in dims.split(",") if n) * bits / 8
    return total


# --- collectives ---------------------------------------------------------------------------------------------------


def _payload(op: _Instruction, kind: str, partitions: int) -> int:
    parts = _parts(op.shape)
    started = op.opcode.endswith("-start") and kind != "all-reduce" and len(parts) > 1
    result = _bytes_anywhere(parts[1] if started else op.shape)
    return round(result * len(_group(op, partitions)) if kind == "reduce-scatter" else result)


def _bytes_anywhere(shape: str) -> float:
    return _bytes(shape.replace("S(1)", ""))


def _group(op: _Instruction, partitions: int) -> tuple[int, ...]:
    """One of the groups that a collective joins: of the forms {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'a'}."""
    text = op.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        found = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)", pairs[0])]
        return next((pair for pair in found if pair[0] != pair[1]), (0,))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        shape = tuple(map(int, iota[1].split(",")))
        return tuple(_ids(iota[2], math.prod(shape)).reshape(shape)[0].tolist())
    meshed = re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text)
    if meshed:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        ids = _ids(meshed[2], math.prod(axes.values())).reshape(tuple(axes.values()))
        names = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", meshed[3])
        # An axis that takes part in part is split: 'a':(2)4 is the factor 4 inside of 2.
        for name, before, size in names:
            if size:
                place = list(axes).index(name)
                factors = (int(before), int(size), axes[name] // int(before) // int(size))
                ids = ids.reshape(*ids.shape[:place], *factors, *ids.shape[place + 1 :])
                ids = np.moveaxis(ids, (place, place + 2), (-2, -1))
        keep = [list(axes).index(name) for name, _, _ in names]
        ids = np.moveaxis(ids, keep, range(len(keep)))
        count = math.prod(int(size) if size else axes[name] for name, _, size in names)
        return tuple(ids.reshape(count, -1)[:, 0].tolist())
    return tuple(range(partitions))


def _ids(order: str | None, count: int) -> np.ndarray:
    """Partitions 0 .. count - 1 in the order that is written as [25,8]T(1,0), as a list, or not at all."""
    if order is None:
        return np.arange(count)
    iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if iota is None:
        return np.array([int(n) for n in order.split(",")])
    ids = np.arange(count).reshape(tuple(map(int, iota[1].split(","))))
    return (ids.transpose(tuple(map(int, iota[2].split(",")))) if iota[2] else ids).ravel()
