"""The scaffold that dnpo.py, tso.py and sams.py repeat on purpose is one text: `diff dnpo.py sams.py` shows the method and nothing else."""
import ast
import difflib
import re

import pytest
from conftest import ROOT

METHODS = ("dnpo.py", "tso.py", "sams.py")
OWN = {"main", "Config", "descend", "train", "show_plan", "report"}  # every script has its own; all else of one name is one text
BEGIN = "# --- same in dnpo.py, tso.py, sams.py: {} ---"
END = "# --- end: {} ---"
LONGEST, ALL = 40, 120  # lines of a region, of all regions of a script; what grows beyond belongs in common.py


def regions(source: str) -> dict[str, range]:
    """name -> the line numbers (from 1, markers not counted) of each marked region; ValueError where the markers are no pairs."""
    found, name, start = {}, None, 0
    for number, line in enumerate(source.splitlines(), 1):
        if not re.match(r"\s*#\s*-+\s*(same|end)\b", line):
            continue
        begin, end = (re.fullmatch(re.escape(form).replace(r"\{\}", r"(\w+)"), line) for form in (BEGIN, END))
        if begin and name is None and begin[1] not in found:
            name, start = begin[1], number + 1
        elif end and end[1] == name:
            found[name], name = range(start, number), None
        else:
            raise ValueError(f"line {number}: {line!r} is out of place")
    if name:
        raise ValueError(f"region {name!r} has no end")
    return found


def imports(source: str) -> set[str]:
    """Top-level names of the modules that are imported anywhere in a source."""
    nodes = list(ast.walk(ast.parse(source)))
    return {name.split(".")[0] for node in nodes for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                                                              [node.module or ""] if isinstance(node, ast.ImportFrom) else [])}


