"""The wheel carries everything: installed outside the clone, it builds and runs the demo."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.cases import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, cwd=out)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_all_rooms_and_the_demo_checkpoint(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = [p for room in ("engines", "export", "runtime") for p in (ROOT / room).rglob("*")]
    expected = {p.relative_to(ROOT).as_posix() for p in tracked if p.is_file() and "__pycache__" not in p.parts}
    assert expected <= names
    assert {"export/demo/config.json", "export/demo/model.safetensors", "export/demo/tokenizer.json"} <= names
    assert not any(name.startswith(("tests/", "scripts/", "bundles/")) for name in names)


def test_an_installed_wheel_builds_and_answers_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("-c", "import export; print(export.__file__)"), "the modules under test are the wheel's"
    assert "[ok]" in run("-m", "export", "build")
    prompt = "Tom has 10 pens.\na buys 05\nHow many pens?"
    assert "tokens/s" in run("-m", "runtime", "generate", "--prompt", prompt, "--gen-length", "32")
