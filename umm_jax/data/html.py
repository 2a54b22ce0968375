"""Conversations as one self-contained page: images inside, nothing loaded from elsewhere, text escaped."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image

from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, Part, TaskCall, Text, Turn, spell
from umm_jax.data.files import write_atomic

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #6b7280; --page: #f4f5f7; --card: #fff;
  --user: #e8eefc; --bot: #f1f3f5; --line: #e1e4e8; --mark: #d6336c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3af; --page: #111317;
  --card: #1a1d22; --user: #25324d; --bot: #24282e; --line: #2d3238; --mark: #f783ac } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 46rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.4rem; font-weight: 650 }
article { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem 1.3rem;
  margin: 1.2rem 0 }
header { font-size: .82rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: .2rem .9rem }
header b { color: var(--ink) }
section { display: flex; flex-direction: column; margin-top: .8rem; align-items: flex-start }
section.user { align-items: flex-end }
section > small { color: var(--soft); margin: 0 .4rem .15rem }
section > div { background: var(--bot); border-radius: 12px; padding: .5rem .8rem; max-width: 85% }
section.user > div { background: var(--user) }
section.system > div { background: none; border: 1px dashed var(--line) }
p { margin: .15rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: .35rem 0; display: inline-block; vertical-align: top }
figure > span { position: relative; display: block }
figure img { display: block; width: 100%; image-rendering: pixelated; border-radius: 6px }
figure i { position: absolute; border: 2px solid var(--mark); border-radius: 2px; box-sizing: border-box }
figcaption, code { font-size: .8rem; color: var(--soft) }
"""


def write_html(conversations: Iterable[Conversation], path: str | Path, title: str = "Conversations") -> None:
    """Writes the page, whole or not at all.

    Raises:
        DataError: an image cannot be decoded for showing a mask on it. StorageError: disk full.
    """
    articles = "\n".join(article(conversation) for conversation in conversations)
    write_atomic(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main><h1>{html.escape(title)}</h1>\n{articles}\n"
        "</main></body></html>\n",
    )


def article(c: Conversation) -> str:
    """One conversation as an element of a page that has STYLE."""
    facts = {"source": c.source, "license": c.license, "language": c.language, "split": c.split}
    facts["made by"] = " > ".join(c.provenance)
    said = "".join(f"<span>{key}: {html.escape(value)}</span>" for key, value in facts.items() if value)
    turns = "\n".join(_turn(index, turn, c) for index, turn in enumerate(c.turns))
    return f"<article><header><b>{html.escape(c.id)}</b>{said}</header>\n{turns}</article>"


def _turn(index: int, turn: Turn, c: Conversation) -> str:
    notes = [f"{index} {turn.role}", turn.op or "", "learned" if turn.loss else ""]
    if turn.depends_on:
        notes.append(f"depends on {', '.join(map(str, turn.depends_on))}")
    aside = html.escape(" · ".join(note for note in notes if note))
    parts = "".join(_part(part, c) for part in turn.parts)
    return f'<section class="{html.escape(turn.role)}"><small>{aside}</small><div>{parts}</div></section>'


def _part(part: Part, c: Conversation) -> str:
    match part:
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Image(ref):
            image = c.images[ref]
            return _figure(image, f"{ref}, {image.width} x {image.height}")
        case Mask(of, _, _, label):
            return _figure(_marked(c.images[of], part), f"{label or 'mask'} of {of}")
        case Box(of, (x0, y0, x1, y1), label):
            place = f"left:{x0:.2%};top:{y0:.2%};width:{x1 - x0:.2%};height:{y1 - y0:.2%}"
            return _figure(c.images[of], f"{label or 'box'} of {of}", f'<i style="{place}"></i>')
        case TaskCall():
            return f"<code>{html.escape(spell(part))}</code>"


def _figure(image: ImageData, caption: str, over: str = "") -> str:
    # Tiny drawings are enlarged by a whole factor, so that their pixels stay squares of one size.
    width = image.width * max(1, 160 // image.width) if image.width < 160 else min(image.width, 420)
    data = base64.b64encode(image.data).decode()
    source, caption = f"data:{html.escape(image.mime)};base64,{data}", html.escape(caption)
    return (
        f'<figure><span style="width:{width}px;max-width:100%">'
        f'<img src="{source}" alt="{caption}">{over}</span>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _marked(image: ImageData, mask: Mask) -> ImageData:
    """The image with everything outside the mask faded."""
    region = PIL.Image.fromarray(mask.array().astype(np.uint8) * 255)
    region = region.resize((image.width, image.height), PIL.Image.Resampling.NEAREST)
    alpha = np.where(np.asarray(region) > 0, 255, 60).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.dstack([image.array(), alpha])).save(buffer, "PNG", compress_level=1)
    return ImageData(buffer.getvalue(), "image/png", image.width, image.height)
