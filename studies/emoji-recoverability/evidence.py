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
from figures import before_after_figure, curve_figure, pictures_figure, tau_figure
from numpy.typing import NDArray
from scipy import stats

from bkprune.drawing import png

HERE = Path(__file__).parent
BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-recoverability"
TABLES = ("masks", "scores", "rungs", "drawn", "final", "races")
SEEN = {"pictures": "pictures", "clip": "CLIP score"}
FINAL = {"output_error": 1, "clip_score": -1, "frechet_clip": 1}  # the sign makes lower better
DIGITS = {"output_error": 4, "clip_score": 1, "frechet_clip": 3}
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
    """One row a mask: budget, source, shares, and each final figure, of the first seed."""
    seen = read("final")
    values = seen[seen["seed"] == 0].pivot_table(index="mask", columns="metric", values="value")
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
    drawn = read("drawn")
    for judge, seen in SEEN.items():
        by_step = drawn.pivot_table(index="mask", columns="step", values=judge)
        for step in by_step:
            when = f"KD {step} steps" if step else "pruned"
            out[f"{seen}, {when}"] = by_step[step].reindex(rows.index)
    return out


class Draws:
    """Masks resampled within their budgets, the same for every score: differences are paired."""

    def __init__(self, budgets: NDArray[Any]) -> None:
        self.same = (budgets[:, None] == budgets[None]) & ~np.eye(len(budgets), dtype=bool)
        random = np.random.default_rng(0)
        groups = [np.flatnonzero(budgets == b) for b in dict.fromkeys(budgets)]
        self.drawn = [
            np.concatenate([random.choice(group, len(group)) for group in groups])
            for _ in range(N_RESAMPLED)
        ]

    def taus(self, score: Array, final: Array) -> tuple[float, Array]:
        """Kendall's tau over pairs of the same budget, and that of every draw."""
        agree = np.sign(score[:, None] - score[None]) * np.sign(final[:, None] - final[None])
        found = [
            agree[np.ix_(rows, rows)][self.same[np.ix_(rows, rows)]].mean() for rows in self.drawn
        ]
        return float(agree[self.same].mean()), np.array(found)


def interval(values: Array) -> tuple[float, float]:
    """95 % of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def is_ablation(score: str) -> bool:
    """Whether a score is known without any training: the kind that other tools prune by."""
    kind = score.partition(":")[0]
    return kind in ("additive", "measured", "task", "latent") or kind.endswith(", pruned")


def is_raced(score: str) -> bool:
    """Whether it needs a short distillation."""
    return "KD" in score


def correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Tau of every score with every final figure; `best` are the eight of least measured error.

    `ahead` is how much further a short distillation reaches than the best ablation score, paired.
    """
    table = predictors(rows)
    measured = table["measured"].groupby(rows["budget"])
    is_best = (measured.rank() <= N_BEST).to_numpy()
    out = []
    for among, chosen in (("all", np.ones(len(rows), dtype=bool)), ("best", is_best)):
        draws = Draws(rows["budget"].to_numpy()[chosen])
        for metric, sign in FINAL.items():
            final = sign * rows[metric].to_numpy()[chosen]
            scores = {str(n): table[n].to_numpy(dtype=float)[chosen] for n in table}
            found = {name: draws.taus(score, final) for name, score in scores.items()}
            best = max((n for n in found if is_ablation(n)), key=lambda n: found[n][0])
            for name, (tau, drawn) in found.items():
                low, high = interval(drawn)
                row: dict[str, Any] = {"among": among, "score": name, "final": metric}
                row |= {"tau": tau, "low": low, "high": high}
                if is_raced(name):
                    low, high = interval(drawn - found[best][1])
                    row |= {"best_ablation": best, "ahead": tau - found[best][0]}
                    row |= {"ahead_low": low, "ahead_high": high}
                out.append(row)
    return pd.DataFrame(out)


def seconds() -> dict[str, float]:
    """What each score costs a mask, in seconds of one thread."""
    scores, mark = read("scores"), "seconds:"
    own = [str(c) for c in scores.columns if str(c).startswith(mark)]
    found = {c.removeprefix(mark): float(scores[c].median()) for c in own}
    rungs = read("rungs")
    for step, group in rungs[rungs["seconds"] > 1].groupby("step"):
        found[f"KD {step} steps"] = float(group["seconds"].median())
    for step, group in read("drawn").groupby("step"):
        for seen in SEEN.values():
            when = f"KD {step!s} steps" if step else "pruned"
            found[f"{seen}, {when}"] = float(group["seconds"].median())
    return found


