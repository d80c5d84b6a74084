"""Chat templates: rendered as transformers renders them, in a sandbox and within bounds.

A chat template comes with a checkpoint and is untrusted code. It is rendered in Jinja's sandbox, without a loader, and
it ends: loops and calls are counted, and what it makes is measured, against limits that follow from the messages. No
signal and no clock takes part, so that a template can be rendered in any thread.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Messages = list[dict[str, Any]]  # {"role", "content", …} each
STEPS = 100_000, 1_000, 10  # loops and calls of a template: at least, for each message, for each character of them
SIZE = 1 << 20  # characters or items of a value, and characters of the text beyond those of ten times the messages
BITS = 1 << 12  # of an integer
WORD = "wombat"  # content that must come out of a template


@dataclass
class Budget:
    """The loops and calls that are left to a rendering."""

    steps: int

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TemplateError("it loops or calls too often")


_budget: ContextVar[Budget | None] = ContextVar("_budget", default=None)
_size: ContextVar[int] = ContextVar("_size", default=SIZE)


def spend(steps: int) -> None:
    """Count loops or calls of the rendering under way; raises TemplateError beyond its limit."""
    if (budget := _budget.get()) is not None:
        budget.spend(steps)


def bounded(value: Any) -> Any:
    """`value`; raises TemplateError if it is too large."""
    if isinstance(value, int):
        large = value.bit_length() > BITS
    else:
        large = isinstance(value, str | list | tuple) and len(value) > _size.get()
    if large:
        raise TemplateError("it makes a value that is too large")
    return value


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is counted and takes and gives values within bounds."""

    first = 2 if hasattr(function, "jinja_pass_arg") else 1  # of the arguments behind the value

    @functools.wraps(function)  # with the mark by which Jinja passes a context
    def call(*args: Any, **kwargs: Any) -> Any:
        spend(1)
        check_widths(args[first:], kwargs)
        return bounded(function(*args, **kwargs))

    return call


def check_widths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TemplateError for a number that would make a text too wide."""
    if any(isinstance(value, int) and abs(value) > SIZE for value in (*args, *kwargs.values())):
        raise TemplateError("it gives a function a number that is too large")


@pass_context  # so that it is never called when the template is compiled
def counted(context: Any, items: Iterable[Any]) -> Iterable[Any]:
    """What a loop runs over, after its items are counted."""
    found = items if isinstance(items, Sized) else list(items)
    spend(len(found))
    return found


@pass_context
def measured(context: Any, text: str) -> Any:
    """A concatenated text within bounds."""
    return bounded(text)


class Bounds(NodeTransformer):
    """Puts `counted` around what a loop runs over and `measured` around concatenated texts."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "measured", [], [], None, None, lineno=node.lineno)


class Generation(Extension):
    """The tag `generation`, which marks an assistant's text for training; the text stays as it is."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that raises at the first unsafe access, and at the limits; Jinja's own prints nothing and continues."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension])
        self.filters["tojson"] = to_json
        self.filters = {name: guarded(function) for name, function in self.filters.items()}
        self.filters |= {"counted": counted, "measured": measured}
        self.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        Bounds().visit(tree)
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        spend(1)
        if isinstance(function, LoopContext):  # of a recursive loop
            args = tuple(counted(context, items) for items in args)
        if isinstance(getattr(function, "__self__", None), str):
            check_widths(args, kwargs)
        return bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spend(1)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            bounded(1 << min(left.bit_length() * abs(right), BITS))  # the size of the power, not the power
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, Sized) and isinstance(times, int) and len(items) * times > _size.get():
                    raise TemplateError("it makes a value that is too large")
        return bounded(super().call_binop(context, operator, left, right))


class Template:
    """A chat template with its special tokens, their texts by name; raises what Jinja raises for one that is none."""

    def __init__(self, source: str, tokens: dict[str, str]):
        self.tokens = tokens
        self._compiled = Sandbox().from_string(source)

    def render(self, messages: Messages) -> str:
        """The text of a prompt: the messages, and what begins the answer.

        Any exception may be raised: a template can refuse messages, and it is untrusted code.
        """
        characters = sum(len(json.dumps(message)) for message in messages)
        most = SIZE + 10 * characters
        budget = _budget.set(Budget(STEPS[0] + STEPS[1] * len(messages) + STEPS[2] * characters))
        size = _size.set(most)
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            pieces, length = [], 0
            for piece in self._compiled.generate(self.tokens | given):
                length += len(piece)
                if length > most:
                    raise TemplateError("its text is too long")
                pieces.append(piece)
            return "".join(pieces)
        finally:
            _budget.reset(budget)
            _size.reset(size)

    def adapted(self, messages: Messages) -> Messages:
        """The messages with every content as the template reads it: a text, or a list of {"type": "text", "text"}."""
        return [one | {"content": self._adapted(one["content"])} if "content" in one else one for one in messages]

    def _adapted(self, content: Any) -> Any:
        text, parts = self._reads
        if isinstance(content, str):
            return content if text or not parts else as_parts(content)
        return content if parts else joined(content)

    @functools.cached_property
    def _reads(self) -> tuple[bool, bool]:
        """Whether the template reads content that is a text, and content that is a list of parts."""
        of_text, of_parts = self._tried(WORD), self._tried(as_parts(WORD))
        text = WORD in of_text.casefold()
        return text, WORD in of_parts.casefold() and (of_parts == of_text or not text)

    def _tried(self, content: Any) -> str:
        try:
            return self.render([{"role": "user", "content": content}])
        except Exception:  # as of `render`: it does not read this
            return ""


def as_parts(text: str) -> list[dict[str, str]]:
    """A text as a list of one part."""
    return [{"type": "text", "text": text}]


def joined(content: Any) -> str:
    """Content as one text; its parts, if it has several, are lines."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of chat templates: JSON as it is, without the escapes that HTML needs."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """The local time, written as `form` says."""
    return datetime.now().strftime(form)


def refuse(message: str) -> None:
    """The function `raise_exception` of chat templates."""
    raise TemplateError(message)
