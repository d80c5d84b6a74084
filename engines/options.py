"""Options, each written down once: a dataclass field with its type, default, range and help.

From the fields of an options class come its checks, the arguments of a command
line, the keywords of the Python interface, and tables in the documents.
"""

import argparse
import inspect
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from engines.errors import OptionError


class Unset(Enum):
    """The type of UNSET."""

    UNSET = "not given"

    def __repr__(self) -> str:
        return self.name


UNSET = Unset.UNSET  # an option that is not given; None is a value, and lifts a limit where the option allows it


@dataclass(frozen=True)
class Option:
    """What is known about one option.

    `type` is bool, int, float or str; with `optional` None is allowed too, and with
    `many` several values of the type, one after another on a command line. A
    number lies in `low` … `high` (None: no bound; `above`: `low` itself is
    excluded), and `reason` says in a few words why. An option that is given
    replaces the default of each option that `excludes` names.
    """

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    reason: str = ""
    choices: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    group: str = ""
    many: bool = False

    @property
    def flag(self) -> str:
        """The name on a command line, such as `--track-num`."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, high: float | None = None, reason: str = "") -> None:
        """Raise OptionError unless `value` is of the option's type and range; `high` and `reason` override its own."""
        if value is None and self.optional:
            return
        if self.many and isinstance(value, list | tuple):
            for one in value:
                replace(self, many=False, optional=False).check(one, high, reason)
        elif self.choices:
            if value not in self.choices:
                raise OptionError(f"{self.name} must be one of {', '.join(self.choices)}, got {value!r}")
        elif self.type in (int, float):
            self._check_number(value, self.high if high is None else high, reason or self.reason)
        elif not isinstance(value, self.type):
            kind = "true or false" if self.type is bool else "text"
            raise OptionError(f"{self.name} must be {kind}, got {value!r}")

    def _check_number(self, value: Any, high: float | None, reason: str) -> None:
        kind = Integral if self.type is int else Real
        number = isinstance(value, kind) and not isinstance(value, bool)
        low = self.low
        if number and (low is None or value > low or (value == low and not self.above)):
            if high is None and value < float("inf"):
                return
            if high is not None and value <= high:
                return
        what = "a whole number" if self.type is int else "a number"
        if low is None:
            span = f"be {what}"
        elif high is None:
            span = f"be {what} {'above' if self.above else 'from'} {low:g}{'' if self.above else ' up'}"
        else:
            span = f"lie in ({low:g}, {high:g}]" if self.above else f"lie in {low} … {high}"
        raise OptionError(f"{self.name} must {span}{reason and f' ({reason})'}, got {value}")

    def parse(self, text: str) -> Any:
        """The value that `text` stands for on a command line; raises ValueError for none."""
        if self.optional and not self.many and text == "none":
            return None
        return from_shell(text) if self.type is str else self.type(text)


def option(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, above: bool = False,
    reason: str = "", choices: tuple[str, ...] = (), excludes: tuple[str, ...] = (), group: str = "",
) -> Any:  # fmt: skip
    """A dataclass field that is an option; its annotation is the type, with `| None` where None is a value."""
    about = {
        "help": help, "low": low, "high": high, "above": above, "reason": reason, "choices": choices,
        "excludes": excludes, "group": group,
    }  # fmt: skip
    return field(default=default, metadata={"option": about})


@cache
def options_of(cls: Any) -> dict[str, Option]:
    """The options of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(cls)
    found = {}
    for item in fields(cls):
        if "option" in item.metadata:
            kind, optional = _plain(hints[item.name])
            many = get_origin(kind) is tuple
            default = None if item.default is MISSING else item.default
            about = item.metadata["option"] | {"many": many}
            found[item.name] = Option(item.name, get_args(kind)[0] if many else kind, optional, default, **about)
    return found


def from_shell(text: str) -> str:
    """An argument of a command line as the UTF-8 it was typed in, where the locale decoded it otherwise."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def listed(value: Any) -> tuple[Any, ...]:
    """The values of an option that takes many: none for None, one for a value that is no list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _plain(hint: Any) -> tuple[type, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(hint) if part is not type(None))
        return kind, True
    return hint, False


def check_options(options: Any, limits: Mapping[str, tuple[float, str]] | None = None) -> None:
    """Check every option of a dataclass instance; raises OptionError.

    `limits` has upper bounds that are known only now, {name: (bound, reason)}.
    """
    cls: Any = type(options)
    for name, about in options_of(cls).items():
        about.check(getattr(options, name), *(limits or {}).get(name, ()))


def values_of(options: Any) -> dict[str, Any]:
    """The values of the options of a dataclass instance, by name."""
    cls: Any = type(options)
    return {name: getattr(options, name) for name in options_of(cls)}


def within(name: str, value: Any, low: float, high: float, reason: str) -> None:
    """Raise OptionError unless a number lies in `low` … `high`; whole numbers only if `low` is one."""
    kind = int if isinstance(low, int) else float
    Option(name, kind, False, None, "", low, high, reason=reason).check(value)


def add_argument(group: Any, about: Option, default: str | None = None) -> None:
    """Add an option to a parser or an argument group. Not given, it is missing in the parsed namespace.

    `default` is shown in the help in place of the field's own default.
    """
    shown = default or spelled(about.default)
    text = f"{about.help}{' (repeatable)' if about.many else ''} (default: {shown})".replace("%", "%%")
    if about.type is bool:
        group.add_argument(about.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif about.choices:
        group.add_argument(about.flag, choices=about.choices, default=argparse.SUPPRESS, help=text)
    else:
        metavar = {int: "N", float: "X", str: "TEXT"}[about.type]
        group.add_argument(
            about.flag, type=_parser(about), metavar=metavar, default=argparse.SUPPRESS, help=text,
            action="append" if about.many else "store",
        )  # fmt: skip


def _parser(about: Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return about.parse(text)

    or_none = about.optional and not about.many
    parse.__name__ = about.type.__name__ + (" or none" if or_none else "")  # argparse names it in its errors
    return parse


def spelled(value: Any) -> str:
    """A value as a user writes it: none, on, off, or the value itself."""
    if value is None:
        return "none"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def document_keywords(function: Callable[..., Any], *classes: type) -> None:
    """Give `function`, which takes `**options`, a signature that lists the options of `classes` as keywords."""
    signature = inspect.signature(function)
    listed: dict[str, inspect.Parameter] = {}
    for cls in classes:
        for name, about in options_of(cls).items():
            kind = about.type | list[about.type] if about.many else about.type  # type: ignore[name-defined]
            annotation = kind | None if about.optional else kind
            listed.setdefault(
                name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=UNSET, annotation=annotation)
            )
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*kept, *listed.values()])  # type: ignore[attr-defined]
