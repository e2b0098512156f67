"""Our engine, through the interface that gateway and central use.

Settings: the tree of `EngineConfig`; without `caches` in it both caches are off.
"""

import asyncio


def load(model, settings):
    import msgspec

    from engine.config import EngineConfig
    from engine.service import Engine
    from sluice.connections import TelemetryConfig
    from sluice.telemetry import Telemetry

    tree = {"model": model, **settings}
    tree.setdefault("caches", {"token_bytes_max": 0, "result_bytes_max": 0})
    tree.setdefault("novelty", {"enabled": False})
    return System(Engine(msgspec.convert(tree, EngineConfig), Telemetry("engine", TelemetryConfig(log_level="error"))))


class System:
    def __init__(self, engine):
        self.engine = engine
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(engine.start())
        self.mark()

    def mark(self):
        self.before = self.engine.stats()

    def embed(self, texts):
        import numpy as np

        self.mark()
        answers = self.loop.run_until_complete(self.engine.analyze(texts, task="embed"))
        if wrong := next((each.error for each in answers if each.error), None):
            raise RuntimeError(wrong)
        return np.stack([np.frombuffer(each.embedding, "<f2") for each in answers]).astype(np.float32)

    def details(self):
        before, after = self.before, self.engine.stats()
        computed = after.padded_tokens - before.padded_tokens
        return {
            "padding_share": 1 - (after.tokens - before.tokens) / computed if computed else 0.0,
            "texts_computed": after.texts_computed - before.texts_computed,
            "device_busy_s": after.device_busy_s - before.device_busy_s,
            "plan": self.engine.plan(),
        }

    async def submit(self, text, online):
        from engine.service import Priority
        from sluice.errors import Backpressure

        priority = Priority.ONLINE if online else Priority.BACKGROUND
        while True:
            try:
                (answer,) = await self.engine.analyze([text], task="embed", priority=priority)
            except Backpressure as full:
                await asyncio.sleep(full.retry_after_s)
                continue
            if answer.error:
                raise RuntimeError(answer.error)
            return
