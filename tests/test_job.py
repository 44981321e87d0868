"""A training run goes on where it was saved, stops when it must, and says what it does; flags.

The training here is a linear layer that AdamW fits, so that a run takes milliseconds.
"""

import dataclasses
import datetime
import errno
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, lines
from safetensors import SafetensorError

import dnpo
import job

STEPS = [[0, 1, 2], [3, 4, 5], [6, 7], [0, 2, 4], [1, 3, 5], [6]]


@pytest.fixture
def sigterm():
    """This process listens to SIGTERM, as a script does."""
    before = signal.getsignal(signal.SIGTERM)
    job.stop_on_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)
    job.STOP.clear()


class Died(Exception):
    """In the place of a kill."""


class Training:
    """A run of job.TrainingRun with a method that is as small as it gets."""

    def __init__(self, folder, steps=STEPS, save_every=2, **more):
        torch.manual_seed(0)
        self.net = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)
        self.file = folder / "metrics.jsonl"
        self.made = []
        c = SimpleNamespace(save_every=save_every)
        parts = {"net": (self.net, self.optimizer)}
        more.setdefault("note", "training")
        self.run = job.TrainingRun(c, folder, steps, parts, "cpu", metrics=self.file, **more)

    def go(self, dies_in=None, stops_in=None, loss=0.5, reward=0.0):
        """Makes the run's steps.

        It dies when it has measured the step `dies_in`, and is sent SIGTERM in the step `stops_in`,
        both from 0.
        """
        for step in self.run:
            self.net(torch.ones(2) * step).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.made.append(step)
            if step == stops_in:
                os.kill(os.getpid(), signal.SIGTERM)
            self.measure(step, loss, reward)
            if step == dies_in:
                raise Died

    def measure(self, step, loss=0.5, reward=0.0, more=""):
        """Writes the step's line of metrics."""
        metrics = self.run.reduce(step, sums_of(loss, reward), ["x", "y"])
        self.run.write(step, metrics, lr=4.8e-7, grad_norm=3.14, more=more)

    def weights(self) -> list[float]:
        return [*self.net.weight.flatten().tolist(), self.net.bias.item()]

    def steps_on_file(self) -> list[int]:
        return [line["step"] for line in lines(self.file)]


def sums_of(loss: float, reward: float) -> dict[str, torch.Tensor]:
    """What a method gives to reduce()."""
    values = {
        "loss": loss,
        "rewards/chosen": reward,
        "rewards/size": abs(reward),
        "rewards/margins": -0.25,
        "rewards/accuracies": 0.75,
    }
    return {name: torch.tensor(value) for name, value in values.items()}


def saved_step(folder) -> int:
    """The step after which the state in the folder was saved."""
    return torch.load(folder / "state.pt", weights_only=True)["more"]["step"]


def killed(folder, dies_in, **more) -> Training:
    """A run that was killed in the step `dies_in`."""
    training = Training(folder, **more)
    with pytest.raises(Died):
        training.go(dies_in=dies_in)
    return training


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    """Its number is the rank's on its node; outside of torchrun it is the first one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert job.own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert job.own_device() == torch.device("cuda", 3)


@pytest.mark.skipif(not job.LIBC, reason="the allocators of other systems take no such orders")
def test_on_a_cpu_a_freed_block_is_used_again_without_new_pages(monkeypatch):
    """By default each block of 64 MiB is given back, and the next one is new."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job.keep_freed_blocks(False)
    given_back = new_pages_of_64_mib()
    assert job.own_device() == torch.device("cpu")
    for _ in range(50):  # the heap grows until there is a block that fits
        kept = new_pages_of_64_mib()
    assert kept < given_back / 10


def new_pages_of_64_mib() -> int:
    """How many pages the system has to hand out for numbers of 64 MiB, which are then freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# ---------------------------------------------------------------- resume


MANY_SHAPES = """
import job, torch

def used_mib():
    job.LIBC.malloc_trim(0)
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

job.own_device()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in range(1, 301):
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
    if rows == 100:
        before = used_mib()
