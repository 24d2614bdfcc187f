"""Seeded text-to-image: one generator per image, so that batches never change a picture.

Knows how to run a pipeline for a list of prompts and seeds under a scheduler by name, and how two
U-Nets share the steps of one run. It does not know which blocks a U-Net has left, nor what the
pictures are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn; the defaults are BK-SDM's (25 steps, guidance 7.5 for SD).

    Attributes:
        steps: of the scheduler.
        guidance_scale: of classifier-free guidance; 1 and less is none.
        seed: of picture 0; picture `i` has `seed + i`.
        batch_size: pictures at a time.
        scheduler: a name in `SCHEDULERS`, or None for the pipeline's own.
        negative_prompt: for all pictures.
        strength: of image-to-image, the share of the steps that is taken.
        is_exact: pictures go through the networks one by one, so that on a CPU the batch size does
            not change a bit; together they are faster, and equal up to rounding.
    """

    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 1234
    batch_size: int = 16
    scheduler: str | None = None
    negative_prompt: str = ""
    strength: float | None = None
    is_exact: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError("at least one step and one picture at a time")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler {self.scheduler!r}: choose one of {', '.join(SCHEDULERS)}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength}: above 0, at most 1")


def use_scheduler(pipeline: Any, name: str | None) -> None:
    """Give the pipeline a scheduler by name, with the noise schedule that it has."""
    if name is not None:
        class_name, settings = SCHEDULERS[name]
        cls = getattr(diffusers, class_name)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **settings)


@dataclass(frozen=True)
class Drawn:
    """Pictures `[N, H, W, 3]` in uint8; what is wrong with each: nothing, not_finite, flagged."""

    pictures: NDArray[np.uint8]
    troubles: list[str]


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    start: Tensor | None = None,
) -> Drawn:
    """One picture a prompt and seed, as `pipeline(prompt)` alone would draw it.

    Args:
        pipeline: text-to-image, or image-to-image with `start`.
        prompts: N of them.
        seeds: N of them; each makes a generator on the CPU.
        settings: how; its own seed is not used.
        start: pictures `[N, 3, H, W]` in [0, 1] that image-to-image begins from.
    """
    size = 1 if settings.is_exact else settings.batch_size
    parts = [
        _draw(
            pipeline,
            list(prompts[i : i + size]),
            seeds[i : i + size],
            settings,
            None if start is None else start[i : i + size],
        )
        for i in range(0, len(prompts), size)
    ]
    pictures = np.concatenate([part.pictures for part in parts])
    return Drawn(pictures, [trouble for part in parts for trouble in part.troubles])


def _draw(
    pipeline: Any,
    prompts: list[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    start: Tensor | None,
) -> Drawn:
    how: dict[str, Any] = {"prompt": prompts, "num_inference_steps": settings.steps}
    if start is not None:
        how |= {"image": start, "strength": settings.strength}
    if settings.negative_prompt:
        how["negative_prompt"] = [settings.negative_prompt] * len(prompts)
    result = pipeline(
        **how,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    )
    pictures = result.images.float().cpu()
    is_finite = pictures.isfinite().flatten(1).all(1).tolist()
    flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
    troubles = [
        "not_finite" if not finite else "flagged" if flag else ""
        for finite, flag in zip(is_finite, flagged, strict=True)
    ]
    clean = torch.nan_to_num(pictures * torch.tensor(is_finite).view(-1, 1, 1, 1))
    array = (clean * 255).round().byte().permute(0, 2, 3, 1)
    return Drawn(array.contiguous().numpy(), troubles)


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
