"""What a model keeps between steps outside of its parameters, found by running forward twice in one trace.

    self.memory = x[:, -8:].detach()      the second step reads what the first made of its batch
    self.steps = self.steps + 1           the second step's loss has other literals
    if self.steps < 2000: ...             neither shows it: what goes on changing is given many other values
    if self.mask is None: self.mask = triu(ones(S, S))           a cache: the same expression in every step

torch.export puts attributes back when it is done, and so captures the first step for all.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

from torch import Tensor, nn

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.diagnose import refuse_mutation
from autosp_aot.export.eager import Trace, homes
from autosp_aot.export.keeping import Slot, codes_of, global_slots, left_alone, own_files, random_states, slots
from autosp_aot.export.kept import CONTAINERS, FILLED, LARGEST, counting, fill, keeper, mark
from autosp_aot.export.subject import Subject
from autosp_aot.export.user_code import FAILURES, changed_at

# Where schedules turn: all numbers that stand in the model's code and attributes, and these.
ROUND = sorted({0, 720720, *(2**n for n in range(31)), *(k * 10**n for n in range(9) for k in (1, 2, 5))})


def refuse_state(subject: Subject) -> tuple[Tensor, nn.Module, BuildError | None]:
    """The loss of a step on fake tensors with its autograd graph, the copy of the model that it is of, and of backward
    the error, which is to be raised where the step is captured nevertheless.

    BuildError for what a step changes that outlives it, where a later step's loss depends on it: names what is kept,
    and the line that keeps it.
    """
    with left_alone(subject.model):
        return _refuse_state(subject)


def _refuse_state(subject: Subject) -> tuple[Tensor, nn.Module, BuildError | None]:
    steps, randoms = _Steps(subject), random_states()
    loss, first = steps.step()
    if drawn := [module for module, state in random_states().items() if state != randoms[module]]:
        raise _drawn(subject, drawn)
    moved = {what: _moved_at(subject, what) for what in steps.trace.moved(steps.model)}
    refuse_mutation({what: at or subject.place for what, at in (steps.trace.written | moved).items()})
    start, after = steps.held, steps.look()
    inputs = steps.begin()
    kept = steps.kept()
    _, second = steps.run(inputs)
    if first != second:
        carried = steps.trace.carried(second)
        read = [path for path, held in kept.items() if held in carried]
        raise _kept(subject, read or [path for path in after if after[path] != start.get(path)])
    later = steps.look()
    drifting = [path for path in later if later[path] != after.get(path)]
    if drifting and (turned := steps.turned(drifting, first)):
        raise _kept(subject, turned)
    return loss, steps.model, steps.failure


class _Steps:
    """Steps of one copy of a model, one after the other, in one trace."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.model, self.mode = subject.copy(values=False)
        self.trace = Trace(self.model, subject.model)
        self.held = self.look()
        self.failure: BuildError | None = None  # of backward

    def step(self) -> tuple[Tensor, int]:
        """The loss of a step, and the expression of it and of all gradients."""
        return self.run(self.begin())

    def begin(self) -> dict[str, Tensor]:
        """The batch of a step that begins."""
        inputs = self.subject.inputs(self.mode)
        self.trace.begin(inputs)
        return inputs

    def kept(self) -> dict[str, int | None]:
        """What the tensors that the model keeps hold, by path."""
        tensors = ((slot.path, slot.value) for slot in self.slots() if isinstance(slot.value, Tensor))
        return {path: self.trace.stored.get(tensor.untyped_storage()._cdata) for path, tensor in tensors}

    def run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The rest of the step that has begun with this batch."""
        loss = self.subject.loss(self.model, inputs, self.mode, self.trace)
        if self.trace.reads:
            raise BuildError(*dict.fromkeys(self.trace.reads))
        made = (loss, *self.gradients(loss))
        expressions = tuple(self.trace.expression(tensor) for tensor in made)
        return loss, self.trace.number(("step", expressions), expressions, False)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradients of a loss; none where backward fails, as it does once more where it is captured."""
        try:
            return self.subject.gradients(self.model, loss, self.mode, self.trace)
        except BuildError as error:
            self.failure = error
            return []

    def look(self) -> dict[str, object]:
        """What the model keeps, by path, such that what is the same compares equal."""
        return {slot.path: self.trace.expression(slot.value) if isinstance(slot.value, Tensor) else mark(slot.value)
                for slot in self.slots()}  # fmt: skip

    def slots(self) -> Iterator[Slot]:
        return chain(slots(self.model), global_slots(self.model))

    def turned(self, paths: list[str], expression: int) -> list[str]:
        """Those of `paths`, whose numbers and lengths go on changing, on which the loss depends after all, or may."""
        places = [slot for slot in self.slots() if slot.path in paths and not isinstance(slot.value, Tensor)]
        if hidden := [slot.path for slot in places if not _counts(slot.value) or _is_large(slot.value)]:
            return hidden
        numbers = {slot.value for slot in self.slots() if type(slot.value) in (int, float)} | _literals(self.model)
        probes = sorted({n + d for n in numbers if abs(n) < 10**12 for d in (-1, 0, 1)} | set(ROUND))
        for probe in probes if places else ():
            if not self._stays(places, probe, expression):
                found = [slot.path for slot in places if not self._stays([slot], probe, expression)]
                return found or [slot.path for slot in places]
        return []

    def _stays(self, places: list[Slot], probe: float, expression: int) -> bool:
        """Whether a step with these values, and the one after it, give the loss and the gradients they gave."""
        places = sorted(places, key=lambda slot: isinstance(slot.value, FILLED))  # elements before what they are in
        before, self.trace.answers = [(slot, slot.value, keeper(slot.value)) for slot in places], True
        for slot, value, _ in before:
            fill(value, counting(value, probe)) if isinstance(value, FILLED) else slot.put(counting(value, probe))
        try:
            return all(self.step()[1] == expression for _ in range(2))
        except (BuildError, *FAILURES):
            return False
        finally:
            for slot, value, restore in reversed(before):
                restore()
                slot.put(value)


