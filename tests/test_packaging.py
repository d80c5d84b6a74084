"""The wheel is complete: installed outside the clone it builds and runs the demo, and its commands are on the path."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest

from engines import __version__
from tests.support.cases import ROOT

PACKAGES = ("engines", "export", "runtime")
EXTRAS = {"lean", "export", "cpu", "gpu", "rtx", "vision", "plot", "eval", "dev"}
Run = Callable[..., str]


def files(root: Path) -> set[str]:
    """The names of all files of the three packages below `root`."""
    found = [path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: what an earlier build left in the clone must not get into it."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", source / "out", source)
    (made,) = (source / "out").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of the installed wheel in a folder of its own, and returns what it prints."""
    folder = tmp_path_factory.mktemp("elsewhere")
    site = folder / "site"
    pip("install", "--target", site, wheel)
    path = f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": path}

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = call(sys.executable, "-c", "import export; print(export.__file__)")
    assert str(site) in found, "the modules under test are the wheel's"
    return call


def pip(command: str, *words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *map(str, words)], check=True)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files(ROOT)
    demo = {f"export/demo/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert {f"{package}/py.typed" for package in PACKAGES} | demo <= names


@pytest.mark.slow
def test_the_licence_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_metadata(wheel: Path) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == ("elastic-diffusion", __version__)
    assert found["Author"] == "the Elastic Diffusion authors"
    assert found["Requires-Python"] == ">=3.11"
    assert "Operating System :: POSIX :: Linux" in found.get_all("Classifier", [])
    assert set(found.get_all("Provides-Extra", [])) == EXTRAS


def test_errors_name_extras_that_exist() -> None:
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = [listed for text in sources for listed in re.findall(r"\bextra=['\"]([\w,]+)['\"]", text)]
    assert {"cpu", "export"} <= {extra for listed in found for extra in listed.split(",")} <= EXTRAS


@pytest.mark.slow
@pytest.mark.parametrize("command", ["elastic-export", "elastic-run"])
def test_commands_print_the_version_of_the_wheel(run: Run, command: str) -> None:
    assert __version__ in run(command, "--version").split()


@pytest.mark.slow
def test_an_installed_wheel_builds_and_answers(run: Run) -> None:
    assert "[ok]" in run("elastic-export", "build")
    prompt = "Tom has 10 pens.\na buys 05\nHow many pens?"
    assert "tokens/s" in run("elastic-run", "generate", "--prompt", prompt, "--gen-length", "32")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["export", "runtime"])
def test_packages_run_as_modules(run: Run, package: str) -> None:
    assert __version__ in run(sys.executable, "-m", package, "--version").split()
