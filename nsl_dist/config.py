"""The configuration of a run: frozen, validated, every field with its unit. Recipes fill it in; flags override it."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MOST_NEIGHBOURS = 1000  # of one query to jobs/search.py
Layout = Literal["sop", "inshop", "cub200", "cars196", "folders"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DataConfig:
    """Images, and how batches are made of them."""

    root: str | None = None
    """Folder or URI of a raw data set (sharded once into --storage, cached by digest) or of shards written by
    jobs/prepare_shards.py. None: built-in synthetic products."""
    layout: Layout | None = None
    """Layout of the data set: Stanford Online Products, In-Shop, CUB-200-2011, CARS196, or a folder of images for each
    class, the first half of them for training. None: recognised by its files."""
    batch_size: int = 80
    """Images in a global batch, over all workers."""
    images_per_class: int | None = 5
    """Images of each class in a batch, drawn with replacement; batch-size / images-per-class distinct classes. None:
    distinct images, whatever their classes."""
    image_size: int = 64
    """Edge of the square crop that the model sees, pixels."""
    crop_ratio: float = 0.875
    """Edge of the crop as a share of the edge that images are resized to (aspect ignored): 224 / 256 in the paper."""
    crop_area: float | None = None
    """Training images are cut to a random share of their area, from this one to all of it, at a ratio of width to
    height between 3/4 and 4/3, and resized. None: a crop of --data.crop-ratio, as in the paper."""
    flip: bool = True
    """Mirror half of the training images."""
    rotation: float = 0.0
    """Training images are rotated by up to this many degrees either way."""
    scale: float = 0.0
    """Training images are scaled by up to this share either way."""
    shear: float = 0.0
    """Training images are sheared by up to this many degrees either way."""
    max_undecodable: float = 0.01
    """Share of the images that may fail to decode when a raw folder is sharded; they are listed and left out."""
    max_damaged_shards: int = 0
    """Shards that may turn out damaged or missing in mid-run; more stop it. The workers start again, which counts among
    --max-failures, and from then on no batch has their classes."""

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

    @property
    def resized_edge(self) -> int:
        """Edge that images are resized to before the crop, pixels."""
        return round(self.image_size / self.crop_ratio)


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, pooling, LayerNorm, linear, L2."""

    backbone: str = "resnet18"
    """Any torchvision classification model whose last layer is linear, by torchvision's own name; or, where timm is
    installed (extra `timm`), any of its models: timm/vit_base_patch16_224."""
    weights: str | None = None
    """Pretrained weights by torchvision's name (IMAGENET1K_V1, DEFAULT, ...), or DEFAULT of a timm model; or a
    state_dict file. None: random."""
    pooling: Literal["max", "gem"] | None = None
    """In place of the mean over the last feature map its maximum, or a generalised mean whose exponent is learned.
    None: what the backbone does itself."""
    neck: Literal["layer_norm", "batch_norm"] | None = "layer_norm"
    """What normalises the pooled features, without learned scale and bias: each image's own, as in the paper; or each
    feature over the batch. None: nothing."""
    dim: int = 128
    """Embedding dimensions; equal to the backbone's feature width leaves the linear layer out."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Batch statistics of each worker's own part, of the global batch (GPUs only), or none: frozen running ones."""

    def __post_init__(self) -> None:
        _require(self.dim >= 1, f"--model.dim {self.dim} must be at least 1")


@dataclass(frozen=True)
class ProxyConfig:
    """The class-proxy matrix and its loss."""

    sample_rate: float = 1.0
    """Share of the classes that take part in each iteration, in (0, 1]; those of the batch always do."""
    num_sampled: int | None = None
    """Number of classes that take part in each iteration, over all workers; None: --proxies.sample-rate says."""
    correct_sampling: bool = False
    """Let the sampled classes stand for the others in the softmax, so that the expected normaliser is that of all."""
    temperature: float = 0.05
    """Sigma of the Normalized Softmax Loss."""
    label_smoothing: float = 0.0
    """Share of each image's label that is spread evenly over all classes."""
    optimizer: Literal["sgd", "adagrad"] = "sgd"
    """sgd: exact to SGD with momentum and weight decay over the whole matrix; adagrad: row-wise, one number of state
    for each class instead of a second matrix."""
    lr_scale: float = 1.0
    """Learning rate of the proxies as a multiple of the backbone's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What proxies and momentum are kept in; bfloat16 is rounded stochastically. The loss is float32 in any case."""
    placement: Literal["device", "host", "disk"] = "device"
    """Where they are kept: with the model; in host memory, only sampled proxies travel; in a memory-mapped file."""
    directory: str | None = None
    """Folder on the workers for the file of --proxies.placement disk. None: that for temporary files."""
    memory: float = 1.0
    """GiB of proxies and logits kept within an iteration; where it is too little they are computed twice, in parts."""

    def __post_init__(self) -> None:
        _require(0 < self.sample_rate <= 1, f"--proxies.sample-rate {self.sample_rate} must be in (0, 1]; 1 is all")
        _require(
            self.num_sampled is None or self.num_sampled >= 1, f"--proxies.num-sampled {self.num_sampled} must be >= 1"
        )
        _require(
            self.temperature >= 0.0137, f"--proxies.temperature {self.temperature} must be at least 0.0137 (float32)"
        )
        _require(0 <= self.label_smoothing < 1, f"--proxies.label-smoothing {self.label_smoothing} must be in [0, 1)")
        _require(self.lr_scale > 0, f"--proxies.lr-scale {self.lr_scale} must be positive")
        _require(self.memory > 0, f"--proxies.memory {self.memory} must be positive")


