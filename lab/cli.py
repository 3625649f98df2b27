"""The command line: one subcommand per verb. The work of a verb lives in its room, imported only when it is called.

A room has `add_arguments(parser)` and `main(args) -> exit status`. What a user did wrong is one line on standard error
and exit status 2; anything else that escapes is a fault of the lab and keeps its traceback.
"""
import argparse
import difflib
import errno
import importlib
import os
import sys
import traceback

from lab.errors import LabError, one_line
from lab.numbers import integer, number

VERBS = {       # verb: (room, what it does)
    "doctor": ("lab.machine.doctor", "what this machine can run and what is missing"),
    "ops": ("lab.ops.table", "the table of ops"),
    "check": ("lab.check", "every op of a backend against its reference, at awkward sizes"),
    "run": ("lab.model.run", "answer a prompt with a model, under the backend of your choice"),
    "bench": ("lab.harness.bench", "measure ops, models or a token's ledger into records"),
    "ledger": ("lab.harness.ledger_verb", "one token, kernel by kernel"),
    "compare": ("lab.records.compare", "did rows of run B get slower than those of run A?"),
    "tune": ("lab.tune.tuner", "find the fastest launch settings of both halves on this GPU, shape by shape"),
    "report": ("lab.report.build", "draw records: pictures, a web page, a summary"),
    "inspect": ("lab.inspect.command", "what the compilers made of both halves: registers, occupancy, code; no GPU needed"),
    "try": ("lab.learn.own_kernel", "your own kernel, from one file: checked, raced against both halves, drawn"),
    "explain": ("lab.learn.explain", "the CUDA and the Triton half of an op side by side, step by step"),
}


class Parser(argparse.ArgumentParser):
    """argparse prints a usage text before its error; here a mistake is one line, like every other.

    type=int and type=float take plain notation alone (lab/numbers.py).
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", int, integer)
        self.register("type", float, number)

    def error(self, message):
        raise LabError(f"{message} (see `{self.prog} --help`)")


def build_parser(verb):
    """The parser of `lab`; only the room of `verb` is imported."""
    parser = Parser(prog="lab", description="Decode kernels of a language model, in CUDA and in Triton, on one bench.",
                    epilog="`lab VERB --help` lists the options of a verb.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, (room, summary) in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}")
        sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS,
                         help="show where an error came from")
        if name == verb:
            module = importlib.import_module(room)
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    return parser


def run(argv):
    words = [word for word in argv if word != "--traceback"]
    if not words:
        build_parser(None).print_help()
        return 0
    verb = words[0]
    if verb not in VERBS and not verb.startswith("-"):
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise LabError(f"unknown verb {verb!r}: {f'did you mean {near[0]}? ' if near else ''}"
                       f"choose from {', '.join(VERBS)}")
    args = build_parser(verb).parse_args(argv)
    return args.main(args)


def explain(error):
    """One line for an error that a user can mend; None for a fault of the lab."""
    if isinstance(error, LabError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(("lab", "triton_kernels")):
        return f"the package {error.name} is not installed: run `make setup`, then use .venv/bin/lab"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the output cannot be written: no space left on device"
    if type(error).__name__ == "OutOfMemoryError":          # torch's; its first sentence says how much and where
        return f"{str(error).split('. ')[0]}: try a smaller model, batch or context"
    return None


def take_any_text():
    """Lets standard output and error print every text: what their encoding lacks is shown as an escape (\\u6f22)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # None without a console; a test's own stream
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    take_any_text()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        status = run(argv)
        print(end="", flush=True)                           # what cannot be written is an error here, not at exit
        return status or 0
    except BrokenPipeError:                                 # the reader went away, as in `lab ops | head -1`
        drop_output()
        return 141
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        if getattr(error, "errno", None) == errno.ENOSPC:
            drop_output()
        print("lab: error: " + one_line(line), file=sys.stderr)
        return 2


def drop_output():
    """Lets Python's own flush at exit succeed: what standard output still holds goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
