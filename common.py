"""What dnpo.py, tso.py and sams.py share because it has one right answer: rows -> ids and masks -> log-probs; sampling;
judges and their prompts; and, last and short, flags, files and the metric line. Nothing here knows which method calls it.

Shapes: B pairs, S sequences (2B: chosen first, then rejected), N response tokens, T length, V vocabulary, D width,
L layers, K selected. Log-probs are natural (nats) and fp32.

A row is {"id", "prompt": [messages], "response" | "chosen" + "rejected", "meta"}; texts are plain strings. Text is the only
interface between phases: both sides of a pair are tokenised by the same function, so that neither can be told from the
other by its tokens, and a model with another tokenizer can join.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CHUNK = 512  # response tokens whose logits [CHUNK, V] are alive at a time: more weigh more, fewer make the head slower


def die(message: str) -> typing.NoReturn:
    """Ends the program with one line on stderr (rank 0's only) and exit code 2: the input is wrong, not the program."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def seed_of(*parts) -> int:
    """A 63-bit seed from anything printable: randomness belongs to what is drawn (an iteration, a step, a row), not to who draws it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------- rows

SHAPES = ('{"messages": [...]}, {"prompt", "response"}, {"prompt", "completion"}, {"instruction", "input", "output"}, {"question", "answer"}, '
          '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"} or {"real", "generated"}')


def load_rows(spec: str, need: str, limit: int | None = None) -> tuple[list[dict], Counter]:
    """Rows of one shape from a .jsonl/.json/.parquet file, a data set folder or a Hub id (`NAME` or `NAME:SPLIT`).

    need: "prompt", "response" (a pair's chosen side counts as one) or "pair". Ids are stable: the data's own `id` or
    `prompt_id`, else a hash of the content. -> rows, and counts of those left out by reason.
    Errors: a file with a faulty row ends the program naming file and line; in a Hub data set, which nobody can mend
    from here, such rows are left out and counted."""
    local = Path(spec).suffix in (".jsonl", ".json", ".parquet")
    rows, taken, seen, dropped = [], set(), set(), Counter()
    for where, raw in read_file(Path(spec)) if local else read_hub(spec):
        try:
            row = normalise(raw, need)
        except ValueError as fault:
            if local or "columns" in str(fault):
                die(f"{where}: {fault}")
            dropped[str(fault).split(":")[0]] += 1
            continue
        content = {k: row[k] for k in ("prompt", "response", "chosen", "rejected") if k in row}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
        name = str(next(x for x in (raw.get("id"), raw.get("prompt_id"), digest) if x is not None))
        if (name, digest) in seen:
            dropped["repeated rows"] += 1
            continue
        seen.add((name, digest))
        name = next(x for x in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if x not in taken)
        taken.add(name)
        rows.append({"id": name} | row)
        if limit and len(rows) == limit:
            break
    if not rows:
        die(f"{spec}: no rows" + "".join(f"; {n} left out: {why}" for why, n in dropped.items()))
    return rows, dropped


def read_file(path: Path):
    """(where, raw row) of each row; `where` is FILE:LINE, for messages."""
    if not path.is_file():
        die(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            table = pyarrow.parquet.read_table(path)
        except Exception as fault:
            die(f"{path}: not a parquet file ({str(fault).splitlines()[0]})")
        yield from ((f"{path}: row {i}", raw) for i, raw in enumerate(table.to_pylist(), 1))
        return
    data = path.read_bytes()
    if b"\0" in data:
        die(f"{path}: a binary file, not JSON lines")
    try:
        text = data.decode()
    except UnicodeDecodeError as fault:
        die(f"{path}:{data[:fault.start].count(10) + 1}: not valid UTF-8 (byte {data[fault.start]:#04x})")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            yield from ((f"{path}: item {i}", raw) for i, raw in enumerate(json.loads(text), 1))
        except json.JSONDecodeError as fault:
            die(f"{path}:{fault.lineno}: broken JSON ({fault.msg})")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as fault:
                die(f"{path}:{number}: broken JSON ({fault.msg})")


def read_hub(spec: str):
    """The same from a Hub id or a folder, by the `datasets` library; NAME:SPLIT picks the split (default: train)."""
    import datasets
    datasets.disable_progress_bars()  # on stderr, where one clear line is promised
    name, _, split = spec.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as fault:
        die(f"{spec}: neither a .jsonl/.json/.parquet file nor a data set that can be loaded ({str(fault).splitlines()[0]})")
    yield from ((f"{spec}: row {i}", raw) for i, raw in enumerate(data, 1))


def normalise(raw: dict, need: str) -> dict:
    """One raw row in any known shape -> {"prompt", "response" | "chosen" + "rejected", "meta"}. ValueError says what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, found {type(raw).__name__}")
    pick = lambda *names: next((raw[n] for n in names if raw.get(n) is not None), None)
    prompt, response = pick("prompt", "question", "instruction"), pick("response", "completion", "output", "answer")
    chosen, rejected = pick("chosen", "real"), pick("rejected", "generated")
    if raw.get("instruction") is not None and raw.get("input"):
        prompt = f"{raw['instruction']}\n\n{raw['input']}"
    context = turns(prompt) if prompt is not None else None
    if need != "pair" and response is None and chosen is None and pick("messages"):
        talk = turns(raw["messages"])  # the first exchange, as SPIN and DNPO use UltraChat
        cut = next((i for i, m in enumerate(talk) if m["role"] == "assistant"), len(talk))
        context, response = talk[:cut], talk[cut]["content"] if cut < len(talk) else None
    if need != "pair" and response is None:
        response, rejected = chosen, None
    sides = {"pair": {"chosen": chosen, "rejected": rejected}, "response": {"response": response}, "prompt": {}}[need]
    if need == "prompt" and chosen is not None:
        context, _ = split_answer(context, chosen)
    if None in sides.values() or (context is None and not sides):
        raise ValueError(f"columns {sorted(raw)} make no {need}; expected one of {SHAPES}, for example "
                         '{"prompt": "Sort: b a", "response": "a b"}')
    answers = {name: split_answer(context, side) for name, side in sides.items()}
    contexts = [c for c, _ in answers.values()] or [context]
    if any(c != contexts[0] for c in contexts):
        raise ValueError("chosen and rejected have different prompts")
    roles = [m["role"] for m in contexts[0] if m["role"] != "system" or m is not contexts[0][0]]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(f"roles out of order: {[m['role'] for m in contexts[0]]} (an optional system turn, then user and assistant in turn, user last)")
    if not all(m["content"].strip() for m in contexts[0]):
        raise ValueError("empty prompt")
    if any(not text.strip() for _, text in answers.values()):
        raise ValueError("empty response")
    if any("\ud800" <= x <= "\udfff" for text in [m["content"] for m in contexts[0]] + [text for _, text in answers.values()] for x in text):
        raise ValueError("not valid Unicode: half of a surrogate pair")
    return {"prompt": contexts[0]} | {name: text for name, (_, text) in answers.items()} | {"meta": raw.get("meta") or {}}


def turns(value) -> list[dict]:
    """A string, HH-RLHF text ("\\n\\nHuman: ... \\n\\nAssistant: ...") or a list of messages -> messages."""
    if isinstance(value, str):
        if not value.startswith("\n\nHuman:"):
            return [{"role": "user", "content": value}]
        parts = re.split(r"\n\n(Human|Assistant):", value)
        talk = [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
        return talk[:-1] if talk[-1] == {"role": "assistant", "content": ""} else talk
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value) or not value:
        raise ValueError('a prompt or response must be text or a list of {"role", "content"}')
    return [{"role": m["role"], "content": m["content"]} for m in value]


def split_answer(context: list[dict] | None, side) -> tuple[list[dict], str]:
    """One side of a row -> its prompt and its answer; a side that repeats the prompt brings its own."""
    if isinstance(side, str) and not side.startswith("\n\nHuman:"):
        if context is None:
            raise ValueError(f"columns: an answer without a prompt; expected one of {SHAPES}")
        return context, side
    talk = turns(side)
    if talk[-1]["role"] != "assistant":
        raise ValueError("roles out of order: the last turn of an answer must be the assistant's")
    return ((context or []) if talk[0]["role"] == "assistant" else []) + talk[:-1], talk[-1]["content"]


def hold_out(rows: list[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """-> (train, held out), split by a hash of the prompt: the same prompt never stands on both sides, in any run."""
    held = lambda row: seed_of(row["prompt"]) % 1000 < 1000 * share
    return [r for r in rows if not held(r)], [r for r in rows if held(r)]


# ---------------------------------------------------------------- ids, masks, log-probs


def load_tokenizer(path: str):
    """(tokenizer, config) of a model path or Hub id, checked to be usable for chat, before any weights are read."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()  # ours are enough
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        die(f"{path}: not a model (no config.json)")
    try:
        config, tok = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except Exception as fault:
        die(f"{path}: neither a model folder nor a Hub model that can be loaded ({str(fault).splitlines()[0]})")
    if tok.chat_template is None:
        die(f"{path}: its tokenizer has no chat template; save one with it (chat_template.jinja beside tokenizer.json)")
    if tok.eos_token_id is None:
        die(f"{path}: its tokenizer has no end-of-sequence token")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            die(f"{path}: {name} is not supported: the head is applied to response positions as a plain linear layer")
    return tok, config


def prompt_ids(tok, prompt: list[dict]) -> list[int]:
    """Ids of the chat template's rendering, the assistant's header included. The same for training, sampling and judging."""
    from jinja2 import TemplateError
    try:
        return tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    except TemplateError as fault:
        die(f"the chat template refuses a prompt of {[m['role'] for m in prompt]}: {fault}")


def response_ids(tok, text: str, ended: bool, limit: int) -> list[int]:
    """Ids of a response [<= limit], with the end-of-sequence token if it ended by itself and was not cut here."""
    encode = lambda s: tok(s, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # "<eos>" in a text stays text
    # after a newline, because that is where chat templates put it: SentencePiece models start a fresh text with a space
    anchor, whole = encode("\n"), encode("\n" + text)
    ids = whole[len(anchor):] if whole[:len(anchor)] == anchor else encode(text)
    return ids[:limit] + ([tok.eos_token_id] if ended and len(ids) < limit else [])


def encode_pairs(tok, rows: list[dict], max_prompt: int, max_response: int) -> tuple[list[tuple], Counter]:
    """Preference rows -> (prompt ids, chosen ids, rejected ids, row id); pairs that teach nothing are left out and counted.
    meta.chosen_ended / rejected_ended = False says that a side was cut and gets no end-of-sequence token."""
    pairs, dropped = [], Counter()
    for row in rows:
        p = prompt_ids(tok, row["prompt"])
        y, z = (response_ids(tok, row[side], row["meta"].get(f"{side}_ended", True), max_response) for side in ("chosen", "rejected"))
        why = "prompt too long" if len(p) > max_prompt else "empty side" if not (y and z) else "identical sides" if y == z else None
        if why:
            dropped[why] += 1
        else:
            pairs.append((p, y, z, row["id"]))
    return pairs, dropped


def collate(sequences: list[tuple[list[int], list[int]]], device) -> tuple[Tensor, Tensor]:
    """(prompt ids, response ids) of S sequences -> ids [S, T], padded on the right, and mask [S, T], True on the response.
    The mask comes from lengths, never from `!= pad`: pad is often the end-of-sequence token."""
    width = max(len(p) + len(r) for p, r in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (p, r) in enumerate(sequences):
        ids[i, :len(p) + len(r)] = torch.tensor(p + r)
        mask[i, len(p):len(p) + len(r)] = True
    return ids.to(device), mask.to(device)


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(z)[y], z: logits [N, V], y: targets [N] -> [N] fp32. As target - logsumexp: fp32 log_softmax is biased on a CPU."""
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class Scorer(nn.Module):
    """log pi(y|x) = sum over response tokens of log pi(y_t | x, y_<t). Backbone and head in one forward: this is what DDP and FSDP wrap."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def hidden(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask [S, T] -> last hidden states [N, D] at the positions that predict the response, targets [N], sequence index [N].
        No attention mask: the padding is on the right of a causal model."""
        states = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [S, T-1, D]
        keep = mask[:, 1:]  # the state at t predicts token t+1
        return states[keep], ids[:, 1:][keep], keep.nonzero()[:, 0]

    def head(self, h: Tensor, targets: Tensor) -> Tensor:
        """States [N, D], targets [N] -> log-probs [N], CHUNK tokens at a time, logits recomputed in the backward pass."""
        f = lambda h, y: token_logps(self.lm.lm_head(h), y)
        if len(h) <= CHUNK:
            return f(h, targets)
        return torch.cat([checkpoint(f, a, y, use_reentrant=False) for a, y in zip(h.split(CHUNK), targets.split(CHUNK))])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [S, T] -> log pi(y|x) [S]."""
        h, targets, row = self.hidden(ids, mask)
        return h.new_zeros(len(ids), dtype=torch.float32).index_add(0, row, self.head(h, targets))


# ---------------------------------------------------------------- sampling, and phases that leave files


def lm_shapes(path: str):
    """A causal LM in float32 without its weights, on "meta"."""
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()


def load_lm(path: str, dtype: torch.dtype, device):
    """A causal LM without dropout: policy and reference must be the same function. Nothing is inherited from its generation_config
    but the end tokens: top_k, repetition penalties and the like would make a sample not the model's own."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    lm.generation_config = GenerationConfig(eos_token_id=lm.generation_config.eos_token_id, pad_token_id=0)
    return lm.to(device).eval()


@torch.no_grad()
def sample(lm, tok, prompts: list[list[int]], temperature: float, max_new_tokens: int, seed: int, allowed: list[int] | None = None) -> list[tuple[str, str]]:
    """y ~ pi(.|x)^(1/temperature) for prompts as ids (greedy at 0), of `allowed` tokens only if given -> (text, "stop" | "length") each. Seeded per call."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=lm.device)  # left: the last column is always a prompt's
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    ends = lm.generation_config.eos_token_id
    ends = {tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else dict(do_sample=False)
    if allowed:
        how["prefix_allowed_tokens_fn"] = lambda sequence, ids: allowed
    torch.manual_seed(seed)
    out = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), **how)
    answers = []
    for new in out[:, width:].tolist():
        stop = next((i for i, t in enumerate(new) if t in ends), None)
        text = tok.decode(new[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append((text, "length" if stop is None else "stop"))
    return answers


STOP = threading.Event()  # SIGTERM has come: save and end


def stop_on_sigterm():
    """Pre-emption: the first SIGTERM lets a training step or a batch of a phase end and be saved; then the program ends with exit code 0."""
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())


def stopped() -> typing.NoReturn:
    """Ends the program because of SIGTERM; what was done is saved."""
    if ranks()[0] == 0:
        print("SIGTERM: what is done is saved; go on with --resume", file=sys.stderr)
    sys.exit(0)


def ranks() -> tuple[int, int]:
    """(rank, world size), (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def torchrun_store() -> dict:
    """Where torchrun's ranks meet, for init_process_group; another place after every restart, or gloo would call the dead ranks' addresses.
    Phases differ in length from rank to rank (a slow judge, a long answer): waiting is no fault, and a dead rank ends the run through torchrun."""
    patience = datetime.timedelta(days=2)
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(patience)  # NCCL's ranks wait here for their first collective
    return {"store": dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store), "rank": rank, "world_size": world, "timeout": patience}


def barrier():
    if dist.is_initialized():
        dist.barrier()


def phase(path: Path, items: list, work, size: int, settings=None, key=None, note: str = "") -> list[dict]:
    """Maps items to rows, one for one, in `path` (JSON lines, in the items' order), on all ranks, and returns the rows.

    work(batch of items, the batch's number) -> their rows. Batches of `size` (neighbours under `key`, so that lengths match)
    and their numbers are the same for any number of ranks and interruptions. Every finished batch is a line in
    PATH.partRANK; a killed phase goes on from there, a finished one is only read. `settings` guards against going
    on with others."""
    rank, world = ranks()
    if not path.exists():
        order = sorted(range(len(items)), key=lambda i: key(items[i])) if key else list(range(len(items)))
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        stamp = f"{seed_of(settings, size, [str(i) for i in items]):016x}"
        done = read_parts(path, stamp)
        barrier()  # no rank writes before all have read
        mine = [b for b in range(len(batches)) if b not in done][rank::world]
        part = path.with_name(f"{path.name}.part{rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a") as file:
            file.write("\n")  # ends a line that a kill may have torn
            for b in progress(mine, f"{note or path.stem} ({world} rank{'s' * (world > 1)}, batches of {size})"):
                if STOP.is_set():
                    stopped()
                rows = work([items[i] for i in batches[b]], b)
                file.write(json.dumps({"stamp": stamp, "batch": b, "rows": rows}, ensure_ascii=False) + "\n")
                file.flush()
        barrier()
        if rank == 0:
            done = read_parts(path, stamp)
            rows = dict(zip(itertools.chain(*batches), itertools.chain(*(done[b] for b in range(len(batches))))))
            write_atomic(path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in range(len(items))))
        barrier()
    if rank == 0:
        for old in path.parent.glob(f"{path.name}.part*"):
            old.unlink()
    return read_jsonl(path)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file of ours. Only "\\n" ends a line: str.splitlines would cut texts at U+2028 and its like."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def generate(out: Path, rows: list[dict], model: str, tok, *, temperature: float, max_new_tokens: int, batch: int, dtype: torch.dtype, device, seed: int,
             n: int = 1, note: str = "") -> list[dict]:
    """n answers to each row's prompt into `out`, on all ranks: {"id", "prompt", "response", "meta": {"sample", "finish"}} each.
    The model is loaded only if there is something left to do."""
    lm, prompts = None, [prompt_ids(tok, row["prompt"]) for row in rows]

    def work(items, number):
        nonlocal lm
        lm = lm or load_lm(model, dtype, device)
        drawn = sample(lm, tok, [prompts[i] for i, _ in items], temperature, max_new_tokens, seed_of(seed, number))
        return [{"id": rows[i]["id"], "prompt": rows[i]["prompt"], "response": text, "meta": {"sample": j, "finish": finish}}
                for (i, j), (text, finish) in zip(items, drawn)]
    settings = [model, temperature, max_new_tokens, str(dtype), seed, [row["id"] for row in rows]]
    return phase(out, [(i, j) for i in range(len(rows)) for j in range(n)], work, batch, settings, key=lambda item: len(prompts[item[0]]), note=note)


def held_out(folder: Path, rows: list[dict], model: str, tok, judge, *, note: str = "", **sampling) -> dict:
    """What a model is worth: one answer to each held-out prompt and the judge's scores of it and of the annotation, in folder/test.jsonl;
    -> mean score, share of full marks, win/tie/loss of the answers against the annotations, share of answers that were cut (None without a judge)."""
    drawn = generate(folder / "answers.jsonl", rows, model, tok, note=f"{note}answer held-out prompts", **sampling)

    def work(items, number):
        new, own = (judge.score([(rows[i]["prompt"], side[i]["response"]) for i in items]) if judge else [None] * len(items) for side in (drawn, rows))
        return [drawn[i] | {"annotated": rows[i]["response"], "meta": drawn[i]["meta"] | {"score": s, "score_annotated": t}} for i, s, t in zip(items, new, own)]
    tested = phase(folder / "test.jsonl", list(range(len(rows))), work, sampling["batch"], [judge and judge.spec, model], note=f"{note}judge")
    scores = [(row["meta"]["score"], row["meta"]["score_annotated"]) for row in tested if None not in (row["meta"]["score"], row["meta"]["score_annotated"])]
    share = lambda test: sum(test(s, t) for s, t in scores) / len(scores) if scores else None
    return {"score": share(lambda s, t: s), "full_marks": share(lambda s, t: s >= judge.full) if judge and judge.full else None, "win": share(lambda s, t: s > t),
            "tie": share(lambda s, t: s == t), "loss": share(lambda s, t: s < t), "cut": sum(row["meta"]["finish"] == "length" for row in tested) / len(tested)}


def read_parts(path: Path, stamp: str) -> dict[int, list]:
    """batch -> rows of every whole line in PATH.part*; ends the program if they were begun with other settings."""
    done = {}
    for part in sorted(path.parent.glob(f"{path.name}.part*")):
        for line in part.read_text(errors="replace").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):  # a torn line: its batch is done again
                entry = json.loads(line)
                if entry["stamp"] != stamp:
                    die(f"{part} was begun with other settings or data: delete it, or write somewhere else")
                done[entry["batch"]] = entry["rows"]
    return done


def write_atomic(path: Path, text: str):
    """The whole file or nothing: a kill leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def progress(items, note: str):
    """A progress bar on rank 0, none where nobody looks."""
    from tqdm import tqdm
    return tqdm(items, desc=note, leave=False, disable=None if ranks()[0] == 0 else True)


# ---------------------------------------------------------------- judges

SCORE_PROMPT = """Rate how well the response answers the instruction: is it correct, complete, clear and helpful? Length and style alone earn nothing.
Answer with a whole number from 1 (useless) to 10 (could not be better), exactly in the form: Rating: [[n]]

[Instruction]
{prompt}

[Response]
{a}"""
COMPARE_PROMPT = """Which of two responses answers the instruction better: more correct, complete, clear and helpful? Length, style and order earn nothing.
Answer exactly in the form: Verdict: [[A]], Verdict: [[B]], or Verdict: [[tie]] if neither is better.

[Instruction]
{prompt}

[Response A]
{a}

[Response B]
{b}"""
API_CONCURRENCY, API_RETRIES, API_TIMEOUT = 8, 6, 60  # requests in flight, tries after the first, seconds


def read_score(text: str) -> float | None:
    """The last [[n]] of a judge's answer if 1 <= n <= 10, else None. Never a default: what can't be read is not a score."""
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def read_verdict(text: str) -> str | None:
    """The last [[A]], [[B]] or [[tie]] of a judge's answer, else None."""
    found = re.findall(r"\[\[\s*(A|B|tie)\s*\]\]", text, re.I)
    return {"A": "A", "B": "B", "TIE": "tie"}[found[-1].upper()] if found else None


class Judge:
    """score(items) and compare(items) for a list of items; an answer is cached in `cache` (a folder) once it could be read.

    Subclasses give ask(kind, items, again) -> one value or None each, kind "score" for items (prompt, a), "compare" for
    (prompt, a, b); prompt is a list of messages. Scores of text judges are 1..10; a reward model's are its own."""
    full: float | None = 10.0  # full marks, None where the scale has no end
    orders = True  # ask compare() in both orders
    fault: str | None = None  # why no more questions can be asked

    def __init__(self, spec: str, cache: Path | None):
        self.spec, self.asked, self.unreadable, self.known = spec, 0, 0, {}
        self.file = cache / f"rank{ranks()[0]}.jsonl" if cache else None
        for file in sorted(cache.glob("*.jsonl")) if cache else []:
            for line in file.read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a torn line
                    self.known |= [json.loads(line)].pop()

    def ask(self, kind: str, items: list[tuple], again: bool) -> list:
        raise TypeError("a judge must say how it answers")

    def answers(self, kind: str, items: list[tuple]) -> list:
        """Values from the cache or from ask(); None is asked once more, then stays None. Ends the run above 20 % None."""
        keys = [f"{seed_of(self.spec, kind, item):016x}" for item in items]
        for again in (False, True):
            todo = dict((k, item) for k, item in zip(keys, items) if k not in self.known)
            values = self.ask(kind, list(todo.values()), again) if todo else []
            new = {k: v for k, v in zip(todo, values) if v is not None}
            self.known |= new
            if new and self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a") as file:
                    file.write("\n" + json.dumps(new) + "\n")
            if self.fault:
                sys.exit(self.fault)
            self.asked += 0 if again else len(todo)
        self.unreadable += len(todo) - len(new)
        if self.asked >= 20 and self.unreadable > 0.2 * self.asked:
            sys.exit(f"error: {self.spec}: {self.unreadable} of {self.asked} judgements could not be read; use a judge that follows the prompt in common.py")
        return [self.known.get(k) for k in keys]

    def score(self, items: list[tuple]) -> list[float | None]:
        """(prompt, response) each -> a score, None if unreadable."""
        return self.answers("score", items)

    def compare(self, items: list[tuple]) -> list[str | None]:
        """(prompt, a, b) each -> "A", "B" or "tie"; asked in both orders, and a verdict that changes with the order is a tie."""
        there = self.answers("compare", items)
        if not self.orders:
            return there
        back = self.answers("compare", [(p, b, a) for p, a, b in items])
        swap = {"A": "B", "B": "A", "tie": "tie", None: None}
        return [None if None in (v, w) else v if v == swap[w] else "tie" for v, w in zip(there, back)]

    def free(self):
        """Gives back the memory of a loaded model until the next question."""


class NumberJudge(Judge):
    """A judge that gives a number to one answer: the better number wins, in any order."""
    orders = False

    def ask(self, kind, items, again):
        if kind == "score":
            return [self.number(*item) for item in items]
        pairs = [(self.number(p, a), self.number(p, b)) for p, a, b in items]
        return ["A" if a > b else "B" if b > a else "tie" for a, b in pairs]


class ToyJudge(NumberJudge):
    """The toy world's exact judge."""

    def number(self, prompt, text):
        import toy
        return toy.score(prompt[-1]["content"], text)


class RewardJudge(NumberJudge):
    """rm:PATH, a sequence-classification reward model with one output. One text at a time: padding can't matter."""
    full = None

    def __init__(self, spec, cache, device, dtype):
        super().__init__(spec, cache)
        self.path, self.device, self.dtype, self.model = spec.partition(":")[2], device, dtype, None
        self.tok, config = load_tokenizer(self.path)
        if config.num_labels != 1:
            die(f"{spec}: a reward model has one output, this one has {config.num_labels}")

    @torch.no_grad()
    def number(self, prompt, text):
        if self.model is None:
            from transformers import AutoModelForSequenceClassification
            self.model = AutoModelForSequenceClassification.from_pretrained(self.path, dtype=self.dtype).to(self.device).eval()
        ids = self.tok.apply_chat_template(prompt + [{"role": "assistant", "content": text}], return_dict=False, return_tensors="pt")
        return self.model(input_ids=ids.to(self.device)).logits.float().item()

    def free(self):
        self.model = None


class TextJudge(Judge):
    """A chat model that is asked in words; complete(questions, openings, again) -> answers is the backend's."""

    def ask(self, kind, items, again):
        form, opening, read = (SCORE_PROMPT, "Rating: [[", read_score) if kind == "score" else (COMPARE_PROMPT, "Verdict: [[", read_verdict)
        talk = lambda prompt: prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        questions = [form.format(prompt=talk(item[0]), **dict(zip("ab", item[1:]))) for item in items]
        return [read(answer) for answer in self.complete(questions, opening, again)]


class LocalJudge(TextJudge):
    """hf:PATH, a local chat model. Its answer is begun for it ("Rating: [[") and held to the form (digits, or A, B, tie, and "]]"): a small
    model says what it thinks, but not in the form that it is asked for."""

    def __init__(self, spec, cache, device, dtype):
        super().__init__(spec, cache)
        self.path, self.device, self.dtype, self.lm = spec.partition(":")[2], device, dtype, None
        self.tok, _ = load_tokenizer(self.path)

    def complete(self, questions, opening, again):
        self.lm = self.lm or load_lm(self.path, self.dtype, self.device)
        encode = lambda text: self.tok(text, add_special_tokens=False)["input_ids"]
        forms = range(1, 11) if opening == "Rating: [[" else ("A", "B", "tie")
        allowed = sorted({t for form in forms for t in encode(f"{opening}{form}]]")[len(encode(opening)):]})
        ids = [prompt_ids(self.tok, [{"role": "user", "content": q}]) + encode(opening) for q in questions]
        order, answers = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
        for i in range(0, len(ids), 16):
            out = sample(self.lm, self.tok, [ids[j] for j in order[i:i + 16]], float(again), 4, seed_of(i), allowed)
            answers |= {j: opening + text for j, (text, _) in zip(order[i:i + 16], out)}
        return [answers[i] for i in range(len(ids))]

    def free(self):
        self.lm = None


class EndpointJudge(TextJudge):
    """api:MODEL at any OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY)."""

    def __init__(self, spec, cache):
        super().__init__(spec, cache)
        self.client = endpoint()

    def complete(self, questions, opening, again):
        answers, self.fault = chat(self.client, self.spec.partition(":")[2], [[{"role": "user", "content": q}] for q in questions], temperature=0)
        return [answer[0] if answer else "" for answer in answers]


def make_judge(spec: str, cache: Path | None, device="cpu", dtype=torch.float32) -> Judge | None:
    """toy | hf:PATH | rm:PATH | api:MODEL | none. Checks the path or the endpoint now; weights are loaded at the first question."""
    kind, _, name = spec.partition(":")
    if spec in ("toy", "none"):
        return ToyJudge(spec, None) if kind == "toy" else None  # exact and instant: nothing to cache
    if kind not in ("hf", "rm", "api") or not name:
        die(f"--judge {spec}: expected toy, hf:PATH, rm:PATH, api:MODEL or none")
    return EndpointJudge(spec, cache) if kind == "api" else {"hf": LocalJudge, "rm": RewardJudge}[kind](spec, cache, device, dtype)


def endpoint(url: str | None = None):
    """An `openai` client (url, or OPENAI_BASE_URL), checked to answer."""
    try:
        import openai
    except ImportError:
        die("an endpoint needs the openai package: pip install openai")
    url = url or os.environ.get("OPENAI_BASE_URL")
    if not url and not os.environ.get("OPENAI_API_KEY"):
        die("an endpoint needs OPENAI_API_KEY, or OPENAI_BASE_URL of a server of your own")
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), max_retries=API_RETRIES, timeout=API_TIMEOUT)
    try:
        client.with_options(max_retries=0, timeout=10).models.list()
    except openai.APIConnectionError as fault:
        die(f"{client.base_url}: no answer ({fault})")
    except openai.AuthenticationError:
        die(f"{client.base_url}: refused the key in OPENAI_API_KEY")
    except Exception:  # not every server lists its models
        pass
    return client


