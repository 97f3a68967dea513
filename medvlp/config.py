"""The schema of a run: one tree of dataclasses, every key with its default and meaning.

`medvlp.config_files` reads YAML files and `key=value` overrides into it. A method's own keys live beside
the method (a subclass of `MethodConfig`) and those of an evaluation task beside the task (a subclass of
`TaskConfig`), so that adding one does not touch this file.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from medvlp.config_data import DataConfig as DataConfig
from medvlp.config_data import TransformConfig as TransformConfig
from medvlp.config_section import ConfigError as ConfigError
from medvlp.config_section import MethodConfig as MethodConfig
from medvlp.config_section import TaskConfig as TaskConfig
from medvlp.config_section import key as key


@dataclass
class RunConfig:
    dir: str = key(
        MISSING, "run folder: config, metrics, checkpoints, evaluation; an existing one is resumed"
    )
    name: str | None = key(None, "name shown in W&B and tables; default: the folder's name")


@dataclass
class ImageConfig:
    name: str = key("vit_base_patch16_224", "any timm model")
    pretrained: bool = key(False, "load timm's published weights (needs the hub or its cache)")
    weights: str | None = key(None, "local .safetensors or .pth file with backbone weights", file=True)
    options: dict[str, Any] = key({}, "arguments of timm.create_model; gone where a later file has a name")
    in_channels: int = key(3, "channels of the backbone; a grayscale image is repeated", 1, 1024)
    mean: Any = key(
        0.5, "mean of normalisation, on images scaled to [0, 1]: one number, or one per channel", -1000, 1000
    )
    std: Any = key(0.5, "standard deviation of normalisation: one number, or one per channel", 1e-06, 1000)
    resize_to: int | None = key(
        None, "side to which the encoder upsamples its input first (MGCA's ResNet: 299)", 8, 8192
    )
    local_stage: int | None = key(
        None, "stage whose feature map is local (timm out_indices); default: the last", -64, 64
    )
    frozen: bool = key(False, "keep the backbone fixed, batch-norm statistics included")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")


@dataclass
class TextConfig:
    name: str | None = key(
        None, "folder or hub name of a transformers text model; default: built from options"
    )
    model_type: str = key("bert", "transformers model type when built from options")
    options: dict[str, Any] = key(
        {}, "config arguments of the transformers model; gone where a later file has a name or model_type"
    )
    layers: int | None = key(None, "keep only the first n layers", 1, 1024)
    dropout: float | None = key(None, "all dropout probabilities; default: as the model's config says", 0, 1)
    positions: bool = key(True, "false: every token gets position 0 (published MGCA code)")
    token_types: bool = key(True, "false: no token-type embedding (published MGCA code)")
    frozen: bool = key(False, "keep the encoder fixed")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")
    length_groups: int = key(
        1, "encode texts in so many groups of similar length, each padded to its own longest only", 1, 1024
    )


@dataclass
class PrototypesConfig:
    init: Literal["random", "kmeans"] = key(
        "random", "kmeans: learned prototypes start from k-means of the first embeddings"
    )
    init_samples: int = key(
        8192, "samples embedded for the k-means start, in whole steps (a pass without gradient)", 1, 1 << 31
    )
    iterations: int = key(10, "k-means iterations of a start or refresh", 1, 10000)
    start: Literal["k-means++", "farthest_first"] = key(
        "k-means++", "how k-means chooses its first centroids (farthest_first: k-center, for rare findings)"
    )
    sync: bool | None = key(
        None,
        "true: refresh clusters inline at the step boundary (deterministic); false: in a cluster worker of "
        "each node, behind the training; default: inline on CPU, workers on GPUs",
    )
    clusters: int = key(
        500, "service clusters, where the method has no number of prototypes of its own", 1, 1 << 22
    )
    refresh_steps: int = key(100, "steps between refreshes of service clusters", 1, 10**9)
    bank_rows: int = key(
        16384, "embeddings each rank keeps for the refresh; the oldest are overwritten", 1, 1 << 31
    )
    min_points: int = key(1, "embeddings for each cluster below which a refresh is put off", 1, 10**6)
    max_points: int = key(
        256, "embeddings for each cluster above which a refresh takes a random sample", 1, 10**6
    )
    ivf_above: int = key(
        16384, "clusters from which a refresh searches them through an inverted file", 1, 1 << 31
    )
    device: Literal["auto", "cpu", "gpu"] = key(
        "auto",
        "where a refresh searches: gpu uses faiss-gpu, or torch where that is not installed, and the CPU "
        "where no GPU has room; auto takes a GPU for large work only (from about a minute of a core)",
    )
    gpu_memory: float = key(1.0, "GiB of a GPU that a refresh may use, beside a CUDA context", 0.01, 1024)
    blend: float = key(1.0, "share of the new centroids at a refresh, in (0, 1]", 0, 1)
    balance: Literal["sinkhorn", "bias", "none"] = key(
        "sinkhorn", "how assignments to service clusters are balanced"
    )
    temperature: float = key(0.1, "temperature of soft assignments to service clusters", 0.0001, 100)
    cluster_temperature: bool = key(
        False, "a temperature for each cluster from its density, with `temperature` as their mean (PCL)"
    )
    anchors: list[str] = key([], "texts (names of diseases) whose embeddings hold the first clusters")
    anchor_pull: float = key(
        1.0,
        "how far an anchored cluster is drawn to its text, in [0, 1]; 1: it is the text's embedding",
        0,
        1,
    )
    false_negatives: Literal["keep", "mask"] = key(
        "keep", "mask: samples whose reports are alike are not negatives of each other in contrastive losses"
    )
    false_negatives_by: Literal["tokens", "clusters"] = key(
        "tokens",
        "reports that are alike: of equal sentences; clusters: of one service cluster, whose embeddings the "
        "masked loss trains, so that it can fall by making all alike",
    )
    max_staleness: int | None = key(
        None,
        "steps since the last refresh from which clusters are stale; default: 5 x refresh_steps",
        1,
        10**9,
    )
    stale: Literal["continue", "drop_loss", "block"] = key(
        "continue", "what follows from stale clusters: a warning, no loss that needs them, or waiting"
    )
    worker_timeout_seconds: float = key(
        60.0, "longest time cluster workers wait for each other before they give a refresh up", 0.1, 10**6
    )
    worker_threads: int | None = key(None, "CPU threads of a cluster worker; default: one", 1, 4096)
    revive_below: float = key(
        0.0,
        "every refresh_steps steps, learned prototypes used by less than this share of an even use start "
        "anew beside the most used ones; 0: never",
        0,
        1,
    )

    @property
    def masks_by_clusters(self) -> bool:
        """Whether clusters of the service decide which samples are no negatives of each other."""
        return self.false_negatives == "mask" and self.false_negatives_by == "clusters"


@dataclass
class TrainConfig:
    seed: int = key(0, "seed of weights, order, augmentation and dropout", 0, (1 << 32) - 1)
    start: str | None = key(
        None,
        "run or checkpoint folder with whose weights and tokenizer training begins: all weights of the same "
        "method, the encoders of another one",
        file=True,
    )
    steps: int | None = key(None, "optimiser steps; stands above epochs", 1, 10**9)
    epochs: float = key(50.0, "passes over the split when steps is not set", 0, 10**6)
    min_steps: int = key(0, "optimiser steps at least, where epochs would be fewer", 0, 10**9)
    patience: int | None = key(
        None,
        "validations in a row without a better checkpoint.keep_best after which training ends",
        1,
        10**6,
    )
    global_batch: int = key(144, "samples of one optimiser step over all ranks", 1, 1 << 24)
    micro_batch: int | None = key(
        None, "samples of one forward pass on a rank; default: global_batch / ranks", 1, 1 << 24
    )
    accumulate: Literal["exact", "plain"] = key(
        "exact",
        "with more than one micro-batch a step, exact: encoders run twice and the loss is that of the whole "
        "batch; plain: each micro-batch has a loss of its own, and their gradients are averaged",
    )
    gradient_clip: float = key(0.0, "largest gradient norm; 0 turns clipping off", 0, 10**9)
    max_bad_steps: int = key(
        3, "steps in a row that may be skipped because loss or gradient is NaN, infinite or a spike", 0, 10**6
    )
    spike_sigma: float = key(
        0.0,
        "standard deviations above the mean of the last 100 steps from which a loss is a spike and its step "
        "is skipped (8 is a start); 0: only NaN and infinity are",
        0,
        10**6,
    )
    max_minutes: float | None = key(
        None, "save a checkpoint and stop, as on a signal, this long after the start", 0, 10**7
    )
    start_timeout_minutes: float = key(
        30.0, "longest time a rank may spend on one part of the start or of the first step", 0.01, 10**6
    )
    step_timeout_seconds: float = key(
        600.0,
        "after the first step, longest time a rank may spend on one part of a step (loading, computing, one "
        "checkpoint) before the run ends, naming the rank that did not arrive; 0: wait for ever",
        0,
        10**7,
    )
    tf32: bool = key(
        True,
        "on GPUs, matrix products of float32 values in TF32 (10 bits of mantissa): of everything with "
        "precision=fp32, of losses and batch norms in 16 bit; false: exact and slower",
    )
    compile: bool = key(False, "torch.compile for transformer blocks and projection heads (ZeRO 0 to 2)")
    agree_every: int = key(1, "steps behind which the ranks agree on stopping and new clusters", 1, 10**6)
    rehearse: bool | None = key(
        None,
        "before the first step, one forward and backward pass of every later phase of optimizer.phases, so "
        "that a phase that does not fit the GPU is found at the start; default: on GPUs",
    )
    threads: int | None = key(
        None, "CPU threads of each rank; default: OMP_NUM_THREADS, else cores / local ranks", 1, 4096
    )


@dataclass
class PhaseConfig:
    """One part of a run with an optimiser and a learning-rate schedule of its own."""

    epochs: float = key(MISSING, "length of the phase in passes over the split", 0, 10**6)
    lr: float = key(MISSING, "peak learning rate", 0, 1e3)
    start_lr: float = key(0.0, "learning rate of the first warm-up step", 0, 1e3)
    min_lr: float = key(0.0, "learning rate the cosine falls towards", 0, 1e3)
    warmup_epochs: float = key(0.0, "passes with linearly rising learning rate", 0, 10**6)


@dataclass
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = key("adamw", "optimizer")
    lr: float = key(2e-5, "peak learning rate", 0, 1e3)
    min_lr: float = key(1e-8, "learning rate at the start of warm-up and the end of the cosine", 0, 1e3)
    warmup: float = key(0.1, "share of all steps with linearly rising learning rate, in [0, 1)", 0, 0.999)
    warmup_steps: int | None = key(None, "length of the warm-up in steps; stands above warmup", 0, 10**9)
    schedule: Literal["cosine", "epoch_cosine", "constant"] = key(
        "cosine",
        "cosine: a new learning rate at every step; epoch_cosine: at every epoch, with the warm-up inside "
        "epoch 0 (MeDSLIP); constant: lr after the warm-up",
    )
    warmup_stair: int = key(1, "steps of the warm-up between two rises, with epoch_cosine", 1, 10**9)
    phases: list[PhaseConfig] = key(
        [],
        "parts of the run, each with a fresh optimizer and its own schedule (PRIOR); with any, lr, min_lr "
        "and the warm-up stand there, and the run is as long as all of them",
    )
    image_lr_scale: float = key(1.0, "factor on the learning rate of the image encoder", 0, 10**6)
    text_lr_scale: float = key(1.0, "factor on the learning rate of the text encoder", 0, 10**6)
    fusion_lr_scale: float = key(
        1.0, "factor on the learning rate of what fuses image and text (M3AE: 5)", 0, 10**6
    )
    head_lr_scale: float = key(1.0, "factor on the learning rate of a downstream task's head", 0, 10**6)
    layer_decay: float = key(
        1.0,
        "factor on the learning rate from each layer of the image backbone to the one below it (usual for a "
        "ViT on a downstream task: 0.65)",
        0.01,
        1,
    )
    betas: list[float] = key(
        [0.9, 0.999], "decay rates of AdamW's moments; the first is SGD's momentum", 0, 0.999999, (2, 2)
    )
    eps: float = key(1e-8, "AdamW's epsilon", 1e-16, 1)
    weight_decay: float = key(0.05, "weight decay", 0, 1e3)
    decay_all: bool = key(False, "true: decay biases and norms too (published MGCA code)")


@dataclass
class ZeroConfig:
    stage: int = key(2, "what DeepSpeed shards over ranks: 0 | 1 | 2 | 3", 0, 3)
    offload_optimizer: bool = key(False, "keep optimiser state in CPU memory")
    offload_parameters: bool = key(False, "keep stage-3 parameters in CPU memory")


@dataclass
class CheckpointConfig:
    every_steps: int = key(
        1000, "steps between checkpoints; the last step always saves one; 0: only that", 0, 10**9
    )
    every_minutes: float = key(
        0.0, "also save when the last checkpoint is this old (rank 0's clock); 0: no", 0, 10**7
    )
    asynchronous: bool = key(
        True, "copy the state to host memory and write it while training goes on; false: wait for the disk"
    )
    keep_last: int = key(2, "newest checkpoints to keep; 0 keeps all", 0, 10**6)
    keep_every: int = key(
        0, "also keep checkpoints whose step is a multiple of this for ever; 0: none", 0, 10**9
    )
    keep_best: str | None = key(
        None, "also keep the checkpoint with the best value of this logged metric (a name in metrics.jsonl)"
    )
    best_mode: Literal["min", "max"] = key(
        "min", "whether the best value of keep_best is the lowest or highest"
    )
    retries: int = key(3, "times a failed write to disk is tried again before the run stops", 0, 1000)
    retry_seconds: float = key(
        2.0, "pause before the first retry; every further one is twice as long", 0, 10**5
    )


@dataclass
class MonitorConfig:
    log_every: int = key(
        1, "steps between log lines (metrics.jsonl, console, W&B); metrics are read only then", 1, 10**9
    )
    peak_tflops: float | None = key(
        None,
        "peak of one GPU in the run's precision, in 10^12 operations a second, of which the metric mfu is a "
        "share; default: that of the card, where it is known",
        0.001,
        10**6,
    )
    progress: bool = key(True, "rich progress bar on rank 0 when the console is a terminal")
    wandb: Literal["auto", "online", "offline", "disabled"] = key(
        "auto", "W&B mode; auto: online with an API key, else offline"
    )
    project: str = key("medvlp", "W&B project")
    entity: str | None = key(None, "W&B entity")
    tags: list[str] = key([], "W&B tags")
    group: str | None = key(None, "W&B group, such as one name for all seeds of a config")
    alerts: bool = key(
        False, "W&B alerts at a bad step, a hang (of which rank 0 knows) and a restart or requeue"
    )
    log_samples: bool = key(False, "write the sample keys of every step into samples.jsonl of the run folder")
    share_samples: bool = key(False, "allow report text and images to leave the run folder")


@dataclass
class ValidationConfig:
    every_steps: int = key(0, "steps between validations while training; 0: see every_epochs", 0, 10**9)
    every_epochs: float = key(
        0.0, "epochs between validations; with every_steps too the longer of both; 0 and 0: none", 0, 10**6
    )
    split: str = key("valid", "split of the validation, with the view of evaluation")
    batch: int = key(
        64, "samples of one forward pass on a rank, which a contrastive loss compares", 1, 1 << 20
    )


@dataclass
class FinetuneConfig:
    run: str | None = key(
        None, "pre-training run or checkpoint whose network the task is trained on (medvlp finetune)"
    )
    start: Literal["trained", "untrained"] = key(
        "trained", "its weights, or those before its first step (the baseline)"
    )
    fraction: float = key(
        1.0, "share of the training patients, in (0, 1]; smaller ones are parts of larger", 1e-6, 1
    )


@dataclass
class EvaluationConfig:
    split: str = key("test", "split to evaluate on")
    batch: int = key(64, "images of one forward pass", 1, 1 << 20)
    bootstrap: int = key(1000, "resamples (by patient) of the 95 % intervals", 1, 10**6)
    seed: int = key(0, "seed of the bootstrap and of label fractions", 0, (1 << 32) - 1)
    shared_patients: bool = key(
        False, "true: learn and measure though a patient is in several of the splits (VQA-RAD as published)"
    )
    blank: Literal["auto", "exclude", "negative"] = key(
        "auto", "what an unknown label counts as; auto: negative for CheXpert's 14, else it is left out"
    )
    tasks: dict[str, Any] = key({}, "the keys of each task (see `medvlp evaluate --help`)")


@dataclass
class Config:
    """Everything a run depends on; `precision` is fp32, bf16 or fp16."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16", "fp16"] = key("bf16", "number format of the model; fp16 needs CUDA")
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    deepspeed: dict[str, Any] = key(
        {}, "merged over the generated DeepSpeed JSON, for anything not named here"
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    task: str | None = key(
        None, "downstream task that is trained (medvlp finetune); default: the method is pre-trained"
    )
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
