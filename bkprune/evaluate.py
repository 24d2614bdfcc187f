"""From pictures and networks to numbers: every metric of a model, and how models differ.

Knows which metric needs which features, what pictures are compared with, and the tables that come
out. It does not know how pictures were drawn, nor options and files beside the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkprune.features import ClipRows, Network, Reference, rows_of
from bkprune.judges import Judges
from bkprune.lpips import Lpips
from bkprune.metrics import (
    METRICS,
    Array,
    Estimate,
    Frechet,
    InceptionScore,
    Kernel,
    Mean,
    Measured,
)
from bkprune.pictures import PictureFolder
from bkprune.protocols import PAIRED_METRICS, Prompts

Progress = Callable[[int, int, str], None]
_BATCH, _TEXTS = 16, 256
# equal pictures would be infinitely good; half a grey level is as near as 8 bits tell: 54.2 dB
PSNR_OF_EQUAL = float(20 * np.log10(2 * 255))
_REACH = 1.96  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Subject:
    """One model's pictures."""

    label: str
    pictures: PictureFolder


def groups_of_prompts(prompts: Prompts, n: int) -> NDArray[np.int64]:
    """Which prompt each of the first n pictures has: equal prompts have equal numbers."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompts[i], len(numbers)) for i in range(n)])


def measure_pictures(
    subject: Subject,
    teacher: Subject | None,
    prompts: Prompts,
    n: int,
    judges: Judges,
    metrics: Sequence[str],
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Measured]:
    """Metrics of the first n pictures; those against the teacher where there is one beside it."""
    groups = groups_of_prompts(prompts, n)
    found: dict[str, Measured] = {}
    wanted = set(metrics)
    if judges.inception is not None and wanted & {"fid", "kid", "is"}:
        network: Network = judges.inception
        rows = _rows(subject, network, n, progress)
        features = rows[:, : network.width]
        found |= _distances(
            "fid", "kid", features, judges.references.get("inception"), groups, wanted
        )
        if "is" in wanted:
            found["is"] = Measured.of(InceptionScore(rows[:, network.width :]), groups)
    if judges.clip is not None and wanted & {"clip_score", "frechet_clip", "kernel_clip"}:
        rows = _rows(subject, judges.clip, n, progress)
        reference = judges.references.get("clip")
        found |= _distances("frechet_clip", "kernel_clip", rows, reference, groups, wanted)
        if "clip_score" in wanted:
            scores = _clip_scores(judges.clip, rows, prompts)
            found["clip_score"] = Measured.of(Mean(scores), groups)
    paired = [name for name in PAIRED_METRICS if name in wanted]
    if teacher is not None and teacher is not subject and paired:
        for name, values in _against(subject, teacher, n, paired, judges.lpips, progress).items():
            found[name] = Measured.of(Mean(values), groups)
    return found | _troubles(subject, n)


def _rows(subject: Subject, network: Network, n: int, progress: Progress) -> Any:
    name = f"{network.name}-{network.key.rpartition(':')[2][:8]}.npy"
    path = subject.pictures.folder / "features" / name
    what = f"{network.name} features of {subject.label}"
    return rows_of(path, subject.pictures.load, n, network, progress, what)


def _distances(
    frechet: str,
    kernel: str,
    features: Any,
    reference: Reference | None,
    groups: NDArray[np.int64],
    wanted: set[str],
) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    if reference is None:
        return found
    width = features.shape[1]
    if frechet in wanted:
        estimate: Estimate = Frechet(features, reference.moments)
        found[frechet] = Measured.of(estimate, groups, width)
    if kernel in wanted and reference.features is not None:
        found[kernel] = Measured.of(Kernel(features, reference.features), groups)
    return found


def _clip_scores(clip: ClipRows, rows: Any, prompts: Prompts) -> Array:
    """100 x cosine with each picture's own prompt, floored at 0."""
    scores = []
    for start in range(0, len(rows), _TEXTS):
        numbers = range(start, min(start + _TEXTS, len(rows)))
        vectors = clip.clip.text_features([prompts[i] for i in numbers]).double().numpy()
        pictures = np.asarray(rows[numbers.start : numbers.stop], np.float64)
        scores.append((pictures * vectors).sum(1))
    out: Array = 100 * np.maximum(np.concatenate(scores), 0)
    return out


