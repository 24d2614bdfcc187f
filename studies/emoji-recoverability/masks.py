"""The masks of the study: at each budget what searches, people and chance would choose.

    python masks.py     # build/masks.csv; a few minutes

All masks of a budget cost about the same MACs: between 0.955 and 1 times the budget. Beside the
results of the searches there are masks near BK-SDM's, random ones, and some chosen because they
lose much before distillation.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bkprune.calibration import calibrate
from bkprune.data import read_pairs
from bkprune.measured import OutputError
from bkprune.models import BUILT_IN, Parts, load
from bkprune.presets import preset
from bkprune.profiling import Profile, ProfileSettings
from bkprune.program import least_score
from bkprune.proposals import greedy, random_feasible, ranked, roomy
from bkprune.sampling import SamplingSettings
from bkprune.skeleton import skeleton
from bkprune.space import Array, Bits, Budget, Space

HERE = Path(__file__).parent
BUILD = HERE / "build"
BUDGETS = {"0.8": 0.8, "0.65": 0.655, "0.5": 0.5}  # 0.654 is what bk-sdm-base costs here
LEAST = 0.955  # of the budget
LEFT_OUT = ("random 1", "additive search, second")  # at the tighter budgets, to save hours
APART, N_RANDOM, TRIALS, CRITERIA = 4, 48, 60, "output,task,magnitude,taylor"


def space() -> Space:
    """Every block of the emoji model, with counted costs."""
    return Space(Profile(skeleton("emoji", Parts()), ProfileSettings()).table, "block")


def importance() -> pd.DataFrame:
    """One table of all criteria, by the command."""
    folder = BUILD / "importance"
    command = ["bkprune", "analyze", "emoji", "--criterion", CRITERIA, "--out", str(folder)]
    subprocess.run([*command, "--samples", "192", "--quiet"], check=True)
    table = pd.read_csv(folder / "importance.csv")
    return table[table["timestep_bin"].astype(str) == "all"]


def scores_of(table: pd.DataFrame, criterion: str, names: list[str]) -> Array:
    chosen = table[table["criterion"] == criterion].set_index("unit")["score"]
    return chosen.loc[names].to_numpy(dtype=float)


def measured_search(budget: str) -> pd.DataFrame:
    """Candidates of `bkprune search`, the best first."""
    folder = BUILD / f"search-{budget}"
    folder.mkdir(parents=True, exist_ok=True)
    source = (BUILD / "importance" / "importance.csv").read_bytes()
    (folder / "importance.csv").write_bytes(source)
    limit = f"macs<={BUDGETS[budget]}x"
    command = ["bkprune", "search", "emoji", "--budget", limit, "--trials", str(TRIALS)]
    subprocess.run([*command, "--judged", "64", "--out", str(folder), "--quiet"], check=True)
    return pd.read_csv(folder / "candidates.csv")


def near(spaced: Space, name: str, limit: Budget) -> tuple[Bits, str]:
    """A published mask, with as few pairs as can be put back or taken away to cost the budget."""
    everything = spaced.inventory.units("pair")
    mask = preset(name, spaced.inventory)
    inside = [unit for unit, blocks in everything.items() if blocks <= mask]
    outside = [unit for unit, blocks in everything.items() if not blocks & mask]
    for n in range(len(everything)):
        found = []
        for how in range(n + 1):
            for back in itertools.combinations(inside, how):
                for gone in itertools.combinations(outside, n - how):
                    changed = mask - frozenset().union(*(everything[u] for u in back))
                    changed |= frozenset().union(*(everything[u] for u in gone))
                    bits = spaced.bits(changed)
                    if bits is not None and fits(spaced, bits, limit):
                        found.append(bits)
        if found:  # the one that uses most of the budget
            costs = spaced.costs(np.array(found), limit.metric)
            return found[int(costs.argmax())], name if n == 0 else f"near {name}"
    raise AssertionError


def fits(spaced: Space, bits: Bits, limit: Budget) -> bool:
    cost = float(spaced.costs(bits[None], limit.metric)[0])
    return LEAST * limit.limit <= cost <= limit.limit


def filled(spaced: Space, bits: Bits, scores: Array, limit: Budget) -> Bits:
    """Blocks are put back, the most important first, while the budget allows it."""
    bits = bits.copy()
    for i in np.argsort(-scores):
        if bits[i]:
            tried = bits.copy()
            tried[i] = False
            if spaced.costs(tried[None], limit.metric)[0] <= limit.limit:
                bits = tried
    return bits


def chosen(spaced: Space, budget: str, table: pd.DataFrame, quality: Any) -> Iterator[Any]:
    """Each mask with the name of what chose it."""
    limit = Budget.parse(f"macs<={BUDGETS[budget]}x", spaced.teacher)
    output = scores_of(table, "output", spaced.names)
    candidates = measured_search(budget)
    taken: list[Bits] = []

    def is_new(bits: Bits, apart: int) -> bool:
        return all(int((bits ^ other).sum()) >= apart for other in taken)

    def take(bits: Bits | None, source: str) -> tuple[Bits, str]:
        assert bits is not None
        taken.append(bits)
        return bits, source

    read = [spaced.bits(str(removed).split()) for removed in candidates["removed"]]
    searched = [bits for bits in read if bits is not None]
    yield take(searched[0], "measured search")
    knapsack = least_score(spaced, output, [limit])
    yield take(knapsack, "knapsack")
    yield take(greedy(spaced, output, [limit]), "greedy")
    for name in (
        ("bk-sdm-base", "bk-sdm-tiny")
        if budget != "0.65"
        else (
            "bk-sdm-base",
            "bk-sdm-small",
            "bk-sdm-tiny",
        )
    ):
        if budget == "0.65":
            yield take(spaced.bits(preset(name, spaced.inventory)), name)
        else:
            yield take(*near(spaced, name, limit))
    other = next(b for b in searched if fits(spaced, b, limit) and is_new(b, APART))
    yield take(other, "measured search, second")
    many, _ = ranked(spaced, output, [limit], 4000)
    others = [b for b in many if fits(spaced, b, limit) and is_new(b, APART)]
    if others:
        yield take(others[0], "additive search, second")
    for criterion in ("taylor", "magnitude"):
        bits = least_score(spaced, scores_of(table, criterion, spaced.names), [limit])
        if bits is not None and is_new(bits, 1):
            yield take(bits, f"knapsack on {criterion}")
    bits = least_score(spaced, spaced.saved("params"), [limit])
    if bits is not None and is_new(bits, 1):
        yield take(bits, "most parameters")
    random = np.random.default_rng(7)
    drawn = [
        b
        for b in random_feasible(spaced, [limit], random, N_RANDOM)
        if fits(spaced, b, limit) and is_new(b, 1)
    ]
    for i, bits in enumerate(drawn[:2]):
        yield take(bits, f"random {i}")
    losses = [quality(spaced.mask(b))[0] for b in drawn]
    order = [i for i in np.argsort(losses) if i > 1 and np.isfinite(losses[i])]
    for i, name in ((order[-1], "high loss 0"), (order[len(order) // 2], "middling loss")):
        yield take(drawn[i], name)
    for i, bits in enumerate(b for b in roomy(spaced, output, [limit]) if is_new(b, 1)):
        yield take(bits, f"roomy {i}")


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    spaced, table = space(), importance()
    pipeline = load("emoji")
    drawn = calibrate(
        pipeline,
        read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train"),
        n=64,
        n_bins=8,
        seed=99,
        batch_size=16,
        sampling=SamplingSettings(),
    )
    quality = OutputError(pipeline, drawn, 16)
    rows = []
    for budget in BUDGETS:
        for bits, source in chosen(spaced, budget, table, quality):
            mask, cost = spaced.mask(bits), spaced.cost(bits)
            share = cost.relative_to(spaced.teacher)
            removed = " ".join(sorted(mask, key=spaced.inventory.names.index))
            rows.append(
                {
                    "budget": budget,
                    "source": source,
                    "n_removed": len(mask),
                    "macs": share["macs"],
                    "params": share["params"],
                    "removed": removed,
                }
            )
            print(rows[-1], flush=True)
    made = pd.DataFrame(rows)
    names = made.groupby(["budget", "removed"])["source"].transform(" + ".join)
    made["source"] = names
    made = made.drop_duplicates(["budget", "removed"], ignore_index=True)
    made.insert(1, "mask", [f"{b}-{i:02d}" for b, i in _numbered(made["budget"])])
    made = made[(made["budget"] == "0.8") | ~made["source"].isin(LEFT_OUT)]
    made.to_csv(BUILD / "masks.csv", index=False, float_format="%.4f")


def _numbered(budgets: Any) -> Iterator[tuple[str, int]]:
    seen: dict[str, int] = {}
    for budget in budgets:
        seen[budget] = seen.get(budget, -1) + 1
        yield budget, seen[budget]


if __name__ == "__main__":
    main()
