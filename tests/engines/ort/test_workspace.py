"""The arrays that sessions are bound to: an interrupted binding is made again."""

from pathlib import Path
from typing import Any, cast

import pytest

import runtime
from engines.ort.model import OnnxRuntimeModel

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Interrupted:
    """A binding that is interrupted right after its n-th value was bound."""

    left = 0

    def __init__(self, binding: Any):
        self.binding = binding

    def __getattr__(self, name: str) -> Any:
        def bind(*values: Any) -> None:
            getattr(self.binding, name)(*values)
            Interrupted.left -= 1
            if Interrupted.left == 0:
                raise KeyboardInterrupt

        return bind


@pytest.mark.parametrize("together", [True, False])
def test_an_interrupted_binding_is_made_again(golden_bundle: Path, together: bool) -> None:
    """Ctrl-C between binding a value and recording it, anywhere in an answer: the next answer is as always."""
    options: dict[str, Any] = {"gen_length": 12, "tokens_per_step": 2, "stop_at_eos": False, "track_num": 2}
    interrupted = 0
    with runtime.load(golden_bundle, "onnxruntime", threads=1) as loaded:
        model = cast(OnnxRuntimeModel, loaded.model)
        if not together:
            del model.sessions["reuse"]
        run = model.sessions.run_bound
        expected = loaded.generate(PROMPT, window=4, **options)
        for at in range(1, 200, 13):
            bindings = model.workspaces[0].bindings
            kept = dict(bindings)
            Interrupted.left = at
            bindings.update({part: Interrupted(binding) for part, binding in kept.items()})
            model.sessions.run_bound = lambda part, binding: run(part, binding.binding)  # type: ignore[method-assign]
            try:
                loaded.generate([*PROMPT, 7, 7], window=8, **options)
            except KeyboardInterrupt:
                interrupted += 1
            bindings.update(kept)
            model.sessions.run_bound = run  # type: ignore[method-assign]
            out = loaded.generate(PROMPT, window=4, **options)
            assert out.sequence == expected.sequence, at
    assert interrupted > 5
