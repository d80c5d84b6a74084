"""Print who imports whom, and what is wrong with it: `python -m scripts.import_graph`.

Read from the source, imports under TYPE_CHECKING and inside functions included.
Modules that are imported by name on first use (a back end, a public name of a
lazy package) are no imports here. Exit code 1 if something is wrong:

- a circle between files, or between the packages and modules below engines/, export/ and runtime/;
- an import against `export -> engines <- runtime`, or of scripts or tests by these;
- the use of another file's private name: `from x import _y`; `other._y` where this file defines no `_y`;
  `self._y` where no file of the same folder does;
- a file of these packages with more than 250 lines.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("engines", "export", "runtime")
ALLOWED = {"engines": {"engines"}, "export": {"export", "engines"}, "runtime": {"runtime", "engines"}}
MOST_LINES = 250
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Source:
    """A module: its dotted name, file and syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def top(self) -> str:
        return self.name.split(".")[0]

    @property
    def lines(self) -> int:
        return self.path.read_text(encoding="utf-8").count("\n")

    @property
    def unit(self) -> str:
        """The package or module right below the top: `engines.ort` of `engines.ort.model`."""
        return ".".join(self.name.split(".")[:2])


def read(root: Path = ROOT, tops: Iterable[str] = (*PRODUCT, "scripts", "tests")) -> dict[str, Source]:
    """The modules of the packages `tops` below `root` by dotted name."""
    found = {}
    for path in sorted(path for top in tops for path in (root / top).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = Source(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """All imports of a file: (module, None), or (module, name) for `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


def graph(sources: dict[str, Source]) -> Graph:
    """Module -> the modules of this project that it imports. `from a import b` imports a.b where that is a module."""
    found: Graph = {}
    for name, source in sources.items():
        pairs = ((module, f"{module}.{item}") for module, item in imported(source.tree))
        found[name] = {deep if deep in sources else module for module, deep in pairs} & sources.keys()
    return found


def units(sources: dict[str, Source], edges: Graph) -> Graph:
    """The graph of packages and modules right below engines/, export/ and runtime/."""
    found: Graph = {}
    for name, targets in edges.items():
        if "." in name and sources[name].top in PRODUCT:
            below = {sources[target].unit for target in targets if "." in target}
            found.setdefault(sources[name].unit, set()).update(below - {sources[name].unit})
    return found


def circles(edges: Graph) -> list[list[str]]:
    """A shortest circle through each node that is on one, each circle once; the first name stands at the end again."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(edges):
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            targets = sorted(edges.get(path[-1], ()))
            if start in targets:
                found.setdefault(frozenset(path), [*path, start])
                break
            paths += [[*path, target] for target in targets if target not in seen]
            seen.update(targets)
    return list(found.values())


def upward(sources: dict[str, Source], edges: Graph) -> list[str]:
    """Imports against `export -> engines <- runtime`."""
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        if sources[name].top in PRODUCT
        for target in sorted(targets)
        if sources[target].top not in ALLOWED[sources[name].top]
    ]


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__") and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """Private names that a file defines: of functions, classes, variables, attributes and fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return set(filter(is_private, found))


def is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def reached(sources: dict[str, Source]) -> list[str]:
    """Uses of another file's private names; tests may use them."""
    own = {name: defined(source.tree) for name, source in sources.items()}
    everywhere = set().union(*own.values())
    found = []
    for name, source in sources.items():
        if source.top == "tests":
            continue
        beside = set().union(*(own[n] for n, other in sources.items() if other.path.parent == source.path.parent))
        for module, item in imported(source.tree):
            if is_private(item) and module in sources:
                found.append(f"{name} imports {item} of {module}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in everywhere:
                known = beside if is_own(node.value) else own[name]
                if node.attr not in known:
                    found.append(f"{name}, line {node.lineno}, uses {ast.unparse(node)}, which other files define")
    return found


def problems(sources: dict[str, Source]) -> list[str]:
    """What is wrong, one sentence each."""
    edges = graph(sources)
    round_trips = (*circles(edges), *circles(units(sources, edges)))
    found = list(dict.fromkeys(f"circle: {' -> '.join(circle)}" for circle in round_trips))
    found += upward(sources, edges) + reached(sources)
    return found + [
        f"{name} has {source.lines} lines, more than {MOST_LINES}"
        for name, source in sources.items()
        if source.top in PRODUCT and source.lines > MOST_LINES
    ]


def picture(sources: dict[str, Source]) -> Iterator[str]:
    """Packages and modules with what they import, and files with their number of lines."""
    arrows = units(sources, graph(sources))
    for top in PRODUCT:
        inside = {name: source for name, source in sources.items() if source.top == top}
        yield f"{top}: {len(inside)} files, {sum(source.lines for source in inside.values())} lines"
        for unit in sorted({source.unit for source in inside.values()} - {top}):
            files = {name: source.lines for name, source in inside.items() if source.unit == unit}
            targets = ", ".join(t.removeprefix(f"{top}.") for t in sorted(arrows[unit])) or "nothing"
            yield f"  {unit.removeprefix(f'{top}.')} ({sum(files.values())}) -> {targets}"
            if len(files) > 1:
                yield "    " + ", ".join(f"{name.removeprefix(f'{unit}.')} {lines}" for name, lines in files.items())


def main() -> int:
    sources = read()
    print(*picture(sources), sep="\n")
    found = problems(sources)
    print(*(found or [f"no circle, nothing imports upwards, no file over {MOST_LINES} lines"]), sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
