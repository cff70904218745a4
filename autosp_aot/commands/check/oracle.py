"""All ranks' programs against eager: steps of SGD with the user's own module, of which nothing is captured or copied.

    module(**batch).backward()      loss, gradients        p -= lr * p.grad
    programs, in lockstep           the same of each rank  p -= lr * grad.p         two steps, then the parameters

Of each loss, gradient and parameter |a - b| / max(|b|, 1e-4 r), r being the root mean square of the norms of its kind.
What rounding makes of them is measured: in eager once more, from weights that are other ones in their last digit.
Programs may round more than eager does (attention block by block): in fp32 what is somewhat beyond is judged in fp64.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autosp_aot.artifact.batches import Constant, nested, tensors_of
from autosp_aot.commands.check.numeric import widened
from autosp_aot.commands.check.undrawn import NotComparable, Undrawn, undrawn
from autosp_aot.export.complex import as_real
from autosp_aot.export.loss import forward_at, loss_of
from autosp_aot.export.user_code import FAILURES, defined_at
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Program
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.simulate import lockstep, simulate

# What rounding may make of a number where all is fp64, where fp64 is cast to fp32 inside, in fp32, and in half dtypes;
# and how many times the difference that other last digits of the weights make.
LIMITS = {("f64",): 1e-12, ("f32", "f64"): 1e-6, ("f32",): 1e-5}
HALF_LIMIT, TIMES, HALF_TIMES = 2**-6, 10, 4
# A step changes the parameters by so much of their norm.
STEP_LENGTH = 0.1

Results = dict[str, Tensor]
# What a tensor is known by in any layout: its size, its norm and its sum.
Marks = tuple[int, float, float]


@dataclass(frozen=True)
class Built:
    """What is compared: the unsharded step, the programs of all ranks, those of the evaluation, and stored values."""

    whole: Program
    programs: list[Program]
    evaluation: list[Program] | None
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """The worst relative error of any rank, and what it may be, by `loss`, `grad.<parameter>`, `<parameter>`.

    `steps` is how many steps were like eager's; `module` is where the first that was not differs first.
    """

    errors: dict[str, float]
    limits: dict[str, float]
    steps: int
    module: str = ""
    place: str = ""

    @property
    def beyond(self) -> dict[str, float]:
        """The errors that are not within their limits, worst first."""
        found = {label: error for label, error in self.errors.items() if not error <= self.limits[label]}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class EagerFailed(Exception):
    """The model's own forward or backward raised an exception."""

    def __init__(self, raised: Exception):
        super().__init__(raised)
        self.raised = raised


def compare(model: nn.Module, batch: Mapping[str, Tensor | Constant], built: Built, steps: int = 2) -> Outcome:
    """Compare `steps` steps, up to the first that differs, and then the loss in eval mode.

    `model` is in the mode that was captured and has its weights, which the steps change; `batch` is flat. Raises
    NotComparable, EagerFailed.
    """
    other = _perturbed_step(model, batch, built.whole)
    model.zero_grad(set_to_none=True)
    eager, ranks = _Eager(model, batch), _Ranks(model, batch, built)
    base, times = (LIMITS[f], TIMES) if (f := floats(built.whole)) in LIMITS else (HALF_LIMIT, HALF_TIMES)
    limits, errors = {}, {}
    for number in range(steps):
        before = ranks.state()
        reference, found = _stepped(eager, ranks)
        errors = _errors(reference, found)
        if number == 0:
            rounding = _errors(reference, [other | {label: t for label, t in reference.items() if label not in other}])
            limits = {label: max(base, times * rounding.get(label, 0.0)) for label in errors}
        outcome = Outcome(errors, {label: limits.get(label, base) for label in errors}, number)
        if outcome.beyond and _same_in_fp64(outcome, model, batch, built, ranks.inputs | before):
            outcome = replace(outcome, limits={label: TIMES * limit for label, limit in outcome.limits.items()})
        if outcome.beyond:
            return _located(outcome, built.whole, ranks.inputs | before, eager.outputs, model)
    if built.evaluation is None:
        return outcome
    errors |= _errors(*_evaluated(eager, ranks))
    outcome = Outcome(errors, outcome.limits | {"evaluation": limits["loss"]}, steps, "the model in eval mode")
    if outcome.beyond and _same_in_fp64(outcome, model, batch, built, ranks.inputs, _evaluated):
        outcome = replace(outcome, limits=outcome.limits | {"evaluation": TIMES * limits["loss"]})
    return outcome


def _stepped(eager: "_Eager", ranks: "_Ranks") -> tuple[Results, list[Results]]:
    """A step of both."""
    return eager.step(), ranks.step(eager.rate)


