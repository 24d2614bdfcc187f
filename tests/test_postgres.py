"""Workers that share a study in PostgreSQL; skipped where the server is not installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.pool import NullPool

ROOT = Path(__file__).parents[1]
N_TRIALS = 24

WORKER = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from tests.conftest import SMALL, build
from bkprune.profiling import Profile, ProfileSettings
from bkprune.search import Search, SearchSettings
from bkprune.skeleton import Skeleton
from bkprune.space import Budget, Space
from bkprune.storage import open_storage

table = Profile(Skeleton("small", build(SMALL).to("meta")), ProfileSettings()).table
space = Space(table, "pair")
budget = Budget.parse("macs<=0.8x", space.teacher)
alone = np.random.default_rng(0).gamma(0.5, size=len(space))

def quality(mask):
    time.sleep(0.05)
    x = space.bits(mask).astype(float)
    return float(alone @ x + 0.1 * (alone @ x) ** 2), 0.0

settings = SearchSettings(grain="pair", n_trials={n}, budgets=("macs<=0.8x",))
storage = open_storage(sys.argv[1], None)
scores = dict(zip(space.names, alone))
Search(space, scores, [budget], settings, storage).run(quality)
"""


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server of our own in a temporary folder, reached by a socket alone."""
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    initdb, server = _binary("initdb"), _binary("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="bkpg"))
    who: dict[str, Any] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        who = {"user": "postgres", "group": "postgres"}
        shutil.chown(folder, "postgres", "postgres")
    data = str(folder / "data")
    try:
        subprocess.run(
            [initdb, "-D", data, "-A", "trust", "-U", "bk", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **who,
        )
        options = ["-D", data, "-k", str(folder), "-c", "listen_addresses=", "-F"]
        process = subprocess.Popen(
            [server, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **who,
        )
        url = f"postgresql+psycopg://bk@/postgres?host={folder}"
        _wait_for(folder / ".s.PGSQL.5432")
        yield url
        process.terminate()
        process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(socket: Path) -> None:
    for _ in range(300):
        if socket.exists():
            time.sleep(0.3)
            return
        time.sleep(0.1)
    raise AssertionError("PostgreSQL did not start within 30 s")


def _start(url: str, script: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "ignore", str(script), url], cwd=ROOT)


def test_two_workers_and_one_is_killed(postgres: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), n=N_TRIALS))
    storage = optuna.storages.RDBStorage(postgres, engine_kwargs={"poolclass": NullPool})
    doomed, other = _start(postgres, script), _start(postgres, script)
    for _ in range(900):
        names = [found.study_name for found in storage.get_all_studies()]
        if "bkprune" in names and doomed.pid in _workers(storage):
            break
        time.sleep(0.1)
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    assert other.wait(timeout=300) == 0
    again = _start(postgres, script)  # the same command: finds what the dead one left
    assert again.wait(timeout=300) == 0
    states = [trial.state.name for trial in _trials(storage)]
    assert "RUNNING" not in states
    masks = [json.dumps(t.params, sort_keys=True) for t in _done(storage)]
    assert len(masks) == len(set(masks)) >= N_TRIALS
    assert {doomed.pid, other.pid} <= _workers(storage)


def _trials(storage: Any) -> list[Any]:
    study = optuna.load_study(study_name="bkprune", storage=storage)
    return list(study.get_trials(deepcopy=False))


def _done(storage: Any) -> list[Any]:
    return [trial for trial in _trials(storage) if trial.state.name == "COMPLETE"]


def _workers(storage: Any) -> set[int]:
    return {int(t.user_attrs["worker"].rsplit(":", 2)[1]) for t in _done(storage)}
