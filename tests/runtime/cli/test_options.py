"""A decoding option is written down once: everything else follows from its field."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import runtime
import runtime.cli
from engines.defaults import set_defaults
from engines.errors import BundleError, OptionError
from engines.options import option, options_of
from runtime.cli.options import given_options, markdown_table, policy_options
from runtime.decoding.policies import POLICIES, Dual, Elastic, Full
from runtime.decoding.request import OPTIONS
from runtime.evaluation.exact_match import key_of
from tests.support.cases import edit_manifest, refused


@dataclass(frozen=True)
class Patient(Elastic):
    """A policy with one option more."""

    patience: int = option(7, "steps to wait", low=1)


def test_a_new_option_needs_its_field_only(text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line, help, Python interface, checks, keys of evaluation results and the table of the documents."""
    monkeypatch.setitem(POLICIES, "elastic", Patient)
    args = runtime.cli.parser().parse_args(["generate", "--prompt", "Hi", "--patience", "3"])
    assert given_options(args) == {"patience": 3}
    (command,) = runtime.cli.parser()._subparsers._group_actions  # type: ignore[union-attr]
    shown = " ".join(command.choices["generate"].format_help().split())  # type: ignore[call-overload,index]
    assert "--patience N steps to wait (default: the bundle's, or 7)" in shown
    assert "`--patience`" in markdown_table()
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        assert vars(model.resolve(None, {"patience": 3})[0])["patience"] == 3
        assert key_of(model, "sums", None, {"patience": 3})["patience"] == 3
        with refused(OptionError, "patience must be a whole number from 1 up, got 0"):
            Patient(patience=0).check(model.bundle.capacity, 8)
        with refused(OptionError, "policy full does not use patience"):
            model.generate("Hi", "full", patience=3)


def test_every_option_is_an_argument_and_a_keyword() -> None:
    names = {about.name for about, _ in policy_options()} | set(OPTIONS)
    args = runtime.cli.parser().parse_args(["generate", "--prompt", "Hi"])
    assert given_options(args) == {}, "what is not given is missing"
    text = "".join(f"`{about.flag}`" for about in (*OPTIONS.values(), *(about for about, _ in policy_options())))
    assert all(flag in markdown_table() for flag in text.split("``"))
    for method in (runtime.Runtime.generate, runtime.Runtime.stream):
        assert names < set(inspect.signature(method).parameters)


def test_options_of_one_name_are_of_one_kind() -> None:
    """Policies that share an option's name share its type, so that one argument serves them all."""
    for about, users in policy_options():
        kinds = {(o.type, o.optional, o.choices) for o in (options_of(POLICIES[user])[about.name] for user in users)}
        assert len(kinds) == 1, about.name


@pytest.fixture
def model(bundle_copy: Path) -> Any:
    """A bundle with decoding defaults of its own."""
    set_defaults(bundle_copy, {"window": 8, "gamma": 0.8, "max_masks": 32, "eps": 0.01}, "calibration.json", {})
    with runtime.load(bundle_copy, "onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("policy", "options"),
    [(Elastic(), {}), (Elastic(window=4), {"window": 4}),
     (Elastic(window=16, threshold=0.9), {"window": 16, "threshold": 0.9}),
     (Elastic(tokens_per_step=2), {"tokens_per_step": 2}), (Elastic(max_masks=None), {"max_masks": None}),
     (Full(steps=4, block_length=8), {"steps": 4, "block_length": 8}), (Dual(steps=8), {"steps": 8}), (Dual(), {})],
    ids=str,
)  # fmt: skip
def test_a_policy_object_is_as_good_as_its_name(model: runtime.Runtime, policy: Any, options: dict[str, Any]) -> None:
    """Fields that are not given come from the bundle's defaults either way."""
    by_object, _ = model.resolve(policy, {})
    by_name, _ = model.resolve(policy.name, options)
    assert by_object == by_name
    one, other = model.generate("Hi", policy, gen_length=8), model.generate("Hi", policy.name, gen_length=8, **options)
    assert one.sequence == other.sequence and one.steps == other.steps
    if isinstance(by_object, Elastic):
        assert by_object.gamma == 0.8 and by_object.window == options.get("window", 8)
        assert by_object.max_masks == (None if "max_masks" in options else 32), "none lifts the bundle's limit"
    with pytest.raises(OptionError, match="given in the policy and by name"):
        model.generate("Hi", Elastic(window=4), gen_length=8, window=4)


def test_none_on_the_command_line(model: runtime.Runtime) -> None:
    args = runtime.cli.parser().parse_args(["generate", "--prompt", "Hi", "--max-masks", "none", "--window-span", "4"])
    chosen = vars(model.resolve(None, given_options(args))[0])
    assert (chosen["max_masks"], chosen["window_span"], chosen["window"]) == (None, 4, 8)


def test_defaults_that_no_policy_has_are_refused(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda content: content["defaults"].update(horizon=32))
    with refused(BundleError, "unknown options ['horizon']", "generation_config.json", "python -m export build"):
        runtime.load(bundle_copy)
