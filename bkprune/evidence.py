"""The tables of a run folder, read once each and checked before they are believed.

Knows which columns every table has, and what a section of a report is made of. It does not know
what a report says, and needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bkprune import study

_NEEDED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # text columns, numeric columns
    study.BLOCKS: (("name", "kind", "stage", "pair"), ("level", "out")),
    study.IMPORTANCE: (("unit", "criterion", "timestep_bin"), ("score", "stderr", "n")),
    study.COST: (("unit", "part"), ("params", "macs", "macs_paper")),
    study.CANDIDATES: (("removed", "source"), ("n_removed", "params", "macs")),
    study.FINALISTS: (("removed", "source"), ("n_removed", "params", "macs")),
    study.VALIDATION: (("mask",), ("predicted_ms", "measured_ms")),
    study.EVAL: (("task", "model", "metric"), ("value", "n")),
    study.DIFFERENCES: (("task", "metric", "a", "b", "a_is"), ("a_minus_b", "low", "high")),
}
_EMPTY_ALLOWED = ("removed",)


@dataclass(frozen=True)
class Table:
    """Cells as text; `numeric` are the columns that stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    caption: str = ""
    strong: Sequence[int] = ()


@dataclass
class Section:
    """One answer.

    Attributes:
        key: of its link.
        missing: what was not run, where that is why there is nothing.
        figures: stem and caption of each.
        front: data of the interactive figure, or empty.
    """

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    missing: str = ""
    front: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """The tables of a run folder, read once each and checked.

    Raises:
        ValueError: no such folder, or a table that is not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such run folder")
        self.folder = folder
        self.figures: dict[str, Figure] = {}
        self.blocks = self.table(study.BLOCKS)
        self.importance = self.table(study.IMPORTANCE)
        self.cost = self.table(study.COST)
        self.candidates = self.table(study.CANDIDATES)
        self.finalists = self.table(study.FINALISTS)
        self.validation = self.table(study.VALIDATION)
        self.quality = self.table(f"evaluation/{study.EVAL}")
        self.differences = self.table(f"evaluation/{study.DIFFERENCES}")
        self.winner = self.json(study.WINNER)
        self.machine = self.json(study.MACHINE)
        self.record = self.json("run.json")
        self.evaluation = self.json(f"evaluation/{study.EVALUATION}")
        if all(t is None for t in (self.importance, self.cost, self.candidates, self.quality)):
            raise ValueError(
                f"{folder}: no tables in it; `bkprune run` or its commands make them first"
            )

    def table(self, name: str) -> pd.DataFrame | None:
        """A table, or None where its stage was not run."""
        path = self.folder / name
        if not path.exists():
            return None
        texts, numbers = _NEEDED[path.name]
        try:
            found = pd.read_csv(path, dtype=dict.fromkeys(texts, str), keep_default_na=True)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV table ({error})") from error
        lacking = [name for name in (*texts, *numbers) if name not in found]
        if lacking:
            raise ValueError(f"{path}: no column {', '.join(lacking)}; make the table again")
        for column in numbers:
            values = pd.to_numeric(found[column], errors="coerce")
            if values.isna().any():
                line = int(values.isna().to_numpy().argmax())
                text = str(found[column].iloc[line])
                raise ValueError(
                    f"{path}, line {line + 2}: {column} is {text!r}, where a number is expected"
                )
            found[column] = values
        for column in texts:
            if column in _EMPTY_ALLOWED:
                found[column] = found[column].fillna("")
            elif found[column].isna().any():
                line = int(found[column].isna().to_numpy().argmax())
                raise ValueError(f"{path}, line {line + 2}: {column} is empty")
        if not len(found):
            raise ValueError(f"{path}: no rows in it; make the table again")
        return found

    def json(self, name: str) -> dict[str, Any]:
        """A record, empty where its stage was not run."""
        path = self.folder / name
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: not a record")
        return found

    @cached_property
    def metric(self) -> str:
        """The cost on the front's axis: that of the first budget."""
        budgets = list(self.winner.get("budgets", {}))
        names = {"latency": "latency_ms", "memory": "memory_mb", "weights": "weight_bytes"}
        name = budgets[0].split("<=")[0].strip() if budgets else "macs"
        return names.get(name, name)

    @cached_property
    def teacher_cost(self) -> dict[str, float]:
        """Sums over the U-Net's rows."""
        if self.cost is None:
            return {}
        rows = self.cost[self.cost["part"].isin(("block", "sampler", "rest"))]
        out = {name: float(rows[name].sum()) for name in ("params", "macs", "macs_paper")}
        if "latency_ms" in rows and rows["latency_ms"].notna().all():
            out["latency_ms"] = float(rows["latency_ms"].sum())
        return out

    def teacher_value(self, metric: str) -> float | None:
        """The teacher's cost, for shares."""
        known = self.teacher_cost.get(metric)
        share = self.winner.get("share_of_teacher", {}).get(metric)
        own = self.winner.get("figures", {}).get(metric)
        return known if known is not None else own / share if own and share else None

    def draw(self, stem: str, figure: Figure, caption: str) -> tuple[str, str]:
        """Keep a figure under a name."""
        self.figures[stem] = figure
        return stem, caption
