"""Tables in, figures out.

Knows how a U-Net is drawn as a U, how a ranking and a block x timestep map are drawn, and the
colours. Works from the records alone, so that a laptop without torch can redraw them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TOTAL = "all"
_KIND_COLOURS = {"residual": "#3b6fb6", "attention": "#d9822b", "mixed": "#6b7280"}
_LABELS = {
    "output": "output error E||ε₋ᵤ − ε||²",
    "output_per_power": "output error / teacher's output power",
    "output_per_error": "added error / teacher's own error (1 = as much again)",
    "task": "rise of the denoising loss",
    "latent": "shift of final latents (LD-Pruner)",
    "clip": "drop of the CLIP score",
    "magnitude": "root mean square of the weights",
    "taylor": "first-order Taylor score",
}
_DECADES = 4  # of a logarithmic colour scale; what is smaller is shown as the smallest


def importance_figures(blocks: pd.DataFrame, importance: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
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


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _label(criterion: str) -> str:
    return _LABELS.get(criterion, criterion)


def _unit_column(blocks: pd.DataFrame, units: pd.Series[Any]) -> str:
    """Which column of the block table names these units: `name`, `pair` or `stage`."""
    for column in ("name", "pair", "stage"):
        if set(units) <= set(blocks[column]):
            return column
    raise ValueError(f"the importance table names units that are no blocks: {units.iloc[0]!r}, ...")


def _norm(scores: pd.Series[Any]) -> Normalize:
    top = float(scores.max())
    if float(scores.min()) > 0:
        return LogNorm(max(float(scores.min()), top / 10**_DECADES), top, clip=True)
    return Normalize(min(0.0, float(scores.min())), max(top, 1e-12), clip=True)


def u_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """The U-Net drawn as a U, every block coloured by its unit's score."""
    total = table[table["timestep_bin"] == TOTAL].set_index("unit")
    criterion = str(total["criterion"].iloc[0])
    column = _unit_column(blocks, pd.Series(total.index))
    score = blocks[column].map(total["score"])
    norm, colours = _norm(total["score"]), colormaps["viridis"]
    n_levels = int(blocks["level"].max()) + 1
    figure = Figure(figsize=(12, 1.05 * (n_levels + 1) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    places = _places(blocks)
    for level in range(n_levels):
        at_level = blocks["level"] == level
        xs = [places[name][0] for name in blocks.loc[at_level, "name"]]
        down = [x for x in xs if x < 0]
        up = [x for x in xs if x > 0]
        if down and up and level < n_levels:
            y = -1.0 * level
            axes.plot([max(down) + 0.5, min(up) - 0.5], [y, y], color="#c4c9d0", lw=1, zorder=0)
        channels = int(blocks.loc[at_level, "out"].mode().iloc[0])
        factor = int(blocks.loc[at_level, "resolution_factor"].iloc[0])
        axes.text(
            min(xs) - 0.7, -level, f"{channels} ch, 1/{factor}", ha="right", va="center", size=9
        )
    for name, kind, value in zip(blocks["name"], blocks["kind"], score, strict=True):
        x, y = places[name]
        face = colours(norm(value))
        box = FancyBboxPatch(
            (x - 0.42, y - 0.3),
            0.84,
            0.6,
            boxstyle=f"round,pad=0,rounding_size={0.08 if kind == 'residual' else 0.28}",
            facecolor=face,
            edgecolor="#1f2933",
            lw=0.8,
        )
        axes.add_patch(box)
        dark = sum(c * w for c, w in zip(face[:3], (0.3, 0.59, 0.11), strict=True)) < 0.5
        text = f"{'R' if kind == 'residual' else 'A'}{name.rsplit('.', 1)[1]}"
        axes.text(
            x, y, text, ha="center", va="center", size=9, color="white" if dark else "black"
        )
    xs = [x for x, _ in places.values()]
    ys = [y for _, y in places.values()]
    axes.set_xlim(min(xs) - 2.6, max(xs) + 0.8)
    axes.set_ylim(min(ys) - 0.6, 0.9)
    for x, text in ((min(xs), "down_blocks"), (max(xs), "up_blocks")):
        ha = "left" if x < 0 else "right"
        axes.text(x - 0.42 if x < 0 else x + 0.42, 0.6, text, ha=ha, size=10, color="#52606d")
    mids = [places[n] for n in blocks.loc[blocks["stage"] == "mid_block", "name"]]
    if mids:
        axes.text(0, mids[0][1] + 0.42, "mid_block", ha="center", size=10, color="#52606d")
    axes.set_aspect("equal")
    axes.axis("off")
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.8, pad=0.01)
    bar.set_label(_label(criterion))
    axes.set_title(
        f"Importance of each {'block' if column == 'name' else column}   "
        "(R residual, A attention)",
        size=11,
    )
    return figure


def _places(blocks: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Centre of every block: down stages step to the right as they go in, up stages mirror them."""
    places: dict[str, tuple[float, float]] = {}
    widest = 0
    for side in ("down_blocks", "up_blocks"):
        sizes = blocks[blocks["stage"].str.startswith(side)].groupby("stage").size()
        widest = max(widest, int(sizes.max()) if len(sizes) else 0)
    n_levels = int(blocks["level"].max()) + 1
    gap = 2.2
    for stage, members in blocks.groupby("stage", sort=False):
        level = int(members["level"].iloc[0])
        n = len(members)
        inset = 0.55 * level
        if stage == "mid_block":
            start, y = -(n - 1) / 2, -float(n_levels)
        elif str(stage).startswith("down"):
            start, y = -gap - widest - 0.55 * n_levels + inset + 0.5, -float(level)
        else:
            start, y = gap + widest + 0.55 * n_levels - inset - n + 0.5, -float(level)
        for i, name in enumerate(members["name"]):
            places[name] = (start + i, y)
    return places


def ranked_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Units from the most to the least important, with standard errors."""
    total = table[table["timestep_bin"] == TOTAL].sort_values("score", kind="stable")
    column = _unit_column(blocks, total["unit"])
    kinds = blocks.groupby(column)["kind"].agg(lambda k: k.iloc[0] if k.nunique() == 1 else "mixed")
    colours = [_KIND_COLOURS[kinds[unit]] for unit in total["unit"]]
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
        axes.bar(0, 0, color=_KIND_COLOURS[kind], label=kind)
    axes.legend(loc="lower right", frameon=False)
    return figure


def timestep_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Units in order of execution against timestep bins, from little noise to much."""
    binned = table[table["timestep_bin"] != TOTAL].astype({"timestep_bin": int})
    column = _unit_column(blocks, binned["unit"])
    grid = binned.pivot_table(index="unit", columns="timestep_bin", values="score")
    grid = grid.reindex(list(dict.fromkeys(blocks[column])))
    n_bins = grid.shape[1]
    figure = Figure(figsize=(7, 0.2 * len(grid) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    norm = _norm(pd.Series(grid.to_numpy().ravel()))
    image = axes.imshow(grid.to_numpy(), aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(np.arange(len(grid)), list(grid.index), size=8)
    edges = np.linspace(0, 1000, n_bins + 1).astype(int)
    ticks = [f"{a}-{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    axes.set_xticks(np.arange(n_bins), ticks, rotation=35, ha="right", size=8)
    axes.set_xlabel("timestep (0 is nearly clean, 999 nearly noise)")
    figure.colorbar(image, ax=axes, label=_label(str(binned["criterion"].iloc[0])))
    return figure
