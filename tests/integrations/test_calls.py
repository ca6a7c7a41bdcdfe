"""What a swap did: calls served and passed on, per module, and what a swap does not touch."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from zoo import TEXT, clip, lengths_mask, qformer, torch_decoder

from fastxattn.integrations import Adapter, accelerate, core, register_adapter, restore, status, swap
from fastxattn.integrations.accelerate import uses_interface
from fastxattn.integrations.transformers import register


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


def bert(**more: Any) -> tuple[Any, dict[str, Tensor]]:
    model = hf.BertModel(hf.BertConfig(**TEXT, **more)).eval()
    return model, {"input_ids": torch.randint(3, 90, (2, 12)), "attention_mask": lengths_mask([12, 5], 12)}


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    found = {s.name: s.calls for s in status(model).swapped}
    return {name: (calls.served, calls.fallbacks.total()) for name, calls in found.items() if calls is not None}


def test_status_counts_calls_per_module() -> None:
    model, inputs = bert()
    accelerate(model)
    assert "no call counted yet" in str(status(model))
    for _ in range(3):
        model(**inputs)
    layers = model.config.num_hidden_layers
    assert counts(model) == {"": (3 * layers, 0)}
    model(**inputs, output_attentions=True)
    assert counts(model) == {"": (3 * layers, layers)}
    assert f"served {3 * layers}, fell back {layers}: attention maps were requested" in str(status(model))
    assert f"served {3 * layers}" in status(model)._repr_html_()
    restore(model)
    accelerate(model)
    assert counts(model) == {"": (0, 0)}


def test_fallbacks_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.MultiheadAttention(16, 2), torch.randn(5, 2, 16)
    accelerate(module)
    module(x, x, x)
    module(x[:, 0], x[:, 0], x[:, 0], need_weights=False)
    module(x, x, x, need_weights=False)
    monkeypatch.setattr(core, "SMALL", 10**9)
    module(x, x, x, need_weights=False)
    (found,) = status(module).swapped
    assert found.calls is not None
    assert found.calls.served == 1
    reasons = " ".join(found.calls.fallbacks)
    assert found.calls.fallbacks.total() == 3
    for part in ("need_weights=True", "without a batch axis", "too small to gain"):
        assert part in reasons


def test_calls_inside_others_belong_to_the_innermost() -> None:
    model, inputs, _ = qformer()
    accelerate(model.eval())
    model(**inputs)
    found = counts(model)
    cross = [name for name in found if name.endswith("crossattention.attention")]
    assert all(found[name] == (1, 0) for name in cross)
    assert found["encoder"] == (0, 0)
    decoder, inputs, _ = torch_decoder()
    accelerate(decoder.eval())
    with torch.no_grad():
        decoder(**inputs)
    assert sum(served for served, _ in counts(decoder).values()) == 3


def test_counts_do_not_get_lost_between_threads() -> None:
    module, x = nn.MultiheadAttention(16, 2), torch.randn(5, 2, 16)
    accelerate(module)

    def run() -> None:
        for _ in range(50):
            module(x, x, x, need_weights=False)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(module) == {"": (200, 0)}


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Declining(Adapter):
    does = "runs the original for everything but ones"

    def forward(self, x: Tensor) -> Tensor:
        return x if bool((x == 1).all()) else super().forward(x)  # type: ignore[misc,no-any-return]


def test_adapters_of_others_are_counted_too() -> None:
    register_adapter(Plain, Declining)
    module = Plain()
    accelerate(module)
    module(torch.ones(1))
    module(torch.zeros(1))
    with pytest.raises(TypeError):
        module("text" - 1)  # type: ignore[operator]
    assert counts(module) == {"": (1, 1)}
    assert "its adapter does not support this call" in str(status(module))


class WrittenOut(hf.BertModel):
    """A model that is swapped, and never calls the attention interface."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.embeddings(input_ids)  # type: ignore[no-any-return]


def test_a_model_that_never_calls_the_interface_is_reported() -> None:
    model = WrittenOut(hf.BertConfig(**TEXT)).eval()
    accelerate(model)
    ids = torch.randint(3, 90, (2, 12))
    model(ids)
    assert "never called transformers' attention interface" in str(status(model))
    assert "0 of 1 calls" in str(accelerate(WrittenOut(hf.BertConfig(**TEXT)), verify={"input_ids": ids}))


def test_models_chosen_by_name_are_counted() -> None:
    register()
    model, inputs = bert(attn_implementation="fastxattn")
    model(**inputs)
    (found,) = status(model).swapped
    assert found.adapter == "attn_implementation"
    assert found.calls is not None
    assert found.calls.served == model.config.num_hidden_layers


class MyQFormer(hf.Blip2QFormerModel):
    pass


