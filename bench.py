"""Time and peak memory of one optimisation step's forward and backward passes, for each method, beside a floor and (--vs trl) TRL's DPOTrainer.

    python bench.py --model DIR --data pairs.jsonl            # a table, and bench.json
    python bench.py --model DIR --data pairs.jsonl --vs trl   # pip install trl
    python bench.py --shape 1b --length 1024                  # random weights and pairs: nothing to download
    python bench.py --model DIR --ranks 2                     # one step over two processes under FSDP
    python bench.py --sweep length pairs chunk ranks          # how cost grows, as bench-sweep.json

floor    the backbone forward and backward on the same real tokens: no padding, no head, no loss
dpo      our loop, reference log-probs at hand; dpo+ac: with activation checkpointing
sams     scoring, the selector at work with a full replay, training on the half that it picks
tso      the dual-clip loss with a resident reference: DPO where the reference is not precomputed
dnpo     the joint update: resident reference with noise head
trl      DPOTrainer's loss, reference log-probs at hand, its head and metrics included; trl+ac: with its gradient checkpointing

All rows in one process on the same pairs, medians of interleaved repeats. Memory is the growth over weights and optimizer, gradients included: the CUDA allocator's peak on a
GPU, the resident set's on a CPU (Linux; a pass of its own, in which glibc gives freed blocks back), of the rank that needs most. The optimizer's step is left out: it is the
same in every row. MFU = model FLOPs / (seconds x ranks x peak), model FLOPs = (6 N + 6 L D T) per token: N weights without the embedding, causal attention, no credit for recomputing or for scoring.
"""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import common
import dnpo
import sams
import tso
from common import Scorer, die, encode_pairs, load_lm, load_rows, load_tokenizer, parse, progress, table, write_atomic

