"""The papers' measurements of a model, and the papers' figures from finished runs.

    python evaluate.py MODEL --pairs FILE --reference DIR              # preference accuracy, implicit rewards, margin
    python evaluate.py MODEL --against MODEL2 --data FILE --judge J    # win/tie/loss; annotations in MODEL2's place: the data's own answers; --score: 1-10 too
    python evaluate.py MODEL --benchmarks gsm8k,arc_challenge          # lm-evaluation-harness, with the DNPO authors' shot counts
    python evaluate.py MODEL --export mt_bench --questions FILE        # the answer files that AlpacaEval 2 and FastChat's judge read
    python evaluate.py --figures runs/dnpo-0 runs/dnpo-1 runs/spin-0   # SVG and PNG; runs that differ in their seed alone are one line with a band

Under torchrun all ranks sample, score and judge. Whatever a model or a judge has said is a file in --out, named after all that it depends on (model,
data, flags): nothing is asked twice, a killed run goes on when it is started again, and models that are compared often are sampled once.
Intervals are percentile bootstraps that draw prompts, not rows: the pairs of one prompt are no independent evidence.
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

from common import (Scorer, collate, die, encode_pairs, generate, load_lm, load_rows, load_tokenizer, make_judge, parse, phase, prompt_ids, ranks, read_file, seed_of,
                    table, write_atomic)

SHOTS = {"arc_challenge": 25, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10, "mmlu": 5}  # the DNPO authors' eval.sh
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}  # MT-Bench's, as in FastChat
LONGER_WINS = 0.6  # share of verdicts for the longer answer above which a judge is suspected of counting words
SWAPPED = {"A": "B", "B": "A", "tie": "tie", None: None}


# ---------------------------------------------------------------- statistics


def bootstrap(values, groups=None, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float | None, float | None, float | None]:
    """Mean and percentile interval: in each of `draws` seeded resamples as many groups (default: every value its own) as there are are drawn with replacement,
    and the mean is that of their values. [n], [n] -> mean, low, high; None without values."""
    values = np.asarray(values, float)
    if not len(values):
        return None, None, None
    names, index = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(len(names), size=len(names))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def pair_rewards(logps, ref_logps, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The implicit rewards r = beta log pi(y)/pi_ref(y) of both sides. logps, ref_logps: [n, 2], chosen first -> [n], [n]."""
    chosen, rejected = (beta * (np.asarray(logps, float) - np.asarray(ref_logps, float))).T
    return chosen, rejected


def shorter_chosen(lengths) -> np.ndarray:
    """Length control: the pairs whose chosen answer is the shorter one, which a model that likes long answers gets wrong. [n, 2] tokens -> [n] of bool."""
    lengths = np.asarray(lengths)
    return lengths[:, 0] < lengths[:, 1]


def settle(there: str | None, back: str | None) -> str | None:
    """A judge's verdicts in both orders, both put as A = the model's answer -> "win", "tie" (also where they differ), "loss" or None (unreadable)."""
    return None if None in (there, back) else {"A": "win", "B": "loss", "tie": "tie"}[there if there == back else "tie"]


