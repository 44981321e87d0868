"""What nothing may break, tried out: kills, full disks, damaged files, double starts, bad flags.

    python tests/campaign.py FOLDER [--tree DIR] [--only kills disks damage doubles flags]

Runs the scripts of a source tree (by default this one) in a small toy world, and disturbs them. A
case ends "identical" to a run that was left alone, or with "one line" that says why not; anything
else is a fault: "wrong", "traceback", "many lines", "hang", or "accepted" for bad flags. Every case
is a line of FOLDER/table.jsonl and is not tried again. At the end the cases are counted. It takes
about ten minutes, so that no test calls it.

A full disk is a small file system in memory, which needs root and mount; elsewhere it is skipped.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from conftest import dnpo_flags, sams_flags, without_clocks

PATIENCE = 120  # seconds, after which a program hangs


# ---------------------------------------------------------------- programs


def programs(world: Path) -> dict[str, list]:
    """The flags of a short run of each program, without --out."""
    data, test, sft = world / "train.jsonl", world / "test.jsonl", world / "sft"
    tso = ["--model", sft, "--older", world / "sft-early", "--smaller", world / "sft-small"]
    tso += ["--data", data, "--test", test, "--judge", "toy", "--limit", 40, "--test_prompts", 12]
    tso += ["--slices", 2, "--batch", 8, "--micro_batch", 4, "--sample_batch", 8, "--n_scores", 0]
    tso += ["--max_response", 16, "--max_prompt", 32, "--save_every", 2, "--preset", "toy"]
    generate = ["--model", sft, "--data", data, "--batch", 4, "--max_new_tokens", 16]
    evaluate = [sft, "--against", "annotations", "--data", test, "--judge", "toy", "--score"]
    return {
        "dnpo": dnpo_flags(world, limit=40, sample_batch=8, save_every=2),
        "tso": tso,
        "sams": sams_flags(world, epochs=3, save_every=3, reference="reference"),
        "generate": generate,
        "evaluate": [*evaluate, "--batch", 4, "--max_response", 16],
    }


class Started:
    """A script's main() in a forked process, which needs no time to import anything."""

    def __init__(self, name: str, flags: list, cwd: Path):
        self.log = cwd.with_name(f"log-{time.monotonic_ns()}")
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.live(name, [str(flag) for flag in flags], cwd)
            finally:
                os._exit(1)

    def live(self, name: str, flags: list[str], cwd: Path):
        """The life of the child, as an interpreter would lead it."""
        code = 1
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(cwd)
        try:
            sys.argv = [f"{name}.py", *flags]
            importlib.import_module(name).main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code, None if it is still running after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def outcome(self) -> tuple[str, str]:
        """How it ended, "code 0", "one line" or a fault, and the last line that it said."""
        code = self.wait()
        if code is None:
            self.kill()
            return "hang", ""
        text = self.log.read_text(errors="replace")
        self.log.unlink()
        said = text.strip().splitlines() or [""]
        errors = [line for line in said if line.startswith("error: ")]
        if code == 0:
            return "code 0", said[-1]
        if "Traceback" in text:
            return "traceback", said[-1]
        if errors == said[-1:]:
            return "one line", said[-1]
        return "many lines", said[-1]


