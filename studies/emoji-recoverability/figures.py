"""The figures of the recoverability study, from its tables."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
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
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


# what chose a mask: the name shown, words of its source, marker, colour; the first that fits counts
KINDS = (
    ("roomy", "roomy", "D", "#2e8b57"),
    ("searches", "measured|additive|knapsack|greedy|race winner$", "o", "#c0392b"),
    ("roomy", "race winner by output", "D", "#2e8b57"),
    ("BK-SDM and near", "bk-sdm", "s", "#3b6fb6"),
    ("random", "", "^", "#9aa5b1"),
)


def kinds(rows: pd.DataFrame) -> pd.Series[int]:
    """Which of `KINDS` each mask is."""

    def of(source: str) -> int:
        return next(i for i, kind in enumerate(KINDS) if re.search(kind[1], source))

    return rows["source"].map(of)


def scatter(axes: Axes, rows: pd.DataFrame, x: pd.Series[float], y: str) -> None:
    """A point with its number for every mask."""
    for i, group in rows.groupby(kinds(rows)):
        label, _, marker, colour = KINDS[int(str(i))]
        axes.plot(x[group.index], group[y], marker, color=colour, label=label, ms=5)
    for mask, value in rows[y].items():
        number = str(mask).split("-")[1]
        place = (float(x[str(mask)]), float(value))
        axes.annotate(number, place, size=6.5, xytext=(3, 3), textcoords="offset points")
    axes.tick_params(labelsize=8)
    plain(axes)


def legend(figure: Figure) -> None:
    """Of every kind once, below."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    by_label = {
        label: h for handles, labels in found for h, label in zip(handles, labels, strict=True)
    }
    names = list(by_label)
    figure.legend(
        [by_label[n] for n in names],
        names,
        loc="outside lower center",
        ncols=len(names),
        fontsize=8,
        frameon=False,
    )


def before_after_figure(rows: pd.DataFrame, before: pd.Series[float]) -> Figure:
    """Each mask's error right after pruning and at the end."""
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 4.0), layout="constrained")
    grid = figure.subplots(1, len(budgets), squeeze=False)[0]
    for axes, budget in zip(grid, budgets, strict=True):
        scatter(axes, rows[rows["budget"] == budget], before, "output_error")
        axes.set(xscale="log", yscale="log", title=f"MACs {budget}x")
        axes.set_xlabel("output error right after pruning", size=8.5)
        for axis in (axes.xaxis, axes.yaxis):
            logarithmic(axis)
    grid[0].set_ylabel("output error after distillation", size=8.5)
    legend(figure)
    return figure


def pictures_figure(rows: pd.DataFrame, error: pd.Series[float], near: pd.Series[float]) -> Figure:
    """The final CLIP score by what a race sees: the output error, or pictures."""
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 6.6), layout="constrained")
    grid = figure.subplots(2, len(budgets), squeeze=False)
    for seen, label, line in zip(
        (error, near), ("output error", "pictures apart by"), grid, strict=True
    ):
        for axes, budget in zip(line, budgets, strict=True):
            scatter(axes, rows[rows["budget"] == budget], seen, "clip_score")
            axes.set_xscale("log")
            axes.set_xlabel(f"{label}, after 100 of 400 steps", size=8.5)
            logarithmic(axes.xaxis)
        line[0].set_ylabel("CLIP score after distillation", size=8.5)
    for axes, budget in zip(grid[0], budgets, strict=True):
        axes.set_title(f"MACs {budget}x")
    legend(figure)
    return figure


def curve_figure(rows: pd.DataFrame, rungs: pd.DataFrame) -> Figure:
    """Error on the way, of every mask."""
    rungs = rungs[(rungs["seed"] == 0) & rungs["mask"].isin(rows.index)]
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 3.7), layout="constrained")
    grid = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    of = kinds(rows)
    for axes, budget in zip(grid, budgets, strict=True):
        for mask in rows.index[rows["budget"] == budget]:
            own = rungs[rungs["mask"] == mask].sort_values("step")
            label, _, _, colour = KINDS[of[mask]]
            axes.plot(own["step"], own["error"], color=colour, lw=1.2, label=label)
        axes.set(
            xscale="log", yscale="log", title=f"MACs {budget}x", xlabel="steps of distillation"
        )
        plain(axes)
    grid[0].set_ylabel("output error")
    legend(figure)
    return figure
