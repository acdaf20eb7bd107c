"""Larger pictures in the tiny checkpoint's data: where things stand on them, what is asked, what a step holds."""

import sys
from pathlib import Path

import numpy as np
import pytest


SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")
if SCRIPTS not in sys.path:
    sys.path.insert(0, SCRIPTS)

from tiny import data_evaluation, data_material, data_mix, data_tasks, evaluate  # noqa: E402


# Questions are drawn from the number of their row, so old rows keep their places and their questions.
FIRST_ROWS = [
    "emoji_twemoji", "emoji_openmoji", "text", "digit", "scene_colour", "scene_shape", "scene_count",
    "scene_position", "which_2_4", "which_5_8", "which_9_16", "which_other", "scene_describe",
]  # fmt: skip
LONG_ROWS = ["long_text", "long_digit", "long_emoji", "long_scene", "long_which"]


@pytest.fixture(scope="module")
def material() -> data_material.Material:
    try:
        return data_material.load_material()
    except data_material.MaterialMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def picture_tokens(sample: data_tasks.Sample) -> int:
    return sum(picture.shape[0] // 32 * (picture.shape[1] // 32) for picture in sample.pictures)


def test_long_rows_stand_after_the_old_ones_and_count_apart():
    assert list(data_evaluation.TASKS) == FIRST_ROWS + LONG_ROWS
    assert [name for name, task in data_evaluation.TASKS.items() if task.is_long] == LONG_ROWS
    assert not any(task.in_scenes and task.is_long for task in data_evaluation.TASKS.values())


@pytest.mark.parametrize("row", ["long_scene", "long_which"])
def test_long_questions_are_fixed_and_large(row):
    first = data_evaluation.evaluation_set(row, None, 6)
    for one, other in zip(first, data_evaluation.evaluation_set(row, None, 8), strict=False):
        assert one.turns == other.turns
        np.testing.assert_array_equal(one.pictures[0], other.pictures[0])
    fewest, most = (36, 64) if row == "long_scene" else (6 * 9, 12 * 25)
    assert all(fewest <= picture_tokens(sample) <= most for sample in first)
    assert max(picture_tokens(sample) for sample in first) > 48


@pytest.mark.parametrize("row", ["long_text", "long_digit", "long_emoji"])
def test_small_things_on_large_canvases(material, row):
    samples = data_evaluation.evaluation_set(row, material, 6)
    assert all(sample.pictures[0].shape[0] in (192, 256) for sample in samples)
    assert all(len(sample.turns) == 1 for sample in samples)
    if row == "long_text":
        assert all(data_material.text_split(sample.turns[0][1]) == "heldout" for sample in samples)


def test_a_line_on_a_canvas_is_no_larger_than_the_line_and_stands_anywhere(material):
    columns = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sample = data_tasks.text_sample(rng, material, "train", (256, 256), 4, line=(32, 96))
        inked = np.flatnonzero(sample.meta["letters"] >= 0)
        assert 0 < len(inked) <= 110
        columns.append(inked.mean())
    assert min(columns) < 90 and max(columns) > 166


def test_reach_bounds_what_a_digit_takes(material):
    def inked_share(reach: tuple[float, float]) -> float:
        sample = data_tasks.digit_sample(np.random.default_rng(5), material, "train", 256, easy=True, reach=reach)
        picture = sample.pictures[0].astype(int)
        return float((np.abs(picture - picture[0, 0]).sum(-1) > 60).mean())

    # The same digit in the same hand: only its size differs, so its area goes with the square.
    assert inked_share((0.8, 0.8)) / inked_share((0.2, 0.2)) == pytest.approx(16, rel=0.35)


def test_rows_shrink_as_pictures_grow():
    assert [data_mix.rows_of(8, side) for side in (64, 96, 128, 192, 256)] == [8, 8, 4, 2, 2]


def test_sides_start_small_and_grow(rng):
    sides = (64, 96, 128, 192, 256)
    assert {data_mix.draw_side(rng, 0.0, sides) for _ in range(30)} == {64}
    assert {data_mix.draw_side(rng, 1.0, sides) for _ in range(200)} == set(sides)


def test_several_large_pictures_stay_within_the_budget(material, rng):
    for _ in range(12):
        for sample in data_mix.draw_several(rng, material, data_mix.MOST_PICTURES, 1.0):
            patches = 4 * picture_tokens(sample)
            assert sample.task == "clip" or patches <= max(data_mix.MOST_PATCHES, 2 * 100)


def test_a_step_holds_pictures_of_one_size_in_each_group(material):
    tasks, sides = set(), set()
    for seed in range(4):
        difficulty = data_mix.Difficulty(1.0, data_mix.LONGEST_TEXT, 6)
        for samples, vision_only in data_mix.draw_step(np.random.default_rng(seed), material, difficulty):
            shapes = {picture.shape for sample in samples for picture in sample.pictures}
            assert len(shapes) == 1
            sides.add(max(shapes.pop()[:2]))
            tasks |= set() if vision_only else {sample.task for sample in samples}
    assert {"text", "digit", "emoji", "scene"} <= tasks
    assert 256 in sides and 64 in sides


def test_long_rows_are_pooled_on_their_own(monkeypatch):
    def answers(model, processor, samples, options=None):
        return [sample.turns[0][1] if sample.task == "scene" else "nothing" for sample in samples]

    monkeypatch.setattr(evaluate, "answer_samples", answers)
    rows = evaluate.evaluate_model(None, None, ["scene_shape", "long_scene", "long_which"], limit=4)["rows"]
    assert (rows["scenes"]["right"], rows["scenes"]["n"]) == (4, 4)
    assert (rows["long"]["right"], rows["long"]["n"]) == (4, 8)
