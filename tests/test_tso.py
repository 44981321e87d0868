"""TSO: its equations against naive loops, pairs and their correction, and whole runs of tso.py."""
import functools
import json
import math
import random
import shutil
import signal
from collections import Counter

import pytest
import torch
from conftest import as_flags, assert_close, forked, lines, metrics, refused, results, run, together, weights
from test_equations import naive_logp, naive_loss, random_pairs, tiny_lm

import common
import toy
import tso
from tso import (Config, apply_verdicts, clipped, correction, distinct2, diversity, dual_clip_losses, export, implicit_rewards, judge_pairs, make_pairs, read_verdicts,
                 similarity, skewness_kurtosis)

near = functools.partial(pytest.approx, rel=1e-4, abs=1e-5)
CPU, inf = torch.device("cpu"), math.inf
naive_dual_clip = lambda w, l, cw, cl: naive_loss((w if w < cw else cw) - (l if l > -cl else -cl))


def tso_flags(world, **more) -> list[str]:
    """Flags of a run of tso.py that takes seconds: 40 prompts in 2 slices, 20 steps. A list gives a flag several values."""
    values = dict(model=world / "sft", older=[world / "sft-early"], smaller=[world / "sft-small"], data=world / "train.jsonl", test=world / "test.jsonl", judge="toy", limit=40,
                  test_prompts=12, slices=2, batch=8, micro_batch=4, sample_batch=16, max_response=16, max_prompt=32, n_scores=4, save_every=1, preset="toy") | more
    several = {k: v for k, v in values.items() if isinstance(v, list)}
    return as_flags({k: v for k, v in values.items() if k not in several}) + [x for k, v in several.items() for x in (f"--{k}", *v)]


PLAIN = dict(sample_batch=5, epochs=1)  # every bar has three items to be killed at
ONE = dict(limit=12, slices=1, test_prompts=3, n_scores=0, max_steps=1)  # the smallest run: one slice, one step


# ---------------------------------------------------------------- equations


def test_rewards_losses_and_clipped_sides_are_the_formulas():
    """r = beta (log pi - log pi_ref), -log sigmoid(min(r_w, c_w) - max(r_l, -c_l)) and who is clipped, for 40 pairs, one float at a time."""
    rng = random.Random(0)
    a, b = ([[rng.uniform(-9, 0) for _ in range(40)] for _ in range(2)] for _ in range(2))  # [side][pair]
    w, l = implicit_rewards(torch.tensor(a[0] + a[1]), torch.tensor(b[0] + b[1]), 0.3)
    rw, rl = ([0.3 * (x - y) for x, y in zip(a[side], b[side])] for side in (0, 1))
    assert w.tolist() == near(rw) and l.tolist() == near(rl)
    for cw, cl in ((0.5, 0.2), (0.2, 0.7), (inf, 0.4), (0.4, inf)):
        assert dual_clip_losses(w, l, cw, cl).tolist() == near([naive_dual_clip(x, y, cw, cl) for x, y in zip(rw, rl)])
        assert [side.tolist() for side in clipped(w, l, cw, cl)] == [[float(x > cw) for x in rw], [float(y < -cl) for y in rl]]


def test_without_clips_it_is_dpo_to_the_bit():
    """c = inf: values and gradients are those of softplus(-(r_w - r_l)), for moderate and for huge rewards."""
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 200.0):
        w, l = (scale * torch.randn(64, generator=g) for _ in range(2))
        w.requires_grad_(), l.requires_grad_()
        mine, dpo = dual_clip_losses(w, l, inf, inf), torch.nn.functional.softplus(-(w - l))
        assert torch.equal(mine, dpo)
        for x, y in zip(torch.autograd.grad(mine.sum(), (w, l)), torch.autograd.grad(dpo.sum(), (w, l))):
            assert torch.equal(x, y)


def test_a_side_that_moved_far_enough_has_no_gradient():
    """r_l < -c_l: exactly 0 on r_l while r_w is still pulled up; r_w > c_w: exactly 0 on r_w while r_l is still pushed down; both: none at all."""
    w, l = torch.tensor([0.1, 0.6, 0.6, 0.1, -4.0], requires_grad=True), torch.tensor([-0.4, 0.2, -0.9, 0.2, -0.31], requires_grad=True)
    dw, dl = torch.autograd.grad(dual_clip_losses(w, l, 0.5, 0.3).sum(), (w, l))
    pull = [1 / (1 + math.exp(m)) for m in (0.1 + 0.3, 0.5 - 0.2, 0, 0.1 - 0.2, -4.0 + 0.3)]
    assert dw.tolist() == near([-pull[0], 0, 0, -pull[3], -pull[4]]) and dl.tolist() == near([0, pull[1], 0, pull[3], 0])
    assert [dw[i].item() for i in (1, 2)] == [0, 0] and [dl[i].item() for i in (0, 2, 4)] == [0, 0, 0]


def test_the_gradients_are_those_of_finite_differences():
    """gradcheck in float64, away from the kinks, with none, either and both of the sides clipped."""
    w, l = torch.tensor([0.1, 0.9, 0.1, 0.9], dtype=torch.float64, requires_grad=True), torch.tensor([0.2, 0.2, -0.8, -0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, l: dual_clip_losses(w, l, 0.5, 0.3), (w, l))
    logps, ref = (torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(i), requires_grad=i == 0) for i in (0, 1))
    assert torch.autograd.gradcheck(lambda x: dual_clip_losses(*implicit_rewards(x, ref, 0.3), inf, inf), (logps,))


def train_tiny(monkeypatch, folder, pairs, **flags):
    """tso.train() on a tiny model, with SGD in AdamW's place -> its config, metrics lines, and of every step (weights before, gradients)."""
    log = []

    class Recorder(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr)

        def step(self):
            params = self.param_groups[0]["params"]
            log.append(([p.detach().clone() for p in params], [p.grad.clone() for p in params]))
            super().step()
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    tiny_lm(1).save_pretrained(folder / "start")
    (folder / "slice").mkdir()
    c = Config(**dict(parallel="none", dtype="float32", activation_checkpointing=False, epochs=2, lr=0.1, warmup=0.0, clip=1e9, beta=0.3, batch=5, micro_batch=2) | flags)
    tso.train(c, 3, "1.3", pairs, str(folder / "start"), folder / "slice", toy.tokenizer(), CPU)
    return lines(folder / "metrics.jsonl"), log


