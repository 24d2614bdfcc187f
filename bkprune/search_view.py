"""A search for people: its budgets and its finalists at the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from bkprune.terminal import notice, print_table

if TYPE_CHECKING:
    from bkprune.space import Space


def print_budgets(rows: list[dict[str, Any]]) -> None:
    """Whether and how far each budget can be kept."""
    view = pd.DataFrame({"budget": [row["budget"] for row in rows]})
    for column in ("teacher", "limit", "least"):
        view[column] = [f"{row[column]:,.6g}" for row in rows]
    view["limit / teacher"] = [f"{row['share']:.3f}" for row in rows]
    view["least / teacher"] = [f"{row['least_share']:.3f}" for row in rows]
    if len(view):
        print_table(view, "Budgets of the U-Net, and the least that can be reached")


def print_finalists(table: pd.DataFrame, space: Space) -> None:
    """The winner and what it was compared with."""
    view = pd.DataFrame({"": ["winner", *[""] * (len(table) - 1)], "source": table["source"]})
    view["blocks"] = table["n_removed"]
    for column in ("params", "macs", "latency_ms"):
        whole = getattr(space.teacher, column)
        if whole:
            view[column] = [f"{value / whole:.3f}x" for value in table[column]]
    for column, error in (
        ("additive", None),
        ("measured", "stderr"),
        ("chosen", "chosen_stderr"),
        ("held_out", "held_out_stderr"),
        ("kd_steps", None),
        ("distilled", "distilled_stderr"),
        ("behind", "behind_stderr"),
    ):
        if column in table and error is None:
            view[column] = [f"{value:.4g}" for value in table[column]]
        elif column in table:
            pairs = zip(table[column], table[error], strict=True)
            view[column.replace("_", " ")] = [f"{v:.4g} ± {e:.2g}" for v, e in pairs]
    title = "Finalists: output error on samples searched, chosen on, and held out"
    if "distilled" in table:
        by = "pictures' distance" if table["kd_judge"].iloc[0] == "pictures" else "error"
        title += f"; {by} after so many steps of distillation, and behind the winner there"
    print_table(view, title)
    notice(f"removed: {table['removed'].iloc[0]}")
