"""Pieces of a self-contained HTML page: no network, no script, light and dark. Every function returns markup.

Text arguments are escaped here; arguments called `body` or `rows` are markup already.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence

Points = Sequence[tuple[float, float]]

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d2126;--soft:#626b76;--line:#e4e1da;
--track:#eeebe4;
--accent:#2f6fdb;--good:#23875a;--bad:#c4473d;--mine:#2f6fdb;--mine-ink:#fff;--theirs:#f0ede6;
--c0:#2f6fdb;--c1:#d97a1e;--c2:#23875a;--c3:#8a55c8;--c4:#c4473d;--c5:#178a99;--c6:#a3801a;--c7:#c2508f}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1c1f25;--ink:#e6e8eb;--soft:#97a0ab;
--line:#2c3038;
--track:#282c34;--accent:#7aa7ff;--good:#5cc796;--bad:#f0837a;--mine:#2c5fbd;--mine-ink:#fff;
--theirs:#262a32;
--c0:#7aa7ff;--c1:#f2a356;--c2:#5cc796;--c3:#bb94ee;--c4:#f0837a;--c5:#58c3d0;--c6:#d6b655;--c7:#ec8cc0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 24px 96px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 8px}
h2{font-size:21px;letter-spacing:-.01em;margin:56px 0 6px}
h3{font-size:15px;margin:0 0 10px}
p{max-width:72ch;margin:0 0 14px}
.soft{color:var(--soft)}.small{font-size:13.5px}
code,pre,.num{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
font-variant-numeric:tabular-nums}
code{font-size:.92em}pre{font-size:12.5px;line-height:1.45;overflow:auto;margin:12px 0 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px 20px}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:20px 0 0;padding:0}
.facts div{min-width:96px}.facts dt{color:var(--soft);font-size:13px}.facts dd{margin:0;font-size:19px;
font-weight:600}
.grid{display:grid;gap:14px}.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.tiles{grid-template-columns:repeat(auto-fill,minmax(232px,1fr))}
.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.skill header{display:flex;align-items:baseline;justify-content:space-between;gap:12px}
.skill h3{margin:0}.skill b{font-size:24px;letter-spacing:-.01em}
.bar{display:grid;grid-template-columns:minmax(92px,34%) 1fr 44px;gap:10px;align-items:center;
font-size:13px;margin-top:5px}
.bar .name{color:var(--soft);overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar .num{text-align:right;color:var(--soft)}
.track{height:7px;border-radius:4px;background:var(--track);overflow:hidden;display:block}
.track i{display:block;height:100%;border-radius:4px;background:var(--soft);opacity:.55}
.bar.model{margin-top:12px}.bar.model .name,.bar.model .num{color:var(--ink);font-weight:600}
.bar.model .track{height:12px;border-radius:6px}.bar.model .track i{background:var(--accent);opacity:1;
border-radius:6px}
.tile{display:flex;flex-direction:column;gap:10px}.tile .say{font-size:13.5px;line-height:1.4;flex:1}
.pics{display:flex;gap:10px;align-items:flex-end}.pics figure{flex:0 1 92px}
figure{margin:0}figcaption{font-size:12px;color:var(--soft);margin-top:3px}
img.px{image-rendering:pixelated;display:block;border-radius:6px;border:1px solid var(--line);width:92px;
height:auto}
.tag{display:inline-block;font-size:12px;font-weight:600;border-radius:99px;padding:0 9px;
border:1px solid currentColor}
.tag.good{color:var(--good)}.tag.bad{color:var(--bad)}
.chat{display:flex;flex-direction:column;gap:8px;max-width:640px}
.bubble{border-radius:16px;padding:9px 14px;max-width:80%;align-self:flex-start;background:var(--theirs)}
.bubble.user{align-self:flex-end;background:var(--mine);color:var(--mine-ink)}
.bubble img.px{margin:4px 0;width:132px}
.verdict{font-size:12.5px;color:var(--soft);margin:-4px 6px 6px}.verdict.bad{color:var(--bad)}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{font-size:11px;fill:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;margin-top:8px;color:var(--soft)}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;width:100%}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:baseline}
th{color:var(--soft);font-weight:500}td.num,th.num{text-align:right}
summary{cursor:pointer;font-weight:600}details{margin-top:12px}
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, lead: str, body: str) -> str:
    """A titled section; empty when it has nothing to show."""
    if not body:
        return ""
    return f'<section><h2>{escape(title)}</h2><p class="soft">{escape(lead)}</p>{body}</section>\n'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs
    ) + "</dl>"  # fmt: skip


def grid(cells: Iterable[str], kind: str = "two") -> str:
    cells = list(cells)
    return f'<div class="grid {kind}">{"".join(cells)}</div>' if cells else ""


def number(value: float | None) -> str:
    """A score as people read it: .934, 1.00, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}".replace("0.", ".", 1)


def clock(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bar(name: str, value: float, kind: str = "") -> str:
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<div class="bar {kind}"><span class="name" title="{escape(name)}">{escape(name)}</span>'
        f'<span class="track"><i style="width:{width:.1f}%"></i></span>'
        f'<span class="num">{number(value)}</span></div>'
    )


def skill(title: str, value: float, stderr: float | None, n: int, oracles: Mapping[str, float]) -> str:
    """A card: the figure, its standard error, and thin bars of what shortcuts reach on the same items."""
    error = "" if stderr is None else f"± {number(stderr)} standard error, "
    return (
        f'<article class="card skill"><header><h3>{escape(title)}</h3>'
        f'<b class="num">{number(value)}</b></header>'
        f'<div class="soft small">{error}{n} items</div>{_bar("this model", value, "model")}'
        + "".join(_bar(name, v) for name, v in sorted(oracles.items(), key=lambda kv: -kv[1]))
        + "</article>"
    )


