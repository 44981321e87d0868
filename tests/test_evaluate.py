"""evaluate.py: its statistics against naive loops and known answers, its numbers against transformers, TRL and lm-eval, its files, and what its figures plot."""
import copy
import functools
import importlib.util
import json
import math
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import dnpo_flags, environment, forked, lines, run, sams_flags, script

import common
import dnpo
import evaluate
import sams
from evaluate import Config, benchmark_command, bootstrap, pair_rewards, settle, shorter_chosen, versus
from figures import band, by_task, costs, curves, duel, flipped_selected, group_runs, histogram, iteration_values, ks_distance, logp_samples, read_run, spreads, sweep_figure

near = functools.partial(pytest.approx, rel=1e-6, abs=1e-9)


def evaluated(tmp_path) -> dict:
    """The only results file in out/."""
    (file,) = (tmp_path / "out").glob("results-*.json")
    return json.loads(file.read_text())


# ---------------------------------------------------------------- statistics


def test_the_bootstrap_is_the_naive_loop():
    """Resampled means of whole groups, drawn by the same generator and summed in loops; their 2.5 and 97.5 percentiles by sorting and interpolating."""
    rng = random.Random(0)
    values, groups = [rng.gauss(1, 2) for _ in range(13)], [rng.choice("abcde") for _ in range(13)]
    for by in (groups, list(range(13))):
        names, generator, means = sorted(set(by)), np.random.default_rng(7), []
        for _ in range(2000):
            drawn = [v for k in generator.integers(len(names), size=len(names)) for v, g in zip(values, by) if g == names[k]]
            means.append(sum(drawn) / len(drawn))
        means.sort()
        at = lambda q: (lambda x: means[int(x)] + (x - int(x)) * (means[int(x) + 1] - means[int(x)]))(q * 1999)
        found = bootstrap(values, by if by is groups else None, seed=7)
        assert found == near((sum(values) / 13, at(0.025), at(0.975))) and found == bootstrap(values, by if by is groups else None, seed=7) != bootstrap(values, by, seed=8)


def test_the_bootstrap_covers_and_knows_its_limits():
    """The width is about that of the normal approximation; equal values have no width, no values no interval; repeating rows of a group adds no evidence."""
    values = np.random.default_rng(0).normal(size=400)
    _, low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1) and low < values.mean() < high
    assert bootstrap([3.0] * 5) == (3.0, 3.0, 3.0) and bootstrap([]) == (None, None, None)
    assert bootstrap(np.repeat(values, 4), np.repeat(np.arange(400), 4)) == near((values.mean(), low, high))


def test_ks_is_the_naive_double_loop():
    """The largest difference of the two distribution functions over all points, ties included; 0 for the same sample, 1 for separate ones; scipy's if it is there."""
    rng = random.Random(0)
    for n, m in ((5, 7), (20, 3), (1, 1), (30, 30)):
        a, b = ([rng.randint(0, 9) / 2 for _ in range(k)] for k in (n, m))
        naive = max(abs(sum(u <= x for u in a) / n - sum(v <= x for v in b) / m) for x in a + b)
        assert ks_distance(a, b) == near(naive) == near(ks_distance(b, a))
        if importlib.util.find_spec("scipy"):
            from scipy.stats import ks_2samp
            assert ks_distance(a, b) == near(ks_2samp(a, b).statistic)
    assert ks_distance([1, 2, 3], [3, 1, 2]) == 0 and ks_distance([1, 2], [3, 4]) == 1


def test_histograms_share_bins_and_count_everything():
    """Known counts in known bins; outliers stand in the outer bins; shares sum to 1; a constant sample has a bin too."""
    edges, shares = histogram({"a": list(range(101)), "b": [50] * 4 + [-1000, 1000]}, bins=4)
    assert len(edges) == 5 and np.diff(edges).tolist() == near([np.diff(edges)[0]] * 4) and all(share.sum() == near(1) for share in shares.values())
    low, high = edges[0], edges[-1]
    naive = lambda x: min(3, int((min(max(x, low), high) - low) / (high - low) * 4))
    for name, sample in (("a", list(range(101))), ("b", [50] * 4 + [-1000, 1000])):
        assert shares[name].tolist() == near([sum(naive(x) == k for x in sample) / len(sample) for k in range(4)])
    assert histogram({"c": [2.0, 2.0]})[1]["c"].sum() == 1


def test_bands_are_mean_and_deviation():
    """Means and sample deviations by hand, of curves cut to the shortest; one run has no deviation."""
    mean, deviation = band([[1.0, 2.0, 9.0], [3.0, 6.0]])
    assert mean.tolist() == [2.0, 4.0] and deviation.tolist() == near([math.sqrt(2), math.sqrt(8)])
    assert band([[1.0, 2.0]])[1].tolist() == [0.0, 0.0]


def test_rewards_and_length_control_are_the_formulas():
    """r = beta (log pi - log pi_ref) by hand; an equal length is not shorter."""
    chosen, rejected = pair_rewards([[-1.0, -3.0], [-2.0, -2.0]], [[-2.0, -1.0], [-2.0, -4.0]], 0.5)
    assert chosen.tolist() == [0.5, 0.0] and rejected.tolist() == [-1.0, 1.0]
    assert shorter_chosen([(3, 4), (4, 4), (5, 4)]).tolist() == [True, False, False]


