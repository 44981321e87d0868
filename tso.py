"""TSO, Self-Training with Scaled Preference Optimization (arXiv 2409.02118).

A language model is trained on preferences between answers of its own and of its relatives; no
reward model is trained. For every slice of the prompts:

  diversity    A matrix of versions x scales samples the candidates. The answers of the current
               model, the latest and largest, are positives; those of older versions and of smaller
               models are negatives. Human answers join: preferred ones as positives, rejected ones
               as negatives.
  validity     Feedback corrects every pair (y_w, y_l): a judge (a language model is asked in both
               orders) or a person says keep, swap or drop.
  adaptivity   The policy is trained on the slice's pairs, with the current policy as reference and
               with the loss below. Then the reference is the new policy, which samples the next
               slice's candidates. All slices are gone through N times.

  r_w = beta log pi(y_w)/pi_ref(y_w),   r_l = beta log pi(y_l)/pi_ref(y_l)
  L_dual-clip = -log sigmoid( min(r_w, c_w) - max(r_l, -c_l) )

The paper calls the last part "mini-batch iterative DPO". Its mini-batch is a part of the prompts,
hundreds to thousands of them, and is called a slice here.

Why the clip: DPO pushes the negative down, which is cheaper than raising the positive, and drags
the positive down with it (Fig. 3). With the clip (Fig. 4) a side that has moved far enough earns no
more: once r_l < -c_l the loss can only raise r_w. Where both are clipped, the pair is finished.
With c_w = c_l = inf it is DPO's loss.

Differs from the paper, or is not specified by it (ours unless said):

 1. The paper's formula of L_dual-clip is not public. This one has the two properties that its
    Figs. 3 and 4 show. Another reading goes into dual_clip_losses; `clipped`, which only reports,
    must follow it. Published relatives, which also bound a side: DPO-Shift (2502.07599),
    Bounded-DPO (2506.12725) and APO-zero (2408.06266), which docs/forking.md puts in.
 2. The paper's models are not public either: the paper preset takes one public family in two sizes.
    It names no older version, so that with one round its matrix has scales only: give --older, or
    more rounds. Its "human" answers are UltraFeedback's, which models have written.
 3. The pairs of a prompt are spread evenly over the crossings of the matrix (positive cell x
    negative cell; `cell` in the files), and identical texts are left out. `--negatives current`
    pairs the policy with itself, which only makes sense with correction.
 4. The policy at the end of each round becomes an older version too, as soon as it is no longer the
    current one: after the first slice of the next round. So the first comes into use in the second
    slice of round 2 or, if there is one slice only, in round 3.
 5. The judge's prompts stand in common.py. A verdict that changes with the order is a tie; ties and
    unreadable verdicts drop the pair. A person's verdict (`--verdicts`) outranks the judge's.
 6. Every slice has a fresh optimizer and learning-rate curve.
 7. The judge reads all of a human answer; the policy is trained on its first --max_response tokens.
 8. Diversity is measured by distinct-2 and by the mean Jaccard similarity of token bigrams between
    the candidates of a prompt.

    python tso.py                                      # laptop: the toy world, minutes
    python tso.py --preset paper --limit 2000          # one GPU of 180 GiB, a part of the data
    torchrun --nproc_per_node 8 tso.py                 # a run of the paper's size

Shapes: B pairs of a micro-batch, T length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import common
import datafiles
import job
import toy
from common import Answer, Model, Pair, Sampling, Scorer, lm_shapes, load_lm

# ------------------------------------------------------------------------- the equations


# --- same in dnpo.py, tso.py, sams.py: rewards ---
def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """r = beta log pi_theta(y)/pi_ref(y) of the chosen and of the rejected answers.

    logps, ref_logps: [B, 2], chosen and rejected -> [B], [B].
    """
    chosen, rejected = (beta * (logps - ref_logps)).unbind(1)
    return chosen, rejected


# --- end: rewards ---


def dual_clip_losses(
    chosen_reward: Tensor, rejected_reward: Tensor, clip_chosen: float, clip_rejected: float
) -> Tensor:
    """L_dual-clip = -log sigmoid( min(r_w, c_w) - max(r_l, -c_l) ): the loss of each pair.

    With both clips infinite it is DPO's loss (Rafailov et al., Eq. 7). [B], [B] -> [B].
    """
    chosen = chosen_reward.clamp(max=clip_chosen)
    rejected = rejected_reward.clamp(min=-clip_rejected)
    return F.softplus(-(chosen - rejected))


def clipped(
    chosen_reward: Tensor, rejected_reward: Tensor, clip_chosen: float, clip_rejected: float
) -> tuple[Tensor, Tensor]:
    """Which sides have moved far enough to have no gradient: r_w > c_w, r_l < -c_l.

    [B], [B] -> [B], [B] of 0 and 1.
    """
    return (chosen_reward > clip_chosen).float(), (rejected_reward < -clip_rejected).float()


def correction(better: str | None) -> str:
    """The verdict on a pair: "keep", "swap" or "drop", by which answer the judge finds better.

    better: "A" is the positive, "B" the negative; it may also be "tie", or None if unreadable.
    """
    return {"A": "keep", "B": "swap"}.get(better, "drop")


def distinct2(answers: list[list[int]]) -> float:
    """Different bigrams / bigrams of all answers (token ids) to one prompt; 0 if there are none."""
    grams = []
    for ids in answers:
        grams += zip(ids, ids[1:])
    return len(set(grams)) / len(grams) if grams else 0.0


def similarity(answers: list[list[int]]) -> float | None:
    """The mean Jaccard similarity |A & B| / |A or B| of all pairs of answers to one prompt.

    Answers are token ids. A and B are the sets of the answers' bigrams, or of the token itself
    where there is but one.
    """
    sets = [set(zip(ids, ids[1:])) or set(ids[:1]) for ids in answers]
    overlaps = []
    for a, b in itertools.combinations(sets, 2):
        overlaps.append(len(a & b) / len(a | b) if a | b else 1.0)
    return common.mean_or_none(overlaps)


def skewness_kurtosis(scores: list[float]) -> tuple[float, float] | None:
    """Fig. 5: E[((s - mean)/std)^3] and E[((s - mean)/std)^4] - 3 of the scores of one prompt.

    None if all scores are equal, or there are none.
    """
    if len(set(scores)) < 2:
        return None
    mean = sum(scores) / len(scores)
    deviations = [score - mean for score in scores]
    m2 = sum(d**2 for d in deviations) / len(scores)
    m3 = sum(d**3 for d in deviations) / len(scores)
    m4 = sum(d**4 for d in deviations) / len(scores)
    return m3 / m2**1.5, m4 / m2**2 - 3


# ------------------------------------------------------------------------- configuration

# who gives the positives and the negatives; sample_matrix fills these cells
CELLS = {
    "positives": ("current", "human"),
    "negatives": ("current", "older", "smaller", "human"),
}


@dataclass(frozen=True)
class Config:
    """Every field is a flag, its comment the flag's help. The defaults are the paper's preset."""

    # -- the method
    # older versions of the model: folders or Hub ids
    older: list[str] = field(default_factory=list)
    # smaller models; their tokenizers may differ
    smaller: list[str] = field(default_factory=lambda: ["meta-llama/Llama-3.2-1B-Instruct"])
    # cells of the positives: current, human
    positives: list[str] = field(default_factory=lambda: ["current", "human"])
    # cells of the negatives: current, older, smaller, human
    negatives: list[str] = field(default_factory=lambda: ["older", "smaller", "human"])
    n_positive: int = 1  # answers of the current policy per prompt
    n_negative: int = 1  # answers of each negative cell's models per prompt
    pairs_per_prompt: int = 2  # pairs made of them, evenly over the cells
    correct: bool = True  # let the judge keep, swap or drop each pair
    # a person's verdicts, as written by --export_pairs: JSON lines
    # {"id", "verdict": keep, swap or drop}
    verdicts: str | None = None
    # write the next slice's pairs for a person to judge, and stop there
    export_pairs: str | None = None
    slices: int = 4  # M, parts that the prompts are cut into
    rounds: int = 1  # N, passes over all slices
    # c_w: no more credit for raising the chosen reward beyond it; inf: DPO
    clip_chosen: float = 0.2
    # c_l: no more credit for lowering the rejected reward below minus it; inf: DPO
    clip_rejected: float = 0.2
    beta: float = 0.1  # strength of the pull to the reference

    # -- data
    model: str = "meta-llama/Llama-3.1-8B-Instruct"  # model folder or Hub id to start from
    # prompts with human answers or pairs: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    data: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    # held-out annotated prompts (without it: a tenth of --data, by a hash of the prompt)
    test: str | None = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    # toy, hf:PATH, rm:PATH, api:MODEL, or none
    judge: str = "rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B"
    # use the first LIMIT training prompts (and at most as many held-out ones)
    limit: int | None = None
    test_prompts: int = 500  # held-out prompts to measure on
    # answers to each held-out prompt whose scores' skewness and kurtosis are measured, before and
    # after (the paper: 64; 0: none)
    n_scores: int = 0
    temperature: float = 1.0  # of the sampling
    max_prompt: int = 512  # tokens; a longer prompt is left out and counted
    # tokens; a longer answer is cut, and gets no end-of-sequence token
    max_response: int = 512

    # -- optimisation
    lr: float = 5e-7  # peak learning rate
    # share of a slice's steps in which the learning rate rises; then it falls as a cosine
    warmup: float = 0.1
    epochs: int = 1  # passes over a slice's pairs
    batch: int = 64  # pairs per optimizer step, over all ranks
    micro_batch: int = 4  # pairs per forward pass and rank; changes memory, not results
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop every slice after this many optimizer steps
    seed: int = 0  # of slices, sampling, pairs and order

    # -- system
    # all other defaults; unset: paper under CUDA, else toy
    preset: Literal["toy", "paper"] = "paper"
    # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"
    # of the computation; weights and optimizer stay in float32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    compile: bool = False  # the layers, with torch.compile; the first steps take minutes
    sample_batch: int = 64  # answers sampled or judged at a time
    save_every: int = 50  # optimizer steps between training states
    # of the weights of the last checkpoint; those in between stay in float32
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    out: str = "runs/tso"  # folder of the run
    resume: bool = False  # go on with the run in --out, or begin it
    overwrite: bool = False  # delete the run in --out and begin again
    # check everything, show the plan and one example, and stop before any model is loaded
    dry_run: bool = False

    def __post_init__(self):
        job.check_positive(self, "n_positive", "n_negative", "pairs_per_prompt", "slices", "rounds")
        job.check_positive(self, "clip_chosen", "clip_rejected", "beta", "lr", "batch")
        job.check_positive(self, "micro_batch", "sample_batch", "save_every", "max_prompt")
        job.check_positive(self, "max_response", "test_prompts", "clip")
        job.check_not_negative(self, "temperature", "n_scores")
        job.check_run(self)
        job.check_positive(self, "limit", "max_steps")
        for name, cells in CELLS.items():
            asked = getattr(self, name)
            if not asked or not set(asked) <= set(cells):
                raise ValueError(f"--{name} {' '.join(asked)}: expected some of {', '.join(cells)}")
        if self.correct and self.judge == "none" and not self.verdicts and not self.export_pairs:
            raise ValueError("--judge none can't correct: use --no-correct, or --verdicts")
        if self.export_pairs:
            job.check_out(Path(self.export_pairs).parent, "--export_pairs")


# Of the method, older, smaller, n_scores, lr, batch and epochs differ from the paper preset.
TOY = {
    "model": "runs/toy/sft",
    "older": ["runs/toy/sft-early"],
    "smaller": ["runs/toy/sft-small"],
    "data": "runs/toy/train.jsonl",
    "test": "runs/toy/test.jsonl",
    "judge": "toy",
    "limit": 2000,
    "n_scores": 16,
    "max_response": 64,
    "lr": 5e-5,
    "epochs": 2,
    "batch": 32,
    "micro_batch": 16,
    "sample_batch": 250,
    "sort_by_length": False,
    "parallel": "ddp",
    "dtype": "float32",
    "activation_checkpointing": False,
}
# what may change between a run and its --resume
MAY_CHANGE = ("out", "resume", "overwrite", "parallel", "micro_batch")
MAY_CHANGE += ("save_every", "save_dtype", "verdicts", "export_pairs", "rounds")


# ------------------------------------------------------------------------- the slices


class Slice(NamedTuple):
    """One turn of the outer loop: a part of the prompts in a round, and where its files are."""

    number: int  # from 1, over all rounds; 0 is the model that we start from
    round: int  # from 1 to N
    part: int  # from 1 to M
    rows: list[dict]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.round}.{self.part}" if self.number else "start"

    @property
    def trained(self) -> bool:
        return (self.folder / "checkpoint").exists()


def main():
    c = job.parse(Config, {"toy": TOY, "paper": {}})
    device = setup(c)
    policy, parts, test_rows, human_verdicts, judge = prepare(c, device)
    if c.dry_run:
        return
    out = job.open_run(c, [c.data, c.test, c.verdicts], MAY_CHANGE)
    started = time.monotonic()
    sampling = Sampling(c.temperature, c.max_response, c.sample_batch)
    start = Slice(number=0, round=0, part=0, rows=[], folder=out / "start")
    results = [{"round": 0, "slice": 0, **measure(c, start, policy, test_rows, sampling, judge)}]
    round_ends = []  # the models of the rounds so far
    for at in all_slices(c, parts, out):
        # diversity: versions x scales sample the candidates
        older = c.older + [path for path in round_ends if path != policy.path]
        candidates = sample_matrix(c, at, policy, older, sampling)
        made, without = make_pairs(c, at, candidates)

        # validity: a judge, or a person, corrects every pair
        judged = judge_pairs(c, at, made, judge)
        if awaits_person(c, at, made, human_verdicts):
            export(c.export_pairs, at, made, judged)
            return job.leave()
        pairs = correct_pairs(c, at, made, judged, human_verdicts)
        encoded, left_out = encode_kept(c, at, policy.tok, pairs)

        # adaptivity: the policy is its own reference; what comes out samples the next slice
        if not at.trained:
            train(c, at, encoded, policy)
        policy = policy.with_weights(job.finish(at.folder))
        if at.part == c.slices:
            round_ends.append(policy.path)  # older versions once they are no longer the policy

        result = training_summary(out, at, pairs, encoded, left_out)
        result.update(prompts_without_pair=without, diversity=diversity(candidates, policy))
        result.update(measure(c, at, policy, test_rows, sampling, judge))
        results.append(result)
        job.write_results(out, {"slices": results, "seed": c.seed}, started)
    report(out, results, policy.path, started)
    job.leave()


def all_slices(c, parts: list[list[dict]], out: Path) -> list[Slice]:
    """The M slices of each of the N rounds, in order."""
    slices = []
    for round_ in range(1, c.rounds + 1):
        for part, rows in enumerate(parts, 1):
            folder = out / f"round{round_}-slice{part}"
            slices.append(Slice(len(slices) + 1, round_, part, rows, folder))
    return slices


def is_last(c, at: Slice) -> bool:
    """Whether a slice is the last of the last round."""
    return at.number == c.rounds * c.slices


# ------------------------------------------------------------------------- diversity


class Candidates(NamedTuple):
    """The answers of each cell of the matrix to each prompt: {cell: [the answers to row i]}."""

    positives: dict[str, list[list[Answer]]]
    negatives: dict[str, list[list[Answer]]]


def sample_matrix(c, at: Slice, policy: Model, older: list[str], sampling: Sampling) -> Candidates:
    """The candidates of every cell for every row of a slice; a cell without answers is left out.

    There is one model in memory at a time, and one file a model.
    """
    positives = {cell: [[] for _ in at.rows] for cell in CELLS["positives"]}
    negatives = {cell: [[] for _ in at.rows] for cell in CELLS["negatives"]}

    # the current policy: positives, and more answers as negatives if asked for
    n_positive = c.n_positive if "current" in c.positives else 0
    n_negative = c.n_negative if "current" in c.negatives else 0
    if n_positive + n_negative:
        drawn = draw_answers(c, at, "current", policy, n_positive + n_negative, sampling)
        for i, answers in enumerate(drawn):
            positives["current"][i] += answers[:n_positive]
            negatives["current"][i] += answers[n_positive:]

    # other versions and scales: negatives
    for cell, paths in (("older", older), ("smaller", c.smaller)):
        if cell not in c.negatives:
            continue
        for number, path in enumerate(paths):
            tok, _ = common.load_tokenizer(path)
            model = dataclasses.replace(policy, path=path, tok=tok)
            drawn = draw_answers(c, at, f"{cell}{number}", model, c.n_negative, sampling)
            for i, answers in enumerate(drawn):
                negatives[cell][i] += answers

    # people's answers
    for i, row in enumerate(at.rows):
        if "human" in c.positives and row.get("response"):
            positives["human"][i].append(common.given_answer(row, "response"))
        if row.get("rejected"):  # read only if human negatives are asked for
            negatives["human"][i].append(common.given_answer(row, "rejected"))
    return Candidates(without_empty_cells(positives), without_empty_cells(negatives))


def draw_answers(
    c, at: Slice, name: str, model: Model, n: int, sampling: Sampling
) -> list[list[Answer]]:
    """n answers of a model to each row of a slice, in the slice's file candidates-NAME.jsonl."""
    drawn = common.generate(
        at.folder / f"candidates-{name}.jsonl",
        at.rows,
        model,
        sampling,
        job.seed_of(c.seed, "candidates", at.folder.name, name),
        n=n,
        note=f"{at.name}: sample {name}",
    )
    answers = [common.given_answer(row, "response") for row in drawn]
    return [answers[i * n : (i + 1) * n] for i in range(len(at.rows))]


