"""The CLIP network that judges pictures, and the CLIP score.

Knows where the network comes from (the small one beside the built-in model, or a local folder) and
how pictures become its pixels. It downloads nothing and does not know where pictures come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from bkprune.data import fitted
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

    @property
    def width(self) -> int:
        """How many features a picture has."""
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Unit vectors `[N, D]` of pictures `[N, 3, H, W]` in [0, 1].

        Other sizes than the network's are resized as by transformers' processor: in uint8, PIL
        bicubic, shorter side, centre crop.
        """
        size = int(self.model.config.vision_config.image_size)
        if pictures.shape[-2:] != (size, size):
            pictures = torch.stack([_resized(picture, size) for picture in pictures])
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        pixels = (pictures - mean) / std
        features = [
            self.model.get_image_features(batch.to(self.model.device)).pooler_output.cpu()
            for batch in pixels.split(64)
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
        ids = batch.input_ids.to(self.model.device)
        return F.normalize(self.model.get_text_features(ids).pooler_output.cpu(), dim=-1)

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """The score of each picture with its own caption, `[N]`, 0 to 100."""
        cosine = (self.image_features(pictures) * self.text_features(captions)).sum(-1)
        return 100 * cosine.clamp(min=0)


def _resized(picture: Tensor, size: int) -> Tensor:
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    fitting = fitted(Image.fromarray(array), size).copy()
    return torch.from_numpy(fitting).permute(2, 0, 1).float() / 255
