"""The paper's equations, the noise and the order of steps, against naive float64 loops written from the formulas."""
import copy
import functools
import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import dnpo
import toy
from dnpo import (Config, NoiseHead, NoisyReference, Scorer, collate, draw, dynamic_labels, lr_factor, micro_batches, model_losses, noise_losses,
                  noisy_token_logps, preference_losses, preference_margin, seed_of, step_order, take_step, token_logps)

V = 23  # of the toy tokenizer
near = functools.partial(pytest.approx, rel=1e-5, abs=1e-5)


def tiny_lm(seed: int, tied: bool = False, **more):
    """A random Llama of a few thousand weights with far from uniform predictions."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
                                        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more)).eval()


def random_pairs(n: int, seed: int = 0) -> list[tuple]:
    """(prompt ids, positive ids, negative ids) of n pairs, lengths 2..5, 1..7, 1..7."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(V) for _ in range(rng.randint(low, high))]
    return [(ids(2, 5), ids(1, 7), ids(1, 7)) for _ in range(n)]


def stack(pairs: list[tuple]):
    """ids, mask [2B, T], positives first."""
    return collate([(p, y) for p, y, _ in pairs] + [(p, y) for p, _, y in pairs], "cpu")


def set_noise(head, seed: int = 5):
    """Random W and b, so that sigma differs from token to token and from entry to entry."""
    g = torch.Generator().manual_seed(seed)
    head.weight.data, head.bias.data = 0.05 * torch.randn(head.weight.shape, generator=g), 0.3 + 0.3 * torch.rand(head.bias.shape, generator=g)
    return head


# ---------------------------------------------------------------- the naive reference: float64, one pair, one token, one entry at a time


def naive_log_softmax(z: list[float]) -> list[float]:
    total = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - total for v in z]


def naive_loss(m: float) -> float:
    return -math.log(1 / (1 + math.exp(-m)))


