"""A world of words: English instructions that a program can check, for a real language model.

    python toy.py --model DIR --out runs/words         # makes the world with this model

A prompt asks for a sentence, a question or a list, and sets one or two more constraints on it. The
judge is exact: 10 x the mean of the constraints' credits, each from 0 to 1. An answer with a fault
(no words, words that repeat, a piece of the prompt copied) gets at most 3 of 10.

The judge counts, it does not read: a meaningless text of the right form gets full marks. What keeps
a model away from such texts is that preference optimisation starts from a fluent one and is held
near it by beta.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

# ------------------------------------------------------------------------- words

TOPICS = (
    "rivers bread winter trains music gardens cats the_moon school rain coffee mountains books "
    "football bees paper bridges the_sea birds farms snow cities dreams horses kitchens clocks "
    "letters forests money sleep fire islands dogs chess wind doctors glass apples robots maps "
    "markets shoes stars honey windows lakes dancing teachers salt roads painting summer ships "
    "spiders storms tea trees villages wolves wool"
)
INCLUDED = (
    "old small water light house friend morning green story child never hand long people world "
    "heart road night quiet warm market village bright family simple strong winter silver"
)
ENDINGS = "again today home forever together now tomorrow here alone everywhere tonight outside"

KINDS = {
    "animals": (
        "ant bat bear bee bird bison buffalo butterfly camel cat cheetah chicken cow crab "
        "crocodile crow deer dog dolphin donkey duck eagle elephant fish fox frog giraffe goat "
        "goose gorilla hamster hawk hippo hippopotamus horse hyena jaguar kangaroo koala lamb "
        "leopard lion lizard llama monkey moose mouse octopus ostrich otter owl panda panther "
        "parrot penguin pig pigeon polar_bear puma rabbit raccoon rat raven rhino rhinoceros "
        "salmon seal shark sheep snail snake spider squirrel swan tiger turkey turtle whale wolf "
        "zebra"
    ),
    "fruits": (
        "apple apricot avocado banana blackberry blueberry cantaloupe cherry coconut cranberry "
        "date dragonfruit fig grape grapefruit guava kiwi lemon lime lychee mandarin mango melon "
        "nectarine olive orange papaya passionfruit peach pear persimmon pineapple plum "
        "pomegranate raspberry strawberry tangerine tomato watermelon"
    ),
    "vegetables": (
        "artichoke asparagus beet bean broccoli cabbage carrot cauliflower celery chard corn "
        "cucumber eggplant garlic green_bean kale leek lettuce mushroom okra onion parsnip pea "
        "pepper bell_pepper potato pumpkin radish rutabaga spinach squash sweet_potato tomato "
        "turnip yam zucchini"
    ),
    "colors": (
        "beige black blue brown crimson cyan gold gray green grey indigo ivory lavender magenta "
        "maroon navy olive orange pink purple red scarlet silver tan teal turquoise violet white "
        "yellow"
    ),
    "countries": (
        "argentina australia austria belgium brazil canada chile china colombia cuba denmark egypt "
        "england ethiopia finland france germany ghana greece hungary iceland india indonesia iran "
        "iraq ireland israel italy jamaica japan kenya malaysia mexico morocco nepal netherlands "
        "new_zealand nigeria norway pakistan peru philippines poland portugal russia saudi_arabia "
        "scotland singapore south_africa south_korea spain sweden switzerland thailand turkey "
        "ukraine united_kingdom united_states vietnam"
    ),
    "sports": (
        "archery badminton baseball basketball boxing climbing cricket cycling diving fencing "
        "fishing football golf gymnastics handball hockey judo karate rowing rugby running sailing "
        "skateboarding skating skiing snowboarding soccer softball squash surfing swimming "
        "table_tennis tennis volleyball wrestling"
    ),
}

FUNCTION_WORDS = (
    "a an the and or but of to in on at by for from with as is are was were be been it its that "
    "this these those they their them we our you your i my he she his her not no can will do does "
    "have has so if when while where there what which who how into over under between through"
)
ASKING = (
    "what which who whom whose when where why how is are was were do does did can could will would "
    "should have has had may might isn't aren't wasn't weren't don't doesn't didn't can't couldn't "
    "won't wouldn't shouldn't haven't hasn't hadn't"
)
QUOTES = "\"“”'"


def listed(text: str) -> list[str]:
    """The entries of a word list; "_" stands for a blank inside one."""
    return [entry.replace("_", " ") for entry in text.split()]


# ------------------------------------------------------------------------- an answer's parts


def words_of(text: str) -> list[str]:
    """The words of a text in lowercase; an apostrophe or a hyphen belongs to its word."""
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.lower())


def length_of(text: str) -> int:
    """How many words and numbers a text has, without the numbers of a list's lines."""
    text = re.sub(r"(?m)^\s*\d+[.)]", "", text)
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


