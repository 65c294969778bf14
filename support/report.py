"""report.html: one page that holds all that evaluate.py measured, pictures included."""

import base64
import io
from html import escape
from pathlib import Path

from support.checkpoints import save_text

STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }
th, td { border: 1px solid #bbb; padding: .3em .6em; text-align: left; white-space: nowrap; }
.faces { display: flex; flex-wrap: wrap; gap: 2em; }
figure { margin: 0; width: 320px; }
.stack { display: grid; }
.stack img { grid-area: 1 / 1; width: 100%; image-rendering: pixelated; }
input { width: 100%; }
figcaption { font-size: 13px; }
.sweep { max-width: 100%; }
"""
# The slider at p shows picture i as far as p exceeds i - 1: each is drawn over the one before it.
SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const slider = figure.querySelector("input"), images = [...figure.querySelectorAll("img")];
  const show = () => {
    images.forEach((image, i) => {
      const part = i ? Math.min(1, Math.max(0, slider.value - (i - 1))) : 1;
      image.style.clipPath = `inset(0 ${100 - 100 * part}% 0 0)`;
    });
    const last = Math.ceil(slider.value), at = slider.value - last + 1;
    figure.querySelector("output").textContent = last && at < 1
      ? `${images[last].alt} | ${images[last - 1].alt}` : images[last].alt;
  };
  slider.addEventListener("input", show);
  show();
}
"""


def save_report(path, sections, sweep=None):
    """Write the page, which needs no other file and no network.

    sections: for each framing (name, (head, rows) of the table of texts, notes on what was
    measured, lines on differences, rows of pictures as `figures.save_comparison` has them, whose
    first is LR and whose captions are empty or "cos ..."); sweep: path of sweep.png.
    """
    parts = [section(*parts) for parts in sections]
    if sweep:
        parts.append(f'<h2>Framing</h2>\n<img class="sweep" alt="gain over bicubic against shift '
                     f'and scale" src="{data_uri(Path(sweep).read_bytes())}">')
    body = "\n".join(parts)
    save_text(f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
              f"<title>Evaluation</title>\n<style>{STYLE}</style></head>\n<body>\n"
              f"<h1>Evaluation</h1>\n{body}\n"
              f"<script>{SCRIPT}</script>\n</body>\n</html>\n", path)


def section(framing, table, notes, differences, pictures):
    """One framing as HTML: its table and notes, paired differences, faces with their sliders."""
    head, rows = table
    # an interval below its value: all columns fit a page of 1280 px
    cells = ["".join(f"<{tag}>{escape(text).replace(' [', '<br>[')}</{tag}>" for text in row)
             for tag, row in (("th", head), *(("td", row) for row in rows))]
    names = ["LR", *(row[0] for row in rows)]
    return "\n".join([
        f"<h2>{escape(framing)}</h2>", "<table>", *(f"<tr>{row}</tr>" for row in cells), "</table>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<ul>", *(f"<li>{escape(line)}</li>" for line in differences), "</ul>",
        "<p>Best, median and worst face by the last model's cosine; move the slider.</p>",
        '<div class="faces">', *(face(row, names) for row in pictures), "</div>"])


def face(row, names):
    """A figure whose slider draws each model's picture over the one before it; LR is left out."""
    shown = [*zip(names, row["images"], row["captions"])][1:]
    images = []
    for name, image, _ in shown:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        images.append(f'<img alt="{escape(name)}" src="{data_uri(buffer.getvalue())}">')
    scores = "<br>".join(escape(f"{name}: {caption}".replace("  ", ", "))
                         for name, _, caption in shown if caption)
    return (f'<figure>\n<div class="stack">{"".join(images)}</div>\n<input type="range" min="0" '
            f'max="{len(shown) - 1}" step="0.01" value="0.5" aria-label="from model to model">\n'
            f"<figcaption><b>{escape(row['label'])}</b>: <output></output><br>{scores}"
            f"</figcaption>\n</figure>")


def data_uri(png):
    """Bytes of a PNG -> a URI that holds them."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
