"""A tiny world for all tests (seconds to make), and a way to run a script as a user does."""
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
    """A toy world with barely trained models: folder with sft, sft-early, sft-small, train.jsonl, test.jsonl, pairs.jsonl."""
    import toy
    folder = tmp_path_factory.mktemp("world") / "toy"
    toy.make(folder, seed=0, steps=30, rows=120)
    return folder


def script(name: str, *flags, cwd: Path, ranks: int = 1, **env) -> subprocess.CompletedProcess:
    """Runs `python NAME FLAGS` (under torchrun if ranks > 1) in cwd to its end; output captured as text."""
    return subprocess.run(command(name, *flags, ranks=ranks), cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)


def command(name: str, *flags, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / name), *map(str, flags)]


def environment(**env) -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env


def dnpo_flags(world: Path, **more) -> list[str]:
    """Flags of a run of dnpo.py that takes seconds: 48 prompts, 1 warm-up and 1 DNPO iteration."""
    flags = dict(model=world / "sft", data=world / "train.jsonl", test=world / "test.jsonl", judge="toy", limit=48, test_prompts=16, batch=16, micro_batch=8,
                 sample_batch=16, max_response=16, max_prompt=32, epochs=1, iterations=1, save_every=1, preset="toy") | more
    return as_flags(flags)


def sams_flags(world: Path, **more) -> list[str]:
    """Flags of a run of sams.py that takes seconds: 60 training pairs, 20 % flipped, 4 steps."""
    return as_flags(dict(model=world / "sft", data=world / "pairs.jsonl", limit=60, test_pairs=16, batch=16, micro_batch=4, max_response=16, max_prompt=32, flip=0.2,
                         lr=1e-4, beta=0.1, save_every=1, eval_every=2, preset="toy") | more)


def as_flags(values: dict) -> list[str]:
    return [x for k, v in values.items() for x in ((f"--{k}", v) if not isinstance(v, bool) else (f"--{'' if v else 'no-'}{k}",))]


def run(monkeypatch, module, *flags):
    """A script's main() in this process, as if started with these flags."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    module.main()


def forked(module, *flags, kill: tuple[str, str] | None = None) -> int:
    """A script's main() in a process of its own -> its exit code. kill: SIGKILL ("in", a progress bar's note) at the bar's third item,
    or ("before" | "after", a path's end) around the rename that gives that name."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        how, what = kill or (None, None)
        import tqdm
        stop, replace = lambda: os.kill(os.getpid(), signal.SIGKILL), os.replace

        class Bar(tqdm.tqdm):
            def __init__(self, *args, desc, **more):
                super().__init__(*args, desc=desc, **more)
                self.note = desc

            def __iter__(self):
                for n, item in enumerate(super().__iter__()):
                    yield item if (how, n) != ("in", 2) or not f"{self.note} ".startswith(f"{what} ") else stop()

        def rename(old, new):
            if how == "before" and str(new).endswith(what):
                stop()
            replace(old, new)
            if how == "after" and str(new).endswith(what):
                stop()
        tqdm.tqdm, os.replace, sys.argv = Bar, rename, [module.__file__, *map(str, flags)]
        module.main()
        os._exit(0)
    finally:
        os._exit(1)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in m.items() if k not in ("pairs_per_second", "memory_gib") and not k.endswith("seconds")} for m in lines(out / "metrics.jsonl")]


def results(out: Path) -> dict:
    return {k: v for k, v in json.loads((out / "results.json").read_text()).items() if not k.endswith("seconds")}


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def assert_close(a: dict, b: dict, atol: float):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda text: f"{name}: {text}")


TOGETHER = """import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import common
module = importlib.import_module(sys.argv[2])

class Died(BaseException):
    pass

def save_and_die(*args, **more):
    common.save_state(*args, **more)
    raise Died
module.dist.init_process_group("gloo")  # one group for all runs: torchrun's start takes longer than a run
module.dist.init_process_group = module.dist.destroy_process_group = lambda *args, **more: None
for local, dies, flags in json.loads(sys.argv[3]):
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    common.node_mesh.cache_clear()
    module.save_state, sys.argv[1:] = save_and_die if dies else common.save_state, [str(flag) for flag in flags]
    try:
        module.main()
    except Died:
        pass
"""


def together(module, folder: Path, ranks: int, runs: list[tuple[int, bool, list]]):
    """Several runs of a script one after another under one torchrun: (ranks that pass for one node, whether it dies when it first saves, flags) each."""
    (folder / "together.py").write_text(TOGETHER)
    done = script(str(folder / "together.py"), ROOT, module.__name__, json.dumps(runs, default=str), cwd=folder, ranks=ranks)
    assert done.returncode == 0, done.stderr


def refused(monkeypatch, capsys, module, flags: list) -> str:
    """The one line on stderr with which a script ends, exit code 2, before it loads a model."""
    import common
    for where in (module, common):
        monkeypatch.setattr(where, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, module, *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err