def _evaluated(eager: "_Eager", ranks: "_Ranks") -> tuple[Results, list[Results]]:
    """The loss of both in eval mode."""
    return {"evaluation": eager.evaluate()}, [{"evaluation": loss} for loss in ranks.evaluate()]


class _Eager:
    """Steps of a module with SGD. `outputs` are those of its modules in the last one, in order: path and `_marks`."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor | Constant]):
        self.model, self.batch, self.rate = model, batch, 0.0
        self.outputs: list[tuple[str, Marks]] = []

    def step(self) -> Results:
        """Loss, gradients, and the parameters after the step, on the CPU."""
        self.outputs = []
        named = [(path, module) for path, module in self.model.named_modules() if path]
        hooks = [module.register_forward_hook(self._noting(path)) for path, module in named]
        try:
            with _failing(), Undrawn():
                loss = loss_of(self.model(**nested(self.batch)), forward_at(self.model))
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        found = {"loss": loss.detach().cpu()}
        parameters = dict(self.model.named_parameters())
        found |= {f"grad.{name}": p.grad.detach().cpu().clone() for name, p in parameters.items() if p.grad is not None}
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise NotComparable("eager gives no finite numbers")
        self.rate = self.rate or STEP_LENGTH * _length(parameters.values()) / _length(
            found[name] for name in found if name != "loss"
        )
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(self.rate * parameter.grad)
                    parameter.grad = None
        return found | {name: p.detach().cpu().clone() for name, p in parameters.items()}

    def evaluate(self) -> Tensor:
        """The loss in eval mode; the modules' modes are as before then."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad(), _failing(), Undrawn():
                return loss_of(self.model(**nested(self.batch)), forward_at(self.model)).cpu()
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _noting(self, path: str):
        def note(module: nn.Module, args, result) -> None:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            self.outputs += [(path, _marks(tensor.detach())) for tensor in tensors[:1]]

        return note


class _Ranks:
    """The same steps of all ranks' programs, whose parameters are those of rank 0."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor | Constant], built: Built):
        own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        wanted = {e.value.name for program in (built.whole, *(built.evaluation or ())) for e in program.inputs
                  if e.kind in ("parameter", "buffer")}  # fmt: skip
        values = {name: as_real(tensor.detach()).cpu().clone() for name, tensor in own if name in wanted}
        drawn = {"seed": torch.tensor(0), ".seed": torch.tensor(0)}
        self.inputs = drawn | values | dict(built.buffers) | {name: t.cpu() for name, t in tensors_of(batch).items()}
        self.parameters = [entry.value.name for entry in built.whole.inputs if entry.kind == "parameter"]
        self.programs = [undrawn(program) for program in built.programs]
        self.evaluation = built.evaluation and [undrawn(program) for program in built.evaluation]
        self.dtype = DTYPES[built.whole.values()[dict(built.whole.sections[0].gives)["loss"]].dtype]

    def state(self) -> Results:
        return {name: self.inputs[name].clone() for name in self.parameters}

    def step(self, rate: float) -> list[Results]:
        """By rank: loss, gradients, and the parameters after the step."""
        found = simulate(self.programs, self.inputs, torch.ones((), dtype=self.dtype), copying=True)
        gradients = {name.removeprefix("grad."): grad for name, grad in found[0].items() if name != "loss"}
        self.inputs |= {name: self.inputs[name] - rate * grad for name, grad in gradients.items()}
        return [result | self.state() for result in found]

    def evaluate(self) -> list[Tensor]:
        assert self.evaluation is not None, "there is an evaluation"
        found = simulate(self.evaluation, self.inputs, torch.ones((), dtype=self.dtype), copying=True)
        return [result["loss"] for result in found]


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """What the model prints is dropped, and what it raises is an EagerFailed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except FAILURES as error:
        raise EagerFailed(error) from error


def floats(program: Program) -> tuple[str, ...]:
    """The floating dtypes of a program's values, sorted."""
    return tuple(sorted({v.dtype for v in program.values().values() if DTYPES[v.dtype].is_floating_point}))


def _perturbed_step(model: nn.Module, batch: Mapping[str, Tensor | Constant], whole: Program) -> Results:
    """A step of a copy whose weights are others in their last digit of the narrowest dtype; nothing if it cannot run.

    What deepcopy does not copy as it should is missing in it, and so does not count as rounding.
    """
    eps, draw = max(torch.finfo(DTYPES[name]).eps for name in floats(whole)), torch.Generator().manual_seed(0)
    try:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                last = torch.rand(parameter.shape, generator=draw, dtype=torch.float64) * 2 - 1
                parameter.copy_((parameter.double() * (1 + eps * last.to(parameter.device))).to(parameter.dtype))
        return _Eager(other, batch).step()
    except (NotComparable, EagerFailed, *FAILURES):
        return {}


