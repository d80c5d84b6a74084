"""The documents agree with the code: generated parts are up to date, what they name exists, commands parse."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import export.cli
import runtime
import runtime.cli
from engines import __version__
from runtime.cli.options import markdown_table
from runtime.decoding import policies
from scripts import make_api_docs
from tests.support.cases import ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md")]
FIGURES = [ROOT / "docs" / name for name in ("BENCHMARKS.md", "QUALITY.md", "GPU.md")]
FOLDERS = ("docs", "engines", "export", "runtime", "scripts", "tests")
PARSERS = {"export": export.cli.parser, "runtime": runtime.cli.parser}
OUT_OF_DATE = "run `python scripts/make_api_docs.py`"


def names(document: Path) -> set[str]:
    """Files and folders of the clone that a document names, in its text and in commands."""
    found = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*", document.read_text())
    return {name.rstrip(".") for name in found}


def commands(document: Path) -> list[str]:
    """The `python -m export` and `python -m runtime` commands of a document, without comments and redirections."""
    text = document.read_text().replace("`", "\n")
    lines = re.findall(r"python -m (?:export|runtime) [a-z]+ .+", text)
    return [re.split(r"\s{2,}|[<|]", line)[0] for line in lines]


def defined(tree: ast.Module) -> set[str]:
    """Names of a module's functions, classes and constants, and of its classes' methods as `Class.method`."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)}
    return found


def test_the_python_interface_is_up_to_date() -> None:
    assert make_api_docs.API.read_text() == make_api_docs.api(), OUT_OF_DATE


def test_the_table_of_options_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == make_api_docs.between(readme, "options", markdown_table()), OUT_OF_DATE


@pytest.mark.parametrize("document", [*DOCUMENTS, *FIGURES], ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", document.read_text()) if not link.startswith("http")]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", [*DOCUMENTS, *FIGURES], ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    assert not {name for name in names(document) if not (ROOT / name).exists()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_are_defined_in_the_files_given_for_them(document: Path) -> None:
    places = re.findall(r"`([A-Za-z_][\w.]*)` in `([\w/.]+\.py)`", document.read_text())
    missing = [(name, file) for name, file in places if name not in defined(ast.parse((ROOT / file).read_text()))]
    assert not missing


def test_the_tests_that_the_findings_name_exist() -> None:
    """Every finding of docs/GPU.md names at least one test, by the end of its file's path and its name."""
    text = (ROOT / "docs/GPU.md").read_text()
    missing = []
    for place, name in re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text):
        files = [path for path in (ROOT / "tests").rglob("*.py") if path.as_posix().endswith(f"/{place}")]
        if (ROOT / place).exists() and not name:
            continue
        if len(files) != 1 or (name and name not in defined(ast.parse(files[0].read_text()))):
            missing.append((place, name))
    assert not missing
    section = text.partition("## What the documentation asks for")[2].partition("\n## ")[0]
    findings = [row for row in section.splitlines() if re.match(r"\| \d", row)]
    assert [int(row.split("|")[1]) for row in findings] == list(range(1, 16))
    cells = [row.strip("| ").split("|") for row in findings]
    assert all(len(row) == 6 and "test_" in row[-1] for row in cells)


def test_the_architecture_says_where_things_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for question in ("is drift tested", "a refresh decided", "a GPU graph captured", "is a family added"):
        rows = [line for line in text.splitlines() if line.startswith("|") and question in line]
        assert rows and all(re.search(r"`[\w/.]+(\.py|/)`", row) for row in rows), rows


@pytest.mark.parametrize(
    "command", [command for document in (*DOCUMENTS, *FIGURES) for command in commands(document)]
)  # fmt: skip
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)[2:]
    PARSERS[words[0]]().parse_args(words[1:])


def test_the_example_of_a_policy_decodes(text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of CONTRIBUTING.md, put into POLICIES, is a policy by name with its option."""
    (example,) = re.findall(r"```python\n(@dataclass.+?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    names: dict[str, Any] = {**vars(policies.elastic)}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(policies.POLICIES, "halves", names["Halves"])
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        out = model.generate([1, 2, 3], "halves", gen_length=16, least=3, stop_at_eos=False)
    assert [len(event.committed) for event in out.trace] == [8, 4, 3, 1]


def test_the_changelog_has_an_entry_for_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
