"""A command with the device present: `python -m simdevice NAME command ...`.

In: a device's name and a command. Out: the command, in the environment that a test gives it
(`processes.environment`). $SIMDEVICE_MEMORY is the device's bytes.
"""

from __future__ import annotations

import os
import sys

from simdevice.build import library
from simdevice.processes import environment


def main(arguments: list[str]) -> None:
    """Becomes the command."""
    if len(arguments) < 2:
        sys.exit("usage: python -m simdevice NAME command ...")
    name, *command = arguments
    library()  # a compilation is not the command's
    memory = int(os.environ.get("SIMDEVICE_MEMORY", str(2 << 30)))
    os.execvpe(command[0], command, environment(name, memory=memory))


main(sys.argv[1:])
