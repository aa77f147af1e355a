"""Names beside their marks: short, and none on top of another."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from quant.evaluation.labels import Label, place_labels, short_names


def test_what_all_begin_with_is_left_out():
    names = ["QwQ-32B-Q4_K_M.gguf", "QwQ-32B-Q8_0.gguf", "qwq-nf4", "qwq-Int4", "other-4bit"]
    assert short_names(names) == ["Q4_K_M", "Q8_0", "nf4", "Int4", "other-4bit"]
    assert short_names(["a", "b.gguf"]) == ["a", "b"]
    for same in (["a-Q4", "a-Q8", "b-Q4", "b-Q8"], ["x.gguf", "x"], ["a-", "a-b"]):
        assert short_names(same) == same


def test_names_of_twenty_sizes_lie_apart():
    """A frontier of twenty models, as publishers have them, and marks close beside each other."""
    sizes = np.repeat(np.linspace(10, 24, 10), 2) + np.tile([0, 0.15], 10)
    places = [(x, 30 - x + 0.4 * (i % 2)) for i, x in enumerate(sizes.tolist())]
    figure = Figure(figsize=(10, 4.6), dpi=160)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.plot(*zip(*places, strict=True))
    labels = [Label(f"Q{i}_K_XL", place, "k") for i, place in enumerate(places)]
    place_labels(ax, labels, places, "k")
    figure.draw_without_rendering()
    drawn = [text for text in ax.texts if isinstance(text, Annotation)]
    assert [text.get_text() for text in drawn] == [label.text for label in labels]
    boxes = np.array(
        [super(Annotation, text).get_window_extent().extents for text in drawn]  # without lines
    )
    for i, box in enumerate(boxes):
        others = np.delete(boxes, i, axis=0)
        apart = (others[:, :2] >= box[2:]).any(1) | (others[:, 2:] <= box[:2]).any(1)
        assert apart.all(), labels[i].text
        marks = ax.transData.transform(places)
        assert not ((marks > box[:2]) & (marks < box[2:])).all(1).any()
    assert ax.get_window_extent().extents[2] > boxes[:, 2].max()
    near = np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - ax.transData.transform(places))
    assert np.median(near.max(1)) < 60  # pixels, of names 80 wide