def versus(rows: list[dict], seed: int = 0) -> dict:
    """Verdict rows {"prompt", "verdict", "there", "back", "length", "length_other"} -> shares of win, tie, loss; win rate (a tie is half a win) and
    win-loss gap with intervals; flip rate: of the pairs asked in both orders, those whose verdict changed with it; longer_wins: of the decided ones with
    unequal lengths, those that the longer answer won; None where there is nothing to divide by."""
    read, share = [r for r in rows if r["verdict"]], lambda tests: sum(tests) / len(tests) if tests else None
    gain = [{"win": 1.0, "tie": 0.0, "loss": -1.0}[r["verdict"]] for r in read]
    gap = bootstrap(gain, [r["prompt"] for r in read], seed=seed)
    half = [None if x is None else (1 + x) / 2 for x in gap]
    return {name: share([r["verdict"] == name for r in read]) for name in ("win", "tie", "loss")} | {
        "win_rate": half[0], "win_rate_low": half[1], "win_rate_high": half[2], "gap": gap[0], "gap_low": gap[1], "gap_high": gap[2],
        "flip_rate": share([r["there"] != r["back"] for r in read if None not in (r["there"], r["back"])]),
        "longer_wins": share([(r["verdict"] == "win") == (r["length"] > r["length_other"]) for r in read if r["verdict"] != "tie" and r["length"] != r["length_other"]]),
        "judged": len(read), "unreadable": len(rows) - len(read)}


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    model: str = ""  # model folder or Hub id; stands first, with or without --model
    # preference pairs
    pairs: str | None = None  # pairs to measure accuracy, rewards and margin on: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    reference: str | None = None  # the model that training started from, for the rewards; without it they are beta log pi(y|x), and so are accuracy and margin
    beta: float = 0.1  # of the rewards
    # a judge's opinion
    against: str | None = None  # compare with the answers of this model, or with the data's own: annotations
    data: str | None = None  # prompts (annotated ones for --against annotations), in the same formats as --pairs
    judge: str = "none"  # toy, hf:PATH, rm:PATH or api:MODEL
    score: bool = False  # let the judge score single answers too
    # benchmarks
    benchmarks: str | None = None  # tasks of lm-evaluation-harness, with commas between
    tasks_dir: str | None = None  # folder of task files of your own
    # exports
    export: Literal["alpaca_eval", "mt_bench"] | None = None  # write the answers that AlpacaEval 2 or FastChat's MT-Bench judge reads
    questions: str | None = None  # their questions: alpaca_eval.json or question.jsonl
    name: str | None = None  # what the model is called in the exported file (default: its path)
    # figures
    figures: list[str] = field(default_factory=list)  # folders of finished runs, or FOLDER=NAME to give a kind of runs another name; bench.py's *-sweep.json
    # sampling and system
    temperature: float = 0.0  # of the answers, 0 = greedy (mt_bench: by category)
    max_response: int = 512  # tokens; a longer answer is cut
    limit: int | None = None  # use the first LIMIT rows, questions, or examples of a benchmark
    batch: int = 16  # sequences at a time; neighbours in length, so results move by rounding only
    seed: int = 0  # of sampling and bootstrap
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 under CUDA, else float32
    out: str | None = None  # folder for answers, verdicts and results (default runs/evaluate; figures)

    def __post_init__(self):
        modes = {"--pairs": self.pairs, "--against or --score": self.against or self.score, "--benchmarks": self.benchmarks, "--export": self.export, "--figures": self.figures}
        asked = [flag for flag, value in modes.items() if value]
        if len(asked) != 1:
            raise ValueError(f"one of {', '.join(modes)} is expected, not {' and '.join(asked) or 'none'}")
        if not self.model and not self.figures:
            raise ValueError("which model? python evaluate.py MODEL ...")
        if asked[0].startswith("--against") and (not self.data or self.judge == "none"):
            raise ValueError(f"{asked[0]} needs --data and --judge")
        if self.export and not self.questions:
            raise ValueError("--export needs --questions")
        for name in ("beta", "max_response", "limit", "batch"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must not be negative, not {self.temperature}")

    @property
    def folder(self) -> Path:
        return Path(self.out or ("figures" if self.figures else "runs/evaluate"))

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype) if self.dtype != "auto" else torch.bfloat16 if torch.cuda.is_available() else torch.float32


def name_file(c: Config, kind: str, *depends) -> Path:
    """A file of --out, named after all that its content depends on: another model, other data or another flag never meets an old answer."""
    return c.folder / f"{kind}-{seed_of(c.dtype, *depends):016x}.jsonl"


def identity(model: str, config) -> list:
    """What tells a model from another one of the same name: its weights' sizes and times, or the Hub's commit."""
    return [model, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(model).glob("*.safetensors"))] or getattr(config, "_commit_hash", None)]


