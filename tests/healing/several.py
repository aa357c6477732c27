"""One of several processes that heal together on CPUs, started by torch.distributed.run.

``several.py heal ...`` is the command line, ``several.py sharded heal ...`` the same with FSDP 2 by
accelerate, which asks for GPUs: that it takes CPUs here is all that is changed of it.
"""

import sys
from typing import Any

import torch


def main() -> None:
    """Do what the arguments say."""
    torch.set_num_threads(1)
    if sys.argv[1] == "sharded":
        del sys.argv[1]
        shard_on_cpus()
    from moefuse.cli import main as command

    command()


def shard_on_cpus() -> None:
    """Make accelerate shard on CPUs where ``accelerate launch --use_fsdp`` asks for it."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState

    usual = AcceleratorState.__init__

    def init(self: Any, *arguments: Any, **given: Any) -> None:
        usual(self, *arguments, **given)
        if given.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, given["fsdp_plugin"]

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    main()
