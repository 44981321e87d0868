"""SamS, adaptive batch-wise Sample Scheduling for DPO (arXiv 2506.17252).

Of every batch of n preference pairs a small learned selector picks the K to train on; DPO's loss is
unchanged. The selector is a contextual bandit. Its arms are the batch's pairs, its context is the
policy's hidden states, and its reward says whether the training helped (rho, one number a round)
and how clear and how uncertain the pair was (kappa). In round t:

  observe  h_i, m_i and log pi(y_w)_i of all n pairs, without gradient
           m = beta [ log pi/pi_ref(y_w) - log pi/pi_ref(y_l) ]
  reward   of round t-1, now that its effect is seen ("lagged", Eqs. 6-8):
           L~_t = mean_i -sigmoid(m_i)
           rho = (L~_{t-1} - L~_t) / max(|L~_{t-1}|, |L~_t|)
           rho <- (rho + the mean of all rho so far, this one included) / 2
           kappa_i = w_m mm(m_i) + w_u (1 - mm(log pi(y_w)_i))    observed before the step of t-1
           r_i = gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa_i)      mm: min-max over n
  fit      f1 (exploitation) to (context, r) and f2 (exploration) to (f1's activations, r - f1),
           on round t-1 and on replayed rounds
  select   the K = ceil(ratio n) pairs with the highest f1 + explore f2
  train    one step on these K alone, the loss averaged over K

rho and kappa are the paper's batch-level r_B and sample-level r_S before their sigmoid, f1 and f2
its f_S and f_S'. The same loop trains the baselines: DPO (2305.18290, --select all), IPO (--loss
ipo) and Selective DPO (2502.09650, --preselect).

Differs from the paper, or is not specified by it (ours unless said):

 1. Observing has a pass of its own, without gradient. With a forward pass over n pairs as the unit,
    this is 1 + 3/2 units of work at K = n/2, where DPO needs 3. The paper keeps the graph of all n
    and detaches n - K.
 2. The formulas of rho and kappa, the mean of rho, a = 50, b = 0.5, explore and gamma are the
    released code's. Its flipped sign of rho, its second sigmoid and its regression target, which
    broadcasts to a matrix, are not copied.
 3. Only the K selected pairs get rewards, as in Algorithm 1: a bandit sees the arms that it pulls.
    App. F.4 and the released code put all n into the pool.
 4. The selector: a 2-layer transformer over the layers' tokens, f1 a residual MLP, f2 an MLP, all
    trained together by Adam, four steps a round, on this and up to 32 earlier rounds. The paper's:
    an encoder that is trained beforehand and then frozen (MiniLM), f1 and f2 of 16 residual layers,
    and 32 rounds drawn at random from a pool of 40 000.
 5. The context: the mean over response tokens of each layer's output, of chosen and rejected
    (`--context mean`, as released, blind to a swap), or with their difference too (`both`).
 6. Reference log-probs are computed once, in the shapes of the training: in bf16 a summed log-prob
    moves by up to a nat with the shape of its batch, hence one pair per forward pass there.
 7. The loss is averaged over the K selected; the released code divides by n.
 8. Selective DPO: a pair's difficulty is its loss under a DPO model of the half of the data that
    doesn't hold it. Its authors use three such splits, LoRA, and the order from easy to difficult;
    here it is one split, full weights, and shuffled batches.

Shapes: n pairs of a batch, K selected, B of a micro-batch (S = 2B), T length, L layers, D width.

    python sams.py                                     # laptop: the toy world, 20 % labels flipped
    python sams.py --preset paper --limit 2000         # one GPU, a part of the data
    torchrun --nproc_per_node 8 sams.py                # the paper's settings, on public pairs
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
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
from common import Model, Pair, Scorer, lm_shapes, load_lm

# ------------------------------------------------------------------------- the equations


# --- same in dnpo.py, tso.py, sams.py: rewards ---
def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """r = beta log pi_theta(y)/pi_ref(y) of the chosen and of the rejected answers.

    logps, ref_logps: [B, 2], chosen and rejected -> [B], [B].
    """
    chosen, rejected = (beta * (logps - ref_logps)).unbind(1)
    return chosen, rejected


# --- end: rewards ---


def margins(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """m = beta [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ]. [B, 2], [B, 2] -> [B]."""
    chosen, rejected = implicit_rewards(logps, ref_logps, beta)
    return chosen - rejected


def dpo_losses(margin: Tensor) -> Tensor:
    """-log sigmoid(m), Eq. 7 of the DPO paper. [B] -> [B]."""
    return F.softplus(-margin)


def ipo_losses(margin: Tensor, beta: float) -> Tensor:
    """(m / beta - 1 / (2 beta))^2, Eq. 17 of the IPO paper (arXiv 2310.12036). [B] -> [B]."""
    return (margin / beta - 1 / (2 * beta)).square()


def bounded_loss(margin: Tensor) -> Tensor:
    """L~ = mean_i -sigmoid(m_i), which lies in [-1, 0]. [n] -> [].

    The paper compares exponentiated mean DPO losses. For one pair exp(l(m)) = 1 / sigmoid(m), so
    that the relative gain of L~ is the same number; for a batch it is nearly so (released code).
    """
    return -margin.sigmoid().mean()


def batch_reward(before: float, after: float) -> float:
    """rho = (L~_{t-1} - L~_t) / max(|L~_{t-1}|, |L~_t|), above 0 when the loss fell."""
    return (before - after) / max(abs(before), abs(after))


def min_max(x: Tensor) -> Tensor:
    """(x - min) / (max - min), and 0.5 everywhere where all are equal. [n] -> [n]."""
    low, high = x.min(), x.max()
    if high > low:
        return (x - low) / (high - low)
    return torch.full_like(x, 0.5)


def sample_reward(
    margin: Tensor,
    chosen_logps: Tensor,
    margin_weight: float = 0.5,
    uncertainty_weight: float = 0.5,
) -> Tensor:
    """kappa = w_m mm(m) + w_u (1 - mm(log pi(y_w))): preference margin and uncertainty.

    [n], [n] -> [n].
    """
    uncertainty = 1 - min_max(chosen_logps)
    return margin_weight * min_max(margin) + uncertainty_weight * uncertainty


def bandit_rewards(
    rho: float, kappa: Tensor, gamma: float = 0.5, a: float = 50.0, b: float = 0.5
) -> Tensor:
    """r = gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa). [], [K] -> [K]."""
    of_batch = torch.sigmoid(torch.tensor(a * rho + b)).to(kappa)
    return gamma * of_batch + (1 - gamma) * kappa.sigmoid()


def top_k(scores: Tensor, k: int, seed: int | None = None) -> list[int]:
    """The places of the k highest scores, in the batch's order, so that k = n changes nothing.

    With a seed, k are drawn without replacement, with probabilities softmax(scores): the k highest
    of scores + Gumbel noise are such a sample. [n] -> k places.
    """
    scores = scores.detach().double().cpu()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64)
        gumbel = -(-uniform.log()).log()
        scores = scores + gumbel
    order = scores.argsort(descending=True, stable=True)
    return sorted(order[:k].tolist())


def selector_loss(f1: Tensor, f2: Tensor, reward: Tensor) -> Tensor:
    """mean (f1 - r)^2 + mean (f2 - (r - f1))^2, with f1 held in the second. [K] each -> []."""
    if not f1.shape == f2.shape == reward.shape:
        shapes = f"{list(f1.shape)}, {list(f2.shape)}, {list(reward.shape)}"
        raise ValueError(f"shapes {shapes} would broadcast")
    residual = reward - f1.detach()
    return (f1 - reward).square().mean() + (f2 - residual).square().mean()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks, 0 where one of them is constant. [K], [K] -> []."""
    a, b = centred_ranks(a), centred_ranks(b)
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 0 else 0.0


