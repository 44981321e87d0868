"""The papers' figures, from finished runs alone: `python evaluate.py --figures runs/...`.

No model is loaded. Runs that differ in their seed alone are one line with a band. There is one
function for each figure, and what it shows is computed by functions of their own, which draw
nothing: statistics first, then what is read from a run's files, then the drawing.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import job

# ------------------------------------------------------------------------- statistics


def ks_distance(a, b) -> float:
    """The Kolmogorov-Smirnov distance of two samples, max_x |F_a(x) - F_b(x)|.

    F is a sample's distribution function. The samples are [n] and [m], the distance is 0..1.
    """
    a = np.sort(a)
    b = np.sort(b)
    x = np.concatenate([a, b])  # [n + m]: the functions change at these points only
    share_of_a = np.searchsorted(a, x, "right") / len(a)  # F_a(x)
    share_of_b = np.searchsorted(b, x, "right") / len(b)  # F_b(x)
    return float(np.abs(share_of_a - share_of_b).max())


def histogram(samples: dict[str, list], bins: int = 24) -> tuple[np.ndarray, dict]:
    """The shares of each sample's values that fall into the same bins.

    The bins reach from the 1st to the 99th percentile of all values together; what lies outside
    is counted in the outer bins. Returns the bins' edges [bins + 1] and {name: shares [bins]},
    which sum to 1.
    """
    together = np.concatenate(list(samples.values()))
    low, high = np.percentile(together, [1, 99])
    if high <= low:
        high = low + 1
    edges = np.linspace(low, high, bins + 1)

    shares = {}
    for name, sample in samples.items():
        inside = np.clip(sample, edges[0], edges[-1])
        counts, _ = np.histogram(inside, edges)
        shares[name] = counts / len(sample)
    return edges, shares


def band(runs: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1) over the curves of R runs, cut to the shortest: [T], [T].

    The deviation of a single run is 0.
    """
    shortest = min(len(curve) for curve in runs)
    values = np.array([curve[:shortest] for curve in runs], float)  # [R, T]
    mean = values.mean(0)
    if len(values) == 1:
        return mean, np.zeros(shortest)
    return mean, values.std(0, ddof=1)


# ------------------------------------------------------------------------- runs and their kinds

# A field that the Config of this script alone has.
MARKS = {"noise_init": "dnpo", "clip_chosen": "tso", "selector_lr": "sams"}

# What runs of one kind may differ in: the seed, names, and what the method knows nothing of.
ALIKE = {
    "seed",
    "out",
    "resume",
    "overwrite",
    "parallel",
    "activation_checkpointing",
    "compile",
    "micro_batch",
    "sort_by_length",
    "save_every",
    "save_dtype",
    "reference",
    "dry_run",
    "export_pairs",
}

# SamS compares selectors on the same task; each task has a panel.
TASK = ("model", "data", "test", "limit", "flip", "epochs", "max_steps", "batch", "lr", "beta")

