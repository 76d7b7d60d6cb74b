"""The pages: what they link to exists, and every folder of the code is on the floors' table."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lab/*.md"), *ROOT.glob("examples/*.md")]
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)

pytestmark = pytest.mark.skipif(not PAGES, reason="the pages are not part of this installation")


def anchors(page):
    """Headings as GitHub makes them into anchors."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target + anchor


def test_contributing_names_every_folder_of_the_code():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "refreekv"
    folders = {path.parent.relative_to(source).as_posix() for path in source.rglob("*.py")} - {".", "engines"}
    tops = {name for name in folders if not re.match(r"(cli|evaluation)/", name)}
    assert {name for name in tops if f"`{name}/`" not in text} == set()
    assert set(re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE)) <= folders
