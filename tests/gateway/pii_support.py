"""A labelled corpus, made with check digits computed here, and batches of records to hide it in.

Every number is made up: check digits are right, the persons do not exist.
"""

import random
from collections.abc import Iterator

from sluice.record import Record, RecordBatch, Sensitivity, join_frames


def with_luhn(body: str) -> str:
    total = 0
    for place, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return body + str(-total % 10)


def with_mod97(country: str, bban: str) -> str:
    digits = "".join(str(int(c, 36)) for c in f"{bban}{country}00")
    return f"{country}{98 - int(digits) % 97:02d}{bban}"


def with_ric(body: str) -> str:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return body + "10X98765432"[sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11]


def grouped(text: str, separator: str, *sizes: int) -> str:
    parts, at = [], 0
    for size in sizes or [4] * (-(-len(text) // 4)):
        parts.append(text[at : at + size])
        at += size
    return separator.join(p for p in parts if p)


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def cards(rng: random.Random) -> Iterator[str]:
    for prefix, length in (("4", 16), ("52", 16), ("2223", 16), ("6011", 16), ("3530", 16), ("6225", 16)):
        number = with_luhn(prefix + digits(rng, length - 1 - len(prefix)))
        yield from (number, grouped(number, " "), grouped(number, "-"), grouped(number, "."))
    amex = with_luhn("37" + digits(rng, 12))
    yield from (amex, grouped(amex, " ", 4, 6, 5), grouped(amex, "-", 4, 6, 5))
    yield with_luhn("36" + digits(rng, 11))
    union = with_luhn("622588" + digits(rng, 12))
    yield from (union, grouped(union, " "), f"卡号{union}。")


def ibans(rng: random.Random) -> Iterator[str]:
    shapes = {
        "DE": "n18",
        "FR": "n23",
        "NL": "a4n10",
        "GB": "a4n14",
        "CH": "n17",
        "ES": "n20",
        "BE": "n12",
        "NO": "n11",
    }
    for country, shape in shapes.items():
        bank = "INGB" if shape.startswith("a4") else ""
        number = with_mod97(country, bank + digits(rng, int(shape.rpartition("n")[2])))
        yield from (number, grouped(number, " "), grouped(number, "-"), number.lower(), f"IBAN:{number}")


def chinese_ids(rng: random.Random) -> Iterator[str]:
    for region, day in (("110105", "19491231"), ("440308", "19990101"), ("650104", "19750808"), ("330106", "20240229")):
        number = with_ric(region + day + digits(rng, 3))
        yield from (number, number.lower(), f"{number[:6]} {number[6:14]} {number[14:]}", f"身份证号{number}已核验")


POSITIVES: dict[str, list[str]] = {
    "email": [
        "bob@example.com",
        "Anna.Lee+iot@sub.corp.example.co.uk",
        "x_y-z@1and1.de",
        "JOHN.DOE@EXAMPLE.ORG",
        "info@müller.de",
        "o'neil@irish.ie",
        "first.last@data.museum",
        "mailto:ops@plant7.io",
        "<sre@gateway.internal.example>",
        "用户lihua@163.com已注册",
        "https://kim:secret@intra.example.net/x",
        "who@xn--bcher-kva.example",
    ],
    "phone": [
        "+1 415-555-2671",
        "(212) 555-0187",
        "212-555-0187",
        "415.555.2671",
        "1-800-555-0199",
        "+1(415)5552671",
        "+44 20 7946 0958",
        "+49 (0)30 901820",
        "+33 1 42 68 53 00",
        "+81 3-1234-5678",
        "+86 10 6552 9988",
        "+55 11 91234-5678",
        "+972-54-123-4567",
        "0049 30 901820",
        "tel:+4930901820",
        "13800138000",
        "+86 13912345678",
        "86-18812345678",
        "138 0013 8000",
        "139-1234-5678",
        "手机号13712345678。",
        "电话：17612345678，请联系",
        "0086 19912345678",
        "010-65529988",
        "phone: 020 7946 0958",
        "call 415 555 2671",
    ],
    "us_ssn": ["536-22-1234", "536.22.1234", "SSN 536 22 1234", "ssn: 536221234", "my social is 536-22-1234."],
    "ipv4": ["192.168.1.17", "10.0.0.1/24", "host=172.16.254.1:8080", "ip:203.0.113.9,"],
    "ipv6": ["2001:db8::1", "fe80::1ff:fe23:4567:890a%eth0", "[2001:db8:0:0:0:0:2:1]:443", "::ffff:192.0.2.1"],
    "mac": ["00:1a:2b:3c:4d:5e", "00-1A-2B-3C-4D-5E", "001a.2b3c.4d5e"],
    "jwt": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"],
    "api_key": [
        "AKIA" + "Q3EGRIMNSXLKT5ZB",
        "ghp_" + "a1B2" * 9,
        "glpat-" + "x" * 20,
        "xoxb-" + "1234567890-abcdef",
        "sk_live_" + "a1" * 12,
        "AIza" + "B" * 35,
        "sk-proj-" + "Zz9" * 10,
        "hf_" + "q" * 34,
        "LTAI" + "5tABCDEFGHIJ",
    ],
    "private_key": [
        "-----BEGIN RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
}

NEAR_MISSES = [
    "order 12345 shipped",
    "temp=23.456 hum=45.20 volt=3.301",
    "2026-10-11T08:15:30.123456Z",
    "ts=1760170530123",
    "1760170530.123456",
    "uuid 3f2504e0-4f89-11d3-9a0c-0305e82c3301",
    "version 1.2.3",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "lat=31.230416 lon=121.473701",
    "seq=987654321012 epoch=7",
    "error code 0x80070057 at line 4412",
    "retry 3 of 10 in 500 ms",
    "batch 000017 size 65536 crc 4294967295",
    "user@host",
    "@mention hello",
    "session of user@1000.service started",
    "logo@2x.png",
    "price 1,299.00 EUR",
    "4111111111111112",
    "5500-0000-0000-0005",
    "4111 1111 1111 1112",
    "DE00370400440532013000",
    "110105194912310021",
    "999-99-9999",
    "000-00-0000",
    "536-00-1234",
    "status 200 512 2048",
    "torque 12.5 Nm rpm 1480",
    "uptime 86400000 ms",
    "frame 1920x1080@60",
    "2025-01-31 23:59:59",
    "mem 4096/8192 MiB",
    "offset 18446744073709551615",
    "part no 7-4471-0093-21",
    "timezone +0800",
    "blk_-4029732570544915384",
    "a13800138000f",
    "req=c761c9998510cf4853989439177cbebb",
    "3.13800138000",
    "eyJoZWxsbyB0aGVyZSI6MX0.abcd.efgh",
    "task-manager-is-not-a-key",
    "-----BEGIN CERTIFICATE-----",
]


def corpus(seed: int = 7, rounds: int = 12) -> list[tuple[str, str]]:
    """(class, text) of every positive; numbers with check digits are new ones every round."""
    rng = random.Random(seed)
    items = [(kind, text) for kind, texts in POSITIVES.items() for text in texts]
    for _ in range(rounds):
        items += [("payment_card", text) for text in cards(rng)]
        items += [("iban", text) for text in ibans(rng)]
        items += [("chinese_id", text) for text in chinese_ids(rng)]
    return items


def batch_of(records: list[Record], **envelope: object) -> RecordBatch:
    values: dict[str, object] = {
        "device_id": "pump-7",
        "spool_id": b"s" * 16,
        "first_sequence": 100,
        "record_count": len(records),
        "stream": "syslog",
        "site": "plant",
        "sensitivity": Sensitivity.UNSPECIFIED,
        "data": join_frames([r.to_message().SerializeToString() for r in records]),
    }
    return RecordBatch(**(values | envelope))  # type: ignore[arg-type]
