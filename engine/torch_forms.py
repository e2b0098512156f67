"""In which form a network runs fastest on this CPU, with the same results: precision, packing, prepacked weights.

Every form is tried on a probe before it is used. One that raises, disagrees with the plain one, or is not faster
is dropped, and the reason noted; the plain one always remains. Only one form's weights stay in memory. On a GPU
(`place`) only the precision is chosen, by agreement alone: half precision is faster there.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np
import torch

from engine.backend import Precision
from engine.config import EngineConfig
from engine.network import BertEncoder, Network
from engine.packing import cut, pad
from engine.probe import AGREEMENT_MIN, PROBE_LENGTH, PROBE_ROWS, SPEEDUP_MIN, measure, probe_batch
from engine.torch_packed import PackedNetwork, PlainLinear, PrepackedLinear

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# As `AGREEMENT_MIN`, for another form in fp32.
AGREEMENT_EXACT: Final = 0.9999
_OWN: Final = "PyTorch's own"
_PROBED: Final = f"{PROBE_ROWS} texts of {PROBE_LENGTH} tokens"


class Form(Protocol):
    """A network on the CPU, ready to run; only read while it runs, so that several threads may run it."""

    packed: bool

    def run(self, rows: "Rows", length: int) -> "Outputs":
        """Outputs of a batch, as `Backend.collect` gives them. Call it in inference mode."""
        ...


class PaddedNetwork:
    """A network whose rows are padded to one length. See `Form`.

    Args:
        net: a `Network` in evaluation mode, as it is or compiled.
    """

    packed = False

    def __init__(self, net: Callable[..., torch.Tensor]) -> None:
        self._net = net

    def run(self, rows: "Rows", length: int) -> "Outputs":
        """See `Form`."""
        ids, lengths = pad(rows, length)
        full = bool((lengths == length).all())
        outputs = self._net(torch.from_numpy(ids), torch.from_numpy(lengths), full=full)
        return cut(outputs.numpy(), lengths.tolist())

    def compiled(self) -> "PaddedNetwork":
        """The same, compiled for any shape when it first runs."""
        return PaddedNetwork(torch.compile(self._net, dynamic=True))


@dataclass(frozen=True, slots=True)
class _Tried:
    form: Form
    precision: Precision
    prepacked: bool


def choose(net: Network, config: EngineConfig, reasons: dict[str, str]) -> tuple[Form, Precision]:
    """The fastest form of `net` that agrees with it.

    Args:
        net: in fp32, on the CPU. Do not keep it: what the form does not share of it is then freed.
        config: precision, packing, prepack.
        reasons: takes what is chosen, and why.
    """
    packs = config.packing == "auto" and isinstance(net.encoder, BertEncoder)
    reasons["packing"] = _packing_reason(config, packs=packs)
    if config.precision == "auto":
        chosen = _fastest(net, config, reasons, packs=packs)
    else:
        reasons["precision"] = f"{config.precision}: configured"
        net = net.to(DTYPES[config.precision])
        chosen = _with_linears(net, config.precision, config, reasons, packs=packs)
    if config.compile:
        return _compiled(chosen, net.keep_table.shape[1], reasons), chosen.precision
    return chosen.form, chosen.precision


def place(
    net: Network,
    device: torch.device,
    wanted: Precision | Literal["auto"],
    candidates: Sequence[Precision],
    reasons: dict[str, str],
) -> tuple[Network, Precision]:
    """`net` on a device that is fast in half precision, in the first one that agrees with fp32; else in fp32.

    Args:
        net: in fp32, on the CPU, where the outputs that count are computed. Do not keep it.
        device: where it will run.
        wanted: precision, as configured.
        candidates: what the device has instructions for, the best first.
        reasons: takes what is chosen, and why.
    """
    if wanted != "auto":
        reasons["precision"] = f"{wanted}: configured"
        return net.to(device, DTYPES[wanted]), wanted
    expected = _padded_probe(net)
    refused: list[str] = []
    for name in candidates:
        # A copy: what was rounded cannot be had back.
        half = copy.deepcopy(net).to(device, DTYPES[name])
        output = _padded_probe(half)
        finite = all(np.isfinite(row).all() for row in output)
        agreement = least_cosine(output, expected) if finite else float("nan")
        told = f"cosine {agreement:.5f}" if finite else "not all numbers are finite"
        if agreement >= AGREEMENT_MIN:
            reasons["precision"] = f"{name}: agrees with fp32 on {_PROBED} ({told}){''.join(refused)}"
            return half, name
        refused.append(f"; {name} does not ({told})")
        del half
    reasons["precision"] = f"fp32: nothing less agrees with it on {_PROBED}{''.join(refused)}"
    return net.to(device), "fp32"


def _padded_probe(net: Network) -> "Outputs":
    """The probe's outputs, with masks, wherever the network is."""
    rows, where = probe_batch(net.keep_table.shape[1]), net.keep_table.device
    ids, lengths = (torch.from_numpy(each).to(where) for each in pad(rows, len(rows[0])))
    with torch.inference_mode():
        return list(net(ids, lengths, full=False).cpu().numpy())


def _packing_reason(config: EngineConfig, *, packs: bool) -> str:
    if packs:
        return "packed: no padding is computed"
    return "padded: " + ("configured" if config.packing == "off" else "only BERT's encoder is computed packed")


