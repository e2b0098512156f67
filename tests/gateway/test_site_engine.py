"""A gateway whose model cannot be loaded goes on, and analyses when a reload brought one that can."""

import asyncio
import io
from pathlib import Path

from engine.config import EngineConfig
from engine.service import Engine
from gateway.site_engine import SiteEngine
from sluice.connections import TelemetryConfig
from sluice.telemetry import Telemetry


class Analysis:
    name = "analysis"

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()

    async def run(self) -> None:
        self.begun.set()
        await self.ended.wait()

    async def drain(self, deadline_s: float) -> None:
        self.ended.set()


async def test_analysis_begins_when_a_reload_brings_a_model(tmp_path: Path) -> None:
    said = io.StringIO()
    telemetry = Telemetry("test", TelemetryConfig(log_level="debug"), stream=said)
    engine, analysis = Engine(EngineConfig(model=str(tmp_path / "absent")), telemetry), Analysis()
    service = SiteEngine(engine, analysis, telemetry)
    running = asyncio.create_task(service.run())
    async with asyncio.timeout(60):
        while "site_engine_not_started" not in said.getvalue():  # noqa: ASYNC110 - an event of the log
            await asyncio.sleep(0.005)
        assert not running.done()
        assert not analysis.begun.is_set()
        assert await engine.reload(EngineConfig(fit_seconds_max=0.05, device="cpu")) == ["default"]
        await analysis.begun.wait()
        await service.drain(10)
        await running
