"""Ids, masks, log-probs and sampling, against plain Hugging Face calls on one sequence.

Padding, batch-mates, chunks and micro-batches change nothing.
"""

import copy
import math
import random
from collections import Counter

import pytest
import torch
from test_equations import V, naive_log_softmax, near, random_pairs, run_train, tiny_lm
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import common
import toy
from common import (
    Pair,
    Scorer,
    by_pair,
    collate,
    collate_pairs,
    encode_pairs,
    load_lm,
    load_tokenizer,
    prompt_ids,
    response_ids,
)
from dnpo import implicit_rewards, model_losses, preference_losses

USER = [{"role": "user", "content": "hi a"}]
CHAT = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<' + m['role'] + '>\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>"]
LONG = 99  # a limit that cuts no answer


# ---------------------------------------------------------------- tokenizers of two families


def finish(core: Tokenizer):
    """A chat tokenizer that adds <s> to whatever is not told to go without special tokens."""
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    core.add_special_tokens(SPECIAL)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )
    tok.chat_template = CHAT
    return tok


def bpe(letters: list[str], merges: list[tuple[str, str]], **more) -> Tokenizer:
    """A BPE tokenizer of these letters, each once, and of what the merges make of them."""
    merged = [left + right for left, right in merges]
    words = dict.fromkeys([*SPECIAL, *letters, *merged])
    vocabulary = {word: i for i, word in enumerate(words)}
    return Tokenizer(models.BPE(vocabulary, merges, **more))


def sentencepiece():
    """As Llama 2's and Mistral's: every text is given a space in front."""
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    core = bpe(letters, [("h", "i"), ("▁", "hi"), ("▁", "a")], unk_token="<unk>")
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(space)
    no_space = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(no_space)
    return finish(core)


