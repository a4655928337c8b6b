"""``--distill choose``: the teachers' share of the loss, chosen on held-out queries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import outputs, undeclared_settings
from transformers import TrainerCallback

from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline import RunConfig, run
from refine_fast.pipeline.evaluation.choice import ShareChoice, choose_share
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def scores(*values: float) -> Scores:
    return Scores({"ndcg@10": np.array(values)})


def test_a_better_share_is_chosen() -> None:
    rule = scores(*[0.5] * 20)
    better, best = scores(*[0.6] * 20), scores(*[0.7] * 20)
    choice = choose_share({0.0: better, 0.5: best, 1.0: rule}, 1.0)
    assert (choice.share, choice.rule) == (0.5, 1.0)
    assert choice.scores == pytest.approx({0.0: 0.6, 0.5: 0.7, 1.0: 0.5})
    assert choice.gains[0.5].low == pytest.approx(0.2)


def test_the_rule_keeps_what_is_not_measurably_better() -> None:
    """A higher mean whose interval holds 0; equal scores; no queries."""
    rule = scores(*[0.5] * 20)
    unclear = scores(*[1.0] * 11, *[0.1] * 9)
    assert unclear.metrics["ndcg@10"] > 0.5
    assert choose_share({0.0: unclear, 0.5: rule, 1.0: rule}, 0.5).share == 0.5
    choice = choose_share({0.0: scores(), 0.5: scores(), 1.0: scores()}, 1.0)
    assert choice.share == 1.0
    assert json.loads(json.dumps(choice.scores)) == {"0.0": 0.0, "0.5": 0.0, "1.0": 0.0}


@pytest.fixture
def all_distilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is 1, whatever the scores."""

    def chosen(dev: dict[float, Scores], rule: float) -> ShareChoice:
        return replace(choose_share(dev, rule), share=1.0)

    name = "refine_fast.pipeline.stages.choose_share.choose_share"
    monkeypatch.setattr(name, chosen)


def test_a_run(whole: Path, tmp_path: Path, all_distilled: None, monkeypatch, capsys) -> None:
    """The model is the one of a run with that share, byte for byte, and so is its curve; the report
    and the card say how it was chosen; a rerun does nothing; a stage declares what it reads."""
    out, given = (shutil.copytree(whole, tmp_path / name) for name in ("chosen", "given"))
    undeclared = undeclared_settings(monkeypatch)
    assert main(["run", "--out", str(out), "--distill", "choose"]) == 0
    assert not any(undeclared.values()), undeclared
    assert {"train", *(f"train {share}" for share in (0.0, 0.5, 1.0))} <= undeclared.keys()
    assert "  teachers' share 1; ndcg@10 on held-out queries: 0: 0." in capsys.readouterr().err
    facts = json.loads((out / "distill.json").read_text())
    assert (facts["share"], facts["rule"]) == (1.0, 0.5)
    assert facts["weights"] == {"0.0": 0.35, "0.5": 0.35, "1.0": 0.35}
    for share, score in facts["scores"].items():
        curve = json.loads((out / "distill" / share / "curve-0.35.json").read_text())
        assert score == pytest.approx(np.mean(curve["dev"]["ndcg@10"]))
    before = outputs(whole)["train"]["tuned"]
    assert outputs(out)["train 0.5"]["distill/0.5/tuned"] == before
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["share"] == facts
    assert {"train 0.0", "curve 0.35 of 1.0", "train"} <= report["stages"].keys()
    assert "curve 0.35" not in report["stages"]  # of the run before this one
    assert (
        "| teachers' share | 1, the best on held-out queries; ndcg@10 of the"
        in (out / "report.md").read_text()
    )
    assert "the teachers' share chosen on held-out" in (out / "model" / "README.md").read_text()

    assert main(["run", "--out", str(given), "--distill", "1", "--quiet"]) == 0
    chosen, expected = outputs(out), outputs(given)
    assert expected["train"]["tuned"] != before
    for name in ("tuned", "training.json"):
        assert chosen["train"][name] == expected["train"][name]
    assert chosen["train"]["curve-0.35.json"] == expected["curve 0.35"]["curve-0.35.json"]
    weights = [path / "model" / "model.safetensors" for path in (out, given)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    capsys.readouterr()
    assert main(["run", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "done in" not in said
    assert main(["plan", "--out", str(out), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["plan", "--out", str(given), "--json"]) == 0
    single = json.loads(capsys.readouterr().out)
    assert (planned["trainings"], single["trainings"]) == (3, 1)
    assert planned["steps"] == single["steps"]


def test_an_interrupted_choice_resumes(
    whole: Path, tmp_path: Path, all_distilled: None, monkeypatch, capsys
) -> None:
    """Within the second training, from its checkpoint; what was trained is not trained again."""
    out, uninterrupted = (shutil.copytree(whole, tmp_path / name) for name in ("some", "all"))
    command = ["train", "--distill", "choose", "--out"]
    assert main([*command, str(uninterrupted), "--quiet"]) == 0
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    starts: list[int] = []

    def interrupt(self: TrainerCallback, args, state, control, **kwargs: object) -> None:
        if starts[-1:] != [state.global_step]:  # several callbacks share this
            starts.append(state.global_step)
        if starts.count(0) == 2 and state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainerCallback, "on_step_begin", interrupt)
    assert main([*command, str(out), "--quiet"]) == 130
    assert list((out / ".work").rglob("checkpoint-*/complete"))
    del starts[:]
    capsys.readouterr()
    assert main([*command, str(out)]) == 0
    assert "train 0.0: up to date" in capsys.readouterr().err
    assert starts.count(0) == 1  # the third
    assert outputs(out)["train"] == outputs(uninterrupted)["train"]


def test_torchrun_is_refused(tmp_path: Path, docs: Path, monkeypatch) -> None:
    monkeypatch.setattr("refine_fast.pipeline.runner.launched", object)
    with pytest.raises(RefineFastError, match=r"^distill: choose trains several times, which "):
        run(RunConfig(out=tmp_path / "run", docs=docs, distill="choose"))
