"""A build, from a model to an artifact: export -> passes -> artifact."""

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from autosp_aot import __version__
from autosp_aot.artifact.batches import constants_of, tensors_of
from autosp_aot.artifact.checkpoint_layout import Recipe
from autosp_aot.artifact.config import BuildConfig, checked_config
from autosp_aot.artifact.manifest import EVALUATE, FORMAT, STEP, Manifest, ProgramFacts, specs
from autosp_aot.artifact.write import Artifact, Programs, refuse_existing
from autosp_aot.commands.build.eager_check import compare_build
from autosp_aot.commands.build.pass_dump import Dump
from autosp_aot.commands.check.proof import read_back
from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.canonical.canonical import DTYPES, canonical_program, unsupported
from autosp_aot.export.complex import as_real
from autosp_aot.export.evaluation import capture_evaluation, in_eval_mode
from autosp_aot.export.example_batch import checked_sequence_dims, flat_batch, guess_sequence_dims, make_batch
from autosp_aot.export.joint import Joint, capture
from autosp_aot.export.model_file import make_model, read_model_file
from autosp_aot.export.subject import Subject
from autosp_aot.ir.program import Program, Value
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ir.units import bytes_of
from autosp_aot.ir.vocabularies import vocabularies
from autosp_aot.memory.costs import costs
from autosp_aot.ops.table import schema
from autosp_aot.passes.decisions import written
from autosp_aot.passes.pipeline import Watch, compile_evaluation, compile_program, unwatched
from autosp_aot.passes.step import Step
from autosp_aot.runtime.comm import present_target


def build_file(
    model_path: str | Path,
    config: BuildConfig,
    seq: int,
    batch_size: int = 1,
    options: Mapping[str, object] = MappingProxyType({}),
    out: Path | None = None,
    seed: int = 0,
    weights: bool = True,
    dump: Path | None = None,
    eager_check: bool = True,
) -> Path:
    """`autosp-aot build`: compile MODEL.py and write the artifact to `out` (default `./<model file stem>.sp<ranks>`).

    Weights are made from `seed` when they are under 1 GB. With `eager_check` the build is compared with eager where
    that takes seconds, as the artifact says. Raises BuildError and writes all or nothing; only what passes made is in
    `dump` also when a later one fails.
    """
    model_file = read_model_file(model_path)
    out = Path(f"{model_file.stem}.sp{config.ranks}") if out is None else out
    refuse_existing(out)
    watch = unwatched if dump is None else Dump(dump, out)
    batch, dims = make_batch(model_file, batch_size, seq)
    said = json.dumps([model_file.sha256, sorted(options.items()), seq, batch_size, asdict(config)], default=str)
    source = hashlib.sha256(said.encode()).hexdigest()
    model = make_model(model_file, options, seed)
    artifact = compile_model(model, batch, dims, config, source, watch)
    if weights and not any(parameter.is_meta for parameter in model.parameters()):
        artifact = replace(artifact, weights=_copies(model_values(model)))
    if eager_check:
        shortened = lambda length: make_batch(model_file, batch_size, length)[0]  # noqa: E731
        artifact = _compared(model, batch, dims, artifact, config, shortened)
    return artifact.save(out, read_back)


