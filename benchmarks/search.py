"""Does the search find better masks than what people do, and which way of proposing is best?

    python benchmarks/search.py --out build/search               # the search and its baselines
    python benchmarks/search.py --out build/search --proposers   # the same trials, other proposers

The emoji model at grain block, calibration sets drawn anew for every seed. Every run searches on 96
samples, chooses the winner on 256 others and reports on 256 more. The baselines (exact knapsack,
greedy by importance per cost, BK-SDM's masks that fit, five random feasible ones) are judged in the
same run. Rows are kept in CSV files as runs end; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.samplers import TPESampler

from bkprune.blocks import Mask
from bkprune.calibration import calibrate
from bkprune.cost import CostTable, read
from bkprune.data import read_pairs
from bkprune.judging import BASELINES, finalists, judge
from bkprune.measured import OutputError
from bkprune.models import BUILT_IN, load
from bkprune.profiling import Profile, ProfileSettings
from bkprune.proposals import neighbours
from bkprune.sampling import SamplingSettings
from bkprune.search import Search, SearchSettings
from bkprune.skeleton import skeleton
from bkprune.space import Bits, Budget, Space

REPORT = Path(__file__).parents[1] / "reports" / "emoji"
N_SEARCHED, N_JUDGED, N_BINS, BATCH = 96, 256, 8, 32


class Remembered:
    """A quality that measures no mask twice, shared by all runs of one seed."""

    def __init__(self, quality: OutputError) -> None:
        self.quality = quality
        self.known: dict[Mask, tuple[float, float]] = {}
        self.seconds = 0.0

    def __call__(self, mask: Mask) -> tuple[float, float]:
        if mask not in self.known:
            start = time.perf_counter()
            self.known[mask] = self.quality(mask)
            self.seconds += time.perf_counter() - start
        return self.known[mask]


def qualities(seed: int) -> list[Remembered]:
    pipeline = load("emoji")
    drawn = calibrate(
        pipeline,
        read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train"),
        n=N_SEARCHED + 2 * N_JUDGED,
        n_bins=N_BINS,
        seed=seed,
        batch_size=BATCH,
        sampling=SamplingSettings(batch_size=BATCH),
    )
    cuts = (N_SEARCHED, N_SEARCHED + N_JUDGED, len(drawn))
    starts = (0, *cuts)
    return [
        Remembered(OutputError(pipeline, drawn[slice(a, b)], BATCH))
        for a, b in zip(starts, cuts, strict=False)
    ]


def table_of_costs() -> CostTable:
    counted = Profile(skeleton("emoji"), ProfileSettings()).table
    return read(REPORT / "cost.csv", counted)


def scores() -> dict[str, float]:
    table = pd.read_csv(REPORT / "importance.csv")
    chosen = table[(table["timestep_bin"].astype(str) == "all") & (table["criterion"] == "output")]
    return dict(zip(chosen["unit"], chosen["score"], strict=True))


def made(space: Space, budget: Budget, seed: int, n_trials: int) -> Search:
    settings = SearchSettings(budgets=(budget.text,), seed=seed, n_trials=n_trials)
    return Search(space, scores(), [budget], settings, optuna.storages.InMemoryStorage())


def best_of(search: Search) -> tuple[Mask, float]:
    best = search.best()
    assert best is not None
    return search.space.mask(search._bits(best.params)), float(best.value or 0.0)


def run_search(
    space: Space, budget: Budget, seed: int, n: int, judges: list[Remembered]
) -> pd.DataFrame:
    search = made(space, budget, seed, n)
    start, before = time.perf_counter(), judges[0].seconds
    search.run(judges[0])
    seconds = time.perf_counter() - start
    table = judge(
        finalists(search.candidates(), 8), judges[1], judges[2], lambda done, total, what: None
    )
    table.insert(0, "budget", budget.text)
    table.insert(1, "seed", seed)
    table.insert(2, "n_masks", len(search.measured()))
    table["seconds"] = seconds
    table["measuring_seconds"] = judges[0].seconds - before
    return table


# --- other proposers ---------------------------------------------------------------------------


def tpe(space: Space, budget: Budget, seed: int, n: int, quality: Remembered, seeded: bool) -> Bits:
    """Optuna's own sampler with the budget as a constraint; repeats do not count."""
    search = made(space, budget, seed, n)
    names = space.names
    study = optuna.create_study(sampler=TPESampler(seed=seed))
    if seeded:
        for bits, _ in search.seeds():
            study.enqueue_trial({name: bool(b) for name, b in zip(names, bits, strict=True)})
    best, least, seen = np.zeros(len(space), dtype=bool), np.inf, set()
    for _ in range(20 * n):
        trial = study.ask()
        bits = np.array([trial.suggest_categorical(name, [False, True]) for name in names])
        over = float(space.violations(bits[None], [budget])[0][0])
        trial.set_constraint(budget.text, max(over, 0.0))
        if over > 1e-12:  # known from the table: costs no measurement
            study.tell(trial, 1.0 + over)
            continue
        value = quality(space.mask(bits))[0]
        study.tell(trial, value)
        seen.add(bits.tobytes())
        if value < least:
            best, least = bits, value
        if len(seen) >= n:
            break
    return best


