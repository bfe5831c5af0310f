"""Runs a script in one of several processes, to its last line, and ends the process there.

A process group that DistributedDataParallel has used outlives it and `destroy_process_group` (seen with torch 2.13): if
one of gloo's threads frees a tensor while Python shuts down, the process aborts after all its work is done.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
