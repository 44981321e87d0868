"""The papers' measurements of a model, and the papers' figures from finished runs.

    python evaluate.py MODEL --pairs FILE --reference DIR
        preference accuracy, implicit rewards, margin
    python evaluate.py MODEL --against MODEL2 --data FILE --judge J
        win/tie/loss; annotations in MODEL2's place: the data's own answers; --score: scores too
    python evaluate.py MODEL --benchmarks gsm8k,arc_challenge
        lm-evaluation-harness, with the DNPO authors' shot counts
    python evaluate.py MODEL --export mt_bench --questions FILE
        the answer files that AlpacaEval 2 and FastChat's judge read
    python evaluate.py --compare runs/spin-0 runs/spin-1 runs/dnpo-0 runs/dnpo-1
        held-out results of finished runs, mean and std over seeds, and paired differences
    python evaluate.py --figures runs/dnpo-0 runs/dnpo-1 runs/spin-0
        SVG and PNG; runs that differ in their seed alone are one line with a band

Under torchrun all ranks sample, score and judge. Whatever a model or a judge has said is a file in
--out, named after all that it depends on (model, data, flags): nothing is asked twice, a killed run
goes on when it is started again, and models that are compared often are sampled once.
Intervals are percentile bootstraps that draw prompts, not rows: the pairs of one prompt are no
independent evidence. (Those of --compare draw rows.)
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import datafiles
import figures
import job
import toy
from common import (
    SWAPPED,
    Model,
    Pair,
    Sampling,
    Scorer,
    by_pair,
    collate_pairs,
    context_of,
    encode_pairs,
    generate,
    load_tokenizer,
    make_judge,
    mean_or_none,
    prompt_ids,
    score_rows,
    texts,
    weights_stamp,
)

# Few-shot examples, as in the DNPO authors' eval.sh.
SHOTS = {
    "arc_challenge": 25,
    "truthfulqa_mc2": 0,
    "winogrande": 5,
    "gsm8k": 5,
    "hellaswag": 10,
    "mmlu": 5,
}

# MT-Bench's, as in FastChat.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}

# The share of verdicts for the longer answer above which a judge is suspected of counting words.
LONGER_WINS = 0.6


# ------------------------------------------------------------------------- statistics


def bootstrap(
    values, groups=None, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """The mean of values and its percentile interval: mean, low, high; None without values.

    In each of `draws` seeded resamples as many groups as there are are drawn with replacement, and
    the mean is that of their values. values: [n]. groups: [n], by default every value is its own.
    """
    values = np.asarray(values, float)
    if len(values) == 0:
        return None, None, None
    if groups is None:
        groups = np.arange(len(values))
    names, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, values)
    counts = np.bincount(group)

    rng = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        drawn = rng.integers(len(names), size=len(names))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def pair_rewards(logps, ref_logps, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The implicit rewards r = beta log pi(y)/pi_ref(y) of the chosen and the rejected answers.

    logps, ref_logps: [n, 2], chosen first. The rewards are [n] and [n].
    """
    ratios = np.asarray(logps, float) - np.asarray(ref_logps, float)
    chosen, rejected = (beta * ratios).T
    return chosen, rejected


def shorter_chosen(lengths) -> np.ndarray:
    """Length control: the pairs whose chosen answer is the shorter one. [n, 2] tokens -> bool [n].

    These are the pairs that a model that likes long answers gets wrong.
    """
    lengths = np.asarray(lengths)
    return lengths[:, 0] < lengths[:, 1]


def settle(there: str | None, back: str | None) -> str | None:
    """A judge's verdicts in both orders as one: "win", "tie", "loss", or None if unreadable.

    In both, A is the model's answer. Verdicts that differ are a tie.
    """
    if there is None or back is None:
        return None
    if there != back:
        return "tie"
    return {"A": "win", "B": "loss", "tie": "tie"}[there]


def win_rate(gap: float | None) -> float | None:
    """The share of wins, a tie being half a win, from the gap between wins and losses."""
    if gap is None:
        return None
    return (1 + gap) / 2


