"""What goes wrong on many GPUs: pre-emption, a dying rank, a full disk, a loss that is not a number; and sharding in every shape. With sams.py, whose scaffold is the others'."""
import errno
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_close, dnpo_flags, environment, forked, lines, metrics, results, run, sams_flags, script, together, weights

import common
import dnpo
import sams

MORE = dict(context="both", epochs=2, max_steps=6, save_every=2, batch=16, micro_batch=4)


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    reference = tmp_path_factory.mktemp("reference")
    return lambda out, **more: sams_flags(world, **({"out": out, "reference": reference} | MORE | more))


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """One run in one process that nothing disturbs."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert forked(sams, *flags(out)) == 0
    return out


def same(out, plain, exact=True):
    """A disturbed run ended as the plain one did: to the bit, or, on another number of ranks, to rounding."""
    assert [m["selected/indices"] for m in metrics(out)] == [m["selected/indices"] for m in metrics(plain)]
    if exact:
        assert metrics(out) == metrics(plain) and results(out) == results(plain)
    for a, b in zip(metrics(plain), metrics(out), strict=True):
        assert (b["loss"], b["grad_norm"], b["rewards/margins"]) == pytest.approx((a["loss"], a["grad_norm"], a["rewards/margins"]), rel=2e-3, abs=2e-4)
    assert_close(weights(out / "checkpoint"), weights(plain / "checkpoint"), atol=0 if exact else 2e-4)


# ---------------------------------------------------------------- ranks

def test_hsdp_is_fsdp_is_one_process(plain, flags, tmp_path):
    """Two nodes of one rank (replicated) and one node of two (sharded), in the same weights and choices as one process; likewise with activation checkpointing."""
    shapes = {"two-nodes": 1, "one-node": 2}
    together(sams, tmp_path, 2, [(local, False, flags(name, parallel="hsdp", activation_checkpointing=local == 1)) for name, local in shapes.items()])
    for name in shapes:
        same(tmp_path / name, plain, exact=False)


def test_a_run_goes_on_on_any_number_of_ranks(plain, flags, tmp_path):
    """Saved by 2 sharded ranks, resumed by 4, saved, resumed by 1: selector, optimizer and order go along."""
    together(sams, tmp_path, 2, [(2, True, flags("run", parallel="fsdp"))])
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2]
    together(sams, tmp_path, 4, [(4, True, [*flags("run", parallel="fsdp"), "--resume"])])
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert forked(sams, *flags(tmp_path / "run", parallel="fsdp"), "--resume") == 0
    same(tmp_path / "run", plain, exact=False)


DYING = """import os, sys
sys.path.insert(0, sys.argv[1])
import sams
from torch.distributed.elastic.multiprocessing.errors import record
real, marker = sams.take_step, sys.argv[2]
count = 0

def take_step(*args):
    global count
    count += 1
    if count == 4 and sams.ranks()[0] == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        raise ValueError("this rank has had enough")
    return real(*args)
