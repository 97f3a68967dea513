"""Numbers as people read them in tables."""


def duration_text(seconds: float) -> str:
    """45 -> "45s", 754 -> "12m34s", 98000 -> "1d03h"."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    if minutes:
        return f"{minutes}m{whole % 60:02}s"
    return f"{whole}s"


def bytes_text(count: int) -> str:
    """1234567 -> "1.2 MB" (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def number_text(value: float | None, digits: int = 0) -> str:
    """A number with `digits` decimals; "" for None."""
    return "" if value is None else f"{value:.{digits}f}"
