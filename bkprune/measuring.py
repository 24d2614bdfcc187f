"""Times and memory of a profiled model on the target, and how well its table predicts masks.

Knows which contestants are timed against which, how times of modules become rows of the cost table,
and how masks are measured beside the teacher. Clocks, backends and statistics are rooms of their
own; what the networks are is `profiling.py`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DDIMScheduler
from torch import nn

from bkprune import cost
from bkprune.backends import Clock, Target, prepare
from bkprune.blocks import Inventory, Mask
from bkprune.bypass import variant
from bkprune.cost import REST, CostTable
from bkprune.counting import Call
from bkprune.graphs import Pass
from bkprune.latency import (
    Contestant,
    Isolated,
    Progress,
    in_place,
    interleave,
    whole,
)
from bkprune.memory import (
    allocated_mb,
    check_memory,
    explained,
    peak_rss_mb,
    peak_rss_reset,
    peaks,
)
from bkprune.presets import PRESETS, preset
from bkprune.profiling import Profile
from bkprune.series import Array, Rounds, Series
from bkprune.skeleton import with_random_weights
from bkprune.study import Unfinished

MARKED, OVERHEAD, EMPTY = "marked pass", "an empty call", "without any block"
UNET, IMAGE = "unet", "image"
GUIDANCE_SCALE = 7.5


# --- one network, its modules, the other networks, a whole image -------------------------------


def measure(
    profile: Profile, unfinished: Unfinished, progress: Progress
) -> tuple[CostTable, pd.DataFrame]:
    """Time the U-Net block by block, the other networks, and one whole image.

    Returns:
        The cost table with times, and one row for each whole thing that was timed. An image that
        would by itself take longer than the time limit is left out.

    Raises:
        ValueError: it does not fit the device, or the device cannot run it.
    """
    s = profile.settings
    probing = _probing(s.target)
    with _trouble(profile):
        baseline = allocated_mb(s.target)
        unet, clock = network(profile), Clock(s.target.device)
        call = profile.unet_call(s.target.device)
        run = prepare(unet, call, s.target)
        modules = [*cost.rows_of(profile.inventory), *profile.shortcuts()]
        contestants = {UNET: whole(UNET, run, clock)}
        owner = {name: name for name in modules}
        if s.target.backend == "eager":
            contestants[MARKED] = in_place(unet, call, modules, clock, MARKED)
        else:
            isolated = Isolated.record(unet, call, modules)
            owner = isolated.owner
            contestants |= isolated.contestants(unet, s.target, clock, progress)
            contestants[OVERHEAD] = whole(OVERHEAD, _nothing(s.target), clock)
            emptied = variant(unet, profile.inventory.plan(profile.inventory.names))
            contestants[EMPTY] = whole(EMPTY, prepare(emptied, call, s.target), clock)
        rounds = interleave(
            contestants, s.timing, unfinished, "timing the U-Net", progress, probing=probing
        )
        rows = _timed_rows(profile, rounds, owner)
        found_mb = peaks(unet, call, cost.rows_of(profile.inventory), s.target, baseline)
        for name, peak in found_mb.items():
            if name:
                rows.loc[name, "peak_memory_mb"] = peak
        wholes = [_whole_row(UNET, rounds, run, s.target)]
        passes: dict[str, Pass] = {}
        for name, (skeleton, given) in profile.others("meta").items():
            baseline = allocated_mb(s.target)
            other = with_random_weights(
                skeleton, torch.device(s.target.device), s.target.torch_dtype
            )
            inputs = tuple(torch.zeros_like(a, device=s.target.device) for a in given.args)
            given = Call(inputs, given.kwargs)
            passes[name] = prepare(other, given, s.target)
            contest = {name: whole(name, passes[name], clock)}
            found = interleave(
                contest, s.timing, unfinished, f"timing the {name}", progress, probing=probing
            )
            _put_series(rows, name, found[name], 1.0)
            found_mb = peaks(other, given, (), s.target, baseline)
            rows.loc[name, "peak_memory_mb"] = found_mb.get("", float("nan"))
            wholes.append(_whole_row(name, found, passes[name], s.target))
        if "vae_decoder" in passes and len(passes) > 1:
            ms = {row["part"]: row["median"] for row in wholes}
            steps_ms = ms.pop(UNET) * s.steps * (1 if s.guidance else 2)
            if (sum(ms.values()) + steps_ms) / 1e3 > s.timing.max_s:
                return _finished(profile, rows, wholes)  # one image alone is over the time limit
            if not s.guidance:
                run = prepare(unet, profile.unet_call(s.target.device, guidance=True), s.target)
            image = _image(profile, passes, run)
            timing = replace(s.timing, min_rounds=min(s.timing.min_rounds, 5))
            what = f"timing an image of {s.steps} guided steps"
            contest = {IMAGE: whole(IMAGE, image, clock)}
            found = interleave(contest, timing, unfinished, what, progress, probing=probing)
            wholes.append(_whole_row(IMAGE, found, image, s.target))
    return _finished(profile, rows, wholes)


def _finished(
    profile: Profile, rows: pd.DataFrame, wholes: list[dict[str, Any]]
) -> tuple[CostTable, pd.DataFrame]:
    return CostTable(rows.reset_index(), profile.inventory), pd.DataFrame(wholes)


def network(profile: Profile) -> nn.Module:
    """The U-Net on the target with random weights.

    Raises:
        ValueError: it does not fit there; the batch size that would is named.
    """
    s, counted = profile.settings, profile.counts.whole
    check_memory(s.target, counted.weight_bytes, counted.activation_bytes, s.batch_size)
    device = torch.device(s.target.device)
    return with_random_weights(profile.bones.unet, device, s.target.torch_dtype)


def _probing(target: Target) -> bool:
    """Whether the work is done by this machine's CPU."""
    return target.device == "cpu" and target.backend != "command"


