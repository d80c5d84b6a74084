"""Decoding defaults that a checkpoint sets."""

from pathlib import Path

import pytest

from engines.errors import CheckpointError
from export.checkpoint.reader import open_checkpoint


def test_generation_defaults(sharded: Path) -> None:
    """What the checkpoint says about decoding is read; other defaults in the file are not ours."""
    path = sharded / "generation_config.json"
    assert open_checkpoint(sharded).decoding() == {"window": 16}
    path.write_text('{"eos_token_id": 62, "elastic": {"threshold": 0.7, "window": 4}}')
    assert open_checkpoint(sharded).decoding() == {"threshold": 0.7, "window": 4}
    for content in ("[]", "{", '{"elastic": [1]}'):
        path.write_text(content)
        with pytest.raises(CheckpointError, match="no JSON object"):
            open_checkpoint(sharded).decoding()
