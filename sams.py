"""SamS, adaptive batch-wise Sample Scheduling for DPO (arXiv 2506.17252, NeurIPS 2025).

Of every batch of n preference pairs a small learned selector picks the K to train on; DPO's loss is
unchanged. The selector is a contextual bandit: its arms are the batch's pairs, its context is the
policy's hidden states, its reward says whether the training helped (rho, one number a round) and
how clear and how uncertain the pair was (kappa): the paper's r_B and r_S. In round t:

  observe  h_i, m_i and log pi(y_w)_i of all n pairs, without gradient
           m = beta [ log pi/pi_ref(y_w) - log pi/pi_ref(y_l) ],   l(m) = -log sigmoid(m)
  reward   of round t-1, now that its effect is seen ("lagged", Eqs. 6-8):
           L~_t = mean_i -exp(-l(m_i)),   rho = (L~_{t-1} - L~_t) / max(|L~_{t-1}|, |L~_t|)
           rho <- (rho + the mean of all rho so far, this one included) / 2
           kappa_i = w_m mm(m_i) + w_u (1 - mm(log pi(y_w)_i))    observed before the step of t-1
           r_i = gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa_i)      mm: min-max over n
  fit      f_S (exploitation) to (context, r) and f_S' (exploration) to (f_S's activations, r - f_S)
           on round t-1 and on 32 rounds drawn from a pool of past ones
  select   the K = ceil(ratio n) pairs with the highest f_S + explore f_S'
  train    one step on these K alone, the loss averaged over K

The same loop trains DPO (2305.18290, --select all), IPO (--loss ipo) and Selective DPO (2502.09650,
--preselect).

Differs from the paper, or is not specified by it (ours unless said):

 1. We observe in a forward pass of its own. If a forward pass over n pairs is one unit of work, a
    step at K = n/2 takes 1 + 3/2 units, where DPO takes 3. The paper keeps the graph of all n and
    detaches n - K. We average the loss over the K pairs, the released code over n.
 2. The form of L~, the mean of rho, a, b, gamma and explore are the released code's. Three of its
    faults are not copied: rho's flipped sign, a second sigmoid, and a regression target that
    broadcasts.
 3. With --fit selected the K pairs picked get rewards (Algorithm 1, lines 6-13), with --fit all
    all n do (App. F.4).
 4. The selector has the paper's sizes (App. D.1, F.2), that is 5.9e8 weights: 8.8 GiB a rank. ReLU
    is ours. Pool: 40 000 rounds, 32 drawn (App. F.4), for at most four Adam steps (ours).
 5. App. F.3: the encoder learns beforehand, and is then frozen. In the paper this is during the SFT
    or, for on-policy pairs, with a frozen policy: here always so, on the contexts of the pairs, and
    f_S and f_S' start anew (ours). With --pretrain_rounds 0 the encoder learns with the rest.
 6. A context is the mean over prompt and response (App. F.2) and over both sides (as released); we
    leave out the padding, which the released code counts. Ours are `--context response`, and
    `both`, which adds the difference of the sides: from a mean one can't see that they are swapped.
 7. Ours: L~ is that of DPO's losses also with --loss ipo, and min-max is 0.5 everywhere where all
    values are within 1e-4.
 8. Reference log-probs are computed once, in batches of the training's shapes, since in bf16 a
    log-prob depends on the shape of its batch. With one pair per forward pass the shapes are the
    same; with more, the run says by how much the margins are off (RESULTS.md: 0.004 at beta 0.1).
 9. Selective DPO's authors train LoRA adapters by a recipe of their own; here the models that tell
    the difficulties are trained with all their weights, by the policy's recipe.

As released: --select sample --fit all --margin_weight 0.5 --uncertainty_weight 0.5
--selector_pooling 16 (and, in its published run, --explore 0.01)
Shapes: n pairs of a batch, K selected, P with rewards (K, or n with --fit all), B of a micro-batch
(S = 2B), T length, L layers, D width, E of the encoder. A context is [L, width], where width is D,
or 2D with `both`.

    python sams.py                                     # laptop: the toy world, 20 % labels flipped
    python sams.py --preset paper --limit 2000         # one GPU of 140 GiB, a part of the data
    torchrun --nproc_per_node 8 sams.py                # the paper's chat setting; --preset hh: HH
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
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
    """(m / beta - 1 / (2 beta))^2, Eq. 17 of the IPO paper (arXiv 2310.12036). [B] -> [B].

    As printed there, on log-probs that are summed over an answer's tokens, so that m is the margin
    that DPO and the selector have. Its authors have since said that they average over the tokens,
    and so does TRL: there the same beta asks for a margin that is wider by the answers' length.
    """
    return (margin / beta - 1 / (2 * beta)).square()


def sft_losses(chosen_logps: Tensor, lengths: Tensor) -> Tensor:
    """-log pi(y_w|x) / |y_w|, which pretraining has in the place of DPO's loss. [n], [n] -> [n]."""
    return -chosen_logps / lengths


def bounded_loss(losses: Tensor) -> Tensor:
    """L~ = mean_i -exp(-l_i), which lies in [-1, 0]; for DPO it is mean_i -sigmoid(m_i). [n] -> [].

    Eq. 6 has exp(mean_i l_i) in the place of L~. For a batch of one pair both give the same rho.
    For more pairs they differ a little: L~, which is the released code's, takes the arithmetic mean
    of the exp(-l_i), Eq. 6 the geometric one.
    """
    return -(-losses).exp().mean()


def batch_reward(before: float, after: float) -> float:
    """rho = (L~_{t-1} - L~_t) / max(|L~_{t-1}|, |L~_t|), Eq. 6: above 0 when the loss fell.

    0 where both losses are 0.
    """
    larger = max(abs(before), abs(after))
    return (before - after) / larger if larger else 0.0


