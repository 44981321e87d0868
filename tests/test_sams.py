"""SamS: its equations against naive loops, the bandit's order of events, and whole runs of sams.py."""
import copy
import functools
import itertools
import json
import math
import random
import signal

import pytest
import torch
from conftest import assert_close, forked, lines, metrics, refused, results, run, sams_flags, together, weights
from test_equations import naive_logp, naive_loss, random_pairs, tiny_lm

import common
import sams
from sams import (Bandit, Config, PoolingScorer, Selector, batch_reward, bounded_loss, context, descend, dpo_losses, flip_labels, ipo_losses, margins, min_max, rank_correlation,
                  rewards, sample_reward, score, select, selector_loss)

near = functools.partial(pytest.approx, rel=1e-5, abs=1e-6)
sigmoid = lambda x: 1 / (1 + math.exp(-x))
CPU = torch.device("cpu")


def tiny(**more) -> Config:
    return Config(**(dict(dtype="float32", micro_batch=3, batch=12, beta=0.3, activation_checkpointing=False, parallel="none") | more))


# ---------------------------------------------------------------- equations


def test_margins_and_losses_are_the_formulas():
    """m, DPO and IPO for hand-made log-probs, one pair at a time; margin 0 costs ln 2 in DPO and (1 / 2 beta)^2 in IPO."""
    rng, beta = random.Random(0), 0.3
    logps, ref = ([[rng.uniform(-9, 0) for _ in range(2)] for _ in range(5)] for _ in range(2))
    m = [beta * ((a[0] - b[0]) - (a[1] - b[1])) for a, b in zip(logps, ref)]
    found = margins(torch.tensor(logps), torch.tensor(ref), beta)
    assert found.tolist() == near(m)
    assert dpo_losses(found, beta).tolist() == near([naive_loss(x) for x in m])
    assert ipo_losses(found, beta).tolist() == near([((a[0] - b[0]) - (a[1] - b[1]) - 1 / (2 * beta)) ** 2 for a, b in zip(logps, ref)])
    assert dpo_losses(torch.zeros(1), beta).item() == near(math.log(2)) and ipo_losses(torch.zeros(1), beta).item() == near(1 / (4 * beta ** 2))


def test_the_batch_reward_is_the_relative_gain():
    """L~ lies in [-1, 0]; rho is positive when it falls, negative when it rises, and swapping before and after flips its sign."""
    m = [-2.0, 0.0, 3.0]
    before = bounded_loss(torch.tensor(m)).item()
    after = bounded_loss(torch.tensor([x + 1 for x in m])).item()
    assert before == near(-sum(map(sigmoid, m)) / 3) and -1 < after < before < 0
    assert batch_reward(before, after) == near((before - after) / -after) and batch_reward(before, after) > 0
    assert batch_reward(after, before) == near(-batch_reward(before, after)) and batch_reward(before, before) == 0


def test_rewards_are_the_formulas():
    """kappa and r for hand-made batches with other weights than the defaults; a confident margin and an unlikely chosen answer raise r, a gain too."""
    rng = random.Random(1)
    m, y = ([rng.uniform(-5, 5) for _ in range(6)] for _ in range(2))
    mm = lambda v: [(x - min(v)) / (max(v) - min(v)) for x in v]
    for w, u in ((0.5, 0.5), (0.7, 0.2)):
        kappa = [w * a + u * (1 - b) for a, b in zip(mm(m), mm(y))]
        found = sample_reward(torch.tensor(m), torch.tensor(y), w, u)
        assert found.tolist() == near(kappa)
        for gamma, rho in ((0.5, 0.01), (0.2, -0.03)):
            r = [gamma * sigmoid(50 * rho + 0.5) + (1 - gamma) * sigmoid(k) for k in kappa]
            assert rewards(rho, found, gamma).tolist() == near(r)
    assert (rewards(0.01, found) > rewards(-0.01, found)).all()


def test_a_constant_batch_has_finite_rewards():
    """min-max is 0.5 everywhere where all values are equal, so kappa is half its weights' sum."""
    same = torch.full((4,), -3.0)
    assert min_max(same).tolist() == [0.5] * 4 and min_max(torch.tensor([2.0, -2.0, 0.0])).tolist() == [1.0, 0.0, 0.5]
    assert sample_reward(same, same, 0.7, 0.2).tolist() == near([0.45] * 4)


