"""timm's own scripts on our models: how they find them, and what their training leaves."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint

from overlock.checkpoints import load_model, load_record
from overlock.weights.unpickling import read_saved

STORED = Path(__file__).parent / "assets" / "timm_last.pth.tar.xz"
"""``last.pth.tar`` of timm's train.py, as docs/training.md says how, of a narrow overlock_atto with one channel."""


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.pth.tar"
    path.write_bytes(lzma.decompress(STORED.read_bytes()))
    return path


def test_a_checkpoint_of_timm_s_own_training(checkpoint):
    """The network that the script was told to build, with the averaged weights, gives what timm's loading gives."""
    network, record = load_model(checkpoint)
    saved = read_saved(checkpoint)
    arguments = vars(saved["args"])
    assert saved.keys() >= {"optimizer", "state_dict", "state_dict_ema", "args", "arch", "epoch", "metric"}
    assert (arguments["amp_dtype"], arguments["layer_decay"], arguments["grad_checkpointing"]) == (
        "bfloat16",
        0.8,
        True,
    )
    shape = dict(arguments["model_kwargs"], in_chans=1, num_classes=2)
    assert record.model == "overlock_atto"
    assert record.model_args == dict(shape, deploy=False, aux_head=False)
    assert record.preprocessing == dict(
        input_size=(1, 64, 64), mean=(0.45,), std=(0.23,), interpolation="bicubic", crop_pct=0.925
    )
    assert load_record(checkpoint) == record

    x = torch.rand(2, 1, 64, 64)
    outputs = {}
    for average in (True, False):
        reference = timm.create_model("overlock_atto", **shape).eval()
        load_checkpoint(reference, str(checkpoint), use_ema=average)
        outputs[average] = reference(x)
    assert torch.equal(network(x), outputs[True])
    assert not torch.equal(outputs[True], outputs[False])


def test_a_shape_that_no_variant_has_is_told(checkpoint, tmp_path):
    torch.save(read_saved(checkpoint)["state_dict"], tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth: these weights fit none of overlock_atto, .*overlock_b"):
        load_model(tmp_path / "plain.pth")


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (dict(dims=(4, 4)), r"dims must be 4 whole numbers, as \(24, 40, 64, 96\) of overlock_atto, got \(4, 4\)"),
        (dict(overview_depth=(1,)), r"overview_depth must be one whole number, as 1 of overlock_atto, got \(1,\)"),
        (dict(focus_depths=(1, 0)), r"focus_depths must be whole and above zero, got \(1, 0\)"),
    ],
)
def test_shapes_that_are_none(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        timm.create_model("overlock_atto", **shape)


def test_shapes_as_keywords():
    """As timm's other families take them, from lists too, which is what JSON has."""
    network = timm.create_model(
        "overlock_atto", dims=[8, 8, 16, 16], base_depths=[1, 1, 1], groups=[2, 2], num_classes=3
    )
    assert network.variant.dims == (8, 8, 16, 16)
    assert [info["num_chs"] for info in network.feature_info] == [8, 8, 20, 20]
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def run(folder, *arguments):
    command = [sys.executable, "-m", "overlock.run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_script_finds_our_models(tmp_path):
    """As Python itself runs it: its arguments, its folder for imports, its exit code."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("NAME = 'overlock_atto'\n")
    (tmp_path / "sub" / "script.py").write_text(
        "import sys, timm, beside\n"
        "if __name__ == '__main__':\n"
        "    print(timm.is_model(beside.NAME), sys.argv)\n"
        "    sys.exit(3)\n"
    )
    done = run(tmp_path, "sub/script.py", "--epochs", "2")
    assert done.stdout == "True ['sub/script.py', '--epochs', '2']\n", done.stderr
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(("given", "said"), [((), "no script is given"), (("x.py",), "x.py: no such file")])
def test_no_script(given, said, tmp_path):
    done = run(tmp_path, *given)
    assert done.returncode == 1
    assert done.stderr == f"{said}; use: python -m overlock.run SCRIPT.py [its arguments]\n"
