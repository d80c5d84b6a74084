"""Policies, the sequence and the slot map: host state only, no model."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.config import Capacity
from engines.errors import OptionError
from engines.options import UNSET, options_of
from runtime.decoding.policies import POLICIES, Elastic, make_policy
from runtime.decoding.policies.base import StepPlan
from runtime.decoding.policies.blocks import Full
from runtime.decoding.sequence import NO_POSITIONS, Sequence
from runtime.decoding.slots import SlotMap
from tests.support.cases import refused

CAPACITY = Capacity(max_length=128, window=32, track_num=4, max_batch=1, rows=80)
GEN = 32
MASK, EOS = 99, 98
BLOCKED = ("full", "prefix", "dual", "interval")


def check(name: str, gen_length: int = GEN, **options: Any) -> None:
    make_policy(name, options).check(CAPACITY, gen_length)


def start(prompt: int = 4, gen_length: int = 8, stops: bool = True, ends: tuple[int, ...] = (EOS,)) -> Sequence:
    return Sequence.start(np.arange(prompt), gen_length, MASK, ends, stops)


def run_policy(policy: Any, sequence: Sequence) -> list[StepPlan]:
    """Plans of a whole run in which the first of the candidates are the most confident."""
    plans: list[StepPlan] = []
    while not sequence.done:
        plan = policy.plan(sequence, len(plans), NO_POSITIONS)
        count = plan.commits if plan.commits is not None else 1
        plans.append(plan)
        sequence.commit(plan.candidates[:count], np.full(len(plan.candidates[:count]), 7))
        assert len(plans) < 200, "it does not end"
    return plans


# Options


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [("elastic", {"window": 0}, ("window", "1 … 32", "0")),
     ("elastic", {"window": 33}, ("window", "1 … 32", "capacity", "33")),
     ("elastic", {"window": 4.0}, ("window", "1 … 32", "4.0")), ("elastic", {"window": True}, ("window", "True")),
     ("elastic", {"window": "4"}, ("window", "1 … 32")),
     ("full", {"remasking": "low"}, ("remasking", "low_confidence, random", "'low'")),
     ("dual", {"remasking": "random"}, ("remasking random", "threshold", "give steps")),
     ("full", {"cfg_scale": -1.0}, ("cfg_scale", "-1.0")), ("timesteps", {"cfg_scale": "x"}, ("cfg_scale", "x")),
     ("timesteps", {"alg": "greedy"}, ("alg", "maskgit_plus", "'greedy'")),
     ("timesteps", {"steps": 0}, ("steps", "0")), ("timesteps", {"eps": 2.0}, ("eps", "0.0 … 1.0", "2.0")),
     ("timesteps", {"alg_temp": -1.0}, ("alg_temp", "-1.0")),
     ("elastic", {"track_num": 0}, ("track_num", "1 … 4", "0")),
     ("elastic", {"track_num": 5}, ("track_num", "1 … 4", "capacity", "5")),
     ("elastic", {"threshold": 0.0}, ("threshold", "(0, 1]", "0.0")),
     ("elastic", {"threshold": -0.1}, ("threshold", "(0, 1]", "-0.1")),
     ("elastic", {"threshold": 1.01}, ("threshold", "(0, 1]", "1.01")),
     ("elastic", {"threshold": float("nan")}, ("threshold", "(0, 1]", "nan")),
     ("elastic", {"threshold": "0.5"}, ("threshold", "(0, 1]", "0.5")),
     ("elastic", {"gamma": -0.1}, ("gamma", "0.0 … 1.0", "-0.1")),
     ("elastic", {"gamma": 1.1}, ("gamma", "0.0 … 1.0", "1.1")),
     ("elastic", {"gamma": float("nan")}, ("gamma", "0.0 … 1.0", "nan")),
     ("elastic", {"drift": "col"}, ("drift", "row, head", "'col'")),
     ("elastic", {"refresh_scope": "far"}, ("refresh_scope", "all, near", "'far'")),
    ("elastic", {"refresh_start": "last"}, ("refresh_start", "next, first", "'last'")),
     ("elastic", {"tokens_per_step": 0}, ("tokens_per_step", "1 … 16", "0")),
     ("elastic", {"tokens_per_step": 9, "window": 8}, ("tokens_per_step", "1 … 8", "window", "9")),
     ("interval", {"prompt_interval": 0}, ("prompt_interval", "1 …", "0")),
     ("interval", {"response_interval": 0}, ("response_interval", "1 …", "0"))],
)  # fmt: skip
def test_out_of_range(name: str, options: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(OptionError, *words):
        check(name, **options)


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_out_of_range(name: str) -> None:
    for block in (0, -1, GEN + 1, 2.5):
        with refused(OptionError, "block_length", f"1 … {GEN}", "gen_length", str(block)):
            check(name, block_length=block)
    for steps in (0, GEN + 1):
        with refused(OptionError, "steps", f"1 … {GEN}", "gen_length", str(steps)):
            check(name, steps=steps)
    for options in ({"steps": 8, "block_length": 5}, {"steps": 3, "block_length": 8}):
        with refused(OptionError, "cannot be spread evenly", "must be a multiple", f"steps {options['steps']}"):
            check(name, **options)


@pytest.mark.parametrize("name", [n for n in BLOCKED if n != "full"])
def test_thresholds_of_blocks(name: str) -> None:
    for threshold in (0, 1.5):
        with refused(OptionError, "threshold", "(0, 1]", str(threshold)):
            check(name, threshold=threshold)


def test_limits_are_allowed() -> None:
    check("elastic", window=32, track_num=4, gamma=1.0, threshold=1.0)
    check("elastic", window=np.int64(1), track_num=1, gamma=0, threshold=1, drift="head", refresh_scope="near")
    check("elastic", tokens_per_step=8, window=8)
    check("elastic", window=8, max_masks=16, window_span=1)
    for name in BLOCKED:
        check(name, block_length=1)
        check(name, block_length=GEN, steps=GEN)
        check(name, block_length=8, steps=4)
        check(name, gen_length=5)  # shorter than a block is by itself


@pytest.mark.parametrize("name", list(POLICIES))
def test_options_of_other_policies_are_refused(name: str) -> None:
    """Every option of every policy: taken by those that have it, refused by the others with the options there are."""
    values = {
        "window": 4, "threshold": 0.5, "tokens_per_step": 1, "gamma": 0.5, "drift": "row", "track_num": 1,
        "block_caching": False, "refresh_scope": "near", "refresh_start": "first", "steps": 8,
        "block_length": 8, "prompt_interval": 5,
        "response_interval": 2, "max_masks": 32, "window_span": 8, "remasking": "random", "cfg_scale": 0.5,
        "alg": "entropy", "alg_temp": 0.1, "eps": 0.01, "sequential": True, "grow": True, "end_think_token_ids": (1,),
        "end_think_logit_boost": 1.0, "end_think_boost_power": 2.0,
    }  # fmt: skip
    assert set(values) == {option for cls in POLICIES.values() for option in options_of(cls)}
    own = set(options_of(POLICIES[name]))
    assert {"elastic": "gamma", "interval": "prompt_interval"}.get(name, "steps") in own
    for option, value in values.items():
        if option in own:
            assert getattr(make_policy(name, {option: value}), option) == value
        else:
            with refused(OptionError, f"policy {name} does not use {option}", "its options are", sorted(own)[0]):
                make_policy(name, {option: value})


@pytest.mark.parametrize("name", list(POLICIES))
def test_unknown_options_are_refused(name: str) -> None:
    with refused(OptionError, f"policy {name} does not use colour", "its options are"):
        make_policy(name, {"colour": 1})
    assert make_policy(name, {"colour": UNSET}) == make_policy(name, {}), "UNSET is not given"


def test_unknown_policies_are_refused() -> None:
    with refused(OptionError, "'plastic'", "choose from elastic, full, timesteps, prefix, dual, interval"):
        make_policy("plastic", {})


def test_timesteps_commit_the_share_of_time_that_passes() -> None:
    """Numbers of the published schedule: none at the first of 32 steps, two at the last."""
    for steps, wanted in ((32, [0, *[1] * 30, 2]), (16, [1, *[2] * 14, 3]), (1, [32]), (3, [10, 10, 12])):
        plans = run_policy(make_policy("timesteps", {"steps": steps}), start(gen_length=32))
        assert [plan.commits for plan in plans] == wanted and all(plan.active is None for plan in plans)
    plan = make_policy("timesteps", {"alg": "origin", "steps": 4, "eps": 0.0}).plan(start(), 2, NO_POSITIONS)
    assert plan.chance == 0.5 and plan.commits is None


def test_rows_that_predict_other_positions_are_active() -> None:
    """With a shift of one, the row before each candidate; block caches begin a block with its first mask alone."""
    sequence = Sequence.start(np.arange(4), 8, MASK, (EOS,), shift=1)
    for name, options, wanted in (
        ("elastic", {"window": 2}, [3, 4, 5]), ("interval", {"block_length": 4}, [3, 4, 5, 6, 7]),
    ):  # fmt: skip
        active = make_policy(name, options).plan(sequence, 1, NO_POSITIONS).active
        assert active is not None and active.tolist() == wanted
    for name in ("prefix", "dual"):
        assert make_policy(name, {"block_length": 4}).plan(sequence, 0, NO_POSITIONS).candidates.tolist() == [4]
        by_count = make_policy(name, {"block_length": 4, "steps": 4}).plan(sequence, 0, NO_POSITIONS)
        assert by_count.candidates.tolist() == [4, 5, 6, 7]
    assert sequence.logits_rows(np.array([0, 1, 5])).tolist() == [0, 0, 4]


def test_rivals() -> None:
    for name, rival in (("elastic", "tokens_per_step"), ("prefix", "steps"), ("full", "steps")):
        with refused(OptionError, f"threshold and {rival} exclude each other", "give one"):
            make_policy(name, {"threshold": 0.5, rival: 1})


def test_defaults() -> None:
    """The bundle's defaults are elastic's; a given option beats them."""
    defaults = {"policy": "elastic", "threshold": 0.7, "gamma": 0.8, "drift": "head", "track_num": 2, "window": 8}
    policy: Any = make_policy("elastic", {"gamma": 0.5, "window": UNSET}, defaults)
    assert policy == Elastic(window=8, threshold=0.7, gamma=0.5, drift="head", track_num=2)
    assert vars(make_policy("elastic", {"tokens_per_step": 2}, defaults))["threshold"] is None
    policy = make_policy("full", {}, defaults)
    assert policy == Full()
    for name in ("prefix", "dual", "interval"):
        assert vars(make_policy(name, {}, defaults))["threshold"] == 0.9
        assert vars(make_policy(name, {"steps": 4}, defaults))["threshold"] is None


# Plans


def test_elastic_slides() -> None:
    policy = Elastic(window=3)
    sequence = start(prompt=4, gen_length=8)
    first = policy.plan(sequence, 0, NO_POSITIONS)
    assert first.active is None and first.candidates.tolist() == [4, 5, 6] and first.commits is None
    sequence.commit(np.array([5]), np.array([7]))
    plan = policy.plan(sequence, 1, np.array([1, 2]))
    assert plan.candidates.tolist() == [4, 6, 7]
    assert plan.active is not None and plan.active.tolist() == [1, 2, 4, 5, 6, 7], "tracked, last commits, window"
    open_masks = Elastic(window=3, block_caching=False).plan(sequence, 1, np.array([5]))
    assert open_masks.active is not None and open_masks.active.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert open_masks.candidates.tolist() == [4, 6, 7]
    assert Elastic(window=3, tokens_per_step=2, threshold=None).plan(sequence, 1, NO_POSITIONS).commits == 2


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize(
    ("gen_length", "block", "steps", "commits"),
    [(8, 4, 4, [2, 2, 2, 2]), (8, 4, 6, [2, 1, 1, 2, 1, 1]), (8, 8, 3, [3, 3, 2]), (6, 4, None, [1] * 6),
     (8, 4, 2, [4, 4]), (5, None, None, [1] * 5)],
)  # fmt: skip
def test_schedules(name: str, gen_length: int, block: int | None, steps: int | None, commits: list[int]) -> None:
    """`steps` are spread evenly over the blocks, the larger commits first, as LLaDA's get_num_transfer_tokens."""
    policy = make_policy(name, {"steps": steps, "block_length": block, "threshold": None})
    policy.check(CAPACITY, gen_length)
    assert [plan.commits for plan in run_policy(policy, start(4, gen_length))] == commits


