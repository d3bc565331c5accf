"""Settings of the distillation of surrogate data into one meta-LoRA."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


#: What the meta-adapter can be, which starts are a mean of the pool, and which types can have those.
PEFT_TYPES = ("LORA", "DORA", "LOHA", "LOKR", "OFT", "IA3", "SHIRA")
AVERAGES = ("restored", "undiluted", "group-sum", "average")
STARTS_FROM_AVERAGE = ("LORA", "DORA", "SHIRA")
#: Starts of a LoRA at principal directions of the backbone's weights; what is saved has twice the rank.
PRINCIPAL_STARTS = ("pissa", "olora", "corda")


@dataclasses.dataclass
class DistillationConfig(RecipeConfig):
    """How the meta-LoRA learns (stage 2 of LoRA Recycle, and ensemble-relational distillation)."""

    steps: int = field(200, "optimiser steps; 0 keeps the initialisation, a merge of the pool made in seconds")
    rank: int = field(64, "rank of the meta-LoRA")
    targets: str = field(
        "all",
        "linear layers of the meta-LoRA: all, or comma-separated leaf names, as in q_proj,v_proj. Of an average that "
        "it starts from it has what lies in them",
    )
    peft_type: str = field(
        "LORA", "type of the meta-adapter; only LORA, DORA and SHIRA can start from an average", PEFT_TYPES
    )
    init: str = field(
        "restored",
        "start of the meta-LoRA. average: the exact mean of the pool, cut to the rank; restored: the same, with the "
        "largest group of similar adapters at full strength; undiluted: the mean, scaled until that group has full "
        "strength; group-sum: all groups at full strength; zero; or, for LORA, principal directions of the backbone's "
        "weights: pissa, olora, corda (by activations of the surrogate images), stored at twice the rank",
        (*AVERAGES, "zero", *PRINCIPAL_STARTS),
    )
    share: float = field(
        0.25,
        "fraction of the distilled change that is kept; the rest of the weight goes to init, if that is an average. A "
        "LORA then starts to learn from the group sum. 1: start to learn from init and keep everything",
    )
    experts: bool = field(
        True,
        "beside the meta-LoRA keep an expert for each domain of a mixed pool, the average of its adapters, from which "
        "each task chooses; a pool of one domain has none",
    )
    expert_rank: int = field(32, "most that an expert's rank may be; it is exact where its adapters need less")
    first_layer: int = field(
        0,
        "first layer that learns; the activations that enter it are computed once and stored on disk",
    )
    lr: float = field(5e-4, "peak learning rate of Adam")
    gradient_accumulation_steps: int = field(1, "batches whose gradients are averaged in each optimiser step")
    max_grad_norm: float = field(0.0, "largest gradient norm; larger gradients are scaled down to it; 0: no clipping")
    spike_factor: float = field(
        10.0, "skip a step whose loss is this many times the median of the last 50; 0: only if it is not finite"
    )
    min_confidence: float = field(
        0.0,
        "leave out adapters that give the classes of their surrogate images a lower mean probability",
    )
    schedule: str = field(
        "cosine",
        "cosine: one warm-up and decay; cyclic: cycles of 25 + 75 steps between lr / 100 and lr (the paper)",
        ("cosine", "cyclic"),
    )
    relational_weight: float = field(1.0, "weight of the relational loss: match the teachers' mean similarities")
    relational_batch: int = field(128, "surrogate images in a relational batch, divided equally among the groups")
    similarity_scale: float = field(15.0, "factor on cosine similarities before the softmax")
    groups: str = field(
        "auto",
        "auto: group adapters by the similarity of their weight changes, and teach each image by its own group; "
        "one: a single group",
        ("auto", "one"),
    )
    balance: str = field(
        "images",
        "what counts equally in the relational loss: surrogate images, or groups of adapters",
        ("images", "groups"),
    )
    max_teachers: int = field(
        32, "largest number of adapters that teach a group, spread evenly over it; bounds the cost of an image"
    )
    kl_weight: float = field(0.0, "weight of single-source episodes: KL divergence from the adapter's own head")
    interpolation_weight: float = field(
        0.0, "weight of interpolated episodes: cross-entropy on classes of several adapters"
    )
    episodes: int = field(4, "episodes of each kind per step")
    ways: int = field(5, "classes per episode")
    shots: int = field(1, "support images per class")
    queries: int = field(5, "query images per class")
    metric: str = field("cosine", "metric between queries and prototypes", ("cosine", "euclidean"))
    temperature: float = field(0.1, "divisor of the (negative) distances")
    validation_fraction: float = field(
        0.2,
        "fraction of each group's adapters used for validation only, at least one of four, at most 16 in all. The "
        "step with the smallest error on their classes is kept that is not significantly worse in any group, else the "
        "average (unreliable for recipes that learn by episodes); 0: keep the last step",
    )
    eval_steps: int = field(50, "steps between two validations; the start and the last step are always validated")
    patience: int = field(0, "stop after so many validations in a row without improvement; 0: run all steps")
    augment: bool = field(
        False, "mirror, turn over or recolour each image of a step at random (the paper); stored teachers see it plain"
    )
    use_masks: bool = field(True, "forward only the kept patches, if the surrogate data has masks")
    save_steps: int = field(50, "steps between checkpoints")
    seed: int = field(0, "seed of the batches and of the initial weights")

    @property
    def mixes(self) -> bool:
        """Whether `share` applies: to steps of a LoRA from an average."""
        return self.share < 1 and self.steps > 0 and self.peft_type == "LORA" and self.init in AVERAGES

    def check(self) -> None:
        require_choices(self)
        weights = ("relational_weight", "kl_weight", "interpolation_weight")
        for name in ("steps", "first_layer", *weights, "max_grad_norm", "patience"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        counts = ("rank", "expert_rank", "max_teachers", "episodes", "shots", "queries", "save_steps", "eval_steps")
        for name in (*counts, "gradient_accumulation_steps"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self.require(
            self.init not in AVERAGES or self.peft_type in STARTS_FROM_AVERAGE,
            f"peft_type {self.peft_type} cannot start from an average; set init to zero",
        )
        self.require(
            self.init not in PRINCIPAL_STARTS or self.peft_type == "LORA",
            f"init {self.init} needs peft_type LORA, got {self.peft_type}",
        )
        self.require(
            not (self.augment and self.first_layer),
            "augment needs first_layer 0: the stored activations are those of the images as they are",
        )
        self.require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")
        self.require(self.ways >= 2, f"ways must be at least 2, got {self.ways}")
        self.require(self.relational_batch >= 4, f"relational_batch must be at least 4, got {self.relational_batch}")
        self.require(self.lr > 0 and self.temperature > 0, "lr and temperature must be positive")
        self.require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"spike_factor must be 0 or greater than 1, got {self.spike_factor}",
        )
        self.require(0 <= self.min_confidence < 1, f"min_confidence must be in [0, 1), got {self.min_confidence}")
        self.require(
            0 <= self.validation_fraction <= 0.5,
            f"validation_fraction must be in [0, 0.5], got {self.validation_fraction}",
        )
        self.require(
            self.patience == 0 or self.validation_fraction > 0,
            "patience needs validation adapters: set validation_fraction above 0, for instance to 0.2",
        )
        total = sum(getattr(self, name) for name in weights)
        self.require(
            self.steps == 0 or total > 0,
            "all loss weights are 0, so there is nothing to learn: set one of them, or steps to 0",
        )
