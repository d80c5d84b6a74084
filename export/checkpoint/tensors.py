"""Which stored tensor each weight is, and whether the tensors are those that config.json describes.

A family's names are looked for as they are, in the other namings of the family,
and behind what training tools put around a name. One of these must give the name
of every weight: nothing is guessed tensor by tensor.
"""

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from engines.config import ModelConfig
from engines.errors import CheckpointError
from export.checkpoint import Family, Naming, Weight, commands, foreign

DTYPES = ("F32", "F16", "BF16")
Headers = dict[str, tuple[tuple[int, ...], str]]  # stored name -> shape, type
WRAPPER = re.compile(
    r"(?<![^.])(?:base_model\.model|module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
SPELLINGS: tuple[Callable[[str], str], ...] = (  # what a stored name is without the tool's part of it
    str,
    lambda name: WRAPPER.sub("", name),
    lambda name: WRAPPER.sub("", name).removeprefix("model."),  # a wrapper's own `model.` around the model's
    lambda name: "model." + WRAPPER.sub("", name),  # the model was saved without its outermost class
)


def match(directory: Path, family: Family, config: ModelConfig, headers: Headers) -> dict[str, str]:
    """The stored name of every tensor that the parts read, by the family's name for it.

    Of the namings and spellings it takes the one that finds most weights, the plainest
    first. Raises CheckpointError unless that finds all, each with its shape and a known
    type.
    """
    if config.layers + (config.vision.layers if config.vision else 0) > len(headers):
        raise CheckpointError(
            f"{directory} holds {len(headers)} tensors, too few for the {config.layers} layers of config.json; "
            f"{commands.again(directory)}"
        )
    foreign.check_tensors(directory, headers)
    ours = _weights(config, family.weights)
    names = max(_candidates(family, config, headers), key=lambda names: sum(map(headers.__contains__, names.values())))
    for part, weights in ours.items():
        for weight in weights.values():
            for tensor in weight.tensors:
                _check_tensor(directory, part, names[tensor], weight.stored_shape, headers)
    return names


def superfluous(family: Family, headers: Headers, names: dict[str, str]) -> list[str]:
    """The stored tensors that no part reads, without those that the family lets be there."""
    found = sorted(set(headers) - set(names.values()))
    return [tensor for tensor in found if not any(fnmatchcase(tensor, pattern) for pattern in family.ignorable)]


def head_matrix(family: Family, config: ModelConfig, names: dict[str, str]) -> str:
    """The stored name of the head's matrix, which of a tied head is the embedding's."""
    return names[family.weights(config, "head")["ff_out.weight"].tensor]


def _candidates(family: Family, config: ModelConfig, headers: Headers) -> Iterator[dict[str, str]]:
    """Stored names by the family's names, for each naming and spelling; of a tensor that is not there, its due name."""
    ours = _weights(config, family.weights)
    for naming in (family.weights, *family.namings):
        theirs = _weights(config, naming)
        pairs = {
            tensor: theirs_too
            for part, weights in ours.items()
            for local, weight in weights.items()
            for tensor, theirs_too in zip(weight.tensors, theirs[part].get(local, weight).tensors, strict=True)
        }
        for spelling in SPELLINGS:
            stored = {spelling(name): name for name in headers}
            if len(stored) == len(headers):  # else two tensors have one name
                yield {tensor: stored.get(name, name) for tensor, name in pairs.items()}


def _weights(config: ModelConfig, naming: Naming) -> dict[str, dict[str, Weight]]:
    return {part: naming(config, part) for part in (*config.parts, *config.vision_parts)}


def _check_tensor(directory: Path, part: str, tensor: str, shape: tuple[int, ...], headers: Headers) -> None:
    if tensor not in headers:
        lacks = f"{directory} lacks {tensor} {list(shape)} of part {part}"
        if part == "head" and len(shape) == 2:
            raise CheckpointError(
                f"{lacks}, and config.json does not tie it to the embedding; "
                "correct that if this model's head is its embedding"
            )
        raise CheckpointError(f"{lacks}; {commands.again(directory)}")
    came, dtype = headers[tensor]
    if came != shape:
        raise CheckpointError(
            f"{tensor} of part {part} has shape {list(came)}, expected {list(shape)} by config.json; "
            "use the config.json that belongs to these weights"
        )
    if dtype not in DTYPES:
        convert = f"convert it with: {commands.python(commands.TO_FP32, directory)}"
        remedy = convert if dtype == "F64" else commands.original(directory)
        raise CheckpointError(
            f"{tensor} of part {part} is stored as {dtype}, expected one of {', '.join(DTYPES)}; {remedy}"
        )