sams.take_step = take_step
sys.argv[1:] = sys.argv[3:]
record(sams.main)()
"""


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dying_rank_ends_the_run_with_its_traceback_and_the_run_goes_on(plain, flags, tmp_path, restarts):
    """Rank 1 raises in step 4: torchrun names it and its error. Started again (--max-restarts, or --resume on one process) the run continues from step 2's state."""
    (tmp_path / "dying.py").write_text(DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", str(restarts), str(tmp_path / "dying.py"), str(ROOT),
              str(tmp_path / "marker"), *map(str, flags("run", parallel="ddp"))]
    done = subprocess.run(launch, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert "ValueError: this rank has had enough" in done.stderr and (tmp_path / "marker").exists()
    assert (done.returncode == 0) == (restarts == 1), done.stderr
    if not restarts:
        assert "rank      : 1" in done.stderr and [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3]
        assert forked(sams, *flags(tmp_path / "run"), "--resume") == 0
    same(tmp_path / "run", plain, exact=False)


SLOW = """import datetime, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed.distributed_c10d as c10d
c10d.default_pg_timeout = datetime.timedelta(seconds=3)
import common, sams
sams.setup(sams.Config(parallel="ddp"))
common.barrier()

def work(items, number):
    time.sleep(6 * common.ranks()[0])
    return [{"number": number} for _ in items]
assert len(common.phase(Path("rows.jsonl"), [0, 1], work, 1)) == 2
"""


def test_waiting_for_a_slow_rank_is_no_fault(tmp_path):
    """A sampler or judge that is on one rank slower than torch's own time-out (here 3 s) doesn't trip it."""
    (tmp_path / "slow.py").write_text(SLOW)
    done = script(str(tmp_path / "slow.py"), ROOT, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert [row["number"] for row in lines(tmp_path / "rows.jsonl")] == [0, 1]


# ---------------------------------------------------------------- pre-emption


def preempted(module, *flags, until) -> int:
    """A script in a process of its own, sent SIGTERM once until() -> its exit code."""
    child = subprocess.Popen([sys.executable, module.__file__, *map(str, flags)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not until() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    return child.wait(timeout=120)


def test_sigterm_saves_and_exits_with_0(plain, flags, tmp_path):
    """In training: the step ends, the state is saved although none was due, and --resume ends as a run left alone."""
    out = tmp_path / "run"
    assert preempted(sams, *flags(out, save_every=100), until=lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 2) == 0
    steps = len(metrics(out))
    assert 2 <= steps < 6 and torch.load(out / "state.pt", weights_only=True)["more"]["step"] == steps and not (out / "checkpoint").exists()
    assert forked(sams, *flags(out, save_every=100), "--resume") == 0
    same(out, plain)


def test_sigterm_in_a_phase_keeps_the_finished_batches(world, tmp_path):
    """While sampling: exit code 0, and the batches that were done are not drawn again."""
    out = tmp_path / "run"
    more = dnpo_flags(world, out=out, limit=100, sample_batch=2)
    part = out / "iter0/answers.jsonl.part0"
    assert preempted(dnpo, *more, until=lambda: part.exists() and part.read_text().count("batch") >= 2) == 0
    assert part.read_text().count("batch") >= 2 and not (out / "iter0/answers.jsonl").exists()


# ---------------------------------------------------------------- disk, numbers


def test_a_full_disk_leaves_the_last_state(monkeypatch, plain, flags, tmp_path, capsys):
    """The second save fails half-way: one line says so, the first state loads, and with room the run ends as one left alone."""
    real, saves = torch.save, []

    def full(state, path):
        saves.append(path)
        if len(saves) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(torch, "save", full)
        run(patch, sams, *flags(tmp_path / "run"))
    assert "could not be written" in stop.value.code and "No space left" in stop.value.code and "--resume" in stop.value.code
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["more"]["step"] == 2 and not (tmp_path / "run/state.pt.tmp").exists()
    run(monkeypatch, sams, *flags(tmp_path / "run"), "--resume")
    same(tmp_path / "run", plain)


def test_a_full_disk_leaves_no_half_checkpoint(monkeypatch, plain, flags, tmp_path):
    """The checkpoint is there whole or not at all; --resume writes it."""
    from transformers import PreTrainedTokenizerFast

    def full(self, folder, **more):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="could not be written"):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        run(patch, sams, *flags(tmp_path / "run"))
    assert not [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("checkpoint")]
    run(monkeypatch, sams, *flags(tmp_path / "run"), "--resume")
    same(tmp_path / "run", plain)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_rows(monkeypatch, flags, tmp_path, value):
    """The run stops in that step with the ids of the pairs that were trained on, and writes no line for it."""
    real, calls = sams.dpo_losses, []

    def broken(margin, beta):
        calls.append(margin)
        return real(margin, beta) * (value if len(calls) > 2 else 1)  # the second step's first micro-batch: 8 selected pairs are 2 micro-batches
    monkeypatch.setattr(sams, "dpo_losses", broken)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, sams, *flags(tmp_path / "run"))
    named = [name for name in stop.value.code.split("'") if name.startswith("pair-")]
    assert f"the loss is {value} at step 2" in stop.value.code and len(named) == 8 and len(metrics(tmp_path / "run")) == 1


# ---------------------------------------------------------------- files


def test_a_large_model_is_saved_in_shards_that_load(monkeypatch, world, tmp_path):
    """Weights above the limit become several safetensors files with an index, tied weights once; plain from_pretrained reads them back."""
    from transformers import AutoModelForCausalLM
    tok, _ = common.load_tokenizer(str(world / "sft"))
    scorer = common.Scorer(common.load_lm(str(world / "sft"), torch.float32, "cpu"))
    real = type(scorer.lm).save_pretrained
    monkeypatch.setattr(type(scorer.lm), "save_pretrained", lambda self, folder, **more: real(self, folder, **(more | {"max_shard_size": "500KB"})))
    common.save_checkpoint(tmp_path / "checkpoint", scorer, tok, str(world / "sft"))
    assert len(list((tmp_path / "checkpoint").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "checkpoint/model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in index and "model.embed_tokens.weight" in index
    assert_close(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").named_parameters()), dict(scorer.lm.named_parameters()), atol=0)
