import os

# Tests fork. In a fork of a process that has started threads of OpenMP, the next parallel region waits forever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
