"""Makes the demo picture and clip of the checkpoint folder and asks about them: `python scripts/tiny/demo_tiny.py`.

Both show a Twemoji on the photo of a cup of coffee that training never saw. The defaults are two that the checkpoint
answers rightly; of ten tried it named all in the picture and seven in the clip.
"""

import argparse
import sys
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "tiny"

import numpy as np
from PIL import Image

from .data_material import find_package, load_material
from .export_tiny import CHECKPOINT


PHOTO = "coffee.png"
PICTURE_SIDE = 128
CLIP_SIDE = 128
CLIP_SECONDS = 3
FRAMES_PER_SECOND = 8


def photo_crop(side: int) -> Image.Image:
    photo = Image.open(find_package("skimage") / "data" / PHOTO).convert("RGB")
    short = min(photo.size)
    return photo.crop((0, 0, short, short)).resize((side, side), Image.Resampling.LANCZOS)


def paste(ground: Image.Image, drawing: np.ndarray, extent: int, left: int, top: int) -> Image.Image:
    picture, emoji = ground.copy(), Image.fromarray(drawing).resize((extent, extent), Image.Resampling.LANCZOS)
    picture.paste(emoji, (left, top), emoji)
    return picture


def write_clip(path: Path, frames: list[Image.Image]) -> None:
    """Writes frames as H.264 in an MP4 file."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = CLIP_SIDE, CLIP_SIDE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def ask(folder: Path, part: dict, question: str) -> str:
    """The greedy answer of the checkpoint to one question about one picture or clip."""
    from .evaluate import load_checkpoint

    model, processor = load_checkpoint(str(folder))
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="peacock", help="emoji in the picture (default: %(default)s)")
    parser.add_argument("--clip-name", default="rooster", help="emoji in the clip (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="where to write and what to ask")
    arguments = parser.parse_args()
    material = load_material()
    drawing, moving = (material.twemoji[material.names.index(n)] for n in (arguments.name, arguments.clip_name))
    picture = paste(photo_crop(PICTURE_SIDE), drawing, 89, 23, 19)
    picture.save(arguments.folder / "demo.png")
    count = CLIP_SECONDS * FRAMES_PER_SECOND
    ground = photo_crop(CLIP_SIDE)
    lefts = np.linspace(0, CLIP_SIDE - 72, count).astype(int)
    clip = arguments.folder / "demo.mp4"
    write_clip(clip, [paste(ground, moving, 72, int(left), 32) for left in lefts])
    print("What is this?", "->", ask(arguments.folder, {"type": "image", "image": picture}, "What is this?"))
    video = {"type": "video", "path": str(clip)}
    print("What is this?", "->", ask(arguments.folder, video, "What is this?"))


if __name__ == "__main__":
    main()
