"""The tiny Qwen3-VL: its configuration, and a training forward that is exact but free of per-picture loops.

`fast_loss` reads the parameters of an ordinary `Qwen3VLForConditionalGeneration`; a test holds it to the model's own
forward. What makes it faster on a CPU: pictures of one size run as a dense batch, the patch embedding is one matrix
product over a single time step (the two are equal in a still picture), and logits exist at trained places only.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import get_vision_interpolation_indices_and_weights

from qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .data_batches import MicroBatch
from .tokenizer_tiny import VOCABULARY


# The class that is trained; any class with the official parameter names will do.
MODEL_CLASS = Qwen3VLForConditionalGeneration
# How hard each micro-batch pulls: a mean over its answers, so that long answers do not drown out short ones.
TASK_WEIGHTS = {"which": 1.5, "many": 1.0, "scene": 1.5, "text": 1.5, "digit": 0.8, "emoji": 0.5, "clip": 0.4}
AUXILIARY_WEIGHTS = {"text": 1.0, "scene": 0.4, "digit": 0.5, "emoji": 0.3}
NOTE_WEIGHT = 0.5
# The decoder layer after which the end of a picture should hold its number and name; half of the layers come later,
# to look that up.
NOTE_LAYER = 2
# In the layer after it, the first head should look from the words of a question to what they name.
GAZE_LAYER = 3
GAZE_WEIGHT = 0.3


def tiny_config(tokenizer) -> Qwen3VLConfig:
    """11 million parameters: a 6-layer vision tower with DeepStack after layers 1 and 3, and a 6-layer decoder.

    Args:
        tokenizer (`tokenizers.Tokenizer`): gives the ids of the special tokens.
    """
    token = tokenizer.token_to_id
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="bfloat16",
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        vision_config={
            "depth": 6,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_heads": 6,
            "out_hidden_size": 256,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 3],
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
    )


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@functools.lru_cache(maxsize=64)
def _grid_tables(grid: tuple[int, int], per_side: int, spatial_dim: int, theta: float):
    """Interpolation of the learned positions, and rotary cosines and sines, for one picture size."""
    grid_thw = torch.tensor([[1, *grid]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=per_side, mode="bilinear", align_corners=True, spatial_merge_size=2, kwargs={}
    )
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    places = places.view(grid[0] // 2, 2, grid[1] // 2, 2, 2).permute(0, 2, 1, 3, 4).reshape(-1, 2)
    frequencies = 1.0 / (theta ** (torch.arange(0, spatial_dim, 2, dtype=torch.float) / spatial_dim))
    angles = (places[:, :, None].float() * frequencies).flatten(1)
    angles = torch.cat((angles, angles), -1)
    return indices, weights, angles.cos(), angles.sin()


def vision_features(
    visual: nn.Module, pixels: torch.Tensor, grid: tuple[int, int], deep: bool = True
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tower on equally large pictures.

    Args:
        pixels ((pictures, patches, 768), normalised, in the tower's dtype): one time step of each patch.
        deep: whether the DeepStack features are wanted.
    Returns:
        The merged features and then the DeepStack features, each (pictures * patches / 4, out_hidden_size); and the
        tower's last states (pictures, patches, width).
    """
    config = visual.config
    weight = visual.patch_embed.proj.weight
    # A still picture repeats its frame, so both time slices of the kernel see the same pixels.
    weight = weight.sum(2).flatten(1)
    hidden = F.linear(pixels, weight, visual.patch_embed.proj.bias)
    heads = config.num_heads
    head_dim = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    indices, weights, cos, sin = _grid_tables(grid, visual.num_grid_per_side, head_dim // 2, theta)
    hidden = hidden + (visual.pos_embed(indices) * weights[:, :, None].to(hidden.dtype)).sum(1)
    cos, sin = cos.to(hidden.dtype), sin.to(hidden.dtype)
    deepstack = []
    for number, block in enumerate(visual.blocks):
        hidden = vision_block(block, hidden, cos, sin, heads)
        if deep and number in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
            deepstack.append(merger(hidden.flatten(0, 1)))
    return [visual.merger(hidden.flatten(0, 1)), *deepstack], hidden


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return states * cos + rotate_half(states) * sin


def vision_block(
    block: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> torch.Tensor:
    """One layer of the tower on `hidden` (pictures, patches, width)."""
    pictures, patches, width = hidden.shape
    qkv = block.attn.qkv(block.norm1(hidden)).view(pictures, patches, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v).transpose(1, 2).reshape(pictures, patches, width)
    hidden = hidden + block.attn.proj(mixed)
    return hidden + block.mlp(block.norm2(hidden))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain attention on (batch, heads, length, head_dim): for short rows in bfloat16 on a CPU faster than SDPA."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), v)


def branch_mask(batch: MicroBatch, dtype: torch.dtype) -> torch.Tensor:
    """(rows, 1, length, length), 0 or minus infinity: causal, and between branches as `MicroBatch` says.

    Padding stands to the right, where causal attention does not look.
    """
    branches = torch.zeros(batch.rows * batch.length, dtype=torch.int64)
    branches[torch.from_numpy(batch.slots)] = torch.from_numpy(batch.branches)
    branches = branches.view(batch.rows, batch.length)
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = seen & torch.ones(batch.length, batch.length, dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None]


def rms_norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def batch_features(model: nn.Module, batch: MicroBatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    visual = model.model.visual
    pixels = torch.from_numpy(batch.patches).to(visual.patch_embed.proj.weight.dtype) / 127.5 - 1
    return vision_features(visual, pixels, batch.grid, deep=not batch.vision_only)


def decoder_start(model: nn.Module, batch: MicroBatch, features: list[torch.Tensor]):
    """What the decoder's layers begin with.

    Args:
        features: as `vision_features` returns them.
    Returns:
        Hidden states (tokens, width) with the pictures in place; and for every `text_layer` cosine, sine, slots and
        mask.
    """
    text = model.model.language_model
    places = torch.from_numpy(batch.visual_index)
    hidden = text.embed_tokens(torch.from_numpy(batch.input_ids)).index_copy(0, places, features[0])
    cos, sin = text.rotary_emb(hidden, torch.from_numpy(batch.position_ids)[:, None])
    return hidden, (cos[0, :, None], sin[0, :, None], torch.from_numpy(batch.slots), branch_mask(batch, hidden.dtype))


def fast_logits(
    model: nn.Module, batch: MicroBatch, features: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the decoder; `features` are computed when not given.

    Returns:
        Logits (trained tokens, vocabulary) after `batch.predict_index`; (notes, vocabulary) at `batch.note_index`,
        from `NOTE_LAYER`; and the log probabilities (gazes,) with which `GAZE_LAYER` looks where it should.
    """
    text = model.model.language_model
    features = batch_features(model, batch)[0] if features is None else features
    places, predict = torch.from_numpy(batch.visual_index), torch.from_numpy(batch.predict_index)
    hidden, tables = decoder_start(model, batch, features)
    for number, layer in enumerate(text.layers):
        # Nothing attends to the last layer's output, so it is needed at trained places only.
        wanted = predict if number + 1 == len(text.layers) else None
        if number == GAZE_LAYER:
            cos, sin, _, mask = tables
            gazes = gaze_log_probabilities(layer, hidden, cos, sin, mask, batch)
        hidden = text_layer(layer, hidden, *tables, wanted)
        if number + 1 < len(features):
            hidden = hidden.index_add(0, places, features[number + 1])
        if number == NOTE_LAYER:
            notes = hidden[torch.from_numpy(batch.note_index)]
    logits, notes = (F.linear(rms_norm(text.norm, states), text.embed_tokens.weight) for states in (hidden, notes))
    return logits, notes, gazes


def gaze_log_probabilities(
    layer: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, batch: MicroBatch
) -> torch.Tensor:
    """Log of the attention of the layer's first head from `batch.gaze_index` to where `batch` says, float32."""
    attention, size = layer.self_attn, layer.self_attn.head_dim
    named, rows = torch.from_numpy(batch.gaze_index), torch.from_numpy(batch.gaze_rows)
    slots = torch.from_numpy(batch.slots)
    normed = rms_norm(layer.input_layernorm, hidden)
    q = rms_norm(attention.q_norm, F.linear(normed[named], attention.q_proj.weight[:size]))
    k = rms_norm(attention.k_norm, F.linear(normed, attention.k_proj.weight[:size]))
    q, k = rotate(q, cos[named, 0], sin[named, 0]), rotate(k, cos[:, 0], sin[:, 0])
    k = k.new_zeros(batch.rows * batch.length, size).index_copy(0, slots, k).view(batch.rows, batch.length, size)
    scores = torch.matmul(k[rows], q[:, :, None]).squeeze(-1).float() * size**-0.5
    seen = mask[rows, 0, slots[named] % batch.length]
    return (scores + seen).log_softmax(-1).gather(1, torch.from_numpy(batch.gaze_columns)[:, None]).squeeze(1)


def text_layer(
    layer: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor,
    mask: torch.Tensor, wanted: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """One layer of the decoder on packed `hidden` (tokens, width); returns the rows `wanted`, or all."""
    attention = layer.self_attn
    rows, _, length, _ = mask.shape
    normed = rms_norm(layer.input_layernorm, hidden)
    split = (len(hidden), -1, attention.head_dim)
    q = rotate(rms_norm(attention.q_norm, attention.q_proj(normed).view(split)), cos, sin)
    k = rotate(rms_norm(attention.k_norm, attention.k_proj(normed).view(split)), cos, sin)
    v = attention.v_proj(normed).view(split)

    def to_rows(states: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) to right-padded (rows, heads, length, head_dim)."""
        padded = states.new_zeros(rows * length, *states.shape[1:]).index_copy(0, slots, states)
        return padded.view(rows, length, *states.shape[1:]).transpose(1, 2)

    groups = attention.num_key_value_groups
    k, v = to_rows(k).repeat_interleave(groups, 1), to_rows(v).repeat_interleave(groups, 1)
    mixed = attend(to_rows(q), k, v, mask).transpose(1, 2).reshape(rows * length, -1)
    if wanted is not None:
        hidden, slots = hidden[wanted], slots[wanted]
    hidden = hidden + attention.o_proj(mixed[slots])
    return hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))


def auxiliary_loss(heads: nn.Module, batch: MicroBatch, tokens: torch.Tensor, states: torch.Tensor):
    """Mean loss of the auxiliary head that fits the micro-batch and the number of its labels, or `None`."""
    if batch.frames is not None:
        return heads.text_loss(tokens, batch.grid, torch.from_numpy(batch.frames)), batch.frames.size
    if batch.labels is not None:
        return heads.class_loss(states, torch.from_numpy(batch.labels)), len(batch.labels)
    if batch.shapes is not None:
        return heads.scene_loss(states, torch.from_numpy(batch.shapes)), batch.shapes.size
    return None


def answer_loss(logits: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean loss of the answers' tokens, those of an answer of n weighted by n ** -0.5, and what to log."""
    targets = torch.from_numpy(batch.targets)
    lengths = np.diff(np.append(batch.answer_starts, len(targets)))
    weights = torch.from_numpy(np.repeat(lengths**-0.5, lengths)).float()
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    right = (logits.argmax(-1) == targets).numpy()
    whole = np.minimum.reduceat(right, batch.answer_starts)
    log = {"loss": losses.sum().item(), "correct": int(right.sum()), "tokens": len(targets)}
    log |= {"whole": int(whole.sum()), "answers": len(whole)}
    return (losses * weights).sum() / weights.sum(), log


def fast_loss(model: nn.Module, heads: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted loss of a micro-batch, and what to log.

    Returns:
        The loss to differentiate; `loss` and `correct` (sums over trained `tokens`), `whole` (entirely right
        `answers`), `auxiliary` (sum over `labels`: classes, letter frames or patches).
    """
    features, states = batch_features(model, batch)
    loss, log = torch.zeros(()), {}
    if (auxiliary := auxiliary_loss(heads, batch, features[0], states)) is not None:
        mean, labels = auxiliary
        log |= {"auxiliary": mean.item() * labels, "labels": labels}
        loss = AUXILIARY_WEIGHTS[batch.task] * mean
    if not batch.vision_only:
        logits, notes, gazes = fast_logits(model, batch, features)
        spoken, counts = answer_loss(logits, batch)
        log |= counts
        loss = loss + TASK_WEIGHTS[batch.task] * spoken
        if len(notes):
            noted = F.cross_entropy(notes.float(), torch.from_numpy(batch.note_targets))
            log |= {"noted": noted.item() * len(notes), "notes": len(notes)}
            loss = loss + NOTE_WEIGHT * noted - GAZE_WEIGHT * gazes.mean()
            log |= {"gazed": -gazes.sum().item(), "gazes": len(gazes)}
    return loss, log
