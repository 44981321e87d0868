"""Time and peak memory of one optimisation step's forward and backward passes, for each method,
beside a floor and (--vs trl) TRL's DPOTrainer.

    python bench.py --model DIR --data pairs.jsonl            # a table, and bench.json
    python bench.py --model DIR --data pairs.jsonl --vs trl   # pip install trl
    python bench.py --shape 1b --length 1024        # random weights and pairs: nothing to download
    python bench.py --model DIR --ranks 2 --rows dpo dpo+ac sams    # over two processes, under FSDP
    python bench.py --model DIR --rows dpo sams --sweep length pairs chunk ranks    # how cost grows
    python bench.py --model DIR --data prompts.jsonl --sample 256    # sampling, beside generate()

floor    the backbone forward and backward on the same real tokens: no padding, no head, no loss
dpo      our loop, reference log-probs at hand; dpo+ac: with activation checkpointing;
         dpo+compile: with compiled layers (--rows dpo+compile)
sams     scoring, a small selector at work on 33 rounds, training on the half that it picks;
         sams+ac: with activation checkpointing (--rows dpo+ac sams+ac);
         sams+paper: with a selector of the paper's size and a frozen encoder (--rows sams+paper)
tso      the dual-clip loss with a resident reference: DPO where the reference is not precomputed
dnpo     the joint update: resident reference with noise head
trl      DPOTrainer's loss, reference log-probs at hand, its head and metrics included; trl+ac: with
         its gradient checkpointing

With --sample: generate is transformers' own generate() and batch_decode() on batches in the file's
order, ours is what generate.py does with the same prompts. Tokens are those of answers, "finished"
is the share of all decoded tokens that lie behind an answer's end.

All rows in one process on the same pairs, medians of interleaved repeats. Memory is the growth over
weights and optimizer, gradients included: the CUDA allocator's peak on a GPU, the resident set's on
a CPU (Linux; a pass of its own, in which glibc gives freed blocks back), of the rank that needs
most. The optimizer's step is left out: it is the same in every row. MFU = model FLOPs / (seconds x
ranks x peak), model FLOPs = (6 N + 6 L D T) per token: N weights without the embedding, causal
attention, the head at every position, no credit for recomputing or for scoring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import common
import datafiles
import dnpo
import job
import sams
import tso
from common import Pair, Scorer

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B}
ROWS = ["floor", "dpo", "dpo+ac", "sams", "tso", "dnpo"]
ONLY_IF_ASKED = ["dpo+compile", "sams+ac", "sams+paper"]
SMALL_SELECTOR = {"selector_depth": 2, "selector_width": 128, "encoder": "none", "context": "both"}
PAPERS_SELECTOR = {"selector_depth": 16, "selector_width": 4096}
ROWS_OF_RANKS = ["dpo", "dpo+ac", "sams"]  # that several ranks can share
SWEEPS = {
    "length": (128, 256, 512, 1024, 2048),
    "pairs": (1, 2, 4, 8),
    "chunk": (64, 256, 1024, 4096),
    "ranks": (1, 2, 4),
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, from the data sheets


@dataclass(frozen=True)
class Config:
    model: str = "runs/toy/sft"  # model folder or Hub id
    # instead of --model: random weights in Llama-3's shape of this size
    shape: Literal["1b", "8b"] | None = None
    data: str = "runs/toy/pairs.jsonl"  # preference pairs, as for sams.py
    # instead of --data: pairs of random tokens, LENGTH a sequence, a quarter of it prompt
    length: int | None = None
    # pairs of a step: the longest of --data that fit, so that they are of one length and any half
    # of them is half of the work
    pairs: int = 4
    max_prompt: int = 256  # tokens of a prompt at most
    max_response: int = 256  # tokens of a response at most
    micro_batch: int | None = None  # pairs per forward pass (default: all)
    chunk: int = common.CHUNK  # response tokens whose logits are alive at a time
    ratio: float = 0.5  # share that SamS trains on
    encoder: str = "none"  # of the row sams+paper, as for sams.py; none: a small one
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    vs: Literal["trl"] | None = None  # measure it too
    rows: list[str] = dataclasses.field(default_factory=ROWS.copy)  # rows to measure
    repeats: int = 5  # rounds over all rows
    threads: int | None = None  # CPU threads of a rank (default: torch's)
    ranks: int = 1  # processes that share the step, under FSDP: rows dpo, dpo+ac, sams
    # how cost grows with: length, pairs, chunk, ranks
    sweep: list[str] = dataclasses.field(default_factory=list)
    # instead of a step: answers of at most --max_response tokens to so many prompts of --data
    sample: int | None = None
    sample_batch: int = 64  # answers sampled at a time
    out: str = "bench.json"  # where the numbers go

    def __post_init__(self):
        job.check_positive(self, "pairs", "max_prompt", "max_response", "chunk", "repeats", "ranks")
        job.check_positive(self, "length", "micro_batch", "threads", "sample", "sample_batch")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"--ratio must be above 0 and at most 1, not {self.ratio}")


# ---------------------------------------------------------------- time and memory of a step


def checkpointed(forward: Callable) -> Callable:
    """A layer's forward pass that is run again in the backward pass."""
    return partial(checkpoint, forward, use_reentrant=False)


