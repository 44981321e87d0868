"""evaluate.py and figures.py, against naive loops, known answers, and other libraries.

Statistics are checked against loops and known answers; rewards, benchmarks and exports against
transformers, TRL, lm-eval, AlpacaEval and FastChat; files by what is in them; and of the figures
the numbers that they plot.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import dnpo_flags, environment, forked, lines, run, sams_flags, script

import common
import datafiles
import dnpo
import evaluate
import figures
import job
import sams
import toy
from evaluate import Config, benchmark_command, bootstrap, pair_rewards, settle, versus
from figures import band, by_task, duel, group_runs, histogram, ks_distance, read_run

near = functools.partial(pytest.approx, rel=1e-6, abs=1e-9)


def evaluated(tmp_path) -> dict:
    """The only results file in out/."""
    (file,) = (tmp_path / "out").glob("results-*.json")
    return json.loads(file.read_text())


def write_rows(file, rows):
    """Rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(job.json_lines(rows))


def forbid(monkeypatch, module, name: str, message: str):
    """Lets the test fail if a function of the module is called."""

    def fail(*arguments, **named):
        pytest.fail(message)

    monkeypatch.setattr(module, name, fail)


def user(text: str) -> list[dict]:
    """A prompt of one message."""
    return [{"role": "user", "content": text}]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# ------------------------------------------------------------------------- statistics


def quantile(values: list[float], q: float) -> float:
    """By sorting, and by interpolating between the two neighbours."""
    values = sorted(values)
    place = q * (len(values) - 1)
    below = int(place)
    return values[below] + (place - below) * (values[below + 1] - values[below])


def test_the_bootstrap_is_the_naive_loop():
    """Means of whole groups, drawn by the same generator and summed in loops; their quantiles."""
    rng = random.Random(0)
    values = [rng.gauss(1, 2) for _ in range(13)]
    groups = [rng.choice("abcde") for _ in range(13)]
    single = list(range(13))
    for group_of, asked in ((groups, groups), (single, None)):
        names = sorted(set(group_of))
        generator = np.random.default_rng(7)
        means = []
        for _ in range(2000):
            drawn = []
            for k in generator.integers(len(names), size=len(names)):
                for value, group in zip(values, group_of):
                    if group == names[k]:
                        drawn.append(value)
            means.append(mean(drawn))

        found = bootstrap(values, asked, seed=7)
        assert found == near((mean(values), quantile(means, 0.025), quantile(means, 0.975)))
        assert found == bootstrap(values, asked, seed=7)
        assert found != bootstrap(values, group_of, seed=8)


def test_the_bootstrap_covers_and_knows_its_limits():
    """About the normal width; none for equal values; None for nothing; repeats add no evidence."""
    values = np.random.default_rng(0).normal(size=400)
    _, low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    assert bootstrap([3.0] * 5) == (3.0, 3.0, 3.0)
    assert bootstrap([]) == (None, None, None)
    repeated = bootstrap(np.repeat(values, 4), np.repeat(np.arange(400), 4))
    assert repeated == near((values.mean(), low, high))


def naive_ks(a: list[float], b: list[float]) -> float:
    """The largest difference of the two distribution functions over all points."""
    largest = 0.0
    for x in a + b:
        share_of_a = sum(u <= x for u in a) / len(a)
        share_of_b = sum(v <= x for v in b) / len(b)
        largest = max(largest, abs(share_of_a - share_of_b))
    return largest


def test_ks_is_the_naive_double_loop():
    """Ties included; 0 for the same sample, 1 for separate ones; scipy's if it is there."""
    rng = random.Random(0)
    for n, m in ((5, 7), (20, 3), (1, 1), (30, 30)):
        a = [rng.randint(0, 9) / 2 for _ in range(n)]
        b = [rng.randint(0, 9) / 2 for _ in range(m)]
        assert ks_distance(a, b) == near(naive_ks(a, b))
        assert ks_distance(b, a) == near(naive_ks(a, b))
        if importlib.util.find_spec("scipy"):
            from scipy.stats import ks_2samp

            assert ks_distance(a, b) == near(ks_2samp(a, b).statistic)
    assert ks_distance([1, 2, 3], [3, 1, 2]) == 0
    assert ks_distance([1, 2], [3, 4]) == 1


def test_histograms_share_bins_and_count_everything():
    """Known bins; outliers in the outer bins; shares sum to 1; a constant sample has a bin too."""
    samples = {"a": list(range(101)), "b": [50] * 4 + [-1000, 1000]}
    edges, shares = histogram(samples, bins=4)
    widths = np.diff(edges)
    assert len(edges) == 5
    assert widths.tolist() == near([widths[0]] * 4)

    low, high = edges[0], edges[-1]
    for name, sample in samples.items():
        counts = [0] * 4
        for x in sample:
            inside = min(max(x, low), high)
            place = int((inside - low) / (high - low) * 4)
            counts[min(3, place)] += 1
        assert shares[name].tolist() == near([count / len(sample) for count in counts])
        assert shares[name].sum() == near(1)

    _, constant = histogram({"c": [2.0, 2.0]})
    assert constant["c"].sum() == 1


def test_bands_are_mean_and_deviation():
    """By hand, of curves cut to the shortest; one run has no deviation."""
    middle, deviation = band([[1.0, 2.0, 9.0], [3.0, 6.0]])
    assert middle.tolist() == [2.0, 4.0]
    assert deviation.tolist() == near([math.sqrt(2), math.sqrt(8)])
    _, deviation = band([[1.0, 2.0]])
    assert deviation.tolist() == [0.0, 0.0]


def test_rewards_and_length_control_are_the_formulas():
    """r = beta (log pi - log pi_ref) by hand; an equal length is not shorter."""
    logps = [[-1.0, -3.0], [-2.0, -2.0]]
    ref_logps = [[-2.0, -1.0], [-2.0, -4.0]]
    chosen, rejected = pair_rewards(logps, ref_logps, 0.5)
    assert chosen.tolist() == [0.5, 0.0]
    assert rejected.tolist() == [-1.0, 1.0]
    shorter = evaluate.shorter_chosen([(3, 4), (4, 4), (5, 4)])
    assert shorter.tolist() == [True, False, False]


class MadeUp(common.Judge):
    """A judge by rule: rule(a, b) is its verdict, asked in both orders; it keeps the questions."""

    def __init__(self, rule, spec="made-up:"):
        super().__init__(spec, None)
        self.rule = rule
        self.questions = []

    def ask(self, kind, items, again):
        self.questions += items
        if kind == "score":
            return [float(len(text)) for _, text in items]
        return [self.rule(a, b) for _, a, b in items]


def always_a(a, b):
    return "A"


def the_longer(a, b):
    if len(a) == len(b):
        return "tie"
    return "A" if len(a) > len(b) else "B"


def the_shorter(a, b):
    return the_longer(b, a)


def mute_about_x(a, b):
    """None if there is an x, else the one with a w."""
    if "x" in a + b:
        return None
    return "A" if "w" in a else "B"


def never(a, b):
    return None


def verdicts_of(tmp_path, judge, mine: list[str], others: list[str]) -> list[dict]:
    c = Config(model="m", data="d", against="annotations", judge="toy", out=str(tmp_path / "out"))

    def as_rows(texts: list[str]) -> list[dict]:
        rows = []
        for i, text in enumerate(texts):
            rows.append({"id": str(i), "prompt": user(f"question {i}"), "response": text})
        return rows

    return evaluate.judge_pairs(c, judge, as_rows(mine), as_rows(others))


def test_a_judge_that_always_says_a_makes_ties_and_flips(tmp_path):
    """100 % ties, flip rate 1, nothing decided; equal texts are a tie that is not asked about."""
    judge = MadeUp(always_a)
    rows = verdicts_of(tmp_path, judge, ["long answer", "b", "same"], ["x", "yy", "same"])
    found = versus(rows)
    assert (found["win"], found["tie"], found["loss"]) == (0, 1, 0)
    assert (found["flip_rate"], found["longer_wins"], found["decided"]) == (1, None, 0)
    assert (found["gap"], found["gap_low"], found["gap_high"]) == (0, 0, 0)
    assert found["win_rate"] == 0.5
    assert len(judge.questions) == 4
    assert [row["there"] for row in rows] == ["A", "A", None]


def test_verdicts_are_counted_as_they_were_given(tmp_path):
    """Longer texts that win, an unreadable judge left out and counted, the signs of the gap."""
    mine, others = ["aaa", "bb", "c", "dd"], ["x", "yyy", "zz", "ee"]
    found = versus(verdicts_of(tmp_path, MadeUp(the_longer), mine, others))
    assert (found["longer_wins"], found["decided"]) == (1, 3)
    assert found["flip_rate"] == 0
    assert (found["win"], found["tie"], found["loss"]) == (0.25, 0.25, 0.5)
    assert (found["gap"], found["win_rate"]) == (-0.25, 0.375)

    mine, others = ["w1", "w2", "w3"], ["x", "l", "l"]
    mute = versus(verdicts_of(tmp_path, MadeUp(mute_about_x, "mute:"), mine, others))
    assert (mute["win"], mute["judged"], mute["unreadable"]) == (1, 2, 1)
    assert (mute["gap"], mute["gap_low"]) == (1, 1)

    nobody = versus(verdicts_of(tmp_path, MadeUp(never, "nobody:"), ["w"], ["x"]))
    assert nobody["judged"] == 0
    assert nobody["win"] is None
    assert nobody["gap"] is None
    assert nobody["win_rate_low"] is None


