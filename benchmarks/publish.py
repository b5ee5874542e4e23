"""Measure and publish systems: `python -m benchmarks.publish [SLUG ...]`. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hasten import workloads
from hasten.catalog import loader
from hasten.core.errors import HastenError
from hasten.measure.bench import bench, publish, publishable_source
from hasten.measure.comparison import Comparison
from hasten.measure.store import ResultStore, write_text

RESULTS = Path(__file__).parent / "results"


def measurable() -> list[str]:
    """Slugs of built systems whose workload exists, in catalogue order."""
    return [r.slug for r in loader.records().values() if r.built and r.workload in workloads.names()]


def published(folder: Path) -> list[list[Comparison]]:
    """The comparisons of every result file, the headline's first, by file name."""
    out = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "speedup" in data:  # other modules keep results of another shape here
            out.append([Comparison.from_dict(record) for record in (data, *data.get("others", ()))])
    return out


def table(results: Sequence[Sequence[Comparison]]) -> str:
    """Markdown: one row per comparison, ratio beside quality."""
    lines = [
        "# Published results",
        "",
        "Written by `python -m benchmarks.publish`; do not edit. Median ratio of paired runs, its 95% interval.",
        "",
        "| system | workload | against | speed | quality | memory (MiB) | commit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for comparison in (c for comparisons in results for c in comparisons):
        s, m = comparison.speedup, comparison.memory
        cells = (
            comparison.system,
            comparison.workload,
            f"{comparison.label('baseline')} ({comparison.plans['baseline'].get('dtype', '?')})",
            f"{s.median:.2f}x [{s.low:.2f}, {s.high:.2f}]",
            comparison.quality.text(),
            f"{m.baseline_mb:.0f} → {m.candidate_mb:.0f}",
            (comparison.commit or "")[:10],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    machines = sorted(
        {
            f"{c.machine.get('cpu', '?')}, {c.machine.get('threads', '?')} threads"
            for comparisons in results
            for c in comparisons
        }
    )
    lines += ["", "Measured on: " + ("; ".join(machines) or "nothing yet") + ".", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("slugs", nargs="*", help="systems to measure; none: all that can be")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--pairs", type=int, help="number of pairs (default: until the interval is narrow)")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the table")
    chosen = parser.parse_args(arguments)
    failed = 0
    if not chosen.table:
        publishable_source()
        store = ResultStore()
        for slug in chosen.slugs or measurable():
            try:
                found = []
                for comparison in bench(slug, pairs=chosen.pairs):
                    store.add(comparison)
                    found.append(comparison)
                    print(f"{slug}: {comparison.headline()}", flush=True)
                publish(found, chosen.results)
            except HastenError as error:
                failed += 1
                print(f"{slug}: {error}", file=sys.stderr, flush=True)
    write_text(chosen.results / "README.md", table(published(chosen.results)))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HastenError as error:
        print(f"benchmarks.publish: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
