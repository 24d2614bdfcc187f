"""What a mask really loses: it is ablated on calibration samples.

Knows how one recorded teacher pass a batch serves any number of masks. It does not know how masks
are chosen, nor tables and files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkprune.blocks import Inventory, Mask
from bkprune.bypass import Replay
from bkprune.calibration import Calibration

Array = NDArray[np.float64]


class OutputError:
    """E||eps_mask - eps||^2 over a calibration set, the criterion `output` with uniform weighting.

    The recorded passes are held in memory up to `max_bytes`; batches beyond that are recorded anew
    for every mask.
    """

    def __init__(
        self, pipeline: Any, calibration: Calibration, batch_size: int, max_bytes: float = 4e9
    ) -> None:
        self._pipeline = pipeline
        self._inventory = Inventory.of(pipeline.unet)
        self._batches = [batch for _, batch in calibration.batches(batch_size)]
        self._bins = calibration.bins.numpy()
        self._recorded: dict[int, Replay] = {}
        self._left = max_bytes

    def __call__(self, mask: Mask) -> tuple[float, float]:
        """Mean and standard error, stratified by timestep bin; NaN if an output is not finite."""
        plan = self._inventory.plan(mask)
        errors = []
        for index in range(len(self._batches)):
            replay = self._replay(index)
            difference = replay.ablate(plan).double() - replay.output.double()
            errors.append(difference.square().flatten(1).mean(1).numpy())
        values: Array = np.concatenate(errors)
        strata = [values[self._bins == b] for b in np.unique(self._bins)]
        share = np.array([len(s) for s in strata]) / len(values)
        variance = np.array([s.var(ddof=1) / len(s) if len(s) > 1 else np.nan for s in strata])
        return float(values.mean()), float(np.sqrt((variance * share**2).sum()))

    def _replay(self, index: int) -> Replay:
        if index in self._recorded:
            return self._recorded[index]
        unet = self._pipeline.unet
        batch = self._batches[index]
        replay = Replay(unet, **batch.inputs(self._pipeline.scheduler, unet.dtype))
        if replay.recorded_bytes <= self._left:
            self._recorded[index] = replay
            self._left -= replay.recorded_bytes
        return replay
