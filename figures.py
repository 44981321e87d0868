"""The papers' figures, from finished runs alone: `python evaluate.py --figures runs/...`. No model is loaded.

Runs that differ in their seed alone are one line with a band. What a figure shows is computed by a function of its own, apart from the drawing.
"""
from __future__ import annotations

import itertools
import json
import operator
import os
from pathlib import Path

import numpy as np

from common import die, read_jsonl, table, write_atomic


# ---------------------------------------------------------------- statistics


def ks_distance(a, b) -> float:
    """Kolmogorov-Smirnov: the largest distance between two samples' distribution functions, max_x |F_a(x) - F_b(x)|. [n], [m] -> 0..1."""
    a, b = np.sort(a), np.sort(b)
    x = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(a, x, "right") / len(a) - np.searchsorted(b, x, "right") / len(b)).max())


def histogram(samples: dict[str, list], bins: int = 24) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Shares of each sample in the same bins, from the 1st to the 99th percentile of all; what lies outside is counted in the outer bins.
    -> edges [bins + 1], {name: [bins]}, which sum to 1."""
    low, high = np.percentile(np.concatenate([*samples.values()]), [1, 99])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    return edges, {name: np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] / len(x) for name, x in samples.items()}


def band(curves: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1) over R runs [R][T], cut to the shortest -> [T], [T]; deviation 0 of a single run."""
    x = np.array([curve[:min(map(len, curves))] for curve in curves], float)
    return x.mean(0), x.std(0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])


# ---------------------------------------------------------------- what the figures show, from a run's files

ALIKE = {"seed", "out", "resume", "overwrite", "parallel", "micro_batch", "save_every", "reference", "dry_run", "export_pairs"}  # what runs of one kind may differ in
TASK = ("model", "data", "test", "limit", "flip", "epochs", "max_steps", "batch", "lr", "beta")  # SamS: selectors are compared on the same task; each task has a panel


def read_run(spec: str) -> dict:
    """FOLDER or FOLDER=NAME of a finished run -> {"folder", "name", "method", "config", "results", "metrics"}; which method it was its config's fields tell."""
    folder, _, name = spec.partition("=")
    path = Path(folder)
    if any(not (path / name).is_file() for name in ("config.json", "results.json", "metrics.jsonl")):
        die(f"{folder}: no finished run (config.json, results.json and metrics.jsonl are expected in it)")
    config = json.loads((path / "config.json").read_text())
    method = next((method for mark, method in (("noise_init", "dnpo"), ("clip_chosen", "tso"), ("selector_lr", "sams")) if mark in config), None)
    return {"folder": path, "name": name, "method": method or die(f"{folder}: not a run of dnpo.py, tso.py or sams.py"), "config": config,
            "results": json.loads((path / "results.json").read_text()), "metrics": read_jsonl(path / "metrics.jsonl")}


def paper_name(run: dict) -> str:
    """What the paper calls it."""
    method, config = run["method"], run["config"]
    if method == "dnpo":
        return {(True, True): "DNPO", (True, False): "SPIN + DSL", (False, True): "SPIN + NPO", (False, False): "SPIN"}[config["labels"] == "judge", config["noise"]]
    if method == "tso":
        return "DPO" if config["clip_chosen"] == config["clip_rejected"] == float("inf") else "dual clip"
    name = {"topk": "SamS", "sample": "SamS, sampled", "all": "DPO", "random": "random", "margin": "highest margin", "oracle": "oracle"}[config["select"]]
    return f"Selective + {name}" if config["preselect"] < 1 else name


def group_runs(runs: list[dict]) -> list[tuple[str, dict, list[dict]]]:
    """Runs of one method -> (name, task, runs that differ in their seed alone) of each kind. Kinds that the paper's name can't tell apart say in which flags they differ
    from the first of that name."""
    same = lambda run: {k: v for k, v in run["config"].items() if k not in ALIKE}
    task = lambda run: {k: run["config"].get(k) for k in TASK if run["method"] == "sams"}
    kinds, first = {}, {}
    for run in runs:
        kinds.setdefault(json.dumps([run["name"], same(run)], sort_keys=True), []).append(run)
    out = []
    for members in kinds.values():
        name, own = members[0]["name"] or paper_name(members[0]), same(members[0])
        base = first.setdefault(name, own)
        more = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in own.items() if k not in task(members[0]) and v != base.get(k)]
        out.append((", ".join([name, *more]), task(members[0]), sorted(members, key=lambda run: run["config"]["seed"])))
    return out


