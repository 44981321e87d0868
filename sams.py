"""SamS, adaptive batch-wise Sample Scheduling for DPO (arXiv 2506.17252), with DPO (2305.18290), IPO and Selective DPO (2502.09650) beside it.

Of every batch of n preference pairs a small learned selector picks the K to train on; DPO's loss is unchanged. A contextual bandit:
arms = the batch's pairs, context = the policy's hidden states, reward = did training on them help. In round t:

  score    h, m_i, log pi(y_w) of all n pairs, without gradient            m = beta [ log pi/pi_ref(y_w) - log pi/pi_ref(y_l) ]
  reward   of round t-1, now that its effect is seen ("lagged"):
           L~_t = mean_i -sigmoid(m_i),   rho = (L~_{t-1} - L~_t) / max(|L~_{t-1}|, |L~_t|),   rho <- (rho + mean of all rho so far) / 2
           kappa_i = w_m mm(m_i) + w_u (1 - mm(log pi(y_w)_i))             mm: min-max over the batch
           r_i = gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa_i)
  fit      f1 (exploitation) to (context, r), f2 (exploration) to (f1's activations, r - f1), on round t-1 and replayed rounds
  select   the K = ceil(ratio n) pairs with the highest f1 + explore f2
  train    one step on these K alone, loss averaged over K

Differs from the paper, or is not specified by it (ours unless said):
 1. Scoring has a pass of its own, without gradient, and forward + backward see the K alone: 1 + 3/2 units of work at K = n/2 where DPO needs 3.
    The paper keeps the graph of all n and detaches n - K.
 2. rho's and kappa's formulas, a = 50 and b = 0.5 are the released code's; it divides by a negative number (rho's sign flips), applies the sigmoid
    twice, and broadcasts its regression target to a matrix. None of that is copied.
 3. Rewards are given to the K selected pairs only: a bandit sees the arms that it pulls.
 4. Selector: LayerNorm, Linear to 256, a 2-layer transformer over the layers' tokens, mean; f1 a residual MLP, f2 an MLP on f1's detached activations.
    (Released code: a 6-layer MiniLM.) Adam, lr 1e-4, a round: four steps, one pass over this and up to 32 earlier rounds.
 5. Context: the mean over response tokens of each layer's output; `--context mean` averages chosen and rejected as released, and is blind to a swap of
    the two; `both` adds their difference.
 6. Reference log-probs are computed once, by the untrained policy in the shapes of the training, kept in a file, and no reference stays in memory.
    In bf16 a summed log-prob moves by up to a nat with the shape of its batch, hence one pair per forward pass there.
 7. Selective DPO: difficulty is the loss under a DPO model of the half of the data that doesn't hold the pair; the easiest share is kept.

    python sams.py                                                 # laptop: the toy world, a fifth of the labels flipped
    python sams.py --preset paper --limit 2000                     # one GPU, a part of the paper's data
    torchrun --nproc_per_node 8 sams.py                            # the paper's run
"""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import toy
from common import (STOP, Scorer, barrier, collate, die, encode_pairs, fill, hold_out, lm_shapes, load_lm, load_rows, load_state, load_tokenizer, memory_gib,
                    memory_plan, metric_line, node_mesh, open_run, parse, progress, ranks, read_jsonl, save_checkpoint, save_state, seed_of, stop_on_sigterm,
                    stopped, sum_ranks, table, torchrun_store, truncate_metrics, write_atomic)


# ---------------------------------------------------------------- the equations