@pytest.mark.parametrize("cw, cl", [(0.15, 0.25), (inf, inf)])
def test_the_training_loop_descends_the_dual_clip_loss(monkeypatch, tmp_path, cw, cl):
    """At every step, with an uneven last micro-batch: gradient and logged numbers are those of the formula in float64, one pair at a time; the reference is the start."""
    pairs = random_pairs(7)
    logged, log = train_tiny(monkeypatch, tmp_path, pairs, clip_chosen=cw, clip_rejected=cl)
    orders = [random.Random(common.seed_of(0, "order", "1.3", epoch)).sample(range(7), 7) for epoch in (0, 1)]
    policy, reference, shares = tiny_lm(1).double(), tiny_lm(1).double(), []
    for step, m, (before, grads) in zip([orders[0][:5], orders[0][5:], orders[1][:5], orders[1][5:]], logged, log, strict=True):
        for p, q in zip(policy.parameters(), before):
            p.data = q.double()
        loss, rows = 0, []
        for i in step:
            x, *sides = pairs[i]
            logps = [naive_logp(policy, x, y) for y in sides]
            with torch.no_grad():
                ref = [naive_logp(reference, x, y) for y in sides]
            w, l = (0.3 * (a - b) for a, b in zip(logps, ref))
            loss = loss - torch.log(torch.sigmoid((w if w < cw else cw) - (l if l > -cl else -cl) + 0 * w)) / len(step)
            w, l = w.item(), l.item()
            rows.append({"rewards/chosen": w, "rewards/rejected": l, "rewards/margins": w - l, "rewards/accuracies": float(w > l), "clipped/chosen": float(w > cw),
                         "clipped/rejected": float(l < -cl), "loss": naive_dual_clip(w, l, cw, cl), "logps/chosen": logps[0].item(), "logps/rejected": logps[1].item()})
        exact = torch.autograd.grad(loss, list(policy.parameters()))
        for mine, g in zip(grads, exact, strict=True):
            torch.testing.assert_close(mine.double(), g, atol=1e-5, rtol=1e-3)
        skip = ("rewards/accuracies",) if m["step"] == 1 else ()  # of two zeros, the larger is a matter of the last bit
        assert {k: m[k] for k in rows[0] if k not in skip} == near({k: sum(row[k] for row in rows) / len(rows) for k in rows[0] if k not in skip})
        shares += [m["clipped/chosen"], m["clipped/rejected"]]
    assert (m["iteration"], m["slice"], m["step"]) == (3, "1.3", 4) and logged[0]["loss"] == near(math.log(2)) and shares[:2] == [0, 0]
    assert any(0 < s < 1 for s in shares) and all(max(shares[i::2]) > 0 for i in (0, 1)) if cw < inf else not any(shares)


def test_one_step_from_the_reference_raises_the_margin(monkeypatch, tmp_path):
    """The loss begins at ln 2 with rewards 0; after one small step on the same pairs it is lower, the chosen reward is up and the rejected one down."""
    logged, _ = train_tiny(monkeypatch, tmp_path, random_pairs(5), lr=1e-3, clip_chosen=0.2, clip_rejected=0.2)
    first, second = logged
    assert [first[k] for k in ("loss", "rewards/chosen", "rewards/rejected")] == near([math.log(2), 0, 0])
    assert second["loss"] < math.log(2) - 1e-4 and second["rewards/chosen"] > 1e-4 and second["rewards/rejected"] < -1e-4


def test_a_verdict_keeps_swaps_or_drops():
    """A, the positive is better: keep; B: swap; a tie, or nothing that could be read: drop."""
    assert [correction(v) for v in ("A", "B", "tie", None)] == ["keep", "swap", "drop", "drop"]


def naive_similarity(answers):
    """Mean Jaccard index of the answers' sets of bigrams, by counting; an answer of one token is that token."""
    found = []
    for i in range(len(answers)):
        for j in range(i):
            a, b = ([tuple(x[k:k + 2]) for k in range(len(x) - 1)] if len(x) > 1 else [("alone", *x)] if x else [] for x in (answers[i], answers[j]))
            both, either = len([g for g in dict.fromkeys(a) if g in b]), len(dict.fromkeys(a + b))
            found.append(both / either if either else 1.0)
    return sum(found) / len(found) if found else None


def naive_distinct2(answers):
    grams = [(x[k], x[k + 1]) for x in answers for k in range(len(x) - 1)]
    return len(dict.fromkeys(grams)) / len(grams) if grams else 0.0


def test_diversity_counts_bigrams():
    """distinct-2 and similarity by hand, for empty, one-token, equal and foreign answers, and against counting for random ones."""
    assert distinct2([[1, 2, 3], [1, 2, 4]]) == 3 / 4 and distinct2([[1, 2, 1, 2, 1]]) == 2 / 4 and distinct2([[7], []]) == 0 == distinct2([])
    assert similarity([[1, 2, 3], [1, 2, 4]]) == 1 / 3 and similarity([[1, 2]] * 3) == 1 and similarity([[1, 2], [2, 1]]) == 0 and similarity([[5, 6]]) is None
    assert similarity([[5], [5]]) == 1 and similarity([[5], [6]]) == 0 and similarity([[], []]) == 1 and similarity([[], [5]]) == 0 and similarity([[5], [5, 5]]) == 0
    assert similarity([[1, 2], [1, 2], [3, 4]]) == near(1 / 3)
    rng = random.Random(0)
    for _ in range(50):
        answers = [[rng.randrange(3) for _ in range(rng.randrange(6))] for _ in range(rng.randrange(2, 5))]
        assert distinct2(answers) == near(naive_distinct2(answers)) and similarity(answers) == near(naive_similarity(answers))


def test_diversity_is_reported_with_and_without_each_cell():
    """Averages over prompts of the candidates of all cells, and of all but one; a prompt without two candidates has no similarity."""
    tok, letters = toy.tokenizer(), {c: i for i, c in enumerate(toy.LETTERS, 7)}
    texts = {"current": [["abc", "abd"], ["ef"]], "older": [["abc"], []], "human": [["cab"], ["gh"]]}
    found = {cell: [[{"text": t, "ended": True} for t in row] for row in rows] for cell, rows in texts.items()}
    expected = {}
    for name, cells in ({"all": list(texts)} | {f"without {x}": [y for y in texts if y != x] for x in texts}).items():
        rows = [[[letters[c] for c in t] for cell in cells for t in texts[cell][i]] for i in (0, 1)]
        similar = [s for s in map(naive_similarity, rows) if s is not None]
        expected[name] = {"distinct2": near(sum(map(naive_distinct2, rows)) / 2), "similarity": near(sum(similar) / len(similar))}
    assert diversity(found, tok) == expected
    assert diversity({"current": [[{"text": "ab", "ended": True}]]}, tok) == {"all": {"distinct2": 1, "similarity": None}}


def naive_moments(scores):
    """Skewness and excess kurtosis, None if all scores are one."""
    if len(set(scores)) == 1:
        return None
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    return tuple(sum(((s - mean) / std) ** k for s in scores) / len(scores) - less for k, less in ((3, 0), (4, 3)))