def test_the_k_highest_are_selected_in_the_batches_order():
    """Positions ascend, ties go to the first, K = n is the batch as it is."""
    scores = torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5])
    assert select(scores, 2) == [1, 3] and select(scores, 3) == [1, 3, 4] and select(scores, 5) == list(range(5))
    assert select(torch.zeros(4), 2) == [0, 1] and select(scores, 5, seed=3) == list(range(5))


def test_sampling_follows_softmax_without_replacement():
    """The frequencies of all pairs of 4 against the formula p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    scores, n = [0.0, 1.0, 2.0, -1.0], 6000
    total = sum(math.exp(s) for s in scores)
    p, counts = [math.exp(s) / total for s in scores], {}
    for seed in range(n):
        picked = tuple(select(torch.tensor(scores), 2, common.seed_of(seed)))
        counts[picked] = counts.get(picked, 0) + 1
    for i, j in itertools.combinations(range(4), 2):
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert counts.get((i, j), 0) / n == pytest.approx(expected, abs=4 * math.sqrt(expected / n))


def test_rank_correlation_is_spearmans():
    """1 for any rising function, -1 for a falling one, average ranks for ties, 0 for a constant."""
    a, b = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([10.0, 5.0, 5.0, 7.0])
    x, y = [4, 1, 2.5, 2.5], [4, 1.5, 1.5, 3]
    mx, my = sum(x) / 4, sum(y) / 4
    pearson = sum((u - mx) * (v - my) for u, v in zip(x, y)) / math.sqrt(sum((u - mx) ** 2 for u in x) * sum((v - my) ** 2 for v in y))
    assert rank_correlation(a, b) == near(pearson)
    assert rank_correlation(a, a.exp()) == near(1) and rank_correlation(a, -a) == near(-1) and rank_correlation(a, torch.ones(4)) == 0


# ---------------------------------------------------------------- contexts and the selector


def test_contexts_are_means_over_response_tokens():
    """Every layer's output, averaged over the tokens of the response, of one sequence at a time without padding; log-probs as without pooling."""
    lm, pairs = tiny_lm(3), random_pairs(4)
    outputs = {}
    hooks = [layer.register_forward_hook(lambda m, a, out, i=i: outputs.update({i: out[0] if isinstance(out, tuple) else out})) for i, layer in enumerate(lm.model.layers)]
    expected = []
    for p, y in sams.both_sides(pairs, range(4)):
        lm(input_ids=torch.tensor([p + y]))
        expected.append([[sum(outputs[i][0, len(p) + j, d].item() for j in range(len(y))) / len(y) for d in range(16)] for i in range(2)])
    for hook in hooks:
        hook.remove()
    scorer = PoolingScorer(lm)
    batch = common.collate(sams.both_sides(pairs, range(4)), "cpu")
    logps, pooled = scorer(*batch, pool=True)
    assert pooled.flatten().tolist() == near(torch.tensor(expected).flatten().tolist())
    assert torch.equal(logps, scorer(*batch)[0]) and scorer(*batch)[1] is None and scorer.pooled == {}
    mean, both = context(pooled, "mean"), context(pooled, "both")
    assert torch.equal(mean, (pooled[:4] + pooled[4:]) / 2) and torch.equal(both, torch.cat([mean, pooled[:4] - pooled[4:]], -1))
    flipped = torch.cat([pooled[4:], pooled[:4]])
    assert torch.equal(context(flipped, "mean"), mean) and not torch.equal(context(flipped, "both"), both)  # the released context can't see a flip


def test_f2_learns_the_residual_and_leaves_f1_alone():
    """The loss is the two mean squared errors; exploration's part sends no gradient into encoder and f1."""
    torch.manual_seed(0)
    selector, x, r = Selector(2, 8), torch.randn(5, 2, 8), torch.rand(5)
    exploit, explore = selector(x)
    f1, f2, target = exploit.tolist(), explore.tolist(), r.tolist()
    assert selector_loss(exploit, explore, r).item() == near(sum((a - t) ** 2 for a, t in zip(f1, target)) / 5 + sum((b - (t - a)) ** 2 for a, b, t in zip(f1, f2, target)) / 5)
    together = torch.autograd.grad(selector_loss(exploit, explore, r), list(selector.parameters()), retain_graph=True)
    alone = torch.autograd.grad((exploit - r).square().mean(), list(selector.parameters()), allow_unused=True)
    for (name, _), a, b in zip(selector.named_parameters(), together, alone):
        assert (b is None and a.abs().sum() > 0) if name.startswith("explore") else torch.equal(a, b), name


