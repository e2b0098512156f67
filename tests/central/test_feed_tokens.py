import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.token_key import load_key
from central.tokens import TOKEN_BYTES_MAX, Position, ResumePoint, TokenSigner
from sluice.errors import ConfigError, Permanent

KEY = bytes(range(32))
SIGNER = TokenSigner(KEY)
partitions = st.tuples(st.text(min_size=1, max_size=20), st.integers(0, 1000))
positions = st.builds(Position, st.integers(0, 2**62), st.integers(0, 50_000))
points = st.builds(ResumePoint, st.dictionaries(partitions, positions, max_size=20), st.integers(0, 2**53))
POINT = ResumePoint({("records", 0): Position(7), ("records", 1): Position(9, 3)}, 5)


@given(points)
def test_a_token_says_what_was_signed(point: ResumePoint) -> None:
    assert SIGNER.open(SIGNER.issue(point)) == point


@given(st.data())
def test_a_token_with_any_bit_changed_is_refused(data: st.DataObject) -> None:
    token = bytearray(SIGNER.issue(POINT))
    bit = data.draw(st.integers(0, 8 * len(token) - 1))
    token[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Permanent, match="resume token"):
        SIGNER.open(bytes(token))


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(Permanent, match="resume token"):
        SIGNER.open(garbage)


def test_a_cut_or_huge_token_is_refused_before_it_is_read() -> None:
    token = SIGNER.issue(POINT)
    for wrong in (token[:-1], token + b"x", b"\x01" * (TOKEN_BYTES_MAX + 1)):
        with pytest.raises(Permanent):
            SIGNER.open(wrong)


def test_a_token_of_another_server_is_told_from_a_forged_one() -> None:
    with pytest.raises(Permanent, match="issued by another server"):
        SIGNER.open(TokenSigner(bytes(32)).issue(POINT))
    forged = SIGNER.issue(POINT)[:-32] + bytes(32)
    with pytest.raises(Permanent, match="damaged or forged"):
        SIGNER.open(forged)


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path) -> None:
    state = tmp_path / "state"
    key = load_key(None, str(state))
    (file,) = state.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_key(None, str(state)) == key
    assert load_key(str(file), "unused") == key


@pytest.mark.parametrize("content", ["", "xyz", "00" * 31])
def test_a_key_file_that_holds_no_key_is_named(tmp_path, content: str) -> None:
    file = tmp_path / "my.key"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"my\.key"):
        load_key(str(file), "unused")
    with pytest.raises(ConfigError, match="absent"):
        load_key(str(tmp_path / "absent"), "unused")
