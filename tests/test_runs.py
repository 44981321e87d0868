"""Whole runs of dnpo.py and generate.py: any number of ranks, any interruption.

And the numbers of the report, recomputed from the run's files.
"""

import json
import math
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    assert_close,
    dnpo_flags,
    forked,
    lines,
    metrics,
    refused,
    results,
    run,
    sams_flags,
    script,
    weights,
)
from torch.distributed.tensor import DTensor

import common
import dnpo
import generate
import job
import sams
import toy
from common import Answer, Model, Pair, Scorer, collate


@pytest.fixture(scope="module")
def flags(world):
    """Two iterations of three steps, the last one smaller, strong noise: flags for a folder."""

    def flags_for(out, **more):
        values = {"out": out, "limit": 37, "noise_init": 0.5, "noise_lr": 1e-2, "lr": 2e-4}
        values.update(more)
        return dnpo_flags(world, **values)

    return flags_for


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """One uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("plain")
    done = script("dnpo.py", *flags("run"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


class Killed(BaseException):
    """Nothing in a script catches it."""


def no_model(*args, **more):
    pytest.fail("a model was loaded")


# ---------------------------------------------------------------- ranks


ALTERNATING = {"noise_update": "alternating", "warmup_iterations": 0}
OFFSET = {"noise_update": "offset", "noise_init": "linear", "warmup_iterations": 0}
TWO_RANKS = """import json, shutil, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import dnpo
import job

runs = json.loads(sys.argv[2])
save_state = job.save_state


class Died(BaseException):
    pass


def save_and_die(path, *args, **more):
    save_state(path, *args, **more)
    if "iter2" in str(path):
        raise Died


def do_nothing(*args, **more):
    pass


# one group for all runs
dist.init_process_group("gloo")
leave_group = dist.destroy_process_group
dist.init_process_group = dist.destroy_process_group = do_nothing

for dies, flags in runs:
    job.save_state = save_and_die if dies else save_state
    sys.argv[1:] = [str(flag) for flag in flags]
    try:
        dnpo.main()
    except Died:
        if job.on_rank_0():
            shutil.copytree("resumed", "one/resumed")

dist.barrier()
leave_group()  # else its threads may abort the process when that ends
"""


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """Runs on two ranks under one torchrun, whose start takes longer than a run.

    `replicated` and `sharded` are the plain run. `resumed` is a sharded run that died after the
    first step with noise and went on; `one/resumed` is what it left
    behind when it died. `alternating-ddp` and `alternating-fsdp` alternate, `offset-ddp` and
    `offset-fsdp` are the control, with noise that starts at random.
    """
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO_RANKS)
    sharded = {"parallel": "fsdp", "micro_batch": 4}
    resumed = flags("resumed", **sharded)
    runs = [  # whether it dies, flags
        (False, flags("replicated", parallel="ddp", micro_batch=4)),
        (False, flags("sharded", **sharded)),
        (True, resumed),
        (False, [*resumed, "--resume"]),
    ]
    for name, more in (("alternating", ALTERNATING), ("offset", OFFSET)):
        for way in ("ddp", "fsdp"):
            again = flags(
                f"{name}-{way}",
                parallel=way,
                micro_batch=4,
                activation_checkpointing=True,
                **more,
            )
            runs.append((False, again))

    done = script(
        str(folder / "two.py"),
        ROOT,
        json.dumps(runs, default=str),
        cwd=folder,
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_two_ranks_do_what_one_does(plain, two, name):
    """Samples and labels are the same bytes; losses, noise, gradient norms and weights agree.

    They do after every step of both iterations. The last step has 5 pairs: on two ranks one place
    is filled with a pair of weight 0.
    """
    out = two / name
    alone, together = metrics(plain), metrics(out)
    assert [result["pairs"] for result in results(plain)["iterations"][1:]] == [37, 37]
    assert len(alone) == 6
    assert len(together) == 6

    for a, b in zip(alone[:3], together[:3]):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    for a, b in zip(alone[3:], together[3:]):  # a model that has drifted, and noise
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)
        assert b["noise/std"] > 0.4

    for iteration, tolerance in (("iter1", 2e-5), ("iter2", 1e-4)):
        for file in ("responses.jsonl", "pairs.jsonl"):
            mine = (out / iteration / file).read_bytes()
            assert mine == (plain / iteration / file).read_bytes()
        trained = weights(plain / iteration / "checkpoint")
        assert_close(trained, weights(out / iteration / "checkpoint"), atol=tolerance)


@pytest.mark.parametrize("name, more", [("alternating", ALTERNATING), ("offset", OFFSET)])
def test_the_other_updates_are_the_same_on_two_ranks_too(two, flags, name, more):
    """A noise step, then a model step; the control, and sigma's random start: DDP and FSDP agree.

    All have forward passes without a backward pass. The mean drop is that of all ranks' pairs.
    """
    alone = two / name
    assert forked(dnpo, *flags(alone, **more)) == 0
    assert all(line["noise/drop"] > 0.1 for line in metrics(alone))
    trained = weights(alone / "iter1/checkpoint")
    for way in ("ddp", "fsdp"):
        out = two / f"{name}-{way}"
        for a, b in zip(metrics(alone), metrics(out), strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-4)
        assert_close(trained, weights(out / "iter1/checkpoint"), atol=1e-4)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("noisy", [False, True])
def test_a_sharded_reference_in_bf16_gives_the_same_bits(monkeypatch, one_rank, world, noisy):
    """FSDP casts a frozen float32 reference to bf16 anyway: half of the bytes, the same numbers.

    Trained weights, the policy's and the noise's, stay in float32, and so do the gradients.
    """
    c = dnpo.Config(parallel="fsdp", dtype="bfloat16", activation_checkpointing=False)
    path, cpu = str(world / "sft"), torch.device("cpu")
    ids, mask = collate([([1, 7, 8], [9, 10, 2]), ([1, 9], [7, 2])], cpu)

    def wrap(lm):
        return dnpo.NoisyReference(lm, "linear" if noisy else None)

    found, kinds = [], []
    for cast in (job.cast_frozen, lambda *_: None):
        monkeypatch.setattr(job, "cast_frozen", cast)
        reference = dnpo.shard(wrap, path, c, cpu)
        kinds.append([(p.requires_grad, p.dtype) for p in reference.parameters()])
        logps, *_ = reference(ids, mask, [5])
        if noisy:
            logps.sum().backward()
        found.append((reference, logps))

    trained = {(True, torch.float32)} if noisy else set()
    assert set(kinds[0]) == trained | {(False, torch.bfloat16)}
    assert set(kinds[1]) == trained | {(False, torch.float32)}
    (kept, logps), (cast_each_time, others) = found
    assert torch.equal(logps, others)
    for mine, other in zip(kept.parameters(), cast_each_time.parameters(), strict=True):
        if mine.requires_grad:
            assert torch.equal(mine.grad.full_tensor(), other.grad.full_tensor())
    assert all(p.dtype == torch.float32 for p in dnpo.shard(Scorer, path, c, cpu).parameters())


def steps_of_unequal_lengths(c, wrap, path: str, count: int) -> list[float]:
    """Losses and gradients (their sums) of DNPO's steps on random pairs, 4 of other lengths each.

    wrap makes the policy.
    """
    cpu, rng = torch.device("cpu"), random.Random(0)
    policy = dnpo.shard(wrap, path, c, cpu)
    reference = dnpo.shard(lambda lm: dnpo.NoisyReference(lm, "0.5"), path, c, cpu)
    found = []

    def draw(most: int) -> list[int]:
        return [rng.randrange(7, 20) for _ in range(rng.randint(2, most))]

    for step in range(count):
        pairs = [Pair([1, *draw(12)], draw(14), draw(14), str(i)) for i in range(4)]
        seed = (0, "noise", step)
        sums = dnpo.descend(c, "joint", policy, reference, pairs, [0, 1, 2, 3], seed, cpu)
        found.append(float(sums["loss"]))
        for weight in policy.parameters():
            gradient = weight.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            found.append(gradient.double().abs().sum().item())
        policy.zero_grad()
    return found


def test_compiled_layers_give_the_same_numbers_and_are_compiled_once(one_rank, world):
    """50 steps of unequal lengths: one graph with and one without gradients, at most two of each.

    With activation checkpointing, under DDP and FSDP, and with SamS's pooling hooks.
    """
    path = str(world / "sft")
    plain = dnpo.Config(parallel="none", dtype="float32", activation_checkpointing=False)
    expected = steps_of_unequal_lengths(plain, Scorer, path, 50)
    torch.compiler.reset()  # what other tests have compiled
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = replace(plain, compile=True)
    assert steps_of_unequal_lengths(compiled, Scorer, path, 50) == pytest.approx(expected, rel=1e-3)
    assert 2 <= counters["unique_graphs"] <= 4

    for parallel in ("ddp", "fsdp"):
        c = replace(compiled, parallel=parallel, activation_checkpointing=True)
        found = steps_of_unequal_lengths(c, Scorer, path, 3)
        assert found == pytest.approx(expected[: len(found)], rel=1e-3)

    ids, mask = collate([([1, 7, 8], [9, 10, 2]), ([1, 9], [7, 2])], "cpu")
    values = []
    for c in (plain, compiled):
        scorer = dnpo.shard(sams.PoolingScorer, path, c, torch.device("cpu"))
        with torch.no_grad():
            values.append(scorer(ids, mask, mask))
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)


def test_without_a_compiler_compile_is_one_line(monkeypatch, flags, tmp_path, capsys):
    """Before anything is loaded."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, dnpo, *flags(tmp_path / "run", compile=True))
    assert stop.value.code == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err