def versus(rows: list[dict], seed: int = 0) -> dict:
    """What verdicts on two models' answers add up to; None where there is nothing to divide by.

    rows: {"prompt", "verdict", "there", "back", "length", "length_other"}. Returns the shares of
    win, tie and loss, win rate and win-loss gap with intervals, and two signs of a bad judge:
    flip_rate, of the pairs that were asked in both orders the share whose verdict changed with it,
    and longer_wins, of the decided ones with unequal lengths the share that the longer answer won;
    `decided` counts these.
    """
    read = [row for row in rows if row["verdict"]]
    verdicts = [row["verdict"] for row in read]
    gains = [{"win": 1.0, "tie": 0.0, "loss": -1.0}[verdict] for verdict in verdicts]
    gap, low, high = bootstrap(gains, [row["prompt"] for row in read], seed=seed)

    flips = []
    longer_wins = []
    for row in read:
        if row["there"] is not None and row["back"] is not None:
            flips.append(row["there"] != row["back"])
        if row["verdict"] != "tie" and row["length"] != row["length_other"]:
            longer = row["length"] > row["length_other"]
            longer_wins.append(longer == (row["verdict"] == "win"))

    return {
        "win": mean_or_none([verdict == "win" for verdict in verdicts]),
        "tie": mean_or_none([verdict == "tie" for verdict in verdicts]),
        "loss": mean_or_none([verdict == "loss" for verdict in verdicts]),
        "win_rate": win_rate(gap),
        "win_rate_low": win_rate(low),
        "win_rate_high": win_rate(high),
        "gap": gap,
        "gap_low": low,
        "gap_high": high,
        "flip_rate": mean_or_none(flips),
        "longer_wins": mean_or_none(longer_wins),
        "decided": len(longer_wins),
        "judged": len(read),
        "unreadable": len(rows) - len(read),
    }


# ------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    model: str = ""  # model folder or Hub id; stands first, with or without --model

    # -- preference pairs
    # pairs to measure accuracy, rewards and margin on:
    # .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    pairs: str | None = None
    # the model that training started from, for the rewards;
    # without it they are beta log pi(y|x), and so are accuracy and margin
    reference: str | None = None
    beta: float = 0.1  # of the rewards

    # -- a judge's opinion
    # compare with the answers of this model, or with the data's own: annotations
    against: str | None = None
    # prompts (annotated ones for --against annotations), in the same formats as --pairs
    data: str | None = None
    judge: str = "none"  # toy, hf:PATH, rm:PATH or api:MODEL
    score: bool = False  # let the judge score single answers too

    # -- benchmarks
    benchmarks: str | None = None  # tasks of lm-evaluation-harness, with commas between
    tasks_dir: str | None = None  # folder of task files of your own

    # -- exports
    # write the answers that AlpacaEval 2 or FastChat's MT-Bench judge reads
    export: Literal["alpaca_eval", "mt_bench"] | None = None
    questions: str | None = None  # their questions: alpaca_eval.json or question.jsonl
    name: str | None = None  # what the model is called in the exported file (default: its path)

    # -- finished runs
    # their folders, as for --figures: what their last models are worth on the held-out rows
    compare: list[str] = field(default_factory=list)

    # -- figures
    # folders of finished runs, or FOLDER=NAME to give a kind of runs another name;
    # bench.py's *-sweep.json
    figures: list[str] = field(default_factory=list)

    # -- sampling and system
    temperature: float = 0.0  # of the answers, 0 = greedy (mt_bench: by category)
    max_response: int = 512  # tokens; a longer answer is cut
    limit: int | None = None  # use the first LIMIT rows, questions, or examples of a benchmark
    batch: int = 16  # sequences at a time; neighbours in length, so results move by rounding only
    seed: int = 0  # of sampling and bootstrap
    # auto = bfloat16 under CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # folder for answers, verdicts and results (default runs/evaluate; figures)
    out: str | None = None

    def __post_init__(self):
        asks_judge = self.against or self.score
        modes = {
            "--pairs": self.pairs,
            "--against or --score": asks_judge,
            "--benchmarks": self.benchmarks,
            "--export": self.export,
            "--compare": self.compare,
            "--figures": self.figures,
        }
        asked = [flag for flag, value in modes.items() if value]
        if len(asked) != 1:
            found = " and ".join(asked) or "none"
            raise ValueError(f"one of {', '.join(modes)} is expected, not {found}")
        if not self.model and not self.compare and not self.figures:
            raise ValueError("which model? python evaluate.py MODEL ...")
        if self.model and (self.compare or self.figures):
            raise ValueError(f"{self.model} stands before the flag: all runs stand behind it")
        if asks_judge and (not self.data or self.judge == "none"):
            raise ValueError("--against or --score needs --data and --judge")
        if self.export and not self.questions:
            raise ValueError("--export needs --questions")
        job.check_positive(self, "beta", "max_response", "limit", "batch")
        job.check_not_negative(self, "temperature", "seed")

    @property
    def folder(self) -> Path:
        return Path(self.out or ("figures" if self.figures else "runs/evaluate"))

    @property
    def device(self) -> torch.device:
        return job.own_device()

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32