def show(c: Config, note: str, rows: list[dict], columns: list[str], **result):
    """Prints a table and writes it, with the flags that made it, as results-HASH.json."""
    if ranks()[0] == 0:
        flags = {k: v for k, v in dataclasses.asdict(c).items() if k != "out"}
        file = c.folder / f"results-{seed_of(flags):016x}.json"
        write_atomic(file, json.dumps({"flags": flags, "results": rows} | result, indent=1))
        print(f"{note}\n{table(rows, columns)}\n{file}", flush=True)


# ---------------------------------------------------------------- preference pairs


def score_pairs(c: Config, model: str, config, rows: list[dict], encoded: list[tuple], note: str) -> np.ndarray:
    """log pi of both sides of each pair [n, 2], in a file."""
    lm = None

    def work(items, number):
        nonlocal lm
        lm = lm or Scorer(load_lm(model, c.torch_dtype, c.device))
        with torch.no_grad():
            logps = lm(*collate([(encoded[i][0], encoded[i][side]) for side in (1, 2) for i in items], c.device)).tolist()
        return [{"id": rows[i]["id"], "chosen": logps[k], "rejected": logps[len(items) + k]} for k, i in enumerate(items)]
    file = name_file(c, "logps", identity(model, config), encoded, c.batch)
    found = phase(file, list(range(len(rows))), work, c.batch, key=lambda i: sum(map(len, encoded[i][:3])), note=note)
    return np.array([[row["chosen"], row["rejected"]] for row in found])


def evaluate_pairs(c: Config):
    """Accuracy, rewards and margin on preference pairs, with intervals."""
    rows, dropped = load_rows(c.pairs, "pair", c.limit)
    tok, config = load_tokenizer(c.model)
    if c.reference and (other := load_tokenizer(c.reference)[1]).vocab_size != config.vocab_size:
        die(f"--reference {c.reference} has another vocabulary than {c.model} ({other.vocab_size} and {config.vocab_size} tokens)")
    kept, encoded = [], []
    for row in rows:
        found, why = encode_pairs(tok, [row], config.max_position_embeddings - c.max_response, c.max_response)
        kept, encoded, dropped = kept + [row] * len(found), encoded + found, dropped + why
    if not kept:
        die(f"{c.pairs}: no pair left: " + ", ".join(f"{n} {why}" for why, n in dropped.items()))
    logps = score_pairs(c, c.model, config, kept, encoded, "model")
    ref = score_pairs(c, c.reference, other, kept, encoded, "reference") if c.reference else np.zeros_like(logps)
    chosen, rejected = pair_rewards(logps, ref, c.beta)
    prompts, short = np.array([seed_of(row["prompt"]) for row in kept]), shorter_chosen([(len(y), len(z)) for _, y, z, _ in encoded])
    row = lambda name, values, at=slice(None): {"measure": name} | dict(zip(("mean", "low", "high"), bootstrap(values[at], prompts[at], seed=c.seed))) | {"pairs": len(values[at])}
    right = (chosen > rejected).astype(float)
    table_rows = [row("accuracy", right), row("accuracy, shorter answer chosen", right, short), row("accuracy, others", right, ~short), row("chosen reward", chosen),
                  row("rejected reward", rejected), row("margin", chosen - rejected)]
    reference = c.reference or "none: rewards are beta log pi(y|x), which falls with length"
    note = f"{c.model} · reference {reference} · {c.pairs}" + "".join(f", {n} left out: {w}" for w, n in dropped.items())
    show(c, note, table_rows, ["measure", "mean", "low", "high", "pairs"])


# ---------------------------------------------------------------- a judge's opinion


def answer(c: Config, model: str, tok, config, rows: list[dict], temperature: float, note: str) -> list[dict]:
    """One answer to each row's prompt, with the model's own chat template, in a file."""
    file = name_file(c, "answers", identity(model, config), [row["prompt"] for row in rows], temperature, c.max_response, c.seed, c.batch)
    return generate(file, rows, model, tok, temperature=temperature, max_new_tokens=c.max_response, batch=c.batch, dtype=c.torch_dtype, device=c.device, seed=c.seed, note=note)


