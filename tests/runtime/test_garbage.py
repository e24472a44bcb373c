"""The search for garbage stops inside and goes on afterwards."""

from __future__ import annotations

import gc

import pytest

from library.runtime.garbage import garbage_left_alone


def test_garbage_is_collected_again_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), garbage_left_alone():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
