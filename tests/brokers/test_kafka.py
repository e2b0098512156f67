"""What both Kafka brokers promise to the code that is tested on them."""

import psutil

from tests.brokers.base import KafkaBroker
from tests.brokers.clients import TIMEOUT_S, consume, eventually, produce
from tests.brokers.fixtures import KafkaBehindProxy


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def test_offsets_are_contiguous_and_a_report_names_the_true_one(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    places = produce(kafka_broker.bootstrap, topic, numbers(1000))
    assert places == [(0, offset) for offset in range(1000)]
    messages = consume(kafka_broker.bootstrap, topic)
    assert [message.value() for message in messages] == numbers(1000)
    assert [message.offset() for message in messages] == list(range(1000))


def test_keys_headers_and_timestamps_arrive(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    headers = [("site", b"s"), ("stream", b"logs"), ("site", b"twice"), ("none", None)]
    produce(kafka_broker.bootstrap, topic, [b"v"], key=b"device", headers=headers, timestamp=1_700_000_000_123)
    (message,) = consume(kafka_broker.bootstrap, topic)
    assert (message.key(), message.value(), message.headers()) == (b"device", b"v", headers)
    assert message.timestamp()[1] == 1_700_000_000_123


def test_one_key_stays_on_one_partition(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic(partitions=4)
    partitions = [
        {partition for partition, _ in produce(kafka_broker.bootstrap, topic, numbers(20), key=b"device-%d" % device)}
        for device in range(3)
    ]
    assert all(len(one) == 1 for one in partitions)
    assert len(set.union(*partitions)) > 1


def test_reading_starts_at_any_assigned_offset_and_ends_at_the_end(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    produce(kafka_broker.bootstrap, topic, numbers(100))
    assert [message.offset() for message in consume(kafka_broker.bootstrap, topic, offset=37)] == list(range(37, 100))
    assert consume(kafka_broker.bootstrap, topic, offset=100) == []


def test_messages_of_one_mebibyte_pass(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    values = [bytes([number]) * ((1 << 20) + 4096) for number in range(3)]
    produce(kafka_broker.bootstrap, topic, values)
    assert [message.value() for message in consume(kafka_broker.bootstrap, topic)] == values


def test_a_group_gets_all_partitions_and_remembers_its_offsets(kafka_broker: KafkaBroker) -> None:
    from confluent_kafka import Consumer, TopicPartition

    from sluice.demo.kafka_broker import CLIENT_OPTIONS

    topic = kafka_broker.create_topic(partitions=3)
    options = {"bootstrap.servers": kafka_broker.bootstrap, "group.id": topic, "enable.auto.commit": False}
    consumer = Consumer({**options, **CLIENT_OPTIONS})
    consumer.subscribe([topic])
    eventually(lambda: consumer.poll(0.1) or len(consumer.assignment()) == 3, "assignment", 2 * TIMEOUT_S)
    consumer.commit(offsets=[TopicPartition(topic, 1, 42)], asynchronous=False)
    consumer.close()
    again = Consumer({**options, **CLIENT_OPTIONS})
    (committed,) = again.committed([TopicPartition(topic, 1)], timeout=TIMEOUT_S)
    again.close()
    assert committed.offset == 42


def test_a_restart_after_a_kill_keeps_data_where_the_broker_is_durable(own_kafka_broker: KafkaBroker) -> None:
    topic = own_kafka_broker.create_topic()
    produce(own_kafka_broker.bootstrap, topic, numbers(500))
    own_kafka_broker.kill()
    assert not own_kafka_broker.running
    own_kafka_broker.start()
    if own_kafka_broker.durable:
        assert [message.value() for message in consume(own_kafka_broker.bootstrap, topic)] == numbers(500)
        assert produce(own_kafka_broker.bootstrap, topic, [b"next"]) == [(0, 500)]
    else:
        assert topic not in topics(own_kafka_broker)


def test_a_clean_restart_and_then_a_wipe(own_kafka_broker: KafkaBroker) -> None:
    topic = own_kafka_broker.create_topic()
    own_kafka_broker.restart()
    assert (topic in topics(own_kafka_broker)) is own_kafka_broker.durable
    own_kafka_broker.stop()
    own_kafka_broker.wipe()
    own_kafka_broker.start()
    assert topic not in topics(own_kafka_broker)


def test_a_connection_cut_in_mid_batch_neither_loses_nor_doubles(kafka_behind_proxy: KafkaBehindProxy) -> None:
    broker, proxy = kafka_behind_proxy
    topic = broker.create_topic()
    produce(broker.bootstrap, topic, [b"warm"])
    proxy.cut_after(200_000)
    values = [b"%06d" % number + b"x" * 1000 for number in range(1000)]
    produce(broker.bootstrap, topic, values)
    assert [message.value() for message in consume(broker.bootstrap, topic, offset=1)] == values
    assert proxy.connections_total > 2


def test_it_listens_on_the_loopback_interface_only(kafka_broker: KafkaBroker) -> None:
    family = [psutil.Process(kafka_broker.pid), *psutil.Process(kafka_broker.pid).children(recursive=True)]
    listening = [one.laddr for process in family for one in process.net_connections() if one.status == "LISTEN"]
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert kafka_broker.port in {address.port for address in listening}


def topics(broker: KafkaBroker) -> set[str]:
    from confluent_kafka.admin import AdminClient

    return set(AdminClient({"bootstrap.servers": broker.bootstrap}).list_topics(timeout=TIMEOUT_S).topics)
