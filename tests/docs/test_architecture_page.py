"""The tree in docs/architecture.md has the folders of the five packages, no more and no fewer."""

import re

from tests.support.paths import ROOT

PACKAGES = ("schemas", "model_runner", "transforms", "pipelines", "jobs")


def drawn_folders() -> dict[str, set[str]]:
    """The folders that stand below each folder of the top, as the page draws them."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## The tree")[2]
    tree = re.split(r"^```$", text, flags=re.MULTILINE)[1]
    drawn: dict[str, set[str]] = {}
    top = ""
    for line in tree.splitlines():
        found = re.match(r"(?P<indent> *)(?P<names>(?:[a-z_]+/ *)+)", line)
        if found is None:
            continue
        names = re.findall(r"([a-z_]+)/", found["names"])
        if found["indent"]:
            drawn[top].update(names)
        else:
            top = names[0]
            drawn.update({name: set() for name in names})
    return drawn


def test_the_tree_names_every_folder_of_the_packages() -> None:
    drawn = drawn_folders()
    assert all((ROOT / name).is_dir() for name in drawn)
    for package in PACKAGES:
        assert drawn[package] == {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}, package