def test_none_under_torchrun_is_refused(monkeypatch, flags, tmp_path, capsys):
    """Two ranks that would train apart are an error, not two runs."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, dnpo, *flags(tmp_path / "run", parallel="none"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --parallel none")
    assert not (tmp_path / "run").exists()


def test_a_noise_of_size_0_and_its_offset_train_as_without_noise(monkeypatch, flags, tmp_path):
    """sigma = 0: not a bit of the trained model differs from the one without noise."""
    trained = {}
    for name, more in (
        ("without", {"noise": False}),
        ("joint", {"noise_init": 0, "noise_lr": 1e-30}),
        ("offset", {"noise_init": 0, "noise_lr": 1e-30, "noise_update": "offset"}),
    ):
        run(monkeypatch, dnpo, *flags(tmp_path / name, warmup_iterations=0, **more))
        trained[name] = weights(tmp_path / name / "iter1/checkpoint")
    assert_close(trained["joint"], trained["without"], atol=0)
    assert_close(trained["offset"], trained["without"], atol=0)


# ---------------------------------------------------------------- interruptions


def die_after_saving(monkeypatch):
    """Killed, as soon as a training state is saved."""
    save_state = job.save_state

    def save_and_die(*args, **more):
        save_state(*args, **more)
        raise Killed

    monkeypatch.setattr(job, "save_state", save_and_die)


@pytest.mark.parametrize("how", [{}, ALTERNATING, OFFSET])
def test_six_steps_are_three_and_resume_and_three(monkeypatch, flags, tmp_path, how):
    """Model, noise head, their optimizers, learning rate, order and noise go on bit for bit.

    No line of metrics stands twice.
    """
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = {**how, "warmup_iterations": 0, "epochs": 2, "save_every": 3}
    run(monkeypatch, dnpo, *flags(whole, **more))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after_saving(patch)
        run(patch, dnpo, *flags(halves, **more))
    # measured, but after the saved state: must be measured again
    after_saving = {**metrics(halves)[-1], "step": 4}
    with open(halves / "metrics.jsonl", "a") as file:
        file.write(json.dumps(after_saving) + "\n")
        file.write('{"iteration": 1, "st')

    run(monkeypatch, dnpo, *flags(halves, **more), "--resume")
    assert [line["step"] for line in metrics(halves)] == [1, 2, 3, 4, 5, 6]
    assert metrics(halves) == metrics(whole)
    trained = weights(whole / "iter1/checkpoint")
    assert_close(weights(halves / "iter1/checkpoint"), trained, atol=0)
    assert len({line["noise/std"] for line in metrics(whole)}) == 6  # the noise did move


def test_sharded_training_goes_on_bit_for_bit_and_on_any_number_of_ranks(
    monkeypatch, plain, two, flags
):
    """A sharded run that dies with the noise in training can go on.

    Two ranks go on as if nothing had been, one process with what two had saved.
    """
    resumed, sharded = two / "resumed", two / "sharded"
    assert metrics(resumed) == metrics(sharded)
    assert results(resumed) == results(sharded)
    trained = weights(sharded / "iter2/checkpoint")
    assert_close(weights(resumed / "iter2/checkpoint"), trained, atol=0)

    monkeypatch.chdir(two / "one")
    left = two / "one/resumed"
    steps = [(line["iteration"], line["step"]) for line in metrics(left)]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert forked(dnpo, *flags("resumed", parallel="fsdp", micro_batch=4), "--resume") == 0
    assert [line["step"] for line in metrics(left)] == [1, 2, 3, 1, 2, 3]
    trained = weights(plain / "iter2/checkpoint")
    assert_close(weights(left / "iter2/checkpoint"), trained, atol=1e-4)


KILLS = [
    ("in", "iter 0: answer"),
    ("before", "iter0/answers.jsonl"),
    ("in", "iter 0: judge"),
    ("in", "iter 1: sample"),
    ("after", "iter1/responses.jsonl"),
    ("in", "iter 1: label"),
    ("in", "iter 1"),
    ("before", "iter1/state.pt"),
    ("after", "iter1/state.pt"),
    ("in", "iter 1"),
    ("before", "iter1/checkpoint"),
    ("after", "iter1/checkpoint"),
    ("in", "iter 1: sample again"),
    ("in", "iter 1: log-probs"),
    ("in", "iter 2: sample"),
    ("after", "iter2/pairs.jsonl"),
    ("after", "iter2/state.pt"),
    ("in", "iter 2"),
    ("before", "iter2/checkpoint"),
    ("in", "iter 2: answer"),
    ("before", "results.json"),
    ("before", "samples.md"),
]
CHANGING = {"results.json", "metrics.jsonl", "run.json", "config.json", "lock"}
# these hold clocks, processes or the folder's name


def files_of(folder: Path) -> dict[str, Path]:
    """A run's files by name, but for the judge's cache."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name != "judge":
            files[str(path.relative_to(folder))] = path
    return files


