"""The checked-in stubs are what the `.proto` files generate now."""

from pathlib import Path

import pytest

from protos import generate

PROTOS = generate.ROOT / "protos"
SUFFIXES = {"_pb2.py", "_pb2.pyi", "_pb2_grpc.py"}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    generate.generate(folder)
    return folder / "protos"


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if any(file.name.endswith(suffix) for suffix in SUFFIXES)}


def test_the_same_files_are_generated(fresh: Path) -> None:
    assert names(fresh) == names(PROTOS)


@pytest.mark.parametrize("name", sorted(names(PROTOS)))
def test_a_stub_is_what_its_proto_generates(fresh: Path, name: str) -> None:
    assert (fresh / name).read_text() == (PROTOS / name).read_text(), "run `make protos`"


def test_every_proto_file_is_generated() -> None:
    assert {file.stem for file in PROTOS.glob("*.proto")} == set(generate.NAMES)
