"""A distillation for people: its speed and losses, a stop by signal, a word when memory ends."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bkprune.terminal import notice

if TYPE_CHECKING:
    from bkprune.recipe import DistillSettings

_LINE_EVERY_S = 30.0


@contextmanager
def stops_on_signals() -> Iterator[Any]:
    """Ctrl-C and SIGTERM ask for a stop after the step that runs; a second one does not wait."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        notice("stopping after this step; the checkpoint is being saved")

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told(progress: Any, batch: int, device: Any, *, quiet: bool) -> Any:
    """The bar with its ETA, and every half minute a line with the losses, the speed, the memory."""
    started, last, first = time.monotonic(), [time.monotonic()], [0]

    def report(done: int, total: int, what: str) -> None:
        progress(done, total, "distilling")
        first[0] = first[0] or done
        now = time.monotonic()
        if not quiet and (now - last[0] > _LINE_EVERY_S or done == total):
            last[0] = now
            speed = (done - first[0] + 1) * batch / max(now - started, 1e-9)
            memory = peak_bytes(device) / 1e9
            notice(f"step {done} of {total}: {what}; {speed:.1f} images/s, peak {memory:.2f} GB")

    return report


@contextmanager
def memory_explained(s: DistillSettings) -> Iterator[None]:
    """Running out of memory as one line that says what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "allocate memory" not in text and "not enough memory" not in text:
            raise
        half = max(s.batch_size // 2, 1)
        raise ValueError(
            f"out of memory at batch size {s.batch_size}: try --batch-size {half} --accumulate "
            f"{s.accumulate * (2 if s.batch_size > 1 else 1)}, or --gradient-checkpointing"
        ) from error


def peak_bytes(device: Any) -> int:
    """The most memory held so far: torch's on a GPU, elsewhere the process's."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
