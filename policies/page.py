"""HTML pages from a package's templates: what stands in them is escaped, what is lacking is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any


def write_html(
    target: Path,
    package: str,
    template: str,
    content: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> Path:
    """Write ``assets/TEMPLATE`` of a package, filled with `content`, to `target`, which is whole at any moment."""
    from jinja2 import Environment, StrictUndefined

    source = files(package).joinpath(f"assets/{template}").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= dict(filters or {})
    temporary = target.with_name(f".{target.name}.partial")
    temporary.write_text(environment.from_string(source).render(content), encoding="utf-8")
    temporary.replace(target)
    return target
