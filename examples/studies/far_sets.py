"""Two more far data sets of kinds that no adapter of the pools saw, textures and emoji, from public packages.

    apt-get download openarena-081-textures                                  # 94 MB, GPL-2+: textures of a game
    for v in apple facebook google twitter; do npm pack emoji-datasource-$v@16.0.0; done     # 340 MB: 64-pixel images
    python examples/studies/far_sets.py --packages . --output DATA                                       # a minute

writes `DATA/textures/test.parquet` and `DATA/emoji/test.parquet`. A class of textures is one picture, its images are
random squares of half the side (a quarter of the area), as the Brodatz album is used. A class of emoji is a Unicode
subcategory (`animal-bird`), its images are the emoji of it as four companies draw them, on white. Classes with fewer
than 20 images are left out, all but 40 images of a class, and all but 100 classes. Every run draws the same.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image


VENDORS = ("apple", "facebook", "google", "twitter")
LEAST, MOST, MOST_CLASSES = 20, 40, 100
#: Sides of a picture that is a class of textures. Smaller ones have too little to crop.
SIDES = (256, 512, 1024)
#: Folders of the game that hold effects, lights and skies, not surfaces.
NO_SURFACES = ("sfx", "liquids", "skies", "flares", "effects", "light", "common")


def textures(packages: Path) -> dict[str, list[Image.Image]]:
    """Name of each picture and squares of it."""
    package = one_file(packages, "openarena-081-textures_*.deb")
    found: dict[str, list[Image.Image]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        with zipfile.ZipFile(one_file(Path(folder), "**/pak4-textures.pk3")) as archive:
            for name in sorted(archive.namelist()):
                path = Path(name)
                if path.suffix != ".jpg" or path.parts[0] != "textures" or any(x in name for x in NO_SURFACES):
                    continue
                with Image.open(io.BytesIO(archive.read(name))) as picture:
                    if picture.width == picture.height and picture.width in SIDES:
                        found[f"{path.parent.name}/{path.stem}"] = squares(picture.convert("RGB"), name)
    return found


def squares(picture: Image.Image, seed: str) -> list[Image.Image]:
    generator, side = random.Random(seed), picture.width // 2
    corners = [(generator.randrange(side), generator.randrange(side)) for _ in range(MOST)]
    return [picture.crop((x, y, x + side, y + side)).resize((96, 96), Image.Resampling.LANCZOS) for x, y in corners]


def emoji(packages: Path) -> dict[str, list[Image.Image]]:
    """Name of each subcategory and its emoji."""
    found: dict[str, list[Image.Image]] = defaultdict(list)
    for vendor in VENDORS:
        with tarfile.open(one_file(packages, f"emoji-datasource-{vendor}-*.tgz")) as archive:
            files = {m.name: read(archive, m) for m in archive if m.name.endswith("emoji.json") or "/64/" in m.name}
        for row in json.loads(files["package/emoji.json"]):
            file = files.get(f"package/img/{vendor}/64/{row['image']}")
            if file:
                with Image.open(io.BytesIO(file)) as picture:
                    drawn = picture.convert("RGBA")
                white = Image.new("RGBA", drawn.size, "white")
                found[row["subcategory"]].append(Image.alpha_composite(white, drawn).convert("RGB"))
    return found


def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def one_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"There is no {pattern} in {folder}. The first lines of this script say how to fetch it.")
    return found[-1]


def write(classes: dict[str, list[Image.Image]], path: Path) -> None:
    """A parquet file of the classes with enough images, and of each at most `MOST`."""
    names = sorted(name for name, images in classes.items() if len(images) >= LEAST)
    names = sorted(random.Random(0).sample(names, min(MOST_CLASSES, len(names))))
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    rows = [
        (image, label)
        for label, name in enumerate(names)
        for image in random.Random(name).sample(classes[name], min(MOST, len(classes[name])))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels = zip(*rows, strict=True)
    Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features).to_parquet(str(path))
    print(f"{path}: {len(names)} classes, {len(rows)} images")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="folder of the downloaded files")
    parser.add_argument("--output", type=Path, required=True, metavar="DATA")
    args = parser.parse_args(arguments)
    for make in (textures, emoji):
        write(make(args.packages), args.output / make.__name__ / "test.parquet")


if __name__ == "__main__":
    main()
