"""FSDP without a GPU: accelerate shards on CUDA alone, torch shards on gloo as well.

    python -m torch.distributed.run --nproc-per-node=2 -m tests.sharded FOLDER distill ...

In FOLDER, whose `cache` is there, one run is begun and stopped by one process after three steps,
and another, stopped there before, is ended; then comes a command of `bkprune`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin

from bkprune.caching import Cache
from bkprune.cli import main
from tests.test_distill import distillation, quick

EMA, STEPS, STOP = 0.9, 6, 3


class Sharded(Accelerator):  # type: ignore[misc]
    """An accelerator told to shard, on processes that have no GPU."""

    def __init__(self, *args: Any, version: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        self.state.distributed_type = DistributedType.FSDP


def begin_and_end(folder: Path) -> None:
    """`begun` to step 3 in slices, `ended` from step 3 in slices."""
    cache = Cache(folder / "cache")

    def run() -> Any:
        settings = quick(steps=STEPS, batch_size=2, ema=EMA)
        return distillation(cache, settings, accelerator=Sharded(cpu=True))

    first = run()
    is_asked = first.acc.process_index == 1  # a signal that reaches one process alone
    assert not first.run(
        folder / "begun", "s", wants_stop=lambda: is_asked and bool(first.step == STOP)
    )
    slices = [p for p in first.student.parameters() if hasattr(p, "full_tensor")]
    assert len(slices) == len(list(first.student.parameters()))
    assert run().run(folder / "ended", "s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin_and_end(Path(sys.argv.pop(1)))
    accelerate.Accelerator = Sharded
    main()
