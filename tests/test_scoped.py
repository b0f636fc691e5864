"""Attributes set for a while are given back, whatever happens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_bln._scoped import setting


def test_nested_contexts_give_back_what_was_set_around_them() -> None:
    layer = nn.Linear(2, 2)
    with setting([layer], training=False, note=1):
        with setting([layer], training=True, note=2):
            assert layer.training
            assert layer.note == 2
        assert not layer.training
        assert layer.note == 1
    assert layer.training
    assert not hasattr(layer, "note")


def test_a_property_goes_through_its_setter() -> None:
    class Doubled:
        value = 1

        @property
        def double(self) -> int:
            return 2 * self.value

        @double.setter
        def double(self, double: int) -> None:
            self.value = double // 2

    one = Doubled()
    with setting([one], double=10):
        assert one.value == 5
    assert one.value == 1


def test_one_that_refuses_keeps_none_of_the_others_from_their_own() -> None:
    class Refusing(SimpleNamespace):
        def __setattr__(self, name: str, value: Any) -> None:
            if value in self.__dict__.get("refused", ()):
                raise ValueError(value)
            super().__setattr__(name, value)

    one, other = SimpleNamespace(x=1), Refusing(x=1, refused=())
    with pytest.raises(ValueError, match="1"), setting([one, other], x=5):
        other.refused = (1,)
    assert one.x == 1
    one, other = SimpleNamespace(x=1), Refusing(x=1, refused=(5,))
    with pytest.raises(ValueError, match="5"), setting([one, other], x=5):
        pass
    assert (one.x, other.x) == (1, 1)
