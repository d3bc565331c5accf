"""The study of the domains, on a tiny pool: its cells, its table and its figure."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from domains import AVERAGE, GROUP, cell, figure
from more_tables import domains as domains_table

from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.domains import SHARED, Expert
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.modeling.domains import FROZEN


EXPERTS = [Expert("birds", "group", 0.2), Expert("cars", "group", 0.3)]


@pytest.fixture
def found(toy_data):
    """Birds set the classes apart, cars change nothing, on every episode."""
    torch.manual_seed(0)
    noise = torch.randn(len(toy_data), 8)
    means = torch.eye(8)[toy_data.labels]
    frozen = 1 + noise
    features = {FROZEN: frozen, SHARED: frozen + 0.1 * noise.roll(1, 1), "birds": noise + 9 * means, "cars": frozen}
    features |= {AVERAGE: frozen, f"{GROUP}0": features["birds"], f"{GROUP}1": frozen}
    rows = []
    for shots in (1, 5):
        drawn = sample_episodes(toy_data.labels, 5, shots, 5, 10, 0)
        rows.append({"data": "birds/test", "shots": shots, **cell(features, drawn, EXPERTS, 0.7, "birds")})
        gain = (prototype_accuracy(features["birds"], drawn) - prototype_accuracy(frozen, drawn)).mean().item()
        assert rows[-1]["gains"]["own average"][0] == pytest.approx(gain)
    return {"rows": rows}


def test_a_cell_pairs_the_choice_with_the_others(found):
    for row in found["rows"]:
        assert row["chosen"] == {"birds": 1.0}
        gains = {name: gain[0] for name, gain in row["gains"].items()}
        assert gains["chosen"] == gains["own average"] == gains["nearest-group"] <= gains["best of each episode"]
        assert gains["average"] == 0 and row["over shared"][0] == pytest.approx(gains["chosen"] - gains[SHARED])
        assert row["scores"]["birds"]["separability"][0] > 0.1 > row["scores"]["cars"]["separability"][0]


def test_the_table_and_the_figure_show_the_cells(found):
    header, _, line = domains_table(found).splitlines()
    assert "own average" in header and "| birds 100% / 100% |" in line
    drawn = ElementTree.fromstring(figure(found))
    words = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"birds", "cars", "birds/test"} <= {*words}