@pytest.mark.parametrize(
    "there,back,settled",
    [
        ("A", "A", "win"),
        ("B", "B", "loss"),
        ("A", "B", "tie"),
        ("tie", "A", "tie"),
        ("tie", "tie", "tie"),
        (None, "A", None),
    ],
)
def test_two_orders_are_settled_as_one_verdict(there, back, settled):
    """The verdict that both orders share, a tie where they differ, None where one is unreadable."""
    assert settle(there, back) == settled


def test_the_gap_draws_prompts_not_rows():
    """The same verdicts on four times the rows of the same prompts give the same interval."""
    few = []
    for i, verdict in enumerate(["win", "loss", "tie", "win", "win"] * 4):
        row = {"prompt": i, "verdict": verdict, "there": None, "back": None}
        few.append({**row, "length": 1, "length_other": 1})
    many = []
    for row in few:
        many += [row] * 4
    found, repeated = versus(few), versus(many)
    for name in ("gap", "gap_low", "gap_high"):
        assert found[name] == near(repeated[name])


def test_an_interval_draws_prompts_not_rows(world, tmp_path, monkeypatch, capsys):
    """Of log-probs, scores and verdicts alike: the rows of one prompt are drawn together."""
    rng = random.Random(0)
    rows, logps, groups = [], [], []
    for i in range(12):
        for k in range(3):
            prompt = user("abcdefghijkl"[i])
            rows.append({"id": f"{i}/{k}", "prompt": prompt, "chosen": "a" * (k + 1)})
            rows[-1]["rejected"] = "b"
            logps.append([i + rng.random(), 6.0])  # alike within a prompt
            groups.append(job.seed_of(prompt))
    write_rows(tmp_path / "pairs.jsonl", rows)
    monkeypatch.setattr(evaluate, "score_pairs", lambda *args: np.array(logps))
    flags = [world / "sft", "--pairs", tmp_path / "pairs.jsonl", "--beta", 1]
    run(monkeypatch, evaluate, *flags, "--out", tmp_path / "out")
    found = {row["measure"]: row for row in evaluated(tmp_path)["results"]}
    margin = [chosen - rejected for chosen, rejected in logps]
    right = [m > 0 for m in margin]
    for name, values in (("margin", margin), ("accuracy", right)):
        interval = found[name]["mean"], found[name]["low"], found[name]["high"]
        assert interval == near(bootstrap(values, groups))
        assert interval != near(bootstrap(values))

    c = Config(model="m", data="d", score=True, judge="toy", out=str(tmp_path))
    answers = [{**row, "response": row["chosen"]} for row in rows]
    numbers = [{"score": chosen} for chosen, _ in logps]
    monkeypatch.setattr(evaluate, "judge_scores", lambda *args: numbers)
    side = evaluate.score_side(c, None, "", answers, rows)
    chosen = [chosen for chosen, _ in logps]
    assert (side["score"], side["low"], side["high"]) == near(bootstrap(chosen, groups))

    others = [{**row, "response": row["rejected"]} for row in rows]
    verdicts = evaluate.judge_pairs(c, MadeUp(the_longer, "longer:"), answers, others)
    for row, verdict in zip(rows, verdicts, strict=True):
        assert verdict["prompt"] == f"{job.seed_of(row['prompt']):016x}"


# ------------------------------------------------------------------------- preference pairs


def nudged(world, tmp_path):
    """A policy that is not its reference."""
    lm = common.load_lm(str(world / "sft"), torch.float32, "cpu")
    torch.manual_seed(0)
    for p in lm.parameters():
        p.data += 0.05 * torch.randn_like(p)
    tok, _ = common.load_tokenizer(str(world / "sft"))
    for part in (lm, tok):
        part.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def naive_logp(lm, tok, prompt: list[dict], response: str) -> float:
    """transformers' own logits of one sequence, one token at a time."""
    start = tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer = tok(response, add_special_tokens=False)["input_ids"]
    ids = start + answer + [tok.eos_token_id]
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for t in range(len(start), len(ids)):
        total += logits[t - 1].log_softmax(-1)[ids[t]].item()
    return total