SHAPES = {"1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
          "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, from the data sheets
LIBC = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None


@dataclass(frozen=True)
class Config:
    model: str = "runs/toy/sft"  # model folder or Hub id
    shape: Literal["1b", "8b"] | None = None  # instead of --model: random weights in Llama-3's shape of this size
    data: str = "runs/toy/pairs.jsonl"  # preference pairs, as for sams.py
    length: int | None = None  # instead of --data: pairs of random tokens, LENGTH a sequence, a quarter of it prompt
    pairs: int = 4  # pairs of a step: the longest of --data that fit, so that they are of one length and any half of them is half of the work
    max_prompt: int = 256  # tokens of a prompt at most
    max_response: int = 256  # tokens of a response at most
    micro_batch: int | None = None  # pairs per forward pass (default: all)
    chunk: int = common.CHUNK  # response tokens whose logits are alive at a time
    ratio: float = 0.5  # share that SamS trains on
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    vs: Literal["trl"] | None = None  # measure it too
    rows: list[str] = dataclasses.field(default_factory=lambda: ["floor", "dpo", "dpo+ac", "sams", "tso", "dnpo"])  # rows to measure
    repeats: int = 5  # rounds over all rows
    threads: int | None = None  # CPU threads of a rank (default: torch's)
    ranks: int = 1  # processes that share the step, under FSDP: rows dpo, dpo+ac, sams
    sweep: list[str] = dataclasses.field(default_factory=list)  # how cost grows with: length, pairs, chunk, ranks
    out: str = "bench.json"  # where the numbers go


# ---------------------------------------------------------------- measuring


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


def peak(step, modules, device) -> float | None:
    """MiB by which one step's peak exceeds what is there before it."""
    for module in modules:
        module.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not LIBC:
        return None
    LIBC.malloc_trim(0)
    read = lambda name: next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = read("VmRSS")
    step()
    return (read("VmHWM") - before) / 2**10


def seconds(step, modules, device) -> float:
    for module in modules:
        module.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---------------------------------------------------------------- the rows


def load(c, device) -> tuple[torch.nn.Module, torch.nn.Module | None, list[tuple], object]:
    """Policy (None if make_steps is to shard it), the same as reference if a row needs it, pairs, tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    tok = None
    if c.shape:
        config = LlamaConfig(**SHAPES[c.shape], max_position_embeddings=8192)
        torch.manual_seed(0)
        with device:
            make = lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            lm = make()
    else:
        tok, config = load_tokenizer(c.model)
        lm = load_lm(c.model, torch.float32, device) if c.ranks == 1 else None
    if c.length:
        rng = random.Random(0)
        draw = lambda n: [rng.randrange(10, config.vocab_size) for _ in range(n)]
        pairs = [(draw(c.length // 4), draw(c.length - c.length // 4), draw(c.length - c.length // 4), str(i)) for i in range(c.pairs)]
    else:
        pairs, _ = encode_pairs(tok, load_rows(c.data, "pair")[0], c.max_prompt, c.max_response)
        pairs = sorted(pairs, key=lambda pair: -sum(map(len, pair[:3])))[:c.pairs]
        if len(pairs) < c.pairs:
            die(f"{c.data}: {len(pairs)} pairs fit, --pairs {c.pairs} asked for")
    reference = None
    if {"dnpo", "tso"} & set(c.rows):
        reference = make() if c.shape else load_lm(c.model, torch.float32, device)
        reference.load_state_dict(lm.state_dict())
        reference.requires_grad_(False)
    return lm, reference, pairs, tok


def make_steps(c, lm, reference, pairs, tok, device) -> tuple[dict, list]:
    """{row: a function that does one forward and backward pass}, and the modules whose gradients it makes."""
    n, everything = len(pairs), list(range(len(pairs)))
    same = dict(dtype=c.dtype, micro_batch=c.micro_batch or n, batch=n, beta=0.1, activation_checkpointing=False)
    how = sams.Config(**same, ratio=c.ratio, context="both")
    policy = sams.PoolingScorer(lm) if lm else sams.shard(sams.PoolingScorer, c.model, how, device)
    lm, modules = policy.lm, [policy]
    ref, _ = sams.score(policy, pairs, everything, how, device)
    torch.manual_seed(1)
    with torch.no_grad():  # 2 % away from the reference, or every margin would be 0
        for p in lm.parameters():
            if p.dim() > 1:
                p = p.to_local() if isinstance(p, DTensor) else p
                p.add_(torch.randn_like(p) * p.std() * 0.02)
    real = [token for p, y in sams.both_sides(pairs, everything) for token in p + y]
    real = torch.tensor(real[:len(real) // (2 * n) * 2 * n], device=device).view(2 * n, -1)  # as many sequences as in the other rows, none padded

    def floor():
        for ids in real.split(2 * how.micro_batch):
            with sams.autocast(how, device, policy):
                lm.model(input_ids=ids, use_cache=False).last_hidden_state.float().mean().backward()

    def dpo():
        return sams.descend(policy, pairs, ref, everything, how, device)["loss"]

    def dpo_checkpointed():
        with activation_checkpointing(lm):
            dpo()
    bandit = sams.Bandit(len(lm.model.layers), 2 * lm.config.hidden_size, how, device)

    def choose():
        logps, contexts = sams.score(policy, pairs, everything, how, device, how.context)
        return sams.pick(how, "topk", everything, max(1, round(c.ratio * n)), [False] * n, logps, ref, contexts, bandit, 0)[0]

    def sams_step():
        sams.descend(policy, pairs, ref, choose(), how, device)
    steps = {"floor": floor, "dpo": dpo, "dpo+ac": dpo_checkpointed, "sams": sams_step}
    if "sams" in c.rows:
        logps, contexts = sams.score(policy, pairs, everything, how, device, how.context)
        for _ in progress(range(how.replay + 1), "fill the replay"):
            sams.pick(how, "topk", everything, max(1, round(c.ratio * n)), [False] * n, logps, ref, contexts, bandit, 0)
    if reference:
        tso_how, dnpo_how = tso.Config(**same), dnpo.Config(**same)
        plain, scorer = Scorer(reference), Scorer(lm)
        steps["tso"] = lambda: tso.descend(tso_how, scorer, plain, pairs, everything, device)
        if "dnpo" in c.rows:
            noisy = dnpo.NoisyReference(reference, 0.1).to(device)
            modules.append(noisy)
            steps["dnpo"] = lambda: dnpo.descend(dnpo_how, "joint", scorer, noisy, pairs, everything, (1, 1), device)
    if c.vs == "trl":
        steps |= trl_steps(c, lm, pairs, ref, tok, device, dpo)
    return {name: steps[name] for name in c.rows + ["trl", "trl+ac"] * (c.vs == "trl")}, modules


def trl_steps(c, lm, pairs, ref, tok, device, ours) -> dict:
    """TRL's loss on the identical pairs; it must agree with ours, or the comparison is void."""
    try:
        import trl
        from datasets import Dataset
    except ImportError:
        die("--vs trl needs trl: pip install trl")
    row = [{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}]
    args = trl.DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(pairs), beta=0.1, use_cpu=device.type == "cpu", bf16=c.dtype == "bfloat16", report_to=[],
                         max_length=None, gradient_checkpointing=False, precompute_ref_log_probs=True, disable_tqdm=True, dataloader_pin_memory=False)
    trainer = trl.DPOTrainer(model=lm, args=args, train_dataset=Dataset.from_list(row), processing_class=tok)
    batch = trainer._prepare_inputs(trainer.data_collator([{"prompt_ids": p, "chosen_ids": y, "rejected_ids": z, "ref_chosen_logps": a, "ref_rejected_logps": b}
                                                           for (p, y, z, _), (a, b) in zip(pairs, ref.tolist())]))

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):  # as accelerate does around a prepared model
            loss = trainer.compute_loss(lm, batch)
        loss.backward()
        return loss.detach()

    def step_checkpointed():
        lm.train()
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        step()
        lm.gradient_checkpointing_disable()
        lm.eval()
    theirs, mine = step().item(), ours().item()
    print(f"loss: ours {mine:.4f}, TRL's {theirs:.4f}")
    if abs(theirs - mine) > (0.05 if c.dtype == "bfloat16" else 1e-3):
        die(f"TRL's loss {theirs} is not ours {mine}: the rows would not be comparable")
    return {"trl": step, "trl+ac": step_checkpointed}


