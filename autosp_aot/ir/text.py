"""The canonical text of a program: one printer, one strict parser.

    autosp program 1
    ranks 2
    layout cut65 = 0:33 33:65
    constants $0
    batch %input_ids: i64[2, 65] @ Replicate
    section forward takes ()
      %embed.embedding: f32[2, $0, 64] @ Shard(1, cut65) = aten.embedding.default(%w, %ids)  # model.py:12 embed
      free(%ids)
      %h: f32[2, $0, 64] @ Shard(1, cut65) = aten.add.Tensor(%x, %y, into=%x)
      free(%x, %y)
    gives (loss=%loss)

`tiles` and what a tile gives enclose a body:

      %y: f32[65, 64] @ Shard(0, cut65) = tiles(%x, %w) in 4
        %tile.x: f32[$1, 64] @ Shard(0, cut65') = shard(%x)
      gives (%tile.y)

A layout names the intervals of all ranks, in a body of all ranks' tiles. A constant is a number that differs between
ranks or tiles; its values are not part of the text (they stand in `ranks.json`), so that ranks of one structure share
one text.

Names are those of modules, whatever they are called: what would end a name is written as `\\u0020` is for a space.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.escapes import SPACES, escaped, unescaped
from autosp_aot.ir.placement import PARTIAL, REPLICATE, Bounds, Cut, Placement
from autosp_aot.ir.program import (
    ITEMSIZE,
    Arg,
    Args,
    Body,
    Dtype,
    Input,
    Instr,
    Int,
    PerRank,
    Program,
    Ref,
    Section,
    Value,
    Where,
)
from autosp_aot.ir.structure.table import TILES

HEADER = "autosp program 1"
INPUT_KINDS = ("parameter", "buffer", "batch", "tangent", "seed", "guess")
INTO = "into"  # as a keyword, the operand whose memory the result takes
DEPTH = 300  # of lists in an argument; a score expression has at most 256 parts
NAME = r"[^\s,:;=()\[\]{}@#%$\"]+"


# --- print --------------------------------------------------------------------------------------------------------


def print_program(program: Program) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The text, and the constants by name: the numbers of all ranks."""
    return _Printer(program).text()


class _Printer:
    def __init__(self, program: Program):
        self.program = program
        self.layouts: dict[Bounds, str] = {}
        self.constants: dict[PerRank, str] = {}

    def text(self) -> tuple[str, dict[str, tuple[int, ...]]]:
        lines = [f"{entry.kind} {self.value(entry.value)}" for entry in self.program.inputs]
        for section in self.program.sections:
            lines.append(f"section {section.name} takes ({self.names(section.takes)})")
            for instr in section.instrs:
                lines.extend("  " + line for line in self.lines(instr))
            gives = (f"{escaped(label)}=%{escaped(name)}" for label, name in section.gives)
            lines.append(f"gives ({', '.join(gives)})")
        head = [HEADER, f"ranks {self.program.ranks}"]
        head += [f"layout {name} = {' '.join(f'{a}:{b}' for a, b in bounds)}" for bounds, name in self.layouts.items()]
        if self.constants:
            head.append("constants " + " ".join(self.constants.values()))
        return "\n".join(head + lines) + "\n", {name: n.values for n, name in self.constants.items()}

    def lines(self, instr: Instr) -> list[str]:
        if instr.body is None:
            return [self.instr(instr)]
        inside = ["  " + self.instr(inner) for inner in instr.body.instrs]
        return [self.instr(instr), *inside, f"gives ({self.names(instr.body.gives)})"]

    def names(self, names: tuple[str, ...]) -> str:
        return ", ".join(f"%{escaped(name)}" for name in names)

    def instr(self, instr: Instr) -> str:
        args = [self.arg(a) for a in instr.args] + [f"{k}={self.arg(v)}" for k, v in instr.kwargs]
        args += [] if instr.into is None else [f"{INTO}=%{escaped(instr.refs()[instr.into])}"]
        call = f"{instr.op}({', '.join(args)})" + (f" in {instr.body.tiles}" if instr.body else "")
        outs = "; ".join("_" if out is None else self.value(out) for out in instr.outs)
        note = " ".join(escaped(p, SPACES) for p in (instr.where.source or "-", instr.where.module) if p)
        return (f"{outs} = {call}" if outs else call) + ("" if note == "-" else f"  # {note}")

    def value(self, value: Value) -> str:
        shape = ", ".join(self.number(n) for n in value.shape)
        return f"%{escaped(value.name)}: {value.dtype}[{shape}] @ {self.placement(value.placement)}"

    def number(self, n: Int) -> str:
        if isinstance(n, PerRank):
            return self.constants.setdefault(n, f"${len(self.constants)}")
        return str(n)

    def placement(self, placement: Placement) -> str:
        if placement.cut is None:
            return "Partial" if placement.partial else "Replicate"
        cut = placement.cut
        outer = f", outer={cut.outer}" if cut.outer != 1 else ""
        partial = ", partial" if placement.partial else ""
        return f"Shard({cut.dim}, {self.layout(cut.bounds)}{outer}{partial})"

    def layout(self, bounds: Bounds) -> str:
        if bounds not in self.layouts:
            name, taken = f"cut{max(hi for _, hi in bounds)}", set(self.layouts.values())
            while name in taken:
                name += "'"
            self.layouts[bounds] = name
        return self.layouts[bounds]

    def arg(self, arg: Arg) -> str:
        if isinstance(arg, Ref):
            return "%" + escaped(arg.name)
        if isinstance(arg, Dtype):
            return f"dtype:{arg.name}"
        if isinstance(arg, str):
            return f'"{arg}"'
        if isinstance(arg, tuple):
            return "[" + ", ".join(self.arg(a) for a in arg) + "]"
        if isinstance(arg, PerRank):
            return self.number(arg)
        return repr(arg)


