"""What runs on the device: ids and lengths in, one row of numbers per text out.

`BertEncoder` is BERT's encoder with the three projections of attention fused and without the bookkeeping of
the transformers modules (per-call mask building, dropout, output objects); the weights are those of the
transformers model, and tests hold the outputs equal. Every other architecture runs in the transformers
module itself. The arithmetic of attention is PyTorch's scaled_dot_product_attention in both.

Masks: `keep` is a boolean [rows, length], true where a token is. It comes from a precomputed table, one row
lookup per batch, and is None for a batch without padding.
"""

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its name in every PyTorch program
from torch import Tensor, nn

from engine.models import ModelCard


class Encoder(Protocol):
    """Token ids to token vectors."""

    def __call__(self, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Vectors [rows, length, width], and logits [rows, labels] when the model has a head."""
        ...


class BertEncoder(nn.Module):
    """BERT's encoder, fused. Takes over the weights of `source`, a transformers BertModel."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        config = source.config
        embeddings = source.embeddings
        self.heads = config.num_attention_heads
        self.word = nn.Parameter(embeddings.word_embeddings.weight.detach(), requires_grad=False)
        # Our texts are single segments: the token type is always 0 and folds into the positions.
        position = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self.position = nn.Parameter(position.detach().clone(), requires_grad=False)
        self.norm = embeddings.LayerNorm
        self.layers = nn.ModuleList(_Layer(layer, self.heads) for layer in source.encoder.layer)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, None]:
        """See `Encoder`."""
        x = self.norm(F.embedding(ids, self.word) + self.position[: ids.shape[1]])
        mask = None if keep is None else keep[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x, None

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether a model's configuration is exactly what this class computes."""
        return (
            config.model_type == "bert"
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and config.hidden_act == "gelu"
            and not config.is_decoder
            and not getattr(config, "add_cross_attention", False)
            and config.hidden_size % config.num_attention_heads == 0
        )


class _Layer(nn.Module):
    def __init__(self, source: Any, heads: int) -> None:
        super().__init__()
        attention = source.attention.self
        parts = (attention.query, attention.key, attention.value)
        width = parts[0].in_features
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.out = source.attention.output.dense
        self.norm = source.attention.output.LayerNorm
        self.up = source.intermediate.dense
        self.down = source.output.dense
        self.norm_down = source.output.LayerNorm

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.norm(x + self.out(attended.transpose(1, 2).reshape(rows, length, width)))
        y: Tensor = self.norm_down(x + self.down(F.gelu(self.up(x))))
        return y


class PlainEncoder(nn.Module):
    """Any transformers encoder, with its sequence-classification head when it has one."""

    def __init__(self, model: Any, *, head: bool) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.requires_grad_(False)

    def forward(self, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Encoder`."""
        keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
        if not self.head:
            return self.model(input_ids=ids, attention_mask=keep.long()).last_hidden_state, None
        out = self.model(input_ids=ids, attention_mask=keep.long(), output_hidden_states=True)
        return out.hidden_states[-1], out.logits


class Network(nn.Module):
    """Encoder, pooling, normalisation, and the head's logits behind: a text's whole way on the device.

    Args:
        encoder: see `Encoder`.
        pooling: how token vectors become one.
        length_max: longest row; the size of the mask table (length_max + 1 times length_max booleans).
    """

    keep_table: Tensor

    def __init__(self, encoder: nn.Module, pooling: Literal["mean", "cls"], length_max: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        counts, positions = torch.arange(length_max + 1), torch.arange(length_max)
        self.register_buffer("keep_table", positions[None, :] < counts[:, None], persistent=False)

    def forward(self, ids: Tensor, lengths: Tensor, *, full: bool) -> Tensor:
        """One row per text.

        Args:
            ids: integers [rows, length].
            lengths: integers [rows]; at least 1.
            full: no row is padded; then no mask is used at all.

        Returns:
            float16 [rows, width] without a head, else float32 [rows, width + labels].
        """
        keep = None if full else self.keep_table[:, : ids.shape[1]].index_select(0, lengths)
        vectors, logits = self.encoder(ids, keep)
        pooled = F.normalize(self._pool(vectors, lengths, keep), dim=-1)
        if logits is None:
            return pooled.half()
        return torch.cat([pooled, logits.float()], dim=1)

    def _pool(self, vectors: Tensor, lengths: Tensor, keep: Tensor | None) -> Tensor:
        if self.pooling == "cls":
            return vectors[:, 0].float()
        total = vectors.float()
        if keep is not None:
            # Not a product: what padding computed may be infinite in half precision.
            total = total.masked_fill(~keep[:, :, None], 0.0)
        return total.sum(1) / lengths[:, None].float()


def build(model: Any, card: ModelCard, pooling: Literal["mean", "cls"], length_max: int) -> Network:
    """The fastest exact network for a loaded transformers model; it shares the model's weights."""
    if card.kind == "embedding" and BertEncoder.fits(model.config):
        return Network(BertEncoder(model), pooling, length_max).eval()
    return Network(PlainEncoder(model, head=card.kind == "classification"), pooling, length_max).eval()