def fingerprint(out: Path) -> dict[str, str]:
    """A digest of each file that a run leaves, without what a clock or the machine decides."""
    found = {}
    for file in sorted([out] if out.is_file() else out.rglob("*")):
        if file.is_dir() or file.name in ("config.json", "run.json", "lock"):
            continue
        content = file.read_bytes()
        if file.name == "results.json":
            content = json.dumps(without_clocks(json.loads(content))).encode()
        elif file.name == "metrics.jsonl":
            rows = [without_clocks(json.loads(line)) for line in content.splitlines()]
            rows.sort(key=lambda row: (row.get("iteration", 0), row["step"]))
            for row in rows:
                del row["pairs_per_second"], row["memory_gib"]
            content = json.dumps(rows).encode()
        found[str(file.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


# ---------------------------------------------------------------- the campaign


class Campaign:
    """A world, runs that were left alone, and the table of what was tried."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.table = folder / "table.jsonl"
        self.world = folder / "world"
        self.alone = {}  # program: (folder, seconds)

    def prepare(self):
        """Makes the world, and every program's run that nothing disturbs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.world.exists():
            (making,) = make_worlds(self.world, 1)
            assert making == (0, ""), making
        self.programs = programs(self.world)
        for name in self.programs:
            cwd = self.fresh(f"alone-{name}")
            started = time.monotonic()
            ended, said = self.start(name, cwd).outcome()
            assert ended == "code 0", said
            self.alone[name] = cwd, time.monotonic() - started
        self.killed = self.folder / "killed"
        if not self.killed.exists():
            self.cut_short()

    def cut_short(self):
        """Makes a run of DNPO that was killed when it had a state in its second iteration."""
        cwd = self.fresh("cut")
        child = self.start("dnpo", cwd)
        while not (cwd / "out/iter2/state.pt").exists():
            assert child.wait(0.002) is None
        child.kill()
        (cwd / "out").rename(self.killed)

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        cwd = self.folder / name
        shutil.rmtree(cwd, ignore_errors=True)
        cwd.mkdir()
        return cwd

    def out(self, name: str) -> str:
        return "out.jsonl" if name == "generate" else "out"

    def start(self, name: str, cwd: Path, *more) -> Started:
        return Started(name, [*self.programs[name], "--out", self.out(name), *more], cwd)

    def go_on(self, name: str, cwd: Path) -> Started:
        """Starts a program again; a run with --resume."""
        return self.start(name, cwd, *(["--resume"] if name in ("dnpo", "tso", "sams") else []))

    def judge(self, name: str, cwd: Path, ended: str, but: str = "") -> str:
        """The outcome, in which code 0 is "identical" or "wrong". but: a file not to look at."""
        if ended != "code 0":
            return ended
        mine, theirs = fingerprint(cwd / self.out(name)), fingerprint(self.alone_out(name))
        mine.pop(but, None)
        theirs.pop(but, None)
        return "identical" if mine == theirs else "wrong"

    def alone_out(self, name: str) -> Path:
        cwd, _ = self.alone[name]
        return cwd / self.out(name)

    def run(self, kind: str, cases: Iterator):
        """Tries the cases of a kind that are not in the table: (name, function) each."""
        rows = [json.loads(line) for line in self.table.open()] if self.table.exists() else []
        tried = {(row["kind"], row["case"]) for row in rows}
        for case, attempt in cases:
            if (kind, case) in tried:
                continue
            outcome, said = attempt()
            row = {"kind": kind, "case": case, "outcome": outcome, "said": said[:300]}
            with self.table.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{kind} · {case}: {outcome} {said[:150] if outcome != 'identical' else ''}")

    def count(self):
        """Prints how often each kind has ended how."""
        rows = [json.loads(line) for line in self.table.open()]
        for kind in dict.fromkeys(row["kind"] for row in rows):
            outcomes = Counter(row["outcome"] for row in rows if row["kind"] == kind)
            counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
            print(f"{kind}: {sum(outcomes.values())} = {counts}")


def kills(campaign: Campaign):
    """40 kills: two chains of four at any moment for each program, then it may end."""
    for name in campaign.programs:
        _, seconds = campaign.alone[name]
        for chain in (1, 2):

            def attempt(name=name, chain=chain, seconds=seconds):
                rng = random.Random(f"{name} {chain}")
                cwd = campaign.fresh("kills")
                for _ in range(4):
                    child = campaign.go_on(name, cwd)
                    if child.wait(rng.uniform(0, 0.7 * seconds)) is None:
                        child.kill()
                    elif name == "generate":
                        break  # it is there: another start is refused
                out = cwd / campaign.out(name)
                if name == "generate" and out.exists():
                    return campaign.judge(name, cwd, "code 0"), ""
                ended, said = campaign.go_on(name, cwd).outcome()
                return campaign.judge(name, cwd, ended), said

            yield f"{name}, chain {chain} of 4 kills", attempt


def disks(campaign: Campaign):
    """12 full disks: a program fills a file system, says so in one line, and goes on with room."""
    shares = {"dnpo": (0.02, 0.2, 0.5, 0.8, 0.95), "sams": (0.1, 0.3, 0.6, 0.9)}
    shares.update(tso=(0.4,), generate=(0.3,), evaluate=(0.2,))
    for name, some in shares.items():
        for share in some:
            yield f"{name}, {share:.0%} of the room", lambda n=name, s=share: disk(campaign, n, s)


def disk(campaign: Campaign, name: str, share: float) -> tuple[str, str]:
    alone = campaign.alone_out(name)
    files = [alone] if alone.is_file() else [file for file in alone.rglob("*") if file.is_file()]
    # besides what is left, a training state is three times the weights, and so is its new one
    peak = sum(file.stat().st_size for file in files)
    peak += 7_500_000 if name in ("dnpo", "tso", "sams") else 30_000
    cwd = campaign.fresh("disk")
    size = max(16384, int(share * peak))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", cwd]
    if subprocess.run(mount, capture_output=True).returncode:
        return "skipped", "no mount"
    try:
        child = Started(name, [*campaign.programs[name], "--out", campaign.out(name)], cwd)
        ended, said = child.outcome()
        halves = [str(file) for file in cwd.rglob("*.tmp")]
        if ended == "code 0" or halves or (ended == "one line" and "full" not in said):
            return "wrong", f"{ended}, {halves}, {said}"
        if ended != "one line":
            return ended, said
        subprocess.run(["mount", "-o", "remount,size=1g", cwd], check=True)
        ended, then = campaign.go_on(name, cwd).outcome()
        judged = campaign.judge(name, cwd, ended)
        return ("one line" if judged == "identical" else judged), f"{said} | {then}"
    finally:
        subprocess.run(["umount", "-l", cwd], check=True)


def damage(campaign: Campaign):
    """30 damaged files of a run that was killed in its second iteration, or had ended."""
    killed, ended = campaign.killed, campaign.alone_out("dnpo")
    ways = {
        "truncated": lambda content: content[: len(content) // 2],
        "empty": lambda content: b"",
        "garbage": lambda content: random.Random(0).randbytes(len(content)),
        "NUL": lambda content: content[:20] + b"\0" * 40 + content[60:],
        "invalid UTF-8": lambda content: content.replace(b"e", b"\xff", 3),
        "a number": lambda content: b"7\n",
        "a torn end": lambda content: content[:-9],
        "a row less": lambda content: content[: content[:-1].rfind(b"\n") + 1],
        "reordered": lambda content: b"".join(reversed(content.splitlines(keepends=True))),
    }
    broken = ("truncated", "empty", "garbage")
    text = (*broken, "invalid UTF-8", "a row less", "reordered")
    plan = {
        (killed, "iter2/state.pt"): broken,
        (killed, "iter1/checkpoint/model.safetensors"): (*broken, "NUL"),
        (killed, "iter1/checkpoint/config.json"): ("garbage",),
        (killed, "config.json"): ("truncated", "a number"),
        (killed, "run.json"): ("empty",),
        (killed, "metrics.jsonl"): ("a torn end", "invalid UTF-8"),
        (killed, "iter2/responses.jsonl"): text,
        (killed, "iter2/pairs.jsonl"): ("truncated", "a row less", "a number"),
        (killed, "iter1/logps.jsonl"): ("NUL",),
        (ended, "iter2/test.jsonl"): (*text, "NUL"),
    }
    for (folder, name), some in plan.items():
        for way in some:

            def attempt(folder=folder, name=name, way=ways[way]):
                cwd = campaign.fresh("damage")
                shutil.copytree(folder, cwd / "out", copy_function=shutil.copy2)
                file = cwd / "out" / name
                file.write_bytes(way(file.read_bytes()))
                ended, said = campaign.go_on("dnpo", cwd).outcome()
                return campaign.judge("dnpo", cwd, ended), said

            yield f"{name}, {way}", attempt


def doubles(campaign: Campaign):
    """6 double starts: both may end as one alone, or one of them is refused."""
    for name in ("dnpo", "sams", "generate", "evaluate"):
        yield f"{name} twice", lambda name=name: double(campaign, name, Campaign.start)
    yield "dnpo resumed twice", lambda: double(campaign, "dnpo", Campaign.go_on)
    yield "the toy world twice", lambda: double_world(campaign)


def double(campaign: Campaign, name: str, start) -> tuple[str, str]:
    cwd = campaign.fresh("double")
    if start is Campaign.go_on:
        shutil.copytree(campaign.killed, cwd / "out", copy_function=shutil.copy2)
    first = start(campaign, name, cwd)
    time.sleep(0.05)
    second = start(campaign, name, cwd)
    ends = [first.outcome(), second.outcome()]
    said = " | ".join(line for ended, line in ends if ended != "code 0")
    for ended, _ in ends:
        if ended not in ("code 0", "one line"):
            return ended, said
    if all(ended == "one line" for ended, _ in ends):
        return "wrong", f"both refused: {said}"
    return campaign.judge(name, cwd, "code 0"), said


def double_world(campaign: Campaign) -> tuple[str, str]:
    world = campaign.fresh("worlds") / "toy"
    ends = make_worlds(world, 2)
    if any(code for code, _ in ends):
        return "traceback", " | ".join(err for _, err in ends)[-300:]
    models = [file.parent.name for file in world.rglob("model.safetensors")]
    whole = sorted(models) == ["sft", "sft-early", "sft-small"]  # their bytes differ by rounding
    same = (world / "train.jsonl").read_bytes() == (campaign.world / "train.jsonl").read_bytes()
    return ("identical" if whole and same else "wrong"), ""


def make_worlds(folder: Path, times: int) -> list[tuple[int, str]]:
    """Makes a toy world in so many processes at once; returns their exit codes and stderr."""
    code = "import pathlib, sys, toy; toy.make(pathlib.Path(sys.argv[1]), steps=30, rows=120)"
    command = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": sys.path[0]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(times)]
    said = [process.communicate()[1] for process in running]
    return [(process.returncode, err) for process, err in zip(running, said)]


def flags(campaign: Campaign):
    """40 senseless or contradictory flags, files and places: one line, and nothing is written."""
    world = campaign.world
    deep, digits = campaign.folder / "deep.jsonl", campaign.folder / "digits.jsonl"
    deep.write_text("[" * 100_000 + "\n")
    digits.write_text('{"prompt": ' + "7" * 5000 + "}\n")
    link = campaign.folder / "link"
    if not link.is_symlink():
        link.symlink_to("nowhere")
    numbers = ("lr", "beta", "temperature", "noise_init", "noise_penalty")
    bad = [("dnpo", f"--{name}", value) for name in numbers for value in ("nan", "inf")]
    bad += [("sams", f"--{name}", "nan") for name in ("ratio", "gamma", "explore", "selector_lr")]
    bad += [("tso", f"--{name}", "nan") for name in ("clip_chosen", "lr", "warmup")]
    bad += [
        ("dnpo", "--warmup", 1.5),
        ("dnpo", "--epochs", 1_000_000),
        ("tso", "--epochs", 1_000_000),
        ("dnpo", "--resume", "--overwrite"),
        ("dnpo", "--test", world / "train.jsonl"),
        ("dnpo", "--model", ""),
        ("tso", "--out", ""),
        ("sams", "--reference", ""),
        ("generate", "--data", ""),
        ("dnpo", "--data", "nope.jsonl"),
        ("dnpo", "--data", deep),
        ("dnpo", "--data", digits),
        ("dnpo", "--out", "/dev/null"),
        ("dnpo", "--out", link),
        ("sams", "--out", "x" * 300),
        ("generate", "--out", "x" * 300),
        ("generate", "--out", "/dev/null/x"),
        ("evaluate", "--seed", -1),
        ("evaluate", "--data", "nope.jsonl"),
        ("evaluate", "--judge", "hf:nowhere"),
        ("tso", "--export_pairs", "/dev/null/x.jsonl"),
        ("dnpo", "--overwrite", "--out", world / "sft"),
        ("dnpo", "--overwrite", "--out", world),
    ]
    for name, *more in bad:
        said = " ".join(str(flag)[:60] for flag in more)
        yield f"{name} {said}", lambda name=name, more=more: refusal(campaign, name, more)


def refusal(campaign: Campaign, name: str, more: list) -> tuple[str, str]:
    cwd, before = campaign.fresh("flags"), fingerprint(campaign.world)
    ended, said = Started(name, [*campaign.programs[name], "--out", "out", *more], cwd).outcome()
    left = [file.name for file in cwd.iterdir()]
    if ended == "code 0":
        return "accepted", said
    if left or not campaign.world.exists() or fingerprint(campaign.world) != before:
        if not (campaign.world / "sft").exists():  # for the next case
            shutil.rmtree(campaign.world, ignore_errors=True)
            campaign.prepare()
        return "wrong", f"left {left}: {said}"
    return ended, said


KINDS = {"kills": kills, "disks": disks, "damage": damage, "doubles": doubles, "flags": flags}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()

    sys.path.insert(0, str(asked.tree.resolve()))
    for name in ("dnpo", "tso", "sams", "generate", "evaluate"):
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == asked.tree.resolve(), module.__file__
    campaign = Campaign(asked.folder.resolve())
    campaign.prepare()
    for kind in asked.only:
        campaign.run(kind, KINDS[kind](campaign))
    campaign.count()


if __name__ == "__main__":
    main()
