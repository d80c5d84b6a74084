"""lm-evaluation-harness runs a bundle offline: the score of `runtime eval`, settings, chat templates and choices."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import export
import runtime
from engines.errors import OptionError
from runtime.decoding.stops import cut
from runtime.evaluation.exact_match import evaluate, summary
from runtime.evaluation.likelihood import is_greedy, log_likelihood
from tests.support.cases import ROOT, TEMPLATE, refused

pytestmark = [
    pytest.mark.slow,  # lm_eval takes seconds to import
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; pip install '.[eval]' brings it"
    ),
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 7?"}]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(text_bundle: Path) -> Make:
    """Makes the harness's model of the bundle with a tokenizer of bytes and a chat template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from runtime.harness import ElasticLM

    def made(**options: Any) -> Any:
        given: dict[str, Any] = {"bundle": str(text_bundle), "backend": "onnxruntime", "gen_length": 8}
        return ElasticLM(**given | options)

    return made


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


class Answers:
    """Stands for decoding: answers every prompt with the ids of one text, and keeps what was asked."""

    def __init__(self, lm: Any, monkeypatch: pytest.MonkeyPatch, text: str = "42"):
        self.lm, self.text = lm, text
        self.batches: list[list[Any]] = []
        self.options: dict[str, Any] = {}
        monkeypatch.setattr(lm.model, "generate_batch", self.generate_batch)

    def generate_batch(self, prompts: list[Any], policy: Any, **options: Any) -> list[Any]:
        self.batches.append([list(prompt) for prompt in prompts])
        self.options = options
        text = self.lm.model.text
        found, said = cut(text.encode(self.text), text.decode, options["stop"] or ())
        return [SimpleNamespace(ids=found.tolist(), text=said) for _ in prompts]


@pytest.mark.parametrize(
    ("until", "text"),
    [([], "42And 7? Q: 8"), (None, "42And 7? Q: 8"), ("7", "42And "), (["Q:", "<|user|>"], "42"), (["<|user|>"], "42"),
     (["<|startoftext|>", "Q:"], "42And 7? "), (["</s>", ""], "42And 7? Q: 8"), (["42<|user|>"], "")],
)  # fmt: skip
def test_until_may_be_special_tokens(make: Make, monkeypatch: pytest.MonkeyPatch, until: Any, text: str) -> None:
    lm = make()
    Answers(lm, monkeypatch, "42<|user|>And 7? Q: 8")
    assert lm.generate_until([request("hi", {"until": until})], disable_tqdm=True) == [text]


