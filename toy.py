"""Two small worlds with an exact judge, to see the three papers' effects on a laptop.

    python toy.py [--out runs/toy] [--seed 0]          # letters and new, tiny models: a minute
    python toy.py --model DIR --out runs/words         # English and a real model of yours

In the world of letters a prompt is 5 to 10 letters; the right answer is the same letters in
alphabetical order. Annotators are human: 30 % of their answers are lazy, the letters returned as
they came. The judge is exact: 10 x the share of positions that are right. What is written is what a
user of the methods would bring, and they can't tell the difference: Hugging Face checkpoints `sft`
(trained on annotators' answers, lazy ones included), `sft-early` (the same run at 60 %),
`sft-small` (a smaller model, trained half as long), `train.jsonl` and `test.jsonl` (annotated
prompts, hardly any of which a model has seen), `pairs.jsonl` (preference pairs).

In the world of words (words.py: its prompts and its judge) the annotators are the model itself:
the best of its 8 answers by the judge, or, in 30 % of cases, any of them. The best and the worst
are a preference pair. There are `answers.jsonl` (all of them), `train.jsonl` and `pairs.jsonl`,
`test.jsonl` and `test_pairs.jsonl` (of a fifth of the prompts, held out), and `smaller`: the
model's first layers, four fifths of them, after one epoch on train.jsonl. A killed start goes on
where it was.

The same seed gives the same bytes on the same machine.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
from pathlib import Path

import torch

import job
import words
from common import (
    Model,
    Sampling,
    Scorer,
    blocks,
    collate,
    generate,
    load_lm,
    load_tokenizer,
    preference_pair,
    prompt_ids,
    response_ids,
)

LETTERS = "abcdefghijklmnop"
LAZY = 0.3  # share of an annotator's answers
# part of the worlds' stamps: raise it when one changes
WORLD = 1
WORLD_OF_WORDS = 2
BEST_OF = 8  # answers of the model to a prompt in the world of words
HOW = Sampling(temperature=0.7, max_new_tokens=32, batch=64)  # at 1 a small model babbles
KEPT = 0.8  # share of the layers of the smaller model


# ------------------------------------------------------------------------- prompts and answers


def score(prompt: str, answer: str) -> float:
    """The judge of both worlds. 0..10.

    For letters: 10 x (positions that are right) / (length of the longer of answer and solution).
    A prompt of neither world ends the program.
    """
    if words.constraints_of(prompt):
        return words.score(prompt, answer)
    if not prompt or not set(prompt) <= set(LETTERS):
        job.die(f"--judge toy knows the prompts of toy.py alone, not {prompt[:40]!r}")
    solution = solve(prompt)
    right = sum(wanted == given for wanted, given in zip(solution, answer))
    return 10 * right / max(len(solution), len(answer))


def solve(letters: str) -> str:
    """The right answer."""
    return "".join(sorted(letters))


def annotate(letters: str, rng: random.Random) -> str:
    """An annotator's answer: right, or, in 30 % of cases, lazy."""
    lazy = rng.random() < LAZY
    return letters if lazy else solve(letters)


def spoil(letters: str, rng: random.Random) -> str:
    """A wrong answer: two neighbours of the right one swapped, or (30 %) the letters as they came.

    The letters must not all be the same.
    """
    solution = sorted(letters)
    places = [i for i in range(len(solution) - 1) if solution[i] != solution[i + 1]]
    i = rng.choice(places)
    swapped = list(solution)
    swapped[i], swapped[i + 1] = solution[i + 1], solution[i]

    lazy = rng.random() < LAZY
    if lazy and list(letters) != solution:
        return letters
    return "".join(swapped)


def draw(rng: random.Random) -> str:
    """The letters of a prompt."""
    length = rng.randint(5, 10)
    return "".join(rng.choice(LETTERS) for _ in range(length))


def draw_new(rng: random.Random, seen: set[str], kinds: int = 1) -> str:
    """A prompt of at least `kinds` different letters that is not in `seen`, where it is added."""
    while True:
        letters = draw(rng)
        if letters not in seen and len(set(letters)) >= kinds:
            seen.add(letters)
            return letters


# ------------------------------------------------------------------------- data files