def compiled(forward: Callable) -> Callable:
    """A layer's forward pass, compiled once and for all."""
    return torch.compile(forward, dynamic=True)


@contextlib.contextmanager
def layers_wrapped(lm, wrap: Callable):
    """Inside, the forward pass of each of the model's layers is what `wrap` makes of it."""
    for layer in common.blocks(lm):
        layer.forward = wrap(layer.forward)
    yield
    for layer in common.blocks(lm):
        del layer.forward


def clear_gradients(modules: list[nn.Module]):
    for module in modules:
        module.zero_grad(set_to_none=True)


def peak(step: Callable, modules: list[nn.Module], device) -> float | None:
    """The MiB by which a step's peak exceeds what is there before it, None where nothing tells.

    modules: those that the step makes gradients for.
    """
    clear_gradients(modules)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not job.LIBC:
        return None

    job.LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is again what is resident now
    before = resident_kib("VmRSS")
    step()
    return (resident_kib("VmHWM") - before) / 2**10


def resident_kib(name: str) -> int:
    """KiB of this process that are resident now ("VmRSS"), or were at the most ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


def seconds(step: Callable, modules: list[nn.Module], device) -> float:
    """The seconds that a step takes. modules: those that it makes gradients for."""
    clear_gradients(modules)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---------------------------------------------------------------- models and pairs


class Loaded(NamedTuple):
    """What a benchmark is made from."""

    lm: nn.Module | None  # the policy, None where it is to be sharded from its folder
    reference: nn.Module | None  # another one with the same weights, if a row needs it
    pairs: list[Pair]
    tok: object  # None with --shape


def load(c, device) -> Loaded:
    """Loads models and pairs, or makes random ones."""
    if c.shape:
        from transformers import LlamaConfig

        tok = None
        config = LlamaConfig(**SHAPES[c.shape], max_position_embeddings=8192)
        torch.manual_seed(0)
        make_lm = partial(random_lm, config, device)
    else:
        tok, config = common.load_tokenizer(c.model)
        make_lm = partial(common.load_lm, c.model, torch.float32, device)

    lm = make_lm() if c.ranks == 1 else None
    if c.length:
        vocabulary = config.get_text_config(decoder=True).vocab_size
        pairs = random_pairs(c.pairs, c.length, vocabulary)
    else:
        pairs = longest_pairs(c, tok)

    reference = None
    if "dnpo" in c.rows or "tso" in c.rows:
        reference = make_lm()
        reference.load_state_dict(lm.state_dict())
        reference.requires_grad_(False)
    return Loaded(lm, reference, pairs, tok)


def random_lm(config, device) -> nn.Module:
    """A model with random weights."""
    from transformers import AutoModelForCausalLM

    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_pairs(n: int, length: int, vocabulary: int) -> list[Pair]:
    """n pairs of random tokens, `length` of them in each sequence, a quarter of it prompt."""
    rng = random.Random(0)

    def draw(tokens: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(tokens)]

    of_prompt = length // 4
    of_response = length - of_prompt
    pairs = []
    for i in range(n):
        prompt = draw(of_prompt)
        chosen = draw(of_response)
        rejected = draw(of_response)
        pairs.append(Pair(prompt, chosen, rejected, str(i)))
    return pairs


def longest_pairs(c, tok) -> list[Pair]:
    """The longest pairs of --data that fit, the longest first."""
    rows, _ = datafiles.load_rows(c.data, "pair")
    pairs, _ = common.encode_pairs(tok, rows, c.max_prompt, c.max_response)
    pairs.sort(key=lambda pair: -pair.tokens)
    if len(pairs) < c.pairs:
        job.die(f"{c.data}: {len(pairs)} pairs fit, --pairs {c.pairs} asked for")
    return pairs[: c.pairs]


def move_away(lm):
    """Moves the weights by 2 % of their spread: at the reference, every margin would be 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() <= 1:
                continue
            if isinstance(p, DTensor):
                p = p.to_local()
            p.add_(torch.randn_like(p) * p.std() * 0.02)


