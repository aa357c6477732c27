"""The command line as ``python -m moefuse``, which launchers of several processes can start."""

from moefuse.cli import main

main()
