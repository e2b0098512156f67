"""An intake as a process of its own, to be killed: `python -m tests.central.lake_process KAFKA_JSON LAKE_JSON`."""

import asyncio
import sys

import msgspec

from central.intake import LakeIntake
from central.lake.config import LakeConfig
from sluice.connections import KafkaConfig, TelemetryConfig
from sluice.service import serve
from sluice.telemetry import Telemetry


async def main() -> None:
    kafka = msgspec.json.decode(sys.argv[1], type=KafkaConfig)
    config = msgspec.json.decode(sys.argv[2], type=LakeConfig)
    telemetry = Telemetry("central", TelemetryConfig(log_level="warning"))
    intake = LakeIntake(kafka, config, telemetry)

    async def announce() -> None:
        while not intake.ready:  # noqa: ASYNC110 - the intake's thread has no event of this loop
            await asyncio.sleep(0.01)
        print("ready", flush=True)

    announcing = asyncio.create_task(announce())
    await serve([intake], telemetry, drain_deadline_s=10.0)
    announcing.cancel()


if __name__ == "__main__":
    asyncio.run(main())