# ---------------------------------------------------------------- the rows


class Work(NamedTuple):
    """What the rows work on: a policy, and the pairs of one step, all of one batch."""

    how: sams.Config
    policy: nn.Module  # a PoolingScorer, perhaps sharded
    data: sams.Data
    everything: list[int]  # the indices of all pairs
    device: torch.device


def make_steps(c, loaded: Loaded, device) -> tuple[dict[str, Callable], list[nn.Module]]:
    """{row: a function that does one forward and backward pass}, and the modules that it trains."""
    n = len(loaded.pairs)
    same = {
        "dtype": c.dtype,
        "micro_batch": c.micro_batch or n,
        "batch": n,
        "beta": 0.1,
        "activation_checkpointing": False,
    }
    same_sams = {**same, "ratio": c.ratio}
    work = make_work(c, sams.Config(**same_sams, **SMALL_SELECTOR), loaded, device)
    modules = [work.policy]
    steps = {
        "floor": partial(floor, work, unpadded(loaded.pairs, device)),
        "dpo": partial(dpo, work),
        "dpo+ac": partial(wrapped, checkpointed, dpo, work),
        "dpo+compile": partial(wrapped, compiled, dpo, work),
    }
    if "sams" in c.rows or "sams+ac" in c.rows:
        bandit = busy_bandit(work, frozen=False)
        steps["sams"] = partial(choose_and_train, work, bandit)
        steps["sams+ac"] = partial(wrapped, checkpointed, choose_and_train, work, bandit)
    if "sams+paper" in c.rows:
        how = sams.Config(**same_sams, **PAPERS_SELECTOR, encoder=c.encoder)
        papers = work._replace(how=how)
        steps["sams+paper"] = partial(choose_and_train, papers, busy_bandit(papers, frozen=True))

    scorer = Scorer(work.policy.lm)
    of_all = {"pairs": loaded.pairs, "indices": work.everything, "device": device}
    if "tso" in c.rows:
        reference = Scorer(loaded.reference)
        steps["tso"] = partial(tso.descend, tso.Config(**same), scorer, reference, **of_all)
    if "dnpo" in c.rows:
        reference = dnpo.NoisyReference(loaded.reference, 0.1).to(device)
        modules.append(reference)
        seed = (0, "noise", 1, 1, "joint")
        models = scorer, reference
        steps["dnpo"] = partial(
            dnpo.descend, dnpo.Config(**same), "joint", *models, **of_all, seed=seed
        )
    if c.vs == "trl":
        steps.update(trl_steps(c, work, loaded.tok))

    asked = list(c.rows)
    if c.vs == "trl":
        asked += ["trl", "trl+ac"]
    return {row: steps[row] for row in asked}, modules


def make_work(c, how: sams.Config, loaded: Loaded, device) -> Work:
    """The policy with its reference's log-probs, a little away from it."""
    if loaded.lm is None:
        policy = sams.shard(sams.PoolingScorer, c.model, how, device)
    else:
        policy = sams.PoolingScorer(loaded.lm)
    everything = list(range(len(loaded.pairs)))
    ref_logps, _ = sams.observe(how, policy, loaded.pairs, everything, device)
    move_away(policy.lm)
    data = sams.Data(loaded.pairs, ref_logps, [False] * len(loaded.pairs))
    return Work(how, policy, data, everything, device)


