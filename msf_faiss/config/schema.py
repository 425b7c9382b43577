"""All settings of a run, one frozen model per section: types, defaults, descriptions, and rules between keys.

The string below a field is its description in the JSON Schema and the documentation. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from msf_faiss.config.base import AboveZero, Fraction, Memory, Positive, Section, broken_rule
from msf_faiss.config.data_schema import DataConfig, DemoData


class WeakView(Section):
    """Random resized crop and horizontal flip."""

    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Smallest and largest fraction of the image's area that a crop covers."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _check_crop_scale(self) -> WeakView:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise broken_rule(f"must be two numbers above 0 in ascending order, found [{low}, {high}]", "crop_scale")
        return self


class StrongView(WeakView):
    """The weak view, then colour jitter, grayscale and blur (MSF, ICCV 2021, section 4)."""

    jitter: Fraction = 0.8
    """Probability of the colour jitter: brightness, contrast, saturation and hue in random order."""
    brightness: Fraction = 0.4
    """The brightness is multiplied by a factor drawn from 1 - x to 1 + x."""
    contrast: Fraction = 0.4
    """The difference of each pixel to the view's mean grey is multiplied by a factor drawn from 1 - x to 1 + x."""
    saturation: Fraction = 0.4
    """The difference of each pixel to its own grey is multiplied by a factor drawn from 1 - x to 1 + x."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """The hue is shifted by a fraction of the colour wheel drawn from -x to x."""
    grayscale: Fraction = 0.2
    """Probability of conversion to grayscale."""
    blur: Fraction = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[AboveZero, AboveZero] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""

    @model_validator(mode="after")
    def _check_blur_sigma(self) -> StrongView:
        if self.blur_sigma[0] > self.blur_sigma[1]:
            raise broken_rule(f"must be two numbers in ascending order, found {list(self.blur_sigma)}", "blur_sigma")
        return self


class ViewsConfig(Section):
    """The two random views of a training image, and the centre view that evaluations use."""

    size: Annotated[int, Field(ge=8)] = 224
    """Height and width of a view, in pixels."""
    target: Literal["weak", "strong"] = "weak"
    """View of the target encoder, whose embeddings go into the bank. Together with `online: strong`, `weak` is the
    paper's w/s variant."""
    online: Literal["weak", "strong"] = "strong"
    """View of the online encoder."""
    weak: WeakView = WeakView()
    strong: StrongView = StrongView()
    eval_resize: Positive | None = None
    """Shorter side of an image before the centre crop of evaluations, in pixels. null: 8/7 of `size` from 96 px on (256
    for 224, as in the paper), and `size` below that."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue (from 0 to 1), which is subtracted; by default ImageNet's."""
    std: tuple[AboveZero, AboveZero, AboveZero] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue, by which they are divided; by default ImageNet's."""

    @property
    def resize(self) -> int:
        """Shorter side before the centre crop, in pixels."""
        if self.eval_resize is not None:
            return self.eval_resize
        return round(self.size * 8 / 7) if self.size >= 96 else self.size

    @model_validator(mode="after")
    def _check_eval_resize(self) -> ViewsConfig:
        if self.resize < self.size:
            problem = f"must be at least size ({self.size}), the side of the centre crop; found {self.eval_resize}"
            raise broken_rule(problem, "eval_resize", "size")
        return self


class TorchvisionBackbone(Section):
    """A ResNet of torchvision, randomly initialised."""

    kind: Literal["torchvision"] = "torchvision"
    name: Literal[
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ] = "resnet50"
    """Name of the network in torchvision."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers. "imagenet": torchvision's. "cifar": a 3×3 convolution of stride 1 and no max-pooling, for images of
    about 32 px."""


class NarrowBackbone(Section):
    """A small residual network of basic blocks, for training on a CPU."""

    kind: Literal["narrow"] = "narrow"
    width: Positive = 32
    """Channels of the stem and of the first stage; each further stage doubles them."""
    depths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1, 1)
    """Number of blocks in each stage."""
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)] = (2, 2, 2)
    """Stride of the first block in each stage."""

    @model_validator(mode="after")
    def _check_strides(self) -> NarrowBackbone:
        if len(self.depths) != len(self.strides):
            problem = f"must be as many as depths, one per stage; found {len(self.strides)} for {len(self.depths)}"
            raise broken_rule(problem, "strides", "depths")
        return self


BackboneConfig = Annotated[TorchvisionBackbone | NarrowBackbone, Field(discriminator="kind")]


class ModelConfig(Section):
    """The encoder's backbone and heads."""

    backbone: BackboneConfig = TorchvisionBackbone()
    hidden: Positive | None = None
    """Width of the heads' hidden layer. null: twice the backbone's features (4096 for ResNet-50)."""
    dim: Positive | None = None
    """Dimension of the embeddings. null: a quarter of the backbone's features (512 for ResNet-50), but at least 64."""
    predictor: bool = True
    """Whether the online encoder has a predictor, as in the paper. With `train.temperature` short runs learn faster
    without one (docs/log.md)."""


