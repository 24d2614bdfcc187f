"""What the cheap scores are worth: tables, figures and words of the recoverability study.

    python evidence.py --collect   # copies the tables of build/ into the report
    python evidence.py             # figures and README.md from the report's own tables

A score and the final quality are compared mask by mask within each budget: Kendall's tau over all
pairs of masks of the same budget, its 95 % interval by resampling masks within budgets.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bkprune.drawing import plain, png

HERE = Path(__file__).parent
BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-recoverability"
TABLES = ("masks", "scores", "rungs", "final", "races")
FINAL = {"output_error": 1, "clip_score": -1, "frechet_clip": 1}  # the sign makes lower better
LABELS = {
    "output_error": "output error",
    "clip_score": "CLIP score",
    "frechet_clip": "Frechet, CLIP",
}
N_RESAMPLED = 2000
Array = NDArray[np.float64]


def collect() -> None:
    REPORT.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        if (BUILD / f"{name}.csv").exists():
            rows = pd.read_csv(BUILD / f"{name}.csv", dtype={"budget": str})
            rows.to_csv(REPORT / f"{name}.csv", index=False, float_format="%.5g")


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(REPORT / f"{name}.csv", dtype={"budget": str})


def finals() -> pd.DataFrame:
    """One row a mask: budget, source, shares, and each final figure, averaged over seeds."""
    values = read("final").pivot_table(index="mask", columns="metric", values="value")
    return read("masks").set_index("mask").join(values).dropna(subset=list(FINAL))


def predictors(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a mask, one column a score; lower is predicted to be better."""
    scores = read("scores").set_index("mask").reindex(rows.index)
    out = scores.drop(columns=[c for c in scores.columns if str(c).startswith("seconds:")])
    rungs = read("rungs")
    first = rungs[rungs["seed"] == 0].pivot_table(index="mask", columns="step", values="error")
    for step in list(first)[:-1]:
        out[f"KD {step} steps"] = first[step].reindex(rows.index)
    return out


def taus(score: Array, final: Array, budgets: NDArray[Any]) -> tuple[float, float, float]:
    """Kendall's tau over pairs of the same budget, and its 95 % interval."""
    same = budgets[:, None] == budgets[None]
    agree = np.sign(score[:, None] - score[None]) * np.sign(final[:, None] - final[None]) * same
    random = np.random.default_rng(0)
    found = []
    for _ in range(N_RESAMPLED):
        drawn = np.concatenate(
            [
                random.choice(m, len(m))
                for b in dict.fromkeys(budgets)
                for m in [np.flatnonzero(budgets == b)]
            ]
        )
        counted = same[np.ix_(drawn, drawn)] & (drawn[:, None] != drawn[None])
        found.append(agree[np.ix_(drawn, drawn)][counted].mean())
    off = same & ~np.eye(len(score), dtype=bool)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(agree[off].mean()), float(low), float(high)


def correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Tau of every score with every final figure."""
    budgets = rows["budget"].to_numpy()
    out = []
    table = predictors(rows)
    for name in table:
        for metric, sign in FINAL.items():
            tau, low, high = taus(
                table[name].to_numpy(dtype=float), sign * rows[metric].to_numpy(), budgets
            )
            out.append({"score": name, "final": metric, "tau": tau, "low": low, "high": high})
    return pd.DataFrame(out)


def seconds() -> dict[str, float]:
    """What each score costs a mask, in seconds of one thread."""
    scores, mark = read("scores"), "seconds:"
    own = [str(c) for c in scores.columns if str(c).startswith(mark)]
    found = {c.removeprefix(mark): float(scores[c].median()) for c in own}
    rungs = read("rungs")
    for step, group in rungs[rungs["seconds"] > 1].groupby("step"):
        found[f"KD {step} steps"] = float(group["seconds"].median())
    return found


def tau_figure(table: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(table["score"]))
    figure = Figure(figsize=(10.5, 0.6 + 0.24 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(FINAL), sharey=True)
    for axes, metric in zip(grid, FINAL, strict=True):
        rows = table[table["final"] == metric].set_index("score").reindex(names)
        places = np.arange(len(names))
        colours = ["#d9822b" if name.startswith("KD") else "#3b6fb6" for name in names]
        for place, colour, row in zip(places, colours, rows.itertuples(), strict=True):
            axes.plot([row.low, row.high], [place, place], color=colour, lw=1.5)
            axes.plot(row.tau, place, "o", ms=4, color=colour)
        axes.axvline(0, color="#9aa5b1", lw=0.8)
        axes.set_title(f"final {LABELS[metric]}", size=9.5)
        axes.set_xlabel("Kendall's tau, 95 % interval", size=8)
        axes.set_xlim(-1, 1)
        axes.tick_params(labelsize=8)
        plain(axes)
    grid[0].set_yticks(np.arange(len(names)), names)
    grid[0].invert_yaxis()
    return figure


def before_after_figure(rows: pd.DataFrame) -> Figure:
    """Each mask's error right after pruning and at the end."""
    before = read("scores").set_index("mask")["measured"].reindex(rows.index)
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 3.8), layout="constrained")
    grid = figure.subplots(1, len(budgets), squeeze=False)[0]
    styles = (
        ("searches", ("measured", "additive", "knapsack", "greedy"), "o", "#c0392b"),
        ("BK-SDM and near", ("bk-sdm", "near"), "s", "#3b6fb6"),
        ("other choices", ("most",), "D", "#6b7280"),
        ("random", ("random", "high", "middling"), "^", "#9aa5b1"),
    )
    for axes, budget in zip(grid, budgets, strict=True):
        for label, starts, marker, colour in styles:
            own = rows[(rows["budget"] == budget) & rows["source"].str.startswith(starts)]
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
        axes.tick_params(labelsize=8)
        plain(axes)
    grid[0].set_ylabel("output error after distillation", size=8.5)
    grid[-1].legend(fontsize=7.5, frameon=False)
    return figure


