"""TSO: its equations against naive loops, pairs and their correction, and whole runs of tso.py."""

import functools
import gc
import json
import math
import random
import shutil
import signal
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import (
    as_flags,
    assert_close,
    forked,
    lines,
    metrics,
    refused,
    results,
    run,
    together,
    weights,
)
from test_equations import naive_logp, naive_loss, random_pairs, tiny_lm

import common
import datafiles
import job
import toy
import tso
from common import Answer, Model, Sampling
from tso import (
    Candidates,
    Config,
    Slice,
    apply_verdicts,
    clipped,
    correction,
    distinct2,
    diversity,
    dual_clip_losses,
    export,
    implicit_rewards,
    judge_pairs,
    make_pairs,
    read_verdicts,
    sample_matrix,
    similarity,
    skewness_kurtosis,
)

near = functools.partial(pytest.approx, rel=1e-4, abs=1e-5)
CPU = torch.device("cpu")
inf = math.inf
LN2 = math.log(2)  # the loss where policy and reference are the same


def mean(values) -> float:
    return sum(values) / len(values)


def means(rows: list[dict]) -> dict:
    """The mean of every column of rows that have the same columns."""
    return {name: mean([row[name] for row in rows]) for name in rows[0]}


def user(text: str) -> list[dict]:
    """A prompt of one turn."""
    return [{"role": "user", "content": text}]


def toy_ids(text: str) -> list[int]:
    """The toy tokenizer's ids: those of the letters follow on seven special tokens."""
    return [7 + toy.LETTERS.index(letter) for letter in text]


# ---------------------------------------------------------------- runs of tso.py that take seconds


def tso_flags(world: Path, *changes: dict, **more) -> list[str]:
    """Flags of a run of tso.py that takes seconds: 40 prompts in 2 slices, 20 steps.

    Changes of these flags: the last one counts, a list is several values, None is no such flag.
    """
    values = {
        "model": world / "sft",
        "older": [world / "sft-early"],
        "smaller": [world / "sft-small"],
        "data": world / "train.jsonl",
        "test": world / "test.jsonl",
        "judge": "toy",
        "limit": 40,
        "test_prompts": 12,
        "slices": 2,
        "batch": 8,
        "micro_batch": 4,
        "sample_batch": 16,
        "max_response": 16,
        "max_prompt": 32,
        "n_scores": 4,
        "save_every": 1,
        "preset": "toy",
    }
    for change in (*changes, more):
        values.update(change)

    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *value]
        elif value is not None:
            flags += as_flags({name: value})
    return flags


def config_of(world: Path, **more) -> Config:
    """The Config of such a run."""
    argv = [str(flag) for flag in tso_flags(world, **more)]
    return job.parse(Config, {"toy": tso.TOY, "paper": {}}, argv)


# every bar has three items to be killed at
PLAIN = {"sample_batch": 5, "epochs": 1}
# the smallest run: one slice, one step
ONE = {"limit": 12, "slices": 1, "test_prompts": 3, "n_scores": 0, "max_steps": 1}


def one_line(stop, capsys) -> str:
    """The one line on stderr of a program that ended with exit code 2."""
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def write_lines(file: Path, rows: list[dict]):
    """Writes a JSON lines file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def kept_pairs(folder: Path) -> list[dict]:
    """The pairs that a slice was trained on, as rows of its pairs.jsonl."""
    pairs = job.read_jsonl(folder / "pairs.jsonl")
    return [pair for pair in pairs if pair["meta"]["verdict"] != "drop"]


def order_of(n: int, name: str, epoch: int = 0) -> list[int]:
    """The order in which an epoch of a slice takes n pairs, with --seed 0."""
    rng = random.Random(job.seed_of(0, "order", name, epoch))
    return rng.sample(range(n), n)


def text_logp(lm, tok, pair: dict, side: str) -> float:
    """log pi of one side of a row of pairs.jsonl, with its end token if it ended."""
    prompt = tok.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    answer = tok(pair[side], add_special_tokens=False)["input_ids"]
    if pair["meta"][f"{side}_ended"]:
        answer = [*answer, tok.eos_token_id]
    with torch.no_grad():
        return naive_logp(lm, prompt, answer).item()


# ---------------------------------------------------------------- equations


def naive_dual_clip(r_w: float, r_l: float, c_w: float, c_l: float) -> float:
    """-log sigmoid( min(r_w, c_w) - max(r_l, -c_l) ) of one pair."""
    return naive_loss(min(r_w, c_w) - max(r_l, -c_l))


def test_rewards_losses_and_clipped_sides_are_the_formulas():
    """Rewards, losses and who is clipped, for 40 pairs, one float at a time."""
    rng = random.Random(0)
    beta = 0.3
    logps = [(rng.uniform(-9, 0), rng.uniform(-9, 0)) for _ in range(40)]  # chosen, rejected
    ref_logps = [(rng.uniform(-9, 0), rng.uniform(-9, 0)) for _ in range(40)]
    chosen, rejected = implicit_rewards(torch.tensor(logps), torch.tensor(ref_logps), beta)

    rewards = []
    for (logp_w, logp_l), (ref_w, ref_l) in zip(logps, ref_logps):
        rewards.append((beta * (logp_w - ref_w), beta * (logp_l - ref_l)))
    assert chosen.tolist() == near([r_w for r_w, _ in rewards])
    assert rejected.tolist() == near([r_l for _, r_l in rewards])

    for c_w, c_l in ((0.5, 0.2), (0.2, 0.7), (inf, 0.4), (0.4, inf)):
        losses = dual_clip_losses(chosen, rejected, c_w, c_l)
        assert losses.tolist() == near([naive_dual_clip(*pair, c_w, c_l) for pair in rewards])
        far_chosen, far_rejected = clipped(chosen, rejected, c_w, c_l)
        assert far_chosen.tolist() == [float(r_w > c_w) for r_w, _ in rewards]
        assert far_rejected.tolist() == [float(r_l < -c_l) for _, r_l in rewards]


def test_without_clips_it_is_dpo_to_the_bit():
    """c = inf: the values and gradients of softplus(-(r_w - r_l)), for huge rewards too."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 200.0):
        chosen = (scale * torch.randn(64, generator=generator)).requires_grad_()
        rejected = (scale * torch.randn(64, generator=generator)).requires_grad_()
        losses = dual_clip_losses(chosen, rejected, inf, inf)
        dpo = torch.nn.functional.softplus(-(chosen - rejected))
        assert torch.equal(losses, dpo)

        grads = torch.autograd.grad(losses.sum(), (chosen, rejected))
        dpo_grads = torch.autograd.grad(dpo.sum(), (chosen, rejected))
        for grad, dpo_grad in zip(grads, dpo_grads, strict=True):
            assert torch.equal(grad, dpo_grad)


def test_a_side_that_moved_far_enough_has_no_gradient():
    """r_w > c_w: exactly 0 on r_w; r_l < -c_l: exactly 0 on r_l; the other side is still moved."""
    # far enough are: the rejected side, the chosen one, both, none, the rejected one
    chosen = torch.tensor([0.1, 0.6, 0.6, 0.1, -4.0], requires_grad=True)
    rejected = torch.tensor([-0.4, 0.2, -0.9, 0.2, -0.31], requires_grad=True)
    losses = dual_clip_losses(chosen, rejected, 0.5, 0.3)
    on_chosen, on_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))

    margins = [0.1 + 0.3, 0.5 - 0.2, 0, 0.1 - 0.2, -4.0 + 0.3]
    pull = [1 / (1 + math.exp(margin)) for margin in margins]
    assert on_chosen.tolist() == near([-pull[0], 0, 0, -pull[3], -pull[4]])
    assert on_rejected.tolist() == near([0, pull[1], 0, pull[3], 0])
    assert on_chosen[[1, 2]].tolist() == [0, 0]
    assert on_rejected[[0, 2, 4]].tolist() == [0, 0, 0]


def test_the_gradients_are_those_of_finite_differences():
    """gradcheck in float64, away from the kinks: no side clipped, either, both; and the rewards."""
    chosen = torch.tensor([0.1, 0.9, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.2, 0.2, -0.8, -0.8], dtype=torch.float64, requires_grad=True)

    def losses(chosen, rejected):
        return dual_clip_losses(chosen, rejected, 0.5, 0.3)

    assert torch.autograd.gradcheck(losses, (chosen, rejected))

    logps = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ref_logps = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def losses_of_logps(logps):
        return dual_clip_losses(*implicit_rewards(logps, ref_logps, 0.3), inf, inf)

    assert torch.autograd.gradcheck(losses_of_logps, (logps.requires_grad_(),))


def train_tiny(monkeypatch, folder: Path, pairs, **flags) -> tuple[list[dict], list[tuple]]:
    """tso.train() on a tiny model as slice 1.3, the third one, with SGD in AdamW's place.

    Returns its lines of metrics, and (weights before, gradients) of every step.
    """
    log = []

    class Recorder(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr, weight_decay=weight_decay)

        def step(self):
            params = self.param_groups[0]["params"]
            before = [p.detach().clone() for p in params]
            grads = [p.grad.clone() for p in params]
            log.append((before, grads))
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    tiny_lm(1).save_pretrained(folder / "start")
    (folder / "slice").mkdir()
    values = {
        "parallel": "none",
        "dtype": "float32",
        "activation_checkpointing": False,
        "epochs": 2,
        "lr": 0.1,
        "warmup": 0.0,
        "clip": 1e9,
        "beta": 0.3,
        "batch": 5,
        "micro_batch": 2,
    }
    values.update(flags)
    at = Slice(number=3, round=1, part=3, rows=[], folder=folder / "slice")
    start = Model(str(folder / "start"), toy.tokenizer(), CPU, torch.float32)
    tso.train(Config(**values), at, pairs, start)
    return lines(folder / "metrics.jsonl"), log


def naive_step(policy, reference, pairs, beta: float, c_w: float, c_l: float):
    """The gradients of the mean loss, and the mean metrics, one pair at a time in float64."""
    loss = 0
    rows = []
    for pair in pairs:
        logp_w = naive_logp(policy, pair.prompt, pair.chosen)
        logp_l = naive_logp(policy, pair.prompt, pair.rejected)
        with torch.no_grad():
            ref_w = naive_logp(reference, pair.prompt, pair.chosen)
            ref_l = naive_logp(reference, pair.prompt, pair.rejected)
        r_w = beta * (logp_w - ref_w)
        r_l = beta * (logp_l - ref_l)
        margin = min(r_w, c_w) - max(r_l, -c_l)
        margin = torch.as_tensor(margin, dtype=torch.float64)  # a float where both are clipped
        loss = loss - torch.log(torch.sigmoid(margin)) / len(pairs)

        r_w, r_l = r_w.item(), r_l.item()
        rows.append(
            {
                "loss": naive_dual_clip(r_w, r_l, c_w, c_l),
                "rewards/chosen": r_w,
                "rewards/rejected": r_l,
                "rewards/margins": r_w - r_l,
                "rewards/accuracies": float(r_w > r_l),
                "logps/chosen": logp_w.item(),
                "logps/rejected": logp_l.item(),
                "clipped/chosen": float(r_w > c_w),
                "clipped/rejected": float(r_l < -c_l),
            }
        )
    return torch.autograd.grad(loss, list(policy.parameters())), means(rows)