def build(
    module: nn.Module,
    batch: Mapping,
    sp: int,
    path: str | Path | None = None,
    *,
    sequence_dims: Mapping[str, int] | None = None,
    target: str | None = None,
    recompute: str | None = None,
    memory_budget: int | str | None = None,
    tile: str | int = "auto",
    offload: str = "off",
    strict: bool = False,
    evaluation: bool = True,
    weights: bool = True,
    eager_check: bool = True,
) -> Artifact:
    """Compile a module for `sp` ranks; `batch` are the keyword inputs of its forward, of the shapes to train with:
    tensors, dicts of tensors, and as constants of the build None, flags, numbers and texts.

    `sequence_dims` says which dim of which input is the sequence (default: dim 1 of every input with two dims or more,
    where that is the length of some tokens [B, S] or they all agree). `memory_budget` is in bytes, or text as "70GiB":
    what parameters, gradients, activations and workspace of a rank take together. `recompute` is auto, sac, full or
    none (default: auto with a budget, else sac), `tile` a number of slices, auto or off, `offload` off, auto or host.
    `target` is cpu, cuda, rocm (default: what torch finds here), or a device of `targets.DEVICES`.
    With `evaluation` the artifact also has the program that gives the loss in eval mode (`ShardedModel.evaluate`).
    With `eager_check` it is compared with steps of the module itself, where that takes seconds (`manifest.compared`).

    The module is left as it was; its present weights are stored unless `weights` is False. With `path` the artifact is
    written there. Raises BuildError, and ValueError for text that is no size.
    """
    budget = bytes_of(memory_budget) if isinstance(memory_budget, str) else memory_budget
    config = checked_config(sp, target or present_target(), recompute, budget, tile, offload, strict, evaluation)
    batch = flat_batch(batch, "batch")
    tensors = tensors_of(batch)
    dims = guess_sequence_dims(tensors) if sequence_dims is None else checked_sequence_dims(tensors, sequence_dims)
    if path is not None:
        refuse_existing(Path(path))
    artifact = compile_model(module, batch, dims, config, "")
    if weights:
        artifact = replace(artifact, weights=model_values(module))
    if eager_check:
        artifact = _compared(module, batch, dims, artifact, config, lambda length: _narrowed(batch, dims, length))
    if path is not None:
        artifact.save(path, read_back)
    return artifact


def _compared(
    model: nn.Module, batch, dims: dict[str, int], artifact: Artifact, config: BuildConfig, shortened: Callable
) -> Artifact:
    """The artifact, which says what was compared with eager. Raises BuildError where eager does something else."""
    length = max(batch[name].shape[dim] for name, dim in dims.items())
    compiled = lambda batch, config: compile_model(model, batch, dims, config, "")  # noqa: E731
    compared = compare_build(model, batch, length, artifact, config, shortened, compiled)
    return replace(artifact, manifest=replace(artifact.manifest, compared=compared))


