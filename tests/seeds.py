"""Repeats the four scripts over seeds and prints means, standard deviations and paired differences.

    DATASET=synthetic python tests/seeds.py

Teacher, student and distilled student all use the same seed; the two students start from the same weights and see the
same batches. Each seed has a folder of checkpoints of its own, CHECKPOINT_DIR/seed-<s>; a network that is there is not
trained again, so that an interrupted series goes on where it was. Networks of other constants, or of other code in
their own script, are not used: the series names their files, and ends.

With HOLD_OUT in data.py above 0 the figures are those of the hold-out, and no test image is read: to choose constants.
The difference is also pooled over the seeds, with an interval over the images, which holds for these networks only. All
figures are written to <dataset>.json beside the seeds' folders.

To compare two ways to distil, run the series, copy the teachers into another CHECKPOINT_DIR (seed-<s>/<dataset>/
teacher.pt), edit distill.py, and run the series there with AGAINST = the first CHECKPOINT_DIR: its distilled students
take the place of the students from the labels.
"""

import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import distill
import evaluate
import models
import train_student
import train_teacher

SEEDS = range(5)
AGAINST = None  # a CHECKPOINT_DIR with the same seeds and teachers, whose distilled students are compared with
TRAININGS = {"teacher": train_teacher, "student": train_student, "distilled": distill}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by the count
COLUMNS = (("accuracy", 100, 2, 18), ("loss", 1, 4, 20), ("ece", 100, 2, 16), ("agreement_with_teacher", 100, 2, 18))


def results_of(seed: int, root: Path) -> dict:
    """The results.json of one seed, of its networks; those are trained that are not there yet."""
    os.environ["CHECKPOINT_DIR"] = str(root / f"seed-{seed}")
    path = models.checkpoint_dir(data.dataset_name()) / "results.json"
    for name, script in TRAININGS.items():
        if AGAINST and name == "student":  # put_against gives another one
            continue
        if not (path.parent / f"{name}.pt").is_file():
            path.unlink(missing_ok=True)
            script.SEED = seed
            script.main()
    if not path.is_file():
        evaluate.main()
    return json.loads(path.read_text(encoding="utf-8"))


def check_recipes(root: Path, device: torch.device) -> None:
    """Ends the series if it has networks of other constants, scripts or images than now, before hours are lost."""
    others, edited, images = [], set(), set()
    for name, script in TRAININGS.items():
        now = models.make_recipe(vars(script), device)
        for seed in SEEDS:
            os.environ["CHECKPOINT_DIR"] = str(root / f"seed-{seed}")
            path = models.checkpoint_dir(data.dataset_name()) / f"{name}.pt"
            if not path.is_file():
                continue
            recipe = models.load_checkpoint(name, path.parent.name)[1]["recipe"]  # ends where models.py makes another
            images.add(recipe["images"])
            if "models.py" not in recipe:  # a network from elsewhere
                continue
            compared = now.keys() - {"SEED", "models.py", "data.py"}
            if any(recipe.get(key) != now[key] for key in compared):
                others.append(str(path))
            edited |= {file for file in ("models.py", "data.py") if recipe[file] != now[file]}
    if others:
        wanted = "Delete them, and the distilled.pt of each teacher.pt among them, or name another CHECKPOINT_DIR"
        raise SystemExit(f"Trained with other constants than now, or by another script: {', '.join(others)}. {wanted}.")
    if images and images != {data.load_train("cpu")[0].fingerprint}:
        raise SystemExit(f"Some networks in {root} were trained on other images than there are now.")
    for file in sorted(edited):
        print(f"{file} was edited since some of these networks were trained.")


def put_against(run: dict, seed: int) -> None:
    """Puts the distilled student in AGAINST in the place of the student from the labels."""
    path = Path(AGAINST) / f"seed-{seed}" / run["dataset"] / "results.json"
    if not path.is_file():
        raise SystemExit(f"There is no {path} (AGAINST in tests/seeds.py): run the series there first.")
    other = json.loads(path.read_text(encoding="utf-8"))
    teachers = {part["models"]["teacher"]["fingerprint"] for part in (run, other)}
    if len(teachers) > 1 or other["split"] != run["split"]:
        raise SystemExit(f"{path} is of another teacher, or of other images, than its counterpart here.")
    run["models"]["student"] = other["models"]["distilled"]