# SamS's selectors, as they are called in the paper.
SELECTORS = {
    "topk": "SamS",
    "sample": "SamS, sampled",
    "all": "DPO",
    "random": "random",
    "margin": "highest margin",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class Run:
    """A finished run of one of the three scripts, as its files tell."""

    folder: Path
    name: str  # what the user calls it, "" if nothing was said
    method: str  # dnpo, tso or sams
    config: dict
    results: dict
    metrics: list[dict]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def iterations(self) -> list[dict]:
        """The results of DNPO's iterations, the first of which is the start."""
        return self.results["iterations"]


class Kind(NamedTuple):
    """Runs that differ in their seed alone: a line, or a group of bars, in a figure."""

    name: str
    task: dict  # of SamS, else {}
    runs: list[Run]


ADVICE = "the run must be made again"  # where one of its files is damaged


def read_run(spec: str) -> Run:
    """The finished run in FOLDER, or in FOLDER of FOLDER=NAME, which gives it another name."""
    folder, _, name = spec.partition("=")
    path = Path(folder)
    for file in ("config.json", "results.json", "metrics.jsonl"):
        if not (path / file).is_file():
            job.die(
                f"{folder}: no finished run "
                "(config.json, results.json and metrics.jsonl are expected in it)"
            )

    config = job.read_json(path / "config.json", ADVICE)
    metrics = job.read_jsonl(path / "metrics.jsonl", advice=ADVICE)
    if not metrics:
        job.die(f"{path / 'metrics.jsonl'} is empty: no step has been trained")
    # a training that was made again stands behind the later ones
    metrics.sort(key=lambda line: (line.get("iteration", 0), line["step"]))
    methods = [method for mark, method in MARKS.items() if mark in config]
    if not methods:
        job.die(f"{folder}: not a run of dnpo.py, tso.py or sams.py")

    return Run(
        folder=path,
        name=name,
        method=methods[0],
        config=config,
        results=job.read_json(path / "results.json", ADVICE),
        metrics=metrics,
    )


def paper_name(run: Run) -> str:
    """What the paper calls a run with these settings."""
    config = run.config
    if run.method == "dnpo":
        if config["noise"] and config.get("noise_update") == "offset":
            return "SPIN + DSL + offset" if config["labels"] == "judge" else "SPIN + offset"
        if config["labels"] == "judge":
            return "DNPO" if config["noise"] else "SPIN + DSL"
        return "SPIN + NPO" if config["noise"] else "SPIN"

    if run.method == "tso":
        unclipped = config["clip_chosen"] == config["clip_rejected"] == math.inf
        return "DPO" if unclipped else "dual clip"

    name = SELECTORS[config["select"]]
    if config["preselect"] < 1:
        return f"Selective + {name}"
    return name


def settings_of(run: Run) -> dict:
    """The settings that runs of one kind have in common."""
    return {flag: value for flag, value in run.config.items() if flag not in ALIKE}


def task_of(run: Run) -> dict:
    """The settings that make the task on which SamS compares selectors; other methods have none."""
    if run.method != "sams":
        return {}
    return {flag: run.config.get(flag) for flag in TASK}


def alike(run: Run, other: Run) -> bool:
    """Whether two runs have one name, and one value of every setting that both of them have."""
    mine, others = settings_of(run), settings_of(other)
    names = run.name or paper_name(run), other.name or paper_name(other)
    return names[0] == names[1] and all(mine[flag] == others[flag] for flag in mine.keys() & others)


def gather_alike(runs: list[Run]) -> list[list[Run]]:
    """The runs of each kind.

    A run that was begun before a flag was there joins the only kind that it is like in all else;
    where there are several, which differ in that flag, it stays apart from them.
    """
    same = {}
    for run in runs:
        key = json.dumps([run.name, settings_of(run)], sort_keys=True)
        same.setdefault(key, []).append(run)

    together = []
    for members in sorted(same.values(), key=lambda some: len(settings_of(some[0])), reverse=True):
        fitting = [kind for kind in together if alike(members[0], kind[0])]
        if len(fitting) == 1:
            fitting[0].extend(members)
        else:
            together.append(members)
    return together


def group_runs(runs: list[Run]) -> list[Kind]:
    """Groups the runs of one method into kinds, the runs of a kind in the order of their seeds.

    Where the paper has one name for several kinds, all but the first say in which flags they
    differ from it.
    """
    kinds = []
    first_of_name = {}
    for members in gather_alike(runs):
        run = members[0]
        name = run.name or paper_name(run)
        task = task_of(run)
        settings = settings_of(run)
        first = first_of_name.setdefault(name, settings)

        words = [name]
        for flag in {**first, **settings}:
            value = settings.get(flag, "unknown")  # the run was begun before the flag was there
            if flag not in task and value != first.get(flag, "unknown"):
                shown = f"{value:g}" if isinstance(value, float) else value
                words.append(f"{flag} {shown}")
        members.sort(key=lambda member: member.seed)
        kinds.append(Kind(", ".join(words), task, members))
    return kinds


def by_task(kinds: list[Kind]) -> dict[str, list[Kind]]:
    """The kinds under the task that they share; a task is named by what differs between tasks."""
    differ = []
    for flag in TASK:
        values = {json.dumps(kind.task.get(flag)) for kind in kinds}
        if len(values) > 1:
            differ.append(flag)

    def values_of(kind: Kind) -> list[str]:
        return [str(kind.task.get(flag)) for flag in differ]

    tasks = {}
    for kind in sorted(kinds, key=values_of):
        title = ", ".join(f"{flag} {kind.task[flag]}" for flag in differ)
        tasks.setdefault(title, []).append(kind)
    return tasks


# ------------------------------------------------------------------------- what a run's files say


def iteration_values(run: Run, name: str) -> list[float] | None:
    """A number of results.json at every iteration, the start included; None if not measured."""
    values = [result.get(name) for result in run.iterations]
    if None in values:
        return None
    return values


def logp_samples(run: Run, iteration: int) -> dict[str, list[float]]:
    """DNPO Figs. 2 and 10: log pi under the model that an iteration has made, summed over tokens.

    It is that of the positives and the negatives it was trained on, and of its own new answers.
    """
    rows = job.read_jsonl(run.folder / f"iter{iteration}" / "logps.jsonl")
    return {
        "positive": [row["positive"] for row in rows],
        "negative": [row["negative"] for row in rows],
        "generated, next iteration": [row["new"] for row in rows],
    }


def held_out_scores(folder: Path) -> dict[str, float]:
    """The judge's score of each held-out prompt's answer, where it has one.

    The key is the row's id and a hash of its prompt: other data may have the same ids.
    folder: an iteration's or a slice's.
    """
    scores = {}
    for row in job.read_jsonl(folder / "test.jsonl"):
        if row["meta"]["score"] is not None:
            scores[f"{row['id']} {job.seed_of(row['prompt']):016x}"] = row["meta"]["score"]
    return scores


def outcomes(run: Run) -> dict[str, float]:
    """What a finished run is measured by at its end, for each held-out row by its key.

    For DNPO and TSO it is the judge's score of the answer, for SamS 1 where the chosen answer has
    the higher reward, else 0.
    """
    if run.method == "sams":
        rows = job.read_jsonl(run.folder / "held.jsonl")
        return {row["id"]: float(row["margin"] > 0) for row in rows}
    if run.method == "dnpo":
        return held_out_scores(run.folder / f"iter{run.iterations[-1]['iteration']}")
    last = run.results["slices"][-1]
    return held_out_scores(run.folder / f"round{last['round']}-slice{last['slice']}")


def duel(run: Run, other: Run) -> list[tuple[float, float, float]]:
    """DNPO Fig. 7: on how many of the held-out prompts run's answer scores higher than other's.

    Returns, for each iteration, the shares of wins, ties and losses; nothing at all if there is
    an iteration without scores.
    """
    shares = []
    for k in range(min(len(run.iterations), len(other.iterations))):
        mine = held_out_scores(run.folder / f"iter{k}")
        theirs = held_out_scores(other.folder / f"iter{k}")
        gaps = [mine[name] - theirs[name] for name in mine if name in theirs]
        if not gaps:
            return []

        wins = sum(gap > 0 for gap in gaps)
        ties = sum(gap == 0 for gap in gaps)
        losses = sum(gap < 0 for gap in gaps)
        shares.append((wins / len(gaps), ties / len(gaps), losses / len(gaps)))
    return shares


def iteration_means(run: Run, name: str) -> dict[int, float]:
    """The mean of a metric over the steps of each iteration that has it."""
    found = {}
    for step in steps_with(run, (name,)):
        found.setdefault(step["iteration"], []).append(step[name])
    return {iteration: sum(values) / len(values) for iteration, values in found.items()}


def steps_with(run: Run, names: tuple[str, ...]) -> list[dict]:
    """The steps of the whole run that have all these metrics."""
    return [step for step in run.metrics if all(name in step for name in names)]


def curves(run: Run, *names: str) -> list[list[float]]:
    """A curve for each of the metrics, over the steps of the whole run that have them all."""
    steps = steps_with(run, names)
    return [[step[name] for step in steps] for name in names]


def beginnings(run: Run, *names: str) -> list[int]:
    """The positions on such curves at which an iteration or a slice begins."""
    steps = steps_with(run, names)
    return [i for i, step in enumerate(steps) if step["step"] == 1]


def spreads(run: Run) -> dict[str, list[tuple[float, float]]]:
    """TSO Fig. 5: how the scores of each prompt's answers spread, before training and after it.

    Returns (skewness, kurtosis) of each prompt whose scores differ, for each of the two
    measurements that the run has made.
    """
    last = run.results["slices"][-1]
    places = {"before": "start", "after": f"round{last['round']}-slice{last['slice']}"}

    found = {}
    for when, place in places.items():
        file = run.folder / place / "spread.jsonl"
        if not file.exists():
            continue
        rows = [row for row in job.read_jsonl(file) if row["skewness"] is not None]
        found[when] = [(row["skewness"], row["kurtosis"]) for row in rows]
    return found


WINDOW = 10  # updates


def flipped_selected(run: Run, window: int = WINDOW) -> list[float]:
    """The share of the flipped pairs that were selected, after every update.

    It counts the batches of the last `window` updates, and is nan before the first flipped pair.
    """
    seen = np.cumsum([0] + [step["batch/flipped"] for step in run.metrics])
    taken = np.cumsum([0] + [step["selected/flipped"] for step in run.metrics])
    ends = np.arange(1, len(seen))
    starts = np.maximum(0, ends - window)

    seen = seen[ends] - seen[starts]
    taken = taken[ends] - taken[starts]
    shares = taken / np.maximum(seen, 1)
    return np.where(seen > 0, shares, np.nan).tolist()


def mean_of(run: Run, name: str) -> float:
    """The mean of a metric over the run's steps."""
    return sum(step[name] for step in run.metrics) / len(run.metrics)


def costs(run: Run) -> dict[str, float]:
    """What an update costs: seconds of its parts, and the run's peak memory in GiB.

    The parts are the scoring pass, the selector, and the rest: training, held-out measurements.
    Of a run that was resumed the whole is timed since then, the two parts over all of its steps.
    """
    whole = mean_of(run, "batch/pairs") / run.metrics[-1]["pairs_per_second"]
    score = mean_of(run, "score_seconds")
    select = mean_of(run, "selector/seconds")
    return {
        "score": score,
        "select": select,
        "train": whole - score - select,
        "memory": max(step["memory_gib"] for step in run.metrics),
    }


# ------------------------------------------------------------------------- drawing

COLORS = ["#000000", "#0b62a4", "#c8501e", "#2f8f5b", "#7b5aa6", "#8a8a8a", "#b59a00", "#d0679d"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
MARKERS = "os^Dv*PX"

# Of bars; a stack has three parts.
OUTLINE = {"edgecolor": "black", "linewidth": 0.6}
FILLS = ["#4c4c4c", "#b4b4b4", "#f4f4f4"]
HATCHES = ["", "///", "..."]

# Of TSO's scores, before the training and after it.
POINTS = [
    {"marker": "o", "facecolor": "none", "edgecolor": COLORS[0]},
    {"marker": "x", "facecolor": COLORS[2]},
]

STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "evaluate",  # the same runs make the same bytes
    "svg.fonttype": "path",
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}


class Drawn(NamedTuple):
    """A figure with the name of its files, and what it says in numbers, as rows of a table."""

    name: str
    figure: object
    numbers: list[dict]


def pyplot():
    """matplotlib's pyplot with the figures' style, without a display."""
    try:
        import matplotlib
    except ImportError:
        job.die("--figures needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    import matplotlib.pyplot as plt

    return plt


def panels(n: int, width: float = 3.4, height: float = 2.7, columns: int = 4, **more):
    """A figure with n panels, at most `columns` side by side; returns it and the list of its axes.

    width and height are those of one panel, in inches.
    """
    across = min(n, columns)
    down = math.ceil(n / across)
    figure, axes = pyplot().subplots(
        down,
        across,
        figsize=(width * across, height * down),
        squeeze=False,
        layout="constrained",
        **more,
    )
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:n])