def test_a_subclass_of_a_model_runs_swapped() -> None:
    model, inputs, _ = qformer()
    mine = MyQFormer(copy.deepcopy(model.config)).eval()
    mine.load_state_dict(model.state_dict())
    expected = mine(**inputs).last_hidden_state
    assert "" in {s.name for s in accelerate(mine).swapped}
    torch.testing.assert_close(mine(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert all(n[0] for name, n in counts(mine).items() if name.endswith("crossattention.attention"))
    eager = MyQFormer(copy.deepcopy(model.config)).eval()
    eager.set_attn_implementation("eager")  # whose code may expect additive masks
    assert "" not in {s.name for s in accelerate(eager).swapped}
    eager(**inputs)
    assert "the model around it runs attn_implementation='eager'" in str(status(eager))


def test_a_fully_sharded_model_runs_swapped(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, inputs, _ = qformer()
    expected = model.eval()(**inputs).last_hidden_state
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.encoder.layer:
            fully_shard(layer.crossattention.attention if hasattr(layer, "crossattention") else layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        names = {s.name for s in accelerate(model).swapped}
        assert {"", "encoder.layer.0.crossattention.attention"} <= names
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        assert counts(model)["encoder.layer.0.crossattention.attention"] == (1, 0)
        assert restore(model) == len(names)
    finally:
        dist.destroy_process_group()


def test_other_models_of_the_same_configuration_keep_their_attention() -> None:
    config = hf.BertConfig(**TEXT)
    one, other = hf.BertModel(config).eval(), hf.BertModel(config).eval()
    accelerate(one)
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert one.config._attn_implementation == "fastxattn"
    assert all(m.config is one.config for m in one.modules() if hasattr(m, "config"))
    assert one.config.to_dict() == other.config.to_dict()
    inputs = bert()[1]
    other(**inputs)
    assert not status(other)
    restore(one)
    assert one.config._attn_implementation == "sdpa"


def test_excluded_parts_keep_their_attention() -> None:
    model, inputs = bert(num_hidden_layers=2) if "num_hidden_layers" not in TEXT else bert()
    expected = model(**inputs).last_hidden_state
    accelerate(model, exclude="encoder.layer.0.attention*")
    first = model.encoder.layer[0].attention.self
    assert first.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert counts(model) == {"": (model.config.num_hidden_layers - 1, 0)}
    eager = bert(attn_implementation="eager")[0]
    report = accelerate(eager, exclude="encoder.layer.0.attention*")
    assert "excluded modules inside run eager attention" in report.left[0].reason


def test_an_excluded_tower_keeps_its_attention_and_the_other_gets_the_kernels() -> None:
    model, inputs, _ = clip()
    accelerate(model.eval(), exclude="vision_model*")
    model(**inputs)
    assert model.vision_model.config._attn_implementation == "sdpa"
    assert model.text_model.config._attn_implementation == "fastxattn"
    assert model.config.text_config is model.text_model.config  # makes masks for it
    assert all("vision" not in s.name for s in status(model).swapped)


def test_an_undone_swap_gives_the_configuration_back() -> None:
    model, inputs = bert()
    config = model.config
    assert not accelerate(WrittenOut(config), verify={"input_ids": inputs["input_ids"]})
    with pytest.raises(ValueError, match="exactly one of"):
        accelerate(model, verify={"no_such_argument": 3})
    assert model.config is config
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_that_match_nothing_are_refused(argument: str) -> None:
    model, _ = bert()
    with pytest.raises(ValueError, match="matches no module that has an adapter; those are: ''"):
        accelerate(model, **{argument: "qformer.*"})
    with pytest.raises(ValueError, match="matches no module"):
        accelerate(model, **{argument: ["", nn.MultiheadAttention]})
    assert not status(model)


def test_hooked_classes_are_not_listed_without_adapter() -> None:
    model = bert()[0]
    assert uses_interface(model.encoder.layer[0].attention.self)
    assert not accelerate(model).unknown
    assert not accelerate(model).unknown  # nor the second time
    flash = bert()[0]
    flash.config._attn_implementation_internal = "flex_attention"
    report = accelerate(flash)
    assert report.left
    assert not report.unknown


def test_a_model_that_asks_for_maps_is_saved(tmp_path: Path) -> None:
    model, inputs = bert(attn_implementation="eager")
    model.config.output_attentions = True
    accelerate(model)
    maps = model(**inputs).attentions
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "fastxattn"
    assert len(model(**inputs).attentions) == len(maps)
    again = hf.BertModel.from_pretrained(tmp_path)
    assert again.config.output_attentions
    assert type(again) is hf.BertModel


def test_old_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()[0]
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.12.1")
    report = accelerate(model)
    assert not report
    assert "5.12.1 is older than 5.21" in report.left[0].reason
    assert accelerate(nn.MultiheadAttention(16, 2))
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, swap.OLDEST_TRANSFORMERS))}"' in text


def test_signatures_stay_the_originals() -> None:
    model = bert()[0]
    before = inspect.signature(model.forward)
    accelerate(model)
    assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("padding", [False, True])
def test_is_causal_without_a_mask_is_refused_as_by_torch(padding: bool) -> None:
    module, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    options: dict[str, Any] = {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool) if padding else None}
    accelerate(module)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        module(x, x, x, need_weights=False, is_causal=True, **options)
    layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)
    accelerate(layer)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(x, x, tgt_is_causal=True)


def test_results_have_the_strides_of_torch() -> None:
    module, x = nn.MultiheadAttention(16, 2).eval(), torch.randn(5, 2, 16)
    expected = module(x, x, x, need_weights=False)[0]
    accelerate(module)
    out = module(x, x, x, need_weights=False)[0]
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out.view(-1), expected.view(-1), atol=1e-6, rtol=1e-5)


def test_pruning_ends_with_the_block_and_bad_arguments_leave_nothing_swapped() -> None:
    from fastxattn.integrations import accelerated

    model, inputs, _ = clip()
    vision = model.vision_model.eval()
    rows: list[int] = []
    vision.encoder.layers[-1].mlp.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))
    with torch.no_grad():
        with accelerated(vision, exact=False, prune={"keep": 0.5, "at": 1}):
            vision(inputs["pixel_values"])
        vision(inputs["pixel_values"])
    assert rows[0] < rows[1] == 17
    with pytest.raises((TypeError, ValueError)):
        accelerate(vision, exact=False, prune={"keep": 0.5, "no_such_option": 1})
    assert not status(vision)
