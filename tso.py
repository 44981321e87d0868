"""TSO, Self-Training with Scaled Preference Optimization (arXiv 2409.02118).

A language model is trained on preferences between answers of its own and of its relatives; no reward model is trained. For every slice of the prompts:

  diversity    a matrix of versions x scales samples the candidates: the current (latest, largest) model's answers are positives, those of older
               versions and of smaller models negatives; human answers join, preferred ones as positives, rejected ones as negatives
  validity     feedback corrects every pair (y_w, y_l): a judge asked in both orders, or a person: keep, swap, or drop
  adaptivity   DPO on the slice's pairs, with the current policy as reference; then the reference is the new policy, which samples the next
               slice's candidates. All slices N times ("mini-batch iterative DPO": a mini-batch of prompts, here called slice)

  r_w = beta log pi(y_w)/pi_ref(y_w),   r_l = beta log pi(y_l)/pi_ref(y_l)
  L_dual-clip = -log sigmoid( min(r_w, c_w) - max(r_l, -c_l) )

Why the clip: DPO pushes the negative down, which is cheaper than raising the positive, and drags the positive down with it (Fig. 3). With the clip (Fig. 4)
a side that has moved far enough earns no more: once r_l < -c_l the loss can only raise r_w. Both clipped: the pair is finished. c = inf is DPO.

Differs from the paper, or is not specified by it (ours unless said):
 1. The paper's formula of L_dual-clip is not public. This one has the two properties that its Figs. 3 and 4 show, and is six lines to replace.
 2. The paper's models are not public either: the paper preset takes one public family in two sizes.
 3. Pairs of a prompt are spread evenly over the cells of the matrix (positive cell x negative cell), identical texts left out. `--negatives current` pairs
    the policy with itself, which only makes sense with correction.
 4. From the second round on, the policies at the end of earlier rounds are older versions too.
 5. The judge's prompts stand in common.py. A verdict that changes with the order is a tie; ties and unreadable verdicts drop the pair. A person's verdict
    (`--verdicts`) outranks the judge's.
 6. Every slice has a fresh optimizer and learning-rate curve.
 7. Diversity is measured by distinct-2 and by the mean Jaccard similarity of token bigrams between the candidates of a prompt.

    python tso.py                                      # laptop: the toy world, minutes
    python tso.py --preset paper --limit 2000          # one GPU, a part of the paper's data
    torchrun --nproc_per_node 8 tso.py                 # a run of the paper's size
"""
from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
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
from common import (STOP, Scorer, barrier, collate, die, encode_pairs, fill, generate, held_out, hold_out, lm_shapes, load_lm, load_rows, load_state, load_tokenizer,
                    make_judge, memory_gib, memory_plan, metric_line, node_mesh, open_run, parse, phase, progress, prompt_ids, ranks, read_file, read_hub,
                    read_jsonl, response_ids, save_checkpoint, save_state, seed_of, stop_on_sigterm, stopped, sum_ranks, table, torchrun_store, truncate_metrics,
                    write_atomic)


# ---------------------------------------------------------------- the equations


def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """r = beta log pi(y)/pi_ref(y). logps, ref_logps: [2B], chosen first -> r_w [B], r_l [B]."""
    chosen, rejected = (beta * (logps - ref_logps)).chunk(2)
    return chosen, rejected


def dual_clip_losses(chosen_reward: Tensor, rejected_reward: Tensor, clip_chosen: float, clip_rejected: float) -> Tensor:
    """L_dual-clip = -log sigmoid( min(r_w, c_w) - max(r_l, -c_l) ); c = inf: DPO, Eq. 7. [B], [B] -> [B]."""
    chosen = chosen_reward.clamp(max=clip_chosen)
    rejected = rejected_reward.clamp(min=-clip_rejected)
    return F.softplus(-(chosen - rejected))


def clipped(chosen_reward: Tensor, rejected_reward: Tensor, clip_chosen: float, clip_rejected: float) -> tuple[Tensor, Tensor]:
    """Which sides have moved far enough to have no gradient: r_w > c_w, r_l < -c_l. [B], [B] -> [B], [B] of 0 and 1."""
    return (chosen_reward > clip_chosen).float(), (rejected_reward < -clip_rejected).float()


def correction(verdict: str | None) -> str:
    """What a judge's verdict on (A: the positive, B: the negative) does to their pair: "keep", "swap" or "drop"."""
    return {"A": "keep", "B": "swap"}.get(verdict, "drop")


def distinct2(answers: list[list[int]]) -> float:
    """Different bigrams / bigrams, over all answers to one prompt as token ids. 0 without bigrams."""
    grams = [gram for ids in answers for gram in zip(ids, ids[1:])]
    return len(set(grams)) / len(grams) if grams else 0.0