print(used_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process uses is read in /proc")
def test_on_a_cpu_products_of_new_shapes_take_no_new_memory():
    """oneDNN would keep half a MiB for each of 200 more shapes, where it computes in bf16."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 10


def test_a_run_makes_every_step_once_and_leaves_a_line_for_each(tmp_path):
    """Steps are numbered from 0 in the loop, from 1 in the file."""
    training = Training(tmp_path)
    training.go()
    assert training.made == [0, 1, 2, 3, 4, 5]
    assert training.steps_on_file() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dies_in, first", [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_a_killed_run_begins_after_the_last_saved_step(tmp_path, dies_in, first):
    """Weights and moments are those of that step, so that the end is that of a run left alone."""
    (tmp_path / "alone").mkdir()
    alone = Training(tmp_path / "alone")
    alone.go()

    killed(tmp_path, dies_in)
    again = Training(tmp_path)
    again.go()
    assert again.made == list(range(first, 6))
    assert again.weights() == alone.weights()
    assert again.steps_on_file() == [1, 2, 3, 4, 5, 6]


def test_lines_after_the_saved_step_are_dropped_on_resume(tmp_path):
    """What will be measured again goes, and so does a torn last line; what is saved stays."""
    killed(tmp_path, dies_in=2)
    file = tmp_path / "metrics.jsonl"
    with open(file, "a") as torn:
        torn.write('{"step": 4, "lo')
    assert Training(tmp_path).steps_on_file() == [1, 2]


def test_lines_of_other_iterations_stay(tmp_path):
    """With {"iteration": 2}: those of 1 and of 3 stay, whatever their step."""
    file = tmp_path / "metrics.jsonl"
    killed(tmp_path, dies_in=2, tags={"iteration": 2})
    found = [{"iteration": 1, "step": step} for step in (1, 2, 3, 4)]
    found += lines(file)
    found.append({"iteration": 3, "step": 1})
    file.write_text(job.json_lines(found))

    Training(tmp_path, tags={"iteration": 2})
    kept = [(line["iteration"], line["step"]) for line in lines(file)]
    assert kept == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1)]


def test_a_run_without_a_saved_state_keeps_the_lines_of_the_iterations_before(tmp_path):
    """Iteration 2 begins: iteration 1 stays, and a first try at iteration 2 goes."""
    file = tmp_path / "metrics.jsonl"
    found = [{"iteration": 1, "step": 9}, {"iteration": 2, "step": 1}]
    file.write_text(job.json_lines(found))
    Training(tmp_path, tags={"iteration": 2})
    assert lines(file) == [{"iteration": 1, "step": 9}]


class Kept:
    """Something else that a run keeps, as SamS keeps its bandit."""

    def __init__(self, rounds):
        self.rounds = rounds

    def state(self):
        return {"rounds": self.rounds}

    def restore(self, state):
        self.rounds = state["rounds"]


def test_what_a_run_keeps_is_saved_and_restored(tmp_path):
    """restore() gets the state() of the saved step; without a saved state it is not called."""
    bandit = Kept(7)
    training = Training(tmp_path, keeps={"bandit": bandit})
    assert bandit.rounds == 7
    for step in training.run:
        bandit.rounds += 1
        training.measure(step)
        if step == 3:
            break  # steps 0 and 1 are saved

    again = Kept(0)
    Training(tmp_path, keeps={"bandit": again})
    assert again.rounds == 9


def test_a_state_without_a_kept_thing_leaves_it_as_it_is(tmp_path):
    """A state that was saved by a run that kept nothing loads all the same."""
    killed(tmp_path, dies_in=2)
    bandit = Kept(7)
    training = Training(tmp_path, keeps={"bandit": bandit})
    assert bandit.rounds == 7
    assert training.run.first == 2


@pytest.mark.parametrize("way", ["truncated", "empty", "garbage", "a list"])
def test_a_damaged_state_is_named(tmp_path, capsys, way):
    """One line says that the training begins again if the file is deleted, and so it does."""
    killed(tmp_path, dies_in=2)
    state = tmp_path / "state.pt"
    content = state.read_bytes()
    state.write_bytes({"truncated": content[:-100], "empty": b""}.get(way, b"garbage" * 9))
    if way == "a list":
        torch.save([1, 2], state)
    assert f"{state} is damaged" in died(capsys, Training, tmp_path)
    state.unlink()
    assert Training(tmp_path).run.first == 0


@pytest.mark.parametrize("kept", [0, 1])
def test_steps_that_are_saved_must_have_their_lines(tmp_path, capsys, kept):
    """Without its line, a step that will not be made again would be missing for ever."""
    killed(tmp_path, dies_in=2)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    line = died(capsys, Training, tmp_path)
    assert str(file) in line
    assert "state.pt" in line
    (tmp_path / "state.pt").unlink()
    assert Training(tmp_path).run.first == 0


@pytest.mark.parametrize("more", [{"steps": STEPS[:4]}, {"tags": {"iteration": 2}}])
def test_a_state_of_another_training_is_refused(tmp_path, capsys, more):
    """A state of other data or of another iteration is no state of this one."""
    killed(tmp_path, dies_in=2)
    line = died(capsys, Training, tmp_path, **more)
    assert "saved in another iteration or run" in line


def died(capsys, work, *args, **more) -> str:
    """The one line with which work() ends the program, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        work(*args, **more)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---------------------------------------------------------------- saving and stopping


@pytest.mark.parametrize(
    "save_every, saved",
    [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (3, [3]), (4, [4]), (6, []), (100, [])],
)
def test_a_state_is_saved_after_every_so_many_steps_but_the_last(
    monkeypatch, tmp_path, save_every, saved
):
    """After the last step there is a checkpoint to write, and a state would be of no use."""
    steps = []

    def save_state(path, parts, **more):
        assert path == tmp_path / "state.pt"
        assert list(parts) == ["net"]
        steps.append(more["step"])

    monkeypatch.setattr(job, "save_state", save_state)
    Training(tmp_path, save_every=save_every).go()
    assert steps == saved


def test_sigterm_lets_the_step_end_saves_and_exits_with_0(sigterm, tmp_path, capsys):
    """The state is saved although none was due; the run that goes on makes the other steps."""
    training = Training(tmp_path, save_every=100)
    with pytest.raises(SystemExit) as stop:
        training.go(stops_in=1)
    assert stop.value.code == 0
    assert capsys.readouterr().err == (
        "SIGTERM: what is done is saved; start again, a run with --resume\n"
    )
    assert training.made == [0, 1]
    assert training.steps_on_file() == [1, 2]
    assert saved_step(tmp_path) == 2

    job.STOP.clear()
    again = Training(tmp_path, save_every=100)
    again.go()
    assert again.made == [2, 3, 4, 5]


def test_sigterm_in_the_last_step_lets_the_checkpoint_be_written(sigterm, tmp_path):
    """The loop ends as if nothing had come, and what follows it is the checkpoint."""
    training = Training(tmp_path, save_every=4)
    training.go(stops_in=5)
    assert job.STOP.is_set()
    assert training.steps_on_file() == [1, 2, 3, 4, 5, 6]
    assert saved_step(tmp_path) == 4


def on_two_ranks(folder, work) -> list[int]:
    """work(rank) in two processes of one group; returns their exit codes, 1 without sys.exit()."""
    children = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            be_rank(rank, folder, work)
        children.append(child)
    codes = []
    for child in children:
        _, status = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    return codes


def be_rank(rank: int, folder, work):
    """The life of one of the two processes."""
    code = 1
    try:
        store = dist.FileStore(str(folder / "store"), 2)
        patience = datetime.timedelta(seconds=20)  # for a rank that has left
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
        work(rank)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(sigterm, tmp_path, capfd):
    """Sums are over the ranks, on both of them; a line is written once; the exit code is 0."""

    def work(rank):
        training = Training(tmp_path, save_every=100)
        for step in training.run:
            if step == 1 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            metrics = training.run.reduce(step, sums_of(0.25 + rank, 0.0), [])
            assert metrics == {
                "loss": 0.25 + 1.25,
                "rewards/chosen": 0.0,
                "rewards/margins": -0.5,
                "rewards/accuracies": 1.5,
            }
            training.run.write(step, metrics, lr=0.1, grad_norm=1.0)

    codes = on_two_ranks(tmp_path, work)
    err = capfd.readouterr().err
    assert codes == [0, 0], err
    assert err.count("SIGTERM: what is done is saved") == 1
    found = [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")]
    assert found == [(1, 1.5), (2, 1.5)]
    assert saved_step(tmp_path) == 2


def test_a_signal_to_one_rank_stops_a_phase_on_all(sigterm, tmp_path, capfd):
    """Rank 1 ends after the batch that it is at, rank 0 waits no longer; finished batches stay."""
    path = tmp_path / "rows.jsonl"

    def work(rank):
        def rows(items, number):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return [{"item": item} for item in items]

        job.phase(path, list(range(8)), rows, 1)

    codes = on_two_ranks(tmp_path, work)
    assert codes == [0, 0], capfd.readouterr().err
    assert not path.exists()
    done = [[row["batch"] for row in job.whole_lines(part)] for part in job.parts_of(path)]
    assert done == [[0, 2, 4, 6], [1]]


@pytest.mark.parametrize(
    "place, where",
    [("iteration 3", "iteration 3, step 1"), ("", "step 1")],
)
@pytest.mark.parametrize("loss, name", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, loss, name, place, where):
    """The message names the place, the step and the rows; the step leaves no line."""
    training = Training(tmp_path, place=place)
    with pytest.raises(SystemExit) as stop:
        training.go(loss=loss)
    assert stop.value.code == (
        f"error: the loss is {name} at {where}, rows ['x', 'y']: "
        "lower the learning rate, or look at these rows"
    )
    assert training.steps_on_file() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["grad_norm", "selector/fit"])
def test_whatever_a_step_has_measured_must_be_a_number(tmp_path, name, value):
    """The step's own rows are named; it leaves no line, and no state is saved after it."""
    training = Training(tmp_path, save_every=1)
    with pytest.raises(SystemExit) as stop:
        for step in training.run:
            metrics = training.run.reduce(step, sums_of(0.5, 0.0), [f"row {step}"])
            norm = value if step == 2 and name == "grad_norm" else 1.0
            if step == 2 and name != "grad_norm":
                metrics[name] = value
            training.run.write(step, metrics, lr=0.1, grad_norm=norm)
    assert stop.value.code.startswith(f"error: the {name} is {value} at step 3, rows ['row 2']")
    assert training.steps_on_file() == [1, 2]
    assert saved_step(tmp_path) == 2


@pytest.mark.parametrize("norm, steps", [(math.nan, 0), (math.inf, 0), (1.0, 1)])
def test_there_is_no_step_with_a_gradient_that_is_no_number(norm, steps):
    """The weight stays as it was, the gradient is gone, and the norm is returned."""
    weight = torch.nn.Parameter(torch.tensor(2.0))
    weight.grad = torch.tensor(norm)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert dnpo.take_step(optimizer, 0.5, clip=9.0) == pytest.approx(norm, nan_ok=True)
    assert weight.item() == 2.0 - 0.5 * steps
    assert weight.grad is None


def test_rewards_that_cancel_are_warned_of_too(tmp_path, capsys):
    """Before the first step their mean is 0, but not their size."""
    training = Training(tmp_path)
    sums = {**sums_of(0.5, 0.0), "rewards/size": torch.tensor(0.25)}
    metrics = training.run.reduce(0, sums, [])
    assert "a reward of +0.0000, in absolute value 0.2500" in capsys.readouterr().err
    assert "rewards/size" not in metrics


@pytest.mark.parametrize("reward", [0.0011, -0.5])
def test_a_policy_that_is_not_its_reference_is_warned_of_before_the_first_step(
    tmp_path, capsys, reward
):
    """One warning with the reward, which should be 0; the run goes on."""
    training = Training(tmp_path)
    training.go(reward=reward)
    assert capsys.readouterr().err == (
        "warning: before the first step the policy differs from its reference "
        f"by a reward of {reward:+.4f}, in absolute value {abs(reward):.4f}; "
        "both should be 0, but for rounding (bf16, several pairs a pass)\n"
    )
    assert len(training.made) == 6


def test_rounding_is_not_warned_of_and_later_rewards_are_what_training_is_for(tmp_path, capsys):
    """Up to 0.001 before the first step, and anything after it, is silent; after a resume too."""
    Training(tmp_path / "a").go(reward=0.0009)
    killed(tmp_path / "b", dies_in=2)
    Training(tmp_path / "b").go(reward=0.7)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- what a run says


class Clock:
    """A time.monotonic() that stands still between two steps."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def go_by(clock: Clock, training: Training, more: str = ""):
    """Makes the run's steps, each of which takes two seconds."""
    for step in training.run:
        clock.now += 2.0
        training.measure(step, more=more)


def test_every_quarter_of_the_steps_is_a_printed_line_without_a_terminal(
    monkeypatch, tmp_path, capsys
):
    """Its rate and the time that is left are those of the steps that this start has made."""
    steps = [[0, 1, 2], [3, 4, 5], [6], [0, 1], [2], [3], [4], [5, 6]] * 8
    clock = Clock()
    monkeypatch.setattr(job, "time", clock)
    monkeypatch.setattr(job, "memory_gib", lambda device: 1.52)
    tags = {"iteration": 3}
    training = Training(tmp_path, steps, save_every=100, tags=tags)
    go_by(clock, training, more=" · kept 8")
    assert capsys.readouterr().out.splitlines() == [
        "iter 3 · step 16/64 · loss 0.500 · margin -0.25 · acc 0.75 · |g| 3.1 · lr 4.8e-07"
        " · 0.9 pair/s · 1.5 GiB · 1:36 left · kept 8",
        "iter 3 · step 32/64 · loss 0.500 · margin -0.25 · acc 0.75 · |g| 3.1 · lr 4.8e-07"
        " · 0.9 pair/s · 1.5 GiB · 1:04 left · kept 8",
        "iter 3 · step 48/64 · loss 0.500 · margin -0.25 · acc 0.75 · |g| 3.1 · lr 4.8e-07"
        " · 0.9 pair/s · 1.5 GiB · 0:32 left · kept 8",
        "iter 3 · step 64/64 · loss 0.500 · margin -0.25 · acc 0.75 · |g| 3.1 · lr 4.8e-07"
        " · 0.9 pair/s · 1.5 GiB · 0:00 left · kept 8",
    ]


def test_no_more_lines_are_printed_than_quarters(tmp_path, capsys):
    """Seven steps don't give seven lines."""
    training = Training(tmp_path, [[0]] * 7, save_every=100)
    for step in training.run:
        training.measure(step)
    printed = re.findall(r"step (\d)/7", capsys.readouterr().out)
    assert printed == ["2", "4", "6", "7"]


def test_peak_memory_is_this_programs_own():
    """Linux's ru_maxrss also counts what ran in the process before it, here one GiB."""
    small = "import job; print(job.memory_gib('cpu'))"
    large = (
        "import os, sys; kept = b'x' * 2**30; "
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    )
    peaks = []
    for command in (["-c", small], ["-c", large, small]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout))
    assert 0.05 < peaks[0] < 2
    assert abs(peaks[1] - peaks[0]) < 0.1


