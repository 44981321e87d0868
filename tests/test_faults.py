"""What goes wrong on many GPUs: pre-emption, a dying rank, a full disk, a loss that is no number.

And sharding in every shape. With sams.py, whose scaffold is the others'.
"""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    as_flags,
    assert_close,
    command,
    dnpo_flags,
    environment,
    forked,
    lines,
    metrics,
    results,
    run,
    sams_flags,
    script,
    together,
    weights,
)

import common
import dnpo
import job
import sams
import toy
import tso


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    """Six steps in two epochs, a state after every second: flags for a folder."""
    reference = tmp_path_factory.mktemp("reference")

    def flags_for(out, **more):
        values = {
            "out": out,
            "reference": reference,
            "context": "both",
            "epochs": 2,
            "max_steps": 6,
            "save_every": 2,
            "batch": 16,
            "micro_batch": 4,
        }
        values.update(more)
        return sams_flags(world, **values)

    return flags_for


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """One run in one process that nothing disturbs."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert forked(sams, *flags(out)) == 0
    return out


def assert_same(out: Path, plain: Path, exact: bool):
    """A disturbed run ended as the plain one did: to the bit, or, on other ranks, to rounding."""
    for mine, theirs in zip(metrics(out), metrics(plain), strict=True):
        assert mine["selected/indices"] == theirs["selected/indices"]
        for name in ("loss", "grad_norm", "rewards/margins"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4)
    trained = weights(plain / "checkpoint")
    if exact:
        assert metrics(out) == metrics(plain)
        assert results(out) == results(plain)
        assert_close(weights(out / "checkpoint"), trained, atol=0)
    else:
        assert_close(weights(out / "checkpoint"), trained, atol=2e-4)


def steps_of(out: Path) -> list[int]:
    return [line["step"] for line in metrics(out)]


def saved_step(out: Path) -> int:
    """The step after which the training state was saved."""
    return torch.load(out / "state.pt", weights_only=True)["more"]["step"]


# ---------------------------------------------------------------- ranks


def test_hsdp_is_fsdp_is_one_process(plain, flags, tmp_path):
    """Two nodes of one rank, and one node of two, make one process's weights and choices.

    The model is replicated over nodes and sharded inside of one. Likewise with activation
    checkpointing.
    """
    two_nodes = flags("two-nodes", parallel="hsdp", activation_checkpointing=True)
    one_node = flags("one-node", parallel="hsdp", activation_checkpointing=False)
    together(sams, tmp_path, 2, [(1, False, two_nodes), (2, False, one_node)])
    assert_same(tmp_path / "two-nodes", plain, exact=False)
    assert_same(tmp_path / "one-node", plain, exact=False)


def test_hsdp_shards_inside_a_node_and_replicates_over_nodes(monkeypatch):
    """Two nodes of four ranks: a mesh of 2 x 4, whose second axis is sharded over."""
    asked = []

    def note_mesh(device_type, shape, mesh_dim_names):
        asked.append((device_type, shape, mesh_dim_names))

    monkeypatch.setattr(dist, "init_device_mesh", note_mesh)
    monkeypatch.setattr(job, "world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    job.node_mesh.__wrapped__("cpu")  # without its cache
    assert asked == [("cpu", (2, 4), ("replicate", "shard"))]


def test_a_run_goes_on_on_any_number_of_ranks(plain, flags, tmp_path):
    """Saved by 2 sharded ranks, resumed by 4, saved, resumed by 1.

    Selector, optimizer and order go along.
    """
    out = tmp_path / "run"
    begin = flags("run", parallel="fsdp")
    together(sams, tmp_path, 2, [(2, True, begin)])
    assert steps_of(out) == [1, 2]
    together(sams, tmp_path, 4, [(4, True, [*begin, "--resume"])])
    assert steps_of(out) == [1, 2, 3, 4]
    assert forked(sams, *flags(out, parallel="fsdp"), "--resume") == 0
    assert_same(out, plain, exact=False)


DYING = """import os, sys
sys.path.insert(0, sys.argv[1])
from torch.distributed.elastic.multiprocessing.errors import record
import job
import sams
import tso

marker = sys.argv[2]
take_step = sams.take_step
count = 0


