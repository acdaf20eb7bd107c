"""What the Auto classes resolve to, each in a fresh process."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import make_pair


PRELUDE = """
import sys
sys.path.insert(0, {tests!r})
"""


def run(script, **values):
    """Runs a script in a fresh interpreter; its `assert`s are the test. Returns what it printed."""
    source = PRELUDE.format(tests=str(Path(__file__).resolve().parents[1])) + textwrap.dedent(script)
    for name, value in values.items():
        source = source.replace(f"<{name}>", str(value))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request, tmp_path_factory):
    """A folder that stock has written, of one kind."""
    path = tmp_path_factory.mktemp(request.param)
    make_pair(request.param).stock.save_pretrained(path)
    return path


def prefix_of(folder):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return "Qwen3VLMoe" if model_type.endswith("moe") else "Qwen3VL"


def test_import_is_light():
    run(
        """
        import qwen3_vl
        assert "torch" not in sys.modules
        assert "transformers.modeling_utils" not in sys.modules
        """
    )


def test_auto_classes_resolve_to_ours(folder):
    run(
        """
        import qwen3_vl
        from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
        config = AutoConfig.from_pretrained("<folder>")
        assert type(config) is qwen3_vl.<prefix>Config, type(config)
        assert type(config.text_config) is qwen3_vl.<prefix>TextConfig
        assert type(config.vision_config) is qwen3_vl.<prefix>VisionConfig
        model = AutoModelForImageTextToText.from_pretrained("<folder>")
        assert type(model) is qwen3_vl.<prefix>ForConditionalGeneration, type(model)
        assert type(model.model) is qwen3_vl.<prefix>Model
        assert type(model.model.visual) is qwen3_vl.<prefix>VisionModel
        assert type(model.model.language_model) is qwen3_vl.<prefix>TextModel
        assert type(AutoModel.from_pretrained("<folder>")) is qwen3_vl.<prefix>Model
        assert type(AutoModelForImageTextToText.from_config(config)) is qwen3_vl.<prefix>ForConditionalGeneration
        assert type(AutoModel.from_config(config.text_config)) is qwen3_vl.<prefix>TextModel
        assert type(AutoModel.from_config(config.vision_config)) is qwen3_vl.<prefix>VisionModel
        """,
        folder=folder,
        prefix=prefix_of(folder),
    )


def test_it_does_not_matter_which_is_imported_first(folder):
    run(
        """
        from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
        AutoConfig.from_pretrained("<folder>")
        first = AutoModelForImageTextToText.from_pretrained("<folder>")
        assert type(first).__module__.startswith("transformers."), type(first).__module__
        import qwen3_vl
        second = AutoModelForImageTextToText.from_pretrained("<folder>")
        assert type(second) is qwen3_vl.<prefix>ForConditionalGeneration
        """,
        folder=folder,
        prefix=prefix_of(folder),
    )


def test_stock_classes_stay_stock(folder):
    """A stock model built beside ours consists of stock's modules, and ours of ours."""
    run(
        """
        import qwen3_vl, transformers
        import transformers.models.qwen3_vl, transformers.models.qwen3_vl_moe
        for name in ("Config", "TextConfig", "VisionConfig", "Model", "TextModel", "VisionModel",
                     "ForConditionalGeneration", "PreTrainedModel"):
            theirs = getattr(transformers, "<prefix>" + name)
            assert theirs.__module__.startswith("transformers.models."), theirs
            assert theirs is not getattr(qwen3_vl, "<prefix>" + name)
        stock = transformers.<prefix>ForConditionalGeneration.from_pretrained("<folder>")
        own = [type(m) for m in stock.modules() if type(m).__module__.startswith("qwen3_vl")]
        assert not own, own
        assert type(stock.config) is transformers.<prefix>Config
        ours = qwen3_vl.<prefix>ForConditionalGeneration.from_pretrained("<folder>")
        assert type(ours.config) is qwen3_vl.<prefix>Config
        for module in (ours.model, ours.model.visual, ours.model.language_model, ours.model.language_model.layers[0]):
            assert type(module).__module__.startswith("qwen3_vl."), type(module)
        """,
        folder=folder,
        prefix=prefix_of(folder),
    )


def test_unregister_and_register_again(folder):
    run(
        """
        import qwen3_vl
        from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

        def resolved():
            config = AutoConfig.from_pretrained("<folder>")
            return [type(config), type(config.text_config), type(AutoModel.from_pretrained("<folder>")),
                    type(AutoModelForImageTextToText.from_pretrained("<folder>"))]

        ours = [qwen3_vl.<prefix>Config, qwen3_vl.<prefix>TextConfig, qwen3_vl.<prefix>Model,
                qwen3_vl.<prefix>ForConditionalGeneration]
        assert resolved() == ours
        for _ in range(2):
            qwen3_vl.unregister()
            stock = resolved()
            assert all(cls.__module__.startswith("transformers.models.") for cls in stock), stock
            assert [cls.__name__ for cls in stock] == [cls.__name__ for cls in ours]
            qwen3_vl.unregister()
            qwen3_vl.register()
            qwen3_vl.register()
            assert resolved() == ours
        qwen3_vl.unregister()
        assert [cls.__module__.split(".")[0] for cls in resolved()] == ["transformers"] * 4
        """,
        folder=folder,
        prefix=prefix_of(folder),
    )


