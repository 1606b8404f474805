"""Checkpoints, the authors' and ours: names, forms, wrappers, and what is said of files that do not fit."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from helpers import images, meta, randomise
from official_weights import load_spec
from safetensors.torch import save_file

import overlock
from overlock.network import OverLoCK
from overlock.weights import official_name, read_checkpoint, to_official, translate, unwrap

PUBLISHED = ("overlock_xt", "overlock_t", "overlock_s", "overlock_b")
DENSE = ("dense_seg", "dense_det")


def build(name, form="cls", make=timm.create_model):
    """A model of ours in one of the authors' forms; both classification forms have the auxiliary head."""
    if form in DENSE:
        return overlock.Pyramid(make(name), overview=form == "dense_det")
    return make(name, deploy=form == "cls_deploy", aux_head=True)


def atto(seed=0, **kwargs):
    return randomise(timm.create_model("overlock_atto", **{"num_classes": 10, **kwargs}), seed)


def assert_equal_states(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def source():
    """The model whose checkpoints the tests write."""
    return atto(seed=1, aux_head=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


# Names


@pytest.mark.parametrize("form", ["cls", "cls_deploy", *DENSE])
@pytest.mark.parametrize("name", PUBLISHED)
def test_official_names_there_and_back(name, form):
    """Every name and shape of the released files is ours, and ours is theirs."""
    spec = load_spec(name, form)
    model = build(name, form, meta)
    kind = "pyramid" if form in DENSE else "network"
    theirs = to_official(model.state_dict(), kind)
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == {k: shape for k, (shape, _) in spec.items()}
    back = translate({key: torch.empty(shape, device="meta") for key, (shape, _) in spec.items()}, model)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in model.state_dict().items()}
    assert all(official_name(key, kind) in spec for key in back)


@pytest.mark.parametrize("form", ["block", "block_ls", "block_deploy"])
def test_official_names_of_the_block(form, official_state):
    """The stand-alone block too, its values included."""
    block = overlock.ContMixBlock(64, scaled=form == "block_ls", deploy=form == "block_deploy")
    state = official_state("contmix_block", form)
    block.load_state_dict(translate(state, block))
    assert_equal_states(to_official(block.state_dict(), "block"), state)


@pytest.mark.parametrize("form", ["cls", "cls_deploy", *DENSE])
def test_official_values_there_and_back(form, official_state):
    """No tensor changes on the way."""
    model, state = build("overlock_xt", form), official_state("overlock_xt", form)
    model.load_state_dict(translate(state, model))
    assert_equal_states(to_official(model.state_dict(), "pyramid" if form in DENSE else "network"), state)


@pytest.mark.parametrize("form", ["cls", "cls_deploy", *DENSE])
@pytest.mark.parametrize("name", overlock.VARIANTS)
def test_our_names_there_and_back(name, form):
    """All variants and forms, without the reference data."""
    model = build(name, form, meta)
    state = model.state_dict()
    kind = "pyramid" if form in DENSE else "network"
    theirs = to_official(state, kind)
    assert len(theirs) == len(state)
    assert not set(theirs) & set(state)
    back = translate(theirs, model)
    assert {k: (t.shape, t.dtype) for k, t in back.items()} == {k: (t.shape, t.dtype) for k, t in state.items()}


def test_unknown_names_have_no_official_one():
    """A foreign name is refused."""
    with pytest.raises(KeyError, match=r"layers\.0\.weight"):
        official_name("layers.0.weight")


# Wrappers

WRAPPERS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1.0}},
    "module.": lambda state: {f"module.{k}": t for k, t in state.items()},
    "nested module.": lambda state: {"state_dict": {f"module.{k}": t for k, t in state.items()}},
    "Lightning": lambda state: {"state_dict": {f"model.{k}": t for k, t in state.items()}, "loops": {}},
    "compiled": lambda state: {f"_orig_mod.{k}": t for k, t in state.items()},
    "EMA": lambda state: {"state_dict": {k: torch.zeros_like(t) for k, t in state.items()}, "state_dict_ema": state},
    "EMA of a model": lambda state: {"model": {k: torch.zeros_like(t) for k, t in state.items()}, "model_ema": state},
}  # fmt: skip


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "official"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_states_load(wrap, theirs, source, path):
    """Plain, nested, averaged and prefixed, under the authors' names and ours."""
    torch.save(wrap(to_official(source.state_dict()) if theirs else source.state_dict()), path)
    model = atto(aux_head=True)
    overlock.load_weights(model, path)
    assert_equal_states(model.state_dict(), source.state_dict())


