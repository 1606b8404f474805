"""Starting: what a command imports before it has something to do, and what ``import overlock`` brings to a program."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

import overlock
from overlock import data, deploy
from overlock.cli.main import COMMANDS

HEAVY = ("torch", "torchvision", "timm", "lightning", "numba", "numpy", "PIL")
CALL = """
import sys
from overlock.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("imported:", *(name for name in {heavy} if name in sys.modules))
sys.exit(code)
"""


def python(code: str, *arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)


def prints(code: str) -> str:
    done = python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("--help", 0, "commands:"),
        ("--version", 0, overlock.__version__),
        ("train small --help", 0, "--optim.lr"),
        ("train small_segment --help", 0, "--ignore_index"),
        ("train small_detect --help", 0, "--proposals"),
        *((f"{command} --help", 0, "usage: overlock") for command in COMMANDS),
        ("", 2, "no command given"),
        ("trian", 2, "did you mean 'train'?"),
        ("train digit", 2, "did you mean 'digits'?"),
        ("train digits --epoch 3", 2, "did you mean --epochs?"),
        ("train digits --epochs 0", 2, "epochs must be"),
        ("predict a.png --treshold 0.1", 2, "did you mean --threshold?"),
        ("summary", 2, "required: model"),
    ],
)
def test_help_and_typing_errors_come_without_pytorch(line, code, told):
    """And fast: a third of a second on an idle core, of which this allows for a slow one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(CALL.format(heavy=HEAVY), *line.split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    *text, imported = done.stdout.splitlines()
    assert told in " ".join(("\n".join(text) + done.stderr).split())
    assert imported == "imported:"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # PyTorch alone takes longer


@pytest.mark.parametrize("order", ["overlock, timm", "timm, overlock"])
def test_timm_has_the_models_in_either_order(order):
    assert prints(f"import {order}; print(timm.create_model('overlock_atto', num_classes=3).num_classes)") == "3"


def test_any_part_may_be_imported_first():
    """It imports timm itself, which is when the models that it is a part of are registered."""
    code = "import overlock.layers; from timm.models import is_model; print(is_model('overlock_t'))"
    assert prints(code) == "True"


FORKS = """
import os
import huggingface_hub, torch, torch._dynamo, torchvision  # most of what timm imports

for first in {parts}:
    if os.fork() == 0:
        __import__(first)
        from timm.models import is_model

        print(first, is_model("overlock_t"), flush=True)
        os._exit(0)
    os.wait()
"""


def test_any_part_may_be_imported_first_after_pytorch():
    """Each in a fork of one program, which has PyTorch; and nothing but the package, where a library imports timm."""
    names = ("", ".layers", ".blocks", ".network", ".weights", ".fused.fuse", ".ablation")
    parts = [f"overlock{name}" for name in names]
    assert prints(FORKS.format(parts=parts)).splitlines() == [f"{part} True" for part in parts]


def test_operators_are_defined_without_timm():
    code = (
        "import overlock, torch, sys; operators = torch.ops.overlock; "
        "print(operators.contmix, operators.basic_stack, operators.linear, 'timm' in sys.modules)"
    )
    assert prints(code) == "overlock.contmix overlock.basic_stack overlock.linear False"


@pytest.mark.parametrize("first", ["fused.conditions", "kernels.torch.contmix"])
def test_any_module_may_be_the_first(first):
    """Of those that the operators are made of, in a program without PyTorch so far."""
    code = (
        f"import overlock.{first}, timm, torch; operators = torch.ops.overlock; "
        "print(operators.contmix, operators.basic_stack, timm.is_model('overlock_t'))"
    )
    assert prints(code) == "overlock.contmix overlock.basic_stack True"


def test_a_saved_graph_loads_after_the_import_alone(tmp_path):
    """One with the package's operators, in a program that names nothing of the package."""
    path = tmp_path / "graph.pt2"
    prints(
        "import overlock, timm, torch; network = overlock.fuse(timm.create_model('overlock_atto', num_classes=3));"
        "graph = torch.export.export(network, (torch.zeros(1, 3, 64, 64),), strict=False);"
        f"torch.export.save(graph, {str(path)!r})"
    )
    code = f"import overlock, torch; print('overlock.basic_stack' in str(torch.export.load({str(path)!r})))"
    assert prints(code) == "True"


def test_the_import_brings_little_beside_timm():
    """Nothing of its own needs, say numba, torchvision's detectors or Lightning, weighs on a program with timm."""
    code = (
        "import timm, sys; before = set(sys.modules); import overlock; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'overlock', 'wrapt'} "
        "- sys.stdlib_module_names))"
    )
    assert prints(code) == ""


@pytest.mark.parametrize("package", [overlock, data, deploy])
def test_lazy_names(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