def write_data(folder: Path, seed: int, rows: int):
    """Writes train.jsonl, test.jsonl and pairs.jsonl, in which no prompt stands twice."""
    rng = random.Random(job.seed_of("toy", seed))
    seen = set()
    write_annotated(folder, "train", rows, rng, seen)
    write_annotated(folder, "test", rows // 4, rng, seen)

    pairs = []
    for i in range(2 * rows):
        letters = draw_new(rng, seen, kinds=2)
        pairs.append(
            {
                "id": f"pair-{i}",
                "prompt": letters,
                "chosen": solve(letters),
                "rejected": spoil(letters, rng),
            }
        )
    job.write_atomic(folder / "pairs.jsonl", job.json_lines(pairs))


def write_annotated(folder: Path, name: str, count: int, rng: random.Random, seen: set[str]):
    """Writes `count` prompts with their annotators' answers to folder/NAME.jsonl."""
    annotated = []
    for i in range(count):
        letters = draw_new(rng, seen)
        response = annotate(letters, rng)
        annotated.append({"id": f"{name}-{i}", "prompt": letters, "response": response})
    job.write_atomic(folder / f"{name}.jsonl", job.json_lines(annotated))


# ------------------------------------------------------------------------- models

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer():
    """One token a character, with a chat template that is a prefix of its own continuation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()

    tok = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        model_max_length=1024,
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


def new_model(tok, width: int, layers: int, seed: int):
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def annotated_batch(tok, rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh prompts with their annotators' answers: ids and mask, [size, T]."""
    sequences = []
    for _ in range(size):
        letters = draw(rng)
        answer = annotate(letters, rng)
        prompt = prompt_ids(tok, [{"role": "user", "content": letters}])
        sequences.append((prompt, response_ids(tok, answer, True, 64)))
    return collate(sequences, "cpu")


def train_sft(tok, width: int, layers: int, steps: int, seed: int, snapshots: dict[int, Path]):
    """Supervised fine-tuning from scratch on fresh annotated prompts, 64 a step.

    snapshots: {step: folder}, where the model is saved after these steps. SIGTERM ends it early.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are enough
    lm = new_model(tok, width, layers, seed)
    scorer = Scorer(lm)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)

    for step in job.progress(range(1, steps + 1), f"toy world: SFT, width {width}"):
        ids, mask = annotated_batch(tok, rng, 64)
        sft_step(scorer, optimizer, ids, mask)
        schedule.step()

        if step in snapshots:
            save(lm, tok, snapshots[step])
        if job.STOP.is_set():
            return


def sft_step(scorer: Scorer, optimizer, ids: torch.Tensor, mask: torch.Tensor):
    """A step on the negative log-likelihood of a response token. ids, mask: [S, T]."""
    loss = -scorer(ids, mask).sum() / mask.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def save(lm, tok, folder: Path):
    """Saves a model with its tokenizer, all or nothing."""
    with job.all_or_nothing(folder) as place:
        lm.save_pretrained(place)
        tok.save_pretrained(place)


# ------------------------------------------------------------------------- the world of letters


def make(folder: Path, seed: int = 0, steps: int = 300, rows: int = 2000):
    """Makes the world in `folder` (all or nothing), unless it is there.

    steps: optimizer steps of the large model. rows: annotated prompts to train on. Another world,
    or anything else, in the folder ends the program; SIGTERM leaves nothing. Who comes while
    another program makes it waits for that.
    """
    stamp = {"world": WORLD, "seed": seed, "steps": steps, "rows": rows}
    if folder.exists():
        check_stamp(folder, stamp)
        return

    # one program makes it, others wait
    lock = folder.with_name(folder.name + ".lock")
    file = job.open_lock(lock)
    if not job.is_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        print(f"{folder} is being made by another program: waiting for it", flush=True)
        job.is_locked(file, fcntl.LOCK_EX)
    try:
        if not folder.exists():
            make_alone(folder, stamp)
        if folder.exists():
            check_stamp(folder, stamp)
            lock.unlink(missing_ok=True)
    finally:
        os.close(file)


def make_alone(folder: Path, stamp: dict):
    """Makes the world that the stamp describes."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a kill's
    try:
        fill(temporary, stamp["seed"], stamp["steps"], stamp["rows"])
        if not job.STOP.is_set():
            job.write_atomic(temporary / "world.json", json.dumps(stamp))
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fill(folder: Path, seed: int, steps: int, rows: int):
    """Writes data and models of a world to `folder`."""
    write_data(folder, seed, rows)
    tok = tokenizer()
    large = {round(0.6 * steps): folder / "sft-early", steps: folder / "sft"}
    small = {steps // 2: folder / "sft-small"}
    train_sft(tok, width=128, layers=3, steps=steps, seed=seed, snapshots=large)
    train_sft(tok, width=64, layers=2, steps=steps // 2, seed=seed + 1, snapshots=small)


def check_stamp(folder: Path, stamp: dict):
    """Ends the program if `folder` is not the world that the stamp describes."""
    file = folder / "world.json"
    if not file.is_file() or job.read_json(file, f"delete {folder}") != stamp:
        job.die(
            f"{folder} is there but is not this toy world {stamp}: "
            "delete it, or name another folder"
        )


# ------------------------------------------------------------------------- the world of words


def make_words(folder: Path, path: str, seed: int, count: int):
    """Makes the world of words in `folder` with the model `path`, unless it is there.

    count: prompts, a fifth of them held out. What is done stands in FOLDER.unfinished until all is.
    """
    stamp = {"world": WORLD_OF_WORDS, "model": path, "seed": seed, "prompts": count}
    if folder.exists():
        check_stamp(folder, stamp)
        return
    tok, _ = load_tokenizer(path)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    job.hold(unfinished / "lock", unfinished)
    begun = unfinished / "world.json"
    if begun.exists():
        check_stamp(unfinished, stamp)
    else:
        job.write_atomic(begun, json.dumps(stamp))

    rng = random.Random(job.seed_of("words", seed))
    prompts = set()
    while len(prompts) < count:
        prompts.add(words.draw(rng))
    rows = []
    for i, prompt in enumerate(sorted(prompts, key=lambda prompt: job.seed_of(prompt, seed))):
        message = {"role": "user", "content": prompt}
        rows.append({"id": f"words-{i}", "prompt": [message]})

    device = job.own_device()
    model = Model(path, tok, device, torch.float32)
    answers = generate(unfinished / "answers.jsonl", rows, model, HOW, seed, n=BEST_OF)
    train = write_answered(unfinished, rows, answers, rng)
    if not (unfinished / "smaller").exists():
        train_smaller(unfinished / "smaller", path, tok, train, device)

    job.stop_if_asked()
    (unfinished / "lock").unlink()
    os.replace(unfinished, folder)


def write_answered(
    folder: Path, rows: list[dict], answers: list[dict], rng: random.Random
) -> list[dict]:
    """Writes the files of annotated rows and of pairs, and returns the rows of train.jsonl.

    answers: BEST_OF to each row. A row none of whose answers has ended by itself is left out.
    """
    train, test, pairs, test_pairs, scores = [], [], [], [], []
    for i, row in enumerate(rows):
        own = answers[BEST_OF * i : BEST_OF * (i + 1)]
        prompt = row["prompt"][-1]["content"]
        own_scores = [score(prompt, answer["response"]) for answer in own]
        scores += own_scores

        held_out = i % 5 == 0
        pair = preference_pair(row, own, own_scores)
        if pair:
            (test_pairs if held_out else pairs).append(pair)

        ended = []
        for j, answer in enumerate(own):
            if answer["meta"]["finish"] == "stop" and answer["response"].strip():
                ended.append(j)
        if not ended:
            continue
        choice = max(ended, key=own_scores.__getitem__)
        if rng.random() < LAZY:
            choice = rng.choice(ended)
        annotated = {**row, "response": own[choice]["response"]}
        (test if held_out else train).append(annotated)

    job.write_atomic(folder / "train.jsonl", job.json_lines(train))
    job.write_atomic(folder / "test.jsonl", job.json_lines(test))
    job.write_atomic(folder / "pairs.jsonl", job.json_lines(pairs))
    job.write_atomic(folder / "test_pairs.jsonl", job.json_lines(test_pairs))
    print(
        f"{len(rows)} prompts: {len(train)} rows and {len(pairs)} pairs to train on, {len(test)} "
        f"and {len(test_pairs)} held out; the model's mean score is "
        f"{sum(scores) / len(scores):.2f} of 10",
        flush=True,
    )
    return train


def train_smaller(folder: Path, path: str, tok, rows: list[dict], device):
    """The model's first layers, fine-tuned for one epoch on the annotated rows, 8 a step."""
    lm = load_lm(path, torch.float32, device)
    layers = blocks(lm)
    kept = round(KEPT * len(layers))
    del layers[kept:]
    config = lm.config.get_text_config(decoder=True)
    config.num_hidden_layers = kept
    if vars(config).get("layer_types"):  # which some models derive from something else
        config.layer_types = config.layer_types[:kept]

    scorer = Scorer(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-5)
    for start in job.progress(range(0, len(rows), 8), f"smaller model, {kept} layers: SFT"):
        sequences = []
        for row in rows[start : start + 8]:
            response = response_ids(tok, row["response"], True, HOW.max_new_tokens)
            sequences.append((prompt_ids(tok, row["prompt"]), response))
        sft_step(scorer, optimizer, *collate(sequences, device))
        job.stop_if_asked()
    save(lm, tok, folder)


# ------------------------------------------------------------------------- the command


def main():
    job.steady_console()
    parser = job.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/toy"),
        help="folder to make (default: runs/toy)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the data and the models (default: 0)",
    )
    parser.add_argument(
        "--model",
        help="make the world of words, with this model folder or Hub id",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=500,
        help="prompts in the world of words, a fifth of them held out (default: 500)",
    )
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts must be positive, not {args.prompts}")
    job.check_out(args.out)
    job.stop_on_sigterm()
    if args.model:
        make_words(args.out, args.model, args.seed, args.prompts)
    else:
        make(args.out, args.seed)
    job.stop_if_asked()
    names = sorted(path.name for path in args.out.iterdir())
    print(f"{args.out}: " + ", ".join(names))


if __name__ == "__main__":
    main()
