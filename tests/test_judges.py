"""A judge's answer is a score only if it could be read, is asked in both orders, paid for once, and never invented."""
import contextlib
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import common
import generate
import toy
from common import Judge, TextJudge, make_judge, read_score, read_verdict

user = lambda text: [{"role": "user", "content": text}]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("text, score", [
    ("Rating: [[7]]", 7), ("Rating: [[10]]", 10), ("Rating: [[1]]", 1), ("Rating: [[ 8 ]]", 8), ("Rating: [[7.5]]", 7.5), ("[[3]] it is.\nThank you!", 3),
    ("The scale is [[1]] to [[10]]; Rating: [[7]]", 7), ("Rating: [[4]]. On reflection, Rating: [[6]]", 6), ("Rating: [[7]] of 10", 7),
    ("", None), ("I can't rate this response.", None), ("Rating: 7", None), ("Rating: [7]", None), ("Rating: [[n]]", None), ("Rating: [[seven]]", None),
    ("Rating: [[7/10]]", None), ("Rating: [[]]", None), ("Rating: [[0]]", None), ("Rating: [[11]]", None), ("Rating: [[100]]", None), ("Rating: [[-5]]", None),
    ("Rating: [[10.5]]", None), ("Rating: [[7", None), ("From [[1]] to [[10]], I give it [[12]]", None), ("Verdict: [[A]]", None)])
def test_a_score_is_the_last_one_in_double_brackets(text, score):
    """The last [[n]] with 1 <= n <= 10; what can't be read, or is off the scale, is None and never a default."""
    assert read_score(text) == score


@pytest.mark.parametrize("text, verdict", [
    ("Verdict: [[A]]", "A"), ("Verdict: [[B]]", "B"), ("Verdict: [[tie]]", "tie"), ("Verdict: [[Tie]]", "tie"), ("Verdict: [[TIE]]", "tie"),
    ("Verdict: [[b]]", "B"), ("Verdict: [[ A ]]", "A"), ("I choose between [[A]], [[B]] and [[tie]]. Verdict: [[A]]", "A"),
    ("At first [[A]], but then: Verdict: [[B]]", "B"), ("", None), ("Both are bad.", None), ("Verdict: A", None), ("Verdict: [A]", None),
    ("Verdict: [[C]]", None), ("Verdict: [[A or B]]", None),
    ("Verdict: [[A", None), ("Rating: [[7]]", None), ("I'm sorry, I can't compare these.", None)])
def test_a_verdict_is_the_last_one_in_double_brackets(text, verdict):
    """The last [[A]], [[B]] or [[tie]], in any case; else None."""
    assert read_verdict(text) == verdict


# ---------------------------------------------------------------- what all judges share


@pytest.mark.parametrize("answer, score", [("abc", 10), ("cab", 0), ("acb", 10 / 3), ("abcd", 7.5), ("ab", 20 / 3), ("", 0), ("abd", 20 / 3), ("aabc", 2.5)])
def test_the_toy_judge_is_exact(answer, score):
    """Ten times the share of positions at which the answer to "cab" is "abc", over the longer of both; no folder is needed."""
    talk = [{"role": "user", "content": "pon"}, {"role": "assistant", "content": "nop"}, *user("cab")]  # the last turn is the question
    assert make_judge("toy", None).score([(talk, answer)]) == [pytest.approx(score)]


def test_the_toy_judge_prefers_the_better_number_in_any_order():
    """Numbers need no second order: better wins, equal is a tie."""
    p = user("cab")
    assert make_judge("toy", None).compare([(p, "abc", "cab"), (p, "cab", "abc"), (p, "bca", "cab"), (p, "abc", "abc")]) == ["A", "B", "tie", "tie"]


