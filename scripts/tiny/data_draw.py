"""Draws single training pictures: an emoji, a word, a digit or a scene of shapes on a plain or photographic ground.

Every function takes a `numpy.random.Generator`; pictures are RGB arrays (height, width, 3) uint8.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .data_material import Material


COLOURS = {
    "red": (214, 30, 36),
    "green": (34, 150, 60),
    "blue": (36, 72, 214),
    "yellow": (246, 214, 30),
    "orange": (246, 134, 20),
    "purple": (126, 42, 166),
    "pink": (250, 150, 196),
    "brown": (118, 70, 36),
    "black": (16, 16, 18),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
REFERENCE_FONT_SIZE = 40
# Least difference in luminance between ink and ground.
CONTRAST = 0.38
EASY_CONTRAST = 0.6


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape; `x`, `y` (centre) and `radius` are in pixels of its canvas."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def luminance(colour: np.ndarray | tuple) -> float:
    """Perceived brightness of an RGB colour (0 to 255 each), as 0 to 1."""
    red, green, blue = (float(value) for value in colour[:3])
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def plain_ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)).copy()


def draw_ground(
    rng: np.random.Generator, height: int, width: int, material: Material | None, split: str
) -> np.ndarray:
    """A background: half plain, the rest a gradient or (with material) a crop of a photo."""
    kind = rng.random()
    if kind < 0.5 or (material is None and kind < 0.75):
        return plain_ground(rng, height, width)
    if kind < 0.65 or material is None:
        first, second = rng.integers(0, 256, (2, 3)).astype(np.float32)
        extent = width if rng.random() < 0.5 else height
        ramp = np.linspace(0, 1, extent, dtype=np.float32)
        ramp = ramp[None, :, None] if extent == width else ramp[:, None, None]
        ground = np.broadcast_to(first + (second - first) * ramp, (height, width, 3))
        return ground.astype(np.uint8)
    photos = material.photos[split]
    photo = photos[rng.integers(len(photos))]
    top = int(rng.integers(0, photo.shape[0] - height + 1))
    left = int(rng.integers(0, photo.shape[1] - width + 1))
    crop = photo[top : top + height, left : left + width]
    return crop[:, ::-1].copy() if rng.random() < 0.5 else crop.copy()


def add_noise(rng: np.random.Generator, picture: np.ndarray, strongest: float = 8.0) -> np.ndarray:
    """Adds Gaussian noise with a random deviation up to `strongest` grey levels, to every other picture."""
    if rng.random() < 0.5:
        return picture
    deviation = rng.uniform(0, strongest)
    noise = rng.standard_normal(picture.shape[:2], dtype=np.float32)[:, :, None] * deviation
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def draw_emoji(
    rng: np.random.Generator, drawing: np.ndarray, side: int, material: Material, split: str,
    reach: tuple[float, float] = (0.55, 1.0),
) -> np.ndarray:  # fmt: skip
    """Pastes an RGBA `drawing` at a random size (`reach`, shares of `side`), angle (to 15°), place and brightness."""
    extent = int(side * rng.uniform(*reach))
    emoji = Image.fromarray(drawing)
    angle = rng.uniform(-15, 15) if rng.random() < 0.5 else 0.0
    if angle:
        emoji = emoji.rotate(angle, Image.Resampling.BILINEAR)
    emoji = np.asarray(emoji.resize((extent, extent), Image.Resampling.BILINEAR), np.float32)
    colour = np.clip(emoji[:, :, :3] * rng.uniform(0.85, 1.1) + rng.uniform(-12, 12), 0, 255)
    alpha = emoji[:, :, 3:] / 255
    ground = draw_ground(rng, side, side, material, split)
    top, left = (int(value) for value in rng.integers(0, side - extent + 1, 2))
    region = ground[top : top + extent, left : left + extent]
    ground[top : top + extent, left : left + extent] = (region + (colour - region) * alpha).astype(np.uint8)
    return add_noise(rng, ground)


def draw_clip(
    rng: np.random.Generator, drawing: np.ndarray, side: int, frames: int, material: Material, split: str
) -> tuple[list[np.ndarray], str]:
    """An RGBA `drawing` that crosses a still ground in a straight line; returns the frames and its direction."""
    extent = int(side * rng.uniform(0.45, 0.65))
    emoji = np.asarray(Image.fromarray(drawing).resize((extent, extent), Image.Resampling.BILINEAR), np.float32)
    ground = draw_ground(rng, side, side, material, split)
    direction = ("left", "right", "up", "down")[rng.integers(4)]
    reach = side - extent
    travel = np.linspace(0, 1, frames) * rng.uniform(0.7, 1.0) * reach
    along = reach - travel if direction in ("left", "up") else travel
    across = rng.uniform(0, reach)
    pictures = []
    for place in along:
        left, top = (place, across) if direction in ("left", "right") else (across, place)
        left, top = int(left), int(top)
        picture = ground.copy()
        region = picture[top : top + extent, left : left + extent]
        mixed = region + (emoji[:, :, :3] - region) * (emoji[:, :, 3:] / 255)
        picture[top : top + extent, left : left + extent] = mixed.astype(np.uint8)
        pictures.append(picture)
    return pictures, direction


def draw_digit(
    rng: np.random.Generator, digit: np.ndarray, side: int, material: Material, split: str, easy: bool = False,
    reach: tuple[float, float] = (0.6, 1.0),
) -> np.ndarray:  # fmt: skip
    """Inks a 28×28 `digit` at a random size (`reach`, shares of `side`), angle, shear and contrasting colour.

    `easy` gives a plain ground, strong contrast and no noise.
    """
    extent = int(side * rng.uniform(*reach))
    angle, shear, stretch = math.radians(rng.uniform(-15, 15)), rng.uniform(-0.25, 0.25), rng.uniform(0.85, 1.15)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = np.array([[cosine * stretch, -sine + shear], [sine, cosine / stretch]])
    shift = np.array([13.5, 13.5]) - matrix @ np.array([13.5, 13.5])
    ink = Image.fromarray(digit).transform(
        (28, 28), Image.Transform.AFFINE, (*matrix[0], shift[0], *matrix[1], shift[1]), Image.Resampling.BILINEAR
    )
    alpha = np.asarray(ink.resize((extent, extent), Image.Resampling.BICUBIC), np.float32)[:, :, None] / 255
    ground = plain_ground(rng, side, side) if easy else draw_ground(rng, side, side, material, split)
    top, left = (int(value) for value in rng.integers(0, side - extent + 1, 2))
    region = ground[top : top + extent, left : left + extent]
    colour = contrasting_colour(rng, region.reshape(-1, 3).mean(0), EASY_CONTRAST if easy else CONTRAST)
    ground[top : top + extent, left : left + extent] = (region + (colour - region) * alpha).astype(np.uint8)
    return ground if easy else add_noise(rng, ground)


def contrasting_colour(rng: np.random.Generator, against: np.ndarray, difference: float = CONTRAST) -> np.ndarray:
    """A random RGB colour (float32) whose luminance differs from that of `against` by at least `difference`."""
    for _ in range(20):
        colour = rng.integers(0, 256, 3).astype(np.float32)
        if abs(luminance(colour) - luminance(against)) >= difference:
            return colour
    return np.full(3, 0.0 if luminance(against) > 0.5 else 255.0, np.float32)


@functools.lru_cache(maxsize=4096)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def draw_text(
    rng: np.random.Generator, text: str, height: int, width: int, material: Material, split: str, easy: bool = False,
    line: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Renders `text` in a random font of `split`, turned up to 4°.

    Args:
        easy: a plain ground, strong contrast, no turn, blur or noise.
        line: (height, width) of which the text fills 65 to 95 % one way; the canvas when `None`. A text on a larger
            canvas stands anywhere on it.

    Returns:
        The picture, and for each of its columns (width,) the index of the letter that stands there, or -1.
    """
    groups = material.fonts[split]
    group = groups[rng.integers(len(groups))]
    path = group[rng.integers(len(group))]
    left, top, right, bottom = load_font(path, REFERENCE_FONT_SIZE).getbbox(text)
    line_height, line_width = line or (height, width)
    fit = min(0.95 * line_width / max(right - left, 1), 0.85 * line_height / max(bottom - top, 1))
    size = int(REFERENCE_FONT_SIZE * fit * rng.uniform(0.7, 1.0))
    font = load_font(path, max(9, min(size, 120)))
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (width, height))
    x = rng.uniform(0, max(width - (right - left), 0)) - left
    y = rng.uniform(0, max(height - (bottom - top), 0)) - top
    ImageDraw.Draw(mask).text((x, y), text, fill=255, font=font)
    edges = [x + font.getlength(text[:count]) for count in range(len(text) + 1)]
    letters = np.searchsorted(edges, np.arange(width) + 0.5) - 1
    letters[letters == len(text)] = -1
    if not easy and rng.random() < 0.4:
        centre = None if line is None else (x + (left + right) / 2, y + (top + bottom) / 2)
        mask = mask.rotate(rng.uniform(-4, 4), Image.Resampling.BILINEAR, center=centre)
    if not easy and rng.random() < 0.2:
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    ground = plain_ground(rng, height, width) if easy else draw_ground(rng, height, width, material, split)
    ground = ground.astype(np.float32)
    if not easy and ground.std(axis=(0, 1)).mean() > 30 and rng.random() < 0.7:
        # A busy photo hides letters of any colour, so they get a plate or a calmer ground, as signs do.
        plate = rng.integers(0, 256, 3).astype(np.float32)
        ground += (plate - ground) * rng.uniform(0.5, 1.0)
    alpha = np.asarray(mask, np.float32)[:, :, None] / 255
    # On a large canvas the letters have to stand out from what is behind them.
    behind = ground if line is None else ground[alpha[:, :, 0].max(1) > 0][:, alpha[:, :, 0].max(0) > 0]
    colour = contrasting_colour(rng, behind.reshape(-1, 3).mean(0), EASY_CONTRAST if easy else CONTRAST)
    picture = (ground + (colour - ground) * alpha).astype(np.uint8)
    return picture if easy else add_noise(rng, picture), letters