def test_skewness_and_kurtosis_are_the_standardised_moments():
    """By hand: two values are symmetric with kurtosis -2; one high of four leans right; against the formula for random scores."""
    assert skewness_kurtosis([1, 3]) == near((0, -2)) and skewness_kurtosis([0, 0, 0, 4]) == near((2 / math.sqrt(3), 7 / 3 - 3)) and skewness_kurtosis([0, 4, 4, 4])[0] < 0
    assert skewness_kurtosis([5, 5, 5]) is None and skewness_kurtosis([2.5]) is None
    rng = random.Random(0)
    for n in (2, 5, 16):
        scores = [rng.uniform(0, 10) for _ in range(n)]
        assert skewness_kurtosis(scores) == near(naive_moments(scores))


def test_equal_scores_have_no_skewness_whatever_their_last_bits():
    """All scores that the toy's judge can give, 3 to 64 times the same: None."""
    assert [(k, L, n) for L in range(5, 11) for k in range(L + 1) for n in (3, 4, 7, 16, 64) if skewness_kurtosis([10 * k / L] * n) is not None] == []


# ---------------------------------------------------------------- pairs and their correction


def candidates(n_rows: int, rng=None) -> tuple[list[dict], dict]:
    """Rows, and candidates of all cells whose texts say where they are from and whether they ended; with rng: few letters, often equal or empty."""
    rows = [{"id": f"r/{i}", "prompt": [{"role": "user", "content": f"p{i}"}]} for i in range(n_rows)]
    text = lambda cell, i, k, ended: rng.choice(["", " ", "a", "b"]) if rng else f"{cell}{i}.{k}.{ended}"
    return rows, {cell: [[{"text": text(cell, i, k, e), "ended": e} for k in range(2) for e in [(i + k + len(cell)) % 3 > 0]] for i in range(n_rows)]
                  for cell in ("current", "older", "smaller", "human", "human-")}


def test_pairs_are_spread_evenly_over_the_cells():
    """100 rows of 3 pairs over 6 cells: 50 each; ids are WHERE/ROW/NUMBER and unique; texts come from their cells and bring along whether they ended; seeded."""
    rows, found = candidates(100)
    pairs, none = make_pairs(Config(pairs_per_prompt=3), rows, found, "1.2")
    assert Counter(pair["meta"]["cell"] for pair in pairs) == {f"{p} > {n}": 50 for p in ("current", "human") for n in ("older", "smaller", "human")} and none == 0
    assert [pair["id"] for pair in pairs] == [f"1.2/r/{i}/{k}" for i in range(100) for k in range(3)]
    for pair in pairs:
        i, (p, n) = int(pair["id"].split("/")[2]), pair["meta"]["cell"].split(" > ")
        for side, cell in (("chosen", p), ("rejected", "human-" if n == "human" else n)):
            assert {"text": pair[side], "ended": pair["meta"][f"{side}_ended"]} in found[cell][i] and pair["prompt"] == rows[i]["prompt"]
    assert make_pairs(Config(pairs_per_prompt=3), rows, found, "1.2")[0] == pairs
    texts = lambda *args: [(pair["chosen"], pair["rejected"]) for pair in make_pairs(*args)[0]]
    assert len({tuple(texts(Config(pairs_per_prompt=3, seed=s), rows, found, w)) for s in (0, 1) for w in ("1.2", "2.2")}) == 4


def test_identical_and_empty_texts_make_no_pair():
    """Of few letters: a prompt gives as many pairs as it has different ones, 3 at most, none twice, no side empty; prompts without any are counted."""
    rows, found = candidates(200, random.Random(0))
    pairs, none = make_pairs(Config(pairs_per_prompt=3), rows, found, "1.1")
    made = [[(pair["chosen"], pair["rejected"]) for pair in pairs if pair["id"].split("/")[2] == str(i)] for i in range(200)]
    for i, mine in enumerate(made):
        possible = {(y["text"], z["text"]) for p in ("current", "human") for n in ("older", "smaller", "human-") for y in found[p][i] for z in found[n][i]}
        possible = {(y, z) for y, z in possible if y != z and y.strip() and z.strip()}
        assert len(set(mine)) == len(mine) == min(3, len(possible)) and set(mine) <= possible
    assert none == sum(not mine for mine in made) > 0 and max(map(len, made)) == 2


class Fake(common.Judge):
    """A judge that compares by a rule (a, b) -> verdict."""

    def __init__(self, rule):
        super().__init__("fake", None)
        self.rule = rule

    def ask(self, kind, items, again):
        return [self.rule(a, b) for _, a, b in items]


def corrected(tmp_path, rule, people={}, n=4):
    """Pairs as made, and as judged by a rule and by people."""
    made, _ = make_pairs(Config(), *candidates(n), "1.1")
    return made, apply_verdicts(made, judge_pairs(Config(), made, tmp_path, Fake(rule), ""), people, "1.1")


@pytest.mark.parametrize("rule, verdict", [
    (lambda a, b: "A", "drop"), (lambda a, b: "B", "drop"), (lambda a, b: "tie", "drop"), (lambda a, b: None, "drop"), (lambda a, b: None if a[0] in "ch" else "A", "drop"),
    (lambda a, b: "A" if a.startswith(("older", "smaller", "human-")) else "B", "swap"), (lambda a, b: "B" if a.startswith(("older", "smaller", "human-")) else "A", "keep"),
], ids=["always the first", "always the second", "always a tie", "unreadable", "unreadable in one order", "the negative", "the positive"])
def test_the_judge_keeps_swaps_or_drops_every_pair(tmp_path, rule, verdict):
    """Both orders are asked: a favoured place is a tie, and ties drop; the negative's favour exchanges texts and ends; what can't be read is dropped and counted."""
    made, after = corrected(tmp_path, rule)
    unreadable = rule("current", "older") is None
    for a, b in zip(made, after, strict=True):
        x, y = ("rejected", "chosen") if verdict == "swap" else ("chosen", "rejected")
        assert b == a | {"chosen": a[x], "rejected": a[y], "meta": {"cell": a["meta"]["cell"], "chosen_ended": a["meta"][f"{x}_ended"], "rejected_ended": a["meta"][f"{y}_ended"],
                                                                      "verdict": verdict, "by": "judge", "unreadable": unreadable}}
    assert len({(pair["meta"]["chosen_ended"], pair["meta"]["rejected_ended"]) for pair in made}) > 1


def test_without_correction_every_pair_is_kept(tmp_path):
    """--no-correct asks nobody."""
    made, _ = make_pairs(Config(), *candidates(3), "1.1")
    ask = Fake(lambda a, b: pytest.fail("the judge was asked"))
    assert [row["verdict"] for row in judge_pairs(Config(correct=False), made, tmp_path, ask, "")] == ["keep"] * 6