def test_rows_of_the_baselines() -> None:
    """Prompt 4, two blocks of 3 (4-6, 7-9), one commit a step: what each policy runs."""
    whole, block = None, [list(range(4, 7)), list(range(7, 10))]

    def rows(name: str, **options: Any) -> list[list[int] | None]:
        plans = run_policy(POLICIES[name](block_length=3, threshold=None, **options), start(4, 6))
        assert [p.candidates.tolist() for p in plans] == [[4, 5, 6], [5, 6], [6], [7, 8, 9], [8, 9], [9]]
        return [None if p.active is None else p.active.tolist() for p in plans]

    assert rows("full") == [whole] * 6
    assert rows("prefix") == [whole, [*range(4, 10)], [*range(4, 10)], whole, [*range(7, 10)], [*range(7, 10)]]
    assert rows("dual") == [whole, block[0], block[0], whole, block[1], block[1]]
    assert rows("interval", prompt_interval=4, response_interval=2) == [
        whole, block[0], [*range(4, 10)], block[1], whole, block[1],
    ]  # fmt: skip


def test_a_threshold_leaves_the_count_open() -> None:
    plan = POLICIES["dual"](threshold=0.9).plan(start(), 0, NO_POSITIONS)
    assert plan.commits is None and plan.candidates.tolist() == list(range(4, 12))


