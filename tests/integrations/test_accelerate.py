"""The swap itself: what it must not change, what it refuses, and how it is undone."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import MllamaLayer, clip, qformer, torch_decoder, whisper

from fastxattn.integrations import (
    Adapter,
    accelerate,
    accelerated,
    core,
    register_adapter,
    restore,
    status,
    verify,
)
from fastxattn.integrations.swap import adapter_of


@pytest.fixture(autouse=True)
def _even_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)


@pytest.fixture
def model() -> tuple[nn.Module, dict[str, Tensor]]:
    module, inputs, _ = qformer()
    return module.eval(), inputs


def result(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(**inputs).last_hidden_state  # type: ignore[no-any-return]


def test_parameters_are_shared_and_copies_stand_alone(model: Any) -> None:
    module, inputs = model
    pointers = [p.data_ptr() for p in module.parameters()]
    accelerate(module)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    expected = result(module, inputs)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(result(twin, inputs), expected)
        assert restore(twin) > 0
        assert adapter_of(module) is not None
        assert type(twin) in type(module).__mro__


def test_torch_save_and_save_pretrained(model: Any, tmp_path: Path) -> None:
    module, inputs = model
    accelerate(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(result(torch.load(file, weights_only=False), inputs), result(module, inputs))
    module.save_pretrained(tmp_path)
    plain = type(module)._fastxattn_original.from_pretrained(tmp_path)
    assert plain.config.architectures == ["Blip2QFormerModel"]
    assert adapter_of(plain) is None
    torch.testing.assert_close(result(plain.eval(), inputs), result(module, inputs), atol=1e-5, rtol=1e-5)


def test_include_exclude_and_dry_run(model: Any) -> None:
    module, _ = model
    assert {s.name for s in accelerate(module, include="encoder", dry_run=True).swapped} == {"encoder"}
    assert not status(module)
    kinds = accelerate(module, exclude=["*crossattention*", lambda name, m: name == ""]).swapped
    assert kinds
    assert all("crossattention" not in s.name and s.name for s in kinds)
    with pytest.raises(TypeError, match="include and exclude take"):
        accelerate(module, include=3)  # type: ignore[arg-type]


def test_partial_swaps_still_agree(model: Any) -> None:
    module, inputs = model
    expected = result(module, inputs)
    for include in ("encoder", "", "*attention", ["encoder", "*attention"], ["", "encoder"]):
        with accelerated(module, include=include):
            torch.testing.assert_close(result(module, inputs), expected, atol=1e-5, rtol=1e-5)


def test_context_manager_restores_after_an_exception(model: Any) -> None:
    module, _ = model
    accelerate(module, include="encoder")

    def fails() -> None:
        with accelerated(module) as report:
            assert report
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [s.name for s in status(module).swapped] == ["encoder"]


def test_restore_without_accelerate_does_nothing(model: Any) -> None:
    assert restore(model[0]) == 0
    assert str(status(model[0])).endswith("nothing was swapped")


def test_verify_keeps_undoes_and_is_strict(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = model
    monkeypatch.setattr(verify, "SLOWER", 0.0)
    report = accelerate(module, verify=inputs)
    assert report.verification is not None
    assert report.verification.kept
    assert report.verification.error <= report.verification.budget
    assert report.swapped
    restore(module)
    monkeypatch.setattr(verify, "SLOWER", 1e9)
    report = accelerate(module, verify=inputs)
    assert "slower" in str(report.verification)
    assert not report.swapped
    assert not status(module)
    with pytest.raises(RuntimeError, match="slower"):
        accelerate(module, verify=inputs, strict=True)
    assert not status(module)


def test_verify_undoes_a_wrong_swap(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = model
    monkeypatch.setattr(verify, "SLOWER", 0.0)

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(args[0])

    monkeypatch.setattr("fastxattn.integrations.transformers.qformer.read", wrong)
    report = accelerate(module, verify=inputs)
    assert "exceeds the budget" in str(report.verification)
    assert not status(module)


class Doubler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Child(Doubler):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3


class FastDoubler(Adapter):
    does = "doubles once"

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_registered_adapters_swap_the_exact_class_only() -> None:
    register_adapter(Doubler, FastDoubler)
    module = nn.Sequential(Doubler(), Child())
    report = accelerate(module)
    assert [s.name for s in report.swapped] == ["0"]
    assert isinstance(module[0], FastDoubler)
    assert isinstance(module[0], Doubler)
    assert module(torch.ones(1)) == 6
    with pytest.raises(TypeError, match=r"subclass of fastxattn\.integrations\.Adapter"):
        register_adapter(Doubler, Doubler)  # type: ignore[arg-type]


def test_a_forward_replaced_on_the_instance_is_left_alone_with_what_to_do() -> None:
    module = Doubler()
    module.forward = lambda x: x  # type: ignore[method-assign]
    report = accelerate(module)
    assert not report
    assert "before adding such hooks" in report.left[0].reason
    with pytest.raises(RuntimeError, match="would leave modules alone"):
        accelerate(module, strict=True)


def test_compiled_models_are_refused(model: Any) -> None:
    compiled = torch.compile(model[0])
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        accelerate(compiled)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        accelerate("model")  # type: ignore[arg-type]


def test_another_class_change_on_top_is_refused(model: Any) -> None:
    module, _ = model
    accelerate(module, include="")
    swapped = type(module)
    module.__class__ = type("Wrapped", (swapped,), {})
    with pytest.raises(RuntimeError, match="given another class"):
        restore(module)
    module.__class__ = swapped
    assert restore(module) == 1


def test_meta_tensors_and_shared_modules() -> None:
    with torch.device("meta"):
        module = qformer()[0]
    assert accelerate(module)
    layer = Doubler()
    both = nn.ModuleList([layer, layer])
    assert len(accelerate(both).swapped) == 1
    assert restore(both) == 1


def test_tied_weights_stay_tied() -> None:
    model = whisper()[0]
    accelerate(model)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert model.tie_weights() is None


def test_hooks_run_and_projections_with_hooks_are_called(model: Any) -> None:
    module, inputs = model
    expected = result(module, inputs)
    accelerate(module)
    cross = module.encoder.layer[0].crossattention.attention
    seen: list[int] = []
    cross.key.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    module.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append(-1))
    torch.testing.assert_close(result(module, inputs), expected, atol=1e-5, rtol=1e-5)
    assert seen == [70, -1]  # 40 + 7 + 23 image tokens, not 3 x 40


def test_quantised_linears_are_called(model: Any) -> None:
    module, inputs = model
    layers = {nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), layers, dtype=torch.qint8)
    expected = result(quantised, inputs)
    accelerate(quantised)
    torch.testing.assert_close(result(quantised, inputs), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_training(reentrant: bool) -> None:
    module, inputs, _ = qformer()
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.0
    module.train()
    inputs = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone().requires_grad_()}

    def gradient() -> Tensor:
        module.zero_grad()
        inputs["encoder_hidden_states"].grad = None
        module(**inputs).last_hidden_state.square().sum().backward()
        return inputs["encoder_hidden_states"].grad.clone()  # type: ignore[no-any-return]

    expected = gradient()
    accelerate(module)
    torch.testing.assert_close(gradient(), expected, atol=1e-4, rtol=1e-3)
    module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(), expected, atol=1e-4, rtol=1e-3)


def test_autocast(model: Any) -> None:
    module, inputs = model
    exact = result(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager = (result(module, inputs) - exact).abs().max()
        accelerate(module)
        assert (result(module, inputs) - exact).abs().max() <= 2 * eager + 0.02


def test_compile_after_accelerate(model: Any) -> None:
    module, inputs = model
    accelerate(module)
    expected = result(module, inputs)
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(result(compiled, inputs), expected, atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_data_parallel(model: Any, tmp_path: Path) -> None:
    import torch.distributed as dist

    module, inputs = model
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        expected = result(wrapped, inputs)
        assert accelerate(wrapped)
        torch.testing.assert_close(result(wrapped, inputs), expected, atol=1e-5, rtol=1e-5)
        wrapped(**inputs).last_hidden_state.sum().backward()
        assert all(p.grad is not None for p in module.encoder.layer[0].crossattention.parameters())
    finally:
        dist.destroy_process_group()


def test_multihead_attention_refuses_extra_keys_and_returns_weights_on_request() -> None:
    extra = nn.MultiheadAttention(16, 2, add_zero_attn=True)
    assert "not tokens" in accelerate(extra).left[0].reason
    module, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    expected = module(x, x, x)
    accelerate(module)
    for a, b in zip(module(x, x, x), expected, strict=True):
        assert torch.equal(a, b)
    unbatched = module(x[0], x[0], x[0], need_weights=False)[0]
    torch.testing.assert_close(unbatched, expected[0][0], atol=1e-6, rtol=1e-5)


def test_the_native_fast_path_does_not_go_around_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = torch_decoder()
    model.eval()
    accelerate(model)
    calls: list[str] = []
    read = core.read
    monkeypatch.setattr("fastxattn.integrations.torch_nn.read", lambda *a, **k: calls.append("read") or read(*a, **k))
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 3  # the encoder's self-attention, and both of the decoder


def test_clip_text_is_cut_inside_clip_only() -> None:
    model, inputs, _ = clip()
    accelerate(model.eval(), exact=False)
    rows: list[int] = []
    model.text_model.encoder.layers[0].mlp.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))
    with torch.no_grad():
        model(**inputs)
        model.text_model(inputs["input_ids"])  # someone who may want every position
    assert rows == [20 + 5 + 10, 20]


def test_mllama_rows_without_an_image() -> None:
    from fastxattn.integrations.transformers.mllama import no_image_rows

    layer = MllamaLayer().eval()
    seen = torch.zeros(1, 4, 1, 4)
    seen[:, 2:, :, :2] = 1
    from zoo import _tiles

    tiles = _tiles(layer, seen, 9)
    hidden, states = torch.randn(1, 4, 64), torch.randn(1, 36, 64)
    expected = layer(hidden, states, **tiles)
    accelerate(layer)
    torch.testing.assert_close(layer(hidden, states, **tiles), expected, atol=1e-5, rtol=1e-5)
    no_image_rows(layer, "meta")
    out = layer(hidden, states, **tiles)
    torch.testing.assert_close(out[:, 2:], expected[:, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, :2], hidden[:, :2])  # nothing attended to, and the layer gates its MLP
    with pytest.raises(ValueError, match="'hf' or 'meta'"):
        no_image_rows(layer, "none")


def test_pruning_on_request() -> None:
    model, inputs, _ = clip()
    vision = model.vision_model.eval()
    rows: list[int] = []
    vision.encoder.layers[-1].mlp.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))
    with pytest.raises(ValueError, match="pass exact=False"):
        accelerate(vision, prune={"keep": 0.5})
    report = accelerate(vision, exact=False, prune={"keep": 0.5, "at": 1})
    assert report.pruning is not None
    with torch.no_grad():
        vision(inputs["pixel_values"])
        restore(vision)
        vision(inputs["pixel_values"])
    assert rows[0] < rows[1] == 17