def mask_table(rows: pd.DataFrame) -> str:
    before = read("scores").set_index("mask")["measured"]
    rungs = read("rungs")
    short = rungs[(rungs["seed"] == 0) & (rungs["step"] == 100)].set_index("mask")["error"]
    drawn = read("drawn")
    near = drawn[drawn["step"] == 100].set_index("mask")["pictures"]
    lines = [
        "| mask | chosen by | blocks | MACs | params | error, pruned | after 100 steps | "
        "pictures apart by, after 100 | final error | CLIP score | Frechet |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mask, row in rows.sort_values(
        ["budget", "output_error"], ascending=[False, True]
    ).iterrows():
        lines.append(
            f"| {mask} | {row['source']} | {row['n_removed']} | {row['macs']:.3f}x | "
            f"{row['params']:.2f}x | {before[str(mask)]:.4f} | {short[str(mask)]:.4f} | "
            f"{near.get(str(mask), np.nan):.3f} | "
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


def of_removed(rows: pd.DataFrame) -> dict[tuple[str, frozenset[str]], dict[str, Any]]:
    """The studied masks by their budget and what they remove."""
    return {entrant(row): dict(row) for _, row in rows.reset_index().iterrows()}


def entrant(row: Any) -> tuple[str, frozenset[str]]:
    """What a mask is known by, in every table."""
    return row["budget"], frozenset(str(row["removed"]).split())


def race_table(rows: pd.DataFrame, judge: str) -> str:
    """The finalists of each race, the winner first, with their figures and places at the end."""
    races, whole = read("races"), of_removed(rows)
    lines = [
        "| budget | chosen by | MACs | error, pruned | KD steps | "
        + ("pictures apart by" if judge == "pictures" else "error there")
        + " | behind the winner | "
        + " | ".join(f"final {label}, place" for label in LABELS.values())
        + " |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(FINAL),
    ]
    ranks = {m: (s * rows[m]).groupby(rows["budget"]).rank() for m, s in FINAL.items()}
    for budget, group in races[races["kd_judge"] == judge].groupby("budget", sort=False):
        for i, row in enumerate(group.to_dict("records")):
            end = whole.get(entrant(row))
            cells = ["" if end is None else cell(end, m, ranks[m][end["mask"]]) for m in FINAL]
            behind = f"{row['behind']:.4f} ± {row['behind_stderr']:.4f}" if i else ""
            lines.append(
                f"| {budget}x | {row['source']} | {row['macs'] / WHOLE_MACS:.3f}x | "
                f"{row['chosen']:.4f} | {row['kd_steps']} | {row['distilled']:.4f} | {behind} | "
                f"{' | '.join(cells)} |"
            )
        took, n = float(group["seconds"].iloc[0]) / 60, int((rows["budget"] == budget).sum())
        lines.append(f"| | {len(group)} finalists in {took:.1f} min, places of {n} |")
    return "\n".join(lines)


def cell(end: dict[str, Any], metric: str, place: float) -> str:
    return f"{end[metric]:.{DIGITS[metric]}f}, {place:.0f}."


def race_taus(rows: pd.DataFrame) -> str:
    """Among the finalists: each race's order, and the order before it, against the end."""
    races, whole = read("races"), of_removed(rows)
    lines = [
        "| race by | finalists | final figure | tau of its order | of the error right after "
        "pruning | difference |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for judge, group in races.groupby("kd_judge", sort=False):
        ends = [whole.get(entrant(row)) for _, row in group.iterrows()]
        is_known = np.array([end is not None for end in ends])
        known = group[is_known]
        draws = Draws(known["budget"].to_numpy())
        place: Array = group.groupby("budget").cumcount().to_numpy()[is_known].astype(np.float64)
        for metric, sign in FINAL.items():
            final = sign * np.array([end[metric] for end in ends if end is not None])
            before = draws.taus(known["chosen"].to_numpy(dtype=float), final)
            after = draws.taus(place, final)
            gain = (after[0] - before[0], after[1] - before[1])
            cells = [
                f"{tau:+.2f} ({low:+.2f} to {high:+.2f})"
                for tau, (low, high) in ((t, interval(d)) for t, d in (after, before, gain))
            ]
            lines.append(f"| {judge} | {len(known)} | {LABELS[metric]} | {' | '.join(cells)} |")
    return "\n".join(lines)


RACED = ("KD 100 steps", "pictures, KD 100 steps", "CLIP score, KD 100 steps")


def ahead_table(table: pd.DataFrame) -> str:
    """How much further short distillations reach than the best score without training."""
    lines = [
        "| final figure | among | best score without training | "
        + " | ".join(f"ahead by {name}" for name in RACED)
        + " |",
        "| --- | --- | --- |" + " ---: |" * len(RACED),
    ]
    for (metric, among), group in table.groupby(["final", "among"], sort=False):
        by_name = group.set_index("score")
        cells = []
        for name in RACED:
            row = by_name.loc[name]
            cells.append(
                f"{row['ahead']:+.2f} ({row['ahead_low']:+.2f} to {row['ahead_high']:+.2f})"
            )
        best = str(by_name["best_ablation"].dropna().iloc[0])
        tau = float(by_name["tau"][best])
        lines.append(
            f"| {LABELS[str(metric)]} | {among} | {best} {tau:+.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def over_seeds(differences: Array, digits: int) -> str:
    """Mean and 95 % interval of paired differences, by Student's t with as many seeds."""
    n = len(differences)
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return f"{differences.mean():+.{digits}f} ± {half:.{digits}f}"


def seed_table() -> str:
    """The leading masks of each budget over seeds, paired with the race's winner."""
    values, masks = read("final"), read("masks").set_index("mask")
    wide = values.pivot_table(index=["metric", "mask"], columns="seed", values="value")
    n_seeds = wide.shape[1]
    if n_seeds < 2:
        return ""
    lines = [
        f"Means over {n_seeds} seeds (order of data, noise, timesteps). Beside each figure what it "
        "is more than the winner's, paired over seeds, with a 95 % interval by Student's t. What "
        "people do today, and the masks that ended best with the first seed (four in CLIP score, "
        "two in output error, two in Frechet distance): their first seed flatters the latter.",
        "",
        "| mask | chosen by | output error | more than the winner | CLIP score | "
        "more than the winner | Frechet | more than the winner |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for budget in dict.fromkeys(masks["budget"]):
        tables = {
            metric: pd.DataFrame(wide.loc[metric])
            .dropna()
            .reindex(masks.index[masks["budget"] == budget])
            for metric in FINAL
        }
        errors = tables["output_error"].dropna()
        winner = next(
            mask for mask in errors.index if "race winner" in masks["source"][mask].split(" = ")
        )
        for mask in errors.mean(axis=1).sort_values().index:
            cells = []
            for metric in FINAL:
                own = tables[metric].loc[mask].to_numpy()
                ahead = own - tables[metric].loc[winner].to_numpy()
                digits = DIGITS[metric]
                finer = digits + (metric == "output_error")
                is_own = mask == winner
                cells += [f"{own.mean():.{digits}f}", "" if is_own else over_seeds(ahead, finer)]
            lines.append(f"| {mask} | {masks['source'][mask]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", action="store_true")
    if parser.parse_args().collect:
        collect()
    rows, before = finals(), read("scores").set_index("mask")["measured"]
    table, known = correlations(rows), predictors(rows)
    table.to_csv(REPORT / "correlations.csv", index=False, float_format="%.3f")
    for name, figure in (
        ("tau", tau_figure(table[table["among"] == "all"], LABELS)),
        ("before-after", before_after_figure(rows, before.reindex(rows.index))),
        ("pictures", pictures_figure(rows, known["KD 100 steps"], known["pictures, KD 100 steps"])),
        ("curves", curve_figure(rows, read("rungs"))),
    ):
        (REPORT / f"{name}.png").write_bytes(png(figure))
    text = (HERE / "report.md").read_text(encoding="utf-8")
    for mark, made in (
        ("MASKS", mask_table(rows)),
        ("TAUS", tau_table(table)),
        ("AHEAD", ahead_table(table)),
        ("RACES", race_table(rows, "pictures")),
        ("OUTPUT", race_table(rows, "output")),
        ("ORDERS", race_taus(rows)),
        ("SEEDS", seed_table()),
    ):
        text = text.replace(mark, made)
    (REPORT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