def by_task(groups: list[tuple]) -> dict[str, list[tuple]]:
    """Groups under the task that they share, named by what differs between tasks."""
    differ = [k for k in TASK if len({json.dumps(task.get(k)) for _, task, _ in groups}) > 1]
    out = {}
    for group in sorted(groups, key=lambda g: [str(g[1].get(k)) for k in differ]):
        out.setdefault(", ".join(f"{k} {group[1][k]}" for k in differ), []).append(group)
    return out


def iteration_values(run: dict, name: str) -> list[float] | None:
    """A number of results.json for every iteration, from the start; None if it was not measured."""
    values = [result.get(name) for result in run["results"]["iterations"]]
    return None if None in values else values


def logp_samples(run: dict, iteration: int) -> dict[str, list[float]]:
    """DNPO Figs. 2 and 10, of the model that an iteration has made: log pi of the positives and negatives it was trained on and of its own new answers (sums over tokens)."""
    rows = read_jsonl(run["folder"] / f"iter{iteration}" / "logps.jsonl")
    return {name: [row[key] for row in rows] for name, key in (("positive", "positive"), ("negative", "negative"), ("generated, next iteration", "new"))}


def duel(run: dict, other: dict) -> list[tuple[float, float, float]]:
    """DNPO Fig. 7: shares of held-out prompts on which run's answer has the higher, the same and the lower score than other's, per iteration."""
    out = []
    for k in range(min(len(run["results"]["iterations"]), len(other["results"]["iterations"]))):
        mine, theirs = ({row["id"]: row["meta"]["score"] for row in read_jsonl(r["folder"] / f"iter{k}" / "test.jsonl")} for r in (run, other))
        both = [(mine[i], theirs[i]) for i in mine if i in theirs and None not in (mine[i], theirs[i])]
        if not both:
            return []
        out.append(tuple(sum(test(s, t) for s, t in both) / len(both) for test in (operator.gt, operator.eq, operator.lt)))
    return out


def curves(run: dict, *names: str) -> tuple[list[list[float]], list[int]]:
    """Metrics over the steps of the whole run that have them all, and where its iterations or slices begin. -> [len(names)][steps], positions."""
    steps = [m for m in run["metrics"] if all(name in m for name in names)]
    return [[m[name] for m in steps] for name in names], [i for i, m in enumerate(steps) if m["step"] == 1]


def spreads(run: dict) -> dict[str, list[tuple[float, float]]]:
    """TSO Fig. 5: (skewness, kurtosis) of the scores of each prompt's answers, before the training and after it."""
    last = run["results"]["slices"][-1]
    files = {"before": run["folder"] / "start" / "spread.jsonl", "after": run["folder"] / f"round{last['round']}-slice{last['slice']}" / "spread.jsonl"}
    return {name: [(row["skewness"], row["kurtosis"]) for row in read_jsonl(file) if row["skewness"] is not None] for name, file in files.items() if file.exists()}


def flipped_selected(run: dict, window: int = 10) -> list[float]:
    """Share of the flipped pairs of the last `window` updates' batches that were selected, after every update; nan before the first flipped pair."""
    seen, taken = (np.cumsum([0] + [m[f"{name}/flipped"] for m in run["metrics"]]) for name in ("batch", "selected"))
    ends = np.arange(1, len(seen))
    starts = np.maximum(0, ends - window)
    count = seen[ends] - seen[starts]
    return np.where(count > 0, (taken[ends] - taken[starts]) / np.maximum(count, 1), np.nan).tolist()


def costs(run: dict) -> dict[str, float]:
    """Seconds per update: scoring pass, selector, and the rest (training, held-out measurements); and peak memory in GiB."""
    steps = run["metrics"]
    mean = lambda name: sum(m[name] for m in steps) / len(steps)
    whole = mean("batch/pairs") / steps[-1]["pairs_per_second"]
    return {"score": mean("score_seconds"), "select": mean("selector/seconds"), "train": whole - mean("score_seconds") - mean("selector/seconds"),
            "memory": max(m["memory_gib"] for m in steps)}


# ---------------------------------------------------------------- drawing

