"""What the documentation says of the files and commands is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree() -> set[str]:
    """Files in the README's tree, as paths from the root."""
    block = re.search(r"^## The files.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert block
    found, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            found.add(folder + name if line.startswith(" ") else name)
    return found


def test_the_readme_has_a_line_for_every_module() -> None:
    folders = ("store", "precompute", "train", "animate")
    modules = {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob("*.py")}
    assert tree() == {name for name in modules if not name.endswith("__init__.py")} | {"cli.py"}


def test_links_and_code_references_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)
        for file, name in re.findall(r"`((?:store|precompute|train|animate)/[\w/]+\.py)(?::(\w+))?", text):
            assert (ROOT / file).exists(), (page.name, file)
            assert not name or re.search(rf"\b{name}\b", (ROOT / file).read_text()), (page.name, file, name)


def test_tests_named_in_the_docs_exist() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(test_\w+\.py)`", page.read_text()):
            assert (ROOT / "tests" / name).exists(), (page.name, name)
