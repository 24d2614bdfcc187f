"""Budgets, exact programs, and a search that finds what brute force finds and survives kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from bkprune.blocks import Inventory, Mask
from bkprune.cost import CostTable
from bkprune.judging import Quality, on_front
from bkprune.presets import preset
from bkprune.profiling import Profile, ProfileSettings
from bkprune.program import least_score
from bkprune.proposals import Surrogate, greedy, neighbours, random_feasible, ranked
from bkprune.search import N_STARTUP, TPE_EVERY, Search, SearchSettings
from bkprune.search_job import for_a_helper
from bkprune.skeleton import Skeleton
from bkprune.space import Bits, Budget, Space
from bkprune.storage import is_dead, open_storage, worker
from tests.conftest import SMALL, build
from tests.test_cli import refused, run


@pytest.fixture(scope="module")
def table() -> CostTable:
    counted = Profile(Skeleton("small", build(SMALL).to("meta")), ProfileSettings()).table
    rows = counted.rows.copy()
    rows["latency_ms"] = 0.1 + rows["macs"].astype(float) / 1e7
    rows.loc[rows["shortcut_params"].notna(), "shortcut_latency_ms"] = 0.05
    return CostTable(rows, counted.inventory)


@pytest.fixture(scope="module")
def twelve(table: CostTable) -> Space:
    """Twelve free units: one inner level that can die, and blocks of two outer ones."""
    free = [
        "down_blocks.3.*",
        "mid_block.*",
        "up_blocks.0.*",
        "up_blocks.1.attentions.0",
        "up_blocks.3.resnets.1",
        "up_blocks.3.attentions.1",
        "down_blocks.1.resnets.0",
    ]
    chosen = table.inventory.expand(free)
    return Space(table, "block", keep=[n for n in table.inventory.names if n not in chosen])


def _every(space: Space) -> Bits:
    return np.array(list(product([False, True], repeat=len(space))))


def _budgets(space: Space, *texts: str) -> list[Budget]:
    return [Budget.parse(text, space.teacher) for text in texts]


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("latency<=0.5x", "latency_ms", 50.0),
        ("latency <= 40ms", "latency_ms", 40.0),
        ("latency_ms<=0.04s", "latency_ms", 40.0),
        ("params<=500M", "params", 5e8),
        ("params<=60%", "params", 6e8),
        ("macs<=1.5T", "macs", 1.5e12),
        ("macs_paper<=220G", "macs_paper", 2.2e11),
        ("memory<=3GB", "memory_mb", 3000.0),
        ("weights<=500MB", "weight_bytes", 5e8),
    ],
)
def test_budgets_are_read(text: str, metric: str, limit: float) -> None:
    from bkprune.cost import Cost

    teacher = Cost(10**9, 3 * 10**11, 4 * 10**11, 4 * 10**9, 4500.0, 100.0)
    budget = Budget.parse(text, teacher)
    assert budget.metric == metric
    assert budget.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency<0.5x", "expected METRIC<=VALUE"),
        ("speed<=2x", "unknown metric 'speed'; choose one of latency"),
        ("params<=5ms", "unknown unit 'ms'; choose one of x, %, k, m"),
        ("macs<=1.2.3G", "'1.2.3' is not a number"),
        ("latency<=5ms", "the cost table has no latency"),
    ],
)
def test_budgets_that_make_no_sense(text: str, words: str) -> None:
    from bkprune.cost import Cost

    with pytest.raises(ValueError, match=words):
        Budget.parse(text, Cost(1, 1, 1, 1, 1.0, None))


def test_costs_of_a_space_are_those_of_the_table(twelve: Space) -> None:
    many = _every(twelve)[::37]
    for metric in ("params", "macs_paper", "macs", "weight_bytes", "latency_ms"):
        expected = [getattr(twelve.cost(bits), metric) for bits in many]
        np.testing.assert_allclose(twelve.costs(many, metric), expected, rtol=1e-12)
    assert len(twelve.dead) == 1
    assert twelve.dead[0].bonus["macs"] > 0


def test_pins(table: CostTable) -> None:
    space = Space(table, "pair", keep=["mid_block"], remove=["down_blocks.0.pairs.1"])
    assert "mid_block" not in space.names
    assert space.removed == table.inventory.units("pair")["down_blocks.0.pairs.1"]
    assert space.bits(space.removed) is not None
    assert space.bits({"mid_block"}) is None
    assert space.bits(space.removed | {"up_blocks.1.resnets.0"}) is None  # half a pair
    for options, words in (
        ({"keep": ["mid_block"], "remove": ["mid_block"]}, "mid_block is pinned by both"),
        ({"keep": ["mid_blok"]}, "--keep: unknown block 'mid_blok'.*mid_block"),
        ({"remove": ["up_blocks.1.resnets.0"]}, "only a part of a unit"),
        ({"keep": ["*"]}, "every unit is pinned"),
    ):
        with pytest.raises(ValueError, match=words):
            Space(table, "pair", **options)


def test_impossible_budgets_name_the_least(twelve: Space) -> None:
    (row,) = twelve.check(_budgets(twelve, "macs<=0.9x"))
    assert row["least"] == twelve.cost(np.ones(len(twelve), bool)).macs
    with pytest.raises(ValueError, match=r"cannot be kept; the least that can be reached is [\d,]"):
        twelve.check(_budgets(twelve, "macs<=0.01x"))


TRIPLES = [
    ("macs<=0.92x",),
    ("params<=0.75x", "latency<=0.95x"),
    ("memory<=0.7x", "macs<=0.97x"),
]


@pytest.mark.parametrize("texts", TRIPLES)
def test_the_program_is_exact(twelve: Space, texts: tuple[str, ...]) -> None:
    budgets = _budgets(twelve, *texts)
    many = _every(twelve)
    fits = many[twelve.feasible(many, budgets)]
    assert 0 < len(fits) < len(many)
    for seed in range(3):
        scores = np.random.default_rng(seed).gamma(0.5, size=len(twelve))
        found = least_score(twelve, scores, budgets)
        assert found is not None
        best = (fits @ scores).min()
        assert found @ scores == pytest.approx(best)
        second = least_score(twelve, scores, budgets, without=[found])
        assert second is not None
        assert second @ scores == pytest.approx(np.sort(fits @ scores)[1])
        path = greedy(twelve, scores, budgets)
        assert path is not None
        assert twelve.feasible(path[None], budgets)[0]
        assert path @ scores >= best * (1 - 1e-12)


def _synthetic(space: Space, seed: int) -> tuple[dict[str, float], Quality]:
    """Units that hurt alone, and pairs that hurt more together."""
    random = np.random.default_rng(seed)
    alone = random.gamma(0.5, size=len(space)) + 1e-3
    pairs = np.triu(random.gamma(0.3, size=(len(space), len(space))), 1) * 0.5

    def quality(mask: Mask) -> tuple[float, float]:
        bits = space.bits(mask)
        assert bits is not None
        x = bits.astype(float)
        return float(alone @ x + x @ pairs @ x), 0.0

    return dict(zip(space.names, alone, strict=True)), quality


@pytest.mark.parametrize("texts", TRIPLES)
def test_the_search_finds_the_optimum_of_twelve_units(
    twelve: Space, texts: tuple[str, ...]
) -> None:
    budgets = _budgets(twelve, *texts)
    scores, quality = _synthetic(twelve, 4)
    many = _every(twelve)
    fits = many[twelve.feasible(many, budgets)]
    best = min(quality(twelve.mask(bits))[0] for bits in fits)
    settings = SearchSettings(n_trials=80, budgets=texts)
    search = Search(twelve, scores, budgets, settings, optuna.storages.InMemoryStorage())
    search.run(quality)
    found = search.candidates()
    assert found["measured"].iloc[0] == pytest.approx(best)
    assert found["feasible"].all()
    assert len(found) == len(search.measured()) == min(80, len(fits))
    assert found["source"].str.contains("knapsack").sum() == 1
    assert found["source"].str.contains("greedy").sum() == 1


def test_the_surrogate_knows_what_it_has_seen_and_doubts_the_rest(twelve: Space) -> None:
    scores, quality = _synthetic(twelve, 1)
    many = _every(twelve)[1::29]
    losses = np.array([quality(twelve.mask(bits))[0] for bits in many])
    surrogate = Surrogate(np.array(list(scores.values())), many[:80], losses[:80])
    mean, spread = surrogate.predict(many[:80])
    assert np.corrcoef(mean, np.log(losses[:80]))[0, 1] > 0.99
    unseen, doubt = surrogate.predict(many[80:])
    assert np.corrcoef(unseen, np.log(losses[80:]))[0, 1] > 0.9
    assert doubt.mean() > 2 * spread.mean()


def test_moves_and_random_masks(twelve: Space) -> None:
    bits = np.zeros(12, dtype=bool)
    bits[:5] = True
    near = neighbours(bits)
    assert len(near) == 12 + 5 * 7 == len({row.tobytes() for row in near})
    assert set((near ^ bits).sum(axis=1)) == {1, 2}
    budgets = _budgets(twelve, "macs<=0.93x")
    drawn = random_feasible(twelve, budgets, np.random.default_rng(0), 10)
    assert len(drawn) == 10
    assert twelve.feasible(np.array(drawn), budgets).all()
    assert on_front(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 2.0])) == [True, True, False]


def test_masks_are_ranked_by_score_from_the_optimum_outwards(twelve: Space) -> None:
    budgets = _budgets(twelve, "macs<=0.93x")
    scores = np.random.default_rng(3).gamma(0.5, size=12)
    many = _every(twelve)
    fits = many[twelve.feasible(many, budgets)]
    expected = np.sort(fits @ scores)
    found, values = ranked(twelve, scores, budgets, len(fits))
    assert len(found) == len({b.tobytes() for b in found}) == len(fits)
    assert np.allclose(values, expected)
    assert len(ranked(twelve, scores, budgets, 20)[0]) == 20
    none = ranked(twelve, scores, _budgets(twelve, "macs<=0.8x", "params<=0.01x"), 5)
    assert len(none[0]) == 0


def test_a_front_is_searched_along_its_whole_length(twelve: Space) -> None:
    scores, quality = _synthetic(twelve, 5)
    settings = SearchSettings(n_trials=160, front="macs")
    search = Search(twelve, scores, [], settings, optuna.storages.InMemoryStorage())
    search.run(quality)
    found = search.candidates()
    many = _every(twelve)[1:]
    losses = np.array([quality(twelve.mask(bits))[0] for bits in many])
    costs = twelve.costs(many, "macs")
    macs = found["macs"].to_numpy(dtype=float)
    measured = found["measured"].to_numpy(dtype=float)
    for limit in search.levels:
        bound = limit[0].limit
        best = losses[costs <= bound].min()
        assert best <= measured[macs <= bound * (1 + 1e-9)].min() <= 1.25 * best
    assert len(search.study.directions) == 2
    assert len(search.study.best_trials) == int(found["on_front"].sum())
    with pytest.raises(ValueError, match="made with other settings"):
        Search(twelve, scores, [], SearchSettings(front="params"), search.study._storage)


def test_same_seed_same_winner_and_nan_is_no_end(twelve: Space) -> None:
    budgets = _budgets(twelve, "macs<=0.92x")
    scores, quality = _synthetic(twelve, 2)
    broken: list[Mask] = []

    def sometimes(mask: Mask) -> tuple[float, float]:
        if len(mask) % 5 == 4:
            broken.append(mask)
            return float("nan"), float("nan")
        return quality(mask)

    tables = []
    for _ in range(2):
        settings = SearchSettings(n_trials=40, budgets=("macs<=0.92x",))
        search = Search(twelve, scores, budgets, settings, optuna.storages.InMemoryStorage())
        search.run(sometimes)
        tables.append(search.candidates())
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert broken
    assert len(broken) == 2 * len(set(broken))  # none is tried twice in a study
    assert tables[0]["measured"].notna().all()


def test_a_mask_that_another_worker_has_queued_is_measured_once(twelve: Space) -> None:
    budgets = _budgets(twelve, "macs<=0.92x")
    scores, quality = _synthetic(twelve, 3)
    settings = SearchSettings(n_trials=40, budgets=("macs<=0.92x",))
    storage = optuna.storages.InMemoryStorage()
    search = Search(twelve, scores, budgets, settings, storage)
    bits, source = search.seeds()[0]
    params = {unit: bool(bit) for unit, bit in zip(twelve.names, bits, strict=True)}
    search.study.enqueue_trial(params, user_attrs={"source": source})
    theirs = search.study.get_trials(deepcopy=False)[0]
    storage.set_trial_state_values(theirs._trial_id, optuna.trial.TrialState.RUNNING)
    assert not theirs.params  # taken from the queue, and nothing of it written yet
    ours = search._ask(bits, source)
    search._measure(ours, quality)
    assert [t.state.name for t in search.study.trials] == ["RUNNING", "FAIL"]
    assert bits.tobytes() in search._taken()


def test_what_another_worker_has_queued_is_not_lost_to_tpe(twelve: Space) -> None:
    budgets = _budgets(twelve, "macs<=0.92x")
    scores, quality = _synthetic(twelve, 3)
    n_done = next(n for n in range(N_STARTUP, 99) if n % TPE_EVERY == TPE_EVERY - 1)
    settings = SearchSettings(n_trials=n_done, budgets=("macs<=0.92x",))
    storage = optuna.storages.InMemoryStorage()
    search = Search(twelve, scores, budgets, settings, storage)
    search.run(quality)
    assert len(search.measured()) == n_done
    rest = [bits for bits in _every(twelve) if bits.tobytes() not in search._taken()]
    theirs = next(bits for bits in rest if twelve.feasible(bits[None], budgets)[0])
    params = {unit: bool(bit) for unit, bit in zip(twelve.names, theirs, strict=True)}
    search.study.enqueue_trial(params, user_attrs={"source": "local move"})
    found = [search._next(search.measured()), search.study.ask(search._parameters)]
    assert params in [trial.params for trial in found if trial is not None]


def test_a_torn_journal_and_a_dead_worker(twelve: Space, tmp_path: Path) -> None:
    budgets = _budgets(twelve, "macs<=0.92x")
    scores, quality = _synthetic(twelve, 3)
    settings = SearchSettings(n_trials=12, budgets=("macs<=0.92x",))
    journal = tmp_path / "search.journal"
    search = Search(twelve, scores, budgets, settings, open_storage(None, journal))
    search.run(quality)
    first = search.candidates()
    trial = search._next(search.measured())
    assert trial is not None
    lost = dict(trial.params)
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    host, _, created = worker().rsplit(":", 2)
    trial.set_user_attr("worker", f"{host}:{gone}:{created}")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "worker_id": "torn by a k')
    more = SearchSettings(n_trials=16, budgets=("macs<=0.92x",))
    again = Search(twelve, scores, budgets, more, open_storage(None, journal))
    assert (tmp_path / "search.torn").read_bytes().startswith(b'{"op_code": 5')
    assert again.candidates().equals(first)
    again.run(quality)
    states = [t.state.name for t in again.study.get_trials(deepcopy=False)]
    assert "RUNNING" not in states
    assert lost in [t.params for t in again.measured()]
    assert len(again.measured()) == 16
    assert not is_dead(worker())
    assert not is_dead("elsewhere:1:0.00")
    with pytest.raises(ValueError, match="made with other budgets"):
        Search(twelve, scores, _budgets(twelve, "macs<=0.9x"), more, open_storage(None, journal))
    fewer = Space(twelve.table, "stage")
    with pytest.raises(ValueError, match="made with other units: 12 units there, 9 units now"):
        Search(fewer, dict.fromkeys(fewer.names, 1.0), budgets, more, open_storage(None, journal))


def test_a_worker_that_is_killed(twelve: Space, tmp_path: Path) -> None:
    """One is killed by SIGKILL while it measures; nothing is lost and nothing runs for ever."""
    budgets = _budgets(twelve, "macs<=0.92x")
    scores, quality = _synthetic(twelve, 5)
    settings = SearchSettings(n_trials=30, budgets=("macs<=0.92x",))
    journal = tmp_path / "search.journal"
    pid = os.fork()
    if pid == 0:  # the doomed worker
        calls = [0]

        def doomed(mask: Mask) -> tuple[float, float]:
            calls[0] += 1
            if calls[0] == 6:
                os.kill(os.getpid(), 9)
            return quality(mask)

        Search(twelve, scores, budgets, settings, open_storage(None, journal)).run(doomed)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == 9
    search = Search(twelve, scores, budgets, settings, open_storage(None, journal))
    search.run(quality)
    trials = search.study.get_trials(deepcopy=False)
    assert "RUNNING" not in [t.state.name for t in trials]
    masks = [json.dumps(t.params, sort_keys=True) for t in search.measured()]
    assert len(masks) == len(set(masks)) == 30


def test_storage_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--storage sqlite:////nowhere.*cannot be opened"):
        open_storage("sqlite:////nowhere/at/all.db", tmp_path / "j")


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("study")
    small = ["--grain", "stage", "--samples", "8", "--bins", "2", "--batch-size", "4"]
    assert run("analyze", "emoji", *small, "--out", folder, "--quiet").exit_code == 0
    assert run("profile", "emoji", "--no-latency", "--out", folder, "--quiet").exit_code == 0
    return folder


def _search(folder: Path, *more: Any) -> Any:
    args = ["search", "emoji", "--out", folder, "--grain", "stage", "--samples", "16"]
    return run(*args, "--judged", "16", *more)


def test_a_search_from_the_command_line(study: Path, monkeypatch: Any) -> None:
    args = ["--budget", "macs<=0.7x", "--trials", "14"]
    result = _search(study, *args)
    assert result.exit_code == 0, result.output
    assert "winner" in result.stdout
    winner = json.loads((study / "winner.json").read_text())
    inventory = Inventory.of(Skeleton("s", build(SMALL)).unet)
    assert winner["plan"] == dict(inventory.plan(winner["removed"]))
    assert winner["share_of_teacher"]["macs"] <= 0.7
    assert winner["budgets"]["macs<=0.7x"]["cost"] <= winner["budgets"]["macs<=0.7x"]["limit"]
    candidates = pd.read_csv(study / "candidates.csv")
    finalists: Any = pd.read_csv(study / "finalists.csv")
    assert len(candidates) == 14
    assert finalists["chosen"].is_monotonic_increasing
    assert finalists["removed"].iloc[0].split() == winner["removed"]
    names = {path.name for path in (study / "figures").glob("search_*.png")}
    assert names == {f"search_{n}.png" for n in ("front", "history", "masks", "additive")}
    before = candidates.drop(columns="on_front")
    again = _search(study, *args, "--json")
    assert json.loads(again.stdout) == winner
    pd.testing.assert_frame_equal(
        pd.read_csv(study / "candidates.csv").drop(columns="on_front"), before
    )
    refused(_search(study, "--budget", "macs<=0.8x"), "made with other budgets", "--force")
    additive = _search(
        study, "--budget", "macs<=0.8x", "--objective", "additive", "--force", "--json"
    )
    assert "knapsack" in json.loads(additive.stdout)["figures"]["source"]
    assert pd.read_csv(study / "candidates.csv")["additive"].is_monotonic_increasing
    pictures = ["--front", "macs", "--trials", "10", "--finalists-by", "latent,clip", "--force"]
    monkeypatch.setattr("bkprune.search_job.N_PROMPTS", 3)
    monkeypatch.setattr("bkprune.search_job.STEPS", 2)
    result = _search(study, *pictures, "--json")
    assert result.exit_code == 0, result.output
    front = pd.DataFrame(json.loads(result.stdout)["front"])
    assert front["macs"].is_monotonic_increasing
    assert (front["latent"] > 0).all()
    assert front["clip_stderr"].notna().all()
    assert preset("bk-sdm-base", inventory)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--budget", "macs<0.5"], ["--budget 'macs<0.5'", "METRIC<=VALUE"]),
        (["--budget", "latency<=0.5x"], ["no latency", "bkprune profile"]),
        (["--budget", "macs<=0.8x", "--keep", "mid_blok"], ["--keep", "mid_block"]),
        (["--budget", "macs<=0.8x", "--grain", "pair"], ["no `output` score", "bkprune analyze"]),
        (["--budget", "macs<=0.8x", "--objective", "luck"], ["--objective 'luck'"]),
        (["--budget", "macs<=0.8x", "--trials", "0"], ["at least one trial"]),
        ([], ["--budget", "--front"]),
        (["--front", "speed"], ["--front 'speed'", "latency"]),
        (["--front", "latency"], ["no latency", "bkprune profile"]),
        (["--front", "macs", "--finalists-by", "taste"], ["--finalists-by 'taste'", "clip"]),
        (["--budget", "macs<=0.8x", "--cost", "none.csv"], ["none.csv", "no such cost table"]),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: list[str], study: Path) -> None:
    refused(_search(study, *args), *words)


def test_no_mask_for_the_budgets_is_exit_code_3(study: Path) -> None:
    result = _search(study, "--budget", "macs<=0.001x")
    assert result.exit_code == 3, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for word in ("--budget macs<=0.001x", "cannot be kept", "least that can be reached"):
        assert word in result.stderr


def test_helpers_get_the_same_command() -> None:
    words = ["search", "emoji", "--workers", "3", "--budget", "macs<=0.8x", "--force"]
    assert for_a_helper(words) == [
        "search",
        "emoji",
        "--budget",
        "macs<=0.8x",
        "--join",
        "--quiet",
    ]
    assert for_a_helper(["search", "--workers=2"]) == ["search", "--join", "--quiet"]


def test_two_workers_on_one_journal(study: Path, tmp_path: Path) -> None:
    for name in ("importance.csv", "stamps.json"):
        (tmp_path / name).write_bytes((study / name).read_bytes())
    command = [sys.executable, "-W", "ignore", "-m", "bkprune.cli", "search", "emoji"]
    command += ["--grain", "stage", "--samples", "16", "--budget", "macs<=0.7x", "--trials", "20"]
    command += ["--judged", "16"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--workers", "2", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "candidates.csv")
    assert len(table) == len(set(table["removed"])) >= 20
    assert (tmp_path / "winner.json").exists()