COLORS, DASHES, MARKERS = ["#000000", "#0b62a4", "#c8501e", "#2f8f5b", "#7b5aa6", "#8a8a8a", "#b59a00", "#d0679d"], ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))], "os^Dv*PX"
FILLS, HATCHES = ["#4c4c4c", "#b4b4b4", "#f4f4f4"], ["", "///", "..."]  # of stacked bars, which have three parts


def pyplot():
    """matplotlib with the figures' style, without a display."""
    try:
        import matplotlib
    except ImportError:
        die("--figures needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
                                "grid.color": "#dddddd", "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8, "hatch.linewidth": 0.6, "svg.hashsalt": "evaluate",
                                "svg.fonttype": "path", "lines.linewidth": 1.4, "lines.markersize": 4.5})
    import matplotlib.pyplot as plt
    return plt


def panels(n: int, width: float = 3.4, height: float = 2.7, columns: int = 4, **more):
    """A figure with n panels, `columns` side by side -> figure, list of axes."""
    across = min(n, columns)
    figure, axes = pyplot().subplots(-(-n // across), across, figsize=(width * across, height * -(-n // across)), squeeze=False, layout="constrained", **more)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:n])


def legend(figure, ax):
    """One legend for all panels, under them: it hides nothing."""
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, min(len(names), int(figure.get_figwidth() / (0.6 + 0.07 * max(map(len, names)))))))


def line(ax, i: int, name: str, x, mean, deviation):
    """A mean line over whole numbers x with a band of one standard deviation; color, dashes and marker i."""
    ax.plot(x, mean, color=COLORS[i % 8], linestyle=DASHES[i % 6], marker=MARKERS[i % 8], markevery=max(1, len(mean) // 8), markerfacecolor="white", label=name)
    if np.any(deviation > 0):
        ax.fill_between(x, mean - deviation, mean + deviation, color=COLORS[i % 8], alpha=0.15, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)


def starts(ax, positions: list[int]):
    """Dotted lines where an iteration or slice begins: a new reference, rewards 0."""
    for x in positions[1:]:
        ax.axvline(x + 0.5, color="#999999", linestyle=(0, (1, 2)), linewidth=0.9)


def stack(ax, names: list[str], parts: dict[str, np.ndarray], digits: str = "{:.0f}"):
    """Stacked bars of parts {name: [bars]}; each part's number stands in it where it fits."""
    bottom, top = np.zeros(len(names)), max(sum(parts.values()))
    for i, (part, mean) in enumerate(parts.items()):
        ax.bar(names, mean, 0.7, bottom, color=FILLS[i], hatch=HATCHES[i], edgecolor="black", linewidth=0.6, label=part)
        for k, value in enumerate(mean):
            if value > 0.08 * top:
                ax.text(k, bottom[k] + value / 2, digits.format(value), ha="center", va="center", fontsize=7.5, bbox={"pad": 1, "facecolor": "white", "edgecolor": "none"})
        bottom = bottom + mean
    ax.set_ylim(0, 1.02 * top)
    turn_names(ax, names)


def bars(ax, names: list[str], mean, deviation, digits: str):
    """Bars with error bars, the number above each. mean, deviation: [bars]."""
    mean, deviation = np.asarray(mean), np.asarray(deviation)
    ax.bar(names, mean, 0.65, yerr=deviation if np.any(deviation > 0) else None, capsize=3, color=FILLS[1], edgecolor="black", linewidth=0.6)
    for k, value in enumerate(mean):
        ax.text(k, value + deviation[k] + 0.01 * max(mean), digits.format(value), ha="center", va="bottom", fontsize=7.5)
    ax.set_ylim(0, 1.12 * max(mean + deviation))
    turn_names(ax, names)


def turn_names(ax, names: list[str]):
    """Names under bars, broken at commas, and turned where many are long."""
    turned = len(names) > 4 and max(map(len, names)) > 4
    ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], rotation=35 if turned else 0, ha="right" if turned else "center")


