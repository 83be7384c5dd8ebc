"""Time and memory of a GASNet iteration against its parts and against vanilla nnU-Net, in one run.

    python benchmarks/step.py -d 501 -p GASNetPlans -device cpu

All figures come from the same dataset, plans, patch and batch size, one after the other, each the median over
iterations; read the ratios, not the seconds. Every variant runs in a process of its own, whose peak memory beyond what
it held before its first iteration is reported: of the GPU on cuda, of the process elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def main(
    dataset: Annotated[str, typer.Option("-d", help="Dataset name or ID, planned and preprocessed")],
    plans: Annotated[str, typer.Option("-p", help="Plans")] = "GASNetPlans",
    configuration: Annotated[str, typer.Option("-c", help="Configuration")] = "3d_fullres",
    device: Annotated[str, typer.Option("-device", help="cpu, cuda or mps")] = "cpu",
    iterations: Annotated[int, typer.Option(help="Iterations of each variant, after one to warm up")] = 5,
) -> None:
    """Measure, print a table with ratios."""
    arguments = (dataset, plans, configuration, device, iterations)
    results: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    for variant in (vanilla, gasnet, summed, parts, loading):
        # Not a Pool, whose processes may have none of their own, as finding lungs that are missing takes.
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            results[variant.__name__] = executor.submit(variant, *arguments).result()
    _print(results, device)


def vanilla(dataset: str, plans: str, configuration: str, device: str, iterations: int) -> dict[str, Any]:
    """nnU-Net's own iteration on the same plans."""
    trainer = _trainer("nnUNetTrainer", dataset, plans, configuration, device)
    batch = _labelled_batch(trainer)
    return _measure(lambda: trainer.train_step(batch), trainer.device, iterations)


def gasnet(dataset: str, plans: str, configuration: str, device: str, iterations: int) -> dict[str, Any]:
    """A whole GASNet iteration with every term on; patches are at hand."""
    trainer = _trainer("GASNetTrainer", dataset, plans, configuration, device)
    batch = _labelled_batch(trainer)
    _prefetch(trainer)
    return _measure(lambda: trainer.train_step(batch), trainer.device, iterations)


def summed(dataset: str, plans: str, configuration: str, device: str, iterations: int) -> dict[str, Any]:
    """The same S+G update with one backward of the summed loss: what the memory would be otherwise."""
    import torch

    trainer = _trainer("GASNetTrainer", dataset, plans, configuration, device)
    step, batch = trainer.gasnet_step, _labelled_batch(trainer)
    _prefetch(trainer)
    pending: list[torch.Tensor] = []
    step._backward = pending.append

    def iteration() -> None:
        step.zero_grad()
        batches = [batch] if trainer._pasted is None else [batch, next(trainer._pasted)]
        step.labelled_term(
            *[(trainer._to_device(each["data"]), trainer._to_device(each["target"])) for each in batches]
        )
        pair = trainer._next_pair()
        step.healthy_term(pair["healthy"])
        step.diseased_terms(pair, pseudo_on=True)
        total = torch.stack([loss.float() for loss in pending]).sum()
        pending.clear()
        (total if step.scaler is None else step.scaler.scale(total)).backward()
        step.step()

    return _measure(iteration, trainer.device, iterations)


def parts(dataset: str, plans: str, configuration: str, device: str, iterations: int) -> dict[str, Any]:
    """The compute parts of a GASNet iteration alone, and how often each stands in it."""
    import torch

    from gasnet_nnunet.steps import as_levels

    trainer = _trainer("GASNetTrainer", dataset, plans, configuration, device)
    step, adversary = trainer.gasnet_step, trainer.adversary
    network, steps = trainer.network, trainer.settings.discriminator_steps
    batch = _labelled_batch(trainer)
    _prefetch(trainer)
    pair = trainer._next_pair()
    x, window = pair["diseased"], adversary.window.to_window(pair["diseased"])
    four = torch.cat([window] * 4)

    def segmenter() -> None:
        with step.precision():
            loss = trainer.loss(network(trainer._to_device(batch["data"])), trainer._to_device(batch["target"]))
        loss.backward()

    def segmenter_forward() -> None:
        with torch.no_grad(), step.precision():
            as_levels(network(x))

    def generator() -> None:
        with step.precision():
            loss = adversary.generate(window).square().mean()
        loss.backward()

    def generator_forward() -> None:
        with torch.no_grad(), step.precision():
            adversary.generate(window)

    def discriminator_to_input() -> None:
        adversary.discriminator.requires_grad_(False)
        adversary._judge(window.clone().requires_grad_(True)).mean().backward()
        adversary.discriminator.requires_grad_(True)

    def discriminator() -> None:
        adversary._judge(four).mean().backward()

    def optimisers() -> None:
        step.step()
        adversary.optimizers["discriminator"].step()

    counted: dict[str, tuple[float, Callable[[], None]]] = {
        # I_l, I_h, I_d and I_ps, and what is pasted beside I_l.
        "S forward + backward": (4 + trainer.settings.pasted_share, segmenter),
        "S forward": (steps, segmenter_forward),
        "G forward + backward": (2, generator),
        "G forward": (steps, generator_forward),
        "D backward to its input": (2, discriminator_to_input),
        "D forward + backward, 4 inputs": (steps, discriminator),
        "optimiser steps": (1, optimisers),
    }
    return {
        name: {"count": count, **_measure(part, trainer.device, iterations)} for name, (count, part) in counted.items()
    }


