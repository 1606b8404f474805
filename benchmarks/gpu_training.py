"""Training on a GPU: gradients of a whole network against float64, steps in 16 bits, CIFAR-10."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import timm
import torch
from gpu_run import Row, Run
from models import capture
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.network import OverLoCK, Variant
from overlock.ops import backend

TINY = Variant(
    dims=(8, 12, 16, 24), base_depths=(1, 1, 1), overview_depth=1, focus_depths=(2, 1), groups=(2, 3),
    kernel_sizes=(7, 5, 9, 7), head_width=16,
)  # fmt: skip
CLASSES = 10
WORST = 1e-3  # of float32: norms over a batch amplify what the order of sums changes
STEPS, DRY_STEPS = 200, 3
BATCH, EPOCHS, RATE = 512, 15, 6e-3  # of CIFAR-10: the recipe's epochs; its rate, 3e-3 at 128, by the root of 4


def make_network(run: Run, **options: object) -> nn.Module:
    """The smallest network, or one smaller still."""
    torch.manual_seed(0)
    if run.dry:
        return OverLoCK(TINY, num_classes=CLASSES, aux_head=True)
    return timm.create_model("overlock_atto", num_classes=CLASSES, aux_head=True, **options)


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of both heads, as the trainer has it."""
    logits, auxiliary = network(images)
    return F.cross_entropy(logits.float(), labels) + 0.4 * F.cross_entropy(auxiliary.float(), labels)


def gradients(run: Run) -> Iterator[Row]:
    """Those of all parameters in each precision, by our kernels and by the portable ones, from float64 on the CPU."""
    side, batch = (32, 2) if run.dry else (96, 8)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network = make_network(run).train()
    images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % CLASSES
    exact = copy.deepcopy(network).double()
    with backend("torch"):
        loss_of(exact, images.double(), labels).backward()
    expected = {name: x.grad for name, x in exact.named_parameters()}
    total = torch.stack([x.norm() for x in expected.values()]).norm()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors = {}
        for name in ("torch",) if run.dry else ("torch", "auto"):
            with run.attempt(f"gradients by {name}, {dtype}"):
                copied = copy.deepcopy(network).to(run.device, memory_format=torch.channels_last)
                with backend(name), torch.autocast(run.device, dtype, enabled=dtype != torch.float32):
                    scale = 1024.0 if dtype == torch.float16 else 1.0
                    (scale * loss_of(copied, images.to(run.device), labels.to(run.device))).backward()
                off = {
                    key: (x.grad.cpu().double() / scale - expected[key]).norm() for key, x in copied.named_parameters()
                }
                errors[name] = float(torch.stack(list(off.values())).norm() / total)
                farthest = max(off, key=lambda key: float(off[key]))
                limit = WORST if dtype == torch.float32 else 2 * errors["torch"] + 0.01
                right = errors[name] <= limit if name == "auto" or dtype == torch.float32 else True
                yield dict(
                    dtype=str(dtype).removeprefix("torch."), by=name, right=right, error=errors[name],
                    limit=limit, farthest=farthest,
                )  # fmt: skip
                if not right:
                    run.fail(f"gradients by {name}, {dtype}", f"{errors[name]:.1e} from float64, beyond {limit:.1e}")


def finite(run: Run) -> Iterator[Row]:
    """Steps of AdamW in 16 bits on noise around ten patterns: every loss and gradient finite, and the loss falls."""
    side, batch, steps = (32, 4, DRY_STEPS) if run.dry else (64, 64, STEPS)
    for dtype in (torch.bfloat16, torch.float16):
        with run.attempt(f"steps in {dtype}"):
            network = make_network(run).to(run.device, memory_format=torch.channels_last).train()
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
            scaler = torch.amp.GradScaler(run.device, enabled=dtype == torch.float16, init_scale=2.0**12)
            make = torch.Generator(device=run.device).manual_seed(0)
            patterns = torch.randn(CLASSES, 3, side, side, generator=make, device=run.device)
            labels = torch.arange(batch, device=run.device) % CLASSES
            losses, norms, started = [], [], time.perf_counter()
            for _ in range(steps):
                images = patterns[labels] + torch.randn(batch, 3, side, side, generator=make, device=run.device)
                with torch.autocast(run.device, dtype):
                    loss = loss_of(network, images, labels)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norms.append(nn.utils.clip_grad_norm_(network.parameters(), 5.0))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
            first, last = float(losses[0]), float(losses[-1])
            bad_losses = int((~torch.stack(losses).isfinite()).sum())
            bad_norms = int((~torch.stack(norms).isfinite()).sum())  # float16: the scaler drops these steps
            right = bad_losses == 0 and (last < first or run.dry) and (bad_norms == 0 or dtype == torch.float16)
            yield dict(
                dtype=str(dtype).removeprefix("torch."), steps=steps, right=right, first_loss=first, last_loss=last,
                losses_not_finite=bad_losses, gradients_not_finite=bad_norms, scale=scaler.get_scale(),
                seconds=time.perf_counter() - started,
            )  # fmt: skip
            if not right:
                run.fail(f"steps in {dtype}", "a loss was not finite, or it did not fall")


