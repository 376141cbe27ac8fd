"""Configuration of the jobs: frozen, validated dataclasses. Recipes set the values; flags override them."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

DEFAULT_STORAGE = "~/nsl_dist"
MOST_NEIGHBOURS = 1000  # per query in jobs/search.py
REENCODED_QUALITY = 95  # of images that jobs/prepare_shards.py --max-edge makes smaller; JPEG, 4:2:0
Layout = Literal["sop", "inshop", "cub200", "cars196", "folders"]
SplitBy = Literal["classes", "images"]
# What the classes of the test images are, by how the images were split.
TEST_CLASSES: dict[SplitBy, str] = {
    "classes": "unseen classes",
    "images": "classes that training has seen other images of",
}
Kind = Literal["float", "binary"]  # of embeddings: unit vectors, or the signs of their coordinates


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class FolderSplit:
    """How the images of class folders are split into training and test; published data sets have a split of their own.

    Attributes:
        by: "classes": the classes of one are unseen in the other; "images": both have all classes.
        test_share: share of the classes, or of each class's images, that is for test.
        test_classes: file with the names of the test classes, one a line; None: they are drawn, always the same ones.

    """

    by: SplitBy = "classes"
    test_share: float = 0.5
    test_classes: str | None = None

    def __post_init__(self) -> None:
        _require(0 < self.test_share < 1, f"--data.test-share {self.test_share} must be between 0 and 1")
        _require(
            self.test_classes is None or self.by == "classes",
            "--data.test-classes does not go with --data.split images, in which all classes are trained on",
        )


BY_CLASSES = FolderSplit()  # the default


@dataclass(frozen=True)
class DataConfig:
    """Images, augmentation and batches."""

    root: str | None = None
    """Folder or URI of a raw data set (sharded once into --storage, cached by digest) or of shards written by
    jobs/prepare_shards.py. If None, built-in synthetic products are used."""
    layout: Layout | None = None
    """Layout of the data set: Stanford Online Products, In-Shop, CUB-200-2011, CARS196, or one folder of images per
    class. If None, it is detected from the files."""
    split: SplitBy = "classes"
    """How class folders are split: by classes, so that those of the test are unseen in training, or, where there are
    few, by the images of each class."""
    test_share: float = 0.5
    """Share of the class folders, or with --data.split images of each one's images, that is for test. They are drawn at
    random, but always the same ones."""
    test_classes: str | None = None
    """File with the class folders for test, one a line, instead of drawing them."""
    batch_size: int = 80
    """Images in a global batch, summed over all workers."""
    fit_batch: bool = True
    """Make the recipe's batch smaller where there are too few training classes for it. Giving --data.batch-size or
    --data.images-per-class turns this off."""
    images_per_class: int | None = 5
    """Images per class in a batch, drawn with replacement; a batch has batch-size / images-per-class distinct classes.
    If None, a batch is distinct images of any class."""
    image_size: int = 64
    """Width and height of the model's input, in pixels."""
    crop_ratio: float = 0.875
    """Input size divided by the size that images are resized to before cropping (aspect ratio is ignored); 224 / 256 in
    the paper."""
    crop_area: float | None = None
    """Smallest area of a random resized crop, as a fraction of the image; the aspect ratio is drawn from 3/4 to 4/3. If
    None, training crops have a fixed size given by --data.crop-ratio, as in the paper."""
    flip: bool = True
    """Flip training images horizontally with probability 0.5."""
    rotation: float = 0.0
    """Maximum random rotation of training images, in degrees either way."""
    scale: float = 0.0
    """Maximum random change of scale of training images, as a fraction either way."""
    shear: float = 0.0
    """Maximum random shear of training images, in degrees either way."""
    max_undecodable: float = 0.01
    """Fraction of the images that may fail to decode while a raw folder is sharded; unless it is 0, a few may always.
    They are listed and skipped."""
    max_damaged_shards: int = 0
    """Number of shards that may turn out damaged or missing during a run. Workers restart without the classes of such a
    shard, which counts towards --max-failures."""

    def __post_init__(self) -> None:
        _require(self.max_damaged_shards >= 0, f"--data.max-damaged-shards {self.max_damaged_shards} must be >= 0")
        multiple = self.images_per_class or 1
        _require(multiple >= 1, f"--data.images-per-class {multiple} must be at least 1")
        _require(
            self.batch_size > 0 and self.batch_size % multiple == 0,
            f"--data.batch-size {self.batch_size} is not a positive multiple of --data.images-per-class {multiple}",
        )
        _require(self.image_size >= 8, f"--data.image-size {self.image_size} must be at least 8 pixels")
        _require(0 < self.crop_ratio <= 1, f"--data.crop-ratio {self.crop_ratio} must be in (0, 1]")
        _require(
            self.crop_area is None or 0 < self.crop_area <= 1, f"--data.crop-area {self.crop_area} must be in (0, 1]"
        )
        _require(0 <= self.scale < 1, f"--data.scale {self.scale} must be in [0, 1)")
        _require(0 <= self.rotation <= 180, f"--data.rotation {self.rotation} must be in [0, 180] degrees")
        _require(0 <= self.shear <= 45, f"--data.shear {self.shear} must be in [0, 45] degrees")
        _require(0 <= self.max_undecodable <= 1, f"--data.max-undecodable {self.max_undecodable} must be in [0, 1]")
        _ = self.folder_split  # is checked

    @property
    def folder_split(self) -> FolderSplit:
        """How class folders are split."""
        return FolderSplit(self.split, self.test_share, self.test_classes)

    @property
    def resized_edge(self) -> int:
        """Width and height that images are resized to before cropping, in pixels."""
        return round(self.image_size / self.crop_ratio)


