"""The command lines of the tools: a mistake is one line, as any other mistake of a user is."""

import argparse
from typing import NoReturn

from megapoly.errors import ConfigError

MOST_CHARACTERS = 300


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose error raises ConfigError instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:MOST_CHARACTERS]}; see --help")