def test_unregister_restores_every_mapping():
    """Snapshots of all Auto mappings, attention and mask tables, conversions and `from_pretrained`s."""
    run(
        """
        import torch
        import transformers
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.auto import configuration_auto, modeling_auto
        from transformers.models.auto.image_processing_auto import AutoImageProcessor
        from transformers.models.auto.processing_auto import AutoProcessor
        from transformers.models.auto.video_processing_auto import AutoVideoProcessor
        from transformers.pipelines import PIPELINE_REGISTRY

        def snapshot():
            found = {"config": dict(configuration_auto.CONFIG_MAPPING._extra_content)}
            for name, mapping in vars(modeling_auto).items():
                if hasattr(mapping, "_extra_content"):
                    found[name] = dict(mapping._extra_content)
            found["attention"] = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
            found["masks"] = sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())
            found["tasks"] = sorted(PIPELINE_REGISTRY.supported_tasks)
            for cls in (AutoProcessor, AutoImageProcessor, AutoVideoProcessor):
                found[cls.__name__] = cls.from_pretrained.__func__
            found["pipeline"] = transformers.pipelines.pipeline
            return found

        before = snapshot()
        import qwen3_vl
        during = snapshot()
        assert during != before
        qwen3_vl.unregister()
        after = snapshot()
        changed = [name for name in before if after[name] != before[name]]
        assert not changed and after.keys() == before.keys(), changed
        qwen3_vl.register()
        again = snapshot()
        changed = [name for name in during if again[name] != during[name] and not callable(during[name])]
        assert not changed, changed
        """
    )


def test_other_models_are_not_touched():
    run(
        """
        import qwen3_vl
        from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Qwen2VLConfig, Qwen3Config
        assert type(AutoConfig.for_model("qwen2_5_vl")).__module__.startswith("transformers.")
        small = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, head_dim=8)
        model = AutoModel.from_config(Qwen3Config(**small))
        assert type(model).__module__.startswith("transformers.")
        """
    )


def test_names_are_lazy_and_complete():
    run(
        """
        import qwen3_vl
        for prefix in ("Qwen3VL", "Qwen3VLMoe"):
            for name in ("Config", "TextConfig", "VisionConfig", "VisionModel", "TextModel", "Model",
                         "ForConditionalGeneration", "PreTrainedModel"):
                value = getattr(qwen3_vl, prefix + name)
                assert value.__name__ == prefix + name and value.__module__.startswith("qwen3_vl."), value
                assert prefix + name in dir(qwen3_vl)
        for name in ("Qwen3VLAttention", "Qwen3VLRotaryEmbedding", "apply_rotary_pos_emb", "repeat_kv"):
            assert getattr(qwen3_vl, name).__module__.startswith("qwen3_vl.")
        from qwen3_vl.configuration.configuration_qwen3_vl import Qwen3VLConfig
        from qwen3_vl.configuration.configuration_qwen3_vl_moe import Qwen3VLMoeConfig
        from qwen3_vl.modeling_qwen3_vl import modeling_qwen3_vl
        try:
            qwen3_vl.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise AssertionError("an unknown name was found")
        """
    )


def test_experts_are_converted_in_a_fresh_process(tmp_path):
    """The conversion of published experts is there as soon as the class is, without the Auto classes."""
    pair = make_pair("moe")
    pair.stock.save_pretrained(tmp_path)
    out = run(
        """
        from safetensors.torch import load_file, save_file
        weights = load_file("<folder>/model.safetensors")
        for name in weights:
            if "experts" in name:
                weights[name] = weights[name].transpose(1, 2).contiguous()
        save_file(weights, "<folder>/model.safetensors", metadata={"format": "pt"})
        import qwen3_vl
        qwen3_vl.unregister()
        model = qwen3_vl.Qwen3VLMoeForConditionalGeneration.from_pretrained("<folder>")
        print(model.model.language_model.layers[0].mlp.experts.down_proj.double().pow(2).sum().item())
        """,
        folder=tmp_path,
    )
    experts = pair.stock.model.language_model.layers[0].mlp.experts.down_proj
    assert abs(float(out) - experts.double().pow(2).sum().item()) < 1e-6


def test_threads_all_get_ours():
    run(
        """
        import threading
        import qwen3_vl
        from transformers import AutoConfig
        found, start = [], threading.Barrier(4)
        def look():
            start.wait()
            found.append(type(AutoConfig.for_model("qwen3_vl")).__module__)
        threads = [threading.Thread(target=look) for _ in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert len(found) == 4 and all(name.startswith("qwen3_vl.") for name in found), found
        """
    )


def test_registrations_of_others_stay():
    run(
        """
        import qwen3_vl
        from transformers import AutoConfig, PreTrainedConfig
        class Mine(PreTrainedConfig):
            model_type = "somebody_else"
        class Theirs(qwen3_vl.Qwen3VLConfig):
            pass
        AutoConfig.register("somebody_else", Mine)
        AutoConfig.register("qwen3_vl", Theirs, exist_ok=True)
        assert type(AutoConfig.for_model("qwen3_vl")) is Theirs
        qwen3_vl.unregister()
        assert type(AutoConfig.for_model("somebody_else")) is Mine
        assert type(AutoConfig.for_model("qwen3_vl")) is Theirs
        """
    )
