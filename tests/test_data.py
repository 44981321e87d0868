"""Every shape of data becomes the same rows with stable ids; bad input ends in one line, exit code 2, before any model is loaded."""
import dataclasses
import json
import re
import socket
import sys

import pytest
import torch
import transformers

import common
import dnpo
import generate
import toy
from common import hold_out, load_rows, parse
from conftest import dnpo_flags, script

PRESETS = {"toy": dnpo.TOY, "paper": {}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# name -> what it is read as, rows as they are found, rows as they must come out (without id)
SHAPES = {
    "ultrachat: messages, the first exchange": ("response", [
        {"prompt": "hi", "prompt_id": "p1", "messages": [user("hi"), assistant("hello"), user("more"), assistant("no")]},
        {"prompt": "2+2?", "prompt_id": "p2", "messages": [system("be brief"), user("2+2?"), assistant("4")]}], [
        {"prompt": [user("hi")], "response": "hello", "meta": {}}, {"prompt": [system("be brief"), user("2+2?")], "response": "4", "meta": {}}]),
    "ultrafeedback_binarized: a text prompt beside whole conversations": ("pair", [
        {"prompt": "hi", "prompt_id": "p1", "chosen": [user("hi"), assistant("good")], "rejected": [user("hi"), assistant("bad")],
         "messages": [user("hi"), assistant("good")], "score_chosen": 8.0, "score_rejected": 3.0},
        {"prompt": "a", "prompt_id": "p2", "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
         "rejected": [user("a"), assistant("b"), user("c"), assistant("e")], "messages": [user("a"), assistant("b"), user("c"), assistant("d")],
         "score_chosen": 7.5, "score_rejected": 7.0}], [
        {"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}},
        {"prompt": [user("a"), assistant("b"), user("c")], "chosen": "d", "rejected": "e", "meta": {}}]),
    "trl: explicit prompt": ("pair", [
        {"prompt": [system("s"), user("a"), assistant("b"), user("c")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}], [
        {"prompt": [system("s"), user("a"), assistant("b"), user("c")], "chosen": "good", "rejected": "bad", "meta": {}}]),
    "trl: implicit prompt, with the conversation beside it": ("pair", [
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("good")], "rejected": [user("a"), assistant("b"), user("c"), assistant("bad")],
         "messages": [user("a"), assistant("b"), user("c"), assistant("good")]}], [
        {"prompt": [user("a"), assistant("b"), user("c")], "chosen": "good", "rejected": "bad", "meta": {}}]),
    "spin: real and generated": ("pair", [
        {"real": [user("hi"), assistant("good")], "generated": [user("hi"), assistant("bad")]}], [
        {"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}}]),
    "texts: prompt, chosen, rejected": ("pair", [
        {"prompt": "hi", "chosen": "good", "rejected": "bad"}], [
        {"prompt": [user("hi")], "chosen": "good", "rejected": "bad", "meta": {}}]),
    "hh-rlhf: single and multi turn": ("pair", [
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
        {"chosen": "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant: d\n\ne",
         "rejected": "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant: f"}], [
        {"prompt": [user("hi")], "chosen": "hello", "rejected": "go away", "meta": {}},
        {"prompt": [user("a?"), assistant("b."), user("c?")], "chosen": "d\n\ne", "rejected": "f", "meta": {}}]),
    "alpaca: with and without input": ("response", [
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say hi.", "input": "", "output": "hi"}], [
        {"prompt": [user("Add.\n\n1 2")], "response": "3", "meta": {}}, {"prompt": [user("Say hi.")], "response": "hi", "meta": {}}]),
    "prompt and response, our own file": ("response", [
        {"id": "r1", "prompt": [system("s"), user("hi")], "response": "hello", "meta": {"finish": "stop"}},
        {"id": "r2", "prompt": [user("ha")], "response": "hu", "meta": {"finish": "length"}}], [
        {"prompt": [system("s"), user("hi")], "response": "hello", "meta": {"finish": "stop"}},
        {"prompt": [user("ha")], "response": "hu", "meta": {"finish": "length"}}]),
    "prompt and completion": ("response", [{"prompt": "1+1=", "completion": "2"}], [{"prompt": [user("1+1=")], "response": "2", "meta": {}}]),
    "prompt and completion, as messages": ("response", [
        {"prompt": [user("1+1=")], "completion": [assistant("2")]}], [{"prompt": [user("1+1=")], "response": "2", "meta": {}}]),
    "gsm8k: question and answer": ("response", [{"question": "1+1?", "answer": "#### 2"}], [{"prompt": [user("1+1?")], "response": "#### 2", "meta": {}}]),
    "prompts only, texts; not a character is changed": ("prompt", [
        {"prompt": "hi"}, {"prompt": " \u00e4\u2028<eos>\u0085 \U0001f600\n"}], [
        {"prompt": [user("hi")], "meta": {}}, {"prompt": [user(" \u00e4\u2028<eos>\u0085 \U0001f600\n")], "meta": {}}]),
    "prompts only, messages": ("prompt", [{"prompt": [system("s"), user("hi")]}], [{"prompt": [system("s"), user("hi")], "meta": {}}]),
    "prompts only, hh-rlhf": ("prompt", [
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}], [{"prompt": [user("a"), assistant("b"), user("c")], "meta": {}}]),
}


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def stored(folder, kind, rows):
    """Writes rows as users bring them: .jsonl, .json (a list), .parquet, or a folder that `datasets` loads; -> what to give as --data."""
    path = folder / f"data.{kind}"
    if kind == "folder":
        path.mkdir()
        (path / "train.jsonl").write_text(lines(rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(lines(rows) if kind == "jsonl" else json.dumps(rows, indent=1))
    return str(path)


def without_id(row):
    return {name: value for name, value in row.items() if name != "id"}


def jsonl(folder, *rows):
    return stored(folder, "jsonl", rows)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """What `datasets` caches goes where the test's files go."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_container_becomes_the_same_rows(shape, tmp_path):
    """.jsonl, .json, .parquet and a data set folder give the rows written here by hand, with the same ids, and leave none out."""
    need, raw, expected = SHAPES[shape]
    ids = set()
    for kind in ("jsonl", "json", "parquet", "folder"):
        rows, dropped = load_rows(stored(tmp_path, kind, raw), need)
        ids.add(tuple(row["id"] for row in rows))
        assert [without_id(row) for row in rows] == expected, kind
        assert not dropped, kind
    assert len(ids) == 1


def test_a_pair_is_read_as_a_response_by_its_chosen_side_and_as_a_prompt_by_neither(tmp_path):
    """need="response" takes chosen or real, whole; need="prompt" takes neither answer, in every shape of pair."""
    for shape, (need, raw, expected) in SHAPES.items():
        if need == "pair":
            path = jsonl(tmp_path, *raw)
            assert [without_id(row) for row in load_rows(path, "response")[0]] == [
                {"prompt": e["prompt"], "response": e["chosen"], "meta": {}} for e in expected], shape
            assert [without_id(row) for row in load_rows(path, "prompt")[0]] == [{"prompt": e["prompt"], "meta": {}} for e in expected], shape


def test_a_text_that_quotes_a_dialogue_loses_nothing(tmp_path):
    """Only a text that begins as HH-RLHF's is split into turns: "Assistant:" inside an ordinary prompt or answer is part of it."""
    row = {"prompt": "Continue this script:\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye", "response": "Here it is:\n\nAssistant: good bye"}
    (got,), _ = load_rows(jsonl(tmp_path, row), "response")
    assert (got["prompt"], got["response"]) == ([user(row["prompt"])], row["response"])


def test_a_line_may_end_as_on_windows_and_a_file_may_end_without_one(tmp_path):
    """\\r\\n, blank lines and a missing last newline change nothing."""
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\r\n\r\n{"prompt": "c", "response": "d"}')
    assert [(r["prompt"], r["response"]) for r in load_rows(str(tmp_path / "x.jsonl"), "response")[0]] == [([user("a")], "b"), ([user("c")], "d")]


def test_a_split_is_named_after_a_colon(tmp_path):
    """FOLDER:test reads the test split, FOLDER the training split."""
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        (tmp_path / "d" / f"{split}.jsonl").write_text(lines([{"prompt": split}]))
    for suffix, split in (("", "train"), (":train", "train"), (":test", "test")):
        assert [row["prompt"] for row in load_rows(str(tmp_path / "d") + suffix, "prompt")[0]] == [[user(split)]]


def test_limit_takes_the_first_rows(tmp_path):
    """limit=2 of three rows: the first two, in the file's order; faults behind them are not looked at."""
    rows, _ = load_rows(jsonl(tmp_path, {"prompt": "c"}, {"prompt": "a"}, {"nothing": 1}), "prompt", limit=2)
    assert [row["prompt"] for row in rows] == [[user("c")], [user("a")]]


# ---------------------------------------------------------------- ids, and the held-out tenth


def ids(folder, *rows):
    return [row["id"] for row in load_rows(jsonl(folder, *rows), "response")[0]]


def test_the_id_is_the_datas_own(tmp_path):
    """`id`, else `prompt_id`, as text."""
    assert ids(tmp_path, {"id": "x", "prompt_id": "p", "prompt": "a", "response": "b"}, {"prompt_id": "q", "prompt": "a", "response": "b"},
               {"id": 7, "prompt": "a", "response": "b"}) == ["x", "q", "7"]


def test_a_row_without_an_id_is_named_by_its_content(tmp_path):
    """The same content has the same id at any place in any file, other content another; columns that are not content change nothing."""
    a, b, c = ({"prompt": "p", "response": "a"}, {"prompt": "p", "response": "b"}, {"prompt": "q", "response": "a"})
    first = ids(tmp_path, a, b, c)
    assert len(set(first)) == 3
    assert ids(tmp_path, c, b, a) == first[::-1]
    assert ids(tmp_path, {"completion": "b", "prompt": [user("p")], "source": "elsewhere", "meta": {"score": 1}}) == first[1:2]


def test_an_id_that_is_null_is_no_id(tmp_path):
    """Null, as `datasets` and parquet fill a column that only some rows have, falls back to the next name."""
    plain, = ids(tmp_path, {"prompt": "a", "response": "b"})
    assert ids(tmp_path, {"id": None, "prompt": "a", "response": "b"}, {"id": None, "prompt_id": "q", "prompt": "c", "response": "d"}) == [plain, "q"]


def test_repeated_rows_are_left_out_and_counted(tmp_path):
    """The same id and content once, the others counted; the same content under two ids is two rows."""
    row = {"prompt": "p", "response": "a"}
    rows, dropped = load_rows(jsonl(tmp_path, row, {"id": "x"} | row, row, {"id": "x"} | row, row), "response")
    assert (len(rows), dict(dropped)) == (2, {"repeated rows": 3})


def test_the_same_id_with_other_content_gets_an_id_of_its_own(tmp_path):
    """Two answers under one prompt_id are two rows with two ids, the first as it is in the data."""
    assert ids(tmp_path, {"prompt_id": "x", "prompt": "p", "response": "a"}, {"prompt_id": "x", "prompt": "p", "response": "b"}) == ["x", "x-2"]


def test_no_two_rows_ever_have_the_same_id(tmp_path):
    """... even where the data's own ids look like the ones we make."""
    rows = [{"id": name, "prompt": "p", "response": text} for name, text in (("x-2", "a"), ("x", "b"), ("x", "c"), ("y", "d"), ("y", "e"), ("y-2", "f"))]
    assert len(set(ids(tmp_path, *rows))) == 6


def test_the_held_out_tenth_is_the_same_in_any_run_and_any_order():
    """Split by a fixed hash of the prompt: these of 40, whatever their answers, ids and order."""
    rows = [{"id": str(i), "prompt": [user(f"prompt {i}")], "response": str(i)} for i in range(40)]
    for some in (rows, rows[::-1], [row | {"response": "other", "id": "x" + row["id"]} for row in rows]):
        train, held = hold_out(some)
        assert sorted(row["prompt"][0]["content"] for row in held) == HELD
        assert [row for row in some if row in train] == train and len(train) == 40 - len(HELD)


HELD = ["prompt 0", "prompt 16", "prompt 18", "prompt 24", "prompt 30", "prompt 5"]


def test_no_prompt_is_on_both_sides_and_about_a_tenth_is_held_out():
    """2000 prompts with two answers each: disjoint by prompt, nothing lost, 8 % to 12 % held out."""
    rows = [{"id": f"{i}-{j}", "prompt": [user(f"question {i}")], "response": f"answer {j}"} for i in range(2000) for j in range(2)]
    train, held = hold_out(rows)
    assert not {r["prompt"][0]["content"] for r in train} & {r["prompt"][0]["content"] for r in held}
    assert len(train) + len(held) == 4000 and 320 <= len(held) <= 480


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The toy world's files with a model that has no weights, and a context of 64: whoever reads weights before the checks are done fails."""
    folder = tmp_path_factory.mktemp("bare")
    transformers.LlamaConfig(vocab_size=23, hidden_size=8, num_attention_heads=2, max_position_embeddings=64).save_pretrained(folder / "sft")
    toy.tokenizer().save_pretrained(folder / "sft")
    (folder / "train.jsonl").write_text(lines({"prompt": x, "response": x} for x in ("abcdef", "bcdefg", "cdefgh", "defghi")))
    (folder / "test.jsonl").write_text(lines({"prompt": x, "response": x} for x in ("hgfedc", "gfedcb")))
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test in which a model is loaded, or the toy world made."""
    def fail(*_, **__):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr(toy, "make", fail)


@pytest.fixture
def refused(no_weights, monkeypatch, capsys):
    """refused(module, *flags) runs its main and -> the one line on stderr with which it ended, exit code 2, no model loaded."""
    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            module.main()
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        return line
    return run


def generate_flags(bare, out, **more):
    flags = dict(model=bare / "sft", data=bare / "train.jsonl", out=out, max_new_tokens=16) | more
    return [x for name, value in flags.items() for x in (f"--{name}", value)]


def has(line, *words):
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


@pytest.mark.parametrize("flags, words", [
    ("--bete 1", "--bete"), ("--iter 3", "--iter"), ("--noise yes", "yes"), ("stray", "stray"), ("--batch", "--batch|argument"),
    ("--lr fast", "--lr|float|fast"), ("--batch 1.5", "--batch|int|1.5"), ("--labels gpt", "--labels|gpt|annotation"),
    ("--lr -1", "--lr|above 0|-1"), ("--lr nan", "--lr|nan"),
    ("--beta 0", "--beta|above 0"), ("--batch -8", "--batch|-8"), ("--noise_init -0.1", "--noise_init|-0.1"), ("--iterations -1", "--iterations|-1"),
    ("--temperature -1", "--temperature|-1"), ("--noise-penalty -2", "--noise_penalty|-2"), ("--limit -5", "--limit|-5"), ("--limit 0", "--limit|above 0"),
    ("--max_steps -1", "--max_steps|-1"), ("--max_steps 0", "--max_steps|0"), ("--labels judge --judge none", "--labels|--judge none"),
    ("--parallel fsdp --offload_reference", "--offload_reference|torchrun")])
def test_a_wrong_flag_is_named(flags, words, refused, bare, tmp_path):
    """Unknown, abbreviated, mistyped, out of range or contradictory: one line that names the flag and the value."""
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out"), *flags.split()), *words.split("|"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    ("--model=", "--model|missing"), ("--out=", "--out|missing"), ("--n 0", "--n|above 0"), ("--temperature -1", "--temperature"), ("--max_new 3", "--max_new"),
    ("--dtype int8", "--dtype|int8|bfloat16"), ("--limit -1", "--limit|-1"), ("--limit 0", "--limit|0"), ("--batch -1", "--batch|-1")])
def test_a_wrong_flag_of_generate_is_named(flags, words, refused, bare, tmp_path):
    """The same for generate.py."""
    has(refused(generate, *generate_flags(bare, tmp_path / "out.jsonl"), *flags.split()), *words.split("|"))
    assert not (tmp_path / "out.jsonl").exists()


GOOD = '{"prompt": "a", "response": "b"}\n'
BAD_FILES = {
    "empty file": (".jsonl", "", ["no rows"]),
    "blank lines only": (".jsonl", "\n \n\n", ["no rows"]),
    "empty list": (".json", "[]", ["no rows"]),
    "binary": (".jsonl", b"PK\x03\x04\0\0\0", ["binary"]),
    "invalid UTF-8": (".jsonl", GOOD.encode() + b'{"prompt": "\xff"}\n', [":2:", "UTF-8", "0xff"]),
    "broken JSON": (".jsonl", GOOD + "\n" + GOOD + '{"prompt": \n', [":4:", "JSON"]),
    "broken JSON in a list": (".json", '[{"prompt": "a", "response": "b"},\n {"prompt": "a" "response": "b"}]', [":2:", "JSON"]),
    "no parquet": (".parquet", "PAR1 no", ["not a parquet file"]),
    "no object": (".jsonl", GOOD + "[1, 2]\n", [":2:", "object", "list"]),
    "no object in a list": (".json", "[" + GOOD + ", 7]", ["item 2", "object", "int"]),
    "unknown columns": (".jsonl", GOOD + '{"text": "a", "label": 1}\n', [":2:", "'label', 'text'", '{"messages": [...]}', "for example", "Sort: b a"]),
    "no response": (".jsonl", '{"prompt": "a"}\n', [":1:", "['prompt']", "response", "for example"]),
    "null response": (".jsonl", '{"prompt": "a", "response": null}\n', [":1:", "response"]),
    "answer without prompt": (".jsonl", '{"chosen": "a", "rejected": "b"}\n', [":1:", "without a prompt"]),
    "number as response": (".jsonl", '{"question": "a", "answer": 5}\n', [":1:", "text"]),
    "parts as content": (".jsonl", '{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "response": "a"}\n', [":1:", "text"]),
    "half an emoji, which is no Unicode": (".jsonl", GOOD + '{"prompt": "a\\ud83d", "response": "b"}\n', [":2:"]),
    "empty prompt": (".jsonl", GOOD + '{"prompt": " \\n", "response": "b"}\n', [":2:", "empty prompt"]),
    "empty turn": (".jsonl", lines([{"prompt": [user("a"), assistant(""), user("c")], "response": "b"}]), [":1:", "empty prompt"]),
    "empty response": (".jsonl", GOOD + GOOD + '{"prompt": "a", "response": "  "}\n', [":3:", "empty response"]),
    "user twice": (".jsonl", lines([{"prompt": [user("a"), user("b")], "response": "b"}]), [":1:", "roles out of order", "['user', 'user']"]),
    "assistant first": (".jsonl", lines([{"messages": [assistant("a"), user("b"), assistant("c")]}]), [":1:", "roles out of order"]),
    "assistant last": (".jsonl", lines([{"prompt": [user("a"), assistant("b")], "response": "c"}]), [":1:", "roles out of order", "['user', 'assistant']"]),
    "answer by the user": (".jsonl", lines([{"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]}]), [":1:", "roles out of order"]),
    "system in the middle": (".jsonl", lines([{"messages": [user("a"), system("s"), assistant("c")]}]), [":1:", "roles out of order", "system"]),
    "system twice": (".jsonl", lines([{"prompt": [system("s"), system("s"), user("a")], "response": "b"}]), [":1:", "roles out of order", "system"]),
    "other names": (".jsonl", lines([{"prompt": [{"role": "human", "content": "a"}], "response": "d"}]), [":1:", "roles out of order", "human"]),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_faulty_file_is_named_with_its_line(fault, refused, bare, tmp_path):
    """File, line (or item) and what is wrong, in one line, for training and held-out data alike."""
    suffix, content, words = BAD_FILES[fault]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out", data=path)), str(path), *words)
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out", test=path)), str(path), *words)


def test_data_that_is_not_there_is_named(refused, bare, tmp_path):
    """A missing file, an empty folder and a name nobody knows."""
    (tmp_path / "empty").mkdir()
    has(refused(dnpo, *dnpo_flags(bare, data=tmp_path / "none.jsonl")), f"{tmp_path / 'none.jsonl'}: no such file")
    has(refused(dnpo, *dnpo_flags(bare, data=tmp_path / "empty")), str(tmp_path / "empty"), "neither", "data set")
    has(refused(generate, *generate_flags(bare, tmp_path / "out", data="nobody/nothing:train")), "nobody/nothing:train", "neither", "data set")


def test_two_prompts_in_one_pair_are_refused(tmp_path, capsys):
    """chosen and rejected that begin with different prompts are no pair."""
    with pytest.raises(SystemExit):
        load_rows(jsonl(tmp_path, {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]}), "pair")
    has(capsys.readouterr().err, "data.jsonl:1: ", "different prompts")


def test_faulty_rows_of_a_data_set_are_left_out_and_counted(tmp_path, capsys):
    """Nobody can mend the Hub from here: rows are counted by reason; wrong columns still end the run."""
    good = {"prompt": [user("a")], "response": "b"}
    faulty = [good | {"response": " "}, good | {"prompt": [assistant("a")]}, good | {"prompt": [user("c"), user("d")]}]
    path = stored(tmp_path, "folder", [good, *faulty, good | {"response": "d"}])
    rows, dropped = load_rows(path, "response")
    assert [row["response"] for row in rows] == ["b", "d"] and dict(dropped) == {"empty response": 1, "roles out of order": 2}
    with pytest.raises(SystemExit):
        load_rows(path, "pair")
    has(capsys.readouterr().err.splitlines()[-1], path, "row 1", "['prompt', 'response']", "pair")


def model_copy(bare, folder, tokenizer={}, config={}, drop=()):
    """The bare model with other entries in its files."""
    target = folder / "model"
    target.mkdir()
    for file in (bare / "sft").iterdir():
        if file.name not in drop:
            text, more = file.read_text(), {"tokenizer_config.json": tokenizer, "config.json": config}.get(file.name)
            (target / file.name).write_text(json.dumps(json.loads(text) | more) if more else text)
    return target


def test_a_path_that_is_no_model_is_named(refused, bare, tmp_path):
    """A folder without config.json, a file, a name nobody knows, a broken config: for dnpo.py, generate.py and both local judges."""
    (tmp_path / "runs").mkdir()
    broken = model_copy(bare, tmp_path)
    (broken / "config.json").write_text("{")
    for path, words in ((tmp_path / "runs", ["not a model", "config.json"]), (bare / "train.jsonl", ["not a model"]), (tmp_path / "none", ["neither"]),
                        (broken, ["neither"])):
        for line in (refused(dnpo, *dnpo_flags(bare, model=path)), refused(generate, *generate_flags(bare, tmp_path / "out", model=path)),
                     refused(dnpo, *dnpo_flags(bare, judge=f"rm:{path}")), refused(dnpo, *dnpo_flags(bare, judge=f"hf:{path}"))):
            has(line, str(path), *words)


def test_a_tokenizer_without_a_chat_template_is_refused(refused, bare, tmp_path):
    """... and told where to put one; one without an end-of-sequence token is refused too."""
    plain = model_copy(bare, tmp_path, drop=["chat_template.jinja"])
    has(refused(dnpo, *dnpo_flags(bare, model=plain)), str(plain), "no chat template", "chat_template.jinja")
    has(refused(generate, *generate_flags(bare, tmp_path / "out", model=plain)), str(plain), "no chat template")
    (tmp_path / "b").mkdir()
    endless = model_copy(bare, tmp_path / "b", tokenizer={"eos_token": None})
    has(refused(dnpo, *dnpo_flags(bare, model=endless)), str(endless), "end-of-sequence")


def test_a_head_that_is_not_linear_is_refused(refused, bare, tmp_path):
    """A model whose logits are scaled or capped would be trained on other log-probs than its own."""
    scaled = model_copy(bare, tmp_path, config={"logit_scale": 0.25})
    has(refused(dnpo, *dnpo_flags(bare, model=scaled)), str(scaled), "logit_scale")


def test_a_prompt_that_the_template_refuses_is_reported_in_one_line(refused, bare, tmp_path):
    """Some templates (Gemma's) raise on a system turn: the row's id and the template's message, no traceback."""
    strict = model_copy(bare, tmp_path, drop=["chat_template.jinja"])
    (strict / "chat_template.jinja").write_text("{{ raise_exception('No system role') if messages[0]['role'] == 'system' else messages[0]['content'] }}")
    data = jsonl(tmp_path, {"id": "r1", "prompt": [system("s"), user("a")], "response": "b"})
    has(refused(dnpo, *dnpo_flags(bare, model=strict, data=data)), "No system role")


def test_a_batch_must_be_divisible_by_ranks_times_micro_batch(refused, bare, monkeypatch):
    """10 pairs are not 1 rank x 4, 16 pairs not 3 ranks x anything, 24 not 3 ranks x 5: the line names the three numbers."""
    has(refused(dnpo, *dnpo_flags(bare, batch=10, micro_batch=4)), "--batch 10", "1 ranks", "--micro_batch 4")
    monkeypatch.setattr(dnpo, "ranks", lambda: (0, 3))
    has(refused(dnpo, *dnpo_flags(bare, batch=16, micro_batch=2)), "--batch 16", "3 ranks", "--micro_batch 2")
    has(refused(dnpo, *dnpo_flags(bare, batch=24, micro_batch=5)), "--batch 24", "3 ranks", "--micro_batch 5")


def printed(module, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
    module.main()
    return capsys.readouterr().out


def test_a_dry_run_checks_everything_and_leaves_nothing(no_weights, bare, tmp_path, monkeypatch, capsys):
    """Lengths that just fit the context (48 + 16 = 64) and a divisible batch pass; no folder, no weights; the example shows what is learned."""
    shown = printed(dnpo, monkeypatch, capsys, *dnpo_flags(bare, out=tmp_path / "out", max_prompt=48, dry_run=True))
    has(shown, "4 training, 2 held-out", "batch 16 = 1 ranks x 8 pairs x 2 micro-batches",
        "no loss: '<bos><|user|>abcdef<|assistant|>'", "with loss: 'abcdef<eos>' (9 + 7 tokens)")
    assert not (tmp_path / "out").exists()


def test_without_test_data_a_tenth_is_held_out(no_weights, bare, tmp_path, monkeypatch, capsys):
    """--data alone is split by prompt: the same held-out prompts as in hold_out above; repeated rows are counted in the header."""
    data = jsonl(tmp_path, *({"prompt": f"prompt {i}", "response": "a"} for i in range(40)), {"prompt": "prompt 1", "response": "a"})
    flags = dnpo_flags(bare, data=data, preset="paper", out=tmp_path / "out", dry_run=True)
    del flags[flags.index("--test"):flags.index("--test") + 2]
    has(printed(dnpo, monkeypatch, capsys, *flags), f"{40 - len(HELD)} training, {len(HELD)} held-out", "1 left out: repeated rows")


def test_prompts_longer_than_the_limit_are_counted_and_none_left_is_an_error(no_weights, refused, bare, tmp_path, monkeypatch, capsys):
    """A prompt of n letters has n + 3 tokens: with room for 8, 5 letters stay, 6 are left out and counted; if all are, the run ends. For generate.py
    the room is what --max_new_tokens leaves of the context of 64."""
    data = jsonl(tmp_path, *({"id": x, "prompt": x, "response": x} for x in ("abcde", "abcdef", "abcd", "abcdefg")))
    flags = dnpo_flags(bare, data=data, test=data, out=tmp_path / "out", max_prompt=8, dry_run=True)
    has(printed(dnpo, monkeypatch, capsys, *flags), "2 training, 2 held-out", "4 left out: prompts longer than --max_prompt")
    has(refused(dnpo, *flags[:-1], "--max_prompt", 6), data, "0 training", "6 tokens")
    monkeypatch.setattr(generate, "generate", lambda out, rows, *_, **__: [{"meta": {"finish": "stop"}} for row in rows])
    shown = printed(generate, monkeypatch, capsys, *generate_flags(bare, tmp_path / "o", data=data, max_new_tokens=56))
    has(shown, "2 prompts x 1", "2 left out: prompts of more than 8 tokens", "2 answers")
    has(refused(generate, *generate_flags(bare, tmp_path / "o", data=data, max_new_tokens=58)), "none of the 4 prompts", "6 tokens", "--max_new_tokens 58")


def test_lengths_beyond_the_context_are_refused(refused, bare, tmp_path):
    """49 + 16 tokens do not fit into a context of 64, nor does an answer of 64 to any prompt."""
    has(refused(dnpo, *dnpo_flags(bare, max_prompt=49)), "--max_prompt 49", "--max_response 16", "64")
    has(refused(generate, *generate_flags(bare, tmp_path / "o", max_new_tokens=64)), "context", "--max_new_tokens 64")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_in_use_is_not_touched_without_resume_or_overwrite(refused, bare, tmp_path):
    """A run's folder needs --resume or --overwrite; a folder that is no run is refused even so. Nothing in them changes."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir(), other.mkdir()
    (run / "config.json").write_text("{}"), (run / "results.json").write_text("mine"), (other / "thesis.tex").write_text("mine")
    before = contents(run), contents(other)
    has(refused(dnpo, *dnpo_flags(bare, out=run)), str(run), "not empty", "--resume", "--overwrite")
    has(refused(dnpo, *dnpo_flags(bare, out=other)), str(other), "not empty")
    has(refused(dnpo, *dnpo_flags(bare, out=other, overwrite=True)), str(other), "no run", "--overwrite")
    has(refused(dnpo, *dnpo_flags(bare, out=other, resume=True)), str(other), "no run", "resume")
    assert (contents(run), contents(other)) == before


def test_a_file_is_no_folder_for_a_run(refused, bare, tmp_path):
    """--out that names a file is refused in one line, and the file stays, with --overwrite too."""
    (tmp_path / "file").write_text("mine")
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "file")), str(tmp_path / "file"))
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "file", overwrite=True)), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_file_that_exists_is_not_touched(refused, bare, tmp_path):
    """generate.py never writes over a file."""
    (tmp_path / "o.jsonl").write_text("mine")
    has(refused(generate, *generate_flags(bare, tmp_path / "o.jsonl")), str(tmp_path / "o.jsonl"), "there already")
    assert contents(tmp_path)["o.jsonl"] == "mine"


def test_a_run_is_resumed_only_with_its_own_config(no_weights, refused, bare, tmp_path, monkeypatch):
    """Another --beta is refused with both values, and nothing changes; the same config goes on to load the model; --iterations may be raised."""
    out, begun = tmp_path / "run", dnpo_flags(bare, out=tmp_path / "run", beta=0.5)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(parse(dnpo.Config, PRESETS, list(map(str, begun))))))
    before = contents(out)
    has(refused(dnpo, *begun, "--beta", 0.25, "--resume"), str(out), "--beta", "0.5", "0.25")
    has(refused(dnpo, *begun, "--no-noise", "--resume"), "--noise", "True", "False")
    assert contents(out) == before
    for more in (["--resume"], ["--resume", "--iterations", "5"]):
        monkeypatch.setattr(sys, "argv", ["dnpo.py", *map(str, begun), *more])
        with pytest.raises(AssertionError, match="a model was loaded"):
            dnpo.main()


def test_an_endpoint_that_does_not_answer_is_named(refused, bare, tmp_path, monkeypatch):
    """An address at which nobody listens, in OPENAI_BASE_URL or --endpoint, is found out before the work begins."""
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url), monkeypatch.setenv("OPENAI_API_KEY", "sk-secret"), monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for line in (refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out", judge="api:m")), refused(generate, *generate_flags(bare, tmp_path / "o", endpoint=url))):
        has(line, url, "no answer")
        assert "sk-secret" not in line
    monkeypatch.delenv("OPENAI_BASE_URL"), monkeypatch.delenv("OPENAI_API_KEY")
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out", judge="api:m")), "OPENAI_API_KEY", "OPENAI_BASE_URL")


@pytest.mark.parametrize("spec", ["gpt-4o", "toy:1", "none:", "rm:", "hf:", "api:", "openai:gpt-4o", ""])
def test_a_judge_that_is_none_is_refused(spec, refused, bare, tmp_path):
    """--judge is toy, hf:PATH, rm:PATH, api:MODEL or none: anything else is answered with this list."""
    has(refused(dnpo, *dnpo_flags(bare, out=tmp_path / "out"), "--judge", spec), f"--judge {spec}".strip(), "toy, hf:PATH, rm:PATH, api:MODEL or none")


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    """Under torchrun every rank ends with code 2, but the line is printed once."""
    for rank, shown in (("0", "error: so it is\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            common.die("so it is")
        assert (end.value.code, capsys.readouterr().err) == (2, shown)


@pytest.mark.parametrize("name", ["dnpo.py", "generate.py"])
def test_bad_input_is_one_line_for_a_real_process_too(name, bare, tmp_path):
    """What libraries load on the way to the check prints nothing of its own: a name that is no model behind a data set folder, a model without template."""
    plain, data = model_copy(bare, tmp_path, drop=["chat_template.jinja"]), stored(tmp_path, "folder", [{"prompt": "a", "response": "b"}])
    flags, words = {"dnpo.py": (dnpo_flags(bare, data=data, model="no/model"), "error: no/model: neither"),
                    "generate.py": (generate_flags(bare, tmp_path / "o", model=plain), f"error: {plain}: its tokenizer has no chat template")}[name]
    done = script(name, *flags, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 2 and done.stderr.startswith(words) and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- flags


def test_a_flag_may_be_written_with_dashes_or_underscores():
    """--max-prompt 7 is --max_prompt 7, --no-mix-previous is --no-mix_previous, and both do what they say."""
    ours = parse(dnpo.Config, PRESETS, ["--max_prompt", "7", "--no-mix_previous", "--noise_lr=0.5"])
    theirs = parse(dnpo.Config, PRESETS, ["--max-prompt", "7", "--no-mix-previous", "--noise-lr=0.5"])
    assert ours == theirs and (ours.max_prompt, ours.mix_previous, ours.noise_lr) == (7, False, 0.5)


def test_no_noise_turns_the_noise_off_and_noise_turns_it_on():
    """--no-noise and --noise, the last one wins; nothing else changes."""
    on, off, again = (parse(dnpo.Config, PRESETS, argv) for argv in ([], ["--no-noise"], ["--no-noise", "--noise"]))
    assert (on.noise, off.noise) == (True, False) and again == on == dataclasses.replace(off, noise=True)


def test_the_preset_is_toy_without_cuda_and_paper_with_it(monkeypatch):
    """... unless --preset says which."""
    toys, papers = ("toy", "toy", "runs/toy/sft"), ("paper", "rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B", "alignment-handbook/zephyr-7b-sft-full")
    for cuda, asked, expected in ((False, [], toys), (True, [], papers), (True, ["--preset", "toy"], toys), (False, ["--preset=paper"], papers)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        c = parse(dnpo.Config, PRESETS, asked)
        assert (c.preset, c.judge, c.model) == expected


def test_a_flag_overrides_the_preset():
    """Whatever is typed holds, also where it equals the field's own default; the rest is the preset's."""
    plain, c = (parse(dnpo.Config, PRESETS, ["--preset", "toy", *more]) for more in ([], ["--max_response", "512", "--limit", "12", "--dtype", "bfloat16"]))
    assert (plain.max_response, plain.dtype) == (64, "float32") and (dnpo.Config.max_response, dnpo.Config.dtype) == (512, "bfloat16")
    assert c == dataclasses.replace(plain, max_response=512, limit=12, dtype="bfloat16")


def test_the_presets_held_out_data_go_with_its_training_data():
    """Whoever brings --data is not measured on the toy world's prompts, unless --test says so."""
    for argv, test in (([], "runs/toy/test.jsonl"), (["--data", "mine.jsonl"], None), (["--data", "mine.jsonl", "--test", "held.jsonl"], "held.jsonl")):
        assert parse(dnpo.Config, PRESETS, ["--preset", "toy", *argv]).test == test


def test_n_has_a_second_name():
    """torchrun takes --n for one of its own flags: generate.py's --samples is the same."""
    first, second = (parse(generate.Config, argv=["--model", "m", "--data", "d", "--out", "o", name, "4"]) for name in ("--n", "--samples"))
    assert first == second and first.n == 4


@pytest.mark.parametrize("config, presets", [(dnpo.Config, PRESETS), (generate.Config, {})], ids=["dnpo", "generate"])
def test_every_flag_has_a_help_text_with_its_default(config, presets, monkeypatch, capsys):
    """--help says of every field what it means, in at least three words, and its default."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        parse(config, presets, ["--help"])
    assert end.value.code == 0
    entries = {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^  --(\w+)\b(.*?)(?=^  --|\Z)", capsys.readouterr().out, re.M | re.S)}
    for field in dataclasses.fields(config):
        text = re.sub(r"^.*?(?=[a-z(0-9])", "", entries[field.name].split(" (default: ")[0])
        assert len(re.findall(r"[A-Za-z\d]{2,}", text)) >= 3, (field.name, entries[field.name])
        assert f"(default: {field.default}" in entries[field.name], field.name