def load_cifar10(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels of both parts, normalised, on the device."""
    if run.data is None:
        raise ValueError("no --data was given")
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    from overlock.data.images import PackedImages  # noqa: PLC0415 - it needs Pillow

    parts: list[Tensor] = []
    for name in ("train", "test"):
        packed = PackedImages(run.data / f"{name}.npz")
        chosen = np.random.default_rng(0).permutation(len(packed))[: 2 * BATCH if run.dry else None]
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(lambda i, packed=packed: packed.read(int(i)), chosen))
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in read])).to(run.device)
        parts += [pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor([label for _, label in read])]
    return parts[0], parts[1].to(run.device), parts[2], parts[3].to(run.device)


def shift_and_flip(images: Tensor, make: torch.Generator) -> Tensor:
    """Each image by up to four pixels both ways, over black, and half of them mirrored."""
    batch, _, side, _ = images.shape
    padded = F.pad(images, (4, 4, 4, 4), value=-1.0)
    mirrored = torch.rand(batch, generator=make, device=images.device) < 0.5
    steps = torch.arange(side, device=images.device)
    rows, columns = (
        torch.randint(0, 9, (batch, 1), generator=make, device=images.device) + steps for _ in range(2)
    )  # fmt: skip
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def make_step(run: Run, network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """Loss and gradients of what lies in two tensors, as a CUDA graph where that works."""

    def step() -> Tensor:
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        with torch.autocast(run.device, torch.bfloat16, cache_enabled=False):
            loss = loss_of(network, images, labels)
        loss.backward()
        return loss.detach()

    step()
    if run.dry:
        return step
    with run.attempt("a training step as a CUDA graph"):
        return capture(step)
    return step


@torch.inference_mode()
def top1(run: Run, network: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = torch.zeros((), device=run.device)
    for some, named in zip(images.split(1000), labels.split(1000), strict=True):
        with torch.autocast(run.device, torch.bfloat16):
            right += (network(some).argmax(1) == named).sum()
    return 100 * float(right) / len(labels)


def cifar10(run: Run) -> Iterator[Row]:
    """``overlock_atto`` by the recipe cifar10, in bfloat16, for as many of its epochs as there is time."""
    images, labels, test_images, test_labels = load_cifar10(run)
    options = {} if run.dry else dict(stem_stride=1)
    network = make_network(run, **options).to(run.device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(network, opt="nmuon", lr=RATE, weight_decay=0.05)
    rates = [group["lr"] for group in optimizer.param_groups]
    make = torch.Generator(device=run.device).manual_seed(0)
    batch = 8 if run.dry else BATCH
    some = images[:batch].contiguous(memory_format=torch.channels_last)
    named = labels[:batch].clone()
    step = make_step(run, network, some, named)
    steps = 2 if run.dry else len(images) // batch
    started, epochs, number = time.perf_counter(), EPOCHS, 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=make, device=run.device)
        for i in range(steps):
            number += 1
            share = number / (epochs * steps)
            factor = min(number / steps, 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * share))))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            chosen = order[i * batch : (i + 1) * batch]
            some.copy_(shift_and_flip(images[chosen], make))
            named.copy_(labels[chosen])
            loss = step()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
        taken = (time.perf_counter() - started) / (epoch + 1)
        if epoch == 0:
            epochs = 1 if run.dry else max(1, min(EPOCHS, 1 + int((run.left() - 10) / taken)))
        scored = top1(run, network.eval(), test_images, test_labels)
        network.train()
        yield dict(epoch=epoch + 1, of=epochs, top1=scored, loss=float(loss), seconds=taken * (epoch + 1))
        if epoch + 1 >= epochs:
            return
