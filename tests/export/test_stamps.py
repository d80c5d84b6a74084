"""Stamps: files are reused if key and content are unchanged, and made again otherwise."""

from pathlib import Path

import export
import export.checkpoint
from engines.bundle import MANIFEST, STAMPS
from tests.support.builds import content


def test_a_damaged_stamp_is_not_believed(text_checkpoint: Path, text_bundle: Path, bundle_copy: Path) -> None:
    """Many a byte of a stamp changed, in an unfinished build: the next one gives what an undisturbed one gives."""
    stamp = bundle_copy / STAMPS / "onnx-layer_01.onnx.json"
    raw = stamp.read_bytes()
    for at in range(0, len(raw), 17):
        (bundle_copy / MANIFEST).unlink()
        stamp.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        export.build(text_checkpoint, bundle_copy)
        assert content(bundle_copy) == content(text_bundle), at
    for other in (b"", b"[]", b"1", b'{"key": 1}'):
        (bundle_copy / MANIFEST).unlink()
        stamp.write_bytes(other)
        export.build(text_checkpoint, bundle_copy)
        assert content(bundle_copy) == content(text_bundle), other
