"""Compares teacher, student and distilled student on the test images, which no other script reads.

    python evaluate.py

Prints a table and writes results.json beside the checkpoints.
"""

import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import data
import models

BINS = 15  # of the expected calibration error
Z = 1.96  # standard errors on each side of a 95 % interval


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` independent trials (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return centre - half, centre + half


def paired_difference(right: Tensor, right_before: Tensor) -> tuple[float, float, float]:
    """How much more often `right` [N] is true than `right_before` [N] on the same images, in points, with its 95 %
    interval: (difference, low, high). Images on which both agree do not blur it."""
    difference = 100 * (right.double() - right_before.double())
    half = Z * difference.std(correction=0).item() / math.sqrt(len(difference))
    mean = difference.mean().item()
    return mean, mean - half, mean + half


def reliability(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the images in each of BINS equal bins of confidence: mean confidence, accuracy, share of all; each [BINS].

    logits [N, classes], labels [N]. An empty bin has three zeros.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    sums.index_add_(1, bins, torch.stack([confidence, (answer == labels).double(), torch.ones_like(confidence)]))
    return *(sums[:2] / sums[2].clamp(min=1)), sums[2] / len(labels)


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over the bins of `reliability`, weighted by
    the images in each (Guo et al. 2017, arXiv:1706.04599). logits [N, classes], labels [N]; 0 to 1."""
    confidence, right, share = reliability(logits, labels)
    return ((confidence - right).abs() * share).sum().item()


def class_accuracies(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """The share of right answers among the images of each class that has any. logits [N, classes], labels [N]."""
    right, counts = (logits.argmax(1) == labels).double(), torch.bincount(labels, minlength=len(classes))
    shares = (torch.bincount(labels, right, minlength=len(classes)) / counts).tolist()
    return {name: share for name, share, count in zip(classes, shares, counts.tolist()) if count}


def multiply_accumulates(network: nn.Module, image: Tensor) -> int:
    """Of the network's matrix products and convolutions for one image [1, 3, H, W]."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(image)
    return counter.get_total_flops() // 2  # it counts a multiply-accumulate as two


def images_per_second(network: nn.Module, images: Tensor) -> float:
    """Of inference on a batch [B, 3, H, W]: the median of seven passes after two that warm up."""
    device, seconds = images.device, []
    with torch.inference_mode(), models.autocast(device):
        for _ in range(9):
            started = time.perf_counter()
            network(images)[0, 0].item()  # .item() waits for the device
            seconds.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds[2:])


def main() -> None:
    device = models.best_device()
    test = data.load_test(device)
    labels = test.labels.cpu()
    logits, figures, fingerprints, curves = {}, {}, {}, {}
    for name, script in models.SCRIPTS.items():
        if not models.checkpoint_path(test.dataset, name).is_file():
            print(f"There is no {name} yet: python {script} makes it.")
            continue
        network, checkpoint = models.load_checkpoint(name, test.dataset, test.classes, device)
        test.mean, test.std = checkpoint["mean"], checkpoint["std"]
        logits[name] = models.predict(network, test).cpu()
        fingerprints[name] = models.fingerprint(network)
        curves[name] = checkpoint.get("curve", [])
        share = models.accuracy(logits[name], labels)
        batch = next(data.batches(test, 500))[0]
        figures[name] = {
            "accuracy": share,
            "accuracy_ci95": wilson_interval(share, len(test)),
            "loss": F.cross_entropy(logits[name], labels).item(),
            "ece": calibration_error(logits[name], labels),
            "agreement_with_teacher": None,
            "class_accuracy": class_accuracies(logits[name], labels, test.classes),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "macs": multiply_accumulates(network, batch[:1]),
            "images_per_second": images_per_second(network, batch),
            "training_seconds": checkpoint["seconds"],
            "recipe": checkpoint["recipe"],
        }
    if not figures:
        raise SystemExit(f"There is nothing to evaluate in {models.checkpoint_folder(test.dataset)}.")
    if "teacher" in logits:
        for name, row in figures.items():
            row["agreement_with_teacher"] = models.accuracy(logits[name], logits["teacher"].argmax(1))

    results = {
        "dataset": test.dataset,
        "device": device.type,
        "torch": torch.__version__,
        "test_images": len(test),
        "models": figures,
        "distilled_minus_student": None,
        "gap_closed": None,
    }
    print_table(results)
    if "student" in figures and "distilled" in figures:
        points, low, high = paired_difference(*(logits[name].argmax(1) == labels for name in ("distilled", "student")))
        results["distilled_minus_student"] = {"points": points, "ci95": [low, high]}
        print(f"\ndistilled - student: {points:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")
        gap = 100 * (figures["teacher"]["accuracy"] - figures["student"]["accuracy"]) if "teacher" in figures else 0
        if gap > 0:
            results["gap_closed"] = points / gap
            print(f"Distillation closed {100 * points / gap:.0f} % of the gap of {gap:.2f} points to the teacher.")
        print_differences(figures["student"]["recipe"], figures["distilled"]["recipe"])
        if "teacher" in figures and figures["distilled"]["recipe"].get("teacher") != fingerprints["teacher"]:
            print("The distilled student was taught by another teacher than teacher.pt: run python distill.py again.")
    path = models.checkpoint_folder(test.dataset) / "results.json"
    models.write(path, lambda file: file.write((json.dumps(results, indent=2) + "\n").encode()))
    print(f"Written to {path}.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("With matplotlib (pip install matplotlib) there would be a results.png beside it.")
    else:
        figure = Figure(figsize=(9, 7.5), layout="constrained", facecolor="white")  # white: legible on any ground
        draw(figure, results, curves, {name: reliability(answers, labels) for name, answers in logits.items()})
        models.write(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=100))
        print(f"Drawn in {path.with_suffix('.png')}.")


def draw(figure, results: dict, curves: dict[str, list[dict]], bins: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Draws four pictures on a figure of matplotlib's: size and accuracy, learning, calibration, classes.

    results: what results.json holds. curves: of each network, what `models.Run` tells of each epoch. bins: of each
    network, its `reliability`.
    """
    sizes, learning, calibration, classes = figure.subplots(2, 2).flat
    rows = results["models"]
    colours = {"teacher": "#555555", "student": "#d95f02", "distilled": "#1b6ca8"}
    for name, row in rows.items():
        share, colour = 100 * row["accuracy"], colours[name]
        ends = [[share - 100 * row["accuracy_ci95"][0]], [100 * row["accuracy_ci95"][1] - share]]
        aside = 1.06 if name == "distilled" else 1  # or it would hide the student
        sizes.errorbar(row["macs"] / 1e6 * aside, share, ends, fmt="o", color=colour, capsize=4, label=name)
        learning.plot(
            [line["epoch"] for line in curves[name]],
            [100 * line["accuracy"] for line in curves[name]],
            color=colour,
            label=name,
        )
        held = [line for line in curves[name] if line["hold_out_accuracy"] is not None]
        learning.plot(
            [line["epoch"] for line in held],
            [100 * line["hold_out_accuracy"] for line in held],
            color=colour,
            linestyle="--",
            label=f"{name}, hold-out" if held else None,
        )
        confidence, right, share = bins[name]
        filled = share > 0
        calibration.plot(100 * confidence[filled], 100 * right[filled], "o-", color=colour, markersize=3, label=name)
    costs = sorted({row["macs"] / 1e6 for row in rows.values()})
    sizes.set(xscale="log", xlabel="million multiply-accumulates per image", ylabel="test accuracy, %")
    sizes.set_xticks(costs, [f"{cost:.3g}" for cost in costs])
    sizes.set_xticks([], minor=True)
    sizes.set_title("Accuracy and cost, 95 % intervals")
    learning.set(xlabel="epoch", ylabel="accuracy, %", title="Learning (training views)")
    calibration.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, zorder=0)
    calibration.set(xlabel="confidence, %", ylabel="test accuracy, %", title="Calibration (the diagonal is perfect)")
    for part in (sizes, learning, calibration):
        part.legend(fontsize="small")
    classes.set(title="Distilled minus student, by class", xlabel="points")
    if {"student", "distilled"} <= rows.keys():
        before, after = (rows[name]["class_accuracy"] for name in ("student", "distilled"))
        gains = sorted((100 * (after[name] - before[name]), name) for name in before)
        gains = gains if len(gains) <= 12 else gains[:6] + gains[-6:]  # the least and the most helped
        classes.barh([name for _, name in gains], [gain for gain, _ in gains], color=colours["distilled"])
        classes.axvline(0, color="black", linewidth=0.8)
    figure.suptitle(f"{results['test_images']:,} test images of {results['dataset']}")


def print_table(results: dict) -> None:
    """Prints the figures of all networks, in at most 100 columns."""
    print(f"\n{results['test_images']:,} test images of {results['dataset']}, on {results['device']}\n")
    print(
        f"{'':10}{'accuracy % (95 %)':>22}{'loss':>8}{'ECE %':>7}{'= teacher %':>13}"
        f"{'parameters':>12}{'MACs':>13}{'images/s':>11}"
    )
    for name, row in results["models"].items():
        low, high = row["accuracy_ci95"]
        interval = f"{100 * row['accuracy']:.2f} ({100 * low:.2f}-{100 * high:.2f})"
        agreement = row["agreement_with_teacher"]
        print(
            f"{name:10}{interval:>22}{row['loss']:8.4f}{100 * row['ece']:7.2f}"
            f"{'-' if agreement is None else f'{100 * agreement:.2f}':>13}"
            f"{row['parameters']:12,}{row['macs']:13,}{row['images_per_second']:11,.0f}"
        )


def print_differences(student: dict, distilled: dict) -> None:
    """Says which constants, other than distillation's own, the two students were not trained alike with."""
    differing = [name for name in student if student[name] != distilled.get(name)]
    if differing:
        told = ", ".join(f"{name} ({student[name]} and {distilled.get(name)})" for name in differing)
        print(f"Not a fair comparison: student and distilled were trained with different {told}.")


if __name__ == "__main__":
    main()
