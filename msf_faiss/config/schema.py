"""The configuration of a run: frozen models, one per section, with every default in one place.

YAML files hold only what differs from these defaults; `config_file` reads and writes them. Nothing here imports torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no user of that name: a file that begins with ~
        return path


_MEMORY = r"^\d+(\.\d+)?(MiB|GiB|TiB|MB|GB|TB)$"


def _amount_of_memory(value: object) -> object:
    if isinstance(value, str) and re.match(_MEMORY, value):
        return value
    raise PydanticCustomError("memory", "an amount of memory, as in 8GiB")


UserPath = Annotated[Path, AfterValidator(_expand_home)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Memory = Annotated[str, Field(pattern=_MEMORY), BeforeValidator(_amount_of_memory)]
View = Literal["weak", "strong"]


class Section(BaseModel):
    """Base of all sections: immutable, and a key that does not exist is an error rather than ignored.

    The rules between keys word their errors as `key: what is wrong`, and name every other key that has a part in it:
    `config_draft` finds the place in the file from that.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class SourceConfig(Section):
    """What every kind of data has in common."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that decode images and make views. "auto": one a core, at most 16; but none for images held in memory,
    unless a GPU trains on views from 96 px on, which must not wait for them to be cut."""
    cache: Literal["auto", "none", "memory"] = "auto"
    """Whether images are decoded once, before the first step, and held in memory (of each rank). "auto": if they take
    no more than an eighth of what is free. The views are the same."""
    unreadable: Literal["error", "skip"] = "error"
    """What an image that cannot be decoded does: end the run, or be left out and counted."""
    unreadable_limit: Annotated[int, Field(ge=0)] = 100
    """With `unreadable: skip`, the most images that may be left out before the run ends all the same."""


class DemoData(SourceConfig):
    """The built-in images: ten kinds of drawn textures. Nothing to download."""

    kind: Literal["demo"] = "demo"
    images: Annotated[int, Field(ge=10)] = 4_000
    """Training images."""
    test_images: Annotated[int, Field(ge=10)] = 1_000
    """Held-out images, drawn from another part of the same sequence."""
    size: Annotated[int, Field(ge=8)] = 32
    """Height and width, in pixels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawing; independent of the run's seed, so that runs share their images."""


class CachedSource(SourceConfig):
    """Data that are slow to open the first time: what opening them found is kept."""

    cache_dir: UserPath | None = None
    """Where that is kept: lists of large folders, unpacked Parquet files, indices of tar files. null: `msf-faiss` in
    the user's cache folder."""


class FolderData(CachedSource):
    """Image files below a folder: one subfolder a class, or any tree of unlabelled images."""

    kind: Literal["folder"] = "folder"
    path: UserPath
    """Folder with the training images."""
    test_path: UserPath | None = None
    """Folder with held-out images for the evaluations; without it they leave one out of the training images."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """"folders": the first folder level names the class. "auto": so if every image lies exactly one level deep."""


class ParquetData(CachedSource):
    """Parquet in the Hugging Face convention: `image{bytes, path}` and, if there is one, an integer label."""

    kind: Literal["parquet"] = "parquet"
    path: UserPath
    """A file, or a folder of shards (read in the order of their names)."""
    test_path: UserPath | None = None
    """The same for held-out images."""
    image_column: str = "image"
    """Name of the struct column with the encoded images."""
    label_column: str | None = "label"
    """Name of the integer column; a file without it is unlabelled. null: leave labels out."""


class WebDatasetData(CachedSource):
    """Tar files in the WebDataset convention: a sample is what follows one another under the same name but for the
    endings, as in 0001.jpg and 0001.cls. They must be local and not compressed."""

    kind: Literal["webdataset"] = "webdataset"
    path: UserPath
    """A tar file, a folder of *.tar (read in the order of their names), or a pattern as in train-{0000..0146}.tar."""
    test_path: UserPath | None = None
    """The same for held-out images."""
    image_keys: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "jpg",
        "jpeg",
        "png",
        "webp",
        "bmp",
        "ppm",
        "pgm",
        "tif",
        "tiff",
    )
    """Endings of images; of several in a sample, the first in this order. Samples without any are left out."""
    label_key: str | None = "cls"
    """Ending of the file with the number of the class; samples without it are unlabelled. null: leave labels out."""
    class_names: UserPath | None = None
    """Text file with the names of the classes, one a line. null: their numbers."""


class HuggingFaceData(SourceConfig):
    """What Hugging Face `datasets` opens."""

    kind: Literal["huggingface"] = "huggingface"
    path: UserPath
    """A folder (from `save_to_disk`, or with images or Parquet files), or a name on the hub, as in ylecun/mnist."""
    name: str | None = None
    """Configuration of the data set, where it has several. null: its default."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit pins the data. null: the newest."""
    split: str = "train"
    """Training images; parts are written as in train[:80%]."""
    test_split: str | None = None
    """Held-out images for the evaluations. null: none."""
    image_column: str = "image"
    """Name of the column with the images."""
    label_column: str | None = "label"
    """Name of the column with the classes; a data set without it is unlabelled. null: leave labels out."""
    cache_dir: UserPath | None = None
    """Where `datasets` keeps downloads and what it makes of files. null: its own cache folder (HF_HOME)."""


