"""What `bkprune search --objective distilled` chooses at each budget, and how long its race takes.

    python races.py     # after masks.py; build/races.csv, and the winners go into build/masks.csv

The searches of masks.py go on: their trials are there, so that only the race is run. It learns by
the recipe of recoverability.py, for fewer steps.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
from masks import BUDGETS, TRIALS, space
from recoverability import BATCH, LR, PICTURES

from bkprune.race_job import JUDGES
from bkprune.study import write_atomic

HERE = Path(__file__).parent
BUILD = HERE / "build"
KD_STEPS, FINALISTS, JUDGED = 100, 8, 192
WINNER = {"output": "race winner by output", "pictures": "race winner"}


def command(budget: str, judge: str) -> list[str]:
    words = ["bkprune", "search", "emoji", "--budget", f"macs<={BUDGETS[budget]}x"]
    words += ["--trials", str(TRIALS + 4), "--judged", str(JUDGED), "--objective", "distilled"]
    words += ["--finalists", str(FINALISTS), "--kd-steps", str(KD_STEPS)]
    words += ["--kd-judge", judge, "--kd-sampling-steps", str(PICTURES.steps)]
    words += ["--kd-data", str(BUILD / "cache"), "--out", str(BUILD / f"search-{budget}")]
    for word in (f"lr={LR}", f"batch-size={BATCH}", "schedule=cosine", "warmup=10"):
        words += ["--kd", word]
    return [*words, "--kd", "output=30", "--kd", "feature=0"]


def name_winner(masks: list[dict[str, Any]], budget: str, judge: str, best: Any) -> None:
    """Say in the list of masks which one a race has chosen; add it if no one else has."""
    title, removed, whole = WINNER[judge], set(str(best["removed"]).split()), space().teacher
    same = [r for r in masks if r["budget"] == budget and set(r["removed"].split()) == removed]
    for row in same:
        if title not in row["source"].split(" = "):
            row["source"] = f"{title} = {row['source']}"
    if not same:
        masks.append(
            {
                "budget": budget,
                "mask": f"{budget}-race" + ("" if judge == "output" else f"-{judge}"),
                "source": title,
                "n_removed": best["n_removed"],
                "macs": round(best["macs"] / whole.macs, 4),
                "params": round(best["params"] / whole.params, 4),
                "removed": best["removed"],
            }
        )


def main() -> None:
    path = BUILD / "races.csv"
    read = pd.read_csv(BUILD / "masks.csv", dtype={"budget": str})
    masks: list[dict[str, Any]] = [dict(row) for _, row in read.iterrows()]
    tables = [pd.read_csv(path, dtype={"budget": str})] if path.exists() else []
    done = {
        (b, j) for table in tables for b, j in zip(table["budget"], table["kd_judge"], strict=True)
    }
    for judge, budget in itertools.product(JUDGES, BUDGETS):
        if (budget, judge) in done:
            continue
        started = time.monotonic()
        subprocess.run(command(budget, judge), check=True)
        table = pd.read_csv(BUILD / f"search-{budget}" / "finalists.csv")
        table.insert(0, "budget", budget)
        table["seconds"] = time.monotonic() - started
        tables.append(table)
        name_winner(masks, budget, judge, table.iloc[0])
        text = pd.concat(tables).to_csv(index=False, float_format="%.6g")
        write_atomic(path, text.encode())
        text = pd.DataFrame(masks).to_csv(index=False, float_format="%.4f")
        write_atomic(BUILD / "masks.csv", text.encode())


if __name__ == "__main__":
    main()