# ------------------------------------------------------------------------- models and files


@dataclass(frozen=True)
class Subject(Model):
    """A model that is measured, with its configuration."""

    config: object

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return context_of(self.config)

    @property
    def identity(self) -> list:
        """What tells a model from another one of the same name.

        That is the sizes and times of its weights, or the Hub's commit.
        """
        return [self.path, weights_stamp(self.path)]


def open_model(c: Config, path: str) -> Subject:
    """A model whose tokenizer and configuration are read; its weights are not."""
    tok, config = load_tokenizer(path)
    return Subject(path, tok, c.device, c.torch_dtype, config)


def name_file(c: Config, kind: str, *depends) -> Path:
    """A file of --out, named after all that its content depends on.

    Another model, other data or another flag never meets an old answer.
    """
    return c.folder / f"{kind}-{job.seed_of(c.dtype, *depends):016x}.jsonl"


def show(c: Config, note: str, rows: list[dict], columns: list[str], **result):
    """Prints a table and writes it, with the flags that made it, as results-HASH.json."""
    if not job.on_rank_0():
        return
    flags = dataclasses.asdict(c)
    del flags["out"]
    file = c.folder / f"results-{job.seed_of(flags):016x}.json"
    content = {"flags": flags, "results": rows, **result}
    job.write_atomic(file, json.dumps(content, indent=1))
    print(f"{note}\n{job.table(rows, columns)}\n{file}", flush=True)


# ------------------------------------------------------------------------- preference pairs


def evaluate_pairs(c: Config):
    """Measures accuracy, rewards and margin on preference pairs, with intervals."""
    rows, dropped = datafiles.load_rows(c.pairs, "pair", c.limit)
    model = open_model(c, c.model)
    reference = open_reference(c, model)
    room = model.context - c.max_response
    if room < 1:
        job.die(f"--max_response {c.max_response} fills {c.model}'s context")
    pairs, left_out = encode_pairs(model.tok, rows, room, c.max_response)
    dropped = dropped + left_out
    if not pairs:
        reasons = ", ".join(f"{n} {why}" for why, n in dropped.items())
        job.die(f"{c.pairs}: no pair left: {reasons}")

    job.hold(c.folder / "lock", c.folder)
    logps = score_pairs(c, model, pairs, "model")
    ref_logps = np.zeros_like(logps)
    if reference:
        ref_logps = score_pairs(c, reference, pairs, "reference")
    chosen, rejected = pair_rewards(logps, ref_logps, c.beta)
    right = (chosen > rejected).astype(float)
    short = shorter_chosen([(len(pair.chosen), len(pair.rejected)) for pair in pairs])

    prompt_of = {row["id"]: job.seed_of(row["prompt"]) for row in rows}
    prompts = np.array([prompt_of[pair.id] for pair in pairs])
    measures = [
        measure("accuracy", right, prompts, c.seed),
        measure("accuracy, shorter answer chosen", right[short], prompts[short], c.seed),
        measure("accuracy, others", right[~short], prompts[~short], c.seed),
        measure("chosen reward", chosen, prompts, c.seed),
        measure("rejected reward", rejected, prompts, c.seed),
        measure("margin", chosen - rejected, prompts, c.seed),
    ]
    against = c.reference or "none: rewards are beta log pi(y|x), which falls with length"
    note = f"{c.model} · reference {against} · {c.pairs}{job.left_out_note(dropped)}"
    show(c, note, measures, ["measure", "mean", "low", "high", "pairs"])


