"""Running a model without some of its blocks and measuring what changes, sample by sample.

Knows how plans are ablated by replay, under whole sampling runs, and what gradients say of them,
each saved as it goes so that a kill loses at most one batch. It does not know units, criteria or
tables: it gives arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bkprune.blocks import Plan
from bkprune.bypass import Replay, bypassed
from bkprune.calibration import Calibration
from bkprune.sampling import SamplingSettings, sample_latents
from bkprune.study import Unfinished

Array = NDArray[np.float64]
Progress = Callable[[int, int, str], None]  # done, total, what


@dataclass(frozen=True)
class DenoisingErrors:
    """Per sample, as means over elements: rows are samples, columns plans.

    `output` is ||eps_u - eps||^2 and `task` ||eps_u - y||^2, both `[N, units]`; `power` is
    ||eps||^2 and `error` ||eps - y||^2, both `[N]`.
    """

    output: Array
    task: Array
    power: Array
    error: Array


def denoising_errors(
    pipeline: Any,
    calibration: Calibration,
    plans: Sequence[Plan],
    batch_size: int,
    unfinished: Unfinished,
    progress: Progress,
) -> DenoisingErrors:
    """One recorded pass a batch, then every plan by replay; saved after each batch."""
    n, unet = len(calibration), pipeline.unet
    arrays = unfinished.arrays
    if "output" not in arrays:
        shape = (n, len(plans))
        arrays |= {"output": np.full(shape, np.nan), "task": np.full(shape, np.nan)}
        arrays |= {"power": np.full(n, np.nan), "error": np.full(n, np.nan)}
    total = n * (len(plans) + 1)
    for rows, batch in calibration.batches(batch_size):
        if not np.isnan(arrays["power"][rows]).any():
            continue
        target = batch.target(pipeline.scheduler).double()
        replay = Replay(unet, **batch.inputs(pipeline.scheduler, unet.dtype))
        teacher = replay.output.double()
        output, task = (np.empty((len(batch), len(plans))) for _ in range(2))
        for column, plan in enumerate(plans):
            ablated = replay.ablate(plan).double()
            output[:, column] = _mean_square(ablated - teacher)
            task[:, column] = _mean_square(ablated - target)
            progress(rows.start * (len(plans) + 1) + len(batch) * (column + 2), total, "ablating")
        arrays["output"][rows], arrays["task"][rows] = output, task
        arrays["power"][rows] = _mean_square(teacher)
        arrays["error"][rows] = _mean_square(teacher - target)
        unfinished.save()
    errors = DenoisingErrors(*(arrays[k] for k in ("output", "task", "power", "error")))
    if not np.isfinite(errors.power).all():
        raise ValueError(
            "the teacher's output is not finite on the calibration set: broken weights"
        )
    return errors


def _mean_square(difference: Tensor) -> Array:
    values: Array = difference.square().flatten(1).mean(1).numpy()
    return values


def sampled_latents(
    pipeline: Any,
    prompts: Sequence[str],
    plans: Mapping[str, Plan],
    settings: SamplingSettings,
    unfinished: Unfinished,
    progress: Progress,
) -> Iterator[Tensor]:
    """Final latents `[N, C, H, W]` of the same prompts and seeds under each plan.

    Saved after each plan; the plans' names are the keys under which they are kept.
    """
    arrays = unfinished.arrays
    for done, (name, plan) in enumerate(plans.items()):
        key = f"latents/{name}"
        if key not in arrays:
            with bypassed(pipeline.unet, plan):
                arrays[key] = sample_latents(pipeline, prompts, settings).numpy()
            unfinished.save()
        progress(done + 1, len(plans), "sampling")
        yield torch.from_numpy(arrays[key])


def squared_slopes(
    pipeline: Any,
    calibration: Calibration,
    groups: Sequence[Sequence[nn.Parameter]],
    unfinished: Unfinished,
    progress: Progress,
) -> Array:
    """(sum_m g_m w_m)^2 of the training loss for each sample and group of weights, `[N, groups]`.

    One backward pass a sample, so that a standard error over samples can be told.
    """
    unet, n = pipeline.unet, len(calibration)
    values = unfinished.arrays.setdefault("taylor", np.full((n, len(groups)), np.nan))
    required = [p.requires_grad for p in unet.parameters()]
    unet.requires_grad_(True)
    try:
        for rows, sample in calibration.batches(1):
            if np.isnan(values[rows]).any():
                unet.zero_grad(set_to_none=True)
                predicted = unet(**sample.inputs(pipeline.scheduler, unet.dtype)).sample
                target = sample.target(pipeline.scheduler)
                (predicted.float() - target).square().mean().backward()
                values[rows] = [_slope(group) ** 2 for group in groups]
                if rows.stop % 16 == 0:
                    unfinished.save()
            progress(rows.stop, n, "gradients")
    finally:
        unet.zero_grad(set_to_none=True)
        for parameter, flag in zip(unet.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
    return values


def _slope(group: Sequence[nn.Parameter]) -> float:
    return sum(float((p.grad * p.detach()).double().sum()) for p in group if p.grad is not None)
