"""Every link of the repository's Markdown leads somewhere, and pages link the files that they name.

The rule for names in backticks: in `README.md`, `CONTRIBUTING.md`, `SECURITY.md` and the pages of `docs/` a code span
that is the path of a file in the repository, by its path from the root or from the page, and that has a folder or ends
in `.md`, stands inside a link. Folders, commands, globs and bare file names may stay code. Text in fenced blocks, and
`docs/job-file.md`, which is generated, are left out; so is `CHANGELOG.md`, whose entries name files of their time.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LEFT_OUT = {"docs/job-file.md", "CHANGELOG.md"}
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def markdown_files() -> list[str]:
    """All Markdown files that git tracks or would add, by their paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in set(listed.stdout.split()) if (ROOT / name).is_file())


FILES = markdown_files()
PAGES = [name for name in FILES if (name.startswith("docs/") or "/" not in name) and name not in LEFT_OUT]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> Iterator[str]:
    """Anchors of a page's headings as GitHub makes them."""
    for heading in _HEADING.findall(prose(page)):
        text = _LINK.sub(lambda link: link["text"], heading).lower()
        yield re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.finditer(prose(page)):
        target, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = (page.parent / target).resolve() if target else page
        if not place.exists():
            yield f"{link['target']}: no such file"
        elif anchor and anchor not in set(anchors(place)):
            yield f"{link['target']}: no such heading"


def unlinked_files(page: Path) -> Iterator[str]:
    text = _LINK.sub("", prose(page))
    for span in _CODE.findall(text):
        named = span.strip()
        if not re.fullmatch(r"[\w./-]+", named) or not ("/" in named or named.endswith(".md")):
            continue
        if any((base / named).is_file() for base in (ROOT, page.parent)):
            yield named


@pytest.mark.parametrize("name", FILES)
def test_every_relative_link_leads_to_a_file(name: str) -> None:
    assert list(broken_links(ROOT / name)) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_links_the_files_that_it_names(name: str) -> None:
    assert list(unlinked_files(ROOT / name)) == []


def test_the_index_lists_every_page() -> None:
    linked = {(ROOT / "docs" / link["target"]).resolve() for link in _LINK.finditer(prose(ROOT / "docs/index.md"))}
    pages = {(ROOT / name).resolve() for name in FILES if name.startswith("docs/") and name.count("/") == 1}
    assert pages - linked == {ROOT / "docs" / "index.md"}


def test_the_list_of_decisions_names_every_one() -> None:
    text = prose(ROOT / "docs/adr/README.md")
    linked = {link["target"] for link in _LINK.finditer(text)}
    assert linked >= {path.name for path in (ROOT / "docs" / "adr").glob("0*.md")}


def test_a_broken_link_and_an_unlinked_file_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Two words, `code`\n")
    page.write_text(
        "[a](missing.md) [b](other.md) [c](other.md#two-words-code) [d](other.md#three) `other.md`\n"
        "[`other.md`](other.md)\n```\n`other.md` [e](gone.md)\n```\n"
    )
    assert list(broken_links(page)) == ["missing.md: no such file", "other.md#three: no such heading"]
    assert list(unlinked_files(page)) == ["other.md"]