def dnpo_figures(groups: list[tuple]):
    """(name, figure, what it says in numbers) of DNPO's Figs. 1, 2/10, 5, 7, 8, 9, as far as the runs have the data."""
    judged = [(name, runs) for name, _, runs in groups if all(iteration_values(run, "score") for run in runs)]
    by_iteration = lambda key: [{"runs": name, "iteration": k, key: mean, "std": deviation}
                                for name, runs in judged for k, (mean, deviation) in enumerate(zip(*band([iteration_values(run, key) for run in runs])))]
    spin = next((runs for _, runs in judged if paper_name(runs[0]) == "SPIN"), [])
    if judged:
        figure, axes = panels(len(judged), sharey=True)
        for ax, (name, runs) in zip(axes, judged):
            shares = {f"generated {word}": band([[100 * v for v in iteration_values(run, key)] for run in runs])[0] for word, key in (("wins", "win"), ("ties", "tie"), ("loses", "loss"))}
            stack(ax, [str(k) for k in range(len(shares["generated wins"]))], shares)
            ax.set(xlabel="Iteration", ylabel="Share of held-out prompts (%)" if ax is axes[0] else "", title=name)
        legend(figure, axes[0])
        yield "dnpo-fig1-win-rate", figure, by_iteration("win")

        figure, (ax,) = panels(1, 4.2, 3.2)
        for i, (name, runs) in enumerate(judged):
            mean, deviation = band([iteration_values(run, "score") for run in runs])
            line(ax, i, name, range(len(mean)), mean, deviation)
        ax.set(xlabel="Iteration", ylabel="Average score")
        legend(figure, ax)
        yield "dnpo-fig5-score", figure, by_iteration("score")

        figure, (ax,) = panels(1, 0.9 * len(judged) + 1.6, 2.9)
        order = sorted(judged, key=lambda group: ["SPIN", "SPIN + NPO", "SPIN + DSL", "DNPO"].index(paper_name(group[1][0])))
        ends = [band([iteration_values(run, "score")[-1:] for run in runs]) for _, runs in order]
        bars(ax, [name for name, _ in order], [mean[0] for mean, _ in ends], [deviation[0] for _, deviation in ends], "{:.2f}")
        ax.set(ylabel="Average score, last iteration")
        yield "dnpo-fig8-ablation", figure, [{"runs": name, "score": mean[0], "std": deviation[0]} for (name, _), (mean, deviation) in zip(order, ends)]

    for name, _, runs in groups:
        last = min(len(run["results"]["iterations"]) for run in runs)
        figure, axes = panels(last - 1, 2.9)
        numbers = []
        for k, ax in enumerate(axes, 1):
            samples = [logp_samples(run, k) for run in runs]
            samples = {part: [x for sample in samples for x in sample[part]] for part in samples[0]}
            positive, negative, new = samples.values()
            edges, shares = histogram(samples)
            for i, (part, share) in enumerate(shares.items()):
                ax.stairs(100 * share, edges, color=COLORS[i], linestyle=DASHES[i], linewidth=1.3, label=part, baseline=None)
            to_negative, to_positive = ks_distance(new, negative), ks_distance(new, positive)
            numbers.append({"runs": name, "iteration": k, "KS generated / negative": to_negative, "KS generated / positive": to_positive})
            ax.set(xlabel="Log probability", ylabel="Share (%)" if k == 1 else "", title=f"iteration {k}\nKS to negatives {to_negative:.2f}, positives {to_positive:.2f}")
        figure.suptitle(name, fontsize=10)
        legend(figure, axes[0])
        yield f"dnpo-fig{2 if paper_name(runs[0]) == 'SPIN' else 10}-log-probs-{slug(name)}", figure, numbers

    seeds = {run["config"]["seed"]: run for run in spin}
    duels = [(name, [d for run in runs if run["config"]["seed"] in seeds and (d := duel(run, seeds[run["config"]["seed"]]))]) for name, runs in judged if runs is not spin]
    if duels := [(name, found) for name, found in duels if found]:
        figure, axes = panels(len(duels), sharey=True)
        numbers = []
        for ax, (name, found) in zip(axes, duels):
            shares = {word: band([[100 * row[i] for row in run] for run in found])[0] for i, word in enumerate(("win", "tie", "loss"))}
            stack(ax, [str(k) for k in range(len(shares["tie"]))], shares)
            gap, _ = band([[row[0] - row[2] for row in run] for run in found])
            ax.set(xlabel="Iteration", ylabel="Share of held-out prompts (%)" if ax is axes[0] else "",
                   title=f"{name} against SPIN\nwin–loss gap at the end {100 * gap[-1]:+.1f} points")
            numbers += [{"runs": name, "iteration": k, "gap to SPIN": g} for k, g in enumerate(gap)]
        legend(figure, axes[0])
        yield "dnpo-fig7-against-spin", figure, numbers

    noisy = [(name, runs) for name, _, runs in groups if all(curves(run, "loss", "noise/loss")[0][0] for run in runs)]
    if noisy:
        figure, axes = panels(len(noisy), 3.8)
        for ax, (name, runs) in zip(axes, noisy):
            for i, (part, metric) in enumerate((("model loss", "loss"), ("noise loss", "noise/loss"))):
                mean, deviation = band([curves(run, metric, "noise/loss")[0][0] for run in runs])
                line(ax, i, part, range(1, len(mean) + 1), mean, deviation)
            starts(ax, curves(runs[0], "loss", "noise/loss")[1])
            ax.set(xlabel="Step", ylabel="Loss" if ax is axes[0] else "", title=name)
        legend(figure, axes[0])
        yield "dnpo-fig9-losses", figure, [{"runs": name, "model loss at the end": band([curves(r, "loss", "noise/loss")[0][0][-1:] for r in runs])[0][0]} for name, runs in noisy]


