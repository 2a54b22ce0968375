"""The page of a data report: tables with bars, and some records with their pictures; nothing is loaded."""

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from umm_jax.conversation import Conversation
from umm_jax.data.html import STYLE, article

_MORE = """
main { max-width: 60rem } table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: .9rem }
td, th { border-bottom: 1px solid var(--line); padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
td b { display: inline-block; height: .7rem; background: var(--mark); border-radius: 2px;
  vertical-align: middle }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0 2rem }
h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: .95rem; margin: .6rem 0 0 }
"""


def page(report: Mapping[str, Any], samples: Sequence[Conversation], name: str) -> str:
    """The report as one page, nothing loaded from elsewhere."""
    context = report["context"]
    parts = [f"<h1>{html.escape(name)}</h1>"]
    parts.append(f"<p>{report['records']} records, {report['read']} of them read for this page.</p>")
    if context["dependent turns"]:
        parts.append(
            "<p>Of {dependent turns} turns that are marked as depending on the history, {share:.2%} need it: "
            "their reference fits the right picture with the whole history, and not with none, not without "
            "the exchange it means, not with the last alone. Always taking the last picture is right in "
            "{recency baseline:.1%} of them; chance is {chance:.1%}.</p>".format(
                share=context["necessity"], **context
            )
        )
    parts.append('<h2>Sizes</h2><div class="grid">')
    for key in ("turns", "images", "words", "dependency distance", "antecedents"):
        spread = report[key]
        parts.append(
            _table(f"{key}: mean {spread['mean']:g}, most {spread['max']}", _binned(spread["counts"]))
        )
    parts.append('</div><h2>What is done</h2><div class="grid">')
    for key in ("operations", "operations in a row", "roles", "distractors", "references", "words by"):
        parts.append(_table(key, report[key]))
    parts.append('</div><h2>Variety</h2><div class="grid">')
    for key in ("distinct", "skeletons", "duplicates"):
        parts.append(_table(key, report[key], bars=False))
    parts.append("</div>" + _answer_table(report["answers"]))
    parts.append('<h2>Where it comes from</h2><div class="grid">')
    for key in ("sources", "licenses", "splits"):
        parts.append(_table(key, report[key]))
    for kind, counts in report["made"].items():
        parts.append(_table(kind, counts))
    parts.append("</div>")
    for other, found in report["overlap"].items():
        rows = {kind: row["records"] for kind, row in found.items()}
        parts.append(_table(f"records in common with {other}", rows, bars=False))
    if report["rejects"]:
        rows = "".join(
            f"<tr><td>{html.escape(r['reason'])}</td><td>{html.escape(r['where'])}</td>"
            f"<td>{html.escape(r['cause'])}</td></tr>"
            for r in report["rejects"]
        )
        parts.append(f"<h2>Some of what was rejected</h2><table>{rows}</table>")
    parts.append("<h2>Some records</h2>")
    parts += [article(sample) for sample in samples]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{_MORE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _table(title: str, rows: Mapping[str, Any], bars: bool = True, most: int = 24) -> str:
    if not rows:
        return ""
    largest = max(value for value in rows.values()) or 1
    lines = []
    for name, value in list(rows.items())[:most]:
        bar = f'<td><b style="width:{6 * value / largest:.2f}rem"></b></td>' if bars else ""
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        lines.append(f'<tr><td>{html.escape(str(name))}</td><td class="n">{shown}</td>{bar}</tr>')
    more = f"<tr><td>and {len(rows) - most} more</td></tr>" if len(rows) > most else ""
    return f"<div><h3>{html.escape(title)}</h3><table>{''.join(lines)}{more}</table></div>"


def _binned(counts: Mapping[str, int], bins: int = 16) -> dict[str, int]:
    """Many values as few ranges."""
    values = [int(value) for value in counts]
    if len(values) <= bins:
        return dict(counts)
    width = max(1, math.ceil((max(values) + 1 - min(values)) / bins))
    found: Counter[int] = Counter()
    for value, count in counts.items():
        found[(int(value) - min(values)) // width] += count
    low = min(values)
    return {f"{low + k * width} to {low + (k + 1) * width - 1}": found[k] for k in sorted(found)}


def _answer_table(answers: Mapping[str, Mapping[str, Any]]) -> str:
    if not answers:
        return ""
    head = "".join(f"<th>{key}</th>" for key in ("operation", *next(iter(answers.values()))))
    rows = "".join(
        f"<tr><td>{html.escape(op)}</td>"
        + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values())
        + "</tr>"
        for op, row in answers.items()
    )
    return f"<h3>answers in words</h3><table><tr>{head}</tr>{rows}</table>"
