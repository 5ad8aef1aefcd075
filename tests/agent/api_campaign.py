"""schemathesis over the agent's OpenAPI document: ``python tests/agent/api_campaign.py CASES``.

In a process of its own: schemathesis is a pytest plugin, and its warnings are not ours.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_client import controlling
from agent_server import TOKEN

from inferos.agent.history import AgentStore
from inferos.agent.launch import opened_state
from inferos.config import Policy

ROOT = Path(__file__).resolve().parents[2]
# A policy can follow its schema and break a rule over several keys, or one together with what is in force; a version
# can be one that is not remembered; times can be out of order. The guard refuses methods before a route is known, so its
# Allow header is that of the whole agent.
CONFIGURATION = """
[checks.allow_header_conformance]
enabled = false

[[operations]]
include-path-regex = "^/v1/(policy|policy/rollback|metrics/push|baseline|history|config)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400"]

[[operations]]
include-path-regex = "^/v1/ready$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "503"]
"""


def main(cases: int) -> int:
    state = opened_state(Policy(), AgentStore(), {})
    state.ready.set()
    with controlling(state) as control, tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "schemathesis.toml"
        configuration.write_text(CONFIGURATION, encoding="utf-8")
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "run",
                   str(ROOT / "docs" / "openapi.json"), "--url", control.agent.url, "-H", f"X-Inferos-Token: {TOKEN}",
                   "--max-examples", str(cases), "--mode", "all", "--phases", "examples,coverage,fuzzing",
                   "--seed", "1", "--generation-database", ":memory:", "--no-color"]  # fmt: skip
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