def _counts(value) -> bool:
    """Whether there are other values that a place can be given to see what depends on it."""
    try:
        counting(value, 1)
    except TypeError:
        return False
    return True


def _is_large(value) -> bool:
    """Whether a container is one whose elements nobody looks at."""
    return isinstance(value, CONTAINERS) and len(value) > LARGEST


def _literals(model: nn.Module) -> set[float]:
    """The numbers that stand in the code of the model's classes, and of functions of the user's that it names."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    todo = list(codes_of(*(kind for kind in kinds if not kind.__module__.startswith("torch."))))
    others = {code.co_name: code for code in codes_of(*own_files(model))}
    found: set[float] = set()
    while todo:
        code = todo.pop()
        found |= {value for value in code.co_consts if type(value) in (int, float)}
        todo += [others.pop(name) for name in code.co_names if name in others]
    return found


def _kept(subject: Subject, paths: list[str]) -> BuildError:
    """The error for what is kept: the attributes, and the line that assigns each; or where two steps part."""
    attributes = list(dict.fromkeys(_attribute(path) for path in paths))
    why = "later steps compute with it, and a program does the same in every step"
    if not attributes:
        parted = _parted_at(subject) or subject.place
        return BuildError(Problem(
            "state-kept", "forward computes something else in its second step", parted, why,
            "take what changes as an input of forward: a number as a scalar tensor of the batch",
        ))  # fmt: skip
    return BuildError(*(
        Problem(
            "state-kept", f"forward keeps {attribute} from one step to the next",
            _changed_at(subject, partial(_look, attribute)) or subject.place, why,
            "take it as an input of forward: a count as a scalar tensor of the batch, a memory as a tensor",
        )
        for attribute in attributes
    ))  # fmt: skip


def _look(attribute: str, model: nn.Module) -> Callable[[], object]:
    """A look at what a model keeps there, or will."""
    module, _, name = f"model.{attribute}".rpartition(".")
    every = lambda: [slot for slot in chain(slots(model), global_slots(model)) if _attribute(slot.path) == attribute]  # noqa: E731
    places, owner = every(), dict(model.named_modules()).get(module)
    if not places and owner is None:  # in an object, which has it only later
        return lambda: [mark(_now(slot)) for slot in every()]
    return lambda: [mark(_now(slot)) for slot in places] or mark(vars(owner).get(name))


def _attribute(path: str) -> str:
    """The path of an attribute, of that of an element of what it holds: `history`, of `history[2]['a']`."""
    depth, end = 0, len(path)
    for at in range(len(path) - 1, -1, -1):
        depth += {"]": 1, "[": -1}.get(path[at], 0)
        if depth == 0:
            if path[at] != "[":
                break
            end = at
    return path[:end] or path


def _now(slot: Slot) -> object:
    try:
        return slot.value
    except LookupError:
        return None


def _moved_at(subject: Subject, what: str) -> str:
    """The line that gives a parameter or buffer other memory."""
    return _changed_at(subject, lambda model: lambda: homes(model).get(what))


def _drawn(subject: Subject, modules: list[str]) -> BuildError:
    at = _changed_at(subject, lambda model: random_states)
    return BuildError(*(
        Problem("random-operator", f"forward draws from {module} random module", at or subject.place,
                "the number drawn while building would stay for every step",
                "draw with torch operators, as with torch.rand(()) and torch.where")
        for module in modules
    ))  # fmt: skip


def _changed_at(subject: Subject, look: Callable[[nn.Module], Callable[[], object]]) -> str:
    """The line of a step that leaves other than it was what `look(model)()` sees."""
    model, mode = subject.copy(values=False)
    return changed_at(lambda: subject.loss(model, subject.inputs(mode), mode), look(model))


def _parted_at(subject: Subject) -> str:
    """The line of the first call that is another in the second step."""
    steps = _Steps(subject)
    calls = []
    for _ in range(2):
        steps.trace.calls = []
        steps.step()
        calls.append(steps.trace.calls)
    return next((place for (one, _), (other, place) in zip(*calls) if one != other), "")