def bytes_bpe():
    """As Llama 3's: byte level, with a token for two newlines in a row."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = bpe(letters, [("Ċ", "Ċ"), ("h", "i"), ("Ġ", "a")])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return finish(core)


TOKENIZERS = {"toy": toy.tokenizer, "sentencepiece": sentencepiece, "bytes": bytes_bpe}


# ---------------------------------------------------------------- what a chat template does

EACH = "{% for m in messages %}"
CHATML = (
    EACH + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INSTRUCTION = EACH + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
# name: template, its special tokens beside </s>, which of them ends a turn
TEMPLATES = {
    "chatml, also the tokenizer's end": (CHATML, "<|im_start|> <|im_end|>", "<|im_end|>"),
    "llama 3": (
        EACH + "{{ '<|h|>' + m['role'] + '<|/h|>\\n' + m['content'] | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n' }}{% endif %}",
        "<|h|> <|/h|> <|eot|>",
        "<|eot|>",
    ),
    "zephyr": (
        EACH + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "",
        "</s>",
    ),
    "deepseek: a special token right before the answer": (
        EACH + "{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}"
        "{% else %}{{ '<A>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A>' }}{% endif %}",
        "<U> <A>",
        "</s>",
    ),
    "phi: the tokenizer's end after the turn's": (
        EACH + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        "<|user|> <|assistant|> <|end|>",
        "<|end|>",
    ),
    "llama 2: blanks around the answer": (
        INSTRUCTION + "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        "",
        "</s>",
    ),
    "mistral: a blank before the answer": (
        INSTRUCTION + "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "",
        "</s>",
    ),
    "qwen 3: an empty thought before the answer": (
        EACH + "{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think>\\n</think>\\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_start|> <|im_end|>",
        "<|im_end|>",
    ),
    "r1: a thought opened at the end of the prompt": (
        EACH + "{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}",
        "<|user|> <|assistant|>",
        "</s>",
    ),
    "gpt-oss: a channel before the answer": (
        EACH + "{{ '<|start|>' + m['role'] }}"
        "{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        "{{ '<|message|>' + m['content'] + '<|return|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|start|> <|channel|> <|message|> <|return|>",
        "<|return|>",
    ),
}
ANSWERS = [
    "hi",
    "hi a",
    "7 of 9",
    "1. one\n\n2. two\n",
    "\U0001f642 yes",
    "\u4e03\u4e2a",
    "</s>",
    "(a) no",
]


def chat_tokenizer(family: str, name: str):
    """A tokenizer of a family, sentencepiece or bytes, with one of TEMPLATES."""
    tok = TOKENIZERS[family]()
    tok.chat_template, special, _ = TEMPLATES[name]
    tok.add_tokens([AddedToken(token, special=True) for token in special.split()], True)
    return tok


@pytest.mark.parametrize("family", ["sentencepiece", "bytes"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_answer_and_end_are_what_the_template_gives_the_whole_conversation(family, name):
    """Token by token, up to the token that ends a turn in the template; the tokenizer's is </s>.

    An answer that spells a special token differs from what the template would make of it.
    """
    tok = chat_tokenizer(family, name)
    end = tok.convert_tokens_to_ids(TEMPLATES[name][2])
    for text in ANSWERS:
        talk = [*USER, {"role": "assistant", "content": text}]
        whole = tok.apply_chat_template(talk, return_dict=False)
        prompt, answer = prompt_ids(tok, USER), response_ids(tok, text, True, LONG)
        assert answer[-1] == end
        assert end not in answer[:-1]
        if text == "</s>" or (text.endswith("\n") and "trim" in tok.chat_template):
            continue
        assert prompt + answer == whole[: len(prompt + answer)]
        assert end not in whole[len(prompt + answer) :] or "phi" in name

        cut = response_ids(tok, text, False, LONG)
        assert cut == answer[: len(cut)]
        assert len(answer) - len(cut) == (2 if "llama 2" in name else 1)


@pytest.mark.parametrize("name", list(TEMPLATES)[:4])
def test_models_that_end_their_turns_as_the_tokenizer_does_have_the_ids_they_had(name):
    """The template's ids of the prompt; the answer's after a newline; the end of sequence."""
    tok = chat_tokenizer("bytes", name)
    tok.eos_token = TEMPLATES[name][2]
    for text in ANSWERS:
        ids = tok("\n" + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert response_ids(tok, text, True, LONG) == [*ids[1:], tok.eos_token_id]
    wanted = tok.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tok, USER) == wanted


def loaded(folder, tok) -> tuple:
    """load_tokenizer() of a folder with this tokenizer."""
    tok.save_pretrained(folder)
    tiny_lm(1).config.save_pretrained(folder)
    return load_tokenizer(str(folder))


NO_END = EACH + "{{ m['role'] + ':\\n' + m['content'] + '\\n' }}{% endfor %}"
NOTES = {
    TEMPLATES["llama 3"][0]: "strips the blanks around an answer",
    TEMPLATES["qwen 3: an empty thought before the answer"][0]: (
        "writes '<think>\\n</think>\\n' between prompt and answer: answers are sampled and trained"
    ),
    TEMPLATES["r1: a thought opened at the end of the prompt"][0]: (
        "ends a prompt with '<think>\\n', which is gone once there is an answer"
    ),
    NO_END + "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}": (
        "no special token ('\\n' follows): '</s>' is trained as the end"
    ),
    "{{ messages[0]['content'] }}": "does not render an assistant's answer",
    "{{ raise_exception('no system turn') }}": "refuses a plain question (no system turn): '</s>'",
    "{{ messages | length }}" + CHATML: "['2', '<', '|', 'i'] where ['1', '<', '|', 'i'] is",
    CHATML + "{{ strftime_now('%d %B') }}": "writes the date: in every run it is 2024-07-26",
}


@pytest.mark.parametrize("template", NOTES)
def test_what_a_template_does_to_answers_is_said_once_when_it_is_loaded(tmp_path, capsys, template):
    """One note on the console, which names the folder; a template that does nothing has none."""
    tok = bytes_bpe()
    tok.chat_template = CHAT
    loaded(tmp_path / "plain", tok)
    assert capsys.readouterr().out == ""

    tok.chat_template = template
    loaded(tmp_path / "it", tok)
    shown = capsys.readouterr().out
    assert f"note: {tmp_path / 'it'}: its chat template " in shown
    assert NOTES[template] in shown
    load_tokenizer(str(tmp_path / "it"))
    assert capsys.readouterr().out == ""


def test_a_template_that_renders_nothing_of_plain_text_is_refused(tmp_path, capsys):
    """One that wants its content in parts would train without a prompt: one line, exit code 2."""
    tok = bytes_bpe()
    tok.chat_template = EACH + (
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(SystemExit) as end:
        loaded(tmp_path, tok)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert "renders nothing of a prompt that is plain text" in line
    assert line.count("\n") == 1


def test_a_template_with_todays_date_gives_the_same_ids_on_every_day(tmp_path):
    """It writes 26 Jul 2024 in every run, and the saved template is still the model's own."""
    tok = bytes_bpe()
    tok.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') }}\n" + CHATML
    tok, _ = loaded(tmp_path, tok)
    assert tok.decode(prompt_ids(tok, USER)).startswith("Today: 26 Jul 2024\n<|im_start|>user")
    assert "strftime_now" in tok.chat_template


# ---------------------------------------------------------------- ids and masks


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "prompt",
    [
        USER,
        [
            {"role": "system", "content": "a"},
            *USER,
            {"role": "assistant", "content": "hi"},
            *USER,
        ],
    ],
)
def test_prompt_ids_are_the_templates_text_tokenised_once(name, prompt):
    """Ids of the rendered template with the assistant's header, one <s> and nothing else added."""
    tok = TOKENIZERS[name]()
    text = tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text.rstrip("\n").endswith(("<assistant>", "<|assistant|>"))
    ids = prompt_ids(tok, prompt)
    assert ids == tok(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tok.bos_token_id) == 1
    assert ids[0] == tok.bos_token_id


