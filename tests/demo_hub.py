"""The end of `make demo`: push the demo voice to a Hub on loopback, pull it in a new process, compare.

    python tests/demo_hub.py runs/demo

Needs no network and no account. The new process starts with an empty cache and knows nothing but the Hub's address.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import Account, HubServer

REPOSITORY = Path(__file__).resolve().parents[1]
REPO_ID = "demo/demo-voice"
CONSENT = "Nobody's: flite, a speech synthesis program, spoke the recordings."
CARD_KEYS = ("library_name", "pipeline_tag", "license", "language", "tags", "model-index")


def main(run_dir: str) -> None:
    """Push, pull, compare; print what was found. Exit code 1 if something differs."""
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        token = f"hf_{secrets.token_hex(17)}"
        hub.accounts = {token: Account("demo")}
        # Before the first import of the Hub's client, which reads them then.
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": f"{folder}/pushing"}
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        from tortoise_hf.hub.publish import push_run
        from tortoise_hf.sample_folder import listening_lines

        pushed = push_run(run_dir, {"repo_id": REPO_ID, "consent": CONSENT})
        print(f"Pushed {run_dir} to a Hub on loopback: {pushed.url} (commit {pushed.commit[:8]}).")
        subprocess.run(
            [sys.executable, str(REPOSITORY / "scripts" / "pull.py"), REPO_ID, f"{folder}/voice"],
            env=os.environ | {"HF_HOME": f"{folder}/pulling"},
            check=True,
        )
        problems = compare(Path(run_dir) / "export", Path(folder) / "voice") + check_card(hub, run_dir)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(1)
    print("The pulled weights equal the exported ones, and the card is valid.")
    print("\n".join(listening_lines(run_dir)))


def compare(export: Path, pulled: Path) -> list[str]:
    """What differs between the export and the voice that came back."""
    import torch
    from safetensors.torch import load_file

    from tortoise_hf.models.gpt import TortoiseGPT

    weights, state = load_file(export / "model.safetensors"), TortoiseGPT.from_pretrained(pulled).state_dict()
    problems = [f"{key} differs" for key in weights if not torch.equal(weights[key], state[key])]
    names = [
        path.relative_to(pulled) for path in pulled.rglob("*") if path.is_file() and (export / path.name).is_file()
    ]
    for name in names:
        ours = name.name in ("training_summary.json", "export.json")  # rewritten: they named folders of this machine
        if not ours and (export / name).is_file() and (export / name).read_bytes() != (pulled / name).read_bytes():
            problems.append(f"{name} differs")
    return problems


def check_card(hub: HubServer, run_dir: str) -> list[str]:
    """What is wrong with the card on the Hub, and with what it plays."""
    from huggingface_hub import ModelCard

    files = hub.repository(REPO_ID).files()
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    problems = [f"the card lacks {key}" for key in CARD_KEYS if not data.get(key)]
    if ("POST", "/api/validate-yaml") not in hub.requests:
        problems.append("the Hub was not asked whether the card is valid")
    if CONSENT not in card.text:
        problems.append("the card does not say whose voice it is")
    samples = Path(run_dir) / "samples"
    if not (samples / "samples.json").is_file():
        return [*problems, f"the run spoke nothing: there is no {samples / 'samples.json'}"]
    spoken = json.loads((samples / "samples.json").read_text(encoding="utf-8"))
    played = [entry["output"]["url"] for entry in data.get("widget", [])]
    if played != [f"samples/{entry['tuned']}" for entry in spoken]:
        problems.append(f"the card plays {played or 'nothing'}, the run spoke {[entry['tuned'] for entry in spoken]}")
    for name in re.findall(r'<audio controls src="([^"]+)">', card.text):
        if files.get(name) != (samples.parent / name).read_bytes():
            problems.append(f"{name}, which the card plays, is not on the Hub as the run spoke it")
    return problems


if __name__ == "__main__":
    main(sys.argv[1])
