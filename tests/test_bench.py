"""bench.py: what it measures, and the memory plan's arithmetic."""
import json
import time

import pytest
import torch
from conftest import run

import bench
import common
import dnpo
import sams

CPU = torch.device("cpu")


@pytest.mark.skipif(not bench.LIBC, reason="the resident set's peak is read from Linux's /proc; elsewhere bench.py reports none")
def test_peak_is_the_growth_over_what_was_there():
    """A step that holds 96 MiB and frees 64 of them on the way peaks at 96, whatever was allocated before; reading the clock is right too."""
    module, kept = torch.nn.Linear(1, 1), torch.ones(32 * 2**18)
    bench.keep_freed_blocks(False)

    def step():
        a = torch.ones(64 * 2**18)
        b = torch.ones(32 * 2**18)
        del a
        return b, torch.ones(16 * 2**18)
    assert bench.peak(step, [module], CPU) == pytest.approx(96, abs=8) and kept[0] == 1
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


def test_the_memory_plan_counts_what_is_there(world):
    """Weights, gradients, Adam, reference and noise head in bytes, against tensors that exist."""
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
