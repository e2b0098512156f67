"""Generates the checked-in stubs: `python -m protos.generate [OUT_DIR]`.

The files are laid out by directory (`protos/record.proto`), not by proto package (`sluice.v1`), so that the generated
modules land in `protos/` and cannot shadow the kernel package `sluice`.
"""

import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("record", "control", "feed")
SERVICES = ("feed",)


def generate(out_dir: Path) -> None:
    """Writes the stubs of every `.proto` under `out_dir/protos/`.

    Raises:
        RuntimeError: when protoc refuses a file; its message is on stderr.
    """
    from grpc_tools import protoc

    include = str(files("grpc_tools") / "_proto")
    base = ["protoc", f"-I{ROOT}", f"-I{include}", f"--python_out={out_dir}", f"--pyi_out={out_dir}"]
    sources = [f"protos/{name}.proto" for name in NAMES]
    services = [f"protos/{name}.proto" for name in SERVICES]
    for arguments in ([*base, *sources], [*base, f"--grpc_python_out={out_dir}", *services]):
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc failed: {' '.join(arguments)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
