"""The example in the package's docstring runs as it stands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import linearize


def test_a_gate_and_a_recipe_of_ones_own(make_teacher, tmp_path: Path) -> None:
    make_teacher("teacher")
    (tmp_path / "example.py").write_text(re.search(r"```python\n(.*?)```", linearize.__doc__, re.DOTALL)[1])
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["linearize"]["mixer"]["gate"] == {"name": "key_length", "bias": 5.0}
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "after surgery", "after transfer", "after finetune"]
    assert "class KeyLengthGate" in "".join(path.read_text() for path in (tmp_path / "out").glob("*.py"))
    code = (
        "import sys, torch; sys.modules['linearize'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)\n"
        "print(float(model.model.layers[0].self_attn.mixer.gate.bias.mean()) != 0)\n"
    )
    alone = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert alone.stdout.strip() == "True", alone.stderr
