"""What dnpo.py, tso.py and sams.py share because it has one right answer.

    prompt -> ids -> masks -> log-probs     prompt_ids, response_ids, encode_pairs, collate, Scorer
    what a chat template does               Turn, turn_of
    models that are folders, and samples    Model, load_lm, sample, generate, held_out
    judges and their prompts                make_judge, Judge.score, Judge.compare

Nothing here knows which method calls it.

Shapes: S sequences of T tokens, of which collate_pairs makes 2B of B pairs, all chosen ones first;
N response tokens, V vocabulary, D width. Log-probs are natural (nats) and fp32.

Text is the interface between phases, so that a model with another tokenizer can join, and both
sides of a pair are tokenised by the same function. Only where a sampled answer's text would give
other tokens than those that were sampled, these stand beside it (meta.sampled_ids).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import job

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Logits [CHUNK, V] exist for this many response tokens at a time. A larger value needs more memory,
# a smaller one makes the head slower.
CHUNK = 512

# ------------------------------------------------------------------------- prompt -> ids -> masks


def load_tokenizer(path: str):
    """Returns (tokenizer, config) of a model folder or Hub id, before any weights are read.

    Ends the program where the model can't be used for chat. Any causal decoder of transformers with
    attention can be sampled from; which can be trained is what check_model and Scorer.check say.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are enough
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        job.die(f"{path}: not a model (no config.json)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as fault:
        reason = job.first_line(fault)
        job.die(f"{path}: neither a model folder nor a Hub model that can be loaded ({reason})")

    if config.is_encoder_decoder:
        job.die(f"{path}: an encoder-decoder ({config.model_type}), not a causal decoder")
    if tok.chat_template is None:
        job.die(
            f"{path}: its tokenizer has no chat template; "
            "save one with it (chat_template.jinja beside tokenizer.json)"
        )
    if tok.eos_token_id is None:
        job.die(f"{path}: its tokenizer has no end-of-sequence token")
    text = config.get_text_config(decoder=True)
    if "num_attention_heads" not in {**text.to_dict(), **text.attribute_map}:
        job.die(f"{path}: a model without attention ({config.model_type}) is not supported")
    try:
        notes = turn_of(tok).notes
    except ValueError as fault:
        job.die(f"{path}: {fault}")
    for note in notes:
        job.say_once(f"note: {path}: {note}")
    return tok, config


def check_model(path: str, config, max_prompt: int, max_response: int):
    """Ends the program if a model can't be trained, or not on sequences of these lengths.

    What is wanted is a causal decoder in full precision. Scorer.check looks at the rest when the
    weights are there.
    """
    if getattr(config, "quantization_config", None):
        job.die(f"{path}: its weights are quantised; training needs them in full precision")
    blocks(lm_shapes(path))
    check_context(path, config, max_prompt, max_response)


def check_context(path: str, config, max_prompt: int, max_response: int):
    """Ends the program if sequences of these lengths don't fit a model's context."""
    context = context_of(config)
    if max_prompt + max_response > context:
        job.die(
            f"--max_prompt {max_prompt} + --max_response {max_response} is more than "
            f"{path}'s context of {context} tokens"
        )


def context_of(config) -> int:
    """The most tokens for which a model is one function, whatever else is in a batch.

    That is its context, or the length of its pretraining where rope scaling is dynamic: beyond
    that, rotary frequencies depend on the longest sequence of the batch.
    """
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None) or sys.maxsize
    ropes = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in ropes:
        ropes = {"all": ropes}  # else a dict for each type of layer
    for rope in ropes.values():
        if rope and rope.get("rope_type") in ("dynamic", "longrope"):
            context = min(context, rope.get("original_max_position_embeddings") or context)
    return context


def prompt_ids(tok, prompt: list[dict]) -> list[int]:
    """Ids of the chat template's rendering of the messages, up to where their answer begins.

    Training, sampling and judging all use this function.
    """
    return quoted_ids(tok, prompt, waits=True)


def quoted_ids(tok, messages: list[dict], waits: bool) -> list[int]:
    """Ids of the chat template's rendering, in which the messages can't speak for the template.

    The name of a special token in a message stays text: before the rendering it is exchanged for
    a private character, and behind it for the ids of its letters. waits: for an answer.

    Ends the program where the template refuses the messages, or leaves one of them out.
    """
    names = [str(token) for token in tok.added_tokens_decoder.values() if token.special]
    private = {name: chr(0xF0000 + i) for i, name in enumerate(names) if name}
    longest_first = sorted(private, key=len, reverse=True)
    quoted = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    marked = []
    for message in messages:
        content = quoted.sub(lambda name: private[name[0]], message["content"])
        marked.append({**message, "content": content})
    text = rendered(tok, marked, waits)

    named = {character: name for name, character in private.items()}
    ids = []
    for piece in re.split("([\U000f0000-\U000fffff])", text):
        if piece in named:
            ids += text_ids(tok, named[piece])
        elif piece:
            ids += tok(piece, add_special_tokens=False)["input_ids"]
    return ids


def rendered(tok, messages: list[dict], waits: bool) -> str:
    """The chat template's text of the messages, with what stands before their answer if it waits.

    What an answer of the assistant's loses, a thought for example, is the template's affair; a turn
    of the user's or of the system's must be there.
    """
    roles = [message["role"] for message in messages]
    which = f"a prompt of {roles} that ends in {messages[-1]['content'][-60:]!r}"
    try:
        if waits and turn_of(tok).opened:
            text, _, _ = around_answer(tok, messages, SAID)
        else:
            text = render(tok, messages, tokenize=False, add_generation_prompt=waits)
    except Exception as fault:  # a template is a program: it can fail with anything
        job.die(f"the chat template refuses {which}: {job.first_line(fault)}")
    for message in messages:
        if message["role"] != "assistant" and message["content"].strip() not in text:
            job.die(
                f"the chat template leaves out the {message['role']} turn of {which}: put its text "
                "into another turn, or use a model that has this role"
            )
    return text


def response_ids(
    tok, text: str, ended: bool, limit: int, sampled: Sequence[list[int]] = ()
) -> list[int]:
    """Ids of a response, at most `limit`.

    The token that ends a turn follows if the response ended by itself and was not cut here.
    sampled: ids that the text may have been decoded from; those that spell it are taken.
    """
    turn = turn_of(tok)
    ids = answer_ids(tok, turn, text, ended)
    for others in sampled:
        if spelled(tok, turn, others) == text:
            ids = others
    if ended and len(ids) < limit:
        return [*ids, turn.end]
    return ids[:limit]


def answer_ids(tok, turn: Turn, text: str, ended: bool) -> list[int]:
    """Ids of an answer's text, with the blanks that the template writes around it.

    SentencePiece tokenizers put a space before a text that stands alone, but not after a newline,
    where most chat templates put an answer. So it is tokenised after turn.anchor.
    """
    text = turn.lead + text + (turn.tail if ended else "")
    anchor = text_ids(tok, turn.anchor)
    whole = text_ids(tok, turn.anchor + text)
    if whole[: len(anchor)] == anchor:
        return whole[len(anchor) :]
    return text_ids(tok, text)


def spelled(tok, turn: Turn, ids: list[int], skip_special_tokens: bool = False) -> str:
    """The text of an answer's ids, without the blanks that the template writes around it."""
    text = tok.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text.removeprefix(turn.lead).removesuffix(turn.tail)


