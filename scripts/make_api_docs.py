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

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
MODULES = ("export", "runtime", "engines.errors")
HEAD = """# Python interface

Written by `python scripts/make_api_docs.py` from the docstrings; do not edit. Axis letters of shapes are those of
`engines/signatures/__init__.py`.
"""


def api() -> str:
    """The text of docs/api.md."""
    return "\n".join([HEAD, *(line for name in MODULES for line in of_module(name))]).rstrip() + "\n"


def of_module(name: str) -> Iterator[str]:
    """Lines about a module and its public names: those of `__all__`, or the classes that it defines."""
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if is_defined_in(v, name)]
    yield from (f"## `{name}`", "", document(module))
    for entry in sorted(public, key=lambda entry: not inspect.isroutine(getattr(module, entry))):  # functions first
        yield from of_name(f"{name}.{entry}", getattr(module, entry))


def is_defined_in(value: Any, module: str) -> bool:
    return inspect.isclass(value) and value.__module__ == module


def of_name(name: str, value: Any) -> Iterator[str]:
    """Lines about a class, a function or a constant."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        yield from (f"### `{name}`", "", f"`{value!r}`", "")
        return
    base = value.__bases__[0] if inspect.isclass(value) else object
    yield from (f"### `{name}{f'({base.__name__})' if base is not object else ''}`", "")
    if inspect.isroutine(value):
        yield from code(value)
    yield document(value)
    if inspect.isclass(value):
        yield from of_fields(value)
        yield from of_members(value)


def of_fields(record: Any) -> Iterator[str]:
    """A table of a dataclass's fields; the last column is the help that options have."""
    if not dataclasses.is_dataclass(record):
        return
    yield from ("| field | type | default | |", "|---|---|---|---|")
    for field in dataclasses.fields(record):
        kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        kind = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", kind)  # names without their modules
        yield cells(f"`{field.name}`", f"`{kind}`", default, help_of(field))
    yield ""


def help_of(field: Any) -> str:
    """What a field's metadata says for a reader."""
    about: Any = {**field.metadata, **field.metadata.get("option", {})}
    return str(about.get("help", ""))


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


def code(function: Callable[..., Any]) -> Iterator[str]:
    """The signature of a function as its file has it, without the comments behind its lines."""
    source = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    lines = [line.split("  #")[0] for line in source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]]
    yield from ("```python", "\n".join(lines).rstrip(":"), "```", "")


def document(value: Any) -> str:
    return f"{inspect.cleandoc(value.__doc__ or '')}\n"


def policies() -> str:
    """The table of policies: what each computes in a step, and the options it takes."""
    from runtime.decoding.policies import POLICIES

    lines = ["| policy | what a step computes | options |", "|---|---|---|"]
    for name, policy in POLICIES.items():
        options = " ".join(map(flag, dataclasses.fields(policy)))
        lines.append(cells(f"`{name}`", summary(policy), f"`{options}`"))
    return "\n".join(lines)


def summary(value: Any) -> str:
    """The first paragraph of a docstring as one line."""
    return inspect.cleandoc(value.__doc__).split("\n\n")[0].replace("\n", " ")


def flag(field: Any) -> str:
    """The command-line option of a field; a switch that is on has one that turns it off."""
    name = field.name.replace("_", "-")
    return f"--no-{name}" if field.default is True else f"--{name}"


def between(text: str, name: str, table: str) -> str:
    """`text` with `table` between the comments `name:begin` and `name:end`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main() -> None:
    readme = ROOT / "README.md"
    API.write_text(api())
    readme.write_text(between(readme.read_text(), "options", policies()))
    print(f"wrote {API.relative_to(ROOT)} and the table of options in {readme.name}")


if __name__ == "__main__":
    main()
