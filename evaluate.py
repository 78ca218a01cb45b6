"""Compares teacher, student and distilled student on the test images, which no other script reads.

    python evaluate.py

Prints a table and writes results.json, and with matplotlib results.png, beside the checkpoints.
"""

import json
import math
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import models
from data import ImageSet

BINS = 15  # of the expected calibration error
Z = 1.96  # standard errors on each side of a 95 % interval
UNDECIDED = 4  # test images that are shown with the teacher's answer, see `undecided`
COLOURS = {"teacher": "#555555", "student": "#d95f02", "distilled": "#1b6ca8"}


def paired_difference(correct: Tensor, correct_before: Tensor) -> tuple[float, float, float, float]:
    """How much more often `correct` [N] is true than `correct_before` [N] on the same images, in points, with its 95 %
    interval, and the probability of a difference as large by chance: (difference, low, high, p).

    The interval is that of Agresti and Min 2005 (doi:10.1002/sim.1781): half an image more of each of the four kinds
    makes it hold for few images too. p: by the exact test of McNemar 1947, on the images on which they differ.
    """
    gained, lost = (correct & ~correct_before).sum().item(), (correct_before & ~correct).sum().item()
    differing, count = gained + lost, len(correct)
    mean = (gained - lost) / (count + 2)
    half = Z * math.sqrt(((differing + 1) / (count + 2) - mean**2) / (count + 2))
    fewer = torch.arange(min(gained, lost) + 1, dtype=torch.float64)  # as few, or fewer, of the images that differ
    ways = math.lgamma(differing + 1) - torch.lgamma(fewer + 1) - torch.lgamma(differing - fewer + 1)
    p = min(1.0, 2 * (ways - differing * math.log(2)).exp().sum().item())
    return 100 * (gained - lost) / count, max(-100.0, 100 * (mean - half)), min(100.0, 100 * (mean + half)), p


