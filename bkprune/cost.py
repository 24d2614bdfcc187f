"""The cost table: what every module costs, and by adding up what any mask would cost.

Knows its columns and conventions, how masks and dead levels are added up, and how a table made for
another model or resolution is recognised. Nothing is counted or measured here, and no torch is
needed: a table measured on a phone can be searched on a laptop.

The table has a row for every module that a plan can bypass (blocks, and samplers that a dead level
takes along), one for the rest of the U-Net, and further rows for text encoder and VAE decoder. The
U-Net's rows add up to the whole U-Net. A bypass costs nothing, except `shortcut`, which keeps the
1x1 convolution: the columns `shortcut_*` say what that is. A shortcut that is left in a dead level
runs at the size of the level outside it, so it is scaled by `pixels`, the positions at which each
module runs: the one place where costs are not simply additive. Params and MACs of a mask are exact;
latency is additive by assumption, which `bkprune profile --validate` tests; memory is all weights
that are left plus the highest activation peak among the rows that are left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bkprune.blocks import Inventory

REST = "rest"
BLOCK, SAMPLER = "block", "sampler"
COUNTS = ("params", "macs_paper", "macs", "weight_bytes")
COLUMNS = [
    "unit",
    "part",
    "pixels",
    *COUNTS,
    "activation_mb",
    "latency_ms",
    "latency_ms_std",
    "latency_ms_low",
    "latency_ms_high",
    "peak_memory_mb",
    *(f"shortcut_{name}" for name in COUNTS),
    "shortcut_latency_ms",
]
UNET_PARTS = (BLOCK, SAMPLER, REST)
CONVENTIONS = {
    "macs_paper": "conv and linear weights + 4 x LayerNorm elements, no attention matmuls",
    "macs": "conv, linear and attention matmuls, no norms",
}


@dataclass(frozen=True)
class Cost:
    """What a U-Net costs; `latency_ms` is None where the table has none. MB are 1e6 bytes."""

    params: int
    macs_paper: int
    macs: int
    weight_bytes: int
    memory_mb: float
    latency_ms: float | None

    def relative_to(self, teacher: Cost) -> dict[str, float]:
        """Every figure as a share of the teacher's."""
        return {
            name: getattr(self, name) / getattr(teacher, name)
            for name in (*COUNTS, "memory_mb", "latency_ms")
            if getattr(self, name) is not None and getattr(teacher, name)
        }


class CostTable:
    """A cost table together with the inventory its rows belong to.

    Raises:
        ValueError: columns are missing, or the rows are not those of this inventory.
    """

    def __init__(
        self, rows: pd.DataFrame, inventory: Inventory, source: str = "cost table"
    ) -> None:
        missing = [name for name in ("unit", "part", *COUNTS) if name not in rows.columns]
        if missing:
            raise ValueError(f"{source}: columns {', '.join(missing)} are missing")
        self.rows = rows.reindex(columns=COLUMNS)
        self.inventory = inventory
        self.source = source
        units = list(self.unet_rows["unit"])
        expected = {*rows_of(inventory), REST}
        if set(units) != expected or len(units) != len(expected):
            odd = sorted(set(units) ^ expected) or sorted({u for u in units if units.count(u) > 1})
            raise ValueError(
                f"{source}: its rows are not this U-Net's blocks ({', '.join(odd[:3])}"
                f"{', ...' if len(odd) > 3 else ''}); it was made for another model"
            )
        indexed = self.unet_rows.set_index("unit")
        self._whole = {name: int(indexed[name].sum()) for name in COUNTS}
        self._whole_rows, self._shortcuts = _as_arrays(indexed)
        self._latency = float(indexed["latency_ms"].sum()) if self.has_latency else None
        peaks = indexed["peak_memory_mb"].astype(float)
        if peaks.isna().any():
            peaks = self._whole["weight_bytes"] / 1e6 + indexed["activation_mb"].astype(float)
        self._peaks = {str(unit): float(peak) for unit, peak in peaks.items()}
        self._pixels = {str(u): float(n) for u, n in indexed["pixels"].items() if not pd.isna(n)}

    @property
    def unet_rows(self) -> pd.DataFrame:
        """The rows that add up to the U-Net."""
        return self.rows[self.rows["part"].isin(UNET_PARTS)]

    @property
    def has_latency(self) -> bool:
        """Whether every row of the U-Net was timed."""
        return bool(self.unet_rows["latency_ms"].notna().all())

    def cost_of(self, mask: Collection[str] = (), *, keep_shortcuts: bool = False) -> Cost:
        """What the U-Net costs without these blocks.

        Args:
            mask: names of blocks, of units of any grain, or globs.
            keep_shortcuts: as in `Inventory.plan`.
        """
        return self.cost_of_plan(self.inventory.plan(mask, keep_shortcuts=keep_shortcuts))

    def cost_of_plan(self, plan: Mapping[str, str]) -> Cost:
        """What the U-Net costs with these modules bypassed."""
        saved = np.zeros(len(COUNTS) + 1)
        grown = self._grown(plan)
        for name, bypass in plan.items():
            saved += self._whole_rows[name]
            if bypass == "shortcut":
                saved -= self._shortcuts[name] * np.where(_BY_PIXEL, grown.get(name, 1.0), 1.0)
        counts = {name: self._whole[name] - int(saved[i]) for i, name in enumerate(COUNTS)}
        left = [peak for unit, peak in self._peaks.items() if unit not in plan]
        gone_mb = (self._whole["weight_bytes"] - counts["weight_bytes"]) / 1e6
        latency = None if self._latency is None else self._latency - float(saved[-1])
        return Cost(**counts, memory_mb=max(left) - gone_mb, latency_ms=latency)

    def _grown(self, plan: Mapping[str, str]) -> dict[str, float]:
        """How many times more positions a shortcut of a dead level runs at."""
        levels = list(self.inventory.levels)
        dead: list[str] = []
        while levels and levels[-1].downsampler in plan:
            dead += levels.pop().blocks
        if not dead:
            return {}
        outside = max(self._pixels[name] for name in levels[-1].blocks)
        return {name: outside / self._pixels[name] for name in dead}