def label(figure, axes: list, x: str, y: str):
    """Names the axes of panels side by side, x under each and y beside the first, and the lines."""
    axes[0].set_ylabel(y)
    for ax in axes:
        ax.set_xlabel(x)
    legend(figure, axes)


def legend(figure, axes: list):
    """One legend for all panels, under them, where it hides nothing: each name once."""
    handle_of = {}
    for ax in axes:
        handles, names = ax.get_legend_handles_labels()
        for name, handle in zip(names, handles):
            handle_of.setdefault(name, handle)
    names = list(handle_of)
    inches = 0.6 + 0.07 * max(len(name) for name in names)
    fitting = int(figure.get_figwidth() / inches)
    columns = max(1, min(len(names), fitting))
    figure.legend(handle_of.values(), names, loc="outside lower center", ncols=columns)


def look(i: int) -> dict:
    """Color, dashes and marker of a figure's line number i."""
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markerfacecolor": "white",
    }


def line(ax, i: int, name: str, x, mean, deviation):
    """Line number i: the means over whole numbers x, with a band of one standard deviation.

    One point alone has a vertical line in the place of a band.
    """
    some = max(1, len(mean) // 8)
    ax.plot(x, mean, label=name, markevery=some, **look(i))
    low, high = mean - deviation, mean + deviation
    if len(mean) == 1:
        ax.vlines(x, low, high, color=look(i)["color"])
    elif np.any(deviation > 0):
        ax.fill_between(x, low, high, color=look(i)["color"], alpha=0.15, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def mark(ax, positions: list[int]):
    """Dotted lines where an iteration or a slice begins: a new reference, rewards 0."""
    for x in positions[1:]:
        ax.axvline(x + 0.5, color="#999999", linestyle=(0, (1, 2)), linewidth=0.9)


def stack(ax, names: list[str], parts: dict[str, np.ndarray], digits: str = "{:.0f}"):
    """Stacked bars of parts {name: [bars]}; each part's number stands in it where it fits."""
    box = {"pad": 1, "facecolor": "white", "edgecolor": "none"}
    centered = {"ha": "center", "va": "center", "fontsize": 7.5}
    bottom = np.zeros(len(names))
    top = max(sum(parts.values()))
    for i, (part, heights) in enumerate(parts.items()):
        fill = {"color": FILLS[i], "hatch": HATCHES[i]}
        ax.bar(names, heights, 0.7, bottom, label=part, **fill, **OUTLINE)
        for k, height in enumerate(heights):
            if height > 0.08 * top:
                middle = bottom[k] + height / 2
                ax.text(k, middle, digits.format(height), bbox=box, **centered)
        bottom = bottom + heights
    ax.set_ylim(0, 1.02 * top)
    turn_names(ax, names)


def bars(ax, names: list[str], mean, deviation, digits: str):
    """Bars with error bars, the number above each. mean, deviation: [bars]."""
    mean = np.asarray(mean)
    deviation = np.asarray(deviation)
    errors = deviation if np.any(deviation > 0) else None
    ax.bar(names, mean, 0.65, yerr=errors, capsize=3, color=FILLS[1], **OUTLINE)
    tops = mean + deviation
    for k, value in enumerate(mean):
        above = tops[k] + 0.01 * max(mean)
        ax.text(k, above, digits.format(value), ha="center", va="bottom", fontsize=7.5)
    ax.set_ylim(0, 1.12 * max(tops))
    turn_names(ax, names)


def turn_names(ax, names: list[str]):
    """Writes names under bars, broken at commas, and turned where there are many long ones."""
    broken = [name.replace(", ", "\n") for name in names]
    longest = max(len(name) for name in names)
    places = range(len(names))
    if len(names) > 4 and longest > 4:
        ax.set_xticks(places, broken, rotation=35, ha="right")
    else:
        ax.set_xticks(places, broken, rotation=0, ha="center")


# ------------------------------------------------------------------------- DNPO


def dnpo_figures(kinds: list[Kind]):
    """DNPO's Figs. 1, 2/10, 5, 7, 8, 9 and what the noise does, if the runs have the data."""
    judged = [kind for kind in kinds if is_judged(kind)]
    if judged:
        yield dnpo_win_rate(judged)
        yield dnpo_score(judged)
    if any(paper_name(kind.runs[0]) in ABLATION for kind in judged):
        yield dnpo_ablation(judged)

    for kind in kinds:
        yield dnpo_log_probs(kind)

    duels = duels_with_spin(judged)
    if duels:
        yield dnpo_against_spin(duels)

    noisy = [kind for kind in kinds if has_noise(kind)]
    if noisy:
        yield dnpo_losses(noisy)
        yield dnpo_noise(kinds)


def is_judged(kind: Kind) -> bool:
    """Whether a judge has scored every iteration of every run."""
    return all(iteration_values(run, "score") for run in kind.runs)


def has_noise(kind: Kind) -> bool:
    """Whether every run has steps that train a noise head."""
    return all(steps_with(run, ("loss", "noise/loss")) for run in kind.runs)


def by_iteration(kinds: list[Kind], key: str) -> list[dict]:
    """Mean and deviation of a number of results.json, a row for each kind and iteration."""
    numbers = []
    for kind in kinds:
        mean, deviation = band([iteration_values(run, key) for run in kind.runs])
        for k in range(len(mean)):
            numbers.append({"runs": kind.name, "iteration": k, key: mean[k], "std": deviation[k]})
    return numbers


def percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]


def dnpo_win_rate(judged: list[Kind]) -> Drawn:
    """Fig. 1: how often generated answers win, tie and lose against the annotated ones."""
    parts = {"generated wins": "win", "generated ties": "tie", "generated loses": "loss"}
    figure, axes = panels(len(judged), sharey=True)
    for ax, kind in zip(axes, judged):
        shares = {}
        for part, key in parts.items():
            shares[part], _ = band([percent(iteration_values(run, key)) for run in kind.runs])
        iterations = range(len(shares["generated wins"]))
        stack(ax, [str(k) for k in iterations], shares)
        ax.set_title(kind.name)

    label(figure, axes, "Iteration", "Share of held-out prompts (%)")
    return Drawn("dnpo-fig1-win-rate", figure, by_iteration(judged, "win"))


def dnpo_score(judged: list[Kind]) -> Drawn:
    """Fig. 5: the average score of the answers, iteration by iteration."""
    figure, (ax,) = panels(1, 4.2, 3.2)
    for i, kind in enumerate(judged):
        mean, deviation = band([iteration_values(run, "score") for run in kind.runs])
        line(ax, i, kind.name, range(len(mean)), mean, deviation)

    label(figure, [ax], "Iteration", "Average score")
    return Drawn("dnpo-fig5-score", figure, by_iteration(judged, "score"))


ABLATION = ("SPIN", "SPIN + NPO", "SPIN + DSL", "DNPO")


def dnpo_ablation(judged: list[Kind]) -> Drawn:
    """Fig. 8: the average score after the last iteration, with and without DSL and NPO."""
    numbers = []
    for paper in ABLATION:
        for kind in judged:
            if paper_name(kind.runs[0]) != paper:
                continue
            mean, deviation = band([iteration_values(run, "score")[-1:] for run in kind.runs])
            numbers.append({"runs": kind.name, "score": mean[0], "std": deviation[0]})

    figure, (ax,) = panels(1, 0.9 * len(judged) + 1.6, 2.9)
    names = [row["runs"] for row in numbers]
    scores = [row["score"] for row in numbers]
    deviations = [row["std"] for row in numbers]
    bars(ax, names, scores, deviations, "{:.2f}")
    ax.set_ylabel("Average score, last iteration")
    return Drawn("dnpo-fig8-ablation", figure, numbers)


def dnpo_log_probs(kind: Kind) -> Drawn:
    """Fig. 2 (SPIN) or 10: log pi of positives, negatives and new answers, a panel an iteration."""
    last = min(len(run.iterations) for run in kind.runs)
    figure, axes = panels(last - 1, 2.9)
    numbers = []
    for k, ax in enumerate(axes, 1):
        samples = {}
        for run in kind.runs:
            for part, values in logp_samples(run, k).items():
                samples.setdefault(part, []).extend(values)
        edges, shares = histogram(samples)
        for i, (part, share) in enumerate(shares.items()):
            style = {"color": COLORS[i], "linestyle": DASHES[i], "linewidth": 1.3}
            ax.stairs(100 * share, edges, label=part, baseline=None, **style)

        new = samples["generated, next iteration"]
        to_negative = ks_distance(new, samples["negative"])
        to_positive = ks_distance(new, samples["positive"])
        distances = f"KS to negatives {to_negative:.2f}, positives {to_positive:.2f}"
        ax.set_title(f"iteration {k}\n{distances}")
        numbers.append(
            {
                "runs": kind.name,
                "iteration": k,
                "KS generated / negative": to_negative,
                "KS generated / positive": to_positive,
            }
        )

    figure.suptitle(kind.name, fontsize=10)
    label(figure, axes, "Log probability", "Share (%)")
    number = 2 if paper_name(kind.runs[0]) == "SPIN" else 10
    return Drawn(f"dnpo-fig{number}-log-probs-{slug(kind.name)}", figure, numbers)


def duels_with_spin(judged: list[Kind]) -> list[tuple[str, list]]:
    """The duels of each kind's runs with the SPIN run of the same seed: (kind's name, duels)."""
    spins = [kind for kind in judged if paper_name(kind.runs[0]) == "SPIN"]
    if not spins:
        return []
    spin = spins[0]
    opponents = {run.seed: run for run in spin.runs}

    found = []
    for kind in judged:
        if kind is spin:
            continue
        runs = [run for run in kind.runs if run.seed in opponents]
        duels = [duel(run, opponents[run.seed]) for run in runs]
        duels = [shares for shares in duels if shares]
        if duels:
            found.append((kind.name, duels))
    return found


def dnpo_against_spin(duels: list[tuple[str, list]]) -> Drawn:
    """Fig. 7: how often the answers win, tie and lose against those of SPIN."""
    figure, axes = panels(len(duels), sharey=True)
    numbers = []
    for ax, (name, found) in zip(axes, duels):
        shares = {}
        for i, word in enumerate(("win", "tie", "loss")):
            shares[word], _ = band([[100 * row[i] for row in run] for run in found])
        iterations = range(len(shares["tie"]))
        stack(ax, [str(k) for k in iterations], shares)

        gap, _ = band([[win - loss for win, _, loss in run] for run in found])
        at_end = f"win–loss gap at the end {100 * gap[-1]:+.1f} points"
        ax.set_title(f"{name} against SPIN\n{at_end}")
        for k in iterations:
            numbers.append({"runs": name, "iteration": k, "gap to SPIN": gap[k]})

    label(figure, axes, "Iteration", "Share of held-out prompts (%)")
    return Drawn("dnpo-fig7-against-spin", figure, numbers)


def dnpo_losses(noisy: list[Kind]) -> Drawn:
    """Fig. 9: the losses of model and noise head over the steps that train both."""
    metrics = ("loss", "noise/loss")
    names = ("model loss", "noise loss")
    figure, axes = panels(len(noisy), 3.8)
    numbers = []
    for ax, kind in zip(axes, noisy):
        found = [curves(run, *metrics) for run in kind.runs]
        for i, name in enumerate(names):
            mean, deviation = band([losses[i] for losses in found])
            line(ax, i, name, range(1, len(mean) + 1), mean, deviation)
        mark(ax, beginnings(kind.runs[0], *metrics))
        ax.set_title(kind.name)

        mean, _ = band([model_loss[-1:] for model_loss, _ in found])
        numbers.append({"runs": kind.name, "model loss at the end": mean[0]})

    label(figure, axes, "Step", "Loss")
    return Drawn("dnpo-fig9-losses", figure, numbers)


# What the noise does to the pairs: metrics of dnpo.py, and what they are called in the figure.
NOISE = {
    "noise/drop_margin": "Fall of the margin by the noise",
    "weights/mean": "Mean weight σ(−m) of a pair",
    "weights/spread": "Std / mean of the weights",
}


def dnpo_noise(kinds: list[Kind]) -> Drawn:
    """What the noise does, iteration by iteration: its size, the pairs' weights, and the score."""
    figure, axes = panels(1 + len(NOISE), 3.2)
    numbers = []
    for i, kind in enumerate(kinds):
        measured = {}
        for name, quantity in NOISE.items():
            measured[quantity] = [iteration_means(run, name) for run in kind.runs]
        measured["Average score"] = []
        if is_judged(kind):
            scores = [iteration_values(run, "score") for run in kind.runs]
            measured["Average score"] = [dict(enumerate(values)) for values in scores]

        for ax, (quantity, found) in zip(axes, measured.items()):
            ax.set(title=quantity, xlabel="Iteration")
            if not found or not all(found):
                continue
            mean, deviation = band([list(values.values()) for values in found])
            iterations = list(found[0])[: len(mean)]
            line(ax, i, kind.name, iterations, mean, deviation)
            for k, iteration in enumerate(iterations):
                row = {"runs": kind.name, "iteration": iteration, "quantity": quantity}
                numbers.append({**row, "mean": mean[k], "std": deviation[k]})

    legend(figure, axes)
    return Drawn("dnpo-noise", figure, numbers)


# ------------------------------------------------------------------------- TSO


def tso_figures(kinds: list[Kind]):
    """TSO's Figs. 3 and 4 together, and 5 if the scores' spread was measured."""
    plain = [kind for kind in kinds if paper_name(kind.runs[0]) == "DPO"]
    clipped = [kind for kind in kinds if paper_name(kind.runs[0]) != "DPO"]
    order = plain + clipped
    yield tso_rewards(order)

    measured = []
    for kind in order:
        found = [spreads(run) for run in kind.runs]
        if all(found):
            measured.append((kind.name, found))
    if measured:
        yield tso_scores(measured)


def tso_rewards(kinds: list[Kind]) -> Drawn:
    """Figs. 3 and 4: rewards of both sides, with DPO's loss and with the dual-clip loss."""
    sides = {"chosen": "positive responses", "rejected": "negative responses"}
    figure, axes = panels(len(kinds), 3.8, sharey=True)
    numbers = []
    for ax, kind in zip(axes, kinds):
        for i, (side, name) in enumerate(sides.items()):
            rewards = [curves(run, f"rewards/{side}")[0] for run in kind.runs]
            mean, deviation = band(rewards)
            line(ax, i, name, range(1, len(mean) + 1), mean, deviation)
            numbers.append({"runs": kind.name, "reward of": side, "at the end": mean[-1]})
        mark(ax, beginnings(kind.runs[0], "rewards/chosen"))
        number = 3 if paper_name(kind.runs[0]) == "DPO" else 4
        ax.set_title(f"Fig. {number}: {kind.name}")

    label(figure, axes, "Step", "Reward")
    return Drawn("tso-fig3-fig4-rewards", figure, numbers)


def tso_scores(measured: list[tuple[str, list]]) -> Drawn:
    """Fig. 5: skewness and kurtosis of the scores of each prompt's answers, a point a prompt."""
    figure, axes = panels(len(measured), 3.4, 3.2, sharex=True, sharey=True)
    numbers = []
    for ax, (kind_name, found) in zip(axes, measured):
        for i, when in enumerate(found[0]):
            points = []
            for spread in found:
                points.extend(spread[when])
            ax.scatter(
                [skewness for skewness, _ in points],
                [kurtosis for _, kurtosis in points],
                16,
                linewidth=0.8,
                label=f"{when} training",
                rasterized=True,
                **POINTS[i],
            )
            numbers.append({"runs": kind_name, "when": when, "prompts": len(points)})
        ax.set_title(kind_name)

    label(figure, axes, "delta (skewness)", "kurtosis_val")
    return Drawn("tso-fig5-scores", figure, numbers)


# ------------------------------------------------------------------------- SamS


def sams_figures(kinds: list[Kind]):
    """SamS: held-out accuracy over updates, flipped pairs that are selected, time and memory."""
    tasks = by_task(kinds)
    names = list(dict.fromkeys(kind.name for kind in kinds))
    yield sams_over_updates("sams-accuracy", "Test accuracy", tasks, names, accuracies)

    flipped = tasks_with_flips(tasks)
    if flipped:
        quantity = f"Flipped pairs selected in {WINDOW} updates"
        yield sams_over_updates("sams-flipped", quantity, flipped, names, flipped_shares)

    yield sams_cost(kinds, names)


def accuracies(run: Run) -> tuple[list[int], list[float]]:
    """The updates after which the held-out accuracy was measured, and the accuracies."""
    accuracy, steps = curves(run, "eval/accuracy", "step")
    return steps, accuracy


def flipped_shares(run: Run) -> tuple[range, list[float]]:
    """All updates, and the share of flipped pairs selected in the last WINDOW of them, at each."""
    shares = flipped_selected(run)
    return range(1, len(shares) + 1), shares


def tasks_with_flips(tasks: dict[str, list[Kind]]) -> dict[str, list[Kind]]:
    """The tasks with flipped pairs, and the kinds that select; DPO takes all pairs."""
    found = {}
    for task, kinds in tasks.items():
        selecting = [kind for kind in kinds if kind.runs[0].config["select"] != "all"]
        if kinds[0].task["flip"] and selecting:
            found[task] = selecting
    return found


def sams_over_updates(
    file: str, quantity: str, tasks: dict[str, list[Kind]], names: list[str], measure
) -> Drawn:
    """A panel for each task with a line for each kind of run.

    measure(run) gives updates [T] and the quantity's values [T]; names has the kinds of all tasks,
    so that a kind looks the same in all panels. The numbers are those of the last update.
    """
    figure, axes = panels(len(tasks), 3.6, 2.9, 3, sharey=True)
    numbers = []
    for ax, (task, kinds) in zip(axes, tasks.items()):
        for kind in kinds:
            updates, _ = measure(kind.runs[0])
            mean, deviation = band([percent(measure(run)[1]) for run in kind.runs])
            line(ax, names.index(kind.name), kind.name, updates[: len(mean)], mean, deviation)
            numbers.append(
                {
                    "runs": kind.name,
                    "task": task,
                    quantity: mean[-1],
                    "std": deviation[-1],
                    "seeds": len(kind.runs),
                }
            )
        ax.set(xlabel="Updates", title=task)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"{quantity} (%)")

    legend(figure, axes)
    return Drawn(file, figure, numbers)