def without_empty_cells(cells: dict[str, list[list[Answer]]]) -> dict[str, list[list[Answer]]]:
    return {cell: answers for cell, answers in cells.items() if any(answers)}


def make_pairs(c, at: Slice, candidates: Candidates) -> tuple[list[dict], int]:
    """Preference rows of all prompts of a slice, and how many prompts gave none.

    The rows have the ids SLICE/PROMPT/NUMBER, and in meta.cell the crossing that they come from.
    """
    pairs, without = [], 0
    for i, row in enumerate(at.rows):
        drawn = draw_pairs(c, at, candidates, i)
        for number, (cell, chosen, rejected) in enumerate(drawn):
            pairs.append(
                {
                    "id": f"{at.name}/{row['id']}/{number}",
                    "prompt": row["prompt"],
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "meta": {
                        "cell": cell,
                        "chosen_ended": chosen.ended,
                        "rejected_ended": rejected.ended,
                        **common.sampled_ids(chosen, rejected),
                    },
                }
            )
        if not drawn:
            without += 1
    if not pairs:
        job.die(
            f"slice {at.name}: no pairs: positives {', '.join(c.positives)} and negatives "
            f"{', '.join(c.negatives)} gave no two different texts for any prompt"
        )
    return pairs, without


def draw_pairs(c, at: Slice, candidates: Candidates, i: int) -> list[tuple[str, Answer, Answer]]:
    """Up to pairs_per_prompt pairs of answers to row i: (crossing, chosen, rejected).

    A crossing is a positive cell with a negative cell. The crossings take turns, and the next row
    goes on where this one should stop, so that each gives about as many pairs as any other. One
    that has no pair left gives its turn to the next.
    """
    crossings = list(itertools.product(candidates.positives, candidates.negatives))
    rng = random.Random(job.seed_of(c.seed, "pairs", at.name, at.rows[i]["id"]))
    drawn = []
    used = set()  # the texts of the pairs that are drawn
    turn = i * c.pairs_per_prompt
    misses = 0  # turns since the last pair; after one of every crossing there is no pair left
    while len(drawn) < c.pairs_per_prompt and misses < len(crossings):
        positive, negative = crossings[turn % len(crossings)]
        turn += 1
        positives, negatives = candidates.positives[positive][i], candidates.negatives[negative][i]
        free = unused_pairs(positives, negatives, used)
        if not free:
            misses += 1
            continue
        misses = 0
        chosen, rejected = rng.choice(free)
        used.add(frozenset((chosen.text, rejected.text)))
        drawn.append((f"{positive} > {negative}", chosen, rejected))
    return drawn


