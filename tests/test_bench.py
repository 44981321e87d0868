"""bench.py: what it measures, and the memory plan's arithmetic."""

import contextlib
import dataclasses
import json
import random
import shutil
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import dnpo_flags, refused, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import bench
import common
import datafiles
import dnpo
import job
import sams
import toy
from common import Pair, Scorer

CPU = torch.device("cpu")


# ---------------------------------------------------------------- what is measured


def test_peak_is_the_growth_over_what_was_there():
    """A step that holds 96 MiB and frees 64 of them on the way peaks at 96.

    So it does whatever was allocated before. Only Linux has the /proc that tells: elsewhere it is
    None. The clock is read right too.
    """
    mib = 2**18  # numbers in fp32
    module = torch.nn.Linear(1, 1)
    kept = torch.ones(32 * mib)
    job.keep_freed_blocks(False)

    def step():
        a = torch.ones(64 * mib)
        b = torch.ones(32 * mib)
        del a
        return b, torch.ones(16 * mib)

    expected = pytest.approx(96, abs=8) if job.LIBC else None
    assert bench.peak(step, [module], CPU) == expected
    assert kept[0] == 1
    assert 0.05 <= bench.seconds(lambda: time.sleep(0.05), [module], CPU) < 0.5


@pytest.fixture
def config(world):
    return bench.Config(
        model=str(world / "sft"),
        data=str(world / "pairs.jsonl"),
        max_prompt=32,
        max_response=16,
        dtype="float32",
        repeats=1,
    )


def gradients_of(lm) -> Tensor:
    """All gradients of a model, as one vector."""
    return torch.cat([p.grad.flatten() for p in lm.parameters()])


def equal_weights(a, b) -> bool:
    """Whether two models have the same weights, to the bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def floor_by_hand(lm, pairs: list[Pair]) -> Tensor:
    """The gradients of the mean last hidden state over all tokens, in 8 sequences of one length."""
    tokens = []
    for pair in pairs:
        tokens += pair.prompt + pair.chosen
    for pair in pairs:
        tokens += pair.prompt + pair.rejected
    del tokens[len(tokens) // 8 * 8 :]
    lm.zero_grad()
    lm.model(input_ids=torch.tensor(tokens).view(8, -1)).last_hidden_state.mean().backward()
    return gradients_of(lm)


def gradients_of_two(lm, reference, pairs: list[Pair]) -> list[Tensor]:
    """DPO's gradients of every two of four pairs."""
    how = sams.Config(
        dtype="float32", micro_batch=4, batch=4, beta=0.1, activation_checkpointing=False
    )
    ref_logps, _ = sams.observe(how, sams.PoolingScorer(reference), pairs, [0, 1, 2, 3], CPU)
    data = sams.Data(pairs, ref_logps, [False] * 4)
    found = []
    for a in range(4):
        for b in range(a):
            lm.zero_grad()
            sams.descend(how, sams.PoolingScorer(lm), data, [b, a], CPU)
            found.append(gradients_of(lm))
    return found