@dataclass(frozen=True)
class ModelConfig:
    """The embedding model: backbone, pooling, neck, linear layer, L2 normalisation."""

    backbone: str = "resnet18"
    """Name of a torchvision classification model whose last layer is linear, or, with the extra `timm`, of any timm
    model: timm/vit_base_patch16_224."""
    weights: str | None = None
    """Weights to start from: a torchvision name (IMAGENET1K_V1, DEFAULT, ...), DEFAULT for a timm model, packaged for
    those of timm/tf_efficientnet_lite0, 1 and 2 that come with the extra `pretrained`, a state_dict file (.pth or
    .safetensors), or the folder of a run, whose best model is taken. If None, weights are random."""
    pooling: Literal["max", "gem"] | None = None
    """Replacement for the mean over the last feature map: its maximum, or a generalised mean (GeM) with a learned
    exponent. If None, the backbone keeps its own pooling."""
    neck: Literal["layer_norm", "batch_norm"] | None = "layer_norm"
    """Normalisation of the pooled features, without learned scale and bias: layer_norm, as in the paper, or batch_norm.
    If None, features are not normalised."""
    dim: int = 128
    """Embedding dimensions. The linear layer is omitted if this equals the backbone's feature width."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Statistics of the backbone's batch norm: of each worker's images (local), of the global batch (sync, GPUs only),
    or fixed running statistics (frozen)."""

    def __post_init__(self) -> None:
        _require(self.dim >= 1, f"--model.dim {self.dim} must be at least 1")


