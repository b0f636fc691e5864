"""Addresses of studies: passwords that nobody gets to see, and damaged files that are named."""

from __future__ import annotations

import logging
import re
import sqlite3
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

from lightning_bln._files import FileError
from lightning_bln.tuning import Recipe, study
from lightning_bln.tuning.queue import Queue, Store
from lightning_bln.tuning.recipe import DEMO, prepare
from lightning_bln.tuning.storage import masked, scrubbed

from ..damage import OTHER_FORMATS, assert_names, flipped, outcome, taken_in_spite, truncated

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = Path(__file__).parents[2] / "examples" / "tune.yaml"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ann:hush@host/db", "postgresql://ann:***@host/db"),
        ("postgresql+psycopg://ann:hush@host:5432/db", "postgresql+psycopg://ann:***@host:5432/db"),
        ("mysql+pymysql://ann:hu%40sh@host/db?charset=utf8", "mysql+pymysql://ann:***@host/db?charset=utf8"),
        ("postgresql://ann:hu@sh@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:hu/sh@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:hu:sh@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:hu?sh#@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://:hush@host/db", "postgresql://:***@host/db"),
        ("postgresql://ann@host/db", "postgresql://ann@host/db"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("postgresql:///db?host=x&password=hush&port=1", "postgresql:///db?host=x&password=***&port=1"),
        ("postgresql:///db?sslpassword=hush", "postgresql:///db?sslpassword=***"),
        ("postgresql://ann:hush@/db?host=/run", "postgresql://ann:***@/db?host=/run"),
        ("sqlite+pysqlcipher://:hush@/study.db", "sqlite+pysqlcipher://:***@/study.db"),
        ("redis://:hush@host:1", "redis://:***@host:1"),
        ("postgresql:ann:hush@host", "postgresql:***@host"),
        ("sqlite:////data/a:b@c/study.db", "sqlite:////data/a:b@c/study.db"),
        ("journal:/data/a:b@c", "journal:/data/a:b@c"),
        ("", ""),
        ("nonsense", "nonsense"),
    ],
)
def test_an_address_is_shown_without_its_password(url, shown) -> None:
    assert masked(url) == shown
    assert masked(shown) == shown


PASSWORDS = [
    "hushhush",
    "hush%40hush",
    "hush@hush",
    "hush/hush",
    "hush:hush",
    "hush?hush",
    "hush hush",
    "[hush",
    "hush#",
]


def urls(password: str) -> list[str]:
    return [
        f"postgresql://ann:{password}@127.0.0.1:1/db",
        f"postgresql://ann:{password}@127.0.0.1:port/db",
        f"postgresql://ann:{password}@no.such.host.invalid/db",
        f"mysql://ann:{password}@host/db",
        f"unknown+driver://ann:{password}@host/db",
        f"ann:{password}@host",
    ]


def assert_secret(error: BaseException, text: str = "") -> None:
    shown = text + "".join(traceback.format_exception(error)) + str(error) + repr(error)
    # the lines of source that a traceback shows are not at issue
    assert "hush" not in re.sub(r"^ .*\n", "", shown, flags=re.M)


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("place", range(len(urls(""))))
def test_a_server_that_cannot_be_reached_costs_no_secret(password, place, caplog) -> None:
    url = urls(password)[place]
    with pytest.raises(FileError, match=r"^storage=.*\*\*\*.*: no study can be read or made there") as caught:
        Store(url)
    assert "\n" not in str(caught.value)
    assert_secret(caught.value, caplog.text)


def plan(url: str, output: Path = Path()) -> study.Plan:
    return study.Plan(url, "bln", 3, output, 30, 3)


URL = "postgresql://ann:hushhush@host/db"


def test_other_directions_than_those_stored_cost_no_secret(monkeypatch) -> None:
    stored = SimpleNamespace(directions=[SimpleNamespace(name="MAXIMIZE")], get_trials=lambda deepcopy: [])
    monkeypatch.setattr(study, "Store", lambda *_: SimpleNamespace(storage=None))
    monkeypatch.setattr(optuna, "create_study", lambda **_: stored)
    with pytest.raises(ValueError, match=r"is a study in postgresql://ann:\*\*\*@host/db whose directions") as caught:
        study.open_queue(Recipe.parse(DEMO), plan(URL), 0)
    assert_secret(caught.value)


def test_a_database_without_locks_costs_no_secret() -> None:
    store = Store.__new__(Store)
    store.url, store.file = URL, None
    store.storage = SimpleNamespace(engine=SimpleNamespace(dialect=SimpleNamespace(name="mysql")))
    with (
        pytest.raises(ValueError, match=r"storage='postgresql://ann:\*\*\*@host/db' cannot be locked") as caught,
        store.exclusive("bln"),
    ):
        pass
    assert_secret(caught.value)


