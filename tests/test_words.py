"""The world of words: its judge against marks given by hand, and the making of a world."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import toy
import words

ROOT = Path(__file__).parents[1]

# prompt, answer, marks; the sums are those of the constraints' credits
RIVERS = "Describe rivers in one sentence."
WINTER = "Write a short question about winter."
ANIMALS = "List 4 animals, separated by commas."
RIVERS_9 = RIVERS + " Use exactly 9 words."
LOWER = " Use only lowercase letters."
BY_HAND = [
    # one sentence (half), the topic (half), and exactly n words
    (RIVERS_9, "A river carries cold water down to the sea.", 10),
    (RIVERS_9, "A river carries cold water to the sea.", 10 * (1 + 8 / 9) / 2),
    (RIVERS_9, "A river carries cold water down to the blue sea.", 10 * (1 + 8 / 9) / 2),
    (RIVERS_9, "Rivers flow.", 10 * (0.5 + 2 / 9) / 2),
    (RIVERS + " Use exactly 8 words.", "It carries cold water down to the sea.", 7.5),
    (RIVERS + " Use exactly 8 words.", "A river runs. It ends in the sea.", 7.5),
    (RIVERS + " Use exactly 8 words.", "A river runs down to the blue sea", 7.5),
    (RIVERS + " Use exactly 8 words.", "A river runs\ndown to the blue sea.", 7.5),
    ("Describe the moon in one sentence. Use exactly 9 words.",
     "The moon is a stone that borrows its light.", 10),
    ("Describe cities in one sentence. Use exactly 8 words.",
     "A city is a home for many people.", 10),
    # at most n words, at the border and beyond it
    (RIVERS + " Use at most 10 words.", "A river carries cold water all the way to sea.", 10),
    (RIVERS + " Use at most 9 words.", "A river carries cold water all the way to sea.",
     10 * (1 + 8 / 9) / 2),
    (RIVERS + " Use at most 8 words.",
     "A river is what is left of rain that fell on far hills and went down to the wide sea.", 5),
    # both words, one of them, none; a part of a word is not the word
    (RIVERS + ' Use the words "old" and "light".', "An old river shines in the light.", 10),
    (RIVERS + ' Use the words "old" and "light".', "An old river shines in the sun.", 7.5),
    (RIVERS + ' Use the words "old" and "light".', "A golden river is slightly warm.", 5),
    # only lowercase letters
    (RIVERS + LOWER, "a river is a road of water.", 10),
    (RIVERS + LOWER, "A river is a road of water.", 5),
    # the last word, the word elsewhere, no such word
    (RIVERS + ' End with the word "home".', "The river brings us back home.", 10),
    (RIVERS + ' End with the word "home".', "The river brings us home at night.", 7.5),
    (RIVERS + ' End with the word "home".', "The river brings us to a homestead.", 5),
    # two more constraints: three credits
    (RIVERS + ' Use exactly 6 words. End with the word "home".',
     "The river brings us back home.", 10),
    (RIVERS + " Use exactly 6 words. Use only lowercase letters.", "The river brings us back home.",
     10 * 2 / 3),
    # a question
    (WINTER + " Use at most 9 words.", "Why is winter so cold in the north?", 10),
    (WINTER + " Use at most 9 words.", "Winter is cold in the north.", 7.5),
    (WINTER + " Use at most 9 words.", "Why is it so cold in the north?", 7.5),
    (WINTER + " Use at most 9 words.", "So winter is cold in the north?", 7.5),
    (WINTER + " Use at most 9 words.", "What's the best thing about winter?", 10),
    (WINTER + " Use at most 9 words.", "Isn’t winter too cold in the north?", 10),
    (WINTER + " Use at most 9 words.", '"Why is winter so cold in the north?"', 10),
    (WINTER + " Use at most 9 words.", 'What about "Why is winter so cold?"', 7.5),
    # numbers are words, but not those of a list's lines
    (RIVERS_9, "There are 50 rivers in the big old country.", 10),
    (RIVERS + " Use exactly 4 words.", "1. rivers\n2. lakes\n3. seas\n4. ponds", 7.5),
    # a list: half for the kind, half for the form
    (ANIMALS + LOWER, "cat, dog, bear, wolves", 10),
    (ANIMALS + LOWER, "cat, dog, bear, and wolf", 10),
    (ANIMALS + " Put a full stop at the end.", "Cat, dog, bear, wolf.", 10),
    (ANIMALS + " Put a full stop at the end.", "Cat, dog, bear, wolf", 5),
    (ANIMALS + " Put a full stop at the end.", "Cat, dog, bear.", 10 * (0.75 + 1) / 2),
    (ANIMALS + " Put a full stop at the end.", "Cat, dog, bear, wolf, goat.",
     10 * ((0.5 * 4 / 5 + 0.5 * 3 / 4) + 1) / 2),
    (ANIMALS + LOWER, "1. cat\n2. dog\n3. bear\n4. wolf", 7.5),
    (ANIMALS + LOWER, "here they are: cat, dog, bear", 10 * (0.25 + 1) / 2),
    ("List 6 animals, separated by commas." + LOWER, "cat, dog, bear, wolf, goat, cat",
     10 * ((0.5 * 5 / 6 + 0.5) + 1) / 2),
    ("List 3 vegetables, separated by commas." + LOWER, "potato, sweet potato, carrot", 10),
    ("List 3 countries, separated by commas. Put a full stop at the end.",
     "United States, United Kingdom, South Korea.", 10),
    # cheats
    (RIVERS + " Use at most 8 words.", "Rivers 1 2 3 4 5 6 7 8 9 10 are in the land.",
     10 * (1 + 0.125) / 2),
    (ANIMALS + LOWER, "cat, cats, dog, dogs", 10 * ((0.5 * 2 / 4 + 0.5) + 1) / 2),
    (ANIMALS + LOWER, "cat, cat, dog, bear", 3),
    (RIVERS_9, "", 0),
    (RIVERS + LOWER, " ... !", 0),
    (RIVERS_9, "A river carries cold cold water to a sea.", 3),
    (RIVERS_9, "A river river river river river river river river.", 3),
    (RIVERS_9, "The cold river and the cold river are cold.", 3),
    (RIVERS + " Use exactly 8 words.", "To describe rivers in one sentence is easy.", 3),
    (RIVERS + " Use at most 9 words.", "Rivers, lakes, seas, ponds.", 7.5),
    (RIVERS + " Use at most 9 words.", "Rivers, lakes, seas, and ponds.", 7.5),
    (RIVERS + " Use at most 9 words.", "Rivers lakes seas ponds.", 7.5),
    (RIVERS + " Use at most 9 words.", "River.", 7.5),
    (WINTER + " Use at most 9 words.", "Winter?", 7.5),
    (ANIMALS + LOWER, "cat, cat, cat, cat", 3),
    (ANIMALS + LOWER, "a, b, c, d", 5),
    (ANIMALS + LOWER, "list 4 animals, separated by commas", 3),
    (ANIMALS + LOWER, "the cat and the dog are animals.", 5),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "answer", "marks"), BY_HAND)
def test_the_judge_gives_the_marks_that_a_person_gives(prompt: str, answer: str, marks: float):
    """Every kind of constraint, met, half met and not met, the borders, and the cheats.

    The judge of both worlds finds out which one a prompt is of.
    """
    assert words.score(prompt, answer) == pytest.approx(marks)
    assert toy.score(prompt, answer) == pytest.approx(marks)


def test_the_judge_reads_every_constraint_that_is_drawn():
    """A prompt's sentences are the constraints that the judge finds in it, each once."""
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        prompt = words.draw(rng)
        found = words.constraints_of(prompt)
        written = {constraint.sentence.format(*blanks) for constraint, blanks in found}
        assert sorted(prompt, key=str) == sorted(" ".join(written), key=str)
        assert len(found) in (2, 3)
        seen |= {constraint.sentence for constraint, _ in found}
    assert len(seen) == len(words.TASKS) + len(words.MORE)


