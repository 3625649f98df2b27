"""Times of other programs, measured apart: beside ours on the page, with version, settings and source."""

from pathlib import Path

import pytest
import synthetic_records

from lab.errors import LabError
from lab.records import compare, schema
from lab.records.schema import Foreign
from lab.report import load, sides

ROOT = Path(__file__).resolve().parent.parent
GPU = "Synthetic GPU (not measured)"


def foreign(what="step", us=5000.0, gpu=GPU, **other):
    given = dict(program="vLLM", version="0.1", model="llama-3.2-1b", dtype="bf16", batch=4, context=1024)
    return Foreign(
        "apart", what=what, us=us, gpu=gpu, settings="<greedy>", source="by hand", **(given | other)
    )


@pytest.fixture
def run(tmp_path):
    rows = synthetic_records.make(models=["llama-3.2-1b"], batches=(1, 4), contexts=(1024,))
    synthetic_records.write(tmp_path, rows)
    return tmp_path


def test_theirs_stand_beside_the_best_of_ours_at_the_same_size(run):
    with schema.Writer(run / schema.FOREIGN_FILE) as writer:
        writer.append(foreign(), foreign("device", 4000.0), foreign(gpu="another GPU", version="0.2"))
    loaded = load.load(run)[0]
    ((caption, table),) = sides.foreign(loaded)  # of the same GPU alone
    assert caption.startswith("vLLM 0.1 beside ours, measured apart") and "by hand" in caption
    (line,) = table.to_dict("records")
    assert line["vLLM, step (ms)"] == 5.0 and line["vLLM, device (ms)"] == 4.0
    ours = loaded.model[(loaded.model["backend"] == "cuda") & (loaded.model["batch"] == 4)]
    ours = ours[(ours["mode"] == "graph") & (ours["weight_format"] == "")]
    assert line["CUDA, device (ms)"] == ours["us"].min() / 1e3 and line["CUDA's plan"]


def test_it_is_no_measurement_of_ours(run):
    with schema.Writer(run / schema.FOREIGN_FILE) as writer:
        writer.append(foreign())
    assert compare.timed([foreign()]) == {}
    assert not any(r.kind == "foreign" for r in schema.read(run).rows)
    with_it = load.load(run)[0]
    assert not (with_it.model["backend"] == "vLLM").any()


def test_a_damaged_file_is_one_line(run):
    (run / schema.FOREIGN_FILE).write_text("no json\n")
    with pytest.raises(LabError, match="foreign.jsonl:1: not JSON"):
        load.load(run)


def test_what_is_published_names_version_settings_and_source():
    rows = schema.read(ROOT / "reports/h100/foreign.jsonl").rows
    assert len({schema.key(r) for r in rows}) == len(rows) > 10
    assert all(r.version and "graphs" in r.settings and "wall clock" in r.source for r in rows)
