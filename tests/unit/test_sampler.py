from typing import Any

import numpy as np
import pytest

from nsl_dist.data.sampler import ClassBalancedPlan

SIZES = np.array([3, 7, 1, 12, 5, 9, 2, 8, 4, 6, 11, 10])


def plan(**overrides: Any) -> ClassBalancedPlan:
    settings: dict[str, Any] = {"class_sizes": SIZES, "batch_size": 20, "images_per_class": 5, "seed": 3}
    return ClassBalancedPlan(**settings | overrides)


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 10])
def test_parts_of_any_number_of_workers_make_the_same_batch(world_size: int) -> None:
    for step in range(20):
        whole = plan().batch(step)
        parts = [plan().part(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(part.labels) for part in parts} == {20 // world_size}
        np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)


def test_batches_follow_the_papers_rule() -> None:
    for step in range(50):
        batch = plan().batch(step)
        classes, counts = np.unique(batch.labels, return_counts=True)
        assert len(classes) == 4
        assert set(counts) == {5}
        assert (batch.indices < SIZES[batch.labels]).all()
        assert (batch.indices >= 0).all()


def test_batches_of_any_classes_have_each_image_once_and_all_alike() -> None:
    any_classes = plan(images_per_class=None, left_out=(3, 11))
    counts = np.zeros((len(SIZES), SIZES.max()), dtype=int)
    for step in range(400):
        batch = any_classes.batch(step)
        assert (batch.indices < SIZES[batch.labels]).all()
        assert len(set(zip(batch.labels.tolist(), batch.indices.tolist(), strict=True))) == 20
        np.add.at(counts, (batch.labels, batch.indices), 1)
    assert not counts[[3, 11]].any()
    drawn = counts[np.arange(SIZES.max()) < np.where(np.isin(np.arange(len(SIZES)), (3, 11)), 0, SIZES)[:, None]]
    assert len(drawn) == SIZES.sum() - 22
    assert 0.7 < drawn.min() / drawn.mean() <= drawn.max() / drawn.mean() < 1.3


def test_steps_and_seeds_differ_and_repeat() -> None:
    assert (plan().batch(5).labels == plan().batch(5).labels).all()
    assert (plan().batch(5).indices != plan().batch(6).indices).any()
    assert (plan().batch(5).indices != plan(seed=4).batch(5).indices).any()


def test_every_class_is_drawn() -> None:
    drawn = np.concatenate([plan().batch(step).labels for step in range(100)])
    assert set(drawn.tolist()) == set(range(len(SIZES)))


def test_classes_that_are_left_out_are_never_drawn() -> None:
    left_out = plan(left_out=(0, 4, 5, 11))
    drawn = np.concatenate([left_out.batch(step).labels for step in range(100)])
    assert set(drawn.tolist()) == {1, 2, 3, 6, 7, 8, 9, 10}
    assert left_out.steps_per_epoch == plan().steps_per_epoch
    with pytest.raises(ValueError, match="needs 4 classes, but the training split has 3"):
        plan(left_out=tuple(range(9)))


def test_epoch_is_floor_of_images_over_batch() -> None:
    assert plan().steps_per_epoch == 78 // 20


def test_too_few_classes() -> None:
    with pytest.raises(ValueError, match="needs 20 classes, but the training split has 12"):
        plan(images_per_class=1)


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="larger than the training split of 78"):
        plan(batch_size=100, images_per_class=25)
