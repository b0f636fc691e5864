"""A study as a queue of exactly so many trials, that any number of processes work off and any of them may die in.

Every trial belongs to a slot, numbered from 0. A slot is done when a trial of it has finished; a trial whose process
died is failed and its slot gets another one with the same hyperparameters. All changes of the queue happen under one
lock that the operating system or the database server releases when its holder dies.
"""

from __future__ import annotations

import os
import threading
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

SLOT, OWNER, ERROR = "bln_slot", "bln_owner", "bln_error"
"""Names of a trial's user attributes: its slot, the worker that runs it, and the exception that ended it."""

OPEN = (TrialState.WAITING, TrialState.RUNNING)


class Store:
    """Where a study is kept.

    Args:
        url: ``sqlite:///path``, ``journal:path``, or another database as SQLAlchemy names it.
        heartbeat: Seconds between a running trial's signs of life in a database; after four without one it is lost.
    """

    def __init__(self, url: str, heartbeat: int = 30) -> None:
        self.url = url
        kind, _, path = url.partition(":")
        self.file = (
            Path(path.removeprefix("///") if kind == "sqlite" else path) if kind in ("sqlite", "journal") else None
        )
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.storage: Any
        if kind == "journal":
            from optuna.storages.journal import JournalFileBackend, JournalStorage

            self.storage = JournalStorage(JournalFileBackend(str(self.file)))
            return
        if kind in ("postgres", "postgresql"):
            url = f"postgresql+psycopg:{path}"
        waits = {"connect_args": {"timeout": 60}} if kind == "sqlite" else {"pool_pre_ping": True}
        with self._file_lock() if self.file is not None else nullcontext():  # two must not create the tables at once
            self.storage = optuna.storages.RDBStorage(
                url, engine_kwargs=waits, heartbeat_interval=heartbeat, grace_period=4 * heartbeat
            )

    def _file_lock(self) -> FileLock:
        return FileLock(f"{self.file}.queue.lock")  # a journal has a .lock of its own

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Within the context no other process is in it for the same study."""
        if self.file is not None:
            with self._file_lock():
                yield
        elif self.storage.engine.dialect.name == "postgresql":
            from sqlalchemy import text

            with self.storage.engine.begin() as connection:  # the lock ends with the transaction, or the connection
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": zlib.crc32(name.encode())})
                yield
        else:
            raise ValueError(f"storage={self.url!r} cannot be locked; use sqlite:///, journal: or postgresql://")

    @contextmanager
    def alive(self, trial_id: int) -> Iterator[None]:
        """Within the context the trial shows that it is being worked on."""
        if not isinstance(self.storage, optuna.storages.RDBStorage):
            yield
            return
        done, storage = threading.Event(), self.storage

        def beat() -> None:
            while not done.wait(storage.heartbeat_interval):
                storage.record_heartbeat(trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def worker_lock(self, owner: str) -> FileLock | None:
        """What a worker holds as long as it lives, where the study is a file: the system releases it on any death."""
        return None if self.file is None else FileLock(f"{self.file}.worker-{owner}.lock")

    def is_dead(self, owner: str | None) -> bool:
        """Whether a worker is known to have died: for files at once, for databases only heartbeats tell."""
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
        store: Where the study is kept.
        study: The study, loaded from it.
        trials: How many trials there shall be.
        retries: How often a slot whose process died is tried again.
    """

    def __init__(self, store: Store, study: optuna.Study, trials: int, retries: int = 3) -> None:
        self.store, self.study, self.trials, self.retries = store, study, trials, retries
        self.owner = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._lock = store.worker_lock(self.owner)
        if self._lock is not None:
            self._lock.acquire()

    def close(self) -> None:
        """Say that this worker is through."""
        if self._lock is not None:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def claim(self) -> optuna.Trial | None:
        """The next trial to run, now this worker's own; None where there is none left to start at present."""
        with self.store.exclusive(self.study.study_name):
            self._fail_lost()
            self._fill()
            waiting = [one for one in self._all() if one.state == TrialState.WAITING and self._is_in_range(one)]
            if not waiting:
                return None
            trial_id = waiting[0]._trial_id  # no public name, and ask() would make a trial more where none waits
            storage = self.study._storage
            if hasattr(storage, "record_heartbeat"):
                storage.record_heartbeat(trial_id)  # before it runs: one without any is never found to be lost
            storage.set_trial_user_attr(trial_id, OWNER, self.owner)
            if not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return None
        return optuna.Trial(self.study, trial_id)

    def is_finished(self) -> bool:
        """Whether nothing waits or runs; a trial that another process runs may yet be lost and come back."""
        return not any(one.state in OPEN for one in self._all() if self._is_in_range(one))

    def finished(self) -> list[FrozenTrial]:
        """The trials that count: one for each slot that is done."""
        return [one for one in self._all() if self._is_in_range(one) and is_done(one)]

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _is_in_range(self, trial: FrozenTrial) -> bool:
        return trial.user_attrs.get(SLOT, self.trials) < self.trials

    def _fail_lost(self) -> None:
        optuna.storages.fail_stale_trials(self.study)
        for one in self._all():
            if one.state == TrialState.RUNNING and self.store.is_dead(one.user_attrs.get(OWNER)):
                self.study._storage.set_trial_state_values(one._trial_id, TrialState.FAIL)

    def _fill(self) -> None:
        """Give every slot that has no trial one, with the hyperparameters of the one it lost."""
        slots: dict[int, list[FrozenTrial]] = {slot: [] for slot in range(self.trials)}
        for one in self._all():
            slots.setdefault(one.user_attrs.get(SLOT, self.trials), []).append(one)
        for slot in range(self.trials):
            tried = slots[slot]
            if any(one.state in OPEN or is_done(one) for one in tried) or len(tried) > self.retries:
                continue
            self.study.enqueue_trial(tried[-1].params if tried else {}, user_attrs={SLOT: slot})


def is_done(trial: FrozenTrial) -> bool:
    """Whether a trial ended by itself: with a value, pruned, or in an exception of its own."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and ERROR in trial.user_attrs
    )
