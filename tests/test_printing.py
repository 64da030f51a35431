"""What is printed is complete, and nothing in it runs or asks: a run's page, a notebook."""

import json
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import plotly.graph_objects as go
import pytest
from hostile import HOST, PAYLOADS

from halos_nb.figures import styled
from halos_nb.page import page_html, searchable
from halos_nb.paper import paper_table, save_figure
from halos_nb.printing import pdf
from halos_nb.show import samples_table, summary_table


@pytest.fixture
def asked():
    "A server on this machine, and what it was asked."
    seen = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen.append(f"http://127.0.0.1:{server.server_port}")
    yield seen
    server.shutdown()
    server.server_close()


def texts(address):
    "The payloads, asking a server that would hear them and renaming the page if they run."
    texts = [text.replace(HOST, address) for text in PAYLOADS]
    return [text.replace("window.hit=1", "document.title='HACKED'") for text in texts]


def drawn(file):
    "All that a PDF draws, unpacked."
    streams = re.findall(rb"stream\r?\n(.*?)endstream", file.read_bytes(), re.S)
    unpacked = []
    for stream in streams:
        try:
            unpacked.append(zlib.decompressobj().decompress(stream))
        except zlib.error:
            continue  # a font or a picture
    return b"\n".join(unpacked)


def harmless(file, asked):
    "Nothing ran and nobody was asked."
    data = file.read_bytes()
    assert data.startswith(b"%PDF-") and b"HACKED" not in data
    assert b"/JavaScript" not in data and b"/JS" not in data
    assert asked[1:] == []


def test_a_page_is_printed_with_its_figures_and_nothing_in_it_runs(tmp_path, asked):
    x = list(range(300))
    every = dict(simplify=False)  # else a narrow figure leaves out what nobody would see
    line = go.Scatter(x=x, y=[i * i % 97 for i in x], line=every)
    fig = styled(go.Figure(line), "Squares", ["odd"])
    table = summary_table([dict(answer=text) for text in texts(asked[0])])
    page = tmp_path / "report.html"
    page.write_text(page_html("Run r", dict(Figure=[fig], Texts=[table])), encoding="utf-8")
    file = pdf(tmp_path)
    assert file == tmp_path / "report.pdf"
    harmless(file, asked)
    assert b"/Title (Run r)" in file.read_bytes()
    lines = len(re.findall(rb" l$", drawn(file), re.M))
    assert lines >= 299, "the figure is not whole"


def pages_of(file):
    return len(re.findall(rb"/Type /Page\b(?!s)", file.read_bytes()))


def test_what_a_page_has_folded_is_printed_too(tmp_path):
    long = summary_table([dict(word="a word", number=i) for i in range(200)])
    item = dict(prompt_id="p", prompt="Why?", output="So.\n" * 100, reward=0.0)
    shown = [item | dict(prompt_id=str(i)) for i in range(8)]
    texts = searchable(samples_table(shown, 8, "Samples"), "answers")
    page = tmp_path / "report.html"
    counts = []
    for parts in ({}, dict(Long=[long]), dict(Long=[long], Texts=[texts])):
        page.write_text(page_html("Run r", dict(First=["words"]) | parts), encoding="utf-8")
        counts.append(pages_of(pdf(tmp_path)))
    assert counts[0] == 1
    assert counts[1] >= 4, "a folded section is not on paper"
    assert counts[2] >= counts[1] + 10, "texts are cut, or stay folded, on paper"


def test_a_notebook_is_printed_and_nothing_in_it_runs(tmp_path, asked):
    outputs = []
    for text in texts(asked[0]):
        data = {"text/html": text, "text/plain": text}
        outputs.append(dict(output_type="display_data", metadata={}, data=data))
        outputs.append(dict(output_type="stream", name="stdout", text=text))
        script = {"application/javascript": text, "image/svg+xml": text}
        outputs.append(dict(output_type="display_data", metadata={}, data=script))
    code = dict(cell_type="code", id="a", metadata={}, source="1 + 1", execution_count=1)
    words = dict(cell_type="markdown", id="b", metadata={}, source=texts(asked[0]))
    cells = [code | dict(outputs=outputs), words]
    made = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path / "out.ipynb").write_text(json.dumps(made), encoding="utf-8")
    harmless(pdf(tmp_path / "out.ipynb"), asked)


def test_a_paper_s_table_and_figure_hold_hostile_names_as_text(tmp_path, asked):
    rows = [dict(method=text, gain=1.0) for text in texts(asked[0])]
    table = paper_table(rows)
    assert "<script" not in (table.markdown + table.latex).lower()
    assert not re.search(
        r"(?<!\\)[%&#_$](?!-\$|\\pm\$)",
        table.latex.split("midrule")[1]
        .split("bottomrule")[0]
        .replace(" & ", " ")
        .replace("$-$", ""),
    )
    names = [f"run {i}" for i in range(3)]
    fig = go.Figure(go.Scatter(x=[1, 2, 3], y=names, text=texts(asked[0])[:3], mode="text"))
    svg, paper = save_figure(fig, tmp_path / "fig")
    assert not re.search(r"<script|onerror=|onload=", svg.read_text(encoding="utf-8"))
    harmless(paper, asked)
