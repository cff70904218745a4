"""`autosp-aot check --numeric`: all ranks' programs against the unsharded program, on random inputs, in one process.

    whole.program   --one rank-->   loss, gradients    reference
    body.*.program  --lockstep-->   loss, gradients of every rank: |g - ref| / max(|ref|, 1e-4 r)
    evaluate.*      the same of the evaluation's loss

r is the root mean square of all gradient norms: some gradients are zero in exact arithmetic, and consist of rounding.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from autosp_aot.artifact.manifest import BUFFERS, STEP, Manifest
from autosp_aot.artifact.read import read_manifest, read_rank, read_tensors, read_whole
from autosp_aot.commands.check.random_inputs import made_up
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.program import ITEMSIZE, Dtype, Instr, Program, Ref, map_args
from autosp_aot.ir.structure.table import to_host
from autosp_aot.memory.costs import costs
from autosp_aot.ops.uniform import UNIFORM
from autosp_aot.passes.release import release
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.runtime.simulate import simulate
from autosp_aot.runtime.weights_in import read_weights
from autosp_aot.targets.table import CPU

MEMORY_LIMIT_BYTES = 8 * 2**30
EXACT, CASTS, SINGLE = 1e-12, 1e-6, 1e-5
# What each dtype is replaced by to see past its rounding; half dtypes first, then fp32.
WIDER = ({"bf16": "f32", "f16": "f32"}, {"f32": "f64"})
GRAD_LOSS = 0.75  # not 1: a program that leaves it out is to be seen

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far the ranks are from the unsharded program: the worst of all ranks, by `loss` and `grad.<parameter>`."""

    errors: dict[str, float]
    limit: float

    @property
    def beyond(self) -> dict[str, float]:
        """The errors that are not within the limit, worst first."""
        found = {label: error for label, error in self.errors.items() if not error <= self.limit}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def check_numeric(path: str | Path) -> list[str]:
    """Run an artifact's programs against its unsharded step; what was compared, a line each. Raises ArtifactError.

    Parameters and the batch are made up; buffers are the artifact's. Programs with bf16 or fp16 run a second time with
    fp32 in their place, those in fp32 with fp64, where a small mistake is not taken for rounding. `numeric-too-large`
    where it would need more than 8 GiB, `numbers-differ` with the results that differ.
    """
    manifest = read_manifest(path)
    return [line for kind in manifest.programs for line in _check_program(path, manifest, kind)]


def _check_program(path: str | Path, manifest: Manifest, kind: str) -> list[str]:
    whole = read_whole(path, manifest, kind)
    refuse_large(manifest, whole)
    programs = [read_rank(path, manifest, rank, kind) for rank in range(manifest.ranks)]
    stored = read_tensors(path, manifest, BUFFERS)
    read = {entry.value.name for entry in whole.inputs if entry.kind == "buffer"}
    if not read <= set(stored):
        weights = read_weights(Path(path), manifest, None)
        stored |= {name: weights[name] for name in read - set(stored)}
    inputs = stored | made_up(whole)
    name = "numbers" if kind == STEP else "evaluation"
    found = {name: difference(whole, programs, inputs)}
    wider = _wider(whole)
    if wider:
        wide = [widened(program, wider) for program in (whole, *programs)]
        found["in fp" + wider[min(wider)][1:]] = difference(wide[0], wide[1:], _wide(inputs, wider), SINGLE)
    for compared in found.values():
        if compared.beyond:
            raise _differ(compared, "step" if kind == STEP else "evaluation")
    return [
        f"{said:<12}{_what(compared)} by {max(compared.errors.values()):.0e}, at most {compared.limit:.0e}"
        for said, compared in found.items()
    ]


def _what(compared: Difference) -> str:
    gradients = len(compared.errors) - 1
    return f"loss and {gradients} gradients differ" if gradients else "loss differs"


def difference(whole: Program, programs: list[Program], inputs: Mapping[str, Tensor], single=0.0) -> Difference:
    """Run the unsharded step and all ranks (`programs[r]` is rank r's) on the same inputs.

    The limit is 1e-12 where all is fp64, and 1e-6 where an fp64 step casts to fp32 inside. Else it is twice the whole
    step's own difference from itself in the next wider dtype, which then is the reference; in fp32 at least 1e-5, or
    just `single` where that is given. (Gradients that are zero in exact arithmetic consist of rounding alone.)
    """
    whole, inputs, floats, wider = release(whole), dict(inputs), _floats(whole), _wider(whole)
    results = _run(programs, inputs)
    reference = _run([whole], inputs)[0]
    if not wider:
        return Difference(_errors(reference, results), EXACT if floats == {"f64"} else CASTS)
    if single:
        return Difference(_errors(reference, results), single)
    exact = _run([widened(whole, wider)], _wide(inputs, wider))[0]
    limit = 2 * max(_errors(exact, [reference]).values())
    return Difference(_errors(exact, results), max(limit, SINGLE) if "f32" in wider else limit)


def _wider(program: Program) -> dict[str, str]:
    """What the narrowest floating dtype of a program is replaced by; nothing where some value is fp64."""
    floats = _floats(program)
    return next((wider for wider in WIDER if floats & set(wider) and "f64" not in floats), {})


