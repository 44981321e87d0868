"""DNPO's equations, its noise and the order of steps, against naive float64 code.

The naive reference is written from the formulas: one pair, one token, one entry at a time.
"""

import copy
import functools
import itertools
import json
import math
import random
import statistics
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import dnpo
import job
import toy
from common import Model, Pair, Scorer, by_pair, collate_pairs, token_logps
from dnpo import (
    BLOCK,
    Config,
    Iteration,
    NoiseHead,
    NoisyReference,
    draw,
    dynamic_labels,
    implicit_rewards,
    lr_factor,
    micro_batches,
    model_losses,
    noise_drop,
    noise_losses,
    noisy_token_logps,
    preference_losses,
    step_order,
    take_step,
)

V = 23  # of the toy tokenizer
D = 16  # of tiny_lm
near = functools.partial(pytest.approx, rel=1e-5, abs=1e-5)


def tiny_lm(seed: int, tied: bool = False, **more):
    """A random Llama of a few thousand weights with far from uniform predictions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def random_pairs(n: int, seed: int = 0) -> list[Pair]:
    """n pairs of random ids: prompts of 2 to 5 tokens, answers of 1 to 7."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        prompt = random_ids(rng, 2, 5)
        chosen = random_ids(rng, 1, 7)
        rejected = random_ids(rng, 1, 7)
        pairs.append(Pair(prompt, chosen, rejected, f"pair-{i}"))
    return pairs


def random_ids(rng: random.Random, shortest: int, longest: int) -> list[int]:
    length = rng.randint(shortest, longest)
    return [rng.randrange(V) for _ in range(length)]


def set_noise(head: NoiseHead) -> NoiseHead:
    """Sets random W and b, so that sigma differs from token to token and from entry to entry."""
    g = torch.Generator().manual_seed(5)
    head.weight.data = 0.05 * torch.randn(head.weight.shape, generator=g)
    head.bias.data = 0.3 + 0.3 * torch.rand(head.bias.shape, generator=g)
    return head


def mean(values: list):
    return sum(values) / len(values)


# ---------------------------------------------------------------- the naive reference: log-probs


def naive_log_softmax(z: list[float]) -> list[float]:
    """log softmax(z)[v] = z_v - log sum_u exp(z_u); without the largest z, exp would overflow."""
    largest = max(z)
    total = sum(math.exp(value - largest) for value in z)
    log_total = largest + math.log(total)
    return [value - log_total for value in z]


