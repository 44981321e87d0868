"""Sampling as a command of its own: any model, any data, one process or many, resumable.

    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl
    torchrun --nproc_per_node 8 generate.py --model DIR --data HUB/ID:SPLIT --out answers.jsonl \\
        --samples 4
    python generate.py --model NAME --data prompts.jsonl --out answers.jsonl \\
        --endpoint http://HOST:8000/v1   # vLLM, SGLang, ...
    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl \\
        --samples 5 --temperature 0.8 --judge rm:DIR --pairs pairs.jsonl    # on-policy pairs

Answers are drawn from the model's own distribution (temperature 1, no top-k, no top-p), so that
they are samples of pi(.|x). A row of the output is {"id", "prompt", "response", "meta": {"sample",
"finish"}}, n rows a prompt in the prompts' order; finish is "stop" (the model ended by itself) or
"length" (cut). Where the text alone would give other tokens than those that were sampled,
meta.sampled_ids has these. What an endpoint refuses or leaves empty is left out and counted. A
server may fill in what a request does not name, such as top-k: start vLLM with `--generation-config
vllm`, and it samples from pi, too.

Rows are kept in OUT.part* as batches finish; started again, a killed run does only what is missing
and, batches and their seeds being fixed, gives the same file on any number of ranks.

With --pairs a judge then scores the answers, and the best and the worst one to each prompt are its
preference pair, as sams.py reads them. (The SamS paper makes its pairs so: 5 answers of the SFT
model at temperature 0.8, scored by PairRM or ArmoRM.) A prompt without two answers that differ in
their scores has no pair and is counted. An --out of the same command is judged as it is.
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
import toy
from common import (
    API_CONCURRENCY,
    Drawn,
    Judge,
    Model,
    Sampling,
    answer_row,
    chat,
    context_of,
    endpoint,
    every_sample,
    fitting,
    generate,
    load_tokenizer,
    make_judge,
    preference_pair,
    score_rows,
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
    batch: int = 64  # answers sampled, or judged, at a time; another number draws other answers
    seed: int = 0  # of the sampling, by a local model
    # auto = bfloat16 under CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # sample from this OpenAI-compatible server instead of a local model
    endpoint: str | None = None
    # file for the best and the worst answer to each prompt, as preference pairs, by --judge
    pairs: str | None = None
    judge: str | None = None  # toy, hf:PATH, rm:PATH or api:MODEL; for --pairs

    def __post_init__(self):
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        job.check_positive(self, "n", "max_new_tokens", "batch", "limit")
        job.check_not_negative(self, "temperature")
        if bool(self.pairs) != (self.judge not in (None, "none")):
            raise ValueError("--pairs and --judge go together")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("--samples needs answers that differ: --temperature must be above 0")
        if self.pairs and self.n < 2:
            raise ValueError("--pairs needs at least two answers a prompt: --samples 5")
        if Path(self.out).resolve() == Path(self.data).resolve():
            raise ValueError("--out is --data: choose another file for the answers")
        if self.pairs and Path(self.pairs).resolve() == Path(self.out).resolve():
            raise ValueError("--pairs and --out are one file: the pairs would replace the answers")


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
            sys.exit(f"{fault}; start again: no batch is asked for twice")
        drawn = []
        for (i, j), answer in zip(items, answers):
            drawn.append(answer_row(rows[i], j, Drawn(*answer)) if answer else None)
        return drawn

    settings = [
        c.model,
        c.endpoint,
        c.temperature,
        c.max_new_tokens,
        [row["prompt"] for row in rows],
    ]
    items = every_sample(len(rows), c.n)
    ids = [rows[i]["id"] for i, _ in items]
    answers = job.phase(out, items, work, API_CONCURRENCY, settings, ids=ids, holes=True)
    if not answers:
        out.unlink(missing_ok=True)
        sys.exit(f"error: {c.endpoint} has answered none of {len(rows)} prompts: {client.fault}")
    warn_of_cut(out, answers, c.max_new_tokens)
    return answers


def leave_out_long(rows: list[dict], dropped: Counter, tok, config, c: Config) -> list[dict]:
    """The rows whose prompts leave room for an answer in the model's context.

    The others are counted in `dropped`. No row left ends the program.
    """
    room = context_of(config) - c.max_new_tokens
    if room < 1:
        job.die(f"--max_new_tokens {c.max_new_tokens} fills {c.model}'s context")
    short = fitting(tok, rows, room)
    what = f"{room} tokens, {c.model}'s context less --max_new_tokens"
    dropped[f"prompts of more than {what}"] = len(rows) - len(short)
    if not short:
        job.die(f"none of the {len(rows)} prompts has at most {what} {c.max_new_tokens}")
    return short


def score_answers(answers: list[dict], judge: Judge, c: Config) -> list[float | None]:
    """The judge's scores of all answers, kept in PAIRS.scores until the pairs are written."""

    asked = [(answer["prompt"], answer["response"]) for answer in answers]
    ids = [f"{job.seed_of(judge.key, question):016x}" for question in asked]

    def work(items, number):
        scores = score_rows(judge, answers, items)
        return [{"id": ids[i], "score": score} for i, score in zip(items, scores)]

    scored = job.phase(
        Path(f"{c.pairs}.scores"),
        list(range(len(answers))),
        work,
        c.batch,
        settings=ids,
        note="score",
        ids=ids,
    )
    return [row["score"] for row in scored]


