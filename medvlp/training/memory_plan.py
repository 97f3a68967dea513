"""What a run will take of each GPU's memory, and how long it will last, before it waits in a queue for them.

Weights, gradients and optimiser state follow from the numbers of parameters and the ZeRO stage. What
passes hold besides is found by running them on fake tensors, which have shapes and no memory; so are their
floating-point operations.
"""

from dataclasses import dataclass, replace

from medvlp.config import Config
from medvlp.data.batch_sizes import BatchSizes, divide_batch
from medvlp.data.cache import open_reader
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Progress
from medvlp.methods.registry import build_method
from medvlp.training.deepspeed_config import deepspeed_json
from medvlp.training.memory_passes import Passes, measure_passes
from medvlp.training.operations import count_operations, example_batch
from medvlp.training.schedule import total_steps

GIB = 2**30
#: Bytes of a CUDA context with the kernels of cuBLAS, cuDNN and NCCL; share that fragments leave unused.
_CONTEXT, _FRAGMENTS = 1.2 * GIB, 0.05
#: Samples of the passes whose operations are counted.
_ROWS = 4
#: float32 matrices of a row of gathered candidates: logits, softmax and gradient, in two directions.
_LOGITS = 6
#: Bytes of a value by precision.
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Values of DeepSpeed's bucket of gradients, and of weights that stage 3 keeps gathered, unless told.
_BUCKET, _GATHERED = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU, and operations.

    Attributes:
        parameters, trained: of the method.
        weights, optimizer: bytes at the run's ZeRO stage.
        gathered: weights of other ranks that stage 3 holds from the forward to the backward pass.
        gradients: of a backward pass; they come while activations go. beside: those that have their place
            before activations go. earlier: those of the micro-batches before. accumulated: those that are
            always there, besides.
        fixed: context, and buckets of gradients on their way.
        passes: what forward and backward passes hold besides.
        candidates: bytes of a sample with each sample of the other GPUs in a global contrast.
        flops: of a training step, for each sample.
        gpus: ranks. micro_batch: the run's. share: samples of a step on each GPU.
        exact: whether several micro-batches have one loss.
        usable: bytes of a GPU that may be taken.
    """

    parameters: int
    trained: int
    weights: float
    gathered: float
    gradients: float
    beside: float
    earlier: float
    accumulated: float
    optimizer: float
    fixed: float
    passes: Passes
    candidates: float
    flops: float
    gpus: int
    micro_batch: int
    share: int
    exact: bool
    usable: float

    def total(self, micro_batch: int) -> float:
        """Bytes at the peak of a step with this micro-batch."""
        several = micro_batch < self.share
        if several and self.exact:
            passes = max(self.losses, self.again(micro_batch) + self.earlier)
        else:
            passes = self.passes.whole.at(micro_batch) + self.logits(micro_batch) + self.earlier * several
        return self.states + max(passes + self.beside, self.gradients)

    @property
    def states(self) -> float:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gathered + self.accumulated + self.optimizer + self.fixed

    def logits(self, samples: int) -> float:
        """Bytes of so many samples contrasted with as many on each other GPU."""
        return self.candidates * samples**2 * (self.gpus - 1)

    @property
    def losses(self) -> float:
        """Bytes of exact accumulation while heads and losses take all micro-batches of a step."""
        return self.passes.losses + self.logits(self.share)

    def again(self, micro_batch: int) -> float:
        """Bytes of exact accumulation while the encoders run again."""
        assert self.passes.encoders is not None
        return self.passes.kept + self.passes.encoders.at(micro_batch)

    @property
    def largest(self) -> int:
        """The largest micro-batch that fits; 0: none does."""
        whole = self.total(self.share) <= self.usable
        low, high = (self.share, 2 * self.share) if whole else (0, self.share)
        while self.total(high) <= self.usable:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= self.usable else (low, middle)
        return low

    @property
    def fits(self) -> bool:
        """Whether the run's own micro-batch does."""
        return self.total(self.micro_batch) <= self.usable

    def hours(self, samples: float, tflops: float, mfu: float) -> float:
        """Hours for so many samples at a share `mfu` of `tflops` (10^12 operations a second) on every GPU."""
        return self.flops * samples / (self.gpus * tflops * 1e12 * mfu) / 3600


