"""From the naive program to the engine's network, one remedy at a time: plain transformers, no queue, no threads.

`embed(texts, step=NAME)`; the steps are in `STEPS`. All share one process, one tokenizer and the same weights. The
vectors of each are compared with those of `naive` by the host before anything is timed.
"""

import copy
import hashlib
import os
from dataclasses import dataclass, replace

from padding import CLASSIC, Batch, arrival, bucketed, share

LENGTH_MAX = 256
BUDGET = 1024


@dataclass(frozen=True)
class Step:
    """What is switched on.

    batching: one, arrival, classic (buckets of 32 rows) or ladder (fine buckets with a token budget).
    tokenizer: single, batched or cached (of the pass before).
    masks: dynamic (made for each batch by transformers) or precomputed (rows of a table; none for a full batch).
    fused: our encoder instead of the modules of transformers.
    """

    batching: str = "one"
    tokenizer: str = "single"
    masks: str = "dynamic"
    fused: bool = False
    half: bool = False


def _steps():
    """Each adds one thing to the one before."""
    naive = Step()
    batches = replace(naive, batching="arrival")
    tokenizer = replace(batches, tokenizer="batched")
    classic = replace(tokenizer, batching="classic")
    ladder = replace(classic, batching="ladder")
    masks = replace(ladder, masks="precomputed")
    fused = replace(masks, fused=True)
    return {
        "naive": naive,
        "batches": batches,
        "tokenizer": tokenizer,
        "classic": classic,
        "ladder": ladder,
        "masks": masks,
        "fused": fused,
        "half": replace(fused, half=True),
        "cached": replace(fused, tokenizer="cached"),
        "naive half": replace(naive, half=True),
    }


STEPS = _steps()


def load(model, settings):
    import torch

    # As the engine does where other threads share the cores; the host sets the same for every system.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return System(model, settings)


class System:
    def __init__(self, model, settings):
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        from engine import models, network
        from engine.config import LADDER
        from engine.tokens import Tokenizer

        logging.set_verbosity_error()
        self.torch = torch
        self.device = torch.device(settings.get("device", "cpu"))
        self.half_dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self.card = models.read_card(model, models.locate(model, allow_download=False))
        self.slow_tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self.library = models.load_tokenizer(self.card)
        self.tokenizer = Tokenizer(self.library, LENGTH_MAX)
        self.model = models.load_model(self.card).to(self.device)
        self.net = self._network(models, network, torch.float32)
        self.half = self._network(models, network, self.half_dtype)
        self.ladder = (*(edge for edge in LADDER if edge < LENGTH_MAX), LENGTH_MAX)
        self.keep = torch.arange(LENGTH_MAX)[None, :] < torch.arange(LENGTH_MAX + 1)[:, None]
        self.keep = self.keep.to(self.device)
        self._half_model = None
        self.cache = {}
        self.padding = 0.0

    def _network(self, models, network, dtype):
        net = network.build(models.load_model(self.card), self.card, "mean", LENGTH_MAX)
        return net.to(self.device, dtype)

    def embed(self, texts, step="naive"):
        import numpy as np

        chosen = STEPS[step]
        with self.torch.inference_mode():
            if chosen.batching == "one":
                self.padding = 0.0
                model = self.half_model() if chosen.half else self.model
                return np.stack([self._alone(text, model) for text in texts])
            rows = self._tokenize(texts, chosen.tokenizer)
            plan = self._plan([len(row) for row in rows], chosen.batching)
            vectors = np.empty((len(texts), self.net.encoder.word.shape[1]), np.float32)
            for batch in plan:
                vectors[list(batch.rows)] = self._compute(rows, batch, chosen).float().cpu().numpy()
            return vectors

    def details(self):
        return {"padding_share": self.padding}

    def micro(self, texts, rounds):
        import components

        return components.measure(self, texts, rounds)

    def half_model(self):
        """The plain modules in half precision, made when first asked for."""
        if self._half_model is None:
            self._half_model = copy.deepcopy(self.model).to(self.half_dtype)
        return self._half_model

    def _alone(self, text, model):
        encoded = self.slow_tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH_MAX)
        encoded = encoded.to(self.device)
        hidden = model(**encoded).last_hidden_state
        return _pooled(self.torch, hidden, encoded["attention_mask"])[0].cpu().numpy()

    def _tokenize(self, texts, how):
        import numpy as np

        if how == "single":
            encoded = (self.slow_tokenizer(text, truncation=True, max_length=LENGTH_MAX) for text in texts)
            return [np.array(each["input_ids"], np.int32) for each in encoded]
        if how == "batched":
            return [each.ids for each in self.tokenizer.encode(texts)]
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.cache}
        if missing:
            encoded = self.tokenizer.encode(list(missing.values()))
            self.cache.update((key, each.ids) for key, each in zip(missing, encoded, strict=True))
        return [self.cache[key] for key in keys]

    def _plan(self, lengths, how):
        if how == "arrival":
            plan = arrival(lengths)
        elif how == "classic":
            plan = bucketed(lengths, CLASSIC, rows=32)
        else:
            plan = bucketed(lengths, self.ladder, tokens=BUDGET, exact=True)
        self.padding = share(plan, lengths)
        return plan

    def _compute(self, rows, batch: Batch, step: Step):
        padded = _pad([rows[i] for i in batch.rows], batch.length)
        ids, lengths = (self.torch.from_numpy(each) for each in padded)
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        if step.fused:
            net = self.half if step.half else self.net
            return net(ids, lengths, full=bool((lengths == batch.length).all()))
        return self.transformers(ids.long(), lengths, batch.length, step.masks)

    def transformers(self, ids, lengths, length, masks):
        """The modules of transformers, with the mask they make themselves or with one from the table."""
        if masks == "dynamic":
            mask = (self.torch.arange(length, device=self.device)[None, :] < lengths[:, None]).long()
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return _pooled(self.torch, hidden, mask)
        keep = self.keep[:, :length].index_select(0, lengths)
        full = bool((lengths == length).all())
        wide = None if full else keep[:, None, None, :].expand(-1, 1, length, -1)
        hidden = self.model(input_ids=ids, attention_mask=wide).last_hidden_state
        return _pooled(self.torch, hidden, keep)


def _pad(rows, length):
    import numpy as np

    ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.array([len(row) for row in rows], np.int32)


def _pooled(torch, hidden, mask):
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean.float(), dim=-1)
