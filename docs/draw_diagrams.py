"""Draw the Mermaid diagrams of the texts as pictures for the site, which loads no script from elsewhere.

    npm pack mermaid@11 && tar xzf mermaid-11*.tgz package/dist/mermaid.min.js
    python docs/draw_diagrams.py package/dist/mermaid.min.js --browser /usr/bin/chromium

A diagram that was changed gets a new picture; those of no text are removed. Needs Playwright and a Chromium.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hooks import DIAGRAM, diagram_name
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent
SETTINGS = "{startOnLoad: false, theme: 'neutral', htmlLabels: false, flowchart: {htmlLabels: false}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="mermaid.min.js")
    parser.add_argument("--browser", help="path of Chromium; Playwright's own unless given")
    options = parser.parse_args()
    sources = [source for text in DOCS.glob("*.md") for source in DIAGRAM.findall(text.read_text())]
    wanted = {DOCS / diagram_name(source): source for source in sources}
    for picture in set((DOCS / "diagrams").glob("*.svg")) - set(wanted):
        picture.unlink()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content("<html><body></body></html>")
        page.add_script_tag(path=options.script)
        page.evaluate(f"mermaid.initialize({SETTINGS})")
        for picture, source in wanted.items():
            picture.parent.mkdir(exist_ok=True)
            drawn = page.evaluate("source => mermaid.render('diagram', source).then(made => made.svg)", source)
            picture.write_text(drawn + "\n")
        browser.close()


if __name__ == "__main__":
    main()
