"""Ids, masks, log-probs and sampling: against plain Hugging Face calls on one sequence, and unchanged by padding, batch-mates, chunks and micro-batches."""
import copy
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import common
import toy
from common import Scorer, collate, encode_pairs, load_lm, load_tokenizer, prompt_ids, response_ids, sample
from dnpo import model_losses, preference_losses, preference_margin
from test_equations import V, naive_log_softmax, near, random_pairs, run_train, stack, tiny_lm

USER = [{"role": "user", "content": "hi a"}]
CHAT = ("{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>\\n' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}")


def finish(core, template: str = CHAT):
    tok = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tok.chat_template = template
    return tok


def sentencepiece():
    """As Llama 2's and Mistral's: every text is given a space in front; <s> is added to what is not told to go without it."""
    merges = [("h", "i"), ("▁", "hi"), ("▁", "a")]
    words = ["<s>", "</s>", "<unk>", "▁", "\n", *"</>userantiomhy.", *map("".join, merges)]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(dict.fromkeys(words))}, merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    return finish(core)


def bytes_bpe():
    """As Llama 3's: byte level, with a token for two newlines in a row; <s> as above."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("h", "i"), ("Ġ", "a")]
    words = ["<s>", "</s>", "<unk>", *letters, *map("".join, merges)]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(words)}, merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    return finish(core)


TOKENIZERS = {"toy": toy.tokenizer, "sentencepiece": sentencepiece, "bytes": bytes_bpe}


# ---------------------------------------------------------------- ids and masks


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", [USER, [{"role": "system", "content": "a"}, *USER, {"role": "assistant", "content": "hi"}, *USER]])
def test_prompt_ids_are_the_templates_text_tokenised_once(name, prompt):
    """ids of the rendered template with the assistant's header, nothing added: one beginning-of-sequence token, a plain list."""
    tok = TOKENIZERS[name]()
    text = tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = prompt_ids(tok, prompt)
    assert text.rstrip("\n").endswith(("<assistant>", "<|assistant|>"))
    assert ids == tok(text, add_special_tokens=False)["input_ids"] and ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id


@pytest.mark.parametrize("ended, limit, cut, eos", [(True, 9, 4, True), (False, 9, 4, False), (True, 5, 4, True), (True, 4, 4, False), (True, 3, 3, False),
                                                    (False, 3, 3, False), (True, 1, 1, False)])
def test_an_answer_has_an_end_token_only_if_it_ended_and_was_not_cut(ended, limit, cut, eos):
    """ids of the text, at most `limit` with the end-of-sequence token, which is there if and only if the whole answer and its end are."""
    tok = toy.tokenizer()
    assert response_ids(tok, "abcd", ended, limit) == tok.convert_tokens_to_ids(list("abcd"))[:cut] + [tok.eos_token_id] * eos


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_an_answers_text_stay_text(name):
    """A text that spells the end-of-sequence token has more than one id for it, and none is special."""
    tok = TOKENIZERS[name]()
    for text in (f"a{tok.eos_token}a", tok.bos_token, tok.eos_token):
        ids = response_ids(tok, text, False, 99)
        assert len(ids) >= len(text) - 1 and not {tok.eos_token_id, tok.bos_token_id} & set(ids)
        assert response_ids(tok, text, True, 99) == [*ids, tok.eos_token_id]


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
@pytest.mark.parametrize("text", ["hi", "hi a", "a", " hi", "hi\n", "hi\n\na", "\nhi", "\n\nhi", "\n"])
def test_answer_ids_are_those_of_the_text_after_the_assistants_header(name, text):
    """Nothing is added in front and nothing lost: the ids decode to the text, and have no token for a space that is not there."""
    tok = TOKENIZERS[name]()
    ids = response_ids(tok, text, False, 99)
    joined = "".join(tok.convert_ids_to_tokens(ids))
    assert {"sentencepiece": joined.replace("▁", " "), "bytes": joined.replace("Ġ", " ").replace("Ċ", "\n")}[name] == text
    if name == "sentencepiece" or not text.startswith("\n"):  # where the header's newline does not merge with the answer
        header = tok.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        assert prompt_ids(tok, USER) + ids == tok(header + text, add_special_tokens=False)["input_ids"]


def test_a_sentencepiece_answer_has_no_extra_space_and_a_byte_level_one_keeps_its_newline():
    """The two known cases by their tokens: "hi", not "▁hi"; "\\n", "hi" where the vocabulary would merge the header's newline with the answer's."""
    tok, bpe = sentencepiece(), bytes_bpe()
    assert tok.tokenize("hi") == ["▁hi"] and tok.convert_ids_to_tokens(response_ids(tok, "hi", True, 9)) == ["hi", "</s>"]
    assert tok.convert_ids_to_tokens(response_ids(tok, " hi a", False, 9)) == ["▁hi", "▁a"]
    assert bpe.tokenize("\n\nhi") == ["ĊĊ", "hi"] and bpe.convert_ids_to_tokens(response_ids(bpe, "\nhi", True, 9)) == ["Ċ", "hi", "</s>"]


