"""Decoding options on the command line and in the documents, generated from the fields of policies and request."""

import argparse
from collections.abc import Iterator
from typing import Any

from engines.options import Option, add_argument, options_of, spelled
from runtime.decoding.policies import POLICIES
from runtime.decoding.request import OPTIONS

GROUPS = {"answer": "the answer", "sampling": "sampling"}  # of the request's options


def policy_options() -> Iterator[tuple[Option, list[str]]]:
    """Each option of the policies, and the names of those that use it."""
    names = dict.fromkeys(name for cls in POLICIES.values() for name in options_of(cls))
    for name in names:
        users = [policy for policy, cls in POLICIES.items() if name in options_of(cls)]
        yield options_of(POLICIES[users[0]])[name], users


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add --policy and every policy's options, in a group for each set of policies that share some."""
    top = parser.add_argument_group("policy", "an option that the chosen policy does not use is refused")
    top.add_argument(
        "--policy", choices=list(POLICIES), default=argparse.SUPPRESS,
        help="what a step computes and commits (default: the bundle's, or elastic)",
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for about, users in policy_options():
        title = f"options of {', '.join(users)}"
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        add_argument(groups[title], about, default_of(about.name, users))


def default_of(name: str, users: list[str]) -> str:
    """An option's default as a user reads it, by policy where they differ."""
    found: dict[str, list[str]] = {}
    for policy in users:
        own = spelled(options_of(POLICIES[policy])[name].default)
        found.setdefault(own, []).append(policy)
    shown = ", ".join(value if len(found) == 1 else f"{value} for {' and '.join(of)}" for value, of in found.items())
    from_bundle = any(POLICIES[policy].bundle_defaults for policy in users)
    return f"the bundle's, or {shown}" if from_bundle else shown


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a request in their groups."""
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for about in OPTIONS.values():
        add_argument(groups[about.group], about)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The decoding options that were given on the command line, by name, the policy left out."""
    names = option_names()
    return {name: value for name, value in vars(args).items() if name in names}


def option_names() -> set[str]:
    """The names of all decoding options, the policy left out."""
    return {*OPTIONS, *(about.name for about, _ in policy_options())}


def policy_of(args: argparse.Namespace) -> str | None:
    """The policy's name if it was given."""
    return getattr(args, "policy", None)


def markdown_table() -> str:
    """The policies and their options as a Markdown table, for the README."""
    lines = ["| policy | what a step computes | options |", "|---|---|---|"]
    for policy, cls in POLICIES.items():
        flags = " ".join(f"`{about.flag}`" for about in options_of(cls).values())
        lines.append(f"| `{policy}` | {cls.title} | {flags} |")
    requests = " ".join(f"`{about.flag}`" for about in OPTIONS.values())
    return "\n".join([*lines, f"| all | | {requests} |"]) + "\n"
