"""Calibration sets for every family: shapes, determinism, targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from bkprune.calibration import Calibration, draw, noise_conditions, noise_latents
from bkprune.single_file import families
from tests.conftest import SMALL, SMALL_XL, build

XL = {
    **SMALL_XL,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}


def calibration(config: Any, n: int = 8, seed: int = 3) -> Calibration:
    latents, conditions = noise_latents(config, n, seed), noise_conditions(config, n, seed)
    return draw(latents, conditions, config, n_train_timesteps=1000, n_bins=4, seed=seed)


@pytest.mark.parametrize(
    "config",
    [SMALL, XL, {**SMALL, "in_channels": 9}, {**SMALL, "in_channels": 8}],
    ids=["sd", "sdxl", "inpainting", "pix2pix"],
)
def test_every_family_runs(config: dict[str, Any]) -> None:
    unet = build(config)
    batch = calibration(unet.config, n=2)
    with torch.no_grad():
        out = unet(**batch.inputs(DDPMScheduler(), torch.float32)).sample
    assert out.shape == (2, 4, 16, 16)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("family", list(families()))
def test_shipped_configs_are_understood(family: str, meta: Callable[[str], Any]) -> None:
    config = meta(family).config
    set_of_two = calibration(config, n=2)
    inputs = set_of_two.inputs(DDPMScheduler(), torch.float32)
    assert inputs["sample"].shape == (2, config.in_channels, *[config.sample_size] * 2)
    assert inputs["encoder_hidden_states"].shape == (2, 77, config.cross_attention_dim)
    if family == "sdxl":
        assert inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 1280)


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    config = build(SMALL).config
    whole, part = calibration(config, n=8), calibration(config, n=5)
    assert torch.equal(whole.noise[:5], part.noise)
    assert torch.equal(whole.timesteps[:5], part.timesteps)
    assert not torch.equal(whole.noise, calibration(config, n=8, seed=4).noise)
    rows = [(r.start, r.stop, len(b)) for r, b in whole.batches(3)]
    assert rows == [(0, 3, 3), (3, 6, 3), (6, 8, 2)]


def test_the_target_follows_the_prediction_type() -> None:
    batch = calibration(build(SMALL).config)
    assert torch.equal(batch.target(DDPMScheduler()), batch.noise)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    torch.testing.assert_close(batch.target(scheduler), velocity)
    with pytest.raises(ValueError, match="prediction_type 'sample' is not supported"):
        batch.target(DDPMScheduler(prediction_type="sample"))


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="12 input channels over 4"):
        calibration({**build(SMALL).config, "in_channels": 12})
