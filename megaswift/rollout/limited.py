"""A program, never imported: limits itself and becomes a Python program that then runs under these limits.

python -I limited.py CPU_SECONDS MEMORY_BYTES FILE_BYTES PROGRAM.py

It is one of its own because limits that are set between fork and exec need Python code there, which is unsafe in a process
with threads.
"""

import os
import resource
import sys

if __name__ == "__main__":
    cpu_s, memory, file_size = map(int, sys.argv[1:4])
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
    ):
        before = resource.getrlimit(kind)[1]
        most = most if before == resource.RLIM_INFINITY else min(most, before)
        resource.setrlimit(kind, (most, most))
    # -s: without the packages of the user's home; -B: without writing bytecode.
    os.execv(sys.executable, [sys.executable, "-s", "-B", sys.argv[4]])
