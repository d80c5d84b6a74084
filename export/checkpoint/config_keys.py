"""Reading a config.json strictly: every key is read, has one value, is harmless, or is refused by name.

An absent key counts as null. Harmless in every family are the keys that the class
of all configs has in some version of transformers, and what tools write beside
them: by their kind (`HARMLESS`), so that a newer version needs no change here.
"""

import json
import sys
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from engines.errors import CheckpointError

HARMLESS = (  # shell patterns of keys that do not change a forward pass
    # origin and bookkeeping: underscored keys are a saver's own
    "_*", "architectures", "auto_map", "model_type", "*_version", "tokenizer_class", "processor_class", "unsloth_*",
    "transformers*", "library_name",
    # how it is run and what a call returns: each tensor has its own type
    "dtype", "torch_dtype", "torchscript", "use_cache", "*_implementation", "return_dict*", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores",
    # training: no dropout is applied, nothing is initialised
    "*dropout*", "init_*", "initializer_*", "gradient_checkpointing*", "pretraining_tp",
    # ids of special tokens that a family does not read, and labels
    "*_token_id", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "prefix",
    # generation, which has a file of its own
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "early_stopping", "num_beam*",
    "num_return_sequences", "max_length", "min_length", "max_new_tokens", "*_penalty", "*_ngram_size", "bad_words_ids",
    "forced_*", "*suppress_tokens", "remove_invalid_values",
)  # fmt: skip
FLAGS = {"mask_token_id": "--mask-id", "eos_token_id": "--eos-id"}  # keys that an option of a build can give
OFF = (  # shell patterns of switches that are harmless while they are off: false, 0 or empty
    "is_*", "add_*", "tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16", "use_sliding_window", "use_mrope",
    "*qk_norm", "*_bias", "pruned_heads", "chunk_size_*",
)  # fmt: skip


def expect(holds: bool, key: str, value: Any, wanted: str) -> None:
    """Raise CheckpointError unless `holds`: `key` has `value` where `wanted` is needed."""
    if not holds:
        raise CheckpointError(
            f"config.json: {key} is {json.dumps(value)}, expected {wanted}; "
            "correct it, or use a checkpoint this family implements"
        )


class Keys:
    """The keys of a config.json that are not null: names are checked at construction, values when they are read.

    `required` and `optional` keys are read, `fixed` ones have one implemented
    value, `harmless` ones do not change a forward pass. Raises CheckpointError for
    any other key, and for a required one that is missing or null.
    """

    def __init__(
        self, family: str, raw: dict[str, Any], required: Collection[str], optional: Collection[str],
        fixed: Mapping[str, Any], harmless: Collection[str],
    ) -> None:  # fmt: skip
        self.values = _plain_rotary({key: value for key, value in raw.items() if value is not None})
        others = sorted(set(self.values) - set(harmless) - fixed.keys() - {*required, *optional})
        unknown = [key for key in others if not _is_harmless(key, self.values[key])]
        missing = [key for key in required if key not in self.values]
        if unknown:
            listed = ", ".join(f"{key} = {json.dumps(self.values[key])}" for key in unknown)
            raise CheckpointError(
                f"config.json: the family {family} does not implement {listed}; "
                "remove the key if it does not change what the model computes"
            )
        if missing:
            flags = " and ".join(FLAGS[key] for key in missing if key in FLAGS)
            raise CheckpointError(
                f"config.json: {', '.join(missing)} missing or null; take them from the model's published config"
                + (f", or build with {flags}" if flags else "")
            )
        for key, value in fixed.items():
            came = self.values.get(key, value)
            expect(type(came) is type(value) and came == value, key, came, json.dumps(value))

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value: Any = self.values.get(key, default)
        expect(type(value) is int and value > 0, key, value, "a positive integer")
        return int(value)

    def token(self, key: str, vocab: int) -> int:
        """A token id below `vocab`."""
        value = self.values[key]
        expect(type(value) is int and 0 <= value < vocab, key, value, f"an id below vocab_size ({vocab})")
        return int(value)

    def tokens(self, key: str, vocab: int) -> tuple[int, ...]:
        """One token id below `vocab`, or a list of some; each once, in their order."""
        value = self.values[key]
        listed = value if isinstance(value, list) else [value]
        fine = bool(listed) and all(type(token) is int and 0 <= token < vocab for token in listed)
        expect(fine, key, value, f"an id below vocab_size ({vocab}), or a list of such ids")
        return tuple(dict.fromkeys(listed))

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.values[key]
        positive = type(value) in (int, float) and 0 < value <= sys.float_info.max
        expect(positive, key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        expect(type(value) is bool, key, value, "true or false")
        return bool(value)


def _is_harmless(key: str, value: Any) -> bool:
    """Whether a key does not change a forward pass in any family."""
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    off = value in (False, 0, [], {}, "")
    return any(fnmatchcase(key, pattern) for pattern in (*HARMLESS, *(OFF if off else ())))


def _plain_rotary(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the theta of a plain rotary as `rope_theta`, wherever a version of transformers puts it.

    Raises CheckpointError for a rotary of another kind, or two values of theta.
    """
    values = dict(values)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(key), dict):
            continue
        found = {name: value for name, value in values.pop(key).items() if value is not None}
        theta = found.get("rope_theta", values.get("rope_theta"))
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1, "rope_theta": theta}
        fine = all(name in plain and value == plain[name] for name, value in found.items())
        expect(fine, key, found, 'null or {"rope_type": "default"}, perhaps with a rope_theta')
        if theta is not None:
            wanted = values.get("rope_theta", theta)
            expect(wanted == theta, f"rope_theta of {key}", theta, f"{json.dumps(wanted)}, as rope_theta is")
            values["rope_theta"] = theta
    return values
