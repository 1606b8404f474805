"""Plain state dicts of everything that has the network in it, into one another."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from helpers import randomise
from places import MODELS, NORMED, classifier, parts_of, write

import overlock
from overlock.checkpoints import start_from
from overlock.weights import to_official
from overlock.weights.names import from_official


def assert_taken(model, given, *, norms):
    """The network of one, and the norms that both have."""
    ours, theirs = parts_of(model), parts_of(given)
    network = {name for name in ours.network.keys() & theirs.network.keys() if "head" not in name}
    assert len(network) > 300
    assert all(torch.equal(ours.network[name], theirs.network[name]) for name in network)
    common = ours.pyramid.keys() & theirs.pyramid.keys()
    assert bool(common) == norms
    assert all(torch.equal(ours.pyramid[name], theirs.pyramid[name]) for name in common)


@pytest.fixture(scope="module")
def given():
    return {name: randomise(make(), seed=1) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def files(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return {name: write(model, folder / f"{name}.pth") for name, model in given.items()}


@pytest.fixture(scope="module")
def fresh():
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize("theirs", MODELS)
@pytest.mark.parametrize("ours", MODELS)
def test_a_file_of_each_into_each(ours, theirs, given, files, fresh):
    """The network, and norms and heads where both have them; norms without a place are refused where they count."""
    path, model = files[theirs], copy.deepcopy(fresh[ours])
    norms = ours in NORMED and theirs in NORMED
    if theirs in NORMED and ours not in NORMED:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"no place for its norms \(first: .*overlock\.Pyramid"):
            overlock.load_weights(model, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        start_from(model, path)
    elif {ours, theirs} == {"detector", "cascade"}:  # both have region proposals, but other heads
        with pytest.raises(ValueError, match=r"missing .*left over"):
            overlock.load_weights(model, path)
        start_from(model, path)
        assert torch.equal(model.rpn.head.bbox_pred.weight, given[theirs].rpn.head.bbox_pred.weight)
    else:
        overlock.load_weights(model, path)
    assert_taken(model, given[theirs], norms=norms)
    if ours == theirs:
        expected = given[theirs].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module.", "a.b.c."])
@pytest.mark.parametrize("official", [False, True])
def test_prefixes(prefix, official, given, fresh, tmp_path):
    source, model = given["classifier"], copy.deepcopy(fresh["classifier"])
    state = to_official(source.state_dict()) if official else source.state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "x.pth")
    overlock.load_weights(model, tmp_path / "x.pth")
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_what_is_kept_and_left_out_is_logged(given, tmp_path, caplog):
    caplog.set_level(logging.INFO, "overlock")
    overlock.load_weights(classifier(num_classes=7), write(given["classifier"], tmp_path / "x.pth"))
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/x.pth: has nothing for head.fc (2), which stay as they were",
        f"{tmp_path}/x.pth: the model has no place for its head.fc (2)",
    ]
    caplog.clear()
    start_from(classifier(), write(given["segmenter"], tmp_path / "x.pth"))
    left_out, anew = [record.message.split(": ")[1] for record in caplog.records]
    assert re.fullmatch(
        r"the model has no place for its decode_head \(\d+\), norms \(8\), auxiliary_head \(8\)", left_out
    )
    assert anew.startswith("the backbone is taken from it; head.hidden")


def test_two_networks_in_a_file(tmp_path):
    state = {f"{part}.{name}": x for part in ("teacher", "student") for name, x in classifier().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"several networks, under 'student\.', 'teacher\.'; save the state dict of one"
    ):
        overlock.load_weights(classifier(), tmp_path / "x.pth")


def test_an_incomplete_model_is_a_warning(given, tmp_path, caplog):
    overlock.load_weights(classifier(aux_head=True), write(given["classifier"], tmp_path / "x.pth"))
    assert [(r.levelname, r.message.split(": ")[1]) for r in caplog.records] == [
        ("WARNING", "has nothing for aux_head.norm (5), aux_head.fc (2), which stay as they were")
    ]


def test_names_that_are_not_the_authors_stay():
    state = dict(extra=torch.ones(1, 2, 1, 1))
    assert torch.equal(from_official(state)["extra"], state["extra"])