def test_every_row_does_the_work_it_is_named_for(config, monkeypatch):
    """dpo+ac and dpo+compile have dpo's gradients, those of sams are of half of the pairs.

    These pairs are the longest.

    The losses of tso and dnpo are taken against the unmoved reference.
    """
    small = {"selector_depth": 2, "selector_width": 8}
    monkeypatch.setattr(bench, "PAPERS_SELECTOR", small)
    config = dataclasses.replace(config, rows=[*bench.ROWS, *bench.ONLY_IF_ASKED])
    loaded = bench.load(config, CPU)
    lm, reference, pairs, tok = loaded
    steps, modules = bench.make_steps(config, loaded, CPU)
    assert equal_weights(reference, common.load_lm(config.model, torch.float32, CPU))
    assert not equal_weights(lm, reference)
    assert not any(p.requires_grad for p in reference.parameters())

    rows, _ = datafiles.load_rows(config.data, "pair")
    all_pairs, _ = common.encode_pairs(tok, rows, 32, 16)
    sizes = sorted((pair.tokens for pair in all_pairs), reverse=True)
    assert [pair.tokens for pair in pairs] == sizes[:4]

    def gradients(name: str) -> Tensor:
        for module in modules:
            module.zero_grad(set_to_none=True)
        steps[name]()
        return gradients_of(lm)

    plain = gradients("dpo")
    torch.testing.assert_close(gradients("dpo+ac"), plain)
    torch.testing.assert_close(gradients("dpo+compile"), plain, atol=1e-5, rtol=1e-4)

    of_two = gradients_of_two(lm, reference, pairs)
    for row in ("sams", "sams+ac", "sams+paper"):
        half = gradients(row)
        assert sum(torch.allclose(two, half, atol=1e-6) for two in of_two) == 1

    sums = steps["tso"]()  # nothing is clipped so near to the reference: DPO's gradient
    assert sums["clipped/chosen"] == 0
    assert sums["clipped/rejected"] == 0
    torch.testing.assert_close(gradients("tso"), plain, atol=1e-6, rtol=1e-4)

    modules[1].noise.bias.data.zero_()  # without noise: DPO's gradient
    torch.testing.assert_close(gradients("dnpo"), plain, atol=1e-6, rtol=1e-4)

    floor = gradients("floor")
    torch.testing.assert_close(floor, floor_by_hand(lm, pairs), atol=1e-6, rtol=1e-4)


def test_what_is_recomputed(config):
    """How often the first layer is run in a step: forward, and again in the backward pass."""
    rows = ["dpo", "dpo+ac", "sams", "sams+ac"]
    config = dataclasses.replace(config, rows=rows)
    loaded = bench.load(config, CPU)
    steps, _ = bench.make_steps(config, loaded, CPU)

    calls = []
    mlp = common.blocks(loaded.lm)[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append("run"))
    found = {}
    for row in rows:
        calls.clear()
        steps[row]()
        found[row] = len(calls)

    # SamS scores all pairs once more; what is scored is not recomputed.
    assert found == {"dpo": 1, "dpo+ac": 2, "sams": 2, "sams+ac": 3}


def test_the_table_is_written(monkeypatch, world, tmp_path, capsys):
    """bench.json has every row asked for, with ratios to the floor that follow from the seconds."""
    of_model = ["--model", world / "sft", "--data", world / "pairs.jsonl"]
    limits = ["--max_prompt", 32, "--max_response", 16, "--repeats", 1]
    rows = ["--rows", "floor", "dpo", "sams"]
    run(monkeypatch, bench, *of_model, *limits, *rows, "--out", tmp_path / "bench.json")

    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["rows"]) == ["floor", "dpo", "sams"]
    floor = found["rows"]["floor"]
    for row in found["rows"].values():
        assert row["vs_floor"] == pytest.approx(row["seconds"] / floor["seconds"])
        assert row["tokens_per_second"] == pytest.approx(found["tokens"] / row["seconds"])
    assert "no MFU: peak unknown" in capsys.readouterr().out


def test_a_sweep_over_ranks_measures_each_setting_by_itself(monkeypatch, world, tmp_path):
    """16 pairs keep less on each of two ranks under FSDP than on one, in every row.

    Each setting is measured in processes of its own.
    """
    monkeypatch.setattr(bench, "SWEEPS", {"ranks": (1, 2)})
    pairs = ["--model", world / "sft", "--length", 256, "--pairs", 16]
    how = ["--repeats", 1, "--threads", 1, "--sweep", "ranks", "--rows", "dpo", "sams"]
    run(monkeypatch, bench, *pairs, *how, "--out", tmp_path / "b.json")

    found = json.loads((tmp_path / "b-sweep.json").read_text())["sweep"]["ranks"]
    assert list(found) == ["1", "2"]
    for row in ("dpo", "sams"):
        one = found["1"][row]
        two = found["2"][row]
        assert two["seconds"] > 0
        if job.LIBC:
            assert 0.4 * one["peak_mib"] < two["peak_mib"] < 0.7 * one["peak_mib"]


