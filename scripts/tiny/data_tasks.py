"""Questions and answers about drawn pictures: one function a task, each returns a `Sample`.

A sample may hold several turns about the same pictures; the answers of all turns are trained. `split` decides which
words, fonts, digits and photos may be used; the caller's generator decides everything else.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .data_draw import (
    COLOURS,
    SHAPES,
    SceneObject,
    draw_clip,
    draw_digit,
    draw_emoji,
    draw_scene,
    draw_text,
    place_objects,
)
from .data_material import Material, text_split


TEXT_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
EMOJI_QUESTIONS = ("What is this?", "Name the emoji.", "Which emoji is this?", "What does the picture show?")
TEXT_QUESTIONS = ("What does the text say?", "Read the text.", "Which word is this?", "What is written here?")
DIGIT_QUESTIONS = ("Which digit is this?", "Read the digit.", "What digit is written here?", "Which number is this?")
DESCRIBE_QUESTIONS = ("Describe the picture.", "What do you see?", "What is in the picture?")
CLIP_QUESTIONS = ("What is this?", "What moves in the video?", "What does the video show?")
DIRECTION_QUESTION = "Which way does it move?"
CLIP_FRAMES = (3, 6)
MANY_KINDS = ("shape", "emoji", "digit", "word")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("no", "a", "two", "three", "four", "five", "six")
MOST_OBJECTS = 6


@dataclass
class Sample:
    """Pictures (height, width, 3) uint8 and the conversation about them.

    With more than one picture the user's turn says `Picture 1: ` and so on before each, as the chat template does
    under `add_vision_id=True`. With `meta["seconds"]` the pictures are the frames of one video at those times.

    `labels` names each picture in the words a question uses for it, where pictures are to be told apart. `apart` asks
    every turn on its own, as if it were the first: later turns would else find their answers in earlier ones. Pictures
    whose numbers (from 0) are in `worded` are written as their label between the marks of a picture.
    """

    task: str
    pictures: list[np.ndarray]
    turns: list[tuple[str, str]]
    meta: dict = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    apart: bool = False
    worded: frozenset[int] = frozenset()


def pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def with_article(name: str) -> str:
    """`"an" if a vowel follows`: emoji and shape names are answered this way."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def emoji_sample(
    rng: np.random.Generator, material: Material, split: str, side: int = 64, row: int | None = None,
    source: str = "twemoji", reach: tuple[float, float] = (0.55, 1.0),
) -> Sample:  # fmt: skip
    """Names a drawing of `source` ("twemoji" or "openmoji"); class `row`, or a random one."""
    row = int(pick(rng, material.named_rows)) if row is None else row
    picture = draw_emoji(rng, getattr(material, source)[row], side, material, split, reach)
    turns = [(pick(rng, EMOJI_QUESTIONS), with_article(material.names[row]))]
    return Sample("emoji", [picture], turns, {"name": material.names[row], "label": row})


def random_text(rng: np.random.Generator, material: Material, split: str, length: int, made_up: float = 0.3) -> str:
    """A word of `length` letters (lower, Title or UPPER case), or with chance `made_up` a random string."""
    words = _words_by_length(material, split).get(length)
    if words and rng.random() >= made_up:
        word = pick(rng, words)
        case = rng.random()
        return word if case < 0.6 else word.capitalize() if case < 0.8 else word.upper()
    alphabet = TEXT_ALPHABET if rng.random() < 0.5 else pick(rng, ("0123456789", TEXT_ALPHABET[:26]))
    for _ in range(1000):
        text = "".join(pick(rng, alphabet) for _ in range(length))
        if text_split(text) == split:
            return text
    # No single digit falls into the held-out tenth, so very short strings may have to come from all letters.
    return random_text(rng, material, split, length + 1, made_up)


_WORD_TABLES: dict[tuple[int, str], dict[int, list[str]]] = {}


def _words_by_length(material: Material, split: str) -> dict[int, list[str]]:
    key = (id(material), split)
    if key not in _WORD_TABLES:
        table: dict[int, list[str]] = {}
        for word in material.words[split]:
            table.setdefault(len(word), []).append(word)
        _WORD_TABLES[key] = table
    return _WORD_TABLES[key]


