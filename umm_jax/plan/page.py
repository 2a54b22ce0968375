"""A plan as one page: what it needs, a memory timeline, and where its parts stand under the roofline."""

import html
import math

from umm_jax.plan.chips import GIB
from umm_jax.plan.estimate import Report, lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #6b7280; --page: #f4f5f7; --card: #fff;
  --line: #e1e4e8; --mark: #1c7ed6; --warn: #d6336c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3af; --page: #111317;
  --card: #1a1d22; --line: #2d3238; --mark: #74c0fc; --warn: #f783ac } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
pre, table, svg { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
pre { padding: 1rem; overflow-x: auto; font-size: .8rem }
table { border-collapse: collapse; width: 100%; font-size: .85rem }
td, th { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left }
p { color: var(--soft) }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 12px }
"""
WIDTH, HEIGHT, LEFT, BOTTOM = 900, 300, 70, 40


def page(found: Report) -> str:
    """The page, whole: nothing is loaded from elsewhere."""
    said = html.escape("\n".join(lines(found)))
    parts = [f"<h1>{html.escape(found.facts['program'])} on {html.escape(found.topology)}</h1>"]
    parts.append("<p>Compiled, not run. Times are estimates, not measurements.</p>")
    parts.append(f"<pre>{said}</pre>")
    if found.replay is not None and found.replay.timeline:
        parts += ["<h2>Memory along the step</h2>", _timeline(found)]
        parts.append(
            "<p>Our replay of the schedule, arguments included; loops stand at their widest. The compiler's "
            "own peak is the dashed line.</p>"
        )
        rows = (
            f"<tr><td>{html.escape(b.shape[:80])}</td><td>{b.bytes / GIB:.3f}</td>"
            f"<td>{html.escape(b.source or b.op_name[-80:])}</td></tr>"
            for b in found.replay.largest
        )
        parts.append(
            "<h2>Largest at the peak</h2><table><tr><th>array</th><th>GiB</th><th>from</th></tr>"
            + "".join(rows)
            + "</table>"
        )
    if found.estimate is not None:
        parts += ["<h2>Roofline</h2>", _roofline(found)]
        parts.append(
            "<p>FLOPs per byte of memory traffic against FLOP/s by the estimate's cycles, for each part that "
            "has both; traffic counts every array in full, so points stand too far left rather than too far "
            "right. Work in Pallas kernels is in neither.</p>"
        )
    parts += ["<h2>Where every array of the state lies</h2>", _placements(found)]
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>umm plan</title>'
    return f'<!doctype html><html lang="en">{head}<style>{_STYLE}</style><main>{body}</main></html>\n'


def _placements(found: Report) -> str:
    rows = (
        f"<tr><td>{html.escape(p['path'])}</td><td>{html.escape(str(p['shape']))}</td>"
        f"<td>{html.escape(p['spec'])}</td><td>{p['bytes'] / 2**20:,.1f}</td></tr>"
        for p in found.facts["placements"][:200]
    )
    head = "<tr><th>array</th><th>shape</th><th>axes</th><th>MiB on a device</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{content}</svg>'


def _timeline(found: Report) -> str:
    base = found.facts["memory"]["argument_size"]
    values = [base + v for v in found.replay.timeline]
    stride = max(1, len(values) // 800)
    # The widest of each stretch: a peak must not fall between two points.
    shown = [max(values[k : k + stride]) for k in range(0, len(values), stride)]
    peak = found.facts["memory"]["peak_memory"]
    top = max(*shown, peak, found.capacity or 0) * 1.05
    x = lambda k: LEFT + (WIDTH - LEFT - 20) * k / max(len(shown) - 1, 1)  # noqa: E731
    y = lambda v: HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 20) * v / top  # noqa: E731
    points = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in enumerate(shown))
    out = [f'<polyline points="{points}" fill="none" stroke="var(--mark)" stroke-width="1.5"/>']
    for value, name, dash in (
        (base, "arguments", "2 4"),
        (peak, "peak", "6 4"),
        (found.capacity, "the chip", ""),
    ):
        if value:
            out.append(
                f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
                f'stroke="var(--warn)" stroke-dasharray="{dash}"/>'
                f'<text x="{WIDTH - 24}" y="{y(value) - 4:.1f}" text-anchor="end">{name} '
                f"{value / GIB:.2f} GiB</text>"
            )
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 12}">the entry\'s schedule, {len(values)} steps</text>')
    return _svg("".join(out))


def _roofline(found: Report) -> str:
    peak, rate = found.peak_flops, found.bandwidth
    points = []
    for part, flops in found.executed.items():
        seconds = sum(found.cycles_by_part.get(part, {}).values())
        traffic = found.traffic.get(part, 0)
        if flops > 0 and seconds > 0 and traffic > 0:
            points.append((part, flops / traffic, flops / seconds))
    low, high = 0.0, 5.0  # log10 of FLOPs per byte
    floor, roof = math.log10(peak) - 4, math.log10(peak) + 0.3
    x = lambda v: LEFT + (WIDTH - LEFT - 20) * (min(max(math.log10(v), low), high) - low) / (high - low)  # noqa: E731
    y = lambda v: (  # noqa: E731
        HEIGHT
        - BOTTOM
        - (HEIGHT - BOTTOM - 20) * (min(max(math.log10(v), floor), roof) - floor) / (roof - floor)
    )
    knee = peak / rate
    out = [
        f'<polyline points="{x(1):.1f},{y(rate):.1f} {x(knee):.1f},{y(peak):.1f} {x(1e5):.1f},{y(peak):.1f}" '
        'fill="none" stroke="var(--warn)"/>',
        f'<text x="{x(knee) + 6:.1f}" y="{y(peak) - 6:.1f}">{peak / 1e12:.0f} TFLOP/s, from '
        f"{knee:.0f} FLOPs a byte</text>",
    ]
    for part, intensity, speed in points:
        out.append(
            f'<circle cx="{x(intensity):.1f}" cy="{y(speed):.1f}" r="5" fill="var(--mark)"/>'
            f'<text x="{x(intensity) + 8:.1f}" y="{y(speed) + 4:.1f}">{html.escape(part)} '
            f"{speed / 1e12:.1f} TFLOP/s</text>"
        )
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 12}">1 to 100,000 FLOPs per byte, logarithmic</text>')
    return _svg("".join(out))
