"""Take the picture of the page in docs/app.md, with patterns drawn for it. Needs chromium and the extra [test].

python examples/tools/screenshot_app.py docs/app.webp
"""

import argparse
import io
import itertools
import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from lora_recycle.app.page import launch


KINDS = ("stripes", "dots", "disc")
SIDE, WIDTH = 128, 900


def draw(kind: str, rng: random.Random, path: Path) -> str:
    """Light stripes, dots or one disc, somewhere, on a dark ground."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(20, 90) for _ in range(3)))
    colour, pen = tuple(rng.randrange(150, 256) for _ in range(3)), ImageDraw.Draw(picture)
    if kind == "disc":
        pen.circle((rng.randrange(48, 80), rng.randrange(48, 80)), 40, fill=colour)
    elif kind == "dots":
        for x, y in itertools.product(range(rng.randrange(24), SIDE, 24), range(rng.randrange(24), SIDE, 24)):
            pen.circle((x, y), 7, fill=colour)
    else:
        slope = rng.randrange(-60, 60)
        for x in range(-SIDE, 2 * SIDE, 24):
            pen.line((x, 0, x + slope, SIDE), colour, 10)
    picture.save(path)
    return str(path)


def use_page(tab, url: str, folder: Path) -> None:
    """What a visitor does: two classes, a third one, new images, an answer."""
    rng = random.Random(0)
    tab.goto(url)
    tab.get_by_role("button", name="Add a class").click()
    tab.get_by_label("Name of class 3").wait_for()
    for number, kind in enumerate(KINDS, 1):
        tab.get_by_label(f"Name of class {number}").fill(kind)
        drop(tab, f"Images of class {number}", [draw(kind, rng, folder / f"{kind}{i}.png") for i in range(4)])
    drop(tab, "New images", [draw(kind, rng, folder / f"new-{kind}.png") for kind in KINDS])
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
        picture = tab.screenshot(full_page=True)
        browser.close()
    served.close()
    Image.open(io.BytesIO(picture)).convert("RGB").save(output, quality=70, method=6)
    print(f"{output}: {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