def unused_pairs(
    positives: list[Answer], negatives: list[Answer], used: set[frozenset[str]]
) -> list[tuple[Answer, Answer]]:
    """One positive with one negative, different and not empty, whose texts are not yet a pair.

    Nor the other way round: the judge would make the same pair of both.
    """
    free = []
    for chosen, rejected in itertools.product(positives, negatives):
        texts = frozenset((chosen.text, rejected.text))
        empty = not chosen.text.strip() or not rejected.text.strip()
        if not empty and chosen.text != rejected.text and texts not in used:
            free.append((chosen, rejected))
    return free


def diversity(candidates: Candidates, model: Model) -> dict[str, dict]:
    """How unlike the candidates of a prompt are, with all cells and without each of them.

    That is distinct-2 and the mean pairwise similarity, averaged over the prompts. The tokens are
    the model's.
    """
    sides = [token_ids(side, model) for side in candidates]
    names = [name for name in CELLS["negatives"] if any(name in side for side in sides)]
    found = {"all": diversity_of(sides, names)}
    if len(names) > 1:
        for name in names:
            rest = [other for other in names if other != name]
            found[f"without {name}"] = diversity_of(sides, rest)
    return found


def token_ids(
    cells: dict[str, list[list[Answer]]], model: Model
) -> dict[str, list[list[list[int]]]]:
    """The answers of each cell to each prompt as token ids."""
    encoded = {}
    for cell, prompts in cells.items():
        encoded[cell] = []
        for answers in prompts:
            ids = [model.tok(a.text, add_special_tokens=False)["input_ids"] for a in answers]
            encoded[cell].append(ids)
    return encoded


