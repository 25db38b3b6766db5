"""Write requirements.txt from pyproject.toml: ``python scripts/make_requirements.py``, or ``make requirements``.

For those who run from a checkout and do not install the package: what training needs, and the extras in ``EXTRAS``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "requirements.txt"

EXTRAS = ("tensorboard", "wandb", "demo", "reproduce", "test")

HEADER = """\
# For those who run from a checkout: pip install -r requirements.txt
# Generated from pyproject.toml, which has the reason for each bound, by scripts/make_requirements.py.
"""


def requirements(project: dict[str, Any]) -> str:
    """The text of requirements.txt for the table ``[project]`` of pyproject.toml; each requirement once."""
    extras = project["optional-dependencies"]
    parts = {"training": project["dependencies"], **{name: extras[name] for name in EXTRAS}}
    seen: set[str] = set()
    text = HEADER
    for name, lines in parts.items():
        new = [line for line in lines if line not in seen]
        seen |= set(new)
        text += f"\n# {name}\n" + "".join(f"{line}\n" for line in new)
    return text


def main() -> None:
    """Write the file."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    TARGET.write_text(requirements(project), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