def test_a_run_killed_in_every_phase_ends_with_the_same_results(flags, tmp_path):
    """SIGKILL in and around every phase, --resume each time: the files of a run left alone."""
    more = {"limit": 45, "sample_batch": 5, "batch": 5, "micro_batch": 5, "save_every": 4}
    assert forked(dnpo, *flags(tmp_path / "whole", **more)) == 0

    again = flags(tmp_path / "killed", **more)
    for kill in KILLS:
        assert forked(dnpo, *again, kill=kill) == -signal.SIGKILL, f"never came to {kill}"
        again = [*flags(tmp_path / "killed", **more), "--resume"]
    assert forked(dnpo, *again) == 0

    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    killed, whole = files_of(tmp_path / "killed"), files_of(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    for name in whole.keys() - CHANGING:
        assert killed[name].read_bytes() == whole[name].read_bytes(), name


def test_a_finished_run_resumed_stays_as_it_is(monkeypatch, plain, flags):
    """Nothing is sampled, trained or measured again; more iterations may be asked for."""
    before = results(plain)
    files = {path: path.read_bytes() for path in plain.rglob("*.jsonl")}
    monkeypatch.chdir(plain.parent)
    monkeypatch.setattr(dnpo, "load_lm", no_model)
    monkeypatch.setattr(common, "load_lm", no_model)
    run(monkeypatch, dnpo, *flags("run"), "--resume")
    assert results(plain) == before
    assert {path: path.read_bytes() for path in plain.rglob("*.jsonl")} == files


def test_a_run_of_no_iteration_is_refused(monkeypatch, capsys, flags, tmp_path):
    """Neither SPIN's nor DNPO's: one line, and no folder."""
    none = flags(tmp_path / "run", iterations=0, warmup_iterations=0)
    line = refused(monkeypatch, capsys, dnpo, none)
    assert "--iterations 0 and --warmup_iterations 0: there is nothing to train" in line
    assert not list(tmp_path.iterdir())
    assert dnpo.Config(iterations=0).warmup_iterations == 1  # plain SPIN
    assert dnpo.Config(warmup_iterations=0).iterations == 3


def test_a_run_cannot_be_made_shorter(monkeypatch, capsys, plain, flags, tmp_path):
    """--resume with fewer --iterations than there are is one line, and changes no file."""
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    line = refused(monkeypatch, capsys, dnpo, [*flags(out, iterations=0), "--resume"])
    assert line == f"error: {out / 'iter2'} is there already: this run had a larger --iterations\n"
    for name in ("config.json", "results.json", "metrics.jsonl"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()


# ---------------------------------------------------------------- generate.py


def generate_flags(world: Path, out: Path, **more) -> list:
    """Flags of a run of generate.py."""
    flags = ["--model", world / "sft", "--data", world / "train.jsonl", "--out", out]
    for name, value in more.items():
        flags += [f"--{name}", value]
    return flags


def test_a_phase_of_a_finished_run_is_made_again_and_nothing_else(
    monkeypatch, plain, flags, tmp_path
):
    """Without iter1/checkpoint, --resume trains that iteration again; all that came later stays."""
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    shutil.rmtree(out / "iter1/checkpoint")
    run(monkeypatch, dnpo, *flags(out), "--resume")

    assert results(out) == results(plain)
    order = [(line["iteration"], line["step"]) for line in metrics(out)]
    assert order == [(2, 1), (2, 2), (2, 3), (1, 1), (1, 2), (1, 3)]
    assert sorted(metrics(out), key=lambda line: line["iteration"]) == metrics(plain)
    assert_close(weights(out / "iter1/checkpoint"), weights(plain / "iter1/checkpoint"), atol=0)


def test_a_training_without_lines_of_metrics_is_named(monkeypatch, plain, flags, tmp_path, capsys):
    """Someone has deleted metrics.jsonl: one line says how it is made again."""
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    (out / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, dnpo, *flags(out), "--resume")
    assert stop.value.code == 2
    assert "metrics.jsonl: no line of training 1" in capsys.readouterr().err


def test_the_gradient_of_the_noise_is_watched_too(plain):
    """Its norm is a metric of iterations with noise: one that is no number ends the run."""
    for line in metrics(plain):
        assert ("noise/grad_norm" in line) == (line["iteration"] == 2)
        assert line.get("noise/grad_norm", 1.0) > 0


def test_a_killed_generate_goes_on_and_loses_and_repeats_no_row(world, tmp_path):
    """Killed after some batches and started again, the file has the bytes of one left alone.

    By one process, or by two.
    """
    more = {"samples": 2, "max_new_tokens": 12, "batch": 8}
    whole = tmp_path / "whole.jsonl"
    assert forked(generate, *generate_flags(world, whole, **more)) == 0

    for name, ranks in (("one.jsonl", 1), ("two.jsonl", 2)):
        out = tmp_path / name
        flags = generate_flags(world, out, **more)
        assert forked(generate, *flags, kill=("in", out.stem)) == -signal.SIGKILL
        assert not out.exists()
        part = Path(f"{out}.part0")
        with open(part, "a") as file:
            file.write('{"stamp": "torn')

        if ranks == 1:
            assert forked(generate, *flags, kill=("before", name)) == -signal.SIGKILL
            # an empty line, 30 batches, the torn one: none is drawn twice
            assert len(part.read_text().splitlines()) == 1 + 30 + 1
            assert forked(generate, *flags) == 0
        else:
            done = script("generate.py", *flags, cwd=tmp_path, ranks=2)
            assert done.returncode == 0, done.stderr
        assert out.read_bytes() == whole.read_bytes()
        assert not list(tmp_path.glob(f"{name}.*"))

    asked = []
    for row in lines(world / "train.jsonl"):
        asked += [(row["id"], 0), (row["id"], 1)]
    assert [(row["id"], row["meta"]["sample"]) for row in lines(whole)] == asked


def test_the_best_and_the_worst_answer_to_each_prompt_become_a_pair(world, tmp_path, capfd):
    """generate.py --pairs ends with a file that sams.py trains on; killed, it goes on.

    Prompts whose answers the judge finds equally good have no pair.
    """
    out, pairs = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    more = {"samples": 3, "temperature": 1.0, "max_new_tokens": 12, "judge": "toy", "pairs": pairs}
    flags = generate_flags(world, out, **more)
    assert forked(generate, *flags, kill=("in", "score")) == -signal.SIGKILL
    assert out.exists()
    assert not pairs.exists()
    lock = Path(f"{out}.lock")
    assert lock.exists()  # the answers are there, and nobody else may judge them
    done = script("generate.py", *flags, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert not lock.exists()

    expected = []
    answers = lines(out)
    for i, row in enumerate(lines(world / "train.jsonl")):
        text = row["prompt"]
        own = answers[3 * i : 3 * i + 3]
        own = [answer for answer in own if answer["response"]]
        scores = [toy.score(text, answer["response"]) for answer in own]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if best != worst:
            chosen, rejected = own[best], own[worst]
            expected.append((row["id"], chosen["response"], rejected["response"]))
            ended = [side["meta"]["finish"] == "stop" for side in (chosen, rejected)]
            meta = lines(pairs)[len(expected) - 1]["meta"]
            assert [meta["chosen_ended"], meta["rejected_ended"]] == ended
            assert (meta["score_chosen"], meta["score_rejected"]) == (max(scores), min(scores))
    found = [(row["id"], row["chosen"], row["rejected"]) for row in lines(pairs)]
    assert found == expected
    assert 60 < len(expected) < 120
    assert f"{len(expected)} pairs; {120 - len(expected)} prompts without" in done.stdout

    more = {"data": pairs, "out": tmp_path / "run", "max_steps": 1, "select": "all"}
    more["reference"] = tmp_path / "reference"
    assert forked(sams, *sams_flags(world, **more)) == 0


def test_an_empty_or_unreadably_judged_answer_is_neither_best_nor_worst():
    """Scores None, 3, 8, 3, 8, and 1 for an empty one: the third and the second.

    Where there are only None or equal ones, there is no pair.
    """
    answers = []
    for text in ("a", "b", "c", "d", "e", " "):
        answers.append({"response": text, "meta": {"finish": "stop" if text < "c" else "length"}})
    row = {"id": "1", "prompt": []}
    pair = generate.preference_pair(row, answers, [None, 3, 8, 3, 8, 1])
    assert (pair["chosen"], pair["rejected"]) == ("c", "b")
    assert pair["meta"] == {
        "score_chosen": 8,
        "score_rejected": 3,
        "chosen_ended": False,
        "rejected_ended": True,
    }
    assert generate.preference_pair(row, answers, [None] * 6) is None
    assert generate.preference_pair(row, answers, [None, 3, 3, None, 3, 1]) is None


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["--pairs", "p.jsonl"], "--pairs and --judge go together"),
        (["--judge", "toy"], "--pairs and --judge go together"),
        (["--pairs", "p.jsonl", "--judge", "toy"], "--pairs needs at least two answers"),
    ],
)
def test_pairs_need_a_judge_and_two_answers(monkeypatch, capsys, world, tmp_path, more, complaint):
    """One line, exit code 2."""
    flags = [*generate_flags(world, tmp_path / "a.jsonl"), *more]
    assert complaint in refused(monkeypatch, capsys, generate, flags)


