"""The command line: read flags, call one function, print, exit code. stdout is data, diagnostics go to stderr.

Commands import what needs torch themselves, so that `--help` is immediate.
"""

import json
from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from autosp_aot.artifact.config import OFFLOAD, RECOMPUTE, checked_config
from autosp_aot.commands.option_types import SIZE, Units, pairs_to_options, ranks, tiles
from autosp_aot.errors import AutospError
from autosp_aot.ir.units import length_of
from autosp_aot.memory.training_state import OPTIMIZERS
from autosp_aot.targets.devices import DEVICES
from autosp_aot.targets.table import TARGETS
from autosp_aot.training.learning_rate import SCHEDULES, Schedule

PATH = click.Path(path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.FloatRange(min=0)
IN_DEEPSPEED = ("accumulate", "lr", "warmup", "schedule", "min_lr", "weight_decay", "clip", "zero", "dump")


class Commands(click.Group):
    """The one place where an AutospError becomes text and an exit code; of `diff` all trouble is 2."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except AutospError as error:
            click.echo(str(error), err=True)
            ctx.exit(2 if ctx.invoked_subcommand == "diff" else error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="autosp-aot")
def main() -> None:
    """Compile a training model into programs for ranks that share every sequence, and train with them.

    Exit codes: 0 done, 2 the model or the command is refused, 3 the artifact is refused or does not fit.
    """


STEP_OPTIONS = (
    click.option("--batch", type=POSITIVE, default=1, help="Sequences in a batch."),
    click.option("--set", "options", metavar="KEY=VALUE", multiple=True, callback=pairs_to_options,
                 help="An option of build_model; may be repeated."),
    click.option("--tile", type=Units("auto|off|n", tiles), default="auto",
                 help="Compute loss and MLP in slices of the sequence: as many as pay (auto), none (off), or N."),
    click.option("--offload", type=click.Choice(OFFLOAD), default="off",
                 help="Saved values go to host memory: none (off), those that the budget needs (auto), all (host)."),
)  # fmt: skip


def step_options(command: Callable) -> Callable:
    """The options that `build` and `plan` share."""
    for option in reversed(STEP_OPTIONS):
        command = option(command)
    return command


@main.command()
@click.argument("model", metavar="MODEL.py", type=EXISTING)
@click.option("--sp", type=POSITIVE, required=True, help="Ranks that share every sequence.")
@click.option("--seq", type=Units("length", length_of), default=4096, help="Tokens of a sequence; 128k is 131072.")
@step_options
@click.option("--recompute", type=click.Choice(RECOMPUTE),
              help="What backward recomputes. none: nothing. sac: all but attention. full: attention too. "
                   "auto: what the budget needs.  [default: auto with --memory-budget, else sac]")
@click.option("--memory-budget", type=SIZE, help="Limit for parameters, gradients, activations and workspace of a "
              "rank, as 70GiB, excluding optimizer state.")
@click.option("-o", "--out", metavar="DIR", type=PATH, help="Output folder; default ./<model file stem>.sp<P>.")
@click.option("--target", type=click.Choice(list(dict.fromkeys((*TARGETS, *DEVICES)))),
              help="Target: a kind of device, or a device, whose rates say what is worth recomputing.  "
                   "[default: the kind that torch finds here]")
@click.option("--strict", is_flag=True, help="Refuse operators without a rule instead of computing them on every rank.")
@click.option("--seed", type=int, default=0, help="Seed of the initial weights.")
@click.option("--no-evaluation", is_flag=True, help="Build no program for the loss in eval mode.")
@click.option("--no-weights", is_flag=True, help="Store no initial weights.")
@click.option("--no-eager-check", is_flag=True,
              help="Do not compare the build with steps of the model itself, where that takes seconds.")
@click.option("--dump", metavar="DIR", type=PATH,
              help="Write the program after each pass into a new folder.")  # fmt: skip
def build(model: Path, sp: int, seq: int, batch: int, options: dict, tile: str | int, offload: str,
          recompute: str | None, memory_budget: int | None, out: Path | None, target: str | None,
          strict: bool, seed: int, no_evaluation: bool, no_weights: bool, no_eager_check: bool,
          dump: Path | None) -> None:  # fmt: skip
    """Build an artifact from a model file; prints its path.

    MODEL.py defines build_model(**options) -> nn.Module, whose forward returns the loss, and
    example_batch(batch_size, seq_len) -> dict of the keyword inputs of forward.
    """
    from autosp_aot.artifact.read import read_manifest
    from autosp_aot.artifact.tables import facts
    from autosp_aot.commands.build.builder import build_file
    from autosp_aot.runtime.comm import present_target

    target = target or present_target()
    config = checked_config(sp, target, recompute, memory_budget, tile, offload, strict, not no_evaluation)
    path = build_file(model, config, seq, batch, options, out, seed, not no_weights, dump, not no_eager_check)
    manifest = read_manifest(path)
    for name, value in facts(manifest):
        click.echo(f"{name + ':':<36}{value}", err=True)
    if not manifest.has_weights:
        click.echo("no weights stored: run needs --init-from", err=True)
    click.echo(path)


@main.command()
@click.argument("model", metavar="MODEL.py", type=EXISTING)
@click.option("--sp", "sps", metavar="N,...", type=Units("numbers", ranks, many=True), required=True,
              help="Numbers of ranks that share every sequence.")
@click.option("--seq", "seqs", metavar="LENGTH,...", type=Units("lengths", length_of, many=True), required=True,
              help="Tokens of a sequence; 128k is 131072.")
@step_options
@click.option("--recompute", type=click.Choice(RECOMPUTE), default="auto", help="As for build; auto: what fits.")
@click.option("--target", type=click.Choice(list(DEVICES)), default="a100-80", help="Device model.")
@click.option("--memory", type=SIZE, help="Memory of a device, as 80GiB.  [default: the target's]")
@click.option("--reserve", type=SIZE, default="3GiB", help="Memory reserved for driver, allocator and all else.")
@click.option("--dp", type=POSITIVE, default=1, help="Replicas: groups of ranks, each with its own sequences.")
@click.option("--zero", type=click.Choice(["0", "1"]), default="1",
              help="1: optimizer state is sharded over all dp x sp ranks. 0: it is replicated.")
@click.option("--accumulate", type=POSITIVE, default=1, help="Micro-batches of each replica in a step.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw",
              help="adamw: fp32 moments, and fp32 masters of narrower parameters. host: that, in host memory.")
@click.option("--max-seq", "search", is_flag=True,
              help="For each --sp find the longest sequence that fits, to within 1/32.")
@click.option("--html", metavar="FILE", type=OUTPUT_FILE, help="Write peak against length and ranks as an HTML page.")
@click.option("--jobs", type=POSITIVE, default=2, help="Processes that plan lengths in parallel.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")  # fmt: skip
def plan(model: Path, sps: tuple[int, ...], seqs: tuple[int, ...], batch: int, options: dict, tile: str | int,
         offload: str, recompute: str, target: str, memory: int | None, reserve: int, dp: int, zero: str,
         accumulate: int, optimizer: str, search: bool, html: Path | None, jobs: int,
         as_json: bool) -> None:  # fmt: skip
    """Predict what a step takes on a rank, and what fits; writes no artifact.

    For every --sp and every --seq: the peak and its breakdown, bytes moved, recomputed FLOPs. Step times come from data
    sheets and have not been measured.
    """
    from autosp_aot.commands.plan.planning import Asked, Setting, sweep
    from autosp_aot.commands.plan.report import plan_json, plan_page, plan_text

    device = DEVICES[target]
    memory = device.memory_bytes if memory is None else memory
    if reserve >= memory:
        raise click.UsageError("--reserve leaves nothing of --memory")
    setting = Setting(device, memory, reserve, dp, int(zero), optimizer, recompute, tile, offload, accumulate)
    points = sweep(Asked(model, batch, options, setting), sps, seqs, search, jobs)
    if html is not None:
        html.write_text(plan_page(points, setting), encoding="utf-8")
    click.echo(json.dumps(plan_json(points)) if as_json else plan_text(points, setting))


@main.command()
@click.argument("artifact", metavar="DIR", type=PATH)
@click.option("--steps", type=POSITIVE, default=10, help="Steps to train.")
@click.option("--dp", type=POSITIVE, default=1, help="Replicas: groups of ranks, each with its own sequences.")
@click.option("--accumulate", type=POSITIVE, default=1, help="Micro-batches of each replica in a step.")
@click.option("--data", type=PATH, help="UTF-8 text or .npy of token ids, file or folder; default random tokens.")
@click.option("--digest", metavar="HASH", help="Refuse any artifact but the one of this digest (check --digest).")
@click.option("--init-from", type=PATH, help="Weights: a Hugging Face folder, or a safetensors file.")
@click.option("--lr", type=NOT_NEGATIVE, default=1e-3, help="AdamW's learning rate, the maximum of a schedule.")
@click.option("--warmup", type=click.IntRange(min=0), default=0, help="Linear warmup steps.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="constant", help="LR schedule after warmup.")
@click.option("--min-lr", type=NOT_NEGATIVE, default=0.0, help="Final learning rate of cosine and linear.")
@click.option("--weight-decay", type=NOT_NEGATIVE, default=0.01, help="Of all parameters, as in torch's AdamW.")
@click.option("--clip", type=click.FloatRange(min=0, min_open=True),
              help="Max gradient norm, over all parameters.  [default: no clipping]")
@click.option("--zero", type=click.Choice(["0", "1"]), default="0",
              help="1: optimizer state is sharded over all dp x sp ranks. 0: it is replicated.")
@click.option("--deepspeed", metavar="FILE.json", type=PATH,
              help="Train with DeepSpeed by this config: its optimizer, ZeRO, accumulation and clipping.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the data order and of dropout.")
@click.option("--eval-every", metavar="N", type=POSITIVE, help="After every N steps, print the loss of --eval-data.")
@click.option("--eval-data", type=PATH, help="As --data, or as --batch-file where it ends in .safetensors.")
@click.option("--eval-batches", type=POSITIVE, default=8, help="Batches of --eval-data, the same ones each time.")
@click.option("--save", metavar="DIR", type=PATH, help="Write the weights at the end, as from_pretrained reads them.")
@click.option("--metrics", metavar="FILE.jsonl", type=OUTPUT_FILE, help="Write a JSON line a step.")
@click.option("--batch-file", metavar="FILE.safetensors", type=PATH,
              help="Train on this batch, tensors by input name: one batch, or the rows of all batches of a step.")
@click.option("--dump", metavar="FILE.safetensors", type=OUTPUT_FILE,
              help="Write loss and gradients of the first step, and stop.")  # fmt: skip
@click.pass_context
def run(ctx: click.Context, artifact: Path, data: Path | None, batch_file: Path | None, eval_data: Path | None,
        deepspeed: Path | None, zero: str, lr: float, schedule: str, warmup: int, min_lr: float,
        **options) -> None:  # fmt: skip
    """Train with an artifact: AdamW, or what a DeepSpeed config says; a line a step.

    Starts dp x sp processes on this machine, or joins those that torchrun started. A step is `--dp` x `--accumulate`
    batches of the shape that was built for; its gradient is that of the mean of their losses. The artifact is proved
    first, unless it was on this machine.
    """
    from autosp_aot.training import launch
    from autosp_aot.training.loop import Training

    if data is not None and batch_file is not None:
        raise click.UsageError("--data and --batch-file exclude each other")
    said = [option for option in IN_DEEPSPEED if ctx.get_parameter_source(option) is not ParameterSource.DEFAULT]
    if deepspeed is not None and said:
        names = ", ".join(f"--{option.replace('_', '-')}" for option in said)
        raise click.UsageError(f"{names} and --deepspeed exclude each other: the config says it, or nobody")
    if (options["eval_every"] is None) != (eval_data is None):
        raise click.UsageError("--eval-every and --eval-data go together")
    if options["save"] is not None and options["dump"] is not None:
        raise click.UsageError("--dump stops before there is anything to --save")
    if min_lr > lr:
        raise click.UsageError("--min-lr is above --lr")
    if min_lr and schedule == "constant":
        raise click.UsageError("--min-lr is for --schedule cosine or linear")
    rates = Schedule(lr, schedule, options["steps"], warmup, min_lr)
    training = Training(artifact, schedule=rates, zero=int(zero), **options)
    launch.run(training, data, batch_file, eval_data, deepspeed)


@main.command()
@click.argument("artifact", metavar="DIR", type=PATH)
@click.option("--rank", type=click.IntRange(min=0), default=0, help="Rank whose program is printed.")
@click.option("--evaluation", is_flag=True, help="Print the program for the loss in eval mode.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(artifact: Path, rank: int, evaluation: bool, as_json: bool) -> None:
    """Print what an artifact moves and saves, and a rank's program with its numbers filled in."""
    from autosp_aot.commands.show import show as show_text
    from autosp_aot.commands.show import show_json

    if as_json:
        click.echo(json.dumps(show_json(artifact, rank, evaluation)))
    else:
        click.echo(show_text(artifact, rank, evaluation))


@main.command()
@click.argument("artifact", metavar="DIR", type=PATH)
@click.option("--digest", is_flag=True, help="Print the artifact's digest alone, for run --digest.")
@click.option("--numeric", is_flag=True, help="Then compare all ranks with the unsharded step, on random inputs.")
@click.option("--eager", metavar="MODEL.py", type=EXISTING,
              help="Then compare SGD steps of all ranks, in one process, with those of the model itself.")
@click.option("--steps", type=POSITIVE, default=2, help="Steps of --eager.")
@click.option("--set", "options", metavar="KEY=VALUE", multiple=True, callback=pairs_to_options,
              help="An option of build_model, for --eager; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")  # fmt: skip
def check(artifact: Path, digest: bool, numeric: bool, eager: Path | None, steps: int, options: dict,
          as_json: bool) -> None:  # fmt: skip
    """Prove the per-rank programs equivalent to the unsharded step, without running them.

    What is proved follows from the artifact alone. Whether it is the one that you mean (its weights, its model) its
    digest says.
    """
    from autosp_aot.commands.check.eager import check_eager
    from autosp_aot.commands.check.numeric import check_numeric
    from autosp_aot.commands.check.proof import check as check_artifact
    from autosp_aot.runtime.proved import digest_of

    lines = check_artifact(artifact)
    if numeric:
        lines += check_numeric(artifact)
    if eager is not None:
        lines += check_eager(artifact, eager, options, steps)
    if digest:
        lines = [digest_of(artifact)]
    click.echo(json.dumps(lines) if as_json else "\n".join(lines))


@main.command()
@click.argument("artifact", metavar="DIR", type=PATH)
@click.option("--format", "kind", type=click.Choice(["onnx", "pt2"]), required=True,
              help="onnx: a graph to look at. pt2: an exported program that torch.export.load reads.")
@click.option("--rank", type=click.IntRange(min=0), default=0, help="Rank whose program is written.")
@click.option("--evaluation", is_flag=True, help="Write the program for the loss in eval mode.")
@click.option("-o", "--out", metavar="FILE", type=OUTPUT_FILE,
              help="Output file; default <artifact>.rank<r>.<format> beside it.")  # fmt: skip
def export(artifact: Path, kind: str, rank: int, evaluation: bool, out: Path | None) -> None:
    """Write a rank's program for other tools; prints the path."""
    from autosp_aot.commands.interchange.output import export_rank
    from autosp_aot.errors import need_package

    if kind == "onnx":
        need_package("onnx", "--format onnx")
        from autosp_aot.commands.interchange.onnx_file import write_onnx as write
    else:
        from autosp_aot.commands.interchange.pt2_file import write_pt2 as write
    click.echo(export_rank(artifact, rank, evaluation, out, kind, write))


@main.command()
@click.argument("artifact", metavar="DIR", type=PATH)
@click.argument("value", metavar="VALUE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(artifact: Path, value: str, as_json: bool) -> None:
    """Say why a value is placed, moved, saved, recomputed or gathered.

    VALUE is its name as show prints it, or a unique beginning or end of it.
    """
    from autosp_aot.commands.explain import explain as explain_value

    found = explain_value(artifact, value)
    click.echo(json.dumps(found.as_json) if as_json else found.text)


@main.command()
@click.argument("a", metavar="DIR_A", type=PATH)
@click.argument("b", metavar="DIR_B", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diff(ctx: click.Context, a: Path, b: Path, as_json: bool) -> None:
    """Compare two artifacts: what changed in meaning, then the text. Exit code 0 same, 1 different, 2 trouble."""
    from autosp_aot.commands.diff import compare

    comparison = compare(a, b)
    click.echo(json.dumps(comparison.as_json) if as_json else comparison.text)
    ctx.exit(0 if comparison.same else 1)
