"""The small byte-level BPE tokenizer of the tiny checkpoint.

Same normalizer, pre-tokenizer and special tokens as Qwen3's own; only the merges differ. A merge may only extend a
token that begins with a space. So known words cost one token inside a sentence, while a string without a space
before it, which is what the reading task answers, is always spelled one character a token.
"""

import json
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Regex as TokenizerRegex

from .data_draw import COLOURS, SHAPES


VOCABULARY = 4096
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen3 marks these as not special: they stay visible when special tokens are skipped in decoding.
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
# Words that stand where no space precedes: role names and the first words of questions.
WHOLE_WORDS = (
    "user", "assistant", "system", "What", "Which", "How", "Name", "Read", "Where", "Describe", "Picture", "Is",
)  # fmt: skip
PROMPT_WORDS = (
    "is", "this", "the", "emoji", "picture", "pictures", "show", "shows", "does", "text", "say", "word", "written",
    "here", "digit", "number", "describe", "do", "you", "see", "in", "colour", "color", "shape", "shapes", "how",
    "many", "are", "there", "where", "left", "right", "of", "above", "below", "or", "top", "bottom", "centre",
    "middle", "a", "an", "and", "two", "three", "four", "five", "six", "no", "which", "what", "of", "one", "than",
    "more", "it", "to", "on", "with", "from", "not", "yes", "at", "by", "first", "last", "video", "clip", "moves",
)  # fmt: skip
FREQUENT_WORD_WEIGHT = 1000


def word_weights(names: list[str]) -> Counter:
    """How often each word of the class names and prompts counts; prompt and scene words always come first."""
    weights = Counter(word for name in names for word in name.split(" "))
    scene = [*COLOURS, *SHAPES, *(f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES)]
    for word in (*PROMPT_WORDS, *scene):
        weights[word] += FREQUENT_WORD_WEIGHT
    return weights


def build_tokenizer(names: list[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Builds the tokenizer for the class `names`; the result has exactly `vocabulary` entries, added ones last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS) + len(WHOLE_WORDS)
    prefixes: Counter = Counter()
    for word, weight in word_weights(names).items():
        letters = "".join(letter for letter in word if letter.isascii() and letter.isalpha())
        if letters == word:
            for length in range(1, len(word) + 1):
                prefixes["Ġ" + word[:length]] += weight
    # A prefix never weighs less than what extends it, so the heaviest ones are closed under shortening.
    kept = sorted(prefixes, key=lambda prefix: (-prefixes[prefix], len(prefix), prefix))
    kept = kept[: vocabulary - added - len(alphabet)]
    vocab = {token: row for row, token in enumerate([*alphabet, *kept])}
    if len(vocab) + added < vocabulary:
        raise ValueError(f"the names give only {len(vocab) + added} tokens, fewer than vocabulary={vocabulary}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(prefix[:-1], prefix[-1]) for prefix in kept]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizerRegex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in WHOLE_WORDS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template, in the layout of Qwen3's own."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": token in WHOLE_WORDS, "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS, *WHOLE_WORDS)
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