def diversity_of(
    sides: list[dict[str, list[list[list[int]]]]], names: list[str]
) -> dict[str, float | None]:
    """distinct-2 and similarity of each prompt's answers from the cells `names`, averaged."""
    cells = []
    for name in names:
        cells += [side[name] for side in sides if name in side]

    distinct, similar = [], []
    for of_cells in zip(*cells):  # the answers to one prompt
        answers = list(itertools.chain(*of_cells))
        distinct.append(distinct2(answers))
        likeness = similarity(answers)
        if likeness is not None:
            similar.append(likeness)
    return {
        "distinct2": common.mean_or_none(distinct),
        "similarity": common.mean_or_none(similar),
    }


# ------------------------------------------------------------------------- validity


def judge_pairs(c, at: Slice, pairs: list[dict], judge) -> list[dict]:
    """The judge's verdict on every pair, in the slice's judged.jsonl.

    A row is {"id", "verdict": keep, swap or drop, "unreadable"}. Without a judge, or with
    --no-correct, every pair is kept.
    """

    def work(items, number):
        some = [pairs[i] for i in items]
        answers = ["A"] * len(some)  # A: the positive is the better one
        if judge_corrects(c):
            answers = judge.compare([(p["prompt"], p["chosen"], p["rejected"]) for p in some])
        rows = []
        for pair, better in zip(some, answers):
            verdict = correction(better)
            rows.append({"id": pair["id"], "verdict": verdict, "unreadable": better is None})
        return rows

    texts = [(pair["id"], pair["chosen"], pair["rejected"]) for pair in pairs]
    judged = job.phase(
        at.folder / "judged.jsonl",
        list(range(len(pairs))),
        work,
        c.sample_batch,
        settings=[c.correct, judge and judge.key, texts],
        note=f"{at.name}: correct",
        ids=[pair["id"] for pair in pairs],
    )
    if judge:
        judge.free()
    return judged


def judge_corrects(c) -> bool:
    """Whether a judge is asked about the pairs."""
    return c.correct and c.judge != "none"


def awaits_person(c, at: Slice, pairs: list[dict], human_verdicts: dict[str, str]) -> bool:
    """Whether a slice's pairs are to be exported for a person, who has not judged any of them."""
    judged = any(pair["id"] in human_verdicts for pair in pairs)
    return c.export_pairs is not None and not at.trained and not judged


def correct_pairs(
    c, at: Slice, made: list[dict], judged: list[dict], human_verdicts: dict[str, str]
) -> list[dict]:
    """The pairs with their final verdicts: a person's where there is one, else the judge's."""
    silent = [pair["id"] for pair in made if pair["id"] not in human_verdicts]
    if c.judge == "none" and c.correct and not at.trained and silent:
        job.die(
            f"slice {at.name}: {len(silent)} pairs have no verdict, {silent[0]} the first: "
            "add them to --verdicts, or name a --judge"
        )
    judged_by = "judge" if judge_corrects(c) else None
    return keep_on_disk(at, apply_verdicts(made, judged, human_verdicts, at.name, judged_by))