def _trouble(profile: Profile) -> AbstractContextManager[None]:
    s, counted = profile.settings, profile.counts.whole
    return explained(s.target, counted.weight_bytes, counted.activation_bytes, s.batch_size)


def _timed_rows(profile: Profile, rounds: Rounds, owner: Mapping[str, str]) -> pd.DataFrame:
    """Times enter as shares of the plain pass of the same round; the rest is what is left.

    Modules timed alone do not add up to the pass they were taken from. There the U-Net without any
    block is timed too and says what the rest takes; the modules share what is left.
    """
    unet = rounds[UNET]
    rows = profile.table.rows.set_index("unit")
    modules = cost.rows_of(profile.inventory)
    shares = {name: _share(rounds, owner[name]) for name in [*modules, *profile.shortcuts()]}
    if EMPTY in rounds.names:
        shares = _made_to_add_up(profile, rounds, shares, modules)
    for name in modules:
        _put_series(rows, name, Series.of(shares[name]), unet.median)
    # medians do not add up: the rest's interval is moved to where the rows do
    total = sum((shares[name] for name in modules), np.zeros(1))
    spare = 1 - float(rows.loc[modules, "latency_ms"].sum()) / unet.median
    rest = Series.of(1 - total)
    shift = spare - rest.median
    rest = replace(rest, median=spare, low=rest.low + shift, high=rest.high + shift)
    _put_series(rows, REST, rest, unet.median)
    for name in profile.shortcuts():
        share = float(np.median(shares[name]))
        rows.loc[name.removesuffix(".conv_shortcut"), "shortcut_latency_ms"] = share * unet.median
    return rows


def _share(rounds: Rounds, name: str) -> Array:
    """A module's share of the plain pass; what calling a backend costs by itself is taken off."""
    own = rounds.of(name)
    if OVERHEAD in rounds.names:
        own = np.maximum(own - rounds.of(OVERHEAD), 0.0)
    share: Array = own / rounds.of(UNET)
    return share


def _made_to_add_up(
    profile: Profile, rounds: Rounds, shares: dict[str, Array], modules: Collection[str]
) -> dict[str, Array]:
    """The shares of modules timed alone, scaled to what the U-Net takes beyond its empty self."""
    empty = float(np.median(rounds.of(EMPTY) / rounds.of(UNET)))
    plan = profile.inventory.plan(profile.inventory.names)
    left_in = [f"{name}.conv_shortcut" for name, kind in plan.items() if kind == "shortcut"]
    empty -= sum(float(np.median(shares[name])) for name in left_in)
    total = sum(float(np.median(shares[name])) for name in modules)
    if total <= 0:
        raise ValueError(
            "every block takes no longer than an empty call: these times do not depend on the "
            "network (--latency-cmd: is its output about {onnx}, and the pattern the right number?)"
        )
    scale = (1 - max(empty, 0.0)) / total
    return {name: share * scale for name, share in shares.items()}


def _nothing(target: Target) -> Pass:
    """A pass that does nothing, through the backend."""
    given = torch.ones(1, device=target.device, dtype=target.torch_dtype)
    return prepare(_Nothing(), Call((given,), {}), target)


