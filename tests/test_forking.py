"""The worked forks of docs/forking.md: each applies, is short, trains, and does what it says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_flags, dnpo_flags, metrics, run, sams_flags

LONGEST = 12  # lines of a diff that are added or taken away


def read_diffs() -> dict[str, list[str]]:
    """The diffs of docs/forking.md: the lines of each after its two headlines, by script."""
    text = (ROOT / "docs/forking.md").read_text()
    diffs = {}
    for block in re.findall(r"```diff\n(.*?)```", text, re.S):
        old, new, *lines = block.splitlines()
        name = old.removeprefix("--- a/")
        assert new == f"+++ b/{name}"
        diffs[name] = lines
    return diffs


def changed(lines: list[str]) -> list[str]:
    return [line for line in lines if line[0] in "+-"]


def side(lines: list[str], sign: str) -> str:
    """What the lines of a diff look like before ("-") or after ("+") it."""
    return "".join(line[1:] + "\n" for line in lines if line[0] in (" ", sign))


def apply_diff(source: str, lines: list[str]) -> str:
    before, after = side(lines, "-"), side(lines, "+")
    assert source.count(before) == 1, "the diff's context must stand in the script exactly once"
    return source.replace(before, after)


def fork(folder: Path, name: str) -> Path:
    """A copy of a script with its diff applied."""
    source = (ROOT / name).read_text()
    path = folder / name
    path.write_text(apply_diff(source, read_diffs()[name]))
    return path


def forked_module(folder: Path, name: str):
    """The forked script as a module, without taking the real one's place."""
    path = fork(folder, name)
    spec = importlib.util.spec_from_file_location(f"forked_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def three_steps(monkeypatch, module, flags: list[str]) -> list[dict]:
    """Three steps of a forked script; returns its metrics."""
    out = Path(module.__file__).parent / "run"
    run(monkeypatch, module, *flags, "--max_steps", 3, "--out", out)
    return metrics(out)


def tso_flags(world: Path) -> list[str]:
    """Flags of a run of tso.py that takes seconds: one slice, pairs with a smaller model."""
    return as_flags(
        {
            "preset": "toy",
            "model": world / "sft",
            "older": world / "sft-early",
            "smaller": world / "sft-small",
            "negatives": "smaller",
            "data": world / "train.jsonl",
            "test": world / "test.jsonl",
            "limit": 48,
            "test_prompts": 8,
            "n_scores": 0,
            "slices": 1,
            "batch": 16,
            "micro_batch": 8,
            "max_response": 16,
        }
    )


def test_there_is_one_short_diff_for_each_method():
    """Three forks, one per script, of at most twelve changed lines each."""
    diffs = read_diffs()
    assert sorted(diffs) == ["dnpo.py", "sams.py", "tso.py"]
    for lines in diffs.values():
        assert 0 < len(changed(lines)) <= LONGEST


def test_a_diff_whose_context_is_gone_is_noticed():
    """A script that was changed under a fork fails this module."""
    for name, lines in read_diffs().items():
        source = (ROOT / name).read_text()
        with pytest.raises(AssertionError):
            apply_diff(source.replace(side(lines, "-"), ""), lines)


def test_another_noise(monkeypatch, world, tmp_path):
    """The fork of dnpo.py draws +1 and -1 alone, equally often, and trains three steps."""
    module = forked_module(tmp_path, "dnpo.py")
    eps = module.draw([(7, place) for place in range(20)], 1000, "cpu")
    assert eps.shape == (20, 1000)
    assert set(eps.unique().tolist()) == {-1.0, 1.0}
    assert eps.mean().item() == pytest.approx(0, abs=0.03)  # 4 standard deviations

    flags = dnpo_flags(world, warmup_iterations=0, noise_init=1.0)
    steps = three_steps(monkeypatch, module, flags)
    assert [m["step"] for m in steps] == [1, 2, 3]
    # noise of standard deviation 1 moves the first margin away from 0, and log p_noise falls
    assert steps[0]["rewards/margins"] < -0.5
    assert steps[0]["noise/std"] == pytest.approx(1.0)


def test_another_reading_of_the_dual_clip(monkeypatch, world, tmp_path):
    """The fork of tso.py starts at 1, and what the rejected side did leaves the chosen alone."""
    module = forked_module(tmp_path, "tso.py")
    losses = module.dual_clip_losses
    chosen = torch.zeros(1, requires_grad=True)
    for rejected in (0.0, -1.0, -5.0):
        (gradient,) = torch.autograd.grad(losses(chosen, torch.tensor([rejected]), 1, 1), chosen)
        assert gradient.item() == pytest.approx(-0.25)  # -sigmoid'(0)

    steps = three_steps(monkeypatch, module, tso_flags(world))
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert steps[0]["loss"] == pytest.approx(1, abs=1e-5)


def test_another_selector(monkeypatch, world, tmp_path):
    """The fork of sams.py reads the mean of the projected layers, whose order it does not see."""
    module = forked_module(tmp_path, "sams.py")
    torch.manual_seed(0)
    small = {"encoder": "none", "selector_depth": 2, "selector_width": 8}
    encoder = module.Selector(8, module.Config(**small, dtype="float32")).encoder
    contexts = torch.randn(5, 3, 8)
    read = encoder(contexts)
    projected = torch.stack([encoder.connector(contexts[:, i]) for i in range(3)])
    averaged = projected.sum(0) / 3
    torch.testing.assert_close(read, averaged / averaged.square().sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(encoder(contexts.flip(1)), read)

    steps = three_steps(monkeypatch, module, sams_flags(world))
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert [m["selected/pairs"] for m in steps] == [8, 8, 8]
    assert "selector/fit" in steps[1]
