"""The tiny Qwen3-VL: its configuration, and a training forward that is exact but free of per-picture loops.

`fast_loss` reads the parameters of an ordinary `Qwen3VLForConditionalGeneration`; a test holds it to the model's own
forward. What makes it faster on a CPU: pictures of one size run as a dense batch, the patch embedding is one matrix
product over a single time step (the two are equal in a still picture), and logits exist at trained places only.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import get_vision_interpolation_indices_and_weights

from qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .data_batches import MicroBatch
from .tokenizer_tiny import VOCABULARY


# The class that is trained; any class with the official parameter names will do.
MODEL_CLASS = Qwen3VLForConditionalGeneration
# A picture has one class but dozens of letter frames; so weighted, the three kinds of loss pull about equally.
CLASS_WEIGHT = 6.0
FRAME_WEIGHT = 0.3


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
    visual: nn.Module, pixels: torch.Tensor, grid: tuple[int, int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tower on equally large pictures.

    Args:
        pixels ((pictures, patches, 768), normalised, in the tower's dtype): one time step of each patch.
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
    pictures, patches, width = hidden.shape
    deepstack = []
    for number, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(hidden)).view(pictures, patches, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        mixed = attend(q, k, v).transpose(1, 2).reshape(pictures, patches, width)
        hidden = hidden + block.attn.proj(mixed)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if number in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
            deepstack.append(merger(hidden.reshape(-1, width)))
    return [visual.merger(hidden.reshape(-1, width)), *deepstack], hidden


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Plain attention on (batch, heads, length, head_dim): for short rows in bfloat16 on a CPU faster than SDPA."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if causal:
        length = q.shape[2]
        scores = scores + torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
    return torch.matmul(scores.softmax(-1), v)


def rms_norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def batch_features(model: nn.Module, batch: MicroBatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    visual = model.model.visual
    pixels = torch.from_numpy(batch.patches).to(visual.patch_embed.proj.weight.dtype) / 127.5 - 1
    return vision_features(visual, pixels, batch.grid)


def fast_logits(model: nn.Module, batch: MicroBatch, features: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Logits (trained tokens, vocabulary) after `batch.predict_index`; `features` are computed when not given."""
    text = model.model.language_model
    features = batch_features(model, batch)[0] if features is None else features
    places = torch.from_numpy(batch.visual_index)
    slots, predict = torch.from_numpy(batch.slots), torch.from_numpy(batch.predict_index)
    hidden = text.embed_tokens(torch.from_numpy(batch.input_ids)).index_copy(0, places, features[0])
    cos, sin = text.rotary_emb(hidden, torch.from_numpy(batch.position_ids)[:, None])
    cos, sin = cos[0, :, None], sin[0, :, None]
    config = text.config
    groups = config.num_attention_heads // config.num_key_value_heads

    def to_rows(states: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) to right-padded (rows, heads, length, head_dim)."""
        padded = states.new_zeros(batch.rows * batch.length, *states.shape[1:]).index_copy(0, slots, states)
        return padded.view(batch.rows, batch.length, *states.shape[1:]).transpose(1, 2)

    for number, layer in enumerate(text.layers):
        attention = layer.self_attn
        normed = rms_norm(layer.input_layernorm, hidden)
        split = (len(slots), -1, config.head_dim)
        q = rms_norm(attention.q_norm, attention.q_proj(normed).view(split))
        k = rms_norm(attention.k_norm, attention.k_proj(normed).view(split))
        v = attention.v_proj(normed).view(split)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = to_rows(k).repeat_interleave(groups, 1), to_rows(v).repeat_interleave(groups, 1)
        # Padding stands to the right, where causal attention does not look.
        mixed = attend(to_rows(q), k, v, causal=True).transpose(1, 2).reshape(batch.rows * batch.length, -1)
        if number + 1 == config.num_hidden_layers:
            # Nothing attends to the last layer's output, so it is needed at trained places only.
            hidden, slots = hidden[predict], slots[predict]
        hidden = hidden + attention.o_proj(mixed[slots])
        hidden = hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))
        if number + 1 < len(features):
            hidden = hidden.index_add(0, places, features[number + 1])
    return F.linear(rms_norm(text.norm, hidden), text.embed_tokens.weight)


def fast_loss(model: nn.Module, heads: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """Summed loss of a micro-batch, and what to log.

    Returns:
        The loss to differentiate, and `loss` and `correct` (sum over trained tokens), `tokens`, `auxiliary` (sum over
        rows) and `labels` (class labels or letter frames that sum stands for).
    """
    features, states = batch_features(model, batch)
    loss = torch.zeros(())
    log = {"loss": 0.0, "correct": 0.0, "tokens": 0, "auxiliary": 0.0, "labels": 0}
    if batch.frames is not None:
        auxiliary = heads.text_loss(states, batch.grid, torch.from_numpy(batch.frames))
        log |= {"auxiliary": auxiliary.item(), "labels": batch.frames.size}
        loss = FRAME_WEIGHT * auxiliary
    elif batch.labels is not None:
        auxiliary = heads.class_loss(states, torch.from_numpy(batch.labels))
        log |= {"auxiliary": auxiliary.item(), "labels": len(batch.labels)}
        loss = CLASS_WEIGHT * auxiliary
    elif batch.shapes is not None:
        auxiliary = heads.scene_loss(states, torch.from_numpy(batch.shapes))
        log |= {"auxiliary": auxiliary.item(), "labels": batch.shapes.size}
        loss = FRAME_WEIGHT * auxiliary
    if not batch.vision_only:
        logits = fast_logits(model, batch, features).float()
        targets = torch.from_numpy(batch.targets)
        spoken = F.cross_entropy(logits, targets, reduction="sum")
        right = (logits.argmax(-1) == targets).sum().item()
        log |= {"loss": spoken.item(), "correct": right, "tokens": len(targets)}
        loss = loss + spoken
    return loss, log
