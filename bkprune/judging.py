"""Finalists judged on samples that the search has not seen, and which masks lie on a front.

Knows that one set of samples chooses and another reports. It does not know how masks were proposed,
and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from bkprune.blocks import Mask
from bkprune.space import Array

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


def on_front(losses: Array, costs: Array) -> list[bool]:
    """Which points no other point beats in both, `[n]`."""
    return [
        not bool(((losses <= a) & (costs <= b) & ((losses < a) | (costs < b))).any())
        for a, b in zip(losses, costs, strict=True)
    ]
