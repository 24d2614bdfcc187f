"""What a search may choose from: units, pins, budgets, and what any choice costs.

Knows how budgets are written and checked, how pins are resolved, and that every cost is linear in
the removed units but for dead levels and the memory peak. It does not know quality, proposals or
Optuna, and needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkprune.blocks import Grain, Inventory, Mask
from bkprune.cost import Cost, CostTable

Bits = NDArray[np.bool_]
Array = NDArray[np.float64]

# name in a budget -> column, units (powers of ten of the column's own unit)
METRICS: dict[str, tuple[str, dict[str, float]]] = {
    "latency": ("latency_ms", {"": 1, "ms": 1, "s": 1e3, "us": 1e-3}),
    "params": ("params", {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}),
    "macs": ("macs", {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}),
    "macs_paper": ("macs_paper", {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}),
    "memory": ("memory_mb", {"": 1, "mb": 1, "gb": 1e3}),
    "weights": ("weight_bytes", {"": 1, "mb": 1e6, "gb": 1e9}),
}
_BUDGET = re.compile(r"\s*([a-z_]+?)(?:_ms|_mb)?\s*<=\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z%]*)\s*", re.I)


class InfeasibleError(ValueError):
    """No mask keeps the budgets."""

    exit_code = 3


@dataclass(frozen=True)
class Budget:
    """An upper bound on a cost of the U-Net, in the cost table's own unit."""

    text: str
    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str, teacher: Cost) -> Budget:
        """Read `latency<=0.6x`, `params<=500M`, `macs<=60%`, `memory<=3GB`.

        `x` and `%` are shares of the teacher's cost.

        Raises:
            ValueError: not of that form, an unknown metric or unit, or the table has no latency.
        """
        found = _BUDGET.fullmatch(text)
        names = ", ".join(METRICS)
        if found is None:
            raise ValueError(
                f"--budget {text!r}: expected METRIC<=VALUE such as latency<=0.6x, params<=500M, "
                f"macs<=60% or memory<=3GB (metrics: {names})"
            )
        name, number, unit = found[1].lower(), found[2], found[3].lower()
        if name not in METRICS:
            raise ValueError(f"--budget {text!r}: unknown metric {name!r}; choose one of {names}")
        metric, units = METRICS[name]
        whole = getattr(teacher, metric)
        if whole is None:
            raise ValueError(
                f"--budget {text!r}: the cost table has no latency; measure it with "
                "`bkprune profile`, or give one with --cost"
            )
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"--budget {text!r}: {number!r} is not a number") from None
        if unit in ("x", "%"):
            return cls(text, metric, value * whole / (100 if unit == "%" else 1))
        if unit not in units:
            allowed = ", ".join(["x", "%", *(u for u in units if u)])
            raise ValueError(f"--budget {text!r}: unknown unit {unit!r}; choose one of {allowed}")
        return cls(text, metric, value * units[unit])


