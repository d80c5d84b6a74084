"""Who imports whom, and which packages a machine that only runs bundles needs."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import export
import runtime
from engines import __version__
from engines.registry import BACKENDS
from scripts import import_graph
from scripts.import_graph import PRODUCT, imported
from tests.support.cases import ROOT, sentence

DEVICES = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "safetensors", "polygraphy", "transformers"}
# What a machine that only runs bundles on ONNX Runtime does not have, and the modules that need some of it.
BUILD_ONLY = ("torch", "onnx", "safetensors", "polygraphy", "tensorrt", "tensorrt_rtx", "transformers")
NEED_THEM = {
    "engines.eager.layers",
    "engines.eager.vision_layers",
    "engines.eager.vision",
    BACKENDS["eager"].module,
}
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


def blocked(code: str, *argv: object) -> "subprocess.CompletedProcess[str]":
    """Run code in an interpreter in which nothing that only a build needs can be imported."""
    command = [sys.executable, "-c", BLOCK + code, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def trees(*packages: str) -> dict[str, ast.Module]:
    return {name: source.tree for name, source in import_graph.read(ROOT, packages).items()}


def used(tree: ast.AST) -> set[str]:
    """Top-level packages that a file imports."""
    return {module.split(".")[0] for module, _ in imported(tree)}


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


@pytest.mark.slow
def test_every_module_imports_without_the_packages_of_a_build() -> None:
    names = [name for name in trees("engines", "runtime") if name not in NEED_THEM and "__main__" not in name]
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


@pytest.mark.slow
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


# The packages


def test_the_tree_has_no_import_problem() -> None:
    """No circle, nothing upwards, no use of another file's private names, no file of the product too long."""
    assert import_graph.problems(import_graph.read()) == []


BROKEN = {
    "engines/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engines.b\n",
    "engines/b.py": "def late():\n    from engines import a\n    return a\n",
    "engines/x/one.py": "from engines.y import two\n_secret = 1\n",
    "engines/y/two.py": "class Base:\n    _kept = 0\n    def _hook(self): ...\n",
    "engines/y/three.py": "from engines.x import four\nfrom engines.y.two import Base\n"
    "class Near(Base):\n    def f(self):\n        return self._hook()\n",
    "engines/x/four.py": "from engines.y.two import Base\nclass Far(Base):\n    def f(self):\n        self._hook()\n",
    "engines/up.py": "import runtime.api\n",
    "runtime/api.py": "import export.build\nfrom engines.x.one import _secret\nprint(_secret)\n",
    "runtime/long.py": "x = 1\n" * 251,
    "export/build.py": "import engines.y.two as two\nprint(two.Base()._kept)\n",
    "scripts/tool.py": "import runtime.api, export.build\nfrom engines.y.two import Base\nprint(Base()._kept)\n",
    "tests/test_it.py": "from engines.y.two import Base\nprint(Base()._kept)\n",
}


def test_each_import_problem_is_found(tmp_path: Path) -> None:
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(import_graph.problems(import_graph.read(tmp_path))) == {
        "circle: engines.a -> engines.b -> engines.a",
        "circle: engines.x -> engines.y -> engines.x",
        "engines.up imports runtime.api",
        "runtime.api imports export.build",
        "runtime.api imports _secret of engines.x.one",
        "engines.x.four, line 4, uses self._hook, which other files define",
        "export.build, line 2, uses two.Base()._kept, which other files define",
        "scripts.tool, line 3, uses Base()._kept, which other files define",
        "runtime.long has 251 lines, more than 250",
    }


@pytest.mark.slow
def test_the_picture_of_the_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.import_graph"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    found = import_graph.problems(import_graph.read())
    verdict = found or ["no circle, nothing imports upwards, no file over 250 lines"]
    assert done.returncode == bool(found) and done.stdout.splitlines()[-len(verdict) :] == verdict
    assert "\n  errors (" in done.stdout and "\nruntime: " in done.stdout


def test_imports_run_one_way() -> None:
    forbidden = {"engines": {"export", "runtime"}, "runtime": {"export"}, "export": {"runtime"}}
    seen = 0
    for name, tree in trees(*PRODUCT).items():
        package = name.split(".")[0]
        for module, _ in imported(tree):
            top = module.split(".")[0]
            seen += top in PRODUCT
            assert top not in forbidden[package] | {"scripts", "tests"}, f"{name} imports {module}"
            cli = f"{package}.cli"
            assert name.startswith(cli) or not module.startswith(cli), f"{name} imports a command line"
    assert seen > 80