def text_sample(
    rng: np.random.Generator, material: Material, split: str, size: tuple[int, int], length: int, made_up: float = 0.3,
    easy: bool = False, line: tuple[int, int] | None = None,
) -> Sample:  # fmt: skip
    """Reads a string of `length` characters on a canvas of `size` (height, width) pixels; `line` as in `draw_text`."""
    text = random_text(rng, material, split, length, made_up)
    picture, letters = draw_text(rng, text, *size, material, split, easy, line)
    return Sample("text", [picture], [(pick(rng, TEXT_QUESTIONS), text)], {"length": len(text), "letters": letters})


def digit_sample(
    rng: np.random.Generator, material: Material, split: str, side: int = 64, easy: bool = False,
    reach: tuple[float, float] = (0.6, 1.0),
) -> Sample:  # fmt: skip
    """Reads one handwritten digit."""
    row = pick(rng, material.digit_indices[split])
    picture = draw_digit(rng, material.digits[row], side, material, split, easy, reach)
    digit = int(material.digit_labels[row])
    return Sample(
        "digit", [picture], [(pick(rng, DIGIT_QUESTIONS), str(digit))], {"label": len(material.names) + digit}
    )


def clip_sample(rng: np.random.Generator, material: Material, split: str, side: int = 64) -> Sample:
    """A short video in which one emoji moves: what it is and where it goes. One frame stands for two equal ones."""
    row = int(pick(rng, material.named_rows))
    count = int(rng.integers(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
    frames, direction = draw_clip(rng, material.twemoji[row], side, count, material, split)
    first, interval = rng.uniform(0.1, 0.6), rng.uniform(0.4, 1.2)
    turns = [(pick(rng, CLIP_QUESTIONS), with_article(material.names[row])), (DIRECTION_QUESTION, direction)]
    if rng.random() < 0.5:
        turns.reverse()
    # Processors differ in whether the marks around the whole video stay, so both are trained.
    meta = {"seconds": [first + interval * number for number in range(count)], "wrapped": bool(rng.random() < 0.7)}
    return Sample("clip", frames, turns, meta)


def colour_turns(rng: np.random.Generator, objects: list[SceneObject], side: int) -> list[tuple[str, str]]:
    once = [item for item in objects if sum(other.shape == item.shape for other in objects) == 1]
    return [(f"What colour is the {item.shape}?", item.colour) for item in once]


def shape_turns(rng: np.random.Generator, objects: list[SceneObject], side: int) -> list[tuple[str, str]]:
    once = [item for item in objects if sum(other.colour == item.colour for other in objects) == 1]
    return [(f"What shape is {item.colour}?", item.shape) for item in once]


def count_turns(rng: np.random.Generator, objects: list[SceneObject], side: int) -> list[tuple[str, str]]:
    by_shape = Counter(item.shape for item in objects)
    by_colour = Counter(item.colour for item in objects)
    shape, colour = pick(rng, sorted(by_shape)), pick(rng, sorted(by_colour))
    other = pick(rng, SHAPES)
    return [
        ("How many shapes are there?", str(len(objects))),
        (f"How many {plural(shape)} are there?", str(by_shape[shape])),
        (f"How many shapes are {colour}?", str(by_colour[colour])),
        (f"How many {plural(other)} are there?", str(by_shape[other])),
    ]


def place_of(item: SceneObject, side: int) -> str | None:
    """The corner that an object stands in, or `None` near the middle lines."""
    if min(abs(item.x - side / 2), abs(item.y - side / 2)) <= 0.08 * side:
        return None
    return PLACES[(item.x > side / 2) + 2 * (item.y > side / 2)]


def position_turns(rng: np.random.Generator, objects: list[SceneObject], side: int) -> list[tuple[str, str]]:
    """Corner of one object, and left/right or above/below of two; near ties are not asked."""
    names = Counter(item.name for item in objects)
    unique = [item for item in objects if names[item.name] == 1]
    places = [(item, place_of(item, side)) for item in unique]
    turns = [(f"Where is the {item.name}?", place) for item, place in places if place]
    for first in unique:
        for second in unique:
            if first is second:
                continue
            if abs(first.x - second.x) > 0.15 * side:
                answer = "left" if first.x < second.x else "right"
                turns.append((f"Is the {first.name} left or right of the {second.name}?", answer))
            if abs(first.y - second.y) > 0.15 * side:
                answer = "above" if first.y < second.y else "below"
                turns.append((f"Is the {first.name} above or below the {second.name}?", answer))
    return turns


def describe_turns(rng: np.random.Generator, objects: list[SceneObject], side: int) -> list[tuple[str, str]]:
    """Everything there is, from left to right, equal things counted together where the first one stands."""
    counts = Counter(item.name for item in sorted(objects, key=lambda item: item.x))
    parts = [with_article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}" for name, n in counts.items()]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [(pick(rng, DESCRIBE_QUESTIONS), text)]


SCENE_TURNS = {
    "colour": colour_turns,
    "shape": shape_turns,
    "count": count_turns,
    "position": position_turns,
    "describe": describe_turns,
}


def random_objects(rng: np.random.Generator, count: int, side: int) -> list[SceneObject]:
    """`count` shapes, of few kinds every other time, so that counts above one occur."""
    shapes = list(rng.choice(SHAPES, int(rng.integers(1, 4)) if rng.random() < 0.5 else len(SHAPES), replace=False))
    colours = list(rng.choice(list(COLOURS), int(rng.integers(1, 4)) if rng.random() < 0.4 else 10, replace=False))
    return place_objects(rng, [(str(pick(rng, shapes)), str(pick(rng, colours))) for _ in range(count)], side)


def scene_sample(
    rng: np.random.Generator, side: int, most: int = MOST_OBJECTS, kinds: tuple[str, ...] = (), turns: int = 3
) -> Sample:
    """A scene of 1 to `most` shapes and up to `turns` questions of the given `kinds` (all kinds when empty).

    Draws again until at least one question of the first kind can be asked, so a single kind always gets its turn.
    """
    order = list(kinds) or [str(kind) for kind in rng.permutation(list(SCENE_TURNS))]
    for _ in range(100):
        objects = random_objects(rng, int(rng.integers(1, most + 1)), side)
        asked: list[tuple[str, str]] = []
        used: list[str] = []
        for kind in (order * turns)[: 2 * turns]:
            choices = [turn for turn in SCENE_TURNS[kind](rng, objects, side) if turn not in asked]
            if choices and len(asked) < turns:
                asked.append(pick(rng, choices))
                used.append(kind)
        if asked and used[0] == order[0]:
            meta = {"kinds": used, "objects": objects}
            return Sample("scene", [draw_scene(rng, objects, side)], asked, meta)
    raise RuntimeError(f"no scene of up to {most} objects has a question of kind {order[0]}")


def many_sample(
    rng: np.random.Generator, material: Material | None, split: str, pictures: int, side: int = 64, turns: int = 3,
    kind: str | None = None, find_first: bool = False,
) -> Sample:  # fmt: skip
    """`pictures` different small pictures and questions which of them shows something, or what one of them shows.

    Args:
        kind: what the pictures show (`MANY_KINDS`), or a random kind; only "shape" works without `material`.
        find_first: ask "Which of the N pictures ..." in the first turn, as the evaluation does.
    """
    kind = kind or pick(rng, MANY_KINDS)
    if kind == "digit":
        pictures = min(pictures, 10)
    drawn, labels = [], []
    if kind == "shape":
        names = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        chosen = [names[row] for row in rng.permutation(len(names))[:pictures]]
        for shape, colour in chosen:
            objects = place_objects(rng, [(shape, colour)], side, largest=0.42)
            drawn.append(draw_scene(rng, objects, side))
            labels.append(with_article(f"{colour} {shape}"))
    elif kind == "emoji":
        for row in rng.choice(material.named_rows, pictures, replace=False):
            drawn.append(draw_emoji(rng, material.twemoji[row], side, material, split))
            labels.append(with_article(material.names[row]))
    elif kind == "digit":
        for digit in rng.permutation(10)[:pictures]:
            rows = material.digit_indices[split]
            row = pick(rng, rows[material.digit_labels[rows] == digit])
            drawn.append(draw_digit(rng, material.digits[row], side, material, split))
            labels.append(f"the digit {digit}")
    else:
        while len(labels) < pictures:
            text = random_text(rng, material, split, int(rng.integers(2, 6)))
            if f"the word {text}" not in labels:
                drawn.append(draw_text(rng, text, side, side, material, split)[0])
                labels.append(f"the word {text}")
    asked = []
    for turn in range(turns):
        index = int(rng.integers(pictures))
        if (find_first and turn == 0) or rng.random() < 0.7:
            question = (f"Which of the {pictures} pictures shows {labels[index]}?", str(index + 1))
        else:
            question = (f"What does picture {index + 1} show?", labels[index])
        if question not in asked:
            asked.append(question)
    return Sample("many", drawn, asked, {"kind": kind, "pictures": pictures}, labels)
