"""Environments with no more than an installation of the package brings, made of links to the libraries of this one."""

import configparser
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


REPOSITORY = Path(__file__).parents[1]


def requirement_lines(section: str) -> list[str]:
    """The requirements in setup.cfg: of `install_requires`, or of an extra."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    return (config["options"] if section == "install_requires" else config["options.extras_require"])[section].split()


def installed_by(lines: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """All distributions that pip installs for some requirements: theirs as well, by their markers and extras.

    Raises:
        PackageNotFoundError: one of them is not installed here.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting, seen = [Requirement(line) for line in lines], set()
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            key = canonicalize_name(requirement.name)
            if (key, extra) in seen:
                continue
            seen.add((key, extra))
            found[key] = importlib.metadata.distribution(requirement.name)
            further = map(Requirement, found[key].requires or ())
            waiting += [r for r in further if r.marker is None or r.marker.evaluate({"extra": extra})]
    return list(found.values())


def make_environment(folder: Path, extras: Iterable[str] = ()) -> Path:
    """The Python of a new virtual environment that has what the package with these extras needs, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    lines = [line for section in ("install_requires", *extras) for line in requirement_lines(section)]
    for distribution in installed_by(lines):
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():  # several distributions may share a folder
                (site / name).symlink_to(str(distribution.locate_file(name)))
    return folder / "bin" / "python"