class TorchvisionData(SourceConfig):
    """A data set that torchvision knows how to download."""

    kind: Literal["cifar10", "cifar100", "stl10"]
    root: Annotated[UserPath, Field(validate_default=False)] = Path("data")  # a Path is no JSON: see config_draft
    """Folder that holds the data set, or will after the download."""
    download: bool = True
    """Fetch what is missing. false: a missing data set is an error."""


DataConfig = Annotated[
    DemoData | FolderData | ParquetData | WebDatasetData | HuggingFaceData | TorchvisionData,
    Field(discriminator="kind"),
]


class WeakView(Section):
    """Random resized crop and flip."""

    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    flip: Share = 0.5
    """Probability of a left-right flip."""

    @model_validator(mode="after")
    def _ordered(self) -> WeakView:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(
                f"crop_scale: must be two shares, the first above 0 and not above the second; found [{low}, {high}]"
            )
        return self


class StrongView(WeakView):
    """The weak view, then colour jitter, grayscale and blur (the paper's, section 4)."""

    jitter: Share = 0.8
    """Probability of the colour jitter."""
    brightness: Share = 0.4
    """The factor is drawn from 1 - x to 1 + x; so are those of contrast and saturation."""
    contrast: Share = 0.4
    """Distance of each pixel from the view's mean grey."""
    saturation: Share = 0.4
    """Distance of each pixel from its own grey."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """The shift is drawn from -x to x, in turns of the colour wheel."""
    grayscale: Share = 0.2
    """Probability of grey."""
    blur: Share = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""

    @model_validator(mode="after")
    def _blur_ordered(self) -> StrongView:
        if self.blur_sigma[0] > self.blur_sigma[1]:
            raise ValueError(f"blur_sigma: the first must not be above the second, found {list(self.blur_sigma)}")
        return self


class ViewsConfig(Section):
    """The two random views of an image, and the one that evaluations see."""

    size: Annotated[int, Field(ge=8)] = 224
    """Height and width of a view, in pixels."""
    target: View = "weak"
    """The view that the target encoder embeds and the bank holds. weak here and strong below is the paper's w/s."""
    online: View = "strong"
    """The view that the online encoder embeds."""
    weak: WeakView = WeakView()
    strong: StrongView = StrongView()
    eval_resize: Positive | None = None
    """Shorter side before the centre crop of the evaluations, in pixels. null: size from 96 px on 8/7 of it (256 for
    224, as in the paper), below that size itself."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel (0 to 1); ImageNet's by default."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        0.229,
        0.224,
        0.225,
    )
    """Each channel is divided by it."""

    @property
    def resize(self) -> int:
        """Shorter side before the centre crop, in pixels."""
        if self.eval_resize is not None:
            return self.eval_resize
        return round(self.size * 8 / 7) if self.size >= 96 else self.size

    @model_validator(mode="after")
    def _crop_fits(self) -> ViewsConfig:
        if self.resize < self.size:
            raise ValueError(
                f"eval_resize: must be at least size ({self.size}), since the centre crop is cut out of it; "
                f"found {self.eval_resize}"
            )
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
    """The network, as torchvision spells it."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """"cifar": a 3×3 convolution of stride 1 and no max-pooling, for images of about 32 px."""


class NarrowBackbone(Section):
    """A residual net of basic blocks whose width and depth fit a CPU."""

    kind: Literal["narrow"] = "narrow"
    width: Positive = 32
    """Channels of the stem and the first stage; every further stage doubles them."""
    depths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1, 1)
    """Blocks in each stage."""
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)] = (2, 2, 2)
    """Stride of each stage's first block."""

    @model_validator(mode="after")
    def _one_stride_a_stage(self) -> NarrowBackbone:
        if len(self.depths) != len(self.strides):
            raise ValueError(
                f"strides: must be as many as depths, one a stage; found {len(self.strides)} for {len(self.depths)}"
            )
        return self