def sams_cost(kinds: list[Kind], names: list[str]) -> Drawn:
    """Seconds of an update by its parts, and peak memory, over all tasks."""
    spent = {name: [] for name in names}
    for kind in kinds:
        spent[kind.name].extend(costs(run) for run in kind.runs)

    def means(key: str) -> np.ndarray:
        return np.array([np.mean([cost[key] for cost in spent[name]]) for name in names])

    seconds = {"training": means("train"), "scoring pass": means("score")}
    seconds["selector"] = means("select")
    whole = sum(seconds.values())
    bands = [band([[cost["memory"]] for cost in spent[name]]) for name in names]
    memory = [mean[0] for mean, _ in bands]
    deviations = [deviation[0] for _, deviation in bands]

    figure, (left, right) = panels(2, 0.55 * len(names) + 2.2, 3.1)
    stack(left, names, seconds, "{:.2f}")
    bars(right, names, memory, deviations, "{:.2f}")
    left.set_ylabel("Seconds per update")
    right.set_ylabel("Peak memory (GiB)")
    legend(figure, [left])

    numbers = []
    for i, name in enumerate(names):
        numbers.append({"runs": name, "seconds per update": whole[i], "memory": memory[i]})
    return Drawn("sams-cost", figure, numbers)


# ------------------------------------------------------------------------- bench.py's sweep

