"""accelerate(verify=...): a wrong adapter is found in every form of output, and nothing is proved by nothing."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from zoo import clip, lengths_mask, torch_decoder

from fastxattn.integrations import Adapter, Verification, accelerate, core, register_adapter, status, verify
from fastxattn.integrations.compare import compare, leaves, rebuilt


@pytest.fixture(autouse=True)
def _speed_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    monkeypatch.setattr(verify, "SLOWER", 0.0)
    torch.manual_seed(0)


class Pooler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Wrong(Adapter):
    does = "is wrong on purpose"

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) * 3 + 7


class RightPooler(Pooler):
    pass


class Right(Adapter):
    does = "is right"

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) / x.shape[1]


register_adapter(Pooler, Wrong)
register_adapter(RightPooler, Right)


class Model(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any], pooler: type[nn.Module] = Pooler) -> None:
        super().__init__()
        self.pool, self.form = pooler(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.pool(x))


@dataclass
class Record:
    features: Tensor
    name: str = "record"


class Pair(NamedTuple):
    first: Tensor
    second: int


class Opaque:
    def __init__(self, tensor: Tensor) -> None:
        self.layers = [tensor]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda o: o,
    "nested dict": lambda o: {"image": {"features": o}},
    "list of dicts": lambda o: [{"boxes": o}],
    "dataclass": Record,
    "named tuple": lambda o: Pair(o, 3),
    "model output": lambda o: hf.modeling_outputs.BaseModelOutput(last_hidden_state=o, hidden_states=(o, o)),
    "cache": Opaque,
    "numpy": lambda o: {"array": o.numpy()},
    "complex": lambda o: torch.complex(o, o),
    "nested tensor": lambda o: torch.nested.nested_tensor([o[0], o[1, :3]], layout=torch.jagged),
    "float": lambda o: o.mean().item(),
    "token ids": lambda o: o.argmax(-1),
    "integers": lambda o: (o * 1000).long(),
    "text": lambda o: "positive" if o.sum() > 100 else "negative",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_adapter_is_found(form: str) -> None:
    model = Model(FORMS[form])
    report = accelerate(model, verify=(torch.randn(2, 8, 16),))
    assert report.verification is not None
    assert not report.verification.kept
    assert not status(model)
    right = Model(FORMS[form], RightPooler)
    assert accelerate(right, verify=(torch.randn(2, 8, 16),)).verification.kept  # type: ignore[union-attr]


@pytest.mark.parametrize("form", [lambda o: None, lambda o: [], lambda o: o[:0]], ids=["none", "list", "empty"])
def test_nothing_compared_is_nothing_proved(form: Any) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return form(x)

    report = accelerate(Silent(), verify=(torch.randn(2, 8, 16),))
    assert "no value that could be compared" in str(report.verification)
    assert not report


def test_all_outputs_count_not_only_the_first() -> None:
    one, two = {"a": torch.ones(2), "b": {"c": torch.ones(2)}}, {"a": torch.ones(2), "b": {"c": torch.zeros(2)}}
    assert "output 'b.c' has the error 1" in compare(two, one, one).reason
    assert compare(two, one, one, ("b.*",)).reason == ""
    assert "missing" in compare({"a": torch.ones(2)}, one, one).reason
    assert "does not return" in compare({**one, "d": torch.ones(1)}, one, one).reason
    assert "another kind" in compare({**one, "a": torch.ones(3)}, one, one).reason
    assert "another kind" in compare({**one, "a": torch.ones(2).double()}, one, one).reason
    assert [name for name, _ in leaves({"x": (torch.ones(1), [Record(torch.ones(1))])})] == [
        "x.0",
        "x.1.0.features",
        "x.1.0.name",
    ]


def test_nan_and_infinity_stand_where_the_original_has_them() -> None:
    nan, inf = float("nan"), float("inf")
    truth = torch.tensor([1.0, nan, inf])
    assert compare(truth, truth, truth.double()).reason == ""
    for wrong in ([nan, nan, inf], [1.0, 0.0, inf], [1.0, nan, 0.0]):
        assert "NaN or infinity" in compare(torch.tensor(wrong), truth, truth.double()).reason
    # Float64 has a number where the original has none: either is right.
    for ours in ([1.0, 0.0], [1.0, nan]):
        assert compare(torch.tensor(ours), torch.tensor([1.0, nan]), torch.tensor([1.0, 0.0]).double()).reason == ""


class Noisy(nn.Module):
    """Draws in evaluation, from every generator that models use."""

    def __init__(self, draw: Callable[[Tensor], Tensor], pooler: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.draw = pooler(), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) + self.draw(x[:, 0])


class Shift(Adapter):
    does = "adds a half"

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) + 0.5


class Shifted(Pooler):
    pass


register_adapter(Shifted, Shift)

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda x: torch.randn(x.shape),
    "randn_like": torch.randn_like,
    "dropout": lambda x: F.dropout(x, 0.3, training=True),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "randperm": lambda x: x[:, torch.randperm(x.shape[1])],
    "python": lambda x: x * random.random(),
    "numpy": lambda x: x * float(np.random.rand()),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_models_that_draw_in_evaluation(draw: str) -> None:
    inputs = (torch.randn(2, 8, 16),)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for _ in range(3):
        assert not accelerate(Noisy(DRAWS[draw], Shifted), verify=inputs)
    kept = accelerate(Noisy(DRAWS[draw], RightPooler), verify=inputs).verification
    assert kept is not None
    assert kept.kept, str(kept)
    assert kept.eager_error < 1e-5
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_a_model_that_never_repeats_itself_proves_nothing() -> None:
    count = iter(range(10**9))
    model = Noisy(lambda x: x * next(count), RightPooler)
    assert "do not agree" in str(accelerate(model, verify=(torch.randn(2, 8, 16),)).verification)


def test_a_model_far_from_float64_proves_nothing() -> None:
    model = Noisy(lambda x: torch.full_like(x, 9.0 if x.dtype == torch.float64 else 1.0), RightPooler)
    assert "nothing is proved" in str(accelerate(model, verify=(torch.randn(2, 8, 16),)).verification)


def llama() -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=99))
    return model.eval(), torch.randint(0, 99, (2, 40))


@pytest.mark.parametrize(
    "kind", [dict, hf.BatchEncoding, hf.BatchFeature, collections.UserDict, collections.OrderedDict]
)
def test_inputs_as_tokenizers_and_processors_return_them(kind: Any) -> None:
    model, ids = llama()
    found = accelerate(model, verify=kind({"input_ids": ids})).verification
    assert found is not None
    assert found.kept, str(found)
    assert found.served == found.calls == 2


@pytest.mark.parametrize("static", [False, True])
def test_the_callers_cache_is_not_advanced(static: bool) -> None:
    model, ids = llama()
    cache = hf.StaticCache(config=model.config, max_cache_len=64) if static else hf.DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)  # with gradients: its tensors are no leaves
    before = [layer.keys.detach().clone() for layer in cache.layers]
    ids = torch.randint(0, 99, (2, 20))
    report = accelerate(model, verify={"input_ids": ids, "past_key_values": cache})
    assert report.verification is not None
    assert report.verification.kept, str(report)
    assert cache.get_seq_length() == 40
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    assert any("past_key_values" in name for name, _ in leaves(model(input_ids=ids)))


def test_inputs_are_copied_with_what_they_share() -> None:
    generator, tensor = torch.Generator().manual_seed(3), torch.ones(2, requires_grad=True) * 2
    made = rebuilt({"a": tensor, "b": [tensor], "g": generator, "d": torch.float32}, lambda t: t.detach().double())
    assert made["a"] is made["b"][0]
    assert made["d"] == torch.float64
    torch.rand(1, generator=made["g"])
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_a_quantised_model_is_refused_with_what_to_do() -> None:
    model, ids = llama()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    report = accelerate(quantised, verify={"input_ids": ids})
    assert "is quantised and has no float64 form" in str(report)
    assert not status(quantised)
    assert accelerate(quantised)


def test_a_model_bound_to_its_dtype_is_refused_with_the_error() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = RightPooler()

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return self.pool(x)  # type: ignore[no-any-return]

    report = accelerate(Bound(), verify=(torch.randn(2, 8, 16),))
    assert "does not run in float64" in str(report.verification)
    assert "float32 only" in str(report.verification)


@pytest.mark.parametrize("weights", [False, True])
def test_rows_that_see_no_key_follow_the_rule_in_the_truth(weights: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.pool = nn.MultiheadAttention(32, 4, batch_first=True), RightPooler()

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            out = self.mha(x, x, x, attn_mask=hidden, need_weights=weights)[0]
            return out + self.pool(x)[:, None]  # type: ignore[no-any-return]

    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    hidden[3] = True
    found = accelerate(Reader(), verify=(torch.randn(2, 12, 32), hidden)).verification
    assert found is not None
    assert found.kept, str(found)
    decoder, inputs, _ = torch_decoder()
    accelerate(decoder.eval())
    out = decoder.double()(*(t.double() if t.is_floating_point() else t for t in inputs.values()))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [0, 10**9])
def test_rows_that_see_no_key_give_zero_in_every_size_and_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, small: int
) -> None:
    monkeypatch.setattr(core, "SMALL", small)
    module = nn.MultiheadAttention(32, 4, batch_first=True).to(dtype).eval()
    accelerate(module)
    x, hidden = torch.randn(2, 12, 32, dtype=dtype), torch.ones(12, 12, dtype=torch.bool).triu(1)
    hidden[3] = True
    out = module(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(out[:, 3], module.out_proj.bias.expand(2, -1))
    assert out.isfinite().all()


def test_no_call_served_undoes_the_swap_with_the_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]  # type: ignore[no-any-return]

    net = Net()
    report = accelerate(net, verify=(torch.randn(2, 12, 32),))
    assert "0 of 1 calls used a fastxattn kernel: attention weights were requested" in report.left[0].reason
    assert not status(net)


def test_exact_swaps_keep_every_output() -> None:
    model, inputs, _ = clip()
    model.eval()
    model.text_model.config.eos_token_id = model.text_model.eos_token_id
    before = model(**inputs).text_model_output.last_hidden_state
    found = accelerate(model, verify=inputs).verification
    assert found is not None
    assert found.kept, str(found)
    torch.testing.assert_close(model(**inputs).text_model_output.last_hidden_state, before, atol=1e-5, rtol=1e-4)
    cut, inputs, _ = clip()
    found = accelerate(cut.eval(), exact=False, verify=inputs).verification  # what it changes is declared
    assert found is not None
    assert found.kept, str(found)


def one(spread: tuple[float, float]) -> Verification:
    return Verification(1e-6, 1e-6, 2e-6, 1.03, spread, 3.0, True, values=7, served=11, calls=12)


def test_one_estimator_with_its_spread() -> None:
    assert "1.03x (0.98 to 1.09): no difference measurable" in str(one((0.98, 1.09)))
    assert "no difference" not in str(one((1.01, 1.05)))
    assert "11 of 12 calls used a fastxattn kernel" in str(one((1.01, 1.05)))


def test_only_a_measurable_slowdown_undoes_a_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SLOWER", 0.97)
    ratios: list[float] = []
    monkeypatch.setattr(verify, "_timed", lambda *_: (ratios, 1.0))
    inputs = (torch.randn(2, 8, 16),)
    ratios[:] = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    assert accelerate(Model(lambda o: o, RightPooler), verify=inputs)
    ratios[:] = [0.5, 0.6, 0.7, 0.8, 0.9, 0.91, 0.92, 0.93, 2.0]
    assert "slower (0.90x)" in accelerate(Model(lambda o: o, RightPooler), verify=inputs).left[0].reason


def test_vilt_draws_its_patches_alike() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = hf.ViltModel(hf.ViltConfig(**sizes, vocab_size=99, image_size=64, patch_size=8)).eval()
    ids = torch.randint(3, 90, (3, 9))
    inputs = {
        "input_ids": ids,
        "attention_mask": lengths_mask([9, 4, 7], 9),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": torch.randn(3, 3, 64, 64),
    }
    found = accelerate(model, verify=inputs).verification
    assert found is not None
    assert found.kept, str(found)
    assert found.eager_error < 1e-4


@pytest.fixture(scope="module", autouse=True)
def _forget_the_adapters() -> Iterator[None]:
    yield
    from fastxattn.integrations import swap

    for cls in (Pooler, RightPooler, Shifted):
        swap._adapters.pop(swap.class_name(cls), None)