@pytest.mark.parametrize(
    "ended, limit, cut, eos",
    [
        (True, 9, 4, True),
        (False, 9, 4, False),
        (True, 5, 4, True),
        (True, 4, 4, False),
        (True, 3, 3, False),
        (False, 3, 3, False),
        (True, 1, 1, False),
    ],
)
def test_an_answer_has_an_end_token_only_if_it_ended_and_was_not_cut(ended, limit, cut, eos):
    """At most `limit` ids; the end token is one of them only if all of the answer is, and ended."""
    tok = toy.tokenizer()
    wanted = tok.convert_tokens_to_ids(list("abcd")[:cut])
    if eos:
        wanted.append(tok.eos_token_id)
    assert response_ids(tok, "abcd", ended, limit) == wanted


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_an_answers_text_stay_text(name):
    """A text that spells the end token has more than one id for it, and none is special."""
    tok = TOKENIZERS[name]()
    for text in (f"a{tok.eos_token}a", tok.bos_token, tok.eos_token):
        ids = response_ids(tok, text, False, LONG)
        assert len(ids) >= len(text) - 1
        assert not {tok.eos_token_id, tok.bos_token_id} & set(ids)
        assert response_ids(tok, text, True, LONG) == [*ids, tok.eos_token_id]


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
@pytest.mark.parametrize(
    "text", ["hi", "hi a", "a", " hi", "hi\n", "hi\n\na", "\nhi", "\n\nhi", "\n"]
)
def test_answer_ids_are_those_of_the_text_after_the_assistants_header(name, text):
    """The ids decode to the text; no token is for a space that is not there, and none is lost."""
    tok = TOKENIZERS[name]()
    ids = response_ids(tok, text, False, LONG)
    joined = "".join(tok.convert_ids_to_tokens(ids))
    if name == "sentencepiece":
        assert joined.replace("▁", " ") == text
    else:
        assert joined.replace("Ġ", " ").replace("Ċ", "\n") == text

    merges_with_header = name == "bytes" and text.startswith("\n")
    if not merges_with_header:
        header = tok.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        whole = tok(header + text, add_special_tokens=False)["input_ids"]
        assert prompt_ids(tok, USER) + ids == whole


def test_a_sentencepiece_answer_has_no_extra_space_and_a_byte_level_one_keeps_its_newline():
    """The known cases by their tokens: "hi" is not "▁hi"; "\\n" doesn't merge with the header's."""

    def tokens(tok, text, ended):
        return tok.convert_ids_to_tokens(response_ids(tok, text, ended, 9))

    spaces = sentencepiece()
    assert spaces.tokenize("hi") == ["▁hi"]
    assert tokens(spaces, "hi", True) == ["hi", "</s>"]
    assert tokens(spaces, " hi a", False) == ["▁hi", "▁a"]

    newlines = bytes_bpe()
    assert newlines.tokenize("\n\nhi") == ["ĊĊ", "hi"]
    assert tokens(newlines, "\nhi", True) == ["Ċ", "hi", "</s>"]


def test_a_human_and_a_generated_copy_of_a_text_have_the_same_ids():
    """Text in, ids out, whoever wrote it: two copies that ended are identical and left out.

    If one was cut they differ by the end token.
    """
    tok, cut = toy.tokenizer(), {"chosen_ended": True, "rejected_ended": False}
    rows = []
    for prompt, chosen, rejected, meta in (
        ("ba", "abc", "abc", {}),
        ("ba", "abc", "abc", cut),
        ("ba", "abcdefg", "abcdefh", {}),
        ("ba", "abc", "", cut),
        ("ba", "", "ab", {}),
        ("a" * 9, "ab", "ba", {"chosen_ended": False}),
        ("a" * 10, "ab", "ba", {}),
    ):
        row = {"id": chosen + rejected, "chosen": chosen, "rejected": rejected, "meta": meta}
        row["prompt"] = [{"role": "user", "content": prompt}]
        rows.append(row)
    pairs, dropped = encode_pairs(tok, rows, 12, 6)

    def ids(*tokens):
        return tok.convert_tokens_to_ids(list(tokens))

    def header(text):
        return ids("<bos>", "<|user|>", *text, "<|assistant|>")

    assert pairs == [
        Pair(header("ba"), ids("a", "b", "c", "<eos>"), ids("a", "b", "c"), "abcabc"),
        Pair(header("ba"), ids("<eos>"), ids("a", "b", "<eos>"), "ab"),
        Pair(header("a" * 9), ids("a", "b"), ids("b", "a", "<eos>"), "abba"),
    ]
    assert dropped == {"prompt too long": 1, "identical sides": 2, "empty side": 1}


