"""A bundle as a model of lm-evaluation-harness, for tasks that generate.

    python -m runtime.harness --model elastic --model_args bundle=bundles/demo \
        --include_path scripts/tasks --tasks elastic_sums,elastic_programs

accepts all options of lm_eval. `model_args` are bundle, backend, gen_length and the options of the policy. Prompts are
rendered with the bundle's chat template.
"""

import sys
from typing import Any

from engines.errors import INSTALL, ElasticError, OptionError
from engines.options import UNSET
from runtime.api import Runtime, load

try:
    import lm_eval.models  # noqa: F401  registers lm_eval's own models, which it does only before other models
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise OptionError(
        f"runtime.harness needs lm-eval, which is not installed; {INSTALL.format(extra='eval')}"
    ) from error

REMEDY = "choose tasks with output_type generate_until"


@register_model("elastic")  # type: ignore[untyped-decorator]
class ElasticLM(LM):  # type: ignore[misc]
    """A bundle decoded as by `runtime generate`; batch_size, max_batch_size and device are ignored."""

    def __init__(
        self, bundle: str = "bundles/demo", backend: str = "auto", policy: str | None = None,
        gen_length: int | None = None, batch_size: Any = None, max_batch_size: Any = None, device: Any = None,
        **options: Any,
    ):  # fmt: skip
        super().__init__()
        self.model: Runtime = load(bundle, backend)
        self.policy, self.gen_length, self.options = policy, gen_length, options

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval caches requests."""
        return str(self.model.bundle.root)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request's context, cut before the first of its `until` strings."""
        return [self.answer(*request.args) for request in requests]

    def answer(self, context: str, settings: dict[str, Any]) -> str:
        """The answer to one context with the harness's generation settings."""
        temperature = settings.get("temperature") or UNSET
        length = self.gen_length or settings.get("max_gen_toks") or 256
        out = self.model.generate(context, self.policy, gen_length=length, temperature=temperature, **self.options)
        text = out.text
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise OptionError(f"elastic cannot score continuations; {REMEDY}")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise OptionError(f"elastic cannot score texts; {REMEDY}")


def main() -> None:
    """Run lm_eval; a user's mistake prints one sentence and gives a non-zero exit code."""
    try:
        cli_evaluate()
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