@pytest.mark.parametrize("cw, cl", [(0.15, 0.25), (inf, inf)])
def test_the_training_loop_descends_the_dual_clip_loss(monkeypatch, tmp_path, cw, cl):
    """Every step has the formula's gradient and numbers; the reference is the start."""
    pairs = random_pairs(7)
    logged, log = train_tiny(monkeypatch, tmp_path, pairs, clip_chosen=cw, clip_rejected=cl)
    first, second = order_of(7, "1.3", epoch=0), order_of(7, "1.3", epoch=1)
    steps = [first[:5], first[5:], second[:5], second[5:]]  # micro-batches of 2: an uneven last one

    policy, reference = tiny_lm(1).double(), tiny_lm(1).double()
    for step, line, (before, grads) in zip(steps, logged, log, strict=True):
        for p, value in zip(policy.parameters(), before, strict=True):
            p.data = value.double()
        batch = [pairs[i] for i in step]
        exact, expected = naive_step(policy, reference, batch, 0.3, cw, cl)
        for grad, exact_grad in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad.double(), exact_grad, atol=1e-5, rtol=1e-3)
        if line["step"] == 1:
            del expected["rewards/accuracies"]  # of two zeros, the larger is the last bit's matter
        assert {name: line[name] for name in expected} == near(expected)

    last = logged[-1]
    assert (last["iteration"], last["slice"], last["step"]) == (3, "1.3", 4)
    assert logged[0]["loss"] == near(LN2)
    chosen = [line["clipped/chosen"] for line in logged]
    rejected = [line["clipped/rejected"] for line in logged]
    assert chosen[0] == rejected[0] == 0
    if cw < inf:
        assert max(chosen) > 0
        assert max(rejected) > 0
        assert any(0 < share < 1 for share in chosen + rejected)
    else:
        assert not any(chosen + rejected)


def test_one_step_from_the_reference_raises_the_margin(monkeypatch, tmp_path):
    """The loss begins at ln 2, rewards 0; a small step lowers it, chosen goes up, rejected down."""
    flags = {"lr": 1e-3, "clip_chosen": 0.2, "clip_rejected": 0.2}
    logged, _ = train_tiny(monkeypatch, tmp_path, random_pairs(5), **flags)
    first, second = logged
    assert first["loss"] == near(LN2)
    assert first["rewards/chosen"] == near(0)
    assert first["rewards/rejected"] == near(0)
    assert second["loss"] < LN2 - 1e-4
    assert second["rewards/chosen"] > 1e-4
    assert second["rewards/rejected"] < -1e-4


def test_every_step_descends_by_its_learning_rate_and_a_clipped_gradient(monkeypatch, tmp_path):
    """A warm-up over half of the steps, then a cosine; no weight decay; |g| is at most --clip."""
    flags = {"warmup": 0.5, "clip": 0.5}
    logged, log = train_tiny(monkeypatch, tmp_path, random_pairs(7), **flags)
    rates = [0.05, 0.1, 0.1, 0.05]
    assert [line["lr"] for line in logged] == near(rates)

    for step in range(3):
        before, grads = log[step]
        after, _ = log[step + 1]
        for old, grad, new in zip(before, grads, after, strict=True):
            torch.testing.assert_close(new, old - rates[step] * grad)

    norms = [line["grad_norm"] for line in logged]
    assert max(norms) > 0.5
    for norm, (_, grads) in zip(norms, log, strict=True):
        squares = sum(grad.square().sum().item() for grad in grads)
        assert math.sqrt(squares) == near(min(norm, 0.5))


@pytest.mark.parametrize("sort", [True, False])
def test_a_steps_pairs_are_sorted_by_length_if_asked_for(monkeypatch, tmp_path, sort):
    """--sort_by_length: from one micro-batch to the next, no pair of a step gets shorter."""
    tokens = []
    collate_pairs = common.collate_pairs

    def note_and_collate(pairs, device):
        for pair in pairs:
            tokens.append(len(pair.prompt) + len(pair.chosen) + len(pair.rejected))
        return collate_pairs(pairs, device)

    monkeypatch.setattr(common, "collate_pairs", note_and_collate)
    flags = {"batch": 12, "micro_batch": 3, "epochs": 1, "sort_by_length": sort}
    train_tiny(monkeypatch, tmp_path, random_pairs(12), **flags)
    assert len(tokens) == 12
    assert (tokens == sorted(tokens)) == sort


@pytest.mark.parametrize("rounds, slices, dtype", [(1, 3, torch.bfloat16), (2, 3, torch.float32)])
def test_only_the_last_slice_of_the_last_round_is_rounded(
    monkeypatch, tmp_path, rounds, slices, dtype
):
    """--save_dtype is of the run's last checkpoint: slice 1.3 is that of one round, not of two."""
    flags = {"rounds": rounds, "slices": slices, "save_dtype": "bfloat16", "max_steps": 1}
    train_tiny(monkeypatch, tmp_path, random_pairs(5), **flags)
    saved = weights(tmp_path / "slice/checkpoint")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}


def test_the_models_of_a_training_that_is_done_are_gone(tmp_path):
    """A checkpointed layer refers to itself: no end of a function frees it, job.finish does."""
    tiny_lm(1).save_pretrained(tmp_path / "start")
    c = Config(parallel="none", dtype="float32", activation_checkpointing=True)
    gc.collect()
    gc.disable()  # whatever is collected is collected by finish
    try:
        policy = tso.shard(common.Scorer, tmp_path / "start", c, CPU)
        layers = [weakref.ref(layer) for layer in common.blocks(policy.lm)]
        del policy
        assert all(layer() is not None for layer in layers)
        assert job.finish(tmp_path) == tmp_path / "checkpoint"
        assert [layer() for layer in layers] == [None, None]
    finally:
        gc.enable()


def test_a_verdict_keeps_swaps_or_drops():
    """A, the positive is better: keep; B: swap; a tie, or nothing that could be read: drop."""
    assert correction("A") == "keep"
    assert correction("B") == "swap"
    assert correction("tie") == "drop"
    assert correction(None) == "drop"


# ---------------------------------------------------------------- diversity and spread


def bigrams(answer: list[int]) -> list[tuple[int, int]]:
    return [(answer[k], answer[k + 1]) for k in range(len(answer) - 1)]


def naive_distinct2(answers: list[list[int]]) -> float:
    """Different bigrams / bigrams, by counting."""
    found = []
    for answer in answers:
        found += bigrams(answer)
    if not found:
        return 0.0
    return len(dict.fromkeys(found)) / len(found)


def naive_jaccard(a: list[int], b: list[int]) -> float:
    """Bigrams of both answers / bigrams of either; an answer of one token has that token."""
    one = bigrams(a) or [("alone", token) for token in a]
    other = bigrams(b) or [("alone", token) for token in b]
    either = dict.fromkeys(one + other)
    both = [gram for gram in either if gram in one and gram in other]
    return len(both) / len(either) if either else 1.0


def naive_similarity(answers: list[list[int]]) -> float | None:
    """The mean Jaccard index over all pairs of answers."""
    found = []
    for i in range(len(answers)):
        for j in range(i):
            found.append(naive_jaccard(answers[i], answers[j]))
    return mean(found) if found else None


def naive_diversity(prompts: list[list[list[int]]]) -> dict:
    """Both, averaged over the prompts; a prompt without two answers has no similarity."""
    similar = [naive_similarity(answers) for answers in prompts]
    return {
        "distinct2": near(mean([naive_distinct2(answers) for answers in prompts])),
        "similarity": near(mean([value for value in similar if value is not None])),
    }


def test_diversity_counts_bigrams():
    """By hand for empty, one-token, equal and foreign answers; by counting for random ones."""
    assert distinct2([[1, 2, 3], [1, 2, 4]]) == 3 / 4
    assert distinct2([[1, 2, 1, 2, 1]]) == 2 / 4
    assert distinct2([[7], []]) == 0
    assert distinct2([]) == 0

    assert similarity([[1, 2, 3], [1, 2, 4]]) == 1 / 3
    assert similarity([[1, 2], [1, 2], [1, 2]]) == 1
    assert similarity([[1, 2], [2, 1]]) == 0
    assert similarity([[5, 6]]) is None
    assert similarity([[5], [5]]) == 1
    assert similarity([[5], [6]]) == 0
    assert similarity([[], []]) == 1
    assert similarity([[], [5]]) == 0
    assert similarity([[5], [5, 5]]) == 0
    assert similarity([[1, 2], [1, 2], [3, 4]]) == near(1 / 3)

    rng = random.Random(0)
    for _ in range(50):
        answers = []
        for _ in range(rng.randrange(2, 5)):
            length = rng.randrange(6)
            answers.append([rng.randrange(3) for _ in range(length)])
        assert distinct2(answers) == near(naive_distinct2(answers))
        assert similarity(answers) == near(naive_similarity(answers))


def as_answers(cells: dict[str, list[list[str]]]) -> dict[str, list[list[Answer]]]:
    """The texts of each cell and prompt as answers that ended by themselves."""
    answers = {}
    for cell, prompts in cells.items():
        answers[cell] = [[Answer(text, True) for text in texts] for texts in prompts]
    return answers


def test_diversity_is_reported_with_and_without_each_cell():
    """Averages over prompts of all cells, and of all but one; human is one cell on both sides."""
    positives = {"current": [["abc", "abd"], ["ef"]], "human": [["cab"], ["gh"]]}
    negatives = {"older": [["abc"], []], "human": [["bcd"], []]}
    model = Model("none", toy.tokenizer(), CPU, torch.float32)
    found = diversity(Candidates(as_answers(positives), as_answers(negatives)), model)

    expected = {}
    for left_out in (None, "current", "older", "human"):
        prompts = [[], []]
        for cell, texts in (*positives.items(), *negatives.items()):
            if cell != left_out:
                prompts[0] += map(toy_ids, texts[0])
                prompts[1] += map(toy_ids, texts[1])
        name = f"without {left_out}" if left_out else "all"
        expected[name] = naive_diversity(prompts)
    assert found == expected

    alone = Candidates(as_answers({"current": [["ab"]]}), {})
    assert diversity(alone, model) == {"all": {"distinct2": 1, "similarity": None}}


def naive_moments(scores: list[float]) -> tuple[float, float] | None:
    """Skewness and excess kurtosis, None if all scores are one."""
    if len(set(scores)) == 1:
        return None
    center = mean(scores)
    std = math.sqrt(mean([(s - center) ** 2 for s in scores]))
    standard = [(s - center) / std for s in scores]
    return mean([z**3 for z in standard]), mean([z**4 for z in standard]) - 3


def test_skewness_and_kurtosis_are_the_standardised_moments():
    """By hand: two values have kurtosis -2, one high of four leans right; then by the formula."""
    assert skewness_kurtosis([1, 3]) == near((0, -2))
    assert skewness_kurtosis([0, 0, 0, 4]) == near((2 / math.sqrt(3), 7 / 3 - 3))
    assert skewness_kurtosis([0, 4, 4, 4])[0] < 0
    assert skewness_kurtosis([5, 5, 5]) is None
    assert skewness_kurtosis([2.5]) is None
    assert skewness_kurtosis([]) is None

    rng = random.Random(0)
    for n in (2, 5, 16):
        scores = [rng.uniform(0, 10) for _ in range(n)]
        assert skewness_kurtosis(scores) == near(naive_moments(scores))