class Fake(Judge):
    """Answers by a function of (kind, prompt text, texts, how often this item was asked before) and remembers what it was asked."""

    def __init__(self, answer, cache=None, spec="fake"):
        super().__init__(spec, cache)
        self.answer, self.calls, self.times, self.again = answer, [], Counter(), []

    def ask(self, kind, items, again):
        out = []
        for prompt, *texts in items:
            question = prompt[-1]["content"], *texts
            out.append(self.answer(kind, *question[:1], question[1:], self.times[question]))
            self.times[question] += 1
            self.calls.append(question)
            self.again.append(again)
        return out


def test_a_judge_that_always_says_a_gives_only_ties():
    """Both orders are asked, once each, and a verdict that follows the order is none."""
    for always in "AB":
        judge = Fake(lambda *_: always)
        assert judge.compare([(user("p"), "x", "y"), (user("q"), "x", "y")]) == ["tie", "tie"]
        assert Counter(judge.calls) == {("p", "x", "y"): 1, ("p", "y", "x"): 1, ("q", "x", "y"): 1, ("q", "y", "x"): 1}


def test_a_consistent_judge_gives_its_verdict():
    """Longer wins in both orders: its verdict is about the answers, whichever stands first. A tie in both is a tie, in one of them too."""
    longer = lambda kind, prompt, texts, _: "A" if len(texts[0]) > len(texts[1]) else "B" if len(texts[1]) > len(texts[0]) else "tie"
    p = user("p")
    assert Fake(longer).compare([(p, "long", "s"), (p, "s", "long"), (p, "aa", "bb")]) == ["A", "B", "tie"]
    assert Fake(lambda kind, prompt, texts, _: "A" if texts[0] == "x" else "tie").compare([(p, "x", "y"), (p, "y", "x")]) == ["tie", "tie"]


def test_a_verdict_that_cannot_be_read_in_one_order_stays_none():
    """None in either order, or both, is None: not a tie, not the other order's verdict."""
    p = user("p")
    for unreadable in ({("x", "y")}, {("y", "x")}, {("x", "y"), ("y", "x")}):
        judge = Fake(lambda kind, prompt, texts, _: None if texts in unreadable else "A" if texts[0] in "xv" else "B")
        assert judge.compare([(p, "x", "y"), (p, "v", "w")]) == [None, "A"]


def test_an_unreadable_answer_is_asked_once_more_and_never_again():
    """Readable at the second time: that is the score. Not even then: None after two questions, with again=True for the second."""
    judge = Fake(lambda kind, prompt, texts, times: {"first": 5.0, "second": 6.0 if times else None, "never": None}[prompt])
    assert judge.score([(user(p), "y") for p in ("never", "first", "second")]) == [None, 5.0, 6.0]
    assert judge.calls == [("never", "y"), ("first", "y"), ("second", "y"), ("never", "y"), ("second", "y")] and judge.again == [False] * 3 + [True] * 2


def test_the_same_question_is_asked_once():
    """Repeated items of one call, and of later ones, share one answer; scores and comparisons don't."""
    judge = Fake(lambda kind, *_: 3.0 if kind == "score" else "tie")
    item = user("p"), "y"
    assert judge.score([item, item, (user("p"), "z"), item]) == [3.0] * 4 and judge.score([item]) == [3.0]
    assert judge.calls == [("p", "y"), ("p", "z")]
    assert judge.compare([(user("p"), "y", "y")]) == ["tie"]


# ---------------------------------------------------------------- the cache


def test_a_second_judge_on_the_same_folder_asks_nothing(tmp_path):
    """Scores and verdicts (both orders) are read back as they were, in any order of the items."""
    p, q = user("p"), user("q")
    first = Fake(lambda kind, prompt, texts, _: 2.5 if kind == "score" else "A" if texts[0] == "x" else "B", tmp_path / "judge")
    assert first.score([(p, "x"), (q, "y")]) == [2.5, 2.5] and first.compare([(p, "x", "y")]) == ["A"]
    second = Fake(lambda *_: pytest.fail("asked again"), tmp_path / "judge")
    assert second.score([(q, "y"), (p, "x")]) == [2.5, 2.5] and second.compare([(p, "x", "y"), (p, "y", "x")]) == ["A", "B"]
    assert second.calls == []