def min_max(x: Tensor) -> Tensor:
    """(x - min) / (max - min), and 0.5 everywhere where all are equal. [n] -> [n].

    A range below 1e-4 is rounding: before the first step all margins are 0 up to that. (In bf16
    with several pairs a pass it is more, which tell_rounding says.)
    """
    low, high = x.min(), x.max()
    if high - low > 1e-4:
        return (x - low) / (high - low)
    return torch.full_like(x, 0.5)


def sample_reward(
    margin: Tensor,
    chosen_logps: Tensor,
    margin_weight: float = 1.0,
    uncertainty_weight: float = 1.0,
) -> Tensor:
    """kappa = w_m mm(m) + w_u (1 - mm(log pi(y_w))), Eq. 7: preference margin and uncertainty.

    [n], [n] -> [n].
    """
    uncertainty = 1 - min_max(chosen_logps)
    return margin_weight * min_max(margin) + uncertainty_weight * uncertainty


def bandit_rewards(
    rho: float, kappa: Tensor, gamma: float = 0.5, a: float = 50.0, b: float = 0.5
) -> Tensor:
    """r = gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa), Eq. 8. [P] -> [P]."""
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
    """mean (f1 - r)^2 + mean (f2 - (r - f1))^2, with f1 held in the second. [P] each -> [].

    f1 and f2 are the values of f_S and f_S'.
    """
    if not f1.shape == f2.shape == reward.shape:
        shapes = f"{list(f1.shape)}, {list(f2.shape)}, {list(reward.shape)}"
        raise ValueError(f"shapes {shapes} would broadcast")
    residual = reward - f1.detach()
    return (f1 - reward).square().mean() + (f2 - residual).square().mean()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks, 0 where one of them is constant. [P], [P] -> []."""
    a, b = centred_ranks(a), centred_ranks(b)
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 0 else 0.0


def centred_ranks(x: Tensor) -> Tensor:
    """Twice the values' ranks less their mean; equal values share a rank. [P] -> [P].

    A factor does not change a correlation.
    """
    below = (x[:, None] > x).sum(1)
    not_above = (x[:, None] >= x).sum(1)
    ranks = (below + not_above).double()
    return ranks - ranks.mean()


# ------------------------------------------------------------------------- contexts


class PoolingScorer(Scorer):
    """log pi(y|x) and, when asked, the mean over its tokens of every layer's output.

    Hooks pool each layer's output at once, so that one layer's states are alive at a time.
    """

    def __init__(self, lm):
        super().__init__(lm)
        self.mask = None  # set during a pass that is to be pooled
        self.pooled = {}
        for i, layer in enumerate(common.blocks(lm)):
            layer.register_forward_hook(functools.partial(self.keep_mean, i))

    def keep_mean(self, i: int, layer, args, out):
        if self.mask is None:
            return
        states = out[0] if isinstance(out, (tuple, list)) else out  # [S, T, D]
        if states.shape[:-1] != self.mask.shape:
            job.die(
                f"the decoder blocks of {self.lm.config.model_type} models give "
                f"{list(states.shape)}, not [S, T, D]: there is no context for --select topk or "
                "sample; the other values of --select need none"
            )
        summed = (states.float() * self.mask[..., None]).sum(1)  # [S, D]
        self.pooled[i] = summed / self.mask.sum(1, keepdim=True)

    def forward(
        self, ids: Tensor, mask: Tensor, where: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """log pi(y|x) [S] and, if asked for by `where`, states [S, L, D] in fp32.

        ids, mask, where: [S, T]. where says which tokens' states are averaged.
        """
        self.mask = where
        self.pooled = {}
        logps = super().forward(ids, mask)
        self.mask = None
        if where is None:
            return logps, None
        layers = [self.pooled.pop(i) for i in range(len(common.blocks(self.lm)))]
        return logps, torch.stack(layers, 1)


def pooled_tokens(mask: Tensor, kind: str) -> Tensor:
    """Which tokens a context is read from. [S, T], true on the response -> [S, T].

    With the kind "sequence" these are prompt and response: all up to the response's last token.
    Padding, which the released code counts too, would make a pair depend on its batch-mates.
    """
    if kind != "sequence":
        return mask
    still_to_come = mask.flip(1).cumsum(1).flip(1)  # response tokens from here on
    return still_to_come > 0


def context(pooled: Tensor, kind: str) -> Tensor:
    """A pair's context: the mean of both sides' states, with kind "both" their difference too.

    pooled: [2B, L, D], chosen first -> [B, L, D] or [B, L, 2D].
    """
    chosen, rejected = pooled.chunk(2)
    mean = (chosen + rejected) / 2
    return torch.cat([mean, chosen - rejected], -1) if kind == "both" else mean


# ------------------------------------------------------------------------- the selector


CONNECTOR = 1024  # inner width of the feature connector (released code)


class Encoder(nn.Module):
    """The feature connector and the layer encoder, which reads the policy's layers as a sequence.

    layer_encoder: a transformer with inputs_embeds, as load_layer_encoder makes it.
    """

    def __init__(self, width: int, layer_encoder: nn.Module):
        super().__init__()
        inner = layer_encoder.config.hidden_size
        self.connector = nn.Sequential(
            nn.Linear(width, CONNECTOR), nn.ReLU(), nn.Linear(CONNECTOR, inner)
        )
        self.layer_encoder = layer_encoder

    def forward(self, contexts: Tensor) -> Tensor:
        """h, of length 1, [n, E] of contexts [n, L, width]."""
        tokens = self.connector(contexts)  # [n, L, E]
        read = self.layer_encoder(inputs_embeds=tokens).last_hidden_state  # [n, L, E]
        return F.normalize(read.mean(1), dim=1)


class ResidualMLP(nn.Module):
    """h_1 = relu(W_1 x), h_l = h_{l-1} + relu(W_l h_{l-1}), and the output w h_depth, one number.

    (Every W and w has a bias.)
    """

    def __init__(self, inputs: int, width: int, depth: int):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.others = nn.ModuleList([nn.Linear(width, width) for _ in range(depth - 1)])
        self.value = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, inputs] -> the numbers [n] and all hidden activations [n, depth * width]."""
        h = self.first(x).relu()
        hidden = [h]
        for layer in self.others:
            h = h + layer(h).relu()
            hidden.append(h)
        return self.value(h)[:, 0], torch.cat(hidden, 1)


