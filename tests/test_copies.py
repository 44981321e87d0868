"""The scaffold that dnpo.py, tso.py and sams.py repeat on purpose is one text.

So `diff dnpo.py sams.py` shows the method and nothing else. What the scripts share otherwise is in
modules, which know no script and don't import each other in circles.
"""

import ast
import difflib
import re

import pytest
from conftest import ROOT

METHODS = ("dnpo.py", "tso.py", "sams.py")
MODULES = ("job.py", "datafiles.py", "common.py", "words.py", "toy.py")
# every script has its own; all else of one name is one text
OWN = {"main", "Config", "descend", "train", "training_summary", "prepare", "measure"}
OWN |= {"show_plan", "report"}
BEGIN = "# --- same in dnpo.py, tso.py, sams.py: {} ---"
END = "# --- end: {} ---"
LONGEST = 40  # lines of a region
ALL = 150  # lines of all regions of a script; what grows beyond belongs in a module

BEGIN_LINE = re.compile(re.escape(BEGIN).replace(r"\{\}", r"(\w+)"))
END_LINE = re.compile(re.escape(END).replace(r"\{\}", r"(\w+)"))
MARKER_LIKE = re.compile(r"\s*#\s*-+\s*(same|end)\b")


# ---------------------------------------------------------------- the checker


def regions(source: str) -> dict[str, range]:
    """The line numbers of each marked region by name, from 1 and without the markers.

    ValueError where the markers are no pairs.
    """
    found = {}
    name = start = None
    for number, line in enumerate(source.splitlines(), 1):
        if not MARKER_LIKE.match(line):
            continue
        begin, end = BEGIN_LINE.fullmatch(line), END_LINE.fullmatch(line)
        if begin and name is None and begin[1] not in found:
            name, start = begin[1], number + 1
        elif end and end[1] == name:
            found[name] = range(start, number)
            name = None
        else:
            raise ValueError(f"line {number}: {line!r} is out of place")
    if name:
        raise ValueError(f"region {name!r} has no end")
    return found


def region_texts(source: str) -> dict[str, list[str]]:
    """The lines of each marked region by name, with their ends."""
    lines = source.splitlines(keepends=True)
    texts = {}
    for name, span in regions(source).items():
        texts[name] = lines[span.start - 1 : span.stop - 1]
    return texts


def definitions(source: str) -> dict[str, int]:
    """The functions and classes of a source's top level, and the lines in which they begin."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(source).body
    return {node.name: node.lineno for node in body if isinstance(node, kinds)}


def loose_definitions(source: str) -> set[str]:
    """The functions and classes of a source's top level that are in no region."""
    inside = set()
    for span in regions(source).values():
        inside.update(span)
    return {name for name, line in definitions(source).items() if line not in inside}


def faults(sources: dict[str, str]) -> list[str]:
    """What is wrong with the copies in {script: source}."""
    for script, source in sources.items():
        try:
            regions(source)
        except ValueError as fault:
            return [f"{script}: {fault}"]

    found = []
    for script, source in sources.items():
        found += too_long(script, source)
    first, *others = sources
    for other in others:
        found += differences(first, sources[first], other, sources[other])
    scripts = list(sources)
    for i, a in enumerate(scripts):
        for b in scripts[i + 1 :]:
            found += outside(a, sources[a], b, sources[b])
    return found


def too_long(script: str, source: str) -> list[str]:
    """The regions of a script that are too long, one by one and together."""
    found = []
    total = 0
    for name, span in regions(source).items():
        total += len(span)
        if len(span) > LONGEST:
            found.append(f"{script}: region {name} has {len(span)} lines, more than {LONGEST}")
    if total > ALL:
        found.append(f"{script}: its regions have {total} lines, more than {ALL}")
    return found


def differences(a: str, source_a: str, b: str, source_b: str) -> list[str]:
    """Regions that two scripts don't share, and diffs of those that are not the same bytes."""
    texts_a, texts_b = region_texts(source_a), region_texts(source_b)
    found = []
    if texts_a.keys() != texts_b.keys():
        found.append(f"regions of {a}: {sorted(texts_a)}, of {b}: {sorted(texts_b)}")
    for name in sorted(texts_a.keys() & texts_b.keys()):
        if texts_a[name] != texts_b[name]:
            diff = difflib.unified_diff(
                texts_a[name], texts_b[name], f"{a}: {name}", f"{b}: {name}"
            )
            found.append("".join(diff))
    return found