def unpadded(pairs: list[Pair], device) -> Tensor:
    """The pairs' tokens in as many sequences as the other rows have, none padded. [2n, T]."""
    tokens = []
    for pair in pairs:
        tokens += pair.prompt + pair.chosen
    for pair in pairs:
        tokens += pair.prompt + pair.rejected
    sequences = 2 * len(pairs)
    length = len(tokens) // sequences
    return torch.tensor(tokens[: length * sequences], device=device).view(sequences, length)


def floor(work: Work, ids: Tensor):
    for some_ids in ids.split(2 * work.how.micro_batch):
        with sams.autocast(work.how, work.device, work.policy):
            out = common.backbone(work.policy.lm)(input_ids=some_ids, use_cache=False)
            out.last_hidden_state.float().mean().backward()


def dpo(work: Work) -> Tensor:
    """Returns the loss."""
    sums = sams.descend(work.how, work.policy, work.data, work.everything, work.device)
    return sums["loss"]


def wrapped(wrap: Callable, step: Callable, work: Work, *more):
    """Another row's step, with the policy's layers wrapped."""
    with layers_wrapped(work.policy.lm, wrap):
        step(work, *more)


def choose_and_train(work: Work, bandit: sams.Bandit):
    """A round of SamS."""
    chosen = choose(work, bandit, observe(work))
    sams.descend(work.how, work.policy, work.data, chosen, work.device)


def observe(work: Work) -> sams.Seen:
    how = work.how
    return sams.observe(
        how, work.policy, work.data.pairs, work.everything, work.device, how.context
    )


def choose(work: Work, bandit: sams.Bandit, seen: sams.Seen) -> list[int]:
    """The selector learns from its last round and picks."""
    places, _ = sams.pick(work.how, work.data, seen, bandit, step=0)
    return places


def busy_bandit(work: Work, frozen: bool) -> sams.Bandit:
    """A bandit with so many past rounds as it is fitted on, as in the middle of a training."""
    bandit = sams.make_bandit(work.how, work.policy, work.device)
    if frozen:
        bandit.freeze_encoder(bandit.selector.encoder.state_dict())
    seen = observe(work)
    for _ in range(2):  # the second learns from the first, which joins the pool
        choose(work, bandit, seen)
    bandit.pool.rounds *= work.how.replay
    return bandit


# ---------------------------------------------------------------- TRL


def trl_steps(c, work: Work, tok) -> dict[str, Callable]:
    """TRL's loss on the identical pairs. It must agree with ours, or the comparison is void."""
    lm, device = work.policy.lm, work.device
    trainer = make_trainer(c, lm, tok, len(work.data.pairs), device)
    batch = trainer._prepare_inputs(trainer.data_collator(trl_rows(work.data)))

    def step():
        # as accelerate does around a prepared model
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            loss = trainer.compute_loss(lm, batch)
        loss.backward()
        return loss.detach()

    def step_checkpointed():
        lm.train()
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        step()
        lm.gradient_checkpointing_disable()
        lm.eval()

    theirs = step().item()
    ours = dpo(work).item()
    print(f"loss: ours {ours:.4f}, TRL's {theirs:.4f}")
    tolerance = 0.05 if c.dtype == "bfloat16" else 1e-3
    if abs(theirs - ours) > tolerance:
        job.die(f"TRL's loss {theirs} is not ours {ours}: the rows would not be comparable")
    return {"trl": step, "trl+ac": step_checkpointed}


def make_trainer(c, lm, tok, batch: int, device):
    """A DPOTrainer of the model. It wants a data set, which is not used."""
    try:
        import trl
        from datasets import Dataset
    except ImportError:
        job.die("--vs trl needs trl: pip install trl")
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    args = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        beta=0.1,
        use_cpu=device.type == "cpu",
        bf16=c.dtype == "bfloat16",
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return trl.DPOTrainer(
        model=lm, args=args, train_dataset=Dataset.from_list([row]), processing_class=tok
    )