class MadeUp(common.Judge):
    """A judge by rule: rule(a, b) -> verdict, asked in both orders; it counts what it is asked."""

    def __init__(self, rule, spec="made-up:"):
        super().__init__(spec, None)
        self.rule, self.questions = rule, []

    def ask(self, kind, items, again):
        self.questions += items
        return [float(len(item[1])) if kind == "score" else self.rule(*item[1:]) for item in items]


def verdicts_of(tmp_path, judge, mine, others):
    c = Config(model="m", data="d", against="annotations", judge="toy", out=str(tmp_path / "out"))
    row = lambda i, text: {"id": str(i), "prompt": [{"role": "user", "content": f"question {i}"}], "response": text}
    return evaluate.judge_pairs(c, judge, [row(i, x) for i, x in enumerate(mine)], [row(i, x) for i, x in enumerate(others)])


def test_a_judge_that_always_says_a_makes_ties_and_flips(tmp_path):
    """100 % ties, flip rate 1, no decided verdict; two equal texts are a tie that is not asked about and can't flip."""
    judge = MadeUp(lambda a, b: "A")
    rows = verdicts_of(tmp_path, judge, ["long answer", "b", "same"], ["x", "yy", "same"])
    found = versus(rows)
    assert (found["win"], found["tie"], found["loss"], found["flip_rate"], found["longer_wins"]) == (0, 1, 0, 1, None)
    assert (found["gap"], found["gap_low"], found["gap_high"], found["win_rate"]) == (0, 0, 0, 0.5) and len(judge.questions) == 4
    assert [row["there"] for row in rows] == ["A", "A", None]


