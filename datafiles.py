"""Data files to rows: data come in many shapes, the scripts know one.

A row is a dict. Its texts are plain strings, and not a character of them is changed:

    "id"        a string: another one for every row, the same in every run
    "prompt"    a list of messages {"role", "content"}: perhaps a system turn, then user and
                assistant in turn, the user last
    "response"  the answer to it, or, where two answers are compared,
    "chosen"    the better and
    "rejected"  the worse one
    "meta"      a dict of whatever else is known

The columns in which raw rows are understood are listed in SHAPES. The rows may be in a .jsonl,
.json or .parquet file, in a data set folder, or in a data set on the Hub.

The module can be used alone, for example to see whether a file is fit to train on:

    import datafiles

    rows, dropped = datafiles.load_rows("pairs.jsonl", "pair")

Data that cannot be used end the program with one line, which names the file, the line in it and
the fault. Nothing here knows a model, a tokenizer or a method.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import job

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
# what json.loads raises: the second for thousands of digits or brackets
UNREADABLE = (ValueError, RecursionError)

SHAPES = (
    '{"messages": [...]}, '
    '{"prompt", "response"}, '
    '{"prompt", "completion"}, '
    '{"instruction", "input", "output"}, '
    '{"question", "answer"}, '
    '{"prompt", "chosen", "rejected"}, '
    '{"chosen", "rejected"} or '
    '{"real", "generated"}'
)


# ---------------------------------------------------------------- rows, as the scripts want them


def load_split(
    data: str,
    test: str | None,
    need: str,
    limit: int | None,
    n_test: int,
    test_need: str | None = None,
) -> tuple[list[dict], list[dict], Counter]:
    """Loads training rows and held-out rows; without `test`, a tenth of `data` is held out.

    `need` is load_rows's; `test_need` is the same for `test`, in case it differs.
    Returns at most `limit` training rows, at most `n_test` held-out rows, and how many rows of
    `data` were left out, by reason.
    """
    if test:
        train, dropped = load_rows(data, need, limit)
        held, _ = load_rows(test, test_need or need, n_test)
    else:
        # No limit yet: the held-out rows come out of all rows, not out of the first few.
        rows, dropped = load_rows(data, need)
        train, held = hold_out(rows)
    return train[:limit], held[:n_test], dropped


def hold_out(rows: list[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Splits rows into training rows and about a `share` of held-out rows, by a hash of the prompt.

    The same prompt is therefore never on both sides, in any run and in any order of the rows.
    """
    train = []
    held = []
    for row in rows:
        place = job.seed_of(row["prompt"]) % 1000
        if place < 1000 * share:
            held.append(row)
        else:
            train.append(row)
    return train, held


def load_rows(spec: str, need: str, limit: int | None = None) -> tuple[list[dict], Counter]:
    """Reads the rows of a file, of a data set folder or of a Hub id (`NAME` or `NAME:SPLIT`).

    `need` is what a row must hold: "prompt", "response" (of a pair, the chosen answer) or "pair".
    With a `limit`, reading ends after so many rows.

    Returns the rows, and how many were left out, by reason. A faulty row of a file ends the
    program. In a data set, which nobody can mend from here, it is left out and counted, unless
    its columns are wrong, because then they are wrong in all rows.
    """
    rows = []
    seen = set()  # (name in the data, digest of the content) of each row
    taken = {}  # ids of the rows, and where their free names begin
    dropped = Counter()

    for where, raw in read_raw(spec):
        try:
            row = normalise(raw, need)
        except ValueError as fault:
            reason = str(fault)
            if is_file_name(spec) or "columns" in reason:
                job.die(f"{where}: {reason}")
            kind = reason.split(":")[0]
            dropped[kind] += 1
            continue

        digest = content_digest(row)
        name = name_in_data(raw, otherwise=digest)
        if (name, digest) in seen:
            dropped["repeated rows"] += 1
            continue
        seen.add((name, digest))

        name = free_name(name, taken)
        rows.append({"id": name, **row})
        if limit and len(rows) == limit:
            break

    if not rows:
        message = f"{spec}: no rows"
        for reason, number in dropped.items():
            message += f"; {number} left out: {reason}"
        job.die(message)
    return rows, dropped


def content_digest(row: dict) -> str:
    """Returns 16 hex digits that depend on the prompt and the answers alone."""
    content = dict(row)
    del content["meta"]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def name_in_data(raw: dict, otherwise: str) -> str:
    """Returns a raw row's own id as text. A null, with which parquet fills gaps, is no id."""
    for column in ("id", "prompt_id"):
        if raw.get(column) is not None:
            return str(raw[column])
    return otherwise


