"""`lab` commands in processes of their own that begin as copies of this one: so they need not import torch,
which takes seconds."""

import faulthandler
import io
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def lab(*words, folder=ROOT, env=None, given=None):
    """`lab words...` in `folder`, with `env` added to its environment, as a subprocess.CompletedProcess.

    given: {0, 1 or 2: a file or its number in the place of that standard stream, or None for a closed one}.
    What goes to standard output and standard error otherwise is returned as text.
    """
    words, given = [str(word) for word in words], {} if given is None else given
    with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = [given.get(fd, kept) for fd, kept in enumerate((nothing, out, err))]
        numbers = [s if s is None or isinstance(s, int) else s.fileno() for s in streams]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _child(words, folder, env or {}, numbers)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(["lab", *words], status, *texts)


def _child(words, folder, env, numbers):
    """Does what a new Python process does before and after cli.main(); never returns."""
    status = 1
    try:
        faulthandler.disable()
        torch.set_num_threads(1)  # the other threads of OpenMP were not copied, and would be waited for
        os.environ.update(env)
        os.chdir(folder)
        kept = [None if number is None else os.dup(number) for number in numbers]  # above 2, all of them
        for fd, number in enumerate(kept):
            os.close(fd) if number is None else os.dup2(number, fd)
        for number in filter(None, kept):
            os.close(number)
        sys.stdin, sys.stdout, sys.stderr = (
            None if numbers[fd] is None else _stream(fd, env) for fd in range(3)
        )
        sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        from lab import backends, cli

        backends.import_languages()  # of this environment
        try:
            status = cli.main(words)
        except SystemExit as ended:
            status = ended.code or 0
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except BaseException:
        if sys.stderr:
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        os._exit(status)


def _stream(fd, env):
    """A standard stream, as these variables of the environment ask of Python."""
    encoding, _, errors = env.get("PYTHONIOENCODING", "utf-8").partition(":")
    errors = errors or ("backslashreplace" if fd == 2 else "strict")
    raw = open(fd, "rb" if fd == 0 else "wb", buffering=0, closefd=False)
    if fd == 0:
        return io.TextIOWrapper(io.BufferedReader(raw), encoding, errors)
    if env.get("PYTHONUNBUFFERED"):
        return io.TextIOWrapper(raw, encoding, errors, write_through=True)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=fd == 2 or os.isatty(fd))
