"""The garbage collector pauses inside and continues afterwards."""

from __future__ import annotations

import gc

import pytest

from library.runtime.garbage import gc_paused


def test_garbage_is_collected_again_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), gc_paused():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