SWEEP_AXES = {
    "length": "Tokens of a sequence",
    "pairs": "Pairs of a step",
    "chunk": "Response tokens of a chunk",
    "ranks": "Ranks that share the step (FSDP)",
}


def sweep_figure(files: list[Path]) -> Drawn:
    """bench.py --sweep: seconds (above) and peak memory (below) of a step.

    Both are drawn against sequence length, pairs, the head's chunk and ranks, whichever the files
    have.
    """
    sweeps = {}
    for file in files:
        try:
            found = json.loads(file.read_text())["sweep"]
        except (OSError, ValueError, LookupError, TypeError):
            found = None
        if not isinstance(found, dict) or not found or found.keys() - SWEEP_AXES.keys():
            job.die(f"{file}: no sweep of bench.py")
        for axis in found.keys() & sweeps.keys():
            job.die(f"{file}: a second sweep of {axis}")
        sweeps.update(found)

    figure, axes = panels(2 * len(sweeps), 3.2, 2.6, len(sweeps), sharey="row")
    above = axes[: len(sweeps)]
    below = axes[len(sweeps) :]
    above[0].set_ylabel("Seconds")
    below[0].set_ylabel("Peak memory (MiB)")
    numbers = []
    methods = []  # of all axes, so that a method looks the same in all panels
    for points in sweeps.values():
        for row in points.values():
            methods.extend(row)
    methods = list(dict.fromkeys(methods))
    for k, (axis, points) in enumerate(sweeps.items()):
        values = [int(value) for value in points]
        rows = list(points.values())  # of each value: {method: its costs}
        for method in rows[0]:
            i = methods.index(method)
            measured = [row[method] for row in rows]
            seconds = [cost["seconds"] for cost in measured]
            memory = [cost["peak_mib"] or math.nan for cost in measured]  # None: not known
            above[k].plot(values, seconds, label=method, **look(i))
            below[k].plot(values, memory, label=method, **look(i))
            for value, cost in zip(values, measured):
                numbers.append(
                    {
                        "axis": axis,
                        "value": value,
                        "row": method,
                        "seconds": cost["seconds"],
                        "peak_mib": cost["peak_mib"],
                    }
                )
        known = any(cost["peak_mib"] for row in rows for cost in row.values())
        below[k].set_visible(known)
        for ax in [above[k], below[k]] if known else [above[k]]:
            ax.set_xlabel(SWEEP_AXES[axis])
            scale(ax, values)

    legend(figure, above)
    return Drawn("bench-sweep", figure, numbers)


