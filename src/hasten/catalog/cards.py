"""One card per system, as Markdown: what it claims, where it acts, how to use it, what was measured.

`hasten show` prints a card; the documentation holds one page for each, generated when the site is built. What was
published and what was noted by hand lie in a source checkout (``benchmarks/results``, ``docs/notes``); without one,
a card says less.
"""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from hasten.catalog.loader import Record
from hasten.catalog.published import Published, read_published
from hasten.core.errors import HastenError
from hasten.core.slots import SLOTS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from hasten.core.technique import Technique

_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "multiple of"))


def card(record: Record, checkout: Path | None = None) -> str:
    """The card of one system. ``checkout``: the source tree to read results and notes from, see `source_checkout`.

    A built system's class is imported for its settings. Raises `HastenError` for a result file that is broken.
    """
    published = published_of(record, checkout)
    parts = [f"# {_text(record.title)}", f"`{record.slug}` · {record.family} · **{record.state}**"]
    technique = record.load() if record.built else None
    if technique is not None and technique.__doc__:
        parts.append(" ".join(technique.__doc__.split()))
    parts.append(_facts(record))
    parts += ["## Use", *(_usage(record, technique) if technique else [_planned()])]
    parts += ["## Measured", _measured(record, published)]
    notes = _notes(record, checkout)
    if notes:
        parts += ["## Notes", notes]
    return "\n\n".join(parts) + "\n"


def index(records: Iterable[Record], checkout: Path | None = None) -> str:
    """The table of all systems, one section per family; each slug links to ``SLUG.md``."""
    found = list(records)
    built = sum(record.built for record in found)
    parts = [
        "# Systems",
        f"{len(found)} published systems, {built} of them built. *planned*: no code yet; *experimental*: it works, its "
        "acceptance is not complete; *available*: every acceptance check passes and a comparison is published.",
    ]
    for family in dict.fromkeys(record.family for record in found):
        parts += [f"## {family}", _family([r for r in found if r.family == family], checkout)]
    return "\n\n".join(parts) + "\n"


def settings(technique: type[Technique]) -> list[dict[str, Any]]:
    """Every setting of a technique: ``name``, ``type``, ``default`` (None when required), ``required``, ``meaning``."""
    return [
        {
            "name": name,
            "type": _type(field),
            "default": None if field.is_required() else _default(field),
            "required": field.is_required(),
            "meaning": field.description or "",
        }
        for name, field in technique.model_fields.items()
    ]


def source_checkout() -> Path | None:
    """The source tree this code runs from, or the one around the working folder; None when there is neither."""
    for start in (Path(__file__).resolve(), Path.cwd()):
        for folder in (start, *start.parents):
            if _is_checkout(folder):
                return folder
    return None


def _is_checkout(folder: Path) -> bool:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    named: bool = project.get("project", {}).get("name") == "hasten"
    return named and (folder / "src" / "hasten").is_dir()


def published_of(record: Record, checkout: Path | None) -> Published | None:
    """The record's published comparison in ``checkout``; None when there is none."""
    if checkout is None:
        return None
    return read_published(checkout / "benchmarks" / "results" / f"{record.slug}.json")


def _notes(record: Record, checkout: Path | None) -> str:
    """Hand-written notes without their own title, the highest headings one level below the card's."""
    path = checkout / "docs" / "notes" / f"{record.slug}.md" if checkout else None
    if path is None or not path.is_file():
        return ""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HastenError(f"{path} cannot be read: {error}") from None
    lines: list[tuple[int, str]] = []  # (heading level or 0, text)
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        heading = None if fenced else re.match(r"(#+) +(.*)", line)
        lines.append((len(heading[1]), heading[2]) if heading else (0, line))
    lines = [line for line in lines if line[0] != 1]
    highest = min((level for level, _ in lines if level), default=0)
    return "\n".join(
        "#" * (level - highest + 3) + " " + line if level else line for level, line in lines
    ).strip()


def _facts(record: Record) -> str:
    slots = "; ".join(f"`{name}`, {SLOTS[name].question}" for name in record.slots)
    rows = (
        ("Source", record.source),
        ("Method", record.kind),
        ("Slot" if len(record.slots) == 1 else "Slots", slots),
        ("Lossless", "yes" if record.lossless else "no"),
        ("Claim", record.claim),
        ("Target here", record.target),
        ("Workload", f"`{record.workload}`" if record.workload else ""),
    )
    return _bullets([row for row in rows if row[1]])


