"""``python -m refine_fast``: the same as the command ``refine-fast``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
