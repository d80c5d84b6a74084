"""Signatures of the vision parts, the same for every back end."""

from engines.config import ModelConfig
from engines.signatures import GraphSignature, TensorSpec


def vision_signatures(config: ModelConfig, dtype: str) -> tuple[GraphSignature, ...]:
    """The parts that turn tiles into rows of the language model; none for a model without a vision tower."""
    vision = config.vision
    if vision is None:
        return ()
    side = vision.image_size
    features = TensorSpec("features", dtype, ("N", vision.patches, vision.width))
    projected = TensorSpec("projected", dtype, ("N", vision.patches, config.d_model))
    return (
        GraphSignature("tower", (TensorSpec("pixels", dtype, ("N", vision.channels, side, side)),), (features,)),
        GraphSignature("projector", (features,), (projected,)),
    )
