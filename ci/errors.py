"""docs/errors.md from the sources: every code that a `Problem` is given, its messages, fixes, classes and modules.

    python ci/errors.py check     fail where the page is not what would be written, or a code has no meaning below
    python ci/errors.py accept    write the page

Read with `ast`, nothing is imported. A message is a template: a name that is filled in is `{name}`, all else `{...}`.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from error_meanings import MEANINGS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PAGE = ROOT / "autosp_aot", ROOT / "docs" / "errors.md"
FIELDS = ("code", "what", "where", "why", "fix")
WIDTH = 120
HEAD = """# Error codes

Written by `ci/accept_errors`, checked by `ci/check_errors`. An error says what, where, why and a fix:

    error[no-such-rank]: there is no rank 7
      where  llama.sp4
      why    the artifact has ranks 0 to 3
      fix    give another --rank

The code is stable: scripts may rely on it. In Python, `error.problems` of an `AutospError` has all offenders with their
`code`. `diff` exits with 2 for every error; other commands exit with

{exits}

Below, `error` are the messages and `fix` the fixes of a code; what is filled in is `{{name}}` or `{{...}}`.
"""


@dataclass
class Module:
    """A source file: where it is, its functions and constants by name, and what it imports from the package."""

    path: Path
    tree: ast.Module
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    def within(self, node: ast.AST) -> Iterator[ast.AST]:
        """What a node is in, from the inside."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def function(self, node: ast.AST) -> ast.FunctionDef | None:
        return next((outer for outer in self.within(node) if isinstance(outer, ast.FunctionDef)), None)


@dataclass(frozen=True)
class Entry:
    """What is known of a code."""

    classes: tuple[str, ...]
    modules: tuple[str, ...]
    whats: tuple[str, ...]
    fixes: tuple[str, ...]


def main(command: str) -> int:
    sources = Sources()
    entries = sources.entries()
    for code in sorted(entries.keys() ^ MEANINGS.keys()):
        print(f"{code}: {'no meaning in ci/error_meanings.py' if code in entries else 'no source raises it any more'}")
    if entries.keys() != MEANINGS.keys():
        return 1
    text = page(entries, sources.exit_codes)
    if command == "accept":
        PAGE.write_text(text)
        return 0
    if not PAGE.exists() or PAGE.read_text() != text:
        print("docs/errors.md is not what the sources say. If the change is wanted: ci/accept_errors, and commit it.")
        return 1
    return 0