@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, {"temperature": 0.0}), ({"do_sample": True}, {"temperature": 1.0}),
     ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}),
     ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
     ({"do_sample": True, "temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
     ({"do_sample": True, "temperature": 0.0, "top_k": 3}, {"temperature": 0.0}),
     ({"window": 4}, {"temperature": 0.0, "window": 4})],
)  # fmt: skip
def test_generation_settings(
    make: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    lm = make()
    answers = Answers(lm, monkeypatch)
    lm.generate_until([request("hi", {"until": [], **settings})], disable_tqdm=True)
    assert answers.options == {"gen_length": 8, "stop": None} | options


def test_lengths_and_precedence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make(gen_length=None, threshold=0.5, max_masks="none")
    answers = Answers(lm, monkeypatch)
    for settings, length in (({}, 256), ({"max_gen_toks": 9}, 9), ({"max_new_tokens": 7}, 7), ({"gen_length": 6}, 6)):
        lm.generate_until([request("hi", {"threshold": 0.8, **settings})], disable_tqdm=True)
        assert answers.options["gen_length"] == length
    assert answers.options["threshold"] == 0.5 and answers.options["max_masks"] is None
    with refused(OptionError, "does not use reach"):
        make(reach=3)
    lm = make(stop="Q:")
    answers = Answers(lm, monkeypatch)
    lm.generate_until([request("hi", {"until": ["<|user|>", ""]})], disable_tqdm=True)
    assert answers.options["stop"] == ("<|user|>", "Q:")
    for wrong in (0, "many"):
        with refused(OptionError, "mc_num must be a whole number", str(wrong)):
            make(mc_num=wrong)


def test_unknown_settings_are_named_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make()
    Answers(lm, monkeypatch)
    with caplog.at_level(logging.WARNING, "runtime.harness"):
        for _ in "ab":
            lm.generate_until(
                [request("hi", {"repetition_penalty": 2, "num_beams": 3, "top_p": 0.5})], disable_tqdm=True
            )
    assert [record.getMessage() for record in caplog.records] == [
        "generation settings without effect on a bundle: num_beams, repetition_penalty"
    ]


def test_batches_and_the_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one setting are decoded side by side, and each answer goes to the cache at once."""
    kept: list[Any] = []
    for size, sizes in ((1, [1, 1, 1, 1]), (2, [2, 1, 1]), ("auto", [3, 1]), (99, [3, 1])):
        lm = make(batch_size=size)
        answers = Answers(lm, monkeypatch)
        monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *entry: kept.append(entry))
        asked = [request(text, {"until": []}) for text in "abc"] + [request("d", {"until": ["x"]})]
        assert lm.generate_until(asked, disable_tqdm=True) == ["42"] * 4
        assert [len(batch) for batch in answers.batches] == sizes
    assert kept[-1] == ("generate_until", ("d", {"until": ["x"]}), "42") and len(kept) == 16
    lm.loglikelihood([request("a", "b")], disable_tqdm=True)
    assert kept[-1][:2] == ("loglikelihood", ("a", "b"))


def test_contexts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain context is a user's message, a rendered one is taken as it is; a long one loses its beginning."""
    lm = make()
    text, length = lm.model.text, lm.model.bundle.capacity.max_length
    answers = Answers(lm, monkeypatch)

    def asked(context: str) -> list[int]:
        lm.generate_until([request(context, {})], disable_tqdm=True)
        return list(answers.batches[-1][0])

    assert asked("hi") == text.prompt("hi").tolist()
    assert asked(" ") == asked("") == [lm.model.bundle.config.eos_id]
    long = text.prompt("x" * length)
    assert asked("x" * length) == long[len(long) - length + 8 :].tolist()
    rendered = lm.apply_chat_template(CHAT)
    assert rendered == text.render(CHAT) and "<|system|>Be brief." in rendered
    assert asked(rendered) == text.encode(rendered).tolist()
    begun = lm.apply_chat_template([*CHAT, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun == rendered + "It is"


def test_chat_templates(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    lm = make()
    assert lm.chat_template(False) is None and not lm.rendered
    assert lm.chat_template(True) == TEMPLATE and lm.rendered, "contexts may come from lm_eval's cache"
    lm.chat_template("tools")
    assert "'tools' has no effect" in caplog.text
    assert lm.tokenizer_name == lm.model.bundle.identity
    lm.model.text = SimpleNamespace(template=None)
    with refused(OptionError, "has no chat template; leave --apply_chat_template out"):
        lm.chat_template(True)
    with refused(OptionError, "has no chat template; leave --apply_chat_template out"):
        lm.apply_chat_template(CHAT)


def test_scores(make: Make) -> None:
    """Each pair has the score of its ids, whatever stands beside it; a long context loses its beginning."""
    lm = make(mc_num=20)
    model, length = lm.model.model, lm.model.bundle.capacity.max_length
    pairs = [("2 + 2 =", " 4"), ("2 + 2 = ", "4"), ("", "ab"), ("x" * length, " yes")]
    found = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    assert lm.loglikelihood([request(*pair) for pair in pairs[::-1]], disable_tqdm=True) == found[::-1]
    assert found[0] == found[1], "a space belongs to the continuation"
    end = np.array([lm.model.bundle.config.eos_id])
    encoded = [
        (np.array(lm.tok_encode("2 + 2 =")), np.array(lm.tok_encode(" 4"))), (end, np.array(lm.tok_encode("ab"))),
        (np.array(lm.tok_encode("x" * (length - 4))), np.array(lm.tok_encode(" yes"))),
    ]  # fmt: skip
    expected = [(log_likelihood(model, *pair, 20), is_greedy(model, *pair)) for pair in encoded]
    assert found[1:] == expected
    with refused(OptionError, "scores continuations and no whole texts", "choose tasks whose output_type"):
        lm.loglikelihood_rolling([request("a")])


def harness(folder: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    """Run lm_eval offline in a process of its own."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "PATH": os.defpath}
    command = [sys.executable, "-m", "runtime.harness", "--model", "elastic", *argv]
    return subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=300)


def results(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("results*.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


def test_the_same_score(tmp_path: Path) -> None:
    bundle = export.build("demo", tmp_path / "bundle")
    done = harness(
        tmp_path, "--model_args", f"bundle={bundle},backend=onnxruntime,threshold=0.5",
        "--include_path", "scripts/tasks", "--tasks", "elastic_programs", "--limit", "12",
        "--output_path", str(tmp_path / "results.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = results(tmp_path)["elastic_programs"]["exact_match,none"]
    with runtime.load(bundle, "onnxruntime", threads=1) as model:
        options = {"threshold": 0.5, "gen_length": 192}
        ours = summary(evaluate(model, "programs", 12, "elastic", options))
    print(f"exact match {theirs} there, {ours['exact_match']} here")
    assert theirs == ours["exact_match"]


def test_tasks_of_both_kinds_with_a_chat_template(text_bundle: Path, tmp_path: Path) -> None:
    """A task of multiple choice chooses what has the best score, beside a task that generates."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"q": q}) + "\n" for q in ("hi", "lo")), encoding="utf-8")
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'data.jsonl'}}}\ntest_split: test\n"
        "doc_to_text: '{{q}}'\n"
    )
    (tmp_path / "both.yaml").write_text(
        f"task: try_choice\n{shared}output_type: multiple_choice\ndoc_to_choice: ['1', '42']\ndoc_to_target: 1\n"
        "metric_list:\n  - metric: acc\n", encoding="utf-8",
    )  # fmt: skip
    (tmp_path / "answer.yaml").write_text(
        f"task: try_answer\n{shared}output_type: generate_until\ndoc_to_target: '42'\n"
        "generation_kwargs:\n  until: ['<|user|>']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n",
        encoding="utf-8",
    )
    done = harness(
        tmp_path, "--model_args", f"bundle={text_bundle},backend=onnxruntime", "--include_path", str(tmp_path),
        "--tasks", "try_choice,try_answer", "--output_path", str(tmp_path / "results.json"), "--apply_chat_template",
        "--system_instruction", "Be brief.",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(tmp_path)
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        text, right = model.text, 0
        for question in ("hi", "lo"):
            turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
            context = text.encode(text.render(turns))
            scores = [log_likelihood(model.model, context, text.encode(choice)) for choice in ("1", "42")]
            right += scores[1] > scores[0]
    assert found["try_choice"]["acc,none"] == right / 2 and found["try_answer"]["exact_match,none"] == 0.0


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    done = harness(
        tmp_path, "--model_args", f"bundle={tmp_path}", "--include_path", "scripts/tasks", "--tasks", "elastic_sums"
    )
    assert done.returncode != 0 and "error: " in done.stderr and "Traceback" not in done.stderr