def test_rate_and_time_left_count_the_steps_since_the_start(monkeypatch, tmp_path, capsys):
    """After a resume: pairs of steps 3 and 4 only, and 2 seconds for each step that is left."""
    killed(tmp_path, dies_in=2)
    clock = Clock()
    monkeypatch.setattr(job, "time", clock)
    monkeypatch.setattr(job, "memory_gib", lambda device: 1.52)
    capsys.readouterr()
    training = Training(tmp_path, save_every=100)
    go_by(clock, training)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(
        "step 3/6 · loss 0.500 · margin -0.25 · acc 0.75 · |g| 3.1"
        " · lr 4.8e-07 · 1.0 pair/s · 1.5 GiB · 0:06 left"
    )
    rates = [line["pairs_per_second"] for line in lines(training.file)[2:]]
    assert rates == [2 / 2, 5 / 4, 8 / 6, 9 / 8]


def test_a_line_of_metrics_has_tags_step_sums_and_what_the_step_was_made_with(
    monkeypatch, tmp_path
):
    """In this order; numbers are whole, and what is only shown is not in the file."""
    clock = Clock()
    monkeypatch.setattr(job, "time", clock)
    monkeypatch.setattr(job, "memory_gib", lambda device: 1.52)
    training = Training(tmp_path, tags={"iteration": 3, "slice": "1.2"})
    go_by(clock, training, more=" · kept 8")
    first, *_ = training.file.read_text().splitlines()
    assert first == json.dumps(
        {
            "iteration": 3,
            "slice": "1.2",
            "step": 1,
            "loss": 0.5,
            "rewards/chosen": 0.0,
            "rewards/margins": -0.25,
            "rewards/accuracies": 0.75,
            "grad_norm": 3.14,
            "lr": 4.8e-7,
            "memory_gib": 1.52,
            "pairs_per_second": 1.5,
        }
    )


