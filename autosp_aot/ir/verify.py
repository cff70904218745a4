"""What is legal in any program: names, lifetimes, operators, boxes that fit their placements, copies to host memory."""

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.aliasing import Aliases
from autosp_aot.ir.operators import writer
from autosp_aot.ir.placement import covers
from autosp_aot.ir.program import ITEMSIZE, Body, Instr, Program, Section, Value, followed
from autosp_aot.ir.structure.record import Structural
from autosp_aot.ir.structure.table import FREE, STRUCTURE

SECTION_NAMES = (("step",), ("forward", "backward", "sum_gradients"), ("evaluate",))


def verify(program: Program) -> None:
    """Raise ArtifactError (`program-illegal`) naming the first line that is not legal."""
    _Verifier(program, program.ranks).run()


def illegal(what: str, instr: Instr | None = None, why: str = "") -> ArtifactError:
    """The error for a line that is not legal."""
    line = ""
    if instr is not None:
        outs = ", ".join(out.name for out in instr.values())
        line = f"{outs or instr.op} = {instr.op}(...)" + (f" ({instr.where.source})" if instr.where.source else "")
    return ArtifactError(Problem("program-illegal", what, line, why, "build the artifact again"))


class _Verifier:
    def __init__(self, program: Program, boxes: int):
        self.program, self.boxes = program, boxes
        self.alive: dict[str, Value] = {}
        self.made: set[str] = set()
        self.host = _Host(program.ranks)
        self.aliases = Aliases(entry.value.name for entry in program.inputs)

    def run(self) -> None:
        names = tuple(section.name for section in self.program.sections)
        if names not in SECTION_NAMES:
            raise illegal(f"sections {', '.join(names)}", why=f"a program has {' or '.join(map(str, SECTION_NAMES))}")
        for entry in self.program.inputs:
            if entry.kind == "seed" and (entry.value.dtype, entry.value.shape) != ("i64", ()):
                raise illegal(f"the seed {entry.value.name} is not one i64 number")
            self.define(entry.value, None)
        for section in self.program.sections:
            self.section(section)

    def section(self, section: Section) -> None:
        inputs = {entry.value.name for entry in self.program.inputs}
        for name in section.takes:
            if name not in self.alive:
                raise illegal(f"section {section.name} takes {name}, which no earlier section made or kept")
        visible = inputs | set(section.takes)
        for instr, after in followed(section.instrs):
            self.instr(instr, after, visible)
        for label, name in section.gives:
            if name not in self.alive or name not in visible:
                raise illegal(f"section {section.name} gives {label}, but {name} is not alive at its end")
            if name in self.host.moving or name in self.host.pool:
                raise illegal(f"section {section.name} gives {label}, but {name} is not on the device")
        for name in self.host.started:
            raise illegal(f"section {section.name} ends before the copy {name} is waited for")

    def instr(self, instr: Instr, after: Instr | None, visible: set[str]) -> None:
        refs = instr.refs()
        for name in refs:
            if name not in self.alive or name not in visible:
                why = "it was released before" if name in self.made else "nothing made it"
                raise illegal(f"{name} is used but not alive", instr, why)
        if instr.op == FREE:
            if len(set(refs)) != len(refs):
                raise illegal("a value is released twice", instr)
            for name in refs:
                del self.alive[name]
            self.host.released(instr)
            self.aliases.release(refs)
            return
        self.host.read(instr)
        if instr.body is not None:
            self.tiles(instr, instr.body)
        elif (record := STRUCTURE.get(instr.op)) is not None:
            _check_count(record, instr)
            if record.copies:
                self.host.copied(record, instr, [self.alive[name] for name in refs])
        else:
            _check_call(instr)
        if instr.into is not None:
            self.reuse(instr, instr.into, after)
        self.aliases.make(instr)
        for out in instr.values():
            self.define(out, instr)
            visible.add(out.name)

    def reuse(self, instr: Instr, into: int, after: Instr | None) -> None:
        """An elementwise result is written into an operand of its shape that nobody reads again, by any name."""
        name, made = instr.refs()[into], instr.values()
        if writer(instr.op) is None or len(made) != 1:
            raise illegal(f"{instr.op} cannot write into {name}", instr)
        operand, out = self.alive[name], made[0]
        if (operand.dtype, operand.shape) != (out.dtype, out.shape):
            raise illegal(f"{out.name} is of another type than {name}, into which it is written", instr)
        released = after.refs() if after is not None and after.op == FREE else []
        if name not in released or not self.aliases.ends(instr, name, released):
            why = "it, or what may lie in its memory, is not released right after"
            raise illegal(f"{name} is written into", instr, why)

    def tiles(self, instr: Instr, body: Body) -> None:
        """A body reads what the instruction lists and what it makes itself, meets no rank and gives what it made."""
        if body.tiles < 2 or len(body.gives) != len(instr.outs) or None in instr.outs:
            raise illegal("a body has two tiles or more, and gives something for each result", instr)
        inside = _Verifier(self.program, self.boxes * body.tiles)
        read = {name: self.alive[name] for name in instr.refs()}
        inside.alive = dict(read)
        inside.made, inside.aliases = set(self.made), self.aliases.copy()
        visible = set(read)
        for inner, after in followed(body.instrs):
            if inner.op in STRUCTURE and not STRUCTURE[inner.op].in_tiles:
                why = "ranks meet and copies go to the host outside, and tiles have no tiles"
                raise illegal(f"{inner.op} in a body", inner, why)
            if inner.op == FREE and read.keys() & set(inner.refs()):
                raise illegal("a body releases a value that is not its own", inner)
            inside.instr(inner, after, visible)
        for name in body.gives:
            if name not in inside.alive or name in read:
                raise illegal(f"a body gives {name}, which it did not make or has released", instr)

    def define(self, value: Value, instr: Instr | None) -> None:
        if value.name in self.made:
            raise illegal(f"{value.name} is made twice", instr)
        self.made.add(value.name)
        self.alive[value.name] = value
        cut = value.placement.cut
        if cut is None:
            return
        if cut.dim >= len(value.shape) or len(cut.bounds) != self.boxes:
            raise illegal(f"{value.name} has a placement for another shape or number of ranks", instr)
        if any(not 0 <= lo <= hi for lo, hi in cut.bounds):
            raise illegal(f"{value.name} has a box that ends before it begins", instr)
        if not covers(cut.bounds, max(hi for _, hi in cut.bounds)):
            raise illegal(f"the boxes of {value.name} leave a gap", instr)


