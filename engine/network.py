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
    """BERT's encoder, fused.

    Args:
        source: a transformers BertModel; its weights are taken over.
        classifier: from the pooled first token to logits; None without a sequence-classification head.
    """

    def __init__(self, source: Any, classifier: nn.Module | None = None) -> None:
        super().__init__()
        config = source.config
        embeddings = source.embeddings
        self.heads = config.num_attention_heads
        self.word = nn.Parameter(embeddings.word_embeddings.weight.detach(), requires_grad=False)
        # Our texts are single segments: the token type is always 0 and folds into the positions.
        position = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self.position = nn.Parameter(position.detach().clone(), requires_grad=False)
        self.norm = embeddings.LayerNorm
        self.layers = nn.ModuleList(BertLayer(layer, self.heads) for layer in source.encoder.layer)
        self.head = None if classifier is None else nn.Sequential(source.pooler.dense, nn.Tanh(), classifier)
        self.requires_grad_(False)

    def bert_layers(self) -> list["BertLayer"]:
        """The layers, from first to last."""
        return [layer for layer in self.layers if isinstance(layer, BertLayer)]

    def forward(self, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Encoder`."""
        x = self.norm(F.embedding(ids, self.word) + self.position[: ids.shape[1]])
        mask = None if keep is None else keep[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x, None if self.head is None else self.head(x[:, 0])

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


class BertLayer(nn.Module):
    """One layer of BERT's encoder, with the projections of attention in one.

    Args:
        source: a transformers BertLayer; its weights are taken over.
        heads: of attention.
    """

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
        """Token vectors to token vectors, [rows, length, width]; `mask` is true where attention may look."""
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


class TokenNetwork(Network):
    """A model with a token-classification head: logits for each token, no pooling.

    Args:
        encoder: token ids to token vectors, or a whole transformers model with its head when `classifier` is None.
        classifier: from token vectors to logits.
        length_max: as for `Network`.
    """

    def __init__(self, encoder: nn.Module, classifier: nn.Module | None, length_max: int) -> None:
        super().__init__(encoder, "mean", length_max)
        self.classifier = classifier
        self.requires_grad_(False)

    def forward(self, ids: Tensor, lengths: Tensor, *, full: bool) -> Tensor:
        """Logits, float32 [rows, length, labels]; those of padding mean nothing. See `Network`."""
        keep = None if full else self.keep_table[:, : ids.shape[1]].index_select(0, lengths)
        if self.classifier is not None:
            logits: Tensor = self.classifier(self.encoder(ids, keep)[0])
        else:
            mask = torch.ones_like(ids) if keep is None else keep.long()
            logits = self.encoder(input_ids=ids, attention_mask=mask).logits
        return logits.float()


def build(model: Any, card: ModelCard, pooling: Literal["mean", "cls"], length_max: int) -> Network:
    """The fastest exact network for a loaded transformers model; it shares the model's weights."""
    if card.kind == "tokens":
        if BertEncoder.fits(model.config):
            return TokenNetwork(BertEncoder(model.bert), model.classifier, length_max).eval()
        return TokenNetwork(model, None, length_max).eval()
    if card.kind == "embedding" and BertEncoder.fits(model.config):
        return Network(BertEncoder(model), pooling, length_max).eval()
    if card.kind == "classification" and BertEncoder.fits(model.config):
        return Network(BertEncoder(model.bert, model.classifier), pooling, length_max).eval()
    return Network(PlainEncoder(model, head=card.kind == "classification"), pooling, length_max).eval()