def step_and_die(*args):
    global count
    count += 1
    if count == 4 and job.rank() == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        raise ValueError("this rank has had enough")
    return take_step(*args)


sams.take_step = step_and_die
sys.argv[1:] = sys.argv[3:]
record(sams.main)()
"""


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dying_rank_ends_the_run_with_its_traceback_and_the_run_goes_on(
    plain, flags, tmp_path, restarts
):
    """Rank 1 raises in step 4: torchrun names it and its error.

    Started again (by --max-restarts and --resume, or with --resume on one process) the run
    continues from step 2's state.
    """
    dying, marker = tmp_path / "dying.py", tmp_path / "marker"
    dying.write_text(DYING)
    launch = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("--max-restarts", restarts),
        *(dying, ROOT, marker),
        *flags("run", parallel="ddp"),
        *(["--resume"] if restarts else []),
    ]
    done = subprocess.run(
        [str(part) for part in launch],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "ValueError: this rank has had enough" in done.stderr
    assert marker.exists()

    out = tmp_path / "run"
    if restarts:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0, done.stderr
        assert "rank      : 1" in done.stderr
        assert steps_of(out) == [1, 2, 3]
        assert forked(sams, *flags(out), "--resume") == 0
    assert_same(out, plain, exact=False)


SLOW = """import datetime, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed.distributed_c10d as c10d

c10d.default_pg_timeout = datetime.timedelta(seconds=3)
import job
import sams
import tso


def work(items, number):
    time.sleep(6 * job.rank())
    return [{"number": number} for _ in items]


