"""Running a job: flags, ranks, files that survive a kill, and the outside of a training loop.

Nothing here calls a model, reads a data set or knows one of the methods. The other modules and the
scripts `import job` and write `job.` before each of these names, so that a reader can tell plumbing
from method. torch.distributed.checkpoint is imported where it is needed: it takes seconds. The
sections, from the top:

    messages and seeds       die, seed_of, a console that may be closed
    ranks                    rank, world_size, on_rank_0, barrier, sum_ranks, and what FSDP needs
    devices                  a GPU for each rank, or the CPU and its heap
    being asked to stop      SIGTERM
    files                    written whole or not at all, read whole or not at all
    locks                    one program at a time
    phases                   items -> rows in a file, on all ranks, resumable
    flags                    a dataclass is the command line
    the run's folder         config.json, run.json, --resume, --overwrite
    training states          saved and loaded for any number of ranks; checkpoints
    TrainingRun              the outside of a training loop
    plan and report          what a run says before it starts and when it ends
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

# ------------------------------------------------------------------------- messages and seeds

STOP = threading.Event()  # SIGTERM has come
PATIENCE = 5.0  # seconds in which torchrun ends the other ranks, once one has died


def die(message: str) -> typing.NoReturn:
    """Ends the program with one line on stderr and exit code 2, for mistakes in the input.

    Under torchrun rank 0 prints it. Another rank speaks only if nothing ends it for a while: rank 0
    has not met this mistake, or torchrun would have ended all.
    """
    own_rank = int(os.environ.get("RANK", 0))
    if own_rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif not STOP.wait(PATIENCE):
        print(f"error on rank {own_rank}: {message}", file=sys.stderr)
    sys.exit(2)


@functools.cache
def say_once(line: str):
    """Prints a line on rank 0, the first time that it is given; there may be no group yet."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


def seed_of(*parts) -> int:
    """Returns a 63-bit seed made of numbers, strings, and lists or tuples of them.

    Randomness belongs to what is drawn (an iteration, a step, a row), not to who draws it. The
    parts' repr is hashed: a tensor's is abbreviated, an object's holds its address.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def first_line(fault: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


class Console:
    """stdout or stderr of a program that goes on when nobody reads it any more (`| head -1`).

    What the terminal's encoding lacks is shown as a question mark.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.leave()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.leave()

    def leave(self):
        """From here on all goes nowhere, also what Python flushes when it ends."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def steady_console():
    """Neither a closed pipe nor an ASCII terminal ends the program."""
    if not isinstance(sys.stdout, Console):
        sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)


# ------------------------------------------------------------------------- ranks


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_0() -> bool:
    """Whether this is the process that writes files and speaks to the console.

    It alone writes files. The others wait at a barrier for what they read next or have helped to
    gather (pairs.jsonl, state.pt, checkpoint/); past a line of metrics.jsonl and past results.json
    they go on. Only a phase's finished batches are written by every rank, into a part of its own.
    """
    return rank() == 0


def barrier():
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def leave():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def torchrun_store() -> dict:
    """Where torchrun's ranks meet, as arguments of init_process_group.

    The ranks wait for each other for two days: phases differ in length from rank to rank (a slow
    judge, a long answer), and a rank that dies ends the run through torchrun. After a restart they
    meet elsewhere, or gloo would call the dead ranks' addresses.
    """
    patience = datetime.timedelta(days=2)
    store, own_rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(patience)  # NCCL's ranks wait here for their first collective
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "store": dist.PrefixStore(restart, store),
        "rank": own_rank,
        "world_size": world,
        "timeout": patience,
    }


def sum_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Sums each value over the ranks, in one collective and one wait for the device for all."""
    total = torch.stack([value.double() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def on_any_rank(holds: bool) -> bool:
    """Whether something holds on one rank at least. All ranks must ask, and wait for each other."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    value = torch.tensor(float(holds), device="cuda" if nccl else "cpu")
    return sum_ranks({"holds": value})["holds"] > 0


@functools.cache
def node_mesh(device_type: str):
    """The ranks as nodes x ranks of a node, for HSDP.

    The model is replicated over the first axis and sharded over the second. torchrun's
    LOCAL_WORLD_SIZE says how many ranks a node has.
    """
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (world_size() // local, local)
    return dist.init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def cast_frozen(modules: list[nn.Module | None], dtype: torch.dtype):
    """Keeps the weights that are not trained in the dtype that they are computed in."""
    for module in filter(None, modules):
        for weight in module.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(dtype)


def fill(module: nn.Module, full: nn.Module | None, device) -> nn.Module:
    """Gives a sharded module on "meta" its memory on the device, and rank 0's weights and buffers.

    full: the whole module on rank 0, None elsewhere. Buffers that no checkpoint holds, such as
    rotary frequencies, are sent too: to_empty leaves them undefined.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    module.to_empty(device=device)
    weights = full.state_dict() if full else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, weights, options=options)

    buffers = dict(full.named_buffers()) if full else {}
    for name, buffer in module.named_buffers():
        value = buffers[name].to(buffer) if full else buffer
        dist.broadcast(value, 0)
        buffer.copy_(value)
    return module


# ------------------------------------------------------------------------- devices

LIBC = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None


def own_device() -> torch.device:
    """This rank's GPU, or else the CPU, where glibc and oneDNN are told what to keep."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    keep_freed_blocks()
    keep_few_products()
    return torch.device("cpu")


def keep_few_products():
    """Tells oneDNN, and torch's own cache above it, to keep 64 matrix products, before the first.

    In bf16 each shape has products of its own, compiled at its first use. By default 1024 are kept,
    so that a training on unequal lengths takes more memory with each step, up to many GiB; a
    micro-batch needs some twenty, which all layers share.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def keep_freed_blocks(keep: bool = True):
    """Tells glibc whether freed blocks stay with the process or go back to the system at once.

    Staying is what a GPU's caching allocator does. By default glibc gives blocks of more than 32
    MiB back, as those of logits are, and each new one is filled with zeros, page by page. When all
    go back, the resident set is what is in use.
    """
    if not LIBC:
        return
    threshold = 2**30 if keep else 2**16
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        LIBC.mallopt(option, threshold)


# ------------------------------------------------------------------------- being asked to stop


def stop_on_sigterm():
    """Pre-emption: the first SIGTERM lets a training step, or a batch of a phase, end and be saved.

    Then the program ends with exit code 0; after a training's last step, with its checkpoint.
    """
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())


