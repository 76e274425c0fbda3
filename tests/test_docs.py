"""What the documentation shows works as it stands."""

import re

import pytest
from conftest import run_python
from helpers.documents import ROOT, blocks, run_commands

CARDS = sorted((ROOT / "convert" / "units").glob("*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [*PAGES, *CARDS]


@pytest.mark.docs
def test_commands_of_the_evaluation_run(smollm2, tmp_path):
    run_commands((ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8"), tmp_path)
    for name in (
        "harm/results.json",
        "tqa/scores.svg",
        "comparison/table.md",
        "answers/answers.md",
        "halueval/table.md",
        "report/report.md",
    ):
        assert (tmp_path / "out" / name).exists()


@pytest.mark.docs
def test_commands_and_snippets_of_the_readme_run(smollm2, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    run_commands(text, tmp_path)
    for name in ("first/imae", "first-tqa/results.json", "first-report/report.md"):
        assert (tmp_path / "out" / name).exists()
    snippets = tmp_path / "snippets.py"
    snippets.write_text("".join(blocks(text, "python")))
    run = run_python([snippets], tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 4


@pytest.mark.docs
def test_snippets_of_the_methods_run(smollm2, tmp_path):
    """Each is a file of its own."""
    snippets = blocks((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "python")
    assert snippets
    for i, snippet in enumerate(snippets):
        path = tmp_path / f"snippet{i}.py"
        path.write_text(snippet, encoding="utf-8")
        run = run_python([path], tmp_path)
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.splitlines()) == snippet.count("\nprint(")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_point_to_exists(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^):]+)\)", text) + re.findall(r'src="([^":]+)"', text):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link
    paths = re.findall(r"`((?:imae_jax|convert|train|evaluate|tests|benchmarks)/[\w./]*)`", text)
    assert all((ROOT / path).exists() for path in paths), paths


def test_make_targets_that_documents_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE)}
    assert {"demo", "test", "test-all", "results"} <= named <= targets