def test_masks_come_from_lengths_also_where_answers_hold_the_padding_id():
    """Ids: prompt, answer, padding on the right. Mask: True on the answer, whatever its tokens."""
    sequences = [([5, 6, 0], [0, 7, 0]), ([0], [2]), ([3, 0], [0]), ([2, 2], [2, 0, 2, 0])]
    ids, mask = collate(sequences, "cpu")
    assert ids.tolist() == [
        [5, 6, 0, 0, 7, 0],
        [0, 2, 0, 0, 0, 0],
        [3, 0, 0, 0, 0, 0],
        [2, 2, 2, 0, 2, 0],
    ]
    no, yes = False, True
    assert mask.tolist() == [
        [no, no, no, yes, yes, yes],
        [no, yes, no, no, no, no],
        [no, no, yes, no, no, no],
        [no, no, yes, yes, yes, yes],
    ]


def test_a_pair_is_in_the_rows_i_and_b_plus_i_of_a_batch():
    """All chosen answers come first, then all rejected ones, both after their pair's prompt."""
    pairs = [Pair([5, 6], [7], [8, 9], "a"), Pair([4], [3, 2], [1], "b")]
    ids, mask = collate_pairs(pairs, "cpu")
    assert ids.tolist() == [[5, 6, 7, 0], [4, 3, 2, 0], [5, 6, 8, 9], [4, 1, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert [pair.tokens for pair in pairs] == [5, 4]


def test_by_pair_puts_both_sides_of_a_pair_beside_each_other():
    """[2B] of collate_pairs' sequences becomes [B, 2], chosen and rejected."""
    values = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
    assert by_pair(values).tolist() == [[1, -1], [2, -2], [3, -3]]


# ---------------------------------------------------------------- log-probs


def naive_logps(lm, sequences) -> list[float]:
    """log pi(y|x) of each sequence by itself: float64 logits, and a log-softmax in python."""
    exact = copy.deepcopy(lm).double()
    logps = []
    for prompt, response in sequences:
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([prompt + response])).logits[0].tolist()
        logp = 0.0
        for j, token in enumerate(response):
            before = logits[len(prompt) + j - 1]  # what is read before the token predicts it
            logp += naive_log_softmax(before)[token]
        logps.append(logp)
    return logps


def some_sequences(n: int = 6):
    """Random prompts and answers."""
    return [(pair.prompt, pair.chosen) for pair in random_pairs(n, seed=3)]


@pytest.mark.parametrize("tied", [False, True])
def test_a_score_is_the_sum_of_log_softmax_over_the_answers_tokens(tied):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), the answer's first and last tokens included."""
    lm, sequences = tiny_lm(1, tied), some_sequences()
    logps = Scorer(lm)(*collate(sequences, "cpu"))
    assert logps.dtype == torch.float32
    assert logps.tolist() == near(naive_logps(lm, sequences))