def keep_on_disk(at: Slice, pairs: list[dict]) -> list[dict]:
    """Writes a slice's pairs.jsonl, and returns what the slice is, or was, trained on.

    Once a training has begun its pairs are fixed: the file is only read, and while the training is
    unfinished other pairs end the program.
    """
    text = job.json_lines(pairs)
    file = at.folder / "pairs.jsonl"

    # what a slice was trained on can't be made again: the verdicts may have changed since
    checkpoint = at.folder / "checkpoint"
    if at.trained and not file.exists():
        job.die(f"{file} is missing: delete {checkpoint}, and the slice is trained again")

    # a training that has begun goes on with the pairs that it was begun with
    state = at.folder / "state.pt"
    if state.exists() and not (file.exists() and file.read_bytes() == text.encode()):
        job.die(
            f"slice {at.name} is being trained on pairs with other verdicts: "
            f"go on with those, or delete {state}"
        )

    if job.on_rank_0() and not at.trained:
        job.write_atomic(file, text)
    job.barrier()
    advice = f"delete it and {checkpoint}, and the slice is trained again"
    return job.read_jsonl(file, advice=advice)


def apply_verdicts(
    pairs: list[dict],
    judged: list[dict],
    human_verdicts: dict[str, str],
    slice_name: str,
    judged_by: str | None,
) -> list[dict]:
    """Pairs with meta.verdict; where that is swap, their sides are exchanged.

    A person's verdict outranks the judge's, and meta.by says whose it is. human_verdicts: by the
    pair's id. slice_name: with which the ids begin. judged_by: whose verdict it is where no person
    gave one, "judge" or None.
    """
    ids = {pair["id"] for pair in pairs}
    unknown = [
        name for name in human_verdicts if name.split("/")[0] == slice_name and name not in ids
    ]
    if unknown:
        more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        job.die(f"--verdicts: no pair has the id {unknown[0]!r}{more}")

    corrected = []
    for pair, by_judge in zip(pairs, judged):
        by_person = pair["id"] in human_verdicts
        meta = {
            **pair["meta"],
            "verdict": human_verdicts[pair["id"]] if by_person else by_judge["verdict"],
            "by": "person" if by_person else judged_by,
            "unreadable": by_judge["unreadable"] and not by_person,
        }
        pair = {**pair, "meta": meta}
        corrected.append(swapped(pair) if meta["verdict"] == "swap" else pair)
    return corrected


def swapped(pair: dict) -> dict:
    """The pair with its sides exchanged."""
    meta = {
        **pair["meta"],
        "chosen_ended": pair["meta"]["rejected_ended"],
        "rejected_ended": pair["meta"]["chosen_ended"],
    }
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "meta": meta}


def read_verdicts(path: str, c) -> dict[str, str]:
    """A person's verdicts by id.

    A row without id, or with an unknown slice or word, ends the program, naming file and line.
    """
    found = {}
    slices = set()
    for round_ in range(1, c.rounds + 1):
        slices.update(f"{round_}.{part}" for part in range(1, c.slices + 1))
    for where, row in datafiles.read_file(Path(path)):
        name = verdict = None
        if isinstance(row, dict):
            name, verdict = row.get("id"), row.get("verdict")
        if not isinstance(name, str) or name.split("/")[0] not in slices:
            job.die(
                f"{where}: no pair has the id {name!r} "
                "(expected ROUND.SLICE/PROMPT/NUMBER as in --export_pairs)"
            )
        if verdict not in ("keep", "swap", "drop"):
            job.die(f"{where}: {name}: the verdict is {verdict!r}, expected keep, swap or drop")
        if found.setdefault(name, verdict) != verdict:
            job.die(f"{where}: {name} has two verdicts, {found[name]} and {verdict}")
    return found


def export(path: str, at: Slice, pairs: list[dict], judged: list[dict]):
    """Writes a slice's pairs for a person, as made, with the judge's verdicts to begin with.

    This is what --verdicts reads.
    """
    if not job.on_rank_0():
        return
    rows = []
    for pair, by_judge in zip(pairs, judged):
        prompt = pair["prompt"]
        if len(prompt) == 1:
            prompt = prompt[0]["content"]
        rows.append(
            {
                "id": pair["id"],
                "verdict": by_judge["verdict"],
                "cell": pair["meta"]["cell"],
                "prompt": prompt,
                "chosen": pair["chosen"],
                "rejected": pair["rejected"],
            }
        )
    job.write_atomic(Path(path), job.json_lines(rows))
    print(
        f"{len(pairs)} pairs of slice {at.name} in {path}: edit their verdicts (keep, swap, drop), "
        f"then go on with --resume --verdicts {path}"
    )


def encode_kept(c, at: Slice, tok, pairs: list[dict]) -> tuple[list[Pair], Counter]:
    """The ids of the pairs that were not dropped, and how many were left out, by reason."""
    kept = [pair for pair in pairs if pair["meta"]["verdict"] != "drop"]
    encoded, left_out = common.encode_pairs(tok, kept, c.max_prompt, c.max_response)
    if not encoded:
        job.die(
            f"slice {at.name}: no pair left to train on: {len(pairs)} made, "
            f"{len(pairs) - len(kept)} dropped by correction"
        )
    return encoded, left_out


# ------------------------------------------------------------------------- adaptivity: training


