"""Draws results.png beside results.json: learning curves, and test images with the answers of all three networks.

    pip install matplotlib && python tests/draw.py

For the DATASET and the CHECKPOINT_DIR of the scripts, after evaluate.py.
"""

import io
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import models

UNDECIDED = 4  # images that are shown, see `undecided`
LONGEST = 14  # letters of a class's name that fit
COLOURS = {"teacher": "#555555", "student": "#d95f02", "distilled": "#1b6ca8"}


def undecided(logits, labels, classes, temperature):
    """Of the images on which the teacher is right, the UNDECIDED ones whose second class gains most probability at the
    temperature of the distillation: there its softened answer adds most to the label.

    logits: those of each network, [N, classes]. labels: int64 [N]. Returns for each image the teacher's three likeliest
    classes, with their probabilities according to all networks.
    """
    teacher = logits["teacher"]
    shown = {"teacher": teacher, f"teacher, T = {temperature:g}": teacher / temperature}
    shown["student"] = logits["student"]
    shown["distilled"] = logits["distilled"]
    second = teacher.softmax(1).topk(2).values[:, 1]
    second_softened = (teacher / temperature).softmax(1).topk(2).values[:, 1]
    right = teacher.argmax(1) == labels
    gained = (second_softened - second).where(right, -1)
    count = min(UNDECIDED, right.sum().item())
    rows = []
    for image in gained.argsort(descending=True)[:count].tolist():
        top = teacher[image].topk(min(3, len(classes))).indices
        shares = {}
        for name, part in shown.items():
            shares[name] = part[image].softmax(0)[top].tolist()
        row = {"image": image, "shares": shares}
        row["label"] = classes[labels[image]]
        row["classes"] = [classes[number] for number in top]
        rows.append(row)
    return rows


def printable(name):
    """A class's name as it fits into the picture: cut, with question marks for letters that the font has not."""
    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    letters = [letter if ord(letter) in known else "?" for letter in name]
    if len(letters) > LONGEST:
        letters = [*letters[: LONGEST - 1], "\N{HORIZONTAL ELLIPSIS}"]
    return "".join(letters)


def draw(figure, results, rows, images):
    """Draws the learning curves of results.json, and below them the rows that `undecided` gives.

    images: the test images, uint8 [N, SIZE, SIZE, 3].
    """
    upper, lower = figure.subfigures(2, height_ratios=[2, 3])
    draw_curves(upper.subplots(), results)
    if not rows:
        return
    pictures, bars = lower.subplots(2, len(rows), squeeze=False)
    for row, picture, shares in zip(rows, pictures, bars):
        picture.imshow(images[row["image"]])
        picture.set_title(f"labelled {printable(row['label'])}", fontsize="small")
        picture.axis("off")
        draw_shares(shares, row)
    handles, names = bars[0].get_legend_handles_labels()
    lower.legend(handles, names, loc="outside lower center", ncols=4)


def draw_curves(axes, results):
    curves = {name: row["curve"] for name, row in results["models"].items()}
    key = "hold_out_accuracy"
    where = "the hold-out"
    if not all(key in line for curve in curves.values() for line in curve):
        key = "accuracy"
        where = "training views"
    for name, curve in curves.items():
        epochs = [line["epoch"] for line in curve]
        values = [100 * line[key] for line in curve]
        label = f"{name}, test {results['models'][name]['accuracy']:.1%}"
        axes.plot(epochs, values, marker=".", color=COLOURS[name], label=label)
    axes.set_title(printable(results["dataset"]))
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"accuracy on {where}, %")
    axes.legend()


def draw_shares(axes, row):
    """A group of bars for each class, in it one bar for each network."""
    for place, (name, values) in enumerate(row["shares"].items()):
        heights = [number + 0.2 * (place - 1.5) for number in range(len(values))]
        widths = [100 * value for value in values]
        axes.barh(heights, widths, 0.2, color=COLOURS.get(name, "#aaaaaa"), label=name)
    names = [printable(name) for name in row["classes"]]
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("probability, %")
    axes.set_xlim(0, 100)


def main():
    device = models.setup()
    test = data.load_test(device)
    folder = models.checkpoint_dir(test.dataset)
    path = folder / "results.json"
    if not path.is_file():
        raise SystemExit(f"There is no {path}: run python evaluate.py first.")
    results = json.loads(path.read_text(encoding="utf-8"))
    logits = {}
    for name in models.SCRIPTS:
        network, checkpoint = models.load_checkpoint(name, test.dataset, test)
        measured = results["models"].get(name, {})
        if measured.get("fingerprint") != data.fingerprint(*network.state_dict().values()):
            raise SystemExit(f"{path} is older than {name}.pt: run python evaluate.py.")
        logits[name] = models.predict(network, test).cpu()
    temperature = checkpoint["recipe"].get("TEMPERATURE", 1)  # of the last one, distilled.pt
    rows = undecided(logits, test.labels.cpu(), test.classes, temperature)
    picture = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $_$
        figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")  # readable on a dark page too
        draw(figure, results, rows, test.images.cpu().numpy())
        figure.savefig(picture, dpi=90)
    models.write_atomically(folder / "results.png", lambda file: file.write(picture.getvalue()))
    print(f"Drawn in {folder / 'results.png'}.")


if __name__ == "__main__":
    models.run_script(main)
