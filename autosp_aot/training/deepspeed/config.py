"""A DeepSpeed config against an artifact: the same sizes and dtypes, and nothing that would not be applied.

    sequence_parallel_size, data_parallel_size      the artifact's ranks, and how many groups of them there are
    train_micro_batch_size_per_gpu                  rows of the batch that a group of ranks shares
    bf16, fp16                                      the dtype of all floating parameters and buffers
    compile: deepcompile, passes: autosp            done when the artifact was built
    "auto"                                          the artifact's number, where it is one of the artifact's
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from autosp_aot.artifact.manifest import Manifest
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.operators import DTYPES

BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
HALF = {"bf16": "bf16", "fp16": "f16"}
# What turns on by an entry `enabled` and changes the model, its inputs or its autocast.
CHANGES_THE_MODEL = (
    "amp", "torch_autocast", "hybrid_engine", "progressive_layer_drop", "curriculum_learning", "eigenvalue",
    "quantize_training",
)  # fmt: skip
SECTIONS_THAT_CHANGE_IT = (
    "compression_training", "sparse_attention", "pipeline", "expert_parallel", "weight_quantization"
)  # fmt: skip
CHECKED_SECTIONS = (*HALF, "zero_optimization", "compile", "tensor_parallel", "data_efficiency", "data_types")
STAGES = (0, 1, 2)
AUTOSP = "autosp"


def read_config(path: Path) -> dict:
    """A DeepSpeed config file. Raises ArtifactError `deepspeed-config-unreadable`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        what = f"{path} is no DeepSpeed config"
        raise ArtifactError(Problem("deepspeed-config-unreadable", what, str(path), str(error),
                                    "give the JSON file that deepspeed.initialize takes")) from error  # fmt: skip
    return found


def _once(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"it says {', '.join(twice)} more than once")
    return dict(pairs)


def checked_config(config: dict, manifest: Manifest, replicas: int) -> dict:
    """The config for DeepSpeed of `replicas` groups of ranks, with all its batch sizes; the one given is left alone.

    Raises ArtifactError with a problem for each entry that disagrees with the artifact or could not be applied.
    """
    problems = list(_check_sections(config))
    if not problems:
        applied = _filled(copy.deepcopy(config), manifest, replicas)
        problems = [problem for check in CHECKS for problem in check(applied, manifest, replicas)]
    if problems:
        raise ArtifactError(*problems)
    for key in ("compile", "sequence_parallel_size", "data_parallel_size"):
        applied.pop(key, None)
    applied.setdefault("communication_data_type", "fp32")
    # DeepSpeed's default is fp32 whatever the other says, and with sequence parallelism this is the one it follows.
    applied.setdefault("seq_parallel_communication_data_type", applied["communication_data_type"])
    return applied


def check_samples(count: int, config: dict, replicas: int) -> None:
    """Raise ArtifactError where DeepSpeed's loader would end an epoch of `count` samples with a part of a batch."""
    rows = config[BATCH_SIZES[1]]
    left = math.ceil(count / replicas) % rows
    if left and not config.get("dataloader_drop_last"):
        what = f"the last batch of an epoch would have {left} rows, the artifact says {rows}"
        raise ArtifactError(Problem("deepspeed-config", what, "training_data",
                                    f"{count} samples are shared out over {replicas} groups of ranks",
                                    'say "dataloader_drop_last": true in the config'))  # fmt: skip


def _check_sections(config: dict) -> Iterator[Problem]:
    for key in CHECKED_SECTIONS:
        if not isinstance(config.get(key, {}), dict):
            yield Problem("deepspeed-config", f"{key} is {config[key]}", "the DeepSpeed config",
                          "it is a section, an object", f'give "{key}": {{...}}, or leave it out')  # fmt: skip


