"""The tables of the documentation are those of the result files, and each stands beside the command that makes it."""

import json
import re

import pytest
import write_tables


PAGES = {str(path.relative_to(write_tables.ROOT)): path.read_text(encoding="utf-8") for path in write_tables.pages()}
WITH_TABLES = [page for page, text in PAGES.items() if "<!-- /" in text]


@pytest.fixture(scope="module")
def made():
    return write_tables.tables()


@pytest.mark.parametrize("page", WITH_TABLES)
def test_a_page_holds_the_numbers_of_the_result_files(page, made):
    assert write_tables.fill(PAGES[page], made) == PAGES[page], "run write_tables.py"


def test_every_table_stands_in_one_page(made):
    places = [name for text in PAGES.values() for name in re.findall(r"^<!-- /([\w-]+) -->$", text, re.M)]
    assert sorted(places) == sorted(made) and all(made.values())


@pytest.mark.parametrize(
    "page", [page for page in WITH_TABLES if page.startswith(("docs/benchmarks", "docs/studies"))]
)
def test_every_section_with_a_table_has_a_command_before_it(page):
    sections = re.split(r"^## ", PAGES[page], flags=re.M)
    for i, section in enumerate(sections):
        before = section.partition("<!-- /")[0] if "<!-- /" in section else None
        if before is not None:
            commands = before if "```bash" in before else sections[0]
            assert re.search(r"^(python examples|lora-recycle|accelerate launch)", commands, re.M), (page, i)
            assert "write_tables.py" in commands, (page, i)


def test_the_front_table_pairs_with_the_average_and_prefers_the_first_file(tmp_path):
    def result(name: str, **accuracies: float) -> None:
        rows = [
            {"data": "a/test", "shots": 1, "method": method, "accuracy": value} for method, value in accuracies.items()
        ]
        gains = [{**row, "delta_vs_average": row["accuracy"] - 50, "delta_vs_average_ci95": 0.25} for row in rows]
        (tmp_path / name).write_text(json.dumps({"rows": rows, "details": gains}))

    methods = dict.fromkeys(write_tables.FRONT[:-1], 51.5)
    result(
        "pool.json", frozen=40.0, average=50.0, **{write_tables.DEFAULT_RECIPE.get(m, m): methods[m] for m in methods}
    )
    result("real.json", frozen=41.0, average=50.0, **{"real-data": 60.0})
    table = write_tables.front_table(tmp_path / "pool.json", tmp_path / "real.json", names=write_tables.DEFAULT_RECIPE)
    row = table.splitlines()[2].split(" | ")
    assert row[:4] == ["| a/test", "1", "40.0", "50.0"] and row[4] == "51.5 (+1.5 ± 0.2)"
    assert row[-1] == "60.0 (+10.0 ± 0.2) |"
