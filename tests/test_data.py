"""Every shape of data becomes the same rows with stable ids.

Bad input ends in one line, exit code 2, before any model is loaded.
"""

import dataclasses
import gzip
import json
import math
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import dnpo_flags, script

import common
import datafiles
import dnpo
import generate
import job
import toy

PRESETS = {"toy": dnpo.TOY, "paper": {}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# ---------------------------------------------------------------- every shape of data


TALK = [user("a"), assistant("b"), user("c")]


class Shape(NamedTuple):
    need: str
    found: list[dict]  # rows as they are found
    expected: list[dict]  # rows as they must come out, without id


SHAPES = {
    "ultrachat: messages, the first exchange": Shape(
        need="response",
        found=[
            {
                "prompt": "hi",
                "prompt_id": "p1",
                "messages": [user("hi"), assistant("hello"), user("more"), assistant("no")],
            },
            {
                "prompt": "2+2?",
                "prompt_id": "p2",
                "messages": [system("be brief"), user("2+2?"), assistant("4")],
            },
        ],
        expected=[
            {"prompt": [user("hi")], "response": "hello", "meta": {}},
            {"prompt": [system("be brief"), user("2+2?")], "response": "4", "meta": {}},
        ],
    ),
    "ultrafeedback_binarized: a text prompt beside whole conversations": Shape(
        need="pair",
        found=[
            {
                "prompt": "hi",
                "prompt_id": "p1",
                "chosen": [user("hi"), assistant("good")],
                "rejected": [user("hi"), assistant("bad")],
                "messages": [user("hi"), assistant("good")],
                "score_chosen": 8.0,
                "score_rejected": 3.0,
            },
            {
                "prompt": "a",
                "prompt_id": "p2",
                "chosen": [*TALK, assistant("d")],
                "rejected": [*TALK, assistant("e")],
                "messages": [*TALK, assistant("d")],
                "score_chosen": 7.5,
                "score_rejected": 7.0,
            },
        ],
        expected=[
            {"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}},
            {"prompt": TALK, "chosen": "d", "rejected": "e", "meta": {}},
        ],
    ),
    "trl: explicit prompt": Shape(
        need="pair",
        found=[
            {
                "prompt": [system("s"), *TALK],
                "chosen": [assistant("good")],
                "rejected": [assistant("bad")],
            }
        ],
        expected=[
            {"prompt": [system("s"), *TALK], "chosen": "good", "rejected": "bad", "meta": {}}
        ],
    ),
    "trl: implicit prompt, with the conversation beside it": Shape(
        need="pair",
        found=[
            {
                "chosen": [*TALK, assistant("good")],
                "rejected": [*TALK, assistant("bad")],
                "messages": [*TALK, assistant("good")],
            }
        ],
        expected=[{"prompt": TALK, "chosen": "good", "rejected": "bad", "meta": {}}],
    ),
    "spin: real and generated": Shape(
        need="pair",
        found=[
            {"real": [user("hi"), assistant("good")], "generated": [user("hi"), assistant("bad")]}
        ],
        expected=[{"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}}],
    ),
    "texts: prompt, chosen, rejected": Shape(
        need="pair",
        found=[{"prompt": "hi", "chosen": "good", "rejected": "bad"}],
        expected=[{"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}}],
    ),
    "hh-rlhf: single and multi turn": Shape(
        need="pair",
        found=[
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: hello",
                "rejected": "\n\nHuman: hi\n\nAssistant: go away",
            },
            {
                "chosen": "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant: d\n\ne",
                "rejected": "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant: f",
            },
        ],
        expected=[
            {"prompt": [user("hi")], "chosen": "hello", "rejected": "go away", "meta": {}},
            {
                "prompt": [user("a?"), assistant("b."), user("c?")],
                "chosen": "d\n\ne",
                "rejected": "f",
                "meta": {},
            },
        ],
    ),
    "alpaca: with and without input": Shape(
        need="response",
        found=[
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Say hi.", "input": "", "output": "hi"},
        ],
        expected=[
            {"prompt": [user("Add.\n\n1 2")], "response": "3", "meta": {}},
            {"prompt": [user("Say hi.")], "response": "hi", "meta": {}},
        ],
    ),
    "prompt and response, our own file": Shape(
        need="response",
        found=[
            {
                "id": "r1",
                "prompt": [system("s"), user("hi")],
                "response": "hello",
                "meta": {"finish": "stop"},
            },
            {"id": "r2", "prompt": [user("ha")], "response": "hu", "meta": {"finish": "length"}},
        ],
        expected=[
            {"prompt": [system("s"), user("hi")], "response": "hello", "meta": {"finish": "stop"}},
            {"prompt": [user("ha")], "response": "hu", "meta": {"finish": "length"}},
        ],
    ),
    "prompt and completion": Shape(
        need="response",
        found=[{"prompt": "1+1=", "completion": "2"}],
        expected=[{"prompt": [user("1+1=")], "response": "2", "meta": {}}],
    ),
    "prompt and completion, as messages": Shape(
        need="response",
        found=[{"prompt": [user("1+1=")], "completion": [assistant("2")]}],
        expected=[{"prompt": [user("1+1=")], "response": "2", "meta": {}}],
    ),
    "gsm8k: question and answer": Shape(
        need="response",
        found=[{"question": "1+1?", "answer": "#### 2"}],
        expected=[{"prompt": [user("1+1?")], "response": "#### 2", "meta": {}}],
    ),
    "a column for the system turn": Shape(
        need="pair",
        found=[
            {"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"},
            {"system": "", "prompt": "a", "chosen": "b", "rejected": "c"},
            {
                "system": "s",
                "prompt": "q",
                "chosen": "\n\nHuman: q\n\nAssistant: d",
                "rejected": "\n\nHuman: q\n\nAssistant: e",
            },
        ],
        expected=[
            {"prompt": [system("s"), user("a")], "chosen": "b", "rejected": "c", "meta": {}},
            {"prompt": [user("a")], "chosen": "b", "rejected": "c", "meta": {}},
            {"prompt": [system("s"), user("q")], "chosen": "d", "rejected": "e", "meta": {}},
        ],
    ),
    "a column for the system turn beside conversations that have it": Shape(
        need="response",
        found=[{"system_prompt": "s", "messages": [system("s"), user("a"), assistant("b")]}],
        expected=[{"prompt": [system("s"), user("a")], "response": "b", "meta": {}}],
    ),
    "messages as the prompt of a pair": Shape(
        need="pair",
        found=[{"messages": TALK, "chosen": "d", "rejected": "e"}],
        expected=[{"prompt": TALK, "chosen": "d", "rejected": "e", "meta": {}}],
    ),
    "a side that is one message": Shape(
        need="pair",
        found=[{"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}],
        expected=[{"prompt": [user("a")], "chosen": "b", "rejected": "c", "meta": {}}],
    ),
    "meta that is no object": Shape(
        need="response",
        found=[{"prompt": "a", "response": "b", "meta": "mine"}],
        expected=[{"prompt": [user("a")], "response": "b", "meta": {"meta": "mine"}}],
    ),
    "columns that say nothing": Shape(
        need="response",
        found=[{"prompt": "a", "response": "b", "history": [], "tools": None, "label": True}],
        expected=[{"prompt": [user("a")], "response": "b", "meta": {}}],
    ),
    "prompts only, texts; not a character is changed": Shape(
        need="prompt",
        found=[{"prompt": "hi"}, {"prompt": " \u00e4\u2028<eos>\u0085 \U0001f600\n"}],
        expected=[
            {"prompt": [user("hi")], "meta": {}},
            {"prompt": [user(" \u00e4\u2028<eos>\u0085 \U0001f600\n")], "meta": {}},
        ],
    ),
    "prompts only, messages": Shape(
        need="prompt",
        found=[{"prompt": [system("s"), user("hi")]}],
        expected=[{"prompt": [system("s"), user("hi")], "meta": {}}],
    ),
    "prompts only, hh-rlhf": Shape(
        need="prompt",
        found=[{"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}],
        expected=[{"prompt": TALK, "meta": {}}],
    ),
    "prompts only, messages that wait for an answer, or have one": Shape(
        need="prompt",
        found=[
            {"messages": TALK},
            {"messages": [system("s"), *TALK]},
            {"messages": [system("s"), *TALK, assistant("d")]},
        ],
        expected=[
            {"prompt": TALK, "meta": {}},
            {"prompt": [system("s"), *TALK], "meta": {}},
            {"prompt": [system("s"), user("a")], "meta": {}},
        ],
    ),
    "a prompt beside alpaca's columns": Shape(
        need="response",
        found=[{"prompt": "p", "instruction": "Add.", "input": "1 2", "output": "3"}],
        expected=[{"prompt": [user("p")], "response": "3", "meta": {}}],
    ),
    "sides that go on for several turns": Shape(
        need="pair",
        found=[
            {
                "prompt": "q",
                "chosen": [assistant("a"), user("u"), assistant("good")],
                "rejected": [assistant("a"), user("u"), assistant("bad")],
            }
        ],
        expected=[
            {
                "prompt": [user("q"), assistant("a"), user("u")],
                "chosen": "good",
                "rejected": "bad",
                "meta": {},
            }
        ],
    ),
    "a prompt that differs from its sides in the blanks around it": Shape(
        need="pair",
        found=[
            {
                "prompt": " hi\n",
                "chosen": [user("hi"), assistant("good")],
                "rejected": [user("hi"), assistant("bad")],
            },
            {
                "prompt": "hi",
                "chosen": [user("\nhi "), assistant("good")],
                "rejected": [user("\nhi "), assistant("bad")],
            },
        ],
        expected=[
            {"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}},
            {"prompt": [user("\nhi ")], "chosen": "good", "rejected": "bad", "meta": {}},
        ],
    ),
}


def lines(rows) -> str:
    """Rows as the text of a .jsonl file."""
    text = ""
    for row in rows:
        text += json.dumps(row, ensure_ascii=False) + "\n"
    return text


def stored(folder, kind, rows) -> str:
    """Writes rows as users bring them and returns what to give as --data.

    `kind` is jsonl, json (a list), parquet, or folder (one that `datasets` loads).
    """
    path = folder / f"data.{kind}"
    if kind == "folder":
        path.mkdir()
        (path / "train.jsonl").write_text(lines(rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text(lines(rows))
    return str(path)


def jsonl(folder, *rows) -> str:
    return stored(folder, "jsonl", rows)


def without_ids(rows):
    """Copies of the rows, without their ids."""
    copies = [dict(row) for row in rows]
    for row in copies:
        del row["id"]
    return copies


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """What `datasets` caches goes where the test's files go."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_container_becomes_the_same_rows(shape, tmp_path):
    """All four containers give the rows written here by hand, with the same ids, none left out."""
    need, found, expected = SHAPES[shape]
    ids = set()
    for kind in ("jsonl", "json", "parquet", "folder"):
        rows, dropped = datafiles.load_rows(stored(tmp_path, kind, found), need)
        ids.add(tuple(row["id"] for row in rows))
        assert without_ids(rows) == expected, kind
        assert not dropped, kind
    assert len(ids) == 1


def test_a_pair_is_read_as_a_response_by_its_chosen_side_and_as_a_prompt_by_neither(tmp_path):
    """need="response" takes chosen or real, whole; need="prompt" takes neither answer."""
    for name, shape in SHAPES.items():
        if shape.need != "pair":
            continue
        path = jsonl(tmp_path, *shape.found)
        answered = []
        unanswered = []
        for row in shape.expected:
            prompt = row["prompt"]
            answered.append({"prompt": prompt, "response": row["chosen"], "meta": {}})
            unanswered.append({"prompt": prompt, "meta": {}})

        rows, _ = datafiles.load_rows(path, "response")
        assert without_ids(rows) == answered, name
        rows, _ = datafiles.load_rows(path, "prompt")
        assert without_ids(rows) == unanswered, name


def test_a_text_that_quotes_a_dialogue_loses_nothing(tmp_path):
    """Only a text that begins as HH-RLHF's is split: "Assistant:" further down is part of it."""
    prompt = "Continue this script:\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye"
    response = "Here it is:\n\nAssistant: good bye"
    path = jsonl(tmp_path, {"prompt": prompt, "response": response})
    (row,), _ = datafiles.load_rows(path, "response")
    assert row["prompt"] == [user(prompt)]
    assert row["response"] == response


def test_a_line_may_end_as_on_windows_and_a_file_may_end_without_one(tmp_path):
    """\\r\\n, blank lines and a missing last newline change nothing."""
    path = tmp_path / "x.jsonl"
    first = b'{"prompt": "a", "response": "b"}'
    second = b'{"prompt": "c", "response": "d"}'
    path.write_bytes(first + b"\r\n\r\n" + second)
    rows, _ = datafiles.load_rows(str(path), "response")
    assert without_ids(rows) == [
        {"prompt": [user("a")], "response": "b", "meta": {}},
        {"prompt": [user("c")], "response": "d", "meta": {}},
    ]


def test_a_split_is_named_after_a_colon(tmp_path):
    """FOLDER:test reads the test split, FOLDER the training split."""
    folder = tmp_path / "d"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(lines([{"prompt": split}]))
    for suffix, split in (("", "train"), (":train", "train"), (":test", "test")):
        rows, _ = datafiles.load_rows(f"{folder}{suffix}", "prompt")
        assert [row["prompt"] for row in rows] == [[user(split)]]


def test_limit_takes_the_first_rows(tmp_path):
    """limit=2 of three rows: the first two in the file's order; a fault behind them is not seen."""
    path = jsonl(tmp_path, {"prompt": "c"}, {"prompt": "a"}, {"nothing": 1})
    rows, _ = datafiles.load_rows(path, "prompt", limit=2)
    assert [row["prompt"] for row in rows] == [[user("c")], [user("a")]]


def test_columns_that_hold_nothing_change_nothing(tmp_path):
    """A NaN, as pandas writes a gap, a blank text, a null, an empty list; the next one counts."""
    path = jsonl(
        tmp_path,
        {"instruction": "Add.", "input": math.nan, "output": "3"},
        {"instruction": "Add.", "input": " \n", "response": "", "output": "4"},
        {"prompt": "a", "system": "", "system_prompt": "s", "response": "b", "context": None},
        {"prompt": "c", "input": "c", "response": "d", "images": [], "label": 1, "kto_tag": True},
    )
    rows, _ = datafiles.load_rows(path, "response")
    assert without_ids(rows) == [
        {"prompt": [user("Add.")], "response": "3", "meta": {}},
        {"prompt": [user("Add.")], "response": "4", "meta": {}},
        {"prompt": [system("s"), user("a")], "response": "b", "meta": {}},
        {"prompt": [user("c")], "response": "d", "meta": {}},
    ]


def test_an_answer_may_stand_in_a_column_and_in_the_messages(tmp_path):
    """The same one, or one to messages that wait for it; prompts alone don't care."""
    same = {"messages": [user("a"), assistant("b")], "answer": "b"}
    waits = {"messages": [user("a"), assistant("b"), user("c")], "answer": "d"}
    rows, _ = datafiles.load_rows(jsonl(tmp_path, same, waits), "response")
    assert without_ids(rows) == [
        {"prompt": [user("a")], "response": "b", "meta": {}},
        {"prompt": waits["messages"], "response": "d", "meta": {}},
    ]

    other = {"messages": [user("a"), assistant("b")], "answer": "42"}
    (row,), _ = datafiles.load_rows(jsonl(tmp_path, other), "prompt")
    assert row["prompt"] == [user("a")]


# ---------------------------------------------------------------- ids, and the held-out tenth


def ids(folder, *rows) -> list[str]:
    loaded, _ = datafiles.load_rows(jsonl(folder, *rows), "response")
    return [row["id"] for row in loaded]


def test_the_id_is_the_datas_own(tmp_path):
    """`id`, else `prompt_id`, as text."""
    rows = [
        {"id": "x", "prompt_id": "p", "prompt": "a", "response": "b"},
        {"prompt_id": "q", "prompt": "a", "response": "b"},
        {"id": 7, "prompt": "a", "response": "b"},
    ]
    assert ids(tmp_path, *rows) == ["x", "q", "7"]


def test_a_row_without_an_id_is_named_by_its_content(tmp_path):
    """The same prompt and answer have the same id wherever they stand, others another one."""
    a = {"prompt": "p", "response": "a"}
    b = {"prompt": "p", "response": "b"}
    c = {"prompt": "q", "response": "a"}
    id_a, id_b, id_c = ids(tmp_path, a, b, c)
    assert len({id_a, id_b, id_c}) == 3
    assert ids(tmp_path, c, b, a) == [id_c, id_b, id_a]

    b_elsewhere = {
        "completion": "b",
        "prompt": [user("p")],
        "source": "elsewhere",
        "meta": {"score": 1},
    }
    assert ids(tmp_path, b_elsewhere) == [id_b]


def test_an_id_that_is_null_is_no_id(tmp_path):
    """Null, as `datasets` and parquet fill gaps in a column, falls back to the next name."""
    (by_content,) = ids(tmp_path, {"prompt": "a", "response": "b"})
    rows = [
        {"id": None, "prompt": "a", "response": "b"},
        {"id": None, "prompt_id": "q", "prompt": "c", "response": "d"},
    ]
    assert ids(tmp_path, *rows) == [by_content, "q"]


def test_a_null_in_meta_says_nothing(tmp_path):
    """Parquet gives one row's fields to all: an answer of the others is not cut for that."""
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "meta": {"chosen_ended": False}},
        {"prompt": "q", "chosen": "a", "rejected": "b", "meta": {"sampled_ids": [[5]]}},
    ]
    found = {}
    for kind in ("jsonl", "parquet"):
        loaded, _ = datafiles.load_rows(stored(tmp_path, kind, rows), "pair")
        found[kind] = [row["meta"] for row in loaded]
    assert found["jsonl"] == [row["meta"] for row in rows]
    assert found["parquet"] == found["jsonl"]


def test_repeated_rows_are_left_out_and_counted(tmp_path):
    """The same id and content come once; the same content under two ids is two rows."""
    row = {"prompt": "p", "response": "a"}
    named = {"id": "x", "prompt": "p", "response": "a"}
    path = jsonl(tmp_path, row, named, row, named, row)
    rows, dropped = datafiles.load_rows(path, "response")
    assert len(rows) == 2
    assert dict(dropped) == {"repeated rows": 3}


def test_the_same_id_with_other_content_gets_an_id_of_its_own(tmp_path):
    """Two answers under one prompt_id are two rows with two ids, the first as it is in the data."""
    first = {"prompt_id": "x", "prompt": "p", "response": "a"}
    second = {"prompt_id": "x", "prompt": "p", "response": "b"}
    assert ids(tmp_path, first, second) == ["x", "x-2"]


def test_no_two_rows_ever_have_the_same_id(tmp_path):
    """... even where the data's own ids look like the ones we make."""
    rows = [
        {"id": "x-2", "prompt": "p", "response": "a"},
        {"id": "x", "prompt": "p", "response": "b"},
        {"id": "x", "prompt": "p", "response": "c"},
        {"id": "y", "prompt": "p", "response": "d"},
        {"id": "y", "prompt": "p", "response": "e"},
        {"id": "y-2", "prompt": "p", "response": "f"},
    ]
    assert len(set(ids(tmp_path, *rows))) == 6


HELD = ["prompt 0", "prompt 16", "prompt 18", "prompt 24", "prompt 30", "prompt 5"]  # of 0 to 39


def test_the_held_out_tenth_is_the_same_in_any_run_and_any_order():
    """Split by a fixed hash of the prompt: HELD of 40, whatever their answers, ids and order."""
    rows = []
    others = []
    for i in range(40):
        prompt = [user(f"prompt {i}")]
        rows.append({"id": str(i), "prompt": prompt, "response": str(i)})
        others.append({"id": f"x{i}", "prompt": prompt, "response": "other"})

    for some in (rows, rows[::-1], others):
        train, held = datafiles.hold_out(some)
        assert sorted(row["prompt"][0]["content"] for row in held) == HELD
        assert [row for row in some if row in train] == train
        assert len(train) == 40 - len(HELD)


def test_no_prompt_is_on_both_sides_and_about_a_tenth_is_held_out():
    """Of 2000 prompts with two answers each, 8 % to 12 % are held out, none split or lost."""
    rows = []
    for i in range(2000):
        prompt = [user(f"question {i}")]
        rows.append({"id": f"{i}-0", "prompt": prompt, "response": "answer 0"})
        rows.append({"id": f"{i}-1", "prompt": prompt, "response": "answer 1"})

    train, held = datafiles.hold_out(rows)
    train_prompts = {row["prompt"][0]["content"] for row in train}
    held_prompts = {row["prompt"][0]["content"] for row in held}
    assert not train_prompts & held_prompts
    assert len(train) + len(held) == 4000
    assert 320 <= len(held) <= 480


def test_without_test_data_rows_are_held_out_before_the_limit_is_applied(tmp_path):
    """With a limit of 10 the held-out rows still come out of all 40; test data are not split."""
    prompts = [{"prompt": f"prompt {i}"} for i in range(40)]
    path = jsonl(tmp_path, *prompts, {"prompt": "prompt 1"})
    train, held, dropped = datafiles.load_split(path, None, "prompt", limit=10, n_test=20)
    assert len(train) == 10
    assert sorted(row["prompt"][0]["content"] for row in held) == HELD
    assert dict(dropped) == {"repeated rows": 1}

    (tmp_path / "test").mkdir()
    test = jsonl(tmp_path / "test", *[{"prompt": f"other {i}"} for i in range(30)])
    train, held, dropped = datafiles.load_split(path, test, "prompt", limit=10, n_test=20)
    assert [row["prompt"] for row in train] == [[user(f"prompt {i}")] for i in range(10)]
    assert [row["prompt"] for row in held] == [[user(f"other {i}")] for i in range(20)]
    assert not +dropped


def test_a_prompt_that_is_held_out_is_not_trained_on(tmp_path, capsys):
    """Rows that share their prompt with the measured part of --test leave the training side.

    They are counted; if nothing is left, one line says why.
    """
    path = jsonl(tmp_path, *[{"prompt": f"prompt {i}"} for i in range(10)])
    (tmp_path / "test").mkdir()
    shared = [{"prompt": f"prompt {i}"} for i in (3, 5, 7)]
    test = jsonl(tmp_path / "test", {"prompt": "other"}, *shared)
    train, held, dropped = datafiles.load_split(path, test, "prompt", limit=None, n_test=3)
    assert len(held) == 3
    names = [row["prompt"][0]["content"] for row in train]
    assert names == [f"prompt {i}" for i in range(10) if i not in (3, 5)]
    assert dict(dropped) == {"prompts that are in --test, too": 2}

    with pytest.raises(SystemExit):
        datafiles.load_split(path, path, "prompt", limit=5, n_test=10)
    has(capsys.readouterr().err, f"{path}: every prompt is in the held-out data, too: {path}")


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The toy world's files with a context of 64 and a model without weights.

    Whoever reads weights before the checks are done fails.
    """
    folder = tmp_path_factory.mktemp("bare")
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=8,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    config.save_pretrained(folder / "sft")
    toy.tokenizer().save_pretrained(folder / "sft")

    train = ["abcdef", "bcdefg", "cdefgh", "defghi"]
    test = ["hgfedc", "gfedcb"]
    for name, texts in (("train.jsonl", train), ("test.jsonl", test)):
        rows = [{"prompt": text, "response": text} for text in texts]
        (folder / name).write_text(lines(rows))
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test in which a model is loaded, or the toy world made."""

    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr(toy, "make", fail)


def set_flags(monkeypatch, module, flags):
    """What module.main() will find on its command line."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])


@pytest.fixture
def refused(no_weights, monkeypatch, capsys):
    """refused(module, *flags) runs its main, which must end with exit code 2 and one line.

    It returns that line. No model may have been loaded.
    """

    def run(module, *flags):
        set_flags(monkeypatch, module, flags)
        with pytest.raises(SystemExit) as end:
            module.main()
        line = capsys.readouterr().err
        assert end.value.code == 2, line
        assert line.startswith("error: "), line
        assert line.count("\n") == 1, line
        assert line.endswith("\n"), line
        return line

    return run


@pytest.fixture
def printed(no_weights, monkeypatch, capsys):
    """printed(module, *flags) runs its main and returns what it prints. No model may be loaded."""

    def run(module, *flags):
        set_flags(monkeypatch, module, flags)
        module.main()
        return capsys.readouterr().out

    return run


def generate_flags(bare, out, **more) -> list:
    values = {
        "model": bare / "sft",
        "data": bare / "train.jsonl",
        "out": out,
        "max_new_tokens": 16,
    }
    values.update(more)
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", value]
    return flags


def has(line, *words):
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--bete 1", ["--bete"]),
        ("--iter 3", ["--iter"]),
        ("--noise yes", ["yes"]),
        ("stray", ["stray"]),
        ("--batch", ["--batch", "argument"]),
        ("--lr fast", ["--lr", "float", "fast"]),
        ("--batch 1.5", ["--batch", "int", "1.5"]),
        ("--labels gpt", ["--labels", "gpt", "annotation"]),
        ("--lr -1", ["--lr", "above 0", "-1"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--beta 0", ["--beta", "above 0"]),
        ("--batch -8", ["--batch", "-8"]),
        ("--noise_init -0.1", ["--noise_init", "-0.1"]),
        ("--noise_init default", ["--noise_init", "linear", "default"]),
        ("--noise_init nan", ["--noise_init", "linear", "nan"]),
        ("--noise_init inf", ["--noise_init", "linear", "inf"]),
        ("--judge_noise 1.5", ["--judge_noise", "1.5"]),
        ("--judge_noise -0.5", ["--judge_noise", "-0.5"]),
        ("--judge_noise 0.2 --labels annotation", ["--judge_noise", "--labels judge"]),
        ("--iterations -1", ["--iterations", "-1"]),
        ("--temperature -1", ["--temperature", "-1"]),
        ("--noise-penalty -2", ["--noise_penalty", "-2"]),
        ("--limit -5", ["--limit", "-5"]),
        ("--limit 0", ["--limit", "above 0"]),
        ("--max_steps -1", ["--max_steps", "-1"]),
        ("--max_steps 0", ["--max_steps", "0"]),
        ("--labels judge --judge none", ["--labels", "--judge none"]),
    ],
)
def test_a_wrong_flag_is_named(flags, words, refused, bare, tmp_path):
    """Unknown, abbreviated, mistyped, out of range or contradictory: one line names the flag."""
    out = tmp_path / "out"
    has(refused(dnpo, *dnpo_flags(bare, out=out), *flags.split()), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--model=", ["--model", "empty"]),
        ("--out=", ["--out", "empty"]),
        ("--n 0", ["--n", "above 0"]),
        ("--temperature -1", ["--temperature"]),
        ("--max_new 3", ["--max_new"]),
        ("--dtype int8", ["--dtype", "int8", "bfloat16"]),
        ("--limit -1", ["--limit", "-1"]),
        ("--limit 0", ["--limit", "0"]),
        ("--batch -1", ["--batch", "-1"]),
    ],
)
def test_a_wrong_flag_of_generate_is_named(flags, words, refused, bare, tmp_path):
    """The same for generate.py."""
    out = tmp_path / "out.jsonl"
    has(refused(generate, *generate_flags(bare, out), *flags.split()), *words)
    assert not out.exists()


class BadFile(NamedTuple):
    suffix: str
    content: str | bytes
    words: list[str]  # what the message must hold


GOOD = '{"prompt": "a", "response": "b"}\n'
BAD_FILES = {
    "empty file": BadFile(".jsonl", "", ["no rows"]),
    "blank lines only": BadFile(".jsonl", "\n \n\n", ["no rows"]),
    "empty list": BadFile(".json", "[]", ["no rows"]),
    "binary": BadFile(".jsonl", b"PK\x03\x04\0\0\0", ["binary"]),
    "invalid UTF-8": BadFile(
        ".jsonl", GOOD.encode() + b'{"prompt": "\xff"}\n', [":2:", "UTF-8", "0xff"]
    ),
    "broken JSON": BadFile(".jsonl", GOOD + "\n" + GOOD + '{"prompt": \n', [":4:", "JSON"]),
    "broken JSON in a list": BadFile(
        ".json",
        '[{"prompt": "a", "response": "b"},\n {"prompt": "a" "response": "b"}]',
        [":2:", "JSON"],
    ),
    "no parquet": BadFile(".parquet", "PAR1 no", ["not a parquet file"]),
    "no object": BadFile(".jsonl", GOOD + "[1, 2]\n", [":2:", "object", "list"]),
    "no object in a list": BadFile(".json", "[" + GOOD + ", 7]", ["item 2", "object", "int"]),
    "unknown columns": BadFile(
        ".jsonl",
        GOOD + '{"text": "a", "label": 1}\n',
        [":2:", "'label', 'text'", '{"messages": [...]}', "for example", "Sort: b a"],
    ),
    "no response": BadFile(
        ".jsonl", '{"prompt": "a"}\n', [":1:", "['prompt']", "response", "for example"]
    ),
    "null response": BadFile(".jsonl", '{"prompt": "a", "response": null}\n', [":1:", "response"]),
    "answer without prompt": BadFile(
        ".jsonl", '{"chosen": "a", "rejected": "b"}\n', [":1:", "without a prompt"]
    ),
    "number as response": BadFile(".jsonl", '{"question": "a", "answer": 5}\n', [":1:", "text"]),
    "history": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "a", "response": "b", "history": [["c", "d"]]}\n',
        [":21:", "'history'"],
    ),
    "tools": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "a", "response": "b", "tools": [{"name": "f"}]}\n',
        [":21:", "'tools'"],
    ),
    "label: false": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "a", "completion": "b", "label": false}\n',
        [":21:", "'label'"],
    ),
    "label: 0": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "a", "completion": "b", "label": 0}\n',
        [":21:", "'label' is 0"],
    ),
    "kto_tag: false": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "a", "completion": "b", "kto_tag": false}\n',
        [":21:", "'kto_tag' is false"],
    ),
    "dolly's context": BadFile(
        ".jsonl",
        GOOD * 20 + '{"instruction": "Sum up.", "context": "Long.", "response": "b"}\n',
        [":21:", "'context' would change the prompt"],
    ),
    "an image": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "What is this?", "image": "cat.png", "response": "b"}\n',
        [":21:", "'image' would change the prompt"],
    ),
    "input without an instruction": BadFile(
        ".jsonl",
        GOOD * 20 + '{"prompt": "Sum up.", "input": "Long.", "response": "b"}\n',
        [":21:", "'input' would change the prompt"],
    ),
    "a list as input": BadFile(
        ".jsonl",
        '{"instruction": "Sum up.", "input": ["a", "b"], "output": "b"}\n',
        [":1:", "no text: column 'input'"],
    ),
    "a call of a tool": BadFile(
        ".jsonl",
        lines([{"messages": [user("a"), {**assistant("b"), "tool_calls": [{"id": "1"}]}]}]),
        [":1:", "'messages'"],
    ),
    "two answers": BadFile(
        ".jsonl",
        GOOD * 20 + lines([{"messages": [user("a"), assistant("42, since")], "answer": "42"}]),
        [":21:", "'answer'", "the messages' answer"],
    ),
    "ids that are none": BadFile(
        ".jsonl",
        '{"prompt": "a", "response": "b", "meta": {"sampled_ids": [[1, 2], null]}}\n',
        [":1:", "sampled_ids", "lists of token ids"],
    ),
    "a lost system turn": BadFile(
        ".jsonl",
        GOOD * 20
        + lines([{"prompt": [system("s"), user("a")], "response": [user("a"), assistant("b")]}]),
        [":21:", "'response'", "different"],
    ),
    "two system turns": BadFile(
        ".jsonl",
        GOOD * 20 + lines([{"system": "t", "prompt": [system("s"), user("a")], "response": "b"}]),
        [":21:", "'system'", "two system turns"],
    ),
    "another prompt": BadFile(
        ".jsonl",
        GOOD * 20 + lines([{"prompt": "c", "response": [user("a"), assistant("b")]}]),
        [":21:", "'response'", "different"],
    ),
    "a prompt that only the assistant has said": BadFile(
        ".jsonl",
        GOOD * 20 + lines([{"prompt": "b", "response": [*TALK, assistant("d")]}]),
        [":21:", "'response'", "different"],
    ),
    "a system turn with the user's words": BadFile(
        ".jsonl",
        GOOD * 20 + lines([{"prompt": [system("a")], "response": [user("a"), assistant("b")]}]),
        [":21:", "'response'", "different"],
    ),
    "unknown columns in the last row": BadFile(
        ".jsonl", GOOD * 20 + '{"text": "a"}\n', [":21:", "['text']"]
    ),
    "packed, but damaged": BadFile(".jsonl.gz", b"\x1f\x8b\x08\0\0", ["damaged", ".gz"]),
    "not packed": BadFile(".jsonl.gz", GOOD, ["damaged, or not a .gz file"]),
    "packed otherwise": BadFile(".jsonl.zst", GOOD, [".zst"]),
    "parts as content": BadFile(
        ".jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "response": "a"}\n',
        [":1:", "text"],
    ),
    "half an emoji, which is no Unicode": BadFile(
        ".jsonl", GOOD + '{"prompt": "a\\ud83d", "response": "b"}\n', [":2:"]
    ),
    "empty prompt": BadFile(
        ".jsonl", GOOD + '{"prompt": " \\n", "response": "b"}\n', [":2:", "empty prompt"]
    ),
    "empty turn": BadFile(
        ".jsonl",
        lines([{"prompt": [user("a"), assistant(""), user("c")], "response": "b"}]),
        [":1:", "empty prompt"],
    ),
    "empty response": BadFile(
        ".jsonl", GOOD + GOOD + '{"prompt": "a", "response": "  "}\n', [":3:", "empty response"]
    ),
    "user twice": BadFile(
        ".jsonl",
        lines([{"prompt": [user("a"), user("b")], "response": "b"}]),
        [":1:", "roles out of order", "['user', 'user']"],
    ),
    "assistant first": BadFile(
        ".jsonl",
        lines([{"messages": [assistant("a"), user("b"), assistant("c")]}]),
        [":1:", "roles out of order"],
    ),
    "assistant last": BadFile(
        ".jsonl",
        lines([{"prompt": [user("a"), assistant("b")], "response": "c"}]),
        [":1:", "roles out of order", "['user', 'assistant']"],
    ),
    "answer by the user": BadFile(
        ".jsonl",
        lines([{"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]}]),
        [":1:", "roles out of order"],
    ),
    "system in the middle": BadFile(
        ".jsonl",
        lines([{"messages": [user("a"), system("s"), assistant("c")]}]),
        [":1:", "roles out of order", "system"],
    ),
    "system twice": BadFile(
        ".jsonl",
        lines([{"prompt": [system("s"), system("s"), user("a")], "response": "b"}]),
        [":1:", "roles out of order", "system"],
    ),
    "other names": BadFile(
        ".jsonl",
        lines([{"prompt": [{"role": "human", "content": "a"}], "response": "d"}]),
        [":1:", "roles out of order", "human"],
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_faulty_file_is_named_with_its_line(fault, refused, bare, tmp_path):
    """File, line (or item) and what is wrong, in one line, for training and held-out data alike."""
    suffix, content, words = BAD_FILES[fault]
    path = tmp_path / f"x{suffix}"
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out", data=path)), str(path), *words)
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out", test=path)), str(path), *words)


def test_data_that_is_not_there_is_named(refused, bare, tmp_path):
    """A missing file, an empty folder and a name nobody knows."""
    missing = tmp_path / "none.jsonl"
    has(refused(dnpo, *dnpo_flags(bare, data=missing)), f"{missing}: no such file")

    empty = tmp_path / "empty"
    empty.mkdir()
    has(refused(dnpo, *dnpo_flags(bare, data=empty)), str(empty), "neither", "data set")

    unknown = "nobody/nothing:train"
    flags = generate_flags(bare, tmp_path / "out", data=unknown)
    has(refused(generate, *flags), unknown, "neither", "data set")


def test_two_prompts_in_one_pair_are_refused(tmp_path, capsys):
    """chosen and rejected that begin with different prompts are no pair."""
    pair = {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]}
    with pytest.raises(SystemExit):
        datafiles.load_rows(jsonl(tmp_path, pair), "pair")
    has(capsys.readouterr().err, "data.jsonl:1: ", "different prompts")


def test_faulty_rows_of_a_data_set_are_left_out_and_counted(tmp_path, capsys):
    """Rows that nobody can mend from here are counted by reason; wrong columns end the run.

    So does a null in the first row, which will be null in others.
    """
    good = [{"prompt": [user(f"good {i}")], "response": "g"} for i in range(45)]
    found = [
        {"prompt": [user("a")], "response": "b"},
        {"prompt": [user("a")], "response": " "},
        {"prompt": [assistant("a")], "response": "b"},
        {"prompt": [user("c"), user("d")], "response": "b"},
        {"prompt": [user("a")], "response": None},
        {"prompt": [user("a")], "response": "d"},
        *good,
    ]
    path = stored(tmp_path, "folder", found)
    rows, dropped = datafiles.load_rows(path, "response")
    assert [row["response"] for row in rows] == ["b", "d", *["g"] * 45]
    assert dict(dropped) == {"empty response": 2, "roles out of order": 2}

    with pytest.raises(SystemExit):
        datafiles.load_rows(path, "pair")
    last_line = capsys.readouterr().err.splitlines()[-1]
    has(last_line, path, "row 1", "['prompt', 'response']", "pair")

    path = jsonl(tmp_path, {"prompt": "a", "response": None}, *good)
    with pytest.raises(SystemExit):
        datafiles.load_rows(path, "response")
    has(capsys.readouterr().err, f"{path}:1: empty response: column 'response' is null")


FAULTY = [
    {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: c"},
    {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"},
    {"prompt": "a", "chosen": "b\ud83d", "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": None},
]


def test_faulty_rows_of_a_file_are_left_out_counted_and_named(tmp_path, capsys):
    """5 of 50: each under its reason, the first three with file and line; 6 of 50 end the run."""
    good = [{"prompt": f"p{i}", "chosen": "x", "rejected": "y"} for i in range(45)]
    path = tmp_path / "data.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in [*FAULTY, *good])
    path.write_text(text)
    rows, dropped = datafiles.load_rows(str(path), "pair")
    assert [row["prompt"] for row in rows] == [[user(f"p{i}")] for i in range(45)]
    assert dict(dropped) == {
        "empty response": 2,
        "chosen and rejected have different prompts": 1,
        "roles out of order": 1,
        "not valid Unicode": 1,
    }
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [
        f"left out: {path}:1: empty response: column 'chosen'",
        f"left out: {path}:2: chosen and rejected have different prompts",
    ]
    assert shown[2].startswith(f"left out: {path}:3: roles out of order: ['user', 'user']")
    assert len(shown) == 3

    path.write_text(text.replace('"p0"', '" "'))
    with pytest.raises(SystemExit) as end:
        datafiles.load_rows(str(path), "pair")
    assert end.value.code == 2
    line = capsys.readouterr().err
    has(line, f"{path}: 6 of 50 rows can't be used, more than 10%: {path}:1: empty response")
    assert line.count("\n") == 1


def test_half_an_emoji_is_found_wherever_it_will_be_written(tmp_path):
    """In an id, a prompt_id, a key or a value of meta: such a row is left out and counted."""
    row = {"prompt": "a", "response": "b"}
    faulty = [
        {"id": "x\ud83d", **row},
        {"prompt_id": "x\udc00", **row},
        {"meta": {"note": ["\ud83d"]}, **row},
        {"meta": {"\ude00": 1}, **row},
        {"meta": "\ud83d", **row},
    ]
    whole = [{"id": f"\U0001f600{i}", "meta": {"note": "\U0001f600"}, **row} for i in range(45)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*faulty, *whole]))
    rows, dropped = datafiles.load_rows(str(path), "response")
    assert [row["id"] for row in rows] == [row["id"] for row in whole]
    assert dict(dropped) == {"not valid Unicode": 5}


def test_a_row_of_a_data_set_whose_columns_contradict_each_other_is_left_out(tmp_path):
    """A system turn that the sides have lost: nobody can mend it from here, so it is counted."""
    good = [{"prompt": [user(f"p{i}")], "response": [assistant("x")]} for i in range(10)]
    lost = {"prompt": [system("s"), user("a")], "response": [user("a"), assistant("b")]}
    rows, dropped = datafiles.load_rows(stored(tmp_path, "folder", [*good, lost]), "response")
    assert len(rows) == 10
    [(reason, count)] = dropped.items()
    assert count == 1
    has(reason, "the prompt and the beginning of column 'response' are different")


def test_a_packed_file_is_read_as_it_comes(tmp_path):
    """x.jsonl.gz and x.json.gz have the rows, and the ids, of what is packed in them."""
    rows = [{"prompt": f"p{i}", "response": "x"} for i in range(3)]
    wanted = datafiles.load_rows(jsonl(tmp_path, *rows), "response")
    for kind in ("jsonl", "json"):
        plain = stored(tmp_path, kind, rows)
        (tmp_path / f"packed.{kind}.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
        assert datafiles.load_rows(str(tmp_path / f"packed.{kind}.gz"), "response") == wanted
    zstandard = pytest.importorskip("zstandard")
    packed = tmp_path / "packed.jsonl.zst"
    packed.write_bytes(zstandard.compress(Path(jsonl(tmp_path, *rows)).read_bytes()))
    assert datafiles.load_rows(str(packed), "response") == wanted


def model_copy(bare, folder, without=None, **changes):
    """The bare model without one of its files, or with other entries in some.

    `changes` are entries of FILE.json by the FILE's name.
    """
    target = folder / "model"
    target.mkdir()
    for file in (bare / "sft").iterdir():
        text = file.read_text()
        if file.stem in changes and file.suffix == ".json":
            entries = json.loads(text)
            entries.update(changes[file.stem])
            text = json.dumps(entries)
        if file.name != without:
            (target / file.name).write_text(text)
    return target


def test_a_path_that_is_no_model_is_named(refused, bare, tmp_path):
    """No config.json, a file, an unknown name, a broken config: for scripts and local judges."""
    (tmp_path / "runs").mkdir()
    broken = model_copy(bare, tmp_path)
    (broken / "config.json").write_text("{")
    cases = [
        (tmp_path / "runs", ["not a model", "config.json"]),
        (bare / "train.jsonl", ["not a model"]),
        (tmp_path / "none", ["neither"]),
        (broken, ["neither"]),
    ]
    for path, words in cases:
        has(refused(dnpo, *dnpo_flags(bare, model=path)), str(path), *words)
        has(refused(dnpo, *dnpo_flags(bare, judge=f"rm:{path}")), str(path), *words)
        has(refused(dnpo, *dnpo_flags(bare, judge=f"hf:{path}")), str(path), *words)
        flags = generate_flags(bare, tmp_path / "out", model=path)
        has(refused(generate, *flags), str(path), *words)


def test_a_tokenizer_without_a_chat_template_is_refused(refused, bare, tmp_path):
    """... and told where to put one; one without an end-of-sequence token is refused too."""
    plain = model_copy(bare, tmp_path, without="chat_template.jinja")
    line = refused(dnpo, *dnpo_flags(bare, model=plain))
    has(line, str(plain), "no chat template", "chat_template.jinja")
    line = refused(generate, *generate_flags(bare, tmp_path / "out", model=plain))
    has(line, str(plain), "no chat template")

    (tmp_path / "b").mkdir()
    endless = model_copy(bare, tmp_path / "b", tokenizer_config={"eos_token": None})
    line = refused(dnpo, *dnpo_flags(bare, model=endless))
    has(line, str(endless), "end-of-sequence")


def test_a_prompt_that_the_template_refuses_is_reported_in_one_line(refused, bare, tmp_path):
    """Some templates (Gemma's) raise on a system turn: the template's message, no traceback."""
    strict = model_copy(bare, tmp_path, without="chat_template.jinja")
    (strict / "chat_template.jinja").write_text(
        "{{ raise_exception('No system role') if messages[0]['role'] == 'system' "
        "else messages[0]['content'] }}"
    )
    data = jsonl(tmp_path, {"id": "r1", "prompt": [system("s"), user("a")], "response": "b"})
    has(refused(dnpo, *dnpo_flags(bare, model=strict, data=data)), "No system role")


def test_a_batch_must_be_divisible_by_ranks_times_micro_batch(refused, bare, monkeypatch):
    """10 is not 1 rank x 4, 16 not 3 ranks x anything, 24 not 3 ranks x 5: all three are named."""
    line = refused(dnpo, *dnpo_flags(bare, batch=10, micro_batch=4))
    has(line, "--batch 10", "1 ranks", "--micro_batch 4")

    monkeypatch.setattr(job, "world_size", lambda: 3)
    line = refused(dnpo, *dnpo_flags(bare, batch=16, micro_batch=2))
    has(line, "--batch 16", "3 ranks", "--micro_batch 2")
    line = refused(dnpo, *dnpo_flags(bare, batch=24, micro_batch=5))
    has(line, "--batch 24", "3 ranks", "--micro_batch 5")


def test_a_dry_run_checks_everything_and_leaves_nothing(printed, bare, tmp_path):
    """Lengths that just fit the context (48 + 16 = 64) pass; the example shows what is learned."""
    out = tmp_path / "out"
    shown = printed(dnpo, *dnpo_flags(bare, out=out, max_prompt=48, dry_run=True))
    has(
        shown,
        "4 training, 2 held-out",
        "batch 16 = 1 ranks x 8 pairs x 2 micro-batches",
        "no loss: '<bos><|user|>abcdef<|assistant|>'",
        "with loss: 'abcdef<eos>' (9 + 7 tokens), end of a turn: '<eos>' (2)",
    )
    assert not out.exists()


def test_without_test_data_a_tenth_is_held_out(printed, bare, tmp_path):
    """--data alone is split by prompt, as in hold_out above; the header counts repeated rows."""
    rows = [{"prompt": f"prompt {i}", "response": "a"} for i in range(40)]
    data = jsonl(tmp_path, *rows, rows[1])
    out = tmp_path / "out"
    flags = dnpo_flags(bare, data=data, preset="paper", out=out, dry_run=True)
    test = flags.index("--test")
    del flags[test : test + 2]

    shown = printed(dnpo, *flags)
    has(shown, f"{40 - len(HELD)} training, {len(HELD)} held-out", "1 left out: repeated rows")


def four_words(folder) -> str:
    """Data with prompts of 7, 8, 9 and 10 tokens: a prompt of n letters has n + 3."""
    words = ("abcde", "abcdef", "abcd", "abcdefg")
    return jsonl(folder, *({"id": x, "prompt": x, "response": x} for x in words))


def test_prompts_longer_than_the_limit_are_counted_and_none_left_is_an_error(
    printed, refused, bare, tmp_path
):
    """With room for 8 tokens two prompts stay, in both splits; with room for 6 the run ends."""
    data = four_words(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "test").mkdir()
    words = ("pbcde", "pbcdef", "pbcd", "pbcdefg")
    test = jsonl(tmp_path / "test", *({"prompt": x, "response": x} for x in words))
    flags = dnpo_flags(bare, data=data, test=test, out=out, max_prompt=8)
    shown = printed(dnpo, *flags, "--dry_run")
    has(shown, "2 training, 2 held-out", "4 left out: prompts longer than --max_prompt")
    has(refused(dnpo, *flags, "--max_prompt", 6), data, "0 training", "6 tokens")


def test_generate_leaves_out_prompts_that_leave_no_room_for_an_answer(
    printed, refused, bare, tmp_path, monkeypatch
):
    """generate.py's room for prompts is what --max_new_tokens leaves of the context of 64."""

    def answers(out, rows, *_, **__):
        return [{"meta": {"finish": "stop"}} for row in rows]

    monkeypatch.setattr(generate, "generate", answers)
    data = four_words(tmp_path)
    out = tmp_path / "o"
    shown = printed(generate, *generate_flags(bare, out, data=data, max_new_tokens=56))
    has(shown, "2 prompts x 1", "2 left out: prompts of more than 8 tokens", "2 answers")
    line = refused(generate, *generate_flags(bare, out, data=data, max_new_tokens=58))
    has(line, "none of the 4 prompts", "6 tokens", "--max_new_tokens 58")


def test_lengths_beyond_the_context_are_refused(refused, bare, tmp_path):
    """49 + 16 tokens do not fit into a context of 64, nor does an answer of 64 to any prompt."""
    line = refused(dnpo, *dnpo_flags(bare, max_prompt=49))
    has(line, "--max_prompt 49", "--max_response 16", "64")
    line = refused(generate, *generate_flags(bare, tmp_path / "o", max_new_tokens=64))
    has(line, "context", "--max_new_tokens 64")


def contents(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_in_use_is_not_touched_without_resume_or_overwrite(refused, bare, tmp_path):
    """A run's folder needs one of them, a folder that is no run is refused even so; both stay."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "results.json").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    run_before = contents(run)
    other_before = contents(other)

    line = refused(dnpo, *dnpo_flags(bare, out=run))
    has(line, str(run), "not empty", "--resume", "--overwrite")
    line = refused(dnpo, *dnpo_flags(bare, out=other))
    has(line, str(other), "not empty")
    line = refused(dnpo, *dnpo_flags(bare, out=other, overwrite=True))
    has(line, str(other), "no run", "--overwrite")
    line = refused(dnpo, *dnpo_flags(bare, out=other, resume=True))
    has(line, str(other), "no run", "resume")

    assert contents(run) == run_before
    assert contents(other) == other_before


def test_a_file_is_no_folder_for_a_run(refused, bare, tmp_path):
    """--out that names a file is refused in one line, and the file stays, with --overwrite too."""
    file = tmp_path / "file"
    file.write_text("mine")
    has(refused(dnpo, *dnpo_flags(bare, out=file)), str(file))
    has(refused(dnpo, *dnpo_flags(bare, out=file, overwrite=True)), str(file))
    assert file.read_text() == "mine"


def test_an_output_file_that_exists_is_not_touched(refused, bare, tmp_path):
    """generate.py never writes over a file."""
    out = tmp_path / "o.jsonl"
    out.write_text("mine")
    has(refused(generate, *generate_flags(bare, out)), str(out), "there already")
    assert out.read_text() == "mine"


def test_an_output_file_is_not_that_of_the_pairs(refused, bare, tmp_path):
    """generate.py's pairs would replace its answers."""
    out = tmp_path / "o.jsonl"
    flags = generate_flags(bare, out, samples=2, judge="toy")
    for pairs in (out, os.path.relpath(out)):
        has(refused(generate, *flags, "--pairs", pairs), "--pairs and --out are one file")
    assert not out.exists()


def test_samples_that_would_all_be_the_same_are_refused(refused, bare, tmp_path):
    """At temperature 0."""
    flags = generate_flags(bare, tmp_path / "o.jsonl", samples=2, temperature=0)
    has(refused(generate, *flags), "--samples needs answers that differ")


def test_an_output_file_is_not_that_of_the_prompts(refused, bare, tmp_path):
    """It would be taken for answers, which the next message says to delete."""
    flags = generate_flags(
        bare, bare / "train.jsonl", samples=2, judge="toy", pairs=tmp_path / "p.jsonl"
    )
    has(refused(generate, *flags), "--out is --data")


class Tired(Exception):
    """A Patient was asked too much."""


class Patient(common.Judge):
    """A judge that scores a text by its length, and raises Tired beyond `most` texts."""

    def __init__(self, key, most):
        super().__init__("patient", None)
        self.key = key
        self.most = most

    def ask(self, kind, items, again):
        self.most -= len(items)
        if self.most < 0:
            raise Tired
        return [len(text) for _, text in items]


def prompts_and_answers(word: str, ending: str = "") -> tuple[list[dict], list[dict]]:
    """Three prompts, and two answers to each, the second of which is the longer one."""
    rows = [{"id": str(i), "prompt": [user(f"{word} {i}")]} for i in range(3)]
    answers = []
    for row in rows:
        for text in ("short", "longer"):
            meta = {"finish": "stop"}
            answers.append({**row, "response": f"{text}{ending}", "meta": meta})
    return rows, answers


def pairs_config(folder) -> generate.Config:
    """Flags of generate.py --pairs that scores two answers at a time."""
    files = {"data": str(folder / "d.jsonl"), "out": str(folder / "a.jsonl")}
    files["pairs"] = str(folder / "pairs.jsonl")
    return generate.Config(model="m", **files, n=2, batch=2, judge="toy")


def test_scores_of_another_judge_or_of_other_texts_are_not_gone_on_with(tmp_path, capsys):
    """Killed after two of six scores, --pairs is refused another judge, prompt or answer.

    With what it was begun with, it asks for the four that are missing.
    """
    c = pairs_config(tmp_path)
    begun = prompts_and_answers("p")
    with pytest.raises(Tired):
        generate.write_pairs(*begun, Patient("one", most=3), c)
    part = Path(f"{c.pairs}.scores.part0")
    before = part.read_bytes()

    for key, (rows, answers) in (
        ("two", begun),
        ("one", prompts_and_answers("q")),
        ("one", prompts_and_answers("p", ending="!")),
    ):
        with pytest.raises(SystemExit) as end:
            generate.write_pairs(rows, answers, Patient(key, most=0), c)
        assert end.value.code == 2
        has(capsys.readouterr().err, str(part), "was begun with other settings")
    assert part.read_bytes() == before

    generate.write_pairs(*begun, Patient("one", most=4), c)
    pairs = [json.loads(line) for line in Path(c.pairs).read_text().splitlines()]
    assert [(pair["id"], pair["prompt"]) for pair in pairs] == [
        (row["id"], row["prompt"]) for row in begun[0]
    ]
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("longer", "short")}
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_finished_scores_of_another_judge_are_no_scores(tmp_path, capsys, monkeypatch):
    """Killed between the last score and the pairs: another judge is refused, the same goes on."""
    c = pairs_config(tmp_path)
    begun = prompts_and_answers("p")

    def killed(*arguments):
        raise Tired

    with monkeypatch.context() as patch, pytest.raises(Tired):
        patch.setattr(generate, "preference_pair", killed)
        generate.write_pairs(*begun, Patient("one", most=6), c)
    scores = Path(f"{c.pairs}.scores")
    assert scores.exists()

    with pytest.raises(SystemExit) as end:
        generate.write_pairs(*begun, Patient("two", most=0), c)
    assert end.value.code == 2
    has(capsys.readouterr().err, str(scores))
    assert not Path(c.pairs).exists()

    generate.write_pairs(*begun, Patient("one", most=0), c)
    assert len(Path(c.pairs).read_text().splitlines()) == len(begun[0])


def test_answers_are_paired_only_with_the_prompts_that_they_answer(tmp_path, capsys):
    """An --out whose ids are not the data's, or name other prompts there, is not judged."""
    c = pairs_config(tmp_path)
    rows, answers = prompts_and_answers("p")
    edited, _ = prompts_and_answers("p")
    edited[2]["prompt"] = [user("P 2")]
    for others in (edited, rows[:2]):
        with pytest.raises(SystemExit) as end:
            generate.write_pairs(others, answers, Patient("one", most=0), c)
        assert end.value.code == 2
        line = f"error: {c.out} has answers to other prompts than {c.data}: delete it\n"
        assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())


def test_a_run_is_resumed_only_with_its_own_config(
    no_weights, refused, bare, tmp_path, monkeypatch
):
    """Another --beta is refused, both values named, nothing changed; --iterations may be raised."""
    out = tmp_path / "run"
    begun = dnpo_flags(bare, out=out, beta=0.5)
    out.mkdir()
    config = job.parse(dnpo.Config, PRESETS, [str(flag) for flag in begun])
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (out / "run.json").write_text(json.dumps({"made_by": "dnpo.py"}))
    before = contents(out)

    line = refused(dnpo, *begun, "--beta", 0.25, "--resume")
    has(line, str(out), "--beta", "0.5", "0.25")
    line = refused(dnpo, *begun, "--no-noise", "--resume")
    has(line, "--noise", "True", "False")
    assert contents(out) == before

    for more in (["--resume"], ["--resume", "--iterations", "5"]):
        set_flags(monkeypatch, dnpo, begun + more)
        with pytest.raises(AssertionError, match="a model was loaded"):
            dnpo.main()


def test_an_endpoint_that_does_not_answer_is_named(refused, bare, tmp_path, monkeypatch):
    """An address at which nobody listens is found out before the work begins; no key is shown."""
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    judged_flags = dnpo_flags(bare, out=tmp_path / "out", judge="api:m")

    judged = refused(dnpo, *judged_flags)
    sampled = refused(generate, *generate_flags(bare, tmp_path / "o", endpoint=url))
    for line in (judged, sampled):
        has(line, url, "no answer")
        assert "sk-secret" not in line

    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    has(refused(dnpo, *judged_flags), "OPENAI_API_KEY", "OPENAI_BASE_URL")


@pytest.mark.parametrize(
    "spec", ["gpt-4o", "toy:1", "none:", "rm:", "hf:", "api:", "openai:gpt-4o"]
)
def test_a_judge_that_is_none_is_refused(spec, refused, bare, tmp_path):
    """--judge is toy, hf:PATH, rm:PATH, api:MODEL or none: the answer to others is this list."""
    line = refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out"), "--judge", spec)
    has(line, f"--judge {spec}".strip(), "toy, hf:PATH, rm:PATH, api:MODEL or none")


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    """Under torchrun every rank ends with code 2, but the line is printed once.

    torchrun ends the ranks that wait when rank 0 has spoken; if it doesn't, one of them speaks.
    """
    monkeypatch.setattr(job, "PATIENCE", 0.01)
    asked, alone = threading.Event(), threading.Event()
    asked.set()
    for rank, stop, shown in (
        ("0", alone, "error: so it is\n"),
        ("3", asked, ""),
        ("3", alone, "error on rank 3: so it is\n"),
    ):
        monkeypatch.setattr(job, "STOP", stop)
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            job.die("so it is")
        assert end.value.code == 2
        assert capsys.readouterr().err == shown


@pytest.mark.parametrize("name", ["dnpo.py", "generate.py"])
def test_bad_input_is_one_line_for_a_real_process_too(name, bare, tmp_path):
    """What libraries load on the way to the check prints nothing of its own."""
    if name == "dnpo.py":
        data = stored(tmp_path, "folder", [{"prompt": "a", "response": "b"}])
        flags = dnpo_flags(bare, data=data, model="no/model")
        words = "error: no/model: neither"
    else:
        plain = model_copy(bare, tmp_path, without="chat_template.jinja")
        flags = generate_flags(bare, tmp_path / "o", model=plain)
        words = f"error: {plain}: its tokenizer has no chat template"

    done = script(name, *flags, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(words), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- flags


def parsed(*flags) -> dnpo.Config:
    return job.parse(dnpo.Config, PRESETS, list(flags))


def test_a_flag_may_be_written_with_dashes_or_underscores():
    """--max-prompt 7 is --max_prompt 7, and --no-mix-previous is --no-mix_previous."""
    ours = parsed("--max_prompt", "7", "--no-mix_previous", "--noise_lr=0.5")
    theirs = parsed("--max-prompt", "7", "--no-mix-previous", "--noise-lr=0.5")
    assert ours == theirs
    assert ours.max_prompt == 7
    assert ours.mix_previous is False
    assert ours.noise_lr == 0.5


def test_no_noise_turns_the_noise_off_and_noise_turns_it_on():
    """--no-noise and --noise, the last one wins; nothing else changes."""
    on = parsed()
    off = parsed("--no-noise")
    again = parsed("--no-noise", "--noise")
    assert on.noise is True
    assert off.noise is False
    assert again == on
    assert on == dataclasses.replace(off, noise=True)


def test_the_preset_is_toy_without_cuda_and_paper_with_it(monkeypatch):
    """... unless --preset says which."""
    toys = ("toy", "toy", "runs/toy/sft")
    papers = (
        "paper",
        "rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        "alignment-handbook/zephyr-7b-sft-full",
    )
    cases = [
        (False, [], toys),
        (True, [], papers),
        (True, ["--preset", "toy"], toys),
        (False, ["--preset=paper"], papers),
    ]
    for cuda, flags, expected in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        c = parsed(*flags)
        assert (c.preset, c.judge, c.model) == expected


def test_a_flag_overrides_the_preset():
    """What is typed holds, also where it is the field's own default; the rest is the preset's."""
    plain = parsed("--preset", "toy")
    typed = ["--max_response", "512", "--limit", "12", "--dtype", "bfloat16"]
    c = parsed("--preset", "toy", *typed)
    assert (plain.max_response, plain.dtype) == (64, "float32")
    assert (dnpo.Config.max_response, dnpo.Config.dtype) == (512, "bfloat16")
    assert c == dataclasses.replace(plain, max_response=512, limit=12, dtype="bfloat16")


def test_the_presets_held_out_data_go_with_its_training_data():
    """Whoever brings --data is not measured on the toy world's prompts, unless --test says so."""
    cases = [
        ([], "runs/toy/test.jsonl"),
        (["--data", "mine.jsonl"], None),
        (["--data", "mine.jsonl", "--test", "held.jsonl"], "held.jsonl"),
    ]
    for flags, test in cases:
        assert parsed("--preset", "toy", *flags).test == test


def test_n_has_a_second_name():
    """torchrun takes --n for one of its own flags: generate.py's --samples is the same."""
    needed = ["--model", "m", "--data", "d", "--out", "o"]
    first = job.parse(generate.Config, argv=[*needed, "--n", "4"])
    second = job.parse(generate.Config, argv=[*needed, "--samples", "4"])
    assert first == second
    assert first.n == 4


def help_entries(text) -> dict[str, str]:
    """What --help says of each flag, by the flag's name, without line breaks."""
    entries = {}
    for match in re.finditer(r"^  --(\w+)\b(.*?)(?=^  --|\Z)", text, re.M | re.S):
        entries[match[1]] = " ".join(match[2].split())
    return entries


@pytest.mark.parametrize(
    "config, presets",
    [(dnpo.Config, PRESETS), (generate.Config, {})],
    ids=["dnpo", "generate"],
)
def test_every_flag_has_a_help_text_with_its_default(config, presets, monkeypatch, capsys):
    """--help says of every field what it means, in at least three words, and its default."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        job.parse(config, presets, ["--help"])
    assert end.value.code == 0

    entries = help_entries(capsys.readouterr().out)
    for field in dataclasses.fields(config):
        entry = entries[field.name]
        before_default = entry.split(" (default: ")[0]
        meaning = re.sub(r"^.*?(?=[a-z(0-9])", "", before_default)  # without the value's name
        words = re.findall(r"[A-Za-z\d]{2,}", meaning)
        assert len(words) >= 3, (field.name, entry)
        assert f"(default: {field.default}" in entry, field.name


# ---------------------------------------------------------------- hostile input


def test_a_byte_order_mark_is_no_content(tmp_path):
    """Files that come from Windows begin with one; a fault behind it is found in its line."""
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x", "response": "y"}\n')
    (row,), _ = datafiles.load_rows(str(path), "response")
    assert row["response"] == "y"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "7" * 5000 + "]"])
def test_json_that_no_reader_takes_is_broken(tmp_path, capsys, suffix, text):
    """A hundred thousand brackets or a number of 5000 digits: one line."""
    path = tmp_path / f"deep{suffix}"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        datafiles.load_rows(str(path), "response")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}:1: broken JSON (")
    assert err.count("\n") == 1


def test_a_row_that_is_too_deep_to_be_written_is_left_out(monkeypatch):
    """json reads rows that it can't write, a few brackets before those that it can't read."""
    deep = {}
    for _ in range(100_000):
        deep = {"deeper": deep}
    found = [(f"row {i}", {"prompt": str(i), "response": "y"}) for i in range(20)]
    found.append(("row 20", {"prompt": "20", "response": "y", "meta": deep}))
    monkeypatch.setattr(datafiles, "read_raw", lambda spec: iter(found))
    rows, dropped = datafiles.load_rows("x.jsonl", "response")
    assert len(rows) == 20
    assert dropped.total() == 1


def test_many_rows_of_one_id_are_quick(tmp_path):
    """They get names of their own, x, x-2, x-3 and so on, in seconds for 8000 rows."""
    rows = [{"id": "x", "prompt": str(i), "response": "y"} for i in range(8000)]
    rows.insert(2, {"id": "x-3", "prompt": "another", "response": "y"})
    started = time.monotonic()
    found, _ = datafiles.load_rows(jsonl(tmp_path, *rows), "response")
    assert time.monotonic() - started < 3
    names = [row["id"] for row in found]
    assert names[:5] == ["x", "x-2", "x-3", "x-4", "x-5"]
    assert names[-1] == "x-8001"


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ 1 / 0 }}", "refuses a prompt of ['user'] that ends in 'abc': division by zero"),
        ("{{ messages[7]['content'] + 1 }}", "refuses a prompt of ['user']"),
        ("", "renders nothing of a prompt that is plain text"),
    ],
)
def test_a_template_may_fail_with_anything(capsys, template, words):
    """It is a program: whatever it raises, and nothing at all, is one line."""
    tok = toy.tokenizer()
    tok.chat_template = template
    with pytest.raises(SystemExit) as stop:
        common.prompt_ids(tok, [{"role": "user", "content": "abc"}])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


EVIL = "import pathlib; pathlib.Path({marker!r}).touch()\nclass Config: pass\n"


def test_a_models_own_code_is_never_run(tmp_path, monkeypatch, capsys):
    """Also where somebody sits at the terminal who would say yes to it."""
    marker = tmp_path / "marker"
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(folder))
    assert "can be loaded" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("name", ["nope.jsonl", "nope.jsonl.gz"])
def test_missing_data_are_found_before_the_toy_world_is_made(name, tmp_path, monkeypatch, capsys):
    """Which would take a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "make", lambda *_: pytest.fail("a world was made"))
    set_flags(monkeypatch, dnpo, ["--preset", "toy", "--data", name])
    with pytest.raises(SystemExit) as stop:
        dnpo.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {name}: no such file\n"
