"""Batches follow from seed, epoch and place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import make_classes, make_image

from overlock.data import Augmentation, load_data, make_eval_transform, make_train_transform
from overlock.data.datasets import Sample
from overlock.data.images import Samples
from overlock.data.loaders import (
    Batch,
    OnImage,
    Order,
    Share,
    TrainBatches,
    as_lists,
    collate_training,
    make_test_loader,
)

RGB = dict(input_size=(3, 24, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), interpolation="bilinear", crop_pct=1.0)
SAMPLES = Samples([(make_image("red", i), i) for i in range(23)])
TRANSFORM = OnImage(make_train_transform(RGB, Augmentation(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5)))
TEST_TRANSFORM = OnImage(make_eval_transform(RGB))


def batches(share: Share, *, seed=0, repeats=1, workers=0, epoch=0, first=0, salt=0) -> list[Batch]:
    loader = TrainBatches(SAMPLES, TRANSFORM, share, seed=seed, repeats=repeats, workers=workers)
    return list(loader.epoch(epoch, first=first, salt=salt))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in zip(a, b, strict=True)
    )


ONE = Share(micro_batch=4)


def test_an_epoch_can_be_begun_anywhere():
    whole = batches(ONE, epoch=3)
    assert len(whole) == 5
    for first in range(6):
        assert same(batches(ONE, epoch=3, first=first), whole[first:])
    assert same(batches(ONE, epoch=3, first=1, workers=2), whole[1:])


def test_epochs_seeds_and_salts_differ():
    whole = batches(ONE)
    assert not same(whole, batches(ONE, epoch=1))
    assert not same(whole, batches(ONE, seed=1))
    salted = batches(ONE, salt=1)
    assert not same(whole, salted)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(whole, salted, strict=True))


def test_an_image_is_seen_once_an_epoch():
    labels = torch.cat([batch.labels for batch in batches(ONE)])
    assert len(set(labels.tolist())) == 20


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_the_same_images_however_they_are_shared_out(world, accumulate):
    whole = batches(Share(micro_batch=4 * world * accumulate))
    parts = [batches(Share(rank=rank, world=world, micro_batch=4, accumulate=accumulate)) for rank in range(world)]
    for number, batch in enumerate(whole):
        got = [part[number * accumulate + step] for part in parts for step in range(accumulate)]
        order = torch.cat([g.labels for g in got]).argsort()
        expected = batch.labels.argsort()
        assert torch.equal(torch.cat([g.labels for g in got])[order], batch.labels[expected])
        assert torch.equal(torch.cat([g.images for g in got])[order], batch.images[expected])


def test_repeated_augmentation_changes_an_image_in_several_ways():
    whole = batches(ONE, repeats=2)
    labels = torch.cat([batch.labels for batch in whole])
    assert len(whole) == 5
    assert all(count == 2 for count in labels.bincount().tolist() if count)
    images = torch.cat([batch.images for batch in whole])
    first, second = torch.where(labels == labels[0])[0]
    assert not torch.equal(images[first], images[second])


def test_fewer_images_than_a_batch_are_gone_through_again():
    order = Order(5, 12, 1, repeats=1, seed=0)
    assert sorted(order.indices(0).tolist()) != order.indices(0).tolist()
    assert np.bincount(order.indices(0)).min() >= 2


def test_an_epoch_may_be_longer_or_shorter_than_the_images():
    """Each image comes as often as any other, but for one; and two epochs are in different orders."""
    for steps in (3, 16):
        loader = TrainBatches(SAMPLES, TRANSFORM, ONE, seed=0, epoch_steps=steps)
        assert loader.steps == steps
        labels = [torch.cat([batch.labels for batch in loader.epoch(epoch)]) for epoch in range(2)]
        counts = labels[0].bincount(minlength=23)
        assert int(counts.sum()) == 4 * steps
        assert int(counts.max() - counts.min()) == 1
        assert not torch.equal(*labels)


def test_samples_of_several_sizes_stay_lists():
    contents = [(torch.zeros(3, side, 8), dict(boxes=torch.zeros(side, 4))) for side in (4, 6)]
    batch = collate_training([Sample(content) for content in contents], join=as_lists)
    assert [len(target["boxes"]) for target in batch.labels] == [4, 6]
    assert [tuple(image.shape) for image in batch.images] == [(3, 4, 8), (3, 6, 8)]


@pytest.fixture
def damaged(tmp_path):
    """23 images, each with its number as its label; every third cannot be read."""
    paths = [tmp_path / f"{i}.png" for i in range(23)]
    for i, path in enumerate(paths):
        make_image("red", i).save(path)
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:60])
    return Samples([(path, i) for i, path in enumerate(paths)])


def drawn(source, share=ONE, *, workers=0, first=0, epoch=0) -> list[Batch]:
    return list(TrainBatches(source, TRANSFORM, share, seed=0, workers=workers).epoch(epoch, first=first))


@pytest.mark.parametrize("size", [1, 4])
def test_another_image_stands_in_for_an_unreadable_one(size, damaged):
    """Also in a batch of one; all others stay as they are; each is told of with its name."""
    share = Share(micro_batch=size)
    batches, whole = drawn(damaged, share), drawn(SAMPLES, share)
    got, undamaged = (torch.cat([batch.labels for batch in part]) for part in (batches, whole))
    assert not any(label % 3 == 0 for label in got.tolist())
    kept = undamaged % 3 != 0
    assert torch.equal(got[kept], undamaged[kept])
    told = {problem for batch in batches for problem in batch.unreadable}
    drawn_bad = {int(label) for label in undamaged[~kept]}
    assert drawn_bad <= {int(problem.partition(".png")[0].rpartition("/")[2]) for problem in told}


def test_stand_ins_are_the_same_from_any_step_and_in_any_process(damaged):
    one = Share(micro_batch=1)
    whole = drawn(damaged, one, epoch=2)
    for first in (1, 10, 22):
        assert same(drawn(damaged, one, epoch=2, first=first), whole[first:])
    assert same(drawn(damaged, one, epoch=2, workers=2), whole)
    halves = [drawn(damaged, Share(rank=rank, world=2, micro_batch=1), epoch=2) for rank in range(2)]
    assert same([half[step] for step in range(11) for half in halves], whole[:22])


def test_a_batch_is_empty_where_nothing_can_be_read(tmp_path):
    nothing = Samples([(tmp_path / f"{i}.png", i) for i in range(5)])
    batch = drawn(nothing)[0]
    assert len(batch.labels) == 0
    assert len(set(batch.unreadable)) == 5


class Picky:
    """A preparation that refuses images with these labels, as a transform may that an image is too narrow for."""

    def __init__(self, *refused: int, error: type[Exception] = ValueError):
        self.refused, self.error = refused, error

    def __call__(self, image, label):
        if label in self.refused:
            raise self.error("height and width must be > 0")
        return TRANSFORM(image, label)


@pytest.fixture
def files(tmp_path):
    """23 images, each with its number as its label."""
    paths = [tmp_path / f"{i}.png" for i in range(23)]
    for i, path in enumerate(paths):
        make_image("red", i).save(path)
    return Samples([(path, i) for i, path in enumerate(paths)])


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_image_that_cannot_be_prepared_is_named_and_another_stands_in(error, files):
    batches = list(TrainBatches(files, Picky(5, error=error), ONE, seed=0).epoch(0))
    whole = drawn(files)
    labels, undamaged = (torch.cat([batch.labels for batch in part]) for part in (batches, whole))
    assert 5 not in labels.tolist()
    assert torch.equal(labels[undamaged != 5], undamaged[undamaged != 5])
    (told,) = {problem for batch in batches for problem in batch.unreadable}
    assert told.startswith(f"{files.name(5)}: the image cannot be prepared (height and width must be > 0)")
    tests = list(make_test_loader(files, Picky(5), batch_size=4))
    assert [problem for batch in tests for problem in batch.unreadable] == [told]
    assert sum(len(batch.labels) for batch in tests) == 22


def test_a_preparation_that_fails_for_all_images_is_one_sentence(files):
    fault = Picky(*range(23))
    match = r"\.png: the image cannot be prepared, nor can others \(height .*\); check the settings"
    with pytest.raises(ValueError, match=match):
        next(TrainBatches(files, fault, ONE, seed=0).epoch(0))
    with pytest.raises(ValueError, match=match):
        next(iter(make_test_loader(files, fault, batch_size=4)))


def test_images_of_a_stream_that_cannot_be_prepared(tmp_path):
    pytest.importorskip("webdataset")
    from overlock.data.shards import pack

    pack(make_classes(tmp_path / "data", 20), tmp_path / "shards")
    data = load_data(f"wds:{tmp_path / 'shards'}")
    seen = list(TrainBatches(data.train, Picky(2), ONE, seed=0, workers=1).epoch(0))
    assert all(len(batch.labels) == 4 and 2 not in batch.labels.tolist() for batch in seen)
    problems = {problem for batch in seen for problem in batch.unreadable}
    assert problems
    assert all("cannot be prepared" in problem and "shards" in problem for problem in problems)
    with pytest.raises(ValueError, match="nor can others"):
        list(TrainBatches(data.train, Picky(0, 1, 2), ONE, seed=0, workers=1).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_is_tested_once(workers):
    labels = [
        label
        for rank in range(3)
        for batch in make_test_loader(SAMPLES, TEST_TRANSFORM, batch_size=4, rank=rank, world=3, workers=workers)
        for label in batch.labels.tolist()
    ]
    assert sorted(labels) == list(range(23))


def test_streams_can_be_begun_anywhere(tmp_path):
    pytest.importorskip("webdataset")
    from overlock.data.shards import pack

    pack(make_classes(tmp_path / "data", 20), tmp_path / "shards", shard_images=6)
    data = load_data(f"wds:{tmp_path / 'shards'}")
    assert (len(data.train), len(data.test), data.classes) == (48, 12, ("blue", "green", "red"))

    def stream(**where) -> list[Batch]:
        return list(TrainBatches(data.train, TRANSFORM, ONE, seed=0, workers=2).epoch(**where))

    whole = stream(epoch=1)
    assert len(whole) == 12
    assert same(stream(epoch=1, first=7), whole[7:])
    assert not same(stream(epoch=2), whole)
    tests = list(make_test_loader(data.test, TEST_TRANSFORM, batch_size=5, workers=1))
    assert torch.cat([batch.labels for batch in tests]).bincount().tolist() == [4, 4, 4]


def test_a_damaged_image_in_a_shard_is_noted(tmp_path):
    pytest.importorskip("webdataset")
    from overlock.data.shards import pack

    root = make_classes(tmp_path / "data", 20)
    for file in sorted((root / "red").iterdir())[:6]:
        file.write_bytes(file.read_bytes()[:60])
    pack(root, tmp_path / "shards")
    data = load_data(f"wds:{tmp_path / 'shards'}")
    loader = TrainBatches(data.train, TRANSFORM, ONE, seed=0, workers=1)
    seen = list(loader.epoch(0))
    assert any(batch.unreadable for batch in seen)
    assert all(len(batch.labels) == 4 for batch in seen)
    assert "webdataset error" in next(batch.unreadable[0] for batch in seen if batch.unreadable)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("damage", [range(6), range(20)])
def test_the_next_image_of_a_stream_stands_in(batch, damage, tmp_path):
    """Whole batches of readable images from any step on, also where the stream ends with unreadable ones."""
    pytest.importorskip("webdataset")
    from overlock.data.shards import pack

    root = make_classes(tmp_path / "data", 20)
    for file in [sorted((root / "red").iterdir())[i] for i in damage]:
        content = bytearray(file.read_bytes())
        content[45:] = bytes(len(content) - 45)  # the head stays, so that only decoding fails
        file.write_bytes(content)
    pack(root, tmp_path / "shards", shard_images=60)
    data = load_data(f"wds:{tmp_path / 'shards'}")
    share = Share(micro_batch=batch)

    def stream(**where) -> list[Batch]:
        return list(TrainBatches(data.train, TRANSFORM, share, seed=0, workers=2).epoch(**where))

    whole = stream(epoch=1)
    assert len(whole) == 48 // batch
    assert all(len(part.labels) == batch for part in whole)
    assert any(part.unreadable for part in whole)
    red = sum(int((part.labels == data.classes.index("red")).sum()) for part in whole)
    assert red == 0 if len(damage) == 20 else red > 0
    for first in (1, 7, 48 // batch - 1):
        assert same(stream(epoch=1, first=first), whole[first:])
