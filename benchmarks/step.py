"""One training step of a built artifact against Ulysses written by hand, in the same processes, taken in turns.

    python -m benchmarks.step [--seq 2048] [--layers 4] [--rounds 10] [--no-compile]

    built, none     autosp_aot.load of a build with --recompute none
    built, sac      the same with --recompute sac
    by hand         stock transformers layers on this rank's positions, all-to-all around SDPA, gradients summed once
    compiled        the same under torch.compile

A step is forward and backward, gradients summed over the ranks. Ratios are the median over rounds of the ratio within a
round, and every other round goes backwards, so that the drift of a busy machine cancels. Exit code 1 where loss or
gradients differ, or `built, none` takes more than 1.10 of by hand.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import autosp_aot
from examples import llama

LIMIT = 1.10
TOLERANCE = 1e-5
DEFAULTS = {
    "sp": 2, "seq": 2048, "batch": 1, "layers": 4, "hidden": 512, "intermediate": 1376, "heads": 8, "kv-heads": 8,
    "vocab": 8192, "threads": 1, "rounds": 10,
}  # fmt: skip
Step = Callable[[], Tensor]


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        for recompute in ("none", "sac"):
            torch.manual_seed(0)
            model, batch, path = make_model(args), make_batch(args), f"{folder}/{recompute}"
            autosp_aot.build(model, batch, args.sp, path, target="cpu", recompute=recompute)
        mp.spawn(worker, (args, folder), args.sp)
        sys.exit(Path(folder, "failed").exists())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> nn.Module:
    return llama.build_model(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seq,
    )  # fmt: skip


def make_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    tokens = torch.randint(args.vocab, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


# --- Ulysses by hand ----------------------------------------------------------------------------------------------


class Swap(torch.autograd.Function):
    """All-to-all of [B, n, s, D]: heads are split and the sequence joined (`gather`), or the other way round."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: bool) -> Tensor:
        ctx.gather = gather
        return swap(x, gather)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return swap(grad, not ctx.gather), None


def swap(x: Tensor, gather: bool) -> Tensor:
    ranks, (batch, n, s, width) = dist.get_world_size(), x.shape
    if gather:
        sent = x.view(batch, ranks, n // ranks, s, width).transpose(0, 1).contiguous()
    else:
        sent = x.view(batch, n, ranks, s // ranks, width).permute(2, 0, 1, 3, 4).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    if gather:
        return received.permute(1, 2, 0, 3, 4).reshape(batch, n // ranks, ranks * s, width)
    return received.transpose(0, 1).reshape(batch, ranks * n, s // ranks, width)


def ulysses_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, **kwargs):
    """What transformers calls in a layer: q, k and v of this rank's positions; only real key/value heads travel."""
    q, k, v = (Swap.apply(tensor, True) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return Swap.apply(out, False).transpose(1, 2), None


def by_hand(model: nn.Module, forward: nn.Module, batch: dict[str, Tensor]) -> Step:
    """A step of the model on this rank's positions, by way of `forward` (the model, or the model compiled)."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    count = (labels != -100).sum().float()
    ids, labels = (tensor.chunk(ranks, 1)[rank].contiguous() for tensor in (batch["input_ids"], labels))
    positions = (torch.arange(ids.shape[1]) + rank * ids.shape[1]).unsqueeze(0)
    parameters = list(model.parameters())

    inputs = {"input_ids": ids, "position_ids": positions, "labels": labels, "shift_labels": labels}

    def step() -> Tensor:
        loss = forward(**inputs, num_items_in_batch=count).loss
        loss.backward()
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)
        total = loss.detach()
        dist.all_reduce(total)
        return total

    return step


# --- measuring ----------------------------------------------------------------------------------------------------


def worker(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(args.threads)
    AttentionInterface.register("ulysses", ulysses_attention)
    AttentionMaskInterface.register("ulysses", lambda *given, **named: None)
    store = dist.FileStore(f"{folder}/store", args.sp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.sp)
    batch = make_batch(args)
    steps: dict[str, tuple[nn.Module, Step]] = {}
    for recompute in ("none", "sac"):
        module = autosp_aot.load(f"{folder}/{recompute}")
        steps[f"built, {recompute}"] = module, lambda module=module: built_step(module, batch)
    for name in ("by hand", "compiled")[: 1 if args.no_compile else 2]:
        model = make_model(args)
        model.load_state_dict(steps["built, none"][0].state_dict())
        model.set_attn_implementation("ulysses")
        steps[name] = model, by_hand(model, torch.compile(model) if name == "compiled" else model, batch)
    lines, failed = measure(steps, args.rounds)
    if rank == 0:
        print("\n".join(lines))
        if failed:
            Path(folder, "failed").touch()
    dist.barrier()
    dist.destroy_process_group()


def built_step(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = module(**batch)
    loss.backward()
    return loss.detach()


def measure(steps: dict[str, tuple[nn.Module, Step]], rounds: int) -> tuple[list[str], bool]:
    """The table of times and differences, and whether a limit is passed."""
    first, times, results = {}, {name: [] for name in steps}, {}
    for name, (model, step) in steps.items():
        first[name], loss = timed(model, step)
        timed(model, step)
        results[name] = {"loss": loss, **{key: p.grad.clone() for key, p in model.named_parameters()}}
    for turn in range(rounds):
        for name, (model, step) in list(steps.items())[:: 1 if turn % 2 else -1]:
            times[name].append(timed(model, step)[0])
    failed = False
    lines = [f"{'':14} {'step s':>8} {'by hand':>8} {'first s':>8}  largest difference from by hand"]
    for name, found in times.items():
        ratio = statistics.median(mine / other for mine, other in zip(found, times["by hand"]))
        worst, where = difference(results[name], results["by hand"])
        lines.append(f"{name:14} {statistics.median(found):8.3f} {ratio:8.3f} {first[name]:8.2f}  {worst:.1e} {where}")
        failed |= not worst <= TOLERANCE or (name == "built, none" and ratio > LIMIT)
    return lines, failed


def timed(model: nn.Module, step: Step) -> tuple[float, Tensor]:
    """Seconds and loss of a step that finds no gradients."""
    model.zero_grad()
    dist.barrier()
    started = time.perf_counter()
    loss = step()
    return time.perf_counter() - started, loss


def difference(found: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of loss and gradients, each by its norm, and the name of it."""
    floor = 1e-4 * torch.stack([tensor.norm() for tensor in reference.values()]).square().mean().sqrt()
    found = {n: float((found[n] - ref).norm() / torch.maximum(ref.norm(), floor)) for n, ref in reference.items()}
    where = max(found, key=lambda n: (math.isnan(found[n]), found[n]))
    return found[where], where


if __name__ == "__main__":
    main()
