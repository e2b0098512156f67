"""The network as it is traced for OpenVINO: one graph without branches, inputs ids and lengths, any shape.

`Unpadded` computes BERT's encoder on real tokens only, as far as single tokens are concerned (linear layers, norms):
those are gathered into one matrix in front, spread out to [rows, length] for attention, and gathered again behind
it. A row's padding is filled with its own last token and masked, so that nothing of one row reaches another.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its name in every PyTorch program
from torch import Tensor, nn

from engine.network import BertEncoder, Network


class Masked(nn.Module):
    """A network that always masks.

    Args:
        net: its encoder is replaced by a faster form with the same outputs where there is one.
    """

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        if isinstance(net.encoder, BertEncoder):
            net.encoder = Unpadded(net.encoder)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """See `Network.forward`."""
        output: Tensor = self.net(ids, lengths, full=False)
        return output


class Unpadded(nn.Module):
    """See the module's docstring, and `network.Encoder`.

    Args:
        source: its weights are shared.
    """

    def __init__(self, source: BertEncoder) -> None:
        super().__init__()
        self.source = source

    def forward(self, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `network.Encoder`."""
        assert keep is not None, "the graph is traced with the mask"
        source, real = self.source, keep.reshape(-1)
        # Of each real token its place in the padded batch; of each place the token that stands there.
        gather = real.nonzero().squeeze(1)
        spread = (real.int().cumsum(0) - 1).reshape(ids.shape)
        positions = torch.arange(ids.shape[1]).expand(ids.shape).reshape(-1)[gather]
        x = source.norm(F.embedding(ids.reshape(-1)[gather], source.word) + F.embedding(positions, source.position))
        mask = keep[:, None, None, :]
        for layer in source.bert_layers():
            padded = F.embedding(spread, layer.qkv(x))
            rows, length = spread.shape
            query, key, value = padded.view(rows, length, 3, layer.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
            x = layer.norm(x + layer.out(attended.reshape(rows * length, -1)[gather]))
            x = layer.norm_down(x + layer.down(F.gelu(layer.up(x))))
        vectors = F.embedding(spread, x)
        return vectors, None if source.head is None else source.head(vectors[:, 0])