def test_a_human_and_a_generated_copy_of_a_text_have_the_same_ids():
    """Text in, ids out, whoever wrote it: two copies that ended are identical and left out; if one was cut they differ by the end token."""
    tok, cut = toy.tokenizer(), {"chosen_ended": True, "rejected_ended": False}
    rows = [{"id": y + z, "prompt": [{"role": "user", "content": x}], "chosen": y, "rejected": z, "meta": meta} for x, y, z, meta in (
        ("ba", "abc", "abc", {}), ("ba", "abc", "abc", cut), ("ba", "abcdefg", "abcdefh", {}), ("ba", "abc", "", cut), ("ba", "", "ab", {}),
        ("a" * 9, "ab", "ba", {"chosen_ended": False}), ("a" * 10, "ab", "ba", {}))]
    pairs, dropped = encode_pairs(tok, rows, 12, 6)
    ids = lambda *tokens: tok.convert_tokens_to_ids(list(tokens))
    header = lambda text: ids("<bos>", "<|user|>", *text, "<|assistant|>")
    assert pairs == [(header("ba"), ids(*"abc", "<eos>"), ids(*"abc"), "abcabc"), (header("ba"), ids("<eos>"), ids(*"ab", "<eos>"), "ab"),
                     (header("a" * 9), ids(*"ab"), ids(*"ba", "<eos>"), "abba")]
    assert dropped == {"prompt too long": 1, "identical sides": 2, "empty side": 1}


def test_masks_come_from_lengths_also_where_answers_hold_the_padding_id():
    """ids: prompt, answer, padding on the right; mask: True on the answer, its end token included, even if its tokens are the padding's."""
    sequences = [([5, 6, 0], [0, 7, 0]), ([0], [2]), ([3, 0], [0]), ([2, 2], [2, 0, 2, 0])]
    ids, mask = collate(sequences, "cpu")
    width = max(len(p) + len(y) for p, y in sequences)
    assert ids.tolist() == [p + y + [0] * (width - len(p) - len(y)) for p, y in sequences]
    assert mask.tolist() == [[len(p) <= t < len(p) + len(y) for t in range(width)] for p, y in sequences]


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_model_whose_logits_are_more_than_a_linear_layer_is_refused(tmp_path, capsys, name):
    """Its log-probs would be wrong in silence: the setting is named and the exit code is 2; where it changes nothing the model is taken."""
    toy.tokenizer().save_pretrained(tmp_path)
    for value in (None, 1.0, 0.5):
        config = tiny_lm(1).config
        setattr(config, name, value)
        config.save_pretrained(tmp_path)
        if value != 0.5:
            tok, loaded = load_tokenizer(str(tmp_path))
            assert prompt_ids(tok, USER) == prompt_ids(toy.tokenizer(), USER) and getattr(loaded, name) == value
    with pytest.raises(SystemExit) as stop:
        load_tokenizer(str(tmp_path))
    assert stop.value.code == 2 and name in capsys.readouterr().err


# ---------------------------------------------------------------- log-probs


def naive_logps(lm, sequences) -> list[float]:
    """log pi(y|x) of each sequence by itself: full float64 logits, a log-softmax in python, a sum over the answer's tokens."""
    out = []
    for p, y in sequences:
        with torch.no_grad():
            logits = copy.deepcopy(lm).double()(input_ids=torch.tensor([p + y])).logits[0].tolist()
        out.append(sum(naive_log_softmax(logits[len(p) - 1 + j])[t] for j, t in enumerate(y)))
    return out


def some_sequences(n: int = 6):
    return [(p, y) for p, y, _ in random_pairs(n, seed=3)]


@pytest.mark.parametrize("tied", [False, True])
def test_a_score_is_the_sum_of_log_softmax_over_the_answers_tokens(tied):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), the answer's tokens only, the first and the last of them included."""
    lm, sequences = tiny_lm(1, tied), some_sequences()
    out = Scorer(lm)(*collate(sequences, "cpu"))
    assert out.dtype == torch.float32 and out.tolist() == near(naive_logps(lm, sequences))


def scores(lm, ids, mask):
    """Log-probs [S], and the gradients of their sum weighted by 1, 2, 3, ..."""
    out = Scorer(lm)(ids, mask)
    return out.detach(), torch.autograd.grad((out * torch.arange(1, len(out) + 1)).sum(), list(lm.parameters()))


