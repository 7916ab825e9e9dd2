"""The form's fields become settings, and the guide's calculator its numbers."""

import dataclasses
import json

import pytest
from conftest import GOLDEN

from tortoise_hf.notebook import show
from tortoise_hf.notebook.cell import CellStopped
from tortoise_hf.notebook.project import Project
from tortoise_hf.notebook.settings import (
    FIELDS,
    read_fields,
    read_others,
    read_settings,
    where_to_write,
    write_settings,
)
from tortoise_hf.plan import Facts


def test_empty_fields_are_left_to_the_plan():
    assert read_fields(dict.fromkeys(FIELDS, "")) == {}
    assert read_fields({"TrainBS": " "}) == {}


@pytest.mark.parametrize("name, written, value", [
    ("TrainBS", "64", 64), ("TrainBS", 64, 64), ("TrainingRate", "1e-5", 1e-5), ("TrainingRate", 1e-5, 1e-5),
    ("ValFreq", "0.05", 0.05), ("LRDecaySteps", "[20, 40, 56, 72]", [20, 40, 56, 72]),
    ("LRDecaySteps", "20,40, 56", [20, 40, 56]), ("LRDecaySteps", "[20]", [20]), ("Optimizer_State", "8bit", "8bit"),
])  # fmt: skip
def test_fields_are_read(name, written, value, tmp_path):
    found = read_fields({name: written})
    assert found == {FIELDS[name]: value}
    write_settings(tmp_path / "x.yaml", {"data.root": "r", "training.output_dir": "o"} | found)
    kept = read_settings(tmp_path / "x.yaml").get(FIELDS[name])
    assert (list(kept) if isinstance(kept, tuple) else kept) == value


def test_every_other_setting_can_be_given(tmp_path):
    found = read_others("Data_Settings", "data.min_seconds: 1, model.from_scratch: true") | read_others(
        "Other_Settings", "optim.warmup_steps: 20, optim.learning_rate: 2e-5, hub.consent: 'Mine, yes: mine.'"
    )
    write_settings(tmp_path / "x.yaml", {"data.root": "r", "training.output_dir": "o"} | found)
    cfg = read_settings(tmp_path / "x.yaml")
    assert (cfg.optim.warmup_steps, cfg.optim.learning_rate, cfg.hub.consent) == (20, 2e-5, "Mine, yes: mine.")
    assert (cfg.data.min_seconds, cfg.model.from_scratch) == (1, True)


@pytest.mark.parametrize("others", ["20", "warmup: 3", "optim.warmup_steps 20", "[1"])
def test_what_cannot_be_read_is_said(others):
    with pytest.raises(ValueError, match="Other_Settings can't be read"):
        read_others("Other_Settings", others)


def test_what_the_check_goes_by_is_set_before_it():
    """Set behind it, the report and the plan would be of other clips."""
    with pytest.raises(ValueError, match="write it into Data_Settings in section 3"):
        read_others("Other_Settings", "training.seed: 7, data.min_seconds: 1")
    with pytest.raises(ValueError, match="write it into Other_Settings in section 5"):
        read_others("Data_Settings", "training.seed: 7")
    assert read_others("Data_Settings", "lora.rank: 16, optim.optimizer: adamw_8bit")


def test_a_message_for_the_shell_says_where_the_notebook_takes_it():
    said = where_to_write("error: data.root: not there. Leave it out with --data.missing skip, or set optim.gamma.")
    assert said.splitlines()[1].split("; ") == [
        "In this notebook: data.root is the field Dataset_Training_Path",
        "data.missing goes into Data_Settings in section 3, as data.min_seconds: 1, lora.rank: 16",
        "optim.gamma goes into Other_Settings in section 5, as optim.warmup_steps: 20, training.seed: 7.",
    ]
    assert where_to_write("error: clip-1.wav is silent") == "error: clip-1.wav is silent"
    assert where_to_write("") == ""


