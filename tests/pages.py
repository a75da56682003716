"""What the tests of all pages share: a reader of HTML, and what every page has to be."""

import re
from html.parser import HTMLParser

HOSTILE = "<script>alert('x')</script> & \"$\\frac\" <img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page: tags with their attributes, and the text of headings, cells and captions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("title", "h1", "h2", "td", "li", "figcaption"):
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self._open) & self.texts.keys():
            self.texts[tag][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_needs_nothing_else(text: str) -> None:
    """No script, no picture and no link to anything outside the page, and a policy that allows none."""
    page = Page(text)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "image", "foreignobject"}
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    links = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert [found["content"] for found in page.named("meta") if found.get("http-equiv")] == [
        "default-src 'none'; style-src 'unsafe-inline'"
    ]


def assert_can_be_read_by_anyone(text: str) -> None:
    """A language, a title, one heading, a width for phones, colours for light and dark, and pictures with words."""
    page = Page(text)
    assert page.named("html") == [{"lang": "en"}] and text.startswith("<!doctype html>")
    assert len(page.texts["title"]) == len(page.texts["h1"]) == 1
    assert any(found.get("name") == "viewport" for found in page.named("meta"))
    assert "prefers-color-scheme: dark" in text and "#0102" not in text, "every colour comes from the style sheet"
    for picture in page.named("svg"):
        assert picture["role"] == "img" and picture["aria-label"] and "width" not in picture
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) == set(ids)
