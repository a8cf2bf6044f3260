"""The gallery: one page, complete in itself."""

import re
import shutil
from html.parser import HTMLParser

import pytest

from nvae_tf.cli.gallery import main
from nvae_tf.evaluation.gallery import bars, chart


class Page(HTMLParser):
    """Collects what a page shows and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data"):
                self.fetched.append(value)


def test_the_page_holds_everything_that_it_shows(run, tmp_path):
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 8  # samples at 5 temperatures, 2 of reconstructions, traversal
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert "script" not in page.tags and "http" not in re.sub(r"base64,\S+", "", text)
    assert page.tags.count("rect") >= 2 and "polyline" in page.tags
    for heading in (
        "Samples",
        "Reconstructions",
        "KL of each group",
        "What each group does",
        "Training",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert re.search(r"mean NELBO of these 12 images \d+\.\d nats", text)
    total = float(re.search(r"with one draw of z each, ([\d.]+) nats over all groups", text)[1])
    assert total == pytest.approx(
        sum(map(float, re.findall(r">([\d.]+) nats</text>", text))), abs=0.02
    )


def test_names_are_escaped():
    assert "<b>" not in bars([1.0], ["<b>"])


def test_a_flat_curve_and_a_single_point_are_drawn():
    assert "nan" not in chart({"train": [(1, 2.0), (5, 2.0)]})
    assert "nan" not in chart({"train": [(3, 7.0)]})


def test_a_wrong_folder_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_names_from_outside_are_escaped(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = (run / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(recipe.replace("digits", "mnist"))
    name = "<script>alert('x')</script>"
    arguments = [str(tmp_path / "run"), "--data", str(tmp_path / name)]
    assert main([*arguments, "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "script" not in Page(text).tags and "&lt;script&gt;alert(&#x27;x" in text