def chat(client, model: str, conversations: list[list[dict]], **options) -> tuple[list[tuple[str, str] | None], str | None]:
    """One answer per conversation, API_CONCURRENCY at a time -> [(text, "stop" | "length")], and what went wrong.
    The client retries 429, 5xx and time-outs with back-off, and we a body that is no chat completion; where that does not help,
    the rest is not asked, what is missing is None, and the message says why the run must end."""
    import openai
    faults = []

    def one(messages):
        for _ in range(API_RETRIES + 1):
            if faults:
                return None
            try:
                choice = client.chat.completions.create(model=model, messages=messages, **options).choices[0]
                return choice.message.content or "", "length" if choice.finish_reason == "length" else "stop"
            except (ValueError, AttributeError, TypeError, IndexError, openai.APIResponseValidationError) as fault:
                last = f"its answer is no chat completion ({type(fault).__name__})"
            except openai.OpenAIError as fault:
                last = str(fault)
                break
        faults.append(f"error: {client.base_url}: {' '.join(last.split())} (after {API_RETRIES} retries); start again, with --resume if there is one: no answer is asked for twice")
        return None
    with ThreadPoolExecutor(API_CONCURRENCY) as pool:
        return list(pool.map(one, conversations)), faults[0] if faults else None


# ---------------------------------------------------------------- flags, files, the metric line


