"""Which candidates are judged again, on samples that the search has not seen, and which lie on a
front.

Knows that one set of samples chooses and another reports, and that near copies are not worth a
race. It does not know how masks were proposed, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from bkprune.blocks import Mask
from bkprune.presets import PRESETS
from bkprune.space import Array

APART, ROOMY, BASELINES = 3, "roomy", "|".join(["knapsack", "greedy", *PRESETS])
Quality = Callable[[Mask], tuple[float, float]]  # what a mask loses, and its standard error
Progress = Callable[[int, int, str], None]


def judge(
    finalists: pd.DataFrame, chosen_on: Quality, held_out: Quality, progress: Progress
) -> pd.DataFrame:
    """Measure the finalists on samples that the search has not seen, and put the winner first.

    The winner is chosen on one set of samples and reported on another: the columns `chosen` and
    `held_out` with their standard errors.
    """
    rows = []
    for i, removed in enumerate(finalists["removed"]):
        progress(i, len(finalists), "judging finalists")
        mask = frozenset(str(removed).split())
        (chosen, error), (held, held_error) = chosen_on(mask), held_out(mask)
        rows.append((chosen, error, held, held_error))
    progress(len(finalists), len(finalists), "judging finalists")
    names = ["chosen", "chosen_stderr", "held_out", "held_out_stderr"]
    table = finalists.join(pd.DataFrame(rows, columns=names, index=finalists.index))
    return table.sort_values("chosen", kind="stable", ignore_index=True)


def finalists(table: pd.DataFrame, n: int, along: str | None = None) -> pd.DataFrame:
    """The best feasible candidates and every baseline that fits.

    Args:
        table: the candidates, the best first.
        n: how many, beside the baselines.
        along: a cost; `2 n` along the front of loss and that cost are taken rather than the best.
    """
    table = table[table["feasible"]].reset_index(drop=True)
    pattern = rf"{BASELINES}|random \d+"
    chosen = table["source"].str.contains(pattern, regex=True).to_numpy(copy=True)
    best = np.arange(n)
    if along is not None:
        order = table[table["on_front"]].sort_values(along).index.to_numpy()
        best = order[np.unique(np.linspace(0, len(order) - 1, 2 * n).round().astype(int))]
    chosen[best[best < len(table)]] = True
    return table[chosen].reset_index(drop=True)


def entrants(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """Feasible candidates for a race, `n` at most, the best measured first.

    The best, what people do today (knapsack, greedy, presets), what keeps more parameters at the
    same cost, then the best of those that differ from all before in at least `APART` blocks: near
    copies would distil alike. Where there are too many of these, the best measured of them start.
    """
    table = table[table["feasible"]].reset_index(drop=True)
    removed = [frozenset(str(text).split()) for text in table["removed"]]
    is_baseline = table["source"].str.contains(f"{BASELINES}|{ROOMY}", regex=True).to_numpy()
    chosen = [0, *(int(i) for i in np.flatnonzero(is_baseline) if i > 0)][:n]
    for apart in (APART, 1):
        for i in range(len(table)):
            if len(chosen) < n and all(len(removed[i] ^ removed[j]) >= apart for j in chosen):
                chosen.append(i)
    return table.loc[sorted(chosen)].reset_index(drop=True)


def on_front(losses: Array, costs: Array) -> list[bool]:
    """Which points no other point beats in both, `[n]`."""
    return [
        not bool(((losses <= a) & (costs <= b) & ((losses < a) | (costs < b))).any())
        for a, b in zip(losses, costs, strict=True)
    ]