def test_a_prompt_of_letters_is_judged_as_letters():
    """badc: solution abcd, two of abdc's places are right."""
    assert toy.score("badc", "abdc") == 5


FOREIGN = [
    "Write a poem",
    "List 3 tools, separated by commas.",
    "List some animals, separated by commas.",
    "Use exactly ten words.",
    "",
]


@pytest.mark.parametrize("prompt", FOREIGN)
def test_a_prompt_of_no_world_is_not_judged(prompt: str, capsys):
    """English without a constraint that we know would be judged as letters: one line, code 2."""
    with pytest.raises(SystemExit) as stop:
        toy.score(prompt, "Write")
    assert stop.value.code == 2
    line = f"error: --judge toy knows the prompts of toy.py alone, not {prompt!r}\n"
    assert capsys.readouterr().err == line


def test_a_world_without_prompts_is_refused(tmp_path: Path, monkeypatch, capsys):
    """Before the model is looked for."""
    out = tmp_path / "words"
    flags = ["--model", "nowhere", "--prompts", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["toy.py", *flags])
    with pytest.raises(SystemExit) as stop:
        toy.main()
    assert stop.value.code == 2
    assert "--prompts must be positive, not 0" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path: Path):
    """The next start, with the right path, is not refused as that of another world."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make_world(tmp_path / "words", tmp_path / "typo", seed=0)
    assert refused.value.returncode == 2
    assert "typo" in refused.value.stderr
    assert not list(tmp_path.iterdir())


def make_world(folder: Path, model: Path, seed: int) -> str:
    """Makes a small world of words by the command. Returns what it prints."""
    command = [sys.executable, str(ROOT / "toy.py"), "--model", str(model), "--out", str(folder)]
    command += ["--prompts", "10", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def files_of(folder: Path) -> dict[str, bytes]:
    """{name: content} of all files of a world, without the paths in its stamp."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "world.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_a_world_of_words_is_its_seed_s(world: Path, tmp_path: Path):
    """The same seed makes the same files, in one go or in two; another one, other prompts.

    The model is the world of letters' own, so that no real one is needed. What was done before a
    kill is kept: here all answers and the smaller model. A start with another seed does not go on
    with them.
    """
    said = make_world(tmp_path / "one", world / "sft", seed=0)
    one = files_of(tmp_path / "one")
    assert "10 prompts: " in said

    parts = one["answers.jsonl"].splitlines(keepends=True)
    assert len(parts) == 10 * toy.BEST_OF

    make_world(tmp_path / "other", world / "sft", seed=1)
    assert files_of(tmp_path / "other")["answers.jsonl"] != one["answers.jsonl"]

    unfinished = tmp_path / "two.unfinished"
    unfinished.mkdir()
    (unfinished / "answers.jsonl").write_bytes(one["answers.jsonl"])
    shutil.copytree(tmp_path / "one" / "smaller", unfinished / "smaller")
    shutil.copy(tmp_path / "one" / "world.json", unfinished)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make_world(tmp_path / "two", world / "sft", seed=1)
    assert refused.value.returncode == 2
    assert "two.unfinished is there but is not this toy world" in refused.value.stderr
    make_world(tmp_path / "two", world / "sft", seed=0)
    assert files_of(tmp_path / "two") == one
    assert not unfinished.exists()


