"""Each Python block of README.md and docs/ runs as it stands, and each link leads somewhere.

A block has its own imports. What it may take for granted is what the prose around it names: ``make_names`` below.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import tsugi_kpool
from peft_models import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GITHUB = re.compile(r"https://(?:github|raw.githubusercontent).com/tsugiai/tsugi-kpool/(?:(?:blob|tree)/)?main/")
RESULTS = ROOT / "benches" / "results"
PARTS = ("ops", "backend", "distributed", "pool", "cli")
MADE_BY_USERS = {"sitecustomize.py", "trainer_state.json"}


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """(number of its first line, text) of each Python block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


BLOCKS = {f"{page.name}:{line}": (page, line, block) for page in PAGES for line, block in blocks_of(page)}


class Sentences(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(6) * (index + 1)) % 64
        return {"input_ids": ids, "labels": ids}


def make_names(block: str) -> dict[str, object]:
    """``base``: a transformers model; ``loader``: its batches; ``data``: its dataset; ``args``: TrainingArguments.

    A block that goes on from a pool may use ``config``, ``model`` (with the pool), ``opt``, ``pool`` (attached), ``train``
    (a loop) and ``folder`` too, in which all three were saved.
    """
    from transformers import TrainingArguments

    data = Sentences()
    names = {
        "base": tiny_llama(),
        "data": data,
        "loader": torch.utils.data.DataLoader(data, batch_size=2),
        "args": TrainingArguments("out", max_steps=4, report_to=[]),
    }
    assigned = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name) and is_stored(node)}
    config = tsugi_kpool.KPoolLoraConfig(r=4, target_modules="all-linear", n_adapters=4, k_active=2)
    model = peft.get_peft_model(tiny_llama(), config)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    names |= {"config": config, "model": model, "opt": opt, "folder": "saved", "train": lambda: None}
    if "folder" in block:
        names["pool"] = tsugi_kpool.attach(model, optimizer=opt)
        names["pool"].save("saved/")
        model.save_pretrained("saved")
        torch.save(opt.state_dict(), "saved/optimizer0.pt")
        if "pool" in assigned:  # the block attaches one of its own
            names.pop("pool").close()
    return names


def is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder to write into, no network, and a few steps where the text says many."""
    import transformers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny_llama())
    few = lambda folder, **given: transformers.training_args.TrainingArguments(  # noqa: E731
        folder, **given | {"max_steps": 4, "report_to": []}
    )
    monkeypatch.setattr(transformers, "TrainingArguments", few)
    monkeypatch.setenv("TSUGI_BACKEND", "auto")
    yield
    tsugi_kpool.use_backend(None, "peft")


@pytest.fixture
def job():
    """torch.distributed with one rank, which the sideband asks for its peers."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.filterwarnings("ignore")
def test_a_block_runs_as_it_stands(name, offline, request):
    page, line, block = BLOCKS[name]
    if page.name == "sideband.md":
        request.getfixturevalue("job")
    code = compile("\n" * (line - 1) + block, str(page), "exec")  # errors point at the page's line
    exec(code, make_names(block) | {"__name__": "__main__"})


def test_there_are_blocks_on_the_pages_that_show_code():
    assert {page.name for page, _, _ in BLOCKS.values()} >= {"README.md", "pool.md", "migrating.md", "sideband.md"}
    assert sum(block.count("\n") for _, _, block in BLOCKS.values()) > 60


def test_the_readmes_first_block_says_how_each_layer_is_computed(offline, capsys):
    _, block = blocks_of(ROOT / "README.md")[0]
    exec(block, {})
    assert "14 of 14 LoRA layers accelerated" in capsys.readouterr().out


def test_readme_says_how_to_install_and_import_before_it_shows_more():
    start = (ROOT / "README.md").read_text()[:2000]
    assert "pip install" in start and "import tsugi_kpool" in start


def links_of(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        path, _, heading = link.partition("#")
        if GITHUB.match(path):
            target = ROOT / GITHUB.sub("", path)
        elif path.startswith("http"):
            continue
        else:
            assert page.name != "README.md" or heading, (
                f"{link}: relative links are dead on the page of the package index"
            )
            target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {link}"


def test_readme_defines_each_link_that_it_uses():
    text = (ROOT / "README.md").read_text()
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    assert set(re.findall(r"\[([^\]]+)\](?![:(])", prose)) == defined


def headings_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_heading(page):
    for link in links_of(page):
        path, _, heading = link.partition("#")
        if heading and not path.startswith("http"):
            assert heading in headings_of((page.parent / path) if path else page), f"{page.name} links to {link}"


FILE = re.compile(r"`([\w./-]+\.(?:rs|py|cu|cuh|h|cpp|md|toml|jsonl?|svg))`")
#: Where a file may be that a page names without its folder.
FOLDERS = ["", "src", "src/cpu", "src/cuda", "src/sideband", "tests", "benches/results", "benches/training"]
FOLDERS += ["python/tsugi_kpool", *(f"python/tsugi_kpool/{part}" for part in PARTS)]
DEFINED = {
    match.group(1)
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "tests").rglob("*.rs"), *(ROOT / "src").rglob("*.rs")]
    for match in re.finditer(r"^ *(?:def|fn) (\w+)", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_and_tests_that_are_named_are_there(page):
    text = page.read_text()
    for name in FILE.findall(text):
        if "foo" not in name and name not in MADE_BY_USERS:
            assert any((ROOT / folder / name).exists() for folder in FOLDERS), f"{page.name} names {name}"
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in DEFINED, f"{page.name} names {name}"


def significant(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


@pytest.mark.parametrize("page", ["README.md", "docs/benchmark.md"])
def test_the_tables_of_layers_are_the_results(page):
    measured = json.loads((RESULTS / "amd-epyc-2-threads.json").read_text())
    ratios = {("float32, M = 1024, dropout 0.1", r["K"]): r["peft_over_ours"] for r in measured["dropout"]}
    ratios |= {(f"{r['dtype']}, M = {r['M']}", r["K"]): r["peft_over_ours"] for r in measured["layer"]}
    rows = re.findall(
        r"^\| (?:layer, )?((?:float32|bfloat16), M = .*?) \| (.*) \|$", (ROOT / page).read_text(), re.MULTILINE
    )
    assert len(rows) >= 4
    for name, cells in rows:
        assert cells.split(" | ") == [significant(ratios[name, K]) for K in (1, 2, 4, 8)], name


def test_the_picture_shows_the_results():
    layers = json.loads((RESULTS / "amd-epyc-2-threads.json").read_text())["layer"]
    link = json.loads((RESULTS / "amd-epyc-2-threads-link-2e-3.json").read_text())["rows"]
    speeds = {name: ranks[0]["tokens_per_second"] for name, _, ranks in link}
    shown = ["synchronous, waited", "synchronous, hidden", "noise scale 1", "every 2", "no communication"]
    expected = [r["peft_over_ours"] for r in layers if r["dtype"] == "float32" and r["M"] == 1024]
    expected += [speeds[name] / speeds["synchronous, waited"] for name in shown]
    picture = (ROOT / "docs" / "pictures" / "measured.svg").read_text()
    assert re.findall(r">(\d\.\d\d)</text>", picture) == [f"{ratio:.2f}" for ratio in expected]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_version_stands_once_for_the_wheel_and_once_for_python():
    import tomllib

    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "version" not in project
    assert tsugi_kpool.__version__ == cargo["version"]
    assert [package["version"] for package in lock if package["name"] == cargo["name"]] == [cargo["version"]]
    if tsugi_kpool.ops.available():
        assert tsugi_kpool.ops._native.build_info()["version"] == cargo["version"]