def trl_rows(data: sams.Data) -> list[dict]:
    """The pairs as TRL's collator takes them, with our log-probs of the reference."""
    rows = []
    for pair, (chosen_logp, rejected_logp) in zip(data.pairs, data.ref_logps.tolist()):
        row = {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "ref_chosen_logps": chosen_logp,
            "ref_rejected_logps": rejected_logp,
        }
        rows.append(row)
    return rows


# ---------------------------------------------------------------- a setting


def measure(c, rank: int = 0, meeting: str = "") -> dict:
    """Measures all rows of one setting, on one of its ranks, which meet in the file `meeting`.

    Returns what is written to --out: {"device", "tokens", "gradients_mib", "peak_flops", "rows"}.
    """
    device = enter(c, rank, meeting)
    common.CHUNK = c.chunk
    job.keep_freed_blocks(False)
    loaded = load(c, device)
    steps, modules = make_steps(c, loaded, device)

    # what is made once, as compiled code is, belongs to no step
    for step in job.progress(steps.values(), "first steps"):
        step()

    # memory before time: a heap with holes would hide growth, or make it
    memory = {}
    for row, step in job.progress(steps.items(), "memory"):
        memory[row] = peak(step, modules, device)

    job.keep_freed_blocks(True)
    for step in job.progress(steps.values(), "warm up"):
        step()
    times = {row: [] for row in steps}
    for _ in job.progress(range(c.repeats), "time"):
        for row, step in steps.items():
            times[row].append(seconds(step, modules, device))

    lm = modules[0].lm
    tokens = sum(len(pair.prompt) + pair.tokens for pair in loaded.pairs)  # the prompt counts twice
    peak_flops = peak_of(device)
    ideal = None
    if peak_flops:
        ideal = model_flops(lm, loaded.pairs, tokens) / peak_flops / c.ranks
    return {
        "device": device_note(device),
        "tokens": tokens,
        "gradients_mib": sum(p.numel() * 4 for p in lm.parameters()) / 2**20 / c.ranks,
        "peak_flops": peak_flops,
        "rows": summarise(times, memory, tokens, ideal),
    }


def enter(c, rank: int = 0, meeting: str = "") -> torch.device:
    """Joins the other ranks, if there are any, and returns this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(meeting, c.ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=c.ranks)
    return device


def peak_of(device) -> float | None:
    """The FLOP/s that the device can do at most, if we know."""
    if device.type != "cuda":
        return None
    for name, flops in PEAK.items():
        if name in torch.cuda.get_device_name():
            return flops
    return None


def device_note(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return f"CPU, {threads} thread{plural}"


def model_flops(lm, pairs: list[Pair], tokens: int) -> float:
    """FLOPs of a forward and a backward pass over all tokens, as the top of this file counts them.

    They are (6 N + 6 L D T) a token; T is the longest sequence.
    """
    config = lm.config.get_text_config(decoder=True)
    N = sum(p.numel() for p in lm.parameters())
    if not lm.config.tie_word_embeddings:
        N -= lm.get_input_embeddings().weight.numel()
    T = 0
    for pair in pairs:
        longer = max(len(pair.chosen), len(pair.rejected))
        T = max(T, len(pair.prompt) + longer)
    return tokens * (6 * N + 6 * config.num_hidden_layers * config.hidden_size * T)


def summarise(
    times: dict[str, list[float]],
    memory: dict[str, float | None],
    tokens: int,
    ideal: float | None,
) -> dict[str, dict]:
    """The numbers of each row. ideal: seconds of a step at the device's peak, None if unknown."""
    median = {row: statistics.median(measured) for row, measured in times.items()}
    rows = {}
    for row, measured in times.items():
        numbers = {
            "seconds": median[row],
            "spread": (max(measured) - min(measured)) / median[row],
            "peak_mib": memory[row],
            "vs_floor": None,
            "vs_trl": None,
            "tokens_per_second": tokens / median[row],
            "mfu": None,
        }
        for other in ("floor", "trl"):
            if other in median:
                numbers[f"vs_{other}"] = median[row] / median[other]
        # SamS trains on fewer tokens, and the floor has no head
        if ideal and row != "floor" and not row.startswith("sams"):
            numbers["mfu"] = ideal / median[row]
        rows[row] = numbers
    return rows