def test_unwrap_refuses_what_holds_no_tensors():
    """Lists, and dicts of other things."""
    for checkpoint in ([torch.zeros(1)], {"epoch": 3}, {"state_dict": {}}):
        with pytest.raises(ValueError, match=r"state dict|no tensors"):
            unwrap(checkpoint)


# Forms


def test_file_with_aux_head_into_a_model_without(source, path):
    """The auxiliary head is left out."""
    torch.save(to_official(source.state_dict()), path)
    model = atto()
    overlock.load_weights(model, path)
    x = images(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))


def test_file_without_aux_head_into_a_model_with(path):
    """The auxiliary head keeps its own weights."""
    source, model = atto(seed=1), atto(aux_head=True)
    before = model.aux_head.fc.weight.clone()
    torch.save(source.state_dict(), path)
    overlock.load_weights(model, path)
    assert torch.equal(model.aux_head.fc.weight, before)
    assert torch.equal(model.head.fc.weight, source.head.fc.weight)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "official"])
def test_training_form_into_a_merged_model(theirs, source, path):
    """The branches are merged on the way."""
    torch.save(to_official(source.state_dict()) if theirs else source.state_dict(), path)
    model = atto(deploy=True).double()
    overlock.load_weights(model, path)
    x = images(1, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), source.double()(x), rtol=1e-4, atol=1e-5)
    source.float()


def test_merged_form_into_a_training_model(path):
    """What was merged cannot be parted: the message says which form to build."""
    torch.save(to_official(atto(deploy=True).state_dict()), path)
    with pytest.raises(ValueError, match=r"base_net\.stages\.0\.blocks\.0.*deploy=True"):
        overlock.load_weights(atto(), path)


@pytest.mark.parametrize("form", DENSE)
def test_dense_file_into_a_classifier(form, path):
    """Its feature norms are part of the network: the message names the class that has them."""
    torch.save({"state_dict": to_official(randomise(build("overlock_atto", form)).state_dict(), "pyramid")}, path)
    with pytest.raises(ValueError, match=r"norms\.0\.weight.*overlock\.Pyramid"):
        overlock.load_weights(atto(), path)


@pytest.mark.parametrize("form", DENSE)
def test_downstream_file_into_a_pyramid(form, path):
    """The backbone part of a detector or segmentor, with its norms."""
    source = randomise(build("overlock_atto", form), seed=1)
    state = {f"backbone.{k}": t for k, t in to_official(source.state_dict(), "pyramid").items()}
    torch.save({"state_dict": state | {"roi_head.fc.weight": torch.zeros(3, 3)}, "meta": {"epoch": 12}}, path)
    model = build("overlock_atto", form)
    overlock.load_weights(model, path)
    assert_equal_states(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("form", DENSE)
def test_classification_file_into_a_pyramid(form, source, path):
    """The backbone is loaded, the head left out, the norms stay as they start."""
    torch.save(to_official(source.state_dict()), path)
    model = build("overlock_atto", form)
    overlock.load_weights(model, path)
    state, expected = model.backbone.state_dict(), source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert not any(name.startswith("head.hidden") for name in state)
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in model.norms)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_file_for_colours_into_a_model_of_other_channels(in_chans, source, path):
    """The first convolution is summed or repeated; what was of other channels before cannot be turned back."""
    torch.save(source.state_dict(), path)
    model = atto(in_chans=in_chans)
    overlock.load_weights(model, path)
    first, given = (m.base_net.stages[0].embed[0].conv.weight for m in (model, source))
    torch.testing.assert_close(first[:, :1], given.sum(1, keepdim=True) if in_chans == 1 else given[:, :1] * 3 / 4)
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=f"for images of {in_chans} channels, the model for 3"):
        overlock.load_weights(atto(), path)