def judge_pairs(c: Config, judge, mine: list[dict], others: list[dict]) -> list[dict]:
    """Both orders' verdicts on two answers to each prompt, in a file; equal texts are a tie that nobody is asked about, and a number judge has one order."""
    def work(items, number):
        asked = [i for i in items if mine[i]["response"] != others[i]["response"]]
        talk = lambda swap: [(mine[i]["prompt"], *(side[i]["response"] for side in ((others, mine) if swap else (mine, others)))) for i in asked]
        there = dict(zip(asked, judge.answers("compare", talk(False))))
        back = dict(zip(asked, map(SWAPPED.get, judge.answers("compare", talk(True))))) if judge.orders else {}
        return [{"id": mine[i]["id"], "prompt": f"{seed_of(mine[i]['prompt']):016x}", "there": there.get(i), "back": back.get(i),
                 "verdict": settle(there[i], back[i] if judge.orders else there[i]) if i in there else "tie",
                 "length": len(mine[i]["response"]), "length_other": len(others[i]["response"])} for i in items]
    return phase(name_file(c, "verdicts", judge.spec, texts(mine), texts(others)), list(range(len(mine))), work, c.batch, note="judge")


def judge_scores(c: Config, judge, rows: list[dict], note: str) -> list[dict]:
    """The judge's score of each answer, None where it can't be read, in a file."""
    def work(items, number):
        return [{"id": rows[i]["id"], "score": s} for i, s in zip(items, judge.score([(rows[i]["prompt"], rows[i]["response"]) for i in items]))]
    return phase(name_file(c, "scores", judge.spec, texts(rows)), list(range(len(rows))), work, c.batch, note=note)


def texts(rows: list[dict]) -> list:
    return [(row["prompt"], row["response"]) for row in rows]


def evaluate_answers(c: Config):
    """Win/tie/loss against another model's answers or the annotations, and scores."""
    rows, dropped = load_rows(c.data, "response" if c.against == "annotations" else "prompt", c.limit)
    models = {model: load_tokenizer(model) for model in dict.fromkeys([c.model] + [c.against] * (c.against not in (None, "annotations")))}
    judge = make_judge(c.judge, c.folder / "judge", c.device, c.torch_dtype)
    fits = [row for row in rows if all(len(prompt_ids(tok, row["prompt"])) + c.max_response <= config.max_position_embeddings for tok, config in models.values())]
    dropped["prompts that leave no room for --max_response"] = len(rows) - len(fits)
    rows = fits or die(f"{c.data}: none of the {len(rows)} prompts leaves room for --max_response {c.max_response}")
    sides = {model: answer(c, model, tok, config, rows, c.temperature, f"answers of {model}") for model, (tok, config) in models.items()}
    if c.against:
        sides |= {c.against: rows} if c.against == "annotations" else {}
    note = f"{c.model} · {c.data}: {len(rows)} prompts · judge {c.judge}" + "".join(f", {n} left out: {w}" for w, n in dropped.items() if n)
    if c.score:
        scored = {name: judge_scores(c, judge, side, f"score {name}") for name, side in sides.items()}
        found = [{"answers of": name, "unreadable": sum(r["score"] is None for r in side)} | dict(zip(("score", "low", "high"), bootstrap(
            [r["score"] for r in side if r["score"] is not None], [seed_of(x["prompt"]) for x, r in zip(rows, side) if r["score"] is not None], seed=c.seed)))
            for name, side in scored.items()]
        if not c.against:
            return show(c, note, found, ["answers of", "score", "low", "high", "unreadable"])
        if ranks()[0] == 0:
            print(table(found, ["answers of", "score", "low", "high", "unreadable"]))
    result = versus(judge_pairs(c, judge, sides[c.model], sides[c.against]), c.seed)
    lines = [{"measure": text, "value": result[name], "low": result.get(f"{name}_low"), "high": result.get(f"{name}_high")} for name, text in (
        ("win", "win"), ("tie", "tie"), ("loss", "loss"), ("win_rate", "win rate, a tie being half a win"), ("gap", "win-loss gap"), ("flip_rate", "verdicts that flip with the order"),
        ("longer_wins", "decided for the longer answer"), ("judged", "pairs judged"), ("unreadable", "unreadable, left out"))]
    show(c, f"{note} · against {c.against}", lines, ["measure", "value", "low", "high"], **result, scores=found if c.score else None)
    if ranks()[0] == 0:
        if result["longer_wins"] is not None and result["longer_wins"] > LONGER_WINS:
            print(f"warning: the longer answer won {result['longer_wins']:.0%} of the decided comparisons: the judge may be counting words", file=sys.stderr)
        if c.judge.partition(":")[2] in models:
            print(f"warning: {c.judge} judges its own answers; judges prefer those", file=sys.stderr)


