"""The command: what it prints, and one sentence for every fault."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from helpers import images, randomise
from pictures import COLOURS, make_classes, make_image
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from overlock.checkpoints import MODEL_FILE, Record, load_classifier, save_model
from overlock.cli import main, make_parser
from overlock.cli.lists import join_lists
from overlock.weights import to_official

PREPROCESSING = dict(
    input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bicubic", crop_pct=1.0
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run, as if trained, and an image."""
    folder = tmp_path_factory.mktemp("run")
    network = randomise(timm.create_model("overlock_atto", num_classes=3))
    record = Record(
        model="overlock_atto", model_args={"num_classes": 3}, classes=tuple(COLOURS), preprocessing=PREPROCESSING
    )
    save_model(folder / MODEL_FILE, network.state_dict(), record)
    make_image("red", 0).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """A file as the authors release it, of the smallest size."""
    network = randomise(timm.create_model("overlock_atto", num_classes=5, aux_head=True), seed=3)
    path = tmp_path_factory.mktemp("official") / "atto.pth"
    torch.save({"state_dict_ema": to_official(network.state_dict())}, path)
    return path, network


def fails(capsys, *arguments: object) -> str:
    """The sentence that a command line with a fault gets."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def succeeds(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err.strip() == ""  # earlier versions of rich end a progress bar with an empty line
    return out


QUICK = ("--model", "overlock_atto", "--image-size", 32, "--epochs", 1, "--runtime.workers", 0)


def test_train_evaluate_predict(tmp_path, capsys):
    root = make_classes(tmp_path / "data", 5)
    out = succeeds(capsys, "train", "small", "--data", root, "--output", tmp_path / "run", *QUICK, "--batch_size", 4)
    assert "12 images to train on, 3 held out, 3 classes" in out
    assert "epoch   1/1  loss " in out
    assert "test accuracy" in out
    assert "\x1b" not in out  # no colours where there is no terminal
    out = succeeds(capsys, "predict", root / "red", "--checkpoint", tmp_path / "run", "--json", "--top", 2)
    predictions = json.loads(out)
    assert [p["source"] for p in predictions] == [str(root / "red" / f"{i}.png") for i in range(5)]
    assert all(len(p["labels"]) == len(p["probabilities"]) == 2 for p in predictions)
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    logged = float(dict(zip(log[0].split(","), log[1].split(","), strict=True))["top1"])
    out = succeeds(
        capsys, "evaluate", tmp_path / "run", tmp_path / "run" / "best.safetensors", "--data", root, "--held_out",
        "--json", "--workers", 0, "--save", tmp_path / "report",
    )  # fmt: skip
    first, second = json.loads(out)
    assert first["top1"] == second["top1"] == pytest.approx(logged)
    assert first["images"] == 3
    assert len(list((tmp_path / "report").iterdir())) == 4
    words = ("evaluate", tmp_path / "run", "--data", root, "--save", tmp_path / "report")
    assert "pass --overwrite" in fails(capsys, *words)  # before it evaluates
    twice = (words[0], words[1], *words[1:], "--overwrite")
    assert "has written it already" in fails(capsys, *twice)
    table = succeeds(capsys, "evaluate", tmp_path / "run", "--data", root, "--workers", 0)
    assert "15 images of 3 classes" in table


def test_settings_of_a_run_can_be_given_again(tmp_path, capsys):
    settings = dict(data=str(make_classes(tmp_path / "data", 3)), output=str(tmp_path / "a"), model="overlock_atto")
    settings |= dict(image_size=32, epochs=1, batch_size=4, runtime=dict(workers=0), augment=dict(hflip=False))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    succeeds(capsys, "train", "--config", tmp_path / "train.yaml", "--optim.base_batch_size", 4)
    saved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert saved["runtime"] | settings["runtime"] == saved["runtime"]
    assert saved["augment"]["hflip"] is False
    assert "or pass --resume" in fails(capsys, "train", "--config", tmp_path / "a" / "config.yaml")
    succeeds(capsys, "train", "--config", tmp_path / "a" / "config.yaml", "--seed", 5, "--overwrite")
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text()) == saved | {"seed": 5}


def test_pack_then_train(tmp_path, capsys):
    pytest.importorskip("webdataset")
    root = make_classes(tmp_path / "data", 5)
    assert "4 shards" in succeeds(capsys, "pack", root, tmp_path / "shards", "--shard_images", 4)
    out = succeeds(
        capsys, "train", "small", "--data", f"wds:{tmp_path / 'shards'}", "--output", tmp_path / "run", *QUICK,
        "--batch_size", 4,
    )  # fmt: skip
    assert "12 images to train on, 3 held out, 3 classes" in out
    assert "not empty" in fails(capsys, "pack", root, tmp_path / "shards")
    assert "reads the files" in fails(capsys, "pack", root, root, "--overwrite")
    succeeds(capsys, "pack", root, tmp_path / "shards", "--overwrite")


def test_a_run_writes_over_nothing_that_it_reads(run_folder, tmp_path, capsys):
    root = make_classes(tmp_path / "data", 2)
    words = ("train", "small", "--data", root, "--overwrite", *QUICK)
    assert "reads the files of this folder" in fails(capsys, *words, "--output", root)
    for weights in (run_folder, run_folder / MODEL_FILE):
        told = fails(capsys, *words, "--output", run_folder, "--weights", weights)
        assert "choose another" in told


def test_predict_prints_a_table_and_saves_a_picture(run_folder, tmp_path, capsys):
    image = run_folder / "image.png"
    out = succeeds(capsys, "predict", image, image, "--checkpoint", run_folder, "--save", tmp_path / "p.png")
    assert out.count("image.png") == 2
    assert all(colour in out for colour in COLOURS)
    assert "…" not in out
    assert Image.open(tmp_path / "p.png").format == "PNG"
    by_file = succeeds(capsys, "predict", image, "--checkpoint", run_folder / MODEL_FILE, "--json")
    by_folder = succeeds(capsys, "predict", image, "--checkpoint", run_folder, "--json")
    assert by_file == by_folder


def test_predict_without_a_checkpoint(default_file, run_folder, capsys):
    """The package's own weights answer; the line about them does not disturb the output."""
    image = str(run_folder / "image.png")
    assert main(["predict", image, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("using overlock_atto, trained on CIFAR-10, of the package itself")
    assert out == succeeds(capsys, "predict", image, "--checkpoint", default_file, "--json")
    assert all(name in err for name in json.loads(out)[0]["labels"])


def test_brackets_in_class_names_are_printed(run_folder, tmp_path, capsys):
    network, record = load_classifier(run_folder)
    odd = Record(
        model=record.model, model_args=record.model_args, classes=("[red]", "[/x]", "é"), preprocessing=PREPROCESSING
    )
    save_model(tmp_path / "m.safetensors", network.state_dict(), odd)
    out = succeeds(capsys, "predict", run_folder / "image.png", "--checkpoint", tmp_path / "m.safetensors")
    assert all(name in out for name in odd.classes)


@pytest.mark.parametrize(
    ("model", "size", "numbers"),
    [("overlock_xt", (), ("16.454", "2.6", "0.030")), ("overlock_atto", ("--image-size", "64", "96"), ("64 x 96",))],
)
def test_summary(capsys, model, size, numbers):
    out = succeeds(capsys, "summary", model, *size)
    for part in ("base_net", "overview_net", "focus_net", "head", "total", *numbers):
        assert part in out
    assert ("paper, Table 2" in out) == (model == "overlock_xt")


def test_a_missing_library(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.models.upernet.modeling_upernet", None)
    told = fails(capsys, "summary", "overlock_atto", "--task", "upernet")
    assert told == "error: UperNet needs transformers: pip install 'overlock[segment]'\n"


def test_convert_gives_the_same_network(official_file, tmp_path, capsys):
    path, network = official_file
    out = succeeds(capsys, "convert", path, tmp_path / "a.safetensors")
    assert "overlock_atto, 5 classes" in out
    converted, record = load_classifier(tmp_path / "a.safetensors")
    assert record.model_args["aux_head"]
    with torch.no_grad():
        x = images(2, 3, 32, 32)
        torch.testing.assert_close(converted(x), network(x))
    assert "pass --overwrite" in fails(capsys, "convert", path, tmp_path / "a.safetensors")
    for words in ((path, path), (tmp_path / "a.safetensors", tmp_path / "a.safetensors")):
        before = words[0].read_bytes()
        fails(capsys, "convert", *words, "--overwrite")
        assert words[0].read_bytes() == before
    succeeds(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--model", "overlock_atto")
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    succeeds(capsys, "convert", path, tmp_path / "a.safetensors", "--overwrite")


def test_options_of_earlier_names(official_file, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    target.touch()
    assert main(["convert", str(official_file[0]), str(target), "--force"]) == 0
    assert capsys.readouterr().err == "note: --force is now called --overwrite\n"
    assert load_classifier(target)[1].model == "overlock_atto"


def test_convert_the_merged_form(tmp_path, capsys):
    network = randomise(timm.create_model("overlock_atto", num_classes=4, in_chans=1, deploy=True))
    torch.save(to_official(network.state_dict()), tmp_path / "deploy.pth")
    succeeds(capsys, "convert", tmp_path / "deploy.pth", tmp_path / "a.safetensors")
    converted, record = load_classifier(tmp_path / "a.safetensors")
    assert record.model_args == dict(in_chans=1, num_classes=4, deploy=True, aux_head=False)
    with torch.no_grad():
        torch.testing.assert_close(converted(images(1, 1, 40, 40)), network(images(1, 1, 40, 40)))


def save_networks(folder, *seeds, model="overlock_atto", classes=("cat", "dog")):
    for seed in seeds:
        network = randomise(timm.create_model(model, num_classes=len(classes), in_chans=1), seed=seed)
        arguments = dict(num_classes=len(classes), in_chans=1)
        save_model(
            folder / f"{seed}.safetensors",
            network.state_dict(),
            Record(model=model, model_args=arguments, classes=classes),
        )
    return [folder / f"{seed}.safetensors" for seed in seeds]


def test_average(tmp_path, capsys):
    paths = save_networks(tmp_path, 1, 2, 3)
    out = succeeds(capsys, "average", *paths, "--output", tmp_path / "mean.safetensors")
    assert "the mean of 3 checkpoints of overlock_atto" in out
    network, record = load_classifier(tmp_path / "mean.safetensors")
    assert record.classes == ("cat", "dog")
    weights = [load_file(path) for path in paths]
    for name, value in network.state_dict().items():
        expected = torch.stack([state[name].double() for state in weights]).mean(0)
        torch.testing.assert_close(value, expected.to(value.dtype))
    assert "pass --overwrite" in fails(capsys, "average", *paths, "--output", tmp_path / "mean.safetensors")
    assert "reads it" in fails(capsys, "average", *paths, "--output", paths[1], "--overwrite")


def test_average_of_unlike_checkpoints(tmp_path, capsys):
    paths = save_networks(tmp_path, 1) + save_networks(tmp_path, 2, classes=("cat", "dog", "owl"))
    target = tmp_path / "mean.safetensors"
    assert "differs from" in fails(capsys, "average", *paths, "--output", target)
    assert "two checkpoints or more" in fails(capsys, "average", paths[0], "--output", target)
    assert not target.exists()


def test_predict_with_the_authors_file(official_file, run_folder, capsys):
    path, _ = official_file
    image = run_folder / "image.png"
    told = succeeds(capsys, "predict", image, "--checkpoint", path, "--model", "overlock_atto", "--json")
    assert told == succeeds(capsys, "predict", image, "--checkpoint", path, "--json")
    assert len(json.loads(told)[0]["labels"]) == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no command given; the commands are train, evaluate, predict"),
        (("trian",), "unknown command 'trian'; did you mean 'train'?"),
        (("train", "digits", "--epoch", "3"), "unknown option --epoch; did you mean --epochs?"),
        (("train", "digits", "--lr", "3"), "unknown option --lr; did you mean --optim.lr?"),
        (("train", "digits", "--optim.warmup", "3"), "unknown option --optim.warmup; did you mean --optim.warmup_"),
        (
            ("train", "digits", "--epochs=many"),
            "--epochs must be a whole number, got 'many'; see overlock train --help",
        ),
        (("train", "digits", "--optim.betas", "3"), "--optim.betas must be a list of 2, each a number, got '[3]'"),
        (("train", "digits", "--runtime.compile", "maybe"), "--runtime.compile must be true or false, got 'maybe'"),
        (("train", "digits", "--model_args", "x"), "--model_args must be a table of names and values, got 'x'"),
        (("predict", "a.png", "--threshold", "nan"), "--threshold must be a number or null, got 'nan'"),
        (("predict", "a.png", "--scales", "half"), "--scales must be a list, each of a number or null, got 'half'"),
        (("predict", "a.png", "--task", "mask"), "--task must be 'classify' or 'detect' or 'segment' or null, got"),
        (("predict", "a.png", "--precision", "fp8"), "--precision must be 'fp32' or 'bf16' or 'fp16', got 'fp8'"),
        (("predict", "a.png", "--batch_size", "1.5"), "--batch_size must be a whole number or null, got '1.5'"),
        (("train", "small"), "required: data"),
        (("train", "--data", "digits"), "no recipe given; the recipes are imagenet_xt"),
        (("train", "digit"), "unknown recipe 'digit'; did you mean 'digits'?"),
        (("train", "digits", "--epochs", "0"), "epochs must be a finite number at least 1, got 0"),
        (("train", "digits", "--augment.interpolation", "some"), "must be 'random' or 'bilinear' or 'bicubic', got"),
        (("train", "digits", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("train", "small", "--data", "nowhere"), "nowhere: no such folder"),
        (("train", "digits", "--model", "resnet81", "--stem_stride", "null"), "unknown model 'resnet81'; did you mean"),
        (("evaluate", "nowhere.pth", "--data", "nowhere"), "nowhere.pth: no such file"),
        (("evaluate", "overlock_t", "--data", "nowhere"), "nowhere: no such"),
        (("push", "nowhere", "me/it"), "nowhere: model.safetensors, config.json, README.md not found"),
        (("pack", "nowhere", "out"), "nowhere: no such folder"),
        (("summary", "overlock_x"), "unknown model 'overlock_x'; did you mean 'overlock_xt'?"),
        (("summary", "resnet18"), "unknown model 'resnet18'; the models are overlock_atto"),
        (("summary", "overlock_t", "--image-size", "8", "8"), "at least 32 x 32 pixels, got 8 x 8"),
        (("convert", "nowhere.pth", "out.safetensors"), "nowhere.pth: no such file"),
        (("convert", "nowhere.pth", "out.pth"), "out.pth: the name of a file of weights must end in .safetensors"),
        (("predict", "--checkpoint", "x"), "required: images"),
        (("predict", "a.png", "--model", "overlock_t"), "what a checkpoint holds; give one with --checkpoint"),
    ],
)
def test_faults_of_the_command_line(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_unknown_settings_in_a_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("data: digits\nepoch: 3\n")
    assert "unknown setting 'epoch'; did you mean epochs?" in fails(capsys, "train", "--config", tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("data: digits\noptim: {lrr: 3}\n")
    message = fails(capsys, "train", "--config", tmp_path / "a.yaml")
    assert "unknown setting 'optim.lrr'; did you mean optim.lr?" in message


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def test_foreign_and_damaged_checkpoints(run_folder, official_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = run_folder / "image.png"

    def refuse(name: str) -> str:
        message = fails(capsys, "predict", image, "--checkpoint", name)
        assert name in message
        assert fails(capsys, "convert", name, "out.safetensors") == message
        assert not (tmp_path / "out.safetensors").exists()
        return message

    (tmp_path / "short.safetensors").write_bytes((run_folder / MODEL_FILE).read_bytes()[:5000])
    assert "cut short" in refuse("short.safetensors")
    (tmp_path / "short.pth").write_bytes(official_file[0].read_bytes()[:5000])
    assert "cut short" in refuse("short.pth")
    (tmp_path / "text.pth").write_text("hello")
    refuse("text.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    refuse("evil.pth")
    assert not (tmp_path / "evil").exists()
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    assert "not the weights of an OverLoCK model" in refuse("other.pth")
    broken = {k: v for k, v in to_official(official_file[1].state_dict()).items() if k != "blocks1.0.dwconv.weight"}
    torch.save(broken, tmp_path / "part.pth")
    assert "1 missing (first: base_net.stages.0.blocks.0.local.weight)" in refuse("part.pth")
    assert "1 missing" in fails(capsys, "convert", "part.pth", "out.safetensors", "--model", "overlock_atto")
    (tmp_path / "empty").mkdir()
    assert "empty: no model.safetensors in this folder" in refuse("empty")
    refuse("nowhere.pth")


def test_wrong_model_for_a_checkpoint(run_folder, capsys):
    arguments = ("predict", run_folder / "image.png", "--checkpoint", run_folder, "--model", "overlock_t")
    assert "a checkpoint of overlock_atto, not of overlock_t" in fails(capsys, *arguments)


def test_bad_images(run_folder, tmp_path, capsys):
    (tmp_path / "a.png").write_text("not an image")
    assert main(["predict", str(tmp_path / "a.png"), "--checkpoint", str(run_folder), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["error"] == "not an image; replace or remove the file"
    assert "a.png: not an image; replace" in printed.err
    (tmp_path / "none").mkdir()
    assert "no images in this folder" in fails(capsys, "predict", tmp_path / "none", "--checkpoint", run_folder)
    image = run_folder / "image.png"
    assert "top" in fails(capsys, "predict", image, "--checkpoint", run_folder, "--top", 0)


def test_output_that_cannot_be_written(run_folder, official_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out.safetensors"
    assert "cannot write here" in fails(capsys, "convert", official_file[0], target)
    assert (
        main(["predict", str(run_folder / "image.png"), "--checkpoint", str(run_folder), "--save", f"{target}.png"])
        == 2
    )
    assert "cannot write here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def run(*arguments: object, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "overlock.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)


def test_as_a_process(tmp_path):
    done = run("train", "small", "--data", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    help_text = run("--help")
    assert help_text.returncode == 0
    assert all(
        name in help_text.stdout for name in ("train", "evaluate", "predict", "push", "summary", "average", "convert")
    )


@pytest.mark.parametrize(
    ("signum", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_signals_save_and_end(tmp_path, signum, code):
    """To the whole process group, as Ctrl-C and schedulers send them, so that the loading processes get them too."""
    root = make_classes(tmp_path / "data", 40)
    command = [
        sys.executable, "-m", "overlock.cli", "train", "small", "--data", str(root), "--output", str(tmp_path / "run"),
        "--model", "overlock_atto", "--image_size", "32", "--epochs", "1000", "--runtime.workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    time.sleep(0.2)
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err == ""
    assert "stopped and saved at epoch" in out
    assert "--resume" in out
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_summary_at_another_size_than_the_papers(capsys):
    out = succeeds(capsys, "summary", "overlock_t", "--task", "upernet", "--image_size", 128, 96)
    assert "paper" not in out.partition("mixing:")[0]


@pytest.mark.parametrize(
    ("task", "table"),
    [
        ("mask_rcnn", 3),
        pytest.param("cascade_mask_rcnn", 4, marks=pytest.mark.slow),
        pytest.param("upernet", 5, marks=pytest.mark.slow),
    ],
)
def test_summary_of_dense_models(capsys, task, table):
    """Beside the paper's figures at its size."""
    out = succeeds(capsys, "summary", "overlock_t", "--task", task)
    assert f"paper, Table {table}" in out
    assert "backbone" in out


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("export", "default", "--format", "onnx", "--images", "a photo.jpg", "b"), "images", ["a photo.jpg", "b"]),
        (("export", "default", "--images", "[a,b]", "--format", "onnx"), "images", ["a", "b"]),
        (("export", "default", "--images=a=1", "--format", "onnx"), "images", ["a=1"]),
        (("predict", "--scales", "0.5", "1", "a.jpg", "--flip"), "scales", [0.5, 1.0]),
        (("evaluate", "runs/a", "--data", "a", "--scales", "[0.5,1]"), "scales", [0.5, 1.0]),
        (("train", "finetune", "--freeze", "base_net", "--data", "a"), "freeze", ("base_net",)),
        (("train", "small_detect", "--data", "a", "--categories", "1", "2"), "categories", ("1", "2")),
        (("train", "cifar10", "--data", "a", "--optim.milestones", "0.5", "0.7"), "optim.milestones", (0.5, 0.7)),
    ],
)
def test_lists_are_words_one_after_another(words, name, value):
    parser, subparsers = make_parser(words)
    options = parser.parse_args(join_lists(words, subparsers[words[0]]))
    assert options[words[0]][name] == value
