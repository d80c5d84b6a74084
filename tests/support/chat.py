"""Conversations of tests: one turn, and an interruption in the middle of it."""

from typing import Any

import pytest

from runtime.chat import Chat
from runtime.decoding.controller import Controller
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output

SHORT: dict[str, Any] = {"gen_length": 8}


def answer(chat: Chat, text: str) -> Output:
    """The Output of one turn."""
    *_, out = chat.say(text)
    assert isinstance(out, Output)
    return out


def stop_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Raise KeyboardInterrupt in this step of the first answer."""
    step, left = Controller.step, [1]

    def stopping(self: Controller) -> StepEvent:
        if self.steps == number and left:
            left.pop()
            raise KeyboardInterrupt
        return step(self)

    patch.setattr(Controller, "step", stopping)