def naive_logits(lm, prompt: list[int], answer: list[int]):
    """Hidden states and logits (h_j [D], z_j [V] for each j) that predict the answer, from a plain forward of one sequence."""
    out = lm(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
    return out.hidden_states[-1][0, len(prompt) - 1:-1], out.logits[0, len(prompt) - 1:-1]


def naive_logp(lm, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log pi(y|x), differentiable."""
    _, z = naive_logits(lm, prompt, answer)
    return sum(z[j, y] - torch.log(torch.exp(z[j]).sum()) for j, y in enumerate(answer))


def naive_noise(lm, W, b, prompt: list[int], answer: list[int], seed: int):
    """log p_noise(y|x), and for every token h_j, sigma_j, d log p_noise / d sigma_j, as lists of floats."""
    with torch.no_grad():
        h, z = (x.tolist() for x in naive_logits(lm, prompt, answer))
    eps, total, tokens = draw([seed + j for j in range(len(answer))], V, "cpu").tolist(), 0.0, []
    for j, y in enumerate(answer):
        sigma = [sum(W[v][d] * h[j][d] for d in range(len(h[j]))) + b[v] for v in range(V)]
        logs = naive_log_softmax([z[j][v] + sigma[v] * eps[j][v] for v in range(V)])
        total += logs[y]
        tokens.append((h[j], sigma, [eps[j][v] * ((v == y) - math.exp(logs[v])) for v in range(V)]))
    return total, tokens


def naive_step(policy, reference, noise, pairs: list[tuple], seeds: list[int], beta: float, alpha: float) -> dict:
    """Objective 10 of one step: the losses' values and their gradients on theta, W and b. noise: (W, b) or None (DPO, SPIN)."""
    B, N, mean = len(pairs), sum(len(n) for _, _, n in pairs), lambda values: sum(values) / len(values)
    rewards, logps, losses, sigmas, squares, theta = [], [], [], [], [], 0
    dW, db = torch.zeros(V, 16, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    W, b = (x.tolist() for x in noise or (dW, db))
    for (x, win, lose), seed in zip(pairs, seeds):
        with torch.no_grad():
            ref_win = naive_logp(reference, x, win)
        ref_lose, tokens = naive_noise(reference, W, b, x, lose, seed)
        m = beta * ((naive_logp(policy, x, win) - ref_win) - (naive_logp(policy, x, lose) - ref_lose))
        theta = theta - torch.log(1 / (1 + torch.exp(-m))) / B
        with torch.no_grad():
            logps.append((naive_logp(policy, x, win).item(), naive_logp(policy, x, lose).item()))
        rewards.append((beta * (logps[-1][0] - ref_win.item()), beta * (logps[-1][1] - ref_lose)))
        losses.append(naive_loss(m.item()))
        dm = -1 / (1 + math.exp(m.item()))  # d l / d m
        for h, sigma, slope in tokens:
            sigmas.append(mean(sigma)), squares.append(mean([s * s for s in sigma]))
            for v in range(V):
                g = -dm * beta * slope[v] / B + alpha * 2 * sigma[v] / (N * V)  # of -l, and of the penalty
                db[v] += g
                dW[v] += g * torch.tensor(h, dtype=torch.float64)
    params = list(policy.parameters())
    return {"theta": torch.autograd.grad(theta, params), "noise": (dW, db), "loss": mean(losses), "noise/std": mean(sigmas),
            "noise/spread": (mean(squares) - mean(sigmas) ** 2) ** 0.5, "noise/loss": -mean(losses) + alpha * mean(squares),
            "rewards/chosen": mean([w for w, _ in rewards]), "rewards/rejected": mean([l for _, l in rewards]),
            "rewards/margins": mean([w - l for w, l in rewards]), "rewards/accuracies": mean([float(w > l + 1e-5) for w, l in rewards]),
            "logps/chosen": mean([w for w, _ in logps]), "logps/rejected": mean([l for _, l in logps])}


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize("annotated, generated, positive", [(7, 3, "annotated"), (3, 7, "generated"), (5, 5, "annotated"), (0.0, 0.0, "annotated"),
                                                            (-2.5, -1.5, "generated"), (-1.5, -1.5, "annotated"), (9.0, 8.99, "annotated")])
def test_the_better_answer_is_the_positive_and_a_tie_keeps_the_annotation(annotated, generated, positive):
    """(y+, y-) = (y*, y') if s* >= s' else (y', y*)."""
    assert dynamic_labels(annotated, generated) == positive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_logps_is_log_softmax_at_the_target_in_float32(dtype):
    """log softmax(z)[y] of each row, in fp32 from logits of any dtype, without overflow."""
    z = torch.randn(9, V, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.0, 1, 3, 10, 30, 100, 300, 1, 1])[:, None] + 50
    z, y = z.to(dtype), torch.arange(9) * 5 % V
    out = token_logps(z, y)
    assert out.dtype == torch.float32
    assert out.tolist() == near([naive_log_softmax(row)[t] for row, t in zip(z.double().tolist(), y.tolist())], abs=5e-5)


def test_noisy_token_logps_adds_sigma_times_eps_to_the_logits():
    """log softmax(z + sigma * eps)[y], entry by entry."""
    g = torch.Generator().manual_seed(1)
    z, std, eps = 2 * torch.randn(7, V, generator=g), torch.rand(7, V, generator=g), torch.randn(7, V, generator=g)
    y = torch.tensor([0, 5, 22, 3, 3, 11, 7])
    naive = [naive_log_softmax([a + s * e for a, s, e in zip(*rows)])[t] for *rows, t in zip(z.tolist(), std.tolist(), eps.tolist(), y.tolist())]
    assert noisy_token_logps(z, std, eps, y).tolist() == near(naive)
    assert noisy_token_logps(z.bfloat16(), std, eps, y).dtype == torch.float32


def logps_of_pairs(dtype=torch.float64, n: int = 5):
    g = torch.Generator().manual_seed(2)
    return -30 * torch.rand(2 * n, generator=g, dtype=dtype), -30 * torch.rand(2 * n, generator=g, dtype=dtype)


def naive_margins(logps, ref_logps, beta):
    n = len(logps) // 2
    return [beta * ((logps[i] - ref_logps[i]) - (logps[n + i] - ref_logps[n + i])) for i in range(n)]


def test_the_margin_is_beta_times_the_positives_log_ratio_minus_the_negatives():
    """m_i = beta [(log pi(y+_i) - log ref(y+_i)) - (log pi(y-_i) - log ref(y-_i))], positives in the first half."""
    logps, ref = logps_of_pairs()
    assert preference_margin(logps, ref, 0.3).tolist() == pytest.approx(naive_margins(logps.tolist(), ref.tolist(), 0.3), rel=1e-12)


def test_the_loss_is_minus_log_sigmoid_of_the_margin_at_any_size():
    """l(m) = -log sigmoid(m): ln 2 at 0, 0 and |m| at the ends, never infinite."""
    m = [-20.0, -3.0, -0.5, 0.0, 0.5, 3.0, 20.0]
    assert preference_losses(torch.tensor(m, dtype=torch.float64)).tolist() == pytest.approx([naive_loss(x) for x in m], rel=1e-6)
    assert preference_losses(torch.tensor([0.0, 1e4, -1e4])).tolist() == pytest.approx([math.log(2), 0, 1e4], rel=1e-7)


def test_model_loss_and_noise_loss_mirror_each_other():
    """theta's part is l(m) and sees no noise gradient, the noise's part is -l(m) and sees no theta gradient; d l / d log pi = -+ beta sigmoid(-m)."""
    logps, ref = (x.requires_grad_() for x in logps_of_pairs())
    margins = naive_margins(logps.tolist(), ref.tolist(), 0.2)
    pull = [0.2 / (1 + math.exp(m)) for m in margins]
    model, noise = model_losses(logps, ref, 0.2), noise_losses(logps, ref, 0.2)
    assert model.tolist() == pytest.approx([naive_loss(m) for m in margins], rel=1e-9)
    assert noise.tolist() == pytest.approx([-naive_loss(m) for m in margins], rel=1e-9)
    model.sum().backward()
    assert ref.grad is None and logps.grad.tolist() == pytest.approx([-p for p in pull] + pull, rel=1e-9)
    logps.grad = None
    noise.sum().backward()
    assert logps.grad is None and ref.grad.tolist() == pytest.approx([-p for p in pull] + pull, rel=1e-9)  # -dl/dref = dl/dlogps


def test_the_gradients_of_the_equations_are_their_derivatives():
    """Finite differences agree; for the two functions that compute in fp32, with fp32's tolerance."""
    g = torch.Generator().manual_seed(3)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    logps, ref, m, z, std, eps, y = new(6), new(6), new(5), new(3, 4), new(3, 4), new(3, 4), torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda a, b: preference_margin(a, b, 0.7), (logps, ref))
    assert torch.autograd.gradcheck(preference_losses, m)
    assert torch.autograd.gradcheck(lambda a: model_losses(a, ref, 0.7), logps)
    assert torch.autograd.gradcheck(lambda b: noise_losses(logps, b, 0.7), ref)
    fp32 = dict(eps=1e-2, atol=2e-3, rtol=2e-3)
    assert torch.autograd.gradcheck(lambda z: token_logps(z, y), z, **fp32)
    assert torch.autograd.gradcheck(lambda z, s, e: noisy_token_logps(z, s, e, y), (z, std, eps), **fp32)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_noise_lowers_the_expected_log_prob_of_every_token(sigma):
    """E log softmax(z + sigma eps)[y] < log softmax(z)[y] by 6 standard errors, and by sigma^2/2 (1 - sum p^2) where sigma is small."""
    z = torch.randn(V, generator=torch.Generator().manual_seed(4))
    eps = torch.randn(40000, V, generator=torch.Generator().manual_seed(5))
    p = [math.exp(v) for v in naive_log_softmax(z.tolist())]
    for y in (int(z.argmax()), int(z.argmin()), 7):
        drawn = noisy_token_logps(z.expand(40000, V), torch.tensor(sigma), eps, torch.full((40000,), y)).double() - sigma * eps[:, y]  # the mean of eps is 0
        error = drawn.std().item() / 200
        assert drawn.mean().item() < math.log(p[y]) - 6 * error
        if sigma == 0.1:
            assert math.log(p[y]) - drawn.mean().item() == pytest.approx(sigma ** 2 / 2 * (1 - sum(q * q for q in p)), rel=0.1)


# ---------------------------------------------------------------- the noise


def test_the_noise_head_starts_at_the_same_sigma_everywhere():
    """W = 0, b = init: sigma_j = init for every hidden state and entry, and then sigma = W h + b."""
    head, h = NoiseHead(16, V, 0.25), torch.randn(3, 16)
    assert head(h).tolist() == [[0.25] * V] * 3
    set_noise(head)
    naive = [[sum(w * x for w, x in zip(row, state)) + b for row, b in zip(head.weight.tolist(), head.bias.tolist())] for state in h.tolist()]
    assert head(h).tolist() == [near(row) for row in naive]


def test_eps_is_standard_normal_and_independent_over_tokens_and_entries():
    """Moments of 1200 x 50 draws: mean 0, variance 1, kurtosis 3; no correlation between neighbours, though their seeds are neighbours too."""
    eps = draw([10 ** 18 + i for i in range(1200)], 50, "cpu").double()
    assert eps.shape == (1200, 50)
    assert [eps.mean().item(), eps.var().item(), (eps ** 4).mean().item()] == pytest.approx([0, 1, 3], abs=0.06)
    for x, y in ((eps[1:], eps[:-1]), (eps[2:], eps[:-2]), (eps[400:], eps[:-400]), (eps[:, 1:], eps[:, :-1]), (eps[1:, 1:], eps[:-1, :-1])):
        assert (x * y).mean().abs().item() < 0.03


def test_the_noise_of_a_token_does_not_depend_on_its_batch_mates():
    """draw gives a seed the same eps alone, in company, in any order, whatever was drawn before; another seed other eps."""
    several = draw([7, 8, 9, 7], V, "cpu")
    torch.manual_seed(99)
    assert torch.equal(several, torch.cat([draw([s], V, "cpu") for s in (7, 8, 9, 7)]))
    assert (several[0] != several[1]).all() and (several[1] != several[2]).all() and torch.equal(several[0], several[3])


def noisy_reference(init: float | None = 0.1, seed: int = 1):
    reference = NoisyReference(tiny_lm(seed), init)
    if init:
        set_noise(reference.noise)
    return reference


def test_the_noisy_reference_is_exact_on_positives_and_noisy_on_negatives():
    """Positives: log pi_ref. Negatives: log p_noise with sigma = W h + b. And the sums over the negative's tokens of mean_v sigma, mean_v sigma^2."""
    reference, pairs, seeds = noisy_reference(), random_pairs(4), [100, 200, 300, 400]
    logps, sigma, squared = reference(*stack(pairs), seeds)
    exact, W, b = copy.deepcopy(reference.lm).double(), reference.noise.weight.tolist(), reference.noise.bias.tolist()
    noisy = [naive_noise(exact, W, b, x, lose, seed) for (x, _, lose), seed in zip(pairs, seeds)]
    assert logps[:4].tolist() == near([naive_logp(exact, x, win).item() for x, win, _ in pairs])
    assert logps[4:].tolist() == near([total for total, _ in noisy])
    assert sigma.tolist() == near([sum(sum(s) / V for _, s, _ in tokens) for _, tokens in noisy])
    assert squared.tolist() == near([sum(sum(v * v for v in s) / V for _, s, _ in tokens) for _, tokens in noisy])


def test_without_noise_the_reference_is_the_scorer():
    """init None: both halves are log pi_ref, nothing to train, sigma sums 0."""
    reference, pairs = noisy_reference(None), random_pairs(4)
    logps, sigma, squared = reference(*stack(pairs), [100, 200, 300, 400])
    exact = copy.deepcopy(reference.lm).double()
    assert logps.tolist() == near([naive_logp(exact, x, y[side]).item() for side in (0, 1) for x, *y in pairs])
    assert sigma.tolist() == squared.tolist() == [0.0] * 4 and not any(p.requires_grad for p in reference.parameters())


def test_only_the_noise_of_the_reference_is_trained():
    """The reference's weights are frozen, in eval mode; W and b have a gradient."""
    reference = noisy_reference()
    logps, _, _ = reference(*stack(random_pairs(3)), [100, 200, 300])
    logps.sum().backward()
    assert [name for name, p in reference.named_parameters() if p.requires_grad] == ["noise.weight", "noise.bias"]
    assert all(p.grad is None for p in reference.lm.parameters()) and not reference.lm.training
    assert (reference.noise.bias.grad != 0).all() and (reference.noise.weight.grad != 0).all()


def noisy_logps(reference, pairs, seeds):
    """Everything NoisyReference gives, and the noise's gradient of a sum that weighs pairs by their seed."""
    logps, sigma, squared = reference(*stack(pairs), seeds)
    weight = torch.tensor(seeds) / 100
    grads = torch.autograd.grad((weight * (logps[len(pairs):] + sigma + squared)).sum(), [reference.noise.weight, reference.noise.bias])
    return torch.stack([logps[:len(pairs)], logps[len(pairs):], sigma, squared], 1).detach(), grads


def test_batch_mates_padding_and_order_do_not_change_the_noise():
    """A pair's noisy log-probs and gradients are the same alone, beside longer ones, and in another place."""
    reference, pairs, seeds = noisy_reference(), random_pairs(5), [100, 200, 300, 400, 500]
    together, grads = noisy_logps(reference, pairs, seeds)
    alone = [noisy_logps(reference, [p], [s]) for p, s in zip(pairs, seeds)]
    turned, _ = noisy_logps(reference, pairs[::-1], seeds[::-1])
    torch.testing.assert_close(torch.cat([out for out, _ in alone]), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.flip(0), together, atol=1e-5, rtol=1e-5)
    for whole, parts in zip(grads, zip(*(g for _, g in alone))):
        torch.testing.assert_close(sum(parts), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 16])
