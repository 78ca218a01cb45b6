"""Draws tests/when_it_pays.png from the table of that name in tests/experiments.md.

    pip install matplotlib && python tests/draw_gains.py
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

TESTS = Path(__file__).resolve().parent
ROW = re.compile(r"^\| (.+?) \| ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\) \|", re.MULTILINE)


def read_gains(notes):
    """What each row of the table says: its name, the gain in points, the lower and the upper end of its interval."""
    section = notes.split("\n## When it pays\n")[1].split("\n## ")[0]
    rows = []
    for name, *numbers in ROW.findall(section):
        rows.append((name, *map(float, numbers)))
    return rows


def draw(figure, rows):
    axes = figure.subplots()
    names, gains, lows, highs = zip(*rows)
    places = range(len(rows))
    below = [gain - low for gain, low in zip(gains, lows)]
    above = [high - gain for gain, high in zip(gains, highs)]
    axes.barh(places, gains, color="#1b6ca8")
    axes.errorbar(gains, places, xerr=[below, above], fmt="none", ecolor="black", capsize=3)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("what distilling gains over learning from the labels, points of test accuracy")


def main():
    rows = read_gains((TESTS / "experiments.md").read_text(encoding="utf-8"))
    figure = Figure(figsize=(10, 4), layout="constrained", facecolor="white")
    draw(figure, rows)
    figure.savefig(TESTS / "when_it_pays.png", dpi=90)


if __name__ == "__main__":
    main()
