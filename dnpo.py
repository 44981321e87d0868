"""DNPO, Dynamic Noise Preference Optimization (Yang et al. 2025, arXiv 2502.05400), and SPIN.

SPIN (arXiv 2401.01335) is the baseline. In both, a language model improves on its own answers;
pi_0 is the model that we start from. In iteration k = 1, 2, ... the policy pi_theta starts from
pi_{k-1}, which is also the reference:

  sample   y' ~ pi_{k-1}(.|x) for every prompt x that has an annotated answer y*

  DSL      (y+, y-) = (y*, y')  if s* >= s'  else  (y', y*)          s*, s': a judge's two scores

  NPO      z^_j = z_j + sigma_j * eps_j,   sigma_j = W h_j + b,   eps_j ~ N(0, I)
           log p_noise(y-|x) = sum_j log softmax(z^_j)[y-_j]
           m = beta [ log pi_theta(y+)/pi_{k-1}(y+) - log pi_theta(y-)/p_noise(y-) ]
           l(m) = -log sigmoid(m)
           min over theta, max over (W, b)  of  E l(m),   with sigma^2 small              (Obj. 10)

and the result is pi_k. Here h_j and z_j are the reference's last hidden state and logits for token
j of y-. SPIN is the same without judge (y+ = y*) and without noise. In the code y+ is `chosen`, y-
`rejected`; B are pairs of a micro-batch, N response tokens, T length, V vocabulary, D width.

What the noise does: logsumexp is convex, so noise on the logits lowers a token's log-prob on
average, by about sigma^2/2 (1 - sum_v p(v)^2) with p = softmax(z). Therefore log p_noise(y-) falls,
m falls, and sigmoid(-m), the weight of a pair in the gradient on theta, rises again where the
policy was already sure of y+ over y-. A factor common to all weights has no effect, since Adam and
clipping divide it out. Two effects are left: the mean fall makes the weights of the pairs more
alike, and the variance of the fall makes them less alike, at random. In the log `noise/drop` is the
mean fall, in nats an answer (a warning tells if beta times it is below 0.05), and `weights/spread`
is the standard deviation of the weights divided by their mean.

The control is `--noise_update offset`. It trains sigma as `joint` does, on draws of its own, but
shows the model no noise: in the place of log p_noise(y-) stands log pi_{k-1}(y-) less the mean fall
over the step's pairs, which is one number a step. If its curve and that of `joint` coincide, NPO is
no more than an adaptive margin. Adam moves an entry of sigma by up to noise_lr |h|_1 a step. The
model samples without the noise.

Differs from the paper, or is not specified by it (ours unless said):

 1. The constraint sigma^2 < epsilon is a penalty alpha mean(sigma^2), the mean being over the
    negatives' tokens and the vocabulary.
 2. Obj. 10 writes its second term with a prime that is not explained. We read it as a stop-gradient
    (else the terms cancel): L = l(m, sigma detached) - l(m, theta detached) + alpha mean(sigma^2).
    `--noise_update alternating` is the paper's Fig. 3: one step of the noise, then one of the
    model, which sees newly drawn noise.
 3. Sigma's start, alpha and the noise's lr are not published; sigma starts afresh each iteration.
    `--noise_init 0.1` (W = 0, b = 0.1) is off in all but name: it lowers an answer of 55 tokens of
    a 135M model by 0.2 nats. The default of 0.5 (see the sweep in RESULTS.md) lowers it by 3, and
    `linear`, nn.Linear's own start, by 36.
 4. Iteration k starts from pi_{k-1}, with a fresh optimizer and learning-rate curve. In the
    authors' code it starts from the base model. The paper's iteration 0, plain SPIN, is our 1.
 5. The judge's rubric (common.py) is in our words, by the criteria and the scale of one in the
    authors' repository; the paper's own is not published. The paper's judge is GPT-4o-mini
    (`--judge api:gpt-4o-mini`), the default here is an open reward model.
 6. Ties keep y* on top; `--ties drop` leaves them out. Identical answers are always left out.
 7. Every answer's noise has a seed of its own: micro-batches, chunks and ranks change nothing.
 8. With `--mix_previous` (off in the toy preset) an iteration also trains on the pairs of the one
    before it, so that the first of DNPO also trains on SPIN's.
 9. The noise has an AdamW of its own, with the policy's clipping and learning-rate curve.
10. The judge reads all of y*; the policy is trained on its first --max_response tokens only.

    python dnpo.py                                     # laptop: the toy world, minutes
    python dnpo.py --preset paper --limit 2000         # one GPU of 180 GiB, a tenth of the data
    torchrun --nproc_per_node 8 dnpo.py                # the paper's run
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
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


def dynamic_labels(annotated: float, generated: float) -> str:
    """DSL: which answer is the positive, "annotated" if s* >= s', else "generated"."""
    return "annotated" if annotated >= generated else "generated"


def noisy_token_logps(logits: Tensor, std: Tensor, eps: Tensor, targets: Tensor) -> Tensor:
    """log softmax(z + sigma * eps)[y]: the reparameterised noise on the reference's logits.

    logits z, std sigma, eps: [N, V], targets y: [N] -> [N].
    """
    return common.token_logps(logits.float() + std.float() * eps, targets)


