"""Errors that a user can act on: each says what was wrong, where, and what to do. The command line prints one line."""


class LoRARecycleError(ValueError):
    """Base of all errors that this library raises on purpose."""


class AdapterError(LoRARecycleError):
    """An adapter (or its head) cannot be used: missing, damaged, unsafe, or made for another base model."""


class DivergenceError(AdapterError):
    """The images of one adapter cannot be optimised: their loss, or what the adapter says of them, is not finite."""


class ConfigError(LoRARecycleError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(LoRARecycleError):
    """Images, labels or surrogate data are missing, damaged or too few."""


class ImageError(DataError):
    """One image cannot be read. Where several were given, it can be left out (`failures`, `--skip-errors`)."""


class PushError(LoRARecycleError):
    """Something cannot be published: unfit for the Hub as it is, or the Hub or the way to it refused."""


class ProcessError(LoRARecycleError):
    """Another process of the same launch failed or fell silent, so that this one cannot go on."""


class StorageError(LoRARecycleError):
    """Nothing can be written: the disk is full, the folder read-only, or another run is at work in it."""


def first_line(error: BaseException) -> str:
    """What another library says, without the lines below the first; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