class RecallCheckConfig(Section):
    """The check of an approximate bank's recall: every so many steps, a few queries are also searched exactly."""

    every_steps: Positive = 100
    """Steps between two checks."""
    queries: Positive = 64
    """Queries in a check."""


class _RingConfig(Section):
    """Settings of every kind of bank."""

    capacity: Positive | Memory | Literal["dataset"] = 131_072
    """Number of embeddings in the bank; once it is full, new ones replace the oldest. Or the memory that the bank may
    take per rank, such as 8GiB. Or "dataset": one embedding per training image."""
    placement: Literal["replicated", "sharded"] = "replicated"
    """How several ranks store the bank. "replicated": each stores all of it. "sharded": each stores a part and searches
    it for all ranks, so that the bank may take the memory of all ranks together. The neighbours are the same."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the bank is stored and searched. "auto": on the training device. "cpu": in host memory, which is larger
    than a GPU's; the bank is then searched during the forward pass of the online encoder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the stored embeddings."""
    k: Positive = 5
    """Number of neighbours that a query is pulled to; the first is the target embedding of the same image. With 1 the
    loss is BYOL's."""
    max_age: Annotated[int, Field(ge=0)] | None = None
    """Age, in embeddings pushed since, beyond which an embedding is not retrieved any more. null: no limit."""

    @model_validator(mode="after")
    def _check_k(self) -> _RingConfig:
        if isinstance(self.capacity, int) and self.k > self.capacity:
            raise broken_rule(f"must be at most capacity ({self.capacity}), found {self.k}", "k", "capacity")
        if self.max_age is not None and self.k > self.max_age + 1:
            raise broken_rule(f"must be at most max_age + 1 ({self.max_age + 1}), found {self.k}", "k", "max_age")
        return self


class ReferenceBankConfig(_RingConfig):
    """Exact search in plain torch; slow, for tests."""

    kind: Literal["reference"] = "reference"


class FlatBankConfig(_RingConfig):
    """Exact search over the stored embeddings, without an index."""

    kind: Literal["flat"] = "flat"
    engine: Literal["auto", "faiss", "torch", "streams"] = "auto"
    """"faiss": FAISS's blocked search. "torch": tiled matrix products. "streams": FAISS on parts of the bank in
    parallel CUDA streams. "auto": the fastest of them for this bank on this machine, measured before the first
    step."""


class ScanBankConfig(_RingConfig):
    """Search by a scan of a compressed copy of the bank; the best candidates are compared exactly. Faster than `flat`
    from about 50,000 embeddings of 128 or more dimensions, and slower for small banks."""

    kind: Literal["scan"] = "scan"
    scan: Literal["bf16", "int8", "pq"] = "bf16"
    """Format of the copy. "bf16": results are proved exact. "int8": half of its memory and, with a million
    embeddings, time; almost always exact. "pq": a 24th of its memory and faster still, but inexact where embeddings are
    close together; CPU only."""
    min_recall: Fraction = 0.95
    """Recall that int8 and pq must reach in the recall checks. Below it they compare more candidates exactly, in the
    end all embeddings."""
    recall_check: RecallCheckConfig = RecallCheckConfig()


class IvfConfig(Section):
    """The inverted file (IVF) of an approximate bank."""

    lists: Positive | Literal["auto"] = "auto"
    """Number of inverted lists in each segment. "auto": about four times the square root of a segment's size."""
    probes: Positive | Literal["auto"] = "auto"
    """Number of lists that are searched for a query, to begin with; low recall raises it. "auto": measured when the
    lists are built."""
    segments: Positive = 1
    """1: one inverted file, whose centroids follow the encoder. More: the bank is divided into this many segments, each
    with its own centroids, which are fixed once the next segment begins; slower, but robust if the encoder changes
    fast."""


class IvfBankConfig(_RingConfig):
    """Approximate search by an inverted file that is updated at each push."""

    kind: Literal["ivf"] = "ivf"
    ivf: IvfConfig = IvfConfig()
    min_recall: Fraction = 0.95
    """Recall that the bank must reach in the recall checks. Below it, the bank searches more lists, then rebuilds them,
    and in the end searches exactly."""
    recall_check: RecallCheckConfig = RecallCheckConfig()


BankConfig = Annotated[
    FlatBankConfig | ScanBankConfig | IvfBankConfig | ReferenceBankConfig, Field(discriminator="kind")
]


