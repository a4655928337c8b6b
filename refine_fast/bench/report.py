"""``--report``: everything that is shown of the results, written from them."""

from __future__ import annotations

from pathlib import Path

from ..errors import RefineFastError
from ..files import atomic
from .plots import write_plots
from .tables import with_tables


def write_report(root: Path, results: Path) -> list[Path]:
    """Writes the tables of README.md and the plots; what is up to date stays as it is.

    Args:
        root: the checkout.
        results: the folder of csv files.

    Returns:
        The files that changed.
    """
    readme = root / "README.md"
    if not readme.is_file() or not results.is_dir():
        raise RefineFastError(
            f"--report needs README.md and {results} in the current folder; run it in a checkout."
        )
    changed = []
    before = readme.read_text(encoding="utf-8")
    after = with_tables(before, results)
    if after != before:
        with atomic(readme) as temporary:
            temporary.write_text(after, encoding="utf-8")
        changed.append(readme)
    return changed + write_plots(results, results.parent / "plots")
