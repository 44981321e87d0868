"""The picture in README.md: the three methods side by side, as figures/overview.svg and .png.

    python overview.py    # needs matplotlib; no model, no data

The picture is a table. A column is a method, a row is a question: what data the method has, who
labels them, which loss it trains with, and what goes round the loop. Lengths are pixels of a
picture that is 900 pixels wide.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

# ---------------------------------------------------------------- what the picture says

ROWS = ("data", "labels", "loss", "loop")

# The first line of a cell is its heading; a line that begins with a dollar sign is a formula.
DNPO = {
    "name": "DNPO",
    "subject": "learns from its own answers",
    "color": "#0b62a4",
    "turn": "next iteration",
    "data": (
        "own answers",
        "prompts with annotated answers $y^*$;",
        "the model answers each prompt:",
        r"$y' \sim \pi_k(\cdot \mid x)$",
    ),
    "labels": (
        "dynamic labels (DSL)",
        "A judge scores both: $s^*$ and $s'$.",
        r"$(y_w, y_l) = (y^*, y')$ if $s^* \geq s'$,",
        r"$(y_w, y_l) = (y', y^*)$ otherwise",
    ),
    "loss": (
        "noise on the reference (NPO)",
        r"on the logits of $y_l$, $\sigma^2$ kept small:",
        r"$\hat{z}_j = z_j + \sigma_j \odot \varepsilon_j, \quad \sigma_j = W h_j + b$",
        r"$\min_\theta \; \max_{W, b} \; \ell(r_w - \hat{r}_l)$",
    ),
    "loop": (
        "a new model",
        r"$\pi_{k+1} = \pi_\theta$",
        "is the next sampler",
        "and the next reference.",
    ),
}

TSO = {
    "name": "TSO",
    "subject": "learns from a family of models",
    "color": "#b04a1c",
    "turn": "next slice of the prompts",
    "data": (
        "a matrix of models",
        "chosen: current model, humans;",
        "rejected: older versions,",
        "smaller models, humans",
    ),
    "labels": (
        "correction",
        "A judge, asked in both orders,",
        "or a person corrects each pair:",
        "keep $(y_w, y_l)$, swap $(y_l, y_w)$, or drop",
    ),
    "loss": (
        "dual clip",
        "A side that has moved far enough",
        "earns no more:",
        r"$\ell( \, \min(r_w, c_w) - \max(r_l, -c_l) \, )$",
    ),
    "loop": (
        "a new model",
        r"$\pi_\mathrm{ref} = \pi_\theta$",
        "is the next current model",
        "and the next reference.",
    ),
}

SAMS = {
    "name": "SamS",
    "subject": "selects what to learn from",
    "color": "#2b7f52",
    "turn": "next batch",
    "data": (
        "given pairs",
        "a batch of preference pairs",
        "that are labelled already:",
        r"$(x, y_w, y_l)_i, \quad i = 1 \ldots n$",
    ),
    "labels": (
        "selection, no new labels",
        "A bandit sees the policy's hidden",
        "states $h_i$ and picks $K$ of the $n$ pairs:",
        r"$S = \mathrm{top}_K \; ( \, f_1(h_i) + \lambda \, f_2(h_i) \, )$",
    ),
    "loss": (
        "DPO on the selected",
        "The other pairs of the batch",
        "have no gradient.",
        r"$\mathrm{mean}_{\,i \in S} \;\; \ell(r_w - r_l)_i$",
    ),
    "loop": (
        "a reward, one step late",
        r"of batch gain $\rho$ and pair value $\kappa_i$:",
        r"$\gamma \, \mathrm{sig}(a \rho + b) + (1 - \gamma) \, \mathrm{sig}(\kappa_i)$",
        "trains $f_1$, $f_2$; the reference stays.",
    ),
}

FOOTER = (
    r"$r = \beta \log \, \pi_\theta(y \mid x) \, / \, \pi_\mathrm{ref}(y \mid x)$ is an answer's "
    r"reward: $r_w$ of the chosen one, $r_l$ of the rejected one,",
    r"$\hat{r}_l$ with the noisy reference. $\ell(m) = -\log \, \mathrm{sig}(m)$, where sig is the "
    r"sigmoid. Under all three is DPO, with the loss $\ell(r_w - r_l)$.",
)

# ---------------------------------------------------------------- the drawing

WIDTH = 900
LEFT, CELL, LOOP = 54, 244, 38  # names of the rows, width of a cell, room for the loop's arrow
HEAD, GAP, FOOT = 62, 26, 62
HEIGHT_OF = {"data": 100, "labels": 100, "loss": 108, "loop": 100}
HEIGHT = HEAD + sum(HEIGHT_OF.values()) + 3 * GAP + FOOT
LINE = 22  # from one line of text to the next
TEXT, FORMULA, TITLE = 9, 9.8, 15  # font sizes
INK, PALE = "#1a1a1a", "#f4f4f4"


def row_tops() -> dict[str, float]:
    """The upper edge of every row, measured from the bottom of the picture."""
    tops = {}
    y = HEIGHT - HEAD
    for row in ROWS:
        tops[row] = y
        y -= HEIGHT_OF[row] + GAP
    return tops


def write(ax, x: float, y: float, text: str, **style):
    """One line of text, its middle at x; letters without ascenders have theirs at y."""
    ax.text(x, y - 4, text, ha="center", va="baseline", **style)


def draw_cell(ax, lines: tuple[str, ...], left: float, top: float, height: float, color: str):
    """A box with a heading and its lines."""
    round_corners = "round,pad=0,rounding_size=7"
    box = FancyBboxPatch((left, top - height), CELL, height, boxstyle=round_corners)
    box.set(facecolor=PALE, edgecolor=color, linewidth=1.2)
    ax.add_patch(box)

    x = left + CELL / 2
    y = top - height / 2 + LINE * (len(lines) - 1) / 2
    heading, *others = lines
    write(ax, x, y, heading, size=TEXT, weight="bold")
    for line in others:
        y -= LINE
        size = FORMULA if line.startswith("$") else TEXT
        write(ax, x, y, line, size=size)


def draw_method(ax, method: dict, left: float):
    """A column: names, cells, arrows from cell to cell, and on the right the way back."""
    color = method["color"]
    middle = left + CELL / 2
    right = left + CELL
    tops = row_tops()
    write(ax, middle, HEIGHT - 20, method["name"], size=TITLE, weight="bold", color=color)
    write(ax, middle, HEIGHT - 45, method["subject"], size=TEXT)

    arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "mutation_scale": 13}
    arrow.update(shrinkA=0, shrinkB=0)
    for row in ROWS:
        draw_cell(ax, method[row], left, tops[row], HEIGHT_OF[row], color)
    for row in ROWS[:-1]:
        bottom = tops[row] - HEIGHT_OF[row]
        ax.annotate("", (middle, bottom - GAP), (middle, bottom), arrowprops=arrow)

    first = tops["data"] - HEIGHT_OF["data"] / 2
    last = tops["loop"] - HEIGHT_OF["loop"] / 2
    corner = right + 14
    ax.plot([right, corner, corner], [last, last, first], color=color, linewidth=1.6)
    ax.annotate("", (right, first), (corner + 0.8, first), arrowprops=arrow)
    turn = {"size": TEXT, "rotation": 90, "ha": "center", "va": "center"}
    ax.text(corner + 11, (first + last) / 2, method["turn"], **turn)


def draw(folder: Path):
    """Writes overview.svg and overview.png into `folder`."""
    style = {"text.color": INK, "svg.fonttype": "path", "svg.hashsalt": "overview"}
    plt.rcParams.update(style)
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.set_axis_off()

    for row, top in row_tops().items():
        write(ax, LEFT / 2, top - HEIGHT_OF[row] / 2, row, size=10.5)
    left = LEFT
    for method in (DNPO, TSO, SAMS):
        draw_method(ax, method, left)
        left += CELL + LOOP
    write(ax, WIDTH / 2, 38, FOOTER[0], size=TEXT)
    write(ax, WIDTH / 2, 15, FOOTER[1], size=TEXT)

    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "overview.svg", metadata={"Date": None})
    figure.savefig(folder / "overview.png", dpi=200)
    print(f"{folder / 'overview'}.svg, .png")


if __name__ == "__main__":
    draw(Path(__file__).parent / "figures")