def free_name(name: str, taken: dict[str, int]) -> str:
    """Returns the first of name, name-2, name-3 and so on that is not taken, and takes it.

    taken: of each name the number that was tried last, so that a thousand equal ones are quick.
    """
    free = name
    number = taken.get(name, 1)
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken[name] = number
    taken.setdefault(free, 1)
    return free


# ---------------------------------------------------------------- files and data sets to raw rows


def is_file_name(spec: str) -> bool:
    """Tells the name of a file from that of a data set, by its end."""
    return Path(spec).suffix in FILE_SUFFIXES


def read_raw(spec: str) -> Iterator[tuple[str, Any]]:
    """Yields (where, raw row) for every row of a file or a data set.

    `where` is for messages: FILE:LINE, or whatever else leads to the row. A raw row is not checked
    yet: in a file it can be anything that JSON can say.
    """
    if is_file_name(spec):
        return read_file(Path(spec))
    return read_hub(spec)


def read_hub(spec: str) -> Iterator[tuple[str, dict]]:
    """Yields (where, raw row) of a data set folder or a Hub id, with the `datasets` library.

    NAME:SPLIT reads that split, NAME the one called train.
    """
    import datasets

    datasets.disable_progress_bars()  # on stderr, where one clear line is promised
    name, _, split = spec.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as fault:
        job.die(
            f"{spec}: neither a .jsonl/.json/.parquet file nor a data set that can be loaded "
            f"({job.first_line(fault)})"
        )
    for number, raw in enumerate(data, 1):
        yield f"{spec}: row {number}", raw


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where, raw row) of a .parquet file, of a .json file that is one list, or of lines."""
    if not path.is_file():
        job.die(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from read_parquet(path)
        return

    text = read_text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from read_list(path, text)
    else:
        yield from read_lines(path, text)


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path)
    except Exception as fault:
        job.die(f"{path}: not a parquet file ({job.first_line(fault)})")
    for number, raw in enumerate(columns.to_pylist(), 1):
        yield f"{path}: row {number}", raw


def read_text(path: Path) -> str:
    """Returns the text of a file, or ends the program if it is binary or not UTF-8."""
    data = path.read_bytes()
    if b"\0" in data:
        job.die(f"{path}: a binary file, not JSON lines")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        byte = fault.object[fault.start]
        job.die(f"{path}:{line}: not valid UTF-8 (byte {byte:#04x})")


def read_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(text)
    except UNREADABLE as fault:
        line = getattr(fault, "lineno", 1)
        job.die(f"{path}:{line}: broken JSON ({getattr(fault, 'msg', fault)})")
    for number, raw in enumerate(items, 1):
        yield f"{path}: item {number}", raw


def read_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Only "\n" ends a line: str.splitlines would cut texts at U+2028 and its like.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except UNREADABLE as fault:
            job.die(f"{where}: broken JSON ({getattr(fault, 'msg', fault)})")
        yield where, raw


# ---------------------------------------------------------------- a raw row to a row


def normalise(raw: Any, need: str) -> dict:
    """Turns a raw row of any known shape into a row, which gets its id elsewhere.

    Returns "prompt", the answers that `need` asks for, and "meta". A ValueError says what is wrong
    with the raw row; up to its first colon it is the reason under which the row is counted.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, found {type(raw).__name__}")

    # 1. Find the columns.
    context, sides = pick_columns(raw, need)

    # 2. Cut each side into prompt and answer: a side may bring its own prompt.
    prompt = context
    prompts = []
    answers = {}
    for name, side in sides.items():
        prompt, answers[name] = split_answer(context, side)
        prompts.append(prompt)
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise ValueError("chosen and rejected have different prompts")

    # 3. The prompt must be a conversation that waits for an answer, and no text may be empty.
    check_conversation(prompt)
    for answer in answers.values():
        if not answer.strip():
            raise ValueError("empty response")

    # 4. Every text must be one that can be written to a file and tokenised.
    texts = [message["content"] for message in prompt]
    texts.extend(answers.values())
    for text in texts:
        if has_lone_surrogate(text):
            raise ValueError("not valid Unicode: half of a surrogate pair")

    return {"prompt": prompt, **answers, "meta": raw.get("meta") or {}}


