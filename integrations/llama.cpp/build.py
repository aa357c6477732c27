"""Build llama-cpp-python with moefuse's patch and install it into this Python's environment.

    python integrations/llama.cpp/build.py

pip downloads the source package, which carries llama.cpp; the patch beside this file is applied to
it by ``patch``. The first build takes some ten minutes on two cores, later ones go on from what is
in ``--work``. CMAKE_ARGS from the environment are passed on, such as -DGGML_CUDA=ON.

``--stock`` also builds the package as published, before the patch is applied, and installs it in
the folder ``stock`` of ``--work``, for tests that compare the two.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PATCH = Path(__file__).with_name("fused_experts.patch")
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
FLAGS = "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF"


def pip(*arguments: str | Path) -> None:
    """Run this Python's pip, told how llama.cpp is built."""
    flags = f"{FLAGS} {os.environ.get('CMAKE_ARGS', '')}"
    subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        check=True,
        env={**os.environ, "CMAKE_ARGS": flags},
    )


def unpack(work: Path, archive: Path | None) -> None:
    """Put the package's sources into ``work``, downloaded unless an archive is given."""
    if archive is None:
        what = ("--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}")
        pip("download", "--dest", work, *what)
        (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work / "unpacked", filter="data")
    (inner,) = (work / "unpacked").iterdir()
    inner.rename(work / "source")


def build(work: Path, name: str) -> Path:
    """Build the sources as they are now; return the wheel, in the folder ``name`` of ``work``."""
    shutil.rmtree(work / name, ignore_errors=True)
    kept = ("--config-settings", f"build-dir={work / 'objects'}")
    pip("wheel", "--no-deps", "--wheel-dir", work / name, *kept, work / "source")
    (wheel,) = (work / name).glob("*.whl")
    return wheel


def main() -> None:
    """Build what is not built yet, and install it."""
    told = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    told.add_argument("--work", type=Path, default=Path("build/llama.cpp"))
    told.add_argument("--source", type=Path, help="the source package, if it was downloaded before")
    told.add_argument("--stock", action="store_true", help="build the unpatched package too")
    given = told.parse_args()
    work = given.work.resolve()
    applied = work / "applied.patch"
    if not applied.is_file() or applied.read_text() != PATCH.read_text():
        # Objects of other sources may be newer than these, and would be taken for built of them.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        unpack(work, given.source)
        if given.stock:
            stock = build(work, "stock-wheel")
            pip("install", "--no-deps", "--target", work / "stock", stock)
        patch = ["patch", "-p1", "--directory", work / "source", "--input", PATCH]
        subprocess.run(patch, check=True)
        shutil.copy(PATCH, applied)
    wheel = build(work, "wheel")
    pip("install", "--force-reinstall", "--no-deps", wheel)
    pip("install", f"{PACKAGE}=={VERSION}")  # what it needs; the version itself is there


if __name__ == "__main__":
    main()