def test_a_clock_that_stands_still_ends_nothing(monkeypatch, tmp_path):
    """A step of no duration has a rate all the same."""
    monkeypatch.setattr(job, "time", Clock())
    training = Training(tmp_path)
    training.go()
    assert all(math.isfinite(line["pairs_per_second"]) for line in lines(training.file))


# ---------------------------------------------------------------- the console


def test_nobody_needs_to_read_what_a_run_says():
    """A pipe whose reader has left takes everything and ends nothing."""
    read, write = os.pipe()
    console = job.Console(os.fdopen(write, "w"))
    console.write("a line\n")
    os.close(read)
    console.flush()
    print("x" * 100_000, file=console, flush=True)
    console.close()


def test_a_terminal_without_the_characters_shows_question_marks():
    """An ASCII terminal's encoding ends nothing."""
    raw = io.BytesIO()
    console = job.Console(io.TextIOWrapper(raw, encoding="ascii"))
    print("step 1 · loss", file=console, flush=True)
    assert raw.getvalue() == b"step 1 ? loss\n"


# ---------------------------------------------------------------- one program at a time


def holder(monkeypatch, path, rank: int, world: int) -> int:
    """A process, one of a run's ranks, that holds a lock until it is killed; returns its id."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        monkeypatch.setattr(job, "rank", lambda: rank)
        monkeypatch.setattr(job, "world_size", lambda: world)
        job.hold(path, path.parent)
        os.write(told, b".")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    return child


def test_a_lock_names_its_holder_and_is_free_when_that_is_dead(monkeypatch, tmp_path, capsys):
    """Killed or ended: nobody has to delete anything."""
    lock = tmp_path / "lock"
    child = holder(monkeypatch, lock, rank=0, world=1)
    line = died(capsys, job.hold, lock, tmp_path)
    assert f"{tmp_path} is in use by process {child} on " in line
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    job.hold(lock, tmp_path)
    job.hold(lock, tmp_path)  # the same program may come again


def test_a_rank_that_has_outlived_the_others_keeps_the_lock(monkeypatch, tmp_path, capsys):
    """Every rank of a run holds it, and so a newcomer is refused as long as one of them lives."""
    lock = tmp_path / "lock"
    first = holder(monkeypatch, lock, rank=0, world=2)
    second = holder(monkeypatch, lock, rank=1, world=2)
    for child in (first, second):
        assert f"is in use by process {first} on " in died(capsys, job.hold, lock, tmp_path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    job.hold(lock, tmp_path)


# ---------------------------------------------------------------- phases


def numbered(path, n: int, **more) -> list[dict]:
    """A phase that makes n rows with the ids "0", "1", ... in batches of two."""

    def work(items, number):
        return [{"id": str(item)} for item in items]

    items = list(range(n))
    return job.phase(path, items, work, 2, ids=[str(item) for item in items], **more)


@pytest.mark.parametrize(
    "way, words",
    [
        (lambda text: text[:30], ":3 is damaged (JSONDecodeError"),
        (lambda text: "", "is damaged (0 rows, not 6)"),
        (lambda text: text[12:], "is damaged (5 rows, not 6)"),
        (lambda text: text[12:] + text[:12], "a row '0' where it is not expected"),
        (lambda text: text.replace("0", "\0"), ":1 is damaged"),
        (lambda text: text.replace("0", "\udcff"), ":1 is damaged (UnicodeDecodeError"),
        (lambda text: "7\n" * 6, ":1 is damaged (a int, not a dict)"),
    ],
)
def test_a_file_of_a_finished_phase_is_looked_at(tmp_path, capsys, way, words):
    """Torn, empty, shortened, reordered, binary or of other rows: it is named, and made again."""
    path = tmp_path / "rows.jsonl"
    whole = numbered(path, 6)
    path.write_bytes(way(path.read_text()).encode(errors="surrogateescape"))
    line = died(capsys, numbered, path, 6)
    assert words in line
    assert "delete it, and it is made again" in line
    path.unlink()
    assert numbered(path, 6) == whole


def test_a_damaged_part_costs_its_batch_only(tmp_path):
    """Lines that are no rows of ours are left out, whatever is in them; names may hold brackets."""
    path = tmp_path / "rows[1].jsonl"
    asked = []

    def work(items, number):
        asked.append(number)
        if number == 2:
            raise KeyError
        return [{"item": item} for item in items]

    with pytest.raises(KeyError):
        job.phase(path, list(range(6)), work, 2)
    part = tmp_path / "rows[1].jsonl.part0"
    content = part.read_bytes()
    part.write_bytes(b"\xff\xfe\n[1]\n" + b"[" * 9999 + b"\n" + content + b'{"stamp": "\0')
    asked.clear()
    with pytest.raises(KeyError):
        job.phase(path, list(range(6)), work, 2)
    assert asked == [2]


# ---------------------------------------------------------------- files


def test_the_longest_items_of_a_phase_come_first_and_their_rows_in_order(tmp_path):
    """A batch that is too large for the memory is not the last one, after hours."""
    seen = []

    def work(items, number):
        seen.append((number, items))
        return [{"x": item} for item in items]

    rows = job.phase(tmp_path / "o.jsonl", [3, 1, 5, 2, 4], work, 2, key=lambda item: item)
    assert seen == [(2, [5]), (1, [3, 4]), (0, [1, 2])]
    assert [row["x"] for row in rows] == [3, 1, 5, 2, 4]


def test_only_the_ranks_parts_are_parts(tmp_path):
    """What else begins with the file's name is somebody's own."""
    mine = [tmp_path / "o.jsonl.partial", tmp_path / "o.jsonl.part"]
    for file in mine:
        file.write_text('{"stamp": 1}\n')
    (tmp_path / "o.jsonl.part0").write_text("\n")
    job.phase(tmp_path / "o.jsonl", [1], lambda items, number: [{"x": 1}], 1)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "o.jsonl", *mine])


def test_rows_come_back_from_json_lines_as_they_were(tmp_path):
    """Line separators other than \\n do not end a row, and no character is escaped away."""
    rows = [{"text": "a\u2028b\u0085c\x0cd\x1ee é 語"}, {"n": 1, "none": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text(job.json_lines(rows))
    assert job.read_jsonl(path) == rows
    assert "語" in path.read_text()


def test_a_failed_write_leaves_the_old_file_and_one_line(tmp_path):
    """Nothing of a half-written file is left; any other fault than the disk's goes its way."""
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(SystemExit) as stop, job.all_or_nothing(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full\nand more")
    assert stop.value.code == (
        f"error: {path} could not be written (disk full); what was there is intact: "
        "mend that, then start again, a run with --resume"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), job.all_or_nothing(path):
        raise KeyError


def test_a_name_that_is_too_long_for_its_temporary_is_one_line(tmp_path):
    """A file of 252 characters could be, but not with .tmp behind it."""
    with pytest.raises(SystemExit, match="File name too long"):
        job.write_atomic(tmp_path / ("x" * 252), "text")


@pytest.mark.parametrize(
    "fault, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "(the disk is full: "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "(the disk is full: "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "(the disk is full:"),
        (RuntimeError("unexpected pos 64 vs 0"), "(unexpected pos 64 vs 0): mend that"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long): mend that"),
    ],
)
def test_what_a_disk_refuses_is_one_line(tmp_path, fault, words):
    """Whoever says it, and without a last one that would be intact."""
    with pytest.raises(SystemExit) as stop, job.all_or_nothing(tmp_path / "a/state"):
        raise fault
    assert words in stop.value.code
    assert "intact" not in stop.value.code
    assert "\n" not in stop.value.code


# ---------------------------------------------------------------- the run's folder


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The flags that open_run reads, and one that it compares."""

    out: str
    data: str = ""
    preset: str = ""
    beta: float = 0.1
    resume: bool = False
    overwrite: bool = False


def opened(out, **more):
    """A run's folder, as a script makes or enters it."""
    c = RunFlags(str(out), **more)
    return job.open_run(c, [c.data], ("resume", "overwrite"))


def test_only_a_run_of_ours_is_overwritten(tmp_path, capsys):
    """A model's folder has a config.json too; a run loses all but its lock."""
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert "holds no run" in died(capsys, opened, model, overwrite=True)
    assert [file.name for file in model.iterdir()] == ["config.json"]

    opened(run)
    (run / "iter1").mkdir()
    (run / "metrics.jsonl").touch()
    opened(run, overwrite=True)
    assert sorted(file.name for file in run.iterdir()) == ["config.json", "lock", "run.json"]


def test_a_run_that_was_half_deleted_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    """Killed while --overwrite deletes: what is left of the old run has the old flags."""
    run = tmp_path / "run"
    opened(run)
    (run / "iter1").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        listed = order(list(run.iterdir()))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "iterdir", lambda self, listed=listed: iter(listed))
            patch.setattr(job.shutil, "rmtree", killed)
            opened(run, overwrite=True, beta=5.0)
        assert "--beta" in died(capsys, opened, run, resume=True, beta=5.0)


@pytest.mark.parametrize("place", ["", "..", "below/it"])
def test_a_run_is_not_made_where_its_input_is(tmp_path, capsys, place):
    """Equal to, above, or inside of a folder that another flag names."""
    model = tmp_path / "a/model"
    model.mkdir(parents=True)
    line = died(capsys, opened, model / place, data=str(model), overwrite=True)
    assert "--data" in line or "holds no run" in line
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", model]


@pytest.mark.parametrize("spec", ["{}:train", "rm:{}", "hf:{}"])
def test_inputs_are_found_behind_a_judges_kind_and_before_a_split(tmp_path, capsys, spec):
    """--overwrite would delete them with the run that they lie in."""
    run = opened(tmp_path / "run")
    (run / "kept").mkdir()
    line = died(capsys, opened, run, data=spec.format(run / "kept"), overwrite=True)
    assert "--data" in line
    assert (run / "kept").exists()


def test_a_word_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    """A folder may have the name of a preset, and the run may lie in it."""
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    opened(Path("toy/run"), preset="toy")


@pytest.mark.parametrize("more", [{}, {"overwrite": True}])
def test_a_restart_by_torchrun_goes_on_only_where_it_was_asked_to(
    tmp_path, monkeypatch, capsys, more
):
    """The first start may have been refused, and with --overwrite it has begun what is there."""
    run = opened(tmp_path / "run")
    (run / "iter1").mkdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "--resume to go on" in died(capsys, opened, run, **more)
    opened(run, resume=True)
    assert (run / "iter1").exists()
    opened(tmp_path / "another")


def test_a_data_set_folder_that_was_edited_is_refused(tmp_path, capsys):
    """By the content of any of its files, or by their names."""
    data, run = tmp_path / "data", tmp_path / "run"
    (data / "more").mkdir(parents=True)
    file = data / "more" / "train.jsonl"
    file.write_text("old")
    opened(run, data=f"{data}:train")
    opened(run, data=f"{data}:train", resume=True)

    file.write_text("new")
    line = died(capsys, opened, run, data=f"{data}:train", resume=True)
    assert f"{data}:train is not what it was" in line
    file.write_text("old")
    file.rename(data / "more" / "test.jsonl")
    line = died(capsys, opened, run, data=f"{data}:train", resume=True)
    assert f"{data}:train is not what it was" in line


def test_data_that_were_edited_since_the_start_are_refused(tmp_path, capsys):
    """--resume compares the hash that run.json has, and a moved run is the same run."""
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("old")
    opened(run, data=str(data))
    os.close(job.HELD.pop(run / "lock"))  # as when its process ends
    run.rename(tmp_path / "moved")
    c = RunFlags(str(tmp_path / "moved"), str(data), resume=True)
    job.open_run(c, [c.data], ("out", "resume"))

    data.write_text("new")
    line = died(capsys, opened, tmp_path / "moved", data=str(data), resume=True)
    assert f"{data} is not what it was" in line


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"7", b"\xff", b"[" * 9999])
def test_a_damaged_record_of_a_run_is_named(tmp_path, capsys, name, content):
    """It says what to do, instead of a traceback."""
    opened(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    line = died(capsys, opened, tmp_path / "run", resume=True)
    assert f"{tmp_path / 'run' / name} is damaged" in line


def test_a_torn_end_of_the_metrics_is_mended_before_anyone_reads_them(tmp_path):
    """Also where the training whose line it is has ended long ago."""
    run = opened(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    opened(run, resume=True)
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    """A slim container has no git."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = opened(tmp_path / "run")
    assert json.loads((run / "run.json").read_text())["git"] is None


@pytest.mark.parametrize("kind", ["file", "device", "link", "long", "below a file"])
def test_an_out_that_can_be_no_folder_is_refused(tmp_path, capsys, kind):
    """One line, before anything is written."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = {"device": "/dev/null", "long": tmp_path / ("x" * 300)}
    places["below a file"] = tmp_path / "file" / "x"
    line = died(capsys, opened, places.get(kind, tmp_path / kind))
    assert "choose another --out" in line
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- flags


@dataclasses.dataclass(frozen=True)
class Flags:
    # -- the headline of a group
    steps: int = 10  # behind
    # above
    a_name: str = "x"

    # no field's: a blank line follows

    # -- another headline
    # above, 50 % in two
    # lines, and
    rate: float = 0.5  # behind
    limit: int | None = None  # at most
    names: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])  # several
    kind: Literal["plain", "fancy"] = "plain"  # one of two
    wide: bool = False

    n: int = dataclasses.field(default=1, metadata={"also": "--samples"})  # two names
    preset: Literal["toy", "paper"] = "paper"  # all other defaults

    def __post_init__(self):
        # no field's
        if self.steps < 0:
            raise ValueError("--steps must not be below 0")


