"""The captured graph as a `Program` of one section, with one spelling for each thing.

    whatever views, takes parts or joins           -> see shapes.py
    detach, alias, clone, equal casts              -> gone;  copy(a, b) -> b, with a's dtype and shape
    nll_loss_forward(..., mean)                    -> nll_loss_forward(..., sum), then sum / count
    native_dropout, rand, randn, bernoulli ...     -> autosp.uniform, and arithmetic
    equal calls                                    -> one call;   unused calls  -> gone

Values are named by module path, operator and occurrence; what depends on the loss gradient begins with `grad.`.
"""

import json
import operator
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.canonical.randomness import LOWERINGS, lower
from autosp_aot.export.canonical.shapes import SAME, SHAPES, expand, shaped
from autosp_aot.export.diagnose import sparse_problem
from autosp_aot.export.joint import Joint
from autosp_aot.export.source import where
from autosp_aot.ir.operators import DTYPE_NAMES as DTYPES
from autosp_aot.ir.operators import DTYPES as TORCH_DTYPES
from autosp_aot.ir.operators import FACTORIES
from autosp_aot.ir.program import Dtype, Input, Instr, Program, Ref, Section, Value, free_of_prefixes, map_args
from autosp_aot.ops.table import OURS

aten = torch.ops.aten

DROPPED_KWARGS = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
MEAN, SUM = 1, 2
SEED = "seed"


def canonical_program(joint: Joint) -> tuple[Program, dict[str, Tensor]]:
    """The step as a program of one section `step`, and the values of the constants of the graph, by name."""
    return _Canonical(joint).program()


def forward_part(whole: Program) -> Program:
    """The part of a step that its loss needs."""
    (step,) = whole.sections
    inputs = [entry for entry in whole.inputs if entry.kind != "tangent"]
    return _needed(inputs, step.instrs, [(label, name) for label, name in step.gives if label == "loss"])