def test_a_wrong_name_or_value_is_the_parsers_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no field TrainBatch"):
        read_fields({"TrainBatch": 3})
    write_settings(tmp_path / "x.yaml", {"data.root": "r", "training.output_dir": "o", "optim.learning_rat": 1})
    with pytest.raises(ValueError, match=r"optim.learning_rat is not a setting; did you mean optim.learning_rate\?"):
        read_settings(tmp_path / "x.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Makes a project whose recordings have been checked: so many clips to train on and to evaluate on."""
    shown = []
    monkeypatch.setattr(show, "show", shown.append)

    def make(num_train, num_eval):
        made = Project("voice", str(tmp_path), folder=str(tmp_path / "runs"))
        facts = dataclasses.asdict(Facts(num_train, num_eval, minutes=num_train / 12))
        made._plan_path.parent.mkdir(parents=True, exist_ok=True)
        made._plan_path.write_text(json.dumps({"facts": facts, "measurement": None}))
        return made, shown

    return make


ROWS = [row for row in json.loads((GOLDEN / "param_calc.json").read_text())
        if (row["bs_train"], row["bs_val"], row["first_decay"]) == (64, 16, 20)][::3]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['n_train']}-{row['n_val']}")
def test_the_guides_plan_has_the_guides_numbers(row, project):
    made, shown = project(row["n_train"], row["n_val"])
    made.show_plan("tortoise")
    cfg = made.plan().config
    assert cfg.training.batch_size == row["train_bs"]
    assert cfg.training.eval_batch_size == row["val_bs"]
    assert list(cfg.optim.milestones) == row["lr_decay_steps"]
    assert (cfg.training.logging_steps, cfg.training.eval_steps) == (row["print_freq"], row["val_freq"])
    assert cfg.training.save_steps == row["save_checkpoint_freq"]
    assert f"<b>{row['train_bs']}</b>" in shown[-1]


def test_what_is_set_stands_and_is_marked(project):
    made, shown = project(300, 20)
    made.settings(TrainBS="32", TrainingRate=2e-5, LRDecaySteps="[5, 9]", PrintFreq="")
    cfg = made.plan().config
    assert (cfg.training.batch_size, cfg.optim.learning_rate, cfg.optim.milestones) == (32, 2e-5, (5, 9))
    assert cfg.optim.lr_schedule == "multistep"
    assert shown[-1].count("set by you") == 3
    made.settings(TrainBS="")
    assert "set by you" not in shown[-1]


def test_precision_follows_the_field(project):
    made, _ = project(300, 20)
    assert made.precision == "no", "no card here"
    made.settings(Fp16="on")
    assert made.precision == "fp16"
    made.settings(Fp16="off")
    assert made.precision == "no"
    with pytest.raises(CellStopped, match="Fp16 is one of auto, on, off, got 'yes'"):
        made.settings(Fp16="yes")


def test_cells_say_which_one_is_missing(tmp_path):
    made = Project("voice", str(tmp_path), folder=str(tmp_path / "runs"))
    with pytest.raises(CellStopped, match="haven't been checked yet; run that cell first"):
        made.show_plan()
    for work in (lambda: made.export(str(tmp_path / "x")), lambda: made.speak("Hello.")):
        with pytest.raises(CellStopped, match="holds no finished voice yet; train to the end first"):
            work()
    with pytest.raises(CellStopped, match="Experiment_Name names a folder"):
        Project("../x", str(tmp_path))


def test_nothing_kept_is_said(tmp_path, capsys):
    Project("voice", str(tmp_path), folder=str(tmp_path / "runs"))
    assert "if this machine is taken away, the run is lost" in capsys.readouterr().out
    Project("voice", str(tmp_path), folder=str(tmp_path / "runs"), keep_in=str(tmp_path / "drive"))
    assert not capsys.readouterr().out


def test_what_is_shown_is_escaped_and_fits():
    assert show.text("<b>").endswith(">&lt;b&gt;</pre>")
    assert "overflow-wrap:anywhere" in show.text("x")
    assert ">training.<wbr>batch_<wbr>size<" in show.name_of("training.batch_size")
    assert "max-width:100%" in show.picture(b"x", "a curve")
    bar = show.progress(5, 20, {"loss": 1.23456, "eta_seconds": 61.0}, "<at work>")
    assert "step 5 of 20 (25 %)" in bar
    assert "training loss 1.235, about 1 min 1 s left" in bar
    assert "&lt;at work&gt;" in bar
