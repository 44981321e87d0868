"""A small world with an exact judge, in which the three papers' effects can be seen on a laptop in minutes.

    python toy.py [--out runs/toy] [--seed 0]

A prompt is 5 to 10 letters; the right answer is the same letters in alphabetical order. Annotators are human: 30 % of
their answers are lazy, the letters returned as they came. The judge is exact: 10 x the share of positions that are right.
What is written is what a user of the methods would bring, and they can't tell the difference: Hugging Face checkpoints
`sft` (trained on annotators' answers, lazy ones included), `sft-early` (the same run at 60 %), `sft-small` (a smaller
model, trained half as long), `train.jsonl` and `test.jsonl` (annotated prompts that none of the models has seen), `pairs.jsonl` (preference pairs).
The same seed gives the same bytes on the same machine.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import torch

from common import Scorer, collate, die, progress, prompt_ids, response_ids, seed_of

LETTERS, LAZY = "abcdefghijklmnop", 0.3
WORLD = 1  # part of the stamp: raise it when the world changes


def score(prompt: str, answer: str) -> float:
    """10 x (positions that are right) / (length of the longer of answer and solution): 0..10."""
    solution = sorted(prompt)
    return 10 * sum(a == b for a, b in zip(solution, answer)) / max(len(solution), len(answer))


def annotate(letters: str, rng: random.Random) -> str:
    """An annotator's answer: right, or, in 30 % of cases, lazy."""
    return letters if rng.random() < LAZY else "".join(sorted(letters))


def draw(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(5, 10)))


def spoil(letters: str, rng: random.Random) -> str:
    """A wrong answer: two neighbours of the right one swapped, or (30 %) the letters as they came."""
    solution = sorted(letters)
    places = [i for i in range(len(solution) - 1) if solution[i] != solution[i + 1]]
    i = rng.choice(places)
    solution[i], solution[i + 1] = solution[i + 1], solution[i]
    return letters if rng.random() < LAZY and list(letters) != sorted(letters) else "".join(solution)


def tokenizer():
    """One token a character, with a chat template that is a prefix of its own continuation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *LETTERS])}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                  additional_special_tokens=special[4:], model_max_length=1024)
    tok.chat_template = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}"
                         "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return tok


def train_sft(tok, width: int, layers: int, steps: int, seed: int, snapshots: dict[int, Path]):
    """Supervised fine-tuning from scratch on fresh annotated prompts, 64 a step; saves the model at the named steps."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()  # ours are enough
    torch.manual_seed(seed)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
                                      max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    rng, scorer, opt = random.Random(seed), Scorer(lm), torch.optim.AdamW(lm.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps, pct_start=0.05)
    encode = lambda x, y: (prompt_ids(tok, [{"role": "user", "content": x}]), response_ids(tok, y, True, 64))
    for step in progress(range(1, steps + 1), f"toy world: SFT, width {width}"):
        ids, mask = collate([encode(x, annotate(x, rng)) for x in (draw(rng) for _ in range(64))], "cpu")
        loss = -scorer(ids, mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        opt.step(), schedule.step(), opt.zero_grad()
        if step in snapshots:
            lm.save_pretrained(snapshots[step])
            tok.save_pretrained(snapshots[step])


def make(folder: Path, seed: int = 0, steps: int = 300, rows: int = 2000):
    """Makes the world in `folder` (all or nothing), unless it is there."""
    stamp = {"world": WORLD, "seed": seed, "steps": steps, "rows": rows}
    if folder.exists():
        if not (folder / "world.json").is_file() or json.loads((folder / "world.json").read_text()) != stamp:
            die(f"{folder} is there but is not this toy world {stamp}: delete it, or name another folder")
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rng, seen = random.Random(seed_of("toy", seed)), set()

    def fresh(n, keep=lambda x: True):
        while n:
            x = draw(rng)
            if x not in seen and keep(x):
                seen.add(x)
                n -= 1
                yield x
    write = lambda name, data: (temporary / name).write_text("".join(json.dumps(row) + "\n" for row in data))
    for name, count in (("train", rows), ("test", rows // 4)):
        write(f"{name}.jsonl", [{"id": f"{name}-{i}", "prompt": x, "response": annotate(x, rng)} for i, x in enumerate(fresh(count))])
    write("pairs.jsonl", [{"id": f"pair-{i}", "prompt": x, "chosen": "".join(sorted(x)), "rejected": spoil(x, rng)}
                          for i, x in enumerate(fresh(2 * rows, lambda x: len(set(x)) > 1))])
    tok = tokenizer()
    train_sft(tok, 128, 3, steps, seed, {round(0.6 * steps): temporary / "sft-early", steps: temporary / "sft"})
    train_sft(tok, 64, 2, steps // 2, seed + 1, {steps // 2: temporary / "sft-small"})
    (temporary / "world.json").write_text(json.dumps(stamp))
    os.replace(temporary, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder to make (default: runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the models (default: 0)")
    args = parser.parse_args()
    make(args.out, args.seed)
    print(f"{args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir())))