class _Canonical:
    def __init__(self, joint: Joint):
        self.joint = joint
        self.graph = joint.graph_module.graph
        self.names: dict[Node, str] = {}
        self.pairs: dict[Node, tuple[str, ...]] = {}
        self.types: dict[str, Value] = {}
        self.made: dict[str, Instr] = {}
        self.same: dict[tuple, tuple[str, ...]] = {}
        self.taken: Counter[str] = Counter()
        self.instrs: list[Instr] = []
        self.inputs: list[Input] = []
        self.constants: dict[str, Tensor] = dict(joint.constants)
        self.after_loss: set[str] = set()
        self.seed: Ref | None = None
        self.sites = 0
        self.attention_sites: dict[int, tuple[Ref, int]] = {}

    def program(self) -> tuple[Program, dict[str, Tensor]]:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node, (kind, name) in zip(placeholders, self.joint.inputs):
            if kind == "buffer" and not node.users:
                continue
            place = next(filter(None, (where(user).source for user in node.users)), self.joint.place)
            self.names[node] = self.add_input(kind, name, node.meta["val"], place)
        named: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                if node.target not in named:
                    value = getattr(self.joint.graph_module, node.target)
                    name = self.add_input("buffer", f"constant.{len(self.constants)}", value, self.joint.place)
                    named[node.target], self.constants[name] = name, value
                self.names[node] = named[node.target]
            elif node.op == "call_function":
                self.call(node)
        output = next(node for node in self.graph.nodes if node.op == "output")
        outputs = zip(self.joint.outputs, output.args[0])
        gives = [(label, self.names[node]) for label, node in outputs if node is not None]
        return _needed(self.inputs, self.instrs, gives), self.constants

    def add_input(self, kind: str, name: str, tensor: Tensor, place: str = "") -> str:
        if self.taken[name]:
            raise BuildError(Problem("name-taken", f"two inputs of the step are called {name!r}", "example_batch",
                                     "every value needs its own name", "rename one of them"))
        if tensor.dtype not in DTYPES:
            raise BuildError(unsupported(f"{kind} {name!r} is {tensor.dtype}", place))
        self.taken[name] += 1
        self.types[name] = self.typed(name, tensor)
        self.inputs.append(Input(kind, self.types[name]))
        if kind == "tangent":
            self.after_loss.add(name)
        return name

    def typed(self, name: str, tensor: Tensor) -> Value:
        return Value(name, DTYPES[tensor.dtype], tuple(tensor.shape))

    def call(self, node: Node) -> None:
        if node.target is operator.getitem:
            self.names[node] = self.pairs[node.args[0]][node.args[1]]
            return
        assert isinstance(node.target, torch._ops.OpOverload), node.target
        results = node.meta["val"]
        types = results if isinstance(results, (tuple, list)) else (results,)
        for dtype in (*(t.dtype for t in types if isinstance(t, Tensor)), *_dtypes((node.args, node.kwargs))):
            if dtype not in DTYPES:
                raise BuildError(unsupported(f"{node.target} makes or takes {dtype}", where(node).source))
        if any(isinstance(t, Tensor) and t.layout is not torch.strided for t in types):
            raise BuildError(sparse_problem(node.target, where(node).source))
        assert all(isinstance(t, Tensor) for t in types if t is not None), node.target
        names = self.spelled(node, list(types))
        if isinstance(results, (tuple, list)):
            self.pairs[node] = names
        else:
            self.names[node] = names[0]

    def spelled(self, node: Node, types: list[Tensor]) -> tuple[str, ...]:
        """Emit the canonical form of a node; the names of its results."""
        target, args = node.target, node.args
        if target in (*SAME, aten.detach.default):
            return (self.names[args[0]],)
        if target in SHAPES:
            return shaped(node, self)
        if target in LOWERINGS:
            return lower(node, self)
        own = OURS.get(_name(target))
        if own is not None and own.over_heads is not None:
            return self.attention(node, own.over_heads.query, types)
        if target in (aten._to_copy.default, aten.to.dtype):
            return (self.cast(node, Ref(self.names[args[0]]), types[0].dtype),)
        if target is aten.copy.default:
            return (expand(node, self, self.cast(node, Ref(self.names[args[1]]), types[0].dtype)),)
        if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            dtype = Dtype(DTYPES[types[0].dtype])
            return self.emit(node, "aten.arange.start_step", _range(args), (("dtype", dtype),), types)
        if target is aten.nll_loss_forward.default and args[3] in (MEAN, SUM):
            return self.nll_loss(node, types)
        kwargs = tuple((k, self.arguments(v)) for k, v in sorted(node.kwargs.items()) if k not in DROPPED_KWARGS)
        args, kwargs = self.without_default(node, _name(target), self.arguments(args), kwargs, types[0])
        return self.emit(node, _name(target), args, kwargs, types)

    def without_default(self, node: Node, op: str, args: tuple, kwargs: tuple, result: Tensor) -> tuple[tuple, tuple]:
        """The arguments such that the result's dtype does not follow from a default that is not the usual float32."""
        if torch.get_default_dtype() is torch.float32 or not result.is_floating_point():
            return args, kwargs
        if op in FACTORIES:
            return args, tuple((dict(kwargs) | {"dtype": Dtype(DTYPES[result.dtype])}).items())
        if any(TORCH_DTYPES[self.types[ref].dtype].is_floating_point for ref in Instr((), op, args, kwargs).refs()):
            return args, kwargs
        cast = lambda leaf: Ref(self.cast(node, leaf, result.dtype)) if isinstance(leaf, Ref) else leaf  # noqa: E731
        return map_args(args, cast), kwargs

    def nll_loss(self, node: Node, types: list[Tensor]) -> tuple[str, ...]:
        """The sum over rows, divided by the count for a mean; without class weights the count needs no scores."""
        scores, target, weight, reduction, ignored = node.args
        args = self.arguments((scores, target, weight, SUM, ignored))
        total, count = self.emit(node, str(node.target), args, (), types)
        if weight is None:
            (valid,) = self.emit(node, "aten.ne.Scalar", (args[1], ignored), (), [self.meta(args[1]).to(torch.bool)])
            kwargs = (("dtype", Dtype(DTYPES[types[1].dtype])),)
            count = self.emit(node, "aten.sum.default", (Ref(valid),), kwargs, types[1:])[0]
        if reduction == SUM:
            return total, count
        return self.emit(node, "aten.div.Tensor", (Ref(total), Ref(count)), (), types[:1]) + (count,)

    def cast(self, node: Node, value: Ref, dtype: torch.dtype) -> str:
        if self.types[value.name].dtype == DTYPES[dtype]:
            return value.name
        kwargs = (("dtype", Dtype(DTYPES[dtype])),)
        return self.emit(node, "aten._to_copy.default", (value,), kwargs, [self.meta(value).to(dtype)])[0]

    def attention(self, node: Node, query: int, types: list[Tensor]) -> tuple[str, ...]:
        """The call with its scoring as keyword arguments, the group of its key/value heads, and its first head."""
        *args, scoring = node.args
        q, k = (args[at].meta["val"] for at in (query, query + 1))
        group = q.shape[1] // k.shape[1]
        kwargs, seed = {name: map_args(value, lambda leaf: leaf) for name, value in json.loads(scoring).items()}, None
        if "dropout" in kwargs:
            if kwargs["site"] not in self.attention_sites:
                self.attention_sites[kwargs["site"]] = self.site()
            seed, kwargs["site"] = self.attention_sites[kwargs["site"]]
        at = next(at for at, arg in enumerate(args) if isinstance(arg, (list, tuple))) + 1
        args = (*self.arguments(args[:at]), seed, *args[at:], group, 0)
        return self.emit(node, _name(node.target), args, tuple(kwargs.items()), types)

    def site(self) -> tuple[Ref, int]:
        """The seed and the number of a new drawing operator; the step has a seed as soon as something draws."""
        if self.seed is None:
            name = SEED if SEED not in {name for _, name in self.joint.inputs} else f".{SEED}"
            self.seed = Ref(self.add_input("seed", name, torch.empty((), dtype=torch.int64)))
        self.sites += 1
        return self.seed, self.sites - 1

    def uniform(self, node: Node, like: Tensor, dtype: torch.dtype) -> str:
        """A new draw from [0, 1)."""
        kwargs = (("dtype", Dtype(DTYPES[dtype])),)
        return self.emit(node, "autosp.uniform", (*self.site(), tuple(like.shape), ()), kwargs, [like.to(dtype)])[0]

    def meta(self, ref: Ref) -> Tensor:
        """A tensor without data of a value's type."""
        value = self.types[ref.name]
        return torch.empty(value.sizes, dtype=TORCH_DTYPES[value.dtype], device="meta")

    def arguments(self, arg):
        """An fx argument as ours: nodes become references, dtypes their short names."""
        if isinstance(arg, (list, tuple)):
            return tuple(self.arguments(item) for item in arg)
        if isinstance(arg, Node):
            return Ref(self.names[arg])
        if isinstance(arg, torch.dtype):
            return Dtype(DTYPES[arg])
        assert arg is None or isinstance(arg, (int, float, bool, str)), arg
        return arg

    def emit(self, node: Node, op: str, args: tuple, kwargs: tuple, types: Sequence[Tensor | None]) -> tuple[str, ...]:
        args = map_args(args, lambda leaf: leaf)
        key = (op, _typed_key(args), _typed_key(kwargs))
        if key in self.same:
            return self.same[key]
        place = where(node)
        operands = Instr((), op, args, kwargs).refs()
        late = any(name in self.after_loss for name in operands)
        module = ("grad." if late else "") + place.module
        names = tuple(self.fresh(module, op, at, len(types)) for at in range(len(types)))
        outs = tuple(None if t is None else self.typed(name, t) for name, t in zip(names, types))
        instr = Instr(outs, op, args, kwargs, place)
        for out in instr.values():
            self.types[out.name], self.made[out.name] = out, instr
            if late:
                self.after_loss.add(out.name)
        self.instrs.append(instr)
        self.same[key] = names
        return names

    def fresh(self, module: str, op: str, at: int, count: int) -> str:
        role = op.split(".")[1].removeprefix("_") + (f"_{at}" if count > 1 else "")
        name = free_of_prefixes(f"{module}.{role}" if module and not module.endswith(".") else module + role)
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name}.{self.taken[name] - 1}"


