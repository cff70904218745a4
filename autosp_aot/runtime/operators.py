"""Operators of a program are allowed, and in this torch what they were when the artifact was built."""

from autosp_aot.artifact.manifest import Manifest
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.program import Program
from autosp_aot.ir.score_expr import check
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ops.table import schema


def check_operators(program: Program, manifest: Manifest) -> None:
    """Raise ArtifactError unless every operator is allowed and is, in this torch, what it was at the build."""
    problems = []
    for op in sorted({instr.op for instr in program.instrs()} - set(STRUCTURE)):
        here = schema(op)
        if here is None:
            problems.append(Problem("operator-refused", f"{op} is not allowed in a program",
                                    why="it is not a pure operator of ATen",
                                    fix="build the artifact again"))  # fmt: skip
        elif here != manifest.operators.get(op):
            problems.append(Problem("operator-changed", f"{op} is not what it was when the artifact was built",
                                    why=f"then {manifest.operators.get(op)}\nnow  {here}",
                                    fix=f"use torch {manifest.versions['torch']}, or build again"))  # fmt: skip
    for instr in program.instrs():
        score = dict(instr.kwargs).get("score")
        try:
            check(score, sum(len(arg) for arg in instr.args if isinstance(arg, tuple)) if score is not None else 0)
        except ValueError as error:
            problems.append(Problem("operator-refused", f"{instr.op} is given a score that is not allowed",
                                    instr.where.source, str(error), "build the artifact again"))  # fmt: skip
    if problems:
        raise ArtifactError(*problems)
