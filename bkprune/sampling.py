"""Seeded text-to-image: one generator per image, so that batches never change a picture.

Knows how to run a pipeline for a list of prompts and seeds, and how two U-Nets share the steps of
one run. It does not know which blocks a U-Net has left, nor what the pictures are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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


class _Split(nn.Module):
    """One U-Net above a timestep and another at and below it; everything else is the second's."""

    def __init__(self, first: nn.Module, second: nn.Module, scheduler: Any, n_first: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self._scheduler, self._n_first = scheduler, n_first

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        steps = self._scheduler.timesteps.unique(sorted=True).flip(0)
        is_over = self._n_first < len(steps)
        last = steps[self._n_first] if is_over else steps[-1] - 1
        chosen = self.first if bool((torch.as_tensor(timestep) > last).all()) else self.second
        return chosen(sample, timestep, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Config, dtype, device and the like, which pipelines ask their U-Net for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("second"), name)


@contextmanager
def split_sampling(pipeline: Any, student: nn.Module, n_teacher_steps: int) -> Iterator[Any]:
    """Let the pipeline's own U-Net take the first steps and a student the rest (Hybrid SD).

    The early steps lay out the picture and gain most from the larger net (arXiv 2408.06646).

    Args:
        pipeline: the teacher's; inside the `with` its U-Net is both.
        student: a U-Net with the same inputs.
        n_teacher_steps: how many of the scheduler's timesteps, from the noisiest on, the teacher
            takes: 0 is the student alone, all of them the teacher alone.

    Raises:
        ValueError: a negative number of steps.
    """
    if n_teacher_steps < 0:
        raise ValueError(f"n_teacher_steps is {n_teacher_steps}: it cannot be negative")
    teacher = pipeline.unet
    pipeline.unet = _Split(teacher, student, pipeline.scheduler, n_teacher_steps)
    try:
        yield pipeline
    finally:
        pipeline.unet = teacher