def naive_rewards(policy, reference, rows: list[dict], side: str, beta: float) -> list[float]:
    """beta (log pi - log pi_ref) of one side of each row, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(policy)
    lm = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ref = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    rewards = []
    for row in rows:
        logp = naive_logp(lm, tok, row["prompt"], row[side])
        ref_logp = naive_logp(ref, tok, row["prompt"], row[side])
        rewards.append(beta * (logp - ref_logp))
    return rewards


def test_rewards_are_those_of_transformers_one_sequence_at_a_time(
    world, tmp_path, monkeypatch, capsys
):
    """Accuracies, rewards and margin of 12 unlike pairs; a second call scores nothing."""
    rng = random.Random(3)

    def word() -> str:
        length = rng.randint(1, 9)
        return "".join(rng.choice("abcdefghijklmnop") for _ in range(length))

    policy = nudged(world, tmp_path)
    rows = []
    for _ in range(12):
        rows.append({"prompt": user(word()), "chosen": word(), "rejected": word()})
    write_rows(tmp_path / "pairs.jsonl", rows)
    flags = [policy, "--pairs", tmp_path / "pairs.jsonl", "--reference", world / "sft"]
    flags += ["--beta", 0.3, "--batch", 5, "--max_response", 16, "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)

    chosen = naive_rewards(policy, world / "sft", rows, "chosen", 0.3)
    rejected = naive_rewards(policy, world / "sft", rows, "rejected", 0.3)
    right_short, right_others = [], []
    for row, a, b in zip(rows, chosen, rejected):
        shorter = len(row["chosen"]) < len(row["rejected"])
        (right_short if shorter else right_others).append(a > b)
    expected = {
        "accuracy": mean(right_short + right_others),
        "accuracy, shorter answer chosen": mean(right_short),
        "accuracy, others": mean(right_others),
        "chosen reward": mean(chosen),
        "rejected reward": mean(rejected),
        "margin": mean(chosen) - mean(rejected),
    }
    found = {row["measure"]: row for row in evaluated(tmp_path)["results"]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name]["mean"] == pytest.approx(value, abs=1e-4)
    assert found["accuracy, shorter answer chosen"]["pairs"] == len(right_short)
    margin = found["margin"]
    assert margin["low"] < margin["mean"] < margin["high"]

    forbid(monkeypatch, common, "load_lm", "scored again")
    run(monkeypatch, evaluate, *flags)
    capsys.readouterr()


def test_without_training_every_reward_is_zero(world, tmp_path, monkeypatch, capsys):
    """Policy = reference: rewards are exactly 0, and accuracy is 0, because a tie is not right."""
    flags = [world / "sft", "--pairs", world / "pairs.jsonl", "--reference", world / "sft"]
    flags += ["--limit", 10, "--max_response", 16, "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)
    measured = [row for row in evaluated(tmp_path)["results"] if row["pairs"]]
    means = {row["measure"]: row["mean"] for row in measured}
    assert means == {
        "accuracy": 0.0,
        "accuracy, others": 0.0,
        "chosen reward": 0.0,
        "rejected reward": 0.0,
        "margin": 0.0,
    }
    assert len(list((tmp_path / "out").glob("logps-*"))) == 1
    cells = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any("| – |" in line for line in cells)


def test_accuracy_and_margins_are_those_of_trl(world, tmp_path, monkeypatch, capsys):
    """TRL's DPOTrainer.evaluate on the same pairs and models: accuracy, rewards, margin to 1e-4."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    policy = nudged(world, tmp_path)
    rows, _ = datafiles.load_rows(str(world / "pairs.jsonl"), "pair", 24)
    their_rows = []
    for row in rows:
        chosen = [{"role": "assistant", "content": row["chosen"]}]
        rejected = [{"role": "assistant", "content": row["rejected"]}]
        their_rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    data = Dataset.from_list(their_rows)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_eval_batch_size=8,
        beta=0.3,
        use_cpu=True,
        bf16=False,
        fp16=False,
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tok, _ = common.load_tokenizer(str(policy))
    trainer = trl.DPOTrainer(
        model=common.load_lm(str(policy), torch.float32, "cpu"),
        ref_model=common.load_lm(str(world / "sft"), torch.float32, "cpu"),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tok,
    )
    theirs = trainer.evaluate()

    flags = [policy, "--pairs", world / "pairs.jsonl", "--limit", 24, "--reference", world / "sft"]
    flags += ["--beta", 0.3, "--max_response", 16, "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)
    found = {row["measure"]: row["mean"] for row in evaluated(tmp_path)["results"]}
    their_names = {
        "accuracy": "accuracies",
        "chosen reward": "chosen",
        "rejected reward": "rejected",
        "margin": "margins",
    }
    for name, key in their_names.items():
        assert found[name] == pytest.approx(theirs[f"eval_rewards/{key}"], abs=1e-4)
    assert abs(found["margin"]) > 1e-2
    assert found["accuracy"] > 0
    capsys.readouterr()


# ------------------------------------------------------------------------- a judge's opinion


def test_win_tie_loss_and_scores_are_the_judges(world, tmp_path, monkeypatch, capsys):
    """Against the annotations: the toy judge's scores, compared one by one; means with --score."""
    flags = [world / "sft", "--against", "annotations", "--data", world / "test.jsonl"]
    flags += ["--judge", "toy", "--score", "--limit", 24, "--max_response", 12]
    flags += ["--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)

    data, _ = datafiles.load_rows(str(world / "test.jsonl"), "response", 24)
    (answers,) = (tmp_path / "out").glob("answers-*.jsonl")
    scores, others = [], []
    for row, answer in zip(data, lines(answers), strict=True):
        prompt = row["prompt"][0]["content"]
        scores.append(toy.score(prompt, answer["response"]))
        others.append(toy.score(prompt, row["response"]))
    found = evaluated(tmp_path)
    pairs = list(zip(scores, others))
    assert found["win"] == near(sum(s > t for s, t in pairs) / 24)
    assert found["tie"] == near(sum(s == t for s, t in pairs) / 24)
    assert found["loss"] == near(sum(s < t for s, t in pairs) / 24)
    assert found["gap"] == near(found["win"] - found["loss"])
    assert found["flip_rate"] is None  # a number judge has no order
    assert [row["score"] for row in found["scores"]] == near([mean(scores), mean(others)])
    assert "win-loss gap" in capsys.readouterr().out

    forbid(monkeypatch, common, "load_lm", "sampled again")
    forbid(monkeypatch, toy, "score", "judged again")
    run(monkeypatch, evaluate, *flags)


@pytest.mark.parametrize("rule,warned", [(the_longer, True), (the_shorter, False)])
def test_a_judge_that_counts_words_is_named(rule, warned, world, tmp_path, monkeypatch, capsys):
    """The warning, on stderr, with the share; none for a judge that doesn't mind, or of few."""
    judge = MadeUp(rule)
    monkeypatch.setattr(evaluate, "make_judge", lambda *arguments, **named: judge)
    flags = [world / "sft", "--against", world / "sft-small", "--data", world / "train.jsonl"]
    flags += ["--judge", "hf:0", "--max_response", 12, "--temperature", 1]
    warning = "the longer answer won 100% of the decided comparisons"
    run(monkeypatch, evaluate, *flags, "--limit", 40, "--out", tmp_path / "out")
    assert evaluated(tmp_path)["decided"] >= 20
    assert (warning in capsys.readouterr().err) == warned

    run(monkeypatch, evaluate, *flags, "--limit", 19, "--out", tmp_path / "few")
    assert warning not in capsys.readouterr().err


def test_a_killed_comparison_goes_on_and_asks_nothing_twice(world, tmp_path, monkeypatch, capsys):
    """Killed while it samples and while it judges, it ends with the bytes of a run in one go."""
    flags = [world / "sft", "--against", world / "sft-small", "--data", world / "test.jsonl"]
    flags += ["--judge", "toy", "--limit", 24, "--batch", 4, "--max_response", 8]
    flags += ["--temperature", 1]
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(monkeypatch, evaluate, *flags, "--out", whole)

    sampling = f"answers of {world / 'sft'} (1 rank, batches of 4)"
    assert forked(evaluate, *flags, "--out", out, kill=("in", sampling)) == -signal.SIGKILL
    (part,) = out.glob("answers-*.part0")
    assert part.read_text().count("stamp") == 2

    assert forked(evaluate, *flags, "--out", out, kill=("in", "judge")) == -signal.SIGKILL
    assert len(list(out.glob("answers-*.jsonl"))) == 2
    assert len(list(out.glob("verdicts-*.part0"))) == 1

    run(monkeypatch, evaluate, *flags, "--out", out)
    assert contents(out, "*.jsonl") == contents(whole, "*.jsonl")
    capsys.readouterr()


def contents(folder, pattern: str) -> dict[str, bytes]:
    """The bytes of a folder's files, by name."""
    return {file.name: file.read_bytes() for file in folder.glob(pattern)}


def test_other_flags_never_meet_an_old_answer(world, tmp_path):
    """A file's name changes with model, prompts, temperature, length, seed, batch and dtype."""
    rows, _ = datafiles.load_rows(str(world / "test.jsonl"), "prompt", 2)
    usual = {"model": "m", "data": "d", "score": True, "judge": "toy", "out": str(tmp_path)}
    usual |= {"max_response": 6, "dtype": "float32"}
    variants = [
        ({}, "sft", rows, 0.0),
        ({}, "sft-small", rows, 0.0),
        ({}, "sft", rows[:1], 0.0),
        ({}, "sft", rows, 0.5),
        ({"max_response": 7}, "sft", rows, 0.0),
        ({"seed": 1}, "sft", rows, 0.0),
        ({"batch": 8}, "sft", rows, 0.0),
        ({"dtype": "bfloat16"}, "sft", rows, 0.0),
    ]
    names = set()
    for flags, folder, some, temperature in variants:
        c = Config(**{**usual, **flags})
        model = evaluate.open_model(c, str(world / folder))
        evaluate.answer(c, model, some, temperature, "")
        names |= {file.name for file in tmp_path.glob("*.jsonl")}
    assert len(names) == len(variants)


def test_other_numbers_never_meet_an_old_file(monkeypatch, tmp_path):
    """Log-probs, verdicts and scores: a file of its own for another model, judge, text or flag."""
    names = []

    def note(path, *args, **more):
        names.append(path.name)
        return []

    monkeypatch.setattr(job, "phase", note)
    usual = {"model": "m", "data": "d", "score": True, "judge": "toy", "out": str(tmp_path)}
    c = Config(**usual, dtype="float32", batch=16)

    def model(folder: str, weights: str) -> evaluate.Subject:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "model.safetensors").write_text(weights)
        return evaluate.Subject(str(tmp_path / folder), None, c.device, torch.float32, None)

    pairs = [common.Pair([1], [2], [3], "0")]
    first = model("a", "weights")
    evaluate.score_pairs(c, first, pairs, "")
    evaluate.score_pairs(c, first, pairs, "again")
    evaluate.score_pairs(c, first, [pairs[0]._replace(rejected=[4])], "")
    evaluate.score_pairs(dataclasses.replace(c, batch=8), first, pairs, "")
    evaluate.score_pairs(dataclasses.replace(c, dtype="bfloat16"), first, pairs, "")
    evaluate.score_pairs(c, model("b", "weights"), pairs, "")
    evaluate.score_pairs(c, model("a", "other weights"), pairs, "")
    assert names[0] == names[1]
    assert len(set(names)) == 6

    names.clear()
    toys, others = MadeUp(always_a), MadeUp(always_a, "another:")
    a = [{"id": "0", "prompt": user("q"), "response": "a"}]
    b = [{"id": "0", "prompt": user("q"), "response": "b"}]
    for judge, mine, theirs in ((toys, a, b), (toys, a, a), (toys, b, b), (others, a, b)):
        evaluate.judge_pairs(c, judge, mine, theirs)
    for judge, answers in ((toys, a), (toys, b), (others, a)):
        evaluate.judge_scores(c, judge, answers, "")
    assert len(set(names)) == 7


def test_the_models_identity_is_its_folder_and_its_weights(tmp_path):
    """Other weights in the same folder, or the same ones elsewhere, are another model."""
    subjects = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("weights")
        os.utime(tmp_path / name / "model.safetensors", (1, 1))
        subjects.append(evaluate.Subject(str(tmp_path / name), None, None, None, None))
    one, two = subjects
    before = one.identity
    assert one.identity == before != two.identity
    os.utime(tmp_path / "a" / "model.safetensors", (2, 2))
    assert one.identity != before


def test_two_ranks_find_what_one_finds(world, tmp_path, monkeypatch, capsys):
    """Answers, verdicts, log-probs and results are the same files under torchrun."""
    against = ["--against", "annotations", "--data", world / "test.jsonl", "--judge", "toy"]
    pairs = ["--pairs", world / "pairs.jsonl", "--reference", world / "sft-early"]
    for mode in (against, pairs):
        flags = [world / "sft", *mode, "--limit", 20, "--batch", 4, "--max_response", 8]
        run(monkeypatch, evaluate, *flags, "--out", tmp_path / "out1")
        two = [*flags, "--out", tmp_path / "out2"]
        done = script("evaluate.py", *two, cwd=tmp_path, ranks=2)
        assert done.returncode == 0, done.stderr
    found = contents(tmp_path / "out1", "*.json*")
    assert found == contents(tmp_path / "out2", "*.json*")
    assert len(found) == 6
    capsys.readouterr()


# ------------------------------------------------------------------------- benchmarks and exports


@pytest.mark.parametrize(
    "task,shots",
    [
        ("arc_challenge", 25),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("mine", None),
    ],
)
def test_the_harness_is_called_with_the_papers_shots(task, shots):
    """The whole command line; a task of one's own keeps its shots."""
    c = Config(
        model="M", benchmarks="gsm8k", tasks_dir="T", limit=7, dtype="float32", batch=3, seed=5
    )
    expected = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf"]
    expected += ["--model_args", "pretrained=M,dtype=float32", "--tasks", task]
    if shots is not None:
        expected += ["--num_fewshot", str(shots)]
    expected += ["--apply_chat_template", "--fewshot_as_multiturn", "--batch_size", "3"]
    expected += ["--device", c.device.type, "--seed", "5", "--output_path", "O", "--log_samples"]
    expected += ["--include_path", "T", "--limit", "7"]
    assert benchmark_command(c, task, "O") == expected


TASK = """task: toy_sort
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/rows.jsonl
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: '{{q}}'
doc_to_target: 1
doc_to_choice: '{{choices}}'
num_fewshot: 2
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"),
    reason="the optional lm_eval is not installed; .ci/run's last line does",
)
def test_benchmark_numbers_are_the_harness_own(world, tmp_path):
    """A local task through evaluate.py and through lm_eval by hand; again, nothing is run."""
    rows, _ = datafiles.load_rows(str(world / "pairs.jsonl"), "pair", 20)
    examples = []
    for row in rows:
        choices = [row["rejected"], row["chosen"]]
        examples.append({"q": row["prompt"][0]["content"], "choices": choices})
    write_rows(tmp_path / "rows.jsonl", examples)
    (tmp_path / "sort.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))

    flags = [world / "sft", "--benchmarks", "toy_sort", "--tasks_dir", tmp_path]
    flags += ["--out", tmp_path / "out"]
    done = script("evaluate.py", *flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = evaluated(tmp_path)["results"]

    c = Config(model=str(world / "sft"), benchmarks="toy_sort", tasks_dir=str(tmp_path))
    command = benchmark_command(c, "toy_sort", tmp_path / "by-hand")
    own = environment(HF_HOME=str(tmp_path))
    subprocess.run(command, check=True, env=own, cwd=tmp_path, capture_output=True)
    theirs = evaluate.read_benchmark(tmp_path / "by-hand")["results"]["toy_sort"]
    assert (row["metric"], row["shots"]) == ("acc", 2)
    assert (row["value"], row["stderr"]) == (theirs["acc,none"], theirs["acc_stderr,none"])
    assert " ".join(command[1:5]) in done.stdout
    assert "lm_eval 0." in done.stdout

    again = script("evaluate.py", *flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert again.returncode == 0
    assert "Running loglikelihood" not in again.stderr


def test_alpaca_eval_reads_what_is_exported(world, tmp_path, monkeypatch, capsys):
    """Instruction, output, generator and dataset in the questions' order; AlpacaEval loads it."""
    questions = [
        {"instruction": "cab", "output": "x", "generator": "other", "dataset": "koala"},
        {"instruction": "fed"},
        {"instruction": "cab", "dataset": "vicuna"},
    ]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    flags = [world / "sft", "--export", "alpaca_eval", "--questions", tmp_path / "q.json"]
    flags += ["--max_response", 12, "--name", "tiny", "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)
    file = tmp_path / "out" / "alpaca_eval" / "tiny.json"
    rows = json.loads(file.read_text())
    outputs = [row.pop("output") for row in rows]
    assert rows == [
        {"instruction": "cab", "generator": "tiny", "dataset": "koala"},
        {"instruction": "fed", "generator": "tiny"},
        {"instruction": "cab", "generator": "tiny", "dataset": "vicuna"},
    ]

    # the model's own greedy answer under its own template
    lm = common.load_lm(str(world / "sft"), torch.float32, "cpu")
    tok, _ = common.load_tokenizer(str(world / "sft"))
    for question, output in zip(questions, outputs):
        ids = common.prompt_ids(tok, user(question["instruction"]))
        ((text, *_),) = common.sample(lm, tok, [ids], 0.0, 12, 0)
        assert output == text
    capsys.readouterr()

    loader = pytest.importorskip("alpaca_eval.utils", exc_type=ImportError)
    assert loader.load_or_convert_to_dataframe(file)["output"].tolist() == outputs


def test_fastchat_reads_what_is_exported(world, tmp_path, monkeypatch, capsys):
    """Both turns, the first's answer in the second's prompt; temperatures by category."""
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["cab", "fed"]},
        {"question_id": 82, "category": "math", "turns": ["hg", "ab"], "reference": ["gh", "ab"]},
        {"question_id": 83, "category": "humanities", "turns": ["ponm", "ghij"]},
        {"question_id": 84, "category": "coding", "turns": ["ponm", "cd"]},
    ]
    write_rows(tmp_path / "q.jsonl", questions)
    asked = []

    def generate(file, rows, model, sampling, *arguments, **named):
        asked.append((sampling.temperature, copy.deepcopy(rows)))
        return common.generate(file, rows, model, sampling, *arguments, **named)

    monkeypatch.setattr(evaluate, "generate", generate)
    flags = [world / "sft", "--export", "mt_bench", "--questions", tmp_path / "q.jsonl"]
    flags += ["--max_response", 12, "--name", "org/tiny", "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)

    # FastChat takes what lies in the folder, and a file's name for the model's
    [file] = (tmp_path / "out" / "mt_bench").glob("*.jsonl")
    assert file.name == "org-tiny.jsonl"
    assert "--model-list org-tiny" in capsys.readouterr().out
    rows = lines(file)
    assert [row["question_id"] for row in rows] == [81, 82, 83, 84]
    for row in rows:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "org-tiny"
        (choice,) = row["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == 2
        assert isinstance(row["tstamp"], float)
    assert len({row["answer_id"] for row in rows}) == 4

    by_temperature = [(0.0, ["1", "3"]), (0.1, ["2"]), (0.7, ["0"])]
    ids_asked = []
    for temperature, some in asked:
        ids_asked.append((temperature, [row["id"] for row in some]))
    assert ids_asked == by_temperature * 2
    assert evaluate.TEMPERATURES == {
        "writing": 0.7,
        "roleplay": 0.7,
        "stem": 0.1,
        "humanities": 0.1,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
    }
    _, second_turn = asked[3]
    first_answer = rows[1]["choices"][0]["turns"][0]
    assert second_turn[0]["prompt"] == [
        {"role": "user", "content": "hg"},
        {"role": "assistant", "content": first_answer},
        {"role": "user", "content": "ab"},
    ]

    theirs = pytest.importorskip("fastchat.llm_judge.common", exc_type=ImportError)
    loaded = theirs.load_model_answers(str(tmp_path / "out" / "mt_bench"))
    assert loaded["org-tiny"][82] == rows[1]
    assert evaluate.TEMPERATURES.items() <= theirs.temperature_config.items()


# ------------------------------------------------------------------------- what the figures plot


def made_up(folder, config: dict, results: dict, metrics: list[dict], files=None):
    """A run's folder as the scripts leave it; files: {name: rows}. Returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))
    write_rows(folder / "metrics.jsonl", metrics)
    for name, rows in (files or {}).items():
        write_rows(folder / name, rows)
    return folder


def dnpo_run(tmp_path, name: str, seed: int, scores: list[list[float]], asked: str = "a", **config):
    """Three iterations (start, SPIN, DNPO), a held-out answer per score, and made-up losses.

    asked: how the held-out prompts begin.
    """
    config = {
        "noise_init": 0.1,
        "labels": "judge",
        "noise": True,
        "noise_update": "joint",
        "seed": seed,
        "out": name,
        "lr": 1e-4,
        **config,
    }
    metrics = []
    for k in (1, 2):
        for step in (1, 2):
            line = {"iteration": k, "step": step, "loss": k + step / 10}
            line.update({"weights/mean": step / 10, "weights/spread": k / 10})
            if config["noise"] and k > 1:
                line["noise/loss"] = -0.1 * k
                line["noise/drop_margin"] = 1.0 * step
            metrics.append(line)

    iterations, files = [], {}
    for k, row in enumerate(scores):
        shares = {"win": 0.25 * k, "tie": 0.25, "loss": 0.75 - 0.25 * k}
        iterations.append({"iteration": k, "score": mean(row), **shares})
        answers = []
        for i, score in enumerate(row):
            prompt = [{"role": "user", "content": f"{asked} {i}"}]
            answers.append({"id": str(i), "prompt": prompt, "meta": {"score": score}})
        files[f"iter{k}/test.jsonl"] = answers
    for k in (1, 2):
        logps = []
        for i in range(10):
            row = {"id": str(i), "positive": -1.0 - i, "negative": -11.0 - i}
            logps.append({**row, "new": -11.0 - i - 3 * k})
        files[f"iter{k}/logps.jsonl"] = logps
    return made_up(tmp_path / name, config, {"iterations": iterations}, metrics, files)


def sams_run(tmp_path, name: str, select: str, flips: list[tuple[int, int]], **config):
    """Updates of 8 pairs, 4 of them selected, with the accuracy measured after every second one.

    flips: of each update, how many pairs of the batch are flipped, and how many selected ones.
    """
    config = {
        "selector_lr": 1e-4,
        "select": select,
        "preselect": 1.0,
        "ratio": 0.5,
        "seed": 0,
        "out": name,
        "flip": 0.2,
        "epochs": 1,
        "gamma": 0.5,
        **config,
    }
    metrics = []
    for step, (in_batch, in_selected) in enumerate(flips, 1):
        line = {
            "step": step,
            "batch/pairs": 8,
            "batch/flipped": in_batch,
            "selected/flipped": in_selected,
            "selected/pairs": 4,
            "score_seconds": 0.5,
            "selector/seconds": 0.25,
            "memory_gib": step / 2,
            "pairs_per_second": 4.0,
        }
        if step % 2 == 0:
            line["eval/accuracy"] = 0.5 + step / 10
        metrics.append(line)
    return made_up(tmp_path / name, config, {}, metrics)


def test_runs_that_differ_in_their_seed_are_one_kind(tmp_path):
    """In the seeds' order; kinds of one name say what differs; a name of one's own is kept."""
    variants = {
        "a1": {"seed": 1},
        "a0": {"seed": 0},
        "hot": {"seed": 0, "lr": 1e-3},
        "spin": {"seed": 0, "labels": "annotation", "noise": False},
        "dsl": {"seed": 0, "noise": False},
        "npo": {"seed": 0, "labels": "annotation"},
        "off": {"seed": 0, "noise_update": "offset"},
        "npo-off": {"seed": 0, "labels": "annotation", "noise_update": "offset"},
        "dsl-off": {"seed": 0, "noise": False, "noise_update": "offset"},
    }
    runs = []
    for name, config in variants.items():
        folder = dnpo_run(tmp_path, name, scores=[[1.0]] * 3, **config)
        runs.append(read_run(str(folder)))
    runs.append(read_run(f"{tmp_path}/hot=hotter"))

    kinds = {}
    for kind in group_runs(runs):
        kinds[kind.name] = [run.folder.name for run in kind.runs]
    assert list(kinds.items()) == [
        ("DNPO", ["a0", "a1"]),
        ("DNPO, lr 0.001", ["hot"]),
        ("SPIN", ["spin"]),
        ("SPIN + DSL", ["dsl"]),
        ("SPIN + NPO", ["npo"]),
        ("SPIN + DSL + offset", ["off"]),
        ("SPIN + offset", ["npo-off"]),
        ("SPIN + DSL, noise_update offset", ["dsl-off"]),
        ("hotter", ["hot"]),
    ]


def kinds_of(runs) -> dict[str, list[str]]:
    """The folders of each kind of runs."""
    return {kind.name: [run.folder.name for run in kind.runs] for kind in group_runs(runs)}


def test_runs_that_lack_a_newer_flag_or_differ_in_the_systems_are_one_kind(tmp_path):
    """An old run joins the only kind that it is like; where there are two, it stays apart."""
    fsdp = {"parallel": "fsdp", "save_dtype": "float32"}
    ddp = {"parallel": "ddp", "save_dtype": "bfloat16"}
    variants = {
        "old": {},
        "fsdp": {"judge_noise": 0.0, **fsdp},
        "ddp": {"judge_noise": 0.0, **ddp},
        "errs": {"judge_noise": 0.3},
        "old-spin": {"labels": "annotation"},
    }
    runs = []
    for name, config in variants.items():
        folder = dnpo_run(tmp_path, name, seed=0, scores=[[1.0]] * 3, **config)
        runs.append(read_run(str(folder)))
    old, sharded, replicated, errs, old_spin = runs
    assert kinds_of([old, sharded, replicated, old_spin]) == {
        "DNPO": ["fsdp", "ddp", "old"],
        "SPIN + NPO": ["old-spin"],
    }
    assert kinds_of([old, sharded, errs]) == {
        "DNPO": ["fsdp"],
        "DNPO, judge_noise 0.3": ["errs"],
        "DNPO, judge_noise unknown": ["old"],
    }


def test_tasks_have_panels_of_their_own(tmp_path):
    """Kinds under the task that they share, named by what differs between tasks."""
    variants = {
        "s": {"select": "topk"},
        "d": {"select": "all"},
        "s4": {"select": "topk", "flip": 0.4},
        "g": {"select": "topk", "gamma": 0.2},
        "p": {"select": "all", "preselect": 0.5},
    }
    runs = []
    for name, config in variants.items():
        folder = sams_run(tmp_path, name, flips=[(2, 1)] * 4, **config)
        runs.append(read_run(str(folder)))
    tasks = {}
    for task, kinds in by_task(group_runs(runs)).items():
        tasks[task] = [kind.name for kind in kinds]
    assert tasks == {
        "flip 0.2": ["SamS", "DPO", "SamS, gamma 0.2", "Selective + DPO"],
        "flip 0.4": ["SamS"],
    }


def test_dnpo_figures_plot_the_runs_numbers(tmp_path):
    """Scores and shares per iteration, log-probs, distances, duels, losses: all known."""
    scores = [[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 1.0], [5.0, 5.0, 5.0, 0.0]]
    even = [[1.0, 1.0, 1.0, 1.0]] * 3
    own = read_run(str(dnpo_run(tmp_path, "own", 0, scores)))
    folder = dnpo_run(tmp_path, "spin", 0, even, labels="annotation", noise=False)
    spin = read_run(str(folder))
    assert figures.iteration_values(own, "score") == [1.0, 1.0, 3.75]
    assert figures.iteration_values(own, "win") == [0.0, 0.25, 0.5]
    assert figures.iteration_values(own, "nothing") is None
    assert duel(own, spin) == [(0.0, 1.0, 0.0), (0.25, 0.5, 0.25), (0.75, 0.0, 0.25)]

    first, second = figures.logp_samples(own, 1), figures.logp_samples(own, 2)
    new = "generated, next iteration"
    assert second["positive"] == [-1.0 - i for i in range(10)]
    assert second[new] == [-17.0 - i for i in range(10)]
    assert ks_distance(first[new], first["negative"]) == near(0.3)
    assert ks_distance(second[new], second["negative"]) == near(0.6)

    assert figures.curves(own, "loss", "noise/loss") == [[2.1, 2.2], [-0.2, -0.2]]
    assert figures.beginnings(own, "loss", "noise/loss") == [0]
    assert figures.curves(spin, "loss", "noise/loss") == [[], []]
    assert figures.curves(spin, "loss") == [[1.1, 1.2, 2.1, 2.2]]
    assert figures.beginnings(spin, "loss") == [0, 2]
    assert figures.iteration_means(own, "noise/drop_margin") == near({2: 1.5})
    assert figures.iteration_means(own, "weights/mean") == near({1: 0.15, 2: 0.15})
    assert figures.iteration_means(spin, "noise/drop_margin") == {}


def drawn_lines(ax) -> list[tuple]:
    """The name, places and heights of each line of a panel; not the marks between iterations."""
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    return [(line.get_label(), list(line.get_xdata()), near(line.get_ydata())) for line in named]


def drawn_bars(ax) -> dict[str, list[float]]:
    """The heights of each part of a panel's bars, from left to right."""
    found = {}
    for part in ax.containers:
        found[part.get_label()] = near([bar.get_height() for bar in part])
    return found


@pytest.fixture
def dnpo_and_spin(tmp_path) -> list:
    """A kind of DNPO, which beats the annotations and SPIN more and more often, and one of SPIN."""
    pytest.importorskip("matplotlib")
    scores = [[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 1.0], [5.0, 5.0, 5.0, 0.0]]
    even = [[1.0, 1.0, 1.0, 1.0]] * 3
    own = dnpo_run(tmp_path, "own", 0, scores)
    spin = dnpo_run(tmp_path, "spin", 0, even, labels="annotation", noise=False)
    return group_runs([read_run(str(own)), read_run(str(spin))])


def test_figure_1_shows_who_wins_against_the_annotations(dnpo_and_spin):
    """A part of the bars has the name of what results.json calls win, tie or loss."""
    _, figure, numbers = figures.dnpo_win_rate(dnpo_and_spin)
    assert [ax.get_title() for ax in figure.axes] == ["DNPO", "SPIN"]
    for ax in figure.axes:
        assert drawn_bars(ax) == {
            "generated wins": [0, 25, 50],
            "generated ties": [25, 25, 25],
            "generated loses": [75, 50, 25],
        }
    assert [row["win"] for row in numbers] == [0.0, 0.25, 0.5] * 2


def test_figure_7_shows_who_wins_against_spin(dnpo_and_spin):
    """Its gap is above 0 where DNPO's answers win more often than they lose."""
    duels = figures.duels_with_spin(dnpo_and_spin)
    _, figure, numbers = figures.dnpo_against_spin(duels)
    (ax,) = figure.axes
    assert ax.get_title() == "DNPO against SPIN\nwin–loss gap at the end +50.0 points"
    assert drawn_bars(ax) == {"win": [0, 25, 75], "tie": [100, 50, 0], "loss": [0, 25, 25]}
    assert [row["gap to SPIN"] for row in numbers] == [0, 0, 0.5]


def test_figures_5_8_and_9_show_scores_and_losses_under_their_names(dnpo_and_spin):
    """Scores by iteration, those of the last one, and the losses of model and noise by step."""
    _, figure, _ = figures.dnpo_score(dnpo_and_spin)
    assert drawn_lines(figure.axes[0]) == [
        ("DNPO", [0, 1, 2], [1.0, 1.0, 3.75]),
        ("SPIN", [0, 1, 2], [1.0, 1.0, 1.0]),
    ]
    _, figure, _ = figures.dnpo_ablation(dnpo_and_spin)
    (ax,) = figure.axes
    assert [name.get_text() for name in ax.get_xticklabels()] == ["SPIN", "DNPO"]
    assert list(drawn_bars(ax).values()) == [[1.0, 3.75]]

    _, figure, numbers = figures.dnpo_losses(dnpo_and_spin[:1])
    assert drawn_lines(figure.axes[0]) == [
        ("model loss", [1, 2], [2.1, 2.2]),
        ("noise loss", [1, 2], [-0.2, -0.2]),
    ]
    assert numbers == [{"runs": "DNPO", "model loss at the end": 2.2}]


def test_the_noise_figure_has_a_line_for_each_kind_with_the_data(tmp_path):
    """Fall, weights and score by iteration; a run without noise has no fall to show."""
    pytest.importorskip("matplotlib")
    scores = [[1.0], [2.0], [4.0]]
    runs = []
    for name, config in (("a", {}), ("b", {"noise_update": "offset"}), ("c", {"noise": False})):
        runs.append(read_run(str(dnpo_run(tmp_path, name, 0, scores, **config))))
    _, figure, numbers = figures.dnpo_noise(group_runs(runs))

    names = ["DNPO", "SPIN + DSL + offset", "SPIN + DSL"]
    plotted = []
    for ax in figure.axes:
        panel = []
        for line in ax.get_lines():
            panel.append((line.get_label(), list(line.get_xdata()), near(line.get_ydata())))
        plotted.append(panel)
    assert plotted == [
        [(name, [2], [1.5]) for name in names[:2]],
        [(name, [1, 2], [0.15, 0.15]) for name in names],
        [(name, [1, 2], [0.1, 0.2]) for name in names],
        [(name, [0, 1, 2], [1.0, 2.0, 4.0]) for name in names],
    ]
    assert len(numbers) == 2 + 6 + 6 + 9


def test_tso_figures_plot_the_runs_numbers(tmp_path):
    """Rewards over the steps of all slices; the first and the last spread of the scores."""

    def spread(k: float) -> list[dict]:
        measured = {"id": "a", "skewness": k, "kurtosis": -k}
        return [measured, {"id": "b", "skewness": None, "kurtosis": None}]

    metrics = []
    for n in (1, 2):
        for step in (1, 2, 3):
            line = {"iteration": n, "slice": f"1.{n}", "step": step}
            metrics.append({**line, "rewards/chosen": n + step, "rewards/rejected": -step})
    slices = [
        {"round": 0, "slice": 0},
        {"round": 1, "slice": 1},
        {"round": 1, "slice": 2},
    ]
    files = {"start/spread.jsonl": spread(1.0), "round1-slice2/spread.jsonl": spread(2.0)}
    config = {"clip_chosen": 0.2, "clip_rejected": 0.2, "seed": 0}
    folder = made_up(tmp_path / "t", config, {"slices": slices}, metrics, files)
    run = read_run(str(folder))
    chosen, rejected = figures.curves(run, "rewards/chosen", "rewards/rejected")
    assert chosen == [2, 3, 4, 3, 4, 5]
    assert rejected == [-1, -2, -3, -1, -2, -3]
    assert figures.beginnings(run, "rewards/chosen", "rewards/rejected") == [0, 3]
    assert figures.spreads(run) == {"before": [(1.0, -1.0)], "after": [(2.0, -2.0)]}

    unclipped = {"clip_chosen": math.inf, "clip_rejected": math.inf, "seed": 0}
    folder = made_up(tmp_path / "d", unclipped, {"slices": slices[:1]}, metrics)
    plain = read_run(str(folder))
    assert [kind.name for kind in group_runs([run, plain])] == ["dual clip", "DPO"]
    assert figures.spreads(plain) == {}

    pytest.importorskip("matplotlib")
    rewards, scores = figures.tso_figures(group_runs([run, plain]))
    titles = ["Fig. 3: DPO", "Fig. 4: dual clip"]
    assert [ax.get_title() for ax in rewards.figure.axes] == titles
    for ax in rewards.figure.axes:
        assert drawn_lines(ax) == [
            ("positive responses", [1, 2, 3, 4, 5, 6], chosen),
            ("negative responses", [1, 2, 3, 4, 5, 6], rejected),
        ]
    before, after = scores.figure.axes[0].collections
    assert before.get_label() == "before training"
    assert before.get_offsets().tolist() == [[1.0, -1.0]]
    assert after.get_label() == "after training"
    assert after.get_offsets().tolist() == [[2.0, -2.0]]


def test_the_sweep_figure_plots_every_axis_of_all_files(tmp_path, capsys):
    """Seconds above and memory below, a column an axis, a line a row; or one line of error."""
    pytest.importorskip("matplotlib")

    def cost(n: int) -> dict:
        return {"seconds": float(n), "peak_mib": 100.0 * n}

    short = {"dpo": cost(1), "sams": cost(3)}
    long = {"dpo": cost(2), "sams": cost(5)}
    lengths = {"sweep": {"length": {"128": short, "256": long}}}
    ranks = {"sweep": {"ranks": {"1": {"dpo": cost(7)}, "2": {"dpo": cost(4)}}}}
    (tmp_path / "a.json").write_text(json.dumps(lengths))
    (tmp_path / "b.json").write_text(json.dumps(ranks))
    _, figure, numbers = figures.sweep_figure([tmp_path / "a.json", tmp_path / "b.json"])

    plotted = []
    for ax in figure.axes:
        panel = []
        for line in ax.get_lines():
            panel.append((line.get_label(), list(line.get_xdata()), list(line.get_ydata())))
        plotted.append(panel)
    assert plotted == [
        [("dpo", [128, 256], [1, 2]), ("sams", [128, 256], [3, 5])],
        [("dpo", [1, 2], [7, 4])],
        [("dpo", [128, 256], [100, 200]), ("sams", [128, 256], [300, 500])],
        [("dpo", [1, 2], [700, 400])],
    ]
    assert len(numbers) == 6
    row = {"axis": "length", "value": 128, "row": "sams", "seconds": 3.0, "peak_mib": 300.0}
    assert numbers[2] == row

    for other in ({"rows": {}}, [1], {"sweep": []}, {"sweep": {}}, {"sweep": {"height": {}}}):
        (tmp_path / "c.json").write_text(json.dumps(other))
        with pytest.raises(SystemExit):
            figures.sweep_figure([tmp_path / "c.json"])
        assert "c.json: no sweep of bench.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        figures.sweep_figure([tmp_path / "a.json", tmp_path / "a.json"])
    assert "a.json: a second sweep of length" in capsys.readouterr().err


def test_a_row_looks_the_same_in_all_sweeps(tmp_path):
    """The ranks have no floor; where the memory is not known, the seconds are drawn alone."""
    pytest.importorskip("matplotlib")
    cost = {"seconds": 1.0, "peak_mib": None}
    lengths = {"length": {"128": {"floor": cost, "dpo": cost}}}
    ranks = {"ranks": {"1": {"dpo": cost, "sams": cost}}}
    for name, sweep in {"a": lengths, "b": ranks}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"sweep": sweep}))

    for order in ("ab", "ba"):
        _, figure, _ = figures.sweep_figure([tmp_path / f"{name}.json" for name in order])
        figure.canvas.draw()  # nothing of it fails on what is not known
        color_of = {}
        for ax in figure.axes[:2]:
            for line in ax.get_lines():
                color_of.setdefault(line.get_label(), set()).add(line.get_color())
        assert [len(colors) for colors in color_of.values()] == [1, 1, 1]
        assert len(set.union(*color_of.values())) == 3

        (legend,) = figure.legends
        named = {text.get_text() for text in legend.get_texts()}
        assert named == {"floor", "dpo", "sams"}