sams.setup(sams.Config(parallel="ddp"))
job.barrier()
assert len(job.phase(Path("rows.jsonl"), [0, 1], work, 1)) == 2
"""


def test_waiting_for_a_slow_rank_is_no_fault(tmp_path):
    """A sampler or judge that is slower on one rank than torch's time-out (here 3 s) trips none."""
    (tmp_path / "slow.py").write_text(SLOW)
    done = script(str(tmp_path / "slow.py"), ROOT, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert [row["number"] for row in lines(tmp_path / "rows.jsonl")] == [0, 1]


# ---------------------------------------------------------------- pre-emption


def preempted(module, *flags, until) -> int:
    """A script in a process of its own, sent SIGTERM once until() holds; returns its exit code."""
    child = subprocess.Popen(
        command(module.__file__, *flags),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not until() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    return child.wait(timeout=120)


def test_sigterm_saves_and_exits_with_0(plain, flags, tmp_path):
    """In training: the step ends, and the state is saved although none was due.

    --resume ends as a run left alone.
    """
    out = tmp_path / "run"

    def two_steps_made():
        file = out / "metrics.jsonl"
        return file.exists() and len(file.read_text().splitlines()) >= 2

    assert preempted(sams, *flags(out, save_every=100), until=two_steps_made) == 0
    steps = len(metrics(out))
    assert 2 <= steps < 6
    assert saved_step(out) == steps
    assert not (out / "checkpoint").exists()

    assert forked(sams, *flags(out, save_every=100), "--resume") == 0
    assert_same(out, plain, exact=True)


def test_sigterm_in_a_phase_keeps_the_finished_batches(world, tmp_path):
    """While sampling: exit code 0, and the batches that were done are not drawn again."""
    out = tmp_path / "run"
    part = out / "iter0/answers.jsonl.part0"

    def two_batches_drawn():
        return part.exists() and part.read_text().count("batch") >= 2

    more = dnpo_flags(world, out=out, limit=100, sample_batch=2)
    assert preempted(dnpo, *more, until=two_batches_drawn) == 0
    assert part.read_text().count("batch") >= 2
    assert not (out / "iter0/answers.jsonl").exists()


# ---------------------------------------------------------------- disk, numbers


def test_a_full_disk_leaves_the_last_state(monkeypatch, plain, flags, tmp_path):
    """The second save fails half-way: one line says so, and the first state loads.

    With room the run ends as one left alone.
    """
    out, save, paths = tmp_path / "run", torch.save, []

    def save_on_a_full_disk(state, path):
        paths.append(path)
        if len(paths) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(torch, "save", save_on_a_full_disk)
        run(patch, sams, *flags(out))
    assert "could not be written" in stop.value.code
    assert "No space left" in stop.value.code
    assert "--resume" in stop.value.code
    assert saved_step(out) == 2
    assert not (out / "state.pt.tmp").exists()

    run(monkeypatch, sams, *flags(out), "--resume")
    assert_same(out, plain, exact=True)


def test_a_full_disk_leaves_no_half_checkpoint(monkeypatch, plain, flags, tmp_path):
    """The checkpoint is there whole or not at all; --resume writes it."""
    from transformers import PreTrainedTokenizerFast

    out = tmp_path / "run"

    def save_on_a_full_disk(self, folder, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="could not be written"):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_on_a_full_disk)
        run(patch, sams, *flags(out))
    assert not list(out.glob("checkpoint*"))

    run(monkeypatch, sams, *flags(out), "--resume")
    assert_same(out, plain, exact=True)


def mounted(folder: Path, size: str, *, again: bool = False) -> bool:
    """Mounts a small file system in memory on a folder, or changes its size, where that may be."""
    options = f"remount,size={size}" if again else f"size={size}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    try:
        return subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("size, file", [("4m", "state.pt"), ("1500k", "checkpoint")])
def test_a_disk_that_is_really_full(monkeypatch, plain, flags, tmp_path, size, file):
    """torch and safetensors each have an error of their own; with room the run goes on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted(folder, size):
        pytest.skip("only root may mount a file system; run as root, as in a container")
    every = 2 if file == "state.pt" else 100
    try:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, sams, *flags(folder / "run", save_every=every))
        assert f"{file} could not be written (the disk is full: " in stop.value.code
        assert "make room, then start again, a run with --resume" in stop.value.code
        assert not list(folder.rglob("*.tmp"))
        assert mounted(folder, "64m", again=True)
        run(monkeypatch, sams, *flags(folder / "run", save_every=every), "--resume")
        assert_same(folder / "run", plain, exact=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_gradient_that_is_no_number_ends_the_run_at_its_own_rows(monkeypatch, flags, tmp_path):
    """Not at those of the next step; and the state is that of the step before."""
    out, descend, calls = tmp_path / "run", sams.descend, []

    def broken(c, policy, data, indices, device):
        sums = descend(c, policy, data, indices, device)
        calls.append([data.pairs[i].id for i in indices])
        if len(calls) == 3:
            next(policy.parameters()).grad[0, 0] = math.nan  # the loss was a number
        return sums

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sams, "descend", broken)
        run(patch, sams, *flags(out, save_every=1))
    assert stop.value.code.startswith(f"error: the grad_norm is nan at step 3, rows {calls[2]}: ")
    assert steps_of(out) == [1, 2]
    assert saved_step(out) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_rows(monkeypatch, flags, tmp_path, value):
    """The run stops in that step with the ids of the pairs that were trained on.

    It writes no line for the step.
    """
    out, dpo_losses, calls = tmp_path / "run", sams.dpo_losses, []

    def broken(*args):
        calls.append(args)
        losses = dpo_losses(*args)
        if len(calls) > 3:  # the first step's: for the bandit, and of 2 micro-batches of 4 pairs
            losses = losses * value
        return losses

    monkeypatch.setattr(sams, "dpo_losses", broken)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, sams, *flags(out))
    assert f"the loss is {value} at step 2" in stop.value.code
    named = [name for name in stop.value.code.split("'") if name.startswith("pair-")]
    assert len(named) == 8
    assert len(metrics(out)) == 1


# ---------------------------------------------------------------- the toy world


def test_a_world_that_is_made_twice_at_once_is_made_once(tmp_path):
    """The second waits for the first, and no lock is left."""
    folder, made, children = tmp_path / "toy", tmp_path / "made", []
    make_alone = toy.make_alone

    def note(*args):
        make_alone(*args)
        made.touch(exist_ok=False)

    for _ in range(2):
        child = os.fork()
        if not child:
            try:
                toy.make_alone = note
                toy.make(folder, steps=4, rows=8)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "toy"]
    assert (folder / "sft/model.safetensors").is_file()


def test_a_world_that_is_told_to_stop_leaves_nothing(monkeypatch, tmp_path):
    """Half of it would be a world without models."""
    asked = threading.Event()
    asked.set()
    monkeypatch.setattr(job, "STOP", asked)
    toy.make(tmp_path / "toy", steps=4, rows=8)
    assert [file.name for file in tmp_path.iterdir()] == ["toy.lock"]


# ---------------------------------------------------------------- files


def test_a_large_model_is_saved_in_shards_that_load(monkeypatch, world, tmp_path):
    """Weights above the limit become several safetensors files with an index.

    Tied weights are saved once; plain from_pretrained reads them back.
    """
    from transformers import AutoModelForCausalLM

    source, folder = str(world / "sft"), tmp_path / "checkpoint"
    tok, _ = common.load_tokenizer(source)
    scorer = common.Scorer(common.load_lm(source, torch.float32, "cpu"))
    save_pretrained = type(scorer.lm).save_pretrained

    def save_in_shards(self, folder, **more):
        more["max_shard_size"] = "500KB"
        save_pretrained(self, folder, **more)

    monkeypatch.setattr(type(scorer.lm), "save_pretrained", save_in_shards)
    job.save_checkpoint(folder, scorer, tok, source)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert "model.embed_tokens.weight" in index["weight_map"]

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    saved = dict(scorer.lm.named_parameters())
    assert_close(dict(loaded.named_parameters()), saved, atol=0)


def test_a_checkpoint_has_the_generation_config_of_its_source(world, tmp_path):
    """Whoever loads it samples as the source did; our own sampling does without these settings."""
    from transformers import GenerationConfig

    source, folder = tmp_path / "source", tmp_path / "checkpoint"
    shutil.copytree(world / "sft", source)
    config = GenerationConfig.from_pretrained(source)
    config.update(do_sample=True, temperature=0.3, top_k=5)
    config.save_pretrained(source)

    tok, _ = common.load_tokenizer(str(source))
    scorer = common.Scorer(common.load_lm(str(source), torch.float32, "cpu"))
    assert scorer.lm.generation_config.temperature != 0.3
    job.save_checkpoint(folder, scorer, tok, str(source))
    assert GenerationConfig.from_pretrained(folder).to_diff_dict() == config.to_diff_dict()


def test_the_last_checkpoint_may_be_saved_in_half_the_size(world, tmp_path, monkeypatch):
    """--save_dtype bfloat16: its weights are rounded, it loads as such, those before are exact."""
    from transformers import AutoModelForCausalLM

    unrounded = {}
    save = job.save_checkpoint

    def save_and_keep(folder, scorer, *more):
        names = [name.removeprefix("lm.") for name, _ in scorer.named_parameters()]
        values = [value.detach().clone() for value in scorer.parameters()]
        unrounded[folder.relative_to(tmp_path)] = dict(zip(names, values))
        save(folder, scorer, *more)

    monkeypatch.setattr(job, "save_checkpoint", save_and_keep)
    few = {"limit": 16, "max_steps": 1, "save_dtype": "bfloat16"}
    run(monkeypatch, dnpo, *dnpo_flags(world, out=tmp_path / "dnpo", test_prompts=2, **few))
    half = {"preselect": 0.5, "preselect_splits": 1}
    run(monkeypatch, sams, *sams_flags(world, out=tmp_path / "sams", **half, **few))
    tso_few = {"data": world / "train.jsonl", "test": world / "test.jsonl", "slices": 2}
    tso_few.update(model=world / "sft", older=world / "sft-early", smaller=world / "sft-small")
    tso_few.update(batch=4, micro_batch=4, test_prompts=2, n_scores=0, judge="toy", preset="toy")
    run(monkeypatch, tso, *as_flags({**tso_few, **few, "out": tmp_path / "tso"}))

    last = [Path("dnpo/iter2/checkpoint"), Path("sams/checkpoint")]
    last.append(Path("tso/round1-slice2/checkpoint"))
    assert len(unrounded) == 2 + 3 + 2
    assert unrounded.keys() > set(last)
    for folder, exact in unrounded.items():
        dtype = torch.bfloat16 if folder in last else torch.float32
        loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / folder).named_parameters())
        assert_close(loaded, {name: exact[name].to(dtype) for name in loaded}, atol=0)
        assert {value.dtype for value in weights(tmp_path / folder).values()} == {dtype}
