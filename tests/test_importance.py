"""Importance on the built-in model: definitions, laws, resume, independence of the batch size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bkprune.blocks import Inventory
from bkprune.bypass import bypassed
from bkprune.calibration import Calibration, calibrate
from bkprune.clip import ClipScore
from bkprune.data import Pairs, read_pairs
from bkprune.importance import COLUMNS, CRITERIA, AnalyzeSettings, analyze, timestep_weights
from bkprune.models import BUILT_IN, load
from bkprune.sampling import SamplingSettings
from bkprune.study import Stamp, Study, Unfinished

SETTINGS = AnalyzeSettings(
    grain="stage", n_samples=12, n_bins=4, batch_size=5, n_prompts=3, steps=2, guidance_scale=3.0
)
PROMPTS = ["rocket, noto emoji", "red heart, fluent emoji"]


@pytest.fixture(scope="session")
def emoji() -> Any:
    return load("emoji")


@pytest.fixture(scope="session")
def pairs() -> Pairs:
    return read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train")


def draw(emoji: Any, source: Any, settings: AnalyzeSettings) -> Calibration:
    return calibrate(
        emoji,
        source,
        n=settings.n_samples,
        n_bins=settings.n_bins,
        seed=settings.seed,
        batch_size=settings.batch_size,
        sampling=SamplingSettings(settings.steps, settings.guidance_scale, settings.seed),
    )


def unfinished(folder: Path, settings: AnalyzeSettings) -> Unfinished:
    return Unfinished(Study(folder), "importance.csv", Stamp.of(settings.stamped, {}))


def run(emoji: Any, source: Any, folder: Path, settings: AnalyzeSettings) -> pd.DataFrame:
    clip = ClipScore.load(None) if "clip" in settings.criteria else None
    return analyze(emoji, source, settings, unfinished(folder, settings), clip_score=clip)


def scores(table: pd.DataFrame, criterion: str, timestep_bin: str = "all") -> pd.Series[float]:
    chosen = (table["criterion"] == criterion) & (table["timestep_bin"] == timestep_bin)
    return table[chosen].set_index("unit")["score"]


def test_output_and_task_are_what_they_say(emoji: Any, pairs: Pairs, tmp_path: Path) -> None:
    settings = replace(SETTINGS, criteria=("output", "task"))
    table = run(emoji, pairs, tmp_path, settings)
    assert list(table.columns) == COLUMNS
    calibration = draw(emoji, pairs, settings)
    inventory = Inventory.of(emoji.unet)
    inputs = calibration.inputs(emoji.scheduler, torch.float32)
    with torch.no_grad():
        eps = emoji.unet(**inputs).sample
        with bypassed(emoji.unet, inventory.plan({"up_blocks.2"})):
            without = emoji.unet(**inputs).sample
    change = (without - eps).square().mean(dim=(1, 2, 3)).numpy()
    error = (eps - calibration.noise).square().mean(dim=(1, 2, 3)).numpy()
    rise = (without - calibration.noise).square().mean(dim=(1, 2, 3)).numpy() - error
    bins = calibration.bins.numpy()
    assert scores(table, "output")["up_blocks.2"] == pytest.approx(change.mean(), rel=1e-4)
    in_bin = change[bins == 3].mean()
    assert scores(table, "output", "3")["up_blocks.2"] == pytest.approx(in_bin, rel=1e-4)
    power = eps.square().mean().item()
    relative = scores(table, "output_per_power")["up_blocks.2"]
    assert relative == pytest.approx(change.mean() / power, rel=1e-4)
    ratios = [change[bins == b].mean() / error[bins == b].mean() for b in range(4)]
    per_error = scores(table, "output_per_error")["up_blocks.2"]
    assert per_error == pytest.approx(np.mean(ratios), rel=1e-4)
    assert scores(table, "task")["up_blocks.2"] == pytest.approx(rise.mean(), rel=1e-4)
    spread = [change[bins == b].var(ddof=1) / 3 for b in range(4)]
    row = table[(table.criterion == "output") & (table.timestep_bin == "all")]
    stderr = row.set_index("unit")["stderr"]["up_blocks.2"]
    assert stderr == pytest.approx(np.sqrt(np.sum(spread)) / 4, rel=1e-3)
    assert set(row["n"]) == {12}
    assert row["score"].is_monotonic_decreasing


def test_the_batch_size_changes_nothing(emoji: Any, pairs: Pairs, tmp_path: Path) -> None:
    tables = [
        run(emoji, pairs, tmp_path / str(n), replace(SETTINGS, batch_size=n)) for n in (1, 5, 12)
    ]
    for other in tables[1:]:
        assert list(other["unit"]) == list(tables[0]["unit"])
        np.testing.assert_allclose(other["score"], tables[0]["score"], rtol=1e-3, atol=1e-7)


def test_another_seed_draws_other_samples(emoji: Any, pairs: Pairs, tmp_path: Path) -> None:
    one = scores(run(emoji, pairs, tmp_path / "1", SETTINGS), "output")
    two = scores(run(emoji, pairs, tmp_path / "2", replace(SETTINGS, seed=5)), "output")
    assert (one - two[one.index]).abs().min() > 0


def test_an_interrupted_sweep_resumes_to_the_same_numbers(
    emoji: Any, pairs: Pairs, tmp_path: Path
) -> None:
    whole = run(emoji, pairs, tmp_path / "whole", SETTINGS)

    def stop(done: int, total: int, what: str) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(emoji, pairs, SETTINGS, unfinished(tmp_path, SETTINGS), stop)
    left = unfinished(tmp_path, SETTINGS)
    assert 0 < np.isfinite(left.arrays["power"]).sum() < 12
    resumed = analyze(emoji, pairs, SETTINGS, left)
    pd.testing.assert_frame_equal(resumed, whole)


def test_sampling_criteria(emoji: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, criteria=("latent", "clip"))
    table = run(emoji, PROMPTS, tmp_path, settings)
    latent, clip = scores(table, "latent"), scores(table, "clip")
    assert len(latent) == len(clip) == 9
    assert (latent > 0).all()
    assert clip.abs().max() > 0
    assert (table["stderr"] > 0).all()
    again = run(emoji, PROMPTS, tmp_path / "b", replace(settings, batch_size=1))
    np.testing.assert_allclose(scores(again, "latent")[latent.index], latent, rtol=1e-3)


def test_taylor_and_magnitude(emoji: Any, pairs: Pairs, tmp_path: Path) -> None:
    settings = replace(SETTINGS, criteria=("taylor", "magnitude"), n_samples=8)
    table = run(emoji, pairs, tmp_path, settings)
    assert (scores(table, "taylor") > 0).all()
    weights = torch.cat([p.detach().flatten() for p in emoji.unet.mid_block.parameters()])
    expected = weights.square().mean().sqrt().item()
    assert scores(table, "magnitude")["mid_block"] == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for p in emoji.unet.parameters())


def test_taylor_is_the_squared_slope_along_the_weights(
    emoji: Any, pairs: Pairs, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, criteria=("taylor",), n_samples=2, n_bins=1)
    calibration = draw(emoji, pairs, settings)
    blocks = Inventory.of(emoji.unet).units("stage")["up_blocks.3"]
    weights = [p for name in blocks for p in emoji.unet.get_submodule(name).parameters()]

    def losses() -> torch.Tensor:
        with torch.no_grad():
            out = emoji.unet(**calibration.inputs(emoji.scheduler, torch.float32)).sample
        error: torch.Tensor = (out - calibration.noise).double().square().mean(dim=(1, 2, 3))
        return error

    saved, step, found = [w.detach().clone() for w in weights], 2e-3, []
    for sign in (1, -1):
        for weight, value in zip(weights, saved, strict=True):
            weight.data.copy_(value * (1 + sign * step))
        found.append(losses())
    for weight, value in zip(weights, saved, strict=True):
        weight.data.copy_(value)
    slopes = (found[0] - found[1]) / (2 * step)
    table = run(emoji, pairs, tmp_path, settings)
    expected = slopes.square().mean().item()
    assert scores(table, "taylor")["up_blocks.3"] == pytest.approx(expected, rel=0.05)


def test_prompts_alone_get_latents_of_the_teacher(emoji: Any) -> None:
    calibration = draw(emoji, PROMPTS, SETTINGS)
    assert calibration.latents.shape == (12, 4, 16, 16)
    assert 0.3 < calibration.latents.std() < 3
    counts = np.bincount(calibration.bins.numpy())
    assert list(counts) == [3, 3, 3, 3]
    edges = calibration.timesteps // 250
    assert torch.equal(edges, calibration.bins)


def test_weights_of_timesteps(emoji: Any) -> None:
    abar = emoji.scheduler.alphas_cumprod.double().numpy()
    for kind in ("uniform", "x0", "snr"):
        assert timestep_weights(emoji.scheduler, kind).mean() == pytest.approx(1)
    x0 = timestep_weights(emoji.scheduler, "x0")
    assert x0[900] / x0[100] == pytest.approx(
        (1 - abar[900]) / abar[900] / ((1 - abar[100]) / abar[100])
    )
    snr = timestep_weights(emoji.scheduler, "snr")
    assert snr[999] == pytest.approx(snr[900])
    assert snr[10] < snr[999]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criteria": ("outputs",)}, "unknown criterion outputs: choose from output"),
        ({"criteria": ()}, "unknown criterion none"),
        ({"weighting": "loud"}, "unknown weighting 'loud'"),
        ({"n_samples": 7}, "7 samples over 4 timestep bins"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)
    assert set(SETTINGS.criteria) <= set(CRITERIA)
