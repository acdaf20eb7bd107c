"""The real material of the tiny checkpoint: drawings, digits, photos, fonts and words, with their fixed splits.

`fetch.py` puts the packages under `.cache/material/x`; `prepare_material` turns them once into arrays under
`.cache/tiny/material`; `load_material` maps those. What is held out is decided here and nowhere else.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = REPOSITORY / ".cache" / "material" / "x"
PREPARED = REPOSITORY / ".cache" / "tiny" / "material"

EMOJI_SIZE = 64
PHOTO_SIDE = 256
HELDOUT_PHOTOS = {"chelsea", "coffee", "flower", "rocket"}
SKIPPED_EMOJI_CATEGORIES = {"Flags", "Component"}
# The classes that are trained and asked: things one can draw. Faces, symbols and the rest of the list stay out, as
# the first training run had a third of a two-core machine for two hours.
NAMED_CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities")

# Families that share a drawing stand in one group, so that no held-out font is a twin of a training font: Carlito is
# Lato with other metrics, Liberation is Croscore, Hack comes from DejaVu, URW and TeX Gyre share outlines.
FONT_GROUPS = {
    "dejavu": ("DejaVuSans", "DejaVuSerif", "Hack-"),
    "croscore": ("Liberation", "Arimo", "Tinos", "Cousine"),
    "urw": ("FreeSans", "FreeSerif", "FreeMono", "Nimbus", "C059", "P052", "URW", "texgyre"),
    "noto": ("NotoSans-", "NotoSerif-", "OpenSans"),
    "roboto": ("Roboto",),
    "libertine": ("LinLibertine", "LinBiolinum"),
    "comic": ("ComicNeue",),
    "inconsolata": ("Inconsolata",),
    "fira": ("FiraCode",),
    "quicksand": ("Quicksand",),
    "didot": ("GFSDidot",),
    "oldstandard": ("OldStandard",),
    "garamond": ("EBGaramond",),
    "yanone": ("YanoneKaffeesatz",),
    "junction": ("Junction",),
    "lato": ("Lato-", "Carlito"),
    "cantarell": ("Cantarell",),
    "caladea": ("Caladea",),
    "vollkorn": ("Vollkorn",),
    "play": ("Play-",),
}
HELDOUT_FONT_GROUPS = {"lato", "cantarell", "caladea", "vollkorn", "play"}
# Symbol fonts, small capitals and hairlines: their pictures are not readable as the letters they stand for.
SKIPPED_FONT_PARTS = (
    "dingbats", "symbol", "d050", "standardsymbols", "chorus", "z003", "_s", "_m", "smallcaps", "sc-", "hairline",
    "thin", "biolinum_k", "initials", "math", "extralight", "libertinei_", "linlibertine_i", "linlibertine_dr",
    "-swashes",
)  # fmt: skip


class MaterialMissingError(RuntimeError):
    """Raised when the prepared arrays are absent; the message says which command makes them."""


@dataclass
class Material:
    """Everything that is drawn from, in memory.

    Attributes:
        names (`list[str]`): the class list, one lower-case CLDR short name per drawing.
        categories (`list[str]`): the emoji category of each class.
        twemoji, openmoji (`np.ndarray`, (classes, 64, 64, 4), uint8): RGBA drawings, one row per name.
        digits (`np.ndarray`, (10000, 28, 28), uint8) and digit_labels (`np.ndarray`, (10000,), int64).
        photos (`dict[str, np.ndarray]`): for "train" and "heldout", (crops, 256, 256, 3) uint8.
        fonts (`dict[str, list[list[str]]]`): for each split, font files by group; a group is drawn first.
        words (`dict[str, list[str]]`): for each split, lower-case words of 3 to 12 letters.
    """

    names: list[str]
    categories: list[str]
    twemoji: np.ndarray
    openmoji: np.ndarray
    digits: np.ndarray
    digit_labels: np.ndarray
    photos: dict[str, np.ndarray]
    fonts: dict[str, list[list[str]]]
    words: dict[str, list[str]]

    @functools.cached_property
    def named_rows(self) -> np.ndarray:
        """Rows of the classes that are trained and asked, in Unicode order."""
        return np.flatnonzero([category in NAMED_CATEGORIES for category in self.categories])

    @functools.cached_property
    def digit_indices(self) -> dict[str, np.ndarray]:
        """Row numbers by split: within each class the first 80 % train, the rest is held out."""
        by_class = [np.flatnonzero(self.digit_labels == digit) for digit in range(10)]
        train = [rows[: int(0.8 * len(rows))] for rows in by_class]
        heldout = [rows[int(0.8 * len(rows)) :] for rows in by_class]
        return {"train": np.concatenate(train), "heldout": np.concatenate(heldout)}


def text_split(text: str) -> str:
    """`"heldout"` for one string in ten, by hash; case does not matter, so no word is in both splits."""
    return "heldout" if int(hashlib.sha1(text.lower().encode()).hexdigest(), 16) % 10 == 0 else "train"


def clean_name(annotation: str) -> str:
    """Lower-case ASCII form of a CLDR short name."""
    return (
        annotation.lower().replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace("ñ", "n").strip()
    )


def find_package(prefix: str) -> Path:
    """The unpacked folder whose name starts with `prefix`. Raises `MaterialMissingError` when it was not fetched."""
    found = sorted(PACKAGES.glob(f"{prefix}*"))
    if not found:
        raise MaterialMissingError(f"{prefix} is not under {PACKAGES}; run `python scripts/tiny/fetch.py` first.")
    return found[0]


def _emoji_classes() -> list[dict]:
    """One row per class: every Twemoji of a single code point that is no flag and no component, in Unicode order."""
    entries = json.loads((find_package("emoji-datasource-twitter") / "package" / "emoji.json").read_text())
    annotations = {
        entry["hexcode"]: entry["annotation"]
        for entry in json.loads((find_package("openmoji") / "package" / "data" / "openmoji.json").read_text())
    }
    classes, seen = [], set()
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        hexcode = entry["unified"].replace("-FE0F", "")
        if not entry["has_img_twitter"] or "-" in hexcode or entry["category"] in SKIPPED_EMOJI_CATEGORIES:
            continue
        name = clean_name(annotations.get(hexcode, ""))
        if name and name.isascii() and name not in seen:
            seen.add(name)
            classes.append({"name": name, "category": entry["category"], "image": entry["image"], "hexcode": hexcode})
    return classes


def _prepare_emoji() -> None:
    import resvg_py

    classes = _emoji_classes()
    pictures = find_package("emoji-datasource-twitter") / "package" / "img" / "twitter" / "64"
    drawings = find_package("openmoji") / "package" / "color" / "svg"
    twemoji = np.zeros((len(classes), EMOJI_SIZE, EMOJI_SIZE, 4), np.uint8)
    openmoji = np.zeros_like(twemoji)
    for row, entry in enumerate(classes):
        picture = Image.open(pictures / entry["image"]).convert("RGBA")
        twemoji[row] = np.asarray(picture.resize((EMOJI_SIZE, EMOJI_SIZE)))
        openmoji[row] = _render_svg(resvg_py, drawings / f"{entry['hexcode']}.svg")
    np.save(PREPARED / "twemoji.npy", twemoji)
    np.save(PREPARED / "openmoji.npy", openmoji)
    rows = [{"name": entry["name"], "category": entry["category"]} for entry in classes]
    (PREPARED / "emoji.json").write_text(json.dumps(rows, indent=0))


def _render_svg(resvg_py, path: Path) -> np.ndarray:
    import base64
    import io

    data = resvg_py.svg_to_bytes(svg_path=str(path), width=2 * EMOJI_SIZE, height=2 * EMOJI_SIZE)
    data = base64.b64decode(data) if isinstance(data, str) else bytes(data)
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(picture.resize((EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.LANCZOS))


def _prepare_digits() -> None:
    folder = find_package("mnist") / "package" / "src" / "digits"
    digits, labels = [], []
    for digit in range(10):
        values = np.asarray(json.loads((folder / f"{digit}.json").read_text())["data"], np.float32)
        pictures = (values.reshape(-1, 28, 28) * 255).round().astype(np.uint8)
        digits.append(pictures)
        labels.append(np.full(len(pictures), digit))
    np.save(PREPARED / "digits.npy", np.concatenate(digits))
    np.save(PREPARED / "digit_labels.npy", np.concatenate(labels))


def _prepare_photos() -> None:
    folder = find_package("skimage") / "data"
    names = (
        "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "brick.png",
        "grass.png", "gravel.png", "motorcycle_left.png", "camera.png", "coins.png", "moon.png", "retina.jpg",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    crops = {"train": [], "heldout": []}
    for name in names:
        photo = Image.open(folder / name).convert("RGB")
        split = "heldout" if name.split(".")[0] in HELDOUT_PHOTOS else "train"
        for _ in range(16):
            side = int(rng.uniform(0.35, 1.0) * min(photo.size))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
            crop = photo.crop((left, top, left + side, top + side)).resize((PHOTO_SIDE, PHOTO_SIDE))
            crops[split].append(np.asarray(crop))
    for split, rows in crops.items():
        np.save(PREPARED / f"photos_{split}.npy", np.stack(rows))


def _prepare_fonts_and_words() -> None:
    debs = find_package("debs")
    files = sorted(path for pattern in ("*.ttf", "*.otf") for path in debs.rglob(pattern))
    fonts = {"train": {}, "heldout": {}}
    for path in files:
        if any(part in path.name.lower() for part in SKIPPED_FONT_PARTS):
            continue
        for group, prefixes in FONT_GROUPS.items():
            if path.name.startswith(prefixes):
                split = "heldout" if group in HELDOUT_FONT_GROUPS else "train"
                fonts[split].setdefault(group, []).append(str(path.relative_to(REPOSITORY)))
    words = {"train": [], "heldout": []}
    for word in (debs / "usr" / "share" / "dict" / "american-english").read_text().split():
        if word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 12:
            words[text_split(word)].append(word)
    (PREPARED / "fonts.json").write_text(json.dumps({split: list(groups.values()) for split, groups in fonts.items()}))
    (PREPARED / "words.json").write_text(json.dumps(words))


def prepare_material() -> None:
    """Writes the arrays once (about 40 s, 50 MB). Raises `MaterialMissingError` when a package was not fetched."""
    PREPARED.mkdir(parents=True, exist_ok=True)
    _prepare_emoji()
    _prepare_digits()
    _prepare_photos()
    _prepare_fonts_and_words()
    (PREPARED / "done").touch()


@functools.cache
def load_material() -> Material:
    """Loads what `prepare_material` wrote. Raises `MaterialMissingError` when that was never run."""
    if not (PREPARED / "done").exists():
        raise MaterialMissingError(f"{PREPARED} is empty; run `python scripts/tiny/fetch.py` first.")
    emoji = json.loads((PREPARED / "emoji.json").read_text())
    fonts = json.loads((PREPARED / "fonts.json").read_text())
    return Material(
        names=[entry["name"] for entry in emoji],
        categories=[entry["category"] for entry in emoji],
        twemoji=np.load(PREPARED / "twemoji.npy"),
        openmoji=np.load(PREPARED / "openmoji.npy"),
        digits=np.load(PREPARED / "digits.npy"),
        digit_labels=np.load(PREPARED / "digit_labels.npy"),
        photos={split: np.load(PREPARED / f"photos_{split}.npy") for split in ("train", "heldout")},
        fonts={
            split: [[str(REPOSITORY / path) for path in group] for group in groups] for split, groups in fonts.items()
        },
        words=json.loads((PREPARED / "words.json").read_text()),
    )
