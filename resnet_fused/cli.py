"""The command line, `resnet-fused`: bench, verify, explain, info, responses, tune, env."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import bench as benchmark
from . import environment, models, report
from . import peers as comparison
from . import tune as tuning
from ._version import __version__
from .attempts import terminated_as_interrupted
from .complexity import info as count
from .errors import BackendError, InputError, WorkerError
from .explain import explain as explain_model
from .fuse import fuse
from .kernels import cuda, native
from .responses import layer_responses, plot_responses
from .tables import show, stdout
from .verify import verify as verify_model

app = typer.Typer(
    help="Residual CNNs, fused: the same outputs, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = stdout()

Model = Annotated[str, typer.Argument(help="A model of resnet_fused.models.")]
ModelOrBlock = Annotated[
    str,
    typer.Argument(help="A model of resnet_fused.models, or a block of one as explain names it: resnet50/layer1.1."),
]
Batch = Annotated[int, typer.Option(help="Pictures in a batch.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Accuracy = Annotated[str, typer.Option(help="strict, or fast: allows Winograd F(4x4, 3x3) in fp32.")]
Backend = Annotated[str, typer.Option(help="auto, or one backend for every block.")]


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Turn an error into one line: exit code 2 for what the user asked for, 1 for a process that failed or died."""
    try:
        yield
    except (InputError, BackendError, WorkerError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, WorkerError) else 2) from None