def test_another_judge_other_text_or_other_prompt_is_another_question(tmp_path):
    """What is cached belongs to judge, prompt and texts."""
    Fake(lambda *_: 2.0, tmp_path).score([(user("p"), "x")])
    other, same = Fake(lambda *_: 9.0, tmp_path, spec="other"), Fake(lambda *_: 9.0, tmp_path)
    assert other.score([(user("p"), "x")]) == [9.0]
    assert same.score([(user("p"), "x"), (user("q"), "x"), (user("p"), "y"), (user("p") + user("p"), "x")]) == [2.0, 9.0, 9.0, 9.0]


def test_what_cannot_be_read_is_not_cached(tmp_path):
    """Only successes are kept: a later judge asks the unreadable ones again, and these only."""
    items = [(user("p"), text) for text in ("good", "bad")]
    assert Fake(lambda kind, prompt, texts, _: 4.0 if texts == ("good",) else None, tmp_path).score(items) == [4.0, None]
    assert "null" not in "".join(file.read_text() for file in tmp_path.iterdir())
    later = Fake(lambda *_: 8.0, tmp_path)
    assert later.score(items) == [4.0, 8.0] and later.calls == [("p", "bad")]


def test_a_torn_line_of_the_cache_is_ignored(tmp_path):
    """A kill in the middle of writing costs the torn line's answers, not the others, and not what is written after it."""
    Fake(lambda *_: 1.0, tmp_path).score([(user("p"), "a")])
    Fake(lambda *_: 2.0, tmp_path).score([(user("p"), "b")])
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().rstrip()[:-3])  # tears the last line, the one of "b"
    third = Fake(lambda *_: 3.0, tmp_path)
    assert third.score([(user("p"), "a"), (user("p"), "b")]) == [1.0, 3.0] and third.calls == [("p", "b")]
    file.write_bytes(file.read_bytes() + b'{"\xe2\x82')  # in the middle of a character, too
    assert Fake(lambda *_: pytest.fail("asked again"), tmp_path).score([(user("p"), "a"), (user("p"), "b")]) == [1.0, 3.0]


def test_more_than_a_fifth_unreadable_ends_the_run(tmp_path, capsys):
    """4 of 20 go on; the 5th ends the program with the counts. What could be read is kept all the same, so that nothing is paid twice."""
    judge = Fake(lambda kind, prompt, texts, _: None if int(prompt) < 5 else 7.0, tmp_path)
    items = [(user(str(i)), "y") for i in range(30)]
    assert judge.score(items[1:21]) == [None] * 4 + [7.0] * 16
    with pytest.raises(SystemExit) as end:
        Fake(judge.answer, tmp_path / "other").score(items[:20])
    message = str(end.value.code)
    assert "5 of 20" in message and "fake" in message and "could not be read" in message and "\n" not in message
    assert Fake(lambda *_: 0.0, tmp_path / "other").score(items[5:20]) == [7.0] * 15


def test_the_share_of_unreadable_answers_is_counted_over_the_whole_run(tmp_path):
    """A batch of one unreadable answer alone ends nothing, few among many neither; many batches with a third of them do."""
    judge = Fake(lambda kind, prompt, texts, _: None if int(prompt) % 3 == 0 else 7.0)
    assert judge.score([(user("0"), "y")]) == [None]
    with pytest.raises(SystemExit):
        for i in range(1, 100):
            judge.score([(user(str(i)), "y")])
    assert 19 <= i <= 21


# ---------------------------------------------------------------- rm:PATH, a reward model


def reward_model(folder, outputs):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(0)
    tok = toy.tokenizer()
    config = LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=outputs, initializer_range=0.5)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder), tok.save_pretrained(folder)
    return model


