"""Data files to rows: data come in many shapes, the scripts know one.

A row is a dict. Its texts are plain strings, and not a character of them is changed (but for the
blanks around the turns of HH-RLHF's dialogues):

    "id"        a string: another one for every row, the same in every run
    "prompt"    a list of messages {"role", "content"}: perhaps a system turn, then user and
                assistant in turn, the user last
    "response"  the answer to it, or, where two answers are compared,
    "chosen"    the better and
    "rejected"  the worse one
    "meta"      a dict of whatever else is known

The shapes in which raw rows are understood are described in SHAPES. The rows may be in a .jsonl,
.json or .parquet file, in a data set folder, or in a data set on the Hub; .jsonl.gz and the like
are read as they come.

The module can be used alone, for example to see whether a file is fit to train on:

    import datafiles

    rows, dropped = datafiles.load_rows("pairs.jsonl", "pair")

A row whose content is faulty is left out and counted. Data that are damaged, of a wrong kind, or
faulty in more than a tenth of their rows end the program with one line, which names the file, the
line in it and the fault. Nothing here knows a model, a tokenizer or a method.
"""

import codecs
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import job

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")

# A larger share of rows that can't be used ends the program: the data are not what was meant.
FAULTY_SHARE = 0.1

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


class WrongKind(ValueError):
    """A fault that other rows will have, too, or that would change what is trained."""


class Disagreement(ValueError):
    """Columns of a row that contradict each other: nobody can tell which one is meant."""


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
    `data` were left out, by reason. A prompt that is held out is not trained on.
    """
    if test:
        rows, dropped = load_rows(data, need, limit)
        held, _ = load_rows(test, test_need or need, n_test)
        held_prompts = {job.seed_of(row["prompt"]) for row in held}
        train = [row for row in rows if job.seed_of(row["prompt"]) not in held_prompts]
        if not train:
            job.die(f"{data}: every prompt is in the held-out data, too: {test}")
        dropped["prompts that are in --test, too"] = len(rows) - len(train)
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

    Returns the rows, and how many were left out, by reason. The first three that are faulty are
    named on the console. What ends the program: more than a tenth of them, a WrongKind, in a file,
    which can be mended, a Disagreement too, and a first row without a value where it needs one.
    """
    rows = []
    seen = set()  # (name in the data, digest of the content) of each row
    taken = {}  # ids of the rows, and where their free names begin
    dropped = Counter()
    faults = []  # where and what
    read = 0

    for read, (where, raw) in enumerate(read_raw(spec), 1):
        try:
            row = normalise(raw, need)
        except UNREADABLE as fault:
            fatal = (WrongKind, Disagreement) if is_file_name(spec) else WrongKind
            if isinstance(fault, fatal) or (read == 1 and str(fault).endswith("is null")):
                job.die(f"{where}: {fault}")
            kind = str(fault).split(":")[0]
            dropped[kind] += 1
            faults.append(f"{where}: {fault}")
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

    report_faults(spec, faults, read)
    if not rows:
        message = f"{spec}: no rows"
        for reason, number in dropped.items():
            message += f"; {number} left out: {reason}"
        job.die(message)
    return rows, dropped


def report_faults(spec: str, faults: list[str], read: int):
    """Names the first three rows that were left out; too large a share ends the program."""
    if len(faults) > FAULTY_SHARE * read:
        job.die(
            f"{spec}: {len(faults)} of {read} rows can't be used, more than {FAULTY_SHARE:.0%}: "
            + "; ".join(faults[:3])
        )
    for fault in faults[:3]:
        job.say_once(f"left out: {fault}")


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
    return kind_of_file(Path(spec)) in FILE_SUFFIXES


def kind_of_file(path: Path) -> str:
    """Returns the suffix of a file's name, without that of its packing."""
    if path.suffix in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix


def check_files(config):
    """Ends the program for a file of data that isn't there; the toy world's are made later."""
    for name in ("data", "test", "verdicts"):
        spec = getattr(config, name, None) or ""
        made_later = spec.startswith("runs/toy/")
        if is_file_name(spec) and not made_later and not Path(spec).is_file():
            job.die(f"{spec}: no such file")


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
    if kind_of_file(path) == ".json" and text.lstrip().startswith("["):
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
    data = unpacked(path)
    if b"\0" in data:
        job.die(f"{path}: a binary file, not JSON lines")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        byte = fault.object[fault.start]
        job.die(f"{path}:{line}: not valid UTF-8 (byte {byte:#04x})")


