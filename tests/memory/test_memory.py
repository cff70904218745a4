"""The planned curve is the measured one: live storages of a rank, counted while the real executor runs."""

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autosp_aot.ir.program import Instr, Program
from autosp_aot.ir.structure.record import Action
from autosp_aot.memory.costs import costs, curve, heaviest
from autosp_aot.runtime.execute import Executor, SectionRun
from autosp_aot.runtime.module import run
from autosp_aot.runtime.simulate import lockstep
from examples import llama
from tests.architectures import ARCHITECTURES
from tests.steps import built, half_labelled
from tests.storages import Storages

CPU = torch.device("cpu")


class Replay:
    """One rank's meetings, answered with what the ranks answered before: what is received is new, sums are in place."""

    def __init__(self, answers: list[Tensor]):
        self.answers = iter(answers)

    def exchange(self, buffer: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        return next(self.answers).clone()

    def sum(self, buffer: Tensor) -> Tensor:
        return buffer.copy_(next(self.answers))


def answers(program: Program, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    """What each rank is answered in a step."""
    heard: list[list[Tensor]] = [[] for _ in range(program.ranks)]

    def listening(run: SectionRun, mine: list[Tensor]) -> Generator:
        answer = None
        while True:
            try:
                answer = yield run.send(answer)
            except StopIteration as stop:
                return stop.value
            mine.append(answer[0].clone())

    executors = [Executor(program.for_rank(rank), rank, CPU) for rank in range(program.ranks)]
    values = [dict(inputs) for _ in executors]
    for section in program.sections:
        lockstep([listening(e.run(section.name, v), mine) for e, v, mine in zip(executors, values, heard)])
    return heard


def measured(program: Program, rank: int, inputs: dict[str, Tensor], heard: list[Tensor]) -> list[tuple[int, int]]:
    """Bytes alive after each instruction of a rank, and the most during it, beside inputs and host memory."""
    executor, values, comm = Executor(program.for_rank(rank), rank, CPU), dict(inputs), Replay(heard)
    storages, found = Storages([*values.values(), *(buffer.memory for buffer in executor.host.buffers)]), []

    def watched(step: Action) -> Action:
        def called(values):
            storages.peak_bytes = storages.live_bytes
            yield from step(values) or ()
            found.append((storages.live_bytes, storages.peak_bytes))

        return called

    executor.steps = {name: [watched(step) for step in steps] for name, steps in executor.steps.items()}
    with storages:
        for section in program.sections:
            run(executor, section.name, values, comm)
    return found


def compare(program: Program, rank: int, inputs: dict[str, Tensor], heard: list[Tensor]) -> list[str]:
    """The instructions whose measured bytes are not the planned ones; blocks of our own kernels are planned at most."""
    instrs = [instr for section in program.sections for instr in section.instrs]
    moments, found = curve(program, rank, "cpu"), measured(program, rank, inputs, heard)
    wrong = []
    for instr, moment, (alive_bytes, peak_bytes) in zip(instrs, moments, found, strict=True):
        fits = peak_bytes <= moment.peak_bytes if in_blocks(instr) else peak_bytes == moment.peak_bytes
        if alive_bytes != moment.alive_bytes or not fits:
            wrong.append(f"{instr.op}: {moment}, measured {alive_bytes}, {peak_bytes}")
    return wrong


def in_blocks(instr: Instr) -> bool:
    """Whether what an instruction needs beside its results depends on the numbers."""
    if instr.op in ("autosp.attention", "autosp.attention_backward"):
        return bool({"score", "window", "dropout"} & dict(instr.kwargs).keys())
    return instr.op.startswith("autosp.") and instr.op != "autosp.rescale"


@pytest.fixture
def build_llama():
    def build(dtype: str) -> nn.Module:
        torch.manual_seed(0)
        return llama.build_model(
            dtype, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("ranks, recompute, tile, offload, dtype", [
    (1, "none", "off", "off", "float32"), (1, "sac", 3, "host", "bfloat16"), (2, "sac", "off", "host", "float32"),
    (2, "none", 4, "off", "float32"), (3, "none", 2, "host", "bfloat16"), (3, "full", "off", "off", "float32"),
    (6, "sac", "off", "off", "bfloat16"),
])  # fmt: skip
def test_measured_bytes_are_the_planned_ones_at_every_instruction(build_llama, ranks, recompute, tile, offload, dtype):
    options = dict(recompute=recompute, tile=tile, offload=offload)
    compiled, inputs = built(build_llama(dtype), half_labelled(13), ranks, **options)
    heard = answers(compiled.program, inputs)
    for rank in {0, ranks - 1}:
        assert not compare(compiled.program, rank, inputs, heard[rank])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [4, 5])
def test_rows_of_several_heads_on_a_rank_are_copied_run_by_run(ranks, causal):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.qkv = nn.Embedding(64, 24), nn.Linear(24, 72)

        def forward(self, input_ids, labels):
            q, k, v = self.qkv(self.tokens(input_ids)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
            return nn.functional.cross_entropy((x @ self.tokens.weight.t()).flatten(0, 1), labels.flatten())

    torch.manual_seed(0)
    compiled, inputs = built(Loss(), half_labelled(13), ranks)
    heard = answers(compiled.program, inputs)
    assert not any(compare(compiled.program, rank, inputs, heard[rank]) for rank in range(ranks))


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "bloom", "mamba2", "t5"])
def test_so_they_are_in_other_architectures(name):
    compiled, inputs = built(ARCHITECTURES[name].build(), half_labelled(13), 3)
    assert not compare(compiled.program, 2, inputs, answers(compiled.program, inputs)[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_norm_are_of_the_dtype_that_the_target_makes(dtype):
    model = nn.Sequential(nn.Embedding(64, 12), nn.LayerNorm(12), nn.Linear(12, 64)).to(dtype)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, labels):
            return nn.functional.cross_entropy(self.model(input_ids).flatten(0, 1), labels.flatten())

    compiled, inputs = built(Loss(), half_labelled(13), 2, tile="off")
    assert not compare(compiled.program, 0, inputs, answers(compiled.program, inputs)[0])


def test_what_a_run_of_rows_found_is_gone_before_the_next_run():
    torch.manual_seed(0)
    model = llama.build_model(
        "float32", vocab_size=64, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3,
        head_dim=8,
    )  # fmt: skip
    compiled, inputs = built(model, half_labelled(16), 5)
    heard = answers(compiled.program, inputs)
    for rank in range(5):
        assert not compare(compiled.program, rank, inputs, heard[rank])


class HeadsByConvolutions(nn.Module):
    """Attention between convolutions: what lies in memory as [B, heads, head dim, S] is copied for its kernel."""

    def __init__(self):
        super().__init__()
        self.tokens, self.qkv, self.head = nn.Embedding(64, 16), nn.Conv1d(16, 32, 1), nn.Linear(16, 64)

    def forward(self, input_ids, labels):
        q, k, v = self.qkv(self.tokens(input_ids).mT).unflatten(1, (-1, 4)).mT.split((4, 2, 2), dim=1)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return nn.functional.cross_entropy(self.head(o.mT.flatten(1, 2).mT).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("ranks", [1, 3])
def test_copies_for_a_kernel_that_takes_the_head_dim_to_be_innermost_are_planned(ranks):
    torch.manual_seed(0)
    compiled, inputs = built(HeadsByConvolutions(), half_labelled(13), ranks, recompute="none", tile="off")
    heard = answers(compiled.program, inputs)
    for rank in range(ranks):
        assert not compare(compiled.program, rank, inputs, heard[rank])


@pytest.mark.parametrize("name, ranks, length, options", [
    ("mamba2", 2, 13, {"recompute": "none", "tile": 3}), ("mamba2", 3, 64, {"recompute": "sac", "tile": "off"}),
])  # fmt: skip
def test_the_peak_is_the_highest_of_all_ranks(name, ranks, length, options):
    compiled, inputs = built(ARCHITECTURES[name].build(), half_labelled(length), ranks, **options)
    program, heard = compiled.program, answers(compiled.program, inputs)
    peaks = [max(peak for _, peak in measured(program, rank, inputs, heard[rank])) for rank in range(ranks)]
    assert costs(program, "cpu").peak_bytes == max(peaks) > peaks[heaviest(program)]


def test_a_release_that_comes_later_is_measured(build_llama):
    compiled, inputs = built(build_llama("float32"), half_labelled(13), 1)
    forward, planned = compiled.program.section("forward"), curve(compiled.program, 0, "cpu")
    at = next(at for at in range(1, len(planned)) if planned[at].alive_bytes < planned[at - 1].alive_bytes)
    instrs = [*forward.instrs[:at], forward.instrs[at + 1], forward.instrs[at], *forward.instrs[at + 2 :]]
    late = compiled.program.with_section(replace(forward, instrs=tuple(instrs)))
    found = measured(late, 0, inputs, [])
    assert [at for at, (one, other) in enumerate(zip(found, planned)) if one[0] != other.alive_bytes] == [at]
