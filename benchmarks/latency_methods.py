"""Which way of timing blocks predicts whole masks best? Everything interleaved, in one run.

    python benchmarks/latency_methods.py                          # the emoji model
    python benchmarks/latency_methods.py --shape sd_v1 --tests 4 --training 0 --max-s 400

Four tables of milliseconds per block are made from the same rounds: `in_place` (marks before and
after each block within one pass), `isolated` (each block alone on recorded inputs),
`leave_one_out` (the whole net minus the net without the block), `regression` (ridge over random
masks, towards `in_place`). Each predicts the same unseen masks; what counts is the ratio to the
teacher, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

import numpy as np
import pandas as pd
import torch

from bkprune import Inventory, preset
from bkprune.backends import Clock, Target, prepare
from bkprune.bypass import variant
from bkprune.counting import unet_call
from bkprune.latency import (
    Contestant,
    Isolated,
    TimingSettings,
    in_place,
    interleave,
    whole,
)
from bkprune.series import Rounds
from bkprune.skeleton import skeleton, with_random_weights
from bkprune.study import Stamp, Study, Unfinished


def masks(inventory: Inventory, n: int, seed: int) -> list[frozenset[str]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        share = random.uniform(0.1, 0.7)
        found.append(frozenset(b for b in inventory.names if random.random() < share))
    return found


def renamed(name: str, turn: Contestant) -> Contestant:
    return lambda: {f"alone {name}": turn()[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="emoji")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--training", type=int, default=60)
    parser.add_argument("--leave-one-out", type=int, default=1)
    parser.add_argument("--max-s", type=float, default=240)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    target, clock = Target(), Clock("cpu")
    bones = skeleton(options.shape)
    inventory = Inventory.of(bones.unet)
    unet: Any = with_random_weights(bones.unet, torch.device("cpu"), torch.float32)
    call = unet_call(unet.config, batch_size=options.batch_size, device="cpu")
    names = list(inventory.names)

    plans = {f"test {i}": m for i, m in enumerate(masks(inventory, options.tests, options.seed))}
    for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"):
        plans[name] = preset(name, inventory)
    tests = list(plans)
    training = masks(inventory, options.training, options.seed + 1)
    plans |= {f"training {i}": mask for i, mask in enumerate(training)}
    if options.leave_one_out:
        plans |= {f"without {name}": frozenset({name}) for name in names}

    contestants = {"teacher": whole("teacher", prepare(unet, call, target), clock)}
    for name, mask in plans.items():
        run = prepare(variant(unet, inventory.plan(mask)), call, target)
        contestants[name] = whole(name, run, clock)
    shortcuts = [f"{b.name}.conv_shortcut" for b in inventory if b.bypass == "shortcut"]
    samplers = [s for level in inventory.levels for s in (level.downsampler, level.upsampler) if s]
    modules = [*names, *shortcuts, *samplers]
    contestants["in_place"] = in_place(unet, call, modules, clock, "marked pass")
    isolated = Isolated.record(unet, call, modules)
    alone = isolated.contestants(unet, target, clock, lambda *_: None)
    for name, turn in alone.items():
        contestants[f"alone {name}"] = renamed(name, turn)

    settings = TimingSettings(precision=0.01, min_rounds=30, max_s=options.max_s)
    unfinished = Unfinished(Study("/nonexistent"), "none", Stamp.of({}, {}))
    unfinished.save = lambda: None  # type: ignore[method-assign]
    rounds = interleave(contestants, settings, unfinished, "rounds")
    print(
        f"{options.shape}, batch {options.batch_size}, {len(rounds.ms)} rounds of "
        f"{len(contestants)} contestants; {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print(
        f"teacher {rounds['teacher'].median:.2f} ms, 95 % {rounds['teacher'].low:.2f}.."
        f"{rounds['teacher'].high:.2f}"
    )

    def kept(plan: Any) -> list[str]:
        return [f"{n}.conv_shortcut" for n, bypass in plan.items() if bypass == "shortcut"]

    teacher = rounds["teacher"].median
    marked = {m: rounds.ratio(m, "teacher").median for m in modules}
    lone = {m: rounds.ratio(f"alone {isolated.owner[m]}", "teacher").median for m in modules}
    tables: dict[str, dict[str, float]] = {"in_place": marked, "isolated": lone}
    if options.leave_one_out:
        loo = {n: 1 - rounds.ratio(f"without {n}", "teacher").median for n in names}
        tables["leave_one_out"] = (
            loo | dict.fromkeys(shortcuts, 0.0) | {s: marked[s] for s in samplers}
        )
    if training:
        tables["regression"] = regression(rounds, inventory, training, marked, modules)

    truth = {t: rounds.ratio(t, "teacher").median for t in tests}
    rows = []
    for method, table in tables.items():
        guess = {}
        for t in tests:
            plan = inventory.plan(plans[t])
            guess[t] = 1 - sum(table[m] for m in plan) + sum(table[m] for m in kept(plan))
        error = np.array([abs(guess[t] / truth[t] - 1) for t in tests])
        bias = np.array([guess[t] / truth[t] - 1 for t in tests])
        rank = pd.Series(guess).corr(pd.Series(truth), method="spearman")
        rows.append(
            {
                "method": method,
                "MAPE %": 100 * error.mean(),
                "worst %": 100 * error.max(),
                "bias %": 100 * bias.mean(),
                "spearman": rank,
            }
        )
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    print(
        f"marked pass / teacher: {rounds.ratio('marked pass', 'teacher').median:.4f}; "
        f"truth {min(truth.values()):.2f}..{max(truth.values()):.2f}"
    )
    noise = np.mean([rounds.ratio(t, "teacher").precision for t in tests])
    print(
        f"mean half-width of the tests' own 95 % intervals: {100 * noise:.2f} %, "
        f"teacher {teacher:.2f} ms"
    )


def regression(
    rounds: Rounds,
    inventory: Inventory,
    training: list[frozenset[str]],
    prior: dict[str, float],
    modules: list[str],
) -> dict[str, float]:
    index = {m: i for i, m in enumerate(modules)}
    x = np.zeros((len(training), len(modules)))
    y = np.zeros(len(training))
    for i, mask in enumerate(training):
        plan = inventory.plan(mask)
        for name, bypass in plan.items():
            x[i, index[name]] += 1
            if bypass == "shortcut":
                x[i, index[f"{name}.conv_shortcut"]] -= 1
        y[i] = 1 - rounds.ratio(f"training {i}", "teacher").median
    start = np.array([prior[m] for m in modules])
    ridge = 0.3
    delta = np.linalg.solve(x.T @ x + ridge * np.eye(len(modules)), x.T @ (y - x @ start))
    return dict(zip(modules, start + delta, strict=True))


if __name__ == "__main__":
    main()