def tso_figures(groups: list[tuple]):
    """TSO's Figs. 3 and 4 (rewards with DPO's and with the dual-clip loss) and 5 (the scores' distribution)."""
    order = sorted(groups, key=lambda group: paper_name(group[2][0]) != "DPO")
    figure, axes = panels(len(order), 3.8, sharey=True)
    numbers = []
    for ax, (name, _, runs) in zip(axes, order):
        for i, part in enumerate(("chosen", "rejected")):
            mean, deviation = band([curves(run, f"rewards/{part}")[0][0] for run in runs])
            line(ax, i, f"{'positive' if part == 'chosen' else 'negative'} responses", range(1, len(mean) + 1), mean, deviation)
            numbers.append({"runs": name, "reward of": part, "at the end": mean[-1]})
        starts(ax, curves(runs[0], "rewards/chosen")[1])
        ax.set(xlabel="Step", ylabel="Reward" if ax is axes[0] else "", title=f"Fig. {3 if paper_name(runs[0]) == 'DPO' else 4}: {name}")
    legend(figure, axes[0])
    yield "tso-fig3-fig4-rewards", figure, numbers

    found = [(name, [spreads(run) for run in runs]) for name, _, runs in order]
    if found := [(name, some) for name, some in found if all(some)]:
        figure, axes = panels(len(found), 3.4, 3.2, sharex=True, sharey=True)
        for ax, (name, some) in zip(axes, found):
            for i, when in enumerate(some[0]):
                x, y = zip(*[point for spread in some for point in spread[when]]) if any(spread[when] for spread in some) else ((), ())
                ax.scatter(x, y, 16, marker="ox"[i], facecolor="none" if i == 0 else COLORS[2], edgecolor=COLORS[0] if i == 0 else None, linewidth=0.8, label=f"{when} training", rasterized=True)
            ax.set(xlabel="delta (skewness)", ylabel="kurtosis_val" if ax is axes[0] else "", title=name)
        legend(figure, axes[0])
        yield "tso-fig5-scores", figure, [{"runs": name, "when": when, "prompts": sum(len(s[when]) for s in some)} for name, some in found for when in some[0]]


def over_updates(tasks: dict[str, list[tuple]], names: list[str], quantity: str, x_of, value):
    """A panel per task with a line per kind of run: value(run) [T] in %, at x_of(run) [T] -> figure, numbers of its right end."""
    figure, axes = panels(len(tasks), 3.6, 2.9, 3, sharey=True)
    numbers = []
    for ax, (task, groups) in zip(axes, tasks.items()):
        for name, _, runs in groups:
            mean, deviation = band([100 * np.array(value(run)) for run in runs])
            line(ax, names.index(name), name, x_of(runs[0])[:len(mean)], mean, deviation)
            numbers.append({"runs": name, "task": task, quantity: mean[-1], "std": deviation[-1], "seeds": len(runs)})
        ax.set(xlabel="Updates", ylabel=f"{quantity} (%)" if ax.get_subplotspec().is_first_col() else "", title=task)
    legend(figure, max(axes, key=lambda ax: len(ax.lines)))
    return figure, numbers


