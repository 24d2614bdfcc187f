"""Candidates in, figures out.

Knows how a search is shown: the front with winner and baselines, its history, which units the best
masks remove, and additive against measured loss. Works from the tables alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bkprune.drawing import logarithmic, plain

_GREY, _BLUE, _ORANGE, _RED = "#9aa5b1", "#3b6fb6", "#d9822b", "#c23b22"
_BASELINES = ("knapsack", "greedy", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
_N_BEST = 20


def search_figures(
    candidates: pd.DataFrame,
    units: Mapping[str, Sequence[str]],
    metric: str,
    teacher_cost: float,
    limit: float | None,
    winner: str,
) -> Iterator[tuple[str, Figure]]:
    """Every figure of a search, as `(file name, figure)`; `winner` is its `removed` text."""
    yield "search_front.png", front(candidates, metric, teacher_cost, limit, winner)
    yield "search_history.png", history(candidates)
    yield "search_masks.png", mask_matrix(candidates, units)
    yield "search_additive.png", additive_measured(candidates)


def front(
    candidates: pd.DataFrame, metric: str, teacher_cost: float, limit: float | None, winner: str
) -> Figure:
    """Loss against cost of every measured mask, with the budget, the baselines and the winner."""
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    share = candidates[metric] / teacher_cost
    axes.scatter(share, candidates["measured"], s=12, color=_GREY, label="measured masks")
    best = candidates[candidates["on_front"]].sort_values(metric)
    axes.plot(
        best[metric] / teacher_cost, best["measured"], color=_BLUE, lw=1, marker=".", label="front"
    )
    marks = dict(zip(_BASELINES, "sPvD^", strict=True))
    for source, mark in marks.items():
        rows = candidates[candidates["source"].astype(str).str.contains(source, regex=False)]
        axes.scatter(
            rows[metric] / teacher_cost,
            rows["measured"],
            s=55,
            marker=mark,
            color=_ORANGE,
            edgecolor="#1f2933",
            lw=0.6,
            label=source if len(rows) else None,
        )
    random = candidates[candidates["source"].astype(str).str.contains(r"random \d")]
    if len(random):
        axes.scatter(
            random[metric] / teacher_cost,
            random["measured"],
            s=30,
            marker="x",
            color=_ORANGE,
            label="random feasible",
        )
    won = candidates[candidates["removed"] == winner]
    axes.scatter(
        won[metric] / teacher_cost,
        won["measured"],
        s=150,
        marker="*",
        color=_RED,
        edgecolor="#1f2933",
        lw=0.6,
        label="winner",
        zorder=5,
    )
    axes.axvline(1.0, color=_GREY, lw=1, label="teacher (no error)")
    if limit is not None:
        axes.axvline(limit / teacher_cost, color=_RED, lw=1, ls="--", label="budget")
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.set_xlabel(f"{metric}, as a share of the teacher's")
    axes.set_ylabel("output error without the removed blocks")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plain(axes)
    return figure


def history(candidates: pd.DataFrame) -> Figure:
    """The best loss so far over trials."""
    rows = candidates[candidates["feasible"]].sort_values("trial")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(rows["trial"], rows["measured"], s=10, color=_GREY, label="masks")
    axes.step(
        rows["trial"], rows["measured"].cummin(), where="post", color=_BLUE, label="best so far"
    )
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.set_xlabel("trial")
    axes.set_ylabel("output error")
    axes.legend(frameon=False)
    plain(axes)
    return figure


def mask_matrix(candidates: pd.DataFrame, units: Mapping[str, Sequence[str]]) -> Figure:
    """Which units the best masks remove: one column a mask, the best at the left."""
    best = candidates[candidates["feasible"]].head(_N_BEST)
    grid = np.array(
        [
            [set(blocks) <= set(str(removed).split()) for removed in best["removed"]]
            for blocks in units.values()
        ],
        dtype=float,
    )
    figure = Figure(figsize=(3.4 + 0.2 * len(best), 1 + 0.17 * len(units)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, aspect="auto", cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set_yticks(range(len(units)), list(units), size=7)
    axes.set_xticks(range(len(best)), [str(i + 1) for i in range(len(best))], size=7)
    axes.set_xlabel("feasible masks, best first")
    axes.set_title("removed units (dark)", size=10)
    return figure


def additive_measured(candidates: pd.DataFrame) -> Figure:
    """What units lose one by one, summed, against what the mask really loses."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    rows = candidates[(candidates["additive"] > 0) & (candidates["measured"] > 0)]
    axes.errorbar(
        rows["additive"],
        rows["measured"],
        yerr=rows["stderr"].fillna(0),
        fmt="o",
        ms=3,
        lw=0.6,
        color=_BLUE,
    )
    if len(rows):
        ends: Any = [rows["additive"].min(), rows["additive"].max()]
        axes.plot(ends, ends, color=_GREY, ls="--", lw=1, label="equal")
        axes.legend(frameon=False)
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.set_xlabel("summed importance of the removed units")
    axes.set_ylabel("measured output error, ± standard error")
    plain(axes)
    return figure