class Selector(nn.Module):
    """The encoder with the two networks of the bandit on top of it.

    Exploitation, f_S, predicts a pair's reward from its encoded context. Exploration, f_S',
    predicts the reward less f_S from the hidden activations of f_S, averaged over every
    c.selector_pooling neighbours. Both are MLPs of c.selector_depth layers, c.selector_width wide.
    """

    def __init__(self, width: int, c):
        super().__init__()
        depth, inner, pooling = c.selector_depth, c.selector_width, c.selector_pooling
        self.pooling = pooling
        self.encoder = Encoder(width, load_layer_encoder(c.encoder))
        self.exploit = ResidualMLP(self.encoder.layer_encoder.config.hidden_size, inner, depth)
        self.explore = ResidualMLP(depth * inner // pooling, inner, depth)

    def values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """f_S [n] and f_S' [n] of the encoder's outputs [n, E]. f_S' sends no gradient into f_S."""
        f1, hidden = self.exploit(h)
        pooled = F.avg_pool1d(hidden.detach()[:, None], self.pooling)[:, 0]  # the paper's h^S
        f2, _ = self.explore(pooled)
        return f1, f2

    def forward(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """f_S [n] and f_S' [n] of contexts [n, L, width]."""
        return self.values(self.encoder(contexts))


def load_layer_encoder(name: str) -> nn.Module:
    """The transformer of --encoder, without dropout; on "meta" its shapes alone."""
    from transformers import AutoModel

    config = encoder_config(name)
    if name == "none" or torch.get_default_device().type == "meta":
        encoder = AutoModel.from_config(config)
    else:
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    # it reads no words and is averaged: these are half of MiniLM's weights, and of no use here
    encoder.set_input_embeddings(nn.Identity())
    encoder.pooler = None
    return encoder.eval()


def encoder_config(name: str):
    """The configuration of --encoder; "none" is a small transformer of the same kind."""
    from transformers import AutoConfig, BertConfig

    if name == "none":
        return BertConfig(
            vocab_size=1,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
        )
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as fault:
        reason = str(fault).splitlines()[0]
        job.die(f"--encoder {name}: not a model folder or Hub id that can be loaded ({reason})")


class Pool:
    """Past rounds in CPU memory: of each the features of its rewarded pairs, and their rewards."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rounds = []

    def add(self, features: Tensor, reward: Tensor, rng: random.Random):
        """Takes a round on. Where the pool is full, it replaces a random one."""
        new = features.cpu(), reward.cpu()
        if len(self.rounds) < self.capacity:
            self.rounds.append(new)
        else:
            self.rounds[rng.randrange(self.capacity)] = new

    def draw(self, number: int, rng: random.Random) -> list[tuple[Tensor, Tensor]]:
        """So many different rounds at random, or all if there are fewer."""
        return rng.sample(self.rounds, min(number, len(self.rounds)))


class Bandit:
    """The selector with its lagged training. All ranks hold the same one and see the same numbers.

    width: of the contexts. The features of a pair are what is kept of it: its context [L, width],
    or, once the encoder is frozen, the encoder's output [E].
    """

    def __init__(self, width: int, c, device):
        with torch.random.fork_rng(devices=[]):  # no other random numbers on the CPU change
            torch.manual_seed(job.seed_of(c.seed, "selector"))
            self.selector = Selector(width, c).to(device)
        self.optimizer = torch.optim.Adam(self.selector.parameters(), lr=c.selector_lr)
        self.c = c
        self.device = device
        self.frozen = False
        self.pending = None  # the last round, which round() leaves here until its reward is known
        self.pool = Pool(c.pool)
        self.rho_sum = 0.0
        self.n_rounds = 0  # how many rounds have got their rewards

    def freeze_encoder(self, weights: dict[str, Tensor]):
        """From now on the encoder is the pretrained one, and does not change."""
        self.selector.encoder.load_state_dict(weights)
        self.selector.encoder.requires_grad_(False)
        self.frozen = True

    @torch.no_grad()
    def features(self, contexts: Tensor) -> Tensor:
        """What is kept of the pairs: [n, L, width] -> the same, or [n, E]."""
        return self.selector.encoder(contexts) if self.frozen else contexts

    def values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """f_S [n] and f_S' [n] of pairs, given their features()."""
        return self.selector.values(features) if self.frozen else self.selector(features)

    def round(
        self,
        contexts: Tensor,
        *,
        losses: Tensor,
        margin: Tensor,
        chosen_logps: Tensor,
        k: int,
        seed: int | None,
    ) -> tuple[list[int], dict]:
        """Learns from the last round, then picks k of n: greedily, or by softmax with a seed.

        contexts: [n, L, width]; losses, margin, chosen_logps: [n]. Returns the k places, and what
        to log.
        """
        # reward, fit: the last round, whose effect this batch's loss shows
        now = bounded_loss(losses).item()
        learned = self.learn(now) if self.pending else {}

        # select: the highest f_S + explore f_S'
        features = self.features(contexts)
        with torch.no_grad():
            f1, f2 = self.values(features)
            scores = f1 + self.c.explore * f2
        if dist.is_initialized():
            dist.broadcast(scores, 0)  # rank 0 decides: other hardware may round differently
        places = top_k(scores, k, seed)

        # what the next call needs in order to reward this round
        kappa_weights = self.c.margin_weight, self.c.uncertainty_weight
        kappa = sample_reward(margin, chosen_logps, *kappa_weights)
        rewarded = places if self.c.fit == "selected" else list(range(len(scores)))
        self.pending = {
            "bounded_loss": now,  # L~ of the whole batch; the others [P, ...] of the rewarded pairs
            "features": features[rewarded],
            "kappa": kappa[rewarded],
            "predicted": f1[rewarded],
        }
        return places, learned

    def learn(self, now: float) -> dict[str, float]:
        """Rewards the last round, now that its effect on the bounded loss is seen, and fits to it.

        Returns what to log: how the predictions compare with the rewards that came.
        """
        last = self.pending
        rho = batch_reward(last["bounded_loss"], now)
        self.rho_sum += rho
        self.n_rounds += 1
        smoothed = (rho + self.rho_sum / self.n_rounds) / 2
        reward = bandit_rewards(smoothed, last["kappa"], self.c.gamma)
        loss = self.fit(last["features"], reward)

        predicted = last["predicted"]
        return {
            "selector/rho": rho,
            "selector/reward": reward.mean().item(),
            "selector/predicted": predicted.mean().item(),
            "selector/error": (predicted - reward).square().mean().sqrt().item(),
            "selector/rank_correlation": rank_correlation(predicted, reward),
            "selector/fit": loss,
        }

    def fit(self, features: Tensor, reward: Tensor) -> float:
        """One pass over this round and those drawn from the pool, in at most fit_steps Adam steps.

        The round then joins the pool. Returns the last step's loss.
        """
        rng = random.Random(job.seed_of(self.c.seed, "pool", self.n_rounds))
        rounds = [(features, reward), *self.pool.draw(self.c.replay, rng)]
        self.pool.add(features, reward, rng)
        for i in range(min(self.c.fit_steps, len(rounds))):
            some = rounds[i :: self.c.fit_steps]
            some_features = torch.cat([features.to(self.device) for features, _ in some])
            some_rewards = torch.cat([reward.to(self.device) for _, reward in some])
            f1, f2 = self.values(some_features)
            loss = selector_loss(f1, f2, some_rewards)
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
            "pool": self.pool.rounds,
            "rho_sum": self.rho_sum,
            "rounds": self.n_rounds,
        }

    def restore(self, state: dict):
        """Takes on what state() has returned."""
        self.selector.load_state_dict(state["selector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pending = state["pending"]
        if self.pending:
            for name in ("features", "kappa", "predicted"):
                self.pending[name] = self.pending[name].to(self.device)
        self.pool.rounds = state["pool"]
        self.rho_sum = state["rho_sum"]
        self.n_rounds = state["rounds"]

    def nbytes(self) -> int:
        """Bytes of the weights, of gradients and Adam's two moments of those that learn, and of
        the features in the pool.
        """
        of_pool = sum(features.nbytes for features, _ in self.pool.rounds)
        return selector_nbytes(self.selector) + of_pool


def selector_nbytes(selector: nn.Module) -> int:
    """4 bytes for a weight, 16 for one that learns: gradient and Adam's two moments beside it."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in selector.parameters())


# ------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Every field is a flag, its comment the flag's help. The defaults are the paper's preset."""

    # -- the method
    # topk: the K highest scores; sample: drawn by softmax(score); random: any K; margin: the K
    # highest margins; all: no selection, all n; oracle: unflipped pairs first (a ceiling)
    select: Literal["topk", "sample", "random", "margin", "all", "oracle"] = "topk"
    ratio: float = 0.5  # K / n
    gamma: float = 0.5  # weight of rho in a pair's reward; kappa has the rest
    margin_weight: float = 1.0  # weight of the preference margin in kappa
    uncertainty_weight: float = 1.0  # weight of 1 - mm(log pi(y_w)) in kappa
    explore: float = 0.1  # weight of f_S' in the score
    # which pairs of a batch get rewards: the K picked, or all n
    fit: Literal["selected", "all"] = "selected"
    # what the selector sees of a pair, as a mean of its two sides: over prompt and response, over
    # the response, or the latter and the two sides' difference too
    context: Literal["sequence", "response", "both"] = "sequence"
    # of the training; ipo: its Eq. 17, on sums over an answer's tokens, where TRL has their means
    loss: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.01  # strength of the pull to the reference

    # -- the selector
    # the layer encoder's transformer: model folder or Hub id, or none, a small one made here
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    # rounds in which the encoder is trained before it is frozen: N rounds make N - 1 fits, as each
    # is rewarded in the next; 0: it learns with the rest
    pretrain_rounds: int = 100
    selector_depth: int = 16  # layers of f_S, and of f_S'
    selector_width: int = 4096  # width of both
    selector_pooling: int = 4  # f_S' reads the mean of so many neighbouring activations of f_S
    selector_lr: float = 1e-4  # learning rate of the selector
    fit_steps: int = 4  # the selector's Adam steps a round, at most
    pool: int = 40000  # past rounds that are kept; when it is full a random one is replaced
    replay: int = 32  # past rounds, drawn from the pool, that the selector is fitted on in a round

    # -- Selective DPO
    # first keep this share of the pairs, the easiest by cross-fitted validation loss
    preselect: float = 1.0
    preselect_splits: int = 3  # random splits into halves that a difficulty is the mean over
    # of the pairs kept by --preselect: from easy to difficult, or shuffled
    order: Literal["easy_first", "shuffled"] = "easy_first"

    # -- data
    # model folder or Hub id to start from; also the reference
    model: str = "meta-llama/Meta-Llama-3-8B-Instruct"
    # preference pairs: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    data: str = "princeton-nlp/llama3-ultrafeedback:train"
    # held-out pairs (without it: a tenth of --data, by a hash of the prompt)
    test: str | None = "princeton-nlp/llama3-ultrafeedback:test"
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
    # pairs per forward pass and rank; changes memory, not results (in bf16: up to rounding)
    micro_batch: int = 1
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop after this many optimizer steps
    seed: int = 0  # of order, flips, selector and selection

    # -- system
    # all other defaults; unset: paper under CUDA, else toy
    preset: Literal["toy", "paper", "hh"] = "paper"
    # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"
    # of the computation; weights and optimizer stay in float32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    compile: bool = False  # the layers, with torch.compile; the first steps take minutes
    save_every: int = 50  # optimizer steps between training states
    # of the weights of the last checkpoint; those in between stay in float32
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    eval_every: int = 50  # optimizer steps between measurements on held-out pairs
    reference: str = "runs/reference"  # folder of reference log-probs, shared by runs
    out: str = "runs/sams"  # folder of the run
    resume: bool = False  # go on with the run in --out, or begin it
    overwrite: bool = False  # delete the run in --out and begin again
    # check everything, show the plan and one example, and stop before any model is loaded
    dry_run: bool = False

    def __post_init__(self):
        job.check_positive(self, "beta", "lr", "selector_lr", "fit_steps", "batch", "micro_batch")
        job.check_positive(self, "save_every", "eval_every", "max_prompt", "max_response")
        job.check_positive(self, "test_pairs", "clip", "preselect_splits", "pool")
        job.check_positive(self, "selector_depth", "selector_width", "selector_pooling")
        job.check_not_negative(self, "replay", "explore", "margin_weight")
        job.check_not_negative(self, "uncertainty_weight", "pretrain_rounds")
        if self.pretrain_rounds == 1:
            raise ValueError(
                "--pretrain_rounds 1 would freeze an untrained encoder: 0, or 2 or more"
            )
        for name in ("ratio", "preselect"):
            if not 0 < getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"--{name} must be above 0 and at most 1, not {value}")
        for name in ("gamma", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"--{name} must be at least 0 and at most 1, not {value}")
        if self.selector_depth * self.selector_width % self.selector_pooling:
            raise ValueError(
                "--selector_depth x --selector_width must divide by --selector_pooling"
            )
        job.check_positive(self, "limit", "max_steps")
        job.check_run(self)


# The paper's second setting. Its policy is Pythia-2.8B after an SFT on the chosen answers, so pass
# --model: the base model has no chat template. Epochs and lengths are ours.
HH = {
    "model": "EleutherAI/pythia-2.8b",
    "data": "Anthropic/hh-rlhf:train",
    "test": "Anthropic/hh-rlhf:test",
    "beta": 0.1,
    "epochs": 3,
    "max_prompt": 256,
    "max_response": 256,
}

# Of the method, gamma, uncertainty_weight, context, the selector, beta and lr differ from the paper
# preset; margin_weight is 1 in both. gamma, the two weights, context and selector_lr were chosen on
# another toy world (seed 1).
TOY = {
    "model": "runs/toy/sft",
    "data": "runs/toy/pairs.jsonl",
    "test": None,
    "flip": 0.2,
    "gamma": 0.2,
    "uncertainty_weight": 0.0,
    "context": "both",
    "encoder": "none",
    "pretrain_rounds": 0,
    "selector_depth": 2,
    "selector_width": 128,
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
    c = job.parse(Config, {"toy": TOY, "paper": {}, "hh": HH})
    device = setup(c)
    start, pairs, flipped, held_pairs = prepare(c, device)
    if c.dry_run:
        return
    out = job.open_run(c, [c.data, c.test], MAY_CHANGE)
    started = time.monotonic()

    # the reference's log-probs, once: no reference stays in memory
    data = Data(pairs, reference_logps(c, start, pairs), flipped)
    held = Data(held_pairs, reference_logps(c, start, held_pairs), [False] * len(held_pairs))

    # Selective DPO, if asked for
    if c.preselect < 1:
        data = data.take(easiest(c, data, held, start, out))

    # train the selector's encoder, then freeze it
    encoder_weights = None
    if c.pretrain_rounds and c.select in LEARNED:
        encoder_weights = pretrain(c, data, start, out / "pretrain")

    # train on the selected pairs of every batch
    if not (out / "checkpoint").exists():
        train(c, data, held, start, out, encoder_weights)
    remove_states(out)
    report(c, out, started)
    job.leave()


LEARNED = ("topk", "sample")  # the values of --select that use the learned selector
BLIND = ("all", "random", "oracle")  # those that need no forward pass over the batch


def pretrain(c, data: Data, start: Model, folder: Path) -> dict[str, Tensor]:
    """App. F.3: the weights of a trained encoder, from folder/encoder.pt, which is made if missing.

    The bandit makes its rounds as in the training, but on a frozen policy, with the SFT loss on the
    chosen answers in the place of DPO's, and with minus the SFT loss in the place of the margin.
    Two things follow. The SFT loss is a mean over tokens and the log-prob in kappa a sum (ours: if
    both were means, kappa would be constant), so kappa depends much on the length of y_w. And as
    nothing is trained between two rounds, rho only tells how their batches differ.
    """
    file = folder / "encoder.pt"
    device = start.device
    if job.on_any_rank(not file.exists()):
        policy = shard(frozen_pooling_scorer, start.path, c, device)
        bandit = make_bandit(c, policy, device)
        batches = math.ceil(len(data.pairs) / c.batch)
        epochs = math.ceil(c.pretrain_rounds / batches)  # as many as the rounds need
        steps = step_order(
            len(data.pairs), replace(c, epochs=epochs, max_steps=None), c.seed, "pretrain"
        )
        steps = steps[: c.pretrain_rounds]

        log = folder / "metrics.jsonl"
        keeps = {"bandit": bandit}
        run = job.TrainingRun(
            c, folder, steps, {}, device, metrics=log, note="pretrain", keeps=keeps
        )
        for step in run:
            sums, learned = pretraining_round(c, policy, data, steps[step], bandit, step)
            metrics = run.reduce(step, sums, [data.pairs[i].id for i in steps[step]])
            run.write(step, {**metrics, **learned}, lr=c.selector_lr, grad_norm=0.0)
        if job.on_rank_0():
            with job.all_or_nothing(file) as temporary:
                torch.save(bandit.selector.encoder.state_dict(), temporary)
        job.barrier()
    return torch.load(file, map_location=device, weights_only=True)


def pretraining_round(
    c, policy: nn.Module, data: Data, indices: list[int], bandit: Bandit, step: int
) -> tuple[dict[str, Tensor], dict]:
    """One round of the bandit on a frozen policy. Returns a rank's part of the metrics, and more.

    The picks train nothing: they only say whose rewards are fitted.
    """
    n = len(indices)
    seen = observe(c, policy, data.pairs, indices, bandit.device, c.context)
    chosen_logps = seen.logps[:, 0]
    lengths = torch.tensor([len(data.pairs[i].chosen) for i in indices], device=bandit.device)
    losses = sft_losses(chosen_logps, lengths)

    seed = job.seed_of(c.seed, "pretrain", step) if c.select == "sample" else None
    _, learned = bandit.round(
        seen.contexts,
        losses=losses,
        margin=-losses,
        chosen_logps=chosen_logps,
        k=how_many(c.ratio, n),
        seed=seed,
    )

    sums = {}
    zeros = torch.zeros_like(losses)
    values = common.preference_metrics(losses, zeros, zeros, seen.logps)
    share_of_rank = torch.full_like(losses, 1 / job.world_size())  # every rank has all pairs
    common.add_weighted(sums, values, share_of_rank, n)
    return sums, learned


def train(
    c, data: Data, held: Data, start: Model, folder: Path, encoder_weights: dict | None = None
):
    """Trains the policy from `start` on the pairs that --select picks.

    encoder_weights: of a pretrained encoder, which is then frozen. The folder gets checkpoint/, one
    line of metrics.jsonl for each step, and while the training lasts its state in state.pt.
    """
    device = start.device
    policy = shard(PoolingScorer, start.path, c, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    bandit = make_bandit(c, policy, device, encoder_weights) if c.select in LEARNED else None
    steps = all_steps(c, data.pairs)
    # what a training state holds: parts are modules with their optimizers, keeps is the rest
    parts = {"policy": (policy, optimizer)}
    keeps = {"bandit": bandit} if bandit else {}
    file = folder / "metrics.jsonl"
    run = job.TrainingRun(
        c, folder, steps, parts, device, metrics=file, note=folder.name, keeps=keeps
    )
    if run.first == 0:
        tell_rounding(c, policy, data, steps[0], device)

    for step in run:  # goes on after a kill; ends on SIGTERM, and in write() on NaN
        batch = steps[step]
        times = [time.monotonic()]

        # observe: all n pairs, without gradient
        seen = None
        if c.select not in BLIND:
            kind = c.context if bandit else None
            seen = observe(c, policy, data.pairs, batch, device, kind)
        times.append(time.monotonic())

        # reward the last round, fit to it, and select K (Bandit.round)
        places, learned = pick(c, data.take(batch), seen, bandit, step)
        selected = [batch[place] for place in places]
        times.append(time.monotonic())

        # train on these K alone
        sums = descend(c, policy, data, selected, device)
        lr = c.lr * lr_factor(step, len(steps), c.warmup)
        norm = take_step(optimizer, lr, c.clip)

        metrics = run.reduce(step, sums, [data.pairs[i].id for i in selected])
        metrics.update(learned)
        metrics.update(selection_metrics(c, data, batch, places, seen))
        metrics.update(selection_costs(times, bandit))
        if (step + 1) % c.eval_every == 0 or step + 1 == len(steps):
            metrics.update(measure(c, policy, held, device, folder))
        run.write(step, metrics, lr=lr, grad_norm=norm)
    job.save_checkpoint(folder / "checkpoint", policy, start.tok, start.path, c.save_dtype)


# Such an error of a margin moves the pair's weight sigmoid(-m) by 0.005, of 0.5 at the start.
TOO_MUCH = 0.02


def tell_rounding(c, policy: nn.Module, data: Data, batch: list[int], device):
    """Says how far the first batch's margins are from 0, as they should be before any training.

    In bf16 a log-prob depends on the shape of its batch. With one pair a pass policy and reference
    are scored in the same shapes; with more, a pair meets others than in the reference's pass. The
    selector's first rewards stretch such errors to the whole range of kappa.
    """
    if c.dtype == "float32" or c.micro_batch == 1:
        return
    logps, _ = observe(c, policy, data.pairs, batch, device)
    error = margins(logps, data.ref_logps[batch], c.beta).square().mean().sqrt().item()
    if job.on_rank_0():
        line = f"bf16: before the first step the margins are off by {error:.4f} (root mean square)"
        if c.select in LEARNED:
            line += ", all that the selector's first rewards see of them"
        if error > TOO_MUCH:
            line += ": warning: too much (--micro_batch 1 makes it 0)"
        print(line, flush=True)


def all_steps(c, pairs: list[Pair]) -> list[list[int]]:
    """The batches of the training.

    After --preselect the pairs are sorted by difficulty: with --order easy_first they are cut into
    batches as they stand, the same in each epoch.
    """
    sizes = [pair.tokens for pair in pairs] if c.sort_by_length else None
    if c.preselect == 1 or c.order == "shuffled":
        return step_order(len(pairs), c, c.seed, "order", sizes=sizes)

    one_epoch = []
    for first in range(0, len(pairs), c.batch):
        batch = list(range(first, min(first + c.batch, len(pairs))))
        one_epoch.append(sorted(batch, key=sizes.__getitem__) if sizes else batch)
    return (one_epoch * c.epochs)[: c.max_steps]


class Seen(NamedTuple):
    """What a forward pass without gradient shows of n pairs."""

    logps: Tensor  # log pi of chosen and rejected [n, 2]
    contexts: Tensor | None  # [n, L, width], if asked for


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
        tokens = pooled_tokens(mask, kind) if kind else None
        with autocast(c, device, policy):
            some_logps, pooled = policy(ids, mask, tokens)
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


def make_bandit(c, policy: nn.Module, device, encoder_weights: dict | None = None) -> Bandit:
    """A new bandit for contexts of this policy; with encoder_weights its encoder is frozen."""
    lm = getattr(policy, "module", policy).lm  # DDP holds the scorer as .module
    bandit = Bandit(context_width(c, lm.config), c, device)
    if encoder_weights:
        bandit.freeze_encoder(encoder_weights)
    return bandit


def context_width(c, config) -> int:
    """The width of the contexts of a policy with this configuration."""
    hidden_size = config.get_text_config(decoder=True).hidden_size
    return 2 * hidden_size if c.context == "both" else hidden_size


def how_many(share: float, n: int) -> int:
    """ceil(share n), K for --ratio. The share is the decimal that was asked for.

    As a float it may be above that: 0.07 * 100 is more than 7, and would be rounded up to 8.
    """
    return math.ceil(Fraction(str(share)) * n)


def pick(
    c, batch: Data, seen: Seen | None, bandit: Bandit | None, step: int
) -> tuple[list[int], dict]:
    """Picks K of the n pairs of a batch, as --select says.

    Returns their places in the batch, and what the bandit has to log. To add a way to select, add a
    word to Config.select, and
      if it needs no forward pass: the word to BLIND, and a branch above the margins;
      if it needs the margins alone: a branch below that of "margin";
      if it uses the learned selector: the word to LEARNED; it ends in bandit.round.
    """
    n = len(batch.pairs)
    k = how_many(c.ratio, n)
    seed = job.seed_of(c.seed, "select", step)
    if c.select == "all":
        return list(range(n)), {}
    if c.select == "random":
        return top_k(torch.zeros(n), k, seed), {}  # equal scores: any k
    if c.select == "oracle":
        # -100 outweighs any Gumbel noise: the unflipped first, at random among them
        return top_k(-100.0 * torch.tensor(batch.flipped), k, seed), {}

    margin = margins(seen.logps, batch.ref_logps, c.beta)
    if c.select == "margin":
        return top_k(margin, k), {}
    if c.select == "topk":
        seed = None  # greedy; `sample` draws k without replacement, by softmax(scores)
    return bandit.round(
        seen.contexts,
        losses=dpo_losses(margin),
        margin=margin,
        chosen_logps=seen.logps[:, 0],
        k=k,
        seed=seed,
    )


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


def selection_costs(times: list[float], bandit: Bandit | None) -> dict:
    """What the selection cost: seconds, and the bandit's bytes.

    times: when a step began, when its batch was observed, and when the pairs were picked.
    """
    began, observed, picked = times
    return {
        "score_seconds": observed - began,
        "selector/seconds": picked - observed,
        "selector/bytes": bandit.nbytes() if bandit else 0,
    }


def measure(c, policy: nn.Module, held: Data, device, folder: Path) -> dict[str, float]:
    """Preference accuracy and implicit rewards on held-out pairs.

    The margin of each stands in folder/held.jsonl.
    """
    everything = list(range(len(held.pairs)))
    logps, _ = observe(c, policy, held.pairs, everything, device)
    chosen, rejected = implicit_rewards(logps, held.ref_logps, c.beta)
    if job.on_rank_0():
        margin = (chosen - rejected).tolist()
        rows = [{"id": pair.id, "margin": m} for pair, m in zip(held.pairs, margin)]
        job.write_atomic(folder / "held.jsonl", job.json_lines(rows))
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
    and template too), how the weights are cast, and in bf16 the pairs of a pass: where one of these
    changes, another is made.
    """
    ids = [job.seed_of(tuple(pair[:3])) for pair in pairs]
    cast = c.dtype
    if c.dtype == "bfloat16":
        cast += f", {c.micro_batch} pairs a pass"  # a log-prob depends on its batch's shape
    if c.dtype == "bfloat16" and dist.is_initialized() and c.parallel in ("fsdp", "hsdp"):
        cast += ", by FSDP"  # which casts norms, too: nats apart from autocast
    if c.compile:
        cast += ", compiled"  # which rounds less often
    key = job.seed_of(model.path, common.weights_stamp(model.path), cast, *ids)
    return logps_in_file(c, Path(c.reference) / f"{key:016x}.jsonl", model, pairs, "reference")


def logps_in_file(c, file: Path, model: Model, pairs: list[Pair], note: str) -> Tensor:
    """log pi [n, 2] of all pairs under a frozen model, in `file`.

    It is made on first use, in the shapes of the training, and goes on after a kill. It is not a
    job.phase, since under FSDP all ranks work on every batch together.
    """
    # another run may make the file between two ranks' looks at it
    if job.on_any_rank(not file.exists()):
        make_logps(c, file, model, pairs, note)
    rows = job.read_jsonl(file, list)
    if len(rows) != len(pairs) or any(len(row) != 2 for row in rows):
        job.damaged(file, f"{len(rows)} rows, not {len(pairs)} pairs of numbers")
    return torch.tensor(rows, device=model.device)


def make_logps(c, file: Path, model: Model, pairs: list[Pair], note: str):
    """Writes the file of logps_in_file, batch by batch into a .part of this run, then in one go."""
    run_id = job.seed_of(str(Path(c.out).resolve()))  # two runs don't write to one .part
    part = file.with_name(f"{file.name}.{run_id:016x}.part")
    size = max(c.batch, c.micro_batch * job.world_size())
    batches = [(start, start + size) for start in range(0, len(pairs), size)]
    done = {tuple(entry["batch"]): entry["logps"] for entry in job.whole_lines(part)}
    job.barrier()  # nobody writes before all have read
    job.append(part, "\n")  # ends a line that a kill may have torn

    policy = shard(frozen_pooling_scorer, model.path, c, model.device)
    for batch in job.progress([batch for batch in batches if batch not in done], note):
        start, end = batch
        indices = list(range(start, min(end, len(pairs))))
        logps, _ = observe(c, policy, pairs, indices, model.device)
        if not logps.isfinite().all():
            job.die(f"{model.path}: its log-probs are not finite: a broken model, or data")
        done[batch] = logps.tolist()
        if job.on_rank_0():
            job.append(part, job.json_lines([{"batch": batch, "logps": done[batch]}]))
        job.stop_if_asked()

    if job.on_rank_0():
        rows = []
        for batch in batches:
            rows += done[batch]
        job.write_atomic(file, job.json_lines(rows))
        part.unlink()
    job.barrier()


def frozen_pooling_scorer(lm) -> PoolingScorer:
    return PoolingScorer(lm).requires_grad_(False)


def easiest(c, data: Data, held: Data, start: Model, out: Path) -> list[int]:
    """Selective DPO: the indices of the easiest share of the pairs, from easy to difficult.

    Their difficulties are kept in out/difficulty.json: a run goes on in the order that it began in.
    """
    file = out / "difficulty.json"
    if job.on_any_rank(not file.exists()):
        found = difficulties(c, data, held, start, out)
        if job.on_rank_0():
            job.write_atomic(file, json.dumps(found.tolist()))
        job.barrier()
    difficulty = torch.tensor(job.read_jsonl(file, list)[0])
    order = difficulty.argsort(stable=True).tolist()
    return order[: how_many(c.preselect, len(data.pairs))]


def difficulties(c, data: Data, held: Data, start: Model, out: Path) -> Tensor:
    """A pair's difficulty: its mean loss under the models that never saw it. [n].

    A model is trained with --loss on each half of each random split of the pairs.
    """
    n = len(data.pairs)
    # on all pairs of a half, in a shuffled order
    plain = replace(c, select="all", preselect=1.0, save_dtype="float32")
    difficulty = torch.zeros(n, device=start.device)
    for split in range(c.preselect_splits):
        order = random.Random(job.seed_of(c.seed, "halves", split)).sample(range(n), n)
        first = sorted(order[::2])
        second = sorted(order[1::2])
        for number, (own, other) in enumerate([(first, second), (second, first)]):
            folder = out / f"split{split}-half{number}"
            if not (folder / "checkpoint").exists():
                train(plain, data.take(own), held, start, folder)
            losses = validation_losses(c, folder, start, data.take(other))
            difficulty[other] += losses / c.preselect_splits
    return difficulty


def validation_losses(c, folder: Path, start: Model, unseen: Data) -> Tensor:
    """The losses of pairs under the model of folder/checkpoint, which never saw them. [n]."""
    model = start.with_weights(folder / "checkpoint")
    note = f"{folder.name}: validate"
    logps = logps_in_file(c, folder / "other.jsonl", model, unseen.pairs, note)
    return losses_of(c, margins(logps, unseen.ref_logps, c.beta))


# ------------------------------------------------------------------------- input


def prepare(c, device) -> tuple[Model, list[Pair], list[bool], list[Pair]]:
    """Reads and checks all input and shows the plan, before the first weight is read.

    Returns the model to start from, the training pairs, which of them are flipped, and the held-out
    pairs.
    """
    rows, test_rows, dropped = datafiles.load_split(c.data, c.test, "pair", c.limit, c.test_pairs)
    tok, config = common.load_tokenizer(c.model)
    common.check_model(c.model, config, c.max_prompt, c.max_response)
    if c.select in LEARNED:
        encoder_config(c.encoder)

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
    kept = how_many(c.preselect, len(pairs))
    if c.preselect < 1 and len(pairs) < 2:
        job.die(f"{c.data}: --preselect needs two pairs at least")
    if c.select in LEARNED and c.pretrain_rounds > 1000 * math.ceil(kept / c.batch):
        job.die(f"--pretrain_rounds {c.pretrain_rounds}: more than 1000 passes over {kept} pairs")
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
        "chosen_ended": common.has_ended(row, "rejected"),
        "rejected_ended": common.has_ended(row, "chosen"),
    }
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"], "meta": meta}


# ------------------------------------------------------------------------- plan and report


def show_plan(c, tok, pairs, held, flipped: list[bool], dropped: Counter, device):
    """The header: what will be done with what, and one example with its loss mask."""
    n = len(pairs)
    share = " (no selection)"
    first = ""
    if c.select != "all":
        share = f", {c.ratio:g} of each batch"
    if c.preselect < 1:
        n = how_many(c.preselect, n)
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
    lm = lm_shapes(c.model)
    print(job.memory_plan(lm, c, chunk=common.CHUNK, reference=False))
    if c.select in LEARNED:
        print(selector_plan(c, lm, rounds=len(step_order(n, c))))

    prompt, chosen, rejected, _ = pairs[0]
    print(f"example, no loss: {tok.decode(prompt)!r}")
    print(f"  chosen, with loss: {tok.decode(chosen)!r}")
    print(
        f"rejected, with loss: {tok.decode(rejected)!r} "
        f"({len(prompt)} + {len(chosen)}, {len(rejected)} tokens)"
        f", end of a turn: {common.end_note(tok)}",
        flush=True,
    )


def selector_plan(c, lm, rounds: int) -> str:
    """What the selector and its pool may take on each rank, by arithmetic."""
    width = context_width(c, lm.config)
    with torch.device("meta"):
        selector = Selector(width, c)
    weights = sum(p.numel() for p in selector.parameters())
    rewarded = how_many(c.ratio, c.batch) if c.fit == "selected" else c.batch

    # while the encoder learns, the pool holds contexts; once it is frozen, what it returns
    of_context = len(common.blocks(lm)) * width
    numbers = of_context * min(c.pretrain_rounds or rounds, c.pool)
    if c.pretrain_rounds:
        of_output = selector.encoder.layer_encoder.config.hidden_size
        numbers = max(numbers, of_output * min(rounds, c.pool))
    pool = 4 * rewarded * numbers
    return (
        f"selector: {weights / 1e6:.1f} M weights, {selector_nbytes(selector) / 2**30:.2f} GiB on "
        f"each rank; pool: up to {pool / 2**30:.2f} GiB of CPU memory on each"
    )


def report(c, out: Path, started: float):
    """results.json from the metrics' lines, a table, and where the model is."""
    if not job.on_rank_0():
        return
    steps = job.read_jsonl(out / "metrics.jsonl")
    result = {**evaluation(steps[-1]), **totals(c, steps), "seed": c.seed}
    job.write_results(out, result, started)

    rows = []
    trained_on = 0
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


def remove_states(out: Path):
    """Removes state.pt of all trainings, which are done: the run, the pretraining, the halves."""
    if job.on_rank_0():
        for state in out.glob("**/state.pt"):
            state.unlink()


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