def test_an_answer_is_cut_at_max_new_tokens_and_says_so(monkeypatch, world, tmp_path):
    """finish is "length" exactly for the answers that did not end by themselves.

    One token is one letter here; <unk> and the like are not shown.
    """
    out = tmp_path / "short.jsonl"
    run(monkeypatch, generate, *generate_flags(world, out, max_new_tokens=3))
    whole_length = 0
    for row in lines(out):
        cut = row["meta"]["finish"] == "length"
        assert len(row["response"]) <= (3 if cut else 2)
        if cut and len(row["response"]) == 3:
            whole_length += 1
    assert whole_length > 60


def test_going_on_with_other_settings_is_refused(monkeypatch, world, tmp_path, capsys):
    """Batches of another temperature or model do not mix into one file."""
    begun = {"stamp": "0123456789abcdef", "batch": 0, "rows": []}
    (tmp_path / "a.jsonl.part0").write_text(json.dumps(begun) + "\n")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, generate, *generate_flags(world, tmp_path / "a.jsonl"))
    assert stop.value.code == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_whatever_the_answers_depend_on_may_not_change_between_two_starts(
    monkeypatch, world, tmp_path, capsys
):
    """A killed run is refused another model, temperature, length, batch or seed."""
    out = tmp_path / "a.jsonl"
    begun = generate_flags(world, out, max_new_tokens=4, batch=8)
    assert forked(generate, *begun, kill=("in", "a")) == -signal.SIGKILL
    part = Path(f"{out}.part0").read_bytes()
    changes = {
        "model": world / "sft-early",
        "temperature": 0.5,
        "max_new_tokens": 5,
        "batch": 4,
        "seed": 1,
    }
    for name, value in changes.items():
        line = refused(monkeypatch, capsys, generate, [*begun, f"--{name}", value])
        assert "was begun with other settings" in line, name
    assert Path(f"{out}.part0").read_bytes() == part


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "dsl, ties, annotated, generated, chosen, why",
    [
        (True, "keep", 7, 3, "annotated", None),
        (True, "keep", 3, 7, "generated", None),
        (True, "keep", 5, 5, "annotated", None),
        (True, "drop", 5, 5, "annotated", "tie"),
        (True, "drop", 3, 7, "generated", None),
        (True, "keep", None, 7, "annotated", "unreadable"),
        (True, "keep", 3, None, "annotated", "unreadable"),
        (True, "drop", None, None, "annotated", "unreadable"),
        (False, "drop", None, None, "annotated", None),
    ],
)
def test_a_row_has_the_better_answer_on_top_or_says_why_it_is_left_out(
    dsl, ties, annotated, generated, chosen, why
):
    """DSL swaps for a higher score only; a judgement that can't be read leaves the row out."""
    row = {"id": "r", "prompt": [{"role": "user", "content": "ba"}]}
    answers = {
        "annotated": Answer("ab", True, annotated),
        "generated": Answer("ba", False, generated, [[8, 7]]),
    }
    at = dnpo.Iteration(2, dsl, npo=False, folder=Path("iter2"), save_dtype="float32")
    made = dnpo.preference_row(dnpo.Config(ties=ties), at, row, **answers)

    rejected = "generated" if chosen == "annotated" else "annotated"
    assert made == {
        "id": "r",
        "prompt": row["prompt"],
        "chosen": answers[chosen].text,
        "rejected": answers[rejected].text,
        "meta": {
            "iteration": 2,
            "swapped": chosen == "generated",
            "flipped": False,
            "why": why,
            "score_annotated": annotated,
            "score_generated": generated,
            "chosen_ended": answers[chosen].ended,
            "rejected_ended": answers[rejected].ended,
            "sampled_ids": [[8, 7]],
        },
    }