# The sequence


def test_a_new_sequence() -> None:
    sequence = start(3, 4)
    assert sequence.ids.tolist() == [0, 1, 2, MASK, MASK, MASK, MASK] and len(sequence) == 7
    assert sequence.masked.tolist() == sequence.open.tolist() == [3, 4, 5, 6]
    assert not sequence.done and sequence.end is None and len(sequence.last) == 0


def test_the_first_eos_sets_the_end() -> None:
    """The lowest EOS of the first step that commits one; what lies beyond stays, masks there are not filled."""
    sequence = start(2, 8)
    sequence.commit(np.array([9, 4, 7]), np.array([5, 5, 5]))
    assert sequence.end is None and sequence.last.tolist() == [4, 7, 9]
    sequence.commit(np.array([8, 6]), np.array([EOS, EOS]))
    assert sequence.end == 6 and sequence.open.tolist() == [2, 3, 5] and sequence.masked.tolist() == [2, 3, 5]
    sequence.commit(np.array([3]), np.array([EOS]))
    assert sequence.end == 6, "a lower one later does not move it"
    assert not sequence.done and sequence.open.tolist() == [2, 5]
    sequence.commit(np.array([5, 2]), np.array([5, 5]))
    assert sequence.done and sequence.ids.tolist() == [0, 1, 5, EOS, 5, 5, EOS, 5, EOS, 5]
    assert sequence.answer.tolist() == [5], "up to the first EOS by position"


