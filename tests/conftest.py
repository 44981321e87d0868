"""A tiny world for all tests (seconds to make), and a way to run a script as a user does."""
import os
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
    return [x for k, v in flags.items() for x in ((f"--{k}", v) if not isinstance(v, bool) else (f"--{'' if v else 'no-'}{k}",))]
