"""Sampling as a command of its own: any model, any data, one process or many, resumable.

    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl
    torchrun --nproc_per_node 8 generate.py --model DIR --data HUB/ID:SPLIT --out answers.jsonl --samples 4
    python generate.py --model NAME --data prompts.jsonl --out answers.jsonl --endpoint http://HOST:8000/v1   # vLLM, SGLang, ...

Answers are drawn from the model's own distribution (temperature 1, no top-k, no top-p), so that they are samples of pi(.|x).
A row of the output is {"id", "prompt", "response", "meta": {"sample", "finish"}}, n rows a prompt in the prompts' order;
finish is "stop" (the model ended by itself) or "length" (cut). Rows are kept in OUT.part* as batches finish; started again,
a killed run does only what is missing and, batches and their seeds being fixed, gives the same file on any number of ranks.
"""
from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from common import API_CONCURRENCY, chat, die, endpoint, generate, load_rows, load_tokenizer, parse, phase, prompt_ids, ranks


@dataclass(frozen=True)
class Config:
    model: str = ""  # model folder or Hub id; with --endpoint, the name the server knows it by
    data: str = ""  # .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    out: str = ""  # file to write
    n: int = field(default=1, metadata={"also": "--samples"})  # answers per prompt; --samples under torchrun, which on Python < 3.12.8 takes --n for one of its own
    temperature: float = 1.0  # 1 = the model's own distribution, 0 = greedy
    max_new_tokens: int = 512  # an answer of more tokens is cut
    limit: int | None = None  # use the first LIMIT rows
    batch: int = 64  # answers sampled at a time
    seed: int = 0  # of the sampling
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 under CUDA, else float32
    endpoint: str | None = None  # sample from this OpenAI-compatible server instead of a local model

    def __post_init__(self):
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        for name in ("n", "max_new_tokens", "batch", "limit"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must not be negative, not {self.temperature}")


def generate_remotely(out: Path, rows: list[dict], client, c: Config) -> list[dict]:
    """The same from an OpenAI-compatible server."""
    def work(items, number):
        drawn, fault = chat(client, c.model, [rows[i]["prompt"] for i, _ in items], temperature=c.temperature, top_p=1.0, max_tokens=c.max_new_tokens)
        if fault:
            sys.exit(fault)
        return [{"id": rows[i]["id"], "prompt": rows[i]["prompt"], "response": text, "meta": {"sample": j, "finish": finish}}
                for (i, j), (text, finish) in zip(items, drawn)]
    settings = [c.model, c.endpoint, c.temperature, c.max_new_tokens, [row["id"] for row in rows]]
    return phase(out, [(i, j) for i in range(len(rows)) for j in range(c.n)], work, API_CONCURRENCY, settings)


def main():
    c = parse(Config)
    out = Path(c.out)
    if out.exists():
        die(f"{out} is there already: delete it, or choose another --out")
    rows, dropped = load_rows(c.data, "prompt", c.limit)
    client = endpoint(c.endpoint) if c.endpoint else None
    if not client:
        tok, config = load_tokenizer(c.model)
        room = config.max_position_embeddings - c.max_new_tokens
        short = [row for row in rows if len(prompt_ids(tok, row["prompt"])) <= room]
        dropped[f"prompts of more than {room} tokens, {c.model}'s context less --max_new_tokens"] = len(rows) - len(short)
        rows = short or die(f"none of the {len(rows)} prompts has at most {room} tokens, {c.model}'s context less --max_new_tokens {c.max_new_tokens}")
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # only barriers; a slow rank is waited for
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    dtype = getattr(torch, c.dtype) if c.dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    if ranks()[0] == 0:
        left_out = "".join(f", {n} left out: {why}" for why, n in dropped.items() if n)
        print(f"{c.data}: {len(rows)} prompts x {c.n}{left_out}; {c.endpoint or f'{device.type}, {dtype}, {ranks()[1]} rank(s)'}")
    if client:
        answers = generate_remotely(out, rows, client, c)
    else:
        answers = generate(out, rows, c.model, tok, n=c.n, temperature=c.temperature, max_new_tokens=c.max_new_tokens, batch=c.batch, seed=c.seed,
                           dtype=dtype, device=device)
    if ranks()[0] == 0:
        cut = sum(a["meta"]["finish"] == "length" for a in answers)
        print(f"{out}: {len(answers)} answers, {cut} cut at {c.max_new_tokens} tokens")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