class _Host:
    """Copies to host memory and back: which are under way, and which bytes of the pool hold a value.

    What a copy reads stays alive until its wait, which names it; what a copy makes is read by its wait alone.
    """

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.started: dict[str, str] = {}  # what a copy makes -> what it reads
        self.moving: set[str] = set()  # what copies make, before and after their waits
        self.pool: dict[str, tuple[int, int]] = {}  # what is in host memory -> from and to which byte

    def read(self, instr: Instr) -> None:
        record = STRUCTURE.get(instr.op)
        for name in instr.refs():
            if name in self.moving and not (record and record.awaits):
                raise illegal(f"{name} is read before its copy is waited for", instr, "only what wait gives is there")
            if name in self.pool and not (record and record.from_host):
                raise illegal(f"{name} is in host memory", instr, f"{instr.op} reads what is on the device")

    def released(self, instr: Instr) -> None:
        for name in instr.refs():
            if name in self.started:
                raise illegal(f"{name} is released before its copy is waited for", instr)
            self.moving.discard(name)
            self.pool.pop(name, None)

    def copied(self, record: Structural, instr: Instr, operands: list[Value]) -> None:
        source, made = operands[0], instr.values()[0]
        if (made.dtype, made.shape) != (source.dtype, source.shape):
            raise illegal(f"{made.name} is of another type than {source.name}, of which it is a copy", instr)
        if record.awaits:
            if self.started.pop(source.name, None) != operands[1].name:
                raise illegal(f"{source.name} is no copy of {operands[1].name} that is to be waited for", instr)
            if source.name in self.pool:
                self.pool[made.name] = self.pool.pop(source.name)
            return
        if record.to_host:
            self.pool[made.name] = self.place(instr, made)
        elif source.name not in self.pool:
            raise illegal(f"{source.name} is fetched, and it is not in host memory", instr)
        self.started[made.name] = source.name
        self.moving.add(made.name)

    def place(self, instr: Instr, value: Value) -> tuple[int, int]:
        """The bytes of the pool that an offload fills, on the rank with the largest box."""
        at = instr.args[-1]
        if type(at) is not int or at < 0 or at % ITEMSIZE[value.dtype]:
            raise illegal(f"{value.name} is put at {at}, which is no place for {value.dtype}", instr)
        end = at + max(value.nbytes(rank) for rank in range(self.ranks))
        for name, (lo, hi) in self.pool.items():
            if at < hi and lo < end:
                raise illegal(f"{value.name} is put at bytes {at} to {end}, where {name} is until byte {hi}", instr)
        return at, end


def _check_call(instr: Instr) -> None:
    """A call is of an operator, and something is made of a result."""
    if instr.op.partition(".")[0] not in ("aten", "autosp"):
        raise illegal(f"{instr.op} is not an operator", instr)
    if not instr.values() and instr.into is None:
        raise illegal(f"{instr.op} gives nothing that has a name", instr)


def _check_count(record: Structural, instr: Instr) -> None:
    """As many operands as the record says and one result, or any number and a result for each."""
    operands, results = len(instr.refs()), len(instr.values())
    if record.operands is None and (not operands or operands != results):
        raise illegal(f"{instr.op} has operands, and a result for each", instr)
    if record.operands is not None and (operands, results) != (record.operands, 1):
        raise illegal(f"{instr.op} has {operands} operands and {results} results", instr,
                      f"legal are {record.operands} and 1")  # fmt: skip