@contextmanager
def shown_progress(width: int) -> Iterator[benchmark.Progress]:
    """A bar on stderr, with `width` characters for what is going on; in a log, where there is no bar, a line a step."""
    errors = Console(stderr=True)
    columns = (TextColumn(f"{{task.description:<{width}}}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("start", total=1.0)
        step = ""

        def tell(what: str, share: float) -> None:
            nonlocal step
            progress.update(task, description=what[:width], completed=share)
            if what != step and not errors.is_terminal:
                print(f"{share:4.0%} {what}", file=sys.stderr, flush=True)
            step = what

        yield tell


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Residual CNNs, fused: the same outputs, faster."""


@app.command()
def bench(
    model: ModelOrBlock = "resnet50",
    batch: Batch = 16,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32 and then bf16 if left out.")] = None,
    device: Device = "cpu",
    accuracy: Annotated[str | None, typer.Option(help="strict or fast; left out, both where they differ.")] = None,
    seconds: Annotated[float, typer.Option(help="Time to spend on each group of interleaved timings.")] = 15.0,
    peers: Annotated[
        bool, typer.Option("--peers", help="Compare with everything else on this machine as well, in one run.")
    ] = False,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Compare every distinct block alone, beside the same peers.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result here, as PNG; not with --blocks.")] = None,
) -> None:
    """Verify the fused model and time it against the original, on real pictures.

    Exit code 1 if parity does not hold or a process that measures fails, 130 after Ctrl-C, which with --peers or
    --blocks keeps what was measured.
    """
    with errors_in_one_sentence():
        dtypes = ("fp32", "bf16") if dtype is None else (dtype,)
        job = benchmark.Job(model, batch, dtypes, device, accuracy, seconds)
        report.check_output("--json", json)
        report.check_output("--plot", plot, ".png")
        if plot and blocks:
            raise InputError(f"--plot must be left out with --blocks (the report draws them), got {str(plot)!r}")
        if plot:
            benchmark.require("matplotlib", "matplotlib", "plots")
        measure = comparison.run_blocks if blocks else comparison.run if peers else benchmark.run
        with shown_progress(44) as tell:
            result = measure(job, tell)
        report.print_result(result, console)
        if json:
            report.write_json(result, json)
        if plot:
            report.plot(result, plot)
        raise typer.Exit(130 if result["interrupted"] else 0 if result["parity"]["ok"] else 1)


@app.command()
def verify(
    model: ModelOrBlock = "resnet50",
    batch: Batch = 4,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    accuracy: Accuracy = "strict",
    backend: Backend = "auto",
) -> None:
    """Prove parity, block by block and end to end, against a float64 reference.

    Exit code 1 if parity does not hold.
    """
    with errors_in_one_sentence():
        unfused, x = benchmark.prepare(benchmark.Job(model, batch, (dtype,), device, accuracy), dtype)
        outcome = verify_model(unfused, fuse(unfused, backend=backend, accuracy=accuracy), x)
        show(outcome, console)
        raise typer.Exit(0 if outcome.ok else 1)


@app.command()
def explain(
    model: ModelOrBlock = "resnet50",
    batch: Batch = 16,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    accuracy: Accuracy = "strict",
    backend: Backend = "auto",
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Time every block beside the least time that this machine allows.")
    ] = False,
) -> None:
    """Show which kernel runs every block at this shape, and why."""
    with errors_in_one_sentence():
        unfused, x = benchmark.prepare(benchmark.Job(model, batch, (dtype,), device, accuracy), dtype)
        show(explain_model(fuse(unfused, backend=backend, accuracy=accuracy), x, roofline), console)


@app.command()
def info(
    model: Model = "resnet50",
    image: Annotated[
        int | None, typer.Option(help="Height and width in pixels; the model's usual if left out.")
    ] = None,
) -> None:
    """Show a model's parameters, multiply-adds, layers and depth, stage by stage."""
    with errors_in_one_sentence():
        entry = models.find(model)
        pixels = entry.image if image is None else image
        if pixels < 32:
            raise InputError(f"--image must be at least 32, got {pixels}")
        with torch.device("meta"):  # shapes only: nothing is computed
            counted = count(entry.make().eval(), torch.empty(1, 3, pixels, pixels))
        show(replace(counted, model=model), console)


@app.command()
def responses(
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models of resnet_fused.models.")],
    weights: Annotated[
        list[Path] | None, typer.Option(help="A trained state_dict, .safetensors or torch.save's; once for each model.")
    ] = None,
    batch: Batch = 16,
    json: Annotated[Path | None, typer.Option(help="Write the responses here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the responses of all models here, as PNG.")] = None,
) -> None:
    """Measure how strongly each 3x3 layer of trained nets responds to real pictures."""
    with errors_in_one_sentence():
        if weights and len(weights) != len(names):
            raise InputError(f"--weights must be given once for each of the {len(names)} models, got {len(weights)}")
        jobs = [benchmark.Job(name, batch, ("fp32",)) for name in names]
        report.check_output("--json", json)
        report.check_output("--plot", plot, ".png")
        if plot:
            benchmark.require("matplotlib", "matplotlib", "plots")
        measured = {}
        for index, job in enumerate(jobs):
            net, x = benchmark.prepare(job, "fp32")
            if weights:
                models.load_weights(net, weights[index])
            measured[job.model] = layer_responses(net, x)
            console.print(job.model, style="bold")
            show(measured[job.model], console)
        if not weights:
            console.print("The weights are random: give --weights of trained nets to compare them.", style="yellow")
        if json:
            report.write_json({name: found.to_dict() for name, found in measured.items()}, json)
        if plot:
            plot_responses(measured, plot)


@app.command()
def tune(
    model: Model = "resnet50",
    batch: Batch = 64,
    dtype: Dtype = "bf16",
    seconds: Annotated[float, typer.Option(help="Time to spend on measuring each shape.")] = 2.0,
    configs: Annotated[
        int | None, typer.Option(help="Configurations of a kernel to try, the most promising first; all if left out.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile before a shape is measured.")] = 0,
    missing: Annotated[bool, typer.Option("--missing", help="Leave out shapes that were tuned before.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which a kernel counts as hung.")] = 120.0,
) -> None:
    """Measure every kernel and configuration for a model's shapes on this GPU; later calls use what was fastest."""
    with errors_in_one_sentence(), terminated_as_interrupted():
        if not torch.cuda.is_available():
            raise BackendError("tuning needs a CUDA GPU, and torch sees none")
        unfused, x = benchmark.prepare(benchmark.Job(model, batch, (dtype,), "cuda"), dtype)
        shapes = tuning.shapes_of(fuse(unfused), x)
        with shown_progress(60) as tell:
            result = tuning.tune(
                shapes, x.dtype, x.device, seconds, tell,
                most=configs, workers=workers, missing=missing, timeout=timeout,
            )  # fmt: skip
        table = Table("shape", "fastest", title=f"Tuned for {result.gpu}, {dtype}")
        table.add_column("us", justify="right")
        table.add_column("others, times as slow")
        for tuned in result.shapes:
            (best, least), *others = tuned.seconds.items() or [("none ran", 0.0)]
            slower = ", ".join(f"{name} {seconds / least:.2f}" for name, seconds in others)
            table.add_row(str(tuned.shape), best, f"{least * 1e6:.1f}", slower)
        show(table, console)
        console.print(f"written to {result.path}", soft_wrap=True)


@app.command()
def env(
    kernels: Annotated[bool, typer.Option("--kernels", help="List the compiled kernels as well.")] = False,
) -> None:
    """Show versions, the native library's state, instruction sets and threads."""
    with errors_in_one_sentence():
        table = Table("what", "value", title="Environment")
        for name, version in environment.versions().items():
            table.add_row(name, version)
        in_use, runnable = environment.instruction_sets()
        table.add_row("processor", environment.device_name("cpu"))
        table.add_row("threads", str(torch.get_num_threads()))
        gpu = environment.device_name("cuda") if torch.cuda.is_available() else "none that torch can use"
        table.add_row("GPU", gpu)
        table.add_row("native library", "loaded" if native.available() else f"not loaded: {native.reason()}")
        table.add_row("CUDA kernels", cuda.built() or "built")
        table.add_row("instruction set in use", in_use)
        table.add_row("instruction sets here", ", ".join(runnable) or "none")
        show(table, console)
        if kernels:
            for title, entries in (
                ("Compiled kernels", environment.kernel_table()),
                ("Compiled CUDA kernels", environment.cuda_kernel_table()),
            ):
                if not entries:
                    console.print(f"{title}: none")
                    continue
                listing = Table(*entries[0], title=title)
                for entry in entries:
                    listing.add_row(*map(str, entry.values()))
                show(listing, console)