def _planned() -> str:
    return "Planned: no code exists yet. `hasten list --state available` shows what runs."


def _usage(record: Record, technique: type[Technique]) -> list[str]:
    """Commands, Python and plan file of a built system, then its settings."""
    commands = [f"hasten bench {record.slug}"]
    name = technique.__name__
    parts = []
    # Only what fills slots of the language-model engine alone can be switched on for a model.
    if all(SLOTS[slot].engine == "lm" for slot in record.slots):
        commands.append(f'hasten generate "Name three rivers in Europe." --use {record.slug}')
        parts.append(_code("python", f"import hasten\n\nllm = hasten.LLM(use=[hasten.{name}()])"))
    parts.insert(0, _code("sh", "\n".join(commands)))
    parts.append("In a plan file, with the default settings:")
    parts.append(_code("toml", _plan_table(record, technique)))
    rows = [
        (
            f"`{row['name']}`",
            row["type"],
            "required" if row["required"] else f"`{row['default']}`",
            row["meaning"],
        )
        for row in settings(technique)
    ]
    parts.append(_table(("setting", "type", "default", "meaning"), rows) if rows else "It has no settings.")
    return parts


def _plan_table(record: Record, technique: type[Technique]) -> str:
    import tomli_w
    from pydantic_core import to_jsonable_python

    values, required = {}, []
    for name, field in technique.model_fields.items():
        if field.is_required():
            required.append(f"{name} = ...  # required")
            continue
        value = to_jsonable_python(field.get_default(call_default_factory=True))
        if value is not None:  # TOML has no null; leaving a setting out means its default
            values[name] = value
    text = tomli_w.dumps({"use": {record.slug: values}}).strip()
    return "\n".join([text, *required])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(field: FieldInfo) -> str:
    """The type in words, its bounds beside it: ``float > 0, or none``."""
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in _BOUNDS
        if getattr(item, name, None) is not None
    ]
    annotation: Any = field.annotation
    arguments = get_args(annotation)
    optional = get_origin(annotation) in (Union, types.UnionType) and type(None) in arguments
    if optional:
        names = " or ".join(_type_name(a) for a in arguments if a is not type(None))
    else:
        names = _type_name(annotation)
    return " ".join([names, ", ".join(bounds)]).strip() + (", or none" if optional else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is not None and arguments:
        inner = ", ".join("..." if a is Ellipsis else _type_name(a) for a in arguments)
        return f"{_type_name(origin)} of {inner}"
    return getattr(annotation, "__name__", str(annotation))


def _measured(record: Record, published: Published | None) -> str:
    if published is None:
        what = f"`hasten bench {record.slug}` measures it." if record.built else "It is not built yet."
        return f"No comparison is published. {what}"
    p = published
    rows = [
        (
            "Speed ratio",
            f"**{p.median:.2f}x**, 95% interval {p.low:.2f} to {p.high:.2f}, {p.pairs} pairs of runs",
        ),
        ("Quality", f"{p.quality} ({p.better} is better)"),
        ("Peak memory", f"{p.baseline_mb:.0f} → {p.candidate_mb:.0f} MiB"),
        ("Baseline", f"`{p.baseline}`"),
        ("Candidate", f"`{p.candidate}`"),
        ("Workload", f"`{p.workload}`"),
        ("Machine", p.machine),
        ("Commit", f"`{p.commit[:12]}`"),
    ]
    rows += [("Caution", reason) for reason in p.doubts]
    return _bullets(rows)


def _family(records: list[Record], checkout: Path | None) -> str:
    rows = []
    for record in records:
        published = published_of(record, checkout)
        rows.append(
            (
                f"[`{record.slug}`]({record.slug}.md)",
                _text(record.title),
                ", ".join(f"`{name}`" for name in record.slots),
                "yes" if record.lossless else "no",
                record.state,
                published.headline() if published else "",
            )
        )
    return _table(("system", "title", "slots", "lossless", "state", "measured"), rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _bullets(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- **{name}**: {_text(' '.join(text.split()))}" for name, text in rows)


def _cell(text: str) -> str:
    return _text(" ".join(text.split())).replace("|", "\\|")


def _text(text: str) -> str:
    """Keep ``<`` from starting an HTML tag."""
    return text.replace("<", "\\<")


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