def pick_columns(raw: dict, need: str) -> tuple[list[dict] | None, dict]:
    """Finds the prompt and the sides of a raw row, whatever its columns are called.

    Returns the messages of the prompt, or None if only the sides have one, and the sides that
    `need` asks for, by name; a side is what stands in its column. Raises ValueError if one is
    missing.
    """
    question = first_of(raw, "prompt", "question", "instruction")
    response = first_of(raw, "response", "completion", "output", "answer")
    chosen = first_of(raw, "chosen", "real")
    rejected = first_of(raw, "rejected", "generated")
    if raw.get("instruction") is not None and raw.get("input"):
        question = f"{raw['instruction']}\n\n{raw['input']}"

    context = None
    if question is not None:
        context = turns(question)
    has_answer = response is not None or chosen is not None
    if need != "pair" and not has_answer and raw.get("messages"):
        context, response = first_exchange(turns(raw["messages"]))

    if need == "pair":
        sides = {"chosen": chosen, "rejected": rejected}
        is_missing = chosen is None or rejected is None
    elif need == "response":
        sides = {"response": chosen if response is None else response}
        is_missing = sides["response"] is None
    else:
        if chosen is not None:
            context, _ = split_answer(context, chosen)
        sides = {}
        is_missing = context is None

    if is_missing:
        raise ValueError(
            f"columns {sorted(raw)} make no {need}; expected one of {SHAPES}, "
            'for example {"prompt": "Sort: b a", "response": "a b"}'
        )
    return context, sides


def first_of(raw: dict, *columns: str) -> Any:
    """Returns the value of the first of these columns that is there and not null, or None."""
    for column in columns:
        if raw.get(column) is not None:
            return raw[column]
    return None


def first_exchange(talk: list[dict]) -> tuple[list[dict], str | None]:
    """Returns the turns before the assistant's first one, and that one's text or None.

    This is how SPIN and DNPO use the long conversations of UltraChat.
    """
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            return talk[:i], message["content"]
    return talk, None


def split_answer(context: list[dict] | None, side: Any) -> tuple[list[dict], str]:
    """Splits a side into its prompt and its answer.

    A text is an answer to `context`, and so is what begins with the assistant's turn. A
    conversation that begins with another turn brings its own prompt.
    """
    if isinstance(side, str) and not is_dialogue(side):
        if context is None:
            raise ValueError(f"columns: an answer without a prompt; expected one of {SHAPES}")
        return context, side

    talk = turns(side)
    prompt = talk[:-1]
    answer = talk[-1]
    if answer["role"] != "assistant":
        raise ValueError("roles out of order: the last turn of an answer must be the assistant's")
    if talk[0]["role"] == "assistant" and context is not None:
        prompt = context + prompt
    return prompt, answer["content"]


def turns(value: Any) -> list[dict]:
    """Returns the messages that a text or a list of messages holds; raises ValueError for others.

    A text is one turn of the user, unless it is a dialogue in the format of HH-RLHF.
    """
    if isinstance(value, str):
        if is_dialogue(value):
            return dialogue_turns(value)
        return [{"role": "user", "content": value}]

    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise ValueError('a prompt or response must be text or a list of {"role", "content"}')
    return [{"role": message["role"], "content": message["content"]} for message in value]


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and isinstance(value.get("content"), str)


def is_dialogue(text: str) -> bool:
    """Tells a dialogue as HH-RLHF writes it from a text that quotes one further down."""
    return text.startswith("\n\nHuman:")


def dialogue_turns(text: str) -> list[dict]:
    """Returns the messages of such a dialogue. A last "Assistant:" without a text is left out."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = re.split(r"\n\n(Human|Assistant):", text)  # "", then a name and a text in turn
    messages = []
    for name, said in zip(parts[1::2], parts[2::2]):
        messages.append({"role": roles[name], "content": said.strip()})

    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def check_conversation(prompt: list[dict]):
    """Raises ValueError if a turn is empty or in the wrong place."""
    roles = [message["role"] for message in prompt]
    talk = list(roles)
    if talk and talk[0] == "system":
        talk.pop(0)
    if talk != ["user", "assistant"] * (len(talk) // 2) + ["user"]:
        raise ValueError(
            f"roles out of order: {roles} "
            "(an optional system turn, then user and assistant in turn, user last)"
        )
    for message in prompt:
        if not message["content"].strip():
            raise ValueError("empty prompt")


def has_lone_surrogate(text: str) -> bool:
    """Tells whether a text holds half of a surrogate pair: JSON can write it, UTF-8 cannot."""
    return re.search("[\ud800-\udfff]", text) is not None
