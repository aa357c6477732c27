"""The whole job, its layers made where the settings say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefuse import pipeline
from moefuse.config import LaunchConfig, build


def fuse(
    checkpoint: str | Path, out: str | Path, values: Mapping[str, Any], **options: Any
) -> pipeline.FuseResult:
    """Run ``pipeline.fuse`` with these arguments, in this process or by what ``launch`` names."""
    launch = build(LaunchConfig, values)
    if launch.launch == "here":
        return pipeline.fuse(checkpoint, out, values, **options)
    from moefuse.launch.ray import Student, cluster  # noqa: PLC0415 (an extra)

    student = Student(
        checkpoint,
        values,
        revision=options.get("revision"),
        trust_remote_code=options.get("trust_remote_code", False),
    )
    with cluster(student, launch) as elsewhere:
        return pipeline.fuse(checkpoint, out, values, elsewhere=elsewhere, **options)
