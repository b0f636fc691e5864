"""A study as a queue with a fixed number of trials, worked off by any number of processes, each of which may die.

Every trial belongs to a slot, numbered from 0. A slot is done when one of its trials has finished. A trial whose
process died is marked as failed, and its slot gets another one with the same hyperparameters. All changes of the queue
happen under one lock, which the operating system or the database server releases when its holder dies.
"""

from __future__ import annotations

import os
import threading
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from lightning_bln.tuning._private import storage_of, trial_id
from lightning_bln.tuning.storage import FILES, masked, opening

SLOT, OWNER, ERROR = "bln_slot", "bln_owner", "bln_error"
"""Names of a trial's user attributes: its slot, the worker that runs it, and the traceback that ended it."""

OPEN = (TrialState.WAITING, TrialState.RUNNING)
"""States of trials that have not ended."""


@contextmanager
def advisory_lock(engine: Any, name: str) -> Iterator[None]:
    """Within the context, no other process holds the lock of this name in a PostgreSQL database."""
    from sqlalchemy import text

    with engine.begin() as connection:  # the lock ends with the transaction, or the connection
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": zlib.crc32(name.encode())})
        yield


@contextmanager
def creating(address: str) -> Iterator[None]:
    """Within the context, no other process creates tables in the database, where it can be locked."""
    from sqlalchemy import create_engine

    engine = create_engine(address)
    try:
        if engine.dialect.name == "postgresql":
            with advisory_lock(engine, "tables"):
                yield
        else:
            yield
    finally:
        engine.dispose()


class Store:
    """The storage of a study, with locks for its workers.

    Args:
        url: ``sqlite:///path``, ``journal:path``, or another database by its SQLAlchemy URL.
        heartbeat: Seconds between two heartbeats of a running trial in a database; after four without one it is lost.
    """

    def __init__(self, url: str, heartbeat: int = 30) -> None:
        self.url = url
        kind, _, path = url.partition(":")
        self.file = Path(path.removeprefix("///") if kind == "sqlite" else path) if kind in FILES else None
        self.storage: Any
        with opening(url):
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            if kind == "journal":
                from optuna.storages.journal import JournalFileBackend, JournalStorage

                self.storage = JournalStorage(JournalFileBackend(str(self.file)))
                return
            waits = {"connect_args": {"timeout": 60}} if kind == "sqlite" else {"pool_pre_ping": True}
            address = f"postgresql+psycopg:{path}" if kind in ("postgres", "postgresql") else url
            with (
                self._file_lock() if self.file is not None else creating(address)
            ):  # two must not create tables at once
                self.storage = optuna.storages.RDBStorage(
                    address, engine_kwargs=waits, heartbeat_interval=heartbeat, grace_period=4 * heartbeat
                )

    def _file_lock(self) -> FileLock:
        return FileLock(f"{self.file}.queue.lock")  # not .lock, which a journal itself uses

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Within the context, no other process is within it for the same study."""
        if self.file is not None:
            with self._file_lock():
                yield
        elif self.storage.engine.dialect.name == "postgresql":
            with advisory_lock(self.storage.engine, name):
                yield
        else:
            raise ValueError(
                f"storage={masked(self.url)!r} cannot be locked; use sqlite:///, journal: or postgresql://"
            )

    @contextmanager
    def alive(self, trial: optuna.Trial) -> Iterator[None]:
        """Within the context, a thread sends the trial's heartbeats to the database."""
        if not isinstance(self.storage, optuna.storages.RDBStorage):
            yield
            return
        done, storage = threading.Event(), self.storage

        def beat() -> None:
            while not done.wait(storage.heartbeat_interval):
                storage.record_heartbeat(trial_id(trial))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def worker_lock(self, owner: str) -> FileLock | None:
        """The lock that a worker holds while it lives, for a study in a file; any death releases it."""
        return None if self.file is None else FileLock(f"{self.file}.worker-{owner}.lock")

    def is_dead(self, owner: str | None) -> bool:
        """Whether a worker has died, for a study in a file; in a database only heartbeats tell, so always False."""
        if self.file is None:
            return False
        if owner is None:
            return True
        lock = self.worker_lock(owner)
        assert lock is not None
        try:
            with lock.acquire(timeout=0):
                Path(lock.lock_file).unlink(missing_ok=True)
                return True
        except Timeout:
            return False


class Queue:
    """One worker's view of a study of ``trials`` trials.

    Args:
        store: The study's storage.
        study: The study, loaded from it.
        trials: Number of trials in the end.
        retries: How many more trials a slot may get whose process died.
    """

    def __init__(self, store: Store, study: optuna.Study, trials: int, retries: int = 3) -> None:
        self.store, self.study, self.trials, self.retries = store, study, trials, retries
        self.owner = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._lock = store.worker_lock(self.owner)
        if self._lock is not None:
            self._lock.acquire()

    def close(self) -> None:
        """Release the lock by which others see that this worker lives."""
        if self._lock is not None:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def claim(self) -> optuna.Trial | None:
        """The next trial to run, marked as this worker's; None where no trial waits at present."""
        with self.store.exclusive(self.study.study_name):
            self._fail_lost()
            self._fill()
            waiting = [one for one in self._in_range() if one.state == TrialState.WAITING]
            if not waiting:
                return None
            key = trial_id(waiting[0])  # not study.ask(), which adds a trial where none waits
            storage = storage_of(self.study)
            if hasattr(storage, "record_heartbeat"):
                storage.record_heartbeat(key)  # before it runs: a trial without any heartbeat never counts as lost
            storage.set_trial_user_attr(key, OWNER, self.owner)
            if not storage.set_trial_state_values(key, TrialState.RUNNING):
                return None
        return optuna.Trial(self.study, key)

    def is_finished(self) -> bool:
        """Whether no trial waits or runs; one that another process runs may still be lost, and come back."""
        return not any(one.state in OPEN for one in self._in_range())

    def finished(self) -> list[FrozenTrial]:
        """One trial for each slot that is done."""
        return [one for one in self._in_range() if is_done(one)]

    def _in_range(self) -> list[FrozenTrial]:
        """Trials of this worker's slots; a longer search of the same study has more."""
        every = self.study.get_trials(deepcopy=False)
        return [one for one in every if one.user_attrs.get(SLOT, self.trials) < self.trials]

    def _fail_lost(self) -> None:
        """Mark trials as failed whose process died."""
        optuna.storages.fail_stale_trials(self.study)
        for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.store.is_dead(one.user_attrs.get(OWNER)):
                storage_of(self.study).set_trial_state_values(trial_id(one), TrialState.FAIL)

    def _fill(self) -> None:
        """Enqueue a trial for every slot that is without one, with the hyperparameters of the one it lost."""
        slots: dict[int, list[FrozenTrial]] = {slot: [] for slot in range(self.trials)}
        for one in self._in_range():
            slots[one.user_attrs[SLOT]].append(one)
        for slot, tried in slots.items():
            is_taken = any(one.state in OPEN or is_done(one) for one in tried)
            if not is_taken and len(tried) <= self.retries:
                self.study.enqueue_trial(tried[-1].params if tried else {}, user_attrs={SLOT: slot})


def is_done(trial: FrozenTrial) -> bool:
    """Whether a trial ended by itself: with a value, by pruning, or by an exception."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and ERROR in trial.user_attrs
    )