def open_reference(c: Config, model: Subject) -> Subject | None:
    """The model of --reference, if there is one, which must have the same vocabulary."""
    if not c.reference:
        return None
    reference = open_model(c, c.reference)
    tokens = model.config.get_text_config(decoder=True).vocab_size
    other_tokens = reference.config.get_text_config(decoder=True).vocab_size
    if other_tokens != tokens:
        job.die(
            f"--reference {c.reference} has another vocabulary than {c.model} "
            f"({other_tokens} and {tokens} tokens)"
        )
    return reference


def score_pairs(c: Config, model: Subject, pairs: list[Pair], note: str) -> np.ndarray:
    """log pi of both sides of each pair, chosen first: [n, 2]. It is kept in a file."""
    scorer = None

    def work(items, number):
        nonlocal scorer
        scorer = scorer or Scorer(model.load())
        ids, mask = collate_pairs([pairs[i] for i in items], c.device)
        with torch.no_grad():
            logps = by_pair(scorer(ids, mask))
        if not logps.isfinite().all():
            sys.exit(f"error: {model.path}: its log-probs are not finite: a broken model, or data")
        logps = logps.tolist()
        found = []
        for i, (chosen, rejected) in zip(items, logps):
            found.append({"id": pairs[i].id, "chosen": chosen, "rejected": rejected})
        return found

    file = name_file(c, "logps", model.identity, [tuple(pair) for pair in pairs], c.batch)
    items = list(range(len(pairs)))
    found = job.phase(file, items, work, c.batch, key=lambda i: pairs[i].tokens, note=note)
    return np.array([[row["chosen"], row["rejected"]] for row in found])


def measure(name: str, values: np.ndarray, prompts: np.ndarray, seed: int) -> dict:
    """A row of the table: the mean of values [n] and its interval."""
    mean, low, high = bootstrap(values, prompts, seed=seed)
    return {"measure": name, "mean": mean, "low": low, "high": high, "pairs": len(values)}


# ------------------------------------------------------------------------- a judge's opinion

# What `versus` finds, in the words of the table.
MEASURES = {
    "win": "win",
    "tie": "tie",
    "loss": "loss",
    "win_rate": "win rate, a tie being half a win",
    "gap": "win-loss gap",
    "flip_rate": "verdicts that flip with the order",
    "longer_wins": "decided for the longer answer",
    "judged": "pairs judged",
    "unreadable": "unreadable, left out",
}


def evaluate_answers(c: Config):
    """Measures win, tie and loss against another model's answers or the annotations, and scores."""
    # 1. the prompts, the models and the judge, before any weight is read
    need = "response" if c.against == "annotations" else "prompt"
    rows, dropped = datafiles.load_rows(c.data, need, c.limit)
    models = {c.model: open_model(c, c.model)}
    if c.against not in (None, "annotations", c.model):
        models[c.against] = open_model(c, c.against)
    judge = make_judge(c.judge, c.folder / "judge", c.device, c.torch_dtype, exact=toy.score)
    fitting = [row for row in rows if leaves_room(c, models, row["prompt"])]
    dropped["prompts that leave no room for --max_response"] = len(rows) - len(fitting)
    if not fitting:
        job.die(
            f"{c.data}: none of the {len(rows)} prompts leaves room "
            f"for --max_response {c.max_response}"
        )
    rows = fitting
    job.hold(c.folder / "lock", c.folder)

    # 2. the answers
    sides = {}
    for path, model in models.items():
        sides[path] = answer(c, model, rows, c.temperature, f"answers of {path}")
    if c.against == "annotations":
        sides["annotations"] = rows

    # 3. what the judge says of each answer alone
    note = (
        f"{c.model} · {c.data}: {len(rows)} prompts · judge {c.judge}{job.left_out_note(dropped)}"
    )
    scores = None
    if c.score:
        scores = [score_side(c, judge, name, side, rows) for name, side in sides.items()]
        columns = ["answers of", "score", "low", "high", "unreadable"]
        if not c.against:
            show(c, note, scores, columns)
            return
        if job.on_rank_0():
            print(job.table(scores, columns))

    # 4. what it says of the two answers to each prompt
    verdicts = judge_pairs(c, judge, sides[c.model], sides[c.against])
    result = versus(verdicts, c.seed)
    measures = []
    for name, words in MEASURES.items():
        low = result.get(f"{name}_low")
        high = result.get(f"{name}_high")
        measures.append({"measure": words, "value": result[name], "low": low, "high": high})
    columns = ["measure", "value", "low", "high"]
    show(c, f"{note} · against {c.against}", measures, columns, **result, scores=scores)
    warn_of_judge(c, models, result)


