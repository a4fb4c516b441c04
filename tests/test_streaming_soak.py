"""Long checks of streamed runs: `make soak`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("trial", range(3))
def test_a_streamed_run_killed_again_and_again_ends_with_the_same_weights(make_teacher, tmp_path, trial: int) -> None:
    teacher, dice = make_teacher(num_hidden_layers=4), random.Random(trial)
    stage = "stages=[{stage: transfer, tokens: 4096, batch: 2, micro_batch: 1}]"
    command = [sys.executable, "-m", "linearize", "--model", str(teacher), "--recipe", "lolcats", "--data", "builtin"]
    command += ["--stream-layers", "data.length=64", "data.held_out=4", stage, "--output"]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    duration = time.monotonic() - began
    kills = 0
    for _ in range(8):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=dice.uniform(0.3, 0.8) * duration)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            break
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    assert kills
    weights = sorted(path.name for path in (tmp_path / "whole").glob("model*"))
    assert len(weights) > 2
    for name in (*weights, "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "teacher", "whole"]


CAPPED = """
import resource, sys
import linearize.streaming, matplotlib.pyplot, transformers.models.llama.modeling_llama
from linearize.api import linearize
line = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = int(line.split()[1]) * 1024 + 150_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
stage = "stages=[{stage: transfer, tokens: 256, batch: 2, micro_batch: 1}]"
overrides = ["data.length=64", "data.held_out=2", "data.loss=all", stage]
linearize(sys.argv[1], "liger", sys.argv[2], data="builtin", overrides=overrides, stream_layers=sys.argv[3] == "stream")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the cap is Linux's")
def test_a_stream_runs_under_a_memory_cap_of_half_the_model(make_teacher, tmp_path) -> None:
    """300 MB of weights with 150 MB of memory above what the imports take: the resident form cannot even load them."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    teacher = make_teacher(num_hidden_layers=20, **sizes)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 300_000_000
    (teacher / "model.safetensors").unlink()
    model.save_pretrained(teacher, max_shard_size="20MB")
    # Blocks go back to the system when they are freed, so that the cap means memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = {}
    for form in ("stream", "resident"):
        command = [sys.executable, "-c", CAPPED, str(teacher), str(tmp_path / form), form]
        ended[form] = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended["stream"].returncode == 0, ended["stream"].stderr[-2000:]
    assert ended["resident"].returncode != 0 and "allocate memory" in ended["resident"].stderr


def test_a_real_model_streamed_has_the_mixers_of_the_resident_run() -> None:
    """SmolLM2-135M in fp32, with at most 130 MB of its tensors at once; the script fails otherwise."""
    script = Path(__file__).parent.parent / "scripts" / "check_streaming.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
