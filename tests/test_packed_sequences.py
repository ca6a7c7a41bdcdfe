"""PackedTokens as a tensor of sequences: moving, indexing, joining, comparing, printing, saving, collating."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

from fastxattn import PackedTokens


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def batch(*lengths, spare=0, **options):
    """Sequences of these lengths; ``spare`` rows of NaN after them."""
    total = sum(lengths)
    values = torch.cat([torch.randn(total, 2, **options), torch.full((spare, 2), torch.nan, **options)])
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    return PackedTokens(values, offsets, max(lengths, default=0))


def lists(tokens):
    return [t.tolist() for t in tokens]


INDICES = {
    "slice": slice(1, 3),
    "open slice": slice(2, None),
    "negative slice": slice(-2, None),
    "everything": slice(None),
    "past the end": slice(3, 9),
    "empty": slice(3, 1),
    "steps": slice(None, None, 2),
    "reversed": slice(None, None, -1),
    "list": [2, 0, 2, -1],
    "no numbers": [],
    "range": range(1, 3),
    "bools": [True, False, True, True],
    "int32": torch.tensor([3, 0], dtype=torch.int32),
    "mask": torch.tensor([False, True, False, True]),
    "numpy": np.array([1, -4]),
    "numpy mask": np.array([True, True, False, False]),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("spare", [0, 2])
def test_indexing_is_that_of_a_list_of_sequences(name, spare):
    tokens, index = batch(2, 0, 3, 1, spare=spare), INDICES[name]
    numbers = np.arange(4)
    expected = (
        numbers[index] if isinstance(index, slice) else numbers[:0] if len(index) == 0 else numbers[np.asarray(index)]
    )
    chosen = tokens[index]
    assert isinstance(chosen, PackedTokens)
    assert lists(chosen) == [lists(tokens)[b] for b in expected]
    assert chosen.values.shape[0] == int(chosen.cu_seqlens[-1])  # nothing beyond
    assert chosen.max_seqlen == max((len(lists(tokens)[b]) for b in expected), default=0)
    assert chosen.cu_seqlens.dtype == torch.int32
    PackedTokens(chosen.values, chosen.cu_seqlens, chosen.max_seqlen)  # passes the checks


@pytest.mark.parametrize("index", [1, -1, np.int64(2), torch.tensor(2), torch.tensor(-4, dtype=torch.int8)])
def test_one_sequence_is_a_view_of_its_values(index):
    tokens = batch(2, 0, 3, 1, spare=1)
    one = tokens[index]
    assert torch.equal(one, tokens.to_list()[int(index)])
    assert one.untyped_storage().data_ptr() == tokens.values.untyped_storage().data_ptr()


def test_iteration_and_length():
    tokens = batch(2, 0, 3, spare=1)
    assert len(tokens) == 3
    assert [t.shape[0] for t in tokens] == [2, 0, 3]
    assert len(batch()) == 0
    assert list(batch()) == []


ONE_AXIS = "index must have one axis, that of the sequences"
WITHOUT_MEANING = {
    "bool": (True, TypeError, "index must be a number, slice, list or tensor of sequences; got True"),
    "one bool": (torch.tensor(True), TypeError, "got one bool"),
    "tuple": ((0, 1), TypeError, r"got \(0, 1\)"),
    "text": ("a", TypeError, "got 'a'"),
    "None": (None, TypeError, "got None"),
    "float": (1.5, TypeError, "got 1.5"),
    "floats": ([0.5], TypeError, "index must be of a signed integer type or bool; got torch.float32"),
    "uint8": (torch.tensor([1], dtype=torch.uint8), TypeError, "got torch.uint8"),
    "beyond": (3, IndexError, "index must lie within the 3 sequences; got 3"),
    "before": (-4, IndexError, "index must lie within the 3 sequences; got -4"),
    "one beyond": ([0, 7], IndexError, "index must lie within the 3 sequences; got 7"),
    "short mask": (torch.tensor([True]), IndexError, "index must have one bool per sequence, 3; got 1"),
    "two axes": (torch.zeros(1, 1, dtype=torch.int64), IndexError, ONE_AXIS),
}


@pytest.mark.parametrize("name", WITHOUT_MEANING)
def test_an_index_without_meaning_is_refused(name):
    index, error, words = WITHOUT_MEANING[name]
    with pytest.raises(error, match=words):
        batch(1, 2, 0)[index]


def test_cat_joins_batches_without_their_spare_rows():
    parts = [batch(2, 0, spare=3), batch(), batch(1), batch(0, 4, spare=1)]
    whole = PackedTokens.cat(parts)
    assert lists(whole) == [t for part in parts for t in lists(part)]
    assert whole.cu_seqlens.tolist() == [0, 2, 2, 3, 3, 7]
    assert whole.cu_seqlens.dtype == torch.int32
    assert whole.values.shape[0] == 7
    assert whole.max_seqlen == 4
    assert PackedTokens.cat([whole[:2], whole[2:]]) == whole


def test_cat_refuses_what_does_not_fit_together():
    with pytest.raises(ValueError, match="tokens must hold at least one PackedTokens"):
        PackedTokens.cat([])
    with pytest.raises(TypeError, match="tokens must hold PackedTokens; got Tensor"):
        PackedTokens.cat([batch(1), torch.zeros(2)])
    with pytest.raises(ValueError, match=r"tokens must have one dtype; got torch.float16, torch.float32"):
        PackedTokens.cat([batch(1), batch(1).half()])
    with pytest.raises(ValueError, match="tokens must have one device; got cpu, meta"):
        PackedTokens.cat([batch(1), batch(1).to("meta")])
    with pytest.raises(ValueError, match=r"values of one shape but for the rows; got \(1, 2\) and \(1, 3\)"):
        PackedTokens.cat([batch(1), PackedTokens(torch.zeros(1, 3), ints(0, 1), 1)])
    many = PackedTokens(torch.zeros(1).expand(2**30), ints(0, 2**30), 2**30)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 rows, because offsets are int32; got 2147483648"):
        PackedTokens.cat([many, many])


def test_gradients_flow_through_what_moves_values():
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for act in (
        lambda t: t[1:].values,
        lambda t: t[[2, 0, 2]].values,
        lambda t: t[2],
        lambda t: PackedTokens.cat([t, t[:1]]).values,
        lambda t: t.to("cpu", copy=True).values,
    ):
        assert torch.autograd.gradcheck(lambda v, act=act: act(PackedTokens(v, ints(0, 2, 2, 5), 3)), rows)
    tokens = batch(1, 2).requires_grad_()
    assert tokens.requires_grad
    assert not tokens.detach().requires_grad


def test_moving_and_casting():
    tokens = batch(2, 0, 3)
    assert tokens.to("cpu") is tokens
    assert tokens.cpu() is tokens
    assert tokens.dtype == torch.float32
    assert tokens.device == torch.device("cpu")
    copied = tokens.to("cpu", copy=True)
    assert copied == tokens
    for name in ("values", "cu_seqlens"):
        assert getattr(copied, name).data_ptr() != getattr(tokens, name).data_ptr()
    positional = tokens.to(torch.device("cpu"), torch.float32, False, True)
    assert positional.cu_seqlens.data_ptr() != tokens.cu_seqlens.data_ptr()
    like = batch(1).to(torch.float64)
    for cast, dtype in (
        (tokens.to(torch.bfloat16), torch.bfloat16),
        (tokens.to("cpu", torch.float16, non_blocking=True), torch.float16),
        (tokens.to(dtype=torch.float64), torch.float64),
        (tokens.to(like.values), torch.float64),
        (tokens.to(like), torch.float64),
        (tokens.half(), torch.float16),
        (tokens.bfloat16(), torch.bfloat16),
        (tokens.half().float(), torch.float32),
    ):
        assert cast.dtype == dtype
        assert cast.cu_seqlens is tokens.cu_seqlens
        assert torch.equal(cast.values, tokens.values.to(dtype)) or dtype == torch.float32
    moved = tokens.to("meta", torch.float16)
    assert moved.values.device.type == moved.cu_seqlens.device.type == moved.device.type == "meta"
    assert moved.cu_seqlens.dtype == torch.int32
    with pytest.raises((TypeError, RuntimeError)):
        tokens.to("nowhere")


def test_pinning(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: t.dtype != torch.int32)
    tokens = batch(2, 1)
    assert tokens.pin_memory() == tokens
    assert [t is x for t, x in zip(pinned, (tokens.values, tokens.cu_seqlens), strict=True)] == [True, True]
    assert not tokens.is_pinned()  # its offsets are not
    from torch.utils.data._utils.pin_memory import pin_memory  # what a DataLoader calls

    found = pin_memory({"image": tokens})
    assert found["image"] == tokens
    assert len(pinned) == 4


def test_equality_is_of_the_sequences():
    tokens = batch(2, 0, 3)
    same = PackedTokens(torch.cat([tokens.values, torch.full((1, 2), torch.nan)]), tokens.cu_seqlens.clone(), 9)
    assert tokens == same
    assert hash(tokens) == hash(tokens)
    assert len({tokens, tokens, same}) == 2
    others = (batch(2, 0, 3), tokens.half(), tokens[:2], PackedTokens(tokens.values, ints(0, 1, 2, 5), 3), None)
    assert all(tokens != other for other in others)
    assert tokens in [None, same]
    nan = tokens.with_values(torch.full_like(tokens.values, torch.nan))
    assert nan != copy.deepcopy(nan)


def test_repr_is_short_and_reads_nothing_that_waits():
    tokens = batch(2, 0, 3)
    assert repr(tokens) == ("PackedTokens(3 sequences of 0 to 3 rows, values=(5, 2) float32 cpu, max_seqlen=3)")
    assert repr(batch(4)) == "PackedTokens(1 sequences of 4 rows, values=(4, 2) float32 cpu, max_seqlen=4)"
    assert repr(batch()) == "PackedTokens(0 sequences, values=(0, 2) float32 cpu, max_seqlen=0)"
    assert repr(tokens.to("meta", torch.float16)) == (
        "PackedTokens(3 sequences, values=(5, 2) float16 meta, max_seqlen=3)"
    )
    with FakeTensorMode() as mode:
        fake = PackedTokens(mode.from_tensor(tokens.values), mode.from_tensor(tokens.cu_seqlens), 3)
        assert repr(fake) == "PackedTokens(3 sequences, values=(5, 2) float32 cpu, max_seqlen=3)"
    specs = pytree.tree_map(lambda t: 0, tokens)
    assert repr(specs) == "PackedTokens(sequences, values=int, max_seqlen=0)"
    seen = []
    torch.vmap(lambda v, o: (seen.append(repr(PackedTokens(v, o, 3))), v)[1])(
        torch.zeros(2, 5, 2, device="meta"), torch.zeros(2, 4, dtype=torch.int32, device="meta")
    )
    assert seen == ["PackedTokens(3 sequences, values=(5, 2) float32 meta, max_seqlen=3)"]


def test_saving_and_copying():
    tokens = batch(2, 0, 3, spare=1)
    file = io.BytesIO()
    torch.save({"image": [tokens]}, file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=True)["image"]
    for again in (loaded, pickle.loads(pickle.dumps(tokens)), copy.deepcopy(tokens), copy.copy(tokens)):
        assert type(again) is PackedTokens
        assert again == tokens
        assert again.values.shape == tokens.values.shape
        assert again.max_seqlen == tokens.max_seqlen
    file.seek(0)
    assert torch.load(file, weights_only=True, map_location="meta")["image"][0].device.type == "meta"


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"image": PackedTokens.from_list([torch.full((i + 1, 2), float(i))]), "label": i}


def _total(queue, tokens):
    queue.put((len(tokens), float(tokens.values.sum())))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loaders_collate(workers):
    batches = list(DataLoader(Samples(), batch_size=2, num_workers=workers))
    assert [b["image"].lengths.tolist() for b in batches] == [[1, 2], [3, 4]]
    assert batches[1]["image"].values[:, 0].tolist() == [2.0] * 3 + [3.0] * 4
    assert batches[1]["label"].tolist() == [2, 3]


def test_collating_by_hand():
    first, second = batch(1, 2), batch(3)
    assert default_collate([first, second]) == PackedTokens.cat([first, second])
    pairs = default_collate([(first, 1), (second, 2)])
    assert lists(pairs[0]) == [*lists(first), *lists(second)]


def test_other_processes_take_them():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_total, args=(queue, PackedTokens.from_list([torch.ones(2, 3), torch.ones(1, 3)])))
    process.start()
    assert queue.get(timeout=300) == (2, 9.0)
    process.join(300)
    assert process.exitcode == 0


COMPILED = {
    "cast": lambda t: t.to(torch.float64),
    "half": lambda t: t.half(),
    "detach": lambda t: t.detach(),
    "length": lambda t: t.values * len(t),
    "cat": lambda t: PackedTokens.cat([t, t]),
    "one": lambda t: t[1] * 2,
    "slice": lambda t: t[:1],
    "reversed": lambda t: t[::-1],
    "repr": lambda t: (repr(t), t.values + 1)[1],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole(name):
    torch._dynamo.reset()
    tokens, call = batch(2, 3), COMPILED[name]
    eager, compiled = call(tokens), torch.compile(call, backend="eager", fullgraph=True)(tokens)
    assert type(compiled) is type(eager)
    assert eager == compiled if isinstance(eager, PackedTokens) else torch.equal(eager, compiled)