def rows_of(inventory: Inventory) -> list[str]:
    """Every module that a plan can bypass: the blocks, then samplers from the outside in."""
    samplers = [
        sampler
        for level in inventory.levels
        for sampler in (level.downsampler, level.upsampler)
        if sampler is not None
    ]
    return [*inventory.names, *samplers]


_BY_PIXEL = [name not in ("params", "weight_bytes") for name in (*COUNTS, "latency_ms")]


def _as_arrays(rows: pd.DataFrame) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts and latency of each module and of its shortcut; floats hold all of them exactly."""
    columns = [*COUNTS, "latency_ms"]
    units = [str(unit) for unit in rows.index]
    whole = rows[columns].astype(float).fillna(0.0).to_numpy()
    kept = rows[[f"shortcut_{name}" for name in columns]].astype(float).fillna(0.0).to_numpy()
    return dict(zip(units, whole, strict=True)), dict(zip(units, kept, strict=True))


def read(path: Path, counted: CostTable) -> CostTable:
    """Read a table from a file and make sure that it belongs to this model and resolution.

    A table measured elsewhere needs the columns `unit` and `latency_ms` (and may have any of the
    others); what it does not have is taken from `counted`.

    Raises:
        ValueError: unreadable, not numbers, other blocks, or counts that differ from the model's.
    """
    try:
        found = pd.read_csv(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such cost table; `bkprune profile` makes one") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV table ({error})") from error
    if "unit" not in found.columns or not {"latency_ms", *COUNTS} & set(found.columns):
        raise ValueError(
            f"{path}: a cost table needs the columns unit and latency_ms, "
            f"this one has {', '.join(map(str, found.columns[:6]))}"
        )
    if found["unit"].duplicated().any():
        twice = found.loc[found["unit"].duplicated(), "unit"].iloc[0]
        raise ValueError(f"{path}: {twice} has two rows")
    rows = counted.rows.set_index("unit")
    theirs = found.set_index("unit")
    of_unet = {unit for unit in rows.index if rows.loc[unit, "part"] in UNET_PARTS}
    strange = sorted(of_unet ^ (set(theirs.index) - (set(rows.index) - of_unet)))
    if strange:
        raise ValueError(
            f"{path}: its rows are not this U-Net's blocks ({', '.join(map(str, strange[:3]))}"
            f"{', ...' if len(strange) > 3 else ''}); it was made for another model"
        )
    for name in [name for name in COLUMNS[2:] if name in theirs.columns]:
        numbers = _numbers(path, theirs[name])
        if name in _MEANING:
            _same_counts(path, name, numbers, rows[name])
        elif name not in _SHORTCUT_COUNTS:
            rows[name] = numbers.reindex(rows.index)
    return CostTable(rows.reset_index(), counted.inventory, str(path))


def _numbers(path: Path, column: pd.Series[Any]) -> pd.Series[Any]:
    numbers = pd.to_numeric(column, errors="coerce")
    bad = (numbers.isna() & column.notna()) | np.isinf(numbers.fillna(0.0))
    if bad.any():
        unit = column.index[bad][0]
        raise ValueError(f"{path}: {column.name} of {unit} is {column[unit]!r}, not a number")
    return numbers


_SHORTCUT_COUNTS = {f"shortcut_{name}" for name in COUNTS}
_MEANING = {
    "params": "another model",
    "macs_paper": "another resolution, batch size or number of tokens",
    "macs": "another resolution, batch size or number of tokens",
}


def _same_counts(path: Path, name: str, theirs: pd.Series[Any], ours: pd.Series[Any]) -> None:
    shared = [unit for unit in theirs.index if unit in ours.index and not pd.isna(theirs[unit])]
    differ = [unit for unit in shared if int(theirs[unit]) != int(ours[unit])]
    if differ:
        raise ValueError(
            f"{path} was made for {_MEANING[name]}: {name} of {differ[0]} is "
            f"{int(theirs[differ[0]]):,} there and {int(ours[differ[0]]):,} in this model"
        )
