"""What the cheap scores are worth: tables, figures and words of the recoverability study.

    python evidence.py --collect   # copies the tables of build/ into the report
    python evidence.py             # figures and README.md from the report's own tables

A score and the final quality are compared mask by mask within each budget: Kendall's tau over all
pairs of masks of the same budget, its 95 % interval by resampling masks within budgets.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bkprune.drawing import logarithmic, plain, png

HERE = Path(__file__).parent
BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-recoverability"
TABLES = ("masks", "scores", "rungs", "final", "races")
FINAL = {"output_error": 1, "clip_score": -1, "frechet_clip": 1}  # the sign makes lower better
LABELS = {
    "output_error": "output error",
    "clip_score": "CLIP score",
    "frechet_clip": "Frechet, CLIP",
}
N_RESAMPLED, N_BEST, WHOLE_MACS = 2000, 8, 246_558_720
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
    *steps, last = (int(str(step)) for step in first)
    for before, now in itertools.pairwise(steps[2:]):  # a power law through the last two rungs
        slope = np.log(first[now] / first[before]) / np.log(now / before)
        out[f"KD {now} steps, extrapolated"] = (
            first[now] * np.exp(slope * np.log(last / now))
        ).reindex(rows.index)
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
    """Tau of every score with every final figure; `best` are the eight of least measured error."""
    table = predictors(rows)
    measured = table["measured"].groupby(rows["budget"])
    is_best = (measured.rank() <= N_BEST).to_numpy()
    out = []
    for among, chosen in (("all", np.ones(len(rows), dtype=bool)), ("best", is_best)):
        budgets = rows["budget"].to_numpy()[chosen]
        for name in table:
            score = table[name].to_numpy(dtype=float)[chosen]
            for metric, sign in FINAL.items():
                tau, low, high = taus(score, sign * rows[metric].to_numpy()[chosen], budgets)
                row = {"among": among, "score": name, "final": metric}
                out.append({**row, "tau": tau, "low": low, "high": high})
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
        ("searches", "measured|additive|knapsack|greedy", "o", "#c0392b"),
        ("roomy", "roomy|^race winner$", "D", "#2e8b57"),
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
            is_searched = any(n in source for n in ("search", "knapsack", "greedy"))
            colour = "#3b6fb6" if "bk-sdm" in source else "#c0392b" if is_searched else "#c3c9d1"
            colour = "#2e8b57" if source.startswith("roomy") or source == "race winner" else colour
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
        "| score | seconds a mask | final output error | the same, best eight | "
        "final CLIP score | final Frechet |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {(r["among"], r["final"], r["score"]): r for r in table.to_dict("records")}
    names = sorted(set(table["score"]), key=lambda n: -found["all", "output_error", n]["tau"])
    for name in names:
        cells = []
        for among, metric in (
            ("all", "output_error"),
            ("best", "output_error"),
            ("all", "clip_score"),
            ("all", "frechet_clip"),
        ):
            row = found[among, metric, name]
            cells.append(f"{row['tau']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})")
        took = cost.get(name, cost.get(name.partition(":")[0]))
        lines.append(f"| {name} | {'' if took is None else f'{took:.1f}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def race_table(rows: pd.DataFrame) -> str:
    """The finalists of each race, the winner first, with their place at the very end."""
    races = read("races")
    lines = [
        "| budget | chosen by | MACs | error, pruned | KD steps | error there | "
        "behind the winner | final error | place |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    whole = {(r["budget"], frozenset(r["removed"].split())): r for r in rows.to_dict("records")}
    for budget, group in races.groupby("budget", sort=False):
        places = rows[rows["budget"] == budget]["output_error"].rank()
        by_error = dict(zip(rows[rows["budget"] == budget]["output_error"], places, strict=True))
        for row in group.to_dict("records"):
            end = whole.get((budget, frozenset(str(row["removed"]).split())))
            final = "" if end is None else f"{end['output_error']:.4f}"
            place = "" if end is None else f"{by_error[end['output_error']]:.0f} of {len(places)}"
            behind = f"{row['behind']:.4f} ± {row['behind_stderr']:.4f}" if row["behind"] else ""
            lines.append(
                f"| {budget}x | {row['source']} | {row['macs'] / WHOLE_MACS:.3f}x | "
                f"{row['chosen']:.4f} | {row['kd_steps']} | {row['distilled']:.4f} | {behind} | "
                f"{final} | {place} |"
            )
        took = float(group["seconds"].iloc[0]) / 60
        lines.append(f"| | {len(group)} finalists in {took:.1f} min, the search's end included |")
    return "\n".join(lines)


def race_taus(rows: pd.DataFrame) -> str:
    """Among the finalists: the race's order, and the order before it, against the final error."""
    races, whole = (
        read("races"),
        {frozenset(str(r["removed"]).split()): r for r in rows.to_dict("records")},
    )
    races["final"] = [
        whole.get(frozenset(str(text).split()), {}).get("output_error", np.nan)
        for text in races["removed"]
    ]
    known = races.dropna(subset=["final"])
    budgets, final = known["budget"].to_numpy(), known["final"].to_numpy(dtype=float)
    place: Array = known.groupby("budget").cumcount().to_numpy().astype(np.float64)
    before = known["chosen"].to_numpy(dtype=float)
    cells = [
        f"{name} {tau:+.2f} ({low:+.2f} to {high:+.2f})"
        for name, (tau, low, high) in (
            ("the race's order", taus(place, final, budgets)),
            ("the error right after pruning", taus(before, final, budgets)),
        )
    ]
    return (
        f"Kendall's tau with the final error among the {len(known)} finalists whose end is known: "
        f"{', '.join(cells)}."
    )


def seed_table() -> str:
    """The leading masks over seeds, paired with the best of BK-SDM's at the same budget."""
    values, masks = read("final"), read("masks").set_index("mask")
    errors = values[values["metric"] == "output_error"]
    table = errors.pivot_table(index="mask", columns="seed", values="value").dropna()
    if table.shape[1] < 2:
        return ""
    lines = [
        "The leading masks with other seeds (order of data, noise, timesteps), final output error:",
        "",
        "| mask | chosen by | " + " | ".join(f"seed {seed}" for seed in table) + " |",
        "| --- | --- |" + " ---: |" * table.shape[1],
    ]
    for mask, row in table.iterrows():
        cells = " | ".join(f"{value:.4f}" for value in row)
        lines.append(f"| {mask} | {masks['source'][str(mask)]} | {cells} |")
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
        ("tau", tau_figure(table[table["among"] == "all"])),
        ("before-after", before_after_figure(rows)),
        ("curves", curve_figure(rows)),
    ):
        (REPORT / f"{name}.png").write_bytes(png(figure))
    text = (HERE / "report.md").read_text(encoding="utf-8")
    for mark, made in (
        ("MASKS", mask_table(rows)),
        ("TAUS", tau_table(table)),
        ("RACES", f"{race_table(rows)}\n\n{race_taus(rows)}"),
        ("SEEDS", seed_table()),
    ):
        text = text.replace(mark, made)
    (REPORT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