def test_workers_that_die_cost_no_secret(monkeypatch) -> None:
    class Dead:
        exitcode = 1

        def __init__(self, **_: Any) -> None:
            self.start = self.terminate = lambda: None

        def is_alive(self) -> bool:
            return False

    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Dead))
    monkeypatch.setattr(study, "POLL", 0.0)
    queue: Any = SimpleNamespace(is_finished=lambda: False)
    with pytest.raises(RuntimeError, match=r"is kept in postgresql://ann:\*\*\*@host/db") as caught:
        study.supervise(Recipe.parse(DEMO), plan(URL), 2, queue, lambda: None)
    assert_secret(caught.value)


def test_a_plan_shows_no_address() -> None:
    assert "hush" not in repr(plan(URL))


@pytest.mark.parametrize("password", PASSWORDS)
def test_errors_of_drivers_are_scrubbed(password) -> None:
    url = urls(password)[0]
    text = f"could not connect by {url} with password {password}, or {password.replace('%40', '@')}"
    assert "hush" not in scrubbed(text, url)
    assert scrubbed("a:b@c", "sqlite:///a:b@c") == "a:b@c"


@pytest.fixture(params=["sqlite:///", "journal:"])
def kept(request, tmp_path) -> str:
    """The address of a small study."""
    url = f"{request.param}{tmp_path / 'study'}"
    store = Store(url)
    made = optuna.create_study(storage=store.storage, study_name="bln", directions=["minimize"])
    queue = Queue(store, made, 3)
    for value in (1.0, 2.0):
        trial = queue.claim()
        trial.set_user_attr("bln_scores", {"cccc": value})
        made.tell(trial, trial.suggest_float("x", 0, 1))
    queue.close()
    return url


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_a_damaged_study_is_one_line_that_names_it(kept, damage, caplog) -> None:
    path = Path(kept.partition(":")[2].removeprefix("///"))

    def read() -> bool:
        queue = study.open_queue(Recipe.parse(DEMO), plan(kept), 0)
        queue.finished()
        queue.close()
        return True

    taken_in_spite(damage, path, read, FileError, flips=40)


def test_a_database_of_something_else_is_named(tmp_path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE studies (colour TEXT)")
    with pytest.raises(FileError, match=rf"storage=sqlite:///{path}: no study can be read"):
        study.open_queue(Recipe.parse(DEMO), plan(f"sqlite:///{path}"), 0)


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_a_folder_in_place_of_a_study_is_named(kind, tmp_path) -> None:
    with pytest.raises(FileError, match=rf"storage={kind}{tmp_path}: no study can be read"):
        study.open_queue(Recipe.parse(DEMO), plan(f"{kind}{tmp_path}"), 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_a_damaged_search_is_one_line_that_names_its_file(damage, tmp_path) -> None:
    logging.getLogger("lightning").setLevel(logging.ERROR)
    path, raw = tmp_path / "tune.yaml", EXAMPLE.read_bytes()
    kinds = {"truncated": truncated(raw), "flipped": flipped(raw, 40), "other": OTHER_FORMATS.values()}
    refused = 0
    for changed in kinds[damage]:
        path.write_bytes(changed)
        found, message = outcome(lambda: prepare(path, tmp_path / "out", 1, 1), FileError)
        if found is None:
            assert_names(message, tmp_path)
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fit: 7\nsearch: {a: [1]}", "fit is a int"),
        ("fit: {}\nsearch: [1]", "search is a list"),
        ("fit: nowhere.yaml\nsearch: {a: [1]}", "No such file"),
        ("fit: {trainer: 7}\nsearch: {seed_everything: [1]}", "fit.trainer is a int"),
        ("fit: {trainer: {callbacks: [7]}}\nsearch: {seed_everything: [1]}", "callbacks must be mappings"),
        ("fit: {}\nsearch: {seed_everything: [1]}\nseed: x", "seed='x'"),
        ("fit: {}\nsearch: {seed_everything: [1]}\nlatency: 1", "latency=1"),
        ("fit: {}\nsearch: {seed_everything: [1]}\nmonitor: [a]", r"monitor=\['a'\]"),
        ("fit: {}\nsearch: {seed_everything: [1]}\nmode: [a]", r"mode=\['a'\]"),
        ("fit: {}\nsearch: {7: [1]}", "search"),
        ("a: &a [x]\nb: *c", "undefined alias"),
    ],
)
def test_a_search_of_another_content_says_what_is_wrong(text, reason, tmp_path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(text)
    with pytest.raises(FileError, match=reason) as caught:
        Recipe.load(path)
    assert_names(str(caught.value), tmp_path)
