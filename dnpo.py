"""DNPO, Dynamic Noise Preference Optimization (Yang et al. 2025, arXiv 2502.05400), and its baseline SPIN (arXiv 2401.01335).

A language model improves on its own answers. In iteration k the policy pi_theta starts from pi_k, which is also the reference:

  sample   y' ~ pi_k(.|x) for every prompt x that has an annotated answer y*
  DSL      (y+, y-) = (y*, y') if s* >= s' else (y', y*)             s*, s': a judge's scores of the two
  NPO      z^_j = z_j + sigma_j * eps_j,  sigma_j = W h_j + b,  eps_j ~ N(0, I)   on the reference's logits z_j, negative answer only
           log p_noise(y-|x) = sum_j log softmax(z^_j)[y-_j]
           m = beta [ log pi_theta(y+)/pi_k(y+) - log pi_theta(y-)/p_noise(y-) ],   l(m) = -log sigmoid(m)
           min over theta, max over (W, b) of E l(m), with sigma^2 small                                    (Obj. 10)

and the result is pi_{k+1}. SPIN is the same without judge (y+ = y*) and without noise. Why noise: once the policy is sure of
y+ over y-, sigmoid(-m), the factor on its gradient, is near 0 and training stalls. logsumexp is convex, so noise on logits lowers
E log softmax(z + sigma eps)[y]: log p_noise(y-) falls, m falls, the gradient returns. Inference never sees the noise.

Differs from the paper, or is not specified by it (ours unless said):
 1. The constraint sigma^2 < epsilon is a penalty alpha mean(sigma^2) over the negatives' tokens and the vocabulary.
 2. Joint update: L = l(m, sigma detached) - l(m, theta detached) + alpha mean(sigma^2): the reading of the paper's primed term under which
    the two losses do not cancel. `--noise_update alternating` is the paper's Fig. 3: a noise step, then a model step with new noise.
 3. W = 0 and b = `noise_init` at the start of every iteration; alpha, the initial value and the noise's learning rate are not published.
 4. Iteration k starts from pi_k (the authors' code restarts from the base model), with a fresh optimizer and learning-rate curve.
 5. The judge's rubric (common.py) is ours; the paper's judge is GPT-4o-mini (`--judge api:gpt-4o-mini`), the default here an open reward model.
 6. Ties keep the annotation on top, as in DSL above; `--ties drop` leaves them out. Identical answers are always left out.
 7. The noise of an answer comes from a seed of its own, so that micro-batches, chunks and ranks change nothing.

    python dnpo.py                                     # laptop: the toy world, minutes
    python dnpo.py --preset paper --limit 2000         # one GPU, a tenth of the paper's data
    torchrun --nproc_per_node 8 dnpo.py                # the paper's run
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
from common import (CHUNK, STOP, Scorer, barrier, collate, die, encode_pairs, fill, generate, held_out, hold_out, lm_shapes, load_lm, load_rows, load_state,
                    load_tokenizer, make_judge, memory_gib, memory_plan, metric_line, node_mesh, open_run, parse, phase, progress, prompt_ids, ranks, read_jsonl,
                    response_ids, save_checkpoint, save_state, seed_of, stop_on_sigterm, stopped, sum_ranks, table, token_logps, torchrun_store, truncate_metrics,
                    write_atomic)


# ---------------------------------------------------------------- the equations


def dynamic_labels(annotated: float, generated: float) -> str:
    """DSL: scores s* of the annotated and s' of the generated answer -> the positive one: "annotated" if s* >= s' else "generated"."""
    return "annotated" if annotated >= generated else "generated"


def noisy_token_logps(logits: Tensor, std: Tensor, eps: Tensor, targets: Tensor) -> Tensor:
    """log softmax(z + sigma * eps)[y], the reparameterised noise on the reference's logits.
    logits z, std sigma, eps: [N, V], targets y: [N] -> [N]."""
    return token_logps(logits.float() + std.float() * eps, targets)


def preference_margin(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """m = beta [ log pi_theta(y+)/pi_ref(y+) - log pi_theta(y-)/pi_ref(y-) ]; in NPO the second pi_ref is p_noise.
    logps, ref_logps: [2B], positives first -> [B]."""
    positive, negative = (beta * (logps - ref_logps)).chunk(2)  # the implicit rewards [B]
    return positive - negative


def preference_losses(margin: Tensor) -> Tensor:
    """l(m) = -log sigmoid(m). [B] -> [B]."""
    return F.softplus(-margin)


def model_losses(logps: Tensor, noisy_ref_logps: Tensor, beta: float) -> Tensor:
    """theta's part of Obj. 10, noise held: l(m). [2B], [2B] -> [B]."""
    return preference_losses(preference_margin(logps, noisy_ref_logps.detach(), beta))


