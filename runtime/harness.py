"""A bundle as a model of lm-evaluation-harness, for tasks that generate and tasks of multiple choice.

    python -m runtime.harness --model elastic --model_args bundle=bundles/demo \
        --include_path scripts/tasks --tasks elastic_sums,elastic_programs

accepts all options of lm_eval. `model_args` are bundle, backend, policy, gen_length, mc_num (masks drawn for each
likelihood) and all decoding options; they go before the settings of a task and of `--gen_kwargs`. With
`--apply_chat_template` the harness renders every context with the bundle's chat template. Without it, a context to
answer is a user's message, and a context of a continuation to score is plain text.
"""

import logging
import sys
from itertools import groupby
from typing import Any

import numpy as np

from engines.errors import INSTALL, ElasticError, OptionError
from engines.options import listed, options_of
from runtime.api import Runtime, load
from runtime.decoding.request import OPTIONS
from runtime.decoding.sequence import Positions
from runtime.evaluation.likelihood import SAMPLES, is_greedy, log_likelihood

try:
    import lm_eval.models  # noqa: F401  registers lm_eval's own models, which it does only before other models
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise OptionError(
        f"runtime.harness needs lm-eval, which is not installed; {INSTALL.format(extra='eval')}"
    ) from error

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm_eval's names, the first wins
GEN_LENGTH = 256  # where nothing names a length, as lm_eval's own models
SAMPLING = ("top_p", "top_k")  # without effect at temperature 0
logger = logging.getLogger("runtime.harness")


@register_model("elastic")  # type: ignore[untyped-decorator]
class ElasticLM(TemplateLM):  # type: ignore[misc]
    """A bundle decoded as by `runtime generate`; max_batch_size and device are ignored.

    `batch_size` prompts are decoded side by side, "auto": as many as the bundle was built for. Answers and scores do
    not depend on it. Raises OptionError for an option that the policy does not use.
    """

    def __init__(
        self, bundle: str = "bundles/demo", backend: str = "auto", policy: str | None = None,
        gen_length: int | None = None, mc_num: int = SAMPLES, batch_size: Any = 1, max_batch_size: Any = None,
        device: Any = None, **options: Any,
    ):  # fmt: skip
        super().__init__()
        if not isinstance(mc_num, int) or mc_num < 1:
            raise OptionError(f"mc_num must be a whole number from 1 up, got {mc_num}")
        self.model: Runtime = load(bundle, backend)
        self.policy, self.mc_num = policy, mc_num
        self.options = {name: None if value == "none" else value for name, value in options.items()}
        if gen_length is not None:
            self.options["gen_length"] = gen_length
        self.known = {*OPTIONS, *options_of(type(self.model.resolve(policy, self.options)[0]))}
        most = self.model.bundle.capacity.max_batch
        self.batch_size = most if str(batch_size).startswith("auto") else min(int(batch_size), most)
        self.rendered = False  # whether the harness renders the contexts with the chat template
        self.warned: set[str] = set()

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval caches requests: another for each build, whose template may differ."""
        return self.model.bundle.identity

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.model.bundle.config.eos_id

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the bundle's chat template.

        lm_eval asks for it where it renders contexts, or has rendered them before and takes them from its cache.
        Raises OptionError for a bundle without one.
        """
        if not chat_template:
            return None
        self.rendered = True
        source = self.model.text.template
        if source is None:
            raise OptionError(f"{self.model.bundle.root} has no chat template; leave --apply_chat_template out")
        if isinstance(chat_template, str):
            self.warn(f"the bundle has one chat template, so that the name {chat_template!r} has no effect")
        return source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages; without `add_generation_prompt` the last one is the beginning of the answer."""
        self.chat_template(True)
        if add_generation_prompt:
            return self.model.text.render(chat_history)
        *turns, begun = chat_history
        return self.model.text.render(turns) + begun["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with what the tokenizer puts around a text unless the chat template did that."""
        whole = not self.rendered if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.model.text.encode(string, whole=whole).tolist()
        return ids

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request's context, which ends before the first of its `until` strings."""
        answers = []
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for settings, same in groupby(requests, lambda request: request.args[1]):
                options = self.decoding(settings)
                due = list(same)
                for start in range(0, len(due), self.batch_size):
                    some = due[start : start + self.batch_size]
                    prompts = [self.prompt(request.args[0], options["gen_length"]) for request in some]
                    outs = self.model.generate_batch(prompts, self.policy, **options)
                    for request, out in zip(some, outs, strict=True):
                        answers.append(out.text)
                        self.cache_hook.add_partial("generate_until", request.args, answers[-1])
                    bar.update(len(some))
        return answers

    def decoding(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The decoding options that the harness's generation settings stand for; special tokens can be stops."""
        given = dict(settings)
        stops = [stop for of in (given.pop("until", None), self.options.get("stop")) for stop in listed(of) if stop]
        lengths = [given.pop(name, None) for name in LENGTHS]
        sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
        if sample is False or (temperature is None and not sample):
            temperature = 0.0
        unknown = sorted(given.keys() - self.known)
        if unknown:
            self.warn(f"generation settings without effect on a bundle: {', '.join(unknown)}")
        options = {
            "gen_length": next((length for length in lengths if length is not None), GEN_LENGTH),
            "temperature": 1.0 if temperature is None else temperature,
            **{name: value for name, value in given.items() if name in self.known},
            **self.options,
            "stop": tuple(stops) or None,
        }
        if not options["temperature"]:
            options = {k: v for k, v in options.items() if k not in SAMPLING or k in self.options}
        return options

    def prompt(self, context: str, gen_length: int) -> Positions:
        """The ids [P] of a context that leave room for the answer."""
        if not context.strip():
            return np.array([self.prefix_token_id])
        text = self.model.text
        return self.cut(text.encode(context) if self.rendered else text.prompt(context), gen_length)

    def cut(self, ids: Positions, length: int) -> Positions:
        """The last of `ids` [P] that fit into the bundle's length before `length` more."""
        room = self.model.bundle.capacity.max_length - length
        if not 0 < room < len(ids):
            return ids
        self.warn("contexts that exceed the bundle's length are cut from the left")
        return ids[len(ids) - room :]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation behind its context, and whether it is greedy decoding's."""
        scores = []
        for texts, context, continuation in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            answer = np.array(continuation, np.int64)
            before = self.cut(np.array(context, np.int64), len(answer))
            model = self.model.model
            scores.append((log_likelihood(model, before, answer, self.mc_num), is_greedy(model, before, answer)))
            self.cache_hook.add_partial("loglikelihood", texts, scores[-1])
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise OptionError(
            "elastic scores continuations and no whole texts; choose tasks whose output_type is generate_until, "
            "loglikelihood or multiple_choice"
        )

    def warn(self, sentence: str) -> None:
        """Log a warning the first time."""
        if sentence not in self.warned:
            self.warned.add(sentence)
            logger.warning(sentence)


def main() -> None:
    """Run lm_eval; a user's mistake prints one sentence and gives a non-zero exit code."""
    try:
        cli_evaluate()
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