BackboneConfig = Annotated[TorchvisionBackbone | NarrowBackbone, Field(discriminator="kind")]


class ModelConfig(Section):
    """Encoder and heads (design 1)."""

    backbone: BackboneConfig = TorchvisionBackbone()
    hidden: Positive | None = None
    """Width of the heads' hidden layer. null: twice the backbone's features (4096 for ResNet-50)."""
    dim: Positive | None = None
    """Dimension of the embeddings in the bank. null: a quarter of the features (512 for ResNet-50)."""


class RecallCheckConfig(Section):
    """The check of an approximate bank's recall: every so many steps, a few queries are also searched exactly."""

    every_steps: Positive = 100
    """Steps between two checks."""
    queries: Positive = 64
    """Queries in a check."""


class RingConfig(Section):
    """What every kind of bank has in common."""

    capacity: Positive | Memory | Literal["dataset"] = 131_072
    """Entries (the oldest give way); or the memory they may take with all that finds them, as in 8GiB, of each rank; or
    "dataset", one an image."""
    placement: Literal["replicated", "sharded"] = "replicated"
    """Where several ranks train together. replicated: each holds all entries. sharded: each holds its part of them and
    searches it for all, so that a bank may be as large as the memory of all ranks. The neighbours are the same."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the entries are and are searched. auto: where the networks are. cpu: in host memory, of which there is more
    than of a GPU's; the search then goes on beside the online encoder's forward."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Storage of an entry."""
    k: Positive = 5
    """Neighbours that each query is pulled to; its own target embedding is the first of them. 1 is BYOL's loss."""
    max_age: Annotated[int, Field(ge=0)] | None = None
    """Entries after which so many others were pushed are no longer found. null: found until they give way."""

    @model_validator(mode="after")
    def _k_fits(self) -> RingConfig:
        if isinstance(self.capacity, int) and self.k > self.capacity:
            raise ValueError(f"k: must be at most capacity ({self.capacity}), found {self.k}")
        if self.max_age is not None and self.k > self.max_age + 1:
            raise ValueError(f"k: must be at most max_age + 1 ({self.max_age + 1}), found {self.k}")
        return self


class ReferenceBankConfig(RingConfig):
    """Exact, in plain torch, slow; for checks."""

    kind: Literal["reference"] = "reference"


class FlatBankConfig(RingConfig):
    """Exact search over the ring in place, with nothing kept beside it."""

    kind: Literal["flat"] = "flat"
    engine: Literal["auto", "faiss", "torch", "streams"] = "auto"
    """faiss: its blocked search. torch: tiled matrix products. streams: FAISS over parts of the ring at a time (CUDA).
    auto: whichever is fastest here for this bank, timed before the first step."""


class ScanBankConfig(RingConfig):
    """A compressed copy of the ring is scanned, and the best of it compared exactly."""

    kind: Literal["scan"] = "scan"
    scan: Literal["bf16", "int8", "pq"] = "bf16"
    """The copy. bf16: every answer is proved exact. int8: half of that memory and time, hardly ever wrong. pq: a 24th
    of the memory and faster still, but wrong where embeddings lie close together; CPU only."""
    min_recall: Share = 0.95
    """Recall that int8 and pq must keep in their checks; below it they compare more entries, in the end all."""
    recall_check: RecallCheckConfig = RecallCheckConfig()


class IvfConfig(Section):
    """The inverted file of an approximate bank."""

    lists: Positive | Literal["auto"] = "auto"
    """Lists that each segment's entries are divided into. "auto": about four times the root of their number."""
    probes: Positive | Literal["auto"] = "auto"
    """Lists that a query looks into, at first; min_recall may raise it. "auto": measured when the lists are made."""
    segments: Positive = 1
    """1: one inverted file whose centroids follow the encoder. More: the bank is divided into so many parts, each with
    centroids of its own, which stay as they are when the next part begins; slower, and safe where the encoder changes
    fast."""


class IvfBankConfig(RingConfig):
    """Approximate search by an inverted file that follows the ring entry by entry."""

    kind: Literal["ivf"] = "ivf"
    ivf: IvfConfig = IvfConfig()
    min_recall: Share = 0.95
    """Recall that the bank must keep in its checks; below it more lists are probed, the lists are made anew, and in the
    end all entries compared."""
    recall_check: RecallCheckConfig = RecallCheckConfig()


BankConfig = Annotated[
    FlatBankConfig | ScanBankConfig | IvfBankConfig | ReferenceBankConfig, Field(discriminator="kind")
]


