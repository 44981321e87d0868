"""sams.py: its equations against naive loops, the bandit's order of events, and whole runs."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import shutil
import signal
import threading
from typing import NamedTuple

import pytest
import torch
from conftest import (
    assert_close,
    forked,
    lines,
    metrics,
    refused,
    results,
    run,
    sams_flags,
    together,
    weights,
)
from test_equations import mean, naive_logp, naive_loss, naive_sigmoid, random_pairs, tiny_lm
from torch import Tensor

import common
import datafiles
import job
import sams
from common import Model, Pair
from sams import (
    Bandit,
    Config,
    Data,
    PoolingScorer,
    Selector,
    bandit_rewards,
    batch_reward,
    bounded_loss,
    context,
    descend,
    dpo_losses,
    flip_labels,
    ipo_losses,
    margins,
    min_max,
    observe,
    pick,
    rank_correlation,
    sample_reward,
    selector_loss,
    take_step,
    top_k,
)

near = functools.partial(pytest.approx, rel=1e-5, abs=1e-6)
CPU = torch.device("cpu")


def tiny(**more) -> Config:
    """The configuration of a few steps on a tiny model."""
    values = {
        "dtype": "float32",
        "micro_batch": 3,
        "batch": 12,
        "beta": 0.3,
        "activation_checkpointing": False,
        "parallel": "none",
    }
    values.update(more)
    return Config(**values)


def random_numbers(rng: random.Random, n: int, low: float, high: float) -> list[float]:
    return [rng.uniform(low, high) for _ in range(n)]


# ---------------------------------------------------------------- the naive reference


def naive_ratio(logps: list[float], ref_logps: list[float]) -> float:
    """log pi/pi_ref(y_w) - log pi/pi_ref(y_l), of a pair's [chosen, rejected]."""
    of_chosen = logps[0] - ref_logps[0]
    of_rejected = logps[1] - ref_logps[1]
    return of_chosen - of_rejected


def naive_bounded_loss(m: list[float]) -> float:
    """L~ = mean_i -sigmoid(m_i)."""
    return -mean([naive_sigmoid(x) for x in m])


def naive_rho(before: float, after: float) -> float:
    """(L~_{t-1} - L~_t) / max(|L~_{t-1}|, |L~_t|)."""
    return (before - after) / max(abs(before), abs(after))


def naive_min_max(v: list[float]) -> list[float]:
    """(x - min) / (max - min)."""
    low, high = min(v), max(v)
    return [(x - low) / (high - low) for x in v]


def naive_kappa(m: list[float], y: list[float], w_m: float, w_u: float) -> list[float]:
    """w_m mm(m_i) + w_u (1 - mm(log pi(y_w)_i))."""
    kappa = []
    for margin, logp in zip(naive_min_max(m), naive_min_max(y)):
        kappa.append(w_m * margin + w_u * (1 - logp))
    return kappa


def naive_reward(rho: float, kappa: float, gamma: float) -> float:
    """gamma sigmoid(a rho + b) + (1 - gamma) sigmoid(kappa), with a = 50 and b = 0.5."""
    return gamma * naive_sigmoid(50 * rho + 0.5) + (1 - gamma) * naive_sigmoid(kappa)


def naive_top(scores: list[float], k: int) -> list[int]:
    """The places of the k highest scores, ascending."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(order[:k])


def mean_square(a: list[float], b: list[float]) -> float:
    """mean_i (a_i - b_i)^2."""
    return mean([(x - y) ** 2 for x, y in zip(a, b, strict=True)])


# ---------------------------------------------------------------- equations


def test_margins_and_losses_are_the_formulas():
    """m, DPO and IPO of one pair at a time; margin 0 costs ln 2 in DPO, (1 / 2 beta)^2 in IPO."""
    rng = random.Random(0)
    beta = 0.3
    logps = [random_numbers(rng, 2, -9, 0) for _ in range(5)]
    ref_logps = [random_numbers(rng, 2, -9, 0) for _ in range(5)]
    ratios = []
    for own, reference in zip(logps, ref_logps):
        ratios.append(naive_ratio(own, reference))
    of_dpo = [naive_loss(beta * ratio) for ratio in ratios]
    of_ipo = [(ratio - 1 / (2 * beta)) ** 2 for ratio in ratios]

    found = margins(torch.tensor(logps), torch.tensor(ref_logps), beta)
    assert found.tolist() == near([beta * ratio for ratio in ratios])
    assert dpo_losses(found).tolist() == near(of_dpo)
    assert ipo_losses(found, beta).tolist() == near(of_ipo)

    zero = torch.zeros(1)
    assert dpo_losses(zero).item() == near(math.log(2))
    assert ipo_losses(zero, beta).item() == near(1 / (4 * beta**2))


def test_the_batch_reward_is_the_relative_gain():
    """L~ lies in [-1, 0]; rho > 0 when it falls; swapping before and after flips rho's sign."""
    m = [-2.0, 0.0, 3.0]
    before = bounded_loss(torch.tensor(m)).item()
    after = bounded_loss(torch.tensor([x + 1 for x in m])).item()
    assert before == near(naive_bounded_loss(m))
    assert -1 < after < before < 0

    rho = batch_reward(before, after)
    assert rho == near((before - after) / -after)
    assert rho > 0
    assert batch_reward(after, before) == near(-rho)
    assert batch_reward(before, before) == 0


def test_rewards_are_the_formulas():
    """kappa and r with other weights than the defaults; a gain of the batch raises every r."""
    rng = random.Random(1)
    m = random_numbers(rng, 6, -5, 5)
    y = random_numbers(rng, 6, -5, 5)
    for w_m, w_u in ((0.5, 0.5), (0.7, 0.2)):
        kappa = naive_kappa(m, y, w_m, w_u)
        found = sample_reward(torch.tensor(m), torch.tensor(y), w_m, w_u)
        assert found.tolist() == near(kappa)
        for gamma, rho in ((0.5, 0.01), (0.2, -0.03)):
            r = [naive_reward(rho, k, gamma) for k in kappa]
            assert bandit_rewards(rho, found, gamma).tolist() == near(r)
    assert (bandit_rewards(0.01, found) > bandit_rewards(-0.01, found)).all()


