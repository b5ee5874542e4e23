"""Turn documentation as software ships it into plain Markdown-like text, the same on every machine.

Only regular expressions with explicit character classes are used: the standard library's HTML parser changes
between Python releases, and the corpus must not.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import posixpath
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

MIN_CHARACTERS = 1200  # shorter reference pages are a sentence or two in a fixed form
AWS_SHARE = 3  # a third of the services keeps the two sources within a factor of three of each other

# Amazon Web Services: the service models of botocore, whose documentation strings are HTML

_BLOCK = re.compile(r"</?(?:p|ul|ol|dl|dt|dd|h[1-6]|pre|br|table|tr|td|th|div|para)(?:\s[^>]*)?/?>")
_ITEM = re.compile(r"<li(?:\s[^>]*)?>")
_NOTE = re.compile(r"<(?:note|important)(?:\s[^>]*)?>")
_CODE = re.compile(r"</?(?:code|filename|replaceable)(?:\s[^>]*)?>")
# Tags that only mark up; anything else in angle brackets is a placeholder such as <region>.
_MARKUP = re.compile(
    r"</?(?:a|b|i|u|em|strong|li|note|important|fullname|zonbook|xhtml|link|ulink|emphasis|span|sup|sub|script)"
    r"(?:\s[^>]*)?/?>"
)
_SPACES = re.compile(r"[ \t\r\n\u00a0]+")


def html_to_lines(text: str) -> list[str]:
    """The paragraphs and list items of an HTML fragment as lines of plain text, none empty."""
    text = _SPACES.sub(" ", text)
    text = _NOTE.sub("\nNote: ", _ITEM.sub("\n- ", _BLOCK.sub("\n", text)))
    text = html.unescape(_MARKUP.sub("", _CODE.sub("`", text)))
    lines = []
    prefix = ""
    for raw in text.split("\n"):
        line = _SPACES.sub(" ", raw).strip()
        if line in ("-", "Note:"):
            prefix = line + " "  # the item's text is in a paragraph of its own
        elif line:
            lines.append(prefix + line)
            prefix = ""
    return lines


def aws_documents(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """(name, text) of every `AWS_SHARE`-th product family, by its longest service.

    One service per family, because the services of a family (``waf``, ``wafv2``) repeat each other; a line
    that was said before is left out for the same reason.
    """
    latest: dict[str, str] = {}
    for path in wheel.namelist():
        if path.endswith("/service-2.json.gz"):
            service, version = path.split("/")[2:4]
            latest[service] = max(version, latest.get(service, ""))
    longest: dict[str, tuple[int, str, str]] = {}
    for service, version in sorted(latest.items()):
        found = re.match(r"[a-z]+?(?=v?[0-9]|-|$)", service)
        family = found.group() if found else service
        path = f"botocore/data/{service}/{version}/service-2.json.gz"
        size = wheel.getinfo(path).file_size
        if family not in longest or size > longest[family][0]:
            longest[family] = (size, service, path)
    said: set[str] = set()
    for family, (_, service, path) in longest.items():
        if hashlib.sha256(family.encode()).digest()[0] % AWS_SHARE == 0:
            yield f"aws/{service}", _aws_text(json.loads(gzip.decompress(wheel.read(path))), said)


def _aws_text(model: Mapping[str, Any], said: set[str]) -> str:
    shapes: Mapping[str, Any] = model["shapes"]
    out = [f"# {model['metadata']['serviceFullName']}", *_fresh(model.get("documentation", ""), said)]
    told: set[str] = set()
    for name, operation in model["operations"].items():
        out += [f"## {name}", *_fresh(operation.get("documentation", ""), said)]
        for side, label in (("input", "Request parameters"), ("output", "Response")):
            shape = operation.get(side, {}).get("shape")
            if shape is not None and shape not in told:
                told.add(shape)
                members = _members(shapes[shape], said)
                out += [f"{label} of {name}:", *members] if members else []
    types: list[str] = []
    for name, shape in shapes.items():
        if name in told:
            continue
        lines = _fresh(shape.get("documentation", ""), said) + _members(shape, said)
        types += [f"### {name}", *lines] if lines else []
    out += ["## Data types", *types] if types else []
    return "\n\n".join(out) + "\n"


def _members(shape: Mapping[str, Any], said: set[str]) -> list[str]:
    lines = []
    for name, member in shape.get("members", {}).items():
        found = _fresh(member.get("documentation", ""), said)
        if found:
            lines += [f"`{name}`: {found[0]}", *found[1:]]
    return lines


def _fresh(text: str, said: set[str]) -> list[str]:
    """The lines of ``text`` that no document said before."""
    lines = []
    for line in html_to_lines(text):
        if line not in said:
            said.add(line)
            lines.append(line)
    return lines


# CMake: the reStructuredText of its reference manual

_HELP = re.compile(r"cmake/data/share/cmake-[0-9.]+/Help/(.+)\.rst")
_MODULE_TEXT = re.compile(r"^#\[(=*)\[\.rst:\n(.*?)^#?\]\1\]", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"( *)\.\. +([A-Za-z][A-Za-z0-9_-]*)::(?: +(.*))?")
_LINK_ROLE = re.compile(r":(?:ref|doc|guilabel|term):`([^`]+?)(?: +<[^`]*>)?`")
_ROLE = re.compile(r":[A-Za-z_:]+:`([^`]+?)(?: +<[^`]*>)?`")
_REFERENCE = re.compile(r"`([^`]+?)(?: +<[^`]*>)?`__?")
_UNDERLINE = re.compile(r"([=\-^\"'~*#+])\1+")
_DROPPED = {"contents", "toctree", "only", "cmake-module", "include", "code-block", "parsed-literal"}
_DROPPED |= {"highlight", "productionlist", "table", "list-table", "literalinclude", "tabs", "group-tab"}
_WORDS = {
    "versionadded": "Added in version {}.",
    "versionchanged": "Changed in version {}.",
    "deprecated": "Deprecated since version {}.",
    "note": "Note: {}",
    "warning": "Warning: {}",
    "seealso": "See also: {}",
}


def cmake_documents(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """(name, text) of every page of the manual that says more than a few sentences."""
    names = set(wheel.namelist())
    pages = {path: page.group(1) for path in sorted(names) if (page := _HELP.fullmatch(path))}
    texts = {path: _included(wheel, names, path) for path in pages}
    parts = {part for _, included in texts.values() for part in included}
    for path, (text, _) in texts.items():
        text = rst_to_text(text)
        if path not in parts and len(text) >= MIN_CHARACTERS:
            yield f"cmake/{pages[path]}", text


def _included(wheel: zipfile.ZipFile, names: set[str], path: str, depth: int = 0) -> tuple[str, set[str]]:
    """The page at ``path`` with the files that it includes put in their place, and the paths of those."""
    text = wheel.read(path).decode("utf-8")
    if path.endswith(".cmake"):
        text = "\n".join(block for _, block in _MODULE_TEXT.findall(text))
    lines: list[str] = []
    included: set[str] = set()
    for line in text.split("\n"):
        found = _DIRECTIVE.fullmatch(line)
        if found is not None and found.group(2) in ("include", "cmake-module") and depth < 3:
            target = posixpath.normpath(
                posixpath.join(posixpath.dirname(path), (found.group(3) or "").strip())
            )
            if target in names:
                inner, deeper = _included(wheel, names, target, depth + 1)
                lines += [found.group(1) + part for part in inner.split("\n")]
                included |= {target, *deeper}
        else:
            lines.append(line)
    return "\n".join(lines), included


def rst_to_text(text: str) -> str:
    """reStructuredText with its headings as Markdown, its prose and code kept, directives put into words."""
    lines = text.replace("\t", "        ").split("\n")
    levels: list[str] = []
    out: list[str] = []
    skip_deeper_than: int | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip(" "))
        if skip_deeper_than is not None and (not line.strip() or indent > skip_deeper_than):
            continue
        skip_deeper_than = None
        after = lines[number + 1] if number + 1 < len(lines) else ""
        if _UNDERLINE.fullmatch(line.rstrip()):
            continue  # an overline, an underline or a table's rule
        directive = _DIRECTIVE.fullmatch(line)
        if directive is not None:
            name, argument = directive.group(2), (directive.group(3) or "").strip()
            if name in ("contents", "toctree", "highlight"):
                skip_deeper_than = indent
            elif name in _WORDS:
                out.append(directive.group(1) + _inline(_WORDS[name].format(argument)).rstrip())
            elif argument and name not in _DROPPED:
                out.append(directive.group(1) + _inline(argument))
        elif line.lstrip().startswith(".. ") or line.strip() == "..":
            skip_deeper_than = indent  # a comment, a label or a substitution
        elif line.strip() and indent == 0 and _is_heading(line, after):
            mark = after[0]
            if mark not in levels:
                levels.append(mark)
            out.append("#" * (levels.index(mark) + 1) + " " + _inline(line.strip()))
        elif not re.fullmatch(r" *:[a-z-]+:(?: .*)?", line):  # options of directives
            out.append(_inline(line.rstrip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n") + "\n"


def _is_heading(line: str, after: str) -> bool:
    mark = after.rstrip()
    return _UNDERLINE.fullmatch(mark) is not None and len(mark) >= len(line.strip())


def _inline(line: str) -> str:
    """Literals and roles as `code`, references as plain words. NUL and SOH stand for backticks meanwhile."""
    line = _LINK_ROLE.sub(r"\1", line.replace("``", "\0"))
    line = _ROLE.sub("\1\\1\1", line)
    line = _REFERENCE.sub(r"\1", line).replace("\0", "`").replace("\1", "`")
    return re.sub(r"\\([ <>*|])", lambda found: found.group(1).strip(), line)
