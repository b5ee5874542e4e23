"""`hasten bench-kernels`: each native kernel's time against its bound on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from hasten.cli import common, measuring


def bench_kernels(
    only: Annotated[
        str, typer.Option("--only", help="Pattern of the groups of kernels to measure, e.g. 'affine-4bit*'.")
    ] = "*",
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Time to spend on each case.")] = 0.4,
    threads: measuring.Threads = None,
    json_file: measuring.JsonFile = None,
) -> None:
    """Measure every native kernel: time, bandwidth, operations, and what that is of the machine's measured peak.

    The instruction set is the CPU's best; HASTEN_ISA=scalar, avx2 or avx512 forces another.

    Examples:

      hasten bench-kernels

      hasten bench-kernels --only 'affine*' --threads 1 --json kernels.json
    """
    import fnmatch

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from hasten.core.errors import MeasureError, UnknownNameError
    from hasten.kernels import level
    from hasten.kernels.peak import measure_peak
    from hasten.measure.environment import pinned_cpus
    from hasten.measure.kernels import CASES, as_record, run_cases
    from hasten.measure.store import write_json

    if threads is not None and threads < 1:
        raise MeasureError(f"--threads {threads}: must be at least 1")
    groups = [name for name, _ in CASES if fnmatch.fnmatch(name, only)]
    if not groups:
        raise UnknownNameError("group of kernels", only, [name for name, _ in CASES])
    torch.set_num_threads(threads or len(pinned_cpus()))
    to_stdout = json_file is not None and str(json_file) == "-"
    console = Console(stderr=to_stdout)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("peak", total=len(groups) + 1)
        peak = measure_peak()

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        results = run_cases(peak, only, seconds=seconds, advance=advance)
    table = Table(
        title=f"{level()}, {torch.get_num_threads()} threads: {peak.read / 1e9:.1f} GB/s read, "
        f"{peak.float32 / 1e9:.0f} GFLOP/s float32, {peak.int8 / 1e9:.0f} GOP/s int8"
    )
    for name in ("kernel", "shape", "time (us)", "GB/s", "GOP/s", "bound", "of bound"):
        table.add_column(
            name, justify="left" if name in ("kernel", "shape", "bound") else "right", no_wrap=True
        )
    for r in results:
        table.add_row(
            r.kernel,
            r.shape,
            f"{r.seconds * 1e6:.1f}",
            f"{r.gb_per_s:.1f}",
            f"{r.gop_per_s:.1f}",
            r.bound,
            f"{r.share:.0%}",
        )
    console.print(table)
    if to_stdout:
        common.print_json(as_record(results, peak))
    elif json_file is not None:
        write_json(json_file, as_record(results, peak))