class Space:
    """Units that may go or stay, and the cost of every choice.

    A choice is a vector of bits over `units`, True for removed; pinned units are not in it.

    Raises:
        ValueError: pins that fit nothing or contradict each other, or nothing left to choose.
    """

    def __init__(
        self,
        table: CostTable,
        grain: Grain,
        *,
        keep: Collection[str] = (),
        remove: Collection[str] = (),
    ) -> None:
        self.table = table
        self.inventory: Inventory = table.inventory
        every = self.inventory.units(grain)
        kept, gone = self._pinned("--keep", keep, every), self._pinned("--remove", remove, every)
        if kept & gone:
            raise ValueError(f"{sorted(kept & gone)[0]} is pinned by both --keep and --remove")
        self.grain = grain
        self.units: dict[str, Mask] = {
            name: blocks for name, blocks in every.items() if name not in kept | gone
        }
        self.removed: Mask = frozenset().union(*(every[name] for name in gone))
        self.kept = kept
        if not self.units:
            raise ValueError("every unit is pinned: there is nothing to choose")
        self.names = list(self.units)
        self.teacher = table.cost_of()
        self._base = table.cost_of(self.removed)
        self._linear: dict[str, Array] = {}
        self.dead = self._dead_levels()

    def _pinned(
        self, option: str, names: Collection[str], every: Mapping[str, Mask]
    ) -> frozenset[str]:
        if not names:
            return frozenset()
        try:
            blocks = self.inventory.expand(frozenset(names))
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        inside = {unit for unit, members in every.items() if members <= blocks}
        covered = frozenset().union(*(every[unit] for unit in inside)) if inside else frozenset()
        if blocks - covered:
            raise ValueError(
                f"{option}: {sorted(blocks - covered)[0]} is only a part of a unit at this grain"
            )
        return frozenset(inside)

    def __len__(self) -> int:
        return len(self.names)

    def mask(self, bits: Bits) -> Mask:
        """The blocks a choice removes, pinned ones included."""
        chosen = [self.units[name] for name, bit in zip(self.names, bits, strict=True) if bit]
        return self.removed.union(*chosen)

    def bits(self, mask: Collection[str]) -> Bits | None:
        """The choice that removes exactly this mask, or None where pins or the grain forbid it."""
        blocks = self.inventory.expand(frozenset(mask)) if mask else frozenset()
        found = np.array([self.units[name] <= blocks for name in self.names])
        return found if self.mask(found) == blocks else None

    def cost(self, bits: Bits) -> Cost:
        """What the U-Net costs under a choice."""
        return self.table.cost_of(self.mask(bits))

    def saved(self, metric: str) -> Array:
        """What removing each unit alone saves of a linear metric."""
        if metric not in self._linear:
            base = getattr(self._base, metric)
            self._linear[metric] = np.array(
                [base - getattr(self._alone(name), metric) for name in self.names], dtype=float
            )
        return self._linear[metric]

    def _alone(self, name: str) -> Cost:
        return self.table.cost_of(self.removed | self.units[name])

    def base(self, metric: str) -> float:
        """The metric with nothing removed but what is pinned."""
        return float(getattr(self._base, metric))

    def costs(self, many: Bits, metric: str) -> Array:
        """A linear metric for many choices at once, `[choices, units] -> [choices]`."""
        total: Array = self.base(metric) - many.astype(float) @ self.saved(metric)
        for level in self.dead:
            is_dead = many[:, level.units].all(axis=1)
            total = total - is_dead * level.bonus[metric]
        return total

    def violations(self, many: Bits, budgets: Sequence[Budget]) -> Array:
        """By what share each choice breaks each budget, `[choices, budgets]`; at most 0 fits."""
        columns = []
        for budget in budgets:
            if budget.metric == "memory_mb":
                values = np.array([self.cost(bits).memory_mb for bits in many])
            else:
                values = self.costs(many, budget.metric)
            columns.append(values / budget.limit - 1)
        return np.column_stack(columns) if columns else np.zeros((len(many), 0))

    def feasible(self, many: Bits, budgets: Sequence[Budget]) -> Bits:
        """Which of many choices keep every budget."""
        fits: Bits = np.all(self.violations(many, budgets) <= 1e-12, axis=1)
        return fits

    def cheapest(self, metric: str) -> float:
        """The least that any choice can reach."""
        everything = np.ones((1, len(self)), dtype=bool)
        if metric == "memory_mb":
            return self.cost(everything[0]).memory_mb
        worth_it = (self.saved(metric) > 0)[None]
        return float(self.costs(np.concatenate([everything, worth_it]), metric).min())

    def check(self, budgets: Sequence[Budget]) -> list[dict[str, Any]]:
        """The table of budgets: teacher, limit, least that can be reached.

        Raises:
            InfeasibleError: a budget cannot be kept whatever is removed.
        """
        rows = []
        for budget in budgets:
            least, whole = self.cheapest(budget.metric), getattr(self.teacher, budget.metric)
            rows.append(
                {
                    "budget": budget.text,
                    "metric": budget.metric,
                    "teacher": whole,
                    "limit": budget.limit,
                    "share": budget.limit / whole,
                    "least": least,
                    "least_share": least / whole,
                }
            )
            if least > budget.limit:
                raise InfeasibleError(
                    f"--budget {budget.text}: cannot be kept; the least that can be reached is "
                    f"{least:,.6g} ({least / whole:.3f}x of the teacher's {whole:,.6g})"
                )
        return rows

    def _dead_levels(self) -> list[DeadLevel]:
        """Innermost levels that the free units can kill, and what that saves beyond the units."""
        found: list[DeadLevel] = []
        indices: list[int] = []
        gone: set[str] = set(self.removed)
        before: dict[str, float] = {}
        for level in reversed(self.inventory.levels):
            if level.downsampler is None:
                break
            mine = [i for i, name in enumerate(self.names) if self.units[name] <= level.blocks]
            gone |= {block for i in mine for block in self.units[self.names[i]]}
            if not level.blocks <= gone:
                break
            indices += mine
            cost = self.table.cost_of(gone)
            bonus = {}
            for metric in ("params", "macs_paper", "macs", "weight_bytes", "latency_ms"):
                actual = getattr(cost, metric)
                if actual is None:
                    continue
                linear = self.base(metric) - self.saved(metric)[indices].sum()
                whole = linear - actual
                bonus[metric] = float(whole - before.get(metric, 0.0))
                before[metric] = float(whole)
            found.append(DeadLevel(list(indices), bonus))
        return found


@dataclass(frozen=True)
class DeadLevel:
    """Units whose joint removal kills a level, and what that saves beyond their own costs."""

    units: list[int]
    bonus: dict[str, float]