@dataclass(frozen=True)
class ProxyConfig:
    """The class-proxy matrix and the loss."""

    sample_rate: float = 1.0
    """Fraction of the classes sampled in each iteration, in (0, 1]. Classes of the batch are always included."""
    num_sampled: int | None = None
    """Number of classes sampled in each iteration, over all workers. If None, --proxies.sample-rate applies."""
    correct_sampling: bool = False
    """Weight sampled negative classes in the softmax so that the expected normaliser equals that over all classes."""
    temperature: float = 0.05
    """Temperature (sigma in the paper) of the Normalized Softmax Loss; one over the scale s of ArcFace and CosFace, so
    that s = 64 is 0.015625."""
    margin: float = 0.0
    """Margin by which an image must be nearer to its own class than to others, in the unit of --proxies.margin-kind."""
    margin_kind: Literal["cosine", "angular"] = "cosine"
    """cosine: the margin is subtracted from the cosine similarity (CosFace). angular: it is added to the angle, in
    radians (ArcFace)."""
    per_class: int = 1
    """Proxies of each class, of which the nearest to an image counts (sub-centres)."""
    filter_above: float | None = None
    """Leave classes out of an image's loss if their cosine similarity to it is above this: the image may be of such a
    class, under a wrong label. Its own class always counts."""
    label_smoothing: float = 0.0
    """Fraction of each label that is spread evenly over all classes."""
    optimizer: Literal["sgd", "adagrad"] = "sgd"
    """sgd is equivalent to dense SGD with momentum and weight decay over the whole matrix. adagrad is row-wise, with
    one number of state per proxy instead of a second matrix."""
    lr_scale: float = 1.0
    """Learning rate of the proxies, relative to the backbone's."""
    weight_decay: float | None = None
    """Weight decay of the proxies. If None, --optim.weight-decay."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of proxies and momentum; bfloat16 uses stochastic rounding. The loss is always float32."""
    matmul: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Type that the inputs of the loss's matrix products are rounded to; their sums are float32. auto: tf32 on GPUs,
    float32 on CPUs, where the others only take effect if the CPU has them."""
    placement: Literal["device", "host", "disk"] = "device"
    """Where the matrix is stored: with the model, in host memory (only sampled rows are copied to the GPU), or in a
    memory-mapped file."""
    directory: str | None = None
    """Folder on each worker for the file of --proxies.placement disk. If None, the system's temporary folder."""
    memory: float = 1.0
    """GiB of proxies and logits to keep between forward and backward pass. If they need more, they are computed twice,
    in chunks."""

    def __post_init__(self) -> None:
        _require(0 < self.sample_rate <= 1, f"--proxies.sample-rate {self.sample_rate} must be in (0, 1]; 1 is all")
        _require(
            self.num_sampled is None or self.num_sampled >= 1, f"--proxies.num-sampled {self.num_sampled} must be >= 1"
        )
        _require(
            self.temperature >= 0.0137, f"--proxies.temperature {self.temperature} must be at least 0.0137 (float32)"
        )
        _require(0 <= self.label_smoothing < 1, f"--proxies.label-smoothing {self.label_smoothing} must be in [0, 1)")
        most = 1.0 if self.margin_kind == "cosine" else math.pi / 2
        _require(
            0 <= self.margin < most, f"--proxies.margin {self.margin} must be in [0, {most:.4g}) if {self.margin_kind}"
        )
        _require(self.per_class >= 1, f"--proxies.per-class {self.per_class} must be >= 1")
        _require(
            self.filter_above is None or -1 <= self.filter_above < 1,
            f"--proxies.filter-above {self.filter_above} must be a cosine similarity in [-1, 1)",
        )
        _require(self.lr_scale > 0, f"--proxies.lr-scale {self.lr_scale} must be positive")
        _require(
            self.weight_decay is None or self.weight_decay >= 0,
            f"--proxies.weight-decay {self.weight_decay} must be >= 0",
        )
        _require(self.memory > 0, f"--proxies.memory {self.memory} must be positive")

    def matmul_on(self, device_type: str) -> str:
        """Return what `matmul` means on a `cpu` or `cuda` device."""
        if self.matmul != "auto":
            return self.matmul
        return "tf32" if device_type == "cuda" else "float32"