def test_masks_beyond_the_end_stay() -> None:
    sequence = start(2, 6)
    sequence.commit(np.array([2, 3]), np.array([5, EOS]))
    assert sequence.done and sequence.masked.tolist() == [4, 5, 6, 7]
    assert sequence.answer.tolist() == [5]


def test_any_of_several_ends() -> None:
    """The lowest of the first step that commits one, whichever it is; a lower one that comes later cuts the answer."""
    sequence = start(2, 6, ends=(EOS, 97, 96))
    sequence.commit(np.array([4, 6]), np.array([96, EOS]))
    assert sequence.end == 4 and sequence.open.tolist() == [2, 3] and not sequence.said_eos
    sequence.commit(np.array([2, 3]), np.array([5, 97]))
    assert sequence.done and sequence.end == 4 and sequence.answer.tolist() == [5] and sequence.said_eos


def test_without_the_eos_rule() -> None:
    sequence = start(2, 4, stops=False)
    sequence.commit(np.array([2, 3]), np.array([5, EOS]))
    assert sequence.end is None and sequence.open.tolist() == [4, 5]
    sequence.commit(np.array([4, 5]), np.array([5, 5]))
    assert sequence.done and sequence.answer.tolist() == [5], "the answer still ends at the EOS"


def test_an_answer_of_eos_alone_is_empty() -> None:
    sequence = start(1, 2)
    sequence.commit(np.array([1]), np.array([EOS]))
    assert sequence.answer.tolist() == []