def test_a_constant_batch_has_finite_rewards():
    """min-max is 0.5 everywhere where all are equal, so kappa is half its weights' sum."""
    same = torch.full((4,), -3.0)
    assert min_max(same).tolist() == [0.5] * 4
    assert min_max(torch.tensor([2.0, -2.0, 0.0])).tolist() == [1.0, 0.0, 0.5]
    assert sample_reward(same, same, 0.7, 0.2).tolist() == near([0.45] * 4)


def test_the_k_highest_are_selected_in_the_batches_order():
    """Places ascend, ties go to the first, K = n is the batch as it is."""
    scores = torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5])
    assert top_k(scores, 2) == [1, 3]
    assert top_k(scores, 3) == [1, 3, 4]
    assert top_k(scores, 5) == [0, 1, 2, 3, 4]
    assert top_k(torch.zeros(4), 2) == [0, 1]
    assert top_k(scores, 5, seed=3) == [0, 1, 2, 3, 4]


def test_sampling_follows_softmax_without_replacement():
    """Frequencies of all pairs of 4: p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    scores = [0.0, 1.0, 2.0, -1.0]
    n = 6000
    total = sum(math.exp(s) for s in scores)
    p = [math.exp(s) / total for s in scores]

    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for seed in range(n):
        i, j = top_k(torch.tensor(scores), 2, job.seed_of(seed))
        counts[i, j] += 1
    for (i, j), count in counts.items():
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert count / n == pytest.approx(expected, abs=4 * math.sqrt(expected / n))


def pearson(x: list[float], y: list[float]) -> float:
    """The correlation of two lists of numbers."""
    x = [value - mean(x) for value in x]
    y = [value - mean(y) for value in y]
    xy = sum(a * b for a, b in zip(x, y))
    xx = sum(a**2 for a in x)
    yy = sum(b**2 for b in y)
    return xy / math.sqrt(xx * yy)


def test_rank_correlation_is_spearmans():
    """1 for any rising function, -1 for a falling one, average ranks for ties, 0 for a constant."""
    a = torch.tensor([3.0, 1.0, 2.0, 2.0])
    b = torch.tensor([10.0, 5.0, 5.0, 7.0])
    ranks = [4, 1, 2.5, 2.5], [4, 1.5, 1.5, 3]
    assert rank_correlation(a, b) == near(pearson(*ranks))
    assert rank_correlation(a, a.exp()) == near(1)
    assert rank_correlation(a, -a) == near(-1)
    assert rank_correlation(a, torch.ones(4)) == 0


# ---------------------------------------------------------------- contexts


def states_by_layer(lm, ids: list[int]) -> list[list[list[float]]]:
    """Every layer's output for one sequence, from a plain forward: L lists of T lists of D."""
    states = []

    def keep(layer, args, out):
        if isinstance(out, tuple):
            out = out[0]
        states.append(out[0].tolist())

    hooks = [layer.register_forward_hook(keep) for layer in lm.model.layers]
    lm(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return states


def naive_pooled(lm, prompt: list[int], response: list[int]) -> list[list[float]]:
    """The mean over the response's tokens of every layer's output: L lists of D numbers."""
    pooled = []
    for states in states_by_layer(lm, prompt + response):
        of_response = states[len(prompt) :]
        pooled.append([mean(values) for values in zip(*of_response)])
    return pooled


def test_contexts_are_means_over_response_tokens():
    """Every layer's output, averaged over the response of one sequence at a time, unpadded.

    Log-probs are the same as without pooling.
    """
    lm = tiny_lm(3)
    pairs = random_pairs(4)
    expected = [naive_pooled(lm, pair.prompt, pair.chosen) for pair in pairs]
    expected += [naive_pooled(lm, pair.prompt, pair.rejected) for pair in pairs]

    scorer = PoolingScorer(lm)
    batch = common.collate_pairs(pairs, "cpu")
    logps, pooled = scorer(*batch, pool=True)
    assert pooled.flatten().tolist() == near(torch.tensor(expected).flatten().tolist())

    plain_logps, nothing = scorer(*batch)
    assert torch.equal(logps, plain_logps)
    assert nothing is None
    assert scorer.pooled == {}


def test_the_context_of_a_pair_is_a_mean_and_perhaps_a_difference():
    """mean: of both sides, so the released context can't see a flip. both: and their difference."""
    _, pooled = PoolingScorer(tiny_lm(3))(*common.collate_pairs(random_pairs(4), "cpu"), pool=True)
    chosen, rejected = pooled[:4], pooled[4:]
    mean_of_both = (chosen + rejected) / 2
    both = torch.cat([mean_of_both, chosen - rejected], -1)
    assert torch.equal(context(pooled, "mean"), mean_of_both)
    assert torch.equal(context(pooled, "both"), both)

    flipped = torch.cat([rejected, chosen])
    assert torch.equal(context(flipped, "mean"), mean_of_both)
    assert not torch.equal(context(flipped, "both"), both)


# ---------------------------------------------------------------- the selector


def test_f2_learns_the_residual_and_leaves_f1_alone():
    """The loss is two mean squared errors; f2's part sends no gradient into encoder and f1."""
    torch.manual_seed(0)
    selector = Selector(2, 8)
    x = torch.randn(5, 2, 8)
    r = torch.rand(5)
    f1, f2 = selector(x)
    residual = [target - value for target, value in zip(r.tolist(), f1.tolist())]
    of_f1 = mean_square(f1.tolist(), r.tolist())
    of_f2 = mean_square(f2.tolist(), residual)
    assert selector_loss(f1, f2, r).item() == near(of_f1 + of_f2)

    names = [name for name, _ in selector.named_parameters()]
    params = list(selector.parameters())
    of_both = torch.autograd.grad(selector_loss(f1, f2, r), params, retain_graph=True)
    of_f1_alone = torch.autograd.grad((f1 - r).square().mean(), params, allow_unused=True)
    for name, both, alone in zip(names, of_both, of_f1_alone):
        if name.startswith("explore"):
            assert alone is None, name
            assert both.abs().sum() > 0, name
        else:
            assert torch.equal(both, alone), name


def test_the_regression_target_is_never_broadcast():
    """Targets [K, 1] or [1] against predictions [K] are an error, not a matrix of differences."""
    f = torch.zeros(4)
    for bad in (torch.zeros(4, 1), torch.zeros(1), torch.zeros(())):
        with pytest.raises(ValueError, match="would broadcast"):
            selector_loss(f, f, bad)
        with pytest.raises(ValueError, match="would broadcast"):
            selector_loss(f, bad, f)


def test_f1_fits_four_targets():
    """Targets 0, 1, 2, 3 for four contexts to less than 1e-3.

    The released regressor ends at 2.5 for a perfect prediction.
    """
    torch.manual_seed(0)
    selector = Selector(3, 8)
    x = torch.randn(4, 3, 8)
    r = torch.arange(4.0)
    optimizer = torch.optim.Adam(selector.parameters(), lr=1e-3)
    for _ in range(300):
        f1, f2 = selector(x)
        loss = selector_loss(f1, f2, r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    f1, _ = selector(x)
    assert (f1 - r).abs().max() < 1e-2
    assert (f1 - r).square().mean() < 1e-3


def test_the_selector_tells_layers_apart():
    """A layer is known by its embedding alone.

    States and embeddings swapped together predict the same; states swapped alone predict what the
    embeddings swapped alone do, and not the same.
    """
    torch.manual_seed(0)
    selector = Selector(2, 8)
    x = torch.randn(3, 2, 8)
    torch.nn.init.normal_(selector.layer)
    swapped = copy.deepcopy(selector)
    swapped.layer.data = selector.layer.data.flip(0)

    def f1(selector, x) -> list[float]:
        return selector(x)[0].tolist()

    plain = f1(selector, x)
    states_alone = f1(selector, x.flip(1))
    assert f1(swapped, x.flip(1)) == near(plain)
    assert f1(swapped, x) == near(states_alone)
    for a, b in zip(plain, states_alone):
        assert abs(a - b) > 1e-3


# ---------------------------------------------------------------- the bandit


class Round(NamedTuple):
    """What a scripted round shows of its 6 pairs."""

    contexts: Tensor  # [6, 2, 8]
    margin: Tensor  # [6]
    chosen_logps: Tensor  # [6]


def scripted_rounds(n: int) -> list[Round]:
    g = torch.Generator().manual_seed(0)
    contexts = torch.randn(n, 6, 2, 8, generator=g)
    margin = 0.05 * torch.randn(n, 6, generator=g)  # small: sigmoid(50 rho) must not saturate
    chosen_logps = torch.randn(n, 6, generator=g)
    return [Round(*of_round) for of_round in zip(contexts, margin, chosen_logps)]


def same_weights(a: dict, b: dict) -> bool:
    """Whether two state dicts hold the same, to the bit."""
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_rewards_lag_by_one_round():
    """A scripted trace of three rounds, number by number.

    Round t's reward uses its own margins and log-probs, the bounded losses of t and t + 1, and the
    running mean of rho. The selector is fitted to it before it scores round t + 1. Only selected
    pairs are rewarded.
    """
    c = tiny(
        gamma=0.4,
        margin_weight=0.7,
        uncertainty_weight=0.2,
        explore=0.3,
        fit_steps=2,
        selector_lr=1e-2,
    )
    bandit = Bandit(2, 8, c, CPU)
    script = scripted_rounds(3)
    losses = [naive_bounded_loss(shown.margin.tolist()) for shown in script]
    rhos, rewarded, places, predicted = [], [], [], []

    for t, shown in enumerate(script):
        before = copy.deepcopy(bandit.selector.state_dict())
        last_places, last_predicted = places, predicted
        places, log = bandit.round(*shown, 3, None)

        if t == 0:
            assert log == {}
            assert not bandit.replay
            assert same_weights(bandit.selector.state_dict(), before)
        else:
            last = script[t - 1]
            rhos.append(naive_rho(losses[t - 1], losses[t]))
            smoothed = 0.5 * rhos[-1] + 0.5 * mean(rhos)
            kappa = naive_kappa(last.margin.tolist(), last.chosen_logps.tolist(), 0.7, 0.2)
            r = [naive_reward(smoothed, kappa[i], 0.4) for i in last_places]
            rewarded.append((last.contexts[last_places], r))
            for (contexts, reward), (past, past_r) in zip(bandit.replay, rewarded, strict=True):
                assert torch.equal(contexts, past)
                assert reward.tolist() == near(past_r)

            assert log["selector/rho"] == near(rhos[-1])
            assert log["selector/reward"] == near(mean(r))
            assert log["selector/error"] == near(math.sqrt(mean_square(last_predicted, r)))
            assert log["selector/predicted"] == near(mean(last_predicted))
            assert not same_weights(bandit.selector.state_dict(), before)

        f1, f2 = bandit.selector(shown.contexts)  # after the fit
        scores = (f1 + 0.3 * f2).tolist()
        assert places == naive_top(scores, 3)
        predicted = f1[places].tolist()


def numbered_round(bandit: Bandit, t: int):
    """A round of 4 pairs whose contexts are full of the number t; 2 of them are picked."""
    contexts = torch.full((4, 2, 8), float(t))
    bandit.round(contexts, torch.randn(4), torch.randn(4), 2, None)


def test_replay_holds_so_many_earlier_rounds():
    """--replay 2: this round and the two before it."""
    bandit = Bandit(2, 8, tiny(replay=2), CPU)
    for t in range(6):
        numbered_round(bandit, t)
    assert [contexts[0, 0, 0].item() for contexts, _ in bandit.replay] == [2, 3, 4]


def test_a_fit_is_one_pass_over_the_replay():
    """The Adam steps of a round see each of the rounds held exactly once, in fit_steps parts."""
    bandit = Bandit(2, 8, tiny(replay=4, fit_steps=2), CPU)
    parts = []

    def keep_numbers(module, args, out):
        (contexts,) = args
        if torch.is_grad_enabled():  # it is fitted, not asked
            parts.append(sorted(set(contexts[:, 0, 0].tolist())))

    bandit.selector.register_forward_hook(keep_numbers)
    for t in range(5):
        parts.clear()
        numbered_round(bandit, t)
        assert sorted(itertools.chain(*parts)) == list(range(t))
        assert len(parts) == min(t, 2)
    assert len(parts[0]) == len(parts[1]) == 2


def test_the_bytes_of_the_bandit_are_those_of_its_tensors():
    """Weights, gradients, Adam's two moments, and the contexts in the replay."""
    bandit = Bandit(2, 8, tiny(replay=2), CPU)
    for t in range(4):
        numbered_round(bandit, t)
    total = 0
    for p in bandit.selector.parameters():
        state = bandit.optimizer.state[p]
        total += p.nbytes + p.grad.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    for contexts, _ in bandit.replay:
        total += contexts.nbytes
    assert bandit.nbytes() == total


def test_the_selector_learns_what_is_rewarded():
    """Where the reward is a function of the context, 60 rounds teach it.

    Predicted and observed rewards then agree in rank, and the better pairs are chosen.
    """
    c = tiny(gamma=0.0, margin_weight=1.0, uncertainty_weight=0.0, selector_lr=1e-3)
    bandit = Bandit(1, 4, c, CPU)
    g = torch.Generator().manual_seed(0)
    correlations, gains = [], []
    for _ in range(60):
        x = torch.randn(16, 1, 4, generator=g)
        margin = x[:, 0, 1] - x[:, 0, 3]
        places, log = bandit.round(x, margin, torch.zeros(16), 8, None)
        correlations.append(log.get("selector/rank_correlation", 0))
        gains.append(margin[places].mean().item() - margin.mean().item())
    assert mean(correlations[-10:]) > 0.7
    assert mean(gains[-10:]) > 0.6


# ---------------------------------------------------------------- one round on a model


def data_of(lm, pairs: list[Pair], c: Config) -> Data:
    """The pairs with their log-probs under `lm` as the reference's."""
    seen = observe(c, PoolingScorer(lm), pairs, list(range(len(pairs))), CPU)
    return Data(pairs, seen.logps, [False] * len(pairs))


def naive_logps(lm, pair: Pair) -> list[Tensor]:
    """log pi of chosen and rejected, one sequence at a time, differentiable."""
    return [naive_logp(lm, pair.prompt, y) for y in (pair.chosen, pair.rejected)]


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_gradient_is_that_of_the_selected_alone(loss):
    """The gradient of K pairs is that of the mean of their losses, one at a time in float64.

    It is made in micro-batches. Log-probs [n, 2] are the naive ones too.
    """
    c = tiny(loss=loss)
    lm, start = tiny_lm(1), tiny_lm(2)
    pairs = random_pairs(12)
    data = data_of(start, pairs, c)

    start.double()
    naive_ref = []
    for pair in pairs:
        naive_ref.append([logp.item() for logp in naive_logps(start, pair)])
    assert data.ref_logps.flatten().tolist() == near(sum(naive_ref, []))

    selected = [1, 4, 5, 10]
    lm.zero_grad()
    sums = descend(c, PoolingScorer(lm), data, selected, CPU)

    exact = copy.deepcopy(lm).double()
    exact.zero_grad()
    losses, accurate = [], 0
    for i in selected:
        h = naive_ratio(naive_logps(exact, pairs[i]), naive_ref[i])
        if loss == "dpo":
            losses.append(-torch.log(torch.sigmoid(c.beta * h)))
        else:
            losses.append((h - 1 / (2 * c.beta)) ** 2)
        accurate += h.item() > 0
    mean_loss = mean(losses)
    mean_loss.backward()

    assert sums["loss"].item() == near(mean_loss.item())
    assert sums["rewards/accuracies"].item() == accurate / 4
    for (name, p), q in zip(lm.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_one_step_raises_the_margin_of_the_selected():
    """Away from the reference and at it, for both losses."""
    selected = [0, 2, 3]
    for loss in ("dpo", "ipo"):
        c = tiny(loss=loss, beta=0.1)
        lm = tiny_lm(4)
        data = data_of(lm, random_pairs(6), c)
        policy = PoolingScorer(lm)
        descend(c, policy, data, selected, CPU)
        take_step(torch.optim.SGD(lm.parameters(), lr=1e-3), 1e-3, 1.0)

        seen = observe(c, policy, data.pairs, selected, CPU)
        assert margins(seen.logps, data.ref_logps[selected], c.beta).mean() > 1e-5


def test_only_sample_draws():
    """From equal states of the bandit, `sample` picks by its seed, `topk` the K highest scores."""
    c = tiny()
    batch = Data(random_pairs(12), torch.zeros(12, 2), [False] * 12)
    seen = observe(c, PoolingScorer(tiny_lm(6)), batch.pairs, list(range(12)), CPU, "mean")

    def choose(how: str, step: int) -> list[int]:
        places, _ = pick(c, how, batch, seen, Bandit(2, 16, c, CPU), step)
        return places

    assert choose("sample", 1) == choose("sample", 1)
    assert len({tuple(choose("sample", step)) for step in range(5)}) > 2

    f1, f2 = Bandit(2, 16, c, CPU).selector(seen.contexts)
    highest = naive_top((f1 + c.explore * f2).tolist(), 6)
    assert choose("topk", 1) == choose("topk", 2) == highest


def test_policy_and_reference_agree_to_the_bit_in_bf16():
    """With one pair a forward pass, an untrained policy's margin is 0 in any order of the batch.

    In larger batches it would not be.
    """
    c = tiny(dtype="bfloat16", micro_batch=1)
    pairs = random_pairs(12)
    policy = PoolingScorer(tiny_lm(5))
    order = random.Random(0).sample(range(12), 12)
    ref_logps, _ = observe(c, policy, pairs, list(range(12)), CPU)
    logps, _ = observe(c, policy, pairs, order, CPU)
    assert torch.equal(logps, ref_logps[order])
    assert ref_logps.dtype == torch.float32

    full, _ = observe(tiny(), policy, pairs, order, CPU)
    assert (full - ref_logps[order]).abs().max() > 1e-4  # it was bf16


def flipped_rows(rows: list[dict]) -> list[int]:
    """Which rows are marked as flipped."""
    return [i for i, row in enumerate(rows) if row["meta"].get("flipped")]


def test_flips_are_seeded_marked_and_exact():
    """A share of the rows has its sides and their ends swapped; the rest is untouched.

    A flip of a flip is unmarked.
    """
    rows = []
    for i in range(50):
        row = {"id": str(i), "prompt": [], "chosen": f"c{i}", "rejected": f"r{i}"}
        row["meta"] = {"rejected_ended": False}
        rows.append(row)

    flipped = flip_labels(rows, 0.3, 0)
    swapped = flipped_rows(flipped)
    assert len(swapped) == 15
    assert swapped != flipped_rows(flip_labels(rows, 0.3, 1))

    meta = {"flipped": True, "chosen_ended": False, "rejected_ended": True}
    for i, row in enumerate(flipped):
        if i in swapped:
            assert (row["chosen"], row["rejected"]) == (f"r{i}", f"c{i}")
            assert row["meta"] == meta
        else:
            assert row is rows[i]

    back = flip_labels(flipped, 1.0, 0)
    assert not any(back[i]["meta"]["flipped"] for i in swapped)
    assert flip_labels(rows, 0.0, 0) == rows


# ---------------------------------------------------------------- whole runs


TEN_ROUNDS = {"context": "both", "epochs": 3, "max_steps": 10}  # of 16 pairs, with replay


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    """Flags of a run into a folder; all runs of this module share their reference log-probs."""
    reference = tmp_path_factory.mktemp("reference")

    def make(out, **more) -> list[str]:
        values = {"out": out, "reference": reference}
        values.update(more)
        return sams_flags(world, **values)

    return make


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """One run in one process: 10 rounds of 16, seeing both sides, with replay."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert forked(sams, *flags(out, **TEN_ROUNDS)) == 0
    return out


def training_rows(world) -> list[dict]:
    """The 60 rows that these runs train on, 12 of them flipped."""
    rows, _ = datafiles.load_rows(str(world / "pairs.jsonl"), "pair")
    rows, _ = datafiles.hold_out(rows)
    return flip_labels(rows[:60], 0.2, 0)


def without(line: dict, *names: str) -> dict:
    return {name: value for name, value in line.items() if name not in names}


def test_two_ranks_select_and_learn_what_one_does(plain, flags, tmp_path):
    """DDP and FSDP on two ranks: the same pairs in all 10 rounds, and the same numbers.

    They are rewards, losses, weights and what is measured on held-out pairs.
    """
    runs = []
    for way in ("ddp", "fsdp"):
        more = {"parallel": way, "reference": "reference", "activation_checkpointing": True}
        runs.append((2, False, flags(way, **TEN_ROUNDS, **more)))
    together(sams, tmp_path, 2, runs)

    one = metrics(plain)
    assert len(one) == 10
    assert len({tuple(line["selected/indices"]) for line in one}) == 10
    not_close = ["selector/rank_correlation", "selected/indices"]  # it jumps, and a list
    for way in ("ddp", "fsdp"):
        two = metrics(tmp_path / way)
        for a, b in zip(one, two, strict=True):
            assert b["selected/indices"] == a["selected/indices"]
            expected = pytest.approx(without(a, *not_close), rel=2e-3, abs=2e-4)
            assert without(b, *not_close) == expected
        found = weights(tmp_path / way / "checkpoint")
        assert_close(weights(plain / "checkpoint"), found, atol=2e-4)


def without_selector(line: dict) -> dict:
    return {name: value for name, value in line.items() if not name.startswith("selector")}


def test_everything_selected_is_dpo_to_the_bit(monkeypatch, flags, tmp_path):
    """--ratio 1 with the selector at work gives the weights and the losses of --select all."""
    run(monkeypatch, sams, *flags(tmp_path / "all", select="all"))
    run(monkeypatch, sams, *flags(tmp_path / "topk", ratio=1))
    run(monkeypatch, sams, *flags(tmp_path / "sample", ratio=1, select="sample"))
    dpo_weights = weights(tmp_path / "all" / "checkpoint")
    for name in ("topk", "sample"):
        for a, b in zip(metrics(tmp_path / "all"), metrics(tmp_path / name), strict=True):
            a = without_selector(a)
            assert {key: b[key] for key in a} == a
        assert_close(dpo_weights, weights(tmp_path / name / "checkpoint"), atol=0)


def test_three_and_resume_are_six(monkeypatch, flags, tmp_path):
    """The run goes on bit for bit after every single step.

    Saved are policy, optimizers, selector, replay, running mean and the pending round.
    """
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    more = {"context": "both", "epochs": 2, "max_steps": 6}
    run(monkeypatch, sams, *flags(whole, **more))
    save_state = job.save_state

    class Killed(BaseException):
        pass

    def save_and_die(*args, **kwargs):
        save_state(*args, **kwargs)
        raise Killed

    resume = []
    for _ in range(5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(job, "save_state", save_and_die)
            run(patch, sams, *flags(pieces, **more), *resume)
        resume = ["--resume"]
    run(monkeypatch, sams, *flags(pieces, **more), *resume)

    assert metrics(pieces) == metrics(whole)
    assert results(pieces) == results(whole)
    assert_close(weights(pieces / "checkpoint"), weights(whole / "checkpoint"), atol=0)
    assert not (whole / "state.pt").exists()


@pytest.mark.parametrize(
    "kill",
    [
        ("in", "reference"),
        ("in", "killed"),
        ("after", "state.pt"),
        ("before", "checkpoint"),
        ("after", "checkpoint"),
        ("before", "results.json"),
    ],
)
def test_a_killed_run_ends_with_the_same_results(plain, flags, tmp_path, kill):
    """SIGKILL while scoring the reference, training, saving and renaming."""
    out = tmp_path / "killed"
    command = flags(out, **TEN_ROUNDS, reference=tmp_path / "reference")
    assert forked(sams, *command, kill=kill) == -signal.SIGKILL
    assert forked(sams, *command, "--resume") == 0
    assert metrics(out) == metrics(plain)
    assert results(out) == results(plain)
    assert not list((tmp_path / "reference").glob("*.part"))


def load_exact(path):
    """A checkpoint in float64, with transformers' own code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()


def held_out_by_hand(world, checkpoint) -> dict[str, float]:
    """Accuracy and mean rewards of a checkpoint against sft, one sequence at a time."""
    from transformers import AutoTokenizer

    policy, reference = load_exact(checkpoint), load_exact(world / "sft")
    tok = AutoTokenizer.from_pretrained(world / "sft")

    def reward(row: dict, side: str) -> float:
        x = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        y = tok(row[side], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        with torch.no_grad():
            return 0.1 * (naive_logp(policy, x, y) - naive_logp(reference, x, y)).item()

    rows, _ = datafiles.load_rows(str(world / "pairs.jsonl"), "pair")
    _, held = datafiles.hold_out(rows)
    chosen = [reward(row, "chosen") for row in held[:16]]
    rejected = [reward(row, "rejected") for row in held[:16]]
    assert len(chosen) == 16
    return {
        "accuracy": mean([float(better > worse) for better, worse in zip(chosen, rejected)]),
        "chosen_reward": mean(chosen),
        "rejected_reward": mean(rejected),
        "margin": mean(chosen) - mean(rejected),
    }


def batches_by_hand(n: int, epochs: int, size: int) -> list[list[int]]:
    """The pairs of each batch, in the order that the seed 0 gives."""
    batches = []
    for epoch in range(epochs):
        order = random.Random(job.seed_of(0, "order", epoch)).sample(range(n), n)
        for start in range(0, n, size):
            batches.append(order[start : start + size])
    return batches


def test_the_reported_numbers_are_those_of_the_model(plain, world):
    """results.json against the saved checkpoint, the pairs' file and metrics.jsonl.

    Which pairs are flipped is known from the data.
    """
    report = json.loads((plain / "results.json").read_text())
    steps = lines(plain / "metrics.jsonl")
    by_hand = held_out_by_hand(world, plain / "checkpoint")
    assert {key: report[key] for key in by_hand} == pytest.approx(by_hand, abs=1e-4)

    is_flipped, tokens = [], []
    for row in training_rows(world):
        solution = "".join(sorted(row["prompt"][0]["content"]))
        is_flipped.append(row["chosen"] != solution)
        tokens.append(len(row["chosen"]) + 1 + len(row["rejected"]) + 1)  # letters, and two ends
    assert sum(is_flipped) == 12

    batches = batches_by_hand(60, 3, 16)[:10]
    for batch, line in zip(batches, steps, strict=True):
        selected = line["selected/indices"]
        assert set(selected) <= set(batch)
        assert len(selected) == math.ceil(len(batch) / 2) == line["selected/pairs"]
        assert line["batch/flipped"] == sum(is_flipped[i] for i in batch)
        assert line["selected/flipped"] == sum(is_flipped[i] for i in selected)
        unselected = set(batch) - set(selected)
        assert line["selected/length"] == near(mean([tokens[i] for i in selected]))
        assert line["unselected/length"] == near(mean([tokens[i] for i in unselected]))

    def total(name: str) -> float:
        return sum(line[name] for line in steps)

    assert report["flipped_selected"] == total("selected/flipped") / total("batch/flipped")
    assert report["pairs_trained"] == total("selected/pairs")
    assert report["steps"] == 10
    assert report["seconds"] > 0
    asked = {"select": "topk", "ratio": 0.5, "flip": 0.2, "seed": 0}
    assert {key: report[key] for key in asked} == asked

    measured = [line["step"] for line in steps if "eval/accuracy" in line]
    assert measured == [2, 4, 6, 8, 10]
    assert steps[-1]["eval/accuracy"] == report["accuracy"]


def test_the_selected_are_trained_on_and_no_others(plain):
    """The margin that training sees is the mean of the selected pairs' margins, in every step."""
    for line in metrics(plain):
        assert line["rewards/margins"] == pytest.approx(line["selected/margin"], abs=1e-5)
    assert abs(line["selected/margin"] - line["unselected/margin"]) > 1e-3  # it could be seen


def test_a_row_that_is_left_out_takes_its_mark_along(world, tmp_path):
    """Which pairs are flipped stays true when prompts that are too long are left out."""
    pairs_file, held_file = str(world / "pairs.jsonl"), tmp_path / "held.jsonl"
    held_file.write_text("".join((world / "pairs.jsonl").open().readlines()[60:]))
    more = {"max_prompt": 10, "max_response": 16, "flip": 0.4, "limit": 60}
    more["test"] = str(held_file)
    c = Config(model=str(world / "sft"), data=pairs_file, dtype="float32", **more)
    _, pairs, flipped, _ = sams.prepare(c, CPU)

    rows, _ = datafiles.load_rows(pairs_file, "pair", 60)
    marks = {}
    for row in flip_labels(rows, 0.4, 0):
        marks[row["id"]] = row["meta"].get("flipped", False)
    assert 10 < len(pairs) < 50
    assert flipped == [marks[pair.id] for pair in pairs]


def test_the_first_step_starts_at_ln_2(plain):
    """Policy and reference are one model: loss ln 2, margin and rewards 0."""
    first = metrics(plain)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-5
    assert abs(first["selected/margin"]) < 1e-5


class Choice(NamedTuple):
    """A call of pick()."""

    batch: Data
    seen: sams.Seen | None
    places: list[int]


def test_controls_pick_what_they_say(monkeypatch, flags, tmp_path):
    """random: any K, seeded. oracle: no flipped pair while others last. margin: the K highest."""
    choices = []

    def keep_choice(c, how, batch, seen, bandit, step):
        places, learned = pick(c, how, batch, seen, bandit, step)
        choices.append(Choice(batch, seen, places))
        return places, learned

    def no_selector(*args, **kwargs):
        pytest.fail("a control needs no selector")

    monkeypatch.setattr(sams, "pick", keep_choice)
    monkeypatch.setattr(Bandit, "__init__", no_selector)
    for how in ("random", "oracle", "margin"):
        run(monkeypatch, sams, *flags(tmp_path / how, select=how))
    assert results(tmp_path / "oracle")["flipped_selected"] == 0
    assert 0 < results(tmp_path / "random")["flipped_selected"] < 1
    for choice in choices[:4]:
        k = len(choice.places)
        assert k == len(choice.batch.pairs) // 2
        assert choice.places != list(range(k))  # drawn, not the first ones
    assert choices[0].places != choices[1].places
    unseen = [choice.seen is None for choice in choices]
    assert unseen == [True] * 8 + [False] * 4

    by_margin = metrics(tmp_path / "margin")
    for (batch, seen, places), line in zip(choices[8:], by_margin, strict=True):
        selected, unselected = [], []
        for i, (logps, ref) in enumerate(zip(seen.logps.tolist(), batch.ref_logps.tolist())):
            m = 0.1 * naive_ratio(logps, ref)
            if i in places:
                selected.append(m)
            else:
                unselected.append(m)
        assert len(selected) == len(places)
        assert min(selected) >= max(unselected)
        assert line["selected/margin"] == near(mean(selected))
        assert line["unselected/margin"] == near(mean(unselected))

    at_random, by_oracle = metrics(tmp_path / "random")[0], metrics(tmp_path / "oracle")[0]
    assert at_random["selected/indices"] != by_oracle["selected/indices"]


def test_k_is_rounded_up(monkeypatch, flags, tmp_path):
    """K = ceil(0.3 x 16) = 5, and 4 of the last batch's 12."""
    run(monkeypatch, sams, *flags(tmp_path / "run", select="random", ratio=0.3))
    assert [line["selected/pairs"] for line in metrics(tmp_path / "run")] == [5, 5, 5, 4]


def test_the_reference_is_scored_once(monkeypatch, flags, tmp_path, world):
    """A second run reads the file; other data, model or number format make another one."""
    reference = tmp_path / "reference"

    def start(name: str, **more):
        command = flags(tmp_path / name, reference=reference, max_steps=1, **more)
        run(monkeypatch, sams, *command)

    def files() -> int:
        return len(list(reference.iterdir()))

    start("a")
    assert files() == 2  # training and held-out pairs

    loads = []
    load_lm = sams.load_lm

    def count_loads(*args):
        loads.append(args)
        return load_lm(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sams, "load_lm", count_loads)
        start("b", select="random")
    assert len(loads) == 1
    assert files() == 2

    start("c", limit=59)
    assert files() == 3
    start("f", seed=1)  # as many pairs, others flipped
    assert files() == 4
    start("d", dtype="bfloat16", micro_batch=1)
    start("e", model=world / "sft-early")
    assert files() == 8


@pytest.fixture
def seven(world, tmp_path) -> tuple[Config, Model, list[Pair]]:
    """Seven pairs to be scored by sft in batches of three."""
    c = tiny(batch=3, out=str(tmp_path / "run"), reference=str(tmp_path / "reference"))
    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs, _ = common.encode_pairs(tok, training_rows(world)[:7], 32, 16)
    return c, Model(str(world / "sft"), tok, CPU, torch.float32), pairs


def test_new_weights_under_an_old_name_are_scored_again(seven, world, tmp_path):
    """The reference's file belongs to the weights in the model's folder, not to its path."""
    c, model, pairs = seven
    folder = tmp_path / "model"
    copied = dataclasses.replace(model, path=str(folder))
    shutil.copytree(world / "sft", folder)
    late = sams.reference_logps(c, copied, pairs)
    shutil.copytree(world / "sft-early", folder, dirs_exist_ok=True)
    early = sams.reference_logps(c, copied, pairs)
    assert not torch.equal(early, late)

    original = dataclasses.replace(model, path=str(world / "sft-early"))
    assert torch.equal(early, sams.reference_logps(c, original, pairs))


def test_a_killed_scoring_keeps_its_whole_lines_and_makes_the_torn_one_again(seven, tmp_path):
    """What a killed start has written is neither made again nor trusted where it is torn."""
    c, model, pairs = seven
    whole = sams.logps_in_file(c, tmp_path / "whole.jsonl", model, pairs, "whole")

    part = tmp_path / f"killed.jsonl.{job.seed_of(c.out):016x}.part"
    part.write_text("[1.0, 2.0]\n" * 6 + "[3.0, 4")
    found = sams.logps_in_file(c, tmp_path / "killed.jsonl", model, pairs, "killed")
    assert found[:6].tolist() == [[1.0, 2.0]] * 6
    assert torch.equal(found[6], whole[6])
    assert not part.exists()


def test_a_scoring_that_is_asked_to_stop_ends_after_a_batch_and_goes_on(
    monkeypatch, seven, tmp_path
):
    """On SIGTERM the batch is written and the exit code is 0; the next start makes the rest."""
    c, model, pairs = seven
    whole = sams.logps_in_file(c, tmp_path / "whole.jsonl", model, pairs, "whole")

    file = tmp_path / "stopped.jsonl"
    asked = threading.Event()
    asked.set()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(job, "STOP", asked)
        sams.logps_in_file(c, file, model, pairs, "stopped")
    assert end.value.code == 0
    assert not file.exists()
    (part,) = tmp_path.glob("stopped.jsonl.*.part")
    assert len(lines(part)) == 3
    assert torch.equal(sams.logps_in_file(c, file, model, pairs, "stopped"), whole)


def test_bf16_starts_at_exactly_0(flags, tmp_path):
    """In bf16 with one pair a pass the first step's margin is 0 to the bit; the run trains."""
    more = {"dtype": "bfloat16", "micro_batch": 1, "max_steps": 3}
    assert forked(sams, *flags(tmp_path / "run", **more)) == 0
    first, _, third = metrics(tmp_path / "run")
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert third["rewards/margins"] != 0


def test_selective_dpo_keeps_the_easiest(monkeypatch, flags, tmp_path, world):
    """--preselect 0.5: a pair's difficulty is its DPO loss under the model of the other half.

    The easier half is trained on, with the selector.
    """
    out = tmp_path / "run"
    run(monkeypatch, sams, *flags(out, preselect=0.5, lr=1e-3))
    difficulty = json.loads((out / "difficulty.json").read_text())
    rows = training_rows(world)
    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs, _ = common.encode_pairs(tok, rows, 32, 16)
    start = load_exact(world / "sft")

    order = random.Random(job.seed_of(0, "halves")).sample(range(60), 60)
    for name, unseen in (("half1", order[::2]), ("half0", order[1::2])):
        model = load_exact(out / name / "checkpoint")
        for i in unseen[:5]:
            with torch.no_grad():
                ratio = naive_ratio(naive_logps(model, pairs[i]), naive_logps(start, pairs[i]))
            assert difficulty[i] == pytest.approx(naive_loss(0.1 * ratio.item()), abs=1e-4)
    assert len(set(difficulty)) > 50

    kept = sorted(range(60), key=lambda i: difficulty[i])[:30]
    is_flipped = [row["meta"].get("flipped", False) for row in rows]
    steps = metrics(out)
    assert sum(line["batch/pairs"] for line in steps) == 30
    assert sum(line["batch/flipped"] for line in steps) == sum(is_flipped[i] for i in kept)
    assert results(out)["preselect"] == 0.5
    assert [line["selected/pairs"] for line in steps] == [8, 7]


def test_the_easiest_share_is_rounded_up(monkeypatch, tmp_path):
    """--preselect 0.3 keeps ceil(3.3) = 4 of 11 pairs: those of the largest margins."""
    pairs = random_pairs(11)
    data = Data(pairs, torch.zeros(11, 2), [False] * 11)

    def do_nothing(*args):
        pass

    def logps_that_rise(c, file, model, pairs, note):
        numbers = [int(pair.id.removeprefix("pair-")) for pair in pairs]
        return torch.tensor([[float(number), 0.0] for number in numbers])

    monkeypatch.setattr(sams, "train", do_nothing)
    monkeypatch.setattr(sams, "logps_in_file", logps_that_rise)
    start = Model("start", None, CPU, torch.float32)
    assert sams.easiest(tiny(preselect=0.3), data, data, start, tmp_path) == [7, 8, 9, 10]


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"ratio": 0}, "--ratio must be above 0"),
        ({"ratio": 1.5}, "--ratio"),
        ({"flip": -0.1}, "--flip"),
        ({"preselect": 0}, "--preselect"),
        ({"gamma": 2}, "--gamma"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16 needs --micro_batch 1"),
        ({"max_steps": 0}, "--max_steps"),
        ({"limit": 0}, "--limit"),
        ({"replay": -1}, "--replay"),
        ({"beta": 0}, "--beta"),
        ({"batch": 10}, "can't be divided"),
        ({"max_prompt": 2}, "too few"),
        ({"test": "nothing.jsonl"}, "nothing.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line_before_any_model(
    monkeypatch, flags, tmp_path, capsys, more, complaint
):
    """Exit code 2, one line on stderr, no folder."""
    line = refused(monkeypatch, capsys, sams, flags(tmp_path / "run", **more))
    assert complaint in line
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, flags, tmp_path, capsys):
    """Counts, flips, steps and one pair with its masks; no folder, no model."""

    def no_model(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(sams, "load_lm", no_model)
    run(monkeypatch, sams, *flags(tmp_path / "run"), "--dry_run")
    text = capsys.readouterr().out
    assert "60 training pairs (12 flipped), 16 held-out pairs" in text
    assert "4 steps" in text
    assert "no loss: '<bos><|user|>" in text
    assert "rejected, with loss" in text
    assert not list(tmp_path.iterdir())
