"""What series of times say: medians, their intervals, ratios, and which rounds were disturbed.

Knows statistics of times measured one after the other on a machine that others may be using. It
does not know what was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]

DISTURBED = 1.06
PROBE = "probe"
_MIN_JUDGED, _QUIETEST = 20, 0.02


@dataclass(frozen=True)
class Series:
    """What a series of times says. Interval: 95 %, of the median."""

    median: float
    low: float
    high: float
    p10: float
    p90: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Array) -> Series:
        """Summarise times in the order in which they were measured."""
        low, high = median_interval(values)
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        std = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        return cls(float(median), low, high, float(p10), float(p90), std, len(values))

    @property
    def precision(self) -> float:
        """Half-width of the interval over the median."""
        return (self.high - self.low) / (2 * self.median)

    @property
    def is_noisy(self) -> bool:
        """Whether a tenth of the runs took over a fifth longer than another tenth."""
        return self.p90 - self.p10 > 0.2 * self.median


def median_interval(values: Array) -> tuple[float, float]:
    """95 % interval of the median, for times that are measured one after the other.

    The wider one of two: by order statistics, which takes the runs for independent, and by the
    spread of the medians of ten consecutive stretches (Student's t), which sees slow drift.
    """
    n = len(values)
    ordered = np.sort(values)
    reach = 0.98 * n**0.5
    low = float(ordered[max(0, int(np.floor(n / 2 - reach)))])
    high = float(ordered[min(n - 1, int(np.ceil(n / 2 + reach)) - 1)])
    n_stretches = min(10, n // 3)
    if n_stretches >= 4:
        from scipy import stats  # slow to import, and reports do without

        medians = [np.median(part) for part in np.array_split(values, n_stretches)]
        spread = stats.t.ppf(0.975, n_stretches - 1) * np.std(medians, ddof=1) / n_stretches**0.5
        middle = float(np.median(values))
        low, high = min(low, middle - spread), max(high, middle + spread)
        low, high = max(low, float(ordered[0])), min(high, float(ordered[-1]))
    return low, high


@dataclass
class Rounds:
    """Times of all contestants, `[rounds, names]`: a row was measured within one short while."""

    names: list[str]
    ms: Array
    quiet_ms: float = float("inf")  # of the probe, where an earlier measurement saw it

    def __getitem__(self, name: str) -> Series:
        return Series.of(self.of(name))

    def of(self, name: str) -> Array:
        """All times of one name in undisturbed rounds, in order."""
        times: Array = self.ms[self.undisturbed, self.names.index(name)]
        return times

    def ratio(self, name: str, base: str) -> Series:
        """Times of one name over another's in the same round."""
        return Series.of(self.of(name) / self.of(base))

    @property
    def undisturbed(self) -> NDArray[np.bool_]:
        """Which rounds count: all where nobody probed, or where too few are left to judge by."""
        everything = np.ones(len(self.ms), dtype=bool)
        if PROBE not in self.names or len(self.ms) < _MIN_JUDGED:
            return everything
        probe = self.ms[:, self.names.index(PROBE)]
        for level in (min(self.quiet_ms, self.probe_ms), self.probe_ms):
            quiet: NDArray[np.bool_] = probe <= DISTURBED * level
            if quiet.sum() >= _MIN_JUDGED / 2:
                return quiet
        return everything

    @property
    def probe_ms(self) -> float:
        """The probe's time in the quietest rounds."""
        if PROBE not in self.names:
            return float("inf")
        return float(np.percentile(self.ms[:, self.names.index(PROBE)], 100 * _QUIETEST))


def accuracy(compared: pd.DataFrame) -> dict[str, float]:
    """How well predicted times fit measured ones: MAPE in per cent, Spearman, Kendall's tau-b.

    Written out, because importing scipy.stats takes longer than the rest of a report's tables.
    """
    predicted, measured = compared["predicted_ms"], compared["measured_ms"]
    above, beyond = (
        np.sign(np.subtract.outer(ms.to_numpy(), ms.to_numpy())) for ms in (predicted, measured)
    )
    pairs = np.sqrt((above**2).sum() * (beyond**2).sum())
    return {
        "mape_percent": 100 * float((predicted / measured - 1).abs().mean()),
        "spearman": float(predicted.rank().corr(measured.rank())),
        "kendall": float((above * beyond).sum() / pairs) if pairs else float("nan"),
    }