def _filled(config: dict, manifest: Manifest, replicas: int) -> dict:
    """The config with the artifact's numbers where it says "auto" or nothing."""
    if "bfloat16" in config:
        config.setdefault("bf16", config.pop("bfloat16"))  # its name of old, which DeepSpeed takes too
    if config.get("sequence_parallel_size") == "auto":
        config["sequence_parallel_size"] = manifest.ranks
    for section, dtype in HALF.items():
        if config.get(section, {}).get("enabled") == "auto":
            config[section]["enabled"] = dtype in _dtypes(manifest)
    for key in BATCH_SIZES:
        if config.get(key) in ("auto", None):
            config.pop(key, None)
    whole, micro, steps = BATCH_SIZES
    config.setdefault(micro, _rows(manifest))
    at_once = _rows(manifest) * replicas
    config.setdefault(steps, max(1, config[whole] // at_once) if _counts(config.get(whole)) else 1)
    config.setdefault(whole, at_once * config[steps])
    return config


def _counts(*numbers: object) -> bool:
    return all(isinstance(n, int) and n > 0 for n in numbers)


def _rows(manifest: Manifest) -> int:
    """Rows of a batch: dim 0 of the inputs that have a sequence in another dim."""
    return max((spec.shape[0] for spec in manifest.batch if manifest.sequence_dims.get(spec.name, 0)), default=1)


def _dtypes(manifest: Manifest) -> list[str]:
    """The floating dtypes of parameters and persistent buffers."""
    return sorted({spec.dtype for spec in manifest.parameters if DTYPES[spec.dtype].is_floating_point})


def _check_ranks(config: dict, manifest: Manifest, replicas: int) -> Iterator[Problem]:
    for key, found in (("sequence_parallel_size", manifest.ranks), ("data_parallel_size", replicas)):
        if config.get(key, found) != found:
            yield _disagrees(key, config[key], found, "each of them runs a program of its own")


def _check_dtype(config: dict, manifest: Manifest, replicas: int) -> Iterator[Problem]:
    on = [section for section in HALF if config.get(section, {}).get("enabled")]
    found = _dtypes(manifest)
    wanted = [HALF[section] for section in on]
    why = "DeepSpeed would cast parameters, and programs are built for the dtypes they have"
    if wanted and found != wanted:
        yield _disagrees(f"{' and '.join(on)}: enabled", "true", " and ".join(found), why)
    if not wanted and set(found) - {"f32"}:
        yield _disagrees("bf16, fp16: enabled", "false", " and ".join(found), "DeepSpeed would take them for fp32")


def _check_batch(config: dict, manifest: Manifest, replicas: int) -> Iterator[Problem]:
    rows, (whole, micro, steps) = _rows(manifest), (config[key] for key in BATCH_SIZES)
    if micro != rows:
        yield _disagrees(BATCH_SIZES[1], micro, rows, "it is what a group of ranks shares at a time")
    elif not _counts(steps, whole) or whole != rows * steps * replicas:
        why = f"{rows} rows x {steps} accumulation steps x {replicas} groups of ranks"
        wanted = rows * steps * replicas if _counts(steps) else "a product with a number of accumulation steps"
        yield _disagrees(BATCH_SIZES[0], whole, wanted, why)


def _check_compile(config: dict, manifest: Manifest, replicas: int) -> Iterator[Problem]:
    section = config.get("compile", {})
    passes = section.get("passes") or []
    if section.get("deepcompile") and passes != [AUTOSP]:
        yield _not_applied(f"compile: passes {passes or 'not given'}", "an artifact is compiled already, with what the "
                           "pass autosp does", 'give "passes": ["autosp"], or leave compile out')  # fmt: skip


def _check_features(config: dict, manifest: Manifest, replicas: int) -> Iterator[Problem]:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in STAGES:
        yield _not_applied(f"zero_optimization: stage {stage}", "programs need whole parameters, and stage 3 keeps "
                           "parts", "use stage 0, 1 or 2")  # fmt: skip
    if config.get("fp16", {}).get("enabled") and stage == 0:
        yield _not_applied("fp16: loss_scale", "without ZeRO, DeepSpeed's engine.backward does not multiply the loss "
                           "by the scale that its optimizer divides by", "use stage 1 or 2, or bf16")  # fmt: skip
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        yield _not_applied("tensor_parallel: autotp_size", "programs need whole parameters", "leave it out")
    if config.get("data_types", {}).get("buffer_dtype") is not None:
        yield _not_applied("data_types: buffer_dtype", "programs are built for the dtypes they have", "leave it out")
    routing = config.get("data_efficiency", {}).get("data_routing")
    if routing and routing.get("enabled"):
        yield _not_applied("data_efficiency: data_routing", "a program has no layers that could drop tokens",
                           "leave it out")  # fmt: skip
    scalars = [spec.name for spec in manifest.parameters if spec.shape == () and spec.name in manifest.trainable]
    if scalars:
        why = "DeepSpeed sends parameters between ranks as vectors of bytes, which a number is not"
        yield Problem("deepspeed-unsupported", f"{', '.join(scalars)} of the artifact is of shape []", "the artifact",
                      why, "build a model where it has the shape [1], or train without DeepSpeed")  # fmt: skip
    for key in CHANGES_THE_MODEL:
        if isinstance(config.get(key), dict) and config[key].get("enabled"):
            yield _not_applied(f"{key}: enabled", "a program is what was built, and nothing changes it", "leave it out")
    for key in SECTIONS_THAT_CHANGE_IT:
        if config.get(key):
            yield _not_applied(key, "a program is what was built, and nothing changes it", "leave it out")


def _check_auto(config: dict, manifest: Manifest, replicas: int) -> Iterator[Problem]:
    for path in _autos(config):
        why = "an artifact does not know it (the Hugging Face Trainer fills it in)"
        yield Problem("deepspeed-config", f'{path} is "auto"', "the DeepSpeed config", why, "give a value")


def _autos(config: dict, before: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{before}{key}: ")
        elif value == "auto":
            yield before + key


CHECKS: tuple[Callable[[dict, Manifest, int], Iterator[Problem]], ...] = (
    _check_ranks, _check_dtype, _check_batch, _check_compile, _check_features, _check_auto,
)  # fmt: skip


def _disagrees(entry: str, said: object, found: object, why: str) -> Problem:
    what = f"{entry} is {said}, the artifact says {found}"
    return Problem("deepspeed-config", what, "the DeepSpeed config", why, "change the config, or build for it")


def _not_applied(entry: str, why: str, fix: str) -> Problem:
    return Problem("deepspeed-unsupported", f"{entry} would not be applied", "the DeepSpeed config", why, fix)
