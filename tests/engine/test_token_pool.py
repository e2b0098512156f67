"""Tokenising in children: the same ids, whatever happens to the children."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.token_pool import REPLACEMENTS_MAX, TEXTS_MIN, TokenPool, processes_for, serve
from engine.tokens import Tokenizer, Tokens
from tests.engine.fakes import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "磁盘已满",
    "naïve café \U0001f600",
    "\x00\x01\x1b[31m",
    "a" * 5000,
    "e\u0301" * 3000,
    "\u200b" * 50,
    "\u202eשלום עולם",
    "\U0010ffff",
    "disk full " * 400,
]


def same(got: list[Tokens], wanted: list[Tokens]) -> bool:
    return [(one.ids.tolist(), one.dropped) for one in got] == [(one.ids.tolist(), one.dropped) for one in wanted]


def opened(
    tokenizer: Tokenizer, processes: int = 2, texts_min: int = 1, on_trouble: Callable[[str], None] = lambda _: None
) -> TokenPool:
    pool = TokenPool(tokenizer, processes, texts_min, on_trouble)
    pool.wait()
    assert pool.ready == processes
    return pool


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer(64)


@pytest.fixture
def pool(tokenizer: Tokenizer) -> Iterator[TokenPool]:
    pool = opened(tokenizer)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[TokenPool]:
    pool = opened(byte_tokenizer(64))
    yield pool
    pool.close()


def children(pool: TokenPool) -> list[subprocess.Popen[bytes]]:
    """All of them, while nothing is under way."""
    taken = [pool._idle.get_nowait() for _ in range(pool.ready)]
    for child in taken:
        pool._idle.put(child)
    return [child._process for child in taken]


def test_ids_and_truncation_are_those_of_this_process(
    minilm_tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [f"Failed password for user{i} from 10.0.0.{i % 256} port {i}" for i in range(500)] + HOSTILE
    wanted = minilm_tokenizer.encode(texts)  # its threads are there before the children are
    pool = opened(minilm_tokenizer)
    got = pool.encode(texts)
    pool.close()
    assert same(got, wanted)
    assert sum(each.dropped for each in got) > 0
    assert all(each.ids.dtype == np.int32 and each.ids.flags.writeable for each in got)
    assert capfd.readouterr() == ("", ""), "no warning about forks or parallelism"


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.text(min_size=1, max_size=90), min_size=1, max_size=80))
def test_any_texts_in_any_number_come_back_in_order(shared_pool: TokenPool, texts: list[str]) -> None:
    assert same(shared_pool.encode(texts), byte_tokenizer(64).encode(texts))


def test_a_dead_child_costs_nothing_and_is_replaced(pool: TokenPool, tokenizer: Tokenizer) -> None:
    texts = [f"text {i}" for i in range(200)]
    wanted = tokenizer.encode(texts)
    before = children(pool)
    for process in before:
        process.kill()
        process.wait()
    assert same(pool.encode(texts), wanted)
    pool.wait()
    assert pool.replaced == 2
    assert not {process.pid for process in children(pool)} & {process.pid for process in before}
    assert same(pool.encode(texts), wanted)
    assert pool.replaced == 2


def test_a_child_killed_while_it_works_costs_nothing(pool: TokenPool, tokenizer: Tokenizer) -> None:
    texts = ["x" * 20_000 + str(i) for i in range(60)]
    wanted = tokenizer.encode(texts)
    process = children(pool)[0]
    process.send_signal(signal.SIGSTOP)  # it has a chunk for certain when it dies
    threading.Timer(0.2, process.kill).start()
    assert same(pool.encode(texts), wanted)
    assert pool.replaced == 1


def test_signals_to_the_group_do_not_end_a_child(pool: TokenPool, tokenizer: Tokenizer) -> None:
    texts = [f"text {i}" for i in range(200)]
    for process in children(pool):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
    assert same(pool.encode(texts), tokenizer.encode(texts))
    assert pool.replaced == 0
    assert pool.ready == 2


def test_a_child_that_hangs_is_ended(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.token_pool.ANSWER_S_MAX", 2.0)
    pool = opened(tokenizer, processes=1)
    (process,) = children(pool)
    process.send_signal(signal.SIGSTOP)
    texts = [f"text {i}" for i in range(100)]
    assert same(pool.encode(texts), tokenizer.encode(texts))
    assert process.poll() == -signal.SIGKILL
    pool.close()


def test_children_that_cannot_be_replaced_leave_the_work_to_this_process(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble: list[str] = []
    pool = opened(tokenizer, on_trouble=trouble.append)
    monkeypatch.setattr("engine.token_pool.sys.executable", "/no/such/python")
    texts = [f"text {i}" for i in range(100)]
    for process in children(pool):
        process.kill()
    for _ in range(3):
        assert same(pool.encode(texts), tokenizer.encode(texts))
        pool.wait()
    assert pool.ready == 0
    assert sum("is given up" in each for each in trouble) == 2
    assert sum("cannot be started" in each for each in trouble) == 2
    pool.close()


def test_a_child_that_dies_again_and_again_is_given_up(pool: TokenPool, tokenizer: Tokenizer) -> None:
    pool.replaced = REPLACEMENTS_MAX
    for process in children(pool):
        process.kill()
    texts = [f"text {i}" for i in range(100)]
    assert same(pool.encode(texts), tokenizer.encode(texts))
    pool.wait()
    assert pool.ready == 0


def test_few_texts_do_not_wait_for_a_child(tokenizer: Tokenizer) -> None:
    pool = opened(tokenizer, 1, TEXTS_MIN)
    (process,) = children(pool)
    process.kill()
    pool.encode(["text"] * (TEXTS_MIN - 1))
    assert pool.replaced == 0
    pool.encode(["text"] * TEXTS_MIN)
    assert pool.replaced == 1
    pool.close()


def test_closing_ends_every_child_also_one_that_is_just_starting(tokenizer: Tokenizer) -> None:
    pool = opened(tokenizer)
    processes = children(pool)
    pool.close()
    pool.close()
    assert [process.poll() for process in processes] == [0, 0]
    TokenPool(tokenizer, 2).close()


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    program = """
import sys
from engine.token_pool import TokenPool
from tests.engine.fakes import byte_tokenizer
pool = TokenPool(byte_tokenizer(), 2)
pool.wait()
print(*[pool._idle.get().pid for _ in range(2)], flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        watched = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        for descriptor in watched:
            import select

            assert select.select([descriptor], [], [], 20)[0], "it outlived its parent"
            os.close(descriptor)


def test_nonsense_from_a_child_is_an_error_and_not_a_result(tokenizer: Tokenizer) -> None:
    from engine.token_pool import _unpack

    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(ConnectionError):
        serve(theirs)
    for body in (b"", bytes(4), bytes(9), np.array([3, 0, 1, 2], "<i4").tobytes()):
        with pytest.raises(ValueError, match=r"rows|multiple|buffer"):
            _unpack(bytearray(body), 1)


@pytest.mark.parametrize(
    ("configured", "device", "cores", "processes"),
    [
        (0, "cpu", 64, 0),
        (0, "cuda:0", 15, 0),
        (0, "cuda:0", 16, 14),
        (0, "cuda:1", 128, 32),
        (1, "cuda:0", 64, 0),
        (4, "cpu", 2, 4),
    ],
)
def test_children_are_for_hosts_with_a_gpu_and_cores(configured: int, device: str, cores: int, processes: int) -> None:
    assert processes_for(configured, device, cores) == processes
