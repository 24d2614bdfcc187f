"""The search itself: one Optuna study of masks under budgets, and what comes out of it.

Knows Optuna (one categorical parameter a unit, budgets as constraints, a journal that survives
kills), in which order proposals are tried, and how the winner is chosen. It gets `quality(mask)`
from outside and needs no torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from bkprune.blocks import Grain
from bkprune.judging import Progress, Quality, on_front
from bkprune.presets import PRESETS, preset
from bkprune.program import least_score
from bkprune.proposals import greedy, propose, random_feasible, ranked, roomy
from bkprune.space import Array, Bits, Budget, InfeasibleError, Space
from bkprune.storage import is_dead, worker

UNITS, WORKER, SOURCE, STDERR = "units", "worker", "source", "stderr"
OBJECTIVES = ("measured", "distilled", "additive")
N_RANDOM_BASELINES, TPE_EVERY, N_STARTUP, N_LEVELS = 5, 8, 12, 8


@dataclass(frozen=True)
class SearchSettings:
    """What is searched; everything here but the limits enters the record's stamp.

    `front` names a metric: two objectives, loss and that cost, under the budgets.
    """

    grain: Grain = "block"
    objective: str = "measured"
    front: str | None = None
    budgets: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    seed: int = 1234
    n_trials: int = 200
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r}: choose from {', '.join(OBJECTIVES)}")
        if self.objective == "distilled" and self.front is not None:
            raise ValueError("--front shows a whole trade-off: it goes with measured or additive")
        if self.n_trials < 1 or (self.timeout_s is not None and self.timeout_s <= 0):
            raise ValueError("at least one trial and a time limit above 0 s are needed")

    @property
    def stamped(self) -> dict[str, Any]:
        """The settings that say what a trial means: for `distilled` it is measured, too."""
        told = {k: v for k, v in asdict(self).items() if k not in ("n_trials", "timeout_s")}
        is_measured = self.objective == "distilled"
        return {**told, "objective": "measured"} if is_measured else told


class Search:
    """A study of masks that any number of workers may share.

    Raises:
        ValueError: the study was made with other units or budgets.
    """

    def __init__(
        self,
        space: Space,
        scores: Mapping[str, float],
        budgets: Sequence[Budget],
        settings: SearchSettings,
        storage: BaseStorage,
        name: str = "bkprune",
    ) -> None:
        self.space = space
        self.budgets = list(budgets)
        self.settings = settings
        self.scores: Array = np.array([scores[unit] for unit in space.names])
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._parameters: dict[str, BaseDistribution] = {
            unit: CategoricalDistribution([False, True]) for unit in space.names
        }
        self.levels = [self.budgets]
        if settings.front is not None:
            self.levels = _levels(space, settings.front, self.budgets)
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=TPESampler(seed=settings.seed),
            load_if_exists=True,
            directions=["minimize"] * (2 if settings.front else 1),
        )
        self._same_study()

    def _same_study(self) -> None:
        made = {
            UNITS: self.space.names,
            "pinned": sorted(self.space.removed),
            "budgets": [[b.text, b.limit] for b in self.budgets],
            "settings": self.settings.stamped,
            "scores": [float(f"{s:.6g}") for s in self.scores],
        }
        made = json.loads(json.dumps(made))
        known = self.study.user_attrs
        for key, value in made.items():
            if key not in known:
                self.study.set_user_attr(key, value)
            elif known[key] != value:
                theirs, ours = known[key], value
                if key == UNITS:
                    theirs, ours = f"{len(theirs)} units", f"{len(ours)} units"
                raise ValueError(
                    f"the study was made with other {key}: {theirs} there, {ours} now; "
                    "use another --out, or --force to start afresh"
                )

    # --- running -----------------------------------------------------------------------------

    def run(self, quality: Quality, progress: Progress = lambda d, t, w: None) -> None:
        """Propose and measure until enough masks are measured, or time is up.

        A mask is never measured twice. Trials that a killed worker has left running are failed and
        queued again.
        """
        self._reclaim()
        started = time.monotonic()
        while True:
            done = self.measured()
            best = self.best()
            text = f"best {loss(best):.4g}" if best is not None else "searching"
            if self.settings.front:
                text = "searching along the front"
            progress(min(len(done), self.settings.n_trials), self.settings.n_trials, text)
            if len(done) >= self.settings.n_trials:
                return
            limit = self.settings.timeout_s
            if limit is not None and time.monotonic() - started > limit:
                return
            proposal = self._next(done)
            if proposal is None:
                return  # every feasible mask is measured
            self._measure(proposal, quality)

    def measured(self) -> list[FrozenTrial]:
        """Completed trials, in order."""
        found: list[FrozenTrial] = self.study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE,)
        )
        return found

    def best(self) -> FrozenTrial | None:
        """The feasible trial with the least loss, the earliest of equals."""
        trials = [t for t in self.measured() if is_feasible(t)]
        return min(trials, key=lambda t: (loss(t), t.number), default=None)

    def _taken(self) -> set[bytes]:
        """Choices that are measured, being measured, or have failed for good."""
        states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL)
        found = set()
        for trial in self.study.get_trials(deepcopy=False, states=states):
            chosen = self._chosen(trial)
            is_lost = trial.state == TrialState.FAIL and "why" not in trial.user_attrs
            if chosen is not None and not is_lost:
                found.add(chosen.tobytes())
        return found

    def _chosen(self, trial: FrozenTrial) -> Bits | None:
        """What a trial measures; what was queued is known before its parameters are written."""
        params = trial.system_attrs.get("fixed_params") or trial.params
        return self._bits(params) if len(params) == len(self.space) else None

    def _bits(self, params: Mapping[str, Any]) -> Bits:
        return np.array([bool(params[unit]) for unit in self.space.names])

    def _next(self, done: Sequence[FrozenTrial]) -> Trial | None:
        taken = self._taken()
        for bits, source in self.seeds():
            if bits.tobytes() not in taken:
                return self._ask(bits, source)
        n = len(done)
        random = np.random.default_rng([self.settings.seed, n])
        if n % TPE_EVERY == TPE_EVERY - 1 and n >= N_STARTUP:
            suggested = self.study.ask(self._parameters)
            bits = self._bits(suggested.params)
            self.study.tell(suggested, state=TrialState.FAIL)
            if SOURCE in suggested.user_attrs:  # another worker's, just queued: back with it
                self.study.enqueue_trial(suggested.params, user_attrs=suggested.user_attrs)
            elif bits.tobytes() not in taken and self.space.feasible(bits[None], self.budgets)[0]:
                return self._ask(bits, "tpe")
        seen = np.array([self._bits(t.params) for t in done])
        losses = np.array([loss(t) for t in done], dtype=float)
        known = {row.tobytes() for row in seen}
        also = [np.frombuffer(key, dtype=bool) for key in sorted(taken - known)]
        if also:  # failed, or measured elsewhere: taken for middling, so that none comes again
            seen = np.concatenate([seen, np.array(also)])
            losses = np.concatenate([losses, np.full(len(also), float(np.median(losses)))])
        for i in range(len(self.levels)):  # the next level in turn that has something left
            budgets = self.levels[(n + i) % len(self.levels)]
            proposal = propose(self.space, self.scores, budgets, seen, losses, random)
            if proposal is not None:
                return self._ask(*proposal)
        return None

    def _ask(self, bits: Bits, source: str) -> Trial:
        """A trial from the queue, into which this choice goes: perhaps another worker's.

        A queued trial has its worker from the first, so that no kill leaves one without.
        """
        params = {unit: bool(bit) for unit, bit in zip(self.space.names, bits, strict=True)}
        self.study.enqueue_trial(params, user_attrs={SOURCE: source, WORKER: worker()})
        return self.study.ask(self._parameters)

    def _is_doubled(self, trial: Trial) -> bool:
        """Whether the same choice is measured, or another worker has it and had it first."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        own = self._bits(trial.params)
        return any(
            np.array_equal(own, chosen)
            and (other.state == TrialState.COMPLETE or other.number < trial.number)
            for other in self.study.get_trials(deepcopy=False, states=states)
            if other.number != trial.number and (chosen := self._chosen(other)) is not None
        )

    def seeds(self) -> list[tuple[Bits, str]]:
        """What people do today, first of all: exact knapsack, greedy, presets, random feasible."""
        found: list[tuple[Bits | None, str]] = []
        for budgets in self.levels:
            found.append((least_score(self.space, self.scores, budgets), "knapsack"))
            found.append((greedy(self.space, self.scores, budgets), "greedy"))
            if self.settings.objective == "distilled":
                found += [(bits, "roomy") for bits in roomy(self.space, self.scores, budgets)]
        for name in PRESETS:
            try:
                found.append((self.space.bits(preset(name, self.space.inventory)), name))
            except ValueError:
                continue
        random = np.random.default_rng(self.settings.seed)
        drawn = random_feasible(self.space, self.levels[-1], random, N_RANDOM_BASELINES)
        found += [(bits, f"random {i}") for i, bits in enumerate(drawn)]
        distinct: dict[bytes, tuple[Bits, str]] = {}
        for bits, source in found:
            if bits is not None and self.space.feasible(bits[None], self.budgets)[0]:
                same = distinct.get(bits.tobytes())
                both = same is not None and source not in same[1].split(" + ")
                name = f"{same[1]} + {source}" if same and both else same[1] if same else source
                distinct[bits.tobytes()] = (bits, name)
        return list(distinct.values())

    def _measure(self, trial: Trial, quality: Quality) -> None:
        chosen = self._bits(trial.params)
        trial.set_user_attr(WORKER, worker())
        if self._is_doubled(trial):
            self.study.tell(trial, state=TrialState.FAIL)
            return
        broken = self.space.violations(chosen[None], self.budgets)[0]
        for budget, violation in zip(self.budgets, broken, strict=True):
            trial.set_constraint(budget.text, 0.0 if violation <= 1e-12 else float(violation))
        trial.set_user_attr("feasible", bool((broken <= 1e-12).all()))
        value, stderr = quality(self.space.mask(chosen))
        if self._is_doubled(trial):
            self.study.tell(trial, state=TrialState.FAIL)
            return
        if not math.isfinite(value):
            trial.set_user_attr("why", "the output is not finite")
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(STDERR, stderr)
        values = [value]
        if self.settings.front:
            values.append(float(getattr(self.space.cost(chosen), self.settings.front)))
        self.study.tell(trial, values)

    def _reclaim(self) -> None:
        """Trials of workers that are dead: failed, and queued again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_dead(trial.user_attrs.get(WORKER), trial.datetime_start):
                self.study.tell(trial.number, state=TrialState.FAIL)
                if len(trial.params) == len(self.space):
                    source = trial.user_attrs.get(SOURCE, "again")
                    attrs = {SOURCE: source, WORKER: worker()}
                    self.study.enqueue_trial(trial.params, user_attrs=attrs)

    # --- what came out -----------------------------------------------------------------------

    def candidates(self) -> pd.DataFrame:
        """Every distinct measured mask with its costs, the best feasible first."""
        rows = []
        for trial in self.measured():
            bits = self._bits(trial.params)
            mask, cost = self.space.mask(bits), self.space.cost(bits)
            rows.append(
                {
                    "removed": " ".join(sorted(mask, key=self.space.inventory.names.index)),
                    "n_removed": len(mask),
                    "additive": float(bits @ self.scores),
                    "measured": loss(trial),
                    "stderr": trial.user_attrs.get(STDERR),
                    **asdict(cost),
                    "feasible": is_feasible(trial),
                    "source": trial.user_attrs.get(SOURCE, "queued"),
                    "trial": trial.number,
                }
            )
        table = pd.DataFrame(rows).drop_duplicates("removed")
        table = table.sort_values(
            ["feasible", "measured"], ascending=[False, True], kind="stable", ignore_index=True
        )
        costs = table[self.metric].to_numpy()
        table["on_front"] = on_front(table["measured"].to_numpy(), costs)
        return table

    @property
    def metric(self) -> str:
        """The cost that quality is shown against."""
        return self.settings.front or (self.budgets[0].metric if self.budgets else "macs")

    def additive(self) -> pd.DataFrame:
        """Masks ranked by summed importance, the exact optimum first, without measuring anything.

        As many as there are trials, and the baselines.

        Raises:
            InfeasibleError: no mask keeps every budget at once.
        """
        sources = {bits.tobytes(): source for bits, source in self.seeds()}
        many, scores = ranked(self.space, self.scores, self.budgets, self.settings.n_trials)
        own = [np.frombuffer(key, dtype=bool) for key in sources]
        known = {bits.tobytes() for bits in many}
        rows = []
        for bits, score in [
            *zip(many, scores, strict=True),
            *((b, float(b @ self.scores)) for b in own if b.tobytes() not in known),
        ]:
            mask = self.space.mask(bits)
            rows.append(
                {
                    "removed": " ".join(sorted(mask, key=self.space.inventory.names.index)),
                    "n_removed": len(mask),
                    "additive": score,
                    **asdict(self.space.cost(bits)),
                    "feasible": True,
                    "source": sources.get(bits.tobytes(), "ranked"),
                }
            )
        if not rows:
            raise InfeasibleError("no mask keeps every budget at once: loosen one of them")
        table = pd.DataFrame(rows).drop_duplicates("removed")
        return table.sort_values("additive", kind="stable", ignore_index=True)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps every budget."""
    return bool(trial.user_attrs.get("feasible", False))


def loss(trial: FrozenTrial) -> float:
    """What a completed trial's mask loses."""
    return float(trial.values[0])


def _levels(space: Space, metric: str, budgets: Sequence[Budget]) -> list[list[Budget]]:
    """The budgets, each time with one more limit on the metric, from the least to the loosest."""
    if getattr(space.teacher, metric) is None:
        raise ValueError("--front latency: the cost table has no latency; run `bkprune profile`")
    whole = float(getattr(space.teacher, metric))
    loosest = min([0.95 * whole, *(b.limit for b in budgets if b.metric == metric)])
    limits = np.linspace(min(1.05 * space.cheapest(metric), loosest), loosest, N_LEVELS)
    return [[*budgets, Budget(f"{metric}<={v / whole:.3f}x", metric, float(v))] for v in limits]