def sams_figures(groups: list[tuple]):
    """SamS: held-out accuracy against updates, share of flipped pairs selected, time and memory."""
    tasks, names = by_task(groups), list(dict.fromkeys(name for name, _, _ in groups))
    yield "sams-accuracy", *over_updates(tasks, names, "Test accuracy", lambda run: curves(run, "eval/accuracy", "step")[0][1], lambda run: curves(run, "eval/accuracy")[0][0])

    flips = {task: [group for group in some if group[2][0]["config"]["select"] != "all"] for task, some in tasks.items() if some[0][1]["flip"]}  # DPO selects all
    if flips := {task: some for task, some in flips.items() if some}:
        yield "sams-flipped", *over_updates(flips, names, "Flipped pairs selected", lambda run: range(1, len(run["metrics"]) + 1), flipped_selected)

    spent = {name: [costs(run) for other, _, runs in groups if other == name for run in runs] for name in names}
    mean = lambda key: np.array([np.mean([cost[key] for cost in spent[name]]) for name in names])
    seconds = {"training": mean("train"), "scoring pass": mean("score"), "selector": mean("select")}
    memory = [band([[cost["memory"]] for cost in spent[name]]) for name in names]
    figure, (left, right) = panels(2, 0.55 * len(names) + 2.2, 3.1)
    stack(left, names, seconds, "{:.2f}")
    bars(right, names, [mean[0] for mean, _ in memory], [deviation[0] for _, deviation in memory], "{:.2f}")
    left.set(ylabel="Seconds per update")
    right.set(ylabel="Peak memory (GiB)")
    legend(figure, left)
    yield "sams-cost", figure, [{"runs": name, "seconds per update": sum(part[i] for part in seconds.values()), "memory": memory[i][0][0]} for i, name in enumerate(names)]


def sweep_figure(files: list[Path]):
    """bench.py --sweep: seconds and peak memory of a step against sequence length, pairs, the head's chunk, and ranks, whichever the files have."""
    from matplotlib.ticker import LogLocator
    names = {"length": "Tokens of a sequence", "pairs": "Pairs of a step", "chunk": "Response tokens of a chunk", "ranks": "Ranks that share the step (FSDP)"}
    sweeps = {}
    for file in files:
        try:
            sweeps |= json.loads(file.read_text())["sweep"]
        except (OSError, ValueError, LookupError):
            die(f"{file}: no sweep of bench.py")
    figure, axes = panels(2 * len(sweeps), 3.2, 2.6, len(sweeps), sharey="row")
    numbers = []
    for k, (axis, points) in enumerate(sweeps.items()):
        x = [int(value) for value in points]
        for i, row in enumerate(next(iter(points.values()))):
            for ax, key, name in ((axes[k], "seconds", "Seconds"), (axes[k + len(sweeps)], "peak_mib", "Peak memory (MiB)")):
                ax.plot(x, [rows[row][key] for rows in points.values()], color=COLORS[i % 8], linestyle=DASHES[i % 6], marker=MARKERS[i % 8], markerfacecolor="white", label=row)
                ax.set(xscale="log", yscale="log", xlabel=names[axis], ylabel=name if k == 0 else "")
                ax.set_xticks(x, [str(value) for value in x])
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.minorticks_off()
            numbers += [{"axis": axis, "value": value, "row": row, "seconds": rows[row]["seconds"], "peak_mib": rows[row]["peak_mib"]} for value, rows in zip(x, points.values())]
    legend(figure, axes[0])
    yield "bench-sweep", figure, numbers


def slug(name: str) -> str:
    return "-".join("".join(x if x.isalnum() else " " for x in name.lower()).split())


def draw(folders: list[str], out: Path):
    """All figures that the runs have the data for, each as SVG and PNG, and their numbers as tables and in figures.json."""
    sweeps, folders = ([f for f in dict.fromkeys(folders) if f.endswith(".json") is kind] for kind in (True, False))
    runs = [read_run(folder) for folder in folders]
    plt, written = pyplot(), {}
    out.mkdir(parents=True, exist_ok=True)
    drawn = [sweep_figure([Path(file) for file in sweeps])] if sweeps else []
    for method, figures_of in (("dnpo", dnpo_figures), ("tso", tso_figures), ("sams", sams_figures)):
        if some := [run for run in runs if run["method"] == method]:
            drawn.append(figures_of(group_runs(some)))
    for name, figure, numbers in itertools.chain(*drawn):
        for kind in ("svg", "png"):
            temporary = out / f"{name}.{kind}.tmp"
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
            os.replace(temporary, out / f"{name}.{kind}")
        plt.close(figure)
        written[name] = numbers
        print(f"{out / name}.svg, .png\n{table(numbers, list(numbers[0]))}\n")
    write_atomic(out / "figures.json", json.dumps(written, indent=1))
