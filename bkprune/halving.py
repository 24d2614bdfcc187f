"""Successive halving: all start, and at each rung the better half goes on (Jamieson, Talwalkar
1502.07943), as an Optuna study whose pruner it is.

Knows rungs, who goes on, and how a race that was killed is taken up again. It does not know what is
trained: `advance` brings entrants to a step and says what each loses there. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

ENTRANT = "entrant"
Advance = Callable[[Sequence[str], int], Mapping[str, float]]


@dataclass(frozen=True)
class Rung:
    """At `step` the best `n_left` go on."""

    step: int
    n_left: int


def rungs(n: int, steps: int) -> list[Rung]:
    """Halve `n` entrants until two are left for the last rung, at twice the steps each time.

    All of them run `steps / 2^(k - 1)` steps for `k` rungs, the last two run `steps`.
    """
    k = max(1, math.ceil(math.log2(max(n, 2))))
    out = []
    for i in range(k):
        n = max(1, math.ceil(n / 2))
        step = max(1, round(steps / 2 ** (k - 1 - i)))
        out.append(Rung(step, n if i < k - 1 else 1))
    return out


def entrant_steps(n: int, ladder: Sequence[Rung]) -> int:
    """Steps of training that a race takes in all."""
    total, before = 0, 0
    for rung in ladder:
        total += n * (rung.step - before)
        n, before = min(n, rung.n_left), rung.step
    return total


class Halving(BasePruner):  # type: ignore[misc]
    """Ends a trial that is not among the best of all that have reached its rung."""

    def __init__(self, ladder: Sequence[Rung]) -> None:
        self._left = {rung.step: rung.n_left for rung in ladder[:-1]}

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is out, by what was reported for its last step."""
        step = trial.last_step
        if step is None or step not in self._left:
            return False
        reached = [t for t in study.get_trials(deepcopy=False) if step in t.intermediate_values]
        reached.sort(key=lambda t: (t.intermediate_values[step], t.number))
        return trial.number not in {t.number for t in reached[: self._left[step]]}


def race(
    entrants: Sequence[str],
    ladder: Sequence[Rung],
    advance: Advance,
    storage: BaseStorage,
    name: str,
) -> pd.DataFrame:
    """Run a race to its end, from where it stands in the storage.

    Args:
        entrants: their names; equal losses are decided by this order.
        ladder: the rungs.
        advance: trains the named entrants on to a step and returns what each loses there; nothing
            is asked twice for the same step.
        storage: of Optuna.
        name: of the Optuna study; another race must have another name.

    Returns:
        One row an entrant, the winner first: `entrant`, `kd_steps` that it has run, `distilled`,
        its loss there, and `at N` for each rung it has reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = Halving(ladder)
    study = optuna.create_study(
        storage=storage, study_name=name, pruner=pruner, load_if_exists=True, direction="minimize"
    )
    known = {t.user_attrs.get(ENTRANT) for t in study.get_trials(deepcopy=False)}
    choice = CategoricalDistribution(list(entrants))
    for entrant in entrants:
        if entrant not in known:
            study.enqueue_trial({ENTRANT: entrant}, user_attrs={ENTRANT: entrant})
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask({ENTRANT: choice})
    for rung in ladder:
        live = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        late = [t for t in live if rung.step not in t.intermediate_values]
        found = advance([t.user_attrs[ENTRANT] for t in late], rung.step) if late else {}
        for trial in late:
            value = found[trial.user_attrs[ENTRANT]]
            Trial(study, trial._trial_id).report(
                value if math.isfinite(value) else math.inf, rung.step
            )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if Trial(study, trial._trial_id).should_prune():
                study.tell(trial.number, state=TrialState.PRUNED)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, trial.intermediate_values[ladder[-1].step])
    return _table(study)


def _table(study: Study) -> pd.DataFrame:
    rows = []
    for trial in study.get_trials(deepcopy=False):
        reached = trial.intermediate_values
        last = max(reached)
        rows.append(
            {
                "entrant": trial.user_attrs[ENTRANT],
                "kd_steps": last,
                "distilled": reached[last],
                **{f"at {step}": reached[step] for step in sorted(reached)},
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(
        ["kd_steps", "distilled"], ascending=[False, True], kind="stable", ignore_index=True
    )
