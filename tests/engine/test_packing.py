"""Packed batches: what is computed without padding equals plain transformers, and no row touches another."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import models, network, torch_forms
from engine.config import EngineConfig
from engine.packing import pack
from engine.torch_packed import PackedNetwork, PlainLinear, PrepackedLinear

LENGTH_MAX, POISONED = 48, 63
LINEARS = [PlainLinear, PrepackedLinear]
lengths = st.lists(st.integers(1, LENGTH_MAX), min_size=1, max_size=12)
shared_models = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are tiny: on a busy machine a second thread only adds barriers to wait at."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(sizes: list[int], seed: int = 7) -> list[np.ndarray]:  # type: ignore[type-arg]
    chance = np.random.default_rng(seed)
    return [chance.integers(4, 60, size).astype(np.int32) for size in sizes]


def load(folder: Path, **changes: Any) -> tuple[network.Network, Any]:
    card = models.read_card(str(folder), folder)
    model = models.load_model(card)
    return network.build(model, card, changes.get("pooling", card.pooling), LENGTH_MAX), model


def run(form: Any, batch: list[np.ndarray]) -> list[np.ndarray]:  # type: ignore[type-arg]
    with torch.inference_mode():
        return list(form.run(batch, max(len(row) for row in batch)))


def alone(form: Any, row: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return run(form, [row])[0]


@given(lengths)
def test_every_token_lies_in_exactly_one_group_at_its_place(sizes: list[int]) -> None:
    batch = rows(sizes)
    packed = pack(batch)
    assert packed.groups[0].start == 0
    assert [group.start for group in packed.groups[1:]] == [group.end for group in packed.groups[:-1]]
    assert packed.groups[-1].end == len(packed.ids) == sum(sizes)
    assert len({group.length for group in packed.groups}) == len(packed.groups) == len(set(sizes))
    assert [batch[i].tolist() for i in packed.order] == [
        packed.ids[start : start + len(batch[i])].tolist()
        for start, i in zip(packed.starts().tolist(), packed.order, strict=True)
    ]
    assert packed.positions.tolist() == [p for i in packed.order for p in range(sizes[i])]


@given(lengths)
def test_outputs_come_back_in_the_order_of_the_batch(sizes: list[int]) -> None:
    batch = rows(sizes)
    packed = pack(batch)
    per_row = np.array([[ids[0]] for ids in (batch[i] for i in packed.order)])
    assert [int(row[0]) for row in packed.unpack(per_row)] == [int(row[0]) for row in batch]
    per_token = packed.unpack_tokens(packed.ids[:, None])
    assert [part[:, 0].tolist() for part in per_token] == [row.tolist() for row in batch]


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("name", ["bert", "bert-cls"])
def test_packed_embeddings_equal_plain_transformers_one_by_one(
    tiny_models: dict[str, Path], name: str, linear: Any
) -> None:
    net, model = load(tiny_models[name])
    form = PackedNetwork(net, linear)

    @shared_models
    @given(lengths)
    def check(sizes: list[int]) -> None:
        batch = rows(sizes)
        for row, got in zip(batch, run(form, batch), strict=True):
            with torch.inference_mode():
                hidden = model(input_ids=torch.from_numpy(row).long()[None]).last_hidden_state[0]
            expected = (hidden[0] if name == "bert-cls" else hidden.mean(0)).numpy()
            assert torch_forms.least_cosine([got], [expected]) > 0.9999

    check()


@pytest.mark.parametrize("linear", LINEARS)
def test_a_packed_heads_logits_equal_plain_transformers_one_by_one(tiny_models: dict[str, Path], linear: Any) -> None:
    net, model = load(tiny_models["head"])
    batch = rows([5, 17, 5, 1, 40])
    for row, got in zip(batch, run(PackedNetwork(net, linear), batch), strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(row).long()[None]).logits[0]
        np.testing.assert_allclose(got[32:], logits.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("linear", LINEARS)
def test_the_same_row_has_the_same_output_beside_any_neighbours(tiny_models: dict[str, Path], linear: Any) -> None:
    net, _ = load(tiny_models["head"])
    form = PackedNetwork(net, linear)
    (row,) = rows([11], seed=1)
    expected = alone(form, row)

    @shared_models
    @given(lengths, st.integers(0, 2**32 - 1), st.data())
    def check(sizes: list[int], seed: int, data: Any) -> None:
        neighbours = rows(sizes, seed)
        place = data.draw(st.integers(0, len(neighbours)))
        got = run(form, [*neighbours[:place], row, *neighbours[place:]])[place]
        # Not bit for bit: how many rows a matrix product has decides the order of its sums.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    check()
    assert not np.allclose(alone(form, rows([11], seed=2)[0]), expected, atol=1e-2), "the test must be able to fail"


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["bert", "bert-cls", "head"])
def test_a_neighbour_that_is_no_number_poisons_itself_alone(
    tiny_models: dict[str, Path], name: str, poison: float, linear: Any
) -> None:
    """In attention a weight of zero would not keep it out: zero times infinity is no number."""
    net, _ = load(tiny_models[name])
    clean = rows([3, 9, 9, 30, 1])
    expected = [alone(PackedNetwork(net, linear), row) for row in clean]
    encoder = net.encoder
    assert isinstance(encoder, network.BertEncoder)
    with torch.no_grad():
        encoder.word[POISONED] = poison
    form = PackedNetwork(net, linear)
    bad = [np.full(size, POISONED, np.int32) for size in (3, 9, 12, 40)]
    mixed = [bad[0], clean[0], clean[1], bad[1], clean[2], bad[2], clean[3], bad[3], clean[4]]
    got = run(form, mixed)
    for place, row in zip((1, 2, 4, 6, 8), expected, strict=True):
        np.testing.assert_allclose(got[place], row, rtol=1e-3, atol=1e-3)
    if not np.isfinite(poison):
        assert all(np.isnan(got[place]).any() for place in (0, 3, 5, 7)), "the poison must be able to show"


def test_rows_of_tokens_are_cut_out_of_a_packed_batch(tiny_models: dict[str, Path]) -> None:
    net, model = load(tiny_models["bert"])
    head = torch.nn.Linear(32, 5)
    per_token = network.TokenNetwork(network.BertEncoder(model), head, LENGTH_MAX).eval()
    form, padded = PackedNetwork(per_token, PlainLinear), torch_forms.PaddedNetwork(per_token)
    batch = rows([7, 1, 20, 7])
    for one, other, row in zip(run(form, batch), run(padded, batch), batch, strict=True):
        assert one.shape == (len(row), 5)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    del net


def choose(folder: Path, **changes: Any) -> tuple[Any, str, dict[str, str]]:
    net, _ = load(folder)
    reasons: dict[str, str] = {}
    form, precision = torch_forms.choose(net, EngineConfig(**{"precision": "fp32", **changes}), reasons)
    return form, precision, reasons


def test_what_is_switched_off_is_not_used_and_says_so(tiny_models: dict[str, Path]) -> None:
    form, _, reasons = choose(tiny_models["bert"], packing="off")
    assert not form.packed
    assert reasons["packing"] == "padded: configured"
    form, _, reasons = choose(tiny_models["bert"], prepack="off")
    assert form.packed
    assert reasons["linears"] == "PyTorch's own: configured"
    form, _, reasons = choose(tiny_models["distilbert"])
    assert not form.packed
    assert "only BERT" in reasons["packing"]


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_every_precision_runs_packed_within_its_tolerance(tiny_models: dict[str, Path], precision: str) -> None:
    batch = rows([3, 9, 9, 30, 1])
    expected = run(choose(tiny_models["bert"], packing="off")[0], batch)
    form, chosen, reasons = choose(tiny_models["bert"], precision=precision)
    assert form.packed
    assert chosen in reasons["precision"]
    assert torch_forms.least_cosine(run(form, batch), expected) > 0.99, "weights of the tiny model are made large"


class _Zeros:
    """An operator of PyTorch that computes something else."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros(len(x), weight.shape[0])

    def binary(self, x: torch.Tensor, residual: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(residual)


def test_prepacked_weights_that_fail_or_disagree_are_not_used(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rows([3, 9, 9, 30, 1])
    expected = run(choose(tiny_models["bert"], prepack="off")[0], batch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", _Zeros(), raising=False)
        form, _, reasons = choose(tiny_models["bert"])
    assert reasons["linears"].startswith("PyTorch's own: prepacked weights measured")
    assert torch_forms.least_cosine(run(form, batch), expected) > 0.9999

    def gone(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such operator\nand a long explanation")

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", gone, raising=False)
        form, _, reasons = choose(tiny_models["bert"])
    assert reasons["linears"] == "PyTorch's own: prepacked weights do not work here: no such operator"
    assert torch_forms.least_cosine(run(form, batch), expected) > 0.9999


def test_what_is_no_number_never_agrees() -> None:
    good, bad = np.ones(3, np.float32), np.full(3, np.nan, np.float32)
    for outputs in ([bad, good], [good, bad]):
        assert not torch_forms.least_cosine(outputs, [good, good]) >= 0
    assert torch_forms.least_cosine([good, good], [good, good]) == pytest.approx(1)


def test_a_network_that_cannot_be_compiled_runs_as_it_is(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rows([3, 9, 9, 30, 1])
    expected = run(choose(tiny_models["distilbert"])[0], batch)

    def no_compiler(net: Any, **_: Any) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no C++ compiler found\nand a long explanation")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    form, _, reasons = choose(tiny_models["distilbert"], compile=True)
    assert reasons["compile"] == "not compiled: RuntimeError: no C++ compiler found"
    assert torch_forms.least_cosine(run(form, batch), expected) > 0.9999
    form, _, reasons = choose(tiny_models["bert"], compile=True)
    assert form.packed
    assert reasons["compile"].startswith("not compiled")


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
def test_a_compiled_network_has_the_same_outputs(tiny_models: dict[str, Path]) -> None:
    net, _ = load(tiny_models["distilbert"])
    plain = torch_forms.PaddedNetwork(net)
    compiled = plain.compiled()
    for sizes in ([3, 9, 9, 30, 1], [7, 7], [40] * 5):
        assert torch_forms.least_cosine(run(compiled, rows(sizes)), run(plain, rows(sizes))) > 0.9999
