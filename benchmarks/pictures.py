"""Pictures of measurements as SVG: a sheet with axes, dots, lines, a legend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["BOTTOM", "LEFT", "RIGHT", "TOP", "At", "drawn"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 64, 744, 16, 408
At = Callable[[float, float], tuple[float, float]]
"""Where two numbers are on the sheet."""


def drawn(
    at: At,
    ticks: tuple[Iterable[float], Iterable[float]],
    titles: tuple[str, str],
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    dots: Sequence[tuple[str, str, float, float]],
    styles: Mapping[str, tuple[str, str]],
) -> str:
    """The picture.

    Args:
        at: of the two axes' numbers.
        ticks: numbers at the lower and at the left edge.
        titles: of the axes.
        lines: kind and points of each.
        dots: kind, text that shows when one points there, and the numbers.
        styles: label and colour of each kind, in the legend's order.
    """
    made = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']  # fmt: skip
    across, up = (list(numbers) for numbers in ticks)
    for number in across:
        x = at(number, up[0])[0]
        made.append(f'<path d="M{x} {TOP}V{BOTTOM}" stroke="#e4e4e4"/>')
        made.append(f'<text x="{x}" y="{BOTTOM + 18}" text-anchor="middle">{number:g}</text>')
    for number in up:
        y = at(across[0], number)[1]
        made.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#e4e4e4"/>')
        made.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number:g}</text>')
    for kind, points in lines:
        path = " ".join(f"{x},{y}" for x, y in (at(*p) for p in points))
        made.append(f'<polyline points="{path}" fill="none" stroke="{styles[kind][1]}" stroke-width="1.5"/>')
    for kind, text, *numbers in dots:
        x, y = at(*numbers)
        title = f"<title>{text}</title>"
        made.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{styles[kind][1]}" fill-opacity="0.85">{title}</circle>')
    for number, (label, colour) in enumerate(styles.values()):
        y = TOP + 14 + 18 * number
        made.append(f'<circle cx="{RIGHT - 220}" cy="{y}" r="4" fill="{colour}"/>')
        made.append(f'<text x="{RIGHT - 210}" y="{y + 4}">{label}</text>')
    middle = (LEFT + RIGHT) / 2
    made.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{titles[0]}</text>')
    made.append(f'<text x="14" y="{(TOP + BOTTOM) / 2}" text-anchor="middle" transform="rotate(-90 14 '
                f'{(TOP + BOTTOM) / 2})">{titles[1]}</text>')  # fmt: skip
    return "\n".join([*made, "</svg>"]) + "\n"
