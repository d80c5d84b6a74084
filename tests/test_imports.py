"""Who imports whom: the rooms, and what a machine that only runs bundles need not have."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import export
import runtime
from engines.registry import BACKENDS
from tests.support.cases import ROOT, sentence

ROOMS = ("engines", "export", "runtime")
DEVICES = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "safetensors", "polygraphy"}
# What a machine that runs bundles on ONNX Runtime lacks, and the modules that may need it.
BUILD_ONLY = ("torch", "onnx", "safetensors", "polygraphy", "tensorrt", "tensorrt_rtx")
NEED_THEM = {
    "engines.eager.layers",
    "engines.eager.vision_layers",
    "engines.eager.vision",
} | {module for name, (module, *_) in BACKENDS.items() if name not in ("onnxruntime", "tensorrt")}
BLOCK = f"""
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BUILD_ONLY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
for name in {BUILD_ONLY!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} was not blocked")
"""


def modules(*rooms: str) -> Iterator[tuple[str, Path]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def blocked(code: str, *argv: object) -> "subprocess.CompletedProcess[str]":
    """Run code in an interpreter in which nothing that only a build needs can be imported."""
    command = [sys.executable, "-c", BLOCK + code, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports anywhere, and whether only for annotations."""
    typed = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are written in full"
            yield node.module, id(node) in typed
            yield from ((f"{node.module}.{alias.name}", id(node) in typed) for alias in node.names)


def strings(tree: ast.AST) -> Iterator[str]:
    """Literal text of a file, the docstrings left out."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


# Without the packages of a build


def test_every_module_imports_without_the_packages_of_a_build() -> None:
    names = [name for name, _ in modules("engines", "runtime") if name not in NEED_THEM and "__main__" not in name]
    assert len(names) > 20 and {"engines.ort.model", "engines.trt.model", "runtime.cli"} < set(names)
    code = """
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""
    done = blocked(code, *names)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert set(names) <= loaded and not loaded & set(BUILD_ONLY)


@pytest.mark.parametrize("name", sorted(NEED_THEM))
def test_the_others_are_rightly_left_out(name: str) -> None:
    """A module on the list does need one of the packages: otherwise the list is too long."""
    done = blocked(f"import {name}")
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


def test_decoding_without_the_packages_of_a_build(golden_bundle: Path, golden: runtime.Runtime) -> None:
    """A bundle is loaded and decoded on ONNX Runtime: the tokens of this process, for two policies."""
    code = """
import runtime
with runtime.load(sys.argv[1], threads=1) as model:
    runs = [model.generate([3, 1, 4, 1, 5], policy, gen_length=24).sequence for policy in ("elastic", "dual")]
    print(json.dumps([model.backend, runs, sorted(m for m in sys.modules if "." not in m)]))
"""
    done = blocked(code, golden_bundle)
    assert done.returncode == 0, done.stderr
    backend, runs, loaded = json.loads(done.stdout)
    assert backend == "onnxruntime"
    assert runs == [golden.generate([3, 1, 4, 1, 5], p, gen_length=24).sequence for p in ("elastic", "dual")]
    assert runs[0] != runs[1] and not set(loaded) & {*BUILD_ONLY, "export"}


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [(("export", "build"), 1, ("a build needs torch", "not installed", "pip install 'elastic-diffusion[export]'")),
     (("export", "verify", "BUNDLE"), 1, ("eager", "torch", "pip install 'elastic-diffusion[export]'")),
     (("runtime", "verify", "BUNDLE"), 1, ("eager", "torch", "pip install 'elastic-diffusion[export]'")),
     (("export", "inspect", "BUNDLE"), 0, ()), (("export", "build", "--help"), 0, ()), (("runtime", "--help"), 0, ())],
)  # fmt: skip
def test_command_lines_without_the_packages_of_a_build(
    golden_bundle: Path, argv: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    given = [str(golden_bundle) if arg == "BUNDLE" else arg for arg in argv]
    run = """
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""
    done = blocked(run, *given)
    assert done.returncode == code, done.stderr
    if code:
        sentence(done.stderr, "error: ", *words)
    else:
        assert done.stderr == "" and done.stdout


# The rooms


def test_imports_run_one_way() -> None:
    forbidden = {"engines": {"export", "runtime"}, "runtime": {"export"}, "export": {"runtime"}}
    seen = 0
    for name, path in modules(*ROOMS):
        room = name.split(".")[0]
        for module, _ in imported(ast.parse(path.read_text())):
            top = module.split(".")[0]
            seen += top in ROOMS
            assert top not in forbidden[room] | {"scripts", "tests"}, f"{name} imports {module}"
            cli = f"{room}.cli"
            assert name.startswith(cli) or not module.startswith(cli), f"{name} imports a command line"
    assert seen > 80


def test_the_runtime_knows_no_device() -> None:
    """Neither decoding nor what describes a bundle imports a tensor library; a back end does, and a build."""
    light = [name for name, _ in modules("runtime")] + ["engines.bundle", "engines.model", "engines.registry"]
    paths = dict(modules(*ROOMS))
    for name in light:
        used = {m.split(".")[0] for m, typed in imported(ast.parse(paths[name].read_text())) if not typed}
        assert not used & DEVICES, f"{name} imports {used & DEVICES}"


def test_back_ends_import_only_what_is_theirs() -> None:
    paths = dict(modules("engines"))
    for name, (module, _, packages, _) in BACKENDS.items():
        used = {m.split(".")[0] for m, _ in imported(ast.parse(paths[module].read_text()))} & DEVICES
        if name == "tensorrt":  # found and imported by name, in engines.trt.package
            assert not used, used
            continue
        assert used >= set(packages) and used <= {*packages, "safetensors"}, (name, used)
        others = {m for other, (m, *_) in BACKENDS.items() if other != name}
        assert not others & {m for m, _ in imported(ast.parse(paths[module].read_text()))}


def test_back_end_names_stay_where_they_belong() -> None:
    """In engines/, in option parsing and with the compilers: everything else takes them as they come."""
    names = set(BACKENDS)
    allowed = {
        "export.cli",
        "runtime.cli",
        "runtime.cli.commands",
        "runtime.cli.bench",
        "export.compilers",
        "export.compilers.onnxruntime",
        "export.compilers.tensorrt",
        "export.compilers.tensorrt_engine",
        "export.options",
        "export.graphs.quantize",
    }
    found = {}
    for name, path in modules("export", "runtime"):
        text = " ".join(strings(ast.parse(path.read_text()))).lower()
        found[name] = {n for n in names if n in text}
    assert found["export.compilers"], "the search finds something"
    assert {name: f for name, f in found.items() if f and name not in allowed} == {}


def test_a_family_is_named_in_its_own_file_only() -> None:
    found = {
        name for name, path in modules(*ROOMS) if "llada" in " ".join(strings(ast.parse(path.read_text()))).lower()
    }
    assert (
        found
        <= {"export.checkpoint.families.llada", "export.checkpoint.families.llava_llada", "export.cli", "runtime.cli"}
        and "export.checkpoint.families.llada" in found
    )


# Public names


def test_public_names() -> None:
    assert sorted(runtime.__all__) == ["Output", "Runtime", "StepEvent", "load"]
    assert sorted(export.__all__) == ["build"]
    for package in (runtime, export):
        for name in package.__all__:
            assert callable(getattr(package, name))


def test_every_module_says_what_it_is() -> None:
    for name, path in modules(*ROOMS):
        assert not path.read_text() or ast.get_docstring(ast.parse(path.read_text())), name