@pytest.mark.parametrize("rule", [lambda a, b: "A" if a.startswith(("older", "smaller", "human-")) else "B", lambda a, b: "tie", lambda a, b: None])
def test_a_person_outranks_the_judge(tmp_path, rule):
    """Whatever the judge says, a pair with a person's verdict gets that one; the others get the judge's."""
    _, by_judge = corrected(tmp_path / "judge", rule)
    said = {by_judge[0]["id"]: "keep", by_judge[2]["id"]: "swap", by_judge[4]["id"]: "drop"}
    made, after = corrected(tmp_path / "person", rule, said)
    assert [after[i] for i in (1, 3, 5)] == [by_judge[i] for i in (1, 3, 5)]
    assert [after[i]["meta"] | {"chosen_ended": 0, "rejected_ended": 0, "cell": 0} for i in (0, 2, 4)] == [
        {"chosen_ended": 0, "rejected_ended": 0, "cell": 0, "verdict": v, "by": "person", "unreadable": False} for v in said.values()]
    assert [(after[i]["chosen"], after[i]["meta"]["chosen_ended"]) for i in (0, 2)] == [(made[0]["chosen"], made[0]["meta"]["chosen_ended"]),
                                                                                       (made[2]["rejected"], made[2]["meta"]["rejected_ended"])]


def test_a_person_changes_the_edited_rows_and_no_others(tmp_path):
    """Export, edit, read back: nothing edited, nothing changed, whatever is in the texts; 3 rows edited, exactly these change."""
    made, _ = make_pairs(Config(), *candidates(6), "1.1")
    for pair, odd in zip(made, ["a\u2028b", 'say "x"\n\n\\n', "\x85\x0b\x0c\r\n", "{}", "\ufeffä😀", "\t"]):
        pair["chosen"] += odd
        pair["prompt"] = [{"role": "user", "content": odd + "?"}]
    made[7]["prompt"] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    judged = [{"id": pair["id"], "verdict": ("keep", "swap", "drop")[i % 3], "unreadable": False} for i, pair in enumerate(made)]
    export(tmp_path / "pairs.jsonl", made, judged)
    rows = common.read_jsonl(tmp_path / "pairs.jsonl")
    assert [(row["id"], row["verdict"], row["chosen"], row["rejected"], row["cell"]) for row in rows] == [
        (pair["id"], row["verdict"], pair["chosen"], pair["rejected"], pair["meta"]["cell"]) for pair, row in zip(made, judged)]
    assert [common.turns(row["prompt"]) for row in rows] == [pair["prompt"] for pair in made]
    apply = lambda people: [pair | {"meta": pair["meta"] | {"by": None}} for pair in apply_verdicts(made, judged, people, "1.1")]
    read = lambda: read_verdicts(tmp_path / "pairs.jsonl", Config())
    assert read() == {row["id"]: row["verdict"] for row in judged} and apply(read()) == apply({})
    for i, verdict in ((0, "swap"), (4, "drop"), (8, "keep")):
        rows[i]["verdict"] = verdict
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = apply(read())
    assert [i for i, (a, b) in enumerate(zip(apply({}), after)) if a != b] == [0, 4, 8] and [after[i]["meta"]["verdict"] for i in (0, 4, 8)] == ["swap", "drop", "keep"]
    assert (after[0]["chosen"], after[8]["chosen"], after[4]["chosen"]) == (made[0]["rejected"], made[8]["chosen"], made[4]["chosen"])


@pytest.mark.parametrize("line, complaint", [
    ('{"id": "1.5/a/0", "verdict": "keep"}', "no pair has the id '1.5/a/0'"), ('{"id": "2.1/a/0", "verdict": "keep"}', "no pair has the id '2.1/a/0'"),
    ('{"verdict": "keep"}', "None"), ('{"id": 5, "verdict": "keep"}', "5"), ('["1.1/a/0", "keep"]', "None"),
    ('{"id": "1.1/b/0", "verdict": "kept"}', "the verdict is 'kept'"),
    ('{"id": "1.1/b/0"}', "the verdict is None"),
    ('{"id": "1.1/a/0", "verdict": "drop"}', "1.1/a/0 has two verdicts, keep and drop"), ('{"id": "1.1/b/0", "verdict": "keep"', "broken JSON"),
])
def test_a_bad_verdict_names_file_and_line(tmp_path, capsys, line, complaint):
    """Exit code 2 and one line; the same verdict twice is none."""
    file = tmp_path / "verdicts.jsonl"
    file.write_text('{"id": "1.1/a/0", "verdict": "keep"}\n\n{"id": "1.1/a/0", "verdict": "keep"}\n' + line + "\n")
    with pytest.raises(SystemExit) as stop:
        read_verdicts(file, Config())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {file}:4: ") and complaint in err and err.count("\n") == 1


def test_a_verdict_on_a_pair_that_is_not_there_ends_the_run(tmp_path, capsys):
    """Exit code 2 with the id; a verdict on another slice's pair waits for that slice."""
    assert [pair["meta"]["by"] for pair in corrected(tmp_path / "a", lambda a, b: "A", {"1.2/r/0/0": "keep"})[1]] == ["judge"] * 8
    with pytest.raises(SystemExit) as stop:
        corrected(tmp_path / "b", lambda a, b: "A", {"1.1/r/0/0": "keep", "1.1/r/9/0": "keep"})
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and "'1.1/r/9/0'" in err and err.count("\n") == 1


def config_of(monkeypatch, world, **more) -> Config:
    monkeypatch.setattr("sys.argv", ["tso.py", *map(str, tso_flags(world, **more))])
    return common.parse(Config, {"toy": tso.TOY, "paper": {}})


def test_slices_share_the_prompts_out(monkeypatch, world):
    """Every prompt stands in one slice, in a seeded order; held-out prompts in none; without --test a tenth is held out by the prompt."""
    tok, _ = common.load_tokenizer(str(world / "sft"))
    ids = lambda **more: [[row["id"] for row in part] for part in tso.read_rows(config_of(monkeypatch, world, **more), tok)[0]]
    parts = ids(limit=40, slices=4)
    assert [len(part) for part in parts] == [10] * 4 and sorted(sum(parts, [])) == sorted(f"train-{i}" for i in range(40)) and sum(parts, []) != [f"train-{i}" for i in range(40)]
    assert ids(limit=40, slices=4) == parts != ids(limit=40, slices=4, seed=1)
    flags = [x for x in tso_flags(world, limit=1000) if x not in ("--test", world / "test.jsonl")]
    monkeypatch.setattr("sys.argv", ["tso.py", *map(str, flags)])
    parts, test_rows, _ = tso.read_rows(common.parse(Config, {"toy": tso.TOY, "paper": {}}), tok)
    held = [row["id"] for row in lines(world / "train.jsonl") if common.seed_of([{"role": "user", "content": row["prompt"]}]) % 1000 < 100]
    assert [row["id"] for row in test_rows] == held[:12] and sorted(row["id"] for row in sum(parts, [])) == sorted({f"train-{i}" for i in range(120)} - set(held))