def test_verdicts_are_counted_as_they_were_given(tmp_path):
    """A longer-wins judge: every decided verdict for the longer, none flips; a judge that can't be read is left out and counted; signs of the gap."""
    longer = MadeUp(lambda a, b: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie")
    found = versus(verdicts_of(tmp_path, longer, ["aaa", "bb", "c", "dd"], ["x", "yyy", "zz", "ee"]))
    assert found["longer_wins"] == 1 and found["flip_rate"] == 0
    assert (found["win"], found["tie"], found["loss"], found["gap"], found["win_rate"]) == (0.25, 0.25, 0.5, -0.25, 0.375)
    mute = versus(verdicts_of(tmp_path, MadeUp(lambda a, b: None if "x" in a + b else "A" if "w" in a else "B", "mute:"), ["w1", "w2", "w3"], ["x", "l", "l"]))
    assert (mute["win"], mute["judged"], mute["unreadable"], mute["gap"], mute["gap_low"]) == (1, 2, 1, 1, 1)
    nobody = versus(verdicts_of(tmp_path, MadeUp(lambda a, b: None, "nobody:"), ["w"], ["x"]))
    assert nobody["judged"] == 0 and nobody["win"] is nobody["gap"] is nobody["win_rate_low"] is None
    assert [settle(*v) for v in (("A", "A"), ("B", "B"), ("A", "B"), ("tie", "A"), ("tie", "tie"), (None, "A"))] == ["win", "loss", "tie", "tie", "tie", None]


def test_the_gap_draws_prompts_not_rows(tmp_path):
    """The same verdicts on four times the rows of the same prompts give the same interval."""
    row = lambda i, v: {"prompt": i, "verdict": v, "there": None, "back": None, "length": 1, "length_other": 1}
    few = [row(i, v) for i, v in enumerate(["win", "loss", "tie", "win", "win"] * 4)]
    assert [versus(few)[k] for k in ("gap", "gap_low", "gap_high")] == near([versus([r for r in few for _ in range(4)])[k] for k in ("gap", "gap_low", "gap_high")])


# ---------------------------------------------------------------- preference pairs


def nudged(world, tmp_path):
    """A policy that is not its reference."""
    lm = common.load_lm(str(world / "sft"), torch.float32, "cpu")
    torch.manual_seed(0)
    for p in lm.parameters():
        p.data += 0.05 * torch.randn_like(p)
    lm.save_pretrained(tmp_path / "policy")
    common.load_tokenizer(str(world / "sft"))[0].save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def naive_rewards(policy, reference, rows, beta):
    """transformers' own logits, one sequence at a time, one token at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok, out = AutoTokenizer.from_pretrained(policy), []
    for folder in (policy, reference):
        lm, logps = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
        for row in rows:
            for side in ("chosen", "rejected"):
                prompt = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
                ids = prompt + tok(row[side], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
                with torch.no_grad():
                    logits = lm(input_ids=torch.tensor([ids])).logits[0].double()
                logps.append(sum(logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(len(prompt), len(ids))))
        out.append(logps)
    rewards = [beta * (a - b) for a, b in zip(*out)]
    return rewards[::2], rewards[1::2]


def test_rewards_are_those_of_transformers_one_sequence_at_a_time(world, tmp_path, monkeypatch, capsys):
    """Accuracy, rewards, margin and the length-controlled accuracy of 12 pairs of unlike lengths, batched here and naive there; a second call scores nothing."""
    policy, rng = nudged(world, tmp_path), random.Random(3)
    word = lambda: "".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(1, 9)))
    rows = [{"prompt": [{"role": "user", "content": word()}], "chosen": word(), "rejected": word()} for _ in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [policy, "--pairs", tmp_path / "pairs.jsonl", "--reference", world / "sft", "--beta", 0.3, "--batch", 5, "--max_response", 16, "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)
    chosen, rejected = naive_rewards(policy, world / "sft", rows, 0.3)
    found = {row["measure"]: row for row in evaluated(tmp_path)["results"]}
    short = [len(row["chosen"]) < len(row["rejected"]) for row in rows]
    mean = lambda x: sum(x) / len(x)
    expected = {"accuracy": mean([a > b for a, b in zip(chosen, rejected)]), "chosen reward": mean(chosen), "rejected reward": mean(rejected), "margin": mean(chosen) - mean(rejected),
                "accuracy, shorter answer chosen": mean([a > b for a, b, s in zip(chosen, rejected, short) if s]),
                "accuracy, others": mean([a > b for a, b, s in zip(chosen, rejected, short) if not s])}
    assert {name: row["mean"] for name, row in found.items()} == {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()}
    assert found["accuracy, shorter answer chosen"]["pairs"] == sum(short) and found["margin"]["low"] < found["margin"]["mean"] < found["margin"]["high"]
    monkeypatch.setattr(evaluate, "load_lm", lambda *a: pytest.fail("scored again"))
    run(monkeypatch, evaluate, *flags)
    capsys.readouterr()


def test_without_training_every_reward_is_zero(world, tmp_path, monkeypatch, capsys):
    """Policy = reference: rewards and margin exactly 0, and an accuracy of 0, because a tie is not right."""
    run(monkeypatch, evaluate, world / "sft", "--pairs", world / "pairs.jsonl", "--reference", world / "sft", "--limit", 10, "--max_response", 16, "--out", tmp_path / "out")
    assert {row["measure"]: row["mean"] for row in evaluated(tmp_path)["results"] if row["pairs"]} == dict.fromkeys(
        ["accuracy", "accuracy, others", "chosen reward", "rejected reward", "margin"], 0.0)
    assert len(list((tmp_path / "out").glob("logps-*"))) == 1 and "| – |" in capsys.readouterr().out.replace("    ", " ").replace("   ", " ").replace("  ", " ")


def test_accuracy_and_margins_are_those_of_trl(world, tmp_path, monkeypatch, capsys):
    """TRL's DPOTrainer.evaluate on the same pairs, policy and reference: accuracy, rewards, margin to 1e-4."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    policy, rows = nudged(world, tmp_path), common.load_rows(str(world / "pairs.jsonl"), "pair", 24)[0]
    say = lambda text: [{"role": "assistant", "content": text}]
    data = Dataset.from_list([{"prompt": row["prompt"], "chosen": say(row["chosen"]), "rejected": say(row["rejected"])} for row in rows])
    args = trl.DPOConfig(output_dir=str(tmp_path / "trl"), per_device_eval_batch_size=8, beta=0.3, use_cpu=True, bf16=False, fp16=False, report_to=[], max_length=None,
                         gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False)
    load = lambda folder: common.load_lm(str(folder), torch.float32, "cpu")
    theirs = trl.DPOTrainer(model=load(policy), ref_model=load(world / "sft"), args=args, train_dataset=data, eval_dataset=data,
                            processing_class=common.load_tokenizer(str(policy))[0]).evaluate()
    run(monkeypatch, evaluate, policy, "--pairs", world / "pairs.jsonl", "--limit", 24, "--reference", world / "sft", "--beta", 0.3, "--max_response", 16, "--out", tmp_path / "out")
    found = {row["measure"]: row["mean"] for row in evaluated(tmp_path)["results"]}
    for name, key in (("accuracy", "accuracies"), ("chosen reward", "chosen"), ("rejected reward", "rejected"), ("margin", "margins")):
        assert found[name] == pytest.approx(theirs[f"eval_rewards/{key}"], abs=1e-4)
    assert abs(found["margin"]) > 1e-2 and 0 < found["accuracy"]
    capsys.readouterr()


# ---------------------------------------------------------------- a judge's opinion


def test_win_tie_loss_and_scores_are_the_judges(world, tmp_path, monkeypatch, capsys):
    """Against the annotations: the toy judge's scores of the answers in the file and of the data's, compared one by one; the same means with --score."""
    flags = [world / "sft", "--against", "annotations", "--data", world / "test.jsonl", "--judge", "toy", "--score", "--limit", 24, "--max_response", 12, "--out", tmp_path / "out"]
    run(monkeypatch, evaluate, *flags)
    import toy
    data = common.load_rows(str(world / "test.jsonl"), "response", 24)[0]
    (answers,) = (tmp_path / "out").glob("answers-*.jsonl")
    scores = [(toy.score(d["prompt"][0]["content"], a["response"]), toy.score(d["prompt"][0]["content"], d["response"])) for d, a in zip(data, lines(answers), strict=True)]
    found = evaluated(tmp_path)
    share = lambda test: sum(test(s, t) for s, t in scores) / 24
    assert [found[k] for k in ("win", "tie", "loss")] == near([share(float.__gt__), share(float.__eq__), share(float.__lt__)])
    assert found["gap"] == near(found["win"] - found["loss"]) and found["flip_rate"] is None  # a number judge has no order
    assert [row["score"] for row in found["scores"]] == near([sum(side) / 24 for side in zip(*scores)])
    assert "win-loss gap" in capsys.readouterr().out
    monkeypatch.setattr(common, "load_lm", lambda *a: pytest.fail("sampled again"))
    monkeypatch.setattr(toy, "score", lambda *a: pytest.fail("judged again"))
    run(monkeypatch, evaluate, *flags)


def test_a_judge_that_counts_words_is_named(world, tmp_path, monkeypatch, capsys):
    """The warning, on stderr, with the share; none for a judge that doesn't mind."""
    for n, (rule, warned) in enumerate(((lambda a, b: "A" if len(a) > len(b) else "B", True), (lambda a, b: "A" if len(a) < len(b) else "B", False))):
        monkeypatch.setattr(evaluate, "make_judge", lambda *a: MadeUp(rule, f"made-up:{n}"))
        run(monkeypatch, evaluate, world / "sft", "--against", world / "sft-small", "--data", world / "test.jsonl", "--judge", f"hf:{n}", "--limit", 20, "--max_response", 12,
            "--temperature", 1, "--out", tmp_path / "out")
        assert ("the longer answer won 100% of the decided comparisons" in capsys.readouterr().err) == warned


def test_a_killed_comparison_goes_on_and_asks_nothing_twice(world, tmp_path, monkeypatch, capsys):
    """Killed while it samples and while it is judged: started again it keeps every finished batch and ends with the same bytes as a run in one go."""
    flags = [world / "sft", "--against", world / "sft-small", "--data", world / "test.jsonl", "--judge", "toy", "--limit", 24, "--batch", 4, "--max_response", 8, "--temperature", 1]
    run(monkeypatch, evaluate, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    assert forked(evaluate, *flags, "--out", out, kill=("in", f"answers of {world / 'sft'} (1 rank, batches of 4)")) == -signal.SIGKILL
    (part,) = out.glob("answers-*.part0")
    kept = part.read_text()
    assert kept.count("stamp") == 2
    assert forked(evaluate, *flags, "--out", out, kill=("in", "judge")) == -signal.SIGKILL
    assert len(list(out.glob("answers-*.jsonl"))) == 2 and len(list(out.glob("verdicts-*.part0"))) == 1
    run(monkeypatch, evaluate, *flags, "--out", out)
    assert {f.name: f.read_bytes() for f in out.glob("*.jsonl")} == {f.name: f.read_bytes() for f in (tmp_path / "whole").glob("*.jsonl")}
    capsys.readouterr()


def test_other_flags_never_meet_an_old_answer(world, tmp_path):
    """A file's name changes with everything that its content depends on: model, prompts, temperature, length, seed, number format."""
    names, (tok, config) = set(), common.load_tokenizer(str(world / "sft"))
    rows = common.load_rows(str(world / "test.jsonl"), "prompt", 2)[0]
    variants = [({}, "sft", rows, 0.0), ({}, "sft-small", rows, 0.0), ({}, "sft", rows[:1], 0.0), ({}, "sft", rows, 0.5), ({"max_response": 7}, "sft", rows, 0.0), ({"seed": 1}, "sft", rows, 0.0),
                ({"dtype": "bfloat16"}, "sft", rows, 0.0)]
    for flags, model, some, temperature in variants:
        c = Config(**{"model": "m", "data": "d", "score": True, "judge": "toy", "out": str(tmp_path), "max_response": 6, "dtype": "float32"} | flags)
        evaluate.answer(c, str(world / model), tok, config, some, temperature, "")
        names |= {f.name for f in tmp_path.glob("*.jsonl")}
    assert len(names) == len(variants)


def test_two_ranks_find_what_one_finds(world, tmp_path, monkeypatch, capsys):
    """Answers, verdicts, log-probs and results are the same files under torchrun."""
    for mode in (["--against", "annotations", "--data", world / "test.jsonl", "--judge", "toy"], ["--pairs", world / "pairs.jsonl", "--reference", world / "sft-early"]):
        flags = [world / "sft", *mode, "--limit", 20, "--batch", 4, "--max_response", 8]
        run(monkeypatch, evaluate, *flags, "--out", tmp_path / "out1")
        done = script("evaluate.py", *flags, "--out", tmp_path / "out2", cwd=tmp_path, ranks=2)
        assert done.returncode == 0, done.stderr
    found = [{f.name: f.read_bytes() for f in (tmp_path / f"out{ranks}").glob("*.json*")} for ranks in (1, 2)]
    assert found[0] == found[1] and len(found[0]) == 6
    capsys.readouterr()


# ---------------------------------------------------------------- benchmarks and exports


def test_the_harness_is_called_with_the_papers_shots():
    """The command line of every benchmark: shots, chat template, few-shot as turns, local tasks; a task of one's own keeps its shots."""
    c = Config(model="M", benchmarks="gsm8k", tasks_dir="T", limit=7, dtype="float32", batch=3, seed=5)
    for task, shots in (("arc_challenge", 25), ("truthfulqa_mc2", 0), ("winogrande", 5), ("gsm8k", 5), ("hellaswag", 10), ("mmlu", 5)):
        assert benchmark_command(c, task, "O") == [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=M,dtype=float32", "--tasks", task,
                                                   "--num_fewshot", str(shots), "--apply_chat_template", "--fewshot_as_multiturn", "--batch_size", "3", "--device", c.device.type,
                                                   "--seed", "5", "--output_path", "O", "--log_samples", "--include_path", "T", "--limit", "7"]
    assert "--num_fewshot" not in benchmark_command(c, "mine", "O")


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="the optional lm_eval is not installed; .ci/run's last line does")
def test_benchmark_numbers_are_the_harness_own(world, tmp_path):
    """A local task through evaluate.py and through lm_eval called by hand: the same numbers; started again, nothing is run."""
    rows = common.load_rows(str(world / "pairs.jsonl"), "pair", 20)[0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": r["prompt"][0]["content"], "choices": [r["rejected"], r["chosen"]]}) + "\n" for r in rows))
    (tmp_path / "sort.yaml").write_text(f"task: toy_sort\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\nfewshot_split: test\n"
                                        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 1\ndoc_to_choice: '{{choices}}'\nnum_fewshot: 2\nmetric_list:\n  - metric: acc\n")
    flags = [world / "sft", "--benchmarks", "toy_sort", "--tasks_dir", tmp_path, "--out", tmp_path / "out"]
    done = script("evaluate.py", *flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = evaluated(tmp_path)["results"]
    command = benchmark_command(Config(model=str(world / "sft"), benchmarks="toy_sort", tasks_dir=str(tmp_path)), "toy_sort", tmp_path / "by-hand")
    subprocess.run(command, check=True, env=environment(HF_HOME=str(tmp_path)), cwd=tmp_path, capture_output=True)
    theirs = evaluate.read_benchmark(tmp_path / "by-hand")["results"]["toy_sort"]
    assert (row["metric"], row["value"], row["stderr"], row["shots"]) == ("acc", theirs["acc,none"], theirs["acc_stderr,none"], 2)
    assert " ".join(command[1:5]) in done.stdout and "lm_eval 0." in done.stdout
    again = script("evaluate.py", *flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert again.returncode == 0 and "Running loglikelihood" not in again.stderr


def test_alpaca_eval_reads_what_is_exported(world, tmp_path, monkeypatch, capsys):
    """A list of instruction, output, generator and, where the question has one, dataset, in the questions' order; AlpacaEval's own loader takes it."""
    questions = [{"instruction": "cab", "output": "x", "generator": "other", "dataset": "koala"}, {"instruction": "fed"}, {"instruction": "cab", "dataset": "vicuna"}]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    run(monkeypatch, evaluate, world / "sft", "--export", "alpaca_eval", "--questions", tmp_path / "q.json", "--max_response", 12, "--name", "tiny", "--out", tmp_path / "out")
    file = tmp_path / "out" / "alpaca_eval" / "tiny.json"
    rows = json.loads(file.read_text())
    assert [{k: v for k, v in row.items() if k != "output"} for row in rows] == [
        {"instruction": "cab", "generator": "tiny", "dataset": "koala"}, {"instruction": "fed", "generator": "tiny"}, {"instruction": "cab", "generator": "tiny", "dataset": "vicuna"}]
    lm, (tok, _) = common.load_lm(str(world / "sft"), torch.float32, "cpu"), common.load_tokenizer(str(world / "sft"))
    for row in rows:  # the model's own greedy answer under its own template
        assert row["output"] == common.sample(lm, tok, [common.prompt_ids(tok, [{"role": "user", "content": row["instruction"]}])], 0.0, 12, 0)[0][0]
    capsys.readouterr()
    loader = pytest.importorskip("alpaca_eval.utils", exc_type=ImportError)
    assert loader.load_or_convert_to_dataframe(file)["output"].tolist() == [row["output"] for row in rows]


def test_fastchat_reads_what_is_exported(world, tmp_path, monkeypatch, capsys):
    """Both turns, the second asked with the first's answer in the conversation; temperatures by category; FastChat's own loader takes it."""
    questions = [{"question_id": 81, "category": "writing", "turns": ["cab", "fed"]}, {"question_id": 82, "category": "math", "turns": ["hg", "ab"], "reference": ["gh", "ab"]},
                 {"question_id": 83, "category": "humanities", "turns": ["ponm", "ghij"]}, {"question_id": 84, "category": "coding", "turns": ["ponm", "cd"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    asked, generate = [], common.generate
    monkeypatch.setattr(evaluate, "generate", lambda file, rows, *a, **how: asked.append((how["temperature"], copy.deepcopy(rows))) or generate(file, rows, *a, **how))
    run(monkeypatch, evaluate, world / "sft", "--export", "mt_bench", "--questions", tmp_path / "q.jsonl", "--max_response", 12, "--name", "tiny", "--out", tmp_path / "out")
    rows = lines(tmp_path / "out" / "mt_bench" / "tiny.jsonl")
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 4 and [row["question_id"] for row in rows] == [81, 82, 83, 84]
    assert all(row["model_id"] == "tiny" and row["choices"][0]["index"] == 0 and len(row["choices"]) == 1 and len(row["choices"][0]["turns"]) == 2 for row in rows)
    assert len({row["answer_id"] for row in rows}) == 4 and all(isinstance(row["tstamp"], float) for row in rows)
    assert [(t, [row["id"] for row in some]) for t, some in asked] == [(0.0, ["1", "3"]), (0.1, ["2"]), (0.7, ["0"])] * 2
    assert evaluate.TEMPERATURES == {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(["extraction", "math", "coding", "reasoning"], 0.0)
    second = asked[3][1][0]["prompt"]
    assert second == [{"role": "user", "content": "hg"}, {"role": "assistant", "content": rows[1]["choices"][0]["turns"][0]}, {"role": "user", "content": "ab"}]
    capsys.readouterr()
    theirs = pytest.importorskip("fastchat.llm_judge.common", exc_type=ImportError)
    assert theirs.load_model_answers(str(tmp_path / "out" / "mt_bench"))["tiny"][82] == rows[1]
    assert evaluate.TEMPERATURES.items() <= theirs.temperature_config.items()


# ---------------------------------------------------------------- figures: the numbers that are plotted


def made_up(folder, config, results, metrics, **files):
    """A run's folder as the scripts leave it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def dnpo_run(tmp_path, name, seed, scores, **config):
    """Three iterations (start, SPIN, DNPO) with one held-out answer per score and iteration, and made-up losses."""
    config = {"noise_init": 0.1, "labels": "judge", "noise": True, "seed": seed, "out": name, "lr": 1e-4} | config
    noise = lambda k: {"noise/loss": -0.1 * k} if config["noise"] and k > 1 else {}
    metrics = [{"iteration": k, "step": s, "loss": k + s / 10} | noise(k) for k in (1, 2) for s in (1, 2)]
    results = {"iterations": [{"iteration": k, "score": sum(row) / len(row), "win": 0.25 * k, "tie": 0.25, "loss": 0.75 - 0.25 * k} for k, row in enumerate(scores)]}
    tests = {f"iter{k}/test.jsonl": [{"id": str(i), "meta": {"score": s}} for i, s in enumerate(row)] for k, row in enumerate(scores)}
    logps = {f"iter{k}/logps.jsonl": [{"id": str(i), "positive": -1.0 - i, "negative": -11.0 - i, "new": -11.0 - i - 3 * k} for i in range(10)] for k in (1, 2)}
    return made_up(tmp_path / name, config, results, metrics, **tests, **logps)


def sams_run(tmp_path, name, select, flips, **config):
    """Four updates of 8 pairs, 4 of them selected; flips: (flipped in the batch, flipped and selected) of each; accuracy measured at 2 and 4."""
    config = {"selector_lr": 1e-4, "select": select, "preselect": 1.0, "ratio": 0.5, "seed": 0, "out": name, "flip": 0.2, "epochs": 1, "gamma": 0.5} | config
    metrics = [{"step": s, "batch/pairs": 8, "batch/flipped": a, "selected/flipped": b, "selected/pairs": 4, "score_seconds": 0.5, "selector/seconds": 0.25, "memory_gib": s / 2,
                "pairs_per_second": 4.0} | ({"eval/accuracy": 0.5 + s / 10} if s % 2 == 0 else {}) for s, (a, b) in enumerate(flips, 1)]
    return made_up(tmp_path / name, config, {}, metrics)


def test_runs_that_differ_in_their_seed_are_one_kind(tmp_path):
    """Grouped by config without seed and place, in the seeds' order; kinds of one name say what differs; a name of the user's own is kept; tasks have panels of their own."""
    folders = [dnpo_run(tmp_path, name, seed, [[1.0]] * 3, **more) for name, seed, more in (
        ("a1", 1, {}), ("a0", 0, {}), ("hot", 0, {"lr": 1e-3}), ("spin", 0, {"labels": "annotation", "noise": False}), ("dsl", 0, {"noise": False}), ("npo", 0, {"labels": "annotation"}))]
    groups = group_runs([read_run(str(f)) for f in folders] + [read_run(f"{folders[2]}=hotter")])
    assert [(name, [run["folder"].name for run in runs]) for name, _, runs in groups] == [
        ("DNPO", ["a0", "a1"]), ("DNPO, lr 0.001", ["hot"]), ("SPIN", ["spin"]), ("SPIN + DSL", ["dsl"]), ("SPIN + NPO", ["npo"]), ("hotter", ["hot"])]
    some = [sams_run(tmp_path, name, select, [(2, 1)] * 4, **more) for name, select, more in (
        ("s", "topk", {}), ("d", "all", {}), ("s4", "topk", {"flip": 0.4}), ("g", "topk", {"gamma": 0.2}), ("p", "all", {"preselect": 0.5}))]
    tasks = by_task(group_runs([read_run(str(f)) for f in some]))
    assert {task: [name for name, _, _ in groups] for task, groups in tasks.items()} == {"flip 0.2": ["SamS", "DPO", "SamS, gamma 0.2", "Selective + DPO"], "flip 0.4": ["SamS"]}


def test_dnpo_figures_plot_the_runs_numbers(tmp_path):
    """Scores and shares per iteration, log-probs and their distances, duels prompt by prompt, losses over all steps, from files with known content."""
    own = read_run(str(dnpo_run(tmp_path, "own", 0, [[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 1.0], [5.0, 5.0, 5.0, 0.0]])))
    spin = read_run(str(dnpo_run(tmp_path, "spin", 0, [[1.0, 1.0, 1.0, 1.0]] * 3, labels="annotation", noise=False)))
    assert iteration_values(own, "score") == [1.0, 1.0, 3.75] and iteration_values(own, "win") == [0.0, 0.25, 0.5] and iteration_values(own, "nothing") is None
    assert duel(own, spin) == [(0.0, 1.0, 0.0), (0.25, 0.5, 0.25), (0.75, 0.0, 0.25)]
    samples = logp_samples(own, 2)
    assert samples["positive"] == [-1.0 - i for i in range(10)] and samples["generated, next iteration"] == [-17.0 - i for i in range(10)]
    assert [ks_distance(logp_samples(own, k)["generated, next iteration"], logp_samples(own, k)["negative"]) for k in (1, 2)] == near([0.3, 0.6])
    assert curves(own, "loss", "noise/loss") == ([[2.1, 2.2], [-0.2, -0.2]], [0]) and curves(spin, "loss", "noise/loss")[0] == [[], []]
    assert curves(spin, "loss") == ([[1.1, 1.2, 2.1, 2.2]], [0, 2])


def test_tso_figures_plot_the_runs_numbers(tmp_path):
    """Rewards over the steps of all slices; skewness and kurtosis of the first and the last measurement, without prompts that have none."""
    spread = lambda k: [{"id": "a", "skewness": k, "kurtosis": -k}, {"id": "b", "skewness": None, "kurtosis": None}]
    metrics = [{"iteration": n, "slice": f"1.{n}", "step": s, "rewards/chosen": n + s, "rewards/rejected": -s} for n in (1, 2) for s in (1, 2, 3)]
    config = {"clip_chosen": 0.2, "clip_rejected": 0.2, "seed": 0}
    run = read_run(str(made_up(tmp_path / "t", config, {"slices": [{"round": 0, "slice": 0}, {"round": 1, "slice": 1}, {"round": 1, "slice": 2}]}, metrics,
                               **{"start/spread.jsonl": spread(1.0), "round1-slice2/spread.jsonl": spread(2.0)})))
    assert curves(run, "rewards/chosen", "rewards/rejected") == ([[2, 3, 4, 3, 4, 5], [-1, -2, -3, -1, -2, -3]], [0, 3])
    assert spreads(run) == {"before": [(1.0, -1.0)], "after": [(2.0, -2.0)]}
    plain = read_run(str(made_up(tmp_path / "d", config | {"clip_chosen": math.inf, "clip_rejected": math.inf}, {"slices": [{"round": 0, "slice": 0}]}, metrics)))
    assert [name for name, _, _ in group_runs([run, plain])] == ["dual clip", "DPO"] and spreads(plain) == {}


def test_the_sweep_figure_plots_every_axis_of_all_files(tmp_path, capsys):
    """Seconds in the upper panels and memory in the lower, a column an axis, a line a row; a file without a sweep is one line."""
    pytest.importorskip("matplotlib")
    cost = lambda n: {"seconds": float(n), "peak_mib": 100.0 * n}
    (tmp_path / "a.json").write_text(json.dumps({"sweep": {"length": {"128": {"dpo": cost(1), "sams": cost(3)}, "256": {"dpo": cost(2), "sams": cost(5)}}}}))
    (tmp_path / "b.json").write_text(json.dumps({"sweep": {"ranks": {"1": {"dpo": cost(7)}, "2": {"dpo": cost(4)}}}}))
    (tmp_path / "c.json").write_text(json.dumps({"rows": {}}))
    (name, figure, numbers), = sweep_figure([tmp_path / "a.json", tmp_path / "b.json"])
    lines = [[(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()] for ax in figure.axes]
    assert lines[:2] == [[("dpo", [128, 256], [1, 2]), ("sams", [128, 256], [3, 5])], [("dpo", [1, 2], [7, 4])]]
    assert lines[2:] == [[("dpo", [128, 256], [100, 200]), ("sams", [128, 256], [300, 500])], [("dpo", [1, 2], [700, 400])]]
    assert len(numbers) == 6 and numbers[2] == {"axis": "length", "value": 128, "row": "sams", "seconds": 3.0, "peak_mib": 300.0}
    with pytest.raises(SystemExit):
        list(sweep_figure([tmp_path / "c.json"]))
    assert "c.json: no sweep of bench.py" in capsys.readouterr().err


def test_sams_figures_plot_the_runs_numbers(tmp_path):
    """Accuracy at the measured updates; the share of flipped pairs selected over a window, by a naive loop; costs per update that add up."""
    run = read_run(str(sams_run(tmp_path, "s", "topk", [(0, 0), (2, 1), (3, 0), (1, 1)])))
    assert curves(run, "eval/accuracy", "step")[0] == [[0.7, 0.9], [2, 4]]
    assert math.isnan(flipped_selected(run)[0]) and flipped_selected(run)[1:] == near([1 / 2, 1 / 5, 2 / 6]) and flipped_selected(run, 2)[1:] == near([1 / 2, 1 / 5, 1 / 4])
    cost = costs(run)
    assert cost == near({"score": 0.5, "select": 0.25, "train": 8 / 4.0 - 0.75, "memory": 2.0})


def test_figures_are_drawn_of_finished_runs_alone(world, tmp_path, monkeypatch, capsys):
    """Two seeds of DNPO, SPIN, a made-up TSO run and two selectors: every figure as SVG and PNG with its numbers, byte for byte the same again, no model read."""
    pytest.importorskip("matplotlib")
    for name, flags in (("a0", {}), ("a1", {"seed": 1}), ("s0", {"labels": "annotation", "noise": False})):
        run(monkeypatch, dnpo, *dnpo_flags(world, **flags), "--out", tmp_path / name)
    for name in ("topk", "all"):
        run(monkeypatch, sams, *sams_flags(world, select=name), "--out", tmp_path / name, "--reference", tmp_path / "reference")
    spread = [{"id": "a", "skewness": 1.0, "kurtosis": -1.0}]
    made_up(tmp_path / "t", {"clip_chosen": 0.2, "clip_rejected": 0.2, "seed": 0}, {"slices": [{"round": 0, "slice": 0}, {"round": 1, "slice": 1}]},
            [{"slice": "1.1", "step": s, "rewards/chosen": 0.1 * s, "rewards/rejected": -0.1 * s} for s in (1, 2)], **{"start/spread.jsonl": spread, "round1-slice1/spread.jsonl": spread})
    for loader in ("load_lm", "load_tokenizer", "make_judge"):
        monkeypatch.setattr(evaluate, loader, lambda *a: pytest.fail("a model was read"))
    for out in ("one", "two"):
        run(monkeypatch, evaluate, "--figures", *(tmp_path / name for name in ("a0", "a1", "s0", "topk", "all", "t")), "--out", tmp_path / out)
    names = {"dnpo-fig1-win-rate", "dnpo-fig5-score", "dnpo-fig8-ablation", "dnpo-fig10-log-probs-dnpo", "dnpo-fig2-log-probs-spin", "dnpo-fig7-against-spin", "dnpo-fig9-losses",
             "tso-fig3-fig4-rewards", "tso-fig5-scores", "sams-accuracy", "sams-flipped", "sams-cost"}
    files = {f.name: f.read_bytes() for f in (tmp_path / "one").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("svg", "png")} | {"figures.json"}
    assert {f.name: f.read_bytes() for f in (tmp_path / "two").iterdir()} == files
    numbers = json.loads(files["figures.json"])
    two = [json.loads((tmp_path / name / "results.json").read_text())["iterations"][-1]["score"] for name in ("a0", "a1")]
    assert numbers["dnpo-fig8-ablation"][-1] == {"runs": "DNPO", "score": near(sum(two) / 2), "std": near(abs(two[0] - two[1]) / math.sqrt(2))}
    rows = [row for name in ("a0", "a1") for row in lines(tmp_path / name / "iter1" / "logps.jsonl")]
    assert numbers["dnpo-fig10-log-probs-dnpo"][0]["KS generated / negative"] == ks_distance([r["new"] for r in rows], [r["negative"] for r in rows])
    assert "KS generated / negative" in capsys.readouterr().out
    (tmp_path / "s0" / "iter2" / "logps.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, evaluate, "--figures", tmp_path / "s0", "--out", tmp_path / "one")
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}/s0/iter2/logps.jsonl: no such file; a figure needs what the run has left there\n"


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line(world, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line on stderr that names the cause, before any weight is read."""
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "math"}\n')
    (tmp_path / "empty.json").write_text('[{"instruction": " "}]')
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "a" * 2000}]))
    (tmp_path / "half").mkdir()
    made_up(tmp_path / "odd", {"seed": 0}, {}, [])
    sft, pairs, test = world / "sft", world / "pairs.jsonl", world / "test.jsonl"
    for cause, *flags in (
            ("one of --pairs, --against or --score", sft), ("not --pairs and --export", sft, "--pairs", pairs, "--export", "mt_bench"), ("which model?", "--pairs", pairs),
            ("no-such", sft, "--no-such", 1), ("--beta must be above 0", sft, "--pairs", pairs, "--beta", 0), ("--temperature", sft, "--pairs", pairs, "--temperature", -1),
            ("no such file", sft, "--pairs", tmp_path / "none.jsonl"), ("broken.jsonl:1: broken JSON", sft, "--pairs", tmp_path / "broken.jsonl"),
            ("not a model", tmp_path, "--pairs", pairs), ("not a model", sft, "--pairs", pairs, "--reference", tmp_path), ("no pair left", sft, "--pairs", pairs, "--max_response", 10**6),
            ("columns", sft, "--pairs", test), ("needs --data and --judge", sft, "--against", "annotations"), ("needs --data and --judge", sft, "--score", "--data", test),
            ("--judge what", sft, "--score", "--data", test, "--judge", "what"), ("leaves room", sft, "--score", "--data", test, "--judge", "toy", "--max_response", 10**6),
            ("--export needs --questions", sft, "--export", "mt_bench"), ("expected question_id, category, turns", sft, "--export", "mt_bench", "--questions", tmp_path / "q.jsonl"),
            ("item 1: empty", sft, "--export", "alpaca_eval", "--questions", tmp_path / "empty.json"),
            ("question 1 needs up to", sft, "--export", "alpaca_eval", "--questions", tmp_path / "long.json"), ("no finished run", "--figures", tmp_path / "half"),
            ("not a run of", "--figures", tmp_path / "odd"), ("is a file", sft, "--pairs", pairs, "--out", pairs)):
        monkeypatch.setattr(evaluate, "load_lm", lambda *a: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, evaluate, *flags, *([] if "--out" in flags else ["--out", tmp_path / "out"]))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and cause in err, (cause, err)


@pytest.mark.parametrize("package,flags,advice", [("lm_eval", ["--benchmarks", "gsm8k"], "pip install 'lm_eval[hf]'"), ("matplotlib", ["--figures", "RUN"], "pip install matplotlib")])
def test_an_absent_package_is_one_line(package, flags, advice, world, tmp_path, monkeypatch, capsys):
    """What is missing and how to install it; exit code 2."""
    monkeypatch.setitem(sys.modules, package, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    folder = dnpo_run(tmp_path, "run", 0, [[1.0]] * 3)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, evaluate, *([world / "sft"] if package == "lm_eval" else []), *(folder if x == "RUN" else x for x in flags), "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and advice in err