def test_equal_scores_have_no_skewness_whatever_their_last_bits():
    """All scores that the toy's judge can give, 3 to 64 times the same: None."""
    for length in range(5, 11):
        for right in range(length + 1):
            for n in (3, 4, 7, 16, 64):
                assert skewness_kurtosis([10 * right / length] * n) is None, (right, length, n)


# ---------------------------------------------------------------- pairs and their correction


def slice_of(n: int, folder: Path, name: str = "1.1") -> Slice:
    """A slice of n rows."""
    round_, part = name.split(".")
    rows = [{"id": f"r/{i}", "prompt": user(f"p{i}")} for i in range(n)]
    return Slice(1, int(round_), int(part), rows, folder)


def named(cell: str, n: int) -> list[list[Answer]]:
    """Two answers to each of n rows, whose texts say where they are from and whether they ended."""
    answers = []
    for i in range(n):
        row = []
        for k in range(2):
            ended = (i + k + len(cell)) % 3 > 0
            row.append(Answer(f"{cell}{i}.{k}.{ended}", ended))
        answers.append(row)
    return answers


def candidates(n: int, answers=named) -> Candidates:
    """Every cell's answers(cell, n); "human-" stands for the answers that people rejected."""
    positives = {"current": answers("current", n), "human": answers("human", n)}
    negatives = {
        "older": answers("older", n),
        "smaller": answers("smaller", n),
        "human": answers("human-", n),
    }
    return Candidates(positives, negatives)


def sides(pair: dict) -> tuple[Answer, Answer]:
    """The chosen and the rejected answer of a pair."""
    meta = pair["meta"]
    chosen = Answer(pair["chosen"], meta["chosen_ended"])
    rejected = Answer(pair["rejected"], meta["rejected_ended"])
    return chosen, rejected


def texts_of(pairs: list[dict]) -> list[tuple[str, str]]:
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


def test_pairs_are_spread_evenly_over_the_cells(tmp_path):
    """100 rows of 3 pairs over 6 cells: 50 each, with texts and ends of their cells; seeded."""
    at, found = slice_of(100, tmp_path, "1.2"), candidates(100)
    c = Config(pairs_per_prompt=3)
    pairs, without = make_pairs(c, at, found)
    assert without == 0
    assert Counter(pair["meta"]["cell"] for pair in pairs) == {
        "current > older": 50,
        "current > smaller": 50,
        "current > human": 50,
        "human > older": 50,
        "human > smaller": 50,
        "human > human": 50,
    }
    for place, pair in enumerate(pairs):
        i, number = place // 3, place % 3
        assert pair["id"] == f"1.2/r/{i}/{number}"
        assert pair["prompt"] == at.rows[i]["prompt"]
        positive, negative = pair["meta"]["cell"].split(" > ")
        chosen, rejected = sides(pair)
        assert chosen in found.positives[positive][i]
        assert rejected in found.negatives[negative][i]
    assert len(pairs) == 300

    # every row draws by itself: of a crossing's four pairs each is some row's first one
    drawn = set()
    for pair in pairs[::6]:
        assert pair["meta"]["cell"] == "current > older"
        drawn.add((pair["chosen"].split(".")[1], pair["rejected"].split(".")[1]))
    assert len(drawn) == 4

    again, _ = make_pairs(c, at, found)
    assert again == pairs
    draws = set()
    for seed in (0, 1):
        for name in ("1.2", "2.2"):
            seeded = Config(pairs_per_prompt=3, seed=seed)
            pairs, _ = make_pairs(seeded, slice_of(100, tmp_path, name), found)
            draws.add(tuple(texts_of(pairs)))
    assert len(draws) == 4


def texts_at(i: int, cells: dict[str, list[list[Answer]]]) -> set[str]:
    """The texts of all cells for row i that are not empty."""
    texts = set()
    for answers in cells.values():
        texts.update(answer.text for answer in answers[i])
    return texts - {"", " "}


def test_identical_and_empty_texts_make_no_pair(tmp_path):
    """As many pairs as a prompt has different ones, 3 at most; prompts without any are counted."""
    rng = random.Random(0)

    def few_letters(cell, n):
        """Two answers to each row, which are often equal or empty."""
        drawn = [rng.choices(["", " ", "a", "b", "c"], k=2) for _ in range(n)]
        return as_answers({cell: drawn})[cell]

    found = candidates(200, few_letters)
    pairs, without = make_pairs(Config(pairs_per_prompt=3), slice_of(200, tmp_path), found)
    counts = []
    for i in range(200):
        mine = texts_of([pair for pair in pairs if pair["id"].split("/")[2] == str(i)])
        positives = texts_at(i, found.positives)
        negatives = texts_at(i, found.negatives)
        possible = {(y, z) for y in positives for z in negatives if y != z}
        assert set(mine) <= possible
        unordered = {frozenset(pair) for pair in possible}
        assert len({frozenset(pair) for pair in mine}) == len(mine) == min(3, len(unordered))
        counts.append(len(mine))
    assert without == counts.count(0) > 0
    assert max(counts) == 3


def test_a_pair_and_its_reverse_are_one_pair(tmp_path):
    """(a, b) of one crossing leaves no (b, a) of another: correction would make one of both."""
    positives = as_answers({"current": [["a"]], "human": [["b"]]})
    negatives = as_answers({"older": [["b"]], "smaller": [["a"]]})
    found = Candidates(positives, negatives)
    pairs, without = make_pairs(Config(pairs_per_prompt=4), slice_of(1, tmp_path), found)
    assert texts_of(pairs) == [("a", "b")]
    assert without == 0


class Fake(common.Judge):
    """A judge with a rule: (a, b) -> verdict, or (answer) -> score."""

    def __init__(self, rule):
        super().__init__("fake", None)
        self.rule = rule

    def ask(self, kind, items, again):
        return [self.rule(*texts) for _, *texts in items]


def always_first(a, b):
    return "A"


def always_second(a, b):
    return "B"


def always_tie(a, b):
    return "tie"


def never_readable(a, b):
    return None


def unreadable_in_one_order(a, b):
    return None if a.startswith(("current", "human")) else "A"


def prefers_the_negative(a, b):
    return "A" if a.startswith(("older", "smaller", "human-")) else "B"


def prefers_the_positive(a, b):
    return "B" if a.startswith(("older", "smaller", "human-")) else "A"


def corrected(folder: Path, rule, people: dict | None = None) -> tuple[list[dict], list[dict]]:
    """The 8 pairs of 4 rows as made, and as judged by a rule and by people."""
    at = slice_of(4, folder)
    made, _ = make_pairs(Config(), at, candidates(4))
    judged = judge_pairs(Config(), at, made, Fake(rule))
    return made, apply_verdicts(made, judged, people or {}, at.name, "judge")


def swapped(pair: dict) -> dict:
    """A pair with its sides exchanged."""
    chosen, rejected = sides(pair)
    ends = {"chosen_ended": rejected.ended, "rejected_ended": chosen.ended}
    meta = {**pair["meta"], **ends}
    return {**pair, "chosen": rejected.text, "rejected": chosen.text, "meta": meta}


def with_verdict(pair: dict, verdict: str, by: str, unreadable: bool = False) -> dict:
    """A pair with what its correction adds to it."""
    meta = {**pair["meta"], "verdict": verdict, "by": by, "unreadable": unreadable}
    return {**pair, "meta": meta}


@pytest.mark.parametrize(
    "rule, verdict",
    [
        (always_first, "drop"),
        (always_second, "drop"),
        (always_tie, "drop"),
        (never_readable, "drop"),
        (unreadable_in_one_order, "drop"),
        (prefers_the_negative, "swap"),
        (prefers_the_positive, "keep"),
    ],
    ids=[
        "always the first",
        "always the second",
        "always a tie",
        "unreadable",
        "unreadable in one order",
        "the negative",
        "the positive",
    ],
)
def test_the_judge_keeps_swaps_or_drops_every_pair(tmp_path, rule, verdict):
    """Both orders are asked: a favoured place is a tie; a swap exchanges texts and ends."""
    made, after = corrected(tmp_path, rule)
    read = rule not in (never_readable, unreadable_in_one_order)
    for pair, judged in zip(made, after, strict=True):
        expected = swapped(pair) if verdict == "swap" else pair
        assert judged == with_verdict(expected, verdict, "judge", unreadable=not read)
    ends = {(chosen.ended, rejected.ended) for chosen, rejected in map(sides, made)}
    assert len(ends) > 1


def test_the_judge_goes_on_only_with_the_pairs_that_it_was_begun_with(tmp_path, capsys):
    """A killed correction is refused other texts under the same ids."""
    asked = []

    def dies(a, b):
        asked.append(a)
        if len(asked) > 4:  # two pairs, in both orders
            raise KeyError
        return "A"

    at, c = slice_of(4, tmp_path), Config(sample_batch=2)
    made, _ = make_pairs(c, at, candidates(4))
    with pytest.raises(KeyError):
        judge_pairs(c, at, made, Fake(dies))
    made[-1]["rejected"] += " and more"
    with pytest.raises(SystemExit):
        judge_pairs(c, at, made, Fake(dies))
    assert "was begun with other settings" in capsys.readouterr().err


def test_what_became_of_the_pairs_is_counted_by_cell(tmp_path):
    """A pair that could not be read is dropped, and counted as unreadable too."""
    pair = {"meta": {"cell": "current > older"}}
    other = {"meta": {"cell": "human > older"}}
    pairs = [
        with_verdict(pair, "keep", "judge"),
        with_verdict(pair, "drop", "judge"),
        with_verdict(pair, "drop", "judge", unreadable=True),
        with_verdict(other, "swap", "person"),
        with_verdict(other, "drop", "judge", unreadable=True),
        with_verdict(other, "drop", "judge", unreadable=True),
    ]
    step = {"rewards/chosen": 0, "rewards/rejected": 0, "clipped/chosen": 0, "clipped/rejected": 0}
    at = slice_of(2, tmp_path / "round1-slice1")
    line = {"iteration": at.number, "slice": "1.1", **step}
    write_lines(tmp_path / "metrics.jsonl", [line])
    summary = tso.training_summary(tmp_path, at, pairs, [], Counter())

    assert summary["made"] == 6
    one = {"made": 3, "kept": 1, "swapped": 0, "dropped": 2, "unreadable": 1}
    two = {"made": 3, "kept": 0, "swapped": 1, "dropped": 2, "unreadable": 2}
    assert summary["cells"] == {"current > older": one, "human > older": two}


def test_without_correction_every_pair_is_kept(tmp_path):
    """--no-correct asks nobody."""

    def fail(a, b):
        pytest.fail("the judge was asked")

    at = slice_of(3, tmp_path)
    made, _ = make_pairs(Config(), at, candidates(3))
    judged = judge_pairs(Config(correct=False), at, made, Fake(fail))
    assert [row["verdict"] for row in judged] == ["keep"] * 6