class OptimizerConfig(Section):
    """SGD with the paper's recipe, or LARS for large batches."""

    kind: Literal["sgd", "lars"] = "sgd"
    """lars (You et al. 2017): a step of each weight tensor is proportional to its norm, which keeps batches of
    thousands stable; needs the extra `lars`."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    """Peak learning rate, for the batch size in `train` or for `base_batch_size`."""
    base_batch_size: Positive | None = None
    """The learning rate is one for so many images a step, and is scaled in proportion to `train.batch_size` (Goyal et
    al. 2017). null: it is not scaled."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the gradients; not the target's."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """sgd: on all parameters, those of batch norms included (the authors' code). lars: not on those of batch norms and
    on biases, whose steps are not made proportional either (as BYOL and SimCLR do)."""
    trust: Annotated[float, Field(gt=0)] = 0.001
    """lars: length of a step at a learning rate of 1, in norms of the weight tensor."""
    schedule: Literal["epoch", "step", "constant"] = "epoch"
    """Cosine to zero that moves once an epoch (the paper's) or every step; or none."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear rise from zero before the cosine, in epochs (fractions allowed)."""

    def peak(self, batch_size: int) -> float:
        """Peak learning rate for `batch_size` images a step."""
        return self.learning_rate * (1 if self.base_batch_size is None else batch_size / self.base_batch_size)


class TargetConfig(Section):
    """How the target encoder follows the online encoder."""

    momentum: Share = 0.99
    """EMA momentum at the first step."""
    final_momentum: Share | None = None
    """EMA momentum at the last step, reached on a cosine. null: constant."""


class TrainConfig(Section):
    """Length, batch and arithmetic of the run."""

    epochs: Positive = 200
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images a step, of all ranks together; an incomplete last batch of an epoch is left out (another part of the data
    each epoch)."""
    batch_norm: Literal["shuffle_bn", "sync"] = "shuffle_bn"
    """Batch statistics where several ranks train together. shuffle_bn: of each rank's own images, and the target
    encoder's images are shuffled across the ranks (the authors' code). sync: of the whole batch, as on one rank."""
    accumulate: Positive = 1
    """Parts that a step's images go through the networks in, one after the other, where they do not fit into memory
    together. One step all the same; batch statistics are each part's own."""
    max_steps: Positive | None = None
    """End after so many steps, with the schedules as they are. null: after the last epoch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward and backward under autocast; weights, losses and the optimizer stay float32."""
    compile: bool = False
    """Have torch.compile write kernels for the networks: faster steps after a start of a minute or more. Needs a C++
    compiler on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    threads: Positive | None = None
    """CPU threads of torch and FAISS. null: one a core."""
    log_every: Positive = 10
    """Steps between two reports (progress, metrics.jsonl, TensorBoard)."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = None
    """End the process, with the exit code that asks for a new start, if a step takes longer than this. null: never."""

    @model_validator(mode="after")
    def _parts_have_statistics(self) -> TrainConfig:
        if 2 * self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: must be at most half of batch_size ({self.batch_size}), since a part needs two images; "
                f"found {self.accumulate}"
            )
        return self


class CheckpointConfig(Section):
    """When the run is saved and what is kept."""

    every_epochs: Positive = 10
    """Epochs between two checkpoints; the end of the run always makes one."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Minutes after which the run is saved in between too, at the next step. null: only after epochs."""
    background: bool = True
    """Write while training goes on, from a copy of the state (in host memory, while it is written). false: write from
    the state itself while training waits; for a bank that fills most of the memory."""
    keep_last: Positive = 2
    """Newest checkpoints that are kept."""
    keep_every_epochs: Positive | None = None
    """Also keep each checkpoint whose epoch is a multiple of this. null: none."""


class KnnConfig(Section):
    """The kNN evaluation during training; only where there are labels."""

    every_epochs: Positive | None = 10
    """Epochs between two evaluations; the last epoch is always evaluated. null: never."""
    k: Positive = 20
    """Neighbours that vote."""
    images: Positive = 10_000
    """Most images to use of the training and of the test set each; a fixed sample of larger ones."""


class Config(Section):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights, the order of the data and the views."""
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
    def _warmup_ends(self) -> Config:
        if self.optimizer.warmup_epochs >= self.train.epochs and self.optimizer.schedule != "constant":
            warmup, epochs = self.optimizer.warmup_epochs, self.train.epochs
            raise ValueError(
                f"optimizer.warmup_epochs: must be below train.epochs ({epochs}) "
                f"unless optimizer.schedule is constant, found {warmup}"
            )
        return self