@dataclass(frozen=True)
class OptimConfig:
    """The model's optimiser and the learning rate schedule."""

    epochs: int = 15
    """Epochs of floor(images / batch-size) iterations, not counting --optim.new-layers-epochs."""
    new_layers_epochs: int = 0
    """Initial epochs that train only the linear layer and the proxies. The optimiser is reset afterwards."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser of backbone and linear layer; that of the proxies is --proxies.optimizer."""
    lr: float = 0.01
    """Peak learning rate of backbone and linear layer."""
    new_layers_lr_scale: float = 1.0
    """Learning rate of the linear layer, relative to the backbone's."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the backbone, relative to that of the layer above it; the topmost one has
    --optim.lr. Below 1 it needs a timm backbone, whose layers timm names."""
    momentum: float = 0.9
    """Momentum of SGD, that of the proxies included; beta1 of AdamW."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: float = 1e-4
    """Weight decay, also that of the proxies unless --proxies.weight-decay is given."""
    decay_norms: bool = True
    """Apply weight decay also to parameters with at most one dimension: norms, biases and the like."""
    clip_norm: float | None = None
    """Largest norm of the gradient of backbone and linear layer together; a longer one is scaled down to it. The
    gradients of the proxies neither count nor are scaled. If None, gradients are not clipped."""
    ema: float | None = None
    """Decay of an exponential moving average of the model's weights. The average is what is evaluated and kept. In
    iteration n the decay is at most (1 + n) / (10 + n), so that the initial weights are soon forgotten. If None, there
    is no average."""
    frozen: str | None = None
    """Regular expression. Parameters of the backbone whose name begins with a match are not trained; .* freezes the
    whole backbone. Batch norms without a trained parameter keep their statistics too."""
    schedule: Literal["step", "cosine"] = "cosine"
    """step: times 0.1 after --optim.step-epochs. cosine: decays to zero at the end."""
    step_epochs: int = 15
    """Epochs at the full learning rate with the step schedule."""
    warmup_steps: int = 20
    """Iterations of linear warm-up."""

    def __post_init__(self) -> None:
        for name in ("epochs", "step_epochs"):
            _require(getattr(self, name) >= 1, f"--optim.{name.replace('_', '-')} {getattr(self, name)} must be >= 1")
        for name in ("new_layers_epochs", "warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, f"--optim.{name.replace('_', '-')} {getattr(self, name)} must be >= 0")
        _require(self.lr > 0, f"--optim.lr {self.lr} must be positive")
        _require(
            self.new_layers_lr_scale > 0, f"--optim.new-layers-lr-scale {self.new_layers_lr_scale} must be positive"
        )
        _require(0 < self.layer_decay <= 1, f"--optim.layer-decay {self.layer_decay} must be in (0, 1]; 1 is no decay")
        _require(0 <= self.momentum < 1, f"--optim.momentum {self.momentum} must be in [0, 1)")
        _require(0 <= self.beta2 < 1, f"--optim.beta2 {self.beta2} must be in [0, 1)")
        _require(self.clip_norm is None or self.clip_norm > 0, f"--optim.clip-norm {self.clip_norm} must be positive")
        _require(self.ema is None or 0 <= self.ema < 1, f"--optim.ema {self.ema} must be in [0, 1)")
        if self.frozen is not None:
            try:
                re.compile(self.frozen)
            except re.error as error:
                raise ValueError(f"--optim.frozen {self.frozen!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: how often, and how many to keep."""

    every: int | str = "10min"
    """Interval between checkpoints in iterations (500) or minutes (10min). One is always written at the end."""
    keep: int = 2
    """Number of checkpoints to keep. The best evaluated model is kept in addition."""

    def __post_init__(self) -> None:
        _require(
            isinstance(self.every, int) or re.fullmatch(r"\d+(\.\d+)?min", self.every) is not None,
            f"--checkpoint.every {self.every} must be a number of iterations (500) or of minutes (10min)",
        )
        _require((self.steps or self.minutes or 0) > 0, f"--checkpoint.every {self.every} must be positive")
        _require(self.keep >= 1, f"--checkpoint.keep {self.keep} must be >= 1")

    @property
    def steps(self) -> int | None:
        """Iterations between checkpoints, or None if the interval is a time."""
        return self.every if isinstance(self.every, int) else None

    @property
    def minutes(self) -> float | None:
        """Minutes between checkpoints, or None if the interval is a number of iterations."""
        return None if isinstance(self.every, int) else float(self.every.removesuffix("min"))


