"""Tables in, figures out.

Knows how a U-Net is drawn as a U, how a ranking and a block x timestep map are drawn, and the
colours. Works from the records alone, so that a laptop without torch can redraw them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TOTAL = "all"
_KIND_COLOURS = {"residual": "#3b6fb6", "attention": "#d9822b", "mixed": "#6b7280"}
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
_DECADES = 4  # of a logarithmic colour scale; what is smaller is shown as the smallest


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


def _extend(norm: Normalize, lowest: float) -> Literal["min", "neither"]:
    """An arrow at the scale's end where smaller values are drawn in its last colour."""
    return "min" if norm.vmin is not None and lowest < norm.vmin else "neither"


def u_figure(blocks: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """The U-Net drawn as a U, every block coloured by its unit's score."""
    total = table[table["timestep_bin"] == TOTAL].set_index("unit")
    criterion = str(total["criterion"].iloc[0])
    column = _unit_column(blocks, pd.Series(total.index))
    score = blocks[column].map(total["score"])
    norm, colours = _norm(total["score"]), colormaps["viridis"]
    places = _places(blocks)
    xs, ys = zip(*places.values(), strict=True)
    left, right, bottom, top = min(xs) - 2.4, max(xs) + 0.6, min(ys) - 0.5, 0.9
    figure = Figure(figsize=(0.62 * (right - left) + 1.6, 0.62 * (top - bottom) + 0.5))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    _draw_levels(axes, blocks, places)
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
        axes.text(x, y, text, ha="center", va="center", size=9, color="white" if dark else "black")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    axes.axis("off")
    extend = _extend(norm, float(total["score"].min()))
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, shrink=0.9, pad=0.01, extend=extend
    )
    bar.set_label(_label(criterion))
    axes.set_title(
        f"Importance of each {'block' if column == 'name' else column}   (R residual, A attention)",
        size=11,
    )
    return figure


def _draw_levels(axes: Axes, blocks: pd.DataFrame, places: dict[str, tuple[float, float]]) -> None:
    """Skip connections, sizes and the names of the two sides."""
    grey = "#52606d"
    for _, members in blocks.groupby("level"):
        y = -float(members["level"].iloc[0])
        xs = [places[n][0] for n in members["name"] if places[n][1] == y]
        inner = (max(x for x in xs if x < 0), min(x for x in xs if x > 0))
        axes.annotate(
            "",
            (inner[1] - 0.5, y),
            (inner[0] + 0.5, y),
            arrowprops={"arrowstyle": "->", "color": "#b8c0cc", "lw": 1, "ls": "--"},
        )
        size = f"1/{members['resolution_factor'].iloc[0]}"
        channels = int(members["out"].mode().iloc[0])
        text = f"{channels} ch, {size}" if size != "1/1" else f"{channels} ch"
        axes.text(min(xs) - 0.6, y, text, ha="right", va="center", size=9, color=grey)
    xs_all = [x for x, _ in places.values()]
    axes.text(min(xs_all) - 0.42, 0.5, "down_blocks.0 ...", size=9, color=grey)
    axes.text(max(xs_all) + 0.42, 0.5, "... up_blocks", size=9, color=grey, ha="right")
    mid = [places[n] for n in blocks.loc[blocks["stage"] == "mid_block", "name"]]
    if mid:
        axes.text(0, mid[0][1] + 0.42, "mid_block", ha="center", size=9, color=grey)


def _places(blocks: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Centre of every block: both arms of the U lean inwards, the mid block lies at its bottom."""
    places: dict[str, tuple[float, float]] = {}
    n_levels = int(blocks["level"].max()) + 1
    for stage, members in blocks.groupby("stage", sort=False):
        level, n = int(members["level"].iloc[0]), len(members)
        reach = 2.0 + 0.9 * (n_levels - 1 - level)
        if stage == "mid_block":
            start, y = -(n - 1) / 2, -float(n_levels)
        elif str(stage).startswith("down"):
            start, y = -reach - (n - 1), -float(level)
        else:
            start, y = reach, -float(level)
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
    ticks = [f"{a}-{b - 1}" for a, b in pairwise(edges)]
    axes.set_xticks(np.arange(n_bins), ticks, rotation=35, ha="right", size=8)
    axes.set_xlabel("timestep (0 is nearly clean, 999 nearly noise)")
    label = _label(str(binned["criterion"].iloc[0]))
    extend = _extend(norm, float(np.nanmin(grid.to_numpy())))
    figure.colorbar(image, ax=axes, label=label, extend=extend)
    return figure