# --- parse --------------------------------------------------------------------------------------------------------

_INPUT = re.compile(rf"({'|'.join(INPUT_KINDS)}) (.+)")
_SECTION = re.compile(r"section (\w+) takes \((.*)\)")
_VALUE = re.compile(rf"%({NAME}): (\w+)\[([^\]]*)\] @ (.+)")
_SHARD = re.compile(rf"Shard\((\d+), ({NAME})(?:, outer=(\d+))?(, partial)?\)")
_CALL = re.compile(r"([a-z_]+(?:\.\w+)*)\((.*)\)(?: in (\d+))?")
_TOKEN = re.compile(
    rf"\s*(?:%(?P<ref>{NAME})|(?P<constant>\$\d+)|dtype:(?P<dtype>\w+)|\"(?P<text>[^\"]*)\""
    r"|(?P<number>-?(?:inf|nan|\d+(?:\.\d+)?(?:e[+-]?\d+)?))(?![\w.])"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<mark>[\[\],=]))"
)
_WORDS = {"True": True, "False": False, "None": None, "inf": float("inf"), "nan": float("nan")}
Token = tuple[str, str]  # its group in _TOKEN, and its text


def parse_program(text: str, constants: Mapping[str, tuple[int, ...] | int]) -> Program:
    """The program of a text, with every constant replaced by its number(s).

    Raises ArtifactError (`program-syntax`) with the line for anything that the printer would not have written.
    """
    return _Parser(text, constants).program()


