"""What a mask or a student really loses: on noised latents, or where whole pictures are drawn.

Knows how one recorded teacher pass a batch serves any number of masks, and how outputs, final
latents and pictures are compared with the teacher's of the same seeds. It does not know how masks
are chosen, nor tables and files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkprune.blocks import Inventory, Mask
from bkprune.bypass import Replay, bypassed
from bkprune.calibration import Calibration
from bkprune.clip import ClipScore
from bkprune.sampling import SamplingSettings, decode, sample_latents

Array = NDArray[np.float64]


class OutputError:
    """E||eps_mask - eps||^2 over a calibration set, the criterion `output` with uniform weighting.

    The recorded passes are held in memory up to `max_bytes`; batches beyond that are recorded anew
    for every mask.
    """

    def __init__(
        self, pipeline: Any, calibration: Calibration, batch_size: int, max_bytes: float = 4e9
    ) -> None:
        self._pipeline = pipeline
        self._inventory = Inventory.of(pipeline.unet)
        self._batches = [batch for _, batch in calibration.batches(batch_size)]
        self._bins = calibration.bins.numpy()
        self._recorded: dict[int, Replay] = {}
        self._left = max_bytes

    def __call__(self, mask: Mask) -> tuple[float, float]:
        """Mean and standard error, stratified by timestep bin; NaN if an output is not finite."""
        plan = self._inventory.plan(mask)
        errors = []
        for index in range(len(self._batches)):
            replay = self._replay(index)
            difference = replay.ablate(plan).double() - replay.output.double()
            errors.append(difference.square().flatten(1).mean(1).numpy())
        values: Array = np.concatenate(errors)
        strata = [values[self._bins == b] for b in np.unique(self._bins)]
        share = np.array([len(s) for s in strata]) / len(values)
        variance = np.array([s.var(ddof=1) / len(s) if len(s) > 1 else np.nan for s in strata])
        return float(values.mean()), float(np.sqrt((variance * share**2).sum()))

    def _replay(self, index: int) -> Replay:
        if index in self._recorded:
            return self._recorded[index]
        unet = self._pipeline.unet
        batch = self._batches[index]
        replay = Replay(unet, **batch.inputs(self._pipeline.scheduler, unet.dtype))
        if replay.recorded_bytes <= self._left:
            self._recorded[index] = replay
            self._left -= replay.recorded_bytes
        return replay


class PictureLoss:
    """What whole sampling runs say of a mask: `latent` (LD-Pruner) and `clip`, each with its error.

    Args:
        pipeline: the teacher's.
        prompts: one picture each.
        settings: how they are drawn.
        clip_score: the judge for `clip`, or None to leave it out.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        settings: SamplingSettings,
        clip_score: ClipScore | None,
    ) -> None:
        self._pipeline, self._prompts, self._settings = pipeline, list(prompts), settings
        self._clip_score = clip_score
        self._inventory = Inventory.of(pipeline.unet)
        self._teacher = sample_latents(pipeline, self._prompts, settings)
        self._before = self._score(self._teacher)

    def __call__(self, mask: Mask) -> dict[str, tuple[float, float]]:
        """Shift of final latents, and drop of the CLIP score in points of 100 x cosine."""
        with bypassed(self._pipeline.unet, self._inventory.plan(mask)):
            latents = sample_latents(self._pipeline, self._prompts, self._settings)
        found = {"latent": latent_shift(self._teacher, latents)}
        after = self._score(latents)
        if self._before is not None and after is not None:
            drop = self._before - after
            found["clip"] = (drop.mean().item(), drop.std().item() / len(drop) ** 0.5)
        return found

    def _score(self, latents: Tensor) -> Tensor | None:
        if self._clip_score is None:
            return None
        pictures = decode(self._pipeline.vae, latents, self._settings.batch_size)
        return self._clip_score(pictures, self._prompts)