def test_a_kind_of_run_that_one_panel_lacks_is_in_the_legend(tmp_path):
    """A panel of more lines than another does not have all of them."""
    pytest.importorskip("matplotlib")
    first, second = figures.panels(2, 3, 3)[1]
    for name in ("DPO", "random", "SamS"):
        first.plot([1], [1], label=name)
    for name in ("DPO", "oracle"):
        second.plot([1], [1], label=name)
    figures.legend(first.figure, [first, second])
    (legend,) = first.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["DPO", "random", "SamS", "oracle"]


def test_a_run_that_is_named_twice_counts_once(tmp_path, capsys):
    """With and without a slash: one seed. Another name makes it another run."""
    pytest.importorskip("matplotlib")
    run = str(sams_run(tmp_path, "s", "topk", [(0, 0), (2, 1)]))
    figures.draw([run, f"{run}/"], tmp_path / "figures")
    written = json.loads((tmp_path / "figures" / "figures.json").read_text())
    assert [row["seeds"] for row in written["sams-accuracy"]] == [1]


def test_sams_figures_plot_the_runs_numbers(tmp_path):
    """Accuracy at its updates; shares of flipped pairs, counted by hand; costs that add up."""
    flips = [(0, 0), (2, 1), (3, 0), (1, 1)]
    run = read_run(str(sams_run(tmp_path, "s", "topk", flips)))
    assert figures.curves(run, "eval/accuracy", "step") == [[0.7, 0.9], [2, 4]]

    first, *others = figures.flipped_selected(run)
    assert math.isnan(first)
    assert others == near([1 / 2, 1 / 5, 2 / 6])
    _, *others = figures.flipped_selected(run, 2)
    assert others == near([1 / 2, 1 / 5, 1 / 4])

    expected = {"score": 0.5, "select": 0.25, "train": 8 / 4.0 - 0.75, "memory": 2.0}
    assert figures.costs(run) == near(expected)

    pytest.importorskip("matplotlib")
    accuracy, flipped, cost = figures.sams_figures(group_runs([run]))
    (ax,) = accuracy.figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Updates", "Test accuracy (%)")
    assert drawn_lines(ax) == [("SamS", [2, 4], [70, 90])]
    (line,) = flipped.figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [1, 2, 3, 4]
    assert list(line.get_ydata())[1:] == near([50, 20, 100 / 3])
    seconds, memory = cost.figure.axes
    assert drawn_bars(seconds) == {"training": [1.25], "scoring pass": [0.5], "selector": [0.25]}
    assert list(drawn_bars(memory).values()) == [[2.0]]