def text_ids(tok, text: str) -> list[int]:
    """Ids of a text in which the name of a special token stays text."""
    return tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# ------------------------------------------------------------------------- what a template does

# Templates that write today's date write this one, so that a run has the same ids on every day.
DAY = datetime.date(2024, 7, 26)
CALL_FOR_DATE = re.compile(r"""strftime_now\(\s*(['"])(?P<format>.*?)\1\s*\)""")
ASKED = "Are there many?"  # what the probes ask
SAID = "Yes, 7 of them."
PROBES = (SAID, "7 of them.", "(a) none", "\u4e03\u4e2a", "\U0001f642 yes")  # what they answer


class Turn(NamedTuple):
    """What a chat template puts around an answer, read off conversations that it renders.

    The ids of prompt, answer and end are those that the template gives the whole conversation;
    where they are not, `notes` says so.
    """

    end: int  # the token that ends a turn: the first special one after the answer
    lead: str = ""  # blanks between a prompt and its answer; they belong to the response
    tail: str = ""  # what stands between an answer and its end; it belongs to the response
    anchor: str = "\n"  # the text after which an answer has the template's tokens
    opened: bool = False  # a prompt is what stands before an answer, not the generation prompt
    header: str = ""  # what stands there beyond the generation prompt: a channel, a thought
    notes: tuple[str, ...] = ()  # what a user must know, in whole lines


def turn_of(tok) -> Turn:
    """The Turn of a tokenizer, which is read once. ValueError says why there is none."""
    if "turn" not in vars(tok):
        tok.turn = read_turn(tok)
    return tok.turn


def read_turn(tok) -> Turn:
    """Reads how a tokenizer's chat template puts an answer after a prompt."""
    from jinja2 import TemplateError

    question = [{"role": "user", "content": ASKED}]
    try:
        prompt = render(tok, question, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError) as fault:
        note = (
            f"its chat template refuses a plain question ({fault}): {tok.eos_token!r} ends a turn"
        )
        return Turn(tok.eos_token_id, notes=(note,))
    if ASKED not in prompt:
        raise ValueError("its chat template renders nothing of a prompt that is plain text")

    notes = []
    if CALL_FOR_DATE.search(tok.get_chat_template()):
        notes.append(f"its chat template writes the date: in every run it is {DAY}")
    eos = tok.eos_token
    try:
        before, answer, after = around_answer(tok, question, SAID)
    except (TemplateError, TypeError):
        answer = ""
    if not answer:
        notes.append(
            "its chat template does not render an assistant's answer as it is: "
            f"an answer is trained right after the prompt, with {eos!r} at its end"
        )
        return Turn(tok.eos_token_id, notes=tuple(notes))

    end, tail = end_of_turn(tok, after)
    if end is None:
        end, tail = tok.eos_token_id, ""
        notes.append(
            f"its chat template ends an answer with no special token ({after!r} follows): "
            f"{eos!r} is trained as the end"
        )
    turn = Turn(end, tail=tail)
    turn = with_prompt(turn, prompt, before, notes)
    turn = with_anchor(tok, turn, question, notes)

    if not around_answer(tok, question, f" {SAID} ")[1] and not tail:
        notes.append(
            "its chat template strips the blanks around an answer: "
            "here they are trained where there are any"
        )
    return turn._replace(notes=tuple(notes))


def render(tok, messages: list[dict], **how):
    """The chat template's rendering, on DAY: ids, or with tokenize=False the text."""
    template = CALL_FOR_DATE.sub(written_date, tok.get_chat_template())
    return tok.apply_chat_template(messages, chat_template=template, return_dict=False, **how)


def written_date(call: re.Match) -> str:
    """DAY as a template writes it, in the place of its call for today's date."""
    return repr(DAY.strftime(call["format"]))


def around_answer(tok, prompt: list[dict], answer: str) -> tuple[str, str, str]:
    """The rendering of a prompt with an answer, as the texts before it, of it and after it.

    The first two are empty if the answer is not there as it is.
    """
    talk = [*prompt, {"role": "assistant", "content": answer}]
    return render(tok, talk, tokenize=False).rpartition(answer)


def end_of_turn(tok, after: str) -> tuple[int | None, str]:
    """The first special token of what follows an answer, and the text before it."""
    names = {i: token.content for i, token in tok.added_tokens_decoder.items()}
    for token in tok(after, add_special_tokens=False)["input_ids"]:
        name = names.get(token, " ")
        if not name.isspace():  # some vocabularies have added tokens for blanks
            return token, after.partition(name)[0]
    return None, ""


def with_prompt(turn: Turn, prompt: str, before: str, notes: list[str]) -> Turn:
    """The turn with what lies between the generation prompt and an answer.

    prompt: the rendering that waits for an answer. before: the one that has got one, up to it.
    """
    if before == prompt:
        return turn

    more = before.removeprefix(prompt)
    if before.startswith(prompt) and more.isspace():
        return turn._replace(lead=more)
    if before.startswith(prompt):
        notes.append(
            f"its chat template writes {more!r} between prompt and answer: "
            "answers are sampled and trained after it, without a thought of the model's before them"
        )
        return turn._replace(opened=True, header=more)
    if prompt.startswith(before):
        notes.append(
            f"its chat template ends a prompt with {prompt.removeprefix(before)!r}, which is gone "
            "once there is an answer: answers are sampled and trained without it"
        )
        return turn._replace(opened=True)
    return turn


def with_anchor(tok, turn: Turn, question: list[dict], notes: list[str]) -> Turn:
    """The turn with the first anchor that gives the probe answers the template's tokens."""
    before, _, _ = around_answer(tok, question, SAID)
    names = [re.escape(token.content) for token in tok.added_tokens_decoder.values()]
    same_stretch = re.split("|".join(names), before)[-1] if names else before
    for anchor in ("\n", same_stretch, ""):
        anchored = turn._replace(anchor=anchor)
        differences = [difference(tok, anchored, question, said) for said in PROBES]
        if not any(differences):
            return anchored

    first = [difference(tok, turn, question, said) for said in PROBES]
    theirs, ours = next(found for found in first if found)
    notes.append(
        "its chat template gives a whole conversation other tokens than prompt, answer and end: "
        f"{theirs} where {ours} is sampled and trained"
    )
    return turn


def difference(tok, turn: Turn, question: list[dict], said: str) -> tuple[list, list] | None:
    """Where the template's ids of a conversation differ from ours: its tokens and ours there."""
    before, answer, after = around_answer(tok, question, said)
    whole = tok(before + answer + after, add_special_tokens=False)["input_ids"]
    prompt = before
    if not turn.opened:
        prompt = render(tok, question, add_generation_prompt=True, tokenize=False)
    ids = tok(prompt, add_special_tokens=False)["input_ids"]
    ids = [*ids, *answer_ids(tok, turn, said, True)]
    if turn.end in whole[len(ids) :]:
        ids.append(turn.end)
    for place, token in enumerate(ids):
        if whole[place : place + 1] != [token]:
            theirs, ours = whole[place : place + 4], ids[place : place + 4]
            return tok.convert_ids_to_tokens(theirs), tok.convert_ids_to_tokens(ours)
    return None


# ------------------------------------------------------------------------- rows -> masks


def fitting(tok, rows: list[dict], max_prompt: int) -> list[dict]:
    """The rows whose prompts have at most max_prompt tokens."""
    return [row for row in rows if len(prompt_ids(tok, row["prompt"])) <= max_prompt]


