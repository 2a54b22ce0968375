"""Conversation in a terminal: lines in, text and pictures out, a few commands that begin with a slash."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import PIL.Image

from umm_jax.config import ReplySettings, suggest
from umm_jax.conversation import Conversation, Image, ImageData, Part, Text, Turn, spell
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.data.inspect import preview
from umm_jax.errors import ConfigError, DataError, UserError
from umm_jax.families.contract import Replier
from umm_jax.generate import seed_of

HELP = """\
  /image PATH    show the model a picture with your next message
  /save FILE     write the conversation (.json) or the newest picture (.png)
  /undo          take back your last message and its reply
  /new           begin again
  /seed N        seed of the next replies: the same words and seed give the same reply
  /mode MODE     auto: the model decides; text: words only; image: draw first
  /quit          leave (as does the end of input)"""
MODES = ("auto", "text", "image")
COLUMNS = 48  # width of a preview in characters
LARGEST = 2048  # longer side of an attached picture in pixels; larger ones are reduced before they are kept


class Quit(Exception):
    """The user asked to leave."""


class Chat:
    """One conversation and what may be done to it.

    Args:
        replier: what :func:`umm_jax.generate.load` returns.
        settings: how replies are made; ``/mode`` changes its mode.
        folder: where pictures are written as 001.png, 002.png, ...
        out: receives what is said; `colour` says whether it can show 24-bit previews.
    """

    def __init__(
        self,
        replier: Replier,
        settings: ReplySettings,
        folder: Path,
        *,
        seed: int = 0,
        out: TextIO | None = None,
        colour: bool = False,
    ):
        self.replier, self.settings, self.folder, self.seed = replier, settings, folder, seed
        self.out, self.colour = out or sys.stdout, colour
        self.commands: dict[str, Callable[[str], None]] = {
            "image": self.image, "save": self.save, "undo": self.undo, "new": self.new,
            "seed": self.set_seed, "mode": self.mode, "quit": self.quit, "help": self.help,
        }  # fmt: skip
        self.new("")

    def line(self, line: str) -> None:
        """Does what one line asks: a command, or a message to the model. Raises UserError or Quit."""
        line = line.strip()
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            if name not in self.commands:
                raise ConfigError(f"/{name}: no such command{suggest(name, list(self.commands))}")
            self.commands[name](rest.strip())
        elif line:
            self.say(line)

    def say(self, text: str) -> None:
        """Sends a message with the attached pictures, and shows the reply. On an error nothing is kept."""
        parts = (*(Image(ref) for ref in self.attached), Text(text))
        asked = self.conversation.with_turn(Turn("user", parts), self.attached)
        # Every turn of a chat has its own noise, yet the whole chat repeats under the same seed.
        seed = seed_of(self.seed, "chat", len(asked.turns))
        reply = self.replier.reply([asked], self.settings, [seed])[0]
        answered = asked.with_turn(reply.turn, reply.images)
        self.before.append((self.conversation, self.attached))
        self.conversation, self.attached = answered, {}
        for part in reply.turn.parts:
            self.show(part)
        if not reply.turn.parts:
            self.write("(no answer)")

    def show(self, part: Part) -> None:
        if not isinstance(part, Image):
            self.write(spell(part))
            return
        pixels = self.conversation.images[part.ref].array()
        path = self._next_file()
        save_png(pixels, path)
        if self.colour:
            self.write(preview(pixels, COLUMNS))
        self.write(f"[picture: {path}]")

    def write(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    # --- commands, each taking the rest of its line ---

    def image(self, path: str) -> None:
        picture = read_image(path)
        # The family's serializer fits it to the size the model sees; here only the outlandish is reduced.
        self.attached[f"upload{len(self.conversation.images) + len(self.attached)}"] = picture
        if self.colour:
            self.write(preview(picture.array(), COLUMNS))
        self.write(f"(attached {path}, {picture.width} x {picture.height}; now say something about it)")

    def save(self, path: str) -> None:
        target = Path(path).expanduser()
        if not path or target.suffix not in (".json", ".png"):
            raise ConfigError(
                "/save needs a file name that ends in .json (conversation) or .png (newest picture)"
            )
        if target.suffix == ".json":
            if not self.conversation.turns:
                raise ConfigError("there is nothing to save yet")
            write_atomic(target, self.conversation.to_json() + "\n")
        else:
            shown = [p.ref for t in self.conversation.turns for p in t.parts if isinstance(p, Image)]
            if not shown:
                raise ConfigError("there is no picture in this conversation yet")
            save_png(self.conversation.images[shown[-1]].array(), target)
        self.write(f"(wrote {target})")

    def undo(self, _: str) -> None:
        if not self.before:
            raise ConfigError("there is nothing to take back")
        self.conversation, self.attached = self.before.pop()
        self.write("(took back the last message and its reply)")

    def new(self, _: str) -> None:
        self.conversation = Conversation("chat", ())
        self.attached: dict[str, ImageData] = {}
        self.before: list[tuple[Conversation, dict[str, ImageData]]] = []

    def set_seed(self, text: str) -> None:
        try:
            self.seed = int(text)
        except ValueError:
            raise ConfigError(f"/seed needs a whole number, got {text!r}") from None

    def mode(self, name: str) -> None:
        if name not in MODES:
            raise ConfigError(f"/mode {name}: no such mode{suggest(name, MODES)}")
        self.settings = dataclasses.replace(self.settings, mode=name)

    def help(self, _: str) -> None:
        self.write(HELP)

    def quit(self, _: str) -> None:
        raise Quit

    def _next_file(self) -> Path:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.stem) for p in self.folder.glob("*.png") if p.stem.isdigit()]
        return self.folder / f"{max(taken, default=0) + 1:03d}.png"


def run(chat: Chat, lines: Iterable[str], *, stop_on_error: bool = False) -> None:
    """Feeds lines to `chat` until they end or ask to quit.

    An error of the user's is one line and the chat goes on, unless `stop_on_error`. Ctrl-C during a reply
    abandons that reply.
    """
    for line in lines:
        try:
            chat.line(line)
        except Quit:
            return
        except UserError as error:
            if stop_on_error:
                raise
            chat.write(f"error: {error}")
        except KeyboardInterrupt:
            if stop_on_error:
                raise
            chat.write("(stopped; your message was not kept)")


def typed(prompt: str = "you> ") -> Iterator[str]:
    """Lines from the keyboard, with history and editing where the platform has readline."""
    try:
        import readline  # noqa: F401  # importing it is what gives input() its line editing
    except ImportError:
        pass
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return


def read_image(path: str) -> ImageData:
    """A picture file as RGB, its longer side at most LARGEST. Raises DataError."""
    if not path:
        raise ConfigError("/image needs the path of a picture")
    try:
        with PIL.Image.open(Path(path).expanduser()) as picture:
            picture = picture.convert("RGB")
            picture.thumbnail((LARGEST, LARGEST))
            return ImageData.from_array(np.asarray(picture))
    except PIL.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture this program can read") from None
    except PIL.Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def save_png(pixels: np.ndarray, path: Path) -> None:
    """uint8[h, w, 3] as a PNG file. Raises StorageError."""
    write_atomic(path, ImageData.from_array(pixels).data)
