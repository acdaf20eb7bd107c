"""Conversations to model inputs: the chat template, the tokenizer, and the picture and video processors together."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from .chat_template_qwen3_vl import QWEN3_VL_CHAT_TEMPLATE
from .image_processing_qwen3_vl import Qwen3VLImageProcessor, flatten_pictures
from .video_processing_qwen3_vl import (
    ASSUMED_FPS,
    Qwen3VLVideoProcessor,
    check_sampling,
    flatten_videos,
    warn_unknown_fps,
)


class Qwen3VLProcessorKwargs(ProcessingKwargs, total=False):
    # Transformers 5.20 to 5.22 read the defaults from here, later ones from the processor's attributes.
    _defaults = {
        "text_kwargs": {"return_token_type_ids": False, "return_mm_token_type_ids": True},
        "videos_kwargs": {"return_metadata": True},
    }


def frame_timestamps(indices: Sequence[int] | np.ndarray, fps: float, temporal_patch_size: int = 2) -> list[float]:
    """The time of each temporal patch: the middle between its first and its last frame.

    Args:
        indices (`Sequence[int]`): numbers of the sampled frames; the last one repeats to fill its patch.
        fps (`float`): frames a second of the whole video.
    Returns:
        Seconds, one a temporal patch.
    """
    indices = [int(index) for index in indices]
    indices += indices[-1:] * (-len(indices) % temporal_patch_size)
    firsts, lasts = indices[::temporal_patch_size], indices[temporal_patch_size - 1 :: temporal_patch_size]
    return [(first / fps + last / fps) / 2 for first, last in zip(firsts, lasts, strict=True)]


class Qwen3VLProcessor(ProcessorMixin):
    """Makes everything the model takes from text, pictures and videos; the same as the stock processor makes.

    `from_pretrained(folder)` builds our picture and video processors and the stock tokenizer by itself, whatever is
    registered. A folder without a chat template gets the one of this package. `save_pretrained` writes the official
    class names, and each processor's own file beside `processor_config.json`: stock and serving engines load it.

    Args:
        image_processor (`Qwen3VLImageProcessor`, *optional*), video_processor (`Qwen3VLVideoProcessor`, *optional*):
            with the released settings by default.
        tokenizer: a Qwen tokenizer with the vision tokens.
        chat_template (`str`, *optional*): a Jinja template in place of this package's.
    Raises:
        ValueError: for a tokenizer that lacks a vision token.
    """

    valid_processor_kwargs = Qwen3VLProcessorKwargs
    return_mm_token_type_ids = True
    text_kwargs = {"return_token_type_ids": False}
    videos_kwargs = {"return_metadata": True}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ):
        if tokenizer is None:
            raise ValueError("Qwen3VLProcessor needs a tokenizer; pass AutoTokenizer.from_pretrained(folder).")
        super().__init__(
            image_processor if image_processor is not None else Qwen3VLImageProcessor(),
            tokenizer,
            video_processor if video_processor is not None else Qwen3VLVideoProcessor(),
            chat_template=chat_template if chat_template is not None else QWEN3_VL_CHAT_TEMPLATE,
        )
        spellings = {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }
        for name, spelling in spellings.items():
            token = getattr(tokenizer, f"{name}_token", None) or spelling
            token_id = getattr(tokenizer, f"{name}_token_id", None)
            token_id = tokenizer.convert_tokens_to_ids(token) if token_id is None else token_id
            if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
                raise ValueError(f"the tokenizer has no token {token!r}; use that of a Qwen3-VL or Qwen3 folder.")
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", token_id)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        # Stock looks the class up by name, which fails for video processors where torchvision is missing.
        expected = {"image_processor": ImageProcessingMixin, "video_processor": VideoProcessorMixin}
        expected = expected.get(argument_name, PreTrainedTokenizerBase)
        if not isinstance(argument, expected):
            raise TypeError(f"{argument_name} must be a {expected.__name__}, got {type(argument).__name__}.")
        return expected

    # Loading and saving

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        # Our two processors by name instead of through the Auto classes, which know the stock ones.
        folder = pretrained_model_name_or_path
        return [
            Qwen3VLImageProcessor.from_pretrained(folder, **kwargs),
            AutoTokenizer.from_pretrained(folder, **kwargs),
            Qwen3VLVideoProcessor.from_pretrained(folder, **kwargs),
        ]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        if auto_map := processor_dict.get("auto_map"):
            # Stock drops it here, and a folder saved again would no longer load its own code.
            (loaded[0] if isinstance(loaded, tuple) else loaded).auto_map = auto_map
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Writes tokenizer, chat template, `processor_config.json` and, for older readers, both processors' files."""
        os.makedirs(save_directory, exist_ok=True)
        written = []
        for processor in (self.image_processor, self.video_processor):
            written += processor.save_pretrained(save_directory)
        # A legacy template file left in the folder would win over the one written now.
        legacy = os.path.join(save_directory, "chat_template.json")
        if os.path.isfile(legacy) and isinstance(self.chat_template, str):
            with open(legacy, "w", encoding="utf-8") as file:
                json.dump({"chat_template": self.chat_template}, file, indent=2, ensure_ascii=False)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs) + written

    def _upload_modified_files(
        self, working_dir: str, repo_id: str, files_timestamps: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        # Stock uploads what is newer than its first look at the folder, and these are written before that.
        ours = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")
        others = {name: time for name, time in files_timestamps.items() if name not in ours}
        return super()._upload_modified_files(working_dir, repo_id, others, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "processor_class": "Qwen3VLProcessor"}

    # One call

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict]:
        # Bare pixel bounds mean pictures, as in stock, although our video processor takes the same names.
        bounds = {name: kwargs.pop(name) for name in ("min_pixels", "max_pixels") if name in kwargs}
        if bounds:
            kwargs["images_kwargs"] = {**bounds, **(kwargs.get("images_kwargs") or {})}
        for given in (kwargs, kwargs.get("videos_kwargs") or {}):
            check_sampling(given.get("num_frames"), given.get("fps"))
        return super()._merge_kwargs(*args, **kwargs)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        text = [text] if isinstance(text, str) else text if text is None else list(text)
        return images if images is None else self.image_processor.fetch_images(images), text, videos, audio

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Raises before any work for nothing to do, text that is no text, or placeholders that do not match."""
        if audio is not None or kwargs.get("audios") is not None:
            raise ValueError("Qwen3-VL takes no audio; pass text, images or videos.")
        if text is None and images is None and videos is None:
            raise ValueError("got nothing to process; pass text, images or videos.")
        if text is None:
            return
        if not all(isinstance(sample, str) for sample in text):
            wrong = next(sample for sample in text if not isinstance(sample, str))
            raise ValueError(f"text must be a string or a list of strings, got a {type(wrong).__name__} in it.")
        passed = {
            "image": 0 if images is None else len(flatten_pictures(images)),
            "video": 0 if videos is None else len(flatten_videos(videos)),
        }
        for kind, count in passed.items():
            token = getattr(self, f"{kind}_token")
            asked = sum(sample.count(token) for sample in text)
            if asked != count:
                raise ValueError(
                    f"the text holds {asked} {token} placeholders and {count} {kind}s were passed; write "
                    f"<|vision_start|>{token}<|vision_end|> once for each, or use apply_chat_template."
                )

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        features = self.image_processor(images, **kwargs)
        merge = kwargs.get("merge_size") or self.image_processor.merge_size
        counts = [int(np.prod(np.asarray(grid))) // merge**2 for grid in features["image_grid_thw"]]
        return features, [self.image_token * count for count in counts]

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        features = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        merge = kwargs.get("merge_size") or self.video_processor.merge_size
        depth = kwargs.get("temporal_patch_size") or self.video_processor.temporal_patch_size
        texts = []
        for grid, metadata in zip(features["video_grid_thw"], features["video_metadata"], strict=True):
            count, rows, columns = (int(n) for n in grid)
            texts.append(self.video_text(metadata, count, rows * columns // merge**2, depth))
        return features, texts

    def video_text(
        self, metadata: VideoMetadata, num_patches: int, tokens_each: int, temporal_patch_size: int = 2
    ) -> str:
        """Writes the placeholders of a video: for each temporal patch its time, then its tokens between vision marks.

        Args:
            metadata (`VideoMetadata`): `frames_indices` and `fps`; an unknown `fps` is taken, and noted, as 24.
            num_patches (`int`): temporal patches.
            tokens_each (`int`): tokens of one.
        """
        if metadata.fps is None:
            warn_unknown_fps()
            metadata.fps = ASSUMED_FPS
        times = frame_timestamps(metadata.frames_indices, metadata.fps, temporal_patch_size)
        frame = self.vision_start_token + self.video_token * tokens_each + self.vision_end_token
        return "".join(f"<{seconds:.1f} seconds>{frame}" for seconds in times[:num_patches])

    # The two names that serving engines call on stock processors.

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        grid = np.asarray(image_inputs["image_grid_thw"][image_idx])
        return self.image_token * (int(grid.prod()) // self.image_processor.merge_size**2)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        if "video_metadata" not in video_inputs:
            raise ValueError("time stamps need the video metadata; do not pass return_metadata=False.")
        count, rows, columns = (int(n) for n in video_inputs["video_grid_thw"][video_idx])
        tokens = rows * columns // self.video_processor.merge_size**2
        return self.video_text(
            video_inputs["video_metadata"][video_idx], count, tokens, self.video_processor.temporal_patch_size
        )

    def _calculate_timestamps(self, indices: Any, video_fps: float, merge_size: int = 2) -> list[float]:
        return frame_timestamps(indices, video_fps, merge_size)

    def create_mm_token_type_ids(self, input_ids: Any) -> list[list[int]]:
        """Marks every token: 0 text, 1 picture, 2 video.

        Args:
            input_ids (`list[list[int]]` or an array): one row a sample, of any lengths.
        """
        marked = []
        for row in input_ids:
            ids = np.asarray(row)
            marked.append(((ids == self.image_token_id) + 2 * (ids == self.video_token_id)).tolist())
        return marked

    # Counting

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence | None = None, video_sizes: Sequence | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts tokens from sizes alone; vLLM and Transformers call this by name.

        Args:
            image_sizes (`Sequence[tuple[int, int]]`, *optional*): (height, width) of each picture.
            video_sizes (`Sequence[tuple[int, int, int]]`, *optional*): (frames, height, width) of each sampled clip.
        """
        images_kwargs = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        videos_kwargs = {name: value for name, value in kwargs.items() if name not in ("min_pixels", "max_pixels")}
        videos_kwargs.update(kwargs.get("videos_kwargs") or {})
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            merge = images_kwargs.get("merge_size") or self.image_processor.merge_size
            patches = [self.image_processor.get_number_of_image_patches(*size, images_kwargs) for size in image_sizes]
            counts["num_image_patches"] = patches
            counts["num_image_tokens"] = [count // merge**2 for count in patches]
        if video_sizes is not None:
            merge = videos_kwargs.get("merge_size") or self.video_processor.merge_size
            patches = [self.video_processor.get_num_of_video_patches(*size, videos_kwargs) for size in video_sizes]
            counts["num_video_tokens"] = [count // merge**2 for count in patches]
        return MultiModalData(**counts)

    def count_tokens(
        self, text: str | None = None, images: Any = None, videos: Sequence | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Says what a prompt will cost before making it; pictures are not decoded, only measured.

        Args:
            text (`str`, *optional*): counted as it stands; placeholders in it count one token each and are replaced by
                the pictures' and videos' own counts.
            images (*optional*): pictures, their files, or (height, width) pairs.
            videos (*optional*): (frames, height, width) of sampled clips; their time stamps are not counted.
            kwargs: settings of the call, such as `max_pixels` or `videos_kwargs`.
        Returns:
            `{"text": int, "images": list[int], "videos": list[int], "total": int}`.
        """
        sizes = [picture_size(image) for image in ([] if images is None else _as_list(images))]
        clips = [tuple(clip) for clip in videos or []]
        counted = self._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=clips, **kwargs)
        words = 0
        if text is not None:
            placeholders = len(re.findall(f"{re.escape(self.image_token)}|{re.escape(self.video_token)}", text))
            words = len(self.tokenizer(text)["input_ids"]) - placeholders
        image_tokens, video_tokens = counted["num_image_tokens"], counted["num_video_tokens"]
        total = words + sum(image_tokens) + sum(video_tokens)
        return {"text": words, "images": image_tokens, "videos": video_tokens, "total": total}

    # After generation

    def post_process_image_text_to_text(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Decodes generated ids (batch, tokens), or one row of them, to text."""
        return self.tokenizer.batch_decode(
            generated_outputs,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)) and not all(isinstance(item, int) for item in images):
        return list(images)
    return [images]


def picture_size(image: Any) -> tuple[int, int]:
    """(height, width) of a picture, from the header alone if it is a file; upright by EXIF, as it would be loaded."""
    if isinstance(image, (list, tuple)):
        height, width = image
        return int(height), int(width)
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, (np.ndarray, torch.Tensor)):
        rows = image.shape
        return tuple(rows[-2:]) if len(rows) == 2 or rows[0] in (1, 3, 4) else tuple(rows[:2])
    with Image.open(image) as picture:
        turned = picture.getexif().get(0x0112, 1) >= 5
        return (picture.width, picture.height) if turned else (picture.height, picture.width)