def unsupported(what: str, place: str) -> Problem:
    """Of a dtype that no value of a program has."""
    return Problem("dtype-unsupported", what, place, "programs have no such dtype",
                   "compute it in real floats or integers")  # fmt: skip


def _name(target: torch._ops.OpOverload) -> str:
    """The operator as programs call it: ours have no overloads."""
    return str(target).removesuffix(".default") if target.namespace == "autosp" else str(target)


def _dtypes(arg) -> list[torch.dtype]:
    """The dtypes among nested arguments."""
    if isinstance(arg, (tuple, list, dict)):
        return [dtype for item in (arg.values() if isinstance(arg, dict) else arg) for dtype in _dtypes(item)]
    return [arg] if isinstance(arg, torch.dtype) else []


def _typed_key(arg):
    """Arguments as a key in which 1, 1.0 and True differ."""
    return map_args(arg, lambda leaf: (type(leaf), repr(leaf) if isinstance(leaf, float) else leaf))


def _range(args: tuple) -> tuple:
    start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    return start, end, step


def _needed(inputs: Sequence[Input], instrs: Sequence[Instr], gives: Sequence[tuple[str, str]]) -> Program:
    """The program that gives just that: instructions and results that nothing needs dropped, in the same order."""
    needed, kept = {name for _, name in gives}, []
    for instr in reversed(instrs):
        if any(out.name in needed for out in instr.values()):
            outs = tuple(out if out is not None and out.name in needed else None for out in instr.outs)
            kept.append(Instr(outs, instr.op, instr.args, instr.kwargs, instr.where))
            needed.update(instr.refs())
    used = tuple(entry for entry in inputs if entry.kind not in ("buffer", "seed") or entry.value.name in needed)
    return Program(1, used, (Section("step", (), tuple(kept[::-1]), tuple(gives)),))