# ---------------------------------------------------------------- benchmarks


def benchmark_command(c: Config, task: str, out: Path) -> list[str]:
    """lm-evaluation-harness's command line for one task, in its authors' shots (a task of your own: its file's), chat template, few-shot as turns.
    -P: the harness imports a package called evaluate, which must not be this file."""
    shots = ["--num_fewshot", str(SHOTS[task])] if task in SHOTS else []
    return [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={c.model},dtype={str(c.torch_dtype).removeprefix('torch.')}", "--tasks", task, *shots,
            "--apply_chat_template", "--fewshot_as_multiturn", "--batch_size", str(c.batch), "--device", c.device.type, "--seed", str(c.seed),
            "--output_path", str(out), "--log_samples", *(["--include_path", c.tasks_dir] if c.tasks_dir else []), *(["--limit", str(c.limit)] if c.limit else [])]


def read_benchmark(folder: Path) -> dict | None:
    """The newest results_*.json that the harness left somewhere under folder, None if there is none."""
    files = sorted(folder.glob("**/results_*.json"), key=lambda f: f.stat().st_mtime)
    return json.loads(files[-1].read_text()) if files else None


def evaluate_benchmarks(c: Config):
    """Hands over to lm-evaluation-harness, task by task; a task with results is not run again."""
    if not importlib.util.find_spec("lm_eval"):
        die("--benchmarks needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
    if ranks()[1] > 1:
        die("--benchmarks starts processes of its own: run it without torchrun (its command, printed, also runs under `accelerate launch`)")
    _, config = load_tokenizer(c.model)
    if c.tasks_dir and not Path(c.tasks_dir).is_dir():
        die(f"--tasks_dir {c.tasks_dir}: no such folder")
    rows, versions = [], {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")}
    for task in c.benchmarks.split(","):
        folder = name_file(c, f"benchmark-{task}", identity(c.model, config), SHOTS.get(task), c.limit, c.seed, c.tasks_dir).with_suffix("")
        command = benchmark_command(c, task, folder)
        print(shlex.join(command), flush=True)
        if not read_benchmark(folder) and (code := subprocess.run(command).returncode):
            sys.exit(f"error: lm_eval ended with code {code}; its command is above")
        found = read_benchmark(folder) or sys.exit(f"error: lm_eval left no results in {folder}")
        for name, values in found["results"].items():
            if name == task or name not in found.get("group_subtasks", {}).get(task, []):  # of a group like mmlu: its mean, not its 57 parts
                rows += [{"task": name, "shots": found.get("n-shot", {}).get(name), "metric": key.replace(",none", ""), "value": value, "stderr": values.get(key.replace(",", "_stderr,"))}
                         for key, value in values.items() if "," in key and "_stderr" not in key]
    show(c, " · ".join(f"{name} {version}" for name, version in versions.items()), rows, ["task", "shots", "metric", "value", "stderr"], versions=versions)


# ---------------------------------------------------------------- exports


def read_questions(c: Config) -> list[dict]:
    """AlpacaEval's or MT-Bench's questions, checked."""
    rows, need = [], {"alpaca_eval": ("instruction",), "mt_bench": ("question_id", "category", "turns")}[c.export]
    for where, raw in read_file(Path(c.questions)):
        if not isinstance(raw, dict) or any(name not in raw for name in need):
            die(f"{where}: expected {', '.join(need)}")
        said = [raw["instruction"]] if c.export == "alpaca_eval" else raw["turns"]
        if not isinstance(said, list) or not said or not all(isinstance(text, str) and text.strip() for text in said):
            die(f"{where}: empty, or no text")
        rows.append(raw)
    return rows[:c.limit] or die(f"{c.questions}: no questions")


def answer_turns(c: Config, tok, config, questions: list[list[str]], temperatures: list[float]) -> list[list[str]]:
    """The model's answers to every turn of conversations whose user turns are given; turn by turn, one file per temperature."""
    for n, said in enumerate(questions, 1):  # checked before anything is sampled: a missing answer would count as a loss
        turns = [{"role": "user", "content": text} for text in said]
        if (total := sum(len(prompt_ids(tok, [turn])) + c.max_response for turn in turns)) > config.max_position_embeddings:
            die(f"question {n} needs up to {total} tokens, {c.model}'s context is {config.max_position_embeddings}: lower --max_response {c.max_response}")
    answers = [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        for temperature in sorted(set(temperatures)):
            which = [i for i, said in enumerate(questions) if len(said) > turn and temperatures[i] == temperature]
            talk = lambda i: [m for say, reply in zip(questions[i], answers[i]) for m in ({"role": "user", "content": say}, {"role": "assistant", "content": reply})]
            rows = [{"id": str(i), "prompt": talk(i) + [{"role": "user", "content": questions[i][turn]}]} for i in which]
            for i, row in zip(which, answer(c, c.model, tok, config, rows, temperature, f"turn {turn + 1}, temperature {temperature:g}") if rows else []):
                answers[i].append(row["response"])
    return answers


def evaluate_export(c: Config):
    """The answer file of a benchmark whose judge is elsewhere: out/alpaca_eval/NAME.json or out/mt_bench/NAME.jsonl."""
    questions, (tok, config) = read_questions(c), load_tokenizer(c.model)
    name = c.name or c.model.strip("/").replace("/", "-")
    if c.export == "alpaca_eval":
        answers = answer_turns(c, tok, config, [[q["instruction"]] for q in questions], [c.temperature] * len(questions))
        rows = [{"instruction": q["instruction"], "output": said[0], "generator": name} | ({"dataset": q["dataset"]} if "dataset" in q else {}) for q, said in zip(questions, answers)]
        file, text = c.folder / c.export / f"{name}.json", json.dumps(rows, indent=1, ensure_ascii=False)
        then = f"alpaca_eval --model_outputs {file} --annotators_config weighted_alpaca_eval_gpt4_turbo"
    else:
        answers = answer_turns(c, tok, config, [q["turns"] for q in questions], [TEMPERATURES.get(q["category"], 0.7) for q in questions])
        rows = [{"question_id": q["question_id"], "answer_id": f"{seed_of(name, q, said):016x}", "model_id": name, "choices": [{"index": 0, "turns": said}], "tstamp": time.time()}
                for q, said in zip(questions, answers)]
        file, text = c.folder / c.export / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        then = f"copy it to FastChat's data/mt_bench/model_answer/, then python gen_judgment.py --model-list {name}"
    if ranks()[0] == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
        print(f"{file}: {len(rows)} questions answered as {name}\nnext: {then}")


def main():
    argv = sys.argv[1:]
    c = parse(Config, argv=["--model", *argv] if argv and not argv[0].startswith("-") else argv)
    if c.folder.is_file():
        die(f"{c.folder} is a file: choose another --out")
    if c.figures:
        try:
            import figures
            return figures.draw(c.figures, c.folder)
        except FileNotFoundError as fault:
            die(f"{fault.filename}: no such file; a figure needs what the run has left there")
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # only barriers; a slow rank is waited for
    if ranks()[0] == 0:
        c.folder.mkdir(parents=True, exist_ok=True)
    next(work for asked, work in ((c.pairs, evaluate_pairs), (c.benchmarks, evaluate_benchmarks), (c.export, evaluate_export), (True, evaluate_answers)) if asked)(c)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
