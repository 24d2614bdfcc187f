"""The additive problem, solved exactly: least summed importance under budgets (HiGHS, by scipy).

Knows how a space, its budgets and dead levels become a mixed-integer program: LAPTOP-Diff's
knapsack (arXiv 2404.11098, eq. 7), for any number of budgets. It does not know what scores mean.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from bkprune.space import Array, Bits, Budget, Space


def least_score(
    space: Space, scores: Array, budgets: Sequence[Budget], *, without: Sequence[Bits] = ()
) -> Bits | None:
    """The choice with the least summed score that keeps every budget, proven optimal.

    Args:
        space: units and costs.
        scores: one for each unit, of any sign.
        budgets: all of them are kept.
        without: choices that are not wanted again (no-good cuts).

    Returns:
        The choice, or None where no choice is left.
    """
    n, dead = len(space), space.dead
    n_all = n + len(dead)
    rows: list[Array] = []
    upper: list[float] = []

    def at_most(row: Array, limit: float) -> None:
        rows.append(row)
        upper.append(limit)

    for budget in budgets:
        if budget.metric == "memory_mb":
            _memory_rows(space, budget, n_all, at_most)
            continue
        scale = 1.0 / budget.limit
        row = np.zeros(n_all)
        row[:n] = -space.saved(budget.metric) * scale
        row[n:] = [-level.bonus[budget.metric] * scale for level in dead]
        at_most(row, 1.0 - space.base(budget.metric) * scale)
    for k, level in enumerate(dead):
        for i in level.units:  # dead only if every unit is gone ...
            row = np.zeros(n_all)
            row[n + k], row[i] = 1, -1
            at_most(row, 0)
        row = np.zeros(n_all)  # ... and surely if they are
        row[level.units], row[n + k] = 1, -1
        at_most(row, len(level.units) - 1)
    for bits in without:
        row = np.zeros(n_all)
        row[:n] = np.where(bits, 1.0, -1.0)
        at_most(row, float(bits.sum()) - 1)
    weight = max(float(np.abs(scores).max()), 1e-300)
    with _without_stdout():
        found = milp(
            np.concatenate([scores / weight, np.zeros(len(dead))]),
            constraints=LinearConstraint(np.array(rows), -np.inf, np.array(upper)) if rows else (),
            integrality=np.ones(n_all),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": 20.0},
        )
    if found.x is None:
        return None
    best: Bits = found.x[:n] > 0.5
    return best if space.feasible(best[None], budgets)[0] else None


@contextmanager
def _without_stdout() -> Iterator[None]:
    """HiGHS now and then prints on the process's stdout, which is for data: that goes nowhere."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _memory_rows(space: Space, budget: Budget, n_all: int, at_most: object) -> None:
    """Weights that are left plus the peak of each row that is left must fit."""
    assert callable(at_most)
    n = len(space)
    saved = space.saved("weight_bytes") / 1e6
    rows = space.table.unet_rows.set_index("unit")
    weights = space.base("weight_bytes") / 1e6
    bonus = [level.bonus["weight_bytes"] / 1e6 for level in space.dead]
    whole_mb = space.teacher.weight_bytes / 1e6
    peaks = rows["peak_memory_mb"].astype(float) - whole_mb
    peaks = peaks.fillna(rows["activation_mb"].astype(float))
    owner = {block: i for i, name in enumerate(space.names) for block in space.units[name]}
    for unit, peak in peaks.items():
        if unit in space.removed:
            continue
        row = np.zeros(n_all)
        row[:n], row[n:] = -saved, [-b for b in bonus]
        if unit in owner:
            row[owner[str(unit)]] -= float(peak)
        at_most(row, budget.limit - weights - float(peak))
