"""Classify images with what `lora-recycle export` wrote, where neither torch nor this library is installed.

    lora-recycle export demo --task photos --output deployed
    pip install onnxruntime numpy pillow
    python examples/predict_without_torch.py deployed new/*.jpg

Prints one line for each image: its file, its class and the probability of it, with tabs between. An exported model
without a task gives embeddings; `--npy FILE` saves those, or all probabilities, as one array (images, numbers).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixel_values(path: str, image: dict) -> np.ndarray:
    """A picture as the network takes it: float32 (3, S, S). `image` is that part of export.json."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode == "F" or picture.mode.startswith("I"):
            raise SystemExit(f"{path}: has more than 8 bits a pixel. Scale it to 0-255 first.")
        picture = picture.convert("RGB")
    resize, crop = image["resize"], image["crop"]
    if "shortest_edge" in resize:
        edge, shortest = resize["shortest_edge"], min(picture.size)
        size = tuple(edge if side == shortest else int(edge * side / shortest) for side in picture.size)
    else:
        size = (resize["width"], resize["height"])
    picture = picture.resize(size, image["resample"])
    if crop:
        left, top = (picture.width - crop["width"]) // 2, (picture.height - crop["height"]) // 2
        picture = picture.crop((left, top, left + crop["width"], top + crop["height"]))
    values = (np.asarray(picture, np.float32) / 255 - np.float32(image["mean"])) / np.float32(image["std"])
    return values.transpose(2, 0, 1)


def run(folder: Path, paths: list[str], batch_size: int = 16) -> np.ndarray:
    """What the exported model says of images: float32 (images, classes), or (images, D) without a task."""
    description = json.loads((folder / "export.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=onnxruntime.get_available_providers())
    answers = []
    for start in range(0, len(paths), batch_size):
        batch = np.stack([pixel_values(path, description["image"]) for path in paths[start : start + batch_size]])
        answers += session.run(None, {description["input"]["name"]: batch})
    return np.concatenate(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `lora-recycle export` wrote")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--npy", type=Path, metavar="FILE", help="save all that the model says")
    args = parser.parse_args()
    answers = run(args.folder, args.images)
    if args.npy:
        np.save(args.npy, answers)
    names = json.loads((args.folder / "export.json").read_text())["label_names"]
    if names:
        for path, row in zip(args.images, answers, strict=True):
            print(path, names[row.argmax()], f"{row.max():.3f}", sep="\t")


if __name__ == "__main__":
    main()
