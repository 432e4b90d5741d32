"""Reading text that Zstandard has compressed."""

import io
from typing import Any, BinaryIO

import zstandard


class ZstdFile(io.RawIOBase):
    """Frames of Zstandard one after the other; unlike the library's own reader it notices a truncated last frame."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._pending = file, memoryview(b"")
        self._decoder: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            at_border = self._decoder is None or self._decoder.eof
            compressed = self._decoder.unused_data if self._decoder and at_border else b""
            # Small pieces: a few bytes of a frame may stand for megabytes of text.
            compressed = compressed or self._file.read(4096)
            if not compressed:
                if not at_border:
                    raise EOFError("the last frame has no end")
                return 0
            if at_border:
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            self._pending = memoryview(self._decoder.decompress(compressed))
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n
