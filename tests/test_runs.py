"""Whole runs of dnpo.py and generate.py: any number of ranks, any interruption, and the numbers of the report, recomputed."""
import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_close, dnpo_flags, forked, lines, metrics, results, run, script, weights
from torch.distributed.fsdp import CPUOffloadPolicy

import common
import dnpo
import generate
import tso


@pytest.fixture(scope="module")
def flags(world):
    """Two iterations of three steps, the last one smaller, strong noise; returns flags for a folder."""
    return lambda out, **more: dnpo_flags(world, out=out, **({"limit": 37, "noise_init": 0.5, "noise_lr": 1e-2, "lr": 2e-4} | more))


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """One uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("plain")
    done = script("dnpo.py", *flags("run"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


# ---------------------------------------------------------------- ranks


ALTERNATING = dict(noise_update="alternating", warmup_iterations=0)
TWO_RANKS = """import json, shutil, sys
sys.path.insert(0, sys.argv[1])
import common, dnpo

class Died(BaseException):
    pass

def save_and_die(path, *args, **more):
    common.save_state(path, *args, **more)
    if "iter2" in str(path):
        raise Died

dnpo.dist.init_process_group("gloo")  # one group for all runs
dnpo.dist.init_process_group = dnpo.dist.destroy_process_group = lambda *args, **more: None
for dies, flags in json.loads(sys.argv[2]):
    dnpo.save_state, sys.argv[1:] = save_and_die if dies else common.save_state, [str(flag) for flag in flags]
    try:
        dnpo.main()
    except Died:
        if common.ranks()[0] == 0:
            shutil.copytree("resumed", "one/resumed")