def loading(dataset: str, plans: str, configuration: str, device: str, iterations: int) -> dict[str, Any]:
    """Loading and augmenting the patches of one iteration, each stream by one worker.

    Returns:
        Of each stream its seconds, and how many workers it has for each of `nnUNet_n_proc_DA`.
    """
    trainer = _trainer("GASNetTrainer", dataset, plans, configuration, device)
    settings = trainer.settings
    streams = {
        "masked patches": (trainer.dataloader_train, 1, 1.0),
        "pairs": (trainer._pairs, 1 + settings.discriminator_steps, 1.0),
        "pasted lesions": (trainer._pasted, 1, 0.5),
        # One worker, however many the others have.
        "healthy patches anywhere": (trainer._background, settings.healthy_outside, 0.0),
    }
    return {
        name: {"seconds": times * _measure(lambda: next(stream), trainer.device, iterations)["seconds"], "share": share}  # noqa: B023
        for name, (stream, times, share) in streams.items()
        if stream is not None
    }


def _trainer(name: str, dataset: str, plans: str, configuration: str, device: str) -> Any:
    """A trainer that is ready to train, whose results go into a temporary folder."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    # What loads patches is measured by one process.
    os.environ["nnUNet_n_proc_DA"] = "0"
    os.environ["nnUNet_results"] = tempfile.mkdtemp()
    with open(os.devnull, "w") as silence:
        stdout, sys.stdout = sys.stdout, silence
        trainer = get_trainer_from_args(dataset, configuration, 0, name, plans, device=torch.device(device))
        trainer.disable_checkpointing = True
        trainer.on_train_start()
        # The last epoch, in which every term is on.
        trainer.current_epoch = trainer.num_epochs - 1
        trainer.on_train_epoch_start()
        sys.stdout = stdout
    return trainer


def _labelled_batch(trainer: Any) -> dict[str, Any]:
    return next(trainer.dataloader_train)


def _prefetch(trainer: Any) -> None:
    """Keep the streams' patches at hand, so that an iteration is its compute alone."""
    batches = [next(trainer._pairs) for _ in range(2)]
    trainer._pairs = _Endless(batches)
    if trainer._pasted is not None:
        trainer._pasted = _Endless([next(trainer._pasted)])
    if trainer._background is not None:
        trainer._background = _Endless([next(trainer._background)])


class _Endless:
    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position = batches, 0

    def __next__(self) -> Any:
        self.position += 1
        return self.batches[self.position % len(self.batches)]


def _measure(action: Callable[[], Any], device: Any, iterations: int) -> dict[str, Any]:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    action()
    seconds = []
    for _ in range(iterations):
        wait()
        start = perf_counter()
        action()
        wait()
        seconds.append(perf_counter() - start)
    after = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "memory": after - before}


def _print(results: dict[str, dict[str, Any]], device: str) -> None:
    iteration, base = results["gasnet"]["seconds"], results["vanilla"]["seconds"]
    table = Table(title=f"One iteration on {device}")
    for column in ("what", "times", "seconds", "ratio to vanilla", "peak memory beyond the networks, MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(name: str, times: str, seconds: float, memory: float | None = None) -> None:
        shown = "" if memory is None else f"{memory / 2**20:.0f}"
        table.add_row(name, times, f"{seconds:.3f}", f"{seconds / base:.2f}", shown)

    row("vanilla nnU-Net iteration", "", base, results["vanilla"]["memory"])
    row("GASNet iteration", "", iteration, results["gasnet"]["memory"])
    row("its S+G update with one summed loss", "", results["summed"]["seconds"], results["summed"]["memory"])
    table.add_section()
    total = 0.0
    for name, part in results["parts"].items():
        total += part["count"] * part["seconds"]
        row(name, f"{part['count']:g}", part["seconds"])
    row("sum of the parts", "", total)
    table.add_section()
    for name, stream in results["loading"].items():
        row(f"loading its {name}, one worker", "", stream["seconds"])
    console = Console()
    console.print(table)
    console.print(f"GASNet iteration / sum of its parts: {iteration / total:.2f}")
    streams = [stream for stream in results["loading"].values() if stream["share"]]
    workers = max(stream["seconds"] / stream["share"] / iteration for stream in streams)
    console.print(f"nnUNet_n_proc_DA that keeps up with it: {workers:.2f}, so {max(1, -(-workers // 1)):.0f}")
    console.print(f"{Path(__file__).name}: {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