def test_a_reward_is_the_models_output_at_the_end_of_the_conversation(tmp_path):
    """The head applied to the last hidden state of <bos><|user|>cab<|assistant|>abc<eos>, whatever else is scored with it."""
    model = reward_model(tmp_path / "rm", 1)
    direct = lambda ids: model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
    with torch.no_grad():
        right, wrong = direct([1, 4, 9, 7, 8, 5, 7, 8, 9, 2]), direct([1, 4, 9, 7, 8, 5, 9, 2])  # ids of the toy tokenizer: a is 7
    assert abs(right - wrong) > 0.01
    judge, p = make_judge(f"rm:{tmp_path / 'rm'}", tmp_path / "cache"), user("cab")
    assert judge.score([(p, "abc"), (p, "c")]) == pytest.approx([right, wrong], abs=1e-5)
    assert judge.score([(p, "c")]) == pytest.approx([wrong], abs=1e-5)
    assert judge.compare([(p, "abc", "c"), (p, "c", "abc"), (p, "c", "c")]) == (["A", "B", "tie"] if right > wrong else ["B", "A", "tie"])
    assert judge.full is None  # a reward has no best mark
    judge.free()
    assert judge.score([(p, "b")]) == pytest.approx([direct([1, 4, 9, 7, 8, 5, 8, 2])], abs=1e-5)


