"""The command line: verbs, one line for each error, data on stdout and everything else on stderr."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from ..errors import ConfigError, ImageError, LoRARecycleError
from ..runtime.signals import Terminated, terminable
from ..runtime.terminal import printable, single_line
from ..version import __version__
from . import (
    app,
    benchmark,
    demo,
    distill,
    evaluate,
    export,
    extract,
    import_file,
    inspect,
    invert,
    predict,
    push,
    quantize,
    reproduce,
    train_adapters,
)
from .common import note, quieten
from .completion import PrintCompletion


#: In the order of the work. Each imports torch only when it runs, so that the help answers at once.
VERBS = (
    train_adapters,
    import_file,
    extract,
    inspect,
    invert,
    distill,
    evaluate,
    benchmark,
    predict,
    app,
    export,
    quantize,
    push,
    reproduce,
    demo,
)

#: Verbs whose work several processes share.
SHARED = ("train-adapters", "invert", "distill")

EPILOG = """\
examples:
  lora-recycle demo                                          all steps on the shipped adapters
  lora-recycle train-adapters photos --output pool                train adapters on labelled images
  lora-recycle invert pool --output surrogate                surrogate images from adapters only
  lora-recycle distill pool --surrogate surrogate --output meta
  lora-recycle evaluate meta --data new_photos --pool pool
  lora-recycle benchmark recipe.yaml                         many methods, data sets and shots
  lora-recycle predict meta --support examples photo.jpg
  lora-recycle app --model meta                              the same in the browser
  lora-recycle export meta --task examples --output deployed
  lora-recycle push meta someone/meta-lora
  lora-recycle reproduce someone/meta-lora                   rebuild it and compare

`lora-recycle VERB --help` lists its settings, with examples. Results go to stdout, everything else to stderr.
exit codes: 0 success, 1 an error (described in one line), 2 wrong usage, 130 Ctrl-C, 143 terminated.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    0; 1 for an error, or a `reproduce` that came out otherwise; 130 for Ctrl-C; 143 for SIGTERM. Wrong usage exits
    with 2.
    """
    if sys.stderr is None:  # `2>&-`; its number is taken, or the next file that is opened would get all messages
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if sys.stdout is None:  # `>&-`
        note("lora-recycle: error: stdout is closed. Send it to a file, or to /dev/null.")
        return 1
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one in ASCII or latin-1 shows as escapes what it cannot hold
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        parser = build_parser()
        parser.exit(2, parser.format_help())
    try:
        try:
            args = _parsed(argv)
        except SystemExit:  # after a help or a completion script
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        return _closed_pipe()
    args.debug, args.quiet = getattr(args, "debug", False), getattr(args, "quiet", False)
    quieten(args.quiet)
    if logging.lastResort is not None:  # what prints warnings that no one else handles
        logging.lastResort.setFormatter(_PrintableFormatter())
    try:
        with terminable(), warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
                _silence_libraries()
            if args.verb not in SHARED:
                _alone(args.verb)
            code = args.run(args)
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        note(f"\nlora-recycle: {'terminated' if terminated else 'interrupted'}{_way_on(args, argv)}")
        return 143 if terminated else 130
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as error:
        if args.debug:
            sys.excepthook = _print_trace
            raise
        note(f"lora-recycle: {_process()}{_reason(error, args)}")
        return 1
    return code or 0


def _closed_pipe() -> int:
    """The exit code after `lora-recycle inspect pool | head`. What is left in the buffer must not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs. Nothing here imports torch."""
    common = argparse.ArgumentParser(add_help=False)
    # suppressed, so that the verb's default does not undo what stood before the verb
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    common.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress bars, no hints")
    parser = _Parser(
        prog="lora-recycle",
        description="Recycle LoRAs of vision transformers into one meta-LoRA for new tasks, without tuning.",
        epilog=EPILOG,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"lora-recycle {__version__}")
    parser.add_argument("--print-completion", action=PrintCompletion, help="print completion for bash, zsh or fish")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for module in VERBS:
        verb = module.add_parser(subparsers, parents=[common])
        verb.set_defaults(run=module.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """Examples in the epilog keep their lines, options are written out, and an error says where the help is."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {single_line(message)}\nSee `{self.prog} --help`.\n")


class _PrintableFormatter(logging.Formatter):
    """Log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _print_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody caught, without control characters."""
    note("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments. Wrong usage exits with 2, naming what is like the word that is not known."""
    parser = build_parser()
    verbs = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in verbs and "--print-completion" not in argv:
        parser.error(f"there is no verb {verb!r}.{_like(verb, verbs)}")
    args, unknown = parser.parse_known_args(_with_json_files(argv))
    if unknown:
        taker = verbs[args.verb]
        meant = _like(unknown[0].split("=")[0], taker._option_string_actions)
        taker.error(f"unrecognized arguments: {' '.join(unknown)}.{meant}")
    return args


def _with_json_files(argv: list[str]) -> list[str]:
    """The words with `--json=-` for a `--json` that no file follows: argparse would take an image for its FILE."""
    followed = [*argv[1:], ""]
    bare = [word == "--json" and not after.endswith(".json") for word, after in zip(argv, followed, strict=True)]
    return ["--json=-" if alone else word for word, alone in zip(argv, bare, strict=True)]


def _like(word: str, known: Iterable[str]) -> str:
    """A question after what was perhaps meant; empty where nothing is near."""
    near = difflib.get_close_matches(word, known, 1)
    return f" Did you mean {near[0]}?" if near else ""


def _alone(verb: str) -> None:
    """Raise `ConfigError` where several processes would all do what one must do."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"`{verb}` runs in one process, not in {world}. Start it without `accelerate launch`.")


def _process() -> str:
    """Which process of a launch this is, for messages; empty where it is the only one."""
    return f"process {os.environ.get('RANK', '?')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _way_on(args: argparse.Namespace, argv: list[str]) -> str:
    """How to go on after an interruption, as the end of a sentence."""
    if not hasattr(args, "resume"):
        return "; finished work is kept."
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return "; finished work is kept. Launch the same command again, with --resume, to continue."
    again = [word for word in argv if word not in ("--resume", "--no-resume")]
    return f"; finished work is kept. To continue: {shlex.join(['lora-recycle', *again, '--resume'])}"


def _reason(error: Exception, args: argparse.Namespace) -> str:
    """What the user reads: an error's one line, or that this is no error of theirs and where its trace is."""
    if _is_expected(error):
        skips = isinstance(error, ImageError) and getattr(args, "skip_errors", None) is False
        return f"error: {one_line(error)}" + (" --skip-errors leaves such images out." if skips else "")
    return f"bug: {type(error).__name__}: {one_line(error)} (run it with --debug for the traceback, and report it)"


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks; for the system's errors the file before the reason."""
    if isinstance(error, OSError) and not isinstance(error, LoRARecycleError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _is_expected(error: Exception) -> bool:
    """Whether the user can act on it. safetensors has an error of its own for a full disk, torch for full memory."""
    named = type(error).__name__ in ("SafetensorError", "OutOfMemoryError")
    return named or isinstance(error, (LoRARecycleError, OSError, MemoryError))


def _silence_libraries() -> None:
    """No load reports and bars of transformers and datasets among ours."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