def leaves_room(c: Config, models: dict[str, Subject], prompt: list[dict]) -> bool:
    """Whether a prompt and an answer of --max_response tokens fit into every model's context."""
    for model in models.values():
        if len(prompt_ids(model.tok, prompt)) + c.max_response > model.context:
            return False
    return True


def answer(
    c: Config, model: Subject, rows: list[dict], temperature: float, note: str
) -> list[dict]:
    """One answer to each row's prompt, with the model's own chat template, kept in a file."""
    prompts = [row["prompt"] for row in rows]
    depends = (model.identity, prompts, temperature, c.max_response, c.seed, c.batch)
    file = name_file(c, "answers", *depends)
    sampling = Sampling(temperature, c.max_response, c.batch)
    return generate(file, rows, model, sampling, c.seed, note=note)


def judge_pairs(c: Config, judge, mine: list[dict], others: list[dict]) -> list[dict]:
    """A verdict on two answers to each prompt, in both orders, kept in a file.

    Nobody is asked about equal texts, which are a tie. A judge of numbers has one order.
    """

    def ask(items: list[int], first: list[dict], second: list[dict]) -> dict[int, str | None]:
        talks = []
        for i in items:
            talks.append((mine[i]["prompt"], first[i]["response"], second[i]["response"]))
        return dict(zip(items, judge.answers("compare", talks)))

    def work(items, number):
        unequal = [i for i in items if mine[i]["response"] != others[i]["response"]]
        there = ask(unequal, mine, others)
        back = {}
        if judge.orders:
            swapped = ask(unequal, others, mine)
            back = {i: SWAPPED[verdict] for i, verdict in swapped.items()}

        found = []
        for i in items:
            if i not in there:
                verdict = "tie"
            elif judge.orders:
                verdict = settle(there[i], back[i])
            else:
                verdict = settle(there[i], there[i])
            found.append(
                {
                    "id": mine[i]["id"],
                    "prompt": f"{job.seed_of(mine[i]['prompt']):016x}",
                    "there": there.get(i),
                    "back": back.get(i),
                    "verdict": verdict,
                    "length": len(mine[i]["response"]),
                    "length_other": len(others[i]["response"]),
                }
            )
        return found

    file = name_file(c, "verdicts", judge.key, texts(mine), texts(others))
    return job.phase(file, list(range(len(mine))), work, c.batch, note="judge")


def judge_scores(c: Config, judge, answers: list[dict], note: str) -> list[dict]:
    """The judge's score of each answer, None where it can't be read, kept in a file."""

    def work(items, number):
        scores = score_rows(judge, answers, items)
        return [{"id": answers[i]["id"], "score": score} for i, score in zip(items, scores)]

    file = name_file(c, "scores", judge.key, texts(answers))
    return job.phase(file, list(range(len(answers))), work, c.batch, note=note)


def score_side(c: Config, judge, name: str, answers: list[dict], rows: list[dict]) -> dict:
    """A row of the table of scores: mean and interval of the readable scores of one side."""
    scores = []
    prompts = []
    for row, judged in zip(rows, judge_scores(c, judge, answers, f"score {name}")):
        if judged["score"] is not None:
            scores.append(judged["score"])
            prompts.append(job.seed_of(row["prompt"]))
    score, low, high = bootstrap(scores, prompts, seed=c.seed)
    unreadable = len(answers) - len(scores)
    return {"answers of": name, "unreadable": unreadable, "score": score, "low": low, "high": high}