FIGURES = {
    "dnpo-fig1-win-rate",
    "dnpo-fig5-score",
    "dnpo-fig8-ablation",
    "dnpo-fig10-log-probs-dnpo",
    "dnpo-fig2-log-probs-spin",
    "dnpo-fig7-against-spin",
    "dnpo-fig9-losses",
    "dnpo-noise",
    "tso-fig3-fig4-rewards",
    "tso-fig5-scores",
    "sams-accuracy",
    "sams-flipped",
    "sams-cost",
}


def make_finished_runs(world, tmp_path, monkeypatch) -> list:
    """Two seeds of DNPO, SPIN, two selectors and a made-up TSO run; their folders."""
    dnpo_runs = {"a0": {}, "a1": {"seed": 1}, "s0": {"labels": "annotation", "noise": False}}
    for name, flags in dnpo_runs.items():
        run(monkeypatch, dnpo, *dnpo_flags(world, **flags), "--out", tmp_path / name)
    for name in ("topk", "all"):
        place = ["--out", tmp_path / name, "--reference", tmp_path / "reference"]
        run(monkeypatch, sams, *sams_flags(world, select=name), *place)

    metrics = []
    for step in (1, 2):
        rewards = {"rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step}
        metrics.append({"slice": "1.1", "step": step, **rewards})
    config = {"clip_chosen": 0.2, "clip_rejected": 0.2, "seed": 0}
    results = {"slices": [{"round": 0, "slice": 0}, {"round": 1, "slice": 1}]}
    spread = [{"id": "a", "skewness": 1.0, "kurtosis": -1.0}]
    files = {"start/spread.jsonl": spread, "round1-slice1/spread.jsonl": spread}
    made_up(tmp_path / "t", config, results, metrics, files)
    return [tmp_path / name for name in ("a0", "a1", "s0", "topk", "all", "t")]


def test_figures_are_drawn_of_finished_runs_alone(world, tmp_path, monkeypatch, capsys):
    """Every figure as SVG and PNG with its numbers, the same bytes again, and no model is read."""
    pytest.importorskip("matplotlib")
    folders = make_finished_runs(world, tmp_path, monkeypatch)
    forbid(monkeypatch, common, "load_lm", "a model was read")
    forbid(monkeypatch, evaluate, "load_tokenizer", "a model was read")
    forbid(monkeypatch, evaluate, "make_judge", "a model was read")
    for out in ("one", "two"):
        run(monkeypatch, evaluate, "--figures", *folders, "--out", tmp_path / out)

    expected = {"figures.json"}
    for name in FIGURES:
        expected |= {f"{name}.svg", f"{name}.png"}
    files = contents(tmp_path / "one", "*")
    assert set(files) == expected
    assert contents(tmp_path / "two", "*") == files

    scores, rows = [], []
    for name in ("a0", "a1"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        scores.append(results["iterations"][-1]["score"])
        rows += lines(tmp_path / name / "iter1" / "logps.jsonl")
    numbers = json.loads(files["figures.json"])
    assert numbers["dnpo-fig8-ablation"][-1] == {
        "runs": "DNPO",
        "score": near(mean(scores)),
        "std": near(abs(scores[0] - scores[1]) / math.sqrt(2)),
    }
    distance = ks_distance([row["new"] for row in rows], [row["negative"] for row in rows])
    log_probs = numbers["dnpo-fig10-log-probs-dnpo"][0]
    assert log_probs["KS generated / negative"] == distance
    assert "KS generated / negative" in capsys.readouterr().out

    (tmp_path / "s0" / "iter2" / "logps.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, evaluate, "--figures", tmp_path / "s0", "--out", tmp_path / "one")
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/s0/iter2/logps.jsonl: no such file; "
        "a figure needs what the run has left there\n"
    )


def compared(monkeypatch, tmp_path, *folders) -> list[dict]:
    """The rows of the table that --compare makes of these folders."""
    run(monkeypatch, evaluate, "--compare", *folders, "--out", tmp_path / "out")
    rows = evaluated(tmp_path)["results"]
    for file in (tmp_path / "out").glob("results-*.json"):
        file.unlink()
    return rows


def test_runs_are_compared_seed_by_seed_and_row_by_row(tmp_path, monkeypatch):
    """Mean and std over seeds; the difference pairs the rows of equal seeds and draws prompts.

    SPIN has the seeds 0 and 1, DNPO 0, 1 and 2. SPIN is named first, so that it is the baseline,
    though its runs are older than a flag of DNPO's. DNPO is better by 2, 0, 4, 0 and by 0, 0, 4, 0,
    so by 1, 0, 4, 0 a prompt.
    """
    last = {"spin0": [1, 5, 3, 3], "spin1": [2, 2, 2, 2]}
    last |= {"dnpo0": [3, 5, 7, 3], "dnpo1": [2, 2, 6, 2], "dnpo2": [9] * 4}
    folders = []
    for name, scores in last.items():
        noise = name.startswith("dnpo")
        labels = "judge" if noise else "annotation"
        more = {"seed": int(name[-1]), "noise": noise, "labels": labels}
        if noise:
            more["judge_noise"] = 0.0
        folders.append(dnpo_run(tmp_path, name, scores=[[0.0], [1.0], scores], **more))

    spin, dnpo_row = compared(monkeypatch, tmp_path, *folders)
    assert (spin["runs"], spin["seeds"], spin["mean"]) == ("SPIN", 2, 2.5)
    assert spin["std"] == near(0.5 * math.sqrt(2))
    assert (spin["difference"], spin["low"], spin["high"]) == (0, 0, 0)
    assert (dnpo_row["runs"], dnpo_row["seeds"]) == ("DNPO", 3)
    assert dnpo_row["mean"] == near((4.5 + 3 + 9) / 3)
    assert dnpo_row["difference"] == 1.25
    _, low, high = bootstrap([1, 0, 4, 0])
    assert (dnpo_row["low"], dnpo_row["high"]) == (low, high)
    assert dnpo_row["held out"] == 4


def test_runs_on_other_prompts_or_of_one_seed_are_not_compared(tmp_path, monkeypatch, capsys):
    """Rows of equal ids but other prompts are no pairs; a seed that is there twice is named."""
    scores = [[0.0], [1.0], [2.0, 3.0]]
    spin = dnpo_run(tmp_path, "spin", 0, scores, labels="annotation", noise=False)
    dnpo_row = dnpo_run(tmp_path, "dnpo", 0, scores)
    other = dnpo_run(tmp_path, "other", 0, scores, asked="b", noise_init=0.5)
    again = dnpo_run(tmp_path, "again", 0, scores)
    cases = [
        ([spin, other], "DNPO has no held-out prompt in common with the first kind"),
        ([spin, dnpo_row, again], f"{dnpo_row} and {again} are both DNPO with seed 0"),
    ]
    for folders, line in cases:
        with pytest.raises(SystemExit) as stop:
            compared(monkeypatch, tmp_path, *folders)
        assert stop.value.code == 2
        assert line in capsys.readouterr().err
    assert figures.duel(read_run(str(spin)), read_run(str(other))) == []

    named = compared(monkeypatch, tmp_path, spin, dnpo_row, f"{again}=again")
    assert [row["runs"] for row in named] == ["SPIN", "DNPO", "again"]


def test_a_training_that_was_made_again_stands_in_its_place(tmp_path):
    """Its lines stand behind those of later ones in the file; figures go by iteration and step."""
    folder = dnpo_run(tmp_path, "run", 0, [[1.0]] * 3)
    lines_of = lines(folder / "metrics.jsonl")
    write_rows(folder / "metrics.jsonl", lines_of[2:] + lines_of[:2])
    found = read_run(str(folder)).metrics
    places = [(line["iteration"], line["step"], line["loss"]) for line in found]
    assert places == [(1, 1, 1.1), (1, 2, 1.2), (2, 1, 2.1), (2, 2, 2.2)]


def test_the_controls_figures_are_drawn_without_an_ablation(tmp_path, monkeypatch):
    """Fig. 8 has four rows, offset is none of them; figures.json keeps what is not drawn now."""
    pytest.importorskip("matplotlib")
    control = dnpo_run(tmp_path, "run", 0, [[1.0]] * 3, noise_update="offset")
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "figures.json").write_text(json.dumps({"tso-fig3": [{"a": 1}], "dnpo-noise": []}))
    run(monkeypatch, evaluate, "--figures", control, "--out", drawn)
    numbers = json.loads((drawn / "figures.json").read_text())
    assert "dnpo-fig8-ablation" not in numbers
    assert numbers["tso-fig3"] == [{"a": 1}]
    assert numbers["dnpo-noise"] != []
    assert [row["score"] for row in numbers["dnpo-fig5-score"]] == [1.0] * 3


def test_selectors_are_compared_by_the_pairs_that_they_get_right(tmp_path, monkeypatch, capsys):
    """A margin above 0 is right. Every share of flips is a task of its own, with its own first."""
    margins = {
        "all-2": ("all", 0.2, [1, 1, 0, -1]),
        "topk-2": ("topk", 0.2, [1, 1, 1, 1]),
        "all-4": ("all", 0.4, [-1, -1, -1, -1]),
        "topk-4": ("topk", 0.4, [-1, 1, -1, -1]),
    }
    folders = []
    for name, (select, flip, values) in margins.items():
        folder = sams_run(tmp_path, name, select, [(2, 1)] * 2, flip=flip)
        held = [{"id": str(i), "margin": margin} for i, margin in enumerate(values)]
        write_rows(folder / "held.jsonl", held)
        folders.append(folder)

    rows = compared(monkeypatch, tmp_path, *folders)
    found = {(row["task"], row["runs"]): (row["mean"], row["difference"]) for row in rows}
    assert found == {
        ("flip 0.2", "DPO"): (0.5, 0),
        ("flip 0.2", "SamS"): (1, 0.5),
        ("flip 0.4", "DPO"): (0, 0),
        ("flip 0.4", "SamS"): (0.25, 0.25),
    }

    (folders[0] / "held.jsonl").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, evaluate, "--compare", *folders, "--out", tmp_path / "out")
    assert "held.jsonl: no such file; the run was made before" in capsys.readouterr().err