def naive_logits(lm, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """h_j [D] and z_j [V] of each token of the answer, from a plain forward of one sequence."""
    ids = torch.tensor([prompt + answer])
    out = lm(input_ids=ids, output_hidden_states=True)
    first = len(prompt) - 1  # the last token of the prompt predicts the first of the answer
    return out.hidden_states[-1][0, first:-1], out.logits[0, first:-1]


def naive_logp(lm, prompt: list[int], answer: list[int]) -> Tensor:
    """log pi(y|x) = sum_j log softmax(z_j)[y_j], differentiable."""
    _, logits = naive_logits(lm, prompt, answer)
    logp = torch.zeros(())
    for z, y in zip(logits, answer):
        logp = logp + z[y] - torch.log(torch.exp(z).sum())
    return logp


def naive_kl(logps: list[float], others: list[float]) -> float:
    """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
    total = 0.0
    for logp, other in zip(logps, others, strict=True):
        total += math.exp(logp) * (logp - other)
    return total


class NoisyToken(NamedTuple):
    """What the noise makes of token j of a rejected answer."""

    h: list[float]  # [D]
    sigma: list[float]  # [V]
    clean_logp: float  # log pi_ref(y_j)
    logp: float  # log p_noise(y_j)
    drop: float  # KL(pi_ref || p_noise)
    slope: list[float]  # d log p_noise(y_j) / d sigma_v: [V]

    def mean_square(self) -> float:
        return mean([sigma**2 for sigma in self.sigma])


def naive_sigma(W: list[list[float]], b: list[float], h: list[float]) -> list[float]:
    """sigma_v = sum_d W_vd h_d + b_v."""
    sigma = []
    for row, bias in zip(W, b):
        total = bias
        for weight, state in zip(row, h):
            total += weight * state
        sigma.append(total)
    return sigma


def naive_noisy_logits(z: list[float], sigma: list[float], eps: list[float]) -> list[float]:
    """z^_v = z_v + sigma_v eps_v."""
    return [z[v] + sigma[v] * eps[v] for v in range(len(z))]


def naive_noisy_answer(
    lm, W: list[list[float]], b: list[float], prompt: list[int], answer: list[int], seed: int
) -> list[NoisyToken]:
    """The tokens of a rejected answer under the noise that belongs to its seed."""
    with torch.no_grad():
        states, logits = naive_logits(lm, prompt, answer)
    tokens = []
    for j, y in enumerate(answer):
        h, z = states[j].tolist(), logits[j].tolist()
        sigma = naive_sigma(W, b, h)
        eps = draw([(seed, j)], V, "cpu")[0].tolist()
        noisy = naive_noisy_logits(z, sigma, eps)
        logps = naive_log_softmax(noisy)
        clean = naive_log_softmax(z)
        drop = naive_kl(clean, logps)

        # d log softmax(z^)[y] / d z^_v = 1[v = y] - p_v, and d z^_v / d sigma_v = eps_v
        slope = [-eps[v] * math.exp(logps[v]) for v in range(V)]
        slope[y] += eps[y]
        tokens.append(NoisyToken(h, sigma, clean[y], logps[y], drop, slope))
    return tokens


# ---------------------------------------------------------------- the naive reference: Objective 10


def naive_sigmoid(m: float) -> float:
    return 1 / (1 + math.exp(-m))


def naive_loss(m: float) -> float:
    """l(m) = -log sigmoid(m)."""
    return -math.log(naive_sigmoid(m))


class NaivePair(NamedTuple):
    """A pair in Objective 10: log pi_theta of both sides, their rewards, and the noise."""

    chosen_logp: Tensor  # as all four differentiable in theta
    rejected_logp: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    tokens: list[NoisyToken]  # of the rejected side

    def margin(self) -> Tensor:
        return self.chosen_reward - self.rejected_reward

    def drop(self) -> float:
        """How far the noise lowers log p_noise(y-) on average, in nats."""
        return sum(token.drop for token in self.tokens)

    def loss(self) -> Tensor:
        """l(m), differentiable in theta."""
        return -torch.log(1 / (1 + torch.exp(-self.margin())))


def naive_pair(policy, reference, W, b, pair: Pair, seed: int, beta: float) -> NaivePair:
    """m = beta [log pi_theta(y+)/pi_ref(y+) - log pi_theta(y-)/p_noise(y-)], with its parts."""
    with torch.no_grad():
        chosen_ref_logp = naive_logp(reference, pair.prompt, pair.chosen)
    tokens = naive_noisy_answer(reference, W, b, pair.prompt, pair.rejected, seed)
    rejected_ref_logp = sum(token.logp for token in tokens)

    chosen_logp = naive_logp(policy, pair.prompt, pair.chosen)
    rejected_logp = naive_logp(policy, pair.prompt, pair.rejected)
    return NaivePair(
        chosen_logp,
        rejected_logp,
        beta * (chosen_logp - chosen_ref_logp),
        beta * (rejected_logp - rejected_ref_logp),
        tokens,
    )


def naive_offset(pairs: list[NaivePair], beta: float) -> list[NaivePair]:
    """The pairs without noise, the log-prob of y- lowered by their mean drop instead."""
    mean_drop = mean([pair.drop() for pair in pairs])
    offset = []
    for pair in pairs:
        clean = sum(token.clean_logp for token in pair.tokens)
        reward = beta * (pair.rejected_logp - (clean - mean_drop))
        offset.append(pair._replace(rejected_reward=reward))
    return offset


def naive_noise_gradients(
    pairs: list[NaivePair], beta: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """d/dW [V, D] and d/db [V] of -mean l(m) + alpha mean(sigma^2), by the chain rule."""
    dW = torch.zeros(V, D, dtype=torch.float64)
    db = torch.zeros(V, dtype=torch.float64)
    entries = V * sum(len(pair.tokens) for pair in pairs)  # that mean(sigma^2) is over
    for pair in pairs:
        pull = naive_sigmoid(-pair.margin().item())  # -d l / d m
        for token in pair.tokens:
            h = torch.tensor(token.h, dtype=torch.float64)
            for v in range(V):
                of_loss = pull * beta * token.slope[v] / len(pairs)
                of_penalty = alpha * 2 * token.sigma[v] / entries
                db[v] += of_loss + of_penalty
                dW[v] += (of_loss + of_penalty) * h
    return dW, db


def naive_metrics(
    pairs: list[NaivePair], noisy: list[NaivePair], beta: float, alpha: float
) -> dict[str, float]:
    """Means over the pairs as the model and as the noise see them, and over rejected tokens."""
    tokens = []
    for pair in pairs:
        tokens += pair.tokens
    loss = mean([pair.loss().item() for pair in pairs])
    margins = [pair.margin().item() for pair in pairs]
    wins = [float(margin > 1e-5) for margin in margins]  # rounding makes no winner
    square = mean([token.mean_square() for token in tokens])
    drop = mean([pair.drop() for pair in pairs])
    weights = [naive_sigmoid(-margin) for margin in margins]
    variance = mean([(weight - mean(weights)) ** 2 for weight in weights])
    return {
        "loss": loss,
        "rewards/chosen": mean([pair.chosen_reward.item() for pair in pairs]),
        "rewards/rejected": mean([pair.rejected_reward.item() for pair in pairs]),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean(wins),
        "logps/chosen": mean([pair.chosen_logp.item() for pair in pairs]),
        "logps/rejected": mean([pair.rejected_logp.item() for pair in pairs]),
        "weights/mean": mean(weights),
        "weights/spread": variance**0.5 / mean(weights),
        "noise/std": square**0.5,
        "noise/drop": drop,
        "noise/drop_margin": beta * drop,
        "noise/loss": -mean([pair.loss().item() for pair in noisy]) + alpha * square,
    }


class NaiveStep(NamedTuple):
    """Objective 10 of one step: the gradients on theta and on (W, b), and what is logged."""

    theta: tuple[Tensor, ...]
    noise: tuple[Tensor, Tensor]
    metrics: dict[str, float]


def naive_step(
    policy,
    reference,
    noise,
    pairs: list[Pair],
    seeds: list[int],
    beta: float,
    alpha: float,
    offset: bool = False,
) -> NaiveStep:
    """theta descends on mean l(m), (W, b) on -mean l(m) + alpha mean(sigma^2).

    noise: W and b, or None for none at all, as in DPO and SPIN. offset: theta's m is without noise
    and lower by beta times the pairs' mean drop.
    """
    if noise is None:
        noise = torch.zeros(V, D), torch.zeros(V)
    W = noise[0].tolist()
    b = noise[1].tolist()
    made = []
    for pair, seed in zip(pairs, seeds, strict=True):
        made.append(naive_pair(policy, reference, W, b, pair, seed, beta))
    seen = naive_offset(made, beta) if offset else made
    loss = mean([pair.loss() for pair in seen])
    return NaiveStep(
        torch.autograd.grad(loss, list(policy.parameters())),
        naive_noise_gradients(made, beta, alpha),
        naive_metrics(seen, made, beta, alpha),
    )


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize(
    "annotated, generated, positive",
    [
        (7, 3, "annotated"),
        (3, 7, "generated"),
        (5, 5, "annotated"),
        (0.0, 0.0, "annotated"),
        (-2.5, -1.5, "generated"),
        (-1.5, -1.5, "annotated"),
        (9.0, 8.99, "annotated"),
    ],
)
def test_the_better_answer_is_the_positive_and_a_tie_keeps_the_annotation(
    annotated, generated, positive
):
    """(y+, y-) = (y*, y') if s* >= s' else (y', y*)."""
    assert dynamic_labels(annotated, generated) == positive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_logps_is_log_softmax_at_the_target_in_float32(dtype):
    """log softmax(z)[y] of each row, in fp32 from logits of any dtype, without overflow."""
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 1, 3, 10, 30, 100, 300, 1, 1])
    logits = torch.randn(9, V, generator=g) * scales[:, None] + 50
    logits = logits.to(dtype)
    targets = torch.arange(9) * 5 % V

    naive = []
    for z, y in zip(logits.double().tolist(), targets.tolist()):
        naive.append(naive_log_softmax(z)[y])
    logps = token_logps(logits, targets)
    assert logps.dtype == torch.float32
    assert logps.tolist() == near(naive, abs=5e-5)


def test_noisy_token_logps_adds_sigma_times_eps_to_the_logits():
    """log softmax(z + sigma * eps)[y], entry by entry."""
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(7, V, generator=g)
    std = torch.rand(7, V, generator=g)
    eps = torch.randn(7, V, generator=g)
    targets = torch.tensor([0, 5, 22, 3, 3, 11, 7])

    naive = []
    for i, y in enumerate(targets.tolist()):
        noisy = naive_noisy_logits(logits[i].tolist(), std[i].tolist(), eps[i].tolist())
        naive.append(naive_log_softmax(noisy)[y])
    assert noisy_token_logps(logits, std, eps, targets).tolist() == near(naive)


def test_from_bf16_the_noise_is_computed_in_float32():
    """log softmax(z + sigma eps)[y] and KL(pi || p_noise) of the numbers that bf16 stands for."""
    g = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(7, V, generator=g)).bfloat16()
    std = torch.rand(7, V, generator=g).bfloat16()
    eps = torch.randn(7, V, generator=g).bfloat16()
    targets = torch.tensor([0, 5, 22, 3, 3, 11, 7])

    logps, drops = [], []
    for i, y in enumerate(targets.tolist()):
        z = logits[i].tolist()
        noisy = naive_log_softmax(naive_noisy_logits(z, std[i].tolist(), eps[i].tolist()))
        logps.append(noisy[y])
        drops.append(naive_kl(naive_log_softmax(z), noisy))
    for e in (eps, eps.float()):
        assert noisy_token_logps(logits, std, e, targets).tolist() == near(logps)
        assert noise_drop(logits, std, e).tolist() == near(drops)