def assert_same(mine, other):
    torch.testing.assert_close(mine[0], other[0], atol=1e-5, rtol=1e-6)
    for a, b in zip(mine[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=1e-5)


def test_batch_mates_and_padding_do_not_change_a_score():
    """The same log-probs and gradients one by one, and with 7 more columns on the right, whatever is in them."""
    lm, sequences = tiny_lm(1), some_sequences()
    ids, mask = collate(sequences, "cpu")
    together = scores(lm, ids, mask)
    parts = [scores(lm, *collate([s], "cpu")) for s in sequences]
    assert_same((torch.cat([out for out, _ in parts]), [sum((k + 1) * g for k, g in enumerate(grads)) for grads in zip(*(g for _, g in parts))]), together)
    for filling in (0, 2, 9):
        wider = torch.cat([ids, torch.full((len(ids), 7), filling)], 1), torch.cat([mask, torch.zeros(len(ids), 7, dtype=torch.bool)], 1)
        assert_same(scores(lm, *wider), together)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_the_chunk_size_does_not_change_a_score(monkeypatch, chunk):
    """The same log-probs and gradients for any CHUNK, with never more than CHUNK rows of logits at a time."""
    lm, rows, batch = tiny_lm(1), [], collate(some_sequences(), "cpu")
    together = scores(lm, *batch)
    lm.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    monkeypatch.setattr(common, "CHUNK", chunk)
    assert_same(scores(lm, *batch), together)
    assert batch[1].sum() > 10 and max(rows) <= chunk


def test_rows_of_equal_length_and_a_single_token_answer_are_scored_too():
    """Edges: one token of prompt, one of answer, no padding at all."""
    lm, sequences = tiny_lm(2), [([4], [7]), ([7], [4])]
    assert Scorer(lm)(*collate(sequences, "cpu")).tolist() == near(naive_logps(lm, sequences))


@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_micro_batching_does_not_change_training(monkeypatch, tmp_path, update):
    """Gradients, metrics and the saved checkpoint of 11 pairs in steps of 8 and 3 are those of whole batches, 2 by 2 and 1 by 1, noise and clipping on."""
    runs = {}
    for micro in (8, 2, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        metrics, log = run_train(monkeypatch, folder, random_pairs(11), batch=8, micro_batch=micro, noise_update=update, clip=1.5, lr=0.05, noise_lr=1.0)
        saved = list(AutoModelForCausalLM.from_pretrained(folder / "iter3" / "checkpoint").parameters())
        runs[micro] = metrics, log, saved
    metrics, log, saved = runs[8]
    assert len(metrics) == 2 and any(m["grad_norm"] > 3 for m in metrics) and max((p - q).abs().max() for p, q in zip(saved, tiny_lm(1).parameters())) > 1e-2
    assert all(sum(g.square().sum() for g in grads) <= 1.5 ** 2 + 1e-3 for who, _, grads in log)
    for micro in (2, 1):
        other = runs[micro]
        for (_, _, grads), (_, _, other_grads) in zip(log, other[1], strict=True):
            for a, b in zip(grads, other_grads, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for a, b in zip(saved, other[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        for a, b in zip(metrics, other[0]):
            assert {k: v for k, v in a.items() if k not in ("memory_gib", "pairs_per_second")} == {k: near(b[k], abs=2e-5) for k in a
                                                                                                   if k not in ("memory_gib", "pairs_per_second")}


# ---------------------------------------------------------------- sampling


def naive_greedy(lm, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


def test_greedy_answers_are_the_models_argmax_alone_and_in_a_batch():
    """At temperature 0: the most probable token each time, up to the first end token, the tokenizer's or one of the checkpoint's ("stop"),
    or to the limit ("length"); padding changes nothing."""
    lm, rng, finishes = tiny_lm(6), random.Random(0), set()
    prompts = [[rng.randrange(V) for _ in range(n)] for n in (3, 9, 1, 5, 7, 4, 12, 2)]
    tokens = [naive_greedy(lm, p, 8) for p in prompts]
    usual = sorted({t for new in tokens for t in new if t >= 7}, key=lambda t: -sum(t in new for new in tokens))  # letters, the commonest first
    for eos, ends in ((2, None), (2, usual[0]), (usual[0], 2), (usual[0], None), (2, usual[1:3]), (usual[1], [usual[2], usual[3]])):
        tok = toy.tokenizer()
        tok.eos_token = tok.convert_ids_to_tokens(eos)
        lm.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
        wanted = []
        for new in tokens:
            stop = next((i for i, t in enumerate(new) if t in {eos, *(ends if isinstance(ends, list) else [ends])}), None)
            text = "".join(tok.convert_ids_to_tokens(t) for t in new[:stop] if t >= 7 and t != eos)
            wanted.append((text, "length" if stop is None else "stop"))
        assert sample(lm, tok, prompts, 0.0, 8, 1) == wanted
        assert [sample(lm, tok, [p], 0.0, 8, 1)[0] for p in prompts] == wanted
        finishes |= {(finish, bool(text)) for text, finish in wanted}
    assert finishes >= {("stop", True), ("stop", False), ("length", True)} and len({text for text, _ in wanted}) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_the_models_own_distribution(tmp_path, temperature):
    """Frequencies of 6000 samples are softmax(z / temperature) within 5 standard errors: of the checkpoint's generation_config only the end tokens count."""
    lm, tok, prompt, n = tiny_lm(1), toy.tokenizer(), [4, 9, 3], 6000
    z = [v / temperature for v in lm(input_ids=torch.tensor([prompt])).logits[0, -1].tolist()]
    p = [math.exp(v) for v in naive_log_softmax(z)]
    lm.generation_config = GenerationConfig(do_sample=True, top_k=2, top_p=0.5, temperature=3.0, repetition_penalty=2.0, min_new_tokens=5, eos_token_id=[2, 9])
    lm.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), torch.float32, "cpu")
    drawn = sample(loaded, tok, [prompt] * n, temperature, 1, 1)
    shares = {(x, "length"): p[tok.convert_tokens_to_ids(x)] for x in toy.LETTERS if tok.convert_tokens_to_ids(x) != 9} | {("", "stop"): p[2] + p[9]}
    assert shares["", "stop"] > 0.01
    for answer, q in shares.items():
        assert abs(drawn.count(answer) / n - q) <= 5 * (q * (1 - q) / n) ** 0.5 + 1e-9, answer
    assert sample(loaded, tok, [prompt] * 50, temperature, 4, 1) == sample(loaded, tok, [prompt] * 50, temperature, 4, 1) != \
        sample(loaded, tok, [prompt] * 50, temperature, 4, 2)


def test_a_sampled_answer_comes_back_as_the_ids_it_was_sampled_as():
    """sample -> text -> response_ids gives the sampled ids and their end token: nothing is lost between the phases."""
    tok, lm = toy.tokenizer(), tiny_lm(6)
    lm.lm_head.weight.data[[0, 1, 3, 4, 5, 6]] = 0  # special tokens never lead; the end token may
    lm.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    prompts = [prompt_ids(tok, [{"role": "user", "content": x}]) for x in ("abc", "pop", "b", "feed", "jade", "kim")]
    for prompt, (text, how) in zip(prompts, sample(lm, tok, prompts, 0.0, 6, 1)):
        new = naive_greedy(lm, prompt, 6)
        assert min(new) == 2 or min(new) >= 7
        assert response_ids(tok, text, how == "stop", 6) == (new[:new.index(2) + 1] if 2 in new else new)


# ---------------------------------------------------------------- an outside opinion


def test_the_loss_is_that_of_trl(tmp_path):
    """TRL's DPOTrainer on the same rows, policy and reference: the same log-probs per side, loss and gradient."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    tok, policy, reference = toy.tokenizer(), tiny_lm(1), tiny_lm(1)
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data += 0.05 * torch.randn_like(p)
    texts = [("fed", "def", "fed"), ("hgfedc", "cdefgh", "hg"), ("ba", "ab", "abc"), ("pondm", "p", "dmnop")]
    say = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": say("user", x), "chosen": say("assistant", y), "rejected": say("assistant", z)} for x, y, z in texts]
    args = trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, beta=0.3, use_cpu=True, bf16=False, fp16=False, report_to=[], max_length=None,
                         gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False)
    theirs = copy.deepcopy(policy)
    trainer = trl.DPOTrainer(model=theirs, ref_model=copy.deepcopy(reference), args=args, train_dataset=Dataset.from_list(rows), processing_class=tok)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    pairs = [(prompt_ids(tok, row["prompt"]), response_ids(tok, y, True, 99), response_ids(tok, z, True, 99)) for row, (_, y, z) in zip(rows, texts)]
    ids, mask = stack(pairs)
    logps = Scorer(policy)(ids, mask)
    with torch.no_grad():
        ref_logps = Scorer(reference)(ids, mask)
    mine = preference_losses(preference_margin(logps, ref_logps, 0.3)).mean()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5) and abs(mine.item() - math.log(2)) > 1e-2
    assert model_losses(logps, ref_logps, 0.3).mean().item() == pytest.approx(loss.item(), abs=1e-5)
    mine.backward()
    for p, q in zip(policy.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert batch["input_ids"].tolist() == ids.tolist() and batch["completion_mask"].bool().tolist() == mask.tolist()
