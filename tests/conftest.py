"""A tiny world for all tests (seconds to make), and a way to run a script as a user does."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach the network
ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The folder of a toy world whose models are barely trained; toy.py says what is in it."""
    import toy

    folder = tmp_path_factory.mktemp("world") / "toy"
    toy.make(folder, seed=0, steps=30, rows=120)
    return folder


# ---------------------------------------------------------------- running a script


def script(name: str, *flags, cwd: Path, ranks: int = 1, **env) -> subprocess.CompletedProcess:
    """Runs `python NAME FLAGS` in cwd to its end, under torchrun if ranks > 1.

    Its output is captured as text; env: more environment variables.
    """
    return subprocess.run(
        command(name, *flags, ranks=ranks),
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
    )


def command(name: str, *flags, ranks: int = 1) -> list[str]:
    """The command line that script() runs."""
    launcher = []
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, str(ROOT / name), *map(str, flags)]


def environment(**env) -> dict:
    """This process's environment, one thread, no network, and `env`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}


def run(monkeypatch, module, *flags):
    """A script's main() in this process, as if started with these flags."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    module.main()


def refused(monkeypatch, capsys, module, flags: list) -> str:
    """The one line on stderr with which a script ends, exit code 2, before it loads a model."""
    import common

    def load_lm(*args, **more):
        pytest.fail("a model was loaded")

    # scripts call it by a name of their own, or through common.Model
    monkeypatch.setattr(common, "load_lm", load_lm)
    monkeypatch.setattr(module, "load_lm", load_lm, raising=False)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, module, *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def forked(module, *flags, kill: tuple[str, str] | None = None) -> int:
    """A script's main() in a process of its own; returns its exit code.

    kill: where the process gets SIGKILL. ("in", a progress bar's note) is at the bar's third item,
    ("before" | "after", a path's end) is around the rename that gives that name.

    A process group that an earlier test has left as garbage must be collected here: in the child,
    which has none of its threads, its destructor would wait for them for ever.
    """
    gc.collect()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    try:
        gc.freeze()  # nothing that came from the parent is collected in the child
        if kill:
            kill_at(*kill)
        sys.argv = [module.__file__, *map(str, flags)]
        module.main()
        os._exit(0)
    finally:
        os._exit(1)


def kill_at(how: str, what: str):
    """Patches tqdm and os.replace: they kill this process at the place that forked() names."""
    import tqdm

    replace = os.replace

    class Bar(tqdm.tqdm):
        def __init__(self, *args, desc, **more):
            super().__init__(*args, desc=desc, **more)
            self.note = desc

        def __iter__(self):
            for n, item in enumerate(super().__iter__()):
                if how == "in" and n == 2 and f"{self.note} ".startswith(f"{what} "):
                    kill_this_process()
                yield item

    def rename(old, new):
        if how == "before" and str(new).endswith(what):
            kill_this_process()
        replace(old, new)
        if how == "after" and str(new).endswith(what):
            kill_this_process()

    tqdm.tqdm = Bar
    os.replace = rename


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


TOGETHER = """import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import job

module = importlib.import_module(sys.argv[2])
runs = json.loads(sys.argv[3])
save_state = job.save_state


class Died(BaseException):
    pass


def save_and_die(*args, **more):
    save_state(*args, **more)
    raise Died


def do_nothing(*args, **more):
    pass


# one group for all runs: torchrun's start takes longer than a run
dist.init_process_group("gloo")
leave_group = dist.destroy_process_group
dist.init_process_group = dist.destroy_process_group = do_nothing

for local, dies, flags in runs:
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    job.node_mesh.cache_clear()
    job.save_state = save_and_die if dies else save_state
    sys.argv[1:] = [str(flag) for flag in flags]
    try:
        module.main()
    except Died:
        pass

dist.barrier()
leave_group()  # else its threads may abort the process when that ends
"""


def together(module, folder: Path, ranks: int, runs: list[tuple[int, bool, list]]):
    """Several runs of a script one after another under one torchrun.

    A run is (ranks that pass for one node, whether it dies when it first saves, flags).
    """
    (folder / "together.py").write_text(TOGETHER)
    done = script(
        str(folder / "together.py"),
        ROOT,
        module.__name__,
        json.dumps(runs, default=str),
        cwd=folder,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- flags of short runs


def dnpo_flags(world: Path, **more) -> list[str]:
    """Flags of a run of dnpo.py that takes seconds: 48 prompts, 1 warm-up and 1 DNPO iteration."""
    flags = {
        "model": world / "sft",
        "data": world / "train.jsonl",
        "test": world / "test.jsonl",
        "judge": "toy",
        "limit": 48,
        "test_prompts": 16,
        "batch": 16,
        "micro_batch": 8,
        "sample_batch": 16,
        "max_response": 16,
        "max_prompt": 32,
        "epochs": 1,
        "iterations": 1,
        "save_every": 1,
        "preset": "toy",
    }
    flags.update(more)
    return as_flags(flags)


def sams_flags(world: Path, **more) -> list[str]:
    """Flags of a run of sams.py that takes seconds: 60 training pairs, 20 % flipped, 4 steps."""
    flags = {
        "model": world / "sft",
        "data": world / "pairs.jsonl",
        "limit": 60,
        "test_pairs": 16,
        "batch": 16,
        "micro_batch": 4,
        "max_response": 16,
        "max_prompt": 32,
        "flip": 0.2,
        "lr": 1e-4,
        "beta": 0.1,
        "save_every": 1,
        "eval_every": 2,
        "preset": "toy",
    }
    flags.update(more)
    return as_flags(flags)


def as_flags(values: dict) -> list[str]:
    """{"a": 1, "b": True, "c": False} as --a 1 --b --no-c."""
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"--no-{name}")
        else:
            flags += [f"--{name}", value]
    return flags


# ---------------------------------------------------------------- what a run leaves


def lines(path: Path) -> list[dict]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine decides."""
    clean = []
    for line in lines(out / "metrics.jsonl"):
        kept = without_clocks(line)
        kept.pop("pairs_per_second", None)
        kept.pop("memory_gib", None)
        clean.append(kept)
    return clean


def results(out: Path) -> dict:
    """results.json without what a clock decides."""
    return without_clocks(json.loads((out / "results.json").read_text()))


def without_clocks(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.endswith("seconds")}


def weights(folder: Path) -> dict:
    """The tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_close(a: dict, b: dict, atol: float):
    """The same tensors by name, within atol."""
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, atol=atol, rtol=0)  # it names the tensor that differs
