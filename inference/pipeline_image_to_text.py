"""`pipeline("image-to-text")`: one caption for each picture, without a prompt.

Transformers 5 turned that task into `image-text-to-text`, which insists on a text. Here the question is a default.
This file is part of the Hub copy and imports Transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import ImageTextToTextPipeline


DEFAULT_PROMPT = "Describe this image."


class Qwen3VLImageToTextPipeline(ImageTextToTextPipeline):
    """Describes pictures: `pipe("cat.jpg")` gives `[{"generated_text": "A cat ..."}]`.

    Pictures are paths, URLs or `PIL.Image` objects; a list gives one result list for each. A chat (a list of
    dictionaries with `role` and `content`) is answered as the `image-text-to-text` pipeline does.
    """

    def __call__(self, images: Any = None, prompt: str | None = None, **kwargs: Any) -> list[Any]:
        """Answers `prompt` (default: asks for a description) about each picture.

        Raises:
            ValueError: if no picture is given.
        """
        if images is None:
            images = kwargs.pop("inputs", None)
        if images is None or (isinstance(images, (list, tuple)) and not images):
            raise ValueError("image-to-text needs at least one picture: a path, a URL or a PIL image.")
        if _is_chat(images) or "text" in kwargs:
            return super().__call__(images, **kwargs)
        single = not isinstance(images, (list, tuple))
        chats = [_caption_request(image, prompt or DEFAULT_PROMPT) for image in ([images] if single else images)]
        # One at a time: the parent would pad pictures of different sizes into one batch only when asked to.
        results = [_only_text(super(Qwen3VLImageToTextPipeline, self).__call__(chat, **kwargs)) for chat in chats]
        return results[0] if single else results


def _is_chat(images: Any) -> bool:
    first = images[0] if isinstance(images, (list, tuple)) else images
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    return isinstance(first, dict) and "role" in first


def _caption_request(image: Any, prompt: str) -> list[dict[str, Any]]:
    picture = {"type": "image", "url" if isinstance(image, str) else "image": image}
    return [{"role": "user", "content": [picture, {"type": "text", "text": prompt}]}]


def _only_text(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # With a chat the parent gives back the whole conversation; the caption is its last turn.
    return [{"generated_text": _last_turn(output["generated_text"])} for output in outputs]


def _last_turn(generated: Any) -> str:
    return generated if isinstance(generated, str) else generated[-1]["content"]
