"""Faults of whole models: masks of odd shapes, rows without keys, refused classes, long masks, maps, exactness."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import masking_utils
from zoo import TEXT, VISION, clip, lengths_mask

from benchmarks import served
from fastxattn.integrations import accelerate, core, restore
from fastxattn.integrations.masks import recognise
from fastxattn.integrations.transformers import attention, masking, register
from fastxattn.integrations.transformers.attention import fastxattn_attention
from fastxattn.integrations.transformers.masking import IntervalMask, fastxattn_mask

register()


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


def weights(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def agree(model: nn.Module, inputs: dict[str, Any], **options: Any) -> None:
    """The accelerated copy of ``model`` gives every output that the model gives."""
    fast = copy.deepcopy(model)
    accelerate(fast, **options)
    with torch.no_grad():
        assert served.difference(served.outputs(fast, inputs), served.outputs(model, inputs)) < 2e-5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("maps", [False, True])
def test_the_matching_head_of_blip2(padded: bool, maps: bool) -> None:
    """Its mask of the image features has a row for every text token, which never read them."""
    text = {**TEXT, "encoder_hidden_size": 64, "cross_attention_frequency": 1, "use_qformer_text_input": True}
    config = hf.Blip2Config(vision_config=VISION, qformer_config=text, num_query_tokens=8, image_text_hidden_size=32)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(3, 90, (2, 7))}
    mask = lengths_mask([7, 4 if padded else 7], 7)
    model = weights(hf.Blip2ForImageTextRetrieval(config))
    if maps:
        model.set_attn_implementation("eager")
    more = {"attention_mask": mask, "use_image_text_matching_head": True, "output_attentions": maps}
    agree(model, {**inputs, **more})


def test_features_of_the_matching_head_may_be_padded() -> None:
    config = hf.Blip2QFormerConfig(**TEXT, encoder_hidden_size=80, use_qformer_text_input=True)
    model = weights(hf.Blip2QFormerModel(config))
    features, seen = torch.randn(2, 20, 80), lengths_mask([20, 6], 20)
    inputs = {"query_embeds": torch.randn(2, 15, 64), "query_length": 8, "encoder_hidden_states": features}
    fast = copy.deepcopy(model)
    accelerate(fast)
    out = fast(**inputs, encoder_attention_mask=seen).last_hidden_state
    alone = {**inputs, "query_embeds": inputs["query_embeds"][1:], "encoder_hidden_states": features[1:, :6]}
    torch.testing.assert_close(out[1:], model(**alone).last_hidden_state, atol=2e-5, rtol=1e-4)


def test_clip_keeps_every_output_unless_asked() -> None:
    model, inputs, _ = clip()
    agree(weights(model), inputs)
    report = accelerate(model)
    assert [left.name for left in report.left] == [""]
    assert "text states after the end token" in report.left[0].reason
    restore(model)
    assert "" in [swap.name for swap in accelerate(model, exact=False).swapped]


@pytest.mark.parametrize("build", ["GIT"])
def test_classes_that_refuse_sdpa_refuse_the_name(build: str) -> None:
    model, _ = served.build(build)
    with pytest.raises(ValueError, match="is not for GitForCausalLM: transformers has no sdpa support"):
        model.set_attn_implementation("fastxattn")
    with pytest.raises(ValueError, match="transformers has no sdpa support"):
        type(model)._from_config(model.config, attn_implementation="fastxattn")
    report = accelerate(model)
    assert not report
    assert all("no sdpa support" in left.reason for left in report.left)
    register()  # a second call wraps nothing
    hf.BertModel(hf.BertConfig(**TEXT)).set_attn_implementation("fastxattn")


T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize("family", ["T5", "MT5"])
def test_rows_without_keys_average_where_the_model_does(family: str) -> None:
    """A padded sample whole, and decoder rows before a left-padded prompt."""
    config = getattr(hf, f"{family}Config")(**T5, decoder_start_token_id=0)
    model = weights(getattr(hf, f"{family}ForConditionalGeneration")(config))
    inputs = {
        "input_ids": torch.randint(3, 90, (3, 12)),
        "attention_mask": lengths_mask([12, 0, 5], 12),
        "decoder_input_ids": torch.randint(3, 90, (3, 8)),
        "decoder_attention_mask": lengths_mask([8, 5, 3], 8).flip(1),
    }
    agree(model, inputs)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("how", ["keys", "rows", "heads"])
def test_blind_rows_with_a_position_bias(additive: bool, how: str) -> None:
    q, k, v, bias = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8), torch.randn(1, 4, 5, 9)
    seen = torch.ones(2, 4 if how == "heads" else 1, 5, 9).bool()
    if how == "keys":
        seen[1] = False
    elif how == "rows":
        seen[:, :, 2] = False
    else:
        seen[1, 2, 3], seen[0, 1, 2, 4] = False, False
    hidden = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = torch.softmax(q @ k.mT * 8**-0.5 + torch.where(seen, bias, hidden), -1) @ v
    mask = hidden if additive else seen
    out, _ = fastxattn_attention(nn.Module(), q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
    out, maps = fastxattn_attention(nn.Module(), q, k, v, mask, position_bias=bias, output_attentions=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
    assert maps is not None


@pytest.mark.parametrize("name", ["BridgeTower", "CLAP"])
def test_rows_without_keys_of_models_that_have_eager_only(name: str) -> None:
    model, inputs = served.build(name)
    inputs["attention_mask"][1] = 0
    agree(model, inputs)


def test_colpali_is_bidirectional_without_padding_as_with_sdpa() -> None:
    model, inputs = served.build("ColPali")
    agree(model, inputs)
    inputs["attention_mask"][1, -3:] = 0
    agree(model, inputs)


def causal_model(**more: Any) -> nn.Module:
    config = hf.MistralConfig(**{**TEXT, "max_position_embeddings": 64}, num_key_value_heads=2, **more)
    return weights(hf.MistralModel(config))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_long_masks_are_intervals(window: int | None, padding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "LONG", 64)
    made: list[Any] = []
    monkeypatch.setattr(IntervalMask, "dense", lambda self: made.append(self))
    model = causal_model(sliding_window=window)
    inputs = {"input_ids": torch.randint(3, 90, (2, 24))}
    if padding is not None:
        mask = lengths_mask([24, 15], 24)
        inputs["attention_mask"] = mask.flip(1) if padding == "left" else mask
    fast = copy.deepcopy(model)
    accelerate(fast)
    with torch.no_grad():
        a, b = fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert made == []  # nothing looked at the (Lq, Lk) mask


@pytest.mark.parametrize("reentrant", [False, True])
def test_long_masks_under_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model(sliding_window=7).train()
    ids, grads = torch.randint(3, 90, (2, 24)), []
    accelerate(model)
    for long in (10**9, 64):
        monkeypatch.setattr(masking, "LONG", long)
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids).last_hidden_state.sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 7])
def test_long_masks_in_generate(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=window)
    model = weights(hf.MistralForCausalLM(config))
    inputs = {"input_ids": torch.randint(3, 90, (2, 20)), "attention_mask": lengths_mask([20, 13], 20).flip(1)}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    accelerate(model)
    monkeypatch.setattr(masking, "LONG", 64)
    assert torch.equal(model.generate(**inputs, **options), expected)


def long_mask(monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[IntervalMask, Tensor]:
    monkeypatch.setattr(masking, "LONG", 64)
    options: dict[str, Any] = {"batch_size": 2, "q_length": 9, "kv_length": 12, "q_offset": 3, **more}
    made = fastxattn_mask(**options)
    assert isinstance(made, IntervalMask)
    return made, masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)


WINDOW = masking_utils.sliding_window_causal_mask_function(4)
CHUNKS = masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3]))


@pytest.mark.parametrize("function", [masking_utils.causal_mask_function, WINDOW, CHUNKS])
@pytest.mark.parametrize("padding", [None, lengths_mask([12, 7], 12), lengths_mask([12, 7], 12).flip(1)])
def test_an_interval_mask_is_the_mask(function: Any, padding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = None if padding is None else padding.bool()
    made, dense = long_mask(monkeypatch, mask_function=function, attention_mask=seen)
    assert made.shape == dense.shape
    assert made.dtype == torch.bool
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    ours = fastxattn_attention(nn.Module(), q, k, v, made)[0]
    torch.testing.assert_close(ours, fastxattn_attention(nn.Module(), q, k, v, dense)[0], atol=2e-6, rtol=1e-5)
    assert made._dense == []
    assert torch.equal(made[:, :, 1:], dense[:, :, 1:])
    assert torch.equal(~made, ~dense)
    small = fastxattn_attention(nn.Module(), q.double(), k.double(), v.double(), made)[0]  # torch's kernel
    torch.testing.assert_close(small.float(), ours, atol=2e-6, rtol=1e-5)


def test_torch_runs_causal_masks_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []
    monkeypatch.setattr(attention, "torch_runs_causal", lambda query: runs.append(True) or True)
    monkeypatch.setattr(attention, "attend_padded", lambda *args, **kwargs: pytest.fail("torch's kernel was to run"))
    made, dense = long_mask(monkeypatch, q_length=12, q_offset=0)
    assert made.causal
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    out = fastxattn_attention(nn.Module(), q, k, v, made)[0]
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = torch.softmax((q @ k.mT * 8**-0.5).masked_fill(~dense, -torch.inf), -1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
    assert runs
    assert not long_mask(monkeypatch)[0].causal


def test_an_interval_mask_may_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = long_mask(monkeypatch)
    made[:, :, 2] = False
    dense = dense.clone()
    dense[:, :, 2] = False
    assert torch.equal(made.detach() & True, dense)
    assert torch.equal(made.visible.ranges, recognise(dense, 2, 9, 12).ranges)  # type: ignore[arg-type]


def test_masks_that_are_no_intervals_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "LONG", 64)
    holes = masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q + k) % 3 > 0)
    made = fastxattn_mask(2, 12, 12, mask_function=holes)
    assert type(made) is Tensor
    assert torch.equal(made, masking_utils.sdpa_mask(2, 12, 12, mask_function=holes, allow_is_causal_skip=False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["SigLIP", "SigLIP 2 NaFlex", "T5"])
def test_maps_in_training_under_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs = served.build(name)
    accelerate(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        out = model(**inputs, output_attentions=True)
        found = [t for t in torch.utils._pytree.tree_leaves(dict(out)) if isinstance(t, Tensor) and t.requires_grad]
        torch.stack([t.sin().sum() for t in found]).sum().backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    if not reentrant:  # what a hook collects inside a reentrant checkpoint has no graph, in any model
        assert grads[0].keys() == grads[1].keys()
        for key, grad in grads[0].items():
            scale = max(grad.abs().max().item(), 1.0)
            torch.testing.assert_close(grads[1][key] / scale, grad / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["SAM 2", "CLIPSeg"])
def test_layers_whose_configuration_no_model_has(name: str) -> None:
    """Set by accelerate, set back by restore, and in copies too."""
    model, _ = served.build(name)

    def implementations(of: nn.Module) -> list[str]:
        return [m.config._attn_implementation for m in of.modules() if hasattr(m, "config")]  # type: ignore[union-attr]

    before = implementations(model)
    accelerate(model)
    assert set(implementations(model)) == {"fastxattn"}
    for each in (copy.deepcopy(model), model):
        restore(each)
        assert implementations(each) == before


def test_a_model_that_returns_maps_always_is_saved(tmp_path: Path) -> None:
    """Transformers checks the configuration when it saves it."""
    model = hf.BertModel(hf.BertConfig(**TEXT)).eval()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    inputs = {"input_ids": torch.randint(3, 90, (2, 12))}
    accelerate(model)
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "fastxattn"
    assert all(m is not None for m in model(**inputs).attentions)
    loaded = hf.BertModel.from_pretrained(tmp_path).eval()
    assert loaded.config.output_attentions
    torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0], atol=2e-5, rtol=1e-4)