def measure(c, rank: int = 0, meeting: str = "") -> dict:
    """{row: seconds, spread, peak_mib, ...} of one setting, on one of its ranks."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if c.threads:
        torch.set_num_threads(c.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if c.ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.FileStore(meeting, c.ranks), rank=rank, world_size=c.ranks)
    common.CHUNK = dnpo.CHUNK = c.chunk
    keep_freed_blocks(False)
    lm, reference, pairs, tok = load(c, device)
    steps, modules = make_steps(c, lm, reference, pairs, tok, device)
    lm = modules[0].lm
    memory = {name: peak(step, modules, device) for name, step in progress(steps.items(), "memory")}  # first: a heap with holes would hide growth, or make it
    times = {name: [] for name in steps}
    keep_freed_blocks(True)
    for step in progress(steps.values(), "warm up"):
        step()
    for _ in progress(range(c.repeats), "time"):
        for name, step in steps.items():
            times[name].append(seconds(step, modules, device))
    tokens, length = sum(len(p) * 2 + len(y) + len(z) for p, y, z, _ in pairs), max(len(p) + max(len(y), len(z)) for p, y, z, _ in pairs)
    weights = sum(p.numel() for p in lm.parameters()) - lm.get_input_embeddings().weight.numel() * (not lm.config.tie_word_embeddings)
    flops = tokens * (6 * weights + 6 * lm.config.num_hidden_layers * lm.config.hidden_size * length)
    top = next((v for name, v in PEAK.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    median = {name: statistics.median(t) for name, t in times.items()}
    over = lambda name, base: median[name] / median[base] if base in median else None
    rows = {name: {"seconds": median[name], "spread": (max(t) - min(t)) / median[name], "peak_mib": memory[name], "vs_floor": over(name, "floor"), "vs_trl": over(name, "trl"),
                   "tokens_per_second": tokens / median[name], "mfu": flops / median[name] / top / c.ranks if top and name != "sams" else None} for name, t in times.items()}
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return {"device": card, "tokens": tokens, "gradients_mib": sum(p.numel() * 4 for p in lm.parameters()) / 2**20 / c.ranks, "peak_flops": top, "rows": rows}


def apart(c) -> dict:
    """measure, in new processes: what another setting has left in the heap would count."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(c.ranks, multiprocessing.get_context("spawn")) as pool:
        found, *others = pool.map(functools.partial(measure, c, meeting=f"{folder}/store"), range(c.ranks))
    for name, row in found["rows"].items():
        row["peak_mib"] = max((other["rows"][name]["peak_mib"] for other in (found, *others) if row["peak_mib"] is not None), default=None)
    return found