def test_sampling_counts_tokens_and_what_was_decoded_for_them(monkeypatch, world, tmp_path):
    """A row's tokens are its answers', ends included; a batch is decoded until its last one ends.

    generate's batches are in the file's order, ours go by the prompts' length; both draw from the
    model's own distribution. The tokenizer needs no padding token.
    """
    shutil.copytree(world / "sft", tmp_path / "model")
    tok = toy.tokenizer()
    tok.pad_token = None
    tok.save_pretrained(tmp_path / "model")
    answers = []  # of each batch: the ids of each answer, and of what was decoded behind its end
    prompts = []  # of each batch: their lengths
    generate = LlamaForCausalLM.generate

    def note(lm, **how):
        own = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 9}
        assert {name: how[name] for name in own} == own
        sequences = generate(lm, **how)
        width = how["input_ids"].shape[1]
        answers.append(sequences[:, width:].tolist())
        prompts.append(how["attention_mask"].sum(1).tolist())
        return sequences

    monkeypatch.setattr(LlamaForCausalLM, "generate", note)
    of_model = ["--model", tmp_path / "model", "--data", world / "train.jsonl", "--max_prompt", 12]
    how = ["--sample", 14, "--sample_batch", 4, "--max_response", 9, "--repeats", 2]
    run(monkeypatch, bench, *of_model, *how, "--dtype", "float32", "--out", tmp_path / "b.json")

    found = json.loads((tmp_path / "b.json").read_text())
    rows, _ = datafiles.load_rows(str(world / "train.jsonl"), "prompt", 14)
    lengths = [len(common.prompt_ids(tok, row["prompt"])) for row in rows]
    assert max(lengths) > 12
    lengths = [length for length in lengths if length <= 12]
    assert 8 < len(lengths) == found["prompts"] <= 12
    assert lengths != sorted(lengths)
    assert prompts[:2] == [lengths[:1], lengths[:1]]  # the warm-up
    for repeat in (2, 8):
        assert sum(prompts[repeat : repeat + 3], []) == lengths
        assert sum(prompts[repeat + 3 : repeat + 6], []) == sorted(lengths)

    eos = 2
    for row, batches in (("generate", answers[2:5]), ("ours", answers[5:8])):
        tokens, decoded = 0, 0
        for batch in batches:
            sizes = [(answer + [eos]).index(eos) + (eos in answer) for answer in batch]
            tokens += sum(sizes)
            decoded += len(batch) * max(sizes)
        assert tokens < decoded
        numbers = found["rows"][row]
        assert numbers["tokens"] == tokens
        assert numbers["finished"] == pytest.approx(1 - tokens / decoded)
        assert numbers["tokens_per_second"] == pytest.approx(tokens / numbers["seconds"])


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--sample", "4", "--vs", "trl"], "--sample goes with a --model and one process"),
        (["--sample", "0"], "--sample must be above 0"),
        (["--repeats", "0"], "--repeats must be above 0"),
        (["--rows", "dqo"], "dqo: no such row"),
        (["--sweep", "width"], "width: no such row or sweep"),
        (["--ranks", "2"], "several ranks need"),
        (["--shape", "1b"], "give --length"),
        (["--ratio", "2"], "--ratio must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(monkeypatch, capsys, world, flags, line):
    """Exit code 2 and one line on stderr, before any model."""
    of_model = ["--model", world / "sft", "--data", world / "pairs.jsonl"]
    assert line in refused(monkeypatch, capsys, bench, [*of_model, *flags])


def test_rows_that_compute_less_have_no_mfu():
    """2 s at the peak in 4 s are 50 %; the floor has no head, and SamS trains on fewer tokens."""
    times = {"floor": [4.0], "dpo": [4.0, 4.0, 5.0], "sams": [4.0], "trl": [8.0]}
    rows = bench.summarise(times, dict.fromkeys(times), tokens=8, ideal=2.0)
    found = {row: numbers["mfu"] for row, numbers in rows.items()}
    assert found == {"floor": None, "dpo": 0.5, "sams": None, "trl": 0.25}


# ---------------------------------------------------------------- the memory plan


class Measured(dict):
    """Bytes of a module's weights, gradients and Adam's moments, after a step of AdamW."""

    def __init__(self, module):
        optimizer = torch.optim.AdamW(module.parameters())
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        adam = 0
        for state in optimizer.state.values():
            for value in state.values():
                if value.dim():  # all but the count of steps
                    adam += value.nbytes
        self["weights"] = sum(p.nbytes for p in module.parameters())
        self["gradients"] = sum(p.grad.nbytes for p in module.parameters())
        self["Adam"] = adam


def noise_head(lm) -> dict[str, int]:
    """The weights of DNPO's noise head, as the plan wants to be told of them."""
    return {"noise head": lm.config.vocab_size * (lm.config.hidden_size + 1)}


def told_by_dnpo(monkeypatch, *flags) -> dict:
    """What dnpo.py tells the memory plan, beside the model and the flags."""
    told = {}

    def memory_plan(lm, c, **what):
        told.update(what)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(job, "memory_plan", memory_plan)
        run(patch, dnpo, *flags, "--dry_run")
    return told


def test_the_memory_plan_counts_what_is_there(monkeypatch, world, tmp_path):
    """Weights, gradients, Adam, reference and noise head in bytes, against tensors that exist.

    Under FSDP the reference is in bf16.
    """
    path = str(world / "sft")
    lm = common.load_lm(path, torch.float32, CPU)
    noisy = dnpo.NoisyReference(common.load_lm(path, torch.float32, CPU), 0.1)
    of_lm = Measured(lm)
    of_head = Measured(noisy.noise)

    shapes = common.lm_shapes(path)
    told = told_by_dnpo(monkeypatch, *dnpo_flags(world, out=tmp_path / "run"))
    assert told == {"chunk": common.CHUNK, "reference": True, "heads": noise_head(shapes)}
    found = job.memory_parts(shapes, dnpo.Config(parallel="none"), **told)
    for name in ("weights", "gradients", "Adam"):
        assert found[name] == of_lm[name]
    assert found["reference"] == of_lm["weights"]
    assert found["noise head"] == sum(of_head.values())

    told["heads"] = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = job.memory_parts(shapes, dnpo.Config(), **told)
    dist.destroy_process_group()
    assert found["reference"] == sum(p.to(torch.bfloat16).nbytes for p in lm.parameters())


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that still exist; keeps the most."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        for x in made:
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        self.most = max(self.most, sum(self.alive.values()))
        return out

    def count(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)


def random_pairs(n: int, tokens: int, vocabulary: int) -> list[Pair]:
    rng = random.Random(0)

    def draw() -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(tokens)]

    return [Pair(draw(), draw(), draw(), str(i)) for i in range(n)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [sams, dnpo])
