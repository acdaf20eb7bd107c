"""What the tests share: tiny configs, models with the same random weights, inputs for a described layout.

A layout is a list such as `["text:5", "image:4x6", "text:3", "video:2x4x4"]`: counts of text tokens, and grids in
patches (`height x width`, or `frames x height x width`) that divide by the merge size of 2. An image becomes
`<vision_start> placeholders <vision_end>`; every frame of a video gets a time-stamp token in front of the same.
"""

import copy
import re
from types import SimpleNamespace

import torch
import transformers.models.qwen3_vl.configuration_qwen3_vl as stock_configuration_dense
import transformers.models.qwen3_vl.modeling_qwen3_vl as stock_modeling_dense
import transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe as stock_configuration_moe
import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe as stock_modeling_moe

import qwen3_vl


IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 150, 151, 152, 153
PAD_TOKEN, EOS_TOKEN, VOCAB = 0, 1, 160
MERGE, PATCH, TEMPORAL, CHANNELS = 2, 4, 2, 3
PATCH_WIDTH = CHANNELS * TEMPORAL * PATCH * PATCH
KINDS = ("dense", "moe")
PREFIX = {"dense": "Qwen3VL", "moe": "Qwen3VLMoe"}

_STOCK_MODULES = {
    "dense": (stock_configuration_dense, stock_modeling_dense),
    "moe": (stock_configuration_moe, stock_modeling_moe),
}

# Every width differs from every other, so that no transposed or swapped tensor fits by accident.
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 2,
    "eos_token_id": EOS_TOKEN,
}
_MOE = {
    "moe_intermediate_size": 40,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_heads": 2,
    "in_channels": CHANNELS,
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "spatial_merge_size": MERGE,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}


def tiny_config_dict(kind="dense", *, text=None, vision=None, **top):
    """The tiny config as published checkpoints spell theirs (`rope_scaling` beside `rope_theta`)."""
    suffix = "" if kind == "dense" else "_moe"
    return {
        "architectures": [f"{PREFIX[kind]}ForConditionalGeneration"],
        "model_type": f"qwen3_vl{suffix}",
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": f"qwen3_vl{suffix}_text",
            **copy.deepcopy(_TEXT),
            **(copy.deepcopy(_MOE) if kind == "moe" else {}),
            **(text or {}),
        },
        "vision_config": {"model_type": f"qwen3_vl{suffix}", **copy.deepcopy(_VISION), **(vision or {})},
        **top,
    }


def stock_class(kind, name):
    """A stock class by its name without the prefix: `"Config"`, `"Model"`, `"ForConditionalGeneration"` ..."""
    configuration, modeling = _STOCK_MODULES[kind]
    return getattr(configuration if name.endswith("Config") else modeling, PREFIX[kind] + name)


def our_class(kind, name):
    return getattr(qwen3_vl, PREFIX[kind] + name)


