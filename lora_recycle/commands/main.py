"""The command line: verbs, one line for each error, data on stdout and everything else on stderr."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from ..errors import LoraRecycleError
from ..version import __version__
from . import demo, distill, evaluate, import_file, inspect, invert, predict, push, quantise, tune_pool


#: In the order of the work. Each imports torch only when it runs, so that the help answers at once.
VERBS = (tune_pool, import_file, inspect, invert, distill, evaluate, predict, quantise, push, demo)

EPILOG = """\
examples:
  lora-recycle demo                                          the whole way on the shipped adapters
  lora-recycle tune-pool photos --output pool                make adapters from labelled images
  lora-recycle invert pool --output surrogate                surrogate images from adapters alone
  lora-recycle distill pool --surrogate surrogate --output meta
  lora-recycle evaluate meta --data new_photos --pool pool
  lora-recycle predict meta --support examples photo.jpg
  lora-recycle push meta someone/meta-lora

`lora-recycle VERB --help` lists the settings of a verb.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 for an error that the user can act on, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    args.debug, args.quiet = getattr(args, "debug", False), getattr(args, "quiet", False)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
                _silence_libraries()
            args.run(args)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("lora-recycle: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lora-recycle inspect pool | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug or not _is_expected(error):
            raise
        print(f"lora-recycle: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs. Nothing here imports torch."""
    common = argparse.ArgumentParser(add_help=False)
    # suppressed, so that the verb's default does not undo what stood before the verb
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the trace of an error")
    common.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="show no progress bars")
    parser = argparse.ArgumentParser(
        prog="lora-recycle",
        description="Recycle LoRAs of vision transformers into one meta-LoRA that classifies new tasks untuned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lora-recycle {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Verb)
    for module in VERBS:
        verb = module.add_parser(subparsers, parents=[common])
        verb.set_defaults(run=module.run)
    return parser


class _Verb(argparse.ArgumentParser):
    """A verb's parser: examples in the epilog keep their lines, options are written out."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks; for the system's errors the file before the reason."""
    if isinstance(error, OSError) and not isinstance(error, LoraRecycleError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _is_expected(error: Exception) -> bool:
    """Whether the user can act on it. safetensors reports a full disk with an error of its own."""
    return isinstance(error, (LoraRecycleError, OSError)) or type(error).__name__ == "SafetensorError"


def _silence_libraries() -> None:
    """No load reports and bars of transformers and datasets among ours."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
