"""One search of one model in one study folder, from its tables to winner.json.

Knows which records a search reads and writes, how samples are drawn and cut in three, and how
further workers are started. Options are `cli_search.py`'s; how masks are found is `search.py`'s.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkprune.cli_analyze import calibration_source, training_data
from bkprune.race_job import RaceSettings, judge_of, run_race
from bkprune.terminal import progress_bar

if TYPE_CHECKING:
    import pandas as pd

    from bkprune.cost import CostTable
    from bkprune.judging import Quality
    from bkprune.models import Parts
    from bkprune.search import Search, SearchSettings
    from bkprune.space import Space
    from bkprune.study import Study

N_FINALISTS, N_BINS, N_PROMPTS, STEPS = 8, 8, 16, 25
PICTURES = ("latent", "clip")


@dataclass(frozen=True)
class Inputs:
    """Where a search takes things from, and how it measures."""

    cost: Path | None = None
    data: str | None = None
    n_samples: int = 96
    n_judged: int = 256
    batch_size: int = 16
    storage: str | None = None
    pictures: tuple[str, ...] = ()
    clip: Path | None = None
    race: RaceSettings = field(default_factory=RaceSettings)

    def __post_init__(self) -> None:
        if min(self.n_samples, self.n_judged) < 2 * N_BINS:
            raise ValueError(f"--samples and --judged must be at least {2 * N_BINS}")
        unknown = [name for name in self.pictures if name not in PICTURES]
        if unknown:
            raise ValueError(f"--finalists-by {unknown[0]!r}: choose from {', '.join(PICTURES)}")


class Job:
    """One search of one model in one folder."""

    def __init__(
        self, model: str, parts: Parts, folder: Path, settings: SearchSettings, inputs: Inputs
    ) -> None:
        from bkprune.study import Study

        self.model, self.parts, self.settings, self.inputs = model, parts, settings, inputs
        self.record: Study = Study(folder)

    def run(self, workers: int, *, join: bool, force: bool, quiet: bool) -> dict[str, Any] | None:
        """Search, judge the finalists, write the records; with `join` only measure.

        Returns:
            What winner.json holds, or the front where there is no budget; None with `join`.
        """
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
        if force and self.inputs.storage is None:
            storage.start_afresh(journal)
        self.storage = storage.open_storage(self.inputs.storage, journal)
        self.name = f"bkprune-{self.record.folder.resolve().name}"
        made = search.Search(space, scores, budgets, s, self.storage, self.name)
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
        words = [sys.executable, "-m", "bkprune.cli", *for_a_helper(sys.argv[1:])]
        return [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(n)]

    def _table(self) -> CostTable:
        from bkprune import study
        from bkprune.cost import read
        from bkprune.profiling import Profile, ProfileSettings
        from bkprune.skeleton import skeleton

        given = self._shapes()
        counted = Profile(skeleton(self.model, self.parts), ProfileSettings(**given)).table
        path = self.inputs.cost or self.record.path(study.COST)
        if self.inputs.cost is None and not path.exists():
            return counted
        return read(path, counted)

    def _shapes(self) -> dict[str, Any]:
        """What the study's cost table was made for, where `profile` has said so."""
        from bkprune import study

        beside = (
            self.inputs.cost.parent if self.inputs.cost else self.record.folder
        ) / study.MACHINE
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

        self.pipeline = pipeline = load(self.model, self.parts)
        source, _ = calibration_source(self.model, self.inputs.data)
        n, judged = (
            -(-asked // N_BINS) * N_BINS for asked in (self.inputs.n_samples, self.inputs.n_judged)
        )
        drawn = calibrate(
            pipeline,
            source,
            n=n + 2 * judged,
            n_bins=N_BINS,
            seed=self.settings.seed,
            batch_size=self.inputs.batch_size,
            sampling=SamplingSettings(batch_size=self.inputs.batch_size),
        )
        cuts = (slice(0, n), slice(n, n + judged), slice(n + judged, None))
        self.judged = (drawn[n:], judged)
        return [OutputError(pipeline, drawn[cut], self.inputs.batch_size) for cut in cuts]

    def _finish(
        self, made: Search, space: Space, qualities: list[Quality] | None, *, quiet: bool
    ) -> dict[str, Any]:
        from bkprune import study
        from bkprune.search_view import print_finalists
        from bkprune.space import InfeasibleError

        asked = {
            "samples": self.inputs.n_samples,
            "judged": self.inputs.n_judged,
            "pictures": self.inputs.pictures,
        }
        if self.settings.objective == "distilled":
            asked |= {"objective": "distilled", **asdict(self.inputs.race)}
        inputs = {"units": study.digest(space.names), "cost": study.digest(space.teacher)}
        stamp = study.Stamp.of({**self.settings.stamped, **asked}, inputs)
        if qualities is None:
            candidates = made.additive()
            own = candidates["source"] != "ranked"
            table = candidates[own | (candidates.index < N_FINALISTS)].reset_index(drop=True)
        else:
            candidates = made.candidates()
            if not candidates["feasible"].any():
                raise InfeasibleError(
                    "no feasible mask was measured yet: give more --trials or time, or looser "
                    "budgets"
                )
            table = self._judged(made, qualities, quiet=quiet)
        self.record.save_table(study.CANDIDATES, candidates, stamp)
        self.record.save_table(study.FINALISTS, table, stamp)
        if qualities is not None:
            self._draw(made, space, candidates, table, stamp)
        if not quiet:
            print_finalists(table, space)
        if not made.budgets:
            return {"front": json.loads(table.to_json(orient="records"))}
        winner = _winner(made, space, table)
        self.record.save_bytes(study.WINNER, (json.dumps(winner, indent=1) + "\n").encode(), stamp)
        return winner

    def _judged(self, made: Search, qualities: list[Quality], *, quiet: bool) -> pd.DataFrame:
        from bkprune.judging import judge

        with progress_bar(quiet) as progress:
            table = judge(self._chosen(made), qualities[1], qualities[2], progress)
            if self.inputs.pictures:
                table = self._by_pictures(table, progress)
        if made.settings.objective == "distilled":
            return self._raced(table, quiet=quiet)
        if made.settings.front:
            table = table.sort_values(made.metric, kind="stable", ignore_index=True)
        return table

    def _chosen(self, made: Search) -> pd.DataFrame:
        from bkprune.judging import entrants, finalists

        if made.settings.objective == "distilled":
            return entrants(made.candidates(), self.inputs.race.finalists)
        return finalists(made.candidates(), N_FINALISTS, made.settings.front)

    def _raced(self, table: pd.DataFrame, *, quiet: bool) -> pd.DataFrame:
        """Ranked anew by what is left to lose after a short distillation."""
        asked, given = self.inputs.race, self.inputs
        judge = judge_of(
            self.pipeline,
            asked,
            self.judged,
            self._prompts(),
            given.clip,
            given.batch_size,
            self.settings.seed,
        )
        ranked = run_race(
            self.pipeline,
            [frozenset(str(removed).split()) for removed in table["removed"]],
            judge,
            asked,
            training_data(self.model, asked.data, None),
            self.settings.seed,
            self.record.folder,
            (self.storage, self.name),
            quiet=quiet,
        )
        order = ["kd_steps", "distilled"]
        return table.join(ranked).sort_values(
            order, ascending=[False, True], kind="stable", ignore_index=True
        )

    def _prompts(self) -> list[str] | None:
        """Of the calibration data; None where that is noise."""
        source, _ = calibration_source(self.model, self.inputs.data)
        return source if isinstance(source, list) else source.captions if source else None

    def _by_pictures(self, table: pd.DataFrame, progress: Any) -> pd.DataFrame:
        """More columns: what whole sampling runs say of the finalists."""
        from bkprune.calibration import pick
        from bkprune.clip import ClipScore
        from bkprune.measured import PictureLoss
        from bkprune.sampling import SamplingSettings

        prompts = self._prompts()
        if prompts is None:
            raise ValueError("--finalists-by draws pictures: it needs prompts, not noise")
        seed = self.settings.seed
        chosen = [prompts[i] for i in pick(len(prompts), N_PROMPTS, seed)]
        clip = ClipScore.load(self.inputs.clip) if "clip" in self.inputs.pictures else None
        settings = SamplingSettings(STEPS, seed=seed, batch_size=self.inputs.batch_size)
        measured = PictureLoss(self.pipeline, chosen, settings, clip)
        for i, removed in enumerate(table["removed"]):
            progress(i, len(table), "drawing pictures")
            found = measured(frozenset(str(removed).split()))
            for name in self.inputs.pictures:
                table.loc[i, [name, f"{name}_stderr"]] = found[name]
        progress(len(table), len(table), "drawing pictures")
        return table

    def _draw(
        self,
        made: Search,
        space: Space,
        candidates: pd.DataFrame,
        table: pd.DataFrame,
        stamp: Any,
    ) -> None:
        from bkprune import plots_search, study
        from bkprune.drawing import png

        limits = [b.limit for b in made.budgets if b.metric == made.metric]
        for name, figure in plots_search.search_figures(
            candidates,
            {unit: sorted(blocks) for unit, blocks in space.units.items()},
            made.metric,
            float(getattr(space.teacher, made.metric)),
            min(limits, default=None),
            str(table["removed"].iloc[0]) if made.budgets else "",
        ):
            self.record.save_bytes(f"{study.FIGURES}/{name}", png(figure), stamp)


def _winner(made: Search, space: Space, table: pd.DataFrame) -> dict[str, Any]:
    import bkprune
    from bkprune.masks import mask_record

    has_run = "distilled" in table
    first = 0 if has_run or "chosen" not in table else int(table["chosen"].argmin())
    best = json.loads(table.iloc[[first]].to_json(orient="records"))[0]
    removed = best.pop("removed").split()
    cost = space.table.cost_of(removed)
    return {
        **mask_record(removed, space.inventory),
        "budgets": {
            b.text: {"limit": b.limit, "cost": getattr(cost, b.metric)} for b in made.budgets
        },
        "share_of_teacher": cost.relative_to(space.teacher),
        "why": _why(best),
        "figures": best,
        "bkprune": bkprune.__version__,
    }


def _why(figures: dict[str, Any]) -> str:
    if "distilled" in figures:
        after = f"after {figures['kd_steps']} steps of distillation"
        if figures["kd_judge"] == "pictures":
            return f"pictures nearest to the teacher's of the same prompts and seeds, {after}"
        return (
            f"least output error {after}, over samples that were neither searched on nor learned "
            "from"
        )
    if "held_out" in figures:
        return "least output error over samples that the search has not seen"
    return "least summed importance, proven optimal by integer programming"


def for_a_helper(words: list[str]) -> list[str]:
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
