"""Seeded text-to-image: one generator per image, so that batches never change a picture.

Knows how to run a pipeline for a list of prompts and seeds. It does not know which blocks the U-Net
has left, nor what the pictures are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn; the defaults are BK-SDM's (25 steps, guidance 7.5 for SD)."""

    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 1234
    batch_size: int = 16


@torch.no_grad()
def sample_latents(
    pipeline: Any, prompts: Sequence[str], settings: SamplingSettings, first: int = 0
) -> Tensor:
    """Final, scaled latents `[N, C, H, W]`; picture `i` starts from seed `seed + first + i`."""
    out = []
    for start in range(0, len(prompts), settings.batch_size):
        batch = list(prompts[start : start + settings.batch_size])
        seeds = [settings.seed + first + start + i for i in range(len(batch))]
        result = pipeline(
            prompt=batch,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        )
        out.append(result.images.float())
    return torch.cat(out)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Pictures `[N, 3, H, W]` in [0, 1] from scaled latents."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = latents / float(vae.config.scaling_factor) + shift
    pictures = [
        vae.decode(batch.to(vae.dtype)).sample.float() for batch in latents.split(batch_size)
    ]
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)
