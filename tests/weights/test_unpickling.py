"""Checkpoints as trainers write them: what is read, what is left out, and what is refused by name."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import pickle
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import timm
import torch
from helpers import randomise
from timm.utils import CheckpointSaver, ModelEmaV3

from overlock.checkpoints import load_model, load_record
from overlock.weights.unpickling import read_saved


@pytest.fixture(scope="module")
def network():
    return randomise(timm.create_model("overlock_atto", num_classes=7, stem_stride=2), 1)


def arguments(model, **changes):
    """Those of timm's train.py that tell a network and its images, and some of other trainers."""
    settings = dict(
        model=model, num_classes=None, in_chans=None, model_kwargs={}, gp=None, img_size=64, input_size=None, mean=None,
        std=None, interpolation="bilinear", crop_pct=0.9, lr=0.1, output=pathlib.Path("runs"), amp=True,
    )  # fmt: skip
    return argparse.Namespace(**settings | changes)


def save_by_timm(folder, network, args, average=None):
    """What timm's train.py leaves."""
    saver = CheckpointSaver(
        network, torch.optim.AdamW(network.parameters()), args=args, model_ema=average,
        checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(0, metric=np.float64(81.5))
    saver.save_recovery(0, 3)


FILES = ("last.pth.tar", "checkpoint-0.pth.tar", "model_best.pth.tar", "recovery-0-3.pth.tar")


def test_timm_checkpoints_tell_the_network_and_prefer_the_average(network, tmp_path):
    average = randomise(ModelEmaV3(network), 2)
    args = arguments("overlock_atto", model_kwargs=dict(stem_stride=2, drop_rate=0.1), mean=(0.5,), std=[0.2])
    save_by_timm(tmp_path, network, args, average)
    for name in FILES:
        loaded, record = load_model(tmp_path / name)
        assert load_record(tmp_path / name) == record
        assert record.model == "overlock_atto"
        assert record.model_args["stem_stride"] == 2
        assert "drop_rate" not in record.model_args
        assert record.preprocessing == dict(
            input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=0.9
        )
        found = loaded.state_dict()
        for key, tensor in average.module.state_dict().items():
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(("noted", "channels"), [("test_convnext.r160_in1k", 3), ("test_resnet", 1)])
def test_timm_checkpoints_of_other_families(noted, channels, tmp_path):
    network = randomise(timm.create_model(noted, num_classes=5, in_chans=channels), 3)
    save_by_timm(tmp_path, network, arguments(noted))
    loaded, record = load_model(tmp_path / "last.pth.tar")
    assert record.model == noted
    assert record.model_args == dict(num_classes=5, in_chans=channels)
    assert len(record.classes) == 5
    assert record.preprocessing["input_size"] == (channels, 64, 64)
    assert len(record.preprocessing["mean"]) == channels
    x = torch.rand(1, channels, 64, 64)
    assert torch.equal(loaded(x), network.eval()(x))


def test_a_name_that_the_weights_do_not_bear_out(network, tmp_path):
    save_by_timm(tmp_path, network, arguments("test_convnext"))
    with pytest.raises(ValueError, match=r"last\.pth\.tar: these are not the weights of test_convnext but of OverLoCK"):
        load_model(tmp_path / "last.pth.tar")
    save_by_timm(tmp_path, network, arguments("hf_hub:someone/something"))
    assert load_model(tmp_path / "last.pth.tar")[1].model == "overlock_atto"  # told from the shapes


class HistoryBuffer:
    """As mmengine's: arrays, and its own methods by name."""

    def __init__(self):
        self._log_history = np.array([1.5, 1.25])
        self._statistics_methods = OrderedDict(min=HistoryBuffer.minimum)

    def minimum(self):
        return self._log_history.min()


@pytest.fixture
def mmengine(monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for thing in (HistoryBuffer, HistoryBuffer.minimum):
        monkeypatch.setattr(thing, "__module__", module.__name__)


def test_checkpoints_of_other_trainers(network, mmengine, tmp_path):
    state = network.state_dict()
    files = dict(
        mmengine=dict(state_dict=state, message_hub=dict(log_scalars=OrderedDict(loss=HistoryBuffer()))),
        lightning={"state_dict": {f"model.{k}": t for k, t in state.items()}, "pytorch-lightning_version": "2.5"},
        deepspeed=dict(module={f"_orig_mod.module.{k}": t for k, t in state.items()}, ds_version="0.16"),
        mae=dict(model=state, scaler={}, args=arguments("overlock_atto", input_size=96), epoch=np.int64(3)),
        others=dict(state_dict=state, when=datetime.datetime.now(), counts=defaultdict(list, a=[1])),
    )
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        loaded, record = load_model(tmp_path / f"{name}.pth")
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items()), name
        assert record.preprocessing["input_size"] == ((3, 96, 96) if name == "mae" else (3, 224, 224))


def test_settings_are_read_and_the_rest_is_left_out(tmp_path):
    saved = dict(args=argparse.Namespace(a=1, out=pathlib.Path("x")), counts=defaultdict(int, b=2), f=np.float32(1))
    torch.save(saved, tmp_path / "x.pth")
    read = read_saved(tmp_path / "x.pth")
    assert vars(read["args"]) == dict(a=1, out=pathlib.PurePosixPath("x"))
    assert read["counts"] == dict(b=2)
    assert not isinstance(read["f"], np.generic)


class Command:
    """What pickle would run."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda network: network, r"overlock\.\w+\.\w+\.\w+"),
        (lambda network: dict(state_dict=network.state_dict(), x=Command()), r"posix\.system"),
        (lambda network: dict(state_dict=network.state_dict(), x=eval), r"eval"),
        (lambda network: dict(state_dict=network.state_dict(), x=types.SimpleNamespace()), r"types\.SimpleNamespace"),
    ],
    ids=["network", "command", "built-in", "unknown"],
)
def test_other_types_are_named_in_one_sentence(make, named, zipped, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(make(network), "x.pth", _use_new_zipfile_serialization=zipped)
    sentence = rf"^x\.pth: not a file of weights alone: it holds {named}.*state_dict"
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model("x.pth")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not pathlib.Path("ran").exists()


def test_getattr_is_not_called(tmp_path):
    """mmengine's files name it; what it would be asked for is never looked up."""

    class Asks:
        def __reduce__(self):
            return getattr, (argparse.Namespace, "__init__")

    torch.save(dict(x=Asks()), tmp_path / "x.pth")
    assert type(read_saved(tmp_path / "x.pth")["x"]).__name__ == "LeftOut"


def test_a_script_and_a_plain_pickle(tmp_path):
    with pytest.warns((FutureWarning, DeprecationWarning)):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: not a file of weights alone: it holds a program of TorchScript"):
        load_model(tmp_path / "x.pt")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(dict(a=1)))
    with pytest.raises(ValueError, match=r"x\.pkl: not a readable checkpoint"):
        load_model(tmp_path / "x.pkl")