def test_values_are_summed_by_row():
    """Each value goes to its row's sum, in any order of the rows; a row without values is 0."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    sums = common.sum_by_row(values, torch.tensor([2, 0, 2, 0, 3]), 5)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [10, 0, 5, 16, 0]


def scores(lm, ids, mask):
    """Log-probs [S], and the gradients of their sum weighted by 1, 2, 3, ..."""
    logps = Scorer(lm)(ids, mask)
    weights = torch.arange(1, len(logps) + 1)
    grads = torch.autograd.grad((logps * weights).sum(), list(lm.parameters()))
    return logps.detach(), grads


def assert_same(mine, other):
    """Two results of scores()."""
    logps, grads = mine
    other_logps, other_grads = other
    torch.testing.assert_close(logps, other_logps, atol=1e-5, rtol=1e-6)
    for grad, wanted in zip(grads, other_grads, strict=True):
        size = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(grad, wanted, atol=1e-5 * size, rtol=1e-5)


def test_batch_mates_and_padding_do_not_change_a_score():
    """The same log-probs and gradients one by one, and with 7 more columns, whatever is in them."""
    lm, sequences = tiny_lm(1), some_sequences()
    ids, mask = collate(sequences, "cpu")
    together = scores(lm, ids, mask)

    logps, weighted_grads = [], [torch.zeros_like(p) for p in lm.parameters()]
    for k, sequence in enumerate(sequences, 1):
        logp, grads = scores(lm, *collate([sequence], "cpu"))
        logps.append(logp)
        for total, grad in zip(weighted_grads, grads, strict=True):
            total += k * grad
    assert_same((torch.cat(logps), weighted_grads), together)

    for filling in (0, 2, 9):
        wider_ids = torch.cat([ids, torch.full((len(ids), 7), filling)], 1)
        wider_mask = torch.cat([mask, torch.zeros(len(ids), 7, dtype=torch.bool)], 1)
        assert_same(scores(lm, wider_ids, wider_mask), together)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_the_chunk_size_does_not_change_a_score(monkeypatch, chunk):
    """Log-probs and gradients are the same for any CHUNK, of which no more logits are alive."""
    lm, rows = tiny_lm(1), []
    ids, mask = collate(some_sequences(), "cpu")
    together = scores(lm, ids, mask)

    def count_rows(module, args, logits):
        rows.append(len(logits))

    lm.lm_head.register_forward_hook(count_rows)
    monkeypatch.setattr(common, "CHUNK", chunk)
    assert_same(scores(lm, ids, mask), together)
    assert mask.sum() > 10
    assert max(rows) <= chunk


def test_rows_of_equal_length_and_a_single_token_answer_are_scored_too():
    """Edges: one token of prompt, one of answer, no padding at all."""
    lm, sequences = tiny_lm(2), [([4], [7]), ([7], [4])]
    logps = Scorer(lm)(*collate(sequences, "cpu"))
    assert logps.tolist() == near(naive_logps(lm, sequences))


# ---------------------------------------------------------------- what a step reports


def test_the_metrics_of_a_pair_are_named_as_in_trl():
    """Loss, both rewards, their margin, whether it is above 0, and both log-probs: [B] each."""
    losses, chosen, rejected = torch.tensor([[0.5, 0.7, 0.9], [1.0, 2.0, 3.0], [0.5, 2.0, 4.0]])
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    metrics = common.preference_metrics(losses, chosen, rejected, logps)
    wanted = {
        "loss": [0.5, 0.7, 0.9],
        "rewards/chosen": [1, 2, 3],
        "rewards/rejected": [0.5, 2, 4],
        "rewards/margins": [0.5, 0, -1],
        "rewards/accuracies": [1, 0, 0],  # a tie is not right
        "rewards/size": [1, 2, 3],
        "logps/chosen": [-1, -3, -5],
        "logps/rejected": [-2, -4, -6],
    }
    assert list(metrics) == list(wanted)
    for name, values in wanted.items():
        assert metrics[name].tolist() == near(values), name


def test_a_steps_metrics_are_means_over_its_pairs_however_they_are_cut():
    """Each is sum_i weight_i value_i / pairs: a filler counts for nothing, and no graph is kept."""
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    sums = {}
    common.add_weighted(sums, {"loss": values[:2]}, torch.tensor([1.0, 1.0]), 3)
    filled = values[[2, 0]]  # its second pair is a filler
    common.add_weighted(sums, {"loss": filled, "more": 2 * filled}, torch.tensor([1.0, 0.0]), 3)
    assert sums["loss"].item() == near((1 + 2 + 6) / 3)
    assert sums["more"].item() == near(12 / 3)
    assert not any(total.requires_grad for total in sums.values())


def numbers(line: dict) -> dict:
    """A line of metrics without what a clock or the machine decides."""
    clocks = ("memory_gib", "pairs_per_second")
    return {name: value for name, value in line.items() if name not in clocks}


@pytest.mark.parametrize("update", ["joint", "offset", "alternating"])
def test_micro_batching_does_not_change_training(monkeypatch, tmp_path, update):
    """Gradients, metrics and checkpoint of 11 pairs in steps of 8 and 3 are those of whole batches.

    The micro-batches have 2 pairs and 1 pair; noise and clipping are on.
    """
    runs = {}
    for micro in (8, 2, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        metrics, log = run_train(
            monkeypatch,
            folder,
            random_pairs(11),
            batch=8,
            micro_batch=micro,
            noise_update=update,
            clip=1.5,
            lr=0.05,
            noise_lr=1.0,
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "iter3" / "checkpoint")
        runs[micro] = metrics, log, list(model.parameters())

    # the model moves, and clipping works
    metrics, log, saved = runs[8]
    assert len(metrics) == 2
    assert any(line["grad_norm"] > 3 for line in metrics)
    moved = [(p - q).abs().max() for p, q in zip(saved, tiny_lm(1).parameters())]
    assert max(moved) > 1e-2
    for _, _, grads in log:
        assert sum(grad.square().sum() for grad in grads) <= 1.5**2 + 1e-3

    for micro in (2, 1):
        other_metrics, other_log, other_saved = runs[micro]
        for (_, _, grads), (_, _, other_grads) in zip(log, other_log, strict=True):
            for a, b in zip(grads, other_grads, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for a, b in zip(saved, other_saved, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        for line, other in zip(metrics, other_metrics, strict=True):
            assert numbers(line) == near(numbers(other), abs=2e-5)


# ---------------------------------------------------------------- sampling


def naive_greedy(lm, prompt: list[int], n: int) -> list[int]:
    """The n most probable tokens after a prompt, one forward pass for each."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


FIRST_LETTER = 7  # of the toy tokenizer's ids; those below are special tokens


def sampled(*how) -> list[tuple[str, str]]:
    """Text and finish of common.sample's answers."""
    return [answer[:2] for answer in common.sample(*how)]


