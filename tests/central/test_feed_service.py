import asyncio
import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from central.config import CentralConfig, FeedConfig, check_feed
from central.feed import Feed
from protos import feed_pb2, feed_pb2_grpc
from sluice.connections import KafkaConfig
from sluice.errors import ConfigError
from sluice.telemetry import Telemetry
from tests.central.feed_support import LIMITS, SILENT, Listener, Topics, envelope, running_feed, stub, until


def feed_of(kafka: KafkaConfig, state_dir: Path, **settings: Any) -> Feed:
    return Feed(FeedConfig(**({"port": 0} | settings)), kafka, LIMITS, str(state_dir), Telemetry("central", SILENT))


@pytest.mark.parametrize("service", ["", "sluice.v1.Feed"])
async def test_health_says_serving_when_subscriptions_are_possible(
    topics: Topics, tmp_path: Path, service: str
) -> None:
    async with running_feed(topics, tmp_path) as (feed, target), grpc.aio.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await until(lambda: feed.ready, "the feed is ready")
        watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        watch.cancel()


async def test_health_says_not_serving_while_kafka_is_away(tmp_path: Path) -> None:
    nowhere = KafkaConfig(bootstrap_servers="127.0.0.1:1")
    feed = feed_of(nowhere, tmp_path)
    task = asyncio.create_task(feed.run())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await feed.port}") as channel:
        found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not feed.ready
    await feed.drain(1.0)
    await task


async def test_reflection_names_the_service_and_describes_it(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path) as (_, target), grpc.aio.insecure_channel(target) as channel:
        info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="sluice.v1.Feed"),
        ]
        listed, described = [answer async for answer in info(iter(requests))]
        names = {service.name for service in listed.list_services_response.service}
        assert {"sluice.v1.Feed", "grpc.health.v1.Health"} <= names
        assert b"FeedBatch" in described.file_descriptor_response.file_descriptor_proto[0]


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already in use.*feed\.port"):
            await feed_of(KafkaConfig(), tmp_path, port=port).run()


async def test_drain_before_run_and_twice_does_no_harm(tmp_path: Path) -> None:
    feed = feed_of(KafkaConfig(), tmp_path)
    await feed.drain(1.0)
    await feed.drain(1.0)
    await asyncio.wait_for(feed.run(), 1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "allow_insecure_remote"),
        ({"host": "feed.example.org"}, "without TLS"),
        ({"certificate_file": "c.pem"}, "go together"),
        ({"ca_file": "ca.pem"}, "feed.ca_file needs"),
    ],
)
def test_serving_in_the_clear_needs_a_word(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CentralConfig(feed=FeedConfig(**settings))
    assert CentralConfig(roles=("lake",), feed=FeedConfig(**settings)), "no feed, no complaint"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    check_feed(FeedConfig(host=host))
    check_feed(FeedConfig(host="0.0.0.0", allow_insecure_remote=True))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, server and client certificates."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "san").write_text("subjectAltName=DNS:localhost")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return folder


async def test_with_mutual_tls_only_clients_with_a_certificate_are_served(
    topics: Topics, tmp_path: Path, certificates: Path
) -> None:
    topics.records(envelope(0, 1))

    def pem(name: str) -> bytes:
        return (certificates / name).read_bytes()

    files = {"certificate_file": "server.pem", "key_file": "server.key", "ca_file": "ca.pem"}
    settings = {key: str(certificates / name) for key, name in files.items()}
    async with running_feed(topics, tmp_path, **settings) as (_, target):
        port = target.rpartition(":")[2]
        known = grpc.ssl_channel_credentials(pem("ca.pem"), pem("client.key"), pem("client.pem"))
        async with grpc.aio.secure_channel(f"localhost:{port}", known) as channel:
            assert await Listener(feed_pb2_grpc.FeedStub(channel), earliest=True).records(1) == [0]
        unknown = grpc.ssl_channel_credentials(pem("ca.pem"))
        async with grpc.aio.secure_channel(f"localhost:{port}", unknown) as channel:
            assert await Listener(feed_pb2_grpc.FeedStub(channel)).end() is grpc.StatusCode.UNAVAILABLE
        async with stub(target) as client:
            assert await Listener(client).end() is grpc.StatusCode.UNAVAILABLE


async def test_calls_that_are_no_subscriptions_are_bounded_too(topics: Topics, tmp_path: Path) -> None:
    limits = {"subscribers_max": 1, "analyze_streams_max": 1, "generate_calls_max": 1, "probes_max": 2}
    async with running_feed(topics, tmp_path, **limits) as (_, target), grpc.aio.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = []
        for _ in range(6):
            watches.append(watch := health.Watch(health_pb2.HealthCheckRequest()))
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Check(health_pb2.HealthCheckRequest())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for watch in watches:
            watch.cancel()


async def test_a_request_above_the_limit_is_refused_before_it_is_held(topics: Topics, tmp_path: Path) -> None:
    async with running_feed(topics, tmp_path, request_bytes_max=4096) as (_, target), stub(target) as client:
        call = client.Subscribe(feed_pb2.SubscribeRequest(filter=feed_pb2.Filter(labels=["x" * 5000])))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
