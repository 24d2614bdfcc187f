"""What a report says, section by section, from the tables of a run folder alone.

Knows which table answers which question, in which order, and names what was not measured. It does
not know HTML, and needs no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from bkprune import plots, plots_cost, plots_distill, plots_search
from bkprune.comparison import comparison
from bkprune.drawing import mask_figure, places_of
from bkprune.evidence import Run, Section, Table
from bkprune.series import accuracy


def sections(run: Run) -> Iterator[Section]:
    """All of them, in the order of the questions."""
    yield _asked(run)
    yield _winner(run)
    yield comparison(run)
    yield _pictures(run)
    yield _front(run)
    important: dict[str, Any] = {}
    if run.blocks is not None and run.importance is not None:
        important = dict(plots.importance_figures(run.blocks, run.importance))
    yield _blocks(run, important)
    yield _timesteps(run, important)
    yield _prediction(run)
    yield _training(run)
    yield _how(run)


def _asked(run: Run) -> Section:
    out = Section("asked", "What was asked")
    path = run.folder / "study.toml"
    if not path.exists():
        out.missing = "There is no study.toml here: the commands were run one by one."
    budgets = run.winner.get("budgets", {})
    if budgets:
        rows = [[text, f"{b['limit']:,.6g}", f"{b['cost']:,.6g}"] for text, b in budgets.items()]
        out.tables.append(Table(["budget", "limit", "winner"], rows, (1, 2)))
    if path.exists():
        out.code.append(path.read_text(encoding="utf-8", errors="replace").strip())
    return out


def _winner(run: Run) -> Section:
    out = Section("winner", "The winner")
    if not run.winner:
        out.missing = "No search was run."
        return out
    out.words.append(winner_line(run))
    if run.blocks is not None:
        figure = mask_figure(run.blocks, run.winner.get("removed", []))
        caption = "The U-Net: removed blocks are empty. Residual blocks are boxes, attention pills."
        out.figures.append(run.draw("winner", figure, caption))
    return out


def winner_line(run: Run) -> str:
    """What the winner is, in one sentence."""
    removed = run.winner.get("removed", [])
    n = len(run.blocks) if run.blocks is not None else "?"
    shares = run.winner.get("share_of_teacher", {})
    words = [
        f"{shares[name]:.2f}x {label}"
        for name, label in (
            ("latency_ms", "predicted latency"),
            ("macs", "MACs"),
            ("params", "parameters"),
        )
        if shares.get(name) is not None
    ]
    return f"{len(removed)} of {n} blocks removed: {', '.join(words)}."


# --- pictures, fronts, blocks ----------------------------------------------------------------


def _pictures(run: Run) -> Section:
    out = Section("pictures", "Images side by side")
    found = sorted((run.folder / "evaluation").glob("grid-*.png"))
    for path in found:
        task = path.stem.removeprefix("grid-").replace("-", " ")
        out.figures.append(
            (str(path.relative_to(run.folder)), f"{task}: the same prompt and seed along a row.")
        )
    if not found:
        out.missing = "No pictures were drawn."
    return out


def _front(run: Run) -> Section:
    out = Section("front", "What else was found: cost against error")
    table = run.candidates
    if table is None or run.blocks is None or "measured" not in table:
        out.missing = "No masks were measured."
        return out
    whole = run.teacher_value(run.metric)
    rows = table[(table["measured"] > 0) & table[run.metric].notna()]
    if not whole or not len(rows):
        out.missing = "No mask has both a cost and an error above 0."
        return out
    winner = " ".join(run.winner.get("removed", []))
    names = {str(name): i for i, name in enumerate(run.blocks["name"])}
    places = places_of(run.blocks)
    points = []
    for row in rows.to_dict("records"):
        removed = str(row["removed"]).split()
        share, error = float(row[run.metric]) / whole, float(row["measured"])
        won = frozenset(removed) == frozenset(winner.split())
        source = str(row["source"])
        is_base = source.startswith(("greedy", "knapsack", "bk-sdm", "random"))
        kind = "won" if won else "base" if is_base else "best" if row.get("on_front") else ""
        words = (
            f"{'Winner' if won else source}: {len(removed)} of {len(names)} blocks removed, "
            f"{share:.3f}x {run.metric}, {float(row['params']) / 1e6:.2f} M params, output error "
            f"{error:.4f} ± {float(row.get('stderr') or 0):.1g}"
        )
        shown = [names[name] for name in removed if name in names]
        points.append({"x": share, "y": error, "kind": kind, "words": words, "removed": shown})
    budgets = run.winner.get("budgets", {})
    limit = next(iter(budgets.values()))["limit"] / whole if budgets else None
    kinds = [point["kind"] for point in points]
    out.front = {
        "x": run.metric,
        "limit": limit,
        "points": points,
        "winner": kinds.index("won") if "won" in kinds else 0,
        "blocks": [
            {"name": str(name), "kind": str(kind), "x": places[name][0], "y": places[name][1]}
            for name, kind in zip(run.blocks["name"], run.blocks["kind"], strict=True)
        ],
    }
    out.words.append(
        f"Each point is a mask whose error was measured before retraining; {len(points)} of them. "
        "Red: the winner. Blue: no other mask is better in both. Orange: baselines."
    )
    units = {str(name): [str(name)] for name in run.blocks["name"]}
    lim = None if limit is None else limit * whole
    for name, figure in plots_search.search_figures(rows, units, run.metric, whole, lim, winner):
        if name != "search_history.png":
            out.figures.append(run.draw(name.removesuffix(".png"), figure, _SEARCH[name]))
    return out


_SEARCH = {
    "search_front.png": "Masks by cost and output error.",
    "search_masks.png": "Which blocks the best feasible masks remove.",
    "search_additive.png": "Summed importance against what masks really lose.",
}


def _blocks(run: Run, important: Mapping[str, Any]) -> Section:
    out = Section("blocks", "What every block is worth, and what it costs")
    if run.blocks is None or (run.importance is None and run.cost is None):
        out.missing = "Blocks were neither ablated nor profiled."
        return out
    if run.importance is None:
        out.words.append("Importance was not measured.")
    else:
        for name, figure in important.items():
            if not name.startswith("timesteps"):
                words = "where it stands in the U" if name.startswith("u_") else "ranked"
                criterion = name.split("_", 1)[1].removesuffix(".png")
                caption = f"Importance, criterion {criterion}, {words}."
                out.figures.append(run.draw(name.removesuffix(".png"), figure, caption))
    if run.cost is None:
        out.words.append("Costs were not measured.")
    else:
        captions = {
            "u_cost.png": "Each block's share of the U-Net, per cent.",
            "importance_cost.png": "Importance against cost: low and to the right can go.",
        }
        for name, figure in plots_cost.cost_figures(run.blocks, run.cost, run.importance):
            out.figures.append(run.draw(name.removesuffix(".png"), figure, captions[name]))
    return out


def _timesteps(run: Run, important: Mapping[str, Any]) -> Section:
    out = Section("timesteps", "When a block matters")
    found = []
    for name, figure in important.items():
        if name.startswith("timesteps"):
            caption = "Loss without each block by timestep bin; bin 0 is the least noisy."
            found.append(run.draw(name.removesuffix(".png"), figure, caption))
    out.figures += found
    if not found:
        out.missing = "Importance was not measured by timestep."
    return out


def _prediction(run: Run) -> Section:
    out = Section("prediction", "Is the predicted latency true?")
    if run.validation is None:
        out.missing = "No whole nets were measured: give `profile --validate N`."
        return out
    found = accuracy(run.validation)
    out.words.append(
        f"{len(run.validation)} masks were measured whole: mean error "
        f"{found['mape_percent']:.1f} %, Spearman {found['spearman']:.3f}."
    )
    figure = plots_cost.validation_figure(run.validation, found)
    caption = "Sum of blocks against the whole net, measured in the same rounds."
    out.figures.append(run.draw("predicted_measured", figure, caption))
    return out


def _training(run: Run) -> Section:
    out = Section("training", "Distillation")
    logs = [("winner", run.folder / "distillation")]
    compared = run.folder / "compared"
    if compared.is_dir():
        logs += [(p.parent.name, p) for p in sorted(compared.glob("*/distillation"))]
    for name, folder in logs:
        path = folder / "train.jsonl"
        if not path.exists():
            continue
        try:
            log = pd.read_json(path, lines=True)
            figure = plots_distill.curves(log)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a log of training ({error})") from error
        last = log.iloc[-1]
        out.words.append(f"{name}: {int(last['step'])} steps, last loss {float(last['loss']):.4g}.")
        figures = f"train-{name}"
        out.figures.append(run.draw(figures, figure, f"Losses of {name} over steps."))
        shown = sorted((folder / "previews").glob("step-*.png"))
        if shown:
            relative = str(shown[-1].relative_to(run.folder))
            out.figures.append((relative, f"{name}: teacher, pruned, and after the last step."))
    if not out.figures:
        out.missing = "Nothing was distilled."
    return out


def _how(run: Run) -> Section:
    out = Section("how", "How it was measured")
    machine = run.machine or run.evaluation.get("machine", {})
    if machine:
        versions = machine.get("versions", {})
        rows = [
            [name, str(machine[name])]
            for name in ("device", "processor", "threads", "memory_gb", "system", "python", "gpu")
            if machine.get(name) is not None
        ]
        rows += [[name, str(value)] for name, value in versions.items()]
        out.tables.append(Table(["machine", ""], rows))
    else:
        out.words.append("The machine was not recorded.")
    if run.evaluation:
        how = {k: v for k, v in run.evaluation.get("how", {}).items() if v}
        rows = [[name, str(value)] for name, value in how.items()]
        if rows:
            out.tables.append(Table(["metric", "measured with"], rows))
    stages = run.record.get("stages", {})
    if stages:
        rows = [
            [name, f"{float(s.get('seconds', 0)):.0f}", str(s.get("finished", ""))]
            for name, s in stages.items()
            if s.get("state") == "done" and name != "report"
        ]
        out.tables.append(Table(["stage", "seconds", "finished"], rows, (1,)))
        out.code.append("\n".join(_command(s) for n, s in stages.items() if n != "report"))
    return out


def _command(stage: Mapping[str, Any]) -> str:

    words = [
        str(word).replace("{run}", "RUN").replace("{study}", "STUDY") for word in stage["words"]
    ]
    name = str(stage.get("command", ""))
    return "bkprune " + shlex.join([name, *words])