@dataclass(frozen=True)
class EvalConfig:
    """Retrieval on the test split: every image queries the rest, or the query split queries the gallery."""

    recall_at: tuple[int, ...] | None = None
    """Values of K for recall@K. If None, those commonly reported for the data set."""
    nmi: bool = True
    """Compute the normalised mutual information (NMI) of k-means clusters, in the final evaluation only. The cost is
    images x classes x dimensions."""
    intervals: bool = False
    """Compute 95% bootstrap confidence intervals by resampling test classes."""
    batch_size: int = 128
    """Batch size of each embedding actor."""
    num_shards: int | None = None
    """Shards of the gallery, searched in parallel and merged exactly. If None, one per GPU, or one per node."""
    memory_budget: float = 4.0
    """GiB per node for embeddings and neighbours. Embeddings that exceed it are memory-mapped. Does not include an
    approximate index."""
    index: str | None = None
    """faiss factory string of an approximate index for float embeddings (IVF1024,Flat, HNSW32, OPQ16,IVF256,PQ16),
    built per shard. Its recall against exact search is measured on a sample. If None, search is exact."""
    index_parameters: str | None = None
    """Search parameters of --eval.index in faiss syntax: nprobe=16 or efSearch=128."""

    def __post_init__(self) -> None:
        _require(
            self.recall_at is None or (len(self.recall_at) > 0 and min(self.recall_at) >= 1),
            f"--eval.recall-at {self.recall_at} must all be >= 1",
        )
        _require(self.memory_budget > 0, f"--eval.memory-budget {self.memory_budget} must be positive")
        _require(
            self.index_parameters is None or self.index is not None,
            f"--eval.index-parameters {self.index_parameters} needs an approximate index; set --eval.index too",
        )
        _require(self.batch_size >= 1, f"--eval.batch-size {self.batch_size} must be >= 1")
        _require(self.num_shards is None or self.num_shards >= 1, f"--eval.num-shards {self.num_shards} must be >= 1")


