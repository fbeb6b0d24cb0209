"""MkDocs: what reads well in the repository and not on the site."""

import re


OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)[^)]*\)")
MARKED = re.compile(r"(?<=<code>)[^<]*`[^<]*(?=</code>)")
LINKED = re.compile(r"\[`~?([^`]*)`\]")


def on_page_markdown(markdown: str, **_) -> str:
    """Links to files of the repository that are no pages become plain text."""
    return OUTSIDE.sub(r"\1", markdown)


def on_page_content(html: str, **_) -> str:
    """Types in docstrings, "`int`, *optional*" and "[`~peft.PeftModel`]" in PEFT's style, lose their marks."""
    return MARKED.sub(lambda found: LINKED.sub(r"\1", found[0]).replace("`", "").replace("*", ""), html)