def write_pairs(rows: list[dict], answers: list[dict], judge: Judge, c: Config):
    """The file --pairs, of the pairs of all prompts that have one."""
    prompts = {row["id"]: row["prompt"] for row in rows}
    for answer in answers:
        if prompts.get(answer["id"]) != answer["prompt"]:
            job.die(f"{c.out} has answers to other prompts than {c.data}: delete it")

    own = {row["id"]: ([], []) for row in rows}  # a prompt's answers and their scores
    for answer, score in zip(answers, score_answers(answers, judge, c)):
        own_answers, own_scores = own[answer["id"]]
        own_answers.append(answer)
        own_scores.append(score)

    pairs = []
    for row in rows:
        pair = preference_pair(row, *own[row["id"]])
        if pair:
            pairs.append(pair)
    job.barrier()  # all ranks have read the scores
    if job.on_rank_0():
        job.write_atomic(Path(c.pairs), job.json_lines(pairs))
        Path(f"{c.pairs}.scores").unlink()
        without = len(rows) - len(pairs)
        print(f"{c.pairs}: {len(pairs)} pairs; {without} prompts without two answers that differ")


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
    return job.own_device()


def main():
    c = job.parse(Config)
    out, last = Path(c.out), Path(c.pairs or c.out)
    job.check_out(out.parent)
    job.check_out(last.parent, "--pairs")
    if os.path.lexists(last):
        flag = "--pairs" if c.pairs else "--out"
        job.die(f"{last} is there already: choose another {flag}")
    job.stop_on_sigterm()

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
    lock = out.with_name(f"{out.name}.lock")
    job.hold(lock, out)
    if out.exists() and job.on_rank_0():
        print(f"{out} is there already and is judged as it is: nothing is sampled")
    if client:
        answers = generate_remotely(out, rows, client, c)
    else:
        answers = generate_locally(out, rows, Model(c.model, tok, device, dtype), c)
    if job.on_rank_0():
        cut = [answer["meta"]["finish"] for answer in answers].count("length")
        missing = len(rows) * c.n - len(answers)
        left_out = job.left_out_note({"no answer from the endpoint": missing})
        print(f"{out}: {len(answers)} answers, {cut} cut at {c.max_new_tokens} tokens{left_out}")

    # 4. the best and the worst of each prompt
    if c.pairs:
        write_pairs(rows, answers, make_judge(c.judge, None, device, dtype, toy.score), c)
    if job.on_rank_0():
        lock.unlink()
    job.leave()


if __name__ == "__main__":
    main()
