import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsl_dist.proxies.matrix import ROWS_PER_SEED, ProxyMatrix, initial_rows
from nsl_dist.proxies.optimizer import DeferredSGD
from nsl_dist.proxies.partition import Partition
from nsl_dist.proxies.sampling import sample_rows
from nsl_dist.proxies.softmax import LOWEST_TEMPERATURE, normalized_softmax_loss


@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 1), (10, 3), (11, 4), (3, 4), (1, 2), (4097, 4)])
def test_partitions_cover_every_class_once(num_classes: int, world_size: int) -> None:
    parts = [Partition(num_classes, rank, world_size) for rank in range(world_size)]
    assert [label for part in parts for label in range(part.start, part.stop)] == list(range(num_classes))
    assert all(part.num_rows <= part.rows_per_rank for part in parts)


def test_initial_rows_do_not_depend_on_the_number_of_workers() -> None:
    num_classes = 2 * ROWS_PER_SEED + 100
    whole = initial_rows(Partition(num_classes), 4, seed=7)
    assert whole.abs().max() <= 0.5
    assert whole.std() == pytest.approx(0.5 / 3**0.5, rel=0.02)
    for world_size in (2, 3):
        parts = [initial_rows(Partition(num_classes, rank, world_size), 4, seed=7) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("sample_rate", [0.01, 0.1, 0.5, 0.99, 1.0])
def test_sampled_rows_keep_positives_and_are_distinct(sample_rate: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        positives = rng.integers(0, 200, 12)
        rows = sample_rows(positives, num_rows=200, sample_rate=sample_rate, rng=rng)
        assert (np.diff(rows) > 0).all()
        assert set(positives) <= set(rows)
        assert rows.min() >= 0
        assert rows.max() < 200
        assert len(rows) == max(len(np.unique(positives)), int(np.ceil(sample_rate * 200)))


def test_negatives_are_uniform() -> None:
    rng = np.random.default_rng(1)
    counts = np.zeros(50)
    for _ in range(4000):
        counts[sample_rows(np.array([3, 20, 49]), num_rows=50, sample_rate=0.2, rng=rng)] += 1
    assert (counts[[3, 20, 49]] == 4000).all()
    others = np.delete(counts, [3, 20, 49])
    expected = 4000 * 7 / 47
    assert np.abs(others - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1 / 64, LOWEST_TEMPERATURE])
def test_loss_and_gradients_equal_torchs_cross_entropy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    proxies = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    proxies[0] = -embeddings[0]  # the widest span of logits
    labels = torch.arange(12)

    dense = [embeddings.clone().requires_grad_(), proxies.clone().requires_grad_()]
    expected = F.cross_entropy(F.normalize(dense[0]) @ F.normalize(dense[1]).T / temperature, labels)
    expected.backward()
    ours = [embeddings.float().requires_grad_(), proxies.float().requires_grad_()]
    loss = normalized_softmax_loss(*ours, labels, temperature=temperature)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for mine, exact in zip(ours, dense, strict=True):
        scale = exact.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-5, atol=1e-5 * scale)


def test_loss_is_float32_under_autocast() -> None:
    embeddings, proxies = torch.randn(4, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = normalized_softmax_loss(embeddings, proxies, torch.arange(4))
    assert mixed == normalized_softmax_loss(embeddings, proxies, torch.arange(4))


def test_loss_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match=r"columns_B has 5 entries, expected world size 1 x 4"):
        normalized_softmax_loss(torch.randn(4, 8), torch.randn(6, 8), torch.arange(5))
    with pytest.raises(ValueError, match=r"temperature 0.01 is below"):
        normalized_softmax_loss(torch.randn(4, 8), torch.randn(6, 8), torch.arange(4), temperature=0.01)


def test_labels_out_of_range_are_refused() -> None:
    matrix = ProxyMatrix(Partition(6), 8, seed=0, temperature=0.05, sample_rate=1.0)
    matrix.start_optimizer(momentum=0.9, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"labels span 0 to 6 in step 3, but there are 6 classes"):
        matrix.loss(torch.randn(2, 8), np.array([0, 6]), step=3)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 1e-2), (0.0, 1e-2), (0.9, 0.0)])
def test_sparse_updates_follow_dense_sgd(momentum: float, weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps on a few rows each, under a schedule with warm-up and a step, through several tables of history."""
    monkeypatch.setattr(DeferredSGD, "HISTORY", 64)
    rng = np.random.default_rng(0)
    initial = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    dense = initial.double().requires_grad_()
    reference = torch.optim.SGD([dense], lr=1.0, momentum=momentum, weight_decay=weight_decay)
    ours = DeferredSGD(initial.clone(), momentum=momentum, weight_decay=weight_decay)
    for step in range(200):
        lr = 0.1 * min(1.0, (step + 1) / 20) * (1.0 if step < 120 else 0.1)
        rows = torch.from_numpy(np.sort(rng.choice(30, 3, replace=False)))
        ours.catch_up(rows)
        torch.testing.assert_close(ours.weight_CD[rows].double(), dense.detach()[rows], rtol=1e-5, atol=1e-5)
        grad = torch.from_numpy(rng.normal(size=(3, 4)))
        dense.grad = torch.zeros_like(dense).index_copy(0, rows, grad)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        ours.step(rows, grad.float(), lr=lr)
    ours.catch_up_all()
    torch.testing.assert_close(ours.weight_CD.double(), dense.detach(), rtol=1e-5, atol=1e-5)
    if momentum:
        velocity = reference.state[dense]["momentum_buffer"]
        torch.testing.assert_close(ours.velocity_CD.double(), velocity, rtol=1e-5, atol=1e-5)