SWEEPS = {"length": (128, 256, 512, 1024, 2048), "pairs": (1, 2, 4, 8), "chunk": (64, 256, 1024, 4096), "ranks": (1, 2, 4)}


def main():
    c = parse(Config)
    if unknown := set(c.rows) - {"floor", "dpo", "dpo+ac", "sams", "tso", "dnpo"} | set(c.sweep) - set(SWEEPS):
        die(f"{' '.join(sorted(unknown))}: no such row or sweep")
    if c.shape and (c.vs or not c.length and not c.sweep):
        die("--shape has no tokenizer for --data and --vs: give --length, or a --model")
    if c.ranks > 1 or "ranks" in c.sweep:
        if c.shape or c.vs or set(c.rows) - {"dpo", "dpo+ac", "sams"}:
            die("several ranks need a --model, and --rows of dpo, dpo+ac and sams")
        if torch.cuda.is_available() and torch.cuda.device_count() < c.ranks:
            die(f"--ranks {c.ranks} needs as many GPUs, here are {torch.cuda.device_count()}")
    head = {"argv": sys.argv[1:], "torch": torch.__version__}
    if c.sweep:
        found = {}
        for axis in c.sweep:
            base = dataclasses.replace(c, length=c.length or 512)
            found[axis] = {value: apart(dataclasses.replace(base, **{axis: value}))["rows"] for value in progress(SWEEPS[axis], f"sweep {axis}")}
            for row in c.rows:
                print(f"{axis}: {row}\n" + table([{axis: value} | rows[row] for value, rows in found[axis].items()], [axis, "seconds", "peak_mib"]))
            write_atomic(Path(c.out).with_name(Path(c.out).stem + "-sweep.json"), json.dumps(head | {"sweep": found}, indent=1))
        return
    found = apart(c)
    print(f"{c.shape or c.model} · {c.pairs} pairs, {found['tokens']} tokens · {c.dtype} · {c.micro_batch or c.pairs} pairs a pass · {found['device']}" + f" x {c.ranks} ranks" * (c.ranks > 1)
          + f" · gradients {found['gradients_mib']:.0f} MiB"
          + (f" · MFU of a peak of {found['peak_flops'] / 1e12:.0f} TFLOP/s" if found["peak_flops"] else " · no MFU: peak unknown"))
    columns = ["row", "seconds", "spread", "peak_mib", "vs_floor", "vs_trl", "tokens_per_second", "mfu"]
    print(table([{"row": name} | row for name, row in found["rows"].items()], columns if found["peak_flops"] else columns[:-1]))
    write_atomic(Path(c.out), json.dumps(head | found, indent=1))


if __name__ == "__main__":
    main()