def figures_by_image(seed: int, root: Path, images: data.ImageSet) -> torch.Tensor:
    """For each of the three networks: whether each image is right, in %, and its loss: [3, 2, N]."""
    figures = []
    for name in models.SCRIPTS:
        place, name = (Path(AGAINST), "distilled") if AGAINST and name == "student" else (root, name)
        os.environ["CHECKPOINT_DIR"] = str(place / f"seed-{seed}")
        network, _ = models.load_checkpoint(name, images.dataset, images)
        logits = models.predict(name, network, images)
        losses = F.cross_entropy(logits, images.labels, reduction="none")
        figures.append(torch.stack([100.0 * (logits.argmax(1) == images.labels), losses]))
    return torch.stack(figures)


def mean_and_deviation(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def main() -> None:
    if len(SEEDS) not in T_95:
        raise SystemExit(f"SEEDS in tests/seeds.py must be from {min(T_95)} to {max(T_95)} seeds, not {len(SEEDS)}.")
    if data.WORLD_SIZE > 1:
        raise SystemExit("tests/seeds.py runs as one process: start it with python, not with torchrun.")
    if data.HOLD_OUT:
        data.load_test = lambda device: data.load_train(device)[1]
    root, device = models.checkpoint_dir(""), models.setup()
    check_recipes(root, device)
    runs = [results_of(seed, root) for seed in SEEDS]
    for seed, run in zip(SEEDS, runs):
        if AGAINST:
            put_against(run, seed)
    first = runs[0]
    figures = {"dataset": first["dataset"], "split": first["split"], "torch": first["torch"], "seeds": [*SEEDS]}
    figures |= {"images": first["test_images"], "against": AGAINST, "models": {}, "distilled_minus_student": {}}
    split, count = first["split"], f"{first['test_images']:,}"
    print(f"\n{first['dataset']}, {count} {split} images, {len(runs)} seeds, torch {first['torch']}\n")
    print(f"{'':12}{'accuracy %':>18}{'loss':>20}{'ECE %':>16}{'agreement %':>18}")
    for name in models.SCRIPTS:
        rows = [run["models"][name] for run in runs]
        columns = (
            f"{mean_and_deviation([scale * row[key] for row in rows], digits):>{width}}"
            for key, scale, digits, width in COLUMNS
        )
        print(f"{name:12}{''.join(columns)}")
        figures["models"][name] = {key: [row[key] for row in rows] for key, *_ in COLUMNS}
    if AGAINST:
        print(f"student: the distilled one in {AGAINST}")
    print(f"\ndistilled - student, paired by seed; 95 % intervals by Student's t over {len(runs)} seeds")
    for key, scale, digits, _ in COLUMNS:
        pairs = [(run["models"]["distilled"][key], run["models"]["student"][key]) for run in runs]
        gains = [scale * (distilled - student) for distilled, student in pairs]
        mean, half = statistics.mean(gains), T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
        single = ", ".join(f"{gain:+.{digits}f}" for gain in gains)
        scaled = {"mean": mean, "ci95": [mean - half, mean + half], "by_seed": gains}  # in the units that are printed
        figures["distilled_minus_student"][key] = scaled
        print(f"{key:24}{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f}): {single}")
    teacher, student, distilled = (statistics.mean(part["accuracy"]) for part in figures["models"].values())
    figures["gap"], figures["gap_closed"] = 100 * (teacher - student), (distilled - student) / (teacher - student)
    print(f"{'gap to the teacher':24}{figures['gap']:.2f} points, of which {figures['gap_closed']:.1%} is closed")
    images = data.load_test(device)
    by_seed = torch.stack([figures_by_image(seed, root, images) for seed in SEEDS])
    _, student, distilled = by_seed.mean(0).double()
    gains = distilled - student
    halves = evaluate.Z * gains.std(1) / gains.shape[1] ** 0.5
    print(f"pooled over the seeds; 95 % intervals over {gains.shape[1]:,} images, for these networks")
    for name, digits, mean, half in zip(("accuracy", "loss"), (2, 4), gains.mean(1).tolist(), halves.tolist()):
        print(f"pooled {name:17}{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})")
        figures["distilled_minus_student"][f"pooled {name}"] = {"mean": mean, "ci95": [mean - half, mean + half]}
    path = root / f"{first['dataset']}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
