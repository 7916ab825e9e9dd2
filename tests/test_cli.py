import os
import subprocess
import sys

import pytest

from tortoise_hf.cli import load_config, run
from tortoise_hf.errors import UserError

RECIPE = """
data:
  root: recordings
training:
  output_dir: runs/x
  batch_size: 16
optim:
  learning_rate: 1e-4
  milestones: [10, 20]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_files_and_flags_merge_left_to_right(recipe, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("training:\n  batch_size: 32\n  seed: 7\n")
    cfg = load_config(["--config", str(recipe), "--config", str(more), "--training.seed", "8"], "x")
    assert (cfg.training.batch_size, cfg.training.seed) == (32, 8)
    assert cfg.optim.learning_rate == 1e-4  # YAML itself would read 1e-4 as text
    assert cfg.optim.milestones == (10, 20)
    assert cfg.data.root == "recordings"


def test_cadence_takes_steps_and_shares(recipe):
    cfg = load_config(["--config", str(recipe), "--training.eval_steps", "0.1", "--training.save_steps", "25"], "x")
    assert (cfg.training.eval_steps, cfg.training.save_steps, cfg.training.logging_steps) == (0.1, 25, None)
    assert isinstance(cfg.training.save_steps, int)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--optim.learning_rat", "1"], "optim.learning_rat is not a setting; did you mean optim.learning_rate?"),
        (["--optim.learning_rate", "fast"], "expected a value of type float, got fast"),
        (["--optim.learning_rate", "-1"], "optim.learning_rate must be above 0, got -1.0"),
        (["--data.padding", "zeros"], "expected one of 'mask', 'stop', got zeros"),
        (["--training.batch_size", "1.5"], "expected a value of type int, got 1.5"),
        (["--training.max_steps", "1e3"], '"training.max_steps": expected a value of type int, got 1e3; write 1000'),
        (["--training.save_steps", "0"], "1 or more, or a share of the run below 1, got 0; switch it off"),
        (["--training.eval_steps", "often"], '"training.eval_steps": expected a value of type int or float, got often'),
        (["--optim.lr_schedule", "wavy"], "'inverse_sqrt', got wavy"),
        (["--optim.milestones", "[1,x]"], "expected a value of type int, got [1, 'x']"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_end_in_one_sentence(recipe, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", str(recipe), *arguments], "x")
    assert stop.value.code == 2
    assert_one_sentence(capsys, sentence)


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("data:\n  rot: x\n", "data.rot is not a setting; did you mean data.root?"),
        ("dataa:\n  root: x\n", "dataa"),
        ("data: 3\n", "data"),
        ("data: [\n", "wrong.yaml line 2 is not YAML (expected the node content"),
        ("", "wrong.yaml holds no settings; expected a section such as data:"),
        ("# data:\n#   root: x\n", "wrong.yaml holds no settings"),
        ("data:\n", "wrong.yaml holds no settings"),
        ("data:\n\troot: x\n", "wrong.yaml line 2 is indented with a tab; use spaces"),
        ("data:\n  root: x\n", "training.output_dir: not set"),
    ],
)
def test_wrong_files_end_in_one_sentence(tmp_path, capsys, yaml, sentence):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml)
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", str(path)], "x")
    assert stop.value.code == 2
    assert_one_sentence(capsys, sentence)


def test_a_config_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        load_config(["--config", "nowhere.yaml"], "x")
    assert_one_sentence(capsys, "nowhere.yaml")


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "push.py", "speak.py"])
def test_outside_the_environment_a_sentence_says_how_to_get_in(script, repository):
    """Without `site` Python finds no installed packages."""
    command = [sys.executable, "-S", str(repository / "scripts" / script), "--help"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: tortoise_hf is not installed for {sys.executable}. ")
    assert "bin/activate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def assert_one_sentence(capsys, sentence):
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 2  # the sentence and where to look


def test_user_errors_become_a_sentence_and_exit_code_1(capsys):
    def fail():
        raise UserError("the folder is empty")

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: the folder is empty\n"


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "export.py", "train_dvae.py"])
def test_help_answers_quickly(script, repository):
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(repository / "scripts" / script), "--help"], capture_output=True, text=True, check=True
    )
    after = os.times()
    # Loading torch alone takes longer than that. The processor's time: a busy machine says nothing about the script.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3
    assert "usage" in done.stdout


def test_loading_packages_leaves_garbage_collection_on_and_keeps_what_was_loaded(repository):
    program = (
        "import gc, sys\n"
        "from tortoise_hf.cli import loading_packages\n"
        "before = gc.get_freeze_count()\n"
        "with loading_packages():\n"
        "    assert not gc.isenabled()\n"
        "    import torch\n"
        "loaded = gc.get_freeze_count()\n"
        "assert gc.isenabled() and loaded > before + 10_000, (before, loaded)\n"
        "with loading_packages():\n"
        "    assert gc.isenabled()\n"
        "assert gc.get_freeze_count() == loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=repository)


def test_a_compiler_that_fails_is_told_in_words(capsys):
    from torch._inductor.exc import InvalidCxxCompiler

    def main():
        raise InvalidCxxCompiler

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: torch.compile failed (")
    assert "Leave out accelerate's --dynamo_backend" in said


BARS = """
import sys, time
from tortoise_hf.cli import run

def work():
    from tqdm import tqdm
    for _ in tqdm(range(20)):
        time.sleep(0.05)

run(work) if sys.argv[1] == "run" else work()
"""


def test_progress_bars_do_not_fill_files():
    """Twenty moves in a second: few of them are written, without `run` most."""
    moves = {}
    env = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    for how in ("run", "plain"):
        done = subprocess.run([sys.executable, "-c", BARS, how], capture_output=True, text=True, check=True, env=env)
        assert "20/20" in done.stderr
        moves[how] = done.stderr.count("it/s") + done.stderr.count("?it")
    assert moves["run"] <= 3
    assert moves["plain"] >= 5