def noise_losses(logps: Tensor, noisy_ref_logps: Tensor, beta: float) -> Tensor:
    """The noise's part of Obj. 10, theta held: -l(m), to which its penalty alpha mean(sigma^2) is added. [2B], [2B] -> [B]."""
    return -preference_losses(preference_margin(logps.detach(), noisy_ref_logps, beta))


# ---------------------------------------------------------------- the noise


class NoiseHead(nn.Linear):
    """sigma = W h + b, one standard deviation per response position and vocabulary entry: h [N, D] -> [N, V]. At the start W = 0, b = init."""

    def __init__(self, width: int, vocabulary: int, init: float):
        super().__init__(width, vocabulary)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, init)


def draw(seeds: list[int], vocabulary: int, device) -> Tensor:
    """eps ~ N(0, I) [N, V], each token's from its own seed: batch-mates, chunks and ranks change nothing."""
    generator = torch.Generator(device)
    return torch.stack([torch.randn(vocabulary, generator=generator.manual_seed(s), device=device) for s in seeds])


class NoisyReference(Scorer):
    """The frozen reference, with a trainable NoiseHead on the logits of negative answers (init None: no noise, SPIN's reference)."""

    def __init__(self, lm, init: float | None):
        super().__init__(lm.requires_grad_(False).eval())
        with lm.device:  # "meta" before sharding
            self.noise = None if init is None else NoiseHead(lm.config.hidden_size, lm.get_output_embeddings().out_features, init)

    def forward(self, ids: Tensor, mask: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask: [2B, T], positives first; one seed per negative -> log-probs [2B] (noisy for the negatives),
        and, per negative, the sums over its tokens of mean_v(sigma) and mean_v(sigma^2): [B], [B]."""
        B = len(ids) // 2
        with torch.no_grad():
            h, y, row = self.hidden(ids, mask)
            plain = row < B if self.noise else torch.ones_like(row, dtype=torch.bool)
            logps = h.new_zeros(2 * B, dtype=torch.float32).index_add(0, row[plain], self.head(h[plain], y[plain]))
        mean, square = h.new_zeros(B, dtype=torch.float32), h.new_zeros(B, dtype=torch.float32)
        if not self.noise:
            return logps, mean, square

        def noisy(h: Tensor, y: Tensor, token_seeds: list[int]):  # [n, D], [n] -> [n], [n], [n]
            std = self.noise(h)
            return noisy_token_logps(self.lm.lm_head(h), std, draw(token_seeds, std.shape[1], h.device), y), std.float().mean(1), std.float().square().mean(1)
        h, y, row = h[~plain], y[~plain], row[~plain]
        token_seeds = [seed + j for seed, n in zip(seeds, mask[B:, 1:].sum(1).tolist()) for j in range(n)]
        for i in range(0, len(h), CHUNK):  # never more than CHUNK x V of noisy logits alive; the backward pass draws the same noise again
            at = slice(i, i + CHUNK)
            parts = checkpoint(noisy, h[at], y[at], token_seeds[at], use_reentrant=False, preserve_rng_state=False)
            logps, mean, square = (total.index_add(0, index, part) for total, index, part in zip((logps, mean, square), (row[at], row[at] - B, row[at] - B), parts))
        return logps, mean, square


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    # the method
    iterations: int = 3  # DNPO iterations after the warm start
    warmup_iterations: int = 1  # SPIN iterations before them (the paper's iteration 0)
    labels: Literal["judge", "annotation"] = "judge"  # who says which answer is the positive: a judge (DSL), or always the annotation (SPIN)
    ties: Literal["keep", "drop"] = "keep"  # equal scores: keep the annotation as the positive, or drop the pair
    noise: bool = True  # trainable noise on the reference (NPO)
    noise_update: Literal["joint", "alternating"] = "joint"  # one pass for model and noise, or a noise step before every model step
    noise_init: float = 0.1  # standard deviation of the noise at the start of an iteration
    noise_penalty: float = 0.1  # alpha, weight of mean(sigma^2)
    noise_lr: float = 1e-4  # learning rate of W and b
    beta: float = 0.1  # the papers' lambda
    mix_previous: bool = True  # train on the previous iteration's pairs too, as SPIN does
    # data
    model: str = "alignment-handbook/zephyr-7b-sft-full"  # model folder or Hub id to start from
    data: str = "HuggingFaceH4/ultrachat_200k:train_sft"  # annotated prompts: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    test: str | None = None  # held-out annotated prompts (without it: a tenth of --data, by a hash of the prompt)
    judge: str = "rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B"  # toy, hf:PATH, rm:PATH, api:MODEL, or none (SPIN needs none)
    limit: int | None = 20000  # use the first LIMIT training prompts (and at most as many held-out ones)
    test_prompts: int = 500  # held-out prompts to measure on
    temperature: float = 1.0  # of the sampling
    max_prompt: int = 512  # tokens; a longer prompt is left out and counted
    max_response: int = 512  # tokens; a longer answer is cut, and gets no end-of-sequence token
    # optimisation
    lr: float = 5e-7  # peak learning rate
    warmup: float = 0.1  # share of an iteration's steps in which the learning rate rises; then it falls as a cosine
    epochs: int = 2  # passes over an iteration's pairs
    batch: int = 64  # pairs per optimizer step, over all ranks
    micro_batch: int = 4  # pairs per forward pass and rank; changes memory, not results
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop every iteration after this many optimizer steps
    seed: int = 0  # of sampling, order and noise
    # system
    preset: Literal["toy", "paper"] = "paper"  # all other defaults; unset: paper under CUDA, else toy
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"  # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    offload_reference: bool = False  # under fsdp or hsdp: the reference's layers wait in CPU memory; slower
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; weights and optimizer stay in float32
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    sample_batch: int = 64  # answers sampled or scored at a time
    save_every: int = 50  # optimizer steps between training states
    out: str = "runs/dnpo"  # folder of the run
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # delete the run in --out and begin again
    dry_run: bool = False  # check everything, show the plan and one example, and stop before any model is loaded

    def __post_init__(self):
        for name in ("beta", "lr", "noise_lr", "batch", "micro_batch", "sample_batch", "save_every", "max_prompt", "max_response", "test_prompts", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("iterations", "warmup_iterations", "noise_init", "noise_penalty", "temperature", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("limit", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        if self.offload_reference and ("RANK" not in os.environ or self.parallel not in ("fsdp", "hsdp")):
            raise ValueError("--offload_reference needs torchrun (one rank will do) and --parallel fsdp or hsdp")
        if self.judge == "none" and self.labels == "judge":
            raise ValueError("--labels judge needs a judge; with --judge none use --labels annotation")


TOY = dict(model="runs/toy/sft", data="runs/toy/train.jsonl", test="runs/toy/test.jsonl", judge="toy", limit=2000, max_response=64, beta=1.0, lr=2e-5,
           mix_previous=False, micro_batch=16, sample_batch=250, sort_by_length=False, parallel="ddp", dtype="float32", activation_checkpointing=False)


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


# ---------------------------------------------------------------- one iteration's training


def descend(c, update: str, policy: nn.Module, reference: nn.Module, pairs: list[tuple], indices: list[int], name: tuple, device) -> dict[str, Tensor]:
    """Adds the gradient of one update ("joint", "noise" or "model") for the pairs `indices` of all ranks; `name` of the step seeds its noise.
    -> this rank's part of their mean metrics."""
    B, N, sums = len(indices), sum(len(pairs[i][2]) for i in indices), {}  # of the whole step: every rank knows all rows
    micros = micro_batches(indices, c)
    for j, (some, weights) in enumerate(micros):
        ids, mask = collate([pairs[i][:2] for i in some] + [(pairs[i][0], pairs[i][2]) for i in some], device)
        weight, seeds = torch.tensor(weights, device=device), [seed_of(c.seed, "noise", *name, update, i) for i in some]
        with no_sync(policy, reference, last=j + 1 == len(micros)):
            with autocast(c, device, policy), torch.set_grad_enabled(update != "noise"):
                logps = policy(ids, mask)  # [2B]
            with autocast(c, device, policy), torch.set_grad_enabled(update != "model"):
                ref_logps, sigma, sigma_squared = reference(ids, mask, seeds)  # [2B], [B], [B]
            model, against = model_losses(logps, ref_logps, c.beta), noise_losses(logps, ref_logps, c.beta)
            penalty = c.noise_penalty * (weight * sigma_squared).sum() / N
            losses = {"model": model, "noise": against, "joint": model + against}[update]
            loss = (weight * losses).sum() / B + (penalty if update != "model" else 0)
            (loss * ranks()[1]).backward()  # DDP and FSDP average over ranks
        positive, negative = (c.beta * (logps - ref_logps)).detach().chunk(2)
        for key, value in {"loss": model, "rewards/chosen": positive, "rewards/rejected": negative, "rewards/margins": positive - negative,
                           "rewards/accuracies": (positive > negative).float(), "logps/chosen": logps[:len(weight)], "logps/rejected": logps[len(weight):],
                           "noise/std": sigma * B / N, "noise/square": sigma_squared * B / N, "noise/loss": against + c.noise_penalty * sigma_squared * B / N}.items():
            sums[key] = sums.get(key, 0.0) + (weight * value.detach()).sum() / B
    return sums


def train(c, iteration: int, pairs: list[tuple], start: str, folder: Path, tok, device, noise: bool):
    """pi_{k+1} from pi_k on one iteration's pairs, into folder/checkpoint; training states in folder/state.pt, lines in metrics.jsonl."""
    policy = shard(Scorer, start, c, device)
    reference = shard(lambda lm: NoisyReference(lm, c.noise_init if noise else None), start, c, device, c.offload_reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    parts = {"policy": (policy, optimizer)}
    if noise:
        parts["noise"] = reference, torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=c.noise_lr, weight_decay=0.0)
    updates = ["model"] if not noise else {"joint": ["joint"], "alternating": ["noise", "model"]}[c.noise_update]

    sizes = [sum(map(len, pair[:3])) for pair in pairs] if c.sort_by_length else None
    steps, state, metrics = step_order(len(pairs), c, c.seed, "order", iteration, sizes=sizes), folder / "state.pt", folder.parent / "metrics.jsonl"
    first = load_state(state, parts)["step"] if state.exists() else 0
    if c.offload_reference:
        reference.lm.model.layers.cpu()  # after load_state, which wants all of a module on one device
    if ranks()[0] == 0:
        truncate_metrics(metrics, lambda m: (m["iteration"], m["step"]) <= (iteration, first))
    barrier()
    bar, started = progress(range(first, len(steps)), f"iter {iteration}"), time.time()
    for step in bar:
        factor, norms = lr_factor(step, len(steps), c.warmup), {}
        for update in updates:
            sums = descend(c, update, policy, reference, pairs, steps[step], (iteration, step), device)
            for name in {"model": ["policy"], "noise": ["noise"], "joint": ["policy", "noise"]}[update]:
                norms[name] = take_step(parts[name][1], factor * {"policy": c.lr, "noise": c.noise_lr}[name], c.clip)
        m = sum_ranks(sums | {"stop": torch.tensor(float(STOP.is_set()), device=device)})
        stop = m.pop("stop")
        m["noise/spread"] = max(0.0, m.pop("noise/square") - m["noise/std"] ** 2) ** 0.5
        m = m if noise else {name: value for name, value in m.items() if not name.startswith("noise")}
        m = {"iteration": iteration, "step": step + 1} | m | {"grad_norm": norms["policy"], "lr": factor * c.lr, "memory_gib": memory_gib(device),
             "pairs_per_second": sum(map(len, steps[first:step + 1])) / (time.time() - started)}
        if not math.isfinite(m["loss"]):
            sys.exit(f"error: the loss is {m['loss']} at iteration {iteration}, step {step + 1}, rows {[pairs[i][3] for i in steps[step]]}: lower --lr, or look at these rows")
        if step == 0 and abs(m["rewards/chosen"]) > 1e-3:
            print(f"warning: before the first step the policy differs from its reference by a reward of {m['rewards/chosen']:+.4f}; it should be 0", file=sys.stderr)
        if ranks()[0] == 0:
            with open(metrics, "a") as file:
                file.write(json.dumps(m) + "\n")
            line = metric_line(m, len(steps), (time.time() - started) / (step - first + 1) * (len(steps) - step - 1))
            bar.set_description_str(line)
            if bar.disable and (step + 1) % max(1, len(steps) // 4) == 0:
                print(line, flush=True)
        if ((step + 1) % c.save_every == 0 or stop) and step + 1 < len(steps):
            save_state(state, parts, step=step + 1)
        if stop:
            stopped()
    save_checkpoint(folder / "checkpoint", policy, tok, start)


# ---------------------------------------------------------------- phases: sample -> label -> train -> measure


def label(c, iteration: int, rows: list[dict], drawn: list[dict], folder: Path, judge, dsl: bool) -> list[dict]:
    """Annotated rows and the model's answers to them -> preference rows in folder/pairs.jsonl: by DSL, or the annotation on top (SPIN).
    meta.why says why a pair is not trained on: "unreadable" judgement, or "tie" with --ties drop."""
    def work(items, number):
        own, new = (judge.score([(rows[i]["prompt"], side[i]["response"]) for i in items]) if dsl else [None] * len(items) for side in (rows, drawn))
        out = []
        for i, s, t in zip(items, own, new):
            why = "unreadable" if dsl and None in (s, t) else "tie" if dsl and c.ties == "drop" and s == t else None
            generated = dsl and not why and dynamic_labels(s, t) == "generated"
            texts, ended = [rows[i]["response"], drawn[i]["response"]], [True, drawn[i]["meta"]["finish"] == "stop"]
            out.append({"id": rows[i]["id"], "prompt": rows[i]["prompt"], "chosen": texts[generated], "rejected": texts[not generated], "meta": {
                "iteration": iteration, "swapped": generated, "why": why, "score_annotated": s, "score_generated": t,
                "chosen_ended": ended[generated], "rejected_ended": ended[not generated]}})
        return out
    return phase(folder / "pairs.jsonl", list(range(len(rows))), work, c.sample_batch, [iteration, c.ties, dsl, c.judge, [row["response"] for row in drawn]],
                 note=f"iter {iteration}: label")


def measure_logps(c, iteration: int, model: str, pairs: list[dict], folder: Path, tok, sampling: dict) -> dict:
    """Fig. 2 of pi_k: log pi of the positives and negatives it was trained on and of its own new answers to the same prompts, into folder/logps.jsonl;
    -> their means."""
    pairs = [row for row in pairs if not row["meta"]["why"]][:c.test_prompts]
    new = generate(folder / "new.jsonl", pairs, model, tok, seed=seed_of(c.seed, "new", iteration), note=f"iter {iteration}: sample again", **sampling)
    lm, dtype, device = None, sampling["dtype"], sampling["device"]

    def work(items, number):
        nonlocal lm
        lm = lm or Scorer(load_lm(model, dtype, device))
        texts = [(k, text, ended) for k in items for text, ended in ((pairs[k]["chosen"], pairs[k]["meta"]["chosen_ended"]),
                 (pairs[k]["rejected"], pairs[k]["meta"]["rejected_ended"]), (new[k]["response"], new[k]["meta"]["finish"] == "stop"))]
        ids = [(prompt_ids(tok, pairs[k]["prompt"]), response_ids(tok, text, ended, c.max_response)) for k, text, ended in texts]
        with torch.no_grad():
            found = [logp for i in range(0, len(ids), 2 * c.micro_batch) for logp in lm(*collate(ids[i:i + 2 * c.micro_batch], device)).tolist()]
        return [dict(zip(("id", "positive", "negative", "new"), (pairs[k]["id"], *found[3 * i:3 * i + 3]))) for i, k in enumerate(items)]
    rows = phase(folder / "logps.jsonl", list(range(len(pairs))), work, c.sample_batch, model, note=f"iter {iteration}: log-probs")
    return {f"logp_{name}": sum(row[name] for row in rows) / len(rows) for name in ("positive", "negative", "new")}


def show_plan(c, tok, train_rows, test_rows, dropped, device):
    """The header: what will be done with what, and one example with its loss mask."""
    why = f"default {'under' if torch.cuda.is_available() else 'without'} CUDA" if not any(a.startswith("--preset") for a in sys.argv) else "asked for"
    print(f"DNPO · preset {c.preset} ({why}) · {c.warmup_iterations} warm-up (SPIN) + {c.iterations} iterations · labels {c.labels} · "
          f"noise {c.noise_update if c.noise else 'off'} · judge {c.judge}{' (an open reward model; the paper asks GPT-4o-mini)' if c.judge == Config.judge else ''}")
    print(f"data {c.data}: {len(train_rows)} training, {len(test_rows)} held-out prompts" + "".join(f", {n} left out: {w}" for w, n in dropped.items() if n))
    world, micro = ranks()[1], min(c.micro_batch, c.batch // ranks()[1])
    print(f"batch {c.batch} = {world} ranks x {micro} pairs x {c.batch // world // micro} micro-batches · at most "
          f"{len(step_order(len(train_rows), c)) * (1 + c.mix_previous)} steps an iteration · {device} · {c.parallel if dist.is_initialized() else 'one process'} · "
          f"weights float32, compute {c.dtype}" + (" · activation checkpointing" if c.activation_checkpointing else ""))
    print(memory_plan(lm_shapes(c.model), c, reference=True, noise=c.noise))
    row = train_rows[0]
    p, y = prompt_ids(tok, row["prompt"]), response_ids(tok, row["response"], True, c.max_response)
    print(f"example {row['id']}, no loss: {tok.decode(p)!r}\n{' ' * len(row['id'])}    with loss: {tok.decode(y)!r} ({len(p)} + {len(y)} tokens)", flush=True)


def main():
    c = parse(Config, {"toy": TOY, "paper": {}})
    device = setup(c)
    # every check of the input comes before the first weight is read
    rows, dropped = load_rows(c.data, "response", c.limit if c.test else None)  # without --test the held-out rows come out of all of them
    train_rows, test_rows = (rows, load_rows(c.test, "response", c.test_prompts)[0]) if c.test else hold_out(rows)
    train_rows, test_rows = train_rows[:c.limit], test_rows[:min(c.test_prompts, c.limit or c.test_prompts)]
    tok, config = load_tokenizer(c.model)
    if c.max_prompt + c.max_response > config.max_position_embeddings:
        die(f"--max_prompt {c.max_prompt} + --max_response {c.max_response} is more than {c.model}'s context of {config.max_position_embeddings} tokens")
    fits = lambda row: len(prompt_ids(tok, row["prompt"])) <= c.max_prompt
    kept = [row for row in train_rows if fits(row)], [row for row in test_rows if fits(row)]
    dropped["prompts longer than --max_prompt"] = len(train_rows) + len(test_rows) - sum(map(len, kept))
    train_rows, test_rows = kept
    if not train_rows or not test_rows:
        die(f"{c.data}: {len(train_rows)} training and {len(test_rows)} held-out prompts of at most {c.max_prompt} tokens: too few (--test names held-out data)")
    judge = make_judge(c.judge, Path(c.out) / "judge", device, getattr(torch, c.dtype))
    if ranks()[0] == 0:
        show_plan(c, tok, train_rows, test_rows, dropped, device)
    if c.dry_run:
        return
    out, started = open_run(c, [c.data, c.test], may_change=("out", "resume", "overwrite", "iterations", "parallel", "offload_reference", "micro_batch", "save_every")), time.time()

    sampling = dict(temperature=c.temperature, max_new_tokens=c.max_response, batch=c.sample_batch, dtype=getattr(torch, c.dtype), device=device)
    model, previous, results = c.model, [], []
    for iteration in range(c.warmup_iterations + c.iterations + 1):
        folder, note = out / f"iter{iteration}", f"iter {iteration}: "
        result = {"iteration": iteration, "update": "start"}  # iteration 0 only measures the model we start from
        if iteration:
            dsl, noise = (iteration > c.warmup_iterations and on for on in (c.labels == "judge", c.noise))
            drawn = generate(folder / "responses.jsonl", train_rows, model, tok, seed=seed_of(c.seed, "responses", iteration), note=f"{note}sample", **sampling)
            pairs = label(c, iteration, train_rows, drawn, folder, judge, dsl)
            usable = [row for row in pairs + (previous if c.mix_previous else []) if not row["meta"]["why"]]
            encoded, left_out = encode_pairs(tok, usable, c.max_prompt, c.max_response)
            left_out.update(row["meta"]["why"] for row in pairs if row["meta"]["why"])
            if not encoded:
                die(f"iteration {iteration}: no pair left to train on: " + ", ".join(f"{n} {why}" for why, n in left_out.items()))
            if judge:
                judge.free()
            if not (folder / "checkpoint").exists():
                train(c, iteration, encoded, model, folder, tok, device, noise)
            if ranks()[0] == 0:
                (folder / "state.pt").unlink(missing_ok=True)
            model, previous = str(folder / "checkpoint"), pairs
            steps = [m for m in read_jsonl(out / "metrics.jsonl") if m["iteration"] == iteration]
            result |= {"update": "dnpo" if dsl or noise else "spin", "swapped": sum(row["meta"]["swapped"] for row in pairs) / len(pairs), "pairs": len(encoded),
                       "left_out": dict(left_out), "noise_std": steps[-1]["noise/std"] if noise else None,
                       "grad_norm": sum(m["grad_norm"] for m in steps) / len(steps), "steps": len(steps)}
            result |= measure_logps(c, iteration, model, pairs, folder, tok, sampling)
        result |= held_out(folder, test_rows, model, tok, judge, note=note, seed=seed_of(c.seed, "answers", iteration), **sampling)
        results.append(result)
        if judge:
            judge.free()
        if ranks()[0] == 0:
            write_atomic(out / "results.json", json.dumps({"iterations": results, "seed": c.seed, "seconds": round(time.time() - started, 1)}, indent=1))
    if ranks()[0] == 0:
        report(out, results, model, started)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(out: Path, results: list[dict], model: str, started: float):
    """samples.md, the table of results, and where the model is."""
    answers = [read_jsonl(out / f"iter{r['iteration']}" / "test.jsonl")[:3] for r in results]
    text = "# Three held-out prompts, the annotated answer, and the model's after each iteration\n"
    for k, first in enumerate(answers[0]):
        text += f"\n## {first['prompt'][-1]['content']}\n\nannotated: {first['annotated']}\n" + "".join(f"\niteration {i}: {rows[k]['response']}\n" for i, rows in enumerate(answers))
    write_atomic(out / "samples.md", text)
    print(table(results, ["iteration", "update", "score", "full_marks", "win", "tie", "loss", "swapped", "noise_std", "logp_positive", "logp_negative", "logp_new", "grad_norm"]))
    for k, first in enumerate(answers[0]):
        print(f"{first['prompt'][-1]['content'][:60]!r}: {first['response'][:60]!r} -> {answers[-1][k]['response'][:60]!r}")
    print(f"{time.time() - started:.0f} s · {out}/results.json, samples.md, metrics.jsonl · the model:\n"
          f"  lm = AutoModelForCausalLM.from_pretrained({model!r})\n  tok = AutoTokenizer.from_pretrained({model!r})")


if __name__ == "__main__":
    record(main)()  # under torchrun: the traceback and rank of whoever fails first
