"""Records are whole or absent, stamped, and refused when stale."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bkprune.study import Stamp, Study, Unfinished, write_atomic

STAMP = Stamp.of({"grain": "block", "seed": 1}, {"model": "abc"})
TABLE = pd.DataFrame({"unit": ["a", "b"], "score": [1 / 3, 2e-9]})


def test_a_table_comes_back_with_six_digits(tmp_path: Path) -> None:
    study = Study(tmp_path / "new")
    path = study.save_table("t.csv", TABLE, STAMP)
    assert path.read_text() == "unit,score\na,0.333333\nb,2e-09\n"
    pd.testing.assert_frame_equal(study.load_table("t.csv", STAMP), TABLE, rtol=1e-5)
    assert study.is_current("t.csv", STAMP)


def test_a_stale_table_is_refused_with_both_names(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.save_table("t.csv", TABLE, STAMP)
    other = Stamp.of({"grain": "block", "seed": 2}, {"model": "abc"})
    assert not study.is_current("t.csv", other)
    with pytest.raises(ValueError, match="stale: seed was 1, now 2"):
        study.load_table("t.csv", other)
    with pytest.raises(ValueError, match=r"none\.csv: no such record"):
        study.load_table("none.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "record"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


def test_what_is_unfinished_survives_a_kill_but_not_other_settings(tmp_path: Path) -> None:
    study = Study(tmp_path)
    first = Unfinished(study, "t.csv", STAMP)
    first.arrays["output"] = np.array([1.0, np.nan])
    first.save()
    again = Unfinished(study, "t.csv", STAMP)
    np.testing.assert_array_equal(again.arrays["output"], [1.0, np.nan])
    other = Stamp.of({"seed": 9}, {})
    assert Unfinished(study, "t.csv", other).arrays == {}
    file = next(tmp_path.glob(".t.csv*"))
    file.write_bytes(file.read_bytes()[:40])
    assert Unfinished(study, "t.csv", STAMP).arrays == {}
    again.clear()
    assert not list(tmp_path.glob(".t.csv*"))


def test_a_file_in_the_way_and_a_broken_stamp_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file is in the way"):
        Study(tmp_path / "file")
    (tmp_path / "stamps.json").write_text("{")
    with pytest.raises(ValueError, match=r"stamps\.json: not JSON"):
        Study(tmp_path).is_current("t.csv", STAMP)
