"""A training run goes on where it was saved, stops when it must, and says what it does; flags.

The training here is a linear layer that AdamW fits, so that a run takes milliseconds.
"""

import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import traceback
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from conftest import lines

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


# ---------------------------------------------------------------- resume


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


@pytest.mark.parametrize("reward", [0.0011, -0.5])
def test_a_policy_that_is_not_its_reference_is_warned_of_before_the_first_step(
    tmp_path, capsys, reward
):
    """One warning with the reward, which should be 0; the run goes on."""
    training = Training(tmp_path)
    training.go(reward=reward)
    assert capsys.readouterr().err == (
        "warning: before the first step the policy differs from its reference "
        f"by a reward of {reward:+.4f}, in absolute value {abs(reward):.4f}; both should be 0\n"
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


# ---------------------------------------------------------------- files


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
        f"error: {path} could not be written (disk full); the last one is intact: "
        "mend that, then start again, a run with --resume"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), job.all_or_nothing(path):
        raise KeyError


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
