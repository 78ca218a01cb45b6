"""tests/seeds.py: its figures against numpy's, and a series that was interrupted or mixes constants."""

import json
import re

import numpy as np
import pytest
import seeds

import distill
import train_student
import train_teacher


def numbers(lines, start):
    """Those in the last line with that start; those before it are evaluate.py's."""
    line = next(line for line in reversed(lines) if line.startswith(start))
    return [float(number) for number in re.findall(r"(?<!\d)[+-]?\d+\.\d+", line)]


@pytest.fixture
def series(tiny, monkeypatch):
    """Two seeds of the tiny networks. Returns a function that runs the series."""
    monkeypatch.setattr(seeds, "SEEDS", range(2))
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "SEED", 0)  # which the series changes

    def run():
        monkeypatch.setenv("CHECKPOINT_DIR", str(tiny.parent))  # which the series changes too
        seeds.main()

    return run


def test_an_interrupted_series_goes_on_and_its_figures_are_right(series, tiny, monkeypatch, capsys):
    student, root = train_student.main, tiny.parent

    def interrupted():
        if train_student.SEED == 1:
            raise KeyboardInterrupt
        student()

    with monkeypatch.context() as patch:
        patch.setattr(train_student, "main", interrupted)
        with pytest.raises(KeyboardInterrupt):
            series()
    made = {path: path.stat().st_mtime_ns for path in root.glob("seed-*/synthetic/*.pt")}
    assert sorted(path.name for path in made) == ["distilled.pt", "student.pt", "teacher.pt", "teacher.pt"]
    capsys.readouterr()
    series()
    told = capsys.readouterr().out.splitlines()
    assert made == {path: path.stat().st_mtime_ns for path in made}, "what was finished has been trained again"

    results = [json.loads((root / f"seed-{seed}/synthetic/results.json").read_text())["models"] for seed in range(2)]
    assert [row["recipe"]["SEED"] for models in results for row in models.values()] == [0, 0, 0, 1, 1, 1]
    right = {name: 100 * np.array([models[name]["accuracy"] for models in results]) for name in results[0]}
    for name, values in right.items():
        expected = [values.mean(), values.std(ddof=1)]
        assert numbers(told, f"{name:12}")[:2] == pytest.approx(expected, abs=0.006), name  # it prints two digits
    gains = right["distilled"] - right["student"]
    half = 12.71 * gains.std(ddof=1) / 2**0.5  # Student's t of one degree of freedom
    expected = [gains.mean(), gains.mean() - half, gains.mean() + half, *gains]
    assert numbers(told, "accuracy ") == pytest.approx(expected, abs=0.006)


def test_a_series_of_other_constants_is_not_mixed_in(series, tiny, monkeypatch):
    seeds.results_of(1, tiny.parent)
    monkeypatch.setattr(distill, "KD_WEIGHT", 0.5)
    with pytest.raises(SystemExit, match="not trained with the same constants"):
        series()
