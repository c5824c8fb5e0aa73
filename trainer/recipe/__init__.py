"""The recipe: everything that defines a run, as typed dataclasses.

`tilewright.trainer.recipe.file` reads one from YAML, `tilewright.trainer.recipe.checks` refuses what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tilewright.model import ModelConfig
from tilewright.trainer.recipe.checks import check_recipe


@dataclass(frozen=True)
class Source:
    """One of several sources of tokens.

    Attributes:
        corpus, heldout: as in `Data`.
        weight: its share of the samples, relative to the others' weights: 0.7 beside 0.3, or 7 beside 3.
        name: what its held-out text is called in the metrics; by default the name of the folder. It also shuffles the
            source, so that it gives the same samples in the same order whatever it is mixed with.
    """

    corpus: str
    weight: float
    name: str = ""
    heldout: str = ""


@dataclass(frozen=True)
class LengthStage:
    """From the step after `step` others on, samples are cut to `length` tokens; see `tilewright.trainer.stages`."""

    step: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from: `corpus`, or several `sources` in fixed proportions.

    Attributes:
        corpus: folder that ``tilewright corpus build`` made, or one of token shards in datatrove's layout.
        sources: several such folders; all made with one tokenizer.
        tokenizer: for shards in datatrove's layout, the tokenizer.json that they were made with.
        end_of_text: for such shards, the token that ends a document.
        heldout: for such shards, the folder of others to evaluate on.
        sequence_length: tokens in a sample.
        sequence_length_stages: from which step on samples are cut into how long pieces, for a warm-up of the length;
            before the first of them, and with none, samples are whole. Each length divides `sequence_length`.
        across_documents: whether attention may cross from one packed document into the next.
        prefetch: steps whose batches are read ahead, in threads; 0 reads each when it is its turn.
    """

    corpus: str = ""
    sources: list[Source] = field(default_factory=list)
    tokenizer: str = ""
    end_of_text: str = "<|endoftext|>"
    heldout: str = ""
    sequence_length: int
    sequence_length_stages: list[LengthStage] = field(default_factory=list)
    across_documents: bool = False
    prefetch: int = 4

    def source_names(self) -> list[str]:
        """What each of `sources` is called."""
        return [source.name or Path(source.corpus).name for source in self.sources]


@dataclass(frozen=True)
class BatchStage:
    """From the step after `step` others on, a step takes `sequences` samples; see `tilewright.trainer.stages`."""

    step: int
    sequences: int


@dataclass(frozen=True)
class Batch:
    """How many samples make a step.

    Attributes:
        sequences: over all processes.
        micro_batch: how many a process takes at a time.
        stages: other numbers of sequences from later steps on, for a ramp of the batch.
    """

    sequences: int
    micro_batch: int
    stages: list[BatchStage] = field(default_factory=list)