def shape_outline(shape: str, x: float, y: float, radius: float, angle: float = 0.0) -> list[tuple[float, float]]:
    """Corner points of a shape around (x, y); angles in radians, `radius` reaches the outermost corner."""
    if shape in ("circle", "ring"):
        turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        points = np.stack([np.cos(turns), np.sin(turns)], 1) * 0.92
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.78
    elif shape == "triangle":
        turns = -math.pi / 2 + np.arange(3) * 2 * math.pi / 3
        points = np.stack([np.cos(turns), np.sin(turns) + 0.2], 1)
    elif shape == "star":
        turns = -math.pi / 2 + np.arange(10) * math.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        points = np.stack([np.cos(turns) * reach, np.sin(turns) * reach], 1)
    elif shape == "diamond":
        points = np.array([(0, -1), (0.7, 0), (0, 1), (-0.7, 0)])
    elif shape == "cross":
        a, b = 0.32, 0.92
        points = np.array(
            [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ]
        )
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([16 * np.sin(t) ** 3 / 17, down / 17], 1)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    cosine, sine = math.cos(angle), math.sin(angle)
    points = points @ np.array([[cosine, sine], [-sine, cosine]]) * radius + (x, y)
    return [tuple(point) for point in points]


def place_objects(
    rng: np.random.Generator, names: list[tuple[str, str]], side: int, largest: float = 0.3
) -> list[SceneObject]:
    """Places (shape, colour) pairs on a square canvas without overlap; radii shrink until all of them fit."""
    fraction = rng.uniform(0.7, 1.0) * min(largest, 0.44 / math.sqrt(len(names)))
    for _ in range(60):
        objects = []
        for shape, colour in names:
            radius = side * fraction * rng.uniform(0.85, 1.0)
            for _ in range(25):
                x, y = rng.uniform(radius + 1, side - radius - 1, 2)
                if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + 1 for o in objects):
                    objects.append(SceneObject(shape, colour, x, y, radius))
                    break
            else:
                break
        if len(objects) == len(names):
            return objects
        fraction *= 0.95
    raise RuntimeError(f"could not place {len(names)} objects on {side} pixels")


