"""The command line: one subcommand per verb. Each verb is a module of its own, imported only when it is
called.

Such a module has `main(args) -> exit status` and `add_arguments(parser)`. If it imports torch, its options
are in lab/options.py instead, so that help and completion do not wait for torch. A mistake of the user is one
line on standard error and exit status 2. Any other exception is a fault of the lab and keeps its traceback.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import importlib.metadata
import os
import re
import sys
import traceback

from lab import options
from lab.errors import LabError, one_line
from lab.numbers import integer, number

VERBS = {  # verb: (module, what it does)
    "doctor": ("lab.machine.doctor", "what this machine can run and what is missing"),
    "ops": ("lab.ops.table", "the table of ops, and the weight formats"),
    "check": ("lab.check", "every op of a backend against its reference, at awkward sizes"),
    "run": ("lab.model.run", "answer a prompt with a model, under the backend of your choice"),
    "chat": ("lab.model.chat", "talk with a model in this terminal"),
    "serve": ("lab.serve.command", "answer programs over HTTP, as OpenAI's interface has it"),
    "bench": ("lab.harness.bench", "measure ops, models or a token's ledger into records"),
    "ledger": ("lab.harness.ledger_verb", "one token, kernel by kernel"),
    "compare": ("lab.records.compare", "did rows of run B get slower than those of run A?"),
    "tune": ("lab.tune.tuner", "find the fastest launch settings of both kernels on this GPU"),
    "report": ("lab.report.build", "draw records: pictures, a web page, a summary"),
    "inspect": (
        "lab.inspect.command",
        "what the compilers made of both kernels: registers, occupancy, code; no GPU needed",
    ),
    "try": (
        "lab.learn.own_kernel",
        "your own kernel, from one file: judged, and on a GPU measured against the op's kernels",
    ),
    "learn": ("lab.learn.course", "the course: numbered lessons, from why decode is bound by memory on"),
    "exercise": ("lab.learn.exercises", "small kernels with a fault to mend, in both languages"),
    "new": ("lab.learn.new", "the files of a new op, or a copy of an op's kernel to begin with"),
    "export": (
        "lab.flashinfer_format.exporting",
        "ops, workloads, Triton kernels and measured rows as a dataset of flashinfer-bench",
    ),
    "import": (
        "lab.flashinfer_format.importing",
        "solutions of flashinfer-bench, judged by the contracts of our ops",
    ),
    "explain": (
        "lab.learn.explain",
        "the CUDA and the Triton code of an op or of a weight format side by side, step by step",
    ),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as one line, where argparse would print a usage text first.

    type=int and type=float accept plain notation only (lab/numbers.py).
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", int, integer)
        self.register("type", float, number)

    def error(self, message):
        raise LabError(f"{message}{self.suggestion(message)} (see `{self.prog} --help`)")

    def suggestion(self, message):
        """ "; did you mean ops?" for argparse's message about "opps"; empty where nothing is near."""
        choice = re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message)
        unknown = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        if choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), 1)
        elif unknown:
            near = difflib.get_close_matches(unknown[1], sorted(self.words()), 1)
        else:
            near = []
        return f"; did you mean {near[0]}?" if near else ""

    def words(self):
        """The words that may follow this parser's name: its options, and the choices of its arguments."""
        usage = self.format_usage()
        choices = {
            word for group in re.findall(r"\{(.*?)\}", usage, re.S) for word in re.findall(r"[\w.-]+", group)
        }
        return choices | set(re.findall(r"(?<![\w-])--[a-z][\w-]*", usage))


