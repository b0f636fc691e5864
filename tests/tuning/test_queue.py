"""A queue of a fixed number of trials, whose workers may die."""

from __future__ import annotations

import pytest

optuna = pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

from lightning_bln.tuning.queue import SLOT, Queue, Store

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_a_killed_study_goes_on_where_it_was(kind, tmp_path) -> None:
    url = f"{kind}{tmp_path / 'study'}"

    def queue(trials: int) -> Queue:
        store = Store(url)
        study = optuna.create_study(storage=store.storage, study_name="s", load_if_exists=True)
        return Queue(store, study, trials)

    first = queue(3)
    one = first.claim()
    first.study.tell(one, one.suggest_float("x", 0, 1))
    two = first.claim()
    x = two.suggest_float("x", 0, 1)
    second = queue(3)
    three = second.claim()
    assert three.number == 2
    assert second.claim() is None  # two still runs
    assert not second.is_finished()
    first._lock.release()  # as the system does when a process dies
    again = second.claim()
    assert again.suggest_float("x", 0, 1) == x
    assert again.user_attrs[SLOT] == two.user_attrs[SLOT]
    second.study.tell(again, 0.0)
    second.study.tell(three, 0.0)
    assert second.claim() is None
    assert second.is_finished()
    assert len(second.finished()) == 3
    longer = queue(4)
    assert longer.claim().number == 4
    assert longer.claim() is None