@dataclass(frozen=True)
class OptimConfig:
    """SGD and its schedule."""

    epochs: int = 15
    """Epochs of floor(images / batch-size) iterations, the new-layers-only ones not counted."""
    new_layers_epochs: int = 0
    """Epochs before those that train only the linear layer and the proxies; then a fresh optimiser trains all."""
    lr: float = 0.01
    """Learning rate of backbone and linear layer at the top of the schedule."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 1e-4
    """SGD weight decay, proxies included."""
    schedule: Literal["step", "cosine"] = "cosine"
    """step: x0.1 after --optim.step-epochs; cosine: to zero at the end."""
    step_epochs: int = 15
    """Epochs at the full learning rate under the step schedule."""
    warmup_steps: int = 20
    """Iterations of linear warm-up."""

    def __post_init__(self) -> None:
        for name in ("epochs", "step_epochs"):
            _require(getattr(self, name) >= 1, f"--optim.{name.replace('_', '-')} {getattr(self, name)} must be >= 1")
        for name in ("new_layers_epochs", "warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, f"--optim.{name.replace('_', '-')} {getattr(self, name)} must be >= 0")
        _require(self.lr > 0, f"--optim.lr {self.lr} must be positive")
        _require(0 <= self.momentum < 1, f"--optim.momentum {self.momentum} must be in [0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of backbone, proxies, optimisers and step."""

    every: int | str = "10min"
    """Iterations between checkpoints, or minutes: 500 or 10min. There is always one at the end."""
    keep: int = 2
    """Newest checkpoints kept; the best model among those evaluated is kept beside them."""

    def __post_init__(self) -> None:
        _require(
            isinstance(self.every, int) or re.fullmatch(r"\d+(\.\d+)?min", self.every) is not None,
            f"--checkpoint.every {self.every} must be a number of iterations (500) or of minutes (10min)",
        )
        _require((self.steps or self.minutes or 0) > 0, f"--checkpoint.every {self.every} must be positive")
        _require(self.keep >= 1, f"--checkpoint.keep {self.keep} must be >= 1")

    @property
    def steps(self) -> int | None:
        """Iterations between checkpoints; None: time says."""
        return self.every if isinstance(self.every, int) else None

    @property
    def minutes(self) -> float | None:
        """Minutes between checkpoints; None: iterations say."""
        return None if isinstance(self.every, int) else float(self.every.removesuffix("min"))


@dataclass(frozen=True)
class EvalConfig:
    """Retrieval on the test split: every image queries the rest, or the query split queries the gallery."""

    recall_at: tuple[int, ...] | None = None
    """Values of K for recall@K. None: those that the data set is reported with."""
    nmi: bool = True
    """Normalised mutual information of k-means clusters, at the end only: takes images x classes x dimensions."""
    intervals: bool = False
    """95% bootstrap intervals of the metrics, test classes resampled."""
    batch_size: int = 128
    """Images embedded at a time by one actor."""
    num_shards: int | None = None
    """Shards of the gallery, searched in parallel and merged exactly. None: one for each GPU, or for each node."""
    memory_budget: float = 4.0
    """GiB that the search may take on a node for embeddings and neighbours; embeddings beyond it are memory-mapped.
    An approximate index is kept in memory beside it."""
    index: str | None = None
    """faiss factory string of an approximate index for the float embeddings (IVF1024,Flat, HNSW32, OPQ16,IVF256,PQ16),
    one in each shard; its recall against exact search is measured on a sample. None: exact search."""
    index_parameters: str | None = None
    """Search parameters of --eval.index as faiss names them: nprobe=16 or efSearch=128."""

    def __post_init__(self) -> None:
        _require(
            self.recall_at is None or (len(self.recall_at) > 0 and min(self.recall_at) >= 1),
            f"--eval.recall-at {self.recall_at} must all be >= 1",
        )
        _require(self.memory_budget > 0, f"--eval.memory-budget {self.memory_budget} must be positive")
        _require(
            self.index_parameters is None or self.index is not None,
            f"--eval.index-parameters {self.index_parameters} are of an approximate index; give --eval.index too",
        )
        _require(self.batch_size >= 1, f"--eval.batch-size {self.batch_size} must be >= 1")
        _require(self.num_shards is None or self.num_shards >= 1, f"--eval.num-shards {self.num_shards} must be >= 1")


