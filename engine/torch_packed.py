"""BERT on a packed batch: no padding is computed. And BERT's linear layers, ordered for the CPU beforehand.

`PackedNetwork` computes what `network.Network` does over a `BertEncoder`, from the same weights, on the layout of
`packing`. It is only read while it runs: several threads may run one at a time.

Linear layers come in two kinds. `PlainLinear` is PyTorch's own. `PrepackedLinear` has its weights in the blocked
order that oneDNN's kernels read, which otherwise happens in every call, and fuses what follows (GELU, a residual)
into the kernel: the operators that PyTorch's compiler emits for frozen weights. They are not a public interface
of PyTorch: `torch_forms` tries them before they are used and falls back.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its name in every PyTorch program
from torch import Tensor, nn

from engine.network import BertEncoder, BertLayer, Network, TokenNetwork
from engine.packing import Group, Packed, pack

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

# Tokens of a batch that the blocked order is chosen for. The order does not depend on it on the CPUs seen.
_TYPICAL_TOKENS: Final = 1024


class Linear(Protocol):
    """x W^T + b, and what may follow it. All take [tokens, in] and return [tokens, out]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Nothing follows."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """The exact GELU follows."""
        ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual`, [tokens, out], is added."""
        ...


class PlainLinear:
    """See `Linear`. Shares the weights of `source`."""

    def __init__(self, source: nn.Linear) -> None:
        self._weight, self._bias = source.weight, source.bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return F.linear(x, self._weight, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return F.gelu(self(x))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See `Linear`."""
        return residual + self(x)


class PrepackedLinear:
    """See `Linear`. Holds its own, reordered copy of the weights."""

    def __init__(self, source: nn.Linear) -> None:
        weight = source.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_TOKENS)  # noqa: SLF001
        self._bias = source.bias.detach()
        self._linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        y: Tensor = self._linear(x, self._weight, self._bias, "none", [], "")
        return y

    def gelu(self, x: Tensor) -> Tensor:
        """See `Linear`. The algorithm "none" is the exact one."""
        y: Tensor = self._linear(x, self._weight, self._bias, "gelu", [], "none")
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See `Linear`."""
        y: Tensor = self._linear.binary(x, residual, self._weight, self._bias, "add")
        return y


class PackedNetwork:
    """A text's whole way on the CPU, packed.

    Args:
        net: over a `BertEncoder`, in the precision to compute in. Weights are shared where they are not reordered.
        linear: the kind of linear layer.
    """

    packed = True

    def __init__(self, net: Network, linear: type[PlainLinear] | type[PrepackedLinear]) -> None:
        encoder = net.encoder
        assert isinstance(encoder, BertEncoder), "packing needs the fused encoder"
        self._word, self._position, self._norm = encoder.word, encoder.position, encoder.norm
        self._layers = [_PackedLayer(layer, linear) for layer in encoder.bert_layers()]
        self._head = encoder.head
        self._cls = net.pooling == "cls"
        self._classifier = net.classifier if isinstance(net, TokenNetwork) else None
        self._per_token = isinstance(net, TokenNetwork)

    def run(self, rows: "Rows", length: int) -> "Outputs":
        """Outputs of a batch, as `Backend.collect` gives them; `length` is not needed."""
        batch = pack(rows)
        vectors = self._encode(batch)
        if self._per_token:
            assert self._classifier is not None
            return batch.unpack_tokens(self._classifier(vectors).float().numpy())
        first = vectors[torch.from_numpy(batch.starts())] if self._cls or self._head else None
        pooled = F.normalize(_means(vectors, batch.groups) if not self._cls else _known(first).float(), dim=-1)
        if self._head is None:
            return batch.unpack(pooled.half().numpy())
        logits = self._head(_known(first)).float()
        return batch.unpack(torch.cat([pooled, logits], dim=1).numpy())

    def _encode(self, batch: Packed) -> Tensor:
        """Token vectors, [tokens, width]."""
        words = F.embedding(torch.from_numpy(batch.ids), self._word)
        x: Tensor = self._norm(words + F.embedding(torch.from_numpy(batch.positions), self._position))
        for layer in self._layers:
            x = layer(x, batch.groups)
        return x


class _PackedLayer:
    def __init__(self, source: BertLayer, linear: type[PlainLinear] | type[PrepackedLinear]) -> None:
        self._heads = source.heads
        self._qkv: Linear = linear(source.qkv)
        self._out: Linear = linear(source.out)
        self._up: Linear = linear(source.up)
        self._down: Linear = linear(source.down)
        self._norm, self._norm_down = source.norm, source.norm_down

    def __call__(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        qkv = self._qkv(x)
        parts = [self._attend(qkv[group.start : group.end], group) for group in groups]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        x = self._norm(self._out.plus(attended, x))
        y: Tensor = self._norm_down(self._down.plus(self._up.gelu(x), x))
        return y

    def _attend(self, qkv: Tensor, group: Group) -> Tensor:
        """Attention within each row of a group, [tokens of the group, width]."""
        width = qkv.shape[1] // 3
        shaped = qkv.view(group.rows, group.length, 3, self._heads, width // self._heads).permute(2, 0, 3, 1, 4)
        query, key, value = shaped.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(group.rows * group.length, width)


def _means(vectors: Tensor, groups: Sequence[Group]) -> Tensor:
    """The mean vector of each packed row, float32 [rows, width]."""
    shape = vectors.shape[1]
    return torch.cat(
        [vectors[each.start : each.end].view(each.rows, each.length, shape).float().mean(1) for each in groups]
    )


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