@pytest.mark.parametrize(
    "annotated, generated, ties, why",
    [
        (7, 3, "keep", None),
        (3, 7, "keep", None),
        (5, 5, "keep", None),
        (5, 5, "drop", "tie"),
        (None, 7, "keep", "unreadable"),
        (3, None, "drop", "unreadable"),
    ],
)
def test_only_a_label_can_be_flipped(annotated, generated, ties, why):
    """--judge_noise turns a label round and says so; where there is none the row stays as it is."""
    row = {"id": "r", "prompt": [{"role": "user", "content": "ba"}]}
    answers = Answer("ab", True, annotated), Answer("ba", False, generated)
    at = dnpo.Iteration(2, dsl=True, npo=False, folder=Path("iter2"), save_dtype="float32")
    c = dnpo.Config(ties=ties)
    asis, turned = [dnpo.preference_row(c, at, row, *answers, flip) for flip in (False, True)]
    assert turned["meta"]["why"] == why
    assert turned["meta"]["flipped"] is (why is None)
    if why:
        assert turned == asis
    else:
        assert (turned["chosen"], turned["rejected"]) == (asis["rejected"], asis["chosen"])
        assert turned["meta"]["swapped"] is not asis["meta"]["swapped"]
        assert turned["meta"]["chosen_ended"] == asis["meta"]["rejected_ended"]


def test_a_judge_that_errs_flips_exactly_its_share_of_labels(monkeypatch, flags, world, tmp_path):
    """7 of 37 rows have the judge's label turned round and say so, others in each iteration.

    SPIN's labels are no judge's. The rows are the same after a kill while labelling.
    """
    more = {"judge_noise": 0.2, "iterations": 2, "max_steps": 1, "sample_batch": 5}
    run(monkeypatch, dnpo, *flags(tmp_path / "run", **more))
    annotated = annotations(world)
    flipped = []
    for k in (1, 2, 3):
        answers = lines(tmp_path / f"run/iter{k}/responses.jsonl")
        pairs = lines(tmp_path / f"run/iter{k}/pairs.jsonl")
        flipped.append([row["id"] for row in pairs if row["meta"]["flipped"]])
        for answer, row in zip(answers, pairs, strict=True):
            prompt, sampled = prompt_of(row), answer["response"]
            own = annotated[prompt]
            better = k > 1 and toy_score(prompt, sampled) > toy_score(prompt, own)
            generated_first = better != row["meta"]["flipped"]
            assert row["meta"]["swapped"] == generated_first
            sides = (sampled, own) if generated_first else (own, sampled)
            assert (row["chosen"], row["rejected"]) == sides
    assert [len(ids) for ids in flipped] == [0, 7, 7]
    assert flipped[1] != flipped[2]

    more = {**more, "iterations": 1, "warmup_iterations": 0}
    files = []
    for name, kill in (("whole", None), ("killed", ("in", "iter 1: label"))):
        again = flags(tmp_path / name, **more)
        if kill:
            assert forked(dnpo, *again, kill=kill) == -signal.SIGKILL
            again.append("--resume")
        assert forked(dnpo, *again) == 0
        files.append((tmp_path / name / "iter1/pairs.jsonl").read_bytes())
    assert files[0] == files[1]
    assert files[0].count(b'"flipped": true') == 7


def test_every_iteration_draws_its_answers_with_a_seed_of_its_own(monkeypatch):
    """The same noise twice would give the same answers where the policy has hardly moved.

    So for the answers that are trained on, the held-out ones, and the new ones of Fig. 2.
    """
    seeds = []

    def note(out, rows, model, sampling, seed, note):
        seeds.append(seed)
        raise Killed

    monkeypatch.setattr(common, "generate", note)
    for seed, number in ((0, 1), (0, 2), (1, 1)):
        c = dnpo.Config(seed=seed)
        at = dnpo.Iteration(number, True, True, Path(f"iter{number}"), "float32")
        with pytest.raises(Killed):
            dnpo.sample_answers(c, at, [], None, None)
        with pytest.raises(Killed):
            dnpo.measure(c, at, None, [], None, None)
        with pytest.raises(Killed):
            dnpo.measure_logps(c, at, None, [], None)
    assert len(set(seeds)) == len(seeds) == 9


def dies_after(calls: int):
    """An exact judge of 5 points for everybody that dies after so many answers."""
    asked = []

    def score(prompt, text):
        asked.append(text)
        if len(asked) > calls:
            raise Killed
        return 5.0

    return common.ExactJudge("toy", score)


def said(texts: str) -> list[dict]:
    """Rows, or sampled answers, of one prompt each."""
    rows = []
    for i, text in enumerate(texts):
        prompt = [{"role": "user", "content": f"p{i}"}]
        rows.append({"id": str(i), "prompt": prompt, "response": text, "meta": {"finish": "stop"}})
    return rows


@pytest.mark.parametrize("phase", ["label", "measure"])
def test_judging_goes_on_only_with_the_texts_that_it_was_begun_with(
    monkeypatch, tmp_path, capsys, phase
):
    """A killed labelling or measuring is refused other annotations, answers and judge's prompts."""
    c = dnpo.Config(judge="toy", sample_batch=2)
    at = dnpo.Iteration(2, True, True, tmp_path, "float32")
    sampling = common.Sampling(1.0, 8, 2)

    def work(rows, answers, key="toy"):
        monkeypatch.setattr(common, "generate", lambda *args, **more: answers)
        judge = dies_after(4)
        judge.key = key
        if phase == "label":
            dnpo.label(c, at, rows, answers, judge)
        else:
            common.held_out(tmp_path, rows, None, sampling, judge, seed=0)

    with pytest.raises(Killed):
        work(said("abcd"), said("efgh"))
    others = [
        (said("abcx"), said("efgh"), "toy"),
        (said("abcd"), said("efgx"), "toy"),
        (said("abcd"), said("efgh"), ["toy", "another prompt"]),
    ]
    for other in others:
        with pytest.raises(SystemExit):
            work(*other)
        assert "was begun with other settings" in capsys.readouterr().err


def test_an_annotation_is_cut_or_whole_as_its_row_says(tmp_path):
    """meta.chosen_ended of the data, and its sampled ids, go into the pair."""
    rows = said("ab")
    rows[0]["meta"] = {"chosen_ended": False, "sampled_ids": [[8, 7]]}
    at = dnpo.Iteration(1, dsl=False, npo=False, folder=tmp_path, save_dtype="float32")
    cut, whole = dnpo.label(dnpo.Config(sample_batch=2), at, rows, said("cd"), None)
    assert cut["meta"]["chosen_ended"] is False
    assert cut["meta"]["sampled_ids"] == [[8, 7]]
    assert whole["meta"]["chosen_ended"] is True
    assert "sampled_ids" not in whole["meta"]