@dataclass(frozen=True)
class ParameterGroup:
    """Options of the parameters that a rule matches.

    Attributes:
        match: regular expression, searched for in names such as ``blocks.3.mlp.down.weight``.
        learning_rate_factor: multiplies the learning rate.
        weight_decay: in place of what these parameters would get; None leaves that.
    """

    match: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Optimizer:
    """How gradients become steps; see `tilewright.trainer.optimization.optimizer`.

    Attributes:
        learning_rate: at the schedule's peak.
        kind: ``adamw`` (arXiv:1711.05101); ``muon`` for the matrices of the blocks and AdamW for the rest, at the same
            learning rate; ``sgd`` with momentum.
        implementation: of AdamW: ``torch``, fused; ``tilewright``, the kernel; ``apex``, NVIDIA's; ``auto`` is the
            kernel for averages in bfloat16, torch's for those in float32.
        state_dtype: of AdamW's two averages of the gradients, of which ``torch`` and ``apex`` have float32 alone.
            bfloat16 takes 4 bytes a parameter instead of 8; large models were trained so without a difference
            (DeepSeek-V3, arXiv:2412.19437, section 3.3). The weights stay float32; the second average is rounded
            stochastically, so that it falls as it should whatever beta2 is.
        betas, eps: of AdamW.
        momentum: of Muon and SGD.
        orthogonalisation_dtype: what Muon sends and orthogonalises matrices in.
        weight_decay: of matrices; norms, biases and embeddings have none unless a group says so. Decoupled, but for
            SGD, where it is added to the gradient.
        max_grad_norm: gradients are clipped to this global norm; 0 leaves them.
        groups: rules for parameters by name; the first that matches a name holds for it.
        ema_decay: of an average of the weights, kept in float32 beside them and evaluated at the end; 0 keeps none.
    """

    learning_rate: float
    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    implementation: Literal["auto", "torch", "tilewright", "apex"] = "auto"
    state_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    orthogonalisation_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    groups: list[ParameterGroup] = field(default_factory=list)
    ema_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Shape of the learning rate over the run; see `tilewright.trainer.optimization.schedule`.

    Attributes:
        kind: the curve after the warm-up.
        warmup_steps: of the beginning.
        decay_steps: of ``warmup_stable_decay``.
        final_fraction: of the learning rate, where a curve that falls ends.
        restarts: steps after which a new warm-up and curve begin, for continual training.
        restart_warmup_steps: of each restart; None takes `warmup_steps`.
        restart_peak: fraction of the learning rate that a restart warms up to.
    """

    kind: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1
    restarts: list[int] = field(default_factory=list)
    restart_warmup_steps: int | None = None
    restart_peak: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out text, scored before the first step, then every so many steps, then at the end on all of it.

    Attributes:
        every: steps between evaluations; 0 leaves only the first and the last.
        windows: samples in each but the last one; 0 takes all.
        stop_after: the run ends after so many evaluations in a row without a better held-out loss; 0: never.
        stop_margin: nats a token by which a loss must be lower than the best before it to count as better.
    """

    every: int = 0
    windows: int = 0
    stop_after: int = 0
    stop_margin: float = 0.0


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are taken and which of them stay.

    Attributes:
        every: steps between them; 0: only at the end or when stopped.
        keep: the newest so many stay.
        keep_every: those of a step that this divides stay for ever; 0: none do.
        keep_best: whether the one with the lowest held-out loss stays, of those whose step was evaluated.
        asynchronous: whether training goes on while one is written, for the price of a copy of the state in host
            memory: with AdamW 8 bytes × parameters ÷ the processes that they are sharded over, in each process.
        folder: in which they lie, under the name of the run directory: a local folder, or the URL of one in an object
            store that fsspec knows, such as ``s3://bucket/runs``, without keys; empty: in the run directory itself.
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0
    keep_best: bool = False
    asynchronous: bool = True
    folder: str = ""