def apart(c) -> dict:
    """measure() in new processes: what another setting has left in the heap would count.

    A row's memory is that of the rank that needs most.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(c.ranks, spawn) as pool:
        on_rank = partial(measure, c, meeting=f"{folder}/store")
        of_ranks = list(pool.map(on_rank, range(c.ranks)))

    found = of_ranks[0]
    for name, row in found["rows"].items():
        for other in of_ranks[1:]:
            if row["peak_mib"] is not None:
                row["peak_mib"] = max(row["peak_mib"], other["rows"][name]["peak_mib"])
    return found


# ---------------------------------------------------------------- sampling


def measure_sampling(c) -> dict:
    """Measures generate() and ours on the same prompts. Returns what is written to --out."""
    device = enter(c)
    job.keep_freed_blocks(True)
    tok, config = common.load_tokenizer(c.model)
    rows, _ = datafiles.load_rows(c.data, "prompt", c.sample)
    room = common.context_of(config) - c.max_response
    rows = common.fitting(tok, rows, min(c.max_prompt, room))
    if not rows:
        job.die(f"{c.data}: no prompt has at most {min(c.max_prompt, room)} tokens")
    prompts = [common.prompt_ids(tok, row["prompt"]) for row in rows]
    lm = common.load_lm(c.model, getattr(torch, c.dtype), device)

    ways = {"generate": plain_generate, "ours": our_sampling}
    for way in ways.values():  # warm up
        way(c, lm, tok, prompts[:1])
    times = {row: [] for row in ways}
    drawn = {}
    for _ in job.progress(range(c.repeats), "time"):
        for row, way in ways.items():
            with recording(lm) as drawn[row]:
                started = time.perf_counter()
                way(c, lm, tok, prompts)
                times[row].append(time.perf_counter() - started)

    found = {}
    for row, measured in times.items():
        tokens, decoded = count(drawn[row], common.end_tokens(lm, tok))
        median = statistics.median(measured)
        found[row] = {
            "seconds": median,
            "spread": (max(measured) - min(measured)) / median,
            "tokens": tokens,
            "tokens_per_second": tokens / median,
            "finished": 1 - tokens / decoded,
        }
    return {"device": device_note(device), "prompts": len(prompts), "rows": found}


@contextlib.contextmanager
def recording(lm):
    """Inside, what generate() has decoded is kept: the answers' ids [S, T] of each call."""
    batches = []
    generate = lm.generate

    def recorded(input_ids, **how):
        sequences = generate(input_ids=input_ids, **how)
        batches.append(sequences[:, input_ids.shape[1] :])
        return sequences

    lm.generate = recorded
    yield batches
    del lm.generate


def count(batches: list[Tensor], ends: set[int]) -> tuple[int, int]:
    """Tokens of all answers, their ends included, and all tokens that were decoded for them."""
    tokens, decoded = 0, 0
    for batch in batches:
        decoded += batch.numel()
        for answer in batch.tolist():
            stops = [place for place, token in enumerate(answer) if token in ends]
            tokens += stops[0] + 1 if stops else len(answer)
    return tokens, decoded


def batches_of(prompts: list, c) -> list[list]:
    """The prompts, --sample_batch at a time."""
    return [prompts[i : i + c.sample_batch] for i in range(0, len(prompts), c.sample_batch)]


