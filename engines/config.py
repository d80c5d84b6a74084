"""What a model is and what its engines were built for: plain data shared by all rooms.

Nothing here knows a file format, a tensor library, a port or a back end.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engines.errors import BundleError

PRECISIONS = ("fp32", "fp16", "bf16")


def strict(cls: type, values: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from `values`; raises BundleError for unknown or missing keys."""
    names = {f.name for f in fields(cls)}
    if set(values) != names:
        wrong = sorted(set(values) ^ names)
        raise BundleError(f"{where}: unknown or missing keys {wrong}; rebuild the bundle with this version")
    return cls(**values)


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower's numbers, and how an image is cut for it.

    A tile is a square of `image_size` pixels. An image is tiled to one of
    `resolutions` (width, height); tokens of its tiles beyond those of
    `max_tiles` are scaled down. `layers` are those that are run.
    """

    image_size: int
    patch_size: int
    channels: int
    layers: int
    width: int
    heads: int
    mlp_size: int
    norm_eps: float
    mean: float  # of a channel's values, which lie in 0 … 1
    deviation: float
    resolutions: tuple[tuple[int, int], ...]
    max_tiles: int
    placeholder: str  # what stands for an image in a prompt

    @property
    def grid(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def tiles(self) -> int:
        """Tiles of the largest tiling, and the whole image as one more."""
        return 1 + max(width * height for width, height in self.resolutions) // self.image_size**2

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "VisionConfig":
        found: VisionConfig = strict(cls, values, where)
        return replace(found, resolutions=tuple((width, height) for width, height in found.resolutions))


@dataclass(frozen=True)
class ModelConfig:
    """A transformer's numbers and switches, as read by its family. `vocab` counts the logits' columns.

    The row of position p predicts position p + `shift`, which is 0 or 1; position
    0 is predicted by its own. `eot_id` is the token that ends a turn of a chat,
    `system` the message that every chat begins with. The `suppressed` ids are
    never predicted and have no part in a confidence.
    """

    family: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    vocab: int
    max_length: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    bias: bool  # of the output, gate, up and down projections and of the head
    tied: bool  # the head's matrix is the embedding, transposed
    mask_id: int
    eos_id: int
    eot_id: int | None = None
    shift: int = 0
    qk_norm: bool = False  # Q and K are normalised per head before the rotary
    suppressed: tuple[int, ...] = ()
    system: str | None = None
    vision: VisionConfig | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the language model's parts that carry weights, in the order of a forward pass."""
        return ("embed", *(layer_name(i) for i in range(self.layers)), "head")

    @property
    def layer_numbers(self) -> int:
        """How many numbers the matrices of a layer hold."""
        return self.d_model * (2 * self.heads + 2 * self.kv_heads) * self.head_size + 3 * self.d_model * self.mlp_size

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """Names of the parts that turn tiles into the language model's rows, in their order."""
        return ("tower", "projector") if self.vision else ()

    @property
    def end_id(self) -> int:
        """The token that ends an answer: EOS, or the end of a turn where EOS is never predicted."""
        return self.eot_id if self.eot_id is not None and self.eos_id in self.suppressed else self.eos_id

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "ModelConfig":
        """What `to_json` gave; raises BundleError for unknown or missing keys."""
        found: ModelConfig = strict(cls, values, where)
        vision = values["vision"] and VisionConfig.from_json(values["vision"], f"{where}.vision")
        return replace(found, suppressed=tuple(found.suppressed), vision=vision)


@dataclass(frozen=True)
class Capacity:
    """What the engines were built for.

    `max_length` positions of prompt and answer together, `window` masks
    predicted per step, `track_num` tracked keys per layer, `max_batch`
    sequences. `rows` is the least number of slots: two windows (this step's
    masks and last step's commits), one more where other rows predict the masks
    (`ModelConfig.shift`), and each layer's tracked keys.
    """

    max_length: int
    window: int
    track_num: int
    max_batch: int
    rows: int

    @classmethod
    def of(cls, config: ModelConfig, max_length: int, window: int, track_num: int, max_batch: int) -> "Capacity":
        rows = (2 + config.shift) * window + config.layers * track_num
        return cls(max_length, window, track_num, max_batch, rows)


def layer_name(index: int) -> str:
    return f"layer_{index:02d}"