def naive_answer(tok, tokens: list[int], ends: set[int]) -> tuple[str, str]:
    """The letters up to the first end token, and whether there was one."""
    text = ""
    for token in tokens:
        if token in ends:
            return text, "stop"
        if token >= FIRST_LETTER and token != tok.eos_token_id:
            text += tok.convert_ids_to_tokens(token)
    return text, "length"


def test_a_prompt_with_several_answers_is_read_once(monkeypatch):
    """All its tokens but the last, for all answers; each answer is drawn as if it were not so."""
    lm, tok = tiny_lm(6), toy.tokenizer()
    prompts = [[1, 7, 8, 9, 10], [1, 7, 8, 9, 10], [1, 9], [1, 7, 8, 9, 10], [1, 9]]
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["input_ids"].tolist())

    hook = common.backbone(lm).register_forward_pre_hook(note, with_kwargs=True)
    shared = common.sample(lm, tok, prompts, 1.0, 6, 0)
    assert read[0] == [[1, 7, 8, 9], [0, 0, 0, 1]]
    assert read[1] == [[10], [10], [9], [10], [9]]
    hook.remove()

    monkeypatch.setattr(common, "shared_cache", lambda *_: None)
    assert shared == common.sample(lm, tok, prompts, 1.0, 6, 0)
    assert len(set(shared)) > 2


def test_greedy_answers_are_the_models_argmax_alone_and_in_a_batch():
    """At temperature 0: the most probable token each time; padding changes nothing.

    An answer goes up to the first end token, the tokenizer's or one of the checkpoint's ("stop"),
    or to the limit ("length").
    """
    lm, rng, finishes = tiny_lm(6), random.Random(0), set()
    lengths = (3, 9, 1, 5, 7, 4, 12, 2)
    prompts = [[rng.randrange(V) for _ in range(length)] for length in lengths]
    tokens = [naive_greedy(lm, prompt, 8) for prompt in prompts]

    def answers_with(letter):
        return sum(letter in new for new in tokens)

    letters = {token for new in tokens for token in new if token >= FIRST_LETTER}
    usual = sorted(sorted(letters), key=answers_with, reverse=True)  # the commonest first
    for eos, ends in (
        (2, None),
        (2, usual[0]),
        (usual[0], 2),
        (usual[0], None),
        (2, usual[1:3]),
        (usual[1], [usual[2], usual[3]]),
    ):
        tok = toy.tokenizer()
        tok.eos_token = tok.convert_ids_to_tokens(eos)
        lm.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
        all_ends = {eos, *ends} if isinstance(ends, list) else {eos, ends}
        wanted = [naive_answer(tok, new, all_ends) for new in tokens]

        assert sampled(lm, tok, prompts, 0.0, 8, 1) == wanted
        alone = [sampled(lm, tok, [prompt], 0.0, 8, 1)[0] for prompt in prompts]
        assert alone == wanted
        finishes.update((how, bool(text)) for text, how in wanted)
    assert finishes >= {("stop", True), ("stop", False), ("length", True)}
    assert len({text for text, _ in wanted}) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_the_models_own_distribution(tmp_path, temperature):
    """Frequencies of 6000 samples are softmax(z / temperature) within 5 standard errors.

    Of the checkpoint's generation_config only the end tokens count.
    """
    lm, tok, prompt, n = tiny_lm(1), toy.tokenizer(), [4, 9, 3], 6000
    logits = lm(input_ids=torch.tensor([prompt])).logits[0, -1].tolist()
    logps = naive_log_softmax([z / temperature for z in logits])
    p = [math.exp(logp) for logp in logps]
    shares = {("", "stop"): p[2] + p[9]}
    for letter in toy.LETTERS:
        token = tok.convert_tokens_to_ids(letter)
        if token != 9:
            shares[letter, "length"] = p[token]
    assert shares["", "stop"] > 0.01

    lm.generation_config = GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.5,
        temperature=3.0,
        repetition_penalty=2.0,
        min_new_tokens=5,
        eos_token_id=[2, 9],
    )
    lm.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), torch.float32, "cpu")

    drawn = sampled(loaded, tok, [prompt] * n, temperature, 1, 1)
    for answer, share in shares.items():
        error = math.sqrt(share * (1 - share) / n)
        assert abs(drawn.count(answer) / n - share) <= 5 * error + 1e-9, answer

    first = sampled(loaded, tok, [prompt] * 50, temperature, 4, 1)
    again = sampled(loaded, tok, [prompt] * 50, temperature, 4, 1)
    other_seed = sampled(loaded, tok, [prompt] * 50, temperature, 4, 2)
    assert first == again != other_seed


