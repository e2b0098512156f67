"""One request after another: `generate` of transformers, on one thread, with its tokens as they come."""

import itertools
import queue
import threading
from typing import Any

from engine.generation_driver import Job, OnTokens, Tokens
from engine.generation_model import Generative


class PlainDriver:
    """`generate` of transformers, one job at a time. See the module's docstring.

    Args:
        model: stays the caller's.
        on_tokens: called on the driver's thread; must not block.
    """

    slots = 1

    def __init__(self, model: Generative, on_tokens: OnTokens) -> None:
        self._model = model
        self._on_tokens = on_tokens
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # bounded by who submits
        self._lock = threading.Lock()
        self._cancelled: dict[str, threading.Event] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-generate", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """See `Driver`."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """See `Driver`."""
        with self._lock:
            self._cancelled[job.id] = threading.Event()
        self._jobs.put(job)

    def cancel(self, job_id: str) -> None:
        """See `Driver`."""
        with self._lock:
            if job_id in self._cancelled:
                self._cancelled[job_id].set()

    def close(self) -> None:
        """See `Driver`."""
        with self._lock:
            self._closing = True
            for cancelled in self._cancelled.values():
                cancelled.set()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                cancelled = self._cancelled[job.id]
            error, ids = "", []
            try:
                if not cancelled.is_set():
                    ids = generate(self._model, job, self._on_tokens, cancelled)
            except Exception as failure:  # noqa: BLE001 - whatever a model raises concerns this request
                error = f"{type(failure).__name__}: {failure}"
            with self._lock:
                del self._cancelled[job.id]
            self._on_tokens([Tokens(job.id, ids, ended=True, error=error)])


def generate(
    model: Generative,
    job: Job,
    on_tokens: OnTokens = lambda _: None,
    cancelled: threading.Event | None = None,
) -> list[int]:
    """One job through `generate`; returns the new tokens."""
    from copy import deepcopy

    import torch
    from transformers import StoppingCriteriaList

    config = deepcopy(model.net.generation_config)
    config.do_sample = job.temperature > 0
    config.temperature = job.temperature or 1.0
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    config.max_length, config.max_new_tokens = None, job.new_tokens
    config.eos_token_id = model.ends or None
    config.pad_token_id = next((each for each in (config.pad_token_id, *model.ends) if each is not None), 0)
    inputs = job.prompt.inputs or {"input_ids": torch.tensor([job.prompt.ids])}
    inputs = {name: each.to(model.net.device) if hasattr(each, "to") else each for name, each in inputs.items()}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    streamed = _Streamed(job.id, on_tokens)

    def stop(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full((ids.shape[0],), cancelled is not None and cancelled.is_set(), device=ids.device)

    with torch.inference_mode():
        model.net.generate(
            **inputs, generation_config=config, streamer=streamed, stopping_criteria=StoppingCriteriaList([stop])
        )
    return streamed.ids


class _Streamed:
    """Takes tokens from `generate` as they come; the first it is given is the prompt."""

    def __init__(self, job_id: str, on_tokens: OnTokens) -> None:
        self.ids: list[int] = []
        self._job_id = job_id
        self._on_tokens = on_tokens
        self._calls = itertools.count()

    def put(self, value: Any) -> None:
        """Called by `generate`."""
        if next(self._calls):
            self.ids += value.flatten().tolist()
            self._on_tokens([Tokens(self._job_id, list(self.ids))])

    def end(self) -> None:
        """Called by `generate`."""