def show_example(tok, row: dict, max_response: int):
    """Prints an annotated row as the model sees it: what has no loss, and what has.

    The token that ends a turn is named, because the answer may be cut before it.
    """
    prompt = prompt_ids(tok, row["prompt"])
    response = response_ids(tok, row["response"], True, max_response)
    indent = " " * len(row["id"])
    print(f"example {row['id']}, no loss: {tok.decode(prompt)!r}")
    print(
        f"{indent}    with loss: {tok.decode(response)!r} ({len(prompt)} + {len(response)} tokens)"
        f", end of a turn: {end_note(tok)}",
        flush=True,
    )


def end_note(tok) -> str:
    """The token that ends a turn, for the header."""
    end = turn_of(tok).end
    return f"{tok.decode([end])!r} ({end})"


class Pair(NamedTuple):
    """A preference pair as token ids, and the id of its row."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    id: str

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of both answers."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def encode_pairs(
    tok, rows: list[dict], max_prompt: int, max_response: int
) -> tuple[list[Pair], Counter]:
    """Turns preference rows into pairs of ids; those that teach nothing are left out and counted.

    meta.chosen_ended or meta.rejected_ended = False says that a side was cut: it gets no token that
    ends it. meta.sampled_ids holds the ids that sides were sampled as, in any order.
    """
    pairs, dropped = [], Counter()
    for row in rows:
        prompt = prompt_ids(tok, row["prompt"])
        chosen = side_ids(tok, row, "chosen", max_response)
        rejected = side_ids(tok, row, "rejected", max_response)

        if len(prompt) > max_prompt:
            dropped["prompt too long"] += 1
        elif not chosen or not rejected:
            dropped["empty side"] += 1
        elif chosen == rejected or same_text(row):
            dropped["identical sides"] += 1
        else:
            pairs.append(Pair(prompt, chosen, rejected, row["id"]))
    return pairs, dropped


def side_ids(tok, row: dict, side: str, max_response: int) -> list[int]:
    """Ids of one side ("chosen" or "rejected") of a preference row."""
    sampled = row["meta"].get("sampled_ids", ())
    return response_ids(tok, row[side], has_ended(row, side), max_response, sampled)


def has_ended(row: dict, side: str) -> bool:
    """Whether a side of a preference row ended by itself, as it did if meta says nothing."""
    return row["meta"].get(f"{side}_ended", True)


def given_answer(row: dict, side: str, score: float | None = None) -> Answer:
    """The answer that a row of the data gives: its "response" or "rejected", cut or whole.

    In a row of a pair the response is the chosen one; in one of generate.py's it is the sample.
    """
    meta = row["meta"]
    if side == "rejected":
        ended = has_ended(row, "rejected")
    else:
        ended = meta.get("chosen_ended", meta.get("finish") != "length")
    return Answer(row[side], ended, score, meta.get("sampled_ids", ()))


def sampled_ids(chosen: Answer, rejected: Answer) -> dict[str, list[list[int]]]:
    """What a preference row's meta says of the ids that its sides were sampled as."""
    ids = [*chosen.sampled_ids, *rejected.sampled_ids]
    return {"sampled_ids": ids} if ids else {}


def same_text(row: dict) -> bool:
    """Whether both sides are one text, perhaps sampled as other tokens."""
    same_end = has_ended(row, "chosen") == has_ended(row, "rejected")
    return row["chosen"] == row["rejected"] and same_end


def collate(sequences: list[tuple[list[int], list[int]]], device) -> tuple[Tensor, Tensor]:
    """Puts S sequences (prompt ids, response ids) into one batch, padded on the right.

    Returns ids [S, T], and a mask [S, T] that is True on the response. The mask comes from lengths,
    never from `!= pad`: pad is often the end-of-sequence token.
    """
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, start:end] = True
    return ids.to(device), mask.to(device)


