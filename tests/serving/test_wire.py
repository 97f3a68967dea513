"""The code in `medvlp/serving/wire` is what grpcio-tools makes of `prototypes.proto`."""

from __future__ import annotations

import re
from pathlib import Path

from grpc_tools import protoc

FOLDER = "medvlp/serving/wire"


def without_versions(text: str) -> str:
    """Another grpcio-tools of the same format writes its own number."""
    text = re.sub(r"(GRPC_GENERATED_VERSION = ).*", r"\1", text)
    text = re.sub(r"# Protobuf Python Version: .*", "", text)
    return re.sub(r"(Domain\.PUBLIC,\n)(\s+\d+,\n){3}", r"\1", text)


def test_the_generated_code_is_current(repository: Path, tmp_path: Path) -> None:
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["", f"-I{repository}", *options, f"{FOLDER}/prototypes.proto"]) == 0
    made = sorted((tmp_path / FOLDER).iterdir())
    assert [path.name for path in made] == [
        "prototypes_pb2.py",
        "prototypes_pb2.pyi",
        "prototypes_pb2_grpc.py",
    ]
    for path in made:
        stored = (repository / FOLDER / path.name).read_text()
        assert without_versions(path.read_text()) == without_versions(stored), (
            f"make it anew: python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. "
            f"{FOLDER}/prototypes.proto"
        )
