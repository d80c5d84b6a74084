"""The vision parts in eager PyTorch, the reference of every back end.

A SigLIP tower (arXiv 2303.15343): pre-norm layers with biases, attention among
the patches of one tile, no norm after the last layer; then a projector of two
layers with a GELU between them. Weights are a dictionary by a part's local names;
matrices are stored as [in, out], so a part computes x @ W. Axes: N tiles, P
patches of a tile, C channels, E the tower's width, d that of the language model;
an image side is written Y, X.
"""

import torch.nn.functional as F
from torch import Tensor

from engines.config import VisionConfig
from engines.eager.layers import Weights, linear


def embed(config: VisionConfig, weights: Weights, pixels: Tensor) -> Tensor:
    """pixels [N, C, Y, X] -> hidden [N, P, E]: a linear map of each patch, plus the embedding of its position.

    Where a side is no multiple of the patch size, the rest at the right and the bottom is ignored.
    """
    grid, size = config.grid, config.patch_size
    used = pixels[:, :, : grid * size, : grid * size]
    patches = used.reshape(len(used), config.channels, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
    return linear(weights, "patch", patches.reshape(len(used), config.patches, -1)) + weights["positions"]


def layer(config: VisionConfig, weights: Weights, index: int, hidden: Tensor) -> Tensor:
    """One transformer layer, hidden [N, P, E] -> [N, P, E]; attention stays within a tile."""
    name = f"layer_{index:02d}"
    normed = norm(config, weights, f"{name}.norm1", hidden)
    q, k, v = (
        linear(weights, f"{name}.{which}_proj", normed).view(*hidden.shape[:2], config.heads, -1).transpose(1, 2)
        for which in "qkv"
    )
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    hidden = hidden + linear(weights, f"{name}.out_proj", attended)
    normed = norm(config, weights, f"{name}.norm2", hidden)
    return hidden + linear(weights, f"{name}.fc2", F.gelu(linear(weights, f"{name}.fc1", normed), approximate="tanh"))


def norm(config: VisionConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Layer norm of x [N, P, E] with the weights `name`."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)


def tower(config: VisionConfig, weights: Weights, pixels: Tensor) -> Tensor:
    """The tower: pixels [N, C, Y, X] -> features [N, P, E]."""
    hidden = embed(config, weights, pixels)
    for index in range(config.layers):
        hidden = layer(config, weights, index, hidden)
    return hidden


def projector(weights: Weights, features: Tensor) -> Tensor:
    """The projector: features [N, P, E] -> rows [N, P, d] of the language model."""
    return linear(weights, "fc2", F.gelu(linear(weights, "fc1", features)))
