"""How much of a prompt is shared with other requests: a function of the prompt alone."""

from typing import Any

from runtime.text import Text

OTHER = "\ufdd0"  # no character: begins the last message of a prompt that differs from the given one only there


def shared_ids(text: Text, prompt: Any) -> int:
    """How many ids of a prompt are those of the messages before the last, up to the end of a turn; 0 for one message.

    They do not depend on the last message: they are those that a prompt with another one begins with, too. What opens
    the last turn is not among them: masks behind it would be taken for what the user says, which costs a third of the
    demo's answers.
    """
    turns = text.messages(prompt)
    if len(turns) < 2 or not isinstance(turns[-1].get("content"), str):
        return 0
    other = [*turns[:-1], turns[-1] | {"content": OTHER + turns[-1]["content"]}]
    ids, others = text.prompt(turns).tolist(), text.prompt(other).tolist()
    count = next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), 0)
    ends = text.bundle.config.end_ids
    return next((n for n in range(min(count, len(ids) - 1), 0, -1) if ids[n - 1] in ends), 0)