def train(c, at: Slice, pairs: list[Pair], start: Model):
    """Trains the policy from `start`, which is also the reference, on one slice's pairs.

    The slice's folder gets checkpoint/ and, while the training lasts, its state in state.pt. Each
    step adds a line to metrics.jsonl, which all slices share.
    """
    # the two models, and the optimizer
    device = start.device
    policy = shard(Scorer, start.path, c, device)
    reference = shard(frozen_scorer, start.path, c, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    parts = {"policy": (policy, optimizer)}  # what a training state holds

    # the steps, and what is around them
    sizes = [pair.tokens for pair in pairs] if c.sort_by_length else None
    steps = step_order(len(pairs), c, c.seed, "order", at.name, sizes=sizes)
    file = at.folder.parent / "metrics.jsonl"
    tags = {"iteration": at.number, "slice": at.name}  # "iteration" tells the trainings apart
    place = f"slice {at.name}"
    run = job.TrainingRun(
        c, at.folder, steps, parts, device, metrics=file, note=place, tags=tags, place=place
    )

    for step in run:  # goes on after a kill; ends on SIGTERM, and in write() on NaN
        sums = descend(c, policy, reference, pairs, steps[step], device)
        lr = c.lr * lr_factor(step, len(steps), c.warmup)
        norm = take_step(optimizer, lr, c.clip)

        metrics = run.reduce(step, sums, [pairs[i].id for i in steps[step]])
        run.write(step, metrics, lr=lr, grad_norm=norm, more=clip_note(metrics))
    dtype = c.save_dtype if is_last(c, at) else "float32"
    job.save_checkpoint(at.folder / "checkpoint", policy, start.tok, start.path, dtype)


def frozen_scorer(lm) -> Scorer:
    return Scorer(lm.requires_grad_(False))


def descend(
    c,
    policy: nn.Module,
    reference: nn.Module,
    pairs: list[Pair],
    indices: list[int],
    device,
) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs `indices`, which all ranks share.

    Returns this rank's part of the pairs' mean metrics.
    """
    n = len(indices)  # of the whole step: every rank knows all rows
    sums = {}
    micros = micro_batches(indices, c)
    for j, (some, weights) in enumerate(micros):
        ids, mask = common.collate_pairs([pairs[i] for i in some], device)  # [2B, T]
        weight = torch.tensor(weights, device=device)  # [B]

        with no_sync(policy, last=j + 1 == len(micros)):
            with autocast(c, device, policy):
                logps = common.by_pair(policy(ids, mask))  # [B, 2]
                with torch.no_grad():
                    ref_logps = common.by_pair(reference(ids, mask))  # [B, 2]
            chosen, rejected = implicit_rewards(logps, ref_logps, c.beta)
            losses = dual_clip_losses(chosen, rejected, c.clip_chosen, c.clip_rejected)
            loss = (weight * losses).sum() / n
            (loss * job.world_size()).backward()  # summed over ranks: DDP and FSDP average

        values = common.preference_metrics(losses, chosen, rejected, logps)
        of_chosen, of_rejected = clipped(chosen, rejected, c.clip_chosen, c.clip_rejected)
        values["clipped/chosen"] = of_chosen
        values["clipped/rejected"] = of_rejected
        common.add_weighted(sums, values, weight, n)
    return sums


def clip_note(metrics: dict[str, float]) -> str:
    """Rewards and clipped shares of both sides, for the console's line."""
    return (
        f" · rewards {metrics['rewards/chosen']:+.2f} {metrics['rewards/rejected']:+.2f}"
        f" · clipped {metrics['clipped/chosen']:.0%} {metrics['clipped/rejected']:.0%}"
    )


# ------------------------------------------------------------------------- input


def prepare(c, device):
    """Reads and checks all input and shows the plan, before the first weight is read.

    Returns the model to start from, the training rows in slices, the held-out rows, the verdicts of
    people by id, and the judge.
    """
    job.refuse_to_shorten(c, f"round{c.rounds + 1}-slice1", "--rounds")
    if c.export_pairs and c.export_pairs != c.verdicts and os.path.lexists(c.export_pairs):
        job.die(
            f"--export_pairs {c.export_pairs} is there already: if its verdicts are edited, "
            "name it with --verdicts too, else choose another file"
        )
    for path in c.older + c.smaller:
        _, config = common.load_tokenizer(path)
        common.check_context(path, config, c.max_prompt, c.max_response)
    tok, config = common.load_tokenizer(c.model)
    common.check_model(c.model, config, c.max_prompt, c.max_response)
    parts, test_rows, dropped = read_rows(c, tok)
    check_negatives(c, parts)
    human_verdicts = read_verdicts(c.verdicts, c) if c.verdicts else {}

    policy = Model(c.model, tok, device, getattr(torch, c.dtype))
    judge = common.make_judge(c.judge, Path(c.out) / "judge", device, policy.dtype, toy.score)
    if job.on_rank_0():
        show_plan(c, tok, parts, test_rows, dropped, device)
    return policy, parts, test_rows, human_verdicts, judge


def read_rows(c, tok) -> tuple[list[list[dict]], list[dict], Counter]:
    """Training rows in slices, held-out rows, and how many were left out, by reason.

    A pair's chosen side is its response; its rejected side is kept as a candidate.
    """
    need = "pair" if "human" in c.negatives and has_pairs(c.data) else "response"
    rows, test_rows, dropped = datafiles.load_split(
        c.data, c.test, need, c.limit, c.test_prompts, test_need="response"
    )
    test_rows = test_rows[: c.limit]
    for row in rows + test_rows:
        if "response" not in row:
            row["response"] = row["chosen"]

    found = len(rows) + len(test_rows)
    rows = common.fitting(tok, rows, c.max_prompt)
    test_rows = common.fitting(tok, test_rows, c.max_prompt)
    dropped["prompts longer than --max_prompt"] = found - len(rows) - len(test_rows)
    if len(rows) < c.slices or not test_rows:
        job.die(
            f"{c.data}: {len(rows)} training and {len(test_rows)} held-out prompts of at most "
            f"{c.max_prompt} tokens: too few for {c.slices} slices (--test names held-out data)"
        )
    order = random.Random(job.seed_of(c.seed, "slices")).sample(rows, len(rows))
    return [order[i :: c.slices] for i in range(c.slices)], test_rows, dropped


def has_pairs(spec: str) -> bool:
    """Whether a row has a rejected side."""
    for _, row in datafiles.read_raw(spec):
        if isinstance(row, dict) and (row.get("rejected") or row.get("generated")):
            return True
    return False


def check_negatives(c, parts: list[list[dict]]):
    """Ends the program if no cell of --negatives can have an answer in the first slice."""
    sources = {
        "current": True,
        "older": bool(c.older),
        "smaller": bool(c.smaller),
        "human": any(row.get("rejected") for row in parts[0]),
    }
    if not any(sources[cell] for cell in c.negatives):
        job.die(
            f"--negatives {' '.join(c.negatives)}: there are none to begin with: "
            "add current, name --older or --smaller models, or bring pairs for human ones"
        )


# ------------------------------------------------------------------------- measurements


def measure(c, at: Slice, model: Model, rows: list[dict], sampling: Sampling, judge) -> dict:
    """What a model is worth on the held-out prompts: by itself, and against the start model."""
    seed = job.seed_of(c.seed, "answers", at.name)
    note = f"{at.name}: "
    result = common.held_out(at.folder, rows, model, sampling, judge, seed, note)
    # held_out compares with the annotations; win, tie and loss alone are those against the start
    for outcome in ("win", "tie", "loss"):
        result[f"{outcome}_annotation"] = result.pop(outcome)
    if judge and at.number:
        start = at.folder.parent / "start"
        result.update(against_start(at.folder, start, judge, c.sample_batch, note))
    before_or_after = at.number == 0 or is_last(c, at)
    if judge and c.n_scores and before_or_after:
        result.update(score_spread(c, at, rows, model, sampling, judge))
    if judge:
        judge.free()
    return result


def against_start(
    folder: Path, start: Path, judge, size: int, note: str
) -> dict[str, float | None]:
    """The shares of held-out answers that win, tie and lose against the start model's.

    They are None where no verdict could be read. A language model is asked in both orders; the
    verdicts are in folder/against.jsonl.
    """
    new = job.read_jsonl(folder / "answers.jsonl")
    old = job.read_jsonl(start / "answers.jsonl")
    outcomes = {"A": "win", "tie": "tie", "B": "loss", None: None}

    def work(items, number):
        asked = [(new[i]["prompt"], new[i]["response"], old[i]["response"]) for i in items]
        rows = []
        for i, better in zip(items, judge.compare(asked)):
            rows.append({"id": new[i]["id"], "verdict": outcomes[better]})
        return rows

    texts = [(a["response"], b["response"]) for a, b in zip(new, old)]
    rows = job.phase(
        folder / "against.jsonl",
        list(range(len(new))),
        work,
        size,
        settings=[judge.key, texts],
        note=f"{note}against the start",
        ids=[row["id"] for row in new],
    )
    counts = Counter(row["verdict"] for row in rows)
    readable = len(rows) - counts[None]
    shares = {}
    for outcome in ("win", "tie", "loss"):
        shares[outcome] = counts[outcome] / readable if readable else None
    return shares


def score_spread(c, at: Slice, rows: list[dict], model: Model, sampling: Sampling, judge) -> dict:
    """Fig. 5: how the judge's scores of n_scores answers to each held-out prompt are spread.

    Writes the slice's spread.jsonl. Returns mean skewness and kurtosis, and as no_spread the share
    of prompts that have neither: all scores that could be read are equal.
    """
    n = c.n_scores
    drawn = common.generate(
        at.folder / "many.jsonl",
        rows,
        model,
        sampling,
        job.seed_of(c.seed, "many", at.folder.name),
        n=n,
        note=f"{at.name}: sample {n} each",
    )

    def work(items, number):
        asked = []
        for i in items:
            answers = drawn[i * n : (i + 1) * n]
            asked += [(rows[i]["prompt"], answer["response"]) for answer in answers]
        scores = judge.score(asked)

        spread = []
        for place, i in enumerate(items):
            read = [s for s in scores[place * n : (place + 1) * n] if s is not None]
            skewness, kurtosis = skewness_kurtosis(read) or (None, None)
            row = {"id": rows[i]["id"], "mean": common.mean_or_none(read)}
            spread.append({**row, "skewness": skewness, "kurtosis": kurtosis})
        return spread

    found = job.phase(
        at.folder / "spread.jsonl",
        list(range(len(rows))),
        work,
        c.sample_batch,
        settings=[judge.key, n, common.texts(drawn)],
        note=f"{at.name}: score {n} each",
        ids=[row["id"] for row in rows],
    )
    spread = [row for row in found if row["skewness"] is not None]
    return {
        "skewness": common.mean_or_none([row["skewness"] for row in spread]),
        "kurtosis": common.mean_or_none([row["kurtosis"] for row in spread]),
        "no_spread": 1 - len(spread) / len(found),
    }


FATES = ("made", "kept", "swapped", "dropped", "unreadable")


def training_summary(
    out: Path, at: Slice, pairs: list[dict], encoded: list[Pair], left_out: Counter
) -> dict:
    """What results.json says of a slice's pairs and of its training.

    Rewards and clipped shares are means over the last quarter of its steps.
    """
    fate = {"keep": "kept", "swap": "swapped", "drop": "dropped"}
    cells = {}
    for pair in pairs:
        meta = pair["meta"]
        counts = cells.setdefault(meta["cell"], dict.fromkeys(FATES, 0))
        counts["made"] += 1
        counts[fate[meta["verdict"]]] += 1
        counts["unreadable"] += meta["unreadable"]

    steps = job.metrics_of(out / "metrics.jsonl", at.number)
    end = steps[-math.ceil(len(steps) / 4) :]
    return {
        "round": at.round,
        "slice": at.part,
        "pairs": len(encoded),
        "left_out": dict(left_out),
        "made": len(pairs),
        "cells": cells,
        "steps": len(steps),
        "chosen_reward": common.mean_or_none([line["rewards/chosen"] for line in end]),
        "rejected_reward": common.mean_or_none([line["rewards/rejected"] for line in end]),
        "clipped_chosen": common.mean_or_none([line["clipped/chosen"] for line in end]),
        "clipped_rejected": common.mean_or_none([line["clipped/rejected"] for line in end]),
    }


# ------------------------------------------------------------------------- plan and report


def show_plan(c, tok, parts, test_rows: list[dict], dropped: Counter, device):
    """The header: what will be done with what, and one example with its loss mask."""
    plural = "s" if c.rounds > 1 else ""
    correctors = ["people"] if c.verdicts else []
    if judge_corrects(c):
        correctors.append(c.judge)
    correction_by = f"by {' and '.join(correctors)}" if correctors else "off"
    print(
        f"TSO · {job.preset_note(c)} · {c.rounds} round{plural} x {c.slices} slices"
        f" · positives {', '.join(c.positives)} · negatives {', '.join(c.negatives)}"
        f" · correction {correction_by} · clip {c.clip_chosen:g}/{c.clip_rejected:g}"
    )
    print(
        f"current {c.model} · older {', '.join(c.older) or 'none'}"
        f" · smaller {', '.join(c.smaller) or 'none'}"
    )
    prompts = sum(len(part) for part in parts)
    print(
        f"data {c.data}: {prompts} training prompts in slices of {len(parts[0])}, "
        f"{len(test_rows)} held-out prompts" + job.left_out_note(dropped)
    )
    steps = c.epochs * math.ceil(len(parts[0]) * c.pairs_per_prompt / c.batch)
    steps = min(steps, c.max_steps or steps)
    print(job.batch_note(c, f"at most {steps} steps a slice", device))
    lm = lm_shapes(c.model)
    print(job.memory_plan(lm, c, chunk=common.CHUNK, reference=True))
    common.show_example(tok, parts[0][0], c.max_response)


def report(out: Path, results: list[dict], model: str, started: float):
    """samples.md, the tables of results, and where the model is."""
    if not job.on_rank_0():
        return
    folders = [out / "start"]
    folders += [out / f"round{r['round']}-slice{r['slice']}" for r in results[1:]]
    job.write_samples(out, "slice", {folder.name: folder for folder in folders})

    columns = "round slice score full_marks win tie loss cut chosen_reward rejected_reward"
    columns += " clipped_chosen clipped_rejected pairs steps"
    print(job.table(results, columns.split()))

    totals = {}
    for result in results[1:]:
        for cell, counts in result["cells"].items():
            totals.setdefault(cell, Counter()).update(counts)
    cells = [{"cell": cell, **counts} for cell, counts in totals.items()]
    print(job.table(cells, ["cell", *FATES]))

    found = results[-1]["diversity"]
    rows = [{"candidates": name, **values} for name, values in found.items()]
    print(job.table(rows, ["candidates", "distinct2", "similarity"]))
    job.show_end(out, "results.json, samples.md, metrics.jsonl", model, started)


# ------------------------------------------------------------------------- the scaffold
# The regions between the markers are one text in the three scripts: a test compares them.


# --- same in dnpo.py, tso.py, sams.py: shard ---
def shard(wrap, path: str, c, device) -> nn.Module:
    """Loads a model in float32 and makes it ready for the loop: a Scorer, made by wrap(lm).

    First comes activation checkpointing, then DDP, FSDP2 (hsdp: sharded inside a node, replicated
    across) or one device. Under FSDP only rank 0 ever holds the whole model, on its CPU, and a
    frozen model is kept in c.dtype: FSDP computes with nothing finer.
    """
    gc.collect()  # models of before: a layer that is checkpointed, or hooked, refers to itself
    sharded = dist.is_initialized() and c.parallel in ("fsdp", "hsdp")
    module = wrap(lm_shapes(path) if sharded else load_lm(path, torch.float32, "cpu"))
    layers = common.blocks(module.lm)

    if c.compile:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    if c.activation_checkpointing and any(p.requires_grad for p in module.lm.parameters()):
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    if not sharded:
        module = module.to(device)
        trained = any(p.requires_grad for p in module.parameters())
        if dist.is_initialized() and trained:
            return DDP(module, find_unused_parameters=module.unused)
        return module

    full = wrap(load_lm(path, torch.float32, "cpu")) if job.on_rank_0() else None
    job.cast_frozen([module, full], getattr(torch, c.dtype))
    options = {"mp_policy": fsdp.MixedPrecisionPolicy(getattr(torch, c.dtype), torch.float32)}
    if c.parallel == "hsdp":
        options["mesh"] = job.node_mesh(device.type)
    for layer in layers:
        fsdp.fully_shard(layer, **options)
    fsdp.fully_shard(module, **options)  # the root holds embedding and head: they may be tied
    return job.fill(module, full, device)


# --- end: shard ---


# --- same in dnpo.py, tso.py, sams.py: precision ---
def autocast(c, device, module: nn.Module):
    """bf16 compute over fp32 weights in a forward pass; FSDP casts by itself."""
    enabled = c.dtype == "bfloat16" and not isinstance(module, fsdp.FSDPModule)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def no_sync(*modules: nn.Module, last: bool):
    """DDP sends no gradients before a step's last micro-batch."""
    stack = contextlib.ExitStack()
    for module in modules:
        if isinstance(module, DDP) and not last:
            stack.enter_context(module.no_sync())
    return stack


# --- end: precision ---


# --- same in dnpo.py, tso.py, sams.py: order ---
def step_order(n: int, c, *seed, sizes: list[int] | None = None) -> list[list[int]]:
    """The pairs' indices of every optimizer step.

    Every epoch is a seeded permutation of the n pairs, cut into batches; its last may be smaller.
    With sizes, a step's pairs are sorted by them: less padding in its micro-batches, the same step.
    """
    steps = []
    for epoch in range(c.epochs):
        order = random.Random(job.seed_of(*seed, epoch)).sample(range(n), n)
        steps += [order[i : i + c.batch] for i in range(0, n, c.batch)]
    steps = steps[: c.max_steps]
    if sizes:
        steps = [sorted(step, key=sizes.__getitem__) for step in steps]
    return steps


def micro_batches(step: list[int], c) -> list[tuple[list[int], list[float]]]:
    """This rank's share of a step as micro-batches of (indices, weights).

    Every rank gets equally many, equally large ones. Places left over are filled with a pair of
    weight 0, and the loss is divided by the pairs of the whole step, so the split changes nothing.
    """
    world = job.world_size()
    micro = min(c.micro_batch, math.ceil(len(step) / world))
    share = math.ceil(len(step) / (world * micro)) * micro  # places of a rank
    fillers = share * world - len(step)

    indices = step + [step[0]] * fillers
    weights = [1.0] * len(step) + [0.0] * fillers
    indices, weights = indices[job.rank() :: world], weights[job.rank() :: world]
    return [(indices[i : i + micro], weights[i : i + micro]) for i in range(0, share, micro)]


# --- end: order ---


# --- same in dnpo.py, tso.py, sams.py: step ---
def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the steps, then a cosine to 0; step is from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def take_step(optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clips, steps and clears the gradients; returns their norm before clipping."""
    params = []
    for group in optimizer.param_groups:
        group["lr"] = lr
        params += group["params"]
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if norm.isfinite():  # else TrainingRun.write() ends the run
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


# --- end: step ---


# --- same in dnpo.py, tso.py, sams.py: setup ---
def setup(c) -> torch.device:
    """Joins the process group if torchrun started us, and returns this rank's device.

    Makes the toy world if a flag names a part of it and it is missing.
    """
    device = job.own_device()
    if "RANK" in os.environ:
        if c.parallel == "none" and int(os.environ["WORLD_SIZE"]) > 1:
            job.die(
                "--parallel none trains on one process: "
                "start it without torchrun, or use --parallel ddp or fsdp"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, **job.torchrun_store())
    job.stop_on_sigterm()

    world = job.world_size()
    share = c.batch // world
    if c.batch % world or share % min(c.micro_batch, share):
        job.die(
            f"--batch {c.batch} can't be divided by {world} ranks x --micro_batch {c.micro_batch}"
        )
    if any(str(value).startswith("runs/toy/") for value in vars(c).values()):
        datafiles.check_files(c)  # before this takes minutes
        if job.on_rank_0():
            toy.make(Path("runs/toy"))
        job.stop_if_asked()
    return device


# --- end: setup ---


if __name__ == "__main__":
    record(main)()  # under torchrun: the traceback and rank of whoever fails first
