"""What `bkprune search --objective distilled` chooses at each budget, and how long its race takes.

    python races.py     # after masks.py; build/races.csv, and the winners go into build/masks.csv

The searches of masks.py go on: their trials are there, so that only the race is run. It learns by
the recipe of recoverability.py, for fewer steps.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
from masks import BUDGETS, TRIALS, space
from recoverability import BATCH, LR

HERE = Path(__file__).parent
BUILD = HERE / "build"
KD_STEPS, FINALISTS, JUDGED = 100, 8, 192


def command(budget: str) -> list[str]:
    words = ["bkprune", "search", "emoji", "--budget", f"macs<={BUDGETS[budget]}x"]
    words += ["--trials", str(TRIALS + 4), "--judged", str(JUDGED), "--objective", "distilled"]
    words += ["--finalists", str(FINALISTS), "--kd-steps", str(KD_STEPS)]
    words += ["--kd-data", str(BUILD / "cache"), "--out", str(BUILD / f"search-{budget}")]
    for word in (f"lr={LR}", f"batch-size={BATCH}", "schedule=cosine", "warmup=10"):
        words += ["--kd", word]
    return [*words, "--kd", "output=30", "--kd", "feature=0"]


def main() -> None:
    read = pd.read_csv(BUILD / "masks.csv", dtype={"budget": str})
    masks: list[dict[str, Any]] = [dict(row) for _, row in read.iterrows()]
    tables, whole = [], space().teacher
    for budget in BUDGETS:
        started = time.monotonic()
        subprocess.run(command(budget), check=True)
        table = pd.read_csv(BUILD / f"search-{budget}" / "finalists.csv")
        table.insert(0, "budget", budget)
        table["seconds"] = time.monotonic() - started
        tables.append(table)
        best = table.iloc[0]
        removed = set(str(best["removed"]).split())
        same = [r for r in masks if r["budget"] == budget and set(r["removed"].split()) == removed]
        for row in same:
            if "race winner" not in row["source"]:
                row["source"] = f"race winner = {row['source']}"
        if not same:
            masks.append(
                {
                    "budget": budget,
                    "mask": f"{budget}-race",
                    "source": "race winner",
                    "n_removed": best["n_removed"],
                    "macs": round(best["macs"] / whole.macs, 4),
                    "params": round(best["params"] / whole.params, 4),
                    "removed": best["removed"],
                }
            )
    pd.concat(tables).to_csv(BUILD / "races.csv", index=False, float_format="%.6g")
    pd.DataFrame(masks).to_csv(BUILD / "masks.csv", index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