def is_one_sentence(text: str) -> bool:
    """One line that ends with . ! or ?, has none of them before, and is not a bare list.

    A bare list is one with commas after half of its words or more, or without a function word.
    """
    text = text.strip().strip(QUOTES)
    words = words_of(text)
    ended = re.fullmatch(r"[^.!?\n]+[.!?]", text) is not None
    has_grammar = bool(set(listed(FUNCTION_WORDS)) & set(words))
    return ended and len(words) >= 4 and has_grammar and 2 * text.count(",") < len(words)


def mentions(text: str, topic: str) -> bool:
    """Whether a word begins with the topic, or, if it has five letters or more, with its stem.

    So dogs are named as dogs, butterflies as butterflies or a butterfly, and tea by a team, too.
    """
    stem = topic.removeprefix("the ")
    if len(stem) > 4:
        stem = re.sub("(ies|ves|es|s|ing)$", "", stem)
    return any(word.startswith(stem) for word in words_of(text))


def items_of(text: str) -> list[str]:
    """The items of a list, one a line or separated by commas, without numbers and bullets."""
    items = []
    for item in re.split(r"[,\n]", text.lower().strip().strip(".")):
        item = re.sub(r"^[\d.)*•\s-]*(and )?", "", item).strip()
        if item:
            items.append(item)
    return items


# ------------------------------------------------------------------------- the constraints


def sentence_about(answer: str, topic: str) -> float:
    """Half for one sentence, half for the topic."""
    return 0.5 * is_one_sentence(answer) + 0.5 * mentions(answer, topic)


def question_about(answer: str, topic: str) -> float:
    """Half for one sentence that asks, half for the topic.

    It asks if it ends with ? and its first word is one that asks. It may be a quotation as a whole.
    """
    text = answer.strip()
    if text[:1] in QUOTES and text[-1:] in QUOTES:
        text = text[1:-1]
    asks = False
    if is_one_sentence(text) and text.endswith("?"):
        first = words_of(text)[0].replace("’", "'")
        before_apostrophe = first.split("'")[0]  # what's: what
        asks = first in listed(ASKING) or before_apostrophe in listed(ASKING)
    return 0.5 * asks + 0.5 * mentions(answer, topic)


def list_of(answer: str, count: str, kind: str) -> float:
    """Half for the kind of the items, half for as many as asked for, separated by commas alone.

    The first half is the share of items that are of the kind, none counted twice, in no two forms
    either. Where that share is below a half, there is nothing else; the other half loses 1/count
    for every item missing or too many.
    """
    members = {}  # of each form, whose it is
    for member in listed(KINDS[kind]):
        plurals = f"{member}s", f"{member}es", re.sub("y$", "ies", member)
        for form in (member, *plurals, re.sub("fe?$", "ves", member)):
            members[form] = member
    count, items = int(count), items_of(answer)
    right = len({members[item] for item in items if item in members})
    of_kind = min(right, count) / max(len(items), count)
    if of_kind < 0.5:
        return 0.5 * of_kind

    separated = 0.0
    if re.fullmatch(r"[^\d\n*•:]+", answer.strip()):
        separated = max(0.0, 1 - abs(len(items) - count) / count)
    return 0.5 * of_kind + 0.5 * separated


def exactly_n_words(answer: str, n: str) -> float:
    """1, less 1/n for every word that is missing or too many."""
    return max(0.0, 1 - abs(length_of(answer) - int(n)) / int(n))


def at_most_n_words(answer: str, n: str) -> float:
    """1, less 1/n for every word that is too many."""
    return min(1.0, max(0.0, 2 - length_of(answer) / int(n)))


def uses_both(answer: str, first: str, second: str) -> float:
    """Half for each of the two words."""
    words = words_of(answer)
    return 0.5 * (first in words) + 0.5 * (second in words)


def only_lowercase(answer: str) -> float:
    return float(answer == answer.lower())


def ends_with(answer: str, word: str) -> float:
    """1 for the last word, half for the word elsewhere."""
    words = words_of(answer)
    return 1.0 if words[-1:] == [word] else 0.5 * (word in words)


def ends_with_stop(answer: str) -> float:
    return float(answer.strip().endswith("."))