def logps_of_pairs() -> tuple[Tensor, Tensor]:
    """Random log-probs of five pairs under a policy and under a reference: [5, 2], float64."""
    g = torch.Generator().manual_seed(2)
    logps = -30 * torch.rand(5, 2, generator=g, dtype=torch.float64)
    ref_logps = -30 * torch.rand(5, 2, generator=g, dtype=torch.float64)
    return logps, ref_logps


def naive_margins(logps: Tensor, ref_logps: Tensor, beta: float) -> list[float]:
    """m = beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))] of each pair."""
    margins = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(logps.tolist(), ref_logps.tolist()):
        margins.append(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    return margins


def margins_of(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    chosen, rejected = implicit_rewards(logps, ref_logps, beta)
    return chosen - rejected


def test_the_margin_is_beta_times_the_positives_log_ratio_minus_the_negatives():
    """m_i = beta [(log pi(y+_i) - log ref(y+_i)) - (log pi(y-_i) - log ref(y-_i))]."""
    logps, ref_logps = logps_of_pairs()
    margins = margins_of(logps, ref_logps, 0.3)
    assert margins.tolist() == pytest.approx(naive_margins(logps, ref_logps, 0.3), rel=1e-12)


def test_the_rewards_are_beta_times_the_log_ratios_chosen_first():
    """r = beta (log pi(y) - log ref(y)): of y+ from the first column, of y- from the second."""
    logps, ref_logps = logps_of_pairs()
    chosen, rejected = implicit_rewards(logps, ref_logps, 0.3)
    ratios = (logps - ref_logps).tolist()
    assert chosen.tolist() == pytest.approx([0.3 * ratio[0] for ratio in ratios], rel=1e-12)
    assert rejected.tolist() == pytest.approx([0.3 * ratio[1] for ratio in ratios], rel=1e-12)


def test_the_loss_is_minus_log_sigmoid_of_the_margin_at_any_size():
    """l(m) = -log sigmoid(m): ln 2 at 0, 0 and |m| at the ends, never infinite."""
    margins = [-20.0, -3.0, -0.5, 0.0, 0.5, 3.0, 20.0]
    losses = preference_losses(torch.tensor(margins, dtype=torch.float64))
    assert losses.tolist() == pytest.approx([naive_loss(m) for m in margins], rel=1e-6)

    losses = preference_losses(torch.tensor([0.0, 1e4, -1e4]))
    assert losses.tolist() == pytest.approx([math.log(2), 0, 1e4], rel=1e-7)


def test_model_loss_and_noise_loss_mirror_each_other():
    """l(m) has a gradient on theta only, -l(m) on the noise only: -+ beta sigmoid(-m) of both."""
    logps, ref_logps = logps_of_pairs()
    logps.requires_grad_()
    ref_logps.requires_grad_()
    margins = naive_margins(logps, ref_logps, 0.2)
    pull = [0.2 * naive_sigmoid(-m) for m in margins]
    push = [-p for p in pull]

    of_model = model_losses(logps, ref_logps, 0.2)
    of_noise = noise_losses(logps, ref_logps, 0.2)
    assert of_model.tolist() == pytest.approx([naive_loss(m) for m in margins], rel=1e-9)
    assert of_noise.tolist() == pytest.approx([-naive_loss(m) for m in margins], rel=1e-9)

    of_model.sum().backward()
    assert ref_logps.grad is None
    assert logps.grad[:, 0].tolist() == pytest.approx(push, rel=1e-9)
    assert logps.grad[:, 1].tolist() == pytest.approx(pull, rel=1e-9)

    logps.grad = None
    of_noise.sum().backward()
    assert logps.grad is None
    assert ref_logps.grad[:, 0].tolist() == pytest.approx(push, rel=1e-9)  # -dl/dref = dl/dlogps
    assert ref_logps.grad[:, 1].tolist() == pytest.approx(pull, rel=1e-9)


def test_the_gradients_of_the_equations_are_their_derivatives():
    """Finite differences agree; where the computation is in fp32, with fp32's tolerance."""
    g = torch.Generator().manual_seed(3)

    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    logps = new(3, 2)
    ref_logps = new(3, 2)
    assert gradcheck(implicit_rewards, (logps, ref_logps, 0.7))
    assert gradcheck(margins_of, (logps, ref_logps, 0.7))
    assert gradcheck(preference_losses, new(5))
    assert gradcheck(model_losses, (logps, ref_logps.detach(), 0.7))
    assert gradcheck(noise_losses, (logps.detach(), ref_logps, 0.7))

    logits = new(3, 4)
    std = new(3, 4)
    eps = new(3, 4)
    targets = torch.tensor([0, 3, 1])
    fp32 = {"eps": 1e-2, "atol": 2e-3, "rtol": 2e-3}
    assert gradcheck(token_logps, (logits, targets), **fp32)
    assert gradcheck(noisy_token_logps, (logits, std, eps, targets), **fp32)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_noise_lowers_the_expected_log_prob_of_every_token(sigma):
    """E log softmax(z + sigma eps)[y] is below log softmax(z)[y] by more than 6 standard errors.

    Where sigma is small, it is so by sigma^2/2 (1 - sum p^2).
    """
    n = 40000
    z = torch.randn(V, generator=torch.Generator().manual_seed(4))
    eps = torch.randn(n, V, generator=torch.Generator().manual_seed(5))
    p = [math.exp(logp) for logp in naive_log_softmax(z.tolist())]
    small_fall = sigma**2 / 2 * (1 - sum(q * q for q in p))

    for y in (int(z.argmax()), int(z.argmin()), 7):
        targets = torch.full((n,), y)
        drawn = noisy_token_logps(z.expand(n, V), torch.tensor(sigma), eps, targets).double()
        drawn = drawn - sigma * eps[:, y]  # less variance, the same mean: that of eps is 0
        expected = drawn.mean().item()
        error = drawn.std().item() / math.sqrt(n)
        assert expected < math.log(p[y]) - 6 * error
        if sigma == 0.1:
            assert math.log(p[y]) - expected == pytest.approx(small_fall, rel=0.1)


# ---------------------------------------------------------------- the noise


def test_the_noise_head_starts_at_the_same_sigma_everywhere():
    """W = 0, b = init: sigma_j = init for every hidden state and entry. Later sigma = W h + b."""
    head, h = NoiseHead(D, V, "0.25", seed=0), torch.randn(3, D)
    assert head(h).tolist() == [[0.25] * V] * 3

    set_noise(head)
    W = head.weight.tolist()
    b = head.bias.tolist()
    sigmas = head(h).tolist()
    for sigma, state in zip(sigmas, h.tolist()):
        assert sigma == near(naive_sigma(W, b, state))


def test_a_linear_start_is_that_of_a_new_linear_layer_and_belongs_to_the_seed():
    """W and b as nn.Linear draws them after manual_seed; nobody else's random numbers change."""
    torch.manual_seed(7)
    plain = torch.nn.Linear(D, V)
    torch.manual_seed(8)
    next_number = torch.rand(())

    torch.manual_seed(8)
    head, same, other = [NoiseHead(D, V, "linear", seed) for seed in (7, 7, 9)]
    assert torch.rand(()) == next_number
    for name in ("weight", "bias"):
        assert torch.equal(getattr(head, name), getattr(plain, name))
        assert torch.equal(getattr(head, name), getattr(same, name))
        assert not torch.equal(getattr(head, name), getattr(other, name))


def test_eps_is_standard_normal_and_independent_over_tokens_and_entries():
    """Mean 0, variance 1, kurtosis 3; no correlation over tokens, blocks, answers or entries."""
    answers = [10**18 + 7 * i for i in range(10)]
    tokens = [(seed, place) for seed in answers for place in range(120)]
    eps = draw(tokens, 50, "cpu").double()
    assert eps.shape == (1200, 50)
    moments = [eps.mean().item(), eps.var().item(), (eps**4).mean().item()]
    assert moments == pytest.approx([0, 1, 3], abs=0.06)

    shifted = [
        (eps[1:], eps[:-1]),
        (eps[2:], eps[:-2]),
        (eps[BLOCK:], eps[:-BLOCK]),
        (eps[120:], eps[:-120]),
        (eps[:, 1:], eps[:, :-1]),
        (eps[1:, 1:], eps[:-1, :-1]),
    ]
    for x, y in shifted:
        assert (x * y).mean().abs().item() < 0.03


def test_the_noise_of_a_token_does_not_depend_on_its_batch_mates():
    """A token's eps is the same alone, in company, in any order; another token's is another.

    Also for the last token of a block and the first of the next, and where a chunk begins within a
    block.
    """
    tokens = [(7, 0), (7, BLOCK - 1), (7, BLOCK), (7, BLOCK + 1), (900, 3), (900, 2), (7, 0)]
    several = draw(tokens, V, "cpu")
    torch.manual_seed(99)
    alone = [draw([token], V, "cpu") for token in tokens]
    assert torch.equal(several, torch.cat(alone))
    for i, row in enumerate(several[:-1]):
        for other in several[i + 1 : -1]:
            assert (row != other).all()
    assert torch.equal(several[0], several[-1])

    answer = [(7, place) for place in range(3 * BLOCK)]
    whole = draw(answer, V, "cpu")
    parts = [draw(part, V, "cpu") for part in (answer[:5], answer[5:20], answer[20:])]
    assert torch.equal(whole, torch.cat(parts))


def noisy_reference(init: float | None = 0.1) -> NoisyReference:
    """A reference with noise that differs everywhere, or, with init None, without any."""
    reference = NoisyReference(tiny_lm(1), init)
    if init is not None:
        set_noise(reference.noise)
    return reference


def test_the_noisy_reference_is_exact_on_positives_and_noisy_on_negatives():
    """log pi_ref(y+), log p_noise(y-); log pi_ref(y-), y-'s sums of KL and of mean_v sigma^2."""
    reference = noisy_reference()
    pairs = random_pairs(4)
    seeds = [100, 200, 300, 400]
    logps, *of_rejected = reference(*collate_pairs(pairs, "cpu"), seeds)

    exact = copy.deepcopy(reference.lm).double()
    W = reference.noise.weight.tolist()
    b = reference.noise.bias.tolist()
    chosen, rejected, clean, drops, squares = [], [], [], [], []
    for pair, seed in zip(pairs, seeds):
        tokens = naive_noisy_answer(exact, W, b, pair.prompt, pair.rejected, seed)
        chosen.append(naive_logp(exact, pair.prompt, pair.chosen).item())
        rejected.append(sum(token.logp for token in tokens))
        clean.append(naive_logp(exact, pair.prompt, pair.rejected).item())
        drops.append(sum(token.drop for token in tokens))
        squares.append(sum(token.mean_square() for token in tokens))
    assert logps.tolist() == near(chosen + rejected)
    for found, naive in zip(of_rejected, [clean, drops, squares], strict=True):
        assert found.tolist() == near(naive)
    assert [found.requires_grad for found in of_rejected] == [False, False, True]


def test_under_bf16_the_noisy_reference_goes_on_in_float32_behind_logits_and_sigma():
    """Log-probs, KL and mean_v sigma^2 are float64's, of the logits and sigmas in bf16."""
    reference = noisy_reference()
    kept = []
    for module in (reference.lm.lm_head, reference.noise):
        module.register_forward_hook(lambda module, args, out: kept.append(out))
    pair = Pair([3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14], "pair")
    with torch.autocast("cpu", torch.bfloat16):
        logps, clean_logp, drop, square = reference(*collate_pairs([pair], "cpu"), [100])
    of_chosen, logits, sigmas = kept
    assert {out.dtype for out in kept} == {torch.bfloat16}

    chosen = noisy = clean = kl = squares = 0.0
    for z, y in zip(of_chosen.tolist(), pair.chosen, strict=True):
        chosen += naive_log_softmax(z)[y]
    for j, y in enumerate(pair.rejected):
        z, sigma = logits[j].tolist(), sigmas[j].tolist()
        eps = draw([(100, j)], V, "cpu")[0].tolist()
        quiet = naive_log_softmax(z)
        loud = naive_log_softmax(naive_noisy_logits(z, sigma, eps))
        clean += quiet[y]
        noisy += loud[y]
        kl += naive_kl(quiet, loud)
        squares += mean([s**2 for s in sigma])
    assert logps.tolist() == near([chosen, noisy])
    assert [clean_logp.item(), drop.item(), square.item()] == near([clean, kl, squares])


def test_the_drop_is_the_mean_fall_of_the_log_prob():
    """sigma = 0: exactly 0. Else above 0, and as large as the falls are on average over draws.

    A fall alone varies more, and is below 0 for many a draw.
    """
    pairs = random_pairs(4)
    ids, mask = collate_pairs(pairs, "cpu")
    _, _, drops, _ = NoisyReference(tiny_lm(1), "0")(ids, mask, [100, 200, 300, 400])
    assert drops.tolist() == [0.0] * 4

    for init in ("1", "linear"):
        reference = NoisyReference(tiny_lm(1), init)
        falls, drops = [], []
        with torch.no_grad():
            for n in range(200):
                seeds = [1000 * n + 100 * i for i in range(4)]
                logps, clean, drop, _ = reference(ids, mask, seeds)
                assert (drop > 0).all()
                falls.append((clean - logps[4:]).mean().item())
                drops.append(drop.mean().item())
        error = statistics.stdev(falls) / math.sqrt(200)
        assert mean(falls) > 4 * error
        assert mean(falls) == pytest.approx(mean(drops), abs=2 * error)
        assert statistics.stdev(drops) < statistics.stdev(falls) / 2
        assert min(falls) < 0


def test_without_noise_the_reference_is_the_scorer():
    """init None: both sides are log pi_ref, nothing is trained, drop and sigma^2 are 0."""
    reference = noisy_reference(None)
    pairs = random_pairs(4)
    logps, clean, drops, squares = reference(*collate_pairs(pairs, "cpu"), [100, 200, 300, 400])

    exact = copy.deepcopy(reference.lm).double()
    chosen, rejected = [], []
    for pair in pairs:
        chosen.append(naive_logp(exact, pair.prompt, pair.chosen).item())
        rejected.append(naive_logp(exact, pair.prompt, pair.rejected).item())
    assert logps.tolist() == near(chosen + rejected)
    assert torch.equal(clean, logps[4:])
    assert drops.tolist() == [0.0] * 4
    assert squares.tolist() == [0.0] * 4
    assert not any(p.requires_grad for p in reference.parameters())


def test_only_the_noise_of_the_reference_is_trained():
    """The reference's weights are frozen, in eval mode; W and b have a gradient."""
    reference = noisy_reference()
    logps, *_ = reference(*collate_pairs(random_pairs(3), "cpu"), [100, 200, 300])
    logps.sum().backward()

    trained = [name for name, p in reference.named_parameters() if p.requires_grad]
    assert trained == ["noise.weight", "noise.bias"]
    assert all(p.grad is None for p in reference.lm.parameters())
    assert not reference.lm.training
    assert (reference.noise.bias.grad != 0).all()
    assert (reference.noise.weight.grad != 0).all()


def noisy_outputs(reference, pairs: list[Pair], seeds: list[int]) -> tuple[Tensor, tuple]:
    """All that a NoisyReference gives for each pair, and a gradient of its noise.

    Returns [B, 4] (log-probs of both sides, the drop, the sum of sigma^2), and the gradients on
    W and b of a sum in which a pair weighs what its seed does.
    """
    logps, _, drops, squares = reference(*collate_pairs(pairs, "cpu"), seeds)
    chosen, rejected = logps.chunk(2)
    weight = torch.tensor(seeds) / 100
    total = (weight * (rejected + squares)).sum()
    grads = torch.autograd.grad(total, [reference.noise.weight, reference.noise.bias])
    return torch.stack([chosen, rejected, drops, squares], 1).detach(), grads


def test_batch_mates_padding_and_order_do_not_change_the_noise():
    """A pair's noise and gradients are the same alone, beside longer ones, in another place."""
    reference = noisy_reference()
    pairs = random_pairs(5)
    seeds = [100, 200, 300, 400, 500]
    together, grads = noisy_outputs(reference, pairs, seeds)
    turned, _ = noisy_outputs(reference, pairs[::-1], seeds[::-1])
    torch.testing.assert_close(turned.flip(0), together, atol=1e-5, rtol=1e-5)

    sums = [0.0, 0.0]
    for i, (pair, seed) in enumerate(zip(pairs, seeds)):
        alone, (dW, db) = noisy_outputs(reference, [pair], [seed])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        sums[0] = sums[0] + dW
        sums[1] = sums[1] + db
    torch.testing.assert_close(sums[0], grads[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums[1], grads[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 16])
def test_chunks_do_not_change_the_noise(monkeypatch, chunk):
    """Any CHUNK gives the same outputs and gradients, from at most CHUNK rows of logits a time."""
    reference = noisy_reference()
    pairs = random_pairs(5)
    seeds = [100, 200, 300, 400, 500]
    whole, whole_grads = noisy_outputs(reference, pairs, seeds)

    rows = []
    reference.lm.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    monkeypatch.setattr(common, "CHUNK", chunk)
    outputs, grads = noisy_outputs(reference, pairs, seeds)
    assert max(rows) <= chunk
    assert sum(len(pair.rejected) for pair in pairs) > 16
    torch.testing.assert_close(outputs, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, whole_grads, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the objective, through the models


def objective(policy, reference, pairs: list[Pair], seeds: list[int]) -> tuple:
    """What the losses and the margin are functions of: log-probs [B, 2] of both models, beta."""
    ids, mask = collate_pairs(pairs, "cpu")
    ref_logps, *_ = reference(ids, mask, seeds)
    return by_pair(policy(ids, mask)), by_pair(ref_logps), 0.3


def test_a_policy_that_is_its_reference_has_margin_0_and_loss_ln_2():
    """theta = ref, no noise or sigma = 0: m = 0, l = ln 2."""
    policy = Scorer(tiny_lm(1))
    pairs = random_pairs(6)
    seeds = list(range(6))
    for init in (None, 0.0):
        terms = objective(policy, NoisyReference(tiny_lm(1), init), pairs, seeds)
        assert margins_of(*terms).tolist() == pytest.approx([0.0] * 6, abs=1e-5)
        assert model_losses(*terms).tolist() == pytest.approx([math.log(2)] * 6, abs=1e-5)


def test_sigma_zero_gives_dpo():
    """With sigma = 0 loss and gradient are those of a reference without noise, and naive DPO's."""
    policy = Scorer(tiny_lm(2))
    pairs = random_pairs(4)
    seeds = [100, 200, 300, 400]

    def losses_and_grads(init):
        reference = NoisyReference(tiny_lm(1), init)
        losses = model_losses(*objective(policy, reference, pairs, seeds))
        grads = torch.autograd.grad(losses.mean(), list(policy.parameters()))
        return losses.tolist(), grads

    sigma_0, sigma_0_grads = losses_and_grads(0.0)
    without, without_grads = losses_and_grads(None)
    exact = copy.deepcopy(policy.lm).double()
    naive = naive_step(exact, tiny_lm(1).double(), None, pairs, seeds, beta=0.3, alpha=0.0)

    assert mean(sigma_0) == near(naive.metrics["loss"])
    assert sigma_0 == near(without, abs=1e-6)
    torch.testing.assert_close(sigma_0_grads, without_grads, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(sigma_0_grads, naive.theta, atol=1e-6, rtol=1e-4, check_dtype=False)


def test_a_small_step_of_the_model_raises_the_margin_and_one_of_the_noise_lowers_it():
    """Descent on model_losses raises the mean margin, descent on noise_losses lowers it."""
    pairs = random_pairs(8)
    seeds = list(range(0, 800, 100))
    for losses, sign in ((model_losses, 1), (noise_losses, -1)):
        policy = Scorer(tiny_lm(2))
        reference = noisy_reference()
        before = margins_of(*objective(policy, reference, pairs, seeds)).mean().item()

        losses(*objective(policy, reference, pairs, seeds)).mean().backward()
        trained = policy if losses is model_losses else reference.noise
        with torch.no_grad():
            for p in trained.parameters():
                p -= 1e-2 * p.grad
        after = margins_of(*objective(policy, reference, pairs, seeds)).mean().item()
        assert sign * (after - before) > 1e-4


# ---------------------------------------------------------------- the objective, in dnpo.train


LR = {"policy": 0.5, "noise": 5.0}  # peak learning rates


class Update(NamedTuple):
    """A step of an optimizer."""

    who: str  # "policy" or "noise"
    weights: list[Tensor]  # before it
    grads: list[Tensor]


def recording_sgd(log: list[Update]):
    """An optimizer in AdamW's place that logs its steps; the first one made is the policy's."""
    names = iter(["policy", "noise"])

    class RecordingSGD(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr, weight_decay=weight_decay)
            self.who = next(names)

        def step(self):
            params = self.param_groups[0]["params"]
            weights = [p.detach().clone() for p in params]
            log.append(Update(self.who, weights, [p.grad.clone() for p in params]))
            super().step()

    return RecordingSGD


class RandomHead(NoiseHead):
    """A noise head that starts with the W and b of set_noise."""

    def __init__(self, width: int, vocabulary: int, init: str, seed: int):
        super().__init__(width, vocabulary, init, seed)
        set_noise(self)


def run_train(
    monkeypatch,
    folder,
    pairs: list[Pair],
    noise: bool = True,
    start=None,
    head=RandomHead,
    number: int = 3,
    **flags,
) -> tuple[list[dict], list[Update]]:
    """dnpo.train() as iteration `number` on a tiny model, with SGD in AdamW's place.

    Returns the lines of metrics and the steps of all optimizers.
    """
    log = []
    monkeypatch.setattr(torch.optim, "AdamW", recording_sgd(log))
    monkeypatch.setattr(dnpo, "NoiseHead", head)
    values = {
        "parallel": "none",
        "dtype": "float32",
        "activation_checkpointing": False,
        "epochs": 1,
        "lr": LR["policy"],
        "noise_lr": LR["noise"],
        "clip": 1e9,
        "beta": 0.3,
        "noise_penalty": 0.2,
    }
    values.update(flags)

    (start or tiny_lm(1)).save_pretrained(folder / "start")
    iteration_folder = folder / f"iter{number}"
    iteration_folder.mkdir()
    model = Model(str(folder / "start"), toy.tokenizer(), torch.device("cpu"), torch.float32)
    at = Iteration(number, dsl=True, npo=noise, folder=iteration_folder, save_dtype="float32")
    dnpo.train(Config(**values), at, pairs, model)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], log


UPDATES = {  # of a step: its name, and who moves
    "off": [("model", ["policy"])],
    "joint": [("joint", ["policy", "noise"])],
    "offset": [("offset", ["policy", "noise"])],
    "alternating": [("noise", ["noise"]), ("model", ["policy"])],
}
LOGGED = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "weights/mean",
    "weights/spread",
]
LOGGED_OF_NOISE = ["noise/std", "noise/drop", "noise/drop_margin", "noise/loss"]


def set_weights(lm, weights: list[Tensor]):
    for p, value in zip(lm.parameters(), weights, strict=True):
        p.data = value.double()


def check_gradients(update: Update, naive: NaiveStep, clip: float) -> float:
    """Compares a step's gradients, clipped, with the naive ones; returns the norm of these."""
    exact = naive.noise
    if update.who == "policy":
        exact = naive.theta
    norm = math.sqrt(sum(grad.square().sum().item() for grad in exact))
    shrink = min(1.0, clip / norm)
    clipped = [shrink * grad for grad in exact]
    torch.testing.assert_close(update.grads, clipped, atol=2e-6, rtol=2e-4, check_dtype=False)
    return norm


def after(update: Update, lr: float) -> list[Tensor]:
    """The weights after a step of SGD."""
    moved = []
    for weight, grad in zip(update.weights, update.grads):
        moved.append(weight - lr * grad)
    return moved


def copies(module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("how, clip", [*[(how, 1e9) for how in UPDATES], ("joint", 0.01)])
def test_the_training_loops_gradients_are_those_of_objective_10(monkeypatch, tmp_path, how, clip):
    """On theta: d l, the noise held. On (W, b): -d l + alpha d mean(sigma^2). And the metrics.

    At every step, with an uneven last micro-batch. joint: both gradients come before either moves;
    alternating: the noise moves first, and the model sees noise of its own; offset: the model's
    margins are without noise and lower by its mean drop. Each of the two gradients is clipped to
    `clip`, its norm is logged unclipped, and nothing decays.
    """
    pairs = random_pairs(7)
    flags = {"batch": 5, "micro_batch": 2, "warmup": 1.0, "clip": clip}
    logged = LOGGED
    if how != "off":
        flags["noise_update"] = how
        logged = LOGGED + LOGGED_OF_NOISE
    metrics, log = run_train(monkeypatch, tmp_path, pairs, noise=how != "off", **flags)
    order = step_order(7, Config(epochs=1, batch=5), 0, "order", 3)

    policy = tiny_lm(1).double()
    reference = tiny_lm(1).double()
    head = set_noise(NoiseHead(D, V, "0", seed=0))
    weights = {"policy": copies(tiny_lm(1)), "noise": copies(head)}
    updates = iter(log)
    norms = {}
    for step, factor in enumerate([0.5, 1.0]):  # 5 pairs at half the learning rates, then 2
        for name, movers in UPDATES[how]:
            some = [pairs[i] for i in order[step]]
            seeds = [job.seed_of(0, "noise", 3, step, name, i) for i in order[step]]
            noise = None if how == "off" else weights["noise"]
            set_weights(policy, weights["policy"])
            terms = {"beta": 0.3, "alpha": 0.2, "offset": how == "offset"}
            naive = naive_step(policy, reference, noise, some, seeds, **terms)
            for who in movers:
                update = next(updates)
                assert update.who == who
                norms[who] = check_gradients(update, naive, clip)
                assert clip == 1e9 or norms[who] > 2 * clip
                torch.testing.assert_close(update.weights, weights[who])
                weights[who] = after(update, factor * LR[who])

        # naive is the model's update now: what is logged is measured in it
        assert metrics[step]["grad_norm"] == near(norms["policy"], rel=1e-4)
        if how != "off":
            assert metrics[step]["noise/grad_norm"] == near(norms["noise"], rel=1e-4)
        for key in logged:
            assert metrics[step][key] == near(naive.metrics[key]), key

    assert next(updates, None) is None  # these are all
    assert [line["lr"] for line in metrics] == pytest.approx([0.25, 0.5])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "iter3" / "checkpoint")
    torch.testing.assert_close(copies(saved), weights["policy"])


def test_the_noise_starts_elsewhere_in_every_iteration_and_with_every_seed(monkeypatch, tmp_path):
    """A linear start draws W and b by --seed and iteration: the same two draw the same again."""
    flags = {"head": NoiseHead, "noise_init": "linear", "batch": 2, "max_steps": 1}
    starts = []
    for i, (seed, number) in enumerate([(0, 3), (0, 3), (0, 4), (1, 3)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        _, log = run_train(monkeypatch, folder, random_pairs(2), number=number, seed=seed, **flags)
        [of_noise] = [update for update in log if update.who == "noise"]
        starts.append(of_noise.weights[0])

    first, same, *others = starts
    assert torch.equal(first, same)
    assert not torch.equal(first, others[0])
    assert not torch.equal(first, others[1])
    assert not torch.equal(others[0], others[1])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_before_the_first_step_the_reward_is_0_and_the_loss_ln_2(monkeypatch, tmp_path, dropout):
    """The policy starts as its reference, also if the model's config asks for dropout."""
    start = tiny_lm(1, attention_dropout=dropout)
    metrics, _ = run_train(
        monkeypatch,
        tmp_path,
        random_pairs(4),
        noise=False,
        start=start,
        batch=4,
        max_steps=1,
    )
    first = metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- steps


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    """10 steps, 2 of them warm-up: 1/2, 1, then (1 + cos(pi k/8))/2. The first is never 0."""

    def curve(steps, warmup):
        return [lr_factor(step, steps, warmup) for step in range(steps)]

    cosine = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert curve(10, 0.2) == pytest.approx([0.5, 1.0, *cosine])
    assert curve(4, 0.0) == pytest.approx([1, 1, 0.75, 0.25])
    assert curve(4, 1.0) == pytest.approx([0.25, 0.5, 0.75, 1])
    assert lr_factor(0, 1, 0.1) == 1


def test_every_epoch_takes_every_pair_once_in_an_order_of_its_own():
    """Seeded permutations, one per epoch, cut into batches; max_steps cuts the list."""
    c = Config(epochs=3, batch=8)
    steps = step_order(21, c, 0, "order", 1)
    assert [len(step) for step in steps] == [8, 8, 5] * 3

    epochs = [sum(steps[first : first + 3], []) for first in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(21))
        assert epoch != list(range(21))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]

    assert step_order(21, c, 0, "order", 1) == steps
    assert step_order(21, c, 0, "order", 2) != steps
    short = Config(epochs=3, batch=8, max_steps=4)
    assert step_order(21, short, 0, "order", 1) == steps[:4]


def micro_batches_of_rank(monkeypatch, rank: int, world: int, step: list[int], micro: int):
    """micro_batches() as this process would call it if it were one of several ranks."""
    monkeypatch.setattr(job, "rank", lambda: rank)
    monkeypatch.setattr(job, "world_size", lambda: world)
    return micro_batches(step, Config(micro_batch=micro))


def test_micro_batches_hold_every_pair_once_whatever_ranks_and_sizes(monkeypatch):
    """Every index weighs 1 once; all ranks' micro-batches are as many and as large; fillers 0."""
    for world, size, micro in itertools.product((1, 2, 3, 4), (1, 3, 7, 8, 12), (1, 2, 3, 8, 100)):
        step = list(range(50, 50 + size))
        shapes = set()
        total = dict.fromkeys(step, 0.0)
        for rank in range(world):
            micros = micro_batches_of_rank(monkeypatch, rank, world, step, micro)
            shapes.add(tuple(len(indices) for indices, _ in micros))
            for indices, weights in micros:
                for i, weight in zip(indices, weights, strict=True):
                    assert weight in (0.0, 1.0)
                    assert i in step
                    total[i] += weight
        assert total == dict.fromkeys(step, 1.0)

        assert len(shapes) == 1
        (shape,) = shapes
        assert len(set(shape)) == 1
        assert shape[0] <= min(micro, math.ceil(size / world))
        assert sum(shape) * world < size + world * shape[0]


def test_a_step_clips_the_whole_gradients_norm_and_reports_it_unclipped():
    """theta <- theta - lr g min(1, clip / |g|), |g| over all parameters; the gradients go."""
    for clip, shrink in ((1.0, 1 / 13), (100.0, 1.0)):
        a = torch.nn.Parameter(torch.zeros(2))
        b = torch.nn.Parameter(torch.zeros(1))
        a.grad = torch.tensor([3.0, 4.0])
        b.grad = torch.tensor([12.0])
        optimizer = torch.optim.SGD([a, b], lr=7.0)
        assert take_step(optimizer, 0.1, clip) == pytest.approx(13)
        moved = [-0.1 * grad * shrink for grad in (3, 4, 12)]
        assert [*a.tolist(), *b.tolist()] == pytest.approx(moved, rel=1e-5)
        assert a.grad is None
        assert b.grad is None
