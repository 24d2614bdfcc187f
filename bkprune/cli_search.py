"""`bkprune search`: options, files and printed tables of a search."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkprune.blocks import GRAINS
from bkprune.cli_analyze import calibration_source
from bkprune.terminal import (
    JSON,
    MODEL,
    PREDICTION,
    QUIET,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    choice,
    one_line_errors,
    progress_bar,
)

if TYPE_CHECKING:
    import pandas as pd

    from bkprune.cost import CostTable
    from bkprune.models import Parts
    from bkprune.search import Quality, Search, SearchSettings
    from bkprune.space import Space
    from bkprune.study import Study

_HOW, _WHERE = "How long", "Where it runs"
N_FINALISTS, N_JUDGED = 8, 256


def search(
    model: MODEL,
    budget: Annotated[
        list[str],
        typer.Option(
            help="METRIC<=VALUE: latency, params, macs, macs_paper, memory or weights, absolute "
            "(500M, 40ms, 3GB) or relative to the teacher (0.6x, 60%). May be repeated; all hold."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Study folder, with the importance.csv of `analyze` and the cost.csv of "
            "`profile`. Default: bkprune-NAME beside you."
        ),
    ] = None,
    grain: Annotated[str, typer.Option(help=f"What is removed: {', '.join(GRAINS)}.")] = "block",
    objective: Annotated[
        str,
        typer.Option(
            help="measured (every mask is ablated on calibration samples) or additive (summed "
            "importance: the exact optimum, at once)."
        ),
    ] = "measured",
    keep: Annotated[
        list[str] | None, typer.Option(help="Block, unit or glob never removed. Repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Block, unit or glob always removed. Repeatable.")
    ] = None,
    cost: Annotated[
        Path | None,
        typer.Option(help="Cost table measured elsewhere. Default: the study's cost.csv."),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Masks to measure in all.", rich_help_panel=_HOW)
    ] = 200,
    timeout: Annotated[
        float | None, typer.Option(help="Stop after so many seconds.", rich_help_panel=_HOW)
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Calibration samples of the search.", rich_help_panel=_HOW)
    ] = 96,
    data: Annotated[str | None, typer.Option(help="As in `analyze`.", rich_help_panel=_HOW)] = None,
    seed: Annotated[int, typer.Option(help="Same seed and one worker: same winner.")] = 1234,
    batch_size: Annotated[int, typer.Option(help="Changes memory and speed.")] = 16,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage URL (postgresql://...) that workers on many machines share. "
            "Default: a journal file in the study folder.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes on this machine.", rich_help_panel=_WHERE)
    ] = 1,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Only measure for a search that runs elsewhere: no finalists, no files.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Put a study made otherwise aside and start afresh.")
    ] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
    prediction_type: PREDICTION = None,
) -> None:
    """Find the mask that loses least under the budgets, and show it beside what people do today.

    Writes candidates.csv, finalists.csv, winner.json, figures and the Optuna journal. The same
    command again goes on where it stopped; started twice, both work on one study.
    """
    with one_line_errors("the same command resumes where it stopped"):
        from bkprune.models import Parts
        from bkprune.search import SearchSettings

        settings = SearchSettings(
            grain=choice("--grain", grain, GRAINS),
            objective=choice("--objective", objective, ("measured", "additive")),
            budgets=tuple(budget),
            keep=tuple(sorted(keep or ())),
            remove=tuple(sorted(remove or ())),
            seed=seed,
            n_trials=trials,
            timeout_s=timeout,
        )
        folder = out or Path(f"bkprune-{Path(model).stem}")
        job = _Job(
            model,
            Parts(tokenizer, text_encoder, vae, prediction_type),
            folder,
            settings,
            cost,
            data,
            samples,
            batch_size,
            storage,
        )
        if workers < 1 or samples < 16:
            raise ValueError("--workers must be at least 1 and --samples at least 16")
        found = job.run(workers, join=join, force=force, quiet=quiet or as_json)
        if found is None:
            return
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        typer.echo(str(folder / "winner.json"), err=as_json)


class _Job:
    """One search of one model in one folder."""

    def __init__(
        self,
        model: str,
        parts: Parts,
        folder: Path,
        settings: SearchSettings,
        cost: Path | None,
        data: str | None,
        n_samples: int,
        batch_size: int,
        storage: str | None,
    ) -> None:
        from bkprune.study import Study

        self.model, self.parts, self.settings = model, parts, settings
        self.record: Study = Study(folder)
        self.cost, self.data, self.storage = cost, data, storage
        self.n_samples, self.batch_size = n_samples, batch_size

    def run(self, workers: int, *, join: bool, force: bool, quiet: bool) -> dict[str, Any] | None:
        from bkprune import search, storage, study
        from bkprune.search_view import print_budgets
        from bkprune.space import Budget, Space

        table = self._table()
        s = self.settings
        space = Space(table, s.grain, keep=s.keep, remove=s.remove)
        budgets = [Budget.parse(text, space.teacher) for text in s.budgets]
        satisfiable = space.check(budgets)
        if not quiet:
            print_budgets(satisfiable)
        scores = self._scores(space)
        journal = self.record.path(study.JOURNAL)
        if force and self.storage is None:
            storage.start_afresh(journal)
        opened = storage.open_storage(self.storage, journal)
        name = f"bkprune-{self.record.folder.resolve().name}"
        made = search.Search(space, scores, budgets, s, opened, name)
        if s.objective == "additive":
            return self._finish(made, space, None, quiet=quiet)
        helpers = self._helpers(workers - 1)
        qualities = self._qualities()
        try:
            with progress_bar(quiet) as progress:
                made.run(qualities[0], progress)
        finally:
            for helper in helpers:
                helper.wait()
        if join:
            return None
        return self._finish(made, space, qualities, quiet=quiet)

    def _helpers(self, n: int) -> list[subprocess.Popen[bytes]]:
        """The same command again, once for each further worker."""
        words = [sys.executable, "-m", "bkprune.cli", *_for_a_helper(sys.argv[1:])]
        return [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(n)]

    def _table(self) -> CostTable:
        from bkprune import study
        from bkprune.cost import read
        from bkprune.profiling import Profile, ProfileSettings
        from bkprune.skeleton import skeleton

        given = self._shapes()
        counted = Profile(skeleton(self.model, self.parts), ProfileSettings(**given)).table
        path = self.cost or self.record.path(study.COST)
        if self.cost is None and not path.exists():
            return counted
        return read(path, counted)

    def _shapes(self) -> dict[str, Any]:
        """What the study's cost table was made for, where `profile` has said so."""
        from bkprune import study

        beside = (self.cost.parent if self.cost else self.record.folder) / study.MACHINE
        if not beside.exists():
            return {}
        try:
            settings = json.loads(beside.read_text(encoding="utf-8"))["profile"]
            names = ("batch_size", "height", "width", "n_tokens", "guidance")
            return {name: settings[name] for name in names}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{beside}: not what `bkprune profile` writes ({error})") from error

    def _scores(self, space: Space) -> dict[str, float]:
        """Importance of every free unit, by the criterion `output`."""
        from bkprune import study

        table = self.record.load_table(study.IMPORTANCE)
        wanted = {"unit", "criterion", "timestep_bin", "score"}
        path = self.record.path(study.IMPORTANCE)
        if not wanted <= set(table.columns):
            raise ValueError(f"{path}: columns {', '.join(sorted(wanted))} are expected")
        is_total = table["timestep_bin"].astype(str) == "all"
        chosen = table[is_total & (table["criterion"] == "output")]
        scores = dict(zip(chosen["unit"].astype(str), chosen["score"].astype(float), strict=True))
        missing = [unit for unit in space.names if not math.isfinite(scores.get(unit, math.nan))]
        if missing:
            raise ValueError(
                f"{path} has no `output` score of {missing[0]}: run `bkprune analyze "
                f"{self.model} --grain {space.grain} --out {self.record.folder}` first"
            )
        return {unit: scores[unit] for unit in space.names}

    def _qualities(self) -> list[Quality]:
        """Three disjoint draws: to search on, to choose the winner on, to report it on."""
        from bkprune.calibration import calibrate
        from bkprune.measured import OutputError
        from bkprune.models import load
        from bkprune.sampling import SamplingSettings

        pipeline = load(self.model, self.parts)
        source, _ = calibration_source(self.model, self.data)
        n_bins = 8
        n = -(-self.n_samples // n_bins) * n_bins
        drawn = calibrate(
            pipeline,
            source,
            n=n + 2 * N_JUDGED,
            n_bins=n_bins,
            seed=self.settings.seed,
            batch_size=self.batch_size,
            sampling=SamplingSettings(batch_size=self.batch_size),
        )
        cuts = (slice(0, n), slice(n, n + N_JUDGED), slice(n + N_JUDGED, None))
        return [OutputError(pipeline, drawn[cut], self.batch_size) for cut in cuts]

    def _finish(
        self, made: Search, space: Space, qualities: list[Quality] | None, *, quiet: bool
    ) -> dict[str, Any]:
        from bkprune import plots_search, study
        from bkprune.drawing import png
        from bkprune.search import judge
        from bkprune.search_view import print_finalists

        inputs = {"units": study.digest(space.names), "cost": study.digest(space.teacher)}
        stamp = study.Stamp.of({**self.settings.stamped, "samples": self.n_samples}, inputs)
        if qualities is None:
            table = made.additive()
        else:
            candidates = made.candidates()
            if not candidates["feasible"].any():
                raise ValueError("no feasible mask was measured yet: give more --trials or time")
            with progress_bar(quiet) as progress:
                table = judge(made.finalists(N_FINALISTS), qualities[1], qualities[2], progress)
            self.record.save_table(study.CANDIDATES, candidates, stamp)
            metric = made.budgets[0].metric
            for name, figure in plots_search.search_figures(
                candidates,
                {unit: sorted(blocks) for unit, blocks in space.units.items()},
                metric,
                float(getattr(space.teacher, metric)),
                made.budgets[0].limit,
                str(table["removed"].iloc[0]),
            ):
                self.record.save_bytes(f"{study.FIGURES}/{name}", png(figure), stamp)
        self.record.save_table(study.FINALISTS, table, stamp)
        winner = _winner(made, space, table)
        self.record.save_bytes(study.WINNER, (json.dumps(winner, indent=1) + "\n").encode(), stamp)
        if not quiet:
            print_finalists(table, space)
        return winner


def _winner(made: Search, space: Space, table: pd.DataFrame) -> dict[str, Any]:
    import bkprune
    from bkprune.masks import mask_record

    best = json.loads(table.iloc[[0]].to_json(orient="records"))[0]
    removed = best.pop("removed").split()
    cost = space.table.cost_of(removed)
    return {
        **mask_record(removed, space.inventory),
        "budgets": {
            b.text: {"limit": b.limit, "cost": getattr(cost, b.metric)} for b in made.budgets
        },
        "share_of_teacher": cost.relative_to(space.teacher),
        "why": "least output error over samples that the search has not seen"
        if "held_out" in best
        else "least summed importance, proven optimal by integer programming",
        "figures": best,
        "bkprune": bkprune.__version__,
    }


def _for_a_helper(words: list[str]) -> list[str]:
    """The same command for one more process, which only measures."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--workers", "--force"):
            skip = word == "--workers"
        elif not word.startswith("--workers="):
            kept.append(word)
    return [*kept, "--join", "--quiet"]
