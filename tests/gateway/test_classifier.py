"""A verdict says for each record where it goes; in doubt it stays."""

import pytest

from gateway.batches import LocalBatch
from gateway.classifier import KEEP_ALL, Classifier, build
from gateway.policy import DefaultsConfig, Policy, PolicyFile, RuleConfig
from gateway.router import route
from gateway.scanner import Scanner, ScannerConfig
from sluice.record import GapReason, Record, RecordBatch, Route, Sensitivity
from tests.gateway.pii_support import batch_of

CLEAN, MAIL = Record(1, text="pump ok"), Record(1, text="bob@example.com called")


def routes(file: PolicyFile | None, records: list[Record], **envelope: object) -> list[Route]:
    batch = batch_of(records, **envelope)
    verdict = build(file).classify(batch)
    return [verdict.at(i).route for i in range(len(records))]


def test_by_default_what_is_found_stays_and_the_rest_leaves() -> None:
    assert routes(None, [CLEAN, MAIL, CLEAN]) == [Route.CLOUD, Route.LOCAL, Route.CLOUD]


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (Sensitivity.UNSPECIFIED, Route.CLOUD),
        (Sensitivity.PUBLIC, Route.CLOUD),
        (Sensitivity.INTERNAL, Route.CLOUD),
        (Sensitivity.SENSITIVE, Route.LOCAL),
    ],
)
def test_a_clean_record_follows_what_was_declared(declared: Sensitivity, expected: Route) -> None:
    assert routes(None, [CLEAN], sensitivity=declared) == [expected]


def test_declaring_public_does_not_let_findings_out() -> None:
    assert routes(None, [MAIL], sensitivity=Sensitivity.PUBLIC) == [Route.LOCAL]


def test_undeclared_records_can_be_kept_even_when_clean() -> None:
    file = PolicyFile(defaults=DefaultsConfig(unspecified="local"))
    assert routes(file, [CLEAN]) == [Route.LOCAL]
    assert routes(file, [CLEAN], sensitivity=Sensitivity.PUBLIC) == [Route.CLOUD]


def test_an_error_while_scanning_keeps_the_whole_batch_and_is_told() -> None:
    errors: list[Exception] = []
    scanner = Scanner()
    classifier = Classifier(Policy(PolicyFile(), scanner.names), scanner, errors.append)
    batch = batch_of([CLEAN, CLEAN], data=b"\x0a\x05not protobuf at all, bob@example.com")
    verdict = classifier.classify(batch)
    assert verdict is KEEP_ALL
    assert len(errors) == 1


def test_no_rule_can_let_out_what_was_not_scanned() -> None:
    file = PolicyFile(rules=(RuleConfig(name="all out", outcome="cloud"),), scanner=ScannerConfig(hits_max=1))
    assert routes(file, [MAIL, MAIL, CLEAN]) == [Route.LOCAL] * 3


def test_a_rule_can_release_payloads_that_cannot_be_read() -> None:
    image = Record(1, payload=b"\xff\xd8", content_type="image/jpeg")
    assert routes(None, [image]) == [Route.LOCAL]
    file = PolicyFile(rules=(RuleConfig(name="frames", stream="camera", found=("opaque_payload",), outcome="cloud"),))
    assert routes(file, [image], stream="camera") == [Route.CLOUD]


def test_labels_decide_record_by_record() -> None:
    file = PolicyFile(rules=(RuleConfig(name="lab", labels={"area": "lab-*"}, outcome="local"),))
    records = [Record(1, labels={"area": "lab-2"}), Record(1, labels={"area": "yard"}), CLEAN, MAIL]
    assert routes(file, records) == [Route.LOCAL, Route.CLOUD, Route.CLOUD, Route.LOCAL]


def test_dropped_records_are_neither_kept_nor_sent() -> None:
    file = PolicyFile(rules=(RuleConfig(name="noise", found=("email",), outcome="drop"),))
    batch = batch_of([CLEAN, MAIL])
    parts = route(batch, build(file).classify(batch))
    assert parts.local is None
    assert [(g.first_sequence, g.reason) for g in parts.export.gaps] == [(101, GapReason.DROPPED)]
    assert b"bob" not in parts.export.data


def test_a_receipt_has_no_records_to_decide() -> None:
    receipt: RecordBatch = batch_of([CLEAN]).receipt(GapReason.EXPIRED)
    verdict = build(None).classify(receipt)
    assert verdict.exceptions == {}


def test_why_a_record_stayed_travels_with_it() -> None:
    batch = batch_of([CLEAN, MAIL])
    local = LocalBatch.of(batch, build(None).classify(batch))
    assert local is not None
    assert [(d.rule, d.found) for d in local.why] == [("default: found", ("email",))]