def collate_pairs(pairs: list[Pair], device) -> tuple[Tensor, Tensor]:
    """Collates B pairs: ids and mask [2B, T], all chosen answers first, then all rejected ones."""
    chosen = [(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [(pair.prompt, pair.rejected) for pair in pairs]
    return collate(chosen + rejected, device)


def by_pair(values: Tensor) -> Tensor:
    """Values of collate_pairs' sequences [2B] as one row per pair, chosen and rejected: [B, 2]."""
    return torch.stack(values.chunk(2), 1)


# ------------------------------------------------------------------------- log-probs


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(z)[y] of each token, as z_y - logsumexp(z).

    logits z: [N, V], targets y: [N] -> [N] fp32.
    """
    logits = logits.float()
    target_logits = logits.gather(-1, targets[:, None])[:, 0]  # [N]
    return target_logits - logits.logsumexp(-1)


def sum_by_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums, in fp32, the values that belong to the same row. values, row: [N] -> [rows]."""
    return values.new_zeros(rows, dtype=torch.float32).index_add(0, row, values)


def backbone(lm) -> nn.Module:
    """The part of a language model that turns ids into the states that its head reads.

    Families name it differently, but it always holds the decoder blocks, as a list.
    """
    from transformers import PreTrainedModel

    config = lm.config.get_text_config(decoder=True)
    for module in lm.modules():
        of_text = isinstance(module, PreTrainedModel) and type(module.config) is type(config)
        if of_text and block_list(module) is not None:
            return module
    job.die(f"{lm.name_or_path}: the decoder blocks of {config.model_type} models were not found")


def blocks(lm) -> nn.ModuleList:
    """The decoder blocks of a language model."""
    return block_list(backbone(lm))


def block_list(module: nn.Module) -> nn.ModuleList | None:
    """The list of decoder blocks that a module itself holds, if it does."""
    number = module.config.get_text_config(decoder=True).num_hidden_layers
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            return child
    return None


def scale_and_cap(config) -> tuple[float, float | None]:
    """What stands between a head and the logits: z <- scale z, then z <- cap tanh(z / cap).

    Families name it differently; where one has a name that is not known here, Scorer.check tells.
    """
    named = vars(config.get_text_config(decoder=True))
    scale, cap = 1.0, None
    for name in ("logit_scale", "lm_head_multiplier"):
        if named.get(name) is not None:
            scale = named[name]
    if named.get("logits_scaling") is not None:
        scale /= named["logits_scaling"]
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if named.get(name) is not None:
            cap = named[name]
    return scale, cap


class Scorer(nn.Module):
    """log pi(y|x): the sum over the response's tokens of log pi(y_t | x, y_<t).

    Backbone and head are in one forward pass, and this is the module that DDP and FSDP wrap:
    called from outside of the wrapper, the backbone would not synchronise its gradients.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.scale, self.cap = scale_and_cap(lm.config)
        self.context = context_of(lm.config)
        self.unused = False  # parameters on which no log-prob depends: DDP must know
        if lm.device.type != "meta":
            self.check()

    def check(self):
        """Ends the program unless these are the model's own log-probs, whatever is in a batch.

        Two short sequences, padded together, are compared with a full forward pass of each alone.
        Names in configs don't tell all: a head may be followed by what we don't know, and what a
        block does may depend on its batch.
        """
        V = self.lm.get_output_embeddings().weight.shape[0]
        n = min(16, self.context)
        some = [V // 4 + 5 * i % (V // 2) for i in range(n)]  # special tokens stand at the ends
        sequences = [(some[:1], some[1:]), (some[-1:], some[1 : n // 2])]
        with torch.enable_grad():
            states, targets, _ = self.hidden(*collate(sequences, self.lm.device))
            together = self.head(states, targets)
        trained = {p for p in self.lm.parameters() if p.requires_grad}
        self.unused = bool(trained - reached(together))

        alone = []
        for prompt, response in sequences:
            ids = torch.tensor([prompt + response], device=self.lm.device)
            with torch.no_grad():
                logits = self.lm(input_ids=ids, use_cache=False).logits[0]  # [T, V]
            alone.append(token_logps(logits[:-1], ids[0, 1:]))
        error = (together.detach() - torch.cat(alone)).abs().mean().item()
        if not math.isfinite(error):
            sys.exit(f"error: {self.lm.name_or_path}: its log-probs are not finite: a broken model")
        rounding = 1e-3 if self.lm.dtype == torch.float32 else 0.3  # nats
        if error > rounding:
            job.die(
                f"{self.lm.name_or_path}: log-probs of this kind of model "
                f"({self.lm.config.model_type}) would be wrong by {error:.2g} nats a token: they "
                "depend on what else is in the batch, or more follows the head than we know"
            )

    def hidden(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last hidden states at the positions that predict the response.

        ids, mask: [S, T] -> states [N, D], the tokens to be predicted [N], the sequence of each
        [N]. No attention mask is needed: the padding is on the right of a causal model.
        """
        if ids.shape[1] > self.context:
            job.die(f"{ids.shape[1]} tokens are more than the model's context of {self.context}")
        states = backbone(self.lm)(input_ids=ids, use_cache=False).last_hidden_state  # [S, T, D]
        states, targets, keep = states[:, :-1], ids[:, 1:], mask[:, 1:]  # t predicts token t + 1
        return states[keep], targets[keep], keep.nonzero()[:, 0]

    def logits(self, states: Tensor) -> Tensor:
        """What the softmax sees: the head's output, scaled and capped if so. [N, D] -> [N, V]."""
        logits = self.lm.get_output_embeddings()(states)
        if self.scale != 1:
            logits = logits.float() * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits.float() / self.cap) * self.cap
        return logits

    def head_logps(self, states: Tensor, targets: Tensor) -> Tensor:
        """Log-probs of the targets after the language model's head. [N, D], [N] -> [N]."""
        return token_logps(self.logits(states), targets)

    def head(self, states: Tensor, targets: Tensor) -> Tensor:
        """head_logps, CHUNK tokens at a time, whose logits are made again in the backward pass."""
        if len(states) <= CHUNK:
            return self.head_logps(states, targets)
        parts = []
        for some_states, some_targets in zip(states.split(CHUNK), targets.split(CHUNK)):
            part = checkpoint(self.head_logps, some_states, some_targets, use_reentrant=False)
            parts.append(part)
        return torch.cat(parts)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """log pi(y|x) of each sequence. ids, mask: [S, T] -> [S]."""
        states, targets, row = self.hidden(ids, mask)
        return sum_by_row(self.head(states, targets), row, len(ids))


def reached(value: Tensor) -> set[Tensor]:
    """The parameters that a backward pass from `value` would reach."""
    found, seen, ahead = set(), set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        ahead += [before for before, _ in node.next_functions]
    return found


def preference_metrics(
    losses: Tensor, chosen_reward: Tensor, rejected_reward: Tensor, logps: Tensor
) -> dict[str, Tensor]:
    """What every method logs of its pairs, named as in TRL.

    losses and rewards: [B], logps: [B, 2], chosen and rejected -> {name: [B]}.
    """
    return {
        "loss": losses,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": (chosen_reward > rejected_reward).float(),
        "rewards/size": chosen_reward.abs(),  # TrainingRun looks at it before the first step
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }


def add_weighted(sums: dict[str, Tensor], values: dict[str, Tensor], weight: Tensor, n_pairs: int):
    """Adds to each sum a micro-batch's part of the mean over the step's pairs.

    values: {name: [B]}. weight: [B], 0 for a filler. n_pairs: the number of pairs in the whole
    step, over all ranks.
    """
    for name, value in values.items():
        part = (weight * value.detach()).sum() / n_pairs
        sums[name] = sums.get(name, 0.0) + part


# ------------------------------------------------------------------------- models and samples


@dataclass(frozen=True)
class Model:
    """A model that is a folder or a Hub id, with all that is needed to run it."""

    path: str
    tok: object
    device: torch.device
    dtype: torch.dtype

    def with_weights(self, path: Path | str) -> Model:
        """The same kind of model with the weights of another folder."""
        return dataclasses.replace(self, path=str(path))

    def load(self):
        """The causal language model, on the device."""
        return load_lm(self.path, self.dtype, self.device)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: each token from softmax(z / temperature), at 0 the likeliest one."""

    temperature: float
    max_new_tokens: int
    batch: int  # answers at a time


class Answer(NamedTuple):
    """An answer to a prompt."""

    text: str
    ended: bool  # by itself: it was not cut
    score: float | None = None  # a judge's
    sampled_ids: tuple[list[int], ...] = ()  # where the text alone would give other ones


class Drawn(NamedTuple):
    """A sampled answer."""

    text: str
    finish: str  # "stop" or "length"
    ids: list[int] | None = None  # where the text alone would give other ones; without the end


def weights_stamp(path: str) -> list | str | None:
    """What tells a model from another one, wherever it lies: its weights' files, their sizes and
    times, or the Hub's commit.
    """
    folder = Path(path)
    if not folder.exists():
        _, config = load_tokenizer(path)
        return getattr(config, "_commit_hash", None)
    stamps = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        stat = file.stat()
        stamps.append((file.name, stat.st_size, stat.st_mtime_ns))
    return stamps


def lm_shapes(path: str):
    """A causal language model in float32 without its weights, on "meta"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            ).eval()
    except Exception as fault:
        job.die(f"{path}: not a causal language model that can be built ({job.first_line(fault)})")


def read_weights(kind, path: str, dtype: torch.dtype):
    """A model of the class `kind`.

    Weights that can't be read, or that lack something, which would be drawn at random, end the
    program with one line.
    """
    from safetensors import SafetensorError

    unreadable = (OSError, EOFError, ValueError, RuntimeError, ImportError)
    unreadable += (UnpicklingError, SafetensorError)
    try:
        model, report = kind.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except unreadable as fault:
        job.damaged(path, fault, "if a run has made it, delete this folder and --resume the run")
    lacking = sorted(report["missing_keys"])
    if lacking:
        job.die(
            f"{path}: its weights lack {len(lacking)} of {type(model).__name__}'s, {lacking[0]} "
            "the first: it is a model of another kind, or a part of one"
        )
    return model