def scale(ax, values: list[int]):
    """Logarithmic scales, with a tick at each of the values and at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import LogLocator

    ax.set(xscale="log", yscale="log")
    ax.set_xticks(values, [str(value) for value in values])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


# ------------------------------------------------------------------------- all that can be drawn


def slug(name: str) -> str:
    """A name as part of a file's name: its letters and digits, with hyphens between the words."""
    words = "".join(x if x.isalnum() else " " for x in name.lower())
    return "-".join(words.split())


def every_figure(sweeps: list[Path], runs: list[Run]):
    """Yields the figures that the files and the runs have the data for, one after another."""
    if sweeps:
        yield sweep_figure(sweeps)
    figures_of = {"dnpo": dnpo_figures, "tso": tso_figures, "sams": sams_figures}
    for method, figures in figures_of.items():
        some = [run for run in runs if run.method == method]
        if some:
            yield from figures(group_runs(some))


def save(figure, out: Path, name: str):
    """Writes a figure as SVG and PNG; a kill leaves the old files."""
    formats = {"svg": {"Date": None}, "png": None}
    for kind, metadata in formats.items():
        temporary = out / f"{name}.{kind}.tmp"
        figure.savefig(temporary, format=kind, metadata=metadata)
        os.replace(temporary, out / f"{name}.{kind}")


def draw(folders: list[str], out: Path):
    """All figures that the runs have the data for, each as SVG and PNG, in the folder `out`.

    Their numbers are printed as tables and written to figures.json, which keeps those of figures
    that are not drawn now. Among the folders may be files of bench.py's sweeps.
    """
    sweeps = [Path(spec) for spec in dict.fromkeys(folders) if spec.endswith(".json")]
    runs = {}
    for spec in folders:
        if not spec.endswith(".json"):
            run = read_run(spec)
            runs[run.folder.resolve(), run.name] = run  # a folder that is named twice counts once
    plt = pyplot()
    out.mkdir(parents=True, exist_ok=True)

    file = out / "figures.json"
    written = job.read_json(file, "delete it") if file.exists() else {}
    for name, figure, numbers in every_figure(sweeps, list(runs.values())):
        save(figure, out, name)
        plt.close(figure)
        written[name] = numbers
        print(f"{out / name}.svg, .png")
        print(job.table(numbers, list(numbers[0])), end="\n\n")
    job.write_atomic(file, json.dumps(written, indent=1))