def noise_drop(logits: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """How far the noise lowers a token's log-prob on average, in nats, estimated from one draw.

    The fall in one draw is log pi(y) - log p_noise(y), which may be below 0. What is returned is
        KL(pi || p_noise) = logsumexp(z + sigma eps) - logsumexp(z) - sum_v pi(v) sigma_v eps_v,
    which has the same mean over eps whichever token y is, is never below 0, and varies far less.
    logits z, std sigma, eps: [N, V] -> [N].
    """
    logits = logits.float()
    shift = std.float() * eps  # [N, V]
    mean_shift = (logits.softmax(-1) * shift).sum(-1)  # [N]
    return (logits + shift).logsumexp(-1) - logits.logsumexp(-1) - mean_shift


# --- same in dnpo.py, tso.py, sams.py: rewards ---
def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """r = beta log pi_theta(y)/pi_ref(y) of the chosen and of the rejected answers.

    logps, ref_logps: [B, 2], chosen and rejected -> [B], [B].
    """
    chosen, rejected = (beta * (logps - ref_logps)).unbind(1)
    return chosen, rejected


# --- end: rewards ---


def preference_losses(margin: Tensor) -> Tensor:
    """l(m) = -log sigmoid(m). [B] -> [B]."""
    return F.softplus(-margin)


def model_losses(logps: Tensor, noisy_ref_logps: Tensor, beta: float) -> Tensor:
    """theta's part of Obj. 10, with the noise held: l(m). [B, 2], [B, 2] -> [B].

    noisy_ref_logps holds log pi_{k-1}(y+) and log p_noise(y-).
    """
    chosen, rejected = implicit_rewards(logps, noisy_ref_logps.detach(), beta)
    return preference_losses(chosen - rejected)


def noise_losses(logps: Tensor, noisy_ref_logps: Tensor, beta: float) -> Tensor:
    """The noise's part of Obj. 10, with theta held: -l(m). [B, 2], [B, 2] -> [B].

    Its penalty alpha mean(sigma^2) is added in `descend`.
    """
    chosen, rejected = implicit_rewards(logps.detach(), noisy_ref_logps, beta)
    return -preference_losses(chosen - rejected)


def offset_ref_logps(noisy_ref_logps: Tensor, clean_logps: Tensor, mean_drop: float) -> Tensor:
    """The control: the noise of y- replaced by its mean fall. [B, 2], [B] -> [B, 2].

    clean_logps is log pi_{k-1}(y-), mean_drop the mean fall of the answers of the step's pairs.
    Every margin is lowered by beta mean_drop, the same for all pairs.
    """
    chosen = noisy_ref_logps[:, 0].detach()
    return torch.stack([chosen, clean_logps - mean_drop], 1)


# ------------------------------------------------------------------------- the noise


class NoiseHead(nn.Linear):
    """sigma = W h + b: a standard deviation for each response position and vocabulary entry.

    h: [N, D] -> [N, V]. At the start W = 0 and b is the number `init`, or, with init "linear", both
    are as in any new nn.Linear. A sigma may be negative: eps is symmetric, so that sigma * eps and
    |sigma| * eps have the same distribution, and only the size of sigma matters.
    """

    def __init__(self, width: int, vocabulary: int, init: str, seed: int):
        with torch.random.fork_rng(devices=[]):  # no other random numbers on the CPU change
            torch.manual_seed(seed)
            super().__init__(width, vocabulary)
        if init != "linear":
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.bias, float(init))


BLOCK = 16  # tokens of an answer whose noise is drawn in one call


def block_seed(token: tuple[int, int]) -> int:
    """The seed of the block that a token's noise lies in."""
    answer_seed, place = token
    return answer_seed + place // BLOCK


def draw(tokens: list[tuple[int, int]], vocabulary: int, device) -> Tensor:
    """eps ~ N(0, I) for N tokens, each given as (its answer's seed, its place in it): [N, V].

    The noise of an answer consists of blocks of BLOCK tokens. A block has a seed of its own and is
    always drawn whole, so that batch-mates, chunks and ranks change nothing.
    """
    generator = torch.Generator(device)
    eps = torch.empty(len(tokens), vocabulary, device=device)
    block = torch.empty(BLOCK, vocabulary, device=device)
    start = 0
    for seed, some in itertools.groupby(tokens, block_seed):
        generator.manual_seed(seed)
        block.normal_(generator=generator)
        places = [place % BLOCK for _, place in some]
        eps[start : start + len(places)] = block[places]
        start += len(places)
    return eps


