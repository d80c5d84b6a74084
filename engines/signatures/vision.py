"""Signatures of the vision parts, the same for every back end. Axis letters: see `engines.signatures`."""

from engines.config import ModelConfig
from engines.signatures import GraphSignature, TensorSpec


def vision_signatures(config: ModelConfig, dtype: str) -> tuple[GraphSignature, ...]:
    """The tower and the projector, which turn tiles into input embeddings; none for a model without a vision tower.

    tower: pixels [N, C, Y, X] -> features [N, P, E]; projector: features -> projected [N, P, d].
    """
    vision = config.vision
    if vision is None:
        return ()
    size = vision.image_size
    pixels = TensorSpec("pixels", dtype, ("N", vision.channels, size, size))
    features = TensorSpec("features", dtype, ("N", vision.patches, vision.width))
    projected = TensorSpec("projected", dtype, ("N", vision.patches, config.d_model))
    return GraphSignature("tower", (pixels,), (features,)), GraphSignature("projector", (features,), (projected,))
