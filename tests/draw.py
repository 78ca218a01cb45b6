"""Draws results.png beside results.json: learning curves, and test images with the answers of all three networks.

    pip install matplotlib && python tests/draw.py

For the DATASET and the CHECKPOINT_DIR of the scripts, after evaluate.py.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import models

UNDECIDED = 4  # images that are shown, see `undecided`
COLOURS = {"teacher": "#555555", "student": "#d95f02", "distilled": "#1b6ca8"}


def undecided(logits: dict[str, Tensor], labels: Tensor, classes: tuple[str, ...], temperature: float) -> list[dict]:
    """Of the images on which the teacher is right, the UNDECIDED ones whose second class gains most probability at the
    temperature of the distillation: there its softened answer adds most to the label.

    For each the teacher's three likeliest classes, with their probabilities according to all networks.
    """
    softened = {"teacher": logits["teacher"], f"teacher, T = {temperature:g}": logits["teacher"] / temperature}
    second, second_softened = (part.softmax(1).topk(2).values[:, 1] for part in softened.values())
    gained = (second_softened - second).where(logits["teacher"].argmax(1) == labels, -1)
    rows = []
    for image in gained.argsort(descending=True)[:UNDECIDED].tolist():
        top = logits["teacher"][image].topk(min(3, len(classes))).indices
        shares = {name: part[image].softmax(0)[top].tolist() for name, part in (softened | logits).items()}
        names = [classes[number] for number in top]
        rows.append({"image": image, "label": classes[labels[image]], "classes": names, "shares": shares})
    return rows


def draw(figure: Figure, results: dict, rows: list[dict], images: np.ndarray) -> None:
    """Draws the learning curves of results.json, and below them the rows that `undecided` gives.

    images: the test images, uint8 [N, SIZE, SIZE, 3].
    """
    upper, lower = figure.subfigures(2, height_ratios=[2, 3])
    learning = upper.subplots()
    lines = [line for row in results["models"].values() for line in row["curve"]]
    shown = "hold_out_accuracy" if all("hold_out_accuracy" in line for line in lines) else "accuracy"
    for name, row in results["models"].items():
        epochs, values = [line["epoch"] for line in row["curve"]], [100 * line[shown] for line in row["curve"]]
        label = f"{name}, test {row['accuracy']:.1%}"
        learning.plot(epochs, values, marker=".", color=COLOURS[name], label=label)
    where = "training views" if shown == "accuracy" else "the hold-out"
    learning.set(title=results["dataset"], xlabel="epoch", ylabel=f"accuracy on {where}, %")
    learning.legend()
    pictures, bars = lower.subplots(2, len(rows), squeeze=False) if rows else ([], [])
    for row, picture, shares in zip(rows, pictures, bars):
        picture.imshow(images[row["image"]])
        picture.set_title(f"labelled {row['label']}", fontsize="medium")
        picture.axis("off")
        for place, (name, values) in enumerate(row["shares"].items()):
            where = [number + 0.2 * (place - 1.5) for number in range(len(values))]
            style = {"color": COLOURS.get(name, "#aaaaaa"), "label": name}
            shares.barh(where, [100 * value for value in values], 0.2, **style)
        shares.set_yticks(range(len(row["classes"])), row["classes"], fontsize="small")
        shares.invert_yaxis()
        shares.set(xlabel="probability, %", xlim=(0, 100))
    if rows:
        lower.legend(*bars[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def main() -> None:
    device = models.setup()
    test = data.load_test(device)
    folder = models.checkpoint_dir(test.dataset)
    if not (folder / "results.json").is_file():
        raise SystemExit(f"There is no {folder / 'results.json'}: run python evaluate.py first.")
    results, logits = json.loads((folder / "results.json").read_text(encoding="utf-8")), {}
    for name in models.SCRIPTS:
        network, checkpoint = models.load_checkpoint(name, test.dataset, test)
        if results["models"].get(name, {}).get("fingerprint") != data.fingerprint(*network.state_dict().values()):
            raise SystemExit(f"{folder / 'results.json'} is older than {name}.pt: run python evaluate.py.")
        logits[name] = models.predict(name, network, test).cpu()
    temperature = checkpoint["recipe"].get("TEMPERATURE", 1)
    rows = undecided(logits, test.labels.cpu(), test.classes, temperature)
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $_$
        figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")  # readable on a dark page too
        draw(figure, results, rows, test.images.cpu().numpy())
        figure.savefig(folder / "results.png", dpi=90)
    print(f"Drawn in {folder / 'results.png'}.")


if __name__ == "__main__":
    main()