def labelled(name: str, why: str | None = None) -> dict:
    """A preference row that is trained on, or left out."""
    prompt = [{"role": "user", "content": "ba"}]
    row = {"id": name, "prompt": prompt, "chosen": "ab", "rejected": "ba"}
    return {**row, "meta": {"why": why}}


@pytest.mark.parametrize("mix, trained", [(True, ["a", "d"]), (False, ["a"])])
def test_rows_that_are_left_out_are_left_out_of_the_next_iteration_too(mix, trained):
    """What is counted is this iteration's; of the previous one only usable rows are mixed in."""
    pairs = [labelled("a"), labelled("b", "tie"), labelled("c", "unreadable")]
    previous = [labelled("d"), labelled("e", "tie"), labelled("f", "unreadable")]
    at = dnpo.Iteration(2, dsl=True, npo=True, folder=Path("iter2"), save_dtype="float32")
    c = dnpo.Config(mix_previous=mix)
    encoded, left_out = dnpo.encode(c, at, toy.tokenizer(), pairs, previous)
    assert [pair.id for pair in encoded] == trained
    assert left_out == {"tie": 1, "unreadable": 1}


# ---------------------------------------------------------------- what a run reports


def toy_score(prompt: str, answer: str) -> float:
    """10 x (letters in their places) / (length of the longer one)."""
    right = sorted(prompt)
    hits = 0
    for i in range(min(len(right), len(answer))):
        if right[i] == answer[i]:
            hits += 1
    return 10 * hits / max(len(right), len(answer))


def annotations(world: Path) -> dict[str, str]:
    """The annotated answer to every prompt."""
    rows = lines(world / "train.jsonl") + lines(world / "test.jsonl")
    return {row["prompt"]: row["response"] for row in rows}


def prompt_of(row: dict) -> str:
    return row["prompt"][0]["content"]


def check_scores(result: dict, rows: list[dict], annotated: dict[str, str]):
    """An iteration's scores are those of its answers (test.jsonl) beside the annotations."""
    total = full = wins = ties = losses = cut = 0
    for row in rows:
        prompt = prompt_of(row)
        score = toy_score(prompt, row["response"])
        other = toy_score(prompt, annotated[prompt])
        total += score
        full += score == 10
        wins += score > other
        ties += score == other
        losses += score < other
        cut += row["meta"]["finish"] == "length"
    assert result["score"] == pytest.approx(total / 16)
    assert result["full_marks"] == full / 16
    assert result["win"] == wins / 16
    assert result["tie"] == ties / 16
    assert result["loss"] == losses / 16
    assert result["cut"] == cut / 16


def check_logps(result: dict, rows: list[dict]):
    """An iteration's log-probs are the means of its logps.jsonl."""
    for side in ("positive", "negative", "new"):
        assert result[f"logp_{side}"] == sum(row[side] for row in rows) / 16
    assert [row["id"] for row in rows] == [f"train-{i}" for i in range(16)]


def check_labels(
    result: dict, drawn: list[dict], pairs: list[dict], annotated: dict[str, str], dsl: bool
):
    """Under DSL the better answer is chosen, else the annotation; only a sample may be cut."""
    swapped = ties = 0
    for answer, pair in zip(drawn, pairs, strict=True):
        prompt = prompt_of(answer)
        own, sampled = annotated[prompt], answer["response"]
        ties += toy_score(prompt, sampled) == toy_score(prompt, own)
        ended = answer["meta"]["finish"] == "stop"
        if dsl and toy_score(prompt, sampled) > toy_score(prompt, own):
            swapped += 1
            assert (pair["chosen"], pair["rejected"]) == (sampled, own)
            assert pair["meta"]["chosen_ended"] == ended
            assert pair["meta"]["rejected_ended"]
        else:
            assert (pair["chosen"], pair["rejected"]) == (own, sampled)
            assert pair["meta"]["chosen_ended"]
            assert pair["meta"]["rejected_ended"] == ended
    assert result["swapped"] == swapped / 37
    assert result["ties"] == (ties / 37 if dsl else None)


def test_the_reported_numbers_are_those_of_the_files(plain, world):
    """All are recomputed from answers, annotations and the judge's rule."""
    annotated = annotations(world)
    report = json.loads((plain / "results.json").read_text())
    start, spin, npo = report["iterations"]
    names = [(result["iteration"], result["update"]) for result in (start, spin, npo)]
    assert names == [(0, "start"), (1, "spin"), (2, "dnpo")]
    assert report["seed"] == 0
    assert report["seconds"] >= 0  # 0.0 when a finished run was only read again

    held_out = {row["prompt"] for row in lines(world / "test.jsonl")[:16]}
    for result in (start, spin, npo):
        rows = lines(plain / f"iter{result['iteration']}/test.jsonl")
        assert {prompt_of(row) for row in rows} == held_out
        check_scores(result, rows, annotated)

    for folder, result, dsl in ((plain / "iter1", spin, False), (plain / "iter2", npo, True)):
        assert result["steps"] == 3
        check_logps(result, lines(folder / "logps.jsonl"))
        drawn, pairs = lines(folder / "responses.jsonl"), lines(folder / "pairs.jsonl")
        check_labels(result, drawn, pairs, annotated, dsl)

    steps = metrics(plain)
    assert spin["noise_std"] is None
    assert npo["noise_std"] == steps[-1]["noise/std"]
    assert spin["noise_drop"] is None
    drops = [line["noise/drop"] for line in steps[3:]]
    assert npo["noise_drop"] == pytest.approx(sum(drops) / 3)
    norms = [line["grad_norm"] for line in steps]
    assert npo["grad_norm"] == pytest.approx(sum(norms[3:]) / 3)


def test_every_iteration_goes_on_with_the_model_that_the_last_one_made(
    monkeypatch, flags, world, tmp_path
):
    """Iteration k samples from pi_{k-1}, trains it beside itself, and measures pi_k."""
    out, load_lm, loaded = tmp_path / "run", common.load_lm, []

    def note_and_load(path, dtype, device):
        loaded.append(path)
        return load_lm(path, dtype, device)

    monkeypatch.setattr(dnpo, "load_lm", note_and_load)
    monkeypatch.setattr(common, "load_lm", note_and_load)
    run(monkeypatch, dnpo, *flags(out, max_steps=1))

    start = str(world / "sft")
    first = str(out / "iter1/checkpoint")
    second = str(out / "iter2/checkpoint")
    assert loaded == [
        start,  # held-out answers
        *(start, start, start),  # iteration 1: samples, policy and reference of the training,
        *(first, first, first),  # samples again, log-probs, held-out answers
        *(first, first, first),  # iteration 2
        *(second, second, second),
    ]


