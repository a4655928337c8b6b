"""report: collects the outputs of the other stages and renders them."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...files import name_of, read_json
from ..artifacts import (
    ACCOUNT,
    CHUNK_FACTS,
    CHUNKS,
    DISTILL_FACTS,
    FUSION_FACTS,
    HELD_OUT,
    MINING_FACTS,
    QUERIES,
    SERVED,
    SETS,
    SYSTEMS,
    TEACHING_FACTS,
    TRAINING_FACTS,
    all_scores,
    base_embeddings,
    curve_file,
    fused_weight,
    read_negatives,
    read_scores,
    read_taught,
    relevant_rows,
    similarity_name,
    stage_costs,
    training_view,
)
from ..corpus.jsonl import read_records
from ..evaluation.choice import Choice
from ..evaluation.scores import Scores
from ..evaluation.significance import Gain
from ..queries.query import Query
from ..queries.splits import in_domain_set
from ..reporting.data import (
    Curve,
    Documents,
    Mining,
    Queries,
    Relabelled,
    ReportData,
    Served,
    SetScores,
    Training,
    Triple,
)
from ..reporting.format import loss_in_words
from ..reporting.moved import moved_queries
from ..reporting.render import write_report

if TYPE_CHECKING:
    from ..context import RunContext

PACKAGES = ("torch", "transformers", "sentence-transformers", "refine-fast")
"""Packages whose versions the report states."""

SAMPLE = 20_000
"""Pairs of a query and a random passage in the histogram of similarities."""

TRIPLES = 20
"""Queries that the report shows with their passages."""


def run(context: RunContext, folder: Path) -> None:
    """Writes report.md, report.json, report.html and the figures."""
    write_report(folder, collect(context))


def collect(context: RunContext) -> ReportData:
    """The content of the report, from the files of the run folder."""
    config = context.config
    sets = _set_scores(context)
    weight, in_domain = fused_weight(context.out), sets.pop("in_domain")
    data = in_domain_set(
        context.judged_corpus,
        context.path(CHUNKS),
        context.path(HELD_OUT),
        built_in=context.built_in,
    )
    gained, lost = moved_queries(data, in_domain.at_weight[0], in_domain.at_weight[weight])
    return ReportData(
        documents=_documents(context),
        queries=_queries(context),
        mining=_mining(context),
        training=_training(context),
        weight=weight,
        choice=_choice(context),
        curves=_curves(context),
        in_domain=in_domain,
        out_of_domain=list(sets.values()),
        gained=gained,
        lost=lost,
        costs=_costs(context),
        fusion=config.fusion,
        served=_served(context) if config.served else None,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    )


def _costs(context: RunContext) -> dict[str, tuple[float, int]]:
    """Of the stages before this one; their files are in the key, what they took is not."""
    costs = stage_costs(context.out)
    tried = [
        name
        for share in (context.shares if context.chooses_distill else ())
        for name in (
            f"train {share!r}",
            *(f"curve {weight!r} of {share!r}" for weight in context.compared_weights),
        )
    ]
    curve = (f"curve {weight!r}" for weight in context.curve_weights)
    scores = (f"score {system}" for system in SYSTEMS)
    sentences = ["sentences"] if context.config.mine_by == "sentence" else []
    teach = ["teach"] if context.teacher_kind is not None else []
    first = ("chunk", "query", "embed", *sentences, "mine", *teach, *tried, "train")
    served = ["systems"] if context.config.served else []
    stages = (*first, *curve, "choose", *scores, *served, "fuse")
    return {name: costs[name] for name in stages if name in costs}


def _documents(context: RunContext) -> Documents:
    docs = context.config.docs
    built_in = f"the language reference of Python {platform.python_version()}"
    source = built_in if docs is None else name_of(docs)
    return Documents(source, **read_json(context.path(CHUNK_FACTS)))


def _queries(context: RunContext) -> Queries:
    config = context.config
    queries = read_records(context.path(QUERIES), Query)
    return Queries(
        source=context.query_source,
        made=context.made,
        kinds=dict(Counter(query.kind for query in queries)),
        held_out_by_document=not context.has_test_queries,
        account=read_json(context.path(ACCOUNT)) if config.llm_writes else None,
    )


def _mining(context: RunContext) -> Mining:
    config = context.config
    facts = read_json(context.path(MINING_FACTS))
    random_scores, answer_scores = _similarities(context)
    low, high = facts["band"]
    return Mining(
        similarity=similarity_name(context.out),
        band=(low, high),
        calibrated=config.band == "auto",
        skip=config.skip,
        per_query=read_json(context.path(TRAINING_FACTS))["negatives"],
        select=config.select,
        mine_by=config.mine_by,
        relative_margin=config.relative_margin,
        queries=facts["queries"],
        empty=facts["empty"],
        random_scores=random_scores,
        answer_scores=answer_scores,
        relabelled=None if context.teacher_kind is None else _relabelled(context),
        grading=None
        if context.teacher_kind != "llm"
        else read_json(context.path(TEACHING_FACTS))["grading"],
        triples=_triples(context),
    )


def _relabelled(context: RunContext) -> Relabelled:
    facts = read_json(context.path(TEACHING_FACTS))
    return Relabelled(str(context.teacher_name), facts["relabelled"], facts["negatives"])


def _training(context: RunContext) -> Training:
    config = context.config
    facts = read_json(context.path(TRAINING_FACTS))
    loss = [value for _, value in facts["loss"]]
    tenth = max(1, len(loss) // 10)
    return Training(
        base=context.base_name,
        temperature=config.temperature,
        learning_rate=config.lr,
        batch_size=config.batch_size,
        similar_batches=facts["similar_batches"],
        epochs=facts["epochs"],
        steps=facts["steps"],
        examples=facts["examples"],
        precision=facts["precision"],
        seed=config.seed,
        loss_function=loss_in_words(facts["distill"], facts["teachers"], context.teacher_name),
        loss=(float(np.mean(loss[:tenth])), float(np.mean(loss[-tenth:]))),
        share=read_json(context.path(DISTILL_FACTS)) if context.chooses_distill else None,
    )


def _choice(context: RunContext) -> Choice | None:
    if not context.chooses_weight:
        return None
    facts = read_json(context.path(FUSION_FACTS))
    return Choice(**{**facts, "gain": Gain(**facts["gain"]), "guard": Gain(**facts["guard"])})


def _curves(context: RunContext) -> tuple[Curve, Curve]:
    """The curves of the weights on the documents and on general knowledge."""
    curve = {weight: read_scores(context.path(curve_file(weight))) for weight in context.weights}
    dev, guard = ({w: sets[name] for w, sets in curve.items()} for name in ("dev", "guard"))
    return (
        Curve(name="your documents", at_weight=dev),
        Curve(name="general knowledge", at_weight=guard),
    )


def _set_scores(context: RunContext) -> dict[str, SetScores]:
    """Test set -> the scores of every system on it."""
    systems = all_scores(context.out)
    at_weight = {
        0.0: systems["base"],
        1.0: systems["fine-tuned"],
        fused_weight(context.out): systems["fused"],
    }
    passages = read_json(context.path(SETS))
    return {
        name: SetScores(
            name=name.removeprefix("ood:"),
            passages=passages[name],
            bm25=bm25,
            at_weight={weight: sets[name] for weight, sets in at_weight.items()},
        )
        for name, bm25 in systems["BM25"].items()
    }


def _served(context: RunContext) -> Served:
    """The systems under base and product."""
    facts = read_json(context.path(SERVED))
    return Served(
        facts["passages"],
        {
            side: {
                system: Scores({name: np.array(column) for name, column in scores.items()})
                for system, scores in about["scores"].items()
            }
            for side, about in facts["sides"].items()
        },
        {side: about["choice"] for side, about in facts["sides"].items()},
    )


def _similarities(context: RunContext) -> tuple[np.ndarray, np.ndarray]:
    """Similarities under the base model between queries and random passages, and between queries
    and the passages that answer them."""
    q, d = base_embeddings(context.out)
    random = np.random.default_rng(context.config.seed)
    rows, columns = random.integers(len(q), size=SAMPLE), random.integers(len(d), size=SAMPLE)
    pairs = [
        (row, column)
        for row, answers in enumerate(relevant_rows(*training_view(context.out)).values())
        for column in answers
    ]
    answered = np.array(pairs)
    return np.einsum("nd,nd->n", q[rows], d[columns]), np.einsum(
        "nd,nd->n", q[answered[:, 0]], d[answered[:, 1]]
    )


def _triples(context: RunContext) -> tuple[Triple, ...]:
    """A random sample of the training queries with their passages."""
    q, d = base_embeddings(context.out)
    chunks, queries = training_view(context.out)
    relevant = list(relevant_rows(chunks, queries).items())
    passage = {chunk.id: chunk.passage for chunk in chunks}
    if context.teacher_kind is None:
        negatives = read_negatives(context.out)
    else:
        taught = read_taught(context.out)
        negatives = {text: about["negatives"] for text, about in taught.items()}
    trained = read_json(context.path(TRAINING_FACTS))["negatives"]
    drawn = np.random.default_rng(context.config.seed).permutation(len(relevant))[:TRIPLES]
    triples = []
    for i in drawn:
        text, rows = relevant[i]
        positive = chunks[rows[0]].passage, float(q[i] @ d[rows[0]])
        seen = negatives[text][:trained]
        mined = ((passage[found["chunk_id"]], found["score"]) for found in seen)
        triples.append(Triple(text, positive, tuple(mined)))
    return tuple(triples)
