"""The importance table in, figures out.

Knows how importance is shown: on the U, ranked, and over timesteps. Works from the records alone,
so that a laptop without torch can redraw them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from bkprune.drawing import COLOURS, KIND_COLOURS, draw_u, extend, scale, size_of_u, unit_column

TOTAL = "all"
_LABELS = {
    "output": "output error E||ε₋ᵤ - ε||²",
    "output_per_power": "output error / teacher's output power",
    "output_per_error": "added error / teacher's own error (1 = as much again)",
    "task": "rise of the denoising loss",
    "latent": "shift of final latents (LD-Pruner)",
    "clip": "drop of the CLIP score",
    "magnitude": "root mean square of the weights",
    "taylor": "first-order Taylor score",
}


def importance_figures(
    blocks: pd.DataFrame, importance: pd.DataFrame
) -> Iterator[tuple[str, Figure]]:
    """Every figure of an importance table, as `(file name, figure)`.

    For each criterion the U and the ranking; where it has timestep bins the map as well, for
    `output` as a multiple of the teacher's own error in each bin, so that bins can be compared.
    """
    for criterion in dict.fromkeys(importance["criterion"]):
        table = importance[importance["criterion"] == criterion].astype({"timestep_bin": str})
        if not criterion.startswith("output_per"):
            yield f"u_{criterion}.png", u_figure(blocks, table)
            yield f"ranked_{criterion}.png", ranked_figure(blocks, table)
        has_bins = (table["timestep_bin"] != TOTAL).any()
        if has_bins and criterion not in ("output", "output_per_power"):
            yield f"timesteps_{criterion}.png", timestep_figure(blocks, table)


def _label(criterion: str) -> str:
    return _LABELS.get(criterion, criterion)


def u_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """The U-Net drawn as a U, every block coloured by its unit's score."""
    total = table[table["timestep_bin"] == TOTAL].set_index("unit")
    column = unit_column(blocks, pd.Series(total.index))
    score = blocks.set_index("name", drop=False)[column].map(total["score"])
    norm = scale(total["score"])
    width, height = size_of_u(blocks)
    figure = Figure(figsize=(width + 1.6, height + 0.5), layout="constrained")
    axes = figure.add_subplot()
    draw_u(axes, blocks, {str(k): float(v) for k, v in score.items()}, norm)
    end = extend(norm, float(total["score"].min()))
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, shrink=0.9, pad=0.01, extend=end)
    bar.set_label(_label(str(total["criterion"].iloc[0])))
    axes.set_title(
        f"Importance of each {'block' if column == 'name' else column}   (R residual, A attention)",
        size=11,
    )
    return figure


def ranked_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Units from the most to the least important, with standard errors."""
    total = table[table["timestep_bin"] == TOTAL].sort_values("score", kind="stable")
    column = unit_column(blocks, total["unit"])
    kinds = blocks.groupby(column)["kind"].agg(lambda k: k.iloc[0] if k.nunique() == 1 else "mixed")
    colours = [KIND_COLOURS[kinds[unit]] for unit in total["unit"]]
    figure = Figure(figsize=(8, 0.22 * len(total) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        total["unit"],
        total["score"],
        xerr=total["stderr"].fillna(0),
        color=colours,
        error_kw={"lw": 1, "capsize": 2, "ecolor": "#1f2933"},
    )
    if (total["score"] > 0).all():
        axes.set_xscale("log")
    axes.set_xlabel(_label(str(total["criterion"].iloc[0])) + ", ± standard error")
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(-0.6, len(total) - 0.4)
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for kind in dict.fromkeys(kinds[unit] for unit in total["unit"]):
        axes.bar(0, 0, color=KIND_COLOURS[kind], label=kind)
    axes.legend(loc="lower right", frameon=False)
    return figure


def timestep_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Units in order of execution against timestep bins, from little noise to much."""
    binned = table[table["timestep_bin"] != TOTAL].astype({"timestep_bin": int})
    column = unit_column(blocks, binned["unit"])
    grid = binned.pivot_table(index="unit", columns="timestep_bin", values="score")
    grid = grid.reindex(list(dict.fromkeys(blocks[column])))
    n_bins = grid.shape[1]
    figure = Figure(figsize=(7, 0.2 * len(grid) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    norm = scale(pd.Series(grid.to_numpy().ravel()))
    image = axes.imshow(grid.to_numpy(), aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(np.arange(len(grid)), list(grid.index), size=8)
    edges = np.linspace(0, 1000, n_bins + 1).astype(int)
    ticks = [f"{a}-{b - 1}" for a, b in pairwise(edges)]
    axes.set_xticks(np.arange(n_bins), ticks, rotation=35, ha="right", size=8)
    axes.set_xlabel("timestep (0 is nearly clean, 999 nearly noise)")
    label = _label(str(binned["criterion"].iloc[0]))
    end = extend(norm, float(np.nanmin(grid.to_numpy())))
    figure.colorbar(image, ax=axes, label=label, extend=end)
    return figure