def test_slices_differ_by_at_most_one_prompt(monkeypatch, world):
    """9 prompts in 6 slices, 10 in 4: none is empty."""
    tok, _ = common.load_tokenizer(str(world / "sft"))
    for limit, slices in ((9, 6), (10, 4)):
        sizes = [len(part) for part in tso.read_rows(config_of(monkeypatch, world, limit=limit, slices=slices), tok)[0]]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """One run in one process: two slices of 20 prompts and 5 steps."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert forked(tso, *tso_flags(world, out=out, **PLAIN)) == 0
    return out


def naive_score(prompt: str, answer: str) -> float:
    right = sorted(prompt)
    return 10 * sum(i < len(right) and c == right[i] for i, c in enumerate(answer)) / max(len(right), len(answer))


def test_results_are_those_of_the_files(plain, world):
    """Scores, full marks, wins, cells, pairs, rewards, diversity and spread in results.json against what the answers' and pairs' files say under the toy's rule."""
    report, told = json.loads((plain / "results.json").read_text())["slices"], {row["id"]: row for row in lines(world / "test.jsonl")}
    mean, tok = lambda v: sum(v) / len(v), toy.tokenizer()
    answers = {f: common.read_jsonl(plain / f / "answers.jsonl") for f in ("start", "round1-slice1", "round1-slice2")}
    score = {f: [naive_score(row["prompt"][0]["content"], row["response"]) for row in rows] for f, rows in answers.items()}
    assert [(r["round"], r["slice"]) for r in report] == [(0, 0), (1, 1), (1, 2)] and len({tuple(s) for s in score.values()}) == 3
    for r, (folder, s) in zip(report, score.items(), strict=True):
        own = [naive_score(told[row["id"]]["prompt"], told[row["id"]]["response"]) for row in answers[folder]]
        shares = lambda b, end: {name + end: mean([(x > y) - (x < y) == sign for x, y in zip(s, b)]) for name, sign in (("win", 1), ("tie", 0), ("loss", -1))}
        expected = {"score": mean(s), "full_marks": mean([x == 10 for x in s]), "cut": mean([row["meta"]["finish"] == "length" for row in answers[folder]])} | shares(own, "_annotation")
        if folder != "start":
            steps = [m for m in metrics(plain) if m["slice"] == f"1.{folder[-1]}"]
            pairs, n = common.read_jsonl(plain / folder / "pairs.jsonl"), math.ceil(len(steps) / 4)
            expected |= shares(score["start"], "") | {name: mean([m[key] for m in steps[-n:]]) for name, key in (
                ("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"), ("clipped_chosen", "clipped/chosen"), ("clipped_rejected", "clipped/rejected"))}
            counts, cells = Counter((pair["meta"]["cell"], pair["meta"]["verdict"]) for pair in pairs), {pair["meta"]["cell"] for pair in pairs}
            kept, swapped, dropped = ({cell: counts[cell, word] for cell in cells} for word in ("keep", "swap", "drop"))
            assert len(cells) == 4 and r["cells"] == {cell: {"pairs": kept[cell] + swapped[cell] + dropped[cell], "kept": kept[cell], "swapped": swapped[cell],
                                                             "dropped": dropped[cell], "unreadable": 0} for cell in cells}
            trained = len(pairs) - sum(dropped.values())
            expected |= {"made": len(pairs), "pairs": trained, "prompts_without_pair": 20 - len({p["id"].split("/")[1] for p in pairs}), "steps": math.ceil(trained / 8)}
            assert len(steps) == r["steps"]
        if folder != "round1-slice1":
            many = [naive_score(row["prompt"][0]["content"], row["response"]) for row in common.read_jsonl(plain / folder / "many.jsonl")]
            spread = [x for x in (naive_moments(many[i:i + 4]) for i in range(0, 48, 4)) if x]
            expected |= {"skewness": mean([a for a, _ in spread]), "kurtosis": mean([b for _, b in spread]), "no_spread": 1 - len(spread) / 12}
        assert {k: v for k, v in r.items() if k in expected} == pytest.approx(expected)
        assert r.keys() - expected.keys() == ({"round", "slice"} if folder == "start" else {"round", "slice", "cells", "diversity", "left_out"})
    rows = {row["id"]: row["response"] for row in lines(world / "train.jsonl")}
    drawn = {name: common.read_jsonl(plain / "round1-slice2" / f"candidates-{name}.jsonl") for name in ("current", "older0", "smaller0")}
    texts = [[tok(t, add_special_tokens=False)["input_ids"] for t in [*(d[i]["response"] for d in drawn.values()), rows[drawn["current"][i]["id"]]]] for i in range(20)]
    assert r["diversity"]["all"] == {"distinct2": near(mean(list(map(naive_distinct2, texts)))), "similarity": near(mean(list(map(naive_similarity, texts))))}
    without = [t[:2] + t[3:] for t in texts]
    assert r["diversity"]["without smaller"] == {"distinct2": near(mean(list(map(naive_distinct2, without)))), "similarity": near(mean(list(map(naive_similarity, without))))}


def test_every_pair_is_of_its_cell_and_of_the_judges_mind(plain, world):
    """Positives are the current model's or the annotator's, negatives the older or smaller model's, each with its own end; after correction the chosen side scores higher."""
    human = {row["id"]: (row["response"], True) for row in lines(world / "train.jsonl")}
    seen = Counter()
    for m in (1, 2):
        files = {name.rstrip("0"): plain / f"round1-slice{m}/candidates-{name}.jsonl" for name in ("current", "older0", "smaller0")}
        drawn = {cell: {row["id"]: (row["response"], row["meta"]["finish"] == "stop") for row in common.read_jsonl(file)} for cell, file in files.items()} | {"human": human}
        for pair in common.read_jsonl(plain / f"round1-slice{m}" / "pairs.jsonl"):
            meta, letters = pair["meta"], pair["prompt"][0]["content"]
            sides = [(pair[side], meta[f"{side}_ended"]) for side in ("chosen", "rejected")]
            gap = naive_score(letters, pair["chosen"]) - naive_score(letters, pair["rejected"])
            assert gap == 0 if meta["verdict"] == "drop" else gap > 0
            assert [drawn[cell][pair["id"].split("/")[1]] for cell in meta["cell"].split(" > ")] == (sides[::-1] if meta["verdict"] == "swap" else sides)
            seen[meta["verdict"]] += 1
    assert min(seen[word] for word in ("keep", "swap", "drop")) > 2


def resampled(tmp_path, file, model, seed: int = 0, n: int = 1) -> bytes:
    """The bytes of a candidates' file, drawn once more from a model."""
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in common.read_jsonl(file)][::n]
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    common.generate(out, rows, str(model), common.load_tokenizer(str(model))[0], n=n, temperature=1.0, max_new_tokens=16, batch=5, dtype=torch.float32, device=CPU,
                    seed=common.seed_of(seed, "candidates", file.parent.name, file.stem.removeprefix("candidates-")))
    return out.read_bytes()