def test_chunks_do_not_change_the_noise(monkeypatch, chunk):
    """Any CHUNK gives the same noisy log-probs, sigma sums and gradients, with never more than CHUNK rows of logits at a time."""
    reference, pairs, seeds, rows = noisy_reference(), random_pairs(5), [100, 200, 300, 400, 500], []
    whole, whole_grads = noisy_logps(reference, pairs, seeds)
    reference.lm.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    for module in (common, dnpo):
        monkeypatch.setattr(module, "CHUNK", chunk)
    out, grads = noisy_logps(reference, pairs, seeds)
    assert max(rows) <= chunk and sum(len(lose) for _, _, lose in pairs) > 16
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, whole_grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the objective, through the models


def objective(policy, reference, pairs, seeds, beta: float = 0.3):
    ids, mask = stack(pairs)
    return policy(ids, mask), reference(ids, mask, seeds)[0], beta


def test_a_policy_that_is_its_reference_has_margin_0_and_loss_ln_2():
    """theta = ref, no noise or sigma = 0: m = 0, l = ln 2."""
    policy, pairs = Scorer(tiny_lm(1)), random_pairs(6)
    for init in (None, 0.0):
        logps, ref, beta = objective(policy, NoisyReference(tiny_lm(1), init), pairs, list(range(6)))
        assert preference_margin(logps, ref, beta).tolist() == pytest.approx([0.0] * 6, abs=1e-5)
        assert model_losses(logps, ref, beta).tolist() == pytest.approx([math.log(2)] * 6, abs=1e-5)