def test_an_iteration_without_noise_starts_at_ln_2_and_margin_0(plain):
    """Policy and reference are the same model; with noise the first margin is not 0."""
    steps = metrics(plain)
    spin, noisy = steps[0], steps[3]
    assert spin["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert spin["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert noisy["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert abs(noisy["rewards/margins"]) > 1e-2


def naive_logp(lm, tok, prompt: list[dict], text: str, ended: bool) -> float:
    """log pi(y|x) from transformers' own logits of one sequence, in float64."""
    x = tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    y = tok(text, add_special_tokens=False)["input_ids"]
    if ended:
        y = [*y, tok.eos_token_id]
    logps = lm(torch.tensor([x + y])).logits[0].double().log_softmax(-1)
    total = 0.0
    for j, token in enumerate(y):
        total += logps[len(x) - 1 + j, token].item()
    return total


def test_reported_log_probs_are_the_trained_models(plain):
    """logps.jsonl of iteration 2 against the saved checkpoint, one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = plain / "iter2"
    lm = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tok = AutoTokenizer.from_pretrained(folder / "checkpoint")
    pairs, new = lines(folder / "pairs.jsonl"), lines(folder / "new.jsonl")
    found = lines(folder / "logps.jsonl")
    for i in range(4):
        prompt, ended = pairs[i]["prompt"], pairs[i]["meta"]
        chosen = naive_logp(lm, tok, prompt, pairs[i]["chosen"], ended["chosen_ended"])
        rejected = naive_logp(lm, tok, prompt, pairs[i]["rejected"], ended["rejected_ended"])
        stopped = new[i]["meta"]["finish"] == "stop"
        sampled = naive_logp(lm, tok, prompt, new[i]["response"], stopped)
        assert found[i]["positive"] == pytest.approx(chosen, abs=1e-3)
        assert found[i]["negative"] == pytest.approx(rejected, abs=1e-3)
        assert found[i]["new"] == pytest.approx(sampled, abs=1e-3)


def test_an_answer_that_was_cut_is_measured_without_an_end(monkeypatch, world, tmp_path):
    """The log-prob of a new or a rejected answer has an end token in it only if it ended.

    A pair without a label is not measured, nor counted among the first --test_prompts.
    """
    source = str(world / "sft")
    tok, _ = common.load_tokenizer(source)
    model = Model(source, tok, torch.device("cpu"), torch.float32)
    prompt = [{"role": "user", "content": "dacb"}]
    pairs, new = [], []
    for ended, finish in ((True, "stop"), (False, "length")):
        meta = {"why": None, "chosen_ended": True, "rejected_ended": ended}
        row = {"id": finish, "prompt": prompt, "chosen": "abcd", "rejected": "ab", "meta": meta}
        pairs.append(row)
        new.append({"response": "abc", "meta": {"finish": finish}})
    ids = tok.convert_tokens_to_ids(["a", "<unk>"])  # sampled as no text can say
    new.append({"response": "a<unk>", "meta": {"finish": "length", "sampled_ids": [ids]}})
    pairs.append({**pairs[0], "id": "sampled"})
    tie = {**pairs[0]["meta"], "why": "tie"}
    asked = []

    def drawn(out, rows, *more, note):
        asked.extend(row["id"] for row in rows)
        return new

    monkeypatch.setattr(common, "generate", drawn)
    at = dnpo.Iteration(2, dsl=True, npo=True, folder=tmp_path, save_dtype="float32")
    pairs = [{**pairs[0], "id": "tie", "meta": tie}, *pairs]
    dnpo.measure_logps(dnpo.Config(test_prompts=3), at, model, pairs, sampling=None)
    assert asked == ["stop", "length", "sampled"]

    lm = model.load()
    whole, cut, unknown = lines(tmp_path / "logps.jsonl")
    start = common.prompt_ids(tok, prompt)
    with torch.no_grad():
        alone = common.Scorer(lm)(*common.collate([(start, ids)], "cpu")).item()
    assert unknown["new"] == pytest.approx(alone, abs=1e-3)
    for row, ended in ((whole, True), (cut, False)):
        chosen = naive_logp(lm, tok, prompt, "abcd", True)
        assert row["positive"] == pytest.approx(chosen, abs=1e-3)
        rejected = naive_logp(lm, tok, prompt, "ab", ended)
        assert row["negative"] == pytest.approx(rejected, abs=1e-3)
        sampled = naive_logp(lm, tok, prompt, "abc", ended)
        assert row["new"] == pytest.approx(sampled, abs=1e-3)


def test_the_checkpoint_is_an_ordinary_model(plain):
    """float32, tied weights once, with a chat template; it answers as the run's own sampler."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = plain / "iter2/checkpoint"
    lm = AutoModelForCausalLM.from_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    assert "lm_head.weight" not in weights(folder)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert lm.dtype == torch.float32

    prompt = [{"role": "user", "content": "dacb"}]
    ids = tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    batch = torch.tensor([ids])
    attended = torch.ones_like(batch)
    out = lm.generate(batch, attention_mask=attended, max_new_tokens=8, do_sample=False)
    answer = tok.decode(out[0, len(ids) :], skip_special_tokens=True)
    ((own, *_),) = common.sample(lm, tok, [ids], 0.0, 8, 0)
    assert own == answer


def test_samples_show_three_prompts_after_every_iteration(plain):
    """samples.md has the annotated and each iteration's answer to three held-out prompts."""
    text = (plain / "samples.md").read_text()
    for i in range(3):
        for row in lines(plain / f"iter{i}/test.jsonl")[:3]:
            assert f"## {prompt_of(row)}\n\nannotated: {row['annotated']}\n" in text
            assert f"\niteration {i}: {row['response']}\n" in text


def test_swapped_is_a_share_of_the_pairs_that_have_a_label(tmp_path):
    """Rows that are left out keep the annotation on top, but nobody has put it there."""
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 2, "step": 1, "grad_norm": 0.5}\n')
    at = dnpo.Iteration(2, dsl=True, npo=False, folder=tmp_path / "iter2", save_dtype="float32")
    pairs = []
    for annotated, generated in ((7, 3), (3, 7), (5, 6), (5, 5), (None, 7), (7, None)):
        row = {"id": "r", "prompt": [{"role": "user", "content": "ba"}]}
        answers = Answer("ab", True, annotated), Answer("ba", True, generated)
        pairs.append(dnpo.preference_row(dnpo.Config(ties="drop"), at, row, *answers))

    summary = dnpo.training_summary(tmp_path, at, pairs, [], Counter())
    assert summary["swapped"] == 2 / 3
    assert summary["ties"] == 1 / 6
    assert dnpo.training_summary(tmp_path, at, pairs[3:], [], Counter())["swapped"] is None


def test_only_readable_scores_that_are_equal_are_a_tie():
    """Two judgements that could not be read are no tie, two zeros are."""
    for annotated, generated, tie in ((5, 5, True), (0, 0, True), (5, 4, False)):
        assert dnpo.is_tie({"score_annotated": annotated, "score_generated": generated}) == tie
    for annotated, generated in ((None, None), (None, 5), (5, None)):
        assert not dnpo.is_tie({"score_annotated": annotated, "score_generated": generated})


@pytest.mark.parametrize(
    "beta, line",
    [
        (1.0, "by 0.250 nats an answer, and the margin by 0.250"),
        (0.2, "by 0.250 nats an answer, and the margin by 0.050"),
        (
            0.1,
            "by 0.250 nats an answer, and the margin by 0.025: "
            "warning: the noise is too small to act (raise --noise_init)",
        ),
    ],
)
def test_a_noise_too_small_to_act_is_warned_about(capsys, beta, line):
    """It is where beta times the drop is below 0.05."""
    at = dnpo.Iteration(2, dsl=True, npo=True, folder=Path("iter2"), save_dtype="float32")
    dnpo.tell_drop(at, 0, {"noise/drop": 0.25, "noise/drop_margin": beta * 0.25})
    assert capsys.readouterr().out == f"iter 2: the noise lowers log p_noise(y-) {line}\n"


def test_an_iteration_with_noise_says_how_large_it_is_once(monkeypatch, flags, tmp_path, capsys):
    """From the numbers of its first step; the steps' own lines end with their drop."""
    run(monkeypatch, dnpo, *flags(tmp_path / "run", max_steps=2, beta=0.5))
    text = capsys.readouterr().out
    _, _, first, second = metrics(tmp_path / "run")
    assert "noise/drop" not in metrics(tmp_path / "run")[0]
    assert first["noise/drop_margin"] == pytest.approx(0.5 * first["noise/drop"])
    said = [line for line in text.splitlines() if "the noise lowers" in line]
    assert said == [
        f"iter 2: the noise lowers log p_noise(y-) by {first['noise/drop']:.3f} nats an answer, "
        f"and the margin by {first['noise/drop_margin']:.3f}"
    ]
    assert f" · drop {second['noise/drop']:.2f}\n" in text
    assert text.count(" · drop ") == 2


CELLS = {
    "spin": {"labels": "annotation", "noise": False},
    "dsl": {"noise": False},
    "npo": {"labels": "annotation"},
    "alternating": {"noise_update": "alternating"},
    "offset": {"noise_update": "offset"},
}


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_of_figure_8_runs(monkeypatch, flags, tmp_path, cell):
    """SPIN, DSL alone, NPO alone and the other updates: labels and noise are as asked.

    --max_steps is per iteration.
    """
    out = tmp_path / "run"
    run(monkeypatch, dnpo, *flags(out, max_steps=2, **CELLS[cell]))
    steps = [(line["iteration"], line["step"]) for line in metrics(out)]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2)]

    last = results(out)["iterations"][-1]
    noisy = last["noise_std"] is not None
    assert noisy == (cell in ("npo", "alternating", "offset"))
    assert last["update"] == ("spin" if cell == "spin" else "dnpo")
    for row in lines(out / "iter2/pairs.jsonl"):
        judged = row["meta"]["score_generated"] is not None
        assert judged == (cell in ("dsl", "alternating", "offset"))


