"""Continuous batching: with every step each request under way gets one token; requests join and leave between steps.

transformers does it (`init_continuous_batching`), on one thread of its own, over a paged key-value cache. What is ours:
the temperature of each request with exact greedy choice at 0, where results go, and that its thread is a daemon.
"""

import threading
from collections.abc import Sequence
from typing import Any

from engine.generation_driver import PAGE_TOKENS, Job, OnTokens, Tokens
from engine.generation_model import Generative


class ContinuousDriver:
    """Continuous batching of transformers. See the module's docstring, and `Driver`.

    Args:
        model: stays the caller's.
        on_tokens: called on the batching thread; must not block.
    """

    def __init__(self, model: Generative, on_tokens: OnTokens) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        limits = model.config.generation
        self.slots = limits.batch_requests_max
        self._ends = model.ends or -1
        self._on_tokens = on_tokens
        batching = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            # A page more for each request: shares are rounded up.
            num_blocks=-(-limits.cache_tokens_max // PAGE_TOKENS) + limits.batch_requests_max,
            max_batch_tokens=max(limits.step_tokens_max, limits.batch_requests_max),
            max_requests_per_batch=limits.batch_requests_max,
            max_queue_size=0,  # the generator admits no more than `slots`
            # Prompts of different callers share nothing; and no kernel is fetched from a hub.
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True, eos_token_id=self._ends, max_new_tokens=limits.new_tokens_max
        )
        attention = model.net.config._attn_implementation  # noqa: SLF001 - it has no other name
        self._manager = model.net.init_continuous_batching(config, batching)
        self._manager.logit_processor = _logits_processors(model)
        self._manager.output_router = _router(on_tokens)
        try:
            # Now, and not by its thread: whoever closes at once would come before it, which transformers warns of.
            self._manager.batch_processor = self._manager._create_batch_processor()  # noqa: SLF001 - as its warmup does
        except BaseException:
            model.net.set_attn_implementation(attention)  # as it was, for whoever drives the model instead
            raise
        self._closed = False
        # A thread inherits being a daemon from the one that starts it: a process that forgot to close still ends.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    @property
    def alive(self) -> bool:
        """See `Driver`."""
        return self._manager.is_running() and not self._refusal

    def submit(self, job: Job) -> None:
        """See `Driver`."""
        self._manager.add_request(
            job.prompt.ids,
            request_id=job.id,
            max_new_tokens=job.new_tokens,
            streaming=True,
            eos_token_id=self._ends,
            temperature=float(job.temperature),
        )
        # Asked afterwards: a thread that died before has failed its requests already, and would not see this one.
        if self._refusal:
            self._on_tokens([Tokens(job.id, ended=True, error=self._refusal)])

    @property
    def _refusal(self) -> str:
        """Why the batching thread takes no more requests, or nothing."""
        return self._manager.background_thread_status.can_accept_new_requests() or ""

    def cancel(self, job_id: str) -> None:
        """See `Driver`."""
        self._manager.cancel_request(job_id)

    def close(self) -> None:
        """See `Driver`."""
        from engine.models import quiet

        if self._closed:
            return
        self._closed = True
        with quiet():
            # Also when it died: that lets go of the cache, and gives the model its own attention back.
            self._manager.stop(block=True, hard_stop=True)
            self._manager.destroy()
        # An error holds the frames it came through, and with them the cache, which would lie beside the next one's.
        self._manager.background_thread_status.fatal_error = None


def _router(on_tokens: OnTokens) -> Any:
    """Where continuous batching puts its results: transformers' own keeps handlers of cancelled requests for ever."""
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    class Router(OutputRouter):
        def deliver(self, output: Any) -> None:
            self.deliver_batch([output])

        def deliver_batch(self, outputs: Sequence[Any]) -> None:
            on_tokens(
                [
                    Tokens(each.request_id, each.generated_tokens, each.is_finished(), each.error or "")
                    for each in outputs
                ]
            )

    return Router()


def own_processors(model: Generative) -> list[Any]:
    """What the model's own generation configuration asks for between logits and tokens, but for the temperature."""
    import warnings
    from copy import deepcopy

    config = deepcopy(model.net.generation_config)
    config.do_sample, config.temperature = True, 1.0
    config.eos_token_id = model.ends or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some of them want to see the prompt: those are refused
        return list(model.net._get_logits_processor(config))  # noqa: SLF001 - what the batching manager calls, too


def is_supported(processor: Any) -> bool:
    """Whether continuous batching knows a processor."""
    return getattr(processor, "supports_continuous_batching", None) is True


def _logits_processors(model: Generative) -> Any:
    """The model's own processors behind a temperature per request, where 0 leaves the most likely token alone."""
    import torch
    from transformers import LogitsProcessorList
    from transformers.generation.continuous_batching import cb_logits_processors as batched

    class Temperature(batched.ContinuousBatchingLogitsProcessor):
        supported_kwargs = {"temperature": float}  # noqa: RUF012 - as its base declares it
        ignored_kwargs = ()

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
            wanted = [each.state.logit_processor_kwargs.get("temperature", 0.0) for each in requests_with_new_token]
            return torch.tensor(wanted, dtype=torch.float32).view(dtype=torch.int32)

        def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
            wanted = tensor_arg[: scores.shape[0]].view(dtype=torch.float32)[:, None]
            best = torch.full_like(scores, -torch.inf).scatter(1, scores.argmax(1, keepdim=True), 0.0)
            return torch.where(wanted == 0, best, scores / wanted.clamp_min(1e-6))

    processors = LogitsProcessorList([Temperature(), *own_processors(model)])
    made = batched.ContinuousBatchingLogitsProcessorList(processors, per_request_processors=True)
    made.tensors_required += 1  # the list counts those only that it made itself
    return made
