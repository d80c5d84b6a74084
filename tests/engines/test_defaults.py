"""Decoding defaults of a bundle, changed without a moment in which the bundle is not whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import MANIFEST, Bundle
from engines.defaults import CALIBRATION, calibrations, evidence, set_defaults
from engines.errors import BundleError
from engines.locks import LOCK, locked
from tests.support.cases import refused


def test_new_defaults(bundle_copy: Path) -> None:
    """They are merged into the old ones, and the measurement behind them is one of the bundle's checked files."""
    before = Bundle.open(bundle_copy)
    set_defaults(bundle_copy, {"gamma": 0.8}, "calibration.json", {"trials": [1, 2]})
    after = Bundle.open(bundle_copy)
    after.check()
    assert after.manifest.defaults == before.manifest.defaults | {"gamma": 0.8}
    assert json.loads(after.file("calibration.json").read_text()) == {"trials": [1, 2]}
    assert after.identity != before.identity


def test_new_defaults_again(bundle_copy: Path) -> None:
    """Their measurement has a name of its own, so that what was there is whole to the end."""
    (bundle_copy / "calibration-2.json").write_text("mine")
    set_defaults(bundle_copy, {"gamma": 0.8}, CALIBRATION, {"trials": [1]})
    before = Bundle.open(bundle_copy)

    def cut(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.defaults.write_manifest", cut)
        with refused(BundleError, "No space left on device"):
            set_defaults(bundle_copy, {"gamma": 0.7}, CALIBRATION, {"trials": [2]})
    Bundle.open(bundle_copy).check()
    assert Bundle.open(bundle_copy).identity == before.identity
    set_defaults(bundle_copy, {"gamma": 0.7}, CALIBRATION, {"trials": [2]})
    after = Bundle.open(bundle_copy)
    after.check()
    (name,) = calibrations(after.manifest.files)
    assert (
        evidence(after) == json.loads(after.file(name).read_text()) == {"trials": [2]}
        and after.manifest.defaults["gamma"] == 0.7
    )
    assert not (bundle_copy / CALIBRATION).exists() and (bundle_copy / "calibration-2.json").read_text() == "mine"


def test_defaults_take_the_lock(bundle_copy: Path, tmp_path: Path) -> None:
    before = Bundle.open(bundle_copy).identity
    with locked(bundle_copy), refused(BundleError, "another build", str(bundle_copy), "wait"):
        set_defaults(bundle_copy, {"gamma": 0.8}, CALIBRATION, {})
    assert Bundle.open(bundle_copy).identity == before
    with refused(BundleError, "is no bundle"):
        set_defaults(tmp_path / "copy" / "onnx", {}, CALIBRATION, {})
    assert not (tmp_path / "copy" / "onnx" / LOCK).exists()


def test_defaults_that_cannot_be_written(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = (bundle_copy / MANIFEST).read_bytes()

    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("engines.defaults.write_atomically", read_only)
    with refused(BundleError, f"cannot write {bundle_copy} (Read-only file system); make it writable"):
        set_defaults(bundle_copy, {"gamma": 0.8}, "calibration.json", {})
    assert (bundle_copy / MANIFEST).read_bytes() == raw
