"""A map of blocks on disk: which of its pages say what durably, so that only those that changed are written."""

from collections.abc import Callable, Iterable

from mirror.core.map_pages import CLEAN_PAGE, Bitmaps
from mirror.runtime import Runtime

Pages = Iterable[tuple[int, bytes]]


class DurableMap:
    """`pages`: those that hold something on disk. `write` makes pages durable together; `encode` makes one."""

    def __init__(
        self,
        runtime: Runtime,
        pages: dict[int, Bitmaps],
        encode: Callable[[int, Bitmaps], bytes],
        write: Callable[[Pages], None],
    ) -> None:
        self._pages = pages
        self._encode = encode
        self._write = write
        self._lock = runtime.lock()

    def pages(self) -> set[int]:
        """Those that hold something on disk."""
        return set(self._pages)

    def persist(self, pages: set[int], bitmaps_of: Callable[[int], Bitmaps]) -> None:
        """Make these pages durable as they are now. Raises DeviceError.

        Also where none has changed: what a start has read may stand in the page cache only.
        """
        if not pages:
            return
        with self._lock:
            changed: dict[int, Bitmaps] = {}
            for page in sorted(pages):
                bitmaps = bitmaps_of(page)
                if bitmaps != self._pages.get(page, CLEAN_PAGE):
                    changed[page] = bitmaps
            # Until they are durable, nothing equals them: of a failed write either may be there.
            self._pages.update((page, []) for page in changed)
            self._write((page, self._encode(page, bitmaps)) for page, bitmaps in changed.items())
            for page, bitmaps in changed.items():
                if any(bitmaps):
                    self._pages[page] = bitmaps
                else:
                    self._pages.pop(page, None)
