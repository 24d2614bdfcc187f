"""Seconds per picture of whole pipelines, side by side, split over their parts.

Knows how a pipeline's run is marked on the device's time line. How often it is run, and which
rounds count, is for `latency.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from bkprune.backends import Clock
from bkprune.latency import Contestant, TimingSettings, interleave
from bkprune.metrics import Measured
from bkprune.sampling import SamplingSettings
from bkprune.series import Rounds, Series
from bkprune.study import Unfinished

PARTS = ("text_encoder", "unet", "vae_decoder")
Progress = Any


def time_pictures(
    pipelines: Mapping[str, Any],
    prompt: str,
    settings: SamplingSettings,
    timing: TimingSettings,
    unfinished: Unfinished,
    progress: Progress,
) -> tuple[dict[str, dict[str, Measured]], dict[str, tuple[float, float, float]]]:
    """Time one picture, batch 1, of every pipeline in each round.

    Returns:
        By model, seconds of the whole and of its parts, with the standard error of their medians;
        and by model the ratio to the first one in the same rounds, with its 95 % interval.
    """
    device = str(next(iter(pipelines.values())).device)
    clock = Clock(device)
    contestants = {
        label: _contestant(label, pipeline, prompt, settings, clock)
        for label, pipeline in pipelines.items()
    }
    rounds = interleave(
        contestants, timing, unfinished, "timing", progress, probing=device == "cpu"
    )
    first = next(iter(pipelines))
    found = {label: _seconds(rounds, label) for label in pipelines}
    ratios = {}
    for label in pipelines:
        ratio = rounds.ratio(label, first)
        ratios[label] = (ratio.median, ratio.low, ratio.high)
    return found, ratios


def _seconds(rounds: Rounds, label: str) -> dict[str, Measured]:
    names = {"s_per_image": label} | {f"s_{part}": f"{label}/{part}" for part in PARTS}
    out = {}
    for metric, name in names.items():
        times = rounds.of(name) / 1e3
        series = Series.of(times)
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(times, (200, len(times))), axis=1)
        out[metric] = Measured(series.median, len(times), medians)
    return out


def _contestant(
    label: str, pipeline: Any, prompt: str, settings: SamplingSettings, clock: Clock
) -> Contestant:
    marks: dict[str, list[Any]] = {part: [] for part in PARTS}
    modules = {
        "text_encoder": [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)],
        "unet": [pipeline.unet],
        "vae_decoder": [pipeline.vae.decoder],
    }

    def turn() -> dict[str, float]:
        with ExitStack() as stack, torch.inference_mode():
            for part, members in modules.items():
                marks[part].clear()

                def mark(*_: Any, part: str = part) -> None:
                    marks[part].append(clock.mark())

                for module in members:
                    if module is not None:
                        stack.callback(module.register_forward_pre_hook(mark).remove)
                        stack.callback(module.register_forward_hook(mark).remove)
            start = clock.mark()
            pipeline(
                prompt=prompt,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator().manual_seed(settings.seed),
                output_type="pt",
            )
            end = clock.mark()
        clock.wait()
        times = {
            f"{label}/{part}": sum(
                clock.elapsed_ms(*pair) for pair in zip(at[::2], at[1::2], strict=True)
            )
            for part, at in marks.items()
        }
        return {**times, label: clock.elapsed_ms(start, end)}

    return turn
