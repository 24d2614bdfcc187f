"""What studies of the emoji model share: the data that is learned from, and the judge of students.

The same captions, pictures and noise for every model: the output error against the teacher, the
CLIP score of generated pictures by the small CLIP beside the model, and the Frechet distance of
their CLIP features from those of the real held-out pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bkprune.caching import Cache, CacheSettings, fill
from bkprune.calibration import calibrate
from bkprune.clip import ClipScore
from bkprune.data import read_pairs
from bkprune.measured import outputs
from bkprune.metrics import frechet_distance
from bkprune.models import BUILT_IN
from bkprune.sampling import SamplingSettings, decode, sample_latents
from bkprune.sources import Source

PAIRS = BUILT_IN["emoji"] / "pairs.zip"
N_ERRORS, SAMPLING = 320, SamplingSettings(10, 3.0, 77, 32)


def training_cache(teacher: Any, folder: Path) -> Cache:
    """The held-in pictures and captions, encoded by the teacher's networks."""
    source = Source(str(PAIRS), "train")
    size = int(teacher.unet.config.sample_size * teacher.vae_scale_factor)
    made = CacheSettings(size)
    fill(folder, teacher, source.examples(size), source.key, made, total=source.n)
    return Cache(folder)


class Judge:
    """Judges any U-Net in the teacher's place."""

    def __init__(
        self, teacher: Any, n_pictures: int = 256, sampling: SamplingSettings = SAMPLING
    ) -> None:
        held = read_pairs(PAIRS).split("heldout")
        self.teacher, self.sampling = teacher, sampling
        self.inputs = calibrate(
            teacher, held, n=N_ERRORS, n_bins=8, seed=5, batch_size=32, sampling=SAMPLING
        )
        self.prompts = held.captions[:n_pictures]
        self.clip = ClipScore.load(None)
        self.real = self.clip.image_features(held.images(64) / 2 + 0.5)
        self.expected = outputs(teacher.unet, teacher.scheduler, self.inputs, 32)

    def errors(self, unet: Any) -> Tensor:
        """Squared error of the output against the teacher's, by sample, `[N]`."""
        ours = outputs(unet.eval(), self.teacher.scheduler, self.inputs, 32)
        return (ours - self.expected).square().flatten(1).mean(1)

    def __call__(self, unet: Any) -> dict[str, float]:
        errors = self.errors(unet)
        own, self.teacher.unet = self.teacher.unet, unet
        try:
            latents = sample_latents(self.teacher, self.prompts, self.sampling)
        finally:
            self.teacher.unet = own
        pictures = decode(self.teacher.vae, latents, 32)
        score = self.clip(pictures, self.prompts)
        features = self.clip.image_features(pictures)
        return {
            "output_error": float(errors.mean()),
            "output_error_stderr": float(errors.std() / len(errors) ** 0.5),
            "clip_score": float(score.mean()),
            "clip_score_stderr": float(score.std() / len(score) ** 0.5),
            "frechet_clip": frechet_distance(features, self.real),
            "n_pictures": len(pictures),
        }