def faults(sources: dict[str, str]) -> list[str]:
    """What is wrong with the copies in {script: source}."""
    found, marked, text, inside, defined = [], {}, {}, {}, {}
    for script, source in sources.items():
        try:
            marked[script] = regions(source)
        except ValueError as fault:
            return [f"{script}: {fault}"]
        lines = source.splitlines(keepends=True)
        text[script] = {name: lines[span.start - 1:span.stop - 1] for name, span in marked[script].items()}
        defined[script] = {node.name: node.lineno for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
        inside[script] = {name for name, line in defined[script].items() if any(line in span for span in marked[script].values())}
        found += [f"{script}: region {name} has {len(span)} lines, more than {LONGEST}" for name, span in marked[script].items() if len(span) > LONGEST]
        if (total := sum(map(len, marked[script].values()))) > ALL:
            found.append(f"{script}: its regions have {total} lines, more than {ALL}")
    first, *others = sources
    for other in others:
        if marked[first].keys() != marked[other].keys():
            found.append(f"regions of {first}: {sorted(marked[first])}, of {other}: {sorted(marked[other])}")
        for name in marked[first].keys() & marked[other].keys():
            if text[first][name] != text[other][name]:
                found.append("".join(difflib.unified_diff(text[first][name], text[other][name], f"{first}: {name}", f"{other}: {name}")))
    for a in sources:
        for b in list(sources)[list(sources).index(a) + 1:]:
            found += [f"{name} is defined in {a} and {b}, but outside a region" for name in defined[a]
                      if name in defined[b] and name not in OWN and not (name in inside[a] and name in inside[b])]
    return found


SOURCES = {name: (ROOT / name).read_bytes().decode() for name in METHODS if (ROOT / name).exists()}


def test_the_repeated_scaffold_is_one_text():
    """Marked regions are byte for byte the same in every method script that exists, and short; no other def or class is in two of them."""
    assert SOURCES and all(regions(source) for source in SOURCES.values())
    assert not (found := faults(SOURCES)), "\n".join(found)


@pytest.mark.parametrize("name", ["common.py", "generate.py", "toy.py", *SOURCES])
def test_no_method_is_imported(name):
    """What methods share knows none of them, and a method script reads without the others."""
    assert not imports((ROOT / name).read_text()) & {method.removesuffix(".py") for method in METHODS}


# ---------------------------------------------------------------- the checker itself

REGION = "\n".join([BEGIN.format("{0}"), "def {0}(x):", "    return x + 1", END.format("{0}"), ""])
GOOD = REGION.format("a") + "\n\ndef main():\n    pass\n\n\n" + REGION.format("b")


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s, None),
    (lambda s: s.replace("main():\n    pass", "main():\n    print('another method')"), None),
    (lambda s: "import os\n\n\n" + s + "\n\ndef loss():\n    pass\n", None),
    (lambda s: s.replace("x + 1", "x + 2", 1), "-    return x + 1\n+    return x + 2\n"),
    (lambda s: s.replace("x + 1\n", "x + 1 \n", 1), "+    return x + 1 \n"),
    (lambda s: s.replace("x + 1\n", "x + 1\r\n", 1), "+    return x + 1\r\n"),
    (lambda s: s.replace(REGION.format("b"), ""), "regions of dnpo.py: ['a', 'b'], of sams.py: ['a']"),
    (lambda s: s + REGION.format("c"), "of sams.py: ['a', 'b', 'c']"),
    (lambda s: s.replace(REGION.format("b"), "def b(x):\n    return x + 1\n"), "b is defined in dnpo.py and sams.py, but outside a region"),
    (lambda s: s + "\n\ndef helper():\n    pass\n", "helper is defined in dnpo.py and sams.py, but outside a region"),
    (lambda s: s + "\n\nclass Helper:\n    pass\n", "Helper is defined in dnpo.py and sams.py, but outside a region"),
    (lambda s: s.replace(END.format("a") + "\n", ""), "is out of place"),
    (lambda s: s.replace(END.format("b"), ""), "region 'b' has no end"),
    (lambda s: s.replace(END.format("a"), END.format("b"), 1), "is out of place"),
    (lambda s: s.replace("# --- same in dnpo.py, tso.py, sams.py: b", "# --- same in dnpo.py, sams.py: b"), "is out of place"),
    (lambda s: s + REGION.format("a"), "is out of place"),
    (lambda s: s.replace("    return x + 1\n", "    x += 1\n" * 39 + "    return x\n", 1), "region a has 41 lines, more than 40"),
    (lambda s: s + "".join(REGION.format(name).replace("    return x + 1\n", "    x += 1\n" * 39) for name in "cde"), "regions have 124 lines, more than 120"),
])
def test_the_checker_reports_every_way_to_drift(change, complaint):
    """A copy with one change is reported, with the change; a script's own parts may differ."""
    first = GOOD + "\n\ndef helper():\n    pass\n\n\nclass Helper:\n    pass\n"
    found = faults({"dnpo.py": first, "sams.py": change(GOOD)})
    assert found == [] if complaint is None else any(complaint in fault for fault in found)


def test_the_checker_compares_the_third_script_too_and_is_content_with_one():
    """Any number of scripts; a fault in any one is found."""
    bad = GOOD.replace("x + 1", "x - 1", 1)
    assert faults({"dnpo.py": GOOD}) == [] and faults({"dnpo.py": GOOD, "tso.py": GOOD, "sams.py": GOOD}) == []
    for odd in METHODS:
        assert any("x - 1" in fault for fault in faults({name: bad if name == odd else GOOD for name in METHODS}))
    own = {name: GOOD + ("\n\ndef same():\n    pass\n" if name != "dnpo.py" else "") for name in METHODS}
    assert faults(own) == ["same is defined in tso.py and sams.py, but outside a region"]


@pytest.mark.parametrize("source", ["import dnpo", "def f():\n    from sams import Config", "import json, tso as t", "from dnpo.parts import x"])
def test_the_checker_sees_imports_wherever_they_are(source):
    """Inside functions, renamed or from a submodule."""
    assert imports(source) & {"dnpo", "tso", "sams"} and not imports("import numpy\nfrom common import seed_of\nfrom . import x\n'import dnpo'") & {"dnpo"}