def test_a_model_with_two_outputs_is_no_reward_model(tmp_path, capsys):
    """num_labels = 2, also what a language model has, is refused in one line before weights are read."""
    reward_model(tmp_path / "two", 2)
    (tmp_path / "two" / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as end:
        make_judge(f"rm:{tmp_path / 'two'}", None)
    line = capsys.readouterr().err
    assert end.value.code == 2 and f"rm:{tmp_path / 'two'}" in line and "one output" in line and "2" in line and line.count("\n") == 1


# ---------------------------------------------------------------- hf:PATH, a local chat model


def test_a_model_that_cannot_judge_gives_no_number(world, tmp_path):
    """The toy world's model answers with letters: None for scores and verdicts, nothing in the cache, and with 20 of them the run ends."""
    judge = make_judge(f"hf:{world / 'sft'}", tmp_path)
    assert judge.score([(user("cab"), "abc"), (user("ab"), "b")]) == [None, None]
    assert judge.compare([(user("cab"), "abc", "bca")]) == [None]
    assert list(tmp_path.iterdir()) == []
    judge.asked = judge.unreadable = 18
    with pytest.raises(SystemExit, match="20 of 20"):
        judge.score([(user("cab"), "a"), (user("cab"), "b")])


def replaced_sample(monkeypatch, opening, answer):
    """Replaces the model's answers by answer(the question, whose letters the toy tokenizer knows); -> the batches it was asked in."""
    batches = []

    def sample(lm, tok, prompts, temperature, *_):
        batches.append((len(prompts), temperature))
        out = []
        for ids in prompts:
            header = len(ids) - 1 - ids[::-1].index(5)  # the last <|assistant|>
            letters = ["abcdefghijklmnop"[i - 7] if i >= 7 else " " for i in ids[:header]]
            out.append((answer("".join(letters)), "stop"))
            assert tok.decode(ids[header:], skip_special_tokens=False) == tok.decode(tok("<|assistant|>" + opening)["input_ids"])  # the answer is begun
        return out
    monkeypatch.setattr(common, "sample", sample)
    monkeypatch.setattr(common, "load_lm", lambda *_, **__: "a model")
    return batches


def test_answers_of_a_local_model_come_back_in_the_items_order(world, monkeypatch):
    """Questions are sorted by length and asked in batches of 16; the score of n letters "a" is n wherever it stood. The second try is drawn, not greedy."""
    lengths = [1 + 7 * i % 10 for i in range(20)]
    batches = replaced_sample(monkeypatch, "Rating: [[", lambda text: f"{len(text) - len(text.rstrip('a'))}]] is my rating [")
    judge = make_judge(f"hf:{world / 'sft'}", None)
    assert judge.score([(user("cab" + "p" * i), "a" * n) for i, n in enumerate(lengths)]) == lengths
    assert batches == [(16, 0.0), (4, 0.0)]
    batches = replaced_sample(monkeypatch, "Rating: [[", lambda text: "7")  # "Rating: [[7" is cut: no number
    assert judge.score([(user("ba"), "b")]) == [None] and batches == [(1, 0.0), (1, 1.0)]


def test_verdicts_of_a_local_model_are_asked_in_both_orders(world, monkeypatch):
    """The model sees both answers under A and B: the same letter for both orders is a tie, the same answer is a verdict."""
    judge = make_judge(f"hf:{world / 'sft'}", None)
    replaced_sample(monkeypatch, "Verdict: [[", lambda text: "A]]")
    assert judge.compare([(user("cab"), "abc", "bbb")]) == ["tie"]
    replaced_sample(monkeypatch, "Verdict: [[", lambda text: "A]]" if text.endswith("ccc") else "B]]")  # against "ccc"
    assert judge.compare([(user("cab"), "aaa", "ccc"), (user("cab"), "ccc", "aaa")]) == ["A", "B"]


def test_a_local_model_is_held_to_the_form(world, tmp_path, monkeypatch):
    """It may say digits and brackets for a score, the letters of A, B and tie for a verdict, nothing else; what it says so may still be unreadable."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=chr(3), unk_token="?")
    tok.chat_template = "{{ messages[0]['content'] }}"
    tok.save_pretrained(tmp_path), LlamaConfig(vocab_size=128).save_pretrained(tmp_path)
    judge, allowed = make_judge(f"hf:{tmp_path}", None), []
    monkeypatch.setattr(common, "load_lm", lambda *_, **__: "a model")
    monkeypatch.setattr(common, "sample", lambda lm, tok, prompts, *how: allowed.append("".join(map(chr, how[-1]))) or [("1]]", "length")] * len(prompts))
    assert judge.score([(user("p"), "y")]) == [1] and judge.compare([(user("p"), "x", "y")]) == [None]
    assert set(allowed[0]) == set("0123456789]") and set(allowed[1]) == set("ABtie]")
    monkeypatch.undo()
    lm, toy_tok = common.load_lm(str(world / "sft"), torch.float32, "cpu"), toy.tokenizer()
    free, held = (common.sample(lm, toy_tok, [[1, 4, 9, 7, 8, 5]] * 4, 1.0, 12, 0, ids) for ids in (None, [15, 16]))  # "cab"; i and j
    assert all(set(text) == set("ij") and finish == "length" for text, finish in held) and not any(set(text) <= set("ij") for text, _ in free)


class Words(TextJudge):
    """A text judge whose backend keeps the questions."""

    def complete(self, questions, opening, again):
        self.questions = questions
        return [opening + "7]]" for _ in questions]


def test_the_question_shows_prompt_and_answers_as_they_are():
    """Braces and brackets in texts stay; A and B stand in their places; earlier turns are shown with their roles."""
    judge = Words("words", None)
    assert judge.score([(user("sort {b} {a}"), "{a} [[9]] {prompt}")]) == [7.0]
    assert judge.questions[0].endswith("[Instruction]\nsort {b} {a}\n\n[Response]\n{a} [[9]] {prompt}") and "Rating: [[n]]" in judge.questions[0]
    talk = [{"role": "system", "content": "s"}, *user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    judge.compare([(talk, "first", "second")])
    assert judge.questions[0].endswith("[Instruction]\nsystem: s\n\nuser: a\n\nassistant: b\n\nuser: c\n\n[Response A]\nsecond\n\n[Response B]\nfirst")


# ---------------------------------------------------------------- api:MODEL and generate.py --endpoint


def answer(text, finish="stop"):
    return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}]}


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback. reply(question, n) -> what the n-th request (from 0) with this last message is answered with:
    a text, a status code, "<hang>", "<broken>", or a whole body as a dict."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, reply, models=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.models, self.lock = reply, models, threading.Lock()
        self.bodies, self.keys, self.times, self.now, self.most = [], set(), Counter(), 0, 0  # what was asked, and how many at once
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, address):
        """The client hung up: that is what a time-out is."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.send(self.server.models, b'{"object": "list", "data": []}')

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            question = body["messages"][-1]["content"]
            n, server.times[question] = server.times[question], server.times[question] + 1
            server.bodies.append(body), server.keys.add(self.headers["Authorization"])
            server.now += 1
            server.most = max(server.most, server.now)
        reply = server.reply(question, n)
        time.sleep(3 if reply == "<hang>" else 0.03)
        with server.lock:
            server.now -= 1
        if isinstance(reply, int):
            self.send(reply, b'{"error": {"message": "not now"}}', Retry_After="0")
        elif reply == "<broken>":
            self.send(200, b'{"choices": [{"mess')
        else:
            self.send(200, json.dumps(reply if isinstance(reply, dict) else answer(reply)).encode())


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a server, points OPENAI_BASE_URL at it, and makes time-outs short and back-off quick."""
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(common, "API_TIMEOUT", 1), monkeypatch.setattr(common, "API_RETRIES", 4)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret"), monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.ExitStack() as servers:
        def start(reply, models=200):
            server = Server(reply, models)
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.callback(server.server_close), servers.callback(server.shutdown)
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            return server
        yield start


def response_of(question):
    return question.rsplit("[Response]\n", 1)[1]


BAD_DAY = {"bad day": [429, 500, "<hang>", "<broken>", "The scale is [[1]] to [[10]]; Rating: [[7]]"], "refusal": ["I can't rate this.", "Rating: [[4]]"],
           "bodies": [{"choices": []}, {"error": "x"}, {"choices": None}, "Rating: [[2]]"], "silent": [answer(None), answer("")], "good": ["Rating: [[9]]"]}


def test_an_endpoint_with_a_bad_day_gives_the_right_scores_in_the_end(serve, tmp_path, capfd):
    """429, 500, a hang and broken JSON, then a score: 7, after 5 requests; what is unreadable twice is None; started again, only that is asked."""
    server = serve(lambda question, n: BAD_DAY[response_of(question)][n])
    items = [(user("p"), text) for text in BAD_DAY]
    assert make_judge("api:m", tmp_path).score(items) == [7, 4, 2, None, 9]
    assert {response_of(question): n for question, n in server.times.items()} == {text: len(replies) for text, replies in BAD_DAY.items()}
    again, first = serve(lambda question, n: "Rating: [[5]]"), len(server.bodies)
    assert make_judge("api:m", tmp_path).score(items) == [7, 4, 2, 5, 9]
    assert [response_of(question) for question in again.times] == ["silent"] and len(server.bodies) == first
    assert make_judge("api:m", tmp_path).score(items) == [7, 4, 2, 5, 9] and len(again.bodies) == 1
    shown = "".join(capfd.readouterr()) + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert server.keys == {"Bearer sk-secret"} and "sk-secret" not in shown


def test_the_request_names_the_model_and_shows_the_question(serve):
    """model as it was given, one user message with prompt and answer, temperature 0; no limit that some models refuse."""
    server = serve(lambda question, n: "Verdict: [[A]]" if "Response A" in question else "Rating: [[6]]")
    judge = make_judge("api:org/model:v1", None)
    assert judge.score([(user("sort {b}"), "b")]) == [6] and judge.compare([(user("p"), "x", "y")]) == ["tie"]
    rating, *verdicts = server.bodies
    assert {k: v for k, v in rating.items() if k != "messages"} == {"model": "org/model:v1", "temperature": 0}
    assert [m["role"] for m in rating["messages"]] == ["user"] and rating["messages"][0]["content"].endswith("[Instruction]\nsort {b}\n\n[Response]\nb")
    assert {v["messages"][0]["content"].split("[Response A]\n")[1] for v in verdicts} == {"x\n\n[Response B]\ny", "y\n\n[Response B]\nx"}


def test_a_server_that_lists_no_models_and_wants_no_key_will_do(serve, monkeypatch):
    """404 for /models, and no OPENAI_API_KEY with a server of one's own: judged all the same."""
    serve(lambda question, n: "Rating: [[6]]", models=404)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make_judge("api:m", None).score([(user("p"), "y")]) == [6]


def test_a_refused_key_is_reported_before_the_work(serve, capsys):
    """401 ends with one line that names the variable and not the key, exit code 2."""
    server = serve(lambda question, n: "Rating: [[6]]", models=401)
    with pytest.raises(SystemExit) as end:
        make_judge("api:m", None)
    line = capsys.readouterr().err
    assert end.value.code == 2 and server.url in line and "OPENAI_API_KEY" in line and "sk-secret" not in line and line.count("\n") == 1


def test_no_more_requests_are_in_flight_than_allowed(serve, monkeypatch):
    """24 questions, 3 at a time: never more, but more than one; answers come back in order."""
    monkeypatch.setattr(common, "API_CONCURRENCY", 3)
    server = serve(lambda question, n: f"Rating: [[{len(response_of(question)) % 10 + 1}]]")
    assert make_judge("api:m", None).score([(user("p"), "x" * i) for i in range(24)]) == [i % 10 + 1 for i in range(24)]
    assert 1 < server.most <= 3 and len(server.bodies) == 24


@pytest.mark.parametrize("failure", [503, "<broken>", 401, 404])
def test_when_all_retries_fail_the_run_ends_in_one_line(failure, serve, monkeypatch, tmp_path):
    """First try and 2 retries (none where they can't help), then the end, with the server's name, no further questions; what was answered before is kept."""
    monkeypatch.setattr(common, "API_RETRIES", 2), monkeypatch.setattr(common, "API_CONCURRENCY", 1)
    server = serve(lambda question, n: failure if response_of(question) == "c" else "Rating: [[6]]")
    items = [(user("p"), text) for text in "abcdef"]
    with pytest.raises(SystemExit) as end:
        make_judge("api:m", tmp_path).score(items)
    message = str(end.value.code)
    assert message.startswith("error: ") and server.url in message and "\n" not in message and "sk-secret" not in message
    assert {response_of(question): n for question, n in server.times.items()} == {"a": 1, "b": 1, "c": 1 if failure in (401, 404) else 3}
    well = serve(lambda question, n: "Rating: [[6]]")
    assert make_judge("api:m", tmp_path).score(items) == [6] * 6
    assert sorted(response_of(question) for question in well.times) == ["c", "d", "e", "f"]  # a and b were answered, and perhaps paid for, before


def generated(monkeypatch, capsys, url, data, out, *flags):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", "m", "--data", str(data), "--out", str(out), "--endpoint", url, *flags])
    generate.main()
    return [json.loads(line) for line in out.read_text().split("\n")[:-1]], capsys.readouterr()


def prompts(folder, *texts):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"id-{text}", "prompt": [{"role": "system", "content": "be brief"}, *user(text)]}) + "\n" for text in texts))
    return path