"""


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The same on two ranks, several times under one torchrun, whose start takes longer than a run: `replicated`, `sharded`, and `resumed`, a sharded
    run that died after the first step with noise and went on with the reference offloaded; `one/resumed` is what it left behind."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO_RANKS)
    runs = [(False, flags("replicated", parallel="ddp", micro_batch=4)), (False, flags("sharded", parallel="fsdp", micro_batch=4)),
            (True, flags("resumed", parallel="fsdp", micro_batch=4)), (False, [*flags("resumed", parallel="fsdp", micro_batch=4), "--resume", "--offload_reference"]),
            *((False, flags(f"alternating-{way}", parallel=way, micro_batch=4, activation_checkpointing=True, **ALTERNATING)) for way in ("ddp", "fsdp"))]
    done = script(str(folder / "two.py"), ROOT, json.dumps(runs, default=str), cwd=folder, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_two_ranks_do_what_one_does(plain, two, name):
    """Samples and labels are the same bytes; losses, noise, gradient norms and weights agree after every step of both iterations.
    The last step has 5 pairs: on two ranks one place is filled with a pair of weight 0."""
    out = two / name
    assert [r["pairs"] for r in results(plain)["iterations"][1:]] == [37, 37] and len(metrics(out)) == len(metrics(plain)) == 6
    for k, (first, last), close, near in ((1, (0, 3), dict(rel=1e-4, abs=1e-5), 2e-5), (2, (3, 6), dict(rel=1e-3, abs=1e-4), 1e-4)):
        for file in ("responses.jsonl", "pairs.jsonl"):
            assert (out / f"iter{k}" / file).read_bytes() == (plain / f"iter{k}" / file).read_bytes()
        for a, b in zip(metrics(plain)[first:last], metrics(out)[first:last]):
            assert b == pytest.approx(a, **close) and (k == 1 or b["noise/std"] > 0.4)
        assert_close(weights(plain / f"iter{k}/checkpoint"), weights(out / f"iter{k}/checkpoint"), atol=near)


def test_alternating_updates_are_the_same_on_two_ranks_too(two, flags):
    """A noise step, then a model step, each with a forward pass of the other that has no backward pass: one process, DDP and FSDP agree."""
    assert forked(dnpo, *flags(two / "alternating", **ALTERNATING)) == 0
    for way in ("ddp", "fsdp"):
        for a, b in zip(metrics(two / "alternating"), metrics(two / f"alternating-{way}"), strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-4)
        assert_close(weights(two / "alternating/iter1/checkpoint"), weights(two / f"alternating-{way}/iter1/checkpoint"), atol=1e-4)


class Left(Exception):
    pass


@pytest.mark.parametrize("module, where, noise", [(dnpo, (1,), (True,)), (tso, (1, "1.1"), ())])
def test_an_offloaded_reference_leaves_the_device(monkeypatch, world, tmp_path, module, where, noise):
    """The reference's layers, and no other part of it or of the policy, get FSDP's offloading and go to the CPU, once the state is loaded: torch loads only what is on one device."""
    given, happened, fully_shard = {}, [], module.fully_shard

    def leave(layers):
        happened.append(list(layers))
        raise Left
    monkeypatch.setattr(module, "fully_shard", lambda part, **how: given.update({part: how.get("offload_policy")}) or fully_shard(part, **how))
    monkeypatch.setattr(module, "load_state", lambda path, parts: happened.append("loaded") or {"step": 0})
    monkeypatch.setattr(torch.nn.ModuleList, "cpu", leave)
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "state.pt").touch()
    c = module.Config(parallel="fsdp", offload_reference=True, batch=4, dtype="float32")
    pairs = [([1, 2], [3, 4], [5], str(i)) for i in range(4)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(Left):
            module.train(c, *where, pairs, str(world / "sft"), tmp_path, None, torch.device("cpu"), *noise)
    finally:
        dist.destroy_process_group()
    offloaded = [part for part, policy in given.items() if isinstance(policy, CPUOffloadPolicy)]
    assert happened == ["loaded", offloaded] and len(offloaded) * 2 + 2 == len(given) and not any(p.requires_grad for part in offloaded for p in part.parameters())


def test_none_under_torchrun_is_refused(monkeypatch, flags, tmp_path, capsys):
    """Two ranks that would train apart are an error, not two runs."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, dnpo, *flags(tmp_path / "run", parallel="none"))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: --parallel none") and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_six_steps_are_three_and_resume_and_three(monkeypatch, flags, tmp_path, update):
    """Model, optimizer, noise head and its optimizer, learning rate, order and noise go on bit for bit; no line of metrics stands twice."""
    more = dict(noise_update=update, warmup_iterations=0, epochs=2, save_every=3)
    run(monkeypatch, dnpo, *flags(tmp_path / "whole", **more))

    class Killed(BaseException):
        pass

    def save_and_die(*args, **kwargs):
        common.save_state(*args, **kwargs)
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dnpo, "save_state", save_and_die)
        run(patch, dnpo, *flags(tmp_path / "halves", **more))
    extra = dict(metrics(tmp_path / "halves")[-1], step=4)  # measured, but after the saved state: must be measured again
    with open(tmp_path / "halves/metrics.jsonl", "a") as file:
        file.write(json.dumps(extra) + '\n{"iteration": 1, "st')
    run(monkeypatch, dnpo, *flags(tmp_path / "halves", **more), "--resume")
    assert [m["step"] for m in metrics(tmp_path / "halves")] == [1, 2, 3, 4, 5, 6]
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert_close(weights(tmp_path / "halves/iter1/checkpoint"), weights(tmp_path / "whole/iter1/checkpoint"), atol=0)
    assert len({m["noise/std"] for m in metrics(tmp_path / "whole")}) == 6  # the noise did move


def test_sharded_training_goes_on_bit_for_bit_and_on_any_number_of_ranks(monkeypatch, plain, two, flags):
    """A sharded run that dies with the noise in training: two ranks go on as if nothing had been, one process with what two had saved."""
    assert metrics(two / "resumed") == metrics(two / "sharded") and results(two / "resumed") == results(two / "sharded")
    assert_close(weights(two / "resumed/iter2/checkpoint"), weights(two / "sharded/iter2/checkpoint"), atol=0)
    monkeypatch.chdir(two / "one")
    assert [(m["iteration"], m["step"]) for m in metrics(two / "one/resumed")] == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert forked(dnpo, *flags("resumed", parallel="fsdp", micro_batch=4), "--resume") == 0
    assert [m["step"] for m in metrics(two / "one/resumed")] == [1, 2, 3, 1, 2, 3]
    assert_close(weights(two / "one/resumed/iter2/checkpoint"), weights(plain / "iter2/checkpoint"), atol=1e-4)


KILLS = [("in", "iter 0: answer"), ("before", "iter0/answers.jsonl"), ("in", "iter 0: judge"), ("in", "iter 1: sample"), ("after", "iter1/responses.jsonl"),
         ("in", "iter 1: label"), ("in", "iter 1"), ("before", "iter1/state.pt"), ("after", "iter1/state.pt"), ("in", "iter 1"), ("before", "iter1/checkpoint"),
         ("after", "iter1/checkpoint"), ("in", "iter 1: sample again"), ("in", "iter 1: log-probs"), ("in", "iter 2: sample"), ("after", "iter2/pairs.jsonl"),
         ("after", "iter2/state.pt"), ("in", "iter 2"), ("before", "iter2/checkpoint"), ("in", "iter 2: answer"), ("before", "results.json"),
         ("before", "samples.md")]


