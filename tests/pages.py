"""A page that several tests read."""

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Checks that tags balance, and keeps the tags, the text and the text of every token."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self, path):
        super().__init__()
        self.stack, self.tags, self.words, self.tokens = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.stack.append((tag, attrs))
        if "data-id" in attrs:
            self.tokens.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] in ("script", "style"):
            return
        self.words.append(data)
        if any("data-id" in attrs for _, attrs in self.stack):
            self.tokens[-1] += data

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))