def _same_in_fp64(
    outcome: Outcome, model: nn.Module, batch: Mapping, built: Built, inputs: Results, taken: Callable = _stepped
) -> bool:
    """Whether what is beyond its limit in fp32, but not by far, is rounding: what is `taken` in fp64 is eager's.

    `inputs` are all that the programs had; the model has its own buffers, as its steps have left them. It may cast to
    fp32 all the same. One that cannot run in fp64 says nothing.
    """
    by_far = any(error > TIMES * outcome.limits[label] for label, error in outcome.beyond.items())
    if by_far or floats(built.whole) != ("f32",):
        return False
    wide = lambda values: {k: v.double() if _is_single(v) else v for k, v in values.items()}  # noqa: E731
    whole, *programs = (widened(program, {"f32": "f64"}) for program in (built.whole, *built.programs))
    evaluation = built.evaluation and [widened(program, {"f32": "f64"}) for program in built.evaluation]
    try:
        other = copy.deepcopy(model).double()
        other.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in other.named_parameters(remove_duplicate=False):
                parameter.copy_(inputs.get(name, parameter))
        eager = _Eager(other, wide(batch))
        ranks = _Ranks(other, wide(batch), Built(whole, programs, evaluation, wide(built.buffers)))
        ranks.inputs |= wide(inputs)
        errors = _errors(*taken(eager, ranks))
    except (NotComparable, EagerFailed, *FAILURES):
        return False
    return max(errors.values()) <= LIMITS["f32", "f64"]


def _is_single(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float32


def _errors(reference: Results, found: list[Results]) -> dict[str, float]:
    """The worst of all ranks, by label; what one side lacks is zero."""
    scales = {kind: 1e-4 * _mean_length(tensors) for kind, tensors in _by_kind(reference).items()}
    errors = {}
    for label in dict.fromkeys((*reference, *(label for result in found for label in result))):
        wanted = reference.get(label)
        scale = max(0.0 if wanted is None else _length([wanted]), scales.get(_kind(label), 0.0), 1e-30)
        errors[label] = max(_apart(result.get(label), wanted) for result in found) / scale
    return errors


def _apart(a: Tensor | None, b: Tensor | None) -> float:
    a, b = (torch.zeros((), dtype=torch.float64) if t is None else t.double() for t in (a, b))
    apart = _length([a - b])
    return apart if apart == apart else float("inf")


def _kind(label: str) -> str:
    return label if label == "loss" else "gradient" if label.startswith("grad.") else "parameter"


def _by_kind(results: Results) -> dict[str, list[Tensor]]:
    kinds: dict[str, list[Tensor]] = {}
    for label, tensor in results.items():
        kinds.setdefault(_kind(label), []).append(tensor)
    return kinds


def _length(tensors) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())


def _mean_length(tensors: list[Tensor]) -> float:
    """The root mean square of norms."""
    return _length(tensors) / len(tensors) ** 0.5


# --- where ---


def _located(outcome: Outcome, whole: Program, inputs: Results, outputs, model: nn.Module) -> Outcome:
    """The first module whose result no value of the unsharded program is, after the last whose result one is.

    Where all are, the difference is in a gradient: the module of the parameter that is worst.
    """
    executor = Executor(undrawn(whole), 0, torch.device("cpu"), copying=True)
    dtype = DTYPES[whole.values()[dict(whole.sections[0].gives)["loss"]].dtype]
    values = inputs | {"grad_loss": torch.ones((), dtype=dtype)}
    lockstep([executor.run("step", values)])
    known: dict[int, list[Marks]] = {}
    for tensor in values.values():
        if tensor.is_floating_point():
            known.setdefault(tensor.numel(), []).append(_marks(tensor))
    near = LIMITS.get(floats(whole), HALF_LIMIT)
    matches = [any(_alike(marks, other, near) for other in known.get(marks[0], ())) for _, marks in outputs]
    last = max((at for at, match in enumerate(matches) if match), default=-1)
    if last + 1 < len(outputs):
        path = outputs[last + 1][0]
    else:
        worst = next((label for label in outcome.beyond if label != "loss"), "loss")
        path = worst.removeprefix("grad.").rpartition(".")[0]
    module = dict(model.named_modules()).get(path, model)
    return replace(outcome, module=path or type(model).__name__, place=defined_at(module.forward))


def _marks(tensor: Tensor) -> Marks:
    return tensor.numel(), _length([tensor]), float(tensor.double().sum())


def _alike(a: Marks, b: Marks, near: float) -> bool:
    return a[0] == b[0] and max(abs(a[1] - b[1]), abs(a[2] - b[2])) <= 10 * near * a[1]