def local(space: Space, budget: Budget, seed: int, n: int, quality: Remembered) -> Bits:
    """The best baseline, then random flips and swaps; the first that is better is taken."""
    random = np.random.default_rng(seed)
    seen: dict[bytes, float] = {}

    def look(bits: Bits) -> float:
        if bits.tobytes() not in seen:
            seen[bits.tobytes()] = quality(space.mask(bits))[0]
        return seen[bits.tobytes()]

    found = [bits for bits, _ in made(space, budget, seed, n).seeds()]
    best = min(found, key=look)
    while len(seen) < n:
        around = neighbours(best)
        around = around[space.feasible(around, [budget])]
        fresh = [b for b in random.permutation(around) if b.tobytes() not in seen]
        better = next((b for b in fresh[: n - len(seen)] if look(b) < seen[best.tobytes()]), None)
        if better is None:
            break
        best = better
    return best


def run_proposers(
    space: Space, budget: Budget, seed: int, n: int, judges: list[Remembered]
) -> pd.DataFrame:
    search = made(space, budget, seed, n)
    search.run(judges[0])
    seeds = search.seeds()
    masks = {
        "baselines alone": min((space.mask(b) for b, _ in seeds), key=judges[0]),
        "knapsack": space.mask(seeds[0][0]),
        "TPE": space.mask(tpe(space, budget, seed, n, judges[0], seeded=False)),
        "TPE after the baselines": space.mask(tpe(space, budget, seed, n, judges[0], seeded=True)),
        "local moves after the baselines": space.mask(local(space, budget, seed, n, judges[0])),
        "bkprune": best_of(search)[0],
    }
    return pd.DataFrame(
        {
            "budget": budget.text,
            "seed": seed,
            "n_masks": n,
            "proposer": name,
            "searched": judges[0](mask)[0],
            "held_out": judges[2](mask)[0],
            "held_out_stderr": judges[2](mask)[1],
        }
        for name, mask in masks.items()
    )


# --- all of it -----------------------------------------------------------------------------------


def runs(options: argparse.Namespace, path: Path) -> Iterator[pd.DataFrame]:
    done = pd.read_csv(path) if path.exists() else pd.DataFrame({"budget": [], "seed": []})
    space = Space(table_of_costs(), "block")
    work = run_proposers if options.proposers else run_search
    yield done
    for seed in range(options.seeds):
        known = set(done.loc[done["seed"] == seed, "budget"])
        left = [text for text in options.budgets if text not in known]
        judges = qualities(seed) if left else []
        for text in left:
            yield work(space, Budget.parse(text, space.teacher), seed, options.trials, judges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budgets", nargs="+", default=["latency<=0.8x", "latency<=0.7x", "latency<=0.6x"]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--proposers", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("proposers.csv" if options.proposers else "search.csv")
    tables: list[pd.DataFrame] = []
    for table in runs(options, path):
        tables.append(table)
        pd.concat(tables, ignore_index=True).to_csv(path, index=False, float_format="%.6g")
    found = pd.concat(tables, ignore_index=True)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    if options.proposers:
        shown = found.pivot_table(
            index=["budget", "proposer"], values=["searched", "held_out"], aggfunc=["mean", "std"]
        )
        print(shown.to_string(float_format="%.5f"))
    else:
        print(against_baselines(found).to_string(float_format="%.4f"))


def against_baselines(found: pd.DataFrame) -> pd.DataFrame:
    """Held-out error of each baseline over the winner's, run by run."""
    rows = []
    for (budget, seed), run in found.groupby(["budget", "seed"], sort=False):
        winner = run.iloc[0]
        row = {"budget": budget, "seed": seed, "masks": winner["n_masks"]}
        row |= {"seconds": winner["seconds"], "winner": winner["held_out"]}
        for name in ("knapsack", "greedy", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "random"):
            own = run[run["source"].str.contains(name)]
            row[name] = own["held_out"].min() / winner["held_out"] if len(own) else np.nan
        baselines = run[run["source"].str.contains(rf"{BASELINES}|random \d+", regex=True)]
        row["best baseline"] = baselines["held_out"].min() / winner["held_out"]
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
