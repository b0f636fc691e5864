"""A model for searches in processes of their own, found there by its class path; and a PostgreSQL server."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_bln.demo import RowClassifier


class Logged(RowClassifier):
    """Writes a line to a file when its training ends, and at each epoch to another; can wait for one to go, or fail."""

    def __init__(
        self,
        log: str | None = None,
        held_by: str | None = None,
        fail_once: str | None = None,
        fail_epoch: int = 0,
        epochs_log: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size=4, **options)
        self.log_path, self.held_by, self.fail_once = log, held_by, fail_once
        self.fail_epoch, self.epochs_log = fail_epoch, epochs_log

    def on_train_start(self) -> None:
        while self.held_by is not None and Path(self.held_by).exists():
            time.sleep(0.02)

    def on_train_epoch_start(self) -> None:
        self._write(self.epochs_log, f"{self.lr!r} {self.current_epoch} {self.global_step}")
        if self.fail_once is not None and self.current_epoch == self.fail_epoch and not Path(self.fail_once).exists():
            Path(self.fail_once).touch()
            raise RuntimeError("fails the first time")

    def on_fit_end(self) -> None:
        self._write(self.log_path, repr(self.lr))

    @staticmethod
    def _write(path: str | None, line: str) -> None:
        if path is not None:
            with open(path, "a") as file:
                file.write(f"{line}\n")


def small_search(epochs: int = 1, **model: Any) -> dict[str, Any]:
    """A search whose trials take no time."""
    return {
        "fit": {
            "seed_everything": 0,
            "model": {"class_path": "tuning_helpers.Logged", "init_args": model},
            "data": {"class_path": "lightning_bln.demo.DigitRows"},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": epochs,
                "limit_train_batches": 2,
                "limit_val_batches": 2,
                "num_sanity_val_steps": 0,
            },
        },
        "search": {
            "model.init_args.lr": {"low": 1e-3, "high": 3e-2, "log": True},
            "model.init_args.norm": ["bln", "layer", "batch"],
        },
    }


def environment() -> dict[str, str]:
    """The environment of a process that shall find this file and the package."""
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}", "OMP_NUM_THREADS": "1"}


@contextmanager
def ray_cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of one machine, as ``ray start --head`` makes it: its address, and an environment that may use it."""
    probes = [socket.socket() for _ in range(2)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    port, clients = (probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    folder = tempfile.mkdtemp(prefix="bln-ray-")
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    command += [
        f"--port={port}",
        f"--ray-client-server-port={clients}",
    ]
    command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
    allowed = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = subprocess.Popen(command, env=allowed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert head.stdout is not None
        said = ""
        while "Ray runtime started" not in said:
            line = head.stdout.readline()
            if not line:
                raise RuntimeError(f"ray start has failed:\n{said}")
            said += line
        yield f"{re.findall('Local node IP: ([0-9.]+)', said)[0]}:{port}", allowed
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def postgresql_binaries() -> Path | None:
    """The folder of PostgreSQL's programs, or None where it is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextmanager
def postgresql_server() -> Iterator[str]:
    """A server of its own on loopback, with an empty database; gives its URL. Skips where there is none installed."""
    binaries = postgresql_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed; apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="bln-postgresql-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        import pwd

        names = {one.pw_name for one in pwd.getpwall()}
        entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **user}
    server = None
    try:
        subprocess.run(
            [binaries / "initdb", "-D", folder / "data", "-U", "bln", "-A", "trust", "--no-sync"], check=True, **quiet
        )
        options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", folder / "data", "-p", str(port), *(f"-c{one}" for one in options)], **quiet
        )
        for _ in range(300):
            ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
            if subprocess.run(ready, check=False).returncode == 0:
                break
            time.sleep(0.1)
        yield f"postgresql://bln@127.0.0.1:{port}/postgres"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