def plan_run(config: Config, gpus: int, memory: float) -> tuple[MemoryPlan, int]:
    """The plan of a run on its dataset, of which index and tokenizer are read, and the samples it will see.

    Args:
        config: of the run. gpus: ranks. memory: GiB of a GPU.

    Raises:
        MedvlpError: batch and ranks do not fit, or dataset, tokenizer or encoders are not to be had here.
    """
    # Published weights need not be here: only their shapes count.
    image = replace(config.image, pretrained=False, weights=None)
    reader = open_reader(config.data)
    steps_per_epoch = max(1, reader.sample_count(config.data.split) // config.train.global_batch)
    samples = total_steps(config, steps_per_epoch) * config.train.global_batch
    tokenizer = Tokenizer.load(config.data.tokenizer, config.data.root)
    sizes = divide_batch(config, gpus)
    return plan_memory(replace(config, image=image), sizes, memory * GIB, tokenizer), samples


def refusal(plan: MemoryPlan) -> str | None:
    """Why a run will not fit its GPUs and what to change; None: it fits."""
    if plan.fits:
        return None
    need, have = plan.total(plan.micro_batch) / GIB, plan.usable / GIB
    if plan.largest:
        remedy = f"set train.micro_batch={plan.largest} or lower (a divisor of the global batch's share)"
    elif plan.exact and plan.states + plan.beside + plan.again(1) + plan.earlier <= plan.usable:
        remedy = (
            f"heads and losses of the {plan.share} samples of a GPU's step take {plan.losses / GIB:.1f} GiB "
            "at once (train.accumulate=exact): take more GPUs, a smaller train.global_batch, or "
            "train.accumulate=plain"
        )
    else:
        remedy = "not even one sample fits: raise zero.stage, take a smaller model or larger GPUs"
    return (
        f"micro-batches of {plan.micro_batch} need {need:.1f} GiB of each GPU, of which {have:.1f} GiB can "
        f"be used: {remedy}; image.gradient_checkpointing=true and text.gradient_checkpointing=true need "
        "less. `medvlp config --plan` has the list"
    )


def plan_memory(
    config: Config, sizes: BatchSizes, memory: float, tokenizer: Tokenizer, device: str = "cuda"
) -> MemoryPlan:
    """The plan of a run whose heaviest phase decides.

    Args:
        config: of the run. sizes: ranks and micro-batch.
        memory: bytes of a GPU. tokenizer: of the run.
        device: "cuda" (none is needed) or "cpu", which keeps other things for the backward pass.
    """
    method = build_method(config, tokenizer.vocab_size).train()
    method.prepare(tokenizer)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in method.parameters())
    # Phases come to use more of a method, never less.
    phases = len(config.optimizer.phases) or 1
    method.on_progress(Progress(0, phases, phases + 1, phases - 1))
    flops = count_operations(method, example_batch(config, _ROWS, config.data.max_tokens)) / _ROWS
    gpus, share = sizes.world_size, sizes.micro_batch * sizes.accumulation
    passes = measure_passes(method, config, share, device == "cuda")
    width, stage, half = _BYTES[config.precision], config.zero.stage, config.precision != "fp32"
    over = {
        part: gpus if stage >= first else 1 for part, first in (("states", 1), ("grads", 2), ("weights", 3))
    }
    # In 16 bit masters and two moments are float32; in float32 DeepSpeed keeps masters too from stage 1 on.
    states = 4 * (2 + (half or stage > 0)) * trained
    if config.optimizer.name == "sgd":
        states -= 4 * trained
    # Stage 3 has one buffer for them in every precision; in 16 bit the others accumulate in float32.
    always = half or stage == 3
    gradients = width * trained / over["grads"]
    zero = config.deepspeed.get("zero_optimization", {})
    return MemoryPlan(
        parameters=parameters,
        trained=trained,
        weights=width * parameters / over["weights"],
        gathered=width * min(parameters, zero.get("stage3_max_live_parameters", _GATHERED)) * (stage == 3),
        gradients=gradients,
        # Stages 1 and 2 make room for them when the backward pass begins.
        beside=gradients if stage in (1, 2) else 0.0,
        earlier=gradients if stage == 0 or not always else 0.0,
        accumulated=4 * trained / over["grads"] if always else 0.0,
        optimizer=0.0 if config.zero.offload_optimizer else states / over["states"],
        fixed=_CONTEXT + _buckets(config, sizes) if device == "cuda" else 0.0,
        passes=passes,
        candidates=4.0 * _LOGITS,
        flops=flops,
        gpus=gpus,
        micro_batch=sizes.micro_batch,
        share=share,
        exact=config.train.accumulate == "exact" and passes.encoders is not None,
        usable=memory * (1 - _FRAGMENTS),
    )