@pytest.mark.parametrize("rule", [prefers_the_negative, always_tie, never_readable])
def test_a_person_outranks_the_judge(tmp_path, rule):
    """A pair with a person's verdict gets that one; the others get the judge's."""
    _, by_judge = corrected(tmp_path / "judge", rule)
    ids = [pair["id"] for pair in by_judge]
    people = {ids[0]: "keep", ids[2]: "swap", ids[4]: "drop"}
    made, after = corrected(tmp_path / "person", rule, people)
    for i in (1, 3, 5, 6, 7):
        assert after[i] == by_judge[i]

    assert after[0] == with_verdict(made[0], "keep", "person")
    assert after[2] == with_verdict(swapped(made[2]), "swap", "person")
    assert after[4] == with_verdict(made[4], "drop", "person")


def test_a_person_changes_the_edited_rows_and_no_others(tmp_path):
    """Exported and read back, nothing changes, whatever the texts; 3 rows edited, these change."""
    file, at = tmp_path / "pairs.jsonl", slice_of(6, tmp_path)
    made, _ = make_pairs(Config(), at, candidates(6))
    oddities = ["a\u2028b", 'say "x"\n\n\\n', "\x85\x0b\x0c\r\n", "{}", "\ufeffä😀", "\t"]
    for pair, odd in zip(made, oddities):
        pair["chosen"] += odd
        pair["prompt"] = user(odd + "?")
    made[7]["prompt"] = [{"role": "system", "content": "s"}, *user("u")]
    judged = []
    for i, pair in enumerate(made):
        verdict = ("keep", "swap", "drop")[i % 3]
        judged.append({"id": pair["id"], "verdict": verdict, "unreadable": False})

    export(file, at, made, judged)
    rows = job.read_jsonl(file)
    for row, pair, by_judge in zip(rows, made, judged, strict=True):
        assert row["id"] == pair["id"]
        assert row["verdict"] == by_judge["verdict"]
        assert row["chosen"] == pair["chosen"]
        assert row["rejected"] == pair["rejected"]
        assert row["cell"] == pair["meta"]["cell"]
        assert datafiles.turns(row["prompt"]) == pair["prompt"]

    def applied(people):
        """The corrected pairs, but not who corrected them."""
        pairs = apply_verdicts(made, judged, people, at.name, "judge")
        for pair in pairs:
            del pair["meta"]["by"]
        return pairs

    untouched = read_verdicts(file, Config())
    assert untouched == {row["id"]: row["verdict"] for row in judged}
    before = applied({})
    assert applied(untouched) == before

    edits = {0: "swap", 4: "drop", 8: "keep"}
    for i, verdict in edits.items():
        rows[i]["verdict"] = verdict
    write_lines(file, rows)
    after = applied(read_verdicts(file, Config()))
    changed = [i for i in range(len(made)) if after[i] != before[i]]
    assert changed == [0, 4, 8]
    assert {i: after[i]["meta"]["verdict"] for i in changed} == edits
    assert after[0]["chosen"] == made[0]["rejected"]
    assert after[4]["chosen"] == made[4]["chosen"]
    assert after[8]["chosen"] == made[8]["chosen"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"id": "1.5/a/0", "verdict": "keep"}', "no pair has the id '1.5/a/0'"),
        ('{"id": "2.1/a/0", "verdict": "keep"}', "no pair has the id '2.1/a/0'"),
        ('{"verdict": "keep"}', "None"),
        ('{"id": 5, "verdict": "keep"}', "5"),
        ('["1.1/a/0", "keep"]', "None"),
        ('{"id": "1.1/b/0", "verdict": "kept"}', "the verdict is 'kept'"),
        ('{"id": "1.1/b/0"}', "the verdict is None"),
        ('{"id": "1.1/a/0", "verdict": "drop"}', "1.1/a/0 has two verdicts, keep and drop"),
        ('{"id": "1.1/b/0", "verdict": "keep"', "broken JSON"),
    ],
)
def test_a_bad_verdict_names_file_and_line(tmp_path, capsys, line, complaint):
    """Exit code 2 and one line; the same verdict twice is none."""
    file = tmp_path / "verdicts.jsonl"
    good = '{"id": "1.1/a/0", "verdict": "keep"}'
    file.write_text(f"{good}\n\n{good}\n{line}\n")
    with pytest.raises(SystemExit) as stop:
        read_verdicts(file, Config())
    err = one_line(stop, capsys)
    assert err.startswith(f"error: {file}:4: ")
    assert complaint in err


def test_a_verdict_on_a_pair_that_is_not_there_ends_the_run(tmp_path, capsys):
    """Exit code 2 with the id; a verdict on another slice's pair waits for that slice."""
    _, after = corrected(tmp_path / "a", always_first, {"1.2/r/0/0": "keep"})
    assert [pair["meta"]["by"] for pair in after] == ["judge"] * 8
    people = {"1.1/r/0/0": "keep", "1.1/r/9/0": "keep"}
    with pytest.raises(SystemExit) as stop:
        corrected(tmp_path / "b", always_first, people)
    assert "'1.1/r/9/0'" in one_line(stop, capsys)


def test_a_correction_goes_on_only_with_the_prompts_that_its_judge_was_asked_with(tmp_path, capsys):
    """A judge whose prompts were edited after a kill is another one: old verdicts are refused."""
    at = slice_of(4, tmp_path)
    made, _ = make_pairs(Config(), at, candidates(4))
    asked = []

    def dies_after_4(a, b):
        asked.append(a)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return "A"

    with pytest.raises(KeyboardInterrupt):
        judge_pairs(Config(sample_batch=2), at, made, Fake(dies_after_4))
    edited = Fake(always_first)
    edited.key = ["fake", "another prompt"]
    with pytest.raises(SystemExit) as stop:
        judge_pairs(Config(sample_batch=2), at, made, edited)
    assert "was begun with other settings" in one_line(stop, capsys)
    assert len(judge_pairs(Config(sample_batch=2), at, made, Fake(always_first))) == 8


def test_what_nobody_has_judged_says_so(tmp_path):
    """Without a judge a pair is kept, and meta.by is a person or nobody."""
    at, c = slice_of(4, tmp_path), Config(judge="none", verdicts="verdicts.jsonl")
    made, _ = make_pairs(c, at, candidates(4))
    judged = judge_pairs(c, at, made, None)
    people = {made[3]["id"]: "swap"}
    after = apply_verdicts(made, judged, people, at.name, None)
    assert [pair["meta"]["by"] for pair in after] == [None] * 3 + ["person"] + [None] * 4
    assert [pair["meta"]["verdict"] for pair in after] == ["keep"] * 3 + ["swap"] + ["keep"] * 4


def test_the_answers_of_the_data_are_cut_or_whole_as_their_row_says(tmp_path):
    """A chosen side that was cut is no whole response, and ids that were sampled go with it.

    In a file of generate.py's, meta.finish says of the response whether it was cut.
    """
    cut = {"chosen_ended": False, "sampled_ids": [[8, 7]]}
    said = {"finish": "length", "chosen_ended": True}
    rows = []
    metas = [cut, {"rejected_ended": False}, {}, {"finish": "length"}, {"finish": "stop"}, said]
    for i, meta in enumerate(metas):
        rows.append({"id": f"{i}", "prompt": user("p"), "response": "a", "rejected": "b"})
        rows[-1]["meta"] = meta
    at = Slice(1, 1, 1, rows, tmp_path)
    c = Config(positives=["human"], negatives=["human"])
    found = sample_matrix(c, at, None, [], None)
    positives = [[Answer("a", ended)] for ended in (False, True, True, False, True, True)]
    negatives = [[Answer("b", ended)] for ended in (True, False, True, True, True, True)]
    positives[0] = [Answer("a", False, None, [[8, 7]])]
    negatives[0] = [Answer("b", True, None, [[8, 7]])]
    assert found.positives == {"human": positives}
    assert found.negatives == {"human": negatives}


def test_every_model_gives_as_many_answers_as_were_asked_for(tmp_path, monkeypatch):
    """n_positive and n_negative of the policy's, n_negative of each older and smaller model's."""

    def generate(file, rows, model, sampling, seed, n, note):
        drawn = []
        for row in rows:
            for k in range(n):
                text = f"{model.path} {row['id']} {k}"
                drawn.append({"response": text, "meta": {"finish": "stop"}})
        return drawn

    monkeypatch.setattr(common, "generate", generate)
    monkeypatch.setattr(common, "load_tokenizer", lambda path: (None, None))
    everybody = {"positives": ["current"], "negatives": ["current", "older", "smaller"]}
    c = Config(**everybody, smaller=["small"], n_positive=2, n_negative=3)
    policy = Model("policy", None, CPU, torch.float32)
    found = sample_matrix(c, slice_of(2, tmp_path), policy, ["old", "older"], None)

    def texts(i, *names):
        return [Answer(f"{path} r/{i} {k}", True) for path, k in names]

    for i in range(2):
        own = [("policy", k) for k in range(5)]
        assert found.positives["current"][i] == texts(i, *own[:2])
        assert found.negatives["current"][i] == texts(i, *own[2:])
        older = [(path, k) for path in ("old", "older") for k in range(3)]
        assert found.negatives["older"][i] == texts(i, *older)
        assert found.negatives["smaller"][i] == texts(i, *[("small", k) for k in range(3)])
    assert (len(found.positives), len(found.negatives)) == (1, 3)


def test_the_ids_that_answers_were_sampled_as_go_with_their_pairs(tmp_path, monkeypatch):
    """From the file of answers to the pair, and through a swap; without any there is no entry."""
    drawn = []
    for i, meta in enumerate([{"sampled_ids": [[8, 7]]}, {}] * 4):
        drawn.append({"response": f"x{i}", "meta": {"finish": "stop", **meta}})

    def generate(*args, **more):
        return drawn

    monkeypatch.setattr(common, "generate", generate)
    at = slice_of(4, tmp_path)
    answers = tso.draw_answers(Config(), at, "older0", None, 2, None)
    assert answers[3] == [Answer("x6", True, None, [[8, 7]]), Answer("x7", True)]

    human = [[Answer("y", True)]] * 4
    made, _ = make_pairs(Config(), at, Candidates({"human": human}, {"older": answers}))
    for pair in made:
        wanted = [[8, 7]] if pair["rejected"][1] in "0246" else None
        assert pair["meta"].get("sampled_ids") == wanted
        assert tso.swapped(pair)["meta"].get("sampled_ids") == wanted
    assert len(made) == 8


def test_a_slice_that_gives_no_pair_ends_the_run(tmp_path, capsys):
    """Exit code 2 with the cells that were asked for: all texts are the same."""

    def same(cell, n):
        return [[Answer("a", True)]] * n

    with pytest.raises(SystemExit) as stop:
        make_pairs(Config(), slice_of(2, tmp_path), candidates(2, same))
    asked = "positives current, human and negatives older, smaller, human"
    assert f"slice 1.1: no pairs: {asked} gave no two different texts" in one_line(stop, capsys)


def test_a_slice_whose_pairs_are_all_dropped_ends_the_run(tmp_path, capsys):
    """Exit code 2 with the counts: there is nothing to train on."""
    _, after = corrected(tmp_path, always_tie)
    with pytest.raises(SystemExit) as stop:
        tso.encode_kept(Config(), slice_of(4, tmp_path), toy.tokenizer(), after)
    err = one_line(stop, capsys)
    assert "slice 1.1: no pair left to train on: 8 made, 8 dropped by correction" in err


