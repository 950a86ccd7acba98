"""Results as tables: one for each group of rows, with what failed and what was not reached."""

from typing import Any

LIST = ("machine",)
"""Groups of one row, written as a list."""


def as_text(value: Any) -> str:
    """A figure in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if value == 0 and isinstance(value, float):
        return "0"
    if isinstance(value, float):
        small = abs(value) < 0.01
        return f"{value:.1e}" if small else f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, dict):
        return "; ".join(f"{name} {as_text(one)}" for name, one in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown of all results, in the order in which groups were first met."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["group"], []).append(result)
    return "\n".join(_table(group, rows) for group, rows in groups.items())


def _table(group: str, rows: list[dict[str, Any]]) -> str:
    measured = [row for row in rows if "figures" in row]
    columns = list(dict.fromkeys(name for row in measured for name in row["figures"]))
    lines = [f"## {group}", ""]
    if group in LIST:
        lines += [f"- {name}: {as_text(value)}" for row in measured for name, value in row["figures"].items()]
    elif measured:
        lines += [f"| | {' | '.join(columns)} | s |", "|---" * (len(columns) + 2) + "|"]
        for row in measured:
            cells = [as_text(row["figures"].get(name)) for name in columns]
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['seconds']:.1f} |")
    lines += [f"- not measured: {row['name']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*lines, ""])
