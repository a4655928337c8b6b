"""What is made once: whole or not at all, and the first of two processes wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_fast.pipeline.cache import made_once


def test_made_once(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "thing"
    with pytest.raises(FileNotFoundError, match="lacking"), made_once(place) as folder:
        (folder / "lacking").read_text()
    assert list(place.parent.iterdir()) == []
    with made_once(place) as slower:
        (slower / "slower").touch()
        with made_once(place) as faster:
            (faster / "faster").touch()
    assert [path.name for path in place.iterdir()] == ["faster"]
    assert list(place.parent.iterdir()) == [place]
