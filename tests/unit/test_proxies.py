"""Sampling, loss, updates and placement of the class proxies on one worker."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsl_dist.config import ProxyConfig
from nsl_dist.proxies.counter_random import random_integers, round_to_bfloat16, uniform_rows
from nsl_dist.proxies.matrix import ProxyMatrix
from nsl_dist.proxies.optimizer import DeferredSGD, MapProducts, RowwiseAdagrad
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import NUM_ROUNDS, draw_classes, draw_distinct
from nsl_dist.proxies.softmax import LOWEST_TEMPERATURE
from nsl_dist.proxies.table import Table
from nsl_dist.proxies.torch_step import TorchStep
from tests.support.proxies import (
    check_chunks,
    check_embeddings_that_are_not_finite,
    check_loss_and_gradients,
    check_placements,
    matrix_of,
    train_proxies,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 1), (10, 3), (11, 4), (3, 4), (1, 2), (4097, 4)])
def test_partitions_cover_every_class_once(num_classes: int, world_size: int) -> None:
    parts = [Partition(num_classes, rank, world_size) for rank in range(world_size)]
    assert [label for part in parts for label in range(part.start, part.stop)] == list(range(num_classes))
    assert all(part.num_rows <= part.rows_per_rank for part in parts)


# Initial proxies


def test_initial_proxies_are_uniform_and_independent() -> None:
    rows = uniform_rows(torch.arange(2000), 63, bound=0.5, seed=7)
    assert rows.shape == (2000, 63)
    assert rows.abs().max() < 0.5
    histogram = torch.histc(rows, 64, min=-0.5, max=0.5)
    expected = rows.numel() / 64
    assert ((histogram - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi-square, 63 degrees
    correlations = torch.corrcoef(rows.T) - torch.eye(63)
    assert correlations.abs().max() < 5.5 / 2000**0.5
    assert torch.corrcoef(rows[:500])[~torch.eye(500, dtype=torch.bool)].abs().max() < 5.5 / 63**0.5
    assert not torch.equal(rows, uniform_rows(torch.arange(2000), 63, bound=0.5, seed=8))


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_initial_proxies_do_not_depend_on_the_number_of_workers(placement: str, tmp_path: Path) -> None:
    place: dict[str, Any] = {"placement": placement, "directory": str(tmp_path), "seed": 7, "initial_bound": 0.5}
    whole = Table(range(10_007), 4, seed=7, initial_bound=0.5).values
    for world_size in (1, 3):
        parts = [Table(Partition(10_007, rank, world_size).rows(1), 4, **place) for rank in range(world_size)]
        for part in parts:
            part.make_all()
        assert torch.equal(torch.cat([part.values for part in parts]), whole)


# Sampling


def keys_of(seed: int) -> NDArray[np.uint32]:
    return np.array(random_integers(NUM_ROUNDS, seed, 0, 0), dtype=np.uint32)


@pytest.mark.parametrize("num_sampled", [2, 20, 100, 198, 200])
def test_sampled_rows_keep_positives_and_are_distinct(num_sampled: int) -> None:
    part = Partition(250, 1, 2)  # classes 125 to 249
    num_sampled = min(num_sampled, part.num_rows)
    rng = np.random.default_rng(0)
    for step in range(50):
        labels = rng.integers(0, 250, 24)
        draw = draw_classes(labels, part, num_sampled=num_sampled, seed=(0, step, 3))
        rows, mine = draw.rows(ascending=True), labels >= part.start
        assert len(np.unique(rows)) == len(rows) == max(num_sampled, len(np.unique(labels[mine])))
        assert rows.min() >= 0
        assert rows.max() < part.num_rows
        assert (part.start + rows[draw.columns_B[mine]] == labels[mine]).all()
        assert (draw.columns_B[~mine] < 0).all()
        assert (rows[: len(draw.positives)] == draw.positives).all()


@pytest.mark.parametrize(("size", "num_values"), [(0, 5), (5, 5), (1, 1), (3, 10), (7, 10), (499, 1000), (90, 100_000)])
def test_draws_are_distinct(size: int, num_values: int) -> None:
    for seed in range(20):
        drawn = draw_distinct(size, num_values, keys_of(seed))
        assert len(np.unique(drawn)) == len(drawn) == size
        assert size == 0 or (drawn.min() >= 0 and drawn.max() < num_values)


@pytest.mark.parametrize(("size", "num_values", "bound"), [(2, 5, 27.9), (3, 6, 43.8), (2, 40, 908)])
def test_every_set_of_values_is_as_likely(size: int, num_values: int, bound: float) -> None:
    """Chi-square of how often each of the n = 10, 20 and 780 sets is drawn, n - 1 degrees, p = 0.001."""
    counts = Counter(tuple(np.sort(draw_distinct(size, num_values, keys_of(seed))).tolist()) for seed in range(4000))
    num_sets = math.comb(num_values, size)
    expected = 4000 / num_sets
    missing = (num_sets - len(counts)) * expected
    assert sum((count - expected) ** 2 / expected for count in counts.values()) + missing < bound


def test_every_value_is_as_likely_at_every_place() -> None:
    """A permutation of 100: chi-square over 100 places x 100 values, 99 x 99 degrees, five standard deviations."""
    counts = np.zeros((100, 100))
    for seed in range(3000):
        counts[np.arange(100), draw_distinct(100, 100, keys_of(seed))] += 1
    assert ((counts - 30) ** 2 / 30).sum() < 99**2 + 5 * (2 * 99**2) ** 0.5


def test_draws_of_different_steps_and_workers_are_independent() -> None:
    """Two draws of 1,000 out of 10,000 share 100, give or take 9."""
    labels = np.zeros(1, dtype=np.int64)
    seeds = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (2, 3)]
    draws = [
        set(draw_classes(labels, Partition(10_000), num_sampled=1000, seed=seed).rows(ascending=True).tolist())
        for seed in seeds
    ]
    for one, other in itertools.combinations(draws, 2):
        assert 55 < len(one & other) < 145


def test_negatives_are_uniform() -> None:
    labels = np.array([3, 20, 49, 20])
    counts = np.zeros(50)
    for step in range(4000):
        counts[draw_classes(labels, Partition(50), num_sampled=10, seed=(1, step, 2)).rows(ascending=True)] += 1
    assert (counts[[3, 20, 49]] == 4000).all()
    others = np.delete(counts, [3, 20, 49])
    expected = 4000 * 7 / 47
    assert np.abs(others - expected).max() < 5 * np.sqrt(expected)


def test_drawing_a_few_rows_of_a_trillion() -> None:
    rows = draw_classes(np.array([0, 7]), Partition(10**12), num_sampled=1000, seed=(0, 0, 2)).rows(ascending=True)
    assert len(np.unique(rows)) == 1000
    assert rows.max() > 10**11


def test_number_of_sampled_classes() -> None:
    for options, expected in (({"sample_rate": 0.1}, 4), ({"num_sampled": 9}, 3), ({"num_sampled": 1000}, 33)):
        part = Partition(97, 2, 3)  # 31 classes
        config = ProxyConfig(**options)
        assert ProxyMatrix(part, 4, config).num_sampled == min(expected, part.num_rows)


def test_corrected_normaliser_is_unbiased() -> None:
    """The mean over many samplings of the corrected sum over classes is the sum over all of them."""
    rng = np.random.default_rng(4)
    embeddings = torch.from_numpy(rng.normal(size=(8, 12))).float()
    labels = rng.integers(0, 300, 8)

    def normalisers(**options: Any) -> torch.Tensor:
        """sum_j e^(l_j - l_y) of each image in many samplings: the loss of the image alone is its logarithm."""
        matrix = matrix_of(300, 12, temperature=0.3, **options)
        sums = []
        for step in range(options.pop("steps", 600)):
            sampled = matrix._sample(labels, step=step)
            assert isinstance(sampled, TorchStep)
            (chunk,) = sampled.chunks
            assert matrix.optimizer is not None
            logits = F.normalize(embeddings) @ F.normalize(matrix.optimizer.read(chunk.rows)[0]).T / 0.3
            multiplicity = torch.full((chunk.num_classes,), chunk.multiplicity)
            multiplicity[chunk.target_columns] = 1.0
            sums.append((logits.exp() * multiplicity).sum(1))
            loss = matrix.loss(embeddings, labels, step=step, lr=0.0)
            target = torch.zeros(8).index_put((chunk.target_images,), logits[chunk.target_images, chunk.target_columns])
            torch.testing.assert_close(loss, (sums[-1].log() - target).mean(), rtol=1e-5, atol=0)
        return torch.stack(sums)

    exact = normalisers(sample_rate=1.0)[0]
    corrected = normalisers(num_sampled=30, correct_sampling=True)
    error = (corrected.mean(0) - exact) / (corrected.std(0) / len(corrected) ** 0.5)
    assert error.abs().max() < 4  # standard errors
    assert (normalisers(num_sampled=30).mean(0) < 0.3 * exact).all()


def test_correction_keeps_one_class_to_stand_for_the_rest() -> None:
    matrix = matrix_of(20, 4, num_sampled=1, correct_sampling=True)
    sampled = matrix._sample(np.array([3, 5, 3]), step=0)
    assert isinstance(sampled, TorchStep)
    (chunk,) = sampled.chunks
    assert (chunk.num_classes, chunk.num_positives, chunk.multiplicity) == (3, 2, 18)


# Loss


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1 / 64, LOWEST_TEMPERATURE])
def test_loss_and_gradients_equal_torchs_cross_entropy(temperature: float) -> None:
    check_loss_and_gradients(temperature=temperature, device=CPU)


@pytest.mark.parametrize(
    "options",
    [
        {"sample_rate": 1.0},
        {"num_sampled": 40},
        {"num_sampled": 40, "correct_sampling": True},
        {"num_sampled": 40, "per_class": 3, "margin": 0.5, "margin_kind": "angular", "filter_above": 0.4},
    ],
)
def test_chunks_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks(options, device=CPU, monkeypatch=monkeypatch)


def test_loss_is_float32_under_autocast() -> None:
    results = []
    for enabled in (False, True):
        matrix = matrix_of(6, 8)
        embeddings = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = matrix.loss(embeddings, np.arange(4), step=0, lr=0.1)
            loss.backward()
        results.append((loss.detach(), embeddings.grad, matrix.weight.values))
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("matmul", ["tf32", "bfloat16"])
def test_products_in_lower_precision_stay_near(matmul: str) -> None:
    """Where the CPU has none, they are those of float32; what other products use is left as it was."""
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    exact, rounded = (
        train_proxies(matrix_of(300, 32, num_sampled=100, matmul=each), steps=20) for each in ("float32", matmul)
    )
    start = Table(range(300), 32, initial_bound=32**-0.5).values
    assert (rounded["weight"] - exact["weight"]).norm() < 0.05 * (exact["weight"] - start).norm()
    assert backend.fp32_precision == before


class _LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes anew or works through in place."""

    ROWS_ONLY = ("index_copy_", "index_put_", "_index_put_impl_", "index_fill_")  # touch what their index names
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in self.ROWS_ONLY:
            sizes = [output.numel() for output in tree_leaves(result) if isinstance(output, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
        return result


def largest_tensor(num_classes: int, **options: Any) -> int:
    matrix = matrix_of(num_classes, 16, **options)
    rng = np.random.default_rng(0)
    for step in range(3):
        embeddings = torch.from_numpy(rng.normal(size=(8, 16))).float().requires_grad_()
        with _LargestTensor() as largest:
            matrix.loss(embeddings, rng.integers(0, num_classes, 8), step=step, lr=0.1).backward()
    return largest.numel


def test_no_tensor_of_a_step_grows_with_the_number_of_classes() -> None:
    """No dense gradient, no pass over the matrix, no number for each class."""
    sizes = [largest_tensor(num_classes, num_sampled=300) for num_classes in (2_000, 20_000)]
    assert sizes == [300 * 16] * 2  # the sampled rows


def test_all_classes_in_little_memory() -> None:
    """Neither batch x classes nor a copy of the matrix: 20,000 classes in parts of 100 KB."""
    assert largest_tensor(20_000, memory=1e5 / 2**30) < 20_000 * 16 / 10


def test_a_pass_over_the_matrix_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    finish_step = DeferredSGD.finish_step

    def decay_all(self: DeferredSGD, num_updated: int, *, lr: float) -> None:
        self.weight.values.mul_(1.0)
        finish_step(self, num_updated, lr=lr)

    monkeypatch.setattr(DeferredSGD, "finish_step", decay_all)
    assert largest_tensor(2_000, num_sampled=300) == 2_000 * 16


def test_losses_and_backward_passes_must_alternate() -> None:
    matrix = matrix_of(6, 8)
    first, second = (matrix.loss(torch.randn(4, 8, requires_grad=True), np.arange(4), step=0, lr=0.1) for _ in "ab")
    first.backward(retain_graph=True)
    for loss in (first, second):
        with pytest.raises(RuntimeError, match="updated since this loss was computed; call loss and backward in turn"):
            loss.backward()


def test_bad_input_is_refused() -> None:
    matrix = matrix_of(6, 8)
    with pytest.raises(ValueError, match=r"labels span 0 to 6 in step 3, but there are 6 classes"):
        matrix.loss(torch.randn(2, 8), np.array([0, 6]), step=3, lr=0.1)
    with pytest.raises(ValueError, match=r"labels span -1 to 0 in step 3"):
        matrix.loss(torch.randn(2, 8), np.array([0, -1]), step=3, lr=0.1)
    with pytest.raises(ValueError, match=r"5 labels in step 3, expected .*: 1 workers x 4 images = 4"):
        matrix.loss(torch.randn(4, 8), np.arange(5), step=3, lr=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_named(value: float) -> None:
    check_embeddings_that_are_not_finite(value, device=CPU)


def test_proxies_that_are_not_finite_are_named() -> None:
    matrix = matrix_of(6, 8)
    matrix.weight.values[1, 1] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"step 2: class proxies are nan .* although all embeddings are finite"
    ):
        matrix.loss(torch.randn(4, 8), np.arange(4), step=2, lr=0.1)


# Updates


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 1e-2), (0.0, 1e-2), (0.9, 0.0)])
def test_sparse_updates_follow_dense_sgd(momentum: float, weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps on a few rows each, under a schedule with warm-up and a step, through several blocks of history."""
    monkeypatch.setattr(MapProducts, "STEPS_PER_BLOCK", 16)
    rng = np.random.default_rng(0)
    weight = Table(range(30), 4, initial_bound=1.0)
    dense = weight.values.double().requires_grad_()
    reference = torch.optim.SGD([dense], lr=1.0, momentum=momentum, weight_decay=weight_decay)
    ours = DeferredSGD(weight, momentum=momentum, weight_decay=weight_decay)
    for step in range(200):
        lr = 0.1 * min(1.0, (step + 1) / 20) * (1.0 if step < 120 else 0.1)
        rows = torch.from_numpy(np.sort(rng.choice(29, 3, replace=False)))  # row 29 is never drawn
        read = ours.read(rows)
        torch.testing.assert_close(read[0].double(), dense.detach()[rows], rtol=1e-5, atol=1e-5)
        grad = torch.from_numpy(rng.normal(size=(3, 4)))
        dense.grad = torch.zeros_like(dense).index_copy(0, rows, grad)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        ours.update(rows, read, grad.float() + weight_decay * read[0], lr=lr, step=step)
        ours.finish_step(3, lr=lr)
        if step == 77:
            ours.catch_up(step=step + 1)
            torch.testing.assert_close(weight.values.double(), dense.detach(), rtol=1e-5, atol=1e-5)
    ours.catch_up(step=200)
    torch.testing.assert_close(weight.values.double(), dense.detach(), rtol=1e-5, atol=1e-5)
    if momentum:
        velocity = reference.state[dense]["momentum_buffer"]
        torch.testing.assert_close(ours.velocity.values.double(), velocity, rtol=1e-5, atol=1e-5)


def test_rowwise_adagrad() -> None:
    rng = np.random.default_rng(0)
    weight = Table(range(10), 4, initial_bound=1.0)
    expected = weight.values.double().numpy().copy()
    accumulator = np.zeros((10, 1))
    ours = RowwiseAdagrad(weight, weight_decay=0.01)
    for step in range(30):
        rows = np.sort(rng.choice(9, 3, replace=False))
        grad = rng.normal(size=(3, 4))
        index = torch.from_numpy(rows)
        grad = grad + 0.01 * expected[rows]  # weight decay
        ours.update(index, ours.read(index), torch.from_numpy(grad).float(), lr=0.1, step=step)
        accumulator[rows] += (grad**2).mean(axis=1, keepdims=True)
        expected[rows] -= 0.1 * grad / np.sqrt(accumulator[rows])
    np.testing.assert_allclose(weight.values.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.accumulator.numpy(), accumulator, rtol=1e-5)
    assert ours.accumulator[9] == 0


# Storage


def test_stochastic_rounding_is_unbiased() -> None:
    values = torch.tensor([[1.0, 1.001, -1.003, 3e-5, 0.0, -250.3]]).repeat(20_000, 1)
    rounded = round_to_bfloat16(values, torch.arange(20_000), seed=1, stream=3).float()
    spacing = 2.0 ** (values[0].abs().clamp_min(1e-30).log2().floor() - 7)
    assert ((rounded - values).abs() < spacing).all()
    assert ((rounded.mean(0) - values[0]).abs() <= 4 * 0.5 * spacing / 20_000**0.5).all()
    assert not torch.equal(rounded, round_to_bfloat16(values, torch.arange(20_000), seed=1, stream=4).float())


def test_stochastic_rounding_keeps_what_is_not_finite() -> None:
    bits = torch.tensor([[0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000]], dtype=torch.int32)  # GPUs make the first NaN
    rounded = round_to_bfloat16(bits.view(torch.float32), torch.arange(1), seed=0, stream=1)
    assert rounded[0, :2].isnan().all()
    assert rounded[0, 2:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_bfloat16_follows_float32(optimizer: str) -> None:
    """The directions differ by what a random walk of roundings to 8 bits makes: 2^-8 sqrt(times drawn) at most."""
    lr = 0.002 if optimizer == "sgd" else 0.01
    states = [
        train_proxies(matrix_of(50, 32, optimizer=optimizer, num_sampled=25, dtype=dtype), steps=200, lr=lr)
        for dtype in ("float32", "bfloat16")
    ]
    start = Table(range(50), 32, initial_bound=32**-0.5).values
    exact, rounded = (F.normalize(state["weight"].float()) for state in states)
    assert states[1]["weight"].dtype == torch.bfloat16
    moved = (exact - F.normalize(start)).norm()
    assert (rounded - exact).norm() < 100**0.5 / 2**8 * exact.norm()
    assert (rounded - exact).norm() < 0.1 * moved


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_placement_changes_nothing(optimizer: str, dtype: str, tmp_path: Path) -> None:
    check_placements(optimizer, dtype, device=CPU, directory=tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adagrad"}, {"dtype": "bfloat16"}, {"sample_rate": 1.0}, {"placement": "disk"}]
)
def test_going_on_from_a_saved_state(options: dict[str, Any], tmp_path: Path) -> None:
    """The same to the last bit as a run that was neither saved nor interrupted."""
    options = {"num_sampled": None if "sample_rate" in options else 30, "directory": str(tmp_path), **options}
    whole, saved, resumed = (matrix_of(100, 8, decay=1e-3, **options) for _ in range(3))
    expected = train_proxies(whole, steps=30)
    state = train_proxies(saved, steps=30, stop=15)
    for name, table in resumed.overwrite().items():
        table.copy_(state[name])
    assert saved.optimizer is not None
    resumed.resume(saved.optimizer.history)
    for matrix in (saved, resumed):
        ours = train_proxies(matrix, first=15, steps=30)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not torch.equal(expected["weight"], state["weight"])


def test_rows_on_disk_are_made_when_they_are_read(tmp_path: Path) -> None:
    matrix = matrix_of(1000, 8, placement="disk", directory=str(tmp_path), num_sampled=20)
    matrix.loss(torch.randn(4, 8, requires_grad=True), np.arange(4), step=0, lr=0.1).backward()
    made = matrix.weight.values.ne(0).any(dim=1)
    assert made.sum() == 20
    assert matrix.complete(step=1)["weight"].ne(0).any(dim=1).all()


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot keep \d+.\d GiB of class proxies in .*; set --proxies.directory to"):
        Table(range(2**40), 512, placement="disk", directory=str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot keep 0.0 GiB of class proxies in /no/such: No such file"):
        Table(range(10), 4, placement="disk", directory="/no/such")