def page(entries: Mapping[str, Entry], exit_codes: Mapping[str, int]) -> str:
    exits = "\n".join(f"    {code}  {name}" for name, code in sorted(exit_codes.items(), key=lambda item: item[1]))
    parts = [HEAD.format(exits=exits)]
    for code, entry in sorted(entries.items()):
        classes = ", ".join(f"`{name}` (exit code {exit_codes[name]})" for name in entry.classes)
        modules = ", ".join(f"`{name}`" for name in entry.modules)
        lines = [*wrapped("error", entry.whats), *wrapped("fix", entry.fixes)]
        said = textwrap.fill(f"{MEANINGS[code]} {classes}, from {modules}.", WIDTH, break_on_hyphens=False)
        parts.append(f"## {code}\n\n{said}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def wrapped(label: str, texts: tuple[str, ...]) -> Iterator[str]:
    """Texts as lines of a block, each after its label."""
    for text in texts:
        first, later = f"    {label:<7}", " " * 11
        for at, line in enumerate(text.split("\n")):
            yield textwrap.fill(line, WIDTH, initial_indent=later if at else first, subsequent_indent=later,
                                break_on_hyphens=False, break_long_words=False)  # fmt: skip


class Sources:
    """The package, and what its problems say."""

    def __init__(self):
        self.modules: dict[str, Module] = {}
        for path in sorted(PACKAGE.glob("**/*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            self.modules[name] = read_module(path)
        self.exit_codes = self._exit_codes()

    def _exit_codes(self) -> dict[str, int]:
        """The exit code of every error class, its own or its base's."""
        classes = [n for m in self.modules.values() for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef)]
        found, left = {"Exception": 2}, True
        while left:
            left = False
            for node in classes:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                known = next((found[base] for base in bases if base in found and base != "Exception"), None)
                if node.name in found or (known is None and node.name != "AutospError"):
                    continue
                own = [n.value.value for n in node.body if isinstance(n, ast.Assign) and n.targets[0].id == "exit_code"]
                found[node.name], left = own[0] if own else known, True
        del found["Exception"]
        return found

    def entries(self) -> dict[str, Entry]:
        found: dict[str, list[set]] = {}
        for name, module in self.modules.items():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                    for code, *rest in self.problems(name, node, dict(zip(FIELDS, node.args))):
                        for have, more in zip(found.setdefault(code, [{}, {}, {}, {}]), rest):
                            have.update(dict.fromkeys(more))
        return {
            code: Entry(*(tuple(sorted(part)) for part in parts))
            for code, parts in found.items()
        }

    def problems(self, name: str, call: ast.Call, given: Mapping[str, ast.expr]) -> Iterator[tuple]:
        """Code, classes, modules, messages, fixes of a problem, or of each call of its function that fills them in."""
        given = {**given, **{k.arg: k.value for k in call.keywords if k.arg in FIELDS}}
        if "code" not in given:
            return
        function = self.modules[name].function(call)
        parameters = [] if function is None else [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
        said = [given[key] for key in ("code", "what", "fix") if key in given]
        if any(isinstance(part, ast.Name) and part.id in parameters for part in said):
            for caller, node in self.calls(name, function.name):
                scope = (name, function, bound(function, node), (caller, self.modules[caller].function(node), {}, None))
                yield from self._told(given, scope, self.classes(name, call) or self.classes(caller, node), caller)
            return
        yield from self._told(given, (name, function, {}, None), self.classes(name, call), name)

    def _told(self, given: Mapping[str, ast.expr], scope: tuple, classes: set[str], place: str) -> Iterator[tuple]:
        texts = {key: self.texts(expr, scope) for key, expr in given.items()}
        path = self.modules[place].path.relative_to(PACKAGE).as_posix()
        for code in texts["code"]:
            yield code, classes, [path], texts["what"], [fix for fix in texts.get("fix", []) if fix]

    def calls(self, name: str, function: str) -> Iterator[tuple[str, ast.Call]]:
        """Calls of a function of a module, in the package."""
        for caller, module in self.modules.items():
            for node in ast.walk(module.tree):
                if not isinstance(node, ast.Call):
                    continue
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
                own = isinstance(node.func, ast.Attribute) and not (
                    isinstance(node.func.value, ast.Name)
                    and ".".join(module.imports.get(node.func.value.id, ("", ""))) == name
                )
                if called == function and ((caller == name) if own or called not in module.imports
                                           else module.imports[called] == (name, function)):  # fmt: skip
                    yield caller, node

    def classes(self, name: str, node: ast.AST, seen: frozenset = frozenset()) -> set[str]:
        """The classes of the errors that a problem ends up in.

        Those around it, else those of its function, of the callers of that, of its module, of who imports that.
        """
        module = self.modules[name]
        around = [outer for outer in module.within(node) if isinstance(outer, ast.Call)]
        if found := {called for outer in around if (called := self._class(outer))}:
            return found
        function = module.function(node)
        if function is not None:
            if found := self._within(function):
                return found
            key = (name, function.name)
            callers = [] if key in seen else list(self.calls(*key))
            if found := set().union(*(self.classes(caller, call, seen | {key}) for caller, call in callers)):
                return found
        if found := self._within(module.tree):
            return found
        importers = [m for m in self.modules.values() if any(source == name for source, _ in m.imports.values())]
        return set().union(*(self._within(m.tree) for m in importers))

    def _class(self, call: ast.Call) -> str | None:
        name = getattr(call.func, "id", None)
        return name if name in self.exit_codes else None

    def _within(self, tree: ast.AST) -> set[str]:
        return {name for node in ast.walk(tree) if isinstance(node, ast.Call) and (name := self._class(node))}

    def texts(self, expr: ast.expr, scope: tuple, depth: int = 0) -> list[str]:
        """What an expression can read, as templates."""
        name, function, filled, caller = scope
        again = lambda part: self.texts(part, scope, depth + 1)  # noqa: E731
        if depth > 12:
            return ["{...}"]
        match expr:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return joined([[hole(p.value)] if isinstance(p, ast.FormattedValue) else again(p) for p in parts])
            case ast.IfExp(body=body, orelse=other):
                return unique(again(body) + again(other))
            case ast.BoolOp(op=ast.Or(), values=values):
                return unique(text for value in values for text in again(value))
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return joined([again(left), again(right)])
            case ast.Name(id=variable):
                return self._named(variable, scope, depth)
            case ast.Subscript(value=ast.Name(id=table)) | ast.Call(func=ast.Attribute(ast.Name(id=table), "get")):
                return unique(text for value in self._entries(table, scope) for text in again(value)) or ["{...}"]
            case ast.Call(func=ast.Name(id=called)) if called in self.modules[name].functions:
                inner = self.modules[name].functions[called]
                returned = [n.value for n in ast.walk(inner) if isinstance(n, ast.Return) and n.value]
                within = (name, inner, bound(inner, expr), scope)
                return unique(text for value in returned for text in self.texts(value, within, depth + 1)) or ["{...}"]
        return ["{...}"]

    def _entries(self, table: str, scope: tuple) -> list[ast.expr]:
        """The values of a dict that is written out, in the function or the module."""
        name, function, *_ = scope
        found = [] if function is None else assigned(function, table)
        constants = [*found, self._constant(name, table)]
        return [value for constant in constants if isinstance(constant, ast.Dict) for value in constant.values]

    def _named(self, variable: str, scope: tuple, depth: int) -> list[str]:
        name, function, filled, caller = scope
        if variable in filled:
            return self.texts(filled[variable], caller, depth + 1)
        values = [] if function is None else assigned(function, variable) + self._unpacked(variable, scope)
        if not values and (constant := self._constant(name, variable)) is not None:
            values = [constant]
        return unique(text for value in values for text in self.texts(value, scope, depth + 1)) or [f"{{{variable}}}"]

    def _unpacked(self, variable: str, scope: tuple) -> list[ast.expr]:
        """What a local variable is given by `what, fix = KINDS[kind]`."""
        found = []
        for node in ast.walk(scope[1]):
            match node:
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Subscript(value=ast.Name(id=table))):
                    at = [getattr(part, "id", None) for part in names]
                    entries = [entry for entry in self._entries(table, scope) if isinstance(entry, ast.Tuple)]
                    found += [entry.elts[at.index(variable)] for entry in entries if variable in at]
        return found

    def _constant(self, name: str, variable: str) -> ast.expr | None:
        module = self.modules[name]
        if variable in module.constants:
            return module.constants[variable]
        source, original = module.imports.get(variable, (None, None))
        return self.modules[source].constants.get(original) if source in self.modules else None


def read_module(path: Path) -> Module:
    module = Module(path, ast.parse(path.read_text(), str(path)))
    for node in ast.walk(module.tree):
        module.parents |= {child: node for child in ast.iter_child_nodes(node)}
        if isinstance(node, ast.FunctionDef):
            module.functions[node.name] = node
        if isinstance(node, ast.ImportFrom):
            module.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    for node in module.tree.body:
        if isinstance(node, ast.Assign):
            module.constants |= dict(pairs(node.targets[0], node.value))
    return module


def pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """What an assignment gives to names."""
    if isinstance(target, ast.Name):
        yield target.id, value
    if isinstance(target, ast.Tuple):
        # `a, b = x, y if c else z, w` is three values to Python too; `a, b = (x, y) if c else (z, w)` gives both.
        choices = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
        for choice in choices:
            if isinstance(choice, ast.Tuple) and len(choice.elts) == len(target.elts):
                for inner, part in zip(target.elts, choice.elts):
                    yield from pairs(inner, part)


def assigned(function: ast.FunctionDef, variable: str) -> list[ast.expr]:
    """What a local variable is given anywhere in its function."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            found += [value for name, value in pairs(node.targets[0], node.value) if name == variable]
        if isinstance(node, ast.NamedExpr) and node.target.id == variable:
            found.append(node.value)
    return found


def bound(function: ast.FunctionDef, call: ast.Call) -> dict[str, ast.expr]:
    """The arguments of a call, by parameter; defaults where nothing is given."""
    names = [a.arg for a in function.args.args]
    defaults = dict(zip(reversed(names), reversed(function.args.defaults)))
    names = names[1:] if names[:1] == ["self"] else names
    return defaults | dict(zip(names, call.args)) | {k.arg: k.value for k in call.keywords if k.arg}


def hole(value: ast.expr) -> str:
    """What stands for an expression in a template."""
    text = ast.unparse(value)
    return f"{{{text}}}" if isinstance(value, (ast.Name, ast.Attribute)) and len(text) < 30 else "{...}"


def joined(parts: list[list[str]]) -> list[str]:
    texts = [""]
    for part in parts:
        texts = [text + more for text in texts for more in part]
    return unique(texts)


def unique(texts) -> list[str]:
    return list(dict.fromkeys(texts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