def plain_generate(c, lm, tok, prompts: list[list[int]]):
    """Draws answers as transformers' documentation does: padded batches in the file's order."""
    tok.pad_token = tok.pad_token or tok.eos_token
    torch.manual_seed(0)
    for batch in batches_of(prompts, c):
        inputs = tok.pad({"input_ids": batch}, padding_side="left", return_tensors="pt")
        sequences = lm.generate(
            **inputs.to(lm.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=c.max_response,
            eos_token_id=sorted(common.end_tokens(lm, tok)),
        )
        answers = sequences[:, inputs["input_ids"].shape[1] :]
        tok.batch_decode(answers, skip_special_tokens=True)


def our_sampling(c, lm, tok, prompts: list[list[int]]):
    """Draws answers as generate.py does: batches by length, each with a seed of its own."""
    for number, batch in enumerate(batches_of(sorted(prompts, key=len), c)):
        common.sample(lm, tok, batch, 1.0, c.max_response, job.seed_of(0, number))


# ---------------------------------------------------------------- what is asked for


def main():
    c = job.parse(Config)
    check(c)
    if c.sweep:
        sweep(c)
    elif c.sample:
        sample(c)
    else:
        compare(c)


def check(c):
    """Ends the program if the flags ask for what can't be measured."""
    unknown = set(c.rows) - {*ROWS, *ONLY_IF_ASKED} | set(c.sweep) - set(SWEEPS)
    if unknown:
        job.die(f"{' '.join(sorted(unknown))}: no such row or sweep")

    if c.sample and (c.shape or c.vs or c.sweep or c.ranks > 1):
        job.die("--sample goes with a --model and one process, not with --shape, --vs or --sweep")

    needs_tokenizer = c.vs or not (c.length or c.sweep)
    if c.shape and needs_tokenizer:
        job.die("--shape has no tokenizer for --data and --vs: give --length, or a --model")

    if c.ranks > 1 or "ranks" in c.sweep:
        if c.shape or c.vs or set(c.rows) - set(ROWS_OF_RANKS):
            job.die("several ranks need a --model, and --rows of dpo, dpo+ac and sams")
        ranks = max(SWEEPS["ranks"]) if "ranks" in c.sweep else c.ranks
        if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
            devices = torch.cuda.device_count()
            job.die(f"{ranks} ranks need as many GPUs, here are {devices}")


def compare(c):
    """Measures all rows in one setting: a table, and --out."""
    found = apart(c)
    ranks = f" x {c.ranks} ranks" if c.ranks > 1 else ""
    columns = ["row", "seconds", "spread", "peak_mib", "vs_floor", "vs_trl", "tokens_per_second"]
    mfu = "no MFU: peak unknown"
    if found["peak_flops"]:
        mfu = f"MFU of a peak of {found['peak_flops'] / 1e12:.0f} TFLOP/s"
        columns.append("mfu")
    print(
        f"{c.shape or c.model} · {c.pairs} pairs, {found['tokens']} tokens · {c.dtype}"
        f" · {c.micro_batch or c.pairs} pairs a pass · {found['device']}{ranks}"
        f" · gradients {found['gradients_mib']:.0f} MiB · {mfu}"
    )
    rows = [{"row": name, **numbers} for name, numbers in found["rows"].items()]
    print(job.table(rows, columns))
    write(Path(c.out), found)


def sample(c):
    """Measures sampling: a table, and --out."""
    found = measure_sampling(c)
    print(
        f"{c.model} · {found['prompts']} prompts, {c.sample_batch} at a time, answers of at most"
        f" {c.max_response} tokens · {c.dtype} · {found['device']}"
    )
    rows = [{"row": name, **numbers} for name, numbers in found["rows"].items()]
    columns = ["row", "seconds", "spread", "tokens", "tokens_per_second", "finished"]
    print(job.table(rows, columns))
    write(Path(c.out), found)


def sweep(c):
    """Measures all rows in the settings of each sweep: a table for every row, and *-sweep.json."""
    out = Path(c.out)
    base = dataclasses.replace(c, length=c.length or 512)
    found = {}
    for axis in c.sweep:
        of_axis = {}
        for value in job.progress(SWEEPS[axis], f"sweep {axis}"):
            of_axis[value] = apart(dataclasses.replace(base, **{axis: value}))["rows"]
        found[axis] = of_axis
        for row in c.rows:
            rows = [{axis: value, **numbers[row]} for value, numbers in of_axis.items()]
            print(f"{axis}: {row}\n" + job.table(rows, [axis, "seconds", "peak_mib"]))
        write(out.with_name(f"{out.stem}-sweep.json"), {"sweep": found})


def write(path: Path, found: dict):
    """Writes what was found, with the command and torch's version in front."""
    head = {"argv": sys.argv[1:], "torch": torch.__version__}
    job.write_atomic(path, json.dumps({**head, **found}, indent=1))


if __name__ == "__main__":
    main()