@dataclass(frozen=True)
class Parallel:
    """How the processes share the model and the work of a step.

    Attributes:
        replicas: groups of processes that each hold a whole model, sharded over the group (HSDP); 1 shards one model
            over all processes (FSDP). More replicas take more memory and gather within a group alone.
        reshard_after_forward: whether a block's gathered weights are freed between its forward and its backward pass,
            which costs a second gather and saves the compute dtype's bytes × all parameters.
        reduce: when the gradients of a step with several micro-batches are reduced: ``last`` once a step, while each
            process adds up whole gradients in float32 (4 bytes × all parameters); ``every`` after each micro-batch,
            which sends that many times as much and keeps sharded gradients alone. Replicas are always reduced once.
        offload: whether weights, gradients and optimizer state live in host memory; for a GPU.
        prefetch: blocks whose weights are gathered ahead of the one that computes.
    """

    replicas: int = 1
    reshard_after_forward: bool = True
    reduce: Literal["last", "every"] = "last"
    offload: bool = False
    prefetch: int = 1


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Which activations of a block are kept for its backward pass, and which computed again.

    Attributes:
        mode: ``none`` keeps what autograd keeps; ``full`` the block's input alone; ``selective`` the results of the ops
            in `keep`; ``budget`` what a compiled block can keep within `budget`; ``auto`` is ``selective`` where blocks
            are compiled for a CPU, which is faster there, else ``none``.
        keep: ``matmul``, ``attention`` or another kernel, such as ``rms_norm``, where it runs as a kernel.
        budget: share of the memory that ``none`` would take, 0 to 1.
    """

    mode: Literal["auto", "none", "selective", "full", "budget"] = "auto"
    keep: list[str] = field(default_factory=lambda: ["matmul", "attention"])
    budget: float = 0.5


@dataclass(frozen=True)
class Health:
    """What is done about steps that go wrong; a step whose gradient is not finite is always skipped.

    Attributes:
        bad_steps: so many skipped in a row stop the run, or have it go back where `spike` is ``rollback``.
        spike: what to do about a spike of the loss: ``warn`` and go on; ``skip`` the step; ``rollback`` to the newest
            checkpoint and go on from there with the samples after the step's; or ``none``.
        rollbacks: so many to one checkpoint; where one more would be needed, the run stops.
        spike_score: how far above the median of the last losses a spike is, in robust standard deviations.
        spike_window: steps whose losses count; a quarter of them must be there before anything is a spike.
        hang_minutes: without a step, an evaluated batch or a piece of a checkpoint for so long, every process writes
            where it stands and ends; 0 never does.
        stop_seconds: the same once a signal has asked the run to stop; 0 leaves `hang_minutes`.
        slow_rank: a process for which the others of its shards wait longer than this share of a step is named; 0 names
            none.
    """

    bad_steps: int = 3
    spike: Literal["warn", "skip", "rollback", "none"] = "warn"
    rollbacks: int = 3
    spike_score: float = 10.0
    spike_window: int = 128
    hang_minutes: float = 60.0
    stop_seconds: float = 120.0
    slow_rank: float = 0.2


@dataclass(frozen=True)
class Tracking:
    """Where the figures of `metrics.jsonl` are sent to as well; see `tilewright.trainer.record.tracking`.

    Attributes:
        wandb: to Weights & Biases, which is told by its own variables, such as ``WANDB_MODE`` and ``WANDB_ENTITY``.
        mlflow: to MLflow, at ``MLFLOW_TRACKING_URI``.
        project: the project there, which MLflow calls an experiment.
    """

    wandb: bool = False
    mlflow: bool = False
    project: str = "tilewright"


@dataclass(frozen=True)
class Profile:
    """Steps to look into with PyTorch's profiler; see `tilewright.trainer.record.profiling`.

    Attributes:
        steps: counted from 1.
        memory: whether allocations are recorded too: in the trace and, on a GPU, in a snapshot that says from where.
        ranks: the processes that are profiled; none named: all of them.
    """

    steps: list[int] = field(default_factory=list)
    memory: bool = False
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """A continuation drawn at the end of the run; an empty prompt draws none."""

    prompt: str = ""
    tokens: int = 120
    temperature: float = 0.8
    top_k: int = 50


@dataclass(frozen=True)
class Recipe:
    """A run.

    Attributes:
        name: names the run directory.
        steps: optimizer steps.
        compute_dtype: of parameters and activations in the matrix products; masters and reductions are float32.
            float16 is for GPUs without bfloat16; its loss is scaled dynamically.
        float8: in which the blocks' matrices multiply, with one scale a tensor (``tensorwise``) or a row (``rowwise``);
            see `tilewright.trainer.parallel.float8`. It needs compute_dtype bfloat16, and is worth it compiled alone.
        compile: whether the blocks and the loss go through ``torch.compile``.
        seed: of the initial values and of the order of the samples.
        runs: folder of the run directories.
        run_directory: an exact run directory; without one the trainer goes on with this recipe's unfinished run in
            `runs`, or starts the next one there.
    """

    name: str
    model: ModelConfig
    data: Data
    batch: Batch
    steps: int
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    sample: Sample = field(default_factory=Sample)
    parallel: Parallel = field(default_factory=Parallel)
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    health: Health = field(default_factory=Health)
    tracking: Tracking = field(default_factory=Tracking)
    profile: Profile = field(default_factory=Profile)
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    compile: bool = True
    seed: int = 0
    runs: str = "runs"
    run_directory: str | None = None

    def __post_init__(self) -> None:
        check_recipe(self)

    def tokens_per_step(self) -> int:
        """Tokens that a step takes before any of `batch.stages`, over all processes."""
        return self.batch.sequences * self.data.sequence_length