def warn_of_judge(c: Config, models: dict[str, Subject], found: dict):
    """Says so if the judge seems to count words, or is one of the models that it judges.

    found: what versus has returned. Of fewer than 20 decided comparisons nothing is said.
    """
    if not job.on_rank_0():
        return
    longer_wins = found["longer_wins"]
    if found["decided"] >= 20 and longer_wins > LONGER_WINS:
        print(
            f"warning: the longer answer won {longer_wins:.0%} of the decided comparisons: "
            "the judge may be counting words",
            file=sys.stderr,
        )
    _, _, judge_model = c.judge.partition(":")
    if judge_model in models:
        print(
            f"warning: {c.judge} judges its own answers; judges prefer those",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------- benchmarks


def evaluate_benchmarks(c: Config):
    """Hands over to lm-evaluation-harness, task by task; a task with results is not run again."""
    if not importlib.util.find_spec("lm_eval"):
        job.die("--benchmarks needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
    if job.world_size() > 1:
        job.die(
            "--benchmarks starts processes of its own: run it without torchrun "
            "(its command, printed, also runs under `accelerate launch`)"
        )
    model = open_model(c, c.model)
    if c.tasks_dir and not Path(c.tasks_dir).is_dir():
        job.die(f"--tasks_dir {c.tasks_dir}: no such folder")

    job.hold(c.folder / "lock", c.folder)
    packages = ("lm_eval", "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    rows = []
    for task in c.benchmarks.split(","):
        depends = (model.identity, SHOTS.get(task), c.limit, c.seed, c.tasks_dir)
        folder = name_file(c, f"benchmark-{task}", *depends).with_suffix("")
        command = benchmark_command(c, task, folder)
        print(shlex.join(command), flush=True)
        found = read_benchmark(folder)
        if not found:
            code = subprocess.run(command).returncode
            if code:
                sys.exit(f"error: lm_eval ended with code {code}; its command is above")
            found = read_benchmark(folder)
        if not found:
            sys.exit(f"error: lm_eval left no results in {folder}")
        rows.extend(benchmark_rows(task, found))

    note = " · ".join(f"{name} {version}" for name, version in versions.items())
    show(c, note, rows, ["task", "shots", "metric", "value", "stderr"], versions=versions)


def benchmark_command(c: Config, task: str, out: Path) -> list[str]:
    """lm-evaluation-harness's command line for one task.

    It has the DNPO authors' shots (a task of your own: its file's), the chat template, and the
    few-shot examples as turns. -P: the harness imports a package called evaluate, which must not be
    this file.
    """
    dtype = str(c.torch_dtype).removeprefix("torch.")
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={c.model},dtype={dtype}"]
    command += ["--tasks", task]
    if task in SHOTS:
        command += ["--num_fewshot", str(SHOTS[task])]
    command += ["--apply_chat_template", "--fewshot_as_multiturn"]
    command += ["--batch_size", str(c.batch), "--device", c.device.type, "--seed", str(c.seed)]
    command += ["--output_path", str(out), "--log_samples"]
    if c.tasks_dir:
        command += ["--include_path", c.tasks_dir]
    if c.limit:
        command += ["--limit", str(c.limit)]
    return command


def read_benchmark(folder: Path) -> dict | None:
    """The newest results_*.json that the harness left somewhere under folder, if there is one."""
    files = sorted(folder.glob("**/results_*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    return job.read_json(files[-1], "delete it, and the task is run again")


def benchmark_rows(task: str, found: dict) -> list[dict]:
    """The harness's results as rows of a table; of a group like mmlu its mean, not its 57 parts."""
    shots = found.get("n-shot", {})
    parts = found.get("group_subtasks", {}).get(task, [])
    rows = []
    for name, values in found["results"].items():
        if name in parts and name != task:
            continue
        for key, value in values.items():
            if "," not in key or "_stderr" in key:
                continue
            rows.append(
                {
                    "task": name,
                    "shots": shots.get(name),
                    "metric": key.replace(",none", ""),
                    "value": value,
                    "stderr": values.get(key.replace(",", "_stderr,")),
                }
            )
    return rows


# ------------------------------------------------------------------------- exports


def evaluate_export(c: Config):
    """Writes the answer file of a benchmark whose judge is elsewhere.

    That is out/alpaca_eval/NAME.json or out/mt_bench/NAME.jsonl.
    """
    questions = read_questions(c)
    model = open_model(c, c.model)
    # FastChat and AlpacaEval look for NAME's file beside the others, not in a folder of its own
    name = (c.name or c.model.strip("/")).replace("/", "-")
    if c.export == "alpaca_eval":
        file = c.folder / c.export / f"{name}.json"
        rows = alpaca_eval_rows(c, model, questions, name)
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        then = f"alpaca_eval --model_outputs {file} "
        then += "--annotators_config weighted_alpaca_eval_gpt4_turbo"
    else:
        file = c.folder / c.export / f"{name}.jsonl"
        rows = mt_bench_rows(c, model, questions, name)
        text = job.json_lines(rows)
        then = "copy it to FastChat's data/mt_bench/model_answer/, "
        then += f"then python gen_judgment.py --model-list {name}"

    if job.on_rank_0():
        job.write_atomic(file, text)
        print(f"{file}: {len(rows)} questions answered as {name}\nnext: {then}")


def read_questions(c: Config) -> list[dict]:
    """AlpacaEval's or MT-Bench's questions, checked."""
    if c.export == "alpaca_eval":
        need = ("instruction",)
    else:
        need = ("question_id", "category", "turns")
    questions = []
    for where, raw in datafiles.read_file(Path(c.questions)):
        if not isinstance(raw, dict) or any(name not in raw for name in need):
            job.die(f"{where}: expected {', '.join(need)}")
        said = [raw["instruction"]] if c.export == "alpaca_eval" else raw["turns"]
        if not isinstance(said, list) or not said or not all(is_said(text) for text in said):
            job.die(f"{where}: empty, or no text")
        questions.append(raw)
    if not questions:
        job.die(f"{c.questions}: no questions")
    return questions[: c.limit]


def is_said(text) -> bool:
    """Whether it is a text that says something."""
    return isinstance(text, str) and bool(text.strip())


def alpaca_eval_rows(c: Config, model: Subject, questions: list[dict], name: str) -> list[dict]:
    """The rows of AlpacaEval's answer file."""
    turns = [[question["instruction"]] for question in questions]
    temperatures = [c.temperature] * len(questions)
    rows = []
    for question, replies in zip(questions, answer_turns(c, model, turns, temperatures)):
        row = {"instruction": question["instruction"], "output": replies[0], "generator": name}
        if "dataset" in question:
            row["dataset"] = question["dataset"]
        rows.append(row)
    return rows


def mt_bench_rows(c: Config, model: Subject, questions: list[dict], name: str) -> list[dict]:
    """The rows of MT-Bench's answer file, for FastChat's judge."""
    turns = [question["turns"] for question in questions]
    temperatures = [TEMPERATURES.get(question["category"], 0.7) for question in questions]
    rows = []
    for question, replies in zip(questions, answer_turns(c, model, turns, temperatures)):
        rows.append(
            {
                "question_id": question["question_id"],
                "answer_id": f"{job.seed_of(name, question, replies):016x}",
                "model_id": name,
                "choices": [{"index": 0, "turns": replies}],
                "tstamp": time.time(),
            }
        )
    return rows


def answer_turns(
    c: Config, model: Subject, questions: list[list[str]], temperatures: list[float]
) -> list[list[str]]:
    """The model's answers to every turn of conversations whose user turns are given.

    They are sampled turn by turn, with one file for each temperature.
    """
    # before anything is sampled: a missing answer would count as a loss
    for number, said in enumerate(questions, 1):
        check_length(c, model, number, said)
    job.hold(c.folder / "lock", c.folder)

    replies = [[] for _ in questions]
    longest = max(len(said) for said in questions)
    for turn in range(longest):
        for temperature in sorted(set(temperatures)):
            which = []
            for i, said in enumerate(questions):
                if len(said) > turn and temperatures[i] == temperature:
                    which.append(i)
            if not which:
                continue
            rows = []
            for i in which:
                rows.append({"id": str(i), "prompt": conversation(questions[i], replies[i])})
            note = f"turn {turn + 1}, temperature {temperature:g}"
            answers = answer(c, model, rows, temperature, note)
            for i, row in zip(which, answers):
                replies[i].append(row["response"])
    return replies


def check_length(c: Config, model: Subject, number: int, said: list[str]):
    """Ends the program if a question and answers of --max_response tokens exceed the context."""
    total = 0
    for text in said:
        prompt = [{"role": "user", "content": text}]
        total += len(prompt_ids(model.tok, prompt)) + c.max_response
    if total > model.context:
        job.die(
            f"question {number} needs up to {total} tokens, {c.model}'s context is "
            f"{model.context}: lower --max_response {c.max_response}"
        )


def conversation(said: list[str], replies: list[str]) -> list[dict]:
    """The messages of what the user says and of the replies so far, up to the user's next turn."""
    messages = []
    for text, reply in zip(said, replies):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": reply})
    messages.append({"role": "user", "content": said[len(replies)]})
    return messages


def main():
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    c = job.parse(Config, argv=argv)
    job.check_out(c.folder)
    if c.compare:
        compare_runs(c)
        return
    if c.figures:
        draw_figures(c)
        return

    if "RANK" in os.environ:
        # only barriers; a slow rank is waited for
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))
    if not c.benchmarks:  # lm_eval's processes don't know how to stop
        job.stop_on_sigterm()
    if c.pairs:
        evaluate_pairs(c)
    elif c.benchmarks:
        evaluate_benchmarks(c)
    elif c.export:
        evaluate_export(c)
    else:
        evaluate_answers(c)
    job.leave()


# ------------------------------------------------------------------------- finished runs


def compare_runs(c: Config):
    """A table of the kinds of runs: held-out results, and how they differ from the first kind's.

    The first kind is that of the run that was named first (of each task). Of each kind there are
    mean and std over its seeds. The difference is that of runs with the same seed, row by row; its
    interval draws rows.
    """
    runs = [figures.read_run(spec) for spec in dict.fromkeys(c.compare)]
    if len({run.method for run in runs}) > 1:
        job.die("--compare takes the runs of one method")

    rows = []
    for task, kinds in figures.by_task(figures.group_runs(runs)).items():
        # group_runs has put the runs with the most flags first; the user has named a baseline
        kinds = sorted(kinds, key=lambda kind: min(map(runs.index, kind.runs)))
        refuse_double_seeds(kinds)
        found = {kind.name: {run.seed: outcomes_of(run) for run in kind.runs} for kind in kinds}
        first = found[kinds[0].name]
        for kind in kinds:
            rows.append(comparison(kind.name, task, found[kind.name], first, c.seed))
    columns = ["runs", "task", "seeds", "mean", "std", "difference", "low", "high", "held out"]
    show(c, f"differences from {rows[0]['runs']!r}, paired", rows, columns)


def refuse_double_seeds(kinds: list[figures.Kind]):
    """Ends the program where two runs of a kind have one seed: one of them would not count."""
    for kind in kinds:
        of_seed = {}
        for run in kind.runs:
            other = of_seed.setdefault(run.seed, run)
            if other is not run:
                job.die(
                    f"{other.folder} and {run.folder} are both {kind.name} with seed {run.seed}: "
                    "leave one out, or give it a name (FOLDER=NAME)"
                )


def outcomes_of(run: figures.Run) -> dict[str, float]:
    """figures.outcomes, or one line for a run that has left none."""
    try:
        return figures.outcomes(run)
    except FileNotFoundError as fault:
        job.die(f"{fault.filename}: no such file; the run was made before it was written")


def comparison(
    name: str, task: str, found: dict[int, dict[str, float]], first: dict, seed: int
) -> dict:
    """A row of the table. found, first: {seed: {row's id: outcome}} of a kind and of the first."""
    means = [float(np.mean(list(outcomes.values()))) for outcomes in found.values()]
    gaps, ids = [], []
    for run_seed in found.keys() & first.keys():
        for row_id in found[run_seed].keys() & first[run_seed].keys():
            gaps.append(found[run_seed][row_id] - first[run_seed][row_id])
            ids.append(row_id)
    if found.keys() & first.keys() and not ids:
        job.die(f"--compare: {name} has no held-out prompt in common with the first kind of runs")
    difference, low, high = bootstrap(gaps, ids, seed=seed)
    return {
        "runs": name,
        "task": task,
        "seeds": len(found),
        "mean": float(np.mean(means)),
        "std": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "difference": difference,
        "low": low,
        "high": high,
        "held out": len(set(ids)),
    }


def draw_figures(c: Config):
    """Draws the figures of finished runs."""
    try:
        figures.draw(c.figures, c.folder)
    except FileNotFoundError as fault:
        job.die(f"{fault.filename}: no such file; a figure needs what the run has left there")
    except OSError as fault:
        job.not_written(c.folder, fault)


if __name__ == "__main__":
    main()
