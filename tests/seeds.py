"""Repeats the four scripts over seeds and prints mean and standard deviation of every figure, and the paired gain.

    DATASET=synthetic python tests/seeds.py

Seed s of teacher, student and distilled student alike; the two students start from the same weights and see the same
batches. Each seed has a folder of checkpoints of its own, CHECKPOINT_DIR/seed-<s>; one that holds results is not run
again, so that an interrupted series goes on where it was: delete the folders after editing a constant.
"""

import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import distill
import evaluate
import models
import train_student
import train_teacher

SEEDS = range(5)
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by the count
COLUMNS = (("accuracy", 100, 2, 18), ("loss", 1, 4, 20), ("ece", 100, 2, 16), ("agreement_with_teacher", 100, 2, 18))


def results_of(seed: int, root: Path) -> dict:
    """The results.json of one seed, made where it is not there yet."""
    os.environ["CHECKPOINT_DIR"] = str(root / f"seed-{seed}")
    path = models.checkpoint_folder(data.dataset_name()) / "results.json"
    if not path.is_file():
        for script in (train_teacher, train_student, distill):
            script.SEED = seed
            script.main()
        evaluate.main()
    return json.loads(path.read_text(encoding="utf-8"))


def told(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def main() -> None:
    root = models.checkpoint_folder("")
    runs = [results_of(seed, root) for seed in SEEDS]
    first = runs[0]
    print(f"\n{first['dataset']}, {first['test_images']:,} test images, {len(runs)} seeds, torch {first['torch']}\n")
    print(f"{'':12}{'accuracy %':>18}{'loss':>20}{'ECE %':>16}{'= teacher %':>18}")
    for name in models.SCRIPTS:
        rows = [run["models"][name] for run in runs]
        columns = (
            f"{told([scale * row[key] for row in rows], digits):>{width}}" for key, scale, digits, width in COLUMNS
        )
        print(f"{name:12}{''.join(columns)}")
    gains = [run["distilled_minus_student"]["points"] for run in runs]
    half = T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.mean(gains)
    gap = 100 * statistics.mean(r["models"]["teacher"]["accuracy"] - r["models"]["student"]["accuracy"] for r in runs)
    print(f"\ndistilled - student: {', '.join(f'{gain:+.2f}' for gain in gains)} points")
    print(f"mean {mean:+.2f}, 95 % interval {mean - half:+.2f} to {mean + half:+.2f} (Student's t, paired by seed)")
    if gap > 0:
        print(f"share of the mean gap of {gap:.2f} points to the teacher that is closed: {100 * mean / gap:.0f} %")


if __name__ == "__main__":
    main()