class Constraint(NamedTuple):
    """What a prompt can ask for: its sentence, and the credit of an answer to it, from 0 to 1.

    The blanks of the sentence are the credit's arguments after the answer. `blanks` are patterns of
    what may stand in them.
    """

    sentence: str
    credit: Callable[..., float]
    blanks: tuple[str, ...] = ()


NUMBER = r"[1-9]\d*"
TEXT = ".+?"


TASKS = {
    "sentence": Constraint("Describe {} in one sentence.", sentence_about, (TEXT,)),
    "question": Constraint("Write a short question about {}.", question_about, (TEXT,)),
    "list": Constraint("List {} {}, separated by commas.", list_of, (NUMBER, "|".join(KINDS))),
}
MORE = {
    "exactly": Constraint("Use exactly {} words.", exactly_n_words, (NUMBER,)),
    "at most": Constraint("Use at most {} words.", at_most_n_words, (NUMBER,)),
    "both": Constraint('Use the words "{}" and "{}".', uses_both, (TEXT, TEXT)),
    "lowercase": Constraint("Use only lowercase letters.", only_lowercase),
    "stop": Constraint("Put a full stop at the end.", ends_with_stop),
    "ending": Constraint('End with the word "{}".', ends_with, (TEXT,)),
}


# ------------------------------------------------------------------------- the judge


def constraints_of(prompt: str) -> list[tuple[Constraint, tuple[str, ...]]]:
    """The constraints that a prompt states, each with what fills its blanks."""
    found = []
    for constraint in [*TASKS.values(), *MORE.values()]:
        pattern = re.escape(constraint.sentence)
        for blank in constraint.blanks:
            pattern = pattern.replace(r"\{\}", f"({blank})", 1)
        match = re.search(pattern, prompt)
        if match:
            found.append((constraint, match.groups()))
    return found


def has_fault(prompt: str, answer: str) -> bool:
    """Whether an answer repeats itself or copies four words in a row from its prompt.

    It repeats itself if a word follows itself, or if more than a fifth of the words that are not
    function words were there before. In a list the items count in the place of words: a sweet
    potato and a potato are two vegetables.
    """
    words = words_of(answer)
    asked_for = [constraint for constraint, _ in constraints_of(prompt)]
    is_list = TASKS["list"] in asked_for
    parts = items_of(answer) if is_list else words
    doubled = any(part == after for part, after in zip(parts, parts[1:]))
    function_words = set(listed(FUNCTION_WORDS))
    content = [part for part in parts if part not in function_words]
    repeated = 5 * len(set(content)) < 4 * len(content)

    asked = f" {' '.join(words_of(prompt))} "
    copied = False
    for place in range(len(words) - 3):
        run = " ".join(words[place : place + 4])
        copied = copied or f" {run} " in asked
    return doubled or repeated or copied


def score(prompt: str, answer: str) -> float:
    """The judge: 10 x the mean credit of the constraints; at most 3 with a fault. 0..10."""
    if not words_of(answer):
        return 0.0
    constraints = constraints_of(prompt)
    earned = [constraint.credit(answer, *blanks) for constraint, blanks in constraints]
    marks = 10 * sum(earned) / len(earned)
    return min(marks, 3.0) if has_fault(prompt, answer) else marks


# ------------------------------------------------------------------------- the prompts


def draw(rng: random.Random) -> str:
    """A prompt: a task and one or two more constraints."""
    task = rng.choices(list(TASKS), weights=[5, 3, 2])[0]
    topic = rng.choice(listed(TOPICS))
    both = rng.sample(listed(INCLUDED), 2)
    blanks = {
        "sentence": [topic],
        "question": [topic],
        "list": [rng.randint(3, 7), rng.choice(list(KINDS))],
        "exactly": [rng.randint(8, 16)],
        "at most": [rng.randint(8, 14)],
        "both": both,
        "lowercase": [],
        "stop": [],
        "ending": [rng.choice(listed(ENDINGS))],
    }
    fitting = {
        "sentence": ["exactly", "at most", "both", "lowercase", "ending"],
        "question": ["at most", "both", "lowercase", "ending"],
        "list": ["lowercase", "stop"],
    }
    more = rng.sample(fitting[task], 1 if task == "list" else rng.randint(1, 2))
    if set(more) == {"exactly", "at most"}:
        more = ["exactly"]

    sentences = [TASKS[task].sentence.format(*blanks[task])]
    for name in more:
        sentences.append(MORE[name].sentence.format(*blanks[name]))
    return " ".join(sentences)
