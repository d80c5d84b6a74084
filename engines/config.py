"""What a model is and what its engines were built for: plain data that all packages share."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engines.errors import BundleError

PRECISIONS = ("fp32", "fp16", "bf16")


def strict(cls: type, values: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from `values`; raises BundleError, naming `where`, for unknown or missing keys.

    The caller adds the remedy.
    """
    names = {f.name for f in fields(cls)}
    if set(values) != names:
        wrong = sorted(set(values) ^ names)
        raise BundleError(f"{where}: unknown or missing keys {wrong}")
    return cls(**values)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower, and how an image is cut into tiles for it.

    A tile is a square of `image_size` pixels. An image is scaled to one of
    `resolutions` (width, height, in pixels) and cut into tiles; where these make
    more tokens than `max_tiles` tiles have, their rows are scaled down. `layers`
    counts the layers that are run, which may be fewer than the tower has.
    """

    image_size: int
    patch_size: int
    channels: int
    layers: int
    width: int
    heads: int
    mlp_size: int
    norm_eps: float
    mean: float  # channels, scaled to 0 … 1, are normalised with this mean and deviation
    deviation: float
    resolutions: tuple[tuple[int, int], ...]
    max_tiles: int
    placeholder: str  # the text that marks an image in a prompt

    @property
    def grid(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return self.grid**2

    @property
    def tiles(self) -> int:
        """Most tiles of one image: those of the largest resolution, and the whole image as one more."""
        return 1 + max(width * height for width, height in self.resolutions) // self.image_size**2

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "VisionConfig":
        """Read what `asdict` wrote; raises BundleError for unknown or missing keys."""
        found: VisionConfig = strict(cls, values, where)
        return replace(found, resolutions=tuple((width, height) for width, height in found.resolutions))


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of a layer's feed-forward network.

    A router scores each of `count` networks of width `size` for each row: by a softmax
    over all, or by a `sigmoid` of each. The output is the sum of the `per_row` best,
    each times its score. With a sigmoid a bias is added to the scores where they are
    compared; only the `kept_groups` best of `groups` of equal size are compared, where a
    group's score is the sum of its two best; and the scores of the chosen are scaled to
    a sum of `scale`. A network of width `shared`, if any, is run on every row as well.
    The layers `dense` have one network of `ModelConfig.mlp_size` instead.
    """

    count: int
    size: int
    per_row: int
    dense: tuple[int, ...] = ()
    sigmoid: bool = False
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    shared: int = 0

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "ExpertsConfig":
        """Read what `asdict` wrote; raises BundleError for unknown or missing keys."""
        found: ExpertsConfig = strict(cls, values, where)
        return replace(found, dense=tuple(found.dense))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a language model, in the terms of this project.

    `vocab` is the number of columns of the logits (V), `max_length` the most
    positions of a sequence. The row of position p predicts position p + `shift`,
    which is 0 or 1; with 1, position 0 is predicted by its own row. `eot_id` ends a
    turn of a chat, `more_ends` are the EOS ids that the checkpoint declares beside
    `eos_id`; `pad_id` fills up prompts of a batch. `system` is the message that
    begins every chat. The `suppressed` ids are never predicted, and a confidence is
    a probability among the others. With a `block_length` attention is block-causal: a
    row sees the keys up to the end of its own block of that many positions, counted
    from position 0. The rotary turns the first `rotary_size` elements of a head.
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
    bias: bool  # of the output, gate, up and down projections, and of the head
    tied: bool  # the matrix of the head is that of the embedding, transposed
    mask_id: int
    eos_id: int
    eot_id: int | None = None
    more_ends: tuple[int, ...] = ()
    pad_id: int | None = None
    shift: int = 0
    qk_norm: bool = False  # Q and K are normalised per head before the rotary
    block_length: int | None = None
    rotary_size: int | None = None  # None: all
    suppressed: tuple[int, ...] = ()
    system: str | None = None
    experts: ExpertsConfig | None = None
    vision: VisionConfig | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the language model's parts that carry weights, in the order of a forward pass."""
        return ("embed", *(layer_name(i) for i in range(self.layers)), "head")

    @property
    def rotated(self) -> int:
        """Elements of a head that the rotary turns."""
        return self.rotary_size or self.head_size

    @property
    def layer_numbers(self) -> int:
        """Elements of all matrices of the largest layer."""
        e = self.experts
        wide = self.mlp_size if e is None else max(self.mlp_size, e.count * e.size + e.shared)
        return self.d_model * ((2 * self.heads + 2 * self.kv_heads) * self.head_size + 3 * wide)

    def has_experts(self, index: int) -> bool:
        """Whether the layer with this index has a mixture of experts."""
        return self.experts is not None and index not in self.experts.dense

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """Names of the parts that turn tiles into rows of the language model, in their order."""
        return ("tower", "projector") if self.vision else ()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every EOS id that can be predicted."""
        return tuple(token for token in (self.eos_id, *self.more_ends) if token not in self.suppressed)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: those of EOS, and the end of a turn."""
        turn = () if self.eot_id is None or self.eot_id in (*self.eos_ids, *self.suppressed) else (self.eot_id,)
        return self.eos_ids + turn

    def to_json(self) -> dict[str, Any]:
        """All fields, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "ModelConfig":
        """Read what `to_json` gave; raises BundleError for unknown or missing keys."""
        found: ModelConfig = strict(cls, values, where)
        vision = values["vision"] and VisionConfig.from_json(values["vision"], f"{where}.vision")
        experts = values["experts"] and ExpertsConfig.from_json(values["experts"], f"{where}.experts")
        return replace(
            found, suppressed=tuple(found.suppressed), more_ends=tuple(found.more_ends), vision=vision, experts=experts
        )  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """The largest sizes that the engines of a bundle are built for.

    `max_length` positions of prompt and answer together, `window` masks predicted
    per step, `track_num` tracked keys per layer, `max_batch` sequences. `rows` (R)
    is the fixed number of rows of a captured reuse pass: two windows (the masks of
    this step and the commits of the last), a third where the rows that predict the
    masks are others (`ModelConfig.shift`), and the tracked keys of all layers.
    """

    max_length: int
    window: int
    track_num: int
    max_batch: int
    rows: int

    @classmethod
    def of(cls, config: ModelConfig, max_length: int, window: int, track_num: int, max_batch: int) -> "Capacity":
        """The capacity for these sizes, with the rows that follow from them."""
        rows = (2 + config.shift) * window + config.layers * track_num
        return cls(max_length=max_length, window=window, track_num=track_num, max_batch=max_batch, rows=rows)


def layer_name(index: int) -> str:
    """The part's name of the layer with this index."""
    return f"layer_{index:02d}"