def test_the_memory_plan_bounds_what_a_step_makes(method, checkpointing, dtype):
    """Gradients, copies and activations of a step: at most what the plan says, at least half of it.

    They are counted tensor by tensor.
    """
    shape = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    lm = LlamaForCausalLM(shape)
    noisy = dnpo.NoisyReference(LlamaForCausalLM(shape).requires_grad_(False), 0.1)
    c = method.Config(
        dtype=dtype,
        micro_batch=8,
        batch=8,
        max_prompt=64,
        max_response=64,
        activation_checkpointing=False,
    )
    pairs = random_pairs(8, 64, 4096)
    everything = list(range(8))
    scorer = sams.PoolingScorer(lm) if method is sams else Scorer(lm)

    checkpointed = contextlib.nullcontext()
    if checkpointing:
        checkpointed = bench.layers_wrapped(lm, bench.checkpointed)
    with checkpointed, Alive() as memory:
        if method is sams:
            data = sams.Data(pairs, torch.zeros(8, 2), [False] * 8)
            sams.descend(c, scorer, data, everything, CPU)
        else:
            seed = 0, "noise", 1, 1, "joint"
            dnpo.descend(c, "joint", scorer, noisy, pairs, everything, seed, CPU)

    plan = job.memory_parts(
        lm,
        dataclasses.replace(c, activation_checkpointing=checkpointing),
        chunk=common.CHUNK,
        reference=method is dnpo,
        heads=noise_head(lm) if method is dnpo else None,
    )
    bound = plan["gradients"] + plan["activations up to about"]
    bound += plan.get("bf16 copies", 0)
    bound += plan.get("noise head", 0) / 4  # of the head, its gradients alone
    assert bound / 2 <= memory.most <= bound, memory.most / bound
