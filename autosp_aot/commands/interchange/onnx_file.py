"""A rank's program as an ONNX file: one graph, and the stored values of its inputs by reference.

Parameters and buffers have their stored values where the file lies above the artifact: ONNX reads them from the
artifact's safetensors, and they can still be given instead. Elsewhere they are inputs alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

from autosp_aot import __version__
from autosp_aot.artifact.manifest import BUFFERS, WEIGHTS, Manifest
from autosp_aot.commands.interchange.onnx_calls import OPSET
from autosp_aot.commands.interchange.onnx_graph import ATEN, DOMAIN, GraphBuilder, info_of
from autosp_aot.commands.interchange.output import write_whole
from autosp_aot.errors import BuildError
from autosp_aot.ir.program import Program

HEADER_LENGTH = 8  # bytes of a safetensors file that say how long its header is


def write_onnx(program: Program, manifest: Manifest, rank: int, path: Path, out: Path) -> None:
    """Write rank `rank`'s program (`Program.for_rank`) of the artifact at `path` to `out`, checked by onnx in full.

    Raises BuildError: `onnx-cannot-carry` with all operators that no node can be, `output-unwritable`.
    """
    model = onnx_model(program, manifest, rank)
    if out.parent.resolve() in path.resolve().parents:
        folder = path.resolve().relative_to(out.parent.resolve())
        stored = [BUFFERS, *([WEIGHTS] if manifest.has_weights else [])]
        wanted = {value.name: value for value in model.graph.input}
        for name in stored:
            model.graph.initializer.extend(_referred(path / name, (folder / name).as_posix(), wanted))

    def write(file: Path) -> None:
        file.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(file), full_check=True)

    write_whole(out, write)


def onnx_model(program: Program, manifest: Manifest, rank: int) -> ModelProto:
    """The model without stored values. Raises BuildError (`onnx-cannot-carry`)."""
    builder = GraphBuilder(program, rank)
    for section in program.sections:
        for instr in section.instrs:
            builder.add(instr, section.name)
    given = {label: name for section in program.sections for label, name in section.gives}  # sums come last
    outputs = [builder.give(label, name) for label, name in given.items()]
    if builder.refused:
        raise BuildError(*builder.refused.values())
    inputs = [info_of(entry.value, entry.kind) for entry in program.inputs]
    graph = builder.graph(f"rank{rank}", inputs, outputs)
    graph.initializer.extend(builder.constants.values())
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ATEN, 1), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="autosp-aot", producer_version=__version__)
    model.ir_version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    said = {"rank": rank, "ranks": program.ranks, "target": manifest.target, "torch": manifest.versions["torch"]}
    helper.set_model_props(model, {key: str(value) for key, value in said.items()})
    return model


def _referred(file: Path, location: str, wanted: Mapping[str, onnx.ValueInfoProto]) -> list[TensorProto]:
    """Tensors of a safetensors file as external data: where in `location` the bytes of each are."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH), "little")
        header = json.loads(stream.read(length))
    found = []
    for name, entry in header.items():
        if name in wanted:
            start, stop = entry["data_offsets"]
            tensor = TensorProto(name=name, dims=entry["shape"], data_type=wanted[name].type.tensor_type.elem_type)
            tensor.data_location = TensorProto.EXTERNAL
            said = {"location": location, "offset": HEADER_LENGTH + length + start, "length": stop - start}
            tensor.external_data.extend(StringStringEntryProto(key=k, value=str(v)) for k, v in said.items())
            found.append(tensor)
    return found
