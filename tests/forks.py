"""Scripts as commands, each in a copy of this process, which has imported what they need (for
test_bench). A line of stdin is a command; its exit code is a line of stdout.
"""

import json
import os
import runpy
import sys

import halos_nb.label
import halos_nb.sample
import halos_nb.train  # noqa: F401


def next_command():
    "The command line of the copy that this returns in; None when no more will come."
    for line in sys.stdin:
        command, out = json.loads(line)
        copy = os.fork()
        if copy == 0:
            for number, name in ((0, os.devnull), (1, f"{out}.out"), (2, f"{out}.err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            return command
        _, status = os.waitpid(copy, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if command := next_command():
    sys.argv = command
    sys.path[0] = os.path.dirname(command[0])
    runpy.run_path(command[0], run_name="__main__")
