"""The study folder: every file name, how records are written, stamped, checked and resumed.

A record is a CSV or JSON file that a person can open. Beside the records lies `stamps.json`, which
says what made each of them: version, settings, hashes of the inputs. This file does not know what a
record means or how it is computed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import bkprune

BLOCKS = "blocks.csv"
IMPORTANCE = "importance.csv"
COST = "cost.csv"
LATENCY = "latency.csv"
MACHINE = "machine.json"
VALIDATION = "validation.csv"
JOURNAL = "search.journal"
CANDIDATES = "candidates.csv"
FINALISTS = "finalists.csv"
WINNER = "winner.json"
EVAL = "eval.csv"
DIFFERENCES = "differences.csv"
EVALUATION = "evaluation.json"
PICTURES = "pictures"
FIGURES = "figures"
_STAMPS = "stamps.json"


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, flush to the disk, rename: no reader ever sees half a file.

    Raises:
        OSError: the folder cannot be written or the disk is full; the target is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def digest(value: Any) -> str:
    """Short hash of plain data, equal for equal content in any order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stamp:
    """What made a record."""

    version: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @classmethod
    def of(cls, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Stamp:
        """The stamp of a record that this version makes now."""
        return cls(bkprune.__version__, json.loads(json.dumps(settings)), dict(inputs))

    @property
    def key(self) -> str:
        """One hash over all of it."""
        return digest([self.version, self.settings, self.inputs])

    def difference(self, other: Stamp) -> str:
        """The first thing in which two stamps differ, for people: `name: theirs, now ours`."""
        ours = {"version": self.version, **self.settings, **self.inputs}
        theirs = {"version": other.version, **other.settings, **other.inputs}
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                return f"{name} was {theirs.get(name)!r}, now {ours.get(name)!r}"
        return "nothing"


class Study:
    """A folder of records. Nothing is written before the first save."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: a file is in the way; give a folder with --out")

    def path(self, name: str) -> Path:
        """Where a record lies."""
        return self.folder / name

    def stamp_of(self, name: str) -> Stamp | None:
        """Who made a record, or None where it is missing or unstamped."""
        stamps = self._stamps()
        if name not in stamps or not self.path(name).exists():
            return None
        entry = stamps[name]
        return Stamp(entry["version"], entry["settings"], entry["inputs"])

    def is_current(self, name: str, stamp: Stamp) -> bool:
        """Whether the record is there and was made by exactly this stamp."""
        made = self.stamp_of(name)
        return made is not None and made.key == stamp.key

    def save_table(self, name: str, table: pd.DataFrame, stamp: Stamp) -> Path:
        """Write a CSV record and its stamp; six significant digits."""
        text = table.to_csv(index=False, float_format="%.6g")
        return self.save_bytes(name, text.encode(), stamp)

    def save_bytes(self, name: str, data: bytes, stamp: Stamp) -> Path:
        """Write any record and its stamp."""
        write_atomic(self.path(name), data)
        entry = {"version": stamp.version, "settings": stamp.settings, "inputs": stamp.inputs}
        stamps = {**self._stamps(), name: entry}
        write_atomic(self.path(_STAMPS), (json.dumps(stamps, indent=1) + "\n").encode())
        return self.path(name)

    def load_table(self, name: str, stamp: Stamp | None = None) -> pd.DataFrame:
        """Read a CSV record; with a stamp, refuse one that something else has made.

        Raises:
            ValueError: missing, unreadable or stale; the message says what differs.
        """
        path = self.path(name)
        if not path.exists():
            raise ValueError(f"{path}: no such record; run the command that makes it first")
        made = self.stamp_of(name)
        if stamp is not None and (made is None or made.key != stamp.key):
            why = "it has no stamp" if made is None else stamp.difference(made)
            raise ValueError(f"{path} is stale: {why}; make it again or use another folder")
        try:
            return pd.read_csv(path)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV table ({error})") from error

    def _stamps(self) -> dict[str, Any]:
        path = self.path(_STAMPS)
        if not path.exists():
            return {}
        try:
            stamps = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); delete it to start afresh") from error
        if not isinstance(stamps, dict):
            raise ValueError(f"{path}: not a table of stamps; delete it to start afresh")
        return stamps


class Unfinished:
    """Arrays measured so far, kept beside a record until it is whole.

    A file that another stamp has left, or that a kill has torn, is ignored.
    """

    def __init__(self, study: Study, name: str, stamp: Stamp) -> None:
        self._path = study.path(f".{name}.unfinished.npz")
        self._key = stamp.key
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        if self._path.exists():
            try:
                with np.load(io.BytesIO(self._path.read_bytes()), allow_pickle=False) as stored:
                    if str(stored["stamp"]) == self._key:
                        self.arrays = {k: stored[k] for k in stored.files if k != "stamp"}
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                self.arrays = {}

    def save(self) -> None:
        """Write everything measured so far."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**self.arrays, "stamp": np.array(self._key)}
        np.savez(buffer, **arrays)
        write_atomic(self._path, buffer.getvalue())

    def clear(self) -> None:
        """Forget it: the record is whole."""
        self._path.unlink(missing_ok=True)
