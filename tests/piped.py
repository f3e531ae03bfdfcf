"""A file as the standard input of this process, through a pipe."""
import contextlib
import os
import subprocess


@contextlib.contextmanager
def piped(path):
    before = os.dup(0)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as source:
        os.dup2(source.stdout.fileno(), 0)
        try:
            yield
        finally:
            os.dup2(before, 0)
            os.close(before)