def test_answers_are_sampled_from_an_endpoint_through_a_bad_day(serve, monkeypatch, capsys, tmp_path):
    """Two answers a prompt in the prompts' order, after 429, 500 and a hang; an answer cut by the server says so; the key is shown nowhere."""
    lock, counter = threading.Lock(), Counter()

    def reply(question, n):
        if n < 3 and question == "b":
            return [429, 500, "<hang>"][n]
        with lock:
            counter[question] += 1
            return answer(f"{question}{counter[question]}", "length" if question == "c" else "stop")
    server = serve(reply)
    rows, shown = generated(monkeypatch, capsys, server.url, prompts(tmp_path, "b", "a", "c"), tmp_path / "o.jsonl",
                            "--n", "2", "--max_new_tokens", "9", "--temperature", "0.5")
    assert [(r["id"], r["meta"]["sample"], r["meta"]["finish"]) for r in rows] == [
        ("id-b", 0, "stop"), ("id-b", 1, "stop"), ("id-a", 0, "stop"), ("id-a", 1, "stop"), ("id-c", 0, "length"), ("id-c", 1, "length")]
    assert sorted(r["response"] for r in rows) == ["a1", "a2", "b1", "b2", "c1", "c2"] and all(r["id"] == f"id-{r['response'][0]}" for r in rows)
    assert rows[0]["prompt"] == [{"role": "system", "content": "be brief"}, *user("b")] and rows[0]["prompt"] in [body["messages"] for body in server.bodies]
    assert server.times == {"a": 2, "b": 5, "c": 2}
    for body in server.bodies:
        assert {k: v for k, v in body.items() if k != "messages"} == {"model": "m", "temperature": 0.5, "top_p": 1.0, "max_tokens": 9}
    assert "sk-secret" not in shown.out + shown.err + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_broken_body_is_not_an_answer(serve, monkeypatch, capsys, tmp_path):
    """Broken JSON is asked again, and ends the run if it stays so; it is never stored as an empty answer that the model gave. A true empty answer is."""
    server = serve(lambda question, n: "<broken>" if question == "c" or question == "b" and n == 0 else answer("" if question == "b" else "yes"))
    rows, _ = generated(monkeypatch, capsys, server.url, prompts(tmp_path, "a", "b"), tmp_path / "o.jsonl")
    assert [row["response"] for row in rows] == ["yes", ""] and server.times == {"a": 1, "b": 2}
    with pytest.raises(SystemExit, match="error: "):
        generated(monkeypatch, capsys, server.url, prompts(tmp_path, "c"), tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_an_interrupted_sampling_goes_on_where_it_was(serve, monkeypatch, capsys, tmp_path):
    """Batches that were finished are not asked again; the file is there only when it is whole."""
    monkeypatch.setattr(generate, "API_CONCURRENCY", 2), monkeypatch.setattr(common, "API_CONCURRENCY", 2), monkeypatch.setattr(common, "API_RETRIES", 1)
    well = []
    server = serve(lambda question, n: answer(question * 2) if well or question not in "ef" else 500)
    data, out = prompts(tmp_path, *"abcdef"), tmp_path / "o.jsonl"
    with pytest.raises(SystemExit):
        generated(monkeypatch, capsys, server.url, data, out)
    assert not out.exists() and server.times["a"] == 1
    well.append(server.times.copy())
    rows, _ = generated(monkeypatch, capsys, server.url, data, out)
    assert [row["response"] for row in rows] == ["aa", "bb", "cc", "dd", "ee", "ff"]
    assert server.times - well[0] == {"e": 1, "f": 1} and [path.name for path in sorted(tmp_path.iterdir())] == ["o.jsonl", "prompts.jsonl"]


def test_any_character_of_an_answer_survives(serve, monkeypatch, capsys, tmp_path):
    """Line separators that are not \\n (U+2028, U+0085, form feed), as models write them, stay in one row; so do emoji and "<eos>"."""
    text = "a\u2028b\u0085c\x0cd\x1ee \U0001f600 <eos>\r\n"
    server = serve(lambda question, n: answer(text))
    rows, _ = generated(monkeypatch, capsys, server.url, prompts(tmp_path, "a\u2028?", "b"), tmp_path / "o.jsonl")
    assert [(row["prompt"][1]["content"], row["response"]) for row in rows] == [("a\u2028?", text), ("b", text)]


def test_without_the_openai_package_an_endpoint_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    """... that says what to install, exit code 2, for the judge and for generate.py."""
    monkeypatch.setitem(sys.modules, "openai", None)
    remote = lambda: generated(monkeypatch, capsys, "http://127.0.0.1:1/v1", prompts(tmp_path, "a"), tmp_path / "o")
    for start in (lambda: make_judge("api:m", None), remote):
        with pytest.raises(SystemExit) as end:
            start()
        line = capsys.readouterr().err
        assert end.value.code == 2 and "pip install openai" in line and line.count("\n") == 1