# ---------------------------------------------------------------- slices


def read_slices(world: Path, **more) -> tuple[list[list[str]], list[str]]:
    """The ids of the rows of every slice, and of the held-out rows."""
    tok, _ = common.load_tokenizer(str(world / "sft"))
    parts, test_rows, _ = tso.read_rows(config_of(world, **more), tok)
    slices = [[row["id"] for row in part] for part in parts]
    return slices, [row["id"] for row in test_rows]


def test_slices_share_the_prompts_out(world):
    """Every prompt is in one slice, in a seeded order; without --test a tenth is held out."""
    slices, _ = read_slices(world, limit=40, slices=4)
    assert [len(ids) for ids in slices] == [10] * 4
    names = [f"train-{i}" for i in range(40)]
    order = sum(slices, [])
    assert order != names
    assert sorted(order) == sorted(names)
    again, _ = read_slices(world, limit=40, slices=4)
    assert again == slices
    other, _ = read_slices(world, limit=40, slices=4, seed=1)
    assert other != slices

    slices, test_ids = read_slices(world, limit=1000, test=None)
    held = []
    for row in lines(world / "train.jsonl"):
        if job.seed_of(user(row["prompt"])) % 1000 < 100:
            held.append(row["id"])
    assert test_ids == held[:12]
    rest = {f"train-{i}" for i in range(120)} - set(held)
    assert sorted(sum(slices, [])) == sorted(rest)


@pytest.mark.parametrize(
    "rows, found",
    [
        ([{"response": "a"}, {"response": "b", "rejected": "c"}], True),
        ([{"response": "a"}, {"real": "b", "generated": "c"}], True),
        ([{"response": "a"}, {"response": "b", "rejected": None}], False),
        ([["rejected"], {"response": "b", "rejected": ""}], False),
        ([], False),
    ],
)
def test_data_have_pairs_if_any_row_is_one(tmp_path, rows, found):
    """Whichever row it is; a side that is null or empty is none, nor is what is no row."""
    write_lines(tmp_path / "data.jsonl", rows)
    assert tso.has_pairs(str(tmp_path / "data.jsonl")) is found


def test_held_out_prompts_that_are_all_too_long_end_the_run(world, tmp_path, capsys):
    """There is nothing to measure on: one line with both counts."""
    test = tmp_path / "test.jsonl"
    write_lines(test, [{"prompt": "abcdefgh" * 5, "response": "a"}])
    with pytest.raises(SystemExit) as stop:
        read_slices(world, test=test)
    assert "40 training and 0 held-out prompts of at most 32" in one_line(stop, capsys)


def test_there_are_no_more_held_out_prompts_than_the_limit(world):
    """--test_prompts of them, but at most --limit, from a file of their own or not."""
    for test in (world / "test.jsonl", None):
        for limit, count in ((40, 8), (5, 5)):
            _, test_ids = read_slices(world, test=test, limit=limit, test_prompts=8)
            assert len(test_ids) == count


def test_slices_differ_by_at_most_one_prompt(world):
    """9 prompts in 6 slices, 10 in 4: none is empty."""
    for limit, count in ((9, 6), (10, 4)):
        slices, _ = read_slices(world, limit=limit, slices=count)
        sizes = [len(ids) for ids in slices]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= 1


def test_every_round_goes_through_all_slices(tmp_path):
    """2 rounds of 3 slices: numbers go on, each slice has its own prompts, folder and name."""
    parts = [[{"id": "a"}], [{"id": "b"}], [{"id": "c"}]]
    c = Config(rounds=2, slices=3)
    assert tso.all_slices(c, parts, tmp_path) == [
        Slice(1, 1, 1, [{"id": "a"}], tmp_path / "round1-slice1"),
        Slice(2, 1, 2, [{"id": "b"}], tmp_path / "round1-slice2"),
        Slice(3, 1, 3, [{"id": "c"}], tmp_path / "round1-slice3"),
        Slice(4, 2, 1, [{"id": "a"}], tmp_path / "round2-slice1"),
        Slice(5, 2, 2, [{"id": "b"}], tmp_path / "round2-slice2"),
        Slice(6, 2, 3, [{"id": "c"}], tmp_path / "round2-slice3"),
    ]
    names = [at.name for at in tso.all_slices(c, parts, tmp_path)]
    assert names == ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3"]


def test_a_run_is_not_shortened(tmp_path, capsys):
    """With fewer --rounds than it has gone through, its results would leave slices out."""
    after = tmp_path / "round3-slice1"
    after.mkdir()
    c = Config(rounds=2, slices=2, out=str(tmp_path), resume=True)
    with pytest.raises(SystemExit) as stop:
        tso.prepare(c, torch.device("cpu"))
    line = f"error: {after} is there already: this run had a larger --rounds\n"
    assert one_line(stop, capsys) == line
    begun_again = Config(out=str(tmp_path), overwrite=True)
    job.refuse_to_shorten(begun_again, after.name, "--rounds")  # what is deleted does not matter


# ---------------------------------------------------------------- measurements


def test_what_could_not_be_read_is_in_no_share_against_the_start(tmp_path):
    """Of win, win, tie, loss and an unreadable one the shares are of 4; of none they are None."""
    readable = {
        ("better", "start"): "A",
        ("start", "better"): "B",
        ("same", "start"): "tie",
        ("start", "same"): "tie",
        ("worse", "start"): "B",
        ("start", "worse"): "A",
    }

    def read(a, b):
        return readable.get((a, b))

    texts = ["better", "?", "worse", "better", "same"]
    for folder, answers in (("start", ["start"] * 5), ("one", texts), ("two", texts)):
        (tmp_path / folder).mkdir()
        rows = []
        for i, text in enumerate(answers):
            rows.append({"id": f"r/{i}", "prompt": user(f"p{i}"), "response": text})
        write_lines(tmp_path / folder / "answers.jsonl", rows)

    start = tmp_path / "start"
    shares = tso.against_start(tmp_path / "one", start, Fake(read), 2, "")
    assert shares == {"win": 2 / 4, "tie": 1 / 4, "loss": 1 / 4}
    verdicts = [row["verdict"] for row in job.read_jsonl(tmp_path / "one/against.jsonl")]
    assert verdicts == ["win", None, "loss", "win", "tie"]

    shares = tso.against_start(tmp_path / "two", start, Fake(never_readable), 2, "")
    assert shares == {"win": None, "tie": None, "loss": None}


def test_what_could_not_be_read_is_in_no_moment_of_the_scores(monkeypatch, tmp_path):
    """A prompt's moments are those of its scores that could be read; without any it has none."""
    scores = [[1, None, 8], [None, 5, 5], [None] * 3, [2, 2, 9], [1, 3, 8]]
    drawn = []
    for i, of_row in enumerate(scores):
        for k, score in enumerate(of_row):
            text = f"{i}.{k} {'?' if score is None else score}"
            drawn.append({"id": f"r/{i}", "prompt": user(f"p{i}"), "response": text})

    def generate(*args, **more):
        return drawn

    def read(answer):
        number = answer.split()[1]
        return None if number == "?" else float(number)

    monkeypatch.setattr(common, "generate", generate)
    at = slice_of(5, tmp_path)
    c = Config(n_scores=3, sample_batch=2)
    found = tso.score_spread(c, at, at.rows, None, None, Fake(read))

    moments = [naive_moments(some) for some in ([1, 8], [2, 2, 9], [1, 3, 8])]
    assert found == {
        "skewness": near(mean([skewness for skewness, _ in moments])),
        "kurtosis": near(mean([kurtosis for _, kurtosis in moments])),
        "no_spread": 2 / 5,
    }
    rows = job.read_jsonl(tmp_path / "spread.jsonl")
    assert [row["mean"] for row in rows] == [4.5, 5, None, near(13 / 3), 4]
    first, equal, unread, *last = [row["skewness"] for row in rows]
    assert [first, *last] == near([skewness for skewness, _ in moments])
    assert equal is unread is None


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory) -> Path:
    """One run in one process: two slices of 20 prompts and 5 steps."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert forked(tso, *tso_flags(world, PLAIN, out=out)) == 0
    return out


def test_a_slice_of_a_finished_run_is_made_again_and_nothing_else(
    monkeypatch, world, plain, tmp_path
):
    """Without its checkpoint, --resume trains that slice again; all that came later stays."""
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    shutil.rmtree(out / "round1-slice1/checkpoint")
    run(monkeypatch, tso, *tso_flags(world, PLAIN, out=out), "--resume")
    assert results(out) == results(plain)
    assert sorted(metrics(out), key=lambda line: line["iteration"]) == metrics(plain)
    again = weights(out / "round1-slice1/checkpoint")
    assert_close(again, weights(plain / "round1-slice1/checkpoint"), atol=0)


@pytest.mark.parametrize("n", [1, 2])
def test_more_pairs_than_there_are_is_all_of_them(n):
    """A million pairs a prompt are looked for only as long as there are any."""
    rows = [{"id": str(i), "prompt": []} for i in range(n)]
    answers = [[Answer(text, True) for text in "ab"] for _ in rows]
    others = [[Answer(text, True) for text in "bcd"] for _ in rows]
    candidates = Candidates({"current": answers}, {"older": others, "human": others})
    at = Slice(1, 1, 1, rows, None)
    started = time.monotonic()
    pairs, without = make_pairs(Config(pairs_per_prompt=10**6, seed=1), at, candidates)
    assert time.monotonic() - started < 1
    assert len(pairs) == 5 * n  # a with b, c, d, and b with c, d
    assert without == 0


def naive_score(prompt: str, answer: str) -> float:
    """The toy's rule: 10 x right places / length of the longer one."""
    solution = sorted(prompt)
    right = 0
    for i in range(min(len(solution), len(answer))):
        if answer[i] == solution[i]:
            right += 1
    return 10 * right / max(len(solution), len(answer))


def scores_in(file: Path) -> list[float]:
    """The toy's scores of the answers in a file."""
    scores = []
    for row in job.read_jsonl(file):
        scores.append(naive_score(row["prompt"][0]["content"], row["response"]))
    return scores


def naive_shares(mine: list[float], others: list[float], ending: str = "") -> dict:
    """The shares of mine that score more than, as much as and less than the others."""
    both = list(zip(mine, others, strict=True))
    return {
        f"win{ending}": mean([x > y for x, y in both]),
        f"tie{ending}": mean([x == y for x, y in both]),
        f"loss{ending}": mean([x < y for x, y in both]),
    }


def naive_training(steps: list[dict]) -> dict:
    """Means over the last quarter of a slice's steps."""
    end = steps[len(steps) - math.ceil(len(steps) / 4) :]
    return {
        "chosen_reward": mean([line["rewards/chosen"] for line in end]),
        "rejected_reward": mean([line["rewards/rejected"] for line in end]),
        "clipped_chosen": mean([line["clipped/chosen"] for line in end]),
        "clipped_rejected": mean([line["clipped/rejected"] for line in end]),
    }


