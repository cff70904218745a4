"""Who may know whom: imports point one way, nothing evaluates text, only the launcher reads the environment.

Imports are followed: a module that imports `artifact` also reaches all that `artifact` imports.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "autosp_aot"
PACKAGES = ("transformers", "deepspeed", "onnx")  # need not be installed

# What each part must not reach, directly or through others. A part is a module, or a package with all in it.
NEVER_REACHES = {
    "runtime": ("autosp_aot.export", "autosp_aot.passes", *PACKAGES),
    "passes": ("autosp_aot.export", "autosp_aot.runtime", "torch.distributed", *PACKAGES),
    "export": ("autosp_aot.passes", "autosp_aot.runtime", *PACKAGES),
    **{
        part: ("autosp_aot.export", "autosp_aot.passes", "autosp_aot.runtime", "torch.distributed")
        for part in ("artifact", "artifact_read", "artifact_write", "program", "program_text", "placement", "operators",
                     "verify", "cost", "collectives", "layouts", "moves", "workspace")
    },
    "interchange": ("autosp_aot.export", "autosp_aot.passes", *PACKAGES),
    "cli": (*PACKAGES,),
}
NEVER_IMPORTED = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
NEVER_CALLED = ("eval", "exec", "compile", "__import__", "torch.load", "torch.save")
READ_ENVIRONMENT = ("autosp_aot.runtime.comm", "autosp_aot.training.launch")
IMPORT_LATE = ("autosp_aot", "autosp_aot.commands.cli")
# Modules that know a package which need not be installed: only they may, and only late are they imported.
BRIDGES = {
    "autosp_aot.export.hugging_face": "transformers",
    "autosp_aot.training.deepspeed.engine": "deepspeed",
    "autosp_aot.commands.interchange.onnx_calls": "onnx",
    "autosp_aot.commands.interchange.onnx_file": "onnx",
    "autosp_aot.commands.interchange.onnx_graph": "onnx",
    "autosp_aot.commands.interchange.onnx_operators": "onnx",
}


def main() -> int:
    files = sorted(ROOT.glob(f"{PACKAGE}/**/*.py"))
    trees = {module_name(path): ast.parse(path.read_text(), str(path)) for path in files}
    imports = {name: sorted(set(imported(tree, trees))) for name, tree in trees.items()}
    imports = {name: [n for n in names if not inside(n, BRIDGES.get(name, name))] for name, names in imports.items()}
    problems = [*layers(imports), *(f"{name}: {said}" for name, tree in trees.items() for said in uses(name, tree))]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module, modules) -> Iterator[str]:
    """Names of the modules a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules or not name.startswith(PACKAGE) else node.module


def layers(imports: dict[str, list[str]]) -> Iterator[str]:
    for part, never in NEVER_REACHES.items():
        starts = [name for name in imports if inside(name, f"{PACKAGE}.{part}")]
        assert starts, f"there is no {part}"
        for start in starts:
            for way in ways(start, imports):
                if forbidden(way[-1], never) and not forbidden(way[-2], never):
                    yield " -> ".join(way)


def forbidden(name: str, never: tuple[str, ...]) -> bool:
    return any(inside(name, part) for part in never)


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def ways(start: str, imports: dict[str, list[str]]) -> Iterator[tuple[str, ...]]:
    """A shortest chain of imports from `start` to everything it reaches."""
    seen, waiting = {start}, [(start,)]
    while waiting:
        way = waiting.pop(0)
        for name in imports.get(way[-1], ()):
            if name not in seen:
                seen.add(name)
                waiting.append((*way, name))
                yield (*way, name)


def uses(module: str, tree: ast.Module) -> Iterator[str]:
    """What a module does that its place does not allow."""
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
        if text in ("os.environ", "os.getenv") and module not in READ_ENVIRONMENT:
            yield f"line {node.lineno} reads the environment"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in NEVER_CALLED:
            yield f"line {node.lineno} calls {ast.unparse(node.func)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(inside(name, never) for name in names for never in NEVER_IMPORTED):
                yield f"line {node.lineno} imports {', '.join(names)}"
            late = isinstance(node, ast.ImportFrom) and node.module in BRIDGES
            if node.col_offset and module not in IMPORT_LATE and not late:
                yield f"line {node.lineno} imports inside a function"
            if late and not node.col_offset and BRIDGES.get(module) != BRIDGES[node.module]:
                yield f"line {node.lineno} imports {node.module}, whose package need not be installed"


if __name__ == "__main__":
    sys.exit(main())
