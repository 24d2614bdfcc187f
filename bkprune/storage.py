"""Where a search's trials are kept: a journal file that survives kills, or a database for many.

Knows how a journal is opened and mended, and who is working on a study. It does not know what a
trial means.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from datetime import datetime
from pathlib import Path

import optuna
import psutil
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

NAMELESS_S = 60.0


def open_storage(storage: str | None, journal: Path) -> BaseStorage:
    """The journal file of the study folder, or any storage URL that Optuna takes.

    Raises:
        ValueError: it cannot be opened.
    """
    if storage is None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(journal))
        repair_journal(journal, lock)
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
    for attempt in range(3):
        try:
            return optuna.storages.get_storage(storage)
        except Exception as error:  # each database driver has exceptions of its own
            if attempt == 2:
                raise ValueError(
                    f"--storage {_without_password(storage)}: cannot be opened "
                    f"({str(error).splitlines()[0]})"
                ) from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _without_password(url: str) -> str:
    head, _, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://...@{tail}" if head else url


def repair_journal(path: Path, lock: JournalFileOpenLock) -> None:
    """Cut off a last line that a kill has torn; what is cut is kept in a file beside it."""
    if not path.exists():
        return
    lock.acquire()
    try:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            path.with_suffix(".torn").write_bytes(data[end:])
            with path.open("r+b") as file:
                file.truncate(end)
                file.flush()
                os.fsync(file.fileno())
    finally:
        lock.release()


def worker() -> str:
    """Who is measuring: host, process and when it began, so that a pid used again is told apart."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_dead(name: str | None, since: datetime | None = None) -> bool:
    """Whether a worker of this machine is gone; of other machines nothing is known.

    A trial without a name is between two lines of code, or was when its worker died: after
    `NAMELESS_S` it is taken for dead.
    """
    if name is None:
        return since is not None and (datetime.now() - since).total_seconds() > NAMELESS_S
    host, pid, created = name.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != created
    except psutil.NoSuchProcess:
        return True


def start_afresh(journal: Path) -> None:
    """Put a journal aside under a name that nothing reads."""
    if journal.exists():
        shutil.move(journal, journal.with_suffix(".old"))