def test_sigma_zero_gives_dpo():
    """With sigma = 0 loss and gradient on theta are DPO's: against naive float64 DPO, and against the reference that has no noise."""
    policy, pairs, seeds = Scorer(tiny_lm(2)), random_pairs(4), [100, 200, 300, 400]
    grads = []
    for init in (0.0, None):
        losses = model_losses(*objective(policy, NoisyReference(tiny_lm(1), init), pairs, seeds))
        grads.append((losses.tolist(), torch.autograd.grad(losses.mean(), list(policy.parameters()))))
    naive = naive_step(copy.deepcopy(policy.lm).double(), tiny_lm(1).double(), None, pairs, seeds, 0.3, 0.0)
    assert sum(grads[0][0]) / 4 == near(naive["loss"]) and grads[0][0] == near(grads[1][0], abs=1e-6)
    for sigma_zero, without, exact in zip(grads[0][1], grads[1][1], naive["theta"]):
        torch.testing.assert_close(sigma_zero, without, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(sigma_zero.double(), exact, atol=1e-6, rtol=1e-4)


def test_a_small_step_of_the_model_raises_the_margin_and_one_of_the_noise_lowers_it():
    """min over theta, max over the noise: descent on model_losses raises the mean margin, descent on noise_losses lowers it."""
    for which, sign in (("model", 1), ("noise", -1)):
        policy, reference, pairs, seeds = Scorer(tiny_lm(2)), noisy_reference(), random_pairs(8), list(range(0, 800, 100))
        before = preference_margin(*objective(policy, reference, pairs, seeds)).mean().item()
        losses = {"model": model_losses, "noise": noise_losses}[which](*objective(policy, reference, pairs, seeds))
        losses.mean().backward()
        trained = policy if which == "model" else reference.noise
        with torch.no_grad():
            for p in trained.parameters():
                p -= 1e-2 * p.grad
        assert sign * (preference_margin(*objective(policy, reference, pairs, seeds)).mean().item() - before) > 1e-4


def run_train(monkeypatch, folder, pairs, noise: bool = True, start=None, **flags):
    """dnpo.train() on a tiny model, with SGD in AdamW's place. -> metrics lines, and of every optimizer step (who, weights before, gradients)."""
    lm, log, made = start or tiny_lm(1), [], []
    lm.save_pretrained(folder / "start")

    class Recorder(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr)
            made.append(self)

        def step(self):
            params, who = self.param_groups[0]["params"], ["policy", "noise"][made.index(self)]
            log.append((who, [p.detach().clone() for p in params], [p.grad.clone() for p in params]))
            super().step()

    class SetHead(NoiseHead):
        def __init__(self, *args):
            super().__init__(*args)
            set_noise(self)
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    monkeypatch.setattr(dnpo, "NoiseHead", SetHead)
    usual = dict(parallel="none", dtype="float32", activation_checkpointing=False, epochs=1, lr=0.5, noise_lr=5.0, clip=1e9, beta=0.3, noise_penalty=0.2)
    c = Config(**usual | flags)
    (folder / "iter3").mkdir()
    dnpo.train(c, 3, pairs, str(folder / "start"), folder / "iter3", toy.tokenizer(), torch.device("cpu"), noise)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], log