def test_a_run_killed_in_every_phase_ends_with_the_same_results(flags, tmp_path):
    """SIGKILL while sampling, labelling, training, saving, renaming and measuring; --resume each time; all files are those of a run left alone."""
    more = dict(limit=45, sample_batch=5, batch=5, micro_batch=5, save_every=4)
    assert forked(dnpo, *flags(tmp_path / "whole", **more)) == 0
    for i, kill in enumerate(KILLS):
        resume = ["--resume"] * (i > 0)
        assert forked(dnpo, *flags(tmp_path / "killed", **more), *resume, kill=kill) == -signal.SIGKILL, f"never came to {kill}"
    assert forked(dnpo, *flags(tmp_path / "killed", **more), "--resume") == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole") and metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    files = lambda folder: {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.parent.name != "judge"}
    killed, whole = files(tmp_path / "killed"), files(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    for name in whole.keys() - {"results.json", "metrics.jsonl", "run.json", "config.json"}:  # these hold clocks or the folder's name
        assert killed[name].read_bytes() == whole[name].read_bytes(), name


def test_a_finished_run_resumed_stays_as_it_is(monkeypatch, plain, flags):
    """Nothing is sampled, trained or measured again; more iterations may be asked for."""
    before, files = results(plain), {p: p.read_bytes() for p in plain.rglob("*.jsonl")}
    monkeypatch.chdir(plain.parent)
    for module in (dnpo, common):
        monkeypatch.setattr(module, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    run(monkeypatch, dnpo, *flags("run"), "--resume")
    assert results(plain) == before and {p: p.read_bytes() for p in plain.rglob("*.jsonl")} == files


# ---------------------------------------------------------------- generate.py


def test_a_killed_generate_goes_on_and_loses_and_repeats_no_row(world, tmp_path):
    """Killed after some batches and started again, by one process or two, the file has the same bytes as one left alone."""
    flags = ["--model", world / "sft", "--data", world / "train.jsonl", "--samples", 2, "--max_new_tokens", 12, "--batch", 8]
    assert forked(generate, *flags, "--out", tmp_path / "whole.jsonl") == 0
    for name, ranks in (("one.jsonl", 1), ("two.jsonl", 2)):
        out = tmp_path / name
        assert forked(generate, *flags, "--out", out, kill=("in", out.stem)) == -signal.SIGKILL and not out.exists()
        with open(f"{out}.part0", "a") as file:
            file.write('{"stamp": "torn')
        if ranks == 1:
            assert forked(generate, *flags, "--out", out, kill=("before", name)) == -signal.SIGKILL
            assert len(Path(f"{out}.part0").read_text().splitlines()) == 1 + 30 + 1  # an empty line, 30 batches, the torn one: none is drawn twice
        assert (forked(generate, *flags, "--out", out) if ranks == 1 else script("generate.py", *flags, "--out", out, cwd=tmp_path, ranks=2).returncode) == 0
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not list(tmp_path.glob(f"{name}.*"))
    rows = lines(tmp_path / "whole.jsonl")
    assert [(r["id"], r["meta"]["sample"]) for r in rows] == [(r["id"], j) for r in lines(world / "train.jsonl") for j in (0, 1)]


def test_an_answer_is_cut_at_max_new_tokens_and_says_so(monkeypatch, world, tmp_path):
    """finish is "length" exactly for the answers that did not end by themselves; one token is one letter here."""
    run(monkeypatch, generate, "--model", world / "sft", "--data", world / "train.jsonl", "--out", tmp_path / "short.jsonl", "--max_new_tokens", 3)
    rows = lines(tmp_path / "short.jsonl")
    assert all(len(r["response"]) <= (3 if r["meta"]["finish"] == "length" else 2) for r in rows)  # <unk> and the like are not shown
    assert sum(r["meta"]["finish"] == "length" and len(r["response"]) == 3 for r in rows) > 60


def test_going_on_with_other_settings_is_refused(monkeypatch, world, tmp_path, capsys):
    """Batches of another temperature or model do not mix into one file."""
    (tmp_path / "a.jsonl.part0").write_text('{"stamp": "0123456789abcdef", "batch": 0, "rows": []}\n')
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, generate, "--model", world / "sft", "--data", world / "train.jsonl", "--out", tmp_path / "a.jsonl")
    assert stop.value.code == 2 and "was begun with other settings" in capsys.readouterr().err


# ---------------------------------------------------------------- what a run reports


def toy_score(prompt: str, answer: str) -> float:
    right = sorted(prompt)
    return 10 * len([1 for i in range(min(len(right), len(answer))) if right[i] == answer[i]]) / max(len(right), len(answer))


def test_the_reported_numbers_are_those_of_the_files(plain, world):
    """score, full marks, win, tie, loss and swapped are recomputed from answers, annotations and the judge's rule."""
    annotated = {r["prompt"]: r["response"] for name in ("train", "test") for r in lines(world / f"{name}.jsonl")}
    report = json.loads((plain / "results.json").read_text())
    assert [(r["iteration"], r["update"]) for r in report["iterations"]] == [(0, "start"), (1, "spin"), (2, "dnpo")]
    assert report["seed"] == 0 and report["seconds"] >= 0  # 0.0 when a finished run was only read again
    for r in report["iterations"]:
        rows = lines(plain / f"iter{r['iteration']}/test.jsonl")
        held_out = {row["prompt"] for row in lines(world / "test.jsonl")[:16]}
        assert {row["prompt"][0]["content"] for row in rows} == held_out
        pairs = [(toy_score(x, row["response"]), toy_score(x, annotated[x])) for row in rows for x in [row["prompt"][0]["content"]]]
        assert r["score"] == pytest.approx(sum(s for s, _ in pairs) / 16) and r["full_marks"] == sum(s == 10 for s, _ in pairs) / 16
        assert (r["win"], r["tie"], r["loss"]) == (sum(s > t for s, t in pairs) / 16, sum(s == t for s, t in pairs) / 16, sum(s < t for s, t in pairs) / 16)
        assert r["cut"] == sum(row["meta"]["finish"] == "length" for row in rows) / 16
    for k, dsl in ((1, False), (2, True)):
        logps = lines(plain / f"iter{k}/logps.jsonl")
        assert {f"logp_{side}": sum(row[side] for row in logps) / 16 for side in ("positive", "negative", "new")}.items() <= report["iterations"][k].items()
        assert report["iterations"][k]["steps"] == 3 and [row["id"] for row in logps] == [f"train-{i}" for i in range(16)]
        drawn, made = lines(plain / f"iter{k}/responses.jsonl"), lines(plain / f"iter{k}/pairs.jsonl")
        swapped = 0
        for y, row in zip(drawn, made, strict=True):
            x = y["prompt"][0]["content"]
            better = dsl and toy_score(x, y["response"]) > toy_score(x, annotated[x])
            swapped += better
            assert (row["chosen"], row["rejected"]) == ((y["response"], annotated[x]) if better else (annotated[x], y["response"]))
            assert (row["meta"]["rejected_ended"], row["meta"]["chosen_ended"]) == ((True, True) if better else (y["meta"]["finish"] == "stop", True)) or better
        assert report["iterations"][k]["swapped"] == swapped / 37
    assert report["iterations"][2]["noise_std"] == metrics(plain)[-1]["noise/std"] and report["iterations"][1]["noise_std"] is None
    assert report["iterations"][2]["grad_norm"] == pytest.approx(sum(m["grad_norm"] for m in metrics(plain)[3:]) / 3)


def test_an_iteration_without_noise_starts_at_ln_2_and_margin_0(plain):
    """Policy and reference are the same model in the same shapes; with noise the margin of the first step is not 0."""
    spin, noisy = metrics(plain)[0], metrics(plain)[3]
    assert spin["loss"] == pytest.approx(math.log(2), abs=1e-6) and spin["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert noisy["rewards/chosen"] == pytest.approx(0, abs=1e-6) and abs(noisy["rewards/margins"]) > 1e-2


def test_reported_log_probs_are_the_trained_models(plain, world):
    """logps.jsonl of iteration 2 against the saved checkpoint, one row at a time, with transformers' own logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    lm, tok = (kind.from_pretrained(plain / "iter2/checkpoint") for kind in (AutoModelForCausalLM, AutoTokenizer))
    pairs, new, found = (lines(plain / f"iter2/{name}.jsonl") for name in ("pairs", "new", "logps"))
    for pair, sample, row in list(zip(pairs, new, found))[:4]:
        for side, text, ended in (("positive", pair["chosen"], pair["meta"]["chosen_ended"]), ("negative", pair["rejected"], pair["meta"]["rejected_ended"]),
                                  ("new", sample["response"], sample["meta"]["finish"] == "stop")):
            x = tok.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
            y = tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id] * ended
            logps = lm(torch.tensor([x + y])).logits[0].double().log_softmax(-1)
            assert row[side] == pytest.approx(sum(logps[len(x) - 1 + j, t].item() for j, t in enumerate(y)), abs=1e-3)


def test_the_checkpoint_is_an_ordinary_model(plain):
    """float32, tied weights once, with template and generation config; plain from_pretrained answers as the run's own sampler does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = plain / "iter2/checkpoint"
    lm, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert "lm_head.weight" not in weights(folder) and lm.lm_head.weight is lm.model.embed_tokens.weight and lm.dtype == torch.float32
    prompt = [{"role": "user", "content": "dacb"}]
    ids = tok.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, ids.shape[1]:]
    assert common.sample(lm, tok, [ids[0].tolist()], 0.0, 8, 0)[0][0] == tok.decode(out, skip_special_tokens=True)


def test_samples_show_three_prompts_after_every_iteration(plain):
    """samples.md holds the annotated and each iteration's answer to the first three held-out prompts."""
    text = (plain / "samples.md").read_text()
    for k in range(3):
        for i in range(3):
            row = lines(plain / f"iter{i}/test.jsonl")[k]
            assert f"## {row['prompt'][0]['content']}\n\nannotated: {row['annotated']}\n" in text and f"\niteration {i}: {row['response']}\n" in text


CELLS = {"spin": dict(labels="annotation", noise=False), "dsl": dict(noise=False), "npo": dict(labels="annotation"),
         "alternating": dict(noise_update="alternating")}


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_of_figure_8_runs(monkeypatch, flags, tmp_path, cell):
    """SPIN, DSL alone, NPO alone and the alternating update; labels and noise are what the flags say, --max_steps is per iteration."""
    run(monkeypatch, dnpo, *flags(tmp_path / "run", max_steps=2, **CELLS[cell]))
    last, rows = results(tmp_path / "run")["iterations"][-1], metrics(tmp_path / "run")
    assert [(m["iteration"], m["step"]) for m in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert (last["noise_std"] is not None) == (cell in ("npo", "alternating")) and last["update"] == ("spin" if cell == "spin" else "dnpo")
    scored = [row["meta"]["score_generated"] for row in lines(tmp_path / "run/iter2/pairs.jsonl")]
    assert all(s is None for s in scored) if cell in ("spin", "npo") else None not in scored


def test_the_previous_iterations_pairs_are_mixed_in(monkeypatch, flags, tmp_path):
    """--mix_previous: iteration 2 trains on the pairs of 2 and 1, iteration 1 on its own."""
    run(monkeypatch, dnpo, *flags(tmp_path / "run", mix_previous=True))
    kept = [sum(row["chosen"] != row["rejected"] for row in lines(tmp_path / f"run/iter{k}/pairs.jsonl")) for k in (1, 2)]
    assert [r["pairs"] for r in results(tmp_path / "run")["iterations"][1:]] == [kept[0], sum(kept)]


def test_ties_are_dropped_and_counted_if_asked(monkeypatch, flags, tmp_path):
    """--ties drop leaves out exactly the pairs whose scores are equal."""
    run(monkeypatch, dnpo, *flags(tmp_path / "run", ties="drop", warmup_iterations=0, max_steps=1))
    rows = lines(tmp_path / "run/iter1/pairs.jsonl")
    tied = [row for row in rows if row["meta"]["score_annotated"] == row["meta"]["score_generated"]]
    report = results(tmp_path / "run")["iterations"][1]
    assert all((row["meta"]["why"] == "tie") == (row in tied) for row in rows) and tied
    assert report["left_out"]["tie"] == len(tied) and report["pairs"] == 37 - len(tied)


def test_the_seed_decides_the_run(monkeypatch, flags, tmp_path):
    """The same seed gives the same results in another folder, another seed gives others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(monkeypatch, dnpo, *flags(tmp_path / name, seed=seed, max_steps=1, warmup_iterations=0))
    assert results(tmp_path / "a") == results(tmp_path / "b") and metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, flags, tmp_path, capsys):
    """The example's parts with and without loss, counts and steps; no folder, no model."""
    for module in (dnpo, common):
        monkeypatch.setattr(module, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    run(monkeypatch, dnpo, *flags(tmp_path / "run"), "--dry_run")
    text = capsys.readouterr().out
    assert "37 training, 16 held-out prompts" in text and "at most 3 steps" in text and "no loss: '<bos><|user|>" in text and "<eos>' (" in text
    assert not list(tmp_path.iterdir())
