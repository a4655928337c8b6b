"""The options of a run: the type, the default and the line of help of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from .config_values import (
    AnyPath,
    Band,
    BeirSets,
    Encoder,
    Encoding,
    Engine,
    ExistingPath,
    JsonObject,
    Memory,
    Mix,
    Name,
    Names,
    PerChunk,
    Positive,
    QueryKinds,
    Rank,
    ShardPlace,
    Share,
    Teacher,
    Weights,
)
from .encoder.load import DEFAULT_ENCODER


def _option(default: Any, help: str, metavar: str, **constraints: Any) -> Any:
    constraints["json_schema_extra"] = {"metavar": metavar}
    return Field(default, description=help, **constraints)


class Options(BaseModel):
    """What ``RunConfig`` checks and decides upon. The flags are in this order."""

    out: AnyPath = _option(..., "run folder; created if missing, resumed if it exists", "FOLDER")
    recipe: Literal["best", "paper"] = _option(
        "best",
        "best: what benchmarks/recipe.py found best; paper: the constants of REFINE "
        "(arXiv 2410.12890); any option overrides it",
        "NAME",
    )
    docs: ExistingPath | None = _option(
        None,
        "a folder of .txt, .md, .html, .pdf, .docx and .pptx files or of tables (.jsonl, .json, "
        ".csv, .tsv, .xlsx, .parquet), one such file, a BEIR folder or a saved dataset",
        "DOCS",
    )
    encoding: Encoding | None = _option(
        None,
        "encoding of the documents, and of --queries if it is not UTF-8, such as windows-1251 "
        "(default: detected)",
        "NAME",
    )
    text_column: Name | None = _option(
        None, "column of a table that holds the text (default: recognized by name)", "NAME"
    )
    title_column: Name | None = _option(
        None, "column that holds the title (default: recognized by name)", "NAME"
    )
    id_column: Name | None = _option(
        None, "column that holds the id (default: recognized by name)", "NAME"
    )
    dedup: Literal["near", "exact", "keep"] = _option(
        "near",
        "which duplicate chunks to remove: near (and exact), exact, or keep all; a chunk that "
        "--queries names is never removed as a near duplicate",
        "HOW",
    )
    model: Encoder = _option(
        DEFAULT_ENCODER,
        "the encoder to adapt: a folder, a Hugging Face name, or minilm (bundled)",
        "NAME",
    )
    query_prompt: str | None = _option(
        None, "text before every query, such as 'query: ' (default: the encoder's own)", "TEXT"
    )
    document_prompt: str | None = _option(
        None,
        "text before every document, such as 'passage: ' (default: the encoder's own)",
        "TEXT",
    )
    similarity: Literal["cosine", "dot"] | None = _option(
        None, "how embeddings are compared: cosine or dot (default: the encoder's own)", "HOW"
    )
    dimensions: int | None = _option(
        None, "use only the first N dimensions of a Matryoshka encoder", "N", ge=1
    )
    trust_remote_code: bool = _option(
        False, "run Python code in the folders of encoder and teacher: yes or no", "YES"
    )
    limit: int | None = _option(
        None, "use at most this many chunks: whole documents, drawn by the seed", "N", ge=2
    )
    chunk_tokens: int = _option(
        256, "longest chunk, in the encoder's tokens; at most what the encoder reads", "N", ge=32
    )
    engine: Engine = _option(
        "local",
        "where documents are cut, texts encoded and negatives mined, and on GPUs the encoder "
        "trained: local, this process; ray, a Ray cluster on this machine, started if there is "
        "none; ray://HOST:PORT, that cluster",
        "ENGINE",
    )
    shards: ShardPlace | None = _option(
        None,
        "object storage through which --engine ray exchanges files with its workers, such as "
        "s3://BUCKET/PREFIX (default: folders that all nodes see)",
        "URL",
    )
    train_workers: Rank | Literal["auto"] = _option(
        "auto",
        "how many workers of --engine ray train, sharing each batch; 0: the process that runs the "
        "command trains; auto: one for each GPU of the cluster, 0 if it has none",
        "N",
    )
    seed: int = _option(
        0, "the same inputs and seed give the same outputs", "N", ge=0, le=2**32 - 1
    )

    queries: ExistingPath | None = _option(
        None,
        "your own questions: JSON lines {text, doc_id}, a file's id being its path below DOCS; a "
        "BEIR folder (train; dev or validation chooses the weight); or a file of another tool",
        "FILE",
    )
    queries_per_chunk: PerChunk | Literal["auto"] = _option(
        "auto",
        "queries to make, or have written, for each chunk; auto: make 3, have --llm write 2",
        "N",
    )
    query_kinds: QueryKinds = _option(
        (),
        "kinds of query to make from the documents, in turn: cloze, title, span, question, "
        "definition, keywords, crop; with --llm or --queries they are made besides, or none "
        "(default: span,keywords,question; none with --queries or another --llm than smollm2)",
        "KIND,...",
    )
    llm: Name | None = _option(
        None,
        "have a language model write the queries: an OpenAI-compatible URL, or several that share "
        "the calls; smollm2 (inside a package), or transformers (in this process)",
        "URL,...",
    )
    llm_model: Names = _option(
        (), "name of the language model; several share the chunks", "NAME,..."
    )
    llm_key_env: Name = _option(
        "OPENAI_API_KEY", "environment variable that holds the API key, if one is needed", "NAME"
    )
    llm_mix: Mix = _option(
        (("question", 0.5), ("keywords", 0.2), ("claim", 0.15), ("how-to", 0.15)),
        "kinds of query and their shares",
        "KIND=SHARE,...",
    )
    llm_temperature: float | None = _option(
        None, "sampling temperature (default: the server's own)", "T", ge=0
    )
    llm_reply_tokens: int = _option(512, "longest reply, in tokens", "N", ge=16)
    llm_extra: JsonObject = _option(
        {},
        'more fields of each request, such as \'{"reasoning_effort": "low"}\'',
        "JSON",
    )
    llm_batch: bool = _option(
        False,
        "send the requests as OpenAI batches, which cost half and may take a day: yes or no",
        "YES",
    )
    llm_concurrency: int = _option(
        64, "calls at a time at each endpoint; fewer where the server asks for it", "N", ge=1
    )
    llm_timeout: Positive = _option(
        120.0, "longest time that a call may take; tried three times", "SECONDS"
    )
    prompt: ExistingPath | None = _option(
        None, "your own prompt; start from the output of 'refine-fast prompt'", "FILE"
    )
    max_calls: int | None = _option(
        None, "stop after this many calls, counted over all starts in the run folder", "N", ge=1
    )
    max_tokens: int | None = _option(
        None, "stop after this many tokens, prompts and replies together", "N", ge=1
    )
    max_cost: Positive | None = _option(
        None, "stop at this cost, by --price-in and --price-out", "AMOUNT"
    )
    price_in: float = _option(0.0, "price of a million prompt tokens", "AMOUNT", ge=0)
    price_out: float = _option(0.0, "price of a million reply tokens", "AMOUNT", ge=0)
    duplicates: Literal["near", "exact", "keep"] = _option(
        "near",
        "which duplicates of a model's queries to drop: near (and exact), exact, or keep all",
        "HOW",
    )
    round_trip: Rank | Literal["auto"] = _option(
        "auto",
        "keep a query only if the encoder ranks its chunk in the top N and clearly above similar "
        "ones; 0 keeps all; auto: 10 if the model runs in this process, else 0",
        "N",
    )
    judge: bool = _option(
        False,
        "have the model judge whether a chunk answers its query, and drop the query if not: "
        "yes or no",
        "YES",
    )
    judge_prompt: ExistingPath | None = _option(
        None, "your own judge prompt; start from the output of 'refine-fast prompt judge'", "FILE"
    )
    held_out: float = _option(
        0.2, "share of the queries kept as a test, by whole documents", "SHARE", gt=0, le=0.5
    )

    band: Band = _option(
        "auto",
        "cosine similarity of hard negatives to the query; auto fits it to the encoder",
        "LOW,HIGH",
    )
    skip: int = _option(
        5, "leave out this many most similar documents before applying the band", "N", ge=0
    )
    relative_margin: Share | None = _option(
        None,
        "leave out negatives more similar to the query than (1 - SHARE) of its positive's "
        "similarity; 0.05 in NV-Retriever (default: the band alone)",
        "SHARE",
    )
    negatives: Rank | Literal["auto"] = _option(
        "auto",
        "hard negatives per query; 0 trains on in-batch negatives alone; auto: 4 with --teacher; "
        "else 1 is mined, and trained on unless the loss is distillation alone, to which it adds "
        "nothing but time",
        "N",
    )
    select: Literal["hardest", "random"] = _option(
        "hardest", "which documents in the band to take: hardest or random", "HOW"
    )
    mine_by: Literal["passage", "sentence"] = _option(
        "passage",
        "whose similarity counts: passage, or sentence, its best one (encodes every sentence)",
        "WHAT",
    )

    epochs: Positive | Literal["auto"] = _option(
        "auto",
        "passes over the training queries; auto: 1, or up to 4 where 1 makes fewer than 30 steps",
        "N",
    )
    max_steps: int | None = _option(None, "stop training after this many steps", "N", ge=1)
    batch_size: int = _option(
        64, "queries per batch; the documents of the others are negatives", "N", ge=2
    )
    batches: Literal["auto", "random", "similar"] = _option(
        "auto",
        "which queries share a batch: random ones, or groups of 8 with similar documents, which "
        "are each other's negatives; auto: random if the loss is distillation alone, else similar",
        "HOW",
    )
    lr: Positive = _option(1e-4, "peak learning rate", "RATE")
    warmup: Share = _option(0.1, "share of the steps over which the learning rate rises", "SHARE")
    temperature: Positive = _option(0.02, "temperature of the contrastive loss", "TAU")
    distill: Share | Literal["auto", "choose"] = _option(
        "auto",
        "share of distillation in the loss, from the frozen encoder and BM25 or --teacher; the "
        "rest is InfoNCE; auto: 0.5 with --teacher, or if queries are made without a language "
        "model, else 0.25; choose: trains with 0, auto's share and 1, and keeps auto's unless "
        "another is better on held-out queries",
        "SHARE",
    )
    teacher: Teacher | None = _option(
        None,
        "a cross-encoder of sentence-transformers, a folder or a Hugging Face name, or llm, the "
        "model of --llm: it scores each training query with its positives and mined negatives "
        "once, teaches beside the frozen encoder, in place of BM25, and drops negatives that it "
        "scores above a positive",
        "NAME",
    )
    teacher_temperature: Positive = _option(
        1.0,
        "the teacher's target is softmax(logit / T); a larger T separates its scores less",
        "T",
    )
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "fp32, bf16, or auto: bf16 where the hardware supports it", "TYPE"
    )
    lora: int | None = _option(
        None, "train a LoRA adapter of this rank instead of every weight", "RANK", ge=1
    )
    train_layers: int | None = _option(
        None,
        "train only the last N layers of the transformer: faster, in less memory (default: all)",
        "N",
        ge=1,
    )
    memory: Memory = _option(
        None,
        "memory that training may use, such as 8GB; more is faster "
        "(default: half of the machine's)",
        "SIZE",
    )

    weight: Share | Literal["auto"] = _option(
        "auto",
        "share of the fine-tuned encoder in the fusion; auto chooses it, and keeps the base where "
        "no weight is better",
        "W",
    )
    curve: Weights = _option(
        (0.0, 0.2, 0.35, 0.5, 0.75, 1.0), "fusion weights to compare and to choose from", "W,W,..."
    )
    tolerance: Share = _option(
        0.005,
        "largest loss of ndcg@10 on general knowledge that auto accepts, relative to the base",
        "SHARE",
    )
    fusion: Literal["weights", "embeddings"] = _option(
        "weights",
        "interpolate weights; or embeddings, with the frozen encoder in the loss and when serving",
        "HOW",
    )
    ood: BeirSets = _option(
        None,
        "BEIR folder to check for forgetting, or nanobeir, or one of its sets such as "
        "nanobeir/scifact; repeatable; none: no check (default: questions of general knowledge)",
        "SET",
    )
    ood_passages: int = _option(
        1000, "sample larger out-of-domain sets down to this many passages", "N", ge=10
    )

    served: bool = _option(
        True,
        "score base and product in the system that is served too (sentences, BM25, their blend), "
        "which encodes every sentence of up to 1,000 passages: yes or no",
        "YES",
    )