@pytest.mark.parametrize("how", ["off", "joint", "alternating"])
def test_the_training_loops_gradients_are_those_of_objective_10(monkeypatch, tmp_path, how):
    """On theta: d l / d theta with the noise constant. On (W, b): -d l / d sigma + alpha d mean(sigma^2), joint with theta or before it
    with noise of its own. At every step, with an uneven last micro-batch; and the logged numbers are Objective 10's."""
    pairs, flags = random_pairs(7), dict(batch=5, micro_batch=2, warmup=1.0)  # steps of 5 and 2 pairs, at 1/2 and 1 of the learning rates
    metrics, log = run_train(monkeypatch, tmp_path, pairs, noise=how != "off", **flags, **({} if how == "off" else {"noise_update": how}))
    order, policy, reference = step_order(7, Config(epochs=1, batch=5), 0, "order", 3), tiny_lm(1).double(), tiny_lm(1).double()
    assert [who for who, _, _ in log] == {"off": ["policy"], "joint": ["policy", "noise"], "alternating": ["noise", "policy"]}[how] * 2
    theta, sigma = [p.detach().clone() for p in tiny_lm(1).parameters()], [p.detach().clone() for p in set_noise(NoiseHead(16, V, 0.0)).parameters()]
    for step in (0, 1):
        for who, weights, grads in log[step * len(log) // 2:(step + 1) * len(log) // 2]:
            update = {"off": "model", "joint": "joint", "alternating": {"noise": "noise", "policy": "model"}[who]}[how]
            if update != "joint" or who == "policy":  # in a joint step both gradients are taken before either moves
                for p, q in zip(policy.parameters(), theta):
                    p.data = q.double()
                seeds = [seed_of(0, "noise", 3, step, update, i) for i in order[step]]
                naive = naive_step(policy, reference, None if how == "off" else sigma, [pairs[i] for i in order[step]], seeds, 0.3, 0.2)
            for mine, exact in zip(grads, naive["theta" if who == "policy" else "noise"], strict=True):
                torch.testing.assert_close(mine.double(), exact, atol=2e-6, rtol=2e-4)
            for mine, exact in zip(weights, theta if who == "policy" else sigma, strict=True):
                torch.testing.assert_close(mine, exact)
            moved = [w - {"policy": 0.5, "noise": 5.0}[who] * (0.5, 1.0)[step] * g for w, g in zip(weights, grads)]
            theta, sigma = (moved, sigma) if who == "policy" else (theta, moved)
            if who == "policy":
                assert metrics[step]["grad_norm"] == near(math.sqrt(sum(g.square().sum().item() for g in naive["theta"])), rel=1e-4)
                names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"]
                for name in names if how == "off" else [*names, "noise/std", "noise/spread", "noise/loss"]:
                    assert metrics[step][name] == near(naive[name]), name
    assert [m["lr"] for m in metrics] == pytest.approx([0.25, 0.5])
    for mine, exact in zip(AutoModelForCausalLM.from_pretrained(tmp_path / "iter3" / "checkpoint").parameters(), theta, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_before_the_first_step_the_reward_is_0_and_the_loss_ln_2(monkeypatch, tmp_path, dropout):
    """The policy starts as its reference, also if the model's config asks for dropout: margin 0, loss ln 2."""
    metrics, _ = run_train(monkeypatch, tmp_path, random_pairs(4), noise=False, start=tiny_lm(1, attention_dropout=dropout), batch=4, max_steps=1)
    assert [metrics[0][k] for k in ("loss", "rewards/chosen", "rewards/rejected")] == pytest.approx([math.log(2), 0, 0], abs=1e-5)


# ---------------------------------------------------------------- steps


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    """10 steps, 2 of them warm-up: 1/2, 1, then (1 + cos(pi k/8))/2; without warm-up it starts at 1; the first step is never 0."""
    cosine = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [lr_factor(i, 10, 0.2) for i in range(10)] == pytest.approx([0.5, 1.0, *cosine])
    assert [lr_factor(i, 4, 0.0) for i in range(4)] == pytest.approx([1, 1, 0.75, 0.25])
    assert [lr_factor(i, 4, 1.0) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert lr_factor(0, 1, 0.1) == 1


def test_every_epoch_takes_every_pair_once_in_an_order_of_its_own():
    """Seeded permutations, one per epoch, cut into batches; another seed or epoch gives another order; max_steps cuts the list."""
    c = Config(epochs=3, batch=8)
    steps = step_order(21, c, 0, "order", 1)
    assert [len(s) for s in steps] == [8, 8, 5] * 3
    epochs = [sum(steps[k:k + 3], []) for k in (0, 3, 6)]
    assert all(sorted(e) == list(range(21)) and e != list(range(21)) for e in epochs) and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert step_order(21, c, 0, "order", 1) == steps != step_order(21, c, 0, "order", 2)
    assert step_order(21, Config(epochs=3, batch=8, max_steps=4), 0, "order", 1) == steps[:4]


def test_micro_batches_hold_every_pair_once_whatever_ranks_and_sizes(monkeypatch):
    """Over all ranks every index has weight 1 once; ranks get equally many, equally large micro-batches; the rest weighs 0."""
    for world in (1, 2, 3, 4):
        for size in (1, 3, 7, 8, 12):
            for micro in (1, 2, 3, 8, 100):
                step, shapes, weights = list(range(50, 50 + size)), set(), {}
                for rank in range(world):
                    monkeypatch.setattr(dnpo, "ranks", lambda: (rank, world))
                    micros = micro_batches(step, Config(micro_batch=micro))
                    shapes.add(tuple(len(indices) for indices, _ in micros))
                    for i, w in ((i, w) for indices, ws in micros for i, w in zip(indices, ws, strict=True)):
                        assert w in (0.0, 1.0) and i in step
                        weights[i] = weights.get(i, 0) + w
                assert weights == dict.fromkeys(step, 1.0) and len(shapes) == 1
                (shape,) = shapes
                assert len(set(shape)) == 1 and shape[0] <= min(micro, math.ceil(size / world)) and sum(shape) * world < size + world * shape[0]


def test_a_step_clips_the_whole_gradients_norm_and_reports_it_unclipped():
    """theta <- theta - lr g clip / |g| over all parameters at once if |g| > clip, else theta - lr g; the gradients are cleared."""
    for clip, shrink in ((1.0, 1 / 13), (100.0, 1.0)):
        a, b = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1))
        a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        assert take_step(torch.optim.SGD([a, b], lr=7.0), 0.1, clip) == pytest.approx(13)
        assert [*a.tolist(), *b.tolist()] == pytest.approx([-0.1 * g * shrink for g in (3, 4, 12)], rel=1e-5)
        assert a.grad is None and b.grad is None
