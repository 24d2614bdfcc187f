"""The CLIP score against torchmetrics, and pictures that do not depend on their batch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from bkprune.clip import ClipScore
from bkprune.data import read_pairs
from bkprune.models import BUILT_IN, load
from bkprune.sampling import SamplingSettings, decode, sample_latents

PROMPTS = ["rocket, noto emoji", "red heart, fluent emoji", "grinning cat, noto emoji"]


def test_clip_score_is_that_of_torchmetrics() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.multimodal import CLIPScore
    ours = ClipScore.load(None)
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").subset(range(6))
    pictures = (pairs.images(64) + 1) / 2

    class Features:
        config = ours.model.config

        def to(self, _: Any) -> Features:
            return self

        def eval(self) -> Features:
            return self

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = ours.model.get_image_features(pixels).pooler_output
            return out

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = ours.model.get_text_features(ids).pooler_output
            return out

    def process(
        text: list[str] | None = None, images: list[torch.Tensor] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        if text is not None:
            batch = ours.tokenizer(text, padding="max_length", max_length=24, return_tensors="pt")
            out |= {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if images is not None:
            out["pixel_values"] = torch.stack(images) * 2 - 1
        return out

    theirs = CLIPScore(model_name_or_path=lambda: (Features(), process))
    theirs.update(list(pictures), pairs.captions)
    with torch.no_grad():
        expected = float(theirs.compute())
    assert float(ours(pictures, pairs.captions).mean()) == pytest.approx(expected, rel=1e-5)


def test_the_judge_knows_its_own_pictures() -> None:
    judge = ClipScore.load(None)
    train = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train")
    pairs = train.subset(range(0, 2900, 58))
    pictures = (pairs.images(64) + 1) / 2
    cosine = judge.image_features(pictures) @ judge.text_features(pairs.captions).T
    hits = (cosine.argmax(1) == torch.arange(len(pairs))).float().mean()
    assert hits > 0.8
    own = judge(pictures, pairs.captions)
    torch.testing.assert_close(own, 100 * cosine.diagonal().clamp(min=0))


def test_other_sizes_are_resized_as_by_transformers() -> None:
    ours = ClipScore.load(None)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 96, 150), dtype=torch.uint8, generator=generator)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=ours.mean, image_std=ours.std
    )
    arrays = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    pixels = torch.stack([torch.as_tensor(processor(a)["pixel_values"][0]) for a in arrays]).float()
    with torch.no_grad():
        expected = ours.model.get_image_features(pixels).pooler_output
    cosine = torch.cosine_similarity(ours.image_features(pictures / 255), expected)
    assert cosine.min() > 0.9999


def test_a_folder_without_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CLIP model in it"):
        ClipScore.load(tmp_path)


def test_same_seed_same_picture_at_any_batch_size() -> None:
    pipeline = load("emoji")
    settings = SamplingSettings(steps=4, guidance_scale=3.0, seed=5)
    whole = sample_latents(pipeline, PROMPTS, settings)
    single = sample_latents(pipeline, PROMPTS, replace(settings, batch_size=1))
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-3)
    later = sample_latents(pipeline, PROMPTS[1:], settings, first=1)
    torch.testing.assert_close(whole[1:], later, rtol=1e-3, atol=1e-3)
    pictures = decode(pipeline.vae, whole)
    assert pictures.shape == (3, 3, 64, 64)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
