"""The vision feature cache: that features are the tower's own, which pictures are encoded, bounds, threads, faults."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import PATCH_WIDTH, clone_inputs, concat_turns, make_inputs, make_pair, one_line, without
from transformers import AutoModelForImageTextToText

from qwen3_vl import PrefixCache, VisionFeatureCache
from qwen3_vl.optim.cache.picture_digest import describes_pixels, picture_digests


BYTES_2x2 = 48 * 4 * 3  # of one visual token: 48 channels in float32, pooled and on two DeepStack levels


@pytest.fixture(scope="module")
def model():
    """A dense model; every test takes off what it applied."""
    return make_pair("dense").ours


@pytest.fixture
def features(model):
    technique = VisionFeatureCache()
    technique.apply(model)
    yield technique
    technique.revert(model)


class Tower:
    """Counts the pictures that reach the tower."""

    def __init__(self, model, monkeypatch):
        self.grids, self.forward = [], model.model.visual.forward
        monkeypatch.setattr(model.model.visual, "forward", self)

    def __call__(self, pixels, grid_thw, **kwargs):
        self.grids.append(grid_thw.tolist())
        return self.forward(pixels, grid_thw=grid_thw, **kwargs)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**clone_inputs(inputs), **{"max_new_tokens": 6, "do_sample": False, **options}).tolist()


def pictures(*grids, seed=0):
    """Pixels and grids (time, height, width) of random pictures."""
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(patches, PATCH_WIDTH, generator=generator), torch.tensor(grids)


@torch.no_grad()
def encode(model, features, pixels, grids):
    return features.encode(model.model.visual, model.model.get_image_features, pixels, grids)


def assert_same_features(one, other):
    assert type(one) is type(other)
    assert len(one.deepstack_features) == len(other.deepstack_features) == 2
    for mine, theirs in zip(
        (one.pooler_output, *one.deepstack_features), (other.pooler_output, *other.deepstack_features), strict=True
    ):
        assert len(mine) == len(theirs)
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


# --- Through generate() ---


BATCH = [
    ["text:2", "image:4x6", "text:3"],
    ["text:1", "video:2x4x4", "text:2", "image:2x4", "text:1"],
    ["text:4"],
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"num_beams": 2, "prefill_chunk_size": 5},
    ],
    ids=str,
)
def test_the_same_tokens_and_no_second_look(model, features, monkeypatch, options):
    inputs = make_inputs(*BATCH, mask=True)
    features.revert(model)
    expected = generate(model, inputs, **options)
    features.apply(model)
    tower = Tower(model, monkeypatch)
    for _ in range(3):
        assert generate(model, inputs, **options) == expected
    assert tower.grids == [[[1, 4, 6], [1, 2, 4]], [[2, 4, 4]]]
    assert (features.statistics().hits, features.statistics().misses) == (6, 3)


def test_only_what_is_new_is_encoded(model, features, monkeypatch):
    """A known picture behind new text, beside a new one and beside its own copy."""
    first = make_inputs(["text:2", "image:4x6", "text:3"], seed=1)
    generate(model, first)
    second = concat_turns(
        make_inputs(["text:5", "image:6x4"], seed=2), make_inputs(["text:2", "image:4x6", "text:3"], seed=1)
    )
    second = concat_turns(second, make_inputs(["image:6x4", "text:2"], seed=3), first)
    second["pixel_values"][48:72] = second["pixel_values"][:24]  # the third picture is the first one again
    features.revert(model)
    expected = generate(model, second)
    features.apply(model)
    tower = Tower(model, monkeypatch)
    assert generate(model, second) == expected
    assert tower.grids == [[[1, 6, 4]]]
    assert features.statistics().pictures_held == 2


def test_a_conversation_goes_on_with_known_and_new_pictures(model, features, monkeypatch):
    inputs = make_inputs(["text:2", "image:4x6", "text:3"], seed=1)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole = concat_turns(inputs, make_inputs(["text:2", "image:4x6", "image:2x2", "text:1"], seed=4))
    whole["pixel_values"][24:48] = whole["pixel_values"][:24]
    expected = generate(model, whole)
    tower = Tower(model, monkeypatch)
    cache = copy.deepcopy(output.past_key_values)
    cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
    features.clear()
    assert generate(model, whole, past_key_values=cache) == expected
    assert tower.grids == [[[1, 4, 6], [1, 2, 2]]]


def test_beside_the_prefix_cache_only_what_is_behind_the_prefix_is_looked_up(model, features):
    inputs = make_inputs(["image:4x6", "text:3", "image:2x4", "text:1"], seed=1)
    expected, prefix = generate(model, inputs), PrefixCache(page_tokens=4)
    features.clear()
    prefix.apply(model)
    try:
        before = features.statistics()
        assert [generate(model, inputs) for _ in range(2)] == [expected] * 2
        assert features.statistics().misses - before.misses == 2 and features.statistics().hits == before.hits
        assert prefix.statistics().hits == 1
    finally:
        prefix.revert(model)


def test_features_given_by_the_caller_are_left_alone(model, features):
    inputs = make_inputs(["text:2", "image:4x6", "text:3"])
    expected = generate(model, inputs)
    with torch.no_grad():
        given = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    before = features.statistics()
    encoded = {**without(inputs, "pixel_values"), "mm_encoder_outputs": {"image": given}}
    assert generate(model, encoded) == expected
    with pytest.raises(ValueError, match="You cannot pass both"):
        generate(model, {**inputs, "mm_encoder_outputs": {"image": given}})
    assert features.statistics() == before


def test_chosen_by_the_profile():
    model = AutoModelForImageTextToText.from_pretrained(
        "checkpoints/tiny", optim={"vision_feature_cache": {"max_bytes": 1000}}
    )
    (technique,) = model.active_techniques
    assert model.vision_feature_cache is technique and technique.exact and technique.max_bytes == 1000
    technique.revert(model)
    assert not hasattr(model, "vision_feature_cache")


# --- Alone ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_bit_equal(dtype):
    """To a call without the cache, if nothing is known; and each time to the call that encoded the picture."""
    model = make_pair("dense", dtype=dtype).ours
    features, (pixels, grids) = VisionFeatureCache(), pictures((1, 4, 6), (2, 4, 4), (1, 2, 2))
    with torch.no_grad():
        plain = model.get_image_features(pixels, grids)
    first, second = (encode(model, features, pixels, grids) for _ in range(2))
    assert_same_features(first, plain)
    assert_same_features(second, plain)
    alone = encode(model, VisionFeatureCache(), pixels[24:56], grids[1:2])
    known = encode(model, features, pixels[24:56], grids[1:2])
    # Attention stays inside a frame; a product over other numbers of patches may round otherwise.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (alone.pooler_output[0] - known.pooler_output[0]).abs().max() <= tolerance


def test_a_picture_keeps_only_its_own_memory(model):
    features, (pixels, grids) = VisionFeatureCache(), pictures((1, 4, 6), (1, 2, 2))
    with torch.inference_mode():
        features.encode(model.model.visual, model.model.get_image_features, pixels, grids)
    output = encode(model, features, pixels[24:], grids[1:])
    kept = (output.pooler_output[0], *(level[0] for level in output.deepstack_features))
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == BYTES_2x2
    assert not any(tensor.is_inference() for tensor in kept)
    assert features.statistics().bytes_held == 7 * BYTES_2x2


def test_the_least_recently_used_goes_first(model):
    features = VisionFeatureCache(max_bytes=2 * BYTES_2x2)
    a, b, c = (pictures((1, 2, 2), seed=seed) for seed in range(3))

    def known(picture):
        before = features.statistics().hits
        encode(model, features, *picture)
        assert features.statistics().bytes_held <= features.max_bytes
        return features.statistics().hits > before

    assert [known(a), known(b), known(a), known(c)] == [False, False, True, False]
    assert [known(a), known(c), known(b)] == [True, True, False]
    assert not known(pictures((1, 2, 6))) and not known(pictures((1, 2, 6)))  # larger than the limit
    assert features.statistics().pictures_held == 2
    features.clear()
    assert (features.statistics().pictures_held, features.statistics().bytes_held) == (0, 0)
    assert not known(a)


def nudge(model, weight):
    with torch.no_grad():
        weight.mul_(1.01)


CHANGES = {
    "in place": lambda visual: nudge(visual, visual.blocks[1].mlp.linear_fc1.weight),
    "loaded": lambda visual: visual.load_state_dict({k: v * 1.01 for k, v in visual.state_dict().items()}),
    "replaced": lambda visual: setattr(visual.merger.linear_fc2, "bias", torch.nn.Parameter(torch.randn(48))),
    "other attention": lambda visual: visual.set_attn_implementation("eager"),
    "cast": lambda visual: visual.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_when_the_tower_changes(change):
    model, features = make_pair("dense").ours, VisionFeatureCache()
    pixels, grids = pictures((1, 4, 6))
    encode(model, features, pixels, grids)
    CHANGES[change](model.model.visual)
    with torch.no_grad():
        plain = model.get_image_features(pixels, grids)
    assert_same_features(encode(model, features, pixels, grids), plain)
    assert (features.statistics().hits, features.statistics().pictures_held) == (0, 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # not of the tower
    encode(model, features, pixels, grids)
    assert features.statistics().hits == 1


def test_autocast_has_features_of_its_own(model, features):
    pixels, grids = pictures((1, 4, 6))
    encode(model, features, pixels, grids)
    with torch.autocast("cpu", torch.bfloat16):
        assert encode(model, features, pixels, grids).pooler_output[0].dtype == torch.bfloat16
    assert encode(model, features, pixels, grids).pooler_output[0].dtype == torch.float32
    assert features.statistics().hits == 0


def test_other_pixels_grids_and_dtypes_are_other_pictures():
    pixels, grids = pictures((1, 4, 6))
    digests = [
        *picture_digests(pixels, grids),
        *picture_digests(pixels, torch.tensor([[1, 6, 4]])),
        *picture_digests(pixels, torch.tensor([[2, 2, 6]])),
        *picture_digests(pixels.double(), grids),
        *picture_digests(pixels.bfloat16(), grids),
        *picture_digests(pixels.roll(1, 0), grids),
    ]
    assert len(set(digests)) == 6 and all(len(digest) == 16 for digest in digests)
    strided = torch.cat((pixels, pixels), 1)[:, :PATCH_WIDTH]
    assert picture_digests(strided, grids) == digests[:1]
    both = picture_digests(torch.cat((pixels, pixels)), grids.repeat(2, 1))
    assert both == 2 * digests[:1]


def test_gradients_flow_past_it(model, features):
    pixels, grids = pictures((1, 2, 4))
    output = features.encode(model.model.visual, model.model.get_image_features, pixels, grids)
    assert output.pooler_output[0].requires_grad and output.last_hidden_state is not None
    assert features.statistics().misses == 0


@pytest.mark.parametrize(
    ("pixels", "grids"),
    [
        (torch.randn(4, PATCH_WIDTH), torch.tensor([[1, 2, 4]])),
        (torch.randn(8, PATCH_WIDTH), torch.tensor([[1.0, 2.0, 4.0]])),
        (torch.randn(8, PATCH_WIDTH), torch.tensor([1, 2, 4])),
        (torch.randn(8, PATCH_WIDTH), torch.tensor([[-1, -2, 4]])),
        (torch.randn(8, 3, 2), torch.tensor([[1, 2, 4]])),
        (torch.full((8, PATCH_WIDTH), torch.nan), torch.tensor([[1, 2, 4]])),
    ],
)
def test_bad_pictures_are_refused_as_without_it(model, features, pixels, grids):
    with torch.no_grad(), pytest.raises(ValueError) as plain:
        model.get_image_features(pixels, grids)
    with pytest.raises(ValueError) as error:
        encode(model, features, pixels, grids)
    assert one_line(error.value) == str(plain.value)
    assert features.statistics().pictures_held == 0
    assert describes_pixels(pixels, grids) == bool(pixels.isnan().any())


def test_features_that_are_not_finite_are_not_kept():
    model, features = make_pair("dense").ours, VisionFeatureCache()
    with torch.no_grad():
        model.model.visual.merger.linear_fc2.bias[0] = torch.inf
    for _ in range(2):
        assert encode(model, features, *pictures((1, 2, 2))).pooler_output[0].isinf().any()
    assert features.statistics().misses == 2 and features.statistics().bytes_held == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be"),
        ({"max_bytes": 1.5}, "max_bytes must be"),
        ({"size": 3}, "has no setting 'size'"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message) as error:
        VisionFeatureCache(**given)
    one_line(error.value)


def test_a_model_has_one_of_it(model, features):
    with pytest.raises(ValueError, match="has a vision feature cache already") as error:
        VisionFeatureCache().apply(model)
    one_line(error.value)
    VisionFeatureCache().revert(model)  # not the one that is there
    assert model.vision_feature_cache is features


def test_copies_are_empty(model, features):
    encode(model, features, *pictures((1, 2, 2)))
    copied = copy.deepcopy(model).vision_feature_cache
    for other in (copied, pickle.loads(pickle.dumps(features))):
        assert other is not features and other.settings == features.settings
        assert other.statistics().pictures_held == 0


def test_threads_ask_at_once(model, features):
    prompts = [make_inputs([f"text:{2 + seed}", "image:4x6", "text:3"], seed=seed % 2) for seed in range(4)]
    features.revert(model)
    expected = [generate(model, prompt) for prompt in prompts]
    features.apply(model)
    found = {}

    def work(index):
        found[index] = [generate(model, prompts[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == [[tokens] * 3 for tokens in expected]
    statistics = features.statistics()
    assert statistics.hits + statistics.misses == 12
    assert statistics.bytes_held == statistics.pictures_held * 6 * BYTES_2x2
