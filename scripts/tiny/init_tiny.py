"""Initial values for so narrow a model: whitened patches, smooth positions, weights scaled by their fan-in.

The stock initialiser (deviation 0.02 everywhere) suits widths of thousands. At width 192 it leaves blocks nearly
silent, and raw pixels are so correlated that a tower learns mean colours long before strokes.
"""

import math

import numpy as np
import torch
from torch import nn

from .data_batches import to_patches
from .data_material import Material
from .data_mix import draw_text_batch
from .data_tasks import digit_sample, emoji_sample, scene_sample


WHITENING_SAMPLES = 100
# Variance below which a direction counts as noise; pixels range from -1 to 1.
WHITENING_FLOOR = 0.02
POSITION_SCALE = 0.3


def sample_patches(material: Material, seed: int = 0) -> np.ndarray:
    """About 10,000 training patches (count, 768) as float32 in -1 to 1."""
    rng = np.random.default_rng(seed)
    samples = [emoji_sample(rng, material, "train", 96) for _ in range(WHITENING_SAMPLES)]
    samples += [digit_sample(rng, material, "train") for _ in range(WHITENING_SAMPLES)]
    samples += [scene_sample(rng, 96) for _ in range(WHITENING_SAMPLES)]
    samples += draw_text_batch(rng, material, 2 * WHITENING_SAMPLES, 12)
    return np.concatenate([to_patches(sample.pictures[0]) for sample in samples]).astype(np.float32) / 127.5 - 1


def whitening_filters(patches: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` strongest principal directions (count, 768), scaled to unit variance, and the bias that centres."""
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    filters = vectors[:, -count:].T / (values[-count:, None].clamp_min(0) + WHITENING_FLOOR).sqrt()
    return filters, -filters @ mean


def smooth_positions(per_side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, (per_side ** 2, width); smooth, so other grid sizes interpolate well."""
    frequencies = math.pi * 2.0 ** torch.linspace(-1, 3, width // 4) / (per_side - 1)
    rows, columns = torch.meshgrid(torch.arange(per_side), torch.arange(per_side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


@torch.no_grad()
def initialize(model: nn.Module, material: Material) -> None:
    """Sets all weights of the model in place; draws from torch's global generator."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            writes_residual = name.endswith(("attn.proj", "o_proj", "mlp.linear_fc2", "down_proj"))
            module.weight.normal_(0, (0.5 if writes_residual else 1.0) * module.in_features**-0.5)
    visual = model.model.visual
    projection = visual.patch_embed.proj
    filters, bias = whitening_filters(torch.from_numpy(sample_patches(material)), len(projection.weight))
    # Both time slices of a still picture add up to one filter.
    projection.weight.copy_(0.5 * filters.view(-1, 3, 1, 16, 16).expand_as(projection.weight))
    projection.bias.copy_(bias)
    positions = smooth_positions(visual.num_grid_per_side, visual.pos_embed.embedding_dim)
    visual.pos_embed.weight.copy_(POSITION_SCALE * positions)
