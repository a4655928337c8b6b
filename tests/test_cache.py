"""What is made once: whole or not at all, and the first of two processes wins."""

from __future__ import annotations

import subprocess
import sys
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


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    """Not what another process is making, however many are."""
    code = """
import sys
from pathlib import Path
from refine_fast.pipeline.cache import made_once

with made_once(Path(sys.argv[1]) / "thing") as folder:
    (folder / "part").touch()
    print(flush=True)
    sys.stdin.read()
"""

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        maker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert maker.stdout is not None
        maker.stdout.readline()
        return maker

    (tmp_path / "other").mkdir()
    with start() as killed, start() as living:
        assert len(list(tmp_path.glob("*/content/part"))) == 2
        killed.kill()
        killed.wait()
        with made_once(tmp_path / "one"):
            assert len(list(tmp_path.glob("*/content/part"))) == 2
        living.kill()
        living.wait()
        with made_once(tmp_path / "two"):
            assert not list(tmp_path.glob("*/content/part"))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "other"}