TOY_AND_PAPER = {"toy": {"steps": 2, "rate": 0.25}, "paper": {}}


def test_a_fields_note_is_the_comments_directly_above_it_and_the_one_behind_it():
    """Headlines of groups (--) and comments before a blank line belong to no field."""
    assert job.field_notes(Flags) == {
        "steps": "behind",
        "a_name": "above",
        "rate": "above, 50 % in two lines, and behind",
        "limit": "at most",
        "names": "several",
        "kind": "one of two",
        "n": "two names",
        "preset": "all other defaults",
    }


def test_help_shows_each_flags_note_its_default_and_the_toy_presets(capsys):
    """A field without a comment has its default only; percent signs are no formats."""
    with pytest.raises(SystemExit) as stop:
        job.parse(Flags, TOY_AND_PAPER, ["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert __doc__.split("\n")[0] in shown
    for text in (
        "--steps INT behind (default: 10; toy: 2)",
        "--a_name STR, --a-name STR above (default: x)",
        "--rate FLOAT above, 50 % in two lines, and behind (default: 0.5; toy: 0.25)",
        "--limit INT at most (default: None)",
        "--names X [X ...] several (default: ['a', 'b'])",
        "--kind {plain,fancy} one of two (default: plain)",
        "--wide, --no-wide (default: False)",
        "--n INT, --samples INT two names (default: 1)",
    ):
        assert text in shown


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ([], {}),
        (["--steps", "3"], {"steps": 3}),
        (["--a_name", "y"], {"a_name": "y"}),
        (["--a-name", "y"], {"a_name": "y"}),
        (["--rate", "1e-3"], {"rate": 0.001}),
        (["--limit", "7"], {"limit": 7}),
        (["--names", "c", "d", "e"], {"names": ["c", "d", "e"]}),
        (["--kind", "fancy"], {"kind": "fancy"}),
        (["--wide"], {"wide": True}),
        (["--wide", "--no-wide"], {"wide": False}),
        (["--n", "4"], {"n": 4}),
        (["--samples", "4"], {"n": 4}),
    ],
)
def test_flags_become_fields_of_their_types(flags, wanted):
    """What is not given has the field's default."""
    assert job.parse(Flags, argv=flags) == Flags(**wanted)


