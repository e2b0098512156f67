"""Chooses how a generative model is driven: many requests together, or one after another.

Continuous batching is taken only when it reproduces the plain greedy result on two probe prompts of different lengths
at once, so that a model whose attention is not made for it cannot go wrong unnoticed. Image-text models,
encoder-decoder models and models that ask for more than temperature, top-k and top-p between logits and tokens
(`generation_config.json`) are driven one by one.
"""

import queue
from typing import Final

from engine.generation_batched import ContinuousDriver, is_supported, own_processors
from engine.generation_driver import Driver, Job, OnTokens, Tokens
from engine.generation_model import Generative, Prompt
from engine.generation_plain import PlainDriver, generate
from sluice.errors import Permanent

_PROBE_NEW_TOKENS: Final = 8
_PROBE_LENGTHS: Final = (3, 40)
_PROBE_SECONDS_MAX: Final = 60.0


def choose(model: Generative, on_tokens: OnTokens) -> Driver:
    """The driver for a model; notes why in `model.reasons`. Takes a few steps of the model's time."""
    wanted = model.config.generation.batching
    if wanted == "never":
        model.reasons["batching"] = "one by one: configured"
        return PlainDriver(model, on_tokens)
    obstacle = _obstacle(model)
    if not obstacle:
        try:
            obstacle = "" if wanted == "always" else _differs(model)
            if not obstacle:
                driver = ContinuousDriver(model, on_tokens)
                why = "configured" if wanted == "always" else "gives the plain result on the probe"
                model.reasons["batching"] = f"continuous, {driver.slots} requests at a time: {why}"
                return driver
        except Exception as error:  # noqa: BLE001 - an interface inside transformers: whatever it raises, plain works
            obstacle = f"transformers cannot set it up: {type(error).__name__}: {error}"
    if wanted == "always":
        raise Permanent(f"model '{model.card.name}': engine.generation.batching is 'always', but {obstacle}")
    model.reasons["batching"] = f"one by one: {obstacle}"
    return PlainDriver(model, on_tokens)


def _obstacle(model: Generative) -> str:
    """Why continuous batching cannot be right for a model, or nothing."""
    if model.processor is not None:
        return "continuous batching takes no images"
    if model.net.config.is_encoder_decoder:
        return "continuous batching knows no encoder-decoder models"
    foreign = [type(each).__name__ for each in own_processors(model) if not is_supported(each)]
    if foreign:
        return f"continuous batching knows no {', '.join(foreign)} (generation_config.json)"
    return ""


def _differs(model: Generative) -> str:
    """How a probe through continuous batching differs from plain generation, or nothing."""
    ids = range(3, 3 + max(_PROBE_LENGTHS))
    prompts = [[each % model.net.config.get_text_config().vocab_size for each in ids[:n]] for n in _PROBE_LENGTHS]
    plain = [generate(model, Job(str(i), Prompt(prompt), _PROBE_NEW_TOKENS)) for i, prompt in enumerate(prompts)]
    reports: queue.SimpleQueue[list[Tokens]] = queue.SimpleQueue()
    driver = ContinuousDriver(model, reports.put)
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    try:
        for i, prompt in enumerate(prompts):
            driver.submit(Job(str(i), Prompt(prompt), _PROBE_NEW_TOKENS))
        left = set(found)
        while left:
            for report in reports.get(timeout=_PROBE_SECONDS_MAX):
                if report.error:
                    return f"a probe failed in continuous batching: {report.error}"
                found[report.id] = report.ids
                if report.ended:
                    left.discard(report.id)
    finally:
        driver.close()
    same = sum(each == found[str(i)] for i, each in enumerate(plain))
    return "" if same == len(plain) else f"continuous batching changes the result of {len(plain) - same} of 2 probes"
