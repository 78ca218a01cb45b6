"""tests/draw.py: the learning curves and the pictures."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

import draw
import draw_gains
from matplotlib.figure import Figure

import data
import distill
import evaluate
import models
import train_student
import train_teacher


def with_a_strange_name(split, synthetic=data.synthetic):
    images, labels, classes = synthetic(split)
    return images, labels, ["$_$", *classes[1:]]  # a formula to matplotlib


def test_the_undecided_images_are_those_that_show_most_at_the_temperature():
    right = torch.tensor([[6.0, 3.0, 0.0], [3.0, 2.9, 0.0], [30.0, 0.0, 0.0], [6.0, 4.5, 0.0], [3.0, 6.0, 0.0]])
    students = {"student": right.flip(0), "distilled": right}
    rows = draw.undecided({"teacher": right} | students, torch.zeros(5).long(), ("a", "b", "c"), 2.0)
    seconds = [[(row / t).softmax(0)[1].item() for row in right[:4]] for t in (1, 2)]  # wrong on the last one
    assert [row["image"] for row in rows] == sorted(range(4), key=lambda i: seconds[0][i] - seconds[1][i])
    first = right[rows[0]["image"]]
    assert rows[0]["classes"] == ["a", "b", "c"] and rows[0]["label"] == "a"
    assert rows[0]["shares"]["teacher, T = 2"] == pytest.approx((first / 2).softmax(0).tolist())


def test_only_images_on_which_the_teacher_is_right_are_shown():
    wrong = torch.tensor([[3.0, 2.9, 0.0], [6.0, 3.0, 0.0], [1.0, 2.0, 0.0]])
    rows = draw.undecided(dict.fromkeys(("teacher", "student", "distilled"), wrong), torch.ones(3).long(), "abc", 4.0)
    assert [row["image"] for row in rows] == [2]


def test_names_are_cut_and_letters_that_the_font_has_not_are_replaced(tiny, monkeypatch):
    assert draw.printable("grün & grau") == "grün & grau" and draw.printable("日本 7") == "?? 7"
    long = "a class name " * 6
    assert draw.printable(long) == long[: draw.LONGEST - 1] + "…"
    monkeypatch.setattr(data, "synthetic", lambda split, whole=data.synthetic: (*whole(split)[:2], [long] * 10))
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()
    figures, whole = [], draw.draw
    monkeypatch.setattr(draw, "draw", lambda figure, *given: figures.append(figure) or whole(figure, *given))
    draw.main()
    (figure,) = figures
    for place in (0, 1):  # the row of pictures with their titles, the row of bars with their classes
        row = figure.axes[1 + place * draw.UNDECIDED :][: draw.UNDECIDED]
        edges = [-5, *(edge for axes in row for edge in axes.get_tightbbox().intervalx), figure.bbox.width + 5]
        assert edges == sorted(edges), "names overlap, or leave the picture"


def test_a_folder_where_it_may_not_write_is_one_sentence(tiny, monkeypatch):
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()

    def refused(*arguments):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(models.os, "replace", refused)
    with pytest.raises(SystemExit, match="results.png could not be written .Permission denied.: make room, or change"):
        draw.main()


def test_the_pictures_show_the_figures(tiny, monkeypatch):
    with pytest.raises(SystemExit, match="run python evaluate.py first"):
        draw.main()
    monkeypatch.setattr(data, "synthetic", with_a_strange_name)
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()
    drawn, whole = [], draw.draw
    monkeypatch.setattr(draw, "draw", lambda *given: drawn.append(given) or whole(*given))
    draw.main()
    assert (tiny / "results.png").read_bytes().startswith(b"\x89PNG")
    figure, results, rows, images = drawn[0]
    test = data.load_test("cpu")
    assert results == json.loads((tiny / "results.json").read_text()) and len(rows) == draw.UNDECIDED
    for row in rows:
        assert row["label"] == test.classes[test.labels[row["image"]]] and len(row["classes"]) == 3
        assert list(row["shares"]) == ["teacher", "teacher, T = 4", "student", "distilled"]
        assert row["shares"]["teacher"] == sorted(row["shares"]["teacher"], reverse=True)
    learning, *undecided = figure.axes
    for line, row in zip(learning.get_lines(), results["models"].values(), strict=True):
        assert line.get_ydata().tolist() == [100 * epoch["accuracy"] for epoch in row["curve"]]
    assert len(undecided) == 2 * draw.UNDECIDED
    shares = next(axes for axes in undecided if len(axes.patches) == 12)
    widths = [bar.get_width() for bar in shares.patches]
    assert widths == [100 * share for row in rows[0]["shares"].values() for share in row]
    for count in (0, 1, 2, 3):  # as many test images as that
        whole(fewer := Figure(), results, rows[:count], np.zeros((100, 32, 32, 3)))
        assert len(fewer.axes) == 1 + 2 * count
    monkeypatch.setattr(train_student, "SEED", 1)
    train_student.main()
    with pytest.raises(SystemExit, match="results.json is older than student.pt: run python evaluate.py"):
        draw.main()


def test_the_picture_of_the_gains_is_that_of_the_notes():
    table = "\n## When it pays\n\n| what | gain |\n| --- | --- |\n| a, 5 labels | +0.62 (-0.50 to +1.86) |\n\n"
    notes = f"# Notes\n{table}## Next\n\n| b | +1.00 (+0.50 to +1.50) |\n"
    (row,) = rows = draw_gains.read_gains(notes)
    assert row == ("a, 5 labels", 0.62, -0.5, 1.86)
    draw_gains.draw(figure := Figure(), rows)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.62]
    (interval,) = axes.collections
    assert interval.get_segments()[0][:, 0].tolist() == pytest.approx([-0.5, 1.86])
    assert len(draw_gains.read_gains((draw_gains.TESTS / "experiments.md").read_text(encoding="utf-8"))) > 5