def test_a_value_is_the_flags_else_the_presets_else_the_fields():
    """The preset is read before the flags, wherever it stands among them."""
    toy = job.parse(Flags, TOY_AND_PAPER, ["--preset", "toy"])
    assert toy == Flags(preset="toy", steps=2, rate=0.25)
    mixed = job.parse(Flags, TOY_AND_PAPER, ["--steps", "5", "--preset", "toy"])
    assert mixed == Flags(preset="toy", steps=5, rate=0.25)
    paper = job.parse(Flags, TOY_AND_PAPER, ["--preset", "paper"])
    assert paper == Flags(preset="paper")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "x"], "argument --steps: invalid int value: 'x' (see --help)"),
        (["--kind", "odd"], "argument --kind: invalid choice: 'odd'"),
        (["--step", "3"], "unrecognized arguments: --step 3 (see --help)"),
        (["--limit"], "argument --limit: expected one argument (see --help)"),
        (["--steps", "-1"], "--steps must not be below 0"),
        (["--rate", "nan"], "argument --rate: invalid float value: 'nan' (see --help)"),
        (["--rate=-inf"], "argument --rate: invalid float value: '-inf' (see --help)"),
        (["--rate", "x"], "argument --rate: invalid float value: 'x' (see --help)"),
        (["--a_name", ""], "argument --a_name/--a-name: expected a text, not an empty one"),
        (["--names", "a", " "], "argument --names: expected a text, not an empty one"),
    ],
)
def test_a_wrong_flag_ends_the_program_in_one_line(flags, message, capsys):
    """Exit code 2, whether argparse or the dataclass refuses the value."""
    with pytest.raises(SystemExit) as stop:
        job.parse(Flags, argv=flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "more, words",
    [
        ({"resume": True, "overwrite": True}, "--resume goes on, --overwrite begins again"),
        ({"test": "./a.jsonl"}, "--test ./a.jsonl is --data"),
        ({"warmup": 1.5}, "--warmup must be at least 0 and at most 1, not 1.5"),
        ({"epochs": 10**6}, "--epochs must be above 0 and at most 1000, not 1000000"),
        ({"epochs": 0}, "--epochs must be above 0 and at most 1000, not 0"),
    ],
)
def test_flags_of_a_run_that_make_no_sense_are_named(more, words):
    """Alone or together."""
    sensible = {"resume": True, "overwrite": False, "data": "a.jsonl", "test": "b.jsonl"}
    sensible.update(warmup=1.0, epochs=1000, compile=False)
    job.check_run(SimpleNamespace(**sensible))
    with pytest.raises(ValueError, match=re.escape(words)):
        job.check_run(SimpleNamespace(**{**sensible, **more}))


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_number_that_is_not_positive_is_named(value):
    """The first such flag is named with its value; None is a flag that was not given."""
    config = SimpleNamespace(a=1, b=None, c=value, d=-5)
    job.check_positive(config, "a", "b")
    with pytest.raises(ValueError, match=f"^--c must be above 0, not {value}$"):
        job.check_positive(config, "a", "b", "c", "d")


@pytest.mark.parametrize("value", [-1, -0.5, math.nan])
def test_a_number_that_is_negative_is_named(value):
    """The first such flag is named with its value; 0 is none of them."""
    config = SimpleNamespace(a=0, c=value, d=-5)
    job.check_not_negative(config, "a")
    with pytest.raises(ValueError, match=f"^--c must not be negative, not {value}$"):
        job.check_not_negative(config, "a", "c", "d")
