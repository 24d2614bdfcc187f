"""Quality metrics of pictures, each with a value per picture so that errors can be told.

Knows the CLIP score and where its network comes from (the small one beside the built-in model, or a
local folder), and the Frechet distance between sets of features. It downloads nothing and does not
know where pictures come from.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from bkprune.single_file import ASSETS, first_line, quiet, read_json

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipScore:
    """100 x cosine between picture and caption, floored at 0 (Hessel et al. 2021, w = 1)."""

    model: Any
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, folder: Path | None) -> ClipScore:
        """From a local CLIPModel folder, or the one trained beside the built-in emoji model.

        Raises:
            ValueError: the folder does not hold a CLIP model with its tokenizer.
        """
        path = folder or ASSETS / "emoji" / "clip"
        settings = path / "preprocessor_config.json"
        pixels = read_json(settings) if settings.exists() else {}
        try:
            with quiet():
                model = CLIPModel.from_pretrained(path, local_files_only=True).float().eval()
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no CLIP model in it ({first_line(error)})") from error
        mean = tuple(pixels.get("image_mean", _OPENAI_MEAN))
        return cls(model, tokenizer, mean, tuple(pixels.get("image_std", _OPENAI_STD)))

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Unit vectors `[N, D]` of pictures `[N, 3, H, W]` in [0, 1]."""
        size = self.model.config.vision_config.image_size
        if pictures.shape[-2:] != (size, size):
            pictures = F.interpolate(
                pictures, size=(size, size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        pixels = (pictures - mean) / std
        features = [
            self.model.get_image_features(batch).pooler_output for batch in pixels.split(64)
        ]
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors `[N, D]` of captions."""
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return F.normalize(self.model.get_text_features(batch.input_ids).pooler_output, dim=-1)

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """The score of each picture with its own caption, `[N]`, 0 to 100."""
        cosine = (self.image_features(pictures) * self.text_features(captions)).sum(-1)
        return 100 * cosine.clamp(min=0)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """||mu_a - mu_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features `[N, D]`, in float64.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6; unbiased covariances. Few samples bias it upwards:
    below twice as many samples as dimensions it warns.
    """
    a, b = a.double(), b.double()
    n, d = min(len(a), len(b)), a.shape[1]
    if n < 2 * d:
        warnings.warn(
            f"a Frechet distance of {n} samples in {d} dimensions is biased upwards", stacklevel=2
        )
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    # tr (C_a C_b)^(1/2) from the eigenvalues of the similar, symmetric C_a^(1/2) C_b C_a^(1/2)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * cross)