def test_a_sampled_answer_comes_back_as_the_ids_it_was_sampled_as():
    """From ids to text and back by response_ids nothing is lost, the end token included."""
    tok, lm = toy.tokenizer(), tiny_lm(6)
    lm.lm_head.weight.data[[0, 1, 3, 4, 5, 6]] = 0  # special tokens never lead; the end token may
    lm.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    texts = ("abc", "pop", "b", "feed", "jade", "kim")
    prompts = [prompt_ids(tok, [{"role": "user", "content": text}]) for text in texts]
    answers = sampled(lm, tok, prompts, 0.0, 6, 1)
    for prompt, (text, how) in zip(prompts, answers, strict=True):
        new = naive_greedy(lm, prompt, 6)
        assert min(new) == 2 or min(new) >= FIRST_LETTER
        if 2 in new:
            new = new[: new.index(2) + 1]
        assert response_ids(tok, text, how == "stop", 6) == new


@pytest.mark.parametrize("ends", [None, 22, [22, 21]])
def test_sampling_stops_where_the_template_ends_a_turn(ends):
    """... whatever the tokenizer and the checkpoint (ends) say; their end tokens stop it too."""
    lm, tok = tiny_lm(6), toy.tokenizer()
    tok.chat_template = toy.CHAT_TEMPLATE.replace("eos_token", "'<eos>'")
    lm.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    prompts = [[7 + i, 8, 9 + i] for i in range(8)]
    tokens = [naive_greedy(lm, prompt, 12) for prompt in prompts]
    said = Counter(token for new in tokens for token in set(new) if token >= FIRST_LETTER)
    eos, _ = said.most_common(1)[0]
    tok.eos_token = tok.convert_ids_to_tokens(eos)

    stops = {2, eos, *(ends if isinstance(ends, list) else [ends])}
    wanted = [naive_answer(tok, new, stops) for new in tokens]
    assert sampled(lm, tok, prompts, 0.0, 12, 1) == wanted
    for removed in (2, eos):
        assert wanted != [naive_answer(tok, new, stops - {removed}) for new in tokens]
    assert response_ids(tok, "abc", True, 9) == [7, 8, 9, 2]


def forced(ids: list[int]):
    """A tiny model that samples these ids, whatever it is asked."""
    lm = tiny_lm(1)

    def generate(input_ids, **how):
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)

    lm.generate = generate
    return lm


def test_an_answer_is_trained_as_the_tokens_that_were_sampled(tmp_path):
    """Where its text has other tokens, the sampled ones stand beside it, from the file to the pair.

    They are not taken for a text that was edited, nor by another tokenizer, and are not kept where
    the text gives them anyway or does not spell them.
    """
    tok = bytes_bpe()
    h, i, newline, two, end = tok.convert_tokens_to_ids(["h", "i", "Ċ", "ĊĊ", "</s>"])
    (hi,) = tok("hi", add_special_tokens=False)["input_ids"]
    for ids, text, kept in (
        ([h, i, newline], "hi\n", [h, i, newline]),
        ([hi, newline, newline], "hi\n\n", [hi, newline, newline]),
        ([hi, two], "hi\n\n", None),
        ([h, tok.bos_token_id, i], "hi", None),
        ([], "", None),
    ):
        (answer,) = common.sample(forced([*ids, end, i]), tok, [[1]], 1.0, 9, 0)
        assert answer == (text, "stop", kept)
        row = common.answer_row({"id": "r", "prompt": USER}, 0, answer)
        assert row["meta"].get("sampled_ids") == ([kept] if kept else None)

    meta = {"sampled_ids": [[h, i, newline], [h, i]]}
    row = {"id": "r", "prompt": USER, "chosen": "hi a", "rejected": "hi", "meta": meta}
    [pair], _ = encode_pairs(tok, [row], LONG, LONG)
    assert pair.rejected == [h, i, end]
    assert pair.chosen == response_ids(tok, "hi a", True, LONG)
    other = sentencepiece()
    [pair], _ = encode_pairs(other, [row], LONG, LONG)
    assert pair.rejected == response_ids(other, "hi", True, LONG)
    assert response_ids(tok, "hi", True, 2, [[h, i]]) == [h, i]

    row["chosen"] = "hi\n"
    [pair], _ = encode_pairs(tok, [row], LONG, LONG)
    assert (pair.chosen, pair.rejected) == ([h, i, newline, end], [h, i, end])
    row["chosen"], row["meta"] = "hi", {"sampled_ids": [[h, i]]}
    assert encode_pairs(tok, [row], LONG, LONG) == ([], {"identical sides": 1})


def test_an_answer_cut_inside_a_character_loses_the_characters_beginning():
    """Up to three bytes of a character are no text; an answer that ended keeps what it said."""
    tok = bytes_bpe()
    smile = tok("hi \U0001f642", add_special_tokens=False)["input_ids"]
    assert len(smile) == 6
    for ids in (smile[:3], smile[:4], smile[:5]):
        assert common.sample(forced(ids), tok, [[1]], 1.0, 9, 0) == [("hi ", "length", None)]
    (whole,) = common.sample(forced(smile), tok, [[1]], 1.0, 9, 0)
    assert whole == ("hi \U0001f642", "length", None)
    ended = [*smile[:4], tok.eos_token_id]
    (answer,) = common.sample(forced(ended), tok, [[1]], 1.0, 9, 0)
    assert answer == ("hi \ufffd", "stop", smile[:4])


