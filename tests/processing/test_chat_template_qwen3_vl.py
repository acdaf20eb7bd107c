"""The chat template: texts that the published template gives, written out, and a digest of many more of them."""

import hashlib
import itertools

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwen3_vl.processing.chat_template_qwen3_vl import QWEN3_VL_CHAT_TEMPLATE


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für <Ort>", "parameters": {"type": "object"}},
}
TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
WEATHER_LINE = (
    '{"type": "function", "function": {"name": "weather", "description": "Wetter für <Ort>", '
    '"parameters": {"type": "object"}}}\n'
)
TOOLS_TAIL = (
    "</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
)


def render(messages, **kwargs):
    return render_jinja_template([messages], chat_template=QWEN3_VL_CHAT_TEMPLATE, **kwargs)[0][0]


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


CASES = {
    "plain": ([{"role": "user", "content": "Hi"}], {}, "<|im_start|>user\nHi<|im_end|>\n"),
    "prompt": (
        [{"role": "user", "content": "Hi"}],
        {"add_generation_prompt": True},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    "system in parts": (
        [{"role": "system", "content": [text("Be "), text("brief.")]}, {"role": "user", "content": ""}],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|im_end|>\n",
    ),
    "a later system turn is left out": (
        [{"role": "user", "content": "Hi"}, {"role": "system", "content": "gone"}],
        {},
        "<|im_start|>user\nHi<|im_end|>\n",
    ),
    "picture": ([user({"type": "image"}, text("What?"))], {}, f"<|im_start|>user\n{IMAGE}What?<|im_end|>\n"),
    "picture by key": (
        [user({"image": "a.png"}, {"image_url": "b"})], {}, f"<|im_start|>user\n{IMAGE}{IMAGE}<|im_end|>\n"
    ),
    "video": ([user({"type": "video"}, {"video": "v"})], {}, f"<|im_start|>user\n{VIDEO}{VIDEO}<|im_end|>\n"),
    "numbered": (
        [user({"type": "image"}, {"type": "video"}, {"type": "image"}), {"role": "assistant", "content": "ok"},
         user({"type": "video"}, text(" end"))],
        {"add_vision_id": True},
        f"<|im_start|>user\nPicture 1: {IMAGE}Video 1: {VIDEO}Picture 2: {IMAGE}<|im_end|>\n"
        f"<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nVideo 2: {VIDEO} end<|im_end|>\n",
    ),
    "white space stays": (
        [{"role": "user", "content": " \n a\t"}, {"role": "assistant", "content": [text("\n"), text(" b ")]}],
        {},
        "<|im_start|>user\n \n a\t<|im_end|>\n<|im_start|>assistant\n\n b <|im_end|>\n",
    ),
    "tools": (
        [{"role": "user", "content": "Hi"}],
        {"tools": [WEATHER]},
        f"<|im_start|>system\n{TOOLS_HEAD}{WEATHER_LINE}{TOOLS_TAIL}<|im_start|>user\nHi<|im_end|>\n",
    ),
    "tools and system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        {"tools": [WEATHER, WEATHER]},
        f"<|im_start|>system\nBe brief.\n\n{TOOLS_HEAD}{WEATHER_LINE}{WEATHER_LINE}{TOOLS_TAIL}"
        "<|im_start|>user\nHi<|im_end|>\n",
    ),
    "calls and answers": (
        [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyōto", "days": 2}}},
                    {"name": "weather", "arguments": '{"city": "Nara"}'},
                ],
            },
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": [{"type": "image"}, text("rain")]},
            {"role": "assistant", "content": "Done."},
        ],
        {},
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyōto", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Nara"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\n"
        f"{IMAGE}rain\n</tool_response><|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>\n",
    ),
    "a call without words": (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
        {},
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_text(name):
    messages, kwargs, expected = CASES[name]
    assert render(messages, **kwargs) == expected


def many_conversations():
    """Every ordered triple of 13 turns, under four settings: what the digest below was taken over."""
    call = {"function": {"name": "f", "arguments": {"a": [1, "é"]}}}
    turns = [
        {"role": "system", "content": "S"},
        {"role": "system", "content": [text("s1"), {"type": "image"}, text("s2")]},
        {"role": "user", "content": "u \n"},
        user(),
        user({"type": "image"}, text("a"), {"type": "video"}),
        user({"video": "x", "text": "both"}, {"type": "audio"}, {"text": "bare"}),
        {"role": "assistant", "content": "A"},
        {"role": "assistant"},
        {"role": "assistant", "content": [text("p"), {"type": "image"}], "tool_calls": [call, call["function"]]},
        {"role": "assistant", "content": "", "tool_calls": [call, {"name": "g", "arguments": "{}"}]},
        {"role": "tool", "content": "T"},
        {"role": "tool", "content": [{"type": "image"}, text("t"), {"type": "video"}]},
        {"role": "developer", "content": "D"},
    ]
    settings = [{}, {"add_generation_prompt": True}, {"add_vision_id": True, "tools": [WEATHER]}, {"tools": []}]
    for messages in itertools.product(turns, repeat=3):
        for kwargs in settings:
            yield list(messages), kwargs


def test_digest_of_many_texts():
    digest = hashlib.sha256()
    for messages, kwargs in many_conversations():
        digest.update(render(messages, **kwargs).encode() + b"\0")
    # Taken with the template in Qwen/Qwen3-VL-8B-Instruct (sha256 3636d0f0bd6bef02…) over the same conversations.
    assert digest.hexdigest() == "93dd51762750043ae6ee931738c8f101f10aa7e689f38a47c5dca7c910c497b5"


def test_a_message_of_nothing_renders_empty():
    assert render([{"role": "assistant", "content": None}]) == "<|im_start|>assistant\n<|im_end|>\n"


def test_what_the_assistant_wrote_is_marked():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Yes"},
    ]
    (rendered,), (spans,) = render_jinja_template(
        [messages], chat_template=QWEN3_VL_CHAT_TEMPLATE, return_assistant_tokens_mask=True
    )
    assert [rendered[start:end] for start, end in spans] == ["Yes<|im_end|>"]
