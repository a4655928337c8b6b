"""The configuration of a run that is resumed: what its config.yaml gives, and what flags change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import SMALL

from refine_fast.errors import RefineFastError
from refine_fast.pipeline import run
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.config_file import load_config
from refine_fast.pipeline.recipes import QUICK


def test_a_run_folder_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    docs, run = tmp_path / "docs", tmp_path / "run"
    docs.mkdir()
    run.mkdir()
    begun = RunConfig(docs=docs, out=run, skip=3)
    (run / "config.yaml").write_text(begun.to_yaml())
    assert load_config(None, {"out": run}) == begun
    assert load_config(None, {"out": run, "docs": docs}).skip == 5
    (tmp_path / "mine.yaml").write_text("skip: 2\nband: 0.3,0.5\n")
    mine = load_config(tmp_path / "mine.yaml", {"out": run, "recipe": "paper"})
    assert (mine.docs, mine.skip, mine.band, mine.weight) == (docs, 2, (0.3, 0.5), 0.35)
    (run / "config.yaml").write_text("")  # not the defaults, whose documents are others
    with pytest.raises(RefineFastError, match=r"config.yaml is empty; give DOCS and the options"):
        load_config(None, {"out": run})


def test_a_flag_of_a_resumed_run_keeps_what_was_asked_for(tmp_path: Path) -> None:
    """However often it is resumed; also where the file of a run is given for another run."""
    run, docs = tmp_path / "run", tmp_path / "docs"
    docs.mkdir()
    run.mkdir()
    saved = run / "config.yaml"
    saved.write_text(RunConfig(out=run, max_steps=7, skip=3, weight=0.5).to_yaml())
    saved.write_text(load_config(None, {"out": run, "seed": "1"}).to_yaml())
    for flags in ({"out": run}, {"out": tmp_path / "other", "docs": docs}):
        path = saved if "docs" in flags else None
        changed = load_config(path, {**flags, "recipe": "paper", "fusion": "embeddings"})
        assert (changed.skip, changed.weight, changed.negatives) == (3, 0.5, 1)
        again = load_config(path, {**flags, "epochs": "2"})
        assert (again.max_steps, again.epochs, again.seed) == (7, 2, 1)
        demo = path is None
        assert (again.batch_size, again.served) == ((32, False) if demo else (64, True))
        quick = load_config(path, flags, QUICK)
        assert (quick.limit, quick.max_steps) == (QUICK["limit"], QUICK["max_steps"] if demo else 7)
    saved.write_text(saved.read_text().replace("max_steps: 7\n", ""))  # taken back
    assert load_config(None, {"out": run, "epochs": "2"}).max_steps is None
    saved.write_text(saved.read_text().replace("given:\n", "given: 3\nwas:\n"))
    with pytest.raises(RefineFastError, match=r"has given: 3; write a list of names, or remove"):
        load_config(saved, {})


def test_a_refusal_names_what_an_earlier_start_was_given(tmp_path: Path) -> None:
    """Else "give one of the two" would be told to somebody who gave one."""
    saved = tmp_path / "config.yaml"
    begun, now = {"lora": 4}, {"train_layers": 2}
    fusion = {"fusion": "embeddings"}
    for before, after in ((begun, now), (now, begun), (fusion, {"weight": "0"})):
        saved.write_text(RunConfig(out=tmp_path, max_steps=7, **before).to_yaml())
        [name] = before
        told = rf"\. An earlier start was given {name}: give it anew, or delete its line in {saved}"
        with pytest.raises(RefineFastError, match=told):
            load_config(None, {"out": tmp_path, **after})
    with pytest.raises(RefineFastError, match=r"give one of the two\.$"):
        load_config(None, {"out": tmp_path, **begun, **now})


@pytest.mark.parametrize("quick", [{}, QUICK])
def test_a_flag_of_a_resumed_run_does_what_it_does_in_a_new_one(
    tmp_path: Path, quick: dict[str, object]
) -> None:
    """What config.yaml holds only because the run began with another value goes with that value."""
    demo, docs = tmp_path / "demo", tmp_path / "docs"
    docs.mkdir()
    asked: list[dict[str, object]] = [{"out": demo}, {"out": tmp_path, "docs": docs}]
    begun = [load_config(None, flags, quick) for flags in asked]
    for config in begun:
        (config.out / "config.yaml").parent.mkdir(exist_ok=True)
        (config.out / "config.yaml").write_text(config.to_yaml())
        flags = {"out": config.out, "epochs": "2"}
        assert load_config(None, flags, quick).max_steps is None
        assert load_config(None, {**flags, "max_steps": "7"}, quick).max_steps == 7
        assert load_config(None, {"out": config.out}, quick) == config
    embeddings = load_config(None, {"out": demo, "fusion": "embeddings"})
    assert (embeddings.weight, embeddings.max_steps) == (0.35, begun[0].max_steps)
    (demo / "config.yaml").write_text(embeddings.to_yaml())
    assert load_config(None, {"out": demo, "fusion": "weights"}).weight == "auto"
    assert load_config(None, {"out": demo, "fusion": "weights", "weight": "0.5"}).weight == 0.5
    (tmp_path / "mine.yaml").write_text("epochs: 3")
    assert load_config(tmp_path / "mine.yaml", {"out": demo}, quick).max_steps is None


def test_a_store_that_the_rest_of_a_run_does_not_use_is_named(
    tmp_path: Path, tiny: Path, docs: Path, capsys
) -> None:
    """Only where a start was stopped: a run that has ended left nothing there."""
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **SMALL)
    earlier = config.model_copy(update={"engine": "ray", "shards": "s3://bucket/prefix"})
    left = "s3://bucket/prefix may hold files of an earlier start of this run; delete them\n"
    for stopped in (True, False):
        shutil.rmtree(config.out, ignore_errors=True)
        (config.out / ".work" / "chunk").mkdir(parents=True)
        if not stopped:
            (config.out / ".work" / "chunk").rmdir()
        (config.out / "config.yaml").write_text(earlier.to_yaml())
        run(config, until="chunk")
        assert (left in capsys.readouterr().err) == stopped
