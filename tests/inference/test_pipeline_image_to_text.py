"""`pipeline("image-to-text")` for a registered install, and that it leaves all else as it was."""

import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image
from transformers import pipelines

import qwen3_vl
from qwen3_vl.inference import answering
from qwen3_vl.inference.pipeline_image_to_text import Qwen3VLImageToTextPipeline
from qwen3_vl.inference.pipeline_registration import pipeline_class_for, register_pipelines


TINY = str(answering.SHIPPED_CHECKPOINT)
needs_tiny = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)
PICTURE = Image.radial_gradient("L").resize((96, 64)).convert("RGB")


@pytest.fixture
def stock_factory(monkeypatch):
    """The factory without our wrapper, recording its calls; registration is put back afterwards."""
    qwen3_vl.unregister()
    calls = []

    def factory(*args, **kwargs):
        calls.append((args, kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "pipeline", factory)
        factory.calls = calls
        yield factory
    qwen3_vl.register()


def config_holder(config):
    model = torch.nn.Linear(1, 1)
    model.config = config
    return model


def test_only_one_task_is_ours():
    assert pipeline_class_for("image-to-text") is Qwen3VLImageToTextPipeline
    assert pipeline_class_for("image-text-to-text") is None


def test_wrapper_comes_and_goes(stock_factory):
    undo = register_pipelines(pipelines)
    assert pipelines.pipeline.__wrapped__ is stock_factory
    undo()
    assert pipelines.pipeline is stock_factory


def test_package_and_module_agree():
    assert transformers.pipeline is pipelines.pipeline
    qwen3_vl.unregister()
    try:
        assert transformers.pipeline is pipelines.pipeline
        assert not hasattr(pipelines.pipeline, "__wrapped__")
    finally:
        qwen3_vl.register()
    assert transformers.pipeline is pipelines.pipeline
    assert hasattr(pipelines.pipeline, "__wrapped__")


def test_our_model_gets_our_class(stock_factory):
    undo = register_pipelines(pipelines)
    model = config_holder(qwen3_vl.Qwen3VLConfig())
    pipelines.pipeline("image-to-text", model)
    undo()
    assert stock_factory.calls == [
        (("image-text-to-text", model), {"pipeline_class": Qwen3VLImageToTextPipeline}),
    ]


@pytest.mark.parametrize("task", ["image-to-text", "text-generation", None])
def test_other_models_and_tasks_reach_the_stock_factory(stock_factory, task):
    undo = register_pipelines(pipelines)
    model = config_holder(transformers.BlipConfig())
    pipelines.pipeline(task, model, device="cpu")
    undo()
    assert stock_factory.calls == [((task, model), {"device": "cpu"})]


@needs_tiny
def test_captions_by_name():
    captioner = transformers.pipeline("image-to-text", model=TINY, device="cpu")
    assert type(captioner) is Qwen3VLImageToTextPipeline
    assert type(captioner.model) is qwen3_vl.Qwen3VLForConditionalGeneration
    one = captioner(PICTURE, max_new_tokens=3)
    assert isinstance(one[0]["generated_text"], str)
    several = captioner([PICTURE, PICTURE.resize((64, 64))], max_new_tokens=3)
    assert several[0] == one
    assert len(several) == 2
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}]}]
    assert captioner(chat, max_new_tokens=3)[0]["generated_text"][-1]["role"] == "assistant"
    for nothing in (None, []):
        with pytest.raises(ValueError, match="at least one picture"):
            captioner(nothing)


@needs_tiny
def test_question_answering_stays_stock():
    answerer = transformers.pipeline("image-text-to-text", model=TINY, device="cpu")
    assert type(answerer) is transformers.ImageTextToTextPipeline
    assert type(answerer.model) is qwen3_vl.Qwen3VLForConditionalGeneration
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}]}]
    assert answerer(text=chat, max_new_tokens=3)[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        # Used before: the cached name of the top level is replaced, and given back.
        "from transformers import pipeline; import transformers, qwen3_vl; "
        "assert transformers.pipeline is not pipeline; qwen3_vl.unregister(); "
        "assert transformers.pipeline is pipeline",
        # Not imported yet: nothing is imported for it, and the name is ours once it is.
        "import sys, qwen3_vl; assert 'transformers.pipelines' not in sys.modules; "
        "from transformers import pipeline; assert pipeline.__wrapped__; qwen3_vl.unregister(); "
        "from transformers import pipelines; assert pipelines.pipeline is pipeline.__wrapped__",
    ],
)
def test_import_order_does_not_matter(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