def naive_cells(pairs: list[dict]) -> dict:
    """How many pairs of each cell have which verdict."""
    verdicts = {}
    for pair in pairs:
        meta = pair["meta"]
        verdicts.setdefault(meta["cell"], []).append(meta["verdict"])

    cells = {}
    for cell, words in verdicts.items():
        cells[cell] = {
            "made": len(words),
            "kept": words.count("keep"),
            "swapped": words.count("swap"),
            "dropped": words.count("drop"),
            "unreadable": 0,
        }
    return cells


def naive_spread(scores: list[float]) -> dict:
    """Mean moments of four scores each, and the share of those that are all equal."""
    moments = [naive_moments(scores[i : i + 4]) for i in range(0, len(scores), 4)]
    unequal = [pair for pair in moments if pair is not None]
    return {
        "skewness": mean([skewness for skewness, _ in unequal]),
        "kurtosis": mean([kurtosis for _, kurtosis in unequal]),
        "no_spread": moments.count(None) / len(moments),
    }


def test_results_are_those_of_the_files(plain, world):
    """results.json is what the files of answers, pairs and metrics say under the toy's rule."""
    report = json.loads((plain / "results.json").read_text())["slices"]
    folders = ["start", "round1-slice1", "round1-slice2"]
    scores = {name: scores_in(plain / name / "answers.jsonl") for name in folders}
    assert [(result["round"], result["slice"]) for result in report] == [(0, 0), (1, 1), (1, 2)]
    assert len({tuple(values) for values in scores.values()}) == 3

    annotator = {}
    for row in lines(world / "test.jsonl"):
        annotator[row["id"]] = naive_score(row["prompt"], row["response"])

    for result, name in zip(report, folders, strict=True):
        answers = job.read_jsonl(plain / name / "answers.jsonl")
        mine = scores[name]
        expected = {
            "score": mean(mine),
            "full_marks": mean([score == 10 for score in mine]),
            "cut": mean([row["meta"]["finish"] == "length" for row in answers]),
        }
        annotated = [annotator[row["id"]] for row in answers]
        expected.update(naive_shares(mine, annotated, "_annotation"))
        others = {"round", "slice"}

        if name != "start":
            expected.update(naive_shares(mine, scores["start"]))
            steps = [line for line in metrics(plain) if line["slice"] == f"1.{name[-1]}"]
            expected.update(naive_training(steps))

            pairs = job.read_jsonl(plain / name / "pairs.jsonl")
            kept = kept_pairs(plain / name)
            prompts = {pair["id"].split("/")[1] for pair in pairs}
            expected["made"] = len(pairs)
            expected["pairs"] = len(kept)
            expected["steps"] = math.ceil(len(kept) / 8)
            expected["prompts_without_pair"] = 20 - len(prompts)
            assert len(steps) == result["steps"]

            cells = naive_cells(pairs)
            assert len(cells) == 4
            assert result["cells"] == cells
            others |= {"cells", "diversity", "left_out"}

        if name != "round1-slice1":  # in the start and the end
            many = scores_in(plain / name / "many.jsonl")
            assert len(many) == 12 * 4
            expected.update(naive_spread(many))
        assert {key: result[key] for key in expected} == pytest.approx(expected)
        assert result.keys() - expected.keys() == others


def test_the_diversity_in_the_results_is_that_of_the_candidates(plain, world):
    """Of the last slice's files and the annotators' answers, with and without the smaller model."""
    report = json.loads((plain / "results.json").read_text())["slices"]
    folder = plain / "round1-slice2"
    current = job.read_jsonl(folder / "candidates-current.jsonl")
    older = job.read_jsonl(folder / "candidates-older0.jsonl")
    smaller = job.read_jsonl(folder / "candidates-smaller0.jsonl")
    human = {row["id"]: row["response"] for row in lines(world / "train.jsonl")}

    prompts, without = [], []
    for i in range(20):
        large = [current[i]["response"], older[i]["response"], human[current[i]["id"]]]
        without.append([toy_ids(text) for text in large])
        prompts.append([*without[i], toy_ids(smaller[i]["response"])])
    found = report[2]["diversity"]
    assert found["all"] == naive_diversity(prompts)
    assert found["without smaller"] == naive_diversity(without)


def drawn_in(file: Path) -> dict[str, Answer]:
    """The answers in a file of candidates by the id of their row."""
    answers = {}
    for row in job.read_jsonl(file):
        answers[row["id"]] = Answer(row["response"], row["meta"]["finish"] == "stop")
    return answers


def test_every_pair_is_of_its_cell_and_of_the_judges_mind(plain, world):
    """Both sides are their cells' answers, each with its own end; the chosen one scores higher."""
    human = {row["id"]: Answer(row["response"], True) for row in lines(world / "train.jsonl")}
    seen = Counter()
    for name in ("round1-slice1", "round1-slice2"):
        drawn = {
            "current": drawn_in(plain / name / "candidates-current.jsonl"),
            "older": drawn_in(plain / name / "candidates-older0.jsonl"),
            "smaller": drawn_in(plain / name / "candidates-smaller0.jsonl"),
            "human": human,
        }
        for pair in job.read_jsonl(plain / name / "pairs.jsonl"):
            letters = pair["prompt"][0]["content"]
            verdict = pair["meta"]["verdict"]
            gap = naive_score(letters, pair["chosen"]) - naive_score(letters, pair["rejected"])
            if verdict == "drop":
                assert gap == 0
            else:
                assert gap > 0

            row = pair["id"].split("/")[1]
            positive, negative = pair["meta"]["cell"].split(" > ")
            made = swapped(pair) if verdict == "swap" else pair
            assert sides(made) == (drawn[positive][row], drawn[negative][row])
            seen[verdict] += 1
    assert seen["keep"] > 2
    assert seen["swap"] > 2
    assert seen["drop"] > 2


def resampled(tmp_path: Path, file: Path, model: Path) -> bytes:
    """The bytes of a file of candidates, drawn once more from a model."""
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in job.read_jsonl(file)]
    tok, _ = common.load_tokenizer(str(model))
    name = file.stem.removeprefix("candidates-")
    again = tmp_path / "again.jsonl"
    common.generate(
        again,
        rows,
        Model(str(model), tok, CPU, torch.float32),
        Sampling(temperature=1.0, max_new_tokens=16, batch=5),
        job.seed_of(0, "candidates", file.parent.name, name),
    )
    text = again.read_bytes()
    again.unlink()
    return text


def test_every_cell_is_sampled_from_its_model(plain, world, tmp_path):
    """In slice 2 the current cell is of slice 1's checkpoint, and not of the start again."""
    one, two = plain / "round1-slice1", plain / "round1-slice2"
    for file, model in (
        (one / "candidates-current.jsonl", world / "sft"),
        (one / "candidates-older0.jsonl", world / "sft-early"),
        (one / "candidates-smaller0.jsonl", world / "sft-small"),
        (two / "candidates-current.jsonl", one / "checkpoint"),
        (two / "candidates-older0.jsonl", world / "sft-early"),
        (two / "candidates-smaller0.jsonl", world / "sft-small"),
    ):
        assert file.read_bytes() == resampled(tmp_path, file, model), file
    current = two / "candidates-current.jsonl"
    assert current.read_bytes() != resampled(tmp_path, current, world / "sft")


def test_every_slice_starts_where_the_last_one_ended(plain, world):
    """Step 1 has the log-probs of the start, then of slice 1's end, which is the reference too."""
    from transformers import AutoModelForCausalLM

    tok, _ = common.load_tokenizer(str(world / "sft"))
    starts = {"1.1": world / "sft", "1.2": plain / "round1-slice1/checkpoint"}
    for name, start in starts.items():
        first = [line for line in metrics(plain) if line["slice"] == name][0]
        assert first["step"] == 1
        assert first["lr"] == 5e-5
        assert first["loss"] == near(LN2)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert first[key] == near(0)

        lm = AutoModelForCausalLM.from_pretrained(start)
        pairs = kept_pairs(plain / f"round1-slice{name[-1]}")
        batch = [pairs[i] for i in order_of(len(pairs), name)[:8]]
        for side in ("chosen", "rejected"):
            logps = [text_logp(lm, tok, pair, side) for pair in batch]
            assert first[f"logps/{side}"] == pytest.approx(mean(logps), abs=1e-3)


def candidate_names(folder: Path) -> list[str]:
    """NAME of every candidates-NAME.jsonl of a slice."""
    return sorted(file.stem.removeprefix("candidates-") for file in folder.glob("candidates*"))


def test_the_policy_at_a_rounds_end_joins_the_older_ones(monkeypatch, plain, world, tmp_path):
    """The end of round 1 is the current version in slice 2.1, and an older one in slice 2.2."""
    out = shutil.copytree(plain, tmp_path / "run")
    run(monkeypatch, tso, *tso_flags(world, PLAIN, out=out, rounds=2), "--resume")
    before = metrics(plain)
    assert metrics(out)[: len(before)] == before
    turns = [(result["round"], result["slice"]) for result in results(out)["slices"]]
    assert turns == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    spread = ["skewness" in result for result in results(out)["slices"]]
    assert spread == [True, False, False, False, True]  # before and after all rounds

    one, two = out / "round2-slice1", out / "round2-slice2"
    assert candidate_names(one) == ["current", "older0", "smaller0"]
    assert candidate_names(two) == ["current", "older0", "older1", "smaller0"]
    round_end = out / "round1-slice2/checkpoint"
    for file, model in (
        (one / "candidates-current.jsonl", round_end),
        (two / "candidates-current.jsonl", one / "checkpoint"),
        (two / "candidates-older0.jsonl", world / "sft-early"),
        (two / "candidates-older1.jsonl", round_end),
    ):
        assert file.read_bytes() == resampled(tmp_path, file, model), file

    drawn = {row["response"] for row in job.read_jsonl(two / "candidates-older1.jsonl")}
    texts = set()
    for pair in job.read_jsonl(two / "pairs.jsonl"):
        if pair["meta"]["cell"].endswith("older"):
            texts |= {pair["chosen"], pair["rejected"]}
    assert texts & drawn

    first_steps = [line for line in metrics(out) if line["step"] == 1]
    assert [line["slice"] for line in first_steps] == ["1.1", "1.2", "2.1", "2.2"]
    assert [line["loss"] for line in first_steps] == near([LN2] * 4)