def test_of_an_answer_in_channels_the_final_part_is_taken():
    """What precedes the template's header of an answer is a thought; without one nothing is left.

    The header's special tokens would vanish from the text, and their names stay in it.
    """
    tok = chat_tokenizer("bytes", "gpt-oss: a channel before the answer")
    assert tok.decode(prompt_ids(tok, USER)).endswith(
        "<|start|>assistant<|channel|>final<|message|>"
    )
    thought = "<|channel|>analysis<|message|>hm<|start|>assistant"
    for text, wanted in (
        ("hi", "hi"),
        (f"{thought}<|channel|>final<|message|>hi", "hi"),
        (f"hi{thought}<|channel|>final<|message|>a", "a"),
        (thought, ""),
    ):
        ids = tok(text + "<|return|>", add_special_tokens=False)["input_ids"]
        assert sampled(forced(ids), tok, [[1]], 1.0, 9, 0) == [(wanted, "stop")]


def test_most_answers_cut_is_worth_a_warning(tmp_path, capsys):
    """More than half of a file's answers: a line on stderr says how many, at which limit."""
    rows = [{"meta": {"finish": finish}} for finish in ("length", "stop", "length", "length")]
    common.warn_of_cut(tmp_path / "answers.jsonl", rows[:2], 7)
    assert capsys.readouterr().err == ""
    common.warn_of_cut(tmp_path / "answers.jsonl", rows, 7)
    line = capsys.readouterr().err
    assert "answers.jsonl: 3 of 4 answers were cut at 7 tokens" in line


# ---------------------------------------------------------------- an outside opinion


def say(role: str, text: str) -> list[dict]:
    """One message."""
    return [{"role": role, "content": text}]


def step_of_trl(trl, policy, reference, rows: list[dict], folder):
    """DPOTrainer's batch of these rows and its loss, of which policy has the gradient: beta 0.3."""
    from datasets import Dataset

    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(rows),
            beta=0.3,
            use_cpu=True,
            bf16=False,
            fp16=False,
            report_to=[],
            max_length=None,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=toy.tokenizer(),
    )
    examples = [trainer.train_dataset[i] for i in range(len(rows))]
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    return batch, loss.item()


def test_the_loss_is_that_of_trl(tmp_path):
    """TRL's DPOTrainer on the same rows and models has the same ids, loss and gradient."""
    trl = pytest.importorskip("trl")
    tok, policy, reference = toy.tokenizer(), tiny_lm(1), tiny_lm(1)
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data += 0.05 * torch.randn_like(p)
    rows, pairs = [], []
    for prompt, chosen, rejected in (
        ("fed", "def", "fed"),
        ("hgfedc", "cdefgh", "hg"),
        ("ba", "ab", "abc"),
        ("pondm", "p", "dmnop"),
    ):
        row = {
            "prompt": say("user", prompt),
            "chosen": say("assistant", chosen),
            "rejected": say("assistant", rejected),
        }
        rows.append(row)
        chosen_ids = response_ids(tok, chosen, True, LONG)
        rejected_ids = response_ids(tok, rejected, True, LONG)
        pairs.append(Pair(prompt_ids(tok, row["prompt"]), chosen_ids, rejected_ids, prompt))

    # 1. theirs
    theirs = copy.deepcopy(policy)
    batch, loss = step_of_trl(trl, theirs, copy.deepcopy(reference), rows, tmp_path)

    # 2. ours
    ids, mask = collate_pairs(pairs, "cpu")
    logps = by_pair(Scorer(policy)(ids, mask))
    with torch.no_grad():
        ref_logps = by_pair(Scorer(reference)(ids, mask))
    chosen_reward, rejected_reward = implicit_rewards(logps, ref_logps, 0.3)
    mine = preference_losses(chosen_reward - rejected_reward).mean()
    mine.backward()

    # 3. they are the same
    assert mine.item() == pytest.approx(loss, abs=1e-5)
    assert abs(mine.item() - math.log(2)) > 1e-2
    assert model_losses(logps, ref_logps, 0.3).mean().item() == pytest.approx(loss, abs=1e-5)
    for p, q in zip(policy.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert batch["input_ids"].tolist() == ids.tolist()
    assert batch["completion_mask"].bool().tolist() == mask.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_draw_nothing(temperature):
    """Greedy sampling would take some token without a word."""
    tok = toy.tokenizer()
    lm = toy.new_model(tok, 16, 1, 0)
    lm.name_or_path = "MODEL"
    with torch.no_grad():
        lm.model.norm.weight.fill_(math.nan)
    with pytest.raises(SystemExit, match="^error: MODEL: its logits are not numbers"):
        common.sample(lm, tok, [[1, 7, 8]], temperature, 4, seed=0)