def _buckets(config: Config, sizes: BatchSizes) -> float:
    """Bytes of the buffers in which gradients travel; two where one travels while the other is filled."""
    zero = deepspeed_json(config, sizes, "cuda")["zero_optimization"]
    if not zero["stage"] or not zero.get("contiguous_gradients", True):
        return 0.0
    number = 2 if zero["stage"] < 3 and zero.get("overlap_comm") else 1
    return float(number * zero.get("reduce_bucket_size", _BUCKET) * _BYTES[config.precision])


def describe(
    plan: MemoryPlan, config: Config, samples: float, tflops: float, mfu: float
) -> list[tuple[str, str]]:
    """The plan as lines of a table: what, and how much."""

    def gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"

    batch, share = plan.micro_batch, plan.share
    lines = [
        ("parameters", f"{plan.parameters / 1e6:.1f} M, {plan.trained / 1e6:.1f} M trained"),
        ("weights", gib(plan.weights)),
        ("weights gathered for the passes", gib(plan.gathered)),
        ("gradients, while activations go", gib(plan.gradients)),
        ("those with a place of their own", gib(plan.beside + plan.earlier * (batch < share))),
        ("gradients, always there", gib(plan.accumulated)),
        (f"optimizer (ZeRO {config.zero.stage}, {plan.gpus} GPUs)", gib(plan.optimizer)),
        ("context and buckets", gib(plan.fixed)),
    ]
    if plan.exact and batch < share:
        each = plan.passes.encoders.per_sample if plan.passes.encoders is not None else 0.0
        lines += [
            (f"heads, losses of {share} samples at once", gib(plan.losses)),
            (f"or then: encoders on {batch} samples", f"{gib(plan.again(batch))} ({each / 2**20:.1f} MiB each"
             f" and {plan.passes.kept / share / 2**20:.2f} MiB of each of {share})"),
        ]  # fmt: skip
    else:
        each = plan.passes.whole.per_sample
        lines += [
            (f"activations of {batch} samples", f"{gib(plan.passes.whole.at(batch))} ({each / 2**20:.1f} MiB "
             "each)"),
            ("logits with other GPUs", gib(plan.logits(batch))),
        ]  # fmt: skip
    hours, size = plan.hours(samples, tflops, mfu), config.train.global_batch
    steps = samples / size
    return [
        *lines,
        (
            "sum, of each GPU",
            f"{gib(plan.total(batch))} of {gib(plan.usable)}{'' if plan.fits else ': DOES NOT FIT'}",
        ),
        ("largest micro-batch", str(plan.largest) if plan.largest else "none: not even one sample fits"),
        ("operations of a sample", f"{plan.flops / 1e9:.1f} GFLOP forward and backward"),
        (
            f"time at {100 * mfu:.0f} % of {tflops:g} TFLOP/s",
            f"{hours:.1f} h for {steps:,.0f} steps of {size} samples",
        ),
    ]