def unpacked(path: Path) -> bytes:
    """Returns the bytes of a file, out of gzip or zstd if its name ends so."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".zst":
            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(data).read()
    except ImportError:
        job.die(f"{path}: to read .zst: pip install zstandard (or unpack it)")
    except Exception as fault:
        job.die(f"{path}: damaged, or not a {path.suffix} file ({job.first_line(fault)})")
    return data


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
        raise WrongKind(f"expected an object, found {type(raw).__name__}")
    check_columns(raw, need)

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
    prompt = with_system(raw, prompt)

    # 3. The prompt must be a conversation that waits for an answer, and no text may be empty.
    check_conversation(prompt)
    for name, answer in answers.items():
        if not answer.strip():
            raise ValueError(f"empty response: column {sides[name].column!r}")

    meta = raw.get("meta") or {}
    if not isinstance(meta, dict):
        meta = {"meta": meta}
    # parquet gives a field that one row has to all others, as null
    meta = {name: value for name, value in meta.items() if value is not None}
    if not are_lists_of_ids(meta.get("sampled_ids", [])):
        raise ValueError("meta.sampled_ids: expected lists of token ids")
    row = {"prompt": prompt, **answers, "meta": meta}

    # 4. Every text, the id's too, must be one that can be written to a file and tokenised.
    written = json.dumps([name_in_data(raw, ""), row], ensure_ascii=False, default=str)
    if has_lone_surrogate(written):
        raise ValueError("not valid Unicode: half of a surrogate pair")
    return row


class Cell(NamedTuple):
    """The value of a row, and the column that it is in."""

    column: str
    value: Any


# columns that would change the prompt, or the label where they are false
NOT_UNDERSTOOD = (
    *("history", "context", "documents", "image", "images"),
    *("tools", "functions", "tool_calls"),
)
LABELS = ("label", "kto_tag")

QUESTIONS = ("prompt", "question", "instruction")
ANSWERS = ("response", "completion", "output", "answer")
CHOSEN = ("chosen", "real")
REJECTED = ("rejected", "generated")


def check_columns(raw: dict, need: str):
    """Raises WrongKind for a column that would change the prompt or the label, and has a value."""
    for column in NOT_UNDERSTOOD:
        if raw.get(column):
            not_understood(column)
    question, extra = first_of(raw, *QUESTIONS), first_of(raw, "input")
    if question and extra and "instruction" not in raw and extra.value != question.value:
        not_understood("input")  # Alpaca's goes with an instruction

    for column in LABELS:
        if need != "prompt" and raw.get(column) in (False, 0):
            raise WrongKind(
                f"column {column!r} is {json.dumps(raw[column])}: an answer that nobody should "
                "give can only be the rejected one of a pair"
            )


def not_understood(column: str) -> NoReturn:
    raise WrongKind(
        f"column {column!r} would change the prompt and is not understood: "
        "put it into the prompt's messages, or leave the column out"
    )


def pick_columns(raw: dict, need: str) -> tuple[list[dict] | None, dict[str, Cell]]:
    """Finds the prompt and the sides of a raw row, whatever its columns are called.

    Returns the messages of the prompt, or None if only the sides have one, and the sides that
    `need` asks for, by name. Raises WrongKind if a column is missing, ValueError if it is null.
    """
    response, chosen = first_of(raw, *ANSWERS), first_of(raw, *CHOSEN)
    if need == "pair" or chosen or (response and not has_answer(raw)):
        context, said = find_prompt(raw), None
    else:
        context, said = find_exchange(raw, need)
    if need == "response" and response and said and response.value != said.value:
        raise Disagreement(
            f"the messages' answer is not that of column {response.column!r}: leave one out"
        )

    if need == "pair":
        sides = {"chosen": chosen, "rejected": first_of(raw, *REJECTED)}
        columns = {"chosen": CHOSEN, "rejected": REJECTED}
    elif need == "response":
        sides = {"response": response or chosen or said}
        columns = {"response": (*ANSWERS, *CHOSEN, "messages")}
    else:
        if chosen:
            context, _ = split_answer(context, chosen)
        sides = {}
        columns = {}
    for name, side in sides.items():
        if side is None:
            raise missing(raw, need, "response", columns[name])

    brings_prompt = [brings_own_prompt(side.value) for side in sides.values()]
    if context is None and not any(brings_prompt):
        raise missing(raw, need, "prompt", (*QUESTIONS, "messages"))
    return context, sides


def has_answer(raw: dict) -> bool:
    """Whether the messages column has an answer, too."""
    messages = raw.get("messages")
    return bool(messages) and turns(messages, "messages")[-1]["role"] == "assistant"


def find_exchange(raw: dict, need: str) -> tuple[list[dict] | None, Cell | None]:
    """Returns the messages of the prompt, and their answer if the messages column has both.

    Where a prompt alone is needed, messages that wait for an answer are one as they are.
    """
    if not raw.get("messages"):
        return find_prompt(raw), None
    messages = turns(raw["messages"], "messages")
    if need == "prompt" and messages[-1]["role"] == "user":
        return messages, None
    prompt, said = first_exchange(messages)
    return prompt, None if said is None else Cell("messages", said)


def find_prompt(raw: dict) -> list[dict] | None:
    """Returns the messages of the prompt, if a column of its own has one.

    Those of the messages column are one if they wait for an answer.
    """
    question = first_of(raw, *QUESTIONS)
    extra = first_of(raw, "input")
    if question and question.column == "instruction" and extra:
        if not isinstance(extra.value, str):
            raise ValueError("no text: column 'input'")
        return turns(f"{question.value}\n\n{extra.value}", "input")
    if question:
        return without_open_turn(turns(question.value, question.column))
    if raw.get("messages"):
        messages = turns(raw["messages"], "messages")
        if messages[-1]["role"] == "user":
            return messages
    return None


def brings_own_prompt(side: Any) -> bool:
    """Whether a side is a conversation with its prompt, or part of one."""
    return not isinstance(side, str) or is_dialogue(side)


def missing(raw: dict, need: str, what: str, columns: tuple[str, ...]) -> ValueError:
    """The fault of a row that has no value in any of these columns."""
    for column in columns:
        if column in raw:
            state = "is null" if raw[column] is None else f"has no {what}"
            return ValueError(f"empty {what}: column {column!r} {state}")
    found = f"columns {sorted(raw)} make no {need}"
    if what == "prompt" and need != "prompt":
        found = f"columns {sorted(raw)}: an answer without a prompt"
    return WrongKind(
        f"{found}; expected one of {SHAPES}, "
        'for example {"prompt": "Sort: b a", "response": "a b"}'
    )


def first_of(raw: dict, *columns: str) -> Cell | None:
    """Returns the first of these columns that holds something, or None.

    A null, a NaN, which pandas writes for it, and an empty or blank text are nothing.
    """
    for column in columns:
        value = raw.get(column)
        blank = isinstance(value, str) and not value.strip()
        if value is not None and value == value and not blank:
            return Cell(column, value)
    return None


def with_system(raw: dict, prompt: list[dict]) -> list[dict]:
    """Returns the prompt with the system turn that a column of its own holds."""
    cell = first_of(raw, "system", "system_prompt")
    if cell is None:
        return prompt
    if not isinstance(cell.value, str):
        raise ValueError(f"no text: column {cell.column!r}")
    turn = {"role": "system", "content": cell.value}
    if prompt[:1] == [turn]:
        return prompt
    if prompt and prompt[0]["role"] == "system":
        raise Disagreement(f"two system turns: column {cell.column!r} and the prompt's")
    return [turn, *prompt]


def first_exchange(talk: list[dict]) -> tuple[list[dict], str | None]:
    """Returns the turns before the assistant's first one, and that one's text or None.

    This is how SPIN and DNPO use the long conversations of UltraChat.
    """
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            return talk[:i], message["content"]
    return talk, None


def split_answer(context: list[dict] | None, side: Cell) -> tuple[list[dict], str]:
    """Splits a side into its prompt and its answer.

    A text is an answer to `context`, and so is what begins with the assistant's turn. A
    conversation that begins with another turn brings its own prompt, which must be `context` if
    there is one, or hold it as one of the user's turns.
    """
    if not brings_own_prompt(side.value):
        return context, side.value

    talk = turns(side.value, side.column)
    prompt, answer = talk[:-1], talk[-1]
    if answer["role"] != "assistant":
        raise ValueError("roles out of order: the last turn of an answer must be the assistant's")
    if context is None:
        return prompt, answer["content"]
    if talk[0]["role"] == "assistant":
        return context + prompt, answer["content"]

    said = [turn["content"].strip() for turn in prompt if turn["role"] == "user"]
    in_part = len(context) == 1 and context[0]["content"].strip() in said
    if prompt != context and not (in_part and context[0]["role"] == "user"):
        raise Disagreement(
            f"the prompt and the beginning of column {side.column!r} are different: "
            "a turn of one of them would be lost"
        )
    return prompt, answer["content"]


def turns(value: Any, column: str = "prompt") -> list[dict]:
    """Returns the messages that a text, a message or a list of them holds; `column` has it.

    A text is one turn of the user, unless it is a dialogue in the format of HH-RLHF.
    """
    if isinstance(value, str):
        if is_dialogue(value):
            return dialogue_turns(value)
        return [{"role": "user", "content": value}]

    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise ValueError(
            f'neither text nor a list of {{"role", "content"}} with text in it: column {column!r}'
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("tool_calls"):
        return False
    return "role" in value and isinstance(value.get("content"), str)


def is_dialogue(text: str) -> bool:
    """Tells a dialogue as HH-RLHF writes it from a text that quotes one further down."""
    return text.startswith("\n\nHuman:")


def dialogue_turns(text: str) -> list[dict]:
    """Returns the messages of such a dialogue."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = re.split(r"\n\n(Human|Assistant):", text)  # "", then a name and a text in turn
    messages = []
    for name, said in zip(parts[1::2], parts[2::2]):
        messages.append({"role": roles[name], "content": said.strip()})
    return messages


def without_open_turn(prompt: list[dict]) -> list[dict]:
    """The messages without a last turn of the assistant that is empty: it waits for its text."""
    if prompt[-1] == {"role": "assistant", "content": ""}:
        return prompt[:-1]
    return prompt


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


def are_lists_of_ids(value: Any) -> bool:
    """Whether a value is a list of lists of whole numbers."""
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        return False
    return all(isinstance(token, int) for ids in value for token in ids)


def has_lone_surrogate(text: str) -> bool:
    """Tells whether a text holds half of a surrogate pair: JSON can write it, UTF-8 cannot."""
    return re.search("[\ud800-\udfff]", text) is not None
