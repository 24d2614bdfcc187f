"""The figures of the recoverability study, from its tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bkprune.drawing import logarithmic, plain


def tau_figure(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Tau of every score with each final figure, and its interval."""
    names = list(dict.fromkeys(table["score"]))
    figure = Figure(figsize=(10.5, 0.6 + 0.24 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(labels), sharey=True)
    for axes, metric in zip(grid, labels, strict=True):
        rows = table[table["final"] == metric].set_index("score").reindex(names)
        places = np.arange(len(names))
        colours = ["#d9822b" if "KD" in name else "#3b6fb6" for name in names]
        for place, colour, row in zip(places, colours, rows.itertuples(), strict=True):
            axes.plot([row.low, row.high], [place, place], color=colour, lw=1.5)
            axes.plot(row.tau, place, "o", ms=4, color=colour)
        axes.axvline(0, color="#9aa5b1", lw=0.8)
        axes.set_title(f"final {labels[metric]}", size=9.5)
        axes.set_xlabel("Kendall's tau, 95 % interval", size=8)
        axes.set_xlim(-1, 1)
        axes.tick_params(labelsize=8)
        plain(axes)
    grid[0].set_yticks(np.arange(len(names)), names)
    grid[0].invert_yaxis()
    return figure


def before_after_figure(rows: pd.DataFrame, before: pd.Series[float]) -> Figure:
    """Each mask's error right after pruning and at the end."""
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 3.8), layout="constrained")
    grid = figure.subplots(1, len(budgets), squeeze=False)[0]
    styles = (
        ("searches", "measured|additive|knapsack|greedy", "o", "#c0392b"),
        ("roomy", "roomy|^race winner", "D", "#2e8b57"),
        ("BK-SDM and near", "bk-sdm", "s", "#3b6fb6"),
        ("random", "random|loss|most", "^", "#9aa5b1"),
    )
    for axes, budget in zip(grid, budgets, strict=True):
        for label, names, marker, colour in styles:
            own = rows[(rows["budget"] == budget) & rows["source"].str.contains(names)]
            axes.plot(
                before[own.index], own["output_error"], marker, color=colour, label=label, ms=5
            )
            for mask, row in own.iterrows():
                axes.annotate(
                    str(mask).split("-")[1],
                    (before[str(mask)], row["output_error"]),
                    size=6.5,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
        axes.set(xscale="log", yscale="log", title=f"MACs {budget}x")
        axes.set_xlabel("output error right after pruning", size=8.5)
        for axis in (axes.xaxis, axes.yaxis):
            logarithmic(axis)
        axes.tick_params(labelsize=8)
        plain(axes)
    grid[0].set_ylabel("output error after distillation", size=8.5)
    grid[-1].legend(fontsize=7.5, frameon=False)
    return figure


def curve_figure(rows: pd.DataFrame, rungs: pd.DataFrame) -> Figure:
    """Error on the way, of every mask."""
    rungs = rungs[(rungs["seed"] == 0) & rungs["mask"].isin(rows.index)]
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 3.4), layout="constrained")
    grid = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for axes, budget in zip(grid, budgets, strict=True):
        for mask in rows.index[rows["budget"] == budget]:
            own = rungs[rungs["mask"] == mask].sort_values("step")
            source = str(rows["source"][str(mask)])
            is_searched = any(n in source for n in ("search", "knapsack", "greedy"))
            colour = "#3b6fb6" if "bk-sdm" in source else "#c0392b" if is_searched else "#c3c9d1"
            colour = (
                "#2e8b57"
                if source.startswith(("roomy", "race winner by output")) and not is_searched
                else colour
            )
            axes.plot(own["step"], own["error"], color=colour, lw=1.2)
        axes.set(
            xscale="log", yscale="log", title=f"MACs {budget}x", xlabel="steps of distillation"
        )
        plain(axes)
    grid[0].set_ylabel("output error")
    return figure