def mirror(monkeypatch, small: Path, folder: Path):
    """The same model with its letters' ids reversed, in weights and tokenizer."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(small)
    with monkeypatch.context() as patch:
        patch.setattr(toy, "LETTERS", toy.LETTERS[::-1])
        toy.tokenizer().save_pretrained(folder)
    embeddings = lm.model.embed_tokens.weight.data
    embeddings[7:] = embeddings[7:].flip(0).clone()
    lm.save_pretrained(folder)


def test_a_smaller_model_may_have_another_tokenizer(monkeypatch, world, tmp_path):
    """sft-small and its mirror image give the same candidates, pairs and weights to the byte."""
    small, mirrored = world / "sft-small", tmp_path / "mirrored"
    mirror(monkeypatch, small, mirrored)
    for model, ids in ((small, [7, 8]), (mirrored, [22, 21])):
        tok, _ = common.load_tokenizer(str(model))
        assert tok("ab", add_special_tokens=False)["input_ids"] == ids

    for name, model in (("a", small), ("b", mirrored)):
        flags = tso_flags(world, ONE, out=tmp_path / name, smaller=[model], temperature=0)
        run(monkeypatch, tso, *flags)
    a, b = tmp_path / "a/round1-slice1", tmp_path / "b/round1-slice1"
    for file in ("candidates-smaller0.jsonl", "pairs.jsonl", "checkpoint/model.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    drawn = {row["response"] for row in job.read_jsonl(b / "candidates-smaller0.jsonl")}
    assert len(drawn) > 3


def test_rejected_sides_are_human_negatives(monkeypatch, world, tmp_path):
    """Both sides of --data are human answers, whole; only the cells asked for are sampled."""
    out, data = tmp_path / "run", world / "pairs.jsonl"
    more = {"data": data, "limit": 20, "negatives": ["human"], "correct": False}
    run(monkeypatch, tso, *tso_flags(world, ONE, more, out=out))
    folder = out / "round1-slice1"
    assert candidate_names(folder) == ["current"]

    rows = {row["id"]: row for row in lines(data)}
    drawn = drawn_in(folder / "candidates-current.jsonl")
    not_empty = [answer for answer in drawn.values() if answer.text]
    pairs = job.read_jsonl(folder / "pairs.jsonl")
    counts = Counter(pair["meta"]["cell"] for pair in pairs)
    assert counts == {"current > human": len(not_empty), "human > human": 20}

    for pair in pairs:
        name = pair["id"].split("/")[1]
        row = rows[name]
        positives = {
            "current > human": drawn[name],
            "human > human": Answer(row["chosen"], True),
        }
        positive = positives[pair["meta"]["cell"]]
        assert sides(pair) == (positive, Answer(row["rejected"], True))
        assert pair["meta"]["verdict"] == "keep"
        assert pair["meta"]["by"] is None
        assert pair["prompt"][0]["content"] == row["prompt"]


def test_current_answers_may_be_negatives_of_their_own(monkeypatch, world, tmp_path):
    """n_positive answers on one side, n_negative others on the other; the judge decides."""
    own = {"positives": ["current"], "negatives": ["current"], "n_positive": 2, "n_negative": 3}
    flags = tso_flags(world, ONE, own, out=tmp_path / "run", pairs_per_prompt=6)
    run(monkeypatch, tso, *flags)
    folder = tmp_path / "run/round1-slice1"

    drawn, made = {}, {}  # for each row
    for row in job.read_jsonl(folder / "candidates-current.jsonl"):
        drawn.setdefault(row["id"], []).append(row["response"])
    for pair in job.read_jsonl(folder / "pairs.jsonl"):
        assert pair["meta"]["cell"] == "current > current"
        if pair["meta"]["verdict"] == "swap":
            pair = swapped(pair)
        name = pair["id"].split("/")[1]
        made.setdefault(name, set()).add((pair["chosen"], pair["rejected"]))

    for name, texts in drawn.items():
        assert len(texts) == 5
        possible = set()
        for positive in texts[:2]:
            for negative in texts[2:]:
                if positive and negative and positive != negative:
                    possible.add((positive, negative))
        assert made.get(name, set()) == possible


# ---------------------------------------------------------------- people


def test_a_slice_waits_for_a_person_who_has_judged_none_of_its_pairs(tmp_path):
    """One verdict is enough to go on; so is a checkpoint, or that nothing is to be exported."""
    at = slice_of(2, tmp_path)
    pairs = [{"id": "1.1/r/0/0"}, {"id": "1.1/r/1/0"}]
    other, one = {"1.2/r/0/0": "keep"}, {"1.1/r/1/0": "drop"}
    c = Config(export_pairs="pairs.jsonl")
    assert tso.awaits_person(c, at, pairs, {})
    assert tso.awaits_person(c, at, pairs, other)
    assert not tso.awaits_person(c, at, pairs, one)
    assert not tso.awaits_person(Config(), at, pairs, {})
    (tmp_path / "checkpoint").mkdir()
    assert not tso.awaits_person(c, at, pairs, {})


def test_an_export_does_not_replace_what_a_person_has_edited(monkeypatch, world, tmp_path, capsys):
    """A file that is there is refused, and stays, unless it is the one that --verdicts reads."""
    file = tmp_path / "pairs.jsonl"
    write_lines(file, [{"id": "1.1/train-0/0", "verdict": "drop"}])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")  # leads to nothing
    edited = file.read_bytes()
    flags = tso_flags(world, out=tmp_path / "run")
    for path, verdicts in (
        (file, []),
        (tmp_path / "link.jsonl", []),
        (tmp_path / "link.jsonl", ["--verdicts", file]),
    ):
        line = refused(monkeypatch, capsys, tso, [*flags, "--export_pairs", path, *verdicts])
        assert f"--export_pairs {path} is there already" in line
    assert file.read_bytes() == edited

    run(monkeypatch, tso, *flags, "--export_pairs", file, "--verdicts", file, "--dry_run")
    assert "correction by people and toy" in capsys.readouterr().out
    assert file.read_bytes() == edited


def test_an_exported_slice_waits_for_a_person(monkeypatch, plain, world, tmp_path):
    """Nothing is trained before the person has spoken, and slice 1 only on what the person said."""
    out, file = tmp_path / "run", tmp_path / "pairs.jsonl"
    flags = tso_flags(world, PLAIN, out=out)
    assert forked(tso, *flags, "--export_pairs", file) == 0
    assert not list(out.rglob("checkpoint"))
    assert not (out / "metrics.jsonl").exists()
    assert not (out / "results.json").exists()

    rows = job.read_jsonl(file)
    by_judge = job.read_jsonl(plain / "round1-slice1/pairs.jsonl")
    for row, pair in zip(rows, by_judge, strict=True):
        assert row["id"] == pair["id"]
        assert row["verdict"] == pair["meta"]["verdict"]

    said = []
    for i, row in enumerate(rows):
        row["verdict"] = ("swap", "drop", "keep")[i % 3]
        if row["verdict"] == "swap":
            said.append((row["rejected"], row["chosen"]))
        elif row["verdict"] == "keep":
            said.append((row["chosen"], row["rejected"]))
    write_lines(file, rows)

    seen = []
    train = tso.train

    def note_and_train(c, at, pairs, start):
        seen.append(pairs)
        train(c, at, pairs, start)

    monkeypatch.setattr(tso, "train", note_and_train)
    run(monkeypatch, tso, *flags, "--resume", "--verdicts", file)

    tok = toy.tokenizer()
    trained_on = []
    for pair in seen[0]:
        chosen = tok.decode(pair.chosen, skip_special_tokens=True)
        rejected = tok.decode(pair.rejected, skip_special_tokens=True)
        trained_on.append((chosen, rejected))
    assert trained_on == said
    spoken = Counter(row["verdict"] for row in rows)
    assert min(spoken[verdict] for verdict in ("keep", "swap", "drop")) > 10
    for name, by in (("round1-slice1", "person"), ("round1-slice2", "judge")):
        assert {pair["meta"]["by"] for pair in job.read_jsonl(out / name / "pairs.jsonl")} == {by}
    cells = results(out)["slices"][1]["cells"].values()
    assert sum(cell["kept"] for cell in cells) == spoken["keep"]
    assert sum(cell["swapped"] for cell in cells) == spoken["swap"]
    assert sum(cell["dropped"] for cell in cells) == spoken["drop"]


def assert_same_run(out: Path, plain: Path, slices=("round1-slice1", "round1-slice2")):
    """The same metrics, results and weights to the bit."""
    assert metrics(out) == metrics(plain)
    assert results(out) == results(plain)
    for name in slices:
        mine, others = weights(out / name / "checkpoint"), weights(plain / name / "checkpoint")
        assert_close(mine, others, atol=0)


def test_an_unedited_export_trains_as_the_judge_alone(plain, world, tmp_path):
    """Exported, not touched, and gone on with: the same metrics, results and weights to the bit."""
    out, file = tmp_path / "run", tmp_path / "pairs.jsonl"
    flags = tso_flags(world, PLAIN, out=out)
    assert forked(tso, *flags, "--export_pairs", file) == 0
    assert forked(tso, *flags, "--resume", "--verdicts", file) == 0
    assert_same_run(out, plain)


def slices_in(file: Path) -> set[str]:
    """The slices whose pairs are in an export."""
    return {row["id"].split("/")[0] for row in job.read_jsonl(file)}


@pytest.mark.parametrize("judge", ["toy", "none"])
def test_a_person_may_judge_slice_after_slice(world, tmp_path, judge):
    """--verdicts FILE --export_pairs FILE, again and again: slice 1, slice 2, the end."""
    out, file = tmp_path / "run", tmp_path / "pairs.jsonl"
    flags = tso_flags(world, ONE, slices=2, out=out, judge=judge)
    goes_on = [*flags, "--resume", "--verdicts", file, "--export_pairs", file]
    assert forked(tso, *flags, "--export_pairs", file) == 0
    assert slices_in(file) == {"1.1"}
    assert forked(tso, *goes_on) == 0
    assert slices_in(file) == {"1.2"}
    assert forked(tso, *goes_on) == 0
    assert (out / "round1-slice2/checkpoint").exists()


def test_without_a_judge_a_person_judges_every_pair(monkeypatch, world, tmp_path, capsys):
    """A pair without a verdict ends the run with its id; with all verdicts it trains."""
    a, b, file = tmp_path / "a", tmp_path / "b", tmp_path / "pairs.jsonl"
    flags = tso_flags(world, ONE, judge="none")
    run(monkeypatch, tso, *flags, "--out", a, "--no-correct", "--export_pairs", file)

    rows = lines(file)
    write_lines(file, rows[:4] + rows[5:])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tso, *flags, "--out", b, "--verdicts", file)
    assert stop.value.code == 2
    assert f"1 pairs have no verdict, {rows[4]['id']} the first" in capsys.readouterr().err
    assert not list(b.rglob("checkpoint"))

    write_lines(file, rows)
    run(monkeypatch, tso, *flags, "--out", b, "--verdicts", file, "--resume")
    assert " · correction by people · " in capsys.readouterr().out
    last = results(b)["slices"][1]
    assert last["score"] is None
    assert "win" not in last
    assert last["pairs"] == len(rows)
    assert sum(cell["kept"] for cell in last["cells"].values()) == len(rows)


def test_a_trained_slice_keeps_the_verdicts_that_it_was_trained_on(monkeypatch, world, tmp_path):
    """Verdicts that come after the training change neither pairs.jsonl nor the results."""
    out, file = tmp_path / "run", tmp_path / "verdicts.jsonl"
    flags = tso_flags(world, ONE, out=out)
    run(monkeypatch, tso, *flags)
    before, text = results(out), (out / "round1-slice1/pairs.jsonl").read_text()

    ids = [pair["id"] for pair in job.read_jsonl(out / "round1-slice1/pairs.jsonl")]
    write_lines(file, [{"id": name, "verdict": "drop"} for name in ids])
    run(monkeypatch, tso, *flags, "--resume", "--verdicts", file)
    assert (out / "round1-slice1/pairs.jsonl").read_text() == text
    assert results(out) == before


def test_a_trained_slice_without_its_pairs_is_refused(monkeypatch, world, tmp_path, capsys):
    """What it was trained on can't be made again: one line says what to delete."""
    out = tmp_path / "run"
    flags = tso_flags(world, ONE, out=out)
    run(monkeypatch, tso, *flags)
    folder = out / "round1-slice1"
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tso, *flags, "--resume")
    err = one_line(stop, capsys)
    assert f"{folder / 'pairs.jsonl'} is missing: delete {folder / 'checkpoint'}" in err