# Through timm


def through_timm(path, **kwargs):
    overlay = {"file": str(path), "url": None, "hf_hub_id": None, "num_classes": 10}
    return timm.create_model("overlock_atto", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.fixture
def official_file(source, path):
    torch.save({"state_dict": {f"module.{k}": t for k, t in to_official(source.state_dict()).items()}}, path)
    return path


def test_pretrained_file(source, official_file):
    """timm.create_model(pretrained=True) reads the authors' files."""
    model = through_timm(official_file, num_classes=10)
    x = images(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize("aux_head", [False, True])
def test_pretrained_file_with_new_classes(num_classes, aux_head, source, official_file):
    """The classifiers are new, all else is the file's."""
    model = through_timm(official_file, num_classes=num_classes, aux_head=aux_head)
    assert model(images(1, 3, 64, 64)).shape == (1, num_classes or model.head_hidden_size)
    expected = source.state_dict()
    for name, tensor in model.state_dict().items():
        if ".fc." not in name or "se.fc" in name:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("in_chans", [1, 4])
def test_pretrained_file_with_other_channels(in_chans, source, official_file):
    """The first convolution is summed or repeated over the channels, as timm does."""
    model = through_timm(official_file, num_classes=10, in_chans=in_chans)
    assert model(images(1, in_chans, 64, 64)).shape == (1, 10)
    first, expected = model.base_net.stages[0].embed[0].conv.weight, source.base_net.stages[0].embed[0].conv.weight
    if in_chans == 1:
        torch.testing.assert_close(first, expected.sum(dim=1, keepdim=True))
    else:
        torch.testing.assert_close(first[:, :3], expected * 3 / 4)
    assert torch.equal(model.head.fc.weight, source.head.fc.weight)


def test_pretrained_file_merged(source, official_file):
    """deploy=True merges the training file."""
    model = through_timm(official_file, num_classes=10, deploy=True)
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 1), (2,)])
def test_pretrained_file_for_features(indices, source, official_file):
    """features_only loads before it prunes."""
    model = through_timm(official_file, features_only=True, out_indices=indices)
    x = images(1, 3, 64, 64)
    for actual, expected in zip(model(x), source.forward_intermediates(x, list(indices))[1], strict=True):
        assert torch.equal(actual, expected)