def _floats(program: Program) -> set[str]:
    return {value.dtype for value in program.values().values() if DTYPES[value.dtype].is_floating_point}


def _wide(inputs: Mapping[str, Tensor], wider: Mapping[str, str]) -> dict[str, Tensor]:
    dtypes = {DTYPES[narrow]: DTYPES[wide] for narrow, wide in wider.items()}
    return {name: tensor.to(dtypes.get(tensor.dtype, tensor.dtype)) for name, tensor in inputs.items()}


def _run(programs: list[Program], inputs: dict[str, Tensor]) -> list[Results]:
    loss = programs[0].values()[dict(programs[0].sections[0].gives)["loss"]]
    return simulate(programs, inputs, torch.tensor(GRAD_LOSS, dtype=DTYPES[loss.dtype]), copying=True)


def _errors(reference: Results, results: Iterable[Results]) -> dict[str, float]:
    """The worst error of any rank, by label; what is not a number is infinitely wrong."""
    wanted = {label: tensor.double() for label, tensor in reference.items()}
    if not all(tensor.isfinite().all() for tensor in wanted.values()):
        raise ArtifactError(Problem(
            "numeric-not-finite", "the unsharded step itself gives no finite numbers for random inputs",
            why="there is nothing to compare with", fix="check without --numeric proves the artifact"))  # fmt: skip
    norms = [tensor.norm() for label, tensor in wanted.items() if label != "loss"]
    floor = 1e-4 * torch.stack(norms).square().mean().sqrt() if norms else torch.tensor(0.0)
    worst = dict.fromkeys(wanted, 0.0)
    for result in results:
        assert result.keys() == wanted.keys(), "a rank gives other results"
        for label, tensor in wanted.items():
            scale = tensor.norm() if label == "loss" else torch.maximum(tensor.norm(), floor)
            error = float((result[label].double() - tensor).norm() / scale)
            worst[label] = max(worst[label], error if error == error else float("inf"))
    return worst


def widened(program: Program, wider: Mapping[str, str]) -> Program:
    """The program with wider dtypes in place of others; what is drawn is drawn as before and then widened.

    Places in the pool of host memory are as much further apart.
    """
    factor = max(ITEMSIZE[wide] // ITEMSIZE[narrow] for narrow, wide in wider.items())
    dtype = lambda name: wider.get(name, name)  # noqa: E731
    leaf = lambda arg: Dtype(dtype(arg.name)) if isinstance(arg, Dtype) else dtype(arg)  # noqa: E731
    value = lambda v: v and replace(v, dtype=dtype(v.dtype))  # noqa: E731

    def again(instr: Instr) -> list[Instr]:
        wide = tuple(map(value, instr.outs))
        if wide != instr.outs and instr.op == UNIFORM.name:
            (out,) = instr.values()
            drawn = replace(out, name=f"{out.name}.drawn")
            cast = Instr(wide, "aten._to_copy.default", (Ref(drawn.name),), (("dtype", Dtype(dtype(out.dtype))),))
            return [replace(instr, outs=(drawn,)), cast]
        if to_host(instr.op):
            stored, place = instr.args
            instr = replace(instr, args=(stored, place * factor))
        body = instr.body and replace(instr.body, instrs=tuple(i for inner in instr.body.instrs for i in again(inner)))
        instr = replace(instr, body=body)
        return [replace(instr, outs=wide, args=map_args(instr.args, leaf), kwargs=map_args(instr.kwargs, leaf))]

    return replace(
        program,
        inputs=tuple(replace(entry, value=value(entry.value)) for entry in program.inputs),
        sections=tuple(replace(s, instrs=tuple(i for old in s.instrs for i in again(old))) for s in program.sections),
    )


def refuse_large(manifest: Manifest, whole: Program) -> None:
    """Raise ArtifactError where the inputs, and everybody's activations and gradients, do not fit."""
    inputs = sum(entry.value.nbytes() for entry in whole.inputs)
    alone = costs(release(whole), CPU.name, copying=True).peak_bytes
    together = manifest.step.costs.peak_bytes * manifest.ranks
    needed = (inputs + max(alone, together)) * (2 if _wider(whole) else 1)
    if needed > MEMORY_LIMIT_BYTES:
        gib = lambda count: f"{count / 2**30:.1f} GiB"  # noqa: E731
        raise ArtifactError(Problem(
            "numeric-too-large", f"running {manifest.ranks} ranks in one process takes {gib(needed)}",
            why=f"inputs {gib(inputs)}, all ranks together {gib(together)}, the unsharded step {gib(alone)}; "
            f"twice that in wider dtypes where they are not fp64; the limit is {gib(MEMORY_LIMIT_BYTES)}",
            fix="build the model for the same --sp with a smaller --seq, narrower or with fewer layers, and check that;"
            " check without --numeric proves this artifact"))  # fmt: skip


def _differ(found: Difference, whole: str) -> ArtifactError:
    worst = [f"{label}: {error:.1e}" for label, error in found.beyond.items()][:5]
    return ArtifactError(Problem(
        "numbers-differ", f"{len(found.beyond)} of {len(found.errors)} results differ from the unsharded {whole}",
        why=f"relative differences, at most {found.limit:.0e} is rounding\n" + "\n".join(worst),
        fix="build the artifact again"))  # fmt: skip