def outside(a: str, source_a: str, b: str, source_b: str) -> list[str]:
    """Names that two scripts define, not both of them in a region, though they are not OWN."""
    shared = definitions(source_a).keys() & definitions(source_b).keys()
    loose = loose_definitions(source_a) | loose_definitions(source_b)
    names = (shared & loose) - OWN
    return [f"{name} is defined in {a} and {b}, but outside a region" for name in sorted(names)]


def imports(source: str) -> set[str]:
    """Top-level names of the modules that are imported anywhere in a source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def circle(sources: dict[str, str]) -> list[str] | None:
    """Modules of {module: source} each of which imports the next, from one back to it, if any."""
    graph = {name: imports(source) & sources.keys() for name, source in sources.items()}

    def walk(path: list[str]) -> list[str] | None:
        """Follows every import of the path's last module, to the first circle."""
        for name in sorted(graph[path[-1]]):
            if name in path:
                return [*path[path.index(name) :], name]
            found = walk([*path, name])
            if found:
                return found
        return None

    for name in sources:
        found = walk([name])
        if found:
            return found
    return None


# ---------------------------------------------------------------- the project

SOURCES = {name: (ROOT / name).read_bytes().decode() for name in METHODS if (ROOT / name).exists()}


def test_the_repeated_scaffold_is_one_text():
    """Marked regions are byte for byte the same in every method script that exists, and short.

    No other def or class is in two of them.
    """
    assert SOURCES
    assert all(regions(source) for source in SOURCES.values())
    found = faults(SOURCES)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [*MODULES, "generate.py", *SOURCES])
def test_no_method_is_imported(name):
    """What methods share knows none of them, and a method script reads without the others."""
    methods = {method.removesuffix(".py") for method in METHODS}
    assert not imports((ROOT / name).read_text()) & methods


