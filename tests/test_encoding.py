"""Text files are UTF-8 whatever the locale: every call that opens one says so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cases import ROOT

SOURCES = sorted(
    path for folder in ("engines", "export", "runtime", "scripts") for path in (ROOT / folder).rglob("*.py")
)
TEXT = ("read_text", "write_text")


def unspecified(tree: ast.AST) -> Iterator[int]:
    """The lines of calls that open a file as text and leave its encoding to the locale."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        place = 0 if isinstance(call.func, ast.Attribute) else 1  # of the mode, in Path.open and in open
        modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"
        opens = name == "open" and not (isinstance(call.func, ast.Attribute) and _is_other(call.func))
        if name in TEXT or (opens and isinstance(mode, str) and "b" not in mode):
            yield call.lineno


def _is_other(method: ast.Attribute) -> bool:
    """Whether an `open` is no file's: of the system, a bundle or Pillow."""
    return ast.unparse(method.value) in ("os", "Bundle", "pil.Image")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_has_its_encoding(path: Path) -> None:
    lines = list(unspecified(ast.parse(path.read_text(encoding="utf-8"))))
    assert not lines, f"{path.relative_to(ROOT)}: lines {lines} leave the encoding to the locale"


def test_a_call_without_an_encoding_is_found() -> None:
    source = 'p.read_text()\nopen(p)\nopen(p, "w")\np.open("a")\np.open()\nopen(p, "rb")\np.open("wb")\nos.open(p, 0)\n'
    assert list(unspecified(ast.parse(source + 'open(p, encoding="utf-8")\n'))) == [1, 2, 3, 4, 5]
