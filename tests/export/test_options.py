"""Options of a build: ranges, and the command line and the keywords that are made from one list of fields."""

from pathlib import Path
from typing import Any

import pytest

import export
import export.checkpoint
from engines.errors import OptionError
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
