"""Time and peak memory of one optimisation step's forward and backward passes, beside a floor.

    python bench.py --model DIR --data pairs.jsonl                       # a table, and bench.json

Rows: `floor`, the backbone forward and backward on the same real tokens, no padding, no head, no loss; `dpo`, our loop with precomputed reference log-probs; `dpo+ac`, the
same with activation checkpointing; `sams`, scoring, the selector at work with a full replay, and training on the half it picks.
All rows in one process on the same pairs, medians of interleaved repeats. Memory is the growth over weights and optimizer, gradients included: the CUDA allocator's peak on a GPU,
the resident set's on a CPU (Linux; glibc is told to give freed blocks back, in a pass of its own). The optimizer's step is left out: it is the same in every row.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

import sams
from common import die, encode_pairs, load_lm, load_rows, load_tokenizer, parse, progress, table, write_atomic


@dataclass(frozen=True)
class Config:
    model: str = "runs/toy/sft"  # model folder or Hub id
    data: str = "runs/toy/pairs.jsonl"  # preference pairs, as for sams.py
    pairs: int = 4  # pairs of a step: the longest that fit, so that they are of one length and any half of them is half of the work
    max_prompt: int = 256  # tokens of a prompt at most
    max_response: int = 256  # tokens of a response at most
    micro_batch: int | None = None  # pairs per forward pass (default: all)
    ratio: float = 0.5  # share that SamS trains on
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    repeats: int = 5  # rounds over all rows
    threads: int | None = None  # CPU threads (default: torch's)
    rows: list[str] = None  # rows to measure (default: all)
    out: str = "bench.json"  # where the numbers go


LIBC = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None


@contextlib.contextmanager
def activation_checkpointing(lm):
    for layer in lm.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    yield
    for layer in lm.model.layers:
        del layer.forward


def keep_freed_blocks(keep: bool):
    """glibc: freed blocks stay with the process, as with a caching allocator, or go back at once, so that the resident set is what is in use."""
    if LIBC:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            LIBC.mallopt(option, 2**30 if keep else 2**16)
        LIBC.malloc_trim(0)


def peak(step, lm, device) -> float:
    """MiB by which one step's peak exceeds what is there before it."""
    lm.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not LIBC:
        return float("nan")
    LIBC.malloc_trim(0)
    read = lambda name: next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = read("VmRSS")
    step()
    return (read("VmHWM") - before) / 2**10


def seconds(step, lm, device) -> float:
    lm.zero_grad(set_to_none=True)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    c = parse(Config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if c.threads:
        torch.set_num_threads(c.threads)
    tok, _ = load_tokenizer(c.model)
    pairs, _ = encode_pairs(tok, load_rows(c.data, "pair")[0], c.max_prompt, c.max_response)
    pairs, n = sorted(pairs, key=lambda pair: -sum(map(len, pair)))[:c.pairs], c.pairs
    if len(pairs) < n:
        die(f"{c.data}: {len(pairs)} pairs fit, --pairs {n} asked for")
    lm = load_lm(c.model, torch.float32, device)
    everything, policy = list(range(n)), sams.PoolingScorer(lm)
    how = sams.Config(dtype=c.dtype, micro_batch=c.micro_batch or n, batch=n, ratio=c.ratio, activation_checkpointing=False, context="both")
    ref, _ = sams.score(policy, pairs, everything, how, device)
    with torch.no_grad():
        for p in lm.parameters():  # not the reference any more: margins are not all 0
            p.add_(torch.randn_like(p) * p.std() * 0.02 if p.numel() > 1 else 0)
    bandit = sams.Bandit(len(lm.model.layers), 2 * lm.config.hidden_size, how, device)

    real = [token for p, y in sams.both_sides(pairs, everything) for token in p + y]
    real = torch.tensor(real[:len(real) // (2 * n) * 2 * n], device=device).view(2 * n, -1)  # as many sequences as in the other rows, none padded

    def floor():
        for ids in real.split(2 * how.micro_batch):
            with sams.autocast(how, device, policy):
                lm.model(input_ids=ids, use_cache=False).last_hidden_state.float().mean().backward()

    def dpo():
        sams.descend(policy, pairs, ref, everything, how, device)

    def dpo_checkpointed():
        with activation_checkpointing(lm):
            dpo()

    def sams_step():
        logps, contexts = sams.score(policy, pairs, everything, how, device, how.context)
        picked, _ = sams.pick(how, "topk", everything, max(1, round(c.ratio * n)), [False] * n, logps, ref, contexts, bandit, 0)
        sams.descend(policy, pairs, ref, picked, how, device)
    steps = {"floor": floor, "dpo": dpo, "dpo+ac": dpo_checkpointed, "sams": sams_step}
    if unknown := set(c.rows or ()) - set(steps):
        die(f"--rows {' '.join(sorted(unknown))}: expected some of {' '.join(steps)}")
    steps = {name: step for name, step in steps.items() if not c.rows or name in c.rows}
    if "sams" in steps:
        logps, contexts = sams.score(policy, pairs, everything, how, device, how.context)
        for _ in progress(range(how.replay + 1), "fill the replay"):
            sams.pick(how, "topk", everything, max(1, round(c.ratio * n)), [False] * n, logps, ref, contexts, bandit, 0)

    times, memory = {name: [] for name in steps}, {}
    keep_freed_blocks(True)
    for step in steps.values():
        step()  # warm up
    for _ in progress(range(c.repeats), "time"):
        for name, step in steps.items():
            times[name].append(seconds(step, lm, device))
    keep_freed_blocks(False)
    for name, step in progress(steps.items(), "memory"):
        memory[name] = statistics.median(peak(step, lm, device) for _ in range(3))
    tokens = sum(len(p) * 2 + len(y) + len(z) for p, y, z in pairs)
    base = statistics.median(times["floor"]) if "floor" in times else float("nan")
    rows = {name: {"seconds": statistics.median(t), "spread": (max(t) - min(t)) / statistics.median(t), "peak_mib": memory[name], "vs_floor": statistics.median(t) / base,
                   "tokens_per_second": tokens / statistics.median(t)} for name, t in times.items()}
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{c.model} · {n} pairs, {tokens} tokens · {c.dtype} · {how.micro_batch} pairs a pass · {card} · gradients {sum(p.numel() * 4 for p in lm.parameters()) / 2**20:.0f} MiB")
    print(table([{"row": name} | row for name, row in rows.items()], ["row", "seconds", "spread", "peak_mib", "vs_floor", "tokens_per_second"]))
    write_atomic(Path(c.out), json.dumps({"argv": sys.argv[1:], "device": card, "torch": torch.__version__, "tokens": tokens, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