def similarity(answers: list[list[int]]) -> float | None:
    """Mean over pairs of answers to one prompt of |A & B| / |A | B|, A and B their sets of bigrams (of a single token: the token itself)."""
    sets = [set(zip(ids, ids[1:])) or set(ids[:1]) for ids in answers]
    pairs = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in itertools.combinations(sets, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def skewness_kurtosis(scores: list[float]) -> tuple[float, float] | None:
    """Fig. 5, of the scores of one prompt's answers: E[((s - mean)/std)^3] and E[((s - mean)/std)^4] - 3; None if all are equal."""
    mean = sum(scores) / len(scores)
    moment = lambda k: sum((s - mean) ** k for s in scores) / len(scores)
    return (moment(3) / moment(2) ** 1.5, moment(4) / moment(2) ** 2 - 3) if len(set(scores)) > 1 else None


# ---------------------------------------------------------------- configuration


CELLS = {"positives": ("current", "human"), "negatives": ("current", "older", "smaller", "human")}


@dataclass(frozen=True)
class Config:
    # the method
    older: list[str] = field(default_factory=list)  # older versions of the model: folders or Hub ids
    smaller: list[str] = field(default_factory=lambda: ["meta-llama/Llama-3.2-1B-Instruct"])  # smaller models; their tokenizers may differ
    positives: list[str] = field(default_factory=lambda: ["current", "human"])  # cells of the positives: current, human
    negatives: list[str] = field(default_factory=lambda: ["older", "smaller", "human"])  # cells of the negatives: current, older, smaller, human
    n_positive: int = 1  # answers of the current policy per prompt
    n_negative: int = 1  # answers of every other cell's models per prompt
    pairs_per_prompt: int = 2  # pairs made of them, evenly over the cells
    correct: bool = True  # let the judge keep, swap or drop each pair
    verdicts: str | None = None  # a person's verdicts, as written by --export_pairs: JSON lines {"id", "verdict": keep, swap or drop}
    export_pairs: str | None = None  # write the next slice's pairs for a person to judge, and stop there
    slices: int = 4  # M, parts that the prompts are cut into
    rounds: int = 1  # N, passes over all slices
    clip_chosen: float = 0.2  # c_w: no more credit for raising the chosen reward beyond it; inf: DPO
    clip_rejected: float = 0.2  # c_l: no more credit for lowering the rejected reward below minus it; inf: DPO
    beta: float = 0.1  # strength of the pull to the reference
    # data
    model: str = "meta-llama/Llama-3.1-8B-Instruct"  # model folder or Hub id to start from
    data: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # prompts with human answers or pairs: .jsonl, .json or .parquet file, or Hub id[:SPLIT]
    test: str | None = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # held-out annotated prompts (without it: a tenth of --data, by a hash of the prompt)
    judge: str = "rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B"  # toy, hf:PATH, rm:PATH, api:MODEL, or none
    limit: int | None = None  # use the first LIMIT training prompts (and at most as many held-out ones)
    test_prompts: int = 500  # held-out prompts to measure on
    n_scores: int = 0  # answers to each held-out prompt whose scores' skewness and kurtosis are measured, before and after (the paper: 64; 0: none)
    temperature: float = 1.0  # of the sampling
    max_prompt: int = 512  # tokens; a longer prompt is left out and counted
    max_response: int = 512  # tokens; a longer answer is cut, and gets no end-of-sequence token
    # optimisation
    lr: float = 5e-7  # peak learning rate
    warmup: float = 0.1  # share of a slice's steps in which the learning rate rises; then it falls as a cosine
    epochs: int = 1  # passes over a slice's pairs
    batch: int = 64  # pairs per optimizer step, over all ranks
    micro_batch: int = 4  # pairs per forward pass and rank; changes memory, not results
    sort_by_length: bool = True  # within a step: less padding, the same step
    clip: float = 1.0  # gradient norm is clipped to this
    max_steps: int | None = None  # stop every slice after this many optimizer steps
    seed: int = 0  # of slices, sampling, pairs and order
    # system
    preset: Literal["toy", "paper"] = "paper"  # all other defaults; unset: paper under CUDA, else toy
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "fsdp"  # under torchrun: replicate the model, shard it, or shard it inside a node and replicate across
    offload_reference: bool = False  # under fsdp or hsdp: the reference's layers wait in CPU memory; slower
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; weights and optimizer stay in float32
    activation_checkpointing: bool = True  # recompute activations in the backward pass
    sample_batch: int = 64  # answers sampled or judged at a time
    save_every: int = 50  # optimizer steps between training states
    out: str = "runs/tso"  # folder of the run
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # delete the run in --out and begin again
    dry_run: bool = False  # check everything, show the plan and one example, and stop before any model is loaded

    def __post_init__(self):
        for name in ("n_positive", "n_negative", "pairs_per_prompt", "slices", "rounds", "clip_chosen", "clip_rejected", "beta", "lr", "batch", "micro_batch", "sample_batch",
                     "save_every", "max_prompt", "max_response", "test_prompts", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("temperature", "warmup", "n_scores"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("limit", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name, cells in CELLS.items():
            if not set(getattr(self, name)) <= set(cells) or not getattr(self, name):
                raise ValueError(f"--{name} {' '.join(getattr(self, name))}: expected some of {', '.join(cells)}")
        if self.offload_reference and ("RANK" not in os.environ or self.parallel not in ("fsdp", "hsdp")):
            raise ValueError("--offload_reference needs torchrun (one rank will do) and --parallel fsdp or hsdp")
        if self.correct and self.judge == "none" and not self.verdicts and not self.export_pairs:
            raise ValueError("--judge none can't correct: use --no-correct, or --verdicts")


TOY = dict(model="runs/toy/sft", older=["runs/toy/sft-early"], smaller=["runs/toy/sft-small"], data="runs/toy/train.jsonl", test="runs/toy/test.jsonl", judge="toy", limit=2000,
           n_scores=16, max_response=64, lr=5e-5, epochs=2, batch=32, micro_batch=16, sample_batch=250, sort_by_length=False, parallel="ddp", dtype="float32", activation_checkpointing=False)


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


# ---------------------------------------------------------------- the model matrix, and correction


def sample_matrix(c, rows: list[dict], current: str, older: list[str], folder: Path, tok, sampling: dict, note: str) -> dict[str, list[list[dict]]]:
    """Candidates of every cell for every row: {cell: [[{"text", "ended"}, ...] per row]}; one model in memory at a time, one file a model.
    `current` holds n_positive answers, `current-` n_negative more for --negatives current; `older` and `smaller` n_negative of each of their models."""
    found = {cell: [[] for _ in rows] for cell in ("current", "current-", "older", "smaller", "human", "human-")}

    def draw_from(name: str, model: str, cells: list[tuple[str, int]]):
        own_tok, n = (tok if name == "current" else load_tokenizer(model)[0]), sum(k for _, k in cells)
        drawn = generate(folder / f"candidates-{name}.jsonl", rows, model, own_tok, n=n, seed=seed_of(c.seed, "candidates", folder.name, name), note=f"{note}sample {name}", **sampling)
        for i, answer in enumerate(drawn):
            cell = [cell for cell, k in cells for _ in range(k)][i % n]
            found[cell][i // n].append({"text": answer["response"], "ended": answer["meta"]["finish"] == "stop"})
    cells = [("current", c.n_positive)] * ("current" in c.positives) + [("current-", c.n_negative)] * ("current" in c.negatives)
    if cells:
        draw_from("current", current, cells)
    for cell, models in (("older", older), ("smaller", c.smaller)):
        for i, model in enumerate(models if cell in c.negatives else []):
            draw_from(f"{cell}{i}", model, [(cell, c.n_negative)])
    for i, row in enumerate(rows):
        for cell, side, wanted in (("human", "response", c.positives), ("human-", "rejected", c.negatives)):
            if "human" in wanted and row.get(side):
                found[cell][i].append({"text": row[side], "ended": True})
    return {cell: answers for cell, answers in found.items() if any(answers)}


def make_pairs(c, rows: list[dict], found: dict[str, list[list[dict]]], where: str) -> tuple[list[dict], int]:
    """Pairs of different texts, pairs_per_prompt a row, evenly over the cells (positive x negative): every row begins with the next cell.
    -> pairs with meta.cell, ids WHERE/ROW/NUMBER; and how many prompts gave none."""
    positive, negative = ([cell for cell in found if cell in names] for names in (("current", "human"), ("current-", "older", "smaller", "human-")))
    cells, pairs, none = [(p, n) for p in positive for n in negative], [], 0
    for i, row in enumerate(rows):
        rng, used, taken = random.Random(seed_of(c.seed, "pairs", where, row["id"])), set(), 0
        for turn in range(c.pairs_per_prompt * len(cells)):
            p, n = cells[(i * c.pairs_per_prompt + turn) % len(cells)]
            free = [(y, z) for y in found[p][i] for z in found[n][i] if y["text"] != z["text"] and y["text"].strip() and z["text"].strip() and (y["text"], z["text"]) not in used]
            if taken < c.pairs_per_prompt and free:
                y, z = rng.choice(free)
                used |= {(y["text"], z["text"])}
                pairs.append({"id": f"{where}/{row['id']}/{taken}", "prompt": row["prompt"], "chosen": y["text"], "rejected": z["text"], "meta": {
                    "cell": f"{p} > {n.rstrip('-')}", "chosen_ended": y["ended"], "rejected_ended": z["ended"]}})
                taken += 1
        none += not taken
    return pairs, none


def read_verdicts(path: str, c) -> dict[str, str]:
    """A person's verdicts by id. A row without id or with an unknown slice or word ends the program, naming file and line."""
    found, slices = {}, {f"{n}.{m}" for n in range(1, c.rounds + 1) for m in range(1, c.slices + 1)}
    for where, row in read_file(Path(path)):
        name, verdict = (row.get("id"), row.get("verdict")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or name.split("/")[0] not in slices:
            die(f"{where}: no pair has the id {name!r} (expected ROUND.SLICE/PROMPT/NUMBER as in --export_pairs)")
        if verdict not in ("keep", "swap", "drop"):
            die(f"{where}: {name}: the verdict is {verdict!r}, expected keep, swap or drop")
        if found.setdefault(name, verdict) != verdict:
            die(f"{where}: {name} has two verdicts, {found[name]} and {verdict}")
    return found


def judge_pairs(c, pairs: list[dict], folder: Path, judge, note: str) -> list[dict]:
    """The judge's correction of every pair, {"id", "verdict", "unreadable"}, in folder/judged.jsonl; keep everything without a judge."""
    def work(items, number):
        asked = judge.compare([(pairs[i]["prompt"], pairs[i]["chosen"], pairs[i]["rejected"]) for i in items]) if c.correct and judge else ["A"] * len(items)
        return [{"id": pairs[i]["id"], "verdict": correction(v), "unreadable": v is None} for i, v in zip(items, asked)]
    return phase(folder / "judged.jsonl", list(range(len(pairs))), work, c.sample_batch, [c.correct, c.judge, [(p["id"], p["chosen"], p["rejected"]) for p in pairs]], note=f"{note}correct")


def apply_verdicts(pairs: list[dict], judged: list[dict], people: dict[str, str], where: str) -> list[dict]:
    """Pairs with meta.verdict, sides exchanged where it is swap; a person's verdict outranks the judge's."""
    if unknown := [name for name in people if name.split("/")[0] == where and name not in {pair["id"] for pair in pairs}]:
        die(f"--verdicts: no pair has the id {unknown[0]!r}" + (f" (nor {len(unknown) - 1} more)" if unknown[1:] else ""))
    out = []
    for pair, by_judge in zip(pairs, judged):
        meta = pair["meta"] | {"verdict": people.get(pair["id"], by_judge["verdict"]), "by": "person" if pair["id"] in people else "judge",
                               "unreadable": by_judge["unreadable"] and pair["id"] not in people}
        if meta["verdict"] == "swap":
            pair = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
            meta |= {"chosen_ended": meta["rejected_ended"], "rejected_ended": meta["chosen_ended"]}
        out.append(pair | {"meta": meta})
    return out


def export(path: str, pairs: list[dict], judged: list[dict]):
    """Pairs for a person, as made, with the judge's verdict to begin with: what --verdicts reads."""
    text = lambda prompt: prompt[0]["content"] if len(prompt) == 1 else prompt
    write_atomic(Path(path), "".join(json.dumps({"id": pair["id"], "verdict": row["verdict"], "cell": pair["meta"]["cell"], "prompt": text(pair["prompt"]),
                                                 "chosen": pair["chosen"], "rejected": pair["rejected"]}, ensure_ascii=False) + "\n" for pair, row in zip(pairs, judged)))


def diversity(found: dict[str, list[list[dict]]], tok) -> dict[str, dict]:
    """distinct-2 and mean pairwise similarity of a prompt's candidates, averaged over prompts: of all cells, and without each of them."""
    encoded = {cell: [[tok(a["text"], add_special_tokens=False)["input_ids"] for a in answers] for answers in per_row] for cell, per_row in found.items()}
    names = dict.fromkeys(cell.rstrip("-") for cell in encoded)

    def of(kept):
        sets = [list(itertools.chain(*answers)) for answers in zip(*(encoded[cell] for cell in encoded if cell.rstrip("-") in kept))]
        similar = [s for s in map(similarity, sets) if s is not None]
        return {"distinct2": sum(map(distinct2, sets)) / len(sets), "similarity": sum(similar) / len(similar) if similar else None}
    return {"all": of(names)} | {f"without {name}": of(names.keys() - {name}) for name in (names if len(names) > 1 else [])}


# ---------------------------------------------------------------- one slice's training


def descend(c, policy: nn.Module, reference: nn.Module, pairs: list[tuple], indices: list[int], device) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs `indices` of all ranks; -> this rank's part of their mean metrics."""
    B, sums, micros = len(indices), {}, micro_batches(indices, c)
    for j, (some, weights) in enumerate(micros):
        ids, mask = collate([pairs[i][:2] for i in some] + [(pairs[i][0], pairs[i][2]) for i in some], device)
        weight = torch.tensor(weights, device=device)
        with no_sync(policy, last=j + 1 == len(micros)):
            with autocast(c, device, policy):
                logps = policy(ids, mask)  # [2B]
                with torch.no_grad():
                    ref_logps = reference(ids, mask)  # [2B]
            chosen, rejected = implicit_rewards(logps, ref_logps, c.beta)
            losses = dual_clip_losses(chosen, rejected, c.clip_chosen, c.clip_rejected)
            ((weight * losses).sum() / B * ranks()[1]).backward()  # DDP and FSDP average over ranks
        clipped_chosen, clipped_rejected = clipped(chosen, rejected, c.clip_chosen, c.clip_rejected)
        for name, value in {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                            "rewards/accuracies": (chosen > rejected).float(), "clipped/chosen": clipped_chosen, "clipped/rejected": clipped_rejected,
                            "logps/chosen": logps[:len(weight)], "logps/rejected": logps[len(weight):]}.items():
            sums[name] = sums.get(name, 0.0) + (weight * value.detach()).sum() / B
    return sums


def train(c, number: int, where: str, pairs: list[tuple], start: str, folder: Path, tok, device):
    """The policy from `start`, which is also the reference, on one slice's pairs, into folder/checkpoint; training states in folder/state.pt, lines in metrics.jsonl."""
    policy = shard(Scorer, start, c, device)
    reference = shard(lambda lm: Scorer(lm.requires_grad_(False)), start, c, device, c.offload_reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=0.0)
    sizes = [sum(map(len, pair[:3])) for pair in pairs] if c.sort_by_length else None
    steps, state, metrics, parts = step_order(len(pairs), c, c.seed, "order", where, sizes=sizes), folder / "state.pt", folder.parent / "metrics.jsonl", {"policy": (policy, optimizer)}
    first = load_state(state, parts)["step"] if state.exists() else 0
    if c.offload_reference:
        reference.lm.model.layers.cpu()  # after load_state, which wants all of a module on one device
    if ranks()[0] == 0:
        truncate_metrics(metrics, lambda m: (m["iteration"], m["step"]) <= (number, first))
    barrier()
    bar, started = progress(range(first, len(steps)), f"slice {where}"), time.time()
    for step in bar:
        factor = lr_factor(step, len(steps), c.warmup)
        sums = descend(c, policy, reference, pairs, steps[step], device)
        norm = take_step(optimizer, factor * c.lr, c.clip)
        m = {"iteration": number, "slice": where, "step": step + 1} | sum_ranks(sums | {"stop": torch.tensor(float(STOP.is_set()), device=device)}) | {"grad_norm": norm, "lr": factor * c.lr, "memory_gib": memory_gib(device),
             "pairs_per_second": sum(map(len, steps[first:step + 1])) / (time.time() - started)}
        stop = m.pop("stop")
        if not math.isfinite(m["loss"]):
            sys.exit(f"error: the loss is {m['loss']} at slice {where}, step {step + 1}, rows {[pairs[i][3] for i in steps[step]]}: lower --lr, or look at these rows")
        if step == 0 and abs(m["rewards/chosen"]) > 1e-3:
            print(f"warning: before the first step the policy differs from its reference by a reward of {m['rewards/chosen']:+.4f}; it should be 0", file=sys.stderr)
        if ranks()[0] == 0:
            with open(metrics, "a") as file:
                file.write(json.dumps(m) + "\n")
            line = metric_line(m, len(steps), (time.time() - started) / (step - first + 1) * (len(steps) - step - 1))
            line += f" · rewards {m['rewards/chosen']:+.2f} {m['rewards/rejected']:+.2f} · clipped {m['clipped/chosen']:.0%} {m['clipped/rejected']:.0%}"
            bar.set_description_str(line)
            if bar.disable and (step + 1) % max(1, len(steps) // 2) == 0:
                print(line, flush=True)
        if ((step + 1) % c.save_every == 0 or stop) and step + 1 < len(steps):
            save_state(state, parts, step=step + 1)
        if stop:
            stopped()
    save_checkpoint(folder / "checkpoint", policy, tok, start)


# ---------------------------------------------------------------- phases: sample the matrix -> pair -> correct -> train -> measure, slice by slice


def against_start(folder: Path, start: Path, judge, size: int, note: str) -> dict:
    """The judge's verdicts, both orders asked, on a model's held-out answers against the start model's, in folder/against.jsonl; -> shares."""
    new, old = (read_jsonl(f / "answers.jsonl") for f in (folder, start))

    def work(items, number):
        asked = judge.compare([(new[i]["prompt"], new[i]["response"], old[i]["response"]) for i in items])
        return [{"id": new[i]["id"], "verdict": {"A": "win", "B": "loss"}.get(v, v)} for i, v in zip(items, asked)]
    rows = phase(folder / "against.jsonl", list(range(len(new))), work, size, [judge.spec, [(y["response"], z["response"]) for y, z in zip(new, old)]], note=f"{note}against the start")
    counts = Counter(row["verdict"] for row in rows)
    return {name: counts[name] / max(1, sum(counts.values()) - counts[None]) for name in ("win", "tie", "loss")}


def score_spread(c, folder: Path, rows: list[dict], model: str, tok, judge, sampling: dict, note: str) -> dict:
    """Fig. 5: skewness and kurtosis of the judge's scores over n_scores answers to each held-out prompt, in folder/spread.jsonl; -> means, and the share of
    prompts all of whose scores are equal (they have neither)."""
    drawn = generate(folder / "many.jsonl", rows, model, tok, n=c.n_scores, seed=seed_of(c.seed, "many", folder.name), note=f"{note}sample {c.n_scores} each", **sampling)

    def work(items, number):
        scores = judge.score([(rows[i]["prompt"], drawn[i * c.n_scores + j]["response"]) for i in items for j in range(c.n_scores)])
        out = []
        for k, i in enumerate(items):
            read = [s for s in scores[k * c.n_scores:(k + 1) * c.n_scores] if s is not None]
            skew, kurtosis = (skewness_kurtosis(read) if read else None) or (None, None)
            out.append({"id": rows[i]["id"], "mean": sum(read) / len(read) if read else None, "skewness": skew, "kurtosis": kurtosis})
        return out
    found = phase(folder / "spread.jsonl", list(range(len(rows))), work, c.sample_batch, [judge.spec, model, c.n_scores], note=f"{note}score {c.n_scores} each")
    spread = [row for row in found if row["skewness"] is not None]
    mean = lambda name: sum(row[name] for row in spread) / len(spread) if spread else None
    return {"skewness": mean("skewness"), "kurtosis": mean("kurtosis"), "no_spread": 1 - len(spread) / len(found)}


def show_plan(c, tok, parts, test_rows, dropped, device):
    """The header: what will be done with what, and one example."""
    why = f"default {'under' if torch.cuda.is_available() else 'without'} CUDA" if not any(a.startswith("--preset") for a in sys.argv) else "asked for"
    print(f"TSO · preset {c.preset} ({why}) · {c.rounds} round{'s' * (c.rounds > 1)} x {c.slices} slices · positives {', '.join(c.positives)} · negatives {', '.join(c.negatives)} · "
          f"correction {'by ' + c.judge if c.correct else 'off'} · clip {c.clip_chosen:g}/{c.clip_rejected:g}")
    print(f"current {c.model} · older {', '.join(c.older) or 'none'} · smaller {', '.join(c.smaller) or 'none'}")
    print(f"data {c.data}: {sum(map(len, parts))} training prompts in slices of {len(parts[0])}, {len(test_rows)} held-out prompts" + "".join(f", {n} left out: {w}" for w, n in dropped.items() if n))
    world, micro = ranks()[1], min(c.micro_batch, c.batch // ranks()[1])
    print(f"batch {c.batch} = {world} ranks x {micro} pairs x {c.batch // world // micro} micro-batches · at most {len(step_order(len(parts[0]) * c.pairs_per_prompt, c))} steps a slice · "
          f"{device} · {c.parallel if dist.is_initialized() else 'one process'} · weights float32, compute {c.dtype}" + (" · activation checkpointing" if c.activation_checkpointing else ""))
    print(memory_plan(lm_shapes(c.model), c, reference=True))
    row = parts[0][0]
    p, y = prompt_ids(tok, row["prompt"]), response_ids(tok, row["response"], True, c.max_response)
    print(f"example {row['id']}, no loss: {tok.decode(p)!r}\n{' ' * len(row['id'])}    with loss: {tok.decode(y)!r} ({len(p)} + {len(y)} tokens)", flush=True)


def has_pairs(spec: str) -> bool:
    """Whether the first row has a rejected side."""
    _, first = next(iter(read_file(Path(spec)) if Path(spec).suffix in (".jsonl", ".json", ".parquet") else read_hub(spec)), (None, None))
    return isinstance(first, dict) and bool(first.get("rejected") or first.get("generated"))


def read_rows(c, tok) -> tuple[list[list[dict]], list[dict], Counter]:
    """Training rows in slices, held-out rows, and who was left out. A pair's chosen side is its response; its rejected side is kept as a candidate."""
    def load(spec, limit):
        if "human" in c.negatives and has_pairs(spec):
            rows, dropped = load_rows(spec, "pair", limit)
            return [row | {"response": row["chosen"]} for row in rows], dropped
        return load_rows(spec, "response", limit)
    rows, dropped = load(c.data, c.limit if c.test else None)  # without --test the held-out rows come out of all of them
    train_rows, test_rows = (rows, load_rows(c.test, "response", c.test_prompts)[0]) if c.test else hold_out(rows)
    train_rows, test_rows = train_rows[:c.limit], test_rows[:min(c.test_prompts, c.limit or c.test_prompts)]
    fits = lambda row: len(prompt_ids(tok, row["prompt"])) <= c.max_prompt
    kept = [row for row in train_rows if fits(row)], [row for row in test_rows if fits(row)]
    dropped["prompts longer than --max_prompt"] = len(train_rows) + len(test_rows) - sum(map(len, kept))
    train_rows, test_rows = kept
    if len(train_rows) < c.slices or not test_rows:
        die(f"{c.data}: {len(train_rows)} training and {len(test_rows)} held-out prompts of at most {c.max_prompt} tokens: too few for {c.slices} slices (--test names held-out data)")
    order = random.Random(seed_of(c.seed, "slices")).sample(train_rows, len(train_rows))
    return [order[i::c.slices] for i in range(c.slices)], test_rows, dropped


def main():
    c = parse(Config, {"toy": TOY, "paper": {}})
    device = setup(c)
    # every check of the input comes before the first weight is read
    tok, config = load_tokenizer(c.model)
    for model in c.older + c.smaller:
        load_tokenizer(model)
    if c.max_prompt + c.max_response > config.max_position_embeddings:
        die(f"--max_prompt {c.max_prompt} + --max_response {c.max_response} is more than {c.model}'s context of {config.max_position_embeddings} tokens")
    parts, test_rows, dropped = read_rows(c, tok)
    people = read_verdicts(c.verdicts, c) if c.verdicts else {}
    judge = make_judge(c.judge, Path(c.out) / "judge", device, getattr(torch, c.dtype))
    if ranks()[0] == 0:
        show_plan(c, tok, parts, test_rows, dropped, device)
    if c.dry_run:
        return
    free = ("out", "resume", "overwrite", "parallel", "offload_reference", "micro_batch", "save_every", "verdicts", "export_pairs", "rounds")
    out, started = open_run(c, [c.data, c.test, c.verdicts], may_change=free), time.time()
    sampling = dict(temperature=c.temperature, max_new_tokens=c.max_response, batch=c.sample_batch, dtype=getattr(torch, c.dtype), device=device)

    def measure(folder, model, where, last):
        result = held_out(folder, test_rows, model, tok, judge, note=f"{where}: ", seed=seed_of(c.seed, "answers", where), **sampling)
        for name in ("win", "tie", "loss"):
            result[f"{name}_annotation"] = result.pop(name)
        if judge and where != "start":
            result |= against_start(folder, out / "start", judge, c.sample_batch, f"{where}: ")
        if judge and c.n_scores and (last or where == "start"):
            result |= score_spread(c, folder, test_rows, model, tok, judge, sampling, f"{where}: ")
        if judge:
            judge.free()
        return result
    current, finished, number = c.model, [], 0
    results = [{"round": 0, "slice": 0} | measure(out / "start", current, "start", False)]
    for n, m in itertools.product(range(1, c.rounds + 1), range(1, c.slices + 1)):
        where, folder, rows, number = f"{n}.{m}", out / f"round{n}-slice{m}", parts[m - 1], number + 1
        older = c.older + [model for model in finished if model != current]
        found = sample_matrix(c, rows, current, older, folder, tok, sampling, f"{where}: ")
        made, none = make_pairs(c, rows, found, where)
        if not made:
            die(f"slice {where}: no pairs: positives {', '.join(c.positives)} and negatives {', '.join(c.negatives)} gave no two different texts for any prompt")
        judged = judge_pairs(c, made, folder, judge, f"{where}: ")
        trained = (folder / "checkpoint").exists()
        if c.export_pairs and not trained and not any(pair["id"] in people for pair in made):
            if ranks()[0] == 0:
                export(c.export_pairs, made, judged)
                print(f"{len(made)} pairs of slice {where} in {c.export_pairs}: edit their verdicts (keep, swap, drop), then go on with --resume --verdicts {c.export_pairs}")
            break
        if c.judge == "none" and c.correct and not trained and (silent := [pair["id"] for pair in made if pair["id"] not in people]):
            die(f"slice {where}: {len(silent)} pairs have no verdict, {silent[0]} the first: add them to --verdicts, or name a --judge")
        pairs = apply_verdicts(made, judged, people, where)
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        if (folder / "state.pt").exists() and (folder / "pairs.jsonl").read_text() != text:
            die(f"slice {where} is being trained on pairs with other verdicts: go on with those, or delete {folder}/state.pt")
        if ranks()[0] == 0 and not (folder / "checkpoint").exists():
            write_atomic(folder / "pairs.jsonl", text)
        barrier()
        pairs = read_jsonl(folder / "pairs.jsonl")  # of a trained slice: what it was trained on
        encoded, left_out = encode_pairs(tok, [pair for pair in pairs if pair["meta"]["verdict"] != "drop"], c.max_prompt, c.max_response)
        if not encoded:
            die(f"slice {where}: no pair left to train on: {len(pairs)} made, {sum(pair['meta']['verdict'] == 'drop' for pair in pairs)} dropped by correction")
        if judge:
            judge.free()
        if not (folder / "checkpoint").exists():
            train(c, number, where, encoded, current, folder, tok, device)
        if ranks()[0] == 0:
            (folder / "state.pt").unlink(missing_ok=True)
        current = str(folder / "checkpoint")
        finished += [current] * (m == c.slices)
        steps = [line for line in read_jsonl(out / "metrics.jsonl") if line["slice"] == where]
        end = steps[-math.ceil(len(steps) / 4):]
        cells = {cell: [pair["meta"] for pair in pairs if pair["meta"]["cell"] == cell] for cell in dict.fromkeys(pair["meta"]["cell"] for pair in pairs)}
        results.append({"round": n, "slice": m} | measure(folder, current, where, (n, m) == (c.rounds, c.slices)) | {
            name: sum(line[key] for line in end) / len(end) for name, key in (("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"),
                                                                             ("clipped_chosen", "clipped/chosen"), ("clipped_rejected", "clipped/rejected"))} | {
            "steps": len(steps), "pairs": len(encoded), "made": len(pairs), "prompts_without_pair": none, "left_out": dict(left_out),
            "cells": {cell: {"pairs": len(metas)} | {name: sum(meta["verdict"] == word for meta in metas) for name, word in (("kept", "keep"), ("swapped", "swap"), ("dropped", "drop"))}
                      | {"unreadable": sum(meta["unreadable"] for meta in metas)} for cell, metas in cells.items()},
            "diversity": diversity(found, tok)})
        if ranks()[0] == 0:
            write_atomic(out / "results.json", json.dumps({"slices": results, "seed": c.seed, "seconds": round(time.time() - started, 1)}, indent=1))
    else:
        if ranks()[0] == 0:
            report(out, results, current, started)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(out: Path, results: list[dict], model: str, started: float):
    """samples.md, the tables of results, and where the model is."""
    folders = [out / "start"] + [out / f"round{r['round']}-slice{r['slice']}" for r in results[1:]]
    answers = [read_jsonl(folder / "test.jsonl")[:3] for folder in folders]
    text = "# Three held-out prompts, the annotated answer, and the model's after each slice\n"
    for k, first in enumerate(answers[0]):
        text += f"\n## {first['prompt'][-1]['content']}\n\nannotated: {first['annotated']}\n" + "".join(f"\n{f.name}: {rows[k]['response']}\n" for f, rows in zip(folders, answers))
    write_atomic(out / "samples.md", text)
    print(table(results, ["round", "slice", "score", "full_marks", "win", "tie", "loss", "chosen_reward", "rejected_reward", "clipped_chosen", "clipped_rejected", "pairs", "steps"]))
    total = {}
    for r in results[1:]:
        for cell, counts in r["cells"].items():
            total[cell] = Counter(total.get(cell, {})) + Counter(counts)
    print(table([{"cell": cell} | {name: counts[name] for name in ("pairs", "kept", "swapped", "dropped", "unreadable")} for cell, counts in total.items()],
                ["cell", "pairs", "kept", "swapped", "dropped", "unreadable"]))
    print(table([{"candidates": name} | values for name, values in results[-1]["diversity"].items()], ["candidates", "distinct2", "similarity"]))
    print(f"{time.time() - started:.0f} s · {out}/results.json, samples.md, metrics.jsonl · the model:\n"
          f"  lm = AutoModelForCausalLM.from_pretrained({model!r})\n  tok = AutoTokenizer.from_pretrained({model!r})")


if __name__ == "__main__":
    record(main)()  # under torchrun: the traceback and rank of whoever fails first