def curve_figure(rows: pd.DataFrame) -> Figure:
    """Error on the way, of every mask."""
    rungs = read("rungs")
    rungs = rungs[(rungs["seed"] == 0) & rungs["mask"].isin(rows.index)]
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = Figure(figsize=(4.0 * len(budgets), 3.4), layout="constrained")
    grid = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for axes, budget in zip(grid, budgets, strict=True):
        for mask in rows.index[rows["budget"] == budget]:
            own = rungs[rungs["mask"] == mask].sort_values("step")
            source = str(rows["source"][str(mask)])
            is_searched = source.startswith(("measured", "additive", "knapsack", "greedy"))
            colour = "#c0392b" if is_searched else "#3b6fb6" if "bk-sdm" in source else "#c3c9d1"
            axes.plot(own["step"], own["error"], color=colour, lw=1.2)
        axes.set(
            xscale="log", yscale="log", title=f"MACs {budget}x", xlabel="steps of distillation"
        )
        plain(axes)
    grid[0].set_ylabel("output error")
    return figure


def mask_table(rows: pd.DataFrame) -> str:
    before = read("scores").set_index("mask")["measured"]
    rungs = read("rungs")
    short = rungs[(rungs["seed"] == 0) & (rungs["step"] == 50)].set_index("mask")["error"]
    lines = [
        "| mask | chosen by | blocks | MACs | params | error, pruned | after 50 steps | "
        "final error | CLIP score | Frechet |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mask, row in rows.sort_values(
        ["budget", "output_error"], ascending=[False, True]
    ).iterrows():
        lines.append(
            f"| {mask} | {row['source']} | {row['n_removed']} | {row['macs']:.3f}x | "
            f"{row['params']:.2f}x | {before[str(mask)]:.4f} | {short[str(mask)]:.4f} | "
            f"{row['output_error']:.4f} | {row['clip_score']:.1f} | {row['frechet_clip']:.3f} |"
        )
    return "\n".join(lines)


def tau_table(table: pd.DataFrame) -> str:
    cost = seconds()
    lines = [
        "| score | seconds a mask | final output error | final CLIP score | final Frechet |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    order = table[table["final"] == "output_error"].sort_values("tau", ascending=False)["score"]
    for name in order:
        cells = []
        for metric in FINAL:
            row = table[(table["score"] == name) & (table["final"] == metric)].iloc[0]
            cells.append(f"{row['tau']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})")
        known = cost.get(name, cost.get(name.partition(":")[0]))
        lines.append(
            f"| {name} | {'' if known is None else f'{known:.1f}'} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", action="store_true")
    if parser.parse_args().collect:
        collect()
    rows = finals()
    table = correlations(rows)
    table.to_csv(REPORT / "correlations.csv", index=False, float_format="%.3f")
    for name, figure in (
        ("tau", tau_figure(table)),
        ("before-after", before_after_figure(rows)),
        ("curves", curve_figure(rows)),
    ):
        (REPORT / f"{name}.png").write_bytes(png(figure))
    text = (HERE / "report.md").read_text(encoding="utf-8")
    text = text.replace("MASKS", mask_table(rows)).replace("TAUS", tau_table(table))
    (REPORT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
