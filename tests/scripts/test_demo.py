"""The demo compares like with like, and says what each row is."""

import re
from pathlib import Path

import pytest

import export
from scripts import demo


@pytest.mark.slow
def test_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "DEFAULT_BUNDLE", export.build("demo", tmp_path / "bundle"))
    monkeypatch.setattr(demo, "PROBLEMS", (("programs", 4),))
    demo.main()
    out = capsys.readouterr().out
    rows = re.findall(r"│ 1 +│ (\w+) +│ (\w+) +│ (\w+) +│ (\d+) ", out)
    assert [row[:3] for row in rows] == [(policy, name, "correct") for policy, name in demo.WAYS]
    elastic, full, eager = (int(row[3]) for row in rows)
    assert elastic < full == eager, "one policy takes the same steps on both back ends"
    assert " ".join(out.split()).count("CPU, 1 threads") == 2 and "the baseline of every comparison" in " ".join(
        out.split()
    )
