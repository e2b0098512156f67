"""Which precision a GPU runs a model in: half, where it agrees with fp32. The decision needs no GPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import models, network, torch_forms
from engine.backend import Precision

CPU = torch.device("cpu")
HALVES: list[Precision] = ["fp16", "bf16"]


@pytest.fixture
def net(tiny_models: dict[str, Path]) -> network.Network:
    card = models.read_card(str(tiny_models["bert"]), tiny_models["bert"])
    return network.build(models.load_model(card), card, "mean", 48)


def middle(net: network.Network) -> network.BertLayer:
    encoder = net.encoder
    assert isinstance(encoder, network.BertEncoder)
    return encoder.bert_layers()[0]


def place(net: network.Network, candidates: Sequence[Precision] = HALVES) -> tuple[network.Network, str, str]:
    reasons: dict[str, str] = {}
    placed, precision = torch_forms.place(net, CPU, "auto", candidates, reasons)
    assert next(placed.parameters()).dtype == torch_forms.DTYPES[precision]
    return placed, precision, reasons["precision"]


def test_what_agrees_with_fp32_is_taken(net: network.Network) -> None:
    _, precision, reason = place(net)
    assert precision == "fp16"
    assert reason.startswith("fp16: agrees with fp32 on 16 texts of 48 tokens (cosine ")
    assert place(net, [])[1:] == ("fp32", "fp32: nothing less agrees with it on 16 texts of 48 tokens")


def test_a_model_that_overflows_fp16_runs_in_bf16(net: network.Network) -> None:
    with torch.no_grad():
        # The same function (nearly: GELU is bent around zero), by way of numbers up to a million.
        middle(net).up.weight.mul_(1e5)
        middle(net).down.weight.mul_(1e-5)
    placed, precision, reason = place(net)
    assert precision == "bf16"
    assert reason.startswith("bf16: agrees with fp32")
    assert reason.endswith("; fp16 does not (not all numbers are finite)")
    ids, lengths = torch.full((1, 5), 7), torch.tensor([5])
    assert np.isfinite(placed(ids, lengths, full=True).numpy()).all()


def test_a_model_that_no_half_precision_can_hold_runs_in_fp32_as_it_was(net: network.Network) -> None:
    with torch.no_grad():
        middle(net).down.bias.add_(3000.0)  # the norm behind it takes it away again, and what it rounded off is gone
    ids, lengths = torch.full((1, 5), 7), torch.tensor([5])
    with torch.inference_mode():
        expected = net(ids, lengths, full=True).numpy()
    placed, precision, reason = place(net)
    assert precision == "fp32"
    assert "; fp16 does not (cosine 0." in reason
    assert "; bf16 does not (cosine 0." in reason
    with torch.inference_mode():
        np.testing.assert_array_equal(placed(ids, lengths, full=True).numpy(), expected)


def test_a_precision_that_is_configured_is_not_put_to_the_test(net: network.Network) -> None:
    reasons: dict[str, str] = {}
    placed, precision = torch_forms.place(net, CPU, "bf16", HALVES, reasons)
    assert (precision, reasons["precision"]) == ("bf16", "bf16: configured")
    assert next(placed.parameters()).dtype == torch.bfloat16
