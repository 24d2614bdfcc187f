"""How long things take: passes measured side by side, on a machine that may be noisy.

Knows the protocol (warm up until steady, every contestant once a round in a random order, repeat
until the medians are known well enough), and how the time of one network is split over its modules.
It does not know masks or cost tables.

A slow second of the machine hits all contestants of a round alike, so ratios within a round are
steadier than any time by itself; `Rounds.ratio` is what comparisons should rest on. On a CPU a
fixed matrix product is timed in every round as well: rounds in which it took `DISTURBED` times what
it takes in the quietest ones are set aside, because somebody else was using the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bkprune.backends import Clock, Target, prepare
from bkprune.counting import Call
from bkprune.graphs import Pass
from bkprune.series import PROBE, Rounds
from bkprune.study import Unfinished

Contestant = Callable[[], Mapping[str, float]]  # one turn: milliseconds by name
Progress = Callable[[int, int, str], None]

MIN_WARM_UP_RUNS, MAX_WARM_UP_RUNS, MIN_WARM_UP_S, SLOW_MS = 6, 100, 1.0, 4000.0
_PROBE_SIZE = 384
_SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class TimingSettings:
    """When a measurement is good enough: medians are known to `precision`, or time is up.

    `precision` is the half-width of the 95 % interval over the median.
    """

    precision: float = 0.02
    min_rounds: int = 30
    max_rounds: int = 1000
    max_s: float = 60.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 < self.precision < 1:
            raise ValueError(f"precision {self.precision}: a share between 0 and 1 is expected")
        if self.min_rounds < 1 or self.max_s <= 0:
            raise ValueError("at least one round and a time limit above 0 s are needed")


_quiet_ms = [float("inf")]  # the least that the probe has taken in this process


def interleave(
    contestants: Mapping[str, Contestant],
    settings: TimingSettings,
    unfinished: Unfinished,
    what: str,
    progress: Progress = lambda done, total, what: None,
    *,
    probing: bool = True,
) -> Rounds:
    """Give every contestant one turn a round, in a new random order each, until it is enough.

    Rounds that an interrupted run has kept under this name count; warming up is done anew.

    Args:
        contestants: one turn each, which says its milliseconds by names that are its own alone. A
            contestant whose own name is among them is one of those that decide when to stop.
        settings: when to stop.
        unfinished: where rounds are kept.
        what: name of this measurement, for the kept rounds and for the progress bar.
        progress: told the share that is done, in per cent.
        probing: time the fixed matrix product in every round; for a CPU that does the work itself.
    """
    kept = unfinished.arrays.get(f"{what}/ms")
    rows = [] if kept is None else [list(row) for row in kept]
    names = [] if kept is None else [str(name) for name in unfinished.arrays[f"{what}/names"]]
    found = Rounds(names, np.array(rows), _quiet_ms[0])
    if f"{what}/over" in unfinished.arrays:
        return found
    progress(0, 100, what)
    _warm_up(contestants)
    probe = torch.ones(_PROBE_SIZE, _PROBE_SIZE)
    started = saved = time.monotonic()
    while True:
        order = np.random.default_rng([settings.seed, len(rows)]).permutation(len(contestants))
        keys = list(contestants)
        turn: dict[str, float] = {}
        before = _probe_ms(probe) if probing else 0.0
        for index in order:
            turn |= contestants[keys[index]]()
        if probing:
            turn[PROBE] = max(before, _probe_ms(probe))
        names = names or sorted(turn)
        rows.append([turn[name] for name in names])
        found = Rounds(names, np.array(rows), _quiet_ms[0])
        now = time.monotonic()
        is_over = now - started > settings.max_s or _is_enough(found, contestants, settings)
        if is_over or now - saved > _SAVE_EVERY_S:
            unfinished.arrays |= {f"{what}/ms": found.ms, f"{what}/names": np.array(names)}
            if is_over:
                unfinished.arrays[f"{what}/over"] = np.array(True)
            unfinished.save()
            saved = now
        progress(
            100 if is_over else _share_done(found, contestants, settings, now - started), 100, what
        )
        if is_over:
            _quiet_ms[0] = min(_quiet_ms[0], found.probe_ms)
            return found


def _probe_ms(matrix: Tensor) -> float:
    """The quickest of three products: what the machine can do at this moment."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def _warm_up(contestants: Mapping[str, Contestant]) -> None:
    """Until a contestant's last three runs are no faster than the three before them."""
    for name, contestant in contestants.items():
        times: list[float] = []
        started = time.monotonic()
        while len(times) < MAX_WARM_UP_RUNS:
            turn = contestant()
            times.append(turn.get(name, sum(turn.values())))
            if sum(times) > SLOW_MS:
                break  # a slow pass: one or two of them have warmed what there is
            is_long = time.monotonic() - started > MIN_WARM_UP_S
            if len(times) < MIN_WARM_UP_RUNS or not is_long:
                continue
            if np.median(times[-3:]) > 0.97 * np.median(times[-6:-3]):
                break


