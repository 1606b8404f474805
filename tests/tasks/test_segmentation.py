"""UperNet: sizes, its loss, and what cannot be built."""

from __future__ import annotations

import builtins

import pytest
import torch
from helpers import images
from torch.nn import functional as F

from overlock.segmentation import UperNet, segmentation_loss, upernet

CLASSES = 5


def build(backbone="overlock_atto", **options):
    torch.manual_seed(0)
    return upernet(backbone, num_classes=CLASSES, hidden_channels=16, **options)


@pytest.mark.parametrize("size", [(64, 64), (65, 130), (200, 70)])
@pytest.mark.parametrize("backbone", ["overlock_atto", "convnext_atto"])
def test_sizes(backbone, size):
    """Logits of every pixel; in training those of the auxiliary head beside."""
    model, x = build(backbone), images(2, 3, *size)
    main, auxiliary = model.train()(x)
    assert main.shape == auxiliary.shape == (2, CLASSES, *size)
    labels = torch.randint(0, CLASSES, (2, *size), generator=torch.Generator().manual_seed(0))
    segmentation_loss((main, auxiliary), labels).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 0.9 * len(list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    with torch.no_grad():
        assert model.eval()(x).shape == (2, CLASSES, *size)


def test_one_image_to_train_on():
    """Whose pooled map of one pixel has no variance."""
    main, auxiliary = build().train()(images(1, 3, 64, 64))
    (main.square().mean() + auxiliary.square().mean()).backward()
    assert main.isfinite().all()


def test_loss():
    """The mean over the pixels that count, and nothing where none does."""
    main, auxiliary = images(2, CLASSES, 6, 7, seed=1), images(2, CLASSES, 6, 7, seed=2)
    labels = torch.randint(0, CLASSES, (2, 6, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -1
    each = [F.cross_entropy(x, labels, ignore_index=-1) for x in (main, auxiliary)]
    torch.testing.assert_close(segmentation_loss(main, labels), each[0])
    torch.testing.assert_close(segmentation_loss((main, auxiliary), labels), each[0] + 0.4 * each[1])
    assert segmentation_loss((main, auxiliary), torch.full_like(labels, -1)) == 0


def test_heads_are_as_the_paper_says():
    """512 channels, an auxiliary head of 256 on the stride-16 feature, dropout of 0.1 before both classifiers."""
    model = upernet("overlock_atto", num_classes=CLASSES)
    assert isinstance(model, UperNet)
    assert model.decode_head.fpn_bottleneck.conv.out_channels == 512
    aux = model.auxiliary_head
    assert aux.convs[0].conv.in_channels == int(model.backbone.feature_info[2]["num_chs"])
    assert aux.convs[0].conv.out_channels == 256
    assert [head.classifier[0].p for head in (model.decode_head, aux)] == [0.1, 0.1]


def test_what_cannot_be_built(monkeypatch):
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        upernet("overlock_atto", num_classes=1)
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("transformers"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'overlock\[segment\]'"):
        build()