def picture(png: bytes, caption: str = "", alt: str = "") -> str:
    """A small picture with its pixels kept sharp, inlined."""
    data = base64.b64encode(png).decode("ascii")
    image = f'<img class="px" alt="{escape(alt or caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>" if caption else image


def tag(good: bool, text: str) -> str:
    return f'<span class="tag {"good" if good else "bad"}">{escape(text)}</span>'


def tile(say: str, pictures: Sequence[tuple[str, bytes | None]], verdict: str = "", note: str = "") -> str:
    """A card of pictures with captions under what was said; `verdict` is markup, `note` small print."""
    pics = "".join(picture(png, caption) for caption, png in pictures if png is not None)
    return (
        f'<article class="card tile"><div class="say">{escape(say)}</div>'
        + (f'<div class="pics">{pics}</div>' if pics else "")
        + (f"<div>{verdict}</div>" if verdict else "")
        + (f'<div class="soft small">{escape(note)}</div>' if note else "")
        + "</article>"
    )


def bubble(role: str, body: str, verdict: str = "", good: bool = True) -> str:
    """One turn of a conversation; `verdict` stands below it in small print."""
    side = "user" if role == "user" else "theirs"
    below = f'<div class="verdict {"" if good else "bad"}">{escape(verdict)}</div>' if verdict else ""
    return f'<div class="bubble {side}">{body}</div>{below}'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table whose columns are figures but for those in `words`; cells are escaped."""

    def cells(tag_name: str, row: Sequence[str]) -> str:
        kinds = ["" if i in words else "num" for i in range(len(row))]
        return "".join(f'<{tag_name} class="{k}">{escape(c)}</{tag_name}>' for k, c in zip(kinds, row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="card scroll"><table><thead><tr>{cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


# --- curves -----------------------------------------------------------------------------------------


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        steps = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        inside = [s for s in steps if low - 1e-9 <= math.log10(s) <= high + 1e-9]
        return inside if len(inside) <= 6 else [s for s in inside if f"{s:e}"[0] == "1"]
    span = high - low or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    unit *= next(m for m in (1, 2, 5, 10) if span / (unit * m) <= 5)
    first = math.ceil(low / unit - 1e-9)
    return [i * unit for i in range(first, math.floor(high / unit + 1e-9) + 1)]


def _smooth(points: Points, log: bool) -> list[tuple[float, float]]:
    """Each value replaced by the mean (geometric on a log axis) of those around it: no lag, unlike an average
    of the past."""
    values = [math.log(v) if log else v for _, v in points]
    reach = max(1, len(points) // 25)
    out = []
    for i, (x, _) in enumerate(points):
        # The window shrinks on both sides alike near the ends, or the curve would bend there.
        r = min(reach, i, len(points) - 1 - i)
        mean = sum(values[i - r : i + r + 1]) / (2 * r + 1)
        out.append((x, math.exp(mean) if log else mean))
    return out


def curves(
    title: str,
    series: Mapping[str, Points],
    *,
    log: bool = False,
    smooth: bool = True,
    y: tuple[float, float] | None = None,
) -> str:
    """A card with lines over training steps, the last value of each in the legend.

    Args:
        series: name -> (step, value) points. Left out are infinities, NaN and, on a log axis, values <= 0.
        log: logarithmic y axis.
        y: fixed range of the y axis; the range of the data otherwise.

    A line of more than 60 points is drawn faint, with a smoothed one on top if `smooth`.
    """
    kept = {
        name: [(x, v) for x, v in points if math.isfinite(v) and (v > 0 or not log)]
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    width, height, left, right, top, bottom = 480, 230, 46, 10, 8, 26
    scale = math.log10 if log else float
    values = [scale(v) for points in kept.values() for _, v in points]
    low, high = (scale(y[0]), scale(y[1])) if y else (min(values), max(values))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(x for points in kept.values() for x, _ in points) or 1

    def px(x: float) -> float:
        return left + (width - left - right) * x / last

    def py(v: float) -> float:
        return height - bottom - (height - top - bottom) * (scale(v) - low) / (high - low)

    parts = []
    for v in _ticks(low, high, log):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(v):.1f}" y2="{py(v):.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 7}" y="{py(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>'
        )
    for x in _ticks(0, last, False):
        parts.append(f'<text x="{px(x):.1f}" y="{height - 7}" text-anchor="middle">{x:g}</text>')
    legend = []
    for i, (name, points) in enumerate(kept.items()):
        color = f"var(--c{i % 8})"
        lines = [(points, 1.8, 1.0)]
        if smooth and len(points) > 60:
            lines = [(points, 1.0, 0.28), (_smooth(points, log), 1.8, 1.0)]
        for line, stroke, opacity in lines:
            path = " ".join(f"{px(x):.1f},{py(v):.1f}" for x, v in line)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{stroke}" '
                f'stroke-linejoin="round" opacity="{opacity}"/>'
            )
        if len(points) <= 40:
            parts += [
                f'<circle cx="{px(x):.1f}" cy="{py(v):.1f}" r="2.4" fill="{color}">'
                f"<title>{escape(name)}, step {x:g}: {v:.4g}</title></circle>"
                for x, v in points
            ]
        legend.append(
            f'<span><i style="background:{color}"></i>{escape(name)} '
            f'<span class="num">{points[-1][1]:.3g}</span></span>'
        )
    return (
        f'<article class="card"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{"".join(legend)}</div></article>'
    )
