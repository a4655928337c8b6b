"""What the rows say of the code that was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from refine_fast.bench import machine


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with sources, and an extension that was built from them."""
    monkeypatch.delenv("REFINE_FAST_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "checkout"
    monkeypatch.setattr(machine, "CHECKOUT", root)
    installed = tmp_path / "site-packages" / "refine_fast"
    monkeypatch.setattr(machine, "_core", SimpleNamespace(__file__=str(installed / "_core.so")))
    for name in ("csrc/a.cc", "refine_fast/a.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("one")
    git(root, "init", "--quiet")
    commit_all(root)
    (installed / "bench").mkdir(parents=True)
    note(root, git(root, "rev-parse", "--short", "HEAD"), git(root, "rev-parse", "HEAD:csrc"))
    return root


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit_all(root: Path) -> str:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "a change")
    return git(root, "rev-parse", "--short", "HEAD")


def note(root: Path, commit: str, csrc: str) -> None:
    """What CMakeLists.txt leaves beside the extension."""
    installed = root.parent / "site-packages" / "refine_fast" / "bench"
    (installed / "built_from.txt").write_text(f"{commit}\n{csrc}\n")


def test_commit_of_a_checkout(checkout: Path) -> None:
    first = machine.commit()
    assert first == git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "README.md").write_text("two")
    assert machine.commit() == first
    (checkout / "refine_fast" / "a.py").write_text("two")
    assert machine.commit() == f"{first}+"
    second = commit_all(checkout)
    assert machine.commit() == second != first


def test_an_extension_of_other_sources_is_marked(checkout: Path) -> None:
    """Until it is built again, whatever git says of the files."""
    (checkout / "csrc" / "a.cc").write_text("two")
    second = commit_all(checkout)
    assert machine.commit() == f"{second}+"
    note(checkout, second, git(checkout, "rev-parse", "HEAD:csrc") + "+")
    assert machine.commit() == f"{second}+"
    note(checkout, second, git(checkout, "rev-parse", "HEAD:csrc"))
    assert machine.commit() == second


def test_an_installed_package_knows_what_it_was_built_from(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it lies in another project's repository."""
    first = machine.commit()
    monkeypatch.setattr(machine, "CHECKOUT", checkout / "refine_fast")
    assert machine.commit() == first
    note(checkout, f"{first}+", "")
    assert machine.commit() == f"{first}+"
    note(checkout, "", "")  # built from an sdist
    assert machine.commit() == ""
    monkeypatch.setenv("REFINE_FAST_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_no_commit_where_git_refuses(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == ""
    monkeypatch.undo()
    monkeypatch.delenv("REFINE_FAST_COMMIT", raising=False)
    monkeypatch.setattr(machine, "CHECKOUT", checkout)
    (checkout / ".git" / "HEAD").write_text("no reference")
    assert machine.commit() == ""


def test_the_build_noted_what_it_was_built_from() -> None:
    """In a checkout the file is there, whichever way the package is installed."""
    if not (machine.CHECKOUT / ".git").exists():
        pytest.skip("not a checkout")
    noted = Path(machine._core.__file__).parent / "bench" / "built_from.txt"
    commit, tree = noted.read_text().splitlines()
    assert len(commit.rstrip("+")) >= 7
    assert len(tree.rstrip("+")) == 40


def test_virtual_machines_of_several_generations_have_names_of_their_own() -> None:
    def info(vendor: str, family: int, model: int, name: str) -> str:
        one = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        return (one + f"model name\t: {name}\nflags\t\t: fpu vme\nbugs\t\t:\n\n") * 2

    assert machine.cpu_name(info("AuthenticAMD", 25, 1, "AMD EPYC")) == "AMD EPYC (Zen 3)"
    assert machine.cpu_name(info("AuthenticAMD", 25, 17, "AMD EPYC")) == "AMD EPYC (Zen 4)"
    assert machine.cpu_name(info("AuthenticAMD", 26, 2, "AMD EPYC")) == "AMD EPYC (Zen 5)"
    assert machine.cpu_name(info("AuthenticAMD", 23, 49, "AMD EPYC")) == "AMD EPYC"
    assert machine.cpu_name(info("GenuineIntel", 6, 143, "Xeon")) == "Xeon"
    assert machine.cpu_name("processor\t: 0\nBogoMIPS\t: 50.00\n") == ""  # of an Arm
