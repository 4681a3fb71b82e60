"""Sizes in words, wherever people read them."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_text(count: float) -> str:
    """1536 -> 1.5 KiB. Whole numbers without a point."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    number = f"{count:.0f}" if count == int(count) else f"{count:.1f}"
    return f"{number} {_UNITS[unit]}"


def exact_size_text(size_bytes: int) -> str:
    """1536 -> 1.5 KiB (1536 bytes), where the last byte counts too."""
    return size_text(size_bytes) if size_bytes < 1024 else f"{size_text(size_bytes)} ({size_bytes} bytes)"