def test_annotators_and_pairs_are_the_model_s_best_and_worst(tmp_path: Path):
    """Of 8 answers: the best one that ended is the annotation, unless the annotator was lazy.

    Pairs are the best and the worst of all. A fifth of the prompts is held out.
    """
    texts = [
        "It runs.",
        "A river carries cold water down to the sea.",  # the best, but cut
        "A river carries cold water down to sea.",  # the best that has ended
        "",
        "Rivers.",
        "No.",
        "A road is made for cars.",
        "Yes, yes.",
    ]
    rows, answers = [], []
    for i in range(100):
        prompt = [{"role": "user", "content": RIVERS_9}]
        rows.append({"id": f"words-{i}", "prompt": prompt})
        for j, text in enumerate(texts):
            meta = {"sample": j, "finish": "length" if j == 1 else "stop"}
            answers.append({"id": f"words-{i}", "prompt": prompt, "response": text, "meta": meta})
    train = toy.write_answered(tmp_path, rows, answers, random.Random(0))

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    assert train == read("train.jsonl")
    assert [row["id"] for row in read("test.jsonl")] == [f"words-{i}" for i in range(0, 100, 5)]
    annotated = [row["response"] for row in train]
    assert texts[1] not in annotated and texts[3] not in annotated
    share = annotated.count(texts[2]) / len(annotated)
    assert 0.65 < share < 0.85  # 0.7, and a sixth of the lazy ones

    pairs = read("pairs.jsonl")
    assert [row["id"] for row in pairs] == [row["id"] for row in train]
    test_pairs = read("test_pairs.jsonl")
    assert [row["id"] for row in test_pairs] == [f"words-{i}" for i in range(0, 100, 5)]
    for pair in pairs + test_pairs:
        assert (pair["chosen"], pair["rejected"]) == (texts[1], texts[5])
        assert pair["meta"]["chosen_ended"] is False


def test_the_smaller_model_is_the_first_layers(world: Path, tmp_path: Path):
    """Four fifths of the layers, and it has learnt from the annotators: its loss is lower."""
    import torch

    from common import Scorer, collate, load_lm, load_tokenizer, prompt_ids, response_ids

    tok, _ = load_tokenizer(str(world / "sft"))
    rows = [{"prompt": [{"role": "user", "content": "badc"}], "response": "dcba"}] * 64
    toy.train_smaller(tmp_path / "smaller", str(world / "sft"), tok, rows, torch.device("cpu"))

    small = load_lm(str(tmp_path / "smaller"), torch.float32, "cpu")
    untrained = load_lm(str(world / "sft"), torch.float32, "cpu")
    del untrained.model.layers[2:]
    untrained.config.num_hidden_layers = 2
    assert len(small.model.layers) == small.config.num_hidden_layers == 2  # of 3
    sequence = (prompt_ids(tok, rows[0]["prompt"]), response_ids(tok, "dcba", True, 32))
    with torch.no_grad():
        before = Scorer(untrained)(*collate([sequence], "cpu"))
        after = Scorer(small)(*collate([sequence], "cpu"))
    assert after.item() > before.item()
    for trained, first in zip(small.model.layers, untrained.model.layers):
        torch.testing.assert_close(
            trained.mlp.up_proj.weight, first.mlp.up_proj.weight, atol=2e-3, rtol=0
        )


def test_a_folder_of_another_world_is_left_alone(world: Path):
    """One line says what to do."""
    command = [sys.executable, str(ROOT / "toy.py"), "--model", str(world / "sft")]
    command += ["--out", str(world)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2
    assert "is not this toy world" in done.stderr