def test_every_cell_is_sampled_from_its_model(plain, world, tmp_path):
    """The older and the smaller cell from their models; the current one from the start in slice 1 and from slice 1's checkpoint in slice 2, not from the start again."""
    for m, name, model in ((1, "current", world / "sft"), (1, "older0", world / "sft-early"), (1, "smaller0", world / "sft-small"),
                           (2, "current", plain / "round1-slice1/checkpoint"), (2, "older0", world / "sft-early"), (2, "smaller0", world / "sft-small")):
        file = plain / f"round1-slice{m}" / f"candidates-{name}.jsonl"
        assert file.read_bytes() == resampled(tmp_path, file, model), (m, name)
    assert file.with_name("candidates-current.jsonl").read_bytes() != resampled(tmp_path, file.with_name("candidates-current.jsonl"), world / "sft")


def test_every_slice_starts_where_the_last_one_ended(plain, world):
    """Step 1 of each slice: log-probs are those of the start and of slice 1's checkpoint, pair by pair; reference = policy: loss ln 2, rewards 0; a fresh learning rate."""
    from transformers import AutoModelForCausalLM
    tok, _ = common.load_tokenizer(str(world / "sft"))
    for m, start in ((1, world / "sft"), (2, plain / "round1-slice1/checkpoint")):
        first = next(line for line in metrics(plain) if line["slice"] == f"1.{m}")
        assert (first["step"], first["lr"]) == (1, 5e-5) and [first[k] for k in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")] == near([math.log(2), 0, 0, 0])
        lm, pairs = AutoModelForCausalLM.from_pretrained(start), [pair for pair in common.read_jsonl(plain / f"round1-slice{m}/pairs.jsonl") if pair["meta"]["verdict"] != "drop"]
        batch = [pairs[i] for i in random.Random(common.seed_of(0, "order", f"1.{m}", 0)).sample(range(len(pairs)), len(pairs))[:8]]
        for side in ("chosen", "rejected"):
            total = 0
            for pair in batch:
                y = tok(pair[side], add_special_tokens=False)["input_ids"] + [2] * pair["meta"][f"{side}_ended"]
                with torch.no_grad():
                    total += naive_logp(lm, tok.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False), y).item()
            assert first[f"logps/{side}"] == pytest.approx(total / 8, abs=1e-3)


def test_the_policy_at_a_rounds_end_joins_the_older_ones(monkeypatch, plain, world, tmp_path):
    """--rounds 2 on a finished run of one round: round 2 slice 2 samples negatives from the end of round 1 too; in slice 1 that is the current model itself."""
    out = shutil.copytree(plain, tmp_path / "run")
    run(monkeypatch, tso, *tso_flags(world, out=out, **PLAIN, rounds=2), "--resume")
    assert metrics(out)[:len(metrics(plain))] == metrics(plain) and [(r["round"], r["slice"]) for r in results(out)["slices"]] == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    end, models = out / "round1-slice2/checkpoint", {m: sorted(f.stem.removeprefix("candidates-") for f in (out / f"round2-slice{m}").glob("candidates*")) for m in (1, 2)}
    assert models == {1: ["current", "older0", "smaller0"], 2: ["current", "older0", "older1", "smaller0"]}
    (tmp_path / "again").mkdir()
    for m, name, model in ((1, "current", end), (2, "current", out / "round2-slice1/checkpoint"), (2, "older0", world / "sft-early"), (2, "older1", end)):
        file = out / f"round2-slice{m}" / f"candidates-{name}.jsonl"
        assert file.read_bytes() == resampled(tmp_path / "again", file, model), (m, name)
    old = {row["response"] for row in common.read_jsonl(file)}
    assert any({pair["chosen"], pair["rejected"]} & old for pair in common.read_jsonl(out / "round2-slice2/pairs.jsonl") if pair["meta"]["cell"].endswith("older"))
    first = [m for m in metrics(out) if m["step"] == 1]
    assert [m["slice"] for m in first] == ["1.1", "1.2", "2.1", "2.2"] and [m["loss"] for m in first] == near([math.log(2)] * 4)


def test_a_smaller_model_may_have_another_tokenizer(monkeypatch, world, tmp_path):
    """sft-small with its letters' ids reversed, in weights and tokenizer, is the same model: greedy, the run's candidates, pairs and weights are the same bytes."""
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(world / "sft-small")
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(toy, "LETTERS", toy.LETTERS[::-1])
        toy.tokenizer().save_pretrained(tmp_path / "mirrored")
        lm.model.embed_tokens.weight[7:] = lm.model.embed_tokens.weight[7:].flip(0).clone()
    lm.save_pretrained(tmp_path / "mirrored")
    ids = [common.load_tokenizer(str(m))[0]("ab", add_special_tokens=False)["input_ids"] for m in (world / "sft-small", tmp_path / "mirrored")]
    assert ids == [[7, 8], [22, 21]]
    for name, model in (("a", world / "sft-small"), ("b", tmp_path / "mirrored")):
        run(monkeypatch, tso, *tso_flags(world, **ONE, out=tmp_path / name, smaller=[model], temperature=0))
    for file in ("candidates-smaller0.jsonl", "pairs.jsonl", "checkpoint/model.safetensors"):
        assert (tmp_path / "a/round1-slice1" / file).read_bytes() == (tmp_path / "b/round1-slice1" / file).read_bytes()
    assert len({row["response"] for row in common.read_jsonl(tmp_path / "b/round1-slice1/candidates-smaller0.jsonl")}) > 3


def test_rejected_sides_are_human_negatives(monkeypatch, world, tmp_path):
    """--data of pairs: chosen sides are human positives, rejected ones human negatives, both whole; nothing else is sampled for the cells that are not asked for."""
    run(monkeypatch, tso, *tso_flags(world, **ONE | dict(limit=20), out=tmp_path / "run", data=world / "pairs.jsonl", negatives=["human"], correct=False))
    folder, rows = tmp_path / "run/round1-slice1", {row["id"]: row for row in lines(world / "pairs.jsonl")}
    assert [f.name for f in folder.glob("candidates*")] == ["candidates-current.jsonl"]
    drawn, pairs = {row["id"]: row["response"] for row in common.read_jsonl(folder / "candidates-current.jsonl")}, common.read_jsonl(folder / "pairs.jsonl")
    assert Counter(pair["meta"]["cell"] for pair in pairs) == {"current > human": sum(map(bool, drawn.values())), "human > human": 20}
    for pair in pairs:
        name, cell, meta = pair["id"].split("/")[1], pair["meta"]["cell"], pair["meta"]
        assert pair["rejected"] == rows[name]["rejected"] and pair["chosen"] == {"current > human": drawn, "human > human": {name: rows[name]["chosen"]}}[cell][name]
        assert meta["rejected_ended"] and (meta["chosen_ended"] or cell[0] == "c") and (meta["verdict"], pair["prompt"][0]["content"]) == ("keep", rows[name]["prompt"])