def stopped() -> typing.NoReturn:
    """Ends the program because of SIGTERM; what was done is saved."""
    if on_rank_0():
        print("SIGTERM: what is done is saved; start again, a run with --resume", file=sys.stderr)
    sys.exit(0)


def stop_if_asked():
    """A barrier behind which all ranks end if SIGTERM has come to one of them."""
    if on_any_rank(STOP.is_set()):
        stopped()


# ------------------------------------------------------------------------- files


def write_atomic(path: Path, text: str):
    """Writes the whole file or nothing: a kill leaves the old one."""
    with all_or_nothing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(path: Path, text: str):
    """Appends to a file. A kill or a full disk may tear the text, and what reads it knows that."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def all_or_nothing(path: Path):
    """Gives a name to write to, which is renamed to `path` at the end.

    Where that fails, what was there before is still there, and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # it is not there, or its name can't be
            temporary.unlink()


@contextlib.contextmanager
def writing(path: Path):
    """Makes the folder of a file that is about to be written, and names what the disk refuses.

    Then the program ends with one line. torch and safetensors wrap what the disk says.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError, SafetensorError) as fault:
        not_written(path, fault)


def not_written(path: Path, fault: Exception) -> typing.NoReturn:
    """Ends the program with one line because of what the disk refuses."""
    reason, advice = first_line(fault), "mend that"
    if is_full(path, fault):
        reason, advice = f"the disk is full: {reason}", "make room"
    intact = "; what was there is intact" if os.path.exists(path) else ""
    sys.exit(
        f"error: {path} could not be written ({reason}){intact}: "
        f"{advice}, then start again, a run with --resume"
    )


def is_full(path: Path, fault: Exception) -> bool:
    """Whether a disk refused to write because it is full."""
    if isinstance(fault, OSError) and fault.errno:
        return fault.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        return "No space" in str(fault) or shutil.disk_usage(path.parent).free < 2**20
    return False


MADE_AGAIN = "delete it, and it is made again"


def damaged(path: Path | str, why, advice: str = MADE_AGAIN) -> typing.NoReturn:
    """Ends the program because of a file that can't be what we have written."""
    if isinstance(why, BaseException):
        why = f"{type(why).__name__}: {first_line(why)}"
    die(f"{path} is damaged ({why}): {advice}")


def read_json(path: Path, advice: str) -> dict:
    """Reads a file of ours that holds one JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as fault:
        damaged(path, fault, advice)
    if not isinstance(value, dict):
        damaged(path, f"expected an object, found {type(value).__name__}", advice)
    return value


def read_jsonl(path: Path, kind: type = dict, advice: str = MADE_AGAIN) -> list:
    """Reads a JSON lines file of ours, every line of which holds a value of that kind.

    Only "\n" ends a line: str.splitlines would cut texts at U+2028 and its like.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as fault:
            damaged(f"{path}:{number}", fault, advice)
        if not isinstance(row, kind):
            damaged(f"{path}:{number}", f"a {type(row).__name__}, not a {kind.__name__}", advice)
        rows.append(row)
    return rows


def whole_lines(path: Path, kind: type = dict) -> list:
    """What can be read of a JSON lines file that may be torn, or not be there: values of a kind.

    For files whose lines stand for themselves: what is lost is made, or asked for, again.
    """
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line.decode())
            if isinstance(row, kind):
                rows.append(row)
    return rows


def json_lines(rows: Iterable) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def progress(items, note: str):
    """A progress bar on rank 0, and only on a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=note, leave=False, disable=None if on_rank_0() else True)


# ------------------------------------------------------------------------- locks

HELD: dict[Path, int] = {}  # locked files, which stay open: path and descriptor


def hold(path: Path, what: Path):
    """Locks a file until this program ends: no other one may write to `what`, which it stands for.

    Every rank holds a lock, and rank 0 of a newcomer must get it alone: ranks that have outlived
    their torchrun still keep others out. The system frees what a dead process has held.
    """
    if path in HELD:  # this process was here before, and so were the other ranks
        fcntl.flock(HELD[path], fcntl.LOCK_UN)
        os.close(HELD.pop(path))
        barrier()
    file = HELD[path] = open_lock(path)
    taken = on_rank_0() and not is_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if on_any_rank(taken):
        holder = os.read(file, 200).decode(errors="replace")
        die(f"{what} is in use by {holder or 'another program'}: wait for its end, or end it")
    if on_rank_0():
        holder = f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T')}"
        with writing(path):
            os.truncate(file, 0)
            os.write(file, holder.encode())
    if world_size() > 1:
        is_locked(file, fcntl.LOCK_SH)  # waits for rank 0, whose own becomes a shared one


def open_lock(path: Path) -> int:
    """Opens a file to be locked, and makes it if it isn't there. Returns the descriptor."""
    with writing(path):
        return os.open(path, os.O_RDWR | os.O_CREAT)


