"""Pictures as PNG: the name checked before any work, letters that a font of this machine has, or else their numbers."""

import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any

from megapoly.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def checked_png(path: str) -> str:
    """The value of a flag --png; ConfigError for one that could not be written when the work is done."""
    folder = os.path.dirname(path) or "."
    if not path.lower().endswith(".png"):
        raise ConfigError(f"--png ({path}) must end in .png")
    if not os.path.isdir(folder):
        raise ConfigError(f"--png ({path}): the folder does not exist")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f"--png ({path}): cannot be written; give another place")
    if not has_matplotlib():
        raise ConfigError(f"--png ({path}): drawing needs matplotlib; pip install 'megapoly[plot]'")
    return path


def save_png(figure: "Figure", path: str, dpi: int) -> None:
    """Write a figure; ConfigError where that fails.

    Letters that matplotlib's own font lacks come from fonts of this machine; where none has one, U+D55C is written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # what is missing is found below
        figure.draw_without_rendering()  # only then ticks have their labels
        _letter(figure)
        try:
            figure.savefig(path, format="png", dpi=dpi)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _letter(figure: "Figure") -> None:
    from matplotlib import font_manager
    from matplotlib.text import Text

    texts: list[Any] = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    missing = {ord(letter) for text in texts for letter in text.get_text()} - {ord("\n"), *default}
    families = font_manager.FontProperties().get_family()
    for font in font_manager.fontManager.ttflist if missing else ():
        if font.name.startswith("Last Resort"):  # boxes for every letter there is
            continue
        found = missing & font_manager.get_font(font.fname).get_charmap().keys()
        if found:
            missing, families = missing - found, [*families, font.name]
    for text in texts:
        text.set_fontfamily(families)
    numbers = {letter: f"U+{letter:04X} " for letter in missing}
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)] if missing else ():
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if not all(label.isascii() for label in labels):
            axis.set_ticks(axis.get_ticklocs(), [label.translate(numbers) for label in labels])
    for text in texts:
        text.set_text(text.get_text().translate(numbers))