class Version(argparse.Action):
    """--version: the version that is installed, and which copy of the lab this is."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            version = importlib.metadata.version("decode-kernel-lab")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"lab {version}, {os.path.dirname(os.path.abspath(__file__))}")
        parser.exit()


class Completion(argparse.Action):
    """--completion SHELL: prints shell code that completes verbs, options and choices."""

    def __call__(self, parser, namespace, shell, option_string=None):
        words = {verb: sorted(build_parser(verb).verb.words()) for verb in VERBS}
        cases = "\n".join(f"    {verb}) words='{' '.join(found)}' ;;" for verb, found in words.items())
        if shell == "zsh":
            print("autoload -U +X bashcompinit && bashcompinit")
        # `compgen -f`: a file or folder may stand wherever a word does.
        print(f"""_lab() {{
  local words='{" ".join([*VERBS, *sorted(parser.words())])}'
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  [ "$COMP_CWORD" = 1 ] && words='{" ".join([*VERBS, *sorted(parser.words())])}'
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
  local IFS=$'\\n'                           # a file's name may hold spaces
  [ "$COMP_CWORD" = 1 ] || COMPREPLY+=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o filenames -F _lab lab""")
        parser.exit()


def main_of(module):
    """A function that imports a verb's module and calls its main()."""
    return lambda args: importlib.import_module(module).main(args)


def build_parser(verb):
    """The parser of `lab`, with the options of `verb` only; the parser of that verb is its attribute
    `verb`."""
    parser = Parser(
        prog="lab",
        description="Decode kernels of a language model, in CUDA and in Triton, on one bench.",
        epilog="`lab VERB --help` lists the options of a verb.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action=Version, help="say which version this is and where it is")
    parser.add_argument(
        "--completion",
        action=Completion,
        choices=("bash", "zsh"),
        help='for eval "$(lab --completion bash)" in the shell\'s start file',
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, (module, summary) in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}")
        sub.add_argument(
            "--traceback",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show where an error came from",
        )
        if name == verb:
            add_arguments = options.OF.get(name) or importlib.import_module(module).add_arguments
            add_arguments(sub)
            sub.set_defaults(main=main_of(module))
            parser.verb = sub
    return parser


def parse(argv, verb):
    """Parses the arguments. An unknown option is reported by the verb's parser, which can suggest one of its
    own."""
    parser = build_parser(verb)
    args, unknown = parser.parse_known_args(argv)
    own = getattr(parser, "verb", parser)
    if unknown and own is not parser and not any(word.startswith("-") for word in unknown):
        # A list of words ends at the first option, which leaves NAME of `check --json NAME` over.
        vars(args).update(vars(own.parse_intermixed_args(argv[argv.index(verb) + 1 :])))
    elif unknown:
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def run(argv):
    words = [word for word in argv if word != "--traceback"]
    if not words:
        build_parser(None).print_help()
        return 0
    verb = words[0]
    if verb not in VERBS and not verb.startswith("-"):
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise LabError(
            f"unknown verb {verb!r}: {f'did you mean {near[0]}? ' if near else ''}"
            f"choose from {', '.join(VERBS)}"
        )
    args = parse(argv, verb)
    args.argv = argv  # for a verb that runs itself again, once for each rank
    return args.main(args)


def explain(error):
    """One line about an error that the user can mend; None for a fault of the lab."""
    if isinstance(error, LabError):
        return str(error)
    if type(error) is ValueError and "embedded null" in str(error):
        return "a path holds a NUL, which no file's name does"
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and not error.name.startswith(("lab", "triton_kernels"))
    ):
        return f"the package {error.name} is not installed: run `make setup`, then use .venv/bin/lab"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the output cannot be written: no space left on device"
    # torch's error; its first sentence says how much memory was asked for.
    if type(error).__name__ == "OutOfMemoryError":
        return f"{str(error).split('. ')[0]}: try a smaller model, batch or context"
    return None


def take_any_text():
    """Lets standard output and error print every text: characters that their encoding lacks are shown as
    escapes (\\u6f22).

    If one of them is closed, as by 2>&- in a shell, what is printed to it is dropped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a test's own stream may not have it
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    take_any_text()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        status = run(argv)
        print(end="", flush=True)  # a write error is raised here, not at exit
        return status or 0
    except BrokenPipeError:  # the reader went away, as in `lab ops | head -1`
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
        with contextlib.suppress(OSError):  # standard error is full or closed: the exit status remains
            print("lab: error: " + one_line(line), file=sys.stderr)
        return 2


def drop_output():
    """Drops what standard output still holds, so that Python's own flush at exit succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