@dataclass(frozen=True)
class TrainEvalConfig(EvalConfig):
    """Evaluation during training."""

    every: int = 0
    """Epochs between evaluations. 0 evaluates only at the end."""
    untrained: bool = False
    """Also evaluate before the first iteration, as a baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.every >= 0, f"--eval.every {self.every} must be >= 0")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = None
    """MLflow server or database. If None, MLFLOW_TRACKING_URI if set, else sqlite:///STORAGE/mlflow.db, or
    ~/nsl_dist/mlflow.db if the storage is remote."""
    experiment: str | None = None
    """MLflow experiment. If None, the name of the data set's folder."""
    parent: str | None = None
    """Id of the parent MLflow run, for example that of a sweep."""
    every: int = 10
    """Iterations between logged metrics and progress lines."""
    register: str | None = None
    """Name in MLflow's model registry to register the trained model under. If None, it is not registered;
    jobs/export.py can do it later."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"--tracking.every {self.every} must be >= 1")
        name = self.register
        _require(
            name is None or not re.search("^$|[/:]", name), f"--tracking.register {name!r} must not contain / or :"
        )


@dataclass(frozen=True)
class EvaluateDataConfig:
    """Data to evaluate a checkpoint on."""

    root: str | None = None
    """Folder or URI of a raw data set or of shards, as for training. If None, the data of the checkpoint's run."""
    layout: Layout | None = None
    """Layout of the data set. If None, it is detected from the files."""
    max_undecodable: float = 0.01
    """Fraction of the images that may fail to decode while a raw folder is sharded. They are listed and skipped."""
    unrelated: bool = False
    """Allow a different data set than the checkpoint was trained on. Its test classes must not occur in the training
    data under another name, which cannot be checked."""


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation of a checkpoint."""

    checkpoint: str
    """Folder or URI of a checkpoint, or of a run to use its newest checkpoint."""
    run_id: str | None = None
    """MLflow run that the evaluation is logged as a child of. If None, that of the checkpoint's training."""
    track: bool = True
    """Log the evaluation to MLflow."""
    storage: str | None = None
    """Folder or URI for shards, embeddings and results. On a cluster, all nodes must be able to reach it. If None, that
    of the checkpoint's training, or ~/nsl_dist for a checkpoint outside of its run."""
    tracking_uri: str | None = None
    """MLflow server or database of --run-id. If None, that of the checkpoint's training, else MLFLOW_TRACKING_URI if
    set, else sqlite:///STORAGE/mlflow.db, or ~/nsl_dist/mlflow.db if the storage is remote."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for embedding and search. auto: cuda if the cluster has GPUs or its autoscaler can add them."""
    wait_for_nodes: float = 15.0
    """Minutes to wait at the start for missing nodes, which are requested from the autoscaler."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True)
class SearchConfig:
    """A search service, or a single search in the terminal."""

    checkpoint: str
    """Folder or URI of a checkpoint, or of a run to use its newest checkpoint."""
    gallery: str
    """Folder or URI of the images to search: shards, a data set of a known layout, or any folder of images, with or
    without class folders. Raw images are sharded once into --storage, cached by digest."""
    layout: Layout | None = None
    """Layout of the data set. If None, it is detected from the files; a folder of no known layout is used whole."""
    split: str | None = None
    """Split to search. If None, the one that an evaluation searches: test or gallery."""
    query: tuple[str, ...] = ()
    """Image files to search for. Prints their neighbours instead of starting the service."""
    k: int = 10
    """Number of neighbours for each --query."""
    kind: Literal["float", "binary", "both"] = "both"
    """Embeddings to index: float (cosine similarity), binary codes (Hamming distance) or both."""
    index: str = "Flat"
    """faiss factory string of the index of float embeddings: IVF1024,Flat, HNSW32, OPQ16,IVF256,PQ16. Flat is exact."""
    index_parameters: str | None = None
    """Search parameters of --index in faiss syntax: nprobe=16 or efSearch=128."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback makes the service reachable by others."""
    port: int = 8000
    """Port to listen on."""
    replicas: int = 1
    """Server processes, each with the model and the whole index."""
    storage: str | None = None
    """Folder or URI for shards and embeddings. On a cluster, all nodes must be able to reach it. If None, that of the
    checkpoint's training, or ~/nsl_dist for a checkpoint outside of its run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for embedding the gallery; queries are embedded on CPUs. auto: cuda if the cluster has GPUs."""
    max_undecodable: float = 0.01
    """Fraction of the images that may fail to decode while a folder is sharded. They are listed and skipped."""

    def __post_init__(self) -> None:
        _require(1 <= self.k <= MOST_NEIGHBOURS, f"--k {self.k} must be in 1 to {MOST_NEIGHBOURS}")
        _require(1 <= self.port <= 65535, f"--port {self.port} must be in 1 to 65535")
        _require(self.replicas >= 1, f"--replicas {self.replicas} must be at least 1")
        _require(0 <= self.max_undecodable <= 1, f"--max-undecodable {self.max_undecodable} must be in [0, 1]")

    @property
    def kinds(self) -> tuple[Literal["float", "binary"], ...]:
        """Kinds of embeddings to index."""
        return ("float", "binary") if self.kind == "both" else (self.kind,)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    recipe: str = "laptop"
    """Recipe that sets the defaults of all other flags: see recipes.py."""
    storage: str = DEFAULT_STORAGE
    """Folder or URI for runs, checkpoints and shards. On a cluster, all nodes must be able to reach it."""
    run_name: str | None = None
    """Name of the run and of its folder in STORAGE/runs. If None, the recipe and the time."""
    init_from: str | None = None
    """Run, whose newest checkpoint is taken, or checkpoint to start from: its model, and the proxies of the classes it
    knows, with the state of the optimisers. New classes start from the mean embedding of their images. --model.weights,
    which takes the model alone, is ignored then."""
    num_workers: int | None | str = None  # noqa: RUF036  (so that tyro parses both "None" and "2..4")
    """Number of training workers, or a range such as 2..4 for elastic training, which uses as many as the cluster has
    room for. If None, one per GPU as long as the batch divides evenly, or one on CPUs."""
    cpus_per_worker: int = 1
    """CPUs reserved by each training worker. All others read and decode images."""
    threads: int | None = None
    """Threads of each worker when training on CPUs. If None, the machine's cores are divided among its workers. A
    resumed run keeps this number, because another one sums in a different order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for training. auto: cuda if the cluster has GPUs or its autoscaler can add them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of the backbone. auto: bfloat16 on GPUs that support it, else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile, which takes up to a minute, or seconds from its cache, at the start and
    when all layers begin to train. auto: on GPUs, unless batch norm is synchronised or the compiler does not work."""
    wait_for_nodes: float = 15.0
    """Minutes to wait at the start for missing nodes, which are requested from the autoscaler."""
    max_failures: int = 3
    """How often a run restarts from its last checkpoint after losing workers or nodes. -1: no limit."""
    seed: int = 0
    """Seed of weights, batches, augmentation and class sampling."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    proxies: ProxyConfig = field(default_factory=ProxyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: TrainEvalConfig = field(default_factory=TrainEvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _require(self.cpus_per_worker >= 1, f"--cpus-per-worker {self.cpus_per_worker} must be at least 1")
        _require(self.threads is None or self.threads >= 1, f"--threads {self.threads} must be at least 1")
        _require(self.wait_for_nodes >= 0, f"--wait-for-nodes {self.wait_for_nodes} must not be negative")
        _require(self.seed >= 0, f"--seed {self.seed} must not be negative")
        _require(
            self.precision != "bfloat16" or self.data.image_size >= 32,
            f"--precision bfloat16 needs images of 32 pixels or more, got --data.image-size {self.data.image_size}: on "
            "CPUs PyTorch's bfloat16 gradient of a strided convolution over a single pixel is wrong",
        )
        if isinstance(self.num_workers, str):
            _require(
                re.fullmatch(r"\d+\.\.\d+", self.num_workers) is not None,
                f"--num-workers {self.num_workers} must be a number (4) or a range (2..4)",
            )
        if self.worker_range is not None:
            low, high = self.worker_range
            _require(1 <= low <= high, f"--num-workers {self.num_workers} must be at least 1, lower number first")
            batch_size, counts = self.data.batch_size, range(low, high + 1)
            per_class = self.data.images_per_class
            uneven = [count for count in counts if batch_size % count]
            _require(
                not uneven,
                f"global batch {batch_size} is not divisible by {', '.join(map(str, uneven))} workers; set "
                f"--data.batch-size to a multiple of {math.lcm(*counts)}"
                + (f" and of --data.images-per-class {per_class}" if per_class is not None else ""),
            )
        if self.run_name is not None:
            _require(
                bool(self.run_name) and "/" not in self.run_name and not self.run_name.startswith("."),
                f"--run-name {self.run_name!r} must be a folder name without a slash or leading dot",
            )

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Minimum and maximum number of training workers, or None if the cluster determines it."""
        if self.num_workers is None:
            return None
        low, _, high = str(self.num_workers).partition("..")
        return int(low), int(high or low)