def load_lm(path: str, dtype: torch.dtype, device):
    """A causal language model without dropout: policy and reference must be the same function.

    Only the end tokens of its generation_config are kept: with top_k or a repetition penalty,
    answers would not be samples from the model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    lm = read_weights(AutoModelForCausalLM, path, dtype)
    ends = lm.generation_config.eos_token_id
    lm.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    return lm.to(device).eval()


@torch.no_grad()
def sample(
    lm,
    tok,
    prompts: list[list[int]],
    temperature: float,
    max_new_tokens: int,
    seed: int,
    allowed: list[int] | None = None,
) -> list[Drawn]:
    """Draws an answer to each prompt (ids), of `allowed` tokens only if they are given.

    One seed serves the whole call, so that an answer depends on its batch.
    """
    # padded on the left: the last column is always a prompt's
    width = max(len(prompt) for prompt in prompts)
    padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    attended = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]

    how = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if allowed:
        how["prefix_allowed_tokens_fn"] = lambda sequence, ids: allowed

    def refuse_nan(sequences, logits):
        if logits.isnan().any():
            sys.exit(f"error: {lm.name_or_path}: its logits are not numbers: a broken model")
        return logits

    ends = end_tokens(lm, tok)
    ids = torch.tensor(padded, device=lm.device)
    mask = torch.tensor(attended, device=lm.device)
    how.update(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=shared_cache(lm, prompts, ids, mask),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        logits_processor=[refuse_nan],
    )
    torch.manual_seed(seed)
    try:
        sequences = lm.generate(**how)
    except ValueError as fault:
        if "get_seq_length" not in str(fault):
            raise
        # a cache of linear attention alone can't say how long it is
        sequences = lm.generate(**how, use_cache=False)
    return [read_answer(tok, new, ends) for new in sequences[:, width:].tolist()]


def shared_cache(lm, prompts: list[list[int]], ids: Tensor, mask: Tensor):
    """The keys and values of the prompts' tokens but the last, or None where there is no gain.

    A prompt that is there several times, for as many answers, is read once. ids, mask: the prompts,
    padded on the left: [S, T]. Caches of other kinds than plain attention's are left to generate().
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    first_places = {}
    for i, prompt in enumerate(prompts):
        first_places.setdefault(tuple(prompt), i)
    if len(first_places) == len(prompts) or ids.shape[1] == 1:
        return None

    cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None

    once = list(first_places.values())
    seen = mask[once, :-1]
    backbone(lm)(
        input_ids=ids[once, :-1],
        attention_mask=seen,
        position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    order = {prompt: place for place, prompt in enumerate(first_places)}
    rows = [order[tuple(prompt)] for prompt in prompts]
    cache.batch_select_indices(torch.tensor(rows, device=ids.device))
    return cache


def end_tokens(lm, tok) -> set[int]:
    """The tokens that end an answer: the template's, and those of tokenizer and model config."""
    ends = lm.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [ends]
    return {turn_of(tok).end, tok.eos_token_id, *ends} - {None}


def read_answer(tok, ids: list[int], ends: set[int]) -> Drawn:
    """Sampled ids as an answer up to the first end token, or, without one, as one that was cut."""
    turn = turn_of(tok)
    stops = [i for i, token in enumerate(ids) if token in ends]
    if stops:
        ids = ids[: stops[0]]
    else:
        ids = whole_characters(tok, ids)
    ids = final_part(tok, turn, ids)

    text = spelled(tok, turn, ids, skip_special_tokens=True)
    kept = None
    if answer_ids(tok, turn, text, bool(stops)) != ids and spelled(tok, turn, ids) == text:
        kept = ids
    return Drawn(text, "stop" if stops else "length", kept)


def whole_characters(tok, ids: list[int]) -> list[int]:
    """The ids without the first tokens of a character whose rest was cut off: at most three."""
    for end in range(len(ids), max(-1, len(ids) - 4), -1):
        if not tok.decode(ids[:end]).endswith("\ufffd"):
            return ids[:end]
    return ids


def final_part(tok, turn: Turn, ids: list[int]) -> list[int]:
    """What follows the last header of an answer that brings headers of its own.

    A model with channels may write several, the last of which is for the reader. Their special
    tokens would vanish from the text while the names between them stayed. An answer without the
    template's header is empty then.
    """
    header = tok(turn.header, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    if not special & set(header) & set(ids):
        return ids
    for start in range(len(ids) - len(header), -1, -1):
        if ids[start : start + len(header)] == header:
            return ids[start + len(header) :]
    return []


def generate(
    out: Path,
    rows: list[dict],
    model: Model,
    sampling: Sampling,
    seed: int,
    n: int = 1,
    note: str = "",
) -> list[dict]:
    """n answers to each row's prompt, in the file `out`, on all ranks.

    A row of it is {"id", "prompt", "response", "meta": {"sample", "finish"}}; where the
    response alone would give other ids than the sampled ones, meta.sampled_ids is a list of these.
    The model is loaded only if there is something left to do.
    """
    prompts = [prompt_ids(model.tok, row["prompt"]) for row in rows]
    lm = None

    def work(items, number):
        nonlocal lm
        lm = lm or model.load()
        answers = sample(
            lm,
            model.tok,
            [prompts[i] for i, _ in items],
            sampling.temperature,
            sampling.max_new_tokens,
            job.seed_of(seed, number),
        )
        return [answer_row(rows[i], j, answer) for (i, j), answer in zip(items, answers)]

    settings = [
        weights_stamp(model.path),
        sampling.temperature,
        sampling.max_new_tokens,
        str(model.dtype),
        seed,
        prompts,
    ]
    items = every_sample(len(rows), n)
    answers = job.phase(
        out,
        items,
        work,
        sampling.batch,
        settings,
        key=lambda item: len(prompts[item[0]]),
        note=note,
        ids=[rows[i]["id"] for i, _ in items],
    )
    warn_of_cut(out, answers, sampling.max_new_tokens)
    return answers


def warn_of_cut(out: Path, answers: list[dict], limit: int):
    """Says so if most answers of a file did not end by themselves."""
    cut = [row["meta"]["finish"] for row in answers].count("length")
    if cut > 0.5 * len(answers) and job.on_rank_0():
        print(
            f"warning: {out}: {cut} of {len(answers)} answers were cut at {limit} tokens: "
            "the limit is too low, or the model does not end its turns",
            file=sys.stderr,
        )


def every_sample(rows: int, n: int) -> list[tuple[int, int]]:
    """(row, sample) for n samples of each row, in the rows' order."""
    return [(i // n, i % n) for i in range(rows * n)]


def texts(rows: list[dict]) -> list[tuple[list[dict], str]]:
    """What a judge reads of rows: prompt and response."""
    return [(row["prompt"], row["response"]) for row in rows]


def answer_row(row: dict, number: int, answer: Drawn) -> dict:
    """The row of a file of answers for one answer to a row's prompt."""
    meta = {"sample": number, "finish": answer.finish}
    if answer.ids:
        meta["sampled_ids"] = [answer.ids]
    return {"id": row["id"], "prompt": row["prompt"], "response": answer.text, "meta": meta}


def preference_pair(row: dict, answers: list[dict], scores: list[float | None]) -> dict | None:
    """The best and the worst answer to a prompt as a preference row; None where all are equal.

    Of equal scores the first answer counts. An empty answer does not, nor does one whose judgement
    could not be read.
    """
    places = []
    for place, answer in enumerate(answers):
        if scores[place] is not None and answer["response"].strip():
            places.append(place)
    if not places:
        return None
    best = max(places, key=scores.__getitem__)
    worst = min(places, key=scores.__getitem__)
    if scores[best] == scores[worst]:
        return None
    chosen = given_answer(answers[best], "response", scores[best])
    rejected = given_answer(answers[worst], "response", scores[worst])
    meta = {
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        "chosen_ended": chosen.ended,
        "rejected_ended": rejected.ended,
        **sampled_ids(chosen, rejected),
    }
    sides = {"chosen": chosen.text, "rejected": rejected.text}
    return {"id": row["id"], "prompt": row["prompt"], **sides, "meta": meta}


def held_out(
    folder: Path,
    rows: list[dict],
    model: Model,
    sampling: Sampling,
    judge: Judge | None,
    seed: int,
    note: str = "",
) -> dict:
    """What a model is worth: its answers to held-out prompts, judged beside the annotations.

    Writes folder/answers.jsonl and folder/test.jsonl. Returns the mean score, the share of full
    marks, the shares of answers that win, tie and lose against the annotations (all None without a
    judge), and the share of answers that were cut.
    """
    drawn = generate(
        folder / "answers.jsonl",
        rows,
        model,
        sampling,
        seed,
        note=f"{note}answer held-out prompts",
    )

    def work(items, number):
        answer_scores = annotation_scores = [None] * len(items)
        if judge:
            answer_scores = score_rows(judge, drawn, items)
            annotation_scores = score_rows(judge, rows, items)
        tested = []
        for i, score, annotation_score in zip(items, answer_scores, annotation_scores):
            scores = {"score": score, "score_annotated": annotation_score}
            meta = {**drawn[i]["meta"], **scores}
            tested.append({**drawn[i], "annotated": rows[i]["response"], "meta": meta})
        return tested

    tested = job.phase(
        folder / "test.jsonl",
        list(range(len(rows))),
        work,
        sampling.batch,
        settings=[judge and judge.key, texts(drawn), texts(rows)],
        note=f"{note}judge",
        ids=[row["id"] for row in rows],
    )
    cut = [row["meta"]["finish"] == "length" for row in tested]
    return {**judged_shares(tested, judge), "cut": sum(cut) / len(cut)}


def score_rows(judge: Judge, rows: list[dict], items: list[int]) -> list[float | None]:
    """The judge's scores of the responses of the rows `items`."""
    return judge.score([(rows[i]["prompt"], rows[i]["response"]) for i in items])


def judged_shares(tested: list[dict], judge: Judge | None) -> dict[str, float | None]:
    """Mean score and shares of held_out's rows; None where nothing could be judged."""
    scores, full, wins, ties = [], [], [], []
    for row in tested:
        score, annotation = row["meta"]["score"], row["meta"]["score_annotated"]
        if score is None or annotation is None:
            continue
        scores.append(score)
        wins.append(score > annotation)
        ties.append(score == annotation)
        if judge.full:
            full.append(score >= judge.full)
    losses = [not win and not tie for win, tie in zip(wins, ties)]
    return {
        "score": mean_or_none(scores),
        "full_marks": mean_or_none(full),
        "win": mean_or_none(wins),
        "tie": mean_or_none(ties),
        "loss": mean_or_none(losses),
    }


def mean_or_none(values: list) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------------------- judges

SCORE_PROMPT = """\
Rate how well the response answers the instruction. Look at four things: its relevance to what \
was asked, its clarity, its completeness, and its correctness. Length and style alone earn nothing.
The scale is the whole numbers from 1 (useless) to 100 (could not be better), in steps of one. \
Avoid multiples of five: they are too coarse to tell two similar responses apart.
Answer with the number alone, exactly in the form: Rating: [[n]]

[Instruction]
{prompt}

[Response]
{a}"""
COMPARE_PROMPT = """\
Which of two responses answers the instruction better: more correct, complete, clear and helpful? \
Length, style and order earn nothing.
Answer exactly in the form: Verdict: [[A]], Verdict: [[B]], or Verdict: [[tie]] \
if neither is better.

[Instruction]
{prompt}

[Response A]
{a}

[Response B]
{b}"""
RATING, VERDICT = "Rating: [[", "Verdict: [["  # how an answer in the demanded form begins


def read_score(text: str) -> float | None:
    """The [[n]] of a judge's answer, as last_in_brackets finds it, if 1 <= n <= 100, else None.

    There is no default: what can't be read is not a score.
    """
    found = last_in_brackets(text, "Rating", r"\d+(?:\.\d+)?", echo="Rating: [[n]]")
    if not found:
        return None
    score = float(found)
    return score if 1 <= score <= 100 else None


def read_verdict(text: str) -> str | None:
    """The [[A]], [[B]] or [[tie]] of a judge's answer, as last_in_brackets finds it, else None."""
    echo = "Verdict: [[A]], Verdict: [[B]], or Verdict: [[tie]]"
    found = last_in_brackets(text, "Verdict", "A|B|tie", echo)
    return {"A": "A", "B": "B", "TIE": "tie"}[found.upper()] if found else None


THOUGHT = re.compile(r"[<\[](think|thinking|thought|reasoning)[>\]].*?[<\[]/\1[>\]]", re.I | re.S)
OPEN_THOUGHT = re.compile(  # at the beginning, or behind a verdict
    r"(?:\A|(?<=\]\]))\s*(?:<(?:think|thinking|thought|reasoning)>|\[think\]).*", re.I | re.S
)
END_OF_THOUGHT = re.compile(r"[<\[]/(?:think|thinking|thought|reasoning)[>\]]", re.I)


def last_in_brackets(text: str, word: str, values: str, echo: str) -> str | None:
    """The value in double brackets that a judge's answer gives, or None.

    The last one in the demanded form, WORD: [[value]], outranks bare brackets, which must agree.
    What is thought does not count, whether the block is closed or not, or was opened by the server.
    Where the question is echoed, with `echo` in it, brackets alone may be anybody's.
    """
    said = END_OF_THOUGHT.split(OPEN_THOUGHT.sub("", THOUGHT.sub("", text)))[-1]
    brackets = rf"\[\[\s*({values})\s*\]\]"
    in_form = re.findall(rf"{word}[\s:*_]*{brackets}", said.replace(echo, ""), re.I)
    bare = [] if echo in said else re.findall(brackets, said, re.I)
    if in_form:
        return in_form[-1]
    return bare[0] if len(set(bare)) == 1 else None


def as_text(prompt: list[dict]) -> str:
    """A prompt's messages as a judge reads them."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class Judge:
    """Scores and compares answers; what could be read of its own answers is kept in a cache.

    score(items) takes (prompt, response) each, compare(items) takes (prompt, a, b) each; a prompt
    is a list of messages. Scores of text judges are 1..100, the toy world's 0..10, a reward model's
    are its own. `cache` is a folder.

    Subclasses give ask(kind, items, again), which returns one value or None for each item; kind is
    "score" or "compare", and `again` says that these items could not be read before.
    """

    full: float | None = None  # full marks, None where the scale has no end
    orders = True  # ask compare() in both orders
    fault: str | None = None  # why no more questions can be asked
    advice = "use a judge that follows the prompt in common.py"  # where too little can be read

    def __init__(self, spec: str, cache: Path | None):
        self.spec = spec
        self.key = spec  # what its answers depend on, beside the question
        self.asked = self.unreadable = 0
        self.known = {}
        self.file = None
        if cache:
            self.file = cache / f"rank{job.rank()}.jsonl"
            for file in sorted(cache.glob("*.jsonl")):
                self.read_cache(file)

    def read_cache(self, file: Path):
        """Adds the values of a file of the cache."""
        for values in job.whole_lines(file):
            self.known.update(values)

    def remember(self, values: dict):
        """Adds values to the cache."""
        self.known.update(values)
        if values and self.file:
            job.append(self.file, "\n" + json.dumps(values) + "\n")

    def ask(self, kind: str, items: list[tuple], again: bool) -> list:
        raise TypeError("a judge must say how it answers")

    def answers(self, kind: str, items: list[tuple]) -> list:
        """Values from the cache or from ask().

        What could not be read is asked once more. If that fails too it is None, in this call. The
        run ends when more than 20 % of at least 20 judgements could not be read.
        """
        keys = [f"{job.seed_of(self.key, kind, item):016x}" for item in items]
        self.asked += len(set(keys) - self.known.keys())
        for again in (False, True):
            todo = {key: item for key, item in zip(keys, items) if key not in self.known}
            values = self.ask(kind, list(todo.values()), again) if todo else []
            self.remember({key: value for key, value in zip(todo, values) if value is not None})
            if self.fault:
                resume = ""
                if self.file and (self.file.parent.parent / "config.json").is_file():
                    resume = " with --resume"
                sys.exit(f"{self.fault}; start again{resume}: no answer is asked for twice")
        self.unreadable += len(set(keys) - self.known.keys())

        if self.asked >= 20 and self.unreadable > 0.2 * self.asked:
            sys.exit(
                f"error: {self.spec}: {self.unreadable} of {self.asked} judgements could not be "
                f"read; {self.advice}"
            )
        return [self.known.get(key) for key in keys]

    def score(self, items: list[tuple]) -> list[float | None]:
        """The score of each (prompt, response), None where it could not be read."""
        return self.answers("score", items)

    def compare(self, items: list[tuple]) -> list[str | None]:
        """The better one, "A", "B" or "tie", of each (prompt, a, b), None where unreadable.

        It is asked in both orders, and a verdict that changes with the order is a tie.
        """
        there = self.answers("compare", items)
        if not self.orders:
            return there
        back = self.answers("compare", [(prompt, b, a) for prompt, a, b in items])
        return [agreement(first, second) for first, second in zip(there, back)]

    def free(self):
        """Gives back the memory of a loaded model until the next question."""


SWAPPED = {"A": "B", "B": "A", "tie": "tie", None: None}  # a verdict on (b, a) as one on (a, b)


def agreement(there: str | None, back: str | None) -> str | None:
    """The verdicts on (a, b) and on (b, a) as one: "tie" where they disagree."""
    if there is None or back is None:
        return None
    return there if there == SWAPPED[back] else "tie"


class NumberJudge(Judge):
    """A judge that gives a number to one answer: the better number wins, in any order.

    Subclasses give number(prompt, text), which is None where there is none.
    """

    orders = False

    def ask(self, kind, items, again):
        if kind == "score":
            return [self.number(prompt, text) for prompt, text in items]
        return [self.better(prompt, a, b) for prompt, a, b in items]

    def better(self, prompt: list[dict], a: str, b: str) -> str | None:
        first, second = self.number(prompt, a), self.number(prompt, b)
        if first is None or second is None:
            return None
        if first == second:
            return "tie"
        return "A" if first > second else "B"


class ExactJudge(NumberJudge):
    """A toy world's judge: a function of the prompt's last message and the answer, 0..10."""

    full = 10.0

    def __init__(self, spec: str, exact: Callable[[str, str], float]):
        super().__init__(spec, None)  # exact and instant: nothing to cache
        self.exact = exact

    def number(self, prompt, text):
        return self.exact(prompt[-1]["content"], text)


class RewardJudge(NumberJudge):
    """rm:PATH, a sequence-classification reward model with one output.

    It reads one text at a time, so that padding can't matter. A text that its context does not
    hold, and a reward that is not finite, count as unreadable.
    """

    advice = "texts are longer than its context, or its rewards are not finite"

    def __init__(self, spec: str, cache: Path | None, device, dtype: torch.dtype):
        super().__init__(spec, cache)
        self.path = spec.partition(":")[2]
        self.device, self.dtype, self.model = device, dtype, None
        self.tok, config = load_tokenizer(self.path)
        self.key = [spec, weights_stamp(self.path)]
        self.context = context_of(config)
        if config.num_labels != 1:
            job.die(f"{spec}: a reward model has one output, this one has {config.num_labels}")

    def load(self):
        from transformers import AutoModelForSequenceClassification

        model = read_weights(AutoModelForSequenceClassification, self.path, self.dtype)
        return model.to(self.device).eval()

    @torch.no_grad()
    def number(self, prompt, text):
        if self.model is None:
            self.model = self.load()
        talk = [*prompt, {"role": "assistant", "content": text}]
        ids = quoted_ids(self.tok, talk, waits=False)
        if len(ids) > self.context:
            return None
        input_ids = torch.tensor([ids], device=self.device)
        reward = self.model(input_ids=input_ids).logits.float().item()
        return reward if math.isfinite(reward) else None

    def free(self):
        self.model = None


class TextJudge(Judge):
    """A chat model that is asked in words.

    Subclasses give complete(questions, opening, again), which returns an answer to each question;
    `opening` is how an answer in the demanded form begins.
    """

    full = 100.0

    def __init__(self, spec: str, cache: Path | None):
        super().__init__(spec, cache)
        self.key = [spec, SCORE_PROMPT, COMPARE_PROMPT]  # in other words it is another judge

    def ask(self, kind, items, again):
        if kind == "score":
            questions = [
                SCORE_PROMPT.format(prompt=as_text(prompt), a=text) for prompt, text in items
            ]
            answers = self.complete(questions, RATING, again)
            return [read_score(new_words(*asked)) for asked in zip(questions, answers)]
        questions = [
            COMPARE_PROMPT.format(prompt=as_text(prompt), a=a, b=b) for prompt, a, b in items
        ]
        answers = self.complete(questions, VERDICT, again)
        return [read_verdict(new_words(*asked)) for asked in zip(questions, answers)]


def new_words(question: str, answer: str) -> str:
    """An answer without the question, which some models repeat, and with it what is judged."""
    return answer.replace(question, "")


class LocalJudge(TextJudge):
    """hf:PATH, a local chat model.

    Its answer is begun for it ("Rating: [["), and it may only use the tokens of the form (digits,
    or A, B, tie, and "]]"): a small model says what it thinks, but not in the form that it is asked
    for. A question that its context does not hold gets no answer.
    """

    batch = 16  # questions at a time
    max_new_tokens = 5  # enough for "100]]" and "tie]]"

    def __init__(self, spec: str, cache: Path | None, device, dtype: torch.dtype):
        super().__init__(spec, cache)
        self.path = spec.partition(":")[2]
        self.device, self.dtype, self.lm = device, dtype, None
        self.tok, config = load_tokenizer(self.path)
        self.key = [*self.key, weights_stamp(self.path)]
        self.room = context_of(config) - self.max_new_tokens

    def encode(self, text: str) -> list[int]:
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def allowed_tokens(self, opening: str) -> list[int]:
        """The tokens that may follow the opening."""
        words = ["A", "B", "tie"]
        if opening == RATING:
            words = range(1, 101)
        begun = len(self.encode(opening))
        tokens = set()
        for word in words:
            tokens.update(self.encode(f"{opening}{word}]]")[begun:])
        return sorted(tokens)

    def complete(self, questions, opening, again):
        self.lm = self.lm or load_lm(self.path, self.dtype, self.device)
        allowed = self.allowed_tokens(opening)
        ids = []
        for question in questions:
            talk = [{"role": "user", "content": question}]
            ids.append(prompt_ids(self.tok, talk) + self.encode(opening))

        fit = [i for i in range(len(ids)) if len(ids[i]) <= self.room]
        order = sorted(fit, key=lambda i: len(ids[i]))
        answers = [""] * len(ids)
        temperature = 1.0 if again else 0.0
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            prompts = [ids[i] for i in some]
            how = temperature, self.max_new_tokens, job.seed_of(start), allowed
            drawn = sample(self.lm, self.tok, prompts, *how)
            for i, answer in zip(some, drawn):
                answers[i] = opening + answer.text
        return answers

    def free(self):
        self.lm = None


class EndpointJudge(TextJudge):
    """api:MODEL at any OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY)."""

    def __init__(self, spec: str, cache: Path | None):
        super().__init__(spec, cache)
        self.name = spec.partition(":")[2]
        self.server = endpoint()
        self.server.answered = len(self.known)  # by an earlier start of the run

    def complete(self, questions, opening, again):
        talks = [[{"role": "user", "content": question}] for question in questions]
        temperature = 1 if again else 0  # at 0 the second answer would be the first
        answers, self.fault = chat(self.server, self.name, talks, temperature=temperature)
        texts = []
        for answer in answers:
            text, finish = answer or ("", "stop")
            texts.append(text if finish == "stop" else "")  # what was cut has no verdict yet
        return texts


def make_judge(
    spec: str,
    cache: Path | None,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    exact: Callable[[str, str], float] | None = None,
) -> Judge | None:
    """The judge that is called toy, hf:PATH, rm:PATH, api:MODEL or none.

    The path or the endpoint is checked now, weights are loaded at the first question. exact: what
    `toy` asks, a function of a prompt's text and an answer.
    """
    kind, _, name = spec.partition(":")
    if spec == "none":
        return None
    if spec == "toy":
        return ExactJudge(spec, exact)
    if kind == "hf" and name:
        return LocalJudge(spec, cache, device, dtype)
    if kind == "rm" and name:
        return RewardJudge(spec, cache, device, dtype)
    if kind == "api" and name:
        return EndpointJudge(spec, cache)
    job.die(f"--judge {spec}: expected toy, hf:PATH, rm:PATH, api:MODEL or none")


# ------------------------------------------------------------------------- endpoints

API_CONCURRENCY = 8  # requests in flight
API_RETRIES = 6  # tries after the first
API_TIMEOUT = 60  # seconds


# Finish reasons that say that there is no answer, whatever text there is.
NO_ANSWER = ("content_filter", "tool_calls", "function_call")


@dataclass
class Endpoint:
    """An OpenAI-compatible server, and what this run has learned of it."""

    client: object  # of the openai package
    # options that it refuses, with the names that it wants for them, or None
    refuses: dict[str, str | None] = dataclasses.field(default_factory=dict)
    answered: int = 0  # conversations
    fault: str = ""  # why it last refused a conversation

    def accepted(self, options: dict) -> dict:
        """The options under the names that it wants, without those that it wants not at all."""
        accepted = {}
        for name, value in options.items():
            while name in self.refuses:
                name = self.refuses[name]
            if name:
                accepted[name] = value
        return accepted

    def learns(self, sent: dict, refusal: str) -> bool:
        """Whether a refusal names an option that was sent, which it then won't be any more.

        A conversation that is too long is refused with the name of its limit, too.
        """
        if re.search("context|too large|too long|exceed", refusal, re.I):
            return False
        for name in sent:
            if re.search(rf"\b{name}\b", refusal):
                other = "max_completion_tokens" if name == "max_tokens" else None
                self.refuses[name] = other
                instead = f"with {other} instead" if other else "without it"
                job.say_once(f"note: {self.client.base_url} refuses {name}: it is asked {instead}")
                return True
        return False


def endpoint(url: str | None = None) -> Endpoint:
    """The server at `url`, or at OPENAI_BASE_URL, which is checked to answer."""
    try:
        import openai
    except ImportError:
        job.die("an endpoint needs the openai package: pip install openai")
    url = url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get("OPENAI_API_KEY")
    if not url and not key:
        job.die("an endpoint needs OPENAI_API_KEY, or OPENAI_BASE_URL of a server of your own")

    client = openai.OpenAI(
        base_url=url,
        api_key=key or "EMPTY",
        max_retries=API_RETRIES,
        timeout=API_TIMEOUT,
    )
    try:
        client.with_options(max_retries=0, timeout=10).models.list()
    except openai.APIConnectionError as fault:
        job.die(f"{client.base_url}: no answer ({fault})")
    except openai.AuthenticationError:
        job.die(f"{client.base_url}: refused the key in OPENAI_API_KEY")
    except Exception:  # not every server lists its models
        pass
    return Endpoint(client)


def chat(
    server: Endpoint, model: str, conversations: list[list[dict]], **options
) -> tuple[list[tuple[str, str] | None], str | None]:
    """Asks for one answer to each conversation, API_CONCURRENCY at a time.

    Returns (text, "stop" | "length") for each, or None where there is no answer to it, and the
    reason why the run must end, or None. The client retries 429, 5xx and time-outs with back-off,
    and we retry a body that is no chat completion. Where that does not help, and where the server
    refuses us, a name or everything, the rest is not asked and stays None; a conversation that it
    refuses is one without an answer.
    """
    import openai

    faults = []

    def one(messages):
        for _ in range(API_RETRIES + 1):
            if faults:
                return None
            try:
                answer = read_choice(ask(messages).choices[0])
                server.answered += answer is not None
                return answer
            except (
                ValueError,
                AttributeError,
                TypeError,
                IndexError,
                openai.APIResponseValidationError,
            ) as fault:
                last = f"its answer is no chat completion ({type(fault).__name__})"
                retried = True
            except openai.OpenAIError as fault:
                last, retried = " ".join(str(fault).split()), is_retried(fault)
                if is_refusal(fault):
                    server.fault = last
                    return None
                break
        after = f" (after {API_RETRIES} retries)" if retried else ""
        faults.append(f"error: {server.client.base_url}: {last}{after}")
        return None

    def ask(messages):
        while True:
            sent = server.accepted(options)
            try:
                return server.client.chat.completions.create(model=model, messages=messages, **sent)
            except openai.APIStatusError as fault:
                if not is_refusal(fault) or not server.learns(sent, str(fault)):
                    raise

    with ThreadPoolExecutor(API_CONCURRENCY) as pool:
        answers = list(pool.map(one, conversations))
    if len(answers) > 1 and not server.answered and not faults and server.fault:
        faults.append(f"error: {server.client.base_url} refuses everything: {server.fault}")
    return answers, faults[0] if faults else None


def is_refusal(fault) -> bool:
    """Whether it is about one conversation, or an option, and not about us or the server."""
    return getattr(fault, "status_code", None) in (400, 413, 422)


def is_retried(fault) -> bool:
    """Whether the client has retried before it gave up with this fault."""
    import openai

    status = getattr(fault, "status_code", None)
    if status is None:
        return isinstance(fault, openai.APIConnectionError)
    return status in (408, 409, 429) or status >= 500


def read_choice(choice) -> tuple[str, str] | None:
    """The text of a chat completion's choice and "stop" or "length", or None if it answers nothing.

    Content may come in parts; half of a surrogate pair, which UTF-8 can't write, is dropped.
    """
    content = choice.message.content or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    text = content.encode(errors="ignore").decode()
    finish = "length" if choice.finish_reason == "length" else "stop"
    if finish == "length":
        text = text.rstrip("\ufffd")  # the beginning of a character whose rest was cut off
    if not text.strip() or choice.finish_reason in NO_ANSWER:
        return None
    return text, finish