class NoisyReference(Scorer):
    """The frozen reference, with a trainable NoiseHead on the logits of rejected answers.

    The noise is on the logits that the softmax sees: where a model scales or caps them, as Gemma-2
    does, the noise comes after that. With init None there is no noise anywhere: this is SPIN's
    reference. The seed is NoiseHead's.
    """

    def __init__(self, lm, init: str | None, seed: int = 0):
        super().__init__(lm.requires_grad_(False).eval())
        self.noise = None
        if init is not None:
            vocabulary, width = lm.get_output_embeddings().weight.shape
            with lm.device:  # "meta" if it will be sharded
                self.noise = NoiseHead(width, vocabulary, init, seed)

    def forward(self, ids: Tensor, mask: Tensor, seeds: list[int]) -> tuple[Tensor, ...]:
        """Log-probs of B pairs, those of the rejected answers with noise.

        ids, mask: [2B, T], chosen first. seeds: B, one for the noise of each rejected answer.
        Returns [2B] log pi(y+) of the chosen answers, then log p_noise(y-) of the rejected ones;
        and of the rejected ones [B] log pi(y-), [B] the sum of noise_drop over the tokens, and
        [B] the sum of mean_v(sigma^2) over the tokens.
        """
        B = len(ids) // 2
        if self.noise is None:
            zeros = torch.zeros(B, device=ids.device)
            with torch.no_grad():
                logps = super().forward(ids, mask)
            return logps, logps[B:], zeros, zeros

        with torch.no_grad():
            states, targets, row = self.hidden(ids, mask)  # [N, D], [N], [N]: of all 2B answers
            rejected = row >= B  # [N]
            chosen_logps = self.head(states[~rejected], targets[~rejected])

        lengths = mask[B:, 1:].sum(1).tolist()
        tokens = []  # of each, its answer's seed and its place in the answer
        for seed, length in zip(seeds, lengths):
            tokens += [(seed, place) for place in range(length)]
        by_token = self.noisy_head(states[rejected], targets[rejected], tokens)

        pair = row[rejected] - B  # the pair of each rejected token
        chosen = common.sum_by_row(chosen_logps, row[~rejected], B)
        noisy, clean, drop, square = [common.sum_by_row(values, pair, B) for values in by_token]
        return torch.cat([chosen, noisy]), clean, drop, square

    def noisy_head(
        self, states: Tensor, targets: Tensor, tokens: list[tuple[int, int]]
    ) -> list[Tensor]:
        """noisy_chunk, CHUNK tokens at a time: [N, D], [N], N (seed, place) -> [N] each.

        Never more than CHUNK x V noisy logits are alive. The backward pass computes them again, and
        the seeds make it draw the same noise.
        """
        parts = []
        for start in range(0, len(states), common.CHUNK):
            end = start + common.CHUNK
            chunk = states[start:end], targets[start:end], tokens[start:end]
            part = checkpoint(
                self.noisy_chunk, *chunk, use_reentrant=False, preserve_rng_state=False
            )
            parts.append(part)
        return [torch.cat(values) for values in zip(*parts)]

    def noisy_chunk(
        self, states: Tensor, targets: Tensor, tokens: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p_noise and log pi of n tokens, noise_drop and mean_v(sigma^2): [n] each."""
        logits = self.logits(states)  # [n, V]
        std = self.noise(states)  # sigma [n, V]
        eps = draw(tokens, std.shape[1], states.device)  # [n, V]
        with torch.no_grad():  # before the noisy logits are kept for the backward pass
            clean_logps = common.token_logps(logits, targets)  # [n]
            drop = noise_drop(logits, std, eps)  # [n]
        logps = noisy_token_logps(logits, std, eps, targets)  # [n]
        return logps, clean_logps, drop, std.float().square().mean(1)


# ------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Every field is a flag, its comment the flag's help. The defaults are the paper's preset."""

    # -- the method
    iterations: int = 3  # DNPO iterations after the warm start
    warmup_iterations: int = 1  # SPIN iterations before them (the paper's iteration 0)
    # who says which answer is the positive: a judge (DSL), or always the annotation (SPIN)
    labels: Literal["judge", "annotation"] = "judge"
    # equal scores: keep the annotation as the positive, or drop the pair
    ties: Literal["keep", "drop"] = "keep"
    # share of the judge's labels that are flipped, to see what a judge that errs does
    judge_noise: float = 0.0
    noise: bool = True  # trainable noise on the reference (NPO)
    # one pass for model and noise; a noise step before every model step; or the control: as joint,
    # but the model sees the noise's mean fall instead of the noise
    noise_update: Literal["joint", "alternating", "offset"] = "joint"
    # sigma at the start of an iteration: a number, or linear for nn.Linear's default weights
    noise_init: str = "0.5"
    noise_penalty: float = 0.1  # alpha, weight of mean(sigma^2)
    noise_lr: float = 3e-6  # learning rate of W and b; a step moves sigma by up to it times |h|_1
    beta: float = 0.1  # the papers' lambda
    mix_previous: bool = True  # train on the previous iteration's pairs too, as SPIN does

    # -- data
    # model folder or Hub id to start from
    model: str = "alignment-handbook/zephyr-7b-sft-full"
    # annotated prompts: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    data: str = "HuggingFaceH4/ultrachat_200k:train_sft"
    # held-out annotated prompts (without it: a tenth of --data, by a hash of the prompt)
    test: str | None = None
    # toy, hf:PATH, rm:PATH, api:MODEL, or none (SPIN needs none)
    judge: str = "rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B"
    # use the first LIMIT training prompts (and at most as many held-out ones)
    limit: int | None = 20000
    test_prompts: int = 500  # held-out prompts to measure on, and pairs for Fig. 2
    temperature: float = 1.0  # of the sampling
    max_prompt: int = 512  # tokens; a longer prompt is left out and counted
    # tokens; a longer answer is cut, and gets no end-of-sequence token
    max_response: int = 512

    # -- optimisation
    lr: float = 5e-7  # peak learning rate
    # share of an iteration's steps in which the learning rate rises; then it falls as a cosine
    warmup: float = 0.1
    epochs: int = 2  # passes over an iteration's pairs
    batch: int = 64  # pairs per optimizer step, over all ranks
    micro_batch: int = 4  # pairs per forward pass and rank; changes memory, not results
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop every iteration after this many optimizer steps
    seed: int = 0  # of sampling, order and noise

    # -- system
    # all other defaults; unset: paper under CUDA, else toy
    preset: Literal["toy", "paper"] = "paper"
    # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"
    # of the computation; weights and optimizer stay in float32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    compile: bool = False  # the layers, with torch.compile; the first steps take minutes
    sample_batch: int = 64  # answers sampled or scored at a time
    save_every: int = 50  # optimizer steps between training states
    # of the weights of the last checkpoint; those in between stay in float32
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    out: str = "runs/dnpo"  # folder of the run
    resume: bool = False  # go on with the run in --out, or begin it
    overwrite: bool = False  # delete the run in --out and begin again
    # check everything, show the plan and one example, and stop before any model is loaded
    dry_run: bool = False

    def __post_init__(self):
        job.check_positive(self, "beta", "lr", "noise_lr", "batch", "micro_batch", "sample_batch")
        job.check_positive(self, "save_every", "max_prompt", "max_response", "test_prompts")
        job.check_positive(self, "clip")
        job.check_not_negative(self, "iterations", "warmup_iterations")
        if self.iterations + self.warmup_iterations == 0:
            raise ValueError("--iterations 0 and --warmup_iterations 0: there is nothing to train")
        job.check_not_negative(self, "noise_penalty", "temperature")
        job.check_run(self)
        job.check_positive(self, "limit", "max_steps")
        if self.judge == "none" and self.labels == "judge":
            raise ValueError(
                "--labels judge needs a judge; with --judge none use --labels annotation"
            )
        check_noise_init(self.noise_init)
        if not 0 <= self.judge_noise <= 1:
            raise ValueError(f"--judge_noise must be between 0 and 1, not {self.judge_noise}")
        if self.judge_noise and self.labels != "judge":
            raise ValueError("--judge_noise flips the judge's labels: it needs --labels judge")


def check_noise_init(init: str):
    """ValueError for what is neither "linear" nor a number from 0 on."""
    if init == "linear":
        return
    try:
        std = float(init)
    except ValueError:
        std = -1.0
    if not 0 <= std < math.inf:
        raise ValueError(f"--noise_init must be linear or a number from 0 on, not {init}")


# Of the method, noise_lr, beta, lr and mix_previous differ from the paper preset.
TOY = {
    "model": "runs/toy/sft",
    "data": "runs/toy/train.jsonl",
    "test": "runs/toy/test.jsonl",
    "judge": "toy",
    "limit": 2000,
    "max_response": 64,
    "noise_lr": 1e-4,
    "beta": 1.0,
    "lr": 2e-5,
    "mix_previous": False,
    "micro_batch": 16,
    "sample_batch": 250,
    "sort_by_length": False,
    "parallel": "ddp",
    "dtype": "float32",
    "activation_checkpointing": False,
}
# what may change between a run and its --resume
MAY_CHANGE = ("out", "resume", "overwrite", "iterations", "parallel")
MAY_CHANGE += ("micro_batch", "save_every", "save_dtype")


# ------------------------------------------------------------------------- the iterations


class Iteration(NamedTuple):
    """One turn of the outer loop: what is done in it, and where its files are."""

    number: int  # k: trains pi_k from pi_{k-1}; 0 is the model that we start from
    dsl: bool  # a judge labels; else the annotation is always chosen, as in SPIN
    npo: bool  # there is noise on the reference
    folder: Path
    save_dtype: str  # of the weights

    @property
    def name(self) -> str:
        return f"iter {self.number}"

    @property
    def trained(self) -> bool:
        return (self.folder / "checkpoint").exists()


def main():
    c = job.parse(Config, {"toy": TOY, "paper": {}})
    device = setup(c)
    policy, rows, test_rows, judge = prepare(c, device)
    if c.dry_run:
        return
    out = job.open_run(c, [c.data, c.test], MAY_CHANGE)
    started = time.monotonic()
    sampling = Sampling(c.temperature, c.max_response, c.sample_batch)

    start, *iterations = all_iterations(c, out)
    worth = measure(c, start, policy, test_rows, sampling, judge)
    results = [{"iteration": 0, "update": "start", **worth}]
    previous = []
    for at in iterations:
        # sample: y' ~ pi_{k-1} for every annotated prompt
        answers = sample_answers(c, at, rows, policy, sampling)

        # label: a judge says whether y* or y' is chosen (DSL); in SPIN it is y*
        pairs = label(c, at, rows, answers, judge)
        encoded, left_out = encode(c, at, policy.tok, pairs, previous)
        previous = pairs

        # train: min over theta, max over (W, b); the reference is pi_{k-1}, with noise (NPO)
        if not at.trained:
            train(c, at, encoded, policy)
        policy = policy.with_weights(job.finish(at.folder))  # pi_k

        # measure: on held-out prompts, and the log-probs of Fig. 2
        result = {"iteration": at.number, "update": "dnpo" if at.dsl or at.npo else "spin"}
        result.update(training_summary(out, at, pairs, encoded, left_out))
        result.update(measure_logps(c, at, policy, pairs, sampling))
        result.update(measure(c, at, policy, test_rows, sampling, judge))
        results.append(result)
        job.write_results(out, {"iterations": results, "seed": c.seed}, started)
    report(out, results, policy.path, started)
    job.leave()


def all_iterations(c, out: Path) -> list[Iteration]:
    """The start, the warm-up iterations, which are plain SPIN, and DNPO's."""
    last = c.warmup_iterations + c.iterations
    iterations = []
    for number in range(1 + last):
        plain = number <= c.warmup_iterations
        iterations.append(
            Iteration(
                number,
                dsl=c.labels == "judge" and not plain,
                npo=c.noise and not plain,
                folder=out / f"iter{number}",
                save_dtype=c.save_dtype if number == last else "float32",
            )
        )
    return iterations


def sample_answers(
    c, at: Iteration, rows: list[dict], policy: Model, sampling: Sampling
) -> list[dict]:
    """One answer of the policy to each annotated prompt, in the iteration's responses.jsonl."""
    file = at.folder / "responses.jsonl"
    seed = job.seed_of(c.seed, "responses", at.number)
    return common.generate(file, rows, policy, sampling, seed, note=f"{at.name}: sample")


def label(c, at: Iteration, rows: list[dict], answers: list[dict], judge) -> list[dict]:
    """Makes a preference row of each annotated row and the model's answer to it, in pairs.jsonl.

    --judge_noise flips a seeded share of the judge's labels. Whether an answer was cut is kept in
    meta.*_ended: a cut answer gets no end-of-sequence token (common.response_ids).
    """
    flipped = set()
    if at.dsl:
        rng = random.Random(job.seed_of(c.seed, "judge noise", at.number))
        flipped.update(rng.sample(range(len(rows)), round(c.judge_noise * len(rows))))

    def work(items, number):
        annotated_scores = generated_scores = [None] * len(items)
        if at.dsl:
            annotated_scores = common.score_rows(judge, rows, items)
            generated_scores = common.score_rows(judge, answers, items)
        pairs = []
        for i, annotated_score, generated_score in zip(items, annotated_scores, generated_scores):
            annotated = common.given_answer(rows[i], "response", annotated_score)
            generated = common.given_answer(answers[i], "response", generated_score)
            pairs.append(preference_row(c, at, rows[i], annotated, generated, i in flipped))
        return pairs

    # The ranks share the work. A finished pairs.jsonl is only read: if you change how pairs are
    # labelled, delete it.
    pairs = job.phase(
        at.folder / "pairs.jsonl",
        list(range(len(rows))),
        work,
        c.sample_batch,
        settings=[
            at.number,
            c.ties,
            at.dsl,
            judge and judge.key,
            sorted(flipped),
            common.texts(rows),
            common.texts(answers),
        ],
        note=f"{at.name}: label",
        ids=[row["id"] for row in rows],
    )
    if judge:
        judge.free()
    return pairs


def preference_row(
    c, at: Iteration, row: dict, annotated: Answer, generated: Answer, flipped: bool = False
) -> dict:
    """The preference row of two answers to the prompt of `row`, its label flipped if so asked.

    meta.why says why the pair is not trained on: "unreadable" for a judgement that could not be
    read, or "tie" with --ties drop.
    """
    why = None
    chosen, rejected = annotated, generated  # as in SPIN
    if at.dsl:
        if annotated.score is None or generated.score is None:
            why = "unreadable"
        elif c.ties == "drop" and annotated.score == generated.score:
            why = "tie"
        elif dynamic_labels(annotated.score, generated.score) == "generated":
            chosen, rejected = generated, annotated
    flipped = flipped and not why
    if flipped:
        chosen, rejected = rejected, chosen
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": chosen.text,
        "rejected": rejected.text,
        "meta": {
            "iteration": at.number,
            "swapped": chosen is generated,
            "flipped": flipped,
            "why": why,
            "score_annotated": annotated.score,
            "score_generated": generated.score,
            "chosen_ended": chosen.ended,
            "rejected_ended": rejected.ended,
            **common.sampled_ids(chosen, rejected),
        },
    }