def test_the_regression_target_is_never_broadcast():
    """Targets of shape [K, 1] or [1] against predictions [K] are an error, not a matrix of differences."""
    f = torch.zeros(4)
    for bad in (torch.zeros(4, 1), torch.zeros(1), torch.zeros(())):
        with pytest.raises(ValueError, match="would broadcast"):
            selector_loss(f, f, bad)
        with pytest.raises(ValueError, match="would broadcast"):
            selector_loss(f, bad, f)


def test_f1_fits_four_targets():
    """Targets 0, 1, 2, 3 for four contexts to less than 1e-3 (the released regressor ends at 2.5 for a perfect prediction)."""
    torch.manual_seed(0)
    selector, x, r = Selector(3, 8), torch.randn(4, 3, 8), torch.arange(4.0)
    optimizer = torch.optim.Adam(selector.parameters(), lr=1e-3)
    for _ in range(300):
        loss = selector_loss(*selector(x), r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (selector(x)[0] - r).abs().max() < 1e-2 and (selector(x)[0] - r).square().mean() < 1e-3


def test_the_selector_tells_layers_apart():
    """A layer is known by its embedding alone: states and embeddings swapped together predict the same, states swapped alone what the embeddings swapped alone do, and not that."""
    torch.manual_seed(0)
    selector, x = Selector(2, 8), torch.randn(3, 2, 8)
    torch.nn.init.normal_(selector.layer)
    swapped = copy.deepcopy(selector)
    swapped.layer.data = selector.layer.data.flip(0)
    plain, alone = selector(x)[0].tolist(), selector(x.flip(1))[0].tolist()
    assert swapped(x.flip(1))[0].tolist() == near(plain) and swapped(x)[0].tolist() == near(alone) and all(abs(a - b) > 1e-3 for a, b in zip(plain, alone))


def test_rewards_lag_by_one_round():
    """A scripted trace of three rounds: round t's reward uses its own margins and log-probs, the loss of t and t + 1, and the running mean of rho; the
    selector is fitted on it before it scores round t + 1; only selected pairs are rewarded."""
    g = torch.Generator().manual_seed(0)
    X, M, Y = (scale * torch.randn(3, *shape, generator=g) for scale, shape in ((1, (6, 2, 8)), (0.05, (6,)), (1, (6,))))  # small margins: sigmoid(50 rho) must not saturate
    c = tiny(gamma=0.4, margin_weight=0.7, uncertainty_weight=0.2, explore=0.3, fit_steps=2, selector_lr=1e-2)
    bandit, at, rho, seen, predicted = Bandit(2, 8, c, CPU), [], [], [], []
    mm = lambda v: [(x - min(v)) / (max(v) - min(v)) for x in v]
    losses = [-sum(map(sigmoid, m)) / 6 for m in M.tolist()]
    for t in range(3):
        before = copy.deepcopy(bandit.selector.state_dict())
        picked, log = bandit.round(X[t], M[t], Y[t], 3, None)
        if t:
            rho.append((losses[t - 1] - losses[t]) / max(abs(losses[t - 1]), abs(losses[t])))
            blend = 0.5 * rho[-1] + 0.5 * sum(rho) / len(rho)
            kappa = [0.7 * a + 0.2 * (1 - b) for a, b in zip(mm(M[t - 1].tolist()), mm(Y[t - 1].tolist()))]
            r = [0.4 * sigmoid(50 * blend + 0.5) + 0.6 * sigmoid(kappa[i]) for i in at[-1]]
            seen.append((X[t - 1][at[-1]], r))
            assert [reward.tolist() for _, reward in bandit.replay] == [near(past) for _, past in seen]
            assert all(torch.equal(x, past) for (x, _), (past, _) in zip(bandit.replay, seen))
            assert log["selector/rho"] == near(rho[-1]) and log["selector/reward"] == near(sum(r) / 3)
            assert log["selector/error"] == near(math.sqrt(sum((a - b) ** 2 for a, b in zip(predicted, r)) / 3)) and log["selector/predicted"] == near(sum(predicted) / 3)
            assert any(not torch.equal(v, before[k]) for k, v in bandit.selector.state_dict().items())
        else:
            assert log == {} and not bandit.replay and all(torch.equal(v, before[k]) for k, v in bandit.selector.state_dict().items())
        exploit, explore = (f.tolist() for f in bandit.selector(X[t]))  # after the fit
        assert picked == sorted(sorted(range(6), key=lambda i: -(exploit[i] + 0.3 * explore[i]))[:3])
        predicted = [exploit[i] for i in picked]
        at.append(picked)


def test_replay_holds_so_many_earlier_rounds():
    """--replay 2: this round and the two before it."""
    bandit = Bandit(2, 8, tiny(replay=2), CPU)
    for t in range(6):
        bandit.round(torch.full((4, 2, 8), float(t)), torch.randn(4), torch.randn(4), 2, None)
    assert [x[0, 0, 0].item() for x, _ in bandit.replay] == [2, 3, 4]


def test_a_fit_is_one_pass_over_the_replay():
    """The Adam steps of a round see each of the rounds held exactly once, cut into fit_steps parts."""
    bandit, seen = Bandit(2, 8, tiny(replay=4, fit_steps=2), CPU), []
    bandit.selector.register_forward_hook(lambda module, args, out: seen.append(sorted(set(args[0][:, 0, 0].tolist()))) if torch.is_grad_enabled() else None)
    for t in range(5):
        seen.clear()
        bandit.round(torch.full((4, 2, 8), float(t)), torch.randn(4), torch.randn(4), 2, None)
        assert sorted(itertools.chain(*seen)) == list(range(t)) and len(seen) == min(t, 2) and (t < 4 or len(seen[0]) == len(seen[1]) == 2)


def test_the_selector_learns_what_is_rewarded():
    """Where the reward is a function of the context, 60 rounds make predicted and observed rewards agree in rank, and the better pairs are chosen."""
    g = torch.Generator().manual_seed(0)
    bandit = Bandit(1, 4, tiny(gamma=0.0, margin_weight=1.0, uncertainty_weight=0.0, selector_lr=1e-3), CPU)
    correlations, gains = [], []
    for _ in range(60):
        x = torch.randn(16, 1, 4, generator=g)
        margin = x[:, 0, 1] - x[:, 0, 3]
        at, log = bandit.round(x, margin, torch.zeros(16), 8, None)
        correlations.append(log.get("selector/rank_correlation", 0))
        gains.append(margin[at].mean().item() - margin.mean().item())
    assert sum(correlations[-10:]) / 10 > 0.7 and sum(gains[-10:]) / 10 > 0.6


# ---------------------------------------------------------------- one round on a model


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_gradient_is_that_of_the_selected_alone(loss):
    """The gradient of K of the pairs, in micro-batches, is the gradient of the mean of their losses computed one pair at a time in float64; log-probs [n, 2] too."""
    lm, start, pairs, c = tiny_lm(1), tiny_lm(2), random_pairs(12), tiny(loss=loss)
    ref, _ = score(PoolingScorer(start), pairs, list(range(12)), c, CPU)
    naive_ref = [[naive_logp(start.double(), p, y).item() for y in sides] for p, *sides in pairs]
    assert ref.flatten().tolist() == near([x for row in naive_ref for x in row])
    picked = [1, 4, 5, 10]
    lm.zero_grad()
    sums = descend(PoolingScorer(lm), pairs, ref, picked, c, CPU)
    model = copy.deepcopy(lm).double()
    model.zero_grad()
    total, accurate = 0, 0
    for i in picked:
        p, y, z = pairs[i]
        h = (naive_logp(model, p, y) - naive_ref[i][0]) - (naive_logp(model, p, z) - naive_ref[i][1])
        total = total + (-torch.log(torch.sigmoid(c.beta * h)) if loss == "dpo" else (h - 1 / (2 * c.beta)) ** 2)
        accurate += h.item() > 0
    (total / 4).backward()
    assert sums["loss"].item() == near(total.item() / 4) and sums["rewards/accuracies"].item() == accurate / 4
    for (name, a), b in zip(lm.named_parameters(), model.parameters()):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_one_step_raises_the_margin_of_the_selected():
    """Away from the reference and at it, for both losses."""
    pairs = random_pairs(6)
    for loss in ("dpo", "ipo"):
        lm, c = tiny_lm(4), tiny(loss=loss, beta=0.1)
        policy, at = PoolingScorer(lm), [0, 2, 3]
        ref, _ = score(policy, pairs, list(range(6)), c, CPU)
        descend(policy, pairs, ref, at, c, CPU)
        sams.take_step(torch.optim.SGD(lm.parameters(), lr=1e-3), 1e-3, 1.0)
        assert margins(score(policy, pairs, at, c, CPU)[0], ref[at], c.beta).mean() > 1e-5


def test_only_sample_draws():
    """From equal states of the bandit, `sample` picks by its seed, `topk` the K highest scores whatever the seed."""
    pairs, c = random_pairs(12), tiny()
    logps, contexts = score(PoolingScorer(tiny_lm(6)), pairs, list(range(12)), c, CPU, "mean")
    choose = lambda how, seed: sams.pick(c, how, list(range(12)), 6, [False] * 12, logps, torch.zeros(12, 2), contexts, Bandit(2, 16, c, CPU), seed)[0]
    assert choose("sample", 1) == choose("sample", 1) and len({tuple(choose("sample", seed)) for seed in range(5)}) > 2
    exploit, explore = Bandit(2, 16, c, CPU).selector(contexts)
    assert choose("topk", 1) == choose("topk", 2) == sorted((exploit + c.explore * explore).argsort(descending=True)[:6].tolist())


def test_policy_and_reference_agree_to_the_bit_in_bf16():
    """One pair a forward pass: whatever the order of the batch, an untrained policy's margin is exactly 0; in larger batches it would not be."""
    lm, pairs, c = tiny_lm(5), random_pairs(12), tiny(dtype="bfloat16", micro_batch=1)
    policy, order = PoolingScorer(lm), random.Random(0).sample(range(12), 12)
    ref, _ = score(policy, pairs, list(range(12)), c, CPU)
    assert torch.equal(score(policy, pairs, order, c, CPU)[0], ref[order]) and ref.dtype == torch.float32
    full, _ = score(policy, pairs, order, tiny(), CPU)
    assert (full - ref[order]).abs().max() > 1e-4  # it was bf16


def test_flips_are_seeded_marked_and_exact():
    """A share of rows has its sides and their ends swapped; the rest is untouched; a flip of a flip is unmarked."""
    rows = [{"id": str(i), "prompt": [], "chosen": f"c{i}", "rejected": f"r{i}", "meta": {"rejected_ended": False}} for i in range(50)]
    flipped = flip_labels(rows, 0.3, 0)
    swapped = [i for i, row in enumerate(flipped) if row["meta"].get("flipped")]
    assert len(swapped) == 15 and swapped != [i for i, row in enumerate(flip_labels(rows, 0.3, 1)) if row["meta"].get("flipped")]
    for i, row in enumerate(flipped):
        if i in swapped:
            assert (row["chosen"], row["rejected"], row["meta"]) == (f"r{i}", f"c{i}", {"flipped": True, "chosen_ended": False, "rejected_ended": True})
        else:
            assert row is rows[i]
    assert not any(row["meta"]["flipped"] for i, row in enumerate(flip_labels(flipped, 1.0, 0)) if i in swapped) and flip_labels(rows, 0.0, 0) == rows


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    """Flags of a run into a folder; all runs of this module share their reference log-probs."""
    reference = tmp_path_factory.mktemp("reference")
    return lambda out, **more: sams_flags(world, **({"out": out, "reference": reference} | more))


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """One run in one process: 10 rounds of 16, seeing both sides, with replay."""
    folder = tmp_path_factory.mktemp("plain")
    assert forked(sams, *flags(folder / "run", context="both", epochs=3, max_steps=10)) == 0
    return folder / "run"


def test_two_ranks_select_and_learn_what_one_does(plain, flags, tmp_path):
    """DDP and FSDP on two ranks: the same pairs in all 10 rounds, the same rewards and losses, the same weights, the same held-out numbers."""
    runs = [(2, False, flags(way, context="both", epochs=3, max_steps=10, parallel=way, reference="reference", activation_checkpointing=True)) for way in ("ddp", "fsdp")]
    together(sams, tmp_path, 2, runs)
    one = metrics(plain)
    assert len(one) == 10 and len({tuple(m["selected/indices"]) for m in one}) == 10
    for way in ("ddp", "fsdp"):
        two = metrics(tmp_path / way)
        assert [m["selected/indices"] for m in two] == [m["selected/indices"] for m in one]
        for a, b in zip(one, two, strict=True):
            a, b = ({k: v for k, v in m.items() if k not in ("selector/rank_correlation", "selected/indices")} for m in (a, b))
            assert b == pytest.approx(a, rel=2e-3, abs=2e-4)
        assert_close(weights(plain / "checkpoint"), weights(tmp_path / way / "checkpoint"), atol=2e-4)


def test_everything_selected_is_dpo_to_the_bit(monkeypatch, flags, tmp_path):
    """--ratio 1 with the selector at work gives the weights and the losses of --select all."""
    run(monkeypatch, sams, *flags(tmp_path / "all", select="all"))
    run(monkeypatch, sams, *flags(tmp_path / "topk", ratio=1))
    run(monkeypatch, sams, *flags(tmp_path / "sample", ratio=1, select="sample"))
    for name in ("topk", "sample"):
        for a, b in zip(metrics(tmp_path / "all"), metrics(tmp_path / name), strict=True):
            assert {k: b[k] for k in a if not k.startswith("selector")} == {k: v for k, v in a.items() if not k.startswith("selector")}
        assert_close(weights(tmp_path / "all/checkpoint"), weights(tmp_path / name / "checkpoint"), atol=0)


def test_three_and_resume_are_six(monkeypatch, flags, tmp_path):
    """Policy, optimizers, selector, replay, running mean and the pending round go on bit for bit after every single step."""
    more = dict(context="both", epochs=2, max_steps=6)
    run(monkeypatch, sams, *flags(tmp_path / "whole", **more))

    class Killed(BaseException):
        pass

    def save_and_die(*args, **kwargs):
        common.save_state(*args, **kwargs)
        raise Killed
    for i in range(5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(sams, "save_state", save_and_die)
            run(patch, sams, *flags(tmp_path / "pieces", **more), *(["--resume"] if i else []))
    run(monkeypatch, sams, *flags(tmp_path / "pieces", **more), "--resume")
    assert metrics(tmp_path / "pieces") == metrics(tmp_path / "whole") and results(tmp_path / "pieces") == results(tmp_path / "whole")
    assert_close(weights(tmp_path / "pieces/checkpoint"), weights(tmp_path / "whole/checkpoint"), atol=0)
    assert not (tmp_path / "whole/state.pt").exists()


@pytest.mark.parametrize("kill", [("in", "reference"), ("in", "killed"), ("after", "state.pt"), ("before", "checkpoint"), ("after", "checkpoint"), ("before", "results.json")])
def test_a_killed_run_ends_with_the_same_results(plain, flags, tmp_path, kill):
    """SIGKILL while scoring the reference, training, saving and renaming."""
    more = dict(context="both", epochs=3, max_steps=10, reference=tmp_path / "reference")
    assert forked(sams, *flags(tmp_path / "killed", **more), kill=kill) == -signal.SIGKILL
    assert forked(sams, *flags(tmp_path / "killed", **more), "--resume") == 0
    assert metrics(tmp_path / "killed") == metrics(plain) and results(tmp_path / "killed") == results(plain)
    assert not list((tmp_path / "reference").glob("*.part"))


def held_out_by_hand(world, checkpoint):
    """accuracy, mean chosen and rejected reward of a checkpoint against sft, with transformers' own logits, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double() for path in (checkpoint, world / "sft"))
    tok = AutoTokenizer.from_pretrained(world / "sft")
    _, held = common.hold_out(common.load_rows(str(world / "pairs.jsonl"), "pair")[0])
    found = []
    for row in held[:16]:
        x = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        sides = [tok(row[side], add_special_tokens=False)["input_ids"] + [tok.eos_token_id] for side in ("chosen", "rejected")]
        with torch.no_grad():
            found.append([0.1 * (naive_logp(policy, x, y) - naive_logp(reference, x, y)).item() for y in sides])
    return {"accuracy": sum(w > l for w, l in found) / 16, "chosen_reward": sum(w for w, _ in found) / 16, "rejected_reward": sum(l for _, l in found) / 16}


def test_the_reported_numbers_are_those_of_the_model(plain, world):
    """results.json against the saved checkpoint and the pairs' file; counts against metrics.jsonl; which pairs are flipped against the data."""
    report, steps = json.loads((plain / "results.json").read_text()), lines(plain / "metrics.jsonl")
    by_hand = held_out_by_hand(world, plain / "checkpoint")
    assert {k: report[k] for k in by_hand} == pytest.approx(by_hand, abs=1e-4) and report["margin"] == pytest.approx(by_hand["chosen_reward"] - by_hand["rejected_reward"], abs=1e-4)
    rows = flip_labels(common.hold_out(common.load_rows(str(world / "pairs.jsonl"), "pair")[0])[0][:60], 0.2, 0)
    is_flipped = [row["chosen"] != "".join(sorted(row["prompt"][0]["content"])) for row in rows]
    assert sum(is_flipped) == 12
    order = list(itertools.chain(*(random.Random(common.seed_of(0, "order", e)).sample(range(60), 60) for e in range(3))))
    batches = [b for e in range(3) for b in (lambda o: [o[i:i + 16] for i in range(0, 60, 16)])(order[60 * e:60 * e + 60])][:10]
    for batch, m in zip(batches, steps, strict=True):
        assert set(m["selected/indices"]) <= set(batch) and len(m["selected/indices"]) == math.ceil(len(batch) / 2) == m["selected/pairs"]
        assert m["batch/flipped"] == sum(is_flipped[i] for i in batch) and m["selected/flipped"] == sum(is_flipped[i] for i in m["selected/indices"])
    assert report["flipped_selected"] == sum(m["selected/flipped"] for m in steps) / sum(m["batch/flipped"] for m in steps)
    assert report["pairs_trained"] == sum(m["selected/pairs"] for m in steps) and report["steps"] == 10 and report["seconds"] > 0
    assert (report["select"], report["ratio"], report["flip"], report["seed"]) == ("topk", 0.5, 0.2, 0)
    assert [m["step"] for m in steps if "eval/accuracy" in m] == [2, 4, 6, 8, 10] and steps[-1]["eval/accuracy"] == report["accuracy"]


def test_the_first_step_starts_at_ln_2(plain):
    """Policy and reference are one model: loss ln 2, margin and rewards 0."""
    first = metrics(plain)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["rewards/margins"]) < 1e-5 and abs(first["selected/margin"]) < 1e-5


def test_controls_pick_what_they_say(monkeypatch, flags, tmp_path):
    """random: any K, seeded; oracle: no flipped pair while there are enough others; margin: the K highest of the batch."""
    seen = []
    real = sams.pick
    monkeypatch.setattr(sams, "pick", lambda c, how, step, k, flipped, logps, ref, *more: seen.append((step, logps, ref[step], real(c, how, step, k, flipped, logps, ref, *more))) or seen[-1][-1])
    monkeypatch.setattr(Bandit, "__init__", lambda *a, **k: pytest.fail("a control needs no selector"))
    for how in ("random", "oracle", "margin"):
        run(monkeypatch, sams, *flags(tmp_path / how, select=how))
    assert results(tmp_path / "oracle")["flipped_selected"] == 0 and 0 < results(tmp_path / "random")["flipped_selected"] < 1
    assert [logps is None for _, logps, _, _ in seen] == [True] * 8 + [False] * 4
    for (step, logps, ref, (at, _)), logged in zip(seen[8:], metrics(tmp_path / "margin"), strict=True):
        m = (0.1 * ((logps - ref)[:, 0] - (logps - ref)[:, 1])).tolist()
        rest = [m[i] for i in range(len(step)) if i not in at]
        assert min(m[i] for i in at) >= max(rest)
        assert logged["selected/margin"] == near(sum(m[i] for i in at) / len(at)) and logged["unselected/margin"] == near(sum(rest) / len(rest))
    assert metrics(tmp_path / "random")[0]["selected/indices"] != metrics(tmp_path / "oracle")[0]["selected/indices"]


def test_k_is_rounded_up(monkeypatch, flags, tmp_path):
    """K = ceil(0.3 x 16) = 5, and 4 of the last batch's 12."""
    run(monkeypatch, sams, *flags(tmp_path / "run", select="random", ratio=0.3))
    assert [m["selected/pairs"] for m in metrics(tmp_path / "run")] == [5, 5, 5, 4]


def test_the_reference_is_scored_once(monkeypatch, flags, tmp_path, world):
    """A second run reads the file; other data, another model or another number format make another one."""
    more = dict(reference=tmp_path / "reference", max_steps=1)
    count = lambda: len(list((tmp_path / "reference").iterdir()))
    run(monkeypatch, sams, *flags(tmp_path / "a", **more))
    assert count() == 2  # training and held-out pairs
    real, loads = sams.load_lm, []
    with monkeypatch.context() as patch:
        patch.setattr(sams, "load_lm", lambda *args: loads.append(args) or real(*args))
        run(patch, sams, *flags(tmp_path / "b", **more, select="random"))
    assert len(loads) == 1 and count() == 2
    run(monkeypatch, sams, *flags(tmp_path / "c", **more | dict(limit=59)))
    assert count() == 3
    run(monkeypatch, sams, *flags(tmp_path / "f", **more, seed=1))  # as many pairs, others flipped
    assert count() == 4
    run(monkeypatch, sams, *flags(tmp_path / "d", **more, dtype="bfloat16", micro_batch=1))
    run(monkeypatch, sams, *flags(tmp_path / "e", **more, model=world / "sft-early"))
    assert count() == 8


def test_bf16_starts_at_exactly_0(flags, tmp_path):
    """In bf16 with one pair a pass the first step's loss is ln 2 and its margin 0, to the bit; the run trains."""
    assert forked(sams, *flags(tmp_path / "run", dtype="bfloat16", micro_batch=1, max_steps=3)) == 0
    steps = metrics(tmp_path / "run")
    assert steps[0]["rewards/margins"] == 0 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[2]["rewards/margins"] != 0


def test_selective_dpo_keeps_the_easiest(monkeypatch, flags, tmp_path, world):
    """--preselect 0.5: every pair's difficulty is its DPO loss under the model of the other half; the easier half is trained on, with the selector."""
    from transformers import AutoModelForCausalLM
    run(monkeypatch, sams, *flags(tmp_path / "run", preselect=0.5, lr=1e-3))
    out = tmp_path / "run"
    difficulty = json.loads((out / "difficulty.json").read_text())
    order = random.Random(common.seed_of(0, "halves")).sample(range(60), 60)
    tok, _ = common.load_tokenizer(str(world / "sft"))
    rows = flip_labels(common.hold_out(common.load_rows(str(world / "pairs.jsonl"), "pair")[0])[0][:60], 0.2, 0)
    pairs, _ = common.encode_pairs(tok, rows, 32, 16)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
    start = load(world / "sft")
    for unseen_by, half in ((1, order[::2]), (0, order[1::2])):
        model = load(out / f"half{unseen_by}/checkpoint")
        for i in half[:5]:
            p, y, z, _ = pairs[i]
            with torch.no_grad():
                m = 0.1 * sum(sign * (naive_logp(model, p, side) - naive_logp(start, p, side)).item() for sign, side in ((1, y), (-1, z)))
            assert difficulty[i] == pytest.approx(naive_loss(m), abs=1e-4)
    assert len(set(difficulty)) > 50
    kept = sorted(sorted(range(60), key=lambda i: difficulty[i])[:30])
    is_flipped = [row["meta"].get("flipped", False) for row in rows]
    steps = metrics(out)
    assert sum(m["batch/pairs"] for m in steps) == 30 and sum(m["batch/flipped"] for m in steps) == sum(is_flipped[i] for i in kept)
    assert results(out)["preselect"] == 0.5 and [m["selected/pairs"] for m in steps] == [8, 7]


@pytest.mark.parametrize("more, complaint", [
    (dict(ratio=0), "--ratio must be above 0"), (dict(ratio=1.5), "--ratio"), (dict(flip=-0.1), "--flip"), (dict(preselect=0), "--preselect"), (dict(gamma=2), "--gamma"),
    (dict(dtype="bfloat16"), "--dtype bfloat16 needs --micro_batch 1"), (dict(max_steps=0), "--max_steps"), (dict(limit=0), "--limit"), (dict(replay=-1), "--replay"),
    (dict(beta=0), "--beta"), (dict(batch=10), "can't be divided"), (dict(max_prompt=2), "too few"), (dict(test="nothing.jsonl"), "nothing.jsonl: no such file"),
])
def test_bad_input_is_one_line_before_any_model(monkeypatch, flags, tmp_path, capsys, more, complaint):
    """Exit code 2, one line on stderr, no folder."""
    assert complaint in refused(monkeypatch, capsys, sams, flags(tmp_path / "run", **more)) and not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, flags, tmp_path, capsys):
    """Counts, flips, steps and one pair with its masks; no folder, no model."""
    monkeypatch.setattr(sams, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    run(monkeypatch, sams, *flags(tmp_path / "run"), "--dry_run")
    text = capsys.readouterr().out
    assert "60 training pairs (12 flipped), 16 held-out pairs" in text and "4 steps" in text and "no loss: '<bos><|user|>" in text and "rejected, with loss" in text
    assert not list(tmp_path.iterdir())