@pytest.mark.parametrize(("positions", "tokens"), [([0], [5]), ([2], [MASK])])
def test_commits_are_checked(positions: list[int], tokens: list[int]) -> None:
    """Only masks are filled, and never by a mask: an invariant, not a user's mistake."""
    with pytest.raises(AssertionError):
        start(2, 4).commit(np.array(positions), np.array(tokens))


@given(st.data())
def test_an_answer_is_what_was_committed_before_the_end(data: Any) -> None:
    sequence = start(2, data.draw(st.integers(1, 12)))
    while not sequence.done:
        chosen = data.draw(st.lists(st.sampled_from(sequence.open.tolist()), min_size=1, unique=True))
        tokens = data.draw(st.lists(st.sampled_from([1, 2, EOS]), min_size=len(chosen), max_size=len(chosen)))
        sequence.commit(np.array(chosen), np.array(tokens))
    answer = sequence.answer
    assert MASK not in answer and EOS not in answer
    assert answer.tolist() == sequence.ids[2 : 2 + len(answer)].tolist()
    end = sequence.end if sequence.end is not None else len(sequence)
    assert 2 + len(answer) <= end and MASK not in sequence.ids[:end]


# The slot map


@given(st.data())
def test_the_slot_map(data: Any) -> None:
    """After any number of `bring`s: the wanted positions come first, the map is a permutation, and the moves applied
    to an array give what the map says."""
    length = data.draw(st.integers(1, 40))
    slots = SlotMap(length)
    rows = np.arange(length)  # what lies in each slot: at first its own position
    every = np.arange(length)
    for _ in range(data.draw(st.integers(1, 6))):
        wanted = np.array(data.draw(st.lists(st.integers(0, length - 1), unique=True)), np.int64)
        if data.draw(st.booleans()):
            wanted = np.sort(wanted)
        before = slots.slot_of.copy()
        target, source = slots.bring_to_front(wanted)
        rows[target] = rows[source]
        assert sorted(slots.position_at[: len(wanted)].tolist()) == sorted(wanted.tolist())
        assert sorted(slots.position_at.tolist()) == sorted(slots.slot_of.tolist()) == every.tolist()
        assert np.array_equal(slots.slot_of[slots.position_at], every)
        assert np.array_equal(rows, slots.position_at)
        assert len(set(target.tolist())) == len(target) and sorted(target.tolist()) == sorted(source.tolist())
        assert not (target == source).any(), "nothing is moved in vain"
        stay = wanted[before[wanted] < len(wanted)]
        assert np.array_equal(slots.slot_of[stay], before[stay]), "rows that are there already stay"
        again, _ = slots.bring_to_front(wanted)
        assert len(again) == 0, "bringing the same rows again moves nothing"


def test_a_new_slot_map_is_the_identity() -> None:
    slots = SlotMap(5)
    assert slots.slot_of.tolist() == slots.position_at.tolist() == [0, 1, 2, 3, 4]
    target, source = slots.bring_to_front(np.array([4, 1]))
    assert (target.tolist(), source.tolist()) == ([0, 4], [4, 0])
    assert slots.position_at.tolist() == [4, 1, 2, 3, 0]


def test_every_policy_ends() -> None:
    """Whatever the policy, a run fills every mask."""
    for name, make in POLICIES.items():
        sequence = start(3, 9)
        run_policy(make(block_length=4) if name == "block" else make(), sequence)
        assert sequence.done and not len(sequence.masked)
