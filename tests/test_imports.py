"""Imports of large packages rest the garbage collector, and leave it as it was."""

from __future__ import annotations

import gc

import pytest

from refine_fast.imports import uncollected


def imports_what_is_missing() -> None:
    with uncollected():
        assert not gc.isenabled()
        raise ImportError


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ImportError):
            imports_what_is_missing()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