def margins(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """m = beta [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ]. logps, ref_logps: [B, 2], chosen first -> [B]."""
    chosen, rejected = (beta * (logps - ref_logps)).unbind(1)  # the implicit rewards [B]
    return chosen - rejected


def dpo_losses(margin: Tensor, beta: float) -> Tensor:
    """DPO, Eq. 7: -log sigmoid(m). [B] -> [B]."""
    return F.softplus(-margin)


def ipo_losses(margin: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, Eq. 17): (m / beta - 1 / (2 beta))^2. [B] -> [B]."""
    return (margin / beta - 1 / (2 * beta)).square()


def bounded_loss(margin: Tensor) -> Tensor:
    """L~ = mean_i -sigmoid(m_i), within [-1, 0]. [n] -> []."""
    return -margin.sigmoid().mean()


def batch_reward(before: float, after: float) -> float:
    """rho = (L~_t - L~_{t+1}) / max(|L~_t|, |L~_{t+1}|): the relative gain, positive when the loss fell."""
    return (before - after) / max(abs(before), abs(after))


def min_max(x: Tensor) -> Tensor:
    """(x - min) / (max - min); 0.5 everywhere where all are equal. [n] -> [n]."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.full_like(x, 0.5)


def sample_reward(margin: Tensor, chosen_logps: Tensor, margin_weight: float = 0.5, uncertainty_weight: float = 0.5) -> Tensor:
    """kappa = w_m mm(m) + w_u (1 - mm(log pi(y_w))): preference margin and uncertainty. [n], [n] -> [n]."""
    return margin_weight * min_max(margin) + uncertainty_weight * (1 - min_max(chosen_logps))


def rewards(rho: float, kappa: Tensor, gamma: float = 0.5, a: float = 50.0, b: float = 0.5) -> Tensor:
    """r = gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa). [], [K] -> [K]."""
    return gamma * torch.sigmoid(torch.tensor(a * rho + b)).to(kappa) + (1 - gamma) * kappa.sigmoid()


def select(scores: Tensor, k: int, seed: int | None = None) -> list[int]:
    """Positions of the k highest scores; with a seed, k drawn without replacement with probabilities softmax(scores) (Gumbel-top-k).
    [n] -> k positions, ascending: k = n trains on the batch as it is."""
    scores = scores.detach().double().cpu()
    if seed is not None:
        uniform = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores = scores - (-uniform.log()).log()
    return sorted(scores.argsort(descending=True, stable=True)[:k].tolist())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks, 0 where one of them is constant. Equal values share a rank. [K], [K] -> []."""
    rank = lambda x: ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double()
    a, b = rank(a) - rank(a).mean(), rank(b) - rank(b).mean()
    return (a @ b / (a.norm() * b.norm())).item() if a.norm() * b.norm() > 0 else 0.0


# ---------------------------------------------------------------- contexts and the selector


class PoolingScorer(Scorer):
    """log pi(y|x) and, when asked, the mean over response tokens of every layer's output. Hooks: one layer's states are alive at a time."""

    def __init__(self, lm):
        super().__init__(lm)
        self.mask, self.pooled = None, {}
        for i, layer in enumerate(lm.model.layers):
            layer.register_forward_hook(functools.partial(self.pool, i))

    def pool(self, i: int, layer, args, out):
        if self.mask is not None:
            states = (out[0] if isinstance(out, tuple) else out).float()  # [S, T, D]
            self.pooled[i] = (states * self.mask[..., None]).sum(1) / self.mask.sum(1, keepdim=True)

    def forward(self, ids: Tensor, mask: Tensor, pool: bool = False) -> tuple[Tensor, Tensor | None]:
        """ids, mask [S, T] -> log pi(y|x) [S] and, if pool, states [S, L, D] in fp32."""
        self.mask, self.pooled = (mask if pool else None), {}
        logps = super().forward(ids, mask)
        self.mask = None
        return logps, torch.stack([self.pooled.pop(i) for i in range(len(self.lm.model.layers))], 1) if pool else None


def context(pooled: Tensor, kind: str) -> Tensor:
    """Pooled states of both sides -> a pair's context: their mean, or mean and difference. [2B, L, D], chosen first -> [B, L, D] or [B, L, 2D]."""
    chosen, rejected = pooled.chunk(2)
    mean = (chosen + rejected) / 2
    return mean if kind == "mean" else torch.cat([mean, chosen - rejected], -1)


class Selector(nn.Module):
    """f1, exploitation: contexts -> predicted reward; f2, exploration: f1's activations -> predicted residual of f1."""

    def __init__(self, layers: int, width: int, inner: int = 256):
        super().__init__()
        block = nn.TransformerEncoderLayer(inner, 4, 2 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.layer = nn.Parameter(torch.zeros(layers, inner))
        self.encoder = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(inner), enable_nested_tensor=False)
        self.residual = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, inner))
        self.exploit = nn.Linear(inner, 1)
        self.explore = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, 1))

    def forward(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """[n, L, D] -> f1 [n], f2 [n]. f2 sends no gradient into f1."""
        h = self.encoder(self.read(contexts) + self.layer).mean(1)  # [n, inner]
        u = h + self.residual(h)
        return self.exploit(u)[:, 0], self.explore(u.detach())[:, 0]


def selector_loss(exploit: Tensor, explore: Tensor, reward: Tensor) -> Tensor:
    """mean (f1 - r)^2 + mean (f2 - (r - f1))^2, f1 held in the second. [K], [K], [K] -> []."""
    if not exploit.shape == explore.shape == reward.shape:
        raise ValueError(f"shapes {list(exploit.shape)}, {list(explore.shape)}, {list(reward.shape)} would broadcast")
    return (exploit - reward).square().mean() + (explore - (reward - exploit.detach())).square().mean()


class Bandit:
    """The selector with its lagged training. Every rank holds the same one and sees the same numbers."""

    def __init__(self, layers: int, width: int, c, device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(c.seed, "selector"))
            self.selector = Selector(layers, width).to(device)
        self.optimizer = torch.optim.Adam(self.selector.parameters(), lr=c.selector_lr)
        self.c, self.device = c, device
        self.pending = None  # the last round, whose effect is not yet seen: its selected pairs' contexts, kappa and predictions, and its L~
        self.replay = deque(maxlen=1 + c.replay)  # (contexts [K, L, D], rewards [K]) of the newest rounds
        self.rho_sum, self.rounds = 0.0, 0

    def round(self, contexts: Tensor, margin: Tensor, chosen_logps: Tensor, k: int, seed: int | None) -> tuple[list[int], dict]:
        """One round: learn from the last one, then pick k of n. contexts [n, L, D], margin, chosen_logps [n] -> positions, what to log."""
        now, log = bounded_loss(margin).item(), {}
        if self.pending:
            log = self.learn(now)
        with torch.no_grad():
            exploit, explore = self.selector(contexts)
            scores = exploit + self.c.explore * explore
        if dist.is_initialized():
            dist.broadcast(scores, 0)  # ranks on unlike hardware must not round their way to unlike choices
        at = select(scores, k, seed)
        kappa = sample_reward(margin, chosen_logps, self.c.margin_weight, self.c.uncertainty_weight)
        self.pending = {"contexts": contexts[at], "kappa": kappa[at], "predicted": exploit[at], "loss": now}
        return at, log

    def learn(self, now: float) -> dict:
        """The last round's rewards, now that its effect on the bounded loss is seen, and a few steps on them and on replayed rounds."""
        last, rho = self.pending, batch_reward(self.pending["loss"], now)
        self.rho_sum, self.rounds = self.rho_sum + rho, self.rounds + 1
        reward = rewards((rho + self.rho_sum / self.rounds) / 2, last["kappa"], self.c.gamma)
        self.replay.append((last["contexts"], reward))
        order = random.Random(seed_of(self.c.seed, "replay", self.rounds)).sample(list(self.replay), len(self.replay))
        for i in range(min(self.c.fit_steps, len(order))):  # one pass over these rounds
            x, r = (torch.cat(parts) for parts in zip(*order[i::self.c.fit_steps]))
            loss = selector_loss(*self.selector(x), r)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"selector/rho": rho, "selector/reward": reward.mean().item(), "selector/predicted": last["predicted"].mean().item(),
                "selector/error": (last["predicted"] - reward).square().mean().sqrt().item(), "selector/rank_correlation": rank_correlation(last["predicted"], reward),
                "selector/fit": loss.item()}

    def state(self) -> dict:
        """All that a resumed run needs, as tensors and numbers."""
        return {"selector": self.selector.state_dict(), "optimizer": self.optimizer.state_dict(), "pending": self.pending, "replay": list(self.replay),
                "rho_sum": self.rho_sum, "rounds": self.rounds}

    def restore(self, state: dict):
        move = lambda x: x.to(self.device) if isinstance(x, Tensor) else x
        self.selector.load_state_dict(state["selector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pending = state["pending"] and {k: move(v) for k, v in state["pending"].items()}
        self.replay.extend((move(x), move(r)) for x, r in state["replay"])
        self.rho_sum, self.rounds = state["rho_sum"], state["rounds"]

    def nbytes(self) -> int:
        """Bytes of weights, Adam's two moments, gradients and replay."""
        return sum(4 * 4 * p.numel() for p in self.selector.parameters()) + sum(x.nbytes for x, _ in self.replay)


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    # the method
    select: Literal["topk", "sample", "random", "margin", "all", "oracle"] = "topk"  # K highest scores; drawn by softmax(score); any K; K highest margins; plain DPO; unflipped first (a ceiling)
    ratio: float = 0.5  # K / n
    gamma: float = 0.5  # share of the batch's reward in a pair's
    margin_weight: float = 0.5  # weight of the preference margin in kappa
    uncertainty_weight: float = 0.5  # weight of 1 - log pi(y_w) in kappa
    explore: float = 0.1  # weight of f2 in the score
    replay: int = 32  # earlier rounds that the selector is fitted on too
    context: Literal["mean", "both"] = "mean"  # what the selector sees of a pair: mean of chosen and rejected states, or their difference too
    selector_lr: float = 1e-4  # learning rate of the selector
    fit_steps: int = 4  # the selector's Adam steps a round
    preselect: float = 1.0  # Selective DPO: first keep this share of the pairs, the easiest by cross-fitted validation loss
    loss: Literal["dpo", "ipo"] = "dpo"  # of the training
    beta: float = 0.01  # strength of the pull to the reference
    # data
    model: str = "meta-llama/Meta-Llama-3-8B-Instruct"  # model folder or Hub id to start from; also the reference
    data: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # preference pairs: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    test: str | None = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # held-out pairs (without it: a tenth of --data, by a hash of the prompt)
    limit: int | None = None  # use the first LIMIT training pairs
    test_pairs: int = 1000  # held-out pairs to measure on
    flip: float = 0.0  # share of the training pairs whose labels are swapped, to see who notices
    max_prompt: int = 512  # tokens; a longer prompt is left out and counted
    max_response: int = 512  # tokens; a longer answer is cut, and gets no end-of-sequence token
    # optimisation
    lr: float = 1e-6  # peak learning rate
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then it falls as a cosine
    epochs: int = 1  # passes over the pairs
    batch: int = 64  # pairs to select from per optimizer step, over all ranks (n)
    micro_batch: int = 1  # pairs per forward pass and rank; changes memory, not results; 1 in bf16
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop after this many optimizer steps
    seed: int = 0  # of order, flips, selector and selection
    # system
    preset: Literal["toy", "paper"] = "paper"  # all other defaults; unset: paper under CUDA, else toy
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"  # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; weights and optimizer stay in float32
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    save_every: int = 50  # optimizer steps between training states
    eval_every: int = 50  # optimizer steps between measurements on held-out pairs
    reference: str = "runs/reference"  # folder of reference log-probs, shared by runs
    out: str = "runs/sams"  # folder of the run
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # delete the run in --out and begin again
    dry_run: bool = False  # check everything, show the plan and one example, and stop before any model is loaded

    def __post_init__(self):
        for name in ("beta", "lr", "selector_lr", "fit_steps", "batch", "micro_batch", "save_every", "eval_every", "max_prompt", "max_response", "test_pairs", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "replay", "explore", "margin_weight", "uncertainty_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, not {getattr(self, name)}")
        for name, low in (("ratio", 0), ("preselect", 0), ("gamma", -1), ("flip", -1)):
            if not max(low, 0) <= getattr(self, name) <= 1 or getattr(self, name) == low:
                raise ValueError(f"--{name} must be {'above' if low == 0 else 'at least'} 0 and at most 1, not {getattr(self, name)}")
        for name in ("limit", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")


TOY = dict(model="runs/toy/sft", data="runs/toy/pairs.jsonl", test=None, flip=0.2, gamma=0.2, margin_weight=1.0, uncertainty_weight=0.0, context="both", selector_lr=1e-3,
           max_response=64, beta=0.1, lr=1e-4, micro_batch=32, sort_by_length=False, parallel="ddp", dtype="float32", activation_checkpointing=False, eval_every=25)


# --- same in dnpo.py, tso.py, sams.py: setup ---
def setup(c) -> torch.device:
    """Joins the process group if torchrun started us, picks the device, and makes the toy world if it is asked for and missing."""
    cuda, under_torchrun = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if under_torchrun:
        if c.parallel == "none" and int(os.environ["WORLD_SIZE"]) > 1:
            die("--parallel none trains on one process: start it without torchrun, or use --parallel ddp or fsdp")
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", **torchrun_store())
    stop_on_sigterm()
    if c.batch % ranks()[1] or c.batch // ranks()[1] % min(c.micro_batch, c.batch // ranks()[1]):
        die(f"--batch {c.batch} can't be divided by {ranks()[1]} ranks x --micro_batch {c.micro_batch}")
    if any(str(value).startswith("runs/toy/") for value in vars(c).values()):
        if ranks()[0] == 0:
            toy.make(Path("runs/toy"))
        barrier()
    return device
# --- end: setup ---


# --- same in dnpo.py, tso.py, sams.py: shard ---
def shard(wrap, path: str, c, device, offload: bool = False) -> nn.Module:
    """wrap(lm) -> a Scorer in float32, ready for the loop: activation checkpointing, then DDP, FSDP2 (hsdp: sharded inside a node, replicated across) or one device.
    Under FSDP no rank but the first ever holds the whole model, and that one on the CPU. offload: the layers may be moved to the CPU; each then comes back for its forward pass."""
    sharded = dist.is_initialized() and c.parallel in ("fsdp", "hsdp")
    module = wrap(lm_shapes(path) if sharded else load_lm(path, torch.float32, "cpu"))
    trained = any(p.requires_grad for p in module.parameters())
    if c.activation_checkpointing and any(p.requires_grad for p in module.lm.parameters()):
        for layer in module.lm.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if not sharded:
        module = module.to(device)
        return DDP(module) if dist.is_initialized() and trained else module
    full, own = wrap(load_lm(path, torch.float32, "cpu")) if ranks()[0] == 0 else None, dict(mp_policy=MixedPrecisionPolicy(getattr(torch, c.dtype), torch.float32))
    if c.parallel == "hsdp":
        own["mesh"] = node_mesh(device.type)
    for layer in module.lm.model.layers:
        fully_shard(layer, **own, offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy())
    fully_shard(module, **own)  # the root holds embedding and head together: they may be tied
    return fill(module, full, device)


def autocast(c, device, module: nn.Module):
    """bf16 compute over fp32 weights in a forward pass; FSDP casts by itself."""
    return torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16" and not isinstance(module, FSDPModule))


def no_sync(*modules: nn.Module, last: bool):
    """DDP sends no gradients before a step's last micro-batch."""
    stack = contextlib.ExitStack()
    for module in modules:
        if isinstance(module, DDP) and not last:
            stack.enter_context(module.no_sync())
    return stack
# --- end: shard ---


# --- same in dnpo.py, tso.py, sams.py: order ---
def step_order(n: int, c, *seed, sizes: list[int] | None = None) -> list[list[int]]:
    """The pairs' indices of every optimizer step: a seeded permutation per epoch, cut into batches; an epoch's last may be smaller.
    With sizes, a step's pairs are sorted by them: its micro-batches have less padding, and the step is the same."""
    steps = []
    for epoch in range(c.epochs):
        order = random.Random(seed_of(*seed, epoch)).sample(range(n), n)
        steps += [order[i:i + c.batch] for i in range(0, n, c.batch)]
    return [sorted(step, key=sizes.__getitem__) if sizes else step for step in steps[:c.max_steps]]


def micro_batches(step: list[int], c) -> list[tuple[list[int], list[float]]]:
    """This rank's share of a step as (indices, weights). Every rank gets equally many, equally large ones; places left over
    are filled with a pair of weight 0. The loss is divided by the pairs of the whole step, so the split changes nothing."""
    rank, world = ranks()
    micro = min(c.micro_batch, math.ceil(len(step) / world))
    share = math.ceil(len(step) / (world * micro)) * micro
    mine = [(i, 1.0) for i in step] + [(step[0], 0.0)] * (share * world - len(step))
    return [tuple(zip(*mine[rank::world][i:i + micro])) for i in range(0, share, micro)]


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the steps, then a cosine to 0; step counts from 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def take_step(optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clips, steps, clears; -> the gradient's norm before clipping."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
# --- end: order ---


# ---------------------------------------------------------------- one round: score, pick, train


def both_sides(pairs: list[tuple], indices) -> list[tuple]:
    """Pairs (prompt, chosen, rejected) -> sequences, chosen first."""
    return [pairs[i][:2] for i in indices] + [(pairs[i][0], pairs[i][2]) for i in indices]


@torch.no_grad()
def score(policy: nn.Module, pairs: list[tuple], indices: list[int], c, device, kind: str | None = None) -> tuple[Tensor, Tensor | None]:
    """log pi of both sides [n, 2], and contexts [n, L, D] if a kind is given, of the pairs `indices`: each rank scores its share, every rank gets all."""
    found = []
    for some, _ in micro_batches(indices, c):
        with autocast(c, device, policy):
            logps, pooled = policy(*collate(both_sides(pairs, some), device), kind is not None)
        found.append((torch.stack(logps.chunk(2), 1),) + ((context(pooled, kind),) if kind else ()))

    def gather(share: Tensor) -> Tensor:  # of micro_batches' order: the k-th place of rank r is the step's place k * world + r
        shares = [share]
        if dist.is_initialized():
            shares = [torch.empty_like(share) for _ in range(ranks()[1])]
            dist.all_gather(shares, share)
        return torch.stack(shares, 1).flatten(0, 1)[:len(indices)]
    logps, *contexts = (gather(torch.cat(parts)) for parts in zip(*found))
    return logps, contexts[0] if kind else None


def score_file(file: Path, model: str, pairs: list[tuple], c, device, note: str) -> Tensor:
    """log pi [n, 2] of all pairs under a frozen model, in `file`; made on first use, in the shapes of the training, and goes on after a kill."""
    part = file.with_name(f"{file.name}.{seed_of(c.out):016x}.part")  # runs side by side share the file, not the work on it
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = part.read_text().splitlines(keepends=True) if part.exists() else []
        done = [line for line in lines if line.endswith("\n")]  # the last may be torn
        barrier()
        if ranks()[0] == 0:
            write_atomic(part, "".join(done))
        policy = shard(lambda lm: PoolingScorer(lm).requires_grad_(False), model, c, device)
        size = max(c.batch, c.micro_batch * ranks()[1])
        for i in progress(range(len(done), len(pairs), size), note):
            logps, _ = score(policy, pairs, list(range(i, min(i + size, len(pairs)))), c, device)
            if ranks()[0] == 0:
                with open(part, "a") as out:
                    out.writelines(json.dumps(row) + "\n" for row in logps.tolist())
            if sum_ranks({"stop": torch.tensor(float(STOP.is_set()), device=device)})["stop"]:
                stopped()
        if ranks()[0] == 0:
            os.replace(part, file)
        barrier()
    return torch.tensor([json.loads(line) for line in file.read_text().splitlines()], device=device)


def reference_logps(c, config, pairs: list[tuple], device) -> Tensor:
    """log pi_ref [n, 2], in a file of --reference named after what it depends on: model, ids (so data and template), number format."""
    folder = Path(c.model)
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))] if folder.exists() else getattr(config, "_commit_hash", None)
    key = seed_of(c.model, files, c.dtype, *(seed_of(pair[:3]) for pair in pairs))
    return score_file(Path(c.reference) / f"{key:016x}.jsonl", c.model, pairs, c, device, "reference")


def pick(c, how: str, step: list[int], k: int, flipped: list[bool], logps: Tensor | None, ref: Tensor, contexts: Tensor | None, bandit: Bandit | None, seed: int):
    """k of the step's pairs, by `--select` -> positions, what to log."""
    if how == "all":
        return list(range(len(step))), {}
    if how == "random":
        return select(torch.zeros(len(step)), k, seed), {}
    if how == "oracle":
        return select(torch.tensor([-100.0 * flipped[i] for i in step]), k, seed), {}
    margin = margins(logps, ref[step], c.beta)
    if how == "margin":
        return select(margin, k), {}
    return bandit.round(contexts, margin, logps[:, 0], k, seed if how == "sample" else None)


def descend(policy: nn.Module, pairs: list[tuple], ref: Tensor, indices: list[int], c, device) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs `indices` of all ranks; -> this rank's part of their mean metrics."""
    sums, micros = {}, micro_batches(indices, c)
    for j, (some, weights) in enumerate(micros):
        weight, ref_logps = torch.tensor(weights, device=device), ref[list(some)]
        with no_sync(policy, last=j + 1 == len(micros)):
            with autocast(c, device, policy):
                logps, _ = policy(*collate(both_sides(pairs, some), device))
            logps = torch.stack(logps.chunk(2), 1)  # [B, 2]
            margin = margins(logps, ref_logps, c.beta)
            losses = {"dpo": dpo_losses, "ipo": ipo_losses}[c.loss](margin, c.beta)
            ((weight * losses).sum() / len(indices) * ranks()[1]).backward()  # DDP and FSDP average over ranks
        chosen, rejected = (c.beta * (logps - ref_logps)).detach().unbind(1)
        for name, value in {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margin, "rewards/accuracies": (chosen > rejected).float(),
                            "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}.items():
            sums[name] = sums.get(name, 0.0) + (weight * value.detach()).sum() / len(indices)
    return sums


def measure(policy: nn.Module, pairs: list[tuple], ref: Tensor, c, device) -> dict[str, float]:
    """Held-out preference accuracy and implicit rewards."""
    logps, _ = score(policy, pairs, list(range(len(pairs))), c, device)
    chosen, rejected = (c.beta * (logps - ref)).unbind(1)
    return {"accuracy": (chosen > rejected).double().mean().item(), "chosen_reward": chosen.mean().item(), "rejected_reward": rejected.mean().item(), "margin": (chosen - rejected).mean().item()}


def train(c, how: str, pairs: list[tuple], ref: Tensor, flipped: list[bool], held: list[tuple], held_ref: Tensor, folder: Path, tok, device):
    """The policy from --model on the pairs that `how` picks, into folder/checkpoint; training states in folder/state.pt, lines in metrics.jsonl."""
    policy = shard(PoolingScorer, c.model, c, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    sizes = [sum(map(len, pair[:3])) for pair in pairs] if c.sort_by_length else None
    steps, state, metrics, parts = step_order(len(pairs), c, c.seed, "order", sizes=sizes), folder / "state.pt", folder / "metrics.jsonl", {"policy": (policy, optimizer)}
    more = load_state(state, parts) if state.exists() else {"step": 0}
    lm = getattr(policy, "module", policy).lm
    bandit = Bandit(len(lm.model.layers), lm.config.hidden_size * (1 + (c.context == "both")), c, device) if how in ("topk", "sample") else None
    if bandit and "bandit" in more:
        bandit.restore(more["bandit"])
    first = more["step"]
    if ranks()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        truncate_metrics(metrics, lambda m: m["step"] <= first)
    barrier()
    bar, started = progress(range(first, len(steps)), folder.name), time.time()
    for step in bar:
        indices, before = steps[step], time.time()
        k = len(indices) if how == "all" else math.ceil(c.ratio * len(indices))
        logps, contexts = score(policy, pairs, indices, c, device, c.context if bandit else None) if bandit or how == "margin" else (None, None)
        scored = time.time()
        at, log = pick(c, how, indices, k, flipped, logps, ref, contexts, bandit, seed_of(c.seed, "select", step))
        picked = time.time()
        if logps is not None:
            margin, chosen = margins(logps, ref[indices], c.beta), torch.zeros(len(indices), dtype=torch.bool, device=device)
            chosen[at] = True
            mean = lambda x: x.mean().item() if len(x) else 0.0
            log |= {"selected/margin": mean(margin[chosen]), "unselected/margin": mean(margin[~chosen])}
        length = lambda some: sum(len(pairs[i][1]) + len(pairs[i][2]) for i in some) / max(1, len(some))
        selected = [indices[j] for j in at]
        unselected = sorted(set(indices) - set(selected))
        log |= {"batch/pairs": len(indices), "batch/flipped": sum(flipped[i] for i in indices), "selected/pairs": len(selected), "selected/indices": selected,
                "selected/flipped": sum(flipped[i] for i in selected), "selected/length": length(selected), "unselected/length": length(unselected),
                "score_seconds": scored - before, "selector/seconds": picked - scored, "selector/bytes": bandit.nbytes() if bandit else 0}
        factor = lr_factor(step, len(steps), c.warmup)
        sums = descend(policy, pairs, ref, selected, c, device)
        norm = take_step(optimizer, factor * c.lr, c.clip)
        m = {"step": step + 1} | sum_ranks(sums | {"stop": torch.tensor(float(STOP.is_set()), device=device)}) | log | {"grad_norm": norm, "lr": factor * c.lr, "memory_gib": memory_gib(device),
                                                        "pairs_per_second": sum(map(len, steps[first:step + 1])) / (time.time() - started)}
        stop = m.pop("stop")
        if not math.isfinite(m["loss"]):
            sys.exit(f"error: the loss is {m['loss']} at step {step + 1}, rows {[pairs[i][3] for i in selected]}: lower --lr, or look at these rows")
        if step == 0 and abs(m["rewards/chosen"]) > 1e-3:
            print(f"warning: before the first step the policy differs from its reference by a reward of {m['rewards/chosen']:+.4f}; it should be 0", file=sys.stderr)
        if (step + 1) % c.eval_every == 0 or step + 1 == len(steps):
            m |= {f"eval/{name}": value for name, value in measure(policy, held, held_ref, c, device).items()}
        if ranks()[0] == 0:
            with open(metrics, "a") as file:
                file.write(json.dumps(m) + "\n")
            line = metric_line(m, len(steps), (time.time() - started) / (step - first + 1) * (len(steps) - step - 1))
            bar.set_description_str(line)
            if bar.disable and (step + 1) % max(1, len(steps) // 4) == 0:
                print(line, flush=True)
        if ((step + 1) % c.save_every == 0 or stop) and step + 1 < len(steps):
            save_state(state, parts, step=step + 1, **({"bandit": bandit.state()} if bandit else {}))
        if stop:
            stopped()
    save_checkpoint(folder / "checkpoint", policy, tok, c.model)


# ---------------------------------------------------------------- phases: flip -> reference -> (preselect) -> train -> measure


def flip_labels(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Swaps chosen and rejected of a seeded share of the rows, and marks them in meta.flipped."""
    chosen = set(random.Random(seed_of(seed, "flip")).sample(range(len(rows)), round(share * len(rows))))
    swap = lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"], "meta": row["meta"] | {
        "flipped": not row["meta"].get("flipped", False), "chosen_ended": row["meta"].get("rejected_ended", True), "rejected_ended": row["meta"].get("chosen_ended", True)}}
    return [swap(row) if i in chosen else row for i, row in enumerate(rows)]


def easiest(c, pairs: list[tuple], ref: Tensor, flipped: list[bool], held: list[tuple], held_ref: Tensor, out: Path, tok, device) -> list[int]:
    """Selective DPO: a DPO model on each half of the pairs, every pair's loss under the model that never saw it, in out/difficulty.json;
    -> the indices of the easiest share, ascending."""
    halves = [sorted(half) for half in (lambda order: (order[::2], order[1::2]))(random.Random(seed_of(c.seed, "halves")).sample(range(len(pairs)), len(pairs)))]
    difficulty = [0.0] * len(pairs)
    for name, own, other in (("half0", *halves), ("half1", *halves[::-1])):
        folder = out / name
        if not (folder / "checkpoint").exists():
            train(c, "all", [pairs[i] for i in own], ref[own], [flipped[i] for i in own], held, held_ref, folder, tok, device)
        logps = score_file(folder / "other.jsonl", str(folder / "checkpoint"), [pairs[i] for i in other], c, device, f"{name}: validate")
        losses = {"dpo": dpo_losses, "ipo": ipo_losses}[c.loss](margins(logps, ref[other], c.beta), c.beta)
        for i, loss in zip(other, losses.tolist()):
            difficulty[i] = loss
    if ranks()[0] == 0:
        write_atomic(out / "difficulty.json", json.dumps(difficulty))
    return select(-torch.tensor(difficulty), math.ceil(c.preselect * len(pairs)))


def show_plan(c, tok, pairs, held, flipped, dropped, device):
    """The header: what will be done with what, and one example with its loss mask."""
    why = f"default {'under' if torch.cuda.is_available() else 'without'} CUDA" if not any(a.startswith("--preset") for a in sys.argv) else "asked for"
    print(f"SamS · preset {c.preset} ({why}) · select {c.select}" + (f", {c.ratio:g} of each batch" if c.select != "all" else " (plain DPO)")
          + (f" · first the easiest {c.preselect:g} of the pairs" if c.preselect < 1 else "") + f" · loss {c.loss}, beta {c.beta:g}")
    print(f"data {c.data}: {len(pairs)} training pairs ({sum(flipped)} flipped), {len(held)} held-out pairs" + "".join(f", {n} left out: {w}" for w, n in dropped.items() if n))
    world, n = ranks()[1], len(pairs) if c.preselect == 1 else math.ceil(c.preselect * len(pairs))
    micro = min(c.micro_batch, c.batch // world)
    print(f"batch {c.batch} = {world} ranks x {micro} pairs x {c.batch // world // micro} micro-batches · {len(step_order(n, c))} steps · {device} · "
          f"{c.parallel if dist.is_initialized() else 'one process'} · weights float32, compute {c.dtype}" + (" · activation checkpointing" if c.activation_checkpointing else ""))
    print(memory_plan(lm_shapes(c.model), c, reference=False))
    p, y, z, _ = pairs[0]
    print(f"example, no loss: {tok.decode(p)!r}\n  chosen, with loss: {tok.decode(y)!r}\nrejected, with loss: {tok.decode(z)!r} ({len(p)} + {len(y)}, {len(z)} tokens)", flush=True)


def main():
    c = parse(Config, {"toy": TOY, "paper": {}})
    if c.dtype == "bfloat16" and c.micro_batch > 1:
        die("--dtype bfloat16 needs --micro_batch 1: there a log-prob depends on the shape of its batch, and reference and policy must be scored in the same")
    device = setup(c)
    # every check of the input comes before the first weight is read
    rows, dropped = load_rows(c.data, "pair", c.limit if c.test else None)  # without --test the held-out rows come out of all of them
    train_rows, test_rows = (rows, load_rows(c.test, "pair", c.test_pairs)[0]) if c.test else hold_out(rows)
    tok, config = load_tokenizer(c.model)
    if c.max_prompt + c.max_response > config.max_position_embeddings:
        die(f"--max_prompt {c.max_prompt} + --max_response {c.max_response} is more than {c.model}'s context of {config.max_position_embeddings} tokens")
    rows = flip_labels(train_rows[:c.limit], c.flip, c.seed)
    pairs, flipped = [], []
    for row in rows:  # one by one: who is left out takes its mark along
        encoded, left_out = encode_pairs(tok, [row], c.max_prompt, c.max_response)
        pairs += encoded
        flipped += [row["meta"].get("flipped", False)] * len(encoded)
        dropped.update(left_out)
    held, _ = encode_pairs(tok, test_rows[:c.test_pairs], c.max_prompt, c.max_response)
    if not pairs or not held:
        die(f"{c.data}: {len(pairs)} training and {len(held)} held-out pairs of at most {c.max_prompt} prompt tokens: too few (--test names held-out data)")
    if ranks()[0] == 0:
        show_plan(c, tok, pairs, held, flipped, dropped, device)
    if c.dry_run:
        return
    out, started = open_run(c, [c.data, c.test], may_change=("out", "resume", "overwrite", "parallel", "micro_batch", "save_every", "reference")), time.time()

    ref, held_ref = (reference_logps(c, config, some, device) for some in (pairs, held))
    if c.preselect < 1:
        kept = easiest(c, pairs, ref, flipped, held, held_ref, out, tok, device)
        pairs, ref, flipped = [pairs[i] for i in kept], ref[kept], [flipped[i] for i in kept]
    if not (out / "checkpoint").exists():
        train(c, c.select, pairs, ref, flipped, held, held_ref, out, tok, device)
    if ranks()[0] == 0:
        report(c, out, flipped, started)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(c, out: Path, flipped: list[bool], started: float):
    """results.json from the metrics' lines, and where the model is."""
    for old in out.glob("**/state.pt"):
        old.unlink()
    steps = read_jsonl(out / "metrics.jsonl")
    total = lambda name: sum(m[name] for m in steps)
    result = {k.removeprefix("eval/"): v for k, v in steps[-1].items() if k.startswith("eval/")}
    result |= {"flipped_selected": total("selected/flipped") / total("batch/flipped") if total("batch/flipped") else None, "select": c.select, "ratio": c.ratio, "flip": c.flip,
               "preselect": c.preselect, "steps": len(steps), "pairs_trained": total("selected/pairs"), "score_seconds": round(total("score_seconds"), 2),
               "selector_seconds": round(total("selector/seconds"), 2), "seconds": round(time.time() - started, 1), "seed": c.seed}
    write_atomic(out / "results.json", json.dumps(result, indent=1))
    print(table([{"step": m["step"], "trained on": sum(x["selected/pairs"] for x in steps[:m["step"]])} | {k.removeprefix("eval/"): v for k, v in m.items() if k.startswith("eval/")}
                 for m in steps if "eval/accuracy" in m], ["step", "trained on", "accuracy", "chosen_reward", "rejected_reward", "margin"]))
    if result["flipped_selected"] is not None:
        print(f"{result['flipped_selected']:.0%} of the flipped pairs that were seen were trained on ({'all' if c.select == 'all' else f'{c.ratio:.0%} of all pairs'} were)")
    print(f"{time.time() - started:.0f} s · {out}/results.json, metrics.jsonl · the model:\n"
          f"  lm = AutoModelForCausalLM.from_pretrained({str(out / 'checkpoint')!r})\n  tok = AutoTokenizer.from_pretrained({str(out / 'checkpoint')!r})")


if __name__ == "__main__":
    record(main)()  # under torchrun: the traceback and rank of whoever fails first