def test_verdicts_may_not_change_while_a_slice_is_trained(monkeypatch, world, tmp_path, capsys):
    """A killed training goes on with the pairs that it was begun with, or not at all."""
    out, file = tmp_path / "run", tmp_path / "verdicts.jsonl"
    flags = tso_flags(world, ONE, max_steps=3, out=out)
    assert forked(tso, *flags, kill=("in", "slice 1.1")) == -signal.SIGKILL
    state, pairs = out / "round1-slice1/state.pt", out / "round1-slice1/pairs.jsonl"
    saved, text = state.read_bytes(), pairs.read_text()

    write_lines(file, [{"id": kept_pairs(out / "round1-slice1")[0]["id"], "verdict": "drop"}])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tso, *flags, "--resume", "--verdicts", file)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "slice 1.1 is being trained on pairs with other verdicts" in err
    assert str(state) in err
    assert state.read_bytes() == saved
    assert pairs.read_text() == text


# ---------------------------------------------------------------- interruptions, ranks, clips


@pytest.mark.parametrize(
    "kill",
    [
        ("in", "1.1: sample older0"),
        ("in", "1.2: correct"),
        ("in", "slice 1.2"),
        ("before", "state.pt"),
        ("before", "round1-slice1/checkpoint"),
        ("after", "round1-slice2/checkpoint"),
        ("in", "1.1: against the start"),
        ("before", "results.json"),
    ],
)
def test_a_killed_run_ends_with_the_same_results(plain, world, tmp_path, kill):
    """SIGKILL while sampling, correcting, training, renaming, measuring: the same to the bit."""
    out = tmp_path / "run"
    flags = tso_flags(world, PLAIN, out=out)
    assert forked(tso, *flags, kill=kill) == -signal.SIGKILL
    assert forked(tso, *flags, "--resume") == 0
    assert_same_run(out, plain)
    assert not list(out.rglob("state.pt"))
    assert not list(out.rglob("*.part*"))


def test_two_ranks_sample_and_learn_what_one_does(plain, world, tmp_path):
    """DDP and FSDP on two ranks: the same files, numbers and weights."""
    ranks = {"save_every": 50, "n_scores": 0}
    ddp = tso_flags(world, PLAIN, ranks, out="ddp", parallel="ddp")
    fsdp = tso_flags(world, PLAIN, ranks, out="fsdp", parallel="fsdp")
    together(tso, tmp_path, 2, [(2, False, ddp), (2, False, fsdp)])

    for out in (tmp_path / "ddp", tmp_path / "fsdp"):
        for name in ("round1-slice1", "round1-slice2"):
            mine, others = out / name, plain / name
            for file in (
                "candidates-current",
                "candidates-older0",
                "candidates-smaller0",
                "judged",
                "pairs",
                "answers",
            ):
                text = (mine / f"{file}.jsonl").read_bytes()
                assert text == (others / f"{file}.jsonl").read_bytes(), (name, file)
            assert_close(weights(others / "checkpoint"), weights(mine / "checkpoint"), atol=1e-4)

        for line, plain_line in zip(metrics(out), metrics(plain), strict=True):
            if line["step"] == 1:  # of two zeros, the larger is a matter of the last bit
                del line["rewards/accuracies"], plain_line["rewards/accuracies"]
            assert line == pytest.approx(plain_line, abs=1e-3)

        slices, plain_slices = results(out)["slices"], results(plain)["slices"]
        for result, plain_result in zip(slices, plain_slices, strict=True):
            assert result["score"] == plain_result["score"]
            assert result.get("cells") == plain_result.get("cells")


def test_the_share_clipped_is_that_of_the_pairs(monkeypatch, world, tmp_path):
    """Step 2's rewards, loss and clipped shares are those of step 1's weights, pair by pair."""
    from transformers import AutoModelForCausalLM

    tiny = {"clip_chosen": 0.001, "clip_rejected": 0.001}
    free = {"clip_chosen": "inf", "clip_rejected": "inf"}
    for name, clips, steps in (("one", tiny, 1), ("two", tiny, 2), ("free", free, 2)):
        flags = tso_flags(world, ONE, clips, max_steps=steps, out=tmp_path / name, lr=3e-5)
        run(monkeypatch, tso, *flags)

    after_one_step = tmp_path / "one/round1-slice1/checkpoint"
    policy = AutoModelForCausalLM.from_pretrained(after_one_step)
    reference = AutoModelForCausalLM.from_pretrained(world / "sft")
    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs = kept_pairs(tmp_path / "two/round1-slice1")
    batch = [pairs[i] for i in order_of(len(pairs), "1.1")[8:16]]
    assert len(batch) == 8

    def reward(pair, side):
        return 0.1 * (text_logp(policy, tok, pair, side) - text_logp(reference, tok, pair, side))

    chosen = [reward(pair, "chosen") for pair in batch]
    rejected = [reward(pair, "rejected") for pair in batch]
    losses, dpo_losses = [], []
    for r_w, r_l in zip(chosen, rejected):
        losses.append(naive_dual_clip(r_w, r_l, 0.001, 0.001))
        dpo_losses.append(naive_loss(r_w - r_l))

    second = metrics(tmp_path / "two")[1]
    assert second["clipped/chosen"] == mean([r_w > 0.001 for r_w in chosen]) > 0
    assert second["clipped/rejected"] == mean([r_l < -0.001 for r_l in rejected]) > 0
    assert second["rewards/chosen"] == pytest.approx(mean(chosen), abs=1e-5)
    assert second["rewards/rejected"] == pytest.approx(mean(rejected), abs=1e-5)
    assert second["loss"] == pytest.approx(mean(losses), abs=1e-5)

    unclipped = metrics(tmp_path / "free")[1]
    assert unclipped["loss"] == pytest.approx(mean(dpo_losses), abs=1e-5)
    assert unclipped["clipped/chosen"] == 0
    assert unclipped["clipped/rejected"] == 0
    assert unclipped["loss"] < second["loss"] - 1e-4
    name = "model.embed_tokens.weight"
    with_clips = weights(tmp_path / "two/round1-slice1/checkpoint")[name]
    without = weights(tmp_path / "free/round1-slice1/checkpoint")[name]
    assert (with_clips - without).abs().max() > 1e-7


# ---------------------------------------------------------------- bad input, dry run


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"positives": ["older"]}, "--positives older: expected some of current, human"),
        ({"negatives": ["current", "large"]}, "expected some of current, older, smaller, human"),
        ({"clip_chosen": 0}, "--clip_chosen must be above 0"),
        ({"clip_rejected": -0.1}, "--clip_rejected"),
        ({"clip_chosen": "nan"}, "--clip_chosen"),
        ({"slices": 0}, "--slices"),
        ({"rounds": 0}, "--rounds"),
        ({"pairs_per_prompt": 0}, "--pairs_per_prompt"),
        ({"n_negative": 0}, "--n_negative"),
        ({"n_scores": -1}, "--n_scores"),
        ({"beta": 0}, "--beta"),
        ({"judge": "none"}, "--judge none can't correct"),
        ({"verdicts": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"limit": 5, "slices": 6}, "too few for 6 slices"),
        ({"max_prompt": 2}, "too few for 2 slices"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"test": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"older": ["nowhere/sft"]}, "nowhere/sft: neither a model folder"),
        ({"smaller": ["/"]}, "/: not a model"),
        ({"judge": "rm"}, "--judge rm: expected toy"),
        ({"batch": 10}, "can't be divided"),
        ({"max_response": 1020}, "more than"),
        ({"limit": 0}, "--limit"),
        ({"max_steps": 0}, "--max_steps"),
        ({"negatives": ["human"]}, "--negatives human: there are none to begin with"),
        (
            {"negatives": ["older"], "older": None, "preset": "paper"},
            "--negatives older: there are none to begin with",
        ),
    ],
)
def test_bad_input_is_one_line_before_any_model(
    monkeypatch, world, tmp_path, capsys, more, complaint
):
    """Exit code 2, one line on stderr, no folder."""
    flags = tso_flags(world, more, out=tmp_path / "run")
    assert complaint in refused(monkeypatch, capsys, tso, flags)
    assert not (tmp_path / "run").exists()


def test_some_cell_of_the_negatives_must_have_a_source(capsys):
    """The current policy is one; people's are the rejected sides of the first slice."""
    lone, pair = {"response": "a"}, {"response": "a", "rejected": "b"}
    for negatives, parts in (
        (["current"], [[lone]]),
        (["older", "current"], [[lone]]),
        (["older", "smaller"], [[lone]]),
        (["older", "human"], [[lone, pair], [lone]]),
    ):
        tso.check_negatives(Config(negatives=negatives, smaller=["small"]), parts)

    for negatives, parts in ((["smaller"], [[pair]]), (["older", "human"], [[lone], [pair]])):
        with pytest.raises(SystemExit) as stop:
            tso.check_negatives(Config(negatives=negatives, smaller=[]), parts)
        line = f"--negatives {' '.join(negatives)}: there are none to begin with"
        assert line in one_line(stop, capsys)
    tso.check_negatives(Config(negatives=["older"], older=["old"], smaller=[]), [[lone]])


@pytest.mark.parametrize("flag", ["older", "smaller"])
def test_an_older_or_smaller_model_must_hold_the_sequences_too(
    monkeypatch, world, tmp_path, capsys, flag
):
    """A prompt of 32 tokens and an answer of 16 fit a context of 48, not one of 47."""
    model = tmp_path / "model"
    shutil.copytree(world / "sft-small", model)
    config = json.loads((model / "config.json").read_text())
    for context in (47, 48):
        config["max_position_embeddings"] = context
        (model / "config.json").write_text(json.dumps(config))
        flags = tso_flags(world, {flag: [world / "sft", model]}, out=tmp_path / "run")
        if context == 47:
            line = refused(monkeypatch, capsys, tso, flags)
            assert f"--max_prompt 32 + --max_response 16 is more than {model}'s context" in line
        else:
            run(monkeypatch, tso, *flags, "--dry_run")


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, world, tmp_path, capsys):
    """Cells, clips, counts, steps and one example with its mask; no folder, no model."""

    def fail(*args, **more):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(tso, "load_lm", fail)
    monkeypatch.setattr(common, "load_lm", fail)
    flags = tso_flags(world, out=tmp_path / "run", clip_rejected="inf")
    run(monkeypatch, tso, *flags, "--dry_run")
    shown = capsys.readouterr().out
    assert "1 round x 2 slices" in shown
    assert "positives current, human" in shown
    assert "clip 0.2/inf" in shown
    assert "40 training prompts in slices of 20, 12 held-out" in shown
    assert "10 steps a slice" in shown
    assert "no loss: '<bos><|user|>" in shown
    assert not list(tmp_path.iterdir())