def gap_closed(gains: Tensor, gaps: Tensor, quantile: float = Z) -> tuple[float, float, float] | None:
    """The share of the gap that is closed, mean(gains) / mean(gaps), with its 95 % interval: (share, low, high).

    gains: distilled - student, gaps: teacher - student, [N] each, over the same images or seeds. By Fieller's theorem:
    the interval holds the shares for which the mean of gains - share * gaps is at most `quantile` standard errors from
    zero. None where the mean gap is not clearly above zero: the interval would have no bounds.
    """
    pairs = torch.stack([gains, gaps]).double()
    gain, gap = pairs.mean(1)
    errors = quantile**2 / len(gains) * pairs.cov()
    a, b, c = gap**2 - errors[1, 1], gain * gap - errors[0, 1], gain**2 - errors[0, 0]
    if not (gap > 0 and a > 0):
        return None
    half = (b**2 - a * c).clamp(min=0).sqrt()  # the ends are the roots of a * share^2 - 2 * b * share + c
    return (gain / gap).item(), ((b - half) / a).item(), ((b + half) / a).item()


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over BINS equal bins of confidence,
    weighted by the images in each (Guo et al. 2017, arXiv:1706.04599). logits [N, classes], labels [N]; 0 to 1."""
    confidence, answer = logits.double().softmax(1).max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - (answer == labels).double())
    return gaps.abs().sum().item() / len(labels)


def multiply_accumulates(network: nn.Module, image: Tensor) -> int | None:
    """Of the network's matrix products and convolutions for one image [1, 3, H, W]; None with recurrent layers, whose
    fused kernels are not counted."""
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        return None
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nor are those of transformers: they are kept from being used
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(image)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2  # it counts a multiply-accumulate as two


def images_per_second(network: nn.Module, images: Tensor) -> float:
    """Of inference on a batch [B, 3, H, W]: the median of nine passes, after one that warms up."""
    seconds = []
    with torch.inference_mode(), models.autocast(images.device):
        for _ in range(10):
            started = time.perf_counter()
            network(images)[0, 0].item()  # .item() waits for the device
            seconds.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds[1:])


def measure(name: str, test: ImageSet, test_hashes: Tensor) -> tuple[dict, Tensor]:
    """The figures of one network, and its logits for the test images [N, classes] on the CPU.

    test_hashes: data.image_hashes of the test images.
    """
    network, checkpoint = models.load_checkpoint(name, test.dataset, test)
    logits, labels = models.predict(name, network, test).cpu(), test.labels.cpu()
    batch = torch.rand(models.PREDICTION_BATCH[test.labels.device.type], 3, data.SIZE, data.SIZE)
    batch = batch.to(test.labels.device, memory_format=torch.channels_last)
    figures = {
        "accuracy": models.accuracy(logits, labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "agreement_with_teacher": None,
        "parameters": models.parameter_count(network),
        "macs": multiply_accumulates(network, batch[:1]),
        "images_per_second": images_per_second(network, batch),
        "fingerprint": data.fingerprint(*network.state_dict().values()),
        "recipe": checkpoint["recipe"],
        "curve": checkpoint["curve"],
        "test_images_trained_on": torch.isin(test_hashes, checkpoint["image_hashes"]).sum().item(),
    }
    return figures, logits


def compare(figures: dict[str, dict], logits: dict[str, Tensor], labels: Tensor) -> tuple[dict, list[str]]:
    """What the figures show together, as results.json has it, and the sentences that say it.

    Adds to the figures of each network its agreement with the teacher.
    """
    results, sentences = {"distilled_minus_student": None, "gap_closed": None, "gap_closed_ci95": None}, []
    correct = {name: answers.argmax(1) == labels for name, answers in logits.items()}
    if "teacher" in logits:
        for name, row in figures.items():
            row["agreement_with_teacher"] = models.accuracy(logits[name], logits["teacher"].argmax(1))
    if not {"student", "distilled"} <= figures.keys():
        return results, sentences
    points, low, high, p = paired_difference(correct["distilled"], correct["student"])
    results["distilled_minus_student"] = {"points": points, "ci95": [low, high], "p": p}
    sentences.append(f"distilled - student: {points:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}.")
    if p >= 0.05:
        sentences.append(f"Not significant: p = {p:.2f} (exact McNemar test).")
    elif points < 0:
        sentences.append("The distilled student is significantly worse.")
    elif "teacher" in correct:
        gains, gaps = (correct[name].double() - correct["student"].double() for name in ("distilled", "teacher"))
        if closed := gap_closed(gains, gaps):
            share, low, high = closed
            results |= {"gap_closed": share, "gap_closed_ci95": [low, high]}
            gap = f"the gap of {100 * gaps.mean():.2f} points to the teacher"
            sentences.append(f"Distillation closed {share:.0%} ({low:.0%} to {high:.0%}) of {gap}.")
    recipe, distilled_recipe = (figures[name]["recipe"] for name in ("student", "distilled"))
    constants = {name: value for name, value in recipe.items() if not name.endswith(".py")}  # not the hashes of code
    differing = models.differences(constants, {name: distilled_recipe.get(name) for name in constants})
    if differing:
        sentences.append(f"Not a fair comparison: student and distilled were trained with different {differing}.")
    for file in ("models.py", "data.py"):
        if recipe.get(file) != distilled_recipe.get(file):
            sentences.append(f"Perhaps not a fair comparison: {file} was edited between the two trainings.")
    for name, script in models.SCRIPTS.items():
        hashes = figures[name]["recipe"] if name in figures else {}
        if script in hashes and hashes[script] != models.code_hash(script, hashes):
            sentences.append(f"{name}.pt was trained by another {script} than this one.")
    if "teacher" in figures and distilled_recipe.get("teacher") != figures["teacher"]["fingerprint"]:
        sentences.append("distilled.pt was distilled from another teacher than teacher.pt: run python distill.py.")
    return results, sentences


def undecided(logits: dict[str, Tensor], labels: Tensor, classes: tuple[str, ...], temperature: float) -> list[dict]:
    """Of the test images on which the teacher is right, the UNDECIDED ones whose second class gains most probability at
    the temperature that taught: there its answer says most of what the label does not say.

    For each the teacher's three likeliest classes, with their probabilities according to all networks.
    """
    softened = {"teacher": logits["teacher"], f"teacher, T = {temperature:g}": logits["teacher"] / temperature}
    second, second_softened = (part.softmax(1).topk(2).values[:, 1] for part in softened.values())
    gained = torch.where(logits["teacher"].argmax(1) == labels, second_softened - second, -1)
    rows = []
    for image in gained.argsort(descending=True)[:UNDECIDED].tolist():
        top = logits["teacher"][image].topk(min(3, len(classes))).indices
        shares = {name: part[image].softmax(0)[top].tolist() for name, part in (softened | logits).items()}
        names = [classes[number] for number in top]
        rows.append({"image": image, "label": classes[labels[image]], "classes": names, "shares": shares})
    return rows


def main() -> None:
    device = models.setup()
    test = data.load_test(device)
    labels, folder, figures, logits = test.labels.cpu(), models.checkpoint_dir(test.dataset), {}, {}
    test_hashes = data.image_hashes(test.images)
    for name, script in models.SCRIPTS.items():
        if (folder / f"{name}.pt").exists():
            figures[name], logits[name] = measure(name, test, test_hashes)
        else:
            print(f"No {name} checkpoint: run python {script}.")
    if not figures:
        raise SystemExit(f"There is nothing to evaluate in {folder}.")
    results = {"dataset": test.dataset, "split": "hold-out" if test.fingerprint else "test"}
    results |= {"device": device.type, "torch": torch.__version__, "test_images": len(test)}
    comparison, sentences = compare(figures, logits, labels)
    if known := max(part["test_images_trained_on"] for part in figures.values()):
        sentences.append(f"{known} of the {results['split']} images are also among the training images.")
    results |= {"models": figures} | comparison | {"undecided": []}
    if len(logits) == 3:
        temperature = figures["distilled"]["recipe"].get("TEMPERATURE", 1)
        results["undecided"] = undecided(logits, labels, test.classes, temperature)
    show(results, sentences)
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    models.write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    print(f"Written to {folder / 'results.json'}.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("Install matplotlib to get results.png.")
        return
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $_$
        figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")  # readable on a dark page too
        draw(figure, results, test.images.cpu().numpy())
        models.write_atomically(folder / "results.png", lambda file: figure.savefig(file, format="png", dpi=90))
    print(f"Drawn in {folder / 'results.png'}.")


def show(results: dict, sentences: list[str]) -> None:
    """Prints the figures of all networks and the sentences of `compare`."""
    print(f"\n{results['test_images']:,} {results['split']} images of {results['dataset']}, on {results['device']}\n")
    row = "{:10}{:>12}{:>8}{:>7}{:>13}{:>15}{:>15}{:>11}".format
    print(row("", "accuracy %", "loss", "ECE %", "agreement %", "parameters", "MACs", "images/s"))
    for name, part in results["models"].items():
        share = f"{100 * part['accuracy']:.2f}"
        agreement = part["agreement_with_teacher"]
        agreement = "-" if agreement is None else f"{100 * agreement:.2f}"
        cost = (f"{part[key]:,.0f}" if part[key] else "-" for key in ("parameters", "macs", "images_per_second"))
        print(row(name, share, f"{part['loss']:.4f}", f"{100 * part['ece']:.2f}", agreement, *cost))
    print("", *sentences, sep="\n")


def draw(figure, results: dict, images: np.ndarray) -> None:
    """Draws on a figure of matplotlib's the learning curves, and the undecided images with their probabilities.

    results: what results.json holds. images: the test images, uint8 [N, SIZE, SIZE, 3].
    """
    upper, lower = figure.subfigures(2, height_ratios=[2, 3])
    learning = upper.subplots()
    lines = [line for row in results["models"].values() for line in row["curve"]]
    shown = "hold_out_accuracy" if all("hold_out_accuracy" in line for line in lines) else "accuracy"
    for name, row in results["models"].items():
        epochs, values = [line["epoch"] for line in row["curve"]], [100 * line[shown] for line in row["curve"]]
        label = f"{name}, {results['split']} {row['accuracy']:.1%}"
        learning.plot(epochs, values, marker=".", color=COLOURS[name], label=label)
    where = "training views" if shown == "accuracy" else "the hold-out"
    learning.set(title=results["dataset"], xlabel="epoch", ylabel=f"accuracy on {where}, %")
    learning.legend()
    rows = results["undecided"]
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


if __name__ == "__main__":
    models.run_script(main)