def own_sources() -> dict[str, str]:
    """The source of every module and script of the project, by module name."""
    return {path.stem: path.read_text() for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_no_script(name):
    """Modules stand under the scripts: of the project's files they import modules alone."""
    modules = {module.removesuffix(".py") for module in MODULES}
    assert imports((ROOT / name).read_text()) & own_sources().keys() <= modules


def test_modules_do_not_import_each_other_in_circles():
    """The graph of imports, those inside functions included, has no circle."""
    assert {"job", "datafiles", "common", "toy", "generate"} <= own_sources().keys()
    assert circle(own_sources()) is None


# ---------------------------------------------------------------- the checker itself

REGION = "\n".join([BEGIN.format("{0}"), "def {0}(x):", "    return x + 1", END.format("{0}"), ""])
A, B, C = REGION.format("a"), REGION.format("b"), REGION.format("c")
GOOD = A + "\n\ndef main():\n    pass\n\n\n" + B
LINE = "    return x + 1\n"
LONG_LINES = "    x += 1\n" * 39 + "    return x\n"
LONG_REGIONS = "".join(REGION.format(name).replace(LINE, "    x += 1\n" * 39) for name in "cdef")


@pytest.mark.parametrize(
    "source, complaint",
    [
        pytest.param(GOOD, None, id="nothing changed"),
        pytest.param(
            GOOD.replace("main():\n    pass", "main():\n    print('another method')"),
            None,
            id="another main",
        ),
        pytest.param(
            "import os\n\n\n" + GOOD + "\n\ndef loss():\n    pass\n",
            None,
            id="an import and a function of its own",
        ),
        pytest.param(
            GOOD.replace("x + 1", "x + 2", 1),
            "-    return x + 1\n+    return x + 2\n",
            id="another number",
        ),
        pytest.param(
            GOOD.replace("x + 1\n", "x + 1 \n", 1),
            "+    return x + 1 \n",
            id="a space at the end of a line",
        ),
        pytest.param(
            GOOD.replace("x + 1\n", "x + 1\r\n", 1),
            "+    return x + 1\r\n",
            id="another end of line",
        ),
        pytest.param(
            GOOD.replace(B, ""),
            "regions of dnpo.py: ['a', 'b'], of sams.py: ['a']",
            id="a region missing",
        ),
        pytest.param(GOOD + C, "of sams.py: ['a', 'b', 'c']", id="a region more"),
        pytest.param(
            GOOD.replace(B, "def b(x):\n    return x + 1\n"),
            "b is defined in dnpo.py and sams.py, but outside a region",
            id="a region without its markers",
        ),
        pytest.param(
            GOOD + "\n\ndef helper():\n    pass\n",
            "helper is defined in dnpo.py and sams.py, but outside a region",
            id="a function in both",
        ),
        pytest.param(
            GOOD + "\n\nclass Helper:\n    pass\n",
            "Helper is defined in dnpo.py and sams.py, but outside a region",
            id="a class in both",
        ),
        pytest.param(
            GOOD.replace(END.format("a") + "\n", ""), "is out of place", id="a region in another"
        ),
        pytest.param(
            GOOD.replace(END.format("b"), ""), "region 'b' has no end", id="the last end missing"
        ),
        pytest.param(
            GOOD.replace(END.format("a"), END.format("b"), 1),
            "is out of place",
            id="an end of another name",
        ),
        pytest.param(
            GOOD.replace(BEGIN.format("b"), "# --- same in dnpo.py, sams.py: b ---"),
            "is out of place",
            id="a marker with other scripts",
        ),
        pytest.param(GOOD + A, "is out of place", id="a region twice"),
        pytest.param(
            GOOD.replace(LINE, LONG_LINES, 1),
            "region a has 41 lines, more than 40",
            id="a region too long",
        ),
        pytest.param(
            GOOD + LONG_REGIONS,
            "regions have 164 lines, more than 150",
            id="too many regions",
        ),
    ],
)
def test_the_checker_reports_every_way_to_drift(source, complaint):
    """A copy with one change is reported, with the change; a script's own parts may differ."""
    first = GOOD + "\n\ndef helper():\n    pass\n\n\nclass Helper:\n    pass\n"
    found = faults({"dnpo.py": first, "sams.py": source})
    if complaint is None:
        assert found == []
    else:
        assert any(complaint in fault for fault in found)


def test_the_checker_compares_the_third_script_too_and_is_content_with_one():
    """Any number of scripts; a fault in any one is found."""
    assert faults({"dnpo.py": GOOD}) == []
    assert faults({"dnpo.py": GOOD, "tso.py": GOOD, "sams.py": GOOD}) == []

    bad = GOOD.replace("x + 1", "x - 1", 1)
    for odd in METHODS:
        sources = dict.fromkeys(METHODS, GOOD)
        sources[odd] = bad
        assert any("x - 1" in fault for fault in faults(sources))

    more = GOOD + "\n\ndef same():\n    pass\n"
    own = {"dnpo.py": GOOD, "tso.py": more, "sams.py": more}
    assert faults(own) == ["same is defined in tso.py and sams.py, but outside a region"]


@pytest.mark.parametrize(
    "source",
    [
        "import dnpo",
        "def f():\n    from sams import Config",
        "import json, tso as t",
        "from dnpo.parts import x",
    ],
)
def test_the_checker_sees_imports_wherever_they_are(source):
    """Inside functions, renamed or from a submodule."""
    assert imports(source) & {"dnpo", "tso", "sams"}
    harmless = "import numpy\nfrom common import seed_of\nfrom . import x\n'import dnpo'"
    assert not imports(harmless) & {"dnpo"}


CHAIN = {
    "job": "import os",
    "common": "import job",
    "toy": "import job\nfrom common import Scorer",
    "dnpo": "import toy, common",
}


@pytest.mark.parametrize(
    "module, line, wanted",
    [
        ("job", "import job", ["job", "job"]),
        ("job", "import common", ["job", "common", "job"]),
        ("job", "from toy import make as m", ["job", "toy", "common", "job"]),
        ("common", "def f():\n    import toy", ["common", "toy", "common"]),
        ("common", "from dnpo import Config", ["common", "dnpo", "common"]),
    ],
)
def test_the_checker_sees_every_circle(module, line, wanted):
    """One import added to modules that stand in an order makes a circle, which is named."""
    assert circle(CHAIN) is None
    changed = {**CHAIN, module: f"{CHAIN[module]}\n{line}"}
    assert circle(changed) == wanted