def parse(cls, presets: dict[str, dict] = {}, argv: list[str] | None = None):
    """A frozen dataclass -> its instance from flags. A field's trailing comment is its --help; --a_b and --a-b are the same;
    values are: the field's default, then the preset's, then the flag's."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            die(f"{message} (see --help)")
    parser = Parser(description=sys.modules[cls.__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    notes = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(cls), re.M))
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, how = hints[field.name], {}
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is list:
            how = {"nargs": "+", "type": str, "metavar": "X"}
        else:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        toy = f"; toy: {presets['toy'][field.name]}" if field.name in presets.get("toy", {}) else ""
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}", *field.metadata.values()])
        parser.add_argument(*names, dest=field.name, default=argparse.SUPPRESS, help=f"{notes[field.name]} (default: {default}{toy})".replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    if presets:
        preset = given.setdefault("preset", "paper" if torch.cuda.is_available() else "toy")
        own_data = {"test": None} if "data" in given else {}  # the preset's held-out data go with its training data
        given = presets[preset] | own_data | given
    try:
        return cls(**given)
    except ValueError as fault:
        die(str(fault))


def open_run(config, data: list[str], may_change: tuple[str, ...]) -> Path:
    """The run's folder, with config.json and run.json. Refuses a folder in use without --resume or --overwrite, and to resume with another config."""
    out, rank = Path(config.out), ranks()[0]
    wanted = {k: v for k, v in dataclasses.asdict(config).items() if k not in may_change}
    if out.is_file():
        die(f"{out} is a file: choose another --out")
    used = out.exists() and any(out.iterdir())
    resume = config.resume or used and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts starts the same command again
    if used and resume:
        if not (out / "config.json").is_file():
            die(f"{out}: no config.json, so no run to resume")
        before = {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k not in may_change}
        for name in wanted:
            if before.get(name) != json.loads(json.dumps(wanted[name])):
                die(f"{out} was begun with --{name} {before.get(name)}, not {wanted[name]}: resume it as it was, or choose another --out")
    elif used and not config.overwrite:
        die(f"{out} is not empty: --resume to go on, --overwrite to begin again, or another --out")
    elif used and not (out / "config.json").is_file():
        die(f"{out} holds no run (no config.json), so --overwrite does not touch it")
    barrier()
    if rank == 0:
        if used and not resume:
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        import transformers
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        write_atomic(out / "run.json", json.dumps({
            "argv": sys.argv, "git": git or None, "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "world_size": ranks()[1], "data": {d: hashlib.sha256(Path(d).read_bytes()).hexdigest() for d in data if d and Path(d).is_file()},
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=1))
    barrier()
    return out


def save_state(path: Path, parts: dict, **more):
    """Modules with their optimizers ({name: (module, optimizer)}) and plain values, as one file that loads on any number of ranks.
    Written under another name and renamed. Frozen parameters are not saved. All ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    full = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = {name: (get_model_state_dict(m, options=full), get_optimizer_state_dict(m, o, options=full)) for name, (m, o) in parts.items()}
    if ranks()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with all_or_nothing(path) as temporary:
            torch.save(state | {"more": more}, temporary)
    barrier()


@contextlib.contextmanager
def all_or_nothing(path: Path):
    """A name to write to, renamed to `path` at the end. A full disk ends the run with one line, and what was there before is still there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as fault:  # torch.save wraps what the disk says
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        sys.exit(f"error: {path} could not be written ({str(fault).splitlines()[0]}); the last state is intact: make room, then go on with --resume")


def load_state(path: Path, parts: dict) -> dict:
    """What save_state wrote, into the same parts; -> its plain values."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for name, (module, optimizer) in parts.items():
        set_model_state_dict(module, state[name][0], options=options)
        set_optimizer_state_dict(module, optimizer, state[name][1], options=options)
    return state["more"]


def save_checkpoint(folder: Path, scorer: nn.Module, tok, source: str):
    """The policy as an ordinary Hugging Face folder (weights in fp32, tokenizer, chat template, source's generation_config), all or nothing.
    All ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import GenerationConfig
    state = get_model_state_dict(scorer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks()[0] == 0:
        shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
        lm = (scorer.module if hasattr(scorer, "module") else scorer).lm
        with contextlib.suppress(OSError):  # the source has none
            lm.generation_config = GenerationConfig.from_pretrained(source)
        tied = set(lm._tied_weights_keys or {}) if lm.config.tie_word_embeddings else set()
        with all_or_nothing(folder) as temporary:
            lm.save_pretrained(temporary, state_dict={k.removeprefix("lm."): v for k, v in state.items() if k.removeprefix("lm.") not in tied}, max_shard_size="5GB")
            tok.save_pretrained(temporary)
    barrier()


@functools.cache
def node_mesh(device_type: str):
    """The ranks as nodes x ranks of a node (LOCAL_WORLD_SIZE), for HSDP: replicate over the first axis, shard over the second."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return dist.init_device_mesh(device_type, (ranks()[1] // local, local), mesh_dim_names=("replicate", "shard"))


def fill(module: nn.Module, full: nn.Module | None, device) -> nn.Module:
    """Sharded shapes on "meta" -> on the device, with rank 0's weights and buffers (those that no checkpoint holds too, such as rotary frequencies)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    module.to_empty(device=device)
    set_model_state_dict(module, full.state_dict() if full else {}, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    buffers = dict(full.named_buffers()) if full else {}
    for name, buffer in module.named_buffers():
        value = buffers[name].to(buffer) if full else buffer
        dist.broadcast(value, 0)
        buffer.copy_(value)
    return module


def sum_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Sums over ranks: one collective and one wait for the device, for all values."""
    total = torch.stack([value.double() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def truncate_metrics(path: Path, keep):
    """Drops the lines of metrics.jsonl that are about to be measured again (and a torn last one)."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            kept += [line] if keep(json.loads(line)) else []
    write_atomic(path, "".join(line + "\n" for line in kept))


def metric_line(m: dict, steps: int, seconds_left: float) -> str:
    """One step's metrics (keys as in TRL) as one line for people."""
    memory, iteration = f"{m['memory_gib']:.1f} GiB", f"iter {m['iteration']} · " if "iteration" in m else ""
    return (f"{iteration}step {m['step']}/{steps} · loss {m['loss']:.3f} · margin {m['rewards/margins']:+.2f} · acc {m['rewards/accuracies']:.2f}"
            f" · |g| {m['grad_norm']:.1f} · lr {m['lr']:.1e} · {m['pairs_per_second']:.1f} pair/s · {memory} · {int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left")


def memory_parts(lm, c, *, reference: bool, noise: bool = False) -> dict[str, float]:
    """Bytes on each rank by arithmetic; lm: the model's shapes. P weights, in fp32: 4P, gradients 4P, Adam 8P, a resident
    reference 4P (offloaded: 4 for each weight outside the layers), a noise head of V x D with gradients and Adam 16VD, each divided
    by the ranks that shard it. Activations are an estimate: what a Llama layer keeps of each token, of all layers or, with activation
    checkpointing, of one and a half (its gradients) beside every layer's input, and four fp32 blocks of logits, with noise eight."""
    world = ranks()[1]
    shards = {"fsdp": world, "hsdp": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}.get(c.parallel, 1) if dist.is_initialized() else 1
    config, number = lm.config, 2 if c.dtype == "bfloat16" else 4
    P, V, D, L = sum(p.numel() for p in lm.parameters()), config.vocab_size, config.hidden_size, config.num_hidden_layers
    micro = min(c.micro_batch, c.batch // world)
    tokens, layer = 2 * micro * (c.max_prompt + c.max_response), (28 + 4 * number) * D + 4 * config.intermediate_size * number  # norms and residual stream are fp32
    kept = tokens * (4 * L * D + 1.5 * layer if c.activation_checkpointing else L * layer)
    parts = {"weights": 4 * P / shards, "gradients": 4 * P / shards, "Adam": 8 * P / shards}
    if shards > 1:
        parts["gathered layers"] = (2 * (P - V * D) / L + 2 * V * D) * number
    elif number == 2:
        parts["bf16 copies"] = 2 * (V * D + (P - V * D) / L if c.activation_checkpointing else P)
    if reference:
        parts["reference"] = 4 * (P - sum(p.numel() for p in lm.model.layers.parameters()) * c.offload_reference) / shards
    if noise:
        parts["noise head"] = 16 * V * (D + 1) / shards
    parts["activations up to about"] = kept + (8 if noise else 4) * 4 * V * min(CHUNK, 2 * micro * c.max_response)
    return parts


def memory_plan(lm, c, **what) -> str:
    """memory_parts as one line, in GiB."""
    parts = memory_parts(lm, c, **what)
    return f"memory of a rank: {sum(parts.values()) / 2**30:.2f} GiB = " + " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())


def memory_gib(device) -> float:
    """Peak memory: the CUDA allocator's, or this process's resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as a table for the console and for Markdown."""
    show = lambda v: "–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)
    cells = [columns] + [[show(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(r, widths)) + " |" for r in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"] + lines[1:])