class _Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def _image(profile: Profile, passes: Mapping[str, Pass], step: Pass) -> Pass:
    """Prompt to picture: text encoders, guided DDIM steps with their arithmetic, VAE decoder."""
    s = profile.settings
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(s.steps)
    channels = int(profile.bones.unet.config.out_channels)
    shape = (s.batch_size, channels, *profile.latent_size)
    zeros = torch.zeros(shape, device=s.target.device, dtype=s.target.torch_dtype)

    def run() -> float | None:
        latents, own = zeros, 0.0
        with torch.inference_mode():
            for name, encode in passes.items():
                if name.startswith("text_encoder"):
                    own += encode() or 0.0
            for t in scheduler.timesteps:
                own += step() or 0.0
                with_text, without = zeros, zeros  # the pass keeps its output: any will do
                noise = without + GUIDANCE_SCALE * (with_text - without)
                latents = scheduler.step(noise, int(t), latents, return_dict=False)[0]
            own += passes["vae_decoder"]() or 0.0
        return own or None

    return run


# --- whole masks -------------------------------------------------------------------------


def compare(
    profile: Profile,
    masks: Mapping[str, Mask],
    table: CostTable,
    unfinished: Unfinished,
    progress: Progress,
) -> pd.DataFrame:
    """Time whole masks beside the teacher, in the same rounds, and set them beside the table.

    Returns:
        One row a mask: predicted and measured milliseconds with interval. What is measured is
        the ratio to the teacher within a round; it is given in milliseconds of the table's
        teacher, so that the machine's drift since then is no part of the error.
    """
    s = profile.settings
    teacher_ms = table.cost_of().latency_ms
    if teacher_ms is None:
        raise ValueError(f"{table.source} has no latency: profile without --no-latency first")
    with _trouble(profile):
        unet, clock = network(profile), Clock(s.target.device)
        call = profile.unet_call(s.target.device)
        contestants: dict[str, Contestant] = {
            UNET: whole(UNET, prepare(unet, call, s.target), clock)
        }
        for i, (name, mask) in enumerate(masks.items()):
            progress(i, len(masks), "preparing masks")
            thinner = variant(unet, profile.inventory.plan(mask))
            contestants[name] = whole(name, prepare(thinner, call, s.target), clock)
        progress(len(masks), len(masks), "preparing masks")
        rounds = interleave(
            contestants,
            s.timing,
            unfinished,
            "timing whole masks",
            progress,
            probing=_probing(s.target),
        )
    rows = []
    for name, mask in masks.items():
        predicted, ratio = table.cost_of(mask), rounds.ratio(name, UNET)
        row = {
            "mask": name,
            "removed": " ".join(sorted(mask, key=profile.inventory.names.index)),
            "n_removed": len(mask),
            **{c: getattr(predicted, c) for c in ("params", "macs_paper", "macs")},
            "predicted_ms": predicted.latency_ms,
            "measured_ms": ratio.median * teacher_ms,
            "measured_ms_low": ratio.low * teacher_ms,
            "measured_ms_high": ratio.high * teacher_ms,
            "n": ratio.n,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def validation_masks(inventory: Inventory, n: int, seed: int) -> dict[str, Mask]:
    """`n` random masks, each with a removal rate of its own, and the presets that fit."""
    random = np.random.default_rng(seed)
    masks: dict[str, Mask] = {}
    for i in range(n):
        share = random.uniform(0.1, 0.7)
        masks[f"random {i}"] = frozenset(b for b in inventory.names if random.random() < share)
    for name in PRESETS:
        try:
            masks[name] = preset(name, inventory)
        except ValueError:
            continue
    return masks


def _put_series(rows: pd.DataFrame, name: str, share: Series, scale: float) -> None:
    for column, value in {
        "latency_ms": share.median,
        "latency_ms_std": share.std,
        "latency_ms_low": share.low,
        "latency_ms_high": share.high,
    }.items():
        rows.loc[name, column] = value * scale


def _whole_row(name: str, rounds: Rounds, run: Pass, target: Target) -> dict[str, Any]:
    series, peak = rounds[name], None
    if _probing(target) and peak_rss_reset():
        run()
        peak = peak_rss_mb()
    return {
        "part": name,
        **asdict(series),
        "n_set_aside": len(rounds.ms) - series.n,
        "noisy": series.is_noisy,
        "probe_ms": rounds.probe_ms if np.isfinite(rounds.probe_ms) else None,
        "process_peak_mb": peak,
    }