@dataclass(frozen=True)
class TrainEvalConfig(EvalConfig):
    """Evaluation in the course of a training."""

    every: int = 0
    """Epochs between evaluations; 0 evaluates at the end only."""
    untrained: bool = False
    """Evaluate before the first iteration too, to show what training adds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.every >= 0, f"--eval.every {self.every} must be >= 0")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = None
    """MLflow server or database. None: that of MLFLOW_TRACKING_URI, else sqlite:///STORAGE/mlflow.db, or
    ~/nsl_dist/mlflow.db where storage is remote."""
    experiment: str | None = None
    """MLflow experiment. None: the layout of the data set."""
    parent: str | None = None
    """MLflow run that this one is a child of, such as that of a sweep."""
    every: int = 10
    """Iterations between logged metrics and lines of progress."""
    register: str | None = None
    """Name in MLflow's model registry under which the trained model becomes a new version. None: it is not registered;
    jobs/export.py can later."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"--tracking.every {self.every} must be >= 1")
        name = self.register
        _require(name is None or not re.search("^$|[/:]", name), f"--tracking.register {name!r} must have no / nor :")


@dataclass(frozen=True)
class EvaluateDataConfig:
    """What a checkpoint is evaluated on."""

    root: str | None = None
    """Folder or URI of a raw data set or of shards, as for training. None: that of the checkpoint's own run."""
    layout: Layout | None = None
    """Layout of the data set. None: recognised by its files."""
    max_undecodable: float = 0.01
    """Share of the images that may fail to decode when a raw folder is sharded; they are listed and left out."""
    unrelated: bool = False
    """Evaluate on another data set than the checkpoint was trained on. Its test classes must not have been trained on
    under another name: nothing can check that."""


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation: checkpoint, data, search, where it runs and where it is kept."""

    checkpoint: str
    """Folder or URI of a checkpoint, or of a run: then its newest checkpoint."""
    run_id: str | None = None
    """MLflow run of the training, of which the evaluation becomes a child. None: MLflow is left alone."""
    storage: str = "~/nsl_dist"
    """Folder or URI where shards, embeddings and results go; on a cluster, one that all nodes can reach."""
    tracking_uri: str | None = None
    """MLflow server or database of --run-id. None: that of MLFLOW_TRACKING_URI, else sqlite:///STORAGE/mlflow.db, or
    ~/nsl_dist/mlflow.db where storage is remote."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to embed and to search. auto: cuda if the cluster has GPUs, or its autoscaler may add them."""
    wait_for_nodes: float = 15.0
    """Minutes to wait at the start for a cluster to have room: its autoscaler is asked for the nodes."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True)
class SearchConfig:
    """A search: checkpoint, gallery, index, where it is served."""

    checkpoint: str
    """Folder or URI of a checkpoint, or of a run: then its newest checkpoint."""
    gallery: str
    """Folder or URI of what is searched: shards; a data set of a known layout; or any folder of images, all of them,
    in class folders or not. All but shards are sharded once into --storage, cached by digest."""
    layout: Layout | None = None
    """Layout of the data set. None: recognised by its files, else all images of the folder."""
    split: str | None = None
    """Split that is searched. None: that which an evaluation searches, test or gallery."""
    query: tuple[str, ...] = ()
    """Image files to search for: their neighbours are printed, and nothing is served."""
    k: int = 10
    """Neighbours of each of --query."""
    kind: Literal["float", "binary", "both"] = "both"
    """Embeddings that can be searched: float by cosine similarity, binary codes by Hamming distance."""
    index: str = "Flat"
    """faiss factory string of the index of float embeddings: IVF1024,Flat, HNSW32 or OPQ16,IVF256,PQ16. Flat: exact."""
    index_parameters: str | None = None
    """Search parameters of --index as faiss names them: nprobe=16 or efSearch=128."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's loopback lets others search."""
    port: int = 8000
    """Port to listen on."""
    replicas: int = 1
    """Processes that answer, each with the model and the whole index."""
    storage: str = "~/nsl_dist"
    """Folder or URI where shards and embeddings go; on a cluster, one that all nodes can reach."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to embed the gallery; queries are embedded on CPUs. auto: cuda if the cluster has GPUs."""
    max_undecodable: float = 0.01
    """Share of the images that may fail to decode when a folder is sharded; they are listed and left out."""

    def __post_init__(self) -> None:
        _require(1 <= self.k <= MOST_NEIGHBOURS, f"--k {self.k} must be in 1 to {MOST_NEIGHBOURS}")
        _require(1 <= self.port <= 65535, f"--port {self.port} must be in 1 to 65535")
        _require(self.replicas >= 1, f"--replicas {self.replicas} must be at least 1")
        _require(0 <= self.max_undecodable <= 1, f"--max-undecodable {self.max_undecodable} must be in [0, 1]")

    @property
    def kinds(self) -> tuple[Literal["float", "binary"], ...]:
        """Kinds of embeddings that can be searched."""
        return ("float", "binary") if self.kind == "both" else (self.kind,)