def config_from_dict(fields: dict[str, Any], *, location: str) -> TrainConfig:
    """Rebuild a configuration from the output of `dataclasses.asdict`, also after a round trip through JSON.

    Raises:
        ValueError: the file at `location` was written by another release, or a value is out of range.

    """
    # Not above: a model in MLflow's registry loads this module, and is spared the package.
    from cattrs.errors import CattrsError
    from cattrs.preconf.json import make_converter

    converter = make_converter(forbid_extra_keys=True, detailed_validation=False)
    try:
        return converter.structure(fields, TrainConfig)
    except (CattrsError, TypeError) as error:
        raise ValueError(f"{location} is of another release of nsl_dist: {error}") from error


def flatten(config: "TrainConfig | EvaluateConfig") -> dict[str, Any]:
    """Return all fields by dotted name: `optim.lr`."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


# May change when a run is resumed: affects neither the batches nor, but for rounding, what they do to the model.
FREE_TO_CHANGE = re.compile(
    r"recipe|storage|run_name|num_workers|cpus_per_worker|threads|device|compile|wait_for_nodes|max_failures|"
    r"checkpoint\..*|eval\..*|tracking\..*|data\.(root|layout|split|test_share|test_classes|fit_batch|max_undecodable|max_damaged_shards)|proxies\.(placement|directory|memory)"
)


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Return the options that a resumed run must not change but did, formatted as `--optim.lr 0.01 -> 0.02`."""
    old, new = flatten(before), flatten(now)
    return [
        f"--{name.replace('_', '-')} {old[name]} -> {new[name]}"
        for name in old
        if old[name] != new[name] and not FREE_TO_CHANGE.fullmatch(name)
    ]