def test_current_answers_may_be_negatives_of_their_own(monkeypatch, world, tmp_path):
    """--positives current --negatives current: n_positive answers on one side, n_negative others on the other; the judge decides who is chosen."""
    run(monkeypatch, tso, *tso_flags(world, **ONE, out=tmp_path / "run", positives=["current"], negatives=["current"], n_positive=2, n_negative=3, pairs_per_prompt=6))
    folder, drawn = tmp_path / "run/round1-slice1", {}
    for row in common.read_jsonl(folder / "candidates-current.jsonl"):
        drawn.setdefault(row["id"], []).append(row["response"])
    for name, texts in drawn.items():
        pairs = [pair for pair in common.read_jsonl(folder / "pairs.jsonl") if pair["id"].split("/")[1] == name]
        made = {(p["rejected"], p["chosen"]) if p["meta"]["verdict"] == "swap" else (p["chosen"], p["rejected"]) for p in pairs}
        possible = {(y, z) for y in texts[:2] for z in texts[2:] if y != z and y and z}
        assert len(texts) == 5 and (made == possible if len(possible) <= 6 else made < possible) and all(p["meta"]["cell"] == "current > current" for p in pairs)


def test_an_exported_slice_waits_for_a_person(monkeypatch, plain, world, tmp_path):
    """--export_pairs ends with exit code 0 before training; --resume --verdicts trains slice 1 on exactly what the person said, and the judge decides slice 2."""
    flags, file = tso_flags(world, out=tmp_path / "run", **PLAIN), tmp_path / "pairs.jsonl"
    assert forked(tso, *flags, "--export_pairs", file) == 0
    assert not list((tmp_path / "run").rglob("checkpoint")) and not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/results.json").exists()
    rows, by_judge = common.read_jsonl(file), common.read_jsonl(plain / "round1-slice1/pairs.jsonl")
    assert [(row["id"], row["verdict"]) for row in rows] == [(pair["id"], pair["meta"]["verdict"]) for pair in by_judge]
    for i, row in enumerate(rows):
        row["verdict"] = ("swap", "drop", "keep")[i % 3]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, train, tok = [], tso.train, toy.tokenizer()
    monkeypatch.setattr(tso, "train", lambda c, number, where, pairs, *more: seen.append(pairs) or train(c, number, where, pairs, *more))
    run(monkeypatch, tso, *flags, "--resume", "--verdicts", file)
    said = [(row["rejected"], row["chosen"]) if row["verdict"] == "swap" else (row["chosen"], row["rejected"]) for row in rows if row["verdict"] != "drop"]
    assert len(said) == 27 and [tuple(tok.decode(y, skip_special_tokens=True) for y in pair[1:3]) for pair in seen[0]] == said
    assert [{pair["meta"]["by"] for pair in common.read_jsonl(tmp_path / f"run/round1-slice{m}/pairs.jsonl")} for m in (1, 2)] == [{"person"}, {"judge"}]
    cells = results(tmp_path / "run")["slices"][1]["cells"].values()
    assert [sum(cell[name] for cell in cells) for name in ("kept", "swapped", "dropped")] == [13, 14, 13]


def test_an_unedited_export_trains_as_the_judge_alone(plain, world, tmp_path):
    """Exported, not touched, and gone on with: the same metrics, results and weights to the bit."""
    flags = tso_flags(world, out=tmp_path / "run", **PLAIN)
    assert forked(tso, *flags, "--export_pairs", tmp_path / "pairs.jsonl") == 0 and forked(tso, *flags, "--resume", "--verdicts", tmp_path / "pairs.jsonl") == 0
    assert metrics(tmp_path / "run") == metrics(plain) and results(tmp_path / "run") == results(plain)
    assert_close(weights(tmp_path / "run/round1-slice2/checkpoint"), weights(plain / "round1-slice2/checkpoint"), atol=0)


def test_a_person_may_judge_slice_after_slice(world, tmp_path):
    """--verdicts FILE --export_pairs FILE, again and again: slice 1, slice 2, the end."""
    flags, file = tso_flags(world, **ONE | dict(slices=2), out=tmp_path / "run"), tmp_path / "pairs.jsonl"
    assert forked(tso, *flags, "--export_pairs", file) == 0 and {row["id"][:3] for row in common.read_jsonl(file)} == {"1.1"}
    for slice in ("1.2", None):
        assert forked(tso, *flags, "--resume", "--verdicts", file, "--export_pairs", file) == 0
        assert slice is None or {row["id"][:3] for row in common.read_jsonl(file)} == {slice}
    assert (tmp_path / "run/round1-slice2/checkpoint").exists()


def test_without_a_judge_a_person_judges_every_pair(monkeypatch, world, tmp_path, capsys):
    """--judge none --verdicts: a pair without a verdict ends the run with its id; with all of them it trains, and has no score to report."""
    flags, file = tso_flags(world, **ONE, judge="none"), tmp_path / "pairs.jsonl"
    run(monkeypatch, tso, *flags, "--out", tmp_path / "a", "--no-correct", "--export_pairs", file)
    rows = lines(file)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:4] + rows[5:]))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tso, *flags, "--out", tmp_path / "b", "--verdicts", file)
    assert stop.value.code == 2 and f"1 pairs have no verdict, {rows[4]['id']} the first" in capsys.readouterr().err and not list((tmp_path / "b").rglob("checkpoint"))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, tso, *flags, "--out", tmp_path / "b", "--verdicts", file, "--resume")
    last = results(tmp_path / "b")["slices"][1]
    assert last["score"] is None and "win" not in last and last["pairs"] == len(rows) == sum(cell["kept"] for cell in last["cells"].values())


@pytest.mark.parametrize("kill", [("in", "1.1: sample older0"), ("in", "1.2: correct"), ("in", "slice 1.2"), ("before", "state.pt"), ("before", "round1-slice1/checkpoint"),
                                  ("after", "round1-slice2/checkpoint"), ("in", "1.1: against the start"), ("before", "results.json")])
def test_a_killed_run_ends_with_the_same_results(plain, world, tmp_path, kill):
    """SIGKILL while sampling, correcting, training, renaming and measuring: results, metrics and weights are the same to the bit."""
    flags, ends = tso_flags(world, out=tmp_path / "run", **PLAIN), [f"round1-slice{m}/checkpoint" for m in (1, 2)]
    assert forked(tso, *flags, kill=kill) == -signal.SIGKILL
    assert forked(tso, *flags, "--resume") == 0
    assert metrics(tmp_path / "run") == metrics(plain) and results(tmp_path / "run") == results(plain)
    for end in ends:
        assert_close(weights(tmp_path / "run" / end), weights(plain / end), atol=0)
    assert not list((tmp_path / "run").rglob("state.pt")) and not list((tmp_path / "run").rglob("*.part*"))