def latent_shift(teacher: Tensor, ablated: Tensor) -> tuple[float, float]:
    """LD-Pruner's score over a set of final latents, with its jackknife standard error."""

    def score(rows: Tensor) -> float:
        a, b = teacher[rows].double(), ablated[rows].double()
        mean = (a.mean(0) - b.mean(0)).norm()
        std = (a.std(0) - b.std(0)).norm()
        return float(mean + std)

    n = len(teacher)
    if n < 3:
        return score(torch.arange(n)), float("nan")
    left_out = np.array([score(torch.arange(n)[torch.arange(n) != i]) for i in range(n)])
    spread = ((left_out - left_out.mean()) ** 2).sum()
    return score(torch.arange(n)), float(np.sqrt((n - 1) / n * spread))


@torch.no_grad()
def outputs(unet: Any, scheduler: Any, inputs: Calibration, batch_size: int) -> Tensor:
    """What a U-Net says of noised held-out latents, `[N, C, H, W]`, wherever it lies."""
    device = next(unet.parameters()).device
    out = []
    for _, batch in inputs.batches(batch_size):
        given = _moved(batch.inputs(scheduler, unet.dtype), device)
        out.append(unet(**given).sample.float().cpu())
    return torch.cat(out)


def _moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _moved(value, device) if isinstance(value, dict) else value.to(device)
        for name, value in inputs.items()
    }


class Distance(ABC):
    """How far U-Nets are from the teacher's, one value a sample; the teacher is asked once."""

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher
        self._expected: Tensor | None = None

    def __call__(self, unet: Any) -> Array:
        """What a U-Net loses against the teacher, `[N]`."""
        if self._expected is None:
            self._expected = self.of(self._teacher)
        found: Array = self.apart(self.of(unet), self._expected).numpy()
        return found

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of samples."""

    @abstractmethod
    def of(self, unet: Any) -> Tensor:
        """What is compared, `[N, ...]` in float64."""

    @abstractmethod
    def apart(self, found: Tensor, expected: Tensor) -> Tensor:
        """How far two such are from each other, `[N]`."""


class OutputDistance(Distance):
    """||eps_student - eps_teacher||^2 of noised latents, mean over elements."""

    def __init__(self, pipeline: Any, inputs: Calibration, batch_size: int) -> None:
        super().__init__(pipeline.unet)
        self._scheduler, self._inputs, self._batch_size = pipeline.scheduler, inputs, batch_size

    def __len__(self) -> int:
        return len(self._inputs)

    def of(self, unet: Any) -> Tensor:
        """Its outputs, `[N, C, H, W]`."""
        return outputs(unet, self._scheduler, self._inputs, self._batch_size).double()

    def apart(self, found: Tensor, expected: Tensor) -> Tensor:
        """Mean squared difference, `[N]`."""
        return (found - expected).square().flatten(1).mean(1)


class PictureDistance(Distance):
    """1 - cosine of the CLIP features of pictures of the same prompts and seeds.

    Sampling runs meet errors that noised latents do not: each step goes on from what the student
    itself has made, with guidance.

    Args:
        pipeline: the teacher's.
        prompts: N of them.
        settings: how they are drawn.
        clip_score: the network that looks at them.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        settings: SamplingSettings,
        clip_score: ClipScore,
    ) -> None:
        super().__init__(pipeline.unet)
        self._pipeline, self._prompts, self._settings = pipeline, list(prompts), settings
        self._clip = clip_score

    def __len__(self) -> int:
        return len(self._prompts)

    def of(self, unet: Any) -> Tensor:
        """Features of its pictures, unit vectors `[N, D]`."""
        self._pipeline.to(next(unet.parameters()).device)
        own, self._pipeline.unet = self._pipeline.unet, unet
        try:
            latents = sample_latents(self._pipeline, self._prompts, self._settings)
        finally:
            self._pipeline.unet = own
        pictures = decode(self._pipeline.vae, latents, self._settings.batch_size).cpu()
        return self._clip.image_features(pictures).double()

    def apart(self, found: Tensor, expected: Tensor) -> Tensor:
        """1 - cosine, `[N]`."""
        return 1 - (found * expected).sum(-1)