def _against(
    subject: Subject,
    teacher: Subject,
    n: int,
    metrics: Sequence[str],
    lpips: Lpips | None,
    progress: Progress,
) -> dict[str, Array]:
    """Values of each picture against the teacher's of the same prompt and seed."""
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for start in range(0, n, _BATCH):
        numbers = range(start, min(start + _BATCH, n))
        ours, theirs = (_stack(who, numbers) for who in (subject, teacher))
        if "psnr" in values:
            psnr = peak_signal_noise_ratio(
                ours, theirs, data_range=1.0, dim=(1, 2, 3), reduction="none"
            )
            values["psnr"].append(psnr.clamp(max=PSNR_OF_EQUAL))
        if "ssim" in values:
            ssim = structural_similarity_index_measure(
                ours, theirs, data_range=1.0, reduction="none"
            )
            values["ssim"].append(torch.atleast_1d(ssim))
        if "lpips" in values and lpips is not None:
            values["lpips"].append(lpips(ours * 2 - 1, theirs * 2 - 1))
        progress(numbers.stop, n, f"{subject.label} against the teacher")
    return {name: torch.cat(parts).double().numpy() for name, parts in values.items() if parts}


def _stack(subject: Subject, numbers: Sequence[int]) -> Tensor:
    pictures = np.stack([subject.pictures.load(i) for i in numbers])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _troubles(subject: Subject, n: int) -> dict[str, Measured]:
    found = [subject.pictures.trouble(i) for i in range(n)]
    none = np.empty(0)
    return {
        name: Measured(float(found.count(name)), n, none)
        for name in ("black", "not_finite", "flagged")
    }


def output_error(ours: Tensor, teacher: Tensor) -> Measured:
    """E||eps - eps_teacher||^2 a sample."""
    errors = (ours.double() - teacher.double()).square().flatten(1).mean(1).numpy()
    return Measured.of(Mean(errors), np.arange(len(errors)))


# --- tables ----------------------------------------------------------------------------------


def value_table(
    found: Mapping[str, Mapping[str, Measured]], about: Mapping[str, str], how: Mapping[str, str]
) -> pd.DataFrame:
    """One row a model and metric.

    Args:
        found: metrics by model.
        about: columns that all rows have.
        how: by metric, what it was measured with.
    """
    rows = []
    for model, metrics in found.items():
        for name, measured in metrics.items():
            metric = METRICS[name]
            rows.append(
                {
                    **about,
                    "model": model,
                    "metric": name,
                    "value": measured.value,
                    "stderr": measured.stderr if len(measured.resamples) > 1 else np.nan,
                    "n": measured.n,
                    "better": metric.better,
                    "unit": metric.unit,
                    "how": how.get(name, ""),
                }
            )
    return pd.DataFrame(rows)


def difference_table(
    found: Mapping[str, Mapping[str, Measured]], about: Mapping[str, str]
) -> pd.DataFrame:
    """Every pair of models, on the same prompts and seeds: `a` minus `b` and its 95 % interval.

    Resamples are shared by all models, so that what both find hard cancels out.
    """
    rows = []
    models = list(found)
    for i, a in enumerate(models):
        for b in models[:i]:
            for name in found[a]:
                ours, theirs = found[a][name], found[b].get(name)
                if theirs is None or not min(len(ours.resamples), len(theirs.resamples)):
                    continue
                apart, stderr = ours.minus(theirs)
                low, high = apart - _REACH * stderr, apart + _REACH * stderr
                better = METRICS[name].better
                wins = apart < 0 if better == "lower" else apart > 0
                verdict = "same" if low <= 0 <= high else "better" if wins else "worse"
                rows.append(
                    {
                        **about,
                        "metric": name,
                        "a": a,
                        "b": b,
                        "a_minus_b": apart,
                        "low": low,
                        "high": high,
                        "a_is": verdict,
                    }
                )
    return pd.DataFrame(rows)
