"""infinity-emb through its engine's own interface, without its HTTP server; what it caches is off by default.

Settings: precision; engine `torch`, `ctranslate2` or `optimum` (ONNX Runtime; `folder` has the exported model).
"""

import asyncio
import os


def load(model, settings):
    import torch
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "folder" in settings:
        # It looks for the file under the name that it found, folder included: so the folder has to be the current one.
        os.chdir(settings["folder"])
        model = "."
    arguments = EngineArgs(
        model_name_or_path=model,
        device=settings.get("device", "cpu"),
        engine=settings.get("engine", "torch"),
        dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[settings["precision"]],
        compile=settings.get("compile", False),
        model_warmup=False,
        pooling_method="mean",
    )
    return System(AsyncEmbeddingEngine.from_args(arguments))


class System:
    def __init__(self, engine):
        self.engine = engine
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(engine.astart())

    def embed(self, texts):
        return self.loop.run_until_complete(self._embed(texts))

    async def submit(self, text, online):
        """It knows no priorities."""
        await self.engine.embed(sentences=[text])

    async def _embed(self, texts):
        vectors, _ = await self.engine.embed(sentences=texts)
        return vectors