def test_the_previous_iterations_pairs_are_mixed_in(monkeypatch, flags, tmp_path):
    """--mix_previous: iteration k trains on the pairs of k and k - 1, iteration 1 on its own."""
    out = tmp_path / "run"
    run(monkeypatch, dnpo, *flags(out, mix_previous=True, iterations=2, max_steps=1))
    kept = []
    for name in ("iter1", "iter2", "iter3"):
        rows = lines(out / name / "pairs.jsonl")
        kept.append(sum(row["chosen"] != row["rejected"] for row in rows))
    _, first, second, third = results(out)["iterations"]
    assert first["pairs"] == kept[0]
    assert second["pairs"] == kept[0] + kept[1]
    assert third["pairs"] == kept[1] + kept[2]


def test_ties_are_dropped_and_counted_if_asked(monkeypatch, flags, tmp_path):
    """--ties drop leaves out exactly the pairs whose scores are equal."""
    out = tmp_path / "run"
    run(monkeypatch, dnpo, *flags(out, ties="drop", warmup_iterations=0, max_steps=1))
    ties = 0
    for row in lines(out / "iter1/pairs.jsonl"):
        tied = row["meta"]["score_annotated"] == row["meta"]["score_generated"]
        assert (row["meta"]["why"] == "tie") == tied
        ties += tied
    assert ties > 0
    _, report = results(out)["iterations"]
    assert report["left_out"]["tie"] == ties
    assert report["pairs"] == 37 - ties


def test_the_seed_decides_the_run(monkeypatch, flags, tmp_path):
    """The same seed gives the same results in another folder, another seed gives others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        more = {"seed": seed, "max_steps": 1, "warmup_iterations": 0}
        run(monkeypatch, dnpo, *flags(tmp_path / name, **more))
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")
    for name in ("iter0/answers.jsonl", "iter1/responses.jsonl", "iter1/new.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, flags, tmp_path, capsys):
    """The example's parts with and without loss, counts and steps; no folder, no model."""
    monkeypatch.setattr(dnpo, "load_lm", no_model)
    monkeypatch.setattr(common, "load_lm", no_model)
    run(monkeypatch, dnpo, *flags(tmp_path / "run", judge_noise=0.2), "--dry_run")
    text = capsys.readouterr().out
    assert "judge toy, 20% of its labels flipped\n" in text
    assert "37 training, 16 held-out prompts" in text
    assert "at most 3 steps" in text
    assert "no loss: '<bos><|user|>" in text
    assert "<eos>' (" in text
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_no_more_steps_than_max_steps(monkeypatch, flags, tmp_path, capsys):
    """Mixing in the previous iteration's pairs doubles the steps, up to --max_steps."""
    for most, steps in ((4, 4), (100, 6)):
        more = flags(tmp_path / "run", mix_previous=True, max_steps=most)
        run(monkeypatch, dnpo, *more, "--dry_run")
        assert f"at most {steps} steps an iteration" in capsys.readouterr().out


def test_the_limit_is_one_of_held_out_prompts_too(monkeypatch, flags, tmp_path, capsys):
    """--limit takes the first of the training prompts, and at most as many held-out ones."""
    run(monkeypatch, dnpo, *flags(tmp_path / "run", limit=5), "--dry_run")
    assert "5 training, 5 held-out prompts" in capsys.readouterr().out