@torch.no_grad()
def randomize_(model, seed=0):
    """Fills all parameters in place with values of a trained model's scale: biases and norm weights count too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim == 1:
            value = 1.0 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
        elif "embed" in name and parameter.ndim == 2:
            value = noise
        elif name.endswith("gate.weight"):
            value = 2.0 * noise / parameter.shape[-1] ** 0.5
        else:
            fan_in = parameter[0].numel() if "experts" not in name else parameter.shape[-1]
            value = noise / fan_in**0.5
        parameter.copy_(value)
    model.tie_weights()
    return model


def build(cls, config_cls, config_dict, *, attn="sdpa", dtype=torch.float32):
    config = config_cls(**copy.deepcopy(config_dict))
    return cls._from_config(config, attn_implementation=attn, dtype=dtype).eval()


def make_pair(kind="dense", *, attn="sdpa", seed=0, name="ForConditionalGeneration", dtype=torch.float32, **config):
    """Stock (`.stock`) and ours (`.ours`) with the same random weights, copied by `load_state_dict(strict=True)`."""
    config_dict = tiny_config_dict(kind, **config)
    stock = randomize_(build(stock_class(kind, name), stock_class(kind, "Config"), config_dict, attn=attn), seed)
    ours = build(our_class(kind, name), our_class(kind, "Config"), config_dict, attn=attn)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return SimpleNamespace(kind=kind, stock=stock.to(dtype), ours=ours.to(dtype), config_dict=config_dict)


def forget(stock_model):
    """Stock keeps the M-RoPE delta of the last request on the model; a reference run starts without it."""
    for module in stock_model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return stock_model


def _parse_grid(text):
    numbers = [int(n) for n in text.split("x")]
    return numbers if len(numbers) == 3 else [1, *numbers]


def make_inputs(*layouts, padding="left", seed=0, mask=None, dtype=torch.float32):
    """Inputs of a batch, one layout a row, as the stock processor would give them.

    Args:
        layouts: one list of parts per row.
        padding: `"left"` or `"right"`, for rows shorter than the longest.
        mask: whether to give an `attention_mask`; by default only when a row is padded.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, types, grids, pixels = [], [], {1: [], 2: []}, {1: [], 2: []}
    for layout in layouts:
        ids, kinds = [], []

        def add(tokens, kind=0, ids=ids, kinds=kinds):
            ids.extend(tokens)
            kinds.extend([kind] * len(tokens))

        def text(count):
            return torch.randint(10, 140, (count,), generator=generator).tolist()

        for part in layout:
            name, _, size = part.partition(":")
            if name == "text":
                add(text(int(size)))
                continue
            kind, token = (1, IMAGE_TOKEN) if name == "image" else (2, VIDEO_TOKEN)
            frames, height, width = _parse_grid(size)
            grids[kind].append([frames, height, width])
            pixels[kind].append(torch.randn(frames * height * width, PATCH_WIDTH, generator=generator))
            for _ in range(frames):
                add([*(text(1) if kind == 2 else []), VISION_START])
                add([token] * (height * width // MERGE**2), kind)
                add([VISION_END])
        rows.append(ids)
        types.append(kinds)

    length = max(map(len, rows))
    padded = any(len(row) != length for row in rows)

    def pad(row, value):
        fill = [value] * (length - len(row))
        return fill + row if padding == "left" else row + fill

    inputs = {
        "input_ids": torch.tensor([pad(row, PAD_TOKEN) for row in rows]),
        "mm_token_type_ids": torch.tensor([pad(row, 0) for row in types], dtype=torch.int32),
    }
    if padded if mask is None else mask:
        inputs["attention_mask"] = torch.tensor([pad([1] * len(row), 0) for row in rows])
    for kind, pixel_name, grid_name in (
        (1, "pixel_values", "image_grid_thw"),
        (2, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            inputs[pixel_name] = torch.cat(pixels[kind]).to(dtype)
            inputs[grid_name] = torch.tensor(grids[kind])
    return inputs


def without(inputs, *names):
    return {key: value for key, value in inputs.items() if key not in names}


def clone_inputs(inputs):
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def concat_turns(*turns):
    """One unpadded conversation out of several turns' inputs: ids one after the other, all pixels and grids."""
    joined = {}
    for turn in turns:
        for key, value in turn.items():
            joined.setdefault(key, []).append(value)
    along_tokens = ("input_ids", "mm_token_type_ids", "attention_mask")
    return {key: torch.cat(values, dim=1 if key in along_tokens else 0) for key, values in joined.items()}


@torch.no_grad()
def stock_forward(model, **inputs):
    return forget(model)(**clone_inputs(inputs))


def max_difference(first, second):
    assert first.shape == second.shape, f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    return (first.double() - second.double()).abs().max().item() if first.numel() else 0.0


def assert_close(actual, expected, tolerance=1e-5, what="values"):
    difference = max_difference(actual.detach(), expected.detach())
    assert difference <= tolerance, f"{what} differ by {difference:.3g}, allowed {tolerance:.3g}"


def valid_positions(inputs):
    """(batch, tokens) mask of the tokens whose outputs count: stock's output at padding is not defined."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def one_line(error):
    """The message of an error that a user is meant to read: one line, and not a bare number or name."""
    message = str(error).strip()
    assert "\n" not in message, f"not one line: {message!r}"
    assert len(re.findall(r"\w+", message)) >= 4, f"says too little: {message!r}"
    return message


# --- Plain references, written from the definitions and slow on purpose. ---


def slow_mrope_index(inputs, merge=MERGE):
    """M-RoPE positions token by token, from the Qwen2-VL and Qwen3-VL papers.

    Text advances all three coordinates together. A picture's token at (row, column) of the merged grid sits at the
    start plus (0, row, column); what follows starts one past the largest coordinate used, that is at the start plus
    the longer side. Every video frame is its own picture, as time is told in text. Padding stays at 0.

    Returns:
        positions (3, batch, tokens) and deltas (batch, 1): next position minus the number of tokens.
    """
    ids = inputs["input_ids"]
    valid = valid_positions(inputs)
    frames = {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
    for token, name in ((IMAGE_TOKEN, "image_grid_thw"), (VIDEO_TOKEN, "video_grid_thw")):
        for count, height, width in inputs.get(name, torch.zeros(0, 3, dtype=torch.long)).tolist():
            frames[token].extend([(height // merge, width // merge)] * count)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    deltas = []
    for b in range(ids.shape[0]):
        start, left, seen = 0, None, 0
        for t in range(ids.shape[1]):
            if not valid[b, t]:
                continue
            seen += 1
            token = ids[b, t].item()
            if token in frames:
                if left is None:
                    height, width = frames[token].pop(0)
                    left = [(row, column) for row in range(height) for column in range(width)]
                row, column = left.pop(0)
                positions[:, b, t] = torch.tensor([start, start + row, start + column])
                if not left:
                    start, left = start + max(height, width), None
            else:
                positions[:, b, t] = start
                start += 1
        deltas.append([start - seen])
    return positions, torch.tensor(deltas)


def slow_position_table(table, height, width, merge=MERGE):
    """The learned square table, bilinear with aligned corners, at each patch in merge-block order."""
    side = int(table.shape[0] ** 0.5)
    grid = table.view(side, side, -1)

    def axis(index, count):
        at = index * (side - 1) / max(count - 1, 1)
        low = min(int(at), side - 1)
        return low, min(low + 1, side - 1), at - low

    rows = []
    for y, x in merge_order(height, width, merge):
        top, bottom, fy = axis(y, height)
        near, far, fx = axis(x, width)
        rows.append(
            (1 - fy) * ((1 - fx) * grid[top, near] + fx * grid[top, far])
            + fy * ((1 - fx) * grid[bottom, near] + fx * grid[bottom, far])
        )
    return torch.stack(rows)


def merge_order(height, width, merge=MERGE):
    """(row, column) of the patches as they lie in `pixel_values`: merge blocks row by row, each inside row by row."""
    return [
        (block_y * merge + y, block_x * merge + x)
        for block_y in range(height // merge)
        for block_x in range(width // merge)
        for y in range(merge)
        for x in range(merge)
    ]


def _layer_norm(x, state, name):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-6)


def _linear(x, state, name):
    bias = state.get(f"{name}.bias")
    return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)


def _rotate(x, angles):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def slow_vision_tower(state, config, pixels, grids):
    """The vision tower, frame by frame in float64. Returns last states, merged features, DeepStack features."""
    state = {name: value.double() for name, value in state.items()}
    heads, width = config["num_heads"], config["hidden_size"]
    dim = width // heads
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2))
    frames, offset = [], 0
    for count, rows, columns in grids.tolist():
        for _ in range(count):
            frames.append((pixels[offset : offset + rows * columns].double(), rows, columns))
            offset += rows * columns
    outputs, merged, deep = [], [], [[] for _ in config["deepstack_visual_indexes"]]

    def merger(x, name, norm_after):
        groups = width * MERGE**2
        x = (
            _layer_norm(x.view(-1, groups), state, f"{name}.norm")
            if norm_after
            else _layer_norm(x, state, f"{name}.norm")
        )
        return _linear(
            torch.nn.functional.gelu(_linear(x.view(-1, groups), state, f"{name}.linear_fc1")),
            state,
            f"{name}.linear_fc2",
        )

    for patches, rows, columns in frames:
        x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
        x = x + slow_position_table(state["pos_embed.weight"], rows, columns)
        where = torch.tensor(merge_order(rows, columns), dtype=torch.float64)
        angles = torch.cat([where[:, :1] * frequencies, where[:, 1:] * frequencies], dim=-1)
        for layer in range(config["depth"]):
            name = f"blocks.{layer}"
            qkv = _linear(_layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
            q, k, v = qkv.view(-1, 3, heads, dim).permute(1, 2, 0, 3)
            q, k = _rotate(q, angles), _rotate(k, angles)
            attended = ((q @ k.transpose(-1, -2)) * dim**-0.5).softmax(-1) @ v
            x = x + _linear(attended.transpose(0, 1).reshape(-1, width), state, f"{name}.attn.proj")
            inner = _linear(_layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.linear_fc1")
            x = x + _linear(torch.nn.functional.gelu(inner, approximate="tanh"), state, f"{name}.mlp.linear_fc2")
            if layer in config["deepstack_visual_indexes"]:
                index = config["deepstack_visual_indexes"].index(layer)
                deep[index].append(merger(x, f"deepstack_merger_list.{index}", norm_after=True))
        outputs.append(x)
        merged.append(merger(x, "merger", norm_after=False))
    return torch.cat(outputs), torch.cat(merged), [torch.cat(feature) for feature in deep]


def slow_experts(state, name, x, top_k):
    """The sparse block as every expert on every token, weighted by the renormalised top-k of the router. float64."""
    probabilities = (x @ state[f"{name}.gate.weight"].T).softmax(-1)
    top, chosen = probabilities.topk(top_k, dim=-1)
    weights = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    result = torch.zeros_like(x)
    for expert in range(probabilities.shape[-1]):
        gate, up = (x @ state[f"{name}.experts.gate_up_proj"][expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        result += weights[..., expert : expert + 1] * (inner @ state[f"{name}.experts.down_proj"][expert].T)
    return result


def slow_decoder(state, config, embeds, positions, visual_mask=None, deep=()):
    """The decoder over one unpadded row, in float64. Returns the normed last hidden states.

    Args:
        embeds (tokens, hidden); positions (3, tokens); visual_mask (tokens,); deep: (visual tokens, hidden) a level.
    """
    state = {name: value.double() for name, value in state.items()}
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    section = config["rope_scaling"]["mrope_section"]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * state[f"{name}.weight"]

    # Interleaved M-RoPE: frequency i follows height if i % 3 == 1 and width if i % 3 == 2, while those last.
    owner = [axis if axis and i < 3 * section[axis] else 0 for i, axis in ((i, i % 3) for i in range(dim // 2))]
    frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = positions.double()[owner].T * frequencies
    x = embeds.double()
    tokens = x.shape[0]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}"
        hidden = norm(x, f"{name}.input_layernorm")

        def project(part, count, hidden=hidden, name=name):
            return _linear(hidden, state, f"{name}.self_attn.{part}_proj").view(tokens, count, dim)

        q = norm(project("q", heads), f"{name}.self_attn.q_norm").transpose(0, 1)
        k = norm(project("k", kv_heads), f"{name}.self_attn.k_norm").transpose(0, 1)
        q, k = _rotate(q, angles), _rotate(k, angles)
        v = project("v", kv_heads).transpose(0, 1)
        attended = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = (q[head] @ k[shared].T * dim**-0.5).masked_fill(future, float("-inf"))
            attended.append(scores.softmax(-1) @ v[shared])
        x = x + _linear(torch.cat(attended, dim=-1), state, f"{name}.self_attn.o_proj")
        hidden = norm(x, f"{name}.post_attention_layernorm")
        if f"{name}.mlp.gate.weight" in state:
            x = x + slow_experts(state, f"{name}.mlp", hidden, config["num_experts_per_tok"])
        else:
            inner = torch.nn.functional.silu(_linear(hidden, state, f"{name}.mlp.gate_proj"))
            inner = inner * _linear(hidden, state, f"{name}.mlp.up_proj")
            x = x + _linear(inner, state, f"{name}.mlp.down_proj")
        if layer < len(deep):
            x = x.clone()
            x[visual_mask] += deep[layer].double()
    return norm(x, "norm")
