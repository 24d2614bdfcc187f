"""The table of models: teacher, winner, published masks, baselines, before and after distillation.

Knows which record says what of which model, and how a value is written with its error. It does not
know how the page looks, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from bkprune import plots_eval
from bkprune.cost import CONVENTIONS
from bkprune.evidence import Run, Section, Table

AFTER = "after short distillation"
_RACED = {"output": "error", "pictures": "pictures apart by"}
_QUALITY = ("fid", "is", "clip_score", "frechet_clip", "output_error", "s_unet")
_COST = ("model", "blocks", "params, M", "MACs, G", "predicted ms", "output error", AFTER)
_JUDGED = ("clip_score", "frechet_clip", "fid")
_OPPOSITE = {"better": "worse", "worse": "better", "same": "same"}


def comparison(run: Run) -> Section:
    """What each model costs and how good it is."""
    out = Section("models", "Teacher, winner, and what people do today")
    rows = list(_model_rows(run))
    if not rows:
        out.missing = "Nothing was profiled, searched or evaluated."
        return out
    out.tables.append(_table(rows, _COST))
    out.words.append(
        "MACs are those of one U-Net step, batch 1: "
        + "; ".join(f"{name}: {words}" for name, words in CONVENTIONS.items())
        + ". Predicted latency is the sum of what blocks were measured to take; output error is "
        "E||eps - eps_teacher||^2 on samples that the search has not seen, before any retraining."
    )
    if run.quality is not None:
        out.words.append(
            "Quality is given before → after distillation, ± the bootstrap's standard error over "
            "prompts. " + _verdicts(run)
        )
        judged = [row for row in rows if any(v for k, v in row.items() if k not in _COST)]
        columns = ("model", *(k for row in judged for k in row if k not in _COST))
        out.tables.append(_table(judged, tuple(dict.fromkeys(columns))))
        figure = plots_eval.quality(_text_to_image(run.quality))
        caption = "Every model on the same prompts and seeds, with 95 % intervals."
        out.figures.append(run.draw("quality", figure, caption))
    else:
        out.words.append("No pictures were evaluated.")
    return out


def _table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> Table:
    frame = pd.DataFrame(rows, columns=list(names)).dropna(axis=1, how="all").fillna("")
    columns = [str(c) for c in frame.columns]
    cells = [[str(cell) for cell in row] for row in frame.itertuples(index=False)]
    strong = [i for i, row in enumerate(cells) if row[0] == "winner"]
    return Table(columns, cells, tuple(range(1, len(columns))), "", strong)


def _model_rows(run: Run) -> Iterator[dict[str, Any]]:
    quality = {} if run.quality is None else _by_model(_text_to_image(run.quality))
    whole = run.teacher_cost
    n = len(run.blocks) if run.blocks is not None else None
    if whole or "teacher" in quality:
        yield {
            "model": "teacher",
            "blocks": f"{n}" if n else None,
            **_costs(whole, whole),
            "output error": "0" if run.finalists is not None else None,
            **_before_after(quality, "teacher"),
        }
    seen: set[str] = set()
    first = None if run.finalists is None else run.finalists.iloc[0]
    if first is not None and run.winner:
        seen.add(str(first["removed"]))
        yield _finalist_row("winner", first, whole, n, quality)
    compared = run.folder / "compared"
    for folder in sorted(compared.glob("*/pruned/mask.json")) if compared.is_dir() else []:
        name = folder.parent.parent.name
        record = run.json(str(folder.relative_to(run.folder)))
        removed = [str(block) for block in record.get("removed", [])]
        own = _finalist(run, frozenset(removed))
        if own is not None:
            seen.add(str(own["removed"]))
            yield _finalist_row(name, own, whole, n, quality)
            continue
        cost = record.get("cost", {}).get("student", {})
        yield {
            "model": name,
            "blocks": f"{n - len(removed)}" if n else None,
            **_costs(cost, whole),
            **_before_after(quality, name),
        }
    for _, row in [] if run.finalists is None else list(run.finalists.iterrows()):
        source = str(row["source"])
        baseline = source.startswith(("greedy", "knapsack", "bk-sdm", "random"))
        if baseline and str(row["removed"]) not in seen:
            seen.add(str(row["removed"]))
            yield _finalist_row(source, row, whole, n, {})


def _finalist(run: Run, removed: frozenset[str]) -> Any:
    if run.finalists is None:
        return None
    for _, row in run.finalists.iterrows():
        if frozenset(str(row["removed"]).split()) == removed:
            return row
    return None


def _finalist_row(
    name: str, row: Any, whole: Mapping[str, float], n: int | None, quality: Mapping[str, Any]
) -> dict[str, Any]:
    held = row.get("held_out")
    error = None
    if held is not None and pd.notna(held):
        error = f"{float(held):.4f} ± {float(row['held_out_stderr']):.1g}"
    return {
        "model": name,
        "blocks": f"{n - int(row['n_removed'])}" if n else None,
        **_costs(row, whole),
        "output error": error,
        AFTER: _after(row),
        **_before_after(quality, name),
    }


def _after(row: Any) -> str | None:
    """What the race of a search with `--objective distilled` has seen, and after how many steps."""
    error = row.get("distilled")
    if error is None or pd.isna(error):
        return None
    stderr = float(row["distilled_stderr"])
    what = _RACED[str(row.get("kd_judge", "output"))]
    return f"{what} {float(error):.4f} ± {stderr:.1g}, step {int(row['kd_steps'])}"


def _costs(own: Mapping[str, Any], whole: Mapping[str, float]) -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for name, label, unit, digits in (
        ("params", "params, M", 1e6, 2),
        ("macs", "MACs, G", 1e9, 3),
        ("latency_ms", "predicted ms", 1.0, 1),
    ):
        value = own.get(name)
        out[label] = None
        if value is not None and pd.notna(value):
            share = f" ({float(value) / whole[name]:.2f}x)" if whole.get(name) else ""
            out[label] = f"{float(value) / unit:,.{digits}f}{share}"
    return out


def _text_to_image(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["task"] == "text-to-image"]
    return rows if len(rows) else table


def _by_model(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        stderr = row.get("stderr")
        error = "" if stderr is None or pd.isna(stderr) else f" ± {float(stderr):.1g}"
        text = f"{float(row['value']):.4g}{error}"
        found.setdefault(str(row["model"]), {})[str(row["metric"])] = text
    return found


def _before_after(quality: Mapping[str, dict[str, str]], name: str) -> dict[str, str | None]:
    before = quality.get(f"{name} pruned", quality.get(name, {}))
    after = quality.get(f"{name} distilled", {})
    out: dict[str, str | None] = {}
    for metric in _QUALITY:
        if metric == "output_error" and not after:
            continue
        values = [value for value in (before.get(metric), after.get(metric)) if value]
        label = {"s_unet": "U-Net s a picture", "output_error": "error after KD"}.get(
            metric, metric
        )
        if metric in ("s_unet", "output_error"):  # blocks cost the same before and after
            values = values[-1:]
        out[label.replace("_clip", " CLIP").replace("_", " ")] = " → ".join(values) or None
    return out


def _verdicts(run: Run) -> str:
    """What the paired differences say of the winner after distillation."""
    if run.differences is None:
        return ""
    words = []
    for row in run.differences.to_dict("records"):
        pair = (row["a"], row["b"])
        if row["metric"] not in _JUDGED or "winner distilled" not in pair or "teacher" in pair:
            continue
        is_first = pair[0] == "winner distilled"
        sign, other = (1, pair[1]) if is_first else (-1, pair[0])
        apart = sign * float(row["a_minus_b"])
        low, high = sorted(sign * float(row[end]) for end in ("low", "high"))
        verdict = str(row["a_is"]) if is_first else _OPPOSITE[str(row["a_is"])]
        metric = str(row["metric"]).replace("_", " ")
        words.append(
            f"{verdict} than {other} in {metric}, {apart:+.3g} ({low:+.3g} to {high:+.3g})"
        )
    text = "; ".join(words).replace("same than", "not told apart from")
    return f"The distilled winner, paired, with 95 % intervals: {text}." if words else ""
