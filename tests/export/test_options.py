"""Options of a build: ranges, and the command line and the keywords that are made from one list of fields."""

import argparse
from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import export
import export.checkpoint
from engines.errors import OptionError
from export import options
from export.compilers import COMPILERS, compiler
from export.options import BuildOptions
from tests.support.cases import refused


@pytest.mark.parametrize(
    ("options", "words"),
    [({"precision": "int8"}, ("precision", "fp32", "int8")),
     ({"backends": ["abacus"]}, ("abacus", "choose", "onnxruntime")),
     ({"max_length": 257}, ("max_length", "1 … 256", "257")), ({"max_length": 0}, ("max_length", "1 … 256", "0")),
     ({"window": 0}, ("window", "1 … 256", "0")), ({"window": 65, "max_length": 64}, ("window", "1 … 64", "65")),
     ({"track_num": 0}, ("track_num", "1 …", "0")), ({"max_batch": 0}, ("max_batch", "1 …", "0"))],
)  # fmt: skip
def test_options_out_of_range(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], words: Any) -> None:
    with refused(OptionError, *words):
        export.build(tiny_checkpoint, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists(), "nothing was written"


def test_quantised_weights_are_onnxruntimes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with refused(OptionError, "int8, int4", "int2"):
        export.build(tiny_checkpoint, tmp_path / "b", weights="int2")
    with refused(OptionError, "--weights is an option of back end onnxruntime", "--backend onnxruntime"):
        export.build(tiny_checkpoint, tmp_path / "b", weights="int4", backends=[])


# One list of fields

# For every option a value other than the default, and how it is written on the command line.
VALUES: dict[str, tuple[Any, str]] = {
    "checkpoint": ("c", "--checkpoint c"), "out": (Path("o"), "--out o"), "precision": ("bf16", "--bf16"),
    "backends": (["tensorrt", "onnxruntime"], "--backend tensorrt --backend onnxruntime"),
    "max_length": (64, "--max-length 64"), "window": (8, "--window 8"), "track_num": (2, "--track-num 2"),
    "max_batch": (3, "--max-batch 3"), "mask_id": (5, "--mask-id 5"), "eos_id": (2, "--eos-id 2"),
    "flavour": ("tensorrt_rtx", "--flavour tensorrt_rtx"),
    "capabilities": (["8.9", "12.0"], "--capability 8.9 --capability 12.0"),
    "compatible": (["ampere", "version"], "--compatible ampere --compatible version"),
    "weights": ("int4", "--weights int4"),
    "force": (True, "--force"),
}  # fmt: skip


def parsed(words: str) -> BuildOptions:
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_arguments(parser)
    return options.from_arguments(parser.parse_args(words.split()), lambda *_: None)


def test_the_command_line_has_every_option() -> None:
    """What a flag sets is what the keyword of `export.build` sets, one by one and all together."""
    assert parsed("") == BuildOptions()
    for name, (value, words) in VALUES.items():
        assert parsed(words) == BuildOptions(**{name: value}) != BuildOptions(), name
    everything = " ".join(words for _, words in VALUES.values())
    assert parsed(everything) == BuildOptions(**{name: value for name, (value, _) in VALUES.items()})
    assert parsed("--backend none").backends == []


def test_the_arguments_of_options() -> None:
    """What is written down of a build is what the command line reads again."""
    everything = BuildOptions(**{name: value for name, (value, _) in VALUES.items()})
    chosen = ("checkpoint", "out", "force")
    for made in (BuildOptions(), everything, BuildOptions(precision="bf16", backends=[], window=3)):
        kept = {name: getattr(made, name) for name in chosen}
        assert replace(parsed(" ".join(options.arguments(made))), **kept) == made
    assert options.arguments(BuildOptions()) == ()


def test_the_keywords_of_build() -> None:
    names = [*VALUES, "progress"]
    assert [field.name for field in fields(BuildOptions)] == list(signature(export.build).parameters) == names
    assert export.build.__name__ == "build" and "precision" in str(export.build.__doc__)
    with pytest.raises(TypeError, match="colour"):
        export.build(colour=1)  # type: ignore[call-arg]


def test_every_option_has_a_help() -> None:
    for field in fields(BuildOptions):
        assert field.name == "progress" or len(field.metadata["help"]) > 20, field.name


def test_options_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        BuildOptions().window = 3  # type: ignore[misc]


def test_compilers_are_those_of_the_options() -> None:
    assert sorted(COMPILERS) == list(options.COMPILED)
    for name in COMPILERS:
        assert compiler(name).name == name


@pytest.mark.parametrize(
    ("keywords", "flag", "backend"),
    [({"flavour": "tensorrt"}, "--flavour", "tensorrt"), ({"capabilities": ["8.9"]}, "--capability", "tensorrt"),
     ({"weights": "int4", "backends": []}, "--weights", "onnxruntime")],
)  # fmt: skip
def test_options_of_a_back_end_that_is_not_built(
    tiny_checkpoint: Path, tmp_path: Path, keywords: dict[str, Any], flag: str, backend: str
) -> None:
    with refused(
        OptionError, f"{flag} is an option of back end {backend}", f"--backend {backend}", f"leave {flag} out"
    ):
        export.build(tiny_checkpoint, tmp_path / "b", **keywords)
    assert not (tmp_path / "b").exists()
