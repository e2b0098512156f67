"""The seed's own table, piece by piece: masks, tokenizer, precision; on CUDA also pinning, buffers and graphs.

Runs inside the worker of `plain_steps`, on its model and tokenizer. Each group is measured in turns; figures are
medians of seconds for the same work, so that they divide.
"""

import time
from dataclasses import replace
from statistics import median

ROWS, LENGTH = 32, 32
CACHE_BYTES = 64 << 20


def measure(system, texts, rounds):
    """{group: {variant: seconds}}; `skipped` says what was not measured, and why."""
    groups = {"masks": _masks(system), "tokenizer": _tokenizer(system, texts), "precision": _precision(system)}
    skipped = {}
    if system.device.type == "cuda":
        groups |= _cuda(system)
    else:
        skipped["pinned memory, double buffer, CUDA graphs"] = "no CUDA device here: not measured"
    return {
        "seconds": {group: _in_turns(variants, rounds, system) for group, variants in groups.items()},
        "skipped": skipped,
        "texts": len(texts),
        "batch": [ROWS, LENGTH],
    }


def _in_turns(variants, rounds, system):
    seconds = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            with system.torch.inference_mode():
                run()
            if system.device.type == "cuda":
                system.torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def _batch(system, *, full):
    torch = system.torch
    seeded = torch.Generator().manual_seed(7)
    ids = torch.randint(1000, 20000, (ROWS, LENGTH), generator=seeded, dtype=torch.int32)
    lengths = torch.full((ROWS,), LENGTH, dtype=torch.int32)
    if not full:
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (ROWS,), generator=seeded, dtype=torch.int32)
    return ids.to(system.device), lengths.to(system.device)


def _masks(system):
    """One batch through the modules of transformers."""
    ids, lengths = _batch(system, full=False)
    _, full = _batch(system, full=True)
    ids = ids.long()
    return {
        "dynamic mask": lambda: system.transformers(ids, lengths, LENGTH, "dynamic"),
        "precomputed mask": lambda: system.transformers(ids, lengths, LENGTH, "precomputed"),
        "full batch, dynamic mask": lambda: system.transformers(ids, full, LENGTH, "dynamic"),
        "full batch, no mask": lambda: system.transformers(ids, full, LENGTH, "precomputed"),
    }


def _tokenizer(system, texts):
    """All texts once; the cache is the engine's own, filled before."""
    from engine.token_cache import TokenCache
    from engine.tokens import content_key

    fast = system.tokenizer
    library = system.library
    cache = TokenCache(bytes_max=CACHE_BYTES, entries_max=1 << 20, version=fast.version, width=fast.id_width)
    for text, tokens in zip(texts, fast.encode(texts), strict=True):
        cache.put(content_key(text.encode()), tokens.ids, tokens.dropped)
    return {
        "one by one (transformers)": lambda: [system.slow_tokenizer(text)["input_ids"] for text in texts],
        "one by one (tokenizers)": lambda: [library.encode(text).ids for text in texts],
        "encode_batch": lambda: [each.ids for each in library.encode_batch(list(texts))],
        "encode_batch_fast": lambda: [each.ids for each in library.encode_batch_fast(list(texts))],
        "token cache, all hits": lambda: [cache.get(content_key(text.encode())) for text in texts],
    }


def _precision(system):
    """One full batch through the engine's network."""
    ids, lengths = _batch(system, full=True)
    return {
        "fp32": lambda: system.net(ids, lengths, full=True),
        str(system.half_dtype).removeprefix("torch."): lambda: system.half(ids, lengths, full=True),
    }


def _cuda(system):
    """What only a GPU has: how ids get there, how many batches are under way, and how kernels are launched."""
    from engine.backend import BackendInfo
    from engine.config import EngineConfig
    from engine.torch_cuda import CudaBackend

    torch = system.torch
    rows, length = 64, 64
    pageable = torch.randint(1000, 20000, (rows, length), dtype=torch.int32)
    pinned = pageable.pin_memory()
    width = system.net.encoder.word.shape[1]
    info = BackendInfo("cuda:0", "fp16", 2, exact_lengths=False, length_max=256, embedding_width=width)
    batch = [pageable[i].numpy() for i in range(rows)]
    config = EngineConfig()

    def backend(depth, graphs):
        return CudaBackend(system.half, replace(info, depth=depth), config_with(config, graphs))

    def pump(target, depth, batches=64):
        def run():
            under_way = []
            for _ in range(batches):
                if len(under_way) == depth:
                    target.collect(under_way.pop(0))
                under_way.append(target.submit(batch, length))
            while under_way:
                target.collect(under_way.pop(0))

        return run

    def copies(source):
        def run():
            for _ in range(64):
                source.to(system.device, non_blocking=True)

        return run

    return {
        "host to device, 64 batches": {"pageable memory": copies(pageable), "pinned memory": copies(pinned)},
        "buffers, 64 batches": {"single": pump(backend(1, 64), 1), "double": pump(backend(2, 64), 2)},
        "launches, 64 batches": {"kernel by kernel": pump(backend(2, 0), 2), "CUDA graph": pump(backend(2, 64), 2)},
    }


def config_with(config, graphs):
    import msgspec

    return msgspec.structs.replace(config, cuda_graphs_max=graphs)