def encode(
    c, at: Iteration, tok, pairs: list[dict], previous: list[dict]
) -> tuple[list[Pair], Counter]:
    """The ids of an iteration's pairs, and of the previous one's with --mix_previous.

    Returns them and how many were left out, by reason. Ties and unreadable judgements are counted
    for this iteration only.
    """
    usable = [row for row in pairs if not row["meta"]["why"]]
    if c.mix_previous:
        usable += [row for row in previous if not row["meta"]["why"]]
    encoded, left_out = common.encode_pairs(tok, usable, c.max_prompt, c.max_response)
    left_out.update(row["meta"]["why"] for row in pairs if row["meta"]["why"])
    if not encoded:
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
        job.die(f"iteration {at.number}: no pair left to train on: {reasons}")
    return encoded, left_out


# ------------------------------------------------------------------------- training


def train(c, at: Iteration, pairs: list[Pair], start: Model):
    """Trains pi_k from pi_{k-1} on one iteration's pairs.

    The iteration's folder gets checkpoint/ and, while the training lasts, its state in state.pt.
    Each step adds a line to metrics.jsonl, which all iterations share.
    """
    # the two models, and their optimizers
    device = start.device
    policy = shard(Scorer, start.path, c, device)
    init = c.noise_init if at.npo else None
    init_seed = job.seed_of(c.seed, "noise init", at.number)
    wrap = functools.partial(NoisyReference, init=init, seed=init_seed)
    reference = shard(wrap, start.path, c, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    parts = {"policy": (policy, optimizer)}  # what a training state holds
    updates = ["model"]
    if at.npo:
        noise_weights = [p for p in reference.parameters() if p.requires_grad]
        noise_optimizer = torch.optim.AdamW(noise_weights, lr=c.noise_lr, weight_decay=0.0)
        parts["noise"] = (reference, noise_optimizer)
        updates = ["noise", "model"] if c.noise_update == "alternating" else [c.noise_update]

    # the steps, and what is around them
    sizes = [pair.tokens for pair in pairs] if c.sort_by_length else None
    steps = step_order(len(pairs), c, c.seed, "order", at.number, sizes=sizes)
    file = at.folder.parent / "metrics.jsonl"
    tags = {"iteration": at.number}
    place = f"iteration {at.number}"
    run = job.TrainingRun(
        c, at.folder, steps, parts, device, metrics=file, note=at.name, tags=tags, place=place
    )

    for step in run:  # goes on after a kill; ends on SIGTERM, and in write() on NaN
        factor = lr_factor(step, len(steps), c.warmup)
        for update in updates:
            seed = (c.seed, "noise", at.number, step, update)  # every update draws new noise
            sums = descend(c, update, policy, reference, pairs, steps[step], seed, device)
            if update != "noise":
                norm = take_step(optimizer, factor * c.lr, c.clip)
            if update != "model":
                noise_norm = take_step(noise_optimizer, factor * c.noise_lr, c.clip)

        metrics = run.reduce(step, sums, [pairs[i].id for i in steps[step]])  # of the last update
        metrics = derived_metrics(metrics, c.beta, noise_norm if at.npo else None)
        tell_drop(at, step, metrics)
        run.write(step, metrics, lr=factor * c.lr, grad_norm=norm, more=drop_note(metrics))
    job.save_checkpoint(at.folder / "checkpoint", policy, start.tok, start.path, at.save_dtype)


def descend(
    c,
    update: str,
    policy: nn.Module,
    reference: nn.Module,
    pairs: list[Pair],
    indices: list[int],
    seed: tuple,
    device,
) -> dict[str, Tensor]:
    """Adds the gradient of one update for the pairs `indices`, which all ranks share.

    update: "joint", "offset", "noise" or "model". seed: with a pair's index, it seeds the pair's
    noise. Returns this rank's part of the pairs' mean metrics.
    """
    n = len(indices)  # of the whole step: every rank knows all rows
    n_tokens = sum(len(pairs[i].rejected) for i in indices)
    micros = list(collated(c, pairs, indices, seed, device))
    if update == "offset":
        mean_drop = measure_drop(c, reference, micros, n)
    sums = {}
    for j, (ids, mask, weight, seeds) in enumerate(micros):
        with no_sync(policy, reference, last=j + 1 == len(micros)):
            with autocast(c, device, policy), torch.set_grad_enabled(update != "noise"):
                logps = common.by_pair(policy(ids, mask))  # [B, 2]
            with autocast(c, device, policy), torch.set_grad_enabled(update != "model"):
                noisy_logps, clean_logps, drop, square = reference(ids, mask, seeds)
            noisy_ref_logps = common.by_pair(noisy_logps)  # [B, 2]
            ref_logps = noisy_ref_logps
            if update == "offset":
                ref_logps = offset_ref_logps(noisy_ref_logps, clean_logps, mean_drop)  # [B, 2]

            # Obj. 10: the first term moves theta, the other two move W and b
            model_loss = model_losses(logps, ref_logps, c.beta)  # [B]
            noise_loss = noise_losses(logps, noisy_ref_logps, c.beta)  # [B]
            mean_square = square * n / n_tokens  # [B]; its mean over the n pairs is mean(sigma^2)
            noise_objective = noise_loss + c.noise_penalty * mean_square
            if update == "model":
                losses = model_loss
            elif update == "noise":
                losses = noise_objective
            else:  # "joint", and "offset", its control
                losses = model_loss + noise_objective
            loss = (weight * losses).sum() / n
            (loss * job.world_size()).backward()  # summed over ranks: DDP and FSDP average

        chosen, rejected = implicit_rewards(logps, ref_logps, c.beta)
        values = common.preference_metrics(model_loss, chosen, rejected, logps)
        values.update(weight_metrics(chosen - rejected))
        values["noise/drop"] = drop
        values["noise/square"] = mean_square
        values["noise/loss"] = noise_objective
        common.add_weighted(sums, values, weight, n)
    return sums


def weight_metrics(margin: Tensor) -> dict[str, Tensor]:
    """sigmoid(-m), a pair's weight in the gradient on theta, and its square. [B] -> [B] each.

    `derived_metrics` makes a variance of their means, which is a small difference: hence float64.
    """
    weights = torch.sigmoid(-margin.double())
    return {"weights/mean": weights, "weights/square": weights.square()}


def collated(c, pairs: list[Pair], indices: list[int], seed: tuple, device):
    """Yields this rank's micro-batches of a step: ids and mask [2B, T], weights [B], B seeds."""
    for some, weights in micro_batches(indices, c):
        ids, mask = common.collate_pairs([pairs[i] for i in some], device)
        seeds = [job.seed_of(*seed, i) for i in some]
        yield ids, mask, torch.tensor(weights, device=device), seeds


def measure_drop(c, reference: nn.Module, micros: list[tuple], n: int) -> float:
    """The mean fall of log p_noise(y-) over all n pairs of a step, on all ranks, in nats.

    A pass of the reference of its own, with the noise that descend draws again from the seeds.
    """
    drops = {}
    for ids, mask, weight, seeds in micros:
        with torch.no_grad(), autocast(c, ids.device, reference):
            _, _, drop, _ = reference(ids, mask, seeds)
        common.add_weighted(drops, {"drop": drop}, weight, n)
    return job.sum_ranks(drops)["drop"]


def derived_metrics(metrics: dict, beta: float, noise_norm: float | None) -> dict[str, float]:
    """A step's metrics, with roots and ratios in the place of mean squares.

    weights/spread is the standard deviation of sigmoid(-m) over the step's pairs, divided by its
    mean: 0 if all pairs weigh the same. Without noise, whose gradient's norm is then None, nothing
    is said of it.
    """
    metrics = dict(metrics)
    mean = metrics["weights/mean"]
    variance = max(0.0, metrics.pop("weights/square") - mean**2)
    metrics["weights/spread"] = variance**0.5 / max(mean, 1e-30)
    if noise_norm is None:
        return {name: value for name, value in metrics.items() if not name.startswith("noise")}
    metrics["noise/grad_norm"] = noise_norm
    metrics["noise/std"] = metrics.pop("noise/square") ** 0.5
    metrics["noise/drop_margin"] = beta * metrics["noise/drop"]
    return metrics


def drop_note(metrics: dict[str, float]) -> str:
    """The end of a step's line on the console."""
    if "noise/drop" not in metrics:
        return ""
    return f" · drop {metrics['noise/drop']:.2f}"


# A smaller fall of the margins changes the weights sigmoid(-m) by 0.0125 at most.
TOO_SMALL = 0.05


def tell_drop(at: Iteration, step: int, metrics: dict[str, float]):
    """Says in an iteration's first step how large the noise is, and whether that is too little."""
    if step > 0 or not at.npo or not job.on_rank_0():
        return
    in_margin = metrics["noise/drop_margin"]
    line = (
        f"{at.name}: the noise lowers log p_noise(y-) by {metrics['noise/drop']:.3f} nats an "
        f"answer, and the margin by {in_margin:.3f}"
    )
    if in_margin < TOO_SMALL:
        line += ": warning: the noise is too small to act (raise --noise_init)"
    print(line, flush=True)


# ------------------------------------------------------------------------- input, measurements


def prepare(c, device) -> tuple[Model, list[dict], list[dict], common.Judge | None]:
    """Reads and checks all input and shows the plan, before the first weight is read.

    Returns the model to start from, the annotated training rows, held-out rows, and the judge.
    """
    last = c.warmup_iterations + c.iterations
    job.refuse_to_shorten(c, f"iter{last + 1}", "--iterations")
    rows, test_rows, dropped = datafiles.load_split(
        c.data, c.test, "response", c.limit, c.test_prompts
    )
    test_rows = test_rows[: c.limit]
    tok, config = common.load_tokenizer(c.model)
    common.check_model(c.model, config, c.max_prompt, c.max_response)

    found = len(rows) + len(test_rows)
    rows = common.fitting(tok, rows, c.max_prompt)
    test_rows = common.fitting(tok, test_rows, c.max_prompt)
    dropped["prompts longer than --max_prompt"] = found - len(rows) - len(test_rows)
    if not rows or not test_rows:
        job.die(
            f"{c.data}: {len(rows)} training and {len(test_rows)} held-out prompts of at most "
            f"{c.max_prompt} tokens: too few (--test names held-out data)"
        )

    policy = Model(c.model, tok, device, getattr(torch, c.dtype))
    judge = common.make_judge(c.judge, Path(c.out) / "judge", device, policy.dtype, toy.score)
    if job.on_rank_0():
        show_plan(c, tok, rows, test_rows, dropped, device)
    return policy, rows, test_rows, judge


def measure(c, at: Iteration, model: Model, rows: list[dict], sampling: Sampling, judge) -> dict:
    """What a model is worth on the held-out prompts, by the judge."""
    seed = job.seed_of(c.seed, "answers", at.number)
    result = common.held_out(at.folder, rows, model, sampling, judge, seed, f"{at.name}: ")
    if judge:
        judge.free()
    return result


def measure_logps(
    c, at: Iteration, model: Model, pairs: list[dict], sampling: Sampling
) -> dict[str, float]:
    """Fig. 2: log pi_k of an iteration's own pairs, and of its new answers to their prompts.

    Of the first --test_prompts labelled pairs. chosen is "positive" here, as in the figure.
    Writes logps.jsonl and returns the means over the positives, negatives and new answers. The new
    ones are sampled here, since after the last iteration nobody else does.
    """
    pairs = [row for row in pairs if not row["meta"]["why"]][: c.test_prompts]
    new = common.generate(
        at.folder / "new.jsonl",
        pairs,
        model,
        sampling,
        job.seed_of(c.seed, "new", at.number),
        note=f"{at.name}: sample again",
    )
    scorer = None

    def work(items, number):
        nonlocal scorer
        scorer = scorer or Scorer(model.load())
        sequences = []  # three for each item
        for i in items:
            sequences += answers_as_ids(c, model.tok, pairs[i], new[i])

        logps = []
        with torch.no_grad():
            for start in range(0, len(sequences), 2 * c.micro_batch):
                some = sequences[start : start + 2 * c.micro_batch]
                logps += scorer(*common.collate(some, model.device)).tolist()

        measured = []
        for place, i in enumerate(items):
            three = dict(zip(WHOSE, logps[3 * place : 3 * place + 3]))
            measured.append({"id": pairs[i]["id"], **three})
        return measured

    rows = job.phase(
        at.folder / "logps.jsonl",
        list(range(len(pairs))),
        work,
        c.sample_batch,
        settings=[common.weights_stamp(model.path), pairs, [row["response"] for row in new]],
        note=f"{at.name}: log-probs",
        ids=[row["id"] for row in pairs],
    )
    return {f"logp_{name}": common.mean_or_none([row[name] for row in rows]) for name in WHOSE}


WHOSE = ("positive", "negative", "new")  # the answers whose log-probs are measured


def answers_as_ids(c, tok, pair: dict, new: dict) -> list[tuple[list[int], list[int]]]:
    """A pair's two answers, and a new one to its prompt: the ids of the prompt and of each."""
    prompt = common.prompt_ids(tok, pair["prompt"])
    chosen = common.side_ids(tok, pair, "chosen", c.max_response)
    rejected = common.side_ids(tok, pair, "rejected", c.max_response)

    ended = new["meta"]["finish"] == "stop"
    ids = new["meta"].get("sampled_ids", ())
    sampled = common.response_ids(tok, new["response"], ended, c.max_response, ids)
    return [(prompt, chosen), (prompt, rejected), (prompt, sampled)]


def training_summary(
    out: Path, at: Iteration, pairs: list[dict], encoded: list[Pair], left_out: Counter
) -> dict:
    """What results.json says of an iteration's labels and of its training.

    With --mix_previous `pairs` counts the pairs of two iterations; `swapped` and `ties` do not.
    `swapped` is a share of the pairs that have a label.
    """
    steps = job.metrics_of(out / "metrics.jsonl", at.number)
    ties = [is_tie(row["meta"]) for row in pairs]
    labelled = [row for row in pairs if not row["meta"]["why"]]
    return {
        "swapped": common.mean_or_none([row["meta"]["swapped"] for row in labelled]),
        "ties": sum(ties) / len(pairs) if at.dsl else None,
        "pairs": len(encoded),
        "left_out": dict(left_out),
        "noise_std": steps[-1]["noise/std"] if at.npo else None,
        "noise_drop": common.mean_or_none([m["noise/drop"] for m in steps if at.npo]),
        "grad_norm": sum(m["grad_norm"] for m in steps) / len(steps),
        "steps": len(steps),
    }


def is_tie(meta: dict) -> bool:
    """Whether the judge has given both answers of a preference row the same score."""
    score = meta["score_annotated"]
    return score is not None and score == meta["score_generated"]


def show_plan(c, tok, rows: list[dict], test_rows: list[dict], dropped: Counter, device):
    """The header: what will be done with what, and one example with its loss mask."""
    judge = c.judge
    if judge == Config.judge:
        judge += " (an open reward model; the paper asks GPT-4o-mini)"
    if c.judge_noise:
        judge += f", {c.judge_noise:.0%} of its labels flipped"
    print(
        f"DNPO · {job.preset_note(c)} · {c.warmup_iterations} warm-up (SPIN) + {c.iterations} "
        f"iterations · labels {c.labels} · noise {c.noise_update if c.noise else 'off'} "
        f"· judge {judge}"
    )
    print(
        f"data {c.data}: {len(rows)} training, {len(test_rows)} held-out prompts"
        + job.left_out_note(dropped)
    )
    steps = len(step_order(len(rows), c))
    if c.mix_previous:
        steps *= 2
    steps = min(steps, c.max_steps or steps)
    print(job.batch_note(c, f"at most {steps} steps an iteration", device))

    lm = lm_shapes(c.model)
    heads = {}
    if c.noise:
        vocabulary, width = lm.get_output_embeddings().weight.shape
        heads["noise head"] = vocabulary * (width + 1)
    print(job.memory_plan(lm, c, chunk=common.CHUNK, reference=True, heads=heads))
    common.show_example(tok, rows[0], c.max_response)


def report(out: Path, results: list[dict], model: str, started: float):
    """samples.md, the table of results, and where the model is."""
    if not job.on_rank_0():
        return
    folders = [out / f"iter{result['iteration']}" for result in results]
    names = [f"iteration {i}" for i in range(len(folders))]
    job.write_samples(out, "iteration", dict(zip(names, folders)))

    columns = "iteration update score full_marks win tie loss cut swapped ties noise_std noise_drop"
    columns += " logp_positive logp_negative logp_new grad_norm"
    print(job.table(results, columns.split()))
    first = job.read_jsonl(folders[0] / "test.jsonl")[:3]
    last = job.read_jsonl(folders[-1] / "test.jsonl")[:3]
    for before, after in zip(first, last):
        prompt = before["prompt"][-1]["content"]
        print(f"{prompt[:60]!r}: {before['response'][:60]!r} -> {after['response'][:60]!r}")
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