class OptimizerConfig(Section):
    """SGD as in the paper, or LARS for large batches."""

    kind: Literal["sgd", "lars"] = "sgd"
    """"lars" (You et al., 2017): the update of each weight tensor is proportional to its norm, which keeps batches of
    thousands of images stable; needs the extra `lars`."""
    learning_rate: AboveZero = 0.05
    """Peak learning rate, for `train.batch_size` images or, if it is set, for `base_batch_size` images."""
    base_batch_size: Positive | None = None
    """Scale the learning rate by `train.batch_size` / `base_batch_size` (Goyal et al., 2017). null: do not scale it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the gradients (for that of the target encoder see `target.momentum`)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """With sgd it applies to all parameters (as in the authors' code); with lars not to biases and batch norms, whose
    updates are not made proportional to their norms either (as in BYOL and SimCLR)."""
    trust: AboveZero = 0.001
    """Trust coefficient of lars: norm of an update at learning rate 1, relative to the norm of the weight tensor."""
    schedule: Literal["epoch", "step", "constant"] = "epoch"
    """"epoch" (as in the paper) or "step": cosine decay to zero, updated once per epoch or per step. "constant": no
    decay."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Length of a linear warm-up from zero, in epochs (fractions allowed)."""

    def peak(self, batch_size: int) -> float:
        """Peak learning rate for `batch_size` images per step."""
        return self.learning_rate * (1 if self.base_batch_size is None else batch_size / self.base_batch_size)


class TargetConfig(Section):
    """The exponential moving average (EMA) by which the target encoder follows the online encoder."""

    momentum: Fraction = 0.99
    """EMA momentum at the first step."""
    final_momentum: Fraction | None = None
    """EMA momentum at the last step, approached on a cosine. null: constant momentum."""


class TrainConfig(Section):
    """Length, batch size, precision and device of a run."""

    epochs: Positive = 200
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step, of all ranks together. Images that do not fill the last batch of an epoch are left out, other
    ones in each epoch."""
    batch_norm: Literal["shuffle_bn", "sync"] = "shuffle_bn"
    """Batch statistics with several ranks. "shuffle_bn": of each rank's own images, where the images of the target
    encoder are shuffled across ranks (as in the authors' code). "sync": of the whole batch, as with one rank."""
    accumulate: Positive = 1
    """Number of micro-batches in a step, for batches that do not fit into memory at once. Each micro-batch has its own
    batch statistics."""
    max_steps: Positive | None = None
    """End after this many steps, without shortening the schedules. null: end after the last epoch."""
    temperature: AboveZero | None = None
    """Contrast the mean of a query's neighbours with those of the other images of the batch, in a softmax of this
    temperature (InfoNCE; with `bank.k: 1` the loss of MoCo v3). Short runs learn far more by it (docs/log.md). null:
    the paper's loss."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16": forward and backward passes under autocast; weights, loss and optimizer stay in float32."""
    compile: bool = False
    """Compile the networks with torch.compile: faster steps, but a minute or more before the first. On a CPU it needs a
    C++ compiler."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU if there is one, else the CPU."""
    threads: Positive | None = None
    """CPU threads of torch and FAISS. null: one per core."""
    log_every: Positive = 10
    """Steps between two reports on the terminal, in metrics.jsonl and in TensorBoard."""
    hang_seconds: AboveZero | None = None
    """End the process with exit code 75 (start again) if a step takes longer than this. null: never."""

    @model_validator(mode="after")
    def _check_accumulate(self) -> TrainConfig:
        if 2 * self.accumulate > self.batch_size:
            problem = (
                f"must be at most half of batch_size ({self.batch_size}), as a micro-batch needs two images;"
                f" found {self.accumulate}"
            )
            raise broken_rule(problem, "accumulate", "batch_size")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every_epochs: Positive = 10
    """Epochs between two checkpoints; the end of the run always writes one."""
    every_minutes: AboveZero | None = 30.0
    """Also write a checkpoint at the first step that is this many minutes after the last one. null: only after
    epochs."""
    background: bool = True
    """Write checkpoints while training continues, from a copy of the state in host memory. false: training waits, for a
    bank that fills most of the memory."""
    keep_last: Positive = 2
    """Number of the newest checkpoints that are kept, beside that of the best kNN accuracy."""
    keep_every_epochs: Positive | None = None
    """Also keep checkpoints whose epoch is a multiple of this. null: none."""


class KnnConfig(Section):
    """kNN evaluations during training; without labels there are none."""

    every_epochs: Positive | None = 10
    """Epochs between two evaluations; the last epoch is always evaluated. null: never evaluate."""
    k: Positive = 20
    """Number of neighbours that vote."""
    images: Positive = 10_000
    """Most training and most held-out images to use; of larger sets a fixed sample."""


class Config(Section):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights, the order of the images and the views."""
    data: DataConfig = DemoData()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    bank: BankConfig = FlatBankConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    target: TargetConfig = TargetConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    knn: KnnConfig = KnnConfig()

    @model_validator(mode="after")
    def _check_predictor(self) -> Config:
        if not self.model.predictor and self.train.temperature is None:
            problem = "false needs a train.temperature: without a predictor or a contrast, all embeddings become equal"
            raise broken_rule(problem, "model.predictor", "train.temperature")
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Config:
        warmup, epochs = self.optimizer.warmup_epochs, self.train.epochs
        if warmup >= epochs and self.optimizer.schedule != "constant":
            problem = f"must be below train.epochs ({epochs}) unless optimizer.schedule is constant, found {warmup}"
            raise broken_rule(problem, "optimizer.warmup_epochs", "train.epochs", "optimizer.schedule")
        return self
