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

    steps: int = field(200, "optimiser steps; 0 leaves the initialisation, a merge of the pool in seconds")
    rank: int = field(64, "rank of the meta-LoRA, on all linear layers")
    peft_type: str = field(
        "LORA", "type of the meta-adapter; all but LORA, DORA and SHIRA need an init that is no average", PEFT_TYPES
    )
    init: str = field(
        "restored",
        "average: the exact mean of the pool, cut to the rank; restored: the same, with the largest group of like "
        "adapters at its full strength; undiluted: the mean, all of it scaled until that is so; group-sum: all groups "
        "at their full strength; zero; or, for LORA, the part of the backbone's weights that learns: pissa, olora, "
        "corda (by activations of the surrogate images), stored at twice the rank",
        (*AVERAGES, "zero", *PRINCIPAL_STARTS),
    )
    share: float = field(
        0.25,
        "what of the learnt change is kept, beside init for the rest, where init is an average: a LORA then begins to "
        "learn where every group of like adapters has its full strength; 1: it begins at init, and all is kept",
    )
    first_layer: int = field(
        0,
        "layers before it keep the initialisation; what enters it is computed once and kept on disk",
    )
    lr: float = field(5e-4, "peak step size of Adam")
    gradient_accumulation_steps: int = field(1, "batches whose gradients are averaged before the optimiser steps")
    max_grad_norm: float = field(0.0, "gradients of a larger norm are scaled down to it; 0 clips none")
    spike_factor: float = field(
        10.0, "a step is left out whose loss is so many times the median of the last 50; 0: only if it is not finite"
    )
    min_confidence: float = field(
        0.0,
        "mean probability that an adapter must give the classes of its surrogate images; those below are left out",
    )
    schedule: str = field(
        "cosine",
        "cosine: one warm-up and decay; cyclic: 25 + 75 steps again and again (the paper)",
        ("cosine", "cyclic"),
    )
    relational_weight: float = field(1.0, "weight of the relational loss: similarities pulled to the teachers' mean")
    relational_batch: int = field(128, "surrogate images of one relational batch, shared out equally to the groups")
    similarity_scale: float = field(15.0, "factor on cosine similarities before the softmax")
    groups: str = field(
        "auto",
        "auto: adapters grouped by the similarity of their weights, each image taught by its own group; "
        "one: a single group of all",
        ("auto", "one"),
    )
    balance: str = field(
        "images",
        "what counts the same in the relational loss: each surrogate image, or each group of adapters",
        ("images", "groups"),
    )
    max_teachers: int = field(
        32, "most adapters that teach a group, spread evenly over it: they bound the forwards of an image"
    )
    kl_weight: float = field(0.0, "weight of single-source episodes: KL to the adapter's own head")
    interpolation_weight: float = field(0.0, "weight of interpolated episodes: cross-entropy, mixed classes")
    episodes: int = field(4, "episodes of each kind and step")
    ways: int = field(5, "classes of an episode")
    shots: int = field(1, "support images of each class")
    queries: int = field(5, "query images of each class")
    metric: str = field("cosine", "distance of queries to class centres", ("cosine", "euclidean"))
    temperature: float = field(0.1, "divisor of the (negative) distances")
    held_out: float = field(
        0.2,
        "share of each group's adapters that teach nothing, at least one of four, at most 16 in all: by the error on "
        "their classes the student is judged, and the best that makes it larger in no group is kept, which may be the "
        "average (says little if a recipe learns by episodes); 0: the last step is kept",
    )
    judge_every: int = field(50, "steps between two judgements; the start and the last step are judged in any case")
    patience: int = field(0, "judgements in a row without a better one after which training ends; 0: all steps")
    use_masks: bool = field(True, "forward only the kept tokens where the surrogate data holds them")
    checkpoint_every: int = field(50, "steps between checkpoints")
    seed: int = field(0, "seed of the batches and of the initial weights")

    @property
    def blends(self) -> bool:
        """Whether `share` applies: to steps of a LoRA from an average."""
        return self.share < 1 and self.steps > 0 and self.peft_type == "LORA" and self.init in AVERAGES

    def check(self) -> None:
        require_choices(self)
        weights = ("relational_weight", "kl_weight", "interpolation_weight")
        for name in ("steps", "first_layer", *weights, "max_grad_norm", "patience"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        counts = ("rank", "max_teachers", "episodes", "shots", "queries", "checkpoint_every", "judge_every")
        for name in (*counts, "gradient_accumulation_steps"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self.require(
            self.init not in AVERAGES or self.peft_type in STARTS_FROM_AVERAGE,
            f"an adapter of type {self.peft_type} cannot start from an average; set init to zero",
        )
        self.require(
            self.init not in PRINCIPAL_STARTS or self.peft_type == "LORA",
            f"init {self.init} is for peft_type LORA, got {self.peft_type}",
        )
        self.require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")
        self.require(self.ways >= 2, f"ways must be at least 2, got {self.ways}")
        self.require(self.relational_batch >= 4, f"relational_batch must be at least 4, got {self.relational_batch}")
        self.require(self.lr > 0 and self.temperature > 0, "lr and temperature must be positive")
        self.require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"spike_factor must be 0 or more than 1, got {self.spike_factor}",
        )
        self.require(0 <= self.min_confidence < 1, f"min_confidence must be in [0, 1), got {self.min_confidence}")
        self.require(0 <= self.held_out <= 0.5, f"held_out must be in [0, 0.5], got {self.held_out}")
        self.require(
            self.patience == 0 or self.held_out > 0, "patience needs judgements: set held_out above 0, say to 0.2"
        )
        total = sum(getattr(self, name) for name in weights)
        self.require(self.steps == 0 or total > 0, "all losses have weight 0: nothing to learn in `steps` steps")