def test_two_ranks_sample_and_learn_what_one_does(plain, world, tmp_path):
    """DDP and FSDP (its reference offloaded) on two ranks: the same candidates and pairs to the byte in both slices, the same metrics and weights."""
    together(tso, tmp_path, 2, [(2, False, tso_flags(world, out=way, **PLAIN, parallel=way, offload_reference=way == "fsdp", save_every=50, n_scores=0)) for way in ("ddp", "fsdp")])
    for way in ("ddp", "fsdp"):
        for m in (1, 2):
            files = [f"round1-slice{m}/{name}.jsonl" for name in ("candidates-current", "candidates-older0", "candidates-smaller0", "judged", "pairs", "answers")]
            assert [(tmp_path / way / file).read_bytes() for file in files] == [(plain / file).read_bytes() for file in files]
            assert_close(weights(plain / f"round1-slice{m}/checkpoint"), weights(tmp_path / way / f"round1-slice{m}/checkpoint"), atol=1e-4)
        for a, b in zip(metrics(plain), metrics(tmp_path / way), strict=True):
            a, b = ({k: v for k, v in m.items() if k != "rewards/accuracies" or m["step"] > 1} for m in (a, b))  # of two zeros, the larger is a matter of the last bit
            assert b == pytest.approx(a, abs=1e-3)
        mine, two = (results(out)["slices"] for out in (plain, tmp_path / way))
        assert [r["score"] for r in mine] == [r["score"] for r in two] and [r.get("cells") for r in mine] == [r.get("cells") for r in two]


def test_the_share_clipped_is_that_of_the_pairs(monkeypatch, world, tmp_path):
    """--clip 0.001: step 2's rewards, loss and clipped shares are those of step 1's weights, pair by pair; with inf it has another loss and other weights."""
    from transformers import AutoModelForCausalLM
    tiny, free = dict(clip_chosen=0.001, clip_rejected=0.001), dict(clip_chosen="inf", clip_rejected="inf")
    for name, more in (("one", tiny | dict(max_steps=1)), ("two", tiny | dict(max_steps=2)), ("free", free | dict(max_steps=2))):
        run(monkeypatch, tso, *tso_flags(world, **ONE | more, out=tmp_path / name, lr=3e-5))
    policy, reference = (AutoModelForCausalLM.from_pretrained(m) for m in (tmp_path / "one/round1-slice1/checkpoint", world / "sft"))
    tok, _ = common.load_tokenizer(str(world / "sft"))
    pairs = [pair for pair in common.read_jsonl(tmp_path / "two/round1-slice1/pairs.jsonl") if pair["meta"]["verdict"] != "drop"]
    batch = [pairs[i] for i in random.Random(common.seed_of(0, "order", "1.1", 0)).sample(range(len(pairs)), len(pairs))[8:16]]
    found = []
    for pair in batch:
        x = tok.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        sides = [tok(pair[side], add_special_tokens=False)["input_ids"] + [2] * pair["meta"][f"{side}_ended"] for side in ("chosen", "rejected")]
        with torch.no_grad():
            found.append([0.1 * (naive_logp(policy, x, y) - naive_logp(reference, x, y)).item() for y in sides])
    mean, second, unclipped = lambda v: sum(v) / len(v), metrics(tmp_path / "two")[1], metrics(tmp_path / "free")[1]
    assert len(batch) == 8 and second["clipped/chosen"] == mean([w > 0.001 for w, _ in found]) > 0 and second["clipped/rejected"] == mean([l < -0.001 for _, l in found]) > 0
    assert [second["rewards/chosen"], second["rewards/rejected"]] == pytest.approx([mean(side) for side in zip(*found)], abs=1e-5)
    assert second["loss"] == pytest.approx(mean([naive_dual_clip(w, l, 0.001, 0.001) for w, l in found]), abs=1e-5)
    assert unclipped["loss"] == pytest.approx(mean([naive_loss(w - l) for w, l in found]), abs=1e-5) and unclipped["clipped/chosen"] == unclipped["clipped/rejected"] == 0
    a, b = (weights(tmp_path / name / "round1-slice1/checkpoint")["model.embed_tokens.weight"] for name in ("two", "free"))
    assert unclipped["loss"] < second["loss"] - 1e-4 and (a - b).abs().max() > 1e-7


@pytest.mark.parametrize("more, complaint", [
    (dict(positives=["older"]), "--positives older: expected some of current, human"), (dict(negatives=["current", "large"]), "expected some of current, older, smaller, human"),
    (dict(clip_chosen=0), "--clip_chosen must be above 0"), (dict(clip_rejected=-0.1), "--clip_rejected"), (dict(clip_chosen="nan"), "--clip_chosen"),
    (dict(slices=0), "--slices"),
    (dict(rounds=0), "--rounds"), (dict(pairs_per_prompt=0), "--pairs_per_prompt"), (dict(n_negative=0), "--n_negative"), (dict(n_scores=-1), "--n_scores"),
    (dict(beta=0), "--beta"), (dict(judge="none"), "--judge none can't correct"), (dict(verdicts="nothing.jsonl"), "nothing.jsonl: no such file"),
    (dict(limit=5, slices=6), "too few for 6 slices"),
    (dict(max_prompt=2), "too few for 2 slices"), (dict(data="nothing.jsonl"), "nothing.jsonl: no such file"), (dict(test="nothing.jsonl"), "nothing.jsonl: no such file"),
    (dict(older=["nowhere/sft"]), "nowhere/sft: neither a model folder"), (dict(smaller=["/tmp"]), "/tmp: not a model"), (dict(judge="rm"), "--judge rm: expected toy"),
    (dict(batch=10), "can't be divided"), (dict(max_response=1020), "more than"), (dict(limit=0), "--limit"), (dict(max_steps=0), "--max_steps"),
])
def test_bad_input_is_one_line_before_any_model(monkeypatch, world, tmp_path, capsys, more, complaint):
    """Exit code 2, one line on stderr, no folder."""
    assert complaint in refused(monkeypatch, capsys, tso, tso_flags(world, out=tmp_path / "run", **more)) and not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch, world, tmp_path, capsys):
    """Cells, clips, counts, steps and one example with its mask; no folder, no model."""
    for module in (tso, common):
        monkeypatch.setattr(module, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    run(monkeypatch, tso, *tso_flags(world, out=tmp_path / "run", clip_rejected="inf"), "--dry_run")
    text = capsys.readouterr().out
    for part in ("1 round x 2 slices", "positives current, human", "clip 0.2/inf", "40 training prompts in slices of 20, 12 held-out", "10 steps a slice",
                 "no loss: '<bos><|user|>"):
        assert part in text
    assert not list(tmp_path.iterdir())