def test_the_runtime_imports_no_tensor_library() -> None:
    """Nor does what describes a bundle: only back ends and a build do."""
    found = trees("engines", "runtime")
    for name in [*(n for n in found if n.startswith("runtime")), "engines.bundle", "engines.model", "engines.registry"]:
        assert not used(found[name]) & DEVICES, f"{name} imports {used(found[name]) & DEVICES}"


def test_back_ends_import_only_what_is_theirs() -> None:
    found = trees("engines")
    for name, back_end in BACKENDS.items():
        packages = used(found[back_end.module]) & DEVICES
        if name == "tensorrt":  # found and imported by name, in engines.trt.package
            assert not packages, packages
            continue
        assert packages >= set(back_end.packages) and packages <= {*back_end.packages, "safetensors"}, (name, packages)
        others = {other.module for key, other in BACKENDS.items() if key != name}
        assert not others & {module for module, _ in imported(found[back_end.module])}


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
    for name, tree in trees("export", "runtime").items():
        text = " ".join(strings(tree)).lower()
        found[name] = {n for n in names if n in text}
    assert found["export.compilers"], "the search finds something"
    assert {name: f for name, f in found.items() if f and name not in allowed} == {}


def test_a_family_is_named_in_its_own_file_only() -> None:
    found = {name for name, tree in trees(*PRODUCT).items() if "llada" in " ".join(strings(tree)).lower()}
    outside = {name for name in found if not name.startswith("export.checkpoint.families.")}
    assert outside <= {"export.cli", "runtime.cli"} and "export.checkpoint.families.llada" in found


# Public names


def test_public_names() -> None:
    assert sorted(runtime.__all__) == [
        "Block", "Dual", "Elastic", "Full", "Interval", "Output", "Prefix", "Runtime", "StepEvent", "Timesteps",
        "__version__", "load",
    ]  # fmt: skip
    assert sorted(export.__all__) == ["__version__", "build"]
    assert runtime.__version__ == export.__version__ == __version__
    for package in (runtime, export):
        for name in set(package.__all__) - {"__version__"}:
            assert callable(getattr(package, name)) and name in dir(package)
    with pytest.raises(AttributeError, match="'runtime' has no attribute 'nothing'"):
        runtime.nothing  # noqa: B018


def python(code: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("package", ["export", "runtime"])
def test_a_package_imports_nothing_until_it_is_used(package: str) -> None:
    code = f"import sys; before = set(sys.modules); import {package}; print(*sorted(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in python(code, cwd=ROOT).stdout.split()}
    assert {"engines", package} <= loaded
    assert not loaded & {"numpy", "torch", "onnx", "onnxruntime", "tokenizers", "rich", "argparse"}, loaded


def test_build_is_the_function(tmp_path: Path) -> None:
    """Also after the module `export.build` was imported, which Python makes an attribute of the package."""
    code = "import export; import export.build; from export.build import build; print(export.build is build)"
    assert python(code, cwd=ROOT).stdout == "True\n"


@pytest.mark.parametrize(
    ("package", "file"),
    [("export", "runtime.py"), ("runtime", "export.py"), ("runtime", "export/__init__.py"), ("export", "engines.py"),
     ("runtime", "engines/__init__.py")],
)  # fmt: skip
def test_a_foreign_module_of_the_same_name(package: str, file: str, tmp_path: Path) -> None:
    """A user's file in the working folder hides a package of ours: the error names it and says what to do."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    done = python(f"import {package}", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    sentence(last, "ImportError: ", str(tmp_path / file), "elastic-diffusion", "rename", "another folder")


def test_a_folder_of_the_same_name_hides_nothing(tmp_path: Path) -> None:
    """One without `__init__.py` comes after ours, wherever it is."""
    for name in PRODUCT:
        (tmp_path / name).mkdir()
    done = python("import export, runtime", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")


def test_every_module_has_a_docstring() -> None:
    for name, tree in trees(*PRODUCT).items():
        assert not tree.body or ast.get_docstring(tree), name