def draw_scene(rng: np.random.Generator, objects: list[SceneObject], side: int) -> np.ndarray:
    """Draws the objects on a plain or softly graded ground whose colour none of them has."""
    taken = np.array([COLOURS[item.colour] for item in objects], np.float32)
    for _ in range(50):
        ground = rng.integers(0, 256, 3).astype(np.float32)
        if np.abs(taken - ground).sum(1).min() > 150:
            break
    canvas = Image.new("RGB", (2 * side, 2 * side), tuple(int(value) for value in ground))
    pen = ImageDraw.Draw(canvas)
    for item in objects:
        tint = np.clip(np.array(COLOURS[item.colour]) + rng.uniform(-14, 14, 3), 0, 255).astype(int)
        angle = rng.uniform(-0.2, 0.2) if rng.random() < 0.5 else 0.0
        pen.polygon(shape_outline(item.shape, 2 * item.x, 2 * item.y, 2 * item.radius, angle), fill=tuple(tint))
        if item.shape == "ring":
            hole = shape_outline("circle", 2 * item.x, 2 * item.y, 1.1 * item.radius)
            pen.polygon(hole, fill=tuple(int(value) for value in ground))
    return add_noise(rng, np.asarray(canvas.resize((side, side), Image.Resampling.BOX)))
