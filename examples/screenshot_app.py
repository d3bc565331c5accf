"""Take the picture of the page in docs/app.md, with drawn shapes as images. Needs chromium and the extra [test].

python examples/screenshot_app.py docs/app.png
"""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from lora_recycle.app.page import launch


SHAPES = {"disc": (0, 40), "triangle": (3, 46), "square": (4, 44)}  # corners and radius
SIDE, WIDTH = 128, 900


def draw(shape: str, rng: random.Random, path: Path) -> str:
    """A light shape, somewhere and turned anyhow, on a dark ground."""
    corners, radius = SHAPES[shape]
    picture = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(20, 90) for _ in range(3)))
    middle, colour = (rng.randrange(48, 80), rng.randrange(48, 80)), tuple(rng.randrange(150, 256) for _ in range(3))
    if corners:
        ImageDraw.Draw(picture).regular_polygon((middle, radius), corners, rng.randrange(360), fill=colour)
    else:
        ImageDraw.Draw(picture).circle(middle, radius, fill=colour)
    picture.save(path)
    return str(path)


def use_page(tab, url: str, folder: Path) -> None:
    """What a visitor does: two classes, a third one, new images, an answer."""
    rng = random.Random(0)
    tab.goto(url)
    tab.get_by_role("button", name="Add a class").click()
    tab.get_by_label("Name of class 3").wait_for()
    for number, shape in enumerate(SHAPES, 1):
        tab.get_by_label(f"Name of class {number}").fill(shape)
        drop(tab, f"Images of class {number}", [draw(shape, rng, folder / f"{shape}{i}.png") for i in range(4)])
    drop(tab, "New images", [draw(shape, rng, folder / f"new-{shape}.png") for shape in SHAPES])
    tab.get_by_role("button", name="Classify").click()
    tab.locator("#answers figure").nth(2).wait_for()


def drop(tab, label: str, files: list[str]) -> None:
    zone = tab.locator(".drop-zone").filter(has_text=label)
    zone.locator("input[type=file]").set_input_files(files)
    zone.locator("img").nth(len(files) - 1).wait_for()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no chromium on this machine")
    served = launch("demo", browser=False)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 800})
        tab.set_default_timeout(120_000)
        use_page(tab, served.local_url, Path(folder))
        tab.screenshot(path=output, full_page=True)
        browser.close()
    served.close()
    Image.open(output).convert("RGB").quantize(64).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
