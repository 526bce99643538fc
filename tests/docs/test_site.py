"""The documentation as a reader gets it: built strictly, whole, and with nothing from elsewhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fusedreg

from cases import CLASSES
from pages import PAGES, ROOT, formula


class Html(HTMLParser):
    """What a page refers to, the places that one can refer to, and its code blocks."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.fetched: set[str] = set()  # by the browser, without being asked
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.blocks: list[str] = []
        self._in_block = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found[name] or "" for name in ("id", "name") if name in found}
        if tag == "a":
            self.links.add(found.get("href") or "#")
        elif tag == "link" and found.get("rel") != "canonical":
            self.fetched.add(found.get("href") or "")
        elif found.get("src"):
            self.fetched.add(found["src"] or "")
        if tag == "img":
            self.images.append(found)
        if tag == "pre":
            self._in_block = True
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_block = self._in_block and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_block:
            self.blocks[-1] += data


@cache
def read(file: Path) -> Html:
    return Html(file)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def pages_of(site: Path) -> list[Path]:
    return sorted(page for page in site.rglob("*.html") if page.name != "404.html")


def test_every_page_of_the_navigation_is_built(site: Path) -> None:
    named = re.findall(r"[\w-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) > 10
    assert {page.stem for page in pages_of(site)} == {name.removesuffix(".md") for name in named}


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = [*pages_of(site), site / "404.html"]
    fetched = {url for page in pages for url in read(page).fetched}
    assert fetched
    assert not [url for url in fetched if urlsplit(url).netloc]
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_search_works_for_pages_read_from_disk(site: Path) -> None:
    index = (site / "search/search_index.js").read_text()
    for page in pages_of(site):
        assert f'"{page.name}"' in index
        assert any(url.endswith("iframe-worker.js") for url in read(page).fetched), page.name


def test_links_anchors_and_files_are_there(site: Path) -> None:
    for page in pages_of(site):
        for url in read(page).links | read(page).fetched:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.name}: {url}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in read(target).ids, f"{page.name}: {url}"


@pytest.mark.parametrize("page", ["semantics", "api"])
@pytest.mark.parametrize("cls", CLASSES)
def test_page_shows_the_formula_of_the_docstring(site: Path, page: str, cls: type) -> None:
    assert formula(cls) in [block.strip() for block in read(site / f"{page}.html").blocks]


def test_signatures_on_the_page_are_pythons(site: Path) -> None:
    blocks = read(site / "api.html").blocks
    for cls in CLASSES:
        (shown,) = (block for block in blocks if block.strip().startswith(f"{cls.__name__}("))
        names = re.findall(r"^    (\w+)(?::|,)", shown, re.MULTILINE)
        assert names == list(inspect.signature(cls).parameters)


def test_nothing_of_the_markup_is_left(site: Path) -> None:
    for page in pages_of(site):
        text = page.read_text(encoding="utf-8")
        for leftover in (
            "<!-- formula",
            "<!-- source",
            "<!-- include",
            ":class:",
            ".. math",
            "::<",
        ):
            assert leftover not in text, f"{page.name}: {leftover}"


def test_every_public_name_and_attribute_is_in_the_reference(site: Path) -> None:
    ids = read(site / "api.html").ids
    assert {f"fusedreg.{name}" for name in fusedreg.__all__} <= ids
    assert {f"fusedreg.penalty.{name}" for name in fusedreg.penalty.__all__} <= ids
    base = fusedreg.FusedOptimizer
    own = {name for name, member in vars(base).items() if isinstance(member, property)}
    shown = {name for name in own if not name.startswith("_")} | {"step", "load_state_dict"}
    assert {f"fusedreg.FusedOptimizer.{name}" for name in shown} <= ids


def test_images_say_what_they_show(site: Path) -> None:
    for page in pages_of(site):
        for image in read(page).images:
            assert image.get("alt") or "twemoji" in str(image), f"{page.name}: {image}"


def test_every_figure_is_shown_somewhere() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    drawn = [script.with_suffix(".png") for script in (ROOT / "docs/figures").glob("*.py")]
    for figure in filter(Path.exists, drawn):
        assert f"figures/{figure.name})" in text, figure.name


def test_included_code_is_the_source(site: Path) -> None:
    blocks = [block.strip() for block in read(site / "adding-an-optimizer.html").blocks]
    rules = (ROOT / "kernels/device/rules.py").read_text()
    body = rules.split("def sgd_momentum(", 1)[1].split("\n\n\n", 1)[0].strip()
    assert any(block.endswith(body) for block in blocks)