def _fastest(net: Network, config: EngineConfig, reasons: dict[str, str], *, packs: bool) -> _Tried:
    best, best_s, notes = _with_linears(net, "fp32", config, reasons, packs=packs), float("inf"), []
    exact, length_max = best, net.keep_table.shape[1]
    for name in cpu_candidates():
        half = _half(net, name, packs=packs, prepacked=exact.prepacked)
        (reference, full_s), (output, half_s) = measure(_probe(exact.form, length_max), _probe(half.form, length_max))
        agreement = least_cosine(output, reference)
        notes.append(f"{name} {half_s * 1e3:.1f} ms against {full_s * 1e3:.1f} ms (cosine {agreement:.5f})")
        if half_s < min(best_s, full_s / SPEEDUP_MIN) and agreement >= AGREEMENT_MIN:
            best, best_s = half, half_s
    measured = f"measured {', '.join(notes)} for {_PROBED}"
    reasons["precision"] = f"{best.precision}: {measured if notes else 'the CPU has no instructions for less'}"
    return best


def _half(net: Network, precision: Precision, *, packs: bool, prepacked: bool) -> _Tried:
    half = copy.deepcopy(net).to(DTYPES[precision])
    if prepacked:
        try:
            return _Tried(PackedNetwork(half, PrepackedLinear), precision, prepacked=True)
        except (RuntimeError, AttributeError):  # oneDNN does not have it in this precision
            pass
    return _Tried(_plain(half, packs=packs), precision, prepacked=False)


def _plain(net: Network, *, packs: bool) -> Form:
    return PackedNetwork(net, PlainLinear) if packs else PaddedNetwork(net)


def _with_linears(
    net: Network, precision: Precision, config: EngineConfig, reasons: dict[str, str], *, packs: bool
) -> _Tried:
    """`net` in its own precision, with the linear layers that are faster."""
    plain = _Tried(_plain(net, packs=packs), precision, prepacked=False)
    if not packs or config.prepack == "off":
        reasons["linears"] = f"{_OWN}: {'packing is off' if not packs else 'configured'}"
        return plain
    try:
        prepacked = _Tried(PackedNetwork(net, PrepackedLinear), precision, prepacked=True)
        length_max = net.keep_table.shape[1]
        (expected, plain_s), (output, prepacked_s) = measure(
            _probe(plain.form, length_max), _probe(prepacked.form, length_max)
        )
    except (RuntimeError, AttributeError) as error:
        reasons["linears"] = f"{_OWN}: prepacked weights do not work here: {str(error).splitlines()[0]}"
        return plain
    agreement, speedup = least_cosine(output, expected), plain_s / prepacked_s
    wanted = AGREEMENT_EXACT if precision == "fp32" else AGREEMENT_MIN
    chosen = prepacked if agreement >= wanted and speedup > 1 else plain
    reasons["linears"] = (
        f"{'prepacked' if chosen.prepacked else _OWN}: prepacked weights measured "
        f"{speedup:.2f} times as fast for {_PROBED} (cosine {agreement:.5f})"
    )
    return chosen


def cpu_candidates() -> list[Precision]:
    """Half precisions that the CPU has instructions for."""
    has = torch.cpu.get_capabilities()
    candidates: list[Precision] = []
    if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"):
        candidates.append("bf16")
    if has.get("avx512_fp16") or has.get("amx_fp16"):
        candidates.append("fp16")
    return candidates


def _compiled(chosen: _Tried, length_max: int, reasons: dict[str, str]) -> Form:
    """The chosen form, compiled by PyTorch, if that works, agrees and is faster."""
    if not isinstance(chosen.form, PaddedNetwork):
        reasons["compile"] = "not compiled: prepacked weights measured faster, and start at once (docs/decisions/013)"
        return chosen.form
    wanted = AGREEMENT_EXACT if chosen.precision == "fp32" else AGREEMENT_MIN
    try:
        compiled = chosen.form.compiled()
        gains = []
        for length in (PROBE_LENGTH, length_max):  # without padding, and with
            runs = _probe(chosen.form, length_max, length), _probe(compiled, length_max, length)
            (expected, plain_s), (output, compiled_s) = measure(*runs)
            if not least_cosine(output, expected) >= wanted:
                reasons["compile"] = "not compiled: the outputs disagree"
                return chosen.form
            gains.append(plain_s / compiled_s)
    except Exception as error:  # noqa: BLE001 - a compiler raises what it likes; here most often that g++ is missing
        reasons["compile"] = f"not compiled: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return chosen.form
    told = f"measured {gains[0]:.2f} times as fast for {_PROBED}"
    reasons["compile"] = f"compiled: {told}" if gains[0] > 1 else f"not compiled: {told}"
    return compiled if gains[0] > 1 else chosen.form


def _probe(form: Form, length_max: int, length: int = 0) -> Callable[[], "Outputs"]:
    """Runs the probe on `form`, padded to `length` tokens; 0: not padded."""
    rows = probe_batch(length_max)
    length = max(len(rows[0]), min(length, length_max))

    def run() -> "Outputs":
        with torch.inference_mode():
            return form.run(rows, length)

    return run


def least_cosine(left: "Outputs", right: "Outputs") -> float:
    """The least cosine of two batches of outputs, row by row; not a number if one holds such."""
    cosines = []
    for one, other in zip(left, right, strict=True):
        a, b = np.ravel(one).astype(np.float64), np.ravel(other).astype(np.float64)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float(a @ b) / norms if norms else 0.0)
    return float(np.min(cosines))