def test_released_addresses():
    """pretrained=True knows the authors' files of the four published sizes, as trained and merged, and of no other."""
    release = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
    for name in overlock.VARIANTS:
        tags = [tag for tag in timm.list_models(f"{name}.*", pretrained=True) if tag.startswith(f"{name}.")]
        if name in PUBLISHED:
            assert timm.get_pretrained_cfg(name).url == f"{release}{name}_in1k_224.pth"
            assert timm.get_pretrained_cfg(f"{name}.in1k_reparam").url == f"{release}{name}_in1k_224_reparam.pth"
            assert sorted(tags) == [f"{name}.in1k", f"{name}.in1k_reparam"]
        else:
            assert not timm.get_pretrained_cfg(name).url
            assert tags == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_merged_files(name, official_state, tmp_path, monkeypatch):
    """Their tag builds the merged form by itself and loads every tensor of it, from a file and from an address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    path = tmp_path / f"{name}_in1k_224_reparam.pth"
    state = official_state(name, "cls_deploy")
    torch.save(state, path)
    for source in (dict(file=str(path), url=""), dict(url=path.as_uri())):
        model = timm.create_model(f"{name}.in1k_reparam", pretrained=True, pretrained_cfg_overlay=source)
        assert not any("branches" in key for key in model.state_dict())
        assert_equal_states(
            to_official(model.state_dict()), {key: t for key, t in state.items() if not key.startswith("aux_head.")}
        )


def test_the_tag_of_merged_files(official_state, tmp_path):
    """Merged also without weights, with another number of classes, and where features are taken; else said."""
    assert not any("branches" in key for key in timm.create_model("overlock_xt.in1k_reparam").state_dict())
    path = tmp_path / "xt.pth"
    torch.save(official_state("overlock_xt", "cls_deploy"), path)
    loading = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    for options in (dict(num_classes=5), dict(features_only=True)):
        model = timm.create_model("overlock_xt.in1k_reparam", **options, **loading)
        assert not any("branches" in key for key in model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match="merged form; build the model with deploy=True"):
        timm.create_model("overlock_xt.in1k_reparam", deploy=False, **loading)


# Files


def test_safetensors(source, tmp_path):
    """Under our names and theirs."""
    x = images(1, 3, 64, 64)
    for i, state in enumerate((source.state_dict(), to_official(source.state_dict()))):
        path = tmp_path / f"{i}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        model = atto()
        overlock.load_weights(model, path)
        assert torch.equal(model(x), source(x))


class Code:
    """An object that a checkpoint must not bring to life."""

    def __reduce__(self):
        return (print, ("run",))


def write_truncated(source, path):
    torch.save(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def write_truncated_safetensors(source, path):
    save_file(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def without(state, part):
    return {name: tensor for name, tensor in state.items() if part not in name}


BAD_FILES = {
    "missing": ("weights.pth", lambda source, path: None, "no such file"),
    "folder": ("weights.pth", lambda source, path: path.mkdir(), "no such file"),
    "empty": ("weights.pth", lambda source, path: path.touch(), "not a"),
    "truncated": ("weights.pth", write_truncated, "not a"),
    "truncated safetensors": ("weights.safetensors", write_truncated_safetensors, "not a"),
    "text": ("weights.pth", lambda source, path: path.write_text("hello, world\n" * 99), "not a"),
    "code": ("weights.pth", lambda source, path: path.write_bytes(pickle.dumps({"state_dict": Code()})), "not a"),
    "code in torch's format": ("weights.pth", lambda source, path: torch.save({"state_dict": Code()}, path), "not a"),
    "list": ("weights.pth", lambda source, path: torch.save([torch.zeros(1)], path), "must hold a state dict"),
    "no tensors": ("weights.pth", lambda source, path: torch.save({"epoch": 1}, path), "no tensors"),
    "foreign": (
        "weights.pth",
        lambda source, path: torch.save(timm.create_model("test_convnext").state_dict(), path),
        r"missing \(first: .*left over \(first: stem\.0",
    ),
    "wrong variant": (
        "weights.pth",
        lambda source, path: torch.save(to_official(OverLoCK(overlock.VARIANTS["overlock_nano"]).state_dict()), path),
        r"of another shape \(first: base_net\.stages\.0\.",
    ),
    "lost layer": (
        "weights.pth",
        lambda source, path: torch.save(without(source.state_dict(), "overview_net.reduce"), path),
        r"2 missing \(first: overview_net\.reduce\.weight, overview_net\.reduce\.bias\)",
    ),
    "lost branch": (
        "weights.pth",
        lambda source, path: torch.save(without(to_official(source.state_dict()), "dil_bn_k5_1"), path),
        r"missing.* \(first: base_net\.stages\.0\.blocks\.0\.large_kernel\.conv\.branches\.k5_r1\.norm\.weight",
    ),
    "added layer": (
        "weights.pth",
        lambda source, path: torch.save(source.state_dict() | {"extra.weight": torch.zeros(1)}, path),
        r"1 left over \(first: extra\.weight\)",
    ),
}


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(("name", "write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_change_nothing(name, write, message, deploy, source, tmp_path):
    """One message that names the file and the first keys, no code run, and the model as it was."""
    path = tmp_path / name
    write(source, path)
    model = atto(deploy=deploy)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        overlock.load_weights(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_equal_states(model.state_dict(), before)


def test_read_checkpoint_runs_no_code(path, capsys):
    """The pickled call is refused, not made."""
    path.write_bytes(pickle.dumps({"state_dict": Code()}))
    with pytest.raises(ValueError):
        read_checkpoint(path)
    assert capsys.readouterr().out == ""
