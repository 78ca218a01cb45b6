"""Compares teacher, student and distilled student on the test images, which no other script reads.

    python evaluate.py

Prints a table and writes results.json, and with matplotlib results.png, beside the checkpoints.
"""

import json
import math
import statistics
import time

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
UNDECIDED = 4  # test images on which the teacher is undecided that are shown
COLOURS = {"teacher": "#555555", "student": "#d95f02", "distilled": "#1b6ca8"}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` independent trials (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))  # whatever rounding does


def paired_difference(correct: Tensor, correct_before: Tensor) -> tuple[float, float, float]:
    """How much more often `correct` [N] is true than `correct_before` [N] on the same images, in points, with its 95 %
    interval: (difference, low, high). Images on which both agree do not blur it."""
    difference = 100 * (correct.double() - correct_before.double())
    half = Z * difference.std(correction=0).item() / math.sqrt(len(difference))
    mean = difference.mean().item()
    return mean, mean - half, mean + half


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
    confidence, correct, share = reliability(logits, labels)
    return ((confidence - correct).abs() * share).sum().item()


def class_accuracies(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """The share of correct answers among the images of each class that has any. logits [N, classes], labels [N]."""
    correct = (logits.argmax(1) == labels).double()
    return {name: correct[labels == k].mean().item() for k, name in enumerate(classes) if (labels == k).any()}


def multiply_accumulates(network: nn.Module, image: Tensor) -> int:
    """Of the network's matrix products and convolutions for one image [1, 3, H, W]."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused attention
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


def measure(name: str, test: ImageSet) -> tuple[dict, Tensor, list[dict]]:
    """The figures of one network, its logits for the test images [N, classes] on the CPU, its learning curve."""
    network, checkpoint = models.load_checkpoint(name, test.dataset, test)
    test = test.normalised_as_in(checkpoint)
    logits, labels, device = models.predict(network, test).cpu(), test.labels.cpu(), test.labels.device
    if not logits.isfinite().all():
        raise SystemExit(f"The logits of {name}.pt are not finite: run python {models.SCRIPTS[name]} again.")
    batch = torch.rand(2_000 if device.type == "cuda" else 500, 3, data.SIZE, data.SIZE, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    share = models.accuracy(logits, labels)
    figures = {
        "accuracy": share,
        "accuracy_ci95": wilson_interval(share, len(test)),
        "loss": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "agreement_with_teacher": None,
        "class_accuracy": class_accuracies(logits, labels, test.classes),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": multiply_accumulates(network, batch[:1]),
        "images_per_second": images_per_second(network, batch),
        "training_seconds": checkpoint["seconds"],
        "fingerprint": data.fingerprint(*network.state_dict().values()),
        "recipe": checkpoint["recipe"],
    }
    return figures, logits, checkpoint.get("curve", [])


def compare(figures: dict[str, dict], logits: dict[str, Tensor], labels: Tensor) -> tuple[dict, list[str]]:
    """What the networks' figures show together, as results.json has it, and the sentences that say it.

    Adds to each network's figures its agreement with the teacher.
    """
    results, sentences = {"distilled_minus_student": None, "gap_closed": None, "gap_closed_ci95": None}, []
    correct = {name: answers.argmax(1) == labels for name, answers in logits.items()}
    if "teacher" in logits:
        for name, row in figures.items():
            row["agreement_with_teacher"] = models.accuracy(logits[name], logits["teacher"].argmax(1))
    if not {"student", "distilled"} <= figures.keys():
        return results, sentences
    points, low, high = paired_difference(correct["distilled"], correct["student"])
    results["distilled_minus_student"] = {"points": points, "ci95": [low, high]}
    sentences.append(f"distilled - student: {points:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}.")
    if low <= 0 <= high:
        sentences.append(f"That is no difference that {len(labels):,} test images can show.")
    elif low > 0 and "teacher" in correct:
        gains, gaps = (correct[name].double() - correct["student"].double() for name in ("distilled", "teacher"))
        if closed := gap_closed(gains, gaps):
            share, low, high = closed
            results |= {"gap_closed": share, "gap_closed_ci95": [low, high]}
            gap = f"the gap of {100 * gaps.mean():.2f} points to the teacher"
            sentences.append(f"Distillation closed {share:.0%} ({low:.0%} to {high:.0%}) of {gap}.")
    recipe, distilled_recipe = (figures[name]["recipe"] for name in ("student", "distilled"))
    differing = models.differences(recipe, {name: distilled_recipe.get(name) for name in recipe})
    if differing:
        sentences.append(f"Not a fair comparison: student and distilled were trained with different {differing}.")
    if "teacher" in figures and distilled_recipe.get("teacher") != figures["teacher"]["fingerprint"]:
        sentences.append("The distilled student had another teacher than teacher.pt: run python distill.py again.")
    return results, sentences


def undecided(logits: dict[str, Tensor], labels: Tensor, classes: tuple[str, ...], temperature: float) -> list[dict]:
    """The UNDECIDED test images on which the teacher's two likeliest classes are nearest to each other in probability.

    For each its number, its label and the teacher's three likeliest classes, with their probabilities by the teacher
    (at temperature 1, and softened by that of the distillation), the student and the distilled student.
    """
    likeliest = logits["teacher"].softmax(1).topk(2).values
    rows = []
    for image in (likeliest[:, 0] - likeliest[:, 1]).argsort()[:UNDECIDED].tolist():
        top = logits["teacher"][image].topk(min(3, len(classes))).indices
        softened = {"teacher": logits["teacher"], f"teacher, T = {temperature:g}": logits["teacher"] / temperature}
        shares = {name: part[image].softmax(0)[top].tolist() for name, part in (softened | logits).items()}
        rows.append({"image": image, "label": classes[labels[image]], "classes": [classes[k] for k in top], **shares})
    return rows


def main() -> None:
    device = models.setup()
    test = data.load_test(device)
    labels, figures, logits, curves = test.labels.cpu(), {}, {}, {}
    for name, script in models.SCRIPTS.items():
        if models.read(models.checkpoint_path(test.dataset, name)) is not None:
            figures[name], logits[name], curves[name] = measure(name, test)
        else:
            print(f"There is no {name} yet: python {script} makes it.")
    path = models.checkpoint_path(test.dataset, "results").with_suffix(".json")
    if not figures:
        raise SystemExit(f"There is nothing to evaluate in {path.parent}.")
    about = {"dataset": test.dataset, "device": device.type, "torch": torch.__version__, "test_images": len(test)}
    comparison, sentences = compare(figures, logits, labels)
    results = about | {"models": figures} | comparison | {"undecided": []}
    if len(logits) == 3:
        temperature = figures["distilled"]["recipe"].get("TEMPERATURE", 1)
        results["undecided"] = undecided(logits, labels, test.classes, temperature)
    show(results, sentences)
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    models.write_atomically(path, lambda file: file.write(text.encode()))
    print(f"Written to {path}.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("With matplotlib (pip install matplotlib) there would be a results.png beside it.")
        return
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $_$
        figure = Figure(figsize=(10, 11), layout="constrained", facecolor="white")  # white: legible on any ground
        bins = {name: reliability(answers, labels) for name, answers in logits.items()}
        pictures = [test.images[row["image"]].cpu().numpy() for row in results["undecided"][:4]]
        draw(figure, results, curves, bins, pictures)
        models.write_atomically(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=90))
    print(f"Drawn in {path.with_suffix('.png')}.")


def show(results: dict, sentences: list[str]) -> None:
    """Prints the figures of all networks, the sentences of `compare`, and what `undecided` found."""
    print(f"\n{results['test_images']:,} test images of {results['dataset']}, on {results['device']}\n")
    row = "{:10}{:>22}{:>8}{:>7}{:>13}{:>12}{:>13}{:>11}".format
    print(row("", "accuracy % (95 %)", "loss", "ECE %", "agreement %", "parameters", "MACs", "images/s"))
    for name, part in results["models"].items():
        low, high = part["accuracy_ci95"]
        share, agreement = f"{100 * part['accuracy']:.2f} ({100 * low:.2f}-{100 * high:.2f})", "-"
        if part["agreement_with_teacher"] is not None:
            agreement = f"{100 * part['agreement_with_teacher']:.2f}"
        cost = (f"{part[key]:,.0f}" for key in ("parameters", "macs", "images_per_second"))
        print(row(name, share, f"{part['loss']:.4f}", f"{100 * part['ece']:.2f}", agreement, *cost))
    print("", *sentences, sep="\n")
    if results["undecided"]:
        columns = list(results["undecided"][0])[3:]
        print("\nTest images on which the teacher's two likeliest classes are nearest to each other, in %:")
        print(f"{'':40}{''.join(f'{column:>15}' for column in columns)}")
    for part in results["undecided"]:
        title = f"image {part['image']}, {part['label']}"
        for number, name in enumerate(part["classes"]):
            shares = "".join(f"{100 * part[column][number]:15.1f}" for column in columns)
            print(f"{title if number == 0 else '':24.23}{name:16.15}{shares}")


def draw(figure, results: dict, curves: dict, bins: dict, pictures: list) -> None:
    """Draws on a figure of matplotlib's: accuracy and cost, learning, calibration, classes, and undecided images.

    results: what results.json holds. curves: of each network, that of `models.Run`. bins: of each network, its
    `reliability`. pictures: uint8 [H, W, 3] each, those of results["undecided"].
    """
    rows = [["cost"] * 2 + ["learning"] * 2, ["calibration"] * 2 + ["classes"] * 2]
    if pictures:
        rows += [[f"{what} {number * len(pictures) // 4}" for number in range(4)] for what in ("picture", "shares")]
    axes = figure.subplot_mosaic(rows, height_ratios=[3, 3, 1.6, 1.9][: len(rows)])
    cost, learning, calibration, classes = (axes[name] for name in ("cost", "learning", "calibration", "classes"))
    networks = results["models"]
    for name, row in networks.items():
        style = {"color": COLOURS[name], "label": name}
        accuracy, (low, high) = 100 * row["accuracy"], (100 * end for end in row["accuracy_ci95"])
        macs = row["macs"] / 1e6 * (1.06 if name == "distilled" else 1)  # or it would hide the student
        cost.errorbar(macs, accuracy, [[accuracy - low], [high - accuracy]], fmt="o", capsize=4, **style)
        epochs, values = ([line[key] for line in curves[name]] for key in ("epoch", "cross_entropy"))
        learning.plot(epochs, values, marker=".", **style)
        confidence, correct, share = (100 * part for part in bins[name])
        filled = share > 0.1  # %: fewer images say nothing
        calibration.plot(confidence[filled], correct[filled], "o-", markersize=3, **style)
    cost.set(title="Accuracy and cost, 95 % intervals", ylabel="test accuracy, %")
    cost.set(xscale="log", xlabel="multiply-accumulates per image, millions")
    costs = sorted({row["macs"] / 1e6 for row in networks.values()})
    cost.set_xticks(costs, [f"{value:.3g}" for value in costs])
    cost.set_xticks([], minor=True)
    learning.set(title="Learning (training views)", xlabel="epoch", ylabel="cross-entropy on the labels")
    calibration.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, zorder=0)
    calibration.set(title="Calibration (the diagonal is perfect)", xlabel="confidence, %", ylabel="test accuracy, %")
    for part in (cost, learning, calibration):
        part.legend(fontsize="small")
    classes.set(title="Distilled minus student, by class", xlabel="points")
    if {"student", "distilled"} <= networks.keys():
        before, after = (networks[name]["class_accuracy"] for name in ("student", "distilled"))
        gains = sorted((100 * (after[name] - before[name]), name) for name in before)
        gains = gains if len(gains) <= 12 else gains[:6] + gains[-6:]  # the least and the most helped
        classes.barh([name for _, name in gains], [gain for gain, _ in gains], color=COLOURS["distilled"])
        classes.axvline(0, color="black", linewidth=0.8)
    for number, (row, picture) in enumerate(zip(results["undecided"], pictures)):
        image, shares = axes[f"picture {number}"], axes[f"shares {number}"]
        image.imshow(picture)
        image.set_title(f"labelled {row['label']}", fontsize="medium")
        image.axis("off")
        for place, name in enumerate(list(row)[3:]):
            where = [k + 0.2 * (place - 1.5) for k in range(len(row["classes"]))]
            style = {"color": COLOURS.get(name, "#aaaaaa"), "label": name}
            shares.barh(where, [100 * share for share in row[name]], 0.2, **style)
        shares.set_yticks(range(len(row["classes"])), row["classes"], fontsize="small")
        shares.invert_yaxis()
        shares.set(xlabel="probability, %", xlim=(0, 100))
    if pictures:
        figure.legend(*axes["shares 0"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{results['test_images']:,} test images of {results['dataset']}")


if __name__ == "__main__":
    models.run_script(main)