def _narrowed(batch, dims: dict[str, int], length: int) -> dict:
    """The first positions of a batch, so that the longest input has `length`."""
    longest = max(batch[name].shape[dim] for name, dim in dims.items())
    short = lambda tensor, dim: tensor.narrow(dim, 0, max(1, tensor.shape[dim] * length // longest))  # noqa: E731
    return {name: short(value, dims[name]) if name in dims else value for name, value in batch.items()}


def compile_model(
    model: nn.Module, batch, sequence_dims: dict[str, int], config: BuildConfig, source: str, watch: Watch = unwatched
) -> Artifact:
    """Capture, partition and schedule a model; no weights are allocated. `watch` is shown what each pass makes."""
    subject = Subject(model, batch, config.target)
    captured = capture_model(subject)
    whole = captured.whole
    buffers = {name: as_real(buffer) for name, buffer in model.named_buffers()} | captured.constants
    compiled = compile_program(whole, sequence_dims, config, watch=watch)
    steps, evaluation = [compiled], None
    if config.evaluation:
        evaluation, constants = _evaluation(subject, captured, buffers, sequence_dims, config, watch)
        steps.append(evaluation)
        buffers |= constants
    persistent = set(_state_names(model))
    read = {e.value.name: e for step in steps for e in step.whole.inputs}.values()
    inputs = {kind: [e.value for e in read if e.kind == kind] for kind in ("parameter", "buffer", "batch")}
    stored = [value for value in inputs["buffer"] if value.name in persistent]
    kept = [value for value in inputs["buffer"] if value.name not in persistent]
    operators = {instr.op for step in steps for program in (step.whole, step.program) for instr in program.instrs()}
    manifest = Manifest(
        format=FORMAT,
        versions=_versions(model),
        source=source,
        compared="nothing: it was not asked for",
        config=config,
        sequence_dims=sequence_dims,
        batch=specs(inputs["batch"], vocabularies(whole)),
        constants=constants_of(batch),
        parameters=specs([*inputs["parameter"], *stored, *_unused(model, inputs)]),
        buffers=specs(kept),
        aliases=_aliases(model),
        trainable=tuple(label.removeprefix("grad.") for label, _ in whole.sections[0].gives if label != "loss"),
        operators=_schemas(operators - set(STRUCTURE)),
        programs={name: _facts(step, config) for name, step in zip((STEP, EVALUATE), steps)},
        files={},
    )
    return Artifact(
        manifest,
        compiled.whole,
        compiled.program,
        None if evaluation is None else Programs(evaluation.whole, evaluation.program),
        _recipe(model, manifest),
        {value.name: buffers[value.name] for value in kept},
        None,
    )


@dataclass(frozen=True)
class Captured:
    """The unsharded step of a model, the constants it reads by name, and the graph it was made of."""

    whole: Program
    constants: dict[str, Tensor]
    joint: Joint


def capture_model(subject: Subject) -> Captured:
    """Capture the step of a model. Raises BuildError."""
    joint = capture(subject)
    whole, constants = canonical_program(joint)
    _refuse_operators(whole)
    return Captured(whole, constants, joint)


def _evaluation(
    subject: Subject, step: Captured, known, sequence_dims: dict[str, int], config: BuildConfig, watch: Watch
) -> tuple[Step, dict[str, Tensor]]:
    """The program that gives the loss in eval mode, and the constants that it has beside the step's."""
    with in_eval_mode():
        whole, constants = capture_evaluation(subject, step.joint, step.whole, known)
        _refuse_operators(whole)
        shown = lambda name, program: watch(f"evaluate.{name}", program)  # noqa: E731
        return compile_evaluation(whole, sequence_dims, config, shown), constants


def _schemas(operators: set[str]) -> dict[str, str]:
    """What artifacts record of operators, by name."""
    signatures = {}
    for op in sorted(operators):
        signature = schema(op)
        assert signature is not None, "others were refused as they were captured"
        signatures[op] = signature
    return signatures


def _facts(compiled: Step, config: BuildConfig) -> ProgramFacts:
    """What a manifest says of a program: what it costs, how its calls were placed, what is computed on every rank."""
    cuts, decisions = written(compiled.decisions)
    return ProgramFacts(costs(compiled.program, config.target), compiled.fallbacks, cuts, decisions)


def model_values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once."""
    persistent = set(_state_names(model))
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return values | {name: as_real(buffer) for name, buffer in model.named_buffers() if name in persistent}


def _copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def _refuse_operators(whole: Program) -> None:
    problems: dict[str, Problem] = {}
    for instr in whole.instrs():
        if schema(instr.op) is None and instr.op not in problems:
            what = f"{instr.op} may not be part of a program"
            problems[instr.op] = Problem("operator-refused", what, instr.where.source,
                                         "it writes to an operand, draws random numbers, or is no operator of ATen",
                                         "use another operator")  # fmt: skip
    if problems:
        raise BuildError(*problems.values())


def _state_names(model: nn.Module) -> list[str]:
    return list(model.state_dict(keep_vars=True))


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of `state_dict` that are further names of a tensor stored under its first."""
    first: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        first.setdefault(id(tensor), name)
    state = model.state_dict(keep_vars=True)
    return {name: first[id(tensor)] for name, tensor in state.items() if first[id(tensor)] != name}


def _unused(model: nn.Module, inputs: dict[str, list[Value]]) -> list[Value]:
    """Persistent buffers that the step does not read: part of the state all the same."""
    read = {value.name for value in inputs["buffer"]}
    state, buffers = set(_state_names(model)), dict(model.named_buffers())
    unread = {name: as_real(buffer) for name, buffer in buffers.items() if name in state and name not in read}
    wrong = [unsupported(f"buffer {name!r} is {buffer.dtype}", "build_model")
             for name, buffer in unread.items() if buffer.dtype not in DTYPES]  # fmt: skip
    if wrong:
        raise BuildError(*wrong)
    return [Value(name, DTYPES[buffer.dtype], tuple(buffer.shape)) for name, buffer in unread.items()]


def _recipe(model: nn.Module, manifest: Manifest) -> Recipe:
    """How a checkpoint of the model is laid out; transformers is asked where the model can come from it."""
    if "transformers.modeling_utils" not in sys.modules:
        return Recipe()
    from autosp_aot.export.hugging_face import recipe_of

    return recipe_of(model, manifest.parameters, manifest.aliases)


def _versions(model: nn.Module) -> dict[str, str]:
    """Versions of torch, of this package, and of every installed package that a class of the model comes from."""
    owners = importlib.metadata.packages_distributions()
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()}
    packages = sorted({owners[root][0] for root in roots if root in owners} - {"torch"})
    own = {"autosp-aot": __version__, "torch": torch.__version__.partition("+")[0]}
    return own | {name: importlib.metadata.version(name) for name in packages}