def _deciding(rounds: Rounds, contestants: Mapping[str, Contestant]) -> list[str]:
    return [name for name in contestants if name in rounds.names]


def _is_enough(
    rounds: Rounds, contestants: Mapping[str, Contestant], settings: TimingSettings
) -> bool:
    if rounds.undisturbed.sum() < settings.min_rounds:
        return False
    if len(rounds.ms) >= settings.max_rounds:
        return True
    return _worst(rounds, contestants) <= settings.precision


def _worst(rounds: Rounds, contestants: Mapping[str, Contestant]) -> float:
    return max((rounds[name].precision for name in _deciding(rounds, contestants)), default=0.0)


def _share_done(
    rounds: Rounds, contestants: Mapping[str, Contestant], settings: TimingSettings, elapsed: float
) -> int:
    by_time = elapsed / settings.max_s
    by_precision = 0.0
    if len(rounds.ms) >= settings.min_rounds:
        by_precision = (settings.precision / max(_worst(rounds, contestants), 1e-9)) ** 2
    elif len(rounds.ms) > 3:
        by_precision = 0.5 * len(rounds.ms) / settings.min_rounds
    return min(99, int(100 * max(by_time, by_precision)))


# --- contestants -----------------------------------------------------------------------------


def whole(name: str, run: Pass, clock: Clock) -> Contestant:
    """One pass under one name; a command that times itself is believed."""

    def turn() -> dict[str, float]:
        start = clock.mark()
        own = run()
        end = clock.mark()
        return {name: clock.elapsed_ms(start, end) if own is None else own}

    return turn


def in_place(
    network: nn.Module, call: Call, modules: Collection[str], clock: Clock, total: str
) -> Contestant:
    """One eager pass, split over modules by marks on the device's time line before and after each.

    Names are those of the modules, and `total` for the pass that carried the marks.
    """
    found = {name: network.get_submodule(name) for name in modules}

    def turn() -> dict[str, float]:
        marks: dict[str, list[Any]] = {name: [] for name in found}
        with _marked(found, marks, clock), torch.inference_mode():
            start = clock.mark()
            network(*call.args, **call.kwargs)
            end = clock.mark()
        clock.wait()
        times = {name: clock.elapsed_ms(*pair) for name, pair in marks.items()}
        return {**times, total: clock.elapsed_ms(start, end)}

    return turn


@contextmanager
def _marked(
    modules: Mapping[str, nn.Module], marks: dict[str, list[Any]], clock: Clock
) -> Iterator[None]:
    hooks = []
    for name, module in modules.items():
        pair = marks[name]

        def mark(*_: Any, pair: list[Any] = pair) -> None:
            pair.append(clock.mark())

        hooks += [module.register_forward_pre_hook(mark), module.register_forward_hook(mark)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Isolated:
    """Modules taken out and run alone on the inputs they had in a whole pass.

    Modules of one shape are prepared and timed once: `owner` says whose time each one has.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)

    @classmethod
    def record(cls, network: nn.Module, call: Call, modules: Collection[str]) -> Isolated:
        """Run the network once and keep what each module was given."""
        out = cls()
        shapes: dict[Any, str] = {}
        hooks = []
        for name in modules:
            module = network.get_submodule(name)

            def keep(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                out.calls[name] = Call(args, kwargs)
                out.owner[name] = shapes.setdefault(_shape(module, args, kwargs), name)

            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            with torch.inference_mode():
                network(*call.args, **call.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        out.calls = {name: out.calls[name] for name in out.owner if out.owner[name] == name}
        return out

    def contestants(
        self, network: nn.Module, target: Target, clock: Clock, progress: Progress
    ) -> dict[str, Contestant]:
        """One for each shape, prepared for the target's backend."""
        found = {}
        for i, (name, call) in enumerate(self.calls.items()):
            progress(i, len(self.calls), f"preparing modules for {target.backend}")
            cloned = _own(call)
            run = prepare(network.get_submodule(name), cloned, target)
            found[name] = whole(name, run, clock)
        progress(len(self.calls), len(self.calls), f"preparing modules for {target.backend}")
        return found


def _own(call: Call) -> Call:
    """Copies made outside inference mode, which exporters ask for."""

    def copied(value: Any) -> Any:
        return torch.empty_like(value).copy_(value) if isinstance(value, Tensor) else value

    with torch.no_grad():
        return Call(tuple(map(copied, call.args)), {k: copied(v) for k, v in call.kwargs.items()})


def _shape(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def shape(value: Any) -> Any:
        return tuple(value.shape) if isinstance(value, Tensor) else repr(value)

    weights = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    settings = repr(module)
    given = tuple(map(shape, args)) + tuple((k, shape(v)) for k, v in sorted(kwargs.items()))
    return (type(module).__name__, settings, weights, given)
