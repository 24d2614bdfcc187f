"""Where a training run stands: its log and its checkpoints, which no kill leaves half written.

Knows the files of a run folder, how checkpoints are rotated, and how the log is cut back to the
checkpoint a run resumes from. It does not know losses or networks.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bkprune.study import write_atomic

LOG, CHECKPOINTS, PREVIEWS, RUN = "train.jsonl", "checkpoints", "previews", "distill.json"
_STATE = "state.pt"
SPEED = ("images_per_s",)  # columns of the log that say nothing about the run itself


class Checkpoints:
    """The checkpoints of one run, newest last; `stamp` names the run they belong to."""

    def __init__(self, folder: Path, stamp: str, keep: int = 2) -> None:
        self.folder, self.stamp, self.keep = folder / CHECKPOINTS, stamp, keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write one, flush it to the disk, and forget the oldest ones.

        Raises:
            OSError: the disk is full; the checkpoints before this one are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:08d}"
        beside = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        try:
            with open(beside / _STATE, "wb") as file:
                torch.save({"step": step, "stamp": self.stamp, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.exists() else []

    def latest(self) -> dict[str, Any] | None:
        """The newest that can be read, on the CPU, or None.

        Raises:
            ValueError: it belongs to a run with other settings.
        """
        for path in reversed(self._all()):
            try:
                state: dict[str, Any] = torch.load(
                    path / _STATE, map_location="cpu", weights_only=True
                )
            except (OSError, RuntimeError, EOFError, ValueError):
                continue
            if state["stamp"] != self.stamp:
                raise ValueError(
                    f"{path}: of a run with other settings, data, teacher or student "
                    f"({state['stamp']}, now {self.stamp}); use another --out"
                )
            return state
        return None


class Log:
    """`train.jsonl`: one line a step."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self.path = folder / LOG
        self.rows = [row for row in read_log(folder) if row["step"] <= last_step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomic(self.path, text.encode())
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def add(self, row: dict[str, Any]) -> None:
        """Append a step."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Done."""
        self._file.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run's log; a last line that a kill has torn is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
