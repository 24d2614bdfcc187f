"""How much every unit matters: it is ablated, and what changes is measured.

Knows the criteria, their weighting over timesteps, their standard errors and the importance table.
It does not know how an ablation is run, nor budgets and costs, and draws nothing.

For one sample with noise level t let `eps` be the teacher's output, `eps_u` its output without unit
u, `y` the training target, and `w(t)` the weighting:

    output            E w ||eps_u - eps||^2                   LAPTOP-Diff 2404.11098, eq. 5
    output_per_power  the same over E w ||eps||^2
    output_per_error  E_bins [ E ||eps_u - eps||^2 / E ||eps - y||^2 ]: 1 is as much error again
    task              E w (||eps_u - y||^2 - ||eps - y||^2)
    latent            ||mean z_u - mean z|| + ||std z_u - std z|| of final latents, LD-Pruner
    clip              E [clip(x) - clip(x_u)] of generated pictures, in points of 100 x cosine
    magnitude         root mean square of the unit's weights; no data
    taylor            E (sum_m g_m w_m)^2 over the unit's weights, Molchanov 1906.10771, eq. 8

All squares are means over elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from bkprune.ablation import (
    Array,
    DenoisingErrors,
    Progress,
    denoising_errors,
    sampled_latents,
    squared_slopes,
)
from bkprune.blocks import Grain, Inventory, Mask, Plan
from bkprune.calibration import Calibration, calibrate, pick
from bkprune.clip import ClipScore
from bkprune.data import Pairs
from bkprune.measured import latent_shift
from bkprune.sampling import SamplingSettings, decode
from bkprune.study import Unfinished

Criterion = Literal["output", "task", "latent", "clip", "magnitude", "taylor"]
Weighting = Literal["uniform", "x0", "snr"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
COLUMNS = ["unit", "criterion", "timestep_bin", "score", "stderr", "n", "seed"]
TOTAL = "all"
SNR_GAMMA = 5.0


@dataclass(frozen=True)
class AnalyzeSettings:
    """What is measured; everything here but the batch size enters the record's stamp."""

    grain: Grain = "block"
    criteria: tuple[Criterion, ...] = ("output",)
    weighting: Weighting = "uniform"
    n_samples: int = 256
    n_bins: int = 8
    seed: int = 1234
    batch_size: int = 16
    n_prompts: int = 16
    steps: int = 25
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.criteria if name not in CRITERIA]
        if unknown or not self.criteria:
            raise ValueError(
                f"unknown criterion {', '.join(unknown) or 'none'}: "
                f"choose from {', '.join(CRITERIA)}"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"unknown weighting {self.weighting!r}: choose from {', '.join(WEIGHTINGS)}"
            )
        if self.n_bins < 1 or self.n_samples < 2 * self.n_bins:
            raise ValueError(
                f"{self.n_samples} samples over {self.n_bins} timestep bins: at least 2 a bin are "
                "needed for a standard error"
            )
        for name in ("batch_size", "n_prompts", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def sampling(self) -> SamplingSettings:
        """How pictures are drawn, where a criterion or prompts alone need them."""
        return SamplingSettings(self.steps, self.guidance_scale, self.seed, self.batch_size)

    @property
    def stamped(self) -> dict[str, Any]:
        """The settings that can change a number."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"}


def analyze(
    pipeline: Any,
    source: Pairs | list[str] | None,
    settings: AnalyzeSettings,
    unfinished: Unfinished,
    progress: Progress = lambda done, total, what: None,
    clip_score: ClipScore | None = None,
) -> pd.DataFrame:
    """Ablate every unit of the grain under every criterion.

    Args:
        pipeline: the model; its U-Net is left as it is.
        source: captioned images, prompts, or None for noise; see `calibrate`.
        settings: what is measured.
        unfinished: where measurements are kept until the table is whole.
        progress: told what is done of how much.
        clip_score: the judge, for the criterion `clip`.

    Returns:
        The importance table, one row for each unit, criterion and timestep bin (and `all`), best
        to keep first within a criterion. Same seed, same numbers; the batch size moves them by
        float rounding alone.
    """
    inventory = Inventory.of(pipeline.unet)
    units = inventory.units(settings.grain)
    parts: list[pd.DataFrame] = []
    wanted = set(settings.criteria)
    if wanted & {"output", "task", "taylor"}:
        calibration = calibrate(
            pipeline,
            source,
            n=settings.n_samples,
            n_bins=settings.n_bins,
            seed=settings.seed,
            batch_size=settings.batch_size,
            sampling=settings.sampling,
        )
    if wanted & {"output", "task"}:
        errors = denoising_errors(
            pipeline,
            calibration,
            [inventory.plan(blocks) for blocks in units.values()],
            settings.batch_size,
            unfinished,
            progress,
        )
        parts += _denoising_tables(errors, calibration, pipeline, units, settings)
    if wanted & {"latent", "clip"}:
        prompts = source.captions if isinstance(source, Pairs) else source
        if prompts is None:
            raise ValueError("latent and clip sample pictures: they need prompts, not noise")
        parts += _sampling_tables(
            pipeline, prompts, inventory, units, settings, unfinished, progress, clip_score
        )
    if "magnitude" in wanted:
        parts.append(_magnitude_table(pipeline.unet, units, settings))
    if "taylor" in wanted:
        parts.append(_taylor_table(pipeline, calibration, units, settings, unfinished, progress))
    table = pd.concat(parts, ignore_index=True)[COLUMNS]
    is_total = table["timestep_bin"] == TOTAL
    rank = table[is_total].set_index(["criterion", "unit"])["score"].rename("rank")
    table = table.join(rank, on=["criterion", "unit"])
    table = table.sort_values(
        ["criterion", "rank"], ascending=[True, False], kind="stable", ignore_index=True
    )
    return table.drop(columns="rank")


# --- one U-Net pass a sample: output, task ---------------------------------------------------


def _denoising_tables(
    errors: DenoisingErrors,
    calibration: Calibration,
    pipeline: Any,
    units: dict[str, Mask],
    settings: AnalyzeSettings,
) -> Iterator[pd.DataFrame]:
    bins = calibration.bins.numpy()
    weights = timestep_weights(pipeline.scheduler, settings.weighting)
    w = weights[calibration.timesteps.numpy()]
    if "output" in settings.criteria:
        yield _table("output", units, errors.output * w[:, None], bins, settings)
        power = float((errors.power * w).mean())
        relative = errors.output * (w / power)[:, None]
        yield _table("output_per_power", units, relative, bins, settings)
        error_of_bin = np.array([errors.error[bins == b].mean() for b in range(settings.n_bins)])
        ratio = errors.output / error_of_bin[bins][:, None]
        yield _table("output_per_error", units, ratio, bins, settings)
    if "task" in settings.criteria:
        rise = (errors.task - errors.error[:, None]) * w[:, None]
        yield _table("task", units, rise, bins, settings)


def timestep_weights(scheduler: Any, weighting: Weighting) -> Array:
    """`w(t)` for every training timestep, mean 1, on squared errors of the model's own output.

    `uniform` counts the output as it is; `x0` turns it into an error of the predicted clean
    latents; `snr` is min-SNR-5 (Hang et al. 2303.09556, eq. 5).
    """
    abar: Array = scheduler.alphas_cumprod.double().numpy()
    is_v = scheduler.config.prediction_type == "v_prediction"
    snr = abar / (1 - abar)
    if weighting == "uniform":
        w = np.ones_like(abar)
    elif weighting == "x0":
        w = 1 - abar if is_v else 1 / snr
    else:
        w = np.minimum(snr, SNR_GAMMA) / (snr + 1 if is_v else snr)
    out: Array = w / w.mean()
    return out


def _table(
    criterion: str,
    units: dict[str, Mask],
    values: Array,
    bins: NDArray[np.int64],
    settings: AnalyzeSettings,
) -> pd.DataFrame:
    """Means and standard errors of per-sample values `[N, units]`: in each bin, then stratified."""
    means, variances, counts = [], [], []
    for b in range(settings.n_bins):
        inside = values[bins == b]
        means.append(inside.mean(0))
        variances.append(inside.var(0, ddof=1) / len(inside))
        counts.append(len(inside))
    share = np.array(counts)[:, None] / len(values)
    rows = [
        (str(b), mean, np.sqrt(variance), count)
        for b, (mean, variance, count) in enumerate(zip(means, variances, counts, strict=True))
    ]
    total = (np.array(means) * share).sum(0)
    stderr = np.sqrt((np.array(variances) * share**2).sum(0))
    rows.insert(0, (TOTAL, total, stderr, len(values)))
    return pd.concat(
        pd.DataFrame(
            {
                "unit": list(units),
                "criterion": criterion,
                "timestep_bin": name,
                "score": score,
                "stderr": error,
                "n": count,
                "seed": settings.seed,
            }
        )
        for name, score, error, count in rows
    )


# --- whole sampling runs: latent, clip -------------------------------------------------------


def _sampling_tables(
    pipeline: Any,
    prompts: list[str],
    inventory: Inventory,
    units: dict[str, Mask],
    settings: AnalyzeSettings,
    unfinished: Unfinished,
    progress: Progress,
    clip_score: ClipScore | None,
) -> Iterator[pd.DataFrame]:
    """What whole sampling runs say of each unit: shifts of latents, drops of the CLIP score."""
    chosen = [prompts[i] for i in pick(len(prompts), settings.n_prompts, settings.seed)]
    plans: dict[str, Plan] = {"": {}} | {
        name: inventory.plan(blocks) for name, blocks in units.items()
    }
    teacher, *ablated = sampled_latents(
        pipeline, chosen, plans, settings.sampling, unfinished, progress
    )
    if "latent" in settings.criteria:
        measured = [latent_shift(teacher, z) for z in ablated]
        yield _totals("latent", units, measured, len(chosen), settings)
    if "clip" in settings.criteria:
        assert clip_score is not None
        before = clip_score(decode(pipeline.vae, teacher, settings.batch_size), chosen)
        drops = [
            before - clip_score(decode(pipeline.vae, z, settings.batch_size), chosen)
            for z in ablated
        ]
        measured = [(d.mean().item(), d.std().item() / len(d) ** 0.5) for d in drops]
        yield _totals("clip", units, measured, len(chosen), settings)


# --- for comparison: magnitude, taylor -------------------------------------------------------


def _magnitude_table(unet: Any, units: dict[str, Mask], settings: AnalyzeSettings) -> pd.DataFrame:
    measured, counts = [], []
    for blocks in units.values():
        weights = list(_parameters(unet, blocks))
        n = sum(p.numel() for p in weights)
        square = sum(float(p.detach().double().square().sum()) for p in weights) / n
        fourth = sum(float(p.detach().double().pow(4).sum()) for p in weights) / n
        root = square**0.5
        spread = max(fourth - square**2, 0.0)
        measured.append((root, (spread / n) ** 0.5 / (2 * root) if root else 0.0))
        counts.append(n)
    return _totals("magnitude", units, measured, counts, settings)


def _taylor_table(
    pipeline: Any,
    calibration: Calibration,
    units: dict[str, Mask],
    settings: AnalyzeSettings,
    unfinished: Unfinished,
    progress: Progress,
) -> pd.DataFrame:
    groups = [list(_parameters(pipeline.unet, blocks)) for blocks in units.values()]
    values = squared_slopes(pipeline, calibration, groups, unfinished, progress)
    return _table("taylor", units, values, calibration.bins.numpy(), settings)


def _parameters(unet: Any, blocks: Mask) -> Iterator[nn.Parameter]:
    for block in sorted(blocks):
        yield from unet.get_submodule(block).parameters()


def _totals(
    criterion: str,
    units: dict[str, Mask],
    measured: list[tuple[float, float]],
    n: int | list[int],
    settings: AnalyzeSettings,
) -> pd.DataFrame:
    """A table of whole-run figures, which have no timestep bins."""
    return pd.DataFrame(
        {
            "unit": list(units),
            "criterion": criterion,
            "timestep_bin": TOTAL,
            "score": [score for score, _ in measured],
            "stderr": [stderr for _, stderr in measured],
            "n": n,
            "seed": settings.seed,
        }
    )
