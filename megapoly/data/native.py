"""The extension in C++ (_sampler.cpp), or why it is not here; the same arithmetic in numpy then serves everything."""

import importlib
from dataclasses import dataclass
from types import ModuleType

# Raised with every change of what the extension offers: a file built from older sources must not be called.
INTERFACE = 1
REBUILD = "build it with a C++17 compiler by `pip install -e .`"


@dataclass(frozen=True)
class Native:
    """The extension, or None and the reason."""

    module: ModuleType | None
    reason: str = ""


def load(name: str = "megapoly.data._sampler") -> Native:
    """Look for the extension once; a missing, broken or outdated one is no error, but is told by `reason`."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return Native(None, f"{name} cannot be imported ({error}); {REBUILD}")
    found = getattr(module, "INTERFACE", None)
    if found != INTERFACE:
        return Native(None, f"{name} was built from other sources (interface {found}, not {INTERFACE}); {REBUILD}")
    return Native(module)


NATIVE = load()
