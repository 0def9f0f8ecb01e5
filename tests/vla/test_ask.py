"""The verb `ask`: answers, drawings, and files that are no images."""

import numpy as np
import pytest
from PIL import Image

from brachium.__main__ import main
from brachium.errors import ConfigError, NotFoundError
from brachium.vla.ask import ask, draw_places, read_image
from brachium.vla.pretrained import Pretrained


class Fake:
    said = "<loc48><loc24>"

    def answer(self, images, question):
        assert images.shape == (32, 32, 3)
        return self.said


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "table.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(path)
    return path


def test_a_place_is_drawn(picture, monkeypatch, capsys):
    monkeypatch.setattr(Pretrained, "load", lambda name: Fake())
    assert ask(image=str(picture), question="where is it?", vlm="any") == 0
    assert capsys.readouterr().out == "<loc48><loc24>\n"
    drawn = np.asarray(Image.open(picture.with_name("table-answer.png"))).astype(int)
    rows, columns = np.nonzero((drawn[..., 0] > 200) & (drawn[..., 1] < 50))
    assert abs(rows.mean() / len(drawn) - 48.5 / 96) < 0.01
    assert abs(columns.mean() / len(drawn) - 24.5 / 96) < 0.01


def test_a_box_is_drawn_and_words_are_not(picture, tmp_path, monkeypatch):
    draw_places(read_image(picture), [[10, 20, 50, 80]], tmp_path / "box.png")
    drawn = np.asarray(Image.open(tmp_path / "box.png")).astype(int)
    rows, columns = np.nonzero((drawn[..., 0] > 200) & (drawn[..., 1] < 50))
    edges = np.array([rows.min(), columns.min(), rows.max(), columns.max()]) / len(drawn) * 96
    np.testing.assert_allclose(edges, [10.5, 20.5, 50.5, 80.5], atol=1.0)
    draw_places(read_image(picture), [[10, 20], [80, 70]], tmp_path / "two.png")
    two = np.asarray(Image.open(tmp_path / "two.png")).astype(int)
    red = (two[..., 0] > 200) & (two[..., 1] < 50)
    assert red.sum() < 400  # two crosses, no box between them
    assert red[int(10.5 / 96 * len(two)), int(20.5 / 96 * len(two))]
    assert red[int(80.5 / 96 * len(two)), int(70.5 / 96 * len(two))]
    monkeypatch.setattr(Pretrained, "load", lambda name: type("Words", (Fake,), {"said": "yes"})())
    ask(image=str(picture), question="is it?", vlm="any")
    assert not picture.with_name("table-answer.png").exists()


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(NotFoundError, match="no image at"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ConfigError, match="is no image that can be read"):
        read_image(tmp_path / "text.png")


def test_the_command_says_what_is_missing(picture, capsys):
    assert main(["ask", f"image={picture}", "question=where?", "vlm=nowhere"]) == 2
    assert "no pretrained model at nowhere" in capsys.readouterr().err
    assert main(["ask", f"image={picture}"]) == 2
    assert "question" in capsys.readouterr().err
