"""The cost table in, figures out.

Knows how costs are shown: three Us side by side, importance against cost, and predicted against
measured times. Works from the records alone, so that a laptop without torch can redraw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bkprune.drawing import COLOURS, KIND_COLOURS, draw_u, plain, size_of_u, unit_column

VALIDATION = "predicted_measured.png"
_TITLES = {"params": "params", "macs": "MACs, with attention matmuls", "latency_ms": "time"}
_N_NAMED = 6


def cost_figures(
    blocks: pd.DataFrame, cost: pd.DataFrame, importance: pd.DataFrame | None
) -> Iterator[tuple[str, Figure]]:
    """Every figure of a cost table, as `(file name, figure)`."""
    yield "u_cost.png", u_costs(blocks, cost)
    if importance is not None and (importance["criterion"] == "output").any():
        chosen = importance[importance["criterion"] == "output"]
        yield "importance_cost.png", importance_cost(blocks, cost, chosen)


def _measures(cost: pd.DataFrame) -> list[str]:
    return [name for name in _TITLES if cost[name].notna().any()]


def u_costs(blocks: pd.DataFrame, cost: pd.DataFrame) -> Figure:
    """Where params, MACs and milliseconds sit: one U each, in per cent of the whole U-Net."""
    measures = _measures(cost)
    width, height = size_of_u(blocks, 0.32)
    figure = Figure(figsize=(width * len(measures), height + 1.2), layout="constrained")
    shares = pd.DataFrame({name: _shares(cost, name) for name in measures})
    for axes, name in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
    ):
        of_blocks = shares.loc[list(blocks["name"]), name]
        norm = Normalize(0, float(of_blocks.max()))
        draw_u(axes, blocks, {str(k): float(v) for k, v in of_blocks.items()}, norm, 6.5)
        bar = figure.colorbar(
            ScalarMappable(norm, COLOURS), ax=axes, orientation="horizontal", shrink=0.7, pad=0.02
        )
        bar.set_label(f"% of the U-Net's {_TITLES[name].split(',')[0]}")
        rest = 100 - float(of_blocks.sum())
        axes.set_title(f"{_TITLES[name]}   ({rest:.0f} % outside of blocks)", size=10)
    return figure


def _shares(cost: pd.DataFrame, name: str) -> pd.Series[float]:
    """Per cent of the U-Net for each of its rows."""
    of_unet = cost[cost["part"].isin(("block", "sampler", "rest"))].set_index("unit")[name]
    return 100 * of_unet.astype(float) / float(of_unet.sum())


def importance_cost(blocks: pd.DataFrame, cost: pd.DataFrame, importance: pd.DataFrame) -> Figure:
    """What each unit is worth against what it costs: the lower right corner is worth removing."""
    total = importance[importance["timestep_bin"].astype(str) == "all"].set_index("unit")["score"]
    column = unit_column(blocks, pd.Series(total.index))
    measures = _measures(cost)
    figure = Figure(figsize=(5.2 * len(measures), 4.8), layout="constrained")
    kinds = blocks.groupby(column)["kind"].agg(lambda k: k.iloc[0] if k.nunique() == 1 else "mixed")
    for axes, name in zip(
        figure.subplots(1, len(measures), squeeze=False, sharey=True)[0], measures, strict=True
    ):
        share = (
            blocks.set_index("name", drop=False)[column].to_frame("unit").join(_shares(cost, name))
        )
        of_unit = share.groupby("unit")[name].sum().reindex(total.index)
        for kind in dict.fromkeys(kinds):
            units = [unit for unit in total.index if kinds[unit] == kind]
            axes.scatter(
                of_unit[units],
                total[units].clip(lower=1e-12),
                color=KIND_COLOURS[kind],
                label=kind,
                s=28,
                alpha=0.85,
            )
        axes.set_yscale("log")
        _name_the_best(axes, of_unit, total.clip(lower=1e-12))
        axes.set_xlabel(f"% of the U-Net's {_TITLES[name]}")
        plain(axes)
    figure.axes[0].set_ylabel("importance: output error without it")
    figure.axes[-1].legend(frameon=False, loc="lower right")
    figure.suptitle(
        "Importance against cost: what lies down and to the right is worth removing "
        f"(named: the {_N_NAMED} that lose least for what they cost)",
        size=11,
    )
    return figure


def _name_the_best(axes: Axes, cost: pd.Series[float], importance: pd.Series[float]) -> None:
    """Names beside the units with the least importance for their cost, none over another."""
    best = (cost / importance).sort_values(ascending=False).index[:_N_NAMED]
    apart = (np.log10(importance.max()) - np.log10(importance.min())) / 22
    right = 0.04 * float(cost.max() - cost.min())
    height = -np.inf
    for unit in importance[best].sort_values().index:
        height = max(np.log10(importance[unit]), height + apart)
        place = (float(cost[unit]) + right, 10.0**height)
        axes.annotate(
            _short(str(unit)),
            (float(cost[unit]), float(importance[unit])),
            xytext=place,
            size=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#9aa5b1", "lw": 0.6, "shrinkB": 3},
        )


def _short(unit: str) -> str:
    for long, brief in (
        ("down_blocks.", "d"),
        ("up_blocks.", "u"),
        ("mid_block", "mid"),
        (".resnets.", ".R"),
        (".attentions.", ".A"),
        (".pairs.", ".P"),
    ):
        unit = unit.replace(long, brief)
    return unit


def validation_figure(compared: pd.DataFrame, accuracy: Mapping[str, float]) -> Figure:
    """Times that the table predicts against measured ones, with 95 % intervals."""
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    low = 0.95 * float(compared[["predicted_ms", "measured_ms"]].min().min())
    high = 1.05 * float(compared[["predicted_ms", "measured_ms"]].max().max())
    axes.plot([low, high], [low, high], color="#9aa5b1", lw=1, ls="--", label="equal")
    is_random = compared["mask"].astype(str).str.startswith("random")
    for chosen, colour, label in (
        (is_random, "#3b6fb6", "random masks"),
        (~is_random, "#d9822b", "named masks"),
    ):
        rows = compared[chosen]
        if rows.empty:
            continue
        errors = [
            rows["measured_ms"] - rows["measured_ms_low"],
            rows["measured_ms_high"] - rows["measured_ms"],
        ]
        axes.errorbar(
            rows["predicted_ms"],
            rows["measured_ms"],
            yerr=[side.clip(lower=0) for side in errors],
            fmt="o",
            ms=5,
            color=colour,
            label=label,
            elinewidth=1,
        )
    for _, row in compared[~is_random].iterrows():
        axes.annotate(
            str(row["mask"])[:24],
            (row["predicted_ms"], row["measured_ms"]),
            xytext=(7, -4),
            textcoords="offset points",
            size=8,
        )
    axes.set_xlabel("predicted by adding up the table, ms")
    axes.set_ylabel("measured beside the teacher, ms")
    axes.set_title(
        f"MAPE {accuracy['mape_percent']:.1f} %, Spearman {accuracy['spearman']:.3f}, "
        f"{len(compared)} masks",
        size=11,
    )
    axes.legend(frameon=False, loc="upper left")
    plain(axes)
    return figure