@dataclass(frozen=True)
class TrainConfig:
    """A run: data, model, proxies, optimisation, evaluation, where it runs and where it is kept."""

    recipe: str = "laptop"
    """The recipe that the other flags start from: laptop, or the paper's for a data set (see recipes.py)."""
    storage: str = "~/nsl_dist"
    """Folder or URI where runs, checkpoints and shards go; on a cluster, one that all nodes can reach."""
    run_name: str | None = None
    """Name of the run, a folder below STORAGE/runs. None: the recipe and the time."""
    num_workers: int | None | str = None  # noqa: RUF036  (so tyro reads both "None" and "2..4" as they are meant)
    """Training workers, or fewest and most of them, 2..4: then as many as the cluster has room for while nodes leave
    and come. None: one for each GPU of the cluster, as far as they share the batch evenly; one on CPUs."""
    cpus_per_worker: int = 1
    """CPUs that each training worker reserves; the rest of the cluster reads and decodes."""
    threads: int | None = None
    """Threads that each worker trains with on CPUs. None: the cores of a machine, shared by its workers. A run that
    goes on keeps them: another number sums in another order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers train. auto: cuda if the cluster has GPUs, or its autoscaler may add them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of the backbone. auto: bfloat16 on GPUs that compute in it, float32 on CPUs."""
    wait_for_nodes: float = 15.0
    """Minutes to wait at the start for a cluster to have room for the run: its autoscaler is asked for the nodes."""
    max_failures: int = 3
    """Failures of workers, lost nodes included, after which a run goes on from its last checkpoint; -1: no limit."""
    seed: int = 0
    """Seed of weights, plan, augmentation and class sampling."""
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
            _require(1 <= low <= high, f"--num-workers {self.num_workers} must be at least 1, and the fewest first")
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
        """Fewest and most training workers; None: the cluster says."""
        if self.num_workers is None:
            return None
        low, _, high = str(self.num_workers).partition("..")
        return int(low), int(high or low)


def config_from_dict(fields: dict[str, Any], *, location: str) -> TrainConfig:
    """Return the configuration that `dataclasses.asdict` turned into `fields`, after a trip through JSON too.

    Raises:
        ValueError: the file at `location`, where they are from, was written by another release; or a value is out of
            range.

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


# What may change when a run goes on: it decides neither the batches nor what they do to the model.
FREE_TO_CHANGE = re.compile(
    r"recipe|storage|run_name|num_workers|cpus_per_worker|threads|device|wait_for_nodes|max_failures|"
    r"checkpoint\..*|eval\..*|tracking\..*|data\.(root|layout|max_undecodable|max_damaged_shards)|proxies\.(placement|directory|memory)"
)


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Return what a run that goes on must not change but did, as lines `--optim.lr 0.01 -> 0.02`."""
    old, new = flatten(before), flatten(now)
    return [
        f"--{name.replace('_', '-')} {old[name]} -> {new[name]}"
        for name in old
        if old[name] != new[name] and not FREE_TO_CHANGE.fullmatch(name)
    ]
