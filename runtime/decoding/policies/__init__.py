"""Policies: which rows a step computes, which masks it predicts, how many it commits.

Each is a frozen dataclass whose fields are the options it uses. A policy holds no
tensor of a device; the one loop of `runtime.decoding.generate` runs them all.
"""

from collections.abc import Mapping
from typing import Any

from engines.config import ModelConfig
from engines.errors import OptionError
from engines.options import UNSET, options_of
from runtime.decoding.policies.base import Policy
from runtime.decoding.policies.block import Block
from runtime.decoding.policies.blocks import Dual, Full, Interval, Prefix
from runtime.decoding.policies.elastic import SCOPES, STARTS, Elastic
from runtime.decoding.policies.timesteps import Timesteps

__all__ = [
    "FULL_ATTENTION",
    "POLICIES",
    "SCOPES",
    "STARTS",
    "Block",
    "Dual",
    "Elastic",
    "Full",
    "Interval",
    "Policy",
    "Prefix",
    "Timesteps",
    "fitting",
    "make_policy",
    "unknown_defaults",
]  # fmt: skip
POLICIES: dict[str, Any] = {cls.name: cls for cls in (Elastic, Full, Timesteps, Prefix, Dual, Interval, Block)}
FULL_ATTENTION = [name for name, cls in POLICIES.items() if not cls.block_causal]
DEFAULT = "elastic"  # where neither the caller nor the bundle names a policy


def make_policy(
    policy: str | Policy, options: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> Policy:
    """A policy by name with `options`, or an instance of one, its other options from the bundle's `defaults`.

    Options that are UNSET count as not given. An option that is given replaces
    the default of those it excludes. Raises OptionError for an unknown policy, an
    option it does not use, one that is given twice, or two that exclude each other.
    """
    given = {name: value for name, value in (options or {}).items() if value is not UNSET}
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise OptionError(f"unknown policy {policy!r}; choose from {', '.join(POLICIES)}")
        cls, own = POLICIES[policy], {}
    else:
        cls, own = type(policy), {name: getattr(policy, name) for name in policy.given}
    known = options_of(cls)
    for name in given:
        if name not in known:
            raise OptionError(f"policy {cls.name} does not use {name}; its options are {', '.join(sorted(known))}")
        if name in own:
            raise OptionError(f"{name} is given in the policy and by name; give it once")
    given |= own
    base = {name: value for name, value in (defaults or {}).items() if name in known and cls.bundle_defaults}
    for name, about in known.items():
        for rival in about.excludes:
            if given.get(name) is not None and given.get(rival) is not None:
                raise OptionError(f"{name} and {rival} exclude each other; give one of them")
            if given.get(rival) is not None:
                base[name] = None
            elif given.get(name) is not None:
                base[rival] = None
    made: Policy = cls(**{**base, **given})
    return made


def fitting(config: ModelConfig) -> list[str]:
    """The policies for a model's attention."""
    causal = config.block_length is not None
    return [name for name, cls in POLICIES.items() if cls.block_causal == causal]


def unknown_defaults(defaults: Mapping[str, Any]) -> list[str]:
    """Decoding defaults of a bundle that no policy has."""
    known = {name for cls in POLICIES.values() if cls.bundle_defaults for name in options_of(cls)}
    return sorted(set(defaults) - known - {"policy"})