def centred_ranks(x: Tensor) -> Tensor:
    """Twice the values' ranks less their mean; equal values share a rank. [K] -> [K].

    A factor does not change a correlation.
    """
    below = (x[:, None] > x).sum(1)
    not_above = (x[:, None] >= x).sum(1)
    ranks = (below + not_above).double()
    return ranks - ranks.mean()


# ------------------------------------------------------------------------- contexts


class PoolingScorer(Scorer):
    """log pi(y|x) and, when asked, the mean over response tokens of every layer's output.

    Hooks pool each layer's output at once, so that one layer's states are alive at a time.
    """

    def __init__(self, lm):
        super().__init__(lm)
        self.mask, self.pooled = None, {}  # the mask is set during a pass to be pooled
        for i, layer in enumerate(lm.model.layers):
            layer.register_forward_hook(functools.partial(self.pool, i))

    def pool(self, i: int, layer, args, out):
        if self.mask is None:
            return
        states = out[0] if isinstance(out, tuple) else out  # [S, T, D]
        summed = (states.float() * self.mask[..., None]).sum(1)  # [S, D]
        self.pooled[i] = summed / self.mask.sum(1, keepdim=True)

    def forward(
        self, ids: Tensor, mask: Tensor, pool: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """log pi(y|x) [S] and, if pool, states [S, L, D] in fp32. ids, mask: [S, T]."""
        self.mask = mask if pool else None
        self.pooled = {}
        logps = super().forward(ids, mask)
        self.mask = None
        if not pool:
            return logps, None
        layers = [self.pooled.pop(i) for i in range(len(self.lm.model.layers))]
        return logps, torch.stack(layers, 1)


def context(pooled: Tensor, kind: str) -> Tensor:
    """A pair's context: the mean of both sides' states, with kind "both" their difference too.

    pooled: [2B, L, D], chosen first -> [B, L, D] or [B, L, 2D].
    """
    chosen, rejected = pooled.chunk(2)
    mean = (chosen + rejected) / 2
    return mean if kind == "mean" else torch.cat([mean, chosen - rejected], -1)


# ------------------------------------------------------------------------- the selector


class Selector(nn.Module):
    """f1, exploitation: contexts -> reward. f2, exploration: f1's activations -> its residual."""

    def __init__(self, layers: int, width: int, inner: int = 256):
        super().__init__()
        block = nn.TransformerEncoderLayer(
            d_model=inner,
            nhead=4,
            dim_feedforward=2 * inner,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(inner)
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.layer = nn.Parameter(torch.zeros(layers, inner))  # tells the layers apart
        self.encoder = nn.TransformerEncoder(block, 2, norm=norm, enable_nested_tensor=False)
        self.residual = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, inner))
        self.exploit = nn.Linear(inner, 1)
        self.explore = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, 1))

    def forward(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """f1 [n] and f2 [n] of contexts [n, L, D]. f2 sends no gradient into f1."""
        tokens = self.read(contexts) + self.layer  # [n, L, inner]
        h = self.encoder(tokens).mean(1)  # [n, inner]
        u = h + self.residual(h)  # [n, inner]
        f1 = self.exploit(u)[:, 0]
        f2 = self.explore(u.detach())[:, 0]
        return f1, f2


class Bandit:
    """The selector with its lagged training. All ranks hold the same one and see the same numbers.

    layers, width: the L and D of the contexts.
    """

    def __init__(self, layers: int, width: int, c, device):
        with torch.random.fork_rng(devices=[]):  # nobody else's random numbers change
            torch.manual_seed(job.seed_of(c.seed, "selector"))
            self.selector = Selector(layers, width).to(device)
        self.optimizer = torch.optim.Adam(self.selector.parameters(), lr=c.selector_lr)
        self.c, self.device = c, device
        # the last round, whose effect is not yet seen: its selected pairs' contexts, kappa and
        # predictions, and its L~
        self.pending = None
        self.replay = deque(maxlen=1 + c.replay)  # (contexts [K, L, D], rewards [K]), newest rounds
        self.rho_sum, self.rounds = 0.0, 0

    def round(
        self, contexts: Tensor, margin: Tensor, chosen_logps: Tensor, k: int, seed: int | None
    ) -> tuple[list[int], dict]:
        """Learns from the last round, then picks k of n: greedily, or by softmax with a seed.

        contexts: [n, L, D], margin and chosen_logps: [n]. Returns the k places, and what to log.
        """
        now = bounded_loss(margin).item()
        learned = self.learn(now) if self.pending else {}
        with torch.no_grad():
            f1, f2 = self.selector(contexts)
            scores = f1 + self.c.explore * f2
        if dist.is_initialized():
            dist.broadcast(scores, 0)  # rank 0 decides: other hardware may round differently
        places = top_k(scores, k, seed)

        weights = self.c.margin_weight, self.c.uncertainty_weight
        kappa = sample_reward(margin, chosen_logps, *weights)
        self.pending = {
            "contexts": contexts[places],
            "kappa": kappa[places],
            "predicted": f1[places],
            "loss": now,
        }
        return places, learned

    def learn(self, now: float) -> dict[str, float]:
        """Rewards the last round, now that its effect on the bounded loss is seen, and fits to it.

        Returns what to log: how the predictions compare with the rewards that came.
        """
        last = self.pending
        rho = batch_reward(last["loss"], now)
        self.rho_sum += rho
        self.rounds += 1
        smoothed = (rho + self.rho_sum / self.rounds) / 2
        reward = bandit_rewards(smoothed, last["kappa"], self.c.gamma)
        self.replay.append((last["contexts"], reward))
        loss = self.fit()

        predicted = last["predicted"]
        return {
            "selector/rho": rho,
            "selector/reward": reward.mean().item(),
            "selector/predicted": predicted.mean().item(),
            "selector/error": (predicted - reward).square().mean().sqrt().item(),
            "selector/rank_correlation": rank_correlation(predicted, reward),
            "selector/fit": loss,
        }

    def fit(self) -> float:
        """One pass over the rounds in the replay, in fit_steps steps; returns the last loss."""
        rng = random.Random(job.seed_of(self.c.seed, "replay", self.rounds))
        order = rng.sample(list(self.replay), len(self.replay))
        for i in range(min(self.c.fit_steps, len(order))):
            some = order[i :: self.c.fit_steps]
            contexts = torch.cat([contexts for contexts, _ in some])
            reward = torch.cat([reward for _, reward in some])
            f1, f2 = self.selector(contexts)
            loss = selector_loss(f1, f2, reward)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def state(self) -> dict:
        """All that a resumed run needs, as tensors and numbers."""
        return {
            "selector": self.selector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pending": self.pending,
            "replay": list(self.replay),
            "rho_sum": self.rho_sum,
            "rounds": self.rounds,
        }

    def restore(self, state: dict):
        """Takes on what state() has returned."""
        self.selector.load_state_dict(state["selector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pending = state["pending"]
        if self.pending:
            for name in ("contexts", "kappa", "predicted"):
                self.pending[name] = self.pending[name].to(self.device)
        for contexts, reward in state["replay"]:
            self.replay.append((contexts.to(self.device), reward.to(self.device)))
        self.rho_sum, self.rounds = state["rho_sum"], state["rounds"]

    def nbytes(self) -> int:
        """Bytes of weights, gradients, Adam's two moments, and of the replay's contexts."""
        weights = sum(p.numel() for p in self.selector.parameters())
        return 4 * 4 * weights + sum(contexts.nbytes for contexts, _ in self.replay)


# ------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Every field is a flag, its comment the flag's help. The defaults are the paper's preset."""

    # -- the method
    # topk: the K highest scores; sample: drawn by softmax(score); random: any K; margin: the K
    # highest margins; all: no selection, plain DPO; oracle: unflipped pairs first (a ceiling)
    select: Literal["topk", "sample", "random", "margin", "all", "oracle"] = "topk"
    ratio: float = 0.5  # K / n
    gamma: float = 0.5  # weight of rho in a pair's reward; kappa has the rest
    margin_weight: float = 0.5  # weight of the preference margin in kappa
    uncertainty_weight: float = 0.5  # weight of 1 - mm(log pi(y_w)) in kappa
    explore: float = 0.1  # weight of f2 in the score
    replay: int = 32  # earlier rounds that the selector is fitted on too
    # what the selector sees of a pair: mean of chosen and rejected states, or their difference too
    context: Literal["mean", "both"] = "mean"
    selector_lr: float = 1e-4  # learning rate of the selector
    fit_steps: int = 4  # the selector's Adam steps a round
    # Selective DPO: first keep this share of the pairs, the easiest by cross-fitted validation loss
    preselect: float = 1.0
    loss: Literal["dpo", "ipo"] = "dpo"  # of the training
    beta: float = 0.01  # strength of the pull to the reference

    # -- data
    # model folder or Hub id to start from; also the reference
    model: str = "meta-llama/Meta-Llama-3-8B-Instruct"
    # preference pairs: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    data: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    # held-out pairs (without it: a tenth of --data, by a hash of the prompt)
    test: str | None = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    limit: int | None = None  # use the first LIMIT training pairs
    test_pairs: int = 1000  # held-out pairs to measure on
    flip: float = 0.0  # share of the training pairs whose labels are swapped, to see who notices
    max_prompt: int = 512  # tokens; a longer prompt is left out and counted
    # tokens; a longer answer is cut, and gets no end-of-sequence token
    max_response: int = 512

    # -- optimisation
    lr: float = 1e-6  # peak learning rate
    # share of the steps in which the learning rate rises; then it falls as a cosine
    warmup: float = 0.1
    epochs: int = 1  # passes over the pairs
    batch: int = 64  # pairs to select from per optimizer step, over all ranks (n)
    # pairs per forward pass and rank; changes memory, not results; 1 in bf16
    micro_batch: int = 1
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop after this many optimizer steps
    seed: int = 0  # of order, flips, selector and selection

    # -- system
    # all other defaults; unset: paper under CUDA, else toy
    preset: Literal["toy", "paper"] = "paper"
    # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"
    # of the computation; weights and optimizer stay in float32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    save_every: int = 50  # optimizer steps between training states
    # of the weights of the last checkpoint; those in between stay in float32
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    eval_every: int = 50  # optimizer steps between measurements on held-out pairs
    reference: str = "runs/reference"  # folder of reference log-probs, shared by runs
    out: str = "runs/sams"  # folder of the run
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # delete the run in --out and begin again
    # check everything, show the plan and one example, and stop before any model is loaded
    dry_run: bool = False

    def __post_init__(self):
        job.check_positive(self, "beta", "lr", "selector_lr", "fit_steps", "batch", "micro_batch")
        job.check_positive(self, "save_every", "eval_every", "max_prompt", "max_response")
        job.check_positive(self, "test_pairs", "epochs", "clip")
        job.check_not_negative(self, "warmup", "replay", "explore", "margin_weight")
        job.check_not_negative(self, "uncertainty_weight")
        for name in ("ratio", "preselect"):
            if not 0 < getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"--{name} must be above 0 and at most 1, not {value}")
        for name in ("gamma", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"--{name} must be at least 0 and at most 1, not {value}")
        job.check_positive(self, "limit", "max_steps")


# gamma, the two weights, context and selector_lr were chosen on another toy world (seed 1)
TOY = {
    "model": "runs/toy/sft",
    "data": "runs/toy/pairs.jsonl",
    "test": None,
    "flip": 0.2,
    "gamma": 0.2,
    "margin_weight": 1.0,
    "uncertainty_weight": 0.0,
    "context": "both",
    "selector_lr": 1e-3,
    "max_response": 64,
    "beta": 0.1,
    "lr": 1e-4,
    "micro_batch": 32,
    "sort_by_length": False,
    "parallel": "ddp",
    "dtype": "float32",
    "activation_checkpointing": False,
    "eval_every": 25,
}
# what may change between a run and its --resume
MAY_CHANGE = ("out", "resume", "overwrite", "parallel", "micro_batch", "save_every", "reference")
MAY_CHANGE += ("save_dtype",)


# ------------------------------------------------------------------------- the run


class Data(NamedTuple):
    """Preference pairs with what belongs to each of them.

    An index counts in these lists; a place counts in one batch.
    """

    pairs: list[Pair]
    ref_logps: Tensor  # log pi_ref of chosen and rejected [n, 2]
    flipped: list[bool]  # whose labels were swapped on purpose

    def take(self, indices: list[int]) -> Data:
        """The pairs `indices`, with theirs."""
        pairs = [self.pairs[i] for i in indices]
        flipped = [self.flipped[i] for i in indices]
        return Data(pairs, self.ref_logps[indices], flipped)


def main():
    c = job.parse(Config, {"toy": TOY, "paper": {}})
    if c.dtype == "bfloat16" and c.micro_batch > 1:
        job.die(
            "--dtype bfloat16 needs --micro_batch 1: there a log-prob depends on the shape of its "
            "batch, and reference and policy must be scored in the same"
        )
    device = setup(c)
    start, pairs, flipped, held_pairs = prepare(c, device)
    if c.dry_run:
        return
    out = job.open_run(c, [c.data, c.test], MAY_CHANGE)
    started = time.time()

    # the reference's log-probs, once: no reference stays in memory
    data = Data(pairs, reference_logps(c, start, pairs), flipped)
    held = Data(held_pairs, reference_logps(c, start, held_pairs), [False] * len(held_pairs))

    # Selective DPO, if asked for
    if c.preselect < 1:
        data = data.take(easiest(c, data, held, start, out))

    # train on the selected pairs of every batch
    if not (out / "checkpoint").exists():
        train(c, c.select, data, held, start, out)
    report(c, out, started)
    job.leave()


# these ways to select need not look at the batch
BLIND = ("all", "random", "oracle")


def train(c, how: str, data: Data, held: Data, start: Model, folder: Path):
    """Trains the policy from `start` on the pairs that `how` picks, into folder/checkpoint.

    how: one of --select. Training states go to folder/state.pt, lines to folder/metrics.jsonl.
    """
    device = start.device
    policy = shard(PoolingScorer, start.path, c, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    bandit = make_bandit(c, policy, device) if how in ("topk", "sample") else None
    sizes = [pair.tokens for pair in data.pairs] if c.sort_by_length else None
    steps = step_order(len(data.pairs), c, c.seed, "order", sizes=sizes)
    parts = {"policy": (policy, optimizer)}  # what a training state holds,
    keeps = {"bandit": bandit} if bandit else {}  # and what else
    file, note = folder / "metrics.jsonl", folder.name
    run = job.TrainingRun(c, folder, steps, parts, device, metrics=file, note=note, keeps=keeps)

    for step in run:  # goes on after a kill; ends on SIGTERM, and in reduce() on NaN
        batch = steps[step]
        started = time.time()

        # observe
        seen = None
        if how not in BLIND:
            kind = c.context if bandit else None
            seen = observe(c, policy, data.pairs, batch, device, kind)
        observed = time.time()

        # reward the last picks and fit to them (Bandit.learn: Eqs. 6-8, batch_reward); then select
        places, learned = pick(c, how, data.take(batch), seen, bandit, step)
        selected = [batch[place] for place in places]
        picked = time.time()

        # train on these alone
        sums = descend(c, policy, data, selected, device)
        lr = c.lr * lr_factor(step, len(steps), c.warmup)
        norm = take_step(optimizer, lr, c.clip)

        metrics = run.reduce(step, sums, [data.pairs[i].id for i in selected])
        metrics.update(learned)
        metrics.update(selection_metrics(c, data, batch, places, seen))
        metrics.update(selection_costs(observed - started, picked - observed, bandit))
        if (step + 1) % c.eval_every == 0 or step + 1 == len(steps):
            metrics.update(measure(c, policy, held, device))
        run.write(step, metrics, lr=lr, grad_norm=norm)
    job.save_checkpoint(folder / "checkpoint", policy, start.tok, start.path, c.save_dtype)


class Seen(NamedTuple):
    """What a forward pass without gradient shows of n pairs."""

    logps: Tensor  # log pi of chosen and rejected [n, 2]
    contexts: Tensor | None  # [n, L, D], if asked for


@torch.no_grad()
def observe(
    c, policy: nn.Module, pairs: list[Pair], indices: list[int], device, kind: str | None = None
) -> Seen:
    """Log-probs, and with a kind of `context` the contexts, of the pairs `indices`.

    Each rank looks at its share, and every rank gets all.
    """
    logps, contexts = [], []
    for some, _ in micro_batches(indices, c):
        ids, mask = common.collate_pairs([pairs[i] for i in some], device)
        with autocast(c, device, policy):
            some_logps, pooled = policy(ids, mask, kind is not None)
        logps.append(common.by_pair(some_logps))
        if kind:
            contexts.append(context(pooled, kind))
    n = len(indices)
    all_logps = gather(torch.cat(logps), n)
    all_contexts = gather(torch.cat(contexts), n) if kind else None
    return Seen(all_logps, all_contexts)


def gather(share: Tensor, n: int) -> Tensor:
    """All ranks' shares in the order of the batch, without fillers. [places, ...] -> [n, ...].

    micro_batches gives rank r the places r, r + world, r + 2 world, ..., so that the j-th of its
    share is place j * world + r of the batch.
    """
    shares = [share]
    if dist.is_initialized():
        shares = [torch.empty_like(share) for _ in range(job.world_size())]
        dist.all_gather(shares, share)
    return torch.stack(shares, 1).flatten(0, 1)[:n]


def make_bandit(c, policy: nn.Module, device) -> Bandit:
    """A new bandit for contexts of this policy."""
    lm = getattr(policy, "module", policy).lm  # DDP holds the scorer as .module
    width = lm.config.hidden_size
    if c.context == "both":
        width *= 2
    return Bandit(len(lm.model.layers), width, c, device)


def pick(
    c, how: str, batch: Data, seen: Seen | None, bandit: Bandit | None, step: int
) -> tuple[list[int], dict]:
    """Picks K of the n pairs of a batch, as --select says.

    Returns their places in the batch, and what the bandit has to log. A new way to select is a
    branch here and a word in Config.select.
    """
    n = len(batch.pairs)
    k, seed = math.ceil(c.ratio * n), job.seed_of(c.seed, "select", step)
    if how == "all":
        return list(range(n)), {}
    if how == "random":
        return top_k(torch.zeros(n), k, seed), {}  # equal scores: any k
    if how == "oracle":
        # -100 outweighs any Gumbel noise: the unflipped first, at random among them
        return top_k(-100.0 * torch.tensor(batch.flipped), k, seed), {}

    margin = margins(seen.logps, batch.ref_logps, c.beta)
    if how == "margin":
        return top_k(margin, k), {}
    if how == "topk":
        seed = None  # greedy; `sample` draws k without replacement, by softmax(scores)
    return bandit.round(seen.contexts, margin, seen.logps[:, 0], k, seed)


def descend(c, policy: nn.Module, data: Data, indices: list[int], device) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs `indices`, which all ranks share.

    Returns this rank's part of the pairs' mean metrics.
    """
    n = len(indices)  # of the whole step: every rank knows all rows
    sums = {}
    micros = micro_batches(indices, c)
    for j, (some, weights) in enumerate(micros):
        ids, mask = common.collate_pairs([data.pairs[i] for i in some], device)  # [2B, T]
        weight = torch.tensor(weights, device=device)  # [B]
        ref_logps = data.ref_logps[some]  # [B, 2]

        with no_sync(policy, last=j + 1 == len(micros)):
            with autocast(c, device, policy):
                logps, _ = policy(ids, mask)
            logps = common.by_pair(logps)  # [B, 2]
            chosen, rejected = implicit_rewards(logps, ref_logps, c.beta)
            losses = losses_of(c, chosen - rejected)
            loss = (weight * losses).sum() / n
            (loss * job.world_size()).backward()  # summed over ranks: DDP and FSDP average

        values = common.preference_metrics(losses, chosen, rejected, logps)
        common.add_weighted(sums, values, weight, n)
    return sums


def losses_of(c, margin: Tensor) -> Tensor:
    """The losses of --loss. [B] -> [B]."""
    if c.loss == "ipo":
        return ipo_losses(margin, c.beta)
    return dpo_losses(margin)


def selection_metrics(
    c, data: Data, batch: list[int], places: list[int], seen: Seen | None
) -> dict:
    """Who was in the batch and who was picked: flips, lengths, and margins if they were seen."""
    selected = [batch[place] for place in places]
    unselected = sorted(set(batch) - set(selected))
    metrics = {
        "batch/pairs": len(batch),
        "batch/flipped": sum(data.flipped[i] for i in batch),
        "selected/pairs": len(selected),
        "selected/indices": selected,
        "selected/flipped": sum(data.flipped[i] for i in selected),
        "selected/length": mean_length(data.pairs, selected),
        "unselected/length": mean_length(data.pairs, unselected),
    }
    if seen:
        margin = margins(seen.logps, data.ref_logps[batch], c.beta)
        mask = torch.zeros(len(batch), dtype=torch.bool, device=margin.device)
        mask[places] = True
        metrics["selected/margin"] = mean_of(margin[mask])
        metrics["unselected/margin"] = mean_of(margin[~mask])
    return metrics


def mean_length(pairs: list[Pair], indices: list[int]) -> float:
    """Mean tokens of both answers of the pairs `indices`, 0 if there are none."""
    tokens = sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in indices)
    return tokens / max(1, len(indices))


def mean_of(x: Tensor) -> float:
    """The mean, 0 of no values."""
    return x.mean().item() if len(x) else 0.0


def selection_costs(observing: float, picking: float, bandit: Bandit | None) -> dict:
    """What the selection cost, in seconds, and in bytes for the bandit."""
    return {
        "score_seconds": observing,
        "selector/seconds": picking,
        "selector/bytes": bandit.nbytes() if bandit else 0,
    }


def measure(c, policy: nn.Module, held: Data, device) -> dict[str, float]:
    """Preference accuracy and implicit rewards on held-out pairs."""
    everything = list(range(len(held.pairs)))
    logps, _ = observe(c, policy, held.pairs, everything, device)
    chosen, rejected = implicit_rewards(logps, held.ref_logps, c.beta)
    return {
        "eval/accuracy": (chosen > rejected).double().mean().item(),
        "eval/chosen_reward": chosen.mean().item(),
        "eval/rejected_reward": rejected.mean().item(),
        "eval/margin": (chosen - rejected).mean().item(),
    }


# ------------------------------------------------------------------------- frozen models


def reference_logps(c, model: Model, pairs: list[Pair]) -> Tensor:
    """log pi_ref [n, 2] of the pairs, in a file in the folder --reference, which runs share.

    The file is named after the model and its weights, the token ids of prompts and answers (so data
    and template too), and the number format: where one of these changes, another file is made.
    """
    folder = Path(model.path)
    if folder.exists():
        files = sorted(folder.glob("*.safetensors"))
        weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    else:
        _, config = common.load_tokenizer(model.path)
        weights = getattr(config, "_commit_hash", None)
    ids = [job.seed_of(tuple(pair[:3])) for pair in pairs]
    key = job.seed_of(model.path, weights, c.dtype, *ids)
    return logps_in_file(c, Path(c.reference) / f"{key:016x}.jsonl", model, pairs, "reference")


def logps_in_file(c, file: Path, model: Model, pairs: list[Pair], note: str) -> Tensor:
    """log pi [n, 2] of all pairs under a frozen model, in `file`.

    It is made on first use, in the shapes of the training, and goes on after a kill. It is not a
    job.phase, since under FSDP all ranks work on every batch together.
    """
    device = model.device
    part = file.with_name(f"{file.name}.{job.seed_of(c.out):016x}.part")  # runs don't share work
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = part.read_text().splitlines(keepends=True) if part.exists() else []
        done = [line for line in lines if line.endswith("\n")]  # the last may be torn
        job.barrier()
        if job.on_rank_0():
            job.write_atomic(part, "".join(done))

        policy = shard(frozen_pooling_scorer, model.path, c, device)
        size = max(c.batch, c.micro_batch * job.world_size())
        for start in job.progress(range(len(done), len(pairs), size), note):
            indices = list(range(start, min(start + size, len(pairs))))
            logps, _ = observe(c, policy, pairs, indices, device)
            if job.on_rank_0():
                with open(part, "a") as out:
                    out.write(job.json_lines(logps.tolist()))
            stop = torch.tensor(float(job.STOP.is_set()), device=device)
            if job.sum_ranks({"stop": stop})["stop"]:
                job.stopped()
        if job.on_rank_0():
            os.replace(part, file)
        job.barrier()
    return torch.tensor(job.read_jsonl(file), device=device)


def frozen_pooling_scorer(lm) -> PoolingScorer:
    return PoolingScorer(lm).requires_grad_(False)


def easiest(c, data: Data, held: Data, start: Model, out: Path) -> list[int]:
    """Selective DPO: the indices of the easiest share of the pairs, in the order of the data.

    A DPO model is trained on each half of the pairs. A pair's difficulty is its loss under the
    model that never saw it; all of them go to out/difficulty.json.
    """
    n = len(data.pairs)
    order = random.Random(job.seed_of(c.seed, "halves")).sample(range(n), n)
    first, second = sorted(order[::2]), sorted(order[1::2])

    difficulty = [0.0] * n
    for name, own, other in (("half0", first, second), ("half1", second, first)):
        folder = out / name
        if not (folder / "checkpoint").exists():
            exact = replace(c, save_dtype="float32")  # this is not the last checkpoint
            train(exact, "all", data.take(own), held, start, folder)
        model, unseen = start.with_weights(folder / "checkpoint"), data.take(other)
        logps = logps_in_file(c, folder / "other.jsonl", model, unseen.pairs, f"{name}: validate")
        losses = losses_of(c, margins(logps, unseen.ref_logps, c.beta))
        for i, loss in zip(other, losses.tolist()):
            difficulty[i] = loss
    if job.on_rank_0():
        job.write_atomic(out / "difficulty.json", json.dumps(difficulty))
    return top_k(-torch.tensor(difficulty), math.ceil(c.preselect * n))


# ------------------------------------------------------------------------- input


def prepare(c, device) -> tuple[Model, list[Pair], list[bool], list[Pair]]:
    """Reads and checks all input and shows the plan, before the first weight is read.

    Returns the model to start from, the training pairs, which of them are flipped, and the held-out
    pairs.
    """
    rows, test_rows, dropped = datafiles.load_split(c.data, c.test, "pair", c.limit, c.test_pairs)
    tok, config = common.load_tokenizer(c.model)
    common.check_context(c.model, config, c.max_prompt, c.max_response)

    pairs, flipped = [], []
    rows = flip_labels(rows, c.flip, c.seed)
    for row in rows:  # one at a time: a row that is left out takes its mark with it
        encoded, left_out = common.encode_pairs(tok, [row], c.max_prompt, c.max_response)
        dropped.update(left_out)
        if encoded:
            pairs += encoded
            flipped.append(row["meta"].get("flipped", False))
    held, _ = common.encode_pairs(tok, test_rows, c.max_prompt, c.max_response)
    if not pairs or not held:
        job.die(
            f"{c.data}: {len(pairs)} training and {len(held)} held-out pairs of at most "
            f"{c.max_prompt} prompt tokens: too few (--test names held-out data)"
        )
    if job.on_rank_0():
        show_plan(c, tok, pairs, held, flipped, dropped, device)
    start = Model(c.model, tok, device, getattr(torch, c.dtype))
    return start, pairs, flipped, held


def flip_labels(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Swaps chosen and rejected of a seeded share of the rows, and marks them in meta.flipped."""
    rng = random.Random(job.seed_of(seed, "flip"))
    to_flip = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [flip(row) if i in to_flip else row for i, row in enumerate(rows)]


def flip(row: dict) -> dict:
    """The row with its sides exchanged."""
    meta = {
        **row["meta"],
        "flipped": not row["meta"].get("flipped", False),
        "chosen_ended": row["meta"].get("rejected_ended", True),
        "rejected_ended": row["meta"].get("chosen_ended", True),
    }
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"], "meta": meta}


# ------------------------------------------------------------------------- plan and report


def show_plan(c, tok, pairs, held, flipped: list[bool], dropped: Counter, device):
    """The header: what will be done with what, and one example with its loss mask."""
    n = len(pairs)
    share, first = " (plain DPO)", ""
    if c.select != "all":
        share = f", {c.ratio:g} of each batch"
    if c.preselect < 1:
        n = math.ceil(c.preselect * n)
        first = f" · first the easiest {c.preselect:g} of the pairs"
    print(
        f"SamS · {job.preset_note(c)} · select {c.select}{share}{first}"
        f" · loss {c.loss}, beta {c.beta:g}"
    )
    print(
        f"data {c.data}: {len(pairs)} training pairs ({sum(flipped)} flipped), "
        f"{len(held)} held-out pairs" + job.left_out_note(dropped)
    )
    print(job.batch_note(c, f"{len(step_order(n, c))} steps", device))
    print(job.memory_plan(lm_shapes(c.model), c, chunk=common.CHUNK, reference=False))

    prompt, chosen, rejected, _ = pairs[0]
    print(f"example, no loss: {tok.decode(prompt)!r}")
    print(f"  chosen, with loss: {tok.decode(chosen)!r}")
    print(
        f"rejected, with loss: {tok.decode(rejected)!r} "
        f"({len(prompt)} + {len(chosen)}, {len(rejected)} tokens)"
        f", end of a turn: {common.end_note(tok)}",
        flush=True,
    )


def report(c, out: Path, started: float):
    """results.json from the metrics' lines, a table, and where the model is."""
    if not job.on_rank_0():
        return
    for old in out.glob("**/state.pt"):
        old.unlink()
    steps = job.read_jsonl(out / "metrics.jsonl")
    result = {**evaluation(steps[-1]), **totals(c, steps), "seed": c.seed}
    job.write_results(out, result, started)

    rows, trained_on = [], 0
    for m in steps:
        trained_on += m["selected/pairs"]
        if "eval/accuracy" in m:
            rows.append({"step": m["step"], "trained on": trained_on, **evaluation(m)})
    columns = ["accuracy", "chosen_reward", "rejected_reward", "margin"]
    print(job.table(rows, ["step", "trained on", *columns]))

    if result["flipped_selected"] is not None:
        of_all = "all" if c.select == "all" else f"{c.ratio:.0%} of all pairs"
        print(
            f"{result['flipped_selected']:.0%} of the flipped pairs that were seen were trained on "
            f"({of_all} were)"
        )
    job.show_end(out, "results.json, metrics.jsonl", str(out / "checkpoint"), started)


def evaluation(m: dict) -> dict:
    """The measurements in a line of metrics."""
    return {
        name.removeprefix("eval/"): value for name, value in m.items() if name.startswith("eval/")
    }


def totals(c, steps: list[dict]) -> dict:
    """What results.json says of the whole training."""
    flipped = sum(m["batch/flipped"] for m in steps)
    flipped_selected = sum(m["selected/flipped"] for m in steps)
    return {
        "flipped_selected": flipped_selected / flipped if flipped else None,
        "select": c.select,
        "ratio": c.ratio,
        "flip": c.flip,
        "preselect": c.preselect,
        "steps": len(steps),
        "pairs_trained": sum(m["selected/pairs"] for m in steps),
        "score_seconds": round(sum(m["score_seconds"] for m in steps), 2),
        "selector_seconds": round(sum(m["selector/seconds"] for m in steps), 2),
    }


# ------------------------------------------------------------------------- the scaffold
# The regions between the markers are one text in the three scripts: a test compares them.


# --- same in dnpo.py, tso.py, sams.py: shard ---
def shard(wrap, path: str, c, device, offload: bool = False) -> nn.Module:
    """Loads a model in float32 and makes it ready for the loop: a Scorer, made by wrap(lm).

    First comes activation checkpointing, then DDP, FSDP2 (hsdp: sharded inside a node, replicated
    across) or one device. Under FSDP only rank 0 ever holds the whole model, on its CPU. offload:
    the layers may be moved to the CPU; each then comes back for its forward pass.
    """
    sharded = dist.is_initialized() and c.parallel in ("fsdp", "hsdp")
    module = wrap(lm_shapes(path) if sharded else load_lm(path, torch.float32, "cpu"))
    layers = module.lm.model.layers

    if c.activation_checkpointing and any(p.requires_grad for p in module.lm.parameters()):
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    if not sharded:
        module = module.to(device)
        trained = any(p.requires_grad for p in module.parameters())
        return DDP(module) if dist.is_initialized() and trained else module

    full = None
    if job.on_rank_0():
        full = wrap(load_lm(path, torch.float32, "cpu"))
    options = {"mp_policy": fsdp.MixedPrecisionPolicy(getattr(torch, c.dtype), torch.float32)}
    if c.parallel == "hsdp":
        options["mesh"] = job.node_mesh(device.type)
    offload_policy = fsdp.CPUOffloadPolicy(pin_memory=False) if offload else fsdp.OffloadPolicy()
    for layer in layers:
        fsdp.fully_shard(layer, **options, offload_policy=offload_policy)
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
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


# --- end: step ---


# --- same in dnpo.py, tso.py, sams.py: setup ---
def setup(c) -> torch.device:
    """Joins the process group if torchrun started us, and returns this rank's device.

    Makes the toy world if a flag names a part of it and it is missing.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        if c.parallel == "none" and int(os.environ["WORLD_SIZE"]) > 1:
            job.die(
                "--parallel none trains on one process: "
                "start it without torchrun, or use --parallel ddp or fsdp"
            )
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", **job.torchrun_store())
    job.stop_on_sigterm()

    world = job.world_size()
    share = c.batch // world
    if c.batch % world or share % min(c.micro_batch, share):
        job.die(
            f"--batch {c.batch} can't be divided by {world} ranks x --micro_batch {c.micro_batch}"
        )
    if any(str(value).startswith("runs/toy/") for value in vars(c).values()):
        if job.on_rank_0():
            toy.make(Path("runs/toy"))
        job.barrier()
    return device


# --- end: setup ---


if __name__ == "__main__":
    record(main)()  # under torchrun: the traceback and rank of whoever fails first