def is_locked(file: int, how: int) -> bool:
    """Locks an open file, False if another program holds it. Not every file system can lock."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as fault:
        print(f"warning: no lock on --out: {fault.strerror}", file=sys.stderr)
    return True


# ------------------------------------------------------------------------- phases


def phase(
    path: Path,
    items: list,
    work: Callable[[list, int], list[dict]],
    size: int,
    settings=None,
    key: Callable | None = None,
    note: str = "",
    ids: list[str] | None = None,
    holes: bool = False,
) -> list[dict]:
    """Maps items to rows, one for one, in a JSON lines file, on all ranks; returns the rows.

    work(batch of items, the batch's number) returns their rows; with `holes`, None in the place of
    a row leaves it out. Batches have `size` items, which are neighbours under `key`, so that their
    lengths match. The batches and their numbers are the same for any number of ranks and
    interruptions; so are the rows, if their seeds are made of the batch's number.

    Every finished batch is a line in PATH.partRANK, and a killed phase goes on from there. If it
    was begun with other `settings` or items, the program ends; where items are indices, what they
    point at belongs into `settings`, by content and not by a path, since a folder may be moved.

    A finished phase is only read, whatever was changed since: after a change of the code, delete
    its file or use another folder. It must have a row for each item, with the `ids`, if given; with
    `holes` some may be missing.
    """
    if not path.exists():
        # 1. the batches, and a stamp of all that their rows depend on
        order = list(range(len(items)))
        if key:
            order.sort(key=lambda i: key(items[i]))
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        stamp = f"{seed_of(settings, size, [str(item) for item in items]):016x}"

        # 2. what an earlier start has left to do, shared out over the ranks
        done = read_parts(path, stamp)
        barrier()  # no rank writes before all have read
        missing = [number for number in range(len(batches)) if number not in done]
        if key:
            missing.reverse()  # the longest first: one too large for the memory fails at once
        mine = missing[rank() :: world_size()]

        # 3. the work, batch by batch
        run_batches(path, items, batches, mine, work, stamp, note or path.stem, size)
        stop_if_asked()

        # 4. all parts, put into the items' order
        if on_rank_0():
            join_parts(path, batches, stamp)
        barrier()

    rows = read_jsonl(path)
    if len(rows) > len(items) or (len(rows) < len(items) and not holes):
        damaged(path, f"{len(rows)} rows, not {len(items)}")
    if ids:
        check_ids(path, [row.get("id") for row in rows], ids)
    if on_rank_0():
        for part in parts_of(path):
            part.unlink()
    return rows


def join_parts(path: Path, batches: list[list[int]], stamp: str):
    """Writes a phase's file from its finished parts. batches: the indices of each one's items."""
    done = read_parts(path, stamp)
    rows = {}
    for number, batch in enumerate(batches):
        for i, row in zip(batch, done[number]):
            rows[i] = row

    in_order = [rows[i] for i in sorted(rows)]
    write_atomic(path, json_lines(row for row in in_order if row is not None))


def check_ids(path: Path, found: list, expected: list[str]):
    """Ends the program unless the ids in a phase's file are those expected, some left out."""
    left = iter(expected)
    for name in found:
        if name not in left:  # which goes on behind it, or to the end
            damaged(path, f"a row {name!r} where it is not expected")


def run_batches(
    path: Path, items, batches, mine: list[int], work, stamp: str, note: str, size: int
):
    """Does this rank's batches of a phase and appends each to PATH.partRANK as it is finished.

    SIGTERM lets the running batch end.
    """
    part = path.with_name(f"{path.name}.part{rank()}")
    world = world_size()
    plural = "s" if world > 1 else ""
    append(part, "\n")  # ends a line that a kill may have torn
    for number in progress(mine, f"{note} ({world} rank{plural}, batches of {size})"):
        if STOP.is_set():
            return
        rows = work([items[i] for i in batches[number]], number)
        append(part, json_lines([{"stamp": stamp, "batch": number, "rows": rows}]))


def read_parts(path: Path, stamp: str) -> dict[int, list]:
    """The finished batches of a phase, from every whole line in PATH.part*.

    Ends the program if they were begun with other settings.
    """
    done = {}
    for part in parts_of(path):
        for entry in whole_lines(part):
            if entry.get("stamp") != stamp:
                die(
                    f"{part} was begun with other settings or data: "
                    "delete it, or write somewhere else"
                )
            done[entry["batch"]] = entry["rows"]
    return done


def parts_of(path: Path) -> list[Path]:
    """The files PATH.partRANK, whatever characters PATH has."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part[0-9]*"))


# ------------------------------------------------------------------------- flags


MOST_EPOCHS = 1000  # the order of all steps is made before the first one


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message):
        die(f"{message} (see --help)")


def parse(cls, presets: dict[str, dict] | None = None, argv: list[str] | None = None):
    """Makes an instance of a frozen dataclass from the command line.

    A field's comment is its --help (see field_notes), --a_b and --a-b are the same flag, and a
    value is the flag's, else the preset's, else the field's default; --data without --test drops
    the preset's held-out data. The dataclass refuses a value with a ValueError, which ends the
    program with one line.
    """
    steady_console()
    presets = presets or {}
    parser = Parser(
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, cls, presets.get("toy", {}))
    given = vars(parser.parse_args(argv))

    if presets:
        default = "paper" if torch.cuda.is_available() else "toy"
        preset = given.setdefault("preset", default)
        values = dict(presets[preset])
        if "data" in given:
            values["test"] = None  # the preset's held-out data go with its training data
        given = values | given
    try:
        return cls(**given)
    except ValueError as fault:
        die(str(fault))


def add_flags(parser: argparse.ArgumentParser, cls, toy: dict):
    """One flag per field of the dataclass; its help names the default, and the toy preset's."""
    notes = field_notes(cls)
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        defaults = f"default: {default}"
        if field.name in toy:
            defaults += f"; toy: {toy[field.name]}"
        text = f"{notes.get(field.name, '')} ({defaults})"

        names = [f"--{field.name}", f"--{field.name.replace('_', '-')}"]
        names += field.metadata.values()  # further names of the flag
        parser.add_argument(
            *dict.fromkeys(names),  # each once
            dest=field.name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **flag_kind(field.name, kinds[field.name]),
        )


def flag_kind(name: str, kind) -> dict:
    """argparse's words for the type of a field."""
    options = typing.get_args(kind)
    if type(None) in options:  # X | None
        kind = options[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is list:
        return {"nargs": "+", "type": some_text, "metavar": "X"}
    if kind is float and not name.startswith("clip"):  # inf: no bound
        return {"type": finite, "metavar": "FLOAT"}
    return {"type": some_text if kind is str else kind, "metavar": kind.__name__.upper()}


def finite(text: str) -> float:
    """The number that a flag's text names, which is neither nan nor inf."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"invalid float value: {text!r}")


def some_text(text: str) -> str:
    """A flag's text, which is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a text, not an empty one")
    return text


def field_notes(cls) -> dict[str, str]:
    """The comments of a dataclass's fields, by name: directly above a field, and behind it.

    A comment that begins with "--" is the headline of a group and belongs to no field.
    """
    notes, comments = {}, []
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): ", line)
        comment = re.search(r"(?:^|\s)#\s*(.+)$", line)
        if comment and not comment[1].startswith("--"):
            comments.append(comment[1])
        if field and comments:
            notes[field[1]] = " ".join(comments)
        if field or not comment:
            comments = []
    return notes


def check_positive(config, *names: str):
    """ValueError for the first of these flags that is given and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, not {value}")


def check_not_negative(config, *names: str):
    """ValueError for the first of these flags that is below 0."""
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise ValueError(f"--{name} must not be negative, not {value}")


def check_run(config):
    """ValueError for flags that make no sense in a run, or not together, and for a bad --out."""
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on, --overwrite begins again: only one of them can be")
    if config.test and Path(config.test).resolve() == Path(config.data).resolve():
        raise ValueError(f"--test {config.test} is --data: held-out data must not be trained on")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"--warmup must be at least 0 and at most 1, not {config.warmup}")
    if not 0 < config.epochs <= MOST_EPOCHS:
        raise ValueError(f"--epochs must be above 0 and at most {MOST_EPOCHS}, not {config.epochs}")
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if config.compile and not any(map(shutil.which, compilers)):
        raise ValueError("--compile needs a C++ compiler: install g++, or set CXX to one")


def check_out(folder: Path, flag: str = "--out"):
    """Ends the program if the folder of a flag can be neither made nor written to."""
    try:
        nearest = folder
        while not nearest.exists() and not nearest.is_symlink():
            nearest = nearest.parent
        usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError as fault:
        die(f"{folder}: {fault.strerror}: choose another {flag}")
    if not usable:
        kind = "can't be written to" if nearest.is_dir() else "is no folder"
        die(f"{nearest} {kind}: choose another {flag}")


# ------------------------------------------------------------------------- the run's folder


FIRST_FILES = ("lock", "run.json.tmp")  # a kill may leave these and no run

# flags that name files and folders which a run reads, or shares with others
INPUTS = (
    *("model", "data", "test", "judge", "older", "smaller", "encoder"),
    *("verdicts", "export_pairs", "reference"),
)


def open_run(config, data: list[str | None], may_change: tuple[str, ...]) -> Path:
    """Makes or enters the run's folder, and writes config.json and run.json into it.

    A folder in use is refused without --resume or --overwrite, and so is resuming with other flags
    than the run was begun with, those in `may_change` excepted, or with other content of the files
    named in `data`. --overwrite deletes runs only. No other program may write to the folder until
    this one ends.
    """
    out = Path(config.out)
    check_out(out)
    used = out.exists() and any(file.name not in FIRST_FILES for file in out.iterdir())
    # --max-restarts: the same command once more, which would delete what is done
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    if used and config.resume:
        if not is_run(out):
            die(f"{out}: no run.json of ours, so no run to resume")
        if (out / "config.json").exists():  # else a kill came before it
            check_same_flags(out, config, may_change)
        check_same_data(out, config, data, may_change)
    elif used and (restarted or not config.overwrite):
        die(f"{out} is not empty: --resume to go on, --overwrite to begin again, or another --out")
    elif used and not is_run(out):
        die(f"{out} holds no run (no run.json of ours), so --overwrite does not touch it")
    else:
        check_apart(out, config)

    barrier()
    hold(out / "lock", out)
    if on_rank_0():
        if used and not config.resume:
            clear(out)
        mend(out / "metrics.jsonl")
        write_atomic(out / "run.json", json.dumps(provenance(data), indent=1))
        flags = dataclasses.asdict(config)
        write_atomic(out / "config.json", json.dumps(flags, indent=1))
    barrier()
    return out


def is_run(out: Path) -> bool:
    """Whether a folder's run.json has our mark: every model's folder has a config.json."""
    file = out / "run.json"
    return file.is_file() and "made_by" in read_json(file, f"look at it, or delete {out}")


def check_same_flags(out: Path, config, may_change: tuple[str, ...]):
    """Ends the program if the run in `out` was begun with other flags."""
    before = read_json(out / "config.json", "mend it, or begin again with --overwrite")
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in now.items():
        if name not in may_change and before.get(name) != value:
            asked = getattr(config, name)
            die(
                f"{out} was begun with --{name} {before.get(name)}, not {asked}: "
                "resume it as it was, or choose another --out"
            )


def check_same_data(out: Path, config, data: list[str | None], may_change: tuple[str, ...]):
    """Ends the program if a file of data was edited since the run in `out` was begun."""
    before = read_json(out / "run.json", f"delete {out}").get("data", {})
    free = [getattr(config, flag, None) for flag in may_change]  # a person's verdicts grow
    for name, digest in file_hashes(data).items():
        if name not in free and before.get(name, digest) != digest:
            die(
                f"{name} is not what it was when {out} was begun: "
                "resume with the old data, or choose another --out"
            )


def check_apart(out: Path, config):
    """Ends the program if a run would delete or fill what another flag names: a model, data."""
    place = out.resolve()
    for name in INPUTS:
        value = getattr(config, name, None) or []
        for spec in value if isinstance(value, list) else [value]:
            path = path_in(spec)
            if path is None:
                continue
            other = path.resolve()
            if place == other or place in other.parents or other in place.parents:
                die(f"--out {out} is, or holds, or is inside of --{name} {spec}: choose another")


def path_in(spec: str) -> Path | None:
    """The file or folder that a flag's value names, alone, as rm:PATH, or as PATH:SPLIT."""
    kind, _, behind = spec.partition(":")
    before, _, _ = spec.rpartition(":")
    places = [behind] if kind in ("hf", "rm") else [spec, before]
    for place in filter(None, places):
        if os.path.exists(place):
            return Path(place)
    return None


def clear(out: Path):
    """Empties a run's folder, but for its lock and its mark, which is overwritten later.

    The flags go last: after a kill what is left of the old run is not taken for one of other flags.
    """
    others = [path for path in out.iterdir() if path.name not in ("lock", "run.json")]
    for path in sorted(others, key=lambda path: path.name == "config.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def provenance(data: list[str | None]) -> dict:
    """Where a run's numbers come from: command, commit, versions, ranks, hashes of data files."""
    import transformers

    git = ""
    with contextlib.suppress(OSError):  # there may be no git
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    return {
        "made_by": Path(sys.argv[0]).name,
        "argv": sys.argv,
        "git": git or None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "world_size": world_size(),
        "data": file_hashes(data),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def file_hashes(data: list[str | None]) -> dict[str, str]:
    """The sha256 of those of these names that are files or folders, by name.

    A folder's is that of its files' names and hashes. What a Hub id stands for has none.
    """
    hashes = {}
    for name in filter(None, data):
        path = path_in(name)
        if path and path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            listed = [(str(file.relative_to(path)), file_hash(file)) for file in files]
            hashes[name] = hashlib.sha256(repr(listed).encode()).hexdigest()
        elif path:
            hashes[name] = file_hash(path)
    return hashes


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------- training states


def save_state(path: Path, parts: dict, **more):
    """Saves modules with their optimizers, and plain values, as one file. All ranks must call it.

    parts: {name: (module, optimizer)}. The file loads on any number of ranks. Frozen parameters are
    not saved.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    full = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = {}
    for name, (module, optimizer) in parts.items():
        weights = get_model_state_dict(module, options=full)
        moments = get_optimizer_state_dict(module, optimizer, options=full)
        state[name] = weights, moments
    state["more"] = more

    if on_rank_0():
        with all_or_nothing(path) as temporary:
            torch.save(state, temporary)
    barrier()


def load_state(path: Path, parts: dict, training: str) -> dict:
    """Loads what save_state wrote into the same parts; returns its plain values.

    Ends the program if that can't be read, or was saved in another training.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    advice = "delete it, and this training begins again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        more, saved_in = state["more"], state["more"]["training"]
        trained = [state[name] for name in parts]
    except Exception as fault:  # torch.load has many
        damaged(path, fault, advice)
    if saved_in != training:
        damaged(path, "it was saved in another iteration or run, or on other data", advice)

    for (module, optimizer), (weights, moments) in zip(parts.values(), trained):
        set_model_state_dict(module, weights, options=options)
        set_optimizer_state_dict(module, optimizer, moments, options=options)
    return more


def save_checkpoint(folder: Path, scorer: nn.Module, tok, source: str, dtype: str = "float32"):
    """Saves the policy as an ordinary Hugging Face folder, all or nothing. All ranks must call it.

    The folder has weights in `dtype`, tokenizer, chat template, and the generation_config of
    `source`, the model that the training started from.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import GenerationConfig

    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(scorer, options=full)
    if on_rank_0():
        shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)  # a kill's
        lm = getattr(scorer, "module", scorer).lm  # DDP holds the scorer as .module
        with contextlib.suppress(OSError):  # the source has none
            lm.generation_config = GenerationConfig.from_pretrained(source)

        weights = {name.removeprefix("lm."): value for name, value in state.items()}
        if lm.config.tie_word_embeddings:
            for name in lm._tied_weights_keys or {}:
                weights.pop(name, None)  # it is the embedding, which is saved once
        for name, value in weights.items():
            if value.is_floating_point():
                weights[name] = value.to(getattr(torch, dtype))
        with all_or_nothing(folder) as temporary:
            lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
            config = json.loads((temporary / "config.json").read_text())
            config["dtype"] = dtype  # in which transformers loads it: lm's own is float32
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            tok.save_pretrained(temporary)
    barrier()


def refuse_to_shorten(c, name: str, flag: str):
    """Ends the program if a run that is to go on has gone further than its flag now says.

    name: of the folder that would come after the last one. New results would leave it out.
    """
    folder = Path(c.out) / name
    if c.resume and folder.exists():
        die(f"{folder} is there already: this run had a larger {flag}")


def finish(folder: Path) -> Path:
    """Removes what a training that is done has left, and returns its checkpoint.

    In memory that is its models: a checkpointed layer refers to itself, so that they go only when
    Python looks for cycles.
    """
    gc.collect()
    if on_rank_0():
        (folder / "state.pt").unlink(missing_ok=True)
    return folder / "checkpoint"


def mend(path: Path):
    """Drops a last line of metrics.jsonl that a kill, or a full disk, has torn."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with all_or_nothing(path) as temporary:
            temporary.write_bytes(text[: text.rfind(b"\n") + 1])


def truncate_metrics(path: Path, keep: Callable[[dict], bool]):
    """Drops the lines of metrics.jsonl that are about to be measured again, and a torn last one."""
    mend(path)
    lines = read_jsonl(path, advice="delete this line") if path.exists() else []
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines if keep(line)))


def metrics_of(path: Path, iteration: int | None) -> list[dict]:
    """The lines of metrics.jsonl that the training of this number has left, one at least."""
    lines = read_jsonl(path, advice="delete this line") if path.exists() else []
    found = [line for line in lines if line.get("iteration") == iteration]
    if not found:
        die(
            f"{path}: no line of training {iteration}: "
            "delete the checkpoint or state.pt that it has left, and it is made again"
        )
    return found


# ------------------------------------------------------------------------- TrainingRun


class TrainingRun:
    """The outside of a training loop: where it starts, what it leaves on disk, when it must end.

    It never calls the model and decides nothing about the training. A script's loop reads

        run = job.TrainingRun(c, folder, steps, {"policy": (policy, optimizer)}, ...)
        for step in run:
            ...                                           # the method: forward, backward, step
            metrics = run.reduce(step, sums, row_ids)     # the same numbers on every rank
            run.write(step, metrics, lr=lr, grad_norm=norm)

    and begins after the last step that an earlier start has saved in folder/state.pt. After every
    c.save_every steps all is saved there again, and so it is on SIGTERM, which ends the program.

    Every step leaves a line in the file `metrics`, which begins with `tags`. Lines of steps that
    are about to be made again are dropped first. A script that trains several times into one file
    counts the trainings in tags["iteration"], from 1: the lines of others stay, earlier and later.

    steps: the indices of each optimizer step's pairs. parts: {name: (module, optimizer)} to save
    and load. keeps: {name: object with state() and restore(state)}, likewise; a state is made of
    tensors, numbers and containers of them. note: what the progress bar says before the first step.
    place: where we are, for error messages.
    """

    def __init__(
        self,
        c,
        folder: Path,
        steps: list[list[int]],
        parts: dict,
        device,
        *,
        metrics: Path,
        note: str,
        tags: dict | None = None,
        place: str = "",
        keeps: dict | None = None,
    ):
        self.steps = steps
        self.parts = parts
        self.keeps = keeps or {}
        self.device = device
        self.file = metrics
        self.tags = tags or {}
        self.place = place
        self.state = folder / "state.pt"
        self.save_every = c.save_every
        self.stop = False
        self.row_ids = []  # of the last step
        self.training = f"{seed_of(self.tags, steps):016x}"  # which one a state is of

        more = {"step": 0}
        if self.state.exists():
            more = load_state(self.state, parts, self.training)
        self.first = more["step"]
        for name, thing in self.keeps.items():
            if name in more:
                thing.restore(more[name])

        if on_rank_0():
            truncate_metrics(metrics, self.is_done)
        barrier()
        if self.first and len(metrics_of(metrics, self.tags.get("iteration"))) < self.first:
            damaged(metrics, "steps are missing", f"delete {self.state}, and they are made again")
        self.bar = progress(range(self.first, len(steps)), note)
        self.started = time.monotonic()

    def is_done(self, line: dict) -> bool:
        """Whether a line of metrics is of another iteration, or of a step that is saved."""
        other = line.get("iteration") != self.tags.get("iteration")
        return other or line.get("step", math.inf) <= self.first

    def __iter__(self) -> Iterator[int]:
        """The steps to make; between two of them, saving and stopping."""
        for step in self.bar:
            yield step
            if step + 1 == len(self.steps):
                continue  # to the checkpoint, whoever asks to stop
            if self.stop or (step + 1) % self.save_every == 0:
                more = {name: thing.state() for name, thing in self.keeps.items()}
                more.update(step=step + 1, training=self.training)
                save_state(self.state, self.parts, **more)
            if self.stop:
                stopped()

    def reduce(self, step: int, sums: dict[str, Tensor], row_ids: list[str]) -> dict[str, float]:
        """Sums a step's metrics over the ranks, and looks at those before the first step.

        sums: each rank's part of the metrics, those of common.preference_metrics among them.
        row_ids: the rows of the step, for messages.
        """
        asked = torch.tensor(float(STOP.is_set()), device=self.device)
        metrics = sum_ranks({**sums, "stop": asked})
        self.stop = metrics.pop("stop") > 0  # on all ranks if on one
        self.row_ids = row_ids

        size = metrics.pop("rewards/size")
        if step == 0 and size > 1e-3 and on_rank_0():
            print(
                "warning: before the first step the policy differs from its reference "
                f"by a reward of {metrics['rewards/chosen']:+.4f}, in absolute value {size:.4f}; "
                "both should be 0, but for rounding (bf16, several pairs a pass)",
                file=sys.stderr,
            )
        return metrics

    def write(self, step: int, metrics: dict, *, lr: float, grad_norm: float, more: str = ""):
        """Appends a step's line to the file of metrics and shows it; `more` is shown only.

        Without a terminal, where there is no bar, a line is printed for each quarter of the steps.

        A loss, a gradient or whatever else a step has measured that is not finite ends the program,
        on every rank with one line. Nothing of this step is saved: state.pt is the last one, the
        metrics end with the step before.
        """
        for name, value in {**metrics, "grad_norm": grad_norm}.items():
            if isinstance(value, float) and not math.isfinite(value):
                where = f"{self.place}, step {step + 1}" if self.place else f"step {step + 1}"
                sys.exit(
                    f"error: the {name} is {value} at {where}, rows {self.row_ids}: "
                    "lower the learning rate, or look at these rows"
                )
        if not on_rank_0():
            return
        seconds = max(time.monotonic() - self.started, 1e-6)
        pairs = sum(len(indices) for indices in self.steps[self.first : step + 1])
        line = {
            **self.tags,
            "step": step + 1,
            **metrics,
            "grad_norm": grad_norm,
            "lr": lr,
            "memory_gib": memory_gib(self.device),
            "pairs_per_second": pairs / seconds,
        }
        append(self.file, json.dumps(line) + "\n")

        total = len(self.steps)
        per_step = seconds / (step - self.first + 1)
        text = metric_line(line, total, per_step * (total - step - 1)) + more
        self.bar.set_description_str(text)
        quarters_before, quarters = 4 * step // total, 4 * (step + 1) // total
        if self.bar.disable and quarters > quarters_before:
            print(text, flush=True)


def metric_line(m: dict, steps: int, seconds_left: float) -> str:
    """One step's metrics (keys as in TRL) as one line for people."""
    iteration = f"iter {m['iteration']} · " if "iteration" in m else ""
    minutes, seconds = divmod(int(seconds_left), 60)
    return (
        f"{iteration}step {m['step']}/{steps} · loss {m['loss']:.3f}"
        f" · margin {m['rewards/margins']:+.2f} · acc {m['rewards/accuracies']:.2f}"
        f" · |g| {m['grad_norm']:.1f} · lr {m['lr']:.1e}"
        f" · {m['pairs_per_second']:.1f} pair/s · {m['memory_gib']:.1f} GiB"
        f" · {minutes}:{seconds:02d} left"
    )


def memory_gib(device) -> float:
    """Peak memory in GiB: the CUDA allocator's, or this process's resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    peak = status.exists() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    if peak:
        return int(peak[1]) / 2**20
    import resource  # its peak counts what ran in this process before exec, too

    units = 2**30 if sys.platform == "darwin" else 2**20  # bytes, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


# ------------------------------------------------------------------------- plan and report


def memory_parts(
    lm,
    c,
    *,
    chunk: int,
    reference: bool,
    heads: dict[str, int] | None = None,
) -> dict[str, float]:
    """Bytes on each rank, by arithmetic. lm: the model's shapes.

    P weights in fp32 take 4P bytes, their gradients 4P and Adam 8P. A resident reference takes 4P,
    or 2P where FSDP keeps it in bf16. Another trained head (heads: its name and its number of
    weights) takes 16 for each of them. All this is divided by the ranks that shard it.

    Beside them, sharded layers are gathered for their use, the running and the next one, and
    embedding and head; unsharded ones have bf16 copies, all of them or, with activation
    checkpointing, those in use.

    Activations are an estimate (`activation_bytes`). Where a config has no intermediate_size they
    are left out.
    """
    heads = heads or {}
    shards = 1
    if dist.is_initialized() and c.parallel == "fsdp":
        shards = world_size()
    elif dist.is_initialized() and c.parallel == "hsdp":
        shards = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    config = lm.config.get_text_config(decoder=True)
    V, D, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
    P = sum(p.numel() for p in lm.parameters())
    one_layer = (P - V * D) / L
    number = 2 if c.dtype == "bfloat16" else 4  # bytes of a computed number

    parts = {"weights": 4 * P / shards, "gradients": 4 * P / shards, "Adam": 8 * P / shards}
    if shards > 1:
        parts["gathered layers"] = (2 * one_layer + 2 * V * D) * number
    elif number == 2:
        parts["bf16 copies"] = 2 * (V * D + one_layer if c.activation_checkpointing else P)
    if reference:
        sharded = dist.is_initialized() and c.parallel in ("fsdp", "hsdp")
        parts["reference"] = (number if sharded else 4) * P / shards
    for name, weights in heads.items():
        parts[name] = 16 * weights / shards

    if isinstance(getattr(config, "intermediate_size", None), int):
        blocks = 8 if heads else 4
        parts["activations up to about"] = activation_bytes(config, c, number, chunk, blocks)
    return parts


def activation_bytes(config, c, number: int, chunk: int, blocks: int) -> float:
    """About how many bytes the activations of a forward and backward pass take on a rank.

    It is what every Llama layer keeps of each token; a computed number has `number` bytes. With
    activation checkpointing that is its input only, and one and a half whole layers, which are
    being recomputed and have gradients. To this come `blocks` fp32 blocks of logits of `chunk`
    tokens: four, or eight with another head on them.
    """
    V, D, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
    micro = min(c.micro_batch, c.batch // world_size())
    tokens = 2 * micro * (c.max_prompt + c.max_response)

    # of each token and layer: norms and residual stream in fp32, the rest as computed
    layer = (28 + 4 * number) * D + 4 * config.intermediate_size * number
    if c.activation_checkpointing:
        kept = tokens * (4 * L * D + 1.5 * layer)
    else:
        kept = tokens * (L * layer)
    return kept + blocks * 4 * V * min(chunk, 2 * micro * c.max_response)


def memory_plan(lm, c, **what) -> str:
    """The parts of a rank's memory as one line, in GiB."""
    parts = memory_parts(lm, c, **what)
    total = sum(parts.values())
    listed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"memory of a rank: {total / 2**30:.2f} GiB = {listed}"


def preset_note(c) -> str:
    """The preset, and who chose it."""
    if any(argument.startswith("--preset") for argument in sys.argv):
        return f"preset {c.preset} (asked for)"
    found = "under" if torch.cuda.is_available() else "without"
    return f"preset {c.preset} (default {found} CUDA)"


def left_out_note(dropped: Counter) -> str:
    """How many rows were left out, by reason, to follow a count of those that were not."""
    return "".join(f", {n} left out: {why}" for why, n in dropped.items() if n)


def batch_note(c, steps: str, device) -> str:
    """What a step is made of and where it is computed. steps: how many there will be, in words."""
    world = world_size()
    micro = min(c.micro_batch, c.batch // world)
    parts = [
        f"batch {c.batch} = {world} ranks x {micro} pairs"
        f" x {c.batch // world // micro} micro-batches",
        steps,
        str(device),
        c.parallel if dist.is_initialized() else "one process",
        f"weights float32, compute {c.dtype}",
    ]
    if c.activation_checkpointing:
        parts.append("activation checkpointing")
    return " · ".join(parts)


def write_results(out: Path, results: dict, started: float):
    """Writes results.json, with the seconds since `started`, a time.monotonic()."""
    if on_rank_0():
        seconds = round(time.monotonic() - started, 1)
        write_atomic(out / "results.json", json.dumps({**results, "seconds": seconds}, indent=1))


def write_samples(out: Path, after_each: str, folders: dict[str, Path]):
    """Writes samples.md: the first three held-out prompts and everybody's answers to them.

    after_each: "iteration" or "slice". folders: by name, where a test.jsonl lies.
    """
    answers = {name: read_jsonl(folder / "test.jsonl")[:3] for name, folder in folders.items()}
    text = "# Three held-out prompts, the annotated answer, and the model's after each "
    text += f"{after_each}\n"
    first, *_ = answers.values()
    for i, row in enumerate(first):
        text += f"\n## {row['prompt'][-1]['content']}\n\nannotated: {row['annotated']}\n"
        for name, rows in answers.items():
            text += f"\n{name}: {rows[i]['response']}\n"
    write_atomic(out / "samples.md", text)


def show_end(out: Path, files: str, model: str, started: float):
    """The last lines on the console: where everything is, and how to load the model."""
    print(
        f"{time.monotonic() - started:.0f} s · {out}/{files} · the model:\n"
        f"  lm = AutoModelForCausalLM.from_pretrained({model!r})\n"
        f"  tok = AutoTokenizer.from_pretrained({model!r})"
    )


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as a table for the console and for Markdown."""
    cells = [columns]
    for row in rows:
        cells.append([show_cell(row.get(name)) for name in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    lines = []
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths)]
        lines.append("| " + " | ".join(padded) + " |")
    ruler = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], ruler, *lines[1:]])


def show_cell(value) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
