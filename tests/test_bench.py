"""bench.py: what it measures, and the memory plan's arithmetic."""
import contextlib
import dataclasses
import json
import random
import time
import weakref

import pytest
import torch
from conftest import refused, run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import bench
import common
import dnpo
import sams

CPU = torch.device("cpu")


def test_peak_is_the_growth_over_what_was_there():
    """A step that holds 96 MiB and frees 64 of them on the way peaks at 96, whatever was allocated before (None but on Linux, whose /proc tells); reading the clock is right too."""
    module, kept = torch.nn.Linear(1, 1), torch.ones(32 * 2**18)
    bench.keep_freed_blocks(False)

    def step():
        a = torch.ones(64 * 2**18)
        b = torch.ones(32 * 2**18)
        del a
        return b, torch.ones(16 * 2**18)
    assert bench.peak(step, [module], CPU) == (pytest.approx(96, abs=8) if bench.LIBC else None) and kept[0] == 1
    assert 0.05 <= bench.seconds(lambda: time.sleep(0.05), [module], CPU) < 0.5


@pytest.fixture
def config(world):
    return bench.Config(model=str(world / "sft"), data=str(world / "pairs.jsonl"), max_prompt=32, max_response=16, dtype="float32", repeats=1)


def test_every_row_does_the_work_it_is_named_for(config):
    """dpo+ac has dpo's gradients; sams' are those of half of the pairs; tso's and dnpo's loss is taken against the unmoved reference; the pairs are the longest."""
    lm, reference, pairs, tok = bench.load(config, CPU)
    steps, modules = bench.make_steps(config, lm, reference, pairs, tok, CPU)
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), common.load_lm(config.model, torch.float32, CPU).parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(lm.parameters(), reference.parameters())) and not any(p.requires_grad for p in reference.parameters())
    sizes = sorted((sum(map(len, pair[:3])) for pair in common.encode_pairs(tok, common.load_rows(config.data, "pair")[0], 32, 16)[0]), reverse=True)
    assert [sum(map(len, pair[:3])) for pair in pairs] == sizes[:4]

    def gradients(name):
        for module in modules:
            module.zero_grad(set_to_none=True)
        steps[name]()
        return torch.cat([p.grad.flatten() for p in lm.parameters()])
    plain = gradients("dpo")
    torch.testing.assert_close(gradients("dpo+ac"), plain)
    half, how = gradients("sams"), sams.Config(dtype="float32", micro_batch=4, batch=4, beta=0.1, activation_checkpointing=False)
    ref, _ = sams.score(sams.PoolingScorer(reference), pairs, [0, 1, 2, 3], how, CPU)
    close = []
    for a in range(4):
        for b in range(a):
            lm.zero_grad()
            sams.descend(sams.PoolingScorer(lm), pairs, ref, [b, a], how, CPU)
            close.append(torch.allclose(torch.cat([p.grad.flatten() for p in lm.parameters()]), half, atol=1e-6))
    assert sum(close) == 1
    sums = steps["tso"]()  # nothing is clipped so near to the reference: DPO's gradient
    assert sums["clipped/chosen"] == sums["clipped/rejected"] == 0
    torch.testing.assert_close(gradients("tso"), plain, atol=1e-6, rtol=1e-4)
    modules[1].noise.bias.data.zero_()  # without noise: DPO's gradient
    torch.testing.assert_close(gradients("dnpo"), plain, atol=1e-6, rtol=1e-4)
    floor, tokens = gradients("floor"), [t for p, y, z, _ in pairs for t in p + y] + [t for p, y, z, _ in pairs for t in p + z]
    lm.zero_grad()
    lm.model(input_ids=torch.tensor(tokens[:len(tokens) // 8 * 8]).view(8, -1)).last_hidden_state.mean().backward()
    torch.testing.assert_close(floor, torch.cat([p.grad.flatten() for p in lm.parameters()]), atol=1e-6, rtol=1e-4)


def test_the_table_is_written(monkeypatch, world, tmp_path, capsys):
    """bench.json has every row asked for, with ratios to the floor that follow from the seconds."""
    run(monkeypatch, bench, "--model", world / "sft", "--data", world / "pairs.jsonl", "--max_prompt", 32, "--max_response", 16, "--repeats", 1, "--rows", "floor", "dpo", "sams",
        "--out", tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["rows"]) == ["floor", "dpo", "sams"]
    for row in found["rows"].values():
        assert row["vs_floor"] == pytest.approx(row["seconds"] / found["rows"]["floor"]["seconds"]) and row["tokens_per_second"] == pytest.approx(found["tokens"] / row["seconds"])
    assert "no MFU: peak unknown" in capsys.readouterr().out


def test_the_memory_plan_counts_what_is_there(monkeypatch, world):
    """Weights, gradients, Adam, reference (whole, and its layers offloaded) and noise head in bytes, against tensors that exist."""
    path = str(world / "sft")
    lm, noisy = common.load_lm(path, torch.float32, CPU), dnpo.NoisyReference(common.load_lm(path, torch.float32, CPU), 0.1)
    parts = []
    for module in (lm, noisy.noise):
        optimizer = torch.optim.AdamW(module.parameters())
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        adam = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
        parts.append([sum(p.nbytes for p in module.parameters()), sum(p.grad.nbytes for p in module.parameters()), adam])
    c = dnpo.Config(parallel="none")
    found = common.memory_parts(common.lm_shapes(path), c, reference=True, noise=True)
    assert [found[name] for name in ("weights", "gradients", "Adam")] == parts[0]
    assert found["reference"] == parts[0][0] and found["noise head"] == sum(parts[1])
    monkeypatch.setenv("RANK", "0")
    found = common.memory_parts(common.lm_shapes(path), dnpo.Config(offload_reference=True), reference=True)
    assert found["reference"] == sum(p.nbytes for name, p in lm.named_parameters() if ".layers." not in name)


def test_a_sweep_over_ranks_measures_each_setting_by_itself(monkeypatch, world, tmp_path):
    """One rank and two under FSDP, each in processes of its own: 16 pairs keep less on each of two ranks, in every row."""
    monkeypatch.setattr(bench, "SWEEPS", {"ranks": (1, 2)})
    run(monkeypatch, bench, "--model", world / "sft", "--length", 256, "--pairs", 16, "--repeats", 1, "--sweep", "ranks", "--rows", "dpo", "sams", "--threads", 1, "--out", tmp_path / "b.json")
    found = json.loads((tmp_path / "b-sweep.json").read_text())["sweep"]["ranks"]
    assert list(found) == ["1", "2"]
    for row in ("dpo", "sams"):
        one, two = found["1"][row], found["2"][row]
        assert two["seconds"] > 0 and (not bench.LIBC or 0.4 * one["peak_mib"] < two["peak_mib"] < 0.7 * one["peak_mib"])


@pytest.mark.parametrize("flags, line", [(["--rows", "dqo"], "dqo: no such row"), (["--sweep", "width"], "width: no such row or sweep"), (["--ranks", "2"], "several ranks need"), (["--shape", "1b"], "give --length")])
def test_what_cannot_be_measured_is_one_line(monkeypatch, capsys, world, flags, line):
    assert line in refused(monkeypatch, capsys, bench, ["--model", world / "sft", "--data", world / "pairs.jsonl", *flags])


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that still exist, and their maximum."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [sams, dnpo])
def test_the_memory_plan_bounds_what_a_step_makes(method, checkpointing, dtype):
    """Gradients, copies and activations of one step, tensor by tensor: at most what the plan says, and at least half of it."""
    shape = LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4, vocab_size=4096, tie_word_embeddings=True)
    lm, noisy = LlamaForCausalLM(shape), dnpo.NoisyReference(LlamaForCausalLM(shape).requires_grad_(False), 0.1)
    c = method.Config(dtype=dtype, micro_batch=8, batch=8, max_prompt=64, max_response=64, activation_checkpointing=False)
    rng = random.Random(0)
    draw = lambda: [rng.randrange(4096) for _ in range(64)]
    pairs, everything = [(draw(), draw(), draw(), str(i)) for i in range(8)], list(range(8))
    with bench.activation_checkpointing(lm) if checkpointing else contextlib.nullcontext(), Alive() as memory:
        if method is sams:
            sams.descend(sams.PoolingScorer(lm), pairs, torch.zeros(8, 2), everything, c, CPU)
        else:
            dnpo.descend(c, "joint", common.Scorer(lm), noisy, pairs, everything, (1, 1), CPU)
    plan = common.memory_parts(lm, dataclasses.replace(c, activation_checkpointing=checkpointing), reference=method is dnpo, noise=method is dnpo)
    bound = plan["gradients"] + plan.get("bf16 copies", 0) + plan["activations up to about"] + plan.get("noise head", 0) / 4  # of the head, its gradients alone
    assert bound / 2 <= memory.most <= bound, memory.most / bound
