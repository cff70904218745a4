"""Who may know whom: imports point one way, nothing evaluates text, only the launcher reads the environment."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "autosp_aot"
OPTIONAL = ("transformers", "deepspeed", "onnx")  # packages that need not be installed

# Each room, and the rooms it may import from: only such as stand above it.
ROOMS = {
    "errors": (),
    "targets": (),
    "ir": ("errors",),
    "sharding": ("ir",),
    "ops": ("targets", "ir", "sharding"),
    "memory": ("ir", "ops"),
    "proof": ("errors", "ir", "sharding", "ops"),
    "artifact": ("errors", "targets", "ir", "memory"),
    "export": ("errors", "ir", "ops", "artifact"),
    "passes": ("errors", "targets", "ir", "sharding", "ops", "memory", "proof", "artifact"),
    "runtime": ("errors", "targets", "ir", "ops", "memory", "proof", "artifact"),
    "training": ("errors", "targets", "ir", "proof", "artifact", "runtime"),
    "commands": ("errors", "targets", "ir", "sharding", "ops", "memory", "proof", "artifact", "export", "passes",
                 "runtime", "training"),
    "__main__": ("commands",),
}  # fmt: skip
# Rooms that must not reach torch's process groups, directly or through others.
WITHOUT_RANKS = ("ir", "sharding", "ops", "memory", "proof", "artifact", "passes")
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
    problems = [*rooms(imports), *reached(imports)]
    problems += [f"{name}: {problem}" for name, tree in trees.items() for problem in uses(name, tree)]
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


def rooms(imports: dict[str, list[str]]) -> Iterator[str]:
    """Imports that the table of rooms does not have, and rooms that it lets look down."""
    for at, (room, seen) in enumerate(ROOMS.items()):
        yield from (f"ROOMS: {room} sees {below}, which does not stand above it" for below in seen
                    if below not in list(ROOMS)[:at])  # fmt: skip
    for module, names in imports.items():
        room = room_of(module)
        if room and room not in ROOMS:
            yield f"{module}: ROOMS has no {room}"
        for name in names:
            if room in ROOMS and room_of(name) not in (None, room, *ROOMS[room]):
                yield f"{module} -> {name}: {room} may not import {room_of(name)}"


def room_of(module: str) -> str | None:
    """The folder or file of the package that a module is in; None for the package itself and all others."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def reached(imports: dict[str, list[str]]) -> Iterator[str]:
    """Chains of imports that end in a package that must not be reached."""
    for start in imports:
        never = (*OPTIONAL, "torch.distributed") if room_of(start) in WITHOUT_RANKS else OPTIONAL
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
