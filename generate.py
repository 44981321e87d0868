"""Sampling as a command of its own: any model, any data, one process or many, resumable.

    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl
    torchrun --nproc_per_node 8 generate.py --model DIR --data HUB/ID:SPLIT --out answers.jsonl \\
        --samples 4
    python generate.py --model NAME --data prompts.jsonl --out answers.jsonl \\
        --endpoint http://HOST:8000/v1   # vLLM, SGLang, ...

Answers are drawn from the model's own distribution (temperature 1, no top-k, no top-p), so that
they are samples of pi(.|x). A row of the output is {"id", "prompt", "response", "meta": {"sample",
"finish"}}, n rows a prompt in the prompts' order; finish is "stop" (the model ended by itself) or
"length" (cut). Where the text alone would give other tokens than those that were sampled,
meta.sampled_ids has these. What an endpoint refuses or leaves empty is left out and counted.

Rows are kept in OUT.part* as batches finish; started again, a killed run does only what is missing
and, batches and their seeds being fixed, gives the same file on any number of ranks.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import datafiles
import job
from common import (
    API_CONCURRENCY,
    Drawn,
    Model,
    Sampling,
    answer_row,
    chat,
    endpoint,
    every_sample,
    fitting,
    generate,
    load_tokenizer,
    warn_of_cut,
)


@dataclass(frozen=True)
class Config:
    model: str = ""  # model folder or Hub id; with --endpoint, the name the server knows it by
    data: str = ""  # .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    out: str = ""  # file to write
    # answers per prompt; --samples under torchrun, which on Python < 3.12.8 takes --n for one of
    # its own
    n: int = field(default=1, metadata={"also": "--samples"})
    temperature: float = 1.0  # 1 = the model's own distribution, 0 = greedy
    max_new_tokens: int = 512  # an answer of more tokens is cut
    limit: int | None = None  # use the first LIMIT rows
    batch: int = 64  # answers sampled at a time
    seed: int = 0  # of the sampling
    # auto = bfloat16 under CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # sample from this OpenAI-compatible server instead of a local model
    endpoint: str | None = None

    def __post_init__(self):
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        job.check_positive(self, "n", "max_new_tokens", "batch", "limit")
        job.check_not_negative(self, "temperature")


def generate_locally(out: Path, rows: list[dict], model: Model, c: Config) -> list[dict]:
    """n answers to each row's prompt from a model that is loaded here, in the file `out`."""
    sampling = Sampling(c.temperature, c.max_new_tokens, c.batch)
    return generate(out, rows, model, sampling, c.seed, n=c.n)


def generate_remotely(out: Path, rows: list[dict], client, c: Config) -> list[dict]:
    """The same from an OpenAI-compatible server. What it does not answer is left out."""

    def work(items, number):
        prompts = [rows[i]["prompt"] for i, _ in items]
        answers, fault = chat(
            client,
            c.model,
            prompts,
            temperature=c.temperature,
            top_p=1.0,
            max_tokens=c.max_new_tokens,
        )
        if fault:
            sys.exit(f"{fault}; start again: no answer is asked for twice")
        drawn = []
        for (i, j), answer in zip(items, answers):
            drawn.append(answer_row(rows[i], j, Drawn(*answer)) if answer else None)
        return drawn

    settings = [
        c.model,
        c.endpoint,
        c.temperature,
        c.max_new_tokens,
        [row["id"] for row in rows],
    ]
    answers = job.phase(out, every_sample(len(rows), c.n), work, API_CONCURRENCY, settings)
    if not answers:
        out.unlink(missing_ok=True)
        sys.exit(f"error: {c.endpoint} has answered none of {len(rows)} prompts: {client.fault}")
    warn_of_cut(out, answers, c.max_new_tokens)
    return answers


def leave_out_long(rows: list[dict], dropped: Counter, tok, config, c: Config) -> list[dict]:
    """The rows whose prompts leave room for an answer in the model's context.

    The others are counted in `dropped`. No row left ends the program.
    """
    room = config.max_position_embeddings - c.max_new_tokens
    short = fitting(tok, rows, room)
    what = f"{room} tokens, {c.model}'s context less --max_new_tokens"
    dropped[f"prompts of more than {what}"] = len(rows) - len(short)
    if not short:
        job.die(f"none of the {len(rows)} prompts has at most {what} {c.max_new_tokens}")
    return short


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 under CUDA, else float32."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def setup() -> torch.device:
    """Joins the process group under torchrun. Returns this rank's device."""
    if "RANK" in os.environ:
        # there are only barriers, and a slow rank is waited for
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def main():
    c = job.parse(Config)
    out = Path(c.out)
    if out.exists():
        job.die(f"{out} is there already: delete it, or choose another --out")

    # 1. the prompts
    rows, dropped = datafiles.load_rows(c.data, "prompt", c.limit)
    client = endpoint(c.endpoint) if c.endpoint else None
    if not client:
        tok, config = load_tokenizer(c.model)
        rows = leave_out_long(rows, dropped, tok, config, c)

    # 2. where they are answered
    device, dtype = setup(), pick_dtype(c.dtype)
    if job.on_rank_0():
        where = c.endpoint or f"{device.type}, {dtype}, {job.world_size()} rank(s)"
        left_out = job.left_out_note(dropped)
        print(f"{c.data}: {len(rows)} prompts x {c.n}{left_out}; {where}")

    # 3. the answers
    if client:
        answers = generate_remotely(out, rows, client, c)
    else:
        answers = generate_locally(out, rows, Model(c.model, tok, device, dtype), c)
    if job.on_rank_0():
        cut = [answer["meta"]["finish"] for answer in answers].count("length")
        missing = len(rows) * c.n - len(answers)
        left_out = job.left_out_note({"no answer from the endpoint": missing})
        print(f"{out}: {len(answers)} answers, {cut} cut at {c.max_new_tokens} tokens{left_out}")
    job.leave()


if __name__ == "__main__":
    main()