class _Parser:
    def __init__(self, text: str, constants: Mapping[str, tuple[int, ...] | int]):
        self.lines = text.split("\n")
        self.at = 0
        self.layouts: dict[str, Bounds] = {}
        self.ints: dict[str, Int] = {k: PerRank(v) if isinstance(v, tuple) else v for k, v in constants.items()}
        self.placements: dict[str, Placement] = {"Replicate": REPLICATE, "Partial": PARTIAL}

    def program(self) -> Program:
        try:
            if not self.lines or self.lines[-1] != "":
                raise ValueError("the text does not end with a line end")
            self.lines.pop()
            if self.next() != HEADER:
                raise ValueError(f"expected {HEADER!r}")
            ranks = int(self.expect(r"ranks (\d+)")[1])
            while match := self.take(rf"layout ({NAME}) = (.+)"):
                self.layouts[match[1]] = tuple(_box(box) for box in match[2].split(" "))
                if len(self.layouts[match[1]]) % ranks:
                    raise ValueError("a layout has one interval a rank, or one a tile of every rank")
            if (match := self.take(r"constants (.+)")) and sorted(match[1].split(" ")) != sorted(self.ints):
                raise ValueError("the constants are not those of the ranks table")
            inputs = []
            while match := self.take(_INPUT):
                inputs.append(Input(match[1], self.value(match[2])))
            sections = []
            while self.at < len(self.lines):
                sections.append(self.section())
            return Program(ranks, tuple(inputs), tuple(sections))
        except (ValueError, KeyError, IndexError) as error:
            raise self.problem(str(error)) from error

    def problem(self, why: str) -> ArtifactError:
        line = self.lines[self.at - 1][:200] if 0 < self.at <= len(self.lines) else ""
        return ArtifactError(
            Problem("program-syntax", f"line {self.at} of a program cannot be read: {line!r}", why=why,
                    fix="build the artifact again")
        )  # fmt: skip

    def next(self) -> str:
        self.at += 1
        return self.lines[self.at - 1]

    def take(self, pattern: str | re.Pattern[str]) -> re.Match[str] | None:
        if self.at >= len(self.lines):
            return None
        match = re.fullmatch(pattern, self.lines[self.at])
        if match:
            self.at += 1
        return match

    def expect(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        match = re.fullmatch(pattern, self.next())
        if not match:
            raise ValueError("unexpected line")
        return match

    def section(self) -> Section:
        head = self.expect(_SECTION)
        instrs = []
        while self.at < len(self.lines) and self.lines[self.at].startswith("  "):
            instrs.append(self.instr(self.next()[2:]))
            if instrs[-1].body is not None:
                instrs[-1] = replace(instrs[-1], body=self.body(instrs[-1].body.tiles))
        gives = self.expect(r"gives \((.*)\)")[1]
        pairs = (pair.split("=%") for pair in gives.split(", ")) if gives else ()
        labels = tuple((unescaped(label), unescaped(name)) for label, name in pairs)
        return Section(head[1], self.names(head[2]), tuple(instrs), labels)

    def body(self, tiles: int) -> Body:
        instrs = []
        while self.at < len(self.lines) and self.lines[self.at].startswith("    "):
            instrs.append(self.instr(self.next()[4:]))
            if instrs[-1].body is not None:
                raise ValueError("a body within a body")
        gives = self.expect(r"  gives \((.*)\)")[1]
        return Body(tiles, tuple(instrs), self.names(gives))

    def names(self, text: str) -> tuple[str, ...]:
        return tuple(unescaped(name.removeprefix("%")) for name in text.split(", ")) if text else ()

    def instr(self, line: str) -> Instr:
        code, _, note = line.partition("  # ")
        outs, _, call = code.rpartition(" = ")
        match = _CALL.fullmatch(call)
        if not match:
            raise ValueError("not an instruction")
        args, kwargs = self.args(match[2])
        into = None
        if kwargs and kwargs[-1][0] == INTO:
            _, taken = kwargs.pop()
            if not isinstance(taken, Ref):
                raise ValueError(f"{INTO} is an operand")
            into = Instr((), match[1], args, tuple(kwargs)).refs().index(taken.name)
        source, module = (unescaped(part, SPACES) for part in note.partition(" ")[::2])
        where = Where("" if source == "-" else source, module)
        values = tuple(None if out == "_" else self.value(out) for out in outs.split("; ")) if outs else ()
        body = Body(int(match[3]), (), ()) if match[3] else None
        if (match[1] == TILES) != (body is not None):
            raise ValueError(f"{TILES}, and nothing else, is done in a number of tiles")
        return Instr(values, match[1], args, tuple(kwargs), where, body, into)

    def value(self, text: str) -> Value:
        match = _VALUE.fullmatch(text)
        if not match or match[2] not in ITEMSIZE:
            raise ValueError(f"not a value: {text!r}")
        shape = tuple(self.number(n) for n in match[3].split(", ")) if match[3] else ()
        return Value(unescaped(match[1]), match[2], shape, self.placement(match[4]))

    def number(self, text: str) -> Int:
        return self.ints[text] if text[0] == "$" else int(text)

    def placement(self, text: str) -> Placement:
        if text not in self.placements:
            match = _SHARD.fullmatch(text)
            if not match:
                raise ValueError(f"not a placement: {text!r}")
            cut = Cut(int(match[1]), int(match[3] or 1), self.layouts[match[2]])
            self.placements[text] = Placement(cut, bool(match[4]))
        return self.placements[text]

    def args(self, text: str) -> tuple[Args, list[tuple[str, Arg]]]:
        tokens = list(self.tokens(text))
        args: list[Arg] = []
        kwargs: list[tuple[str, Arg]] = []
        at = 0
        while at < len(tokens):
            kind, token = tokens[at]
            if kind == "word" and tokens[at + 1 : at + 2] == [("mark", "=")]:
                item, at = self.arg(tokens, at + 2)
                kwargs.append((token, item))
            else:
                item, at = self.arg(tokens, at)
                args.append(item)
            at = self.comma(tokens, at, len(tokens))
        return tuple(args), kwargs

    def arg(self, tokens: list[Token], at: int, depth: int = 0) -> tuple[Arg, int]:
        kind, token = tokens[at]
        if kind != "mark":
            return self.leaf(kind, token), at + 1
        if token != "[" or depth > DEPTH:
            raise ValueError(f"unexpected {token!r}")
        items, at = [], at + 1
        while tokens[at] != ("mark", "]"):
            item, at = self.arg(tokens, at, depth + 1)
            items.append(item)
            at = at if tokens[at] == ("mark", "]") else self.comma(tokens, at, -1)
        return tuple(items), at + 1

    def comma(self, tokens: list[Token], at: int, end: int) -> int:
        if at == end:
            return at
        if tokens[at] != ("mark", ","):
            raise ValueError("expected ','")
        return at + 1

    def leaf(self, kind: str, token: str) -> Arg:
        if kind == "ref":
            return Ref(unescaped(token))
        if kind == "constant":
            return self.ints[token]
        if kind == "dtype":
            return Dtype(token)
        if kind == "text":
            return token
        if kind == "word":
            return _WORDS[token]
        return int(token) if re.fullmatch(r"-?\d+", token) else float(token)

    def tokens(self, text: str) -> Iterator[Token]:
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if not match or not match.lastgroup:
                raise ValueError(f"unexpected {text[at:]!r}")
            yield match.lastgroup, match[match.lastgroup]
            at = match.end()


def _box(text: str) -> tuple[int, int]:
    lo, hi = text.split(":")
    return int(lo), int(hi)
