"""Write docs/api.md: public names with their signatures and docstrings, and the policies' options into README.md.

    python scripts/make_api_docs.py

`tests/test_docs.py` fails when what is written differs from what lies there.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime.cli.options import markdown_table

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
# Modules, and beside their public names the classes whose fields are keywords of their functions.
MODULES = {
    "export": ["export.options.BuildOptions"],
    "runtime": ["runtime.decoding.request.Request"],
    "engines.errors": [],
}
HEAD = """# Python interface

Written by `python scripts/make_api_docs.py` from the docstrings; do not edit. Axis letters of shapes are those of
`engines/signatures/__init__.py`.

In signatures, `UNSET` (of `engines.options`) is the default of an option that is not given. A `Prompt` is a user's
text, chat messages `[{"role": …, "content": …}]`, or ids [P]. A `Source` is an image: a path, the bytes of a file, or a
Pillow image. A `Policy` is an instance of a policy's class, such as `runtime.Elastic`.
"""


def api() -> str:
    """The text of docs/api.md."""
    return "\n".join([HEAD, *(line for name in MODULES for line in of_module(name))]).rstrip() + "\n"


def of_module(name: str) -> Iterator[str]:
    """Lines about a module and its public names: those of `__all__`, or the classes that it defines."""
    module = importlib.import_module(name)
    public = {entry: getattr(module, entry) for entry in getattr(module, "__all__", vars(module))}
    if not hasattr(module, "__all__"):
        public = {entry: value for entry, value in public.items() if getattr(value, "__module__", None) == name}
    yield from (f"## `{name}`", "", document(module))
    for entry, value in public.items():
        if inspect.isroutine(value):
            yield from (f"### `{name}.{entry}`", "", *code(value), document(value))
    for entry, value in public.items():
        if inspect.isclass(value):
            yield from of_class(f"{name}.{entry}", value)
    for path in MODULES[name]:
        yield from of_class(path, getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]))


def of_class(name: str, cls: type) -> Iterator[str]:
    """Lines about a class: of one that holds options the fields, of others the methods and properties too."""
    base = f"({cls.__bases__[0].__name__})" if issubclass(cls, Exception) else ""
    yield from (f"### `{name}{base}`", "", document(cls), *of_fields(cls))
    if not (dataclasses.is_dataclass(cls) and any(map(help_of, dataclasses.fields(cls)))):
        yield from of_members(cls)


def of_fields(record: type) -> Iterator[str]:
    """A table of a dataclass's fields, without columns that are empty; the last is the help that options have."""
    if not dataclasses.is_dataclass(record):
        return
    rows = [("field", "type", "default", "meaning")]
    for field in dataclasses.fields(record):
        kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        shown = "…" if callable(field.default) else f"`{field.default!r}`"
        default = "" if field.default is dataclasses.MISSING else shown
        rows.append((f"`{field.name}`", f"`{short(kind)}`", default, help_of(field)))
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    head, *body = zip(*columns, strict=True)
    yield from (cells(*head), "|" + "---|" * len(columns), *(cells(*row) for row in body), "")


def help_of(field: dataclasses.Field[Any]) -> str:
    """What a field's metadata says for a reader."""
    about: Any = {**field.metadata, **field.metadata.get("option", {})}
    return str(about.get("help", "")).replace("<", r"\<")


def of_members(cls: type) -> Iterator[str]:
    """Methods and properties of a class, those that have a docstring."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        yield from (f"#### `{cls.__name__}.{name}`{' (property)' if isinstance(member, property) else ''}", "")
        yield from (*code(function), document(function))


def cells(*words: str) -> str:
    return f"| {' | '.join(word.replace('|', chr(92) + '|') for word in words)} |"


def short(annotation: str) -> str:
    """An annotation with names in place of their full paths."""
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", annotation)


def code(function: Callable[..., Any]) -> Iterator[str]:
    """The signature of a function as its file has it, without the comments at the ends of its lines.

    Where a decorator changes it, the parameters are listed, a function among their defaults as an ellipsis.
    """
    if hasattr(function, "__wrapped__"):
        signature = inspect.signature(function)
        listed = [re.sub("<.*>", "...", short(f"    {each},")) for each in signature.parameters.values()]
        result = short(inspect.formatannotation(signature.return_annotation))
        yield from (
            "```python",
            f"def {function.__name__}(",
            *(line.replace("'", '"') for line in listed),
            f") -> {result}",
            "```",
            "",
        )
        return
    source = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    lines = [line.split("  #")[0] for line in source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]]
    yield from ("```python", "\n".join(lines).rstrip(":"), "```", "")


def document(value: Any) -> str:
    return f"{inspect.cleandoc(value.__doc__ or '')}\n"


def between(text: str, name: str, table: str) -> str:
    """`text` with `table` between the comments `name:begin` and `name:end`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}{end}{rest.split(end)[1]}"


def main() -> None:
    readme = ROOT / "README.md"
    API.write_text(api())
    readme.write_text(between(readme.read_text(), "options", markdown_table()))
    print(f"wrote {API.relative_to(ROOT)} and the table of options in {readme.name}")


if __name__ == "__main__":
    main()