# ------------------------------------------------------------------------- bad input


def test_log_probs_that_are_no_numbers_are_no_result(world, tmp_path, monkeypatch):
    """A diverged model has no accuracy; nothing is left but the lock."""
    tok, _ = common.load_tokenizer(str(world / "sft"))
    lm = common.load_lm(str(world / "sft"), torch.float32, "cpu")
    with torch.no_grad():
        lm.model.norm.weight.fill_(math.nan)
    lm.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    flags = [tmp_path / "model", "--pairs", world / "pairs.jsonl", "--limit", 8]
    with pytest.raises(SystemExit, match="model: its log-probs are not finite"):
        run(monkeypatch, evaluate, *flags, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_refused_evaluation_makes_no_folder(world, tmp_path, monkeypatch, capsys):
    """One line, exit code 2."""
    sft, out = world / "sft", tmp_path / "out"
    cases = [
        ("no such file", [sft, "--pairs", tmp_path / "none.jsonl"]),
        ("--seed must not be", [sft, "--pairs", world / "pairs.jsonl", "--seed", -1]),
    ]
    for cause, flags in cases:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, evaluate, *flags, "--out", out)
        assert stop.value.code == 2
        assert cause in capsys.readouterr().err
    assert not out.exists()


def test_bad_input_is_one_line(world, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line on stderr that names the cause, before any weight is read."""
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "math"}\n')
    (tmp_path / "empty.json").write_text('[{"instruction": " "}]')
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "a" * 2000}]))
    (tmp_path / "half").mkdir()
    made_up(tmp_path / "odd", {"seed": 0}, {}, [{"step": 1}])
    dnpo_run(tmp_path, "untrained", 0, [[1.0]] * 3)
    (tmp_path / "untrained" / "metrics.jsonl").write_text("")
    dnpo_run(tmp_path, "torn", 0, [[1.0]] * 3)
    (tmp_path / "torn" / "results.json").write_text('{"iterations": [')
    forbid(monkeypatch, common, "load_lm", "a model was loaded")

    sft = world / "sft"
    pairs = [sft, "--pairs", world / "pairs.jsonl"]
    score = [sft, "--score", "--data", world / "test.jsonl"]
    mt_bench = [sft, "--export", "mt_bench"]
    alpaca_eval = [sft, "--export", "alpaca_eval"]
    none, broken = tmp_path / "none.jsonl", tmp_path / "broken.jsonl"
    columns = "expected question_id, category, turns"
    cases = [
        ("one of --pairs, --against or --score", [sft]),
        ("not --pairs and --export", [*pairs, "--export", "mt_bench"]),
        ("which model?", pairs[1:]),
        ("no-such", [sft, "--no-such", 1]),
        ("--beta must be above 0", [*pairs, "--beta", 0]),
        ("--temperature", [*pairs, "--temperature", -1]),
        ("no such file", [sft, "--pairs", none]),
        ("broken.jsonl:1: broken JSON", [sft, "--pairs", broken]),
        ("not a model", [tmp_path, *pairs[1:]]),
        ("not a model", [*pairs, "--reference", tmp_path]),
        ("fills", [*pairs, "--max_response", 10**6]),
        ("stands before the flag", [sft, "--compare", tmp_path / "half"]),
        ("stands before the flag", [sft, "--figures", tmp_path / "half"]),
        ("columns", [sft, "--pairs", world / "test.jsonl"]),
        ("needs --data and --judge", [sft, "--against", "annotations"]),
        ("needs --data and --judge", score),
        ("--judge what", [*score, "--judge", "what"]),
        ("leaves room", [*score, "--judge", "toy", "--max_response", 10**6]),
        ("--export needs --questions", mt_bench),
        (columns, [*mt_bench, "--questions", tmp_path / "q.jsonl"]),
        ("item 1: empty", [*alpaca_eval, "--questions", tmp_path / "empty.json"]),
        ("question 1 needs up to", [*alpaca_eval, "--questions", tmp_path / "long.json"]),
        ("no finished run", ["--figures", tmp_path / "half"]),
        ("not a run of", ["--figures", tmp_path / "odd"]),
        ("metrics.jsonl is empty", ["--figures", tmp_path / "untrained"]),
        ("results.json is damaged", ["--compare", tmp_path / "torn"]),
        ("is no folder", [*pairs, "--out", world / "pairs.jsonl"]),
    ]
    for cause, flags in cases:
        if "--out" not in flags:
            flags = [*flags, "--out", tmp_path / "out"]
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, evaluate, *flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2, (cause, err)
        assert err.startswith("error: "), (cause, err)
        assert err.count("\n") == 1, (cause, err)
        assert cause in err, (cause, err)


@pytest.mark.parametrize(
    "package,flags,advice",
    [
        ("lm_eval", ["MODEL", "--benchmarks", "gsm8k"], "pip install 'lm_eval[hf]'"),
        ("matplotlib", ["--figures", "RUN"], "pip install matplotlib"),
    ],
)
def test_an_absent_package_is_one_line(
    package, flags, advice, world, tmp_path, monkeypatch, capsys
):
    """What is missing and how to install it; exit code 2."""
    find = importlib.util.find_spec

    def find_others(name, *arguments):
        return None if name == package else find(name, *arguments)

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    places = {"MODEL": world / "sft", "RUN": dnpo_run(tmp_path, "run", 0, [[1.0]] * 3)}
    flags = [places.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, evaluate, *flags, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert advice in err
